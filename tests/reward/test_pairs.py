"""Preference pairs: every form that is read, what is refused and why, and which pairs an update takes."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gemwright.data.conversations import is_held_back
from gemwright.reward import pairs as reading
from gemwright.reward.pairs import Pair, Pairs, PairsConfig, read_pairs
from gemwright.tokenizer.chat import encode_conversation
from gemwright.tokenizer.tokenizer import Tokenizer

SKIP = PairsConfig(malformed="skip")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held back."""
    monkeypatch.setattr(reading, "is_held_back", lambda turn, one_in: False)


def chat(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]


def written(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def line(
    prompt: str = "why?", chosen: str = "because", rejected: str = "no", **others: Any
) -> dict[str, Any]:
    return {"chosen": chat(prompt, chosen), "rejected": chat(prompt, rejected)} | others


def ids(tokenizer: Tokenizer, *said: str) -> tuple[int, ...]:
    return tuple(encode_conversation(tokenizer, chat(*said))[0])


GOOD = ("why?", "because"), ("why?", "no")
LONG = ("why?", "what?", "this", "because"), ("why?", "what?", "this", "no")
SYSTEM = {"role": "system", "content": "be kind"}
FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"chosen": chat(*GOOD[0]), "rejected": chat(*GOOD[1])}, GOOD),
    "messages of several turns": ({"chosen": chat(*LONG[0]), "rejected": chat(*LONG[1])}, LONG),
    "text of turns": (
        {
            "chosen": "\n\nHuman: why?\n\nAssistant: what?\n\nHuman: this\n\nAssistant: because",
            "rejected": "\n\nHuman: why?\n\nAssistant: what?\n\nHuman: this\n\nAssistant: no",
        },
        LONG,
    ),
    "text that begins with a turn": (
        {"chosen": "Human: why?\n\nAssistant: because", "rejected": "Human: why?\n\nAssistant: no"}, GOOD,
    ),
    "a prompt, and messages after it": (
        {"prompt": chat("why?"), "chosen": chat(*GOOD[0])[1:], "rejected": chat(*GOOD[1])[1:]}, GOOD,
    ),
    "a prompt, and whole conversations": (line(prompt="why?") | {"prompt": "why?"}, GOOD),
    "texts, all three": ({"prompt": "why?", "chosen": "because", "rejected": "no"}, GOOD),
    "a prompt of turns, and texts": (
        {"prompt": "Human: why?\n\nAssistant: what?\n\nHuman: this", "chosen": "because", "rejected": "no"},
        LONG,
    ),
    "a prompt of messages, and texts": (
        {"prompt": chat("why?", "what?", "this"), "chosen": "because", "rejected": "no"}, LONG,
    ),
    "a system message": (
        {"prompt": [SYSTEM, *chat("why?")], "chosen": "because", "rejected": "no"},
        (("be kind\n\nwhy?", "because"), ("be kind\n\nwhy?", "no")),
    ),
    "scores in their order": (line(score_chosen=2.0, score_rejected=1.0), GOOD),
}  # fmt: skip


@pytest.mark.parametrize(("record", "said"), FORMS.values(), ids=FORMS)
def test_each_form_is_read_as_the_conversations_that_it_holds(
    tokenizer: Tokenizer, tmp_path: Path, whole: None, record: dict[str, Any], said: Any
):
    found = read_pairs(written(tmp_path / "a.jsonl", record), tokenizer, 64, PairsConfig())
    assert found.train == (Pair(*(ids(tokenizer, *side) for side in said)),)
    assert found.held_back == ()
    assert found.counts["pairs"] == 1


def test_a_compressed_file_holds_what_the_plain_one_does(tokenizer: Tokenizer, tmp_path: Path, whole: None):
    plain = written(tmp_path / "a.jsonl", *(line(f"why {n}?", chosen=f"żółw {n}") for n in range(5)))
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    one, other = (read_pairs(path, tokenizer, 64, PairsConfig()) for path in (plain, packed))
    assert one == other
    assert len(one.train) == 5


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tokenizer: Tokenizer, tmp_path: Path, whole: None):
    text = "\ufeff" + json.dumps(line()) + "\n\n  \n" + json.dumps(line("how?"))
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    found = read_pairs(tmp_path / "a.jsonl", tokenizer, 64, PairsConfig())
    assert len(found.train) == 2
    assert found.counts["malformed"] == 0


def test_most_of_real_human_preferences_are_read(tokenizer: Tokenizer, data: Path):
    """HH-RLHF's own file has pairs that are equal, or whose answer is empty."""
    path = data / "safety" / "hh_rlhf_harmless_test.jsonl.gz"
    found = read_pairs(path, tokenizer, 4096, SKIP)
    total = len(found.train) + len(found.held_back)
    assert 2200 < total <= 2312
    assert total + found.counts["malformed"] + found.counts.get("too_long", 0) == 2312
    assert 0.05 < len(found.held_back) / total < 0.2
    assert all(one != other for one, other in found.train)


# What is refused.

BAD: dict[str, tuple[Any, str]] = {
    "equal": (line(rejected="because"), "chosen and rejected are equal"),
    "of different prompts": (
        {"chosen": chat("why?", "a"), "rejected": chat("how?", "b")}, "answer different prompts",
    ),
    "swapped by score": (line(score_chosen=1, score_rejected=2.5), "score_chosen=1 is below .* swapped"),
    "swapped by the other score": (line(chosen_score=1, rejected_score=2), "chosen_score=1 is below"),
    "turned round": (line("a?", "no", "yes"), "line 1 prefers the other of the two"),
    "no JSON": ("{chosen", "it is no JSON"),
    "no object": ([1, 2], "it has no `chosen` and `rejected`"),
    "without one": ({"chosen": chat("why?", "a")}, "it has no `chosen` and `rejected`"),
    "with an empty answer": (line(rejected=" "), "ends with an empty answer"),
    "with an empty answer in a text": (
        {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant:"}, "empty answer",
    ),
    "a number": ({"chosen": 3, "rejected": "a"}, "it has a int where a conversation is due"),
    "ended by the user": (
        {"chosen": chat("a", "b", "c"), "rejected": chat("a", "b", "d")}, "of the role user",
    ),
    "without content": (
        {"chosen": [{"role": "user"}], "rejected": chat("a", "b")}, "answer different prompts",
    ),
    "begun before a turn": (
        {"chosen": "Oh. \n\nHuman: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"},
        "begins before the first turn: 'Oh",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "said"), BAD.values(), ids=BAD)
def test_a_line_that_is_no_pair_is_refused_by_its_number_and_with_a_remedy(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, said: str
):
    path = written(tmp_path / "a.jsonl", line("a?", "yes", "no"), line("b?"), record, line("c?"))
    with pytest.raises(
        ValueError, match=rf"1 of 4 lines are malformed\. The first, line 3: .*{said}.*malformed=skip"
    ):
        read_pairs(path, tokenizer, 64, PairsConfig())


@pytest.mark.parametrize("record", [record for record, _ in BAD.values()], ids=BAD)
def test_told_to_skip_it_leaves_that_line_out_and_counts_it(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, whole: None
):
    path = written(tmp_path / "a.jsonl", line("a?", "yes", "no"), record, line("c?"), record)
    found = read_pairs(path, tokenizer, 64, SKIP)
    assert [one.chosen for one in found.train] == [
        ids(tokenizer, "a?", "yes"),
        ids(tokenizer, "c?", "because"),
    ]
    assert (found.counts["pairs"], found.counts["malformed"]) == (2, 2)


def test_a_pair_may_stand_there_twice(tokenizer: Tokenizer, tmp_path: Path, whole: None):
    found = read_pairs(written(tmp_path / "a.jsonl", line(), line()), tokenizer, 64, PairsConfig())
    assert len(found.train) == 2


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*a.jsonl. Name one with `chosen`"):
        read_pairs(tmp_path / "a.jsonl", tokenizer, 64, PairsConfig())


def test_nothing_to_train_on_is_refused_with_the_reason(tokenizer: Tokenizer, tmp_path: Path, whole: None):
    path = written(tmp_path / "a.jsonl", line(chosen="because " * 40))
    with pytest.raises(ValueError, match=r"no pair to train on: .*'too_long': 1.* 64 tokens; raise seq_len"):
        read_pairs(path, tokenizer, 64, PairsConfig())
    with pytest.raises(ValueError, match="no pair to train on"):
        read_pairs(written(tmp_path / "empty.jsonl"), tokenizer, 64, PairsConfig())


# What does not fit.


def test_a_pair_that_is_too_long_loses_its_first_exchanges_on_both_sides(
    tokenizer: Tokenizer, tmp_path: Path, whole: None
):
    before = ("one?", "long " * 12, "two?", "b")
    record = {"chosen": chat(*before, "three?", "yes"), "rejected": chat(*before, "three?", "no " * 6)}
    path = written(tmp_path / "a.jsonl", record)
    full = max(len(ids(tokenizer, *before, "three?", end)) for end in ("yes", "no " * 6))
    short = tuple(ids(tokenizer, "two?", "b", "three?", end) for end in ("yes", "no " * 6))
    for room, wanted, shortened in ((full, None, 0), (full - 1, short, 1), (max(map(len, short)), short, 1)):
        found = read_pairs(path, tokenizer, room, PairsConfig())
        assert found.counts["shortened"] == shortened
        assert max(map(len, found.train[0])) <= room
        assert wanted is None or found.train == (Pair(*wanted),)


def test_a_pair_is_never_shortened_into_two_that_are_equal_or_answer_different_turns(
    tokenizer: Tokenizer, tmp_path: Path, whole: None
):
    long = "long " * 30
    records = [
        {"chosen": chat("one?", long, "two?", "b"), "rejected": chat("one?", "short", "two?", "b")},
        {"chosen": chat("one?", long, "two?", "b"), "rejected": chat("one?", long, "three?", "c")},
    ]
    found = read_pairs(written(tmp_path / "a.jsonl", *records, line()), tokenizer, 40, PairsConfig())
    assert found.train == (Pair(ids(tokenizer, *GOOD[0]), ids(tokenizer, *GOOD[1])),)
    assert found.counts["too_long"] == 2


def test_a_pair_whose_last_exchange_is_too_long_is_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path, whole: None
):
    path = written(tmp_path / "a.jsonl", line(), line("how?", rejected="no " * 80))
    found = read_pairs(path, tokenizer, 64, PairsConfig())
    assert (found.counts["pairs"], found.counts["too_long"]) == (1, 1)


# What is held back.


def test_pairs_are_held_back_by_their_prompt_and_one_in_so_many(tokenizer: Tokenizer, tmp_path: Path):
    """Of a prompt all pairs are on one side, whatever stands around them."""
    records = [line(f"why {n % 300}?", chosen=f"because {n}") for n in range(600)]
    path = written(tmp_path / "a.jsonl", *records)
    for one_in in (4, 10):
        found = read_pairs(path, tokenizer, 64, PairsConfig(held_back=one_in))
        prompts = [
            {tokenizer.decode(one.chosen).partition("because")[0] for one in part}
            for part in (found.train, found.held_back)
        ]
        assert not prompts[0] & prompts[1]
        assert (len(prompts[0]) + len(prompts[1]), len(found.train) + len(found.held_back)) == (300, 600)
        assert len(prompts[1]) == sum(is_held_back(f"why {n}?", one_in) for n in range(300))
        assert 0.5 < len(prompts[1]) / (300 / one_in) < 1.6
        assert (found.counts["pairs"], found.counts["held_back"]) == (len(found.train), len(found.held_back))


def test_a_shortened_pair_stays_on_the_side_of_its_whole_prompt(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(reading, "is_held_back", lambda turn, one_in: turn == "one?")
    before = ("one?", "long " * 30, "two?")
    record = {"chosen": chat(*before, "yes"), "rejected": chat(*before, "no")}
    found = read_pairs(written(tmp_path / "a.jsonl", record, line()), tokenizer, 40, PairsConfig())
    assert found.held_back == (Pair(ids(tokenizer, "two?", "yes"), ids(tokenizer, "two?", "no")),)


# Which pairs an update takes.


def numbered(count: int) -> Pairs:
    return Pairs(tuple(Pair((2, n), (2, n + 1000)) for n in range(count)), (), {})


def test_a_batch_is_a_function_of_step_size_and_seed():
    pairs = numbered(50)
    taken = [pairs.batch(step, 7, 3) for step in range(20)]
    again = [numbered(50).batch(step, 7, 3) for step in reversed(range(20))]
    assert taken == again[::-1]
    assert taken[0] != pairs.batch(0, 7, 4)


def test_an_epoch_takes_every_pair_once_and_the_next_one_in_another_order():
    pairs = numbered(35)
    epochs = [[one for step in range(5) for one in pairs.batch(first + step, 7, 0)] for first in (0, 5)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(pairs.train)
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(pairs.train)


def test_a_batch_may_have_more_pairs_than_there_are():
    assert Counter(numbered(4).batch(0, 8, 0)) == Counter(2 * numbered(4).train)
