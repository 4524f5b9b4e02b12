"""axolotl's configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distft.importing import translation
from distft.importing.draft import Draft, number, shown

MARKS = ("base_model", "micro_batch_size", "sequence_len", "datasets", "adapter", "num_epochs", "val_set_size")
"""Keys that tell that a file is axolotl's."""
SAME = {
    "lora_model_dir": "adapter",
    "base_model": "model.name",
    "revision_of_model": "model.revision",
    "tokenizer_config": "model.tokenizer",
    "trust_remote_code": "model.trust_remote_code",
    "learning_rate": "training.learning_rate",
    "num_epochs": "training.num_train_epochs",
    "optimizer": "training.optim",
    "optim_args": "training.optim_args",
    "lr_scheduler": "training.lr_scheduler_type",
    "sequence_len": "training.max_length",
    "exact_deduplication": "data.deduplicate",
    "seed": "run.seed",
    "wandb_entity": "tracking.entity",
    "beta1": "training.adam_beta1",
    "beta2": "training.adam_beta2",
}
DEFAULTS = {
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1.0,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "cosine",
    "sequence_len": 512,
    "weight_decay": 0.0,
    "val_set_size": 0.0,
    "learning_rate": 5e-5,
}
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_modules_to_save": "modules_to_save",
    "lora_fan_in_fan_out": "fan_in_fan_out",
    "peft_use_rslora": "use_rslora",
    "peft_use_dora": "use_dora",
    "peft_init_lora_weights": "init_lora_weights",
    "peft_layers_to_transform": "layers_to_transform",
}
TYPES: dict[str, dict[str, str]] = {
    "alpaca": {"instruction": "instruction", "context": "input", "response": "output"},
    "alpaca_chat": {"instruction": "instruction", "context": "input", "response": "output"},
    "alpaca_chat.load_qa": {"instruction": "question", "response": "answer"},
    "context_qa": {"instruction": "question", "context": "context", "response": "answer"},
    "completion": {"text": "text"},
    "pretrain": {"text": "text"},
    "sharegpt": {"messages": "conversations"},
    "chat_template": {"messages": "messages"},
}
"""The columns of their `type`s of data."""
_KERNELS = "distft chooses kernels itself (model.kernels) and checks before step 1 that they compute the same"
REASONS = {
    **translation.REASONS,
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "is_llama_derived_model"), "transformers knows from the model's config"
    ),
    **dict.fromkeys(("plugins", "cut_cross_entropy", "chunked_cross_entropy"), _KERNELS),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), _KERNELS),
    **dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm"), _KERNELS),
    "liger_fused_linear_cross_entropy": _KERNELS,
    "dataset_prepared_path": "prepared data are cached by content",
    "pad_to_sequence_len": "packs and batches are padded as little as the kernels like",
    "eval_sample_packing": "evaluation packs as training does",
    "group_by_length": "a global batch is the same for any order; within it, samples are packed by length",
    "loss_watchdog_threshold": "run.on_bad_numbers says what a NaN does; a loss that is only high stops nothing",
    "loss_watchdog_patience": "see loss_watchdog_threshold",
    "qat": "distft does not train quantisation-aware",
    "unfrozen_parameters": "distft trains an adapter or everything; lora.target_modules says where",
    "special_tokens": "distft pads with a token that is never trained, and ends turns as the chat template does",
    "tf32": "transformers' default stands; training.tf32 sets it",
    "strict": "a recipe is always read strictly",
    "eot_tokens": "data.train_on_end_of_turn trains on the token that ends a turn by the chat template",
    "eval_table_size": "evaluation.samples has the model answer held-out prompts",
}

LOSSES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo"}
"""The loss of each `rl` over answers."""


def translate(draft: Draft) -> None:
    """Make a recipe of axolotl's keys."""
    rows = [*_list(draft.pop("datasets")), *_list(draft.pop("pretraining_dataset"))]
    draft.fill_in(DEFAULTS)
    _objective(draft)
    packed = bool(draft.pop("sample_packing"))
    packs = packed and draft.recipe.get("objective") != "dpo"
    draft.take(SAME)
    draft.take({key: ours for key, ours in translation.training_fields().items() if key != "bf16" and key != "fp16"})
    translation.batch(
        draft, "micro_batch_size", "gradient_accumulation_steps", packed=packs, length="of several samples, not full"
    )
    if packed:
        why = "position ids keep them apart in flash and flex attention; in others it depends on the model"
        draft.note("silent", "sample_packing: true puts several samples in a row", why)
    why = "rows longer than sequence_len are dropped; distft shortens them (data.truncation) and says how many"
    draft.note("silent", shown("sequence_len", draft.get("training.max_length")), why)
    if "warmup_steps" not in draft.recipe["training"] and "warmup_ratio" not in draft.left:
        draft.translate("no warm-up is named", "training.warmup_steps", 0.03, "they take 3% of all steps, 100 at most")
    translation.warm_up(draft)
    draft.note("silent", "the loss", translation.LOSS)
    _adapter(draft)
    translation.precision(draft)
    translation.attention(
        draft,
        ("attn_implementation", "attention", "flash_attention", "sdp_attention", "flex_attention", "eager_attention"),
    )
    draft.pop("xformers_attention"), draft.pop("s2_attention")
    translation.sharding(draft)
    _checkpointing(draft)
    translation.held_out(draft, "val_set_size")
    translation.times_per_epoch(draft, "evals_per_epoch", "eval")
    translation.times_per_epoch(draft, "saves_per_epoch", "save")
    if draft.get("training.eval_steps") and not draft.get("training.eval_strategy"):
        draft.set("training.eval_strategy", "steps")
    translation.evaluation_steps(draft)
    _data(draft, rows)
    _tracking(draft)
    draft.finish(REASONS)


def _list(value: Any) -> list[dict[str, Any]]:
    rows = value if isinstance(value, list) else [value] if value else []
    return [{"path": row} if isinstance(row, str) else dict(row) for row in rows if row]


def _objective(draft: Draft) -> None:
    rl = draft.pop("rl")
    if rl in LOSSES:
        draft.translate(shown("rl", rl), "objective", "dpo", f"with preference.loss_type: {LOSSES[rl]}")
        draft.set("preference.loss_type", LOSSES[rl])
        for key in ("rl_beta", "dpo_beta", "orpo_alpha"):
            draft.take({key: "preference.beta"})
        for kind in ("desirable", "undesirable"):
            draft.take({f"kto_{kind}_weight": f"preference.{kind}_weight"})
    elif rl:
        why = f"distft trains sft and {', '.join(LOSSES)}; the recipe says sft, which is another objective"
        draft.note("open", shown("rl", rl), why, "objective: sft")


def _adapter(draft: Draft) -> None:
    kind, targets = draft.pop("adapter"), draft.pop("lora_target_modules")
    linear = draft.pop("lora_target_linear")
    bits = [n for n in (4, 8) if draft.pop(f"load_in_{n}bit")]
    if not kind:
        translation.without_adapter(draft, list(ADAPTER))
    else:
        theirs = "lora_target_linear: true" if linear else shown("lora_target_modules", targets)
        translation.adapter(draft, ADAPTER, "all" if linear else targets, theirs)
        draft.note("translated", shown("adapter", kind), "", "the section lora")
        if kind not in ("lora", "qlora"):
            draft.note("unmatched", shown("adapter", kind), "distft trains LoRA, rsLoRA and DoRA", "a lora section")
        if "lora_dropout" not in draft.recipe["lora"]:
            draft.set("lora.lora_dropout", 0.0)
    if bits and kind:
        translation.quantize(draft, bits[0], f"load_in_{bits[0]}bit: true")
    elif bits:
        why = "quantised weights cannot be trained without an adapter"
        draft.note("unmatched", f"load_in_{bits[0]}bit: true", why)


def _checkpointing(draft: Draft) -> None:
    value = draft.recipe["training"].get("gradient_checkpointing")
    if isinstance(value, str):
        draft.translate(shown("gradient_checkpointing", value), "training.gradient_checkpointing", True, "")
        if "offload" in value:
            draft.set("batching.offload_checkpoints", True)


def _data(draft: Draft, rows: list[dict[str, Any]]) -> None:
    template = draft.pop("chat_template")
    jinja = draft.pop("chat_template_jinja")
    translation.sources(draft, [_source(draft, row) for row in rows])
    chats = any(str(row.get("type", "")).startswith(("chat_template", "sharegpt")) for row in rows)
    if jinja:
        translation.template_file(draft, str(jinja), "chat_template_jinja")
    elif template and template not in ("tokenizer_default", "jinja"):
        why = "of the same name, if distft has it; --explain shows a row by both"
        draft.translate(shown("chat_template", template), "data.chat_template", TEMPLATES.get(template, template), why)
    elif chats:
        draft.note("silent", "no chat_template is named", "the tokenizer's own, as in distft")
    if draft.pop("train_on_inputs"):
        everything = "data.train_on" if chats else "training.completion_only_loss"
        draft.translate("train_on_inputs: true", everything, "all" if chats else False, "prompts are trained, too")
    elif any(translation_of(row).get("instruction") for row in rows):
        why = "only the answers are trained (train_on_inputs: false)"
        draft.translate("type: alpaca and the like", "training.completion_only_loss", True, why)
        why = "Alpaca's: “Below is an instruction …”; distft: Dolly's, or data.chat_template (see --explain)"
        draft.note("silent", "the text around instructions", why)


TEMPLATES = {
    "llama3": "llama3",
    "chatml": "chatml",
    "gemma": "gemma",
    "phi_3": "phi3",
    "phi_35": "phi3_5",
    "qwen3": "qwen3",
}
TEMPLATES |= {"qwen_25": "qwen2_5", "deepseek_v3": "deepseekv3", "gemma3": "gemma3", "cohere": "cohere"}
"""Their names of chat templates, and TRL's."""


def translation_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The columns, under distft's names, of an entry of `datasets`."""
    kind = row.get("type")
    if isinstance(kind, dict):
        names = {"instruction": "field_instruction", "context": "field_input", "response": "field_output"}
        return {ours: str(kind[theirs]) for ours, theirs in names.items() if kind.get(theirs)}
    name = str(kind or "").split(":")[0]
    columns = dict(TYPES.get(name) or TYPES.get(name.split(".")[0]) or {})
    if "messages" in columns:
        columns["messages"] = str(row.get("field_messages") or columns["messages"])
        for theirs, ours in (("field_tools", "tools"), ("field_system", "system")):
            columns |= {ours: str(row[theirs])} if row.get(theirs) else {}
    if "text" in columns:
        columns["text"] = str(row.get("field") or row.get("text_column") or columns["text"])
    return columns


def _source(draft: Draft, row: dict[str, Any]) -> dict[str, Any]:
    """An entry of `datasets` as a source of distft's."""
    path, kind = str(row.get("path", "")), row.get("type")
    source: dict[str, Any] = {"config": row.get("name"), "train_split": row.get("split") or "train"}
    if files := row.get("data_files"):
        source["files"] = [translation.place(draft, str(one)) for one in ([files] if isinstance(files, str) else files)]
    else:
        source["name"] = translation.place(draft, path)
    pair = {
        ours: str(row[key])
        for ours, key in (("chosen", "field_chosen"), ("rejected", "field_rejected"))
        if row.get(key)
    }
    if draft.get("preference.loss_type") == "kto":
        columns = {}
    elif draft.recipe.get("objective") == "dpo":
        columns = pair | ({"prompt": str(row["field_messages"])} if pair and row.get("field_messages") else {})
    else:
        columns = translation_of(row)
    if columns:
        source["format"] = columns
        theirs = f"datasets: {path}, {shown('type', kind)}"
        draft.note("translated", theirs, "its columns", shown("format", columns))
    elif kind:
        why = "its columns are not known; distft infers them, or data.format names them"
        draft.note("open", f"{path}, {shown('type', kind)}", why)
    for key in ("shards", "preprocess_shards", "conversation", "train_on_split", "revision"):
        if row.get(key):
            draft.note("unmatched", f"{path}, {shown(key, row[key])}", "distft has no such setting of a source")
    if (train := row.get("roles_to_train")) and set(train) - {"assistant", "gpt"}:
        draft.translate(shown("roles_to_train", train), "data.train_on", list(train), "the same roles")
    if number(row.get("message_field_training")):
        draft.note("translated", "message_field_training", "a message's own weight, loss_weight or train goes first")
    return source


def _tracking(draft: Draft) -> None:
    project, mode = draft.pop("wandb_project"), draft.pop("wandb_mode")
    translation.run_name(draft, "wandb_name")
    used = project and mode != "disabled"
    draft.set(
        "tracking.report_to", [*(["wandb"] if used else []), *(["tensorboard"] if draft.pop("use_tensorboard") else [])]
    )
    if used:
        draft.translate(shown("wandb_project", project), "tracking.project", project, "")
