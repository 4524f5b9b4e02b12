"""What all-linear leaves out, because no adapter can be put on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from distft.config.recipe import load_recipe
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.models.adapter import modules_left_out
from distft.models.checks import model_faults
from distft.models.loading import load_model
from distft.models.targets import unsuitable, without_unsuitable

from .families import saved, small_model


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", []),
        ("mixtral", []),
        ("opt", []),  # its out_proj is a linear like any other
        ("bitnet", []),  # linears with a forward of their own
        ("phimoe", ["router"]),
        ("llama4_text", ["router"]),
        ("falcon_h1", ["out_proj"]),
        ("mamba2", ["out_proj"]),
        ("nemotron_h", ["out_proj"]),
    ],
)
def test_what_cannot_have_an_adapter(family: str, expected: list[str]) -> None:
    assert unsuitable(small_model(family)) == expected


def test_it_is_added_to_what_the_recipe_excludes() -> None:
    base = small_model("phimoe")
    assert without_unsuitable({"target_modules": ["q_proj"]}, base) == {"target_modules": ["q_proj"]}
    for given, expected in (
        ([], ["router"]),
        (["k_proj"], ["k_proj", "router"]),
        (["router"], ["router"]),
        (r".*\.k_proj", r"(?:.*\.k_proj)|(?:.*\.)?(?:router)"),
    ):
        found = without_unsuitable({"target_modules": "all-linear", "exclude_modules": given}, base)
        assert found["exclude_modules"] == expected


@pytest.mark.parametrize("family", ["phimoe", "falcon_h1"])
def test_all_linear_reaches_the_others(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path)
    words = ["recipe=tiny", "strategy=single", "quantization=null", f"model.name={folder}"]
    recipe = load_recipe([*words, "lora.target_modules=all-linear"])
    assert model_faults(recipe).faults == []
    model = load_model(recipe, choose(recipe, World(), {}, Launcher()))
    (name,) = modules_left_out(model, recipe)
    targeted = model.base_model.targeted_module_names
    assert targeted and not any(module.endswith(f".{name}") for module in targeted)
    (fault,) = model_faults(load_recipe([*words, f"lora.target_modules=[q_proj,{name}]"])).faults
    assert fault.key == "lora.target_modules" and f"cannot be put on {name!r}" in fault.problem
