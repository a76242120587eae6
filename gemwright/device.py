"""The only place that picks a device, a number format, a seed, or compiled against eager code."""

import ctypes
import functools
import os
import random
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_device() -> torch.device:
    """CUDA where there is a GPU, else the CPU. `CUDA_VISIBLE_DEVICES=` (empty) keeps a run on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_of(precision: Precision) -> torch.dtype:
    """fp16 is not offered: Gemma 2 overflows it (the 27B answers erratically), bf16 does not."""
    return DTYPES[precision]


def seed_everything(seed: int) -> None:
    """Seed Python and torch (every device). Data order has its own generator, so it does not hang on this."""
    random.seed(seed)
    torch.manual_seed(seed)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step (no-op off Linux): faster on a CPU (LOG.md).

    By default every large temporary is mapped afresh, and the kernel clears its pages at each use.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: 32 MiB is the most that glibc takes
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass  # macOS, musl: their allocators have no such setting


@functools.cache
def can_compile() -> bool:
    """Whether torch.compile may be used here; where it may not, the eager path runs, and this says so once.

    torch.compile builds what it generates: with a C++ compiler for the CPU, with a C compiler (for Triton's
    launchers) on a GPU, and with Python's headers. `GEMWRIGHT_COMPILE=0` turns compiling off by choice.
    """
    reason = _why_not_compile()
    if reason:
        print(f"gemwright: {reason}", file=sys.stderr, flush=True)
    return not reason


def _why_not_compile() -> str:
    if os.environ.get("GEMWRIGHT_COMPILE") == "0":
        return "GEMWRIGHT_COMPILE=0, running eagerly."
    compilers = _compilers()
    if not any(shutil.which(name) for name in compilers):
        return (
            f"no compiler found ({' or '.join(compilers)}), running eagerly (slower). Install it to compile."
        )
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers are not installed (python3-dev), running eagerly (slower)."
    return ""


def _compilers() -> list[str]:
    """Where Triton and torch's Inductor look, so that what is promised here holds there."""
    if torch.cuda.is_available():
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
