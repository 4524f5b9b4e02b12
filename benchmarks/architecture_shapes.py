"""The shapes of the architectures benchmark, their twins, and the arithmetic of a step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from shapes import config_of
from transformers import AutoConfig, AutoModelForCausalLM


@dataclass(frozen=True)
class Shape:
    """A model of a few layers, and the recipe that it is trained with."""

    name: str
    config: Any
    recipe: str = "qwen3_8b"
    is_twin: bool = False

    @functools.cached_property
    def parameters(self) -> tuple[int, int]:
        """N of the model FLOPs, without input embeddings that are not tied: all, and those active in a token."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config)
        left_out = 0 if self.config.tie_word_embeddings else model.get_input_embeddings().weight.numel()
        experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        total = sum(p.numel() for p in model.parameters()) - left_out
        return total, total - experts + int(experts * self._active_share)

    @property
    def _active_share(self) -> float:
        for name in ("num_experts", "num_local_experts"):
            if count := getattr(self.config, name, None):
                return float(self.config.num_experts_per_tok / count)
        return 1.0

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads, key heads, and the size of a head."""
        config = self.config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return config.num_attention_heads, config.num_key_value_heads, size

    def flops(self, lengths: Any) -> float:
        """FLOPs of a step over samples of `lengths` with a frozen base: 4 for each active parameter and token, and 12
        for each element of a head and each pair of tokens that attend to each other (4 of them in the forward)."""
        heads, _, size = self.heads
        kinds = getattr(self.config, "layer_types", None) or ["full_attention"] * self.config.num_hidden_layers
        window = getattr(self.config, "sliding_window", None)
        pairs = {
            kind: sum(_pairs(int(n), window if "sliding" in kind else None) for n in lengths) for kind in set(kinds)
        }
        return 4.0 * self.parameters[1] * int(sum(lengths)) + 12.0 * heads * size * sum(pairs[kind] for kind in kinds)

    @functools.cached_property
    def twin(self) -> Shape:
        """The Llama of the same width, depth, vocabulary and attention projections, and as many active parameters."""
        if self.is_twin:
            return self
        config, (heads, key_heads, size) = self.config, self.heads
        own = 128 if (size * key_heads) % 128 == 0 else size
        values = {
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
            "num_attention_heads": heads * size // own,
            "num_key_value_heads": key_heads * size // own,
            "head_dim": own,
            "max_position_embeddings": 16_384,
            "tie_word_embeddings": config.tie_word_embeddings,
        }
        wanted = self.parameters[1]
        step = 3 * config.hidden_size * config.num_hidden_layers
        made = [_llama(f"{self.name}-llama", values, 64)]
        made.append(_llama(f"{self.name}-llama", values, 64 + round((wanted - made[0].parameters[1]) / step / 64) * 64))
        return made[-1]

    @property
    def facts(self) -> dict[str, Any]:
        config = self.config
        total, active = self.parameters
        inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        return {
            "architecture": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": inner,
            "vocabulary": config.vocab_size,
            "parameters": total,
            "active_parameters": active,
        }


def _pairs(length: int, window: int | None) -> int:
    """Pairs of a token and one that it attends to, itself included."""
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def _llama(name: str, values: dict[str, Any], inner: int) -> Shape:
    return Shape(name, AutoConfig.for_model("llama", intermediate_size=inner, **values), is_twin=True)


_MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32_768,
    "sliding_window": None,
}
SHAPES = {"qwen3_8b": 6, "gemma3_4b": 12, "phi4_mini": 8, "gpt_oss_20b": 8, "mixtral_8x7b": 4, "qwen3_30b_a3b": 8}
"""The layers of each: enough for its layers to outweigh its head, and few enough for all to fit into one GPU."""
_NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def shape_of(name: str, *, tiny: bool = False) -> Shape:
    """The shape `name` with the layers of `SHAPES`, or narrow."""
    if name == "mixtral_8x7b":
        recipe = "qwen3_30b_a3b"
        config = AutoConfig.for_model("mixtral", num_hidden_layers=SHAPES[name], **_MIXTRAL)
    else:
        recipe, config = name, config_of(name, SHAPES[name]).get_text_config()
    if tiny:
        values = {key: value for key, value in config.to_dict().items() if key not in ("layer_types", "model_type")}
        values |= {key: value for key, value in _NARROW.items() if key in values}
        rope = values.get("rope_parameters") or {}
        if "short_factor" in rope:
            values["rope_parameters"] = rope | {key: rope[key][:6] for key in ("short_factor", "long_factor")}
        config = AutoConfig.for_model(config.model_type, **values)
    return Shape(name, config, recipe)
