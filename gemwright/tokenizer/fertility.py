"""Fertility: how many tokens a text costs in one tokenizer and another, language by language.

A word's cost in tokens (Rust et al., arXiv:2012.15613) says what a language pays in context, time and money.
Gemma 2 answers with 256,000 pieces for all languages (report, section 3.1); a smaller vocabulary of one's own
text answers differently, and this is where to look before it is trained into a model.

A word is a run of letters, marks and digits. Scripts that set no space between words (Chinese, Japanese,
Thai, Lao, Khmer, Burmese, Tibetan) have no such words, so they are compared by characters alone. Means are
over texts: a language with a long text counts no more than one with a short one.
"""

import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unicodedata import category, name

import numpy as np
import regex  # re's \w leaves out marks, and so cuts the words of Indic scripts at their vowels

from gemwright.report import Report, Series, text_table
from gemwright.run import CARD, say
from gemwright.tokenizer.tokenizer import Tokenizer

MEASURES = {
    "tokens_per_character": "tokens a character",
    "tokens_per_word": "tokens a word",
    "bytes_per_token": "bytes a token",
    "byte_share": "tokens that are bytes",
}
"""What is compared, by its name in code and in print."""

UNSPACED = frozenset({"Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"})
"""Scripts without a space between words. Tibetan marks syllables, which are no words either."""

_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")


@dataclass(frozen=True)
class Fertility:
    """What one text costs in one tokenizer, without `<bos>`."""

    script: str
    """Of most of its letters, by the first word of their Unicode names; `Other` where there are none."""
    characters: int
    words: int | None
    """None for a script without spaces."""
    bytes: int
    """Of UTF-8."""
    tokens: int
    byte_tokens: int
    """Tokens that stand for one byte each, because no piece covers the character."""

    @property
    def tokens_per_character(self) -> float:
        """Lower is cheaper."""
        return self.tokens / self.characters

    @property
    def tokens_per_word(self) -> float | None:
        """None where there are no words."""
        return self.tokens / self.words if self.words else None

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 a token stands for: higher is cheaper."""
        return self.bytes / self.tokens

    @property
    def byte_share(self) -> float:
        """0 to 1."""
        return self.byte_tokens / self.tokens


def fertility(tokenizer: Tokenizer, texts: Mapping[str, str]) -> dict[str, Fertility]:
    """The cost of every text, by its label.

    Raises:
        ValueError: a text is empty, or holds half a surrogate pair.
    """
    if empty := [label for label, text in texts.items() if not text]:
        raise ValueError(f"nothing can be said of an empty text: {', '.join(empty)}. Leave it out.")
    if not texts:
        return {}
    rows = tokenizer.encode_arrays(list(texts.values()))
    used = np.unique(np.concatenate(rows))
    bytes_used = used[[tokenizer.is_byte(int(number)) for number in used]]
    return {
        label: _cost(text, tokens=len(row), byte_tokens=int(np.isin(row, bytes_used).sum()))
        for (label, text), row in zip(texts.items(), rows, strict=True)
    }


def read_texts(path: Path) -> tuple[dict[str, str], list[str]]:
    """The texts of a zip or of a folder by label, and the files left out: blank, binary or not UTF-8.

    A label is a file's name without its ending, or its whole path where two would share that.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no zip and no folder, or one without a readable text.
    """
    texts: dict[str, str] = {}
    skipped: list[str] = []
    files = list(_files(path))
    shared = Counter(Path(file).stem for file, _ in files)
    for file, content in files:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = ""
        if "\0" in text or not text.strip():
            skipped.append(file)
        else:
            texts[Path(file).stem if shared[Path(file).stem] == 1 else file] = text
    if not texts:
        raise ValueError(
            f"{path} holds no readable text; left out as blank, binary or not UTF-8: {len(skipped)} files. "
            "Give a folder or a zip of UTF-8 text files, one a language."
        )
    return texts, skipped


def compare(tokenizers: Sequence[Path], texts: Path, out: Path) -> dict[str, Any]:
    """Measure tokenizers on the same texts and write `report.html` and `report.json` to `out`.

    Args:
        tokenizers: folders or `.model` files, as `Tokenizer.load` takes them.
        texts: as `read_texts` takes it.
    Returns:
        What `report.json` holds: for every tokenizer, means over all texts and by script, and each text.
    Raises:
        FileNotFoundError: no tokenizer or no texts there.
        ValueError: one of them cannot be read, or `out` holds a stage's work.
    """
    if (out / CARD).exists():
        raise ValueError(
            f"{out} holds the work of a stage, whose report this would replace. Choose another --out."
        )
    loaded = {label: Tokenizer.load(path) for label, path in _labels(tokenizers).items()}
    languages, skipped = read_texts(texts)
    if skipped:
        say(f"left out as blank, binary or not UTF-8: {', '.join(skipped)}")
    costs = {label: fertility(tokenizer, languages) for label, tokenizer in loaded.items()}
    data: dict[str, Any] = {"texts": len(languages), "skipped": skipped, "tokenizers": {}}
    for label, tokenizer in loaded.items():
        scripts: dict[str, list[Fertility]] = {}
        for cost in costs[label].values():
            scripts.setdefault(cost.script, []).append(cost)
        data["tokenizers"][label] = {
            "vocab_size": tokenizer.vocab_size,
            "sha256": tokenizer.sha256,
            "mean": _mean(costs[label].values()),
            "scripts": {
                script: {"texts": len(scripts[script]), **_mean(scripts[script])}
                for script in sorted(scripts, key=lambda script: (-len(scripts[script]), script))
            },
            "languages": {text: asdict(cost) | _mean([cost]) for text, cost in costs[label].items()},
        }
    _page(data).write(out)
    return data


def tables(data: Mapping[str, Any]) -> str:
    """For a terminal: every tokenizer's means, and what a character costs by script."""
    by_script = _by_script(data, "tokens_per_character")
    return "\n\n".join([text_table(*_means(data)), MEASURES["tokens_per_character"], text_table(*by_script)])


def _cost(text: str, tokens: int, byte_tokens: int) -> Fertility:
    letters: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if category(character)[0] == "L":
            letters[name(character, "Other").split()[0].replace("CJK", "Han").capitalize()] += count
    script = letters.most_common(1)[0][0] if letters else "Other"
    return Fertility(
        script=script,
        characters=len(text),
        words=None if script in UNSPACED else len(_WORD.findall(text)),
        bytes=len(text.encode()),
        tokens=tokens,
        byte_tokens=byte_tokens,
    )


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents in an order that no file system changes; hidden files are passed over."""
    if not path.exists():
        raise FileNotFoundError(f"no texts at {path}. Give a folder or a zip of text files, one a language.")
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        yield from ((file, found[file].read_bytes()) for file in sorted(found) if not _hidden(file))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            members = sorted(info.filename for info in archive.infolist() if not info.is_dir())
            yield from ((file, archive.read(file)) for file in members if not _hidden(file))
    else:
        raise ValueError(
            f"{path} is no zip and no folder. Give a folder or a zip of text files, one a language."
        )


def _hidden(file: str) -> bool:
    # macOS adds __MACOSX to the zips that it packs
    return any(part.startswith(".") or part == "__MACOSX" for part in file.split("/"))


def _labels(paths: Sequence[Path]) -> dict[str, Path]:
    """Each path by its last part, or by itself where two share that."""
    short = {path: path.name if path.is_dir() else path.stem for path in paths}
    shared = Counter(short.values())
    return {short[path] if shared[short[path]] == 1 else str(path): path for path in short}


def _mean(costs: Iterable[Fertility]) -> dict[str, float | None]:
    """The mean of each measure over the texts that have it."""
    means: dict[str, float | None] = {}
    costs = list(costs)
    for measure in MEASURES:
        values = [value for cost in costs if (value := getattr(cost, measure)) is not None]
        means[measure] = round(sum(values) / len(values), 4) if values else None
    return means


Table = tuple[list[str], list[list[str]]]


def _means(data: Mapping[str, Any]) -> Table:
    header = ["tokenizer", "pieces", *MEASURES.values()]
    return header, [
        [label, f"{entry['vocab_size']:,}", *(_print(measure, entry["mean"]) for measure in MEASURES)]
        for label, entry in data["tokenizers"].items()
    ]


def _by_script(data: Mapping[str, Any], measure: str) -> Table:
    entries = list(data["tokenizers"].values())
    return ["script", "texts", *data["tokenizers"]], [
        [script, str(first["texts"]), *(_print(measure, entry["scripts"][script]) for entry in entries)]
        for script, first in entries[0]["scripts"].items()
    ]


def _print(measure: str, values: Mapping[str, Any]) -> str:
    value = values[measure]
    return "" if value is None else f"{value:.1%}" if measure == "byte_share" else f"{value:.3f}"


def _page(data: dict[str, Any]) -> Report:
    page = Report(f"Fertility over {data['texts']} texts", data)
    page.text(
        "What a text costs in tokens. Means are over texts, each counting once. Scripts that set no space "
        "between words are compared by characters alone."
    )
    page.table(*_means(data))
    places = [float(place) for place in range(1, data["texts"] + 1)]
    series = [
        Series(label, places, sorted(text["tokens_per_character"] for text in entry["languages"].values()))
        for label, entry in data["tokenizers"].items()
    ]
    page.plot(
        series,
        x="texts, from the cheapest to the dearest",
        y=MEASURES["tokens_per_character"],
        caption="Each tokenizer in its own order. 1 is a token a character; bytes cost up to 4.",
    )
    for measure, words in MEASURES.items():
        page.heading(f"{words.capitalize()}, by script")
        page.table(*_by_script(data, measure))
    page.heading("Every text: tokens a character")
    entries = [entry["languages"] for entry in data["tokenizers"].values()]
    page.table(
        ["text", "script", *data["tokenizers"]],
        [
            [label, text["script"], *(_print("tokens_per_character", entry[label]) for entry in entries)]
            for label, text in entries[0].items()
        ],
    )
    if data["skipped"]:
        page.text(f"Left out as blank, binary or not UTF-8: {', '.join(data['skipped'])}.", note=True)
    return page
