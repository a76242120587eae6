"""What a model will cost: the counts by hand, against what is really held, and advice that is true."""

from pathlib import Path

import pytest
import torch

from gemwright.generate.engine import Session
from gemwright.generate.quantize import quantize, weight_bytes
from gemwright.model import checkpoint, cost
from gemwright.model.config import SIZES, Attention, GemmaConfig, size
from gemwright.model.gemma import Gemma
from gemwright.recipes import plan as module
from gemwright.recipes.plan import Plan, config_of, plan

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """`free(n)`: let the machine have so many bytes."""
    return lambda amount: monkeypatch.setattr(module, "available_memory", lambda device: amount)


def made(name: str, precision: module.Precision = "bf16", batch: int = 1, context: int | None = None) -> Plan:
    return plan(name, size(name), precision, batch=batch, context=context, device=CPU)


def test_27b_at_8192_tokens_is_what_one_counts_by_hand():
    """46 layers, half of them with a window of 4,096; 16 key heads of 128; 2 bytes a value."""
    found = made("27b")
    position = 2 * 16 * 128 * 2  # keys and values of one layer
    assert found.kv_bytes == position * 23 * (8192 + 4096) == 2_315_255_808
    assert found.kv_bytes_full == position * 46 * 8192 == 3_087_007_744
    assert found.parameters == 27_227_128_320
    assert found.embedding_parameters == 256_000 * 4608
    assert found.weights_bytes == 54_454_256_640
    matrices = 46 * (2 * 4608 * 32 * 128 + 2 * 4608 * 16 * 128 + 3 * 4608 * 36864)
    attention = 4 * 32 * 128 * 23 * (8192 + 4096)
    assert found.flops_per_token == 2 * (matrices + 256_000 * 4608) + attention == 59_083_063_296
    # A prompt's tokens see 4,096.5 keys on average in a global layer; at first fewer in a local one too.
    seen = 23 * 8192 * 8193 / 2 + 23 * (4096 * 4097 / 2 + 4096 * 4096)
    by_hand = 8192 * 2 * matrices + 2 * 256_000 * 4608 + 4 * 32 * 128 * seen
    assert found.flops_prefill == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("context", "share"), [(4096, 1.0), (8192, 0.75), (32_768, 0.5625)])
def test_2bs_rolling_cache_is_a_smaller_part_of_the_full_one_the_longer_the_text(context: int, share: float):
    found = made("2b", context=context)
    assert found.kv_bytes / found.kv_bytes_full == share


@pytest.mark.parametrize("length", [3, 20])
def test_keys_and_values_are_as_many_as_a_session_holds(tiny: GemmaConfig, length: int):
    session = Session(Gemma(tiny).eval())
    session._reserve = length
    session.feed([2] * length)
    session.advance()
    found = plan("tiny", tiny, "fp32", context=length, device=CPU)
    assert found.kv_bytes == session.cache.bytes
    wide = tiny.but(pattern=(Attention.GLOBAL,) * 2)
    assert found.kv_bytes_full == cost.kv_cache_bytes(wide, length, 4)


def test_weights_are_as_large_as_a_model_holds(tiny: GemmaConfig):
    model = Gemma(tiny)
    expected = {
        "fp32": weight_bytes(model),
        "bf16": weight_bytes(model.bfloat16()),
        "int8": weight_bytes(quantize(model)),
    }
    for precision in module.PRECISIONS:
        assert plan("tiny", tiny, precision, device=CPU).weights_bytes == expected[precision]


def test_a_batch_has_so_many_caches_and_one_set_of_weights():
    one, four = made("9b"), made("9b", batch=4)
    assert four.kv_bytes == 4 * one.kv_bytes
    assert four.kv_bytes_full == 4 * one.kv_bytes_full
    assert four.weights_bytes == one.weights_bytes


def test_fp32_holds_twice_the_bytes_of_bf16_and_int8_keeps_bf16s_cache():
    wide, narrow, int8 = (made("9b", precision) for precision in module.PRECISIONS)
    assert wide.weights_bytes == 2 * narrow.weights_bytes
    assert wide.kv_bytes == 2 * narrow.kv_bytes
    assert int8.kv_bytes == narrow.kv_bytes
    assert int8.weights_bytes < 0.6 * narrow.weights_bytes


def test_the_total_is_the_sum_and_on_a_gpu_int8_is_made_beside_bf16():
    found = made("9b", "int8")
    assert found.total_bytes == found.weights_bytes + found.kv_bytes + found.workspace_bytes
    gpu = module._total(size("9b"), "int8", 1, 8192, "cuda")
    assert gpu == module._weights(size("9b"), "int8", "cuda") + made("9b").weights_bytes


def test_the_default_context_is_the_models():
    assert made("6m").context == 2048
    assert made("2b").context == 8192


def test_what_fits_and_what_does_not_is_told_by_the_free_memory(free):
    total = made("2b").total_bytes
    free(total)
    assert made("2b").fits is True
    assert made("2b").remedies == ()
    free(total - 1)
    assert made("2b").fits is False
    free(None)
    assert made("2b").fits is None
    assert "this system does not tell" in made("2b").told()


def test_the_advice_is_true_and_the_most_that_is(free):
    free(made("2b", batch=4, context=8192).total_bytes - 1)
    (told,) = made("2b", batch=4).remedies
    assert told == "It would fit with --precision int8, or --batch 3, or --context 7936."
    assert made("2b", "int8", batch=4).fits
    assert made("2b", batch=3).fits
    assert made("2b", batch=4, context=7936).fits
    assert not made("2b", batch=4, context=8192).fits


def test_where_no_single_change_suffices_all_are_made(free):
    free(made("2b", "int8", context=1024).total_bytes)
    (told,) = made("2b", "fp32", batch=64).remedies
    assert told == "It would fit with --precision int8 --batch 1 --context 1024."


def test_where_nothing_suffices_a_smaller_size_is_named(free):
    free(made("1b", "int8").total_bytes)
    assert made("27b").remedies == (
        "No precision, batch or context makes it fit here; the largest size that does, in int8: 1b.",
    )
    free(1)
    assert "no size does" in made("27b").remedies[0]


def test_more_tokens_than_the_model_reads_are_counted_with_a_warning():
    assert made("2b").notes == ()
    (note,) = made("2b", context=32_768).notes
    assert "more than the model's max_seq_len=8,192: generation refuses them" in note


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_a_table_for_people(name: str):
    lines = made(name, "int8", batch=2).told().splitlines()
    assert lines[0].startswith(f"{name} in int8, 2 sequences of ")
    assert [line.split()[0] for line in lines[1:6]] == ["weights", "KV", "workspace", "total", "FLOPs"]


def test_a_checkpoints_folder_is_a_size_too(tiny: GemmaConfig, tmp_path: Path):
    checkpoint.save(Gemma(tiny), tmp_path)
    assert config_of(str(tmp_path)).to_hf() == tiny.to_hf()
    assert config_of("9b") == size("9b")


def test_what_is_neither_a_size_nor_a_folder_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"there is no size '3b'.* Or name the folder of a checkpoint"):
        config_of("3b")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        config_of(str(tmp_path))


@pytest.mark.parametrize("options", [{"batch": 0}, {"context": 0}])
def test_less_than_one_of_anything_is_refused(options: dict[str, int]):
    with pytest.raises(ValueError, match="must be at least 1"):
        plan("2b", size("2b"), **options)
