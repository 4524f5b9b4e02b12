"""Where the time of a step goes: `tracking.profile_steps: 3` writes `profile.json` into the run folder.

The steps after the warm-up run under torch.profiler. Every moment of the device's time counts once: as computation if
any runs, else as (exposed) communication, else as copying, else as idle. On a CPU the device is the process itself:
operators are its computation, and the time that Python spends between them is idle time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.console import say
from distft.data.loader import DataWait
from distft.distributed.collectives import gather
from distft.distributed.world import World
from distft.files import to_json, write_atomically
from distft.runs.folder import RunFolder

KINDS = ("compute", "communication", "copy")
"""In order of precedence: each hides those after it."""
_COMMUNICATION = ("nccl", "gloo:", "c10d::")
_COPY = ("memcpy", "memset", "[memory]")
_PRODUCTS = (
    *("gemm", "gemv", "nvjet", "cutlass", "splitk"),  # kernels of cuBLAS and CUTLASS
    *("flash", "fmha", "attention"),  # two products each
    *("aten::mm", "aten::bmm", "aten::addmm", "aten::matmul", "aten::linear", "aten::baddbmm"),
)
"""Parts of the names of matrix products."""
_LISTED = 15


@dataclass(frozen=True)
class Activity:
    """One activity of the device, from `start` to `end` in seconds on any one clock."""

    name: str
    start: float
    end: float

    @property
    def kind(self) -> str:
        name = self.name.lower()
        if name.startswith(_COMMUNICATION):
            return "communication"
        return "copy" if name.startswith(_COPY) else "compute"

    @property
    def is_product(self) -> bool:
        """Whether it is a matrix product, which arithmetic can bound; other computation is bound by memory."""
        return self.kind == "compute" and any(part in self.name.lower() for part in _PRODUCTS)


def shares(activities: Iterable[Activity], seconds: float) -> dict[str, float]:
    """Split the `seconds` in which `activities` ran.

    `compute_s`, `communication_exposed_s`, `copy_exposed_s` and `idle_s` add up to them. Also returns
    `communication_s`, hidden or not, and `products_s`, the part of the computation in matrix products.
    """
    activities = list(activities)
    products = _covered([(activity.start, activity.end) for activity in activities if activity.is_product])
    spans: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for activity in activities:
        spans[activity.kind].append((activity.start, activity.end))
    alone = {kind: _covered(spans[kind]) for kind in KINDS}
    until = [_covered([span for kind in KINDS[: number + 1] for span in spans[kind]]) for number in range(len(KINDS))]
    return {
        "compute_s": until[0],
        "communication_exposed_s": until[1] - until[0],
        "copy_exposed_s": until[2] - until[1],
        "idle_s": max(seconds - until[2], 0.0),
        "communication_s": alone["communication"],
        "products_s": products,
    }


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of `spans`."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total


def longest(activities: Iterable[Activity], seconds: float) -> list[dict[str, Any]]:
    """Return the activities that took longest, by name: their share of `seconds` and how often they ran."""
    spent: dict[str, list[float]] = defaultdict(list)
    for activity in activities:
        spent[activity.name].append(activity.end - activity.start)
    ordered = sorted(spent.items(), key=lambda item: -sum(item[1]))[:_LISTED]
    return [{"name": name[:200], "share": sum(times) / seconds, "count": len(times)} for name, times in ordered]


class Profile(TrainerCallback):  # type: ignore[misc]
    """Profiles `tracking.profile_steps` steps after the warm-up, or fewer, to leave at least one step for timing.

    It must come before the telemetry, whose windows end where the profiled steps begin and end. All ranks take part.
    """

    def __init__(self, folder: RunFolder, recipe: Recipe, world: World, waits: DataWait) -> None:
        self._folder, self._world, self._waits = folder, world, waits
        self._wanted, self._warmup = recipe.tracking.profile_steps, max(recipe.tracking.throughput_warmup_steps, 1)
        self._first, self._steps = 0, 0  # the step before the profiled ones, and their number
        self._profiler: Any = None
        # Seconds of the profiled steps, and the seconds of these that were spent waiting for batches.
        self._measured: tuple[float, float] | None = None

    def covers(self, step: int) -> bool:
        """Whether `step` runs under the profiler."""
        return self._first < step <= self._first + self._steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._first = state.global_step + self._warmup
        self._steps = max(min(self._wanted, state.max_steps - self._first - 1), 0)
        if self._wanted and not self._steps and self._world.is_main:
            say(f"no profile: {state.max_steps} steps leave none for it, after {self._first} for warm-up and 1 to time")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._steps and self._profiler is None and state.global_step == self._first:
            on_gpu = torch.cuda.is_available() and not args.use_cpu
            self._profiler = torch.profiler.profile(
                activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
            )
            self._profiler.start()
            self._waited, self._clock = self._waits.seconds, self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._steps and state.global_step in (self._first, self._first + self._steps):
            control.should_log = True  # end a window of the rates here
        if self._profiler is not None and state.global_step == self._first + self._steps:
            self._measured = self._now() - self._clock, self._waits.seconds - self._waited
            self._profiler.stop()

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def close(self) -> None:
        """Stop a profiler that still runs because training ended early: a process that exits under it crashes."""
        if self._profiler is not None and self._measured is None:
            self._profiler.stop()
            self._profiler = None

    def write(self) -> None:
        """Write profile.json if any step was profiled. All ranks enter.

        Call it after training, because reading what was recorded takes seconds.
        """
        if self._measured is None:
            return
        seconds, waited = self._measured
        # Raw events: `profiler.events()` builds a tree of Python objects, in 40 times the time (40 s for 500,000).
        events = [event for event in upstream_api.profiler_events(self._profiler) if not event.is_user_annotation()]
        device = "CUDA" if any(event.device_type().name == "CUDA" for event in events) else "CPU"
        # Count from the first event: nanoseconds since 1970 exceed the precision of a float.
        begin = min((event.start_ns() for event in events), default=0)
        found = [
            Activity(event.name(), (event.start_ns() - begin) / 1e9, (event.end_ns() - begin) / 1e9)
            for event in events
            if event.device_type().name == device
        ]
        mine: dict[str, Any] = {
            "rank": self._world.rank,
            "step_time_s": seconds / self._steps,
            **{key: value / self._steps for key, value in shares(found, seconds).items()},
            "data_wait_s": waited / self._steps,
            "longest": longest(found, seconds),
        }
        ranks = gather(mine, self._world)
        if self._world.is_main:
            steps = [self._first + 1, self._first + self._steps]
            write_atomically(
                self._folder.profile, to_json({"steps": steps, "device": device.lower(), "ranks": ranks}) + "\n"
            )
            worst = max(ranks, key=lambda rank: rank["idle_s"])
            parts = {
                "compute": "compute_s",
                "exposed communication": "communication_exposed_s",
                "copies": "copy_exposed_s",
                "idle": "idle_s",
            }
            line = ", ".join(f"{label} {worst[key] / worst['step_time_s']:.1%}" for label, key in parts.items())
            say(
                f"profile of steps {steps[0]} to {steps[1]}, of the rank with the most idle time: {line}; "
                f"{self._folder.profile}"
            )
