"""What can be known about a run before its weights are loaded: `distft check`, and the first thing that a run does.

There are three phases. `load_recipe` finds what is wrong with the values themselves. `check_files` looks at files and
folders, and takes milliseconds. `check_settings` builds what the recipe describes, without weights, and needs torch.

Each check is a function in the package that it concerns, and returns all the faults that it finds. This module calls
them and adds what the user wants to know before a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from distft.config.adapter import adapter_faults
from distft.config.recipe import Recipe
from distft.data.checks import data_file_faults, format_findings, needs_tokenizer, split_faults
from distft.data.sources import HubSplit, data_sources, on_network
from distft.distributed.collectives import broadcast, together
from distft.distributed.world import World
from distft.errors import Fault, RecipeError, UserError
from distft.runs.checks import folder_faults
from distft.text import count

if TYPE_CHECKING:
    from distft.models.checks import Expected

T = TypeVar("T")


@dataclass(frozen=True)
class Findings:
    """What checks have found: `faults`, and lines for the user.

    `checked` names what is right, `skipped` what could not be checked and why, `run` what the run will be. `expected`
    is what its model will be, if that is known.
    """

    faults: tuple[Fault, ...] = ()
    checked: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    run: tuple[str, ...] = ()
    expected: Expected | None = None

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.faults + other.faults,
            self.checked + other.checked,
            self.skipped + other.skipped,
            self.run + other.run,
            self.expected or other.expected,
        )

    def require(self) -> None:
        """Raises RecipeError with all faults, if there are any."""
        if self.faults:
            raise RecipeError(list(dict.fromkeys(self.faults)))

    def lines(self) -> list[str]:
        """One line per finding, for a recipe without faults."""
        groups = (("ok", self.checked), ("not checked", self.skipped), ("run", self.run))
        return [f"{name:<12} {line}" for name, lines in groups for line in lines]


def check_files(recipe: Recipe, working_folder: Path) -> Findings:
    """Look at the files and folders that the recipe names. Imports no torch."""
    data, folder = data_file_faults(recipe), folder_faults(recipe, working_folder)
    start = adapter_faults(recipe)
    sources, _ = attempt(recipe, "data.name", lambda: data_sources(recipe.data))  # what it raises is among the faults
    away = [source for source in sources or () if on_network(source)]
    checked = {"data files": data or away, "run folder": folder}
    if recipe.adapter is not None:
        checked["saved adapter"] = start
    return Findings(
        faults=(*data, *folder, *start),
        checked=tuple(what for what, faults in checked.items() if not faults),
        skipped=tuple(
            f"the data {source}, which is at an address: --deep reads it"
            if not isinstance(source, HubSplit)
            else f"the data {source.name}, which is on the hub: --deep reads it"
            for source in dict.fromkeys(away)
        ),
    )


def check_settings(
    recipe: Recipe, processes: int, working_folder: Path, *, local_only: bool = True, on_gpu: bool | None = None
) -> Findings:
    """Build what the recipe describes, without weights and data, as one of `processes` processes will build it.

    `local_only`: ask nothing of the hub. `on_gpu`: whether the run will have GPUs (None: if this machine has).
    """
    from distft.models.checks import model_faults
    from distft.models.loading import load_tokenizer
    from distft.training.checks import training_faults, weights_notes
    from distft.training.disk import disk_findings
    from distft.training.selection import selection_notes

    _, divides = attempt(recipe, "batching.micro_batch", lambda: recipe.check_division(processes))
    model = model_faults(recipe, local_only=local_only)
    settings = training_faults(recipe, processes, on_gpu=on_gpu)
    checked = {"global batch": divides, "training settings, optimizer and schedule": settings}
    if not model.skipped:
        checked["model, tokenizer and adapter"] = model.faults
    found = Findings(
        faults=(*divides, *model.faults, *settings),
        checked=tuple(what for what, faults in checked.items() if not faults),
        skipped=tuple(model.skipped),
        run=(*model.notes, *weights_notes(recipe), *selection_notes(recipe), *_order(recipe)),
    )
    if not (model.skipped or model.faults) and needs_tokenizer(recipe):
        faults, told = format_findings(recipe, load_tokenizer(recipe))
        found += Findings(faults=tuple(faults), run=tuple(f"data: {line}" for line in told))
    expected = model.expected
    if expected is not None and not found.faults:
        needed, fault = disk_findings(recipe, expected.trainable, working_folder)
        found += Findings(faults=tuple(fault), run=(*expected.lines(recipe), needed), expected=expected)
    return found


def _order(recipe: Recipe) -> list[str]:
    data = recipe.data
    if data.order == "shuffled":
        return []
    scores = "; the base scores each training sample once, before the run" if data.order == "loss" else ""
    return [f"an epoch goes from easy to hard by {data.order}, in {count(data.stages, 'stage')}{scores}"]


def check_data(recipe: Recipe, processes: int) -> Findings:
    """Read and tokenize the data, which is cached for the run, and plan its batches."""
    from distft.data.curriculum import known_stages
    from distft.data.prepare import prepare_data
    from distft.data.splits import lengths_of
    from distft.models.loading import load_tokenizer
    from distft.training.reviews import ValidationReviews
    from distft.training.schedule import order_notes, total_steps

    tokenizer, missing = attempt(recipe, "model.name", lambda: load_tokenizer(recipe))
    if missing:  # `check_settings` has said why, and whether it is a fault
        return Findings(skipped=("the rows of the data, which need the tokenizer",))
    splits, faults = attempt(recipe, "data", lambda: prepare_data(recipe, tokenizer))
    if splits is None or (faults := split_faults(recipe, splits)):
        return Findings(faults=tuple(faults))
    _, faults = attempt(recipe, "training.metric_for_best_model", lambda: ValidationReviews.of(recipe, tokenizer))
    if faults:
        return Findings(faults=tuple(faults))
    if recipe.micro_batch_is_auto:
        return Findings(checked=("every row of the data",), run=tuple(splits.report.lines()))
    stages = known_stages(recipe.data, lengths_of(splits.train), splits.difficulties)
    plan = splits.plan(recipe.run.seed, recipe.batching, stages)
    epochs = recipe.epochs(plan.steps)
    accumulation, faults = attempt(
        recipe, "batching.micro_batch_tokens", lambda: plan.accumulation(processes, min(epochs, 2))
    )
    steps = count(total_steps(recipe, plan.steps), "step")
    size = recipe.batching.global_batch_size
    batch = f"{recipe.batching.global_batch_tokens:,} tokens" if size is None else count(size, "sample")
    work = (
        f"{steps} of {batch}, {plan.steps:,} an epoch, on {count(processes, 'process')} × {accumulation} accumulation"
    )
    return Findings(
        faults=tuple(faults),
        checked=("every row of the data", "batches"),
        run=(*splits.report.lines(), *order_notes(recipe, plan.steps), work),
    )


def check_together(recipe: Recipe, world: World, working_folder: Path) -> Expected | None:
    """Check a run in its processes, before they load anything. Rank 0 looks; all ranks enter, and all raise or return
    what to expect of the model.

    Raises:
        RecipeError: all faults at once.
    """

    def look() -> Expected | None:
        if not world.is_main:
            return None
        found = check_files(recipe, working_folder)
        found += check_settings(recipe, world.world_size, working_folder, local_only=False)
        found.require()
        return found.expected

    return broadcast(together(world, look), world)


def attempt(recipe: Recipe, key: str, work: Callable[[], T]) -> tuple[T | None, list[Fault]]:
    """The result of `work`; or None and the faults of the UserError that it raised, at `key` unless it names others."""
    try:
        return work(), []
    except RecipeError as error:
        return None, list(error.faults)
    except UserError as error:
        return None, [Fault(recipe.source.of(key), key, str(error))]
