"""What a run shows while it trains: lines in a file, a bar on a terminal, and each loss under one name."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from distft.console import quiet_libraries
from distft.training.progress import Progress, loss_name

LOGS = {"loss": 4.77312, "learning_rate": 2.5e-4, "epoch": 0.25, "samples_per_second": 5.9, "tokens_per_second": 320.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: Any, logs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress(12, 3)
    progress.update(5)
    progress.show(logs)
    progress.close()
    return str(stream.getvalue())


def test_a_file_gets_one_line_for_each_log_step(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(io.StringIO(), {**LOGS, "peak_memory_gib": None, "host_rss_gib": 0.71}, monkeypatch)
    assert "\r" not in text and text.count("\n") == 1
    figures = (
        "step 5 of 12, train loss 4.7731, lr 0.00025, epoch 0.25, 5.9 samples/s, 320 tokens/s, host memory 0.7 GiB"
    )
    assert text.startswith(f"{figures}, ") and text.endswith(" step/s\n")


def test_a_terminal_gets_a_bar_with_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(Terminal(), {**LOGS, "peak_memory_gib": 12.34, "host_rss_gib": 0.71}, monkeypatch)
    assert "\r" in text and "5/12" in text
    assert "lr 0.00025" in text and "peak GPU memory 12.3 GiB" in text


def test_each_loss_has_one_name() -> None:
    names = [loss_name(key) for key in ("eval_loss", "test_loss", "eval_code_loss")]
    assert names == ["validation loss", "held-out loss", "validation loss of code"]


def test_libraries_do_not_speak_for_distft(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("DISTFT_DEBUG", raising=False)
    quiet_libraries()
    name = "transformers.integrations.integration_utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    __import__(name)
    assert "WANDB offline" not in capsys.readouterr().out
    logging.getLogger("DeepSpeed").info("which accelerator there is")
    logging.getLogger("DeepSpeed").warning("what is wrong")
    assert [record.message for record in caplog.records if record.name == "DeepSpeed"] == ["what is wrong"]
