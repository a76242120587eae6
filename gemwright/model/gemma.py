"""The Gemma 2 architecture in one sitting (arXiv 2408.00118, section 2).

Module names equal the keys of a Hugging Face checkpoint, so loading is the identity. The order of operations
is that of Google's two code bases: embeddings scaled by sqrt(d_model) rounded to the activation's dtype;
RMSNorm before AND after attention and feed-forward, in fp32, with weight 1 + w; RoPE on halves; soft-caps on
attention and logits.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gemwright.device import can_compile
from gemwright.model import head
from gemwright.model.attention import Places, attend, remembered
from gemwright.model.cache import KVCache, LayerCache
from gemwright.model.config import Attention, GemmaConfig

Memory = list[tuple[LayerCache, int, int]]
"""For each sequence, what a layer remembers of it, the position its new tokens begin at, and their number."""


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + w), in fp32, cast once at the end: adding 1 in bf16 would round large weights."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Normalise over the last axis."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).to(x.dtype)


def rotary(position: Int[Tensor, "B T"], size: int, theta: float) -> Float[Tensor, "2 B T 1 K"]:
    """Cosines and sines of every position's angles, in fp32 (bf16 cannot hold a position beyond 256).

    The sines of the first half are negated: so `rotate` has only to swap halves.
    """
    frequencies = theta ** (-torch.arange(0, size, 2, device=position.device, dtype=torch.float32) / size)
    angles = (position[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))


def rotate(x: Float[Tensor, "B T H K"], turn: Float[Tensor, "2 B T 1 K"]) -> Float[Tensor, "B T H K"]:
    """RoPE: turn the pairs (i, i + K/2), halves split as in the checkpoints; fp32, then back."""
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * turn[0] + torch.cat((second, first), -1) * turn[1]).to(x.dtype)


class Linear(nn.Linear):
    """A projection, multiplied by `head.product`."""

    def forward(self, input: Float[Tensor, "*N I"]) -> Float[Tensor, "*N O"]:
        """Apply to the last axis."""
        return head.product(input, self.weight)


class SelfAttention(nn.Module):
    """Grouped-query attention, local or global; no biases, no norm on queries and keys (that is Gemma 3)."""

    def __init__(self, config: GemmaConfig, kind: Attention) -> None:
        super().__init__()
        width, size = config.d_model, config.head_dim
        self.q_proj = Linear(width, config.num_heads * size, bias=False)
        self.k_proj = Linear(width, config.num_kv_heads * size, bias=False)
        self.v_proj = Linear(width, config.num_kv_heads * size, bias=False)
        self.o_proj = Linear(config.num_heads * size, width, bias=False)
        self.head_dim = size
        self.scale = config.query_scale
        self.cap = config.attn_softcap
        self.window = config.window if kind is Attention.LOCAL else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        turn: Float[Tensor, "2 B T 1 K"],
        places: Places,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Attend within `x`; with a memory (B = 1, sequences end to end), each to what it remembers too."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(torch.cat((q, k), 2), turn).split((q.shape[2], k.shape[2]), 2)
        constants: Any = {"scale": self.scale, "cap": self.cap, "window": self.window}
        if memory is None:
            out = attend(q, k, v, places, **constants)
        else:
            lengths = [new for _, _, new in memory]
            parts = zip(memory, *(tensor[0].split(lengths) for tensor in (q, k, v)), strict=True)
            rows = [
                remembered(queries, cache.extend(keys, values, start), start, **constants)
                for (cache, start, _), queries, keys, values in parts
            ]
            out = (torch.cat(rows) if len(rows) > 1 else rows[0])[None]
        return self.o_proj(out.flatten(2))


class FeedForward(nn.Module):
    """GeGLU: gelu (tanh form) of one projection times the other, then down."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.d_ff, bias=False)
        self.up_proj = Linear(config.d_model, config.d_ff, bias=False)
        self.down_proj = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Apply to every position."""
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward, each normed before and after, each added to the residual stream."""

    def __init__(self, config: GemmaConfig, kind: Attention) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config, kind)
        self.mlp = FeedForward(config)
        # The checkpoint's names. In Gemma 2 "post_attention" norms attention's OUTPUT, before the addition.
        self.input_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.pre_feedforward_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.post_feedforward_layernorm = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        turn: Float[Tensor, "2 B T 1 K"],
        places: Places,
        memory: Memory | None = None,
    ) -> Float[Tensor, "B T D"]:
        """One step of the residual stream."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), turn, places, memory))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Backbone(nn.Module):
    """Everything below the unembedding: the `model.` part of a checkpoint."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.pattern)
        self.norm = RMSNorm(config.d_model, config.rms_norm_eps)


class Gemma(nn.Module):
    """A Gemma 2 language model: token ids (B, T) in, capped fp32 logits (B, T, V) out."""

    hf_head: ClassVar[dict[str, Any]] = {"architectures": ["Gemma2ForCausalLM"]}
    """What a `config.json` says of the head."""

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh weights: normal, norms at w = 0. The report is silent; the scale is ours.

        Each block adds something of size 1 to the residual stream (its output is normed), so the embedding is
        drawn to arrive there at size 1 too, d_model^-0.5 before its scale. At Hugging Face's 0.02 a narrow
        model's tokens would begin as a whisper under its layers: the laptop teacher then learns more slowly
        (LOG.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.init_std or module.weight.shape[1] ** -0.5)
            elif isinstance(module, RMSNorm):
                nn.init.zeros_(module.weight)

    @property
    def unembedding(self) -> Any:
        """The head's weight (V, D), tied to the embedding; of a quantised model, what multiplies by it."""
        table = self.model.embed_tokens
        return table.weight if isinstance(table, nn.Embedding) else table.unembed

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.norm.weight.device

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        places: Places | None = None,
        caches: Sequence[KVCache] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The final hidden states, normed: what `logits` turns into logits.

        Args:
            places: positions and documents of a packed batch (`packed`). Without them a row is one document.
            caches: one a sequence, keys and values of earlier calls, extended by this one; positions go on
                where each stands. Without gradients, and not with `places`.
            lengths: new tokens of each sequence, where `ids` (B = 1) has them end to end; by default a row is
                a sequence.
        """
        shape = ids.shape
        if caches is not None:
            assert places is None
            lengths = [shape[1]] * shape[0] if lengths is None else lengths
            assert len(caches) == len(lengths), (len(caches), lengths)
            ids = ids.reshape(1, -1)  # projections take all tokens at once, attention goes by sequence
            starts = [cache.length for cache in caches]
            position = [
                start + new for start, count in zip(starts, lengths, strict=True) for new in range(count)
            ]
            places = Places(torch.tensor([position], device=ids.device), torch.zeros_like(ids))
        elif places is None:
            position = torch.arange(shape[1], device=ids.device).expand(shape)
            places = Places(position, torch.zeros_like(ids))
        x = self.model.embed_tokens(ids)
        # Rounded to the activation's dtype on purpose, as in Google's code: 59.75 for 9B in bf16.
        x = x * torch.tensor(math.sqrt(self.config.d_model), dtype=x.dtype, device=x.device)
        turn = rotary(places.position, self.config.head_dim, self.config.rope_theta)
        for index, layer in enumerate(self.model.layers):
            memory = None
            if caches is not None and lengths is not None:
                memory = [(c.layers[index], c.length, new) for c, new in zip(caches, lengths, strict=True)]
            x = layer(x, turn, places, memory)
        for cache, new in zip(caches or (), lengths or (), strict=True):
            cache.advance(new)
        return self.model.norm(x).view(*shape, -1)

    def logits(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Capped fp32 logits of hidden states: those of every position, or of the few that are wanted."""
        return head.logits(hidden, self.unembedding, self.config.final_softcap)

    def forward(self, ids: Int[Tensor, "B T"], places: Places | None = None) -> Float[Tensor, "B T V"]:
        """The capped logits of every position. For a loss over a large vocabulary, `hidden` with `losses`."""
        return self.logits(self.hidden(ids, places))

    def with_window(self, window: int) -> "Gemma":
        """The same weights, not copied, under another window of the local layers (report, Table 10)."""
        other = _twin(self)
        other.config = self.config.but(window=window)
        other.model = _twin(self.model)
        other.model.layers = nn.ModuleList(_twin(layer) for layer in self.model.layers)
        for layer in other.model.layers:
            layer.self_attn = _twin(layer.self_attn)
            if layer.self_attn.window is not None:
                layer.self_attn.window = window
        return other

    def compile_layers(self) -> "Gemma":
        """Compile layer by layer: local and global layers are two graphs, at any depth. No-op if we can't."""
        if can_compile():
            # All layers of all models share one counter; its default, 8, is one teacher and two students.
            torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
            for layer in self.model.layers:
                layer.compile()
        return self


class RewardModel(Gemma):
    """A Gemma 2 with a scalar head: what it thinks of a text, read at the text's last token.

    The layout is that of Hugging Face's `Gemma2ForSequenceClassification` with one label, and so are its
    scores. The head begins at zero: everything is worth the same.
    """

    hf_head: ClassVar[dict[str, Any]] = {
        "architectures": ["Gemma2ForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }

    def __init__(self, config: GemmaConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.d_model, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    @classmethod
    def of(cls, model: Gemma) -> "RewardModel":
        """A reward model on top of a language model, whose weights it takes over."""
        with torch.device("meta"):
            made = cls(model.config)
        made.model = model.model
        made.score = nn.Linear(model.config.d_model, 1, bias=False, device=model.device)
        nn.init.zeros_(made.score.weight)
        return made

    def scores(self, hidden: Float[Tensor, "*N D"]) -> Float[Tensor, "*N"]:
        """The scores of final hidden states, in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.score.weight.float())[..., 0]


def _twin(module: Any) -> Any:
    """A copy that shares parameters and submodules, and may be given others of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def packed(starts: Bool[Tensor, "B T"]) -> Places:
    """The places of a packed batch, told where documents start; positions count from there."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    return Places(index - torch.where(starts, index, 0).cummax(1).values, starts.cumsum(1))
