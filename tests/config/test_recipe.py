"""Recipes: what the shipped ones say, how files and overrides make one, and how faults are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from distft.cli.main import main
from distft.config.files import read_yaml
from distft.config.json_schema import json_schema as schema
from distft.config.recipe import Recipe, load_recipe
from distft.data.formats import data_faults
from distft.distributed.strategies import strategy_faults
from distft.errors import Fault, RecipeError
from distft.paths import packaged

RECIPES = packaged("recipes")
SHIPPED = sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(*arguments: str, folder: Path | None = None) -> Recipe:
    return load_recipe(arguments, checks=(strategy_faults, data_faults), folder=folder)


def faults(*arguments: str, folder: Path | None = None) -> dict[str, Fault]:
    """The faults by key; a test that looks for one sees the others as well."""
    with pytest.raises(RecipeError) as caught:
        load(*arguments, folder=folder)
    found = caught.value.faults
    assert len({fault.key for fault in found}) == len(found), f"one key has two faults: {caught.value}"
    return {fault.key: fault for fault in found}


def value(recipe: Recipe, key: str) -> Any:
    found: Any = recipe.model_dump()
    for part in key.split("."):
        found = found[part]
    return found


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- the shipped recipes ---------------------------------------------------------------------------------------------

NF4 = {
    "quantization.load_in_4bit": True, "quantization.load_in_8bit": False, "quantization.bnb_4bit_quant_type": "nf4",
    "quantization.bnb_4bit_use_double_quant": True,
}  # fmt: skip
BF16 = {"model.dtype": "bfloat16", "training.bf16": True}
DOLLY = {
    "model.name": "meta-llama/Llama-2-7b-hf", "data.name": "dolly", "training.num_train_epochs": 3,
    "training.learning_rate": 1e-4, "training.lr_scheduler_type": "cosine", "training.warmup_steps": 0.03,
    "training.max_length": 1024, "lora.target_modules": "all-linear",
}  # fmt: skip
WIDE = {"lora.r": 32, "lora.lora_alpha": 64, "lora.lora_dropout": 0.05, "batching.global_batch_size": 64}
IMDB = {
    **NF4, **BF16, "quantization.bnb_4bit_compute_dtype": "bfloat16", "data.name": "imdb", "lora.r": 16,
    "lora.target_modules": ["q_proj", "v_proj", "o_proj"], "training.max_length": 512, "training.learning_rate": 2e-5,
    "training.max_steps": 200, "batching.global_batch_size": 16, "run.seed": 42, "training.logging_steps": 10,
}  # fmt: skip

PROMISED: dict[str, dict[str, Any]] = {
    "single_qlora": {
        **DOLLY, **NF4, **BF16, "quantization.bnb_4bit_compute_dtype": "bfloat16", "strategy": "single", "lora.r": 8,
        "lora.lora_alpha": 16, "training.optim": "paged_adamw_32bit", "batching.global_batch_size": 32,
    },
    "ddp_qlora": {**DOLLY, **NF4, **BF16, **WIDE, "quantization.bnb_4bit_compute_dtype": "bfloat16", "strategy": "ddp"},
    "fsdp_bf16": {**DOLLY, **BF16, **WIDE, "quantization": None, "strategy": "fsdp"},
    "imdb_llama2": {**IMDB, "model.name": "meta-llama/Llama-2-7b-hf"},
    "imdb_deepseek": {**IMDB, "model.name": "deepseek-ai/deepseek-llm-7b-base"},
    "climate_llama3b": {
        **NF4, "model.name": "meta-llama/Llama-3.2-3B", "lora.r": 8, "lora.lora_alpha": 32,
        "lora.target_modules": ["q_proj", "v_proj"], "model.dtype": "float16", "training.fp16": True,
        "quantization.bnb_4bit_compute_dtype": "float16", "batching.micro_batch": 7,
        "batching.global_batch_size": 14336, "training.pad_to_multiple_of": 16, "data.test_fraction": 0.1,
        "data.test_split": None, "data.test_path": None,
    },
    "r1_qwen_16k": {
        "model.name": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "training.max_length": 16384, "lora.r": 8,
        "training.gradient_checkpointing": True,
    },
}  # fmt: skip


def test_the_promised_recipes_are_shipped() -> None:
    assert set(PROMISED) | {"tiny"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", folder=tmp_path)
    assert recipe.run.name == name
    assert recipe.source.files[-1] == RECIPES / f"{name}.yaml"


@pytest.mark.parametrize("name", PROMISED)
def test_a_shipped_recipe_says_what_was_promised(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", folder=tmp_path)
    assert {key: value(recipe, key) for key in PROMISED[name]} == PROMISED[name]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_names_the_schema_in_its_first_line(name: str) -> None:
    first = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_divides_for_one_process_and_for_two(name: str) -> None:
    recipe = load(f"recipe={name}")
    for processes in (1, 2):
        recipe.check_division(processes)


def test_fsdp_bf16_is_ddp_qlora_but_for_the_base_and_the_sharding() -> None:
    changed = {"run", "strategy", "quantization"}
    ddp, fsdp = load("recipe=ddp_qlora").model_dump(), load("recipe=fsdp_bf16").model_dump()
    assert {key for key in ddp if ddp[key] != fsdp[key]} == changed


def test_fsdp_is_version_2() -> None:
    assert read_yaml(packaged("accelerate_configs/fsdp.yaml"))["fsdp_config"]["fsdp_version"] == 2


def test_the_fp16_override_in_the_comment_of_imdb_llama2_loads() -> None:
    lines = (RECIPES / "imdb_llama2.yaml").read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("# training.bf16=false"))
    recipe = load("recipe=imdb_llama2", *line.removeprefix("# ").split())
    expected = {
        "training.bf16": False, "training.fp16": True, "model.dtype": "float16",
        "quantization.bnb_4bit_compute_dtype": "float16",
    }  # fmt: skip
    assert {key: value(recipe, key) for key in expected} == expected


# ---- the schema ------------------------------------------------------------------------------------------------------


def test_the_shipped_schema_is_up_to_date() -> None:
    shipped = json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8"))
    assert shipped == schema(), "write it again: distft recipes schema > recipes/recipe.schema.json"


def described(document: dict[str, Any], key: str) -> str:
    """What the schema says of a dotted key, "" where nothing, found as an editor does: through $ref and anyOf."""
    nodes: list[dict[str, Any]] = [document]
    for part in (*key.split("."), None):
        for node in nodes:  # grows while it is walked
            nodes += node.get("anyOf", [])
            if "$ref" in node:
                nodes.append(document["$defs"][node["$ref"].removeprefix("#/$defs/")])
        if part is not None:
            nodes = [node["properties"][part] for node in nodes if part in node.get("properties", {})]
    return next((str(node["description"]) for node in nodes if node.get("description")), "")


def keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """Every dotted key of a recipe file, sections included."""
    found = []
    for name, item in tree.items():
        found += [f"{prefix}{name}", *(keys(item, f"{prefix}{name}.") if isinstance(item, dict) else [])]
    return found


@pytest.mark.parametrize("name", SHIPPED)
def test_the_schema_describes_every_key_of_a_shipped_recipe(name: str) -> None:
    document, used = schema(), keys(read_yaml(RECIPES / f"{name}.yaml"))
    assert used
    assert [key for key in used if not described(document, key)] == []


@pytest.mark.parametrize("key", ["bogus", "lora.rank", "training.warmup_ratio", "data.format.bogus"])
def test_the_schema_knows_no_key_that_a_recipe_refuses(key: str) -> None:
    assert described(schema(), key) == ""


def test_the_schema_is_closed_to_unknown_keys() -> None:
    document = schema()
    sections = [
        document,
        *document["$defs"].values(),
        *(document["properties"][name]["anyOf"][0] for name in ("lora", "training")),
    ]
    assert [
        section["title"]
        for section in sections
        if "properties" in section and section.get("additionalProperties") is not False
    ] == []


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("lora.r=8", "lora.r", 8),
        ("training.learning_rate=1e-4", "training.learning_rate", 0.0001),
        ("training.learning_rate=2E-5", "training.learning_rate", 0.00002),
        ("training.learning_rate=.5", "training.learning_rate", 0.5),
        ("training.max_steps=-1", "training.max_steps", -1),
        ("model.trust_remote_code=true", "model.trust_remote_code", True),
        ("tracking.tags=[yes, no, on, off]", "tracking.tags", ["yes", "no", "on", "off"]),
        ("run.name=no", "run.name", "no"),
        ("run.name=v1.2.3", "run.name", "v1.2.3"),
        ("run.name=2025-11-21", "run.name", "2025-11-21"),  # YAML 1.2 has no dates
        ("training.max_steps=010", "training.max_steps", 10),  # … and no octal numbers of this form
        ("model.name=a=b", "model.name", "a=b"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("evaluation={max_samples: 5}", "evaluation.max_samples", 5),
        ("data.test_split=null", "data.test_split", None),
        ("training.max_length=null", "training.max_length", None),
        ("quantization=null", "quantization", None),
        ("quantization=", "quantization", None),
    ],
)
def test_an_override_is_read_as_yaml(override: str, key: str, expected: Any) -> None:
    found = value(load(override), key)
    assert found == expected
    assert type(found) is type(expected)


def test_without_a_recipe_it_is_the_tiny_one() -> None:
    assert load().source.name == "tiny"


def test_the_last_override_of_a_key_holds() -> None:
    assert value(load("lora.r=4", "lora.r=8"), "lora.r") == 8


def test_an_override_leaves_the_other_values_of_its_section() -> None:
    before, after = load("recipe=ddp_qlora"), load("recipe=ddp_qlora", "lora.r=8")
    assert after.lora == {**(before.lora or {}), "r": 8}


def test_null_resets_the_lora_section_and_an_override_after_it_starts_anew() -> None:
    assert load("recipe=fsdp_bf16", "lora=null").lora is None
    assert load("recipe=fsdp_bf16", "lora=null", "lora.r=8").lora == {"r": 8}


@pytest.mark.parametrize("argument", ["lora.r", "=8", "--nproc"])
def test_an_argument_that_is_no_override_is_a_fault(argument: str) -> None:
    assert faults(argument)[argument].problem == "expected key.path=value"


@pytest.mark.parametrize("text", ["[1", "{a: 1, a: 2}", "2025-13-45", "0b_"])
def test_a_value_that_is_no_yaml_or_only_looks_like_a_number_is_a_fault_not_a_crash(text: str) -> None:
    assert str(faults(f"training.max_steps={text}")["training.max_steps"]).startswith(
        "command line: training.max_steps: "
    )


# ---- files: extends, origins, duplicates -----------------------------------------------------------------------------


def test_a_recipe_changes_the_one_it_extends_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path / "recipes/mine.yaml",
        "extends: ddp_qlora\nlora: {r: 4}\nquantization: null\ntraining: {optim: adamw_torch}\n",
    )
    base, recipe = load("recipe=ddp_qlora", folder=tmp_path), load("recipe=mine", folder=tmp_path)
    assert recipe.lora == {**(base.lora or {}), "r": 4}
    assert recipe.quantization is None
    assert recipe.training == {**base.training, "optim": "adamw_torch"}
    assert (recipe.model, recipe.data, recipe.batching) == (base.model, base.data, base.batching)
    assert recipe.run.name == "mine"


def test_a_list_is_replaced_not_merged(tmp_path: Path) -> None:
    write(tmp_path / "recipes/mine.yaml", "extends: imdb_llama2\nlora: {target_modules: [k_proj]}\n")
    assert value(load("recipe=mine", folder=tmp_path), "lora.target_modules") == ["k_proj"]


def test_each_value_tells_where_it_came_from(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlora\nlora: {r: 4}\nquantization: null\n")
    source = load("recipe=mine", "training.max_steps=5", "lora.lora_alpha=8", folder=tmp_path).source
    base = RECIPES / "ddp_qlora.yaml"
    assert source.files == (base, mine)
    expected = {
        "lora.r": str(mine), "lora.lora_alpha": "command line", "lora.lora_dropout": str(base),
        "training.max_steps": "command line", "training.learning_rate": str(base), "quantization": str(mine),
        "quantization.load_in_4bit": str(mine), "run.name": "derived", "run.seed": "default",
        "tracking.project": "default",
    }  # fmt: skip
    assert {key: source.of(key) for key in expected} == expected


def test_a_section_s_origin_is_that_of_its_last_change(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlora\nlora: {r: 4}\n")
    assert load("recipe=mine", folder=tmp_path).source.of("lora") == str(mine)
    assert load("recipe=mine", "lora.lora_alpha=8", folder=tmp_path).source.of("lora") == "command line"


def test_a_path_is_a_recipe_and_extends_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "deep/base.yaml", (RECIPES / "tiny.yaml").read_text(encoding="utf-8"))
    write(tmp_path / "deep/child.yaml", "extends: base.yaml\nlora: {r: 4}\n")
    recipe = load("recipe=deep/child.yaml", folder=tmp_path)
    assert value(recipe, "lora.r") == 4
    assert recipe.source.files == (tmp_path / "deep/base.yaml", tmp_path / "deep/child.yaml")


def test_a_recipe_of_the_working_folder_hides_a_shipped_one(tmp_path: Path) -> None:
    text = (RECIPES / "tiny.yaml").read_text(encoding="utf-8").replace("r: 16", "r: 3")
    write(tmp_path / "recipes/tiny.yaml", text)
    assert value(load("recipe=tiny", folder=tmp_path), "lora.r") == 3


def test_a_recipe_extends_one_other_and_that_one_none(tmp_path: Path) -> None:
    write(tmp_path / "recipes/mine.yaml", "extends: fsdp_bf16\n")
    assert "must not extend another" in faults("recipe=mine", folder=tmp_path)["extends"].problem


def test_what_a_recipe_extends_stands_in_the_file_alone() -> None:
    # The hint must not send people back to the very key that they gave.
    assert "did you mean extends?" not in str(faults("recipe=tiny", "extends=ddp_qlora")["extends"])


@pytest.mark.parametrize("text", ["lora: {r: 4, r: 8}", "strategy: ddp\nmodel: {name: tiny}\nstrategy: fsdp\n"])
def test_a_key_that_stands_twice_is_a_fault_that_names_it(tmp_path: Path, text: str) -> None:
    write(tmp_path / "recipes/mine.yaml", text)
    with pytest.raises(RecipeError, match=r"mine\.yaml: .*the key '(r|strategy)' appears twice"):
        load("recipe=mine", folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("a: [", "not valid YAML"), ("- a\n", "got list"), ("", "got NoneType")],
    ids=["broken", "list", "empty"],
)
def test_a_file_that_is_no_mapping_is_a_fault_that_names_it(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path / "recipes/mine.yaml", text)
    with pytest.raises(RecipeError, match=rf"mine\.yaml: .*{problem}"):
        load("recipe=mine", folder=tmp_path)


def test_a_recipe_that_is_not_there_names_the_nearest() -> None:
    fault = faults("recipe=ddp_qlra")["recipe"]
    assert (fault.where, fault.hint) == ("command line", "did you mean ddp_qlora?")


def test_a_recipe_like_no_other_names_all_there_are(tmp_path: Path) -> None:
    hint = faults("recipe=xyzzy", folder=tmp_path)["recipe"].hint
    assert all(name in hint for name in SHIPPED)


def test_an_extended_recipe_that_is_not_there_is_a_fault_of_the_file(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "extends: ddp_qlra\n")
    fault = faults("recipe=mine", folder=tmp_path)["extends"]
    assert (fault.where, fault.hint) == (str(mine), "did you mean ddp_qlora?")


def test_a_file_that_is_not_there_is_a_fault(tmp_path: Path) -> None:
    assert faults("recipe=./mine.yaml", folder=tmp_path)["recipe"].problem == "there is no file ./mine.yaml"


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    mine = write(
        tmp_path / "recipes/mine.yaml",
        "extends: ddp_qlora\nlora: {rank: 4}\nmodle: {name: tiny}\n"
        "training: {warmup_ratio: 0.1, learning_rat: 1e-4, fp16: true}\n",
    )
    found = faults(
        "recipe=mine", "batching.micro_batch=0", "model.dtype=bf16", "nonsense", "run.name=a/b", folder=tmp_path
    )
    assert {key: fault.where for key, fault in found.items()} == {
        "lora.rank": str(mine), "training.warmup_ratio": str(mine), "training.learning_rat": str(mine),
        "training.fp16": str(mine), "modle": str(mine), "batching.micro_batch": "command line",
        "model.dtype": "command line", "nonsense": "command line", "run.name": "command line",
    }  # fmt: skip


def test_the_message_has_a_line_for_each_fault_with_place_key_problem_and_hint() -> None:
    with pytest.raises(RecipeError) as caught:
        load("lora.rank=4", "training.max_steps=no")
    assert str(caught.value).splitlines() == [
        "the recipe has 2 faults:",
        "  command line: lora.rank: unknown key (it is lora.r)",
        "  command line: training.max_steps: expected a valid integer, got 'no' (str)",
    ]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("training.learning_rat", "did you mean learning_rate?"),
        ("lora.lora_alfa", "did you mean lora_alpha?"),
        ("modle", "did you mean model?"),
        ("model.lora_alpha", "did you mean lora.lora_alpha?"),  # the right name in the wrong section
        ("training.warmup_ratio", "it is training.warmup_steps, where a number below 1 is a ratio"),
        ("training.evaluation_strategy", "it is training.eval_strategy"),
        ("training.max_seq_length", "it is training.max_length"),
        ("training.no_cuda", "it is training.use_cpu"),
        ("model.torch_dtype", "it is model.dtype"),
        ("lr", "it is training.learning_rate"),
        ("data.xyzzy", ""),
        ("evaluation.imdb.subst", "did you mean subset?"),  # in a section within a section
        ("evaluation.judge.retrys", "did you mean retries?"),
        ("data.format.instructon", "did you mean instruction?"),
    ],
)
def test_an_unknown_key_names_the_one_that_was_meant(key: str, hint: str) -> None:
    fault = faults(f"{key}=1")[key]
    assert (fault.problem, fault.hint) == ("unknown key", hint)


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("training.per_device_train_batch_size", "batching.micro_batch"),
        ("training.gradient_accumulation_steps", "batching.global_batch_size"),
        ("training.output_dir", "run.dir"),
        ("training.fsdp", "strategy"),
        ("training.report_to", "tracking.report_to"),
        ("training.packing", "batching.micro_batch_tokens"),
        ("training.average_tokens_across_devices", "over all trained tokens of the global batch"),
        ("lora.task_type", "distft sets it"),
    ],
)
def test_a_key_that_distft_owns_names_what_to_set_instead(key: str, instead: str) -> None:
    fault = faults(f"{key}=1")[key]
    assert fault.problem == "cannot be set here"
    assert instead in fault.hint


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.r=eight", "expected a valid integer, got 'eight' (str)"),
        ("lora.r=8.5", "expected a valid integer, got 8.5 (float)"),
        ("training.bf16=yes", "expected a valid boolean, got 'yes' (str)"),
        ("strategy=dpp", "expected 'single', 'ddp', 'fsdp', 'zero2' or 'zero3', got 'dpp' (str)"),
        ("batching.global_batch_size=0", "expected greater than or equal to 1, got 0 (int)"),
        ("data.test_fraction=1.0", "expected less than 1, got 1.0 (float)"),
        ("run.name=2025", "expected a valid string, got 2025 (int)"),
        ("lora=5", "expected a valid dictionary, got 5 (int)"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_nothing_else(override: str, expected: str) -> None:
    key = override.split("=")[0]
    with pytest.raises(RecipeError) as caught:
        load(override)
    assert [str(fault) for fault in caught.value.faults] == [f"command line: {key}: {expected}"]


def test_what_is_required_and_not_set_is_a_fault_of_the_file(tmp_path: Path) -> None:
    mine = write(tmp_path / "recipes/mine.yaml", "strategy: ddp\nmodel: {name: tiny}\n")
    found = faults("recipe=mine", folder=tmp_path)
    assert {key: (fault.where, fault.problem) for key, fault in found.items()} == dict.fromkeys(
        ("data", "batching"), (str(mine), "is required and not set")
    )


@pytest.mark.parametrize(
    ("arguments", "key", "problem"),
    [
        ("recipe=ddp_qlora training.fp16=true", "training.fp16", "bf16 and fp16 exclude each other"),
        ("recipe=ddp_qlora quantization.load_in_8bit=true", "quantization", "exclude each other"),
        ("recipe=ddp_qlora lora=null", "lora", "4-bit weights cannot be trained without an adapter"),
        (
            "recipe=ddp_qlora lora=null quantization.load_in_4bit=false quantization.load_in_8bit=true",
            "lora",
            "8-bit weights cannot be trained without an adapter",
        ),
        ("recipe=fsdp_bf16 quantization.load_in_8bit=true", "quantization.load_in_8bit", "cannot be sharded by FSDP2"),
        (
            "recipe=fsdp_qlora quantization.bnb_4bit_quant_storage=uint8",
            "quantization.bnb_4bit_quant_storage",
            "4-bit weights stored as uint8 in a bfloat16 model are not sharded by FSDP2",
        ),
        ("recipe=fsdp_bf16 training.optim=paged_adamw_32bit", "training.optim", "that FSDP2 has sharded"),
        (
            "recipe=zero3_bf16 quantization.load_in_4bit=true quantization.bnb_4bit_quant_storage=uint8",
            "quantization.bnb_4bit_quant_storage",
            "are not sharded by ZeRO-3",
        ),
        (
            "recipe=zero3_bf16 training.bf16=false",
            "training.bf16",
            "ZeRO-3 holds weights in float32, and model.dtype is bfloat16",
        ),
        ("recipe=zero3_bf16 model.dtype=float16 training.bf16=false", "training.bf16", "model.dtype is float16"),
        (
            "recipe=zero3_bf16 quantization.load_in_8bit=true",
            "quantization.load_in_8bit",
            "cannot be sharded by ZeRO-3",
        ),
        (
            "recipe=fsdp_bf16 quantization.dequantize_at_load=true",
            "quantization.dequantize_at_load",
            "no 4-bit weights",
        ),
        (
            "recipe=fsdp_qlora quantization.dequantize_at_load=true",
            "quantization.dequantize_at_load",
            "FSDP2 would unpack the whole model on every device",
        ),
        (
            "recipe=ddp_qlora lora=null quantization.dequantize_at_load=true",
            "lora",
            "4-bit weights cannot be trained without an adapter",
        ),
        ("model.attn_implementation=varlen", "model.attn_implementation", "these micro-batches are padded"),
        ("data.validation_fraction=0 training.eval_strategy=steps", "training.eval_strategy", "no validation split"),
        ("data.validation_fraction=0.5 data.test_fraction=0.5", "data", "leave nothing to train on"),
        ("data.name=some/corpus", "data.format", "is required for 'some/corpus'"),
        ("data.format.text=a data.format.label=b", "data.format", "got label, text"),
        (
            "recipe=climate_llama3b training.completion_only_loss=true",
            "training.completion_only_loss",
            "data.format.text names whole texts",
        ),
    ],
)
def test_an_impossible_pair_is_refused(arguments: str, key: str, problem: str) -> None:
    fault = faults(*arguments.split())[key]
    assert problem in fault.problem
    assert fault.where == "command line"


@pytest.mark.parametrize("name", ["a/b", "../up", "a b", ".hidden", "-flag", "/tmp/runs"])
def test_a_run_name_that_is_no_plain_folder_name_is_refused(name: str) -> None:
    assert "plain folder name" in faults(f"run.name={name}")["run.name"].problem


def test_a_seed_that_the_generators_do_not_take_is_a_fault() -> None:
    # transformers seeds numpy, which takes 32 bits; found in the recipe, it costs no loaded model.
    assert set(faults("run.seed=4294967296")) == {"run.seed"}


# ---- the global batch ------------------------------------------------------------------------------------------------


PADDED = "batching.micro_batch_tokens=null"


def test_a_micro_batch_that_does_not_divide_lists_those_that_do() -> None:
    with pytest.raises(RecipeError) as caught:
        load("recipe=ddp_qlora", PADDED, "batching.micro_batch=5").check_division(2)
    (fault,) = caught.value.faults
    assert (fault.where, fault.key) == ("command line", "batching.micro_batch")
    assert fault.problem == "a global batch of 64 samples does not divide into micro-batches of 5 on 2 processes"
    assert fault.hint == "micro-batches that divide: 1, 2, 4, 8, 16, 32"


@pytest.mark.parametrize(("processes", "batches"), [(3, "63 or 66"), (128, "128")])
def test_processes_that_do_not_divide_name_the_nearest_global_batches(processes: int, batches: str) -> None:
    with pytest.raises(RecipeError, match=f"a global batch of {batches}"):
        load("recipe=ddp_qlora", PADDED, "batching.micro_batch=8").check_division(processes)


@pytest.mark.parametrize(
    "overrides",
    [
        ("batching.micro_batch_tokens=4096",),
        (PADDED, "batching.micro_batch=5", "batching.global_batch_size=null", "batching.global_batch_tokens=20000"),
    ],
    ids=["packs", "batch in tokens"],
)
def test_what_is_counted_in_tokens_divides_for_any_number_of_processes(overrides: tuple[str, ...]) -> None:
    load("recipe=ddp_qlora", *overrides).check_division(3)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("batching.global_batch_tokens=20000",), "set either global_batch_size or global_batch_tokens, not both"),
        (("batching.global_batch_size=null",), "set either global_batch_size or global_batch_tokens; neither is set"),
    ],
    ids=["both", "neither"],
)
def test_the_global_batch_is_counted_in_one_way(overrides: tuple[str, ...], problem: str) -> None:
    assert faults("recipe=ddp_qlora", *overrides)["batching.global_batch_size"].problem == problem


def test_a_size_in_samples_beside_one_in_tokens_is_a_fault() -> None:
    fault = faults("recipe=ddp_qlora", "batching.micro_batch=4")["batching.micro_batch"]
    assert "packs the samples" in fault.problem and fault.hint == "batching.micro_batch_tokens=null turns packing off"


@pytest.mark.parametrize(
    ("overrides", "steps", "epochs"),
    [
        (("training.num_train_epochs=3",), 7, 3),
        (("training.num_train_epochs=2.5",), 7, 3),
        (("training.max_steps=7",), 7, 1),
        (("training.max_steps=8",), 7, 2),
    ],
)
def test_epochs_are_those_that_training_begins(overrides: tuple[str, ...], steps: int, epochs: int) -> None:
    assert load("recipe=ddp_qlora", *overrides).epochs(steps) == epochs


# ---- the resolved recipe ---------------------------------------------------------------------------------------------


def again(recipe: Recipe, folder: Path) -> Recipe:
    path = write(folder / "resolved.yaml", recipe.to_yaml())
    return load(f"recipe={path}")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_resolved_recipe_loads_again_to_an_equal_one(name: str, tmp_path: Path) -> None:
    recipe = load(f"recipe={name}", "training.learning_rate=1e-5", "run.name=once-more")
    assert again(recipe, tmp_path).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "null",
        "true",
        "1e4",
        "1e-4",
        "12",
        "010",
        "0x10",
        ".5",
        ".inf",
        "2025-11-21",
        "12:30",
        " a ",
        "a: b",
        "é",
        "a\nb",
        "",
    ],
)
def test_a_text_that_looks_like_something_else_survives(text: str, tmp_path: Path) -> None:
    recipe = load(f"tracking.tags={json.dumps([text])}")
    assert recipe.tracking.tags == [text]
    assert again(recipe, tmp_path).tracking.tags == [text]


def test_a_resolved_recipe_stands_alone() -> None:
    resolved = yaml.safe_load(load("recipe=single_qlora").to_yaml())
    assert "extends" not in resolved
    assert resolved["run"]["name"] == "single_qlora"
    assert resolved["model"]["name"] == "meta-llama/Llama-2-7b-hf"


def test_a_recipe_is_frozen() -> None:
    recipe = load()
    with pytest.raises(ValueError, match="frozen"):
        recipe.strategy = "single"


def test_null_takes_back_what_a_base_recipe_set() -> None:
    recipe = load_recipe(["recipe=ddp_qlora", "training.learning_rate=null", "lora.lora_dropout=null"])
    assert "learning_rate" not in recipe.training
    assert recipe.lora is not None and "lora_dropout" not in recipe.lora


@pytest.mark.parametrize(("text", "seconds"), [("00:01:30", 90.0), ("11:50:00", 42_600.0), ("1-00:00:01", 86_401.0)])
def test_a_time_is_read_as_slurm_writes_it(text: str, seconds: float) -> None:
    assert load_recipe(["recipe=tiny", f"run.max_time={text}"]).run.max_time_s == seconds


def test_validate_takes_recipes_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "validate", "tiny", "recipe=ddp_qlora", "lora.r=4", "training.max_steps=3"]) == 0
    assert capsys.readouterr().out.splitlines() == ["tiny: valid", "ddp_qlora: valid"]
    assert main(["recipes", "validate", "training.max_stepz=3"]) == 2
    printed = capsys.readouterr()
    assert not printed.out and all(f"{name}: " in printed.err for name in SHIPPED)
    assert printed.err.count("max_stepz") == len(SHIPPED)


@pytest.mark.parametrize(
    ("key", "wrong", "right"),
    [
        ("lora.r", (0, -4), (1,)), ("lora.lora_alpha", (0,), (1,)), ("lora.lora_dropout", (-0.1, 1.0), (0.0, 0.9)),
        ("training.learning_rate", (-1e-4, ".nan"), (0.0, 3)), ("training.max_grad_norm", (-1,), (0, 0.5)), ("training.max_steps", (-2,), (-1, 1)),
        ("training.weight_decay", (-0.1,), (0.0,)), ("training.warmup_steps", (-3,), (0, 0.1)), ("training.num_train_epochs", (0, -1), (0.5,)),
        ("training.max_length", (0,), (1, "null")), ("training.logging_steps", (0,), (0.1, 1)), ("training.save_steps", (-2,), (7,)),
        ("training.adam_beta1", (1.0,), (0.0,)), ("training.dataloader_num_workers", (-1,), (0,)), ("training.neftune_noise_alpha", (-5,), ("null", 5)),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_found_before_anything_is_loaded(
    key: str, wrong: tuple[Any, ...], right: tuple[Any, ...]
) -> None:
    """Upstream takes them: it fails once the weights are loaded, or trains what nobody asked for."""
    for value in wrong:
        (fault,) = faults("recipe=tiny", f"{key}={value}").values()
        assert fault.key == key and fault.problem.startswith("expected ") and " than " in fault.problem
    for value in right:
        load("recipe=tiny", f"{key}={value}")
