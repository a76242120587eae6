"""Labelling, checking what was labelled, and learning from it, as a person would at the command line."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gemwright.run import read_card
from gemwright.targets.store import Targets

LABEL = (
    "--samples", 6, "--seq-len", 16, "--max-tokens", 1_600, "--set", "windows_per_file=25",
    "--set", "compile=false",
)  # fmt: skip
SMALL = (
    "--size", "0.1m", "--steps", 3, "--batch-size", 2, "--set", "model.d_model=32", "--set", "model.d_ff=64",
    "--set", "model.window=8", "--set", "train.compile=false", "--set", "validation_tokens=200",
)  # fmt: skip


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outs")


@pytest.fixture(scope="module")
def said(gemwright: Callable[..., Any], outs: Path, teacher_folder: Path, shards_folder: Path) -> Any:
    return gemwright("label", teacher_folder, shards_folder, "--out", outs / "targets", *LABEL, "--json")


@pytest.fixture
def targets(said: Any, outs: Path) -> Path:
    assert said.code == 0, said.err
    return outs / "targets"


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to a program this is a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_one_line(said: Any) -> dict[str, Any]:
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    assert said.out.endswith("\n")
    return json.loads(said.out)


def test_label_tells_in_one_line_of_json_what_was_stored(said: Any, targets: Path):
    card = read_card(targets)
    assert in_one_line(said) == {"out": str(targets), "seconds": card.seconds, **card.results}
    assert "Next: gemwright distill --targets" in said.err


def test_labels_options_reach_the_config(targets: Path):
    config = read_card(targets).config
    assert (config["samples"], config["seq_len"], config["max_tokens"]) == (6, 16, 1_600)
    assert (config["kind"], config["windows_per_file"]) == ("stratified", 25)


def test_label_tells_people_tokens_ids_bytes_and_mass(
    gemwright: Callable[..., Any], targets: Path, teacher_folder: Path, shards_folder: Path
):
    said = gemwright("label", teacher_folder, shards_folder, "--out", targets, *LABEL)
    assert said.code == 0
    assert f"{targets}: 1,600 tokens, " in said.out
    assert "of the teacher's mass" in said.out
    assert said.out.count("\n") == 1
    assert "is finished already" in said.err


def test_label_keeps_the_largest_where_that_is_asked_for(
    gemwright: Callable[..., Any], teacher_folder: Path, shards_folder: Path, tmp_path: Path
):
    told = in_one_line(
        gemwright(
            "label",
            teacher_folder,
            shards_folder,
            "--out",
            tmp_path / "top",
            *LABEL,
            "--kind",
            "top-k",
            "--json",
        )
    )
    assert told["ids_a_token"] == 6
    assert Targets.open(tmp_path / "top").manifest.kind == "top-k"


def test_verify_reads_everything_and_tells_how_much_it_was(gemwright: Callable[..., Any], targets: Path):
    told = in_one_line(gemwright("targets", "verify", targets, "--json"))
    size = sum(path.stat().st_size for path in targets.glob("*.targets"))
    assert told == {"folder": str(targets), "files": 4, "bytes": size}
    said = gemwright("targets", "verify", targets)
    assert said.out == f"{targets}: 4 files, {size:,} bytes, as they were written\n"


def test_verify_finds_a_flipped_bit_and_names_the_file(
    gemwright: Callable[..., Any], targets: Path, tmp_path: Path
):
    shutil.copytree(targets, tmp_path / "targets")
    path = tmp_path / "targets/train-00002.targets"
    data = bytearray(path.read_bytes())
    data[33] ^= 4
    path.write_bytes(data)
    said = gemwright("targets", "verify", tmp_path / "targets", "--json")
    assert (said.code, said.out) == (2, "")
    assert f"gemwright: error: {path} is damaged: its SHA-256 has changed" in said.err


def test_a_student_needs_the_targets_alone(gemwright: Callable[..., Any], targets: Path, tmp_path: Path):
    """The shards, seq_len and the labelled subset are those of the targets."""
    out = tmp_path / "student"
    told = in_one_line(gemwright("distill", "--targets", targets, "--out", out, *SMALL, "--json"))
    card = read_card(out)
    assert told == {"out": str(out), "seconds": card.seconds, **card.results}
    assert (card.config["train"]["seq_len"], card.config["max_tokens"]) == (16, 1_600)
    assert (card.stage, sorted(card.inputs)) == ("distill", ["shards", "targets"])
    assert {"student_entropy", "mass_covered"} <= set(told)


def test_an_objective_is_set_like_any_other_setting(
    gemwright: Callable[..., Any], targets: Path, teacher_folder: Path, shards_folder: Path, tmp_path: Path
):
    """A divergence that the targets cannot serve needs the teacher itself."""
    objective = ("--set", "objective.beta=0.5", "--set", "objective.temperature=2")
    said = gemwright("distill", "--targets", targets, "--out", tmp_path / "a", *SMALL, *objective)
    assert said.code == 2
    assert "or let the teacher run along" in said.err
    along = ("--teacher", teacher_folder, "--shards", shards_folder, "--seq-len", 16)
    told = gemwright("distill", *along, "--out", tmp_path / "a", *SMALL, *objective, "--json")
    assert in_one_line(told)["out"] == str(tmp_path / "a")
    assert read_card(tmp_path / "a").config["objective"]["beta"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("distill --out OUT/a", "give --targets, or --teacher together with --shards"),
        ("distill --out OUT/a --targets OUT/targets --teacher TEACHER --shards SHARDS", "from one teacher"),
        ("distill --out OUT/a --teacher TEACHER", "give --targets, or --teacher together with --shards"),
        ("distill --out OUT/a --targets OUT/nowhere", "has no card.json"),
        ("distill --out OUT/a --targets SHARDS", "is the work of another stage, 'shards'"),
        ("distill --out OUT/a --targets OUT/targets --seq-len 32", "train.seq_len=16, or label again"),
        ("distill --out OUT/a --targets OUT/targets --set max_tokens=null", "Set max_tokens=1600"),
        ("label TEACHER OUT/nowhere --out OUT/a", "has no card.json"),
        ("label OUT/nobody SHARDS --out OUT/a", "nobody"),
        ("label TEACHER SHARDS --out OUT/a --seq-len 65", "exceeds the teacher's max_seq_len=64"),
        (
            "label TEACHER SHARDS --out OUT/a --seq-len 16 --kind top-k --samples 701",
            "the top 701 of 700 pieces",
        ),
        ("label TEACHER SHARDS --out OUT/a --samples 0", "LabelConfig: samples: "),
        ("label TEACHER SHARDS --out OUT/targets --seq-len 16", "--fresh to move the old folder aside"),
        ("targets verify SHARDS", "is the work of another stage, 'shards'"),
        ("targets verify OUT/nowhere", "has no card.json"),
        ("ablate target --out OUT/a", "there is no study 'target'. Did you mean 'targets'?"),
        ("ablate merging --runs OUT/nowhere --out OUT/a", "`gemwright run laptop --full` makes one"),
        ("ablate window --recipe workstation --out OUT/a", "needs your text: --corpus"),
    ],
)
def test_a_mistake_is_one_sentence_on_stderr_and_exit_code_2(
    gemwright: Callable[..., Any], targets: Path, teacher_folder: Path, shards_folder: Path, outs: Path,
    arguments: str, told: str,
):  # fmt: skip
    names = {"OUT": outs, "TEACHER": teacher_folder, "SHARDS": shards_folder}
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    said = gemwright(*arguments.split(), "--json")
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert "gemwright: error: " in said.err
    assert "Traceback" not in said.err
    assert not (outs / "a/card.json").exists()


def test_a_kind_that_there_is_not_is_refused(gemwright: Callable[..., Any]):
    said = gemwright("label", "teacher", "shards", "--out", "a", "--kind", "best")
    assert (said.code, said.out) == (2, "")
    assert "'best' is not" in said.err


def test_a_full_disk_is_one_line_and_what_is_finished_stays(
    gemwright: Callable[..., Any], targets: Path, teacher_folder: Path, shards_folder: Path, outs: Path
):
    """The others are there already, as after a kill, and there is no room for the last but one."""
    files, out = sorted(targets.glob("*.targets")), outs / "full"
    full = len(files) - 2
    shutil.copytree(targets, out)
    (out / "manifest.json").unlink()
    (out / files[full].name).unlink()
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    (out / "card.json").write_text(json.dumps(card | {"finished": False}), encoding="utf-8")
    command = ("label", teacher_folder, shards_folder, "--out", out, *LABEL, "--json")
    with room_for(files[full].stat().st_size - 1):
        said = gemwright(*command)
    assert (said.code, said.out) == (2, "")
    (line,) = [line for line in said.err.splitlines() if "error" in line]
    assert line.startswith(f"gemwright: error: no room to write {out / files[full].name} (")
    assert line.endswith("Free some space and run the same command again: what is finished stays.")
    assert "Traceback" not in said.err
    stayed = {path.name: path.stat().st_mtime_ns for path in out.glob("*.targets")}
    assert sorted(stayed) == [path.name for path in files if path != files[full]]
    assert not list(out.glob(".*.partial-*"))
    in_one_line(gemwright(*command))
    for path in files:
        assert (out / path.name).read_bytes() == path.read_bytes()
    assert {name: (out / name).stat().st_mtime_ns for name in stayed} == stayed
    assert (out / "manifest.json").read_bytes() == (targets / "manifest.json").read_bytes()
