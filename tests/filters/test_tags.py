"""Answers that hedge, refuse or attribute, and others that only look like it."""

import pytest

from gemwright.filters.tags import TAGS, tags_of

ASKED = "Here is a letter: The ship left the old harbour at dawn, without its captain. Who was on board?"


@pytest.mark.parametrize(
    "answer",
    [
        "I'm not sure, but the ship left at dawn.",
        "I am not entirely certain when it left.",
        "I’m unsure about the captain.",
        "It was founded in 1820, if I remember correctly.",
        "I may be wrong, but it was Vienna.",
        "As far as I know, it has two.",
        "It probably sorts the list.",
        "By its name, it probably has to do with parsing.",
        "Perhaps the captain was ill.",
        "It may depend on the weather.",
        "It might be a method.",
        "The captain was most likely ill.",
        "It is not clear whether anyone was on board.",
        "It is hard to say for sure.",
    ],
)
def test_hedging_is_found(answer: str):
    assert "hedging" in tags_of(answer, ASKED)


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sure that it left at dawn.",
        "It may be used with two arguments.",
        "The maximum likelihood estimate is the mean.",
        "On 5 May the ship left.",
        "The probability is one half.",
        "Might makes right, he thought.",
        "This is perhaps the most famous of his plays.",
        "She said: “I'm not sure.” Then she left.",
        'The text "it is probably late" has five words.',
        "```\nprint('probably')\n```",
        "Use `maybe` to wrap the value.",
    ],
)
def test_what_only_looks_like_hedging_is_none(answer: str):
    assert "hedging" not in tags_of(answer, ASKED)


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help with that.",
        "I cannot help you to break in.",
        "I'm sorry, but I can’t assist with this request.",
        "I cannot tell that from the signature.",
        "I cannot tell.",
        "I'm unable to provide medical advice.",
        "I am not able to access the file.",
        "I won't write that.",
        "I do not know who wrote it.",
        "I don't know.",
        "I don't have enough information to answer.",
        "I must decline.",
        "I'd rather not say.",
        "The letter says little, and the text does not mention a crew.",
    ],
)
def test_refusals_are_found(answer: str):
    assert "refusal" in tags_of(answer, ASKED)


@pytest.mark.parametrize(
    "answer",
    [
        "I can't help laughing at it.",
        "I cannot tell you how happy I am.",
        "I can't wait to see it.",
        "I can't give up now, she thought.",
        "I cannot say enough good things about it.",
        "You cannot help with that, the captain can.",
        "I don't know about you, but I like it.",
        "The function cannot provide a value.",
        "Tell them “I can't help with that” and hang up.",
        'raise ValueError("I cannot tell.")',
        "The code does not show a warning.",
        "I could not answer, for the wind was too loud.",
    ],
)
def test_what_only_looks_like_a_refusal_is_none(answer: str):
    assert "refusal" not in tags_of(answer, ASKED)


@pytest.mark.parametrize(
    "answer",
    [
        "According to the text, nobody was.",
        "Based on your letter, nobody was.",
        "As stated in the passage, it left at dawn.",
        "It takes two, as the signature shows.",
        "It is a method, since its first parameter is self.",
        "The letter says that it left at dawn.",
        "In the code above, the loop ends.",
        "The crew: it left “the old harbour at dawn”, we read.",
        'It says "Left the OLD harbour, at dawn".',
        "By its name, it probably has to do with parsing.",
    ],
)
def test_attribution_is_found(answer: str):
    assert "attribution" in tags_of(answer, ASKED)


def test_code_of_the_users_that_is_quoted_is_attribution():
    asked = "What does `def parse(line, strict=False)` return?"
    assert tags_of("`def parse(line, strict=False)` returns a tree.", asked) == ("attribution",)


@pytest.mark.parametrize(
    "answer",
    [
        "According to the law, a captain stays on board.",
        "According to Darwin, species change.",
        "Nobody was on board.",
        "He cried “all hands on deck, now”.",
        "It left “the old harbour”.",
        "The code prints a list. The first parameter is a number.",
        "Write a letter to the owner.",
    ],
)
def test_what_only_looks_like_attribution_is_none(answer: str):
    assert "attribution" not in tags_of(answer, ASKED)


def test_an_answer_may_have_several_tags_in_their_order():
    answer = "According to the text it left at dawn. I cannot tell who was there; probably nobody."
    assert tags_of(answer, ASKED) == TAGS


def test_a_plain_answer_has_none():
    assert tags_of("Nobody.", ASKED) == tags_of("", "") == ()
