"""What cannot be merged is refused with a remedy, and before a folder is made."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from gemwright.merge import coefficients
from gemwright.merge.stage import run
from gemwright.model.checkpoint import WEIGHTS
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import RewardModel
from gemwright.tokenizer.tokenizer import Tokenizer
from tests.merge.cases import Make, config


def test_another_tokenizer_is_refused(make: Make, tmp_path: Path, small: GemmaConfig):
    from gemwright.tokenizer.train import TokenizerConfig, train

    one, other = make("one"), make("other", 1)
    texts = [f"another text number {n}, of other words like {n * 7} or w{n}" for n in range(400)]
    Tokenizer(train(texts, TokenizerConfig(vocab_size=650))).save(other)
    with pytest.raises(
        ValueError, match=r"the model .*other has another tokenizer than .*one .* Only models"
    ):
        run(config("linear"), tmp_path / "out", [one, other])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("window", 4), ("d_ff", 48), ("final_softcap", None)])
def test_another_config_is_refused_and_the_key_named(
    make: Make, tmp_path: Path, small: GemmaConfig, key: str, value: Any
):
    one, other = make("one"), make("other", 1, config=small.but(**{key: value}))
    with pytest.raises(ValueError, match=f"{key}: .* -> {value}. Only models that began as one"):
        run(config("linear"), tmp_path / "out", [one, other])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_missing_tensor_is_named_with_its_model(make: Make, tmp_path: Path, broken: int):
    models = [make(f"model-{seed}", seed) for seed in range(3)]
    tensors = load_file(models[broken] / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, models[broken] / WEIGHTS)
    wanted = f"model-{broken} lacks 1 of .* 'model.layers.1.mlp.up_proj.weight' first. Fetch it again"
    with pytest.raises(ValueError, match=wanted):
        run(config("linear"), tmp_path / "out", models)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_and_a_language_model_are_refused(make: Make, tmp_path: Path):
    one, other = make("one"), make("other", kind=RewardModel)
    with pytest.raises(ValueError, match=r"one is a Gemma and .*other a RewardModel. Merge like with like"):
        run(config("linear"), tmp_path / "out", [one, other])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "fields", "count", "has_base", "said"),
    [
        ("linear", {}, 1, False, "1 model is nothing to merge. Name two or more"),
        ("linear", {}, 0, False, "no model is nothing to merge. Name two or more"),
        ("slerp", {}, 0, True, "no model is nothing to merge. Name two or more"),
        ("linear", {"weights": [1]}, 2, False, "1 weights for 2 models. Give one a model"),
        ("task", {"weights": [1, 2, 3]}, 2, True, "3 weights for 2 models. Give one a model"),
        ("slerp", {}, 2, False, "no base is given, and slerp is about task vectors. Name the model"),
        ("task", {}, 2, False, "no base is given, and task is about task vectors. Name the model"),
        ("linear", {"eta": 0.5}, 2, False, "no base is given, and eta=0.5 goes there. Name the model"),
        ("linear", {}, 2, True, "linear with eta=1 does not use the base .* or set eta below 1"),
        ("ema", {}, 2, True, "ema with eta=1 does not use the base .* or set eta below 1"),
    ],
)
def test_models_weights_and_a_base_that_do_not_go_together_are_refused(
    tmp_path: Path, method: str, fields: dict[str, Any], count: int, has_base: bool, said: str
):
    models = [tmp_path / str(number) for number in range(count)]
    with pytest.raises(ValueError, match=said):
        run(config(method, **fields), tmp_path / "out", models, base=tmp_path / "base" if has_base else None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weights", [[-0.1, 1.1], [0, 0], []])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_shares_are_neither_negative_nor_all_nothing(method: str, weights: list[float]):
    with pytest.raises(ValueError, match=r"are no shares. Give numbers from 0, not all 0"):
        config(method, weights=weights)


def test_a_moving_average_takes_no_weights():
    with pytest.raises(ValueError, match=r"a moving average has no weights but mu. Leave them out"):
        config("ema", weights=[1, 2])


def test_the_defaults_are_those_of_the_paper():
    assert (config("ema").mu, config("slerp").eta, config("slerp").weights) == (0.01, 1.0, None)
    assert coefficients.moving_average(2, config("ema").mu) == [0.99, 0.01]
