"""R1: DDP QLoRA with the public report's settings, as a plain user of TRL writes them.

    torchrun --nproc-per-node 2 benchmarks/references/r1_ddp_qlora.py --model … --rows … --order … --steps 10 --warmup 3

NF4, fp16, micro-batch 4 × accumulation 8 on two GPUs, padding, k-bit preparation with reentrant checkpointing, paged
AdamW. On CPU in fp32, because matrix products in fp16 are not available there.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from measure import LINEARS, LOCAL_RANK, ON_GPU, WORLD_SIZE, Meter, ordered_texts, parser
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    options = parser(__doc__).parse_args()
    dtype = torch.float16 if ON_GPU else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=dtype,
        device_map={"": LOCAL_RANK} if ON_GPU else None,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ),
    )
    model = prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=Dataset.from_dict({"text": ordered_texts(options)}),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, lora_dropout=0.05, target_modules=LINEARS),
        args=SFTConfig(
            output_dir=str(options.order.parent / "r1"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=64 // (4 * WORLD_SIZE),
            max_steps=options.warmup + options.steps,
            max_length=1024,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            optim="paged_adamw_32bit",
            fp16=ON_GPU,
            bf16=False,
            use_cpu=not ON_GPU,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": True},
            ddp_find_unused_parameters=False,  # reentrant checkpointing fails with it
            train_sampling_strategy="sequential",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    for parameter in trainer.model.parameters():
        if (
            parameter.requires_grad
        ):  # TRL casts a QLoRA adapter to bf16, whose gradients fp16's loss scaler cannot handle
            parameter.data = parameter.data.float()
    meter = Meter(trainer, options)
    trainer.train()
    meter.report(
        precision="fp16" if ON_GPU else "fp32, since the CPU has no fp16", attention=model.config._attn_implementation
    )


if __name__ == "__main__":
    main()
