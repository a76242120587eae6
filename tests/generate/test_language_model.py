"""`gemwright.load`: a checkpoint as one object, text piece by piece, many texts at a time, with a draft."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemwright
from gemwright.generate.engine import Session
from gemwright.generate.language_model import LanguageModel
from gemwright.generate.sampling import Sampler, Token
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

TEXT = "def żółw(乌龟):\n    return '🐢🐢' + \"Fluß\"\n"
DRAWN: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 3}


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
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], list[int]]:
    """Let the model choose given ids and then <eos>; the list that comes back is of those chosen so far."""

    def rig(ids: list[int]) -> list[int]:
        chosen: list[int] = []

        def choose(sampler: Sampler, logits: torch.Tensor) -> Token:
            chosen.append([*ids, 1][len(chosen)])
            return Token(chosen[-1])

        monkeypatch.setattr(Sampler, "choose", choose)
        return chosen

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
    with pytest.raises(ValueError, match=r"no tokenizer\.model: put it there, or generate from ids"):
        bare.stream("def ")


def test_a_path_that_is_no_folder_is_refused(folder: Path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        gemwright.load(folder / "nothing")
    with pytest.raises(NotADirectoryError, match="is a file"):
        gemwright.load(folder / "config.json")


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
    loaded: LanguageModel, says: Callable[[list[int]], list[int]]
):
    ids = encoder(loaded).encode(TEXT)
    says(ids)
    pieces = list(loaded.stream("x", max_tokens=60))
    assert "".join(pieces) == TEXT
    assert any("🐢" in piece for piece in pieces)


def test_a_character_that_breaks_off_is_shown_as_broken(
    loaded: LanguageModel, says: Callable[[list[int]], list[int]]
):
    ids = encoder(loaded).encode("ab 𓆉")[:-1]
    says(ids)
    told = loaded.generate("x", max_tokens=60)
    assert told == encoder(loaded).decode(ids)
    assert told.startswith("ab ")
    assert told.endswith("�")


def test_text_appears_as_soon_as_its_token_is_there(
    loaded: LanguageModel, says: Callable[[list[int]], list[int]]
):
    chosen = says(encoder(loaded).encode("one two"))
    assert "one two".startswith(next(loaded.stream("x", max_tokens=60)))
    assert len(chosen) == 1


def test_a_text_follows_bos_and_messages_the_chat_template(loaded: LanguageModel):
    text = encoder(loaded)
    assert loaded.encode("def ") == [2, *text.encode("def ")]
    turn = loaded.encode([{"role": "user", "content": "def "}])
    assert text.decode(turn, control=True) == (
        "<bos><start_of_turn>user\ndef <end_of_turn>\n<start_of_turn>model\n"
    )
    assert loaded.complete([{"role": "user", "content": "def "}], max_tokens=1).prompt_tokens == len(turn)


@pytest.mark.parametrize("end", [1, 107])
def test_a_continuation_ends_before_eos_or_the_end_of_a_turn(
    loaded: LanguageModel, says: Callable[[list[int]], list[int]], end: int
):
    ids = encoder(loaded).encode("a b")
    says([*ids, end])
    done = loaded.complete("x", max_tokens=60)
    assert (done.text, [token.id for token in done.tokens], done.finish) == ("a b", ids, "stop")


def test_a_text_ends_before_a_stop_string_and_its_tokens_with_it(
    loaded: LanguageModel, says: Callable[[list[int]], list[int]]
):
    chosen = says(encoder(loaded).encode("one two\n\nthree"))
    done = loaded.complete("x", stop=["\n\n"], max_tokens=60)
    assert (done.text, done.finish) == ("one two", "stop")
    assert [token.id for token in done.tokens] == chosen
    assert encoder(loaded).decode(chosen) == "one two\n\n"


def test_a_completion_brings_log_probabilities(loaded: LanguageModel):
    done = loaded.complete("def ", max_tokens=4, logprobs=3)
    assert (done.finish, len(done.tokens), done.prompt_tokens) == ("length", 4, len(loaded.encode("def ")))
    logprobs = loaded(torch.tensor([loaded.encode("def ")]))[0, -1].log_softmax(-1)
    first = done.tokens[0]
    assert first.logprob == pytest.approx(float(logprobs[first.id]), abs=1e-4)
    assert [id for id, _ in first.top] == logprobs.topk(3).indices.tolist()


def test_a_setting_that_there_is_not_is_refused_and_the_nearest_named(loaded: LanguageModel):
    for call in (loaded.stream, loaded.generate, loaded.complete):
        with pytest.raises(ValueError, match="Did you mean 'max_tokens'"):
            call("def ", max_token=3)
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        loaded.batch(["def "], temperatures=0.5)
    with pytest.raises(ValueError, match="temperature"):
        loaded.stream("def ", temperature=-1.0)


def test_what_does_not_fit_is_refused_at_the_call(loaded: LanguageModel):
    with pytest.raises(ValueError, match="exceed the model's max_seq_len=64"):
        loaded.stream("def ", max_tokens=64)


@pytest.mark.parametrize("way", ["close", "drop", "end"])
def test_a_stream_frees_its_cache_when_it_is_closed_dropped_or_at_its_end(
    loaded: LanguageModel, monkeypatch: pytest.MonkeyPatch, way: str
):
    made: list[Session] = []
    begin = Session.__init__

    def watched(session: Session, *arguments: Any, **options: Any) -> None:
        begin(session, *arguments, **options)
        made.append(session)

    monkeypatch.setattr(Session, "__init__", watched)
    stream = loaded.stream("def ", max_tokens=20)
    next(stream)
    (session,) = made
    cache = weakref.ref(session.cache)
    gc.disable()  # it is not to wait for the collector
    try:
        if way == "close":
            stream.close()
        elif way == "end":
            list(stream)
        else:
            del stream
        assert cache() is None
    finally:
        gc.enable()


def test_a_closed_stream_gives_nothing_more_and_knows_what_it_gave(loaded: LanguageModel):
    stream = loaded.stream("def ", max_tokens=20)
    piece = next(stream)
    stream.close()
    assert list(stream) == []
    assert (stream.completion.text, stream.completion.finish) == (piece, "cancelled")


@pytest.mark.parametrize("most", [1, 2, 12])
def test_a_batch_gives_what_each_prompt_gives_alone(loaded: LanguageModel, most: int):
    drawn = {**DRAWN, "max_tokens": most}
    prompts = ["def ", "return x", [{"role": "user", "content": "if "}], "def " * 6, "self."]
    alone = [loaded.complete(one, **{**drawn, "seed": 3 + number}) for number, one in enumerate(prompts)]
    together = sorted(loaded.batch(prompts, max_batch=2, **drawn))
    assert [number for number, _ in together] == [0, 1, 2, 3, 4]
    assert [done for _, done in together] == alone


def test_a_batch_ends_each_text_at_its_stop_string(loaded: LanguageModel):
    alone = loaded.complete("def ", **DRAWN)
    stop = encoder(loaded).decode([alone.tokens[3].id])
    ((_, done),) = loaded.batch(["def "], stop=[stop], **DRAWN)
    assert stop in alone.text
    assert (done.text, done.finish) == (alone.text.partition(stop)[0], "stop")
    assert len(done.tokens) < len(alone.tokens)


def test_a_batch_takes_prompts_when_there_is_room_and_gives_results_as_they_come(loaded: LanguageModel):
    taken: list[int] = []

    def prompts() -> Any:
        for number in range(100):
            taken.append(number)
            yield "def "

    results = loaded.batch(prompts(), max_batch=2, max_tokens=3)
    assert next(results)[0] == 0
    assert len(taken) <= 6


def test_a_prompt_of_a_batch_that_does_not_fit_is_named(loaded: LanguageModel):
    with pytest.raises(ValueError, match=r"prompt 1: .* exceed the model's max_seq_len=64"):
        list(loaded.batch(["def ", "def " * 80], max_tokens=3))


def test_a_window_given_at_loading_is_the_models(folder: Path, loaded: LanguageModel):
    ids = torch.randint(108, 700, (1, 30))
    narrow = gemwright.load(folder, window=4)
    assert narrow.config.window == 4
    torch.testing.assert_close(narrow(ids), loaded.model.with_window(4)(ids), rtol=0, atol=0)
    assert not torch.allclose(narrow(ids), loaded(ids), atol=1e-2)


def test_a_model_in_int8_continues_and_gives_logits_near_the_others(folder: Path, loaded: LanguageModel):
    small = gemwright.load(folder, quantize="int8", device="cpu")
    assert len(small.complete("def ", max_tokens=5).tokens) == 5
    ids = torch.randint(108, 700, (1, 30))
    near = (small(ids).softmax(-1) - loaded(ids).softmax(-1)).abs().sum(-1).mean()
    assert 0 < float(near) < 0.3


def test_with_a_draft_the_greedy_text_is_the_models_own(folder: Path, loaded: LanguageModel):
    hurried = gemwright.load(folder, draft=folder, lookahead=3)
    done, plain = (model.complete("def ", max_tokens=20) for model in (hurried, loaded))
    assert done.text == plain.text
    assert plain.accepted is None
    assert done.accepted == 1  # the draft is the model itself


def test_a_draft_may_be_a_model_that_is_loaded_already(folder: Path, loaded: LanguageModel):
    assert gemwright.load(folder, draft=loaded).draft is loaded


def test_a_draft_with_another_tokenizer_is_refused_though_it_has_as_many_pieces(
    folder: Path, tmp_path: Path, text_folder: Path
):
    from gemwright.tokenizer.train import TokenizerConfig, train

    other = shutil.copytree(folder, tmp_path / "other")
    texts = [path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())[:40]]
    tokenizer = Tokenizer(train(texts, TokenizerConfig(vocab_size=700)))
    tokenizer.save(other)
    assert tokenizer.vocab_size == encoder(gemwright.load(folder)).vocab_size
    with pytest.raises(ValueError, match="the draft has another tokenizer than the model"):
        gemwright.load(folder, draft=other)
    (other / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="the draft has another tokenizer than the model"):
        gemwright.load(folder, draft=other)


def test_a_draft_of_another_vocabulary_or_a_lookahead_of_0_is_refused_at_loading(
    folder: Path, tiny: GemmaConfig, tmp_path: Path
):
    padded = shutil.copytree(folder, tmp_path / "padded")
    checkpoint.save(Gemma(tiny.but(vocab_size=704)), padded)
    with pytest.raises(ValueError, match="the draft has 704 tokens, the model 700"):
        gemwright.load(folder, draft=padded)
    with pytest.raises(ValueError, match="lookahead=0 must be at least 1"):
        gemwright.load(folder, draft=folder, lookahead=0)
