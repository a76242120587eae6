"""Ids one by one -> text: all of it, never taken back, up to a stop string."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemwright.tokenizer.stream import TextStream
from gemwright.tokenizer.tokenizer import Tokenizer

FIRST_BYTE = 217  # the id of <0x00>
seeded = settings(derandomize=True, deadline=None, max_examples=200)
any_text = st.lists(
    st.sampled_from(
        [" ", "   ", "\n", "\n\n", "\t", "def ", "the", "é", "日本", "ሰላም", "👍🏽", "�", "\x00", "▁"]
    )
    | st.text(max_size=4)
).map("".join)
hard_bytes = st.sampled_from(
    [0x00, 0x61, 0x80, 0xBF, 0xC0, 0xE1, 0x88, 0xB0, 0xED, 0xA0, 0xEF, 0xBD, 0xF0, 0x9F, 0xF4]
)
any_ids = st.lists(
    hard_bytes.map(FIRST_BYTE.__add__)
    | st.integers(FIRST_BYTE, FIRST_BYTE + 255)
    | st.integers(0, 1199)
    | st.sampled_from([0, 1, 2, 3, 106, 107, 108, 139])
)
letters = st.text("ab", min_size=1, max_size=4)


def shown(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*map(stream.push, ids), stream.finish()]


def cut(text: str, stop: Sequence[str]) -> str:
    return text[: min([text.index(word) for word in stop if word in text], default=len(text))]


def spelled(text: str) -> list[int]:
    """One id a byte."""
    return [FIRST_BYTE + byte for byte in text.encode()]


@seeded
@given(text=any_text)
def test_the_parts_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(shown(tokenizer, ids)) == tokenizer.decode(ids)


@seeded
@given(ids=any_ids)
def test_any_ids_show_what_they_decode_to(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(shown(tokenizer, ids)) == tokenizer.decode(ids)


def test_pieces_stand_for_the_same_text_wherever_they_are(tokenizer: Tokenizer) -> None:
    """Else an id could not be decoded by itself. Of Gemma's a sample."""
    size = tokenizer.vocab_size
    ids = [*range(1000), *range(1000, size, 1 + size // 10_000), *range(size - 100, size)]
    assert "".join(shown(tokenizer, ids)) == tokenizer.decode(ids)


@seeded
@given(ids=any_ids, stop=st.lists(st.sampled_from(["a", "�", "ሰ", "the", " ", "\n", "aa", "ab"]), max_size=3))
def test_any_ids_are_cut_before_the_first_stop_string(
    tokenizer: Tokenizer, ids: list[int], stop: list[str]
) -> None:
    assert "".join(shown(tokenizer, ids, stop)) == cut(tokenizer.decode(ids), stop)


@seeded
@given(text=st.text("abc", max_size=12), stop=st.lists(letters, max_size=3), data=st.data())
def test_however_a_text_is_cut_into_ids_it_stops_at_the_same_place(
    small: Tokenizer, text: str, stop: list[str], data: st.DataObject
) -> None:
    """With strings of two letters: many begin in vain, overlap, or lie in one another."""
    places = sorted(data.draw(st.sets(st.integers(0, len(text)))) | {0, len(text)})
    parts = [text[a:b] for a, b in pairwise(places)]
    ids = [id for part in parts for id in small.encode(part)]
    stream = TextStream(small, stop)
    told = "".join([*map(stream.push, ids), stream.finish()])
    assert told == stream.text == cut(text, stop)
    assert stream.stopped == any(word in text for word in stop)


@seeded
@given(text=st.text("abc", max_size=12), stop=st.lists(letters, max_size=3))
def test_nothing_is_held_back_but_the_beginning_of_a_stop_string(
    small: Tokenizer, text: str, stop: list[str]
) -> None:
    stream = TextStream(small, stop)
    for place, letter in enumerate(text, start=1):
        stream.push(small.encode(letter)[0])
        held = text[len(stream.text) : place]
        assert stream.stopped or not held or any(word.startswith(held) and word != held for word in stop)


def test_text_leaves_with_the_id_that_makes_it_sure(small: Tokenizer) -> None:
    assert shown(small, [*small.encode("a"), *spelled("ሰ"), *small.encode("b")]) == [
        "a",
        "",
        "",
        "ሰ",
        "b",
        "",
    ]


def test_a_byte_that_begins_no_character_does_not_wait(small: Tokenizer) -> None:
    assert shown(small, [FIRST_BYTE + 0xFF, *spelled("é")]) == ["�", "", "é", ""]


def test_a_character_that_never_ends_is_shown_as_broken(small: Tokenizer) -> None:
    assert shown(small, spelled("👍")[:3]) == ["", "", "", "���"]
    assert shown(small, [*spelled("👍")[:3], *small.encode("a")]) == ["", "", "", "���a", ""]


def test_a_control_token_shows_nothing_and_ends_a_character(small: Tokenizer) -> None:
    first, *rest = spelled("ሰ")
    assert shown(small, [2, first, 107, *rest, 1]) == ["", "", "�", "�", "�", "", ""]


def test_a_stop_string_is_held_back_while_it_may_yet_come(small: Tokenizer) -> None:
    ids = small.encode("x\nUs")
    stream = TextStream(small, ["\nUser:"])
    assert "".join(map(stream.push, ids)) == "x"
    assert stream.push(small.encode(" ")[0]) == "\nUs "
    assert not stream.stopped


def test_after_a_stop_string_nothing_is_shown(small: Tokenizer) -> None:
    stream = TextStream(small, ["END"])
    told = "".join(map(stream.push, small.encode("one END two")))
    assert (told, stream.finish(), stream.text, stream.stopped) == ("one ", "", "one ", True)


def test_it_stops_with_the_id_that_completes_the_string(small: Tokenizer) -> None:
    stream = TextStream(small, ["ab"])
    told = [(stream.push(id), stream.stopped) for id in spelled("xab")]
    assert told == [("x", False), ("", False), ("", True)]


def test_a_longer_stop_string_that_began_earlier_is_waited_for(small: Tokenizer) -> None:
    """Else the text would hang on how it was cut into tokens."""
    for text, left in (("xabcd", "x"), ("xabcz", "xa"), ("xabc", "xa")):
        stream = TextStream(small, ["abcd", "bc"])
        told = "".join([*map(stream.push, spelled(text)), stream.finish()])
        assert (told, stream.stopped) == (left, True)


def test_a_beginning_that_came_to_nothing_is_shown_at_the_end(small: Tokenizer) -> None:
    stream = TextStream(small, ["END"])
    assert "".join(map(stream.push, small.encode("the EN"))) == "the "
    assert (stream.finish(), stream.finish(), stream.stopped) == ("EN", "", False)


def test_a_stop_string_of_a_broken_character_is_found_at_the_end(small: Tokenizer) -> None:
    stream = TextStream(small, ["�"])
    assert stream.push(FIRST_BYTE + 0xE1) == ""
    assert (stream.finish(), stream.stopped) == ("", True)


@pytest.mark.parametrize(
    ("stop", "said"),
    [(["a", ""], "a stop string is empty"), ("END", r"one string.*list of strings: \['END'\]")],
)
def test_a_stop_that_would_not_do_what_it_says_is_refused(
    small: Tokenizer, stop: Sequence[str], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        TextStream(small, stop)


def test_an_id_outside_the_vocabulary_is_named(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="id 1200 is outside this vocabulary"):
        TextStream(small).push(1200)


def test_an_id_costs_the_same_however_many_came_before(
    small: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted, not timed: the ids that are decoded for 2,000 of them."""
    decoded: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, ids: Sequence[int], control: bool = False) -> str:
        decoded.extend(ids)
        return decode(self, ids, control)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    assert "".join(shown(small, small.encode("the ") * 1000, ["END"])) == "the " * 1000
    assert len(decoded) == len(small.encode("the ")) * 1000
