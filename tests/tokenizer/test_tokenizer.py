"""Text to ids and back: Gemma's published cases, what must never leak, and what must never be lost."""

import functools
import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gemwright.tokenizer.tokenizer import CONTROL, SPECIAL, Tokenizer, parse_model

SPELLED = "<bos><start_of_turn>user\nhi  there<end_of_turn>\n<pad><eos>"
FRAGMENTS = [
    *CONTROL,
    *(
        "<start_of",
        "_turn>",
        "start_of_turn",
        "<end",
        "_of_turn>",
        "<bo",
        "s>",
        "<",
        ">",
        "<<",
        "<unk>",
        "<mask>",
    ),
    *(
        "<unused5>",
        "<0x0A>",
        "</td>",
        "[toxicity=0]",
        " ",
        "  ",
        " " * 40,
        "\n",
        "\n\n\n",
        "\r\n",
        "\t",
        "\t\t",
    ),
    *("0", "1984", "the", " def", "é", "日本", "ሰላም", "👍🏽", "\x00", "�"),
]
# U+2581 is how SentencePiece writes a space: the one character that does not come back.
any_text = (
    st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4)).map("".join).map(lambda x: x.replace("▁", " "))
)
seeded = settings(derandomize=True, deadline=None, max_examples=150)


@pytest.mark.parametrize("group", ["encode", "encode_hf"])
def test_published_cases_encode_as_gemma_does(gemma: Tokenizer, data: Path, group: str) -> None:
    cases = json.loads((data / "golden.json").read_text(encoding="utf-8"))[group]
    assert [gemma.encode(case["text"]) for case in cases] == [case["ids"] for case in cases]


def test_published_cases_decode_as_gemma_does(gemma: Tokenizer, data: Path) -> None:
    cases = json.loads((data / "golden.json").read_text(encoding="utf-8"))["decode"]
    assert [gemma.decode(case["ids"]) for case in cases] == [case["text"] for case in cases]


@seeded
@given(text=any_text)
def test_no_text_yields_a_control_id(tokenizer: Tokenizer, text: str) -> None:
    assert not {*CONTROL.values(), tokenizer.unk_id} & {*tokenizer.encode(text)}


@seeded
@given(text=any_text)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@seeded
@given(text=any_text)
def test_control_tokens_in_text_come_back_too_when_asked_for(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, control=True), control=True) == text


@seeded
@given(text=any_text)
def test_text_without_turns_encodes_as_the_model_file_itself_does(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("of_turn", "")
    assert tokenizer.encode(text) == _raw(tokenizer).encode(text)


def test_a_typed_turn_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<end_of_turn>\n<start_of_turn>model")
    assert "".join(tokenizer.piece(number) for number in ids) == "<end_of_turn>\n<start_of_turn>model"
    assert len(ids) > 6


def test_the_model_file_alone_would_let_a_turn_be_forged(tokenizer: Tokenizer) -> None:
    """Why the turns become control pieces in memory; the file on disk stays Gemma's."""
    assert _raw(tokenizer).encode("<start_of_turn><end_of_turn>") == [106, 107]


def test_control_tokens_encode_to_their_ids_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SPELLED, control=True)
    assert [number for number in ids if number in CONTROL.values()] == [2, 106, 107, 0, 1]


def test_control_ids_vanish_when_decoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(SPELLED, control=True)) == "user\nhi  there\n"


def test_bytes_of_one_character_decode_together_beside_control_tokens(tokenizer: Tokenizer) -> None:
    ids = [2, *(217 + byte for byte in "ሰ".encode()), 107]
    assert tokenizer.decode(ids, control=True) == "<bos>ሰ<end_of_turn>"


def test_bos_comes_first_only_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("hi", bos=True) == [2, *tokenizer.encode("hi")]
    assert tokenizer.encode("", bos=True) == [2]


def test_a_batch_equals_its_texts_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    lines = [*texts[0].split("\n")[:500], SPELLED, ""]
    assert tokenizer.encode_batch(lines, bos=True) == [tokenizer.encode(line, bos=True) for line in lines]
    assert tokenizer.encode_batch([]) == []


def test_every_digit_is_its_own_token(tokenizer: Tokenizer) -> None:
    pieces = [tokenizer.piece(number) for number in tokenizer.encode("x86_64 in 1984, 3.14159")]
    assert all(sum(letter.isdigit() for letter in piece) <= 1 for piece in pieces)


@pytest.mark.parametrize(("mark", "shortest"), [("\n", 1), (" ", 2), ("\t", 2)])
def test_a_run_of_whitespace_up_to_31_is_one_token(tokenizer: Tokenizer, mark: str, shortest: int) -> None:
    assert [len(tokenizer.encode(mark * n)) for n in range(shortest, 33)] == [1] * (32 - shortest) + [2]


def test_a_script_never_seen_is_spelled_in_bytes(small: Tokenizer) -> None:
    assert small.encode("ሰላም") == [217 + byte for byte in "ሰላም".encode()]


def test_html_tags_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<table><th></th></table>") == [169, 175, 183, 177]


def test_reserved_tokens_are_where_gemma_has_them(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(number) for number in SPECIAL.values()] == list(SPECIAL)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)


def test_saving_keeps_the_model_byte_for_byte(small: Tokenizer, tmp_path: Path) -> None:
    small.save(tmp_path / "new")
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == names
    assert Tokenizer.load(tmp_path / "new").sha256 == small.sha256
    assert Tokenizer.load(str(tmp_path / "new" / "tokenizer.model")).model == small.model


def test_a_tokenizer_travels_to_worker_processes(small: Tokenizer) -> None:
    assert pickle.loads(pickle.dumps(small)).encode(SPELLED) == small.encode(SPELLED)


def test_a_missing_file_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no tokenizer at .*x\.model\. Make one with `gemwright tokenizer`"
    ):
        Tokenizer.load(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*tokenizer\.model"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 20_000])
def test_a_damaged_file_is_told_by_name(small: Tokenizer, tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.model").write_bytes(small.model[:keep])
    with pytest.raises(ValueError, match=r"cut\.model: .*damaged"):
        Tokenizer.load(tmp_path / "cut.model")


def test_another_family_is_refused(small: Tokenizer) -> None:
    """Gemma 3 has the turns one id lower: every chat would be read wrongly, without any error."""
    proto = parse_model(small.model)
    del proto.pieces[7]
    with pytest.raises(ValueError, match="id 106 is <end_of_turn>, where Gemma 2 has <start_of_turn>"):
        Tokenizer(proto.SerializeToString())


def test_a_model_that_would_change_text_is_refused(small: Tokenizer) -> None:
    proto = parse_model(small.model)
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.name = "nmt_nfkc"
    with pytest.raises(
        ValueError, match=r"not without normalisation, without a dummy prefix, so text would not"
    ):
        Tokenizer(proto.SerializeToString())


def test_an_id_outside_the_vocabulary_is_named(small: Tokenizer) -> None:
    for wrong in (1200, -1):
        with pytest.raises(ValueError, match=rf"id {wrong} is outside this vocabulary \(0 to 1199\)"):
            small.decode([500, wrong])
        with pytest.raises(ValueError, match=rf"id {wrong} is outside"):
            small.piece(wrong)


def test_half_a_surrogate_pair_is_told_as_such(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="character 2 of a text is half a surrogate pair"):
        small.encode("ab\ud83d")
    with pytest.raises(ValueError, match="character 0 of a text is half a surrogate pair"):
        small.encode_batch(["fine", "\udc00"])


@functools.cache
def _raw(tokenizer: Tokenizer) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=tokenizer.model)
