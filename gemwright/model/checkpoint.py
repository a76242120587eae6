"""Checkpoints are Hugging Face directories, both ways.

What is saved here, `transformers.AutoModelForCausalLM` loads, and the other way round: `config.json`,
`model.safetensors` (in numbered parts with an index above a size), `generation_config.json`. Module names
equal the keys of the file, so there is no table of names. Everything is strict: a missing tensor, a wrong
shape or an unknown key is an error, because a checkpoint that half loads is a model that half works.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gemwright.config import nearest
from gemwright.device import available_memory
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.run import atomic, write_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
_BLOCK_BYTES = 16 << 20  # of a tensor, copied at a time
# The only keys that are read and let go: the tied head's second name, and buffers of old exports, recomputed.
_TIED, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_RECOMPUTED = (".rotary_emb.inv_freq",)

M = TypeVar("M", bound=Gemma)


def save(model: Gemma, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model` as a Hugging Face directory. Each file appears whole or not at all, the config last."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}

    def put(names: Sequence[str], path: Path) -> None:
        save_file({name: tensors[name] for name in names}, path, metadata={"format": "pt"})

    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config = model.config.to_hf() | model.hf_head | {"dtype": dtype}
    write(folder, config, {name: tensor.nbytes for name, tensor in tensors.items()}, put, max_shard_bytes)


def write(
    folder: Path,
    config: dict[str, Any],
    sizes: Mapping[str, int],
    put: Callable[[Sequence[str], Path], str | None],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write a checkpoint whose tensors come from `put`. Returns the hashes of the files, where it tells them.

    Args:
        config: `config.json`.
        sizes: bytes of every tensor, by name, in the model's order.
        put: writes the file of some tensors, by their names, and may return its SHA-256.
        max_shard_bytes: most bytes of a file, unless one tensor has more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = _parts(sizes, max_shard_bytes)
    names = (
        [WEIGHTS]
        if len(parts) == 1
        else [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    )
    hashes: dict[str, str] = {}
    for name, part in zip(names, parts, strict=True):
        with atomic(folder / name) as partial:
            digest = put(part, partial)
        hashes |= {name: digest} if digest else {}
    if len(parts) > 1:
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in {*names, *([INDEX] if len(parts) > 1 else [])}:
            stale.unlink()  # of an earlier save with another number of parts
    # Generation ends on <eos> and on <end_of_turn>: the released chat models emit either.
    ends = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    write_json(folder / "generation_config.json", ends)
    write_json(folder / CONFIG, config)
    return hashes


def load_config(folder: Path) -> GemmaConfig:
    """Read `config.json`. Raises FileNotFoundError or ValueError that say what to do."""
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {CONFIG}: it is not a checkpoint. Name the folder that holds one."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}). Copy it from where the checkpoint came from."
        ) from None
    if not isinstance(data, dict):
        raise ValueError(
            f"{path} is damaged (it holds no keys). Copy it from where the checkpoint came from."
        )
    return GemmaConfig.from_hf(data)


def load_kind(folder: Path) -> type[Gemma]:
    """What a checkpoint is, by its `config.json`: a language model, or a reward model."""
    load_config(folder)
    named = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("architectures") or []
    return RewardModel if named == RewardModel.hf_head["architectures"] else Gemma


def blank(config: GemmaConfig) -> Gemma:
    """A model without memory or weights, on the meta device, to be given them."""
    return _blank(config, Gemma)


def _blank(config: GemmaConfig, kind: type[M]) -> M:
    """Nothing is initialised either: even without memory that would import torch's compiler, for 0.8 s."""
    with torch.device("meta"), _Uninitialised():
        return kind(config)


class Stored(NamedTuple):
    """A tensor of a checkpoint, where it lies."""

    path: Path
    tensor: Tensor
    """Mapped, and nothing of it read yet."""

    def rows(self, name: str, rows: slice) -> Tensor:
        """Some rows, in a mapping of their own: what was read counts as memory while it is mapped."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(name)[rows]


def stored(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint, in the model's order; a tied head's second name is left out.

    Raises:
        FileNotFoundError: the folder, its config or one of its files is missing.
        ValueError: an unknown config key, a missing, unknown or misshapen tensor, quantised weights, a head
            that is not the embedding, a damaged file.
    """
    wanted = _blank(load_config(folder), load_kind(folder)).state_dict()
    found: dict[str, Stored] = {}
    tied: Stored | None = None
    for name, path, tensor in _mapped(folder):
        if name.endswith(_RECOMPUTED):
            continue
        if name == _TIED:
            tied = Stored(path, tensor)
            continue
        if name not in wanted:
            raise ValueError(f"{folder} holds the unknown tensor {name!r}. {nearest(name, wanted)}")
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but its config.json asks for "
                f"{tuple(wanted[name].shape)}. Config and weights belong to different models."
            )
        if not tensor.is_floating_point():
            raise ValueError(
                f"{folder}: {name} holds {tensor.dtype}: quantised weights cannot be loaded. "
                "Fetch the checkpoint in bf16 or fp32."
            )
        found[name] = Stored(path, tensor)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]!r} first. Fetch it again."
        )
    if tied is not None and not _equal(tied, _TIED, found[_EMBEDDING], _EMBEDDING):
        raise ValueError(
            f"{folder} has a {_TIED} of its own: Gemma 2 ties the head to the embedding. It is another model."
        )
    return {name: found[name] for name in wanted}


def load(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Gemma:
    """Load a checkpoint, in its own number format unless `dtype` is given. Nothing is held twice in memory.

    On the CPU and in its own format the weights are the file itself, mapped: there at once, read when used,
    given up by the system when memory is short. What is written to them (by training) stays in memory and
    never reaches the file. The file may be deleted, or replaced as we do it, by renaming; who overwrites its
    bytes in place changes the model, or ends the process.

    Raises:
        FileNotFoundError, ValueError: as `stored`; or it is a reward model.
        RuntimeError: the device has not enough memory left; before any is taken.
    """
    return _load(folder, Gemma, dtype, torch.device(device))


def load_reward(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> RewardModel:
    """The same for a reward model; a language model is refused."""
    return _load(folder, RewardModel, dtype, torch.device(device))


def _load(folder: Path, kind: type[M], dtype: torch.dtype | None, device: torch.device) -> M:
    if load_kind(folder) is not kind:
        raise ValueError(
            f"{folder} is a language model, and has no scalar head. `gemwright reward` makes one."
            if kind is RewardModel
            else f"{folder} is a reward model: it scores text, and writes none. Name a language model."
        )
    model = _blank(load_config(folder), kind)
    files = stored(folder)
    found = {name: tensor for name, (_, tensor) in files.items()}
    copied = {
        name: dtype or tensor.dtype
        for name, tensor in found.items()
        if device.type != "cpu" or tensor.dtype != (dtype or tensor.dtype)
    }
    _require_memory(folder, sum(found[name].numel() * to.itemsize for name, to in copied.items()), device)
    for name, to in copied.items():
        copy = torch.empty(found[name].shape, dtype=to, device=device)
        for rows in blocks(copy):
            copy[rows] = files[name].rows(name, rows)
        found[name] = copy
    model.load_state_dict(found, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


class _Uninitialised(TorchFunctionMode):
    """Within it, torch.nn.init leaves every tensor as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _require_memory(folder: Path, bytes: int, device: torch.device) -> None:
    left = available_memory(device)
    if left is not None and bytes > left:
        raise RuntimeError(
            f"{folder} takes {bytes / 1e9:.1f} GB of memory in this number format, and {device} has "
            f"{left / 1e9:.1f} GB left. Take a narrower format (bf16, int8) or a smaller model, or free some."
        )


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Its rows, a few megabytes at a time."""
    step = max(1, _BLOCK_BYTES * len(tensor) // max(1, tensor.nbytes))
    return (slice(start, start + step) for start in range(0, len(tensor), step))


def _equal(one: Stored, name: str, other: Stored, other_name: str) -> bool:
    """Whether two stored tensors are equal in the number format of the second; block by block."""
    return one.tensor.shape == other.tensor.shape and all(
        torch.equal(one.rows(name, rows).to(other.tensor.dtype), other.rows(other_name, rows))
        for rows in blocks(other.tensor)
    )


def _parts(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that no part exceeds `limit` bytes (a larger tensor stands alone)."""
    parts: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if parts[-1] and total + size > limit:
            parts.append([])
            total = 0
        parts[-1].append(name)
        total += size
    return parts


def _mapped(folder: Path) -> Iterator[tuple[str, Path, Tensor]]:
    """All tensors of a checkpoint with the files they are in, mapped: private to us, and nothing read yet."""
    if (folder / INDEX).exists():
        try:
            files = sorted(
                set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged ({error!r}). Fetch it again.") from None
    else:
        files = [WEIGHTS]
    for name in files:
        path = folder / name
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the checkpoint is not whole. Fetch that file again.")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    yield key, path, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Fetch that file again.") from None
