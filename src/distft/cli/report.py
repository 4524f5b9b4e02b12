"""`distft report`: one report over runs, an experiment, or the training logs of other programs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distft.api.recipe import load_experiment
from distft.cli.arguments import Commands, is_experiment
from distft.console import say

if TYPE_CHECKING:
    from distft.api.report import Report


def add_to(commands: Commands) -> None:
    parser = commands.add_parser("report", help="write one report over finished and unfinished runs")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="RUN",
        help="run folders or trainer_state.json files; or experiment=NAME and key.path=value overrides",
    )
    parser.add_argument("--output", type=Path, help="file to write: .md, .json or .html (default: print Markdown)")
    parser.add_argument("--json", action="store_true", help="JSON instead of Markdown")
    parser.set_defaults(run=report)


def report(options: argparse.Namespace) -> None:
    from distft.api.report import Report, report
    from distft.experiments.results import report_on, track

    words: list[str] = options.overrides
    experiment = load_experiment(words) if is_experiment(words) else None
    made = report(words) if experiment is None else Report(report_on(experiment))
    output: Path | None = options.output
    if made.runs is None and output is None and not options.json:  # a log is best read as charts
        output = made.logs[0].source.with_suffix(".html") if made.logs[0].source else None
    kind = ".json" if options.json else ".md" if output is None else output.suffix
    if output is None:
        print(made.to_json() if kind == ".json" else made.to_markdown(), end="")
    else:
        _write(made, output, kind)
    if experiment is not None and made.runs is not None:
        track(experiment, made.runs)


def _write(report: Report, output: Path, kind: str) -> None:
    """Write the report to `output`. A page also gets a Markdown and a JSON file of the same name."""
    kinds = {output: kind}
    if kind == ".html":
        read = [log.source for log in report.logs]
        others = _replaceable([output.with_suffix(suffix) for suffix in (".md", ".json")], read)
        kinds |= {path: path.suffix for path in others}
    render = {".html": report.to_html, ".json": report.to_json}
    for path, suffix in kinds.items():
        render.get(suffix, report.to_markdown)(path)
    print("report: " + ", ".join(map(str, kinds)))


def _replaceable(paths: Sequence[Path], read: Sequence[Path | None]) -> list[Path]:
    """Those of `paths` that are free or hold a distft report. The user named none of them, so nothing else is replaced.

    Files in `read`, which the report is about, are left alone without a message.
    """
    found = []
    for path in paths:
        if not path.exists() or _is_report(path):
            found.append(path)
        elif path not in read:
            say(f"{path} is not a distft report and was left as it is")
    return found


def _is_report(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text) if path.suffix == ".json" else None
    except (OSError, ValueError):
        return False
    if path.suffix == ".md":
        return text.startswith("# ") and any(f"\n## {part}\n" in text for part in ("Runs", "Logs"))
    return isinstance(content, dict) and "title" in content and bool({"verdict", "logs"} & content.keys())
