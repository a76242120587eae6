"""The labelling stage: what the teacher said is what is stored, killed or not, on one rank or on two."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gemwright.data.shards import Shards
from gemwright.data.sources import Corpus
from gemwright.data.windows import Windows
from gemwright.device import Ranks
from gemwright.distill import label
from gemwright.distill.label import LabelConfig, run
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.run import fingerprint, read_card
from gemwright.targets import draw
from gemwright.targets.store import Targets
from gemwright.tokenizer.tokenizer import Tokenizer, parse_model
from gemwright.tokenizer.train import TokenizerConfig, train
from gemwright.train.loop import make_batch

M, T, VOCAB = 12, 16, 700
CONFIG = LabelConfig(
    samples=M, seq_len=T, max_tokens=100 * T, batch_size=8, windows_per_file=30, compile=False, seed=3
)
COMMAND = (
    "--samples", M, "--seq-len", T, "--max-tokens", 100 * T, "--set", "batch_size=8",
    "--set", "windows_per_file=30", "--set", "compile=false", "--set", "seed=3",
)  # fmt: skip

STALL = """
import sys, time
from gemwright.cli.main import main
from gemwright.distill import label

write, calls = label.store.write_file, 0

def stalled(windows):
    yield next(windows)
    print("stalled", flush=True)
    time.sleep(300)

def third(path, windows):
    global calls
    calls += 1
    return write(path, stalled(windows) if calls == 3 else windows)

label.store.write_file = third
main()
"""


class Interrupted(Exception):
    """Stands for whatever ends a stage before its time."""


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all results: the manifest names the shards from there."""
    return tmp_path_factory.mktemp("outs")


@pytest.fixture(scope="module")
def whole(outs: Path, teacher_folder: Path, shards_folder: Path) -> Path:
    """The run that nobody disturbs."""
    run(CONFIG, outs / "whole", teacher_folder, shards_folder)
    return outs / "whole"


@pytest.fixture(scope="module")
def windows(shards_folder: Path) -> Windows:
    """What a training run with another order takes under the same max_tokens."""
    return Windows(Shards.open(shards_folder), "train", T, seed=9, max_tokens=100 * T)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed: no teacher is even loaded."""

    def refuse(*arguments: Any, **options: Any) -> None:
        pytest.fail("the teacher was loaded although it should not be")

    monkeypatch.setattr(label.Teacher, "load", refuse)


@torch.no_grad()
def logits_of(teacher: Path, windows: Windows, numbers: np.ndarray) -> Tensor:
    """The teacher's capped logits, whole, by its own forward pass."""
    model, batch = checkpoint.load(teacher), make_batch(windows.take(numbers), bos_id=2)
    return model(batch.ids, batch.places).flatten(0, 1)


def dense(ids: Tensor, values: Tensor, vocab: int = VOCAB) -> Tensor:
    """Few ids a position -> a row over the whole vocabulary."""
    rows = values.new_zeros(*ids.shape[:-1], vocab)
    return rows.scatter_add_(-1, ids, values)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.name not in ("card.json", ".lock")
    }


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.glob("*.targets")}


@pytest.mark.parametrize(("kind", "temperature"), [("stratified", 1.0), ("sampled", 2.5)])
def test_the_stored_draws_are_those_from_the_teachers_own_logits(
    outs: Path, whole: Path, teacher_folder: Path, shards_folder: Path, windows: Windows, kind: str,
    temperature: float,
):  # fmt: skip
    """Read back for the windows of a training batch, in its order."""
    out = whole
    if kind != CONFIG.kind:
        out = outs / f"at-{temperature}"
        run(CONFIG.but(kind=kind, temperature=temperature), out, teacher_folder, shards_folder)
    numbers = windows.numbers(2, 5)
    rows = np.searchsorted(windows.in_order(), numbers)
    found = Targets.open(out).read("train", rows.tolist())
    stratified = kind == "stratified"
    places = draw.uniforms(CONFIG.seed, numbers.tolist(), T, M, stratified=stratified).flatten(0, 1)
    expected = draw.sample(
        logits_of(teacher_folder, windows, numbers), places, cap=None, temperature=temperature
    )
    counts = dense(expected.ids, torch.ones(5 * T, M))
    assert torch.equal(dense(found.ids, found.probs * M).flatten(0, 1).round(), counts)
    assert found.probs.sum(-1) == pytest.approx(torch.ones(5, T).numpy(), abs=1e-6)
    assert found.entropy.numpy() == pytest.approx(expected.entropy.reshape(5, T).mean(1).numpy(), abs=1e-4)
    assert found.covered.numpy() == pytest.approx(expected.covered.reshape(5, T).mean(1).numpy(), abs=1e-4)


def test_the_counts_of_every_position_are_whole_and_sum_to_the_draws(whole: Path):
    found = Targets.open(whole).read("train", range(100))
    counts = found.probs * M
    assert torch.allclose(counts, counts.round(), atol=1e-5)
    assert torch.equal(counts.round().sum(-1), torch.full((100, T), float(M)))
    assert not found.tail.any()


def test_the_largest_probabilities_are_stored_with_the_mass_of_the_rest(
    outs: Path, teacher_folder: Path, shards_folder: Path, windows: Windows
):
    run(CONFIG.but(kind="top-k", samples=5), outs / "top", teacher_folder, shards_folder)
    numbers = windows.numbers(1, 4)
    found = Targets.open(outs / "top").read("train", np.searchsorted(windows.in_order(), numbers).tolist())
    probs = torch.softmax(logits_of(teacher_folder, windows, numbers), -1).reshape(4, T, VOCAB)
    expected, ids = probs.topk(5)
    assert torch.equal(dense(found.ids, torch.ones(4, T, 5)), dense(ids, torch.ones(4, T, 5)))
    torch.testing.assert_close(dense(found.ids, found.probs), dense(ids, expected), atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(found.tail, 1 - expected.sum(-1), atol=2e-3, rtol=1e-2)
    torch.testing.assert_close(found.probs.sum(-1) + found.tail, torch.ones(4, T))


def test_another_seed_draws_otherwise_from_the_same_teacher(
    outs: Path, whole: Path, teacher_folder: Path, shards_folder: Path
):
    run(CONFIG.but(seed=4), outs / "seed", teacher_folder, shards_folder)
    one, other = (Targets.open(out).read("train", range(100)) for out in (whole, outs / "seed"))
    assert not torch.equal(dense(one.ids, one.probs), dense(other.ids, other.probs))
    assert torch.equal(one.entropy, other.entropy)


@pytest.mark.parametrize("changes", [{"windows_per_file": 7}, {"windows_per_file": 1_000}, {"batch_size": 3}])
def test_how_windows_are_cut_into_files_and_batches_changes_no_target(
    whole: Path, teacher_folder: Path, shards_folder: Path, tmp_path: Path, changes: dict[str, int]
):
    run(CONFIG.but(**changes), tmp_path / "out", teacher_folder, shards_folder)
    one, other = (Targets.open(out).read("train", range(100)) for out in (whole, tmp_path / "out"))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.probs, other.probs)
    torch.testing.assert_close(one.entropy, other.entropy)
    files = Targets.open(tmp_path / "out").manifest.splits["train"].files
    size = CONFIG.but(**changes).windows_per_file
    assert [file.windows for file in files][:-1] == [size] * (len(files) - 1)


def test_max_tokens_labels_exactly_the_windows_that_training_with_it_takes(
    whole: Path, windows: Windows, teacher_folder: Path
):
    """The epochs of a training run, whatever its seed, are what was labelled: all of it, and no more."""
    split = Targets.open(whole).manifest.splits["train"]
    epoch = np.concatenate([windows.numbers(step, 10) for step in range(10)])
    assert (split.windows, split.total, split.max_tokens) == (len(windows), windows.total, 100 * T)
    assert windows.total > 1_000
    expected = torch.softmax(logits_of(teacher_folder, windows, np.sort(epoch)), -1)
    entropy = -(expected * expected.log()).sum(-1).reshape(100, T).mean(1)
    torch.testing.assert_close(
        Targets.open(whole).read("train", range(100)).entropy, entropy, atol=1e-4, rtol=0
    )


def test_without_max_tokens_every_window_of_the_split_is_labelled(
    teacher_folder: Path, few_shards_folder: Path, tmp_path: Path
):
    run(
        CONFIG.but(max_tokens=None, windows_per_file=500, batch_size=100),
        tmp_path / "all",
        teacher_folder,
        few_shards_folder,
    )
    split = Targets.open(tmp_path / "all").manifest.splits["train"]
    assert split.windows == split.total == Windows(Shards.open(few_shards_folder), "train", T).total > 100
    assert split.max_tokens is None


def test_the_card_and_the_manifest_say_what_was_labelled_from_what(
    whole: Path, teacher_folder: Path, shards_folder: Path, tokenizer_folder: Path
):
    card, manifest = read_card(whole), Targets.open(whole).manifest
    files = manifest.splits["train"].files
    assert (card.stage, card.finished, sorted(card.inputs)) == ("label", True, ["shards", "teacher"])
    assert manifest.teacher_sha256 == fingerprint(teacher_folder) == card.inputs["teacher"]["sha256"]
    assert manifest.shards.sha256 == fingerprint(shards_folder)
    assert (whole.parent / manifest.shards.path).resolve() == shards_folder.resolve()
    assert manifest.tokenizer_sha256 == Tokenizer.load(tokenizer_folder).sha256
    size, ids = sum(file.bytes for file in files), sum(file.ids for file in files)
    assert card.results["tokens"] == 1_600
    assert card.results["bytes"] == size == sum((whole / file.name).stat().st_size for file in files)
    assert card.results["bytes_a_token"] == pytest.approx(size / 1_600, abs=1e-3)
    assert card.results["ids_a_token"] == pytest.approx(ids / 1_600, abs=1e-3)
    found = Targets.open(whole).read("train", range(100))
    assert ids == int((found.probs > 0).sum())
    assert card.results["teacher_entropy"] == pytest.approx(float(found.entropy.mean()), abs=1e-4)
    assert card.results["mass_covered"] == pytest.approx(float(found.covered.mean()), abs=1e-4)


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    outs: Path, whole: Path, teacher_folder: Path, shards_folder: Path
):
    """The command stops inside its third file and is killed there; the first two are not written again."""
    out = outs / "killed"
    order = ["label", teacher_folder, shards_folder, "--out", out, *COMMAND]
    command = [sys.executable, "-c", STALL, *map(str, order)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == "stalled\n", child.stderr.read()
        child.send_signal(signal.SIGKILL)
    before = stamps(out)
    assert sorted(before) == ["train-00000.targets", "train-00001.targets"]
    assert list(out.glob(".*.partial-*")), "the kill was to leave a torn file behind"
    with pytest.raises(ValueError, match=r"is not finished. Run the same gemwright label again: it goes on"):
        Targets.open(out)
    run(CONFIG, out, teacher_folder, shards_folder)
    assert {name: stamps(out)[name] for name in before} == before
    assert bytes_of(out) == bytes_of(whole)
    assert read_card(out).outputs == read_card(whole).outputs


def test_a_finished_label_is_not_made_again(
    whole: Path, teacher_folder: Path, shards_folder: Path, stopped: None
):
    before = stamps(whole)
    assert run(CONFIG, whole, teacher_folder, shards_folder) == read_card(whole)
    assert stamps(whole) == before


def test_with_every_file_there_only_the_manifest_is_written(
    whole: Path, outs: Path, teacher_folder: Path, shards_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A kill before the manifest costs no teacher."""

    def interrupt(*arguments: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(label, "_manifest", interrupt)
        with pytest.raises(Interrupted):
            run(CONFIG, outs / "late", teacher_folder, shards_folder)
    monkeypatch.setattr(label.Teacher, "load", interrupt)
    run(CONFIG, outs / "late", teacher_folder, shards_folder)
    assert bytes_of(outs / "late") == bytes_of(whole)


@pytest.fixture
def unfinished(
    teacher_folder: Path, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """All files, and no manifest."""

    def interrupt(*arguments: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(label, "_manifest", interrupt)
        with pytest.raises(Interrupted):
            run(CONFIG, tmp_path / "out", teacher_folder, shards_folder)
    return tmp_path / "out"


def test_a_file_that_was_damaged_meanwhile_is_not_built_upon(
    unfinished: Path, teacher_folder: Path, shards_folder: Path, whole: Path
):
    path = unfinished / "train-00001.targets"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00001.targets is damaged.* Delete it, and run the same"):
        run(CONFIG, unfinished, teacher_folder, shards_folder)
    path.unlink()
    run(CONFIG, unfinished, teacher_folder, shards_folder)
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_a_file_of_another_number_of_windows_is_not_built_upon(
    unfinished: Path, teacher_folder: Path, shards_folder: Path
):
    shutil.copy(unfinished / "train-00003.targets", unfinished / "train-00001.targets")
    with pytest.raises(ValueError, match=r"train-00001.targets holds other windows. Delete it"):
        run(CONFIG, unfinished, teacher_folder, shards_folder)


def test_going_on_with_other_settings_is_refused_by_name(
    unfinished: Path, teacher_folder: Path, shards_folder: Path, stopped: None
):
    with pytest.raises(ValueError, match=r"samples: 12 -> 13.*--fresh"):
        run(CONFIG.but(samples=13), unfinished, teacher_folder, shards_folder)


def test_every_rank_writes_its_share_of_the_files_and_no_other(
    whole: Path, teacher_folder: Path, windows: Windows, tmp_path: Path, tokenizer_folder: Path
):
    tokenizer = Tokenizer.load(tokenizer_folder)
    for rank, share in ((1, {"train-00001.targets", "train-00003.targets"}), (0, set())):
        label._label(CONFIG, tmp_path, teacher_folder, tokenizer, windows, Ranks(rank, 2))
        assert {path.name for path in tmp_path.iterdir()} >= share
        assert len(list(tmp_path.iterdir())) == (2 if rank else 4)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (whole / path.name).read_bytes()


@pytest.mark.slow
def test_two_ranks_write_the_same_bytes_as_one(
    outs: Path, whole: Path, teacher_folder: Path, shards_folder: Path
):
    out = outs / "ranks"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m",
        "gemwright.cli.main", "label", teacher_folder, shards_folder, "--out", out, *COMMAND, "--json",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(2):  # the second time there is nothing to do, on any rank
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, timeout=250, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"tokens": 1600') == 1, "one rank tells the result"
        assert bytes_of(out) == bytes_of(whole)
    assert "is finished already" in done.stderr


def test_what_a_padded_head_has_more_than_the_tokenizer_is_cut_off(
    outs: Path, whole: Path, teacher_folder: Path, tokenizer_folder: Path, shards_folder: Path, tmp_path: Path
):
    """The rows of padding would win everywhere; the files are those of the head without them."""
    lean = checkpoint.load(teacher_folder)
    padded = Gemma(lean.config.but(vocab_size=704))
    name = "model.embed_tokens.weight"
    state = lean.state_dict()
    rows = torch.cat((state[name], 10 * state[name][:4]))
    padded.load_state_dict(
        {key: rows if torch.equal(value, state[name]) else value for key, value in state.items()}
    )
    checkpoint.save(padded, tmp_path / "teacher")
    Tokenizer.load(tokenizer_folder).save(tmp_path / "teacher")
    run(CONFIG, outs / "padded", tmp_path / "teacher", shards_folder)
    found, manifest = bytes_of(outs / "padded"), Targets.open(outs / "padded").manifest
    assert manifest.vocab_size == VOCAB
    assert {key: value for key, value in found.items() if key != "manifest.json"} == {
        path.name: path.read_bytes() for path in whole.glob("*.targets")
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seq_len": 65}, r"seq_len=65 exceeds the teacher's max_seq_len=64. Shorten it"),
        ({"kind": "top-k", "samples": 701}, r"the top 701 of 700 pieces cannot be kept. Lower samples"),
        ({"max_tokens": 15}, r"max_tokens=15 holds no window of seq_len=16"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_computed(
    teacher_folder: Path, shards_folder: Path, tmp_path: Path, stopped: None, changes: Any, told: str
):
    with pytest.raises(ValueError, match=told):
        run(CONFIG.but(**changes), tmp_path / "out", teacher_folder, shards_folder)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_fewer_rows_than_pieces_is_refused(
    tiny: GemmaConfig, tokenizer_folder: Path, shards_folder: Path, tmp_path: Path, stopped: None
):
    checkpoint.save(Gemma(tiny.but(vocab_size=699)), tmp_path / "teacher")
    Tokenizer.load(tokenizer_folder).save(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"teacher has 699 rows, fewer than its tokenizer's 700 pieces"):
        run(CONFIG, tmp_path / "out", tmp_path / "teacher", shards_folder)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_other_pieces_is_refused_and_the_ids_that_differ_are_named(
    teacher_folder: Path, shards_folder: Path, text_folder: Path, tmp_path: Path, stopped: None
):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    texts = [document.text[::-1] for document in Corpus.folder(text_folder).documents("train")]
    other = Tokenizer(train(texts, TokenizerConfig(vocab_size=690)))
    other.save(tmp_path / "teacher")
    ours = Tokenizer.load(teacher_folder)
    first = next(id for id in range(690) if ours.piece(id) != other.piece(id))
    with pytest.raises(ValueError, match="another tokenizer than the shards") as caught:
        run(CONFIG, tmp_path / "out", tmp_path / "teacher", shards_folder)
    told = f"id {first} is {other.piece(first)!r} to it and {ours.piece(first)!r} to the shards"
    assert told in str(caught.value)
    assert "it has 690 pieces and the shards 700. Make shards with the teacher's" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_the_same_pieces_and_other_scores_is_refused_too(
    teacher_folder: Path, shards_folder: Path, tmp_path: Path, stopped: None
):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    model = parse_model((teacher_folder / "tokenizer.model").read_bytes())
    model.pieces[-1].score -= 1
    Tokenizer(model.SerializeToString()).save(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"\(0 of 700 ids\): the pieces are the same, but text is cut"):
        run(CONFIG, tmp_path / "out", tmp_path / "teacher", shards_folder)


def test_a_teacher_or_shards_that_are_not_there_are_named(
    teacher_folder: Path, shards_folder: Path, tmp_path: Path, stopped: None
):
    with pytest.raises(FileNotFoundError, match=r"nowhere has no card.json"):
        run(CONFIG, tmp_path / "out", teacher_folder, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nobody"):
        run(CONFIG, tmp_path / "out", tmp_path / "nobody", shards_folder)
    assert not (tmp_path / "out").exists()
