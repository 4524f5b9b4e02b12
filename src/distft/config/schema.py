"""What a recipe can say: one class a section; the docstring under each field is its help everywhere.

`lora` and `training` have no class here. They are PEFT's `LoraConfig` and TRL's `SFTConfig` under their own field
names, checked against the installed versions by `upstream`, less the fields that distft owns itself.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distft.config.section import DType, Section
from distft.text import parse_duration

StrategyName = Literal["single", "ddp", "fsdp", "zero2", "zero3"]

RENAMED: dict[str, str] = {
    "evaluation_strategy": "training.eval_strategy",
    "warmup_ratio": "training.warmup_steps, where a number below 1 is a ratio",
    "no_cuda": "training.use_cpu",
    "max_seq_length": "training.max_length",
    "torch_dtype": "model.dtype",
    "model_name_or_path": "model.name",
    "dataset_name": "data.name",
    "per_device_train_batch_size": "batching.micro_batch",
    "alpha": "lora.lora_alpha",
    "lr": "training.learning_rate",
    "epochs": "training.num_train_epochs",
    "rank": "lora.r",
    "dropout": "lora.lora_dropout",
    "load_in_4bit": "quantization.load_in_4bit",
}
"""Names that people bring from older versions and other tools, and what they are called here."""


_CLOCK = r"^(\d+-)?\d{1,2}:\d\d:\d\d$"


class Run(Section):
    """Which run this is and where its folder goes."""

    name: str = ""
    """Name of the run folder; the recipe's name where it is empty. A name in use gets a number: `name-2`."""
    dir: str = "runs"
    """Folder that holds the run folders."""
    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of the adapter's initial weights, dropout, the data splits and the order of the samples."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on with a run of this name that was interrupted, from its newest checkpoint that verifies."""
    force: bool = False
    """Resume though the recipe has changed since."""
    on_bad_numbers: Literal["stop", "skip"] = "stop"
    """A NaN or infinite loss or gradient norm: `stop` ends the run, `skip` leaves that step's update out, ten in a row at most."""
    max_restarts: int = Field(3, ge=0)
    """How many times `distft train` starts the processes again after one was killed, failed or hung."""
    max_time: str | None = Field(None, pattern=_CLOCK)
    """Save and stop before this much time has passed since the start, as SLURM writes it: `[days-]hours:minutes:seconds`."""
    train_time: str | None = Field(None, pattern=_CLOCK)
    """End as after the last step, evaluated and finished, once so much time was trained, evaluations and saves on the way counted, those
    of earlier starts as well. The learning rate's schedule is that of all steps."""
    hang_timeout_s: float = Field(900.0, gt=0)
    """A run that makes no progress inside a step, a batch of an evaluation or a save for so many seconds is ended with every rank's
    Python stacks in its folder; the first step is left out. Keep it above the longest save, and below training.ddp_timeout
    (1800 s), at which a collective fails without stacks."""

    @property
    def max_time_s(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else parse_duration(self.max_time)

    @property
    def train_time_s(self) -> float | None:
        """`train_time` in seconds."""
        return None if self.train_time is None else parse_duration(self.train_time)


class Model(Section):
    """The base model and its tokenizer."""

    name: str
    """Hub id or local folder of a causal language model, or `tiny`, the embedded one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer where it is not the model's own."""
    dtype: DType = "bfloat16"
    """Type of the base weights as loaded (of those that are not quantised)."""
    attn_implementation: Literal[
        "auto", "eager", "sdpa", "flex_attention", "varlen", "flash_attention_2", "flash_attention_3"
    ] = "auto"
    """Attention kernel as transformers names it, or `varlen`, PyTorch's own for packs; `auto` takes the fastest that fits."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto` fuses LoRA linears into the autograd nodes of distft.kernels.lora and takes liger's norms and rotary embedding on a GPU
    where liger-kernel is installed; `plain` leaves PEFT's and transformers' modules as they are."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""


class Quantization(Section):
    """bitsandbytes quantisation of the base, under the field names of `transformers.BitsAndBytesConfig`."""

    load_in_4bit: bool = False
    """4-bit weights (QLoRA)."""
    load_in_8bit: bool = False
    """8-bit weights (LLM.int8())."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the quantisation constants as well."""
    bnb_4bit_compute_dtype: DType = "bfloat16"
    """Type of the products with dequantised weights."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Type that the packed 4-bit weights are stored in; FSDP shards them only where it is the compute dtype."""
    llm_int8_threshold: float = 6.0
    """Outlier threshold of LLM.int8()."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules to leave unquantised (the output head always is)."""
    dequantize_at_load: bool = False
    """Unpack 4-bit weights once, to model.dtype, when they have been loaded: QLoRA's numbers with the speed of a 16-bit base,
    and its memory."""

    @property
    def is_quantized(self) -> bool:
        """Whether the weights are those of 4 or 8 bits, however they lie in memory."""
        return self.load_in_4bit or self.load_in_8bit

    @property
    def bits(self) -> int:
        """Bits that a weight takes while it trains: 4, 8, or 16 where it is not quantised or was unpacked at load."""
        return 4 if self.load_in_4bit and not self.dequantize_at_load else 8 if self.load_in_8bit else 16

    def arguments(self) -> dict[str, Any]:
        """Those of `transformers.BitsAndBytesConfig`."""
        return self.model_dump(exclude_none=True, exclude={"dequantize_at_load"})


class Format(Section):
    """Which columns hold what. Give `text`, or `prompt` and `completion`, or `instruction` and `response`, or `review` and `label`."""

    text: str | None = None
    """Column of whole texts; the loss is on all of it."""
    prompt: str | None = None
    """Column of prompts, used as they are."""
    completion: str | None = None
    """Column of what should follow the prompt."""
    instruction: str | None = None
    """Column of instructions (Dolly's template)."""
    context: str | None = None
    """Column of contexts, may be empty in a row (Dolly's template)."""
    response: str | None = None
    """Column of responses (Dolly's template)."""
    review: str | None = None
    """Column of texts to classify (IMDB's template)."""
    label: str | None = None
    """Column of class numbers, 0 … n-1 (IMDB's template)."""
    label_words: list[str] = ["negative", "positive"]
    """The word that stands for each class number."""


class Data(Section):
    """What to train on, and how it is split."""

    name: str
    """`tiny`, `tiny_sentiment`, `dolly`, `imdb`, a hub id, or a local .jsonl/.json/.csv/.parquet/.arrow file or folder (which needs `format`)."""
    path: str | None = None
    """Local file or folder to read instead of the hub, in the columns of `name`."""
    config: str | None = None
    """Configuration (subset) of a hub data set."""
    train_split: str = "train"
    """Split to train on."""
    test_split: str | None = None
    """Official split to hold out; without one a `test_fraction` of the train split is."""
    test_path: str | None = None
    """Local file or folder of the held-out split."""
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the train split for the evaluation curve during training; 0 for none."""
    test_fraction: float = Field(0.1, ge=0, lt=1)
    """Share of the train split held out for the evaluation before and after; not used with an official test split."""
    max_samples: int | None = Field(None, ge=1)
    """Use this many rows of the train split only, taken after shuffling by run.seed."""
    format: Format | None = None
    """Columns; not needed for `tiny`, `tiny_sentiment`, `dolly` and `imdb`, which know theirs."""


class Batching(Section):
    """How many samples make an optimizer step, and how many fit on a device at once."""

    global_batch_size: int | None = Field(None, ge=1)
    """Samples of one optimizer step over all processes: part of the optimisation, the same on any number of processes."""
    global_batch_tokens: int | None = Field(None, ge=1)
    """Tokens of one optimizer step over all processes, in place of global_batch_size (null); whole samples, so about as many."""
    micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Samples a device takes at once, padded: memory and speed only. gradient_accumulation_steps follows. `auto` tries out
    before the run which is the largest that fits with the longest samples of the data, and 8% of the device to spare."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Tokens a device takes at once, in place of micro_batch: whole samples packed without padding, none of which sees another.
    `auto` as above."""
    memory_limit_gib: float | None = Field(None, gt=0)
    """Memory in GiB that a process may take of its device; all of it where null. On a GPU the allocator holds to it, on a CPU
    `micro_batch: auto` alone."""
    checkpoint_layers: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    """With training.gradient_checkpointing: of how many layers, spread evenly, the activations are made again in the backward.
    null for all of them, `auto` for as few as fit into the memory that is there."""
    offload_checkpoints: bool = False
    """Keep what is left of checkpointed layers, their inputs, in host memory until the backward."""

    def sizes(self) -> dict[str, Any]:
        """Its fields that say how many samples or tokens there are."""
        return self.model_dump(
            include={"global_batch_size", "global_batch_tokens", "micro_batch", "micro_batch_tokens"}
        )


class Tracking(Section):
    """Where figures go besides metrics.jsonl."""

    report_to: list[str] = ["wandb"]
    """Trackers by transformers' names (wandb, tensorboard, trackio, mlflow, …); [] for none."""
    project: str = "distft"
    """Project name in W&B."""
    entity: str | None = None
    """User or team in W&B."""
    group: str | None = None
    """Group of runs in W&B."""
    tags: list[str] = []
    """Tags in W&B."""
    throughput_warmup_steps: int = Field(3, ge=0)
    """First steps that the run's samples/s and tokens/s leave out (allocator, kernel and cache warm-up)."""
    profile_steps: int = Field(0, ge=0)
    """Steps after those that run under torch.profiler: how much of them the device computed, waited for other ranks, copied and
    was idle goes to profile.json. It slows them down, so they do not count in the run's rates; one step at least is left that does."""


_WORD = r"^[^\s\"'\\\\`$]+$"  # stands in a #SBATCH line, or between a script's double quotes, as it is


class Slurm(Section):
    """The job of `distft submit`, under sbatch's own names. What is null is left to the cluster. Learns nothing: it may change between
    two starts of a run."""

    account: str | None = Field(None, pattern=_WORD)
    """Account to charge."""
    partition: str | None = Field(None, pattern=_WORD)
    """Partition, or several by commas."""
    qos: str | None = Field(None, pattern=_WORD)
    """Quality of service."""
    nodes: int = Field(1, ge=1)
    """Number of nodes."""
    gpus_per_node: int | None = Field(None, ge=1)
    """GPUs a node; one process each."""
    gres: str | None = Field(None, pattern=_WORD)
    """Generic resources a node where they are asked for in another way, `gpu:h100-47:2` say."""
    processes_per_node: int | None = Field(None, ge=1)
    """Processes a node; null: one a GPU, or one where there is none."""
    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores a node; a node has one task, the launcher of its processes."""
    mem: str | None = Field(None, pattern=_WORD)
    """Memory a node, `200G` say; `0` for all."""
    time: str | None = Field(None, pattern=r"^((\d+-)?\d+(:\d\d){0,2}|UNLIMITED)$")
    """Time limit of one start of the job, `hours:minutes:seconds` or `days-hours`. The work may take several starts."""
    constraint: str | None = Field(None, pattern=_WORD)
    """Features that the nodes must have."""
    exclude: str | None = Field(None, pattern=_WORD)
    """Nodes to leave out."""
    reservation: str | None = Field(None, pattern=_WORD)
    """Reservation to run in."""
    array: str | None = Field(None, pattern=r"^[\d,:%-]+$")
    """For an experiment: which of its runs, and how many at a time, as sbatch reads it (`0-7%2`); null for all."""
    dependency: str | None = Field(None, pattern=_WORD)
    """When the job may start: `afterok:1234` for a chain, or `singleton`."""
    container: str | None = Field(None, pattern=_WORD)
    """Image that distft runs in on the nodes (srun's --container-image, of Pyxis and enroot); it must hold distft."""
    container_mounts: list[Annotated[str, Field(pattern=_WORD)]] = []
    """What the container sees besides the working folder: `source:target`."""
    modules: list[Annotated[str, Field(pattern=_WORD)]] = []
    """Environment modules to load."""
    setup: list[Annotated[str, Field(pattern=r"^[^\n\r]*$")]] = []
    """Shell lines that run on the first node before training, after the modules; what they export reaches all nodes."""
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    """Variables for all processes. No secrets: sbatch passes on what you have exported."""
    grace_s: int = Field(120, ge=30)
    """Seconds before the time limit at which the run is told to save and stop; a save has to fit. SLURM may be 30 s early."""
    max_requeues: int = Field(20, ge=0)
    """How many times a job that was stopped before it had finished goes back into the queue."""
