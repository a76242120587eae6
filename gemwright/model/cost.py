"""What a model costs, counted from its config: parameters, FLOPs a token, bytes of KV cache.

The closed form of the parameters equals the report's Table 2 to the last digit (with its 256,128 rows).
"""

from gemwright.model.config import Attention, GemmaConfig


def embedding_parameters(config: GemmaConfig) -> int:
    """Rows times width; tied, so counted once (report, Table 2)."""
    return config.vocab_size * config.d_model


def non_embedding_parameters(config: GemmaConfig) -> int:
    """Everything else: q and o, k and v, gate, up and down, four norms a layer, one final norm; no biases."""
    d, size = config.d_model, config.head_dim
    attention = 2 * d * config.num_heads * size + 2 * d * config.num_kv_heads * size
    return config.num_layers * (attention + 3 * d * config.d_ff + 4 * d) + d


def parameters(config: GemmaConfig) -> int:
    """All of them."""
    return embedding_parameters(config) + non_embedding_parameters(config)


def forward_flops(config: GemmaConfig, seq_len: int) -> float:
    """FLOPs a token of a forward pass over `seq_len` tokens.

    2 a weight (head included), and attention's two products.
    """
    keys = (
        _mean_keys(seq_len, config.window if kind is Attention.LOCAL else seq_len) for kind in config.pattern
    )
    return _flops(config, sum(keys))


def decode_flops(config: GemmaConfig, length: int) -> float:
    """FLOPs of the pass that reads token number `length` of a text, the earlier ones being in the cache."""
    return _flops(config, float(_held(config, length)))


def kv_cache_bytes(config: GemmaConfig, length: int, bytes_a_value: int) -> int:
    """Keys and values held after reading `length` tokens: local layers hold `window` positions at most."""
    return 2 * _held(config, length) * config.num_kv_heads * config.head_dim * bytes_a_value


def full_kv_cache_bytes(config: GemmaConfig, length: int, bytes_a_value: int) -> int:
    """The same if local layers kept every position too: what a rolling cache saves is the difference."""
    return 2 * config.num_layers * length * config.num_kv_heads * config.head_dim * bytes_a_value


def _flops(config: GemmaConfig, keys: float) -> float:
    """Of a token that looks at so many keys, all layers together."""
    matrices = non_embedding_parameters(config) - (4 * config.num_layers + 1) * config.d_model
    return 2.0 * (matrices + embedding_parameters(config)) + 4.0 * keys * config.num_heads * config.head_dim


def _held(config: GemmaConfig, length: int) -> int:
    """Positions that the layers hold, and the newest token sees, after `length` tokens: all layers' sum."""
    return sum(min(length, config.window) if kind is Attention.LOCAL else length for kind in config.pattern)


def _mean_keys(seq_len: int, window: int) -> float:
    """Keys that a query sees on average over a sequence, its own included: min(q + 1, window)."""
    window = min(window, seq_len)
    return (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
