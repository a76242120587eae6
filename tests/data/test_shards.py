"""Packing text into files of ids, and reading windows out of them."""

import argparse
import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from gemwright.data import shards as module
from gemwright.data.shards import MANIFEST, Shards, ShardsConfig, Windows, run, target_weights
from gemwright.data.sources import SPLITS, Corpus
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
def damaged(corpus: Corpus, tokenizer: Path, tmp_path: Path) -> Path:
    """A folder of shards of one's own, to damage."""
    run(CONFIG, tmp_path / "shards", corpus, tokenizer)
    return tmp_path / "shards"


def all_ids(shards: Shards, split: module.Split) -> torch.Tensor:
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
    train = manifest.splits["train"]
    assert (train.documents, train.characters) == (len(texts), sum(map(len, texts)))
    assert train.bytes == sum(len(text.encode()) for text in texts) > train.characters
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
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 3_000)
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
    assert torch.equal(all_ids(wide, "train"), all_ids(Shards.open(packed), "train"))


def test_killed_while_packing_and_started_again_gives_the_same_bytes(
    packed: Path, corpus: Corpus, tokenizer: Path, tmp_path: Path
) -> None:
    """The child stops in the middle of its third file and is killed there, so no kill comes too late."""
    out = tmp_path / "shards"
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom gemwright.data import shards\n"
        "from gemwright.data.sources import Corpus\n"
        "shards._BATCH_CHARACTERS = 3_000\nencode = shards.Tokenizer.encode_batch\n"
        "def stall(self, *args, **options):\n"
        "    if len(list(out.glob('*.bin'))) == 2:\n        print('stalled', flush=True); time.sleep(60)\n"
        "    return encode(self, *args, **options)\n"
        "shards.Tokenizer.encode_batch = stall\nout = Path(sys.argv[1])\n"
        "config = shards.ShardsConfig(max_tokens_per_file=5_000)\n"
        "shards.run(config, out, Corpus.folder(Path(sys.argv[2])), Path(sys.argv[3]))\n"
    )
    command = [sys.executable, "-c", script, str(out), str(corpus.root), str(tokenizer)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "stalled\n"
        child.send_signal(signal.SIGKILL)
    assert list(out.glob(".*.partial-*")), "the kill was to leave a torn file behind"
    with pytest.raises(ValueError, match="not finished"):
        Shards.open(out)
    run(CONFIG, out, corpus, tokenizer)
    for path in packed.iterdir():
        if path.name != "card.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in packed.iterdir()}


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


def test_a_newer_format_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, and this version reads 2"):
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
        assert torch.equal(shards.read("train", start, stop), whole[start:stop])


def test_windows_cover_the_text_in_order(packed: Path) -> None:
    shards = Shards.open(packed)
    rows = torch.cat(list(Windows(shards, "train", 64).all(batch_size=7)))
    whole = all_ids(shards, "train")
    assert rows.dtype == torch.int64
    assert torch.equal(rows[:, :-1].flatten(), whole[: len(rows) * 64])
    assert torch.equal(rows[:, 1:].flatten(), whole[1 : len(rows) * 64 + 1])
    assert 0 <= len(whole) - 1 - len(rows) * 64 < 64


def epoch_of(windows: Windows, epoch: int) -> list[tuple[int, ...]]:
    size = len(windows)
    return [tuple(windows.batch(place, 1)[0].tolist()) for place in range(epoch * size, (epoch + 1) * size)]


def test_each_epoch_is_a_new_permutation_of_every_window(packed: Path) -> None:
    windows = Windows(Shards.open(packed), "held_out", 32, seed=3)
    in_order = [tuple(row.tolist()) for row in torch.cat(list(windows.all(8)))]
    first, second = epoch_of(windows, 0), epoch_of(windows, 1)
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != second
    assert first != in_order


def test_the_batch_size_cuts_one_and_the_same_sequence(packed: Path) -> None:
    """So batches cross epochs without dropping a window, and a run resumes from a step alone."""
    windows = Windows(Shards.open(packed), "held_out", 32, seed=3)
    steps = 3 * len(windows) // 70
    long = torch.cat([windows.batch(step, 70) for step in range(steps)])
    assert len(long) > 2 * len(windows)
    assert torch.equal(long, torch.cat([windows.batch(step, 10) for step in range(7 * steps)]))


def test_a_resumed_run_sees_the_batches_of_an_uninterrupted_one(packed: Path) -> None:
    uninterrupted = Windows(Shards.open(packed), "train", 64, seed=5)
    seen = [uninterrupted.batch(step, 8) for step in range(20)]
    resumed = Windows(Shards.open(packed), "train", 64, seed=5)
    assert all(torch.equal(resumed.batch(step, 8), seen[step]) for step in range(12, 20))


def test_another_seed_is_another_order(packed: Path) -> None:
    first, second = (Windows(Shards.open(packed), "train", 64, seed=seed) for seed in (0, 1))
    assert not torch.equal(first.batch(0, 16), second.batch(0, 16))


def test_the_order_is_pinned() -> None:
    """An order that changes with a release would break every resumed run."""
    index = np.arange(12, dtype=np.uint64)
    assert module._permuted(index, 12, module._key(7, np.zeros_like(index))).tolist() == PINNED


PINNED = [9, 4, 7, 0, 5, 8, 10, 2, 1, 3, 11, 6]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 64, 1_000])
def test_the_keyed_order_is_a_permutation_of_any_size(size: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    for seed in range(5):
        order = module._permuted(index, size, module._key(seed, np.zeros_like(index)))
        assert sorted(order.tolist()) == list(range(size))


def test_every_window_comes_equally_often_in_every_place() -> None:
    """Ten windows over 20,000 epochs; a fair order gives 2,000 each, and five deviations are 212."""
    epochs, size = 20_000, 10
    epoch = np.repeat(np.arange(epochs, dtype=np.uint64), size)
    place = np.tile(np.arange(size, dtype=np.uint64), epochs)
    window = module._permuted(place, size, module._key(1, epoch))
    counts = np.zeros((size, size), int)
    np.add.at(counts, (place.astype(int), window.astype(int)), 1)
    assert np.abs(counts - epochs / size).max() < 212


def rows_of(windows: Windows) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for batch in windows.all(16) for row in batch}


def test_runs_with_other_seeds_see_the_same_tokens_under_max_tokens(packed: Path) -> None:
    shards = Shards.open(packed)
    first, second = (Windows(shards, "train", 64, seed=seed, max_tokens=1_300) for seed in (0, 1))
    assert len(first) == 20
    assert first.tokens == 1_280
    assert rows_of(first) == rows_of(second) == set(epoch_of(first, 0)) == set(epoch_of(second, 4))
    assert rows_of(first) != rows_of(Windows(shards, "train", 64, max_tokens=1_300, subset_seed=1))


@pytest.mark.parametrize("max_tokens", [None, 1_300])
def test_a_batch_is_what_its_numbers_take(packed: Path, max_tokens: int | None) -> None:
    """Numbers count the windows of the whole split, whatever is kept of them."""
    shards = Shards.open(packed)
    windows, whole = Windows(shards, "train", 64, seed=4, max_tokens=max_tokens), all_ids(shards, "train")
    for step in range(6):
        numbers = windows.numbers(step, 7)
        expected = torch.stack([whole[int(n) * 64 : int(n) * 64 + 65] for n in numbers])
        assert torch.equal(windows.batch(step, 7), expected)
        assert torch.equal(windows.take(numbers), expected)


@pytest.mark.parametrize("max_tokens", [None, 1_300])
def test_the_windows_in_order_are_those_of_every_epoch(packed: Path, max_tokens: int | None) -> None:
    windows = Windows(Shards.open(packed), "train", 64, seed=4, max_tokens=max_tokens)
    numbers, size = windows.in_order(), len(windows)
    assert np.array_equal(numbers, np.unique(numbers)), "ascending, none twice"
    assert len(numbers) == size <= windows.total
    assert torch.equal(windows.take(numbers), torch.cat(list(windows.all(16))))
    for epoch in (0, 1):
        seen = np.concatenate(
            [windows.numbers(place, 1) for place in range(epoch * size, (epoch + 1) * size)]
        )
        assert np.array_equal(np.sort(seen), numbers)
        assert not np.array_equal(seen, numbers)


def test_without_a_subset_the_windows_in_order_are_all_of_the_split(packed: Path) -> None:
    windows = Windows(Shards.open(packed), "train", 64)
    assert windows.in_order().tolist() == list(range(windows.total))


def test_a_smaller_subset_lies_inside_a_larger_one(packed: Path) -> None:
    shards = Shards.open(packed)
    assert rows_of(Windows(shards, "train", 64, max_tokens=640)) < rows_of(
        Windows(shards, "train", 64, max_tokens=6_400)
    )


def test_a_split_shorter_than_a_window_is_an_error(packed: Path) -> None:
    with pytest.raises(
        ValueError, match=r"one window takes 1,000,001. Use more text, or a seq_len of at most"
    ):
        Windows(Shards.open(packed), "train", 1_000_000)


def test_max_tokens_below_one_window_is_an_error(packed: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens=63 holds no window of seq_len=64"):
        Windows(Shards.open(packed), "train", 64, max_tokens=63)


def test_targets_are_weighed_as_drawn() -> None:
    """<bos>=2 begins a document, <eos>=1 ends it, <pad>=0 is nothing. A row of weights is one id shorter."""
    ids = torch.tensor(
        [
            [2, 9, 8, 7, 1, 2],
            [9, 1, 2, 2, 1, 2],
            [2, 9, 1, 0, 0, 0],
            [9, 9, 9, 9, 9, 9],
        ]
    )
    weights = [
        [1, 1, 1, 1, 0],
        [1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]
    assert target_weights(ids).tolist() == weights
