"""With the prompt of a pair once in a pack, the same tokens are scored, with the same loss, gradients and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distft.config.preference import Preference
from distft.config.recipe import load_recipe
from distft.data.checks import data_faults
from distft.data.loader import Collator
from distft.data.shared_prompts import shared_row, shared_tokens
from distft.data.tokenize import IGNORED
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.isolation import IsolationCheck, set_attention
from distft.models.loading import load_model, load_tokenizer
from distft.models.unpacked import UNPACKED, unpacked_attention
from distft.training.micro_batches import settle
from distft.training.preference import FIGURES, PreferenceTrainer

from .test_preference import PACKED, PADDED, RECIPE, learned, require_close, trainer_of

SHARED = (*PACKED, "batching.share_prompts=true")


def pair(prompt: int, chosen: int, rejected: int, start: int = 5) -> dict[str, Any]:
    """A pair with so many tokens of each part, all different."""
    ids = torch.arange(start, start + prompt + chosen + rejected).tolist()
    first, second = ids[: prompt + chosen], ids[:prompt] + ids[prompt + chosen :]
    labels = [[IGNORED] * prompt + each[prompt:] for each in (first, second)]
    return {"input_ids": first + second, "labels": labels[0] + labels[1], "chosen": len(first)}


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(
    "pairs",
    [[pair(4, 3, 2), pair(1, 1, 5, 40)], [pair(0, 3, 2), pair(6, 1, 1, 40)], []],
    ids=["all", "some", "empty"],
)
def test_what_is_scored_is_what_a_pack_without_sharing_scores(pairs: list[dict[str, Any]], multiple: int) -> None:
    plain = Collator(0, packed=True, multiple=multiple, for_head=True, pairs=True)(pairs)
    found = Collator(0, packed=True, multiple=multiple, for_head=True, pairs=True, shared=True)(pairs)
    assert found["targets"].tolist() == plain["targets"].tolist()
    assert found["counts"].tolist() == plain["counts"].tolist()
    trained = found["targets"][0] != IGNORED
    before = [batch["input_ids"].flatten()[batch["scored"]][trained] for batch in (found, plain)]
    at = [batch["position_ids"].flatten()[batch["scored"]][trained] for batch in (found, plain)]
    assert torch.equal(*before) and torch.equal(*at)
    assert found["input_ids"].shape[1] % multiple == 0
    keys = found["input_ids"][0][found["shared_keys"]]
    own = [each for row in pairs for each in row["input_ids"]]
    assert keys[: len(own)].tolist() == own, "each sequence has all its keys"


def test_the_prompt_is_in_the_row_once() -> None:
    row = shared_row([pair(4, 3, 2)], 0, 1)
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5]]
    assert row["cu_seq_lens_q"].tolist() == [0, 7, 9] and row["cu_seq_lens_k"].tolist() == [0, 7, 13]
    assert row["scored"].tolist() == [3, 4, 5, 3, 7] and (row["max_length_q"], row["max_length_k"]) == (7, 7)


def test_a_token_that_either_answer_trains_is_not_shared() -> None:
    first, second = {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, IGNORED, 3, 4]}, {"input_ids": [1, 2, 3, 5]}
    assert shared_tokens(first, second | {"labels": [IGNORED, IGNORED, 3, 5]}) == 2
    assert shared_tokens(first, {"input_ids": [1], "labels": [IGNORED]}) == 0, "each keeps a token of its own"


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}, {"softcap": 5.0}], ids=["plain", "window", "cap"])
def test_attention_over_shared_keys_is_that_over_whole_sequences(options: dict[str, Any]) -> None:
    row = shared_row([pair(4, 3, 2), pair(2, 1, 4, 30)], 0, 8)
    generator = torch.Generator().manual_seed(0)
    width, keys = row["input_ids"].shape[1], row["shared_keys"]
    q, k, v = (torch.randn(1, heads, width, 8, generator=generator) for heads in (4, 2, 2))
    names = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "shared_keys")
    module = torch.nn.Identity()
    found, _ = unpacked_attention(module, q, k, v, None, **{name: row[name] for name in names}, **options)
    whole = {"cu_seq_lens_q": row["cu_seq_lens_k"], "max_length_q": row["max_length_k"]}
    expected, _ = unpacked_attention(module, *(each[:, :, keys] for each in (q, k, v)), None, **whole, **options)
    own = [
        at
        for end, size in zip(row["cu_seq_lens_k"][1:], row["cu_seq_lens_q"].diff(), strict=True)
        for at in range(int(end - size), int(end))
    ]
    torch.testing.assert_close(found[0], expected[0, own])


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    return trainer_of(tmp_path_factory.mktemp("padded"), *PADDED, "preference.use_weighting=true")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> PreferenceTrainer:
    made = trainer_of(tmp_path_factory.mktemp("shared"), *SHARED, "preference.use_weighting=true")
    assert set_attention(made.model, UNPACKED)
    return made


@pytest.mark.parametrize(
    "fields", [{}, {"loss_type": ["ipo", "sft"]}, {"ld_alpha": 0.4}, {"use_weighting": True}], ids=str
)
def test_loss_gradients_and_metrics_are_those_of_padded_pairs(
    fields: dict[str, Any], padded: PreferenceTrainer, shared: PreferenceTrainer
) -> None:
    pairs = [padded.train_dataset[index] for index in padded._plan.samples(0).tolist()]
    found, logs, widths = [], [], []
    for trainer in (padded, shared):
        trainer._preference = Preference(**fields)
        trainer.model.train()
        trainer._pair_sums.zero_()
        batch = trainer._collate(pairs)
        whole = trainer.step_sizes([batch])
        found.append(learned(trainer.model, trainer.compute_loss(trainer.model, batch, num_items_in_batch=whole)))
        logs.append({"loss": 0.0})
        trainer.log(logs[-1])
        widths.append(batch["input_ids"].numel())
    require_close(found[1], found[0])
    for figure in ("entropy", *FIGURES):
        assert logs[1][figure] == pytest.approx(logs[0][figure], rel=1e-4, abs=1e-5), figure
    assert widths[1] < widths[0]


def test_a_run_shares_prompts_only_where_its_model_computes_them_right(tmp_path: Path) -> None:
    def settled(*overrides: str) -> Any:
        recipe = load_recipe([*RECIPE, *overrides], checks=(data_faults,))
        strategy = choose(recipe, World(), {}, Launcher())
        tokenizer = load_tokenizer(recipe)
        return settle(load_model(recipe, strategy), recipe, strategy, tokenizer, [100])  # type: ignore[arg-type]

    shared = settled(*SHARED)
    assert shared.facts["attn_implementation"] == UNPACKED and shared.facts["share_prompts"] is True
    assert shared.recipe.shares_prompts is True and shared.notes == []
    automatic = settled(*PACKED)
    assert automatic.facts["share_prompts"] is False and automatic.notes == [], "no kernel on this machine takes it"
    with pytest.raises(ModelError, match="share_prompts=true: sdpa"):
        settled(*SHARED, "model.attn_implementation=sdpa")


def test_the_check_finds_a_second_answer_that_does_not_see_the_prompt(shared: PreferenceTrainer) -> None:
    collate = Collator(0, packed=True, for_head=True, pairs=True, shared=True)
    check = IsolationCheck(shared.model)
    assert check.sharing_fault(collate) is None
    set_attention(shared.model, "sdpa")
    fault = check.sharing_fault(collate)
    set_attention(shared.model, UNPACKED)
    assert fault is not None and "differ" in fault
