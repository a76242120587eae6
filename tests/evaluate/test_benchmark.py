"""Benchmarks asked of models whose answers are known, or that read every prompt."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.benchmarks.forms import Form
from gemwright.benchmarks.questions import Benchmark, Question
from gemwright.evaluate import benchmark as stage
from gemwright.evaluate.benchmark import BenchmarkConfig, measure, run
from gemwright.generate.language_model import LanguageModel, load
from gemwright.model.gemma import Gemma

NO_SHOTS = BenchmarkConfig(shots=0)


@pytest.fixture(scope="module")
def model(teacher_folder: Path) -> LanguageModel:
    return load(teacher_folder)


def likelihoods(model: LanguageModel, pairs: list[tuple[str, str]]) -> list[float]:
    """By the plain definition, a pair at a time."""
    tokenizer, found = model.require_tokenizer(), []
    for context, said in pairs:
        before, after = tokenizer.encode(context, bos=True), tokenizer.encode(said)
        with torch.no_grad():
            logits = model.model(torch.tensor([before + after]))[0].double().log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        found.append(sum(float(logits[place, id]) for place, id in zip(places, after, strict=True)))
    return found


CHOICES = tuple(
    Question(f"def f{n}(self", (", x", "):", " = 3 + 4"), (n % 3,), group="ab"[n % 2]) for n in range(12)
)


def test_choices_are_scored_by_the_definition(model: LanguageModel):
    found = measure(model, Benchmark("x", "choice", CHOICES), NO_SHOTS)
    hits, by_character = 0, 0
    for record, question in zip(found.records, CHOICES, strict=True):
        form = Form()
        pairs = [(form.asked(question), said) for said in form.answers(question)]
        scores = likelihoods(model, pairs)
        assert record["scores"] == pytest.approx(scores, abs=1e-3)
        hits += scores.index(max(scores)) in question.right
        each = [score / len(said) for score, (_, said) in zip(scores, pairs, strict=True)]
        by_character += each.index(max(each)) in question.right
    told = found.to_dict()
    assert told["accuracy"]["value"] == pytest.approx(hits / 12, abs=1e-4)
    assert told["accuracy_per_character"]["value"] == pytest.approx(by_character / 12, abs=1e-4)
    assert told["accuracy"]["low"] <= told["accuracy"]["value"] <= told["accuracy"]["high"]
    assert set(told["groups"]) == {"a", "b"}


def test_truths_get_their_share_of_probability(model: LanguageModel):
    question = Question("def f(", ("self", "x", "y"), (0, 2))
    found = measure(model, Benchmark("truthfulqa", "truths", (question,)), NO_SHOTS)
    scores = likelihoods(model, [("Q: def f(\nA:", f" {choice}") for choice in question.choices])
    weights = [math.exp(score - max(scores)) for score in scores]
    assert found.records[0]["probability"] == pytest.approx(
        (weights[0] + weights[2]) / sum(weights), abs=1e-4
    )


def test_a_blank_is_decided_by_what_stands_after_it(model: LanguageModel):
    question = Question("if _ is not None: return x", ("self", "other"), (1,))
    found = measure(model, Benchmark("winogrande", "blank", (question,)), NO_SHOTS)
    scores = likelihoods(model, [(f"if {one}", " is not None: return x") for one in question.choices])
    assert found.records[0]["scores"] == pytest.approx(scores, abs=1e-3)


def test_of_a_pair_the_likelier_sentence_is_counted(model: LanguageModel):
    question = Question("", ("def one(x):", "return zebra"), (1,))
    found = measure(model, Benchmark("crows_pairs", "pair", (question,)), NO_SHOTS)
    scores = likelihoods(model, [("", one) for one in question.choices])
    assert found.records[0]["stereotypes"] == float(scores[1] > scores[0])


def test_a_question_too_long_loses_its_beginning_and_one_that_cannot_be_asked_is_not_known(
    model: LanguageModel,
):
    """Both are counted; and what is cut off is cut off for all choices alike."""
    long = Question("x = 3 + " * 60, ("1", "2"), (0,))
    never = Question("x", ("def " * 80, "y"), (0,))
    told = measure(model, Benchmark("x", "choice", (long, never)), NO_SHOTS)
    assert (told.to_dict()["shortened"], told.to_dict()["too_long"]) == (1, 1)
    assert told.records[1]["accuracy"] == 0.0
    assert len(told.records[0]["scores"]) == 2


def test_a_limit_is_spread_over_the_file(model: LanguageModel):
    found = measure(model, Benchmark("x", "choice", CHOICES), NO_SHOTS.but(limit=4))
    assert [record["number"] for record in found.records] == [0, 3, 6, 9]


def parrot(model: LanguageModel, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """The model, but for its logits: it says these ids, whatever it read, and then <eos>."""
    said = [*ids, 1]
    monkeypatch.setattr(Gemma, "logits", lambda self, hidden: written(hidden))
    places: dict[int, int] = {}

    def written(hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(hidden), model.config.vocab_size)
        for row in range(len(hidden)):
            place = places.get(row, 0)
            logits[row, said[min(place, len(said) - 1)]] = 30.0
            places[row] = place + 1
        return logits

    return model


@pytest.mark.parametrize(("text", "right"), [("so 3 + 4 = 7", 1.0), ("7 or 8", 0.0)])
def test_a_number_that_is_written_is_compared(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, text: str, right: float
):
    ids = model.require_tokenizer().encode(text)
    question = Question("3 + 4?", gold="3 + 4 = 7\n#### 7")
    config = NO_SHOTS.but(max_tokens=30)
    found = measure(parrot(model, ids, monkeypatch), Benchmark("gsm8k", "number", (question,)), config)
    assert found.records[0]["said"] == text
    assert found.records[0]["right"] == right


def test_code_that_is_written_is_run(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    ids = model.require_tokenizer().encode("    return x + 1\n")
    question = Question("def f(x):\n", tests=("def check(candidate):\n    assert candidate(1) == 2\n", "f"))
    config = NO_SHOTS.but(max_tokens=30)
    found = measure(parrot(model, ids, monkeypatch), Benchmark("humaneval", "function", (question,)), config)
    assert (found.records[0]["right"], found.records[0]["outcome"]) == (1.0, "passed")


def test_a_chat_model_is_asked_in_a_users_turn(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    seen: list[list[int]] = []
    monkeypatch.setattr(
        stage, "log_likelihoods",
        lambda model, requests: seen.extend(list(one) for one, _ in requests) or [_Zero()] * len(requests),
    )  # fmt: skip
    measure(model, Benchmark("x", "choice", CHOICES[:1]), NO_SHOTS.but(chat=True))
    text = model.require_tokenizer().decode(seen[0], control=True)
    assert text.startswith("<bos><start_of_turn>user\nQuestion: def f0(self\nAnswer:<end_of_turn>")
    assert text.endswith("<start_of_turn>model\n")


class _Zero:
    log_p = 0.0


def task(path: Path, count: int = 12) -> Path:
    rows = [{"question": q.text, "choices": q.choices, "answer": q.right[0]} for q in CHOICES[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_keeps_every_answer(teacher_folder: Path, model: LanguageModel, tmp_path: Path):
    card, (score,) = run(NO_SHOTS, tmp_path / "out", teacher_folder, [task(tmp_path / "t.jsonl")])
    lines = (tmp_path / "out/t.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in lines] == list(range(12))
    assert card.results["scores"] == [score.to_dict()]
    assert not (tmp_path / "out/resume").exists()


def test_a_run_that_broke_off_asks_what_is_missing_only(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(stage, "_CHUNK", 5)
    asked: list[list[int]] = []
    plain: Callable[..., Any] = stage._answered

    def breaking(model: Any, benchmark: Any, config: Any, numbers: list[int], examples: Any) -> Any:
        if len(asked) == 1:
            asked.append([])
            raise KeyboardInterrupt
        asked.append(list(numbers))
        return plain(model, benchmark, config, numbers, examples)

    monkeypatch.setattr(stage, "_answered", breaking)
    given = (NO_SHOTS, tmp_path / "out", teacher_folder, [task(tmp_path / "t.jsonl")])
    with pytest.raises(KeyboardInterrupt):
        run(*given)
    _, (score,) = run(*given)
    assert asked == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9], [10, 11]]
    assert [record["number"] for record in score.records] == list(range(12))


def test_the_reports_settings_are_the_default(model: LanguageModel):
    many = tuple(Question(f"q{n}", ("a", "b"), (0,)) for n in range(30))
    assert measure(model, Benchmark("arc_easy", "choice", many[:2]), BenchmarkConfig()).shots == 0
    assert measure(model, Benchmark("winogrande", "choice", many), BenchmarkConfig(limit=1)).shots == 5


def test_no_room_for_a_question_is_refused(model: LanguageModel):
    question = Question("1 + 1?", gold="2")
    with pytest.raises(ValueError, match="max_tokens=64 leaves no room for a question"):
        measure(model, Benchmark("x", "words", (question,)), NO_SHOTS.but(max_tokens=64))


def test_none_right_of_a_few_is_not_known_to_be_none(model: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    """The bootstrap alone would say (0, 0)."""
    questions = (Question("3 + 4?", gold="7"),) * 10
    config = NO_SHOTS.but(max_tokens=4, max_batch=1)
    told = measure(parrot(model, [300], monkeypatch), Benchmark("x", "number", questions), config).to_dict()
    assert told["right"]["value"] == told["right"]["low"] == 0
    assert told["right"]["high"] == pytest.approx(0.278, abs=1e-3)


def test_examples_are_those_of_the_task_they_are_named_after(tmp_path: Path):
    one, other = task(tmp_path / "one_test.jsonl"), task(tmp_path / "other.jsonl", 3)
    _, pools = stage.opened([one, other], task(tmp_path / "one_train.jsonl", 5))
    assert [None if pool is None else len(pool) for pool in pools] == [5, None]
    with pytest.raises(ValueError, match="has examples of third, and asked are one, other"):
        stage.opened([one, other], task(tmp_path / "third.jsonl"))


def test_sentences_that_are_scored_are_no_turns_of_a_chat(model: LanguageModel):
    for kind, question in (
        ("pair", Question("", ("def one(x):", "return zebra"), (1,))),
        ("blank", Question("if _ is not None: return x", ("self", "other"), (1,))),
    ):
        plain, chat = (
            measure(model, Benchmark("x", kind, (question,)), NO_SHOTS.but(chat=chat))  # type: ignore[arg-type]
            for chat in (False, True)
        )
        assert plain.records == chat.records
