"""Attention: masks as drawings, four roads with one result, and no T x T matrix where none is needed."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gemwright.model import attention
from gemwright.model.attention import (
    Places,
    attend,
    blockwise,
    flexible,
    reference,
    remembered,
    visible,
)
from gemwright.model.cache import LayerCache

GQA, MHA, MQA = (4, 2), (4, 4), (4, 1)
CAUSAL_10 = """
    1000000000
    1100000000
    1110000000
    1111000000
    1111100000
    1111110000
    1111111000
    1111111100
    1111111110
    1111111111
"""
WINDOW_4_OF_10 = """
    1000000000
    1100000000
    1110000000
    1111000000
    0111100000
    0011110000
    0001111000
    0000111100
    0000011110
    0000001111
"""
DOCUMENTS_3_4_2_WINDOW_3 = """
    100000000
    110000000
    111000000
    000100000
    000110000
    000111000
    000011100
    000000010
    000000011
"""
# Queries at 7, 8, 9; keys at 4 ... 9, as a cache of window 4 holds them.
AFTER_A_CACHE = """
    111100
    011110
    001111
"""


def drawn(picture: str) -> Tensor:
    """A drawing as a mask of one row."""
    return torch.tensor([[cell == "1" for cell in line] for line in picture.split()])[None]


def documents(*lengths: int, batch: int = 1) -> Places:
    """Places of a row that packs documents of these lengths."""
    position = torch.cat([torch.arange(length) for length in lengths])
    document = torch.cat([torch.full((length,), index) for index, length in enumerate(lengths)])
    return Places(position.expand(batch, -1).contiguous(), document.expand(batch, -1).contiguous())


def inputs(
    length: int, heads: tuple[int, int] = GQA, size: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a batch of 2, large enough that a cap of 5 bends the scores."""
    shapes = [(2, length, head, size) for head in (heads[0], heads[1], heads[1])]
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for shape in shapes)
    return q, k, v


def run(
    road: Callable[..., Tensor], tensors: tuple[Tensor, ...], *places: Places, **options: Any
) -> list[Tensor]:
    """The output and the three gradients for a fixed, uneven upstream gradient."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = road(*leaves, *places, **options)
    upstream = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


class Sizes(TorchDispatchMode):
    """Notes how many numbers each tensor holds that is made, inside our custom operations too."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {
            "gemwright::blockwise_attention": attention._blockwise,
            "gemwright::blockwise_attention_backward": attention._blockwise_backward,
        }
        if operation := own.get(func._schema.name):
            with self:
                return operation._init_fn(*args)
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.made += [tensor.numel() for tensor in made if isinstance(tensor, Tensor)]
        return out


@pytest.mark.parametrize(
    ("picture", "lengths", "window"),
    [
        (CAUSAL_10, [10], None),
        (CAUSAL_10, [10], 10),
        (CAUSAL_10, [10], 4096),
        (WINDOW_4_OF_10, [10], 4),
        (DOCUMENTS_3_4_2_WINDOW_3, [3, 4, 2], 3),
    ],
)
def test_a_query_sees_what_is_drawn(picture: str, lengths: list[int], window: int | None):
    places = documents(*lengths)
    assert torch.equal(visible(places, places, window), drawn(picture))


def test_queries_after_a_cache_see_what_is_drawn():
    whole = documents(10)
    queries, keys = (Places(*(part[:, since:] for part in whole)) for since in (7, 4))
    assert torch.equal(visible(queries, keys, 4), drawn(AFTER_A_CACHE))


def test_a_window_holds_its_own_number_of_keys_the_querys_own_included():
    places = documents(50)
    assert visible(places, places, 8).sum(-1).tolist() == [[min(query + 1, 8) for query in range(50)]]


@pytest.mark.parametrize("heads", [GQA, MHA, MQA], ids=["gqa", "mha", "mqa"])
@pytest.mark.parametrize("lengths", [[11], [5, 1, 5], [2, 9]], ids=str)
@pytest.mark.parametrize("cap", [None, 5.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 6, 50])
def test_blockwise_equals_the_reference_with_all_gradients(
    window: int | None, cap: float | None, lengths: list[int], heads: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """Blocks of 4 queries: the last is not full, and windows are smaller than a block, equal and larger."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    tensors, places = inputs(11, heads), documents(*lengths, batch=2)
    options = {"scale": 1.3, "cap": cap, "window": window}
    ours = run(blockwise, tensors, places, **options)
    expected = run(reference, tensors, places, places, **options)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_blockwise_equals_the_reference_around_a_blocks_edge(length: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    tensors, places = inputs(length), documents(length, batch=2)
    options = {"scale": 1.0, "cap": 5.0, "window": 3}
    ours = run(blockwise, tensors, places, **options)
    for mine, theirs in zip(ours, run(reference, tensors, places, places, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_blockwise_equals_the_reference_at_its_real_block_size(window: int | None):
    tensors, places = inputs(300), documents(170, 130, batch=2)
    options = {"scale": 1.0, "cap": 5.0, "window": window}
    ours = run(blockwise, tensors, places, **options)
    for mine, theirs in zip(ours, run(reference, tensors, places, places, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=5e-5)


def test_blockwise_takes_strided_inputs_and_an_expanded_gradient():
    """A sum's gradient is one number seen everywhere, and a projection may hand over transposed views."""
    places = documents(9, batch=2)
    grads = []
    for road in (blockwise, lambda *args, **options: reference(*args, places, **options)):
        torch.manual_seed(1)
        leaves = [torch.randn(2, heads, 9, 8).requires_grad_() for heads in (4, 2, 2)]
        out = road(*(leaf.transpose(1, 2) for leaf in leaves), places, scale=1.0, cap=5.0, window=4)
        grads.append(torch.autograd.grad(out.sum(), leaves))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_in_bf16_blockwise_stays_close_to_fp32(window: int | None):
    tensors, places = inputs(150, dtype=torch.bfloat16), documents(150, batch=2)
    options = {"scale": 0.35, "cap": 50.0, "window": window}
    ours = run(blockwise, tensors, places, **options)
    exact = run(reference, tuple(tensor.float() for tensor in tensors), places, places, **options)
    for mine, theirs in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - theirs).norm() < 0.01 * theirs.norm()


def test_scores_far_beyond_the_cap_leave_no_nan():
    tensors, places = tuple(tensor.detach() * 1e4 for tensor in inputs(9)), documents(9, batch=2)
    for result in run(blockwise, tensors, places, scale=1.0, cap=50.0, window=4):
        assert result.isfinite().all()


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = inputs(6)
    queries, keys = documents(6, batch=2), documents(6, batch=2)
    queries.document[:, 2:4] = 7
    out = reference(q, k, v, queries, keys, scale=1.0, cap=50.0, window=None)
    assert torch.equal(out[:, 2:4], torch.zeros_like(out[:, 2:4]))
    assert (out[:, :2] != 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_the_cap_comes_before_the_mask():
    """After the mask, tanh would turn -inf into -cap, and each key beyond the window would keep exp(-cap)."""
    q, k, v = inputs(8)
    v = v.detach().clone()
    places = documents(8, batch=2)
    before = reference(q, k, v, places, places, scale=1.0, cap=0.1, window=2)
    v[:, :6] += 1e6
    torch.testing.assert_close(
        reference(q, k, v, places, places, scale=1.0, cap=0.1, window=2)[:, 7:], before[:, 7:], rtol=0, atol=0
    )


def test_on_a_cpu_a_whole_sequence_is_attended_to_in_blocks(monkeypatch: pytest.MonkeyPatch):
    taken = []
    road = attention.blockwise
    monkeypatch.setattr(attention, "blockwise", lambda *args, **kw: taken.append(1) or road(*args, **kw))
    (q, k, v), places = inputs(6), documents(6, batch=2)
    options = {"scale": 1.0, "cap": 5.0, "window": 3}
    whole = attend(q, k, v, places, **options)
    torch.testing.assert_close(whole, reference(q, k, v, places, places, **options))
    assert taken == [1]


def after_a_cache(
    tensors: tuple[Tensor, ...],
    chunks: Sequence[int],
    rewind: int = 0,
    window: int | None = None,
    **options: Any,
) -> Tensor:
    """What `remembered` makes of each row, chunk by chunk: the outputs of the whole sequence."""
    rows = []
    for q, k, v in zip(*(tensor.detach() for tensor in tensors), strict=True):
        layer, start, out = LayerCache(window, rewind, 0), 0, []
        for count in chunks:
            part = slice(start, start + count)
            out.append(
                remembered(q[part], layer.extend(k[part], v[part], start), start, window=window, **options)
            )
            start += count
        rows.append(torch.cat(out))
    return torch.stack(rows)


@settings(max_examples=60)
@given(
    chunks=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    heads=st.sampled_from([GQA, MHA, MQA, (6, 2)]),
    size=st.sampled_from([2, 8]),
    cap=st.sampled_from([None, 0.5, 5.0]),
    window=st.sampled_from([None, 1, 2, 5, 8, 30]),
    rewind=st.integers(0, 3),
    scale=st.sampled_from([0.3, 1.0, 2.0]),
    block=st.sampled_from([1, 3, 128]),
    seed=st.integers(0, 9),
)
def test_attention_to_a_cache_equals_the_reference(
    chunks: list[int], heads: tuple[int, int], size: int, cap: float | None, window: int | None, rewind: int,
    scale: float, block: int, seed: int,
):  # fmt: skip
    """Chunks of any lengths, blocks of few queries, rings with and without slack."""
    torch.manual_seed(seed)
    tensors, places = inputs(sum(chunks), heads, size), documents(sum(chunks), batch=2)
    options = {"scale": scale, "cap": cap, "window": window}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        ours = after_a_cache(tensors, chunks, rewind, **options)
    expected = reference(*tensors, places, places, **options)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_to_a_cache_equals_the_reference_at_its_real_block_size(window: int | None):
    tensors, places = inputs(300), documents(300, batch=2)
    options = {"scale": 1.0, "cap": 5.0, "window": window}
    ours = after_a_cache(tensors, [150, 1, 149], **options)
    expected = reference(*tensors, places, places, **options)
    torch.testing.assert_close(ours, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_in_bf16_attention_to_a_cache_stays_close_to_fp32(window: int | None):
    tensors, places = inputs(150, dtype=torch.bfloat16), documents(150, batch=2)
    options = {"scale": 0.35, "cap": 50.0, "window": window}
    ours = after_a_cache(tensors, [70, 1, 50, 29], rewind=2, **options)
    exact = reference(*(tensor.float() for tensor in tensors), places, places, **options)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize(
    "broken",
    [{"cap": None}, {"cap": 6.0}, {"scale": 1.2}, {"window": 4}, {"window": 6}, {"window": None}],
    ids=str,
)
def test_the_comparison_of_attention_to_a_cache_tells_when_a_feature_is_broken(broken: dict[str, Any]):
    tensors, places = inputs(17), documents(17, batch=2)
    options = {"scale": 1.0, "cap": 5.0, "window": 5}
    ours = after_a_cache(tensors, [9, 1, 7], **options)
    torch.testing.assert_close(ours, reference(*tensors, places, places, **options).detach())
    assert (ours - reference(*tensors, places, places, **options | broken)).abs().max() > 0.01


def test_scores_far_beyond_the_cap_leave_no_nan_after_a_cache():
    tensors = tuple(tensor.detach() * 1e4 for tensor in inputs(9))
    assert after_a_cache(tensors, [6, 1, 2], rewind=1, scale=1.0, cap=50.0, window=4).isfinite().all()


def test_attention_to_a_cache_leaves_queries_and_memory_as_they_were():
    """Scores are changed in place, and nothing else."""
    q, k, v = (tensor[0].detach() for tensor in inputs(9))
    layer = LayerCache(4, 0, 0)
    layer.extend(k[:8], v[:8], 0)
    reach = layer.extend(k[8:], v[8:], 8)
    before = [tensor.clone() for tensor in (q, reach.keys, reach.values)]
    remembered(q[8:], reach, 8, scale=0.5, cap=5.0, window=4)
    assert all(torch.equal(a, b) for a, b in zip(before, (q, reach.keys, reach.values), strict=True))


def test_a_local_layer_never_holds_a_matrix_of_all_scores():
    """Forward and backward: the largest tensor is one block's scores, or an input."""
    length, window, places = 2048, 64, documents(2048)
    leaves = [torch.randn(1, length, heads, 4).requires_grad_() for heads in (2, 1, 1)]
    with Sizes() as sizes:
        blockwise(*leaves, places, scale=1.0, cap=50.0, window=window).sum().backward()
    block = 2 * attention.QUERY_BLOCK * (attention.QUERY_BLOCK + window - 1)
    assert len(sizes.made) > 16 * length // attention.QUERY_BLOCK  # it looked inside the operations
    assert max(sizes.made) == block
    assert block < length * length / 80


def test_a_global_layer_holds_one_block_of_scores_at_most():
    length, places = 1024, documents(1024)
    leaves = [torch.randn(1, length, heads, 4).requires_grad_() for heads in (2, 1, 1)]
    with Sizes() as sizes:
        blockwise(*leaves, places, scale=1.0, cap=50.0, window=None).sum().backward()
    assert max(sizes.made) == 2 * attention.QUERY_BLOCK * length


def test_the_custom_operations_keep_torchs_rules(monkeypatch: pytest.MonkeyPatch):
    """Schema, fake kernels and autograd registration: what torch.compile relies on."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)
    tensors, places = inputs(6, size=4), documents(4, 2, batch=2)
    torch.library.opcheck(attention._blockwise, (*tensors, *places, 0.5, 5.0, 3))
    q, k, v = (tensor.detach() for tensor in tensors)
    out, lse = attention._blockwise(q, k, v, *places, 0.5, None, 3)
    torch.library.opcheck(
        attention._blockwise_backward, (torch.ones_like(out), q, k, v, out, lse, *places, 0.5, None, 3)
    )
    assert out.shape == q.shape


@pytest.mark.compiled
def test_flex_attention_equals_the_reference():
    tensors, places = tuple(t.detach() for t in inputs(200, size=16)), documents(130, 70, batch=2)
    options = {"scale": 0.5, "cap": 5.0, "window": 50}
    with torch.no_grad():
        ours = flexible(*tensors, places, **options)
        torch.testing.assert_close(ours, reference(*tensors, places, places, **options), rtol=1e-4, atol=1e-5)


@pytest.mark.compiled
def test_one_compiled_kernel_equals_the_reference_for_local_and_global_layers(
    monkeypatch: pytest.MonkeyPatch,
):
    """It is compiled for all lengths and windows: forward once, backward once."""
    monkeypatch.setattr(attention, "QUERY_BLOCK", 16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for length, window in [(40, 10), (37, None), (24, 64)]:
        tensors, places = inputs(length), documents(length - 5, 5, batch=2)
        options = {"scale": 1.0, "cap": 5.0, "window": window}
        ours = run(blockwise, tensors, places, **options)
        for mine, theirs in zip(ours, run(reference, tensors, places, places, **options), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
