"""What the tests of merging share: configs in short, and checkpoints compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.merge.stage import MergeConfig

FP32, BF16 = torch.float32, torch.bfloat16
Make = Callable[..., Path]
Weights = Callable[[Path], dict[str, Tensor]]


def config(method: str, **fields: Any) -> MergeConfig:
    return MergeConfig.parse({"method": method, **fields})


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name].dtype != other[name].dtype]
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=atol)


def summed(counts: list[float], parents: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A weighted sum, done naively."""
    return {
        name: torch.stack([c * p[name].float() for c, p in zip(counts, parents, strict=True)]).sum(0)
        for name in parents[0]
    }
