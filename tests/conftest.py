"""Fixtures that every test may use: the real data samples, the tiny model, and the rule for tests that need GPUs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from . import fork_server


def pytest_configure(config: pytest.Config) -> None:
    """Caches for the whole session, set before `datasets` is imported and passed on to what the tests start."""
    # The same as for runs (launch/command.py): the workers of pytest-xdist share the cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Threads of one product that wait for each other while others have the cores cost a quarter more CPU time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The tiny model takes a minute to build, so its folder outlives the session.
    os.environ.setdefault("DISTFT_CACHE", str(config.rootpath / ".pytest_cache" / "distft"))
    if "HF_DATASETS_CACHE" not in os.environ:
        # Every test writes files under a new path, and each would stay in the user's own cache for ever.
        folder = tempfile.mkdtemp(prefix="distft-tests-")
        os.environ["HF_DATASETS_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    runs_tests = hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None)
    if runs_tests and not config.option.collectonly:
        fork_server.install()


def devices_needed(item: pytest.Item) -> int:
    """The number of CUDA devices that a test needs: `@pytest.mark.gpu` is one, `@pytest.mark.gpu(2)` two.

    The largest of its marks counts,
    whether the mark is on the function, on its module or on a parameter."""
    counts = (mark.args[0] if mark.args else mark.kwargs.get("count", 1) for mark in item.iter_markers("gpu"))
    return max(counts, default=0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need more CUDA devices than there are."""
    wanted = devices_needed(item)
    if not wanted:
        return
    import torch

    found = torch.cuda.device_count()
    if found < wanted:
        pytest.skip(f"needs {wanted} CUDA device{'s' if wanted > 1 else ''}, found {found}")


SLOW = (
    "slurm",
    "faults",
    "distributed/test_same",
    "evaluation",
    "docs/test_commands",
    "test_hub",
    "distributed/test_two",
    "distributed/test_g",
    "benchmarks/test_throughput",
    "api",
    "distributed/test_a",
    "distributed/test_best",
    "distributed/test_m",
    "distributed/test_p",
    "distributed/test_s",
    "experiments/test_compare",
    "launch/test_restarts",
    "training/test_profiler",
    "doctor/test_doctor",
    "models/test_matrix",
    "reports/test_html",
    "reports/test_evaluation_page",
    "kernels/test_elementwise",
    "models/test_initialisations",
    "training/test_best_model",
    "training/test_check_sweep",
    "training/test_micro_batches",
    "test_startup",
    "docs/test_build",
    "test_package",
)
"""Tests that train, evaluate or build something, or open a browser, for longer than a few seconds, by the start of
their path; the longest first."""

SHARED = {
    "faults": ("faults/",),
    "learned": (
        "evaluation/tasks/test_imdb",
        "evaluation/tasks/test_lm_eval",
        "evaluation/test_request",
        "evaluation/test_run",
    ),
    "slurm": ("slurm/",),
}
"""Groups of files, by the start of their path, that share runs or the cluster."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow tests, and keep those that share runs on one worker: the tests of a file or of a group of `SHARED`.

    The slow ones come first, so that the quick ones fill what is left of the time when a worker runs out of them.
    """
    here = Path(__file__).parent
    places = {}
    for item in items:
        path = item.path.relative_to(here).as_posix()
        group = next((name for name, starts in SHARED.items() if path.startswith(starts)), path)
        item.add_marker(pytest.mark.xdist_group(group))
        if path.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
        place = next((number for number, start in enumerate(SLOW) if path.startswith(start)), len(SLOW))
        places[item] = place if item.get_closest_marker("slow") else len(SLOW) + 1
    items.sort(key=places.__getitem__)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data samples beside the checkout."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the data samples are not here: there is no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Path:
    """Folder of the tiny model and its tokenizer, built where the cache has none."""
    from distft.models.tiny import tiny_model

    return tiny_model()


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    """The tiny model's tokenizer. Tests do not change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)
