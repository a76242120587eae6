"""Ids one by one -> text, as soon as it is sure, and up to a stop string.

Put together, what a stream shows is `tokenizer.decode(ids)`, cut before the first stop string. It is never
taken back: the bytes of a character wait for each other, and the beginning of a stop string waits until it is
one or is not. Gemma's pieces stand for the same text wherever they are (no space is added or dropped at the
front), bytes excepted, so each id is decoded once and the work grows with the number of ids alone.
"""

from collections.abc import Sequence

from gemwright.tokenizer.tokenizer import Tokenizer


class TextStream:
    """The text of ids that come one by one.

    Args:
        stop: strings that end the text. It is cut before the one that begins first; none of it is shown.
    Raises:
        ValueError: an empty stop string, which would end every text at once, or a bare string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise ValueError(f"stop={stop!r} is one string. Give a list of strings: [{stop!r}].")
        if "" in stop:
            raise ValueError("a stop string is empty, so it would end every text at once. Leave it out.")
        self.stopped = False
        """Whether a stop string was found. Ids that come later change nothing."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._shown: list[str] = []
        self._bytes = b""  # the beginning of a character
        self._held = ""  # begins like a stop string, or is empty

    @property
    def text(self) -> str:
        """All that has been shown so far."""
        return "".join(self._shown)

    def push(self, id: int) -> str:
        """What the next id makes sure, often nothing. Raises ValueError for an id outside the vocabulary."""
        if not self._tokenizer.is_byte(id):
            return self._show(self._broken_bytes() + self._tokenizer.decode([id]))
        self._bytes += bytes([int(self._tokenizer.piece(id)[3:5], 16)])  # <0x0A>
        return self._show(self._whole_characters())

    def finish(self) -> str:
        """What was held back, now that no id follows. Bytes that are no character become U+FFFD, one each."""
        return self._show(self._broken_bytes(), last=True)

    def _whole_characters(self) -> str:
        """Take from the bytes what is sure: characters, and U+FFFD for bytes that can begin none."""
        done = ""
        while self._bytes:
            try:
                done, self._bytes = done + self._bytes.decode(), b""
            except UnicodeDecodeError as error:
                if error.reason == "unexpected end of data":
                    break
                # SentencePiece gives up one byte and tries again at the next
                done, self._bytes = done + "�", self._bytes[1:]
        return done

    def _broken_bytes(self) -> str:
        count, self._bytes = len(self._bytes), b""
        return "�" * count

    def _show(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=len(text))
        sure = found if last else min(found, self._first_beginning(text))
        self.stopped = sure == found < len(text)
        self._held = "" if self.stopped else text[sure:]
        if sure:
            self._shown.append(text[:sure])
        return text[:sure]

    def _first_beginning(self, text: str) -> int:
        """The first place from which the rest of the text may yet grow to a stop string; the end if none."""
        longest = max(map(len, self._stop), default=1)
        for place in range(max(0, len(text) - longest + 1), len(text)):
            if any(stop.startswith(text[place:]) for stop in self._stop):
                return place
        return len(text)
