"""The loss over pairs, its gradients and its metrics are those of TRL's `DPOTrainer`, padded and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from distft.config.preference import LOSS_TYPES, Preference
from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.data.checks import data_faults
from distft.data.pairs import sequences_of
from distft.data.prepare import prepare_data
from distft.data.splits import lengths_of
from distft.data.tokenize import IGNORED
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.models.loading import load_model, load_tokenizer
from distft.models.start import start_from_adapter
from distft.models.tiny import tiny_model
from distft.runs.folder import RunFolder
from distft.training.arguments import training_arguments
from distft.training.preference import FIGURES, KL, PreferenceTrainer, other_forwards, trainer_class
from distft.training.preference_loss import Pairs, pair_losses
from distft.training.trainer import build_trainer

RECIPE = (
    *("recipe=dpo", "strategy=single", "model.dtype=float32", "data.max_samples=40", "lora.lora_dropout=0.1"),
    *("batching.global_batch_size=4", "training.gradient_checkpointing=false"),
)
PADDED = ("batching.micro_batch=4", "batching.micro_batch_tokens=null")
PACKED = ("batching.micro_batch_tokens=4096",)
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in LOSS_TYPES},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "discopop": {"loss_type": "discopop", "discopop_tau": 0.5},
    "RPO": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.3},
    "forward KL": {"f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"f_divergence_type": "js_divergence", "loss_type": "ipo"},
    "α = 0.3": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "α = 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "LD-DPO": {"ld_alpha": 0.4},
    "WPO": {"use_weighting": True},
}
Learned = tuple[float, dict[str, torch.Tensor]]
Exact = Callable[[Preference], Learned]


def trainer_of(folder: Path, *overrides: str) -> PreferenceTrainer:
    """The trainer of a run, over an adapter that has learned something: B is not zero."""
    recipe = load_recipe([*RECIPE, *overrides], checks=(data_faults,))
    strategy = choose(recipe, World(), {}, Launcher())
    tokenizer = load_tokenizer(recipe)
    splits = prepare_data(recipe, tokenizer)
    plan = Plan(lengths_of(splits.train), recipe.batching, recipe.run.seed)
    model = load_model(recipe, strategy)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.005)
    model = start_from_adapter(model, recipe)
    arguments = training_arguments(recipe, strategy, RunFolder(folder), plan.accumulation(1, 1))
    return build_trainer(  # type: ignore[return-value]
        recipe,
        strategy,
        model,
        arguments,
        plan,
        tokenizer,
        splits,
        callbacks=[],
        changed=lambda line: None,
        create=trainer_class(recipe),
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    """Padded, with the whole global batch in one micro-batch, which the losses that sort see at once."""
    return trainer_of(tmp_path_factory.mktemp("ours"), *PADDED, "preference.use_weighting=true")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    return trainer_of(tmp_path_factory.mktemp("packed"), *PACKED, "preference.use_weighting=true")


@pytest.fixture(scope="module")
def theirs(ours: PreferenceTrainer, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    """TRL's trainer over a model of its own with the same weights."""
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    arguments = DPOConfig(
        str(tmp_path_factory.mktemp("theirs")),
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_weighting=True,
    )
    made = DPOTrainer(
        base,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=ours.processing_class,
        peft_config=LoraConfig(**{**load_recipe(RECIPE).lora, "task_type": "CAUSAL_LM"}),
    )
    missing = made.model.load_state_dict(ours.model.state_dict(), strict=True)
    assert not missing.missing_keys
    return made


@pytest.fixture(scope="module")
def exact(ours: PreferenceTrainer) -> Exact:
    """The loss of the first step and its gradients in fp64, one sequence at a time, by the chain rule over the
    log-probabilities of the answers. Transformers' norms compute in fp32, so PyTorch's take their place."""
    base = AutoModelForCausalLM.from_pretrained(str(tiny_model()), dtype=torch.float32)
    adapter = LoraConfig(**{**load_recipe(RECIPE).lora, "task_type": "CAUSAL_LM"})
    model = get_peft_model(base, adapter)
    model.load_state_dict(ours.model.state_dict(), strict=True)
    model.double().eval()
    for name, norm in [each for each in model.named_modules() if type(each[1]).__name__.endswith("RMSNorm")]:
        other = torch.nn.RMSNorm(len(norm.weight), norm.variance_epsilon, dtype=torch.float64)
        other.weight = norm.weight
        model.set_submodule(name, other)
    sequences = sequences_of([ours.train_dataset[index] for index in ours._plan.samples(0).tolist()])
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def answer(sequence: dict[str, Any]) -> torch.Tensor:
        labels = torch.tensor(sequence["labels"][1:])
        said = model(input_ids=torch.tensor([sequence["input_ids"]])).logits[0, :-1].log_softmax(-1)
        trained = labels != IGNORED
        return said[trained].gather(1, labels[trained, None]).sum()

    with torch.no_grad(), model.disable_adapter():
        reference = torch.stack([answer(sequence) for sequence in sequences])
    model.requires_grad_(False)
    for parameter in names.values():
        parameter.requires_grad_(True)
    answers = [answer(sequence) for sequence in sequences]
    assert answers[0].dtype == torch.float64
    slopes = [torch.autograd.grad(each, list(names.values())) for each in answers]
    tokens = torch.tensor([sum(label != IGNORED for label in each["labels"][1:]) for each in sequences])

    def computed(preference: Preference) -> Learned:
        found = torch.stack(answers).detach().requires_grad_(True)
        parts = [part[start::2] for part in (found, reference, tokens) for start in (0, 1)]
        likelihood = found[::2].sum() / tokens[::2].sum()
        loss = pair_losses(Pairs(*parts), preference).mean() - preference.likelihood_weight * likelihood
        (weights,) = torch.autograd.grad(loss, found)
        sums = [
            sum(weight * slope for weight, slope in zip(weights, of, strict=True)) for of in zip(*slopes, strict=True)
        ]
        return loss.item(), dict(zip(names, sums, strict=True))  # type: ignore[arg-type]

    return computed


def set_loss(ours: PreferenceTrainer, theirs: DPOTrainer, **fields: Any) -> None:
    ours._preference = Preference(**fields)
    defaults = {each.name: each.default for each in dataclasses.fields(DPOConfig)}
    names = fields.get("loss_type", "sigmoid")
    theirs.loss_types = [names] if isinstance(names, str) else names
    theirs.loss_weights = fields.get("loss_weights") or [1.0] * len(theirs.loss_types)
    theirs.args.discopop_tau = fields.get("discopop_tau", defaults["discopop_tau"])
    for name in Preference.model_fields.keys() & defaults.keys() - {"loss_type", "loss_weights", "discopop_tau"}:
        setattr(theirs, name, fields.get(name, defaults[name]))


def trl_rows(pairs: list[dict[str, Any]]) -> list[dict[str, list[int]]]:
    """Prepared pairs as TRL's collator takes them."""
    rows = []
    for chosen, rejected in (sequences_of([pair]) for pair in pairs):
        prompt = sum(label == IGNORED for label in chosen["labels"])
        assert prompt == sum(label == IGNORED for label in rejected["labels"])
        ids = chosen["input_ids"], rejected["input_ids"]
        rows.append({"prompt_ids": ids[0][:prompt], "chosen_ids": ids[0][prompt:], "rejected_ids": ids[1][prompt:]})
    return rows


def learned(model: Any, loss: torch.Tensor) -> Learned:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def apart(found: Learned, expected: Learned) -> float:
    """The norm of the difference of all gradients, relative to that of the expected ones."""
    assert found[1].keys() == expected[1].keys()
    difference = sum((found[1][name].double() - grad.double()).square().sum() for name, grad in expected[1].items())
    size = sum(grad.double().square().sum() for grad in expected[1].values())
    assert size > 0
    return float(difference / size) ** 0.5


def require_close(found: Learned, expected: Learned, tolerance: float = 1e-5) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert apart(found, expected) < tolerance


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *((way, name) for way in ("padded", "packed") for name in LOSSES),
    ],
)
def test_loss_gradients_and_metrics_are_trl_s(
    way: str, name: str, ours: PreferenceTrainer, packed: PreferenceTrainer, theirs: DPOTrainer, exact: Exact
) -> None:
    """Within 1e-5, and as near to fp64. A divergence with exponentials turns the rounding errors of TRL's sums of
    hundreds of nats into relative ones, which are up to 4e-5: there, it is within 1e-5 of fp64, and no further from
    TRL's than these errors."""
    trainer = ours if way == "padded" else packed
    set_loss(trainer, theirs, **LOSSES[name])
    pairs = [trainer.train_dataset[index] for index in trainer._plan.samples(0).tolist()]
    trainer.model.train()
    theirs.model.train()
    theirs._metrics["train"].clear()
    expected = learned(theirs.model, theirs.compute_loss(theirs.model, theirs.data_collator(trl_rows(pairs))))
    trainer._pair_sums.zero_()
    batch = trainer._collate(pairs)
    whole = trainer.step_sizes([batch])
    found = learned(trainer.model, trainer.compute_loss(trainer.model, batch, num_items_in_batch=whole))
    tolerance = 1e-5
    if name not in ("LD-DPO", "WPO"):  # which weigh single tokens
        computed = exact(trainer._preference)
        require_close(found, computed)
        assert apart(found, computed) < max(1.1 * apart(expected, computed), 5e-6)
        if "f_divergence_type" in LOSSES[name]:
            tolerance = max(tolerance, 1.5 * apart(expected, computed))
    require_close(found, expected, tolerance)
    logs = {"loss": 0.0}
    trainer.log(logs)
    for figure in FIGURES:
        (value,) = theirs._metrics["train"][figure]
        assert logs[figure] == pytest.approx(value, rel=1e-4, abs=1e-5), figure
    assert logs["entropy"] == pytest.approx(theirs._metrics["train"]["entropy"][0], rel=1e-4)


@pytest.mark.parametrize("fields", [{}, {"loss_type": ["ipo", "sft"]}, {"ld_alpha": 0.4}], ids=str)
def test_accumulation_is_exact(
    fields: dict[str, Any], ours: PreferenceTrainer, theirs: DPOTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Micro-batches of any size, and empty ones, add up to the loss of the whole batch."""
    set_loss(ours, theirs, **fields)
    ours.model.train()
    pairs = [ours.train_dataset[index] for index in ours._plan.samples(0).tolist()]

    def step(parts: list[list[dict[str, Any]]]) -> Learned:
        batches = [ours._collate(part) for part in parts]
        whole = ours.step_sizes(batches)
        assert whole[0] == len(pairs)
        losses = [ours.compute_loss(ours.model, each, num_items_in_batch=whole) for each in batches]
        return learned(ours.model, torch.stack(losses).sum())

    require_close(step([[], pairs[:1], pairs[1:]]), step([pairs]))


def test_the_reference_is_the_base_and_nothing_is_dropped_at_random(ours: PreferenceTrainer) -> None:
    """The adapter's B set to zero, the model is its own reference: rewards of exactly 0 where PEFT computes both."""
    batch = ours._collate([ours.train_dataset[index] for index in range(4)])
    ours._preference = Preference()
    ours.model.train()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in ours.model.named_parameters()}
    with torch.no_grad():
        for name, parameter in ours.model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        pairs, losses, *_ = ours._compare(ours.model, batch)
        for name, parameter in ours.model.named_parameters():
            parameter.copy_(before[name][1])
    assert pairs.chosen_ratio.abs().max() < 1e-4 and pairs.rejected_ratio.abs().max() < 1e-4
    torch.testing.assert_close(losses, torch.full_like(losses, 0.693147), rtol=1e-4, atol=1e-4)
    assert {name: p.requires_grad for name, p in ours.model.named_parameters()} == {n: b[0] for n, b in before.items()}


@torch.no_grad()
def test_kl_per_token_is_schulman_s_estimate_on_the_trained_tokens(
    ours: PreferenceTrainer, packed: PreferenceTrainer, theirs: DPOTrainer
) -> None:
    """From the logits of whole sequences, one at a time."""
    pairs = [ours.train_dataset[index] for index in ours._plan.samples(0).tolist()]
    terms = []
    for sequence in sequences_of(pairs):
        ids, labels = (torch.tensor([sequence[name]]) for name in ("input_ids", "labels"))
        trained = labels[0, 1:] != IGNORED
        own = theirs.model(input_ids=ids).logits.double().log_softmax(-1)
        with theirs.model.disable_adapter():
            base = theirs.model(input_ids=ids).logits.double().log_softmax(-1)
        apart = (base - own)[0, :-1].gather(1, ids[0, 1:, None])[trained]
        terms.append(apart.exp() - 1 - apart)
    expected = float(torch.cat(terms).mean())
    assert expected > 0
    for trainer in (ours, packed):
        trainer._preference = Preference()
        logs = {"loss": 0.0}
        trainer.model.train()
        trainer._pair_sums.zero_()
        trainer.compute_loss(trainer.model, trainer._collate(pairs))
        trainer.log(logs)
        assert logs[KL] == pytest.approx(expected, rel=1e-3)


def test_the_forward_of_the_reference_counts_for_the_mfu() -> None:
    assert other_forwards(load_recipe(RECIPE), 1) == 1 and other_forwards(load_recipe([]), 1) == 0


def test_an_evaluation_is_the_mean_over_all_pairs_however_they_are_divided(
    ours: PreferenceTrainer, packed: PreferenceTrainer
) -> None:
    for trainer in (ours, packed):
        trainer._preference = Preference(loss_type=["sigmoid", "sft"])
    found, other = (trainer.evaluate(trainer.eval_dataset) for trainer in (ours, packed))
    assert found["eval_pairs"] == len(ours.eval_dataset)
    for key in (f"eval_{name}" for name in ("loss", *FIGURES, KL)):
        assert found[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5)
    assert 0 <= found["eval_rewards/accuracies"] <= 1 and "eval_perplexity" not in found
