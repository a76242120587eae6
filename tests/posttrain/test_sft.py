"""SFT: a checkpoint learns to answer, from the next token or from a teacher, and nothing of the questions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.data import conversations as reading
from gemwright.distill import label
from gemwright.distill.label import LabelConfig
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.posttrain.sft import SftConfig, _stored, run
from gemwright.run import read_card, read_metrics
from gemwright.tokenizer.tokenizer import Tokenizer
from tests.posttrain.killed import kill

CONFIG = SftConfig.parse(
    {
        "train": {
            "steps": 30, "batch_size": 8, "seq_len": 63, "compile": False, "validate_every": 10,
            "save_every": 5, "optim": {"lr": 1e-2, "warmup_steps": 2},
        }
    }
)  # fmt: skip


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions whose answers follow from them."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {n % 10} then {n}"},
                {"role": "model", "content": f"it is {n % 10}"},
            ]
        }
        for n in range(200)
    ]
    return written(tmp_path_factory.mktemp("chats") / "answers.jsonl", rows).parent


def test_the_answers_to_prompts_held_back_become_likelier(student: Path, chats: Path, tmp_path: Path):
    card = run(CONFIG, tmp_path / "sft", student, chats)
    found = card.results
    assert found["validation"] < 0.3 * found["validation_before"]
    assert found["conversations"] + found["held_back"] == 200
    assert found["epochs"] == pytest.approx(30 * 8 / found["rows"], abs=1e-3)
    assert set(card.inputs) == {"model", "conversations"}
    assert read_metrics(tmp_path / "sft")[-1]["validation"] == found["validation"]


def test_it_leaves_a_chat_model_that_ends_its_turn_and_the_conversation(
    student: Path, chats: Path, tmp_path: Path
):
    """After its answer the likeliest token is <end_of_turn>, and after that <eos>."""
    from gemwright.generate.language_model import load
    from gemwright.tokenizer.chat import encode_conversation

    run(CONFIG.but(**{"train.steps": 60}), tmp_path / "sft", student, chats)
    assert (tmp_path / "sft" / "chat_template.jinja").exists()
    model = load(tmp_path / "sft")
    assert model.complete([{"role": "user", "content": "say 3 then 13"}], max_tokens=12).finish == "stop"
    said = [{"role": "user", "content": "say 3 then 13"}, {"role": "model", "content": "it is 3"}]
    ids, _ = encode_conversation(model.require_tokenizer(), said)
    likeliest = model(torch.tensor([ids]))[0].argmax(-1)
    assert likeliest[-3:-1].tolist() == [107, 1]


def test_what_carries_no_loss_is_not_learnt(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Conversations of weight 0 leave the weights as they are, and only the others' words count."""
    monkeypatch.setattr(reading, "is_held_back", lambda turn: False)
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}
    path = written(tmp_path / "a.jsonl", [row | {"weight": 0.0}] * 4)
    config = CONFIG.but(**{"train.steps": 2, "train.optim.weight_decay": 0.0})
    run(config, tmp_path / "out", student, path)
    before, after = (checkpoint.load(folder).state_dict() for folder in (student, tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_distilled_it_comes_nearer_to_the_teacher_than_by_the_next_token(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """A teacher that disagrees with the answers pulls its own way."""
    from gemwright.data.conversations import Conversations, ConversationsConfig
    from gemwright.losses.divergence import forward_kl
    from gemwright.model.gemma import packed

    data = Conversations.read(chats, Tokenizer.load(student), 63, ConversationsConfig())
    ids, weights = data.take(data.in_order()[:8])[:, :-1], data.weights(data.in_order()[:8]) > 0

    def away(folder: Path) -> float:
        with torch.no_grad():
            teacher, other = (checkpoint.load(one)(ids, packed(ids == 2)) for one in (teacher_folder, folder))
        return float(forward_kl(teacher[weights], other[weights]).mean())

    run(CONFIG, tmp_path / "plain", student, chats)
    run(CONFIG, tmp_path / "distilled", student, chats, teacher=teacher_folder)
    assert away(tmp_path / "distilled") < 0.7 * min(away(student), away(tmp_path / "plain"))


def test_targets_on_disk_teach_what_the_teacher_beside_would(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """With every probability kept, the weights become those that the teacher that runs along makes."""
    config = LabelConfig(kind="top-k", samples=700, seq_len=63, compile=False)
    label.run(config, tmp_path / "targets", teacher_folder, chats)
    short = CONFIG.but(**{"train.steps": 4, "train.optim.eps": 1e-3})
    run(short, tmp_path / "online", student, chats, teacher=teacher_folder)
    run(short, tmp_path / "stored", student, chats, targets=tmp_path / "targets")
    one, other = (checkpoint.load(tmp_path / name).state_dict() for name in ("online", "stored"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-3, rtol=0.05)


def test_targets_of_other_conversations_are_refused(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    config = LabelConfig(samples=4, seq_len=63, compile=False)
    card = label.run(config, tmp_path / "targets", teacher_folder, chats)
    assert card is not None
    assert card.results["tokens"] > 0
    lines = (chats / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    other = written(tmp_path / "other.jsonl", [json.loads(line) for line in lines][1:])
    for path, changes in ((other, {}), (chats, {"train.seq_len": 62})):
        with pytest.raises(ValueError, match=r"has targets for other conversations than .* Label them"):
            run(CONFIG.but(**changes), tmp_path / "out", student, path, targets=tmp_path / "targets")
    run(CONFIG.but(**{"train.steps": 1}), tmp_path / "out", student, chats, targets=tmp_path / "targets")


def test_conversations_are_labelled_whole(teacher_folder: Path, chats: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="labelled whole"):
        label.run(LabelConfig(seq_len=63, max_tokens=1000), tmp_path / "t", teacher_folder, chats)


def test_what_does_not_fit_is_refused_before_anything_is_made(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="seq_len=65 exceeds max_seq_len=64"):
        run(CONFIG.but(**{"train.seq_len": 65}), out, student, chats)
    with pytest.raises(ValueError, match="without a teacher there is the next token alone"):
        run(CONFIG.but(**{"objective.beta": 1.0}), out, student, chats)
    with pytest.raises(ValueError, match="malformed"):
        run(CONFIG, out, student, written(tmp_path / "bad.jsonl", [{"messages": []}]))
    with pytest.raises(FileNotFoundError, match="there is no"):
        run(CONFIG, out, student, tmp_path / "nowhere.jsonl")
    assert not out.exists()


def test_targets_of_another_tokenizer_are_refused_where_it_cuts_this_text_alike(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    """Targets speak of all pieces, those that no conversation uses included."""
    label.run(LabelConfig(samples=4, seq_len=63, compile=False), tmp_path / "t", teacher_folder, chats)
    data = reading.Conversations.read(chats, Tokenizer.load(student), 63, CONFIG.conversations)
    other = Tokenizer.load(student)
    _stored(tmp_path / "t", data, other, CONFIG.objective)
    other.sha256 = "0" * 64
    with pytest.raises(ValueError, match="text, tokenizer, seq_len=63 and how"):
        _stored(tmp_path / "t", data, other, CONFIG.objective)


def test_a_checkpoint_smaller_than_its_tokenizer_is_refused(
    student: Path, tiny: GemmaConfig, chats: Path, tmp_path: Path
):
    checkpoint.save(Gemma(tiny.but(vocab_size=200)), tmp_path / "small")
    Tokenizer.load(student).save(tmp_path / "small")
    with pytest.raises(ValueError, match=r"has 200 rows, fewer than its tokenizer's .* pieces"):
        run(CONFIG, tmp_path / "out", tmp_path / "small", chats)


def test_held_back_conversations_that_count_nothing_are_no_validation(student: Path, tmp_path: Path):
    rows = [
        {
            "messages": [{"role": "user", "content": f"q{n}"}, {"role": "model", "content": "b"}],
            "weight": float(not reading.is_held_back(f"q{n}")),
        }
        for n in range(100)
    ]
    assert 0 < sum(not row["weight"] for row in rows) < 100
    path = written(tmp_path / "a.jsonl", rows)
    card = run(CONFIG.but(**{"train.steps": 1}), tmp_path / "out", student, path)
    assert "validation" not in card.results


def test_a_teacher_of_another_vocabulary_is_refused(
    student: Path, teacher_folder: Path, chats: Path, tmp_path: Path
):
    from gemwright.tokenizer.train import TokenizerConfig, train

    checkpoint.save(checkpoint.load(teacher_folder), tmp_path / "teacher")
    texts = [f"another text number {n}, of other words like {n * 7} or w{n}" for n in range(400)]
    Tokenizer(train(texts, TokenizerConfig(vocab_size=650))).save(tmp_path / "teacher")
    with pytest.raises(
        ValueError, match=r"another tokenizer than the student .* Use a teacher of its family"
    ):
        run(CONFIG, tmp_path / "out", student, chats, teacher=tmp_path / "teacher")


def test_epochs_take_as_many_updates_as_they_need(student: Path, chats: Path, tmp_path: Path):
    card = run(CONFIG, tmp_path / "out", student, chats, epochs=1.5)
    rows, steps = card.results["rows"], card.config["train"]["steps"]
    assert 1.5 <= 8 * steps / rows < 1.5 + 8 / rows
    assert len(read_metrics(tmp_path / "out")) == steps


def test_a_killed_run_goes_on_to_the_same_bits(student: Path, chats: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(CONFIG, whole, student, chats)
    kill("sft", CONFIG, killed, student, chats, when=lambda: len(read_metrics(killed)) >= 12)
    assert not read_card(killed).finished
    run(CONFIG, killed, student, chats)
    assert [row["step"] for row in read_metrics(killed)] == list(range(1, 31))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
