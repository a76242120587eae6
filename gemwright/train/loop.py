"""The one training loop: a method is a loss, `loss(model, batch) -> (sum over tokens, metrics)`.

The loss of a step is normalised by the number of target tokens of the WHOLE step, over all its micro-batches:
the average of averages, which is easy to write, weighs tokens by the length of their neighbours.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt64
from pydantic import Field, model_validator
from torch import Tensor

from gemwright.config import Config
from gemwright.data.windows import Rows, target_weights
from gemwright.device import Precision, dtype_of, keep_freed_memory
from gemwright.model.attention import Places
from gemwright.model.gemma import Gemma, packed
from gemwright.run import RunFolder
from gemwright.tokenizer.tokenizer import SPECIAL
from gemwright.train import resume
from gemwright.train.optim import OptimConfig, adamw, learning_rate


class TrainConfig(Config):
    """How long, in what portions, and how carefully."""

    steps: int = Field(gt=0)
    """Updates."""
    batch_size: int = Field(gt=0)
    """Rows an update."""
    seq_len: int = Field(gt=1)
    """Tokens a row."""
    micro_batch_size: int | None = Field(default=None, gt=0)
    """Rows at a time: gradients are accumulated over a batch. None: all at once."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    precision: Precision = "fp32"
    """Arithmetic of the layers; weights, losses and moments are fp32 either way."""
    compile: bool = True
    """Compile the layers, a teacher's too, where that is possible."""
    validate_every: int = Field(default=100, gt=0)
    """Updates between validations; there is always one at the end."""
    save_every: int = Field(default=100, gt=0)
    """Updates between saved states."""
    seed: int = 0
    """Of the weights and of the order of the data."""

    @model_validator(mode="after")
    def _portions_fit(self) -> "TrainConfig":
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}."
            )
        return self


class Batch(NamedTuple):
    """A packed batch: what is read, what is to be predicted, and which predictions count."""

    ids: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]
    weights: Float[Tensor, "B T"]
    places: Places
    numbers: UInt64[np.ndarray, " B"] | None = None
    """Which windows of the split these are, for whoever keeps something about them."""
    count: float | None = None
    """What the loss is divided by, all portions of a step together; None: the sum of the weights."""
    known: Mapping[str, float] = MappingProxyType({})
    """Sums that are known of it already, for the log: divided like the loss."""


Loss = Callable[[Gemma, Batch], tuple[Float[Tensor, ""], dict[str, float]]]

Batches = Callable[[int], list[Batch]]
"""From the number of an update, 0 for the first, to its batch, in the portions that gradients are accumulated
over. A function of that number and of the weights before it, so that a killed run resumes exactly."""


class NonFiniteError(RuntimeError):
    """The loss or its gradient is not a number; the weights were not touched by it."""


def make_batch(
    rows: Int[Tensor, "B T1"],
    bos_id: int,
    device: torch.device | str = "cpu",
    numbers: UInt64[np.ndarray, " B"] | None = None,
    weights: Float[Tensor, "B T"] | None = None,
    starts: Bool[Tensor, "B T1"] | None = None,
) -> Batch:
    """Rows of T + 1 tokens -> inputs, targets, their weights and the places of the packed documents.

    Without `weights` every target counts 1, but `<pad>` and the `<bos>` of another document. Without `starts`
    a document starts at each `<bos>`.
    """
    rows = rows.to(device)
    ids = rows[:, :-1].contiguous()
    weights = target_weights(rows) if weights is None else weights.to(device)
    begun = ids == bos_id if starts is None else starts[:, :-1].to(device)
    return Batch(ids, rows[:, 1:].contiguous(), weights, packed(begun), numbers)


def batches_of(
    rows: Rows,
    config: TrainConfig,
    device: torch.device | str = "cpu",
    weights: Callable[[UInt64[np.ndarray, " B"]], Float[Tensor, "B T"]] | None = None,
) -> Batches:
    """The batches of what lies packed on disk. `weights` of the targets by row; None: as `make_batch`."""

    def batches(step: int) -> list[Batch]:
        numbers = rows.numbers(step, config.batch_size)
        few = config.micro_batch_size or config.batch_size
        return [
            make_batch(
                rows.take(part), SPECIAL["<bos>"], device, part, None if weights is None else weights(part)
            )
            for part in np.split(numbers, range(few, len(numbers), few))
        ]

    return batches


def train(
    model: Gemma,
    loss: Loss,
    batches: Batches,
    config: TrainConfig,
    folder: RunFolder,
    validate: Callable[[Gemma], dict[str, float]],
    also: Mapping[str, Gemma] = MappingProxyType({}),
) -> dict[str, float]:
    """Train `model` in place, from the newest saved state if there is one. Returns the last validation.

    Args:
        also: models that change beside it, by whoever makes the batches: saved and loaded with the state.
    Raises:
        NonFiniteError: names the step, the folder of the last good state, and what to change.
    """
    keep_freed_memory()
    optimizer = adamw(model, config.optim)
    done = resume.load_state(folder.path, model, optimizer, also)
    folder.rewind(done)
    if config.compile:
        model.compile_layers()
    last: dict[str, float] | None = None
    start, tokens = time.monotonic(), 0
    with folder.progress("training", config.steps, done, unit="updates") as advance:
        for step in range(done, config.steps):
            parts = batches(step)
            lr = learning_rate(step, config.steps, config.optim)
            value, metrics, norm = _update(model, loss, parts, optimizer, lr, config)
            if not (math.isfinite(value) and math.isfinite(norm)):
                state = resume.save_state(folder.path, step, model, optimizer, also)
                raise NonFiniteError(
                    f"the loss of update {step + 1} is {value} (gradient norm {norm}). The weights before it "
                    f"are kept in {state}. Lower optim.lr (now {config.optim.lr}) or optim.clip, then start "
                    "anew with --fresh."
                )
            row = {"step": step + 1, "loss": value, **metrics, "lr": lr, "grad_norm": norm}
            if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
                last = validate(model)
                row |= last
            folder.log(**row)
            if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
                resume.save_state(folder.path, step + 1, model, optimizer, also)
            tokens += sum(part.ids.numel() for part in parts)
            speed = f"{tokens / (time.monotonic() - start):,.0f}"
            advance(1, **{"loss": f"{value:.3f}", "tokens/s": speed})
    return validate(model) if last is None else last


def _update(
    model: Gemma,
    loss: Loss,
    parts: list[Batch],
    optimizer: torch.optim.Optimizer,
    lr: float,
    config: TrainConfig,
) -> tuple[float, dict[str, float], float]:
    """One update over all micro-batches; skipped if its loss or gradient is not finite."""
    counts = (part.weights.sum() if part.count is None else part.count for part in parts)
    scale = max(sum(map(float, counts)), 1.0)
    total = 0.0
    sums: dict[str, float] = defaultdict(float)
    for part in parts:
        with _autocast(model, config):
            value, metrics = loss(model, part)
        (value / scale).backward()
        total += float(value.detach())
        for name, metric in (*metrics.items(), *part.known.items()):
            sums[name] += metric
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip))
    if math.isfinite(total) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / scale, {name: metric / scale for name, metric in sums.items()}, norm


def _autocast(model: Gemma, config: TrainConfig):
    if config.precision == "fp32":
        return nullcontext()
    return torch.autocast(model.device.type, dtype_of(config.precision))
