"""Whether an evaluation can be made: all that can be known before a model is loaded or a run is trained, and all of it at once.

Files are read as the tasks will read them, lm-eval's tasks with their documents, the judge's folder or its place in the cache is looked
at, and its server is asked whether it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from huggingface_hub import constants

from distft.config.recipe import Recipe
from distft.data.formats import check_columns, data_faults
from distft.data.sources import data_sources, read_source
from distft.errors import DataError, Fault, UserError
from distft.evaluation import checks
from distft.evaluation.engines import openai as endpoint
from distft.evaluation.judge import as_recipe, rubric_of
from distft.evaluation.tasks import lm_eval, reviews
from distft.evaluation.tasks.alpaca import read_pairs
from distft.evaluation.tasks.mt_bench import read_questions
from distft.hub import missing_model


def faults(recipe: Recipe) -> list[Fault]:
    """What the tasks of `recipe.evaluation` lack, besides the base and the data that the recipe trains on; none where it names no task.

    Reads files, and the caches of the hub's clients; where the hub can be reached, what it has of benchmarks is fetched here.
    """
    settings = recipe.evaluation
    found = checks.faults(recipe)
    if not settings.tasks:
        return found
    disable_progress_bar()

    def look(task: str, key: str, read: Callable[[], object]) -> None:
        """Read what stands under `key`, unless it is known already that nothing is there."""
        known = {f"evaluation.{task}", f"evaluation.{key}"} & {fault.key for fault in found}
        if task in settings.tasks and not known:
            found.extend(_told(recipe, f"evaluation.{key}", read))

    look("mt_bench", "mt_bench.questions", lambda: read_questions(Path(settings.mt_bench.questions or "")))
    look("alpaca", "alpaca.path", lambda: read_pairs(Path(settings.alpaca.path or "")))
    look("imdb", "imdb" if settings.imdb.path is None else "imdb.path", lambda: _reviews(recipe))
    look("lm_eval", "lm_eval.tasks", lambda: lm_eval.look(settings.lm_eval))
    if {"mt_bench", "alpaca"} & set(settings.tasks):
        found.extend(_judge(recipe))
    return found


def faults_of_base(recipe: Recipe) -> list[Fault]:
    """What is lacking of the base itself, and of the rows that the recipe holds out where its perplexity is taken."""
    found = [
        Fault(recipe.source.of("model.name"), "model.name", line) for line in missing_model(recipe, hub=_is_offline())
    ]
    if "perplexity" in recipe.evaluation.tasks and not data_faults(recipe):
        disable_progress_bar()
        found += _told(recipe, "data", lambda: _held_out(recipe))
    return found


def _judge(recipe: Recipe) -> Iterator[Fault]:
    judge = recipe.evaluation.judge
    yield from _told(recipe, "evaluation.judge.rubric", lambda: rubric_of(judge))
    if judge.endpoint is not None:
        key, lines = "evaluation.judge.endpoint", endpoint.unreachable(judge)
        hint = "start it first, and give its base URL, http://HOST:PORT/v1"
    else:
        key, lines = (
            "evaluation.judge.model",
            missing_model(as_recipe(recipe, judge), " (the judge)", hub=_is_offline()),
        )
        hint = (
            "or give a folder that it lies in, or evaluation.judge.endpoint=http://HOST:PORT/v1 of a server that has it"
        )
    yield from (Fault(recipe.source.of(key), key, line, hint) for line in lines)


def _reviews(recipe: Recipe) -> None:
    words, positive = reviews.words_of(recipe), recipe.evaluation.imdb.positive
    if positive >= len(words):
        raise DataError(
            f"positive={positive} is no class: the label words ({', '.join(words)}) are 0 to {len(words) - 1}"
        )
    reviews.chosen(recipe, reviews.load(recipe, len(words)), len(words))


def _held_out(recipe: Recipe) -> None:
    sources = data_sources(recipe.data)
    if len(sources) == 1 and recipe.data.test_fraction == 0:
        raise DataError(
            "the recipe holds out no rows to take the perplexity of; set data.test_fraction, or data.test_path"
        )
    for source in sources:
        name = str(source) if isinstance(source, Path) else source.name
        check_columns(read_source(source).column_names, recipe.data, name)


def _told(recipe: Recipe, key: str, read: Callable[[], object]) -> list[Fault]:
    """The user's mistake that `read` raises, as a fault of `key`."""
    try:
        read()
    except UserError as error:
        problem, _, remedy = str(error).partition("\n")
        return [Fault(recipe.source.of(key), key, problem, " ".join(remedy.split()))]
    return []


def _is_offline() -> bool:
    """Whether what is not in the cache cannot be had; the hub's clients read it once, when they are imported."""
    return constants.HF_HUB_OFFLINE
