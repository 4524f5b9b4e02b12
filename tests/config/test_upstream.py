"""The fields of PEFT and TRL: what is remembered of them checks as they do themselves, without their import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distft.config import upstream
from distft.config.upstream import UPSTREAMS, Upstream, section_for, upstream_section


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own, in which nothing is remembered yet."""
    monkeypatch.setenv("DISTFT_CACHE", str(tmp_path))
    for cached in (upstream_section, upstream._remembered):
        cached.cache_clear()
    yield tmp_path
    for cached in (upstream_section, upstream._remembered):
        cached.cache_clear()


def judged(model: Any, values: dict[str, Any]) -> list[tuple[Any, ...]]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [(item["loc"], item["type"], item["msg"]) for item in error.errors()]
    return []


VALUES: dict[Upstream, tuple[dict[str, Any], ...]] = {
    "training": (
        {"learning_rate": 1e-4, "max_steps": 50, "optim": "adamw_torch", "bf16": True, "warmup_steps": 0.03},
        {"learning_rate": "1e-4"}, {"optim": "adamw_torhc"}, {"bf16": 1}, {"evaluation_strategy": "no"}, {"eval_strategy": "never"},
        {"max_length": None}, {"lr_scheduler_kwargs": {"num_cycles": 2}}, {"lr_scheduler_kwargs": [1]}, {"report_to": "wandb"},
        {"logging_steps": 5}, {"logging_steps": "5"}, {"max_grad_norm": -1.0}, {"debug": "underflow_overflow"},
    ),
    "lora": (
        {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "lora_dropout": 0.05, "bias": "none"}, {"target_modules": "all-linear"},
        {"r": "eight"}, {"rank": 8}, {"r": 0}, {"bias": "some"}, {"layer_replication": [[0, 4], [2, 5]]}, {"rank_pattern": {"q": 4}},
        {"init_lora_weights": "gaussian"}, {"init_lora_weights": 3}, {"loftq_config": {"loftq_bits": 4}}, {"eva_config": {"rho": 2.0}},
        {"eva_config": {"rho": "two"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAMS)
def test_what_is_remembered_judges_as_upstream_does(name: Upstream, cache: Path) -> None:
    whole = upstream_section(name)
    remembered = upstream._remembered(name)
    assert remembered is not None
    assert list(remembered[0].model_fields) == list(whole.model_fields)
    verdicts = [judged(section_for(name, values), values) for values in VALUES[name]]
    assert verdicts == [judged(whole, values) for values in VALUES[name]]
    assert [] in verdicts and sum(map(bool, verdicts)) >= 4
    foreign = remembered[1]
    assert all(
        section_for(name, values) is (whole if foreign & set(values) else remembered[0]) for values in VALUES[name]
    )
    assert foreign == {"debug"} if name == "training" else "loftq_config" in foreign and "r" not in foreign


def test_a_recipe_is_checked_without_the_libraries_the_second_time(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom distft.config.recipe import load_recipe\n"
        "from distft.data.formats import data_faults\nfrom distft.distributed.strategies import strategy_faults\n"
        "print(load_recipe(['recipe=ddp_qlora', *sys.argv[1:]], checks=(strategy_faults, data_faults)).lora['r'])\n"
        "print(sorted({'peft', 'trl', 'transformers', 'bitsandbytes', 'accelerate'} & set(sys.modules)))"
    )

    def loaded(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=200,
            env={**os.environ, "DISTFT_CACHE": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    first = loaded("lora.r=8")
    assert first[0] == "8" and "peft" in first[1]
    assert loaded("lora.r=8") == ["8", "[]"]
    assert "peft" in loaded("lora.loftq_config={}")[1], "a class of PEFT's own, which PEFT alone can check"
    for file in tmp_path.glob("fields-*.json"):
        file.write_text(file.read_text()[:100])  # torn
    assert "peft" in loaded("lora.r=8")[1]
    assert loaded("lora.r=8") == ["8", "[]"]


@pytest.mark.parametrize("changed", ["version", "source", "owned"])
def test_another_upstream_is_looked_at_anew(changed: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream_section("lora")
    assert upstream._remembered("lora") is not None
    upstream._remembered.cache_clear()
    if changed == "version":
        monkeypatch.setattr(upstream.importlib.metadata, "version", lambda package: "0.0.1")
    elif changed == "source":
        monkeypatch.setattr(upstream, "_SOURCES", (*upstream._SOURCES, "peft/config.py"))
    else:
        monkeypatch.setitem(upstream.OWNED["lora"], "r", "somewhere else")
    assert upstream._remembered("lora") is None


def test_a_cache_that_cannot_be_written_changes_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = cache / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("DISTFT_CACHE", str(blocked))
    assert "r" in section_for("lora", {"r": 8}).model_fields
    assert upstream._remembered("lora") is None


def test_what_is_written_down_holds_no_code(cache: Path) -> None:
    for name in UPSTREAMS:
        upstream_section(name)
        for field, hint, help_text in json.loads(upstream._memory(name).read_text(encoding="utf-8")):
            assert isinstance(field, str) and isinstance(help_text, str | None)
            assert hint is None or upstream._written(upstream._read(hint)) == hint
