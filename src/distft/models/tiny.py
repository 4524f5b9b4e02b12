"""The embedded default model `tiny`: a Llama of 2 million parameters, with its own tokenizer.

It is built from text that ships with distft and pre-trained briefly on first use (a minute or less on two CPU cores),
then kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from distft.console import say
from distft.files import build_folder_once
from distft.paths import cache_folder, packaged

VOCABULARY = 2_048
CONTEXT = 128
STEPS = 250
BATCH = 16
_VERSION = 2
"""Raise it when a model is built or saved in another way: a folder that exists is not built again."""


def tiny_model() -> Path:
    """The folder of the tiny model, for `from_pretrained`.

    The first process to ask builds it; the others wait for a file lock rather than in a collective.
    """
    corpus = packaged("assets/tiny_corpus.txt").read_text(encoding="utf-8")
    recipe = f"{_VERSION} {VOCABULARY} {CONTEXT} {STEPS} {BATCH} {_config_text()}"
    folder = cache_folder() / f"tiny-{hashlib.sha256((corpus + recipe).encode()).hexdigest()[:12]}"
    build_folder_once(folder, lambda temporary: _build(corpus, temporary))
    return folder


_SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}


def tiny_config() -> Any:
    """The configuration of the tiny model, which does not have to be built for it."""
    from transformers import LlamaConfig

    return LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **_SHAPE)


def _config_text() -> str:
    return repr(sorted(_SHAPE.items()))


def _build(corpus: str, folder: Path) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    say("building the tiny model (once; takes a minute or less on two cores)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_documents(corpus), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    tokens = [token for text in _documents(corpus) for token in (1, *tokenizer.encode(text).ids, 2)]
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the other processes are waiting
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config())
        loss = _pretrain(model, torch.tensor(tokens))
    torch.set_num_threads(threads)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"tiny model: {size:,} parameters, {len(tokens):,} tokens of text, loss {loss:.2f}")
    # Not model.save_pretrained: on any rank but 0 it writes nothing, and any rank may be the one that builds.
    model.config.architectures, model.config.dtype = [type(model).__name__], "float32"
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    wrapped.save_pretrained(folder)


def _documents(corpus: str) -> list[str]:
    """The paragraphs, and every third one again as the response to an instruction.

    Without the latter, the frozen output layer would never have seen the tokens of the instruction template, and an
    adapter could not learn to produce them.
    """
    paragraphs = corpus.split("\n\n")
    return paragraphs + [f"### Instruction:\nTell me something.\n\n### Response:\n{text}" for text in paragraphs[::3]]


def _pretrain(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Train on random windows of the text, on the CPU; returns the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS, pct_start=0.1)
    losses: list[float] = []
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(tokens) - CONTEXT, (BATCH,))
        batch = torch.stack([tokens[start : start + CONTEXT] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20
