"""The file of an experiment: its fields, and finding and reading one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError

from distft.config.files import is_yaml, read_yaml, yaml_files
from distft.config.schema import Section
from distft.config.validation import COMMAND_LINE, SECTIONS, Source, faults_of, nearest
from distft.errors import ExperimentError, Fault, RecipeError
from distft.paths import packaged
from distft.reports.comparability import LOSS_TOLERANCE

Equal = Literal["samples", "order", "global_batch", "tokens", "base_weights", "loss"]


class Budget(Section):
    """How long every run trains, in exactly one of these units."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps (training.max_steps)."""
    samples: int | None = Field(None, ge=1)
    """Samples (training.max_steps): a whole number of global batches, within one epoch, whose last batch is smaller."""
    tokens: int | None = Field(None, ge=1)
    """Tokens (training.max_steps), if the global batch is counted in tokens; rounded down to whole steps.

    A step has whole samples, so its tokens, and those of the budget, are approximate."""
    minutes: float | None = Field(None, gt=0)
    """Minutes of training (run.train_time), after which a run ends with its result.

    The runs then train on different numbers of samples, so declare only what is still equal."""


class ExperimentFile(Section):
    """The file of an experiment. `variants` or `grid` says how its runs differ."""

    base: str | None = None
    """The recipe to vary: a name, or a path relative to this file."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Changes that apply to every run, as nested mappings or `key.path: value`."""
    variants: dict[str, dict[str, Any] | None] = Field(default_factory=dict)
    """The name of each variant and what it changes. `recipe` replaces `base`. `adapter` may name a variant before it:
    the run trains on from that variant's run of the same repeat."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """Axes to combine: `key.path: [values]`, or the name of an axis with a mapping of names to what they change."""
    repeats: int = Field(1, ge=1)
    """How often each variant runs. Repeats take turns, so drift of the machine affects every variant equally."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(default_factory=list)
    """The seed (run.seed) of each repeat, in place of `repeats`. The splits follow from it, too."""
    budget: Budget | None = None
    """How long every run trains. Default: as its recipe says."""
    equal: list[Equal] = Field(default_factory=list)
    """What must be equal in all runs for their speeds to be compared."""
    loss_tolerance: float = Field(LOSS_TOLERANCE, gt=0)
    """If loss must be equal, the largest deviation from the first variant's loss, as a fraction of it."""
    target_loss: Annotated[float, Field(gt=0)] | Literal["worst"] | None = None
    """Report the steps and the time to the first evaluation with at most this loss, in nats. `worst`: the worst last
    one of all finished runs, which each of them reaches."""


def list_experiments(folder: Path) -> dict[str, Path]:
    """Every experiment by name. Those in `folder`/recipes/experiments hide shipped ones of the same name."""
    found: dict[str, Path] = {}
    for place in (folder / "recipes" / "experiments", packaged("recipes/experiments")):
        for path in yaml_files(place):
            found.setdefault(path.stem, path)
    return found


def find_experiment(wanted: str, folder: Path) -> Path:
    """The file of the experiment `wanted`, which is a name or a path.

    Raises:
        ExperimentError: it does not exist.
    """
    known = list_experiments(folder)
    if wanted in known:
        return known[wanted]
    is_path = "/" in wanted or is_yaml(wanted)
    if is_path and (path := folder / Path(wanted).expanduser()).is_file():
        return path
    problem = (
        f"there is no file {wanted}" if is_path else f"there is no experiment {wanted!r}" if wanted else "is missing"
    )
    hint = "" if is_path else nearest(wanted, known) or f"there are: {', '.join(known)}"
    raise ExperimentError([Fault(COMMAND_LINE, "experiment", problem, hint)])


def read_experiment(path: Path, faults: list[Fault]) -> ExperimentFile:
    """The content of the file without its faulty keys. Their faults are added to `faults`.

    Raises:
        ExperimentError: the file cannot be read, or is not a YAML mapping.
    """
    try:
        tree = read_yaml(path)
    except RecipeError as error:
        raise ExperimentError(error.faults) from error
    fields = list(ExperimentFile.model_fields)
    for key in [key for key in tree if key not in fields]:
        of_recipe = key in (*SECTIONS, "strategy", "lora", "training") or "." in str(key)
        hint = "recipe values go under overrides, variants or grid" if of_recipe else nearest(str(key), fields)
        faults.append(Fault(str(path), str(key), "unknown key", hint or f"there are: {', '.join(fields)}"))
        del tree[key]
    try:
        return ExperimentFile.model_validate(tree)
    except ValidationError as error:
        source = Source(path.stem, (path,), dict.fromkeys(tree, str(path)))
        for fault in faults_of(error, source):
            key, names = (
                fault.key.partition(".")[0],
                {"budget": list(Budget.model_fields), "equal": list(get_args(Equal))},
            )
            hint = nearest(_word_at(tree, fault), names.get(key, ()))
            faults.append(Fault(fault.where, fault.key, fault.problem, hint))
        wrong = {str(item["loc"][0]) for item in error.errors()}
        return ExperimentFile.model_validate({key: value for key, value in tree.items() if key not in wrong})


def _word_at(tree: Any, fault: Fault) -> str:
    """What the user wrote at the place of a fault: the item of a list, else the last key."""
    *_, above, leaf = ("", *fault.key.split("."))
    return str(tree[above][int(leaf)]) if leaf.isdigit() and isinstance(tree.get(above), list) else leaf
