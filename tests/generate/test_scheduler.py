"""Continuous batching: each sequence gets what it would get alone, in its turn, within the memory given."""

import itertools
import random
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.generate import engine, scheduler
from gemwright.generate.engine import OutOfMemory, Session, cache_bytes
from gemwright.generate.sampling import Sampling, Token
from gemwright.generate.scheduler import Request, Scheduler
from gemwright.model.gemma import Gemma


def asked(max_tokens: int = 12, **options: Any) -> Sampling:
    return Sampling(**{"stop_ids": (), "logprobs": 2, **options, "max_tokens": max_tokens})


def text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(108, 200, (length - 1,), generator=generator).tolist()]


def alone(model: Gemma, prompt: Sequence[int], sampling: Sampling) -> list[Token]:
    session = Session(model)
    session.feed(prompt)
    return list(session.decode(sampling))


def assert_as_alone(model: Gemma, requests: Iterable[Request]) -> None:
    """The same ids, and log-probabilities that differ by rounding."""
    for request in requests:
        expected = alone(model, request.prompt, request.sampling)
        assert [token.id for token in request.tokens] == [token.id for token in expected]
        for ours, theirs in zip(request.tokens, expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [id for id, _ in ours.top] == [id for id, _ in theirs.top]


def finish(ours: Scheduler) -> dict[Request, list[Token | None]]:
    """Run to the end; what was told of each request."""
    told: dict[Request, list[Token | None]] = {}
    for request, token in ours.run():
        told.setdefault(request, []).append(token)
    return told


MIXED = [
    (1, asked(20)),
    (30, asked(5, temperature=1.3, seed=4)),
    (7, asked(12, temperature=0.8, top_k=5, seed=5)),
    (8, asked(1)),
    (9, asked(25, temperature=1.0, top_p=0.9, min_p=0.02, repetition_penalty=1.4, seed=6)),
    (16, asked(15, repetition_penalty=2.0)),
    (3, asked(18, temperature=2.0, seed=7)),
]


@pytest.mark.parametrize("max_batch", [1, 2, 5, 20])
@pytest.mark.parametrize("chunk", [512, 4])
def test_a_batch_of_unlike_requests_gives_each_what_it_gets_alone(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, max_batch: int, chunk: int
):
    """Prompts around the window and beyond, greedy and drawn, of one token and of many."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", chunk)
    ours = Scheduler(model, max_batch=max_batch)
    requests = [ours.submit(text(length, length), sampling) for length, sampling in MIXED]
    told = finish(ours)
    assert ours.idle
    assert {request.finish for request in requests} == {"length"}
    assert all(told[request] == request.tokens for request in requests)
    assert_as_alone(model, requests)


def test_who_joins_and_leaves_at_every_step_disturbs_nobody(model: Gemma):
    ours, requests = Scheduler(model, max_batch=4), []
    for step in range(24):
        requests.append(
            ours.submit(text(1 + step % 11, step), asked(1 + step % 6, temperature=step % 2, seed=step))
        )
        ours.step()
    finish(ours)
    assert {request.finish for request in requests} == {"length"}
    assert_as_alone(model, requests)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_each_gets_what_it_gets_alone(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, seed: int
):
    """Requests and cancellations at random, a bound of memory, prompts in small chunks."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 5)
    draw, bound = random.Random(seed), 3 * cache_bytes(model, 40)
    ours, requests, cancelled = Scheduler(model, max_batch=5, max_kv_bytes=bound), [], []
    for number in range(40):
        if draw.random() < 0.4:
            sampling = asked(draw.randint(1, 15), temperature=draw.choice([0.0, 1.0]), seed=number)
            requests.append(ours.submit(text(draw.randint(1, 25), number), sampling))
        unended = [request for request in requests if request.finish is None]
        if unended and draw.random() < 0.15:
            cancelled.append(draw.choice(unended))
            ours.cancel(cancelled[-1])
        ours.step()
        assert ours.kv_bytes <= bound
    finish(ours)
    assert len(cancelled) > 1
    assert [request for request in requests if request.finish == "cancelled"] == [
        request for request in requests if request in cancelled
    ]
    for request in cancelled:  # as far as they came
        expected = alone(model, request.prompt, request.sampling)[: len(request.tokens)]
        assert [token.id for token in request.tokens] == [token.id for token in expected]
    assert_as_alone(model, [request for request in requests if request not in cancelled])


def test_a_model_in_bf16_runs_a_batch(biting: Callable[..., Gemma]):
    narrow = biting().bfloat16()
    ours = Scheduler(narrow)
    requests = [ours.submit(text(length, length), asked(10)) for length in (3, 12, 9)]
    finish(ours)
    for request in requests:
        (first, *_), expected = request.tokens, alone(narrow, request.prompt, request.sampling)
        assert first.logprob == pytest.approx(expected[0].logprob, abs=0.1)
        assert len(request.tokens) == 10


# Where a request ends.


def test_a_stop_id_ends_one_request_and_is_told_as_nothing(model: Gemma):
    whole = [token.id for token in alone(model, text(6), asked(12))]
    place = next(place for place in range(3, 12) if whole[place] not in whole[:place])
    ours = Scheduler(model)
    stopped = ours.submit(text(6), asked(12, stop_ids=(whole[place],)))
    other = ours.submit(text(6), asked(12))
    told = finish(ours)
    assert (stopped.finish, other.finish) == ("stop", "length")
    assert [token.id for token in stopped.tokens] == whole[:place]
    assert told[stopped] == [*stopped.tokens, None]
    assert told[other] == other.tokens
    assert [token.id for token in other.tokens] == whole


def test_a_request_may_stop_before_its_first_token(model: Gemma):
    (first,) = alone(model, text(6), asked(1))
    ours = Scheduler(model)
    request = ours.submit(text(6), asked(12, stop_ids=(first.id,)))
    assert ours.step() == [(request, None)]
    assert (request.finish, request.tokens, ours.idle) == ("stop", [], True)


def test_a_request_of_one_token_is_over_with_its_prompt(model: Gemma):
    ours = Scheduler(model)
    request = ours.submit(text(6), asked(1))
    assert ours.step() == [(request, request.tokens[0])]
    assert request.finish == "length"
    assert ours.kv_bytes == 0


def test_while_it_waits_or_runs_a_request_has_no_end(model: Gemma):
    ours = Scheduler(model, max_batch=1)
    running, waiting = (ours.submit(text(6), asked(9)) for _ in range(2))
    ours.step()
    assert running.finish is waiting.finish is None
    assert running.tokens
    assert not waiting.tokens


def test_nothing_to_do_is_no_step(model: Gemma):
    ours = Scheduler(model)
    assert ours.idle
    assert ours.step() == []
    assert list(ours.run()) == []


# Who comes when.


@pytest.mark.parametrize("max_batch", [1, 3])
def test_requests_start_in_the_order_they_came(model: Gemma, max_batch: int):
    ours = Scheduler(model, max_batch=max_batch)
    requests = [ours.submit(text(length), asked(4)) for length in (9, 2, 20, 1, 5, 3)]
    assert list(dict.fromkeys(request for request, _ in ours.run())) == requests


def test_a_small_request_does_not_overtake_a_large_one_that_waits_for_memory(model: Gemma):
    bound = cache_bytes(model, 40)
    ours = Scheduler(model, max_kv_bytes=bound)
    first, large, small = (
        ours.submit(text(length), asked(count)) for length, count in ((20, 6), (30, 10), (2, 2))
    )
    for _ in range(3):
        assert {request for request, _ in ours.step()} <= {first}
    assert list(dict.fromkeys(request for request, _ in ours.run())) == [first, large, small]
    assert_as_alone(model, (first, large, small))


def test_a_long_prompt_holds_nobody_up(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    """It is read 3 tokens a step, and all the while the others get a token at every step."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 3)
    ours = Scheduler(model)
    others = [ours.submit(text(2, seed), asked(30)) for seed in (1, 2)]
    while not all(other.tokens for other in others):
        ours.step()
    long = ours.submit(text(30), asked(5))
    for step in range(10):
        told = [request for request, _ in ours.step()]
        assert [told.count(other) for other in others] == [1, 1]
        assert bool(long.tokens) == (step == 9)
    finish(ours)
    assert_as_alone(model, [*others, long])


def test_two_long_prompts_are_read_one_after_the_other(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 5)
    ours = Scheduler(model)
    first, second = (ours.submit(text(length), asked(20)) for length in (20, 10))
    begun: dict[Request, int] = {}
    for step in range(1, 7):
        for request, _ in ours.step():
            begun.setdefault(request, step)
    assert begun == {first: 4, second: 6}


def test_no_step_reads_more_than_a_chunk_and_a_token_of_each(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 4)
    shapes: list[tuple[int, ...]] = []
    hidden = model.hidden

    def watch(ids: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(ids.shape))
        return hidden(ids, **options)

    monkeypatch.setattr(model, "hidden", watch)
    ours = Scheduler(model, max_batch=3)
    for length in (9, 3, 14, 2, 6):
        ours.submit(text(length), asked(7))
    most = 0
    while not ours.idle:
        shapes.clear()
        ours.step()
        ((rows, width),) = shapes
        assert rows == 1
        assert width <= 4 + 3
        most = max(most, width)
    assert most == 4 + 2  # two who draw, while a prompt is read


def test_who_is_submitted_during_a_run_runs_too(model: Gemma):
    ours, prompts = Scheduler(model, max_batch=2), [text(length, length) for length in (4, 9, 2, 12)]
    requests = [ours.submit(prompts.pop(), asked(5))]
    for _ in ours.run():
        if prompts:
            requests.append(ours.submit(prompts.pop(), asked(5)))
    assert len(requests) == 4
    assert {request.finish for request in requests} == {"length"}
    assert_as_alone(model, requests)


# Memory.


@pytest.mark.parametrize("max_batch", [2, 8])
def test_keys_and_values_never_exceed_the_bound(model: Gemma, max_batch: int):
    """Neither what is reserved nor what the buffers hold; and what is reserved is what they hold at last."""
    bound = cache_bytes(model, 20) + cache_bytes(model, 35)
    ours = Scheduler(model, max_batch=max_batch, max_kv_bytes=bound)
    draw = random.Random(2)
    for number in range(20):
        ours.submit(text(draw.randint(1, 25), number), asked(draw.randint(1, 20)))
    most = most_at_once = 0
    while not ours.idle:
        ours.step()
        held = sum(request._cache.bytes for request in ours._running if request._cache is not None)
        assert held <= ours.kv_bytes <= bound
        most, most_at_once = max(most, held), max(most_at_once, len(ours._running))
    assert most > bound / 2
    assert 2 <= most_at_once <= max_batch


def test_the_bound_is_used_to_its_last_byte(model: Gemma):
    for spare, running in ((0, 2), (-1, 1)):
        ours = Scheduler(model, max_kv_bytes=2 * cache_bytes(model, 20) + spare)
        for _ in range(3):
            ours.submit(text(10), asked(10))
        ours.step()
        assert ours.kv_bytes == running * cache_bytes(model, 20)


def test_an_ended_request_holds_no_cache(model: Gemma):
    ours = Scheduler(model)
    short, long = ours.submit(text(5), asked(2)), ours.submit(text(5), asked(20))
    ours._admit()
    assert short._cache is not None
    cache = weakref.ref(short._cache)
    while short.finish is None:
        ours.step()
    assert cache() is None
    assert ours.kv_bytes == cache_bytes(model, 25)
    assert long.finish is None


# Cancelling.


@pytest.mark.parametrize(
    "steps", [1, 3, 12], ids=["with its prompt half read", "with its prompt read", "long after"]
)
def test_a_cancelled_request_frees_its_cache_at_once(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, steps: int
):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK", 5)
    ours = Scheduler(model)
    request, other = ours.submit(text(15), asked(20)), ours.submit(text(4), asked(20))
    for _ in range(steps):
        ours.step()
    assert request._cache is not None
    cache, held = weakref.ref(request._cache), [weakref.ref(layer.keys) for layer in request._cache.layers]
    ours.cancel(request)
    assert cache() is None
    assert not any(buffer() is not None for buffer in held)
    assert ours.kv_bytes == cache_bytes(model, 24)
    tokens = list(request.tokens)
    assert request not in finish(ours)
    assert (request.finish, request.tokens) == ("cancelled", tokens)
    assert_as_alone(model, [other])


def test_a_request_cancelled_while_it_waits_never_runs(model: Gemma):
    ours = Scheduler(model, max_batch=1)
    first, unwanted, last = (ours.submit(text(4), asked(3)) for _ in range(3))
    ours.step()
    ours.cancel(unwanted)
    told = finish(ours)
    assert set(told) == {first, last}
    assert (unwanted.finish, unwanted.tokens) == ("cancelled", [])


def test_cancelling_makes_room_for_who_waits(model: Gemma):
    ours = Scheduler(model, max_batch=1)
    first, second = (ours.submit(text(4), asked(30)) for _ in range(2))
    ours.step()
    ours.cancel(first)
    assert {request for request, _ in ours.step()} == {second}


def test_cancelling_what_has_ended_changes_nothing(model: Gemma):
    ours = Scheduler(model)
    request = ours.submit(text(4), asked(2))
    finish(ours)
    ours.cancel(request)
    ours.cancel(request)
    assert request.finish == "length"
    assert len(request.tokens) == 2


def test_of_a_request_that_is_cancelled_during_a_run_nothing_more_is_told(model: Gemma):
    """Not even the token that it drew in the step that is being told of."""
    ours = Scheduler(model)
    first, second = (ours.submit(text(4, seed), asked(10)) for seed in (1, 2))
    for request, _ in ours.run():
        assert request.finish != "cancelled"
        if request is first and second.tokens:
            ours.cancel(second)
    assert (first.finish, second.finish) == ("length", "cancelled")


# What cannot be done.


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ([], {}, "the prompt is empty"),
        ([2, 200], {}, r"the prompt holds the id 200, outside 0\.\.199"),
        (text(5), {"stop_ids": (200,)}, r"stop_ids holds the id 200"),
        (text(5), {"max_tokens": 60}, "exceed the model's max_seq_len=64"),
        (
            text(21),
            {"max_tokens": 20},
            "21 tokens of prompt and 20 new ones need .* max_kv_bytes is .* raise the bound",
        ),
    ],
)
def test_what_could_never_run_is_refused_when_it_is_submitted(
    model: Gemma, prompt: list[int], options: dict[str, Any], told: str
):
    ours = Scheduler(model, max_kv_bytes=cache_bytes(model, 40))
    fits = ours.submit(text(20), asked(20))
    with pytest.raises(ValueError, match=told):
        ours.submit(prompt, asked(**{"max_tokens": 4, **options}))
    assert set(finish(ours)) == {fits}


def test_what_does_not_fit_into_the_machine_is_refused(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "available_memory", lambda _device: 100)
    with pytest.raises(OutOfMemory, match="the keys and values of 9 tokens"):
        Scheduler(model).submit(text(5), asked(4))


@pytest.mark.parametrize("max_batch", [0, -1])
def test_a_batch_of_none_is_refused(model: Gemma, max_batch: int):
    with pytest.raises(ValueError, match=f"max_batch={max_batch} must be at least 1"):
        Scheduler(model, max_batch=max_batch)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("a cable was pulled"), RuntimeError),
        (RuntimeError("not enough memory: you tried to allocate 9 bytes"), OutOfMemory),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=repr,
)
def test_a_step_that_fails_ends_who_was_running_and_nobody_else(
    model: Gemma, error: BaseException, raised: type[BaseException]
):
    """Their caches are torn between two layers; who waits has none yet."""
    ours = Scheduler(model, max_batch=2)
    requests = [ours.submit(text(4, seed), asked(6)) for seed in range(5)]
    calls = itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 4:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(raised):
        finish(ours)
    handle.remove()
    assert [request.finish for request in requests] == ["cancelled"] * 2 + [None] * 3
    assert ours.kv_bytes == 0
    late = ours.submit(text(8), asked(6))
    assert set(finish(ours)) == {*requests[2:], late}
    assert_as_alone(model, [*requests[2:], late])


def test_gradients_are_not_left_switched_off_nor_taken(model: Gemma):
    ours = Scheduler(model)
    request = ours.submit(text(4), asked(6))
    ours.step()
    assert torch.is_grad_enabled()
    assert request._cache is not None
    assert not any(layer.keys.requires_grad for layer in request._cache.layers if layer.keys is not None)
