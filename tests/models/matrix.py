"""python -m tests.models.matrix --update docs/models.md: which architectures train in packs, and which padded.

Each family is built small, with random weights and an adapter, and goes through the check that every run makes. The
tests compare what that settles with padded rows, eager attention and PEFT's own modules, and with the page.
"""

from __future__ import annotations

import argparse
import copy
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from distft.config.recipe import Recipe, load_recipe
from distft.data.loader import Collator
from distft.distributed.launcher_args import Launcher
from distft.distributed.strategies import choose
from distft.distributed.world import World
from distft.errors import ModelError
from distft.models.adapter import keep_adapter_in_fp32
from distft.models.fused_lora import use_plain_modules
from distft.models.isolation import set_attention
from distft.models.loading import load_model
from distft.models.targets import without_unsuitable
from distft.training.micro_batches import settle

from .families import adapted, small_model

FAMILIES = (
    "afmoe",
    "apertus",
    "arcee",
    "bamba",
    "biogpt",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "ctrl",
    "cwm",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "falcon_alibi",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "jamba",
    "jetmoe",
    "lfm2",
    "llama",
    "llama4_text",
    "mamba",
    "mamba2",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "ministral",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "xglm",
    "youtu",
)
LENGTHS = (9, 14, 5, 11)
"""Tokens of the samples that are compared."""
_WORDS = ("recipe=tiny", "strategy=single", "batching.micro_batch_tokens=600")
_START, _END = "<!-- architectures -->\n", "<!-- /architectures -->\n"


@dataclass(frozen=True)
class Outcome:
    """What a run settles for a family: `attention`, whether samples are `packed`, `why` not, and the fused linears.

    A refused family has `why` and no attention. `model` computes in this way.
    """

    family: str
    attention: str | None
    packed: bool
    why: str
    fused: str
    model: Any = None

    def row(self) -> str:
        way = "refused" if self.attention is None else "packed" if self.packed else "padded only"
        cells = (self.family.replace("_alibi", " with ALiBi"), way, self.attention or "", self.fused, self.why)
        return "| " + " | ".join(cells) + " |"


def outcome_of(family: str) -> Outcome:
    base = small_model(family)
    lora = without_unsuitable({"target_modules": "all-linear"}, base)
    recipe = load_recipe([*_WORDS, "quantization=null"])
    return _settled(family, adapted(base, exclude_modules=lora.get("exclude_modules")), recipe)


def outcome_as_loaded(family: str, folder: Path, *words: str) -> Outcome:
    """The outcome for a model that a run loads from `folder`, with the overrides `words`; its base is quantised as they
    say."""
    small_model(family).save_pretrained(folder)
    recipe = load_recipe([*_WORDS, f"model.name={folder}", "lora.r=4", "lora.lora_dropout=0", *words])
    strategy = choose(recipe, World(), {}, Launcher())
    model = load_model(recipe, strategy).eval()
    keep_adapter_in_fp32(model, recipe, strategy)
    return _settled(family, model, recipe)


def _settled(family: str, model: Any, recipe: Recipe) -> Outcome:
    strategy = choose(recipe, World(), {}, Launcher())
    try:
        found = settle(model, recipe, strategy, SimpleNamespace(pad_token_id=0), np.array(LENGTHS))
    except ModelError as error:
        return Outcome(family, None, False, str(error), "")
    facts, notes = found.facts, " ".join(found.notes)
    packed = found.recipe.batching.micro_batch_tokens is not None
    why = []
    if not packed:
        conv = "causal_conv1d" in notes
        why.append("transformers packs only with causal_conv1d" if conv else "samples of a pack change each other")
    if "own modules" in notes:
        why.append("the fused nodes do not fit")
    if unreached := re.search(r"reaches the adapters on ([^,;]+), so", notes):
        why.append(f"no gradient reaches {unreached[1]}")
    fused = f"{facts['fused_linears']} of {facts['adapted_linears']}"
    return Outcome(family, facts["attn_implementation"], packed, "; ".join(why), fused, model)


def plain_copy(model: Any) -> Any:
    """A copy of `model` by plain modules: eager attention where it can be exchanged, and PEFT's own linears."""
    plain = copy.deepcopy(model)
    use_plain_modules(plain)
    set_attention(plain, "eager")
    return plain


def reference_of(model: Any) -> Any:
    """A plain copy of `model` that computes in fp32 with the values that the weights of `model` have."""
    plain = plain_copy(model)
    for module in plain.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes, with weights in 4 bits
            module.compute_dtype = torch.float32
        for state in vars(module).get("states", {}).values():  # of packed experts
            state.dtype = torch.float32
    for tensor in (*plain.parameters(), *plain.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return plain


def batch_of(outcome: Outcome | None, variant: int = 0) -> dict[str, Any]:
    """The samples as one micro-batch, as the outcome has them; padded for None. Each variant has other tokens."""
    samples = [
        [(7 * number + (3 + variant) * place + 11 * variant) % 120 + 5 for place in range(size)]
        for number, size in enumerate(LENGTHS)
    ]
    collate = Collator(0, packed=outcome is not None and outcome.packed)
    return collate([{"input_ids": tokens, "labels": tokens} for tokens in samples])


def table(outcomes: list[Outcome]) -> str:
    head = "| architecture | micro-batches | attention | fused linears | why |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(f"{outcome.row()}\n" for outcome in outcomes)


def rows_on(page: Path) -> list[str]:
    """The rows of the table on a page."""
    text = page.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, required=True, help="the page that has the table")
    page = parser.parse_args().update
    before, _, rest = page.read_text(encoding="utf-8").partition(_START)
    after = rest.partition(_END)[2]
    found = table([outcome_of(family) for family in FAMILIES])
    page.write_text(f"{before}{_START}\n{found}\n{_END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
