"""What `data_file_faults` finds in the heads of files, and what only a full read finds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distft.data.checks import data_file_faults, require_files
from distft.data.sources import KNOWN_DATASETS
from distft.errors import DataError, RecipeError
from tests.data.rows import ALL, Prepare, recipe_of, write_rows

QA = "data.format={prompt: q, completion: a}"
GOOD = {"q": "Why?", "a": "So."}


def faults(*overrides: str) -> list[str]:
    return [str(fault) for fault in data_file_faults(recipe_of(*overrides))]


def test_good_data_has_no_faults(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [GOOD])
    assert faults() == []
    assert faults(f"data.name={file}", QA) == []
    assert faults("data.name=some/dataset", QA) == [], "data on the hub is not checked"


def test_the_faults_of_both_files_are_reported_together_under_their_keys(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "a": "So."}])
    assert faults(f"data.path={file}", f"data.test_path={tmp_path / 'none.csv'}", QA, "data.name=mine") == [
        f"command line: data.path: the data ({file}) has no column q; it has question, a "
        "(name yours: data.format.prompt=COLUMN)",
        f"command line: data.test_path: there is no data file or folder {tmp_path}/none.csv",
    ]
    with pytest.raises(RecipeError, match="the recipe has 2 faults"):
        require_files(recipe_of(f"data.path={tmp_path / 'a.csv'}", f"data.test_path={tmp_path / 'none.csv'}"))


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        pytest.param("rows.xml", b"<rows/>", "rows.xml is not a .jsonl, .json, .csv", id="unknown suffix"),
        pytest.param("rows.jsonl.xz", b"x", "rows.jsonl.xz is not a .jsonl, .json, .csv", id="unknown compression"),
        pytest.param("rows.csv", b"", "rows.csv is empty", id="empty"),
        pytest.param("rows.csv", b"q,a\n", "rows.csv is empty", id="only a header"),
        pytest.param("rows.json", b"[]", "rows.json is empty", id="empty list"),
        pytest.param("rows.jsonl", b"nonsense\n", "JSON parse error in line 1, column 1", id="not JSON"),
        pytest.param("rows.jsonl", b'["q", "a"]\n', "line 1 is not an object", id="not an object"),
        pytest.param("rows.csv", "q,a\nx,café\n".encode("latin-1"), "is not UTF-8 text: byte 0xe9", id="latin-1"),
        pytest.param("rows.csv.gz", b"q,a\n", "rows.csv.gz cannot be read as csv: Not a gzipped file", id="not gzip"),
        pytest.param("rows.tsv.zst", b"q\ta\n", "rows.tsv.zst cannot be read as tsv: ZSTD decompress", id="not zstd"),
        pytest.param("rows.parquet", b"PAR?", "rows.parquet cannot be read as parquet: ", id="not parquet"),
        pytest.param("rows.arrow", b"ARR?", "rows.arrow cannot be read as arrow: ", id="not arrow"),
        pytest.param("rows.jsonl", b'{"q": "x", "a": 4}\n', "rows.jsonl, row 1: column 'a' contains int", id="number"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_fault(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    (fault,) = faults(f"data.path={tmp_path / name}", QA, "data.name=mine")
    assert fault.startswith("command line: data.path: ")
    assert problem in fault


@pytest.mark.parametrize("path", ["~nobody-of-that-name/rows.csv", "x" * 300 + ".csv", "/dev/null"])
def test_what_is_not_a_usable_path_is_a_fault(path: str) -> None:
    assert len(faults(f'data.path="{path}"')) == 1


@pytest.mark.parametrize("name", ["a/b/c", "http:/host/rows", "é/ü", " "])
def test_what_cannot_be_on_the_hub_is_a_fault(name: str) -> None:
    (fault,) = faults(f"data.name={name!r}", QA)
    known = ", ".join(KNOWN_DATASETS)
    assert f"is not a known data set ({known}), a file or a hub id" in fault


@pytest.mark.parametrize("key", ["data.name", "data.path", "data.files", "data.test_path"])
def test_an_empty_name_is_a_fault_and_not_the_working_folder(key: str) -> None:
    with pytest.raises(RecipeError, match=rf"{key}: is empty"):
        recipe_of(f"{key}=''", QA)


def test_only_the_head_is_read(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [*[GOOD] * 50, {"q": "Why?", "a": 4}])
    assert faults(f"data.name={file}", QA) == []
    problem = r"rows\.jsonl, row 51: column 'a' contains int values; expected text\n +found 4"
    with pytest.raises(DataError, match=problem):
        prepare(f"data.name={file}", QA, *ALL)


def test_the_check_of_files_imports_no_torch_and_no_datasets(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [GOOD])
    program = (
        "import sys\nfrom distft.config.recipe import load_recipe\nfrom distft.data.checks import data_file_faults\n"
        f"recipe = load_recipe(['data.name=rows.jsonl', '{QA}'])\n"
        "print(data_file_faults(recipe), {'torch', 'datasets', 'pandas'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[] set()\n", done.stderr
