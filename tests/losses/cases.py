"""Small inputs of the vocabulary losses, their definitions in float64, and eyes on what is made meanwhile.

The definitions are spelled out once more, without the package: `divergence.py` is itself under test.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from gemwright.device import can_compile
from gemwright.losses import chunks, dense, sparse

N, D, E, V, K = 11, 6, 9, 23, 5


class Case(NamedTuple):
    """What all losses need; `hidden` and `weight` are leaves."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor
    token_weights: Tensor


def case(tokens: int = N, vocab: int = V, dtype: torch.dtype = torch.float32) -> Case:
    """Logits of some 5: a cap of 4 bends them. A third of the tokens weighs nothing."""
    weights = torch.rand(tokens) * (torch.arange(tokens) % 3 != 1)
    return Case(
        (2 * torch.randn(tokens, D)).to(dtype).requires_grad_(),
        torch.randn(vocab, D).to(dtype).requires_grad_(),
        (1.7 * torch.randn(tokens, E)).to(dtype),
        torch.randn(vocab, E).to(dtype),
        torch.randint(vocab, (tokens,)),
        weights,
    )


def few(mass: float = 1.0, tokens: int = N, vocab: int = V) -> tuple[Tensor, Tensor]:
    """Ids and probabilities of `mass` together: K a token, the last of them padding."""
    ids = torch.stack([torch.randperm(vocab)[:K] for _ in range(tokens)])
    probs = torch.rand(tokens, K)
    ids[:, -1], probs[:, -1] = 0, 0
    return ids, mass * probs / probs.sum(-1, keepdim=True)


def ce(c: Case, cap: float | None, **options: Any) -> Tensor:
    """`dense.cross_entropy` of a case."""
    return dense.cross_entropy(c.hidden, c.weight, c.targets, c.token_weights, cap=cap, **options)


def div(c: Case, cap: float | None, teacher_cap: float | None, **options: Any) -> Tensor:
    """`dense.divergence` of a case."""
    return dense.divergence(
        *c[:4], c.token_weights, cap=cap, teacher_cap=teacher_cap, targets=c.targets, **options
    )


def few_ce(c: Case, ids: Tensor, probs: Tensor, cap: float | None, **options: Any) -> Tensor:
    """`sparse.cross_entropy` of a case."""
    return sparse.cross_entropy(
        c.hidden, c.weight, ids, probs, c.token_weights, cap=cap, targets=c.targets, **options
    )


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Soft-capped, by the definition."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def both_logits(c: Case, cap: float | None, teacher_cap: float | None) -> tuple[Tensor, Tensor]:
    """Capped logits of student and teacher in float64."""
    student = capped(c.hidden.double() @ c.weight.double().T, cap)
    return student, capped(c.teacher_hidden.double() @ c.teacher_weight.double().T, teacher_cap)


def exact_mix(
    c: Case, main: Tensor, logits: Tensor, *, temperature: float, next_token: float, z_loss: float
) -> Tensor:
    """The sum over tokens of a loss `main` mixed with next-token prediction and z-loss."""
    lse = logits.logsumexp(-1)
    missed = lse - logits.gather(-1, c.targets[:, None])[:, 0]
    loss = (1 - next_token) * temperature**2 * main + next_token * missed + z_loss * lse**2
    return (loss * c.token_weights.double()).sum()


def exact_ce(c: Case, cap: float | None, *, z_loss: float = 0.0) -> Tensor:
    """The definition, in float64."""
    logits, _ = both_logits(c, cap, None)
    return exact_mix(c, torch.zeros(()), logits, temperature=1, next_token=1, z_loss=z_loss)


def exact_div(
    c: Case,
    cap: float | None,
    teacher_cap: float | None,
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    next_token: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The definition, in float64."""
    logits, teacher_logits = both_logits(c, cap, teacher_cap)
    s, t = (logits / temperature).log_softmax(-1), (teacher_logits / temperature).log_softmax(-1)
    if beta == 0:
        main = (t.exp() * (t - s)).sum(-1)
    elif beta == 1:
        main = (s.exp() * (s - t)).sum(-1)
    else:
        m = (beta * t.exp() + (1 - beta) * s.exp()).log()
        main = (beta * t.exp() * (t - m) + (1 - beta) * s.exp() * (s - m)).sum(-1)
    return exact_mix(c, main, logits, temperature=temperature, next_token=next_token, z_loss=z_loss)


def exact_few(
    c: Case,
    ids: Tensor,
    probs: Tensor,
    cap: float | None,
    *,
    temperature: float = 1.0,
    tail: bool = False,
    next_token: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The definition, in float64; the tail's mass is summed over the ids in it."""
    logits, _ = both_logits(c, cap, None)
    log_p = (logits / temperature).log_softmax(-1)
    main = -(probs.double() * log_p.gather(-1, ids)).sum(-1)
    if tail:
        kept = torch.zeros_like(log_p).scatter_add(-1, ids, (probs > 0).double()) > 0
        rest = log_p.masked_fill(kept, -torch.inf).logsumexp(-1)
        main = main - (1 - probs.double().sum(-1)) * rest
    return exact_mix(c, main, logits, temperature=temperature, next_token=next_token, z_loss=z_loss)


def with_gradients(loss: Tensor, c: Case) -> list[Tensor]:
    """The loss, and its gradients by the hidden states and the head."""
    return [loss.detach(), *torch.autograd.grad(loss, (c.hidden, c.weight))]


def assert_equal_to_exact(ours: list[Tensor], exact: list[Tensor], tolerance: float = 2e-5) -> None:
    """Each of ours is the exact one, to the rounding of fp32."""
    for mine, theirs in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def bytes_for(rows: int, sides: int, vocab: int = V) -> int:
    """`chunk_bytes` that give chunks of so many tokens: `sides` is 2 where there is a teacher."""
    return rows * 4 * vocab * (sides + (0 if can_compile() else chunks._EAGER_COPIES))


class Seen(TorchDispatchMode):
    """Notes matrix products with the vocabulary as a side, and tensors of logits.

    Attributes:
        products: how many products.
        most_rows: the most tokens in one tensor of logits.
        most_bytes: the most that all tensors of logits alive at a time held together.
        casts: sizes of what was cast to fp32.
    """

    def __init__(self, vocab: int = V) -> None:
        super().__init__()
        self.vocab, self.products, self.most_rows, self.most_bytes = vocab, 0, 0, 0
        self.casts: list[tuple[int, ...]] = []
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, Tensor)]
        name = func._overloadpacket.__name__
        if name in {"mm", "addmm", "addmm_", "bmm", "linear"}:
            self.products += any(self.vocab in x.shape for x in tensors)
        if name == "_to_copy" and out.dtype == torch.float32:
            self.casts.append(tuple(out.shape))
        if isinstance(out, Tensor) and out.shape[-1:] == (self.vocab,):
            storage = out.untyped_storage()
            if any(storage._cdata == x.untyped_storage()._cdata for x in tensors[:-1]):
                return out  # a view: of logits noted before, or of a weight turned round
            self.most_rows = max(self.most_rows, out.numel() // self.vocab)
            self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
            self.most_bytes = max(self.most_bytes, sum(size for _, size in self._alive.values()))
        return out
