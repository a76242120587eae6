"""The door: `gemwright VERB`, verbs in pipeline order. What a verb needs is imported when it is called."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from gemwright.cli.verbs import measuring, posttraining, recipe, rewarding, text, training, use

VERBS = (
    "run",
    "plan",
    "curate",
    "tokenizer",
    "shards",
    "pretrain",
    "label",
    "targets",
    "distill",
    "prompts",
    "answer",
    "sft",
    "on-policy",
    "reward",
    "rlhf",
    "merge",
    "warp",
    "import",
    "evaluate",
    "generate",
    "chat",
    "export",
    "ablate",
)


class _Pipeline(TyperGroup):
    """Lists the verbs in pipeline order, groups of verbs among them. (The class of `ctx` is typer's own.)"""

    def list_commands(self, ctx: Any) -> list[str]:
        return [verb for verb in VERBS if verb in self.commands]

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; on Ctrl-C say what becomes of the work (typer alone would leave without a word)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print(
                "\ngemwright: interrupted. The same command goes on with a stage where it stopped.",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    name="gemwright",
    cls=_Pipeline,
    help="The Gemma 2 recipe as software: text and a teacher model go in, a small language model comes out."
    "\n\nStart with `gemwright run laptop`: in minutes, on a CPU, a student distilled from a teacher next to "
    "its twin trained from scratch. Every verb takes --json: one line of JSON, last on stdout; all else goes "
    "to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (recipe, text, training, posttraining, rewarding, measuring, use):
    group.add(app)


def main() -> None:
    """Run the command line.

    What a person can put right is one sentence on stderr and exit code 2, not a traceback.
    """
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        ours = type(error).__module__.split(".")[0] == "gemwright"
        if isinstance(error, RuntimeError) and not ours and type(error) is not RuntimeError:
            raise
        print(f"gemwright: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":  # for torchrun -m gemwright.cli.main
    main()
