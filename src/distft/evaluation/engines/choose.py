"""Choose the engine that writes the answers of one side: vLLM if it would write the same, otherwise transformers."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

from distft.config.evaluation import Evaluation
from distft.data.prompts import Template
from distft.distributed.process import say_once
from distft.errors import MissingExtraError, ModelError
from distft.evaluation.engines.lora import obstacle_to_lora
from distft.evaluation.engines.transformers import TransformersEngine, max_positions
from distft.evaluation.engines.vllm import Served, VllmEngine
from distft.evaluation.generate import Engine
from distft.evaluation.target import SideName, Target
from distft.models.generation import end_tokens
from distft.models.loading import model_path


def choose_engine(target: Target, settings: Evaluation, side: SideName, template: Template) -> Engine:
    """The engine for `side`, to be used within `target.side(side)`.

    `auto` chooses vLLM if it is installed and nothing speaks against it.

    Raises:
        MissingExtraError: vLLM is asked for and not installed.
        ModelError: vLLM is asked for and cannot write what this target would.
    """
    wanted = settings.generation.engine
    identity = {"weights": target.identity[side]}
    installed = importlib.util.find_spec("vllm") is not None
    if wanted == "vllm" or (wanted == "auto" and installed):
        if not installed:
            raise MissingExtraError("answers by evaluation.generation.engine=vllm", "vllm", "vllm")
        obstacle = obstacle_to_vllm(target)
        if obstacle is None:
            return VllmEngine(
                _served(target, side),
                target.tokenizer,
                identity,
                template=template,
                device=target.device.index or 0,
                end_tokens=end_tokens(target.model, target.tokenizer),
                max_positions=max_positions(target.model),
            )
        if wanted == "vllm":
            raise ModelError(
                f"vLLM cannot write these answers: {obstacle}; set evaluation.generation.engine=transformers"
            )
        say_once(f"answers come from transformers, not vLLM: {obstacle}", target.world, os.environ)
    return TransformersEngine(
        target.model, target.tokenizer, identity, batch_tokens=settings.generation.batch_tokens, template=template
    )


def obstacle_to_vllm(target: Target) -> str | None:
    """Why vLLM could not write what the model in this process does; None if it can."""
    if target.device.type != "cuda":
        return "there is no GPU"
    section = target.recipe.quantization
    if section is not None and section.is_quantized:
        return "vLLM does not quantise the base as in training"
    if target.result is not None and target.is_adapter:
        adapter = json.loads((target.result / "adapter_config.json").read_text(encoding="utf-8-sig"))
        return obstacle_to_lora(adapter)
    return None


def _served(target: Target, side: SideName) -> Served:
    recipe, trained = target.recipe.model, side == "adapter"
    if trained and not target.is_adapter:
        return Served(str(target.result), None, recipe.dtype, recipe.trust_remote_code)
    base = Served(model_path(target.recipe), recipe.revision, recipe.dtype, recipe.trust_remote_code)
    if not trained:
        return base
    folder = str(target.result)
    rank = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8-sig"))["r"]
    return Served(base.model, base.revision, base.dtype, base.trust_remote_code, folder, rank)
