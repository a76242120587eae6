"""Text cut where its content says so, the same however it arrives."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemwright.reading import passages as module
from gemwright.reading.passages import fold, passages

TEXT = st.text(st.sampled_from("ab\n\r. é。'\t-"), max_size=300)


def prose(paragraphs: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(2, 9))) for _ in range(400)]
    return [
        " ".join(draw.choices(words, k=draw.randint(20, 90))).capitalize() + "." for _ in range(paragraphs)
    ]


def cut(text: str, target: int, longest: int | None = None, block: int = 1 << 20) -> list[str]:
    pieces = [text[at : at + block] for at in range(0, len(text), block)]
    return list(passages(pieces, target, longest or target))


@given(TEXT, st.integers(1, 60), st.integers(0, 60))
def test_every_character_is_in_exactly_one_passage(text: str, target: int, more: int):
    assert "".join(cut(text, target, target + more)) == text


@given(TEXT, st.integers(1, 60), st.integers(0, 60), st.integers(1, 20))
def test_the_cuts_do_not_hang_on_the_blocks_that_the_text_arrives_in(
    text: str, target: int, more: int, block: int
):
    """With buffers so small that they are filled again and again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_ROOM", 8)
        whole = cut(text, target, target + more)
        patch.setattr(module, "_READ_AHEAD", 5)
        assert cut(text, target, target + more, block) == whole


def test_a_long_text_is_cut_alike_however_its_buffer_is_filled():
    text = "\r\n\r\n".join(prose(4_000, seed=4))
    whole = cut(text, 2_000)
    assert len(text) > 4 * module._READ_AHEAD
    assert cut(text, 2_000, block=1_000) == cut(text, 2_000, block=300_007) == whole


@given(TEXT, st.integers(1, 60))
def test_no_passage_is_longer_than_allowed(text: str, target: int):
    assert all(len(passage.rstrip()) <= target for passage in cut(text, target))


def test_two_editions_fall_back_into_step_after_their_differences():
    """With greedy cutting, a chapter more at the front leaves next to nothing in common."""
    old = prose(1_500, seed=1)
    new = prose(37, seed=2) + old
    edits = range(137, len(new), 300)
    for edit in edits:
        new[edit] = new[edit].replace(" ", " indeed ", 1)
    first, second = ({passage.strip() for passage in cut("\n\n".join(text), 8_000)} for text in (old, new))
    # An edit costs its own passage and the few after it, until both texts are in step again.
    lost = 1 - len(first & second) / len(first)
    assert len(edits) == 5
    assert len(first) > 80
    assert lost < 0.2


def test_the_hash_does_not_see_case_accents_and_punctuation():
    assert fold("“Éh bien, mon Prince!”") == fold('"Eh bien; mon prince."') == "ehbienmonprince"


@given(st.text(st.characters(max_codepoint=127), max_size=100))
def test_the_fast_way_to_fold_ascii_gives_what_the_other_does(text: str):
    assert fold(text) == fold(text + "\u0301")


def test_a_target_of_one_makes_every_paragraph_a_passage():
    paragraphs = [*prose(50, seed=3), "x", "a line\nand another"]
    found = [passage.rstrip("\n") for passage in cut("\n \n\n".join(paragraphs), 1, 10_000)]
    assert [passage.rstrip() for passage in found] == paragraphs


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_paragraphs_end_at_blank_lines_of_every_system(end: str):
    assert cut(f"one{end}two{end} {end}three", 1, 100) == [f"one{end}two{end} {end}", "three"]


def test_a_long_paragraph_is_cut_at_a_line_end_before_a_sentence_end():
    text = "word. " * 12 + "\n" + "word. " * 12
    assert cut(text, 100)[0] == "word. " * 12 + "\n"


def test_a_long_line_is_cut_at_a_sentence_end_before_a_space():
    text = "so many words " * 4 + "end. " + "so many words " * 10
    assert cut(text, 100)[0] == "so many words " * 4 + "end. "


def test_a_sentence_without_end_is_cut_at_the_last_space_that_fits():
    assert cut("abcdefghi " * 30, 99)[0] == "abcdefghi " * 9


def test_what_has_no_place_to_cut_is_cut_anyway():
    assert [len(passage) for passage in cut("x" * 250, 100)] == [100, 100, 50]


def test_a_heading_stays_with_a_paragraph_that_has_to_be_cut():
    text = "Chapter 1\n\n" + "abcdefghi " * 30
    assert cut(text, 100)[0].startswith("Chapter 1\n\nabc")


def test_a_paragraph_that_fits_is_not_torn_for_the_short_one_before_it():
    text = "Chapter 1\n\n" + "x " * 47 + "\n\nthe end"
    assert cut(text, 100)[0].strip() == "Chapter 1"


def test_a_text_that_breaks_off_gives_the_passages_before_and_then_its_error():
    def torn():
        yield "one\n\ntwo\n\nthr"
        raise EOFError("torn")

    found = passages(torn(), 1, 100)
    assert [next(found), next(found)] == ["one\n\n", "two\n\n"]
    with pytest.raises(EOFError, match="torn"):
        next(found)
