"""What a distillation run looks like from inside: how sure both sides are, where they agree, who pulls where.

Taken on one fixed batch at every validation. Entropies in nats; all means are over the batch's target tokens.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemwright.losses import dense
from gemwright.model import head
from gemwright.model.gemma import Gemma
from gemwright.train.loop import Batch
from gemwright.train.teacher import ObjectiveConfig, StoredTeacher, Teacher, flat_hidden

_ROWS = 64  # unembedded at a time


def watch(
    teacher: Teacher | StoredTeacher, objective: ObjectiveConfig, batch: Batch
) -> Callable[[Gemma], dict[str, float]]:
    """A function from the student to its diagnostics on `batch`; the teacher's own are taken once.

    teacher_entropy, student_entropy; top1_agreement, the share of tokens whose likeliest id is the same (of
    sampled targets the one drawn most often); gradient_cosine, between the gradients of the distillation loss
    and of the next token by the student's final hidden states. Stored targets add mass_covered, the teacher's
    probability of the stored ids, and distinct_ids a token. All at temperature 1, but for the entropy and
    mass that come with stored targets.
    """
    weights = batch.weights.flatten()
    tokens = weights.sum().clamp_min(1)

    def mean(values: Tensor) -> float:
        return float((values * weights).sum() / tokens)

    fixed: dict[str, float] = {}
    if isinstance(teacher, Teacher):
        states = teacher.hidden(batch).flatten(0, 1)
        weight = teacher.model.unembedding[: teacher.pieces]
        entropy, likeliest = _entropy(states, weight, teacher.model.config.final_softcap)
        fixed["teacher_entropy"] = mean(entropy)
    else:
        found = teacher.read(batch)
        likeliest = found.ids.gather(-1, found.probs.argmax(-1, keepdim=True)).flatten().to(weights.device)
        fixed["teacher_entropy"] = float(found.entropy.mean())  # kept a window, not a token
        fixed["mass_covered"] = float(found.covered.mean())
        fixed["distinct_ids"] = mean((found.probs > 0).sum(-1).flatten().to(weights.device))

    def look(model: Gemma) -> dict[str, float]:
        with torch.no_grad():
            hidden = flat_hidden(model, batch)
            weight = model.unembedding[: teacher.pieces]
            entropy, ours = _entropy(hidden, weight, model.config.final_softcap)
        hidden.requires_grad_()
        (pull,) = torch.autograd.grad(teacher.loss(model, hidden, batch, objective), hidden)
        following = dense.cross_entropy(
            hidden, model.unembedding.detach(), batch.targets.flatten(), weights,
            cap=model.config.final_softcap,
        )  # fmt: skip
        (other,) = torch.autograd.grad(following, hidden)
        return fixed | {
            "student_entropy": mean(entropy),
            "top1_agreement": mean((ours == likeliest).float()),
            "gradient_cosine": float(torch.cosine_similarity(pull.flatten(), other.flatten(), 0)),
        }

    return look


@torch.no_grad()
def _entropy(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], cap: float | None
) -> tuple[Float[Tensor, " N"], Int[Tensor, " N"]]:
    """The entropy of each token's distribution, and its likeliest id."""
    entropies, likeliest = [], []
    for rows in hidden.split(_ROWS):
        log_p = torch.log_softmax(head.logits(rows, weight, cap), -1)
        entropies.append(-(log_p.exp() * log_p).sum(-1))
        likeliest.append(log_p.argmax(-1))
    return torch.cat(entropies), torch.cat(likeliest)
