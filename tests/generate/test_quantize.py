"""int8: near the model it was made from, a row alone as among others, and no more memory than it says."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemwright.generate import quantize as quantizing
from gemwright.generate.engine import Session
from gemwright.generate.quantize import (
    Int8Embedding,
    Int8Linear,
    planned_bytes,
    quantize,
    weight_bytes,
)
from gemwright.losses.divergence import forward_kl
from gemwright.model import checkpoint, cost
from gemwright.model.config import GemmaConfig, size
from gemwright.model.gemma import Gemma, Linear

IDS = torch.randint(108, 700, (3, 40), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def model(tiny: GemmaConfig) -> Gemma:
    """Its output channels differ in size, so that one scale for all of them would not do."""
    made = Gemma(tiny.but(d_model=64, d_ff=128)).eval()
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, Linear):
                module.weight.mul_(torch.randn(len(module.weight), 1).exp())
        made.unembedding.mul_(4)
    return made


@torch.no_grad()
def logits(model: Gemma, ids: Tensor = IDS) -> Tensor:
    return model(ids)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def kl(model: Gemma, other: Gemma) -> float:
    return float(forward_kl(logits(model).flatten(0, 1), logits(other).flatten(0, 1)).mean())


def test_logits_stay_near_those_of_the_model(model: Gemma):
    int8 = quantize(model)
    assert error(logits(int8), logits(model)) < 0.03
    assert kl(model, int8) < 0.02
    assert logits(int8).dtype == torch.float32
    assert float(logits(int8).abs().max()) <= 30


@pytest.mark.parametrize("wrong", ["scale of a neighbour", "one scale for all", "scale of the column"])
def test_a_wrong_scale_would_be_noticed(model: Gemma, monkeypatch: pytest.MonkeyPatch, wrong: str):
    rounded = quantizing._rounded

    def broken(weight: Tensor) -> tuple[Tensor, Tensor]:
        rows, scales = rounded(weight)
        if wrong == "scale of a neighbour":
            return rows, scales.roll(1)
        if wrong == "one scale for all":
            return (weight / scales.max()).round().to(torch.int8), scales.max().expand(len(scales)).clone()
        columns = weight.abs().amax(0) / 127
        return (weight / columns).round().to(torch.int8), columns.mean().expand(len(scales)).clone()

    right = error(logits(quantize(model)), logits(model))
    monkeypatch.setattr(quantizing, "_rounded", broken)
    assert error(logits(quantize(model)), logits(model)) > 2 * right


def test_every_projection_and_the_table_are_replaced(model: Gemma):
    int8 = quantize(model)
    kinds = [type(module) for module in int8.modules()]
    assert kinds.count(Int8Linear) == 7 * model.config.num_layers
    assert kinds.count(Int8Embedding) == 1
    assert not any(issubclass(kind, nn.Linear | nn.Embedding) for kind in kinds)
    assert [name for name, _ in int8.named_modules()] == [name for name, _ in model.named_modules()]
    assert all("norm" in name and not p.requires_grad for name, p in int8.named_parameters())


def test_a_weight_is_off_by_half_a_step_at_most():
    weight = torch.randn(20, 50) * torch.logspace(-6, 3, 20)[:, None]
    weight[3] = 0
    rows, scales = quantizing._rounded(weight)
    assert rows.dtype == torch.int8
    assert int(rows.min()) >= -127
    assert bool(((rows * scales[:, None] - weight).abs() <= scales[:, None] * 0.50001).all())


def test_rounding_in_blocks_is_rounding_at_once(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(50, 8)
    rows, scales = quantizing._rounded(weight)
    monkeypatch.setattr(quantizing, "_BLOCK_ROWS", 7)
    for found, expected in zip(quantizing._rounded(weight), (rows, scales), strict=True):
        assert torch.equal(found, expected)


def test_embeddings_are_rows_of_the_rounded_table(model: Gemma):
    table, weight = quantize(model).model.embed_tokens, model.unembedding
    steps = weight[IDS].abs().amax(-1, keepdim=True) / 127
    assert bool(((table(IDS) - weight[IDS]).abs() <= 0.50001 * steps).all())


def test_a_row_is_the_same_alone_and_among_others(model: Gemma):
    """Of torch's dynamic quantisation this is not true: one scale for all rows of a call."""
    layer = Int8Linear(torch.randn(30, 64))
    x = torch.randn(6, 64) * torch.logspace(-3, 3, 6)[:, None]
    assert all(torch.equal(layer(x)[row], layer(x[row : row + 1])[0]) for row in range(6))
    int8 = quantize(model)
    assert torch.equal(logits(int8)[1:2], logits(int8, IDS[1:2]))


def test_an_outlier_does_not_cost_its_neighbours_their_precision():
    weight, x = torch.randn(200, 300), torch.randn(8, 300)
    x[0] *= 1_000
    assert error(Int8Linear(weight)(x)[1:], x[1:] @ weight.T) < 0.02
    torch_does = torch.ops.quantized.linear_dynamic(x, Int8Linear(weight)._packed, True)
    assert error(torch_does[1:], x[1:] @ weight.T) > 0.5, "the row that is 1,000 times as large was to matter"


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_largest_products_do_not_saturate(rows: int):
    weight, x = torch.full((48, 640), 0.5), torch.full((rows, 640), 3.0)
    torch.testing.assert_close(Int8Linear(weight)(x), x @ weight.T, rtol=1e-5, atol=0)
    torch.testing.assert_close(Int8Linear(weight)(-x), -x @ weight.T, rtol=1e-5, atol=0)


SCRIPT = """
import ctypes, gc, json, warnings
import torch
from gemwright.generate import quantize as q

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "abcdefghij"]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Info

def live():
    gc.collect()
    info = libc.mallinfo2()
    return info.e + info.h  # mapped, and in use on the heap

def wrong(layer, x, weight, levels):
    found = q._multiply(x, layer._packed, levels)
    return float(((found - x @ weight.T).norm() / (x @ weight.T).norm()))

weight, ones = torch.randn(256, 512), torch.ones(20, 512)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer, worst = q.Int8Linear(weight), q.Int8Linear(torch.ones(256, 512))
    levels = q._levels(torch.backends.quantized.engine)
x = torch.randn(20, 512)
told = {
    "levels": levels, "usual": wrong(layer, x, weight, levels), "warnings": [str(w.message) for w in caught],
    "worst": {n: wrong(worst, ones, torch.ones(256, 512), n) for n in (63, 127)},
}
matrices = [torch.randn(1024, 2304), torch.randn(4096, 200)]
before = live()
held = [q.Int8Linear(matrix) for matrix in matrices]
print(json.dumps(told | {"live": live() - before, "counted": sum(layer.bytes for layer in held)}))
"""


@pytest.fixture(scope="module")
def old_cpu() -> dict[str, Any]:
    """What a CPU without VNNI says: fbgemm is told to use AVX2 alone."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm") or sys.platform != "linux":
        pytest.skip("needs fbgemm, and glibc")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True,
        env={**os.environ, "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "deprecated" not in done.stderr
    return json.loads(done.stdout)


def test_a_cpu_whose_products_saturate_is_found_out_and_gets_smaller_ones(old_cpu: dict[str, Any]):
    assert old_cpu["worst"]["127"] > 0.5, "products of bytes were to overflow 16 bits"
    assert old_cpu["worst"]["63"] < 1e-5
    assert old_cpu["levels"] == 63
    assert old_cpu["usual"] < 0.02


def test_the_memory_that_is_counted_is_what_is_held(old_cpu: dict[str, Any]):
    assert old_cpu["live"] == pytest.approx(old_cpu["counted"], rel=0.06)


def test_torchs_warning_about_quantised_tensors_is_not_passed_on(old_cpu: dict[str, Any]):
    assert old_cpu["warnings"] == []


def test_the_kernels_of_arm_give_the_same_but_for_rounding(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    if "qnnpack" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no qnnpack")
    expected = logits(model)
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "qnnpack"
        found = logits(quantize(model))
    finally:
        torch.backends.quantized.engine = before
    assert error(found, expected) < 0.03


def test_a_model_in_bf16_keeps_its_activations(model: Gemma):
    expected = logits(model)
    int8 = quantize(model.bfloat16())
    with torch.no_grad():
        assert int8.hidden(IDS).dtype == torch.bfloat16
    assert {p.dtype for p in int8.parameters()} == {torch.bfloat16}
    assert logits(int8).dtype == torch.float32
    assert error(logits(int8), expected) < 0.04


def test_the_given_model_is_left_alone_and_shares_nothing(model: Gemma):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    int8 = quantize(model)
    expected = logits(int8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert torch.equal(logits(int8), expected)


def test_nothing_of_a_model_that_was_dropped_is_held(tiny: GemmaConfig):
    model = Gemma(tiny)
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    int8 = quantize(model)
    del model
    assert not [ref for ref in alive if ref() is not None]
    assert logits(int8).shape == (3, 40, 700)


@pytest.mark.parametrize(("name", "share"), [("2b", 0.33), ("9b", 0.28), ("27b", 0.26)])
def test_weights_take_a_quarter_of_fp32_and_the_table_twice_that_on_a_cpu(name: str, share: float):
    config = size(name)
    full = 4 * cost.parameters(config)
    assert planned_bytes(config, packed=True, norm_bytes=2) / full == pytest.approx(share, abs=0.005)
    assert planned_bytes(config, packed=False, norm_bytes=2) / full == pytest.approx(0.25, abs=0.002)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_planned_is_what_is_held(model: Gemma, dtype: torch.dtype):
    width = dtype.itemsize
    int8 = quantize(model.to(dtype))
    assert weight_bytes(int8) == planned_bytes(model.config, packed=True, norm_bytes=width)
    assert weight_bytes(model) == width * cost.parameters(model.config)


def test_decoding_with_a_cache_is_reading_everything_again(model: Gemma):
    """But for the activations' rounding: a sum in another order can fall to the neighbouring step."""
    int8, ids = quantize(model), IDS[0].tolist()
    session = Session(int8)
    session.feed(ids[:30])
    rows = [session.advance()[-1]]
    for token in ids[30:]:
        session.feed([token])
        rows.append(session.advance()[-1])
    assert error(torch.stack(rows), logits(int8)[0, 29:]) < 0.01


def test_another_window_works_on_the_same_weights(model: Gemma):
    int8 = quantize(model)
    assert torch.equal(logits(int8.with_window(8)), logits(int8))
    assert error(logits(int8.with_window(3)), logits(int8)) > 0.05
    assert torch.equal(logits(int8.with_window(3)), logits(quantize(model.with_window(3))))


def test_no_rows_and_a_single_vector_are_rows_too(model: Gemma):
    int8 = quantize(model)
    assert int8.logits(torch.zeros(0, 64)).shape == (0, 700)
    assert int8.logits(torch.zeros(64)).tolist() == [0.0] * 700


def test_what_is_not_a_number_stays_none():
    layer = Int8Linear(torch.randn(4, 8))
    assert bool(layer(torch.tensor([[1.0, torch.nan, 0, 0, 0, 0, 0, 0]])).isnan().all())
    assert not bool(layer(torch.tensor([[1.0, torch.inf, 0, 0, 0, 0, 0, 0]])).isfinite().any())


def test_it_cannot_be_saved_and_leaves_no_checkpoint_behind(model: Gemma, tmp_path: Path):
    with pytest.raises(ValueError, match=r"a quantised model cannot be saved. Save the one in bf16 or fp32"):
        checkpoint.save(quantize(model), tmp_path)
    assert not list(tmp_path.iterdir())


def test_it_cannot_be_trained_moved_or_quantised_again(model: Gemma):
    int8 = quantize(model)
    with pytest.raises(ValueError, match=r"cannot be trained. Train the one in bf16 or fp32"):
        int8.train()
    for move in (int8.float, int8.bfloat16, lambda: int8.to("meta")):
        with pytest.raises(ValueError, match=r"cannot be moved or cast. Quantise again where it should run"):
            move()
    with pytest.raises(ValueError, match="quantised already"):
        quantize(int8)


def test_an_unknown_kind_is_refused(model: Gemma):
    kind: Any = "int4"
    with pytest.raises(Exception, match="int4"):
        quantize(model, kind)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_of_a_run_that_diverged_are_refused(model: Gemma, value: float):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(ValueError, match="a weight is not finite"):
        quantize(model)


@pytest.mark.interop
def test_a_gpus_road_keeps_activations_and_comes_nearer(model: Gemma):
    """torchao's weight-only kernels, which also run on a CPU, slowly."""
    near = quantizing._quantized(model, packed=False)
    assert error(logits(near), logits(model)) < error(logits(quantize(model)), logits(model))
    assert weight_bytes(near) == planned_bytes(model.config, packed=False, norm_bytes=4)
    with pytest.raises(ValueError, match=r"cannot be saved"):
        near.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpus_head_is_multiplied_in_blocks(
    model: Gemma, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    table = Int8Embedding(model.unembedding.detach(), packed=False)
    hidden = torch.randn(2, 5, 64, dtype=dtype)
    whole = table.unembed(hidden)
    monkeypatch.setattr(quantizing, "_BLOCK_ROWS", 99)
    torch.testing.assert_close(table.unembed(hidden), whole)
    dequantised = table._rows * table._scales[:, None]
    torch.testing.assert_close(whole, hidden.float() @ dequantised.T, rtol=1e-4, atol=1e-4)


def test_without_torchao_a_gpu_says_what_to_install(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install 'gemwright\[gpu\]'"):
        quantizing._quantized(model, packed=False)
