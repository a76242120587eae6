"""Keys and values of what the model has read: a growing cache for global layers, a rolling one for local.

A local layer never looks further back than its window, so it keeps `window - 1` positions and the ones being
added, whatever the length of the text. Keys are stored after RoPE, with their positions beside them: a mask
needs nothing else.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.model.attention import Places
from gemwright.model.config import Attention, GemmaConfig


class LayerCache:
    """One layer's keys and values, oldest first. `window=None` keeps everything."""

    def __init__(self, window: int | None) -> None:
        self.window = window
        self.held: tuple[Tensor, Tensor, Places] | None = None

    def extend(
        self, k: Float[Tensor, "B T G K"], v: Float[Tensor, "B T G K"], places: Places
    ) -> tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"], Places]:
        """Add keys and values; returns all that the new queries may need (a local layer forgets the rest)."""
        if self.held is not None:
            old_k, old_v, old = self.held
            k, v = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
            places = Places(*(torch.cat(pair, 1) for pair in zip(old, places, strict=True)))
        if self.window is None:
            self.held = k, v, places
        else:
            keep = slice(max(0, k.shape[1] - (self.window - 1)), None)
            self.held = (
                k[:, keep].clone(),
                v[:, keep].clone(),
                Places(*(part[:, keep].clone() for part in places)),
            )
        return k, v, places


class KVCache:
    """The caches of all layers, and how many positions have been read."""

    def __init__(self, config: GemmaConfig) -> None:
        self.length = 0
        self.layers = [
            LayerCache(config.window if kind is Attention.LOCAL else None) for kind in config.pattern
        ]

    @property
    def bytes(self) -> int:
        """Memory of the keys and values held now."""
        held = [layer.held for layer in self.layers if layer.held is not None]
        return sum(part.nbytes for k, v, _ in held for part in (k, v))
