"""Conversations: loss where the model speaks, whole in a row, and none sees its neighbour."""

import json
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemwright.data import conversations
from gemwright.data.conversations import (
    Conversations,
    ConversationsConfig,
    is_held_back,
    pack,
)
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, packed
from gemwright.tokenizer.chat import encode_conversation
from gemwright.tokenizer.tokenizer import CONTROL, Tokenizer

FOLD = ConversationsConfig()


def chat(*said: str) -> list[dict[str, str]]:
    return [{"role": ("user", "model")[n % 2], "content": text} for n, text in enumerate(said)]


def written(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


def many(count: int = 300) -> list[dict[str, Any]]:
    draw = random.Random(1)
    words = ["if", "else", "return", "for", "while", "not", "in", "is", "and", "or", "def", "class"]

    def said() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 14)))

    return [{"messages": chat(f"{n} {said()}", said(), *([said(), said()] * (n % 2)))} for n in range(count)]


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held back for validation."""
    monkeypatch.setattr(conversations, "is_held_back", lambda turn: False)


# Which targets count.


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(
    ("said", "drawn"),
    [
        (
            ("a", "b"),
            r"""
            <bos> <start_of_turn> user \n a <end_of_turn> \n <start_of_turn> model \n b <end_of_turn> <eos>
            0     0               0    0  0 0             0  0               0     0  1 1             1
            """,
        ),
        (
            ("a", "b", "c", "d"),
            r"""
            <bos> <start_of_turn> user \n a <end_of_turn> \n <start_of_turn> model \n b <end_of_turn>
            0     0               0    0  0 0             0  0               0     0  1 1
            \n <start_of_turn> user \n c <end_of_turn> \n <start_of_turn> model \n d <end_of_turn> <eos>
            0  0               0    0  0 0             0  0               0     0  1 1             1
            """,
        ),
        (
            ("a", "b", "c", "d", "e", "f"),
            r"""
            <bos> <start_of_turn> user \n a <end_of_turn> \n <start_of_turn> model \n b <end_of_turn>
            0     0               0    0  0 0             0  0               0     0  1 1
            \n <start_of_turn> user \n c <end_of_turn> \n <start_of_turn> model \n d <end_of_turn>
            0  0               0    0  0 0             0  0               0     0  1 1
            \n <start_of_turn> user \n e <end_of_turn> \n <start_of_turn> model \n f <end_of_turn> <eos>
            0  0               0    0  0 0             0  0               0     0  1 1             1
            """,
        ),
    ],
    ids=["one turn", "two turns", "three turns"],
)
def test_loss_is_on_what_the_model_says_and_on_its_ends(
    tokenizer: Tokenizer, tmp_path: Path, said: tuple[str, ...], drawn: str
):
    """Every piece, and under it whether it counts as a target."""
    lines = [line.split() for line in drawn.split("\n") if line.strip()]
    ids: list[int] = []
    marks: list[float] = []
    for piece, mark in zip(chain(*lines[::2]), chain(*lines[1::2]), strict=True):
        own = [CONTROL[piece]] if piece in CONTROL else [2] if piece == "<bos>" else [1]
        if not piece.startswith("<"):
            own = tokenizer.encode(piece.replace("\\n", "\n"))
        ids += own
        marks += [float(mark)] * len(own)
    path = written(tmp_path / "a.jsonl", {"messages": chat(*said)})
    data = Conversations.read(path, tokenizer, 80, FOLD)
    (row,), (weights,) = data.take(data.in_order()), data.weights(data.in_order())
    assert row.tolist() == ids + [0] * (81 - len(ids))
    assert [0.0, *weights.tolist()] == marks + [0.0] * (81 - len(ids))


@pytest.mark.usefixtures("whole")
def test_a_weight_multiplies_what_a_conversation_counts(tokenizer: Tokenizer, tmp_path: Path):
    path = written(tmp_path / "a.jsonl", *[{"messages": chat("a", "b"), "weight": w} for w in (0, 0.5, 2)])
    data = Conversations.read(path, tokenizer, 60, FOLD)
    counted = Counter(data.weights(data.in_order()).flatten().tolist())
    assert counted.pop(0.0)
    assert counted == {0.5: 3, 2.0: 3}


# Packing.


def test_every_conversation_is_in_one_row_and_whole(tokenizer: Tokenizer, tmp_path: Path):
    records = many()
    data = Conversations.read(written(tmp_path / "a.jsonl", *records), tokenizer, 255, FOLD)
    rows = [[int(id) for id in row if id] for row in data.take(data.in_order())]
    found: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        starts = [place for place, id in enumerate(row) if id == 2]
        assert starts[0] == 0
        for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
            found[tuple(row[start:stop])] += 1
    wanted = [r["messages"] for r in records if not is_held_back(r["messages"][0]["content"])]
    assert found == Counter(tuple(encode_conversation(tokenizer, said)[0]) for said in wanted)
    assert data.counts["conversations"] == len(wanted)


def test_rows_are_nearly_full():
    draw = random.Random(0)
    lengths = [min(1024, int(draw.lognormvariate(4.5, 0.9)) + 2) for _ in range(4000)]
    rows, weights, _ = pack([([2] + [200] * (n - 1), [1.0] * n) for n in lengths], 1023)
    assert int((rows != 0).sum()) == sum(lengths)
    assert int(weights.sum()) == sum(lengths) - len(rows)  # the first id of a row is no target
    assert sum(lengths) / rows.numel() > 0.99


def test_a_changed_neighbour_changes_no_logit(tiny: GemmaConfig):
    """Three in a row, each longer than two windows: the others' logits are those that they have alone."""
    torch.manual_seed(0)
    model = Gemma(tiny.but(init_std=0.5)).eval()
    parts = [[2, *torch.randint(108, 700, (19,)).tolist()] for _ in range(3)]
    other = [2, *torch.randint(108, 700, (19,)).tolist()]

    def logits(*examples: list[int]) -> torch.Tensor:
        (row,), _, _ = pack([(ids, [1.0] * len(ids)) for ids in examples], 62)
        ids = row[None, :-1]
        with torch.no_grad():
            return model(ids, packed(ids == 2))[0]

    together, changed = logits(*parts), logits(parts[0], other, parts[2])
    for place, part in ((0, parts[0]), (40, parts[2])):
        alone = logits(part)[:20]
        assert alone.abs().max() > 5
        for row in (together, changed):
            torch.testing.assert_close(row[place : place + 20], alone, atol=1e-4, rtol=0)
    assert (together[20:40] - changed[20:40]).abs().max() > 1


def test_without_the_begin_of_a_document_a_neighbour_would_be_seen(tiny: GemmaConfig):
    """What the test above would find: the same rows with nothing that keeps them apart."""
    torch.manual_seed(0)
    model = Gemma(tiny.but(init_std=0.5)).eval()
    ids = torch.randint(108, 700, (1, 40))
    other = ids.clone()
    other[0, :20] = torch.randint(108, 700, (20,))
    with torch.no_grad():
        assert (model(ids)[0, 20:] - model(other)[0, 20:]).abs().max() > 1


@pytest.mark.usefixtures("whole")
def test_a_conversation_longer_than_a_row_loses_its_last_exchanges(tokenizer: Tokenizer, tmp_path: Path):
    long = chat("a", "b", "c", "d " * 40, "e", "f")
    path = written(tmp_path / "a.jsonl", {"messages": long}, {"messages": chat("g " * 60, "h")})
    data = Conversations.read(path, tokenizer, 40, FOLD)
    assert [id for id in data.take(data.in_order())[0].tolist() if id] == encode_conversation(
        tokenizer, long[:2]
    )[0]
    assert (data.counts["shortened"], data.counts["too_long"], data.counts["conversations"]) == (1, 1, 1)


@pytest.mark.usefixtures("whole")
def test_nothing_that_fits_is_an_error_with_a_remedy(tokenizer: Tokenizer, tmp_path: Path):
    path = written(tmp_path / "a.jsonl", {"messages": chat("g " * 60, "h")})
    with pytest.raises(ValueError, match=r"no conversation to train on: .*'too_long': 1.* raise seq_len"):
        Conversations.read(path, tokenizer, 20, FOLD)
    with pytest.raises(ValueError, match="a conversation has 9 tokens, and a row 8"):
        pack([([2] * 9, [1.0] * 9)], 7)


# Order and splits.


def test_the_order_is_a_function_of_seed_and_step_and_new_in_each_epoch(tokenizer: Tokenizer, tmp_path: Path):
    path = written(tmp_path / "a.jsonl", *many())
    one, same, other = (Conversations.read(path, tokenizer, 63, FOLD, seed=seed) for seed in (1, 1, 2))

    def epoch(data: Conversations, number: int) -> list[int]:
        return [int(data.numbers(number * len(data) + n, 1)[0]) for n in range(len(data))]

    assert epoch(one, 0) == epoch(same, 0)
    assert sorted(epoch(one, 0)) == sorted(epoch(one, 1)) == list(range(len(one)))
    assert epoch(one, 0) != epoch(one, 1) != epoch(other, 1)
    assert one.numbers(3, 4).tolist() == epoch(one, 0)[12:16]


def test_one_prompt_in_fifty_is_held_back_with_all_its_answers(tokenizer: Tokenizer, tmp_path: Path):
    records = [{"messages": chat(f"prompt {n}", f"answer {k}")} for n in range(400) for k in range(2)]
    path = written(tmp_path / "a.jsonl", *records)
    train, held_back = (
        Conversations.read(path, tokenizer, 63, FOLD, split=split) for split in ("train", "validation")
    )
    assert train.counts["conversations"] + held_back.counts["conversations"] == 800
    assert 2 * 2 <= held_back.counts["conversations"] <= 2 * 20
    shown = tokenizer.decode([int(id) for id in held_back.take(held_back.in_order()).flatten() if id])
    assert shown.count("answer 0") == shown.count("answer 1") == held_back.counts["conversations"] // 2


@pytest.mark.usefixtures("whole")
def test_the_digest_is_of_rows_weights_and_length(tokenizer: Tokenizer, tmp_path: Path):
    def digest(*records: Any, seq_len: int = 63) -> str:
        return Conversations.read(written(tmp_path / "a.jsonl", *records), tokenizer, seq_len, FOLD).sha256

    base = digest({"messages": chat("a", "b")})
    assert base == digest({"messages": chat("a", "b"), "id": "other", "weight": 1})
    assert len({base, digest({"messages": chat("a", "c")}), digest({"messages": chat("a", "b"), "weight": 2}),
                digest({"messages": chat("a", "b")}, seq_len=64)}) == 4  # fmt: skip


# What is no conversation.

BAD = [
    ("{", "it is no JSON"),
    ({"prompt": "a"}, "it has no `messages`"),
    ({"messages": chat("a", "b", "c")}, "message 3, the last, is of the role user"),
    ({"messages": [*chat("a"), *chat("a", "b")]}, "message 2 is of the role user, where model is due"),
    ({"messages": chat("a", " ")}, "message 2, the model's, is empty"),
    ({"messages": [{"role": "user", "content": ["a"]}, *chat("a", "b")[1:]]}, "has a list for content"),
    ({"messages": [*chat("a", "b"), {"role": "system", "content": "late"}]}, "of the role system"),
    ({"messages": chat("a", "b"), "weight": -1}, "its weight is -1"),
    ({"messages": chat("a", "b"), "weight": True}, "its weight is True"),
]


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize(("record", "told"), BAD, ids=[told for _, told in BAD])
def test_a_malformed_conversation_is_told_before_anything_is_computed(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, told: str
):
    path = written(tmp_path / "a.jsonl", {"messages": chat("a", "b")}, record)
    with pytest.raises(ValueError, match=rf"1 of 2 conversations are malformed.*a\.jsonl, line 2: .*{told}"):
        Conversations.read(path, tokenizer, 63, FOLD)


@pytest.mark.usefixtures("whole")
def test_malformed_ones_can_be_left_out_and_are_counted(tokenizer: Tokenizer, tmp_path: Path):
    path = written(tmp_path / "a.jsonl", *(record for record, _ in BAD), {"messages": chat("a", "b")}, "")
    data = Conversations.read(path, tokenizer, 63, FOLD.but(malformed="skip"))
    assert (data.counts["malformed"], data.counts["conversations"]) == (len(BAD), 1)


@pytest.mark.usefixtures("whole")
def test_a_system_message_is_folded_or_by_choice_malformed(tokenizer: Tokenizer, tmp_path: Path):
    said = [{"role": "system", "content": "Be kind."}, *chat("a", "b")]
    path = written(tmp_path / "a.jsonl", {"messages": said})
    data = Conversations.read(path, tokenizer, 63, FOLD)
    ids = [id for id in data.take(data.in_order())[0].tolist() if id]
    assert ids == encode_conversation(tokenizer, chat("Be kind.\n\na", "b"))[0]
    with pytest.raises(ValueError, match="of the role system"):
        Conversations.read(path, tokenizer, 63, FOLD.but(system="refuse"))


@pytest.mark.usefixtures("whole")
def test_assistant_is_another_word_for_model_and_a_folder_may_hold_the_file(
    tokenizer: Tokenizer, tmp_path: Path
):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    written(tmp_path / "answers.jsonl", {"messages": said})
    data = Conversations.read(tmp_path, tokenizer, 63, FOLD)
    assert [id for id in data.take(np.array([0], np.uint64))[0].tolist() if id] == encode_conversation(
        tokenizer, chat("a", "b")
    )[0]
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        Conversations.read(tmp_path / "nowhere.jsonl", tokenizer, 63, FOLD)
