"""Unsloth on one GPU, 4-bit, on the same packs as distft.

    python benchmarks/references/unsloth_packed.py --checkpointing off --dropout 0 \\
        --model … --rows … --order … --steps 10 --warmup 3

Needs its own environment, because Unsloth requires older versions of TRL and datasets than distft. Packs are
tokenized in advance; each is one micro-batch, and the packs of a step are accumulated.
"""

from __future__ import annotations

import unsloth  # isort: skip  # first, because it patches transformers and TRL
import torch
from datasets import Dataset
from measure import LINEARS, ON_GPU, Meter, parser, refuse, steps, texts
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

CONTEXT = 16_384


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--checkpointing", choices=("unsloth", "off"), default="off")
    arguments.add_argument("--dropout", type=float, default=0.0)
    options = arguments.parse_args()
    rows, order = texts(options), steps(options)
    packs = [pack for step in order for pack in step["packs"]]
    if len({len(step["packs"]) for step in order}) != 1:
        refuse("the steps have different numbers of packs, and gradient accumulation is one number")
    checkpointing = "unsloth" if options.checkpointing == "unsloth" else False

    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        options.model,
        max_seq_length=CONTEXT,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_gradient_checkpointing=checkpointing,
        fix_tokenizer=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=32,
        lora_alpha=64,
        lora_dropout=options.dropout,
        target_modules=LINEARS,
        use_gradient_checkpointing=checkpointing,
        max_seq_length=CONTEXT,
    )
    ids = AutoTokenizer.from_pretrained(options.model)(rows)["input_ids"]
    samples = [[[*ids[index], tokenizer.eos_token_id] for index in pack] for pack in packs]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [[token for sample in pack for token in sample] for pack in samples],
                "labels": [[token for sample in pack for token in [-100, *sample[1:]]] for pack in samples],
                "seq_lengths": [[len(sample) for sample in pack] for pack in samples],
            }
        ),
        args=SFTConfig(
            output_dir=str(options.order.parent / "unsloth"),
            packing=True,
            max_length=CONTEXT,
            dataset_kwargs={"skip_prepare_dataset": True},
            per_device_train_batch_size=1,
            gradient_accumulation_steps=len(order[0]["packs"]),
            max_steps=len(order),
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            optim="adamw_8bit",  # as in the notebooks that Unsloth publishes
            bf16=True,
            gradient_checkpointing=bool(checkpointing),
            train_sampling_strategy="sequential",
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    meter = Meter(trainer, options)
    trainer.train()
    attention = "Unsloth's for the CPU"
    if ON_GPU:
        from unsloth.utils.attention_dispatch import select_attention_backend

        attention = select_attention_backend(use_varlen=True)
    meter.report(
        precision="bf16",
        attention=attention,
        checkpointing=options.checkpointing,
        dropout=options.dropout,
        unsloth=unsloth.__version__,
    )


if __name__ == "__main__":
    main()
