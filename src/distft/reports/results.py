"""What a run gave: its figures, by which names and in which form, and reading them from its folder. No torch.

read_run(RunFolder(Path("runs/a"))).figures["tokens_per_second"]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distft.config.yaml import parse_yaml
from distft.errors import RunFolderError
from distft.evaluation.summary import columns
from distft.reports.bottleneck import Split
from distft.reports.comparability import DATA, WEIGHTS
from distft.runs.folder import RunFolder


@dataclass(frozen=True)
class Figure:
    """A column: the key of a run's figures, its title with the unit, how it is written, and whether it is a speed, says how well a
    task is solved (`quality`), or counts by tokens, so that it means something else with another tokenizer (`per_token`)."""

    key: str
    title: str
    form: str
    speed: bool = False
    compared: bool = True
    quality: bool = False
    per_token: bool = False


FIGURES = (
    Figure("steps", "steps", ",.0f", compared=False),
    Figure("measured_steps", "steps measured", ",.0f", compared=False),
    Figure("samples", "samples", ",.0f", compared=False),
    Figure("tokens", "tokens", ",.0f", compared=False),
    Figure("train_loss", "mean train loss", ",.4f", per_token=True),
    Figure("final_loss", "last train loss", ",.4f", per_token=True),
    Figure("eval_loss_before", "eval loss before", ",.4f", compared=False),
    Figure("eval_loss_after", "eval loss after", ",.4f", per_token=True),
    Figure("perplexity_before", "perplexity before", ",.2f", compared=False),
    Figure("perplexity_after", "perplexity after", ",.2f", per_token=True),
    Figure("imdb_accuracy", "IMDB accuracy", ",.3f", quality=True),
    Figure("imdb_f1", "IMDB F1", ",.3f", quality=True),
    Figure("mt_bench_score", "MT-Bench, of 10", ",.2f", quality=True),
    Figure("alpaca_win_rate", "AlpacaEval won by grades", ",.3f", quality=True),
    Figure("alpaca_preferred_rate", "AlpacaEval won by preference", ",.3f", quality=True),
    Figure("train_time_s", "train time, s", ",.1f", speed=True),
    Figure("samples_per_second", "samples/s", ",.2f", speed=True),
    Figure("tokens_per_second", "tokens/s", ",.0f", speed=True, per_token=True),
    Figure("mfu", "MFU", ",.3f", speed=True),
    Figure("hfu", "HFU", ",.3f", speed=True),
    Figure("peak_memory_gib", "peak memory, GiB", ",.2f"),
    Figure("host_rss_gib", "host memory, GiB", ",.2f", compared=False),
    Figure("energy_j", "energy, J", ",.0f", speed=True),
    Figure("joules_per_sample", "J a sample", ",.2f", speed=True),
    Figure("joules_per_step", "J a step", ",.1f", compared=False),
    Figure("energy_idle_share", "idle share of energy", ".0%", compared=False),
    Figure("restarts", "restarts", ",.0f", compared=False),
)

TIMES = (
    Figure("step_time_s", "step, s", ",.3f"),
    Figure("data_wait_s", "data wait, s", ",.2f"),
    Figure("evaluation_time_s", "evaluation, s", ",.1f"),
    Figure("saving_time_s", "saving, s", ",.1f"),
)
"""Figures of a run that stand in a table of their own, beside the split of a step."""

_AS_RUN = (
    "strategy", "world_size", "steps", "skipped_steps", "samples", "tokens", "global_batch_size", "global_batch_tokens",
    "micro_batch", "micro_batch_tokens", "gradient_accumulation_steps", "checkpointed_layers", "attn_implementation",
    "trainable_parameters", "parameters",
)  # fmt: skip
_AS_EVALUATED = {"name": "model", "dtype": "dtype", "bits": "bits"}
_MACHINE = ("python", "cuda", "cpus", "packages", "gpus")


@dataclass(frozen=True)
class Run:
    """One run folder as read. `figures` has every key of FIGURES and TIMES, None where unknown; `split` is that of its profile; `facts` what it was made with: the
    recipe's values by their dotted keys, and under `as run.` and `machine.` what the summary and the environment say; `variant` is what its
    experiment calls its variant, empty where it is of none."""

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

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def outcome(self) -> str:
        """The status, or `out of memory`, which is a result as well: the run does not fit."""
        return outcome(self.status, self.cause)

    @property
    def recorded(self) -> bool:
        """Whether it has told how it was made. Of one that is not there, failed before it had a folder or is damaged, its recipe alone is known."""
        return self.world_size is not None or self.status == "evaluated"

    @classmethod
    def unread(cls, path: Path, status: str, cause: str | None, recipe: Mapping[str, Any]) -> Run:
        """One that is not `recorded`, with the values of the recipe that it was to be made with."""
        unknown = dict.fromkeys(figure.key for figure in (*FIGURES, *TIMES))
        return cls(path.name, str(path), status, cause, None, None, unknown, dict(leaves(recipe)))

    @property
    def asked(self) -> dict[str, Any]:
        """The part of `facts` that its recipe says."""
        return {key: value for key, value in self.facts.items() if not key.startswith(("as run.", "machine."))}


def outcome(status: str, cause: str | None) -> str:
    """How a run of this status and cause ended, as `Run.outcome` says it."""
    return "out of memory" if status == "failed" and (cause or "").startswith("OutOfMemory") else status


def read_run(folder: RunFolder) -> Run:
    """The run in `folder`, finished or not.

    Raises:
        RunFolderError: it is no run folder, or a file in it is damaged.
    """
    if folder.results.is_file() and not folder.summary.is_file():
        return _evaluated(folder)
    summary = folder.read_summary()
    recipe = _parsed(folder, folder.recipe.name, _whole_yaml)
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
    figures = {figure.key: summary.get(figure.key) for figure in (*FIGURES, *TIMES)} | counts | {
        "steps": steps, "final_loss": logged.get("loss"),
        "eval_loss_before": before.get("loss"), "eval_loss_after": after.get("loss"),
        "perplexity_before": before.get("perplexity"), "perplexity_after": after.get("perplexity"),
        **columns(summary.get("evaluation")),
    }  # fmt: skip
    status, cause = str(summary.get("status")), summary.get("cause")
    if status == "running" and not folder.is_held():  # SIGKILL and a lost machine leave no time to say so
        status, cause = (
            "killed",
            "no process writes to its folder any more; the command that started it goes on from the last checkpoint",
        )
    as_run = _AS_RUN if status == "finished" else ("strategy", "world_size")
    facts = dict(leaves(recipe)) | {f"as run.{key}": summary.get(key) for key in as_run}
    digests = {DATA: summary.get("data_digest"), WEIGHTS: summary.get("weights_digest")}
    facts |= {key: digest for key, digest in digests.items() if digest is not None}
    facts |= leaves({key: environment.get(key) for key in _MACHINE}, "machine.")
    return Run(
        folder.name, str(folder.path), status, cause, summary.get("strategy"),
        summary.get("world_size"), figures, facts, _split(folder), summary.get("evaluation") or {},
    )  # fmt: skip


def _evaluated(folder: RunFolder) -> Run:
    """A model that was evaluated as it came: `distft evaluate model=…` trains nothing, so there is no summary."""
    evaluation = _parsed(folder, folder.results.name, json.loads)
    figures = dict.fromkeys(figure.key for figure in (*FIGURES, *TIMES)) | columns(evaluation)
    made: Mapping[str, Any] = next(iter(evaluation.values()), {})
    facts = {f"model.{key}": (made.get("settings") or {}).get(name) for key, name in _AS_EVALUATED.items()}
    return Run(
        folder.name, str(folder.path), "evaluated", "nothing was trained here", None, None, figures,
        facts | {"adapter": made.get("adapter")}, None, evaluation,
    )  # fmt: skip


def _split(folder: RunFolder) -> Split | None:
    if not folder.profile.is_file():
        return None
    try:
        return Split.of_profile(json.loads(folder.profile.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder.profile} is damaged: {error!r}") from error


def _whole_yaml(text: str) -> Any:
    """YAML that was cut off may still be YAML."""
    if not text.endswith("\n"):
        raise ValueError("it is cut off within its last line")
    return parse_yaml(text)


def _parsed(folder: RunFolder, name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse((folder.path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder.path} holds no readable {name}: {error}") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{folder.path / name} holds no mapping")
    return content


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The values of nested mappings by their dotted keys."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
