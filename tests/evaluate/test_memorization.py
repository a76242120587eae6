"""Memorisation: a model that learnt one text, models whose next token is known, and the plain definitions."""

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gemwright.data.shards import Manifest, Shards
from gemwright.evaluate import memorization as module
from gemwright.evaluate.memorization import MemorizationConfig, Memorized, edit_distance, memorization, places
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma
from gemwright.tokenizer.tokenizer import Tokenizer

BOS, EOS = 2, 1
HOW = MemorizationConfig(samples=12, prompt_tokens=8, continuation_tokens=10, max_batch=5)
Texts = Mapping[str, Sequence[Sequence[int]]]
"""Documents by source, as ids without <bos> and <eos>."""


def pack(folder: Path, tokenizer: Tokenizer, train: Texts, held_out: Texts) -> Shards:
    """Shards with these documents; validation has what is held out, for nobody reads it."""
    splits: dict[str, Any] = {}
    folder.mkdir(exist_ok=True)
    for split, texts in (("train", train), ("validation", held_out), ("held_out", held_out)):
        packed = {name: [id for one in some for id in (BOS, *one, EOS)] for name, some in texts.items()}
        ids = np.array([id for some in packed.values() for id in some], "<u2")
        ids.tofile(folder / f"{split}-00000.bin")
        splits[split] = {
            "sources": [
                {
                    "name": name,
                    "documents": len(texts[name]),
                    "characters": 1,
                    "bytes": 1,
                    "tokens": len(some),
                }
                for name, some in packed.items()
            ],
            "files": [{"name": f"{split}-00000.bin", "tokens": len(ids), "sha256": ""}],
        }
    facts = {
        "format": 2, "dtype": "uint16", "vocab_size": tokenizer.vocab_size,
        "tokenizer_sha256": tokenizer.sha256, "splits": splits, "corpus": {},
    }  # fmt: skip
    return Shards(folder, Manifest.parse(facts))


class Rigged(Gemma):
    """A model that thinks it likelier which id follows which, and remembers what it was shown."""

    def __init__(self, config: GemmaConfig, follows: Mapping[int, int]) -> None:
        super().__init__(config.but(d_model=config.vocab_size, pattern=config.pattern[:1]))
        with torch.no_grad():
            self.model.embed_tokens.weight.copy_(torch.eye(config.vocab_size))
        self.follows = follows
        self.read: list[int] = []

    def hidden(self, ids: Tensor, *rest: Any, **more: Any) -> Tensor:
        super().hidden(ids, *rest, **more)  # the caches grow
        self.read += ids.flatten().tolist()
        known = torch.tensor([self.follows.get(number, 699) for number in range(self.config.vocab_size)])[ids]
        return 1.0 * (known[..., None] == torch.arange(self.config.vocab_size)).float()


class Idle(Gemma):
    """A model that may not be asked."""

    def hidden(self, ids: Tensor, *rest: Any, **more: Any) -> Tensor:
        raise AssertionError("something was computed")


def chain(ids: Sequence[int]) -> dict[int, int]:
    """Which id follows which, in a text without repetition."""
    assert len({*ids}) == len(ids)
    return dict(itertools.pairwise(ids))


def learnt(config: GemmaConfig, text: Sequence[int]) -> Gemma:
    """A model that was trained on every passage of a text, until it knew what comes."""
    torch.manual_seed(3)
    gemma = Gemma(config.but(init_std=0.1))
    length = HOW.prompt_tokens + HOW.continuation_tokens
    rows = torch.tensor([[BOS, *text[start : start + length]] for start in range(len(text) - length + 1)])
    known = rows[:, 4:].flatten()  # of the first ones nobody can know which they are
    optimizer = torch.optim.AdamW(gemma.parameters(), lr=1e-2)
    for _ in range(400):
        loss = torch.nn.functional.cross_entropy(gemma(rows[:, :-1])[:, 3:].flatten(0, 1), known)
        if loss < 0.01:
            return gemma.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"it has not learnt the text: {loss:.3f}")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="module")
def texts(tokenizer: Tokenizer, text_folder: Path) -> list[list[int]]:
    """Three texts of 60 tokens."""
    files = [text_folder / f"{number}.py" for number in range(3)]
    return [tokenizer.encode(path.read_text(encoding="utf-8"))[40:100] for path in files]


@pytest.fixture(scope="module")
def shards(tokenizer: Tokenizer, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Two sources to learn, each one document, and another text that is held out."""
    known, unknown, other = texts
    folder = tmp_path_factory.mktemp("shards")
    return pack(folder, tokenizer, {"known": [known], "unknown": [unknown]}, {"known": [other]})


@pytest.fixture(scope="module")
def trained(tiny: GemmaConfig, texts: list[list[int]]) -> Gemma:
    """It has learnt the first text, and nothing else."""
    return learnt(tiny, texts[0])


TEXT, OTHER = range(200, 240), range(300, 340)


@pytest.fixture
def one_text(tokenizer: Tokenizer, tmp_path: Path) -> Shards:
    """A text that a `Rigged` model may know, and one that it does not."""
    return pack(tmp_path / "one", tokenizer, {"a": [TEXT]}, {"a": [OTHER]})


def test_a_text_that_was_learnt_is_memorised_and_another_is_not(
    trained: Gemma, tokenizer: Tokenizer, texts: list[list[int]], tmp_path: Path
):
    alone = pack(tmp_path / "alone", tokenizer, {"a": texts[:1]}, {"a": texts[2:]})
    found = memorization(trained, tokenizer, alone, HOW)
    assert found.train["a"].rate("exact").value > 0.9
    assert found.held_out["a"].approximate == 0
    gap = found.to_dict()["difference"]["approximate"]
    assert gap["value"] > 0.9
    assert gap["low"] > 0.4


def test_sources_are_told_apart(trained: Gemma, tokenizer: Tokenizer, shards: Shards):
    found = memorization(trained, tokenizer, shards, HOW.but(samples=40))
    known, unknown = found.train["known"], found.train["unknown"]
    assert known.rate("exact").value > 0.9
    assert (unknown.prompts > 5, unknown.approximate) == (True, 0)
    assert known.prompts + unknown.prompts == 40
    told = found.to_dict()
    assert told["train"]["exact"]["count"] == known.exact
    assert told["sources"]["known"]["difference"]["exact"]["value"] > 0.9
    assert told["sources"]["unknown"]["train"]["exact"] == pytest.approx(
        {"count": 0, **unknown.rate("exact")._asdict()}, abs=1e-6
    )


def test_who_never_learnt_has_memorised_nothing(tiny: GemmaConfig, tokenizer: Tokenizer, shards: Shards):
    found = memorization(Gemma(tiny.but(init_std=0.4)).eval(), tokenizer, shards, HOW)
    assert Memorized.sum(found.train.values()) == Memorized(12, 0, 0, 0, Counter())


def test_the_batch_changes_nothing(trained: Gemma, tokenizer: Tokenizer, shards: Shards):
    counts = [memorization(trained, tokenizer, shards, HOW.but(max_batch=many)) for many in (1, 7, 100)]
    assert counts[0] == counts[1] == counts[2]


def test_the_prompt_is_read_after_bos_and_what_follows_it_is_not_shown(
    tiny: GemmaConfig, tokenizer: Tokenizer, one_text: Shards
):
    model = Rigged(tiny, {})
    memorization(model, tokenizer, one_text, HOW.but(samples=1, max_batch=1))
    (start,) = places(one_text, "train", HOW.but(samples=1)).tolist()
    prompt = one_text.read("train", start, start + 8).tolist()
    assert model.read[:18] == [BOS, *prompt, *[699] * 9]


def test_every_prompt_is_counted_as_it_is_done(tiny: GemmaConfig, tokenizer: Tokenizer, one_text: Shards):
    done: list[int] = []
    found = memorization(Rigged(tiny, chain(TEXT)), tokenizer, one_text, HOW, advance=done.append)
    assert sum(done) == 24
    assert found.train["a"].exact == 12
    assert found.held_out["a"].prompts == 12


@pytest.mark.parametrize(("early", "approximate"), [(1, 1), (2, 0)])
def test_a_continuation_that_ends_early_lacks_what_it_did_not_write(
    early: int, approximate: int, tiny: GemmaConfig, tokenizer: Tokenizer, tmp_path: Path
):
    """There is one place, and the model ends so many tokens too early; one in ten may differ.

    Had it been let go on, it would have written the last token.
    """
    text = TEXT[:18]
    alone = pack(tmp_path / "one", tokenizer, {"a": [text]}, {"a": [OTHER]})
    model = Rigged(tiny, chain(text) | {text[17 - early]: EOS, EOS: text[17]})
    found = memorization(model, tokenizer, alone, HOW.but(samples=1))
    assert (found.train["a"].exact, found.train["a"].approximate) == (0, approximate)


def brute(one: Sequence[int], two: Sequence[int]) -> int:
    """The definition, by recursion."""

    @functools.cache
    def apart(i: int, j: int) -> int:
        if not (i and j):
            return i + j
        same = apart(i - 1, j - 1) + (one[i - 1] != two[j - 1])
        return min(same, apart(i - 1, j) + 1, apart(i, j - 1) + 1)

    return apart(len(one), len(two))


few = st.lists(st.integers(0, 3), max_size=12)


@given(few, few)
def test_edits_are_counted_by_the_definition(one: list[int], two: list[int]):
    assert edit_distance(one, two) == brute(one, two)


@given(st.lists(st.integers(200, 203), min_size=1, max_size=12), st.data())
def test_what_is_exact_is_approximate_too(tokenizer: Tokenizer, truth: list[int], data: st.DataObject):
    written = data.draw(st.one_of(st.just(truth), st.lists(st.integers(200, 203), max_size=12)))
    allowed = data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    found = module._compared(tokenizer, [210], truth, written, allowed)
    assert found.exact == (written == truth)
    assert found.approximate == (brute(written, truth) <= allowed * len(truth))
    assert found.exact <= found.approximate


@pytest.mark.parametrize(("edits", "of"), [(5, 50), (3, 30), (29, 100), (7, 100)])
def test_as_many_edits_as_are_allowed_are_approximate(tokenizer: Tokenizer, edits: int, of: int):
    """0.29 * 100 is 28.999999999999996."""
    truth, allowed = list(range(200, 200 + of)), float(f"{edits / of:.2f}")

    def near(wrong: int) -> int:
        written = [500] * wrong + truth[wrong:]
        return module._compared(tokenizer, [210], truth, written, allowed).approximate

    assert (near(edits), near(edits + 1)) == (1, 0)


def whole(shards: Shards, length: int) -> list[int]:
    """Every place of the training text whose passage is inside a document, by looking at each."""
    tokens = shards.manifest.splits["train"].tokens
    ids = shards.read("train", 0, tokens).tolist()
    return [at for at in range(tokens - length + 1) if not {BOS, EOS} & {*ids[at : at + length]}]


@pytest.fixture
def uneven(tokenizer: Tokenizer, tmp_path: Path) -> Shards:
    """Documents of 17 to 30 tokens, where 18 are asked for, and an empty one."""
    some = [range(200, 200 + length) for length in (20, 17, 0, 30, 18)]
    return pack(tmp_path / "uneven", tokenizer, {"a": some[:2], "b": some[2:]}, {"a": [OTHER]})


def test_places_are_all_that_lie_inside_one_document(uneven: Shards):
    every = whole(uneven, 18)
    assert len(every) == 3 + 0 + 0 + 13 + 1
    assert places(uneven, "train", HOW.but(samples=17)).tolist() == every


def test_documents_are_found_wherever_reading_stops(uneven: Shards, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert places(uneven, "train", HOW.but(samples=17)).tolist() == whole(uneven, 18)


def test_every_place_is_as_likely_and_none_comes_twice(uneven: Shards):
    drawn = Counter[int]()
    for seed in range(400):
        some = places(uneven, "train", HOW.but(samples=5, seed=seed)).tolist()
        assert len({*some}) == 5
        drawn.update(some)
    expected = 400 * 5 / 17
    assert {*drawn} == {*whole(uneven, 18)}
    assert sum((count - expected) ** 2 / expected for count in drawn.values()) < 35  # chi-squared of 16


def test_the_seed_alone_says_which_places(shards_folder: Path):
    shards, how = Shards.open(shards_folder), MemorizationConfig(samples=50)
    first = places(shards, "train", how).tolist()
    assert places(shards, "train", how.but(max_batch=3, edit_distance=0.2)).tolist() == first
    assert places(shards, "train", how.but(seed=1)).tolist() != first


def test_too_short_a_split_is_refused_with_a_remedy(tiny: GemmaConfig, tokenizer: Tokenizer, uneven: Shards):
    with pytest.raises(ValueError, match=r"train has 17 places with 18 tokens .* samples=18\. Lower samples"):
        memorization(Idle(tiny), tokenizer, uneven, HOW.but(samples=18))


def test_too_short_a_control_is_refused_before_anything_is_computed(
    tiny: GemmaConfig, tokenizer: Tokenizer, tmp_path: Path
):
    short = pack(tmp_path / "short", tokenizer, {"a": [TEXT]}, {"a": [OTHER[:17]] * 9})
    with pytest.raises(ValueError, match="held_out has 0 places"):
        memorization(Idle(tiny), tokenizer, short, HOW.but(samples=1))


def test_more_than_the_context_holds_is_refused(tiny: GemmaConfig, tokenizer: Tokenizer, shards: Shards):
    with pytest.raises(
        ValueError, match=r"8 tokens of prompt and 56 more exceed the model's max_seq_len=64\. Lower"
    ):
        memorization(Idle(tiny), tokenizer, shards, HOW.but(continuation_tokens=56))


def test_the_context_may_be_filled(tiny: GemmaConfig, tokenizer: Tokenizer, tmp_path: Path):
    text = range(200, 263)
    full = pack(tmp_path / "full", tokenizer, {"a": [text]}, {"a": [range(300, 363)]})
    found = memorization(
        Rigged(tiny, chain(text)), tokenizer, full, HOW.but(samples=1, continuation_tokens=55)
    )
    assert found.train["a"].exact == 1


def test_shards_of_another_tokenizer_are_refused(tiny: GemmaConfig, tokenizer: Tokenizer, uneven: Shards):
    other = Shards(uneven.folder, uneven.manifest.but(tokenizer_sha256="0"))
    with pytest.raises(ValueError, match="another tokenizer than the model's"):
        memorization(Idle(tiny), tokenizer, other, HOW)
    with pytest.raises(ValueError, match="another tokenizer than the model's"):
        memorization(Idle(tiny.but(vocab_size=701)), tokenizer, uneven, HOW)


WHO = "jane.roe@mill.org"


@pytest.mark.parametrize(
    ("prompt", "truth", "written", "kinds"),
    [
        (" write to ", f"{WHO} soon", f"{WHO} soon", {"email": 1}),
        (" write to jane", f"{WHO[4:]} soon", f"{WHO[4:]} soon", {"email": 1}),
        (f" write to {WHO}", " very soon", " very soon", {}),
        (" write to ", f"{WHO} soon", "joan.roe@mill.org soon", {}),
        (" write to ", f"{WHO} soon", f"{WHO}, son", {"email": 1}),
        (" write to ", f"{WHO} or a{WHO}", f"{WHO} or a{WHO}", {"email": 1}),
        (" at ", f"{WHO} 4111 1111 1111 1111", f"{WHO} 4111 1111 1111 1111", {"card": 1, "email": 1}),
    ],
)
def test_personal_information_counts_where_the_continuation_completes_it_as_the_source_does(
    prompt: str, truth: str, written: str, kinds: dict[str, int], tokenizer: Tokenizer
):
    before, true, said = (tokenizer.encode(text) for text in (prompt, truth, written))
    found = module._compared(tokenizer, before, true, said, 0.9)
    assert (found.approximate, found.personal, dict(found.kinds)) == (1, int(bool(kinds)), kinds)


def test_what_is_not_memorised_holds_nothing_personal(tokenizer: Tokenizer):
    prompt, truth = tokenizer.encode(" write to "), tokenizer.encode(f"{WHO} soon")
    found = module._compared(tokenizer, prompt, truth, [*truth, *[500] * len(truth)], 0.1)
    assert (found.approximate, found.personal) == (0, 0)


def counted(hits: int, prompts: int) -> Memorized:
    return Memorized(prompts, hits, hits, 0, Counter())


def test_intervals_are_wilsons_and_newcombes():
    """Newcombe's own example (1998, table II, a): 56 of 70 less 48 of 80."""
    assert counted(0, 1000).rate("exact") == pytest.approx((0, 0, 0.003827), abs=1e-6)
    assert counted(10, 100).rate("exact") == pytest.approx((0.1, 0.05523, 0.17437), abs=1e-5)
    assert counted(9, 9).rate("exact") == pytest.approx((1, 0.70085, 1), abs=1e-5)
    assert counted(56, 70).above(counted(48, 80), "exact") == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_personal_information_is_a_share_of_what_was_memorised():
    found = Memorized(1000, 3, 8, 2, Counter(email=2))
    assert found.rate("personal").value == 2 / 8
    assert math.isnan(counted(0, 10).rate("personal").value)


def test_what_was_found_is_plain_data_and_a_line(tiny: GemmaConfig, tokenizer: Tokenizer, one_text: Shards):
    found = memorization(Rigged(tiny, chain(TEXT)), tokenizer, one_text, HOW)
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["train"]["exact"]["value"] == 1
    assert told["held_out"]["personal"] == {"count": 0}
    assert told["difference"]["approximate"]["value"] == 1
    assert found.told().startswith("12 prompts: exact 100.00 % (75.75 to 100.00) of the training text, ")
    assert found.told().endswith("; 0 of 12 memorised hold personal information")


def test_a_source_that_nothing_is_held_out_of_has_no_difference(
    tiny: GemmaConfig, tokenizer: Tokenizer, tmp_path: Path
):
    some = pack(tmp_path / "some", tokenizer, {"a": [TEXT], "b": [TEXT]}, {"a": [OTHER]})
    told = memorization(Rigged(tiny, chain(TEXT)), tokenizer, some, HOW).to_dict()["sources"]
    assert told["a"]["difference"]["exact"]["value"] == 1
    assert told["b"]["difference"]["exact"] == {}
    assert told["b"]["train"]["exact"]["value"] == 1
