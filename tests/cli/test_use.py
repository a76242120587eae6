"""`gemwright generate` and `gemwright chat`, as a person and as a program would use them."""

import inspect
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gemwright.cli.verbs import use
from gemwright.generate.language_model import Chat, load
from gemwright.generate.sampling import Sampling
from gemwright.generate.speculative import LOOKAHEAD

TURNS = "def \nreturn x\n"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put lines into stdin, as a pipe would."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture
def said(gemwright: Callable[..., Any], teacher_folder: Path, typed: Callable[[str], None]) -> Any:
    def chat(text: str, *options: object) -> Any:
        typed(text)
        return gemwright("chat", teacher_folder, "--max-tokens", 6, *options)

    return chat


def conversation(folder: Path, *turns: str, **sampling: Any) -> list[dict[str, str]]:
    chat = Chat(load(folder), **{"max_tokens": 6, **sampling})
    for turn in turns:
        chat.ask(turn)
    return chat.messages


@pytest.mark.parametrize("verb", [use.generate, use.chat])
def test_the_defaults_of_the_options_are_those_of_sampling(verb: Callable[..., None]):
    fields = Sampling.model_fields
    parameters = inspect.signature(verb).parameters
    same = {name: parameters[name].default for name in parameters if name in fields}
    same = {name: () if name == "stop" else value for name, value in same.items()}
    if verb is use.chat:
        del same["max_tokens"]
    assert len(same) >= 6
    assert same == {name: fields[name].default for name in same}
    assert parameters["lookahead"].default == LOOKAHEAD


def test_generate_takes_every_setting_of_sampling(gemwright: Callable[..., Any], teacher_folder: Path):
    """Options may stand before the model and the prompt."""
    options = ["--max-tokens", 9, "--temperature", 0.9, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01]
    options += ["--repetition-penalty", 1.2, "--seed", 4, "--json"]
    said = gemwright("generate", *options, teacher_folder, "def ", "--stop", "zz", "--logprobs", 1)
    told = json.loads(said.out)
    done = load(teacher_folder).complete(
        "def ", max_tokens=9, temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2,
        seed=4, stop=["zz"], logprobs=1,
    )  # fmt: skip
    assert (told["text"], told["finish"], told["tokens"]) == (done.text, done.finish, len(done.tokens))
    assert [one["logprob"] for one in told["logprobs"]] == [token.logprob for token in done.tokens]
    assert set(told) == {"text", "tokens", "finish", "tokens_per_s", "accepted", "logprobs"}


def test_generate_says_how_often_a_draft_was_right(gemwright: Callable[..., Any], teacher_folder: Path):
    plain = gemwright("generate", teacher_folder, "def ", "--max-tokens", 12, "--json")
    hurried = gemwright(
        "generate", "--draft", teacher_folder, "--lookahead", 3, teacher_folder, "def ",
        "--max-tokens", 12, "--json",
    )  # fmt: skip
    told = json.loads(hurried.out)
    assert told["text"] == json.loads(plain.out)["text"]
    assert (told["accepted"], json.loads(plain.out)["accepted"]) == (1.0, None)


def test_generate_answers_a_turn_and_does_not_repeat_it(gemwright: Callable[..., Any], teacher_folder: Path):
    said = gemwright("generate", teacher_folder, "--chat", "def ", "--max-tokens", 6, "--window", 5)
    model = load(teacher_folder, window=5)
    assert said.out == model.generate([{"role": "user", "content": "def "}], max_tokens=6) + "\n"


def test_a_file_of_prompts_goes_to_a_folder(
    gemwright: Callable[..., Any], teacher_folder: Path, tmp_path: Path
):
    (tmp_path / "p.txt").write_text("def \nreturn x\n")
    line = ("generate", teacher_folder, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out")
    said = gemwright(*line, "--max-tokens", 3, "--max-batch", 2, "--json")
    told = json.loads(said.out)
    assert (told["out"], told["prompts"]) == (str(tmp_path / "out"), 2)
    assert said.out.count("\n") == 1
    assert len((tmp_path / "out/generations.jsonl").read_text().splitlines()) == 2
    again = gemwright(*line, "--max-tokens", 3)
    assert again.out == f"{tmp_path / 'out'}: 2 prompts, {told['tokens']} new tokens\n"
    assert "is finished already" in again.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "give a PROMPT, or a file of them"),
        ("x --prompts FILE --out OUT", "give a PROMPT, or a file of them"),
        ("--prompts FILE", "give a PROMPT, or a file of them"),
        ("x --out OUT", "give a PROMPT, or a file of them"),
        ("x --fresh", "give a PROMPT, or a file of them"),
        ("--prompts FILE --out OUT --draft MODEL", "no --draft"),
        ("x --top-p 1.5", "Sampling: top_p"),
        ("x --window 0", "window"),
        ("x --draft OUT", "there is no folder"),
        ("--prompts OUT/nothing.txt --out OUT/a", "there is no file"),
    ],
)
def test_a_mistake_with_generate_is_one_sentence(
    gemwright: Callable[..., Any], teacher_folder: Path, tmp_path: Path, arguments: str, told: str
):
    (tmp_path / "p.txt").write_text("def \n")
    names = {"FILE": tmp_path / "p.txt", "OUT": tmp_path / "out", "MODEL": teacher_folder}
    for name, path in names.items():
        arguments = arguments.replace(name, str(path))
    said = gemwright("generate", teacher_folder, *arguments.split(), "--json")
    assert (said.code, said.out) == (2, "")
    assert told in said.err
    assert said.err.startswith("gemwright: error: ")
    assert said.err.count("\n") == 1


def test_a_chat_from_a_pipe_writes_answers_and_nothing_else(said: Callable[..., Any], teacher_folder: Path):
    told = said(TURNS)
    answers = [m["content"] for m in conversation(teacher_folder, "def ".strip(), "return x")[1::2]]
    assert (told.code, told.err) == (0, "")
    assert told.out == "".join(answer + "\n" for answer in answers)


def test_a_chat_with_json_ends_with_the_conversation_in_one_line(
    said: Callable[..., Any], teacher_folder: Path
):
    told = said(TURNS, "--temperature", 1, "--seed", 5, "--json")
    messages = conversation(teacher_folder, "def", "return x", temperature=1.0, seed=5)
    assert told.out.count("\n") == 1
    assert json.loads(told.out) == {"messages": messages}
    assert told.err == "".join(message["content"] + "\n" for message in messages[1::2])


def test_reset_forgets_and_quit_leaves(said: Callable[..., Any], teacher_folder: Path):
    told = said("def\n/reset\n\nreturn x\n/quit\nself\n", "--json")
    assert json.loads(told.out) == {"messages": conversation(teacher_folder, "return x")}
    assert "the conversation is forgotten" in told.err


def test_a_conversation_is_saved_and_loaded(said: Callable[..., Any], teacher_folder: Path, tmp_path: Path):
    file = tmp_path / "my chat.json"
    messages = conversation(teacher_folder, "def")
    assert f"saved to {file}" in said(f"def\n/save {file}\n").err
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": messages}
    told = said(f"/load {file}\nreturn x\n", "--json")
    assert json.loads(told.out)["messages"][:3] == [*messages, {"role": "user", "content": "return x"}]


def test_what_begins_with_a_slash_is_not_sent_unless_a_space_stands_before_it(said: Callable[..., Any]):
    told = said("/rest\n", "--json")
    assert (told.code, told.out) == (2, "")
    assert "there is no command '/rest'; /help lists them" in told.err
    told = said(" /rest\n", "--json")
    assert json.loads(told.out)["messages"][0] == {"role": "user", "content": "/rest"}
    assert "/save FILE" in said("/help\n").err


def test_a_full_context_ends_a_chat_from_a_pipe_with_a_sentence(said: Callable[..., Any]):
    told = said("def\n" + "x y z " * 40 + "\n")
    assert told.code == 2
    assert told.out.count("\n") >= 1
    assert "no room for an answer in the context of 64. Begin anew" in told.err


def test_a_chat_takes_draft_int8_and_window(said: Callable[..., Any], teacher_folder: Path):
    plain, hurried = said(TURNS).out, said(TURNS, "--draft", teacher_folder).out
    assert plain == hurried
    assert said(TURNS, "--quantize", "int8", "--window", 5).code == 0


class Terminal:
    """A person's `gemwright chat` in a real terminal."""

    def __init__(self, *arguments: object) -> None:
        self.side, theirs = pty.openpty()
        command = [sys.executable, "-m", "gemwright.cli.main", "chat", *map(str, arguments)]
        environment = os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)
        self.seen = ""

    def until(self, end: str, seconds: float = 60) -> str:
        """What appears up to `end`, beginning behind what was waited for last."""
        deadline = time.monotonic() + seconds
        while end not in self.seen:
            ready, _, _ = select.select([self.side], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{end!r} did not appear in {self.seen!r}"
            self.seen += os.read(self.side, 4096).decode(errors="replace")
        told, _, self.seen = self.seen.partition(end)
        return told

    def write(self, text: str) -> None:
        os.write(self.side, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(teacher_folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    """With a model whose answers are long enough to be interrupted."""
    config = json.loads((teacher_folder / "config.json").read_text())
    folder = tmp_path / "long"
    folder.mkdir()
    for path in teacher_folder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    opened = Terminal(folder, "--temperature", 1, "--max-tokens", 50_000)
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.side)


@pytest.mark.slow
def test_ctrl_c_ends_an_answer_and_keeps_the_conversation_and_twice_at_the_prompt_leaves(
    terminal: Terminal, tmp_path: Path
):
    terminal.until("> ")
    terminal.write("def \n")
    terminal.until("def \r\n")
    time.sleep(1)
    assert terminal.process.poll() is None
    terminal.interrupt()
    terminal.until("\n> ")
    file = tmp_path / "chat.json"
    terminal.write(f"/save {file}\n")
    terminal.until("saved to")
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["user", "model"]
    assert messages[0]["content"] == "def"
    assert len(messages[1]["content"]) > 10
    for told in (str(file), "Ctrl-C once more leaves"):
        terminal.until(told)
        terminal.until("> ")
        time.sleep(0.5)  # Python's readline notices a signal once it waits for keys
        terminal.interrupt()
    assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_a_mistake_in_a_terminal_is_told_and_the_chat_goes_on(terminal: Terminal):
    terminal.until("> ")
    terminal.write("/rest\n")
    terminal.until("error: there is no command '/rest'")
    terminal.until("> ")
    terminal.write("\x04")
    assert terminal.process.wait(20) == 0


@pytest.mark.slow
def test_ctrl_c_ends_a_chat_from_a_pipe(teacher_folder: Path):
    command = [sys.executable, "-m", "gemwright.cli.main", "chat", str(teacher_folder), "--max-tokens", "3"]
    chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"def\n")
    chat.stdin.flush()
    chat.stdout.read(1)
    time.sleep(0.5)  # it has answered and waits for the next line
    chat.send_signal(signal.SIGINT)
    _, told = chat.communicate(timeout=20)
    assert chat.returncode == 130
    assert b"Traceback" not in told
