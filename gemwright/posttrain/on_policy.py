"""On-policy distillation: the student writes, the teacher says of every token what it would have written.

The report (section 4) distils "from the teacher on the student's distribution" and cites GKD (arXiv
2306.13649) and MiniLLM (arXiv 2306.08543); divergence and shares are not told. Here, as in GKD:

    with probability lambda  x ~ prompts, y ~ student(x)      else  (x, y) ~ answers of the teacher
    loss = sum over the tokens of y of D(teacher || student), over the whole vocabulary

No gradient goes through the sampling. lambda = 1 and reverse KL are the defaults: GKD found both best for
instruction tuning. The divergence is exact (`losses.dense`), not estimated from the tokens that were drawn.

An update is a function of its number and of the weights before it: prompts, draws and the choice between
student's and teacher's words hang on seeds, so that a killed run goes on as it would have.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, PositiveInt

from gemwright.config import Config
from gemwright.data.conversations import Conversations, ConversationsConfig
from gemwright.device import pick_device, seed_everything
from gemwright.generate.rollout import in_order
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint, cost
from gemwright.model.gemma import Gemma
from gemwright.posttrain.drawn import PromptOrder, batches_of_drawn
from gemwright.posttrain.sft import require_room
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import Tokenizer, require_same_tokenizer
from gemwright.train import resume
from gemwright.train.loop import Batch, TrainConfig, batches_of, train
from gemwright.train.teacher import ObjectiveConfig, Teacher, distillation

STAGE = "on-policy"


class OnPolicyConfig(Config):
    """One run of on-policy distillation."""

    train: TrainConfig
    """Steps and optimiser. `batch_size` counts conversations, `seq_len` the tokens that one may have."""
    objective: ObjectiveConfig = ObjectiveConfig(beta=1.0)
    """The divergence; by default reverse KL, KL(student || teacher)."""
    on_policy: float = Field(default=1.0, ge=0, le=1)
    """GKD's lambda: the share of updates on the student's own words; the others need answers."""
    sampling: Sampling = Sampling(temperature=1.0, max_tokens=128)
    """How the student writes; its own distribution, unless temperature or cuts change it."""
    max_batch: PositiveInt = 32
    """Conversations written at a time."""
    conversations: ConversationsConfig = ConversationsConfig()
    """How the answers are read."""
    seed: int = 0
    """Of the choice between the student's words and answers; `train.seed` orders the prompts."""


def run(
    config: OnPolicyConfig,
    out: Path,
    model: Path,
    teacher: Path,
    prompts: Path,
    *,
    answers: Path | None = None,
    fresh: bool = False,
) -> Card:
    """Train the chat model `model` on its own replies to `prompts`, graded by `teacher`. Killed, it goes on.

    Args:
        prompts: a folder of `gemwright prompts`, or a file of prompts. Two in a hundred are held back, and
            tell how far the student still is from the teacher.
        answers: chat jsonl for the updates that are not on-policy.
    Raises:
        ValueError: the teacher has another tokenizer, no prompt fits a row, answers are missing where
            `on_policy` is below 1, or rows are longer than a model's context.
        NonFiniteError: the loss is not a number.
    """
    tokenizer = Tokenizer.load(model)
    require_same_tokenizer(teacher, tokenizer, "the student", "Use a teacher of its family.")
    for folder in (model, teacher):
        require_room(folder, config.train.seq_len)
    if (config.on_policy < 1) != (answers is not None):
        raise ValueError(
            f"on_policy={config.on_policy:g} and {'answers' if answers else 'no answers'}: what is not "
            "on-policy learns from answers. Give them together with a share below 1, or neither."
        )
    asked = PromptOrder(prompts, tokenizer, config.train, config.sampling)
    other = None
    if answers is not None:
        length, seed = config.train.seq_len, config.train.seed
        other = Conversations.read(answers, tokenizer, length, config.conversations, seed=seed)

    def work(folder: RunFolder) -> dict[str, Any]:
        return _work(config, folder, model, teacher, tokenizer, asked, other)

    named = {"model": model, "teacher": teacher, "prompts": prompts, "answers": answers}
    card = run_stage(
        STAGE, config, out, work, inputs={name: path for name, path in named.items() if path}, fresh=fresh,
        next_step=f"gemwright chat {out}",
    )  # fmt: skip
    resume.clear(out)
    return card


def _work(
    config: OnPolicyConfig, folder: RunFolder, model: Path, teacher: Path, tokenizer: Tokenizer,
    asked: PromptOrder, other: Conversations | None,
) -> dict[str, Any]:  # fmt: skip
    device = pick_device()
    seed_everything(config.seed)
    student = checkpoint.load(model, dtype=torch.float32, device=device)
    judge = Teacher.load(teacher, tokenizer, device, compiled=config.train.compile)
    loss = distillation(judge, config.objective)

    sampling = config.sampling.but(seed=(config.sampling.seed + config.seed) % 2**63)

    def on_own_words(step: int) -> list[Batch]:
        prompts = asked.batch(step, config.train.batch_size)
        drawn = in_order(student, tokenizer, prompts, sampling, config.max_batch)
        return batches_of_drawn(drawn, [one.mask for one in drawn], config.train, device)

    batches = on_own_words
    if other is not None:
        few = max(1, round(config.train.batch_size * len(other) / other.counts["conversations"]))
        on_answers = batches_of(other, config.train.but(batch_size=few), device, other.weights)

        def batches(step: int) -> list[Batch]:
            draw = np.random.default_rng((config.seed, step)).random()
            return (on_own_words if draw < config.on_policy else on_answers)(step)

    def validate(model: Gemma) -> dict[str, float]:
        if not asked.held_back:
            return {}
        drawn = in_order(model, tokenizer, list(enumerate(asked.held_back)), sampling, config.max_batch)
        parts = batches_of_drawn(drawn, [one.mask for one in drawn], config.train, device)
        with torch.no_grad():
            total = sum(float(loss(model, part)[0]) for part in parts)
        replies = [reply for one in drawn for reply in one.replies]
        return {
            "validation": total / sum(float(part.weights.sum()) for part in parts),
            "tokens_a_reply": sum(len(reply.ids) for reply in replies) / len(replies),
            "finished": sum(reply.finish == "stop" for reply in replies) / len(replies),
        }

    before = {f"{name}_before": value for name, value in validate(student).items()}
    last = train(student, loss, batches, config.train, folder, validate)
    checkpoint.save(student, folder.path)
    tokenizer.save(folder.path)
    return {
        "parameters": cost.parameters(student.config),
        "prompts": len(asked), "held_back": len(asked.held_back), "too_long": asked.too_long,
        "epochs": round(config.on_policy * config.train.steps * config.train.batch_size / len(asked), 3),
        **before, **last,
    }  # fmt: skip
