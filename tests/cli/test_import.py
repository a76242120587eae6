"""`gemwright import google`: from a downloaded file to a folder that is used like every other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gemwright.model import checkpoint
from gemwright.model.config import size
from gemwright.model.gemma import Gemma


@pytest.fixture
def model() -> Gemma:
    """The smallest size that has a name, for the tests' tokenizer."""
    return Gemma(size("0.1m").but(vocab_size=704))


@pytest.fixture
def downloaded(model: Gemma, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """That model as Google would have published it: q, k and v fused, the embedding by another name."""
    theirs: dict[str, Tensor] = {"freqs_cis": torch.ones(8, 16, dtype=torch.complex64)}
    ours = model.state_dict()
    for name, tensor in ours.items():
        if name.endswith("q_proj.weight"):
            parts = [ours[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            theirs[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            theirs[name.replace("model.embed_tokens", "embedder")] = tensor
    folder = tmp_path / "downloaded"
    folder.mkdir()
    torch.save({"model_state_dict": theirs}, folder / "model.ckpt")
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    return folder / "model.ckpt"


def test_what_was_imported_is_the_model(
    gemwright: Callable[..., Any], downloaded: Path, model: Gemma, tmp_path: Path
):
    said = gemwright("import", "google", downloaded, "--out", tmp_path / "out", "--json")
    told = json.loads(said.out)
    assert told["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (told["out"], told["dtype"], told["layers"]) == (str(tmp_path / "out"), "float32", 2)
    assert f"Next: gemwright generate {tmp_path / 'out'}" in said.err
    ids = torch.arange(4, 90)[None]
    assert torch.equal(checkpoint.load(tmp_path / "out")(ids), model(ids))


def test_importing_again_does_nothing(gemwright: Callable[..., Any], downloaded: Path, tmp_path: Path):
    gemwright("import", "google", downloaded, "--out", tmp_path / "out")
    said = gemwright("import", "google", downloaded, "--out", tmp_path / "out")
    assert said.code == 0
    assert "is finished already" in said.err


def test_a_file_that_is_none_is_one_sentence(gemwright: Callable[..., Any], downloaded: Path, tmp_path: Path):
    downloaded.write_bytes(downloaded.read_bytes()[:1000])
    said = gemwright("import", "google", downloaded, "--out", tmp_path / "out")
    assert said.code == 2
    assert said.err.startswith(f"gemwright: error: {downloaded} is damaged")
    assert said.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
