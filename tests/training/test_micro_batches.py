"""A run computes its micro-batches in a way that is right for its model, and refuses a named way that is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.api.in_process import train_here
from distft.config.recipe import load_recipe
from distft.data.batch_plan import Plan
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.checks import model_faults
from distft.models.loading import load_model, load_tokenizer
from distft.models.unpacked import UNPACKED
from distft.runs.folder import RunFolder
from distft.training.batch_size_worker import probe_recipe, setup_probe
from distft.training.checkpoints import read_tensors
from distft.training.micro_batches import Settled, padded, settle
from distft.training.setup import setup_data, setup_strategy

from ..models.families import saved

PACKS = "batching.micro_batch_tokens=600"
RUN = (
    *("recipe=tiny", "strategy=single", "quantization=null", "lora.lora_dropout=0", "data.max_samples=24"),
    *("training.max_steps=2", "training.logging_steps=1", "training.eval_strategy=no", "training.save_strategy=no"),
    *("evaluation.before_and_after=false", "tracking.report_to=[]", "batching.global_batch_size=8"),
    *("training.warmup_steps=0", "training.optim=sgd", "training.lr_scheduler_type=constant"),
)
LENGTHS = np.array([150, 40, 90, 60] * 8)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model of a family."""
    folders: dict[str, Path] = {}

    def find(family: str) -> Path:
        if family not in folders:
            folders[family] = saved(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return find


def settled(*words: str) -> tuple[Settled, Any]:
    """What a run of a recipe settles, and its model."""
    recipe = load_recipe([*RUN, *words])
    strategy = choose(recipe, World(), {}, Launcher())
    model = load_model(recipe, strategy)
    return settle(model, recipe, strategy, load_tokenizer(recipe), LENGTHS), model


def test_what_is_right_stays_as_the_recipe_has_it() -> None:
    found, model = settled(PACKS)
    assert found.notes == [] and found.recipe.batching.micro_batch_tokens == 600
    assert found.facts["attn_implementation"] == model.config._attn_implementation == "sdpa"
    assert found.facts["fused_linears"] == found.facts["adapted_linears"] == 28


def test_layers_whose_experts_are_in_grouped_products_are_counted(folder_of: Callable[[str], Path]) -> None:
    words = [PACKS, f"model.name={folder_of('mixtral')}", "lora.target_modules=[q_proj, v_proj]"]
    counts = ("fused_linears", "adapted_linears", "fused_expert_layers", "expert_layers")
    found, _ = settled(*words)
    assert [found.facts[name] for name in counts] == [4, 4, 2, 2]
    found, _ = settled(*words, "model.kernels=plain")
    assert [found.facts[name] for name in counts] == [0, 4, 0, 2]


@pytest.mark.parametrize(
    ("family", "attention", "settled_on"),
    [("bloom", "eager", "eager"), ("gpt_oss", "eager", UNPACKED), ("jamba", "sdpa", "sdpa")],
)
def test_a_model_that_mixes_the_samples_of_a_pack_is_trained_otherwise(
    family: str,
    attention: str,
    settled_on: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Padded, or unpacked for attention: with the samples, the steps and so the updates that padding gives."""
    monkeypatch.chdir(tmp_path)
    # The auxiliary loss of experts depends on the micro-batches (docs/models.md).
    model = [f"model.name={folder_of(family)}", "lora.target_modules=all-linear", "training.router_aux_loss_coef=0"]
    runs = [
        RunFolder(train_here([*RUN, *model, f"run.name={name}", *words], 0))
        for name, words in {"packs": [PACKS], "padded": ["batching.micro_batch=2", "model.kernels=plain"]}.items()
    ]
    packs, plain = (run.read_summary() for run in runs)
    if settled_on == UNPACKED:
        assert packs["micro_batch_tokens"] == 600
    else:
        assert packs["micro_batch_tokens"] is None and packs["micro_batch"] > 1
    assert (packs["attn_implementation"], plain["attn_implementation"]) == (settled_on, attention)
    note, *others = packs["changed_for_you"]
    unreached = "no gradient reaches the adapters on dt_proj, so they are not trained"
    assert others == plain["changed_for_you"] == ([unreached] if family == "jamba" else [])
    if settled_on == UNPACKED:
        assert f"computes packs with {UNPACKED} attention, because" in note
    else:
        assert f"computes padded rows with {attention} attention" in note and "the same global batch" in note
    assert f"packs with {attention} attention" in note and "the logits of two samples differ by" in note
    ours, theirs = ([record for record in run.read_metrics() if "loss" in record] for run in runs)
    for key in ("loss", "grad_norm"):
        assert [record[key] for record in ours] == pytest.approx([record[key] for record in theirs], rel=1e-5)
    adapters = [read_tensors(run.adapter) for run in runs]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-4, atol=1e-7)


def test_a_named_way_that_is_wrong_is_refused(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError) as raised:
        settled(f"model.name={folder_of('jamba')}", "model.attn_implementation=sdpa", PACKS)
    text = str(raised.value)
    assert raised.value.exit_code == 2 and not raised.value.restart
    assert "model.attn_implementation=sdpa is wrong" in text and "packs with sdpa attention: the logits" in text
    assert "set model.attn_implementation=auto" in text and "batching.micro_batch_tokens=null" in text


def test_a_model_that_reads_packed_weights_itself_is_told_to_leave_them_unpacked(
    folder_of: Callable[[str], Path],
) -> None:
    quantized = ("quantization={load_in_4bit: true}", "lora.target_modules=[in_proj]")
    with pytest.raises(ModelError, match=r"knows no way to train .*; set quantization=null"):
        settled(f"model.name={folder_of('mamba')}", *quantized, PACKS)


def test_a_model_without_sdpa_gets_eager_attention(folder_of: Callable[[str], Path]) -> None:
    found, model = settled(f"model.name={folder_of('gptj')}", "lora.target_modules=all-linear", PACKS)
    assert model.config._attn_implementation == found.facts["attn_implementation"] == "eager"
    named = (f"model.name={folder_of('gptj')}", "model.attn_implementation=sdpa")
    with pytest.raises(ModelError, match=r"has no sdpa attention; set model\.attn_implementation=auto"):
        settled(*named)
    (fault,) = model_faults(load_recipe([*RUN, *named, "lora.target_modules=all-linear"])).faults
    assert fault.key == "model.attn_implementation" and "has no sdpa attention" in fault.problem


@pytest.mark.parametrize(
    ("tokens", "sizes", "world", "expected"),
    [
        (600, {"global_batch_size": 32}, 1, 4),  # 4 · 150 = 600
        (700, {"global_batch_size": 12}, 2, 3),  # 4 would fit, and does not divide 6
        (150, {"global_batch_size": 32}, 4, 1),
        (1_000, {"global_batch_size": None, "global_batch_tokens": 4_000}, 2, 6),
        (600, {"global_batch_size": 7}, 2, 3),
        (600, {"global_batch_size": 1}, 2, 1),
    ],
)
def test_padded_micro_batches_take_no_more_tokens_than_packs(
    tokens: int, sizes: dict[str, Any], world: int, expected: int
) -> None:
    words = [f"batching.{key}={'null' if value is None else value}" for key, value in sizes.items()]
    recipe = load_recipe(["recipe=tiny", *words, f"batching.micro_batch_tokens={tokens}"])
    found = padded(recipe, LENGTHS, world)
    assert found.batching.micro_batch_tokens is None and found.batching.micro_batch == expected
    plans = [Plan(LENGTHS, each.batching) for each in (recipe, found)]
    assert plans[0].steps == plans[1].steps
    for step in range(2 * plans[0].steps):
        assert plans[0].samples(step).tolist() == plans[1].samples(step).tolist()
        divided = [index for ranks in plans[1].micro_batches(step, world) for rows in ranks for index in rows]
        assert sorted(divided) == sorted(plans[0].samples(step).tolist())


def test_the_search_for_a_micro_batch_pads_as_the_run_will(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*RUN, f"model.name={folder_of('bloom')}", "lora.target_modules=all-linear", PACKS]
    recipe = load_recipe(words)
    strategy = setup_strategy(recipe, Launcher())
    data = setup_data(recipe, strategy)
    tried: list[int] = []

    def remember(sizes: Sequence[int]) -> list[Any]:
        tried.extend(sizes)
        return []

    probe = setup_probe(probe_recipe(words), strategy, data, RunFolder(tmp_path), remember)
    longest = int(data.lengths.max())
    shapes = [batch["input_ids"].shape for batch in probe.get_train_dataloader()]
    assert {shape[1] for shape in shapes} == {longest}
    assert shapes[-1][0] == padded(recipe.with_micro_batch(tried[-1]), data.lengths, 1).micro_batch > 1


def test_the_check_changes_nothing_that_is_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of runs with and without it are equal to the bit."""
    monkeypatch.chdir(tmp_path)
    words = [*RUN, PACKS, "training.optim=adamw_torch", "lora.lora_dropout=0.1"]
    checked = RunFolder(train_here([*words, "run.name=checked"], 0))
    facts = {"attn_implementation": "sdpa", "fused_linears": 28, "adapted_linears": 28}
    monkeypatch.setattr("distft.training.setup.settle", lambda model, recipe, *_: Settled(recipe, [], facts))
    without = RunFolder(train_here([*words, "run.name=without"], 0))
    assert json.loads(checked.summary.read_text())["isolation_errors"]["logits"] < 1e-5
    assert (checked.adapter / "adapter_model.safetensors").read_bytes() == (
        without.adapter / "adapter_model.safetensors"
    ).read_bytes()
