"""Local files: a path is a path, cells stay as they are written, and the digest is that of the bytes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distft.data.files import DataFile
from distft.data.sources import read_source, source_notes
from distft.errors import DataError
from tests.data.rows import ALL, Prepare, recipe_of, trained, whole, write_rows

QA = "data.format={prompt: q, completion: a}"
AS_TEXT = [
    "yes",
    "None",
    "NA",
    "null",
    "01234",
    "1.50",
    "1e5",
    "true",
    "2024-01-05",
    "2024-01-05T10:00:00Z",
    "1,2",
    '"',
]
"""Answers that a reader which infers types changes or drops."""


def opened(path: Path, newline: str | None = None) -> IO[str]:
    """A text file, compressed as its suffix says."""
    if path.suffix.lower() == ".zst":
        return io.TextIOWrapper(pa.CompressedOutputStream(str(path), "zstd"), encoding="utf-8", newline=newline)
    opener: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    stream: IO[str] = opener(path, "wt", encoding="utf-8", newline=newline)
    return stream


def as_csv(path: Path, rows: Iterable[dict[str, Any]], delimiter: str = ",") -> Path:
    with opened(path, "") as stream:
        writer = csv.DictWriter(stream, ["q", "a"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_tsv(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    return as_csv(path, rows, "\t")


def as_lines(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    with opened(path) as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def as_list(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    with opened(path) as stream:
        json.dump(list(rows), stream, indent=1)
    return path


def as_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def as_arrow(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


NAMES = {
    "rows.jsonl": as_lines,
    "rows.jsonl.gz": as_lines,
    "rows.jsonl.zst": as_lines,
    "ROWS.JSONL": as_lines,
    "rows.json": as_list,
    "lines.json": as_lines,
    "rows.json.gz": as_list,
    "rows.json.zst": as_list,
    "rows.csv": as_csv,
    "rows.csv.ZST": as_csv,
    "rows.CSV.GZ": as_csv,
    "rows.tsv": as_tsv,
    "Rows.Tsv.gz": as_tsv,
    "rows.tsv.zst": as_tsv,
    "rows.Parquet": as_parquet,
    "rows.arrow": as_arrow,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_cells_of_every_format_are_read_as_they_are_written(tmp_path: Path, name: str) -> None:
    rows = [{"q": f"Question {number}?", "a": answer} for number, answer in enumerate(AS_TEXT)]
    file = DataFile(NAMES[name](tmp_path / name, rows))
    assert list(file) == rows
    assert file.columns(["a", "q"]) == ["q", "a"]


def test_numbers_and_dates_in_a_column_of_text_are_trained_as_written(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    for write, name in ((as_csv, "numbers.csv"), (as_lines, "dates.jsonl")):
        answers = ["01234", "98765", "00000"] if write is as_csv else ["2024-01-05", "2024-02-29"]
        file = write(tmp_path / name, [{"q": "Code: ", "a": answer} for answer in answers])
        splits = prepare(f"data.name={file}", QA, *ALL)
        assert sorted(trained(row, tokenizer) for row in splits.train) == sorted(f"{answer}</s>" for answer in answers)


@pytest.mark.parametrize("write", [as_csv, as_lines], ids=["csv", "jsonl"])
def test_what_comes_late_in_a_file_is_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    """A reader that infers a type from the first block fails at the first row of another."""
    numbers = [{"q": "x", "a": str(number)} for number in range(10_000)]
    word = {"q": "x", "a": "word"}
    name = "rows.csv" if write is as_csv else "rows.jsonl"
    assert list(DataFile(write(tmp_path / name, [*numbers, word])))[-2:] == [{"q": "x", "a": "9999"}, word]
    empty = {"q": "x" * 1_000, "a": "" if write is as_csv else None}
    assert list(DataFile(write(tmp_path / name, [*[empty] * 12_000, word])))[-2:] == [empty, word]


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.tsv"])
def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path, name: str) -> None:
    plain = NAMES[name](tmp_path / name, [{"q": "Was heißt „ja“?", "a": "yes"}]).read_bytes()
    if name != "rows.json":
        plain = plain.replace(b"\n", b"\r\n").replace(b"\r\r", b"\r")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + plain)
    assert list(DataFile(tmp_path / name)) == [{"q": "Was heißt „ja“?", "a": "yes"}]


def test_cells_with_line_breaks_and_long_cells_are_read(tmp_path: Path) -> None:
    rows = [{"q": 'He said "no",\nand left.\r\n', "a": "x" * 500_000}]
    assert list(DataFile(as_csv(tmp_path / "rows.csv", rows))) == rows


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("rows.csv", "q,a\nx,y\nx,y,z\n", r"line 3: it has 3 cells, and the header has 2"),
        ("rows.csv", "q,a\nx\n", r"line 2: it has 1 cell, and the header has 2"),
        ("rows.csv", 'q,a\nx,"y" z\n', r"line 2: ',' expected after '\"'"),
        ("rows.csv", 'q,a\nx,"y\n', "line 2: unexpected end of data"),
        ("rows.csv", "q,a,a\nx,y,z\n", "more than one column named a"),
        ("rows.jsonl", '{"q": 1}\n\n{"q"\n', r"JSON parse error in line 3, column 5"),
        ("rows.json", '[{"q": 1},\n {"q"}]', r"JSON parse error in line 2, column 6"),
        ("rows.json", "[1]", "element 1 is not an object"),
        ("rows.jsonl", '{"q": "caf\xe9"}\n', r"not UTF-8 text: byte 0xe9 after '{\"q\": \"caf'\n.*iconv -f LATIN1"),
        ("rows.jsonl", "\xff\xfe{\x00", r"not UTF-8 text: byte 0xff.*\n.*iconv -f UTF-16 -t UTF-8"),
        ("rows.jsonl", '{\n "q": "x"\n}\n', "line 1, column 2: .*; the line ends too early, and each must be a whole"),
        ("rows.jsonl", '{"q": "x"}\n{"q": "y', "line 2, column 7: Unterminated string.*; the line ends too early"),
    ],
)
def test_a_malformed_file_is_refused_by_line(tmp_path: Path, name: str, content: str, problem: str) -> None:
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=problem):
        list(DataFile(tmp_path / name))


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["part[12].jsonl", "part*.jsonl", "part?.jsonl", "a::b.jsonl", "{part1,x}.jsonl"])
def test_a_path_is_no_pattern(prepare: Prepare, tmp_path: Path, tokenizer: Any, name: str) -> None:
    write_rows(tmp_path / "part1.jsonl", [{"body": "Another file."}])
    file = write_rows(tmp_path / name, [{"body": "This file."}])
    held_out = write_rows(tmp_path / "test[1].jsonl", [{"body": "Held out."}])
    splits = prepare(f"data.path={file}", "data.name=x", f"data.test_path={held_out}", "data.format.text=body", *ALL)
    assert [whole(row, tokenizer) for row in splits.train] == ["This file.</s>"]
    assert splits.test is not None and [whole(row, tokenizer) for row in splits.test] == ["Held out.</s>"]
    folder = tmp_path / "folder[1]"
    folder.mkdir()
    file.rename(folder / name)
    assert list(read_source(folder)) == [{"body": "This file."}]


def test_a_folder_that_exists_is_local_however_it_is_named(
    prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "d" / "folder"
    folder.mkdir(parents=True)
    for number in range(3):
        rows = [{"q": f"{number}? ", "a": answer} for answer in ("yes", "None", "NA", "no")]
        as_csv(folder / f"{number}.csv", rows)
    (folder / "README.md").write_text("A card.")
    (folder / "old.csv.zip").write_text("")
    for name in ("d/folder", "./d/folder", str(folder)):
        splits = prepare(f"data.name={name}", QA, *ALL)
        assert len(splits.train) == 12
        assert "data: not read in d/folder: README.md, old.csv.zip" in splits.report.lines() or name == str(folder)
    assert source_notes(recipe_of("data.name=d/folder", QA).data)[0] == (
        "data.name=d/folder is the local folder of that name, not the data set on the hub"
    )
    (tmp_path / "imdb").mkdir()
    assert source_notes(recipe_of("data.name=imdb").data) == [
        "data.name=imdb is distft's data set of that name; to read the local one, set data.path"
    ]


@pytest.mark.parametrize("key", ["config=en", "test_split=test", "train_split=all"])
def test_keys_of_the_hub_are_refused_for_a_local_file(tmp_path: Path, key: str) -> None:
    from distft.errors import RecipeError

    file = write_rows(tmp_path / "rows.jsonl", [{"q": "x", "a": "y"}])
    with pytest.raises(RecipeError, match=rf"data\.{key.split('=')[0]}: is for data on the hub"):
        recipe_of(f"data.name={file}", QA, f"data.{key}")


# ---- identity -------------------------------------------------------------------------------------------------------


def test_a_file_replaced_with_the_same_time_and_size_is_read_again(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "rows.jsonl"
    for text in ("It rains.", "It snows."):
        write_rows(file, [{"body": text}])
        os.utime(file, (1_000_000_000, 1_000_000_000))
        (row,) = prepare(f"data.name={file}", "data.format.text=body", *ALL).train
        assert whole(row, tokenizer) == f"{text}</s>"


def test_the_cache_does_not_depend_on_the_name_of_a_file(prepare: Prepare, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "a.jsonl", [{"body": "It rains."}])
    second = write_rows(tmp_path / "b.jsonl", [{"body": "It rains."}])
    for file in (first, second):
        prepare(f"data.name={file}", "data.format.text=body", *ALL)
    assert len(list((tmp_path / "cache" / "data").glob("*/report.json"))) == 1
    assert read_source(first).digest() == read_source(second).digest()
    write_rows(second, [{"body": "It snows."}])
    assert read_source(first).digest() != read_source(second).digest()


def test_zstd_files_of_several_frames_are_read_and_cut_ones_are_errors(tmp_path: Path) -> None:
    file, rows = DataFile(tmp_path / "rows.jsonl.zst"), [{"q": "Why?", "a": str(number)} for number in range(20_000)]
    halves = [as_lines(tmp_path / f"{name}.jsonl.zst", part).read_bytes() for name, part in (("a", rows), ("b", rows))]
    file.path.write_bytes(b"".join(halves))  # as `cat` and parallel compressors write them
    assert list(file) == rows + rows
    file.path.write_bytes(halves[0][: len(halves[0]) // 2])
    with pytest.raises(DataError, match=r"rows\.jsonl\.zst cannot be read as json: Truncated compressed stream"):
        list(file)
