"""Help: quick, in pipeline order, with an example a verb; and the page that is made from it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gemwright.cli import reference
from gemwright.cli.main import VERBS, app

HELPS = dict(reference.helps())
LEAVES = [name for name, text in HELPS.items() if "\nCommands:" not in text]
VERB_FILES = ("measuring", "posttraining", "recipe", "rewarding", "text", "training", "use")
CLI = ("main", "options", "verbs", *(f"verbs.{name}" for name in VERB_FILES))
HEAVY = ("torch", "transformers", "numpy", "sentencepiece", "safetensors", "matplotlib", "pydantic", "rich")


def test_help_needs_nothing_heavy():
    """Torch alone takes seconds; `gemwright --help` should take a fraction of one."""
    script = (
        "import json, sys\nfrom gemwright.cli.main import main\nsys.argv = ['gemwright', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    code, modules = json.loads(done.stderr)
    assert code == 0
    assert done.stdout.startswith("Usage: gemwright ")
    assert not set(HEAVY) & set(modules)
    assert {name for name in modules if name.startswith("gemwright")} == {
        "gemwright",
        "gemwright.cli",
        *(f"gemwright.cli.{name}" for name in CLI),
    }


def test_verbs_are_listed_in_pipeline_order():
    told = HELPS["gemwright"].partition("Commands:")[2]
    listed = [line.split()[0] for line in told.splitlines() if line.startswith("  ") and line[2] != " "]
    pipeline = [
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
    ]
    pipeline += [
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
    ]
    assert listed == list(VERBS) == pipeline


@pytest.mark.parametrize("name", LEAVES)
def test_every_verb_shows_an_example_of_itself(name: str):
    assert f"Example: {name} " in " ".join(HELPS[name].split())


@pytest.mark.parametrize("name", LEAVES)
def test_every_verb_takes_json(name: str):
    assert "\n  --json " in HELPS[name]


def test_every_option_and_argument_says_what_it_is():
    def parameters(command: Any) -> Iterator[Any]:
        yield from command.params
        for below in getattr(command, "commands", {}).values():
            yield from parameters(below)

    said = {parameter.name: parameter.help for parameter in parameters(get_command(app))}
    assert {"shards", "out", "prompt"} <= set(said)
    assert not [name for name, help in said.items() if not help]


def test_the_page_of_the_command_line_is_what_the_help_says():
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "write it anew with `make docs`"


def test_the_page_has_a_section_for_every_command_in_order():
    titles = [line[3:] for line in reference.page().splitlines() if line.startswith("## ")]
    assert titles == list(HELPS)
    assert titles[:4] == ["gemwright", "gemwright run", "gemwright plan", "gemwright curate"]


def test_the_page_is_the_same_on_every_terminal(monkeypatch: pytest.MonkeyPatch):
    before = reference.page()
    for name, value in {
        "COLUMNS": "40",
        "TERM": "xterm-256color",
        "FORCE_COLOR": "1",
        "NO_COLOR": "",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((40, 10)))
    assert reference.page() == before
    assert max(map(len, before.splitlines())) <= reference.WIDTH


def test_a_page_that_drifted_is_refused_and_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "cli.md")
    monkeypatch.setattr(sys, "argv", ["reference", "--check"])
    for text in (None, reference.page().replace("--seed", "--sed")):
        if text is not None:
            reference.PAGE.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"is not what the help texts say. Write it anew"):
            reference.main()
    monkeypatch.setattr(sys, "argv", ["reference"])
    reference.main()
    monkeypatch.setattr(sys, "argv", ["reference", "--check"])
    reference.main()
