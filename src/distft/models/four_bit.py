"""bitsandbytes' 4 bits for the experts of a mixture as well, which transformers would leave in 16 bits without a word.

Each weight is packed when its tensors have been read, as those of linears are: a load takes no more memory than the
packed model and one whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from distft.models.experts import dequantize_experts, expert_weights, quantize

_METHOD = "bitsandbytes_4bit"


@contextmanager
def packing_experts() -> Iterator[None]:
    """Let transformers pack experts where it quantises to 4 bits."""
    before = auto.AUTO_QUANTIZER_MAPPING[_METHOD]
    auto.AUTO_QUANTIZER_MAPPING[_METHOD] = Quantizer
    try:
        yield
    finally:
        auto.AUTO_QUANTIZER_MAPPING[_METHOD] = before


class Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """transformers' own, and experts."""

    experts: frozenset[str] = frozenset()
    """The names of their weights."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> Any:
        return _Quantize(self, super().get_quantize_ops())

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            self.experts = frozenset(
                f"{path}.{name}" for path, module in model.named_modules() for name in expert_weights(module)
            )
        super()._process_model_before_weight_loading(model, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        states: dict[str, dict[str, Any]] = {}
        for full in sorted(self.experts):
            path, _, name = full.rpartition(".")
            states.setdefault(path, {})[name] = model.get_parameter(full).quant_state
        for path, found in states.items():
            quantize(model.get_submodule(path), found)
        return super()._process_model_after_weight_loading(model, **kwargs)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        dequantize_experts(model, dtype)
        return super()._dequantize(model, dtype)


class _Quantize(ConversionOps):  # type: ignore[misc]
    """Packs the weights of experts, and leaves others to `others`."""

    def __init__(self, quantizer: Quantizer, others: ConversionOps) -> None:
        self._quantizer, self._others = quantizer, others

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        config, packed = self._quantizer.quantization_config, {}
        for name in [name for name in input_dict if name in self._quantizer.experts]:
            value = input_dict.pop(name)
            weight = value[0] if isinstance(value, list) else value
            del value
            packed[name] = Params4bit(
                weight,
                requires_grad=False,
                compress_statistics=config.bnb_4bit_use_double_quant,
                quant_type=config.bnb_4bit_quant_type,
                quant_storage=config.bnb_4bit_quant_storage,
            ).to(weight.device)
        return packed | (self._others.convert(input_dict, *args, **kwargs) if input_dict else {})
