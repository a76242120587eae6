"""A checkpoint as one GGUF file, the format of llama.cpp and of what is built on it.

The file holds what llama.cpp's architecture "gemma2" reads: sizes, caps, window, the tokenizer with its kinds
of pieces, the chat template. What that architecture takes for granted and our configs leave open is checked
before anything is written: layers alternate, local first, and both caps exist. The query scale, which it
derives from the sizes, needs no check: where ours differs, q_proj is multiplied by the ratio (our choice).

Its norms multiply by the weight, so 1 + w is stored, in F32. The head is tied in both worlds. RoPE turns the
same pairs (halves, "NEOX"), so no row moves. Kinds of pieces have SentencePiece's numbers, and control tokens
are control pieces, as `gemwright.tokenizer` makes them: text cannot forge a turn unless llama.cpp is told to
parse special tokens. (Its server always is, for prompts and messages.)

Tensors are mapped, not read: memory holds one block of rows, whatever the size of the model.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.config import nearest
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating
from gemwright.run import atomic, move_aside, progress
from gemwright.tokenizer.template import END_OF_LAST_ANSWER, TEMPLATE, TEMPLATE_FILE
from gemwright.tokenizer.tokenizer import (
    CONTROL,
    CONTROL_PIECE,
    MODEL_FILE,
    SPACE,
    USER_DEFINED,
    Tokenizer,
    parse_model,
)

TYPES = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
"""How matrices may be stored, and llama.cpp's word for a file of them."""

_EMBEDDING = "model.embed_tokens.weight"
_GROUP = 32  # numbers that share a scale in q8_0 and q4_0
_BLOCK = 1 << 24  # numbers that are converted at a time
_MOST_F16 = 65504.0
_PADDING = 5  # the kind of a row of the embedding that no piece owns: "unused"
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True)
class Written:
    """What a GGUF file came to."""

    bytes: int
    tensors: int
    unquantised: tuple[str, ...] = ()
    """Matrices left in F16, because their rows do not divide into groups of 32."""


def write_gguf(folder: Path, path: Path, type: str = "q8_0", fresh: bool = False) -> Written:
    """Write the model and the tokenizer of a checkpoint folder as one GGUF file, whole or not at all.

    Args:
        folder: a checkpoint, ours or from Hugging Face, with its `tokenizer.model`.
        type: of the matrices, a key of `TYPES`. In q4_0 the embedding, which is the head as well, stays q8_0
            (our choice; llama.cpp's own quantiser also gives it more bits).
        fresh: move an existing file aside.
    Raises:
        FileNotFoundError: the checkpoint or its tokenizer is missing.
        ValueError: an unknown type, a file that exists, a model that llama.cpp would compute otherwise, a
            weight that the type cannot hold, what `checkpoint.load` and `Tokenizer.load` refuse, or the extra
            `gguf` is not installed.
    """
    if type not in TYPES:
        raise ValueError(f"there is no type {type!r}. {nearest(type, TYPES)} All: {', '.join(TYPES)}.")
    if path.exists() and not fresh:
        raise ValueError(f"{path} exists already. Choose another --out, or --fresh to move it aside.")
    config = checkpoint.load_config(folder)
    _refuse_inexpressible(config)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder}: {MODEL_FILE} has {tokenizer.vocab_size:,} pieces and the model's table "
            f"{config.vocab_size:,} rows: they belong to different models."
        )
    gguf = _library()
    tensors = checkpoint.load(folder).state_dict()
    stored = {name: _type_of(name, tensor, type) for name, tensor in tensors.items()}
    with atomic(path) as partial:
        writer = gguf.GGUFWriter(partial, "gemma2")
        try:
            _write_facts(gguf, writer, folder, config, type)
            _write_tokenizer(writer, tokenizer, _chat_template(folder), config.vocab_size)
            _write_tensors(gguf, writer, tensors, stored, config)
        finally:
            writer.close()
        if fresh:
            move_aside(path)
        size = partial.stat().st_size
    left = [name for name, kind in stored.items() if type.startswith("q") and kind == "f16"]
    return Written(size, len(tensors), tuple(map(_name, left)))


def _library() -> Any:
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "GGUF files are written with the library gguf, which is not installed. "
            "Use `pip install 'gemwright[gguf]'`."
        ) from None
    return gguf


def _refuse_inexpressible(config: GemmaConfig) -> None:
    """Raise ValueError for what llama.cpp's "gemma2" takes for granted and this model does not have."""
    if config.pattern != alternating(config.num_layers):
        raise ValueError(
            f"the layers of this model are {', '.join(config.pattern)}: llama.cpp takes layers 0, 2, 4, ... "
            "of a Gemma 2 for local and the others for global. Only that pattern can be exported."
        )
    for name in ("attn_softcap", "final_softcap"):
        if getattr(config, name) is None:
            raise ValueError(
                f"this model has no {name}: llama.cpp caps in every Gemma 2, at a default if the file names "
                "none. Only models with both caps can be exported."
            )


def _query_factor(config: GemmaConfig) -> float:
    """What q_proj is multiplied by so that llama.cpp's scale of the queries gives ours.

    It takes 46 layers for the 27B, whose scale is that of the width, and everything else for a model whose
    scale is that of the head. The scale and RoPE commute, so it may as well stand in the weights.
    """
    theirs = config.d_model // config.num_heads if config.num_layers == 46 else config.head_dim
    return math.sqrt(theirs / config.query_pre_attn_scalar)


def _name(name: str) -> str:
    """A tensor's name in the file: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.weight"
    layer, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_TENSORS[rest]}.weight"


def _type_of(name: str, tensor: Tensor, type: str) -> str:
    """How a tensor is stored: norms in f32, rows that do not divide into groups in f16, as llama.cpp does."""
    if tensor.ndim == 1:
        return "f32"
    if type.startswith("q") and tensor.shape[1] % _GROUP:
        return "f16"
    return "q8_0" if type == "q4_0" and name == _EMBEDDING else type


def _blocks(name: str, tensor: Float[Tensor, "*N D"], config: GemmaConfig) -> Iterator[Float[Tensor, "*n D"]]:
    """What is stored of a tensor, in fp32, a few rows at a time."""
    if tensor.ndim == 1:
        yield 1.0 + tensor.float()
        return
    factor = _query_factor(config) if name.endswith("q_proj.weight") else 1.0
    for rows in tensor.split(max(1, _BLOCK // tensor.shape[1])):
        yield rows.float() if factor == 1.0 else rows.float() * factor


def _require_room(name: str, block: Float[Tensor, "*n D"], type: str) -> None:
    """Raise ValueError for NaN, infinity, and what is too large for fp16, the format of the scales too."""
    most = block.abs().max().item()
    limit = _MOST_F16 if type in ("f16", "q8_0", "q4_0") else torch.finfo(torch.float32).max
    if not most <= limit:  # not >, which NaN passes
        raise ValueError(
            f"{name} holds {most:g}, and {type} ends at {limit:g}. "
            + ("Use --type bf16 or f32." if math.isfinite(most) else "This checkpoint is damaged.")
        )


def _write_facts(gguf: Any, writer: Any, folder: Path, config: GemmaConfig, type: str) -> None:
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[TYPES[type]])
    if type.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_attn_logit_softcapping(config.attn_softcap)
    writer.add_final_logit_softcapping(config.final_softcap)
    writer.add_sliding_window(config.window)
    writer.add_rope_freq_base(config.rope_theta)


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, template: str, vocab_size: int) -> None:
    """The vocabulary, row for row of the embedding, and how text becomes ids: <bos> first, no space added."""
    pieces = parse_model(tokenizer.model).pieces
    names = [piece.piece for piece in pieces]
    kinds = [CONTROL_PIECE if piece.piece in CONTROL else piece.type for piece in pieces]
    # llama.cpp looks for user-defined pieces in the text as it is, before spaces are rewritten.
    names = [n.replace(SPACE, " ") if k == USER_DEFINED else n for n, k in zip(names, kinds, strict=True)]
    padding = range(len(pieces), vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names + [f"[PAD{number}]" for number in padding])
    writer.add_token_scores([piece.score for piece in pieces] + [0.0 for _ in padding])
    writer.add_token_types(kinds + [_PADDING for _ in padding])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_unk_token_id(tokenizer.unk_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_eot_token_id(CONTROL["<end_of_turn>"])
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(template)


def _chat_template(folder: Path) -> str:
    """The folder's own, as today's file or as older exports' key, and ours where it has none.

    Without one llama.cpp would wrap messages in another family's tokens. Ours goes in without its <eos>: the
    chat of llama-cli takes a new turn for what the longer rendering has behind the length of the shorter one.
    """
    if (folder / TEMPLATE_FILE).exists():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8").replace(END_OF_LAST_ANSWER, "")
    options = folder / "tokenizer_config.json"
    found = json.loads(options.read_text(encoding="utf-8")) if options.exists() else {}
    return found.get("chat_template", TEMPLATE.replace(END_OF_LAST_ANSWER, ""))


def _write_tensors(
    gguf: Any, writer: Any, tensors: dict[str, Tensor], stored: dict[str, str], config: GemmaConfig
) -> None:
    """The table of tensors and, block by block, the tensors: past the writer, which takes them whole only."""
    kinds = {name: gguf.GGMLQuantizationType[kind.upper()] for name, kind in stored.items()}
    for name, tensor in tensors.items():
        group, span = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(
            _name(name), tensor.shape, torch.float32, tensor.numel() // group * span, kinds[name]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    with progress("gguf", sum(tensor.numel() for tensor in tensors.values()), unit="weights") as advance:
        for name, tensor in tensors.items():
            start = file.tell()
            for block in _blocks(name, tensor, config):
                _require_room(name, block, stored[name])
                gguf.quantize(block.numpy(), kinds[name]).tofile(file)
                advance(block.numel())
            writer.write_padding(file, file.tell() - start)
