"""`align`: a variant that trains on from another's run, and the evaluation of base, fine-tune and alignment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from distft.data.toy import tiny_sentiment
from distft.errors import ExperimentError
from distft.evaluation.request import Request
from distft.experiments.compare import Comparison
from distft.experiments.expand import load_experiment
from distft.paths import packaged
from distft.runs.folder import RunFolder

TINY = {
    "model": {"name": "tiny", "dtype": "float32"},
    "quantization": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"},
    "batching": {"global_batch_size": 16, "micro_batch_tokens": 1024},
    "training": {"bf16": False, "optim": "adamw_torch", "max_length": 128, "warmup_steps": 0, "logging_steps": 1},
    "evaluation": {"max_samples": 16, "imdb": {"path": str(tiny_sentiment()), "subset": 16, "methods": ["logprob"]}},
    "tracking": {"report_to": [], "throughput_warmup_steps": 1, "profile_steps": 0},
}


def small(where: Path) -> Path:
    """The shipped experiment with the tiny model, its data, and a few steps of one seed, on one process."""
    content: dict[str, Any] = yaml.safe_load(packaged("recipes/experiments/align.yaml").read_text(encoding="utf-8"))
    content["overrides"] = {"strategy": "single", **content["overrides"], **TINY}
    content["overrides"]["evaluation"]["tasks"] = ["perplexity", "imdb"]
    sft, dpo = content["variants"]["sft"], content["variants"]["dpo"]
    sft |= {"data": {"name": "tiny_sentiment", "max_samples": 120}}
    sft.pop("data.chat_template")
    dpo |= {"data": {"name": "tiny_preferences", "max_samples": 60}}
    for variant, steps in ((sft, 4), (dpo, 3)):
        variant["training"] |= {"max_steps": steps}
        variant["training"].pop("bf16", None)
    content["seeds"] = [1]
    path = where / "recipes" / "experiments" / "align.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return where


def test_the_shipped_one_builds_each_repeat_on_its_own() -> None:
    experiment = load_experiment(["experiment=align"])
    assert experiment.variants == ("sft", "dpo") and len(experiment.runs) == 6
    for sft, dpo in zip(experiment.runs[::2], experiment.runs[1::2], strict=True):
        assert dpo.recipe.adapter == str(Path.cwd() / "runs" / sft.name) and sft.recipe.adapter is None
        assert sft.recipe.run.seed == dpo.recipe.run.seed == sft.repeat
        assert dpo.recipe.prefers and not sft.recipe.prefers
        assert sft.recipe.lora is not None and dpo.recipe.lora is not None and sft.recipe.quantization is not None
        assert (dpo.recipe.lora["r"], dpo.recipe.lora["lora_alpha"]) == (32, 64)
        assert dpo.recipe.model.name == sft.recipe.model.name
        assert dpo.recipe.quantization == sft.recipe.quantization and sft.recipe.quantization.load_in_4bit


def test_a_variant_comes_after_the_one_that_it_builds_on(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: tiny\nvariants: {late: {recipe: dpo, adapter: early}, early: {}}\n", encoding="utf-8")
    with pytest.raises(ExperimentError) as raised:
        load_experiment([f"experiment={path}"])
    (fault,) = [fault for fault in raised.value.faults if fault.key == "variants.late.adapter"]
    assert fault.problem == "early has no run before this one" and fault.hint == "list early before it"


def test_did_alignment_cost_knowledge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = small(tmp_path)
    command = [sys.executable, "-m", "distft.cli", "compare", "experiment=align"]
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    sft, dpo = (RunFolder(where / "runs" / f"align-{name}") for name in ("sft", "dpo"))
    began, ended = sft.read_summary(), dpo.read_summary()
    assert began["start_digest"] is None and len(ended["start_digest"]) == 16
    margins = [record["rewards/margins"] for record in dpo.read_metrics() if "rewards/margins" in record]
    assert margins[0] == 0 and len(margins) == 3 and all(margins[1:])
    found = [folder.read_summary()["evaluation"] for folder in (sft, dpo)]
    for task, figure in (("perplexity", "perplexity"), ("imdb", "accuracy")):
        texts = [each[task]["items_digest"] for each in found]
        assert texts[0] == texts[1], "the same held-out rows for all three models"
        key = next(name for name in found[0][task]["figures"] if name.endswith(figure))
        base, other = (each[task]["figures"][key]["base"] for each in found)
        assert base == other and None not in (each[task]["figures"][key]["adapter"]["low"] for each in found)
    report = json.loads((where / "runs" / "align.json").read_text(encoding="utf-8"))
    assert [variant["finished"] for variant in report["variants"]] == [1, 1]
    monkeypatch.chdir(where)
    made = [run.stat().st_mtime_ns for run in (sft.summary, dpo.summary)]
    Comparison(load_experiment(["experiment=align"])).run(resume=True)  # the recipes are still the same
    assert [run.stat().st_mtime_ns for run in (sft.summary, dpo.summary)] == made
    (sft.path / "recipe.yaml").unlink()
    words = ["runs/align-dpo", "evaluation.tasks=[perplexity]"]
    with pytest.raises(Exception, match="has pairs of answers, and perplexity is measured on texts"):
        Request.of(words)
    assert Request.of([*words, "data.name=tiny_sentiment"]).recipe.data.name == "tiny_sentiment"
