"""One run of benchmarks/preferences.py, which computes in turns: distft over pairs, or TRL's DPOTrainer at its best.

python benchmarks/preference_sides.py distft WORD… TURNS
python benchmarks/preference_sides.py trl JSON TURNS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import in_memory
import torch
from turns import Epochs, Turns

ON_GPU = torch.cuda.is_available()


def distft(turns: Turns, words: Sequence[str]) -> None:
    """A run of distft, as the command starts it; its weights come from memory."""
    from distft.training import run
    from distft.training.reference_log_probs import ReferencePass

    fit, begin = run.fit, ReferencePass.on_train_begin

    def in_turns(opened: Any, training: Any) -> None:
        training.trainer.add_callback(Epochs(turns))
        fit(opened, training)

    def reference_in_turn(self: Any, *args: Any, **kwargs: Any) -> None:
        with turns.turn("reference"):
            begin(self, *args, **kwargs)

    in_memory.for_runs()
    run.fit, ReferencePass.on_train_begin = in_turns, reference_in_turn  # type: ignore[method-assign]
    run.train(words)


def trl(turns: Turns, given: dict[str, Any]) -> None:
    """TRL's trainer with what its documentation recommends for speed, and no activation checkpointing.

    Its `padding_free` is switched off in the installed version, and its attention is SDPA, with a mask: FlashAttention
    would need another package. Its reference log-probabilities are computed before training. The rows are sorted by
    their lengths, so that little is padded then; with `by_length`, little is in training, too.
    """
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import dpo_trainer

    class InTurns(DPOTrainer):  # type: ignore[misc]
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            with turns.turn("warm-up"):
                super()._precompute_ref_logps(dataset.select(range(0, len(dataset), 2)), name, batch_size)
            with turns.turn("reference"):
                return super()._precompute_ref_logps(dataset, name, batch_size)

    dpo_trainer.hash_module = lambda module: "random"  # of all weights, on the host: it takes minutes, once
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    model = in_memory.load(
        AutoConfig.from_pretrained(given["model"]),
        dtype=dtype,
        attn_implementation="sdpa",
        device_map={"": 0} if ON_GPU else None,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
        if given["bits"] == 4
        else None,
    )
    lines = Path(given["rows"]).read_text(encoding="utf-8").splitlines()
    trainer = InTurns(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(given["tokenizer"]),
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
        ),
        args=DPOConfig(
            output_dir=given["output"],
            precompute_ref_log_probs=True,
            precompute_ref_batch_size=given["pairs"],
            max_length=given["max_length"],
            per_device_train_batch_size=given["pairs"],
            gradient_accumulation_steps=given["global_batch"] // given["pairs"],
            num_train_epochs=given["epochs"],
            learning_rate=5e-5,
            lr_scheduler_type="cosine",
            optim="adamw_torch_fused",
            bf16=ON_GPU,
            use_cpu=not ON_GPU,
            gradient_checkpointing=False,
            use_liger_kernel=ON_GPU and find_spec("liger_kernel") is not None,
            train_sampling_strategy="group_by_length" if given["by_length"] else "random",
            remove_unused_columns=False,  # the sampler reads `length`
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[Epochs(turns)],
    )
    trainer.train()


def main() -> None:
    kind, *words, folder = sys.argv[1:]
    turns = Turns(Path(folder))
    if kind == "distft":
        distft(turns, words)
    else:
        trl(turns, json.loads(words[0]))


if __name__ == "__main__":
    main()
