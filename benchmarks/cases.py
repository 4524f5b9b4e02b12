"""The cases of the throughput benchmark: recipes with overrides, and the references that each is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from synthetic import Shape


@dataclass(frozen=True)
class Batch:
    """The size of an optimizer step, and of a micro-batch in tokens."""

    tokens: int
    global_samples: int | None = 64
    global_tokens: int | None = None

    def overrides(self, shape: Shape) -> list[str]:
        wanted = None if self.global_tokens is None else shape.tokens(self.global_tokens)
        return [
            f"batching.global_batch_size={_yaml(self.global_samples)}",
            f"batching.global_batch_tokens={_yaml(wanted)}",
            f"batching.micro_batch_tokens={shape.tokens(self.tokens)}",
        ]


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value)


# 64 samples have 13,100 tokens on average and just under 18,000 at most: one pack per GPU and step on two GPUs.
TWO_GPUS = Batch(9_216)
# Steps of 13,312 tokens (64.9 samples on average) fill the packs of one GPU. A step ends with a whole sample, hence the
# slack.
ONE_PACK = Batch(14_336, global_samples=None, global_tokens=13_312)
TWO_PACKS = Batch(7_168, global_samples=None, global_tokens=13_312)
# The largest that fits into 6.5 GB with the inputs of checkpointed layers in host memory.
OFFLOADED = Batch(11_264, global_samples=None, global_tokens=10_752)


@dataclass(frozen=True)
class Reference:
    """A script in references/, its arguments, and the batch whose order it follows. `pack`: it packs by itself."""

    gpus: int
    script: str
    arguments: tuple[str, ...] = ()
    batch: Batch = TWO_GPUS
    pack: int | None = None

    def command(self, shape: Shape) -> list[str]:
        packing = ["--tokens", self.pack, "--global-tokens", 13_312] if self.pack is not None else []
        return [*self.arguments, *(str(shape.tokens(word)) if isinstance(word, int) else word for word in packing)]


@dataclass(frozen=True)
class Case:
    """A recipe with overrides, and the references it is compared with."""

    gpus: int
    recipe: str
    batch: Batch
    overrides: tuple[str, ...]
    references: tuple[str, ...]


OFF = "training.gradient_checkpointing=false"
ON = ("training.gradient_checkpointing=true", "batching.checkpoint_layers=null")
OFFLOAD = (*ON, "batching.offload_checkpoints=true", "training.optim=adamw_8bit")
SINGLE = ("strategy=single",)
# One sample of 16,384 tokens per step, for --shape qwen2-1.5b.
LONG = Batch(16_384, global_samples=1)
SMALL_CARD = (*SINGLE, "training.max_length=16384", "lora.r=8", "lora.lora_alpha=16", "training.optim=adamw_8bit", *ON)
EIGHT = ("quantization.load_in_4bit=false", "quantization.load_in_8bit=true")
CASES = {
    "ddp_qlora": Case(2, "ddp_qlora", TWO_GPUS, (OFF,), ("r1", "trl_packed_4bit")),
    "ddp_qlora_6656": Case(2, "ddp_qlora", Batch(6_656), (OFF,), ("r1", "trl_packed_4bit")),
    "ddp_qlora_checkpointed": Case(2, "ddp_qlora", Batch(8_192), ON, ("r1",)),  # the largest that fits into 9 GB
    "fsdp_bf16": Case(2, "fsdp_bf16", TWO_GPUS, (OFF,), ("r2_fsdp2", "r2_fsdp1")),
    "ddp_bf16": Case(2, "ddp_bf16", TWO_GPUS, (OFF,), ("r1", "trl_packed_bf16")),
    "single_13312": Case(
        1, "ddp_qlora", ONE_PACK, (*SINGLE, OFF, "lora.lora_dropout=0.0"), ("unsloth_13312", "trl_packed_single")
    ),
    "single_13312_dequantized": Case(
        1,
        "ddp_qlora",
        ONE_PACK,
        (*SINGLE, OFF, "lora.lora_dropout=0.0", "quantization.dequantize_at_load=true"),
        ("unsloth_13312",),
    ),
    "single_6656": Case(1, "ddp_qlora", TWO_PACKS, (*SINGLE, OFF), ("unsloth_6656",)),
    "single_checkpointed": Case(
        1, "ddp_qlora", OFFLOADED, (*SINGLE, *OFFLOAD, "lora.lora_dropout=0.0"), ("unsloth_checkpointed",)
    ),
    "single_checkpointed_dropout": Case(
        1, "ddp_qlora", OFFLOADED, (*SINGLE, *OFFLOAD), ("unsloth_checkpointed_dropout",)
    ),
    "long_4bit": Case(1, "ddp_qlora", LONG, (*SMALL_CARD, "batching.offload_checkpoints=true"), ()),
    "long_4bit_on_device": Case(1, "ddp_qlora", LONG, SMALL_CARD, ()),
    "long_4bit_plain": Case(1, "ddp_qlora", LONG, (*SMALL_CARD, "model.kernels=plain"), ()),
    "long_8bit": Case(1, "ddp_qlora", LONG, (*SMALL_CARD, *EIGHT, "batching.offload_checkpoints=true"), ()),
    "long_8bit_plain": Case(1, "ddp_qlora", LONG, (*SMALL_CARD, *EIGHT, "model.kernels=plain"), ()),
    "long_bf16": Case(1, "ddp_bf16", LONG, (*SMALL_CARD, "batching.offload_checkpoints=true"), ()),
    "long_bf16_plain": Case(1, "ddp_bf16", LONG, (*SMALL_CARD, "model.kernels=plain"), ()),
}
REFERENCES = {
    "r1": Reference(2, "r1_ddp_qlora.py"),
    "r2_fsdp1": Reference(2, "r2_fsdp_bf16.py", ("--fsdp-version", "1")),
    "r2_fsdp2": Reference(2, "r2_fsdp_bf16.py", ("--fsdp-version", "2")),
    "trl_packed_4bit": Reference(2, "trl_packed.py", ("--bits", "4"), pack=6_656),
    "trl_packed_bf16": Reference(2, "trl_packed.py", ("--bits", "16"), pack=6_656),
    "trl_packed_single": Reference(1, "trl_packed.py", ("--bits", "4", "--dropout", "0"), pack=13_312),
    "unsloth_13312": Reference(1, "unsloth_packed.py", (), ONE_PACK),
    "unsloth_6656": Reference(1, "unsloth_packed.py", ("--dropout", "0.05"), TWO_PACKS),
    "unsloth_checkpointed": Reference(1, "unsloth_packed.py", ("--checkpointing", "unsloth"), OFFLOADED),
    "unsloth_checkpointed_dropout": Reference(
        1, "unsloth_packed.py", ("--checkpointing", "unsloth", "--dropout", "0.05"), OFFLOADED
    ),
}
