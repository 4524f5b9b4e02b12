"""Functions that use private names of other libraries, each of which is checked on its first use (`upstream_names`).

This module imports no library until a function needs it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distft.upstream_names import checked

# torch ----------------------------------------------------------------------------------------------------------------


def default_store() -> Any:
    """The key-value store of the default process group."""
    return checked("_get_default_store")()


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as it does when a layer is recomputed."""
    return bool(checked("_current_graph_task_id")() != -1)


def set_allocator_settings(settings: str) -> None:
    """Configure the CUDA allocator of this process as `PYTORCH_CUDA_ALLOC_CONF` would."""
    checked("_accelerator_setAllocatorSettings")(settings)


def profiler_events(profiler: Any) -> list[Any]:
    """The raw events of a stopped `torch.profiler.profile`."""
    checked("kineto_results")
    return list(profiler.profiler.kineto_results.events())


def flash_attention_backward(
    grad: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, bounds: Any, longest: int, *, scale: float, window: int
) -> tuple[Any, Any, Any]:
    """The gradients of q, k and v of causal attention over packed samples whose output is `out` and whose log-sum-exp
    is `lse` [heads, tokens]; a query looks back `window` tokens, or at all of its sample with -1."""
    import torch

    checked("_flash_attention_backward")
    backward = torch.ops.aten._flash_attention_backward
    state, unused = (torch.zeros(size, dtype=kind, device=q.device) for size, kind in ((2, torch.uint64), (0, q.dtype)))
    found: tuple[Any, Any, Any] = backward(
        *(grad, q, k, v, out, lse, bounds, bounds, longest, longest, 0.0, window == -1, state, unused),
        scale=scale,
        window_size_left=window,
        window_size_right=0,
    )
    return found


# transformers ---------------------------------------------------------------------------------------------------------


def use_one_gpu(arguments: Any) -> None:
    """Keep the trainer of a single process on one GPU, where it would use `nn.DataParallel` over all of them."""
    checked("_n_gpu")
    if arguments.n_gpu > 1:  # reading the property settles the devices
        arguments._n_gpu = 1


def attn_implementation(config: Any) -> str:
    """The attention implementation that a model with this configuration runs."""
    checked("_attn_implementation")
    return str(config._attn_implementation)


def attention_is_fixed(kind: Any) -> bool:
    """Whether models of this class compute attention in their own way, and not through transformers' interface."""
    checked("_can_set_attn_implementation")
    return not kind._can_set_attn_implementation()


def supports_attention(kind: Any, name: str) -> bool:
    """Whether models of this class can be built with the attention `name`, as far as transformers tells."""
    for flag in ("_supports_sdpa", "_supports_flex_attn", "_supports_flash_attn"):
        checked(flag)
    flags = {"sdpa": kind._supports_sdpa, "flex_attention": kind._supports_flex_attn}
    return bool(kind._supports_flash_attn if name.startswith("flash") else flags.get(name, True))


def layers_not_to_split(model: Any) -> set[str]:
    """The names of the classes of layers that stay whole on a device; a model may lack some of them."""
    checked("_no_split_modules")
    return set(getattr(model, "_no_split_modules", None) or ())


def has_standard_experts(module: Any) -> bool:
    """Whether `module` is of a class of experts for which transformers has several implementations."""
    checked("_apply_gate")
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "has_bias")


def experts_implementation(config: Any) -> str:
    """The implementation of experts that a model with this configuration runs."""
    checked("_experts_implementation")
    return str(config._experts_implementation)


def expert_gate(module: Any) -> Callable[[Any], Any]:
    """The gated activation of such a module: [rows, 2 · inner] → [rows, inner]."""
    gate: Callable[[Any], Any] = module._apply_gate
    return gate


def checkpoint_layer_with(layer: Any, function: Callable[..., Any]) -> None:
    """Let `function` run the forward of a `GradientCheckpointingLayer` while its checkpointing is on."""
    checked("_gradient_checkpointing_func")
    layer._gradient_checkpointing_func = function


def running_loss(trainer: Any) -> Any:
    """A copy of the loss that the trainer has summed since its last log."""
    checked("_tr_loss")
    return trainer._tr_loss.clone()


def forget_step(trainer: Any, loss_before: Any) -> None:
    """Take a step out of the trainer's mean loss; `loss_before` is the `running_loss` before it."""
    checked("_globalstep_last_logged")
    trainer._tr_loss.copy_(loss_before)
    trainer._globalstep_last_logged += 1


def load_best_model(trainer: Any, checkpoint: Path) -> None:
    """Give the trainer's model the weights in `checkpoint`, under any strategy. All ranks must call this."""
    checked("_load_best_model")
    trainer.state.best_model_checkpoint = str(checkpoint)
    trainer._load_best_model()


def to_trainer_device(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch on the trainer's device."""
    checked("_prepare_inputs")
    prepared: dict[str, Any] = trainer._prepare_inputs(inputs)
    return prepared


# PEFT -----------------------------------------------------------------------------------------------------------------


def peft_refuses(model: Any, name: str) -> bool:
    """Whether PEFT puts no adapter on modules of this name in this kind of model."""
    from peft import LoraConfig

    try:
        checked("_check_lora_target_modules_mamba")(LoraConfig(), model, name)
    except ValueError:
        return True
    return False


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Let the block compute with the base alone. Unlike PEFT's `disable_adapter`, it leaves `requires_grad` as it is,
    which FSDP2 reads when it first gathers a parameter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    checked("_disable_adapters", "peft.tuners.tuners_utils:BaseTunerLayer")
    checked("_disable_adapters", "peft.utils.other:AuxiliaryTrainingWrapper")
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


# TRL ------------------------------------------------------------------------------------------------------------------


def select_tokens_on_host() -> None:
    """Let TRL's fused head take all positions it is given, instead of selecting the trained ones on the device.

    Only the head looks this name up in its module, and only for that choice; TRL's kernels have their own.
    """
    checked("_use_triton")
    module: Any = importlib.import_module("trl.trainer.utils")
    module._use_triton = lambda device: False


def disable_dropout(model: Any) -> None:
    """Set the rate of all dropout in `model` to 0."""
    checked("disable_dropout_in_model")(model)


def score_squares(model: Any) -> None:
    """Let TRL's fused head return log Σ p², too, which weights of WPO need."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    checked("add_fused_lm_head")(causal, outputs=("log_probs", "entropy", "is_top1", "log_sum_sq_probs"))


def clear_evaluation_metrics(trainer: Any) -> None:
    """Drop what TRL has gathered for the log of an evaluation."""
    checked("_metrics")
    trainer._metrics["eval"].clear()


def children_of(module: Any) -> dict[str, Any]:
    """The modules in `module` by name, a shared one under each of its names. Assigning to it replaces one."""
    checked("_modules")
    children: dict[str, Any] = module._modules
    return children


def with_parameters(module: Any, change: Callable[[Any], Any]) -> Any:
    """A shallow copy of `module` with `change` of each of its own parameters."""
    checked("_parameters")
    found = copy.copy(module)
    found._parameters = {
        name: None if parameter is None else change(parameter) for name, parameter in module._parameters.items()
    }
    return found


def gather_bytes() -> None:
    """Let FSDP2 gather shards as bytes, in this process from now on.

    On a GPU, its `torch._foreach_copy_` of 16-bit numbers replaces each NaN by the same one (pytorch/pytorch#159333).
    Among the bits of packed weights there are some: about one number in a thousand, each of which holds four weights.
    """
    import torch

    name = "_get_all_gather_input_metadatas"
    original = checked(name)

    def metadata(param_all_gather_inputs: Any) -> tuple[Any, Any, Any]:
        dtypes, sizes, _ = original(param_all_gather_inputs)
        return dtypes, sizes, torch.uint8

    module = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    setattr(module, name, metadata)


# The rest -------------------------------------------------------------------------------------------------------------


def set_distributed_type(state: Any, kind: Any) -> None:
    """Set the distributed type of an `AcceleratorState`, and of the state that all its instances share."""
    checked("_shared_state", "accelerate.state:PartialState")
    state.distributed_type = kind
    importlib.import_module("accelerate.state").PartialState._shared_state["distributed_type"] = kind


@contextmanager
def own_accelerate_state() -> Iterator[None]:
    """Give the block accelerate's states as in a fresh process, and bring back what was there."""
    kinds = ("PartialState", "AcceleratorState", "GradientState")
    modules = [checked("_shared_state", f"accelerate.state:{kind}") for kind in kinds]
    shared = [getattr(module, kind)._shared_state for module, kind in zip(modules, kinds, strict=True)]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        yield
    finally:
        for state, old in zip(shared, before, strict=True):
            state.clear()
            state.update(old)


def mixed_precision(state: Any) -> str:
    """The mixed precision of an `AcceleratorState`, before its own properties can answer."""
    checked("_mixed_precision")
    return str(state._mixed_precision)


def type_in_forward(accelerator: Any, parameter: Any) -> Any:
    """The type in which a forward sees a parameter: FSDP2 gathers it in that of mixed precision."""
    policy = getattr(getattr(accelerator.state, "fsdp_plugin", None), "mixed_precision_policy", None)
    return getattr(policy, "param_dtype", None) or parameter.dtype


def apply_liger_kernels(model: Any) -> bool:
    """Use liger's norms and rotary embeddings in `model`; False where liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    checked("_apply_liger_kernel_to_instance")(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False, swiglu=False, geglu=False
    )
    return True


def disable_avx512_repacking(module: Any) -> None:
    """Keep a 4-bit linear in the layout that has a gradient.

    On CPUs with AVX512-BF16, bitsandbytes repacks the weights at the first evaluation, for a kernel without a gradient:
    every training step after that would be wrong, without an error.
    """
    if "bitsandbytes.nn.modules" in sys.modules:
        checked("support_avx512bf16_for_cpu")
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


def bitsandbytes_library() -> str | None:
    """File name of bitsandbytes' native library; None where it could not be loaded."""
    checked("_lib")
    library = vars(importlib.import_module("bitsandbytes.cextension").lib)  # its stand-in answers any getattr
    return Path(library["_lib"]._name).name if "_lib" in library else None


def dataset_fingerprint(dataset: Any) -> str:
    """The fingerprint of a `datasets.Dataset`."""
    checked("_fingerprint")
    return str(dataset._fingerprint)


def render_chats(
    template: str,
    conversations: list[list[dict[str, Any]]],
    tools: list[Any] | None,
    variables: dict[str, str],
    *,
    spans: bool = False,
    answer_next: bool = False,
) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Each conversation as text, and if `spans` is set, the characters within the template's generation markers.

    Raises whatever the template raises. With `answer_next`, the text ends where the assistant is to speak.
    """
    render = checked("render_jinja_template")
    texts, indices = render(
        conversations=conversations,
        tools=tools,
        chat_template=template,
        return_assistant_tokens_mask=spans,
        add_generation_prompt=answer_next,
        **variables,
    )
    return texts, indices


def has_generation_markers(template: str) -> bool:
    """Whether a chat template marks what the assistant generates."""
    return bool(checked("has_generation_markers")(template))


def training_template(tokenizer: Any) -> str | None:
    """TRL's training template for the tokenizer's; None if TRL has none or knows of no need for one."""
    try:
        found: str | None = checked("get_training_chat_template")(tokenizer)
    except ValueError:
        return None
    return found


def dataset_rows(dataset: Any) -> Any:
    """The rows of its table that a `datasets.Dataset` selects, [n], in order; None for all of them."""
    checked("_indices")
    return None if dataset._indices is None else dataset._indices.column(0).to_numpy()


def set_lm_eval_rank(model: Any, rank: int, world_size: int) -> None:
    """Tell an `HFLM` which share of the requests is its own."""
    checked("_rank")
    checked("_world_size")
    model._rank, model._world_size = rank, world_size
