"""Models by name: what is fetched from a hub, what is not asked for, and what is said when it fails.

The hub is a real HTTP server on this machine that speaks the four requests which fetching consists of.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from gemwright.hub import fetch
from gemwright.model import checkpoint
from gemwright.model.config import GemmaConfig, alternating
from gemwright.model.gemma import Gemma

NAME, COMMIT = "google/tiny", "a" * 40
TINY = GemmaConfig(
    d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, pattern=alternating(2), vocab_size=40,
    query_pre_attn_scalar=8, window=4, max_seq_len=32,
)  # fmt: skip
CHUNK = 1024  # what is written at once, and so what a broken connection may lose: 10 MB in earnest
PART = "model-00002-of-00004.safetensors"


class Hub(ThreadingHTTPServer):
    """One repository, `google/tiny`, and how it answers; `asked` keeps every request."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.asked: list[tuple[str, str, str | None]] = []
        self.gated = False
        self.breaks: dict[str, list[str]] = {}
        """What befalls the next downloads of a file: `cut` (half of it comes) or `fail` (an error 500)."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloads(self) -> list[tuple[str, str | None]]:
        """The files that were sent, with the ranges asked for."""
        return [
            (path.rpartition("/")[2], part)
            for verb, path, part in self.asked
            if verb == "GET" and "/resolve/" in path
        ]


class Answers(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path == f"/api/models/{NAME}/revision/main":
            self.tell(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            self.tell(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/{NAME}/tree/{COMMIT}":
            files = [file for file in self.server.folder.rglob("*") if file.is_file()]
            self.tell(200, json.dumps([self.listed(file) for file in files]).encode())
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.send_file(self.server.folder / path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))
        else:
            self.tell(401, b"", {"X-Error-Code": "RepoNotFound"})

    def listed(self, file: Path) -> dict[str, Any]:
        path = file.relative_to(self.server.folder).as_posix()
        return {"type": "file", "path": path, "size": file.stat().st_size, "oid": etag(file)}

    def send_file(self, file: Path) -> None:
        if self.server.gated and self.headers.get("Authorization") != "Bearer hf_accepted":
            known = self.headers.get("Authorization") is not None
            return self.tell(403 if known else 401, b"", {"X-Error-Code": "GatedRepo"})
        befalls = self.server.breaks.get(file.name, []) if self.command == "GET" else []
        fate = befalls.pop(0) if befalls else ""
        if fate == "fail":
            return self.tell(500, b"")
        content, status = file.read_bytes(), 200
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(part[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            content, status = content[start:], 206
        self.tell(status, content, headers, cut=fate == "cut")

    def tell(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model in four parts and files that are none of ours, an empty cache, no token."""
    folder = tmp_path / "published"
    checkpoint.save(Gemma(TINY), folder, max_shard_bytes=6_000)
    for name in ("README.md", "model.gguf", "pytorch_model.bin", "original/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of no use to us")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    settings = {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": False,
        "DOWNLOAD_CHUNK_SIZE": CHUNK,
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HF_STORED_TOKENS_PATH": str(tmp_path / "no-tokens"),
    }
    for key, value in settings.items():
        monkeypatch.setattr(constants, key, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def assert_is_the_published(folder: Path, hub: Hub) -> None:
    found, published = checkpoint.load(folder).state_dict(), checkpoint.load(hub.folder).state_dict()
    assert list(found) == list(published)
    assert all(torch.equal(found[key], published[key]) for key in found)


def no_line_break(error: pytest.ExceptionInfo[BaseException]) -> bool:
    """What the command line prints is one sentence or two, not a page."""
    return "\n" not in str(error.value)


def test_a_model_is_fetched_by_its_name(hub: Hub):
    assert_is_the_published(fetch(NAME), hub)


def test_only_the_files_that_are_read_are_fetched(hub: Hub):
    folder = fetch(NAME)
    ours = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    ours |= {f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)}
    assert {path.name for path in folder.rglob("*")} == ours
    assert {name for name, _ in hub.downloads()} == ours


def test_what_is_cached_is_not_fetched_again(hub: Hub):
    folder = fetch(NAME)
    hub.asked.clear()
    assert fetch(NAME) == folder
    assert not hub.downloads()


def test_a_folder_is_taken_as_it_is_and_nobody_is_asked(hub: Hub, tmp_path: Path):
    (tmp_path / NAME).mkdir(parents=True)
    for given in (NAME, tmp_path / NAME, f"./{NAME}"):
        assert fetch(given).resolve() == tmp_path / NAME
    assert not hub.asked


@pytest.mark.parametrize(
    "path", ["./runs/none", "../none", "/none/there", "~/none", "runs/laptop/distilled", "none", "a b/c"]
)
def test_what_looks_like_a_path_is_never_asked_for(hub: Hub, path: str):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .* or a model on Hugging Face"):
        fetch(path)
    assert not hub.asked


def test_a_file_is_no_checkpoint(hub: Hub):
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file. Name the folder"):
        fetch(hub.folder / "config.json")


def test_a_name_that_is_nowhere_is_told_from_both_sides(hub: Hub):
    with pytest.raises(
        FileNotFoundError, match="runs/distilled is neither a folder here nor a model at"
    ) as error:
        fetch("runs/distilled")
    assert no_line_break(error)


def test_a_revision_that_is_not_there_is_named(hub: Hub):
    with pytest.raises(FileNotFoundError, match=r"google/tiny has no revision 'v9'\. Leave it out"):
        fetch(NAME, revision="v9")


def test_a_revision_of_a_folder_is_refused(hub: Hub):
    with pytest.raises(ValueError, match="is a folder, which has no revisions"):
        fetch(hub.folder, revision="main")


@pytest.mark.parametrize("token", [None, "hf_stranger"])
def test_gated_weights_say_where_to_accept_the_licence(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str | None
):
    hub.gated = True
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        PermissionError, match=rf"Accept it at {hub.url}/{NAME}.*`hf auth login` or HF_TOKEN"
    ) as error:
        fetch(NAME)
    assert no_line_break(error)


def test_gated_weights_come_to_who_accepted_the_licence(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.gated = True
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    assert_is_the_published(fetch(NAME), hub)


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        hub.shutdown()
        hub.server_close()


@pytest.mark.parametrize("how", ["offline", "refused"])
def test_without_the_hub_the_cache_serves(hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str):
    fetch(NAME)
    unreachable(hub, monkeypatch, how)
    assert_is_the_published(fetch(NAME), hub)


@pytest.mark.parametrize(
    ("how", "says"), [("offline", "HF_HUB_OFFLINE forbids"), ("refused", "cannot be reached")]
)
def test_without_hub_and_cache_the_error_says_both(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, says: str
):
    unreachable(hub, monkeypatch, how)
    with pytest.raises(
        ConnectionError, match=f"{NAME} is no folder here, the cache .* and .*{says}"
    ) as error:
        fetch(NAME)
    assert no_line_break(error)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub):
    hub.breaks[PART] = ["cut"]
    assert_is_the_published(fetch(NAME), hub)
    came = (hub.folder / PART).stat().st_size // 2 // CHUNK * CHUNK
    assert came > CHUNK
    assert [part for name, part in hub.downloads() if name == PART] == [None, f"bytes={came}-"]


def test_a_fetch_that_was_given_up_goes_on_with_what_is_missing(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.breaks[PART] = ["cut", "fail"]
    with pytest.raises(ConnectionError, match=f"fetching {NAME} from .* broke off .* Run the same") as error:
        fetch(NAME)
    assert no_line_break(error)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="does not hold the whole of such a model"):
        fetch(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    done = {name for name, _ in hub.downloads()} - {PART}
    hub.asked.clear()
    assert_is_the_published(fetch(NAME), hub)
    again = {name for name, _ in hub.downloads()}
    assert PART in again
    assert "config.json" in done - again


def test_a_part_that_is_missing_from_a_folder_is_named(hub: Hub):
    (hub.folder / PART).unlink()
    with pytest.raises(FileNotFoundError, match=f"{PART} is missing: the checkpoint is not whole"):
        checkpoint.load(fetch(hub.folder))


def test_the_environment_says_which_hub_and_which_cache(hub: Hub, tmp_path: Path):
    script = f"from gemwright.hub import fetch\nprint(fetch({NAME!r}))"
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    folder = Path(done.stdout.strip())  # nothing else on stdout: the bars are on stderr
    assert folder.is_relative_to(tmp_path / "other")
    assert_is_the_published(folder, hub)
