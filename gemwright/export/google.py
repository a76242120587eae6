"""Google's own PyTorch checkpoints of Gemma 2, brought in: those that `google/gemma_pytorch` loads.

One `.ckpt` file (2B, 9B), or a folder of `.bin` files with an index (27B). Their modules have our names with
two exceptions: the embedding is called `embedder`, and queries, keys and values are one projection whose rows
follow one another, all query heads first. Their RoPE turns the pair (i, i + K/2) of a head as one complex
number, which is how ours turns it, so no row moves. The number format stays.

A `.ckpt` is a pickle, and a pickle may run code. torch reads these with `weights_only`, which knows tensors
and dictionaries and refuses the rest. Files are mapped, never read as a whole.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemwright.config import nearest
from gemwright.model import checkpoint
from gemwright.model.config import SIZES, GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import MODEL_FILE, Tokenizer

INDEX = "pytorch_model.bin.index.json"
_EMBEDDER = "embedder.weight"
_AGAIN = "Download it again from https://www.kaggle.com/models/google/gemma-2."


def run(
    source: Path,
    out: Path,
    tokenizer: Path | None = None,
    *,
    config: GemmaConfig | None = None,
    fresh: bool = False,
) -> Card:
    """The stage: write Google's checkpoint as one of ours, a Hugging Face directory with its tokenizer.

    Args:
        source: a `.ckpt` file, or a folder of `.bin` files with their index.
        tokenizer: a SentencePiece model; None takes the `tokenizer.model` beside `source`, or in it.
        config: the model, where it has none of the sizes that `gemwright.model.config.SIZES` names.
    Raises:
        FileNotFoundError, ValueError: as `read` and `Tokenizer.load`, or the two do not fit each other.
    """
    model = read(source, config)
    beside = (source if source.is_dir() else source.parent) / MODEL_FILE
    if tokenizer is None and not beside.exists():
        raise FileNotFoundError(f"there is no {beside}. Name the tokenizer that came along with --tokenizer.")
    pieces = Tokenizer.load(tokenizer or beside)
    if pieces.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{tokenizer or beside} has {pieces.vocab_size:,} pieces, and {source} has rows for "
            f"{model.config.vocab_size:,}: they belong to different models. Name its own with --tokenizer."
        )

    def work(folder: RunFolder) -> dict[str, Any]:
        checkpoint.save(model, folder.path)
        pieces.save(folder.path)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(model.unembedding.dtype).removeprefix("torch."),
            "layers": model.config.num_layers,
            "d_model": model.config.d_model,
        }

    return run_stage(
        "import",
        model.config,
        out,
        work,
        inputs={"checkpoint": source, "tokenizer": tokenizer or beside},
        fresh=fresh,
        next_step=f"gemwright generate {out} PROMPT",
    )


def read(source: Path, config: GemmaConfig | None = None) -> Gemma:
    """Google's checkpoint as a model, whose weights are the mapped files.

    Raises:
        FileNotFoundError: there is no such file, no index in the folder, or a part is missing.
        ValueError: a file is damaged, holds more than tensors, or is no Gemma 2 that we know.
    """
    theirs = _tensors(source)
    config = config or _fitting(theirs, source)
    model = checkpoint.blank(config)
    ours: dict[str, Tensor] = {}
    layout = _layout(model)
    for name, parts in layout.items():
        if name not in theirs:
            raise ValueError(f"{source} lacks {name}: it is no whole Gemma 2. {_AGAIN}")
        rows = [len(part) for part in parts.values()]
        shape = (sum(rows), *next(iter(parts.values())).shape[1:])
        if theirs[name].shape != shape:
            raise ValueError(
                f"{source}: {name} has shape {tuple(theirs[name].shape)}, where such a model has {shape}. "
                "Config and weights belong to different models."
            )
        ours |= zip(parts, theirs[name].split(rows), strict=True)
    if unknown := sorted(set(theirs) - set(layout)):
        raise ValueError(f"{source} holds the unknown tensor {unknown[0]!r}. {nearest(unknown[0], layout)}")
    model.load_state_dict(ours, strict=True, assign=True)
    return model


def _layout(model: Gemma) -> dict[str, dict[str, Tensor]]:
    """Their tensors, and ours that each consists of, in the order of its rows."""
    layout: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():  # q before k before v, as they lie in qkv
        theirs = _EMBEDDER if name == "model.embed_tokens.weight" else name
        for part in ("q_proj", "k_proj", "v_proj"):
            theirs = theirs.replace(f".{part}.", ".qkv_proj.")
        layout.setdefault(theirs, {})[name] = tensor
    return layout


def _fitting(theirs: Mapping[str, Tensor], source: Path) -> GemmaConfig:
    """The named size that has these shapes; no two sizes share them."""
    layers = len({name.split(".")[2] for name in theirs if name.startswith("model.layers.")})
    rows, width = theirs[_EMBEDDER].shape
    sizes = [size for size in SIZES.values() if (size.num_layers, size.d_model) == (layers, width)]
    if not sizes:
        known = ", ".join(f"{name} ({size.num_layers}, {size.d_model})" for name, size in SIZES.items())
        raise ValueError(
            f"{source} has {layers} layers of width {width}, and no Gemma 2 that we know has. Known: {known}."
        )
    return sizes[0].but(vocab_size=rows)


def _tensors(source: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint by its name in gemma_pytorch, mapped; without the tables of RoPE."""
    tensors = {
        name: value
        for path in _files(source)
        for name, value in _load(path).items()
        if not name.endswith("freqs_cis")  # computed anew
    }
    for name, value in tensors.items():
        if name.endswith("weight_scaler") or (isinstance(value, Tensor) and not value.is_floating_point()):
            raise ValueError(
                f"{source} is quantised ({name}), and only checkpoints in bf16, fp16 or fp32 can be "
                "imported. Download one of those."
            )
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} holds {name!r}, which is no tensor: it is no Gemma 2 of Google's.")
    if _EMBEDDER not in tensors:
        raise ValueError(
            f"{source} has no {_EMBEDDER}: it is no checkpoint of gemma_pytorch. A folder from Hugging Face "
            "needs no import: it is loaded as it is."
        )
    return tensors


def _files(source: Path) -> list[Path]:
    if not source.exists():
        raise FileNotFoundError(f"there is no {source}. Name a .ckpt file, or a folder with {INDEX}.")
    if not source.is_dir():
        return [source]
    index = source / INDEX
    if not index.exists():
        raise FileNotFoundError(f"{source} has no {INDEX}. Name the .ckpt file in it.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r}). {_AGAIN}") from None
    for name in names:
        if not (source / name).exists():
            raise FileNotFoundError(f"{source / name} is missing: the checkpoint is not whole. {_AGAIN}")
    return [source / name for name in names]


def _load(path: Path) -> dict[str, Any]:
    """One file's dictionary. Its pickle may make tensors and containers, and nothing else."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged, or no PyTorch checkpoint (they are zip files). {_AGAIN}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: unpickling it could run somebody's code, so it "
            f"is refused. {_AGAIN}"
        ) from None
    except Exception as error:  # there is no end to what a damaged pickle trips over
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is damaged ({said}). {_AGAIN}") from None
    if isinstance(loaded, dict):
        loaded = loaded.get("model_state_dict", loaded)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise ValueError(f"{path} holds no tensors by name: it is no checkpoint of gemma_pytorch. {_AGAIN}")
    return loaded
