"""`gemwright reward`, `rlhf`, `merge` and `warp`: from preference pairs to a model that is preferred."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gemwright.cli import options
from gemwright.cli.options import Fresh, Json, Out, Set, tell
from gemwright.cli.verbs.posttraining import Length, Rate

Reward = Annotated[
    Path, typer.Option("--reward", help="Folder of a reward model with the model's tokenizer.")
]
Watch = Annotated[
    Path | None,
    typer.Option("--watch", help="A second reward model, of other pairs, which only looks on."),
]
Prompts = Annotated[
    Path, typer.Option("--prompts", help="A folder of `gemwright prompts`, or a file of prompts: SFT's.")
]
Start = Annotated[Path, typer.Argument(help="Folder of a chat model (sft, on-policy).")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Prompts an update.")]
Samples = Annotated[int, typer.Option("--samples", min=2, help="Replies a prompt, judged side by side.")]
Beta = Annotated[float, typer.Option("--beta", min=0, help="What a nat of distance from the anchor costs.")]
Penalty = Annotated[float, typer.Option("--length-penalty", min=0, help="What a token of a reply costs.")]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", min=1, help="Most tokens of a reply; 128 or half a row, the smaller."),
]


def reward(
    model: Annotated[Path, typer.Argument(help="Folder of a chat model, best one larger than the policy.")],
    pairs: Annotated[
        Path,
        typer.Argument(help="A .jsonl or .jsonl.gz file with `chosen` and `rejected` conversations a line."),
    ],
    out: Out,
    held_out: Annotated[
        Path | None,
        typer.Option("--held-out", help="Pairs to measure on; by default a tenth of the prompts."),
    ] = None,
    average: Annotated[
        int, typer.Option("--average", min=1, help="WARM: train so many and average their weights.")
    ] = 1,
    epochs: Annotated[float, typer.Option("--epochs", min=0.001, help="How often a pair is seen.")] = 1.0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Updates, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pairs an update.")] = 32,
    seq_len: Length = None,
    lr: Rate = 1e-5,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a reward model on preference pairs: a scalar head on a chat model, by Bradley and Terry.

    A side is a list of messages, or a text with Human: and Assistant: as in HH-RLHF. Conversations may have
    several turns. Accuracy on pairs that were held back is told with its 95 % interval.

    Example: gemwright reward runs/laptop-full/chat_teacher pairs.jsonl --out out/reward
    """
    from gemwright.cli.verbs.posttraining import context
    from gemwright.config import parse_settings
    from gemwright.posttrain.reward import RewardConfig, run
    from gemwright.train.loop import TrainConfig

    given = {"steps": steps or 1, "batch_size": batch_size, "seq_len": seq_len or context(model)}
    changes = parse_settings(settings or [])
    train = TrainConfig.parse(given | {"optim": {"lr": lr}})
    config = RewardConfig(train=train, average=average).but(**changes)
    counted = None if steps or "train.steps" in changes else epochs
    card = run(config, out, model, pairs, held_out=held_out, epochs=counted, fresh=fresh)
    found = card.results
    text = f"{out}: {found['trained_on']:,} pairs"
    if "accuracy" in found:
        text += (
            f"; {found['accuracy']:.1%} ({found['accuracy_low']:.1%} to {found['accuracy_high']:.1%}) of "
            f"{found['measured_on']:,} others ranked rightly"
        )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


def rlhf(
    model: Start,
    reward: Reward,
    prompts: Prompts,
    out: Out,
    watch: Watch = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.")] = 200,
    batch_size: BatchSize = 16,
    samples: Samples = 4,
    beta: Beta = 0.1,
    length_penalty: Penalty = 0.0,
    seq_len: Length = None,
    max_tokens: MaxTokens = None,
    temperature: options.Temperature = 1.0,
    lr: Rate = 1e-5,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a chat model to write what a reward model likes: REINFORCE, leave-one-out, KL inside the reward.

    Several replies to a prompt are judged side by side; what was better than the others gets likelier. A
    second reward model (--watch) shows whether the first is being fooled. Curves are in OUT/report.html.
    Killed at any moment, the same command goes on.

    Example: gemwright rlhf out/sft --reward out/reward --prompts out/prompts --out out/rlhf
    """
    from gemwright.posttrain.rlhf import run

    given = (steps, batch_size, samples, beta, length_penalty, seq_len, max_tokens, temperature, lr)
    config = _config(model, *given).but(**_changes(settings))
    card = run(config, out, model, reward, prompts, watch=watch, fresh=fresh)
    found = card.results
    text = f"{out}: {config.train.steps} updates on {found['prompts']:,} prompts"
    if found["after"]:
        before, after = found["before"], found["after"]
        text += (
            f"; reward on others {before['reward']:.3f} -> {after['reward']:.3f} at {after['kl']:.2f} nats "
            f"from the start\n{out / 'report.html'}"
        )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


def warp(
    model: Start,
    reward: Reward,
    prompts: Prompts,
    out: Out,
    watch: Watch = None,
    policies: Annotated[int, typer.Option("--policies", min=1, help="Policies an iteration.")] = 2,
    iterations: Annotated[int, typer.Option("--iterations", min=1, help="How often they are merged.")] = 3,
    mu: Annotated[float, typer.Option("--mu", min=0, max=1, help="The anchors' step a policy's.")] = 0.01,
    eta: Annotated[
        float, typer.Option("--eta", min=0, max=1, help="How far a new start goes to the merged policy.")
    ] = 0.3,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates of one policy.")] = 200,
    batch_size: BatchSize = 16,
    samples: Samples = 4,
    beta: Beta = 0.1,
    length_penalty: Penalty = 0.0,
    seq_len: Length = None,
    max_tokens: MaxTokens = None,
    temperature: options.Temperature = 1.0,
    lr: Rate = 1e-5,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """RLHF of several policies, merged by SLERP and drawn back to the start, again and again (WARP).

    What comes out is a line of models that trade reward for nearness; OUT/report.html shows it, OUT holds its
    end, and `gemwright merge linear OUT --base MODEL --eta 0.5` makes any other. Killed, the same command
    goes on where it stopped.

    Example: gemwright warp out/sft --reward out/reward --prompts out/prompts --out out/warp
    """
    from gemwright.posttrain.warp import WarpConfig, run

    given = (steps, batch_size, samples, beta, length_penalty, seq_len, max_tokens, temperature, lr)
    one = _config(model, *given).but(mu=mu)
    changes = {"policies": policies, "iterations": iterations, "eta": eta}
    config = WarpConfig(rlhf=one).but(**changes).but(**_changes(settings))
    card = run(config, out, model, reward, prompts, watch=watch, fresh=fresh)
    found = card.results
    text = f"{out}: {found['updates']:,} updates of {policies} policies in {iterations} iterations"
    if found["front"]:
        first, last = found["front"][0], found["front"][-1]
        text += (
            f"; reward on others {first['reward']:.3f} -> {last['reward']:.3f} at {last['kl']:.2f} nats from "
            f"the start\n{out / 'report.html'}"
        )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


class How(StrEnum):
    """The methods there are."""

    LINEAR = "linear"
    EMA = "ema"
    TASK = "task"
    SLERP = "slerp"


class Numbers(StrEnum):
    """The number formats that can be asked for."""

    FP32 = "fp32"
    BF16 = "bf16"


def merge(
    method: Annotated[
        How,
        typer.Argument(
            help="Average; moving average, in the order given; sum of task vectors on a base; arc between "
            "task vectors, layer by layer."
        ),
    ],
    models: Annotated[
        list[Path], typer.Argument(help="Folders of the checkpoints: ours, or Hugging Face's.")
    ],
    out: Out,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The checkpoint that their training began from: slerp, task, --eta."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            help="A number a model, as in 0.3,0.7: shares, equal by default; of task factors, 1 by default.",
        ),
    ] = None,
    mu: Annotated[
        float | None, typer.Option("--mu", min=0, max=1, help="ema: what each next model counts; 0.01.")
    ] = None,
    eta: Annotated[
        float, typer.Option("--eta", min=0, max=1, help="How far to go from the base to the merged model.")
    ] = 1.0,
    dtype: Annotated[
        Numbers | None,
        typer.Option("--dtype", help="Number format to write; the models', fp32 where they differ."),
    ] = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Merge checkpoints into one, a few megabytes at a time, in fp32.

    An average of models that began as one keeps what they share. slerp keeps the length of what each has
    learnt too, which an average shrinks; --eta below 1 then goes part of the way, back to the base (WARP).

    Example: gemwright merge slerp out/sft out/op --base runs/laptop-full/distilled --out out/merged
    """
    from gemwright.config import parse_settings
    from gemwright.merge.stage import MergeConfig, run

    if mu is not None and method is not How.EMA:
        raise ValueError(f"--mu is of a moving average, and {method} is none. Leave it out, or take ema.")
    given: dict[str, Any] = {"method": method.value, "eta": eta}
    given |= {"mu": mu} if mu is not None else {}
    given |= {"weights": _numbers(weights)} if weights is not None else {}
    given |= {"dtype": dtype.value} if dtype else {}
    config = MergeConfig.parse(given).but(**parse_settings(settings or []))
    card = run(config, out, models, base=base, fresh=fresh)
    found = card.results
    lines = [f"{out}: {len(models)} models, {found['parameters']:,} parameters in {found['dtype']}"]
    if config.method == "slerp":
        lines.append(_angles(found["angles"]))
    else:
        lines.append("each counts: " + ", ".join(f"{share:.4g}" for share in found["coefficients"]))
    if config.eta < 1:
        lines.append(f"{config.eta:g} of the way from {base}")
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, "\n".join(lines))


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--weights {text!r} is not a list of numbers. Write one a model, with commas: --weights 0.3,0.7."
        ) from None


def _angles(angles: dict[str, float | None]) -> str:
    """Between which angles the task vectors stand, and where: in the layers, and beside them."""
    layers = [angle for key, angle in angles.items() if key.startswith("layers.") and angle is not None]
    told = [f"{min(layers):.1f} to {max(layers):.1f} degrees in the layers"] if layers else []
    told += [
        f"{angle:.1f} in {key.removeprefix('model.').removesuffix('.weight')}"
        for key, angle in angles.items()
        if not key.startswith("layers.") and angle is not None
    ]
    return "angles between task vectors: " + (", ".join(told) or "none, as no two models moved")


def _config(
    model: Path, steps: int, batch_size: int, samples: int, beta: float, length_penalty: float,
    seq_len: int | None, max_tokens: int | None, temperature: float, lr: float,
) -> Any:  # fmt: skip
    from gemwright.cli.verbs.posttraining import context
    from gemwright.generate.sampling import Sampling
    from gemwright.posttrain.rlhf import RlhfConfig
    from gemwright.train.loop import TrainConfig

    length = seq_len or context(model)
    train = {"steps": steps, "batch_size": batch_size, "seq_len": length, "optim": {"lr": lr}}
    most = max_tokens or min(128, length // 2)
    return RlhfConfig(
        train=TrainConfig.parse(train), samples=samples, beta=beta, length_penalty=length_penalty,
        sampling=Sampling.parse({"max_tokens": most, "temperature": temperature}),
    )  # fmt: skip


def _changes(settings: list[str] | None) -> dict[str, Any]:
    from gemwright.config import parse_settings

    return parse_settings(settings or [])


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(reward)
    app.command()(rlhf)
    app.command()(merge)
    app.command()(warp)
