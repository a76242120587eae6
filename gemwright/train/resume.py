"""The state of a running job on disk: what a killed run goes on from, to the last bit.

`resume/step-000120/` holds the model as a checkpoint like any other, the optimiser's moments beside it in
safetensors, and the step. There is no more state than that: the order of the data and the learning rate are
functions of the step, and the loop draws no random numbers. A folder appears by renaming, so it is whole or
it is not there.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import load_file, save_file

from gemwright.model import checkpoint
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.run import RESUME, atomic, write_json


def save_state(
    folder: Path, step: int, model: Gemma, optimizer: torch.optim.Optimizer,
    also: Mapping[str, Gemma] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """Write the state after `step` updates and drop older ones. Returns the folder.

    Args:
        also: further models, each into a folder of its name.
    """
    home = folder / RESUME
    target, partial = home / f"step-{step:06}", home / "partial"
    if target.exists():
        return target
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.save(model, partial)
    for name, other in also.items():
        checkpoint.save(other, partial / name)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}:{key}": value.cpu()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    with atomic(partial / "optimizer.safetensors") as path:  # synced, or a power cut could tear it
        save_file(moments, path)
    write_json(partial / "state.json", {"step": step})
    partial.rename(target)
    for other in saved_steps(folder)[:-1]:
        shutil.rmtree(other)
    return target


def saved_steps(folder: Path) -> list[Path]:
    """The whole states of a run folder, oldest first."""
    return sorted((folder / RESUME).glob("step-*"), key=lambda state: int(state.name.removeprefix("step-")))


def load_state(
    folder: Path, model: Gemma, optimizer: torch.optim.Optimizer,
    also: Mapping[str, Gemma] = MappingProxyType({}),
) -> int:  # fmt: skip
    """Put the newest state into models and optimiser; returns the updates made so far, 0 without a state."""
    states = saved_steps(folder)
    if not states:
        return 0
    newest = states[-1]
    for home, one in ((newest, model), *((newest / name, other) for name, other in also.items())):
        load = checkpoint.load_reward if isinstance(one, RewardModel) else checkpoint.load
        one.load_state_dict(load(home).state_dict())
    moments = load_file(newest / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = {
            key.rpartition(":")[2]: value for key, value in moments.items() if key.rpartition(":")[0] == name
        }
        # `step` is counted on the CPU unless torch keeps it elsewhere; moments live beside their parameter.
        optimizer.state[parameter] = {
            key: value if key == "step" and not parameter.is_cuda else value.to(parameter.device)
            for key, value in state.items()
        }
    return int(json.loads((newest / "state.json").read_text(encoding="utf-8"))["step"])


def clear(folder: Path) -> None:
    """Drop the states of a finished run: its checkpoint is what counts."""
    shutil.rmtree(folder / RESUME, ignore_errors=True)
