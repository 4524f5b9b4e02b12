"""From rows to tokens, against literal expectations on real rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas
import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from distft.config.recipe import Recipe, load_recipe
from distft.data import prepare as data
from distft.data.prepare import Splits, split
from distft.data.preview import preview
from distft.data.tokenize import (
    IGNORED,
    Example,
    at_most,
    format_dolly,
    format_review,
    lengths_of,
    tokenise,
)
from distft.errors import DataError


def tokenise_one(example: Example, tokenizer: Any, max_length: int | None) -> tuple[list[int], list[int], bool]:
    (sample,) = tokenise([example], tokenizer, max_length)
    return sample


ALL = (
    "data.validation_fraction=0.0",
    "data.test_fraction=0.0",
    "training.eval_strategy=no",
    "training.max_length=null",
)
"""Every row goes into the train split, whole."""
RESPONSE_ONLY = "training.completion_only_loss=true"

Prepare = Callable[..., Splits]


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe(overrides, checks=(data.faults,))


@pytest.fixture
def prepare(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """`data.prepare` of the tiny recipe with overrides, from an empty cache: a full one may be of other code."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path / "cache"))
    return lambda *overrides: data.prepare(recipe_of(*overrides), tokenizer)


@pytest.fixture
def dolly(shared_data: Path) -> str:
    return f"data.path={shared_data / 'dolly_sample.jsonl'}"


@pytest.fixture
def imdb(shared_data: Path) -> tuple[str, str]:
    return "data.name=imdb", f"data.path={shared_data / 'imdb_sample.jsonl'}"


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): a few reviews hold U+0085, which it takes for the end of a line.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def whole(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode(row["input_ids"]))


def trained(row: dict[str, Any], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"] if label != IGNORED]))


def row_with(splits: Splits, words: str, tokenizer: Any) -> dict[str, Any]:
    """The one training sample that has these words."""
    (found,) = (row for row in splits.train if words in whole(row, tokenizer))
    return dict(found)


# ---- Dolly: template, empty rows, loss -------------------------------------------------------------------------------

PINEAPPLES = (
    "### Instruction:\nWhich US state produces the most pineapples?\n\n### Response:\nHawaii###eos_token###</s>"
)
SURF = (
    "### Instruction:\nName five surf spots on the North Shore of Oahu in Hawaii\n\n### Response:\n"
    "Pipeline\nSunset Beach\nVelzyland\nLog Cabins\nChun's Reef###eos_token###</s>"
)
THERIAULT = (
    "### Instruction:\nIn which century was Denis Thériault born?\n\n### Context:\n"
    "Denis Thériault (born August 24, 1959) is a Canadian author, playwright and screenwriter of French-Canadian "
    "descent..\n\n### Response:\nThe 20th century###eos_token###</s>"
)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("pineapples", PINEAPPLES), ("Velzyland", SURF), ("playwright and screenwriter of French", THERIAULT)],
)
def test_a_dolly_row_becomes_this_text(prepare: Prepare, dolly: str, tokenizer: Any, words: str, expected: str) -> None:
    assert whole(row_with(prepare(dolly, *ALL), words, tokenizer), tokenizer) == expected


def test_the_context_block_stands_in_rows_that_have_a_context_alone(
    prepare: Prepare, dolly: str, tokenizer: Any
) -> None:
    texts = [whole(row, tokenizer) for row in prepare(dolly, *ALL).train]
    assert (len(texts), sum("\n\n### Context:\n" in text for text in texts)) == (151, 47)


@pytest.mark.parametrize(
    "context",
    [{}, {"context": None}, {"context": ""}, {"context": " \n\t"}],
    ids=["no column", "null", "empty", "blank"],
)
def test_a_context_without_text_leaves_no_block(
    prepare: Prepare, tmp_path: Path, tokenizer: Any, context: dict[str, Any]
) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Add 1 and 1.", "response": "2, say", **context}])
    (row,) = prepare(f"data.path={file}", *ALL).train
    assert whole(row, tokenizer) == "### Instruction:\nAdd 1 and 1.\n\n### Response:\n2, say</s>"


def test_rows_with_an_empty_response_are_dropped_counted_and_told(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    responses = ["yes", "", " \n", "no", None]
    file = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "Say.", "context": "", "response": text} for text in responses]
    )
    splits = prepare(f"data.path={file}", *ALL)
    assert sorted(whole(row, tokenizer).split("### Response:\n")[1] for row in splits.train) == ["no</s>", "yes</s>"]
    assert (splits.report.dropped_empty, splits.report.rows["train"]) == (3, 2)
    assert "data: 3 rows with an empty response were dropped" in splits.report.lines()


def test_the_loss_looks_at_the_whole_text_but_its_first_token(prepare: Prepare, dolly: str) -> None:
    rows = list(prepare(dolly, *ALL).train)
    assert len(rows) == 151
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("pineapples", "Hawaii###eos_token###</s>"),
        ("playwright and screenwriter of French", "The 20th century###eos_token###</s>"),
    ],
)
def test_the_loss_looks_at_the_response_alone_where_asked(
    prepare: Prepare, dolly: str, tokenizer: Any, words: str, expected: str
) -> None:
    row = row_with(prepare(dolly, *ALL, RESPONSE_ONLY), words, tokenizer)
    assert trained(row, tokenizer) == expected


def test_what_the_loss_looks_at_is_the_end_of_every_sample(prepare: Prepare, dolly: str, tokenizer: Any) -> None:
    for row in prepare(dolly, *ALL, RESPONSE_ONLY).train:
        text = whole(row, tokenizer)
        assert trained(row, tokenizer) == text.split("\n\n### Response:\n", 1)[1]
        first = next(place for place, label in enumerate(row["labels"]) if label != IGNORED)
        assert row["labels"] == [IGNORED] * first + row["input_ids"][first:]


# ---- truncation at the end, and the end of sequence ------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["false", "true"], ids=["whole text", "response only"])
def test_a_sample_ends_in_eos_unless_it_was_cut_and_is_never_too_long(
    prepare: Prepare, dolly: str, tokenizer: Any, loss: str
) -> None:
    completion_only = f"training.completion_only_loss={loss}"
    full = {tuple(row["input_ids"]): row["labels"] for row in prepare(dolly, *ALL, completion_only).train}
    splits = prepare(dolly, *ALL, "training.max_length=64", completion_only)
    cut = 0
    for row in splits.train:
        assert row["labels"][0] == IGNORED
        assert len(row["input_ids"]) == len(row["labels"]) <= 64
        if tuple(row["input_ids"]) in full:
            assert row["labels"][-1] == row["input_ids"][-1] == tokenizer.eos_token_id
        else:
            # It has the beginning of a whole sample, its loss where that has it, and no end of sequence.
            cut += 1
            (labels,) = (labels for ids, labels in full.items() if list(ids[:64]) == row["input_ids"])
            assert row["labels"] == labels[:64]
            assert tokenizer.eos_token_id not in row["input_ids"]
    assert 0 < cut < len(splits.train)
    assert splits.report.truncated["train"] == cut
    assert f"data: {cut} samples were truncated to training.max_length" in splits.report.lines()


def test_a_sample_that_fits_exactly_is_not_cut(tokenizer: Any) -> None:
    example = Example("One of the rows.")
    ids, _, _ = tokenise_one(example, tokenizer, None)
    assert tokenise_one(example, tokenizer, len(ids)) == (ids, [IGNORED, *ids[1:]], False)
    assert tokenise_one(example, tokenizer, len(ids) - 1) == (ids[:-1], [IGNORED, *ids[1:-1]], True)


def test_samples_of_which_no_trained_token_is_left_are_dropped_and_counted(
    prepare: Prepare, dolly: str, tokenizer: Any
) -> None:
    splits = prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=64")
    dropped = splits.report.dropped_untrained["train"]
    assert 0 < dropped == 151 - len(splits.train)
    assert all(trained(row, tokenizer) for row in splits.train)
    assert any(
        line.startswith(f"data: {dropped} samples were dropped: nothing to learn from")
        for line in splits.report.lines()
    )


def test_a_recipe_that_names_no_length_gets_that_of_trl(prepare: Prepare, tmp_path: Path) -> None:
    from trl import SFTConfig

    tiny = recipe_of().model_dump()
    del tiny["training"]["max_length"]
    (tmp_path / "mine.yaml").write_text(json.dumps(tiny), encoding="utf-8")  # JSON is YAML
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "many words " * 2_000}])
    (row,) = prepare(f"recipe={tmp_path / 'mine.yaml'}", f"data.name={file}", "data.format.text=body", *ALL[:3]).train
    assert len(row["input_ids"]) == SFTConfig.__dataclass_fields__["max_length"].default == 1024


def test_a_tokenizer_that_adds_bos_and_eos_gives_one_of_each(tokenizer: Any) -> None:
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ids, labels, _ = tokenise_one(Example("Yes, it is.", trained_from=5), adding, None)
    assert adding.decode(ids) == "<s>Yes, it is.</s>"
    assert adding.decode([label for label in labels if label != IGNORED]) == " it is.</s>"
    # Whole text: the beginning of a sequence is nothing to learn.
    assert tokenise_one(Example("Yes, it is."), adding, None)[1] == [IGNORED, *ids[1:]]


def test_a_token_that_crosses_into_the_trained_part_is_trained(tokenizer: Any) -> None:
    (the,) = tokenizer(" the")["input_ids"]  # one token, and the boundary is in the middle of it
    ids, labels, _ = tokenise_one(Example("So the", trained_from=4), tokenizer, None)
    assert ids[-2:] == [the, tokenizer.eos_token_id]
    assert labels == [IGNORED] * (len(ids) - 2) + ids[-2:]


# ---- IMDB ------------------------------------------------------------------------------------------------------------

LAUGHTER = (
    "### Review:\nIf you like original gut wrenching laughter you will like this movie. If you are young or old then "
    "you will love this movie, hell even my mom liked it.\nGreat Camp!!!\n\n### Sentiment:\npositive</s>"
)
RATING = (
    '### Review:\nA rating of "1" does not begin to express how dull, depressing and relentlessly bad this movie is.'
    "\n\n### Sentiment:\nnegative</s>"
)


@pytest.mark.parametrize(
    ("words", "expected"), [("gut wrenching laughter", LAUGHTER), ('A rating of "1" does not', RATING)]
)
def test_an_imdb_row_becomes_this_text(
    prepare: Prepare, shared_data: Path, tmp_path: Path, tokenizer: Any, words: str, expected: str
) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [row for row in read_rows(shared_data / "imdb_sample.jsonl") if words in row["text"]]
    )
    (row,) = prepare("data.name=imdb", f"data.path={file}", *ALL).train
    assert whole(row, tokenizer) == expected


def test_no_review_keeps_its_line_break_tags(prepare: Prepare, imdb: tuple[str, str], tokenizer: Any) -> None:
    texts = [whole(row, tokenizer) for row in prepare(*imdb, *ALL, "data.max_samples=100").train]
    assert len(texts) == 100
    assert not any("<br" in text for text in texts)


@pytest.mark.parametrize("tag", ["<br />", "<br/>", "<br>", "<br /><br />", "<br /> <br />"])
def test_line_break_tags_become_one_line_break(tag: str) -> None:
    assert format_review(f"{tag}Good.{tag}Very.{tag}", "positive", completion_only=True).text == (
        "### Review:\nGood.\nVery.\n\n### Sentiment:\npositive"
    )


@pytest.mark.parametrize("length", ["64", "512", "null"])
def test_a_review_keeps_its_label_at_any_length_and_the_loss_looks_at_it_alone(
    prepare: Prepare, shared_data: Path, tmp_path: Path, tokenizer: Any, length: str
) -> None:
    rows = read_rows(shared_data / "imdb_sample.jsonl")[:150]
    # Numbered, so that a sample is known again after the shuffling.
    file = write_rows(tmp_path / "rows.jsonl", [{**row, "text": f"{n}: {row['text']}"} for n, row in enumerate(rows)])
    splits = prepare("data.name=imdb", f"data.path={file}", *ALL, f"training.max_length={length}")
    words = []
    for row in splits.train:
        text = whole(row, tokenizer)
        number = int(text.removeprefix("### Review:\n").split(":")[0])
        words.append("positive" if rows[number]["label"] == 1 else "negative")
        assert text.endswith(f"\n\n### Sentiment:\n{words[-1]}</s>")
        assert trained(row, tokenizer) == f"{words[-1]}</s>"
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= float(length.replace("null", "inf"))
    assert len(words) == 150 and set(words) == {"negative", "positive"}
    # Hardly any review has fewer than 64 tokens, and some have more than 512.
    truncated = splits.report.truncated["train"]
    assert {"64": 100 < truncated <= 150, "512": 0 < truncated < 100, "null": truncated == 0}[length]


def test_a_review_that_is_cut_loses_its_end_and_nothing_else(tokenizer: Any) -> None:
    example = format_review("One two three four five six seven eight nine ten.", "negative", completion_only=True)
    ids, _, _ = tokenise_one(example, tokenizer, None)
    shorter, labels, cut = tokenise_one(example, tokenizer, len(ids) - 3)
    head, tail = tokenizer.decode(ids).split("\n\n### Sentiment:\n")
    assert cut and len(shorter) == len(labels) == len(ids) - 3
    kept, label = tokenizer.decode(shorter).split("\n\n### Sentiment:\n")
    assert (label, tail) == ("negative</s>", "negative</s>")
    assert head.startswith(kept) and 0 < len(head) - len(kept) < 15


def test_the_loss_looks_at_the_whole_review_where_asked(prepare: Prepare, imdb: tuple[str, str]) -> None:
    splits = prepare(*imdb, *ALL, "training.completion_only_loss=false", "data.max_samples=5")
    assert len(splits.train) == 5
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in splits.train)


def test_label_words_can_be_others(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "It rains.", "class": 2}])
    form = "data.format={review: body, label: class, label_words: [sport, money, weather]}"
    (row,) = prepare(f"data.name={file}", form, *ALL).train
    assert whole(row, tokenizer) == "### Review:\nIt rains.\n\n### Sentiment:\nweather</s>"


# ---- other formats and files -----------------------------------------------------------------------------------------


def test_prompt_and_completion_are_used_as_they_are(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Q: 1 + 1\nA:", "a": " two"}])
    source = (f"data.name={file}", "data.format={prompt: q, completion: a}", *ALL)
    (row,) = prepare(*source).train
    assert whole(row, tokenizer) == "Q: 1 + 1\nA: two</s>"
    assert trained(row, tokenizer) == " two</s>"
    (row,) = prepare(*source, "training.completion_only_loss=false").train
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_whole_texts_are_used_as_they_are(prepare: Prepare, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "The climate\nis changing."}, {"body": " "}])
    splits = prepare(f"data.name={file}", "data.format.text=body", *ALL)
    (row,) = splits.train
    assert whole(row, tokenizer) == "The climate\nis changing.</s>"
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]
    assert splits.report.dropped_empty == 1


def as_jsonl(frame: pandas.DataFrame, folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", frame.to_dict("records"))


def as_json(frame: pandas.DataFrame, folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(frame.to_dict("records")), encoding="utf-8")
    return folder / "rows.json"


def as_csv(frame: pandas.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "rows.csv", index=False)
    return folder / "rows.csv"


def as_parquet(frame: pandas.DataFrame, folder: Path) -> Path:
    frame.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_arrow_folder(frame: pandas.DataFrame, folder: Path) -> Path:
    Dataset.from_pandas(frame, preserve_index=False).save_to_disk(folder / "saved")
    return folder / "saved"


def as_arrow_file(frame: pandas.DataFrame, folder: Path) -> Path:
    return next(as_arrow_folder(frame, folder).glob("*.arrow"))


def as_folder_of_two(frame: pandas.DataFrame, folder: Path) -> Path:
    (folder / "parts").mkdir()
    frame[:80].to_parquet(folder / "parts" / "0.parquet")
    frame[80:].to_parquet(folder / "parts" / "1.parquet")
    return folder / "parts"


WRITERS = [as_jsonl, as_json, as_csv, as_parquet, as_arrow_folder, as_arrow_file, as_folder_of_two]


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__.removeprefix("as_"))
def test_a_file_of_another_kind_gives_the_same_samples(
    prepare: Prepare, dolly: str, shared_data: Path, tmp_path: Path, writer: Callable[[pandas.DataFrame, Path], Path]
) -> None:
    expected = prepare(dolly)
    found = prepare(f"data.path={writer(pandas.DataFrame(read_rows(shared_data / 'dolly_sample.jsonl')), tmp_path)}")
    assert found.report == expected.report
    for name in ("train", "validation", "test"):
        assert getattr(found, name).to_list() == getattr(expected, name).to_list()


@pytest.mark.parametrize("word", ["None", "null", "NA", "N/A", "nan"])
def test_a_word_in_a_csv_file_is_a_word(prepare: Prepare, tmp_path: Path, tokenizer: Any, word: str) -> None:
    # "None" is an answer; a reader that takes it for a missing value loses the row, and calls it empty.
    (tmp_path / "rows.csv").write_text(
        f"instruction,context,response\nHow many are left?,,{word}\nAnd now?,,Some\n", encoding="utf-8"
    )
    splits = prepare(f"data.path={tmp_path / 'rows.csv'}", *ALL)
    assert sorted(whole(row, tokenizer).split("### Response:\n")[1] for row in splits.train) == sorted(
        [f"{word}</s>", "Some</s>"]
    )


def test_a_local_file_is_named_in_data_name_or_in_data_path(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"body": "It rains."}])
    by_name = prepare(f"data.name={file}", "data.format.text=body", *ALL)
    by_path = prepare("data.name=weather", f"data.path={file}", "data.format.text=body", *ALL)
    assert by_name.train.to_list() == by_path.train.to_list()


# ---- splits ----------------------------------------------------------------------------------------------------------


def sizes(rows: int, *overrides: str, with_test: bool = True) -> tuple[int, int, int]:
    parts = split(range(rows), recipe_of(*overrides).data, 42, with_test=with_test)
    # Each row is in one split, once.
    assert sorted(row for part in parts.values() for row in part) == list(range(rows))
    return len(parts["train"]), len(parts["validation"]), len(parts["test"])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(151, (120, 15, 16)), (15_011, (12_008, 1_501, 1_502)), (10, (8, 1, 1)), (1_000, (800, 100, 100))],
)
def test_rows_are_split_80_10_10(rows: int, expected: tuple[int, int, int]) -> None:
    assert sizes(rows) == expected


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [((0.0, 0.1), (90, 0, 10)), ((0.1, 0.0), (90, 10, 0)), ((0.0, 0.0), (100, 0, 0)), ((0.3, 0.3), (40, 30, 30))],
)
def test_the_fractions_are_the_recipe_s(fractions: tuple[float, float], expected: tuple[int, int, int]) -> None:
    validation, test = fractions
    overrides = (f"data.validation_fraction={validation}", f"data.test_fraction={test}", "training.eval_strategy=no")
    assert sizes(100, *overrides) == expected


def test_with_a_test_split_of_its_own_no_row_is_held_out() -> None:
    assert sizes(100, with_test=False) == (90, 10, 0)


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    first, same, other = (split(range(151), recipe_of().data, seed, with_test=True) for seed in (42, 42, 43))
    assert first == same
    assert all(set(first[name]) != set(other[name]) for name in ("train", "validation", "test"))


def test_max_samples_are_taken_after_shuffling() -> None:
    parts = split(range(1_000), recipe_of("data.max_samples=100").data, 42, with_test=True)
    taken = [row for part in parts.values() for row in part]
    assert (len(parts["train"]), len(parts["validation"]), len(parts["test"])) == (80, 10, 10)
    assert len(set(taken)) == 100 and max(taken) > 500


def test_the_sample_of_dolly_is_split_into_120_15_and_16(prepare: Prepare, dolly: str) -> None:
    splits = prepare(dolly)
    assert splits.validation is not None and splits.test is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (120, 15, 16)
    assert splits.report.rows == {"train": 120, "validation": 15, "test": 16}
    assert splits.report.tokens["train"] == sum(len(ids) for ids in splits.train["input_ids"])


def test_a_run_s_seed_decides_who_is_held_out(prepare: Prepare, dolly: str) -> None:
    first, again, other = (prepare(dolly, f"run.seed={seed}", "training.max_length=null").test for seed in (1, 1, 2))
    assert first is not None and again is not None and other is not None
    assert first.to_list() == again.to_list()
    assert first.to_list() != other.to_list()


def test_a_recipe_that_wants_no_held_out_splits_gets_none(prepare: Prepare, dolly: str) -> None:
    splits = prepare(dolly, *ALL)
    assert (len(splits.train), splits.validation, splits.test) == (151, None, None)


def test_a_test_file_is_the_held_out_split(prepare: Prepare, dolly: str, tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(
        tmp_path / "held_out.jsonl",
        [{"instruction": "Say.", "context": "", "response": text} for text in ("yes", "no", "")],
    )
    splits = prepare(dolly, f"data.test_path={file}")
    assert splits.validation is not None and splits.test is not None
    assert (len(splits.train), len(splits.validation)) == (135, 16)
    assert [whole(row, tokenizer).split("### Response:\n")[1] for row in splits.test] == ["yes</s>", "no</s>"]
    assert splits.report.dropped_empty == 1


# ---- errors ----------------------------------------------------------------------------------------------------------

QA = "data.format={prompt: q, completion: a}"


def test_a_missing_file_is_named(prepare: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"there is no data file or folder {tmp_path}/rows\.jsonl"):
        prepare(f"data.path={tmp_path / 'rows.jsonl'}")


@pytest.mark.parametrize(
    ("name", "content"), [("rows.jsonl", ""), ("rows.jsonl", "\n\n"), ("rows.csv", "q,a\n"), ("rows.json", "[]")],
    ids=["no byte", "blank lines", "a header alone", "an empty list"],
)  # fmt: skip
def test_a_file_without_rows_is_called_empty(prepare: Prepare, tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} is empty"):
        prepare(f"data.name={tmp_path / name}", QA)


def test_a_folder_without_data_files_says_what_it_looked_for(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pytest.raises(DataError, match=r"rows holds no file that ends in \.jsonl, \.json, \.csv, \.parquet, \.arrow"):
        prepare(f"data.name={tmp_path / 'rows'}", QA)


def test_a_folder_of_several_kinds_is_refused(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / "rows" / name).write_text("q,a\nx,y\n")
    with pytest.raises(DataError, match=r"several formats \(\.csv, \.jsonl\)"):
        prepare(f"data.name={tmp_path / 'rows'}", QA)


def test_a_file_of_an_unknown_kind_says_which_are_known(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows.xml").write_text("<rows/>")
    with pytest.raises(DataError, match=r"rows\.xml is none of \.jsonl, \.json, \.csv, \.parquet, \.arrow"):
        prepare(f"data.path={tmp_path / 'rows.xml'}")


def test_a_broken_file_is_named_with_the_reader_s_reason(prepare: Prepare, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "x", "a": "y"}\nnot json\n')
    with pytest.raises(DataError, match=r"rows\.jsonl cannot be read as json: JSON parse error"):
        prepare(f"data.name={tmp_path / 'rows.jsonl'}", QA)


def test_wrong_columns_are_listed_with_the_override_to_use(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(DataError) as caught:
        prepare(f"data.path={file}")
    message = str(caught.value)
    assert f"{file}) has no column instruction, response; it has question, answer" in message
    assert "data.format.instruction=COLUMN data.format.response=COLUMN" in message


def test_the_override_that_is_named_for_a_wrong_column_works_as_it_is(
    prepare: Prepare, tmp_path: Path, tokenizer: Any
) -> None:
    file = write_rows(
        tmp_path / "rows.jsonl", [{"instruction": "Say where.", "context": "We live here.", "answer": "Here."}]
    )
    with pytest.raises(DataError) as caught:
        prepare(f"data.path={file}", *ALL)
    named = str(caught.value).splitlines()[-1].split("name yours: ")[1]
    (row,) = prepare(f"data.path={file}", *ALL, *named.replace("COLUMN", "answer").split()).train
    assert (
        whole(row, tokenizer)
        == "### Instruction:\nSay where.\n\n### Context:\nWe live here.\n\n### Response:\nHere.</s>"
    )


def test_wrong_columns_of_the_test_file_are_told_of_the_test_file(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "held_out.jsonl", [{"question": "Why?", "answer": "So."}])
    with pytest.raises(DataError, match=r"held_out\.jsonl.* has no column instruction"):
        prepare(dolly, f"data.test_path={file}")


def test_a_column_that_holds_no_text_is_named(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "How many?", "a": 42}])
    with pytest.raises(DataError, match="column 'a' holds int values; text was expected"):
        prepare(f"data.name={file}", QA, *ALL)


@pytest.mark.parametrize("label", [2, -1, "pos", None])
def test_a_label_that_is_no_class_number_is_named(prepare: Prepare, tmp_path: Path, label: Any) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "Good.", "label": label}])
    with pytest.raises(
        DataError, match=rf"column 'label' holds {label!r}; expected 0 … 1 \(data\.format\.label_words\)"
    ):
        prepare("data.name=imdb", f"data.path={file}", *ALL)


def test_all_rows_empty_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why?", "a": ""}, {"q": "How?", "a": " "}])
    with pytest.raises(DataError, match="no row is left to train on: 2 of 2 rows are empty"):
        prepare(f"data.name={file}", QA)


def test_too_few_rows_for_the_splits_is_an_error(prepare: Prepare, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Why?", "a": "So."}])
    with pytest.raises(DataError, match="no row is left to train on"):
        prepare(f"data.name={file}", QA)


def test_all_samples_cut_to_nothing_is_an_error_that_names_the_length(prepare: Prepare, dolly: str) -> None:
    with pytest.raises(DataError, match=r"all 151 samples of the train split were dropped.* training\.max_length=4"):
        prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=4")


def test_a_name_that_is_nothing_known_says_what_is(prepare: Prepare) -> None:
    with pytest.raises(
        DataError,
        match=r"data\.name=climate is none of tiny, tiny_sentiment, dolly, imdb, no file and no hub id; set data\.path",
    ):
        prepare("data.name=climate", "data.format.text=text")


def test_a_failed_preparation_leaves_nothing_in_the_cache(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        prepare(dolly, *ALL, RESPONSE_ONLY, "training.max_length=4")
    assert [path for path in (tmp_path / "cache" / "data").iterdir() if path.suffix != ".lock"] == []


# ---- the cache -------------------------------------------------------------------------------------------------------


def prepared_folders(tmp_path: Path) -> dict[str, int]:
    """Each folder of the cache with the time of its report."""
    return {
        report.parent.name: report.stat().st_mtime_ns for report in (tmp_path / "cache" / "data").glob("*/report.json")
    }


def test_the_second_preparation_reads_the_first_one_s(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    first = prepare(dolly)
    folders = prepared_folders(tmp_path)
    second = prepare(dolly)
    assert len(folders) == 1
    assert prepared_folders(tmp_path) == folders
    assert second.train._fingerprint == first.train._fingerprint
    assert second.report == first.report


@pytest.mark.parametrize("folder", [False, True], ids=["file", "arrow folder"])
def test_changed_data_is_read_anew(prepare: Prepare, tmp_path: Path, tokenizer: Any, folder: bool) -> None:
    for number, text in enumerate(("It rains.", "It snows.")):  # of one length
        source = tmp_path / ("saved" if folder else "rows.jsonl")
        if folder:
            Dataset.from_list([{"body": text}]).save_to_disk(source)
        else:
            write_rows(source, [{"body": text}])
        (row,) = prepare(f"data.name={source}", "data.format.text=body", *ALL).train
        assert whole(row, tokenizer) == f"{text}</s>"
        assert len(prepared_folders(tmp_path)) == number + 1


@pytest.mark.parametrize(
    "change", ["training.max_length=32", "run.seed=7", RESPONSE_ONLY, "data.test_fraction=0.2", "data.max_samples=50"]
)
def test_another_recipe_for_the_same_data_is_prepared_for_itself(
    prepare: Prepare, dolly: str, tmp_path: Path, change: str
) -> None:
    first, second = prepare(dolly), prepare(dolly, change)
    assert len(prepared_folders(tmp_path)) == 2
    assert first.train.to_list() != second.train.to_list()


def test_another_tokenizer_is_prepared_for_itself(prepare: Prepare, dolly: str, tmp_path: Path, tokenizer: Any) -> None:
    prepare(dolly)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["###eos_token###"])
    splits = data.prepare(recipe_of(dolly), other)
    assert len(prepared_folders(tmp_path)) == 2
    assert any(len(tokenizer) in ids for ids in splits.train["input_ids"])


# ---- lengths and limits ----------------------------------------------------------------------------------------------


def samples(count: int) -> Dataset:
    return Dataset.from_dict(
        {"input_ids": [[5] * (i + 1) for i in range(count)], "labels": [[5] * (i + 1) for i in range(count)]}
    )


def test_lengths_are_the_numbers_of_tokens_of_a_selection_as_well() -> None:
    assert lengths_of(samples(5)).tolist() == [1, 2, 3, 4, 5]
    assert lengths_of(samples(5).select([3, 0])).tolist() == [4, 1]


@pytest.mark.parametrize(("limit", "kept"), [(None, 13), (5, 5), (99, 13)])
def test_at_most_keeps_the_first_samples(limit: int | None, kept: int) -> None:
    found = at_most(samples(13), limit)
    assert found is not None and found.to_list() == samples(13).to_list()[:kept]


def test_no_split_stays_none() -> None:
    assert at_most(None, 5) is None


# ---- preview ---------------------------------------------------------------------------------------------------------


def previewed(tokenizer: Any, tmp_path: Path, *overrides: str, colour: bool = False) -> str:
    file = write_rows(tmp_path / "rows.jsonl", [{"instruction": "Say it.", "context": "", "response": "It."}])
    return preview(
        recipe_of(f"data.path={file}", *ALL, RESPONSE_ONLY, *overrides), tokenizer, rows=range(3), colour=colour
    )


@pytest.mark.usefixtures("prepare")
def test_a_preview_tells_trained_and_masked_apart(tokenizer: Any, tmp_path: Path) -> None:
    text = previewed(tokenizer, tmp_path)
    assert "### Instruction:\nSay it.\n\n### Response:\n⟦It.</s>⟧\n" in text
    assert text.endswith("legend: ⟦trained⟧ masked")
    assert "\033" not in text


@pytest.mark.usefixtures("prepare")
def test_a_preview_on_a_terminal_tells_them_apart_by_colour(tokenizer: Any, tmp_path: Path) -> None:
    text = previewed(tokenizer, tmp_path, colour=True)
    assert "\033[2m### Instruction:\nSay it.\n\n### Response:\n\033[0m\033[32mIt.</s>\033[0m\n" in text
    assert "⟦" not in text


@pytest.mark.usefixtures("prepare")
def test_a_preview_counts_tokens_and_shows_lengths_and_what_was_dropped(tokenizer: Any, tmp_path: Path) -> None:
    ids, labels, _ = tokenise_one(format_dolly("Say it.", "", "It.", completion_only=True), tokenizer, None)
    text = previewed(tokenizer, tmp_path)
    assert f"sample 0: {len(ids)} tokens, {sum(label != IGNORED for label in labels)} trained" in text
    assert f"data: train 1, validation 0, test 0 samples; {len(ids)} training tokens" in text
    assert "lengths in tokens (train)" in text and "█" in text


def test_the_digest_is_of_the_texts_in_their_order(prepare: Prepare, tmp_path: Path) -> None:
    rows = [{"body": f"Row {number}."} for number in range(4)]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def digest(*words: str) -> str:
        return prepare(f"data.name={file}", "data.format.text=body", *ALL, *words).report.digest

    first = digest()
    assert digest("training.max_length=2") == first, "how a text is cut into tokens does not matter"
    assert digest("run.seed=1") != first
    write_rows(file, reversed(rows))
    assert digest() != first
    write_rows(file, rows)
    assert digest() == first
