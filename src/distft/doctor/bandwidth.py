"""Measure the bandwidth of collectives between processes of this machine.

`measure` starts one process per GPU over NCCL, or two on the CPU over gloo, and terminates them all if one fails or
hangs. Each runs `python -m distft.doctor.bandwidth`. They rendezvous through a file and communicate over the loopback
interface.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from distft.distributed.supervisor import end_with_parent

WARMUP, REPEATS = 3, 10
SIZE_MIB = {"nccl": 256, "gloo": 16}


@dataclass(frozen=True)
class Bandwidth:
    """What the processes measured, or how they failed.

    Rates are bus bandwidths in GB/s (1e9 bytes) as nccl-tests defines them: bytes of the whole buffer per median
    time, times 2(n-1)/n for all-reduce and (n-1)/n for all-gather. None for one process or after a failure.
    """

    backend: str
    processes: int
    all_reduce_gb_per_s: float | None = None
    all_gather_gb_per_s: float | None = None
    failed: str | None = None
    """What went wrong, in one line."""
    hung: bool = False
    """Whether it was terminated at its time limit."""


def measure(gpus: int, limit_s: float = 180.0) -> Bandwidth:
    """Measure between `gpus` devices, or on the CPU if there are none. Every process has ended when it returns.

    Does not touch CUDA in this process. `limit_s` is the limit for everything, including the start of Python and
    PyTorch.
    """
    backend, processes = ("nccl", gpus) if gpus else ("gloo", 2)
    # Overrides the user's variables: the test stays on this machine, and its sockets are not reachable from outside.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="distft-bandwidth-") as name:
        folder = Path(name)
        try:
            for rank in range(processes):
                with _log(folder, rank).open("wb") as log:
                    arguments = [name, str(rank), str(processes), backend, str(limit_s)]
                    child = subprocess.Popen(
                        [sys.executable, "-m", "distft.doctor.bandwidth", *arguments],
                        stdin=subprocess.PIPE,
                        stdout=log,
                        stderr=log,
                        env=environment,
                        start_new_session=True,
                    )
                    children.append(child)
            failed, hung = _wait(children, folder, time.monotonic() + limit_s, limit_s)
        finally:
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
                assert child.stdin is not None
                child.stdin.close()
        if failed is not None:
            return Bandwidth(backend, processes, failed=failed, hung=hung)
        return Bandwidth(backend, processes, **json.loads((folder / "result").read_text(encoding="utf-8")))


def _wait(children: list[subprocess.Popen[bytes]], folder: Path, end: float, limit_s: float) -> tuple[str | None, bool]:
    """What went wrong, if anything, and whether it was a hang."""
    # Stop at the first failure: the other processes would wait for it.
    while None in (codes := [child.poll() for child in children]) and not any(codes):
        if time.monotonic() > end:
            stages = [f"rank {rank} is in: {_stage(folder, rank)}" for rank in range(len(children))]
            return f"not finished after {limit_s:.0f} s; {', '.join(stages)}", True
        time.sleep(0.1)
    for rank, child in enumerate(children):
        if child.returncode:
            how = f"killed by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else _last(folder, rank)
            return f"rank {rank}, in: {_stage(folder, rank)}: {how}", False
    return None, False


def _log(folder: Path, rank: int) -> Path:
    return folder / f"log-{rank}"


def _last(folder: Path, rank: int) -> str:
    """The end of the process's output, as one line."""
    return " ".join(_log(folder, rank).read_text(encoding="utf-8", errors="replace").split())[-400:]


def _stage(folder: Path, rank: int) -> str:
    stage = folder / f"stage-{rank}"
    return stage.read_text(encoding="utf-8") if stage.exists() else "start of Python"


def _work(folder: Path, rank: int, processes: int, backend: str, limit_s: float) -> None:
    """Run one process's part. Rank 0 writes the result.

    Raises:
        RuntimeError: a collective gave wrong numbers, or failed.
    """

    def enter(stage: str) -> None:
        (folder / f"stage-{rank}").write_text(stage, encoding="utf-8")

    enter("import of torch")
    import torch
    from torch import distributed

    enter("start of the process group")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=limit_s)
    store = f"file://{folder}/store"
    distributed.init_process_group(backend, init_method=store, rank=rank, world_size=processes, timeout=timeout)
    count = SIZE_MIB[backend] * 2**20 // 4 // processes * processes  # fp32, a multiple of the number of processes
    whole = torch.empty(count, device=device)
    piece = torch.full((count // processes,), float(rank), device=device)

    def seconds(stage: str, collective: Callable[[], object]) -> float:
        """Median time of one collective over the repeats after the warm-up."""
        enter(stage)
        times = []
        for _ in range(WARMUP + REPEATS):
            distributed.barrier()
            if backend == "nccl":
                torch.cuda.synchronize()
            began = time.perf_counter()
            collective()
            if backend == "nccl":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        return statistics.median(times[WARMUP:])

    def check(stage: str, right: bool) -> None:
        if not right:
            raise RuntimeError(f"{stage} gave wrong numbers")

    gather = seconds("all-gather", lambda: distributed.all_gather_into_tensor(whole, piece))
    expected = torch.arange(processes, device=device, dtype=torch.float32).repeat_interleave(len(piece))
    check("all-gather", torch.equal(whole, expected))
    reduce = seconds("all-reduce", lambda: distributed.all_reduce(whole))
    distributed.all_reduce(whole.fill_(1.0))
    check("all-reduce", bool((whole == processes).all()))
    enter("end")
    distributed.barrier()
    if rank == 0:
        size, share = whole.nbytes / 1e9, (processes - 1) / processes
        alone = processes == 1  # nothing leaves the device
        result = {
            "all_reduce_gb_per_s": None if alone else size / reduce * 2 * share,
            "all_gather_gb_per_s": None if alone else size / gather * share,
        }
        (folder / "result").write_text(json.dumps(result), encoding="utf-8")
    distributed.destroy_process_group()


def main() -> int:
    end_with_parent()
    folder, rank, processes, backend, limit_s = sys.argv[1:]
    try:
        _work(Path(folder), int(rank), int(processes), backend, float(limit_s))
    except Exception as error:  # the parent reads it from the log
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly exit would wait for the other processes
    return 0


if __name__ == "__main__":
    sys.exit(main())
