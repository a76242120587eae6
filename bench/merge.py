"""How long does merging checkpoints take next to copying them, and how much memory?

    python -m bench.merge --json

Models of a named size (2b) with random bf16 weights in parts of about 2 GiB are streamed to disk, with the
card of a finished stage, as ours have. Two are merged by `linear`, and two with their base by `slerp`, which
reads all three twice; each time in a process of its own. What a merge reads is also copied by a plain `cp`.
They take turns, round after round, and whatever is read was read before; the median counts.

Seconds are those of the stage, from its checks to its card, hashes and syncing to disk included; `cp` syncs
nothing. Memory is the process's high-water mark less what it held with everything imported.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.generate import write_tokenizer
from gemwright.config import Config
from gemwright.device import available_memory
from gemwright.merge.streams import write_part
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, size
from gemwright.model.gemma import Gemma
from gemwright.run import RunFolder, run_stage

SHARD_BYTES = 2 << 30
PIECE = 1 << 22
METHODS = {"linear": ("one", "other"), "slerp": ("base", "one", "other")}
"""What each merge reads; of three the first is the base."""

MERGE = """
import json, sys, time
from pathlib import Path
from gemwright.merge.stage import MergeConfig, run

def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))

method, out, *parents = sys.argv[1:]
*base, one, other = map(Path, parents)
Path("/proc/self/clear_refs").write_text("5")  # the kernel begins its high-water mark anew
before, start = kib("VmRSS"), time.perf_counter()
run(MergeConfig(method=method), Path(out), [one, other], base=base[0] if base else None)
print(json.dumps([time.perf_counter() - start, (kib("VmHWM") - before) / 1024]))
"""


def write(folder: Path, config: GemmaConfig, seed: int) -> None:
    """A checkpoint with random weights and a tokenizer, as a stage leaves it, a few megabytes at a time."""
    shapes = checkpoint.blank(config).state_dict()
    generator = torch.Generator().manual_seed(seed)

    def pieces(name: str) -> Iterator[Tensor]:
        left = shapes[name].numel()
        while left:
            piece = torch.empty(min(PIECE, left), dtype=torch.bfloat16)
            left -= len(piece)
            yield piece.normal_(std=0.02, generator=generator)

    def put(names: Sequence[str], path: Path) -> str:
        return write_part(path, {name: shapes[name] for name in names}, torch.bfloat16, pieces)

    def work(folder: RunFolder) -> dict[str, Any]:
        described = config.to_hf() | Gemma.hf_head | {"dtype": "bfloat16"}
        sizes = {name: 2 * tensor.numel() for name, tensor in shapes.items()}
        folder.hashes |= checkpoint.write(folder.path, described, sizes, put, SHARD_BYTES)
        write_tokenizer(folder.path)
        return {}

    run_stage("bench", Config(), folder, work)


def require_room(scratch: Path, config: GemmaConfig) -> None:
    """Raise OSError where three models and a copy of them do not fit."""
    one = 2 * sum(tensor.numel() for tensor in checkpoint.blank(config).state_dict().values())
    free, needed = shutil.disk_usage(scratch).free, 6 * one + (1 << 30)
    if free < needed:
        raise OSError(
            f"{scratch} has {free / 1e9:.1f} GB free, and three models with a copy of them take "
            f"{needed / 1e9:.1f} GB. Free some, or choose another folder (--scratch) or a smaller --size."
        )


def settle(folders: Sequence[Path]) -> None:
    """Nothing is left to be written, and what is going to be read has been read."""
    os.sync()
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def merge(method: str, folders: Sequence[Path], out: Path) -> tuple[float, float]:
    """Seconds, and the MiB that it took at most."""
    settle(folders)
    command = [sys.executable, "-c", MERGE, method, str(out), *map(str, folders)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    seconds, mib = json.loads(done.stdout)
    return seconds, mib


def copy(folders: Sequence[Path], out: Path) -> float:
    """Seconds of `cp`."""
    settle(folders)
    out.mkdir()
    start = time.perf_counter()
    try:
        subprocess.run(["cp", "-r", *map(str, folders), str(out)], check=True)
        return time.perf_counter() - start
    finally:
        shutil.rmtree(out)


def measure(home: Path, rounds: int) -> dict[str, dict[str, Any]]:
    """Every method and the copies, in turns; who begins changes from round to round."""
    found: dict[str, dict[str, list[float]]] = {
        method: {"seconds": [], "copy_seconds": [], "peak_mib": []} for method in METHODS
    }
    for turn in range(rounds):
        for method, names in METHODS.items():
            folders = [home / name for name in names]
            for what in ("copy", "merge") if turn % 2 else ("merge", "copy"):
                if what == "copy":
                    found[method]["copy_seconds"].append(copy(folders, home / "copy"))
                    continue
                seconds, mib = merge(method, folders, home / "merged")
                found[method]["seconds"].append(seconds)
                found[method]["peak_mib"].append(mib)
            print(f"round {turn + 1} of {rounds}: {method}", file=sys.stderr, flush=True)
    told: dict[str, dict[str, Any]] = {}
    for method, values in found.items():
        seconds, copied = (statistics.median(values[key]) for key in ("seconds", "copy_seconds"))
        told[method] = {
            "parents": len(METHODS[method]),
            "seconds": round(seconds, 2),
            "copy_seconds": round(copied, 2),
            "over_copy": round(seconds / copied, 2),
            "peak_mib": round(max(values["peak_mib"]), 1),
            "all_seconds": [round(value, 2) for value in values["seconds"]],
            "all_copy_seconds": [round(value, 2) for value in values["copy_seconds"]],
        }
    return told


def notes(one: int) -> list[str]:
    """What the numbers may owe to the machine."""
    cache = available_memory("cpu")
    if cache is None:
        return []
    return [
        f"{what} come to {bytes / 1e9:.1f} GB, and this machine has {cache / 1e9:.1f} GB for programs "
        "and cache: some of it may be read from the disk, and wait for it."
        for what, bytes in (
            ("a pair and its merge", 3 * one),
            ("a pair and its copy", 4 * one),
            ("three parents and their merge", 4 * one),
            ("three parents and their copy", 6 * one),
        )
        if bytes > 0.8 * cache
    ]


def main() -> None:
    """Make the models, measure, and remove them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="2b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="a folder on the disk to measure; the system's for such")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config, scratch = size(options.size), options.scratch or Path(tempfile.gettempdir())
    require_room(scratch, config)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        home = Path(folder)
        for seed, name in enumerate(METHODS["slerp"]):
            write(home / name, config, seed)
        parts = [path.stat().st_size for path in (home / "one").glob("*.safetensors")]
        by_method = measure(home, options.rounds)
    linear = by_method["linear"]
    results = {
        "size": options.size,
        "threads": torch.get_num_threads(),
        "model_gb": round(sum(parts) / 1e9, 2),
        "shards": len(parts),
        "largest_shard_mib": round(max(parts) / 2**20, 1),
        "peak_mib": max(found["peak_mib"] for found in by_method.values()),
        **{key: linear[key] for key in ("seconds", "copy_seconds", "over_copy")},
        **by_method,
        "notes": notes(sum(parts)),
    }
    print(json.dumps(results, indent=None if options.json else 2))


if __name__ == "__main__":
    main()
