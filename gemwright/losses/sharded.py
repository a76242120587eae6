"""The vocabulary in slices, one a rank: what the losses need from the other ranks is a few sums a token.

A rank holds rows start to stop of the head (tensor parallelism) and the hidden states of all tokens. It
unembeds its own slice; normalisers, losses and the picked logits are summed over the ranks, one small
all-reduce each, and d hidden at the end. Nothing of the vocabulary's size is ever sent.

Hand a `Slice` to a loss as `part`, with the rank's slice of each head as the weights; every rank gets the
same loss, the whole gradient of the hidden states, and its own slice's gradient of the head.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Slice:
    """Which rows of the vocabulary this rank holds, and with whom it shares the others."""

    start: int
    """First id of the slice."""
    total: int
    """Ids in all slices together."""
    most: int
    """Ids in the largest slice: it sets the size of the chunks, so that all ranks make the same ones."""
    group: dist.ProcessGroup | None
    """The ranks that hold the slices, in the order of their ids; None: this rank holds all of them."""

    @classmethod
    def whole(cls, weight: Float[Tensor, "V D"]) -> "Slice":
        """The slice of somebody who holds the whole head."""
        return cls(0, len(weight), len(weight), None)

    @classmethod
    def of(cls, weight: Float[Tensor, "V D"], group: dist.ProcessGroup) -> "Slice":
        """Agree on the slices, which may differ in size. Every rank of the group has to call it."""
        sizes = [torch.zeros((), dtype=torch.int64, device=weight.device) for _ in range(group.size())]
        dist.all_gather(sizes, torch.tensor(len(weight), device=weight.device), group=group)
        ends = torch.stack(sizes).cumsum(0)
        start = int(ends[group.rank()]) - len(weight)
        return cls(start, int(ends[-1]), int(torch.stack(sizes).max()), group)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def local(
        self, ids: Int[Tensor, "N K"], rows: int
    ) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"] | None]:
        """Ids -> indices into this slice of `rows` rows, and 1 where they lie inside it (None: all do)."""
        if self.group is None:
            return ids, None
        index = ids - self.start
        inside = (index >= 0) & (index < rows)
        return torch.where(inside, index, 0), inside.float()
