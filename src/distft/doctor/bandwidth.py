"""How fast the processes of this machine reach each other, measured by real ones: `python -m distft.doctor.bandwidth` is one of them.

`measure` starts them, one a GPU over NCCL or two on CPU over gloo, and ends them all where they fail or do not come to an end.
They meet in a file and talk over the loopback interface.
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

    The bandwidths are those of the bus in GB/s (1e9 bytes), as nccl-tests defines them, by the median time: bytes of the whole
    buffer a second, times 2(n-1)/n for all-reduce and (n-1)/n for all-gather. None for one process, or where it failed.
    """

    backend: str
    processes: int
    all_reduce_gb_per_s: float | None = None
    all_gather_gb_per_s: float | None = None
    failed: str | None = None
    """What went wrong, in one line."""
    hung: bool = False
    """It had to be ended at its time limit."""


def measure(gpus: int, limit_s: float = 180.0) -> Bandwidth:
    """Measure among `gpus` devices, or on CPU where there is none; whatever was started has ended by then.

    Nothing touches CUDA in this process. `limit_s` holds for everything, the start of Python and PyTorch among it.
    """
    backend, processes = ("nccl", gpus) if gpus else ("gloo", 2)
    # Whatever the user's variables say: this is about one machine, and nobody else is to reach these sockets.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    children: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory(prefix="distft-bandwidth-") as name:
        folder = Path(name)
        try:
            for rank in range(processes):
                with _log(folder, rank).open("wb") as log:
                    children.append(subprocess.Popen(
                        [sys.executable, "-m", "distft.doctor.bandwidth", name, str(rank), str(processes), backend, str(limit_s)],
                        stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True,
                    ))  # fmt: skip
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
    """What went wrong, if anything did, and whether that was a hang."""
    while None in (codes := [child.poll() for child in children]) and not any(
        codes
    ):  # a failed one leaves the others waiting
        if time.monotonic() > end:
            stages = [f"rank {rank} stands in: {_stage(folder, rank)}" for rank in range(len(children))]
            return f"no end after {limit_s:.0f} s; {', '.join(stages)}", True
        time.sleep(0.1)
    for rank, child in enumerate(children):
        if child.returncode:
            how = f"killed by {signal.Signals(-child.returncode).name}" if child.returncode < 0 else _last(folder, rank)
            return f"rank {rank}, in: {_stage(folder, rank)}: {how}", False
    return None, False


def _log(folder: Path, rank: int) -> Path:
    return folder / f"log-{rank}"


def _last(folder: Path, rank: int) -> str:
    """The end of what the process said, as one line."""
    return " ".join(_log(folder, rank).read_text(encoding="utf-8", errors="replace").split())[-400:]


def _stage(folder: Path, rank: int) -> str:
    stage = folder / f"stage-{rank}"
    return stage.read_text(encoding="utf-8") if stage.exists() else "start of Python"


def _work(folder: Path, rank: int, processes: int, backend: str, limit_s: float) -> None:
    """One process's part. Rank 0 writes the result.

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
    distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=processes, timeout=timedelta(seconds=limit_s)
    )  # fmt: skip
    count = SIZE_MIB[backend] * 2**20 // 4 // processes * processes  # fp32, a multiple of the processes
    whole = torch.empty(count, device=device)
    piece = torch.full((count // processes,), float(rank), device=device)

    def seconds(stage: str, collective: Callable[[], object]) -> float:
        """Median time of one, over the repeats after the warm-up."""
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
    except Exception as error:  # whatever it is, the parent reads it in the log
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # an orderly end would wait for the others
    return 0


if __name__ == "__main__":
    sys.exit(main())
