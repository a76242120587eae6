"""The language of a text: snippets, odd input, and the Declaration of Human Rights in every candidate."""

import pickle
import random
import zipfile
from pathlib import Path

import pytest

from gemwright.filters.language import LANGUAGES, UNKNOWN, Identifier

# the candidates' names in the archive, which goes by ISO 639-3
UDHR = {
    "en": "eng", "ar": "arb", "bn": "ben", "cs": "ces", "de": "deu", "el": "ell_monotonic", "es": "spa",
    "fa": "pes_1", "fr": "fra", "he": "heb", "hi": "hin", "hu": "hun", "id": "ind", "it": "ita", "ja": "jpn",
    "ko": "kor", "nl": "nld", "pl": "pol", "pt": "por_BR", "ro": "ron", "ru": "rus", "sv": "swe",
    "ta": "tam", "tr": "tur", "uk": "ukr", "ur": "urd", "zh": "cmn_hans",
    "th": "tha", "vi": "vie",  # codespell:ignore tha,vie
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The ship left the harbour before anyone had woken up.", "en"),
        ("Das Schiff verließ den Hafen, bevor jemand wach war.", "de"),
        ("Le navire a quitté le port avant que quiconque ne se réveille.", "fr"),
        ("Корабль покинул гавань, прежде чем кто-либо проснулся.", "ru"),
        ("船在所有人醒来之前就离开了港口。", "zh"),
        ("誰も目を覚まさないうちに、船は港を出た。", "ja"),
        ("غادرت السفينة الميناء قبل أن يستيقظ أحد.", "ar"),
    ],
)
def test_a_sentence_is_recognised(text: str, code: str) -> None:
    assert Identifier().identify(text)[0] == code


def test_the_probability_of_a_clear_text_is_near_one() -> None:
    _, probability = Identifier().identify("The ship left the harbour before anyone had woken up. " * 4)
    assert 0.99 < probability <= 1


@pytest.mark.parametrize("text", ["", " \n\t", "12,345.67 (89 %)", "--- *** ---", "🐢🐢"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert Identifier().identify(text) == (UNKNOWN, 0.0)


def test_white_space_before_the_text_is_passed_over() -> None:
    assert Identifier().identify("\n" * 10_000 + "Das Schiff verließ den Hafen.")[0] == "de"


def test_only_the_start_of_a_text_is_read() -> None:
    start = "The ship left the harbour before anyone had woken up. " * 50
    assert Identifier().identify(start + "Корабль покинул гавань. " * 5_000) == Identifier().identify(start)


def test_only_the_candidates_are_named() -> None:
    danish = "Skibet forlod havnen, før nogen var vågnet, og det kom aldrig tilbage."
    assert Identifier((*LANGUAGES, "da")).identify(danish)[0] == "da"
    assert Identifier().identify(danish)[0] in LANGUAGES


def test_identifiers_with_other_candidates_do_not_disturb_each_other() -> None:
    text = "Das Schiff verließ den Hafen, bevor jemand wach war."
    german, other = Identifier(("en", "de")), Identifier(("fr", "it"))
    assert german.identify(text)[0] == "de"
    assert other.identify(text)[0] in ("fr", "it")
    assert german.identify(text)[0] == "de"


def test_an_unknown_language_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"knows no 'eng'\. Did you mean 'en'\?"):
        Identifier(("de", "eng"))


@pytest.mark.parametrize("languages", [(), ("en",), ("en", "en")])
def test_fewer_than_two_candidates_are_an_error(languages: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="Name two or more"):
        Identifier(languages)


def test_what_goes_to_a_worker_is_small_and_works_there() -> None:
    identifier = Identifier(("en", "de"))
    sent = pickle.dumps(identifier)
    assert len(sent) < 1_000
    assert pickle.loads(sent).identify("Das Schiff verließ den Hafen.")[0] == "de"


def test_two_hundred_characters_of_the_declaration_of_human_rights_are_recognised(data: Path) -> None:
    draw, identifier, right, all_of_them = random.Random(0), Identifier(), 0, 0
    assert set(UDHR) == set(LANGUAGES)
    with zipfile.ZipFile(data / "text/udhr2.zip") as archive:
        for code, name in UDHR.items():
            text = archive.read(f"udhr2/{name}.txt").decode("utf-8")
            for _ in range(30):
                start = draw.randrange(len(text) - 200)
                right += identifier.identify(text[start : start + 200])[0] == code
                all_of_them += 1
    assert right / all_of_them >= 0.97
