"""Examples at the end of the help of commands whose own module shows none."""

from __future__ import annotations

import argparse

_EXAMPLES: dict[str, tuple[str, ...]] = {
    "train": ("train tiny", "train qwen3_8b data.name=chats.jsonl", "train recipes/mine.yaml --nproc 2 --resume"),
    "check": ("check tiny", "check recipes/mine.yaml --nproc 8 --deep"),
    "evaluate": ("evaluate runs/tiny", "evaluate runs/tiny evaluation.tasks=[perplexity,generation]"),
    "submit": ("submit fsdp_bf16 slurm.nodes=2",),
    "jobs": ("jobs --help",),
    "fetch": ("fetch qwen3_8b",),
    "recipes list": ("recipes list",),
    "recipes show": ("recipes show ddp_qlora lora.r=8 --nproc 4",),
    "recipes validate": ("recipes validate", "recipes validate recipes/mine.yaml"),
    "recipes schema": ("recipes schema > recipe.schema.json",),
    "experiments list": ("experiments list",),
    "experiments show": ("experiments show curriculum",),
    "compare": ("compare ddp_qlora fsdp_bf16", "compare experiment=curriculum --nproc 2 --repeats 3 --watch"),
    "report": ("report runs/one runs/two --output report.html", "report checkpoint-500/trainer_state.json"),
    "data preview": ("data preview tiny --samples 1", "data preview recipes/mine.yaml --rows 17,42"),
    "merge": ("merge runs/tiny", "merge runs/tiny --output merged"),
    "doctor": ("doctor", "doctor --json --no-bandwidth"),
}


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with examples. Those of its commands are of this class, too."""

    def format_help(self) -> str:
        text = super().format_help()
        examples = _EXAMPLES.get(self.prog.partition(" ")[2])
        return text + "\nexamples:\n" + "\n".join(f"  distft {each}" for each in examples) + "\n" if examples else text
