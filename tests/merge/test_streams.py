"""Tensors combined and written in pieces, against the same done at once."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gemwright.merge import streams
from gemwright.merge.streams import combined, group, products, write_part
from gemwright.model import checkpoint
from gemwright.model.checkpoint import Stored, stored

EMBEDDING = "model.embed_tokens.weight"
Make = Callable[..., Path]


def whole(name: str, parents: list[dict[str, Stored]], counts: list[float], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(combined(name, parents, counts, dtype)))


def test_a_layer_is_a_group_and_so_is_each_tensor_beside_the_layers():
    assert group("model.layers.11.self_attn.q_proj.weight") == "layers.11"
    assert group("model.layers.11.input_layernorm.weight") == "layers.11"
    alone = [EMBEDDING, "model.norm.weight", "score.weight"]
    assert [group(name) for name in alone] == alone


def test_products_are_those_of_the_task_vectors_layer_by_layer(make: Make):
    base, *models = (stored(make(str(seed), seed)) for seed in range(4))
    told: list[int] = []
    found = products(base, models, told.append)
    assert list(found) == [EMBEDDING, "layers.0", "layers.1", "model.norm.weight"]
    for key, gram in found.items():
        vectors = [
            torch.cat(
                [
                    (model[name].tensor - base[name].tensor).flatten().double()
                    for name in base
                    if group(name) == key
                ]
            )
            for model in models
        ]
        np.testing.assert_allclose(gram, [[float(a @ b) for b in vectors] for a in vectors], rtol=1e-3)
        assert (gram == gram.T).all()
    assert sum(told) == sum(one.tensor.numel() for one in base.values())


def test_a_combination_is_the_sum_that_it_says(make: Make):
    parents = [stored(make(str(seed), seed)) for seed in range(3)]
    for name, counts in ((EMBEDDING, [0.5, 0.2, 0.3]), ("model.norm.weight", [-1.0, 1.5, 0.5])):
        tensors = [parent[name].tensor.double() for parent in parents]
        wanted = sum(c * t for c, t in zip(counts, tensors, strict=True))
        assert isinstance(wanted, Tensor)
        made = whole(name, parents, counts, torch.float32)
        torch.testing.assert_close(made, wanted.flatten().float(), rtol=1e-5, atol=1e-6)


def test_many_blocks_and_pieces_are_one(make: Make, monkeypatch: pytest.MonkeyPatch):
    """Bit for bit in the weights, and to rounding in the products."""
    parents = [stored(make(str(seed), seed, dtype=torch.bfloat16)) for seed in range(3)]
    counts = [0.5, 0.2, 0.3]
    at_once = {name: whole(name, parents, counts, torch.bfloat16) for name in parents[0]}
    grams = products(parents[0], parents[1:], lambda _: None)
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(streams, "_PIECE", 7)
    assert len(list(combined(EMBEDDING, parents, counts, torch.bfloat16))) > 100
    assert all(torch.equal(whole(name, parents, counts, torch.bfloat16), at_once[name]) for name in at_once)
    in_pieces = products(parents[0], parents[1:], lambda _: None)
    for key, gram in grams.items():
        np.testing.assert_allclose(in_pieces[key], gram, rtol=1e-3, atol=1e-2)


def test_a_parent_that_counts_nothing_is_not_read(make: Make):
    one, other = stored(make("one", 1)), stored(make("other", 2))
    gone = {name: Stored(Path("gone"), tensor.tensor) for name, tensor in other.items()}
    made = whole("model.norm.weight", [one, gone], [1.0, 0.0], torch.float32)
    assert torch.equal(made, one["model.norm.weight"].tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_parents_give_themselves_whatever_their_bits(make: Make, dtype: torch.dtype):
    """A zero keeps its sign, too."""
    folder = make("one", 1, dtype=dtype)
    model = checkpoint.load(folder)
    with torch.no_grad():
        model.model.norm.weight[:4] = torch.tensor([0.0, -0.0, 1e-38, -3e38])
    checkpoint.save(model, folder)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    parents = [stored(folder)] * 3
    for name, one in parents[0].items():
        made = whole(name, parents, [0.3, 0.3, 0.4], dtype)
        assert torch.equal(made.view(bits), one.tensor.flatten().view(bits))


TENSORS = {
    "matrix": torch.arange(12.0).reshape(3, 4) / 7,
    "vector": torch.tensor([1.0, -0.0, 3.0]),
    "number": torch.tensor([2.5]),
}


def in_threes(name: str) -> Iterator[Tensor]:
    yield from TENSORS[name].flatten().split(3)


def written(path: Path, dtype: torch.dtype) -> str:
    return write_part(path, TENSORS, dtype, lambda name: (piece.to(dtype) for piece in in_threes(name)))


@pytest.mark.parametrize("dtype", list(streams.NAMES))
def test_what_is_written_in_pieces_safetensors_reads_whole(tmp_path: Path, dtype: torch.dtype):
    written(tmp_path / "file", dtype)
    found = load_file(tmp_path / "file")
    assert set(found) == set(TENSORS)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_hash_is_that_of_the_file(tmp_path: Path):
    told = written(tmp_path / "file", torch.float32)
    assert told == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_tensors_begin_at_a_multiple_of_8_bytes_in_the_order_given(tmp_path: Path):
    """What maps the file may then read numbers where they lie."""
    written(tmp_path / "file", torch.float32)
    data = (tmp_path / "file").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert [name for name in header if name != "__metadata__"] == list(TENSORS)
    assert header["vector"] == {"dtype": "F32", "shape": [3], "data_offsets": [48, 60]}


def test_an_error_in_the_midst_is_told_and_not_swallowed_by_the_thread_that_writes(tmp_path: Path):
    def broken(name: str) -> Iterator[Tensor]:
        yield torch.zeros(3)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        write_part(tmp_path / "file", TENSORS, torch.float32, broken)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(streams.os, "posix_fallocate", raising=False)
    with pytest.raises(OSError, match="No space left"):
        written(Path("/dev/full"), torch.float32)
