"""Gemma 2's attention: scale, soft-cap, then mask, then softmax in fp32 (report, section 2).

One definition of what a query may see (`visible`) and four roads to the same numbers:

* `reference`: every score in one matrix; what the others are tested against.
* `blockwise`: blocks of queries against the keys they can reach at all, scores recomputed in the backward
  pass. A local layer costs T x window and a global one half of T x T, and no more than one block of scores
  exists at a time.
* `flexible`: torch's `flex_attention` for GPUs (on the CPU it has no backward).
* `remembered`: new queries against a cache, block by block too. Nothing is compiled, so that the first token
  need not wait for a compiler.

The cap comes before the mask: after it, tanh would turn a masked -inf into -cap and let it leak into the
softmax.
"""

import functools
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gemwright.device import can_compile, fused
from gemwright.model.cache import Reach
from gemwright.model.head import softcap, softcap_by_exp, softcap_slope

QUERY_BLOCK = 128
"""Queries a block. 64 to 256 ran alike within a CPU's noise: smaller wastes less above the diagonal, larger
feeds the GEMMs."""


class Places(NamedTuple):
    """Where tokens stand: position inside a document, and which document of a row (-1: an empty slot)."""

    position: Int[Tensor, "B S"]
    document: Int[Tensor, "B S"]


def visible(queries: Places, keys: Places, window: int | None) -> Bool[Tensor, "B T S"]:
    """True where a query sees a key: same document, not later, and fewer than `window` positions back.

    A window of W holds W keys, the query's own included (q - W < k <= q), as in both of Google's code bases.
    """
    distance = queries.position[:, :, None] - keys.position[:, None, :]
    seen = (distance >= 0) & (queries.document[:, :, None] == keys.document[:, None, :])
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G K"],
    places: Places,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Tensor, "B T H K"]:
    """A whole sequence attends to itself, by the fastest road. `window=None` is a global layer.

    Tokens must stand in reading order, documents one after the other: both roads skip what cannot be seen by
    index.
    """
    road = flexible if q.is_cuda else blockwise
    return road(q, k, v, places, scale=scale, cap=cap, window=window)


def remembered(
    q: Float[Tensor, "T H K"],
    reach: Reach,
    start: int,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Tensor, "T H K"]:
    """Queries at positions `start`, `start + 1`, ... of one sequence against its cache, their own keys in it.

    Without gradients: scores are changed in place.
    """
    keys, values, first = reach
    heads, held, _ = keys.shape
    new, last = len(q), start + len(q) - 1
    q = (q * scale).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # (G, R, T, K)
    if new == 1 and (held if first is None else start + 1 - first) <= (window or held):
        return _mix(q, keys, values, None, cap)  # one query, which sees all that is held
    blocks = []
    for begin in range(0, new, QUERY_BLOCK):
        end = min(new, begin + QUERY_BLOCK)
        low, high = 0, held
        if first is not None:  # in order: only the keys that some query of the block sees
            low, high = max(0, start + begin + 1 - (window or held) - first), start + end - first
        places = torch.arange(start + begin, start + end, device=q.device)
        unseen = _unseen(places, _positions(low, high, first, held, last, q.device), window)
        blocks.append(_mix(q[:, :, begin:end], keys[:, low:high], values[:, low:high], unseen, cap))
    return torch.cat(blocks)


def _mix(
    q: Float[Tensor, "G R T K"], keys: Float[Tensor, "G S K"], values: Float[Tensor, "G S K"],
    unseen: Float[Tensor, "T S"] | None, cap: float | None,
) -> Float[Tensor, "T H K"]:  # fmt: skip
    """Values weighed by the scores of scaled queries."""
    heads, repeats, new, size = q.shape
    scores = torch.bmm(q.reshape(heads, -1, size), keys.transpose(1, 2)).float()
    if cap is not None:
        scores.div_(cap).tanh_().mul_(cap)
    if unseen is not None:
        scores.view(heads, repeats, new, -1).add_(unseen)
    mixed = torch.bmm(scores.softmax(-1).to(values.dtype), values)
    return mixed.view(heads, repeats, new, size).permute(2, 0, 1, 3).reshape(new, -1, size)


def _positions(
    low: int, high: int, first: int | None, held: int, last: int, device: torch.device
) -> Int[Tensor, " S"]:
    """Positions of a cache's slots. In a ring, slot s has the latest position p <= last with p mod S = s."""
    slots = torch.arange(low, high, device=device)
    return first + slots if first is not None else last - (last - slots) % held


def _unseen(queries: Int[Tensor, " T"], keys: Int[Tensor, " S"], window: int | None) -> Float[Tensor, "T S"]:
    """What is added to scores: 0 where a query sees a key, and so little elsewhere that nothing remains."""
    distance = queries[:, None] - keys
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros_like(distance, dtype=torch.float32).masked_fill_(unseen, -torch.inf)


def reference(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B S G K"],
    v: Float[Tensor, "B S G K"],
    queries: Places,
    keys: Places,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Tensor, "B T H K"]:
    """The definition, one T x S matrix a head. A query that sees nothing gets zeros, not NaN."""
    grouped = q.unflatten(2, (k.shape[2], -1))
    scores = softcap(torch.einsum("btgrk,bsgk->bgrts", grouped * scale, k).float(), cap)
    mask = visible(queries, keys, window)[:, None, None]
    scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
    probabilities = scores.softmax(-1).masked_fill(~mask, 0.0).to(v.dtype)
    return torch.einsum("bgrts,bsgk->btgrk", probabilities, v).flatten(2, 3)


def blockwise(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G K"],
    places: Places,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Tensor, "B T H K"]:
    """Self-attention block by block, with a backward pass; see the module's head."""
    # A global layer is a local one whose window is the whole row: one compiled kernel serves both.
    return _blockwise(q, k, v, places.position, places.document, scale, cap, window or q.shape[1])[0]


@functools.cache
def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if can_compile() else flex_attention


def flexible(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G K"],
    places: Places,
    *,
    scale: float,
    cap: float | None,
    window: int | None,
) -> Float[Tensor, "B T H K"]:
    """Self-attention by torch's flex_attention, which leaves out blocks that the mask rules out."""
    from torch.nn.attention.flex_attention import create_block_mask

    position, document = places

    def mask(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (i >= j) & (document[b, i] == document[b, j])
        return seen if window is None else seen & (position[b, i] - position[b, j] < window)

    def score(s: Tensor, _b: Tensor, _h: Tensor, _i: Tensor, _j: Tensor) -> Tensor:
        return softcap(s, cap)

    batch, length = position.shape
    block_mask = create_block_mask(mask, batch, None, length, length, device=str(q.device))
    out = _flex_attention()(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        score_mod=score, block_mask=block_mask, scale=scale, enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2)  # pyright: ignore[reportAttributeAccessIssue] - a tensor: no lse was asked for


def _cut(position: Tensor, document: Tensor, part: slice) -> Places:
    """The places of some columns (contiguous, so that one compiled kernel fits every block)."""
    return Places(position[:, part].contiguous(), document[:, part].contiguous())


def _group(x: Tensor, heads: int) -> Tensor:
    """(B, T, H, K) -> (B * G, R * T, K): the R query heads of a key/value head, one below the other."""
    batch, length, all_heads, size = x.shape
    x = x.view(batch, length, heads, all_heads // heads, size).permute(0, 2, 3, 1, 4)
    return x.reshape(batch * heads, -1, size)


def _ungroup(x: Tensor, like: Tensor, heads: int) -> Tensor:
    """The inverse of `_group`."""
    batch, length, all_heads, size = like.shape
    return x.view(batch, heads, all_heads // heads, length, size).permute(0, 3, 1, 2, 4).reshape(like.shape)


def _weigh(
    scores: Float[Tensor, "B G R T S"], queries: Places, keys: Places, scale: float, cap: float | None,
    window: int,
) -> tuple[Float[Tensor, "B G R T S"], Float[Tensor, "B G R T"]]:  # fmt: skip
    """Raw products -> probabilities and their log-sum-exp."""
    capped = softcap_by_exp(scores.float() * scale, cap)
    mask = visible(queries, keys, window)[:, None, None]
    top = torch.where(mask, capped, torch.finfo(torch.float32).min).amax(-1, keepdim=True)
    weights = torch.where(mask, torch.exp(capped - top), 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights / total).to(scores.dtype), (top + total.log())[..., 0]


def _weigh_backward(
    scores: Float[Tensor, "B G R T S"], slopes: Float[Tensor, "B G R T S"], lse: Float[Tensor, "B G R T"],
    inner: Float[Tensor, "B G R T"], queries: Places, keys: Places, scale: float, cap: float | None,
    window: int,
) -> tuple[Float[Tensor, "B G R T S"], Float[Tensor, "B G R T S"]]:  # fmt: skip
    """Raw products and d loss / d probabilities -> probabilities again, and d loss / d raw products."""
    capped = softcap_by_exp(scores.float() * scale, cap)
    mask = visible(queries, keys, window)[:, None, None]
    p = torch.where(mask, torch.exp(capped - lse[..., None]), 0.0)
    d = p * (slopes.float() - inner[..., None]) * scale
    if cap is not None:
        d = d * softcap_slope(capped, cap)
    return p.to(scores.dtype), d.to(scores.dtype)


@torch.library.custom_op("gemwright::blockwise_attention", mutates_args=())
def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, document: Tensor, scale: float, cap: float | None,
    window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """An opaque operation for torch.compile: the loop over blocks is not unrolled into its graph."""
    length, heads = q.shape[1], k.shape[2]
    keys, values = _group(k, heads), _group(v, heads)
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], heads, q.shape[2] // heads, length, dtype=torch.float32)
    for start in range(0, length, QUERY_BLOCK):
        rows, cols = slice(start, start + QUERY_BLOCK), slice(max(0, start - window + 1), start + QUERY_BLOCK)
        block = _group(q[:, rows], heads)
        scores = torch.bmm(block, keys[:, cols].transpose(1, 2))
        p, lse[..., rows] = fused(_weigh)(
            scores.view(*lse[..., rows].shape, -1), _cut(position, document, rows),
            _cut(position, document, cols), scale, cap, window,
        )  # fmt: skip
        out[:, rows] = _ungroup(torch.bmm(p.view_as(scores), values[:, cols]), q[:, rows], heads)
    return out, lse


@_blockwise.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, position: Tensor, document: Tensor, scale: float, cap: float | None,
      window: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], q.shape[1])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("gemwright::blockwise_attention_backward", mutates_args=())
def _blockwise_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, position: Tensor,
    document: Tensor, scale: float, cap: float | None, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    length, heads = q.shape[1], k.shape[2]
    keys, values = _group(k, heads), _group(v, heads)
    # Sums over blocks: in fp32, whatever the inputs.
    grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
    grad_q = q.new_empty(q.shape)
    for start in range(0, length, QUERY_BLOCK):
        rows, cols = slice(start, start + QUERY_BLOCK), slice(max(0, start - window + 1), start + QUERY_BLOCK)
        block, grad_block = _group(q[:, rows], heads), _group(grad[:, rows], heads)
        inner = (grad_block.float() * _group(out[:, rows], heads)).sum(-1)
        scores = torch.bmm(block, keys[:, cols].transpose(1, 2))
        slopes = torch.bmm(grad_block, values[:, cols].transpose(1, 2))
        shape = (*lse[..., rows].shape, -1)
        p, d = fused(_weigh_backward)(
            scores.view(shape), slopes.view(shape), lse[..., rows], inner.view(shape[:-1]),
            _cut(position, document, rows), _cut(position, document, cols),
            scale, cap, window,
        )  # fmt: skip
        p, d = p.view_as(scores), d.view_as(scores)
        grad_q[:, rows] = _ungroup(torch.bmm(d, keys[:, cols]), q[:, rows], heads)
        grad_k[:, cols] += torch.bmm(d.transpose(1, 2), block)
        grad_v[:, cols] += torch.bmm(p.transpose(1, 2), grad_block)
    grad_k, grad_v = (_ungroup(x, k, heads).to(k.dtype).contiguous() for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v


@_blockwise_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, position: Tensor,
      document: Tensor, scale: float, cap: float | None, window: int,
      ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:
    q, k, v, position, document, ctx.scale, ctx.cap, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, position, document)


def _differentiate(ctx, grad, _grad_lse):
    grads = _blockwise_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale, ctx.cap, ctx.window)
    return (*grads, None, None, None, None, None)


_blockwise.register_autograd(_differentiate, setup_context=_save)
