"""`gemwright evaluate` and `gemwright plan`: their JSON, and the words for people."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.evaluate.perplexity import perplexity
from gemwright.generate.language_model import load


@pytest.fixture(scope="module")
def text(text_folder: Path) -> Path:
    return text_folder / "7.py"


def test_evaluate_gives_the_perplexity_of_a_text(
    gemwright: Callable[..., Any], teacher_folder: Path, text: Path
):
    said = gemwright("evaluate", teacher_folder, "--text", text, "--context", 40, "--json")
    assert said.code == 0, said.err
    told, loaded = json.loads(said.out), load(teacher_folder)
    expected = perplexity(
        loaded.model, loaded.require_tokenizer(), text.read_text(encoding="utf-8"), context=40
    )
    assert told["nats_per_token"] == pytest.approx(expected.nats_per_token, rel=1e-6)
    assert set(told) == {
        "model", "text", "window", "nats_per_token", "stderr", "perplexity", "bits_per_byte", "tokens",
        "bytes",
    }  # fmt: skip
    assert "scoring: 100%" in said.err


def test_evaluate_says_in_the_same_run_what_int8_loses(
    gemwright: Callable[..., Any], teacher_folder: Path, text: Path
):
    said = gemwright("evaluate", teacher_folder, "--text", text, "--quantize", "int8", "--json")
    told = json.loads(said.out)
    assert told["quantize"] == "int8"
    assert 0 < told["kl"] < 0.05
    assert told["nats_per_token_lost"] == pytest.approx(
        told["nats_per_token_quantized"] - told["nats_per_token"], abs=1e-9
    )
    assert 0 < told["stderr_lost"] < told["stderr"]
    assert {
        "perplexity_quantized",
        "bits_per_byte_quantized",
        "weight_bytes",
        "weight_bytes_quantized",
    } < set(told)


def test_evaluate_tells_people_in_two_lines(gemwright: Callable[..., Any], teacher_folder: Path, text: Path):
    said = gemwright("evaluate", teacher_folder, "--text", text, "--quantize", "int8")
    first, second = said.out.splitlines()
    assert "nats a token, perplexity " in first
    assert second.startswith("int8: perplexity ")
    assert "nats a token lost, KL 0.0" in second


def test_evaluate_takes_another_window(gemwright: Callable[..., Any], teacher_folder: Path, text: Path):
    told = [
        json.loads(gemwright("evaluate", teacher_folder, "--text", text, *window, "--json").out)
        for window in ((), ("--window", 8), ("--window", 3))
    ]
    assert [entry["window"] for entry in told] == [8, 8, 3]
    assert told[0]["nats_per_token"] == told[1]["nats_per_token"] != told[2]["nats_per_token"]


def test_plan_counts_a_size(gemwright: Callable[..., Any]):
    said = gemwright("plan", "27b", "--batch", 2, "--context", 8192, "--json")
    told = json.loads(said.out)
    assert (told["size"], told["precision"], told["batch"], told["context"]) == ("27b", "bf16", 2, 8192)
    assert told["parameters"] == 27_227_128_320
    assert told["kv_bytes"] == 2 * 2_315_255_808
    assert told["fits"] == (told["total_bytes"] <= told["available_bytes"])
    assert bool(told["remedies"]) != told["fits"]


def test_plan_counts_a_checkpoint(gemwright: Callable[..., Any], teacher_folder: Path):
    said = gemwright("plan", teacher_folder, "--precision", "fp32")
    assert said.out.startswith(f"{teacher_folder} in fp32, one sequence of 64 tokens\n")
    assert "  fits: " in said.out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("evaluate MODEL --text nowhere", "there is no text file nowhere"),
        ("evaluate MODEL --text TEXT --context 65", "not between 1 and the model's max_seq_len=64"),
        ("plan 3b", "there is no size '3b'"),
    ],
)
def test_a_mistake_is_one_sentence(
    gemwright: Callable[..., Any], teacher_folder: Path, text: Path, arguments: str, told: str
):
    said = gemwright(*arguments.replace("MODEL", str(teacher_folder)).replace("TEXT", str(text)).split())
    assert said.code == 2
    assert told in said.err
    assert "Traceback" not in said.err


def test_a_stride_shows_more_of_the_text(gemwright: Callable[..., Any], teacher_folder: Path, text: Path):
    told = [
        json.loads(
            gemwright("evaluate", teacher_folder, "--text", text, "--context", 32, *more, "--json").out
        )
        for more in ((), ("--stride", 32), ("--stride", 4))
    ]
    assert told[0]["tokens"] == told[1]["tokens"] == told[2]["tokens"]
    assert told[0]["nats_per_token"] == pytest.approx(told[1]["nats_per_token"], rel=1e-6)
    assert told[2]["nats_per_token"] != told[0]["nats_per_token"]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    rows = [{"question": f"def f{n}(", "choices": ["self", "x, y"], "answer": n % 2} for n in range(20)]
    path = tmp_path / "names.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"question": "q", "choices": ["a"], "answer": 0}])
    )
    return path


def test_evaluate_asks_a_benchmark(gemwright: Callable[..., Any], teacher_folder: Path, task: Path):
    said = gemwright("evaluate", teacher_folder, "--task", task, "--limit", 10, "--json")
    assert said.code == 0, said.err
    (score,) = json.loads(said.out)["scores"]
    assert (score["name"], score["questions"], score["left_out"]) == ("names", 10, {"one_choice": 1})
    assert 0 <= score["accuracy"]["low"] <= score["accuracy"]["value"] <= score["accuracy"]["high"] <= 1
    assert "names: 100%" in said.err


def test_evaluate_keeps_answers_and_does_not_ask_twice(
    gemwright: Callable[..., Any], teacher_folder: Path, task: Path, tmp_path: Path
):
    command = ("evaluate", teacher_folder, "--task", task, "--out", tmp_path / "out", "--json")
    first, second = (gemwright(*command) for _ in range(2))
    assert json.loads(first.out)["scores"] == json.loads(second.out)["scores"]
    assert "finished already" in second.err
    assert len((tmp_path / "out/names.jsonl").read_text().splitlines()) == 20


def test_evaluate_tells_what_is_known_by_heart(
    gemwright: Callable[..., Any], teacher_folder: Path, shards_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from gemwright.evaluate import memorization

    few = memorization.MemorizationConfig(samples=4, prompt_tokens=10, continuation_tokens=10)
    monkeypatch.setattr(memorization, "MemorizationConfig", lambda: few)
    said = gemwright("evaluate", teacher_folder, "--memorized", shards_folder, "--json")
    assert said.code == 0, said.err
    assert {"train", "held_out", "difference"} <= set(json.loads(said.out)["memorized"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "nothing to measure"),
        (("--judge", "j"), "a comparison needs all of --against, --judge, --prompts and --out"),
        (("--task", "nowhere.json"), "there is no benchmark file nowhere.json"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    gemwright: Callable[..., Any], teacher_folder: Path, options: tuple[str, ...], told: str
):
    said = gemwright("evaluate", teacher_folder, *options)
    assert said.code == 2
    assert told in said.err
    assert "Traceback" not in said.err
