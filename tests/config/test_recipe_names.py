"""A recipe by its name or its path, whatever its file is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.config.files import list_recipes
from distft.config.recipe import load_recipe
from distft.errors import RecipeError
from distft.experiments.expand import load_experiment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes" / "experiments").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "name", "run"),
    [
        ("mine.yaml", "mine", "mine"),
        ("mine.yml", "mine", "mine"),
        ("Mine.YAML", "Mine", "Mine"),
        ("my recipe.yml", "my recipe", "my-recipe"),
        ("größe 2.yaml", "größe 2", "gr-e-2"),
        ("v1.2.yaml", "v1.2", "v1.2"),
    ],
)
def test_a_recipe_is_found_as_name_and_as_path(file: str, name: str, run: str, folder: Path) -> None:
    path = folder / "recipes" / file
    path.write_text("extends: tiny\nlora: {r: 3}\n")
    assert list_recipes(folder)[name] == path
    for wanted in (name, f"recipes/{file}", str(path)):
        recipe = load_recipe([f"recipe={wanted}"], folder=folder)
        assert (recipe.source.name, recipe.run.name) == (name, run)
        assert recipe.lora is not None and recipe.lora["r"] == 3


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("recipes/", "recipes/ is a folder, not a recipe"),
        ("./recipes", "./recipes is a folder, not a recipe"),
        ("recipes", "there is no recipe 'recipes'"),
        ("gone.YML", "there is no file gone.YML"),
        ("recipes/dangling.yaml", "there is no file recipes/dangling.yaml"),
        ("dangling", "there is no recipe 'dangling'"),
        ("twin", "twin.yaml and twin.yml in"),
        ("", "there is no recipe ''"),
    ],
)
def test_what_is_no_recipe_is_refused(wanted: str, message: str, folder: Path) -> None:
    (folder / "recipes" / "dangling.yaml").symlink_to("nowhere")
    for name in ("twin.yaml", "twin.yml"):
        (folder / "recipes" / name).write_text("extends: tiny\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe([f"recipe={wanted}"], folder=folder)
    assert message in str(caught.value)


def test_an_experiment_s_file_may_be_called_anything_as_well(folder: Path) -> None:
    (folder / "recipes" / "experiments" / "my ranks.yml").write_text("base: tiny\nvariants: {a: {}, b: {lora.r: 4}}\n")
    experiment = load_experiment(["experiment=my ranks"], folder=folder)
    assert (experiment.name, [run.name for run in experiment.runs]) == ("my-ranks", ["my-ranks-a", "my-ranks-b"])


def test_bytes_that_are_not_text_are_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="is not text in this terminal's encoding"):
        load_recipe(["data.name=gr\udcf6sse.jsonl"], folder=folder)
