"""A conversation: its history and its cache stay one, however an answer ends."""

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemwright
from gemwright.generate.engine import OutOfMemory
from gemwright.generate.language_model import Chat, LanguageModel, Stream
from gemwright.generate.sampling import Sampler, Sampling, Token
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.chat import encode_conversation, encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer

DRAWN: dict[str, Any] = {"max_tokens": 4, "temperature": 1.0}
END = 107


@pytest.fixture(scope="module")
def model(
    tiny: GemmaConfig, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    folder = tmp_path_factory.mktemp("chat") / "model"
    torch.manual_seed(1)
    checkpoint.save(Gemma(tiny.but(init_std=0.3, max_seq_len=256)), folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return gemwright.load(folder)


@pytest.fixture
def text(model: LanguageModel) -> Tokenizer:
    return model.require_tokenizer()


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], None]:
    """Let the model choose given ids, then the end of its turn, whatever it computed."""

    def rig(ids: list[int]) -> None:
        script = iter([*ids, END])
        monkeypatch.setattr(Sampler, "choose", lambda sampler, logits: Token(next(script)))

    return rig


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each pass over the weights reads."""
    read: list[int] = []
    hidden = Gemma.hidden

    def counted(gemma: Gemma, ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        read.append(ids.shape[1])
        return hidden(gemma, ids, *arguments, **options)

    monkeypatch.setattr(Gemma, "hidden", counted)
    return read


def ids_of(chat: Chat) -> list[int]:
    """What the chat has read or is about to."""
    return chat._session.ids


def in_one(chat: Chat, text: Tokenizer) -> bool:
    """Whether what the cache holds spells the history."""
    ids, _ = encode_conversation(text, chat.messages)
    return text.decode(ids_of(chat), control=True) == text.decode(ids[:-1], control=True)


def test_a_turn_reads_its_own_tokens_and_nothing_twice(
    model: LanguageModel, text: Tokenizer, reads: list[int]
):
    chat = Chat(model, **DRAWN)
    for turn in ("def ", "return x", "self.x"):
        before = len(ids_of(chat))
        del reads[:]
        chat.ask(turn)
        # Of the turn before, the last token and <end_of_turn> have not been read; of this one neither.
        assert sum(reads) <= len(ids_of(chat)) - before + 1
    assert sum(reads) < len(ids_of(chat)) / 2


def test_the_ids_of_a_conversation_are_those_of_the_template(
    model: LanguageModel, text: Tokenizer, says: Callable[[list[int]], None]
):
    """As long as the model spells its words as SentencePiece does."""
    chat = Chat(model, max_tokens=20)
    for turn, answer in {"def ": "\n  żółw", "return x": "", "self.x": "one two\n"}.items():
        says(text.encode(answer))
        assert chat.ask(turn) == answer
        prompt = encode_prompt(text, [*chat.messages, {"role": "user", "content": "next"}])
        assert prompt[: len(ids_of(chat))] == ids_of(chat)
    answer = chat.say("next")
    assert ids_of(chat) == encode_prompt(text, [*chat.messages, {"role": "user", "content": "next"}])
    assert answer.prompt_tokens == len(ids_of(chat))


def test_an_answer_in_a_conversation_is_the_answer_to_all_of_it(model: LanguageModel):
    chat = Chat(model, **{**DRAWN, "temperature": 0.0})
    chat.ask("def ")
    answer = chat.say("return x")
    ids = list(ids_of(chat))
    list(answer)
    with torch.no_grad():
        for token in answer.completion.tokens:
            assert token.id == int(model.model(torch.tensor([ids]))[0, -1].argmax())
            ids.append(token.id)


def test_the_history_has_the_turns_in_order(model: LanguageModel):
    chat = Chat(model, **DRAWN)
    answers = [chat.ask("def "), "".join(chat.say("return"))]
    assert chat.messages == [
        {"role": "user", "content": "def "},
        {"role": "model", "content": answers[0]},
        {"role": "user", "content": "return"},
        {"role": "model", "content": answers[1]},
    ]
    chat.messages.clear()
    assert len(chat.messages) == 4


def close(answer: Stream) -> None:
    answer.close()


def cancel(answer: Stream) -> None:
    answer.cancel()
    assert list(answer) == []


@pytest.mark.parametrize("end", [close, cancel])
def test_an_answer_that_is_ended_stays_as_far_as_it_was_shown(
    model: LanguageModel, text: Tokenizer, end: Callable[[Stream], None]
):
    chat = Chat(model, **{**DRAWN, "max_tokens": 20})
    answer = chat.say("def ")
    shown = next(answer) + next(answer)
    end(answer)
    assert answer.finish == "cancelled"
    assert [message["content"] for message in chat.messages] == ["def ", shown]
    assert ids_of(chat)[-1] == END
    assert in_one(chat, text)
    chat.ask("go on")
    assert in_one(chat, text)


def test_an_answer_that_nobody_holds_any_more_is_ended(model: LanguageModel, text: Tokenizer):
    chat = Chat(model, **{**DRAWN, "max_tokens": 20})
    gc.disable()
    try:
        for shown in chat.say("def "):  # noqa: B007
            break
        assert [message["content"] for message in chat.messages] == ["def ", shown]
    finally:
        gc.enable()
    assert in_one(chat, text)


def test_a_new_turn_ends_an_answer_that_is_still_coming(model: LanguageModel, text: Tokenizer):
    chat = Chat(model, **{**DRAWN, "max_tokens": 20})
    first = chat.say("def ")
    shown = next(first)
    chat.ask("return x")
    assert list(first) == []
    assert [message["content"] for message in chat.messages][:3] == ["def ", shown, "return x"]
    assert in_one(chat, text)


@pytest.mark.parametrize("hurried", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 6])
def test_an_interrupt_in_the_middle_of_a_pass_leaves_a_chat_that_goes_on(
    model: LanguageModel, text: Tokenizer, monkeypatch: pytest.MonkeyPatch, at: int, hurried: bool
):
    """Between two layers the cache is torn, so what is kept has to be read again."""
    used = LanguageModel(model.model, text, draft=model) if hurried else model
    chat = Chat(used, **{**DRAWN, "temperature": 0.0, "max_tokens": 20})
    chat.ask("def ")
    before = chat.messages
    passes: Iterator[int] = iter(range(100))
    hidden = Gemma.hidden

    def interrupted(gemma: Gemma, *arguments: Any, **options: Any) -> torch.Tensor:
        found = hidden(gemma, *arguments, **options)
        if next(passes) == at:
            raise KeyboardInterrupt
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Gemma, "hidden", interrupted)
        answer = chat.say("return x")
        with pytest.raises(KeyboardInterrupt):
            list(answer)
    shown = answer.completion.text
    kept = [*before, {"role": "user", "content": "return x"}, {"role": "model", "content": shown}]
    assert chat.messages == (kept if shown else before)
    assert bool(shown) == (at > (2 if hurried else 0))
    assert in_one(chat, text)
    again = model.session()
    answer = chat.say("go on")
    again.feed(ids_of(chat))
    list(answer)
    drawn = [token.id for token in again.decode(Sampling(max_tokens=20))]
    assert [token.id for token in answer.completion.tokens] == drawn


def test_a_turn_whose_answer_was_ended_before_it_began_is_taken_back(model: LanguageModel):
    chat = Chat(model, **DRAWN)
    chat.ask("def ")
    before, ids = chat.messages, list(ids_of(chat))
    chat.say("return x").close()
    assert (chat.messages, ids_of(chat)) == (before, ids)


@pytest.mark.parametrize("way", ["interrupt", "length"])
def test_half_a_character_is_in_the_cache_if_it_was_shown(
    model: LanguageModel, text: Tokenizer, monkeypatch: pytest.MonkeyPatch, way: str
):
    """Nobody saw it where the answer was ended; at `max_tokens` it is shown as broken, and stays."""
    ids = text.encode("ab 𓆉")[:-1]
    script = iter(ids)

    def choose(sampler: Sampler, logits: torch.Tensor) -> Token:
        if (id := next(script, None)) is None:
            raise KeyboardInterrupt
        return Token(id)

    monkeypatch.setattr(Sampler, "choose", choose)
    chat = Chat(model, max_tokens=20 if way == "interrupt" else len(ids))
    answer = chat.say("def ")
    if way == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            list(answer)
        assert chat.messages[-1]["content"] == "ab "
    else:
        list(answer)
        assert chat.messages[-1]["content"] == "ab ���"
        assert ids_of(chat)[answer.prompt_tokens : -1] == ids
    assert text.decode(ids_of(chat)[answer.prompt_tokens :]) == chat.messages[-1]["content"]
    assert ids_of(chat)[-1] == END


def test_a_stop_string_is_neither_in_the_history_nor_in_the_cache(
    model: LanguageModel, text: Tokenizer, says: Callable[[list[int]], None]
):
    says(text.encode("one two\n\nthree"))
    chat = Chat(model, max_tokens=20, stop=["o\n"])
    assert chat.ask("def ") == "one tw"
    assert chat.messages[-1]["content"] == "one tw"
    assert in_one(chat, text)


@pytest.mark.parametrize("end", [1, END])
def test_every_answer_is_followed_by_the_end_of_its_turn(
    model: LanguageModel, text: Tokenizer, monkeypatch: pytest.MonkeyPatch, end: int
):
    script = iter([*text.encode("ab"), end])
    monkeypatch.setattr(Sampler, "choose", lambda sampler, logits: Token(next(script)))
    chat = Chat(model, max_tokens=20)
    assert chat.ask("def ") == "ab"
    assert ids_of(chat) == encode_conversation(text, chat.messages)[0][:-1]


def test_each_turn_draws_anew_and_a_seed_gives_the_conversation_again(model: LanguageModel):
    def draws(seed: int) -> list[float]:
        numbers: list[float] = []
        chat = Chat(model, seed=seed, **DRAWN)
        uniform = Sampler.uniform

        def noted(sampler: Sampler) -> float:
            numbers.append(uniform(sampler))
            return numbers[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Sampler, "uniform", noted)
            chat.ask("def ")
            chat.ask("def ")
        return numbers

    assert draws(5) == draws(5)
    assert len(set(draws(5))) == 8


def test_a_context_that_is_full_is_refused_before_anything_is_read(
    model: LanguageModel, text: Tokenizer, reads: list[int]
):
    chat = Chat(model, max_tokens=100)
    chat.ask("def ")
    before, ids = chat.messages, list(ids_of(chat))
    del reads[:]
    with pytest.raises(ValueError, match=r"no room for an answer in the context of 256\. .*/reset"):
        chat.say("x y z " * 100)
    assert (chat.messages, ids_of(chat), reads) == (before, ids, [])
    chat.ask("return x")
    assert in_one(chat, text)


def test_an_answer_may_fill_what_the_context_has_left_and_no_more(model: LanguageModel):
    chat = Chat(model, max_tokens=10_000, stop_ids=[])
    answer = chat.say("def ")
    list(answer)
    assert answer.finish == "length"
    assert len(answer.completion.tokens) + answer.prompt_tokens == 256


def test_an_answer_has_at_most_a_quarter_of_a_small_context_by_default(model: LanguageModel):
    assert Chat(model).sampling.max_tokens == 64


def test_lack_of_memory_leaves_the_conversation_as_it_was(
    model: LanguageModel, text: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    chat = Chat(model, **DRAWN)
    chat.ask("def ")
    before, ids = chat.messages, list(ids_of(chat))
    with monkeypatch.context() as patch:
        patch.setattr("gemwright.generate.engine.available_memory", lambda device: 1)
        with pytest.raises(OutOfMemory):
            chat.say("return x")
    assert (chat.messages, ids_of(chat)) == (before, ids)


def test_reset_begins_anew(model: LanguageModel):
    chat = Chat(model, **DRAWN)
    first = chat.ask("def ")
    chat.ask("return x")
    chat.reset()
    assert chat.messages == []
    assert chat.ask("def ") == first


def test_a_saved_conversation_goes_on_where_it_stood(
    model: LanguageModel, text: Tokenizer, tmp_path: Path, says: Callable[[list[int]], None]
):
    chat = Chat(model, **DRAWN)
    chat.ask("żółw 🐢")
    chat.save(tmp_path / "chat.json")
    line = (tmp_path / "chat.json").read_text(encoding="utf-8")
    assert json.loads(line) == {"messages": chat.messages}
    assert line.count("\n") == 1
    again = Chat.load(tmp_path / "chat.json", model, **DRAWN)
    assert again.messages == chat.messages
    assert ids_of(again) == encode_conversation(text, chat.messages)[0][:-1]
    says(text.encode("go on"))
    assert again.ask("return") == "go on"
    assert len(again.messages) == len(chat.messages) + 2
    again.save(tmp_path / "chat.json")  # its own file may be replaced


def test_saving_replaces_no_file_that_is_no_conversation(model: LanguageModel, tmp_path: Path):
    for name, content in {"a.md": "# precious\n", "b.json": "[1]\n", "c": '{"messages": 3}\n'}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match="is no saved conversation"):
            Chat(model).save(tmp_path / name)
        assert (tmp_path / name).read_text() == content
    with pytest.raises(FileNotFoundError):
        Chat.load(tmp_path / "nothing.json", model)


def test_messages_of_other_makers_are_taken_and_a_users_last_word_is_not(model: LanguageModel):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert Chat(model, messages=turns).messages == [turns[0], {"role": "model", "content": "b"}]
    with pytest.raises(ValueError, match=r"message 1, the last, is of the role user"):
        Chat(model, messages=turns[:1])


def test_with_a_draft_the_greedy_conversation_is_the_same(model: LanguageModel, text: Tokenizer):
    hurried = LanguageModel(model.model, text, draft=model)
    chats = [Chat(one, max_tokens=12) for one in (model, hurried)]
    for turn in ("def ", "return x"):
        one, other = (chat.ask(turn) for chat in chats)
        assert one == other
    answer = chats[1].say("self")
    next(answer)
    answer.close()
    assert answer.completion.accepted == 1
    assert in_one(chats[1], text)
    assert ids_of(chats[1])[: len(ids_of(chats[0]))] == ids_of(chats[0])


def test_a_model_without_a_tokenizer_does_not_chat(model: LanguageModel):
    with pytest.raises(ValueError, match=r"has no tokenizer\.model"):
        Chat(LanguageModel(model.model, None))
