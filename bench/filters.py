"""How good are the filters, and how fast?

Near-duplicates: paragraphs of a novel, each with a copy in which up to a tenth of the words were replaced,
go through the stage. Recall is over pairs of Jaccard similarity 0.85 and more; a drop is false if no kept
text is similar to it by 0.5. Editions: two of one book, as paragraphs and as passages, against one of them.
Contamination: benchmark items planted inside paragraphs, verbatim, in capitals, and with other spaces.
Personal information: finds on texts that hold little of it, a tenth of a thousandth of the lines at most
being the aim for false ones; read them. Speed: one core, passages of a novel.

    GEMWRIGHT_DATA=folder python -m bench.filters --json
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemwright.curate.dedup import NearConfig, jaccard, shingles
from gemwright.curate.pipeline import CurateConfig, curate
from gemwright.data.curated import Curated
from gemwright.data.sources import SPLITS
from gemwright.filters.decontaminate import Index, Item, read_benchmarks
from gemwright.filters.language import Identifier
from gemwright.filters.personal import find
from gemwright.filters.quality import Quality, QualityConfig
from gemwright.filters.unsafe import Unsafe, UnsafeConfig, self_identification
from gemwright.reading.records import ReadConfig, read
from gemwright.reading.units import LIBRARY, plan
from gemwright.run import write_text

NEAR = NearConfig()
ALONE = CurateConfig().but(
    quality=None, unsafe=None, self_identification=False, personal=None, exact_duplicates=False
)
"""Near-duplicates and nothing else."""


def passages(source: str | Path, characters: int = 8_000) -> list[str]:
    """The documents of a source."""
    config = ReadConfig(passage_characters=characters)
    return [one.text for unit in plan([str(source)]) for one in read(unit, config) if one.problem is None]


def edited(text: str, share: float, draw: random.Random) -> str:
    """The text with a share of its words replaced."""
    return " ".join(
        f"w{draw.randrange(10**6)}" if draw.random() < share else word for word in text.split(" ")
    )


def near_duplicates(book: Path, folder: Path) -> dict[str, Any]:
    """Recall on planted pairs, and the share of drops that nothing kept resembles."""
    draw = random.Random(0)
    originals = [text for text in passages(book, 1) if len(text.split()) >= 40][:4_000]
    texts = [text for one in originals for text in (one, edited(one, draw.random() / 10, draw))]
    rows = [json.dumps({"id": str(number), "text": text}) + "\n" for number, text in enumerate(texts)]
    write_text(folder / "planted.jsonl", "".join(rows))
    curate(ALONE, folder / "planted", [str(folder / "planted.jsonl")])
    text = Curated.open(folder / "planted")
    kept = {int(document.id) for split in SPLITS for document in text.documents(split)}
    sets = [shingles(text, NEAR) for text in texts]
    similar = [n for n in range(0, len(texts), 2) if jaccard(sets[n], sets[n + 1]) >= 0.85]
    found = sum(not {n, n + 1} <= kept for n in similar)
    holders: dict[int, list[int]] = {}
    for number in kept:
        for shingle in sets[number]:
            holders.setdefault(shingle, []).append(number)
    dropped = [number for number in range(len(texts)) if number not in kept]
    false = 0
    for number in dropped:
        near = Counter(other for shingle in sets[number] for other in holders.get(shingle, ()))
        best = max((jaccard(sets[number], sets[other]) for other, _ in near.most_common(5)), default=0.0)
        false += best < 0.5
    return {
        "near_pairs": len(similar),
        "near_recall": round(found / len(similar), 4),
        "near_dropped": len(dropped),
        "near_false_share": round(false / len(dropped), 4),
    }


def editions(books: Sequence[Path], folder: Path) -> dict[str, Any]:
    """What two editions keep together, over what one of them keeps."""
    result = {}
    for name, characters in (("paragraphs", 1), ("passages", 8_000)):
        config = ALONE.but(exact_duplicates=True, **{"read.passage_characters": characters})
        kept = [
            curate(config, folder / f"{name}-{len(some)}", list(map(str, some))).results["kept"]
            for some in (books[:1], books)
        ]
        result[f"editions_{name}"] = round(kept[1] / kept[0], 4)
        result[f"editions_{name}_of_one"] = kept[0]
    return result


def contamination(data: Path, hosts: Sequence[str]) -> dict[str, Any]:
    """Planted items found, of those planted, by benchmark; and clean documents marked."""
    index = Index.build(read_benchmarks(data / "benchmarks"))
    result: dict[str, Any] = {}
    forms: list[Callable[[str], str]] = [str, str.upper, lambda text: "  \n".join(text.split())]
    for name in ("gsm8k_test.jsonl", "HumanEval.jsonl.gz", "arc_challenge_test.json", "arc_easy_test.json"):
        items = [item for item in read_benchmarks(data / "benchmarks" / name)]
        planted = [
            f"{hosts[n % len(hosts)]} {form(item.text)} {hosts[(n + 7) % len(hosts)]}"
            for n, item in enumerate(items)
            for form in forms
        ]
        result[f"found_{name.split('.')[0]}"] = f"{sum(map(bool, map(index.find, planted)))}/{len(planted)}"
    plays = passages(data / "text" / "tinyshakespeare.txt")
    result["clean_passages_marked"] = f"{sum(map(bool, map(index.find, plays)))}/{len(plays)}"
    return result


def speeds(texts: Sequence[str], data: Path) -> dict[str, float]:
    """Megabytes a second of each check, on one core."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    index = Index.build([*read_benchmarks(data / "benchmarks"), Item("one", texts[0])])
    quality, unsafe, languages = Quality(QualityConfig()), Unsafe(UnsafeConfig()), Identifier()
    checks: dict[str, Callable[[str], Any]] = {
        "language": languages.identify,
        "unsafe": unsafe.check,
        "self_identification": self_identification,
        "contamination": index.find,
        "quality": quality.check,
        "personal": find,
        "near_shingles": lambda text: shingles(text, NEAR),
    }
    result = {}
    for name, check in checks.items():
        check(texts[0])
        start = time.perf_counter()
        for text in texts:
            check(text)
        result[f"mb_per_s_{name}"] = round(size / (time.perf_counter() - start), 1)
    return result


def personal_finds(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Finds by kind, and lines."""
    kinds = Counter(one.kind for text in texts for one in find(text))
    return {f"personal_{name}": dict(kinds), f"lines_{name}": sum(text.count("\n") + 1 for text in texts)}


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    options = parser.parse_args()
    if "GEMWRIGHT_DATA" not in os.environ:
        print("bench.filters measures on real text: set GEMWRIGHT_DATA to its folder", file=sys.stderr)
        return
    data = Path(os.environ["GEMWRIGHT_DATA"])
    books = sorted((data / "text").glob("war_and_peace*.txt"))
    novel = passages(books[0])
    hosts = [text for text in passages(books[0], 1) if len(text.split()) >= 30][:500]
    with tempfile.TemporaryDirectory() as name:
        result = near_duplicates(books[0], Path(name)) | editions(books, Path(name))
    result |= contamination(data, hosts)
    result |= personal_finds("shakespeare", passages(data / "text" / "tinyshakespeare.txt"))
    result |= personal_finds("library", passages(LIBRARY))
    result |= speeds(novel, data)
    if options.json:
        print(json.dumps(result))
        return
    for key, value in result.items():
        print(f"{key:32} {value}")


if __name__ == "__main__":
    main()
