"""Where a student's targets come from: the next token, a teacher that runs along, or its word on disk.

A teacher that runs along hands over hidden states and not logits: the loss unembeds both sides a chunk at a
time (`losses/dense.py`), so its distribution over the vocabulary never exists for a whole batch. It runs in
its own number format. Stored targets (`targets/store.py`) cost the student next to nothing.
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from gemwright.config import Config
from gemwright.data.windows import Rows, Windows
from gemwright.losses import dense, sparse
from gemwright.model import checkpoint
from gemwright.model.gemma import Gemma
from gemwright.targets.store import TargetBatch, Targets
from gemwright.tokenizer.tokenizer import Tokenizer, require_same_tokenizer
from gemwright.train.loop import Batch, Loss


class ObjectiveConfig(Config):
    """What a student is trained for. The report's is the default: forward KL, nothing mixed in."""

    beta: float = Field(default=0.0, ge=0, le=1)
    """The divergence: 0 forward KL (all that stored targets serve), 1 reverse KL, between them JSD."""
    temperature: PositiveFloat = 1.0
    """Both sides' capped logits are divided by it. Stored targets have theirs from labelling."""
    next_token: float = Field(default=0.0, ge=0, le=1)
    """The share of the loss that the next token gets."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of (log Z)^2, which keeps the normaliser near 1."""
    tail: bool = True
    """Stored top-k targets: the mass that was not kept is a bucket of its own; else they are renormalised."""


REPORT = ObjectiveConfig()


class Teacher:
    """A frozen checkpoint, run online."""

    def __init__(self, model: Gemma, pieces: int | None = None) -> None:
        """`pieces`: how many rows of the heads are pieces, where they are padded; None: all."""
        self.model, self.pieces = model.requires_grad_(False).eval(), pieces

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Tokenizer, device: torch.device | str = "cpu", *, compiled: bool = True
    ) -> "Teacher":
        """Load a teacher whose tokenizer is the student's; errors as `require_same_tokenizer`."""
        require_same_tokenizer(folder, tokenizer)
        model = checkpoint.load(folder, device=device)
        return cls(model.compile_layers() if compiled else model, tokenizer.vocab_size)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Float[Tensor, "B T E"]:
        """The teacher's final hidden states for a batch of the student's."""
        with torch.autocast(batch.ids.device.type, enabled=False):
            return self.model.hidden(batch.ids, batch.places)

    def loss(
        self, model: Gemma, hidden: Float[Tensor, "N D"], batch: Batch, objective: ObjectiveConfig
    ) -> Float[Tensor, ""]:
        """The summed loss of the student's hidden states: a divergence from the teacher's distribution."""
        return dense.divergence(
            hidden, model.unembedding, self.hidden(batch).flatten(0, 1), self.model.unembedding,
            batch.weights.flatten(), cap=model.config.final_softcap,
            teacher_cap=self.model.config.final_softcap, beta=objective.beta,
            temperature=objective.temperature, targets=batch.targets.flatten(),
            next_token=objective.next_token, z_loss=objective.z_loss, pieces=self.pieces,
        )  # fmt: skip


class StoredTeacher:
    """What a teacher said about the windows of the training split, read from disk."""

    def __init__(self, targets: Targets, windows: Rows, objective: ObjectiveConfig = REPORT) -> None:
        """Find every row's targets.

        Raises:
            ValueError: packed otherwise than what was labelled, windows that were not, or an objective that
                these targets cannot serve.
        """
        manifest, split = targets.manifest, targets.manifest.splits[windows.split]
        self.targets, self.pieces = targets, manifest.vocab_size
        if objective.beta != 0 or objective.temperature != manifest.temperature:
            raise ValueError(
                f"{targets.folder} has a teacher's word at temperature {manifest.temperature}, which serves "
                f"forward KL at that temperature, and not objective.beta={objective.beta} with "
                f"objective.temperature={objective.temperature}. Set them so, or let the teacher run along."
            )
        if manifest.seq_len != windows.seq_len or split.total != windows.total:
            raise ValueError(
                f"{targets.folder} has targets for {split.total:,} windows of {manifest.seq_len} tokens, and "
                f"training would take {windows.total:,} of {windows.seq_len}: other beginnings. "
                f"Train with train.seq_len={manifest.seq_len}, or label again."
            )
        self._labelled: np.ndarray | None = None  # all of them: a window's number is its place
        if split.max_tokens is not None:
            assert isinstance(windows, Windows), "conversations are labelled whole"
            subset = Windows(
                windows.shards, windows.split, windows.seq_len, max_tokens=split.max_tokens,
                subset_seed=split.subset_seed,
            )  # fmt: skip
            self._labelled = subset.in_order()
            inside = windows.subset_seed == split.subset_seed and len(windows) <= len(subset)
            if not inside:
                raise ValueError(
                    f"{targets.folder} has targets for {subset.tokens:,} tokens, and training would take "
                    f"{windows.tokens:,}. Set max_tokens={split.max_tokens}, or label more."
                )

    def read(self, batch: Batch) -> TargetBatch:
        """The targets of a batch."""
        assert batch.numbers is not None
        rows = batch.numbers if self._labelled is None else np.searchsorted(self._labelled, batch.numbers)
        return self.targets.read("train", rows.astype(np.int64).tolist())

    def loss(
        self, model: Gemma, hidden: Float[Tensor, "N D"], batch: Batch, objective: ObjectiveConfig
    ) -> Float[Tensor, ""]:
        """The summed loss of the student's hidden states: cross-entropy to the targets of a batch."""
        found = self.read(batch)
        probs = found.probs.flatten(0, 1)
        tail = objective.tail and self.targets.manifest.kind == "top-k"
        if not tail:
            probs = probs / probs.sum(-1, keepdim=True)
        return sparse.cross_entropy(
            hidden, model.unembedding, found.ids.flatten(0, 1).to(hidden.device), probs.to(hidden.device),
            batch.weights.flatten(), cap=model.config.final_softcap,
            temperature=objective.temperature, tail=tail, targets=batch.targets.flatten(),
            next_token=objective.next_token, z_loss=objective.z_loss,
        )  # fmt: skip


def next_token(model: Gemma, batch: Batch, z_loss: float = 0.0) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss of training from scratch: the summed cross-entropy of the next token."""
    total = dense.cross_entropy(
        flat_hidden(model, batch), model.unembedding, batch.targets.flatten(), batch.weights.flatten(),
        cap=model.config.final_softcap, z_loss=z_loss,
    )  # fmt: skip
    return total, {}


def distillation(teacher: Teacher | StoredTeacher, objective: ObjectiveConfig = REPORT) -> Loss:
    """The loss of distillation, from either kind of teacher."""

    def loss(model: Gemma, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        return teacher.loss(model, flat_hidden(model, batch), batch, objective), {}

    return loss


def flat_hidden(model: Gemma, batch: Batch) -> Float[Tensor, "N D"]:
    """The model's final hidden states for a batch, one row a token."""
    return model.hidden(batch.ids, batch.places).flatten(0, 1)
