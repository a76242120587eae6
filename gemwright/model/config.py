"""What a Gemma 2 is, in numbers: the report's Tables 1 and 2, small sizes, Hugging Face's `config.json`.

The fields speak the report's language; `to_hf` and `from_hf` translate. The layer pattern is data:
`num_layers` is the length of `pattern`, nothing is said twice. A key in a `config.json` that we do not know
is an error, because a dropped key (a window, a cap) gives a model that runs and is not Gemma 2.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import Field, model_validator

from gemwright.config import Config, nearest


class Attention(StrEnum):
    """What a layer may look at; the values are Hugging Face's words in `layer_types`."""

    LOCAL = "sliding_attention"
    GLOBAL = "full_attention"


def alternating(num_layers: int) -> tuple[Attention, ...]:
    """Gemma 2's order, local first: layers 0, 2, 4, ... local, 1, 3, 5, ... global (report, section 2)."""
    return tuple(Attention.GLOBAL if layer % 2 else Attention.LOCAL for layer in range(num_layers))


class GemmaConfig(Config):
    """One model. Every shape and every constant that its logits depend on."""

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    d_ff: int = Field(gt=0)
    """Width inside the feed-forward block: HALF the report's "Feedforward dim", which counts gate and up."""
    num_heads: int = Field(gt=0)
    """Query heads. `num_heads * head_dim` need not equal `d_model`, and in the report's sizes it does not."""
    num_kv_heads: int = Field(gt=0)
    """Key and value heads; fewer than query heads is GQA, equal is MHA."""
    head_dim: int = Field(gt=0, multiple_of=2)
    """Size of one head (even: RoPE turns pairs)."""
    pattern: tuple[Attention, ...] = Field(min_length=1)
    """What each layer may look at, first layer first."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding table: 256,000 on Hugging Face, 256,128 in the report (padded for sharding)."""
    query_pre_attn_scalar: float = Field(gt=0)
    """Queries are multiplied by its -0.5th power: head_dim in 2B and 9B, d_model / num_heads = 144 in 27B."""
    window: int = Field(default=4096, gt=0)
    """Keys that a local layer sees, the query's own position included."""
    max_seq_len: int = Field(default=8192, gt=0)
    """The report's global attention span."""
    attn_softcap: float | None = Field(default=50.0, gt=0)
    """Attention scores s become cap * tanh(s / cap), before the mask. None: no cap."""
    final_softcap: float | None = Field(default=30.0, gt=0)
    """The same for the logits. None: no cap."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary embedding, equal for local and global layers."""
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square inside RMSNorm."""
    init_std: float | None = Field(default=None, gt=0)
    """Standard deviation of fresh matrices; None: fan-in to the -0.5th power. No checkpoint keeps it."""

    @property
    def num_layers(self) -> int:
        """How many layers: the length of the pattern."""
        return len(self.pattern)

    @property
    def query_scale(self) -> float:
        """The factor on the queries."""
        return self.query_pre_attn_scalar**-0.5

    @model_validator(mode="after")
    def _heads_divide(self) -> "GemmaConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: each "
                "key/value head serves equally many query heads. Choose a divisor."
            )
        return self

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that transformers reads, but for the head, which `Gemma.hf_head` names."""
        scalar = self.query_pre_attn_scalar  # transformers wants an int here, and refuses a fraction
        return {
            "model_type": "gemma2",
            **{theirs: getattr(self, ours) for ours, theirs in _HF_NAMES.items()},
            "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
            "num_hidden_layers": self.num_layers,
            "layer_types": [str(kind) for kind in self.pattern],
            **_HF_FIXED,
        }

    @classmethod
    def from_hf(cls, data: Mapping[str, Any]) -> "GemmaConfig":
        """Read Hugging Face's `config.json`. Raises ValueError for what we would get wrong or do not know."""
        if data.get("model_type") != "gemma2":
            raise ValueError(
                f"model_type is {data.get('model_type')!r}: only 'gemma2' checkpoints can be loaded."
            )
        known = {*_HF_NAMES.values(), *_HF_FIXED, *_HF_NO_EFFECT, *_HF_READ_BELOW}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(f"config.json has the unknown key {unknown[0]!r}. {nearest(unknown[0], known)}")
        twice = {"sliding_window_size": data.get("sliding_window")}  # early exports say the window twice
        for key, value in (_HF_FIXED | _HF_OFF | twice).items():
            if data.get(key, value) not in (value, *_HF_ALSO.get(key, ())):
                raise ValueError(
                    f"config.json says {key}={data[key]!r}; Gemma 2 has {value!r} and so has gemwright."
                )
        missing = sorted({theirs for theirs in _HF_REQUIRED if theirs not in data})
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}. It is not a whole Gemma 2 config.")
        fields = {ours: data[theirs] for ours, theirs in _HF_NAMES.items() if theirs in data}
        rope = data.get("rope_parameters") or {"rope_type": "default"}
        scaled = rope.get("rope_type", "default") != "default" or set(rope) - {"rope_type", "rope_theta"}
        if data.get("rope_scaling") or scaled:
            raise ValueError("config.json asks for scaled RoPE, which Gemma 2 does not have.")
        fields["rope_theta"] = rope.get("rope_theta", fields.get("rope_theta", 10_000.0))
        pattern = data.get("layer_types") or alternating(data["num_hidden_layers"])
        if len(pattern) != data["num_hidden_layers"]:
            raise ValueError(
                f"config.json has {len(pattern)} layer_types for {data['num_hidden_layers']} layers."
            )
        return cls.parse(fields | {"pattern": tuple(pattern)})


_HF_NAMES = {
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "attn_softcap": "attn_logit_softcapping",
    "final_softcap": "final_logit_softcapping",
    "rope_theta": "rope_theta",
    "rms_norm_eps": "rms_norm_eps",
}
_HF_REQUIRED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
                "num_hidden_layers", "vocab_size", "query_pre_attn_scalar", "sliding_window",
                "attn_logit_softcapping", "final_logit_softcapping")  # fmt: skip
_HF_READ_BELOW = ("num_hidden_layers", "layer_types", "rope_parameters", "rope_scaling",
                  "sliding_window_size", "use_bidirectional_attention")  # fmt: skip
# Constants of Gemma 2: any other value is another model.
_HF_FIXED: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_HF_OFF = {"use_bidirectional_attention": False}  # the same, not written: older readers do not know it
# Other spellings of the same: a chat model also ends on <end_of_turn>, and an unset switch is off.
_HF_ALSO: dict[str, tuple[Any, ...]] = {"eos_token_id": ([1, 107],), "use_bidirectional_attention": (None,)}
# The only keys that are read and let go: none of them changes a logit.
_HF_NO_EFFECT = (
    "architectures", "model_type", "_name_or_path", "transformers_version", "torch_dtype", "dtype",
    "use_cache", "cache_implementation", "hidden_act", "_attn_implementation_autoset",
    "chunk_size_feed_forward", "is_encoder_decoder", "output_hidden_states", "output_attentions",
    "return_dict", "problem_type", "id2label", "label2id", "initializer_range",
)  # fmt: skip

# Report, Tables 1 and 2 (256,000 rows as on Hugging Face: `.but(vocab_size=256_128)` gives its counts).
_REPORT = {
    "2b": GemmaConfig(d_model=2304, d_ff=9216, num_heads=8, num_kv_heads=4, head_dim=256,
                      pattern=alternating(26), vocab_size=256_000, query_pre_attn_scalar=256),
    "9b": GemmaConfig(d_model=3584, d_ff=14336, num_heads=16, num_kv_heads=8, head_dim=256,
                      pattern=alternating(42), vocab_size=256_000, query_pre_attn_scalar=256),
    "27b": GemmaConfig(d_model=4608, d_ff=36864, num_heads=32, num_kv_heads=16, head_dim=128,
                       pattern=alternating(46), vocab_size=256_000, query_pre_attn_scalar=144),
}  # fmt: skip


def _small(
    layers: int, d_model: int, num_heads: int, head_dim: int, *, window: int, max_seq_len: int
) -> GemmaConfig:
    """A small size in the report's proportions: d_ff = 4 d_model (as 2B, 9B), 2 query heads a key head."""
    return GemmaConfig(
        d_model=d_model, d_ff=4 * d_model, num_heads=num_heads, num_kv_heads=max(num_heads // 2, 1),
        head_dim=head_dim, pattern=alternating(layers), vocab_size=256_000, query_pre_attn_scalar=head_dim,
        window=window, max_seq_len=max_seq_len,
    )  # fmt: skip


# Small sizes are ours, named by their non-embedding parameters. `.but(vocab_size=...)` fits a tokenizer.
_OURS = {
    "0.1m": _small(2, 64, 2, 32, window=64, max_seq_len=512),
    "0.5m": _small(2, 128, 4, 32, window=64, max_seq_len=512),
    "1m": _small(4, 128, 4, 32, window=64, max_seq_len=512),
    "6m": _small(6, 256, 4, 64, window=256, max_seq_len=2048),
    "30m": _small(8, 512, 8, 64, window=512, max_seq_len=4096),
    "100m": _small(12, 768, 8, 96, window=1024, max_seq_len=8192),
    "200m": _small(14, 1024, 8, 128, window=2048, max_seq_len=8192),
    "400m": _small(18, 1280, 8, 160, window=2048, max_seq_len=8192),
    "1b": _small(22, 1792, 8, 224, window=4096, max_seq_len=8192),
}
SIZES: dict[str, GemmaConfig] = _OURS | _REPORT


def size(name: str) -> GemmaConfig:
    """The config of a named size: `2b`, `9b`, `27b` of the report, or a small one of ours."""
    if name not in SIZES:
        raise ValueError(f"there is no size {name!r}. {nearest(name, SIZES)} All: {', '.join(SIZES)}.")
    return SIZES[name]
