"""What the section `preference` refuses, and what does not go with pairs of answers."""

from __future__ import annotations

import dataclasses

import pytest
from trl import DPOConfig, KTOConfig

from distft.config.preference import LOSS_TYPES, Preference
from distft.config.recipe import load_recipe
from distft.distributed.strategies import strategy_faults
from distft.errors import RecipeError


def test_the_losses_and_defaults_are_trl_s() -> None:
    fields = {each.name: each for each in dataclasses.fields(DPOConfig)}
    text = fields["loss_type"].metadata["help"]
    assert set(LOSS_TYPES) == {name.strip("'`") for name in text.split("are: ")[1].split(".")[0].split(", ")}
    fields |= {each.name: each for each in dataclasses.fields(KTOConfig) if each.name.endswith("desirable_weight")}
    for name, field in Preference.model_fields.items():
        default = fields[name].default
        assert field.default == (["sigmoid"] if name == "loss_type" else default) or name == "loss_type"
    assert Preference().weights == {"sigmoid": 1.0} and fields["loss_type"].default_factory() == ["sigmoid"]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("words", "key", "problem"),
    [
        (("objective=sft",), "preference", "set objective=dpo"),
        (("lora=null",), "preference.precompute_ref_log_probs", "add a lora section"),
        (("lora=null", "preference.loss_type=kto"), "lora", "add a lora section"),
        (("lora.init_lora_weights=pissa",), "lora.init_lora_weights", "changes the weights of the base"),
        (("lora.bias=all",), "lora.bias", "which is the reference"),
        (("training.completion_only_loss=true",), "training.completion_only_loss", "is for objective=sft"),
        (("training.loss_type=dft",), "training.loss_type", "set preference.loss_type"),
        (("data.train_on=all",), "data.train_on", "is for objective=sft"),
        (("data.order=loss",), "data.order", "scores single answers"),
        (("preference.loss_type=[orpo,sft]",), "preference.loss_type", "not summed with other losses"),
        (("preference.loss_type=orpo", "preference.ld_alpha=0.5"), "preference.ld_alpha", "no effect on orpo"),
        (("preference.desirable_weight=2",), "preference.desirable_weight", "single answers with a label"),
        (("preference.loss_type=orpo", "batching.share_prompts=true"), "batching.share_prompts", "learns from prompts"),
        (
            ("preference.loss_type=kto", "data.name=tiny_ratings", "batching.global_batch_size=1"),
            "batching.global_batch_size",
            "to other prompts",
        ),
        (("preference.loss_type=dpo",), "preference.loss_type", "expected 'sigmoid'"),
        (
            ("preference.loss_type=[sigmoid,sft]", "preference.loss_weights=[1.0]"),
            "preference.loss_weights",
            "1 weights",
        ),
        (("preference.loss_type=exo_pair",), "preference.label_smoothing", "exo_pair takes a logarithm"),
        (("preference.loss_type=robust", "preference.label_smoothing=0.5"), "preference.label_smoothing", "less than"),
        (
            ("preference.loss_type=aot", "preference.f_divergence_type=forward_kl"),
            "preference.f_divergence_type",
            "is not defined for aot",
        ),
        (
            ("preference.loss_type=aot", "preference.use_weighting=true"),
            "preference.use_weighting",
            "aot is no loss",
        ),
        (("preference.beta=0",), "preference.beta", "greater than 0"),
        (("preference.rpo_alpha=1.0",), "preference.rpo_alpha", "loss_type=[sigmoid,sft]"),
        (("strategy=zero3",), "objective", "strategy=fsdp"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_does_not_fit_is_refused_with_what_to_set(words: tuple[str, ...], key: str, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(["recipe=dpo", *words], checks=(strategy_faults,))
    (fault,) = (each for each in caught.value.faults if each.key == key)
    assert problem in f"{fault.problem}; {fault.hint}"
