"""Checkpoints are Hugging Face directories, both ways.

What is saved here, `transformers.AutoModelForCausalLM` loads, and the other way round: `config.json`,
`model.safetensors` (in numbered parts with an index above a size), `generation_config.json`. Module names
equal the keys of the file, so there is no table of names. Everything is strict: a missing tensor, a wrong
shape or an unknown key is an error, because a checkpoint that half loads is a model that half works.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemwright.config import nearest
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import atomic, write_json

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 << 30
# The only keys that are read and let go: the tied head's second name, and buffers of old exports, recomputed.
_TIED = "lm_head.weight"
_RECOMPUTED = (".rotary_emb.inv_freq",)


def save(model: Gemma, folder: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write `model` as a Hugging Face directory. Each file appears whole or not at all, the config last."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    parts = _parts(tensors, max_shard_bytes)
    names = (
        [WEIGHTS]
        if len(parts) == 1
        else [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    )
    for name, part in zip(names, parts, strict=True):
        with atomic(folder / name) as partial:
            save_file({key: tensors[key] for key in part}, partial, metadata={"format": "pt"})
    if len(parts) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        where = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    for stale in folder.glob("model*.safetensors*"):
        if stale.name not in {*names, *([INDEX] if len(parts) > 1 else [])}:
            stale.unlink()  # of an earlier save with another number of parts
    # Generation ends on <eos> and on <end_of_turn>: the released chat models emit either.
    ends = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
    write_json(folder / "generation_config.json", ends)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / CONFIG, model.config.to_hf() | {"dtype": dtype})


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


def load(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Gemma:
    """Load a checkpoint, in its own number format unless `dtype` is given. It is not built twice in memory.

    Raises:
        FileNotFoundError: the folder, its config or one of its files is missing.
        ValueError: an unknown config key, a missing, unknown or misshapen tensor, a damaged file.
    """
    config = load_config(folder)
    with torch.device("meta"):
        model = Gemma(config)
    wanted = model.state_dict()
    found: dict[str, Tensor] = {}
    tied: Tensor | None = None
    for name, tensor in _read(folder):
        if name == _TIED:
            tied = tensor
        elif not name.endswith(_RECOMPUTED):
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
            found[name] = tensor.to(device=device, dtype=dtype or tensor.dtype)
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors, {missing[0]!r} first. Fetch it again."
        )
    if tied is not None and not torch.equal(
        tied.to(device, dtype or tied.dtype), found["model.embed_tokens.weight"]
    ):
        raise ValueError(
            f"{folder} has a {_TIED} of its own: Gemma 2 ties the head to the embedding. It is another model."
        )
    model.load_state_dict(found, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _parts(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut so that no part exceeds `limit` bytes (a larger tensor stands alone)."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += tensor.nbytes
    return parts


def _read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, memory-mapped, file by file."""
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
                    yield key, file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). Fetch that file again.") from None
