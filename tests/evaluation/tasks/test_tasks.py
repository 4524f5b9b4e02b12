"""Every task that a recipe can name has a module, and its inputs have keys."""

from __future__ import annotations

import pytest

from distft.config.evaluation import TASKS, TaskName
from distft.config.recipe import load_recipe
from distft.evaluation.tasks import Task, load_task


def test_every_task_has_a_line_of_help() -> None:
    assert list(TASKS) == list(TaskName.__args__)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_declared_completely(name: TaskName) -> None:
    task = load_task(name)
    assert isinstance(task, Task)
    recipe = load_recipe([f"evaluation.tasks=[{name}]"])
    sections = recipe.evaluation.model_dump()
    for file in task.files:
        section, key = file.key.split(".")
        assert section == name and key in sections[section] and file.what
    assert task.reads(recipe), "preflight reads something of every task"
