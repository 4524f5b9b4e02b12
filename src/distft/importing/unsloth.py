"""Unsloth: the files of its studio and of `unsloth train`, and the arguments of its notebooks as JSON."""

from __future__ import annotations

from typing import Any

from distft.importing import translation
from distft.importing.draft import Draft, shown

MARKS = (
    *(
        "load_in_4bit",
        "max_seq_length",
        "use_gradient_checkpointing",
        "finetune_language_layers",
        "use_loftq",
        "lora_r",
    ),
    *("model_name", "random_state", "random_seed", "loftq_config", "train_on_completions", "training_type"),
    *("r", "lora_r"),
)
SECTIONS = ("model", "data", "training", "lora", "logging", "peft", "trainer", "from_pretrained", "get_peft_model")
"""Sections of their files. The arguments of a notebook may be grouped in them, or given without sections."""
SAME = {
    "model": "model.name",
    "model_name": "model.name",
    "max_seq_length": "training.max_length",
    "num_epochs": "training.num_train_epochs",
    "random_seed": "run.seed",
    "seed": "run.seed",
    "wandb_project": "tracking.project",
    "log_frequency": "training.logging_steps",
    "trust_remote_code": "model.trust_remote_code",
}
DEFAULTS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-4,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "optim": "adamw_8bit",
    "max_seq_length": 2048,
    "seed": 3407,
    "warmup_steps": 5,
    "weight_decay": 0.01,
}
ADAPTER = {
    "lora_r": "r",
    "r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "bias": "bias",
    "use_rslora": "use_rslora",
    "modules_to_save": "modules_to_save",
}
ADAPTER_DEFAULTS = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEMPLATES = {"llama-3": "llama3", "llama-3.1": "llama3_1", "chatml": "chatml", "qwen-2.5": "qwen2_5"}
"""Their names of chat templates, and TRL's."""
_SAVED = "distft merge and distft export make it of the run"
_VISION = "distft trains text models; lora.target_modules says where the adapters are"
REASONS = {
    **translation.REASONS,
    **dict.fromkeys(
        ("save_method", "save_gguf", "save_model", "save_path", "quantization_method", "quantization"), _SAVED
    ),
    **dict.fromkeys(
        ("finetune_vision_layers", "finetune_language_layers", "finetune_attention_modules", "finetune_mlp_modules"),
        _VISION,
    ),
    "use_loftq": "its 4-bit weights are not those that quantization loads",
    "loftq_config": "its 4-bit weights are not those that quantization loads",
    "random_state": "run.seed is that of the adapter, too",
    "dtype": "model.dtype",
    "tensorboard_dir": "logs go to the run folder",
    "fast_inference": "distft serve and distft evaluate choose their engine",
    "push_model": translation.HUB,
    "dataset_num_proc": "data are prepared on all cores",
}


def flat(values: dict[str, Any]) -> dict[str, Any]:
    """The keys of all sections in one mapping."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in SECTIONS and isinstance(value, dict):
            found |= flat(value)
        else:
            found[key] = value
    return found


def translate(draft: Draft) -> None:
    """Make a recipe of Unsloth's keys."""
    for theirs, ours in (("batch_size", "per_device_train_batch_size"), ("random_seed", "seed")):
        if theirs in draft.left:
            draft.left[ours] = draft.left.pop(theirs)
    if "num_epochs" in draft.left:
        draft.left["num_train_epochs"] = draft.left.pop("num_epochs")
    if not draft.left.get("max_steps"):
        draft.pop("max_steps")  # 0 means: as many as the epochs take
    if not draft.left.get("save_steps"):
        draft.pop("save_steps")
        draft.set("training.save_strategy", "epoch")
    draft.fill_in(DEFAULTS)
    full = draft.pop("training_type", "lora") == "full" or bool(draft.pop("full_finetuning"))
    packing = bool(draft.pop("packing"))
    checkpointing = draft.pop("gradient_checkpointing", None)
    checkpointing = draft.pop("use_gradient_checkpointing", "unsloth") if checkpointing is None else checkpointing
    draft.take(SAME)
    own = {*("bf16", "fp16", "gradient_accumulation_steps"), *REASONS}
    draft.take({key: ours for key, ours in translation.training_fields().items() if key not in own})
    draft.set("training.gradient_checkpointing", checkpointing not in (False, "none", "false", "False"))
    if checkpointing == "unsloth":
        why = "their own, which keeps the layers' inputs in host memory: batching.offload_checkpoints does the same"
        draft.note("translated", "gradient_checkpointing: unsloth", why, "training.gradient_checkpointing: true")
    translation.batch(
        draft, "per_device_train_batch_size", "gradient_accumulation_steps", packed=packing, length="of several samples"
    )
    if packing:
        why = "whether samples of a pack see each other depends on the version and the attention that it finds"
        draft.note("silent", "packing: true", f"{why}. {translation.KEEPS_APART}")
    translation.warm_up(draft)
    draft.note("silent", "the loss", translation.LOSS)
    _weights(draft, full)
    draft.set("strategy", "single")
    why = "strategy: ddp, fsdp or zero2 gives the same samples per step on several"
    draft.note("silent", "one GPU", why, "strategy: single")
    translation.held_out(draft, "eval_fraction")
    translation.evaluation_steps(draft)
    _data(draft)
    _tracking(draft)
    draft.finish(REASONS)


def _weights(draft: Draft, full: bool) -> None:
    for key in ("bf16", "fp16"):
        draft.pop(key)  # notebooks ask the GPU for one of them
    draft.set("training.bf16", True)
    draft.set("model.dtype", "bfloat16")
    targets = draft.pop("target_modules")
    four, eight = draft.pop("load_in_4bit"), draft.pop("load_in_8bit")
    if full:
        translation.without_adapter(draft, list(ADAPTER))
        return
    draft.fill_in({key: value for key, value in ADAPTER_DEFAULTS.items() if key != "r" or "lora_r" not in draft.left})
    if not targets:
        draft.note("silent", "no target_modules are named", "their seven of Llama's layers", "lora.target_modules")
    translation.adapter(draft, ADAPTER, targets or MODULES, shown("target_modules", targets or "theirs"))
    name = str(draft.get("model.name") or "")
    if four or eight:
        translation.quantize(draft, 4 if four else 8, f"load_in_{4 if four else 8}bit: true")
    if name.endswith("bnb-4bit"):
        why = "its weights are 4-bit already, of another choice than distft's quantization: name the 16-bit model"
        draft.note("open", shown("model", name), why)


def _data(draft: Draft) -> None:
    rows: list[dict[str, Any]] = []
    local = draft.pop("local_dataset") or []
    for path in [local] if isinstance(local, str) else local:
        rows.append({"name": translation.place(draft, str(path))})
    if name := draft.pop("dataset") or draft.pop("dataset_name"):
        rows.append({"name": translation.place(draft, str(name)), "train_split": draft.pop("dataset_split") or "train"})
    kind = draft.pop("format_type", "auto")
    form = {"alpaca": {"instruction": "instruction", "context": "input", "response": "output"}}.get(str(kind))
    form = form or {"sharegpt": {"messages": "conversations"}, "chatml": {"messages": "messages"}}.get(str(kind))
    for row in rows:
        row["format"] = form
    translation.sources(draft, rows)
    if field := draft.pop("dataset_text_field"):
        draft.translate(
            shown("dataset_text_field", field), "data.format.text", field, "a notebook's text, made by its own code"
        )
    if draft.pop("train_on_completions"):
        draft.translate("train_on_completions: true", "data.train_on", "assistant", "answers only")
    elif not field:
        translation.train_prompts(draft, rows, "train_on_completions: false", "prompts are trained, too")
    if template := draft.pop("chat_template"):
        why = "their names and TRL's are not always the same (--explain shows a row by both)"
        ours = TEMPLATES.get(str(template), "tokenizer")
        draft.translate(shown("chat_template", template), "data.chat_template", ours, why)


def _tracking(draft: Draft) -> None:
    wandb, board = draft.pop("enable_wandb"), draft.pop("enable_tensorboard")
    if wandb is None and board is None:
        translation.trackers(draft)
        return
    draft.set("tracking.report_to", [name for name, on in (("wandb", wandb), ("tensorboard", board)) if on])
