"""What documents and help texts show can be given: verbs and options exist, and Python runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gemwright.cli import reference
from gemwright.cli.main import app
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

HOUSE = Path(__file__).parent.parent
PAGES = [HOUSE / "README.md", *sorted((HOUSE / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The `gemwright ...` lines of a page's shell blocks, without their prompts."""
    lines = [
        line.strip().removeprefix("$ ")
        for language, block in FENCE.findall(text)
        if language in ("", "bash", "sh", "shell", "console")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if re.match(r"gemwright\s", line)]


def parse(line: str) -> None:
    """Parse a command as the command line would, and run nothing. Raises what the command line would say."""
    tokens = list(shlex.shlex(line, posix=True, punctuation_chars="|&;<>"))
    words = shlex.split(line, comments=True)
    stop = next((token for token in tokens if token in ("|", "&&", "||", ";", ">", ">>", "<")), None)
    if stop in words:
        words = words[: words.index(stop)]
    command: Any = get_command(app)
    name, *words = words
    while words and hasattr(command, "commands") and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    if set(words) & {"--help", "-h"}:
        words = []
    elif hasattr(command, "commands"):
        pytest.fail(f"{line!r} names no verb")
    else:
        command.make_context(name, words)


SHOWN = [
    pytest.param(line, id=f"{page.relative_to(HOUSE)}: {line}")
    for page in PAGES
    for line in commands(page.read_text(encoding="utf-8"))
]
EXAMPLES = [
    line
    for _, text in reference.helps()
    for line in re.findall(r"Example: (gemwright .*?)(?:\n\n|$)", text, re.DOTALL)
]


@pytest.mark.parametrize("line", SHOWN)
def test_a_command_shown_in_the_documents_exists(line: str):
    parse(line)


@pytest.mark.parametrize("line", [" ".join(line.split()) for line in EXAMPLES])
def test_an_example_of_the_help_is_a_command(line: str):
    parse(line)


def test_every_verb_has_an_example_that_was_checked():
    assert len(EXAMPLES) >= 6


def test_commands_are_found_in_shell_blocks_alone():
    page = (
        "```bash\n$ gemwright run laptop   # minutes\npip install x\n```\n```python\ngemwright shards\n```\n"
        "```\ngemwright shards text \\\n    --out a\n```\n"
    )
    assert [shlex.split(line, comments=True) for line in commands(page)] == [
        ["gemwright", "run", "laptop"],
        ["gemwright", "shards", "text", "--out", "a"],
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/use-it.md", "docs/6-generate.md"])
def test_the_python_that_a_page_shows_runs(
    page: str, tiny: GemmaConfig, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From top to bottom, where tiny models lie in the folders that it names."""
    blocks = [block for language, block in FENCE.findall((HOUSE / page).read_text()) if language == "python"]
    assert blocks
    named = {*re.findall(r'(?:load\(|draft=)"([^"]+)"', "".join(blocks))} - {"sky.json"}
    for folder in named:
        checkpoint.save(Gemma(tiny.but(max_seq_len=512)), tmp_path / folder)
        Tokenizer.load(tokenizer_folder).save(tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(
    "line",
    [
        "gemwright",
        "gemwright ruun laptop",
        "gemwright run desktop",
        "gemwright tokenizer train text",
        "gemwright tokenizer learn text --out a",
        "gemwright pretrain --shards a --out b --stepps 3",
        "gemwright pretrain --shards a --out b --steps many",
    ],
)
def test_a_command_that_does_not_exist_would_be_noticed(line: str):
    with pytest.raises(BaseException, match=r".") as caught:
        parse(line)
    assert not isinstance(caught.value, SystemExit)


@pytest.mark.parametrize(
    "line", ["gemwright --help", "gemwright distill --help", 'gemwright generate a "b" --json | tail -1']
)
def test_help_and_pipes_are_understood(line: str):
    parse(line)
