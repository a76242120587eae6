"""The study of targets: what a student loses when it gets a few ids a token instead of the distribution.

Same tokens, weights and order; the whole distribution of a teacher that runs along, draws from it (one from
each stratum, or independent), its largest probabilities with and without the mass of the rest, and the next
token alone. Draws are unbiased, the largest probabilities are not (arXiv 2503.16870): here is by how much.
"""

from gemwright.ablate.study import Arm, Study
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.recipes import laptop
from gemwright.run import Card

SIZES = (16, 50, 256)
RATE = 2e-2
"""The better one for student and twin alike in the laptop recipe's sweep."""


def study(seeds: int) -> Study:
    """The laptop recipe's student from every kind of target."""
    stratified = [Arm(f"stratified {m}", label=_label("stratified", m)) for m in SIZES]
    sampled = [Arm(f"sampled {m}", label=_label("sampled", m)) for m in SIZES]
    tail = [Arm(f"top {k}, tail", label=_label("top-k", k)) for k in SIZES]
    renormalised = [
        Arm(f"top {k}, renormalised", label=_label("top-k", k), changes={"objective.tail": False})
        for k in SIZES
    ]
    return Study(
        name="targets",
        title="What of a teacher's distribution has to be kept",
        base=_base,
        arms=[Arm("dense", teacher=True), *stratified, *sampled, *tail, *renormalised, Arm("next token")],
        against="dense",
        seeds=range(seeds),
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
    )


def _base(seed: int) -> PretrainConfig:
    return laptop.student(seed, RATE)


def _label(kind: str, samples: int) -> LabelConfig:
    config = {"kind": kind, "samples": samples, "seq_len": laptop.SEQ_LEN, "max_tokens": laptop.TOKENS}
    return LabelConfig.parse(config | {"compile": False})


def _of(label: Card | None, result: str) -> float | None:
    return None if label is None else label.results[result]
