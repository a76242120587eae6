"""What there is to read, documents as they were written, and everything else set aside with its reason."""

import errno
import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from gemwright.reading import streams, units
from gemwright.reading.records import ReadConfig, Record, Row, read, read_rows
from gemwright.reading.units import HubDataset, plan

PARAGRAPHS = ReadConfig(passage_characters=1)


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    yield
    streams._newlines.cache_clear()
    units.hub_stream.cache_clear()


def put(path: Path, content: bytes | str | list[Any]) -> Path:
    """A file of bytes, of text, or of records as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def everything(*sources: Path | str | HubDataset, config: ReadConfig | None = None) -> list[Record]:
    return [record for unit in plan(sources) for record in read(unit, config or ReadConfig())]


def texts(records: list[Record]) -> list[str]:
    return [record.text for record in records if record.problem is None]


def problems(records: list[Record]) -> list[tuple[str, int | None]]:
    return [(record.problem, record.line) for record in records if record.problem is not None]


def prose(paragraphs: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [
        "\n".join(" ".join(draw.choices(["żółw", "the", "of", "turtle", "乌龟"], k=9)) for _ in range(3))
        + str(n)
        for n in range(paragraphs)
    ]


# --- the plan


def test_sources_keep_their_order_and_files_are_read_by_path(tmp_path: Path):
    for name in (
        "web/b.txt",
        "web/a/z.txt",
        "web/a.txt",
        "web/.hidden",
        "web/__pycache__/x.py",
        "books/1.txt",
    ):
        put(tmp_path / name, "text")
    found = [(unit.source, unit.file) for unit in plan([tmp_path / "web", tmp_path / "books"])]
    assert found == [("web", "a.txt"), ("web", "a/z.txt"), ("web", "b.txt"), ("books", "1.txt")]


def test_sources_of_one_name_are_told_apart(tmp_path: Path):
    sources = [
        put(tmp_path / name, "text") for name in ("a/web.txt", "b/web.jsonl.gz", "c/web/1.txt", "web-2.md")
    ]
    sources[2] = sources[2].parent
    assert [unit.source for unit in plan(sources)] == ["web", "web-2", "web-3", "web-2-2"]


def test_the_standard_library_is_a_source():
    found = plan(["python"])
    assert {unit.source for unit in found} == {"python"}
    assert "asyncio/base_events.py" in {unit.file for unit in found}
    assert not [unit.file for unit in found if unit.file.startswith(("test/", "site-packages/"))]


def test_a_missing_path_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist.*Correct"):
        plan([tmp_path / "nowhere"])


def test_an_empty_folder_and_no_source_at_all_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no files"):
        plan([tmp_path])
    with pytest.raises(ValueError, match="Name at least one"):
        plan([])


def test_a_folder_that_cannot_be_listed_stops_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Passed over, as the walk does by itself, its files would be missing and nobody would know."""
    put(tmp_path / "open/a.txt", "text")
    put(tmp_path / "closed/b.txt", "text")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        plan([tmp_path])


def test_a_loop_of_links_is_not_followed(tmp_path: Path):
    put(tmp_path / "a/b.txt", "text")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    assert [unit.file for unit in plan([tmp_path])] == ["a/b.txt"]


def test_units_travel_to_workers(tmp_path: Path):
    found = plan([put(tmp_path / "a.txt", "text")])
    assert pickle.loads(pickle.dumps(found)) == found


def test_large_text_and_json_lines_are_cut_and_the_rest_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(streams, "UNIT_BYTES", 100)
    names = ("a.txt", "b.jsonl", "c.json", "d.txt.gz", "e.parquet")
    cuts = [(u.file, u.start, u.stop, u.size) for u in plan([put(tmp_path / n, "x" * 250) for n in names])]
    assert cuts[:3] == [("a.txt", 0, 100, 100), ("a.txt", 100, 200, 100), ("a.txt", 200, None, 50)]
    assert [file for file, *_ in cuts[3:]] == ["b.jsonl"] * 3 + ["c.json", "d.txt.gz", "e.parquet"]


# --- text


def test_a_passage_is_named_by_its_first_byte(tmp_path: Path):
    content = "\ufeff\n \n„Żółw”\r\n\r\n\r\n  second\n".encode()
    found = everything(put(tmp_path / "books/a/1.txt", content).parent.parent, config=PARAGRAPHS)
    assert texts(found) == ["„Żółw”", "  second"]
    for record in found:
        file, _, offset = record.id.partition("#")
        assert file == "books/a/1.txt"
        assert content[int(offset) :].decode().startswith(record.text)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_of_every_system_become_one(tmp_path: Path, end: str):
    source = put(tmp_path / "a.txt", end.join(["one", "two", "", "three", ""]))
    assert texts(everything(source, config=PARAGRAPHS)) == ["one\ntwo", "three"]


def test_white_space_between_passages_is_no_document_and_no_problem(tmp_path: Path):
    found = everything(put(tmp_path / "a.txt", "one\n" + " \n" * 5_000 + "\n\n \n"))
    assert [(record.text, record.problem) for record in found] == [("one", None)]


def test_a_file_is_one_document_if_asked(tmp_path: Path):
    text = "\n\n".join(prose(500, seed=0))
    source = put(tmp_path / "a.txt", text)
    assert texts(everything(source, config=ReadConfig(passage_characters=None))) == [text]
    bounded = everything(source, config=ReadConfig(passage_characters=None, max_characters=20_000))
    assert 1 < len(bounded) < len(text) / 10_000 + 1


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 7, 64, 1_000, 4_096])
def test_pieces_of_any_size_give_every_paragraph_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, end: str
):
    source = put(
        tmp_path / "a.txt", (end + end).join(prose(40, seed=1)).replace("\n", end).replace("\r\r", "\r")
    )
    whole = everything(source, config=PARAGRAPHS)
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    assert len(plan([source])) == -(-source.stat().st_size // size)
    assert everything(source, config=PARAGRAPHS) == whole


@pytest.mark.parametrize("size", [50, 700])
def test_text_without_blank_lines_is_shared_out_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    text = "żółw,乌龟\n" * 2_000
    source = put(tmp_path / "a.csv", text)
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    monkeypatch.setattr(streams, "_EDGE", 40)
    found = everything(source)
    assert problems(found) == []
    assert len(found) > 2
    assert "\n".join(texts(found)) == text.rstrip()


def test_a_line_belongs_to_the_piece_where_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = put(tmp_path / "a.txt", "龟" * 500)
    monkeypatch.setattr(streams, "UNIT_BYTES", 100)
    monkeypatch.setattr(streams, "_EDGE", 10)
    (record,) = everything(source)
    assert record.text == "龟" * 500


@pytest.mark.parametrize("unit", [900, 1 << 20])
@pytest.mark.parametrize("block", [64, 4_096, 1 << 20])
def test_a_long_line_of_text_is_set_aside_and_what_surrounds_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, unit: int
):
    monkeypatch.setattr(streams, "BLOCK", block)
    monkeypatch.setattr(streams, "UNIT_BYTES", unit)
    monkeypatch.setattr(streams, "_EDGE", 40)
    source = put(tmp_path / "a.txt", "before it\n\n" + "ż" * 1_000 + "\nbehind it\n\nand the end\n")
    found = everything(source, config=ReadConfig(passage_characters=1, max_line_bytes=1_500))
    assert texts([record for record in found if not record.problem]) == [
        "before it",
        "behind it",
        "and the end",
    ]
    (long,) = (record for record in found if record.problem)
    assert (long.problem, long.line, long.metadata) == ("line_too_long", 3, {"detail": "2,000 bytes"})
    offset = found[found.index(long) + 1].id.split("#")[1]
    assert source.read_bytes()[int(offset) :].startswith(b"behind it")


@pytest.mark.parametrize("size", [20, 1_000_000])
def test_a_broken_passage_is_set_aside_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    monkeypatch.setattr("gemwright.reading.records._BINARY_HEAD", 4)
    content = b"first paragraph\n\nsecond\nparagraph\n\n\nd\xe9j\xe0 vu\n\nnul\0 here\n\nlast"
    found = everything(put(tmp_path / "a.txt", content), config=PARAGRAPHS)
    assert texts(found) == ["first paragraph", "second\nparagraph", "last"]
    assert problems(found) == [("broken_utf8", 7), ("nul_bytes", 9)]
    assert [(r.text, r.id) for r in found if r.problem] == [
        ("d\ufffdj\ufffd vu", "a/a.txt#36"),
        ("nul\ufffd here", "a/a.txt#45"),
    ]


def test_a_binary_file_is_one_problem_however_many_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "UNIT_BYTES", 100)
    for name in ("a.bin", "b.jsonl", "c.json"):
        put(tmp_path / name, b"\x7fELF\0\0 \n\n text" * 100)
    assert problems(everything(tmp_path)) == [("binary", None)] * 3


def test_empty_files_are_told(tmp_path: Path):
    for name, content in {
        "a.txt": b"",
        "b.txt": b"\xef\xbb\xbf \n",
        "c.jsonl": b"\n\n",
        "d.json": b"[]",
    }.items():
        put(tmp_path / name, content)
    put(tmp_path / "e.txt.gz", gzip.compress(b""))
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "f.parquet")
    assert problems(everything(tmp_path)) == [("empty_file", None)] * 6


def test_an_excerpt_is_short(tmp_path: Path):
    (record,) = everything(put(tmp_path / "a.txt", b"\xff" + b"x" * 5_000))
    assert record.text == "\ufffd" + "x" * 199


# --- records


def test_a_record_keeps_its_id_and_its_plain_fields(tmp_path: Path):
    rows = [
        {
            "text": "one\r\n",
            "id": "x-1",
            "score": 0.5,
            "ok": True,
            "url": "a",
            "n": 3,
            "list": [1],
            "none": None,
        },
        {"text": "two", "id": 7},
        {"text": "three"},
        {"text": "four", "id": None},
    ]
    found = everything(put(tmp_path / "web.jsonl", rows))
    assert [record.id for record in found] == ["x-1", "7", "web/web.jsonl:3", "web/web.jsonl:4"]
    assert [record.line for record in found] == [None, None, 3, 4]
    assert found[0].metadata == {"score": 0.5, "ok": True, "url": "a", "n": 3}
    assert found[0].text == "one\n"


def test_other_keys_can_be_named(tmp_path: Path):
    source = put(tmp_path / "web.jsonl", [{"body": "one", "name": "a", "text": "title"}])
    (record,) = everything(source, config=ReadConfig(text_key="body", id_key="name"))
    assert (record.text, record.id, record.metadata) == ("one", "a", {"text": "title"})


BAD_LINES = {
    b'{"text": "torn': "malformed_json",
    b'{"text": "a", "score": NaN}': "malformed_json",
    b'{"text": ' + b"[" * 5_000: "malformed_json",
    b'{"text": "d\xe9j\xe0 vu"}': "broken_utf8",
    b'{"text": "\\ud83d"}': "broken_utf8",
    b'{"body": "a"}': "missing_key",
    b'{"text": null}': "wrong_type",
    b'{"text": ["a"]}': "wrong_type",
    b'"text"': "wrong_type",
    b'{"text": " \\n"}': "empty",
    b'{"text": "a\\u0000b"}': "nul_bytes",
    b'{"text": "%s"}' % (b"x" * 9_990): "line_too_long",
}


@pytest.mark.parametrize("size", [37, 1_000_000])
def test_bad_lines_are_set_aside_with_their_numbers_and_reading_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    good = [b'{"text": "%d"}' % n for n in range(len(BAD_LINES))]
    content = b"\n".join(b"%s\n\n%s" % pair for pair in zip(good, BAD_LINES, strict=True))
    found = everything(put(tmp_path / "a.jsonl", content), config=ReadConfig(max_line_bytes=9_999))
    assert texts(found) == [str(n) for n in range(len(BAD_LINES))]
    assert problems(found) == [(reason, 3 * n + 3) for n, reason in enumerate(BAD_LINES.values())]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_is_wrong_is_said_in_words_and_shown_in_an_excerpt(tmp_path: Path, name: str):
    (record,) = everything(put(tmp_path / name, '{"body": "%s"}' % ("x" * 500)))
    assert record.metadata == {"detail": "no 'text'"}
    assert record.text == '{"body":"' + "x" * 191
    (record,) = everything(
        put(tmp_path / name, '{"text": "%s"}' % ("x" * 500)), config=ReadConfig(max_line_bytes=99)
    )
    assert (record.text, record.metadata) == ("", {"detail": "512 bytes"})


@pytest.mark.parametrize("size", [3, 33, 250])
def test_lines_read_in_pieces_are_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int):
    draw = random.Random(2)
    source = put(tmp_path / "a.jsonl", [{"text": "é" * draw.randint(1, 60)} for _ in range(60)])
    whole = everything(source)
    assert len(whole) == 60
    monkeypatch.setattr(streams, "UNIT_BYTES", size)
    assert everything(source) == whole


@pytest.mark.parametrize("block", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_records_is_read_value_by_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
):
    monkeypatch.setattr(streams, "BLOCK", block)
    rows = [{"text": f'[{n}] "quo\\ted" {{', "more": [{"a": [n]}], "k": "}"} for n in range(5)]
    found = everything(put(tmp_path / "a.json", json.dumps(rows, indent=indent)))
    assert texts(found) == [row["text"] for row in rows]
    assert [record.line for record in found] == ([1] * 5 if indent is None else [2, 13, 24, 35, 46])


def test_a_json_file_may_hold_an_object_a_line_or_one_object(tmp_path: Path):
    assert len(texts(everything(put(tmp_path / "a.json", [{"text": "one"}, {"text": "two"}])))) == 2
    found = everything(put(tmp_path / "b.json", json.dumps({"name": "settings", "list": [1, 2]}, indent=2)))
    assert problems(found) == [("missing_key", 1)]


@pytest.mark.parametrize("block", [3, 1 << 20])
def test_a_bad_value_of_a_list_is_set_aside_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
):
    monkeypatch.setattr(streams, "BLOCK", block)
    long = r'{"text": "\"\\\" {[ %s"}' % ("x\\\\ " * 99)
    content = '[\n{"text": "one"},\n{"text": one},\n' + long + ',\n{"text": "two"},\n"three"]\n'
    found = everything(put(tmp_path / "a.json", content), config=ReadConfig(max_line_bytes=50))
    assert texts(found) == ["one", "two"]
    assert problems(found) == [("malformed_json", 3), ("line_too_long", 4), ("wrong_type", 6)]
    assert [record.metadata for record in found if record.problem == "line_too_long"] == [
        {"detail": f"{len(long)} bytes"}
    ]


def test_rows_are_the_records_as_they_were_stored(tmp_path: Path):
    rows = [{"conversation": [{"role": "user", "content": "hi"}], "id": 1}]
    put(tmp_path / "chats/a.jsonl", [*rows, 3])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats/b.parquet")
    put(tmp_path / "chats/c.md", "# about\n\nthese chats")
    found = [row for unit in plan([tmp_path / "chats"]) for row in read_rows(unit, ReadConfig())]
    assert [row.record for row in found] == [rows[0], 3, rows[0], None]
    assert [(row.file, row.line, row.problem) for row in found[2:]] == [
        ("b.parquet", 1, None),
        ("c.md", None, "wrong_type"),
    ]


def test_a_row_is_counted_from_the_start_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(streams, "UNIT_BYTES", 50)
    source = put(tmp_path / "a.jsonl", [{"n": n} for n in range(1, 100)])
    found: list[Row] = [row for unit in plan([source]) for row in read_rows(unit, ReadConfig())]
    assert [row.line for row in found] == [row.record["n"] for row in found] == list(range(1, 100))


# --- packed files, and damage


def pack_zst(data: bytes) -> bytes:
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])  # two frames, as pzstd writes


def pack_gz(data: bytes) -> bytes:
    return gzip.compress(data[:99]) + gzip.compress(data[99:])


@pytest.mark.parametrize(("ending", "pack"), [("gz", pack_gz), ("zst", pack_zst)])
def test_packed_files_hold_what_was_packed(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]):
    paragraphs = prose(3_000, seed=3)
    put(tmp_path / f"a.txt.{ending}", pack("\n\n".join(paragraphs).encode()))
    put(tmp_path / f"b.jsonl.{ending}", pack(b"".join(b'{"text": "%d"}\n' % n for n in range(3_000))))
    found = everything(tmp_path, config=PARAGRAPHS)
    assert texts(found) == paragraphs + [str(n) for n in range(3_000)]
    assert problems(found) == []


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
@pytest.mark.parametrize("cut", [0.2, 0.9])
def test_what_lies_before_the_damage_of_a_packed_file_is_kept(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes], cut: float
):
    draw = random.Random(4)
    paragraphs = [draw.randbytes(200).hex() for _ in range(5_000)]
    for name, data in {
        "a.txt": "\n\n".join(paragraphs).encode(),
        "b.jsonl": b"".join(b'{"text": "%s"}\n' % paragraph.encode() for paragraph in paragraphs),
    }.items():
        packed = pack(data)
        found = everything(
            put(tmp_path / f"{name}.{ending}", packed[: int(len(packed) * cut)]), config=PARAGRAPHS
        )
        whole = texts(found)
        assert whole == paragraphs[: len(whole)]
        assert abs(len(whole) / 5_000 - cut) < 0.15
        assert [reason for reason, _ in problems(found)] == ["truncated"]
        assert found[-1].line == (None if name == "a.txt" else len(whole) + 1)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, write_page_checksum=True)
    return file.getvalue()


def test_members_of_an_archive_are_read_by_their_own_endings(tmp_path: Path):
    source = archive(
        tmp_path / "set.zip",
        {
            "b.jsonl": b'{"text": "two"}',
            "a/1.txt": b"one",
            "c.parquet": parquet([{"text": "three", "id": "3"}]),
            "d.txt.gz": gzip.compress(b"four"),
            "e.zip": b"PK\3\4\0\0",
            "__MACOSX/a": b"x",
            ".hidden/a": b"x",
        },
    )
    found = everything(source)
    assert [(r.text, r.id) for r in found if r.problem is None] == [
        ("one", "set/set.zip/a/1.txt#0"),
        ("two", "set/set.zip/b.jsonl:1"),
        ("three", "3"),
        ("four", "set/set.zip/d.txt.gz#0"),
    ]
    assert [(r.file, r.problem) for r in found if r.problem] == [("set.zip/e.zip", "binary")]


def test_a_large_archive_is_shared_out_by_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = archive(tmp_path / "set.zip", {f"{n:02d}.txt": b"%d" % n * 10 for n in range(20)})
    monkeypatch.setattr(streams, "UNIT_BYTES", 50)
    assert len(plan([source])) > 3
    assert texts(everything(source)) == [str(n) * 10 for n in range(20)]


def test_a_damaged_member_does_not_hide_the_next(tmp_path: Path):
    draw = random.Random(5)
    source = archive(
        tmp_path / "set.zip", {f"{n}.txt": draw.randbytes(2_000).hex().encode() for n in range(3)}
    )
    data = bytearray(source.read_bytes())
    at = data.find(b"1.txt") + 1_000
    data[at : at + 20] = bytes(20)
    source.write_bytes(data)
    found = everything(source)
    assert [(r.file, r.problem) for r in found if r.problem] == [("set.zip/1.txt", "truncated")]
    assert {r.file for r in found if r.problem is None} == {"set.zip/0.txt", "set.zip/2.txt"}


def test_an_archive_that_ends_early_is_one_problem(tmp_path: Path):
    source = archive(tmp_path / "set.zip", {f"{n}.txt": b"text" for n in range(3)})
    source.write_bytes(source.read_bytes()[:-50])
    assert problems(everything(source)) == [("truncated", None)]


def test_an_encrypted_member_is_told(tmp_path: Path):
    source = archive(tmp_path / "set.zip", {"a.txt": b"secret"})
    data = bytearray(source.read_bytes())
    data[6] |= 1
    data[data.find(b"PK\1\2") + 8] |= 1
    source.write_bytes(data)
    (record,) = everything(source)
    assert (record.problem, record.metadata) == ("unreadable", {"detail": "it is encrypted"})


def test_parquet_is_read_by_its_plain_columns(tmp_path: Path):
    rows = [
        {"text": f"{n}", "id": n, "score": n / 2, "nested": {"a": 1}, "tags": ["x"]} for n in range(5_000)
    ]
    found = everything(put(tmp_path / "a.parquet", parquet(rows)))
    assert texts(found) == [str(n) for n in range(5_000)]
    assert (found[7].id, found[7].metadata) == ("7", {"score": 3.5})


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_parquet_may_be_packed_again(tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]):
    data = parquet([{"text": "one"}, {"text": "two"}])
    source = put(tmp_path / f"a.parquet.{ending}", pack(data))
    assert texts(everything(source)) == ["one", "two"]
    source.write_bytes(pack(data)[:-20])
    assert problems(everything(source)) == [("truncated", None)]


def test_parquet_without_text_names_the_columns_there_are(tmp_path: Path):
    (record,) = everything(put(tmp_path / "a.parquet", parquet([{"body": "a", "url": "b"}] * 9)))
    assert (record.problem, record.text) == ("missing_key", "")
    assert record.metadata == {"detail": "no column 'text' among body, url"}


def test_a_broken_row_of_parquet_is_set_aside_alone(tmp_path: Path):
    strings = pa.array([b"one", b"d\xe9j\xe0", b"two"]).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    found = everything(tmp_path / "a.parquet")
    assert texts(found) == ["one", "two"]
    assert problems(found) == [("broken_utf8", 2)]


def test_parquet_that_ends_early_or_is_damaged_is_told_after_what_could_be_read(tmp_path: Path):
    rows = [{"text": random.Random(n).randbytes(100).hex()} for n in range(20_000)]
    data = parquet(rows)
    assert problems(everything(put(tmp_path / "a.parquet", data[:-100]))) == [("truncated", None)]
    broken = bytearray(data)
    broken[len(data) // 2] ^= 1  # which the checksum of its page gives away
    found = everything(put(tmp_path / "b.parquet", bytes(broken)))
    whole = texts(found)
    assert 1_000 < len(whole) < 15_000
    assert whole == [row["text"] for row in rows[: len(whole)]]
    assert problems(found) == [("truncated", len(whole) + 1)]


def test_a_file_that_may_not_be_opened_is_set_aside(tmp_path: Path):
    source = put(tmp_path / "a.txt", "text")
    (unit,) = plan([source])
    source.unlink()
    (record,) = read(unit, ReadConfig())
    assert (record.problem, record.metadata) == ("unreadable", {"detail": "No such file or directory"})


def test_no_space_left_is_no_problem_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> Iterator[bytes]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield b""

    (unit,) = plan([put(tmp_path / "a.txt", "text")])
    monkeypatch.setattr(streams, "blocks", full)
    with pytest.raises(OSError, match="No space"):
        list(read(unit, ReadConfig()))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst"])
def test_memory_does_not_grow_with_a_file_or_a_line(tmp_path: Path, name: str):
    draw = random.Random(6)
    rows = [{"text": draw.randbytes(size).hex()} for size in (7_000_000, *[2_500] * 2_000)]
    data = b"".join(json.dumps(row).encode() + b"\n\n" for row in rows)
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
    (unit,) = plan([put(tmp_path / name, pack(data))])
    del data, rows
    tracemalloc.start()
    count = sum(1 for _ in read(unit, ReadConfig(max_line_bytes=1 << 20)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count > 1_000
    assert most < 8e6


# --- data sets


@pytest.fixture
def dataset(tmp_path: Path) -> HubDataset:
    pytest.importorskip("datasets", reason="needs gemwright[hub]")
    folder = tmp_path / "owner/stories/data"
    folder.mkdir(parents=True)
    for shard in range(3):
        rows = [{"story": f"{shard} {n}", "n": n} for n in range(4)]
        (folder / f"train-{shard:05d}-of-00003.parquet").write_bytes(parquet(rows))
    return HubDataset(str(folder.parent), text_key="story")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_data_set_is_read_shard_by_shard(dataset: HubDataset):
    found = [list(read(unit, ReadConfig())) for unit in plan([dataset])]
    assert [[record.text for record in shard] for shard in found] == [
        [f"{shard} {n}" for n in range(4)] for shard in range(3)
    ]
    assert (found[1][2].id, found[1][2].metadata) == ("stories/train-00001:3", {"n": 2})


def test_a_shard_of_a_data_set_counts_as_a_large_piece(dataset: HubDataset):
    """Its size is not known before it is read; as nothing, all shards would be one worker's."""
    assert [unit.size for unit in plan([dataset])] == [streams.UNIT_BYTES] * 3


def test_a_data_set_may_be_named_in_text():
    assert HubDataset.parse("hf:owner/name") == HubDataset("owner/name")
    assert HubDataset.parse("hf:owner/name:en:test") == HubDataset("owner/name", "en", "test")
    assert HubDataset.parse("hf:owner/name::test") == HubDataset("owner/name", None, "test")
    for wrong in ("hf:", "hf::en", "hf:a:b:c:d"):
        with pytest.raises(ValueError, match="Write hf:owner/name"):
            HubDataset.parse(wrong)


def test_a_wrong_split_is_told_before_anything_is_read(dataset: HubDataset):
    with pytest.raises(ValueError, match=r"cannot be read as asked: .*other.*train"):
        plan([HubDataset(dataset.name, split="other")])


def test_offline_a_data_set_is_refused_at_once(tmp_path: Path):
    """In a process of its own, as the libraries read the variable when they are imported."""
    pytest.importorskip("datasets", reason="needs gemwright[hub]")
    code = "from gemwright.reading.units import plan\nplan(['hf:owner/name'])"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "ConnectionError: hf:owner/name::train cannot be reached" in done.stderr
    assert "Unset HF_HUB_OFFLINE" in done.stderr


@pytest.mark.parametrize("token", [None, "hf_x"])
def test_a_gated_data_set_says_what_to_do(monkeypatch: pytest.MonkeyPatch, token: str | None):
    datasets = pytest.importorskip("datasets", reason="needs gemwright[hub]")
    asked: dict[str, Any] = {}

    def refuse(*_: Any, **options: Any) -> Any:
        asked.update(options)
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    said = "HF_TOKEN is set, and its owner has no access" if token else "HF_TOKEN is not set"
    with pytest.raises(PermissionError, match=rf"is gated, and {said}.*huggingface.co/datasets/owner/name"):
        plan(["hf:owner/name"])
    assert asked["token"] == token


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install gemwright\[hub\]"):
        plan(["hf:owner/name"])


def test_a_data_set_that_breaks_off_stops_the_work(monkeypatch: pytest.MonkeyPatch, dataset: HubDataset):
    """A network that fails is no property of the data: set aside, its records would be missing in silence."""

    class Torn:
        num_shards = 1

        def shard(self, **_: int) -> Iterator[dict[str, str]]:
            yield {"story": "one"}
            raise OSError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(units, "hub_stream", lambda _: Torn())
    monkeypatch.setattr("gemwright.reading.records.hub_stream", lambda _: Torn())
    (unit,) = plan([dataset])
    with pytest.raises(ConnectionError, match=r"broke off after 1 records of shard 0.*again"):
        list(read(unit, ReadConfig()))


# --- real data


def test_languages_of_the_world_are_read_from_an_archive(data: Path):
    found = everything(data / "text/udhr2.zip")
    assert sum(len(text) for text in texts(found)) > 3e6
    assert len({record.file for record in found if record.problem is None}) > 380
    assert len(problems(found)) < 5


def test_every_kind_of_benchmark_file_is_read(data: Path):
    config = ReadConfig(text_key="question")
    assert len(texts(everything(data / "benchmarks/gsm8k_test.jsonl", config=config))) == 1_319
    config = ReadConfig(text_key="instruction")
    assert len(texts(everything(data / "benchmarks/arc_easy_test.json", config=config))) == 2_376
    config = ReadConfig(text_key="prompt", id_key="task_id")
    found = everything(data / "benchmarks/HumanEval.jsonl.gz", config=config)
    assert (len(texts(found)), found[0].id) == (164, "HumanEval/0")
