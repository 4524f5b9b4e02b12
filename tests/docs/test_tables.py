"""Tables and keys on the pages: every recipe, experiment, strategy and task that exists, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distft.config.evaluation import TASKS, TaskName
from distft.config.files import list_recipes
from distft.config.recipe import load_recipe
from distft.config.schema import StrategyName
from distft.experiments.schema import list_experiments

from .pages import PAGES, ROOT, Page, page

SECTIONS = "run|model|quantization|lora|data|training|batching|evaluation|tracking|slurm"
FILES = {"json", "jsonl", "log", "md", "py", "safetensors", "yaml"}


def test_tables_name_every_recipe_experiment_and_strategy(tmp_path: Path) -> None:
    assert set(page("quick-start").names("Recipes")) == set(list_recipes(tmp_path))
    assert set(page("compare").names("Define an experiment")) == set(list_experiments(tmp_path))
    (table,) = page("strategies").tables()
    assert [row[0].strip("`") for row in table] == list(StrategyName.__args__)


def fields() -> set[str]:
    """Every dotted key of a recipe, PEFT's and TRL's fields among them."""
    schema = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))

    def under(node: dict[str, Any], prefix: str) -> set[str]:
        found: set[str] = set()
        if "$ref" in node:
            found |= under(schema["$defs"][node["$ref"].split("/")[-1]], prefix)
        for each in [*node.get("anyOf", []), *node.get("allOf", []), *node.get("oneOf", [])]:
            found |= under(each, prefix)
        for name, child in node.get("properties", {}).items():
            found |= {f"{prefix}{name}"} | under(child, f"{prefix}{name}.")
        return found

    return under(schema, "")


KEYS = fields()


@pytest.mark.parametrize("shown", PAGES, ids=lambda each: each.path.stem)
def test_every_key_on_a_page_is_a_field(shown: Page) -> None:
    text = re.sub(r"^```(?:console|python)\n.*?^```$", "", shown.text, flags=re.MULTILINE | re.DOTALL)
    keys = set(re.findall(rf"(?<![\w/.<-])((?:{SECTIONS})(?:\.[a-z_0-9]+)+)\b(?!/)", text))
    assert {key for key in keys if key.rsplit(".", 1)[1] not in FILES} - KEYS == set()


@pytest.mark.parametrize(
    "shown", [page("architecture"), Page(ROOT / "CONTRIBUTING.md")], ids=lambda each: each.path.stem
)
def test_every_file_and_folder_named_on_a_page_exists(shown: Page) -> None:
    for name in re.findall(r"`([\w./]+(?:/|\.py|\.md|\.txt|\.toml|\.sbatch))`", shown.text):
        assert any((root / name).exists() for root in (ROOT, ROOT / "src" / "distft")), name


def test_every_make_target_named_in_contributing_exists() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    named = set(re.findall(r"`make ([\w-]+)", Page(ROOT / "CONTRIBUTING.md").text))
    assert named and named <= set(phony[1].split())


def test_evaluations_are_described_by_their_tasks_and_defaults() -> None:
    shown = page("evaluation")
    tasks, files = shown.tables("Tasks")
    assert {row[0].strip("`") for row in tasks} == set(TaskName.__args__) == set(TASKS)
    assert {row[0].strip("`") for row in files} <= KEYS
    recipe = load_recipe([])
    judge, text = recipe.evaluation.judge, " ".join(shown.text.split())
    assert f"`evaluation.judge.mode` is `{judge.mode}` by default" in text
    assert f"`evaluation.generation.max_new_tokens` tokens ({recipe.evaluation.generation.max_new_tokens})" in text
    assert f"`evaluation.judge.max_new_tokens` ({judge.max_new_tokens})" in text


def test_files_of_evaluations_are_as_the_page_says(tmp_path: Path) -> None:
    """A file of each kind with the columns that its row names, and no others."""
    from distft.data.reviews import load
    from distft.evaluation.judge import rubric_of
    from distft.evaluation.tasks.alpaca import read_pairs
    from distft.evaluation.tasks.mt_bench import read_questions

    values = {
        "text": "Good.",
        "label": 1,
        "question_id": 1,
        "category": "math",
        "turns": ["One?", "Two?"],
        "reference": ["1", "2"],
        "instruction": "Say one.",
        "output": "One.",
        "dataset": "mine",
    }
    files = {}
    for key, _, contents in page("evaluation").tables("Tasks")[1]:
        columns = re.findall(r"`(\w+)`", contents)
        files[key.strip("`")] = path = tmp_path / f"{key.strip('`')}.jsonl"
        path.write_text(json.dumps({name: values[name] for name in columns if name in values}) + "\n")
    words = [f"evaluation.imdb.path={files['evaluation.imdb.path']}", "evaluation.imdb.balanced=false"]
    assert [(row.text, row.label) for row in load(load_recipe(words), 2)] == [("Good.", 1)]
    assert read_questions(files["evaluation.mt_bench.questions"])[0].reference == ("1", "2")
    assert read_pairs(files["evaluation.alpaca.path"])[0].dataset == "mine"
    rubric = files["evaluation.judge.rubric"]
    rubric.write_text("Is it polite?\n" + "".join(f"Score {grade}: so\n" for grade in range(1, 6)))
    assert "polite" in rubric_of(load_recipe([f"evaluation.judge.rubric={rubric}"]).evaluation.judge)
