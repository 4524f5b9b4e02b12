"""What the report counts: blank cells, texts in several splits, texts with special tokens; and data that is refused."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from distft.data.checks import split_faults
from distft.data.prepare import prepare_data
from distft.data.preview import preview
from distft.data.report import Report
from distft.data.templates import Example
from distft.data.tokenize import tokenize
from distft.errors import DataError
from tests.data.rows import ALL, Prepare, recipe_of, trained, whole, write_rows

QA = "data.format={prompt: q, completion: a}"


def test_null_and_empty_cells_are_counted_by_column(prepare: Prepare, tmp_path: Path) -> None:
    rows = [
        {"q": None, "a": "x"},
        {"q": "", "a": "x"},
        {"q": " ", "a": "x"},
        {"q": "?", "a": None},
        {"q": "?", "a": ""},
        {"a": "x"},
        {"q": "?", "a": "x"},
    ]
    report = prepare(f"data.name={write_rows(tmp_path / 'rows.jsonl', rows)}", QA, *ALL).report
    assert report.noted == {"null prompt": 2, "empty prompt": 2, "null completion": 1, "empty completion": 1}
    assert report.rows["train"] == 5 and report.dropped == {"an empty response": 2}
    assert (
        "data: null prompt in 2 rows, empty prompt in 2 rows, null completion in 1 row, empty completion in 1 row"
    ) in report.lines()


def test_rows_that_were_dropped_are_reported_once() -> None:
    once = Report(
        rows={"train": 7},
        dropped={"an empty response": 3},
        noted={"empty response": 3},
        dropped_untrained={},
        truncated={},
        tokens={"train": 70},
        trained={},
        marked={},
        overlap={},
        digest="",
        held_out_digest="",
    )
    assert once.lines() == ["data: train 7 samples; 70 training tokens", "data: dropped 3 rows with an empty response"]
    assert replace(once, dropped={}, noted={"null prompt": 3}).lines()[1:] == ["data: null prompt in 3 rows"]


def test_an_empty_context_is_normal_and_a_null_one_is_counted(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"instruction": "Say.", "context": context, "response": "Yes."} for context in ("", "c", None)]
    assert prepare(f"data.path={write_rows(tmp_path / 'rows.jsonl', rows)}", *ALL).report.noted == {"null context": 1}
    without = [{"instruction": "Say.", "response": "Yes."}]
    file = write_rows(tmp_path / "without.jsonl", without)
    assert prepare(f"data.path={file}", *ALL).report.noted == {}, "the column is optional"
    with pytest.raises(DataError, match="has no column contxt"):
        prepare(f"data.path={file}", "data.format.context=contxt", *ALL)


@pytest.mark.parametrize(
    ("columns", "form"),
    [
        (("prompt", "chosen", "rejected"), "{prompt: prompt, completion: chosen}"),
        (("q", "chosen_answer", "rejected_answer"), "{prompt: q, completion: chosen_answer}"),
        (("q", "chosen", "rejected"), "{text: rejected}"),
    ],
)
def test_a_pair_of_preferences_is_refused(
    prepare: Prepare, tmp_path: Path, columns: tuple[str, ...], form: str
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [dict.fromkeys(columns, "x")])
    with pytest.raises(DataError, match=r"pairs of preferences.*would be ignored\n.*a file without the column"):
        prepare(f"data.name={file}", f"data.format={form}", *ALL)
    write_rows(file, [{name: "x" for name in columns if "rejected" not in name or "text" in form}][:1])
    if "text" not in form:
        assert len(prepare(f"data.name={file}", f"data.format={form}", *ALL).train) == 1


def test_an_empty_label_is_named_with_its_row_and_a_csv_label_is_a_number(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\nGood.,1\nBad.,0\n")
    splits = prepare("data.name=imdb", f"data.path={file}", *ALL)
    assert sorted(trained(row, tokenizer) for row in splits.train) == ["negative</s>", "positive</s>"]
    file.write_text("text,label\nGood.,1\nBad.,\n")
    with pytest.raises(DataError, match=r"rows\.csv, row 2: column 'label' contains ''; expected a class number"):
        prepare("data.name=imdb", f"data.path={file}", *ALL)


def test_half_a_surrogate_pair_is_refused_with_its_row(prepare: Prepare, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "x", "a": "\\ud83d\\ude00"}\n{"q": "x", "a": "\\ud83d"}\n')
    with pytest.raises(DataError, match=r"row 2: column 'a' contains half of a surrogate pair"):
        prepare(f"data.name={file}", QA, *ALL)


# ---- held-out rows --------------------------------------------------------------------------------------------------


def test_held_out_rows_that_are_trained_on_are_counted(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"q": f"Question {number}? ", "a": "$1"} for number in range(10)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    source = (f"data.name={file}", QA, *ALL)
    assert prepare(*source).report.overlap == {}
    same = prepare(*source, f"data.test_path={file}").report
    assert same.overlap == {"test": 10}
    assert any(line.startswith("data: 10 of 10 test samples also occur in the training split") for line in same.lines())
    other = write_rows(tmp_path / "other.jsonl", [rows[3], {"q": "Question 3? ", "a": "$2"}, {"q": "New? ", "a": "$1"}])
    assert prepare(*source, f"data.test_path={other}").report.overlap == {"test": 1}
    twice = write_rows(tmp_path / "twice.jsonl", rows * 2)
    found = prepare(f"data.name={twice}", QA, *ALL[2:], "data.validation_fraction=0.1", "data.test_fraction=0").report
    assert found.rows == {"train": 18, "validation": 2, "test": 0}
    assert found.overlap["validation"] in (0, 2), "a pair of the same two rows, or two copies of trained rows"


def test_the_digest_of_the_held_out_rows_is_their_own(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why? ", "a": "So."}])
    reports = []
    for answer in ("$1", "$2"):
        held_out = write_rows(tmp_path / "held_out.jsonl", [{"q": "Why? ", "a": answer}])
        reports.append(prepare(f"data.name={file}", QA, *ALL, f"data.test_path={held_out}").report)
    first, second = reports
    assert first.digest == second.digest
    assert first.held_out_digest != second.held_out_digest


def test_a_split_that_is_evaluated_and_empty_is_one_fault_each(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": f"Question {number}? ", "a": "$1"} for number in range(5)])
    source = (f"data.name={file}", QA)

    def faults(*overrides: str) -> list[str]:
        return [str(fault) for fault in split_faults(recipe_of(*source, *overrides), prepare(*source, *overrides))]

    (validation,) = faults("training.eval_strategy=steps")
    assert (
        "data.validation_fraction: 0.1 of 5 rows leaves no row to evaluate on during training (raise it" in validation
    )
    assert faults("data.validation_fraction=0.2", "training.eval_strategy=steps") == []
    assert faults(*ALL) == []
    blank = write_rows(tmp_path / "blank.jsonl", [{"q": "Why? ", "a": ""}])
    (test,) = faults(*ALL, f"data.test_path={blank}")
    assert "data.test_path: leaves no row to evaluate on before and after training" in test
    assert faults(*ALL, f"data.test_path={blank}", "evaluation.before_and_after=false") == []


def test_a_training_split_smaller_than_a_global_batch_is_reported(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why? ", "a": "So."}] * 5)
    lines = prepare(f"data.name={file}", QA, *ALL, "batching.global_batch_size=8").report.lines()
    assert "data: batching.global_batch_size=8 is more than the 5 of the training split: every step has 5" in lines
    assert len(prepare(f"data.name={file}", QA, *ALL, "batching.global_batch_size=4").report.lines()) == 1


# ---- texts that were rendered with the model's template -------------------------------------------------------------


@pytest.fixture(scope="module")
def adding(tokenizer: Any) -> Any:
    """The tokenizer, adding the beginning of sequence as Llama's does."""
    found = copy.deepcopy(tokenizer)
    found.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return found


@pytest.mark.parametrize(
    ("prompt", "completion", "text", "trains", "marked"),
    [
        ("<s>[INST] Hi [/INST]", " yes</s>", "<s>[INST] Hi [/INST] yes</s>", " yes</s>", {"<s>": 1, "</s>": 1}),
        ("Hi", " yes", "<s>Hi yes</s>", " yes</s>", {}),
        ("", "<s>Hi yes</s>\n", "<s>Hi yes</s>", "Hi yes</s>", {"<s>": 1, "</s>": 1}),
        ("<s>Hi", "<s> yes", "<s>Hi yes</s>", " yes</s>", {"<s>": 1}),
        ("<s><s>Hi", " yes</s></s>", "<s>Hi yes</s>", " yes</s>", {"<s>": 1, "</s>": 1}),
        ("<s>Hi</s>", "<s>yes</s>", "<s>Hi</s><s>yes</s>", "<s>yes</s>", {"<s>": 1, "</s>": 1}),
        ("Hi", " yes\n", "<s>Hi yes\n</s>", " yes\n</s>", {}),
    ],
)
def test_the_beginning_and_the_end_of_a_sequence_stand_in_a_sample_once(
    adding: Any, prompt: str, completion: str, text: str, trains: str, marked: dict[str, int]
) -> None:
    counted = Counter[str]()
    ((ids, labels, _),) = tokenize([Example.trained_from(prompt + completion, len(prompt))], adding, None, counted)
    assert adding.decode(ids) == text
    assert adding.decode([label for label in labels if label >= 0]) == trains
    assert counted == marked


@pytest.mark.usefixtures("prepare")
def test_rendered_texts_are_reported_by_run_and_preview(tmp_path: Path, adding: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "<s>Hi", "a": " yes</s>"}, {"q": "Hi", "a": " no"}])
    recipe = recipe_of(f"data.name={file}", QA, *ALL)
    splits = prepare_data(recipe, adding)
    assert sorted(whole(row, adding) for row in splits.train) == ["<s>Hi no</s>", "<s>Hi yes</s>"]
    lines = [f"data: 1 sample with {token} in the text, which is not added again" for token in ("</s>", "<s>")]
    assert [line for line in splits.report.lines() if "not added again" in line] == lines
    assert all(line in preview(recipe, adding, rows=[], colour=False) for line in lines)
