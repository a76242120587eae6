"""What running a model will cost, before anything is loaded: memory, FLOPs, and does this machine hold it.

Weights and keys and values are counted, to the byte; what torch needs while it computes is an estimate, and
is called one. int8 means a bf16 checkpoint quantised at load: its activations, and so its keys and values,
stay in bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gemwright.data.executor import cores
from gemwright.device import available_memory, pick_device
from gemwright.generate.engine import PREFILL_CHUNK
from gemwright.generate.quantize import planned_bytes
from gemwright.model import checkpoint, cost
from gemwright.model.attention import QUERY_BLOCK
from gemwright.model.config import SIZES, GemmaConfig, size

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
"""From the largest to the smallest."""
_BUFFERS = (
    100 << 20
)  # what torch's libraries take beside tensors (measured: 95 to 190 MB with the rest below)


@dataclass(frozen=True)
class Plan:
    """The cost of generating from `batch` sequences of `context` tokens each, prompt and answer together."""

    size: str
    precision: Precision
    batch: int
    context: int
    parameters: int
    embedding_parameters: int
    weights_bytes: int
    kv_bytes: int
    """Of all sequences; local layers hold a window."""
    kv_bytes_full: int
    """If local layers held everything, as without a rolling cache."""
    workspace_bytes: int
    """An estimate: activations of one chunk of a prompt, scores, logits, the libraries' own."""
    total_bytes: int
    """What must be free at once: these three. On a GPU int8 is made beside the weights in bf16."""
    flops_prefill: float
    """To read one sequence of `context` tokens; the head is needed for the last one only."""
    flops_per_token: float
    """For the last token of such a sequence."""
    device: str
    device_name: str
    available_bytes: int | None
    """Memory that is free now; None where the system does not tell."""
    fits: bool | None
    remedies: tuple[str, ...]
    """What would make it fit, if it does not."""
    notes: tuple[str, ...]

    def told(self) -> str:
        """A table for people."""
        sequences = "one sequence" if self.batch == 1 else f"{self.batch} sequences"
        lines = [
            f"{self.size} in {self.precision}, {sequences} of {self.context:,} tokens",
            *(f"  {name:<11}{amount / 1e9:>9.2f} GB  {words}" for name, amount, words in self._rows()),
            f"  {'FLOPs':<11}{self.flops_prefill:>9.2g}     to read a sequence; its last token alone "
            f"{self.flops_per_token:.2g}",
        ]
        return "\n".join([*lines, *self.notes, *self.remedies])

    def _rows(self) -> Iterator[tuple[str, int, str]]:
        table = self.embedding_parameters
        yield "weights", self.weights_bytes, f"{self.parameters:,} parameters, {table:,} of them the table"
        yield (
            "KV cache",
            self.kv_bytes,
            f"rolling; {self.kv_bytes_full / 1e9:.2f} GB if local layers held all",
        )
        yield "workspace", self.workspace_bytes, "about"
        where = f"{self.device}, {self.device_name}"
        if self.fits is None or self.available_bytes is None:
            yield "total", self.total_bytes, f"whether that is free, this system does not tell ({where})"
        else:
            verdict = "fits" if self.fits else "does not fit"
            yield (
                "total",
                self.total_bytes,
                f"{verdict}: {self.available_bytes / 1e9:.2f} GB are free ({where})",
            )


def config_of(name: str) -> GemmaConfig:
    """The config of a size by name, or of a checkpoint's folder.

    Raises:
        ValueError: it is neither.
        FileNotFoundError: the folder holds no config.
    """
    if name not in SIZES and Path(name).is_dir():
        return checkpoint.load_config(Path(name))
    try:
        return size(name)
    except ValueError as error:
        raise ValueError(f"{error} Or name the folder of a checkpoint.") from None


def plan(
    name: str,
    config: GemmaConfig,
    precision: Precision = "bf16",
    *,
    batch: int = 1,
    context: int | None = None,
    device: torch.device | None = None,
) -> Plan:
    """Count what a model costs on a device, this machine's best one by default.

    Args:
        name: what the plan calls the model.
        context: tokens of a sequence; `max_seq_len` by default.
    Raises:
        ValueError: batch or context below 1.
    """
    context = config.max_seq_len if context is None else context
    if batch < 1 or context < 1:
        raise ValueError(f"batch={batch} and context={context} must be at least 1.")
    device = device or pick_device()
    free = available_memory(device)
    total = _total(config, precision, batch, context, device.type)
    fits = None if free is None else total <= free
    value = _value_bytes(precision)
    notes = []
    if context > config.max_seq_len:
        notes.append(
            f"{context:,} tokens are more than the model's max_seq_len={config.max_seq_len:,}: generation "
            "refuses them."
        )
    return Plan(
        size=name,
        precision=precision,
        batch=batch,
        context=context,
        parameters=cost.parameters(config),
        embedding_parameters=cost.embedding_parameters(config),
        weights_bytes=_weights(config, precision, device.type),
        kv_bytes=batch * cost.kv_cache_bytes(config, context, value),
        kv_bytes_full=batch * cost.full_kv_cache_bytes(config, context, value),
        workspace_bytes=_workspace(config, precision, batch, context),
        total_bytes=total,
        flops_prefill=_prefill_flops(config, context),
        flops_per_token=cost.decode_flops(config, context),
        device=device.type,
        device_name=_name(device),
        available_bytes=free,
        fits=fits,
        remedies=()
        if fits or free is None
        else tuple(_remedies(config, precision, batch, context, device, free)),
        notes=tuple(notes),
    )


def _value_bytes(precision: Precision) -> int:
    return 4 if precision == "fp32" else 2


def _weights(config: GemmaConfig, precision: Precision, device: str) -> int:
    if precision == "int8":
        return planned_bytes(config, packed=device == "cpu", norm_bytes=2)
    return _value_bytes(precision) * cost.parameters(config)


def _workspace(config: GemmaConfig, precision: Precision, batch: int, context: int) -> int:
    rows = min(context, PREFILL_CHUNK)
    feed_forward = rows * (3 * config.d_ff + 4 * config.d_model) * _value_bytes(precision)
    attention = (
        10 * config.num_heads * min(rows, QUERY_BLOCK) * context
    )  # scores and softmax in fp32, and a cast
    return _BUFFERS + max(feed_forward, attention) + 12 * batch * config.vocab_size


def _total(config: GemmaConfig, precision: Precision, batch: int, context: int, device: str) -> int:
    weights = _weights(config, precision, device)
    running = batch * cost.kv_cache_bytes(config, context, _value_bytes(precision))
    running += _workspace(config, precision, batch, context)
    if precision == "int8" and device != "cpu":
        # On a CPU the checkpoint is a mapped file, whose pages are given up for whoever needs memory.
        running = max(running, _weights(config, "bf16", device))
    return weights + running


def _prefill_flops(config: GemmaConfig, context: int) -> float:
    head = 2.0 * cost.embedding_parameters(config)
    return context * (cost.forward_flops(config, context) - head) + head


def _remedies(
    config: GemmaConfig, precision: Precision, batch: int, context: int, device: torch.device, free: int
) -> Iterator[str]:
    """The changes that suffice alone; if none does, all of them at once; if not even that, another size."""

    def fits(kind: Precision, rows: int, tokens: int, model: GemmaConfig = config) -> bool:
        return _total(model, kind, rows, tokens, device.type) <= free

    def most(kind: Precision, rows: int, high: int) -> int:
        """The longest context that fits, in steps of 256."""
        return 256 * max((n for n in range(1, high // 256 + 1) if fits(kind, rows, 256 * n)), default=0)

    found = [f"--precision {kind}" for kind in PRECISIONS if fits(kind, batch, context)]
    rows = max((n for n in range(1, batch) if fits(precision, n, context)), default=0)
    found += [f"--batch {rows}"] if rows else []
    tokens = most(precision, batch, context)
    found += [f"--context {tokens}"] if tokens else []
    if not found and (tokens := most("int8", 1, context)):
        found = [f"--precision int8 --batch 1 --context {tokens}"]
    if found:
        yield "It would fit with " + ", or ".join(found) + "."
        return
    smaller = [n for n in SIZES if fits("int8", 1, min(context, SIZES[n].max_seq_len), SIZES[n])]
    largest = f"the largest size that does, in int8: {smaller[-1]}" if smaller else "no size does"
    yield f"No precision, batch or context makes it fit here; {largest}."


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cores()} cores"
