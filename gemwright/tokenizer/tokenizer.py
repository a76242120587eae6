"""Gemma's tokenizer: text to ids and back, and the files that other libraries load.

A SentencePiece BPE model that splits digits, keeps every space and falls back to bytes, so that decoding
gives the text back exactly. The one exception is U+2581, SentencePiece's own sign for a space: it comes back
as a space.

Text that spells a control token is text. Gemma's model file lists `<start_of_turn>` and `<end_of_turn>` as
ordinary user-defined pieces, so whoever types them would forge a turn. In memory, and only there, both become
control pieces, which SentencePiece never finds in text: a control id comes from code alone, or from
`encode(..., control=True)`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Int32
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from gemwright.run import atomic, write_json, write_text
from gemwright.tokenizer.template import TEMPLATE, TEMPLATE_FILE

SPECIAL: dict[str, int] = {
    **{"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "<2mass>": 5, "[@BOS@]": 6},
    **{f"<unused{number}>": 7 + number for number in range(99)},
    **{"<start_of_turn>": 106, "<end_of_turn>": 107},
}
"""Every reserved token and its id in Gemma 1 and 2 (Gemma 3 moves the turns to 105 and 106)."""

CONTROL = {name: SPECIAL[name] for name in ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")}
"""The tokens that steer a model, and so must never come out of plain text."""

MODEL_FILE = "tokenizer.model"
SPACE = "▁"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL_PIECE, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # SentencePiece's types of pieces

_SPELLED = re.compile("(" + "|".join(map(re.escape, CONTROL)) + ")")


class Tokenizer:
    """Gemma's vocabulary, or one that `train` made, with Gemma's control tokens at Gemma's ids.

    Args:
        model: the bytes of a SentencePiece model file.
    Raises:
        ValueError: the bytes are no such model, or one that is not made like Gemma's.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()
        proto = parse_model(model)
        _refuse_other_makes(proto)
        for name in CONTROL:
            proto.pieces[CONTROL[name]].type = CONTROL_PIECE
        self._processor = SentencePieceProcessor(model_proto=proto.SerializeToString())
        self._names = {number: name for name, number in CONTROL.items()}

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `.model` file, or a folder's `tokenizer.model`. Raises FileNotFoundError or ValueError."""
        file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {file}. Make one with `gemwright tokenizer`, or name a SentencePiece model "
                f"file or a folder that holds {MODEL_FILE}."
            )
        try:
            return cls(file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.model,)  # worker processes build their own processor

    @property
    def vocab_size(self) -> int:
        """Number of pieces, control tokens and bytes included."""
        return self._processor.vocab_size()

    @property
    def pad_id(self) -> int:
        """0, as in every Gemma."""
        return SPECIAL["<pad>"]

    @property
    def eos_id(self) -> int:
        """1, as in every Gemma."""
        return SPECIAL["<eos>"]

    @property
    def bos_id(self) -> int:
        """2, as in every Gemma."""
        return SPECIAL["<bos>"]

    @property
    def unk_id(self) -> int:
        """3, as in every Gemma. Byte fallback sees to it that no text needs it."""
        return SPECIAL["<unk>"]

    def piece(self, id: int) -> str:
        """A piece as the vocabulary writes it: `▁the`, `<0x0A>`. Raises ValueError for an id outside it."""
        self._require([id])
        return self._processor.id_to_piece(id)

    def is_byte(self, id: int) -> bool:
        """Whether a piece stands for one byte of a character without a piece. Raises as `piece`."""
        self._require([id])
        return self._processor.is_byte(id)

    def encode(self, text: str, bos: bool = False, control: bool = False) -> list[int]:
        """Text to ids.

        Args:
            bos: put `<bos>` first. Gemma needs it: without it its likelihoods are worthless.
            control: let spelled control tokens become their ids. For our own templates, never a user's text.
        Raises:
            ValueError: the text holds half a surrogate pair, which no UTF-8 text can.
        """
        ids = [self.bos_id] if bos else []
        if not control:
            return ids + self._encode(text)
        for part in _SPELLED.split(text):
            ids += [CONTROL[part]] if part in CONTROL else self._encode(part)
        return ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False, threads: int = 2) -> list[list[int]]:
        """`encode` for many texts at once, in SentencePiece's own threads. Control tokens stay text."""
        return self._encode(list(texts), add_bos=bos, num_threads=threads)

    def encode_arrays(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False, threads: int = 2
    ) -> list[Int32[np.ndarray, " _"]]:
        """`encode_batch` for packing: the ids never become Python objects.

        So packing them into one array is 1.2 times as fast as from lists, and takes a third of the memory.
        """
        return self._encode(list(texts), add_bos=bos, add_eos=eos, num_threads=threads, out_type="numpy")

    def decode(self, ids: Iterable[int], control: bool = False) -> str:
        """Ids to text.

        Args:
            control: spell control tokens out, as `encode(..., control=True)` reads them; else they vanish.
        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        numbers = [int(number) for number in ids]
        self._require(numbers)
        if not control:
            return self._processor.decode(numbers)
        return "".join(self._spell(numbers))

    def save(self, folder: str | Path) -> None:
        """Write `tokenizer.model` as it was loaded, and from what transformers loads it: two JSON files and
        the chat template.

        `AutoTokenizer.from_pretrained(folder)` gives the ids of `encode(text, bos=True)`, with one inherent
        difference: it takes every control token that the text spells, `<unk>` included, for the token.
        """
        folder = Path(folder)
        with atomic(folder / MODEL_FILE) as partial:
            partial.write_bytes(self.model)
        fast = json.dumps(_tokenizers_format(parse_model(self.model)), ensure_ascii=False)
        write_text(folder / "tokenizer.json", fast)  # in one line: indenting 580,000 merges costs seconds
        write_json(folder / "tokenizer_config.json", _TRANSFORMERS_CONFIG)
        write_text(folder / TEMPLATE_FILE, TEMPLATE)

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        try:
            return self._processor.encode(text, **options)
        except (RuntimeError, TypeError):
            for one in [text] if isinstance(text, str) else text:
                require_utf8(one)
            raise

    def _spell(self, ids: list[int]) -> Iterator[str]:
        run: list[
            int
        ] = []  # bytes of one character must be decoded together, so pieces are not decoded one by one
        for number in ids:
            if number in self._names:
                yield self._processor.decode(run) + self._names[number]
                run = []
            else:
                run.append(number)
        yield self._processor.decode(run)

    def _require(self, ids: list[int]) -> None:
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(number for number in ids if not 0 <= number < self.vocab_size)
            raise ValueError(
                f"id {wrong} is outside this vocabulary (0 to {self.vocab_size - 1}): the ids come from "
                "another tokenizer, or a model with a larger vocabulary. Use the tokenizer of the model."
            )


def require_utf8(text: str) -> None:
    """Raise ValueError for half a surrogate pair, as a broken JSON escape leaves it in a text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of a text is half a surrogate pair, which UTF-8 cannot hold. "
            "Drop such halves with text.encode('utf-8', 'ignore').decode()."
        ) from None


def parse_model(model: bytes) -> Any:
    """The message in a SentencePiece model file. Raises ValueError where there is none."""
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(model)
    except DecodeError:
        proto.Clear()
    if not len(proto.pieces):
        raise ValueError("this is no SentencePiece model, or a damaged one. Download or train it again.")
    return proto


def _refuse_other_makes(proto: Any) -> None:
    """Raise ValueError unless the model is made like Gemma's: the same control ids, and no text lost."""
    spec, pieces = proto.trainer_spec, proto.pieces
    for name in (*CONTROL, "<unk>"):
        number = SPECIAL[name]
        found = pieces[number].piece if number < len(pieces) else "nothing"
        if found != name:
            raise ValueError(
                f"id {number} is {found}, where Gemma 2 has {name}: this is another family's tokenizer. "
                "Use Gemma 1's or 2's, or train one with `gemwright tokenizer`."
            )
    wants = {
        "trained as BPE": spec.model_type == 2,
        "with byte fallback": spec.byte_fallback and sum(piece.type == BYTE for piece in pieces) == 256,
        "without normalisation": proto.normalizer_spec.name == "identity",
        "without a dummy prefix": not proto.normalizer_spec.add_dummy_prefix,
        "with extra spaces kept": not proto.normalizer_spec.remove_extra_whitespaces,
    }
    if missing := [want for want, met in wants.items() if not met]:
        raise ValueError(
            f"this model is not {', '.join(missing)}, so text would not come back as it was. "
            "Use Gemma 1's or 2's tokenizer, or train one with `gemwright tokenizer`."
        )


def _tokenizers_format(proto: Any) -> dict[str, Any]:
    """What `tokenizer.json` of Hugging Face's tokenizers library holds.

    SentencePiece joins any two neighbours whose union is a piece, the best score first. That library wants
    the pairs named, so every way to cut a piece into two pieces is a merge, ranked by the score of the whole.
    """
    score = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = [
        f"{piece[:cut]} {piece[cut:]}"
        for piece in sorted(score, key=score.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    added = [
        # Runs of spaces are pieces of ▁, so they are found only in text that is normalised already.
        _added_token(
            number, piece.piece, control=piece.type in (UNKNOWN, CONTROL_PIECE) or piece.piece in CONTROL
        )
        for number, piece in enumerate(proto.pieces)
        if piece.type in (UNKNOWN, CONTROL_PIECE, USER_DEFINED)
    ]
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [SPECIAL["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(proto.pieces)},
            "merges": merges,
        },
    }


def _added_token(number: int, content: str, control: bool) -> dict[str, Any]:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": not control,
        "special": control,
    }
    return {"id": number, "content": content, **flags}


_TRANSFORMERS_CONFIG: dict[str, Any] = {
    "tokenizer_class": "GemmaTokenizer",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,  # else decoding would pull " ," together
    "spaces_between_special_tokens": False,
    "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
}


def require_same_tokenizer(
    folder: Path, tokenizer: Tokenizer, owner: str = "the shards",
    remedy: str = "Make shards with the teacher's tokenizer.", role: str = "teacher",
) -> None:  # fmt: skip
    """Raise ValueError for a checkpoint whose ids do not mean the pieces of `tokenizer`; it says which."""
    theirs = Tokenizer.load(folder)
    if theirs.sha256 == tokenizer.sha256:
        return
    few, many = sorted((theirs.vocab_size, tokenizer.vocab_size))
    differ = [id for id in range(few) if theirs.piece(id) != tokenizer.piece(id)]
    told = [f"id {i} is {theirs.piece(i)!r} to it and {tokenizer.piece(i)!r} to {owner}" for i in differ[:3]]
    if many > few:
        told.append(f"it has {theirs.vocab_size:,} pieces and {owner} {tokenizer.vocab_size:,}")
    if not told:
        told.append("the pieces are the same, but text is cut into them by other rules or scores")
    raise ValueError(
        f"the {role} {folder} has another tokenizer than {owner} ({len(differ):,} of {few:,} ids): "
        f"{'; '.join(told)}. {remedy}"
    )
