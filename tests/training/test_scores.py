"""Scores for `data.order: loss`: they are the base's, belong to samples by content, and are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distft.config.recipe import load_recipe
from distft.data.curriculum import sample_hashes
from distft.data.prepare import prepare_data
from distft.distributed.world import World
from distft.errors import DistftError, ModelError
from distft.evaluation.likelihood import trained_log_likelihoods
from distft.files import write_atomically
from distft.runs.folder import RunFolder
from distft.training import scores
from distft.training.beside import Ended
from distft.training.score_worker import score
from distft.training.scores import ScoreFiles, base_scores, check_scored

WORDS = (
    *("recipe=tiny", "strategy=single", "quantization=null", "data.max_samples=20", "data.order=loss"),
    *("training.completion_only_loss=true", "batching.global_batch_size=8"),
)
WAYS = {
    "padded": ("batching.micro_batch=4",),
    "packed": ("batching.micro_batch_tokens=300",),
    "pissa": ("lora.init_lora_weights=pissa",),
    "random adapter": ("lora.init_lora_weights=false", "lora.lora_dropout=0.5"),
    "no adapter": ("lora=null",),
}


def use_cache(cache: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a new cache that has the tiny model, and no scores."""
    cache.mkdir()
    (cache / tiny.name).symlink_to(tiny)
    monkeypatch.setenv("DISTFT_CACHE", str(cache))


@pytest.fixture(autouse=True)
def own_cache(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(tmp_path / "cache", tiny, monkeypatch)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # accelerate leaves that of the last trainer


def samples_of(tokenizer: Any, *words: str) -> Any:
    return prepare_data(load_recipe([*WORDS, *words]), tokenizer).train


def run_folder(path: Path, *words: str) -> RunFolder:
    folder = RunFolder(path)
    write_atomically(folder.recipe, load_recipe([*WORDS, *words]).to_yaml())
    return folder


def score_all(folder: RunFolder, samples: Any, tmp_path: Path) -> ScoreFiles:
    """Score all samples of a run, in another order, in this process."""
    files = ScoreFiles(folder.scores)
    folder.scores.mkdir()
    np.save(files.wanted, np.arange(len(samples))[::-1])
    score(folder.path, [f"recipe={folder.recipe}"], tmp_path / "trainer")
    return files


@pytest.mark.parametrize("way", WAYS)
def test_a_score_is_the_mean_loss_of_the_base_over_trained_tokens(
    way: str, tiny: Path, tokenizer: Any, tmp_path: Path
) -> None:
    samples = samples_of(tokenizer, *WAYS[way])
    base = AutoModelForCausalLM.from_pretrained(tiny).eval()
    with torch.no_grad():
        found = trained_log_likelihoods(
            base, list(samples["input_ids"]), list(samples["labels"]), tokenizer.pad_token_id, torch.device("cpu")
        )
    expected = [
        -nats / sum(label != -100 for label in labels[1:])
        for nats, labels in zip(found, samples["labels"], strict=True)
    ]
    folder = run_folder(tmp_path / "run", *WAYS[way])
    files = score_all(folder, samples, tmp_path)
    assert files.find(sample_hashes(samples)) == pytest.approx(expected, abs=1e-3)
    assert files.tally("scored")[0] == len(samples)
    assert len(np.unique(expected)) == len(samples), "samples differ, so that a wrong order would be seen"


def test_what_was_scored_is_not_scored_again(
    tiny: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same run without the cache, and by another run with it."""
    recipe = load_recipe(WORDS)
    samples = samples_of(tokenizer)
    score_all(run_folder(tmp_path / "first"), samples, tmp_path)

    def refuse(*_: Any) -> None:
        raise AssertionError("it starts processes that score")

    monkeypatch.setattr(scores, "run_beside", refuse)
    first = base_scores(recipe, samples, RunFolder(tmp_path / "first"), World())
    assert (first.scored, first.cached) == (len(samples), 0)
    assert first.seconds > 0
    cache = scores._cache(recipe)
    assert cache is not None
    cache.add(sample_hashes(samples), first.nats)
    second = base_scores(recipe, samples, run_folder(tmp_path / "second"), World())
    assert (second.scored, second.cached, second.seconds) == (0, len(samples), 0)
    assert second.nats.tolist() == first.nats.tolist()
    use_cache(tmp_path / "empty", tiny, monkeypatch)
    for name in ("first", "second"):
        again = base_scores(recipe, samples, RunFolder(tmp_path / name), World())
        assert again.nats.tolist() == first.nats.tolist()
        assert again.scored == (len(samples) if name == "first" else 0)
    repeated = samples.select([3, 3, 0])
    assert base_scores(recipe, repeated, RunFolder(tmp_path / "first"), World()).nats.tolist() == [
        *first.nats[[3, 3, 0]].tolist()
    ]
    with pytest.raises(AssertionError, match="starts processes"):
        base_scores(recipe, samples, run_folder(tmp_path / "third"), World())


def test_scores_of_another_base_are_others(tmp_path: Path, tiny: Path) -> None:
    """The cache tells bases apart by their content and by how they are loaded, and not by their folder."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    caches = [
        scores._cache(load_recipe([*WORDS, *words]))
        for words in ((), (f"model.name={other}",), ("model.dtype=bfloat16",), ("data.chat_template=chatml",))
    ]
    places = [cache.folder for cache in caches if cache is not None]
    assert places[0] == places[1]
    assert len({*places}) == 3
    model = AutoModelForCausalLM.from_pretrained(other)
    model.get_input_embeddings().weight.data[5] += 1
    model.save_pretrained(other)
    changed = scores._cache(load_recipe([*WORDS, f"model.name={other}"]))
    assert changed is not None
    assert changed.folder not in places


def test_a_base_that_cannot_score_is_an_error_with_its_reason(tiny: Path, tokenizer: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.get_output_embeddings().weight.data[:] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    words = (f"model.name={tmp_path / 'broken'}",)
    folder = run_folder(tmp_path / "run", *words)
    folder.scores.mkdir()
    np.save(ScoreFiles(folder.scores).wanted, np.arange(3))
    with pytest.raises(
        ModelError, match="the base's log-likelihoods are NaN or infinite, so samples cannot be ordered"
    ):
        score(folder.path, [f"recipe={folder.recipe}"], tmp_path / "trainer")
    assert ScoreFiles(folder.scores).files() == []


def test_the_first_reason_of_processes_that_fail_is_told() -> None:
    """Out of memory goes before what other processes say because of it, and can lower the micro-batch."""
    lost, memory = Ended(1, "Traceback\nconnection lost"), Ended(3, "warning\ndistft: tried to allocate 2.00 GiB\n")
    check_scored([Ended(0, "distft: fine"), Ended(None, "ended from here")])
    with pytest.raises(DistftError, match=r"data.order=loss: the base could not score the samples: Traceback"):
        check_scored([Ended(None, ""), lost])
    with pytest.raises(MemoryError, match=r"while the base scored the samples: tried to allocate 2.00 GiB$"):
        check_scored([lost, memory])
    with pytest.raises(DistftError, match="killed"):
        check_scored([Ended(-9, "killed")])
