"""Fine-tune language models from one recipe: on one process, DDP, FSDP2 or DeepSpeed.

    import distft

    run = distft.train("tiny", {"training.max_steps": 20, "lora.r": 8})
    run.summary["samples_per_second"]
    model, tokenizer = run.load()

Importing distft imports nothing else; each name below is loaded on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distft import errors as errors
    from distft.api.check import check as check
    from distft.api.compare import compare as compare
    from distft.api.evaluate import evaluate as evaluate
    from distft.api.recipe import load_recipe as load_recipe
    from distft.api.report import Report as Report
    from distft.api.report import report as report
    from distft.api.run import Run as Run
    from distft.api.submit import submit as submit
    from distft.api.train import train as train

__version__ = "0.1.0"
__all__ = ["Report", "Run", "check", "compare", "errors", "evaluate", "load_recipe", "report", "submit", "train"]

_MODULES = {
    "Report": "distft.api.report",
    "Run": "distft.api.run",
    "check": "distft.api.check",
    "compare": "distft.api.compare",
    "evaluate": "distft.api.evaluate",
    "load_recipe": "distft.api.recipe",
    "report": "distft.api.report",
    "submit": "distft.api.submit",
    "train": "distft.api.train",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("distft.errors")
    if name not in _MODULES:
        raise AttributeError(f"module 'distft' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
