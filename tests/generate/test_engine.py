"""A session says what reading everything again for every token would say, and goes on after anything."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.generate import engine
from gemwright.generate.engine import OutOfMemory, Session, cache_bytes
from gemwright.generate.sampling import Sampling, Token
from gemwright.model.gemma import Gemma

PROMPT = [2, 150, 30, 45, 60]


def asked(max_tokens: int = 30, **options: Any) -> Sampling:
    return Sampling(**{"stop_ids": (), **options, "max_tokens": max_tokens})


def text(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [2, *torch.randint(108, 200, (length - 1,), generator=generator).tolist()]


def session(model: Gemma, ids: Sequence[int] = (), **options: int) -> Session:
    made = Session(model, **options)
    made.feed(ids)
    return made


def drawn(ours: Session, max_tokens: int = 30, **options: Any) -> list[int]:
    return [token.id for token in ours.decode(asked(max_tokens, **options))]


@torch.no_grad()
def read_again(model: Gemma, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy decoding without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture
def widths(model: Gemma, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model read at each call."""
    read: list[int] = []
    hidden = model.hidden

    def watch(ids: Tensor, *rest: Any, **options: Any) -> Tensor:
        read.append(ids.shape[1])
        return hidden(ids, *rest, **options)

    monkeypatch.setattr(model, "hidden", watch)
    return read


# With a cache and without.


@pytest.mark.parametrize("length", [1, 5, 7, 8, 9, 16, 20])
def test_greedy_decoding_is_the_argmax_of_the_full_forward_pass(model: Gemma, length: int):
    """Prompts shorter than the window, as long, and longer: the ring may not forget too early."""
    ours = session(model, text(length))
    ids = drawn(ours)
    assert ids == read_again(model, text(length), 30)
    assert ours.ids == text(length) + ids
    assert len(set(ids)) > 5, "a model that repeats itself would prove little"


@pytest.mark.parametrize(
    "changes", [{"window": 1}, {"window": 3}, {"pattern": ("sliding_attention",) * 2}], ids=str
)
def test_so_it_is_in_models_of_other_windows(biting: Callable[..., Gemma], changes: dict[str, Any]):
    other = biting(**changes)
    assert drawn(session(other, PROMPT)) == read_again(other, PROMPT, 30)


def test_the_window_matters_to_that_comparison(model: Gemma):
    assert drawn(session(model.with_window(9), PROMPT)) != drawn(session(model, PROMPT))


def test_log_probabilities_are_those_of_the_full_forward_pass(model: Gemma):
    """Numbers, not choices: a lost cap leaves every argmax as it was."""
    ours = session(model, text(6))
    tokens = list(ours.decode(asked(24, logprobs=3)))
    with torch.no_grad():
        full = model(torch.tensor([ours.ids]))[0].log_softmax(-1)
    for place, token in enumerate(tokens, start=5):
        assert token.logprob == pytest.approx(float(full[place, token.id]), abs=1e-4)
        ids, values = zip(*token.top, strict=True)
        assert ids[0] == token.id
        torch.testing.assert_close(torch.tensor(values), full[place, list(ids)], rtol=0, atol=1e-4)


def test_a_model_in_bf16_decodes_as_its_own_full_forward_pass(biting: Callable[..., Gemma]):
    narrow = biting().bfloat16()
    ours = session(narrow, text(6))
    tokens = list(ours.decode(asked(24, logprobs=0)))
    with torch.no_grad():
        full = narrow(torch.tensor([ours.ids]))[0].log_softmax(-1)
        exact = biting().bfloat16().float()(torch.tensor([ours.ids]))[0].log_softmax(-1)
    told = torch.tensor([token.logprob for token in tokens])
    at = torch.arange(5, 29), torch.tensor([token.id for token in tokens])
    assert (told - exact[at]).norm() < 2 * (full[at] - exact[at]).norm() + 0.01


@pytest.mark.parametrize(
    ("chunk", "length", "read"),
    [
        (1, 4, [1, 1, 1, 1]),
        (3, 7, [3, 3, 1]),
        (3, 6, [3, 3]),
        (7, 20, [7, 7, 6]),
        (8, 17, [8, 8, 1]),
        (20, 20, [20]),
    ],
)
def test_a_prompt_read_in_chunks_gives_what_the_whole_gives(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, widths: list[int], chunk: int, length: int, read: list[int]
):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    ids = drawn(session(model, text(length)), 20)
    assert widths == read + [1] * 19
    assert ids == read_again(model, text(length), 20)


@pytest.mark.parametrize(
    ("chunk", "positions"), [(3, 1), (3, 2), (3, 3), (3, 4), (3, 20), (7, 6), (8, 12), (512, 1), (512, 20)]
)
def test_the_logits_of_the_last_positions_are_those_of_the_full_forward_pass(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, chunk: int, positions: int
):
    """As a draft's proposals are judged, in chunks that may be shorter than what is judged."""
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    logits = session(model, text(20)).advance(positions)
    with torch.no_grad():
        expected = model(torch.tensor([text(20)]))[0, -positions:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# Turn after turn.


@pytest.mark.parametrize("turns", [(1, 1, 1), (3, 9, 2), (12, 5, 1), (7, 1, 8)], ids=str)
@pytest.mark.parametrize("chunk", [512, 4])
def test_a_session_fed_turn_by_turn_says_what_it_would_of_the_whole(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, turns: tuple[int, ...], chunk: int
):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    ours, whole = Session(model), []
    for number, length in enumerate(turns):
        turn = text(length, seed=number)
        ours.feed(turn)
        whole += turn
        ids = drawn(ours, 8)
        assert ids == read_again(model, whole, 8)
        whole += ids
    assert ours.ids == whole


def test_nothing_is_read_twice(model: Gemma, widths: list[int]):
    ours = session(model, text(6))
    for seed in range(3):
        drawn(ours, 4)
        ours.feed(text(3, seed))
    assert sum(widths) == 6 + 4 + 3 + 4 + 3 + 4 - 1


def test_who_takes_one_token_only_pays_for_one(model: Gemma, widths: list[int]):
    ids = session(model, PROMPT).decode(asked(10))
    assert widths == []
    next(ids)
    assert widths == [5]
    next(ids)
    assert widths == [5, 1]


def test_a_continuation_that_nobody_wants_any_longer_can_be_gone_on_from(model: Gemma):
    ours = session(model, text(7))
    first = [token.id for token in itertools.islice(ours.decode(asked()), 3)]
    assert ours.ids == text(7) + first
    assert drawn(ours, 10) == read_again(model, text(7) + first, 10)


def test_a_continuation_taken_up_again_after_another_text_was_fed(model: Gemma):
    """The first one is still there, and not ended."""
    ours = session(model, text(7))
    unfinished = ours.decode(asked())
    first = [next(unfinished).id for _ in range(3)]
    ours.feed(text(4))
    assert drawn(ours, 10) == read_again(model, text(7) + first + text(4), 10)


def test_two_sessions_at_once_do_not_disturb_each_other(model: Gemma):
    alone = [drawn(session(model, prompt), 8) for prompt in (PROMPT, [2, 133])]
    both = [session(model, prompt).decode(asked(8)) for prompt in (PROMPT, [2, 133])]
    together = [[token.id for token in tokens] for tokens in zip(*zip(*both, strict=True), strict=True)]
    assert together == alone


# Where it ends.


def test_it_ends_after_max_tokens(model: Gemma):
    whole = read_again(model, PROMPT, 12)
    for count in (1, 2, 12):
        ours = session(model, PROMPT)
        assert drawn(ours, count) == whole[:count]
        assert ours.finish == "length"


def first_new(whole: list[int], after: int) -> int:
    """The first place from there on whose token has not come before."""
    return next(place for place in range(after, len(whole)) if whole[place] not in whole[:place])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_it_ends_before_a_stop_id(model: Gemma, after: int):
    whole = read_again(model, PROMPT, 12)
    place = first_new(whole, after)
    stop = whole[place]
    ours = session(model, PROMPT)
    assert drawn(ours, 12, stop_ids=(199, stop)) == whole[:place]
    assert ours.ids == PROMPT + whole[:place]
    assert ours.finish == "stop"


def test_a_stop_id_that_stands_in_the_prompt_ends_nothing(model: Gemma):
    assert drawn(session(model, PROMPT), 4, stop_ids=(2,)) == read_again(model, PROMPT, 4)


def test_while_it_has_not_ended_there_is_no_reason(model: Gemma):
    ours = session(model, PROMPT)
    drawn(ours, 2)
    unfinished = ours.decode(asked(5))
    next(unfinished)
    assert ours.finish is None
    assert len(list(unfinished)) == 4
    assert ours.finish == "length"


def test_after_a_stop_the_next_turn_goes_on(model: Gemma):
    whole = read_again(model, text(7), 12)
    ours, place = session(model, text(7)), first_new(whole, 4)
    assert drawn(ours, 12, stop_ids=(whole[place],)) == whole[:place]
    ours.feed([107, 5])
    assert drawn(ours, 10) == read_again(model, [*text(7), *whole[:place], 107, 5], 10)


@pytest.mark.parametrize("length", [3, 7, 12])
def test_after_a_stop_the_same_turn_can_be_gone_on_with(model: Gemma, length: int):
    """Everything has been read already: what comes next has to be known all the same."""
    whole = read_again(model, text(length), 12)
    ours, place = session(model, text(length)), first_new(whole, 4)
    assert drawn(ours, 12, stop_ids=(whole[place],)) == whole[:place]
    assert drawn(ours, 12 - place) == whole[place:]


def test_prompt_and_new_tokens_may_fill_the_model(model: Gemma):
    ours = session(model, PROMPT)
    assert len(drawn(ours, 64 - 5)) == 59
    with pytest.raises(ValueError, match="64 tokens of prompt and 1 new ones exceed"):
        ours.decode(asked(1))


# What is drawn.


def test_one_seed_gives_one_continuation(model: Gemma):
    def ids(seed: int) -> list[int]:
        return drawn(session(model, PROMPT), 12, temperature=1.5, seed=seed)

    first = ids(1)
    torch.rand(7)  # the draws of others do not count
    assert ids(1) == first
    assert ids(2) != first


def test_the_seed_means_nothing_to_greedy_decoding(model: Gemma):
    assert drawn(session(model, PROMPT), 6, seed=1) == drawn(session(model, PROMPT), 6, seed=2)


def test_the_penalty_counts_prompt_and_continuation(model: Gemma):
    """So high that nothing comes twice, and nothing of the prompt."""
    prompt = [*PROMPT, read_again(model, PROMPT, 1)[0]]
    assert set(drawn(session(model, prompt), 30)) & set(prompt)
    ids = [*prompt, *drawn(session(model, prompt), 30, repetition_penalty=1e6)]
    assert len(set(ids)) == len(ids) == 36


# What was taken back, closed, or interrupted.


@pytest.mark.parametrize("rewind", [0, 4])
@pytest.mark.parametrize("length", [0, 3, 7, 12, 20, 21])
def test_after_a_cut_another_text_goes_on(model: Gemma, length: int, rewind: int):
    """Within what the ring can take back, and far beyond it: then the text is read anew."""
    ours = session(model, text(12), rewind=rewind)
    ids = text(12) + drawn(ours, 10)
    ours.cut(length)
    assert ours.ids == ids[:length]
    ours.feed(text(4, seed=8))
    assert drawn(ours, 10) == read_again(model, ids[:length] + text(4, seed=8), 10)


@pytest.mark.parametrize("rewind", [0, 4])
@pytest.mark.parametrize("length", [1, 3, 11, 12, 20, 21, 22])
def test_after_a_cut_the_same_text_goes_on(model: Gemma, length: int, rewind: int):
    """Nothing is fed: the next token follows on the last that was kept."""
    ours = session(model, text(12), rewind=rewind)
    ids = text(12) + drawn(ours, 10)
    ours.cut(length)
    assert drawn(ours, 10) == read_again(model, ids[:length], 10)


def test_a_short_cut_reads_nothing_twice(model: Gemma, widths: list[int]):
    ours = session(model, text(20), rewind=4)
    drawn(ours, 1)
    ours.cut(17)
    ours.feed(text(2))
    drawn(ours, 1)
    assert widths == [20, 2]


def test_a_closed_session_frees_its_cache_and_goes_on(model: Gemma):
    ours = session(model, text(10))
    ids = drawn(ours, 6)
    cache = weakref.ref(ours.cache)
    ours.close()
    assert cache() is None
    assert drawn(ours, 6) == read_again(model, text(10) + ids, 6)


def test_a_session_closed_in_the_middle_of_a_continuation_goes_on_with_it(model: Gemma):
    ours = session(model, text(10))
    tokens = ours.decode(asked(12))
    first = [next(tokens).id for _ in range(4)]
    ours.close()
    assert first + [token.id for token in tokens] == read_again(model, text(10), 12)


@pytest.mark.parametrize("step", [0, 1, 5])
@pytest.mark.parametrize("error", [RuntimeError("a cable was pulled"), KeyboardInterrupt()], ids=repr)
def test_interrupted_between_two_layers_it_goes_on_as_if_nothing_had_happened(
    model: Gemma, step: int, error: BaseException
):
    """The first layer has stored the new token, the second has not."""
    whole = read_again(model, text(10), 12)
    ours, steps = session(model, text(10)), itertools.count()

    def fail(*_: Any) -> None:
        if next(steps) == step:
            raise error

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(type(error)):
        drawn(ours, 12)
    assert ours.ids == text(10) + whole[:step]
    assert drawn(ours, 12 - step) == whole[step:]
    handle.remove()


def test_what_an_interrupted_turn_has_written_over_is_not_taken_for_what_stood_there(model: Gemma):
    """The first layer's ring holds the new turn already; a cut within its slack would look behind that."""
    ours = session(model, text(20), rewind=4)
    drawn(ours, 1)
    ours.feed(text(8))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        drawn(ours, 1)
    handle.remove()
    ours.cut(17)
    ours.feed([150])
    assert drawn(ours, 10) == read_again(model, [*text(20)[:17], 150], 10)


@pytest.mark.parametrize("chunk", [3, 512])
def test_a_prompt_interrupted_between_two_chunks_is_read_again(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, chunk: int
):
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    ours, calls = session(model, text(10)), itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    handle = model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        drawn(ours, 12)
    handle.remove()
    drawn_before = ours.ids[10:]
    assert drawn_before + drawn(ours, 12 - len(drawn_before)) == read_again(model, text(10), 12)


def test_gradients_are_not_left_switched_off_nor_taken(model: Gemma):
    ours = session(model, PROMPT)
    tokens = ours.decode(asked(3))
    next(tokens)
    assert torch.is_grad_enabled()
    assert not any(layer.keys.requires_grad for layer in ours.cache.layers if layer.keys is not None)
    assert not ours.advance().requires_grad
    with pytest.raises(ZeroDivisionError):
        next(tokens.throw(ZeroDivisionError()))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.is_grad_enabled()


# What cannot be done.


@pytest.mark.parametrize(
    ("prompt", "options", "told"),
    [
        ([], {}, "the prompt is empty: begin with <bos>"),
        ([2, 200], {}, r"the prompt holds the id 200, outside 0\.\.199"),
        ([2, -1], {}, r"the prompt holds the id -1, outside 0\.\.199"),
        (PROMPT, {"stop_ids": (200,)}, r"stop_ids holds the id 200, outside 0\.\.199"),
        (PROMPT, {"max_tokens": 60}, "5 tokens of prompt and 60 new ones exceed the model's max_seq_len=64"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_computed(
    model: Gemma, widths: list[int], prompt: list[int], options: dict[str, Any], told: str
):
    """At the call, not at the first token that somebody asks for."""
    with pytest.raises(ValueError, match=told):
        session(model, prompt).decode(asked(**{"max_tokens": 4, **options}))
    assert widths == []


def test_after_a_refusal_the_session_is_as_it_was(model: Gemma):
    ours = session(model, text(10))
    ids = drawn(ours, 5)
    with pytest.raises(ValueError, match="exceed"):
        ours.decode(asked(60))
    assert ours.finish == "length"
    assert drawn(ours, 5) == read_again(model, text(10) + ids, 5)


# Memory.


def test_a_cache_is_allocated_once_for_all_that_is_asked_for(model: Gemma):
    ours = session(model, text(10))
    tokens = ours.decode(asked(20))
    next(tokens)
    assert ours.cache.bytes == cache_bytes(model, 30)
    assert len(list(tokens)) == 19
    assert ours.cache.bytes == cache_bytes(model, 30)


def test_what_does_not_fit_is_refused_before_anything_is_computed(
    model: Gemma, monkeypatch: pytest.MonkeyPatch, widths: list[int]
):
    need = cache_bytes(model, 60)
    monkeypatch.setattr(engine, "available_memory", lambda _device: need - 1)
    with pytest.raises(
        OutOfMemory, match=r"the keys and values of 60 tokens take 0 MiB, and 0 MiB are free.*Shorten"
    ):
        session(model, text(10)).decode(asked(50))
    assert widths == []
    monkeypatch.setattr(engine, "available_memory", lambda _device: need)
    assert len(drawn(session(model, text(10)), 50)) == 50


def test_where_nobody_knows_the_memory_nothing_is_refused(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "available_memory", lambda _device: None)
    assert len(drawn(session(model, text(10)), 5)) == 5


def test_what_a_session_holds_already_need_not_be_free(model: Gemma, monkeypatch: pytest.MonkeyPatch):
    """The second turn of a talk that fills half of the memory: what is new fits, and the rest is there."""
    ours = session(model, text(40))
    drawn(ours, 4)
    monkeypatch.setattr(engine, "available_memory", lambda _device: cache_bytes(model, 50) - 1)
    assert len(drawn(ours, 6)) == 6


@pytest.mark.parametrize(
    "words", ["DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.", None]
)
def test_exhausted_memory_is_explained(model: Gemma, words: str | None):
    """By an allocator's words, and by what torch says on this machine to a wish for a petabyte."""
    ours, calls = session(model, text(10)), itertools.count()

    def fail(*_: Any) -> None:
        if next(calls) == 3:
            if words:
                raise RuntimeError(words)
            torch.empty(1 << 50, dtype=torch.uint8)

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(
        OutOfMemory, match=r"the keys and values of 13 tokens take .* Shorten the text"
    ) as caught:
        drawn(ours, 12)
    assert isinstance(caught.value.__cause__, RuntimeError)
    handle.remove()
    assert ours.ids[10:] + drawn(ours, 9) == read_again(model, text(10), 12)


def test_other_errors_keep_their_own_words(model: Gemma):
    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not match")

    model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match") as caught:
        drawn(session(model, text(10)))
    assert not isinstance(caught.value, OutOfMemory)


def test_a_token_is_its_id_and_what_was_asked_for(model: Gemma):
    (token,) = session(model, PROMPT).decode(asked(1))
    assert token == Token(read_again(model, PROMPT, 1)[0])
