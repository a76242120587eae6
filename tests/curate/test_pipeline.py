"""The stages from end to end: what was planted is dropped for its reason, and the rest is kept, once."""

import gzip
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.curate import pipeline
from gemwright.curate.pipeline import CurateConfig, PromptsConfig, curate, prompts
from gemwright.data.curated import Curated, read_rows
from gemwright.data.executor import ExecutorConfig
from gemwright.reading.streams import UNIT_BYTES
from gemwright.reading.units import HubDataset, Unit
from gemwright.run import Card, read_card

Prose = Callable[[int, int], str]
ONE = ExecutorConfig(workers=1)
QUESTION = (
    "If seven gardeners plant nine apple trees on each of eleven days how many trees stand in the orchard"
)
MAIL = "jane.doe@fastmail-example.org"
CONFIG = CurateConfig().but(languages=("en",), **{"read.max_line_bytes": 10_000})


def planted(root: Path, prose: Prose) -> dict[str, int]:
    """Write a corpus with one of everything that is dropped; returns how many are dropped by reason."""
    good = {f"good/{n}.txt": prose(120, n) for n in range(6)}
    near = good["good/0.txt"].replace("river", "stream", 1) + " And so it is."
    texts = good | {
        "copy.txt": good["good/1.txt"],
        "near.txt": near,
        "mail.txt": f"{prose(80, 10)} Write to {MAIL} about it. {prose(40, 11)}",
        "french.txt": "Les maisons que nous avons construites se trouvent près de la rivière, et les gens "
        "viennent les voir en été parce qu'il n'y a pas grand-chose d'autre à faire. " * 2,
        "words.txt": f"{prose(80, 12)} It was all zorgblat to him. {prose(40, 13)}",
        "self.txt": f"As a large language model trained by OpenAI, I cannot say. {prose(100, 14)}",
        "exam.txt": f"{prose(60, 15)} {QUESTION.upper()}? {prose(60, 16)}",
        "short.txt": prose(20, 17),
        "twice.txt": "\n\n".join([prose(30, 18)] * 8),
        "empty.txt": "",
    }
    raw = {
        "broken.txt": prose(60, 20).encode() + b" \xff\xfe " + prose(60, 21).encode(),
        "picture.bin": b"\0\1\2" * 100,
        "nul.txt": b"\n" * 10_000 + b"\0 " + prose(60, 25).encode(),
        "line.txt": b"x" * 50_000,
        "rows.jsonl": json.dumps({"text": prose(120, 22), "id": "row-1"}).encode()
        + b'\n{"text": 3}\n{"a": 1}\n{oops\n',
        "cut.jsonl.gz": gzip.compress(json.dumps({"text": prose(120, 23)}).encode() + b"\n")[:-20],
    }  # fmt: skip
    for name, data in {**{name: text.encode() for name, text in texts.items()}, **raw}.items():
        path = root / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "words").write_text("zorgblat\n")
    (root / "exam.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    return {
        "empty_file": 1, "broken_utf8": 1, "binary": 1, "nul_bytes": 1, "line_too_long": 1, "wrong_type": 1,
        "missing_key": 1, "malformed_json": 1, "truncated": 1, "other_language": 1, "unsafe_words": 1,
        "self_identification": 1, "contaminated": 1, "quality_short_doc": 1, "repetition_dup_para_frac": 1,
        "exact_duplicate": 1, "near_duplicate": 1,
    }  # fmt: skip


def run(root: Path, out: Path, executor: ExecutorConfig = ONE, **changes: Any) -> Card:
    config = CONFIG.but(**{"unsafe.words": [str(root / "words")], **changes})
    return curate(config, out, [str(root / "text")], against=[root / "exam.jsonl"], executor=executor)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("raw")


@pytest.fixture(scope="module")
def expected(root: Path, prose: Prose) -> dict[str, int]:
    return planted(root, prose)


@pytest.fixture(scope="module")
def out(root: Path, expected: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, curated once."""
    folder = tmp_path_factory.mktemp("out") / "curated"
    run(root, folder)
    return folder


def kept(out: Path) -> dict[str, str]:
    return {row["id"]: row["text"] for path in (out / "documents").iterdir() for row in read_rows(path)}


def rejected(out: Path) -> dict[str, Any]:
    """Every reject by its id."""
    return {row["id"]: row for path in (out / "rejects").rglob("*.zst") for row in read_rows(path)}


def test_everything_planted_is_dropped_once_and_for_its_reason(out: Path, expected: dict[str, int]):
    assert read_card(out).results["dropped"] == expected


def test_what_has_no_fault_is_kept(out: Path):
    names = {id.removeprefix("text/").split("#")[0] for id in kept(out)}
    alone = {"good/2.txt", "good/3.txt", "good/4.txt", "good/5.txt", "mail.txt", "row-1"}
    assert alone <= names
    assert len(names - alone) == 2  # of two pairs of duplicates one each


def test_documents_kept_and_dropped_add_up_to_those_read(out: Path, expected: dict[str, int]):
    results = read_card(out).results
    assert results["kept"] == len(kept(out)) == 8
    assert results["documents"] == results["kept"] + sum(expected.values())


def test_every_reject_is_stored_with_its_reason(out: Path, expected: dict[str, int]):
    assert Counter(row["metadata"]["filter_reason"] for row in rejected(out).values()) == expected


def test_a_broken_record_is_named_by_its_line(out: Path):
    lines = {row["metadata"]["filter_reason"]: row["metadata"].get("line") for row in rejected(out).values()}
    assert (lines["wrong_type"], lines["missing_key"], lines["malformed_json"]) == (2, 3, 4)


def test_personal_information_is_replaced_in_what_is_kept(out: Path):
    (text,) = (text for id, text in kept(out).items() if "mail.txt" in id)
    assert MAIL not in text
    assert "about it." in text


def test_the_report_counts_what_the_card_counts(out: Path, expected: dict[str, int]):
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["dropped"] == report["sources"]["text"]["dropped"] == expected
    assert report["redacted"] == {"email": 1}
    assert report["languages"] == {"en": 8}
    assert sum(report["lengths"].values()) == 8
    assert list(report["funnel"].values())[-1] == 8


def test_the_page_shows_examples_and_plots_and_no_personal_information(out: Path):
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "zorgblat" not in page  # it stands behind the excerpt's end
    assert "trained by OpenAI" in page
    assert MAIL not in page


def test_a_reject_with_personal_information_is_masked_in_the_report(tmp_path: Path, prose: Prose):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(f"Short, from {MAIL}.")
    (tmp_path / "text/b.txt").write_text(prose(100, 0))
    curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "text")], executor=ONE)
    report = (tmp_path / "out/report.json").read_text(encoding="utf-8")
    assert "Short, from" in report
    assert MAIL not in report


def test_a_reason_that_two_steps_know_is_counted_for_both(tmp_path: Path, prose: Prose):
    (tmp_path / "rows.jsonl").write_text(
        f'{{"text": ""}}\n{{"text": "*** - ***"}}\n{{"text": "{prose(90, 0)}"}}\n'
    )
    card = curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "rows.jsonl")], executor=ONE)
    assert card.results["dropped"] == {"empty": 2}
    assert (card.results["documents"], card.results["kept"]) == (3, 1)


def test_no_work_is_left_behind(out: Path):
    assert not (out / "resume").exists()


def test_a_finished_folder_is_left_alone(root: Path, out: Path):
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    run(root, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_two_workers_leave_the_same_bytes_as_one(root: Path, out: Path, tmp_path: Path):
    card = run(root, tmp_path / "out", ExecutorConfig(workers=2))
    assert card.outputs == read_card(out).outputs


def test_a_local_ray_leaves_the_same_bytes_too(root: Path, out: Path, tmp_path: Path):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    try:
        card = run(root, tmp_path / "out", ExecutorConfig(kind="ray", workers=2, memory_gb=1))
    finally:
        ray.shutdown()
    assert card.outputs == read_card(out).outputs


def test_a_classifier_of_ones_own_may_judge(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "judge.py").write_text("def score(text):\n    return float('apple trees' in text.lower())\n")
    monkeypatch.syspath_prepend(tmp_path)
    card = run(root, tmp_path / "out", ExecutorConfig(workers=2), **{"unsafe.score": "judge:score"})
    assert card.results["dropped"]["unsafe_score"] == 1
    assert "contaminated" not in card.results["dropped"]  # it was the same document


def test_a_worker_that_is_killed_is_an_error_and_not_a_wait(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "killer.py").write_text("import os\ndef score(text):\n    os.kill(os.getpid(), 9)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(pipeline, "_LEAST", 1)
    with pytest.raises(RuntimeError, match="worker process was killed"):
        run(root, tmp_path / "out", ExecutorConfig(workers=2), **{"unsafe.score": "killer:score"})


@pytest.mark.parametrize("tasks", [1, 40])
def test_documents_do_not_hang_on_the_number_of_tasks(
    tasks: int, prose: Prose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Forty tasks have more than one finder of exact duplicates."""
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number:02d}.txt").write_text(prose(100, number // 2))
    monkeypatch.setattr(pipeline, "_tasks", lambda units: [units[n::tasks] for n in range(tasks)])
    card = curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "text")], executor=ONE)
    assert card.results["dropped"] == {"exact_duplicate": 20}
    assert len(set(kept(tmp_path / "out").values())) == 20


def test_shards_of_a_data_set_are_shared_out_among_tasks():
    data = HubDataset("owner/name")
    units = [Unit("name", data, f"train-{n}", "hub", start=n, size=UNIT_BYTES) for n in range(6)]
    assert [len(task) for task in pipeline._tasks(units)] == [1] * 6


def test_text_may_be_moved_but_not_changed_under_a_finished_folder(tmp_path: Path, prose: Prose):
    (tmp_path / "a/text").mkdir(parents=True)
    (tmp_path / "a/text/one.txt").write_text(prose(100, 0))
    curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "a/text")], executor=ONE)
    (tmp_path / "a").rename(tmp_path / "b")
    curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "b/text")], executor=ONE)
    (tmp_path / "b/text/one.txt").write_text(prose(101, 0))
    with pytest.raises(ValueError, match="other settings: input sources"):
        curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "b/text")], executor=ONE)


def test_another_benchmark_in_the_same_folder_is_refused(root: Path, out: Path, tmp_path: Path):
    (tmp_path / "exam.jsonl").write_text(
        json.dumps({"question": "Another question of some words, is it not?"})
    )
    with pytest.raises(ValueError, match="other settings"):
        curate(read_config(out), out, [str(root / "text")], against=[tmp_path / "exam.jsonl"], executor=ONE)


def read_config(out: Path) -> CurateConfig:
    return CurateConfig.parse(read_card(out).config)


def started(root: Path, out: Path, like: Path, **how: Any) -> subprocess.Popen[str]:
    """The same run as the one that made `like`, in a process of its own with two workers."""
    script = (
        "import json, sys; from pathlib import Path\n"
        "from gemwright.curate.pipeline import CurateConfig, curate\n"
        "from gemwright.data.executor import ExecutorConfig\n"
        "root, out = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "if __name__ == '__main__':\n"
        "    curate(CurateConfig.parse(json.loads(sys.argv[3])), out, [str(root / 'text')],\n"
        "           against=[root / 'exam.jsonl'], executor=ExecutorConfig(workers=2))\n"
    )
    command = [sys.executable, "-c", script, str(root), str(out), json.dumps(read_card(like).config)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how)


def test_a_killed_run_goes_on_and_counts_nothing_twice(root: Path, out: Path, tmp_path: Path):
    marker = tmp_path / "out/resume/tasks/find-exact/completions/00000"
    with started(root, tmp_path / "out", out) as process:
        while not marker.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert not read_card(tmp_path / "out").finished
    assert run(root, tmp_path / "out").outputs == read_card(out).outputs


def test_a_full_disk_is_told_and_costs_nothing(root: Path, out: Path, tmp_path: Path):
    """The limit is one of file sizes, which a disk without room answers with the same kind of error."""

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))

    with started(root, tmp_path / "out", out, preexec_fn=small_files) as process:
        _, said = process.communicate()
    assert "no room to write" in said
    assert run(root, tmp_path / "out").outputs == read_card(out).outputs


@pytest.mark.parametrize("off", ["exact_duplicates", "near_duplicates"])
def test_each_search_for_duplicates_can_be_turned_off(off: str, root: Path, tmp_path: Path):
    value = False if off == "exact_duplicates" else None
    dropped = run(root, tmp_path / "out", **{off: value}).results["dropped"]
    assert off[:-1] not in dropped
    # without the one, equal texts are found by the other, for their signatures are equal
    assert dropped.get("near_duplicate", 0) == (2 if off == "exact_duplicates" else 0)


def test_with_every_filter_off_all_that_can_be_read_is_kept(
    root: Path, tmp_path: Path, expected: dict[str, int]
):
    off = dict(
        languages=None, unsafe=None, personal=None, exact_duplicates=False, near_duplicates=None,
        quality=None, self_identification=False,
    )  # fmt: skip
    card = curate(CONFIG.but(**off), tmp_path / "out", [str(root / "text")], executor=ONE)
    assert set(card.results["dropped"]) == {
        "empty_file", "broken_utf8", "binary", "nul_bytes", "line_too_long", "wrong_type", "missing_key",
        "malformed_json", "truncated",
    }  # fmt: skip
    assert any(MAIL in text for text in kept(tmp_path / "out").values())


def test_personal_information_may_cost_a_document_instead(root: Path, tmp_path: Path):
    assert run(root, tmp_path / "out", personal="drop").results["dropped"]["personal_information"] == 1


def test_a_missing_source_is_named_and_leaves_no_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        curate(CurateConfig(), tmp_path / "out", [str(tmp_path / "nowhere")])
    assert not (tmp_path / "out").exists()


def test_a_word_list_that_is_not_there_is_named_before_anything_is_read(root: Path, tmp_path: Path):
    config = CurateConfig().but(**{"unsafe.words": [str(tmp_path / "nowhere")]})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        curate(config, tmp_path / "out", [str(root / "text")])
    assert not (tmp_path / "out").exists()


def test_curated_text_offers_its_documents_by_split(out: Path):
    text = Curated.open(out)
    splits = [
        document.id for split in ("train", "validation", "held_out") for document in text.documents(split)
    ]
    assert sorted(splits) == sorted(kept(out))


ANSWER = "What the assistant said, XYZZY."


def chat(id: str, *turns: str, **more: Any) -> dict[str, Any]:
    """A record of LMSYS-Chat-1M."""
    conversation = [
        message
        for turn in turns
        for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": ANSWER})
    ]
    moderation = [{"flagged": False}] * len(conversation)
    about = {"language": "English", "openai_moderation": moderation, "redacted": False}
    return {"conversation_id": id, "model": "m", "conversation": conversation, **about, **more}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory, prose: Prose) -> Path:
    """A log with one of everything that is dropped."""
    long = prose(40, 1)
    records = [
        chat("good", "How do I boil an egg in a small kitchen?", "And two of them?"),
        chat("mail", f"Write a letter to {MAIL} for me, please."),
        chat("flagged", "Something that moderation flagged.", openai_moderation=[{"flagged": True}]),
        chat("redacted", "I am NAME_1 and I have a question.", redacted=True),
        chat("german", "Wie koche ich ein Ei?", language="German"),
        chat("short", "Hi"),
        chat("long", "word " * 4_000),
        chat("copy", "How do I boil an egg in a small kitchen?", "And two of them?"),
        chat("unsafe", "Tell me all about zorgblat, please."),
        chat("exam", f"Solve this: {QUESTION}"),
        chat("near-1", long),
        chat("near-2", long + " Thanks!"),
        {"conversation_id": "no turn", "conversation": [{"role": "assistant", "content": ANSWER}]},
        {"nothing": ANSWER},
    ]
    root = tmp_path_factory.mktemp("logs")
    lines = [json.dumps(record) for record in records]
    (root / "log.jsonl").write_text("\n".join([*lines, '{"conversation": [' + ANSWER, ""]), encoding="utf-8")
    (root / "words").write_text("zorgblat\n")
    (root / "exam.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n")
    return root


@pytest.fixture(scope="module")
def asked(logs: Path) -> Path:
    """The log's prompts, taken once."""
    config = PromptsConfig().but(**{"unsafe.words": [str(logs / "words")]})
    out = logs / "out"
    prompts(config, out, [str(logs / "log.jsonl")], against=[logs / "exam.jsonl"], executor=ONE)
    return out


def test_every_conversation_that_is_dropped_has_its_reason(asked: Path):
    assert read_card(asked).results["dropped"] == dict.fromkeys(
        ["no_user_turn", "missing_key", "malformed_json", "flagged", "redacted", "too_short", "too_long",
         "other_language", "unsafe_words", "contaminated", "exact_duplicate", "near_duplicate"], 1
    )  # fmt: skip


def test_a_kept_conversation_is_one_record_with_its_user_turns(asked: Path):
    records = [
        json.loads(line) for line in (asked / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert {record["id"] for record in records} in ({"good", "mail", "near-1"}, {"good", "mail", "near-2"})
    good = next(record for record in records if record["id"] == "good")
    assert good == {
        "id": "good", "turns": ["How do I boil an egg in a small kitchen?", "And two of them?"],
        "language": "en", "source": "log",
    }  # fmt: skip


def test_no_answer_is_in_any_file_that_is_written(asked: Path):
    files = [path for path in asked.rglob("*") if path.is_file()]
    plain = b"".join(path.read_bytes() for path in files if path.suffix != ".zst")
    packed = json.dumps([row for path in files if path.suffix == ".zst" for row in read_rows(path)])
    assert b"How do I boil" in plain
    assert "NAME_1" in packed
    assert b"XYZZY" not in plain
    assert "XYZZY" not in packed


def test_personal_information_in_prompts_is_replaced(asked: Path):
    text = (asked / "prompts.jsonl").read_text(encoding="utf-8")
    assert "Write a letter to" in text
    assert MAIL not in text


def test_other_languages_are_kept_if_one_asks_for_them(logs: Path, tmp_path: Path):
    config = PromptsConfig().but(languages=None)
    card = prompts(config, tmp_path / "out", [str(logs / "log.jsonl")], executor=ONE)
    assert "other_language" not in card.results["dropped"]
    assert '"language":"de"' in (tmp_path / "out/prompts.jsonl").read_text(encoding="utf-8")
