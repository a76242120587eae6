"""Long text -> passages, cut where the content says so.

Greedy cutting ("as much as fits") puts the cuts of two editions of one book at different places: a sentence
more on page one moves them for hundreds of pages, and no near-duplicate is found there. So a passage ends at
that blank line in the second half of its allowed length whose next paragraph has the smallest hash. Such a
place depends on the words around it, and two copies that differ somewhere fall back into step a few passages
later. This is content-defined chunking (LBFS, Muthitacharoen et al., SOSP 2001) with local minima as cut
points. The hash is of the first letters without case, accents and punctuation, which editions change.

A paragraph longer than a passage is cut in the same way at the ends of its lines, else of its sentences,
else at a space, else anywhere.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator

import xxhash

_END = r"(?:\n|\r(?!\n))"  # of a line: Unix, Windows (its \r is white space before), or old Mac
_BLANK_LINES = re.compile(_END + r"(?:[ \t\f\v]*(?:\r?\n|\r))+")
_BLANK_LINES_UNIX = re.compile(r"\n(?:[ \t\f\v]*\n)+")  # the same where there is no \r: three times as fast
_LINE_END = re.compile(_END)
_SENTENCE_END = re.compile(r"[.!?…]['\"’”»)\]]*\s+|[。！？]['\"’”』」）]*\s*")

_HEAD = 100  # characters of a paragraph, of which some 60 are letters
_LETTERS = 60
_ROOM = 1_024 + _HEAD  # for blank lines after a passage and for what is hashed behind them
_READ_AHEAD = 1 << 18  # characters, so that the buffer is not copied for every passage
_ASCII = {code: chr(code).lower() if chr(code).isalnum() else None for code in range(128)}


def passages(texts: Iterable[str], target: int, longest: int) -> Iterator[str]:
    """Cut a text that comes in pieces, which hold no more of it in memory than a few passages.

    Args:
        target: characters up to which paragraphs are gathered; 1 keeps each for itself.
        longest: characters that no passage exceeds, the blank lines after it not counted; at least `target`.
    Returns:
        Passages with the blank lines around them: joined, they are the text. Where they are cut does not
        hang on the pieces. If `texts` raises, the passages before are given first; the torn one is not.
    """
    assert 1 <= target <= longest, (target, longest)
    reach = target + longest + _ROOM
    source = iter(texts)
    text, at, ended, failure, blank = "", 0, False, None, _BLANK_LINES
    while True:
        if not ended and len(text) - at < reach:
            parts = [text[at:]]
            size, at = len(parts[0]), 0
            try:
                while size < reach + _READ_AHEAD:
                    parts.append(next(source))
                    size += len(parts[-1])
            except StopIteration:
                ended = True
            except Exception as error:
                ended, failure = True, error
            text = "".join(parts)
            blank = _BLANK_LINES if "\r" in text else _BLANK_LINES_UNIX
        if at == len(text):
            break
        stop = _next(text, at, min(at + reach, len(text)), ended, blank, target, longest)
        if failure is not None and stop == len(text):
            break
        yield text[at:stop]
        at = stop
    if failure is not None:
        raise failure


def _next(
    text: str, at: int, end: int, ended: bool, blank: re.Pattern[str], target: int, longest: int
) -> int:
    """Where the passage that begins at `at` ends. It hangs on nothing but `text[at:end]`."""
    if ended and len(text) - at <= target:
        return len(text)
    half = at + target // 2
    found: list[int] = []
    for match in blank.finditer(text, half, end):
        if match.start() > at + target:
            break
        found.append(match.end())
    if found:
        return _smallest(text, found, end)

    before = None  # no cut in the second half: a long paragraph goes through it
    for match in blank.finditer(text, at, end):
        if match.start() >= half:
            break
        before = match.end()
    start = before or at
    after = blank.search(text, max(start, at + target), min(start + longest, end))
    if after is not None or (ended and len(text) - start <= longest):  # which can be a passage of its own
        return before or (after.end() if after is not None else len(text))
    for pattern in (_LINE_END, _SENTENCE_END):
        if found := [match.end() for match in pattern.finditer(text, at + longest // 2, at + longest)]:
            return _smallest(text, found, end)
    return text.rfind(" ", at + longest // 2, at + longest) + 1 or at + longest


def _smallest(text: str, places: list[int], end: int) -> int:
    """The place before the smallest hash, the first of several."""
    return min(
        places, key=lambda place: xxhash.xxh3_64_intdigest(fold(text[place : min(place + _HEAD, end)]))
    )


def fold(text: str) -> str:
    """The first letters and digits, without case and accents."""
    if text.isascii():
        return text.translate(_ASCII)[:_LETTERS]
    letters = unicodedata.normalize("NFKD", text).casefold()
    return "".join(filter(str.isalnum, letters))[:_LETTERS]
