"""R2: FSDP bf16 LoRA with the public report's settings, as a plain user of TRL writes them.

    torchrun --nproc-per-node 2 benchmarks/references/r2_fsdp_bf16.py --fsdp-version 1 \\
        --model … --rows … --order … --steps 10 --warmup 3

Full sharding, micro-batch 4 × accumulation 8 on two GPUs, padding, checkpointing. The report used FSDP1; if the
installed transformers rejects it, the reference reports that.
"""

from __future__ import annotations

import torch
import transformers
from datasets import Dataset
from measure import LINEARS, ON_GPU, WORLD_SIZE, Meter, ordered_texts, parser, refuse
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--fsdp-version", type=int, choices=(1, 2), default=2)
    options = arguments.parse_args()
    if not ON_GPU:
        refuse("needs GPUs: on the CPU accelerate shards nothing")
    sharding = {"version": options.fsdp_version, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    try:
        config = SFTConfig(
            output_dir=str(options.order.parent / "r2"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=64 // (4 * WORLD_SIZE),
            max_steps=options.warmup + options.steps,
            max_length=1024,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            optim="adamw_torch",
            bf16=True,
            fsdp=True,
            fsdp_config=sharding,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
    except ValueError as error:
        refuse(f"transformers {transformers.__version__} refuses FSDP{options.fsdp_version}: {error}")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=Dataset.from_dict({"text": ordered_texts(options)}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, lora_dropout=0.05, target_modules=LINEARS),
        args=config,
    )
    meter = Meter(trainer, options)
    trainer.train()
    version = getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", None)
    if version != options.fsdp_version:
        refuse(f"FSDP{options.fsdp_version} was asked for, and accelerate ran {version}")
    meter.report(precision="bf16", fsdp_version=version, attention=trainer.model.config._attn_implementation)


if __name__ == "__main__":
    main()
