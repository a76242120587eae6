"""Logits, gradients and files against transformers; and proof that each feature would be missed.

Argmax is compared nowhere: tanh is monotonic, so a lost cap leaves it as it was.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gemwright
from gemwright.losses import dense
from gemwright.model import attention, checkpoint, gemma
from gemwright.model.config import Attention, alternating
from gemwright.model.gemma import Gemma, RMSNorm
from gemwright.tokenizer.chat import encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train

pytestmark = pytest.mark.parity
interop = pytest.mark.interop  # as well: files that others load, and we from them
Pair = Callable[..., tuple[Any, Any]]
Break = Callable[[Gemma, pytest.MonkeyPatch], Gemma]
LOCAL, GLOBAL = Attention.LOCAL, Attention.GLOBAL


@torch.no_grad()
def difference(ours: Any, theirs: Any, ids: Tensor) -> float:
    """The largest difference between two models' logits."""
    return (ours(ids).float() - theirs(ids).logits.float()).abs().max().item()


VARIANTS: dict[str, dict[str, Any]] = {
    "like 2B and 9B: the scale is that of the head": {},
    "like 27B: the scale is that of the width": {"head_dim": 4, "query_pre_attn_scalar": 8, "num_heads": 4},
    "width and heads disagree": {"d_model": 24, "head_dim": 10, "query_pre_attn_scalar": 10},
    "as many key heads as query heads": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1},
    "an odd number of layers": {"pattern": alternating(3)},
    "another pattern": {"pattern": (GLOBAL, LOCAL, LOCAL, GLOBAL)},
    "no caps": {"attn_softcap": None, "final_softcap": None},
    "tight caps": {"attn_softcap": 5.0, "final_softcap": 3.0},
    "another rotary base": {"rope_theta": 100.0},
    "another epsilon": {"rms_norm_eps": 0.1},
    "a window of one": {"window": 1},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(pair: Pair, ids: Tensor, changes: dict[str, Any]):
    assert difference(*pair(**changes), ids) < 1e-4


def config(**changes: Any) -> Break:
    """The same weights under another config."""

    def broken(model: Gemma, _patch: pytest.MonkeyPatch) -> Gemma:
        other = Gemma(model.config.but(**changes))
        other.load_state_dict(model.state_dict())
        return other

    return broken


def without_norm(name: str) -> Break:
    """Each layer's norm of that name left out."""

    def broken(model: Gemma, _patch: pytest.MonkeyPatch) -> Gemma:
        for layer in model.model.layers:
            setattr(layer, name, nn.Identity())
        return model

    return broken


def without_final_norm(model: Gemma, _patch: pytest.MonkeyPatch) -> Gemma:
    model.model.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return model


def norm_weight_not_from_one(model: Gemma, patch: pytest.MonkeyPatch) -> Gemma:
    def forward(self: RMSNorm, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight

    patch.setattr(RMSNorm, "forward", forward)
    return model


def embedding_not_scaled(model: Gemma, _patch: pytest.MonkeyPatch) -> Gemma:
    shrink = math.sqrt(model.config.d_model)
    model.model.embed_tokens.register_forward_hook(lambda _module, _args, out: out / shrink)
    return model


def head_scaled_too(model: Gemma, _patch: pytest.MonkeyPatch) -> Gemma:
    grow = math.sqrt(model.config.d_model)
    model.model.norm.register_forward_hook(lambda _module, _args, out: out * grow)
    return model


def rotary_pairs_next_to_each_other(model: Gemma, patch: pytest.MonkeyPatch) -> Gemma:
    def rotate(x: Tensor, turn: Tensor) -> Tensor:
        cos, sin = (part.chunk(2, -1)[0].repeat_interleave(2, -1) for part in turn)
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos + turned * sin

    patch.setattr(gemma, "rotate", rotate)
    return model


def attend_otherwise(change: str) -> Break:
    """Attention with one step out of place."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, places: Any, *, scale: float, cap: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        grouped = q.unflatten(2, (k.shape[2], -1))
        if change == "heads shared in turn":
            grouped = q.unflatten(2, (-1, k.shape[2])).transpose(2, 3)
        scores = torch.einsum("btgrk,bsgk->bgrts", grouped, k)
        mask = attention.visible(places, places, window)[:, None, None]
        if change == "mask before cap":
            scores = cap * torch.tanh((scores * scale).masked_fill(~mask, -math.inf) / cap)
        elif change == "cap before scale":
            scores = (cap * torch.tanh(scores / cap) * scale).masked_fill(~mask, -math.inf)
        else:
            scores = (cap * torch.tanh(scores * scale / cap)).masked_fill(~mask, -math.inf)
        out = torch.einsum("bgrts,bsgk->btgrk", scores.softmax(-1), v)
        if change == "heads shared in turn":
            out = out.transpose(2, 3)
        return out.flatten(2, 3)

    def broken(model: Gemma, patch: pytest.MonkeyPatch) -> Gemma:
        patch.setattr(gemma, "attend", attend)
        return model

    return broken


BREAKS: dict[str, Break] = {
    "attention cap off": config(attn_softcap=None),
    "attention cap 30, not 50": config(attn_softcap=30.0),
    "final cap off": config(final_softcap=None),
    "final cap 50, not 30": config(final_softcap=50.0),
    "caps exchanged": config(attn_softcap=30.0, final_softcap=50.0),
    "window off": config(pattern=(GLOBAL, GLOBAL)),
    "window everywhere": config(pattern=(LOCAL, LOCAL)),
    "window one larger": config(window=9),
    "window one smaller": config(window=7),
    "global layer first": config(pattern=(GLOBAL, LOCAL)),
    "query scale 12, not 8": config(query_pre_attn_scalar=12),
    "rotary base 1,000,000": config(rope_theta=1e6),
    "norm weight not counted from one": norm_weight_not_from_one,
    "no norm before attention": without_norm("input_layernorm"),
    "no norm after attention": without_norm("post_attention_layernorm"),
    "no norm before feed-forward": without_norm("pre_feedforward_layernorm"),
    "no norm after feed-forward": without_norm("post_feedforward_layernorm"),
    "no final norm": without_final_norm,
    "embedding not scaled": embedding_not_scaled,
    "head scaled as the embedding is": head_scaled_too,
    "rotary pairs next to each other": rotary_pairs_next_to_each_other,
    "query heads share key heads in turn": attend_otherwise("heads shared in turn"),
    "cap before scale": attend_otherwise("cap before scale"),
}


@pytest.mark.parametrize("broken", BREAKS.values(), ids=BREAKS)
def test_logits_tell_when_a_feature_is_broken(
    pair: Pair, ids: Tensor, broken: Break, monkeypatch: pytest.MonkeyPatch
):
    """Each feature is broken once, in ours: a parity test that could not see it would prove nothing."""
    ours, theirs = pair()
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
        logits = broken(ours, monkeypatch)(ids)
    assert (logits - expected).abs().max() > 1e-2


def test_logits_tell_when_the_mask_comes_before_the_cap(
    pair: Pair, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """Then masked keys keep exp(-cap), which a cap of 50 hides and a cap of 5 does not."""
    ours, theirs = pair(attn_softcap=5.0)
    assert difference(ours, theirs, ids) < 1e-4
    assert difference(attend_otherwise("mask before cap")(ours, monkeypatch), theirs, ids) > 1e-2


def test_logits_tell_the_tanh_gelu_from_the_exact_one(
    pair: Pair, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    """They differ by 5e-4 at most, near 0 only: smaller gates and more layers make that 1e-2 of a logit."""
    ours, theirs = pair(pattern=alternating(8))
    for model in (ours, theirs):
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight.data *= 0.35
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=1e-4)
        exact = F.gelu
        monkeypatch.setattr(gemma.F, "gelu", lambda x, approximate: exact(x))
        assert (ours(ids) - expected).abs().max() > 1e-2


def test_attention_rewritten_for_these_tests_is_itself_right(
    pair: Pair, ids: Tensor, monkeypatch: pytest.MonkeyPatch
):
    ours, theirs = pair()
    assert difference(attend_otherwise("nothing")(ours, monkeypatch), theirs, ids) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"attn_softcap": 5.0, "num_kv_heads": 4}], ids=str)
def test_gradients_of_the_loss_equal_transformers(pair: Pair, ids: Tensor, changes: dict[str, Any]):
    """Ours through the blockwise attention's own backward pass and the loss in chunks."""
    ours, theirs = pair(init_std=0.3, **changes)
    targets = ids[:, 1:].flatten()
    hidden = ours.hidden(ids)[:, :-1].flatten(0, 1)
    weights = torch.ones(len(targets))
    loss = dense.cross_entropy(
        hidden, ours.unembedding, targets, weights, cap=ours.config.final_softcap, chunk_bytes=7000
    ) / len(targets)
    expected = F.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    mine = dict(zip(dict(ours.named_parameters()), torch.autograd.grad(loss, ours.parameters()), strict=True))
    expected.backward()
    named = dict(theirs.named_parameters())
    assert set(mine) == set(named)
    for name, gradient in mine.items():
        scale = named[name].grad.abs().max()
        assert scale > 1e-6, name
        assert (gradient - named[name].grad).abs().max() < 1e-4 * scale, name


@interop
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 20_000], ids=["one file", "many files"])
def test_transformers_loads_what_we_save(pair: Pair, ids: Tensor, tmp_path: Path, max_shard_bytes: int):
    from transformers import AutoModelForCausalLM

    ours, _ = pair(pattern=alternating(3), query_pre_attn_scalar=6, rope_theta=500.0)
    checkpoint.save(ours, tmp_path, max_shard_bytes)
    theirs, told = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert difference(ours, theirs, ids) < 1e-4


@interop
def test_transformers_loads_bf16_in_bf16(pair: Pair, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    ours, _ = pair()
    checkpoint.save(ours.bfloat16(), tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(tensor.dtype == torch.bfloat16 for tensor in loaded.values())


@interop
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["one file", "many files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_we_load_what_transformers_saves(
    pair: Pair, ids: Tensor, tmp_path: Path, max_shard_size: str, dtype: torch.dtype
):
    from transformers import AutoModelForCausalLM

    _, theirs = pair(pattern=alternating(3), attn_softcap=20.0, rope_theta=500.0)
    theirs.to(dtype).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    ours = gemwright.load(tmp_path, device="cpu")
    assert ours.model.unembedding.dtype == dtype
    assert ours.config.rope_theta == 500.0
    ours.model.float()  # both are computed in fp32: in bf16 they may differ by what bf16 rounds
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    assert difference(ours, wide, ids) < 1e-4


def test_the_names_of_all_weights_equal_transformers(pair: Pair):
    ours, theirs = pair()
    assert set(ours.state_dict()) | {"lm_head.weight"} == set(theirs.state_dict())


@functools.cache
def small_tokenizer() -> Tokenizer:
    text = [Path(functools.__file__).read_text(encoding="utf-8"), Path(__file__).read_text(encoding="utf-8")]
    return Tokenizer(train(text, TokenizerConfig(vocab_size=900)))


@interop
def test_transformers_reads_the_tokenizer_of_a_saved_folder(pair: Pair, tmp_path: Path):
    """One folder, model, tokenizer and template: text in, the same ids and logits out on both sides."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = small_tokenizer()
    ours, _ = pair(vocab_size=tokenizer.vocab_size)
    checkpoint.save(ours, tmp_path)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("def attend(q, k):\n    return 12345", "  two  spaces\tand a tab\n\n", "Ünïcödé 🦙 文"):
        assert theirs(text)["input_ids"] == tokenizer.encode(text, bos=True)
    messages = [{"role": "user", "content": "print(i * 2)?"}]
    told = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert told == encode_prompt(tokenizer, messages)
    ids = torch.tensor([tokenizer.encode("for i in range(10): print(i * 2) and so on", bos=True)])
    assert ids.shape[1] >= 3 * ours.config.window
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(gemwright.load(tmp_path, device="cpu"), model, ids) < 1e-4
