"""Checkpoints combined block by block: a few megabytes of each are in memory at a time, whatever their size.

Arithmetic is fp32: a step of RLHF, 1e-6 of a weight, vanishes in bf16. The combination begins at the
checkpoint with the largest coefficient, so that equal checkpoints merge to themselves and the ends of a line
are met, bit for bit.
"""

import hashlib
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.model.checkpoint import Stored, blocks

Parents = Sequence[Mapping[str, Stored]]
"""The tensors of some checkpoints of one shape, by name."""

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The number formats that are written, as safetensors calls them."""

_PIECE = 1 << 17  # elements at a time: their fp32 copies stay in a core's cache


def group(name: str) -> str:
    """What is turned as one: a transformer layer, the embedding, the last norm.

    WARP merges "layer by layer" and says no more; that all matrices of a layer go together is our choice.
    """
    parts = name.split(".")
    return ".".join(parts[1:3]) if parts[1] == "layers" else name


def products(base: Mapping[str, Stored], models: Parents, advance: Callable[[int], None]) -> dict[
    str, Float[np.ndarray, "M M"]
]:  # fmt: skip
    """The task vectors' products with each other, by group. `advance` is told the elements that were read."""
    grams: dict[str, np.ndarray] = defaultdict(lambda: np.zeros((len(models), len(models))))
    held = torch.empty(1 + len(models), _PIECE)
    for name in base:
        gram = grams[group(name)]
        for parts in _read(name, [base, *models]):
            for first, *others in zip(*(part.split(_PIECE) for part in parts), strict=True):
                start, *apart = held[:, : len(first)]
                start.copy_(first)
                for m, one in enumerate(apart):
                    one.copy_(others[m]).sub_(start)
                    for n, other in enumerate(apart[: m + 1]):
                        gram[m, n] += float(one @ other)
            advance(parts[0].numel())
    return {key: np.tril(gram) + np.tril(gram, -1).T for key, gram in grams.items()}


def combined(
    name: str, parents: Parents, coefficients: Sequence[float], dtype: torch.dtype
) -> Iterator[Tensor]:
    """A tensor's affine combination (its coefficients sum to 1), flat, a few megabytes at a time."""
    anchor = max(range(len(parents)), key=lambda place: abs(coefficients[place]))
    used = [anchor, *(p for p in range(len(parents)) if p != anchor and coefficients[p])]
    held = torch.empty(3, _PIECE)  # reused: a tenth faster than asking for memory piece by piece
    for parts in _read(name, [parents[place] for place in used]):
        out = torch.empty(parts[0].shape, dtype=dtype)
        for piece, first, *others in zip(out.split(_PIECE), *(p.split(_PIECE) for p in parts), strict=True):
            start, apart, made = held[:, : len(piece)]
            made.copy_(start.copy_(first))
            for other, place in zip(others, used[1:], strict=True):
                torch.sub(start, apart.copy_(other), out=apart)
                made.sub_(apart, alpha=coefficients[place])  # subtracted: -0 stays -0 where all are equal
            piece.copy_(made)
        yield out


def write_part(
    path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype,
    pieces: Callable[[str], Iterator[Tensor]],
) -> str:  # fmt: skip
    """Write a safetensors file whose tensors arrive in pieces. Returns its SHA-256.

    Args:
        tensors: in the file's order; only their shapes are used.
        pieces: a tensor's elements, flat and in order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as writer:
        if hasattr(os, "posix_fallocate"):  # three times as fast; and a full disk says so before any work
            os.posix_fallocate(file.fileno(), 0, 8 + len(head) + end)

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            left = memoryview(data)
            while len(left):  # Linux takes 2 GiB at most in one write
                left = left[file.write(left) :]

        before = writer.submit(put, struct.pack("<Q", len(head)) + head)
        for name in tensors:
            for piece in pieces(name):
                data = piece.contiguous().view(torch.uint8).numpy().data
                before.result()  # one is written and hashed while the next is made
                before = writer.submit(put, data)
        before.result()
    return digest.hexdigest()


def _read(name: str, parents: Parents) -> Iterator[list[Tensor]]:
    """The same few rows of every parent, flat."""
    for rows in blocks(parents[0][name].tensor):
        yield [parent[name].rows(name, rows).flatten() for parent in parents]
