"""Where a merge's numbers come from: every method here is one affine combination of checkpoints.

    merged = anchor + sum_m c_m (theta_m - anchor)          task vectors: delta_m = theta_m - theta_base

An average has c_m = w_m and no base. Task arithmetic (arXiv 2212.04089) adds task vectors to the base. SLERP
(WARP, arXiv 2406.16768, section 3.2) turns one task vector into another along the arc between them, which
keeps their length where an average would shrink it: the task vectors of two runs stand at almost 90 degrees.
All that it needs of the weights are the task vectors' products with each other, so that one pass over the
files finds the coefficients of a group, and a second one combines.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_FLAT = 1e-3
"""Sine of an angle below which an arc is a line: what LERP then differs by is of the order of its square."""


def shares(count: int, weights: Sequence[float] | None) -> list[float]:
    """The weights of an average, summing to 1; equal ones where none are given."""
    given = [1.0] * count if weights is None else list(weights)
    return [weight / math.fsum(given) for weight in given]


def moving_average(count: int, mu: float) -> list[float]:
    """Shares of an exponential moving average that begins at the first: ema <- (1 - mu) ema + mu theta."""
    return [(mu if place else 1.0) * (1 - mu) ** (count - 1 - place) for place in range(count)]


def spherical(gram: Float[np.ndarray, "M M"], weights: Sequence[float] | None = None) -> list[float]:
    """The coefficients of M task vectors under SLERP, one after the other joining what was merged before.

    The m-th joins with lambda = its share of the weights so far: 1/m where all are equal, as WARP has it. It
    is not associative: the order counts, a little.

    Args:
        gram: the task vectors' products; of one group of weights (WARP: a layer).
    """
    made = np.zeros(len(gram))
    made[0] = 1.0
    parts = shares(len(gram), weights)
    for place in range(1, len(gram)):
        share = parts[place] / (math.fsum(parts[: place + 1]) or 1.0)  # none has any share so far: nor this
        length = math.sqrt(max(0.0, made @ gram @ made) * gram[place, place])
        cosine = float(np.clip((made @ gram)[place] / length, -1, 1)) if length else 1.0
        angle = math.acos(cosine)
        if math.sin(angle) < _FLAT:  # LERP: equal, opposite, or one of them nothing at all
            keep, take = 1 - share, share
        else:
            keep, take = (math.sin(part * angle) / math.sin(angle) for part in (1 - share, share))
        made *= keep
        made[place] += take
    return made.tolist()


def mean_angle(gram: Float[np.ndarray, "M M"]) -> float | None:
    """The angle between task vectors in degrees, averaged over pairs; None without two that are something."""
    lengths = np.sqrt(np.diag(gram))
    pairs = [(m, n) for n in range(len(gram)) for m in range(n) if lengths[m] * lengths[n]]
    if not pairs:
        return None
    cosines = [gram[m, n] / (lengths[m] * lengths[n]) for m, n in pairs]
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())
