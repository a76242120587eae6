"""The only place that picks a device, number format, seed, rank, or compiled against eager code."""

import ctypes
import functools
import os
import random
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

Precision = Literal["fp32", "bf16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MEMORY, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")  # where Linux tells of memory


def pick_device() -> torch.device:
    """CUDA where there is a GPU, this rank's own; else the CPU, as with an empty `CUDA_VISIBLE_DEVICES`."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


@dataclass(frozen=True)
class Ranks:
    """The processes of a torchrun; without one, the only rank of one."""

    rank: int = 0
    size: int = 1

    def first_says(self, word: str = "") -> str:
        """What the first rank says here, on every rank; the others wait for it."""
        said = [word]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0)
        return said[0]

    def wait(self) -> None:
        """Go on when every rank is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the other processes of a torchrun, if there are any, for as long as the block lasts."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Ranks()
        return
    # Ranks may have hours of work between two meetings; of one that died, torchrun itself ends the others.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
        # Gloo's threads let go of the last message a moment after it arrived, and take Python's lock for
        # that. A process that is ending by then is aborted (one run in 25): pytorch's pull request 179291.
        time.sleep(0.5)


def dtype_of(precision: Precision) -> torch.dtype:
    """fp16 is not offered: Gemma 2 overflows it (the 27B answers erratically), bf16 does not."""
    return DTYPES[precision]


def available_memory(device: torch.device | str) -> int | None:
    """Bytes that can still be allocated on a device, without swapping; None where nobody tells.

    On a CPU what Linux calls available, or what a container's limit leaves, the smaller of the two. On a GPU
    what is free, and what torch keeps there without using it.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = _MEMORY.read_text().splitlines() if device.type == "cpu" else []
        left = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        left = []  # macOS
    try:
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        kept = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        # Pages of files are given up for whoever needs memory.
        used -= int(kept["active_file"]) + int(kept["inactive_file"])
        left += [max(0, limit - used)] if left else []
    except (OSError, ValueError):
        pass  # no container, or one whose limit is "max"
    return min(left, default=None)


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


@functools.cache
def fused(kernel: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """An elementwise kernel compiled once for all shapes, so that memory is read and written once a pass.

    Args:
        static: keyword arguments that are constants of the compiled code, as floats among its other
            arguments are: each new one compiles anew.
    """
    kernel = functools.partial(kernel, **static)
    if not can_compile():
        return kernel
    from torch.fx.experimental import _config as shapes

    # One kernel is compiled anew for every set of constants, and all of them share one counter.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    compiled = torch.compile(kernel, dynamic=True)
    duck: Any = shapes  # its settings are made at import

    def call(*args: Any) -> Any:
        # Two sizes that happen to be equal at the first call would else be taken for one, and compiled anew;
        # a float would become an argument in fp64, and the arithmetic around it too.
        with duck.patch(use_duck_shape=False), torch._dynamo.config.patch(specialize_float=True):
            return compiled(*args)

    return call


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
