"""What a sample is, from text to token ids and labels, and the order in which samples are seen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

IGNORED = -100
"""Label of a token that the loss does not look at."""
Lengths = np.ndarray[Any, np.dtype[np.int64]]
_CHUNK = 1_000  # texts that the tokenizer takes at once, on all cores


@dataclass(frozen=True)
class Example:
    """One formatted row. `trained_from`: first character that the loss looks at; `tail_from`: first character that
    truncation keeps (it cuts before it), or None where truncation cuts at the end."""

    text: str
    trained_from: int = 0
    tail_from: int | None = None


def format_dolly(instruction: str, context: str | None, response: str, *, completion_only: bool) -> Example:
    """Dolly's template; the context block is left out where the context is empty or blank."""
    prompt = f"### Instruction:\n{instruction}\n\n"
    if context and context.strip():
        prompt += f"### Context:\n{context}\n\n"
    prompt += "### Response:\n"
    return Example(prompt + response, len(prompt) if completion_only else 0)


def format_review(review: str, word: str, *, completion_only: bool) -> Example:
    """A review without its HTML line breaks, then its label as a word; truncation cuts the review, never the label."""
    head = f"### Review:\n{re.sub(r'(?:<br */?> *)+', chr(10), review).strip()}"
    prompt = f"{head}\n\n### Sentiment:\n"
    return Example(prompt + word, len(prompt) if completion_only else 0, len(head))


def tokenise(
    examples: Sequence[Example], tokenizer: Any, max_length: int | None
) -> Iterator[tuple[list[int], list[int], bool]]:
    """Of each example its input_ids, labels (of one length, at most `max_length`) and whether something was cut off.

    The text is tokenised in one piece, as the model will meet it; a token that crosses into the trained part is trained.
    The first label is always -100: nothing predicts the first token.
    """
    eos = tokenizer.eos_token_id
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        encoded = tokenizer([example.text for example in chunk], return_offsets_mapping=True, truncation=False)
        for example, ids, offsets in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield _label(example, list(ids), offsets, eos, max_length)


def _label(
    example: Example, ids: list[int], offsets: Sequence[tuple[int, int]], eos: int, max_length: int | None
) -> tuple[list[int], list[int], bool]:
    if ids and ids[-1] == eos and offsets[-1][0] == offsets[-1][1]:  # the tokenizer's own, which ours replaces
        ids, offsets = ids[:-1], offsets[:-1]
    labels = [token if end > example.trained_from else IGNORED for token, (_, end) in zip(ids, offsets, strict=True)]
    tail = 0 if example.tail_from is None else sum(end > example.tail_from for _, end in offsets)
    ids, labels, tail = [*ids, eos], [*labels, eos], tail + 1 if tail else 0
    cut = max_length is not None and len(ids) > max_length
    if max_length is not None and cut:
        tail = min(tail, max_length)
        ids = ids[: max_length - tail] + ids[len(ids) - tail :]
        labels = labels[: max_length - tail] + labels[len(labels) - tail :]
    return ids, [IGNORED, *labels[1:]], cut


def lengths_of(samples: Dataset) -> Lengths:
    """Number of tokens of each sample, without making Python objects of them."""
    column = samples.with_format("arrow")[:].column("input_ids")
    return np.asarray(column.combine_chunks().value_lengths(), dtype=np.int64)


def with_empty_rows(samples: Dataset, count: int, token: int) -> Dataset:
    """`samples` and `count` rows of one token that the loss does not look at: they fill a last batch and weigh nothing."""
    if count == 0:
        return samples
    filling = Dataset.from_dict(
        {"input_ids": [[token]] * count, "labels": [[IGNORED]] * count}, features=samples.features
    )
    return concatenate_datasets([samples, filling])


def evaluation_rows(samples: Dataset | None, limit: int | None, multiple: int, token: int) -> Dataset | None:
    """At most `limit` samples, filled with empty rows to a multiple of what all ranks take at once."""
    if samples is None:
        return None
    samples = samples.select(range(min(len(samples), limit or len(samples))))
    return with_empty_rows(samples, -len(samples) % multiple, token)


class GlobalBatchOrder(Sampler[int]):
    """The order of an epoch: a permutation by seed and epoch, filled up to whole global batches with the row `size`.

    Position i belongs to optimizer step i // global_batch_size whatever the world size and the micro-batch, because
    accelerate deals out whole micro-batches in turn. The last step of an epoch has what is left of the samples; the rest of
    it are empty rows (see `with_empty_rows`), so that all ranks take the same number of micro-batches.
    """

    def __init__(self, lengths: Sequence[int] | Lengths, global_batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.size, self.global_batch_size, self.seed, self.epoch = len(lengths), global_batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.steps * self.global_batch_size

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-self.size // self.global_batch_size)

    def __iter__(self) -> Iterator[int]:
        yield from self._permutation(self.epoch)
        yield from [self.size] * (len(self) - self.size)

    def _permutation(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def micro_batches(self, step: int, size: int) -> list[list[int]]:
        """Rows of optimizer step `step` (from 1) in micro-batches of `size`, as they are dealt out: the i-th goes to rank
        i % world size. Empty rows are left out."""
        epoch, rest = divmod(step - 1, self.steps)
        batch = self._permutation(epoch)[rest * self.global_batch_size : (rest + 1) * self.global_batch_size]
        return [batch[start : start + size] for start in range(0, self.global_batch_size, size)]

    def heaviest(self, size: int) -> list[int]:
        """Rows of the heaviest micro-batch of `size` that an epoch could hold: the longest samples, the longest first."""
        return [int(row) for row in np.argsort(-self.lengths, kind="stable")[:size]]

    def samples_after(self, step: int) -> int:
        """Real samples seen in the first `step` optimizer steps."""
        epochs, rest = divmod(step, self.steps)
        return epochs * self.size + rest * self.global_batch_size

    def tokens_after(self, step: int) -> int:
        """Tokens of those samples, trained or not."""
        epochs, rest = divmod(step, self.steps)
        begun = self._permutation(epochs)[: rest * self.global_batch_size]
        return int(epochs * self.lengths.sum() + self.lengths[begun].sum())
