"""A file of prompts: what is read, what is refused before anything is computed, and what a kill leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gemwright
from gemwright.answer import prompts
from gemwright.answer.prompts import GENERATIONS, PromptsConfig, read, run
from gemwright.generate.language_model import LanguageModel
from gemwright.generate.sampling import Sampling
from gemwright.generate.scheduler import Scheduler
from gemwright.run import read_card

SAMPLING = Sampling(max_tokens=5, temperature=1.0, seed=7)
CONFIG = PromptsConfig(sampling=SAMPLING)
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "def "},
    {"id": 17, "messages": [{"role": "user", "content": "return x"}]},
    {"turns": ["self.x"], "language": "en"},
]


@pytest.fixture(scope="module")
def model(teacher_folder: Path) -> LanguageModel:
    return gemwright.load(teacher_folder)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Nine prompts, one of them behind a blank line."""
    lines = [f"def f{number}" for number in range(9)]
    (tmp_path / "prompts.txt").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return path


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / GENERATIONS).read_text(encoding="utf-8").splitlines()]


def by_line(out: Path) -> list[dict[str, Any]]:
    return sorted(rows(out), key=lambda row: row["line"])


def test_every_prompt_is_continued_as_it_would_be_alone(
    model: LanguageModel, teacher_folder: Path, texts: Path, tmp_path: Path
):
    card = run(CONFIG, tmp_path / "out", teacher_folder, texts, max_batch=3)
    found = by_line(tmp_path / "out")
    assert [row["line"] for row in found] == [1, *range(3, 11)]
    for row in found:
        settings = SAMPLING.but(seed=SAMPLING.seed + row["line"]).to_dict()
        alone = model.complete(row["prompt"], **settings)
        assert (row["text"], row["finish"], row["prompt_tokens"]) == (
            alone.text,
            alone.finish,
            alone.prompt_tokens,
        )
        assert row["tokens"] == len(alone.tokens)
        assert set(row) == {"line", "prompt", "text", "finish", "prompt_tokens", "tokens"}
    told = card.results
    assert (told["prompts"], told["tokens"]) == (9, sum(row["tokens"] for row in found))
    assert told.get("length", 0) + told.get("stop", 0) == 9


def test_records_keep_their_ids_and_conversations_get_their_answer(
    teacher_folder: Path, records: Path, tmp_path: Path
):
    run(CONFIG, tmp_path / "out", teacher_folder, records)
    plain, chat, turns = by_line(tmp_path / "out")
    assert (plain["id"], plain["prompt"]) == ("a", "def ")
    assert chat["id"] == 17
    assert chat["messages"] == [*RECORDS[1]["messages"], {"role": "model", "content": chat["text"]}]
    assert "id" not in turns
    assert turns["messages"][0] == {"role": "user", "content": "self.x"}


def test_a_text_may_be_a_users_turn(model: LanguageModel, teacher_folder: Path, texts: Path, tmp_path: Path):
    run(CONFIG.but(chat=True), tmp_path / "out", teacher_folder, texts)
    first = by_line(tmp_path / "out")[0]
    assert first["messages"][0] == {"role": "user", "content": "def f0"}
    assert first["prompt_tokens"] == len(model.encode(first["messages"][:1]))


def test_log_probabilities_are_written_where_they_are_asked_for(
    teacher_folder: Path, records: Path, tmp_path: Path
):
    run(CONFIG.but(**{"sampling.logprobs": 2}), tmp_path / "out", teacher_folder, records)
    for row in rows(tmp_path / "out"):
        assert len(row["logprobs"]) == row["tokens"]
        for token in row["logprobs"]:
            assert token["logprob"] <= token["top"][0]["logprob"] <= 0
            assert len(token["top"]) == 2
            assert isinstance(token["piece"], str)


@pytest.mark.parametrize("torn", [b"", b'{"line": 9, "text": "half a l'])
def test_a_killed_run_goes_on_with_what_is_missing_to_the_same_texts(
    teacher_folder: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(CONFIG, whole, teacher_folder, texts, max_batch=2)

    def kill(after: int) -> Callable[..., Any]:
        append, count = prompts.Lines.append, iter(range(100))

        def appended(lines: Any, row: dict[str, Any]) -> None:
            append(lines, row)
            if next(count) == after:
                raise KeyboardInterrupt

        return appended

    with monkeypatch.context() as patch:
        patch.setattr(prompts.Lines, "append", kill(3))
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, killed, teacher_folder, texts, max_batch=2)
    assert len(rows(killed)) == 4
    assert not read_card(killed).finished
    with open(killed / GENERATIONS, "ab") as file:
        file.write(torn)
    before = (killed / GENERATIONS).read_bytes()[: -len(torn) or None]
    submitted: list[int] = []
    submit = Scheduler.submit

    def watched(scheduler: Scheduler, *arguments: Any) -> Any:
        submitted.append(1)
        return submit(scheduler, *arguments)

    monkeypatch.setattr(Scheduler, "submit", watched)
    card = run(CONFIG, killed, teacher_folder, texts, max_batch=4)
    assert len(submitted) == 5
    assert (killed / GENERATIONS).read_bytes().startswith(before)
    assert by_line(killed) == by_line(whole)
    assert card.results == read_card(whole).results


def test_a_finished_run_is_not_run_again_and_other_settings_are_refused(
    teacher_folder: Path, texts: Path, tmp_path: Path
):
    out = tmp_path / "out"
    run(CONFIG, out, teacher_folder, texts)
    before = (out / GENERATIONS).read_bytes()
    run(CONFIG, out, teacher_folder, texts, max_batch=1)
    assert (out / GENERATIONS).read_bytes() == before
    with pytest.raises(ValueError, match=r"made with other settings: sampling\.seed: 7 -> 8"):
        run(CONFIG.but(**{"sampling.seed": 8}), out, teacher_folder, texts)
    texts.write_text("another prompt\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"made with other settings: input prompts"):
        run(CONFIG, out, teacher_folder, texts)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.csv", "a,b", r"p\.csv is neither \.txt .* nor \.jsonl"),
        ("p.txt", "\n \n", r"p\.txt holds no prompt"),
        ("p.txt", "good\n" + "too long " * 60, r"p\.txt, line 2: .* exceed the model's max_seq_len=64"),
        ("p.txt", b"\xff\xfe".decode("latin-1"), None),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl, line 2: it is no JSON"),
        ("p.jsonl", '\n["a"]\n', r"p\.jsonl, line 2: it holds neither prompt"),
        ("p.jsonl", '{"prompt": 3}\n', r"p\.jsonl, line 1: it holds neither prompt"),
        ("p.jsonl", '{"turns": ["a", "b"]}\n', r"p\.jsonl, line 1: it has 2 turns, and one is answered here"),
        (
            "p.jsonl",
            '{"messages": [{"role": "system", "content": "a"}]}\n',
            r"line 1: message 1 is of the role",
        ),
        ("p.jsonl", '{"messages": ["a"]}\n', r"p\.jsonl, line 1: it holds neither prompt"),
    ],
)
def test_what_is_no_prompt_is_refused_before_anything_is_computed(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, told: str
):
    if told is None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        told = r"p\.txt is not text in UTF-8"
    else:
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.setattr(Scheduler, "step", lambda scheduler: pytest.fail("something was computed"))
    with pytest.raises(ValueError, match=told):
        run(CONFIG, tmp_path / "out", teacher_folder, tmp_path / name)
    assert not (tmp_path / "out/card.json").exists()


def test_a_prompt_keeps_its_spaces_and_loses_its_line_end(tmp_path: Path):
    (tmp_path / "p.txt").write_bytes("\ufeff  def f:  \r\n\tx".encode())
    assert [job.prompt for job in read(tmp_path / "p.txt")] == ["  def f:  ", "\tx"]
