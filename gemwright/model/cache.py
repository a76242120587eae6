"""Keys and values of what a model has read: a growing cache for global layers, a rolling one for local.

One `KVCache` is one sequence; a batch is a list of them, so sequences of any lengths share a step and each
costs its own memory. A local layer never looks further back than its window, so it keeps `window` positions
in a ring, whatever the length of the text. Keys are stored after RoPE: where they lie does not matter.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.model.config import Attention, GemmaConfig

_FIRST_SLOTS = 64


class Reach(NamedTuple):
    """The keys and values that new queries may look at, and where these stand in the text."""

    keys: Float[Tensor, "G S K"]
    values: Float[Tensor, "G S K"]
    first: int | None
    """Position of the first key, all others following in order; None: a ring, position p in slot p mod S."""


class LayerCache:
    """One layer's keys and values. `window=None` keeps every position."""

    def __init__(self, window: int | None, rewind: int, reserve: int) -> None:
        self.window = window
        self.rewind = rewind
        self.reserve = reserve
        self.ring = None if window is None else window + rewind
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k: Float[Tensor, "T G K"], v: Float[Tensor, "T G K"], start: int) -> Reach:
        """Store the keys and values of positions `start`, `start + 1`, ...; returns what these may see."""
        new, end = len(k), start + len(k)
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if self.ring is None or end <= self.ring:
            keys, values = self._room(end, k)
            keys[:, start:end], values[:, start:end] = k, v
            return Reach(keys[:, :end], values[:, :end], 0)
        keys, values = self._room(self.ring, k)
        if new <= self.rewind + 1:  # what these overwrite, none of them sees
            slot = start % self.ring
            whole = min(new, self.ring - slot)
            keys[:, slot : slot + whole], values[:, slot : slot + whole] = k[:, :whole], v[:, :whole]
            keys[:, : new - whole], values[:, : new - whole] = k[:, whole:], v[:, whole:]
            return Reach(keys, values, None)
        assert self.window is not None
        first = max(0, start - self.window + 1)
        slots = torch.arange(first, start, device=k.device) % self.ring
        reach = Reach(torch.cat((keys[:, slots], k), 1), torch.cat((values[:, slots], v), 1), first)
        kept = min(new, self.ring)
        slots = torch.arange(end - kept, end, device=k.device) % self.ring
        keys[:, slots], values[:, slots] = k[:, -kept:], v[:, -kept:]
        return reach

    def _room(self, slots: int, like: Float[Tensor, "G T K"]) -> tuple[Tensor, Tensor]:
        """The buffers, with at least so many slots."""
        held = 0 if self.keys is None else self.keys.shape[1]
        if held < slots:
            wanted = max(slots, self.reserve, held * 3 // 2 if held else _FIRST_SLOTS * (not self.reserve))
            if self.ring is not None:
                wanted = min(wanted, self.ring)
            fresh = [like.new_empty(len(like), wanted, like.shape[2]) for _ in range(2)]
            if self.keys is not None and self.values is not None:
                fresh[0][:, :held], fresh[1][:, :held] = self.keys, self.values
            self.keys, self.values = fresh
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values


class KVCache:
    """What a model remembers of one sequence.

    Args:
        rewind: how many of the newest positions `cut` may take back at a time: so many more slots in a local
            layer.
        reserve: positions that will come; a cache that knows them is allocated once, and exactly.
    """

    def __init__(self, config: GemmaConfig, *, rewind: int = 0, reserve: int = 0) -> None:
        self.length = 0
        """Positions read so far."""
        self._rewind = rewind
        self._furthest = 0  # the most positions ever read: a ring has overwritten what lies too far behind
        self.layers = [
            LayerCache(config.window if kind is Attention.LOCAL else None, rewind, reserve)
            for kind in config.pattern
        ]

    @property
    def bytes(self) -> int:
        """Memory of the buffers: `model.cost.kv_cache_bytes` once `reserve` positions have been read."""
        held = (part for layer in self.layers for part in (layer.keys, layer.values) if part is not None)
        return sum(part.nbytes for part in held)

    def advance(self, count: int) -> None:
        """Say that every layer has stored `count` more positions."""
        self.length += count
        self._furthest = max(self._furthest, self.length)

    def cut(self, length: int) -> None:
        """Forget everything from position `length` on.

        Raises:
            ValueError: a local layer has overwritten what the sequence would see from there.
        """
        rings = [layer.ring for layer in self.layers if layer.ring is not None]
        if not 0 <= length <= self.length:
            raise ValueError(f"the cache holds {self.length} positions: it cannot be cut to {length}.")
        if self._furthest - length > self._rewind and any(self._furthest > ring for ring in rings):
            raise ValueError(
                f"the cache has read {self._furthest} positions and can take back {self._rewind}, not "
                f"{self._furthest - length}: its local layers have forgotten. Read the text into a new one."
            )
        self.length = length
