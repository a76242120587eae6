"""The last stretch of the laptop recipe's long form: preferences, a reward model, RLHF and WARP.

The pairs' truth is known. A student answers questions some times each; of two of its conversations the better
is the one with more right replies, or of two with as many, the one that does not loop. If none has all of
them right, the better one is the conversation as it should be. As a student seldom loops, some clean replies
are spoilt on purpose, their last words said again and again. Half of the questions make the pairs of the
reward model that RLHF sees (five times the policy's size, three averaged), half those of a second one, which
only looks on. Then each seed's SFT model goes two ways of equal cost:

    rlhf    one long run, its anchor the SFT model
    warp    two policies an iteration, their anchors moving with them, merged and drawn back

Rates and sizes were chosen on the first seed.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from gemwright.config import Config
from gemwright.data.curated import Curated
from gemwright.evaluate.answers import loops
from gemwright.generate.rollout import Rollout, in_order
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint
from gemwright.posttrain import reward, rlhf, warp
from gemwright.posttrain.reward import RewardConfig
from gemwright.posttrain.rlhf import RlhfConfig
from gemwright.posttrain.warp import WarpConfig
from gemwright.recipes.laptop_full import questions
from gemwright.recipes.laptop_full.questions import Question, right
from gemwright.run import Card, RunFolder, run_stage, write_text
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

PAIRS, WATCHED = "pairs.jsonl", "watched.jsonl"
SEQ_LEN, TOKENS = 128, 40
QUESTIONS = 4000
"""Asked for the preferences, about definitions that the student was never asked about."""
POLICIES, ITERATIONS, STEPS = 2, 2, 75
"""Of WARP; the single run takes as many updates as all of them together."""


class PreferencesConfig(Config):
    """How conversations are drawn and paired."""

    samples: PositiveInt = 2
    """Conversations a question."""
    sampling: Sampling = Sampling(temperature=1.0, max_tokens=40)
    """How they are drawn."""
    spoilt: PositiveInt = 5
    """Of so many questions one gets a further pair, whose worse side is made to loop."""
    max_batch: PositiveInt = 32
    """Conversations at a time."""
    seed: NonNegativeInt = 0
    """Of what is paired with what."""


def preferred() -> PreferencesConfig:
    """Two conversations a question."""
    return PreferencesConfig(sampling=Sampling(temperature=1.0, max_tokens=TOKENS))


def judge(average: int = 3) -> RewardConfig:
    """The reward model, WARM's average of three; begun with the chat teacher."""
    return RewardConfig(
        train=TrainConfig(
            steps=60, batch_size=32, seq_len=SEQ_LEN, optim=OptimConfig(lr=3e-4, warmup_steps=5),
            validate_every=30, save_every=60, compile=False,
        ),
        average=average,
    )  # fmt: skip


def long_run(seed: int) -> RlhfConfig:
    """One policy for as many updates as WARP has in all, near the model that it began with."""
    return RlhfConfig(
        train=TrainConfig(
            steps=POLICIES * ITERATIONS * STEPS, batch_size=8, seq_len=SEQ_LEN,
            optim=OptimConfig(lr=5e-4, warmup_steps=10), validate_every=50, save_every=100, seed=seed,
            compile=False,
        ),
        samples=4, beta=0.1, sampling=Sampling(temperature=1.0, max_tokens=TOKENS), measured_samples=4,
        seed=seed,
    )  # fmt: skip


def merged(seed: int) -> WarpConfig:
    """WARP: the same updates parted among policies and iterations, with moving anchors."""
    one = long_run(seed).but(**{"train.steps": STEPS, "mu": 0.01})
    return WarpConfig(rlhf=one, policies=POLICIES, iterations=ITERATIONS, eta=0.3)


def run(root: Path, text: Curated, seeds: tuple[int, ...]) -> dict[str, Card]:
    """Go through these stages in a `root` that has the chat teacher, the prompts and the SFT models."""
    known = questions.definitions(document.text for document in text.documents("train"))
    asked = questions.questions(known[::2], QUESTIONS, preferred().seed)
    pairs, judges = root / "preferences", (root / "reward", root / "watched_reward")
    cards = {"preferences": make_pairs(preferred(), pairs, root / "sft/seed0", asked)}
    large = root / "chat_teacher"
    cards["reward"] = reward.run(judge(), judges[0], large, pairs / PAIRS, held_out=pairs / WATCHED)
    cards["watched_reward"] = reward.run(
        judge(average=1), judges[1], large, pairs / WATCHED, held_out=pairs / PAIRS
    )
    for seed in seeds:
        start = root / f"sft/seed{seed}"
        given: Any = (start, judges[0], root / "prompts")
        for name, stage, config in (("rlhf", rlhf, long_run(seed)), ("warp", warp, merged(seed))):
            cards[f"{name}/seed{seed}"] = stage.run(
                config, root / f"{name}/seed{seed}", *given, watch=judges[1]
            )
    return cards


def make_pairs(config: PreferencesConfig, out: Path, model: Path, asked: Sequence[Question]) -> Card:
    """Let the checkpoint `model` answer the questions, and pair what it said."""

    def work(folder: RunFolder) -> dict[str, Any]:
        student, tokenizer = checkpoint.load(model), Tokenizer.load(model)
        count = config.samples
        numbered = [(number, asked[number // count].turns) for number in range(len(asked) * count)]
        drawn: list[Rollout] = []
        with folder.progress("answering", len(numbered), unit="conversations") as advance:
            for start in range(0, len(numbered), 512):
                part = numbered[start : start + 512]
                drawn += in_order(student, tokenizer, part, config.sampling, config.max_batch)
                advance(len(part))
        draw = random.Random(config.seed)
        files: dict[str, list[dict[str, Any]]] = {PAIRS: [], WATCHED: []}
        counts = {"right against wrong": 0, "clean against looping": 0}
        for number, question in enumerate(asked):
            said = drawn[number * count : (number + 1) * count]
            spoil = number // 2 % config.spoilt == 0
            for kind, better, worse in _pairs(question, said, draw, spoil):
                counts[kind] += 1
                files[WATCHED if number % 2 else PAIRS].append({"chosen": better, "rejected": worse})
        for name, records in files.items():
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            write_text(folder.path / name, "".join(lines))
        return {"questions": len(asked), **counts, **{name: len(some) for name, some in files.items()}}

    return run_stage("preferences", config, out, work, inputs={"model": model})


def quality(question: Question, said: Rollout) -> tuple[int, bool]:
    """How many replies are right, and whether none loops; the more the better."""
    replies = zip(said.replies, question.keys, strict=False)
    hits = sum(key is not None and right(reply.text, key) for reply, key in replies)
    return hits, not any(loops(reply.ids) for reply in said.replies)


_Messages = list[dict[str, str]]


def _pairs(
    question: Question, said: Sequence[Rollout], draw: random.Random, spoil: bool
) -> Iterator[tuple[str, _Messages, _Messages]]:
    """At most one pair of what was said, and one with a side that is spoilt."""
    judged = [(quality(question, one), one) for one in said if all(r.text.strip() for r in one.replies)]
    most = sum(key is not None for key in question.keys)
    grades = sorted({grade for grade, _ in judged})
    if grades and grades[0] < (most, True):
        worst = draw.choice([one.messages for grade, one in judged if grade == grades[0]])
        best = question.messages
        if grades[-1][0] == most:
            best = draw.choice([one.messages for grade, one in judged if grade == grades[-1]])
        if best != worst:
            yield "right against wrong" if grades[0][0] < most else "clean against looping", best, worst
    clean = [one for (_, is_clean), one in judged if is_clean]
    if spoil and clean:
        messages = draw.choice(clean).messages
        words = messages[-1]["content"].split(" ")
        again = " ".join(words[-draw.randint(1, len(words)) :])
        looping = " ".join([messages[-1]["content"], *[again] * draw.randint(2, 4)])
        yield "clean against looping", messages, [*messages[:-1], {"role": "model", "content": looping}]
