"""What every test gets: one seed, torch's settings put back, no network, and skips that say why.

Below: a small text, tokenizer, shards and model to train with, made once a session.
"""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:  # else not above: the shape checker must see the package's first import
    from gemwright.model.config import GemmaConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which is later
ASKED, THREADS = os.environ.get("GEMWRIGHT_COMPILE"), torch.get_num_threads()

settings.register_profile("house", deadline=None, derandomize=True)  # the same examples on a slow machine
settings.load_profile("house")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run eagerly what is not marked `compiled`, and skip what this machine cannot run."""
    from gemwright.device import can_compile

    eagerly(not item.get_closest_marker("compiled"))
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("compiled") and not can_compile():
        pytest.skip("needs what torch.compile needs: a compiler and Python's headers")


def eagerly(eager: bool) -> None:
    """One thread and nothing compiled, or all of both: at the size of a test, less is faster by far."""
    torch.set_num_threads(1 if eager else THREADS)
    value = "0" if eager else ASKED
    if os.environ.get("GEMWRIGHT_COMPILE") == value:
        return
    os.environ.pop("GEMWRIGHT_COMPILE", None)
    if value is not None:
        os.environ["GEMWRIGHT_COMPILE"] = value
    for module in ("device", "model.attention"):  # they remember what they were told
        for name in ("can_compile", "fused", "_flex_attention"):
            remembered = getattr(sys.modules.get(f"gemwright.{module}"), name, None)
            if hasattr(remembered, "cache_clear"):
                remembered.cache_clear()


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Every test starts from one seed, and leaves torch's number format and threads as they were."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def data() -> Path:
    """The folder with real data for tests, named by GEMWRIGHT_DATA."""
    folder = os.environ.get("GEMWRIGHT_DATA")
    if not folder:
        pytest.skip("needs real data: set GEMWRIGHT_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(
            f"GEMWRIGHT_DATA={folder} is no folder. Correct it, or unset it to skip the tests that need data."
        )
    return Path(folder)


def pseudo_code(seed: int, characters: int) -> str:
    """Invented functions, with lines as long as code's, and here and there something beyond ASCII."""
    draw = random.Random(seed)
    names = ["".join(draw.choices("abcdefghilmnoprstu", k=draw.randint(4, 9))) for _ in range(60)]
    text = f"# {seed}: żółw, 乌龟 🐢\n"
    while len(text) < characters:
        one, two, three, four = draw.sample(names, 4)
        text += f"def {one}({two}, {three}={draw.randint(0, 99)}):\n"
        text += f"    {four} = {two}.{draw.choice(names)}({three})\n"
        text += f"    if {four} is not {draw.choice(names)}:\n        return {one}({four}, {two})\n"
        text += f"    return {three}\n\n\n"
    return text


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 250 kB of pseudo-code in small files: enough that twenty questions a task can be asked."""
    root = tmp_path_factory.mktemp("text")
    for number in range(100):
        (root / f"{number}.py").write_text(pseudo_code(number, 2_400), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def tokenizer_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tokenizer with 700 pieces, trained on that text."""
    from gemwright.data.sources import Corpus
    from gemwright.tokenizer.tokenizer import Tokenizer
    from gemwright.tokenizer.train import TokenizerConfig, train

    texts = (document.text for document in Corpus.folder(text_folder).documents("train"))
    folder = tmp_path_factory.mktemp("runs") / "tokenizer"
    Tokenizer(train(texts, TokenizerConfig(vocab_size=700))).save(folder)
    return folder


@pytest.fixture(scope="session")
def shards_folder(text_folder: Path, tokenizer_folder: Path) -> Path:
    """That text, packed."""
    from gemwright.data.packing import ShardsConfig, run
    from gemwright.data.sources import Corpus

    folder = tokenizer_folder.parent / "shards"
    run(ShardsConfig(), folder, Corpus.folder(text_folder), tokenizer_folder)
    return folder


@pytest.fixture(scope="session")
def few_shards_folder(text_folder: Path, tokenizer_folder: Path) -> Path:
    """A fifth of it, packed: small enough to go through all of it."""
    from gemwright.data.packing import ShardsConfig, run
    from gemwright.data.sources import Corpus

    few = tokenizer_folder.parent / "few"
    few.mkdir()
    for path in sorted(text_folder.iterdir())[:20]:
        (few / path.name).write_bytes(path.read_bytes())
    run(ShardsConfig(), tokenizer_folder.parent / "few-shards", Corpus.folder(few), tokenizer_folder)
    return tokenizer_folder.parent / "few-shards"


@pytest.fixture(scope="session")
def tiny() -> "GemmaConfig":
    """A model for that tokenizer, whose window bites after 8 tokens."""
    from gemwright.model.config import GemmaConfig, alternating

    return GemmaConfig(
        d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16, pattern=alternating(2),
        vocab_size=700, query_pre_attn_scalar=16, window=8, max_seq_len=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def teacher_folder(tiny: "GemmaConfig", tokenizer_folder: Path) -> Path:
    """A wider model with that tokenizer and weights at random, large enough that it is sure of something."""
    from gemwright.model import checkpoint
    from gemwright.model.gemma import Gemma
    from gemwright.tokenizer.tokenizer import Tokenizer

    folder = tokenizer_folder.parent / "random-teacher"
    torch.manual_seed(2)
    checkpoint.save(Gemma(tiny.but(d_model=48, d_ff=96, final_softcap=20.0, init_std=0.4)), folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return folder
