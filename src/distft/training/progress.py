"""How far a run has come, for the person who watches: a bar on a terminal; in a file, a line for each log step."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

NAMES = {"eval": "validation", "test": "held-out"}
"""The names that people see of the splits behind `eval_loss` and `test_loss`."""


class Progress:
    """Shows the steps of a run, and the figures of each log step."""

    def __init__(self, steps: int, done: int) -> None:
        self.steps, self.step = steps, done
        self._from, self._began = done, time.perf_counter()
        # If stderr is also written to a log, progress bypasses the log.
        self._stream = getattr(sys.stderr, "original", sys.stderr)
        self._bar: Any = None
        if self._stream.isatty():
            self._bar = tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, mininterval=0.5)

    def update(self, step: int) -> None:
        """Say that this many steps are done."""
        if self._bar is not None:
            self._bar.update(step - self.step)
        self.step = step

    def show(self, logs: Mapping[str, Any]) -> None:
        """Show the figures of a log step."""
        figures = _figures(logs)
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(figures), refresh=True)
            return
        seconds = time.perf_counter() - self._began
        rate = (self.step - self._from) / seconds if seconds > 0 else 0.0
        line = ", ".join([f"step {self.step} of {self.steps}", *figures, f"{rate:.3g} step/s"])
        print(line, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line of results on stdout, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(f"step {self.step}: {text}")
        else:
            print(f"step {self.step}: {text}", flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _figures(logs: Mapping[str, Any]) -> list[str]:
    """The figures of a log step, each with its name."""
    shown = [f"train loss {logs['loss']:.4f}"]
    if logs.get("learning_rate") is not None:
        shown.append(f"lr {logs['learning_rate']:.3g}")
    if logs.get("epoch") is not None:
        shown.append(f"epoch {logs['epoch']:.2f}")
    for key, unit in (("samples_per_second", "samples/s"), ("tokens_per_second", "tokens/s")):
        if logs.get(key):
            shown.append(f"{logs[key]:,.1f} {unit}" if logs[key] < 100 else f"{logs[key]:,.0f} {unit}")
    for key, name in (("peak_memory_gib", "peak GPU memory"), ("host_rss_gib", "host memory")):
        if logs.get(key):
            return [*shown, f"{name} {logs[key]:.1f} GiB"]
    return shown


def loss_name(key: str) -> str:
    """What people read for `eval_loss`, `test_loss` or `eval_LABEL_loss`."""
    split, _, label = key.removesuffix("_loss").partition("_")
    return f"{NAMES.get(split, split)} loss" + (f" of {label}" if label else "")
