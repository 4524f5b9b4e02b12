"""The model card of a result: what it says, and that it says nothing of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from distft.runs.card import write_card
from distft.runs.folder import RunFolder

RECIPE = """
extends: ddp_qlora
model: {name: BASE}
data: {sources: [{name: dolly}, {name: /home/me/secret-place/chats.jsonl, format: {messages: messages}}]}
"""
SUMMARY: dict[str, Any] = {
    "recipe": "ddp_qlora",
    "strategy": "ddp",
    "world_size": 2,
    "global_batch_size": 64,
    "global_batch_tokens": None,
    "steps": 1200,
    "samples": 76_800,
    "tokens": 15_000_000,
    "train_loss": 1.25,
    "eval_before": {"loss": 2.0, "perplexity": 7.389},
    "eval_after": {"loss": 1.5, "perplexity": 4.4817},
    "train_time_s": 600.0,
    "energy_j": 3.6e6,
    "data_digest": "0123456789abcdef",
    "weights_digest": None,
    "evaluation": None,
}
ENVIRONMENT = {"gpus": [{"name": "NVIDIA H200"}] * 2, "packages": {"distft": "0.1.0", "torch": "2.11.0", "wandb": "1"}}


def card_of(folder: Path, base: str, *, adapter: bool = True, **summary: Any) -> tuple[ModelCard, str]:
    """The card of a run with these figures, as the hub's library reads it, and its text."""
    run = RunFolder(folder / "my-run")
    result = run.adapter if adapter else run.model
    result.mkdir(parents=True)
    if adapter:
        (result / "adapter_config.json").write_text("{}")
    run.recipe.write_text(RECIPE.replace("BASE", base) + ("" if adapter else "lora: null\nquantization: null\n"))
    run.summary.write_text(json.dumps(SUMMARY | summary))
    run.environment.write_text(json.dumps(ENVIRONMENT))
    write_card(run, result)
    card = ModelCard.load(result / "README.md")
    return card, card.text


def test_metadata_are_those_of_the_hub(tmp_path: Path) -> None:
    card, _ = card_of(tmp_path, "meta-llama/Llama-2-7b-hf")
    found = card.data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == ("meta-llama/Llama-2-7b-hf", "adapter")
    assert found["datasets"] == ["databricks/databricks-dolly-15k"]
    assert (found["library_name"], found["pipeline_tag"]) == ("peft", "text-generation")
    (result,) = found["model-index"]
    assert result["name"] == "my-run"
    values = {metric["type"]: metric["value"] for each in result["results"] for metric in each["metrics"]}
    assert values == {"loss": 1.5, "perplexity": 4.4817}


def test_the_text_says_how_it_was_made_and_nothing_of_the_machine(tmp_path: Path) -> None:
    _, text = card_of(tmp_path, "meta-llama/Llama-2-7b-hf")
    for line in (
        "A LoRA adapter for `meta-llama/Llama-2-7b-hf`, trained on `databricks/databricks-dolly-15k` and `chats.jsonl` "
        "(76,800 samples, 15,000,000 tokens) with distft.",
        "| held-out loss | 2.0000 | 1.5000 |",
        "| recipe | `ddp_qlora`, sft |",
        "| template | Dolly's instructions and the tokenizer's chat template |",
        "| strategy | ddp, 2 processes |",
        "| global batch | 64 samples |",
        "| base weights | 4-bit |",
        "| digest of the texts | 0123456789abcdef |",
        "| hardware | 2 × NVIDIA H200 |",
        "| time | 10.0 minutes |",
        "| energy of the GPUs | 1.000 kWh |",
        "| packages | distft 0.1.0, torch 2.11.0 |",
    ):
        assert f"\n{line}\n" in f"\n{text}\n", line
    assert "secret-place" not in text and str(tmp_path) not in text
    assert "More Information Needed" not in text and "None" not in text


def test_emissions_follow_from_the_energy_and_what_the_user_says_of_electricity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, text = card_of(tmp_path / "plain", "org/base")
    assert "CO₂" not in text and "co2_eq_emissions" not in plain.data.to_dict()
    monkeypatch.setattr("tests.runs.test_card.RECIPE", RECIPE + "tracking: {co2_g_per_kwh: 380}\n")
    card, text = card_of(tmp_path / "told", "org/base")
    assert "| CO₂ of that energy | 380 g, at 380 g/kWh |" in text
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == 380
    _, text = card_of(tmp_path / "unmeasured", "org/base", energy_j=None)
    assert "CO₂" not in text


def test_figures_of_an_evaluation_have_their_intervals(tmp_path: Path) -> None:
    figure = {"title": "held-out perplexity", "form": ",.2f", "base": {"value": 7.4, "low": 7, "high": 8}}
    accuracy = {"title": "accuracy", "form": ".3f", "base": {"value": 0.5}, "adapter": {"value": 0.9}, "detail": True}
    figures = {"perplexity": figure | {"adapter": {"value": 4.5, "low": 4.2, "high": 4.8}}, "accuracy": accuracy}
    _, text = card_of(tmp_path, "org/base", evaluation={"perplexity": {"figures": figures}})
    assert "| held-out perplexity | 7.40 [7.00, 8.00] | 4.50 [4.20, 4.80] |" in text
    assert "accuracy" not in text, "details stay in the report"


@pytest.mark.parametrize("adapter", [True, False])
def test_a_base_in_a_folder_gives_its_name_and_its_licence(tmp_path: Path, adapter: bool) -> None:
    base = tmp_path / "models" / "my-base"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    card, text = card_of(tmp_path, str(base), adapter=adapter)
    found = card.data.to_dict()
    assert found["license"] == "apache-2.0" and "base_model" not in found
    assert "`my-base`" in text and str(tmp_path) not in text
    assert found["library_name"] == ("peft" if adapter else "transformers")
    assert ("AutoPeftModelForCausalLM" in text) == adapter
