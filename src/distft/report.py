"""Run folders to one report: what each run gave, what was equal, and which differences stand out of the spread.

report([RunFolder(Path("runs/a")), RunFolder(Path("runs/b"))]).to_json(); markdown.py writes it as Markdown.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from distft.errors import RunFolderError
from distft.evaluation.columns import columns
from distft.run import RunFolder, to_json
from distft.yaml12 import parse_yaml

LOSS_TOLERANCE = 0.01
"""Losses of two variants that are further apart than this share of the first one's are not equal."""

ROUNDING = 1e-4
"""Figures that all lie within this share of each other are equal: strategies round sums in different orders."""

_NAMES_OF_A_RUN = ("run.name", "run.dir", "run.resume", "run.force", "tracking.")
"""What makes no difference to what a run does."""


@dataclass(frozen=True)
class Figure:
    """A column: the key of a run's figures, its title with the unit, how it is written, and whether it is a speed. `asked`: no run
    has it that was not evaluated for it."""

    key: str
    title: str
    form: str
    speed: bool = False
    compared: bool = True
    asked: bool = False


FIGURES = (
    Figure("steps", "steps", ",.0f", compared=False),
    Figure("samples", "samples", ",.0f", compared=False),
    Figure("tokens", "tokens", ",.0f", compared=False),
    Figure("train_loss", "mean train loss", ",.4f"),
    Figure("final_loss", "last train loss", ",.4f"),
    Figure("eval_loss_before", "eval loss before", ",.4f", compared=False),
    Figure("eval_loss_after", "eval loss after", ",.4f"),
    Figure("perplexity_before", "perplexity before", ",.2f", compared=False),
    Figure("perplexity_after", "perplexity after", ",.2f"),
    Figure("imdb_accuracy", "IMDB accuracy", ",.3f", asked=True),
    Figure("imdb_f1", "IMDB F1", ",.3f", asked=True),
    Figure("mt_bench_score", "MT-Bench, of 10", ",.2f", asked=True),
    Figure("alpaca_win_rate", "AlpacaEval win rate", ",.3f", asked=True),
    Figure("train_time_s", "train time, s", ",.1f", speed=True),
    Figure("samples_per_second", "samples/s", ",.2f", speed=True),
    Figure("tokens_per_second", "tokens/s", ",.0f", speed=True),
    Figure("mfu", "MFU", ",.3f", speed=True),
    Figure("peak_memory_gib", "peak memory, GiB", ",.2f"),
    Figure("energy_j", "energy, J", ",.0f", speed=True),
    Figure("restarts", "restarts", ",.0f", compared=False),
)

EQUAL: dict[str, tuple[str, ...]] = {
    "samples": ("as run.samples", "as run.skipped_steps", "data.", "run.seed"),
    "order": ("data.", "run.seed"),
    "global_batch": ("as run.global_batch_size", "as run.global_batch_tokens"),
    "tokens": ("as run.tokens",),
    "base_weights": ("model.name", "model.revision", "model.dtype", "quantization", "quantization.load_",
                     "quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant", "quantization.llm_int8_"),
    "loss": (),
    "steps": ("as run.steps",),
    "seed": ("run.seed",),
}  # fmt: skip
"""What can be equal, and the facts that have to be for it, by the beginnings of their names; losses are compared instead."""

BY_DEFAULT: tuple[Literal["samples", "order", "global_batch"], ...] = ("samples", "order", "global_batch")
"""What must be equal for speeds to be compared, where nothing else is declared."""

_AS_RUN = (
    "strategy", "world_size", "steps", "skipped_steps", "samples", "tokens", "global_batch_size", "global_batch_tokens",
    "micro_batch", "micro_batch_tokens", "gradient_accumulation_steps", "checkpointed_layers", "attn_implementation",
    "trainable_parameters", "parameters",
)  # fmt: skip
_MACHINE = ("python", "cuda", "cpus", "packages", "gpus")


@dataclass(frozen=True)
class Run:
    """One run folder as read. `figures` has every key of FIGURES, None where unknown; `facts` what it was made with: the
    recipe's values by their dotted keys, and under `as run.` and `machine.` what the summary and the environment say."""

    name: str
    path: str
    status: str
    cause: str | None
    strategy: str | None
    world_size: int | None
    figures: Mapping[str, float | None]
    facts: Mapping[str, Any] = field(repr=False)
    evaluation: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class Spread:
    """A figure of a variant over its finished runs: median, least and greatest, and of how many."""

    median: float
    least: float
    greatest: float
    runs: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        return cls(statistics.median(known), min(known), max(known), len(known)) if known else None


@dataclass(frozen=True)
class Variant:
    """Runs of one recipe on the same number of processes and the same machine; `spreads` by the keys of FIGURES."""

    name: str
    runs: tuple[str, ...]
    finished: int
    spreads: Mapping[str, Spread | None]


@dataclass(frozen=True)
class Equality:
    """Whether `what` was equal in all finished runs, None where fewer than two finished; `unequal` has the facts that
    were not, each with its value in every variant."""

    what: str
    declared: bool
    equal: bool | None
    unequal: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """A variant beside the first, in one figure. `verdict`: `different` (their ranges are apart), `no difference` (they
    touch), `equal` (all but for rounding), `no spread` (fewer than two runs on a side) or `not compared` (`why` not)."""

    variant: str
    against: str
    figure: str
    ratio: float | None
    verdict: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """What `report` found; `differences` has every fact in which variants differ, with its value in each."""

    title: str
    runs: tuple[Run, ...]
    variants: tuple[Variant, ...]
    equality: tuple[Equality, ...]
    comparisons: tuple[Comparison, ...]
    differences: Mapping[str, Mapping[str, Any]]
    missing: tuple[str, ...]

    @property
    def evaluations(self) -> dict[str, Mapping[str, Any]]:
        """Of each run that was evaluated, what its tasks found."""
        return {run.name: run.evaluation for run in self.runs if run.evaluation}

    def to_json(self) -> str:
        """The report as a JSON object; a run's facts stand in its folder."""
        document = dataclasses.asdict(self)
        for run in document["runs"]:
            del run["facts"]
        return to_json(document) + "\n"


def report(
    folders: Sequence[RunFolder], *, title: str = "", equal: Sequence[str] = (), missing: Sequence[str] = ()
) -> Report:
    """The report on the runs in `folders`; the first is of the variant that the others are compared with.

    `equal` (keys of EQUAL) is what must be equal for speeds to be compared, `missing` the names of runs that should be there.

    Raises:
        RunFolderError: there are no folders, or one is no run folder or is damaged.
    """
    if not folders:
        wanted = (
            f"none of its {len(missing)} runs is there" if missing else "give the folders of runs, or experiment=NAME"
        )
        raise RunFolderError(f"{title or 'nothing to report on'}: {wanted}")
    runs = tuple(map(_read, {folder.path.resolve(): folder for folder in folders}.values()))
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_sameness(run), []).append(run)
    named = dict(zip(_labels([*groups.values()]), groups.values(), strict=True))
    variants = tuple(_variant(name, members) for name, members in named.items())
    done = {name: finished for name, members in named.items() if (finished := [run for run in members if run.finished])}
    declared = tuple(equal) or BY_DEFAULT
    first = next(iter(done), None)
    return Report(
        title=title or f"{len(runs)} run{'s' if len(runs) > 1 else ''}",
        runs=runs,
        variants=variants,
        equality=tuple(_equality(what, what in equal, done) for what in EQUAL),
        comparisons=tuple(
            comparison
            for name in done
            if first is not None and name != first
            for comparison in _compare(first, name, done, declared)
        ),
        differences=_differences(named),
        missing=tuple(missing),
    )


# Reading ----------------------------------------------------------------------------------------------------------------


def _read(folder: RunFolder) -> Run:
    summary = folder.read_summary()
    recipe = _parsed(folder, folder.recipe.name, parse_yaml)
    environment = _parsed(folder, folder.environment.name, json.loads) if folder.environment.is_file() else {}
    try:
        metrics = folder.read_metrics()
    except ValueError as error:
        raise RunFolderError(f"{folder.metrics} is damaged: {error}") from error
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    logged = {key: value for record in metrics for key, value in record.items() if value is not None}
    # Until a run has finished its summary has no figures; how far it came stands in its log.
    counts = {key: logged.get(key) if summary.get(key) is None else summary[key] for key in ("samples", "tokens")}
    steps = logged.get("step") if summary.get("steps") is None else summary["steps"]
    figures = {figure.key: summary.get(figure.key) for figure in FIGURES} | counts | {
        "steps": steps, "final_loss": logged.get("loss"),
        "eval_loss_before": before.get("loss"), "eval_loss_after": after.get("loss"),
        "perplexity_before": before.get("perplexity"), "perplexity_after": after.get("perplexity"),
        **columns(summary.get("evaluation")),
    }  # fmt: skip
    as_run = _AS_RUN if summary.get("status") == "finished" else ("strategy", "world_size")
    facts = dict(_leaves(recipe)) | {f"as run.{key}": summary.get(key) for key in as_run}
    facts |= _leaves({key: environment.get(key) for key in _MACHINE}, "machine.")
    return Run(
        folder.name, str(folder.path), str(summary.get("status")), summary.get("cause"), summary.get("strategy"),
        summary.get("world_size"), figures, facts, summary.get("evaluation") or {},
    )  # fmt: skip


def _parsed(folder: RunFolder, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse((folder.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder.path} holds no readable {name}: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{folder.path / name} holds no mapping")
    return content


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Variants ---------------------------------------------------------------------------------------------------------------


def _sameness(run: Run) -> str:
    """Equal for runs that are repeats of each other."""
    facts = {key: _word(value) for key, value in run.facts.items() if not key.startswith((*_NAMES_OF_A_RUN, "as run."))}
    return json.dumps([facts, run.strategy, run.world_size], sort_keys=True)


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """The shortest name in each group, or its folder where another group has that name as well."""
    shortest = [min(group, key=lambda run: len(run.name)) for group in groups]
    names = [run.name for run in shortest]
    return [run.name if names.count(run.name) == 1 else run.path for run in shortest]


def _variant(name: str, members: Sequence[Run]) -> Variant:
    done = [run for run in members if run.finished]
    spreads = {figure.key: Spread.of(run.figures[figure.key] for run in done) for figure in FIGURES}
    return Variant(name, tuple(run.name for run in members), len(done), spreads)


# What was equal, and what not -------------------------------------------------------------------------------------------


def _equality(what: str, declared: bool, done: Mapping[str, Sequence[Run]]) -> Equality:
    if sum(map(len, done.values())) < 2:
        return Equality(what, declared, None, {})
    unequal = _unequal_losses(done) if what == "loss" else _differences(done, EQUAL[what])
    return Equality(what, declared, not unequal, unequal)


def _differences(named: Mapping[str, Sequence[Run]], of: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Facts that are not the same in all runs, those that `of` names the beginnings of, each with its value in every
    variant: one, or a list where the repeats differ among themselves."""
    found: dict[str, dict[str, Any]] = {}
    for key in dict.fromkeys(key for members in named.values() for run in members for key in run.facts):
        if key.startswith(_NAMES_OF_A_RUN) if of is None else not _begins(key, of):
            continue
        # A recipe that says nothing says null; of a run that has not finished nothing is known.
        told = {name: [run.facts.get(key) for run in members if key in run.facts or not key.startswith("as run.")]
                for name, members in named.items()}  # fmt: skip
        if len({_word(value) for values in told.values() for value in values}) > 1:
            found[key] = {name: _one(values) for name, values in told.items() if values}
    return found


def _begins(key: str, of: Sequence[str]) -> bool:
    return any(key == start or (start.endswith((".", "_")) and key.startswith(start)) for start in of)


def _one(values: Sequence[Any]) -> Any:
    return values[0] if len({_word(value) for value in values}) == 1 else list(values)


def _word(value: Any) -> str:
    """One text for values that are equal: 0 and 0.0 are."""
    value = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(value, sort_keys=True, default=str)


def _unequal_losses(done: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
    found = {}
    for key in ("train_loss", "eval_loss_after"):
        spreads = {name: Spread.of(run.figures[key] for run in members) for name, members in done.items()}
        medians = {name: None if spread is None else spread.median for name, spread in spreads.items()}
        known = [median for median in medians.values() if median is not None]
        apart = max((abs(median - known[0]) for median in known), default=0.0)
        if known and (len(known) < len(medians) or apart > LOSS_TOLERANCE * abs(known[0])):
            found[key] = medians
    return found


def _compare(first: str, name: str, done: Mapping[str, Sequence[Run]], declared: Sequence[str]) -> list[Comparison]:
    """The variant `name` beside `first` in every figure; speeds only where what must be equal was."""
    pair = {key: done[key] for key in (first, name)}
    unequal = [what for what in declared if not _equality(what, True, pair).equal]
    found = []
    for figure in FIGURES:
        sides = [[run.figures[figure.key] for run in members] for members in pair.values()]
        ours, theirs = (Spread.of(side) for side in sides)
        if not figure.compared or ours is None or theirs is None:
            continue
        ratio = theirs.median / ours.median if ours.median else None
        verdict, why = judge(ours, theirs), ""
        if figure.speed and unequal:
            ratio, verdict, why = None, "not compared", f"not equal: {', '.join(unequal)}"
        found.append(Comparison(name, first, figure.key, ratio, verdict, why))
    return found


def judge(one: Spread, other: Spread) -> str:
    """Whether two variants differ in a figure, by the ranges of their runs."""
    least, greatest = min(one.least, other.least), max(one.greatest, other.greatest)
    if greatest - least <= ROUNDING * abs(greatest):
        return "equal"
    if one.runs < 2 or other.runs < 2:
        return "no spread"
    apart = one.greatest < other.least or other.greatest < one.least
    return "different" if apart else "no difference"


def verdict(report: Report) -> str:
    """The answer in one sentence: how fast each variant is beside the first, or why that is not said."""
    speeds = [item for item in report.comparisons if item.figure == "samples_per_second"]
    if not speeds:
        return "There is nothing to compare: fewer than two variants have finished runs that say how fast they were."
    told = []
    for item in speeds:
        if item.verdict == "different" and item.ratio:
            faster = item.ratio > 1
            told.append(
                f"{item.variant} is {item.ratio if faster else 1 / item.ratio:.2f} times as {'fast' if faster else 'slow'} as {item.against}"
            )
        elif item.verdict == "not compared":
            told.append(f"{item.variant} is not compared with {item.against} ({item.why})")
        elif item.verdict == "no spread":
            told.append(f"{item.variant} ran once or {item.against} did, so that a difference could be chance")
        else:
            told.append(f"{item.variant} is as fast as {item.against}, as far as the repeats can tell")
    return "; ".join(told) + "."
