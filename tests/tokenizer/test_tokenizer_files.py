"""The files that `save` writes, read by Hugging Face's libraries: their ids are ours, whatever the text."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemwright.tokenizer.tokenizer import Tokenizer

SENTENCES = [
    "",
    "The quick brown fox, jumping over 13 lazy dogs in 1984; it cost $3.50!",
    "Grüße aus Zürich – schöne Straßen, c'est l'été, ¿qué tal?, zażółć gęślą jaźń",
    "Все люди рождаются свободными и равными. Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.",
    "كل الناس يولدون أحرارا. כל בני האדם נולדו בני חורין. अस्मिन् परियोजनायां स्वागतम्",
    "人人生而自由。すべての人間は、生まれながらにして自由。모든 인간은 자유롭다. ทุกคนเกิดมาอิสระ ሰላም",
    "👍🏽 👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u200d\u200b\ufeff \x00\x07 \u3000\u3000 � ▅ ▁ ▁▁▁",
    "def f(x):\n\treturn {\n\t\t'a':  x ** 2,   # two\n\t}\r\n\n\n\nclass A:\n        pass\n",
    "<table><tr><td>1</td></tr></table> <mask> <unused5><unused99>[@BOS@] [toxicity=0] <0x0A> <2mass>",
]
PIECES = [
    *(
        " ",
        "  ",
        "   ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        "=",
        "==",
        "-",
        "_",
        "a",
        "aa",
        "ab",
        "the",
        "The",
    ),
    *(
        "1",
        "42",
        "é",
        "e\u0301",
        "م",
        "日本",
        "ሰ",
        "👍🏽",
        "\u200d",
        "\u3000",
        "�",
        "<b>",
        "</td>",
        "<",
        ">",
        "<mask>",
    ),
]

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def varied(texts: list[str]) -> list[str]:
    draw = random.Random(0)
    mixed = ["".join(draw.choices(PIECES, k=30)) for _ in range(1500)]
    runs = [mark * length + "x" for mark in " \n\t=a" for length in range(70)]
    return [*SENTENCES, *mixed, *runs, *texts]


def test_autotokenizer_gives_our_ids(tokenizer: Tokenizer, theirs: Any, varied: list[str]) -> None:
    _assert_same(
        varied, tokenizer.encode_batch(varied, bos=True), theirs(varied)["input_ids"], tokenizer.piece
    )


def test_the_tokenizers_library_alone_gives_our_ids(
    tokenizer: Tokenizer, folder: Path, varied: list[str]
) -> None:
    fast = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [encoding.ids for encoding in fast.encode_batch(varied)]
    _assert_same(varied, tokenizer.encode_batch(varied, bos=True), ids, tokenizer.piece)


def test_autotokenizer_decodes_as_we_do(tokenizer: Tokenizer, theirs: Any, varied: list[str]) -> None:
    plain = [text.replace("<mask>", "") for text in varied]  # transformers counts <mask> as a control token
    for ids in tokenizer.encode_batch(plain, bos=True):
        assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


def test_autotokenizer_reads_spelled_control_tokens_as_we_do_when_asked(
    tokenizer: Tokenizer, theirs: Any
) -> None:
    turn = "<bos><start_of_turn>user\nhi  there<end_of_turn>\n<pad><eos>"
    assert theirs.encode(turn, add_special_tokens=False) == tokenizer.encode(turn, control=True)


def test_autotokenizer_knows_the_roles(theirs: Any) -> None:
    ids = (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id)
    assert (*ids, type(theirs).__name__) == (0, 1, 2, 3, "GemmaTokenizer")


def test_two_texts_get_a_bos_each(tokenizer: Tokenizer, theirs: Any) -> None:
    assert theirs("a", "b")["input_ids"] == tokenizer.encode("a", bos=True) + tokenizer.encode("b", bos=True)


def test_every_piece_of_two_letters_or_more_can_be_merged(folder: Path) -> None:
    """A piece that no merge reaches would be ours alone: the other library could never make it."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    reached = {merge.replace(" ", "") for merge in content["model"]["merges"]}
    reached |= {token["content"] for token in content["added_tokens"]}
    reached |= {f"<0x{byte:02X}>" for byte in range(256)}
    assert not {piece for piece in content["model"]["vocab"] if len(piece) > 1} - reached


def _assert_same(
    texts: list[str], ours: list[list[int]], theirs: list[list[int]], piece: Callable[[int], str]
) -> None:
    for text, a, b in zip(texts, ours, theirs, strict=True):
        assert a == b, f"{text[:200]!r}: ours {list(map(piece, a))}, theirs {list(map(piece, b))}"
