"""Runs that are broken on purpose, and the whole run that each must end like."""

from __future__ import annotations

import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.checkpoints import read_tensors

from ..distributed.conftest import Ended, finish, start

# Two epochs of 11 steps, the last of each shorter; with dropout and accumulation.
RUN = (
    "recipe=tiny",
    "batching.global_batch_size=4",
    "batching.micro_batch=1",
    "training.num_train_epochs=2",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=steps",
    "training.save_steps=3",
    "training.save_total_limit=2",
    "tracking.report_to=[]",
    "evaluation.max_samples=8",
    "data.max_samples=54",
)
STEPS = 22
KINDS = {
    "single": ((), 1),
    "ddp": ((), 2),
    "fsdp": (("strategy=fsdp", "quantization.bnb_4bit_quant_storage=float32"), 2),
}


def begin(where: Path, kind: str, *more: str, terminal: int | None = None, **changes: str) -> Popen[str]:
    overrides, processes = KINDS[kind]
    where.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "distft.cli", "train", *RUN, *overrides, *more, "--nproc", str(processes)]
    # One thread a process: several wait for each other at every product where the cores are shared with other work.
    return start(command, where, terminal, **{"OMP_NUM_THREADS": "1", **changes})


def go(where: Path, kind: str, *more: str, **changes: str) -> Ended:
    return finish(begin(where, kind, *more, **changes), where)


def losses(folder: RunFolder) -> list[tuple[int, float, float]]:
    return [
        (record["step"], record["loss"], record["grad_norm"]) for record in folder.read_metrics() if "loss" in record
    ]


def assert_same_run(folder: RunFolder, whole: RunFolder) -> None:
    """Losses, gradient norms and the final adapter are the same to the bit."""
    assert losses(folder) == losses(whole)
    ours, theirs = read_tensors(folder.adapter), read_tensors(whole.adapter)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def ranks(process: Popen[str]) -> dict[int, psutil.Process]:
    """The workers of a run that are alive, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "distft.train" in child.cmdline() and "accelerate.commands.launch" not in child.cmdline():
                found[int(child.environ().get("RANK", "0"))] = child
        except psutil.Error:
            continue
    return found


def until(condition: Callable[[], object], limit_s: float = 120, every_s: float = 0.02) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(every_s)


def stop(processes: Iterable[psutil.Process]) -> None:
    """Suspend processes, and wait until they are: a signal sent before that would come first."""

    def stopped(process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
        return True

    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.suspend()
    until(lambda: all(stopped(process) for process in processes))


def is_pending(signum: signal.Signals, process: psutil.Process) -> bool:
    """Whether a process that is stopped has got the signal, or is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    return bool(int(re.findall(r"ShdPnd:\s*(\w+)", status)[0], 16) >> (signum - 1) & 1)


def family(process: Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], RunFolder]:
    """The folder of a whole run of a kind; each kind runs once a session."""
    known: dict[str, RunFolder] = {}

    def whole(kind: str) -> RunFolder:
        if kind not in known:
            ended = go(tmp_path_factory.mktemp("whole"), kind)
            assert ended.code == 0, ended.stderr[-3000:]
            known[kind] = ended.folder
        return known[kind]

    return whole


EVERY_TIME = {
    "test_a_signal_saves_and_the_same_command_goes_on_to_the_same_end[fsdp]",
    "test_damaged_checkpoints_are_skipped_and_an_older_one_is_taken[ddp]",
    "test_retention_keeps_the_newest_and_a_manifest_is_strict",
    "test_a_rank_killed_at_a_random_step_comes_back[ddp]",
    "test_a_streamed_run_killed_in_its_second_window_ends_the_same",
    "test_a_mistake_is_not_started_again[ddp]",
    "test_a_stopped_process_is_found_and_brought_back[ddp-1]",
    "test_a_signal_to_one_rank_stops_all_at_the_same_step[ddp-1-15]",
    "test_a_signal_is_heard_while_a_rank_waits_for_others_that_never_come",
    "test_a_signal_before_the_first_step_ends_all_ranks_together[1]",
    "test_a_process_stopped_during_a_save_is_found_and_brought_back[fsdp]",
    "test_a_long_evaluation_is_no_hang",
    "test_ctrl_c_twice_stops_now[single]",
    "test_a_closed_terminal_stops_a_run_and_leaves_no_process",
    "test_a_time_in_another_spelling_is_a_fault",
    "test_a_nan_stops_all_ranks_and_names_step_rank_and_samples[ddp]",
    "test_a_skipped_step_leaves_weights_and_optimizer_to_the_bit[fsdp]",
    "test_a_full_disk_costs_the_new_checkpoint_and_never_the_last_good_one[ddp]",
    "test_a_torn_line_of_metrics_is_cut_off_before_the_next",
    "test_records_wait_while_the_disk_is_full",
    "test_a_changed_recipe_is_refused_with_its_differences",
    "test_two_runs_at_once_never_share_a_folder",
    "test_a_server_that_dies_during_the_run",
    "test_restarts_are_one_wandb_run_offline",
    "test_a_run_that_was_killed_keeps_its_order_without_the_cache",
    "test_every_name_here_is_that_of_a_test",
    "test_one_rank_out_of_memory_restarts_all_with_half_the_micro_batch[ddp]",
}
"""One pairing of each kind of fault with a strategy. The others take most of an hour and are marked `thorough`."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.name not in EVERY_TIME and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.thorough)
