"""Each guard of a distributed run: with it the run is right, without it the run is stopped or wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from distft.runs.folder import RunFolder
from distft.training.beside import free_port

from .conftest import Train, finish, start

# Starts distft.train with one of its guards taken out, as a worker of accelerate's launcher.
WITHOUT = """
import sys
import distft.{module} as module
{tamper}
from distft.train import main
sys.argv[0] = "distft.train"
sys.exit(main())
"""
QUICK = (
    "training.max_steps=2",
    "evaluation.before_and_after=false",
    "tracking.report_to=[]",
    "training.eval_strategy=no",
)


def run_without(tmp_path: Path, module: str, tamper: str, *overrides: str) -> tuple[int, str]:
    script = tmp_path / "without_guard.py"  # tests/fork_server.py knows the name
    script.write_text(WITHOUT.format(module=module, tamper=tamper))
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--main_process_port",
        str(free_port()),
        str(script),
        *overrides,
    ]
    ended = finish(start(command, tmp_path), tmp_path)
    return ended.code, ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the correction is for CPUs; accelerate shards on GPUs by itself")
def test_fsdp_that_is_ddp_in_silence_is_stopped(tmp_path: Path) -> None:
    code, stderr = run_without(
        tmp_path,
        "distributed.strategies.fsdp2",
        "module.shard_on_cpu = lambda: None",
        "recipe=tiny",
        "strategy=fsdp",
        "quantization=null",
        *QUICK,
    )
    assert code != 0
    assert "FSDP was requested, but parameter" in stderr and "is not sharded" in stderr


def test_an_adapter_that_differs_between_ranks_is_stopped(tmp_path: Path) -> None:
    tamper = (
        "original = module.check_prepared\n"
        "def check(model, recipe, strategy, trainable):\n"
        "    original(model, recipe, strategy, trainable)\n"
        "    for p in model.parameters():\n"
        "        if p.requires_grad:\n"
        "            p.data += strategy.world.rank * 1e-3\n"
        "module.check_prepared = check"
    )
    code, stderr = run_without(tmp_path, "training.invariants", tamper, "recipe=tiny", *QUICK)
    assert code != 0
    assert "differs between rank 0 and rank 1 after one update" in stderr


def test_an_adapter_that_no_gradient_reaches_is_stopped(tmp_path: Path) -> None:
    tamper = "import torch\ntorch.optim.AdamW.step = lambda self, closure=None: None"
    code, stderr = run_without(
        tmp_path, "training.invariants", tamper, "recipe=tiny", "training.warmup_steps=0", *QUICK
    )
    assert code != 0
    assert "no trainable tensor moved in an update" in stderr


def test_a_base_in_another_type_is_stopped(tmp_path: Path) -> None:
    tamper = (
        "import torch\n"
        "original = module.load_base\n"
        "module.load_base = lambda *a, **k: original(*a, **k).to(torch.bfloat16)"
    )
    code, stderr = run_without(tmp_path, "models.loading", tamper, "recipe=tiny", "quantization=null", *QUICK)
    assert code != 0
    assert "is torch.bfloat16; the recipe's model.dtype is float32" in stderr


def test_an_evaluation_before_training_leaves_4_bit_gradients_right(train: Train) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation for a kernel without
    gradients."""
    norms = []
    for before in ("true", "false"):
        ended = train(
            "recipe=tiny",
            "training.max_steps=2",
            "training.logging_steps=1",
            "lora.lora_dropout=0",
            f"evaluation.before_and_after={before}",
        )
        assert ended.code == 0, ended.stderr[-3000:]
        norms.append([record["grad_norm"] for record in ended.folder.read_metrics() if "loss" in record])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def wait_for_step(where: Path, step: int) -> RunFolder:
    """The run folder, as soon as a record of `step` or later stands in it."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        for path in (where / "runs").glob("*/metrics.jsonl"):
            folder = RunFolder(path.parent)
            if any(record["step"] >= step for record in folder.read_metrics()):
                return folder
        time.sleep(0.1)
    raise AssertionError("no step was logged")


LONG = (
    "recipe=tiny",
    "training.num_train_epochs=200",
    "training.logging_steps=1",
    "evaluation.before_and_after=false",
    "tracking.report_to=[]",
    "training.eval_strategy=no",
    "training.save_strategy=no",
)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_leaves_a_summary_and_no_process(signum: signal.Signals, tmp_path: Path) -> None:
    process = start([sys.executable, "-m", "distft.cli", "train", *LONG, "--nproc", "2"], tmp_path)
    folder = wait_for_step(tmp_path, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 3, "the launcher and two workers"
    process.send_signal(signum)
    ended = finish(process, tmp_path)
    assert ended.code == 75, ended.stderr[-3000:]
    summary = folder.read_summary()
    assert summary["status"] == "interrupted"
    assert summary["cause"].startswith(f"Interrupted: stopped by {signum.name} after step ")
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_signal_to_a_single_process(tmp_path: Path) -> None:
    process = start([sys.executable, "-m", "distft.train", *LONG], tmp_path)
    folder = wait_for_step(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    assert finish(process, tmp_path).code == 75
    assert folder.read_summary()["status"] == "interrupted"


def test_a_killed_rank_fails_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(
        [sys.executable, "-m", "distft.cli", "train", *LONG, "run.max_restarts=0", "--nproc", "2"], tmp_path
    )
    folder = wait_for_step(tmp_path, 3)
    family = psutil.Process(process.pid).children(recursive=True)
    worker = next(
        child for child in family if child.environ().get("RANK") == "1" and "distft.train" in " ".join(child.cmdline())
    )
    os.kill(worker.pid, signal.SIGKILL)
    ended = finish(process, tmp_path)
    assert ended.code == 1, ended.stderr[-3000:]
    assert "rank 1 was killed by SIGKILL" in folder.read_summary()["cause"]
    assert "distft: rank 1 was killed by SIGKILL" in ended.stderr
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_an_error_of_another_rank_stands_on_the_console_and_in_its_log(tmp_path: Path) -> None:
    code, stderr = run_without(
        tmp_path,
        "training.trainer",
        (
            "import os\n"
            "original = module.Trainer.training_step\n"
            "def fail(self, *args, **kwargs):\n"
            "    if os.environ['RANK'] == '1':\n"
            "        print('a word of rank 1')\n"
            "        raise RuntimeError('the card is on fire')\n"
            "    return original(self, *args, **kwargs)\n"
            "module.Trainer.training_step = fail"
        ),
        "recipe=tiny",
        *QUICK,
    )
    assert code != 0
    assert "distft: rank 1 failed: RuntimeError: the card is on fire" in stderr and "Traceback" in stderr
    log = (tmp_path / "runs" / "tiny" / "logs" / "rank1.log").read_text()
    assert "a word of rank 1\n" in log and "RuntimeError: the card is on fire\n" in log


def test_an_exception_leaves_its_cause_in_the_summary(tmp_path: Path) -> None:
    code, stderr = run_without(
        tmp_path,
        "training.trainer",
        (
            "def fail(self, *args, **kwargs):\n"
            "    raise RuntimeError('the card is on fire')\n"
            "module.Trainer.training_step = fail"
        ),
        "recipe=tiny",
        *QUICK,
    )
    assert code != 0 and "the card is on fire" in stderr
    (path,) = (tmp_path / "runs").iterdir()
    summary = RunFolder(path).read_summary()
    assert summary["status"] == "failed" and summary["cause"] == "RuntimeError: the card is on fire"
