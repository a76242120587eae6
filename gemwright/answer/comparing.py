"""Chat quality by comparison: two models answer the same prompts, and a judge says whose replies are better.

The prompts are those of MT-bench (arXiv 2306.05685, two turns), Arena-hard (arXiv 2406.11939), or one's own.
Either side may be a file of replies that exist already. The judge is a chat model, here or behind an
endpoint, which sees every pair in both orders; or a reward model, which scores each conversation by itself.

While the stage runs, its `resume/` holds every conversation and every verdict that is over, a line each.
What is there is never asked for again. `model.jsonl` and `against.jsonl` keep the replies of models that
were asked: the next judge takes them in place of the models.
"""

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import model_validator

from gemwright.answer.endpoint import Endpoint, EndpointConfig, is_url
from gemwright.answer.prompts import Lines
from gemwright.answer.teacher import Answered, Conversations, answer
from gemwright.config import Config
from gemwright.data.conversations import ANSWERS
from gemwright.device import pick_device
from gemwright.evaluate import pairwise
from gemwright.evaluate.pairwise import JUDGED, SIDES, Outcome, Pair, Replies
from gemwright.generate.language_model import load
from gemwright.generate.quantize import Kind
from gemwright.generate.sampling import Sampling
from gemwright.hub import fetch
from gemwright.model import checkpoint
from gemwright.model.gemma import RewardModel
from gemwright.reading.prompts import Asked, Prompts, System, read_prompts
from gemwright.reward.scoring import scores
from gemwright.run import CARD, RESUME, Card, RunFolder, atomic, read_card, run_stage
from gemwright.tokenizer.chat import encode_conversation
from gemwright.tokenizer.tokenizer import MODEL_FILE, Tokenizer, require_utf8

STAGE = "compare"
_LOST = ("missing", "too_long", "refused_by_endpoint", "unanswered")  # nothing to judge
_SCORED = 64  # conversations that a reward model reads between two looks at the clock

Ask = Callable[[Conversations], Iterator[tuple[int, Answered]]]


class ComparisonConfig(Config):
    """How models and judge are asked."""

    sampling: Sampling = Sampling(max_tokens=1024)
    """How both write. Prompt n of P, from 0, draws with `seed` + n; what it is compared with, + P + n."""
    judging: Sampling = Sampling(max_tokens=1024)
    """How the judge writes; a reward model does not."""
    quantize: Kind | None = None
    """Weights in one byte each, of the language models that run here."""
    system: System = "fold"
    """A system message begins the user's first turn, or is an error."""
    endpoint: EndpointConfig = EndpointConfig()
    """How patiently endpoints are asked."""

    @model_validator(mode="after")
    def _can_be(self) -> "ComparisonConfig":
        for name in ("sampling", "judging"):
            if getattr(self, name).logprobs is not None:
                raise ValueError(f"{name}.logprobs: what is said is kept as text. Leave it out.")
        return self


@dataclass(frozen=True)
class Party:
    """Who answers, or judges."""

    where: str | Path
    """A checkpoint's folder or name on Hugging Face; the URL of an endpoint; of a side, a file of replies."""
    name: str | None = None
    """The model's name at the endpoint; the only one there if None."""
    api_key: str | None = field(default=None, repr=False)
    """For the endpoint. It is written nowhere."""


@dataclass(frozen=True)
class Judged:
    """What the judge makes of a pair."""

    outcome: Outcome | None
    """None where it could not be asked: `about` says why."""
    about: dict[str, Any]
    """What it said, for `judged.jsonl`."""
    verdicts: Any = None
    """Of both orders, if it knows orders."""


Pairs = Mapping[int, tuple[Asked, tuple[dict[str, Any], dict[str, Any]]]]
"""The prompt and what both sides made of it, by the prompt's number."""
Judge = Callable[[RunFolder, Pairs], dict[int, Judged]]


def run(
    config: ComparisonConfig,
    out: Path,
    prompts: Path,
    model: str | Path | Party,
    against: str | Path | Party,
    judge: str | Path | Party,
    *,
    max_batch: int = 8,
    concurrency: int = 8,
    fresh: bool = False,
) -> Card:
    """Let two models answer prompts and a judge compare them: leaves `judged.jsonl` and a report in `out`.

    Args:
        prompts: as `reading.prompts.read_prompts` takes them.
        model: whose win rate it is. Also a .jsonl file of conversations, or a folder of `gemwright
            answer`; see `pairwise.read_replies`.
        against: what it is compared with, likewise.
        judge: a chat model, or a reward model.
        max_batch: conversations at a time, of a model that runs here.
        concurrency: requests at a time, of each endpoint.
    Raises:
        FileNotFoundError: there are no such prompts, file, model or judge.
        ValueError: a line that is no prompt or no conversation, settings that a model cannot heed, a
            checkpoint of the wrong kind, or `out` holds other work, all before anything is asked. Or no pair
            is left to be judged, or no verdict can be read.
        PermissionError, ConnectionError: as `Endpoint.answer`; or some are left unanswered at the end. What
            is answered stays, and the same command asks for the rest.
    """
    asked = read_prompts(prompts, config.system)
    for prompt in asked.asked:
        try:
            require_utf8("".join(prompt.turns))
        except ValueError as error:
            raise ValueError(f"{prompts}, prompt {prompt.id}: {error}") from None
    with ExitStack() as stack:
        opened = _Opened(config, None if fresh else out, max_batch, concurrency, stack)
        sides = [
            opened.side(role, _party(one), asked) for role, one in zip(SIDES, (model, against), strict=True)
        ]
        referee = opened.judge(_party(judge))

        def work(folder: RunFolder) -> dict[str, Any]:
            replies = [side(folder) for side in sides]
            return _work(folder, asked.asked, replies, referee, opened.names)

        card = run_stage(
            STAGE, config.but(endpoint=EndpointConfig()), out, work, facts=opened.facts, fresh=fresh,
            inputs={"prompts": prompts, **opened.inputs},
        )  # fmt: skip
    shutil.rmtree(out / RESUME, ignore_errors=True)  # after the card: until then a kill may want it
    return card


def _party(one: str | Path | Party) -> Party:
    return one if isinstance(one, Party) else Party(one)


class _Opened:
    """Who takes part, found and checked; nothing is loaded or asked before the work begins."""

    def __init__(
        self, config: ComparisonConfig, known: Path | None, max_batch: int, concurrency: int, stack: ExitStack
    ) -> None:
        self.config, self.max_batch, self.concurrency, self.stack = config, max_batch, concurrency, stack
        self.known = read_card(known).inputs if known is not None and (known / CARD).exists() else {}
        self.inputs, self.facts, self.names = dict[str, Path](), dict[str, str](), dict[str, str]()

    def side(self, role: str, party: Party, prompts: Prompts) -> Callable[[RunFolder], Replies]:
        """How the replies of a side are come by."""
        path = Path(party.where)
        file = path / ANSWERS if (path / ANSWERS).is_file() else path
        if not is_url(party.where) and (file.suffix == ".jsonl" or file.is_file()):
            self._alone(role, party)
            self.inputs[role] = path
            found = pairwise.read_replies(file, prompts)
            return lambda _: found
        ask = self._asker(role, party, self.config.sampling)
        return lambda folder: _answers(folder, role, prompts, ask, self.config.endpoint)

    def judge(self, party: Party) -> Judge:
        """How pairs are judged."""
        if not is_url(party.where):
            folder = fetch(party.where)
            if checkpoint.load_kind(folder) is RewardModel:
                self._alone("judge", party)
                self.inputs["judge"] = _with_tokenizer(folder)
                return lambda stage, pairs: _scored(stage, pairs, folder)
        ask = self._asker("judge", party, self.config.judging)
        return lambda stage, pairs: _compared(stage, pairs, ask, self.config.endpoint)

    def _alone(self, role: str, party: Party) -> None:
        if party.name is not None:
            raise ValueError(
                f"{role}: a model's name is for an endpoint, and {party.where} is none. Leave it out."
            )
        self.names[role] = Path(party.where).name

    def _asker(self, role: str, party: Party, sampling: Sampling) -> Ask:
        setting = "judging" if role == "judge" else "sampling"
        if not is_url(party.where):
            self._alone(role, party)
            _refuse(setting, sampling, ("stop",), f"{role}, which runs here: its turns end by a token")
            self.inputs[role] = folder = _with_tokenizer(fetch(party.where))
            if checkpoint.load_kind(folder) is RewardModel:
                raise ValueError(f"{role}: {folder} is a reward model, which writes nothing. Let it judge.")

            def ask(conversations: Conversations) -> Iterator[tuple[int, Answered]]:
                loaded = load(folder, quantize=self.config.quantize)
                return answer(loaded, conversations, sampling, self.max_batch)

            return ask
        unknown = ("top_k", "min_p", "repetition_penalty", "stop_ids")
        _refuse(setting, sampling, unknown, f"{role}, an endpoint: its API has no such")
        url, key, many = str(party.where), party.api_key, self.concurrency
        endpoint = self.stack.enter_context(
            Endpoint(url, self.config.endpoint, api_key=key, concurrency=many)
        )
        # A finished folder needs no endpoint that is up.
        known = self.known.get(f"{role}_name", {}).get("value")
        self.names[role] = name = party.name or known or endpoint.only_model()
        self.facts |= {role: endpoint.url, f"{role}_name": name}
        return lambda conversations: endpoint.answer(conversations, sampling, name)


def _with_tokenizer(folder: Path) -> Path:
    if not (folder / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL_FILE}: it reads no text. Put the model's own there.")
    return folder


def _refuse(setting: str, sampling: Sampling, names: Sequence[str], why: str) -> None:
    for name in names:
        if getattr(sampling, name) != Sampling.model_fields[name].default:
            raise ValueError(f"{setting}.{name} has no place with {why}. Leave it out.")


def _ask(
    folder: RunFolder, what: str, todo: Mapping[int, Sequence[str]], lines: Lines, ask: Ask,
    how: EndpointConfig,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Ask for what is not among the lines, add it to them, and yield them all, in the order of their numbers.

    Raises:
        ConnectionError: some were left unanswered, and are not to be skipped.
    """
    missing = [number for number in todo if number not in lines.done]
    unanswered: list[dict[str, Any]] = []
    with folder.progress(what, len(todo), done=len(todo) - len(missing)) as advance:
        for number, one in ask((number, todo[number]) for number in missing) if missing else ():
            row = {"number": number, **vars(one)}
            if one.finish == "unanswered":
                unanswered.append(row)
                continue
            lines.append(row)
            advance(1)
    if unanswered and not how.skip_unanswered:
        raise ConnectionError(
            f"{what}: {len(unanswered):,} of {len(todo):,} are left unanswered; the last: "
            f"{unanswered[-1]['detail']}. The same command asks for them again, and with "
            "--set endpoint.skip_unanswered=true it finishes without those that fail once more."
        )
    for row in unanswered:
        lines.append(row)
    yield from _written(lines)


def _written(lines: Lines) -> Iterator[dict[str, Any]]:
    if lines.done:
        with open(lines.path, "rb") as file:
            for number in sorted(lines.done):
                file.seek(lines.done[number])
                yield json.loads(file.readline())


def _answers(folder: RunFolder, role: str, prompts: Prompts, ask: Ask, how: EndpointConfig) -> Replies:
    """Both sides draw with numbers of their own, so that a model can be compared with itself."""
    first = SIDES.index(role) * len(prompts.asked)
    todo = {first + number: prompt.turns for number, prompt in enumerate(prompts.asked)}
    lines = Lines(folder.path / RESUME / f"{role}.jsonl", key="number")
    found = {row["number"] - first: row for row in _ask(folder, f"{role} answers", todo, lines, ask, how)}
    rows = (
        {"id": prompts.asked[place].id, "messages": row["messages"], "finish": row["finish"]}
        for place, row in found.items()
    )
    _write(folder.path / f"{role}.jsonl", rows)
    return found


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with atomic(path) as partial, open(partial, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _texts(prompt: Asked, row: dict[str, Any]) -> list[str]:
    """The replies, one a turn; empty where a conversation ended before."""
    said = [message["content"] for message in row["messages"][1::2]]
    return [*said, *[""] * (len(prompt.turns) - len(said))]


def _compared(folder: RunFolder, pairs: Pairs, ask: Ask, how: EndpointConfig) -> dict[int, Judged]:
    """Show every pair in both orders: in conversation 2 n of pair n the model stands first."""
    todo: dict[int, Sequence[str]] = {}
    for place, (prompt, rows) in pairs.items():
        model, against = (_texts(prompt, row) for row in rows)
        todo[2 * place] = (pairwise.judge_prompt(prompt.turns, model, against),)
        todo[2 * place + 1] = (pairwise.judge_prompt(prompt.turns, against, model),)
    lines = Lines(folder.path / RESUME / "verdicts.jsonl", key="number")
    found = {row["number"]: row for row in _ask(folder, "judging", todo, lines, ask, how)}
    judged: dict[int, Judged] = {}
    for place in pairs:
        both = [found[2 * place], found[2 * place + 1]]
        failed = [row for row in both if row["finish"] in _LOST]
        if failed:
            judged[place] = _left_out("judge", failed[0])
            continue
        said = [row["messages"][-1]["content"] for row in both]
        verdicts = (pairwise.read_verdict(said[0]), pairwise.read_verdict(said[1]))
        judged[place] = Judged(pairwise.outcome(*verdicts), {"verdicts": verdicts, "said": said}, verdicts)
    return judged


def _scored(folder: RunFolder, pairs: Pairs, where: Path) -> dict[int, Judged]:
    """Score every conversation with a reward model, as far as it goes."""
    tokenizer, longest = Tokenizer.load(where), checkpoint.load_config(where).max_seq_len
    todo = {2 * place + side: rows[side] for place, (_, rows) in pairs.items() for side in (0, 1)}
    lines = Lines(folder.path / RESUME / "scores.jsonl", key="number")
    missing = [number for number in todo if number not in lines.done]
    with folder.progress("judging", len(todo), done=len(todo) - len(missing)) as advance:
        model = checkpoint.load_reward(where, device=pick_device()) if missing else None
        for start in range(0, len(missing), _SCORED):
            numbers = missing[start : start + _SCORED]
            texts = {n: encode_conversation(tokenizer, todo[n]["messages"])[0] for n in numbers}
            fitting = {n: ids for n, ids in texts.items() if len(ids) <= longest}
            assert model is not None
            values = dict(zip(fitting, scores(model, [*fitting.values()]).tolist(), strict=True))
            if not all(map(math.isfinite, values.values())):
                raise ValueError(f"{where} gives scores that are no numbers: it diverged, or is damaged.")
            for n in numbers:
                finish = "stop" if n in fitting else "too_long"
                lines.append({"number": n, "score": values.get(n), "tokens": len(texts[n]), "finish": finish})
                advance(1)
    found = {row["number"]: row["score"] for row in _written(lines)}
    judged: dict[int, Judged] = {}
    for place in pairs:
        both = [found[2 * place], found[2 * place + 1]]
        if None in both:
            judged[place] = _left_out("judge", {"finish": "too_long"})
            continue
        judged[place] = Judged(pairwise.outcome_of_scores(*both), {"scores": both})
    return judged


def _left_out(role: str, row: Mapping[str, Any]) -> Judged:
    detail = {"detail": row["detail"]} if row.get("detail") else {}
    return Judged(None, {"left_out": f"{role}_{row['finish']}", **detail})


def _work(
    folder: RunFolder, prompts: Sequence[Asked], sides: Sequence[Replies], referee: Judge,
    names: Mapping[str, str],
) -> dict[str, Any]:  # fmt: skip
    pairs: dict[int, tuple[Asked, tuple[dict[str, Any], dict[str, Any]]]] = {}
    judged: dict[int, Judged] = {}
    for place, prompt in enumerate(prompts):
        one, other = (side.get(place, {"finish": "missing"}) for side in sides)
        lost = [pair for pair in zip(SIDES, (one, other), strict=True) if pair[1]["finish"] in _LOST]
        if lost:
            judged[place] = _left_out(*lost[0])
        elif _texts(prompt, one) == _texts(prompt, other):
            judged[place] = Judged("tie", {"identical": True})
        else:
            pairs[place] = prompt, (one, other)
    judged |= referee(folder, pairs)
    rows, found = [], list[Pair]()
    told: dict[str, Any] = {"prompts": len(prompts), "cut": dict.fromkeys(SIDES, 0)}
    told["empty"] = dict.fromkeys(SIDES, 0)
    for place, prompt in enumerate(prompts):
        one = judged[place]
        row: dict[str, Any] = {"id": prompt.id, "turns": prompt.turns, "outcome": one.outcome, **one.about}
        if one.outcome is not None:
            texts = {role: _texts(prompt, side[place]) for role, side in zip(SIDES, sides, strict=True)}
            row["replies"] = texts
            for role, side in zip(SIDES, sides, strict=True):
                told["cut"][role] += side[place]["finish"] != "stop"
                told["empty"][role] += not all(reply.strip() for reply in texts[role])
            model, against = (sum(map(len, said)) / len(prompt.turns) for said in texts.values())
            found.append(Pair(one.outcome, (model, against), one.verdicts))
        rows.append(row)
    _write(folder.path / JUDGED, rows)
    told["left_out"] = dict(Counter(row["left_out"] for row in rows if "left_out" in row))
    told["identical"] = sum("identical" in row for row in rows)
    comparison = pairwise.Comparison(tuple(found))
    pairwise.require_verdicts(folder.path, comparison, told)
    told |= comparison.to_dict()
    pairwise.write_report(folder.path, comparison, told, names, rows)
    return told
