"""Reads run folders: the figures of a run, and the facts about how it was made. Imports no torch.

read_run(RunFolder(Path("runs/a"))).figures["tokens_per_second"]
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.config.files import leaves
from distft.config.yaml import parse_yaml
from distft.errors import RunFolderError
from distft.evaluation.summary import columns
from distft.reports.bottleneck import Split
from distft.runs.figures import FIGURES
from distft.runs.folder import RunFolder
from distft.runs.samples import Samples
from distft.runs.selection import selection_lines
from distft.stats import Estimate

SHOWN = tuple(figure for figure in FIGURES if figure.label and not figure.timing)
"""The figures in the tables of runs and variants."""
TIMES = tuple(figure for figure in FIGURES if figure.timing)
"""The figures in the table of where the time goes."""
LABELS = {figure.key: figure.label for figure in FIGURES}

DATA, HELD_OUT, WEIGHTS = (f"as run.{what}_digest" for what in ("data", "held_out", "weights"))
"""Facts that identify the texts and the base weights by content: file names say nothing about later writes."""

NOT_THERE = "missing"
"""Status of a run that an experiment expects and of which nothing is known."""
DAMAGED = "damaged"
"""Status of a run whose folder cannot be read."""

_KILLED = (
    "no process writes to its folder any more; start it again with the same command to resume from the last checkpoint"
)
_AS_EVALUATED = {"name": "model", "dtype": "dtype", "bits": "bits"}
_MACHINE = ("python", "cuda", "cpus", "packages", "gpus")


@dataclass(frozen=True)
class Spread:
    """A figure of a variant over its finished runs: median, smallest and largest value, and the number of runs.

    NaN if it is NaN in a run, which then has no place among the others.
    """

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        found = known(values)
        if any(map(math.isnan, found)):  # without it, the others would pass for all
            return cls(math.nan, math.nan, math.nan, len(found))
        return cls(statistics.median(found), min(found), max(found), len(found)) if found else None


def known(values: Iterable[float | None]) -> list[float]:
    """The values that are known."""
    return [value for value in values if value is not None]


@dataclass(frozen=True)
class Run:
    """A run folder as read.

    `figures` has every key of SHOWN and TIMES, None if unknown. `split` comes from the profile. `facts` says how the
    run was made: the recipe's values by their dotted keys and, under `as run.` and `machine.`, values of the summary
    and the environment. `variant` is the experiment's name for its variant, empty outside an experiment.
    """

    name: str
    path: str
    status: str
    cause: str | None
    strategy: str | None
    world_size: int | None
    figures: Mapping[str, float | None]
    facts: Mapping[str, Any] = field(repr=False)
    split: Split | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict, repr=False)
    variant: str = ""
    overlap: Mapping[str, int] = field(default_factory=dict)
    """How many samples of `validation` and `test` were trained on, where training counted them."""
    selection: tuple[str, ...] = ()
    """Which evaluation was the best, and whether it ended the run, in words."""
    samples: Samples | None = field(default=None, repr=False)
    """Held-out prompts and the answers to them."""
    evaluated: tuple[tuple[int, float | None, float], ...] = field(default=(), repr=False)
    """Step, seconds of training before, and loss of each evaluation during training. Runs of older versions did not
    record the seconds."""
    pairs: int = 0
    """The held-out pairs that `reward_accuracy` is a share of."""

    @property
    def reward_accuracy(self) -> Estimate | None:
        """The share of held-out pairs with the higher reward for the chosen answer; None if unknown."""
        share = self.figures["reward_accuracy"]
        return None if share is None else Estimate.proportion(share, self.pairs)

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def outcome(self) -> str:
        """The status, or `out of memory`, which is a result too: the run does not fit."""
        return outcome(self.status, self.cause)

    @property
    def recorded(self) -> bool:
        """Whether the run recorded how it was made. If it failed before it had a folder or is damaged, only its recipe
        is known."""
        return self.world_size is not None or self.status == "evaluated"

    @classmethod
    def unread(cls, path: Path, status: str, cause: str | None, recipe: Mapping[str, Any]) -> Run:
        """A run that is not `recorded`, with the values of its recipe."""
        return cls(path.name, str(path), status, cause, None, None, _no_figures(), dict(leaves(recipe)))

    @property
    def asked(self) -> dict[str, Any]:
        """The `facts` that come from its recipe."""
        return {key: value for key, value in self.facts.items() if not key.startswith(("as run.", "machine."))}


def outcome(status: str, cause: str | None) -> str:
    """How a run with this status and cause ended (see `Run.outcome`)."""
    return "out of memory" if status == "failed" and (cause or "").startswith("OutOfMemory") else status


def read_run(folder: RunFolder) -> Run:
    """Read the run in `folder`, finished or not.

    Raises:
        RunFolderError: `folder` is not a run folder, or a file in it is damaged.
    """
    if folder.results.is_file() and not folder.summary.is_file():
        return _evaluated(folder)
    summary = folder.read_summary()
    recipe = _parsed(folder, folder.recipe.name, _complete_yaml)
    environment = _parsed(folder, folder.environment.name, json.loads) if folder.environment.is_file() else {}
    try:
        metrics = folder.read_metrics()
    except ValueError as error:
        raise RunFolderError(f"{folder.metrics} is damaged: {error}") from error
    status, cause = str(summary.get("status")), summary.get("cause")
    if status == "running" and not folder.is_held():  # SIGKILL and a lost machine leave no time to record the end
        status, cause = "killed", _KILLED
    return Run(
        name=folder.name,
        path=str(folder.path),
        status=status,
        cause=cause,
        strategy=summary.get("strategy"),
        world_size=summary.get("world_size"),
        figures=_figures(summary, metrics),
        facts=_facts(status, summary, recipe, environment),
        split=_split(folder),
        evaluation=summary.get("evaluation") or {},
        overlap=summary.get("held_out_overlap") or {},
        selection=tuple(selection_lines(summary)),
        samples=_samples(folder),
        pairs=int((summary.get("eval_after") or {}).get("pairs") or 0),
        evaluated=tuple(
            (record["step"], record.get("time_s"), math.nan if record["eval_loss"] is None else record["eval_loss"])
            for record in metrics
            if "eval_loss" in record
        ),
    )


def _figures(summary: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    logged: dict[str, float | None] = {}
    for record in metrics:
        logged |= {key: value for key, value in record.items() if value is not None}
        if "loss" in record and record["loss"] is None:  # NaN, which JSON lacks
            logged["loss"] = math.nan
    found = _no_figures() | columns(summary.get("evaluation"))
    for figure in (*SHOWN, *TIMES):
        if figure.path is not None:
            section, key = figure.path
            found[figure.key] = _measured(summary.get(section) or {}, key)
        elif figure.task is None:
            value = summary.get(figure.key)
            # The summary has no figures before the run has finished; the log says how far it came.
            found[figure.key] = logged.get(figure.logged) if value is None and figure.logged else value
    return found


def _measured(losses: Mapping[str, Any], key: str) -> float | None:
    """A value of `eval_before` or `eval_after`. JSON has null for a loss that is NaN, and for a perplexity that
    overflows."""
    value: float | None = losses.get(key)
    if value is not None or key not in losses:
        return value
    return math.nan if losses.get("loss") is None else math.inf


def _facts(
    status: str, summary: Mapping[str, Any], recipe: Mapping[str, Any], environment: Mapping[str, Any]
) -> dict[str, Any]:
    finished = status == "finished"
    as_run = [
        figure.key for figure in FIGURES if figure.fact and (finished or figure.key in ("strategy", "world_size"))
    ]
    facts = dict(leaves(recipe)) | {f"as run.{key}": summary.get(key) for key in as_run}
    digests = {key: summary.get(key.removeprefix("as run.")) for key in (DATA, HELD_OUT, WEIGHTS)}
    facts |= {key: digest for key, digest in digests.items() if digest is not None}
    return facts | dict(leaves({key: environment.get(key) for key in _MACHINE}, "machine."))


def _evaluated(folder: RunFolder) -> Run:
    """A model evaluated as it is: `distft evaluate model=…` trains nothing and writes no summary."""
    evaluation = _parsed(folder, folder.results.name, json.loads)
    made: Mapping[str, Any] = next(iter(evaluation.values()), {})
    facts = {f"model.{key}": (made.get("settings") or {}).get(name) for key, name in _AS_EVALUATED.items()}
    return Run(
        name=folder.name,
        path=str(folder.path),
        status="evaluated",
        cause="nothing was trained",
        strategy=None,
        world_size=None,
        figures=_no_figures() | columns(evaluation),
        facts=facts | {"adapter": made.get("adapter")},
        evaluation=evaluation,
    )


def _no_figures() -> dict[str, float | None]:
    return dict.fromkeys(figure.key for figure in (*SHOWN, *TIMES))


def _samples(folder: RunFolder) -> Samples | None:
    try:
        return Samples.read(folder)
    except ValueError as error:
        raise RunFolderError(str(error)) from error


def _split(folder: RunFolder) -> Split | None:
    if not folder.profile.is_file():
        return None
    try:
        return Split.of_profile(json.loads(folder.profile.read_text(encoding="utf-8-sig")))
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder.profile} is damaged: {error!r}") from error


def _complete_yaml(text: str) -> Any:
    """Parse YAML. A file that was cut off may still parse, so the end of the last line is checked."""
    if not text.endswith("\n"):
        raise ValueError("it is cut off within its last line")
    return parse_yaml(text)


def _parsed(folder: RunFolder, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse((folder.path / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder.path} has no readable {name}: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{folder.path / name} is not a mapping")
    return content
