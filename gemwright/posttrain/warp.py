"""WARP: several policies, merged and drawn back to where they began, again and again (arXiv 2406.16768).

An iteration trains M policies from one start, which differ in the order of the prompts and the draws alone,
each with a moving average of itself as its KL anchor; turns their task vectors into one by SLERP, layer by
layer; and goes a part of the way there, from where the next iteration begins:

    theta_m <- RLHF(start, anchor: EMA of theta_m)          m = 1 .. M
    slerp   <- start + SLERP(theta_1 - start, ..., theta_M - start)
    start   <- (1 - eta) start + eta slerp

The report (section 4) cites it for averaging "different models obtained by running our pipeline". What comes
out is a line from the model that it all began with to the last slerp, on which reward is traded for nearness:
each of its points is a model. Here they are measured; the end of the line is what is left in the folder, and
`gemwright merge linear OUT --base START --eta 0.5` makes any other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt

from gemwright.config import Config
from gemwright.device import pick_device
from gemwright.merge import stage as merging
from gemwright.merge.stage import MergeConfig, prepared
from gemwright.model import checkpoint
from gemwright.posttrain import rlhf
from gemwright.posttrain.drawn import PromptOrder
from gemwright.posttrain.rlhf import WATCHED, RlhfConfig
from gemwright.report import Report, Series, text_table
from gemwright.reward.scoring import measure
from gemwright.run import Card, RunFolder, run_stage
from gemwright.tokenizer.tokenizer import Tokenizer

STAGE = "warp"
_SEEDS_APART = 1000  # of the policies' seeds: no two of a run are alike


class WarpConfig(Config):
    """How many policies, how often, and how far."""

    rlhf: RlhfConfig
    """One policy's training. Its `mu` moves the anchor."""
    policies: PositiveInt = 2
    """M: policies an iteration. WARP's is 2."""
    iterations: PositiveInt = 3
    """I. WARP has 5, and finds that gains stop at 3."""
    eta: float = Field(default=0.3, gt=0, le=1)
    """How far the next start goes towards the merged policy. WARP's is 0.3."""
    front: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """The points of the last line that are measured."""


def run(
    config: WarpConfig, out: Path, model: Path, reward: Path, prompts: Path, *, watch: Path | None = None,
    fresh: bool = False,
) -> Card:  # fmt: skip
    """Go through all iterations from the chat model `model`; arguments and errors as `rlhf.run`.

    In `out` lie the last merged policy as a checkpoint, `report.html` with the front, and every policy, merge
    and start in `iterations/`, each a stage of its own: killed, the same command goes on where it stopped.
    """
    tokenizer, asked = rlhf.opened(config.rlhf, model, reward, prompts, watch)

    def work(folder: RunFolder) -> dict[str, Any]:
        start = model
        angles: list[dict[str, float | None]] = []
        for iteration in range(config.iterations):
            home = folder.path / "iterations" / str(iteration)
            policies = [home / f"policy{number}" for number in range(config.policies)]
            for number, policy in enumerate(policies):
                rlhf.run(
                    _policy(config, iteration, number), policy, start, reward, prompts, watch=watch,
                    start=model,
                )  # fmt: skip
            if iteration == config.iterations - 1:
                found = prepared(MergeConfig(method="slerp"), policies, start)(folder)
                angles.append(found["angles"])
                break
            card = merging.run(MergeConfig(method="slerp"), home / "merged", policies, base=start)
            angles.append(card.results["angles"])
            line = MergeConfig(method="linear", eta=config.eta)
            merging.run(line, home / "next_start", [home / "merged"], base=start)
            start = home / "next_start"
        points = _front(config, model, folder.path, tokenizer, {"reward": reward, WATCHED: watch}, asked)
        _report(folder.path, points)
        updates = config.iterations * config.policies * config.rlhf.train.steps
        return {"front": points, "angles": angles, "updates": updates, "held_back": len(asked.held_back)}

    named = {"model": model, "reward": reward, "prompts": prompts, "watch": watch}
    return run_stage(
        STAGE, config, out, work, inputs={name: path for name, path in named.items() if path}, fresh=fresh,
        next_step=f"gemwright merge linear {out} --base {model} --eta 0.5 --out OUT",
    )  # fmt: skip


def _policy(config: WarpConfig, iteration: int, number: int) -> RlhfConfig:
    """One policy's training: its own order of the prompts, and its own draws."""
    place = iteration * config.policies + number
    if not place:
        return config.rlhf
    seed, order = config.rlhf.seed, config.rlhf.train.seed
    return config.rlhf.but(
        **{"seed": seed + _SEEDS_APART * place, "train.seed": order + _SEEDS_APART * place}
    )


def _front(
    config: WarpConfig, start: Path, end: Path, tokenizer: Tokenizer, judges: Mapping[str, Path | None],
    asked: PromptOrder,
) -> list[dict[str, float]]:  # fmt: skip
    """Rewards, and the distance from the start, of points on the line to the end; on prompts held back."""
    if not asked.held_back:
        return []
    device = pick_device()
    anchor, last = (checkpoint.load(f, dtype=torch.float32, device=device) for f in (start, end))
    rewards = {
        name: checkpoint.load_reward(folder, device=device) for name, folder in judges.items() if folder
    }
    points: list[dict[str, float]] = []
    for eta in config.front:
        policy = checkpoint.load(start, dtype=torch.float32, device=device)
        with torch.no_grad():
            for mine, its in zip(policy.parameters(), last.parameters(), strict=True):
                mine.lerp_(its, eta)
        found, _ = measure(
            policy, tokenizer, asked.held_back, config.rlhf.sampling, rewards, anchor,
            samples=config.rlhf.measured_samples, max_batch=config.rlhf.max_batch,
        )  # fmt: skip
        points.append({"eta": eta, **{name: float(values.mean()) for name, values in found.items()}})
    return points


def _report(folder: Path, points: Sequence[Mapping[str, float]]) -> Path:
    header = list(points[0]) if points else ["eta"]
    rows = [[f"{value:.3f}" for value in point.values()] for point in points]
    page = Report("WARP: reward and distance", {"front": list(points), "table": text_table(header, rows)})
    page.text(
        "Points of the line from the first model (eta 0) to the last merged policies (eta 1), on prompts "
        "held back: the reward trained for, one that only looked on, and the distance from the first model."
    )
    page.table(header, rows)
    lines = [
        Series(name, [point["kl"] for point in points], [point[name] for point in points])
        for name in ("reward", WATCHED)
        if name in header
    ]
    if lines:
        page.plot(lines, x="KL from the start, nats a conversation", y="reward")
    return page.write(folder)
