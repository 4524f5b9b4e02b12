"""`distft.Run`: a run folder, its figures and its model."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

from distft.errors import RunFolderError
from distft.runs.folder import RunFolder

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distft.config.recipe import Recipe

_SHOWN = (
    "status",
    "cause",
    "recipe",
    "strategy",
    "world_size",
    "steps",
    "train_loss",
    "samples_per_second",
    "tokens_per_second",
    "peak_memory_gib",
    "train_time_s",
)


class Metrics(list[dict[str, Any]]):
    """The records of a run's log, oldest first: `metrics[-1]["loss"]` is the last loss, `metrics["loss"]` all of them.

    Records without a key (evaluations have no `loss`) are left out of its column. A null, which is how JSON has NaN, is
    NaN there.
    """

    @overload
    def __getitem__(self, which: str) -> list[Any]: ...
    @overload
    def __getitem__(self, which: SupportsIndex) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, which: slice) -> Metrics: ...
    def __getitem__(self, which: str | SupportsIndex | slice) -> Any:
        if isinstance(which, str):
            return [math.nan if record[which] is None else record[which] for record in self if which in record]
        if isinstance(which, slice):
            return Metrics(super().__getitem__(which))
        return super().__getitem__(which)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per record, one column per key."""
        import pandas

        return pandas.DataFrame(list(self))

    def _repr_html_(self) -> str:
        return str(self.to_pandas()._repr_html_())


class Run:
    """One run, finished or not: what its folder says, read anew each time.

    Args:
        path: the run folder, for example `runs/tiny`.

    Raises:
        RunFolderError: `path` is not a run folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder(Path(path))
        if not self.folder.summary.is_file():
            raise RunFolderError(f"{path} is not a run folder ({self.folder.summary.name} is missing)")

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def summary(self) -> dict[str, Any]:
        """Status, cause and every figure of the run (`summary.json`); None for what is unknown.

        Raises:
            RunFolderError: the file is damaged.
        """
        return self.folder.read_summary()

    @property
    def status(self) -> str:
        """`running`, `finished`, `interrupted` or `failed`."""
        return str(self.summary["status"])

    @property
    def metrics(self) -> Metrics:
        """The records that training logged (`metrics.jsonl`), each with its `step`."""
        return Metrics(self.folder.read_metrics())

    @property
    def faults(self) -> list[dict[str, Any]]:
        """Every time the run broke down: when, on which rank, after which step, and why. Oldest first."""
        return self.folder.read_faults()

    @property
    def evaluation(self) -> dict[str, Any]:
        """What `distft.evaluate` found (`evaluation.json`), by task; empty if nothing was evaluated."""
        if not self.folder.results.is_file():
            return {}
        return dict(json.loads(self.folder.results.read_text(encoding="utf-8-sig")))

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that the run was made with."""
        from distft.config.recipe import load_recipe

        return load_recipe([f"recipe={self.folder.recipe.absolute()}"])

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The trained model and its tokenizer, in evaluation mode and ready for `generate`.

        The base is loaded as it was for training (quantized or not), with the adapter on it; on the first GPU if there
        is one.

        Raises:
            RunFolderError: the run has no result yet.
            ModelError: the base or the adapter cannot be loaded, or they do not fit each other.
        """
        from distft.config.recipe import load_recipe
        from distft.data.named_templates import words_of_run
        from distft.models.loading import load_tokenizer
        from distft.models.saved_adapter import load_trained

        result = next((path for path in (self.folder.adapter, self.folder.model) if path.is_dir()), None)
        if result is None:
            raise RunFolderError(f"{self.path} has neither adapter/ nor model/: the run is {self.status}")
        recipe = load_recipe(words_of_run(self.folder.recipe, result))
        return load_trained(recipe, result), load_tokenizer(recipe)

    def __repr__(self) -> str:
        summary = self.summary
        parts = [str(self.path), str(summary["status"])]
        if summary["steps"] is not None:
            parts.append(f"{summary['steps']} steps")
        if summary["train_loss"] is not None:
            parts.append(f"loss {summary['train_loss']:.4f}")
        if summary["samples_per_second"] is not None:
            parts.append(f"{summary['samples_per_second']:,.1f} samples/s")
        return f"Run({', '.join(parts)})"

    def _repr_html_(self) -> str:
        summary = self.summary
        rows = [(key, summary[key]) for key in _SHOWN if summary[key] is not None]
        for key in ("eval_before", "eval_after"):
            if summary[key] is not None:
                rows.append((f"perplexity {key.removeprefix('eval_')}", summary[key]["perplexity"]))
        cells = "".join(
            f"<tr><th>{html.escape(key)}</th><td>{html.escape(_text(value))}</td></tr>" for key, value in rows
        )
        return f"<table><caption>{html.escape(str(self.path))}</caption>{cells}</table>"


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
