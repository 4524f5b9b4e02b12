"""KTO and ORPO: loss, gradients and metrics are those of TRL's trainers, padded and packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from distft.config.preference import Preference
from distft.config.recipe import load_recipe
from distft.data.pairs import sequences_of
from distft.data.tokenize import IGNORED
from distft.models.tiny import tiny_model
from distft.training.preference import other_forwards
from distft.training.rated import RatedTrainer

from .test_preference import PACKED, PADDED, RECIPE, learned, require_close, trainer_of

KTO = ("preference.loss_type=kto", "data.name=tiny_ratings", "data.validation_fraction=0.4")
ORPO = ("preference.loss_type=orpo",)
WAYS = {"padded": PADDED, "packed": PACKED}


def trl_s(kind: type, config: type, folder: Path, ours: Any, **row: Any) -> Any:
    """TRL's trainer over a model of its own with the weights of `ours`."""
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    arguments = config(str(folder), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    made = kind(
        base,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", **row}] * 2),
        processing_class=ours.processing_class,
        peft_config=LoraConfig(**{**load_recipe(RECIPE).lora, "task_type": "CAUSAL_LM"}),
    )
    made.model.load_state_dict(ours.model.state_dict(), strict=True)
    made.model.train()
    return made


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RatedTrainer]:
    """Over an adapter that likes all answers more than the base does: the estimate of KL is positive."""
    found = {name: trainer_of(tmp_path_factory.mktemp(name), *KTO, *way) for name, way in WAYS.items()}
    for trainer in found.values():
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.neg_()
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def kto(rated: dict[str, RatedTrainer], tmp_path_factory: pytest.TempPathFactory) -> KTOTrainer:
    return trl_s(KTOTrainer, KTOConfig, tmp_path_factory.mktemp("kto"), rated["padded"], completion="b", label=True)


def step_of(trainer: Any) -> list[dict[str, Any]]:
    return [trainer.train_dataset[index] for index in trainer._plan.samples(0).tolist()]


def trained(trainer: Any, parts: list[list[dict[str, Any]]]) -> tuple[Any, dict[str, float]]:
    """The loss, the gradients and the logged metrics of a step of these micro-batches."""
    trainer._pair_sums.zero_()
    trainer.model.train()
    if isinstance(trainer, RatedTrainer):
        trainer._kl = trainer._estimate(trainer.train_dataset, trainer._plan.samples(0).tolist())
    batches = [trainer._collate(part) for part in parts]
    whole = trainer.step_sizes(batches)
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=whole) for batch in batches]
    found = learned(trainer.model, torch.stack(losses).sum())
    logs = {"loss": 0.0}
    trainer.log(logs)
    return found, logs


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "fields",
    [{}, {"beta": 0.5, "desirable_weight": 0.7, "undesirable_weight": 1.3}, {"loss_type": "apo_zero_unpaired"}],
    ids=str,
)
def test_kto_is_trl_s(
    way: str, fields: dict[str, Any], rated: dict[str, RatedTrainer], kto: KTOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, preference = rated[way], Preference(**{"loss_type": "kto", **fields})
    monkeypatch.setattr(trainer, "_preference", preference)
    kto.loss_type, kto.calculate_KL = preference.loss_type, preference.loss_type == "kto"
    kto.beta = preference.beta
    kto.desirable_weight, kto.undesirable_weight = preference.desirable_weight, preference.undesirable_weight
    rows = step_of(trainer)
    assert {row["chosen"] > 0 for row in rows} == {True, False}
    prompts = [sum(label == IGNORED for label in row["labels"]) for row in rows]
    answers = [row["input_ids"][prompt:] for row, prompt in zip(rows, prompts, strict=True)]
    examples = [
        {"prompt_ids": row["input_ids"][:prompt], "completion_ids": answer, "label": row["chosen"] > 0}
        for row, prompt, answer in zip(rows, prompts, answers, strict=True)
    ]
    if kto.calculate_KL:
        for example, other in zip(examples, [answers[-1], *answers], strict=False):
            example["KL_completion_ids"] = other
    kto._metrics["train"].clear()
    expected = learned(kto.model, kto.compute_loss(kto.model, kto.data_collator(examples)))
    found, logs = trained(trainer, [rows])
    require_close(found, expected)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "kl",
        "entropy",
    ):
        (value,) = kto._metrics["train"][name]
        assert logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert (logs["kl"] > 0) == kto.calculate_KL
    divided, logged = trained(trainer, [[], rows[:1], rows[1:]])
    require_close(divided, found)
    assert logged == pytest.approx(logs, rel=1e-4, abs=1e-6), "the estimate of KL is that of the global batch"


def test_an_evaluation_of_kto_is_over_the_whole_split(rated: dict[str, RatedTrainer]) -> None:
    found, other = (trainer.evaluate(trainer.eval_dataset) for trainer in rated.values())
    assert found["eval_answers"] == len(rated["padded"].eval_dataset)
    for name in RatedTrainer.figures:
        assert found[f"eval_{name}"] == pytest.approx(other[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    assert found["eval_rewards/margins"] == pytest.approx(found["eval_rewards/chosen"] - found["eval_rewards/rejected"])


@pytest.mark.parametrize("way", WAYS)
def test_orpo_is_trl_s(way: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path / way, *ORPO, "preference.beta=0.3", *WAYS[way])
    theirs = trl_s(ORPOTrainer, ORPOConfig, tmp_path / "theirs", trainer, chosen=" b", rejected=" c")
    theirs.beta = 0.3
    rows = step_of(trainer)
    inputs = {}
    for name, sequences in zip(
        ("chosen", "rejected"), (sequences_of(rows)[::2], sequences_of(rows)[1::2]), strict=True
    ):
        parts = {"input_ids": ("input_ids", 0), "labels": ("labels", IGNORED)}
        for part, (key, fill) in parts.items():
            lists = [torch.tensor(each[key]) for each in sequences]
            inputs[f"{name}_{part}"] = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=fill)
        ones = [torch.ones(len(each["input_ids"]), dtype=torch.long) for each in sequences]
        inputs[f"{name}_attention_mask"] = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True)
    expected = learned(theirs.model, theirs.compute_loss(theirs.model, inputs))
    found, logs = trained(trainer, [rows])
    require_close(found, expected)
    for name in trainer.measured:
        (value,) = theirs._stored_metrics["train"][name]
        assert logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    require_close(trained(trainer, [[], rows[:1], rows[1:]])[0], found)
    metrics = trainer.evaluate(trainer.eval_dataset)
    assert metrics["eval_loss"] == pytest.approx(
        metrics["eval_nll_loss"] - 0.3 * metrics["eval_log_odds_ratio"], rel=1e-5
    )


def test_the_passes_of_other_models_and_answers_count_for_the_mfu() -> None:
    forwards = [other_forwards(load_recipe([*RECIPE, *words]), 1) for words in (KTO, ORPO)]
    assert forwards == [3, 0]
