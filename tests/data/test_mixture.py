"""Mixtures: shares that hold everywhere, stages that shift them, and an order that needs no memory."""

import random
import string
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemwright.data import windows as module
from gemwright.data.packing import ShardsConfig, run
from gemwright.data.shards import Manifest, ShardFile, Shards, ShardSource, ShardSplit
from gemwright.data.sources import SPLITS, Document, Split
from gemwright.data.windows import MixtureStage, Windows
from gemwright.distill import label
from gemwright.distill.label import LabelConfig
from gemwright.distill.pretrain import PretrainConfig
from gemwright.distill.pretrain import run as pretrain
from gemwright.model.config import GemmaConfig
from gemwright.targets.store import Targets
from gemwright.train.loop import TrainConfig, make_batch
from gemwright.train.teacher import StoredTeacher

T, PLACES = 16, 6_000
SIZES = {"web": 30_000, "code": 12_000, "verse": 3_000, "scrap": 8}
"""Characters of each source; the last has no window."""


class Text:
    """Letters at random, by source."""

    name, parts = "letters", 1

    @property
    def facts(self) -> dict[str, str]:
        return {"sha256": "letters"}

    def part(self, number: int) -> Iterator[tuple[Split, Document]]:
        draw = random.Random(0)
        for split in SPLITS:
            for source, size in SIZES.items():
                for start in range(0, size if split == "train" else size // 10, 500):
                    text = "".join(draw.choices(string.ascii_lowercase + " ", k=min(500, size - start)))
                    yield split, Document(f"{source}/{start}", text, source)


@pytest.fixture(scope="module")
def folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "shards"
    run(ShardsConfig(max_tokens_per_file=7_000), out, Text(), tokenizer_folder)
    return out


@pytest.fixture(scope="module")
def shards(folder: Path) -> Shards:
    return Shards.open(folder)


def stage(until: float, **weights: float) -> MixtureStage:
    return MixtureStage(until=until, weights=weights)


STAGED = (stage(0.8, web=0.7, code=0.3), stage(1.0, web=0.1, code=0.65, verse=0.25))


def mixed(shards: Shards, *stages: MixtureStage, seed: int = 0, max_tokens: int | None = None) -> Windows:
    return Windows(shards, "train", T, seed=seed, max_tokens=max_tokens, mixture=stages, total_windows=PLACES)


def windows_of(shards: Shards) -> dict[str, set[int]]:
    """By source, the windows that lie wholly inside it, from the manifest alone."""
    found: dict[str, set[int]] = {}
    start = 0
    for source in shards.manifest.splits["train"].sources:
        stop = start + source.tokens
        found[source.name] = {n for n in range(stop // T + 1) if n * T >= start and n * T + T + 1 <= stop}
        start = stop
    return found


def names_of(shards: Shards, numbers: np.ndarray) -> np.ndarray:
    """Which source each window is of; `?` where it straddles two."""
    by_number = {number: name for name, some in windows_of(shards).items() for number in some}
    return np.array([by_number.get(int(number), "?") for number in numbers])


def test_a_window_of_a_mixture_lies_in_one_source(shards: Shards) -> None:
    names = names_of(shards, mixed(shards, *STAGED).numbers(0, PLACES))
    assert set(names) == {"web", "code", "verse"}


@pytest.mark.parametrize("size", [10, 64, 1_024])
def test_every_stretch_of_a_stage_has_its_shares(shards: Shards, size: int) -> None:
    """With four sources, none is further than two places from its due at either end of a stretch."""
    names = names_of(shards, mixed(shards, *STAGED).numbers(0, PLACES))
    for start in range(0, PLACES - size, size):
        if start + size <= 0.8 * PLACES or start >= 0.8 * PLACES:
            weights = STAGED[start >= 0.8 * PLACES].weights
            for name, weight in weights.items():
                assert abs((names[start : start + size] == name).sum() - weight * size) <= 4


def test_a_later_stage_shifts_the_shares_where_it_begins(shards: Shards) -> None:
    names = names_of(shards, mixed(shards, *STAGED).numbers(0, PLACES))
    border = PLACES * 8 // 10
    early, late = names[:border], names[border:]
    assert [(early == name).sum() for name in ("web", "code", "verse")] == [3_360, 1_440, 0]
    assert [(late == name).sum() for name in ("web", "code", "verse")] == [120, 780, 300]


@given(
    weights=st.lists(st.floats(0, 1) | st.floats(0, 1e-4), min_size=1, max_size=9).filter(any),
    start=st.integers(0, 2**34),
)
def test_each_place_belongs_to_one_source_and_no_source_is_far_from_its_due(
    weights: list[float], start: int
) -> None:
    places = start + np.arange(300, dtype=np.uint64)
    turns = module._turns(places, module._shares(weights)).astype(np.int64)
    steps = np.diff(turns, axis=0)
    assert (np.sort(steps, 1)[:, :-1] == 0).all()
    assert (steps.max(1) == 1).all()
    if start < 2**24:  # where shares in 28 bits are exact to a sixteenth of a place
        due = np.outer(places, np.array(weights) / sum(weights))
        assert np.abs(turns - due).max() <= len(weights) / 2 + len(weights) / 16


def test_after_34_billion_places_each_still_belongs_to_one_source_and_shares_hold() -> None:
    """A share is a multiple of 2^-28: over 2^35 places that is off by 64 places for each source at most."""
    turns = module._turns(np.array([2**35 - 1], np.uint64), module._shares([1.0, 1.0, 2.0]))[0].astype(int)
    assert turns.sum() == 2**35 - 1
    assert np.abs(turns - [2**33, 2**33, 2**34]).max() < 3 * 64


def test_the_order_of_a_mixture_is_pinned() -> None:
    """An order that changes with a release would break every resumed run."""
    sources = tuple(
        ShardSource(name=name, documents=1, characters=tokens, bytes=tokens, tokens=tokens)
        for name, tokens in (("web", 170), ("code", 100))
    )
    split = ShardSplit(sources=sources, files=(ShardFile(name="none", tokens=270, sha256=""),))
    manifest = Manifest(
        format=2, dtype="uint16", vocab_size=700, tokenizer_sha256="", splits={"train": split}, corpus={}
    )
    windows = mixed(Shards(Path("nowhere"), manifest), stage(1.0, web=2, code=1), seed=7)
    assert windows.numbers(0, 12).tolist() == PINNED


PINNED = [3, 13, 7, 8, 12, 0, 6, 14, 9, 5, 15, 1]


def test_weights_count_relative_to_each_other(shards: Shards) -> None:
    one, other = (mixed(shards, stage(1.0, web=a, code=b)) for a, b in ((0.75, 0.25), (6, 2)))
    assert np.array_equal(one.numbers(3, 500), other.numbers(3, 500))


def test_a_batch_asked_for_alone_is_the_one_of_the_sequence(shards: Shards) -> None:
    """So a run resumes from a step alone, also across the border of stages."""
    sequence = mixed(shards, *STAGED, seed=5).numbers(0, PLACES)
    for step in (0, 1, 300, 599, 600, 601, 749):
        alone = mixed(shards, *STAGED, seed=5).numbers(step, 8)
        assert np.array_equal(alone, sequence[step * 8 : step * 8 + 8])


def test_another_seed_takes_other_windows_of_the_same_sources(shards: Shards) -> None:
    one, other = (mixed(shards, *STAGED, seed=seed).numbers(0, 1_000) for seed in (0, 1))
    assert not np.array_equal(one, other)
    assert np.array_equal(names_of(shards, one), names_of(shards, other))


def test_no_window_comes_twice_before_all_of_its_source_came_once(shards: Shards) -> None:
    """The stages go on with a source where the one before left it, in the middle of an epoch or not."""
    numbers, inside = mixed(shards, *STAGED).numbers(0, PLACES), windows_of(shards)
    names = names_of(shards, numbers)
    for name in ("web", "code", "verse"):
        own, size = numbers[names == name].tolist(), len(inside[name])
        assert len(own) % size, "the last epoch is not whole"
        for start in range(0, len(own) - size + 1, size):
            assert set(own[start : start + size]) == inside[name]
        rest = own[len(own) // size * size :]
        assert len(set(rest)) == len(rest)
    assert (names == "code").sum() > len(inside["code"]), "some source is to be read more than once"


def test_each_epoch_of_a_source_has_another_order(shards: Shards) -> None:
    size = len(windows_of(shards)["verse"])
    numbers = mixed(shards, stage(1.0, verse=1.0)).numbers(0, 2 * size)
    assert set(numbers[:size]) == set(numbers[size:])
    assert not np.array_equal(numbers[:size], numbers[size:])


def test_one_source_alone_is_a_permutation_of_its_windows(shards: Shards) -> None:
    inside = windows_of(shards)["code"]
    windows = mixed(shards, stage(1.0, code=2.5))
    numbers = windows.numbers(0, len(inside))
    assert sorted(numbers.tolist()) == sorted(inside)
    assert windows.tokens == len(inside) * T


def test_a_batch_holds_the_windows_that_its_numbers_name(shards: Shards) -> None:
    """Numbers count the windows of the whole split, as without a mixture."""
    windows, plain = mixed(shards, *STAGED), Windows(shards, "train", T)
    assert torch.equal(windows.batch(600, 8), plain.take(windows.numbers(600, 8)))
    assert len(windows) == windows.total == len(plain)


def test_a_run_that_goes_beyond_its_length_stays_in_the_last_stage(shards: Shards) -> None:
    names = names_of(shards, mixed(shards, *STAGED).numbers(6, 1_000))
    assert [(names == name).sum() for name in ("web", "code", "verse")] == [100, 650, 250]


def test_a_mixture_of_a_subset_takes_the_windows_that_are_kept(shards: Shards) -> None:
    """The subset is the one of a run without a mixture, so targets made for the one serve the other."""
    kept = Windows(shards, "train", T, max_tokens=500 * T).in_order()
    windows = mixed(shards, *STAGED, max_tokens=500 * T)
    numbers = windows.numbers(0, PLACES)
    taken = {number for name in ("web", "code", "verse") for number in windows_of(shards)[name]} & {
        *kept.tolist()
    }
    assert set(numbers.tolist()) == taken
    assert windows.tokens == len(taken) * T
    names = names_of(shards, numbers[:4_800])
    assert [(names == name).sum() for name in ("web", "code")] == [3_360, 1_440]


def test_without_a_mixture_windows_may_straddle_sources_and_none_is_left_out(shards: Shards) -> None:
    windows = Windows(shards, "train", T)
    assert "?" in names_of(shards, windows.in_order())
    assert sorted(windows.numbers(0, len(windows)).tolist()) == list(range(windows.total))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((stage(1.0, web=1, coed=1),), r"names 'coed', which is no source of .*\. Did you mean 'code'\?"),
        ((stage(1.0, web=1, scrap=0.1),), r"wants 'scrap', and .* no whole window of 17 tokens\. Leave it"),
    ],
)
def test_sources_that_cannot_be_mixed_are_named(
    shards: Shards, stages: tuple[MixtureStage, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        mixed(shards, *stages)


def test_a_source_without_a_window_may_be_named_with_weight_0(shards: Shards) -> None:
    assert mixed(shards, stage(1.0, web=1, scrap=0)).numbers(0, 8).shape == (8,)


@pytest.fixture
def config(tiny: GemmaConfig) -> PretrainConfig:
    return PretrainConfig(
        model=tiny,
        train=TrainConfig(steps=6, batch_size=10, seq_len=T, compile=False),
        validation_tokens=320,
        held_out_tokens=320,
    )


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ([{"until": 0.5, "weights": {"web": 1}}], r"mixture: the stages end at 0\.5 .* the last at 1"),
        (
            [{"until": 0.5, "weights": {"web": 1}}, {"until": 0.5, "weights": {"web": 1}}],
            r"end at 0\.5, 0\.5 of the run, and each must end later",
        ),
        ([{"until": 1.0, "weights": {"web": 0}}], r"every weight is 0.*Give some source a weight"),
        ([{"until": 1.0, "weights": {"web": -1}}], r"mixture\.0\.weights\.web: .*greater than or equal to 0"),
        ([{"until": 1.5, "weights": {"web": 1}}], r"mixture\.0\.until: .*less than or equal to 1"),
        (
            [{"until_": 1.0, "weights": {"web": 1}}],
            r"unknown key 'mixture\.0\.until_'\. Did you mean 'until'",
        ),
    ],
)
def test_a_mixture_that_means_nothing_is_refused_with_its_config(
    config: PretrainConfig, mixture: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.but(mixture=mixture)


def test_a_mixture_is_a_setting_like_others(config: PretrainConfig) -> None:
    changed = config.but(
        mixture=[{"until": 0.5, "weights": {"web": 1}}, {"until": 1.0, "weights": {"code": 2}}]
    )
    assert changed.mixture == (stage(0.5, web=1.0), stage(1.0, code=2.0))
    assert PretrainConfig.parse(changed.to_dict()) == changed


def test_an_unknown_source_is_refused_before_the_folder_is_made(
    config: PretrainConfig, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="names 'wbe'"):
        pretrain(config.but(mixture=(stage(1.0, wbe=1),)), tmp_path / "run", folder)
    assert not (tmp_path / "run").exists()


def test_a_run_trains_on_its_mixture_and_says_how_much_text_that_is(
    config: PretrainConfig, folder: Path, shards: Shards, tmp_path: Path
) -> None:
    card = pretrain(config.but(mixture=(stage(1.0, verse=1),)), tmp_path / "run", folder)
    assert card.results["distinct_tokens"] == len(windows_of(shards)["verse"]) * T
    plain = pretrain(config, tmp_path / "plain", folder)
    assert plain.results["validation"] != card.results["validation"]


@pytest.mark.parametrize("max_tokens", [None, 500 * T])
def test_stored_targets_serve_a_mixture(
    folder: Path, shards: Shards, teacher_folder: Path, tmp_path: Path, max_tokens: int | None
) -> None:
    """A window's targets are found by its number, which counts the windows of the split, mixed or not."""
    told = LabelConfig(
        kind="top-k", samples=1, seq_len=T, max_tokens=max_tokens, batch_size=200, compile=False
    )
    label.run(told, tmp_path / "targets", teacher_folder, folder)
    windows = mixed(shards, *STAGED, max_tokens=max_tokens)
    numbers = windows.numbers(600, 8)
    targets = Targets.open(tmp_path / "targets")
    found = StoredTeacher(targets, windows).read(make_batch(windows.take(numbers), 2, "cpu", numbers))
    labelled = Windows(shards, "train", T, max_tokens=max_tokens).in_order().tolist()
    expected = targets.read("train", [labelled.index(number) for number in numbers.tolist()])
    assert torch.equal(found.ids, expected.ids)
    assert len(found.ids.unique()) > 3
