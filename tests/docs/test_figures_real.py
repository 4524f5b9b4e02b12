"""Figures of real weights, and of recipes at their real shapes, on the benchmarks page are those of the records."""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from .pages import ROOT, page

BENCHMARKS = page("benchmarks")
Row = list[str]


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def runs_of(experiment: str) -> dict[str, list[dict[str, Any]]]:
    """The finished runs of each variant."""
    report = record("pretrained_h200")["experiments"][experiment]["report"]
    runs = [run for run in report["runs"] if run["status"] == "finished"]
    return {name: [run for run in runs if run["variant"] == name] for name in report["variants"]}


def spread(runs: list[dict[str, Any]], figure: str, form: str = ".3f") -> str:
    """The median and the range of a figure."""
    values = [run["figures"][figure] for run in runs]
    several = f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else ""
    return f"{median(values):{form}}{several}"


def base_accuracy(runs: list[dict[str, Any]]) -> str:
    values = [run["evaluation"]["imdb"]["figures"]["accuracy"]["base"]["value"] for run in runs]
    several = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
    return f"{median(values):.3f}{several}"


def losses(experiment: str) -> list[Row]:
    figures = ("final_loss", "eval_loss_before", "eval_loss_after")
    return [
        [f"`{name}`", str(len(runs)), *(spread(runs, figure) for figure in figures)]
        for name, runs in runs_of(experiment).items()
    ]


def accuracies(experiment: str) -> list[Row]:
    return [
        [
            f"`{name}`",
            str(len(runs)),
            base_accuracy(runs),
            spread(runs, "imdb_accuracy"),
            spread(runs, "eval_loss_after"),
            spread(runs, "peak_memory_gib", ".2f"),
        ]
        for name, runs in runs_of(experiment).items()
    ]


def peaks() -> list[Row]:
    """Peak memory at rank 8: a row for each pack length and activation checkpointing, a column for each of the bits."""
    peak = {
        name: f"{runs[0]['figures']['peak_memory_gib']:.2f}" for name, runs in runs_of("memory_grid").items() if runs
    }
    return [
        [f"{length:,}", "yes" if checkpointing == "true" else "no"]
        + [peak[f"length{length}-8-bits{bits}-{checkpointing}"] for bits in (4, 8, 16)]
        for length in (1024, 4096, 16384)
        for checkpointing in ("true", "false")
    ]


def recipes() -> list[Row]:
    runs = {run["recipe"]: run for run in record("recipes_h200")["runs"]}
    return [
        [
            f"`{name}`",
            f"{run['layers']}" + ("" if run["whole"] else " (fewer)"),
            run["attn_implementation"],
            f"{run['fused_linears']} of {run['adapted_linears']}",
            f"{run['peak_memory_gib']:.1f}",
        ]
        for name, run in sorted(runs.items())
        if run["exit_code"] == 0
    ]
