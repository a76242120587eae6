"""Generation: prefill the prompt, then decode one token after another with a KV cache."""

import math
from collections.abc import Iterator, Sequence

import torch

from gemwright.generate.sampling import sample
from gemwright.model import head
from gemwright.model.cache import KVCache
from gemwright.model.gemma import Gemma


@torch.no_grad()
def decode(
    model: Gemma,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
) -> Iterator[int]:
    """Yield new ids after `prompt` until a stop id (not yielded) or `max_tokens` of them.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, a wrong setting, or more than `max_seq_len`
            in all; before anything is computed.
    """
    _check(model, prompt, max_tokens, temperature)
    return _decode(model, prompt, max_tokens, temperature, seed, frozenset(stop_ids))


@torch.no_grad()
def _decode(
    model: Gemma,
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    device = model.unembedding.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(model.config)
    ids = torch.tensor([list(prompt)], device=device)
    for _ in range(max_tokens):
        last = model.hidden(ids, cache=cache)[:, -1]
        logits = head.logits(last, model.unembedding, model.config.final_softcap)
        token = int(sample(logits, temperature, generator))
        if token in stop_ids:
            return
        yield token
        ids = torch.tensor([[token]], device=device)


def _check(model: Gemma, prompt: Sequence[int], max_tokens: int, temperature: float) -> None:
    if not prompt:
        raise ValueError("the prompt is empty: begin with <bos> at least (encode(text, bos=True)).")
    vocabulary = model.config.vocab_size
    if not all(0 <= token < vocabulary for token in prompt):
        raise ValueError(
            f"the prompt holds an id outside 0..{vocabulary - 1}: it was made with another tokenizer."
        )
    if max_tokens < 1 or not 0 <= temperature < math.inf:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least 1, temperature={temperature} finite and at least 0."
        )
    if len(prompt) + max_tokens > model.config.max_seq_len:
        raise ValueError(
            f"{len(prompt)} tokens of prompt and {max_tokens} new ones exceed the model's max_seq_len="
            f"{model.config.max_seq_len}. Shorten the prompt or lower max_tokens."
        )
