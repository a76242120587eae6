"""The numbers of Gemma 2: the report's tables, counted models, and Hugging Face's config.json both ways."""

import itertools
from typing import Any

import pytest
import torch

from gemwright.model import cost
from gemwright.model.config import SIZES, Attention, GemmaConfig, alternating, size
from gemwright.model.gemma import Gemma

LOCAL, GLOBAL = Attention.LOCAL, Attention.GLOBAL
TABLE_2 = {
    "2b": (590_118_912, 2_024_517_888),
    "9b": (917_962_752, 8_324_201_984),
    "27b": (1_180_237_824, 26_047_480_320),
}
HUGGING_FACE = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}
TINY = GemmaConfig(
    d_model=24, d_ff=40, num_heads=4, num_kv_heads=2, head_dim=8, pattern=alternating(3), vocab_size=50,
    query_pre_attn_scalar=6, window=5, max_seq_len=64,
)  # fmt: skip
# What google/gemma-2-9b-it was first released with, early spellings included.
RELEASED_9B: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "gemma2",
    "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8, "pad_token_id": 0,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "sliding_window_size": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
    "use_cache": True, "vocab_size": 256000,
}  # fmt: skip


def hf(**changes: Any) -> dict[str, Any]:
    """TINY's config.json with some keys changed; `...` takes a key out."""
    data = TINY.to_hf() | changes
    return {key: value for key, value in data.items() if value is not ...}


@pytest.mark.parametrize("name", TABLE_2)
def test_parameter_counts_equal_the_reports_table_2_to_the_last_digit(name: str):
    config = size(name).but(vocab_size=256_128)
    assert (cost.embedding_parameters(config), cost.non_embedding_parameters(config)) == TABLE_2[name]


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_parameter_counts_equal_the_released_checkpoints(name: str):
    assert cost.parameters(size(name)) == HUGGING_FACE[name]


@pytest.mark.parametrize("name", SIZES)
def test_the_closed_form_counts_what_a_built_model_holds(name: str):
    with torch.device("meta"):
        model = Gemma(size(name))
    held = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert sum(held.values()) == cost.parameters(size(name))
    assert held["model.embed_tokens.weight"] == cost.embedding_parameters(size(name))


@pytest.mark.parametrize("name", [name for name in SIZES if name not in HUGGING_FACE])
def test_a_small_size_is_named_by_its_non_embedding_parameters(name: str):
    unit = {"m": 1e6, "b": 1e9}[name[-1]]
    assert cost.non_embedding_parameters(size(name)) / unit == pytest.approx(float(name[:-1]), rel=0.35)


@pytest.mark.parametrize("name", SIZES)
def test_the_first_layer_is_local_and_the_last_is_global(name: str):
    pattern = size(name).pattern
    assert pattern[:2] == (LOCAL, GLOBAL)
    assert pattern[-1] is GLOBAL
    assert all(here is not there for here, there in itertools.pairwise(pattern))


def test_query_scales_are_a_sixteenth_and_for_27b_a_twelfth():
    assert size("2b").query_scale == size("9b").query_scale == 1 / 16
    assert size("27b").query_scale == 1 / 12
    assert size("27b").query_pre_attn_scalar == size("27b").d_model / size("27b").num_heads


def test_the_reports_caps_window_and_span_are_the_defaults():
    for name in HUGGING_FACE:
        config = size(name)
        assert (config.attn_softcap, config.final_softcap) == (50.0, 30.0)
        assert (config.window, config.max_seq_len) == (4096, 8192)


def test_an_unknown_size_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"no size '27bb'. Did you mean '27b'\? All: .*9b"):
        size("27bb")


def test_query_heads_that_key_heads_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        TINY.but(num_kv_heads=3)


def test_an_odd_head_cannot_turn_in_pairs():
    with pytest.raises(ValueError, match="head_dim"):
        TINY.but(head_dim=7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": alternating(1)},
        {"pattern": alternating(5)},
        {"pattern": (GLOBAL, GLOBAL, LOCAL)},
        {"query_pre_attn_scalar": 14.25},
        {"num_kv_heads": 4},
        {"attn_softcap": None, "final_softcap": None},
        {"attn_softcap": 13.5, "final_softcap": 7.0, "rope_theta": 500.0, "rms_norm_eps": 1e-5},
    ],
    ids=str,
)
def test_a_config_comes_back_from_hugging_faces_form_as_it_was(changes: dict[str, Any]):
    config = TINY.but(**changes)
    assert GemmaConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", SIZES)
def test_every_named_size_survives_the_round_trip(name: str):
    assert GemmaConfig.from_hf(size(name).to_hf()) == size(name)


def test_a_whole_query_scalar_is_written_as_an_int_and_a_fraction_as_it_is():
    assert isinstance(TINY.to_hf()["query_pre_attn_scalar"], int)
    assert TINY.but(query_pre_attn_scalar=14.25).to_hf()["query_pre_attn_scalar"] == 14.25


def test_a_config_as_first_released_loads():
    """It has rope_theta on top, no layer_types, both names of the activation and the window twice."""
    assert GemmaConfig.from_hf(RELEASED_9B) == size("9b")


def test_a_config_of_a_newer_transformers_loads():
    """It keeps rope_theta inside rope_parameters and adds keys that say nothing new."""
    data = hf(
        rope_theta=..., rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        use_bidirectional_attention=None, transformers_version="5.23.0", dtype="float32",
    )  # fmt: skip
    assert GemmaConfig.from_hf(data) == TINY.but(rope_theta=500.0)


def test_a_config_without_layer_types_alternates():
    assert GemmaConfig.from_hf(hf(layer_types=...)).pattern == (LOCAL, GLOBAL, LOCAL)


def test_a_chat_model_that_also_ends_on_end_of_turn_loads():
    """google/gemma-2-2b-it says so in its config.json; no logit depends on it."""
    assert GemmaConfig.from_hf(hf(eos_token_id=[1, 107])) == TINY


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sliding_windows": 3}, "unknown key 'sliding_windows'. Did you mean 'sliding_window"),
        ({"sliding_window": ...}, "lacks sliding_window"),
        ({"final_logit_softcapping": ...}, "lacks final_logit_softcapping"),
        ({"num_hidden_layers": ...}, "lacks num_hidden_layers"),
        ({"attention_bias": True}, "attention_bias=True; Gemma 2 has False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; Gemma 2 has True"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu'; Gemma 2 has 'gelu_pytorch_tanh'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True; Gemma 2 has False"),
        ({"sliding_window_size": 6}, "sliding_window_size=6; Gemma 2 has 5"),
        ({"eos_token_id": 7}, "eos_token_id=7"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "scaled RoPE"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "scaled RoPE"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "scaled RoPE"),
        ({"layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
        ({"layer_types": ["full_attention", "chunked", "full_attention"]}, "pattern.1"),
        ({"model_type": "gemma3_text"}, "model_type is 'gemma3_text'"),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_size": "24"}, "d_model"),
        ({"sliding_window": 0}, "window"),
        ({"attn_logit_softcapping": 0.0}, "attn_softcap"),
    ],
    ids=str,
)
def test_a_config_of_another_model_is_refused_with_a_reason(changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        GemmaConfig.from_hf(hf(**changes))
