"""`gemwright.load`: a folder as one object, and text that comes piece by piece."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import gemwright
from gemwright.generate import language_model
from gemwright.generate.language_model import LanguageModel
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

TEXT = "def żółw(乌龟):\n    return '🐢🐢' + \"Fluß\"\n"


@pytest.fixture
def folder(tiny: GemmaConfig, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A checkpoint with its tokenizer, whose logits come near the cap."""
    checkpoint.save(Gemma(tiny.but(init_std=1.0)), tmp_path / "model")
    Tokenizer.load(tokenizer_folder).save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def loaded(folder: Path) -> LanguageModel:
    return gemwright.load(folder)


@pytest.fixture
def says(loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Let the model say given ids, whatever it is asked."""

    def rig(ids: list[int]) -> None:
        monkeypatch.setattr(language_model, "decode", lambda *arguments, **options: iter(ids))

    return rig


def encoder(loaded: LanguageModel) -> Tokenizer:
    assert loaded.tokenizer is not None
    return loaded.tokenizer


def test_calling_it_gives_capped_logits_of_every_position(loaded: LanguageModel):
    ids = torch.randint(0, 700, (2, 12))
    logits = loaded(ids)
    assert logits.shape == (2, 12, 700)
    assert logits.dtype == torch.float32
    assert 25 < float(logits.abs().max()) <= 30
    with torch.no_grad():
        torch.testing.assert_close(logits, loaded.model(ids), rtol=0, atol=0)
    assert not logits.requires_grad


def test_a_bf16_checkpoint_keeps_its_format_and_still_gives_fp32_logits(folder: Path):
    narrow = gemwright.load(folder, dtype=torch.bfloat16)
    checkpoint.save(narrow.model, folder)
    again = gemwright.load(folder)
    assert {p.dtype for p in again.model.parameters()} == {torch.bfloat16}
    logits = again(torch.tensor([[2, 150, 300]]))
    assert logits.dtype == torch.float32
    assert float(logits.abs().max()) <= 30


def test_it_knows_its_config(loaded: LanguageModel, tiny: GemmaConfig):
    assert loaded.config.to_hf() == tiny.to_hf()


def test_a_folder_may_be_named_by_text(folder: Path):
    assert gemwright.load(str(folder)).generate("def ", max_tokens=3) is not None


def test_without_its_file_there_is_no_tokenizer(folder: Path):
    (folder / "tokenizer.model").unlink()
    bare = gemwright.load(folder)
    assert bare.tokenizer is None
    assert bare(torch.tensor([[2, 5]])).shape == (1, 2, 700)
    with pytest.raises(ValueError, match=r"no tokenizer\.model: generate from ids"):
        bare.stream("def ")


def test_a_path_that_is_no_folder_is_refused(folder: Path):
    for path in (folder / "config.json", folder / "nothing"):
        with pytest.raises(FileNotFoundError, match="is not a folder"):
            gemwright.load(path)


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json: it is not a checkpoint"):
        gemwright.load(tmp_path)


def test_missing_weights_are_named(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        gemwright.load(folder)


def test_another_kind_of_model_is_refused(folder: Path):
    config = (folder / "config.json").read_text().replace('"gemma2"', '"gemma3_text"')
    (folder / "config.json").write_text(config)
    with pytest.raises(ValueError, match="model_type is 'gemma3_text': only 'gemma2'"):
        gemwright.load(folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_pieces_of_a_stream_join_to_what_generate_gives(loaded: LanguageModel, temperature: float):
    pieces = list(loaded.stream("def ", max_tokens=40, temperature=temperature, seed=3))
    assert "".join(pieces) == loaded.generate("def ", max_tokens=40, temperature=temperature, seed=3)
    assert len(pieces) > 5


def test_a_character_made_of_several_tokens_comes_whole(
    loaded: LanguageModel, says: Callable[[list[int]], None]
):
    ids = encoder(loaded).encode(TEXT)
    spelled = [number for number in ids if encoder(loaded).piece(number).startswith("<0x")]
    assert len(spelled) >= 8, "some characters were to be spelled in bytes"
    says(ids)
    pieces = list(loaded.stream("x"))
    assert "".join(pieces) == TEXT
    assert not any("�" in piece for piece in pieces)
    assert any("🐢" in piece for piece in pieces)


def test_a_character_that_breaks_off_is_shown_as_broken(
    loaded: LanguageModel, says: Callable[[list[int]], None]
):
    ids = encoder(loaded).encode("ab 𓆉")
    says(ids[:-1])
    told = loaded.generate("x")
    assert told == encoder(loaded).decode(ids[:-1])
    assert told.startswith("ab ")
    assert told.endswith("�")


def test_a_space_at_the_beginning_of_a_continuation_is_kept(
    loaded: LanguageModel, says: Callable[[list[int]], None]
):
    says(encoder(loaded).encode("  return x "))
    assert loaded.generate("x") == "  return x "


def test_text_appears_as_soon_as_its_token_is_there(loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch):
    taken: list[int] = []

    def slowly(*arguments: object, **options: object) -> Iterator[int]:
        for number in encoder(loaded).encode("one two"):
            taken.append(number)
            yield number

    monkeypatch.setattr(language_model, "decode", slowly)
    stream = loaded.stream("x")
    assert "one two".startswith(next(stream))
    assert len(taken) == 1


def test_a_continuation_begins_after_bos_and_ends_on_eos_or_the_end_of_a_turn(
    loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch
):
    asked: dict[str, object] = {}

    def watch(model: Gemma, prompt: list[int], **options: object) -> Iterator[int]:
        asked.update(options, prompt=prompt)
        return iter([])

    monkeypatch.setattr(language_model, "decode", watch)
    assert loaded.generate("def ", max_tokens=7, temperature=0.5, seed=9) == ""
    assert asked["prompt"] == [2, *encoder(loaded).encode("def ")]
    assert asked["stop_ids"] == (1, 107)
    assert (asked["max_tokens"], asked["temperature"], asked["seed"]) == (7, 0.5, 9)


def test_what_does_not_fit_is_refused_at_the_call(loaded: LanguageModel):
    with pytest.raises(ValueError, match="exceed the model's max_seq_len=64"):
        loaded.stream("def ", max_tokens=64)
