"""What the reference says of all pairs, computed once, stands in for the pass over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distft.config.preference import Preference
from distft.config.recipe import load_recipe
from distft.data.checks import data_faults
from distft.data.curriculum import sample_hashes
from distft.errors import RecipeError
from distft.training.preference import PreferenceTrainer
from distft.training.reference_log_probs import WithReference, precomputes, read_log_probs, write_log_probs

from .test_preference import PACKED, PADDED, RECIPE, learned, require_close, trainer_of

AUTO = "preference.precompute_ref_log_probs=auto"


class Gone:
    """A reference that cannot be computed any more."""

    def on(self, model: Any, accelerator: Any) -> Any:
        raise AssertionError("the reference is known")


def known_to(trainer: PreferenceTrainer) -> WithReference:
    """The training pairs with what the reference says of them, which the trainer knows from now on."""
    samples: Any = trainer.train_dataset
    found, known = trainer.reference_log_probs(samples), trainer.expect_reference()
    known.update(zip(sample_hashes(samples).tolist(), found, strict=True))
    trainer._reference = Gone()
    return WithReference(samples, known)


@pytest.mark.parametrize("way", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("fields", [{}, {"ld_alpha": 0.4}], ids=str)
def test_the_loss_is_that_of_a_reference_computed_on_the_way(
    fields: dict[str, Any], way: tuple[str, ...], tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, *way)
    trainer._preference = Preference(**fields)

    def step(rows: list[dict[str, Any]]) -> Any:
        batches = [trainer._collate(part) for part in (rows[:1], [], rows[1:])]
        whole = trainer.step_sizes(batches)
        trainer.model.train()
        losses = [trainer.compute_loss(trainer.model, each, num_items_in_batch=whole) for each in batches]
        return learned(trainer.model, torch.stack(losses).sum())

    numbers = trainer._plan.samples(0).tolist()
    expected = step([trainer.train_dataset[index] for index in numbers])
    require_close(step(known_to(trainer).__getitems__(numbers)), expected)


def test_without_an_adapter_the_reference_is_the_model_before_its_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, *PACKED, "lora=null", AUTO)
    rows = known_to(trainer).__getitems__([0, 1, 2, 3])

    def reward() -> float:
        with torch.no_grad():
            return float(trainer._compare(trainer.model, trainer._collate(rows)).pairs.chosen_ratio.abs().max())

    before = reward()
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(1.1)
    assert before < 1e-4 < reward()


def test_what_is_known_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = {7: np.array([-1.5, -0.25], np.float32), 2**63 + 1: np.zeros(0, np.float32), 3: np.ones(1, np.float32)}
    write_log_probs(tmp_path / "folder" / "reference.npz", known)
    found = read_log_probs([tmp_path / "folder" / "reference.npz", tmp_path / "missing.npz"])
    assert {key: values.tolist() for key, values in found.items()} == {7: [-1.5, -0.25], 2**63 + 1: [], 3: [1.0]}
    write_log_probs(tmp_path / "none.npz", {})
    assert read_log_probs([tmp_path / "none.npz"]) == {}


@pytest.mark.parametrize(
    ("words", "epochs", "expected"),
    [((AUTO,), 1, False), ((AUTO,), 2, True), (("lora=null", AUTO), 1, True), ((), 2, False)],
    ids=str,
)
def test_it_is_computed_before_where_that_saves_work_or_is_the_only_way(
    words: tuple[str, ...], epochs: int, expected: bool
) -> None:
    assert precomputes(load_recipe([*RECIPE, *words], checks=(data_faults,)), epochs) is expected


def test_without_an_adapter_it_has_to_be_computed_before() -> None:
    with pytest.raises(RecipeError, match="the reference is gone after the first step"):
        load_recipe([*RECIPE, "lora=null"])
