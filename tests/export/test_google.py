"""Google's PyTorch checkpoints: what comes in computes what their code computes, and nothing else comes in.

`google_logits` is written after `gemma/model.py` of google/gemma_pytorch, in our words, and knows nothing of
our model: it reads a checkpoint of Google's directly.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.export import google
from gemwright.model import checkpoint
from gemwright.model.config import SIZES, GemmaConfig, alternating
from gemwright.run import read_card
from gemwright.tokenizer.tokenizer import Tokenizer

TINY = GemmaConfig(
    d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=8, pattern=alternating(4), vocab_size=720,
    query_pre_attn_scalar=6, window=5, max_seq_len=32,
)  # fmt: skip


def google_state(config: GemmaConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights as gemma_pytorch names and shapes them, large enough that every feature is felt."""
    width, inner = config.d_model, config.num_heads * config.head_dim
    shapes = {"embedder.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "self_attn.qkv_proj.weight"] = (
            inner + 2 * config.num_kv_heads * config.head_dim,
            width,
        )
        shapes[prefix + "self_attn.o_proj.weight"] = (width, inner)
        shapes |= {prefix + f"mlp.{name}_proj.weight": (config.d_ff, width) for name in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (width, config.d_ff)
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        shapes |= {prefix + f"{name}_layernorm.weight": (width,) for name in norms}
    state = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    angles = torch.outer(
        torch.arange(64), 1.0 / 10_000 ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    )
    return state | {"freqs_cis": torch.polar(torch.ones_like(angles), angles)}


def google_logits(state: dict[str, Tensor], config: GemmaConfig, ids: list[int]) -> Tensor:
    """The forward pass of gemma_pytorch for one sequence: complex RoPE, repeated keys, masks of -2.38e38."""
    heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + state[name])

    def rope(x: Tensor) -> Tensor:  # (T, H, K)
        first, second = x.chunk(2, -1)
        turned = torch.complex(first, second) * state["freqs_cis"][: len(ids), None]
        return torch.cat((turned.real, turned.imag), -1)

    far = torch.full((len(ids), len(ids)), -2.3819763e38)
    later = far.triu(1)
    x = state["embedder.weight"][ids] * torch.tensor(config.d_model**0.5)
    for layer in range(config.num_layers):
        at = f"model.layers.{layer}."
        qkv = norm(x, at + "input_layernorm.weight") @ state[at + "self_attn.qkv_proj.weight"].T
        q, k, v = qkv.split([heads * size, groups * size, groups * size], -1)
        q, k = rope(q.view(-1, heads, size)), rope(k.view(-1, groups, size))
        k, v = (y.view(-1, groups, size).repeat_interleave(heads // groups, 1) for y in (k, v))
        scores = (q.transpose(0, 1) / math.sqrt(config.query_pre_attn_scalar)) @ k.permute(1, 2, 0)
        scores = 50 * torch.tanh(scores / 50)
        # Layers 0, 2, ... are local: what lies a window or more behind is masked too.
        scores = scores + (later if layer % 2 else later + far.tril(-config.window))
        mixed = (scores.softmax(-1) @ v.transpose(0, 1)).transpose(0, 1).reshape(len(ids), -1)
        out = mixed @ state[at + "self_attn.o_proj.weight"].T
        x = x + norm(out, at + "post_attention_layernorm.weight")
        h = norm(x, at + "pre_feedforward_layernorm.weight")
        gate, up = (h @ state[at + f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        out = (F.gelu(gate, approximate="tanh") * up) @ state[at + "mlp.down_proj.weight"].T
        x = x + norm(out, at + "post_feedforward_layernorm.weight")
    logits = norm(x, "model.norm.weight") @ state["embedder.weight"].T
    return 30 * torch.tanh(logits / 30)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return google_state(TINY)


@pytest.fixture
def ckpt(state: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint of Google's with its tokenizer beside it, as they are downloaded."""
    return put(state, tokenizer_folder, tmp_path / "downloaded")


def put(state: dict[str, Any], tokenizer_folder: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"model_state_dict": state}, folder / "model.ckpt")
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    return folder / "model.ckpt"


def test_what_comes_in_computes_what_googles_code_computes(
    state: dict[str, Tensor], ckpt: Path, tmp_path: Path
):
    google.run(ckpt, tmp_path / "out", config=TINY)
    ids = torch.randint(0, 720, (17,)).tolist()  # more than three windows
    found, expected = (
        checkpoint.load(tmp_path / "out")(torch.tensor([ids]))[0],
        google_logits(state, TINY, ids),
    )
    assert expected.abs().max() > 20  # the cap is felt
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("change", ["rows of q and k", "heads", "window", "scale"])
def test_that_comparison_notices_a_change(state: dict[str, Tensor], ckpt: Path, change: str):
    ids = torch.randint(0, 720, (17,)).tolist()
    model = google.read(ckpt, TINY.but(window=6) if change == "window" else TINY)
    attention: Any = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            heads = projection.weight.unflatten(0, (-1, TINY.head_dim))
            if change == "rows of q and k":  # pairs (2i, 2i + 1), as other families turn them
                projection.weight = torch.nn.Parameter(
                    heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(0, 2)
                )
            if change == "heads":
                projection.weight = torch.nn.Parameter(heads.transpose(0, 1).flatten(0, 1))
    if change == "scale":
        attention.scale *= 1.1
    assert (model(torch.tensor([ids]))[0] - google_logits(state, TINY, ids)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_number_format_and_every_bit_stay(dtype: torch.dtype, tokenizer_folder: Path, tmp_path: Path):
    state = google_state(TINY, dtype)
    card = google.run(put(state, tokenizer_folder, tmp_path / "in"), tmp_path / "out", config=TINY)
    loaded = checkpoint.load(tmp_path / "out").state_dict()
    assert card.results["dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(loaded["model.embed_tokens.weight"], state["embedder.weight"])
    parts = [loaded[f"model.layers.3.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(torch.cat(parts), state["model.layers.3.self_attn.qkv_proj.weight"])


def test_the_folder_has_tokenizer_and_card(ckpt: Path, tokenizer_folder: Path, tmp_path: Path):
    google.run(ckpt, tmp_path / "out", config=TINY)
    assert Tokenizer.load(tmp_path / "out").sha256 == Tokenizer.load(tokenizer_folder).sha256
    card = read_card(tmp_path / "out")
    assert card.stage == "import"
    assert card.finished
    assert set(card.inputs) == {"checkpoint", "tokenizer"}
    assert card.config == TINY.to_dict()


def sharded(state: dict[str, Tensor], folder: Path) -> None:
    """The 27B's form: `.bin` files without a dictionary around the tensors, and an index."""
    names = list(state)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in files.items():
        torch.save({name: state[name] for name in part}, folder / file)
    where = {name: file for file, part in files.items() for name in part}
    (folder / google.INDEX).write_text(json.dumps({"weight_map": where}))


def test_a_folder_of_parts_gives_the_same_as_one_file(state: dict[str, Tensor], ckpt: Path):
    whole = google.read(ckpt, TINY).state_dict()
    sharded(state, ckpt.parent)
    parts = google.read(ckpt.parent, TINY).state_dict()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


def test_a_missing_part_is_named(state: dict[str, Tensor], ckpt: Path):
    sharded(state, ckpt.parent)
    (ckpt.parent / "pytorch_model-2.bin").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"pytorch_model-2\.bin is missing: the checkpoint is not whole"
    ):
        google.read(ckpt.parent, TINY)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_a_damaged_index_is_called_so(ckpt: Path, content: str):
    (ckpt.parent / google.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        google.read(ckpt.parent, TINY)


def test_a_folder_without_an_index_asks_for_the_file(ckpt: Path):
    with pytest.raises(FileNotFoundError, match=r"has no pytorch_model.* Name the \.ckpt file in it"):
        google.read(ckpt.parent, TINY)


@pytest.mark.parametrize("name", SIZES)
def test_every_size_is_told_by_its_shapes(name: str):
    size = SIZES[name].but(vocab_size=256_128)
    with torch.device("meta"):
        shapes = google_state(size)
    assert google._fitting(shapes, Path("model.ckpt")) == size


def test_a_model_of_no_size_that_is_known_is_refused_with_those_that_are(ckpt: Path):
    with pytest.raises(ValueError, match=r"has 4 layers of width 24, .* Known: .*2b \(26, 2304\)"):
        google.read(ckpt)


def test_a_config_of_another_shape_is_refused(ckpt: Path):
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight has shape \(40, 24\), where .* \(41, 24\)"):
        google.read(ckpt, TINY.but(d_ff=41))


def refused(state: dict[str, Any], tokenizer_folder: Path, folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        google.read(put(state, tokenizer_folder, folder), TINY)


def test_quantised_checkpoints_are_refused(state: dict[str, Any], tokenizer_folder: Path, tmp_path: Path):
    scaled = state | {"embedder.weight_scaler": torch.ones(720)}
    refused(scaled, tokenizer_folder, tmp_path, r"is quantised \(embedder\.weight_scaler\)")
    int8 = state | {"embedder.weight": torch.zeros(720, 24, dtype=torch.int8)}
    refused(int8, tokenizer_folder, tmp_path, r"is quantised \(embedder\.weight\)")


def test_gemma_1_and_3_are_refused(state: dict[str, Any], tokenizer_folder: Path, tmp_path: Path):
    first = {name: value for name, value in state.items() if "_feedforward_" not in name}
    refused(first, tokenizer_folder, tmp_path, r"lacks model\.layers\.0\.pre_feedforward_layernorm\.weight")
    third = state | {"model.layers.0.self_attn.query_norm.weight": torch.ones(8)}
    refused(third, tokenizer_folder, tmp_path, r"unknown tensor 'model\.layers\.0\.self_attn\.query_norm")


def test_a_checkpoint_of_another_house_is_refused(tokenizer_folder: Path, tmp_path: Path):
    theirs = {"model.embed_tokens.weight": torch.ones(720, 24)}
    refused(theirs, tokenizer_folder, tmp_path, r"has no embedder\.weight: .* Hugging Face needs no import")


class Malicious:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    state: dict[str, Any], tokenizer_folder: Path, tmp_path: Path
):
    victim = tmp_path / "made"
    ckpt = put(state | {"extra": Malicious(victim)}, tokenizer_folder, tmp_path / "in")
    with pytest.raises(ValueError, match=r"holds more than tensors.* so it is refused") as error:
        google.run(ckpt, tmp_path / "out", config=TINY)
    assert "\n" not in str(error.value)
    assert not victim.exists()
    assert not (tmp_path / "out").exists()
    torch.load(ckpt, weights_only=False)  # it was armed
    assert victim.exists()


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_truncated_file_is_called_damaged(ckpt: Path, keep: float):
    whole = ckpt.read_bytes()
    ckpt.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.ckpt is damaged, .* Download it again"):
        google.read(ckpt, TINY)


def test_a_damaged_pickle_is_an_error_of_ours_wherever_it_is_damaged(ckpt: Path):
    whole = ckpt.read_bytes()
    start = whole.index(b"data.pkl") + len(b"data.pkl")
    told = 0
    for place in range(start, start + 4_000, 61):
        ckpt.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            google.read(ckpt, TINY)
        except ValueError as error:  # any other is a failure
            told += str(ckpt) in str(error)
    assert told > 40


def test_a_tokenizer_can_be_named(ckpt: Path, tokenizer_folder: Path, tmp_path: Path):
    (ckpt.parent / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*tokenizer\.model.* with --tokenizer"):
        google.run(ckpt, tmp_path / "out", config=TINY)
    google.run(ckpt, tmp_path / "out", tokenizer_folder / "tokenizer.model", config=TINY)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_tokenizer_with_more_pieces_than_rows_is_refused(tokenizer_folder: Path, tmp_path: Path):
    few = TINY.but(vocab_size=600)
    ckpt = put(google_state(few), tokenizer_folder, tmp_path / "in")
    with pytest.raises(ValueError, match=r"has 700 pieces, and .* rows for 600"):
        google.run(ckpt, tmp_path / "out", config=few)
