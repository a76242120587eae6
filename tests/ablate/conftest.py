"""A recipe so small that studies of it take seconds."""

from pathlib import Path

import pytest

from gemwright.benchmarks.made import Item, Task
from gemwright.distill.pretrain import PretrainConfig
from gemwright.model.config import GemmaConfig, alternating
from gemwright.recipes.base import Base
from gemwright.train.loop import TrainConfig

QUESTIONS = tuple(Item(context=f"def f{n}(", choices=("self", "x, y"), answer=n % 2) for n in range(8))


class Small(Base):
    """With benchmarks that need no curated text."""

    def tasks(self) -> tuple[Task, ...]:
        return (Task(name="names", items=QUESTIONS),)


@pytest.fixture(scope="session")
def base(tiny: GemmaConfig, shards_folder: Path, teacher_folder: Path) -> Base:
    train = TrainConfig(steps=6, batch_size=4, seq_len=32, compile=False)
    tokens = {"max_tokens": 640, "validation_tokens": 320, "held_out_tokens": 320}
    student = PretrainConfig(model=tiny, train=train).but(**tokens)
    return Small(
        name="small", root=shards_folder.parent, prepare=lambda: None, student=student,
        sizes={"thin": {"model.d_ff": 32}, "thick": {}},
        shapes={"wide": {}, "deep": {"model.pattern": alternating(4), "model.d_ff": 24}},
        teachers={"small": student, "large": str(teacher_folder)}, tokens=(320, 640),
        teacher=str(teacher_folder),
    )  # fmt: skip
