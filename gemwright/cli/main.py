"""The door: `gemwright VERB`, verbs in pipeline order. What a verb needs is imported when it is called."""

import sys

import click
import typer
from typer.core import TyperGroup

from gemwright.cli import recipe, text, training, use

VERBS = ("run", "tokenizer", "shards", "pretrain", "distill", "generate")


class _Pipeline(TyperGroup):
    """Lists the verbs in pipeline order, groups of verbs among them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [verb for verb in VERBS if verb in self.commands]


app = typer.Typer(
    name="gemwright",
    cls=_Pipeline,
    help="The Gemma 2 recipe as software: text and a teacher model go in, a small language model comes out.\n\n"
    "Start with `gemwright run laptop`: in minutes, on a CPU, a student distilled from a teacher next to its twin "
    "trained from scratch. Every verb takes --json: one line of JSON, last on stdout; all else goes to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (recipe, text, training, use):
    group.add(app)


def main() -> None:
    """Run the command line. What a person can put right is one sentence on stderr and exit code 2, not a traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if (
            isinstance(error, RuntimeError)
            and type(error).__module__.split(".")[0] != "gemwright"
            and type(error) is not RuntimeError
        ):
            raise
        print(f"gemwright: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(
            "\ngemwright: interrupted. Nothing is lost: the same command goes on where this stopped.",
            file=sys.stderr,
        )
        sys.exit(130)
