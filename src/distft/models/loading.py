"""Base model, tokenizer, quantisation, adapter: from a recipe to what SFTTrainer trains."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from distft import upstream_api
from distft.config.recipe import Recipe
from distft.distributed.collectives import reduce
from distft.distributed.strategies import Strategy
from distft.distributed.tensors import whole_numel
from distft.errors import ModelError
from distft.models import attention
from distft.models.activation_checkpointing import checkpoint_layers, layers_of, layers_to_checkpoint
from distft.models.fused_lora import fuse, keeps_int8_products
from distft.models.tiny import tiny_model


def model_path(recipe: Recipe) -> str:
    """Hub id or folder of the base; the embedded `tiny` is built where it is not there yet."""
    return str(tiny_model()) if recipe.model.name == "tiny" else str(Path(recipe.model.name).expanduser())


def load_tokenizer(recipe: Recipe) -> Any:
    """The model's tokenizer, with a pad token (the end-of-sequence token where it has none: labels, not the pad token,
    say what is learned, so the end of a sequence is learned all the same).

    Raises:
        ModelError: it cannot be had, or has no end-of-sequence token.
    """
    tokenizer = _from_hub(
        AutoTokenizer, recipe.model.tokenizer or model_path(recipe), "tokenizer",
        revision=None if recipe.model.tokenizer else recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code,
    )  # fmt: skip
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {recipe.model.name} has no end-of-sequence token, so no model could learn to stop; set model.tokenizer"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    section = recipe.quantization
    return BitsAndBytesConfig(**section.arguments()) if section is not None and section.is_quantized else None


def load_model(recipe: Recipe, strategy: Strategy) -> PreTrainedModel:
    """The base model with the recipe's adapter on it, if any; placed where the strategy wants it.

    Raises:
        ModelError: it cannot be had offline, is gated, does not fit in memory, or lacks the modules that lora names.
    """
    set_seed(recipe.run.seed)
    if not strategy.world.is_main or recipe.model.name == "tiny":
        disable_progress_bar()
    attention.register()
    shape = _from_hub(
        AutoConfig, model_path(recipe), "model", revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )  # fmt: skip
    kernel = attention.choose(recipe, shape, on_gpu=strategy.on_gpu)
    base = load_base(recipe, device_map=strategy.device_map(recipe), attn_implementation=kernel)
    base.config.use_cache = False
    if recipe.model.kernels == "auto" and strategy.on_gpu:
        _use_liger(base)
    if recipe.lora is None:
        return base
    set_seed(recipe.run.seed)  # loading may have drawn numbers on one rank and not on another
    config = LoraConfig(task_type="CAUSAL_LM", **recipe.lora)
    try:
        model = get_peft_model(base, config, autocast_adapter_dtype=not strategy.keeps_adapter_in_base_dtype(recipe))
    except ValueError as error:
        if "target modules" not in str(error).lower():
            raise
        names = sorted(
            {name.rsplit(".", 1)[-1] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
        )
        raise ModelError(
            f"{recipe.model.name} has no module that lora.target_modules={recipe.lora.get('target_modules')} names; it has {', '.join(names)}, "
            "or take all-linear"
        ) from error
    if recipe.model.kernels == "auto" and not strategy.gathers_in_submodules:
        fuse(model)
    return model


def checkpoint(model: Any, recipe: Recipe, strategy: Strategy, tokens: int | None) -> int | None:
    """Set activation checkpointing up for micro-batches of at most `tokens` tokens (None: unknown), where it is ours. Returns the number of layers
    that are checkpointed, the same on all ranks (None where the trainer sees to it). All ranks enter."""
    if not strategy.checkpoints_by_layer(recipe):
        return None
    count, offload = recipe.batching.checkpoint_layers, recipe.batching.offload_checkpoints
    if tokens is None:
        count = None  # the least memory, while a micro-batch is looked for
    elif count == "auto":
        count = 0
        if strategy.on_gpu:
            torch.cuda.empty_cache()
            trainable = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
            coming = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_cuda)
            free = torch.cuda.mem_get_info()[0] - coming // strategy.world.world_size
            count = layers_to_checkpoint(model, tokens, free, trainable, offload=offload)
        count = int(reduce([count], "max", strategy.world)[0])
    reentrant = keeps_int8_products(model)
    if reentrant:
        model.enable_input_require_grads()
    return checkpoint_layers(
        model, len(layers_of(model)) if count is None else count, offload=offload, reentrant=reentrant
    )


def _use_liger(base: Any) -> None:
    """liger's RMSNorm and rotary embedding, where it is installed and knows the architecture."""
    if not upstream_api.apply_liger_kernels(base):
        return
    for module in base.modules():
        if getattr(module, "casting_mode", None) == "llama" and not module.offset:  # liger knows whose norms are such
            module.ligers, module.forward = module.forward, types.MethodType(_rms_norm, module)


def _rms_norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A norm by PyTorch's own kernel: liger's, as fast on the device, keeps the host for 80 µs in the forward and 220 in the backward,
    this for 16 and 80. Where FSDP2 leaves the host no lead, the device waits for that."""
    if module.weight.dtype != x.dtype:
        ligers: torch.Tensor = module.ligers(x)
        return ligers
    with torch.autocast(
        x.device.type, enabled=False
    ):  # which would make it one of fp32; inside it computes in fp32 all the same
        return torch.nn.functional.rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def load_base(
    recipe: Recipe, *, device_map: dict[str, int] | None = None, attn_implementation: str | None = None
) -> Any:
    """The base alone, quantised (and unpacked again) as the recipe says.

    Raises:
        ModelError: it cannot be had.
    """
    base = _from_hub(
        AutoModelForCausalLM, model_path(recipe), "model", revision=recipe.model.revision,
        trust_remote_code=recipe.model.trust_remote_code, dtype=getattr(torch, recipe.model.dtype),
        quantization_config=quantization_config(recipe), device_map=device_map, use_safetensors=True,
        **({"attn_implementation": attn_implementation} if attn_implementation else {}),
    )  # fmt: skip
    if recipe.quantization is not None and recipe.quantization.dequantize_at_load:
        base = base.dequantize(dtype=getattr(torch, recipe.model.dtype))
        base.is_loaded_in_4bit = False
    for module in base.modules():
        upstream_api.disable_avx512_repacking(module)
    return base


def settle_adapter_dtype(model: Any, recipe: Recipe, strategy: Strategy) -> None:
    """Cast the adapter to fp32, its master weights, where TRL has cast it to bf16 because the base is quantised.

    In bf16 an update of less than 1/256 of a weight is rounded away, and fp16's loss scaler cannot handle bf16 gradients at
    all. The products are in the base's type all the same (`fused`, or autocast), so fp32 masters cost no time, but 12 bytes
    more a parameter of the adapter with AdamW.
    """
    if recipe.lora is None or strategy.keeps_adapter_in_base_dtype(recipe):
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def merge(recipe: Recipe, adapter: Path, target: Path, device_map: dict[str, int] | None = None) -> None:
    """The model that was trained as plain transformers weights: the base (dequantised first), the adapter merged into it.

    Raises:
        ModelError: the base cannot be had.
    """
    base = load_base(recipe, device_map=device_map)
    if recipe.bits < 16:
        base = base.dequantize(dtype=getattr(torch, recipe.model.dtype))
    merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    merged.save_pretrained(str(target), safe_serialization=True)
    load_tokenizer(recipe).save_pretrained(str(target))


def _from_hub(cls: Any, name: str, what: str, **options: Any) -> Any:
    """`cls.from_pretrained(name)`, with the remedy named where it fails."""
    place = Path(name)
    local = place.is_dir()
    if name.startswith(("/", "./", "../", "~")) and not local:
        raise ModelError(f"there is no folder {name} (model.name)")
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"{name} comes with Python code of its own; read it, then set model.trust_remote_code=true"
            ) from error
        if local and _is_missing(text):
            raise ModelError(f"the folder {name} holds no {what} that can be loaded: {text.splitlines()[0]}") from error
        if "gated" in text.lower() or "401" in text or "403" in text:
            raise ModelError(
                f"{name} is gated: accept its licence on its page on the hub, then `hf auth login` (or set HF_TOKEN)"
            ) from error
        if _is_missing(text):
            raise ModelError(
                f"the {what} of {name} is not in the local cache and the hub cannot be reached or does not have it\n"
                f"  on a machine with a connection: distft fetch, with the same words, or hf download {name}\n  or give a folder: model.name=/path/to/model"
            ) from error
        raise


def _is_missing(text: str) -> bool:
    signs = ("couldn't connect", "can't load", "is not a local folder", "offline mode", "localentrynotfound", "does not appear to have", "repository not found",
             "couldn't instantiate", "cannot find", "unrecognized model")  # fmt: skip
    return any(sign in text.lower() for sign in signs)


def non_embedding_parameters(model: Any) -> int:
    """N of the model FLOPs: all parameters but the input embeddings (the adapter's among them), 4-bit ones counted unpacked."""
    embedding = model.get_input_embeddings()
    skipped = {id(parameter) for parameter in embedding.parameters()} if embedding is not None else set()
    tied = getattr(model.config, "tie_word_embeddings", False)
    return sum(whole_numel(p) for p in model.parameters() if tied or id(p) not in skipped)


def recomputed_parameters(model: Any, *, by_trainer: bool = False) -> int:
    """Parameters of the layers whose forward runs a second time in the backward, 4-bit ones counted unpacked. `by_trainer`: the
    trainer will checkpoint every layer; else it is those that `checkpoint` chose."""

    def count(module: Any) -> int:
        return sum(whole_numel(parameter) for parameter in module.parameters())

    found = 0
    for layer in layers_of(model):
        if by_trainer or layer.gradient_checkpointing:
            found += count(layer)
            mlp: Any = getattr(layer, "mlp", None)
            # The fused MLP leaves its last product out, for nothing in the backward looks at it.
            if not by_trainer and getattr(mlp, "output_ends_checkpoint", False) and hasattr(mlp.down_proj, "is_fused"):
                found -= count(mlp.down_proj)
    return found
