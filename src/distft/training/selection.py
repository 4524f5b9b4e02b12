"""What a run is judged by while it trains: the metric of the best checkpoint and of early stopping, and what is wrong
with the settings of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from distft.config.recipe import Recipe
from distft.config.validation import nearest
from distft.data.formats import format_of
from distft.distributed.strategies import Strategy
from distft.errors import Fault
from distft.runs.resume import FOLLOWS_EVALUATIONS, SELECTS
from distft.text import count

IMDB = "eval_imdb_"
"""The beginning of the metrics that classify the validation split's reviews."""
HIGHER_IS_BETTER = {"eval_loss": False, "eval_perplexity": False} | {
    f"{IMDB}{name}": True for name in ("accuracy", "f1", "macro_f1", "precision", "recall")
}
"""The metrics that an evaluation during training can have, by their keys in metrics.jsonl."""
CLASSES = "eval_classification_"
"""The beginning of the metrics that classify the texts in `evaluation.classification.validation`."""
HIGHER_IS_BETTER |= {f"{CLASSES}{name}": True for name in ("accuracy", "macro_f1")}
REWARDS = "eval_rewards/"
"""The beginning of the metrics over pairs of answers."""
HIGHER_IS_BETTER |= {f"{REWARDS}accuracies": True, f"{REWARDS}margins": True}
_TASKS = ("lm_eval", "mt_bench", "alpaca", "imdb_generation", "classification_generation", "generation")
"""Beginnings of the metrics that only `distft evaluate` measures: their answers are written or judged by a model."""


def selects(recipe: Recipe) -> bool:
    """Whether evaluations decide which model is saved, or when the run ends."""
    return any(recipe.training.get(key) for key in SELECTS)


def patience(recipe: Recipe) -> int | None:
    """The number of evaluations in a row without an improvement that end the run; None for any number."""
    found: int | None = recipe.training.get("early_stopping_patience")
    return found


def metric_of(recipe: Recipe) -> str:
    """The metric's key in metrics.jsonl, whether the recipe has it with `eval_` or without."""
    name = recipe.training.get("metric_for_best_model") or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def scores_reviews(recipe: Recipe) -> bool:
    """Whether evaluations during training classify reviews, or other texts."""
    return metric_of(recipe).startswith((IMDB, CLASSES)) and recipe.training.get("eval_strategy", "no") != "no"


def selection_arguments(recipe: Recipe) -> dict[str, Any]:
    """What transformers needs to find the best evaluation; distft loads its model and stops early by itself."""
    training = recipe.training
    if not (selects(recipe) or training.get("metric_for_best_model") or _follows(training)):
        return {}
    metric = metric_of(recipe)
    return {"metric_for_best_model": metric, "greater_is_better": HIGHER_IS_BETTER.get(metric)}


def selection_notes(recipe: Recipe) -> list[str]:
    """What the run will take for its result, and when it will stop, where evaluations decide about either."""
    if not selects(recipe):
        return []
    metric, best = _plain(metric_of(recipe)), recipe.training.get("load_best_model_at_end")
    result = f"the best evaluation by {metric}" if best else "the last step (training.load_best_model_at_end=false)"
    limit = patience(recipe)
    ends = "" if limit is None else f"; stops when {metric} has not improved for {count(limit, 'evaluation')}"
    return [f"saves the model of {result}{ends}"]


def selection_faults(recipe: Recipe, strategy: Strategy) -> Iterator[Fault]:
    """Settings of the best checkpoint and of early stopping that cannot work, or do not do what they say."""
    training, metric = recipe.training, metric_of(recipe)

    def fault(key: str, problem: str, hint: str) -> Fault:
        return Fault(recipe.source.of(f"training.{key}"), f"training.{key}", problem, hint)

    evaluates, best = training.get("eval_strategy", "no"), bool(training.get("load_best_model_at_end"))
    saves, key = training.get("save_strategy", "steps"), "load_best_model_at_end" if best else "early_stopping_patience"
    if metric not in HIGHER_IS_BETTER or not _fits(recipe, metric):
        yield _unknown(recipe, metric)
    elif metric.startswith(IMDB) and not _has_reviews(recipe):
        problem = f"{_plain(metric)} classifies the reviews of the validation split, and the data has no classes"
        yield fault("metric_for_best_model", problem, "name columns in data.format.review and data.format.label")
    elif metric.startswith(CLASSES) and (wrong := _validation_problem(recipe)):
        yield fault("metric_for_best_model", wrong, "evaluation.classification.validation=FILE")
    elif training.get("greater_is_better") not in (None, HIGHER_IS_BETTER[metric]):
        better = "higher" if HIGHER_IS_BETTER[metric] else "lower"
        yield fault("greater_is_better", f"a {better} {_plain(metric)} is better", "leave it out")
    elif _follows(training) and HIGHER_IS_BETTER[metric] != _expects_higher(training):
        problem = f"{training['lr_scheduler_type']} would take a better {_plain(metric)} for a worse one"
        yield fault("lr_scheduler_kwargs", problem, f"mode: {'max' if HIGHER_IS_BETTER[metric] else 'min'}")
    if evaluates == "no" and metric.startswith((IMDB, CLASSES)) and not selects(recipe):
        yield fault("metric_for_best_model", "there are no evaluations", "set training.eval_strategy=epoch")
    if training.get("early_stopping_threshold") and patience(recipe) is None:
        yield fault("early_stopping_threshold", "has no effect", "set training.early_stopping_patience")
    if not selects(recipe):
        return
    if evaluates == "no":
        hint = "set training.eval_strategy to steps or epoch, with a share of the data in data.validation_fraction"
        yield fault(key, "there are no evaluations to go by: training.eval_strategy is no", hint)
    elif best and saves == "no":
        yield fault(key, "there are no checkpoints: training.save_strategy is no", "use 'steps' or 'epoch'")
    elif evaluates == "epoch" and saves == "steps":
        problem = "the last step of an epoch is saved before its evaluation, which a run that resumes there would lack"
        yield fault("save_strategy", problem, "save and evaluate both by 'epoch', or evaluate by 'steps'")
    if best and training.get("save_only_model") and strategy.shards:
        problem = f"{strategy.title} loads a checkpoint only with the optimizer's state, and the best is loaded"
        yield fault("save_only_model", problem, "leave it out, or training.load_best_model_at_end=false")


def _unknown(recipe: Recipe, metric: str) -> Fault:
    key, name = "training.metric_for_best_model", _plain(metric)
    problem = f"an evaluation during training has no {name!r}"
    if name.startswith(_TASKS):
        problem = f"{name} is not measured during training: a model would have to write or judge answers"
    fitting = (each for each in HIGHER_IS_BETTER if _fits(recipe, each))
    missing = [name for name, there in _classified(recipe).items() if not there]
    names = [_plain(each) for each in fitting if not each.startswith(tuple(missing))]
    hint = "; ".join(filter(None, [nearest(name, names), f"it has {', '.join(names)}"]))
    return Fault(recipe.source.of(key), key, problem, hint)


def _classified(recipe: Recipe) -> dict[str, bool]:
    """The beginnings of the metrics of classifications, and whether the recipe has what they classify."""
    return {IMDB: _has_reviews(recipe), CLASSES: recipe.evaluation.classification.validation is not None}


def _validation_problem(recipe: Recipe) -> str | None:
    """What is wrong with the file that evaluations during training classify."""
    section = recipe.evaluation.classification
    if section.validation is None:
        return "classifies the texts of evaluation.classification.validation, which names no file"
    if section.validation == section.path:
        return "would decide by evaluation.classification.path, whose figures then say nothing of unseen texts"
    return None


def _fits(recipe: Recipe, metric: str) -> bool:
    """Whether evaluations of the recipe's objective measure this."""
    if metric == f"{REWARDS}accuracies" and recipe.rates:
        return False
    return metric == "eval_loss" or metric.startswith(REWARDS) == recipe.prefers


def _has_reviews(recipe: Recipe) -> bool:
    form = format_of(recipe.data)
    return form is not None and form.review is not None


def _follows(training: Mapping[str, Any]) -> bool:
    """Whether the learning-rate schedule goes by the metric."""
    return training.get("lr_scheduler_type") in FOLLOWS_EVALUATIONS


def _expects_higher(training: Mapping[str, Any]) -> bool:
    """Whether the learning-rate schedule takes higher values for better ones."""
    given = training.get("lr_scheduler_kwargs")
    with suppress(ValueError):  # transformers will say what is wrong with it
        given = json.loads(given) if isinstance(given, str) else given
    return isinstance(given, Mapping) and given.get("mode") == "max"


def _plain(metric: str) -> str:
    return metric.removeprefix("eval_")
