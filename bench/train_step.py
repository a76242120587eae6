"""How fast is a training step on this machine, next to transformers' Gemma 2 on the same weights and tokens?

Forward, next-token loss over every position, backward, clipping and a fused AdamW update, in fp32. Each
implementation has a process of its own, and they take turns, round after round, so that a noisy machine is
noisy for all of them; the median round counts. The first loss must be equal, or it would be no comparison.

    python -m bench.train_step --json
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from gemwright.data.windows import target_weights
from gemwright.device import keep_freed_memory
from gemwright.losses import dense
from gemwright.model.config import GemmaConfig, size
from gemwright.model.gemma import Gemma
from gemwright.train.loop import Batch, make_batch
from gemwright.train.optim import OptimConfig, adamw

TOKENS = 4096
"""Tokens an update: 8 rows of 512, or 2 of 2,048."""


def ours(config: GemmaConfig, windows: torch.Tensor) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """gemwright: layers compiled, attention block by block, the loss without the logits."""
    torch.manual_seed(0)
    model = Gemma(config).compile_layers()
    batch: Batch = make_batch(windows, bos_id=2)

    def loss() -> torch.Tensor:
        total = dense.cross_entropy(
            model.hidden(batch.ids, batch.places).flatten(0, 1), model.unembedding, batch.targets.flatten(),
            batch.weights.flatten(), cap=config.final_softcap,
        )  # fmt: skip
        return total / batch.weights.sum()

    return model, loss


def transformers_model(
    config: GemmaConfig, windows: torch.Tensor, *, compiled: bool
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """transformers' own Gemma 2 with the same weights, and its own loss."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    weights = Gemma(config).state_dict()
    data = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type")}
    theirs = Gemma2Config(**data, attn_implementation="eager")  # pyright: ignore[reportCallIssue]
    model = Gemma2ForCausalLM(theirs)
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    run = torch.compile(model) if compiled else model
    ids, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def loss() -> torch.Tensor:
        return run(input_ids=ids, shift_labels=labels, labels=labels, use_cache=False).loss

    return model, loss


IMPLEMENTATIONS = ("gemwright", "transformers eager", "transformers compiled")


def measure(seq_len: int, rounds: int) -> list[dict[str, object]]:
    """Rows of tokens a second for one sequence length."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in IMPLEMENTATIONS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=_worker, args=(name, seq_len, theirs), daemon=True).start()
    first = {name: _ask(pipe) for name, pipe in pipes.items()}  # one after the other: this one compiles
    for name, (loss, _) in first.items():
        print(f"{name} at {seq_len}: first loss {loss:.5f}", file=sys.stderr)
    losses = [loss for loss, _ in first.values()]
    assert max(losses) - min(losses) < 1e-3, first
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for turn in range(rounds + 1):
        for name, pipe in pipes.items():
            _, elapsed = _ask(pipe)
            if turn:  # the first one warms up
                seconds[name].append(elapsed)
    for pipe in pipes.values():
        pipe.send(False)
    return [
        {
            "impl": name,
            "seq_len": seq_len,
            "tokens_per_s": round(TOKENS / statistics.median(times)),
            "spread": [round(TOKENS / max(times)), round(TOKENS / min(times))],
            "first_loss": round(first[name][0], 5),
        }
        for name, times in seconds.items()
    ]


def _ask(pipe: Connection) -> tuple[float, float]:
    """Let one worker make one step; its loss and its seconds."""
    pipe.send(True)
    return pipe.recv()


def _worker(name: str, seq_len: int, pipe: Connection) -> None:
    """One implementation in a process of its own, with its own allocator; it works only when asked."""
    config = size("6m").but(vocab_size=8192)
    torch.manual_seed(1)
    # One document a row: no <bos> inside.
    windows = torch.randint(473, config.vocab_size, (TOKENS // seq_len, seq_len + 1))
    assert bool(target_weights(windows).all())
    if name == "gemwright":
        keep_freed_memory()  # as the training loop does
        model, loss = ours(config, windows)
    else:
        model, loss = transformers_model(config, windows, compiled=name.endswith("compiled"))
    optimizer = adamw(model, OptimConfig(lr=1e-4))
    while pipe.recv():
        start = time.perf_counter()
        value = _step(model, loss, optimizer)
        pipe.send((value, time.perf_counter() - start))


def _step(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer
) -> float:
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(value.detach())


def main() -> None:
    """Measure at 512 and 2,048 and print a table, or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument(
        "--seq-len", type=int, nargs="+", default=[512, 2048], help="lengths (default 512 2048)"
    )
    options = parser.parse_args()
    rows = [row for seq_len in options.seq_len for row in measure(seq_len, options.rounds)]
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    for row in rows:
        print(f"{row['impl']:24} T={row['seq_len']:5} {row['tokens_per_s']:6} tokens/s {row['spread']}")


if __name__ == "__main__":
    main()
