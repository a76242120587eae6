"""The stage that compares two models, from end to end, with judges that run here, over HTTP, and by score."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gemwright
from gemwright.answer.comparing import ComparisonConfig, Party, run
from gemwright.answer.endpoint import EndpointConfig
from gemwright.generate.sampling import Sampling
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig
from gemwright.model.gemma import Gemma, RewardModel
from gemwright.reading.prompts import read_prompts
from gemwright.reward.scoring import scores
from gemwright.run import read_card
from gemwright.tokenizer.chat import encode_conversation, encode_prompt
from gemwright.tokenizer.tokenizer import Tokenizer

Server = Any
Spoken = Callable[..., Any]
KEY = "sk-secret-0123456789"
QUICK = EndpointConfig(timeout_s=0.25, pause_s=0.005, tries=3)
OVER_HTTP = ComparisonConfig(endpoint=QUICK)
GREEDY = Sampling(max_tokens=6, repetition_penalty=3.0)
"""Random weights like best to repeat the last token, and a prompt ends in a newline."""


def written(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def talk(*contents: str, **about: Any) -> dict[str, Any]:
    roles = ("user", "model")
    return {"messages": [{"role": roles[n % 2], "content": one} for n, one in enumerate(contents)], **about}


def judged(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "judged.jsonl").read_text(encoding="utf-8").splitlines()]


def shown(body: dict[str, Any]) -> tuple[str, str]:
    """What a judge's request shows as A's and B's, of all turns."""
    found, current = {"A": "", "B": "", "": ""}, ""
    for line in body["messages"][-1]["content"].splitlines():
        if line.startswith("===="):
            current = line.strip("= ")[-1] if "assistant" in line else ""
        else:
            found[current] += line
    return found["A"], found["B"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Thirty, a tenth of them in two turns."""
    turns = [[f"What is {n} called?"] + ["And then?"] * (n % 10 == 3) for n in range(30)]
    return written(tmp_path / "asked.jsonl", [{"id": f"p{n}", "turns": one} for n, one in enumerate(turns)])


@pytest.fixture
def plays(server: Server, spoken: Spoken) -> Server:
    """Plays all: `good` and `bad` answer, and `judge` prefers what is good, wherever it stands."""

    def reply(body: dict[str, Any]) -> Any:
        if body["model"] in ("good", "bad"):
            return spoken(f"{body['model']} to {body['messages'][-1]['content']}")
        first, second = ("good" in text for text in shown(body))
        return spoken(f"So.\n[[{'A' if first > second else 'B' if second > first else 'C'}]]")

    server.reply = reply
    server.models = ["good", "bad", "judge"]
    return server


def compared(
    server: Server, out: Path, prompts: Path, config: ComparisonConfig = OVER_HTTP, **more: Any
) -> Any:
    """`good` against `bad`."""
    sides = (Party(server.url, name, KEY) for name in ("good", "bad", "judge"))
    return run(config, out, prompts, *sides, **more)


def test_the_better_model_wins_wherever_it_stands(plays: Server, prompts: Path, tmp_path: Path):
    told = compared(plays, tmp_path / "out", prompts).results
    assert told["win_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert (told["prompts"], told["pairs"], told["win"]) == (30, 30, 30)
    assert told["shown_first"]["value"] == told["shown_second"]["value"] == 0
    rows = judged(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"p{n}" for n in range(30)]
    assert {tuple(row["verdicts"]) for row in rows} == {("A", "B")}
    assert rows[3]["replies"]["against"] == ["bad to What is 3 called?", "bad to And then?"]
    assert rows[0]["said"] == ["So.\n[[A]]", "So.\n[[B]]"]
    assert (tmp_path / "out/report.html").exists()
    assert not (tmp_path / "out/resume").exists()


def test_the_other_way_round_it_loses(plays: Server, prompts: Path, tmp_path: Path):
    sides = (Party(plays.url, name) for name in ("bad", "good", "judge"))
    assert run(OVER_HTTP, tmp_path / "out", prompts, *sides).results["win_rate"]["value"] == 0


def test_a_judge_that_always_says_a_makes_ties_and_is_found_out(
    plays: Server, spoken: Spoken, prompts: Path, tmp_path: Path
):
    answers = plays.reply
    plays.reply = lambda body: spoken("[[A]]") if body["model"] == "judge" else answers(body)
    told = compared(plays, tmp_path / "out", prompts).results
    assert (told["tie"], told["win_rate"]["value"]) == (30, 0.5)
    assert (told["shown_first"]["value"], told["shown_second"]["value"]) == (1.0, 0.0)


def test_each_request_has_its_models_sampling_and_the_key_is_written_nowhere(
    plays: Server, prompts: Path, tmp_path: Path
):
    config = OVER_HTTP.but(
        **{"sampling.temperature": 0.7, "sampling.max_tokens": 50, "judging.max_tokens": 9}
    )
    compared(plays, tmp_path / "out", prompts, config)
    asked = {(one["model"], one["temperature"], one["max_tokens"]) for one in plays.bodies}
    assert asked == {("good", 0.7, 50), ("bad", 0.7, 50), ("judge", 0.0, 9)}
    seeds = {name: {one["seed"] for one in plays.bodies if one["model"] == name} for name in ("good", "bad")}
    assert seeds == {"good": set(range(30)), "bad": set(range(30, 60))}
    assert plays.keys == {f"Bearer {KEY}"}
    assert not any(
        KEY.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    )


def test_identical_replies_are_a_tie_that_no_judge_sees(plays: Server, prompts: Path, tmp_path: Path):
    same = written(tmp_path / "same.jsonl", [talk(f"What is {n} called?", "it") for n in range(9)])
    plays.reply = lambda body: pytest.fail("nobody is to be asked")
    told = run(OVER_HTTP, tmp_path / "out", prompts, same, same, Party(plays.url, "judge")).results
    assert (told["identical"], told["tie"], told["win_rate"]["value"]) == (9, 9, 0.5)
    assert told["left_out"] == {"model_missing": 21}
    assert (plays.requests, told["shown_first"]["value"]) == (0, None)


def test_a_file_of_replies_is_matched_and_what_is_missing_is_counted(
    plays: Server, prompts: Path, tmp_path: Path
):
    records = [talk(f"What is {n} called?", "bad", id="other") for n in range(7)]
    file = written(tmp_path / "gold.jsonl", records)
    out = tmp_path / "out"
    told = run(OVER_HTTP, out, prompts, Party(plays.url, "good"), file, Party(plays.url, "judge")).results
    assert (told["pairs"], told["win"], told["left_out"]) == (7, 7, {"against_missing": 23})
    assert told["empty"] == {"model": 0, "against": 1}  # the second turn of the fourth
    assert judged(out)[9]["left_out"] == "against_missing"
    assert not (out / "against.jsonl").exists()


def test_the_replies_that_it_leaves_take_the_place_of_the_models(
    plays: Server, prompts: Path, tmp_path: Path
):
    first = compared(plays, tmp_path / "out", prompts).results
    before = plays.requests
    one, other = tmp_path / "out/model.jsonl", tmp_path / "out/against.jsonl"
    again = run(OVER_HTTP, tmp_path / "again", prompts, one, other, Party(plays.url, "judge")).results
    assert again == first
    assert plays.requests == before + 60


def test_an_empty_reply_is_judged_as_none(plays: Server, spoken: Spoken, prompts: Path, tmp_path: Path):
    answers = plays.reply
    plays.reply = lambda body: spoken(" ") if body["model"] == "bad" else answers(body)
    told = compared(plays, tmp_path / "out", prompts).results
    assert (told["win"], told["empty"]) == (30, {"model": 0, "against": 30})
    assert sum("(no reply)" in one["messages"][-1]["content"] for one in plays.bodies) == 60


def test_replies_that_were_cut_are_counted_and_judged(
    plays: Server, spoken: Spoken, prompts: Path, tmp_path: Path
):
    answers = plays.reply
    plays.reply = lambda body: spoken("bad and", "length") if body["model"] == "bad" else answers(body)
    told = compared(plays, tmp_path / "out", prompts).results
    assert (told["win"], told["cut"]) == (30, {"model": 0, "against": 30})


def test_verdicts_that_cannot_be_read_are_counted_and_said_aloud(
    plays: Server, spoken: Spoken, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """In one of the two orders."""
    answers = plays.reply

    def reply(body: dict[str, Any]) -> Any:
        lost = body["model"] == "judge" and "What is 2" in body["messages"][0]["content"]
        return spoken("Hard to say.") if lost and shown(body)[0].startswith("bad") else answers(body)

    plays.reply = reply
    told = compared(plays, tmp_path / "out", prompts).results
    assert (told["pairs"], told["win"], told["unreadable"]) == (30, 19, 11)
    assert told["win_rate"]["value"] == 1.0
    assert "verdicts on 11 of 30 pairs CANNOT BE READ" in capsys.readouterr().err


def test_what_a_judge_refuses_or_leaves_unanswered_is_left_out(plays: Server, prompts: Path, tmp_path: Path):
    answers = plays.reply

    def reply(body: dict[str, Any]) -> Any:
        text = body["messages"][0]["content"] if body["model"] == "judge" else ""
        return 400 if "What is 11" in text else 500 if "What is 12" in text else answers(body)

    plays.reply, out = reply, tmp_path / "out"
    with pytest.raises(ConnectionError, match="judging: 2 of 60 are left unanswered; the last: status 500"):
        compared(plays, out, prompts)
    before = plays.requests
    told = compared(plays, out, prompts, OVER_HTTP.but(**{"endpoint.skip_unanswered": True})).results
    assert plays.requests == before + 2 * 3
    assert told["left_out"] == {"judge_refused_by_endpoint": 1, "judge_unanswered": 1}
    assert (told["pairs"], told["win"]) == (28, 28)
    assert judged(out)[11]["detail"].startswith("status 400")


SCRIPT = """
import json, sys
from pathlib import Path
from gemwright.answer.comparing import ComparisonConfig, Party, run
config, out, url, prompts = sys.argv[1:]
sides = (Party(url, name) for name in ("good", "bad", "judge"))
run(ComparisonConfig.parse(json.loads(config)), Path(out), Path(prompts), *sides, concurrency=3)
"""


@pytest.mark.parametrize(
    ("name", "lines"), [pytest.param("against", 6, marks=pytest.mark.slow), ("verdicts", 11)]
)
def test_a_killed_run_goes_on_to_the_same_result_and_asks_nothing_twice(
    plays: Server, prompts: Path, tmp_path: Path, name: str, lines: int
):
    compared(plays, tmp_path / "whole", prompts)
    whole = Counter(plays.asked)
    plays.asked.clear()
    plays.delay = 0.01
    path = tmp_path / "out/resume" / f"{name}.jsonl"
    command = [sys.executable, "-c", SCRIPT, json.dumps(OVER_HTTP.to_dict())]
    command += [str(tmp_path / "out"), plays.url, str(prompts)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    over = [json.loads(line)["messages"][0]["content"] for line in path.read_bytes().split(b"\n")[:-1]]
    with open(path, "ab") as file:
        file.write(b'{"number": 29, "messages": "torn')
    time.sleep(0.05)  # what was on its way when it was killed
    at_kill = Counter(plays.asked)
    plays.delay = 0.0
    card = compared(plays, tmp_path / "out", prompts)
    again = plays.asked - at_kill
    assert lines <= len(over) < 60
    assert plays.asked.total() <= whole.total() + 2 * 3  # three were running, of two turns at most
    if name == "verdicts":
        assert not [text for text in over if again[text]]
    for file in ("judged.jsonl", "report.json", "model.jsonl", "against.jsonl"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert card.results == read_card(tmp_path / "whole").results


def test_a_finished_folder_needs_no_endpoint_that_is_up_and_a_fresh_one_does(
    plays: Server, prompts: Path, tmp_path: Path
):
    file = written(tmp_path / "gold.jsonl", [talk(f"What is {n} called?", "bad") for n in range(30)])
    plays.models = ["good"]
    parties = (plays.url, file, Party(plays.url, "judge"))
    first = run(OVER_HTTP, tmp_path / "out", prompts, *parties)
    assert first.inputs["model_name"] == {"value": "good"}
    plays.models = ["bad"]
    fresh = run(OVER_HTTP, tmp_path / "out", prompts, *parties, fresh=True)
    assert fresh.inputs["model_name"] == {"value": "bad"}
    plays.shutdown()
    plays.server_close()
    again = run(OVER_HTTP.but(**{"endpoint.tries": 1}), tmp_path / "out", prompts, *parties)
    assert again.results == fresh.results


@pytest.fixture(scope="module")
def other_folder(tiny: GemmaConfig, tokenizer_folder: Path) -> Path:
    """A second model with weights at random, of less context than the teacher."""
    folder = tokenizer_folder.parent / "random-other"
    torch.manual_seed(5)
    checkpoint.save(Gemma(tiny.but(init_std=0.4, max_seq_len=48)), folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return folder


@pytest.fixture(scope="module")
def judge_folder(tiny: GemmaConfig, tokenizer_folder: Path) -> Path:
    """A reward model with a head at random."""
    folder = tokenizer_folder.parent / "random-judge"
    torch.manual_seed(7)
    model = RewardModel(tiny.but(init_std=0.4))
    with torch.no_grad():
        model.score.weight.normal_()
    checkpoint.save(model, folder)
    Tokenizer.load(tokenizer_folder).save(folder)
    return folder


HERE = ComparisonConfig(sampling=GREEDY, judging=GREEDY)


def test_a_reward_model_scores_what_two_models_of_ours_reply(
    teacher_folder: Path, other_folder: Path, judge_folder: Path, tmp_path: Path
):
    asked = written(tmp_path / "asked.jsonl", [{"prompt": f"def f{n}"} for n in range(6)])
    out = tmp_path / "out"
    told = run(HERE, out, asked, teacher_folder, other_folder, judge_folder, max_batch=3).results
    judge, tokenizer = checkpoint.load_reward(judge_folder), Tokenizer.load(judge_folder)
    models = [gemwright.load(folder) for folder in (teacher_folder, other_folder)]
    rows, wins = judged(out), 0
    for n, row in enumerate(rows):
        both = []
        for role, model in zip(("model", "against"), models, strict=True):
            user = {"role": "user", "content": f"def f{n}"}
            reply = model.generate([user], **GREEDY.to_dict())
            assert row["replies"][role] == [reply]
            ids, _ = encode_conversation(tokenizer, [user, {"role": "model", "content": reply}])
            both.append(float(scores(judge, [ids])[0]))
        assert row["scores"] == pytest.approx(both, abs=1e-4)
        assert row["outcome"] == ("win" if both[0] > both[1] else "loss")
        wins += both[0] > both[1]
    assert told["win_rate"]["value"] == wins / 6
    assert told["shown_first"]["value"] is None


def test_a_judge_of_ours_that_talks_nonsense_ends_with_an_error_and_keeps_the_replies(
    teacher_folder: Path, other_folder: Path, judge_folder: Path, tiny: GemmaConfig, tokenizer_folder: Path,
    tmp_path: Path,
):  # fmt: skip
    """With room for the prompt, and weights at random."""
    judge = tmp_path / "judge"
    checkpoint.save(Gemma(tiny.but(init_std=0.4, max_seq_len=4096)), judge)
    Tokenizer.load(tokenizer_folder).save(judge)
    asked = written(tmp_path / "asked.jsonl", [{"prompt": f"def f{n}"} for n in range(3)])
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"verdicts on 3 pairs can be read: see .*judged\.jsonl.*model\.jsonl"
    ):
        run(HERE, out, asked, teacher_folder, other_folder, judge)
    assert [(row["outcome"], len(row["said"])) for row in judged(out)] == [("unreadable", 2)] * 3
    assert not read_card(out).finished
    files = (out / "model.jsonl", out / "against.jsonl")
    assert run(HERE, tmp_path / "again", asked, *files, judge_folder).results["pairs"] == 3


def test_a_pair_that_is_too_long_for_a_judge_is_left_out(
    teacher_folder: Path, other_folder: Path, judge_folder: Path, tmp_path: Path
):
    """64 tokens do not hold the task of a judge that writes, nor one of the replies to be scored."""
    asked = written(tmp_path / "asked.jsonl", [{"prompt": "def f"}, {"prompt": "def g"}])
    with pytest.raises(ValueError, match=r"no pair of replies was left to compare: \{'judge_too_long': 2\}"):
        run(HERE, tmp_path / "out", asked, teacher_folder, other_folder, teacher_folder)
    gold = written(tmp_path / "gold.jsonl", [talk("def f", "return " * 60), talk("def g", "x")])
    told = run(HERE, tmp_path / "scored", asked, teacher_folder, gold, judge_folder).results
    assert (told["left_out"], told["pairs"]) == ({"judge_too_long": 1}, 1)


def test_a_prompt_that_is_too_long_for_a_model_is_left_out(
    teacher_folder: Path, other_folder: Path, judge_folder: Path, tmp_path: Path
):
    """One for both, one for the second."""
    tokenizer = Tokenizer.load(teacher_folder)
    size = {n: len(encode_prompt(tokenizer, talk("self." * n)["messages"])) for n in range(40)}
    middle = next("self." * n for n in size if 48 <= size[n] < 60)
    turns = [["too long " * 60], [middle], ["def f"]]
    asked = written(tmp_path / "asked.jsonl", [{"turns": one} for one in turns])
    told = run(HERE, tmp_path / "out", asked, teacher_folder, other_folder, judge_folder).results
    assert told["left_out"] == {"model_too_long": 1, "against_too_long": 1}
    assert (told["prompts"], told["pairs"]) == (3, 1)


def test_a_model_against_itself_ties_when_greedy_and_draws_apart_otherwise(
    teacher_folder: Path, judge_folder: Path, tmp_path: Path
):
    asked = written(tmp_path / "asked.jsonl", [{"prompt": f"def f{n}"} for n in range(4)])
    told = run(HERE, tmp_path / "greedy", asked, teacher_folder, teacher_folder, judge_folder).results
    assert (told["identical"], told["win_rate"]["value"]) == (4, 0.5)
    warm = HERE.but(**{"sampling.temperature": 3.0})
    told = run(warm, tmp_path / "warm", asked, teacher_folder, teacher_folder, judge_folder).results
    assert told["identical"] == 0


def test_a_stopped_reward_model_scores_only_what_is_missing(
    judge_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gemwright.answer import comparing

    texts = {role: [talk(f"What is {n} called?", role + "x" * n) for n in range(30)] for role in ("a", "b")}
    one, other = (written(tmp_path / f"{role}.jsonl", records) for role, records in texts.items())
    whole = run(HERE, tmp_path / "whole", prompts, one, other, judge_folder).results
    monkeypatch.setattr(comparing, "_SCORED", 7)
    seen: list[int] = []

    def counted(model: RewardModel, ids: Any) -> Any:
        seen.append(len(ids))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return scores(model, ids)

    monkeypatch.setattr(comparing, "scores", counted)
    with pytest.raises(KeyboardInterrupt):
        run(HERE, tmp_path / "out", prompts, one, other, judge_folder)
    assert run(HERE, tmp_path / "out", prompts, one, other, judge_folder).results == whole
    assert sum(seen) == 60 + 7  # the third seven were scored by nobody


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model": "reward"}, "model: .* is a reward model, which writes nothing"),
        ({"model": "bare"}, "has no tokenizer.model"),
        ({"against": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"judge": "nowhere"}, "there is no folder nowhere|neither a folder"),
        ({"judge": Party("teacher", name="x")}, "judge: a model's name is for an endpoint"),
        ({"config": HERE.but(**{"sampling.stop": ["x"]})}, r"sampling\.stop has no place with model"),
        (
            {"judge": "http://127.0.0.1:9/v1"},
            r"judging\.repetition_penalty has no place with judge, an endpoint",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    change: dict[str, Any], told: str, teacher_folder: Path, judge_folder: Path, prompts: Path, tmp_path: Path
):
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((teacher_folder / name).read_bytes())
    named = {"reward": judge_folder, "bare": tmp_path / "bare", "teacher": teacher_folder}
    given: dict[str, Any] = {
        "config": HERE,
        "model": "teacher",
        "against": "teacher",
        "judge": "teacher",
    } | change
    given = {key: named.get(one, one) if isinstance(one, str) else one for key, one in given.items()}
    if isinstance(given["judge"], Party):
        given["judge"] = Party(teacher_folder, given["judge"].name)
    with pytest.raises((ValueError, FileNotFoundError), match=told):
        run(given.pop("config"), tmp_path / "out", prompts, **given)
    assert not (tmp_path / "out").exists()


def test_a_judge_of_other_settings_is_other_work(plays: Server, tmp_path: Path):
    asked = written(tmp_path / "asked.jsonl", [{"prompt": "What?"}])
    compared(plays, tmp_path / "out", asked)
    other = OVER_HTTP.but(**{"judging.max_tokens": 7})
    with pytest.raises(ValueError, match=r"judging\.max_tokens: 1024 -> 7"):
        compared(plays, tmp_path / "out", asked, other)
    compared(plays, tmp_path / "out", asked, other, fresh=True)
    assert (tmp_path / "out.old-1/judged.jsonl").exists()


def test_log_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"judging\.logprobs"):
        ComparisonConfig.parse({"judging": {"logprobs": 1}})


@pytest.mark.parametrize(("name", "turns"), [("mt_bench", 2), ("arena_hard_v0.1", 1)])
def test_the_known_benchmarks_are_compared_as_they_are(
    plays: Server, data: Path, tmp_path: Path, name: str, turns: int
):
    """Some prompts of each: all would take a while over HTTP."""
    lines = (data / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    told = compared(plays, tmp_path / "out", path).results
    assert (told["pairs"], told["win"]) == (12, 12)
    asked = read_prompts(path).asked
    assert [len(row["replies"]["model"]) for row in judged(tmp_path / "out")] == [turns] * 12
    assert [row["turns"] for row in judged(tmp_path / "out")] == [list(one.turns) for one in asked]
