"""The laptop recipe's long form: where the demo ends, its models learn to chat.

Questions about the text's own functions and classes, whose answers can be checked, in a chat log as others
keep them: with unsafe, flagged and repeated prompts, and with another model's answers. The demo's teacher is
fine-tuned to answer; it answers the prompts that were kept; the filters look at what it wrote; the demo's
student learns from that in four ways, each with three seeds:

    SFT             the next token of the teacher's answers
    distilled SFT   the teacher's distribution on the same tokens
    on-policy       after SFT, the teacher's distribution on the student's own replies
    longer SFT      after SFT, as many updates more of the same: what on-policy has to beat

Then it goes on to preferences, RLHF and WARP (`rlhf.py`). All are asked questions about modules that no
stage has seen. The teacher is told some answers that it must
not give (that it is another's model, somebody's address), so that the filters have work to do.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from gemwright.answer import stage as answering
from gemwright.answer.stage import AnswersConfig
from gemwright.config import Config
from gemwright.curate import pipeline
from gemwright.curate.pipeline import PromptsConfig
from gemwright.data.curated import Curated
from gemwright.evaluate.answers import AnswersEvalConfig, judge, read_asked
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint
from gemwright.posttrain import on_policy, sft
from gemwright.posttrain.on_policy import OnPolicyConfig
from gemwright.posttrain.sft import SftConfig
from gemwright.recipes import laptop
from gemwright.recipes.laptop_full import questions
from gemwright.run import Card, RunFolder, run_stage, say, write_text
from gemwright.tokenizer.tokenizer import Tokenizer
from gemwright.train.loop import TrainConfig
from gemwright.train.optim import OptimConfig

SEEDS = (0, 1, 2)
ARMS = ("sft", "distilled_sft", "on_policy", "longer_sft")
SEQ_LEN = 128
LOG, LESSONS, HELD_OUT = "log.jsonl", "lessons.jsonl", "held_out.jsonl"
_SHOWN = 6  # prompts whose replies the report prints


class ChatsConfig(Config):
    """How many questions are made, and of whom they are asked."""

    lessons: PositiveInt = 12_000
    """Questions with their answers, that the teacher is fine-tuned on."""
    log: PositiveInt = 5000
    """Questions in the chat log, before the planted records."""
    held_out: PositiveInt = 300
    """Questions about held-out modules, for measuring."""
    slips: PositiveInt = 120
    """Questions to the assistant itself, in the lessons and in the log: their answers are to be dropped."""
    seed: int = 0
    """Of the questions."""


def chats() -> ChatsConfig:
    """Questions about different definitions for the teacher's lessons, the log and the measurement."""
    return ChatsConfig()


def prompts() -> PromptsConfig:
    """The filters of chat logs."""
    return PromptsConfig()


def chat_teacher() -> SftConfig:
    """The demo's teacher, fine-tuned to answer."""
    return SftConfig(
        train=TrainConfig(
            steps=1200, batch_size=16, seq_len=SEQ_LEN, optim=OptimConfig(lr=2e-3), validate_every=300,
            save_every=300, compile=False,
        ),
    )  # fmt: skip


def answers() -> AnswersConfig:
    """One answer a prompt, drawn from the teacher's own distribution."""
    return AnswersConfig(sampling=Sampling(temperature=1.0, max_tokens=40))


def student(seed: int) -> SftConfig:
    """The demo's student on the teacher's answers; whether distilled, the teacher decides."""
    return SftConfig(
        train=TrainConfig(
            steps=400, batch_size=16, seq_len=SEQ_LEN, optim=OptimConfig(lr=6e-3), validate_every=50,
            save_every=200, seed=seed, compile=False,
        ),
        seed=seed,
    )  # fmt: skip


def graded(seed: int) -> OnPolicyConfig:
    """The student on its own replies."""
    return OnPolicyConfig(
        train=TrainConfig(
            steps=300, batch_size=32, seq_len=SEQ_LEN, optim=OptimConfig(lr=3e-3), validate_every=50,
            save_every=100, seed=seed, compile=False,
        ),
        sampling=Sampling(temperature=1.0, max_tokens=40),
        seed=seed,
    )  # fmt: skip


def longer(seed: int) -> SftConfig:
    """As many updates as `graded`, at its rate, on the teacher's answers once more."""
    config = graded(seed).train
    return student(seed).but(**{"train.steps": config.steps, "train.optim.lr": config.optim.lr})


def measured() -> AnswersEvalConfig:
    """Greedy replies for what can be checked, two drawn ones a prompt for what the teacher thinks of them."""
    return AnswersEvalConfig(max_tokens=40, max_batch=32)


def run(root: Path, corpus: Path | None = None, *, fresh: bool = False) -> Path:
    """Go through the recipe in `root` and write the report. Returns the page's path.

    Raises:
        ValueError: as `laptop.pretrained`; or the text holds too few functions and classes of Python.
    """
    from gemwright.recipes import laptop_report
    from gemwright.recipes.laptop_full import report, rlhf

    cards, text = laptop.pretrained(root, corpus, fresh=fresh)
    laptop_report.write(root, cards, text, root / "pretraining")
    made = root / "chats"
    cards["chats"] = _chats(chats(), made, root / "curated", text)
    cards["prompts"] = pipeline.prompts(prompts(), root / "prompts", [str(made / LOG)])
    teacher, replies = root / "chat_teacher", root / "answers"
    cards["chat_teacher"] = sft.run(chat_teacher(), teacher, root / "teacher", made / LESSONS)
    cards["answers"] = answering.run(answers(), replies, str(teacher), root / "prompts", max_batch=32)
    for seed in SEEDS:
        names = {arm: f"{arm}/seed{seed}" for arm in ARMS}
        cards[names["sft"]] = sft.run(student(seed), root / names["sft"], root / "distilled", replies)
        cards[names["distilled_sft"]] = sft.run(
            student(seed), root / names["distilled_sft"], root / "distilled", replies, teacher=teacher
        )
        begun = root / names["sft"]
        cards[names["on_policy"]] = on_policy.run(
            graded(seed), root / names["on_policy"], begun, teacher, root / "prompts"
        )
        cards[names["longer_sft"]] = sft.run(longer(seed), root / names["longer_sft"], begun, replies)
    judged = ["chat_teacher", "distilled", *(f"{arm}/seed{seed}" for arm in ARMS for seed in SEEDS)]
    cards["measured"] = _measure(measured(), root, judged)
    cards |= rlhf.run(root, text, SEEDS)
    page = report.write(root, cards)
    say(f"the report is {page}. Next: gemwright ablate merging --runs {root}")
    return page


def _chats(config: ChatsConfig, out: Path, curated: Path, text: Curated) -> Card:
    """The stage that makes the questions: lessons, a chat log, and what is asked in the end."""

    def work(folder: RunFolder) -> dict[str, Any]:
        known = questions.definitions(document.text for document in text.documents("train"))
        unseen = questions.definitions(document.text for document in text.documents("held_out"))
        headers = {one.header for one in known}
        unseen = [one for one in unseen if one.header not in headers]
        taught, logged = known[::2], known[1::2]  # the teacher has to answer about what it was not taught
        lessons = [
            *questions.questions(taught, config.lessons, config.seed),
            *questions.slips(config.slips, config.seed),
        ]
        asked = [
            *questions.questions(logged, config.log, config.seed),
            *questions.slips(config.slips, config.seed + 1),
        ]
        log, planted = questions.chat_log(asked, config.seed)
        measured = questions.questions(unseen, config.held_out, config.seed)
        _write(folder.path / LESSONS, [{"id": one.id, "messages": one.messages} for one in lessons])
        _write(folder.path / LOG, log)
        _write(
            folder.path / HELD_OUT, [{"id": one.id, "turns": one.turns, "keys": one.keys} for one in measured]
        )
        counts = {"known": len(known), "unseen": len(unseen), "lessons": len(lessons), "log": len(log)}
        return {"definitions": counts, "planted": planted}

    return run_stage("chats", config, out, work, inputs={"curated": curated})


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _measure(config: AnswersEvalConfig, root: Path, names: Sequence[str]) -> Card:
    """The stage that asks every model the held-out questions."""

    def work(folder: RunFolder) -> dict[str, Any]:
        asked = read_asked(root / "chats" / HELD_OUT)
        teacher = checkpoint.load(root / "chat_teacher")
        tokenizer = Tokenizer.load(root / "chat_teacher")
        found: dict[str, Any] = {}
        with folder.progress("asking", len(names)) as advance:
            for name in names:
                model = checkpoint.load(root / name)
                judged = judge(model, tokenizer, asked, config, teacher=teacher, right=questions.right)
                found[name] = {**judged.to_dict(), "replies": judged.replies[:_SHOWN]}
                advance(1)
        return {"models": found, "asked": [one.turns for one in asked[:_SHOWN]]}

    inputs = {name: root / name for name in names} | {"chats": root / "chats"}
    return run_stage("measure", config, root / "measured", work, inputs=inputs)
