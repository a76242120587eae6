"""The client against a real server: what is asked again, what is not, and how many at a time."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from gemwright.answer import endpoint as module
from gemwright.answer.endpoint import Endpoint, EndpointConfig, is_url
from gemwright.answer.teacher import Answered
from gemwright.generate.sampling import Sampling

Server = Any
QUICK = EndpointConfig(timeout_s=0.25, pause_s=0.005)
SAMPLING = Sampling(max_tokens=7, temperature=0.5, seed=3)
KEY = "sk-secret-0123456789"


def asked(
    server: Server, prompts: list[tuple[str, ...]], *, concurrency: int = 4, config: EndpointConfig = QUICK,
    sampling: Sampling = SAMPLING,
) -> list[Answered]:  # fmt: skip
    """What comes of some conversations, in their order."""
    with Endpoint(server.url, config, api_key=KEY, concurrency=concurrency) as endpoint:
        found = list(endpoint.answer(enumerate(prompts), sampling, "teacher"))
    assert sorted(number for number, _ in found) == list(range(len(prompts)))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def test_every_prompt_is_answered_once_though_one_request_in_ten_fails(server: Server):
    kinds = [500, 429, "garbage", "hang", "close", "no choices", "null", "cut", "surrogate", 503, 408]
    server.fault = lambda number: kinds[number // 10 % len(kinds)] if number % 10 == 5 else None
    server.delay = 0.002
    prompts = [(f"prompt {number}",) for number in range(120)]
    found = asked(server, prompts)
    assert all(one.finish == "stop" for one in found)
    assert [one.messages[0]["content"] for one in found] == [turn for (turn,) in prompts]
    assert all(repr(one.messages[0]["content"]) in one.messages[1]["content"] for one in found)
    assert set(server.answered.values()) == {1}
    assert len(server.answered) == 120
    assert server.requests > 120
    assert 2 <= server.most_running <= 4


def test_one_at_a_time_is_one_at_a_time(server: Server):
    server.delay = 0.005
    asked(server, [(f"prompt {number}",) for number in range(6)], concurrency=1)
    assert server.most_running == 1


def test_a_conversation_is_asked_turn_by_turn(server: Server):
    (found,) = asked(server, [("first", "second", "third")])
    assert [message["role"] for message in found.messages] == ["user", "model"] * 3
    assert [message["content"] for message in found.messages[::2]] == ["first", "second", "third"]
    assert found.tokens == 9
    roles = [[message["role"] for message in body["messages"]] for body in server.bodies]
    assert roles[2] == ["user", "assistant", "user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"] == found.messages[1]["content"]


def test_a_request_says_how_to_sample(server: Server):
    asked(server, [("a",), ("b",)], concurrency=1, sampling=SAMPLING.but(top_p=0.9, stop=("\n\n",)))
    assert [body.pop("seed") for body in server.bodies] == [3, 4]
    del server.bodies[0]["messages"]
    assert server.bodies[0] == {
        "model": "teacher", "max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["\n\n"],
    }  # fmt: skip


def test_what_is_not_set_is_not_sent(server: Server):
    asked(server, [("a",)])
    assert set(server.bodies[0]) == {"model", "max_tokens", "temperature", "seed", "messages"}


def test_the_key_is_sent_as_bearer(server: Server):
    asked(server, [("a",)])
    assert server.keys == {f"Bearer {KEY}"}


def test_a_cut_answer_ends_its_conversation(server: Server, spoken: Callable[..., Any]):
    server.reply = lambda body: spoken("and so on and", "length")
    (found,) = asked(server, [("first", "second")])
    assert (found.finish, len(found.messages), server.requests) == ("length", 2, 1)


def test_an_empty_answer_ends_its_conversation(server: Server, spoken: Callable[..., Any]):
    server.reply = lambda body: spoken(" \n")
    (found,) = asked(server, [("first", "second")])
    assert (found.finish, len(found.messages), server.requests) == ("stop", 2, 1)


def test_a_refused_prompt_is_put_aside_and_not_asked_again(server: Server, spoken: Callable[..., Any]):
    server.reply = lambda body: 400 if "bad" in body["messages"][-1]["content"] else spoken("fine")
    found = asked(server, [("good",), ("bad",), ("good too", "bad")])
    assert [one.finish for one in found] == ["stop", "refused_by_endpoint", "refused_by_endpoint"]
    assert "status 400" in found[1].detail
    assert KEY not in found[1].detail
    assert [message["content"] for message in found[2].messages] == ["good too", "fine", "bad"]
    assert max(server.asked.values()) == 1


def test_an_answer_that_a_content_filter_took_is_refused(server: Server, spoken: Callable[..., Any]):
    server.reply = lambda body: spoken(None, "content_filter")
    assert [one.finish for one in asked(server, [("a",)])] == ["refused_by_endpoint"]


def test_tries_are_used_up_and_the_others_answered(server: Server, spoken: Callable[..., Any]):
    server.reply = lambda body: 500 if "poison" in body["messages"][-1]["content"] else spoken("fine")
    found = asked(server, [("a",), ("poison",), ("b",), ("c",)], config=QUICK.but(tries=3))
    assert [one.finish for one in found] == ["stop", "unanswered", "stop", "stop"]
    assert found[1].detail.endswith("(3 tries)")
    assert server.asked["poison"] == 3


def test_an_endpoint_that_is_down_stops_the_run(server: Server):
    server.fault = lambda number: 502
    with pytest.raises(ConnectionError, match=r"answers nothing; the last time: status 502"):
        asked(server, [(f"prompt {number}",) for number in range(50)], config=QUICK.but(tries=2))
    assert len(server.asked) <= 8  # four failed, and at most so many more had begun


def test_an_endpoint_that_refuses_everything_stops_the_run(server: Server):
    server.fault = lambda number: 422
    with pytest.raises(ConnectionError, match=r"status 422"):
        asked(server, [(f"prompt {number}",) for number in range(50)])
    assert server.requests <= 8


def test_many_refusals_after_an_answer_do_not_stop_it(server: Server):
    server.fault = lambda number: None if number == 1 else 400
    found = asked(server, [(f"prompt {number}",) for number in range(20)], concurrency=1)
    assert sum(one.finish == "refused_by_endpoint" for one in found) == 19


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [(401, PermissionError, "--api-key-env"), (403, PermissionError, "--api-key-env"),
     (404, ValueError, "/v1"), (402, ValueError, "credit")],
)  # fmt: skip
def test_what_cannot_pass_stops_at_once_and_never_shows_the_key(
    server: Server, status: int, kind: type[Exception], remedy: str
):
    server.fault = lambda number: status
    with pytest.raises(kind, match=remedy) as error:
        asked(server, [("a",), ("b",)], concurrency=1)
    assert KEY not in str(error.value)
    assert server.requests == 1


def test_a_redirection_is_not_followed(server: Server):
    server.fault = lambda number: 307
    server.headers = {"Location": "http://elsewhere.example/v1"}
    with pytest.raises(ValueError, match=r"sends requests to http://elsewhere\.example/v1"):
        asked(server, [("a",)])


@pytest.mark.parametrize("tell", ["seconds", "date"])
def test_retry_after_is_heeded(server: Server, tell: str, monkeypatch: pytest.MonkeyPatch):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 100))
    server.headers["Retry-After"] = "100" if tell == "seconds" else date
    server.fault = lambda number: 429 if number == 1 else None
    waited: list[float] = []
    with Endpoint(server.url, QUICK) as endpoint:
        monkeypatch.setattr(endpoint._over, "wait", waited.append)
        list(endpoint.answer([(0, ["a"])], SAMPLING, "teacher"))
    assert [round(pause, -1) for pause in waited] == [100]


def test_pauses_double_and_are_drawn_below_a_minute(server: Server, monkeypatch: pytest.MonkeyPatch):
    server.fault = lambda number: 500
    waited: list[float] = []
    with Endpoint(server.url, EndpointConfig(tries=9, pause_s=1.0)) as endpoint:
        monkeypatch.setattr(endpoint._over, "wait", waited.append)
        list(endpoint.answer([(0, ["a"])], SAMPLING, "teacher"))
    longest = [1, 2, 4, 8, 16, 32, 60, 60]
    assert all(most / 2 <= pause <= most for pause, most in zip(waited, longest, strict=True))
    assert len(set(waited)) == 8


def test_the_only_model_is_found_and_one_of_several_has_to_be_named(server: Server):
    with Endpoint(server.url + "/", QUICK) as endpoint:
        assert endpoint.only_model() == "teacher"
        server.models = ["small", "large"]
        with pytest.raises(ValueError, match=r"serves 2 models: small, large\. Choose one by --model"):
            endpoint.only_model()


def test_nobody_at_home_is_told():
    with Endpoint("http://127.0.0.1:9/v1", QUICK.but(tries=1)) as endpoint:
        with pytest.raises(ConnectionError, match="Start the server, correct the URL"):
            endpoint.only_model()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0"])
def test_proxies_of_the_environment_do_not_lead_to_this_machine(host: str, monkeypatch: pytest.MonkeyPatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://proxy.example:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Endpoint(f"http://{host}:8000/v1", QUICK) as near, Endpoint("http://far.example/v1", QUICK) as far:
        assert not near._client.trust_env
        assert far._client.trust_env


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "http://host/v1?key=secret", "http:///v1", "http://host:port/v1"]
)
def test_a_url_that_cannot_be_or_holds_a_secret_is_refused(url: str):
    with pytest.raises(ValueError, match="URL") as error:
        Endpoint(url, QUICK)
    assert "secret" not in str(error.value)


def test_a_key_with_a_line_end_inside_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="characters that no key has") as error:
        Endpoint("http://host/v1", QUICK, api_key="sk-a\nsecret")
    assert "secret" not in str(error.value)


def test_the_line_end_of_a_file_is_no_part_of_a_key(server: Server):
    with Endpoint(server.url, QUICK, api_key=f"{KEY}\n") as endpoint:
        endpoint.only_model()
    assert server.keys == {f"Bearer {KEY}"}


def test_folders_and_names_are_no_urls():
    assert is_url("HTTPS://host/v1")
    assert not any(map(is_url, ("runs/teacher", "google/gemma-2-2b-it", "httpd/model")))


@pytest.mark.parametrize(
    ("said", "seconds"), [("7", 7.0), ("", 0.0), ("soon", 0.0), ("-3", 0.0), ("9" * 9, 3600.0)]
)
def test_retry_after_is_read_with_care(said: str, seconds: float):
    assert module._seconds(said) == seconds
