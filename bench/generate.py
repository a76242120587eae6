"""How fast does a model answer on this machine, next to transformers and llama.cpp on the same weights?

A Gemma 2 of 0.45B parameters with 256,000 pieces and random weights, made here: prefill and decoding at batch
1, a long prompt under a short window, eight ragged requests through the scheduler, speculative decoding, and
the first token of `gemwright chat` from a cold start. Each implementation has a process of its own, and they
take turns, round after round; the median counts. The greedy ids of all fp32 implementations must be equal.

    python -m bench.generate --json
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.turns import Ask, in_turns
from gemwright.model.config import size

CONFIG = size("200m").but(window=512)
SHORT, LONG, NEW, MANY = 512, 4096, 48, 96
RAGGED = (32, 512, 64, 256, 96, 128, 384, 48)
LOOKAHEADS = (2, 4)
THREADS = os.cpu_count() or 1
ACCEPTED = 0.7
"""How often the target should keep what the draft proposes."""


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random ids after <bos>, none of them a control token."""
    ids = torch.randint(1000, CONFIG.vocab_size, (length - 1,), generator=torch.Generator().manual_seed(seed))
    return [2, *ids.tolist()]


def write_models(folder: Path) -> None:
    """The model, its GGUF files, and a pair that agrees as often as it should."""
    from gemwright.export.gguf import write_gguf
    from gemwright.model import checkpoint
    from gemwright.model.gemma import Gemma

    torch.manual_seed(0)
    checkpoint.save(Gemma(CONFIG), folder / "model")
    write_tokenizer(folder / "model")
    for kind in ("f32", "q8_0"):
        write_gguf(folder / "model", folder / f"{kind}.gguf", kind)
    target, draft = pair()
    checkpoint.save(target, folder / "target")
    checkpoint.save(draft, folder / "draft")


def pair() -> tuple[Any, Any]:
    """A target, and a draft of a tenth of its parameters with which it agrees `ACCEPTED` of the time.

    Random models never agree. So the layers of both add next to nothing, though they cost all they cost, and
    the target's embeddings are the draft's beside noise: the more noise, the rarer they agree.
    """
    from gemwright.model.gemma import Gemma

    torch.manual_seed(1)
    small = size("6m").but(d_model=160, d_ff=640, vocab_size=CONFIG.vocab_size, window=CONFIG.window)
    target, draft = Gemma(CONFIG), Gemma(small)
    with torch.no_grad():
        for model in (target, draft):
            for name, weight in model.named_parameters():
                if "post_" in name:
                    weight.fill_(-0.999)  # 1 + w: what a layer adds to the residual stream
        wide, narrow = target.unembedding, draft.unembedding
        kept = narrow.shape[1]
        noise = wide[:, kept:] * (CONFIG.d_model / (CONFIG.d_model - kept)) ** 0.5
        low, high = 0.0, 2.0
        for _ in range(12):
            share = (low + high) / 2
            wide[:, :kept], wide[:, kept:] = narrow, noise * share
            # Both norms divide by the size of the whole vector; this makes the kept part as long in both.
            target.model.norm.weight.fill_((kept / CONFIG.d_model) ** 0.5 * (1 + share**2) ** 0.5 - 1)
            low, high = (share, high) if agreement(target, draft) > ACCEPTED else (low, share)
    return target, draft


def agreement(target: Any, draft: Any) -> float:
    """How often the target would keep a token of the draft: the mean of sum min(p, q) over some texts."""
    ids = torch.tensor([prompt(64, seed=1)])
    p, q = (model(ids)[0].softmax(-1) for model in (target, draft))
    return float(torch.minimum(p, q).sum(-1).mean())


def write_tokenizer(folder: Path) -> None:
    """A small tokenizer: the model's other rows are never asked for by text."""
    from gemwright.tokenizer.tokenizer import Tokenizer
    from gemwright.tokenizer.train import TokenizerConfig, train

    Tokenizer(train([inspect.getsource(argparse)] * 3, TokenizerConfig(vocab_size=800))).save(folder)


def make(name: str, folder: str) -> Ask:
    """One implementation, in its own process, that answers what it is asked; None is no answer."""
    return MAKERS[name](Path(folder))


def ours(folder: Path, quantize: str | None = None) -> Ask:
    """gemwright: a session, the scheduler, and speculative decoding."""
    from gemwright.generate.engine import Session
    from gemwright.generate.language_model import load
    from gemwright.generate.sampling import Sampling
    from gemwright.generate.scheduler import Scheduler

    model = load(folder / "model", quantize=quantize).model  # pyright: ignore[reportArgumentType]
    greedy = Sampling(max_tokens=NEW, stop_ids=())

    def single(length: int) -> dict[str, Any]:
        session = Session(model)
        session.feed(prompt(length))
        start = time.perf_counter()
        times, ids = [], []
        for token in session.decode(greedy):
            times.append(time.perf_counter())
            ids.append(token.id)
        kv = session.cache.bytes
        return {
            "prefill": times[0] - start,
            "token": (times[-1] - times[0]) / (NEW - 1),
            "ids": ids,
            "kv": kv,
        }

    def ragged(max_batch: int) -> dict[str, Any]:
        scheduler = Scheduler(model, max_batch=max_batch)
        for seed, length in enumerate(RAGGED):
            scheduler.submit(prompt(length, seed), greedy.but(max_tokens=MANY))
        start, kv = time.perf_counter(), 0
        while not scheduler.idle:
            scheduler.step()
            kv = max(kv, scheduler.kv_bytes)
        return {"seconds": time.perf_counter() - start, "kv": kv}

    def ask(question: str) -> Any:
        match question.split():
            case ["single", length] if int(length) == SHORT or quantize is None:
                return single(int(length))
            case ["ragged"]:
                return {batch: ragged(batch) for batch in (1, len(RAGGED))}

    return ask


def speculative(folder: Path) -> Ask:
    """gemwright: the target alone, and hurried along by the draft; drawn at temperature 1."""
    from gemwright.generate.engine import Session
    from gemwright.generate.language_model import load
    from gemwright.generate.sampling import Sampling
    from gemwright.generate.speculative import SpeculativeSession

    target, draft = (load(folder / name).model for name in ("target", "draft"))
    sampling = Sampling(max_tokens=MANY, temperature=1.0, stop_ids=())

    def seconds(session: Session) -> float:
        session.feed(prompt(SHORT))
        times = [time.perf_counter() for _ in session.decode(sampling)]
        return (times[-1] - times[0]) / (len(times) - 1)

    def ask(question: str) -> Any:
        if question != "speculative":
            return None
        answer: dict[int, Any] = {0: {"token": seconds(Session(target))}}
        for lookahead in LOOKAHEADS:
            session = SpeculativeSession(target, draft, lookahead=lookahead)
            answer[lookahead] = {"token": seconds(session), "accepted": session.acceptance}
        return answer

    return ask


def transformers(folder: Path) -> Ask:
    """transformers' own Gemma 2, eager attention: the only one that caps its scores on a CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder / "model", attn_implementation="eager", dtype=torch.float32
    )

    def run(length: int, new: int) -> tuple[float, Any]:
        ids = torch.tensor([prompt(length)])
        start = time.perf_counter()
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            return_dict_in_generate=True, eos_token_id=None,
        )  # fmt: skip
        return time.perf_counter() - start, found

    def ask(question: str) -> Any:
        match question.split():
            case ["single", length]:
                prefill, _ = run(int(length), 1)
                if int(length) == LONG:
                    return {"prefill": prefill}
                whole, found = run(int(length), NEW)
                kv = sum(
                    x.nbytes for layer in found.past_key_values.layers for x in (layer.keys, layer.values)
                )
                ids = found.sequences[0, int(length) :].tolist()
                return {"prefill": prefill, "token": (whole - prefill) / (NEW - 1), "ids": ids, "kv": kv}

    return ask


def llama_cpp(folder: Path, kind: str) -> Ask:
    """llama.cpp, by its own clock."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    settings = xllamacpp.CommonParams()
    settings.model.path = str(folder / f"{kind}.gguf")
    settings.n_ctx, settings.cpuparams.n_threads, settings.n_parallel = LONG + 256, THREADS, 1
    server = xllamacpp.Server(settings)

    def ask(question: str) -> Any:
        match question.split():
            case ["single", length] if int(length) == SHORT or kind == "f32":
                new = NEW if int(length) == SHORT else 1
                found = server.handle_completions({
                    "prompt": prompt(int(length)), "max_tokens": new, "temperature": 0, "top_k": 1,
                    "ignore_eos": True, "cache_prompt": False, "logprobs": 1,
                })  # fmt: skip
                clock = found["timings"]
                ids = [item["id"] for item in found["choices"][0]["logprobs"]["content"]]
                return {
                    "prefill": clock["prompt_ms"] / 1000,
                    "token": clock["predicted_per_token_ms"] / 1000,
                    "ids": ids,
                }

    return ask


MAKERS: dict[str, Callable[[Path], Ask]] = {
    "gemwright fp32": ours,
    "gemwright int8": lambda folder: ours(folder, "int8"),
    "transformers fp32": transformers,
    "llama.cpp fp32": lambda folder: llama_cpp(folder, "f32"),
    "llama.cpp q8_0": lambda folder: llama_cpp(folder, "q8_0"),
    "gemwright speculative": speculative,
}


def first_token(folder: Path) -> float:
    """Seconds from starting `gemwright chat` to the first letter of its answer."""
    start = time.perf_counter()
    chat = subprocess.Popen(
        [sys.executable, "-m", "gemwright.cli.main", "chat", str(folder / "model"), "--temperature", "1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert chat.stdin is not None
    assert chat.stdout is not None
    chat.stdin.write(b"hello\n")
    chat.stdin.close()
    chat.stdout.read(1)
    seconds = time.perf_counter() - start
    chat.kill()
    return seconds


def row(impl: str, precision: str, batch: int, length: int, **numbers: Any) -> dict[str, Any]:
    """One line of the result."""
    keys = ("draft", "prefill_s", "decode_tokens_per_s", "kv_mib")
    return {"impl": impl, "precision": precision, "batch": batch, "prompt_tokens": length} | {
        key: numbers.get(key) for key in keys
    }


def rows_of(answers: dict[str, dict[str, list[Any]]]) -> list[dict[str, Any]]:
    """All lines, of answers by name and question."""
    rows = []
    for name, asked in answers.items():
        impl, precision = name.split()
        for length in (SHORT, LONG):
            found = [answer for answer in asked[f"single {length}"] if answer]
            if found:
                numbers = {"prefill_s": round(statistics.median(one["prefill"] for one in found), 3)}
                if length == SHORT:
                    token = statistics.median(one["token"] for one in found)
                    numbers["decode_tokens_per_s"] = round(1 / token, 2)
                if "kv" in found[0]:
                    numbers["kv_mib"] = round(found[0]["kv"] / 2**20, 2)
                rows.append(row(impl, precision, 1, length, **numbers))
        for batch in (1, len(RAGGED)):
            found = [answer[batch] for answer in asked["ragged"] if answer]
            if found:
                speed = len(RAGGED) * MANY / statistics.median(one["seconds"] for one in found)
                numbers = {"decode_tokens_per_s": round(speed, 2), "kv_mib": round(found[0]["kv"] / 2**20, 2)}
                rows.append(row(impl, precision, batch, sum(RAGGED) // len(RAGGED), **numbers))
        found = [answer for answer in asked["speculative"] if answer]
        for lookahead in found[0] if found else ():
            speed = 1 / statistics.median(one[lookahead]["token"] for one in found)
            draft = None
            if lookahead:
                accepted = statistics.mean(one[lookahead]["accepted"] for one in found)
                draft = {"lookahead": lookahead, "accepted": round(accepted, 3)}
            numbers = {"draft": draft, "decode_tokens_per_s": round(speed, 2)}
            rows.append(row("gemwright", "fp32", 1, SHORT, **numbers))
    return rows


def check(answers: dict[str, dict[str, list[Any]]]) -> None:
    """All fp32 implementations wrote the same ids, or it would be no comparison."""
    texts = {name: asked[f"single {SHORT}"][0]["ids"] for name, asked in answers.items() if "fp32" in name}
    assert len(set(map(tuple, texts.values()))) == 1, texts


def main() -> None:
    """Measure, and print a table or one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        kinds = [f"single {SHORT}", f"single {LONG}", "ragged", "speculative"]
        warm = [f"single {SHORT}"]
        questions = warm + kinds * options.rounds
        told = in_turns(tuple(MAKERS), make, (folder,), questions)
        answers = {
            name: {
                kind: [a for q, a in zip(questions[1:], said[1:], strict=True) if q == kind] for kind in kinds
            }
            for name, said in told.items()
        }
        check(answers)
        seconds = statistics.median(first_token(Path(folder)) for _ in range(options.rounds))
    rows = rows_of(answers)
    if options.json:
        print(json.dumps({"rows": rows, "first_token_s": round(seconds, 2)}))
        return
    for one in rows:
        print("  ".join(f"{key} {value}" for key, value in one.items() if value is not None))
    print(f"first token of a cold chat: {seconds:.2f} s")


if __name__ == "__main__":
    main()
