"""What every test gets: one seed, torch's settings put back, no network, and skips that say why."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later

settings.register_profile("house", deadline=None, derandomize=True)  # the same examples on a slow machine
settings.load_profile("house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    from gemwright.device import (
        can_compile,
    )  # not above: the shape checker must see the package's first import

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("compiled") and not can_compile():
        pytest.skip("needs what torch.compile needs: a compiler and Python's headers")


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Every test starts from one seed, and leaves torch's number format and threads as they were."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> Path:
    """The folder with real data for tests, named by GEMWRIGHT_DATA."""
    folder = os.environ.get("GEMWRIGHT_DATA")
    if not folder:
        pytest.skip("needs real data: set GEMWRIGHT_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(
            f"GEMWRIGHT_DATA={folder} is no folder. Correct it, or unset it to skip the tests that need data."
        )
    return Path(folder)
