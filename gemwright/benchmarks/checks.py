"""Whether a written answer is right: words, numbers, and code with its tests. Pure functions of text.

Words are compared as SQuAD compares them (arXiv 1606.05250), numbers as GSM8K marks them (arXiv 2110.14168).
"""

import re
import string
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

from gemwright.benchmarks.forms import CODE_STOPS

_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-−+])?[$€£]?(?P<minus>(?<=[$€£])[-−])?"  # after a word it subtracts
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<!\d)(?=\.\d))(?P<part>\.\d+)?"
    r"(?(part)|(?P<under>/0*[1-9]\d*(?![\d/]|\.\d))?)"
)
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)[^\n`]*\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)|\Z)",
    re.MULTILINE | re.DOTALL,
)
_PYTHON = {"python", "py", "python3"}
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def exact(said: str, gold: str) -> bool:
    """Whether two answers are alike but for case, punctuation, articles and white space."""
    return _plain(said) == _plain(gold)


def _plain(text: str) -> str:
    """SQuAD's normal form, except that no answer becomes nothing: `A` may be a letter, `+` an answer."""
    words = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    unmarked = "".join(
        one for one in words if one not in string.punctuation and unicodedata.category(one)[0] != "P"
    )
    bare = _ARTICLES.sub(" ", unmarked)
    return next((kept for form in (bare, unmarked) if (kept := " ".join(form.split()))), words)


def number(said: str) -> str | None:
    """The number that stands after the first `####`, else the last one; None without any.

    Thousands separators, currency signs, per cent and a sentence's full stop are left off: `-$1,234.50.` is
    `-1234.50`, and `3/4` stays a fraction.
    """
    for mark in re.finditer(r"####\s*", said):
        if found := _NUMBER.match(said, mark.end()):  # not "#### Step 1", which is a heading
            return _written(found)
    found = list(_NUMBER.finditer(said))
    return _written(found[-1]) if found else None


def _written(found: re.Match[str]) -> str:
    negative = (found["sign"] or found["minus"] or "").strip() in ("-", "−")
    text = (found["whole"] or "0").replace(",", "") + (found["part"] or found["under"] or "")
    return f"-{text}" if negative else text


def same_number(said: str, gold: str) -> bool:
    """Whether the numbers of two answers are equal, as 5, 5.0 and 10/2 are. No number is no answer."""
    mine, right = number(said), number(gold)
    if mine is None or right is None:
        return False
    try:
        return Fraction(mine) == Fraction(right)
    except ValueError:  # thousands of digits, which Python does not read
        return mine == right


def cut(text: str, stops: Iterable[str]) -> str:
    """The text up to the earliest of some stops."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


def code_of(said: str) -> str:
    """The code of a reply: within the first Python fence, else the first fence, else all of it.

    A fence that is never closed reaches to the end.
    """
    fences = list(_FENCE.finditer(said))
    if not fences:
        return said
    chosen = next((one for one in fences if one["language"].lower() in _PYTHON), fences[0])
    return re.sub(f"^{chosen['indent']}", "", chosen["code"], flags=re.MULTILINE)


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """A function's head, what was written after it, and its tests.

    A completion that begins with indented code is a body, and is cut where the function ends. Of another the
    code is taken: a reply that repeats the function follows the head, and so replaces it.
    """
    first = next((line for line in completion.splitlines() if line.strip()), "")
    code = code_of(completion)
    if not first[:1].isspace() and re.search(
        rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE
    ):
        body = "\n" + code
    else:
        body = cut(completion if first[:1].isspace() else code, CODE_STOPS)
    return f"{prompt}{body}\n\n{test}\n\ncheck({entry_point})\n"


def mbpp_program(code: str, tests: Iterable[str]) -> str:
    """A program, or a reply with one in a fence, and its tests.

    Raises:
        ValueError: there are no tests, so anything would pass.
    """
    lines = "\n".join(tests)
    if not lines.strip():
        raise ValueError(
            "a program without tests would always pass. Leave the question out, or give it tests."
        )
    return f"{code_of(code)}\n\n{lines}\n"
