"""Synthetic inputs: a model with random weights, a tokenizer with one token per word, and rows of known length."""

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
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_SPECIAL = ["<unk>", "<s>", "</s>"]


@dataclass(frozen=True)
class Shape:
    """The shape of a model. `divisor` scales down all lengths and token budgets; `row` is the length of every sample
    if all are equal."""

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
        """Parameters without untied input embeddings: N in the model FLOPs."""
        with torch.device("meta"):
            model = self.model()
        embeddings = 0 if self.config["tie_word_embeddings"] else model.get_input_embeddings().weight.numel()
        return sum(p.numel() for p in model.parameters()) - embeddings

    def model(self) -> Any:
        """The model with random bf16 weights, on the current default device."""
        from transformers import AutoConfig, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(AutoConfig.for_model(self.kind, **self.config), dtype=torch.bfloat16)


SHAPES = {
    # More positions than Llama-2 has change nothing here, and keep references from rescaling RoPE for longer packs.
    "llama-2-7b": Shape("llama-2-7b", LLAMA_2_7B | {"max_position_embeddings": 16_384}),
    "qwen2-1.5b": Shape(
        "qwen2-1.5b",
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151_936,
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
        },
        kind="qwen2",
        row=16_384,
    ),
    "tiny": Shape(
        "tiny",
        LLAMA_2_7B
        | {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
        },
        divisor=16,
    ),
}


def model(work: Path, shape: Shape) -> Path:
    """A folder under `work` with the model, with random bf16 weights (seed 0), and its tokenizer; created once."""
    folder = work / f"{shape.name}-{shape.config['num_hidden_layers']}-layers"
    if folder.exists():
        return folder
    aside = folder.with_suffix(".building")
    # In a folder of its own too: next to the config of some models, transformers loads that model's tokenizer class.
    for place in (aside, aside / "tokenizer"):
        word_tokenizer(place, shape.config["vocab_size"])
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        weights = shape.model()
    weights.save_pretrained(aside)
    del weights
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # leave the memory to the runs
    aside.rename(folder)
    return folder


def word_tokenizer(folder: Path, size: int) -> Path:
    """Save a tokenizer with `size` entries, one for each word of `rows`; returns `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*_SPECIAL, *map(_word, range(3, size))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)
    return folder


def trained_tokenizer(folder: Path, rows: Path, size: int) -> Path:
    """Train a byte-level BPE tokenizer of at most `size` tokens on the lines of `rows`; returns `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=_SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(rows.read_text(encoding="utf-8").splitlines(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def sample_lengths(shape: Shape, count: int, generator: np.random.Generator) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Token counts [count] distributed like Dolly-15k under Llama-2's tokenizer: log-normal with median 115 and mean
    205, clipped to 16 … 1,024."""
    normal = statistics.NormalDist()
    # Shuffled quantiles rather than random draws: few rows then have the same median and mean as many. A sigma of 1.17
    # gives this mean after clipping.
    quantiles = np.array([normal.inv_cdf((number + 0.5) / count) for number in range(count)])
    drawn = np.exp(np.log(115) + 1.17 * generator.permutation(quantiles))
    return (np.clip(drawn.round(), 16, 1024) / shape.divisor).astype(np.int64).clip(min=2)


def rows(work: Path, shape: Shape, count: int, seed: int = 0) -> tuple[Path, np.ndarray[Any, np.dtype[np.int64]]]:
    """Write `count` texts of `sample_lengths` to a .jsonl file; returns it and the token counts (with EOS)."""
    generator = np.random.default_rng(seed)
    lengths = sample_lengths(shape, count, generator) if shape.row is None else np.full(count, shape.row)
    path = work / f"rows-{shape.name}-{count}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for length in lengths:
            file.write(json.dumps({"text": words(generator, shape, length - 1)}) + "\n")
    return path, lengths


def words(generator: np.random.Generator, shape: Shape, count: int) -> str:
    """A text of `count` random words, each of which is a token."""
    return " ".join(map(_word, generator.integers(3, shape.config["vocab_size"], count)))


def _word(number: int) -> str:
    return f"w{number}"


def small_tokenizer() -> Any:
    """A tokenizer that only knows the special tokens, for samples that are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(_SPECIAL)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )
