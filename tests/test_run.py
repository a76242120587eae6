"""A stage's folder: run once, resumed after a kill, never mixed up with other work, never half written."""

import errno
import io
import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from gemwright import run
from gemwright.config import Config
from gemwright.run import RunFolder, fingerprint, read_card, read_metrics, run_stage


class Optim(Config):
    lr: float = 0.1


class Work(Config):
    steps: int = 3
    seed: int = 5
    optim: Optim = Optim()


class Killed(Exception):
    """Stands for whatever ends a stage before its time."""


def work(folder: RunFolder) -> dict[str, Any]:
    """A small stage that writes one file and counts how often it was run."""
    (folder.path / "model.bin").write_bytes(b"weights")
    folder.log(step=1, loss=2.0)
    return {"loss": 2.0}


def interrupted(folder: RunFolder) -> dict[str, Any]:
    folder.log(step=1)
    raise Killed


def never(folder: RunFolder) -> dict[str, Any]:
    pytest.fail("the stage's body was run although it should not be")


def test_a_card_says_who_made_the_folder_from_what_and_what_came_of_it(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("hello")
    card = run_stage(
        "train", Work(), tmp_path / "runs/a", work, inputs={"text": text}, facts={"python": "3.11"}
    )
    assert card == read_card(tmp_path / "runs/a")
    assert (card.stage, card.seed, card.finished, card.results) == ("train", 5, True, {"loss": 2.0})
    assert card.config == {"steps": 3, "seed": 5, "optim": {"lr": 0.1}}
    assert card.inputs == {
        "text": {"path": "../text.txt", "sha256": fingerprint(text)},
        "python": {"value": "3.11"},
    }
    assert card.code["gemwright"] == version("gemwright")


def test_a_stage_without_a_seed_has_none_on_its_card(tmp_path: Path):
    assert run_stage("convert", Optim(), tmp_path / "a", work).seed is None


def test_outputs_are_what_is_handed_on_and_nothing_private(tmp_path: Path):
    def busy(folder: RunFolder) -> dict[str, Any]:
        for name in ("shards/0.bin", "resume/state.bin", ".model.bin.partial-1"):
            run.write_text(folder.path / name, name)
        return work(folder)

    card = run_stage("train", Work(), tmp_path / "a", busy)
    assert sorted(card.outputs) == ["model.bin", "shards/0.bin"]
    assert card.outputs["model.bin"] == fingerprint(tmp_path / "a/model.bin")


def test_a_finished_stage_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first = run_stage("train", Work(), tmp_path / "a", work)
    assert run_stage("train", Work(), tmp_path / "a", never) == first
    assert "finished already" in capsys.readouterr().err


def test_the_next_step_is_told_once_the_stage_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_stage("train", Work(), tmp_path / "a", work, next_step="gemwright chat a")
    said = capsys.readouterr()
    assert said.err.endswith("Next: gemwright chat a\n")
    assert said.out == ""


def test_an_unfinished_stage_goes_on_in_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(Killed):
        run_stage("train", Work(), tmp_path / "a", interrupted)
    assert not read_card(tmp_path / "a").finished
    card = run_stage("train", Work(), tmp_path / "a", work)
    assert card.finished
    assert "going on in" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "a")) == 2


def test_seconds_count_the_work_before_a_kill(tmp_path: Path):
    with pytest.raises(Killed):
        run_stage("train", Work(), tmp_path / "a", interrupted)
    (tmp_path / "a/metrics.jsonl").write_text('{"step": 1, "elapsed_s": 100.0}\n')
    card = run_stage("train", Work(), tmp_path / "a", work)
    assert 100.0 <= card.seconds < 110.0
    assert read_metrics(tmp_path / "a")[-1]["elapsed_s"] >= 100.0


@pytest.mark.parametrize("before", [work, interrupted])
def test_another_config_is_refused_with_the_difference_and_the_remedy(tmp_path: Path, before: Any):
    with suppress(Killed):
        run_stage("train", Work(), tmp_path / "a", before)
    with pytest.raises(ValueError, match="other settings") as error:
        run_stage("train", Work(steps=9, optim=Optim(lr=0.2)), tmp_path / "a", never)
    assert "optim.lr: 0.1 -> 0.2; steps: 3 -> 9" in str(error.value)
    assert "--fresh" in str(error.value)


def test_another_stage_is_refused(tmp_path: Path):
    run_stage("train", Work(), tmp_path / "a", work)
    with pytest.raises(ValueError, match=r"holds the stage 'train', not 'merge'.*--out"):
        run_stage("merge", Work(), tmp_path / "a", never)


def test_a_changed_input_is_refused_by_name(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    run_stage("train", Work(), tmp_path / "a", work, inputs={"text": text})
    text.write_text("two")
    with pytest.raises(ValueError, match=r"input text: [0-9a-f]{64} -> [0-9a-f]{64}"):
        run_stage("train", Work(), tmp_path / "a", never, inputs={"text": text})


def test_a_changed_fact_and_a_further_input_are_refused(tmp_path: Path):
    run_stage("train", Work(), tmp_path / "a", work, facts={"python": "3.11"})
    with pytest.raises(ValueError, match=r"input python: 3\.11 -> 3\.12"):
        run_stage("train", Work(), tmp_path / "a", never, facts={"python": "3.12"})
    with pytest.raises(ValueError, match=r"input os: \(absent\) -> linux"):
        run_stage("train", Work(), tmp_path / "a", never, facts={"python": "3.11", "os": "linux"})


def test_an_input_may_move_as_long_as_its_content_stays(tmp_path: Path):
    (tmp_path / "text.txt").write_text("one")
    run_stage("train", Work(), tmp_path / "a", work, inputs={"text": tmp_path / "text.txt"})
    (tmp_path / "text.txt").rename(tmp_path / "moved.txt")
    assert run_stage("train", Work(), tmp_path / "a", never, inputs={"text": tmp_path / "moved.txt"}).finished


def test_a_missing_input_is_an_error_and_leaves_no_folder(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"does not exist\. Run the stage that makes it"):
        run_stage("train", Work(), tmp_path / "runs/a", never, inputs={"text": tmp_path / "nowhere"})
    assert not (tmp_path / "runs").exists()


def test_unfinished_work_is_no_input(tmp_path: Path):
    with pytest.raises(Killed):
        run_stage("tokenizer", Work(), tmp_path / "tok", interrupted)
    with pytest.raises(ValueError, match=r"is not finished: its stage \(tokenizer\) was interrupted"):
        run_stage("train", Work(), tmp_path / "a", never, inputs={"tokenizer": tmp_path / "tok"})


def test_fresh_moves_the_old_folder_aside_and_deletes_nothing(tmp_path: Path):
    for lr in (0.1, 0.2, 0.3):
        run_stage("train", Work(optim=Optim(lr=lr)), tmp_path / "a", work, fresh=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "a.old-1", "a.old-2"]
    lrs = [read_card(tmp_path / name).config["optim"]["lr"] for name in ("a.old-1", "a.old-2", "a")]
    assert lrs == [0.1, 0.2, 0.3]


def test_fresh_does_not_pull_the_folder_away_from_a_running_stage(tmp_path: Path):
    def outer(folder: RunFolder) -> dict[str, Any]:
        with pytest.raises(RuntimeError, match="another process works in"):
            run_stage("train", Work(), tmp_path / "a", never, fresh=True)
        return work(folder)

    assert run_stage("train", Work(), tmp_path / "a", outer).finished
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_no_stage_made_is_left_alone(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/thesis.tex").touch()
    with pytest.raises(ValueError, match="no stage of gemwright made it"):
        run_stage("train", Work(), tmp_path / "a", never)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_welcome_and_a_file_is_refused(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert run_stage("train", Work(), tmp_path / "a", work).finished
    (tmp_path / "b").touch()
    for fresh in (False, True):
        with pytest.raises(ValueError, match="is a file"):
            run_stage("train", Work(), tmp_path / "b", never, fresh=fresh)


HOLD = """
import sys, time
from pathlib import Path
from gemwright.config import Config
from gemwright.run import run_stage
class Work(Config):
    seed: int = 5
def hold(folder):
    folder.log(step=1)
    print("working", flush=True)
    time.sleep(60)
run_stage("train", Work(), Path(sys.argv[1]), hold)
"""


class Seed(Config):
    seed: int = 5


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "a")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    with holder, holder.stdout:
        assert holder.stdout.readline() == "working\n"
        with pytest.raises(RuntimeError, match=r"another process works in .*/a"):
            run_stage("train", Seed(), tmp_path / "a", never)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert run_stage("train", Seed(), tmp_path / "a", work).finished
    assert [row["step"] for row in read_metrics(tmp_path / "a")] == [1, 1]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"stage": "train"}', '{"unknown": 1}'])
def test_a_damaged_card_is_named_with_the_remedy(tmp_path: Path, content: str):
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(ValueError, match=r"card\.json is damaged .*--fresh"):
        read_card(tmp_path)


def test_a_card_of_other_bytes_than_text_is_damaged_too(tmp_path: Path):
    (tmp_path / "card.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="is damaged"):
        read_card(tmp_path)


def test_a_folder_without_a_card_is_not_our_work(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no card\.json"):
        read_card(tmp_path)


def test_metrics_come_back_as_they_were_logged(tmp_path: Path):
    folder = RunFolder(tmp_path)
    assert read_metrics(tmp_path) == []
    folder.log(step=1, loss=0.1 + 0.2, note="ж")
    folder.log(step=2)
    rows = read_metrics(tmp_path)
    assert [row.pop("elapsed_s") >= 0 for row in rows] == [True, True]
    assert rows == [{"step": 1, "loss": 0.1 + 0.2, "note": "ж"}, {"step": 2}]


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}'])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + torn)
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path, whole: str):
    """Once the next line was glued to the torn one: both were lost, and every later one with them."""
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "lo')
    folder = RunFolder(tmp_path)
    folder.log(step=2)
    folder.log(step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3][0 if whole else 1 :]


def test_rewind_drops_what_came_after_the_checkpoint(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.log(event="start")
    for step in (1, 2, 3):
        folder.log(step=step)
    folder.rewind(2)
    folder.log(step=3, again=True)
    assert [row.get("step") for row in read_metrics(tmp_path)] == [None, 1, 2, 3]
    assert read_metrics(tmp_path)[-1]["again"]


def test_an_atomic_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path: Path):
    path = tmp_path / "deep/a.txt"
    run.write_text(path, "old")

    def fail() -> None:
        with run.atomic(path) as partial:
            partial.write_text("half of the n")
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert path.read_text() == "old"
    assert [path.name for path in path.parent.iterdir()] == ["a.txt"]
    run.write_text(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_write_without_room_says_which_file_and_what_to_do(tmp_path: Path, number: int):
    path = tmp_path / "a.txt"
    run.write_text(path, "old")
    cause = OSError(number, "the disk is full")

    def fail() -> None:
        with run.atomic(path) as partial:
            partial.write_text("half of the n")
            raise cause

    with pytest.raises(OSError, match="no room to write") as caught:
        fail()
    assert str(path) in str(caught.value)
    assert "Free some space and run the same command again: what is finished stays." in str(caught.value)
    assert "the disk is full" in str(caught.value)
    assert caught.value.__cause__ is cause
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_that_is_not_about_room_comes_through_as_it_is(tmp_path: Path):
    with pytest.raises(PermissionError) as caught, run.atomic(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "not allowed")
    assert "room" not in str(caught.value)


def test_json_is_written_readable_in_every_script(tmp_path: Path):
    run.write_json(tmp_path / "a.json", {"word": "żółw"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "word": "żółw"\n}\n'
    with pytest.raises(TypeError):
        run.write_json(tmp_path / "a.json", {"word": object()})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"word": "żółw"}


def test_the_fingerprint_of_a_plain_folder_is_its_content_and_names(tmp_path: Path):
    for folder, name, content in (("a", "x", "1"), ("b", "x", "1"), ("c", "x", "2"), ("d", "y", "1")):
        run.write_text(tmp_path / folder / "sub" / name, content)
    a, b, c, d = (fingerprint(tmp_path / folder) for folder in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


def test_the_fingerprint_of_a_stages_folder_is_that_of_its_outputs(tmp_path: Path):
    """Not of its card, metrics or name: the same work done again, slower, is the same input."""
    run_stage("train", Work(), tmp_path / "a", work)
    run_stage("train", Work(), tmp_path / "b", work)
    run.write_text(tmp_path / "b/metrics.jsonl", "")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")


def test_outside_a_checkout_the_version_has_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert run.code_version() == {"gemwright": version("gemwright")}


def test_without_a_terminal_progress_is_a_line_at_the_end(capsys: pytest.CaptureFixture[str]):
    with run.progress("train", 4, unit="tok") as advance:
        for _ in range(4):
            advance(1, loss="2.5")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("gemwright: train: 100% ")
    assert "tok/s" in said
    assert said.endswith("loss 2.5\n")


def test_without_a_unit_progress_speaks_of_no_speed(capsys: pytest.CaptureFixture[str]):
    with run.progress("copy", 2, done=1) as advance:
        advance()
    assert capsys.readouterr().err == "gemwright: copy: 100% 0 s left\n"


def test_long_work_tells_its_speed_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    clock = iter(range(0, 1000, 25))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with run.progress("train", 1000, unit="tok") as advance:
        advance(250)
    assert "25%" in capsys.readouterr().err


def test_on_a_terminal_progress_is_a_bar_with_speed_and_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with RunFolder(tmp_path).progress("train", 4, done=2, unit="tok") as advance:
        advance(1, loss="2.5")
        advance(1)
    assert all(part in screen.getvalue() for part in ("train", "100%", "tok/s", "loss 2.5"))
