"""Training: Gemma's layout, no text dropped, the same bytes each time, and errors with their remedy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, run, train

CONFIG = TokenizerConfig(vocab_size=800)


def test_ids_0_to_472_are_gemmas(small: Tokenizer, gemma: Tokenizer) -> None:
    assert [small.piece(number) for number in range(473)] == [gemma.piece(number) for number in range(473)]


def test_runs_of_tabs_come_last(small: Tokenizer) -> None:
    assert [small.piece(number) for number in range(1170, 1200)] == ["\t" * length for length in range(2, 32)]


def test_the_vocabulary_has_the_size_asked_for(small: Tokenizer) -> None:
    assert small.vocab_size == 1200


def test_no_learnt_piece_holds_two_digits(small: Tokenizer) -> None:
    learnt = [small.piece(number) for number in range(473, 1170)]
    assert not [piece for piece in learnt if len(piece) > 1 and any(letter.isdigit() for letter in piece)]


def test_printable_ascii_is_never_spelled_in_bytes() -> None:
    """A text without digits must not make numbers four times as long."""
    tokenizer = Tokenizer(train(["one two three " * 9], CONFIG.but(vocab_size=610)))
    assert len(tokenizer.encode("0123456789~Q")) == 12


def test_learnt_pieces_shorten_text(small: Tokenizer, texts: list[str]) -> None:
    assert len(small.encode(texts[0])) < len(texts[0]) / 2


def test_the_same_text_and_config_give_the_same_bytes(texts: list[str]) -> None:
    assert train(texts, CONFIG) == train(iter(texts), CONFIG)


def test_bytes_do_not_hang_on_the_process() -> None:
    """Python orders sets by a hash that differs between processes."""
    code = (
        "import hashlib, argparse, inspect; from gemwright.tokenizer.train import TokenizerConfig, train;"
        "model = train([inspect.getsource(argparse)], TokenizerConfig(vocab_size=700));"
        "print(hashlib.sha256(model).hexdigest())"
    )
    hashes = {
        subprocess.check_output([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    }
    assert len(hashes) == 1


def test_cutting_text_at_newlines_changes_nothing(texts: list[str]) -> None:
    assert train(texts, CONFIG) == train((line for text in texts for line in text.split("\n")), CONFIG)


def test_a_very_long_line_is_not_dropped(texts: list[str]) -> None:
    """SentencePiece drops a sentence above its limit, 4,192 bytes by default, and only its log says so."""
    line = "".join("".join(texts).split())
    assert len(line) > 200_000
    assert "self" in _learnt(Tokenizer(train([line], CONFIG)))


def test_the_character_that_sentencepiece_reserves_does_not_drop_its_text(texts: list[str]) -> None:
    """A sentence with U+2585 is dropped whole, and only the log says so; here that character alone is."""
    assert train([text.replace("\n", "\n▅\n") for text in texts], CONFIG) == train(texts, CONFIG)


def test_more_text_than_wanted_is_sampled_by_the_seed(texts: list[str]) -> None:
    config = CONFIG.but(max_characters=100_000)
    assert train(texts, config) == train(texts, config)
    assert train(texts, config) != train(texts, config.but(seed=1))


def test_the_sample_is_not_just_the_beginning(texts: list[str]) -> None:
    late = ["ab " * 40_000, *texts]
    assert "self" in _learnt(Tokenizer(train(late, CONFIG.but(max_characters=100_000))))


def test_the_seed_is_without_effect_where_all_text_fits(texts: list[str]) -> None:
    assert train(texts, CONFIG) == train(texts, CONFIG.but(seed=1))


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 characters of text are too little"):
        train(["", ""], CONFIG)


def test_too_little_text_is_told_with_the_size_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"11 characters .*use vocab_size=(\d+) or less") as error:
        train(["hello world"], CONFIG)
    possible = int(str(error.value).split("vocab_size=")[2].split()[0])
    assert Tokenizer(train(["hello world"], CONFIG.but(vocab_size=possible))).vocab_size == possible


def test_a_vocabulary_too_small_for_its_fixed_pieces_is_refused_early() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=597 leaves no room for text: 597 pieces are fixed"):
        TokenizerConfig(vocab_size=597)


def test_a_vocabulary_too_small_for_the_characters_is_told_with_the_remedy() -> None:
    script = "".join(map(chr, range(0x4E00, 0x5200)))
    with pytest.raises(
        ValueError, match=r"vocab_size=800 is too small for the characters .*character_coverage"
    ):
        train([script], CONFIG.but(character_coverage=1.0))


def test_half_a_surrogate_pair_is_told_as_such(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="half a surrogate pair"):
        train([*texts, "\ud83d"], CONFIG)


def test_the_stage_leaves_a_tokenizer_and_a_card(texts: list[str], tmp_path: Path) -> None:
    card = run(CONFIG, tmp_path / "tokenizer", lambda: texts, {"corpus": "four modules"})
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")
    files = ["chat_template.jinja", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    assert sorted(card.outputs) == files
    assert card.inputs == {"corpus": {"value": "four modules"}}
    assert card.results["vocab_size"] == tokenizer.vocab_size == 800
    assert card.results["sha256"] == tokenizer.sha256
    assert card.results["documents"] == 4
    assert card.results["characters"] == sum(map(len, texts))
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    assert card.results["characters_per_token"] == pytest.approx(sum(map(len, texts)) / tokens, rel=1e-3)


def test_the_stage_refuses_another_corpus_in_its_folder(texts: list[str], tmp_path: Path) -> None:
    run(CONFIG, tmp_path / "tokenizer", lambda: texts, {"corpus": "one"})
    with pytest.raises(ValueError, match="input corpus: one -> two"):
        run(CONFIG, tmp_path / "tokenizer", lambda: texts, {"corpus": "two"})


def _learnt(tokenizer: Tokenizer) -> set[str]:
    return {tokenizer.piece(number) for number in range(473, tokenizer.vocab_size - 30)}
