"""`data.files`: patterns, their order, and what is said where they match nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distft.config.schema import Data, DataSource
from distft.data.checks import data_file_faults
from distft.data.sources import Rows, data_sources, label_of, read_source, source_notes
from distft.errors import RecipeError
from distft.evaluation.sets import DataOf
from tests.data.rows import ALL, Prepare, recipe_of, trained, write_rows

QA = "data.format={prompt: q, completion: a}"
NAMES = ["part-1.jsonl", "part-2.jsonl", "part[12].jsonl", "more/part-0.jsonl", "other.jsonl", "LICENSE"]


@pytest.fixture(autouse=True)
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files, each with a row that says its name, in the working folder."""
    folder = tmp_path / "corpus[1]"
    (folder / "more").mkdir(parents=True)
    for name in NAMES:
        write_rows(folder / name, [{"q": "Which? ", "a": name}])
    monkeypatch.chdir(tmp_path)
    return folder


def read(**data: Any) -> list[str]:
    (source,) = data_sources(Data(**data))
    return [row["a"] for row in read_source(source)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("part-*.jsonl", NAMES[:2]),
        ("part*.jsonl", NAMES[:3]),
        ("part-[2-9].jsonl", NAMES[1:2]),
        ("part[12].jsonl", NAMES[2:3]),
        ("**/*-*.jsonl", [NAMES[3], *NAMES[:2]]),
        (["other.jsonl", "part-*"], [NAMES[4], *NAMES[:2]]),
        (["part-2.jsonl", "part-*"], [NAMES[1], NAMES[0]]),
        (["more"], NAMES[3:4]),
        ("*", [NAMES[4], *NAMES[:3]]),
    ],
)
def test_patterns_are_searched_in_the_folder_that_name_or_path_names(
    corpus: Path, files: str | list[str], expected: list[str]
) -> None:
    assert read(name="corpus[1]", files=files) == expected
    assert read(name="mine", path=str(corpus), files=files) == expected
    plain = corpus.rename("plain").absolute()
    assert read(files=[f"{plain}/{each}" for each in ([files] if isinstance(files, str) else files)]) == expected


def test_patterns_alone_are_searched_in_the_working_folder(corpus: Path) -> None:
    corpus.rename("plain")
    assert read(files="plain/part-?.jsonl") == NAMES[:2]
    assert read(name="tiny", files="p*/part-?.jsonl") == NAMES[:2], "a known data set gives its columns"


def test_elsewhere_a_path_is_no_pattern() -> None:
    assert read(name="corpus[1]/part[12].jsonl") == NAMES[2:3]
    with pytest.raises(RecipeError, match=r"there is no file or folder corpus\[1\]/part-\*\.jsonl"):
        recipe_of("data.name=corpus[1]/part-*.jsonl")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ("data.name=corpus[1]", "data.files=[other.jsonl, more/x*.jsonl]"),
            "data.files: more/x*.jsonl matches no file; {}/more holds part-0.jsonl",
        ),
        (
            ("data.name=null", "data.files=missing/*.jsonl"),
            "data.files: missing/*.jsonl matches no file; {parent} holds corpus[1]/",
        ),
        (("data.name=corpus[1]", "data.files=L*"), "data.files: L* matches no .jsonl, .json"),
        (("data.name=corpus[1]", "data.files=LICENSE"), "data.files: corpus[1]/LICENSE is not a .jsonl, .json"),
        (("data.name=corpus[1]", "data.files=part-*", "data.format.prompt=question"), "has no column question"),
    ],
)
def test_what_matches_nothing_is_a_fault(corpus: Path, overrides: tuple[str, ...], problem: str) -> None:
    (fault,) = data_file_faults(recipe_of(QA, *overrides))
    assert problem.format(corpus, parent=corpus.parent) in str(fault)


def test_patterns_in_a_data_set_of_the_hub_are_refused() -> None:
    with pytest.raises(
        RecipeError, match=r"data\.files: is searched in a local folder, and data\.name=some/dataset is none"
    ):
        recipe_of("data.name=some/dataset", "data.files=*.jsonl", QA)


def test_matches_that_are_not_read_are_named(corpus: Path) -> None:
    assert source_notes(Data(name="corpus[1]", files="*")) == ["not read: corpus[1]/LICENSE"]


def test_prepared_data_depends_on_the_content_alone(prepare: Prepare, corpus: Path, tokenizer: Any) -> None:
    first = prepare("data.name=null", "data.files=corpus*/part-*.jsonl", QA, *ALL)
    assert sorted(trained(row, tokenizer) for row in first.train) == [" part-1.jsonl</s>", " part-2.jsonl</s>"]
    shutil.copytree(corpus, "copy")
    again = prepare("data.path=copy", "data.name=copied", "data.files=part-*.jsonl", QA, *ALL)
    assert again.train.cache_files == first.train.cache_files
    write_rows(corpus / "part-3.jsonl", [{"q": "Which? ", "a": "late"}])
    assert len(prepare("data.name=null", "data.files=corpus*/part-*.jsonl", QA, *ALL).train) == 3


def test_a_source_of_a_mixture_has_patterns(prepare: Prepare, corpus: Path) -> None:
    corpus.rename("plain")
    form = "format: {prompt: q, completion: a}, samples: 1"
    splits = prepare(
        "data.name=null", f"data.sources=[{{files: plain/part-*, {form}}}, {{name: plain/other.jsonl, {form}}}]", *ALL
    )
    assert {label: rows["train"] for label, rows in splits.report.sources.items()} == {"plain": 1, "other": 1}
    assert label_of(DataSource(files="*.jsonl")) == "data"


def test_results_on_other_patterns_are_results_on_other_data(corpus: Path) -> None:
    first, other = (DataOf.at(data_sources(Data(name="corpus[1]", files=files))[0]) for files in ("part*", "other*"))
    assert first != other and first.name == "corpus-1"


def test_the_rows_have_the_name_of_the_patterns() -> None:
    (source,) = data_sources(Data(name="corpus[1]", files=["part-*", "other.jsonl"]))
    assert read_source(source) == Rows("corpus[1]/part-*, corpus[1]/other.jsonl", read_source(source).parts)
