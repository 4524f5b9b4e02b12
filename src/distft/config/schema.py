"""The sections of a recipe: one class each. The docstring under a field is its help in errors, editors and the docs.

`lora` and `training` have no class here: they are PEFT's `LoraConfig` and TRL's `SFTConfig` under their own field
names, read from the installed versions by `distft.config.upstream`, without the fields that distft sets itself.
`evaluation` and `slurm` have modules of their own, `distft.config.evaluation` and `distft.config.slurm`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer
from pydantic.config import JsonDict

from distft.text import parse_duration, redacted

DType = Literal["bfloat16", "float16", "float32"]
StrategyName = Literal["single", "ddp", "fsdp", "zero2", "zero3"]

GIB: JsonDict = {"unit": "GiB"}
LAYERS: JsonDict = {"unit": "layers"}
PROCESSES: JsonDict = {"unit": "processes"}
SAMPLES: JsonDict = {"unit": "samples"}
SECONDS: JsonDict = {"unit": "s"}
STEPS: JsonDict = {"unit": "steps"}
TOKENS: JsonDict = {"unit": "tokens"}


class Section(BaseModel):
    """Base of every section: frozen, strict about types, closed to unknown keys; numbers are finite."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


_DURATION = r"^(\d+-)?\d{1,2}:\d\d:\d\d$"


class Run(Section):
    """Which run this is and where its folder goes."""

    name: str = ""
    """Name of the run folder; empty for the recipe's name. If a folder of that name exists, the run gets a number:
    `name-2`."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the adapter's initial weights, dropout, the data splits and the order of the samples."""
    resume: Literal["auto", "must", "never"] = "auto"
    """`auto` resumes the newest interrupted run of this name from its newest valid checkpoint, if its recipe, data and
    base are the same, and otherwise starts a new run; `must` (`distft train --resume`) resumes it or fails; `never`
    starts a new run."""
    force: bool = False
    """Resume even if the recipe, the data or the base's weights have changed since the run was interrupted."""
    on_bad_numbers: Literal["stop", "skip"] = "stop"
    """What to do about a NaN or infinite loss or gradient norm: `stop` ends the run; `skip` discards that step's
    update. The run survives nine such steps in a row; the tenth ends it."""
    max_restarts: int = Field(3, ge=0)
    """How often `distft train` restarts the processes after one was killed, failed or hung."""
    max_time: str | None = Field(None, pattern=_DURATION, json_schema_extra={"unit": "[days-]hours:minutes:seconds"})
    """Save a checkpoint and stop before this much time has passed since the start: `[days-]hours:minutes:seconds`."""
    train_time: str | None = Field(None, pattern=_DURATION, json_schema_extra={"unit": "[days-]hours:minutes:seconds"})
    """Finish the run, with its final evaluation, after this much training time: `[days-]hours:minutes:seconds`.
    Includes earlier starts of the run, and the evaluations and saves on the way. Does not change the learning-rate
    schedule."""
    hang_timeout_s: float = Field(900.0, gt=0, json_schema_extra=SECONDS)
    """End a run that makes no progress within a step, an evaluation batch or a save for this long, and write every
    rank's Python stacks to its folder; the first step is exempt. Set it above the longest save and below
    training.ddp_timeout (1800 s), at which a collective fails without stacks."""

    @property
    def max_time_s(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)

    @property
    def train_time_s(self) -> float | None:
        """`train_time` in seconds."""
        return None if self.train_time is None else parse_duration(self.train_time)


def _absolute(name: str) -> str:
    """A local path made absolute, so that a run folder can be used from any working folder. Hub IDs stay as they are:
    a name that begins with `.`, `/` or `~` is a path, any other is one if it exists."""
    try:
        path = Path(name).expanduser()
        is_path = name != "tiny" and (name.startswith((".", "/", "~")) or path.exists())
    except (RuntimeError, OSError):  # there is no home, or no file can have this name
        return name
    return os.path.normpath(path.absolute()) if is_path else name


ModelName = Annotated[str, AfterValidator(_absolute)]
ChatTemplateName = Annotated[
    str, AfterValidator(lambda name: _absolute(name) if name.endswith((".jinja", ".j2")) else name)
]


class Model(Section):
    """The base model and its tokenizer."""

    name: ModelName
    """Hub ID or local folder of a causal language model, or `tiny` for the embedded one."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null for the default branch."""
    tokenizer: ModelName | None = None
    """Hub ID or folder of a different tokenizer; null for the model's own."""
    resize_embeddings: bool = False
    """Add a row to the embeddings for each entry of the tokenizer that the model lacks. A new row starts as the mean of
    the others, and is trained and saved with the adapter."""
    dtype: DType = "bfloat16"
    """Data type of the base weights that are not quantised."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flex_attention", "varlen", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    """Attention implementation by its transformers name, or `varlen`, PyTorch's own for packed samples; `auto` picks
    the fastest that works."""
    experts_implementation: Literal["auto", "eager", "batched_mm", "grouped_mm"] = "auto"
    """How a mixture of experts computes its experts, by the name in transformers; `auto` computes all of them in
    grouped matrix products, from packed weights and adapters as they are."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto` fuses LoRA linears into the autograd functions of distft.kernels.lora and, on a GPU, uses PyTorch's norms
    and, if liger-kernel is installed, its kernels for the rest; `plain` keeps the modules of PEFT and transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class Quantization(Section):
    """bitsandbytes quantisation of the base, under the field names of `transformers.BitsAndBytesConfig`, besides
    `experts` and `dequantize_at_load`."""

    load_in_4bit: bool = False
    """Quantise the weights to 4 bits (QLoRA)."""
    load_in_8bit: bool = False
    """Quantise the weights to 8 bits (LLM.int8())."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants as well."""
    bnb_4bit_compute_dtype: DType = "bfloat16"
    """Data type of matrix products with dequantised weights."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Data type that stores the packed 4-bit weights. FSDP shards them only if it equals model.dtype."""
    llm_int8_threshold: float = Field(6.0, ge=0)
    """Outlier threshold of LLM.int8()."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules to leave unquantised, in addition to the output head; null for none."""
    experts: bool = True
    """Quantise the weights of experts, too, which transformers keeps in 3-D parameters: in 4 bits only. `false` leaves
    them in model.dtype."""
    dequantize_at_load: bool = False
    """Dequantise 4-bit weights to model.dtype once, after loading: the results of QLoRA with the speed and the memory
    of a 16-bit base."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weights have 4-bit or 8-bit values, even if dequantised at load."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def bits(self) -> int:
        """Bits per weight in memory during training: 4, 8, or 16 if not quantised or dequantised at load."""
        return 4 if self.load_in_4bit and not self.dequantize_at_load else 8 if self.load_in_8bit else 16

    def arguments(self) -> dict[str, Any]:
        """The arguments of `transformers.BitsAndBytesConfig`."""
        return self.model_dump(exclude_none=True, exclude={"dequantize_at_load", "experts"})


class Format(Section):
    """Which columns hold what: `messages`; `text`; `prompt` and `completion`; `instruction` and `response`; `review`
    and `label`; or, for `objective: dpo`, `chosen` and `rejected`, or answers with a `label`."""

    messages: str | None = None
    """Column of conversations: a list of messages with `role` and `content`, or with `from` and `value`."""
    tools: str | None = None
    """Column of the tools that a conversation may use: a list of JSON schemas, or its JSON text."""
    system: str | None = None
    """Column of system prompts, which come before the conversation; rows may leave it empty."""
    text: str | None = None
    """Column of whole texts; every token is trained on."""
    prompt: str | None = None
    """Column of prompts: texts, used verbatim, or lists of messages."""
    completion: str | None = None
    """Column of the completions that follow the prompts: texts, or lists of messages."""
    chosen: str | None = None
    """Column of the better answers, for `objective: dpo`: texts, messages, or lists of messages. Without `prompt`, what
    both answers begin with is the prompt."""
    rejected: str | None = None
    """Column of the worse answers."""
    instruction: str | None = None
    """Column of instructions (Dolly's template, or data.chat_template)."""
    context: str | None = None
    """Column of contexts, which rows may leave empty (Dolly's template, or data.chat_template)."""
    response: str | None = None
    """Column of responses (Dolly's template, or data.chat_template)."""
    review: str | None = None
    """Column of texts to classify (IMDB's template)."""
    label: str | None = None
    """Column of class numbers, 0 … n-1 (IMDB's template); with `messages`, or `prompt` and `completion`, and
    `preference.loss_type: kto`, of true for good answers and false for bad ones."""
    label_words: list[str] = ["negative", "positive"]
    """The word for each class number."""

    @property
    def rated(self) -> bool:
        """Whether a label says of each answer whether it is good."""
        return self.label is not None and (self.messages is not None or self.completion is not None)

    @property
    def prefers(self) -> bool:
        """Whether answers are preferred to others: those of a pair, or with a label."""
        return self.chosen is not None or self.rated


_NULLABLE = BeforeValidator(lambda name: name or "", json_schema_input_type=str | None)
Place = Annotated[str, PlainSerializer(redacted)]
"""A path, or an address, of which only that is recorded which is no secret."""


class DataSource(Section):
    """One source of a mixture: what to read, under the names that `data` has, and how much of it an epoch holds."""

    name: Annotated[Place, _NULLABLE] = ""
    """As data.name."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in reports and in `eval_LABEL_loss`; null for the stem of the file, or the last part of the hub ID."""
    path: Place | None = None
    """As data.path."""
    files: Place | list[Place] | None = None
    """As data.files."""
    config: str | None = None
    """As data.config."""
    train_split: str = "train"
    """As data.train_split."""
    test_split: str | None = None
    """As data.test_split."""
    test_path: Place | None = None
    """As data.test_path."""
    format: Format | None = None
    """As data.format."""
    weight: float | None = Field(None, gt=0)
    """Share of the samples of an epoch, relative to the weights of the other sources."""
    samples: int | None = Field(None, ge=1, json_schema_extra=SAMPLES)
    """Samples of this source in an epoch, drawn with run.seed and the same in each; null, without weights, for all."""


class Data(Section):
    """The training data and its splits."""

    name: Annotated[Place, _NULLABLE] = ""
    """`tiny`, `tiny_sentiment`, `tiny_preferences`, `tiny_ratings`, `tiny_languages`, `tiny_summaries`, `dolly` or
    `imdb`; or a hub ID; or a .jsonl, .json, .csv, .tsv, .parquet or .arrow file or a folder, local or at an address
    (https://, s3://, gs://, …). Null with `sources`."""
    path: Place | None = None
    """File or folder to read in place of the hub's copy, with the columns of `name`."""
    files: Place | list[Place] | None = None
    """Pattern, or list of patterns, of the files to read (`part-*.jsonl`, `**/*.parquet`), in the folder of `path` or
    `name`; with neither, in the working folder. They may be addresses. Elsewhere a path is never a pattern."""
    config: str | None = None
    """Configuration (subset) of a hub dataset."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str | None = None
    """Official split to hold out; null holds out `test_fraction` of the training split."""
    test_path: Place | None = None
    """File or folder of the held-out split."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training split for the evaluations during training; 0 for none."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the training split that is held out for the evaluation before and after training; unused with an
    official test split."""
    max_samples: int | None = Field(None, ge=1, json_schema_extra=SAMPLES)
    """Use only this many rows of the training split, drawn with run.seed; null for all."""
    format: Format | None = None
    """Columns; null for the data sets that `data.name` knows, whose columns are known, and
    for data whose columns say what they are."""
    sources: list[DataSource] | None = None
    """A mixture of several sources, in place of `name`, each with its own splits. All have weights, or none has."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """How long an epoch over weighted sources is: until the first of them has no more samples, or until each sample of
    each was seen, for which the smaller ones repeat. With `all_exhausted`, `samples` may be more than there are."""
    deduplicate: bool = False
    """Drop rows whose text and trained part repeat those of an earlier row, before the splits; they are counted."""
    order: Literal["shuffled", "length", "loss"] | str = "shuffled"
    """Order of the samples in an epoch: `shuffled`; or from easy to hard, by `length` in tokens, by the `loss` of the
    untouched base, or by the numbers in a column of the data, which this names."""
    stages: int = Field(4, ge=1)
    """Unless shuffled: how many parts of equally many samples an epoch has, each harder than the one before. Within a
    part, samples are shuffled, in each epoch anew."""
    streaming: bool = False
    """For data that do not fit on disk: read and tokenize them while training, window by window, without end;
    training.max_steps says when to stop. The samples of each window are shuffled."""
    window: int = Field(100_000, ge=1, json_schema_extra=SAMPLES)
    """With `streaming`: samples of a window, rounded down to whole global batches. `validation_fraction` and
    `test_fraction` are shares of a window then: so many rows at the beginning of the data are held out."""
    chat_template: ChatTemplateName | None = None
    """What turns conversations into text: `tokenizer` for the tokenizer's own template; or, for a base without one,
    `chatml`, another that TRL ships (`llama3`, `qwen3`, …), or the path of a .jinja file. Null means the tokenizer's
    own for conversations, and none for texts in columns that `format` names."""
    train_on: Literal["assistant", "last_assistant", "all"] | list[str] = "assistant"
    """Which turns of a conversation are trained: those of the assistant, its last one, all, or those of a list of
    roles. A message's own `weight`, `loss_weight` or `train` goes before it."""
    train_on_end_of_turn: bool = True
    """Train on the token that ends a trained turn of the assistant, from which the model learns to stop."""
    truncation: Literal["end", "beginning"] = "end"
    """Which turns to leave out of a conversation that is longer than training.max_length; a system prompt stays. Where
    no answer fits whole, one is cut."""


class Batching(Section):
    """How many samples make up an optimizer step, and how many a device processes at once."""

    global_batch_size: int | None = Field(None, ge=1, json_schema_extra=SAMPLES)
    """Samples per optimizer step over all processes. Part of the optimisation: the same for any number of processes."""
    global_batch_tokens: int | None = Field(None, ge=1, json_schema_extra=TOKENS)
    """Tokens per optimizer step over all processes, in place of global_batch_size. Approximate, because samples are
    not cut."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(1, json_schema_extra=SAMPLES)
    """Samples that a device processes at once, padded. Affects memory and speed only: the gradient accumulation
    follows from it. `auto` measures, before the run, the largest that fits with the data's longest samples and leaves
    8% of the memory free."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(None, json_schema_extra=TOKENS)
    """Tokens that a device processes at once, in place of micro_batch: whole samples packed without padding, none of
    which attends to another. `auto` as for micro_batch."""
    memory_limit_gib: float | None = Field(None, gt=0, json_schema_extra=GIB)
    """Device memory that a process may use; null for all. On a GPU it limits PyTorch's allocator, on a CPU only
    `micro_batch: auto`."""
    checkpoint_layers: Annotated[int, Field(ge=0)] | Literal["auto"] | None = Field(None, json_schema_extra=LAYERS)
    """With training.gradient_checkpointing: the number of layers, evenly spread, whose activations are recomputed in
    the backward pass; null for all, `auto` for as few as the memory allows."""
    offload_checkpoints: bool = False
    """Keep the inputs of checkpointed layers in host memory until the backward pass."""
    share_prompts: bool | Literal["auto"] = "auto"
    """Of a pair in a pack, compute the prompt once for both answers: the same loss from fewer tokens. `auto` does where
    the attention is `varlen` and the check of the run finds it right."""

    def sizes(self) -> dict[str, Any]:
        """The fields that set a number of samples or tokens."""
        return self.model_dump(
            include={"global_batch_size", "global_batch_tokens", "micro_batch", "micro_batch_tokens"}
        )


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    report_to: list[str] = ["wandb"]
    """Trackers by their transformers names (wandb, tensorboard, trackio, mlflow, …); [] for none."""
    project: str = "distft"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; null for your default."""
    group: str | None = None
    """W&B group of runs."""
    tags: list[str] = []
    """W&B tags."""
    co2_g_per_kwh: float | None = Field(None, ge=0, json_schema_extra={"unit": "g CO₂/kWh"})
    """What a kilowatt-hour of your electricity emits; the model card then names the emissions of the training."""
    throughput_warmup_steps: int = Field(3, ge=0, json_schema_extra=STEPS)
    """First steps to exclude from the run's samples/s and tokens/s (warm-up of allocator, kernels and caches)."""
    profile_steps: int = Field(0, ge=0, json_schema_extra=STEPS)
    """Number of steps after those to run under torch.profiler. profile.json records how much of them the device
    computed, waited for other ranks, copied or idled. The profiler slows steps down, so they do not count towards the
    run's rates; at least one step that does is left."""
