"""Several checkpoints become one: `merge`.

The report (section 4) averages "different models obtained by running our pipeline with different
hyperparameters" and cites WARP (arXiv 2406.16768); weights and method it does not tell. Here are the ways
that WARP compares: averages, moving averages, task arithmetic, SLERP, and the line back to the start, which
trades reward for nearness.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from gemwright.config import Config, differences
from gemwright.device import Precision, dtype_of
from gemwright.merge import coefficients, streams
from gemwright.model import checkpoint
from gemwright.model.checkpoint import MAX_SHARD_BYTES, Stored
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import Tokenizer, require_same_tokenizer

STAGE = "merge"
Method = Literal["linear", "ema", "task", "slerp"]


class MergeConfig(Config):
    """How some models become one."""

    method: Method
    """linear: the weighted average. ema: a moving average in the order given. task: the weighted sum of task
    vectors, on the base. slerp: along the arc between task vectors, layer by layer."""
    weights: tuple[float, ...] | None = None
    """One a model. Of averages and slerp they are shares, equal by default; of task factors, 1 by default."""
    mu: float = Field(default=0.01, ge=0, le=1)
    """What the newest model of a moving average counts; WARP's is 0.01."""
    eta: float = Field(default=1.0, ge=0, le=1)
    """How far to go from the base to the merged model: 1 all the way. WARP's is 0.3."""
    dtype: Precision | None = None
    """The number format that is written; None: the one that all models have, or fp32 where they differ."""
    max_shard_bytes: PositiveInt = MAX_SHARD_BYTES
    """Most bytes of a file."""

    @model_validator(mode="after")
    def _weights_share(self) -> "MergeConfig":
        if self.weights is not None:
            if self.method == "ema":
                raise ValueError("a moving average has no weights but mu. Leave them out, or use linear.")
            if self.method != "task" and (min(self.weights, default=0) < 0 or sum(self.weights) <= 0):
                raise ValueError(f"weights={self.weights} are no shares. Give numbers from 0, not all 0.")
        return self


def run(
    config: MergeConfig, out: Path, models: Sequence[Path], *, base: Path | None = None, fresh: bool = False
) -> Card:
    """Merge checkpoints into one in `out`; arguments and errors as `prepared`."""
    work = prepared(config, models, base)
    named = {f"model{place}": folder for place, folder in enumerate(models, 1)}
    inputs = named if base is None else {"base": base, **named}
    return run_stage(STAGE, config, out, work, inputs=inputs, fresh=fresh, next_step=f"gemwright chat {out}")


def prepared(
    config: MergeConfig, models: Sequence[Path], base: Path | None = None
) -> Callable[[RunFolder], dict[str, Any]]:
    """Check that models can be merged; then what does it, in the folder of a stage, and returns its results.

    Args:
        base: where the models' training began; for task vectors, and for an `eta` below 1.
    Raises:
        ValueError: one model and no way to go, a base where none is used or none where one is, another
            number of weights than models; other tokenizers, shapes or configs; a missing tensor.
    """
    _require_use(config, models, base)
    parents = [*([base] if base else []), *models]
    first, stored = parents[0], [checkpoint.stored(folder) for folder in parents]
    tokenizer = Tokenizer.load(first)
    for folder in parents[1:]:
        _require_same(first, folder)
        require_same_tokenizer(
            folder, tokenizer, str(first), "Only models of one tokenizer can be merged.", "model"
        )

    def work(folder: RunFolder) -> dict[str, Any]:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads - 1))  # one core writes and hashes
        try:
            return _work(config, folder, parents, stored, tokenizer, has_base=base is not None)
        finally:
            torch.set_num_threads(threads)

    return work


def _require_use(config: MergeConfig, models: Sequence[Path], base: Path | None) -> None:
    """Raise ValueError for models, weights and a base that do not go together."""
    spherical = config.method in ("task", "slerp")
    if base is None and (spherical or config.eta < 1):
        why = f"eta={config.eta:g} goes there" if config.eta < 1 else f"{config.method} is about task vectors"
        raise ValueError(f"no base is given, and {why}. Name the model that training began from.")
    if base is not None and not spherical and config.eta == 1:
        raise ValueError(
            f"{config.method} with eta=1 does not use the base {base}. Leave it out, or set eta below 1."
        )
    if not models or (len(models) == 1 and base is None):
        raise ValueError(f"{len(models) or 'no'} model is nothing to merge. Name two or more.")
    if config.weights is not None and len(config.weights) != len(models):
        raise ValueError(f"{len(config.weights)} weights for {len(models)} models. Give one a model.")


def _require_same(one: Path, other: Path) -> None:
    """Raise ValueError for two checkpoints of different make."""
    is_one, is_other = checkpoint.load_kind(one), checkpoint.load_kind(other)
    if is_one is not is_other:
        raise ValueError(
            f"{one} is a {is_one.__name__} and {other} a {is_other.__name__}. Merge like with like."
        )
    apart = differences(checkpoint.load_config(one).to_dict(), checkpoint.load_config(other).to_dict())
    if apart:
        raise ValueError(
            f"{one} and {other} are models of different make: {'; '.join(apart)}. Only models that began as "
            "one can be merged."
        )


def _work(
    config: MergeConfig, folder: RunFolder, parents: Sequence[Path], stored: Sequence[dict[str, Stored]],
    tokenizer: Tokenizer, *, has_base: bool,
) -> dict[str, Any]:  # fmt: skip
    models = stored[1:] if has_base else stored
    total = sum(tensor.tensor.numel() for tensor in stored[0].values())
    results: dict[str, Any] = {"parameters": total}
    by_group: dict[str, list[float]] = {}
    if config.method == "slerp":
        with folder.progress("measuring angles", total) as advance:
            grams = streams.products(stored[0], models, advance)
        by_group = {key: coefficients.spherical(gram, config.weights) for key, gram in grams.items()}
        results["angles"] = {
            key: None if (angle := coefficients.mean_angle(gram)) is None else round(angle, 2)
            for key, gram in grams.items()
        }
    same = _coefficients(config, len(models))
    dtype = _widest(stored) if config.dtype is None else dtype_of(config.dtype)

    def of(name: str) -> list[float]:
        """What each parent counts in a tensor; 1 in all."""
        made = [config.eta * c for c in by_group.get(streams.group(name), same)]
        left = 1 - math.fsum(made)
        return [left if abs(left) > 1e-12 else 0.0, *made] if has_base else made

    with folder.progress("merging", total) as advance:

        def put(names: Sequence[str], path: Path) -> str:
            def pieces(name: str) -> Any:
                for piece in streams.combined(name, stored, of(name), dtype):
                    advance(piece.numel())
                    yield piece

            return streams.write_part(path, {name: stored[0][name].tensor for name in names}, dtype, pieces)

        kind, shape = checkpoint.load_kind(parents[0]), checkpoint.load_config(parents[0])
        described = shape.to_hf() | kind.hf_head | {"dtype": str(dtype).removeprefix("torch.")}
        sizes = {name: one.tensor.numel() * dtype.itemsize for name, one in stored[0].items()}
        folder.hashes |= checkpoint.write(folder.path, described, sizes, put, config.max_shard_bytes)
    tokenizer.save(folder.path)
    told = {key: of_group for key, of_group in by_group.items()} or same
    return results | {"coefficients": told, "dtype": str(dtype).removeprefix("torch.")}


def _coefficients(config: MergeConfig, count: int) -> list[float]:
    """What each model counts, where all of its tensors count alike."""
    if config.method == "ema":
        return coefficients.moving_average(count, config.mu)
    if config.method == "task":
        return [1.0] * count if config.weights is None else list(config.weights)
    return coefficients.shares(count, config.weights)


def _widest(stored: Sequence[dict[str, Stored]]) -> torch.dtype:
    """The format that all parents have, or fp32: what arithmetic is in, and wide enough for fp16 and bf16."""
    (one, *others) = {tensor.tensor.dtype for parent in stored for tensor in parent.values()}
    return one if not others and one in streams.NAMES else torch.float32
