"""`gemwright export gguf`: a file for llama.cpp, and what to do with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.interop
def test_export_tells_what_it_wrote_and_what_to_do_next(
    gemwright: Callable[..., Any], teacher_folder: Path, tmp_path: Path
):
    file = tmp_path / "teacher.gguf"
    said = gemwright("export", "gguf", teacher_folder, "--type", "q8_0", "--out", file, "--json")
    told = json.loads(said.out)
    assert told == {"out": str(file), "type": "q8_0", "bytes": file.stat().st_size, "tensors": 24}
    assert f"Next: llama-cli -m {file}" in said.err
    assert "11 of 24 tensors stay in f16" in said.err  # its rows are 48 long


def test_a_file_in_the_way_is_one_sentence(
    gemwright: Callable[..., Any], teacher_folder: Path, tmp_path: Path
):
    file = tmp_path / "teacher.gguf"
    file.touch()
    said = gemwright("export", "gguf", teacher_folder, "--out", file)
    assert said.code == 2
    assert said.err == (
        f"gemwright: error: {file} exists already. Choose another --out, or --fresh to move it aside.\n"
    )
    assert said.out == ""


def test_the_types_of_the_command_line_are_those_of_the_writer():
    from gemwright.cli.verbs.use import Stored
    from gemwright.export.gguf import TYPES

    assert [kind.value for kind in Stored] == list(TYPES)
