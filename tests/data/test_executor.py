"""Tasks run once, wherever they run; what is finished stays finished."""

import os
import stat
import sys
from pathlib import Path

import pytest

from gemwright.curate import steps
from gemwright.data.executor import ExecutorConfig, execute
from gemwright.filters.unsafe import UnsafeConfig

TASKS = 3


def pipeline(folder: Path) -> list:
    """Copies the documents of each task, from `in` to `out`."""
    return [steps.Documents(folder / "in"), steps.writer(folder / "out")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One document for each of three tasks."""
    for rank in range(TASKS):
        with steps.writer(tmp_path / "in") as writer:
            writer.write(steps.Document(f"text {rank}", str(rank), metadata={"source": "s"}), rank)
    return tmp_path


def written(folder: Path) -> list[str]:
    paths = [folder / "out" / f"{rank:05d}.jsonl.zst" for rank in range(TASKS)]
    return [row["text"] for path in paths for row in steps.curated.read_rows(path)]


def run(folder: Path, config: ExecutorConfig) -> None:
    execute(pipeline(folder), TASKS, folder / "tasks", config, "copying")


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_writes_its_own_file(folder: Path, workers: int):
    run(folder, ExecutorConfig(workers=workers))
    assert written(folder) == ["text 0", "text 1", "text 2"]


def test_a_finished_task_is_not_run_again(folder: Path):
    run(folder, ExecutorConfig(workers=1))
    (folder / "out" / "00001.jsonl.zst").unlink()
    run(folder, ExecutorConfig(workers=1))
    assert not (folder / "out" / "00001.jsonl.zst").exists()


def test_a_task_without_its_marker_is_run_again_alone(folder: Path):
    run(folder, ExecutorConfig(workers=1))
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    (folder / "tasks" / "completions" / "00001").unlink()
    run(folder, ExecutorConfig(workers=1))
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["00001.jsonl.zst"]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_task_that_fails_raises_its_own_error_and_leaves_no_marker(folder: Path, workers: int):
    (folder / "in" / "00002.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(Exception, match=r"(?i)zstd|frame"):
        run(folder, ExecutorConfig(workers=workers))
    assert not (folder / "tasks" / "completions" / "00002").exists()


def test_people_see_the_progress_and_nothing_of_the_library(folder: Path, capfd: pytest.CaptureFixture[str]):
    run(folder, ExecutorConfig(workers=2))
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("gemwright: copying:") for line in lines)


def test_without_slurm_the_error_says_where_to_run_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ValueError, match="login node"):
        run(folder, ExecutorConfig(kind="slurm", partition="cpu"))


@pytest.fixture
def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand-ins for Slurm's commands: sbatch runs all tasks of an array, and the queue is empty then."""
    script = f"""#!{sys.executable}
import os, re, subprocess, sys
text = open(sys.argv[-1]).read()
with open({str(folder / "submitted")!r}, "a") as log:
    log.write(text)
if found := re.search(r"--array=0-(\\d+)", text):
    for number in range(int(found[1]) + 1):
        names = {{"SLURM_ARRAY_TASK_ID": str(number), "SLURM_NODELIST": "here"}}
        subprocess.run(["bash", sys.argv[-1]], env=os.environ | names, capture_output=True)
print("Submitted batch job 7")
"""
    commands = {
        "sbatch": script,
        "srun": '#!/bin/bash\nshift 3\nexec "$@"\n',  # after -l -n 1
        "squeue": "#!/bin/bash\n",
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, text in commands.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("gemwright.data.executor._POLL_S", {"slurm": 0.1})
    return folder


def test_slurm_needs_a_partition(slurm: Path):
    with pytest.raises(ValueError, match="partition"):
        run(slurm, ExecutorConfig(kind="slurm"))


def test_slurm_jobs_run_every_task_and_the_call_waits_for_them(slurm: Path):
    run(slurm, ExecutorConfig(kind="slurm", partition="cpu", memory_gb=3))
    assert written(slurm) == ["text 0", "text 1", "text 2"]
    submitted = (slurm / "submitted").read_text()
    assert "--partition=cpu" in submitted
    assert "--mem-per-cpu=3G" in submitted


def test_slurm_tasks_that_fail_are_an_error_that_names_the_logs(slurm: Path):
    (slurm / "in" / "00002.jsonl.zst").write_bytes(b"no zstd")
    with pytest.raises(RuntimeError, match=r"1 of 3 tasks failed on slurm.*logs"):
        run(slurm, ExecutorConfig(kind="slurm", partition="cpu"))


def test_without_ray_the_error_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"gemwright\[ray\]"):
        run(folder, ExecutorConfig(kind="ray"))


def test_on_ray_every_task_writes_the_same_file(folder: Path):
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    try:
        run(folder, ExecutorConfig(kind="ray", workers=2, memory_gb=1))
    finally:
        ray.shutdown()
    assert written(folder) == ["text 0", "text 1", "text 2"]


def test_a_config_of_filters_is_a_key_of_the_builders_of_a_worker():
    """Each worker process builds a filter once, by its config: equal configs must be one key."""
    assert hash(UnsafeConfig()) == hash(UnsafeConfig())
