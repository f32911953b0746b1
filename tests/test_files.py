"""Writing that is whole or not there."""

import json
import os
from pathlib import Path

import pytest

from orchestrator.errors import OrchestrateError
from orchestrator.files import JsonLines, new_folder, read_json, read_json_lines, sha256_of, write_atomic, write_json


class Unwritable(str):
    """Text whose bytes cannot be made, in the middle of a write."""

    def encode(self, *arguments: object) -> bytes:
        raise RuntimeError("no bytes")


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError):
        write_atomic(path, Unwritable("x"))
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(OSError, match="directory"):
        write_atomic(taken, "text")
    assert list(tmp_path.iterdir()) == [taken]


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, "a long text")
    write_atomic(path, b"ab")
    assert path.read_bytes() == b"ab"


def test_a_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"", b"{", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(OrchestrateError, match=r"a\.json should hold JSON"):
            read_json(path)


def test_records_are_read_in_their_order_and_from_an_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert list(read_json_lines(path)) == []
    lines = JsonLines(path)
    for number in range(3):
        lines.append({"number": number, "text": "ä\n"})
    lines.close()
    read = list(read_json_lines(path))
    assert [record["number"] for _, record in read] == [0, 1, 2]
    assert read[-1][0] == path.stat().st_size
    assert [record["number"] for _, record in read_json_lines(path, read[0][0])] == [1, 2]


@pytest.mark.parametrize("cut", [1, 5, 8])
def test_a_torn_last_line_is_left_for_the_next_reading(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    whole = b'{"a":1}\n{"a":2}\n'
    path.write_bytes(whole[:-cut])
    read = list(read_json_lines(path))
    assert read == [(8, {"a": 1})]
    path.write_bytes(whole)
    assert list(read_json_lines(path, 8)) == [(16, {"a": 2})]


def test_a_torn_middle_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"a":\n{"a":3}\n')
    reading = read_json_lines(path)
    assert next(reading) == (8, {"a": 1})
    with pytest.raises(OrchestrateError, match=r"a\.jsonl is damaged at byte 8"):
        next(reading)


def test_two_writers_never_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    pairs = [JsonLines(path), JsonLines(path)]
    for number in range(200):
        pairs[number % 2].append({"number": number, "filling": "x" * 300})
    assert [record["number"] for _, record in read_json_lines(path)] == list(range(200))
    for lines in pairs:
        lines.close()


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    with new_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text("text")
        assert not target.exists()
    assert (target / "inner" / "a").read_text() == "text"
    assert list(target.parent.iterdir()) == [target]
    mask = os.umask(0o022)
    os.umask(mask)
    assert target.stat().st_mode & 0o777 == 0o777 & ~mask  # as mkdir would make it


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_new_folder_leaves_nothing_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "a").write_text("text")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OrchestrateError, match="exists already"), new_folder(tmp_path):
        pass
    assert (tmp_path / "a").read_text() == "mine"


def test_the_checksum_is_that_of_the_standard(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_keys_are_written_in_the_order_given(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": 1, "a": "ä"})
    assert (tmp_path / "a").read_text().endswith("\n")
    assert list(json.loads((tmp_path / "a").read_text())) == ["b", "a"]
    assert "ä" in (tmp_path / "a").read_text()
