"""The page of the command line: docs/cli.md, written from the help texts and checked against them.

python -m gemwright.cli.reference            writes it
python -m gemwright.cli.reference --check    exits 1 if it is not what the help texts say
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from gemwright.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
WIDTH = 88
"""Characters a line, whatever the terminal."""

_HEAD = """# The command line

Made by `make docs` from the help texts; do not edit.
`gemwright VERB --help` prints the same.
"""


def page() -> str:
    """The whole page: a section for the command itself, for each verb, and for each verb below a verb."""
    sections = (f"\n## {title}\n\n```text\n{text}\n```\n" for title, text in helps())
    return _HEAD + "".join(sections)


def helps() -> Iterator[tuple[str, str]]:
    """Every command's name and help text, in the order in which `--help` lists them."""
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup | TyperCommand)
    yield from _helps(command, "gemwright", None)


def _helps(
    command: TyperGroup | TyperCommand, name: str, parent: typer.Context | None
) -> Iterator[tuple[str, str]]:
    settings = {"terminal_width": WIDTH, "color": False, **command.context_settings}
    context = typer.Context(command, info_name=name, parent=parent, **settings)
    yield context.command_path, command.get_help(context).strip()
    if isinstance(command, TyperGroup):
        for below in command.list_commands(context):
            yield from _helps(command.commands[below], below, context)  # pyright: ignore[reportArgumentType]


def main() -> None:
    """Write the page, or with --check compare it."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit(f"{PAGE} is not what the help texts say. Write it anew with `make docs`.")


if __name__ == "__main__":
    main()
