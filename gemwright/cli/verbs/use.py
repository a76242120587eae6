"""`gemwright import`, `generate`, `chat`, `export`: use a model, here and elsewhere."""

import contextlib
import signal
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from gemwright.cli import options
from gemwright.cli.options import Fresh, Json, Out, tell

export = typer.Typer(
    help="Write a model in a format of other programs.", no_args_is_help=True, rich_markup_mode=None
)


importer = typer.Typer(
    help="Bring in a model in a format of others.", no_args_is_help=True, rich_markup_mode=None
)


class Stored(StrEnum):
    """How a GGUF file stores matrices."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    Q4_0 = "q4_0"


def generate(
    model: options.Model,
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most new tokens.")] = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="Tell each token's log-probability, and so many alternatives."),
    ] = None,
    as_turn: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn: answer it as a chat model does.")
    ] = False,
    draft: options.Draft = None,
    lookahead: options.Lookahead = 2,
    quantize: options.Quantize = None,
    window: options.Window = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts instead: .txt or .jsonl, one a line.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for what comes of them. An unfinished one there is gone on with."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Prompts of a file at a time.")] = 8,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Continue a text, or every prompt of a file.

    A text is printed as it comes, the prompt included. Of a file, OUT/generations.jsonl holds what came of
    each prompt; killed, the same command goes on where it stopped.

    Example: gemwright generate runs/laptop/distilled "def __init__(self" --max-tokens 40

    Example: gemwright generate runs/laptop/distilled --prompts prompts.txt --out out/generations
    """
    sampling: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed, "stop": stop or (), "logprobs": logprobs,
    }  # fmt: skip
    from gemwright.generate.sampling import Sampling

    how, held = Sampling.parse(sampling), quantize.value if quantize else None
    if prompts is not None and out is not None and prompt is None and draft is None:
        from gemwright.answer.prompts import PromptsConfig, run

        config = PromptsConfig(sampling=how, chat=as_turn, window=window, quantize=held)
        card = run(config, out, model, prompts, max_batch=max_batch, fresh=fresh)
        text = f"{out}: {card.results['prompts']:,} prompts, {card.results['tokens']:,} new tokens"
        return tell(as_json, {"out": str(out), "seconds": card.seconds, **card.results}, text)
    if prompt is None or prompts is not None or out is not None or fresh:
        raise ValueError(
            "give a PROMPT, or a file of them by --prompts FILE --out FOLDER (there --fresh is known, and no "
            "--draft: a batch has no use for one)."
        )
    from gemwright.answer.prompts import describe
    from gemwright.generate.language_model import load

    loaded = load(model, draft=draft, lookahead=lookahead, window=window, quantize=held)
    start = time.monotonic()
    stream = loaded.stream([{"role": "user", "content": prompt}] if as_turn else prompt, **sampling)
    # With --json stdout holds one line only, so people read along on stderr.
    screen = sys.stderr if as_json else sys.stdout
    print("" if as_turn else prompt, end="", file=screen, flush=True)
    for piece in stream:
        print(piece, end="", file=screen, flush=True)
    seconds = time.monotonic() - start
    print(file=screen)
    if as_json:
        done = stream.completion
        told = {"text": done.text, "tokens": len(done.tokens), "finish": done.finish}
        told |= {"tokens_per_s": round(len(done.tokens) / seconds, 1), "accepted": done.accepted}
        if logprobs is not None:
            told["logprobs"] = describe(done.tokens, loaded.require_tokenizer())
        tell(True, told, "")


def chat(
    model: options.Model,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Most tokens of an answer; 1024, or a quarter of a small context."),
    ] = None,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    draft: options.Draft = None,
    lookahead: options.Lookahead = 2,
    quantize: options.Quantize = None,
    window: options.Window = None,
    as_json: Json = False,
) -> None:
    """Talk with a chat model; answers are printed as they come.

    /reset forgets the conversation, /save FILE and /load FILE keep it, /quit or Ctrl-D leaves. Ctrl-C ends an
    answer, not the conversation. From a pipe, a line is a turn. With --json the conversation is the result.

    Example: gemwright chat google/gemma-2-2b-it --temperature 0.8
    """
    from gemwright.generate.language_model import Chat, load
    from gemwright.generate.sampling import Sampling

    sampling: dict[str, Any] = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    if max_tokens is not None:
        sampling["max_tokens"] = max_tokens
    Sampling.parse(sampling)  # refused before a model is fetched
    held = quantize.value if quantize else None
    loaded = load(model, draft=draft, lookahead=lookahead, window=window, quantize=held)
    messages = _Conversation(Chat(loaded, **sampling), sys.stderr if as_json else sys.stdout).run()
    if as_json:
        tell(True, {"messages": messages}, "")


_HELP = """\
/reset      forget the conversation
/save FILE  write it to a file, as one line of JSON
/load FILE  go on with one that was saved
/quit       leave, as Ctrl-D does
Ctrl-C ends an answer. A line that ends in \\ goes on in the next. A space before / makes it a turn.\
"""


class _Conversation:
    """A chat with who sits at stdin: a person at a terminal, or a pipe with a turn a line."""

    def __init__(self, chat: Any, screen: TextIO) -> None:
        self.chat = chat
        self.screen = screen
        self.person = sys.stdin.isatty()

    def run(self) -> list[dict[str, str]]:
        """Turn by turn, until stdin ends or /quit; returns the conversation."""
        from gemwright.generate.engine import OutOfMemory
        from gemwright.run import say

        if self.person:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - lines can be edited, and earlier ones called back
            say("/help lists the commands, Ctrl-D leaves")
        leaving = False
        while True:
            try:
                line = self._line()
                leaving = False
                if line.strip() == "/quit":
                    return self.chat.messages
                if line.startswith("/"):
                    say(self._obey(*line[1:].split(maxsplit=1)))
                elif line.strip():
                    self._answer(line.strip())
            except EOFError:
                return self.chat.messages
            except KeyboardInterrupt:
                if not self.person:
                    raise
                if leaving:
                    return self.chat.messages
                leaving = True
                print(file=sys.stderr)
                say("Ctrl-C once more leaves, as Ctrl-D and /quit do")
            except (ValueError, OSError, OutOfMemory) as error:
                if not self.person:
                    raise
                say(f"error: {error}")

    def _line(self) -> str:
        line = self._read("> ")
        while self.person and line.endswith("\\"):
            line = line[:-1] + "\n" + self._read(". ")
        return line

    def _read(self, prompt: str) -> str:
        if self.person and not sys.stdout.isatty():  # there, input() would write it among the answers
            print(prompt, end="", file=sys.stderr, flush=True)
        return input(prompt if self.person and sys.stdout.isatty() else "")

    def _obey(self, name: str = "", argument: str = "") -> str:
        """Carry out a command; returns what to tell."""
        match name, argument.strip():
            case "help", "":
                return f"commands\n{_HELP}"
            case "reset", "":
                self.chat.reset()
                return "the conversation is forgotten"
            case "save", file if file:
                self.chat.save(Path(file).expanduser())
                return f"saved to {file}"
            case "load", file if file:
                how = self.chat.sampling.to_dict()
                self.chat = type(self.chat).load(Path(file).expanduser(), self.chat.model, **how)
                return f"{len(self.chat.messages)} messages, the last: {self.chat.messages[-1]['content']!r}"
        raise ValueError(
            f"there is no command {f'/{name} {argument}'.strip()!r}; /help lists them. A space before it "
            "makes it a turn."
        )

    def _answer(self, turn: str) -> None:
        answer = self.chat.say(turn)

        def interrupt(*_: Any) -> None:
            answer.cancel()  # after the token: the cache stays whole, and nothing is read again
            signal.signal(signal.SIGINT, signal.default_int_handler)  # who cannot wait asks twice

        before = signal.signal(signal.SIGINT, interrupt) if self.person else None
        try:
            for piece in answer:
                print(piece, end="", file=self.screen, flush=True)
        finally:
            if self.person:
                signal.signal(signal.SIGINT, before)
        print(file=self.screen, flush=True)


@export.command("gguf")
def export_gguf(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    type: Annotated[
        Stored,
        typer.Option("--type", help="How matrices are stored; q8_0 takes 8.5 bits a weight, q4_0 4.5."),
    ] = Stored.Q8_0,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Write model, tokenizer and chat template as one GGUF file, for llama.cpp and what is built on it.

    Example: gemwright export gguf runs/laptop/distilled --type q8_0 --out distilled.gguf
    """
    from gemwright.export.gguf import write_gguf
    from gemwright.hub import fetch
    from gemwright.run import say

    written = write_gguf(fetch(model), out, type.value, fresh=fresh)
    if written.unquantised:
        say(
            f"{len(written.unquantised)} of {written.tensors} tensors stay in f16: their rows do not divide "
            f"into groups of 32 ({', '.join(written.unquantised[:3])} ...)"
        )
    tell(
        as_json,
        {"out": str(out), "type": type.value, "bytes": written.bytes, "tensors": written.tensors},
        f"{out}: {type.value}, {written.bytes / 1e6:,.1f} MB, {written.tensors} tensors",
    )
    say(f"export: {out} finished. Next: llama-cli -m {out}")


@importer.command("google")
def import_google(
    file: Annotated[
        Path, typer.Argument(help="A .ckpt file of gemma_pytorch, or the folder of a sharded one (27B).")
    ],
    out: Out,
    tokenizer: Annotated[
        Path | None,
        typer.Option("--tokenizer", help="The tokenizer.model that belongs to it; else the one beside it."),
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Turn a PyTorch checkpoint of Google's (Gemma 2, not quantised) into a folder like every other here.

    The size is told by the shapes. The file is read as tensors alone: a pickle that holds code is refused.

    Example: gemwright import google gemma-2-2b-it/model.ckpt --out runs/gemma-2-2b-it
    """
    from gemwright.export.google import run as stage

    card = stage(file, out, tokenizer, fresh=fresh)
    result = card.results
    text = (
        f"{out}: {result['parameters']:,} parameters in {result['dtype']}, {result['layers']} layers of "
        f"width {result['d_model']}"
    )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **result}, text)


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.add_typer(importer, name="import")
    app.command()(generate)
    app.command()(chat)
    app.add_typer(export, name="export")
