"""Which files are found, what is wrong with them, and how they are split into units of work."""

import gzip
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.units import Kind, SourceFile, choose_unit_bytes, kind_of, plan_units

LINE = b'{"text": "a"}\n'


def names_found(folder: Path, *inputs: Path, **options: Path) -> list[str]:
    return [str(Path(file.path).relative_to(folder)) for file in find_files(inputs, **options).files]


def write_parquet(path: Path, rows: int = 6, **columns: list[object]) -> Path:
    table = pyarrow.table(columns or {"text": [f"text {row}" for row in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path


# --- What is found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", Kind.LINES),
        ("A.NDJSON", Kind.LINES),
        ("a.jsonl.gz", Kind.GZIP_LINES),
        ("c4-train.00000-of-01024.json.gz", Kind.GZIP_LINES),
        ("a.JSONL.zst", Kind.ZSTD_LINES),
        ("a.b.parquet", Kind.PARQUET),
        ("read.me.md", Kind.PLAIN_TEXT),
    ],
)
def test_a_file_is_of_the_kind_that_its_suffix_says_in_any_case(name: str, kind: Kind) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize("name", ["a.json", "a.txt.gz", "a.gz", "jsonl", "a.jsonl.bz2", "gz", "a.jsonl/b", ""])
def test_a_file_of_no_kind_is_skipped_or_refused_where_it_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "corpus"
    path = folder / (name or "none")
    path.parent.mkdir(parents=True)
    path.touch()
    (folder / "good.txt").touch()
    found = find_files([folder])
    assert names_found(folder, folder) == ["good.txt"]
    assert sum(found.skipped.values()) == 1
    with pytest.raises(DataError, match="is of a kind that is not read; kinds are JSON lines"):
        find_files([path])


def test_links_to_files_and_folders_are_followed_and_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "blobs" / "deep").mkdir(parents=True)
    (tmp_path / "blobs" / "0123abcd").write_bytes(LINE)
    (tmp_path / "blobs" / "deep" / "b.txt").touch()
    corpus = tmp_path / "corpus"
    (corpus / "sub").mkdir(parents=True)
    (corpus / "a.jsonl").symlink_to("../blobs/0123abcd")
    (corpus / "again.jsonl").symlink_to("../blobs/0123abcd")
    (corpus / "linked").symlink_to("../blobs/deep")
    (corpus / "sub" / "up").symlink_to("..")
    (corpus / "z.md").touch()
    expected = ["a.jsonl", "z.md", "linked/b.txt"]
    assert names_found(corpus, corpus) == expected
    assert names_found(corpus, corpus, corpus / "sub" / ".." / "z.md", corpus / "*.md", corpus / "**") == expected


def test_an_output_within_an_input_is_no_input(tmp_path: Path) -> None:
    (tmp_path / "data.partial" / "units").mkdir(parents=True)
    (tmp_path / "data.partial" / "units" / "00000.quarantine.jsonl").touch()
    (tmp_path / "a.jsonl").write_bytes(LINE)
    options = {"leave_out": [tmp_path / "data", tmp_path / "data.partial"]}
    for inputs in ([tmp_path], [tmp_path / "**" / "*.jsonl"]):
        found = find_files(inputs, **options)
        assert [file.path for file in found.files] == [str(tmp_path / "a.jsonl")]
        assert found.skipped == {"left out": 1}


def test_a_name_that_is_no_utf8_is_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / f"{name}.jsonl").write_bytes(LINE)
    write_parquet(tmp_path / "plain").rename(tmp_path / f"{name}.parquet")
    assert [file.path for file in find_files([tmp_path], text_key="text").files] == [
        str(tmp_path / f"{name}.jsonl"),
        str(tmp_path / f"{name}.parquet"),
    ]
    with pytest.raises(DataError, match=r"caf\\xe9\.parquet should have one column 'body' and has 0"):
        find_files([tmp_path], text_key="body")


# --- What is wrong with it


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "good.jsonl").write_bytes(LINE)
    (folder / "good.json.gz").write_bytes(gzip.compress(LINE))
    (folder / "good.jsonl.zst").write_bytes(zstd.compress(LINE))
    (folder / "nowhere.jsonl").symlink_to("removed.jsonl")
    (folder / "plain.jsonl.gz").write_bytes(LINE)
    (folder / "empty.jsonl.zst").touch()
    (folder / "half.parquet").write_bytes(write_parquet(tmp_path / "whole.parquet").read_bytes()[:-9])
    write_parquet(folder / "other.parquet", body=["a"], id=[1])
    write_parquet(folder / "number.parquet", text=[1, 2])
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(folder / "pipe.txt")
    (tmp_path / "table.csv").touch()
    inputs = [folder, tmp_path / "none", tmp_path / "none" / "*.txt", tmp_path / "pipe.txt", tmp_path / "table.csv"]
    with pytest.raises(DataError, match="inputs should be readable text; 10 are not") as caught:
        find_files(inputs, text_key="text")
    wanted = [
        "corpus/empty.jsonl.zst is no zstd file, or empty",
        "corpus/half.parquet is damaged, cut off, or of a make that is not read: Parquet magic bytes not found",
        "corpus/nowhere.jsonl is a link to nothing",
        "corpus/number.parquet should have text in column 'text', a string or binary, and has int64",
        "corpus/other.parquet should have one column 'text' and has 0; its columns are 'body', 'id'",
        "corpus/plain.jsonl.gz is no gzip file, or empty",
        "none does not exist",
        "none/*.txt matches no file",
        "pipe.txt is no file",
        "table.csv is of a kind that is not read",
    ]
    for problem, text in zip(caught.value.problems, wanted, strict=True):
        assert problem.startswith(f"{tmp_path}/{text}")


def test_of_very_many_problems_the_first_are_told_and_the_rest_counted(tmp_path: Path) -> None:
    for number in range(50):
        (tmp_path / f"{number:02}.jsonl").symlink_to("nothing")
    with pytest.raises(DataError, match="50 are not") as caught:
        find_files([tmp_path])
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and 30 more"


@pytest.mark.skipif(os.geteuid() != 0, reason="being another user for a moment needs root")
def test_files_and_folders_without_the_right_to_read_are_told() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "good.txt").touch()
        (folder / "secret.jsonl").touch(mode=0o600)
        for closed in ("closed", "shut"):
            (folder / closed).mkdir(mode=0o700)
            (folder / closed / "a.txt").touch()
        os.seteuid(65534)
        try:
            with pytest.raises(DataError) as caught:
                find_files([folder, folder / "shut" / "a.txt"])
        finally:
            os.seteuid(0)
    assert caught.value.problems == tuple(
        f"{name}/{path} cannot be read: Permission denied" for path in ("secret.jsonl", "closed", "shut", "shut/a.txt")
    )


def test_no_text_at_all_is_refused_with_what_was_there_instead(tmp_path: Path) -> None:
    (tmp_path / "table.csv").touch()
    (tmp_path / ".hidden.txt").touch()
    with pytest.raises(DataError, match=r"no text found in .*; found instead: (1 hidden, 1 \.csv|1 \.csv, 1 hidden)"):
        find_files([tmp_path])
    with pytest.raises(DataError, match="no text found in no input"):
        find_files([])


def test_the_row_groups_of_parquet_share_the_size_of_the_file(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["x" * 1000, "y" * 1000, "a", "b"])
    (file,) = find_files([path]).files
    assert len(file.row_groups) == 2
    assert file.row_groups[0] > file.row_groups[1] > 0
    assert file.size_bytes - 2 <= sum(file.row_groups) <= file.size_bytes == path.stat().st_size


# --- Units


def source_files() -> st.SearchStrategy[list[SourceFile]]:
    def file(suffix: str, size: int, groups: list[int]) -> Callable[[int], SourceFile]:
        is_parquet = suffix == ".parquet"
        size = sum(groups) if is_parquet else size
        row_groups = tuple(groups) if is_parquet else ()
        return lambda number: SourceFile(path=f"{number}{suffix}", size_bytes=size, row_groups=row_groups)

    suffixes = st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".parquet"])
    makers = st.builds(file, suffixes, st.integers(0, 500_000), st.lists(st.integers(1, 50_000), max_size=12))
    return st.lists(makers, max_size=12).map(lambda made: [make(number) for number, make in enumerate(made)])


@given(source_files(), st.integers(1000, 400_000))
def test_every_byte_row_group_and_file_is_in_exactly_one_slice_in_order(
    files: list[SourceFile], unit_bytes: int
) -> None:
    units = plan_units(files, unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    slices = [part for unit in units for part in unit.slices]
    expected = []
    for file in files:
        total = len(file.row_groups) if file.row_groups else file.size_bytes
        parts = [part for part in slices if part.file == file.path]
        if kind_of(file.path) is Kind.PARQUET and not file.row_groups:
            assert parts == []
            continue
        assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
        assert parts[-1].stop == total
        assert all(part.start < part.stop for part in parts) or total == 0
        expected += parts
    assert slices == expected
    assert sum(unit.source_bytes for unit in units) == sum(file.size_bytes for file in files)
    for unit in units:
        # Only what cannot be cut is larger than was wanted.
        assert len(unit.slices) == 1 or unit.source_bytes <= unit_bytes
        (kind, *_) = [kind_of(part.file) for part in unit.slices]
        assert kind is not Kind.LINES or unit.source_bytes <= unit_bytes


def test_units_are_about_a_thousand_and_neither_tiny_nor_huge() -> None:
    def count(*sizes: int) -> int:
        return len(plan_units([SourceFile(path=f"{i}.jsonl", size_bytes=size) for i, size in enumerate(sizes)]))

    assert count(1000) == 1
    assert count(100 << 20) == 4
    assert count(1 << 40) == 1024
    assert count(*[1 << 30] * 1024) == 1024
    assert count(40 << 40) == 10_240
    assert choose_unit_bytes([]) == 32 << 20
    # A hundred thousand tiny files are shared out as well.
    assert count(*[10] * 100_000) == 25


def test_a_compressed_file_and_parquet_count_as_the_text_in_them() -> None:
    for suffix in (".jsonl.gz", ".jsonl.zst", ".parquet"):
        files = [SourceFile(path=f"{i}{suffix}", size_bytes=8 << 20, row_groups=(4 << 20, 4 << 20)) for i in range(3)]
        assert [len(unit.slices) for unit in plan_units(files, 64 << 20)] == [2, 1]
    (file,) = files[:1]
    assert [(unit.slices[0].start, unit.slices[0].stop) for unit in plan_units([file], 16 << 20)] == [(0, 1), (1, 2)]
