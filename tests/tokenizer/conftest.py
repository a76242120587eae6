"""A small tokenizer trained here and, where GEMWRIGHT_DATA names the data, Gemma's own."""

import argparse
import inspect
import os
import textwrap
import typing
from pathlib import Path

import pytest

from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [inspect.getsource(module) for module in (argparse, inspect, textwrap, typing)]


@pytest.fixture(scope="session")
def small(texts: list[str]) -> Tokenizer:
    return Tokenizer(train(texts, TokenizerConfig(vocab_size=1200)))


@pytest.fixture(scope="session")
def data() -> Path:
    if not (folder := os.environ.get("GEMWRIGHT_DATA")):
        pytest.skip("GEMWRIGHT_DATA is not set: it names the folder that holds Gemma's own vocabulary")
    return Path(folder) / "tokenizer"


@pytest.fixture(scope="session")
def gemma(data: Path) -> Tokenizer:
    return Tokenizer.load(data / "gemma2.model")


@pytest.fixture(scope="session", params=["small", "gemma"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)
