"""What is found about a model, its tokenizer and its adapter before any weight is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from distft.config.recipe import load_recipe
from distft.errors import Fault, RecipeError
from distft.models.checks import model_faults, position_findings
from distft.models.skeleton import Skeleton

DENSE = ["recipe=tiny", "quantization=null"]


def found(*overrides: str) -> tuple[dict[str, Fault], list[str]]:
    """The faults by key; the notes and what was skipped."""
    faults, notes, skipped, *_ = model_faults(load_recipe([*DENSE, *overrides]))
    return {fault.key: fault for fault in faults}, notes + skipped


def folder_of(config: Any, path: Path, tokenizer: Any) -> Path:
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_shipped_recipe_has_no_faults_and_notes() -> None:
    assert model_faults(load_recipe(["recipe=tiny"]))[:3] == ([], [], [])


def test_all_misspelt_names_are_found_at_once_with_the_nearest() -> None:
    faults, _ = found(
        "lora.target_modules=[q_proj,v_porj]",
        "lora.modules_to_save=[lm_haed]",
        "lora.rank_pattern={q_porj: 4}",
        "lora.alpha_pattern={k_porj: 4}",
        "lora.exclude_modules=[o_porj]",
        "lora.target_parameters=[norm.wieght]",
        "lora.trainable_token_indices={embed_tokns: [3]}",
    )
    nearest = {key.removeprefix("lora."): fault.hint for key, fault in faults.items()}
    assert nearest == {
        "target_modules": "did you mean v_proj?",
        "modules_to_save": "did you mean lm_head?",
        "rank_pattern": "did you mean q_proj?",
        "alpha_pattern": "did you mean k_proj?",
        "exclude_modules": "did you mean o_proj?",
        "target_parameters": "did you mean model.norm.weight?",
        "trainable_token_indices": "did you mean embed_tokens?",
    }
    assert "'v_porj' matches no module" in faults["lora.target_modules"].problem


def test_an_auxiliary_loss_needs_a_model_with_experts(tokenizer: Any, tmp_path: Path) -> None:
    faults, _ = found("training.router_aux_loss_coef=0.05")
    assert "tiny returns no router logits" in faults["training.router_aux_loss_coef"].problem
    assert found("training.router_aux_loss_coef=0")[0] == {}
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=len(tokenizer), num_hidden_layers=1, num_local_experts=2, **sizes)
    experts = folder_of(config, tmp_path, tokenizer)
    words = (f"model.name={experts}", "lora.target_modules=[q_proj]", "training.router_aux_loss_coef=0.05")
    assert found(*words)[0] == {}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("lora.target_modules=q_proj", "set it to [q_proj]"),
        ("lora.target_modules=[mlp]", "an adapter cannot be put on a whole LlamaMLP"),
        ("lora.target_modules=[lm_head]", "would not be trained"),
        ("lora.target_modules='*['", "is not a regular expression"),
        ("lora.rank_pattern={q_proj: 0}", "expected a whole number greater than 0"),
        ("lora.rank_pattern={lm_head: 4}", "matches no module of tiny that has an adapter"),
        ("lora.alpha_pattern={q_proj: x}", "expected a number greater than 0"),
        ("lora.layers_pattern=blocks", "matches no list of layers"),
        ("lora.layers_to_transform=[0, 4, -1]", "has no layer 4, -1"),
        ("lora.trainable_token_indices=[2047, 2048]", "there is no row 2048"),
    ],
)
def test_what_would_not_be_trained_is_a_fault(override: str, says: str) -> None:
    key = override.partition("=")[0]
    extra = ["lora.target_modules=[q_proj]"] if key.startswith("lora.layers") else []
    if key == "lora.layers_pattern":
        extra.append("lora.layers_to_transform=[0]")
    faults, _ = found(*extra, override)
    assert list(faults) == [key] and says in str(faults[key])


def test_modules_to_leave_unquantised_are_matched_as_transformers_matches_them() -> None:
    base = ["recipe=tiny", "quantization.llm_int8_skip_modules="]
    for right in ("[q_proj]", "[model.layers.0]", "['model.layers.[01].mlp']"):
        assert model_faults(load_recipe([base[0], base[1] + right]))[0] == []
    for wrong, told in (
        ("[q_porj]", "did you mean q_proj?"),
        ("['[']", "not a regular expression"),
        ("[layers.0]", ""),
    ):
        (fault,) = model_faults(load_recipe([base[0], base[1] + wrong]))[0]
        assert fault.key == "quantization.llm_int8_skip_modules" and told in str(fault)


def test_the_output_head_stays_unquantised_beside_others() -> None:
    """transformers leaves out the head only where no modules are named."""
    from distft.models.loading import quantization_config

    config = quantization_config(load_recipe(["recipe=tiny", "quantization.llm_int8_skip_modules=[q_proj]"]))
    assert config is not None and {"lm_head", "q_proj"} <= set(config.llm_int8_skip_modules)


def test_a_target_that_is_excluded_is_a_fault() -> None:
    faults, _ = found("lora.target_modules=[q_proj,v_proj]", "lora.exclude_modules=[v_proj]")
    assert "'v_proj' gets no adapter" in faults["lora.target_modules"].problem


@pytest.mark.parametrize(
    "override",
    [
        "lora.target_modules=.*(q|v)_proj",
        "lora.target_modules=[self_attn.q_proj, model.layers.3.mlp.up_proj]",
        "lora.rank_pattern={'model.layers.[01].self_attn.q_proj': 4}",
        "lora.modules_to_save=[lm_head, embed_tokens]",
        "lora.target_parameters=[up_proj.weight]",
        "lora.trainable_token_indices=[0, 2047]",
        "lora.use_dora=true",
        "lora.init_lora_weights=pissa",
    ],
)
def test_what_peft_can_do_is_no_fault(override: str) -> None:
    extra = ["lora.target_modules=[]", "lora.lora_dropout=0.0"] if "target_parameters" in override else []
    assert found(*extra, override) == ({}, [])


def test_what_needs_weights_that_a_quantised_base_lacks_is_a_fault() -> None:
    four = ["quantization={load_in_4bit: true}", "lora.target_modules=[v_proj]"]
    faults, _ = found(*four, "lora.modules_to_save=[q_proj]", "lora.init_lora_weights=pissa_niter_4")
    assert "weights of 4 bits" in faults["lora.modules_to_save"].problem
    assert "llm_int8_skip_modules=[q_proj]" in faults["lora.modules_to_save"].hint
    assert "pissa_niter_4 rewrites the base" in faults["lora.init_lora_weights"].problem
    assert found(*four, "lora.modules_to_save=[lm_head]") == ({}, [])


def test_initialisations_that_rewrite_the_base_need_whole_weights_and_to_be_repeatable() -> None:
    faults, _ = found("lora.init_lora_weights=pissa_niter_4")
    assert faults["lora.init_lora_weights"].hint == "use pissa, which decomposes them exactly"
    faults, _ = found("lora.init_lora_weights=olora", "strategy=fsdp")
    assert "which fsdp splits among the processes" in faults["lora.init_lora_weights"].problem
    faults, _ = found("lora.init_lora_weights=pissa", "quantization={load_in_4bit: true, dequantize_at_load: true}")
    assert "would not fit the original ones" in faults["lora.init_lora_weights"].problem


def test_tied_embeddings_that_fsdp_would_tie_again_are_a_fault(tmp_path: Path, tokenizer: Any) -> None:
    shape = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(intermediate_size=16, tie_word_embeddings=True, **shape)
    name = f"model.name={folder_of(config, tmp_path, tokenizer)}"
    fsdp = [name, "strategy=fsdp", "training.max_length=64"]
    assert found(*fsdp) == ({}, [])
    for key, value in (("modules_to_save", "[lm_head]"), ("target_modules", "[embed_tokens]")):
        faults, _ = found(*fsdp, f"lora.{key}={value}")
        assert "ties the output head" in faults[f"lora.{key}"].problem
        assert found(*fsdp, "strategy=ddp", f"lora.{key}={value}") == ({}, [])


@pytest.mark.parametrize("value", ["eva", "corda", "loftq", "mica"])
def test_initialisations_that_distft_cannot_carry_out_are_refused_by_name(value: str) -> None:
    with pytest.raises(RecipeError, match=f"lora.init_lora_weights: {value} is not supported"):
        load_recipe([*DENSE, f"lora.init_lora_weights={value}"])


@pytest.mark.parametrize(
    "setting", ["eva_config={rho: 2.0}", "use_qalora=true", "megatron_config={a: 1}", "layer_replication=[[0, 2]]"]
)
def test_variants_of_lora_that_distft_does_not_train_are_refused_by_name(setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"a fault:\n.*lora.{key}: is not supported \("):
        load_recipe([*DENSE, f"lora.{setting}"])
    load_recipe([*DENSE, f"lora.{key}=null"])


def test_a_tokenizer_with_more_entries_than_rows_is_a_fault(tmp_path: Path, tokenizer: Any, tiny: Path) -> None:
    larger = type(tokenizer).from_pretrained(tiny)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path)
    faults, _ = found(f"model.tokenizer={tmp_path}")
    assert "1 token beyond the 2,048 rows of the model's embedding: '<new>' (2048)" in faults["model.tokenizer"].problem


def test_placeholders_of_a_multimodal_tokenizer_need_no_rows(tmp_path: Path, tokenizer: Any, tiny: Path) -> None:
    """The tokenizer of Gemma 3 1B has one more entry than the model: no text contains it."""
    larger = type(tokenizer).from_pretrained(tiny, extra_special_tokens={"image_token": "<image>"})
    larger.save_pretrained(tmp_path)
    assert len(larger) == 2049 and found(f"model.tokenizer={tmp_path}") == ({}, [])


def test_learned_positions_are_a_limit_and_rotary_ones_a_note(tmp_path: Path, tokenizer: Any) -> None:
    shape = {"vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    learned = folder_of(GPT2Config(n_positions=64, **shape), tmp_path / "gpt2", tokenizer)
    rotary = folder_of(
        LlamaConfig(max_position_embeddings=64, intermediate_size=16, **shape), tmp_path / "l", tokenizer
    )
    faults, notes = found(f"model.name={learned}", "training.max_length=256")
    assert str(faults["training.max_length"]).endswith(
        f"samples may have 256 tokens; {learned} was built for 64 positions, and has none beyond (set it to 64)"
    )
    assert notes == []
    faults, notes = found(f"model.name={rotary}", "training.max_length=256")
    assert faults == {} and "256 tokens" in notes[0] and "64 positions" in notes[0]
    for folder in (learned, rotary):
        assert found(f"model.name={folder}", "training.max_length=64") == ({}, [])
    recipe = load_recipe([*DENSE, f"model.name={learned}", "training.max_length=null"])
    skeleton = Skeleton.of(recipe)
    assert position_findings(recipe, skeleton, longest=64) == ([], [])
    assert "the longest sample has 65 tokens" in position_findings(recipe, skeleton, longest=65)[0][0].problem


def test_a_skeleton_has_no_weights(tiny: Path) -> None:
    model = Skeleton.of(load_recipe([*DENSE, f"model.name={tiny}"])).model
    assert {parameter.device for parameter in model.parameters()} == {torch.device("meta")}


def test_where_a_model_can_be(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    (tmp_path / "weights.safetensors").touch()
    for name, says in {
        "./missing": f"there is no folder {tmp_path}/missing",
        "~/missing": f"there is no folder {tmp_path}/missing",
        "a/b/c": "there is no folder a/b/c",
        "adapter": "holds an adapter",
        "weights.safetensors": "is a file",
    }.items():
        faults, notes = found(f"model.name={name}")
        assert list(faults) == ["model.name"] and notes == [] and says in faults["model.name"].problem
    faults, notes = found("model.tokenizer=~/adapter")
    assert "has no tokenizer" in faults["model.tokenizer"].problem
    assert found("model.name=someone/model") == ({}, ["the model someone/model, which is not in the cache"])
    (tmp_path / "mine").symlink_to(tiny)
    recipe = load_recipe([*DENSE, "model.name=mine", "model.tokenizer=~/mine"])
    assert (recipe.model.name, recipe.model.tokenizer) == (str(tmp_path / "mine"),) * 2, "in any working folder"
    assert model_faults(recipe)[:3] == ([], [], [])
