"""Each record is read once, from any position on and however a file is cut; a damaged or changed file is an error."""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import DataError
from orchestrator.tokenize.blocks import read_unit
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.units import Position, Slice, Unit, plan_units

BOM = b"\xef\xbb\xbf"
START = Position(slice=0, offset=0)

Record = tuple[str, int, bytes | str]
"""File, byte or row in it, and the line or text, or as text the reason why there is none."""


def unit_of(*slices: Slice) -> Unit:
    return Unit(number=0, slices=slices, source_bytes=0)


def whole(*paths: Path) -> Unit:
    """One unit of whole files."""
    (unit,) = plan_units(find_files(paths).files, 1 << 40)
    return unit


def read(unit: Unit, start: Position = START, **limits: Any) -> tuple[list[list[Record]], list[Position]]:
    """Read a unit: the records of each block, and the block's end."""
    blocks, ends = [], []
    for block in read_unit(unit, "text", start, **limits):
        records: list[Record] = [(*block.place(bad.offset), bad.reason) for bad in block.bad]
        if block.texts is None:
            offset = 0
            for line in block.lines.splitlines(keepends=True) if b"\r" not in block.lines else lines_of(block.lines):
                records.append((*block.place(offset), line))
                offset += len(line)
        else:
            records += [(*block.place(number), text) for number, text in enumerate(block.texts)]
        blocks.append(sorted(records))
        ends.append(block.end)
    return blocks, ends


def records_of(unit: Unit, start: Position = START, **limits: Any) -> list[Record]:
    return [record for block in read(unit, start, **limits)[0] for record in block]


def lines_of(content: bytes) -> list[bytes]:
    """Lines with their ends, by \\n alone."""
    lines = [line + b"\n" for line in content.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]


def expected_lines(file: Path, content: bytes) -> list[Record]:
    """Every line with its byte, cut without the code under test."""
    offset = len(BOM) if content.startswith(BOM) else 0
    records: list[Record] = []
    for line in lines_of(content[offset:]):
        records.append((str(file), offset, line))
        offset += len(line)
    return records


def write_parquet(path: Path, texts: Sequence[str | None], type_: Any = None, **options: Any) -> Path:
    if pyarrow.types.is_dictionary(type_ or pyarrow.string()):
        column = pyarrow.array(texts, type_.value_type).dictionary_encode()
    else:
        column = pyarrow.array(texts, type_ or pyarrow.string())
    table = pyarrow.table({"id": list(range(len(texts))), "text": column})
    pyarrow.parquet.write_table(table, path, **options)
    return path


# --- Lines, cut anywhere

CONTENTS = {
    "plain": b'{"text": 1}\n{"a"}\nlonger than a block of a few bytes\n\nend\n',
    "without a last line end": b"one\ntwo\nthree",
    "carriage returns": b"one\r\n\r\ntwo\rstill two\r\nthree\r\n",
    "line ends alone": b"\n\n\n\n\n",
    "byte order mark": BOM + b"one\ntwo\n" + BOM + b"three\n",
    "byte order mark alone": BOM,
    "byte order mark and line end": BOM + b"\n\n",
    "half a byte order mark": BOM[:2] + b"\nx",
    "one line": b"x" * 40,
    "empty": b"",
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_at_every_boundary_of_two_slices_each_line_is_read_once(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    expected = expected_lines(path, content)
    for cut in range(len(content) + 1):
        for block_bytes in (1, 7, 1000):
            parts = [
                records_of(unit_of(Slice(file=str(path), start=start, stop=stop)), block_bytes=block_bytes)
                for start, stop in pairwise([0, *([cut] if 0 < cut < len(content) else []), len(content)])
            ]
            assert [record for part in parts for record in part] == expected
            # The first line begins at byte 0, mark and all.
            first_of_second = next((offset for _, offset, _ in parts[-1]), None)
            assert len(parts) < 2 or first_of_second is None or first_of_second >= cut


@given(
    st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\n\n", BOM, b"x" * 30]), max_size=40).map(b"".join),
    st.sets(st.integers(1, 200), max_size=8),
    st.integers(1, 50),
)
def test_however_a_file_is_cut_each_line_is_read_once(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: set[int], block_bytes: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.jsonl"
    path.write_bytes(content)
    bounds = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    slices = [Slice(file=str(path), start=start, stop=stop) for start, stop in pairwise(bounds)]
    assert records_of(unit_of(*slices), block_bytes=block_bytes) == expected_lines(path, content)


# --- From any position on

LINES = b"".join(b'{"text": "%d %s"}\r\n' % (number, b"word " * (number % 23)) for number in range(200))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, in the order of their names."""
    folder = tmp_path_factory.mktemp("corpus")
    halves = LINES[:3001], LINES[3001:]
    (folder / "a.jsonl").write_bytes(BOM + LINES)
    (folder / "b.jsonl.gz").write_bytes(b"".join(map(gzip.compress, (BOM, *halves))))
    (folder / "c.jsonl.zst").write_bytes(b"\x50\x2a\x4d\x18\x02\0\0\0hi" + b"".join(map(zstd.compress, halves)))
    texts = [None if number % 7 == 3 else f"row {number} " * (number % 13) for number in range(100)]
    write_parquet(folder / "d.parquet", texts, row_group_size=30)
    for number in range(20):
        (folder / f"e{number:02}.txt").write_bytes(BOM[: number % 4] + b"text\r\n" * number)
    (folder / "f.jsonl").write_bytes(b"")
    (folder / "g.jsonl").write_bytes(LINES[:452])
    return folder


def test_every_kind_gives_its_records_with_their_places(corpus: Path) -> None:
    found = records_of(whole(corpus))
    names = [path.name for path in corpus.iterdir()]
    by_file = {name: [record for record in found if record[0] == str(corpus / name)] for name in names}
    assert by_file["a.jsonl"] == expected_lines(corpus / "a.jsonl", BOM + LINES)
    assert by_file["b.jsonl.gz"] == expected_lines(corpus / "b.jsonl.gz", BOM + LINES)
    assert by_file["c.jsonl.zst"] == expected_lines(corpus / "c.jsonl.zst", LINES)
    assert by_file["d.parquet"] == [
        (str(corpus / "d.parquet"), row, "null" if row % 7 == 3 else (f"row {row} " * (row % 13)).encode())
        for row in range(100)
    ]
    assert by_file["e02.txt"] == [(str(corpus / "e02.txt"), 0, BOM[:2] + b"text\r\n" * 2)]
    assert by_file["e03.txt"] == [(str(corpus / "e03.txt"), 0, b"text\r\n" * 3)]
    assert sum(map(len, by_file.values())) == len(found)


@pytest.mark.parametrize("unit_bytes", [1 << 40, 3000])
def test_from_the_end_of_any_block_exactly_the_rest_is_read(corpus: Path, unit_bytes: int) -> None:
    for unit in plan_units(find_files([corpus]).files, unit_bytes):
        blocks, ends = read(unit, block_bytes=400, block_texts=6)
        assert ends == sorted(set(ends))
        expected = [record for block in blocks for record in block]
        assert records_of(unit) == expected
        for number, end in enumerate(ends, start=1):
            before = [record for block in blocks[:number] for record in block]
            # With other blocks as well: where reading goes on does not depend on them.
            for block_bytes in (250, 1 << 20):
                assert before + records_of(unit, end, block_bytes=block_bytes) == expected
        assert records_of(unit, Position(slice=len(unit.slices), offset=0)) == []


def test_units_together_are_the_corpus_whatever_their_size(corpus: Path) -> None:
    found = find_files([corpus]).files
    expected = records_of(whole(corpus))
    for unit_bytes in (50, 777, 10_000):
        assert [record for unit in plan_units(found, unit_bytes) for record in records_of(unit)] == expected


def test_the_bytes_that_blocks_took_on_disk_are_those_of_the_files(corpus: Path) -> None:
    for path in sorted(corpus.iterdir()):
        size = path.stat().st_size
        taken = sum(block.source_bytes for block in read_unit(whole(path), "text", START, block_bytes=500))
        assert size - 20 <= taken <= size + 20


# --- Records that are too long


def test_a_record_that_is_too_long_is_a_bad_one_and_its_neighbours_are_kept(tmp_path: Path) -> None:
    long = b"y" * 3000
    reason = "longer than 2,000 bytes; its first 1,000 are kept"
    limits = {"block_bytes": 100, "record_bytes": 2000}
    content = b"\n".join([b"first", long, b"z" * 1500, long])
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    for path in (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"):
        unit = whole(path)
        blocks, ends = read(unit, **limits)
        name = str(path)
        bad = [(name, 6, reason), (name, 4508, reason)]
        assert [*blocks[0], *blocks[1]] == [(name, 0, b"first\n"), bad[0]]
        assert blocks[2:] == [[(name, 3007, b"z" * 1500 + b"\n")], [bad[1]]]
        assert records_of(unit, ends[1], **limits) == [record for block in blocks[2:] for record in block]
    slices = [Slice(file=str(tmp_path / "a.jsonl"), start=start, stop=start + 1) for start in (0, 6, 3006, 3007, 4508)]
    assert [len(records_of(unit_of(part), **limits)) for part in slices] == [1, 1, 0, 1, 1]

    (tmp_path / "c.txt").write_bytes(b"short")
    (tmp_path / "d.txt").write_bytes(long)
    (tmp_path / "e.txt").write_bytes(b"last")
    write_parquet(tmp_path / "f.parquet", ["first", None, long.decode(), "last"])
    for names, rows in ((["c.txt", "d.txt", "e.txt"], [0, 0, 0]), (["f.parquet"] * 4, [0, 1, 2, 3])):
        records = sorted(records_of(whole(*(tmp_path / name for name in dict.fromkeys(names))), **limits))
        assert [record[:2] for record in records] == [
            (str(tmp_path / name), row) for name, row in zip(names, rows, strict=True)
        ]
        assert [record[2] for record in records if isinstance(record[2], str)][-1] == reason
    (block,) = read_unit(whole(tmp_path / "d.txt"), "text", START, record_bytes=2000)
    assert block.bad[0].content == long[:1000]


# --- Parquet


@pytest.mark.parametrize(
    "type_",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.binary_view(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string()),
    ],
    ids=str,
)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_type_of_text_that_parquet_knows_is_read(tmp_path: Path, type_: Any, compression: str) -> None:
    texts = ["", "a", None, "ü" * 500, "more than twelve bytes", None, "a"] * 50
    path = write_parquet(tmp_path / "a.parquet", texts, type_, row_group_size=100, compression=compression)
    found = records_of(whole(path), block_bytes=2000)
    assert found == [(str(path), row, "null" if text is None else text.encode()) for row, text in enumerate(texts)]


def test_a_column_of_nulls_alone_and_a_table_without_rows_are_read(tmp_path: Path) -> None:
    nulls = write_parquet(tmp_path / "nulls.parquet", [None] * 5)
    assert [record[1:] for record in records_of(whole(nulls))] == [(row, "null") for row in range(5)]
    empty = write_parquet(tmp_path / "rows.parquet", [])
    found = find_files([empty, nulls], text_key="text")
    assert [len(file.row_groups) for file in found.files] == [pyarrow.parquet.read_metadata(empty).num_row_groups, 1]
    assert records_of(whole(empty, nulls)) == records_of(whole(nulls))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "id": [1]}, r"should have one column 'text' and has 0; its columns are 'body', 'id'"),
        ({"text": [1.5]}, "should have text in column 'text', a string or binary, and has double"),
        ({"text": [["a"]]}, "should have text in column 'text', a string or binary, and has list"),
        ({"text": [{"text": "a"}]}, "should have text in column 'text', a string or binary, and has struct"),
        ({"text": pyarrow.array([1, 2]).dictionary_encode()}, "a string or binary, and has int64"),
    ],
)
def test_parquet_without_a_column_of_text_is_refused(tmp_path: Path, columns: Any, message: str) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    for attempt in (lambda: find_files([path], text_key="text"), lambda: records_of(whole(path))):
        with pytest.raises(DataError, match=message) as caught:
            attempt()
        assert f"{path} should have" in str(caught.value)
        assert "--text-key" in str(caught.value)


def test_a_column_is_found_by_its_whole_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    nested = pyarrow.array([{"b": "wrong"}])
    pyarrow.parquet.write_table(pyarrow.table({"text.raw": ["right"], "other": nested, "text": ["wrong"]}), path)
    (block,) = read_unit(whole(path), "text.raw", START)
    assert block.texts == [b"right"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([nested, nested], names=["text", "text"]), path)
    with pytest.raises(DataError, match="should have one column 'text' and has 2"):
        records_of(whole(path))


# --- Damaged and changed files


def flipped(content: bytes, index: int) -> bytes:
    return content[:index] + bytes([content[index] ^ 255]) + content[index:][1:]


CHECKED = {zstd.CompressionParameter.checksum_flag: 1}
DAMAGE: dict[str, tuple[str, bytes]] = {
    "gzip cut": ("a.jsonl.gz", gzip.compress(LINES)[:-9]),
    "gzip cut in its checksum": ("a.jsonl.gz", gzip.compress(LINES)[:-3]),
    "gzip cut in its header": ("a.jsonl.gz", gzip.compress(LINES)[:5]),
    "gzip second member cut": ("a.jsonl.gz", gzip.compress(LINES) + gzip.compress(LINES)[:50]),
    "gzip wrong checksum": ("a.jsonl.gz", flipped(gzip.compress(LINES), -6)),
    "gzip wrong length": ("a.jsonl.gz", flipped(gzip.compress(LINES), -2)),
    "gzip and garbage": ("a.jsonl.gz", gzip.compress(LINES) + b"garbage that is no member"),
    "zstd cut": ("a.jsonl.zst", zstd.compress(LINES)[:-9]),
    "zstd cut in its header": ("a.jsonl.zst", zstd.compress(LINES)[:5]),
    "zstd second frame cut": ("a.jsonl.zst", zstd.compress(LINES) + zstd.compress(LINES)[:50]),
    "zstd wrong checksum": ("a.jsonl.zst", flipped(zstd.compress(LINES, options=CHECKED), -2)),
    "zstd and garbage": ("a.jsonl.zst", zstd.compress(LINES) + b"garbage that is no frame"),
}


@pytest.mark.parametrize(("name", "content"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_or_cut_compressed_file_is_an_error_and_never_a_shorter_file(
    tmp_path: Path, name: str, content: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"is damaged, cut off, or of a make that is not read: .*; get it anew"
    ) as caught:
        records_of(whole(path))
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("options", "damage"),
    [({"compression": "zstd"}, bytes(2000)), ({"compression": "none", "write_page_checksum": True}, b"damage")],
)
def test_damaged_parquet_is_an_error(tmp_path: Path, options: dict[str, Any], damage: bytes) -> None:
    texts = [f"text {number}" for number in range(5000)]
    path = write_parquet(tmp_path / "a.parquet", texts, use_dictionary=False, **options)
    unit = whole(path)
    assert len(records_of(unit)) == 5000
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    middle = column.data_page_offset + column.total_compressed_size // 2
    content = path.read_bytes()
    path.write_bytes(content[:middle] + damage + content[middle + len(damage) :])
    with pytest.raises(DataError, match=r"a\.parquet is damaged, cut off, or of a make that is not read"):
        records_of(unit)


def grow(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(path.read_bytes())


def shrink(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("change", [grow, shrink])
@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "e09.txt", "g.jsonl"])
def test_a_file_of_another_size_than_was_planned_is_an_error(
    corpus: Path, tmp_path: Path, name: str, change: Callable[[Path], None]
) -> None:
    path = tmp_path / name
    path.write_bytes((corpus / name).read_bytes())
    unit, expected = whole(path), records_of(whole(path))
    before = path.stat().st_size
    change(path)
    if name == "g.jsonl" and change is grow:
        # Lines may be appended to a file of which each line that was planned is still there.
        assert records_of(unit) == expected
        return
    wanted = (
        rf"{name} should have (at least )?{before} bytes, as when the work was planned, and has {path.stat().st_size}"
    )
    with pytest.raises(DataError, match=wanted):
        records_of(unit)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    blocks = read_unit(whole(path), "text", START, block_bytes=500)
    next(blocks)
    os.truncate(path, 2000)
    with pytest.raises(DataError, match=rf"should have at least {len(LINES)} bytes, .*, and has 2000"):
        list(blocks)


def test_a_position_behind_what_a_file_has_now_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"a\n", mtime=0))
    with pytest.raises(DataError, match=r"should have at least 7 bytes of text, .* and has 2"):
        records_of(whole(path), Position(slice=0, offset=7))
    path = write_parquet(tmp_path / "a.parquet", ["a", "b"])
    with pytest.raises(DataError, match=r"should have at least 3 rows up to row group 1, .* and has 2"):
        records_of(whole(path), Position(slice=0, offset=3))
    with pytest.raises(DataError, match=r"should have at least 5 row groups, .* and has 1"):
        records_of(unit_of(Slice(file=str(path), start=4, stop=5)))


def test_a_file_that_is_gone_is_an_error(corpus: Path, tmp_path: Path) -> None:
    for name in ("b.jsonl.gz", "d.parquet", "e09.txt", "g.jsonl"):
        path = tmp_path / name
        path.write_bytes((corpus / name).read_bytes())
        unit = whole(path)
        path.unlink()
        with pytest.raises(DataError, match=rf"{name} cannot be read: No such file or directory; make it readable"):
            records_of(unit)


# --- Memory

PEAK = """
import sys
from pathlib import Path
from orchestrator.tokenize.blocks import read_unit
from orchestrator.tokenize.inputs import find_files
from orchestrator.tokenize.units import Position, plan_units
(unit,) = plan_units(find_files([Path(sys.argv[1])]).files, 1 << 40)
read = 0
for block in read_unit(unit, "text", Position(slice=0, offset=0)):
    read += len(block.lines) + sum(map(len, block.texts or ()))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(read, int(peak.split()[1]) << 10)
"""


def peak_of(path: Path) -> tuple[int, int]:
    """Read a file in a process of its own: bytes of text, and the most memory that the process had."""
    command = [sys.executable, "-c", PEAK, str(path)]
    text_bytes, peak = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.split()
    return int(text_bytes), int(peak)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", "one row group.parquet"])
def test_a_file_of_300_megabytes_of_text_is_read_in_little_memory(tmp_path: Path, suffix: str) -> None:
    million = b'{"text": "%s"}\n' % (b"word " * 199) * 1000
    for name, megabytes in (("small", 1), ("large", 300)):
        path = tmp_path / f"{name}{suffix}"
        if suffix.endswith(".parquet"):
            rows = 200 if suffix == ".parquet" else 1 << 30
            texts = [f"{number:>9} " * 1000 for number in range(megabytes * 100)]
            write_parquet(path, texts, row_group_size=rows, use_dictionary=False)
        else:
            compressed = gzip.compress(million, 1) if suffix == ".jsonl.gz" else zstd.compress(million)
            path.write_bytes(compressed * megabytes)
    small_bytes, small = peak_of(tmp_path / f"small{suffix}")
    large_bytes, large = peak_of(tmp_path / f"large{suffix}")
    assert large_bytes == 300 * small_bytes > 290e6
    # A few blocks of 4 MiB; Arrow's allocator keeps some of what it was given back.
    assert large - small < 100e6
