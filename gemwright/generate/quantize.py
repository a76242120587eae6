"""int8 inference: projections and table in one byte a weight instead of two or four.

A row of a weight is rounded to -127..127 with a scale of its own (symmetric, per output channel). What is
done with it depends on where the model is:

* On a CPU, fbgemm multiplies int8 by int8. So activations are rounded too, at every call: each ROW by its own
  largest value. torch's dynamic quantisation takes one scale for all rows of a call; one outlier among them,
  as <bos> can be, then costs its neighbours their precision (a relative error of 0.77 instead of 0.011 beside
  a row 100 times as large), and what a sequence gets depends on its batch. Here a row's product is the same
  alone and among others, bit by bit.
* On a GPU, torchao keeps int8 weights and multiplies in the activations' format (weight-only).

The table is the head too. Rows must be looked up in it, and fbgemm's packed form can be unpacked only as a
whole (1 s for 64,000 x 2304), so a CPU holds both: 2 bytes a weight of the table. Packed rows are padded to
multiples of 512. So a CPU holds 33 % (2b), 28 % (9b), 26 % (27b) of fp32's bytes, and a GPU 25 %; models that
are narrower than 512 gain little or nothing. Norms stay as they are.

There is no int4: torch's kernel for CPUs is no faster at one row, slower at more, and its error is eight
times as large (LOG.md).
"""

import functools
import warnings
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor, nn

from gemwright.model import head
from gemwright.model.checkpoint import blank
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, Linear, RMSNorm

Kind = Literal["int8"]

_BLOCK_ROWS = 8192  # of a matrix rounded, or of a GPU's head multiplied, at a time: all that is held wide
_PACKED_COLUMNS = 512  # fbgemm's rows are multiples of it (measured, with AVX2 and with AVX-512)
_LEAST = torch.finfo(torch.float32).tiny


def quantize(model: Gemma, kind: Kind = "int8") -> Gemma:
    """A new model for inference, on the same device and with the same activations; the given one stays.

    It is made matrix by matrix and shares no memory with `model`: whoever drops that one is left with the
    int8 size. It cannot be trained, saved or moved, and says so.

    Raises:
        ValueError: an unknown kind, a weight that is not finite, a model that is quantised already; on a GPU,
            torchao is missing; or this CPU multiplies int8 wrongly.
    """
    if kind != "int8":
        raise ValueError(f"there is no quantisation {kind!r}, only 'int8'.")
    if not isinstance(model.model.embed_tokens, nn.Embedding):
        raise ValueError("the model is quantised already. Quantise the one in bf16 or fp32.")
    return _quantized(model, packed=model.device.type == "cpu")


@torch.no_grad()
def _quantized(model: Gemma, packed: bool) -> Gemma:
    made = blank(model.config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            made.set_submodule(name, Int8Embedding(module.weight, packed))
        elif isinstance(module, Linear):
            made.set_submodule(name, (Int8Linear if packed else WeightOnlyLinear)(module.weight))
        elif isinstance(module, RMSNorm):
            made.get_submodule(name).weight = nn.Parameter(module.weight.clone(), requires_grad=False)
    return made.eval()


def weight_bytes(model: Gemma) -> int:
    """Memory of a model's weights, quantised or not."""
    quantised = sum(module.bytes for module in model.modules() if isinstance(module, _Fixed))
    return quantised + sum(parameter.nbytes for parameter in model.parameters())


def planned_bytes(config: GemmaConfig, *, packed: bool, norm_bytes: int) -> int:
    """`weight_bytes` of a quantised model that nobody made: on a CPU (packed) or a GPU.

    Args:
        norm_bytes: of a norm's weight: 2 if the model was in bf16.
    """
    d, queries, keys = (
        config.d_model,
        config.num_heads * config.head_dim,
        config.num_kv_heads * config.head_dim,
    )
    shapes = [
        (queries, d),
        (keys, d),
        (keys, d),
        (d, queries),
        (config.d_ff, d),
        (config.d_ff, d),
        (d, config.d_ff),
    ]
    layer = sum((_packed_bytes if packed else _weight_only_bytes)(*shape) for shape in shapes)
    norms = norm_bytes * d * (4 * config.num_layers + 1)
    return config.num_layers * layer + norms + _table_bytes(config.vocab_size, d, packed)


class _Fixed(nn.Module):
    """A module in int8: what it holds are no parameters, and what one does to those is refused."""

    bytes: int
    """Memory held, what fbgemm keeps beside each row (scale, zero point, sum) included."""

    def train(self, mode: bool = True) -> "_Fixed":
        if mode:
            raise ValueError("a quantised model cannot be trained. Train the one in bf16 or fp32.")
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ValueError("a quantised model cannot be saved. Save the one in bf16 or fp32, quantise at load.")

    def _apply(self, fn: Any, recurse: bool = True) -> "_Fixed":
        raise ValueError("a quantised model cannot be moved or cast. Quantise again where it should run.")


class Int8Linear(_Fixed):
    """A projection on a CPU: int8 by int8."""

    def __init__(self, weight: Float[Tensor, "O I"]) -> None:
        super().__init__()
        self._packed = _pack(*_rounded(weight))
        self.bytes = _packed_bytes(*weight.shape)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Apply to the last axis; out in the format of `x`."""
        return _multiply(x.float(), self._packed).to(x.dtype)


class WeightOnlyLinear(_Fixed):
    """A projection on a GPU: torchao's int8 weight, multiplied in the format of the activations."""

    def __init__(self, weight: Float[Tensor, "O I"]) -> None:
        super().__init__()
        try:
            from torchao.quantization import (  # pyright: ignore[reportMissingImports]
                Int8WeightOnlyConfig,
                quantize_,
            )
        except ImportError:
            raise ValueError(
                "int8 on a GPU needs torchao, which is not installed. Use `pip install 'gemwright[gpu]'`."
            ) from None
        rows, width = weight.shape
        with torch.device("meta"):
            inner = nn.Sequential(nn.Linear(width, rows, bias=False))  # torchao looks for Linears inside
        inner[0].weight = nn.Parameter(weight.detach(), requires_grad=False)
        quantize_(inner, Int8WeightOnlyConfig())
        self._inner = (inner,)  # in a tuple: no submodule, whose weight would count as a parameter
        self.bytes = _weight_only_bytes(*weight.shape)

    def forward(self, x: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Apply to the last axis; out in the format of `x`."""
        return self._inner[0](x)


class Int8Embedding(_Fixed):
    """The table, as embedding and as head."""

    def __init__(self, weight: Float[Tensor, "V D"], packed: bool) -> None:
        super().__init__()
        self._dtype = weight.dtype
        self._rows, self._scales = _rounded(weight)
        count, width = weight.shape
        self._packed = _pack(self._rows, self._scales) if packed else None
        self.bytes = _table_bytes(count, width, packed)

    def forward(self, ids: Int[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
        """Rows of the table, in the model's format."""
        return (self._rows[ids] * self._scales[ids][..., None]).to(self._dtype)

    def unembed(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Raw fp32 logits: what `model.head` caps."""
        if self._packed is not None:
            return _multiply(hidden.float(), self._packed)
        out = hidden.new_empty(*hidden.shape[:-1], len(self._rows), dtype=torch.float32)
        for start in range(0, len(self._rows), _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            block = self._rows[part].to(hidden.dtype)  # exact: bf16 holds every integer up to 256
            out[..., part] = head.raw_logits(hidden, block) * self._scales[part]
        return out


def _rounded(weight: Float[Tensor, "O I"]) -> tuple[Int8[Tensor, "O I"], Float[Tensor, " O"]]:
    """Integers -127..127, and the scale of each row."""
    scales = torch.linalg.vector_norm(weight, torch.inf, dim=1).float() / 127
    if not bool(scales.isfinite().all()):
        raise ValueError(
            "a weight is not finite (NaN or infinite): the checkpoint is of a run that diverged."
        )
    scales.clamp_(min=_LEAST)  # of a row of zeros
    rows = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        rows[part] = (weight[part].float() / scales[part, None]).round_()
    return rows, scales


def _pack(rows: Int8[Tensor, "O I"], scales: Float[Tensor, " O"]) -> Any:
    """The weight as fbgemm wants it."""
    with warnings.catch_warnings():
        # torch deprecates its quantised tensors (pytorch issue 184982) before it has another int8 product for
        # CPUs. The version of torch is pinned.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor, torch.quantize_per_channel")
        zeros = torch.zeros(len(rows), dtype=torch.long)
        weight = torch._make_per_channel_quantized_tensor(  # pyright: ignore[reportPrivateImportUsage]
            rows, scales.double(), zeros, 0
        )
    return torch.ops.quantized.linear_prepack(weight, None)


def _packed_bytes(rows: int, width: int) -> int:
    """Rows padded to a multiple of 512 bytes, and for each a scale, a zero point and a sum of 4 bytes."""
    return rows * (-(-width // _PACKED_COLUMNS) * _PACKED_COLUMNS + 12)


def _weight_only_bytes(rows: int, width: int) -> int:
    """A byte a weight, and for each row a scale of 4 bytes and a zero point of one."""
    return rows * (width + 5)


def _table_bytes(rows: int, width: int, packed: bool) -> int:
    """A byte a weight, a scale of 4 bytes for each row, and the packed form."""
    return rows * (width + 4) + (_packed_bytes(rows, width) if packed else 0)


def _multiply(x: Float[Tensor, "*N I"], packed: Any, levels: int | None = None) -> Float[Tensor, "*N O"]:
    """x times the packed weight's transpose, each row of x rounded to `levels` steps on either side of 0."""
    engine = torch.backends.quantized.engine
    levels = levels or _levels(engine)
    rows = x.reshape(-1, x.shape[-1])
    size = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).clamp_(min=_LEAST)
    rows = rows / size
    if engine == "qnnpack":  # on ARM: it takes its steps from the rows themselves, here from about -1 to 1
        out = torch.ops.quantized.linear_dynamic(rows, packed, levels < 127)
    else:
        out = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            rows, 1 / levels, levels + 1, packed
        )
    return out.mul_(size).view(*x.shape[:-1], out.shape[-1])


@functools.cache
def _levels(engine: str) -> int:
    """The largest integer for an activation: 127, or 63 on a CPU whose products of bytes saturate.

    Without VNNI, fbgemm adds pairs of products in 16 bits: 2 x 255 x 127 does not fit, 2 x 127 x 127 does.
    The CPU is asked, once, by the worst case itself.
    """
    width = 64
    packed = _pack(torch.full((32, width), 127, dtype=torch.int8), torch.ones(32))
    for levels in (127, 63):
        products = [_multiply(torch.ones(rows, width), packed, levels) for rows in (1, 32)]
        if all(bool(((product / (127 * width) - 1).abs() < 0.01).all()) for product in products):
            return levels
    raise ValueError(f"this CPU's int8 products are wrong (torch's engine {engine!r}). Run without int8.")
