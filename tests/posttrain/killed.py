"""How a run of a post-training stage is killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gemwright.config import Config

_RUN = """
import sys
from importlib import import_module
from pathlib import Path
from typing import get_type_hints
stage, config, *paths = sys.argv[1:]
run = import_module(f"gemwright.posttrain.{stage}").run
run(get_type_hints(run)["config"].model_validate_json(config), *map(Path, paths))
"""


def kill(stage: str, config: Config, *paths: Path, when: Callable[[], bool]) -> None:
    """Start a stage's `run(config, *paths)` in a process of its own, and SIGKILL it when `when` says so."""
    process = subprocess.Popen(
        [sys.executable, "-c", _RUN, stage, config.model_dump_json(), *map(str, paths)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GEMWRIGHT_COMPILE": "0"}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not when():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
