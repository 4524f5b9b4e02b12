"""`distft.train` for real, in this process and through the launcher, and what can be done with the run."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import distft
from distft.data.prepare import prepare_data
from distft.distributed.signals import STOP, StopRequest
from distft.models.loading import load_tokenizer

FEW = {
    "strategy": "ddp",
    "training": {"max_steps": 2, "logging_steps": 1, "eval_strategy": "no"},
    "lora.r": 2,
    "batching": {"global_batch_size": 4, "micro_batch": 2},
    "data.max_samples": 40,
    "evaluation.before_and_after": False,
    "tracking.report_to": [],
}


def global_state() -> dict[str, Any]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return {
        "environment": dict(os.environ),
        "arguments": sys.argv,
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "stop": vars(STOP).copy(),
        "frozen": gc.get_freeze_count(),
        "accelerate": [dict(kind._shared_state) for kind in (PartialState, AcceleratorState, GradientState)],
    }


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, folder = Path.cwd(), tmp_path_factory.mktemp("api")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def run(where: Path) -> distft.Run:
    """A finished run that was trained in this process. Read it, change nothing."""
    before = global_state()
    run = distft.train("tiny", FEW, processes=1)
    assert global_state() == before and before["stop"] == vars(StopRequest())
    return run


def test_one_process_trains_here_and_leaves_nothing_changed(run: distft.Run, where: Path) -> None:
    assert run.path == Path("runs/tiny") or run.path == where / "runs" / "tiny"
    assert run.status == "finished" and run.summary["world_size"] == 1 and run.summary["samples_per_second"] > 0
    assert run.metrics["step"] == [1, 2] and len(run.metrics["loss"]) == 2
    report = prepare_data(run.recipe, load_tokenizer(run.recipe)).report
    assert run.summary["held_out_overlap"] == report.overlap and report.overlap.keys() == {"validation", "test"}
    assert (run.summary["data_digest"], run.summary["held_out_digest"]) == (report.digest, report.held_out_digest)
    assert run.recipe.lora["r"] == 2 and run.recipe.training["max_steps"] == 2
    command = run.folder.read_environment()["command"]
    assert command[0] == "distft.train" and "recipe=tiny" in command and "lora.r=2" in command


def test_the_model_is_ready_to_generate(run: distft.Run) -> None:
    model, tokenizer = run.load()
    assert not model.training and model.active_adapters == ["default"]
    prompt = tokenizer("Hello", return_tensors="pt").to(model.device)
    made = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert made.shape[1] > prompt["input_ids"].shape[1]


def test_training_again_in_a_thread_gives_the_same_numbers(run: distft.Run) -> None:
    """Also the second training of a process, and in a thread, where no signal can be handled."""
    again: list[distft.Run] = []
    thread = threading.Thread(target=lambda: again.append(distft.train("tiny", FEW, processes=1)))
    thread.start()
    thread.join()
    assert again[0].path.name == "tiny-2"
    assert again[0].metrics["loss"] == run.metrics["loss"]


def test_an_interrupt_saves_and_the_same_call_resumes(where: Path) -> None:
    overrides = FEW | {"training.max_steps": 12, "run.name": "stopped"}
    folder = where / "runs" / "stopped"

    def interrupt() -> None:
        while not (folder / "metrics.jsonl").exists() or len(distft.Run(folder).metrics) < 2:
            done.wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    done = threading.Event()
    before = global_state()
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(distft.errors.Interrupted, match=r"stopped by SIGINT after step \d+; saved a checkpoint"):
        distft.train("tiny", overrides, processes=1)
    assert global_state() == before
    stopped = distft.Run(folder)
    assert stopped.status == "interrupted" and stopped.metrics[-1]["step"] < 12
    resumed = distft.train("tiny", overrides, processes=1)
    assert resumed.summary["restarts"] == 1 and resumed.metrics["step"] == list(range(1, 13))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_mistake_in_the_recipe_is_a_recipe_error(processes: int) -> None:
    with pytest.raises(distft.errors.RecipeError, match=r"(?s)2 faults.*lora\.rr: .*training\.max_step: ") as caught:
        distft.train("tiny", {"lora": {"rr": 2}, "training.max_step": 3}, processes=processes)
    assert len(caught.value.faults) == 2


def test_no_process_at_all_is_a_mistake() -> None:
    with pytest.raises(distft.errors.LaunchError, match="the number of processes must be at least 1, got 0"):
        distft.train("tiny", processes=0)


def blank(where: Path) -> dict[str, Any]:
    """Data whose mistake only a full read finds: the first rows look like any others."""
    (where / "blank.jsonl").write_text('{"instruction": "Why?", "response": " "}\n' * 20)
    return FEW | {"data.path": "blank.jsonl"}


def test_a_mistake_that_training_here_finds_is_raised(where: Path) -> None:
    before = global_state()
    with pytest.raises(distft.errors.DataError, match="20 of 20 rows have nothing to train on"):
        distft.train("tiny", blank(where), processes=1)
    assert global_state() == before


def test_several_processes_go_through_the_launcher(run: distft.Run, capfd: pytest.CaptureFixture[str]) -> None:
    launched = distft.train("tiny", FEW, processes=2)
    assert launched.summary["world_size"] == 2 and launched.summary["strategy"] == "ddp"
    assert launched.metrics["loss"] == pytest.approx(run.metrics["loss"], abs=2e-3)
    assert "ddp on 2 processes" in capfd.readouterr().err


def test_a_mistake_that_launched_processes_find_is_raised_here(where: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what they print where this process prints: `capsys` replaces the streams, as a notebook does."""
    with pytest.raises(distft.errors.DataError, match="20 of 20 rows have nothing to train on") as caught:
        distft.train("tiny", blank(where), processes=2)
    assert f"distft: {caught.value}" in capsys.readouterr().err


def test_evaluating_a_run_returns_its_results(run: distft.Run) -> None:
    found = distft.evaluate(run, tasks=["perplexity"], overrides={"evaluation.max_samples": 4})
    figures = found["perplexity"]["figures"]
    assert figures and all(figure[side]["value"] > 0 for figure in figures.values() for side in ("base", "adapter"))
    assert run.evaluation["perplexity"] == found["perplexity"]


def test_an_evaluation_of_nothing_is_a_mistake(where: Path) -> None:
    with pytest.raises(distft.errors.RunFolderError, match="runs/nothing"):
        distft.evaluate("runs/nothing", tasks=["perplexity"])


def test_reports_in_three_forms(run: distft.Run, tmp_path: Path) -> None:
    report = distft.report([run])
    assert report.to_markdown(tmp_path / "a.md") == (tmp_path / "a.md").read_text()
    assert '"title"' in report.to_json() and "<html" in report.to_html(tmp_path / "a.html")
    with pytest.raises(distft.errors.StorageError, match="cannot be written"):
        report.to_json(tmp_path / "a.md" / "b.json")


def test_submitting_without_submitting(run: distft.Run) -> None:
    script = distft.submit("tiny", {"slurm.nodes": 2, "slurm.time": "01:00:00"}, dry_run=True)
    assert script.startswith("#!/") and "#SBATCH --nodes=2" in script and "recipe=tiny" in script
    with pytest.raises(distft.errors.LaunchError, match="give a recipe or an experiment"):
        distft.submit()
