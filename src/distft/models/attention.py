"""Which attention implementation a model is computed with."""

from __future__ import annotations

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.errors import ModelError
from distft.models.unpacked import UNPACKED, unpacked_attention
from distft.models.varlen import LARGEST_HEAD, VARLEN, kernel, kernel_options, varlen_attention

SOFT_CAPPING = "soft-capping"
_HEAD_SIZES = ("head_dim", "global_head_dim", "qk_head_dim", "v_head_dim")
_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "attn_dropout")
"""The names that configurations have for them."""


def choose(recipe: Recipe, config: PreTrainedConfig, *, on_gpu: bool) -> str:
    """The attention implementation to load the model with: the recipe's, or the first of those that `auto` may use.

    Raises:
        ModelError: the recipe asks for one that cannot run here, or that the model lacks.
    """
    asked, half = recipe.model.attn_implementation, _in_16_bits(recipe)
    if asked == "auto":
        return choices(recipe, config, on_gpu=on_gpu)[0]
    if asked == VARLEN and not (on_gpu and half and kernel() is not None):
        raise ModelError(
            "model.attn_implementation=varlen needs a GPU, bfloat16 or float16, and a PyTorch that has varlen_attn; "
            "use sdpa or auto"
        )
    feature = missing_feature(config)
    if feature and (asked == VARLEN or (asked, feature) == ("sdpa", SOFT_CAPPING)):
        others = "eager or auto" if feature == SOFT_CAPPING else "sdpa or auto"
        raise ModelError(
            f"model.attn_implementation={asked} does not support {feature}, which {recipe.model.name} needs; "
            f"use {others}"
        )
    if not has_attention(config, asked):
        raise ModelError(f"{recipe.model.name} has no {asked} attention; set model.attn_implementation=auto")
    return asked


def choices(recipe: Recipe, config: PreTrainedConfig, *, on_gpu: bool) -> list[str]:
    """The implementations that `auto` may use, the fastest first.

    On a GPU, the first is flash-attn if it is installed; then, for packed samples, PyTorch's variable-length kernel if
    it supports the model. Then come SDPA and, last, the model's plain ("eager") attention, as far as the model has
    them. For packs, transformers gives both a block-diagonal mask, whose memory is quadratic in the length of the pack;
    on a GPU, attention that unpacks the samples is better than eager attention. On a CPU, it is for models whose masks
    are wrong in packs.
    """
    packed, lacks = recipe.batching.micro_batch_tokens is not None, missing_feature(config)
    names = []
    if on_gpu and _in_16_bits(recipe):
        if is_flash_attn_2_available():
            names.append("flash_attention_2")  # which lacks sinks
        if packed and kernel() is not None and not lacks:
            names.append(VARLEN)
    if lacks != SOFT_CAPPING:  # some versions of transformers leave it out there without a word
        names.append("sdpa")
    names.append("eager")
    if packed:
        names.insert(-1 if on_gpu else len(names), UNPACKED)
    return [name for name in names if has_attention(config, name)]


def for_generation(config: PreTrainedConfig, trained: str) -> str:
    """The implementation in which a model that trains with the implementation `trained` can write."""
    if trained not in (VARLEN, UNPACKED):
        return trained
    return "sdpa" if missing_feature(config) != SOFT_CAPPING and has_attention(config, "sdpa") else "eager"


def _in_16_bits(recipe: Recipe) -> bool:
    return recipe.model.dtype != "float32" or recipe.mixed_precision != "no"


def has_attention(config: PreTrainedConfig, name: str) -> bool:
    """Whether the architecture has the implementation `name`. One with code of its own is only known when it is
    built."""
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None:
        return True
    if name in (VARLEN, UNPACKED):  # a model that does not call it would attend without any mask
        return not upstream_api.attention_is_fixed(kind)
    return upstream_api.supports_attention(kind, name)


def missing_feature(config: PreTrainedConfig) -> str | None:
    """A feature that attention with this `config` needs and the variable-length kernel lacks, or None."""
    text = config.get_text_config()

    def largest(*names: str) -> float:
        found = (getattr(text, name, None) for name in names)
        return max((value for value in found if isinstance(value, int | float)), default=0)  # some have lists

    heads = largest("num_attention_heads")
    size = largest(*_HEAD_SIZES) or (largest("hidden_size") // heads if heads else 0)
    windowed = largest("sliding_window") and getattr(text, "use_sliding_window", True)
    unsupported = {
        "attention dropout": largest(*_DROPOUTS),
        SOFT_CAPPING: largest("attn_logit_softcapping"),
        "sliding window": windowed and kernel() is not None and "window_size" not in kernel_options(),
        "chunked attention": largest("attention_chunk_size"),
        f"heads of size {size}": size > LARGEST_HEAD,
    }
    return next((name for name, needed in unsupported.items() if needed), None)


def register() -> None:
    """Register `varlen` and `unpacked` with transformers.

    They have no mask functions: to build a mask, transformers would search for sample boundaries in every forward, and
    wait for the device.
    """
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(UNPACKED, unpacked_attention)
