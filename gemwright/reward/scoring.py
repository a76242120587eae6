"""What reward models think of conversations, and what becomes of a policy under them.

A conversation is judged as a whole, at its last id: of several turns, too. Ids are judged as they were drawn,
never text that would be encoded anew, so policy and reward model have one tokenizer.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.data.conversations import pack_whole
from gemwright.generate.rollout import Rollout, in_order, padded
from gemwright.generate.sampling import Sampling
from gemwright.losses.divergence import cross_entropy, reverse_kl
from gemwright.model.gemma import Gemma, RewardModel, packed
from gemwright.tokenizer.tokenizer import Tokenizer

_CHUNK_BYTES = 64 << 20  # of logits at a time, of one model
_TOKENS = 8192  # read at a time


@torch.no_grad()
def states(model: Gemma, texts: Sequence[Sequence[int]]) -> Float[Tensor, "N D"]:
    """The final hidden state at the last id of every conversation, on the CPU.

    Raises:
        ValueError: one is longer than the model's context.
    """
    longest = max(map(len, texts), default=1)
    if longest > model.config.max_seq_len:
        raise ValueError(
            f"a conversation has {longest} tokens, and the reward model's context "
            f"{model.config.max_seq_len}. Lower max_tokens, or leave out long prompts."
        )
    found = torch.empty(len(texts), model.config.d_model)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    few = max(1, _TOKENS // longest)
    with torch.compiler.set_stance("eager_on_recompile"):
        for start in range(0, len(order), few):
            taken = order[start : start + few]
            rows, ends = pack_whole([texts[number] for number in taken], len(texts[taken[-1]]))
            rows, (row, column) = rows.to(model.device), ends.to(model.device).T
            starts = torch.zeros_like(rows, dtype=torch.bool)  # not at a <bos>: a policy may have drawn one
            starts[row, column + 1 - torch.tensor([len(texts[number]) for number in taken]).to(row)] = True
            hidden = model.hidden(rows, packed(starts))
            found[taken] = hidden[row, column].float().cpu()
    return found


@torch.no_grad()
def scores(model: RewardModel, texts: Sequence[Sequence[int]]) -> Float[Tensor, " N"]:
    """The scores of conversations, as ids; errors as `states`."""
    return model.scores(states(model, texts).to(model.device)).cpu()


@torch.no_grad()
def log_ratios(
    model: Gemma, anchor: Gemma, drawn: Sequence[Rollout], batch_size: int = 32
) -> dict[str, Float[np.ndarray, " N"]]:
    """How far a policy has gone from an anchor, on conversations that it wrote; in nats a conversation.

    Returns:
        log_ratio: log P(y) - log P_anchor(y) of the ids that were drawn. kl: the same, but of every token the
            expectation over the vocabulary, KL(P || P_anchor) given what stands before it: the same mean, a
            smaller variance. entropy: likewise the policy's own, but a token. length: ids that were drawn.
    """
    few = max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
    sums = torch.zeros(3, len(drawn), dtype=torch.float64)
    with torch.compiler.set_stance("eager_on_recompile"):
        for numbers, ids, chosen in padded(drawn, batch_size, model.device):
            row, column = chosen.nonzero().T
            states = [one.hidden(ids)[row, column - 1].split(few) for one in (model, anchor)]
            parts = zip(*states, ids[row, column].split(few), strict=True)
            each = [_terms(model.logits(own), anchor.logits(its), targets) for own, its, targets in parts]
            if each:
                sums.index_add_(1, torch.tensor(numbers)[row.cpu()], torch.cat(each, 1).double().cpu())
    ratio, kl, entropy = sums.numpy()
    length = np.array([float(sum(one.chosen)) for one in drawn])
    return {"log_ratio": ratio, "kl": kl, "entropy": entropy / length.clip(min=1), "length": length}


def _terms(own: Float[Tensor, "N V"], its: Float[Tensor, "N V"], targets: Tensor) -> Float[Tensor, "3 N"]:
    log_p = own.log_softmax(-1)
    ratio = cross_entropy(its, targets) - cross_entropy(own, targets)
    return torch.stack((ratio, reverse_kl(its, own), -(log_p.exp() * log_p).sum(-1)))


def measure(
    policy: Gemma,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[str]],
    sampling: Sampling,
    rewards: Mapping[str, RewardModel],
    anchor: Gemma,
    *,
    samples: int = 1,
    max_batch: int = 32,
) -> tuple[dict[str, Float[np.ndarray, "P S"]], list[Rollout]]:
    """Let a policy answer prompts some times each, and judge what it wrote.

    Returns:
        a number for every sample of every prompt: each reward by its name; `kl` from the anchor, in nats a
        conversation; the policy's `entropy`, in nats a token; `tokens` a reply; whether all replies ended by
        themselves (`finished`), and whether one is `empty`. And the conversations, prompt by prompt.
    """
    asked = [(number, prompts[number // samples]) for number in range(len(prompts) * samples)]
    drawn = in_order(policy, tokenizer, asked, sampling, max_batch)
    found = {
        name: scores(model, [one.ids for one in drawn]).double().numpy() for name, model in rewards.items()
    }
    apart = log_ratios(policy, anchor, drawn, max_batch)
    found |= {name: apart[name] for name in ("kl", "entropy")} | shape(drawn)
    return {name: values.reshape(len(prompts), samples) for name, values in found.items()}, drawn


def shape(drawn: Sequence[Rollout]) -> dict[str, Float[np.ndarray, " N"]]:
    """Tokens a reply, and whether the replies ended by themselves, or one of them is empty."""
    return {
        "tokens": np.array([np.mean([len(reply.ids) for reply in one.replies]) for one in drawn]),
        "finished": np.array([float(all(r.finish == "stop" for r in one.replies)) for one in drawn]),
        "empty": np.array([float(any(not r.text.strip() for r in one.replies)) for one in drawn]),
    }
