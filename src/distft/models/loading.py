"""From a recipe to a model and its tokenizer: the base, quantised as the recipe asks, and the adapter on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Mxfp4Config,
    PreTrainedModel,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.connection import cache_if_unreachable
from distft.data.named_templates import OWN, use_template
from distft.distributed.strategies import Strategy
from distft.errors import ModelError
from distft.kernels.liger import use_fast_kernels
from distft.models import attention
from distft.models.adapter import add_adapter
from distft.models.embeddings import add_rows, vocabulary_size
from distft.models.locations import local_folder, location_problem
from distft.models.tiny import tiny_model
from distft.text import first_line

_MISSING = (
    "couldn't connect",
    "can't load",
    "is not a local folder",
    "offline mode",
    "localentrynotfound",
    "does not appear to have",
    "repository not found",
    "couldn't instantiate",
    "cannot find",
    "unrecognized model",
)
"""Phrases, in lower case, with which transformers says that files are missing."""

_HEADS = ("lm_head", "embed_out", "output_layer")
"""Names of the output head in transformers' causal language models."""


def model_path(recipe: Recipe) -> str:
    """Hub id or folder of the base model. The embedded model `tiny` is built on first use."""
    return _place(recipe.model.name)


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the model's tokenizer, with the chat template that the recipe names. One without a pad token pads with its
    end-of-sequence token.

    That is safe because labels, not tokens, decide what is trained: the end of a sequence is still learned.

    Raises:
        ModelError: the tokenizer cannot be loaded, or has no end-of-sequence token.
        DataError: there is no such template, or it fails.
    """
    return tokenizer_and_new_tokens(recipe)[0]


def tokenizer_and_new_tokens(recipe: Recipe) -> tuple[Any, list[int]]:
    """What `load_tokenizer` loads, and the numbers of the tokens that `data.chat_template` has added to it."""
    tokenizer = from_pretrained(
        AutoTokenizer,
        _place(recipe.model.tokenizer or recipe.model.name),
        "tokenizer",
        revision=None if recipe.model.tokenizer else recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {recipe.model.name} has no end-of-sequence token, without which a model cannot learn to "
            "stop; set model.tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    name = recipe.data.chat_template
    new = [] if name in (None, OWN) else use_template(tokenizer, str(name))
    return tokenizer, tokenizer.convert_tokens_to_ids(new)


def _new_tokens(recipe: Recipe) -> list[int]:
    """The tokens that `data.chat_template` adds. Loads no tokenizer for the template that it has already."""
    return [] if recipe.data.chat_template in (None, OWN) else tokenizer_and_new_tokens(recipe)[1]


def of_whole_model(recipe: Recipe, result: Path) -> Recipe:
    """The recipe with the whole model that it trained and saved in `result` as its base, which has the rows of new
    tokens already."""
    model = {"name": str(result), "revision": None, "tokenizer": None, "resize_embeddings": False}
    data = recipe.data.model_copy(update={"chat_template": None})
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=model), "data": data})


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    section = recipe.quantization
    if section is None or not section.is_quantized:
        return None
    arguments = section.arguments()
    if skipped := arguments.pop("llm_int8_skip_modules", None):  # transformers would quantise the head then
        arguments["llm_int8_skip_modules"] = [*_HEADS, *skipped]
    return BitsAndBytesConfig(**arguments)


def stored_method(config: Any) -> str | None:
    """The quantisation in which a model's weights are stored; None if they are not quantised."""
    stored = getattr(config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def packing_experts(recipe: Recipe) -> AbstractContextManager[None]:
    """Let transformers quantise experts as well, if the recipe does."""
    section = recipe.quantization
    if section is None or not (section.load_in_4bit and section.experts):
        return nullcontext()
    from distft.models import four_bit  # it imports bitsandbytes

    return four_bit.packing_experts()


def load_model(recipe: Recipe, strategy: Strategy, loaded: Callable[[Any], None] | None = None) -> PreTrainedModel:
    """Load the base model, with the recipe's adapter if it has one, on the device where the strategy wants it. `loaded`
    sees the base before anything else is done to it.

    Raises:
        ModelError: the model is gated or not available, or lacks the modules that `lora.target_modules` names.
    """
    set_seed(recipe.run.seed)
    if not strategy.world.is_main or recipe.model.name == "tiny":
        disable_progress_bar()
    attention.register()
    config = from_pretrained(
        AutoConfig,
        model_path(recipe),
        "model",
        revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    implementation = attention.choose(recipe, config, on_gpu=strategy.on_gpu)
    place = strategy.device_map(recipe)
    base = load_base(recipe, device_map=place, attn_implementation=implementation, loaded=loaded)
    base.config.use_cache = False
    if recipe.model.kernels == "auto" and strategy.on_gpu:
        use_fast_kernels(base)
    if recipe.lora is None:
        if not (recipe.updates_16_bits or strategy.updates_copies):
            base.float()  # mixed precision computes in 16 bits, and updates weights of 32
        return base
    known = config.get_text_config().vocab_size
    return add_adapter(base, recipe, strategy, known_rows=known, new_tokens=_new_tokens(recipe))


def load_base(
    recipe: Recipe,
    *,
    device_map: dict[str, int] | None = None,
    attn_implementation: str | None = None,
    loaded: Callable[[Any], None] | None = None,
) -> Any:
    """Load the base model without an adapter, quantised (and dequantised again) and with the rows of its embeddings as
    the recipe asks. `loaded` sees it as it was quantised.

    Raises:
        ModelError: the model is gated or not available.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if recipe.model.experts_implementation != "auto":
        options["experts_implementation"] = recipe.model.experts_implementation
    with packing_experts(recipe):
        base = from_pretrained(
            AutoModelForCausalLM,
            model_path(recipe),
            "model",
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
            dtype=getattr(torch, recipe.model.dtype),
            quantization_config=quantization_config(recipe) or _unpacking(recipe),
            device_map=device_map,
            use_safetensors=True,
            **options,
        )
    if loaded is not None:
        loaded(base)
    if recipe.quantization is not None and recipe.quantization.dequantize_at_load:
        base = base.dequantize(dtype=getattr(torch, recipe.model.dtype))
        base.is_loaded_in_4bit = False
    new = _new_tokens(recipe)
    if recipe.model.resize_embeddings or new:
        add_rows(base, vocabulary_size(load_tokenizer(recipe)), new)
    for module in base.modules():
        upstream_api.disable_avx512_repacking(module)
    return base


def _unpacking(recipe: Recipe) -> Mxfp4Config | None:
    """What unpacks weights that are stored in MXFP4 (gpt-oss), in which they cannot be trained."""
    section = recipe.model
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = from_pretrained(AutoConfig, model_path(recipe), "model", **options)
    return Mxfp4Config(dequantize=True) if stored_method(config) == "mxfp4" else None


def _place(name: str) -> str:
    return str(tiny_model() if name == "tiny" else local_folder(name) or name)


def from_pretrained(cls: Any, name: str, what: str, **options: Any) -> Any:
    """`cls.from_pretrained(name)`; a failure says what the user can do. `what` is "model" or "tokenizer".

    Raises:
        ModelError: there is no such model, or it is gated, incomplete, or of an unknown kind.
    """
    if problem := location_problem(name, what):
        raise ModelError(f"{problem} (model.{'name' if what == 'model' else what})")
    is_folder = local_folder(name) is not None
    try:
        with nullcontext() if is_folder else cache_if_unreachable():
            return cls.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        text = str(error)
        missing = any(phrase in text.lower() for phrase in _MISSING)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{name} comes with its own Python code; read it, then set model.trust_remote_code=true"
            ) from error
        if is_folder and missing:
            raise ModelError(f"cannot load a {what} from the folder {name}: {first_line(error)}") from error
        if "gated" in text.lower() or "401" in text or "403" in text:
            raise ModelError(
                f"{name} is gated: accept its licence on its hub page, then run `hf auth login` (or set HF_TOKEN)"
            ) from error
        if missing:
            raise ModelError(
                f"there is no folder {name} here, and as a model of the hub, the {what} of {name} is not in the local "
                "cache, and the hub cannot be reached or does not have it\n"
                f"  on a machine with network access, run distft fetch with the same arguments or: hf download {name}\n"
                "  or use a local folder: model.name=/path/to/model"
            ) from error
        raise
