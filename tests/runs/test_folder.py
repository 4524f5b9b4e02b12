"""The run folder: whose name it is, and what stands in it after a kill or a failure."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distft.errors import RunFolderError
from distft.runs.figures import SUMMARY_KEYS
from distft.runs.folder import RunFolder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_first_run_takes_the_name_and_later_ones_get_numbers(tmp_path: Path) -> None:
    claimed = [RunFolder.claim(tmp_path / "runs", "tiny", exact=False).name for _ in range(3)]
    assert claimed == ["tiny", "tiny-2", "tiny-3"]
    assert names(tmp_path / "runs") == ["tiny", "tiny-2", "tiny-3"]


def test_a_gap_in_the_numbers_is_filled(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny-3").mkdir()
    assert [RunFolder.claim(tmp_path, "tiny", exact=False).name for _ in range(2)] == ["tiny-2", "tiny-4"]


def test_a_used_folder_keeps_its_files(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "summary.json").write_text("the first run's")
    RunFolder.claim(tmp_path, "tiny", exact=False)
    assert (tmp_path / "tiny" / "summary.json").read_text() == "the first run's"


def test_claims_at_the_same_time_get_different_folders(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = [
            folder.path for folder in pool.map(lambda _: RunFolder.claim(tmp_path, "tiny", exact=False), range(40))
        ]
    assert len(set(claimed)) == 40


def test_an_exact_name_in_use_is_an_error_that_names_the_next_free_one(tmp_path: Path) -> None:
    for taken in ("tiny", "tiny-2"):
        (tmp_path / taken).mkdir()
    with pytest.raises(RunFolderError, match=r"in use.* run\.name=tiny-3$"):
        RunFolder.claim(tmp_path, "tiny", exact=True)
    assert names(tmp_path) == ["tiny", "tiny-2"]


def test_an_exact_name_that_is_free_is_claimed(tmp_path: Path) -> None:
    assert RunFolder.claim(tmp_path, "tiny", exact=True).path == tmp_path / "tiny"


def test_a_folder_that_cannot_be_made_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot create .*set run\.dir"):
        RunFolder.claim(tmp_path / "file", "tiny", exact=False)


def test_constructing_a_run_folder_touches_no_disk(tmp_path: Path) -> None:
    assert RunFolder(tmp_path / "runs" / "tiny").metrics == tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert names(tmp_path) == []


def test_a_summary_that_has_no_json_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary({"status": "running"})
    with pytest.raises(TypeError):  # JSON has no tuples as keys
        folder.write_summary({"status": "finished", "eval_before": {("loss", "perplexity"): 1.0}})
    assert folder.read_summary()["status"] == "running"
    assert names(tmp_path) == ["summary.json"]


def test_a_summary_has_every_key_in_order_and_null_where_nothing_is_known(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_summary({"train_loss": 1.5, "status": "finished"})
    record = folder.read_summary()
    assert tuple(record) == SUMMARY_KEYS
    assert {key: value for key, value in record.items() if value is not None} == {
        "status": "finished",
        "train_loss": 1.5,
    }


@pytest.mark.parametrize(
    "key",
    [
        "status",
        "cause",
        "strategy",
        "world_size",
        "train_loss",
        "eval_before",
        "eval_after",
        "train_time_s",
        "samples_per_second",
        "tokens_per_second",
        "tokens_per_second_per_gpu",
        "mfu",
        "peak_memory_gib",
        "energy_j",
        "restarts",
    ],
)
def test_the_design_s_key_is_a_key_of_every_summary(key: str) -> None:
    assert key in SUMMARY_KEYS


def test_a_key_that_no_summary_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="tokens_per_sec"):
        RunFolder(tmp_path).write_summary({"tokens_per_sec": 1.0})
    assert names(tmp_path) == []


def test_nan_in_metrics_becomes_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": float("nan")})
    assert folder.metrics.read_text() == '{"step": 1, "loss": null}\n'


def test_metrics_come_back_in_the_order_of_writing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    records = [{"step": step, "loss": 1 / step} for step in (1, 2, 3)]
    for record in records:
        folder.append_metrics(record)
    assert folder.read_metrics() == records


def test_a_last_line_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"step": 1, "loss": 2.5})
    with folder.metrics.open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.read_metrics() == [{"step": 1, "loss": 2.5}]


def test_a_run_without_metrics_has_no_records(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).read_metrics() == []


@pytest.mark.parametrize("content", [None, "", '{"status": "fin', "[]"], ids=["missing", "empty", "torn", "no object"])
def test_a_summary_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"summary\.json"):
        RunFolder(tmp_path).read_summary()


def test_of_the_ranks_that_fail_in_one_attempt_the_first_gives_the_cause(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempts = [
        ("launch", 0, "killed"),
        ("launch", 0, "lost its neighbour"),
        ("launch", 1, "killed"),
        ("next", 0, "hung"),
    ]
    kept = [
        folder.append_fault(cause, rank=0, step=1, launch=launch, attempt=attempt)
        for launch, attempt, cause in attempts
    ]
    assert kept == [True, False, True, True]
    assert [fault["cause"] for fault in folder.read_faults()] == ["killed", "killed", "hung"]


def test_ranks_that_fail_at_the_same_time_leave_one_record(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        kept = list(
            pool.map(lambda rank: folder.append_fault("killed", rank=rank, step=1, launch="a", attempt=0), range(40))
        )
    assert kept.count(True) == len(folder.read_faults()) == 1


def test_runs_of_a_name_are_listed_newest_first(tmp_path: Path) -> None:
    for name in ("tiny", "tiny-2", "tiny-10", "tiny-x", "tiny-3"):
        RunFolder(tmp_path / name).write_summary({"status": "finished"})
    (tmp_path / "tiny-4").mkdir()  # no run
    assert [folder.name for folder in RunFolder.named(tmp_path, "tiny")] == ["tiny-10", "tiny-3", "tiny-2", "tiny"]


def test_the_name_of_a_run_is_no_pattern(tmp_path: Path) -> None:
    for name in ("r[12]", "r[12]-2", "r1-3"):
        RunFolder(tmp_path / name).write_summary({"status": "finished"})
    assert [folder.name for folder in RunFolder.named(tmp_path, "r[12]")] == ["r[12]-2", "r[12]"]
