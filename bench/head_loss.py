"""How fast is exact distillation over a large vocabulary, forward and backward, and what memory does it take?

Forward KL from both sides' hidden states to the gradients of the student's hidden states and head, soft-caps
in: ours, TRL's chunked divergence, plain torch, and Liger's fused JSD at beta 0, which has no caps. The
floor is the four matrix products that nobody can leave out, and nothing else.

Each has a process of its own, and they take turns. Peak memory is what a pass needs above its inputs and the
gradients it returns.

    python -m bench.head_loss --json
    python -m bench.head_loss --device cuda --dtype bf16 --tokens 8192 --student 2304 --teacher 4608
"""

import argparse
import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from bench.turns import Ask, in_turns
from gemwright.device import DTYPES

CAP = 30.0
IMPLEMENTATIONS = ("gemwright", "trl", "liger", "naive", "floor")


class Case(NamedTuple):
    """Hidden states and heads of both sides; the student's are leaves."""

    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_weight: torch.Tensor


Outcome = tuple[torch.Tensor, tuple[torch.Tensor, ...]]


def gemwright(case: Case) -> Outcome:
    """Loss and gradient a chunk at a time, four products."""
    from gemwright.losses import dense

    weights = torch.ones(len(case.hidden), device=case.hidden.device)
    loss = dense.divergence(*case, weights, cap=CAP, teacher_cap=CAP)
    return loss, torch.autograd.grad(loss, case[:2])


def trl(case: Case) -> Outcome:
    """TRL's tiles, which recompute the logits in the backward pass: six products."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    h, w, th, tw = case
    per_token, _ = ChunkedDivergenceFunction.apply(h, w, None, th, tw, None, 0.0, 1.0, 1.0, CAP, 1.0, CAP)
    loss = per_token.sum()
    return loss, torch.autograd.grad(loss, case[:2])


def liger(case: Case) -> Outcome:
    """Liger's fused linear JSD at its own chunk size, compiled by itself; without the caps."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    h, w, th, tw = case
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0)
    targets = torch.zeros(len(h), dtype=torch.int64, device=h.device)
    loss = module(h, w, th, tw, targets) * len(h)  # it averages over tokens
    return loss, torch.autograd.grad(loss, case[:2])


def naive(case: Case) -> Outcome:
    """Whole logits of both sides, and autograd."""
    import torch.nn.functional as F

    h, w, th, tw = case
    with torch.no_grad():
        teacher = F.log_softmax(CAP * torch.tanh((th @ tw.T).float() / CAP), -1)
    student = F.log_softmax(CAP * torch.tanh((h @ w.T).float() / CAP), -1)
    loss = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return loss, torch.autograd.grad(loss, case[:2])


def floor(case: Case) -> Outcome:
    """The matrix products alone; the loss is no loss."""
    h, w, th, tw = (x.detach() for x in case)
    logits, teacher = h @ w.T, th @ tw.T
    return teacher[0, 0], (logits @ w, logits.T @ h)


def make(name: str, tokens: int, vocab: int, student: int, teacher: int, device: str, dtype: str) -> Ask:
    """One implementation with its inputs: "time" gives seconds, "memory" peak MiB, "value" loss and norm."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int, columns: int, scale: float) -> torch.Tensor:
        values = scale * torch.randn(rows, columns, generator=generator)
        return values.to(device, DTYPES[dtype])

    # Logits with a standard deviation of 2.
    case = Case(
        draw(tokens, student, 1.0).requires_grad_(), draw(vocab, student, 2 * student**-0.5).requires_grad_(),
        draw(tokens, teacher, 1.0), draw(vocab, teacher, 2 * teacher**-0.5),
    )  # fmt: skip
    run: Callable[[Case], Outcome] = globals()[name]

    def ask(question: str) -> dict[str, float]:
        if question == "memory":
            return {"peak_mib": round(_peak_mib(lambda: run(case), device), 1)}
        start = time.perf_counter()
        loss, grads = run(case)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if question == "time":
            return {"seconds": seconds}
        norm = torch.stack([g.float().norm() for g in grads]).norm()
        return {"loss": float(loss), "grad_norm": float(norm)}

    return ask


def _peak_mib(run: Callable[[], Outcome], device: str) -> float:
    """Peak memory of a call above what there was before and what it returns."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the kernel begins its high-water mark anew
        before = _status("VmRSS")
    _, grads = run()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    return (peak - before - sum(g.numel() * g.element_size() for g in grads)) / 2**20


def _status(field: str) -> int:
    """A size of this process in bytes, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--tokens", type=int, default=512, help="tokens (default 512)")
    parser.add_argument("--vocab", type=int, default=256_000, help="pieces (default 256000)")
    parser.add_argument("--student", type=int, default=256, help="the student's width (default 256)")
    parser.add_argument("--teacher", type=int, default=512, help="the teacher's width (default 512)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="fp32", help="fp32 or bf16 (default fp32)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    options = parser.parse_args()
    sizes = (options.tokens, options.vocab, options.student, options.teacher, options.device, options.dtype)
    # The first question compiles; the second warms up.
    questions = ["value", "time", *["time"] * options.rounds, "memory"]
    rows = []
    for name, (value, _, *timed, memory) in in_turns(IMPLEMENTATIONS, make, sizes, questions).items():
        seconds = [answer["seconds"] for answer in timed]
        row = {"impl": name, "seconds": round(statistics.median(seconds), 4)}
        rows.append(row | {"spread": [round(min(seconds), 4), round(max(seconds), 4)], **memory, **value})
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(
            f"{row['impl']:10} {row['seconds']:8.3f} s {row['spread']}  {row['peak_mib']:8.0f} MiB  "
            f"loss {row['loss']:.4f}  gradient {row['grad_norm']:.4f}"
        )


if __name__ == "__main__":
    main()
