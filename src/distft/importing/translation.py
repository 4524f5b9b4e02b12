"""What the programs have in common, in the terms of a recipe: batches, packing, warm-up, adapters, sharding, rows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from distft.config.files import folder_name
from distft.config.schema import StrategyName
from distft.config.upstream import upstream_fields
from distft.config.upstream_rules import OWNED
from distft.distributed.strategies.selection import STRATEGIES
from distft.importing.draft import Draft, number, shown
from distft.text import count

HUB = "distft writes to the run folder; push the adapter with `hf upload`"
REASONS = {
    **OWNED["training"],
    **dict.fromkeys(
        ("hub_model_id", "hub_strategy", "hub_token", "push_to_hub", "hub_private_repo", "hub_model_revision"), HUB
    ),
    "output_dir": "the run gets a folder of its own, runs/NAME",
    "overwrite_output_dir": "distft overwrites no run: the next one of a name gets a number",
    "resume_from_checkpoint": "an interrupted run of the same name resumes by itself (run.resume)",
    "ddp_find_unused_parameters": "distft finds out itself",
    "include_tokens_per_second": "a run always measures tokens per second",
    "include_mfu": "a run always measures its MFU",
    "do_eval": "training.eval_strategy says when to evaluate",
    "do_train": "distft train always trains",
}
"""Why keys of transformers' `TrainingArguments` have no counterpart."""
DEFAULT_EPOCHS = 3.0
LOSS = (
    "since transformers 4.46 the loss of a step is its sum over trained tokens by their number; before, and in their "
    "trainers of preferences, the mean of the micro-batches' means, in which a token of a short micro-batch weighs "
    "more. distft: always by the trained tokens of the global batch"
)
KEEPS_APART = "distft packs whole samples, none of which sees another, and checks that before step 1"
_ATTENTION = {
    "sdpa": "sdpa",
    "sdp": "sdpa",
    "eager": "eager",
    "flex": "flex_attention",
    "flex_attention": "flex_attention",
}


def training_fields() -> dict[str, str]:
    """The fields of TRL's and transformers' arguments that a recipe has under the same name."""
    return {field.name: f"training.{field.name}" for field in upstream_fields("training")}


def batch(draft: Draft, per_device: str, accumulation: str, *, packed: bool, length: str) -> None:
    """The global batch, and the micro-batch, of the three numbers that make it up."""
    size, steps = int(number(draft.pop(per_device, 1))), int(number(draft.pop(accumulation, 1)))
    named = f"{per_device}: {size} × {accumulation}: {steps} × {count(draft.processes, 'process')}"
    total = size * steps * draft.processes
    if packed:
        tokens = int(number(draft.get("training.max_length") or 2048))
        why = f"a pack of theirs holds up to {tokens:,} tokens ({length})"
        draft.translate(named, "batching.global_batch_tokens", total * tokens, why)
        draft.translate(per_device, "batching.micro_batch_tokens", size * tokens, KEEPS_APART)
    else:
        draft.translate(named, "batching.global_batch_size", total, "samples of a step, over all processes")
        draft.translate(per_device, "batching.micro_batch", size, "affects speed and memory only")
    grown = f"on 8 GPUs a step of theirs takes {size * steps * 8} {'packs' if packed else 'samples'}"
    why = f"their batch grows with the processes ({grown}), the learning rate does not; distft's batch stays (--nproc)"
    draft.note("silent", f"{per_device} × {accumulation} × processes", why)


def warm_up(draft: Draft, ratio: str = "warmup_ratio") -> None:
    """A share of warm-up, which is written as steps below 1."""
    value = number(draft.pop(ratio, 0))
    if value and not draft.get("training.warmup_steps"):
        draft.translate(shown(ratio, value), "training.warmup_steps", value, "below 1 it is a share of all steps")
    elif value:
        draft.note("unmatched", shown(ratio, value), "warmup_steps takes its place")


def adapter(draft: Draft, keys: Mapping[str, str], targets: Any, theirs: str) -> None:
    """The `lora` section: `keys` taken over, and the modules that get an adapter."""
    draft.take({key: f"lora.{ours}" for key, ours in keys.items()})
    if isinstance(targets, str) and targets in ("all", "all-linear", "all_linear"):
        draft.translate(theirs, "lora.target_modules", "all-linear", "every linear layer but the output head")
    elif isinstance(targets, str) and re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", targets):
        draft.translate(theirs, "lora.target_modules", re.split(r"\s*,\s*", targets), "a list")
    elif targets:
        draft.set("lora.target_modules", targets)
        draft.note("taken", theirs, "", "lora.target_modules")
    draft.recipe.setdefault("lora", {})


def without_adapter(draft: Draft, keys: Sequence[str]) -> None:
    """Drop the settings of an adapter that a full fine-tuning does not have."""
    for key in keys:
        if key in draft.left and key not in draft.filled:
            draft.note("unmatched", shown(key, draft.left[key]), "there is no adapter in a full fine-tuning")
        draft.pop(key)
        draft.filled.pop(key, None)


def quantize(draft: Draft, bits: Any, theirs: str) -> None:
    """4-bit or 8-bit weights by bitsandbytes."""
    key = f"quantization.load_in_{bits}bit"
    draft.translate(theirs, key, True, "bitsandbytes" + (": NF4, double quantisation" if int(bits) == 4 else ""))


def precision(draft: Draft, *, weights: str | None = None) -> None:
    """`bf16` and `fp16`, which may be `auto`, and the type of the weights."""
    bf16, fp16 = draft.pop("bf16"), draft.pop("fp16")
    if bf16 in ("auto", "full"):
        draft.translate(shown("bf16", bf16), "training.bf16", True, "distft asks for what the GPU is to have")
    elif bf16 is not None:
        draft.set("training.bf16", bool(bf16))
        draft.note("taken", shown("bf16", bf16), "", "training.bf16")
    if fp16 and fp16 != "auto":
        draft.set("training.fp16", True)
        draft.set("training.bf16", False)
        draft.note("taken", shown("fp16", fp16), "", "training.fp16")
    draft.set("model.dtype", weights or ("float16" if fp16 and fp16 != "auto" else "bfloat16"))


def attention(draft: Draft, keys: Sequence[str]) -> None:
    """How attention is computed: a way that all devices have is kept, a flash kernel becomes `auto`."""
    for key in keys:
        value = draft.pop(key)
        if not value:
            continue
        name = key if value is True else str(value)
        name = name.removesuffix("_attention")
        if name in _ATTENTION:
            draft.translate(shown(key, value), "model.attn_implementation", _ATTENTION[name], "its transformers name")
        else:
            why = "the fastest that is installed and passes the check before step 1"
            draft.translate(shown(key, value), "model.attn_implementation", "auto", why)


def sharding(draft: Draft, otherwise: str = "ddp") -> None:
    """The strategy, of a DeepSpeed file or an FSDP section."""
    deepspeed, fsdp = draft.pop("deepspeed"), draft.pop("fsdp") or draft.left.get("fsdp_config")
    config, _ = draft.pop("fsdp_config"), draft.pop("fsdp_version")
    strategy, theirs, why = cast(StrategyName, otherwise), "", "one process, or several that average their gradients"
    if deepspeed:
        theirs = shown("deepspeed", deepspeed)
        stage = _stage(deepspeed, draft.folder)
        stages: dict[int, StrategyName] = {3: "zero3", 2: "zero2", 1: "zero2"}
        strategy = stages.get(stage or 0, "ddp")
        why = f"ZeRO stage {stage}" if stage else "no ZeRO stage is named"
        why += "; distft's nearest is 2" if stage == 1 else ""
        if "offload" in str(deepspeed):
            draft.note("unmatched", f"{theirs} offloads", "distft keeps optimizer and weights on the GPU")
    elif fsdp:
        theirs, strategy, why = shown("fsdp", fsdp), "fsdp", "FSDP2; accelerate_configs/ says how it shards"
        if isinstance(config, dict) and any(value for key, value in config.items() if "offload" in key):
            draft.note("unmatched", "fsdp_config: offload_params", "distft keeps the weights on the GPU")
    draft.set("strategy", strategy)
    if theirs:
        draft.note("translated", theirs, why, f"strategy: {strategy}")
    if "weights" in STRATEGIES[strategy].shards and draft.get("quantization.load_in_4bit"):
        draft.set("quantization.bnb_4bit_quant_storage", draft.get("model.dtype") or "bfloat16")


def _stage(deepspeed: Any, folder: Path) -> int | None:
    """The ZeRO stage of a DeepSpeed configuration: of the file if it is there, otherwise by its name."""
    content = deepspeed if isinstance(deepspeed, dict) else None
    for path in () if content is not None else (Path(str(deepspeed)), folder / str(deepspeed)):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
    if isinstance(content, dict):
        section = content.get("zero_optimization") or {}
        return section.get("stage") if isinstance(section, dict) else None
    found = re.search(r"(?:zero|z|stage)[_-]?([0-3])", str(deepspeed).rsplit("/", 1)[-1].lower())
    return int(found[1]) if found else None


def trackers(draft: Draft, key: str = "report_to") -> None:
    """Where metrics go: a name, a list, or `none`."""
    value = draft.pop(key, "none")
    names = [value] if isinstance(value, str) else list(value)
    names = [name for name in names if name not in ("none", "all")]
    if value == "all":
        draft.note("unmatched", shown(key, value), "name the trackers in tracking.report_to")
    draft.set("tracking.report_to", names)
    if names:
        draft.note("translated", shown(key, value), "", shown("tracking.report_to", names))


def held_out(draft: Draft, key: str) -> None:
    """The validation split. Nothing else is held out, as with them."""
    size = number(draft.pop(key, 0.0)) or 0.0
    if 0 < size < 1:
        draft.translate(shown(key, size), "data.validation_fraction", float(size), "the same share, other rows of it")
    elif size:
        why = "it is a number of rows, and data.validation_fraction is a share; the recipe holds out 5%"
        draft.note("open", shown(key, size), why, "data.validation_fraction: 0.05")
        draft.set("data.validation_fraction", 0.05)
    else:
        draft.set("data.validation_fraction", 0.0)
    draft.set("data.test_fraction", 0.0)
    why = "they train on every other row, and so does the recipe; data.test_fraction: 0.1 measures before and after"
    draft.note("silent", "no rows for a test", why, "data.test_fraction: 0.0")


def evaluation_steps(draft: Draft) -> None:
    """Without a validation split nothing is evaluated, whatever the file says."""
    if not draft.get("data.validation_fraction") and not draft.get("data.test_split"):
        for key in ("eval_strategy", "eval_steps"):
            value = draft.recipe.get("training", {}).pop(key, None)
            if value not in (None, "no"):
                draft.note("unmatched", shown(key, value), "there is no validation split")
    elif draft.get("data.validation_fraction") == 0.0 and draft.get("training.eval_strategy"):
        draft.set("data.validation_fraction", 0.05)
        draft.note("open", "eval on the test split", "distft evaluates on a share of the training rows meanwhile")


def times_per_epoch(draft: Draft, key: str, what: str) -> None:
    """`evals_per_epoch` and the like: a share of all steps."""
    times = number(draft.pop(key, 0))
    if not times:
        return
    epochs = float(draft.get("training.num_train_epochs") or DEFAULT_EPOCHS)
    strategy = "epoch" if times == 1 else "steps"
    draft.translate(shown(key, times), f"training.{what}_strategy", strategy, f"{times} times an epoch")
    if times != 1:
        draft.set(f"training.{what}_steps", round(1 / (times * epochs), 6))


def sources(draft: Draft, rows: Sequence[Mapping[str, Any]]) -> None:
    """The data: one source in `data`, several in `data.sources`."""
    rows = [{key: value for key, value in row.items() if value} for row in rows]
    if len(rows) > 1:
        stems = [stem(str(row.get("name") or row.get("files", "data"))) for row in rows]
        twice = [name if stems.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(stems, 1)]
        labels = [{"label": folder_name(label)} if label not in stems else {} for label in twice]
        draft.set("data.sources", [{**row, **label} for row, label in zip(rows, labels, strict=True)])
    for key, value in rows[0].items() if len(rows) == 1 else ():
        if not (key == "train_split" and value == "train") and key != "weight":
            draft.set(f"data.{key}", value)


def train_prompts(draft: Draft, rows: Sequence[Mapping[str, Any]], theirs: str, why: str) -> None:
    """Train on all tokens, not only on those of the answers."""
    columns = [row.get("format") or {} for row in rows]
    texts = bool(columns) and all({"instruction", "text", "prompt"} & set(form) for form in columns)
    key, value = ("training.completion_only_loss", False) if texts else ("data.train_on", "all")
    draft.set(key, value)
    draft.note("silent", theirs, why, shown(key, value))


def stem(name: str) -> str:
    """The last part of a path or a hub ID, without the ending of a file."""
    return name.rstrip("/").rsplit("/", 1)[-1].split(".")[0]


def place(draft: Draft, path: str) -> str:
    """A path as the recipe can use it: as it is, or beside the configuration if it is only there."""
    beside = draft.folder / path
    return str(beside) if not Path(path).exists() and beside.exists() else path


def template_file(draft: Draft, text: str, theirs: str) -> None:
    """A chat template that the file spells out, written beside the recipe."""
    draft.files["jinja"] = text
    draft.note("translated", theirs, "its text, in a file beside the recipe", "data.chat_template")


def run_name(draft: Draft, key: str) -> None:
    if name := draft.pop(key):
        draft.translate(shown(key, name), "run.name", folder_name(str(name)), "")
