"""Files for `trl sft --config`, and the recipes of the alignment handbook, which have the same keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distft.importing import translation
from distft.importing.draft import Draft, shown

MARKS = (
    *(
        "model_name_or_path",
        "dataset_name",
        "dataset_mixture",
        "dataset_mixer",
        "use_peft",
        "torch_dtype",
        "max_length",
    ),
    *("per_device_train_batch_size", "learning_rate", "report_to", "model_revision", "max_seq_length", "output_dir"),
)
SAME = {
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "dataset_streaming": "data.streaming",
    "seed": "run.seed",
    "evaluation_strategy": "training.eval_strategy",
    "optimizers": "training.optim",
}
DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "gradient_checkpointing": True,
    "max_length": 1024,
}
ADAPTER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_parameters": "target_parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
ADAPTER_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
REASONS = {
    **translation.REASONS,
    "packing_strategy": "distft packs whole samples, balanced over the processes",
    "eval_packing": "evaluation packs as training does",
    "max_prompt_length": "distft shortens a conversation by whole turns (data.truncation)",
    "preprocessing_num_workers": "data are prepared on all cores",
    "dataset_num_proc": "data are prepared on all cores",
    "eos_token": "turns end as the chat template says",
    "use_liger_kernel": "distft uses liger's kernels where they are installed and pass the check (model.kernels)",
}


def translate(draft: Draft) -> None:
    """Make a recipe of the keys of TRL's script for SFT."""
    if length := draft.pop("max_seq_length"):
        draft.left["max_length"] = length
    draft.fill_in(DEFAULTS)
    preference = "beta" in draft.left or "max_prompt_length" in draft.left
    if preference:
        draft.translate("beta, max_prompt_length", "objective", "dpo", "keys of TRL's script for preferences")
        draft.take({"beta": "preference.beta"})
    mixture, packing = _mixture(draft), bool(draft.pop("packing")) and not preference
    draft.take(SAME)
    own = {*("bf16", "fp16", "gradient_accumulation_steps"), *REASONS}
    draft.take({key: ours for key, ours in translation.training_fields().items() if key not in own})
    translation.batch(
        draft, "per_device_train_batch_size", "gradient_accumulation_steps", packed=packing, length="of several samples"
    )
    if packing:
        why = (
            "packing_strategy bfd cuts rows longer than max_length and keeps samples apart only with flash attention; "
            "wrapped cuts rows anywhere, and samples see each other"
        )
        draft.note("silent", "packing: true", why)
    translation.warm_up(draft)
    draft.note("silent", "the loss", translation.LOSS)
    _weights(draft)
    translation.attention(draft, ("attn_implementation",))
    translation.sharding(draft)
    _data(draft, mixture)
    translation.trackers(draft)
    translation.run_name(draft, "run_name")
    draft.finish(REASONS)


def _weights(draft: Draft) -> None:
    dtype = draft.pop("dtype") or draft.pop("torch_dtype")
    if dtype in (None, "auto"):
        if dtype is None:
            draft.note(
                "silent", "dtype: float32", "weights are loaded in 32 bits where the file does not say", "model.dtype"
            )
        dtype = "float32" if dtype is None else "bfloat16"
    translation.precision(draft, weights=str(dtype))
    if draft.pop("use_peft") or any(draft.left.get(f"load_in_{bits}bit") for bits in (4, 8)):
        draft.fill_in(ADAPTER_DEFAULTS)
        targets = draft.pop("lora_target_modules")
        translation.adapter(draft, ADAPTER, targets, shown("lora_target_modules", targets))
    else:
        translation.without_adapter(draft, [*ADAPTER, "lora_target_modules"])
        draft.note("silent", "use_peft: false", "the whole model is trained; a file for LoRA says use_peft: true")
    for bits in (4, 8):
        if draft.pop(f"load_in_{bits}bit"):
            translation.quantize(draft, bits, f"load_in_{bits}bit: true")
            draft.take({"bnb_4bit_quant_type": "quantization.bnb_4bit_quant_type"})
            draft.set("quantization.bnb_4bit_use_double_quant", bool(draft.pop("use_bnb_nested_quant")))


def _mixture(draft: Draft) -> list[dict[str, Any]]:
    """The data sets, with their weights."""
    mixture, mixer = draft.pop("dataset_mixture") or {}, draft.pop("dataset_mixer") or {}
    rows = [
        {"name": row.get("id") or row.get("path"), "config": row.get("config") or row.get("name")}
        | {"train_split": row.get("split"), "weight": row.get("weight")}
        for row in [*(mixture.get("datasets") or []), *(draft.pop("datasets") or [])]
    ]
    splits = draft.pop("dataset_splits") or ["train"]
    rows += [{"name": name, "train_split": splits[0], "weight": weight} for name, weight in mixer.items()]
    if size := mixture.get("test_split_size"):
        draft.left["test_split_size"] = size
    if name := draft.pop("dataset_name"):
        split = draft.pop("dataset_train_split") or "train"
        rows.append({"name": name, "config": draft.pop("dataset_config"), "train_split": split})
    return rows


def _data(draft: Draft, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["name"] = translation.place(draft, str(row["name"]))
    if {row.get("weight") for row in rows} - {None, 1}:
        why = "theirs is the share of its rows that is kept; distft's the share of an epoch: set data.sources[].samples"
        draft.note("open", "weights of data sets", why)
    for row in rows:
        row.pop("weight", None)
    translation.sources(draft, rows)
    if len(rows) == 1:
        draft.note("taken", shown("dataset", rows[0]["name"]), "", "data.name")
    size, test = draft.pop("test_split_size"), draft.pop("dataset_test_split")
    evaluates = draft.get("training.eval_strategy") not in (None, "no")
    if size:
        draft.left["val_size"] = size
        translation.held_out(draft, "val_size")
    elif evaluates:
        theirs = shown("eval_strategy", draft.get("training.eval_strategy"))
        why = f"they evaluate on the split {test or 'test'}; distft on a share of the training rows, or data.test_split"
        draft.translate(theirs, "data.validation_fraction", 0.05, why)
        draft.set("data.test_fraction", 0.0)
    else:
        translation.held_out(draft, "val_size")
    translation.evaluation_steps(draft)
    template = draft.pop("chat_template") or draft.pop("chat_template_path")
    if template and "{" in str(template):
        translation.template_file(draft, str(template), "chat_template")
    elif template:
        name = translation.place(draft, str(template))
        is_file = Path(name).suffix in (".jinja", ".j2")
        why = "a file" if is_file else "distft takes the tokenizer's own, a name, or a .jinja file"
        ours = name if is_file else "tokenizer"
        draft.translate(shown("chat_template_path", template), "data.chat_template", ours, why)
    if draft.pop("assistant_only_loss"):
        draft.translate("assistant_only_loss: true", "data.train_on", "assistant", "answers only")
    elif not draft.recipe.get("objective") and "dataset_text_field" not in draft.left:
        why = "every token of a conversation is trained; of a prompt and its completion, the latter"
        translation.train_prompts(draft, rows, "assistant_only_loss: false", why)
    if (field := draft.pop("dataset_text_field")) and len(rows) == 1:
        draft.translate(shown("dataset_text_field", field), "data.format.text", field, "")
