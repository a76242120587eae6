"""On-policy distillation: the student's own words, graded by the teacher, and by nothing else."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from gemwright.generate.rollout import Rollout, rollouts
from gemwright.losses.divergence import forward_kl, generalized_jsd, reverse_kl
from gemwright.model import checkpoint
from gemwright.model.gemma import Gemma
from gemwright.posttrain import drawn, on_policy
from gemwright.posttrain.drawn import PromptOrder, batches_of_drawn
from gemwright.posttrain.on_policy import OnPolicyConfig, run
from gemwright.run import read_card, read_metrics
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import Batch, TrainConfig
from gemwright.train.optim import OptimConfig
from gemwright.train.teacher import ObjectiveConfig, Teacher, distillation
from tests.posttrain.killed import kill

CONFIG = OnPolicyConfig.parse(
    {
        "train": {
            "steps": 4, "batch_size": 6, "seq_len": 63, "compile": False, "validate_every": 2,
            "save_every": 1, "optim": {"lr": 3e-3, "warmup_steps": 1},
        },
        "sampling": {"temperature": 1.0, "max_tokens": 10, "seed": 3},
        "max_batch": 4,
    }
)  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "model", "content": f"it is {n}"}]}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def batches_of_a_run(
    monkeypatch: pytest.MonkeyPatch, config: OnPolicyConfig, *arguments: Any, **options: Any
) -> tuple[Gemma, list[list[Batch]]]:
    """The student as it began, and the batches that its first updates would take."""
    caught: list[Any] = []

    def watch(model: Gemma, loss: Any, batches: Any, *others: Any) -> dict[str, float]:
        caught.extend([model, [batches(step) for step in range(8)]])
        return {}

    monkeypatch.setattr(on_policy, "train", watch)
    run(config, *arguments, **options)
    return caught[0], caught[1]


def test_loss_is_on_what_the_student_wrote_and_on_its_ends(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first prompts' rollouts, made anew: their ids stand in the rows, and what is theirs counts."""
    model, updates = batches_of_a_run(monkeypatch, CONFIG, tmp_path / "out", student, teacher_folder, prompts)
    tokenizer = Tokenizer.load(student)
    asked = PromptOrder(prompts, tokenizer, CONFIG.train, CONFIG.sampling).batch(0, 6)
    found = dict(rollouts(model, tokenizer, asked, CONFIG.sampling, max_batch=4))
    wanted = Counter((one.ids[1:64], tuple(map(float, one.mask[1:64]))) for one in found.values())
    seen: Counter[Any] = Counter()
    for part in updates[0]:
        for ids, targets, weights in zip(part.ids, part.targets, part.weights, strict=True):
            starts = [*(ids == 2).nonzero().flatten().tolist(), int((targets != 0).sum()) + 1]
            for start, stop in itertools.pairwise(starts):
                seen[
                    tuple(targets[start : stop - 1].tolist()), tuple(weights[start : stop - 1].tolist())
                ] += 1
    assert seen == wanted
    assert all(any(mask) and not all(mask) for _, mask in wanted)


def test_the_loss_and_its_gradient_are_gkds_by_the_definitions(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, updates = batches_of_a_run(monkeypatch, CONFIG, tmp_path / "out", student, teacher_folder, prompts)
    batch = updates[0][0]
    teacher = Teacher(checkpoint.load(teacher_folder))
    own = batch.weights.flatten() > 0
    for beta, definition in (
        (1.0, reverse_kl), (0.0, forward_kl), (0.3, lambda t, s: generalized_jsd(t, s, 0.3)),
    ):  # fmt: skip
        models = [checkpoint.load(student, dtype=torch.float32) for _ in range(2)]
        loss, _ = distillation(teacher, ObjectiveConfig(beta=beta))(models[0], batch)
        loss.backward()
        loss = loss.detach()
        logits = [m(batch.ids, batch.places).flatten(0, 1)[own] for m in (teacher.model, models[1])]
        naive = definition(logits[0].detach(), logits[1]).sum()
        naive.backward()
        assert float(loss) == pytest.approx(float(naive.detach()), rel=1e-4)
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad, atol=2e-4, rtol=2e-3)


def test_the_student_comes_nearer_to_the_teacher_on_its_own_words(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path
):
    config = CONFIG.but(**{"train.steps": 25, "train.validate_every": 25})
    card = run(config, tmp_path / "out", student, teacher_folder, prompts)
    assert card.results["held_back"] > 0
    assert card.results["prompts"] + card.results["held_back"] == 60
    assert card.results["validation"] < 0.8 * card.results["validation_before"]
    assert set(read_card(tmp_path / "out").inputs) == {"model", "teacher", "prompts"}


def test_the_student_writes_with_the_weights_of_the_moment(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    caught: list[Any] = []

    def watch(model: Gemma, loss: Any, batches: Any, *others: Any) -> dict[str, float]:
        first = batches(0)[0].ids.clone()
        assert torch.equal(first, batches(0)[0].ids)
        with torch.no_grad():
            model.unembedding.mul_(-1)
        caught.extend([first, batches(0)[0].ids])
        return {}

    monkeypatch.setattr(on_policy, "train", watch)
    run(CONFIG, tmp_path / "out", student, teacher_folder, prompts)
    assert caught[0].shape != caught[1].shape or not torch.equal(*caught)


def test_with_a_share_below_one_the_other_updates_are_on_answers(
    student: Path, teacher_folder: Path, prompts: Path, answers: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Of eight updates some are of either kind, and none is of both."""
    tokenizer = Tokenizer.load(student)
    kinds = {}
    for share in (0.0, 0.5):
        _, updates = batches_of_a_run(
            monkeypatch, CONFIG.but(on_policy=share), tmp_path / str(share), student, teacher_folder, prompts,
            answers=answers,
        )  # fmt: skip
        texts = [tokenizer.decode([int(id) for id in parts[0].ids.flatten()]) for parts in updates]
        kinds[share] = ["say" in text for text in texts]
        assert all(("say" in text) != ("def f" in text) for text in texts)
    assert all(kinds[0.0])
    assert len(set(kinds[0.5])) == 2


def test_a_bos_that_was_drawn_begins_no_conversation():
    """The longer of two in a row has one inside: only its own start, and the other's, are read from."""
    one = Rollout(("a",), (), (2, 9, 2, 9), (False, True, True, True), complete=True)
    other = Rollout(("b",), (), (2, 9, 107), (False, True, True), complete=True)
    (batch,) = batches_of_drawn([other, one], [other.mask, one.mask], CONFIG.train)
    assert batch.places.position[0, :7].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.weights[0, :7].tolist() == [1, 1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(("share", "given"), [(0.5, False), (1.0, True)])
def test_answers_and_a_share_below_one_go_together(
    student: Path, teacher_folder: Path, prompts: Path, answers: Path, tmp_path: Path, share: float,
    given: bool,
):  # fmt: skip
    with pytest.raises(ValueError, match="Give them together with a share below 1, or neither"):
        run(
            CONFIG.but(on_policy=share), tmp_path / "out", student, teacher_folder, prompts,
            answers=answers if given else None,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_is_made(
    student: Path, prompts: Path, tmp_path: Path, teacher_folder: Path
):
    from gemwright.tokenizer.train import TokenizerConfig, train

    other = tmp_path / "teacher"
    checkpoint.save(checkpoint.load(teacher_folder), other)
    texts = [f"another text number {n}, of other words like {n * 7} or w{n}" for n in range(400)]
    Tokenizer(train(texts, TokenizerConfig(vocab_size=650))).save(other)
    with pytest.raises(ValueError, match=r"has another tokenizer than the student .* Use a teacher of its"):
        run(CONFIG, tmp_path / "out", student, other, prompts)
    assert not (tmp_path / "out").exists()


def test_prompts_that_do_not_fit_a_row_are_counted_and_none_that_fits_is_an_error(
    student: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "prompts.txt"
    path.write_text("short\n" + "long " * 60 + "\nalso short\n")
    monkeypatch.setattr(drawn, "is_held_back", lambda turn: False)
    card = run(CONFIG.but(**{"train.steps": 1}), tmp_path / "out", student, teacher_folder, path)
    assert (card.results["prompts"], card.results["too_long"], card.results["held_back"]) == (2, 1, 0)
    assert "validation" not in card.results
    with pytest.raises(ValueError, match=r"none of 3 prompts fits: .* has room for 3 tokens of a prompt"):
        run(CONFIG.but(**{"sampling.max_tokens": 60}), tmp_path / "no", student, teacher_folder, path)


def test_rows_longer_than_the_context_are_refused(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match="seq_len=65 exceeds max_seq_len=64"):
        run(CONFIG.but(**{"train.seq_len": 65}), tmp_path / "out", student, teacher_folder, prompts)


def test_an_empty_reply_is_graded_at_its_end_alone(
    teacher_folder: Path, student: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A student that says nothing still learns what the teacher would have said first."""
    silent = tmp_path / "silent"
    model = checkpoint.load(student)
    with torch.no_grad():
        ids = encode_prompt(Tokenizer.load(student), [{"role": "user", "content": "def f1():"}])
        model.unembedding[107] = 10 * model.hidden(torch.tensor([ids]))[0, -1]
    checkpoint.save(model, silent)
    Tokenizer.load(student).save(silent)
    config = CONFIG.but(**{"sampling.temperature": 0.0, "train.steps": 1})
    card = run(config, tmp_path / "out", silent, teacher_folder, prompts)
    (row,) = read_metrics(tmp_path / "out")
    assert row["loss"] > 0
    assert card.results["tokens_a_reply_before"] == 0


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path
):
    config = CONFIG.but(**{"train.steps": 12})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(config, whole, student, teacher_folder, prompts)
    kill(
        "on_policy",
        config,
        killed,
        student,
        teacher_folder,
        prompts,
        when=lambda: len(read_metrics(killed)) >= 3,
    )
    assert not read_card(killed).finished
    run(config, killed, student, teacher_folder, prompts)
    assert [row["step"] for row in read_metrics(killed)] == list(range(1, 13))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_the_defaults_are_gkds():
    config = OnPolicyConfig(train=TrainConfig(steps=1, batch_size=1, seq_len=8, optim=OptimConfig()))
    assert (config.on_policy, config.objective.beta, config.sampling.temperature) == (1.0, 1.0, 1.0)


@pytest.mark.slow
@pytest.mark.compiled
def test_compiled_layers_write_and_learn_what_eager_ones_do(
    student: Path, teacher_folder: Path, prompts: Path, tmp_path: Path
):
    config = CONFIG.but(**{"train.steps": 2, "train.validate_every": 2, "train.optim.eps": 1e-3})
    run(config, tmp_path / "eager", student, teacher_folder, prompts)
    run(config.but(**{"train.compile": True}), tmp_path / "compiled", student, teacher_folder, prompts)
    one, other = (read_metrics(tmp_path / name) for name in ("eager", "compiled"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in other], abs=1e-3)
