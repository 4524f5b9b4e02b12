"""TRL's own packing with the settings its documentation recommends for speed: what a TRL user would run instead of
distft.

    torchrun --nproc-per-node 2 benchmarks/references/trl_packed.py --bits 4 --tokens 6656 \\
        --model … --rows … --order … --steps 10 --warmup 3

Best-fit-decreasing packs without padding, no checkpointing, liger if it is installed, and FlashAttention from its own
package or from the kernels package. Without either, `--attention` decides: `varlen` is PyTorch's own kernel, which
TRL's documentation does not mention and which makes this a stronger competitor than `sdpa`. TRL packs all rows before
training and counts packs, so a step has `--global-tokens` tokens and no exact number of samples: compare tokens/s.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
from datasets import Dataset
from measure import LINEARS, LOCAL_RANK, ON_GPU, WORLD_SIZE, Meter, parser, texts
from peft import LoraConfig
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from trl import SFTConfig, SFTTrainer


def attention_kernel(fallback: str) -> str:
    """TRL needs FlashAttention for packs, from its package or from the Hub; neither runs on the CPU."""
    if not ON_GPU:
        return "sdpa"
    if importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    if importlib.util.find_spec("kernels"):
        return "kernels-community/flash-attn2"
    if fallback == "varlen":
        AttentionInterface.register("varlen", varlen)
        AttentionMaskInterface.register("varlen", flash_attention_mask)
    return fallback


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's variable-length attention on a packed row [1, heads, tokens, head size], causal in each sample."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling, **causal)
    return out[None], None


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bits", type=int, choices=(4, 16), default=4)
    arguments.add_argument("--tokens", type=int, default=6_656, help="tokens per pack")
    arguments.add_argument("--global-tokens", type=int, default=13_312, help="tokens per optimizer step")
    arguments.add_argument("--dropout", type=float, default=0.05)
    arguments.add_argument("--checkpointing", choices=("on", "off"), default="off")
    arguments.add_argument(
        "--attention",
        choices=("varlen", "sdpa", "flex_attention"),
        default="varlen",
        help="attention to use without FlashAttention",
    )
    options = arguments.parse_args()
    attention = attention_kernel(options.attention)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=dtype,
        device_map={"": LOCAL_RANK} if ON_GPU else None,
        attn_implementation=attention,
        quantization_config=quantization if options.bits == 4 else None,
    )
    liger = ON_GPU and importlib.util.find_spec("liger_kernel") is not None
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(options.model),
        train_dataset=Dataset.from_dict({"text": texts(options)}),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=32, lora_alpha=64, lora_dropout=options.dropout, target_modules=LINEARS
        ),
        args=SFTConfig(
            output_dir=str(options.order.parent / "trl"),
            packing=True,
            packing_strategy="bfd",
            padding_free=True,
            max_length=options.tokens,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=max(1, options.global_tokens // (options.tokens * WORLD_SIZE)),
            max_steps=options.warmup + options.steps,
            learning_rate=1e-4,
            lr_scheduler_type="cosine",
            optim="paged_adamw_32bit" if options.bits == 4 else "adamw_torch_fused",
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            gradient_checkpointing=options.checkpointing == "on",
            use_liger_kernel=liger,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    meter = Meter(trainer, options)
    trainer.train()
    meter.report(
        precision="bf16" if ON_GPU else "fp32, since this is the CPU",
        attention=attention,
        liger=liger,
        pack_tokens=options.tokens,
        checkpointing=options.checkpointing,
        dropout=options.dropout,
    )


if __name__ == "__main__":
    main()
