"""Packing text into files of ids, and reading windows out of them."""

import argparse
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemwright.data import packing
from gemwright.data import shards as module
from gemwright.data.executor import ExecutorConfig
from gemwright.data.packing import ShardsConfig, run
from gemwright.data.shards import MANIFEST, Shards
from gemwright.data.sources import SPLITS, Corpus, Document, Split
from gemwright.run import read_card
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.tokenizer.train import TokenizerConfig, train

CONFIG = ShardsConfig(max_tokens_per_file=5_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Eighty small texts, with something beyond ASCII in each."""
    root, source = tmp_path_factory.mktemp("text"), inspect.getsource(argparse)
    for n in range(80):
        (root / f"{n}.txt").write_text(source[n * 1_000 : (n + 1) * 1_000] + "Fluß", encoding="utf-8")
    return Corpus.folder(root)


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [document.text for document in corpus.documents("train")]
    Tokenizer(train(texts, TokenizerConfig(vocab_size=700))).save(folder)
    return folder


@pytest.fixture(scope="module")
def packed(corpus: Corpus, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "shards"
    run(CONFIG, out, corpus, tokenizer)
    return out


@pytest.fixture
def in_parts(corpus: Corpus) -> Corpus:
    """The same text in eight parts."""
    return replace(corpus, part_characters=10_000)


@pytest.fixture
def parts_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of each part that this process reads."""
    read, part = [], Corpus.part

    def noted(self: Corpus, number: int) -> Iterator[tuple[Split, Document]]:
        read.append(number)
        return part(self, number)

    monkeypatch.setattr(Corpus, "part", noted)
    return read


@pytest.fixture
def damaged(corpus: Corpus, tokenizer: Path, tmp_path: Path) -> Path:
    """A folder of shards of one's own, to damage."""
    run(CONFIG, tmp_path / "shards", corpus, tokenizer)
    return tmp_path / "shards"


def all_ids(shards: Shards, split: Split) -> np.ndarray:
    return shards.read(split, 0, shards.manifest.splits[split].tokens)


def test_the_files_hold_each_document_between_bos_and_eos(
    packed: Path, corpus: Corpus, tokenizer: Path
) -> None:
    encoder = Tokenizer.load(tokenizer)
    for split in SPLITS:
        expected: list[int] = []
        for document in corpus.documents(split):
            expected += [2, *encoder.encode(document.text), 1]
        assert all_ids(Shards.open(packed), split).tolist() == expected


def test_the_manifest_counts_what_went_in(packed: Path, corpus: Corpus) -> None:
    manifest = Shards.open(packed).manifest
    texts = [document.text for document in corpus.documents("train")]
    (train,) = manifest.splits["train"].sources
    assert (train.name, train.documents, train.characters) == (corpus.name, len(texts), sum(map(len, texts)))
    assert train.bytes == sum(len(text.encode()) for text in texts) > train.characters
    assert train.tokens == manifest.splits["train"].tokens
    assert manifest.corpus == corpus.facts


def test_no_file_is_longer_than_allowed_and_only_the_last_is_shorter(packed: Path) -> None:
    files = Shards.open(packed).manifest.splits["train"].files
    assert len(files) > 3
    assert {file.tokens for file in files[:-1]} == {CONFIG.max_tokens_per_file}


def test_the_folder_holds_nothing_but_files_of_ids_manifest_and_card(packed: Path) -> None:
    names = {path.name for path in packed.iterdir()}
    files = {file.name for split in Shards.open(packed).manifest.splits.values() for file in split.files}
    assert names == files | {MANIFEST, "card.json", ".lock"}


def test_the_card_names_tokenizer_and_corpus(packed: Path, corpus: Corpus) -> None:
    inputs = read_card(packed).inputs
    assert "sha256" in inputs["tokenizer"]
    assert inputs["sha256"] == {"value": corpus.facts["sha256"]}


def test_how_documents_are_batched_for_the_tokenizer_changes_nothing(
    packed: Path, corpus: Corpus, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", 3_000)
    run(CONFIG, tmp_path / "shards", corpus, tokenizer)
    assert (tmp_path / "shards" / MANIFEST).read_bytes() == (packed / MANIFEST).read_bytes()


def test_a_large_vocabulary_takes_four_bytes_an_id(
    packed: Path, corpus: Corpus, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", property(lambda self: 65_537))
    run(CONFIG, tmp_path / "shards", corpus, tokenizer)
    wide = Shards.open(tmp_path / "shards")
    assert wide.manifest.dtype == "uint32"
    assert Shards.open(packed).manifest.dtype == "uint16"
    assert np.array_equal(all_ids(wide, "train"), all_ids(Shards.open(packed), "train"))


def same_but_for_the_card(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names - {"card.json"}
    )


def test_workers_side_by_side_leave_the_bytes_of_one_alone(
    packed: Path, in_parts: Corpus, tokenizer: Path, tmp_path: Path
) -> None:
    assert in_parts.parts > 5
    run(CONFIG, tmp_path / "shards", in_parts, tokenizer, executor=ExecutorConfig(workers=2))
    assert same_but_for_the_card(tmp_path / "shards", packed)


def test_killed_between_parts_it_goes_on_with_those_that_are_missing(
    packed: Path, in_parts: Corpus, tokenizer: Path, tmp_path: Path, parts_read: list[int]
) -> None:
    """The child stops in the middle of its third part and is killed there, so no kill comes too late."""
    out = tmp_path / "shards"
    script = (
        "import sys, time\nfrom dataclasses import replace\nfrom pathlib import Path\n"
        "from gemwright.data import packing\nfrom gemwright.data.executor import ExecutorConfig\n"
        "from gemwright.data.sources import Corpus\n"
        "encode, calls = packing.Tokenizer.encode_arrays, []\n"
        "def stall(self, *args, **options):\n"
        "    calls.append(args)\n"
        "    if len(calls) == 3:\n        print('stalled', flush=True); time.sleep(60)\n"
        "    return encode(self, *args, **options)\n"
        "packing.Tokenizer.encode_arrays = stall\n"
        "text = replace(Corpus.folder(Path(sys.argv[2])), part_characters=int(sys.argv[4]))\n"
        "config = packing.ShardsConfig(max_tokens_per_file=5_000)\n"
        "one = ExecutorConfig(workers=1)\n"
        "packing.run(config, Path(sys.argv[1]), text, Path(sys.argv[3]), executor=one)\n"
    )
    words = [out, in_parts.root, tokenizer, in_parts.part_characters]
    command = [sys.executable, "-c", script, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stalled\n"
        child.kill()
    with pytest.raises(ValueError, match="not finished"):
        Shards.open(out)
    run(CONFIG, out, in_parts, tokenizer, executor=ExecutorConfig(workers=1))
    assert parts_read == list(range(2, in_parts.parts))
    assert same_but_for_the_card(out, packed)


@pytest.fixture
def half_joined(in_parts: Corpus, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose run was interrupted when all was tokenised and the training split joined."""
    write = packing._write

    def interrupted(folder: Path, split: Split, *others: Any) -> Any:
        if split == "validation":
            raise KeyboardInterrupt
        return write(folder, split, *others)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, tmp_path / "shards", in_parts, tokenizer, executor=ExecutorConfig(workers=1))
    return tmp_path / "shards"


def test_interrupted_while_joining_it_tokenises_nothing_again(
    half_joined: Path, packed: Path, in_parts: Corpus, tokenizer: Path, parts_read: list[int]
) -> None:
    parts_read.clear()
    run(CONFIG, half_joined, in_parts, tokenizer)
    assert parts_read == []
    assert same_but_for_the_card(half_joined, packed)


def test_a_part_that_was_damaged_before_it_was_joined_is_named(
    half_joined: Path, in_parts: Corpus, tokenizer: Path
) -> None:
    raw = half_joined / "resume/parts/00003/0.bin"
    raw.write_bytes(raw.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(ValueError, match=r"00003/0.bin is damaged: .*--fresh"):
        run(CONFIG, half_joined, in_parts, tokenizer)


@dataclass(frozen=True)
class Shelf:
    """A text of some sources, a part a row."""

    rows: tuple[tuple[tuple[Split, str, str], ...], ...]
    name: str = "shelf"

    @property
    def facts(self) -> dict[str, str]:
        return {"sha256": str(hash(self.rows))}

    @property
    def parts(self) -> int:
        return len(self.rows)

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        for split, source, text in self.rows[number]:
            yield split, Document(text, text, source)


SHELF = Shelf(
    (
        (("train", "web", "one"), ("held_out", "code", "two"), ("train", "code", "three")),
        (),
        (("validation", "web", "four"), ("train", "web", "five"), ("train", "verse", "six")),
        (("held_out", "web", "seven"), ("train", "code", "eight")),
    )
)


@pytest.mark.parametrize("characters", [1, 2_000_000])
def test_a_split_holds_its_sources_one_after_another(
    tokenizer: Path, tmp_path: Path, characters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARACTERS", characters)
    run(ShardsConfig(), tmp_path / "shards", SHELF, tokenizer, executor=ExecutorConfig(workers=1))
    shards, encoder = Shards.open(tmp_path / "shards"), Tokenizer.load(tokenizer)
    texts = {split: encoder.decode(all_ids(shards, split).tolist(), control=True) for split in SPLITS}
    assert texts["train"].replace("<bos>", "") == "one<eos>five<eos>three<eos>eight<eos>six<eos>"
    assert texts["validation"] == "<bos>four<eos>"
    assert texts["held_out"].replace("<bos>", "") == "seven<eos>two<eos>"


def test_every_split_counts_every_source_and_what_is_not_there_is_nothing(
    tokenizer: Path, tmp_path: Path
) -> None:
    run(ShardsConfig(), tmp_path / "shards", SHELF, tokenizer, executor=ExecutorConfig(workers=1))
    splits, encoder = Shards.open(tmp_path / "shards").manifest.splits, Tokenizer.load(tokenizer)
    assert {tuple(source.name for source in splits[split].sources) for split in SPLITS} == {
        ("web", "code", "verse")
    }
    web, code, verse = splits["held_out"].sources
    assert (verse.documents, verse.characters, verse.bytes, verse.tokens) == (0, 0, 0, 0)
    assert (code.documents, code.characters, code.tokens) == (1, 3, len(encoder.encode("two")) + 2)
    assert web.tokens + code.tokens == splits["held_out"].tokens


def test_a_split_without_text_is_an_error(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shelf has no text for held_out and validation\. Add text"):
        run(ShardsConfig(), tmp_path / "shards", Shelf(((("train", "web", "one"),),)), tokenizer)


def test_a_worker_imports_no_torch() -> None:
    script = "import sys, gemwright.data.packing; print(sorted({'torch', 'datatrove'} & {*sys.modules}))"
    printed = subprocess.check_output([sys.executable, "-c", script], text=True)
    assert printed == "['datatrove']\n"


def test_a_finished_folder_is_left_alone(damaged: Path, corpus: Corpus, tokenizer: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in damaged.glob("*.bin")}
    time.sleep(0.01)
    run(CONFIG, damaged, corpus, tokenizer)
    assert {path.name: path.stat().st_mtime_ns for path in damaged.glob("*.bin")} == before


def test_another_tokenizer_is_refused_for_the_same_folder(
    damaged: Path, corpus: Corpus, tmp_path: Path
) -> None:
    texts = [document.text for document in corpus.documents("train")]
    Tokenizer(train(texts, TokenizerConfig(vocab_size=690))).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"input tokenizer.*--fresh"):
        run(CONFIG, damaged, corpus, tmp_path / "other")


def test_a_missing_file_is_named(damaged: Path) -> None:
    (damaged / "train-00001.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001.bin is gone. .*--fresh"):
        Shards.open(damaged)


def test_a_truncated_file_is_noticed_on_opening(damaged: Path) -> None:
    path = damaged / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"has 9,998 bytes, and the manifest says 10,000: it was cut short"):
        Shards.open(damaged)


def test_a_flipped_bit_is_found_by_verify(damaged: Path) -> None:
    Shards.open(damaged).verify()
    path = damaged / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[77] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001.bin is damaged"):
        Shards.open(damaged).verify()


def test_an_edited_manifest_is_refused(damaged: Path) -> None:
    path = damaged / MANIFEST
    data = json.loads(path.read_text())
    data["splits"]["train"]["files"].pop()
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="edited or damaged"):
        Shards.open(damaged)


def test_a_missing_manifest_is_named(damaged: Path) -> None:
    (damaged / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json is gone"):
        Shards.open(damaged)


def test_another_format_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 3)
    with pytest.raises(ValueError, match="has format 2, and this version reads 3"):
        Shards.open(damaged)


def test_a_folder_of_something_else_is_refused(tokenizer: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"card.json"):
        Shards.open(tokenizer)


def test_opening_maps_files_and_reads_none(packed: Path) -> None:
    shards = Shards.open(packed)
    assert shards._maps == {}
    shards.read("train", 4_990, 5_010)
    assert sorted(shards._maps) == ["train-00000.bin", "train-00001.bin"]
    assert all(isinstance(part, np.memmap) for part in shards._maps.values())


def test_a_read_crosses_files(packed: Path) -> None:
    shards = Shards.open(packed)
    whole = all_ids(shards, "train")
    for start, stop in [(0, 1), (4_999, 5_001), (5_000, 5_000), (5_000, 10_000), (4_000, 11_000)]:
        assert np.array_equal(shards.read("train", start, stop), whole[start:stop])
