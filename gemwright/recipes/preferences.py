"""Preference pairs whose truth is known: what a chat model replied rightly against what it did not.

A student answers questions some times each. Of two of its conversations the better is the one with more right
replies; of two with as many, the one that does not loop. If none has all of them right, the better one is the
conversation as it should be. As a student seldom loops, some clean replies are spoilt on
purpose, their last words said again and again: so a reward model sees what is never to be rewarded.

The questions are parted by their number: half make the pairs of the reward model that RLHF sees, half those
of another, which looks on.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from gemwright.config import Config
from gemwright.evaluate.answers import loops
from gemwright.generate.rollout import Rollout, in_order
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint
from gemwright.recipes.questions import Question, right
from gemwright.run import Card, RunFolder, run_stage, write_text
from gemwright.tokenizer.tokenizer import Tokenizer

PAIRS, WATCHED = "pairs.jsonl", "watched.jsonl"


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


def run(config: PreferencesConfig, out: Path, model: Path, asked: Sequence[Question]) -> Card:
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
