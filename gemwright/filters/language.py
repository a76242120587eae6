"""Which language a text is in: py3langid, a naive Bayes over byte n-grams, told which languages can occur.

To name the candidates is worth more than a larger model. Languages that differ little (Indonesian and Malay,
Hindi and Marathi, Czech and Slovak) are what mistakes are made of, and most corpora hold one of each pair.
The price: a text in a language that is not among the candidates is called by the name of one that is, mostly
with a high probability. Whoever expects such texts names their languages too.

Source code is no language. Its names and comments are mostly English, but what is said of it is arbitrary:
keep code out of the way of a filter by language. Method: Lui and Baldwin, "langid.py", ACL 2012.
"""

import copy
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

from gemwright.config import nearest

LANGUAGES = (
    "en", "ar", "bn", "cs", "de", "el", "es", "fa", "fr", "he", "hi", "hu", "id",
    "it", "ja", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "ta", "th", "tr", "uk", "ur", "vi", "zh",
)  # fmt: skip
"""The default candidates, by ISO 639-1: the much written languages, one of each pair that is hard to tell."""

UNKNOWN = "und"
"""ISO 639's code for a language that cannot be told: here, a text without a letter where we look."""

_CHARACTERS = 2_000  # read of a text, past white space: ten times what the accuracy was measured on


class Identifier:
    """Names the language of a text, out of the candidates.

    Every identifier of a process shares one copy of the model (130 MB), which is read at the first use in
    each process: what goes to a worker is a tuple of codes.
    """

    def __init__(self, languages: tuple[str, ...] = LANGUAGES) -> None:
        """Take the candidates, as ISO 639 codes.

        Raises:
            ValueError: fewer than two, or one that the model does not know.
        """
        if len(set(languages)) < 2:
            raise ValueError(f"languages={languages} leaves nothing to tell apart. Name two or more.")
        known = _model().labels
        for code in languages:
            if code not in known:
                raise ValueError(f"The language model knows no {code!r}. {nearest(code, known)}")
        self.languages = languages

    def identify(self, text: str) -> tuple[str, float]:
        """The code of the likeliest candidate and its probability among them; `("und", 0.0)` without letters.

        The probability is the model's own, tempered by the length of the text.
        """
        start = text.lstrip()[:_CHARACTERS]
        if not any(map(str.isalpha, start)):
            return UNKNOWN, 0.0
        return _restricted(self.languages).classify(start)


@cache
def _model() -> LanguageIdentifier:
    # an instance of our own: the module's functions share one, whose languages anybody may change
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _restricted(languages: tuple[str, ...]) -> LanguageIdentifier:
    model = copy.copy(_model())  # shallow: the automaton, which is nearly all of it, stays one
    model.set_languages(languages)
    return model
