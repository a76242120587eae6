"""Is a text prose at all, and does it repeat itself: the rules of Gopher, C4 and FineWeb, by datatrove.

Each rule set is datatrove's filter with the thresholds of its paper. Ours is what they count in, the words.
Repetition is counted in `Words`, which works in every script and loads nothing. Gopher's quality rules count
words between spaces: they ask that 80 % of the words have a letter, and where each punctuation mark is a word
of its own, a tenth of the paragraphs of War and Peace and most of Shakespeare's dialogue fail that.

The rules on the commonest n-gram are asked of texts of 50 words or more, as in Gopher, whose quality rules
have dropped the shorter ones: in a dozen words, two that stand there once are already a fifth of the text.

Gopher's quality rules (stop words), C4's and FineWeb's (punctuation) were made for English and judge nothing
else; repetition is judged in every language. Source code is no prose: of the modules of Python's standard
library, Gopher's quality rules drop a sixth and its repetition rules half. Do not ask them about code.

Sources: Gopher, arXiv 2112.11446, appendix A.1.1 with Table A1; C4, arXiv 1910.10683, section 2.2; FineWeb,
arXiv 2406.17557, sections 3.5 and 3.6.
"""

import re

import regex
from datatrove.data import Document
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer
from pydantic import NonNegativeInt

from gemwright.config import Config

EMPTY = "empty"
"""The reason of a text without a letter or a digit: there is nothing to count in it."""

# Scripts without spaces between words are cut by count, so that a piece is about a word long: n-grams of
# single characters repeat in any text, and whole clauses never.
_PIECE = regex.compile(
    r"""(?x) [\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]]+
    | [\p{Han}\p{Hiragana}\p{Katakana}]{1,2}
    | (?:[\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*){1,3}
    | [^\w\s]""",
    regex.V1,  # set difference; and regex, not re, whose \w cuts words of India at every vowel sign
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")


class Words(WordTokenizer):
    """Words and punctuation marks by their characters alone, in every script.

    All instances are equal, so that datatrove's filters find in its cache what another one has split.
    """

    def word_tokenize(self, text: str) -> list[str]:
        """The words, and every punctuation mark as one."""
        return _PIECE.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences without the space between them, which follows `.`, `!` or `?`."""
        return [text[start:stop] for start, stop in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where each sentence starts and stops, in characters."""
        starts, stops = [0], []
        for gap in _SENTENCE_END.finditer(text):
            stops.append(gap.start())
            starts.append(gap.end())
        spans = zip(starts, [*stops, len(text)], strict=True)
        return [(start, stop) for start, stop in spans if start < stop]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class SpacedWords(Words):
    """What stands between spaces, its punctuation included."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words."""
        return text.split()


_WORDS = Words()
_FEW = 50  # words, below which a single n-gram may be a large share of the text


class QualityConfig(Config):
    """Which rules, and the thresholds that depend on the text; the others are the papers'."""

    gopher: bool = True
    """Gopher's quality rules, for English: lengths of text and words, symbols, bullets, stop words."""
    repetition: bool = True
    """Gopher's repetition rules, for every language: lines, paragraphs and n-grams that come again."""
    c4: bool = False
    """C4's rules, for English web pages: they rewrite a text, dropping lines, and refuse curly brackets."""
    fineweb: bool = False
    """FineWeb's rules, for English web pages: refuse lists, menus and lines that come twice."""
    min_words: NonNegativeInt | None = 50
    """Gopher: the fewest words. Answers and notes are often shorter: lower it, or None."""
    max_words: NonNegativeInt | None = 100_000
    """Gopher: the most words. Books are longer: raise it, or None."""
    c4_end_marks: bool = True
    """C4: drop lines without an end mark. FineWeb does not, as it costs 30 % of the tokens (section 3.5)."""
    c4_min_sentences: NonNegativeInt = 5
    """C4: the fewest sentences that may be left."""


class Quality:
    """Judges texts by the rules that a config names, one set after the other, the cheapest first."""

    def __init__(self, config: QualityConfig) -> None:
        # here, for it takes half a second that nobody who only reads a config should pay
        from datatrove.pipeline.filters import (
            C4QualityFilter,
            FineWebQualityFilter,
            GopherQualityFilter,
            GopherRepetitionFilter,
        )

        gopher = GopherQualityFilter(
            min_doc_words=config.min_words,
            max_doc_words=config.max_words,
            # appendix A.1.1, "Quality filtering": letters in a word on average, # and ... a word, lines
            # that start with a bullet, lines that end in an ellipsis, words with a letter, stop words
            min_avg_word_length=3,
            max_avg_word_length=10,
            max_symbol_word_ratio=0.1,
            max_bullet_lines_ratio=0.9,
            max_ellipsis_lines_ratio=0.3,
            max_non_alpha_words_ratio=0.8,
            min_stop_words=2,
            language=SpacedWords(),  # pyright: ignore[reportArgumentType]
        )
        # Table A1, as shares of lines or paragraphs and of characters; these are datatrove's defaults too
        top_n_grams = ((2, 0.20), (3, 0.18), (4, 0.16))
        repetition, self._repetition_of_few = (
            GopherRepetitionFilter(
                dup_line_frac=0.30,
                dup_para_frac=0.30,
                dup_line_char_frac=0.20,
                dup_para_char_frac=0.20,
                top_n_grams=top,  # pyright: ignore[reportArgumentType]
                dup_n_grams=(  # pyright: ignore[reportArgumentType]
                    (5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10),
                ),
                language=_WORDS,  # pyright: ignore[reportArgumentType]
            )
            for top in (top_n_grams, ())
        )  # fmt: skip
        c4 = C4QualityFilter(
            filter_no_terminal_punct=config.c4_end_marks,
            min_num_sentences=config.c4_min_sentences,
            min_words_per_line=3,  # section 2.2; the longest word is that of the published code
            max_word_length=1000,
            language=_WORDS,  # pyright: ignore[reportArgumentType]
        )
        fineweb = FineWebQualityFilter(
            # section 3.6: lines that end in a mark, lines of up to 30 characters, characters in lines that
            # came before. The last is 0.1 in the paper, and 0.01 where the filter is left to itself.
            line_punct_thr=0.12,
            short_line_thr=0.67,
            short_line_length=30,
            char_duplicates_ratio=0.1,
            new_line_ratio=0.3,  # line ends a word; the published code's, and not in the paper
            language=_WORDS,  # pyright: ignore[reportArgumentType]
        )
        rules = [
            (config.gopher, "quality", True, gopher),
            (config.repetition, "repetition", False, repetition),
            (config.c4, "quality", True, c4),
            (config.fineweb, "quality", True, fineweb),
        ]
        self._rules = [rule for wanted, *rule in rules if wanted]

    def check(self, text: str, language: str = "en") -> tuple[str, str | None]:
        """The text, shorter where C4's rules dropped lines of it, and why to drop it, or None.

        The reason is `empty`, or `quality_` or `repetition_` with the rule's name in datatrove; one of those
        says the contrary of what it means, and is `few_stop_words` here.
        """
        # without space at the ends of lines, or an indented blank line is a line that repeats
        seen = "\n".join(map(str.rstrip, text.split("\n")))
        document = Document(seen, id="")
        for prefix, english_only, rules in self._rules:
            if not _LETTER_OR_DIGIT.search(document.text):
                return text, EMPTY
            if english_only and language != "en":
                continue
            if prefix == "repetition":
                words = split_into_words(document.text, _WORDS)  # pyright: ignore[reportArgumentType]
                rules = rules if len(words) >= _FEW else self._repetition_of_few
            verdict = rules.filter(document)
            if isinstance(verdict, tuple):
                rule = verdict[1].removeprefix("gopher_").replace("enough_stop_words", "few_stop_words")
                return text, f"{prefix}_{rule}"
        if not _LETTER_OR_DIGIT.search(document.text):
            return text, EMPTY
        return (text if document.text == seen else document.text), None
