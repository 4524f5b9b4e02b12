"""Classification of texts in a file of the user's, in the template that the model was trained with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from distft.config.evaluation import Evaluation
from distft.config.recipe import Recipe
from distft.data.labelled import file_of, prompts_of, read_labelled
from distft.distributed.collectives import together
from distft.evaluation.classify import Classified, classify
from distft.evaluation.sets import DataOf
from distft.evaluation.target import Target
from distft.evaluation.tasks import Task
from distft.evaluation.template import prompt_template

_KEY = "evaluation.classification"


class ClassificationTask(Task):
    """Classify the texts with both sides."""

    packages: ClassVar = {"sklearn": "scikit-learn"}

    def data(self, recipe: Recipe) -> DataOf | None:
        path = recipe.evaluation.classification.path
        return DataOf.at(file_of(path)) if path else None

    def reads(self, recipe: Recipe) -> Mapping[str, Callable[[], object]]:
        return {f"{_KEY}.path": lambda: read_labelled(recipe.evaluation, "path")}

    def run(self, target: Target, settings: Evaluation, folder: Path) -> dict[str, Any]:
        """Raises:
        DataError: the texts cannot be read, or a prompt leaves no room for them.
        """
        section = settings.classification
        words, rows, positive = together(target.world, lambda: read_labelled(settings, "path"))
        template = together(target.world, lambda: prompt_template(target, settings))
        max_length = section.max_length or target.recipe.training.get("max_length", 1024)
        prompts = together(
            target.world, lambda: prompts_of(rows, words, section.prompt, target.tokenizer, max_length, template.name)
        )
        asked = Classified("classification", section, words, rows, prompts, positive)
        return {"texts": len(rows)} | classify(asked, target, settings, folder, template.record())


TASK = ClassificationTask()
