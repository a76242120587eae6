"""Targets written to files come back as they were, and whatever happens to the files is noticed."""

import json
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemwright.config import Config
from gemwright.run import run_stage, write_json
from gemwright.targets import draw, store
from gemwright.targets.store import (
    FORMAT,
    MANIFEST,
    Kind,
    Manifest,
    Targets,
    TargetSplit,
    UsedShards,
    Window,
    packed,
    read_entry,
    write_file,
)

WINDOWS, A_FILE, T, VOCAB = 11, 4, 16, 700


class Nothing(Config):
    """The config of a stage without settings."""


def drawn(kind: Kind, samples: int) -> draw.Sampled | draw.Top:
    """What a teacher with random weights says of eleven windows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(WINDOWS * T, 8), torch.randn(VOCAB, 8)
    if kind == "top-k":
        return draw.top_hidden(hidden, weight, samples, cap=30.0)
    places = draw.uniforms(0, range(WINDOWS), T, samples).flatten(0, 1)
    return draw.sample_hidden(hidden, weight, places, cap=30.0)


def label(folder: Path, kind: Kind = "sampled", samples: int = 50) -> Path:
    """A finished folder, as the stage makes it; the subset is named and of no account here."""
    windows = list(packed(drawn(kind, samples), T, VOCAB))

    def work(run: Any) -> dict[str, Any]:
        files = [
            write_file(folder / f"train-{start // A_FILE:05d}.targets", windows[start : start + A_FILE])
            for start in range(0, WINDOWS, A_FILE)
        ]
        split = TargetSplit(total=90, max_tokens=WINDOWS * T, subset_seed=0, files=tuple(files))
        manifest = Manifest(
            format=FORMAT, kind=kind, samples=samples, temperature=1.0, seed=0, vocab_size=VOCAB, seq_len=T,
            teacher_sha256="a" * 64, tokenizer_sha256="b" * 64, splits={"train": split},
            shards=UsedShards(path="shards", sha256="c" * 64),
        )  # fmt: skip
        write_json(folder / MANIFEST, manifest.to_dict())
        return {}

    run_stage("label", Nothing(), folder, work)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return label(tmp_path_factory.mktemp("runs") / "targets")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A folder of targets of one's own, to damage."""
    return label(tmp_path / "targets")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The same in a few hundred bytes a file, so that each can be damaged in turn."""
    return label(tmp_path / "targets", samples=3)


def dense(batch: store.TargetBatch) -> torch.Tensor:
    """The stored distributions over the whole vocabulary, the tail left out."""
    return torch.zeros(*batch.ids.shape[:2], VOCAB).scatter_add_(2, batch.ids, batch.probs)


def every_flipped_byte(path: Path) -> Iterator[int]:
    """Damage a file at one byte after another, and mend it."""
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        yield place
    path.write_bytes(whole)


def test_sampled_targets_come_back_in_any_order(labelled: Path) -> None:
    rows = [7, 0, 10, 3, 3]
    batch = Targets.open(labelled).read("train", rows)
    ids = drawn("sampled", 50).ids.view(WINDOWS, T, 50)[rows]
    expected = torch.zeros(len(rows), T, VOCAB).scatter_add_(2, ids, torch.ones(ids.shape)) / 50
    torch.testing.assert_close(dense(batch), expected)
    assert batch.ids.dtype == torch.int64
    assert batch.probs.dtype == batch.tail.dtype == torch.float32
    assert not batch.tail.any()


def test_top_k_targets_come_back_with_their_tail(tmp_path: Path) -> None:
    rows = [10, 0, 5]
    batch = Targets.open(label(tmp_path / "targets", "top-k", 9)).read("train", rows)
    expected = drawn("top-k", 9)
    assert isinstance(expected, draw.Top)
    assert torch.equal(batch.ids, expected.ids.view(WINDOWS, T, 9)[rows])
    probs, tail = (log.exp().view(WINDOWS, T, -1)[rows] for log in (expected.log_probs, expected.log_tail))
    torch.testing.assert_close(batch.probs, probs, rtol=6e-4, atol=0)
    torch.testing.assert_close(batch.tail, tail.squeeze(-1), rtol=6e-4, atol=0)
    torch.testing.assert_close(batch.probs.sum(-1) + batch.tail, torch.ones(3, T))


def test_a_batch_is_as_wide_as_its_fullest_position_and_padded_with_nothing(labelled: Path) -> None:
    targets = Targets.open(labelled)
    for rows in ([0], [0, 5, 9]):
        batch = targets.read("train", rows)
        used = (batch.probs > 0).sum(-1)
        assert batch.ids.shape == (len(rows), T, used.max())
        assert used.min() < used.max()
        is_padding = torch.arange(batch.ids.shape[-1]) >= used[..., None]
        assert not batch.ids[is_padding].any()
        assert not batch.probs[is_padding].any()
        torch.testing.assert_close(batch.probs.sum(-1), torch.ones(len(rows), T))


def test_entropy_and_covered_mass_are_means_over_the_window(labelled: Path) -> None:
    batch, expected = Targets.open(labelled).read("train", [9, 2]), drawn("sampled", 50)
    torch.testing.assert_close(batch.entropy, expected.entropy.view(WINDOWS, T).mean(1)[[9, 2]])
    torch.testing.assert_close(batch.covered, expected.covered.view(WINDOWS, T).mean(1)[[9, 2]])


def test_the_manifest_counts_what_is_stored(labelled: Path) -> None:
    split = Targets.open(labelled).manifest.splits["train"]
    assert split.windows == WINDOWS
    assert [file.windows for file in split.files] == [4, 4, 3]
    assert [file.bytes for file in split.files] == [
        (labelled / file.name).stat().st_size for file in split.files
    ]
    distinct = sum(len(set(row)) for row in drawn("sampled", 50).ids.tolist())
    assert sum(file.ids for file in split.files) == distinct


def test_opening_maps_files_and_reads_none(labelled: Path) -> None:
    targets = Targets.open(labelled)
    assert targets._maps == {}
    targets.read("train", [3, 4])
    assert sorted(targets._maps) == ["train-00000.targets", "train-00001.targets"]


def test_the_index_is_pinned(tmp_path: Path) -> None:
    """A layout that changes with a release would make every stored file unreadable."""
    windows = [
        Window(np.array([5, 6, 7], np.uint8), 2, 0.5, 0.25),
        Window(np.array([8], np.uint8), 1, 2.0, 1.0),
    ]
    write_file(tmp_path / "a", windows)
    data = (tmp_path / "a").read_bytes()
    assert data[:4] == bytes([5, 6, 7, 8])
    first, second = data[4:28], data[28:]
    assert first[:20].hex() == "0300000000000000020000000000003f0000803e"
    assert second[:20].hex() == "040000000000000001000000000000400000803f"
    assert (first[20:].hex(), second[20:].hex()) == PINNED


PINNED = ("39ca9868", "f486a864")


def test_a_finished_file_tells_its_entry(labelled: Path) -> None:
    for file in Targets.open(labelled).manifest.splits["train"].files:
        assert read_entry(labelled / file.name) == file


def test_a_flipped_byte_anywhere_is_found_by_reading_its_window(small: Path) -> None:
    path = small / "train-00002.targets"
    size = store._RECORD.itemsize
    ends = np.frombuffer(path.read_bytes()[-3 * size :], store._RECORD)["end"].tolist()
    for place in every_flipped_byte(path):
        row = 8 + (bisect_right(ends, place) if place < ends[-1] else (place - ends[-1]) // size)
        with pytest.raises(ValueError, match=rf"train-00002.targets is damaged, window {row - 8} .*--fresh"):
            Targets.open(small).read("train", [row])
    Targets.open(small).read("train", [8, 9, 10])


def test_a_flipped_byte_anywhere_is_found_when_a_killed_run_goes_on(small: Path) -> None:
    path = small / "train-00002.targets"
    for _ in every_flipped_byte(path):
        with pytest.raises(ValueError, match=r"train-00002.targets is damaged.*Delete it"):
            read_entry(path)
    read_entry(path)


def test_a_flipped_byte_anywhere_is_found_by_verify(small: Path) -> None:
    targets, steps = Targets.open(small), []
    for _ in every_flipped_byte(small / "train-00001.targets"):
        with pytest.raises(ValueError, match=r"train-00001.targets is damaged: its SHA-256"):
            targets.verify()
    targets.verify(steps.append)
    assert steps == [file.bytes for file in targets.manifest.splits["train"].files]


def test_a_window_in_another_ones_place_is_found(damaged: Path) -> None:
    """Every checksum holds for the file; it is the manifest that tells which file it was."""
    first, second = (damaged / f"train-0000{n}.targets" for n in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"train-00000.targets"):
        Targets.open(damaged).verify()


def test_a_block_whose_checksum_holds_but_that_makes_no_sense_is_an_error(damaged: Path) -> None:
    """Written by something else: the ids of another vocabulary."""
    path = damaged / "train-00002.targets"
    size = path.stat().st_size
    write_file(
        path,
        [Window(np.zeros(size - 72 - 20, np.uint8), 50, 0.0, 1.0)]
        + 2 * [Window(np.zeros(10, np.uint8), 1, 0.0, 1.0)],
    )
    assert path.stat().st_size == size
    with pytest.raises(ValueError, match=r"train-00002.targets is damaged, window 0 in it: the block has"):
        Targets.open(damaged).read("train", [8])


@pytest.mark.parametrize("length", [0, 5, 100, -24, -1])
def test_a_truncated_file_is_noticed(damaged: Path, length: int) -> None:
    path = damaged / "train-00001.targets"
    opened = Targets.open(damaged)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"train-00001.targets has .* it was cut short or .*--fresh"):
        Targets.open(damaged)
    with pytest.raises(ValueError, match=r"train-00001.targets has .* it was cut short or .*--fresh"):
        opened.read("train", [5])
    with pytest.raises(ValueError, match=r"train-00001.targets is damaged"):
        read_entry(path)


def test_a_missing_file_is_named(damaged: Path) -> None:
    (damaged / "train-00001.targets").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00001.targets is gone. .*--fresh"):
        Targets.open(damaged)


def test_a_missing_manifest_is_named(damaged: Path) -> None:
    (damaged / MANIFEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest.json is gone. .*--fresh"):
        Targets.open(damaged)


def test_an_edited_manifest_is_refused(damaged: Path) -> None:
    path = damaged / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 2.0}))
    with pytest.raises(ValueError, match="edited or damaged"):
        Targets.open(damaged)


def test_a_newer_format_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "FORMAT", 2)
    with pytest.raises(ValueError, match="has format 1, and this version reads 2"):
        Targets.open(damaged)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    def work(run: Any) -> dict[str, Any]:
        (tmp_path / "targets/train-00000.targets").write_bytes(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage("label", Nothing(), tmp_path / "targets", work)
    with pytest.raises(ValueError, match=r"not finished. .*it goes on"):
        Targets.open(tmp_path / "targets")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"card.json"):
        Targets.open(tmp_path)
    run_stage("shards", Nothing(), tmp_path / "shards", lambda run: {})
    with pytest.raises(ValueError, match=r"another stage, 'shards'. .*gemwright label"):
        Targets.open(tmp_path / "shards")


def test_a_failure_in_the_middle_of_a_file_leaves_none(tmp_path: Path) -> None:
    def failing() -> Iterator[Window]:
        yield from list(packed(drawn("sampled", 50), T, VOCAB))[:2]
        raise RuntimeError("the teacher ran out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_file(tmp_path / "train-00000.targets", failing())
    assert list(tmp_path.iterdir()) == []
