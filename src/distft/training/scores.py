"""How hard the base finds each training sample, for `data.order: loss`: scored once, before the run, and kept.

A score is the mean negative log-likelihood of a sample's trained tokens under the base as the recipe loads it. It
belongs to the sample by its content, and is kept in two places: in the run's folder, so that a resumed run has the same
order whatever happens to the cache, and in the cache, for other runs with this base. What neither has,
`distft.training.score_worker` computes under the run's strategy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from distft.config.recipe import Recipe
from distft.console import say
from distft.data.curriculum import sample_hashes
from distft.data.pieces import Array
from distft.distributed.collectives import broadcast, together
from distft.distributed.world import World
from distft.errors import DistftError
from distft.models.digest import contents
from distft.models.loading import model_path
from distft.paths import cache_folder
from distft.runs.folder import RunFolder
from distft.text import count
from distft.training.beside import Ended, run_beside

OUT_OF_MEMORY = 3
"""The exit code of a process that ran out of memory."""
CHUNK = 4_096
"""Samples that are scored before their scores are saved."""
_DECIMALS = 3
"""Of a score: the noise of another strategy or device then changes few of them."""
_SCORED, _CACHED = "scored", "cached"


@dataclass(frozen=True)
class Scores:
    """The score of each training sample in nats per token. The run has scored `scored` samples in `seconds`; `cached`
    scores were known from other runs."""

    nats: Array
    scored: int
    cached: int
    seconds: float


class ScoreFiles:
    """A folder of files with the scores of samples by their hashes. What was scored twice has the score that comes
    first in the order of the files' names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def wanted(self) -> Path:
        """The numbers of the training samples that are to be scored."""
        return self.folder / "wanted.npy"

    def add(self, hashes: Array, nats: Array, seconds: float = 0.0, kind: str = _SCORED) -> None:
        """Write scores, which took some `seconds`, to a file of their own."""
        name = f"{kind}-{hashlib.sha256(hashes.tobytes()).hexdigest()[:16]}.npz"
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}"
        with temporary.open("wb") as file:
            np.savez(file, hashes=hashes, nats=np.round(nats, _DECIMALS), seconds=seconds)
        temporary.replace(self.folder / name)

    def files(self, kind: str = "") -> list[Path]:
        return sorted(self.folder.glob(f"{kind}*.npz"))

    def find(self, hashes: Array) -> Array:
        """The score of each sample; NaN where there is none."""
        read = [(np.zeros(0, np.uint64), np.zeros(0))]
        for path in self.files():
            with np.load(path) as file:
                read.append((file["hashes"], file["nats"]))
        known, first = np.unique(np.concatenate([each for each, _ in read]), return_index=True)
        nats = np.concatenate([each for _, each in read])[first]
        found = np.full(len(hashes), np.nan)
        at = np.minimum(np.searchsorted(known, hashes), max(len(known) - 1, 0))
        if len(known):
            hit = known[at] == hashes
            found[hit] = nats[at[hit]]
        return found

    def tally(self, kind: str) -> tuple[int, float]:
        """The scores in files of this kind, and the seconds that they took."""
        number, seconds = 0, 0.0
        for path in self.files(kind):
            with np.load(path) as file:
                number, seconds = number + len(file["hashes"]), seconds + float(file["seconds"])
        return number, seconds


def base_scores(recipe: Recipe, samples: Any, folder: RunFolder, world: World) -> Scores:
    """The scores of the training `samples`. Rank 0 reads and writes them; all ranks enter, and get the same.

    Raises:
        DistftError: the base could not score the samples.
    """
    own = ScoreFiles(folder.scores)
    hashes = together(world, lambda: sample_hashes(samples) if world.is_main else np.zeros(0, np.uint64))

    def prepare() -> int:
        """Write down which samples are to be scored, and return their number."""
        missing = np.isnan(own.find(hashes))
        if missing.any() and (cache := _cache(recipe)) is not None:
            known = cache.find(hashes[missing])
            if len(found := np.flatnonzero(~np.isnan(known))):
                once, at = np.unique(hashes[missing][found], return_index=True)
                own.add(once, known[found][at], kind=_CACHED)
                missing = np.isnan(own.find(hashes))
        _, first = np.unique(hashes[missing], return_index=True)
        numbers = np.sort(np.flatnonzero(missing)[first])
        if len(numbers):
            folder.scores.mkdir(exist_ok=True)
            np.save(own.wanted, numbers)
        return len(numbers)

    missing = broadcast(together(world, lambda: prepare() if world.is_main else 0), world)
    if missing:
        _score(recipe, folder, world, missing)

    def collect() -> Scores | None:
        if not world.is_main:
            return None
        if missing:
            own.wanted.unlink()
            if (cache := _cache(recipe)) is not None:
                for file in own.files(_SCORED):
                    with np.load(file) as scores:
                        cache.add(scores["hashes"], scores["nats"])
        scored, seconds = own.tally(_SCORED)
        return Scores(own.find(hashes), scored, own.tally(_CACHED)[0], seconds)

    found = broadcast(together(world, collect), world)
    assert found is not None
    return found


def _cache(recipe: Recipe) -> ScoreFiles | None:
    """The scores in the cache of samples under the recipe's base as it is loaded; None while the base is not here."""
    folder = kept_for_base(recipe, "scores")
    return None if folder is None else ScoreFiles(folder)


def kept_for_base(recipe: Recipe, kind: str, adapter: str | None = None) -> Path | None:
    """The folder of the cache for what the recipe's base, as it is loaded, says of samples, with the `adapter` of that
    digest; None while the base is not here."""
    weights = contents(model_path(recipe), recipe.model.revision)
    if weights is None:
        return None
    key = {
        "weights": weights,
        "dtype": recipe.model.dtype,
        "precision": recipe.mixed_precision,
        "quantization": None if recipe.quantization is None else recipe.quantization.model_dump(),
        "new rows": [recipe.model.resize_embeddings, recipe.model.tokenizer, recipe.data.chat_template],
    }
    if adapter is not None:
        key["adapter"] = adapter
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / kind / name


def _score(recipe: Recipe, folder: RunFolder, world: World, missing: int) -> None:
    """Score what is wanted in processes beside these, which write to the run's folder. All ranks enter."""
    own = ScoreFiles(folder.scores)
    before = len(own.files(_SCORED))
    if world.is_main:
        say(f"scoring {count(missing, 'training sample')} with the base, once, for data.order=loss")
    key = "micro_batch" if recipe.batching.micro_batch_tokens is None else "micro_batch_tokens"
    words = [str(folder.path), f"recipe={folder.recipe}", f"batching.{key}={recipe.micro_batch}"]
    with tqdm(desc="scores", total=missing, unit=" samples", disable=None if world.is_main else True) as bar:

        def look() -> None:
            done = min((len(own.files(_SCORED)) - before) * CHUNK, missing) if world.is_main else 0
            bar.update(done - bar.n)

        ended = run_beside("distft.training.score_worker", words, world, look)
    check_scored(ended)


def check_scored(ended: Sequence[Ended]) -> None:
    """Raises:
    MemoryError: a process ran out of memory; what others say follows from that.
    DistftError: a process failed.
    """
    failed = sorted((each for each in ended if each.code), key=lambda each: each.code != OUT_OF_MEMORY)
    if not failed:
        return
    said = failed[0].output.rpartition("distft: ")[2].strip()  # its message, or else all that it printed
    if failed[0].code == OUT_OF_MEMORY:
        raise MemoryError(f"while the base scored the samples: {said}")
    raise DistftError(f"data.order=loss: the base could not score the samples: {said}")
