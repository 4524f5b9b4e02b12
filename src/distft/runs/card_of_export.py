"""What the card of an export says beyond that of a run's result: how to load its file, and the proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distft.text import with_interval

_STATES = {True: "passed", False: "**broken**", None: "–"}


def read_export(folder: Path) -> dict[str, Any]:
    """The content of `export.json`; {} if the folder is no export."""
    file = folder / "export.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def how_to_load_file(file: str, name: str, here: str, *, ollama: bool) -> str:
    """How programs load a GGUF file; `here` is what the card calls the folder that it lies in."""
    lines = [
        f"- llama.cpp: `llama-server -m {here}/{file} --jinja`, which has the chat template of the training",
        f"- Ollama: `ollama create {name} -f {here}/Modelfile`"
        if ollama
        else "- Ollama: `distft export RUN --to ollama` writes the Modelfile",
        f'- transformers: `AutoModelForCausalLM.from_pretrained("{here}", gguf_file="{file}")`',
        f"- vLLM: `vllm serve {here}/{file} --tokenizer BASE`, with the plugin for GGUF",
    ]
    return f"{here} is the folder of this file.\n\n" + "\n".join(lines)


def proof_section(exported: Mapping[str, Any]) -> str:
    """The proof as a table of its stages; "" where nothing was proved."""
    proof = exported.get("proof")
    if not proof:
        return ""
    stages = [_stage(name, stage) for name, stage in proof["stages"].items()]
    if proof.get("trained_to_export"):
        stages.append(_stage("the whole", {"passed": None, **proof["trained_to_export"], "found": ""}))
    table = "\n".join(
        [
            "| stage | | KL per token (nats) | top-1 agreement | perplexity |",
            "| --- | --- | --- | --- | --- |",
            *(f"| {' | '.join(cells)} |" for cells in stages),
        ]
    )
    if proof["passed"] is None:
        outcome = "The file was not checked by a program that reads it."
    else:
        outcome = "It passed." if proof["passed"] else f"It failed at the stage {proof['broken']}."
    return (
        f"{proof['rows']} rows of the split {proof['split']} were replayed through {proof['engine']}, and each stage "
        "was compared with the one before, from the trained model in its training precision on. "
        f"{outcome} Brackets hold 95% confidence intervals.\n\n{table}"
    )


def _stage(name: str, stage: Mapping[str, Any]) -> list[str]:
    if "kl" not in stage:
        return [name, _STATES[stage["passed"]], str(stage["found"]).replace("|", "\\|"), "", ""]
    if stage["equal"]:
        return [name, _STATES[stage["passed"]], "equal", "equal", f"{stage['perplexity'][0]:,.3f}"]
    before, after = (format(each, ",.3f") if each is not None else "∞" for each in stage["perplexity"])
    kl, agreement = with_interval(stage["kl"], ".2g"), with_interval(stage["top1_agreement"], ".1%")
    return [name, _STATES[stage["passed"]], kl, agreement, f"{before} → {after}"]
