"""The road to the logits: every projection's product, the head in blocks, the cap."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gemwright.model import head
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each product had that oneDNN was asked for."""
    rows: list[int] = []
    multiply = head._by_onednn

    def watch(x: Tensor, weight: Tensor) -> Tensor:
        rows.append(len(x))
        return multiply(x, weight)

    monkeypatch.setattr(head, "_by_onednn", watch)
    return rows


@pytest.mark.parametrize("rows", [*range(1, 20), 33, 63, 64, 65, 66])
def test_a_product_is_that_of_a_linear_layer(rows: int, few: list[int]):
    """By one road below 4 rows, by another from 4 to 64, by the first one above."""
    x, weight = torch.randn(rows, 24), torch.randn(50, 24)
    with torch.no_grad():
        out = head.product(x, weight)
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()
    assert few == ([rows] if 4 <= rows <= 64 else [])


@pytest.mark.parametrize(
    "shape", [(), (1,), (5,), (1, 1), (2, 3), (7, 1), (2, 1, 4), (0,), (3, 0), (5, 8, 2)], ids=str
)
@torch.no_grad()
def test_a_product_keeps_the_shape_of_what_it_multiplies(shape: tuple[int, ...]):
    x, weight = torch.randn(*shape, 24), torch.randn(50, 24)
    out = head.product(x, weight)
    assert out.shape == (*shape, 50)
    torch.testing.assert_close(out, F.linear(x, weight), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_product_takes_strided_inputs(few: list[int]):
    """Rows of a batch cut from a longer one, heads transposed, a weight that is a view."""
    weight = torch.randn(24, 50).T
    for x in (torch.randn(3, 9, 24)[:, 2:5], torch.randn(24, 6).T, torch.randn(2, 24, 5).transpose(1, 2),
              torch.randn(1, 1, 24).expand(4, 2, 24), torch.randn(8, 48)[:, ::2]):  # fmt: skip
        torch.testing.assert_close(head.product(x, weight), F.linear(x, weight), rtol=1e-5, atol=1e-5)
    assert len(few) == 5


def test_with_gradients_a_product_takes_the_ordinary_road(few: list[int]):
    x, weight = torch.randn(8, 24, requires_grad=True), torch.randn(50, 24, requires_grad=True)
    out = head.product(x, weight)
    assert few == []
    grads = torch.autograd.grad(out.sum(), (x, weight))
    expected = torch.autograd.grad(F.linear(x, weight).sum(), (x, weight))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(grads, expected, strict=True))


@torch.no_grad()
def test_in_bf16_a_product_takes_the_ordinary_road(few: list[int]):
    x, weight = torch.randn(8, 24).bfloat16(), torch.randn(50, 24).bfloat16()
    assert torch.equal(head.product(x, weight), F.linear(x, weight))
    assert few == []


@torch.no_grad()
def test_under_autocast_a_product_is_in_autocasts_format():
    x, weight = torch.randn(8, 24), torch.randn(50, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = head.product(x, weight), F.linear(x, weight)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.05)


def test_every_projection_of_the_model_is_such_a_product(tiny: GemmaConfig, few: list[int]):
    """7 a layer, and the head."""
    model = Gemma(tiny)
    with torch.no_grad():
        model(torch.arange(6)[None])
    assert few == [6] * (7 * tiny.num_layers + 1)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (40,)], ids=str)
@torch.no_grad()
def test_a_head_in_bf16_is_multiplied_in_fp32_in_blocks(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(head, "_BLOCK_BYTES", 4 * 24 * 7)  # 7 rows a block: 50 is no multiple
    hidden, weight = torch.randn(*shape, 24).bfloat16(), torch.randn(50, 24).bfloat16()
    out = head.raw_logits(hidden, weight)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, F.linear(hidden.float(), weight.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_logits_are_written_where_they_are_wanted(dtype: torch.dtype):
    hidden, weight, out = torch.randn(6, 24).to(dtype), torch.randn(50, 24).to(dtype), torch.empty(6, 50)
    assert head.raw_logits(hidden, weight, out=out) is out
    torch.testing.assert_close(out, F.linear(hidden.float(), weight.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (2, 5), ()], ids=str)
def test_a_head_may_be_a_function_and_its_logits_are_capped_too(shape: tuple[int, ...]):
    """What a quantised model has in place of the table."""
    hidden, table = torch.randn(*shape, 24), 30 * torch.randn(50, 24)

    def unembed(states: Tensor) -> Tensor:
        return states @ table.T

    raw = hidden @ table.T
    torch.testing.assert_close(head.raw_logits(hidden, unembed), raw)
    torch.testing.assert_close(head.logits(hidden, unembed, 30.0), 30 * torch.tanh(raw / 30))
    torch.testing.assert_close(head.logits(hidden, unembed, None), raw)


def test_a_head_that_is_a_function_gives_what_the_table_gives():
    hidden, table = torch.randn(4, 24), torch.randn(50, 24)
    by_table = head.logits(hidden, table, 30.0)
    torch.testing.assert_close(head.logits(hidden, lambda states: states @ table.T, 30.0), by_table)


def test_logits_of_a_model_are_those_of_each_position_alone(tiny: GemmaConfig):
    """One row, few rows and many: three roads through the product, one result."""
    model, hidden = Gemma(tiny), torch.randn(40, tiny.d_model)
    with torch.no_grad():
        whole = model.logits(hidden)
        torch.testing.assert_close(torch.cat([model.logits(part) for part in hidden.split(8)]), whole)
        torch.testing.assert_close(torch.stack([model.logits(row) for row in hidden]), whole)
