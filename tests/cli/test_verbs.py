"""The verbs from text to a model that writes: one line of JSON for programs, one sentence for a mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.distill import pretrain
from gemwright.generate.language_model import load
from gemwright.run import read_card

SMALL = (
    "--size", "0.1m", "--steps", 3, "--batch-size", 2, "--seq-len", 16,
    "--set", "model.d_model=32", "--set", "model.d_ff=64", "--set", "model.window=8",
    "--set", "train.compile=false", "--set", "validation_tokens=200",
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(
    gemwright: Callable[..., Any], text_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The verbs one after the other, as a person would call them; what each of them said."""
    out = tmp_path_factory.mktemp("out")
    tokenizer, shards, teacher, student = (
        out / name for name in ("tokenizer", "shards", "teacher", "student")
    )
    json = ("--json",)
    return out, {
        "tokenizer": gemwright("tokenizer", "train", text_folder, "--size", 700, "--out", tokenizer, *json),
        "shards": gemwright("shards", text_folder, "--tokenizer", tokenizer, "--out", shards, *json),
        "pretrain": gemwright("pretrain", "--shards", shards, *SMALL, "--out", teacher, *json),
        "distill": gemwright(
            "distill", "--shards", shards, "--teacher", teacher, *SMALL, "--out", student, *json
        ),
        "generate": gemwright("generate", student, "def ", "--max-tokens", 5, "--seed", 3, *json),
    }  # fmt: skip


STAGES = ("tokenizer", "shards", "pretrain", "distill")


@pytest.mark.parametrize("verb", [*STAGES, "generate"])
def test_json_is_one_line_and_nothing_else_is_on_stdout(pipeline: tuple[Path, dict[str, Any]], verb: str):
    said = pipeline[1][verb]
    assert said.code == 0, said.err
    assert said.out.endswith("\n")
    assert said.out.count("\n") == 1
    assert isinstance(json.loads(said.out), dict)


@pytest.mark.parametrize(
    ("verb", "folder"), list(zip(STAGES, ("tokenizer", "shards", "teacher", "student"), strict=True))
)
def test_json_says_where_the_result_is_and_what_came_of_it(
    pipeline: tuple[Path, dict[str, Any]], verb: str, folder: str
):
    out, said = pipeline
    told, card = json.loads(said[verb].out), read_card(out / folder)
    assert told == {"out": str(out / folder), "seconds": card.seconds, **card.results}


def test_progress_and_the_next_step_are_told_on_stderr(pipeline: tuple[Path, dict[str, Any]]):
    assert "training: 100%" in pipeline[1]["distill"].err
    assert "Next: gemwright generate" in pipeline[1]["distill"].err


def test_the_student_is_that_of_the_options_and_settings(pipeline: tuple[Path, dict[str, Any]]):
    config = read_card(pipeline[0] / "student").config
    assert (config["model"]["d_model"], config["model"]["window"], config["model"]["vocab_size"]) == (
        32,
        8,
        700,
    )
    assert (config["train"]["steps"], config["train"]["batch_size"], config["train"]["seq_len"]) == (3, 2, 16)


def test_generate_gives_the_text_of_the_model(pipeline: tuple[Path, dict[str, Any]]):
    told = json.loads(pipeline[1]["generate"].out)
    assert told["text"] == load(pipeline[0] / "student").generate("def ", max_tokens=5, seed=3)
    assert set(told) == {"text", "tokens", "finish", "tokens_per_s", "accepted"}


def test_without_json_people_read_the_text_with_its_prompt_on_stdout(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any]
):
    said = gemwright("generate", pipeline[0] / "student", "def ", "--max-tokens", 5)
    assert (said.code, said.err) == (0, "")
    assert said.out == "def " + json.loads(pipeline[1]["generate"].out)["text"] + "\n"


def test_without_json_a_stage_says_in_one_line_how_it_went(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any]
):
    out = pipeline[0]
    again = ("distill", "--shards", out / "shards", "--teacher", out / "teacher", *SMALL)
    said = gemwright(*again, "--out", out / "student")
    assert said.code == 0
    assert "nats a token on held-out text" in said.out
    assert said.out.count("\n") == 1
    assert "is finished already" in said.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            "pretrain --shards OUT/nowhere --out OUT/a",
            "has no card.json: it is not the work of a gemwright stage",
        ),
        ("pretrain --shards OUT/shards --out OUT/a --size 3m", "there is no size '3m'. Did you mean '30m'?"),
        (
            "pretrain --shards OUT/shards --out OUT/a --set train.optim.lrr=1",
            "no setting 'lrr'. Did you mean 'lr'?",
        ),
        ("pretrain --shards OUT/shards --out OUT/a --set train", "is not of the form path=value"),
        ("pretrain --shards OUT/shards --out OUT/a --steps 0", "TrainConfig: steps: "),
        ("pretrain --shards OUT/shards --out OUT/a --seq-len 1000", "exceeds the model's max_seq_len=512"),
        ("pretrain --shards OUT/shards --out OUT/student", "holds the stage 'distill', not 'pretrain'"),
        ("distill --shards OUT/shards --teacher OUT/nobody --out OUT/a", "nobody does not exist"),
        ("tokenizer train OUT/nowhere --out OUT/a", "is not a folder. Give a folder that holds text files"),
        ("tokenizer train OUT/tokenizer --out OUT/a --size 10", "leaves no room for text"),
        ("shards OUT/tokenizer --tokenizer OUT/nowhere --out OUT/a", "nowhere"),
        ("generate OUT/nowhere x", "there is no folder"),
        ("generate OUT/student x --max-tokens 600", "exceed the model's max_seq_len"),
        ("generate OUT/student x --temperature nan", "Sampling: temperature: "),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_code_2(
    pipeline: tuple[Path, dict[str, Any]], gemwright: Callable[..., Any], arguments: str, told: str
):
    said = gemwright(*arguments.replace("OUT", str(pipeline[0])).split(), "--json")
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert said.err.startswith("gemwright: error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["foo"], "No such command 'foo'"),
        (["generate"], "Missing argument"),
        (["generate", "a", "b", "--max-token", "3"], "--max-tokens"),
        (["run", "desktop"], "'desktop' is not"),
        (["shards", "text"], "Missing option"),
    ],
)
def test_a_wrong_command_ends_with_code_2_and_says_what_is_wrong(
    gemwright: Callable[..., Any], arguments: list[str], told: str
):
    said = gemwright(*arguments)
    assert (said.code, said.out) == (2, "")
    assert told in said.err


def test_a_folder_that_may_not_be_written_is_a_mistake_and_no_traceback(
    gemwright: Callable[..., Any], pipeline: tuple[Path, dict[str, Any]], tmp_path: Path
):
    (tmp_path / "file").touch()
    said = gemwright("pretrain", "--shards", pipeline[0] / "shards", *SMALL, "--out", tmp_path / "file/a")
    assert (said.code, said.out) == (2, "")
    assert said.err.count("\n") == 1
    assert str(tmp_path / "file") in said.err


def test_who_interrupts_is_told_that_the_work_goes_on(
    pipeline: tuple[Path, dict[str, Any]],
    gemwright: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    again = ("pretrain", "--shards", pipeline[0] / "shards", *SMALL, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "train", interrupt)
        said = gemwright(*again)
    assert (said.code, said.out) == (130, "")
    assert "interrupted. The same command goes on with a stage where it stopped." in said.err
    assert "Traceback" not in said.err
    assert gemwright(*again).code == 0


def test_a_mistake_of_ours_is_not_hidden(gemwright: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    def broken(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError("not a person's fault")

    monkeypatch.setattr("gemwright.generate.language_model.load", broken)
    with pytest.raises(NotImplementedError):
        gemwright("generate", "model", "x")


def test_curated_text_goes_on_to_a_tokenizer_and_shards(
    gemwright: Callable[..., Any], text_folder: Path, tmp_path: Path
):
    curated, tokenizer = tmp_path / "curated", tmp_path / "tokenizer"
    said = gemwright(
        "curate", text_folder, "--set", "quality=null", "--workers", 1, "--out", curated, "--json"
    )
    result = json.loads(said.out)
    assert {"documents", "kept", "dropped", "seconds"} <= set(result)
    assert result["documents"] == result["kept"] + sum(result["dropped"].values())
    assert gemwright("tokenizer", "train", curated, "--size", 700, "--out", tokenizer).code == 0
    said = gemwright("shards", curated, "--tokenizer", tokenizer, "--out", tmp_path / "shards", "--json")
    assert json.loads(said.out)["held_out_tokens"] > 0


def test_prompts_say_what_was_kept_and_where_the_page_is(gemwright: Callable[..., Any], tmp_path: Path):
    (tmp_path / "log.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n{"prompt": "Hi"}\n{"a": 1}\n')
    said = gemwright("prompts", tmp_path / "log.jsonl", "--out", tmp_path / "out", "--workers", 1)
    assert "1 of 3 documents kept; dropped: 1 missing_key, 1 too_short" in said.out
    assert said.out.splitlines()[-1] == str(tmp_path / "out/report.html")
