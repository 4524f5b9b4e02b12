"""Every private name of another library that distft uses or overrides. The functions that do so are in `upstream_api`.

A private name can disappear in any release. Assigning to one that is gone, or overriding a hook that is no longer
called, raises nothing: the run just becomes slower or wrong. `check` therefore compares `PRIVATE_NAMES` with what is
installed: training calls it before it loads anything, and `checked` checks a name on its first use.

Public but undocumented names whose loss would be silent are listed as well. This module imports no library until a
function needs it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distft.errors import UpstreamError

Use = Literal["call", "override", "replace", "attribute"]


@dataclass(frozen=True)
class PrivateName:
    """A name that distft relies on.

    `owner` is the module, or `module:Class`, that has the name. `use` says how distft depends on it:

    - `call`: it is called or read, and must accept `parameters`;
    - `override`: a subclass defines it, so it must exist, accept `parameters`, and be called by the owner's module;
    - `replace`: its global in the owner's module is replaced, so the module must still look it up there;
    - `attribute`: the owner's module sets it on instances, so that no class has it.

    `source`, if given, is a regular expression that the source of the owner's module has to match.
    """

    library: str
    owner: str
    name: str
    use: Use
    purpose: str
    parameters: tuple[str, ...] = ()
    source: str | None = None

    @property
    def module(self) -> str:
        return self.owner.partition(":")[0]

    def problem(self) -> str | None:
        """What is wrong with the name in the installed library, or None. Imports the owner's module."""
        module = importlib.import_module(self.module)
        owner = functools.reduce(getattr, filter(None, [self.owner.partition(":")[2]]), module)
        if self.use != "attribute":
            if not hasattr(owner, self.name):
                return "is gone"
            if lacking := self._lacking(getattr(owner, self.name)):
                return f"no longer accepts {', '.join(lacking)}"
        pattern = self.source or self._default_source()
        if pattern is not None and re.search(pattern, _source(self.module), re.MULTILINE) is None:
            return {"attribute": "is no longer set", "override": "is no longer called"}.get(
                self.use, "is no longer used in the same way"
            )
        return None

    def _default_source(self) -> str | None:
        name = re.escape(self.name)
        return {
            "attribute": rf"(self\.{name}\b[^=\n]*=[^=]|^    {name}: )",
            "override": rf"self\.{name}\(",
            "replace": rf"\b{name}\(",
        }.get(self.use)

    def _lacking(self, found: Any) -> list[str]:
        try:
            accepted = inspect.signature(found).parameters
        except (TypeError, ValueError):  # functions in C have no signature; neither do plain values
            return list(self.parameters)
        return [parameter for parameter in self.parameters if parameter not in accepted]


def _of(library: str, owner: str) -> Callable[..., PrivateName]:
    return functools.partial(PrivateName, library, owner)


_c10d = _of("torch", "torch.distributed.distributed_c10d")
_trainer = _of("transformers", "transformers.trainer:Trainer")
_arguments = _of("transformers", "transformers.training_args:TrainingArguments")
_config = _of("transformers", "transformers.configuration_utils:PreTrainedConfig")
_model = _of("transformers", "transformers.modeling_utils:PreTrainedModel")
_layer = _of("transformers", "transformers.modeling_layers:GradientCheckpointingLayer")
_trl = _of("trl", "trl.trainer.utils")
_head = _of("trl", "trl.trainer.utils:FusedCausalLMOutput")
_sft = _of("trl", "trl.trainer.sft_trainer:SFTTrainer")
_loader = _of("accelerate", "accelerate.data_loader:DataLoaderShard")
_process = _of("accelerate", "accelerate.state:PartialState")
_state = _of("accelerate", "accelerate.state:AcceleratorState")
_liger = _of("liger-kernel", "liger_kernel.transformers")
_linear4bit = _of("bitsandbytes", "bitsandbytes.nn.modules:Linear4bit")
_native = _of("bitsandbytes", "bitsandbytes.cextension:BNBNativeLibrary")
_dataset = _of("datasets", "datasets.arrow_dataset:Dataset")
_templates = _of("transformers", "transformers.utils.chat_template_utils")
_training_templates = _of("trl", "trl.chat_template_utils")
_module = _of("torch", "torch.nn.modules.module:Module")
_gathering = _of("torch", "torch.distributed.fsdp._fully_shard._fsdp_collectives")
_wandb = _of("wandb", "wandb.sdk.wandb_settings:Settings")
_hflm = _of("lm-eval", "lm_eval.models.huggingface:HFLM")
_evaluation_loop = ("dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix")

PRIVATE_NAMES: tuple[PrivateName, ...] = (
    _c10d("_get_default_store", "call", "let ranks agree through the group's store, without a device"),
    _of("torch", "torch._C")("_current_graph_task_id", "call", "tell a recomputed forward from the first one"),
    _of("torch", "torch._C")(
        "_accelerator_setAllocatorSettings", "call", "use expandable segments, because packs differ in length"
    ),
    _of("torch", "torch._meta_registrations")(
        "_flash_attention_backward",
        "attribute",
        "train through attention sinks in packs",
        source=r"aten\._flash_attention_backward\b",
    ),
    _of("torch", "torch.autograd.profiler:profile")(
        "kineto_results", "attribute", "read the profiler's events without building a Python object for each"
    ),
    _module("_modules", "attribute", "put frozen modules in the places of an adapter's"),
    _module("_parameters", "attribute", "copy a module with frozen parameters"),
    _gathering(
        "_get_all_gather_input_metadatas",
        "replace",
        "gather packed weights without changing a bit",
        ("param_all_gather_inputs",),
        source=r"if dtype == torch\.uint8:",
    ),
    _trainer("_get_grad_norm", "override", "leave out a step that is not finite", ("model", "grad_norm")),
    _trainer("_tr_loss", "attribute", "leave out a step that is not finite"),
    _trainer("_globalstep_last_logged", "attribute", "leave out a step that is not finite"),
    _trainer("_maybe_log_save_evaluate", "override", "judge a step's numbers before they are logged or saved"),
    _trainer("_save_checkpoint", "override", "save checkpoints whole or not at all", ("model", "trial")),
    _trainer("_determine_best_metric", "override", "save the best model, and stop early", ("metrics", "trial")),
    _trainer("_load_best_model", "call", "end with the best model"),
    _trainer("_run_epoch", "override", "train no step after the last one when a run resumes there"),
    _trainer("_prepare_inputs", "call", "move evaluation batches to the device", ("inputs",)),
    _trainer("get_batch_samples", "override", "time the wait for data and skip empty rounds", ("epoch_iterator",)),
    _trainer("evaluation_loop", "override", "weight the evaluation loss by tokens", _evaluation_loop),
    _trainer("floating_point_ops", "override", "skip a count over all parameters in every micro-batch", ("inputs",)),
    _arguments("_n_gpu", "attribute", "keep a single process from wrapping the model in nn.DataParallel"),
    _config(
        "_attn_implementation",
        "attribute",
        "record which attention the model was loaded with",
        source=r"def _attn_implementation\(self\)|self\._attn_implementation\b",
    ),
    _config(
        "_experts_implementation",
        "attribute",
        "compute experts one by one in the check of micro-batches, and again as before",
        source=r"def _experts_implementation\(self\)|self\._experts_implementation\b",
    ),
    _model("_can_set_attn_implementation", "call", "know which models have attention of their own"),
    _model("_no_split_modules", "attribute", "know which layers FSDP2 shards as units"),
    _model("_supports_sdpa", "call", "choose an attention implementation"),
    _model("_supports_flex_attn", "call", "choose an attention implementation"),
    _model("_supports_flash_attn", "call", "choose an attention implementation"),
    _layer(
        "_gradient_checkpointing_func",
        "attribute",
        "checkpoint some layers and not others",
        source=r"self\._gradient_checkpointing_func\(",
    ),
    _of("transformers", "transformers.integrations.moe")(
        "_apply_gate",
        "attribute",
        "compute experts in grouped products",
        source=r"experts_class\._apply_gate = ",
    ),
    _of("peft", "peft.tuners.tuners_utils:BaseTunerLayer")(
        "_disable_adapters", "attribute", "compute with the base alone, and leave requires_grad as it is"
    ),
    _of("peft", "peft.utils.other:AuxiliaryTrainingWrapper")(
        "_disable_adapters", "attribute", "compute with the base alone, and leave requires_grad as it is"
    ),
    _of("peft", "peft.tuners.tuners_utils")(
        "_check_lora_target_modules_mamba",
        "call",
        "leave out of all-linear what PEFT refuses",
        ("peft_config", "model", "target_name"),
    ),
    _trl(
        "_use_triton",
        "replace",
        "keep TRL's fused head from selecting tokens on the device, which makes the host wait",
        ("device",),
        source=r"compact = _use_triton\(",
    ),
    _head(
        "log_probs",
        "call",
        "compute the loss from the fused head's outputs",
        source=r"fused_lm_head=False, labels=None, shift_labels=None",
    ),
    _trl("disable_dropout_in_model", "call", "train over pairs without dropout, as DPOTrainer does", ("model",)),
    _trl("add_fused_lm_head", "call", "score what the weights of WPO need", ("model", "outputs")),
    _sft("_metrics", "attribute", "drop the metrics that TRL gathers during an evaluation"),
    _loader("__init__", "call", "copy batches to the device without waiting", ("_non_blocking",)),
    _process("_shared_state", "call", "run FSDP2 on CPU, and leave no state behind in a process of the user's"),
    _state("_shared_state", "call", "leave no state behind in a process of the user's"),
    _of("accelerate", "accelerate.state:GradientState")(
        "_shared_state", "call", "leave no state behind in a process of the user's"
    ),
    _state("__init__", "call", "run FSDP2 on CPU", ("fsdp_plugin",)),
    _state("_mixed_precision", "attribute", "run FSDP2 on CPU"),
    _liger("_apply_liger_kernel_to_instance", "call", "use liger's norms and rotary embeddings", ("model",)),
    _linear4bit("support_avx512bf16_for_cpu", "attribute", "keep 4-bit weights in a layout that has a gradient"),
    _native("_lib", "attribute", "name the native library that was loaded"),
    _dataset("_fingerprint", "attribute", "recognise data that has been tokenized before"),
    _templates(
        "render_jinja_template",
        "call",
        "render conversations as the tokenizer does, without it, and with the characters of the answers",
        ("conversations", "tools", "chat_template", "return_assistant_tokens_mask", "add_generation_prompt"),
    ),
    _training_templates(
        "has_generation_markers", "call", "see which tokens a chat template trains", ("chat_template",)
    ),
    _training_templates("get_training_chat_template", "call", "use TRL's training templates", ("processing_class",)),
    _dataset("_indices", "attribute", "read the lengths of samples without reading the samples"),
    _wandb("x_transaction_log_flush_interval", "attribute", "lose at most a second of history when a run is killed"),
    _hflm("_rank", "attribute", "spread lm-eval's requests over the processes"),
    _hflm("_world_size", "attribute", "spread lm-eval's requests over the processes"),
)
"""Grouped by library; the test suite compares it with the names that the sources use."""


def check(libraries: Iterable[str] | None = None, names: Iterable[PrivateName] = PRIVATE_NAMES) -> None:
    """Check the private names of `libraries` (all by default) whose modules are imported already.

    Raises:
        UpstreamError: names the library, its version, every name that is missing or has changed, and its purpose.
    """
    chosen = None if libraries is None else set(libraries)
    _require(name for name in names if name.module in sys.modules and (chosen is None or name.library in chosen))


def _require(names: Iterable[PrivateName]) -> None:
    found = [(name, problem) for name in names if (problem := name.problem()) is not None]
    if found:
        raise UpstreamError(
            "this version of distft does not fit the installed libraries:\n"
            + "\n".join(
                f"  {name.library} {importlib.metadata.version(name.library)}: {name.owner}.{name.name} {problem}; "
                f"distft uses it to {name.purpose}"
                for name, problem in found
            )
            + "\nInstall the versions that this release of distft was tested with, or a newer release of distft"
        )


@functools.cache
def _source(module: str) -> str:
    file = sys.modules[module].__file__
    return "" if file is None or not file.endswith(".py") else Path(file).read_text(encoding="utf-8")


@functools.cache
def checked(name: str, owner: str | None = None) -> Any:
    """Check a listed name, once per process, and return it if it belongs to a module, else its module."""
    (entry,) = (each for each in PRIVATE_NAMES if each.name == name and owner in (None, each.owner))
    _require([entry])
    module = importlib.import_module(entry.module)
    return module if entry.use == "attribute" or ":" in entry.owner else getattr(module, name)
