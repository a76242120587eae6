"""What each method makes of checkpoints, against the same done naively on tensors in memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemwright.merge import streams
from gemwright.merge.stage import run
from gemwright.model.checkpoint import WEIGHTS
from tests.merge.cases import BF16, FP32, Make, Weights, assert_close, assert_equal, config, summed


def test_linear_is_the_average(make: Make, weights: Weights, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(3)]
    run(config("linear"), tmp_path / "out", models)
    run(config("linear", weights=[3, 1, 4]), tmp_path / "weighted", models)
    parents = [weights(folder) for folder in models]
    assert_close(weights(tmp_path / "out"), summed([1 / 3] * 3, parents))
    assert_close(weights(tmp_path / "weighted"), summed([3 / 8, 1 / 8, 4 / 8], parents))


def test_an_average_of_bf16_is_that_of_fp32_rounded_once(make: Make, weights: Weights, tmp_path: Path):
    models = [make(str(seed), seed, dtype=BF16) for seed in range(2)]
    run(config("linear"), tmp_path / "out", models)
    wanted = summed([0.5, 0.5], [weights(folder) for folder in models])
    assert_equal(weights(tmp_path / "out"), {name: tensor.to(BF16) for name, tensor in wanted.items()})


def test_ema_is_its_loop(make: Make, weights: Weights, tmp_path: Path):
    models = [make(str(seed), seed) for seed in range(4)]
    run(config("ema", mu=0.3), tmp_path / "out", models)
    ema, *others = (weights(folder) for folder in models)
    for other in others:
        ema = {name: 0.7 * ema[name] + 0.3 * other[name] for name in ema}
    assert_close(weights(tmp_path / "out"), ema)


def test_task_adds_weighted_task_vectors_to_the_base(make: Make, weights: Weights, tmp_path: Path):
    base, *models = (make(str(seed), seed) for seed in range(3))
    run(config("task"), tmp_path / "plain", models, base=base)
    run(config("task", weights=[0.4, -0.3]), tmp_path / "out", models, base=base)
    parents = [weights(folder) for folder in (base, *models)]
    assert_close(weights(tmp_path / "plain"), summed([-1, 1, 1], parents))
    assert_close(weights(tmp_path / "out"), summed([1 - 0.1, 0.4, -0.3], parents))


def naive_slerp(start: Tensor, one: Tensor, other: Tensor, share: float) -> Tensor:
    """WARP's equation, of one layer as a vector."""
    one, other = one - start, other - start
    angle = torch.arccos(one @ other / one.norm() / other.norm())
    return start + (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / angle.sin()


def as_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each group of a checkpoint as one vector, in fp64."""
    found: dict[str, list[Tensor]] = {}
    for name in sorted(tensors):
        found.setdefault(streams.group(name), []).append(tensors[name].flatten().double())
    return {key: torch.cat(parts) for key, parts in found.items()}


def test_slerp_turns_each_layer_along_its_own_arc(make: Make, weights: Weights, tmp_path: Path):
    base, *models = (make(str(seed), seed) for seed in range(3))
    run(config("slerp", weights=[0.3, 0.7]), tmp_path / "out", models, base=base)
    start, one, other = (as_layers(weights(folder)) for folder in (base, *models))
    wanted = {key: naive_slerp(start[key], one[key], other[key], 0.7) for key in start}
    assert_close(as_layers(weights(tmp_path / "out")), wanted)


def test_three_models_are_two_arcs_one_after_the_other(make: Make, weights: Weights, tmp_path: Path):
    base, *models = (make(str(seed), seed) for seed in range(4))
    run(config("slerp"), tmp_path / "out", models, base=base)
    start, one, other, third = (as_layers(weights(folder)) for folder in (base, *models))
    wanted = {
        key: naive_slerp(start[key], naive_slerp(start[key], one[key], other[key], 1 / 2), third[key], 1 / 3)
        for key in start
    }
    assert_close(as_layers(weights(tmp_path / "out")), wanted)


def test_one_angle_for_all_layers_would_be_another_merge(
    make: Make, weights: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, *models = (make(str(seed), seed) for seed in range(3))
    run(config("slerp"), tmp_path / "out", models, base=base)
    by_layer = streams.products

    def of_all(*arguments: Any) -> dict[str, np.ndarray]:
        grams = by_layer(*arguments)
        return dict.fromkeys(grams, sum(grams.values(), np.zeros((2, 2))))

    monkeypatch.setattr(streams, "products", of_all)
    run(config("slerp"), tmp_path / "global", models, base=base)
    one, other = (as_layers(weights(tmp_path / name)) for name in ("out", "global"))
    apart = {key: float((one[key] - other[key]).abs().max()) for key in one}
    assert apart["model.norm.weight"] > 1e-2
    assert apart["layers.0"] > 1e-4


def test_slerp_keeps_the_length_of_the_task_vectors_and_linear_does_not(
    make: Make, weights: Weights, tmp_path: Path
):
    base = make("base")
    models = [make(str(seed), seed, step=0.1) for seed in (1, 2)]
    run(config("slerp"), tmp_path / "slerp", models, base=base)
    run(config("linear"), tmp_path / "linear", models)
    start = as_layers(weights(base))["layers.0"]

    def length(folder: Path) -> float:
        return float((as_layers(weights(folder))["layers.0"] - start).norm())

    assert length(tmp_path / "slerp") == pytest.approx(length(models[0]), rel=0.05)
    assert length(tmp_path / "linear") == pytest.approx(length(models[0]) * 0.5**0.5, rel=0.05)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("method", ["linear", "ema", "slerp"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_equal_models_merge_to_themselves(
    make: Make, weights: Weights, tmp_path: Path, method: str, dtype: torch.dtype, count: int
):
    """Where a weight is 0 and the base's is not, too: of 8 nothing is left for the base, and not 1e-16."""
    base, one = make("base", dtype=dtype), make("one", 1, dtype=dtype)
    tensors = load_file(one / WEIGHTS)
    tensors["model.norm.weight"][:8] = 0
    save_file(tensors, one / WEIGHTS, metadata={"format": "pt"})
    run(config(method), tmp_path / "out", [one] * count, base=base if method == "slerp" else None)
    assert_equal(weights(tmp_path / "out"), weights(one))


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("end", [0, 1])
def test_slerp_meets_its_ends(make: Make, weights: Weights, tmp_path: Path, dtype: torch.dtype, end: int):
    base, *models = (make(str(seed), seed, dtype=dtype) for seed in range(3))
    run(config("slerp", weights=[1 - end, end]), tmp_path / "out", models, base=base)
    assert_equal(weights(tmp_path / "out"), weights(models[end]))


def test_eta_is_the_line_from_the_base(make: Make, weights: Weights, tmp_path: Path):
    """At 0 the base and at 1 what it would be without; at 0.3, between them."""
    base, *models = (make(str(seed), seed) for seed in range(3))
    for eta in (0, 0.3, 1):
        run(config("slerp", eta=eta), tmp_path / f"eta={eta}", models, base=base)
    run(config("slerp"), tmp_path / "without", models, base=base)
    assert_equal(weights(tmp_path / "eta=0"), weights(base))
    assert_equal(weights(tmp_path / "eta=1"), weights(tmp_path / "without"))
    assert_close(
        weights(tmp_path / "eta=0.3"), summed([0.7, 0.3], [weights(base), weights(tmp_path / "without")])
    )


@pytest.mark.parametrize("method", ["linear", "ema", "task"])
def test_every_method_can_go_back_to_the_base(make: Make, weights: Weights, tmp_path: Path, method: str):
    base, *models = (make(str(seed), seed) for seed in range(3))
    whole = base if method == "task" else None
    run(config(method, mu=0.5), tmp_path / "whole", models, base=whole)
    run(config(method, mu=0.5, eta=0.25), tmp_path / "out", models, base=base)
    wanted = summed([0.75, 0.25], [weights(base), weights(tmp_path / "whole")])
    assert_close(weights(tmp_path / "out"), wanted)


def test_one_model_can_go_back_to_the_base_too(make: Make, weights: Weights, tmp_path: Path):
    base, one = make("base"), make("one", 1)
    run(config("linear", eta=0.3), tmp_path / "out", [one], base=base)
    assert_close(weights(tmp_path / "out"), summed([0.7, 0.3], [weights(base), weights(one)]))


def test_arithmetic_is_fp32_so_that_a_step_too_small_for_bf16_survives(
    make: Make, weights: Weights, tmp_path: Path
):
    """1e-4 of a weight is a thirtieth of what bf16 can tell apart."""
    base = make("base", dtype=BF16)
    one = make("one", 1, step=1e-4)
    run(config("linear", eta=0.5), tmp_path / "out", [one], base=base)
    start, end, found = (weights(folder) for folder in (base, one, tmp_path / "out"))
    name = "model.norm.weight"
    assert found[name].dtype == FP32
    wanted = start[name].float() + (end[name] - start[name].float()) / 2
    torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-7)
    assert not torch.equal(found[name].to(BF16).float(), found[name])


def test_bf16_parents_can_be_written_in_fp32_with_what_bf16_would_round_away(
    make: Make, weights: Weights, tmp_path: Path
):
    models = [make(str(seed), seed, dtype=BF16) for seed in range(2)]
    run(config("linear", weights=[1, 999], dtype="fp32"), tmp_path / "fp32", models)
    run(config("linear", weights=[1, 999]), tmp_path / "bf16", models)
    assert_close(weights(tmp_path / "fp32"), summed([0.001, 0.999], [weights(m) for m in models]))
    wide, narrow = weights(tmp_path / "fp32"), weights(tmp_path / "bf16")
    assert_equal(narrow, {name: tensor.to(BF16) for name, tensor in wide.items()})
    assert not any(torch.equal(wide[name], tensor.float()) for name, tensor in narrow.items())


@pytest.mark.parametrize(
    ("dtypes", "written"),
    [
        ([BF16, BF16], BF16),
        ([torch.float16, torch.float16], torch.float16),
        ([BF16, FP32], FP32),
        ([torch.float16, BF16], FP32),
        ([torch.float64, torch.float64], FP32),
    ],
)
def test_the_widest_format_is_written_up_to_fp32(
    make: Make, weights: Weights, tmp_path: Path, dtypes: list[torch.dtype], written: torch.dtype
):
    models = [make(str(seed), seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    card = run(config("linear"), tmp_path / "out", models)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {written}
    said = json.loads((tmp_path / "out" / "config.json").read_text())["dtype"]
    assert f"torch.{said}" == f"torch.{card.results['dtype']}" == str(written)
