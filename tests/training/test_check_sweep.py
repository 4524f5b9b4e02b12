"""Whatever value a key has, a command ends with 0, or with 2 and one message: never with a traceback.

Every run of the tests takes a sample of the keys. `python -m pytest -m thorough tests/training/test_check_sweep.py`
takes all of them: 2,800 cases, each checked with `--deep`, and two steps of training with what is valid.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from distft.api.check import check_words
from distft.api.in_process import train_here
from distft.errors import BadNumbersError, RecipeError

from .sweep import Case, Outcome, cases, fields, outcome_of

BASE = ("recipe=tiny", "data.max_samples=48", "tracking.report_to=[]")
TWO_STEPS = (
    *BASE,
    "training.max_steps=2",
    "training.warmup_steps=0",
    "training.eval_strategy=no",
    "training.save_strategy=no",
    "evaluation.before_and_after=false",
    "run.dir=out",
)
TRAINED = ("model.", "quantization.", "lora.", "batching.", "training.")
"""Keys that a run reads once it has its weights."""
SLOW = ("training.torch_compile", "training.dataloader_num_workers", "training.max_steps", "training.num_train_epochs")
DIVERGE = ("lora.lora_alpha", "training.learning_rate", "training.label_smoothing_factor")
"""Keys that multiply what is learned: with a huge value, training diverges."""
ALSO_WITHOUT_QUOTES = ("slurm.time", "slurm.mem", "training.trackio_static_space_id")
"""Text keys for which a number is text as well, and one that takes `false`, which is 0."""


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[Path]:
    """A working folder and a cache of their own: the cases prepare the data in many ways."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "cache").mkdir()
    (folder / "cache" / tiny.name).symlink_to(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DISTFT_CACHE", str(folder / "cache"))
        yield folder


def check(case: Case) -> Outcome:
    return outcome_of(lambda: check_words([*BASE, case.word], deep=True))


def train(case: Case) -> Outcome:
    """Two steps, what they print aside. That a run diverges is known only then, and said with its step and samples."""
    shutil.rmtree("out", ignore_errors=True)
    diverged = False

    def work() -> None:
        nonlocal diverged
        try:
            train_here([*TWO_STEPS, case.word], restarts=0)
        except BadNumbersError:
            diverged = True

    outcome = outcome_of(work)
    assert not diverged or case.key in DIVERGE, case
    return Outcome(outcome.code, outcome.message)


def sweep(chosen: Sequence[Case]) -> Counter[tuple[str, int]]:
    """Check the cases, and count them by kind and exit code."""
    counts: Counter[tuple[str, int]] = Counter()
    wrong = []
    for case in chosen:
        outcome = check(case)
        counts[case.kind, outcome.code] += 1
        if outcome.fault:
            wrong.append(f"{case}: {outcome.fault}")
        if case.kind == "wrong type" and outcome.code == 0 and case.key not in ALSO_WITHOUT_QUOTES:
            wrong.append(f"{case}: accepted")
    assert not wrong, f"{len(wrong)} of {len(chosen)} cases:\n" + "\n".join(wrong)
    return counts


def steps(chosen: Sequence[Case]) -> int:
    """Train two steps with each of the cases that the check accepts; returns their number."""
    accepted = [case for case in chosen if check(case).code == 0]
    wrong = [f"{case}: {outcome.fault}" for case in accepted if (outcome := train(case)).fault]
    assert not wrong, f"{len(wrong)} of {len(accepted)} cases:\n" + "\n".join(wrong)
    return len(accepted)


def trained_cases(chosen: Sequence[Case]) -> list[Case]:
    """One unusual value of every key that matters in training."""
    found = {
        case.key: case
        for case in chosen
        if case.kind == "unusual" and case.key.startswith(TRAINED) and not case.key.startswith(SLOW)
    }
    return list(found.values())


def test_a_sample_of_the_keys_with_any_value_is_checked_without_a_traceback() -> None:
    counts = sweep(cases(18))
    assert counts["unusual", 0] > 15 and counts["wrong type", 2] > 30 and counts["absurd", 2] > 30


def test_two_steps_with_what_the_check_accepts() -> None:
    assert steps(trained_cases(cases(10))) >= 2


@pytest.mark.thorough
@pytest.mark.timeout(7_200)
def test_every_key_with_any_value_is_checked_without_a_traceback() -> None:
    chosen = cases()
    counts = sweep(chosen)
    print(dict(counts))
    assert counts.total() >= 2_000 and {key for key, _ in fields()} == {case.key for case in chosen}


@pytest.mark.thorough
@pytest.mark.timeout(7_200)
def test_two_steps_with_every_key_that_the_check_accepts() -> None:
    assert steps(trained_cases(cases())) >= 80


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim=adamw_torch_8bit"], "torchao"),
        (["lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_kwargs of cosine_with_min_lr: "),
        (["max_grad_norm=.nan"], "max_grad_norm: expected a finite number"),
        (["learning_rate=1e400"], "learning_rate: expected a finite number"),
        (["learning_rate=-0.0"], "a learning rate of 0 trains nothing"),
        (["output_dir=2026-01-31"], "output_dir: cannot be set here"),
        ([f"optim={'x' * 10_000}"], "optim: expected 'adamw_torch'"),
        (["lr_scheduler_kwargs={a.b: [[1]]}"], "lr_scheduler_kwargs"),
    ],
)
def test_what_upstream_would_find_late(words: list[str], told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_words([*BASE, *(f"training.{word}" for word in words)])
    assert told in str(caught.value) and len(str(caught.value)) < 2_000


def test_an_initialisation_that_cannot_be_repeated_is_refused_by_name() -> None:
    with pytest.raises(RecipeError, match="pissa_niter_4 decomposes weights at random"):
        check_words([*BASE, "quantization=null", "lora.init_lora_weights=pissa_niter_4"])
    check_words([*BASE, "quantization=null", "lora.init_lora_weights=pissa"])
