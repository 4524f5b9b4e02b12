"""What the benchmarks train: a model with random weights, a tokenizer whose words are one token each, and rows of known length."""

from __future__ import annotations

import functools
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
_SPECIAL = ["<unk>", "<s>", "</s>"]


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the number that divides all lengths and token budgets for it; `row` where all samples are as long."""

    name: str
    config: dict[str, Any]
    divisor: int = 1
    kind: str = "llama"
    row: int | None = None

    def with_layers(self, layers: int | None) -> Shape:
        return self if layers is None else replace(self, config={**self.config, "num_hidden_layers": layers})

    def tokens(self, number: int) -> int:
        return number // self.divisor

    @functools.cached_property
    def parameters(self) -> int:
        """All but input embeddings that are not the output's as well: N of the model FLOPs."""
        with torch.device("meta"):
            model = self.model()
        embeddings = 0 if self.config["tie_word_embeddings"] else model.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in model.parameters()) - embeddings

    def model(self) -> Any:
        """With random bf16 weights, on the device of the context."""
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **self.config), dtype=torch.bfloat16)


SHAPES = {
    # Longer positions than Llama-2's change nothing here, and keep a peer from stretching RoPE for a pack that is longer.
    "llama-2-7b": Shape("llama-2-7b", LLAMA_2_7B | {"max_position_embeddings": 16_384}),
    "qwen2-1.5b": Shape("qwen2-1.5b", {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151_936, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
    }, kind="qwen2", row=16_384),
    "tiny": Shape("tiny", LLAMA_2_7B | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                        "num_attention_heads": 4, "vocab_size": 512}, divisor=16),
}  # fmt: skip


def model(work: Path, shape: Shape) -> Path:
    """Folder of the shape with random bf16 weights (seed 0) and its tokenizer, saved once under `work`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = work / f"{shape.name}-{shape.config['num_hidden_layers']}-layers"
    if folder.exists():
        return folder
    aside = folder.with_suffix(".building")
    words = {word: number for number, word in enumerate([*_SPECIAL, *map(_word, range(3, shape.config["vocab_size"]))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    for place in (
        aside,
        aside / "tokenizer",
    ):  # beside the config of some models, transformers takes their own class for it
        made.save_pretrained(place)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        weights = shape.model()
    weights.save_pretrained(aside)
    del weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the runs need it
    aside.rename(folder)
    return folder


def trained_tokenizer(folder: Path, rows: Path, size: int) -> Path:
    """`folder`, with a byte-level BPE tokenizer of `size` tokens at most, trained on the lines of `rows` (the hub's is not needed)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=_SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(rows.read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def sample_lengths(shape: Shape, count: int, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of `count` samples: those of Dolly-15k under Llama-2's tokenizer, log-normal with median 115 and mean 205, from 16
    to 1,024."""
    normal = statistics.NormalDist()
    # The quantiles themselves, shuffled: few rows have the same median and mean as many. 1.17 gives this mean after clipping.
    quantiles = np.array([normal.inv_cdf((number + 0.5) / count) for number in range(count)])
    drawn = np.exp(np.log(115) + 1.17 * generator.permutation(quantiles))
    return (np.clip(drawn.round(), 16, 1024) / shape.divisor).astype(np.int64).clip(min=2)


def rows(work: Path, shape: Shape, count: int, seed: int = 0) -> tuple[Path, np.ndarray[Any, np.dtype[np.int64]]]:
    """A .jsonl file of `count` texts of `sample_lengths`, and the tokens of each with its end-of-sequence token."""
    generator = np.random.default_rng(seed)
    lengths = sample_lengths(shape, count, generator) if shape.row is None else np.full(count, shape.row)
    path = work / f"rows-{shape.name}-{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            words = generator.integers(3, shape.config["vocab_size"], length - 1)
            file.write(json.dumps({"text": " ".join(map(_word, words))}) + "\n")
    return path, lengths


def _word(number: int) -> str:
    return f"w{number}"
