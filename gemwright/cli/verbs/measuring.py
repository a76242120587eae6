"""`gemwright evaluate` and `ablate`: what a model is worth, and what a technique is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from gemwright.cli import options
from gemwright.cli.options import Fresh, Json, Quantised, tell


def evaluate(
    model: options.Model,
    text: Annotated[Path | None, typer.Option("--text", help="A text file in UTF-8: its perplexity.")] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option("--task", help="A benchmark file (.json, .jsonl, .csv, .tsv). Repeatable."),
    ] = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples a question; the report's number, or none.")
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option("--examples", help="File to draw them from; else the task's own other questions."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Ask only so many questions, spread over the file.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Ask as a user's turn, as a chat model expects it.")
    ] = False,
    memorized: Annotated[
        Path | None,
        typer.Option(
            "--memorized", help="Folder of shards: how much of their text the model knows by heart."
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="Who else answers --prompts: a model, or a file of its replies."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="Who compares: a chat model, a reward model, or an endpoint's URL."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts for --judge: MT-bench's, Arena-hard's, any file."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--judge-model", help="Endpoint: the judge's name there.")
    ] = None,
    api_key_env: options.ApiKeyEnv = None,
    quantize: Annotated[
        Quantised | None,
        typer.Option("--quantize", help="With --text: round the weights too, and say what that costs."),
    ] = None,
    window: options.Window = None,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens read together; max_seq_len or 4096, the smaller."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Tokens between windows that overlap; by default they do not."),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", min=1, help="Answers written at a time.")] = 8,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of an answer.")] = 256,
    out: Annotated[
        Path | None, typer.Option("--out", help="Keep every answer here; a killed run then goes on.")
    ] = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Measure a model: perplexity, benchmarks, what it knows by heart, and who prefers its replies.

    --text scores every token once, in windows that begin with <bos>; with --quantize also what rounding the
    weights loses. --task knows multiple choice, numbers and words, code (run in a sandbox), TruthfulQA,
    CrowS-Pairs and Winogender by the form of the file, and asks with as many examples as the report did.
    --memorized continues passages of 50 tokens by 50. --judge compares its replies with another's, each pair
    in both orders. Every number has its interval.

    Example: gemwright evaluate runs/laptop/teacher --task arc_easy_test.json --limit 200
    """
    comparing = any(given is not None for given in (against, judge, prompts))
    if text is None and not task and memorized is None and not comparing:
        raise ValueError(
            "nothing to measure: give --text FILE, --task FILE, --memorized SHARDS, or --judge with "
            "--against and --prompts."
        )
    if comparing and task and out is not None:
        raise ValueError("--task and --judge keep different things in --out. Run them one after the other.")
    told: dict[str, Any] = {"model": model}
    lines: list[str] = []
    if text is not None:
        _perplexity(model, text, quantize, window, context, stride, told, lines)
    if task:
        _benchmarks(
            model, task, told, lines, shots=shots, examples=examples, limit=limit, chat=chat, out=out,
            max_batch=max_batch, max_tokens=max_tokens, window=window, fresh=fresh,
        )  # fmt: skip
    if memorized is not None:
        _memorized(model, memorized, window, told, lines)
    if comparing:
        _compared(
            model, against, judge, prompts, out, name, api_key_env, max_batch, max_tokens, fresh, told, lines
        )
    tell(as_json, told, "\n".join(lines))


def _perplexity(
    model: str, text: Path, quantize: Quantised | None, window: int | None, context: int | None,
    stride: int | None, told: dict[str, Any], lines: list[str],
) -> None:  # fmt: skip
    from dataclasses import asdict

    from gemwright.evaluate.perplexity import compare, perplexity, read_text
    from gemwright.generate.language_model import load
    from gemwright.generate.quantize import quantize as rounded
    from gemwright.generate.quantize import weight_bytes

    words = read_text(text)
    loaded = load(model, window=window)
    full, tokenizer = loaded.model, loaded.require_tokenizer()
    told |= {"text": str(text), "window": full.config.window}
    if quantize is None:
        score = perplexity(full, tokenizer, words, context=context, stride=stride)
        told |= asdict(score)
        lines.append(score.told())
        return
    other = rounded(full, quantize.value)
    score, less, lost = compare(full, other, tokenizer, words, context=context, stride=stride)
    told |= asdict(score) | {"weight_bytes": weight_bytes(full), "quantize": quantize.value}
    told |= {
        f"{key}_quantized": value for key, value in asdict(less).items() if key not in ("tokens", "bytes")
    }
    told |= {f"{key}_lost": value for key, value in asdict(lost).items() if key != "kl"}
    told |= {"kl": lost.kl, "weight_bytes_quantized": weight_bytes(other)}
    lines.append(
        f"{score.told()}\n{quantize.value}: perplexity {less.perplexity:.2f}, {lost.told()}; weights "
        f"{weight_bytes(full) / 1e6:,.1f} -> {weight_bytes(other) / 1e6:,.1f} MB"
    )


def _benchmarks(
    model: str, tasks: list[Path], told: dict[str, Any], lines: list[str], *, shots: int | None,
    examples: Path | None, limit: int | None, chat: bool, out: Path | None, max_batch: int, max_tokens: int,
    window: int | None, fresh: bool,
) -> None:  # fmt: skip
    from gemwright.evaluate.benchmark import BenchmarkConfig, measure, opened, run
    from gemwright.generate.language_model import load
    from gemwright.hub import fetch
    from gemwright.run import progress

    config = BenchmarkConfig(
        shots=shots, limit=limit, chat=chat, max_batch=max_batch, max_tokens=max_tokens, window=window
    )
    if out is not None:
        card, scores = run(config, out, fetch(model), tasks, examples=examples, fresh=fresh)
        told |= {"out": str(out), "seconds": card.seconds}
    else:
        benchmarks, pools = opened(tasks, examples)
        loaded, scores = load(model, window=window), []
        for benchmark, pool in zip(benchmarks, pools, strict=True):
            total = min(limit or len(benchmark.questions), len(benchmark.questions))
            with progress(benchmark.name, total, unit="questions") as advance:
                scores.append(measure(loaded, benchmark, config, pool, advance))
    told["scores"] = [score.to_dict() for score in scores]
    lines += [score.told() for score in scores]


def _memorized(model: str, shards: Path, window: int | None, told: dict[str, Any], lines: list[str]) -> None:
    from gemwright.data.shards import Shards
    from gemwright.evaluate.memorization import MemorizationConfig, memorization
    from gemwright.generate.language_model import load
    from gemwright.run import progress

    loaded, config = load(model, window=window), MemorizationConfig()
    with progress("continuing", 2 * config.samples, unit="passages") as advance:
        found = memorization(
            loaded.model, loaded.require_tokenizer(), Shards.open(shards), config, advance=advance
        )
    told["memorized"] = found.to_dict()
    lines.append(found.told())


def _compared(
    model: str, against: str | None, judge: str | None, prompts: Path | None, out: Path | None,
    name: str | None, api_key_env: str | None, max_batch: int, max_tokens: int, fresh: bool,
    told: dict[str, Any], lines: list[str],
) -> None:  # fmt: skip
    from gemwright.answer.comparing import ComparisonConfig, Party, run

    if against is None or judge is None or prompts is None or out is None:
        raise ValueError("a comparison needs all of --against, --judge, --prompts and --out.")
    config = ComparisonConfig().but(**{"sampling.max_tokens": max_tokens})
    party = Party(judge, name, options.api_key(api_key_env))
    card = run(config, out, prompts, model, against, party, max_batch=max_batch, fresh=fresh)
    found = card.results
    told |= {"out": str(out), "seconds": card.seconds, **found}
    win = found["win_rate"]
    lines.append(
        f"{model} against {against}: wins {found['win']:,}, ties {found['tie']:,}, losses {found['loss']:,} "
        f"of {found['pairs']:,}; win rate {100 * win['value']:.1f} % ({100 * win['low']:.1f} to "
        f"{100 * win['high']:.1f})\n{out / 'report.html'}"
    )


def ablate(
    study: Annotated[
        str | None, typer.Argument(help="Which study, or `all`; --list shows them.", show_default=False)
    ] = None,
    recipe: Annotated[
        options.Recipe, typer.Option("--recipe", help="Of which recipe.")
    ] = options.Recipe.LAPTOP,
    runs: Annotated[
        Path | None,
        typer.Option(
            "--runs", help="Folder of the recipe; runs/RECIPE by default. What lacks is made there."
        ),
    ] = None,
    corpus: options.Corpus = None,
    teacher: options.Teacher = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for all studies, which share runs; runs/ablate by default."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of every arm.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, and a third of the students' tokens and updates.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Show the studies, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Measure the report's ablations again: every arm with every seed, spread, a paired test, a plot.

    `gemwright ablate --list` shows the studies: the report's Tables 6 to 11, and some that it does not have.
    Each writes report.html with its question, the report's own row, ours and a verdict (same direction, not
    resolved, opposite); `all` runs every one and writes one page. Text, tokenizer and teacher are those of
    the recipe. Killed, the same command goes on; what is finished is kept, and studies share runs.

    Example: gemwright ablate distillation --recipe laptop --seeds 3
    """
    import json

    from gemwright.ablate.catalogue import STUDIES, run, run_all
    from gemwright.config import nearest
    from gemwright.recipes import laptop, workstation

    if listed or study is None:
        rows = {name: f"{one.table:9} {one.summary}" for name, one in STUDIES.items()}
        text = "\n".join(f"{name:16} {row}" for name, row in rows.items())
        data = [{"study": n, "table": one.table, "summary": one.summary} for n, one in STUDIES.items()]
        tell(as_json, {"studies": data}, text)
        return
    if study != "all" and study not in STUDIES:
        raise ValueError(f"there is no study {study!r}. {nearest(study, [*STUDIES, 'all'])}")
    root = runs or Path("runs") / recipe
    if recipe is options.Recipe.WORKSTATION:
        if corpus is None:
            raise ValueError("the workstation recipe needs your text: --corpus SOURCE, as it was run with.")
        base = workstation.base(root, corpus, teacher or workstation.TEACHER)
    else:
        base = laptop.base(root, Path(corpus) if corpus else None)
    home = out or Path("runs") / ("ablate-quick" if quick else "ablate")
    numbers = range(1 if quick else seeds)
    used = base.quick() if quick else base
    page = run_all(used, numbers, home) if study == "all" else run(study, used, numbers, home)
    data = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    for one in (data, *data.get("studies", {}).values()):
        one.pop("shown", None)  # what the page is drawn from
    tell(as_json, {**data, "page": str(page)}, f"{data['table']}\n\n{page}")


def add(app: typer.Typer) -> None:
    """Hang the verbs of this file into the command line."""
    app.command()(evaluate)
    app.command()(ablate)
