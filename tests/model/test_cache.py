"""The cache: what is read through it equals what is read at once, and no layer holds what it need not."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemwright.model import attention, cost
from gemwright.model.attention import remembered
from gemwright.model.cache import KVCache, LayerCache
from gemwright.model.config import GemmaConfig, alternating, size
from gemwright.model.gemma import Gemma

WINDOW = 5
CONFIG = GemmaConfig(
    d_model=32, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=8, pattern=alternating(3), vocab_size=64,
    query_pre_attn_scalar=16, window=WINDOW, max_seq_len=64, attn_softcap=5.0, init_std=0.4,
)  # fmt: skip


def gemma(**changes: Any) -> Gemma:
    """Weights and norms that are large enough for a wrong key to show in the logits."""
    torch.manual_seed(0)
    model = Gemma(CONFIG.but(**changes))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(False).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(4, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(model: Gemma, ids: Tensor, *caches: KVCache) -> Tensor:
    """The logits of some more tokens of each row."""
    return model.logits(model.hidden(ids, caches=caches))


@torch.no_grad()
def through(model: Gemma, ids: Tensor, chunks: Sequence[int], **options: int) -> tuple[Tensor, KVCache]:
    """The logits of one sequence, read chunk by chunk."""
    cache = KVCache(model.config, **options)
    return torch.cat([read(model, chunk[None], cache)[0] for chunk in ids.split(list(chunks))]), cache


# What is read in pieces and what is read at once.


@pytest.mark.parametrize("window", [1, 2, WINDOW, 16, 17, 50])
@pytest.mark.parametrize("rewind", [0, 3])
def test_reading_token_by_token_equals_reading_at_once(window: int, rewind: int):
    model, ids = gemma(window=window), tokens(17)
    logits, cache = through(model, ids, [1] * 17, rewind=rewind)
    assert cache.length == 17
    torch.testing.assert_close(logits, model(ids[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rewind", [0, 1, 4])
@pytest.mark.parametrize(
    "chunks", [[17], [4, 1, 12], [5, 12], [6, 11], [3, 6, 8], [12, 5], [1, 4, 5, 6, 1], [8, 2, 2, 5]], ids=str
)
def test_reading_in_chunks_equals_reading_at_once(chunks: list[int], rewind: int):
    """The window is 5: chunks end before it, on it and beyond it, and some are longer than ring and all."""
    model, ids = gemma(), tokens(17)
    logits, _ = through(model, ids, chunks, rewind=rewind)
    torch.testing.assert_close(logits, model(ids[None])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [4, 6])
def test_that_comparison_would_notice_another_window(window: int):
    ids = tokens(17)
    logits, _ = through(gemma(), ids, [3, 6, 8])
    assert (logits - gemma(window=window)(ids[None])[0]).abs().max() > 0.1


@settings(max_examples=45)
@given(data=st.data(), window=st.integers(1, 6), rewind=st.integers(0, 4), block=st.sampled_from([2, 3, 128]))
def test_whatever_is_read_and_taken_back_the_logits_are_those_of_the_text(
    data: st.DataObject, window: int, rewind: int, block: int
):
    """Chunks of any length, cuts as far as `rewind` allows, other tokens after a cut, small blocks."""
    model = gemma(window=window)
    cache, ids, furthest = KVCache(model.config, rewind=rewind), tokens(0), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", block)
        for step in range(data.draw(st.integers(1, 9))):
            slack = rewind - (furthest - len(ids))
            back = data.draw(st.integers(0, min(slack, len(ids)))) if slack > 0 else 0
            ids = ids[: len(ids) - back]
            cache.cut(len(ids))
            more = tokens(data.draw(st.integers(1, 9)), seed=step)
            ids = torch.cat((ids, more))
            furthest = max(furthest, len(ids))
            logits = read(model, more[None], cache)[0]
            expected = model(ids[None])[0, -len(more) :]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_in_bf16_the_cache_loses_no_more_than_bf16_does():
    """Against the same weights in fp32: what reading at once in bf16 loses is the measure."""
    narrow, ids = gemma().bfloat16(), tokens(40)
    exact = gemma().bfloat16().float()(ids[None])[0]
    at_once = (narrow(ids[None])[0] - exact).norm()
    logits, cache = through(narrow, ids, [7, 1, 1, 20, 1, 10], rewind=2)
    assert 0 < at_once < 0.2 * exact.norm()
    assert (logits - exact).norm() < 2 * at_once
    assert {layer.keys.dtype for layer in cache.layers if layer.keys is not None} == {torch.bfloat16}


def test_rows_of_different_lengths_share_a_step_and_keep_their_own_logits():
    """One has just begun, one stands at its window's edge, one is beyond three windows."""
    model, lengths = gemma(), (1, 4, 16)
    texts = [tokens(length + 5, seed=length) for length in lengths]
    caches = [KVCache(model.config) for _ in lengths]
    for text, length, cache in zip(texts, lengths, caches, strict=True):
        read(model, text[None, :length], cache)
    for begin, end in ((0, 1), (1, 2), (2, 5)):
        more = torch.stack([text[n + begin : n + end] for text, n in zip(texts, lengths, strict=True)])
        together = read(model, more, *caches)
        for row, text, length in zip(together, texts, lengths, strict=True):
            expected = model(text[None, : length + end])[0, length + begin :]
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    assert [cache.length for cache in caches] == [length + 5 for length in lengths]


# What a query sees, as drawings: rows are queries, columns everything that was ever stored, in that order.


def seen(
    window: int | None, chunks: Sequence[int], *, rewind: int = 0, cut: tuple[int, int] = (-1, 0), last: int
) -> str:
    """Who sees what. Keys are equal, so what a query returns of one-hot values is what it sees.

    Args:
        cut: (after how many chunks, to what position).
        last: how many of the last queries to draw.
    """
    layer, start, stored, rows = LayerCache(window, rewind, 0), 0, 0, []
    for index, count in enumerate(chunks):
        if index == cut[0]:
            start = cut[1]
        values = torch.eye(sum(chunks))[stored : stored + count, None]
        reach = layer.extend(torch.zeros_like(values), values, start)
        out = remembered(torch.zeros_like(values), reach, start, scale=1.0, cap=None, window=window)
        rows += ["".join("1" if share > 0 else "0" for share in row[0]) for row in out]
        start, stored = start + count, stored + count
    return "\n".join(rows[-last:])


DRAWINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a global layer, token by token": ({"window": None, "chunks": [1] * 6}, """
        100000
        110000
        111000
        111100
        111110
        111111"""),
    "a global layer, in chunks": ({"window": None, "chunks": [2, 4]}, """
        111000
        111100
        111110
        111111"""),
    "the ring fills and turns": ({"window": 3, "chunks": [1] * 6}, """
        100000
        110000
        111000
        011100
        001110
        000111"""),
    "one chunk longer than the ring": ({"window": 3, "chunks": [6]}, """
        100000
        110000
        111000
        011100
        001110
        000111"""),
    "a chunk across the edge of a ring that is not full": ({"window": 4, "chunks": [2, 3, 1]}, """
        110000
        111000
        111100
        011110
        001111"""),
    "a chunk into a full ring": ({"window": 3, "chunks": [4, 3]}, """
        0011100
        0001110
        0000111"""),
    "a chunk longer than the ring, then one token": ({"window": 3, "chunks": [3, 5, 1]}, """
        011100000
        001110000
        000111000
        000011100
        000001110
        000000111"""),
    "a window of one": ({"window": 1, "chunks": [2, 1, 2]}, """
        01000
        00100
        00010
        00001"""),
    "a ring with slack sees no more": ({"window": 3, "rewind": 2, "chunks": [5, 1, 3, 1]}, """
        0001110000
        0000111000
        0000011100
        0000001110
        0000000111"""),
    # Columns 4 and 5 were stored, taken back, and are written over by 6 and 7.
    "what was taken back is not seen": (
        {"window": 3, "rewind": 2, "chunks": [4, 2, 1, 2], "cut": (2, 4)}, """
        001100100
        000100110
        000000111"""),
    "what was taken back is not seen while it still lies there": (
        {"window": 3, "rewind": 2, "chunks": [6, 3, 1, 1], "cut": (2, 7)}, """
        00000110010
        00000010011"""),
    "what was taken back is not seen by a longer chunk": (
        {"window": 3, "rewind": 1, "chunks": [5, 1, 4], "cut": (2, 5)}, """
        0001101000
        0000101100
        0000001110
        0000000111"""),
    "a global layer takes back": ({"window": None, "chunks": [3, 2, 1, 1], "cut": (2, 2)}, """
        1100010
        1100011"""),
}  # fmt: skip


@pytest.mark.parametrize(("case", "picture"), DRAWINGS.values(), ids=DRAWINGS)
def test_a_query_after_a_cache_sees_what_is_drawn(case: dict[str, Any], picture: str):
    expected = picture.split()
    assert seen(**case, last=len(expected)).split() == expected


# What is held.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[1], [3], [5], [6], [1] * 12, [12], [4, 4, 4], [5, 1, 6]], ids=str)
def test_a_cache_that_knows_its_length_holds_the_bytes_that_the_cost_says(
    chunks: list[int], dtype: torch.dtype
):
    model, length = gemma().to(dtype), sum(chunks)
    _, cache = through(model, tokens(length), chunks, reserve=length)
    assert cache.bytes == cost.kv_cache_bytes(model.config, length, dtype.itemsize)


def test_an_empty_cache_holds_nothing():
    assert KVCache(CONFIG, reserve=40).bytes == 0


def test_slack_costs_so_many_positions_in_each_local_layer():
    model = gemma()
    plain, slack = (through(model, tokens(20), [20], rewind=n, reserve=20)[1].bytes for n in (0, 3))
    assert slack - plain == 3 * 2 * 2 * (CONFIG.num_kv_heads * CONFIG.head_dim * 4)


def test_a_cache_that_outgrows_what_was_reserved_goes_on():
    model, ids = gemma(), tokens(30)
    logits, cache = through(model, ids, [1] * 30, reserve=6)
    torch.testing.assert_close(logits, model(ids[None])[0], rtol=1e-4, atol=1e-4)
    assert cost.kv_cache_bytes(CONFIG, 30, 4) <= cache.bytes <= 1.5 * cost.kv_cache_bytes(CONFIG, 30, 4)


@pytest.mark.parametrize("chunks", [[1] * 30, [30], [4, 7, 7, 12], [29, 1]], ids=str)
def test_a_local_layer_holds_its_window_and_nothing_else(chunks: list[int]):
    layer, start = LayerCache(8, 0, 0), 0
    for count in chunks:
        positions = torch.arange(start, start + count, dtype=torch.float32)[:, None, None]
        layer.extend(positions, -positions, start)
        start += count
    assert layer.keys is not None
    assert layer.values is not None
    assert sorted(layer.keys.flatten().tolist()) == list(range(22, 30))
    assert torch.equal(layer.values, -layer.keys)


@pytest.mark.parametrize("window", [None, 300])
def test_a_growing_layer_is_copied_a_few_times_and_keeps_what_it_holds(window: int | None):
    layer, buffers = LayerCache(window, 0, 0), []
    for start in range(1000):
        layer.extend(torch.full((1, 1, 1), float(start)), torch.zeros(1, 1, 1), start)
        if not buffers or buffers[-1] is not layer.keys:
            buffers.append(layer.keys)
    held = sorted(buffers[-1].flatten().tolist()[:1000])
    assert held == [float(position) for position in range(1000 - (window or 1000), 1000)]
    assert len(buffers) <= 9
    assert buffers[-1].shape[1] <= (window or 1500)


def test_what_is_reserved_is_allocated_once():
    model, ids, cache = gemma(), tokens(40), KVCache(CONFIG, reserve=40)
    read(model, ids[None, :1], cache)
    buffers = [layer.keys for layer in cache.layers]
    for chunk in ids[1:].split(3):
        read(model, chunk[None], cache)
    assert all(layer.keys is buffer for layer, buffer in zip(cache.layers, buffers, strict=True))


@pytest.mark.parametrize(("length", "ratio"), [(4096, 1.0), (8192, 0.75), (32768, 0.56)])
def test_rolling_layers_save_a_quarter_of_2b_at_its_context_and_more_beyond(length: int, ratio: float):
    config = size("2b").but(max_seq_len=length)
    full = cost.kv_cache_bytes(config.but(window=length), length, 2)
    assert cost.kv_cache_bytes(config, length, 2) / full == pytest.approx(ratio, abs=0.005)


def test_the_cost_of_2b_is_two_numbers_a_head_layer_and_position():
    """8,192 tokens in bf16: 13 local layers of 4,096 positions, 13 global ones of 8,192; 4 heads of 256."""
    assert cost.kv_cache_bytes(size("2b"), 8192, 2) == 2 * 13 * (4096 + 8192) * 4 * 256 * 2


# What can be taken back.


@pytest.mark.parametrize("length", [-1, 13])
def test_a_cache_is_cut_only_within_what_it_holds(length: int):
    _, cache = through(gemma(), tokens(12), [12], rewind=20)
    with pytest.raises(ValueError, match=f"the cache holds 12 positions: it cannot be cut to {length}"):
        cache.cut(length)
    assert cache.length == 12


@pytest.mark.parametrize(("length", "told"), [(12, 0), (10, 0), (9, 3), (0, 12)])
def test_a_full_ring_gives_back_as_much_as_its_slack(length: int, told: int):
    _, cache = through(gemma(), tokens(12), [8, 4], rewind=2)
    if told:
        with pytest.raises(ValueError, match=f"has read 12 positions and can take back 2, not {told}"):
            cache.cut(length)
        assert cache.length == 12
    else:
        cache.cut(length)
        assert cache.length == length


def test_taking_back_twice_counts_from_the_furthest_position_read():
    _, cache = through(gemma(), tokens(12), [12], rewind=2)
    cache.cut(11)
    cache.cut(10)
    with pytest.raises(ValueError, match="can take back 2, not 3"):
        cache.cut(9)


def test_while_no_ring_has_turned_everything_can_be_taken_back():
    model, ids = gemma(), tokens(WINDOW)
    _, cache = through(model, ids, [2, WINDOW - 2])
    cache.cut(0)
    other = tokens(20, seed=9)
    logits = torch.cat([read(model, part[None], cache)[0] for part in other.split([4, 1, 15])])
    torch.testing.assert_close(logits, model(other[None])[0], rtol=1e-4, atol=1e-4)


def test_a_model_of_global_layers_takes_back_everything():
    model, ids = gemma(pattern=("full_attention",) * 2), tokens(20)
    _, cache = through(model, ids, [20])
    cache.cut(3)
    logits = read(model, ids[None, 3:], cache)[0]
    torch.testing.assert_close(logits, model(ids[None])[0, 3:], rtol=1e-4, atol=1e-4)


# The same weights under another window.


@pytest.mark.parametrize("window", [1, 4, 30])
def test_another_window_gives_the_logits_of_a_model_built_with_it(window: int):
    model, ids = gemma(), tokens(17)
    before = model(ids[None])
    other = model.with_window(window)
    assert torch.equal(other(ids[None]), gemma(window=window)(ids[None]))
    torch.testing.assert_close(through(other, ids, [9, 1, 7])[0], other(ids[None])[0], rtol=1e-4, atol=1e-4)
    assert (model.config.window, other.config.window) == (WINDOW, window)
    assert torch.equal(model(ids[None]), before)
    assert not torch.equal(other(ids[None]), before)


def test_another_window_copies_no_weight():
    model = gemma()
    theirs = dict(model.with_window(3).named_parameters())
    assert set(theirs) == {name for name, _ in model.named_parameters()}
    assert all(theirs[name] is parameter for name, parameter in model.named_parameters())


def test_a_smaller_window_makes_a_smaller_cache():
    model = gemma()
    _, cache = through(model.with_window(2), tokens(20), [20], reserve=20)
    assert cache.bytes == cost.kv_cache_bytes(CONFIG.but(window=2), 20, 4)


def test_a_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="window"):
        gemma().with_window(0)
