"""What a study may claim: differences taken seed by seed, a paired test, and the word for it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemwright.report import mean_std, plus_minus

LEVEL = 0.05
"""The two-sided p-value below which a direction counts as resolved."""


@dataclass(frozen=True)
class Claim:
    """A direction that is expected: `better` has less of `metric` than `worse`, or more of it."""

    better: str
    """The arm that should come out better."""
    worse: str
    """The arm that it is compared with."""
    metric: str
    """What is compared."""
    lower: bool = True
    """Whether less is better."""
    equal: bool = False
    """Whether no difference is expected: then a resolved one is the opposite."""
    digits: int = 3
    """Of the difference, as it is told."""

    def judged(self, values: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
        """Difference, p-value and verdict, from each arm's values of each metric by seed."""
        pairs = zip(values[self.better][self.metric], values[self.worse][self.metric], strict=True)
        differences = [mine - theirs for mine, theirs in pairs]
        p, stats = paired_p(differences), mean_std(differences)
        right = (stats["mean"] < 0) == self.lower and stats["mean"] != 0
        if p is None:
            word = "one seed, no test"
        elif self.equal:
            word = "opposite" if p < LEVEL else "no difference found"
        elif p >= LEVEL:
            word = "not resolved"
        else:
            word = "same direction" if right else "opposite"
        told = f"{plus_minus(stats, self.digits)}" + ("" if p is None else f", p = {p:.2g}")
        expected = "no difference expected" if self.equal else f"{'less' if self.lower else 'more'} expected"
        return {
            "better": self.better, "worse": self.worse, "metric": self.metric, "difference": stats, "p": p,
            "verdict": word,
            "text": f"{self.metric}, {self.better} less {self.worse}: {told} ({expected}): {word}.",
        }  # fmt: skip


def paired_p(differences: Sequence[float]) -> float | None:
    """The two-sided p-value of Student's t for differences whose mean would be 0; None for a single one."""
    count = len(differences)
    if count < 2:
        return None
    mean = sum(differences) / count
    variance = sum((one - mean) ** 2 for one in differences) / (count - 1)
    if variance == 0:
        return 0.0 if mean else 1.0
    return 1.0 - _within(abs(mean) / math.sqrt(variance / count), count - 1)


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t, by its finite series (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, term, total = math.cos(angle), 1.0, 0.0
    odd = freedom % 2
    if odd:
        term = cosine
    for step in range(freedom // 2):
        total += term
        term *= cosine**2 * (2 * step + 1 + odd) / (2 * step + 2 + odd)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def overall(claims: Sequence[Mapping[str, Any]]) -> str:
    """One word for a study: what its claims agree on, else how they divide."""
    words = [claim["verdict"] for claim in claims]
    if len(set(words)) <= 1:
        return words[0] if words else "nothing was claimed"
    return ", ".join(f"{word}: {words.count(word)} of {len(words)}" for word in dict.fromkeys(words))
