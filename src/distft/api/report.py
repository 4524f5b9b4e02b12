"""`distft.report`: one report over run folders and training logs, as Markdown, JSON or a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distft.api.run import Run
from distft.console import say
from distft.errors import RunFolderError, StorageError
from distft.files import to_json, write_atomically
from distft.reports.history import History, distinct, find_log
from distft.reports.html import histories, page
from distft.reports.markdown import markdown
from distft.reports.report import report as report_on_folders
from distft.reports.report import spell
from distft.runs.folder import RunFolder
from distft.text import shorten

if TYPE_CHECKING:
    from distft.reports.report import Report as ReportOnRuns

_NAMES_IN_TITLE = 3


@dataclass(frozen=True)
class Report:
    """A report over runs (`runs`), over training logs of other programs (`logs`), or both.

    Each `to_…` method returns the text. With a path it also writes the text there, replacing the file in one step.
    """

    runs: ReportOnRuns | None
    logs: tuple[History, ...] = ()

    @property
    def title(self) -> str:
        if self.runs is not None:
            return self.runs.title
        names = [log.name for log in self.logs]
        return shorten(names, _NAMES_IN_TITLE, " and ")

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The report as Markdown tables.

        Raises:
            StorageError: `path` cannot be written.
        """
        return _written(markdown(self.runs, self.logs, self.title), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON: every figure of every run, the comparison and its verdict.

        Raises:
            StorageError: `path` cannot be written.
        """
        content = {"title": self.title} if self.runs is None else json.loads(self.runs.to_json())
        if self.logs:
            content["logs"] = [
                {
                    "name": log.name,
                    "path": str(log.source),
                    "unread": log.unread,
                    "infinite": log.infinite,
                    "diverged_from_step": log.diverged,
                    "not_finite": dict(log.not_finite),
                    "figures": spell(log.final),
                }
                for log in self.logs
            ]
        return _written(to_json(content) + "\n", path)

    def to_html(self, path: str | Path | None = None) -> str:
        """The report as one self-contained page with charts.

        Raises:
            MissingExtraError: matplotlib is not installed.
            StorageError: `path` cannot be written.
        """
        of_runs = [] if self.runs is None else histories(self.runs)
        return _written(page(self.title, [*of_runs, *self.logs], self.runs), path)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def report(runs: Sequence[Run | str | Path]) -> Report:
    """A report over finished and unfinished runs, and over `trainer_state.json` files of other programs.

    Paths that are neither are skipped with a message, unless nothing is left: `runs/*` also matches reports and logs.

    Raises:
        RunFolderError: a path does not exist, or none of them is a run or a log.
    """
    folders, logs = _find(runs)
    return Report(report_on_folders(folders) if folders or not logs else None, tuple(distinct(logs)))


def _find(runs: Sequence[Run | str | Path]) -> tuple[list[RunFolder], list[History]]:
    folders, logs, skipped = [], [], []
    for path in (run.path if isinstance(run, Run) else Path(run) for run in runs):
        folder, log = RunFolder(path), find_log(path)
        try:
            if folder.summary.is_file() or folder.results.is_file():
                folders.append(folder)
            elif log is not None:
                logs.append(History.of_log(log))
            else:
                raise RunFolderError(f"{path} contains neither a run's summary.json nor a trainer_state.json")
        except RunFolderError as error:
            if not path.exists():
                raise
            skipped.append(error)
    if skipped and not folders and not logs:
        raise skipped[0]
    for why in skipped:
        say(f"skipped: {why}")
    return folders, logs


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        try:
            write_atomically(Path(path), text)
        except OSError as error:
            raise StorageError(f"the report cannot be written to {path}: {error.strerror}") from error
    return text
