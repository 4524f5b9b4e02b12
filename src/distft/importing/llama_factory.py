"""LLaMA-Factory's files for `llamafactory-cli train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distft.importing import translation
from distft.importing.draft import Draft, number, shown

MARKS = (
    *("finetuning_type", "stage", "cutoff_len", "template", "model_name_or_path", "dataset_dir", "lora_target"),
    *("lora_rank", "plot_loss", "overwrite_cache", "quantization_bit", "val_size"),
)
SAME = {
    "adapter_name_or_path": "adapter",
    "model_name_or_path": "model.name",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "cutoff_len": "training.max_length",
    "max_samples": "data.max_samples",
    "streaming": "data.streaming",
    "seed": "run.seed",
    "evaluation_strategy": "training.eval_strategy",
    "resize_vocab": "model.resize_embeddings",
}
DEFAULTS = {
    "stage": "sft",
    "finetuning_type": "lora",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "linear",
    "val_size": 0.0,
}
ADAPTER = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
TEMPLATES = {
    "llama3": "llama3",
    "qwen": "chatml",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "phi": "phi3",
    "chatml": "chatml",
}
TEMPLATES |= {
    "qwen3_nothink": "qwen3_instruct_2507",
    "deepseek3": "deepseekv3",
    "cohere": "cohere",
    "gpt_oss": "gptoss",
}
"""Their names of templates, and those of distft that are nearest. Theirs are written in Python, with system prompts."""
_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output"}
_OTHER_OPTIMIZERS = "distft has transformers' optimizers (training.optim)"
REASONS = {
    **translation.REASONS,
    **dict.fromkeys(("overwrite_cache", "tokenized_path"), "prepared data are cached by content"),
    **dict.fromkeys(("preprocessing_num_workers", "preprocessing_batch_size"), "data are prepared on all cores"),
    **dict.fromkeys(
        ("use_galore", "galore_layerwise", "galore_target", "galore_rank", "galore_scale", "use_badam", "use_apollo"),
        _OTHER_OPTIMIZERS,
    ),
    "plot_loss": "distft report draws it",
    "enable_liger_kernel": "distft uses liger's kernels where they are installed and pass the check (model.kernels)",
    "flash_attn": "model.attn_implementation",
    "upcast_layernorm": "distft keeps the norms in model.dtype",
    "rope_scaling": "the model's own config says how far its positions reach",
    "media_dir": "distft trains on text alone",
    "mix_strategy": "distft concatenates, or mixes by data.sources' weights",
    "interleave_probs": "data.sources[].weight",
    "group_by_length": "within a global batch, samples are packed by length",
}


def translate(draft: Draft) -> None:
    """Make a recipe of LLaMA-Factory's keys."""
    draft.fill_in(DEFAULTS)
    stage = str(draft.pop("stage"))
    _objective(draft, stage)
    packing = draft.pop("packing")
    neat = bool(draft.pop("neat_packing"))
    packed = (bool(packing) or neat or (stage == "pt" and packing is None)) and stage in ("pt", "sft")
    draft.take(SAME)
    own = {*("bf16", "fp16", "gradient_accumulation_steps", "gradient_checkpointing"), *REASONS}
    draft.take({key: ours for key, ours in translation.training_fields().items() if key not in own})
    draft.set("training.gradient_checkpointing", not draft.pop("disable_gradient_checkpointing"))
    if not draft.pop("gradient_checkpointing") and draft.get("training.gradient_checkpointing"):
        draft.note("silent", "gradient checkpointing is on", "unless disable_gradient_checkpointing says otherwise")
    translation.batch(
        draft, "per_device_train_batch_size", "gradient_accumulation_steps", packed=packed, length="of several samples"
    )
    if packed and not neat:
        why = "rows are cut and joined, and" if stage == "pt" else "the samples of a pack"
        theirs = "stage: pt packs by itself" if stage == "pt" else "packing: true"
        draft.note(
            "silent", theirs, f"{why} see each other (neat_packing: true keeps them apart). {translation.KEEPS_APART}"
        )
    translation.warm_up(draft)
    draft.note("silent", "the loss", translation.LOSS)
    _weights(draft)
    translation.attention(draft, ("flash_attn", "attn"))
    translation.sharding(draft)
    translation.held_out(draft, "val_size")
    if (held := draft.pop("eval_dataset")) and not draft.get("data.validation_fraction"):
        draft.set("data.validation_fraction", 0.05)
        draft.note("open", shown("eval_dataset", held), "set data.test_path; a share of the training rows meanwhile")
    translation.evaluation_steps(draft)
    _data(draft, stage)
    translation.trackers(draft)
    translation.run_name(draft, "run_name")
    draft.finish(REASONS)


def _objective(draft: Draft, stage: str) -> None:
    loss = str(draft.pop("pref_loss", "sigmoid"))
    if stage in ("dpo", "kto"):
        loss = "kto" if stage == "kto" else loss
        draft.translate(shown("stage", stage), "objective", "dpo", f"with preference.loss_type: {loss}")
        draft.set("preference.loss_type", loss)
        for theirs, ours in (("kto_chosen_weight", "desirable_weight"), ("kto_rejected_weight", "undesirable_weight")):
            draft.take({theirs: f"preference.{ours}"})
        draft.take({"pref_beta": "preference.beta", "dpo_label_smoothing": "preference.label_smoothing"})
        draft.take({"ld_alpha": "preference.ld_alpha"})
    elif stage not in ("sft", "pt"):
        why = "distft trains sft, texts (their pt), dpo and kto; the recipe says sft, which is another objective"
        draft.note("open", shown("stage", stage), why, "objective: sft")


def _weights(draft: Draft) -> None:
    kind, pure = str(draft.pop("finetuning_type")), draft.pop("pure_bf16")
    full = kind not in ("lora", "oft")
    keys = [*ADAPTER, "lora_target", "additional_target"]
    if pure:
        draft.translate("pure_bf16: true", "training.bf16", False, "no mixed precision: the weights are bf16")
        draft.pop("bf16")
        draft.set("model.dtype", "bfloat16")
    else:
        translation.precision(draft, weights="float32" if full else None)
        if full and draft.get("training.bf16"):
            why = "mixed precision: the weights are kept, and updated, in 32 bits"
            draft.note("silent", "finetuning_type: full with bf16: true", why, "model.dtype: float32")
    if full:
        translation.without_adapter(draft, keys)
        if kind != "full":
            draft.note("unmatched", shown("finetuning_type", kind), "distft trains an adapter or everything", "full")
    else:
        if kind != "lora":
            draft.note(
                "unmatched", shown("finetuning_type", kind), "distft trains LoRA, rsLoRA and DoRA", "a lora section"
            )
        rank = number(draft.left.get("lora_rank", 8))
        own = {"lora_rank": 8, "lora_alpha": 2 * int(rank), "lora_dropout": 0.0, "lora_target": "all"}
        draft.fill_in(own)
        if extra := draft.pop("additional_target"):
            modules = [part.strip() for part in str(extra).split(",")]
            draft.translate(shown("additional_target", extra), "lora.modules_to_save", modules, "a list")
        targets = draft.pop("lora_target")
        translation.adapter(draft, ADAPTER, targets, shown("lora_target", targets))
        if draft.pop("pissa_init"):
            steps = draft.pop("pissa_iter", 16)
            draft.translate("pissa_init: true", "lora.init_lora_weights", f"pissa_niter_{steps}", "PEFT's name")
    if bits := draft.pop("quantization_bit"):
        method = draft.pop("quantization_method", "bnb")
        if bits in (4, 8) and method in ("bnb", "bitsandbytes"):
            translation.quantize(draft, bits, shown("quantization_bit", bits))
        else:
            why = "distft quantises with bitsandbytes, to 4 or 8 bits"
            draft.note("unmatched", f"quantization_bit: {bits}, quantization_method: {method}", why)


def _data(draft: Draft, stage: str) -> None:
    names = draft.pop("dataset") or []
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    folder = str(draft.pop("dataset_dir", "data"))
    info, read = _info(draft, folder)
    rows = [_source(draft, name, info.get(name), Path(read), stage) for name in names]
    found = [row for row in rows if row]
    translation.sources(draft, found)
    if len(found) > 1 and draft.get("data.max_samples"):
        why = "theirs is for each data set, distft's for all together; data.sources[].samples limits each"
        draft.note("open", shown("max_samples", draft.get("data.max_samples")), why)
    template = draft.pop("template")
    if stage != "pt" and (template or found):
        ours = TEMPLATES.get(str(template), "tokenizer") if template else "tokenizer"
        why = "theirs are written in Python, some with a system prompt of their own (--explain shows a row by both)"
        draft.translate(shown("template", template), "data.chat_template", ours, why)
    if draft.pop("mask_history"):
        draft.translate("mask_history: true", "data.train_on", "last_assistant", "the last answer only")
    if draft.pop("train_on_prompt"):
        draft.translate("train_on_prompt: true", "data.train_on", "all", "")


def _info(draft: Draft, folder: str) -> tuple[dict[str, Any], str]:
    """What dataset_info.json says, and its folder, if it is in the data folder: here, or beside the file."""
    for place in (Path(folder), draft.folder / folder, draft.folder):
        try:
            return json.loads((place / "dataset_info.json").read_text(encoding="utf-8")), str(place)
        except (OSError, ValueError):
            continue
    return {}, folder


def _source(draft: Draft, name: str, info: Any, folder: Path, stage: str) -> dict[str, Any] | None:
    if not isinstance(info, dict):
        if "/" in name:
            return {"name": name}
        why = "dataset_info.json says where it is, and is not here; set data.name, or put that file beside this one"
        draft.note("open", shown("dataset", name), why)
        return None
    columns = info.get("columns") or {}
    source: dict[str, Any] = {"config": info.get("subset"), "train_split": info.get("split") or "train"}
    source["name"] = info.get("hf_hub_url") or str(folder / str(info.get("file_name", name)))
    if info.get("formatting") == "sharegpt":
        form = {"messages": columns.get("messages", "conversations")}
    elif stage == "pt":
        form = {"text": columns.get("prompt", "text")}
    else:
        named = {key: columns.get(key, default) if columns else default for key, default in _COLUMNS.items()}
        form = {"instruction": named["prompt"], "context": named["query"], "response": named["response"]}
    if info.get("ranking"):
        form = {"prompt": form.get("messages") or form.get("instruction")}
        form |= {key: columns.get(key, key) for key in ("chosen", "rejected")}
    if stage == "kto":
        answers = {"completion": form["response"]} if "response" in form else {}
        form = {"prompt": form["instruction"]} if answers else {"messages": form["messages"]}
        form |= answers | {"label": columns.get("kto_tag", "label")}
    form |= {key: columns[key] for key in ("system", "tools") if columns.get(key) and "text" not in form}
    source["format"] = {key: value for key, value in form.items() if value}
    draft.note("translated", shown("dataset", name), "from dataset_info.json", shown("data.name", source["name"]))
    return source
