"""Run folders as runs leave them, `distft report` within this process, and a browser for its pages."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from distft.cli.main import main
from distft.config.recipe import load_recipe
from distft.files import to_json
from distft.reports.report import Report
from distft.runs.folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS = 30
CELLS = "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
"""The texts of the cells of each row, in the browser."""

SUMMARY: dict[str, Any] = {
    "status": "finished",
    "strategy": "ddp",
    "requested_strategy": "ddp",
    "world_size": 2,
    "global_batch_size": 16,
    "steps": 10,
    "skipped_steps": 0,
    "samples": 160,
    "tokens": 8000,
    "train_loss": 2.5,
    "eval_before": {"loss": 4.0, "perplexity": 54.6},
    "eval_after": {"loss": 2.0, "perplexity": 7.39},
    "train_time_s": 4.0,
    "samples_per_second": 40.0,
    "tokens_per_second": 2000.0,
    "peak_memory_gib": 8.0,
    "restarts": 0,
    "data_digest": "0123456789abcdef",
    "weights_digest": "fedcba9876543210",
}


# Run folders ----------------------------------------------------------------------------------------------------------


def make(parent: Path, name: str, *overrides: str, gpu: str | None = None, **figures: Any) -> RunFolder:
    """The folder of a finished run of the `tiny` recipe with `overrides`; `figures` change those of SUMMARY."""
    folder = RunFolder.claim(parent, name, exact=True)
    recipe = load_recipe(["recipe=tiny", *overrides, f"run.name={name}", f"run.dir={parent}"])
    folder.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
    machine = {"python": "3.11.7", "cpus": 2, "packages": {"torch": "2.13.0"}, "gpus": [{"name": gpu}] if gpu else []}
    folder.environment.write_text(to_json({**machine, "command": ["train.py", name]}), encoding="utf-8")
    folder.append_metrics(
        {"step": 0, "test_loss": 4.0},
        {"step": 5, "loss": 3.0, "samples": 80, "tokens": 4000},
        {"step": 10, "loss": 2.25, "samples": 160, "tokens": 8000},
        {"step": 10, "test_loss": 2.0},
    )
    folder.write_summary({**SUMMARY, **figures})
    return folder


def run_folder(parent: Path, name: str, strategy: str, speed: float, memory: float) -> RunFolder:
    """The folder of a run on two GPUs with every figure, profiled, with curves drawn from a formula."""
    folder = RunFolder(parent / name)
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(f"strategy: {strategy}\nrun: {{name: {name}, seed: 1}}\n")
    folder.environment.write_text(json.dumps({"gpus": [{"name": "NVIDIA H200"}]}))
    folder.append_metrics(*(_record(step, speed, memory) for step in range(1, STEPS + 1)))
    folder.append_metrics(
        *({"step": step, "eval_loss": 2.0, "eval_perplexity": 20 - step / 3} for step in (10, 20, 30))
    )
    summary = {
        "status": "finished",
        "cause": None,
        "strategy": strategy,
        "world_size": 2,
        "steps": STEPS,
        "samples": 8 * STEPS,
        "tokens": 800 * STEPS,
        "global_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "train_loss": 1.5,
        "eval_before": {"loss": 3.0, "perplexity": 20.1},
        "eval_after": {"loss": 2.0, "perplexity": 7.4},
        "train_time_s": 8 * STEPS / speed,
        "samples_per_second": speed,
        "tokens_per_second": 100 * speed,
        "step_time_s": 8 / speed,
        "data_wait_s": 0.5,
        "evaluation_time_s": 3.0,
        "saving_time_s": 1.5,
        "mfu": 0.5,
        "hfu": 0.6,
        "peak_memory_gib": memory,
        "energy_j": 9000.0,
        "joules_per_sample": 37.5,
        "joules_per_step": 300.0,
        "energy_idle_share": 0.2,
        "restarts": 0,
    }
    folder.summary.write_text(json.dumps(summary))
    rank = {
        "step_time_s": 0.5,
        "compute_s": 0.4,
        "communication_exposed_s": 0.05,
        "copy_exposed_s": 0.01,
        "idle_s": 0.04,
        "data_wait_s": 0.01,
        "products_s": 0.3,
    }
    ranks = [{"rank": 0, **rank}, {"rank": 1, **rank}]
    folder.profile.write_text(json.dumps({"steps": [4, 6], "device": "cuda", "ranks": ranks}))
    return folder


def _record(step: int, speed: float, memory: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 3 / step**0.3,
        "learning_rate": 1e-4 * (1 - step / STEPS),
        "samples": 8 * step,
        "tokens": 800 * step,
        "time_s": 8 * step / speed,
        "samples_per_second": speed + step % 3,
        "peak_memory_gib": memory,
        "host_rss_gib": 2.0,
        "peak_memory_by_rank_gib": [memory - 1, memory],
        "host_rss_by_rank_gib": [2.0, 1.5],
    }


# What a report says ---------------------------------------------------------------------------------------------------


def verdicts(made: Report, figure: str) -> dict[str, str]:
    return {item.variant: item.verdict for item in made.comparisons if item.figure == figure}


def equal(made: Report) -> dict[str, bool | None]:
    return {item.what: item.equal for item in made.equality}


def row(text: str, heading: str, first: str) -> dict[str, str]:
    """The row that starts with `first` of the Markdown table under `heading`, by the head of the table."""
    lines = [line for line in text.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # aligned
    (found,) = [line for line in cells if line[0] == first]
    return dict(zip(cells[0], found, strict=True))


# The command and its page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def command(where: Path, *words: str) -> Done:
    """Run `distft report` in the folder `where`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(where), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["report", *words])
    return Done(code, out.getvalue(), err.getvalue())


def report(where: Path, *words: str) -> None:
    done = command(where, *words)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """page.html and page.json of two variants with two runs each; one has a name that looks like HTML."""
    where = tmp_path_factory.mktemp("report")
    folders = [
        run_folder(where, f"{name}{repeat}", strategy, speed + repeat / 10, memory)
        for name, strategy, speed, memory in (("a<b>&c", "ddp", 20.0, 30.0), ("sharded", "fsdp", 15.0, 12.0))
        for repeat in (1, 2)
    ]
    for kind in ("html", "json"):
        report(where, *(str(folder.path) for folder in folders), "--output", f"page.{kind}")
    return where


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("DISTFT_CI"):
            pytest.fail("Chromium is missing, which continuous integration installs")
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and every error and request to anything but the file itself while it was opened."""
    page = browser.new_context(offline=True, **options).new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    return page, problems
