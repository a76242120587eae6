"""What a model makes of text: nats a token on held-out shards, and the log-likelihood of continuations.

Texts that are scored have their beginnings in common: the choices of a question its context, questions the
examples before them. So they are put in alphabetical order of their ids, where each stands next to the one it
shares most with. What it shares is not read again: the cache of the text before is cut back to there and read
on, for several such runs of texts in each pass. A position that several texts have in common is unembedded
once, whatever is asked of it; one text that begins another is read with it.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gemwright.benchmarks.made import Task
from gemwright.data.conversations import Conversations
from gemwright.data.windows import Windows
from gemwright.losses import dense
from gemwright.model.cache import KVCache
from gemwright.model.gemma import Gemma, packed
from gemwright.tokenizer.tokenizer import SPECIAL, Tokenizer

_BATCH_TOKENS = 4096
_CHUNK_BYTES = 64 << 20  # of logits at a time: fewer rows would read a large head too often
_SHARED = 16  # ids; fewer are read again sooner than they are kept in a cache
_AGAIN = 4  # a run reads up to so many times its first text: long runs are cut, to be read side by side

Request = tuple[Sequence[int], Sequence[int]]
"""A context's ids, `<bos>` first, and those of its continuation."""


class Scored(NamedTuple):
    """What a model thinks of a continuation."""

    log_p: float
    """Log-likelihood in nats, summed over the continuation."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


@torch.no_grad()
def nats_per_token(model: Gemma, windows: Windows | Conversations, batch_size: int = 16) -> float:
    """Mean of -log P(next token) over every target that counts; its exponential is the perplexity."""
    device = model.device
    total, count = 0.0, 0.0
    # Layers compiled for training run eagerly here: compiling them again, without gradients, would cost more.
    with torch.compiler.set_stance("eager_on_recompile"):
        for rows, weights in windows.all(batch_size):
            rows, weights = rows.to(device), weights.to(device)
            ids = rows[:, :-1].contiguous()
            total += float(
                dense.cross_entropy(
                    model.hidden(ids, packed(ids == SPECIAL["<bos>"])).flatten(0, 1), model.unembedding,
                    rows[:, 1:].flatten(), weights.flatten(), cap=model.config.final_softcap,
                )
            )  # fmt: skip
            count += float(weights.sum())
    return total / count


@torch.no_grad()
def accuracy(model: Gemma, tokenizer: Tokenizer, task: Task) -> float:
    """Share of items whose true choice has the highest log-likelihood after the context, per character.

    Dividing by length in characters (as lm-evaluation-harness's `acc_norm` does) keeps long choices from
    losing for being long. Context and choice are tokenised apart, alike for every choice. A context that does
    not fit the model's `max_seq_len` loses its beginning, but never `<bos>`.

    Raises:
        ValueError: a choice alone is longer than `max_seq_len`.
    """
    requests: list[Request] = []
    for item in task.items:
        before = tokenizer.encode(item.context, bos=True)
        for choice in item.choices:
            ids = tokenizer.encode(choice)
            room = model.config.max_seq_len - len(ids) - 1
            if room < 0:
                raise ValueError(
                    f"a choice of {task.name!r} has {len(ids)} tokens, and with <bos> that exceeds the "
                    f"model's max_seq_len={model.config.max_seq_len}. Leave it out, or use another model."
                )
            requests.append((before[:1] + before[max(1, len(before) - room) :], ids))
    scores = iter(log_likelihoods(model, requests))
    right = 0
    for item in task.items:
        per_character = [next(scores).log_p / len(choice) for choice in item.choices]
        right += per_character.index(max(per_character)) == item.answer
    return right / len(task.items)


@torch.no_grad()
def log_likelihoods(
    model: Gemma,
    requests: Sequence[Request],
    *,
    batch_tokens: int = _BATCH_TOKENS,
    advance: Callable[[int], None] | None = None,
) -> list[Scored]:
    """How likely each continuation is after its context, in the order of `requests`.

    Args:
        batch_tokens: most tokens a forward pass, and in the caches under it; one text may have more.
        advance: told how many more requests are done, now and then.
    Raises:
        ValueError: a context or continuation is empty; or so long that the model would read more than its
            `max_seq_len` (of the continuation it reads all but the last id).
    """
    _require_read(model, requests)
    chains = _chains(_texts(requests))
    alone = [chain[0] for chain in chains if len(chain) == 1]
    chained = [chain for chain in chains if len(chain) > 1]
    total = torch.zeros(len(requests), dtype=torch.float64)
    wrong = torch.zeros(len(requests), dtype=torch.bool)
    left = torch.tensor([len(continuation) for _, continuation in requests])
    # Layers compiled for training run eagerly here, as above.
    with torch.compiler.set_stance("eager_on_recompile"):
        for road in (_side_by_side(model, alone, batch_tokens), _on_caches(model, chained, batch_tokens)):
            for log_p, likeliest, index in _scored(model, road):
                total.index_add_(0, index, log_p)
                wrong[index[~likeliest]] = True
                left.index_add_(0, index, -torch.ones_like(index))
                if advance is not None:
                    advance(int((left[index.unique()] == 0).sum()))
    return [Scored(*one) for one in zip(total.tolist(), (~wrong).tolist(), strict=True)]


Ask = tuple[int, int]
"""The number of a request, and the id that it has at a place."""
_Read = tuple[Float[Tensor, "N D"], list[list[Ask]]]
"""Hidden states, and what is asked of each."""


@dataclass(eq=False)
class _Text:
    """Ids that are read, of which the first `shared` are those of the text before; and what is asked, by
    the place of the id after which it is asked. A place is asked only in the first text that has it."""

    ids: list[int]
    shared: int
    asked: dict[int, list[Ask]] = field(default_factory=dict)


def _require_read(model: Gemma, requests: Sequence[Request]) -> None:
    longest = model.config.max_seq_len
    for number, (context, continuation) in enumerate(requests):
        for name, ids in (("context", context), ("continuation", continuation)):
            if not len(ids):
                raise ValueError(
                    f"request {number} has no {name}. Give each at least one id: <bos> is a context."
                )
        if len(context) + len(continuation) - 1 > longest:
            raise ValueError(
                f"request {number} has {len(context)} ids of context and {len(continuation)} to score: more "
                f"than the model reads, max_seq_len={longest} and one. Leave out the context's beginning."
            )


def _texts(requests: Sequence[Request]) -> list[_Text]:
    """What has to be read, in order. A text that begins the next one is part of it."""
    read = [[*context, *continuation[:-1]] for context, continuation in requests]
    texts: list[_Text] = []
    first: list[_Text] = []  # of the last text's places, the text that had each first
    for number in sorted(range(len(read)), key=read.__getitem__):
        ids = read[number]
        shared = _in_common(texts[-1].ids, ids) if texts else 0
        if texts and shared == len(texts[-1].ids):
            texts[-1].ids = ids
        else:
            texts.append(_Text(ids, shared))
        first[shared:] = [texts[-1]] * (len(ids) - shared)
        context, continuation = requests[number]
        for place, wanted in enumerate(continuation, len(context) - 1):
            first[place].asked.setdefault(place, []).append((number, int(wanted)))
    return texts


def _in_common(one: list[int], other: list[int]) -> int:
    """How many ids two lists begin with alike, by halving: comparing slices is quick."""
    lengths = range(1, min(len(one), len(other)) + 1)
    return bisect_left(lengths, True, key=lambda length: one[:length] != other[:length])


def _chains(texts: Sequence[_Text]) -> list[list[_Text]]:
    """Runs of texts to be read one after the other in one cache. The first of each is read as a whole."""
    chains: list[list[_Text]] = []
    read = 0
    for text in texts:
        new = len(text.ids) - text.shared
        if chains and text.shared >= _SHARED and read + new <= _AGAIN * len(chains[-1][0].ids):
            chains[-1].append(text)
            read += new
        else:
            text.shared = 0
            chains.append([text])
            read = len(text.ids)
    return chains


def _side_by_side(model: Gemma, texts: Sequence[_Text], batch_tokens: int) -> Iterator[_Read]:
    """Texts that share nothing, those of like length as rows of a batch, padded on the right."""
    waiting = deque(sorted(texts, key=lambda text: -len(text.ids)))
    while waiting:
        width = len(waiting[0].ids)
        rows = [waiting.popleft() for _ in range(min(len(waiting), max(1, batch_tokens // width)))]
        ids = torch.full((len(rows), width), SPECIAL["<pad>"])
        for row, text in zip(ids, rows, strict=True):
            row[: len(text.ids)] = torch.tensor(text.ids)
        asked = [(row, place) for row, text in enumerate(rows) for place in text.asked]
        row, column = torch.tensor(asked).to(model.device).T
        hidden = model.hidden(ids.to(model.device))[row, column]
        yield hidden, [asks for text in rows for asks in text.asked.values()]


def _on_caches(model: Gemma, chains: Sequence[list[_Text]], batch_tokens: int) -> Iterator[_Read]:
    """Chains, many at a time: in each pass one text of each, of which only what is new is read."""
    waiting = deque(sorted(chains, key=_longest, reverse=True))
    running: list[tuple[KVCache, deque[_Text], int]] = []
    while waiting or running:
        room = batch_tokens - sum(reserved for *_, reserved in running)
        while waiting and (not running or _longest(waiting[0]) <= room):
            chain = waiting.popleft()
            reserved = _longest(chain)
            # Its local layers forget nothing either: any text may cut the one before back to anywhere.
            cache = KVCache(model.config, rewind=model.config.max_seq_len, reserve=reserved)
            running.append((cache, deque(chain), reserved))
            room -= reserved
        texts = [chain.popleft() for _, chain, _ in running]
        new: list[int] = []
        places: list[int] = []
        for (cache, *_), text in zip(running, texts, strict=True):
            cache.cut(text.shared)
            places += [len(new) + place - text.shared for place in text.asked]
            new += text.ids[text.shared :]
        hidden = model.hidden(
            torch.tensor([new], device=model.device), caches=[cache for cache, *_ in running],
            lengths=[len(text.ids) - text.shared for text in texts],
        )  # fmt: skip
        yield hidden[0, places], [asks for text in texts for asks in text.asked.values()]
        running = [one for one in running if one[1]]


def _longest(chain: Sequence[_Text]) -> int:
    return max(len(text.ids) for text in chain)


def _scored(model: Gemma, road: Iterator[_Read]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each asked id its log-probability, whether it was the likeliest, and the number of its request."""
    few = max(1, _CHUNK_BYTES // (4 * model.config.vocab_size))
    for hidden, asked in _regrouped(road, few):
        flat = [(row, *ask) for row, asks in enumerate(asked) for ask in asks]
        row, index, wanted = torch.tensor(flat).T
        row, wanted = row.to(hidden.device), wanted.to(hidden.device)
        logits = model.logits(hidden)
        top, likeliest = logits.max(-1)
        own = logits[row, wanted]
        # In place: a copy of so many logits takes as long as the sum.
        log_z = top + logits.sub_(top[:, None]).exp_().sum(-1).log()
        yield (own - log_z[row]).cpu().double(), (likeliest[row] == wanted).cpu(), index


def _regrouped(road: Iterator[_Read], few: int) -> Iterator[_Read]:
    """The same hidden states, `few` at a time."""
    held: list[Tensor] = []
    asked: list[list[Ask]] = []
    for hidden, asks in road:
        held.append(hidden)
        asked += asks
        if len(asked) >= few:
            whole = torch.cat(held)
            full = len(asked) - len(asked) % few
            yield from ((whole[at : at + few], asked[at : at + few]) for at in range(0, full, few))
            held, asked = [whole[full:].clone()], asked[full:]
    if asked:
        yield torch.cat(held), asked
