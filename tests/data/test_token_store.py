"""Tokenizing on all cores: the same as in one piece, whatever the number of processes, and after a kill."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from distft.data import token_store
from distft.data.encode import encode
from distft.data.formats import formatter
from distft.data.prepare import prepare_data
from distft.data.templates import Example
from distft.data.tokenize import tokenize
from distft.errors import DataError
from tests.data.rows import ALL, Prepare, read_rows, recipe_of, write_rows

QA = "data.format={prompt: q, completion: a}"


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "_PIECE", 2_000)


def contents(folder: Path) -> dict[str, bytes]:
    """The files of all stores in a cache."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("tokens/*/*"))}


# ---- encode, the fast form of tokenize ----------------------------------------------------------------------


def tokenizers(tokenizer: Any) -> list[Any]:
    """Such as add nothing, a beginning, both ends, and a beginning that is also the end."""
    found = [tokenizer]
    for single, eos in (("<s> $A", "</s>"), ("<s> $A </s>", "</s>"), ("<s> $A", "<s>")):
        other = copy.deepcopy(tokenizer)
        special = [("<s>", other.convert_tokens_to_ids("<s>")), ("</s>", other.convert_tokens_to_ids("</s>"))]
        other.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
        other.eos_token = eos
        found.append(other)
    return found


AWKWARD = [
    ("", "yes"),
    ("Why? ", "\n\n"),
    (" ", " a  b "),
    ("<s>Hi", " there</s>"),
    ("Hi</s>", "<s>there"),
    ("¿Qué? 👩‍👩‍👧", "👍🏽 naïve ﬁ"),
    ("a", "b" * 500),
    ("word " * 300, "end"),
]


@pytest.mark.parametrize("max_length", [None, 1, 7, 64])
def test_encode_gives_what_tokenize_gives(tokenizer: Any, shared_data: Path, max_length: int | None) -> None:
    reviews = formatter(recipe_of("data.name=imdb"), tokenizer)
    dolly = formatter(recipe_of("training.completion_only_loss=true"), tokenizer)
    examples = [reviews(row) for row in read_rows(shared_data / "imdb_sample.jsonl")[:40]]
    examples += [dolly(row) for row in read_rows(shared_data / "dolly_sample.jsonl")]
    examples += [Example.trained_from(a + b, len(a)) for a, b in AWKWARD]
    examples += [Example.trained_from(a + b, 0) for a, b in AWKWARD]
    examples += [Example.trained_from(a + b, len(a), tail_from=len(a) // 2) for a, b in AWKWARD]
    assert all(isinstance(example, Example) for example in examples)
    for other in tokenizers(tokenizer):
        marked = Counter[str]()
        expected = [(list(ids), labels, cut) for ids, labels, cut in tokenize(examples, other, max_length, marked)]
        found = encode(examples, other, max_length)
        assert [(sample.ids.tolist(), sample.labels.tolist(), sample.cut) for sample in found] == expected
        assert sum((Counter(sample.marked) for sample in found), Counter()) == marked
        assert [sample.is_trained for sample in found] == [any(x >= 0 for x in labels) for _, labels, _ in expected]


# ---- pieces and processes ----------------------------------------------------------------------


@pytest.mark.usefixtures("small_pieces")
def test_any_number_of_processes_writes_the_same_files(
    prepare: Prepare, dolly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, reports, samples = [], [], []
    for processes in (1, 2, 3):
        splits = prepare(dolly, f"training.dataset_num_proc={processes}")
        written.append(contents(tmp_path / "cache"))
        reports.append(splits.report)
        samples.append(splits.train.to_list())
        shutil.rmtree(tmp_path / "cache")
    assert len(written[0]) > 20, "several pieces"
    assert written[0] == written[1] == written[2]
    assert reports[0] == reports[1] == reports[2]
    monkeypatch.setattr(token_store, "_PIECE", 1 << 30)
    whole = prepare(dolly)
    assert (whole.report, whole.train.to_list()) == (reports[0], samples[0]), "also in one piece"


@pytest.mark.usefixtures("small_pieces")
def test_the_first_fault_in_the_order_of_the_rows_is_reported(prepare: Prepare, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"q": "Why?", "a": "So it is. " * 20} for _ in range(60)]
    rows[31]["a"] = rows[47]["a"] = 5
    file = write_rows(tmp_path / "rows.jsonl", rows)
    with file.open("a") as stream:
        stream.write("{broken")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 32: column 'a' contains int values"):
        prepare(f"data.name={file}", QA, *ALL, "training.dataset_num_proc=2")
    assert not list((tmp_path / "cache" / "tokens").glob(".*.partial"))


KILLED = """
import os, signal, sys
from distft.data import token_store
from distft.data.prepare import prepare_data
from distft.models.loading import load_tokenizer
from tests.data.rows import recipe_of
token_store._PIECE = 2_000
recipe = recipe_of(*sys.argv[1:])
tokenizer = load_tokenizer(recipe)
work, done = token_store._work, []
def killed_at_the_fifth(number, segments, keeps_texts):
    if number == 5:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()  # until the kernel ends this process, because its parent has ended
    return work(number, segments, keeps_texts)
token_store._work = killed_at_the_fifth
prepare_data(recipe, tokenizer)
"""


@pytest.mark.usefixtures("small_pieces")
def test_after_a_kill_the_complete_pieces_are_kept(
    prepare: Prepare, dolly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any
) -> None:
    words = (dolly, *ALL, "training.dataset_num_proc=2")
    model = f"model.name={tokenizer.name_or_path}"
    environment = {**os.environ, "DISTFT_CACHE": str(tmp_path / "cache"), "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, *words, model], env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    (partial,) = (tmp_path / "cache" / "tokens").glob(".*.partial")
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.json")}
    assert "000000.json" in kept and "000005.json" not in kept

    made = []
    call = token_store.Worker.__call__

    def noting(self: Any, number: int, *rest: Any) -> Any:
        made.append(number)
        return call(self, number, *rest)

    monkeypatch.setattr(token_store.Worker, "__call__", noting)
    resumed = prepare_data(recipe_of(dolly, *ALL, "training.dataset_num_proc=1"), tokenizer)
    assert made and not {f"{number:06}.json" for number in made} & kept.keys()
    assert not partial.exists()
    first = contents(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    whole = prepare(dolly, *ALL)
    assert whole.report == resumed.report and contents(tmp_path / "cache") == first


def test_another_split_or_seed_tokenizes_nothing(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    prepare(dolly)
    stores = contents(tmp_path / "cache").keys()
    first = prepare(dolly, "run.seed=7", "data.test_fraction=0.3")
    assert contents(tmp_path / "cache").keys() == stores
    shutil.rmtree(tmp_path / "cache")
    again = prepare(dolly, "run.seed=7", "data.test_fraction=0.3")
    assert (again.report, again.train.to_list()) == (first.report, first.train.to_list())


def test_max_samples_tokenizes_only_these(prepare: Prepare, dolly: str, tmp_path: Path) -> None:
    splits = prepare(dolly, "data.max_samples=20")
    (about,) = (tmp_path / "cache" / "tokens").glob("*/about.json")
    assert json.loads(about.read_text())["rows"] == 151
    assert splits.train.data.num_rows == 20
    everything = [row["input_ids"] for row in prepare(dolly, *ALL, "training.max_length=256").train]
    assert all(row["input_ids"] in everything for row in splits.train)


def test_a_digest_of_hashes_takes_the_place_of_one_of_large_texts(
    prepare: Prepare, dolly: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = prepare(dolly).report
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(token_store, "TEXTS_KEPT", 1_000)
    large = prepare(dolly).report
    assert not list((tmp_path / "cache").glob("tokens/*/texts"))
    assert large.digest != small.digest and large.rows == small.rows
    assert prepare(dolly, "training.max_length=16").report.digest == large.digest
    assert prepare(dolly, "run.seed=1").report.digest != large.digest


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_hundreds_of_pieces_do_not_take_as_many_open_files(
    prepare: Prepare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Data of terabytes has thousands of pieces, and a process may often have 1,024 files."""
    monkeypatch.setattr(token_store, "_PIECE", 1)
    monkeypatch.setattr(token_store, "_FIRST", 1)
    file = write_rows(tmp_path / "rows.jsonl", [{"q": "Which? ", "a": str(number)} for number in range(300)])
    before, (soft, hard) = open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 60, hard))
    try:
        splits = prepare(f"data.name={file}", QA, *ALL, "training.dataset_num_proc=1")
        rows = pickle.loads(pickle.dumps(splits.train)).to_list()  # as a worker of a data loader gets it
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "cache").glob("tokens/*/*.arrow"))) == 300
    assert len(rows) == 300 and open_files() <= before + 5
