"""The model against the report's order of operations in float64 loops, and packed rows."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gemwright.model import cost
from gemwright.model.attention import Places, visible
from gemwright.model.config import Attention, GemmaConfig, alternating
from gemwright.model.gemma import Gemma, RMSNorm, packed

BOS = 2
CONFIG = GemmaConfig(
    d_model=12, d_ff=20, num_heads=4, num_kv_heads=2, head_dim=6, pattern=alternating(3), vocab_size=40,
    query_pre_attn_scalar=4.5, window=5, max_seq_len=64, attn_softcap=3.0, init_std=0.5,
)  # fmt: skip


def gemma(config: GemmaConfig = CONFIG, seed: int = 0, **changes: Any) -> Gemma:
    """A model whose norms differ from 1: at w = 0 half of what a norm does cannot be seen."""
    torch.manual_seed(seed)
    model = Gemma(config.but(**changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False)


def tokens(*shape: int, seed: int = 1) -> Tensor:
    """Ids that are no control tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, CONFIG.vocab_size, shape, generator=generator)


def by_the_book(model: Gemma, ids: list[int]) -> np.ndarray:
    """Gemma 2 in float64, one token and one head at a time, as the report and Google's code say it."""
    c = model.config
    w = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / math.sqrt((x * x).mean() + c.rms_norm_eps) * (1 + weight)

    def turn(x: np.ndarray, position: int) -> np.ndarray:
        half = c.head_dim // 2
        angle = position * c.rope_theta ** (-2.0 * np.arange(half) / c.head_dim)
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
        return np.concatenate((z.real, z.imag))

    def cap(score: np.ndarray, limit: float | None) -> np.ndarray:
        return score if limit is None else limit * np.tanh(score / limit)

    def gelu(x: np.ndarray) -> np.ndarray:
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    xs = [w["model.embed_tokens.weight"][token] * math.sqrt(c.d_model) for token in ids]
    for layer, kind in enumerate(c.pattern):
        at = {name.removeprefix(f"model.layers.{layer}."): value for name, value in w.items()}
        hs = [norm(x, at["input_layernorm.weight"]) for x in xs]
        q, k, v = (
            [(at[f"self_attn.{part}_proj.weight"] @ h).reshape(-1, c.head_dim) for h in hs] for part in "qkv"
        )
        for t in range(len(ids)):
            first = max(0, t - c.window + 1) if kind is Attention.LOCAL else 0
            heads = []
            for head in range(c.num_heads):
                group = head // (c.num_heads // c.num_kv_heads)
                query = turn(q[t][head], t) / math.sqrt(c.query_pre_attn_scalar)
                scores = [cap(query @ turn(k[s][group], s), c.attn_softcap) for s in range(first, t + 1)]
                p = np.exp(np.array(scores) - max(scores))
                heads.append(sum(p[s - first] * v[s][group] for s in range(first, t + 1)) / p.sum())
            out = at["self_attn.o_proj.weight"] @ np.concatenate(heads)
            x = xs[t] + norm(out, at["post_attention_layernorm.weight"])
            h = norm(x, at["pre_feedforward_layernorm.weight"])
            wide = gelu(at["mlp.gate_proj.weight"] @ h) * (at["mlp.up_proj.weight"] @ h)
            xs[t] = x + norm(at["mlp.down_proj.weight"] @ wide, at["post_feedforward_layernorm.weight"])
    table = w["model.embed_tokens.weight"]
    return np.stack([cap(table @ norm(x, w["model.norm.weight"]), c.final_softcap) for x in xs])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_softcap": None, "final_softcap": None},
        {"num_kv_heads": 4, "pattern": ("full_attention", "sliding_attention")},
        {"num_kv_heads": 1, "window": 1, "rope_theta": 100.0},
        {"d_model": 16, "head_dim": 2, "window": 50, "final_softcap": 2.0},
    ],
    ids=str,
)
def test_logits_equal_the_report_written_as_float64_loops(changes: dict[str, Any]):
    model, ids = gemma(**changes), tokens(16)
    expected = torch.from_numpy(by_the_book(model, ids.tolist())).float()
    torch.testing.assert_close(model(ids[None])[0], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("std", [0.02, 1.0, 30.0])
def test_no_logit_exceeds_the_final_cap(std: float):
    logits = gemma(init_std=std)(tokens(2, 9))
    assert logits.abs().max() <= 30.0
    assert logits.dtype == torch.float32
    assert std < 30 or logits.abs().max() > 29.9


@pytest.mark.parametrize(
    ("width", "dtype", "scale"),
    [
        (2304, torch.bfloat16, 48.0),
        (3584, torch.bfloat16, 59.75),
        (4608, torch.bfloat16, 68.0),
        (3584, torch.float32, float(torch.tensor(3584**0.5))),
    ],
)
def test_the_embedding_scale_is_rounded_to_the_activations_format(
    width: int, dtype: torch.dtype, scale: float
):
    model, ids = gemma(d_model=width, pattern=alternating(1)).to(dtype), tokens(1, 3)
    seen: list[Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(ids)
    assert torch.equal(seen[0], (model.unembedding[ids].double() * scale).to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_bf16_models_logits_are_computed_in_fp32(autocast: bool):
    """In bf16 they would lie 0.125 apart between 16 and 32."""
    model, ids = gemma().bfloat16(), tokens(2, 9)
    hidden, table = model.hidden(ids).double(), model.unembedding.double()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), 30 * torch.tanh(hidden @ table.T / 30), rtol=0, atol=1e-4)


def test_a_norms_weight_counts_from_one():
    norm, x = RMSNorm(8, eps=1e-6), torch.randn(5, 8)
    torch.testing.assert_close(norm(x).pow(2).mean(-1), torch.ones(5), rtol=1e-4, atol=1e-5)
    plain = norm(x)
    torch.nn.init.constant_(norm.weight, 1.0)
    torch.testing.assert_close(norm(x), 2 * plain)


def test_a_norm_in_bf16_adds_one_in_fp32():
    """1 + 15.8125 is 16.8125, which bf16 would round to 16.75; Llama's order rounds before the product."""
    norm, x = RMSNorm(64, eps=1e-6).bfloat16(), torch.randn(3, 64).bfloat16()
    torch.nn.init.constant_(norm.weight, 15.8125)
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * 16.8125
    assert norm(x).dtype == torch.bfloat16
    assert (norm(x) == exact.bfloat16()).float().mean() > 0.98  # a tie may fall to either side


def test_packed_counts_positions_from_each_bos_and_from_each_row():
    places = packed(torch.tensor([[BOS, 9, 9, BOS, 9, BOS], [9, 9, BOS, 9, 9, 9]]) == BOS)
    assert places.position.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]]
    assert places.document.tolist() == [[1, 1, 1, 2, 2, 3], [0, 0, 1, 1, 1, 1]]


def rows_of(*lengths: int) -> list[Tensor]:
    """Documents that begin with <bos>."""
    return [torch.cat((torch.tensor([BOS]), tokens(n - 1, seed=n))) for n in lengths]


def test_packed_documents_have_the_logits_they_have_alone():
    model, parts = gemma(), rows_of(7, 3, 11, 1)
    row = torch.cat(parts)[None]
    together = model(row, packed(row == BOS))[0].split([len(part) for part in parts])
    for logits, part in zip(together, parts, strict=True):
        torch.testing.assert_close(logits, model(part[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changed", [0, 2])
def test_a_neighbouring_document_changes_no_logit(changed: int):
    model, parts = gemma(), rows_of(7, 6, 8)
    row = torch.cat(parts)[None]
    before = model(row, packed(row == BOS))[:, 7:13]
    parts[changed][1:] = (parts[changed][1:] + 5) % 30 + 4
    other = torch.cat(parts)[None]
    assert not torch.equal(row, other)
    assert torch.equal(model(other, packed(other == BOS))[:, 7:13], before)


def test_the_future_changes_no_logit():
    model, ids = gemma(), tokens(1, 12)
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 5) % 30 + 4
    assert torch.equal(model(ids)[:, :8], model(other)[:, :8])


def test_empty_slots_before_a_text_change_nothing():
    """Rows of a batch that are padded on the left: document -1."""
    model, ids = gemma(), tokens(1, 9)
    row = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    document = torch.where(torch.arange(13) < 4, -1, 0)[None]
    position = (torch.arange(13) - 4).clamp(min=0)[None]
    torch.testing.assert_close(
        model(row, Places(position, document))[:, 4:], model(ids), rtol=1e-4, atol=1e-4
    )


def test_one_seed_gives_one_model():
    first, again, other = (gemma(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_a_fresh_model_has_the_asked_for_spread_and_plain_norms():
    for name, parameter in Gemma(CONFIG.but(d_model=64, d_ff=96, init_std=0.1)).named_parameters():
        if "norm" in name:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.1, rel=0.1)


def test_a_pass_costs_the_flops_that_the_cost_says():
    """Torch counts the matrices; the two products of attention are 4 a head, a key and a value's number."""
    model, ids = gemma(), tokens(1, 23)
    with FlopCounterMode(display=False) as counter:
        model(ids)
    places = Places(torch.arange(23)[None], torch.zeros(1, 23, dtype=torch.long))
    windows = [CONFIG.window if kind is Attention.LOCAL else None for kind in CONFIG.pattern]
    seen = sum(int(visible(places, places, window).sum()) for window in windows)
    attention = 4 * seen * CONFIG.num_heads * CONFIG.head_dim
    assert cost.forward_flops(CONFIG, 23) * 23 == pytest.approx(counter.get_total_flops() + attention)


@pytest.mark.compiled
def test_compiled_layers_give_the_same_logits_and_gradients():
    ids, results = tokens(2, 12), []
    for compiled in (False, True):
        model = gemma(pattern=alternating(2)).requires_grad_(True)
        if compiled:
            model.compile_layers()
        logits = model(ids)
        grads = torch.autograd.grad(logits.log_softmax(-1)[..., 7].mean(), list(model.parameters()))
        results.append([logits.detach(), *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)
