"""The teacher in pre-training: a frozen model that sees the student's batch and hands over its hidden states.

Hidden states and not logits: the loss unembeds both sides a chunk at a time (`losses/dense.py`), so the
teacher's distribution over the vocabulary never exists for a whole batch. The teacher runs in its own number
format.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.losses import dense
from gemwright.model import checkpoint
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import Batch, Loss


class Teacher:
    """A frozen checkpoint, run online."""

    def __init__(self, model: Gemma) -> None:
        self.model = model.requires_grad_(False).eval()

    @classmethod
    def load(
        cls, folder: Path, tokenizer_sha256: str, device: torch.device | str = "cpu", *, compiled: bool = True
    ) -> "Teacher":
        """Load a teacher whose tokenizer is the student's; errors as `require_same_tokenizer`."""
        require_same_tokenizer(folder, tokenizer_sha256)
        model = checkpoint.load(folder, device=device)
        return cls(model.compile_layers() if compiled else model)

    @torch.no_grad()
    def hidden(self, batch: Batch) -> Float[Tensor, "B T E"]:
        """The teacher's final hidden states for a batch of the student's."""
        with torch.autocast(batch.ids.device.type, enabled=False):
            return self.model.hidden(batch.ids, batch.places)


def require_same_tokenizer(teacher: Path, tokenizer_sha256: str) -> None:
    """Raise ValueError for a teacher with another tokenizer than the shards': its ids mean other pieces."""
    theirs = Tokenizer.load(teacher).sha256
    if theirs != tokenizer_sha256:
        raise ValueError(
            f"the teacher {teacher} has another tokenizer (sha256 {theirs[:12]}) than the shards "
            f"({tokenizer_sha256[:12]}): the same id would mean different pieces. "
            "Make shards with the teacher's."
        )


def next_token(model: Gemma, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """The loss of training from scratch: the summed cross-entropy of the next token."""
    hidden = model.hidden(batch.ids, batch.places).flatten(0, 1)
    total = dense.cross_entropy(
        hidden,
        model.unembedding,
        batch.targets.flatten(),
        batch.weights.flatten(),
        cap=model.config.final_softcap,
    )
    return total, {}


def distillation(teacher: Teacher) -> Loss:
    """The loss of distillation: the summed forward KL to the teacher's distribution, nothing mixed in."""

    def loss(model: Gemma, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        total = dense.forward_kl(
            model.hidden(batch.ids, batch.places).flatten(0, 1),
            model.unembedding,
            teacher.hidden(batch).flatten(0, 1),
            teacher.model.unembedding,
            batch.weights.flatten(),
            cap=model.config.final_softcap,
            teacher_cap=teacher.model.config.final_softcap,
        )
        return total, {}

    return loss
