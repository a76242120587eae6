"""`gemwright merge`: several checkpoints become one."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gemwright.cli.options import Fresh, Json, Out, Set, tell


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


def add(app: typer.Typer) -> None:
    """Hang the verb of this file into the command line."""
    app.command()(merge)
