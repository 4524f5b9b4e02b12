"""A pack of pairs in which the prompt of each is computed once, for both answers.

The row has the prompt, the chosen answer and the rejected one. As queries, these are two sequences: the prompt with the
chosen answer, and the rejected answer alone. As keys, the second one begins with the prompt again: an attention kernel
that takes other keys than queries needs no mask for that, only each sequence's keys in a row (`shared_keys`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from distft.data.pairs import sequences_of
from distft.data.pieces import Array
from distft.data.tokenize import IGNORED


def shared_tokens(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> int:
    """How many tokens both sequences begin with that neither trains; each has at least one more."""
    most = min(len(chosen["input_ids"]), len(rejected["input_ids"])) - 1
    ids, labels = (
        [np.asarray(each[name][: max(most, 0)]) for each in (chosen, rejected)] for name in ("input_ids", "labels")
    )
    differ = (ids[0] != ids[1]) | (labels[0] != IGNORED) | (labels[1] != IGNORED)
    return int(differ.argmax()) if differ.any() else len(differ)


def shared_row(rows: Sequence[Mapping[str, Any]], pad_token: int, multiple: int) -> dict[str, Any]:
    """The prepared pairs `rows` as one row whose width is a multiple of `multiple`, with everything that a batch for
    the head has (`data.loader.Collator`).

    Besides, `cu_seq_lens_k` [sequences + 1] and `max_length_k` are the boundaries of the keys, and `shared_keys` [keys]
    says which token of the row each key belongs to.
    """
    ids, positions, keys, scored, targets = list[Array](), list[Array](), list[Array](), list[Array](), list[Array]()
    queries_of, keys_of, counts, start = list[int](), list[int](), list[int](), 0
    sequences = sequences_of(rows)
    for chosen, rejected in zip(sequences[::2], sequences[1::2], strict=True):
        shared, first = shared_tokens(chosen, rejected), len(chosen["input_ids"])
        prompt, own = start + np.arange(shared), start + np.arange(first)
        others = start + first + np.arange(len(rejected["input_ids"]) - shared)
        places = own, np.concatenate([prompt, others])
        for sequence, place in zip((chosen, rejected), places, strict=True):
            following = np.asarray(sequence["labels"][1:], dtype=np.int64)
            trained = np.flatnonzero(following != IGNORED)
            scored.append(place[trained])
            targets.append(following[trained])
            keys.append(place)
            counts.append(len(trained))
        ids += [np.asarray(chosen["input_ids"]), np.asarray(rejected["input_ids"][shared:])]
        positions += [np.arange(first), shared + np.arange(len(others))]
        queries_of += [first, len(others)]
        keys_of += [first, shared + len(others)]
        start += first + len(others)
    missing = -start % multiple if start else multiple
    if missing:
        ids.append(np.full(missing, pad_token))
        positions.append(np.arange(missing))
        keys.append(start + np.arange(missing))
        queries_of.append(missing)
        keys_of.append(missing)
    found, known = _joined(scored), _joined(targets)
    spare = -len(found) % multiple or (0 if len(found) else multiple)
    return {
        "input_ids": _joined(ids)[None],
        "position_ids": _joined(positions)[None],
        "cu_seq_lens_q": _boundaries(queries_of),
        "cu_seq_lens_k": _boundaries(keys_of),
        "max_length_q": max(queries_of),
        "max_length_k": max(keys_of),
        "shared_keys": _joined(keys),
        "scored": torch.cat([found, found.new_zeros(spare)]),
        "targets": torch.cat([known, known.new_full((spare,), IGNORED)])[None],
        "counts": torch.tensor([*counts, spare]),
    }


def _joined(parts: Sequence[Array]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))


def _boundaries(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32)
