"""The stage from end to end, with a teacher that runs here and one behind an endpoint."""

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

import gemwright
from gemwright.answer import stage as module
from gemwright.answer.endpoint import EndpointConfig
from gemwright.answer.prompts import Lines
from gemwright.answer.stage import AnswersConfig, run
from gemwright.data.curated import read_rows
from gemwright.generate.sampling import Sampling
from gemwright.run import read_card

Server = Any
Spoken = Callable[..., Any]
KEY = "sk-secret-0123456789"
QUICK = EndpointConfig(timeout_s=0.25, pause_s=0.005, tries=3)
PLAIN = AnswersConfig(near_duplicates=None, exact_duplicates=False, endpoint=QUICK)
"""Without the searches for duplicates, which take most of the time."""
GREEDY = Sampling(max_tokens=6, repetition_penalty=3.0)
"""Random weights like best to repeat the last token, and a prompt ends in a newline."""
HERE = PLAIN.but(sampling=GREEDY, truncated=True, unsafe=None, personal=None, self_identification=False)
"""For a teacher with weights at random, which hardly ever ends by itself."""


def written(folder: Path, records: list[Any], name: str = "asked.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def answers(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def rejects(out: Path) -> dict[str, dict[str, Any]]:
    """Every reject's metadata, by its prompt."""
    rows = [row for path in (out / "rejects").rglob("*.zst") for row in read_rows(path)]
    return {row["metadata"]["prompt"]: row["metadata"] for row in rows}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Thirty prompts, a tenth of them in two turns."""
    turns = [[f"What is {n} called?"] + ["And then?"] * (n % 10 == 3) for n in range(30)]
    return written(tmp_path, [{"id": f"p{n}", "turns": one} for n, one in enumerate(turns)])


def test_a_teacher_of_ours_answers_as_it_does_when_asked_alone(teacher_folder: Path, tmp_path: Path):
    model = gemwright.load(teacher_folder)
    asked = written(tmp_path, [{"prompt": f"def f{n}"} for n in range(5)])
    card = run(HERE, tmp_path / "out", teacher_folder, asked, max_batch=3)
    found = answers(tmp_path / "out")
    assert [one["id"] for one in found] == [f"line-{n}" for n in range(1, 6)]
    for n, one in enumerate(found):
        user = {"role": "user", "content": f"def f{n}"}
        reply = model.generate([user], **GREEDY.to_dict())
        assert one["messages"] == [user, {"role": "model", "content": reply}]
    assert card.results["tokens"] == 30
    assert card.results["tokens_per_s"] > 0
    assert (card.results["prompts"], card.results["asked"], card.results["kept"]) == (5, 5, 5)


def test_several_samples_are_several_draws(teacher_folder: Path, tmp_path: Path):
    asked = written(tmp_path, [{"prompt": "def f"}, {"prompt": "class A"}])
    config = HERE.but(samples=3, **{"sampling.temperature": 3.0})
    run(config, tmp_path / "out", teacher_folder, asked)
    found = answers(tmp_path / "out")
    assert [(one["id"], one["sample"]) for one in found] == [
        (f"line-{n}", k) for n in (1, 2) for k in range(3)
    ]
    assert len({one["messages"][1]["content"] for one in found}) == 6


def test_what_does_not_fit_the_context_is_put_aside(teacher_folder: Path, tmp_path: Path):
    """Both a first turn that is too long and a later one; the teacher has 64 tokens of context."""
    records = [{"prompt": "too long " * 60}, {"turns": ["a"] * 9}, {"prompt": "short"}]
    config = HERE.but(**{"sampling.stop_ids": list(range(700))})  # whatever it says ends the turn
    told = r"no answer to 3 prompts is left: \{'too_long': 2, 'empty': 1\}\. See .*report\.html"
    with pytest.raises(ValueError, match=told):
        run(config, tmp_path / "out", teacher_folder, written(tmp_path, records))
    assert (tmp_path / "out/report.html").exists()


def test_more_tokens_than_the_context_has_are_as_many_as_fit(teacher_folder: Path, tmp_path: Path):
    config = HERE.but(**{"sampling.max_tokens": 512})
    card = run(config, tmp_path / "out", teacher_folder, written(tmp_path, [{"prompt": "def f"}]))
    assert card.results["kept"] == 1
    assert 30 < card.results["tokens"] < 64


def test_answers_in_the_records_are_counted_and_reach_no_file(server: Server, tmp_path: Path):
    log = {
        "id": "c",
        "conversation": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "ZEBRA"}],
    }
    card = run(
        PLAIN, tmp_path / "out", server.url, written(tmp_path, [log, {"prompt": "Hi", "answer": "ZEBRA"}])
    )
    assert card.results["answers_ignored"] == 2
    assert not any(b"ZEBRA" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert all("ZEBRA" not in what for what in server.asked)


def test_a_system_message_begins_the_first_turn_or_is_refused(server: Server, tmp_path: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    asked = written(tmp_path, [{"id": "s", "messages": messages}])
    run(PLAIN, tmp_path / "out", server.url, asked)
    assert answers(tmp_path / "out")[0]["messages"][0] == {"role": "user", "content": "Be brief.\n\nHello?"}
    with pytest.raises(ValueError, match=r"asked\.jsonl, line 1: it has a system message"):
        run(PLAIN.but(system="refuse"), tmp_path / "other", server.url, asked)
    assert not (tmp_path / "other").exists()


def test_each_filter_drops_for_its_reason_and_the_rest_is_kept_with_tags(
    server: Server, spoken: Spoken, tmp_path: Path
):
    long = " ".join(f"word{n}" for n in range(60))
    said: dict[str, Any] = {
        "plain": spoken("It is called a lighthouse."),
        "hedged": spoken("According to the text, it is probably a harbour."),
        "empty": spoken("  "),
        "truncated": spoken("It goes on and", "length"),
        "refused": 400,
        "unsafe": spoken("Here is how to make a pipe bomb: no."),
        "self": spoken("As an AI language model, I have no opinion."),
        "mail": spoken("Write to jane.doe@fastmail-example.org about it."),
        "poison": 500,
        "long one": spoken(f"{long}, it is said."),
        "long two": spoken(f"{long}, it is told."),
    }
    server.reply = lambda body: said[body["messages"][-1]["content"]]
    prompts = [{"id": turn, "prompt": turn} for turn in said] + [{"id": "again", "prompt": "plain"}]
    weights = {"weights.hedging": 2.0, "weights.attribution": 1.5}
    config = AnswersConfig(endpoint=QUICK.but(skip_unanswered=True)).but(**weights)
    out = tmp_path / "out"
    card = run(config, out, server.url, written(tmp_path, prompts))
    assert card.results["dropped"] == {
        "empty": 1, "truncated": 1, "refused_by_endpoint": 1, "unanswered": 1, "exact_duplicate": 1,
        "unsafe_words": 1, "self_identification": 1, "personal_information": 1, "near_duplicate": 1,
    }  # fmt: skip
    assert (card.results["asked"], card.results["kept"]) == (12, 3)
    assert card.results["tags"] == {"hedging": 1, "attribution": 1}
    by_id = {one["id"]: one for one in answers(out)}
    assert (by_id["hedged"]["tags"], by_id["hedged"]["weight"]) == (["hedging", "attribution"], 3.0)
    assert len({"plain", "again"} & set(by_id)) == 1
    assert set(by_id["hedged"]) == {"id", "messages", "sample", "tags", "weight", "source"}
    put_aside = rejects(out)
    assert put_aside["unsafe"]["filter_reason"] == "unsafe_words"
    assert "status 400" in put_aside["refused"]["detail"]
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert (report["kept"], report["tags"]) == (3, {"hedging": 1, "attribution": 1})
    assert "fastmail" not in (out / "report.html").read_text(encoding="utf-8")
    assert not (out / "resume").exists()


def test_only_what_the_model_says_is_judged_unsafe_or_of_itself(
    server: Server, tmp_path: Path, spoken: Spoken
):
    server.reply = lambda body: spoken("No.")
    turns = ["How to make a pipe bomb?", "I am ChatGPT, a language model. And you?"]
    run(PLAIN, tmp_path / "out", server.url, written(tmp_path, [{"turns": turns}]))
    assert [message["content"] for message in answers(tmp_path / "out")[0]["messages"]] == [
        turns[0], "No.", turns[1], "No.",
    ]  # fmt: skip


def test_personal_information_may_be_replaced_in_every_turn(server: Server, tmp_path: Path, spoken: Spoken):
    server.reply = lambda body: spoken("It is jane.doe@fastmail-example.org, I read.")
    asked = written(tmp_path, [{"turns": ["I am joe@fastmail-example.org.", "And she?"]}])
    run(PLAIN.but(personal="redact"), tmp_path / "out", server.url, asked)
    assert [message["content"] for message in answers(tmp_path / "out")[0]["messages"]] == [
        "I am <email>.", "It is <email>, I read.", "And she?", "It is <email>, I read.",
    ]  # fmt: skip


def test_cut_answers_are_kept_if_one_asks_for_them(server: Server, tmp_path: Path, spoken: Spoken):
    server.reply = lambda body: spoken("It goes on and", "length")
    run(PLAIN.but(truncated=True), tmp_path / "out", server.url, written(tmp_path, [{"turns": ["a", "b"]}]))
    assert [message["content"] for message in answers(tmp_path / "out")[0]["messages"]] == [
        "a",
        "It goes on and",
    ]


def test_a_key_is_in_no_file_and_in_no_message(
    server: Server, prompts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    server.fault = lambda number: 400 if number % 5 == 0 else 503 if number % 7 == 0 else None
    run(PLAIN, tmp_path / "out", server.url, prompts, api_key=KEY)
    assert server.keys == {f"Bearer {KEY}"}
    assert any("refused_by_endpoint" in one["filter_reason"] for one in rejects(tmp_path / "out").values())
    rows = [json.dumps(row) for path in (tmp_path / "out").rglob("*.zst") for row in read_rows(path)]
    files = [path.read_text("latin-1") for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(KEY in text for text in [*files, *rows, *capfd.readouterr()])


def test_the_card_names_the_endpoint_and_its_model(server: Server, prompts: Path, tmp_path: Path):
    run(PLAIN, tmp_path / "out", server.url + "/", prompts)
    inputs = read_card(tmp_path / "out").inputs
    assert (inputs["teacher"]["value"], inputs["model"]["value"]) == (server.url, "teacher")


def test_a_finished_folder_needs_no_endpoint_that_is_up(server: Server, prompts: Path, tmp_path: Path):
    card = run(PLAIN, tmp_path / "out", server.url, prompts)
    server.shutdown()
    server.server_close()
    assert run(PLAIN, tmp_path / "out", server.url, prompts).results == card.results


def test_the_same_command_asks_again_for_what_was_left_and_nothing_else(
    server: Server, prompts: Path, tmp_path: Path
):
    """The endpoint has a bad day with three prompts; on the next they are asked with more patience."""
    bad = {f"What is {n} called?" for n in (4, 11, 22)}
    echo, out = server.reply, tmp_path / "out"
    server.reply = lambda body: 500 if body["messages"][-1]["content"] in bad else echo(body)
    with pytest.raises(
        ConnectionError, match=r"3 of 30 conversations are left unanswered; the last: status 500"
    ):
        run(PLAIN, out, server.url, prompts)
    assert not read_card(out).finished
    server.reply = echo
    before = server.requests
    card = run(PLAIN.but(**{"endpoint.tries": 9}), out, server.url, prompts)
    assert server.requests == before + 3
    assert card.results["kept"] == 30
    assert set(server.answered.values()) == {1}
    assert [one["id"] for one in answers(out)] == [f"p{n}" for n in range(30)]


def test_poison_may_be_left_out_afterwards(server: Server, prompts: Path, tmp_path: Path):
    """More of it than conversations in a row that stop a run."""
    echo, out = server.reply, tmp_path / "out"
    server.reply = lambda body: 500 if "What is 2" in body["messages"][-1]["content"] else echo(body)
    with pytest.raises(ConnectionError, match="skip_unanswered=true"):
        run(PLAIN, out, server.url, prompts, concurrency=12)
    card = run(PLAIN.but(**{"endpoint.skip_unanswered": True}), out, server.url, prompts, concurrency=2)
    assert (card.results["kept"], card.results["dropped"]) == (19, {"unanswered": 11})


def test_a_command_that_nobody_answered_leaves_the_folder_free(server: Server, prompts: Path, tmp_path: Path):
    server.fault = lambda number: 401
    with pytest.raises(PermissionError):
        run(PLAIN, tmp_path / "out", server.url, prompts)
    assert not (tmp_path / "out/card.json").exists()


SCRIPT = """
import json, sys
from pathlib import Path
from gemwright.answer.stage import AnswersConfig, run
config, out, teacher, prompts = sys.argv[1:]
run(AnswersConfig.parse(json.loads(config)), Path(out), teacher, Path(prompts), concurrency=3)
"""


def killed_after(lines: int, config: AnswersConfig, out: Path, teacher: str, prompts: Path) -> list[int]:
    """Kill the stage in a process of its own once so many conversations are over; returns their numbers."""
    path = out / "resume/conversations.jsonl"
    command = [sys.executable, "-c", SCRIPT, json.dumps(config.to_dict()), str(out), teacher, str(prompts)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    with open(path, "ab") as file:
        file.write(b'{"number": 29, "id": "torn')
    return [json.loads(line)["number"] for line in path.read_bytes().splitlines()[:-1]]


def test_a_killed_run_goes_on_to_the_same_answers_and_asks_nothing_twice(
    server: Server, prompts: Path, tmp_path: Path
):
    run(PLAIN, tmp_path / "whole", server.url, prompts)
    server.asked.clear()
    server.delay = 0.02
    over = killed_after(8, PLAIN, tmp_path / "out", server.url, prompts)
    assert 8 <= len(over) < 30
    time.sleep(0.1)  # what was on its way when it was killed
    at_kill = Counter(server.asked)
    server.delay = 0.0
    card = run(PLAIN, tmp_path / "out", server.url, prompts)
    again = server.asked - at_kill
    assert sum(again.values()) <= 33 - sum(at_kill.values()) + 2 * 3  # three were running
    assert not [n for n in over if again[f"What is {n} called?"]]
    for name in ("answers.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert card.results["tokens"] == read_card(tmp_path / "whole").results["tokens"]


def test_many_tasks_of_the_filters_leave_what_one_does(
    server: Server, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run(PLAIN, tmp_path / "one", server.url, prompts)
    monkeypatch.setattr(module, "_LEAST", 1)
    run(PLAIN, tmp_path / "many", server.url, prompts)
    assert (tmp_path / "many/answers.jsonl").read_bytes() == (tmp_path / "one/answers.jsonl").read_bytes()


def test_a_kill_between_answers_and_report_costs_no_answer(
    server: Server, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def kill(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", kill)
        with pytest.raises(KeyboardInterrupt):
            run(PLAIN, tmp_path / "out", server.url, prompts)
    before = server.requests
    card = run(PLAIN, tmp_path / "out", server.url, prompts)
    assert server.requests == before
    assert card.results["kept"] == 30


def test_a_stopped_teacher_of_ours_goes_on_to_the_same_answers(
    teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prompts = written(tmp_path, [{"turns": ["def f", "x"][: 1 + n % 2]} for n in range(12)])
    config = HERE.but(**{"sampling.temperature": 3.0, "sampling.max_tokens": 8})
    run(config, tmp_path / "whole", teacher_folder, prompts, max_batch=5)
    append, count = Lines.append, iter(range(100))

    def stopped(lines: Lines, row: dict[str, Any]) -> None:
        append(lines, row)
        if next(count) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Lines, "append", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "out", teacher_folder, prompts, max_batch=5)
    run(config, tmp_path / "out", teacher_folder, prompts, max_batch=3)
    assert next(count) == 5
    assert (tmp_path / "out/answers.jsonl").read_bytes() == (tmp_path / "whole/answers.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 2, "sampling.temperature": 0.0}, "samples=2 at temperature 0 would be equal"),
        ({"sampling.logprobs": 2}, "answers are kept as text"),
        ({"weights.refusal": -1.0}, "weights.refusal"),
        ({"weights.anger": 2.0}, "has no setting 'anger'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        AnswersConfig().but(**changes)


@pytest.mark.parametrize(
    ("here", "changes", "told"),
    [
        (True, {"sampling.stop": ["."]}, "sampling.stop has no place with a teacher that runs here"),
        (False, {"sampling.top_k": 5}, "sampling.top_k has no place with an endpoint"),
        (False, {"quantize": "int8"}, "quantize is for a teacher that runs here"),
    ],
)
def test_settings_that_a_teacher_cannot_heed_are_refused(
    here: bool, changes: dict[str, Any], told: str, teacher_folder: Path, prompts: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=told):
        run(PLAIN.but(**changes), tmp_path / "out", teacher_folder if here else "http://host/v1", prompts)
    assert not (tmp_path / "out").exists()


def test_a_models_name_is_for_endpoints(teacher_folder: Path, prompts: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="model='a' is for an endpoint"):
        run(PLAIN, tmp_path / "out", teacher_folder, prompts, model="a")


def test_half_a_surrogate_pair_is_named_before_anything_is_asked(server: Server, tmp_path: Path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"id": "x", "prompt": "a\\ud800"}\n')
    with pytest.raises(ValueError, match=r"asked\.jsonl, prompt x: character 1"):
        run(PLAIN, tmp_path / "out", server.url, asked)
    assert server.requests == 0


def test_other_settings_in_the_same_folder_are_refused(server: Server, prompts: Path, tmp_path: Path):
    run(PLAIN, tmp_path / "out", server.url, prompts)
    with pytest.raises(ValueError, match=r"other settings: sampling\.seed: 0 -> 1"):
        run(PLAIN.but(**{"sampling.seed": 1}), tmp_path / "out", server.url, prompts)
    with pytest.raises(ValueError, match=r"other settings: input model: teacher -> another"):
        run(PLAIN, tmp_path / "out", server.url, prompts, model="another")
