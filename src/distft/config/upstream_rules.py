"""What distft adds to the fields of `SFTConfig` and `LoraConfig`: which it sets itself, their ranges and their
units."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

_OWNED_TRAINING = {
    "set batching.micro_batch or batching.global_batch_size; the accumulation is derived": (
        "per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size"
    ),
    "set run.dir, run.name or run.seed": "output_dir seed data_seed run_name resume_from_checkpoint",
    "set strategy; accelerate_configs/ says how it shards": (
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config local_rank"
    ),
    "set tracking.report_to and tracking.project": "report_to project disable_tqdm",
    "distft prepares the data itself: see data.format, training.max_length, training.completion_only_loss": (
        "dataset_text_field dataset_kwargs chat_template_path assistant_only_loss truncation_mode eos_token pad_token "
        "remove_unused_columns label_names"
    ),
    "the order of the samples depends on run.seed alone, so that it is the same for every world size": (
        "train_sampling_strategy length_column_name shuffle_dataset dataloader_drop_last"
    ),
    "set batching.micro_batch_tokens, which packs whole samples up to that many tokens": (
        "packing packing_strategy eval_packing padding_free"
    ),
    "set it in the model section": "model_init_kwargs trust_remote_code use_cache",
    "the loss is always normalised over all trained tokens of the global batch": "average_tokens_across_devices",
    "distft.train always trains": "do_train",
    "set training.eval_strategy": "do_eval",
    "set evaluation": "do_predict",
    "distft writes to the run folder; push runs/<name>/adapter with `hf upload`": (
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision"
    ),
}
_OWNED_LORA = {
    "distft sets it": (
        "task_type peft_type inference_mode base_model_name_or_path peft_version auto_mapping runtime_config"
    ),
    "set model.revision": "revision",
}

OWNED: dict[str, dict[str, str]] = {
    section: {field: instead for instead, fields in table.items() for field in fields.split()}
    for section, table in (("training", _OWNED_TRAINING), ("lora", _OWNED_LORA))
}
"""Fields that a recipe does not set, each with what to set instead."""

ADDED: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "training": {
        "early_stopping_patience": (
            int | None,
            None,
            "Stop after this many evaluations in a row in which metric_for_best_model did not improve; null for never.",
        ),
        "early_stopping_threshold": (
            float,
            0.0,
            "With early_stopping_patience: an evaluation that is not better than the best so far by more than this has "
            "not improved.",
        ),
    },
    "lora": {},
}
"""Fields that upstream's class lacks, each with its type, default and description: those of transformers'
`EarlyStoppingCallback`."""

_POSITIVE, _NOT_NEGATIVE, _FRACTION = {"gt": 0}, {"ge": 0}, {"ge": 0, "lt": 1}
RANGES: dict[str, dict[str, dict[str, Any]]] = {
    "training": {
        "num_train_epochs": _POSITIVE,
        "logging_steps": _POSITIVE,
        "eval_steps": _POSITIVE,
        "save_steps": _POSITIVE,
        "max_length": _POSITIVE,
        "ddp_timeout": _POSITIVE,
        "ddp_bucket_cap_mb": _POSITIVE,
        "per_device_eval_batch_size": _POSITIVE,
        "eval_accumulation_steps": _POSITIVE,
        "torch_empty_cache_steps": _POSITIVE,
        "dataset_num_proc": _POSITIVE,
        "dataloader_prefetch_factor": _POSITIVE,
        "learning_rate": _NOT_NEGATIVE,
        "weight_decay": _NOT_NEGATIVE,
        "warmup_steps": _NOT_NEGATIVE,
        "max_grad_norm": _NOT_NEGATIVE,
        "adam_epsilon": {"gt": 1e-38},  # fp32 has none smaller, and without it AdamW divides 0 by 0
        "dataloader_num_workers": {"ge": 0, "le": 1_000},
        "neftune_noise_alpha": _NOT_NEGATIVE,
        "early_stopping_patience": _POSITIVE,
        "early_stopping_threshold": _NOT_NEGATIVE,
        "eval_delay": _NOT_NEGATIVE,
        "adam_beta1": _FRACTION,
        "adam_beta2": _FRACTION,
        "label_smoothing_factor": _FRACTION,
        "max_steps": {"ge": -1},  # -1: as many as num_train_epochs takes
    },
    "lora": {"r": _POSITIVE, "lora_alpha": _POSITIVE, "lora_dropout": _FRACTION},
}
"""What upstream's types do not say. Upstream refuses some of these values after it has loaded the weights, and trains
with the others: a negative `max_grad_norm` reverses the gradient, a `lora_alpha` of 0 learns nothing."""

_Level = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
_Options = dict[str, Any] | Annotated[str, Field(pattern=r"^\s*\{")] | None
TYPES: dict[str, dict[str, Any]] = {
    "training": {
        "log_level": _Level,
        "log_level_replica": _Level,
        "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
        "pad_to_multiple_of": Annotated[int, Field(gt=0)] | Literal["auto"] | None,
        "torch_compile_mode": Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", None],
        "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver", None],
        "ddp_backend": Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl", None],
        "lr_scheduler_kwargs": _Options,
        "gradient_checkpointing_kwargs": _Options,
        "activation_checkpointing_kwargs": _Options,
    },
    "lora": {},
}
"""Types of fields that upstream declares wider than it takes: it fails once the weights are loaded, or ignores the
rest. Text in place of a mapping is JSON."""

_FROM_DATA = "it needs batches of data before training; use true, pissa, olora, gaussian or orthogonal"
UNSUPPORTED_VALUES: dict[str, dict[str, dict[str, str]]] = {
    "training": {},
    "lora": {
        "init_lora_weights": {
            "eva": _FROM_DATA,
            "corda": _FROM_DATA,
            "loftq": "its 4-bit weights are not those that quantization loads; use true, pissa, olora or gaussian",
            "mica": "it trains and saves only half of each adapter; use true, pissa, olora, gaussian or orthogonal",
        }
    },
}
"""Values that upstream knows and distft cannot carry out, each with the reason and what to use."""

_UNSUPPORTED_LORA = {
    "distft does not initialise adapters from data": "eva_config corda_config lora_ga_config loftq_config",
    "distft trains plain LoRA, rank-stabilised LoRA (use_rslora) and DoRA (use_dora)": (
        "velora_config alora_invocation_tokens use_qalora monteclora_config use_bdlora arrow_config kasa_config "
        "megatron_config"
    ),
    "it changes the layers of the base, so that there is no base to compare with": "layer_replication",
}
UNSUPPORTED: dict[str, dict[str, str]] = {
    "training": dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), "evaluation computes in the types of training"),
    "lora": {field: reason for reason, fields in _UNSUPPORTED_LORA.items() for field in fields.split()},
}
"""Fields that a recipe may only set to what switches them off, each with the reason."""

UNITS: dict[str, dict[str, str]] = {
    "training": {
        "num_train_epochs": "epochs",
        "max_steps": "steps",
        "warmup_steps": "steps, or a share of all steps below 1",
        "logging_steps": "steps, or a share of all steps below 1",
        "eval_steps": "steps, or a share of all steps below 1",
        "save_steps": "steps, or a share of all steps below 1",
        "eval_delay": "epochs or steps, as eval_strategy counts",
        "eval_accumulation_steps": "batches",
        "torch_empty_cache_steps": "steps",
        "per_device_eval_batch_size": "samples",
        "max_length": "tokens",
        "pad_to_multiple_of": "tokens",
        "save_total_limit": "checkpoints",
        "early_stopping_patience": "evaluations",
        "dataset_num_proc": "processes",
        "dataloader_num_workers": "processes",
        "dataloader_prefetch_factor": "batches",
        "ddp_bucket_cap_mb": "MB",
        "ddp_timeout": "s",
    },
    "lora": {},
}

DEFAULTS: dict[str, dict[str, str]] = {
    "training": {
        "bf16": "true if model.dtype is bfloat16",
        "per_device_eval_batch_size": "batching.micro_batch; 1 with packing",
        "logging_nan_inf_filter": "false",
        "metric_for_best_model": "loss",
        "greater_is_better": "as the metric says: false for loss and perplexity, true for accuracy",
        "dataloader_num_workers": "1 on a GPU, 0 on a CPU",
        "pad_to_multiple_of": "with packing on a GPU: a 16th of micro_batch_tokens, at most 512; otherwise null",
    },
    "lora": {},
}
"""Defaults, in words, that distft (`training.arguments`) sets in place of upstream's."""
