"""The study of merging: an average, SLERP and WARP against the policies that they were made of.

The laptop recipe's long form has all but the average: WARP's first iteration trained two policies from each
seed's SFT model, merged them by SLERP and went on; one long run took as many updates. Every model answers the
same held-out questions with the same draws; a reward model that no policy was trained for judges, too.

WARP's line (its end drawn back to the start) is compared with the long run where both are as far from the
start: the run's rewards at such a distance are read off its way there, on the prompts held back.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from gemwright.ablate.page import Finding, Plot
from gemwright.ablate.verdict import Claim, overall
from gemwright.config import Config
from gemwright.evaluate.answers import read_asked
from gemwright.generate.sampling import Sampling
from gemwright.merge import stage as merging
from gemwright.merge.stage import MergeConfig
from gemwright.model import checkpoint
from gemwright.posttrain.rlhf import WATCHED
from gemwright.recipes.base import Base
from gemwright.recipes.laptop_full import questions
from gemwright.recipes.laptop_full.stages import HELD_OUT
from gemwright.report import Series, mean_std, plus_minus
from gemwright.reward.scoring import measure
from gemwright.run import Card, RunFolder, read_card, read_metrics, run_stage
from gemwright.tokenizer.tokenizer import Tokenizer

MODELS = {
    "SFT, the start": "sft/{seed}",
    "a policy": "warp/{seed}/iterations/0/policy0",
    "another policy": "warp/{seed}/iterations/0/policy1",
    "their average": "{out}/average/{seed}",
    "their SLERP": "warp/{seed}/iterations/0/merged",
    "WARP": "warp/{seed}",
    "one long run": "rlhf/{seed}",
}
_PARENTS = ("a policy", "another policy")
COLUMNS = {
    "reward": "reward",
    WATCHED: "watched reward",
    "right": "right",
    "kl": "KL from the start",
    "tokens": "tokens a reply",
}
_ROADS = 5  # distances at which the two roads are compared


class MergingConfig(Config):
    """How the models are asked."""

    samples: PositiveInt = 2
    """Replies to every question, drawn."""
    max_tokens: PositiveInt = 40
    """Most tokens a reply."""
    max_batch: PositiveInt = 32
    """Conversations at a time."""
    seed: NonNegativeInt = 0
    """Of the draws."""


def find(base: Base, seeds: Sequence[int], home: Path) -> Finding:
    """The study of a recipe's finished long form, which lies beside the recipe's folder: `ROOT-full`.

    Seeds are those that the long form has; errors as `run`.
    """
    root = base.root
    runs = root if (root / "warp").exists() else root.with_name(f"{root.name.removesuffix('-full')}-full")
    return run(MergingConfig(), runs, home / "merging-models")


def run(config: MergingConfig, runs: Path, out: Path) -> Finding:
    """Merge and measure the models of a long form in `runs`; what is made lies in `out`.

    Raises:
        FileNotFoundError: `runs` is no finished long form of the laptop recipe.
    """
    seeds = sorted(path.name for path in (runs / "warp").glob("seed*"))
    if not seeds:
        raise FileNotFoundError(
            f"{runs} has no warp/seed0: it is no finished long form. `gemwright run laptop --full` makes one."
        )
    for seed in seeds:
        parents = [runs / MODELS[name].format(seed=seed) for name in _PARENTS]
        merging.run(MergeConfig(method="linear"), out / "average" / seed, parents)
    card = _measured(config, runs, out, seeds)
    return _finding(card, {s: _roads(runs, s) for s in seeds}, seeds)


def _places(runs: Path, out: Path, seed: str) -> dict[str, Path]:
    return {
        name: Path(place.format(seed=seed, out=out)) if "{out}" in place else runs / place.format(seed=seed)
        for name, place in MODELS.items()
    }


def _measured(config: MergingConfig, runs: Path, out: Path, seeds: Sequence[str]) -> Card:
    """The stage that asks every model the held-out questions."""

    def work(folder: RunFolder) -> dict[str, Any]:
        asked = read_asked(runs / "chats" / HELD_OUT)
        judges = {
            "reward": checkpoint.load_reward(runs / "reward"),
            WATCHED: checkpoint.load_reward(runs / "watched_reward"),
        }
        sampling = Sampling(temperature=1.0, max_tokens=config.max_tokens, seed=config.seed)
        found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in MODELS}
        with folder.progress("asking", len(seeds) * len(MODELS)) as advance:
            for seed in seeds:
                places = _places(runs, out, seed)
                anchor = checkpoint.load(places["SFT, the start"])
                tokenizer = Tokenizer.load(places["SFT, the start"])
                for name, place in places.items():
                    values, drawn = measure(
                        checkpoint.load(place), tokenizer, [one.turns for one in asked], sampling, judges,
                        anchor, samples=config.samples, max_batch=config.max_batch,
                    )  # fmt: skip
                    keys = [asked[number // config.samples].keys for number in range(len(drawn))]
                    hits = [
                        questions.right(reply.text, key)
                        for said, those in zip(drawn, keys, strict=True)
                        for reply, key in zip(said.replies, those, strict=False)
                        if key is not None
                    ]
                    means = {key: float(value.mean()) for key, value in values.items()}
                    found[name][seed] = means | {"right": float(np.mean(hits))}
                    advance(1)
        return {"models": found}

    inputs = {
        re.sub(r"\W+", "-", f"{name} {seed}"): place
        for seed in seeds
        for name, place in _places(runs, out, seed).items()
    }
    inputs |= {name: runs / name for name in ("reward", "watched_reward", "chats")}
    return run_stage("measure-merging", config, out / "measured", work, inputs=inputs)


def _roads(runs: Path, seed: str) -> dict[str, list[dict[str, float]]]:
    """Distance and reward along WARP's line and along the long run, on the prompts held back."""
    keys = ("kl", "reward", WATCHED)
    line = [{key: point[key] for key in keys} for point in read_card(runs / "warp" / seed).results["front"]]
    rows = [row for row in read_metrics(runs / "rlhf" / seed) if "held_back.kl" in row]
    return {
        "WARP": sorted(line, key=lambda point: point["kl"]),
        "one long run": [{key: row[f"held_back.{key}"] for key in keys} for row in rows],
    }


def apart(roads: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> list[float]:
    """What WARP's line has over the long run at some distances that both reach, beyond the start itself.

    The run's road is the best that it had at a distance or nearer: one may stop at any update.
    """
    line, single = roads["WARP"], sorted(roads["one long run"], key=lambda point: point["kl"])
    reach = min(line[-1]["kl"], single[-1]["kl"])
    at = np.linspace(0, reach, _ROADS + 1)[1:]
    ours = np.interp(at, [point["kl"] for point in line], [point[key] for point in line])
    best = np.maximum.accumulate([point[key] for point in single])
    theirs = np.interp(at, [point["kl"] for point in single], best)
    return (ours - theirs).tolist()


def _finding(card: Card, roads: Mapping[str, Any], seeds: Sequence[str]) -> Finding:
    models = card.results["models"]
    values = {
        name: {COLUMNS[key]: [models[name][seed][key] for seed in seeds] for key in COLUMNS}
        for name in MODELS
    }
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        stats = {key: mean_std(values[name][told]) for key, told in COLUMNS.items()}
        rows.append({"model": name, **stats, "kl": stats["kl"]["mean"], "kl_std": stats["kl"]["std"]})
    parents = {
        told: [sum(pair) / 2 for pair in zip(*(values[one][told] for one in _PARENTS), strict=True)]
        for told in COLUMNS.values()
    }
    gains = {
        told: [float(np.mean(apart(roads[seed], key))) for seed in seeds]
        for key, told in (("reward", COLUMNS["reward"]), (WATCHED, COLUMNS[WATCHED]))
    }
    nothing = {told: [0.0] * len(seeds) for told in gains}
    compared = values | {"the mean policy": parents, "WARP's line": gains, "the long run's": nothing}
    watched, right = COLUMNS[WATCHED], COLUMNS["right"]
    claims = [
        *(
            Claim(name, "the mean policy", watched, lower=False)
            for name in ("their average", "their SLERP", "WARP")
        ),
        Claim("WARP's line", "the long run's", COLUMNS["reward"], lower=False),
        Claim("WARP's line", "the long run's", watched, lower=False),
        Claim("WARP", "SFT, the start", right, lower=False),
        Claim("one long run", "SFT, the start", right, lower=False),
    ]
    judged = [claim.judged(compared) for claim in claims]
    table = [[row["model"], *(_cell(row, key, len(seeds)) for key in COLUMNS)] for row in rows]
    return Finding(
        study="merging",
        title="What merging gains",
        question="Two policies of WARP's first iteration, their average and SLERP, WARP's end, and one long "
        "run of as many updates. Every model answered the same held-out questions with the same draws. No "
        "policy was trained for the watched reward, and `right` is the truth behind both.",
        header=["", *COLUMNS.values()], table=table, rows=rows, report={}, claims=judged,
        verdict=overall(judged), seeds=list(seeds), seconds=card.seconds, code=card.code,
        plots=[
            Plot(
                "KL from the start, nats a conversation", COLUMNS[key],
                [
                    Series(f"{road}, {seed}", [p["kl"] for p in points], [p[key] for p in points])
                    for seed in seeds
                    for road, points in roads[seed].items()
                ],
            )
            for key in ("reward", WATCHED)
        ],
        notes=[
            "The lines are compared where both are as far from the start, on prompts held back; the run's "
            "best at a distance or nearer. WARP (arXiv 2406.16768) finds its line above the single run's at "
            "every distance, SLERP above the average in reward, and gains that stop at the third iteration.",
            "Seconds are those of the measurement: what it measures, the recipe's long form has made.",
        ],
        extra={"roads": roads},
    )  # fmt: skip


def _cell(row: Mapping[str, Any], key: str, seeds: int) -> str:
    stats = {"mean": row["kl"], "std": row["kl_std"], "seeds": seeds} if key == "kl" else row[key]
    return plus_minus(stats)
