"""Where the tasks of a stage run: on this machine, on Ray, or on Slurm, by one word of config.

A pipeline is a list of datatrove steps, and a task is one rank of it: it reads its share of the input and
writes files of its own. datatrove's executors do the work; added here is what a stage of ours needs: the call
returns when every task is finished, with a progress bar until then, and a task that failed is an error that
says where. A finished task leaves a marker below the stage's folder and is never run again.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.executor.ray import RayPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from loguru import logger
from pydantic import PositiveInt

from gemwright.config import Config
from gemwright.run import naming_lack_of_room, progress, say

_POLL_S = {"local": 0.2, "ray": 0.5, "slurm": 10.0}


class ExecutorConfig(Config):
    """Where tasks run. It changes nothing in what they write, so no folder depends on it."""

    kind: Literal["local", "ray", "slurm"] = "local"
    """Processes of this machine, a Ray cluster (`RAY_ADDRESS`, or one started here), or Slurm jobs."""
    workers: PositiveInt | None = None
    """Tasks at once; by default as many as this machine has cores, or as the cluster allows."""
    memory_gb: PositiveInt = 2
    """What Ray and Slurm reserve for a task."""
    partition: str | None = None
    """Slurm's partition."""
    time: str = "24:00:00"
    """Slurm's limit for a task."""


LOCAL = ExecutorConfig()
"""This machine, all cores."""


class _Local(LocalPipelineExecutor):
    """datatrove's local executor without its manager process.

    That one is forked, so it would hold our folder's lock and live on after a kill. And here a worker that
    is killed, as for want of memory, is an error, where the library would wait for it for ever.
    """

    def run(self) -> None:
        """Run what is not finished: in this process with one worker, else in as many others."""
        ranks = self.get_incomplete_ranks()
        if not ranks:
            return
        if self.workers == 1:
            for rank in ranks:
                deepcopy(self)._run_for_rank(rank, 1)
            return
        start = multiprocessing.get_context("forkserver")
        with ProcessPoolExecutor(min(self.workers, len(ranks)), start, _set_up, (self,)) as pool:
            try:
                for task in as_completed([pool.submit(_work, rank) for rank in ranks]):
                    task.result()
            except BrokenProcessPool:
                raise RuntimeError(
                    "a worker process was killed, as happens for want of memory. Run the same command again "
                    "with fewer --workers: finished tasks are kept."
                ) from None
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


_executor: LocalPipelineExecutor


def _set_up(executor: LocalPipelineExecutor) -> None:
    """What a worker process begins with."""
    global _executor
    _executor = executor
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # on Ctrl-C it goes without a traceback


def _work(rank: int) -> None:
    deepcopy(_executor)._run_for_rank(rank, 1)


class _Quiet(PipelineStep):
    """First of every pipeline: a worker that unpickles it imports this module, and so silences the log."""

    type, name = "SETUP", "quiet"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        logger.disable("datatrove")
        return data


logger.disable("datatrove")  # hundreds of lines a task; what failed is raised, and told in one sentence


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def execute(
    steps: Sequence[PipelineStep], tasks: int, folder: Path, executor: ExecutorConfig, what: str
) -> None:
    """Run every task of a pipeline that is not finished yet; return when all are.

    Args:
        steps: each is given what the one before yields.
        folder: for markers of finished tasks and logs; one a pipeline, below a stage's folder.
        what: the word beside the progress bar.
    Raises:
        ValueError: the chosen executor is not installed, or lacks a setting.
        RuntimeError: a task failed on Ray or Slurm; the message names its logs. Local tasks raise their own
            errors, unless their process was killed.
        OSError: no room on the disk.
    """
    make = {"local": _local, "ray": _ray, "slurm": _slurm}[executor.kind]
    run = make([_Quiet(), *steps], tasks, folder.resolve(), executor)
    finished = tasks - len(run.get_incomplete_ranks())
    if finished == tasks:
        return
    with progress(what, tasks, done=finished) as advance, naming_lack_of_room(folder):
        with _watched(run, finished, advance, _POLL_S[executor.kind]):
            run.run()
            if isinstance(run, SlurmPipelineExecutor):
                _wait_for_slurm(run)
    if left := run.get_incomplete_ranks():
        raise RuntimeError(
            f"{what}: {len(left)} of {tasks} tasks failed on {executor.kind}. Their logs are in "
            f"{folder / 'logs'}. Run the same command again: finished tasks are kept."
        )


def _local(steps: list[PipelineStep], tasks: int, folder: Path, config: ExecutorConfig) -> PipelineExecutor:
    return _Local(steps, tasks, min(tasks, config.workers or cores()), str(folder))


def _ray(steps: list[PipelineStep], tasks: int, folder: Path, config: ExecutorConfig) -> PipelineExecutor:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "Ray is not installed. Use `pip install gemwright[ray]`, or the local executor."
        ) from None
    if not ray.is_initialized():
        # One for the whole process, as every start costs seconds. It ends with the process.
        paths = os.pathsep.join(path for path in sys.path if path)
        options: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": paths}}}
        if "RAY_ADDRESS" not in os.environ:
            options["num_cpus"] = config.workers
        ray.init(include_dashboard=False, log_to_driver=False, **options)
    workers = config.workers or -1
    return RayPipelineExecutor(
        steps, tasks, workers, logging_dir=str(folder), mem_per_cpu_gb=config.memory_gb
    )


def _slurm(steps: list[PipelineStep], tasks: int, folder: Path, config: ExecutorConfig) -> PipelineExecutor:
    if not shutil.which("sbatch"):
        raise ValueError(
            "Slurm's sbatch is not on PATH: run this on a login node, or use the local executor."
        )
    if not config.partition:
        raise ValueError("Slurm needs a partition: --partition NAME. `sinfo` lists them.")
    return SlurmPipelineExecutor(
        steps, tasks, time=config.time, partition=config.partition, workers=config.workers or -1,
        mem_per_cpu_gb=config.memory_gb, job_name=f"gemwright-{folder.name}", logging_dir=str(folder), qos="",  # pyright: ignore[reportArgumentType]
        env_command=f"export PATH={Path(sys.executable).parent}:$PATH",
    )  # fmt: skip


def _wait_for_slurm(run: SlurmPipelineExecutor) -> None:
    """Until all tasks are finished, or the queue has forgotten the job."""
    say(f"Slurm job {run.job_id} is queued; this command waits for it, and can be stopped and started again")
    while run.get_incomplete_ranks():
        queue = subprocess.run(["squeue", "-h", "-j", str(run.job_id)], capture_output=True, text=True)
        time.sleep(_POLL_S["slurm"])  # between the two, so that a last marker can arrive over the network
        if not queue.stdout.strip():
            return


@contextlib.contextmanager
def _watched(
    run: PipelineExecutor, finished: int, advance: Callable[..., None], every: float
) -> Iterator[None]:
    """Count markers in a thread: the three executors have no other progress in common."""
    over = threading.Event()

    def watch() -> None:
        told, last = finished, False
        while not last:
            last = over.wait(every)
            now = run.world_size - len(run.get_incomplete_ranks())
            if now > told:
                advance(now - told)
                told = now

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
