"""The report of an experiment as a W&B run of its own, in the group of the experiment's runs."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from distft.config.schema import Tracking
from distft.console import say
from distft.reports.report import Report
from distft.reports.results import SHOWN
from distft.reports.sections import comparison_table, time_table
from distft.runs.wandb import WANDB_FINISH_S, has_wandb_key

_INIT_S = 30.0
"""How long to wait for the W&B server before going on without it."""


def variant_table(report: Report) -> tuple[list[str], list[list[Any]]]:
    """Column names and rows: the medians of the finished runs as numbers, and what bounds each variant (None if
    unknown)."""
    known = [figure for figure in SHOWN if any(variant.spreads[figure.key] for variant in report.variants)]
    rows = []
    for variant in report.variants:
        spreads = [variant.spreads[figure.key] for figure in known]
        medians = [None if spread is None else spread.median for spread in spreads]
        rows.append([variant.name, variant.finished, *medians, None if variant.bound is None else variant.bound.kind])
    return ["variant", "finished", *(figure.title for figure in known), "bound"], rows


def log_report(report: Report, name: str, section: Tracking, parent: Path) -> bool:
    """Log the verdict and the tables of the report on the experiment `name`; return whether that succeeded.

    Logs online if there is an API key, otherwise offline in `parent`/wandb/. A failure prints one line and never stops
    the report.
    """
    try:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_MODE", "online" if has_wandb_key() else "offline")
        if os.environ["WANDB_MODE"] == "disabled":
            return False
        parent.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=section.project,
            entity=section.entity,
            group=section.group or name,
            tags=section.tags or None,
            name=f"{name}-report",
            job_type="report",
            dir=str(parent),
            id=uuid.uuid4().hex[:8],
            config={"experiment": name, "runs": [each.name for each in report.runs]},
            settings=wandb.Settings(init_timeout=_INIT_S, finish_timeout=WANDB_FINISH_S),
        )
    except Exception as error:  # whatever a tracker raises must not cost the report
        say(f"warning: the report is not in W&B ({type(error).__name__}: {error})")
        return False
    try:
        columns, rows = variant_table(report)
        tables = {"variants": wandb.Table(columns=columns, data=rows)}
        texts = {"where the time goes": time_table(report)}
        if report.comparisons:
            texts["comparison"] = comparison_table(report)
        tables |= {key: wandb.Table(columns=table.heads, data=table.texts) for key, table in texts.items()}
        run.log(tables)
        run.summary["verdict"] = report.verdict
        folder = Path(run.dir).parent
        run.finish()
    except Exception as error:  # as above
        say(f"warning: the report is incomplete in W&B ({type(error).__name__}: {error})")
        with suppress(Exception, SystemExit):
            wandb.teardown()
        return False
    if run.settings.mode == "offline":
        say(f"the report was logged to W&B offline; sync it with: wandb sync {os.path.relpath(folder)}")
    return True
