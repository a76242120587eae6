"""`gemwright answer`, `sft` and `on-policy`: from prompts and a teacher to a chat model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gemwright.cli import options
from gemwright.cli.options import Fresh, Json, Out, Set, tell

Teacher = Annotated[
    Path | None,
    typer.Option("--teacher", help="Folder of a teacher with the student's tokenizer, to run along."),
]
Length = Annotated[
    int | None,
    typer.Option("--seq-len", min=2, help="Tokens a row; the model's max_seq_len or 1024, the smaller."),
]
Rate = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]


def answer(
    teacher: Annotated[
        str,
        typer.Argument(
            help="A checkpoint's folder or OWNER/NAME; or the URL of an OpenAI-compatible endpoint, as in "
            "http://localhost:8000/v1."
        ),
    ],
    prompts: Annotated[
        Path,
        typer.Argument(help="A folder of `gemwright prompts`; or a file, .jsonl or .txt, a prompt a line."),
    ],
    out: Out,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Answers a prompt.")] = 1,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer, if the context has room.")
    ] = 512,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = None,
    seed: options.Seed = 0,
    quantize: options.Quantize = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Conversations at a time.")] = 32,
    name: Annotated[
        str | None,
        typer.Option("--model", help="Endpoint: the model's name there; the only one by default."),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="Endpoint: requests at a time.")
    ] = 8,
    api_key_env: options.ApiKeyEnv = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Let a teacher answer prompts, turn by turn; then filter what it wrote, and say of each drop why.

    Dropped are empty and cut answers, personal information, unsafe text, a model that introduces itself, and
    duplicates. Hedging, refusal and attribution are tagged, and can be weighted: --set weights.refusal=2.
    OUT/answers.jsonl has a conversation a line. Killed, the same command goes on where it stopped.

    Example: gemwright answer runs/laptop-full/chat_teacher runs/laptop-full/prompts --out out/answers
    """
    from gemwright.answer.stage import AnswersConfig, run
    from gemwright.config import parse_settings
    from gemwright.generate.sampling import Sampling

    sampling: dict[str, Any] = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed,
    }  # fmt: skip
    key = options.api_key(api_key_env)
    config = AnswersConfig.parse(
        {"samples": samples, "sampling": Sampling.parse(sampling).to_dict()}
        | {"quantize": quantize.value if quantize else None}
    ).but(**parse_settings(settings or []))
    card = run(
        config, out, teacher, prompts, max_batch=max_batch, concurrency=concurrency, model=name,
        api_key=key, fresh=fresh,
    )  # fmt: skip
    found = card.results
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in found["dropped"].items())
    text = (
        f"{out}: {found['kept']:,} answers to {found['prompts']:,} prompts kept; dropped: "
        f"{dropped or 'none'}\n{out / 'report.html'}"
    )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


def sft(
    model: Annotated[Path, typer.Argument(help="Folder of the checkpoint to begin with.")],
    answers: Annotated[
        Path,
        typer.Argument(help="A folder of `gemwright answer`, or a .jsonl file with `messages` a line."),
    ],
    out: Out,
    teacher: Teacher = None,
    targets: Annotated[
        Path | None,
        typer.Option("--targets", help="What a teacher left on disk about these answers (label)."),
    ] = None,
    epochs: Annotated[
        float, typer.Option("--epochs", min=0.001, help="How often every conversation is seen.")
    ] = 2.0,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Updates, instead of epochs.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows an update.")] = 16,
    seq_len: Length = None,
    lr: Rate = 1e-4,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Fine-tune on conversations: loss on the model's turns alone, <end_of_turn><eos> on the last.

    Conversations are packed whole, several a row, and see nothing of each other. By default the next token is
    learnt; with --teacher or --targets a teacher's whole distribution on the same tokens. Killed at any
    moment, the same command goes on to the same bits.

    Example: gemwright sft runs/laptop-full/distilled out/answers --out out/sft
    """
    from gemwright.config import parse_settings
    from gemwright.posttrain.sft import SftConfig, run
    from gemwright.train.loop import TrainConfig

    length = seq_len or context(model)
    given = {"steps": steps or 1, "batch_size": batch_size, "seq_len": length, "optim": {"lr": lr}}
    changes = parse_settings(settings or [])
    config = SftConfig(train=TrainConfig.parse(given)).but(**changes)
    counted = None if steps or "train.steps" in changes else epochs
    card = run(config, out, model, answers, epochs=counted, teacher=teacher, targets=targets, fresh=fresh)
    found = card.results
    text = f"{out}: {found['epochs']:.2f} epochs of {found['conversations']:,} conversations"
    if found.get("validation") is not None:
        text += f"; {found['validation_before']:.3f} -> {found['validation']:.3f} nats a token on others"
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


def on_policy(
    model: Annotated[Path, typer.Argument(help="Folder of the student, a chat model.")],
    teacher: Annotated[
        Path, typer.Option("--teacher", help="Folder of a chat model with the student's tokenizer.")
    ],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A folder of `gemwright prompts`, or a file of prompts.")
    ],
    out: Out,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Updates.")] = 200,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Conversations an update.")] = 16,
    seq_len: Length = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Most tokens of a reply; 128 or half a row, the smaller."),
    ] = None,
    temperature: options.Temperature = 1.0,
    lr: Rate = 1e-4,
    beta: Annotated[
        float, typer.Option("--beta", min=0, max=1, help="1 reverse KL, 0 forward KL, between them JSD.")
    ] = 1.0,
    share: Annotated[
        float,
        typer.Option("--lambda", min=0, max=1, help="Share of updates on the student's own words."),
    ] = 1.0,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="Conversations for the other updates.")
    ] = None,
    settings: Set = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Let the student answer, and the teacher grade every token of it over the whole vocabulary (GKD).

    The student learns where its own words lead, which answers of the teacher never show it. Begin with a
    model that can chat (sft). Killed at any moment, the same command goes on.

    Example: gemwright on-policy out/sft --teacher my_teacher --prompts out/prompts --out out/student
    """
    from gemwright.config import parse_settings
    from gemwright.generate.sampling import Sampling
    from gemwright.posttrain.on_policy import OnPolicyConfig, run
    from gemwright.train.loop import TrainConfig
    from gemwright.train.teacher import ObjectiveConfig

    length = seq_len or context(model)
    train = {"steps": steps, "batch_size": batch_size, "seq_len": length, "optim": {"lr": lr}}
    config = OnPolicyConfig(
        train=TrainConfig.parse(train),
        objective=ObjectiveConfig(beta=beta),
        on_policy=share,
        sampling=Sampling.parse(
            {"max_tokens": max_tokens or min(128, length // 2), "temperature": temperature}
        ),
    ).but(**parse_settings(settings or []))
    card = run(config, out, model, teacher, prompts, answers=answers, fresh=fresh)
    found = card.results
    text = f"{out}: {config.train.steps} updates on {found['prompts']:,} prompts"
    if found.get("validation") is not None:
        text += (
            f"; divergence from the teacher on others: {found['validation_before']:.3f} -> "
            f"{found['validation']:.3f} nats a token"
        )
    tell(as_json, {"out": str(out), "seconds": card.seconds, **found}, text)


def context(model: Path) -> int:
    """Tokens a row where none are told."""
    from gemwright.model.checkpoint import load_config

    return min(1024, load_config(model).max_seq_len)


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(answer)
    app.command()(sft)
    app.command("on-policy")(on_policy)
