"""Rollouts: whole conversations, each as it would come alone, with the ids as they were drawn."""

import pytest
import torch

from gemwright.generate.engine import Session
from gemwright.generate.rollout import Rollout, rollouts
from gemwright.generate.sampling import Sampling
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.chat import encode_conversation, encode_prompt
from gemwright.tokenizer.tokenizer import CONTROL, Tokenizer

END, EOS = CONTROL["<end_of_turn>"], 1
HOW = Sampling(max_tokens=12, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def model(tiny: GemmaConfig) -> Gemma:
    """One that often ends its turn: the row of <end_of_turn> points where the states of this seed do."""
    torch.manual_seed(3)
    gemma = Gemma(tiny.but(init_std=0.3, max_seq_len=160)).eval()
    with torch.no_grad():
        states = gemma.hidden(torch.randint(108, 700, (1, 60)))[0]
        gemma.unembedding[END] = 6.0 * states.mean(0)
    return gemma


def all_of(model: Gemma, tokenizer: Tokenizer, turns: list[list[str]], how=HOW, **options) -> list[Rollout]:
    found = dict(rollouts(model, tokenizer, enumerate(turns), how, **options))
    assert sorted(found) == list(range(len(turns)))
    return [found[number] for number in range(len(turns))]


TURNS = [["def a():"], ["one", "and two"], ["return", "if", "else"], ["what is abc"], ["x = 1", "y = 2"]]


def test_a_conversation_is_what_a_session_alone_would_have_made_of_it(model, tokenizer):
    for number, rollout in enumerate(all_of(model, tokenizer, TURNS, max_batch=3)):
        session = Session(model)
        session.feed(encode_prompt(tokenizer, [{"role": "user", "content": TURNS[number][0]}]))
        drawn = list(session.decode(HOW.but(seed=HOW.seed + number)))
        assert [token.id for token in drawn] == list(rollout.replies[0].ids)
        assert session.finish == rollout.replies[0].finish


def test_a_complete_one_has_the_ids_of_its_messages_unless_a_word_was_spelt_otherwise(model, tokenizer):
    complete = [one for one in all_of(model, tokenizer, TURNS) if one.complete]
    assert any(len(one.turns) > 1 for one in complete)
    for one in complete:
        ids, mask = encode_conversation(tokenizer, one.messages)
        respelt = any(tokenizer.encode(reply.text) != list(reply.ids) for reply in one.replies)
        assert respelt or (ids, mask) == (list(one.ids), list(one.mask))
        assert sum(one.mask) == sum(len(reply.ids) + 1 for reply in one.replies) + 1
        assert one.ids[-2:] == (END, EOS)


def test_one_that_was_cut_by_length_ends_there_and_is_not_complete(model, tokenizer):
    (one,) = all_of(model, tokenizer, [["def a():", "never asked"]], HOW.but(max_tokens=1, seed=0))
    assert (one.turns, one.complete, one.replies[0].finish) == (("def a():",), False, "length")
    assert one.ids[-1] == one.replies[0].ids[-1]
    assert one.mask[-1]


def test_a_reply_ends_where_the_context_is_full(model, tokenizer):
    (one,) = all_of(model, tokenizer, [["def a():"]], HOW.but(max_tokens=1000, stop_ids=()))
    assert (one.replies[0].finish, len(one.ids)) == ("length", 160)


def test_an_end_of_sequence_ends_the_conversation_with_itself_alone(model, tokenizer):
    always = Sampling(max_tokens=4, stop_ids=(EOS, END))
    with torch.no_grad():
        kept = model.unembedding.clone()
        model.unembedding[EOS] = 100 * model.unembedding[END]
    try:
        alone, first_of_two = all_of(model, tokenizer, [["a"], ["a", "b"]], always)
    finally:
        with torch.no_grad():
            model.unembedding.copy_(kept)
    assert (alone.complete, alone.replies[0].ids, alone.ids[-1]) == (True, (), EOS)
    assert not first_of_two.complete
    assert sum(alone.mask) == sum(first_of_two.mask) == 1


def test_a_later_turn_that_does_not_fit_ends_the_conversation(model, tokenizer):
    for one in all_of(model, tokenizer, [["a", "word " * 150]]):
        assert (one.turns, one.complete) == (("a",), False)


def test_a_first_turn_that_does_not_fit_is_refused_with_its_number(model, tokenizer):
    with pytest.raises(ValueError, match=r"prompt 1: .* exceed the model's max_seq_len=160"):
        all_of(model, tokenizer, [["a"], ["word " * 200]])


def test_conversations_without_turns_and_stop_strings_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="prompt 0: the conversation is empty"):
        all_of(model, tokenizer, [[]])
    with pytest.raises(ValueError, match="turns end by a token"):
        all_of(model, tokenizer, [["a"]], HOW.but(stop=("x",)))
