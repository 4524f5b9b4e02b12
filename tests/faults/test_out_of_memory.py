"""Out of memory: on one rank during training, at the smallest micro-batch, and before the run, in the probe."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import psutil
import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.beside import free_port
from distft.training.checkpoints import read_tensors
from distft.training.oom import asked_bytes, taken_bytes

from ..distributed.conftest import Ended, finish, start

# When a worker imports distft.training.trainer, one rank is made to ask for more memory than there is, in one
# micro-batch. It is Python's own hook for such things, so that the command is the user's and the error is torch's.
SITE = """
import importlib.abc, importlib.util, os, sys

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "distft.training.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            step = module.Trainer.training_step
            def training_step(self, *args, **kwargs):
                import torch
                here = self.args.process_index, self.state.global_step
                if here == ({rank}, {step}) and self.args.per_device_train_batch_size in {sizes}:
                    torch.empty(1 << 50, device=self.args.device)
                return step(self, *args, **kwargs)
            module.Trainer.training_step = training_step
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Hook())
"""
RUN = (
    "recipe=tiny",
    "training.max_steps=6",
    "data.max_samples=120",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.save_strategy=steps",
    "training.save_steps=2",
    "tracking.report_to=[]",
    "evaluation.before_and_after=false",
    "lora.lora_dropout=0",
    "quantization=null",
    "training.optim=sgd",
    "training.learning_rate=0.5",
    "run.name=oom",
)
KINDS = {"ddp": (), "fsdp": ("strategy=fsdp",)}


def go(where: Path, *overrides: str, nproc: int = 2, site: Path | None = None, launcher: bool = False) -> Ended:
    changes = {} if site is None else {"PYTHONPATH": f"{site}:{Path(__file__).parents[2] / 'src'}"}
    if nproc == 1:  # where there are more GPUs, one process would be refused
        changes["CUDA_VISIBLE_DEVICES"] = "0"
    if launcher:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(nproc),
            "--num_machines",
            "1",
            "--main_process_port",
            str(free_port()),
            "-m",
            "distft.train",
            *RUN,
            *overrides,
        ]
    else:
        command = [sys.executable, "-m", "distft.cli", "train", *RUN, *overrides, "--nproc", str(nproc)]
    return finish(start(command, where, **changes), where)


def site(where: Path, rank: int, step: int, sizes: tuple[int, ...]) -> Path:
    folder = where / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        SITE.replace("{rank}", str(rank)).replace("{step}", str(step)).replace("{sizes}", str(sizes))
    )
    return folder


@pytest.fixture(scope="module", params=list(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder]:
    ended = go(tmp_path_factory.mktemp("whole"), *KINDS[request.param])
    assert ended.code == 0, ended.stderr[-3000:]
    return request.param, ended.folder


def assert_same_updates(folder: RunFolder, whole: RunFolder) -> None:
    """All lora_B start from zero, so that what stands there is the sum of the updates."""
    ours, theirs = read_tensors(folder.adapter), read_tensors(whole.adapter)
    assert set(ours) == set(theirs)
    names = [name for name in theirs if "lora_B" in name]
    updates = torch.cat([theirs[name].float().flatten() for name in names])
    difference = torch.cat([ours[name].float().flatten() for name in names]) - updates
    assert updates.norm() > 0
    assert difference.norm() <= 1e-4 * updates.norm()


def test_one_rank_out_of_memory_restarts_all_with_half_the_micro_batch(
    whole: tuple[str, RunFolder], tmp_path: Path
) -> None:
    kind, uninterrupted = whole
    ended = go(tmp_path, *KINDS[kind], site=site(tmp_path, 1, 3, (4,)))
    assert ended.code == 0, ended.stderr[-3000:]
    folder = ended.folder
    (fault,) = folder.read_faults()
    assert (fault["rank"], fault["step"], fault["micro_batch"], fault["asked_bytes"]) == (1, 3, 4, 4 << 50)
    assert fault["cause"].startswith(
        "OutOfMemory: out of memory on rank 1 with a micro-batch of 4 samples: tried to allocate 4,194,304.00 GiB"
    )
    summary = folder.read_summary()
    assert (summary["status"], summary["restarts"], summary["global_batch_size"]) == ("finished", 1, 16)
    assert (summary["micro_batch"], summary["gradient_accumulation_steps"]) == (2, 4)
    line = (
        "micro-batch 2 instead of 4, with correspondingly more accumulation: "
        "rank 1 ran out of memory with 4 after step 3"
    )
    assert line in ended.stderr and line in summary["changed_for_you"]
    assert "after step 2" in ended.stderr, "from the last checkpoint"
    assert [record["step"] for record in folder.read_metrics() if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert_same_updates(folder, uninterrupted)


def test_under_a_bare_launcher_the_same_command_goes_on_with_half(whole: tuple[str, RunFolder], tmp_path: Path) -> None:
    kind, uninterrupted = whole
    place = site(tmp_path, 1, 3, (4,))
    ended = go(tmp_path, *KINDS[kind], site=place, launcher=True)
    assert ended.code == 1
    assert "resumes from its last checkpoint with a micro-batch of 2 samples and the same global batch" in ended.stderr
    again = go(tmp_path, *KINDS[kind], site=place, launcher=True)
    assert again.code == 0, again.stderr[-3000:]
    assert again.folder.read_summary()["micro_batch"] == 2
    assert_same_updates(again.folder, uninterrupted)


def test_where_no_restart_is_allowed_none_is_promised(tmp_path: Path) -> None:
    ended = go(tmp_path, "run.max_restarts=0", "quantization=null", nproc=1, site=site(tmp_path, 0, 0, (4,)))
    assert ended.code == 1
    assert "Restarts are disabled (run.max_restarts: 0); one would use a micro-batch of 2 samples" in ended.stderr
    assert "goes on" not in ended.stderr


def test_what_nothing_mends_ends_once_and_names_cheaper_recipes(tmp_path: Path) -> None:
    ended = go(tmp_path, "batching.micro_batch=1", site=site(tmp_path, 1, 3, (1,)))
    assert ended.code == 1, ended.stderr[-3000:]
    summary = ended.folder.read_summary()
    assert summary["status"] == "failed" and len(ended.folder.read_faults()) == 2, (
        "the second start refuses on all ranks"
    )
    assert "out of memory on rank 1 with a micro-batch of 1" in ended.stderr
    assert "By estimate, tiny takes" in ended.stderr
    assert "not started again: " in ended.stderr


@pytest.mark.parametrize(("kind", "nproc"), [("ddp", 1), ("ddp", 2), ("fsdp", 2)])
def test_auto_takes_the_largest_micro_batch_within_the_limit(kind: str, nproc: int, tmp_path: Path) -> None:
    """First with all of the machine, which gives what each size takes; then with a limit between two of them."""
    share = (
        "batching.micro_batch=auto",
        "batching.global_batch_size=64",
        "training.max_steps=1",
        "training.warmup_steps=0",
        "training.save_strategy=no",
        *KINDS[kind],
    )
    free = go(tmp_path, *share, nproc=nproc)
    assert free.code == 0, free.stderr[-3000:]
    found = json.loads(free.folder.probe.read_text())
    largest = 64 // nproc
    assert found["micro_batch"] == largest == free.folder.read_summary()["micro_batch"]
    assert f"micro-batch {largest} is the largest that fits: " in free.stderr
    took = {trial["micro_batch"]: trial["peak_bytes"] for trial in found["trials"]}
    assert list(took) == [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= largest]
    assert list(took.values()) == sorted(took.values()) and took[largest] > took[8] * 1.1

    limit = (took[8] + took[largest]) / 2 / 0.92 / 2**30
    (tmp_path / "second").mkdir()
    bound = go(tmp_path / "second", *share, f"batching.memory_limit_gib={limit:.4f}", nproc=nproc)
    assert bound.code == 0, bound.stderr[-3000:]
    summary = bound.folder.read_summary()
    assert 8 <= summary["micro_batch"] < largest
    assert summary["micro_batch"] * summary["gradient_accumulation_steps"] * nproc == 64

    nothing = go(tmp_path / "second", *share, "batching.memory_limit_gib=0.1", "run.name=none", nproc=nproc)
    assert nothing.code == 1 and "even a micro-batch of one sample does not fit: 1 takes" in nothing.stderr


def test_a_kill_during_the_probe_leaves_no_process(tmp_path: Path) -> None:
    import signal
    import time

    command = [sys.executable, "-m", "distft.cli", "train", *RUN, "batching.micro_batch=auto", "--nproc", "2"]
    process = start(command, tmp_path)
    deadline, trials = time.monotonic() + 120, []
    while len(trials) < 2 and time.monotonic() < deadline:
        family = psutil.Process(process.pid).children(recursive=True)
        trials = [child for child in family if "distft.training.batch_size_worker" in child.cmdline()]
        time.sleep(0.1)
    assert len(trials) == 2
    process.send_signal(signal.SIGKILL)
    for child in family:
        if "distft.train" in child.cmdline() or "accelerate.commands.launch" in child.cmdline():
            child.kill()
    _, alive = psutil.wait_procs(trials, timeout=20)
    finish(process, tmp_path)
    assert not alive


def test_the_allocators_message_says_what_was_asked_for_and_what_was_taken() -> None:
    """The message of PyTorch 2.11's allocator on a GPU that is held to a limit, and that of the CPU's."""
    on_gpu = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 22.78 GiB. GPU 0 has a total capacity of 31.47 GiB of which 12.73 GiB "
        "is free. Including non-PyTorch memory, this process has 18.73 GiB memory in use. 24.00 GiB allowed; Of the "
        "allocated memory 9.08 GiB is allocated by PyTorch, and 512.00 MiB is reserved by PyTorch but unallocated."
    )
    assert (asked_bytes(on_gpu), taken_bytes(on_gpu)) == (int(22.78 * 2**30), int(9.08 * 2**30))
    on_cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12")
    assert (asked_bytes(on_cpu), taken_bytes(on_cpu)) == (4096, None)


GPU = ("batching.global_batch_size=256", "data.max_samples=null", "training.max_steps=3")


def too_little(tmp_path: Path, nproc: int, *more: str) -> str:
    """An override that limits the allocator to less than a rank's whole share needs, but more than an eighth of it."""
    (tmp_path / "free").mkdir()
    free = go(tmp_path / "free", *GPU, *more, "batching.micro_batch=auto", "training.save_strategy=no", nproc=nproc)
    assert free.code == 0, free.stderr[-3000:]
    trials = json.loads(free.folder.probe.read_text())["trials"]
    took = {trial["micro_batch"]: trial["peak_bytes"] for trial in trials}
    share = 256 // nproc
    assert took[share] > 1.5 * took[share // 8], "what the samples take is no small part of the whole"
    return f"batching.memory_limit_gib={(took[share] + took[share // 8]) / 2 / 2**30:.4f}"


@pytest.mark.gpu
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
def test_a_full_gpu_halves_the_micro_batch_until_it_fits(nproc: int, tmp_path: Path) -> None:
    """The allocator is held to a limit, so that the error is CUDA's own."""
    limit = too_little(tmp_path, nproc)
    ended = go(tmp_path, *GPU, limit, f"batching.micro_batch={256 // nproc}", "run.max_restarts=6", nproc=nproc)
    assert ended.code == 0, ended.stderr[-3000:]
    summary, faults = ended.folder.read_summary(), ended.folder.read_faults()
    assert faults
    for fault in faults:
        assert re.search(
            r"tried to allocate .* are free( \([\d.]+ GiB short\)|, but fragmented)\. The run",
            fault["cause"],
        ), fault
    assert summary["micro_batch"] == 256 // nproc // 2 ** len(faults)
    assert summary["restarts"] == len(faults)


@pytest.mark.gpu
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.gpu(2))])
@pytest.mark.parametrize("kind", list(KINDS))
def test_auto_fills_a_gpu_and_never_runs_out(kind: str, nproc: int, tmp_path: Path) -> None:
    limit = too_little(tmp_path, nproc, *KINDS[kind])
    ended = go(tmp_path, *GPU, *KINDS[kind], limit, "batching.micro_batch=auto", nproc=nproc)
    assert ended.code == 0, ended.stderr[-3000:]
    summary, found = ended.folder.read_summary(), json.loads(ended.folder.probe.read_text())
    assert 1 <= summary["micro_batch"] < 256 // nproc, "the limit does not hold the whole share"
    assert ended.folder.read_faults() == []
    (best,) = (trial for trial in found["trials"] if trial["micro_batch"] == summary["micro_batch"])
    assert summary["peak_reserved_gib"] * 2**30 <= best["limit_bytes"], "the probe saw the worst of it"
