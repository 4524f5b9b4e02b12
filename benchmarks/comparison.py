"""Medians, spreads and ratios of the runs of the throughput benchmark, and a Markdown table of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = (
    "samples_per_second",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "peak_memory_gb",
    "watts",
    "joules_per_1000_samples",
    "seconds",
)
Runs = Sequence[Mapping[str, Any]]


def compare(runs: Runs, pairs: Mapping[str, Sequence[str]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The figures of each name (median, min, max of its finished runs), and each case against its references."""
    names = dict.fromkeys(run["name"] for run in runs)
    finished = {name: [run for run in runs if run["name"] == name and run["exit_code"] == 0] for name in names}
    summary = {
        name: {
            "runs": len(finished[name]),
            "failed": [run["failure"] for run in runs if run["name"] == name and run["exit_code"] != 0],
            **{figure: _spread([run[figure] for run in finished[name]]) for figure in FIGURES},
        }
        for name in names
    }
    comparisons = [
        _comparison(case, reference, finished[case], finished[reference])
        for case, references in pairs.items()
        for reference in references
        if finished.get(case) and finished.get(reference)
    ]
    return summary, comparisons


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known)}


def _comparison(case: str, reference: str, ours: Runs, theirs: Runs) -> dict[str, Any]:
    """Ratios case ÷ reference: of the medians, and their spread over the repeats that ran both.

    `same_work`: in every step that any finished run of either reports, it processed the planned samples and tokens.
    """
    expected = ours[0]["expected"]
    per_step = [statistics.mean(run["tokens"] / run["samples"] for run in runs) for runs in (ours, theirs)]
    by_repeat = {run["repeat"]: run for run in theirs}
    both = [(run, by_repeat[run["repeat"]]) for run in ours if run["repeat"] in by_repeat]
    ratios = {}
    for figure in ("samples_per_second", "tokens_per_second"):
        medians = [statistics.median(run[figure] for run in runs) for runs in (ours, theirs)]
        ratios[figure] = {
            "of_medians": medians[0] / medians[1],
            **(_spread([run[figure] / other[figure] for run, other in both]) or {}),
        }
    return {
        "case": case,
        "reference": reference,
        "same_work": all(expected.get(step) == done for run in [*ours, *theirs] for step, done in run["work"].items()),
        "tokens_of_a_sample": per_step,
        "ratio": ratios,
    }


def table(record: Mapping[str, Any]) -> str:
    """Two Markdown tables: the figures of each name, and the ratios."""
    head = ("", "samples/s", "tokens/s", "MFU", "peak GB", "peak GiB", "W", "J / 1,000 samples")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, summary in record["summary"].items():
        if not summary["runs"]:
            lines.append(f"| {name} | {summary['failed'][0]} | | | | | | |")
            continue
        cells = (
            _cell(summary["samples_per_second"], ",.1f"),
            _cell(summary["tokens_per_second"], ",.0f"),
            _cell(summary["mfu"], ".3f"),
            _cell(summary["peak_memory_gb"], ".1f"),
            _cell(summary["peak_memory_gib"], ".1f"),
            _cell(summary["watts"], ",.0f"),
            _cell(summary["joules_per_1000_samples"], ",.0f"),
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "| case | reference | samples/s | tokens/s | same samples and tokens in every step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for pair in record["comparisons"]:
        samples, tokens = (
            f"× {ratio['of_medians']:.2f}{_range(ratio, '.2f')}"
            for ratio in (pair["ratio"]["samples_per_second"], pair["ratio"]["tokens_per_second"])
        )
        if not pair["same_work"]:  # samples differ in length, so only tokens can be compared
            samples = "–"
        lines.append(
            f"| {pair['case']} | {pair['reference']} | {samples} | {tokens} | {'yes' if pair['same_work'] else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def _cell(spread: Mapping[str, float] | None, form: str) -> str:
    return "–" if spread is None else f"{spread['median']:{form}}{_range(spread, form)}"


def _range(spread: Mapping[str, float], form: str) -> str:
    return (
        f" ({spread['min']:{form}}–{spread['max']:{form}})"
        if "min" in spread and spread["min"] != spread["max"]
        else ""
    )
