"""Texts that a model should not learn from: unsafe ones, and those in which another model introduces itself.

Two looks at safety. Word lists, as C4 has them (arXiv 1910.10683, section 2.2), are quick and coarse: a list
knows no context, and the longer it is, the more medicine, law and fiction it takes away. So the one that
ships is short and made of phrases that ask for harm or advertise it; longer ones, such as LDNOOBW's, are
given by path. A classifier, any function from text to a number from 0 to 1, sees what no list does.

Self-identification is what the Gemma 2 report (arXiv 2408.00118, section 5) filters from synthetic data as
mistaken: a student of many teachers must not learn that it is one of them. Only what is said in the first
person counts, and only in English; a story told by a machine counts too, as nothing in the words differs.
"""

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import regex
from pydantic import Field, NonNegativeInt

from gemwright.config import Config, nearest

# Offensive by nature. What a newspaper, a medical textbook or a novel would print is left to longer lists: a
# bomb is in most thrillers, and slurs are in Mark Twain, but not how to make the one at home.
BUILTIN = """
how do i make a bomb
how do i build a bomb
how to make a bomb at home
how to make a pipe bomb
how to build a pipe bomb
how to make a car bomb
how to make a nail bomb
how to make homemade explosives
how to make napalm
how to make nerve gas
how to make sarin
how to make ricin
how to make mustard gas
how to make meth
how to cook meth
how to cook crystal meth
how to hire a hitman
how to groom a child
how to make a date rape drug
child porn videos
child porn pics
kiddie porn
pedo porn
preteen porn
preteen sex
underage porn
underage sex videos
loli porn
lolicon porn
jailbait porn
incest porn
rape porn
bestiality porn
animal sex videos
free porn videos
gangbang porn
cumshot
bukkake
sand nigger
gas the jews
"""
"""The list that ships, one phrase a line."""

# Scripts without spaces between words: a phrase counts wherever it stands, as in mC4 for ja, th and zh.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[^\W{_UNSPACED}]+")
_LONE = re.compile(rf"[{_UNSPACED}]")  # one such character is a part of many an innocent word
_EVERYWHERE = {"グロ", "女の子"}  # mC4 passes over them: each was in more than a tenth of all Japanese pages


class UnsafeConfig(Config):
    """What counts as unsafe."""

    words: tuple[str, ...] = ()
    """Paths of word lists in UTF-8, one word or phrase a line, as LDNOOBW has them."""
    builtin: bool = True
    """Use the short list that ships, too."""
    most: NonNegativeInt = 0
    """Matches that a text may have. C4 allows none."""
    score: str | None = None
    """A classifier, `package.module:function`, from a text to a number from 0 (safe) to 1."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """The score from which on a text is unsafe."""


class Unsafe:
    """Judges texts by word lists and, where one is named, by a classifier. Can be pickled."""

    def __init__(self, config: UnsafeConfig, score: Callable[[str], float] | None = None) -> None:
        """Read the lists and find the classifier, or take the one that is given.

        Raises:
            FileNotFoundError: no word list at a path.
            ValueError: a list that is not UTF-8, a classifier that is not to be found, or two of them.
        """
        if config.score and score:
            raise ValueError(f"Two classifiers: score={config.score!r} and a function. Give one of them.")
        self.config = config
        self._score = _resolve(config.score) if config.score else score
        phrases = {phrase for path in config.words for phrase in _read(Path(path))}
        if config.builtin:
            phrases |= set(BUILTIN.splitlines())
        phrases = {" ".join(phrase.casefold().split()) for phrase in phrases} - {"", *_EVERYWHERE}
        anywhere = {phrase for phrase in phrases if _LONE.search(phrase) or not _WORD.search(phrase)}
        self._anywhere = _alternation({phrase for phrase in anywhere if not _LONE.fullmatch(phrase)})
        # A phrase is looked for where its longest word occurs: few texts hold it, and looking up is quick.
        self._by_word: dict[str, list[tuple[str, str]]] = {}
        for phrase in sorted(phrases - anywhere):
            words = _WORD.findall(phrase)
            self._by_word.setdefault(max(words, key=len), []).append((f" {' '.join(words)} ", phrase))

    def check(self, text: str) -> str | None:
        """Why to drop a text, `unsafe_words` or `unsafe_score`, or None.

        Raises:
            ValueError: the classifier gave something else than a number from 0 to 1.
        """
        if self._matches(text.casefold()) > self.config.most:
            return "unsafe_words"
        if self._score is None:
            return None
        score = self._score(text)
        if not 0 <= score <= 1:
            name = self.config.score or "The classifier"
            raise ValueError(f"{name} gave {score}, and a score is from 0 to 1. Scale it before.")
        return "unsafe_score" if score >= self.config.threshold else None

    def _matches(self, text: str) -> int:
        """How often a phrase occurs in a case-folded text; where two overlap, the longer counts."""
        found = 0
        if self._anywhere is not None and not text.isascii():
            found = len(self._anywhere.findall(text))
        words = _WORD.findall(text)
        here = [entry for word in self._by_word.keys() & set(words) for entry in self._by_word[word]]
        if here:
            spaced = f" {' '.join(words)} "
            whole = _alternation({phrase for plain, phrase in here if plain in spaced})
            if whole is not None:
                # regex, not re: the vowel signs of India's scripts are parts of its words
                edge = rf"[\w--[{_UNSPACED}]]"
                found += len(regex.findall(rf"(?<!{edge})(?:{whole.pattern})(?!{edge})", text, regex.V1))
        return found


def _alternation(phrases: set[str]) -> re.Pattern[str] | None:
    """A pattern for any of some phrases, the longest first, with any white space in them; None for none."""
    longest_first = sorted(phrases, key=lambda phrase: (-len(phrase), phrase))
    patterns = [r"\s+".join(map(re.escape, phrase.split())) for phrase in longest_first]
    return re.compile("|".join(patterns)) if patterns else None


def _read(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no word list at {path}. Give a text file with one phrase a line.")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"The word list {path} is not UTF-8. Convert it first.") from None


def _resolve(name: str) -> Callable[[str], float]:
    """The function behind `package.module:function`."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise ValueError(f"score={name!r} is not of the form package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"score={name!r}: {error}. Install it, or put its folder on PYTHONPATH.") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        callables = [known for known, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"score={name!r}: {module_name} has no function {function_name!r}. "
            f"{nearest(function_name, callables)}"
        )
    return cast("Callable[[str], float]", function)


# What follows is read as English: {_MODEL} is "a helpful AI assistant", {_SOME} a few words of one sentence.
_SOME = r"[^.!?\n]{0,80}?"
_MODEL = (
    r"(?i:(?:an?|your) (?:(?:very|highly|large|small|little|simple|helpful|harmless|friendly|useful|humble"
    r"|mere|general|advanced|smart|powerful|sophisticated|modern|multilingual|conversational|generative"
    r"|neural|virtual|digital|online|open-source|pre-?trained|text-based|computer|machine|learning) )*"
    r"(?:(?:AI|“AI”|A\.I\.|AI-powered|AI-based|artificial intelligence)"
    r"(?: (?:large )?(?:language )?(?:model|assistant|chatbot|bot|system|program|agent))?"
    r"|language model|LLM|chat ?bot|(?<=virtual )assistant|(?<=digital )assistant))"
)
# a mark must follow, or a word that goes on about it: "I am an AI researcher" is a person
_NO_NOUN = (
    r"(?=\W*$|[ ]?[,.;:!?()\n—–]|[ -]+(?:I|and|so|but|or|who|which|that|with|without|called|named|here"
    r"|designed|(?:\w+ly )?(?:trained|developed|created|built|made|programmed|powered|based|from|by))\b)"
)
# no names that people have: "My name is Claude" needs a maker or "a language model" beside it
_NAME = r"(?:Chat ?GPT|GPT-?\d[\w.]*|Vicuna|Open ?Assistant|Qwen|DeepSeek|LLaMA|Bing Chat)"
_LABORATORY = (
    r"\b(?:Open ?AI|Anthropic|DeepMind|LMSYS|Large Model Systems|Mistral AI|Stability AI|EleutherAI"
    r"|DeepSeek|xAI)\b"
)
_FIRM = r"\b(?:Google|Microsoft|Meta|Facebook|IBM|Amazon|NVIDIA|Apple|Alibaba|Baidu|Tencent)\b"
_AM = r"\bI(?:['’]m| am)(?: (?:only|just|merely|simply|actually|really|also|still|but))?"
_WAS = r"\bI(?:['’]m| am| was|['’]ve been| have been)(?: \w+ly)?"
_CALLED = (
    rf"(?:{_AM}(?: called| named)?|\b[Mm]y name is|\b[Cc]all me|\brefer to me as|\bI go by(?: the name)?)"
    r" [\"“'*]*"
)
_STATEMENTS = (
    # what it is
    rf"{_AM} {_MODEL}{_NO_NOUN}",
    rf"{_CALLED}{_NAME}\b(?!['’]s){_NO_NOUN}",
    rf"{_CALLED}[A-Z][\w-]*[\"”'*]*,? (?:and )?(?:{_AM} )?{_MODEL}{_NO_NOUN}",
    # who made it; of a firm an employee may say that it trained them, of a laboratory hardly
    rf"{_CALLED}[A-Z][\w-]*[\"”'*]*, (?:made|created|developed|built|trained) by {_SOME}{_LABORATORY}",
    rf"{_WAS} (?:(?:pre-?)?trained|fine-?tuned|made|built|designed) by {_SOME}{_LABORATORY}",
    rf"{_WAS} (?:created|developed|programmed) by {_SOME}(?:{_LABORATORY}|{_FIRM})",
    rf"{_LABORATORY}{_SOME} (?:created|developed|trained) me\b(?! an?\b)",
    rf"{_FIRM}{_SOME} (?:created|developed) me\b(?! an?\b)",
    rf"\b[Mm]y (?:creator|developer|maker)s? (?:is|are|at) {_SOME}(?:{_LABORATORY}|{_FIRM})",
    # how it speaks of itself
    rf"(?<![Aa]ct )(?<![Aa]cting )\b[Aa]s {_MODEL}"
    rf"(?:, (?:\w+, )?| |(?: \w+ly)? (?:trained|developed|created|built|made|designed) {_SOME},? )"
    r"(?:I\b|my\b|it(?: is|['’]s) not \w+ for me\b)",
    rf"\bI (?:don['’]t|do not|can(?:no|['’])t)(?: have| possess| experience|{_SOME},)(?: {_SOME})?"
    rf" as {_MODEL}{_NO_NOUN}",
    r"\b[Mm]y (?:last |latest )?(?:knowledge|training(?: data)?)(?:['’]s)? "
    rf"(?:cut-?\s?off|was last updated|(?:\w+ )?(?:ends|goes|extends|is limited) {_SOME}\b20\d\d)",
    r"\b[Aa]s of my (?:last|latest|most recent) (?:knowledge |training )?(?:update|cut-?off|training)\b",
    rf"{_WAS} (?:pre-?)?trained on (?:an? )?(?:large|vast|massive|huge|diverse) {_SOME}"
    r"\b(?:data ?sets?|corpus|corpora|data|text)\b",
)
_SELF = re.compile(  # what stands first makes it seven times as fast: it fails soon where no statement begins
    rf"\b(?=I[ '’]|[Mm]y |[Aa]s |[Cc]all me|refer to me|[A-Zx])(?:{'|'.join(_STATEMENTS)})"
)


def self_identification(text: str) -> str | None:
    """`self_identification` where a model says in the first person that it is one, or who made it; else None.

    Not "BERT is a language model trained by Google", nor "Are you ChatGPT?": that is said of others.
    """
    return "self_identification" if _SELF.search(text) else None
