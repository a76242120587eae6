"""A real HTTP server that plays an endpoint, with the faults that endpoints have."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Reply = dict[str, Any] | bytes | int
"""The whole answer: a JSON object, raw bytes, or a status."""


def spoken(text: Any, finish: str = "stop", tokens: int = 3) -> dict[str, Any]:
    """An answer as the API gives it."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


def echo(body: dict[str, Any]) -> Reply:
    """Names the last turn, and how many there were."""
    turns = [message["content"] for message in body["messages"]]
    return spoken(f"So much of {turns[-1]!r}, after {len(turns) - 1} others.")


class Server(ThreadingHTTPServer):
    """Answers by `reply`, and counts. `fault(n)` may name what goes wrong with request n, from 1:
    a status, `garbage`, `no choices`, `null`, `close`, `cut` or `hang`."""

    daemon_threads = True

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = echo
        self.fault: Callable[[int], Any] = lambda number: None
        self.models: list[str] = ["teacher"]
        self.headers: dict[str, str] = {}
        self.delay = 0.0
        self.asked: Counter[str] = Counter()
        """Requests by the contents of their messages."""
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.requests = self.running = self.most_running = 0
        self.guard = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        """What a user would give."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that went away is no error here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet, or the client waits 40 ms for the second
    server: Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        assert self.path == "/v1/models"
        self._send(200, json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = "\n".join(message["content"] for message in body["messages"])
        with server.guard:
            server.requests += 1
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            server.asked[what] += 1
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            fault = server.fault(server.requests)
        time.sleep(server.delay)
        with server.guard:
            server.running -= 1  # before the client can send its next
        if fault is None and self.path != "/v1/chat/completions":
            fault = 404
        if fault == "hang":
            time.sleep(1.0)
            fault = "close"
        if fault == "close":
            self.close_connection = True
            self.connection.close()
            return
        reply = server.reply(body) if fault is None else _FAULTS.get(fault, fault)
        if isinstance(reply, int):
            return self._send(
                reply, json.dumps({"error": f"{reply} for {self.headers['Authorization']}"}).encode()
            )
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        if fault is None:
            with server.guard:
                server.answered[what] += 1
        self._send(200, data)

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


_FAULTS: dict[Any, Any] = {
    "garbage": b"<html>Bad gateway</html>",
    "no choices": {"choices": []},
    "null": spoken(None),
    "cut": b'{"choices": [{"message": {"content": "half an ans',
    "surrogate": rb'{"choices": [{"message": {"content": "\ud800"}}]}',
}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that does everything right, until a test tells it otherwise."""
    one = Server()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture(name="spoken")
def _spoken() -> Callable[..., dict[str, Any]]:
    """`spoken(text, finish, tokens)`: an answer as the API gives it."""
    return spoken
