"""Studies of distillation that the report does not show: of targets, tokens, teachers and temperatures."""

from collections.abc import Sequence

from gemwright.ablate.study import NATS, RECIPES, Arm, Study
from gemwright.ablate.verdict import Claim
from gemwright.distill.label import LabelConfig
from gemwright.recipes.base import Base
from gemwright.run import Card

SIZES = (16, 50, 256)
"""Draws a token, or k."""
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
_SCALING = "Distillation scaling laws (arXiv 2502.08606)"


def targets(base: Base, seeds: Sequence[int]) -> Study:
    """What a student loses when it gets a few ids a token instead of the distribution."""

    def label(kind: str, samples: int) -> LabelConfig:
        config = {"kind": kind, "samples": samples, "seq_len": base.student.train.seq_len}
        return LabelConfig.parse(config | {"max_tokens": base.student.max_tokens, "compile": False})

    drawn = [Arm(f"{kind} {m}", label=label(kind, m)) for kind in ("stratified", "sampled") for m in SIZES]
    tail = [Arm(f"top {k}, tail", label=label("top-k", k)) for k in SIZES]
    renormalised = [
        Arm(f"top {k}, renormalised", label=label("top-k", k), changes={"objective.tail": False})
        for k in SIZES
    ]
    return Study(
        name="targets",
        title="What of a teacher's distribution has to be kept",
        question="Same tokens, weights and order; the student learns from the whole distribution of a "
        "teacher that runs along, from draws of it (one from each stratum, or independent), from its largest "
        "probabilities with and without the mass of the rest, or from the next token. Draws are unbiased, "
        "the largest probabilities are not (arXiv 2503.16870).",
        base=base.seeded,
        arms=[Arm("dense", teacher=RECIPES), *drawn, *tail, *renormalised, Arm("next token")],
        seeds=seeds,
        claims=[
            Claim("stratified 50", "dense", NATS, equal=True, digits=4),
            Claim("stratified 50", "sampled 50", NATS, digits=4),
            Claim("sampled 50", "top 50, renormalised", NATS, digits=4),
        ],
        against="dense",
        columns={
            "ids a token": lambda _, label: _of(label, "ids_a_token"),
            "bytes a token": lambda _, label: _of(label, "bytes_a_token"),
            "mass covered": lambda _, label: _of(label, "mass_covered"),
            "student entropy": lambda card, _: card.results.get("student_entropy"),
        },
        curves={
            "stratified": {float(m): f"stratified {m}" for m in SIZES},
            "sampled": {float(m): f"sampled {m}" for m in SIZES},
            "top k, tail": {float(k): f"top {k}, tail" for k in SIZES},
            "top k, renormalised": {float(k): f"top {k}, renormalised" for k in SIZES},
        },
        levels=("dense", "next token"),
        x="draws, or k",
        shown=(NATS,),
    )


def student_tokens(base: Base, seeds: Sequence[int]) -> Study:
    """Where distillation stops paying: as many updates over more and more distinct tokens."""
    few, many = base.tokens[0], base.tokens[-1]
    return Study(
        name="student-tokens",
        title="Where distillation stops paying",
        question=f"As many updates over {', '.join(f'{n:,}' for n in base.tokens)} distinct tokens. "
        f"{_SCALING} predict that with enough text of its own a student no longer needs the teacher: the "
        "gain shrinks.",
        base=base.seeded,
        arms=[
            Arm(f"{how}, {count:,}", teacher=teacher, changes={"max_tokens": count})
            for how, teacher in (("distilled", RECIPES), ("scratch", None))
            for count in base.tokens
        ],
        seeds=seeds,
        claims=[
            Claim(f"distilled, {few:,}", f"scratch, {few:,}", NATS),
            Claim(f"distilled, {many:,}", f"scratch, {many:,}", NATS),
        ],
        curves={
            how: {float(count): f"{how}, {count:,}" for count in base.tokens}
            for how in ("distilled", "scratch")
        },
        x="distinct tokens",
    )


def teacher_size(base: Base, seeds: Sequence[int]) -> Study:
    """Teachers of several sizes for one student: does the best teacher make the best student?"""
    names = list(base.teachers)
    return Study(
        name="teacher-size",
        title="A larger teacher",
        question=f"One student, and teachers of {len(names)} sizes that read the same text. {_SCALING} find "
        "that a better teacher helps up to a point, beyond which the student is too small for it (a capacity "
        "gap).",
        base=base.seeded,
        arms=[
            *(Arm(f"{name} teacher", teacher=name) for name in names),
            Arm("no teacher"),
        ],
        teachers=base.teachers,
        seeds=seeds,
        claims=[
            Claim(f"{names[-1]} teacher", f"{names[0]} teacher", NATS),
            Claim(f"{names[0]} teacher", "no teacher", NATS),
        ],
    )


def temperature(base: Base, seeds: Sequence[int]) -> Study:
    """The temperature of both distributions in the loss."""
    return Study(
        name="temperature",
        title="The temperature of distillation",
        question="Teacher's and student's logits divided by a temperature in the loss. The report's "
        f"objective (section 3.2) has none, that is 1. {_SCALING} find 1 best; others find 0.5 "
        "(arXiv 2410.16215).",
        base=base.seeded,
        arms=[
            Arm(f"T = {t:g}", teacher=RECIPES, changes={"objective.temperature": t} if t != 1 else {})
            for t in TEMPERATURES
        ],
        seeds=seeds,
        claims=[Claim("T = 1", f"T = {t:g}", NATS) for t in TEMPERATURES if t != 1],
        curves={"distilled": {t: f"T = {t:g}" for t in TEMPERATURES}},
        x="temperature",
    )


def _of(label: Card | None, result: str) -> float | None:
    return None if label is None else label.results[result]
