"""What is wrong with the data of a recipe: in its section, in the first rows of its files, and in prepared splits.

Nothing here imports torch. What only a full read finds is raised by `distft.data.prepare.prepare_data`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft.config.recipe import Recipe
from distft.config.schema import Data, DataSource
from distft.data.difficulty import check_difficulty_column, difficulty, difficulty_column
from distft.data.files import DataFile
from distft.data.formats import check_columns, format_of, format_rows, is_chat, kind_of
from distft.data.inference import with_format
from distft.data.named_templates import name_problem
from distft.data.pairs import wrong_samples
from distft.data.sources import (
    KNOWN_DATASETS,
    Rows,
    Source,
    data_sources,
    file_source,
    label_of,
    on_network,
    parts_of,
    read_source,
    remotes_of,
)
from distft.errors import DataError, Fault, RecipeError
from distft.text import count

if TYPE_CHECKING:
    from distft.data.prepare import Splits

_HEAD_FILES, _HEAD_ROWS = 20, 20
"""How many files of a folder, and rows of each, the quick check reads."""


def data_faults(recipe: Recipe) -> list[Fault]:
    """Find the mistakes in the data section that are visible without reading any data."""
    if found := _stream_faults(recipe):
        return found
    if recipe.data.sources is not None:
        return _mixture_faults(recipe) or _of_sources(recipe, data_faults)
    data = recipe.data

    def fault(key: str, *texts: str) -> None:
        found.append(Fault(recipe.source.of(key), key, *texts))

    for key in (key for key in ("name", "path", "test_path", "files") if getattr(data, key) in ("", [])):
        if key != "name" or not (data.path or data.files):
            fault(f"data.{key}", "is empty", "name a file or folder, or leave it out")
    if data.files and file_source(data) is None:
        hint = "set data.name=null to search from the working folder"
        fault("data.files", f"is searched in a local folder, and data.name={data.name} is none", hint)
    if found:
        return found
    found += _address_faults(recipe)
    if data.name not in KNOWN_DATASETS and data.format is None:
        file = file_source(data)
        if file is None:
            try:
                data_sources(data)
            except DataError as error:
                problem, _, remedy = str(error).partition("; ")
                fault("data.name", problem.removeprefix(f"data.name={data.name} "), remedy)
        elif isinstance(file, Path) and not file.exists():
            fault("data.name", f"there is no file or folder {file}")
    found += _template_faults(recipe)
    form = format_of(data)
    if form is not None:
        try:
            kind = kind_of(form)
        except DataError as error:
            fault("data.format", str(error))
            return found
        if (wrong := wrong_samples(recipe, form)) is not None:
            fault("data.format", *wrong)
        if kind == "text" and recipe.training.get("completion_only_loss"):
            fault(
                "training.completion_only_loss",
                "needs a completion, and data.format.text names whole texts",
                "set data.format.prompt and data.format.completion",
            )
        if is_chat(data) and recipe.training.get("completion_only_loss") is False and data.train_on != "all":
            fault("training.completion_only_loss", "does not say what is trained in conversations", "set data.train_on")
    if (file := file_source(data)) is not None:
        given = {"config": data.config, "test_split": data.test_split, "train_split": data.train_split != "train"}
        for key in (key for key, value in given.items() if value):
            fault(
                f"data.{key}",
                f"is for data on the hub, not for {file}",
                "name a held-out file with data.test_path",
            )
    elif data.test_path and data.test_split:
        fault("data.test_path", "and data.test_split both name the held-out rows", "set one of them to null")
    if data.validation_fraction + data.test_fraction >= 1:
        fault("data", "validation_fraction and test_fraction leave nothing to train on")
    return found


def _stream_faults(recipe: Recipe) -> list[Fault]:
    """What data.streaming does not do."""
    data, batching = recipe.data, recipe.batching
    if not data.streaming:
        if data.window == Data.model_fields["window"].default:
            return []
        problem, hint = "is for streamed data", "set data.streaming=true, or leave it out"
        return [Fault(recipe.source.of("data.window"), "data.window", problem, hint)]
    form, whole = format_of(data), "set data.streaming=false"
    problems: dict[str, tuple[bool, str, str]] = {
        "data.sources": (data.sources is not None, "cannot be streamed: a mixture has to know its sizes", whole),
        "data.order": (data.order != "shuffled", "orders all samples, and a stream has no end", "set it to shuffled"),
        "data.deduplicate": (data.deduplicate, "has to know all rows, and streamed data are read as they come", whole),
        "data.max_samples": (data.max_samples is not None, "draws from all rows", f"{whole}, or data.max_samples=null"),
        "data.name": (
            data.sources is None and file_source(data) is None,
            "is on the hub, and only files are streamed",
            "set data.files=hf://datasets/ORGANISATION/NAME/PATTERN, with data.name=null",
        ),
        "data.format": (form is not None and form.review is not None, "reviews with labels are not streamed", whole),
        "training.max_steps": (
            recipe.training.get("max_steps", -1) <= 0,
            "is required with data.streaming: the stream has no end",
            "set it to the number of optimizer steps",
        ),
        "batching.global_batch_tokens": (
            batching.global_batch_size is None,
            "needs the lengths of all samples",
            "set batching.global_batch_size",
        ),
        "batching.micro_batch": (
            recipe.micro_batch_is_auto,
            "auto measures the longest samples, and a stream may bring longer ones",
            "set a number",
        ),
        "training.max_length": (
            batching.micro_batch_tokens is not None and recipe.training.get("max_length", 1024) is None,
            "must limit the samples of a stream that is packed",
            f"set it to at most batching.micro_batch_tokens={batching.micro_batch_tokens}",
        ),
        "data.window": (
            batching.global_batch_size is not None and data.window < batching.global_batch_size,
            f"{data.window:,} samples are less than batching.global_batch_size={batching.global_batch_size}",
            "raise it",
        ),
    }
    return [Fault(recipe.source.of(key), key, *texts) for key, (wrong, *texts) in problems.items() if wrong]


def _address_faults(recipe: Recipe) -> list[Fault]:
    """Addresses that cannot be read here, whatever the server says."""
    try:
        sources = data_sources(recipe.data)
    except DataError:
        return []  # reported by itself
    found = []
    for key, source in zip(_keys(recipe), sources, strict=False):
        problems = (problem for remote in remotes_of(source) if (problem := remote.missing_package()))
        found += [Fault(recipe.source.of(key), key, *problem) for problem in problems]
    return found


def _mixture_faults(recipe: Recipe) -> list[Fault]:
    """What is wrong with data.sources as a whole."""
    data, found = recipe.data, []
    assert data.sources is not None

    def fault(key: str, problem: str, hint: str) -> None:
        found.append(Fault(recipe.source.of(key), key, problem, hint))

    if not data.sources:
        fault("data.sources", "is empty", "list sources, or set it to null")
    for key in ("name", "path", "files", "config", "test_split", "test_path", "format", "max_samples"):
        if getattr(data, key) not in (None, ""):
            hint = f"set data.{key}=null" + ("; a source takes `samples`" if key == "max_samples" else "")
            fault(f"data.{key}", "and data.sources both say what to train on", hint)
    labels = [label_of(source) for source in data.sources]
    for label in [label for label, times in Counter(labels).items() if times > 1]:
        fault("data.sources", f"has two sources called {label}", "give each a `label` of its own")
    if 0 < sum(source.weight is not None for source in data.sources) < len(data.sources):
        without = next(label_of(source) for source in data.sources if source.weight is None)
        fault("data.sources", f"has weights, but none for {without}", "give each source a weight, or none")
    elif both := [source for source in data.sources if source.weight is not None and source.samples is not None]:
        fault(
            "data.sources", f"has both a weight and samples for {label_of(both[0])}", "set one of them for all sources"
        )
    return found


def _of_sources(recipe: Recipe, check: Callable[[Recipe], list[Fault]]) -> list[Fault]:
    """What `check` finds for each source of a mixture, with the keys that the source has in the recipe."""
    found = []
    for number, part in enumerate(parts_of(recipe.data).values()):
        alone = recipe.model_copy(update={"data": part})
        for fault in check(alone):
            name = fault.key.removeprefix("data.")
            own = name.partition(".")[0] in DataSource.model_fields and name != fault.key
            found.append(replace(fault, key=f"data.sources.{number}.{name}") if own else fault)
    return list(dict.fromkeys(found))


def _template_faults(recipe: Recipe) -> list[Fault]:
    """Faults of the keys that only concern conversations."""
    data, form, found = recipe.data, format_of(recipe.data), []
    name = data.chat_template
    if name is not None and (problem := name_problem(name)):
        found.append(Fault(recipe.source.of("data.chat_template"), "data.chat_template", problem))
    if form is not None and (form.text or form.review) and name is not None:
        problem = "is for conversations, instructions and prompts, and has no effect on the texts of this format"
        found.append(Fault(recipe.source.of("data.chat_template"), "data.chat_template", problem, "set it to null"))
    if form is not None and not is_chat(data) and not form.prompt:
        for key in ("train_on", "train_on_end_of_turn", "truncation"):
            if getattr(data, key) != Data.model_fields[key].default:
                problem, hint = "is for conversations, and these are texts", "set data.chat_template, or leave it out"
                found.append(Fault(recipe.source.of(f"data.{key}"), f"data.{key}", problem, hint))
    return found


def data_file_faults(recipe: Recipe) -> list[Fault]:
    """Find the mistakes that the local files and their first rows show: paths, formats of files, columns, types.

    Reads only the heads of files. What is on the hub is not checked.
    """
    if data_faults(recipe):
        return []  # reported by that check; the files cannot be read without a valid section
    if recipe.data.sources is not None:
        return _of_sources(recipe, data_file_faults)
    found: list[Fault] = []
    try:
        sources = data_sources(recipe.data)
    except DataError as error:
        return [_fault(recipe, "data.name", error)]
    for key, source in zip(_keys(recipe), sources, strict=False):
        if not on_network(source):
            try:
                _check_head(recipe, source)
            except DataError as error:
                found.append(_fault(recipe, key, error))
    if not found and isinstance(sources[0], Path):
        try:
            _check_difficulties(recipe, sources[0])
        except DataError as error:
            found.append(_fault(recipe, "data.order", error))
    return found


def needs_tokenizer(recipe: Recipe) -> bool:
    """Whether `format_findings` may find anything: local data in a format that is inferred, or that a chat template
    renders."""
    return any(
        (source := file_source(data)) is not None
        and not on_network(source)
        and (is_chat(data) or (form := format_of(data)) is None or bool(form.prompt))
        for data in parts_of(recipe.data).values()
    )


def format_findings(recipe: Recipe, tokenizer: Any) -> tuple[list[Fault], list[str]]:
    """Find what the format and the first row of local data lack of the tokenizer: a chat template that renders them.

    Returns the faults, and what was inferred of the formats that the recipe does not name; nothing if
    `data_file_faults` finds something, which comes first.
    """
    found: list[Fault] = []
    told: list[str] = []
    if data_file_faults(recipe):
        return found, told
    for label, data in parts_of(recipe.data).items():
        source = file_source(data)
        if source is None or on_network(source):
            continue
        try:
            named, what = with_format(recipe.model_copy(update={"data": data}), tokenizer)
            rows = read_source(source)
        except DataError:
            continue
        try:
            next(format_rows(rows, named, 1, tokenizer), None)
        except DataError as error:
            found.append(_fault(recipe, "data.chat_template", error))
        else:
            told += [f"{label}: {what}" if label else what] if what else []
    return found, told


def require_files(recipe: Recipe) -> None:
    """Do what `data_file_faults` does, before anything slow is done for the data, such as loading a tokenizer.

    Raises:
        RecipeError: all that it finds.
    """
    if found := data_file_faults(recipe):
        raise RecipeError(found)


def split_faults(recipe: Recipe, splits: Splits) -> list[Fault]:
    """Find the splits that the recipe evaluates on and that have no rows."""
    data, found = recipe.data, []
    if recipe.training.get("eval_strategy", "no") != "no" and splits.validation is None:
        rows, key = count(sum(splits.report.rows.values()), "row"), "data.validation_fraction"
        problem = f"{data.validation_fraction:g} of {rows} leaves no row to evaluate on during training"
        hint = "raise it, give more rows, or set training.eval_strategy=no data.validation_fraction=0"
        found.append(Fault(recipe.source.of(key), key, problem, hint))
    if recipe.evaluation.before_and_after and splits.test is None:
        named = [key for key in ("test_path", "test_split") if getattr(data, key)]
        if named or data.test_fraction > 0:
            key = f"data.{(named or ['test_fraction'])[0]}"
            hint = "give more rows, or set evaluation.before_and_after=false"
            found.append(
                Fault(recipe.source.of(key), key, "leaves no row to evaluate on before and after training", hint)
            )
    if recipe.evaluation.samples.number and splits.test is None and not found:
        key, hint = "evaluation.samples", "set data.test_fraction, data.test_path or data.test_split"
        found.append(Fault(recipe.source.of(key), key, "has no held-out split to take prompts from", hint))
    return found


def require_splits(recipe: Recipe, splits: Splits) -> None:
    """Check that what the recipe evaluates on has rows.

    Raises:
        RecipeError: a split is empty.
    """
    if found := split_faults(recipe, splits):
        raise RecipeError(found)


def _keys(recipe: Recipe) -> tuple[str, str]:
    """The keys that name the two sources."""
    data = recipe.data
    return "data.files" if data.files else "data.path" if data.path else "data.name", "data.test_path"


def _fault(recipe: Recipe, key: str, error: DataError) -> Fault:
    problem, _, remedy = str(error).partition("\n")
    return Fault(recipe.source.of(key), key, problem, " ".join(remedy.split()))


def _check_head(recipe: Recipe, source: Source) -> None:
    rows = read_source(source)
    quick = [part for part in rows.parts[:_HEAD_FILES] if isinstance(part, DataFile) and part.has_quick_head()]
    if format_of(recipe.data) is None:
        if file_source(recipe.data) is None or not quick:
            return  # inferring the format would read rows that are slow to get
        recipe, _ = with_format(recipe)
    head = Rows(rows.name, quick)
    check_columns(head, recipe.data)
    if len(quick) == len(rows.parts) and not any(True for _ in format_rows(head, recipe, _HEAD_ROWS)):
        raise DataError(f"{source} is empty")


def _check_difficulties(recipe: Recipe, source: Path) -> None:
    """Check the column that data.order names, in the heads of the files to train on."""
    column = difficulty_column(recipe.data)
    if column is None:
        return
    quick = [part for part in read_source(source).parts[:_HEAD_FILES] if isinstance(part, DataFile)]
    quick = [part for part in quick if part.has_quick_head()]
    check_difficulty_column(Rows(str(source), quick), recipe.data)
    for part in quick:
        for number, row in enumerate(itertools.islice(part, _HEAD_ROWS), 1):
            try:
                difficulty(row, column)
            except DataError as error:
                raise DataError(f"{part.name}, row {number}: {error}") from None
