"""What a recipe of pre-training offers to studies: its folder, its teacher and student, and what may vary."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemwright.benchmarks.made import Task, build_tasks
from gemwright.data.curated import Curated
from gemwright.distill.pretrain import PretrainConfig
from gemwright.hub import fetch

Changes = Mapping[str, Any]
"""Changed settings of a student, as in `Config.but`."""
_QUICK = 3  # what a quick study has of the tokens: one in so many


@dataclass(frozen=True)
class Base:
    """A recipe as studies see it."""

    name: str
    """The recipe's."""
    root: Path
    """Where `curated`, `tokenizer`, `shards` and `teacher` lie, or will."""
    prepare: Callable[[], None]
    """Makes those that are missing."""
    student: PretrainConfig
    """The student with its first seed, at the rate that serves student and twin from scratch alike."""
    sizes: Mapping[str, Changes]
    """Students by name, from small to large."""
    shapes: Mapping[str, Changes]
    """`wide` and `deep`, of as many parameters."""
    teachers: Mapping[str, PretrainConfig | str]
    """Teachers by name, from small to large: how each is trained, or the name of one that there is."""
    tokens: Sequence[int]
    """How many distinct tokens students see, from few to many."""
    items: int = 300
    """Questions a benchmark."""
    teacher: str | None = None
    """A folder, or a name on Hugging Face; None: `root/teacher`, which `prepare` makes."""

    @property
    def teacher_folder(self) -> Path:
        """Where the teacher lies."""
        return fetch(self.teacher) if self.teacher else self.root / "teacher"

    def seeded(self, seed: int) -> PretrainConfig:
        """The student with another seed: of the weights, and of the order of the data."""
        return self.student.but(**{"seed": seed, "train.seed": seed})

    def quick(self) -> "Base":
        """The same with a third of the students' tokens and updates. Teachers stay as they are."""
        config = self.student
        assert config.max_tokens is not None
        train = config.train
        steps = train.steps // _QUICK
        fewer = {
            "train.steps": steps, "max_tokens": config.max_tokens // _QUICK,
            "train.validate_every": min(train.validate_every, steps),
            "train.save_every": min(train.save_every, steps),
        }  # fmt: skip
        tokens = [count // _QUICK for count in self.tokens]
        return replace(self, student=config.but(**fewer), tokens=tokens)

    def tasks(self) -> tuple[Task, ...]:
        """Three benchmarks from held-out text, so that there is an average as in the report's Table 6."""
        texts = [d.text for d in Curated.open(self.root / "curated").documents("held_out")]
        return build_tasks(texts, self.items)
