"""Settings of the best checkpoint and of early stopping that cannot work are faults before any weight is loaded."""

from __future__ import annotations

import pytest

from distft.config.recipe import load_recipe
from distft.distributed.strategies.selection import strategy_for
from distft.distributed.world import World
from distft.runs.resume import differences
from distft.training.selection import selection_arguments, selection_faults, selection_notes

BEST, EARLY = "load_best_model_at_end=true", "early_stopping_patience=2"
STEPS = ("eval_strategy=steps", "save_strategy=steps")


def found(*words: str, recipe: str = "tiny", strategy: str = "ddp") -> list[str]:
    """The faults of a recipe with overrides of its training section, on two processes."""
    loaded = load_recipe([f"recipe={recipe}", f"strategy={strategy}", *(f"training.{word}" for word in words)])
    return [str(fault) for fault in selection_faults(loaded, strategy_for(loaded, World(world_size=2), False))]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((BEST, "eval_strategy=no"), "load_best_model_at_end: there are no evaluations to go by"),
        ((EARLY, "eval_strategy=no"), "early_stopping_patience: there are no evaluations to go by"),
        ((BEST, "save_strategy=no"), "load_best_model_at_end: there are no checkpoints"),
        ((BEST, "save_strategy=steps"), "save_strategy: the last step of an epoch is saved before its evaluation"),
        ((EARLY, "save_strategy=steps"), "save_strategy: the last step of an epoch is saved before its evaluation"),
        (("metric_for_best_model=eval_los",), "has no 'los' (did you mean loss?; it has loss, perplexity)"),
        ((BEST, "metric_for_best_model=mt_bench_score"), "mt_bench_score is not measured during training"),
        ((BEST, "metric_for_best_model=imdb_accuracy"), "the data has no classes (name columns in data.format.review"),
        ((BEST, "metric_for_best_model=loss", "greater_is_better=true"), "greater_is_better: a lower loss is better"),
        (("early_stopping_threshold=0.1",), "early_stopping_threshold: has no effect"),
        (
            ("lr_scheduler_type=reduce_lr_on_plateau", "lr_scheduler_kwargs={mode: max}"),
            "reduce_lr_on_plateau would take a better loss for a worse one (mode: min)",
        ),
    ],
)
def test_what_cannot_work_is_one_fault(words: tuple[str, ...], message: str) -> None:
    (fault,) = found(*words)
    assert message in fault


@pytest.mark.parametrize("strategy", ["fsdp", "zero2", "zero3"])
def test_weights_without_the_optimizer_cannot_be_loaded_where_it_is_sharded(strategy: str) -> None:
    (fault,) = found(BEST, "save_only_model=true", strategy=strategy)
    assert "training.save_only_model: " in fault and "loads a checkpoint only with the optimizer's state" in fault
    assert found(BEST, "save_only_model=true") == []


@pytest.mark.parametrize(
    "words",
    [
        (BEST,),  # both by epoch
        (BEST, EARLY, *STEPS, "eval_steps=30", "save_steps=100"),  # every new best is saved, wherever saves are due
        (BEST, "eval_strategy=steps", "save_strategy=epoch", "greater_is_better=false"),
        (BEST, "metric_for_best_model=eval_perplexity"),
        (EARLY, "save_strategy=no", "early_stopping_threshold=0.01"),
        ("eval_strategy=no",),
    ],
)
def test_what_works_has_no_fault(words: tuple[str, ...]) -> None:
    assert found(*words) == []


def test_the_check_says_what_will_be_saved() -> None:
    def notes(*words: str) -> list[str]:
        return selection_notes(load_recipe(["recipe=tiny", *(f"training.{word}" for word in words)]))

    assert notes() == []
    assert notes(BEST) == ["saves the model of the best evaluation by loss"]
    assert notes(EARLY) == [
        "saves the model of the last step (training.load_best_model_at_end=false); stops when loss has not improved "
        "for 2 evaluations"
    ]


def test_a_lower_perplexity_is_better() -> None:
    """transformers takes every metric whose name does not end in `loss` for one that should rise."""
    recipe = load_recipe(["recipe=tiny", f"training.{BEST}", "training.metric_for_best_model=perplexity"])
    assert selection_arguments(recipe) == {"metric_for_best_model": "eval_perplexity", "greater_is_better": False}
    assert selection_arguments(load_recipe(["recipe=tiny"])) == {}


def test_a_run_that_evaluations_decide_about_resumes_only_with_the_same_evaluations() -> None:
    def changed(*words: str) -> list[str]:
        old = load_recipe(["recipe=tiny", *words])
        new = load_recipe(["recipe=tiny", *words, "training.eval_strategy=steps", "training.eval_steps=5"])
        return [line.partition(":")[0] for line in differences(old.model_dump(), new.model_dump())]

    assert changed() == []
    for decides in (BEST, EARLY):
        assert changed(f"training.{decides}") == ["training.eval_strategy", "training.eval_steps"]


def test_a_task_s_metric_is_for_data_that_has_classes() -> None:
    def here(*words: str) -> list[str]:
        return found("eval_strategy=epoch", "save_strategy=epoch", *words, recipe="tiny_sentiment")

    accuracy, plateau = "metric_for_best_model=imdb_accuracy", "lr_scheduler_type=reduce_lr_on_plateau"
    assert here(BEST, accuracy) == here(plateau, accuracy, "lr_scheduler_kwargs={mode: max}") == []
    (fault,) = here(BEST, "metric_for_best_model=accuracy")
    assert "has no 'accuracy' (did you mean imdb_accuracy?; it has loss, perplexity, imdb_accuracy, " in fault
    (fault,) = here(BEST, "metric_for_best_model=imdb_generation_accuracy")
    assert "is not measured during training: a model would have to write or judge answers" in fault
    (fault,) = here("eval_strategy=no", accuracy)
    assert "metric_for_best_model: there are no evaluations" in fault
    (fault,) = here(plateau, accuracy)
    assert "would take a better imdb_accuracy for a worse one (mode: max)" in fault
