"""How fast is a training step on this machine, next to transformers' Gemma 2 on the same weights and tokens?

Forward, next-token loss over every position, backward, clipping and a fused AdamW update, in fp32. The
implementations take turns, round after round, so that a noisy machine is noisy for all of them; the median
round counts. The first loss must be equal, or the comparison would not be one.

    python -m bench.train_step --json
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from gemwright.data.shards import target_weights
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


def measure(seq_len: int, rounds: int) -> list[dict[str, object]]:
    """Rows of tokens a second for one sequence length."""
    keep_freed_memory()  # for all of them alike
    config = size("6m").but(vocab_size=8192)
    torch.manual_seed(1)
    windows = torch.randint(
        473, config.vocab_size, (TOKENS // seq_len, seq_len + 1)
    )  # one document a row, no <bos>
    assert bool(target_weights(windows).all())
    makers = {
        "gemwright": ours,
        "transformers eager": functools.partial(transformers_model, compiled=False),
        "transformers compiled": functools.partial(transformers_model, compiled=True),
    }
    steps: dict[str, Callable[[], float]] = {}
    first: dict[str, float] = {}
    for name, make in makers.items():
        model, loss = make(config, windows)
        optimizer = adamw(model, OptimConfig(lr=1e-4))
        steps[name] = functools.partial(_step, model, loss, optimizer)
        first[name] = steps[name]()  # compiles
        steps[name]()
        print(f"{name} at {seq_len}: first loss {first[name]:.5f}", file=sys.stderr)
    assert max(first.values()) - min(first.values()) < 1e-3, first
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return [
        {
            "impl": name,
            "seq_len": seq_len,
            "tokens_per_s": round(TOKENS / statistics.median(times)),
            "spread": [round(TOKENS / max(times)), round(TOKENS / min(times))],
            "first_loss": round(first[name], 5),
        }
        for name, times in seconds.items()
    ]


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
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
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
