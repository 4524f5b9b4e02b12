"""How many samples of each source an epoch over a mixture holds, and which."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from distft.config.schema import Data
from distft.data.sources import label_of
from distft.data.splits import Members
from distft.errors import DataError


def mixed(available: Mapping[str, Members], data: Data) -> dict[str, Members]:
    """The members of each source in one epoch, by its label; those that the epoch has several times repeat in turn.

    Raises:
        DataError: `samples` asks for more than there are, or a source gets no sample.
    """
    sizes = {label: len(members) for label, members in available.items()}
    numbers = counts(sizes, data)
    for label, number in numbers.items():
        if not number or not sizes[label]:
            raise DataError(f"the mixture has no sample of {label}: of {sizes[label]}, an epoch has less than 1")
    return {label: np.resize(available[label], number) for label, number in numbers.items()}


def counts(sizes: Mapping[str, int], data: Data) -> dict[str, int]:
    """Samples of each source in one epoch, where it has `sizes` of them.

    With weights, the numbers are exactly in their proportion, rounded down. The source that decides the length of the
    epoch (`first_exhausted`: the first to run out; `all_exhausted`: the last) is in it once, whole.
    """
    assert data.sources is not None
    repeats = data.stopping_strategy == "all_exhausted"
    weights = {label_of(source): source.weight for source in data.sources if source.weight is not None}
    if weights:
        lengths = {label: sizes[label] / weight for label, weight in weights.items()}
        length = (max if repeats else min)(lengths.values())
        return {label: int(length * weight + 1e-6) for label, weight in weights.items()}
    asked = {label_of(source): source.samples for source in data.sources}
    for label, number in asked.items():
        if number is not None and number > sizes[label] and not repeats:
            raise DataError(
                f"data.sources asks for {number:,} samples of {label}, and its training split has {sizes[label]:,}\n"
                "  lower `samples`, or set data.stopping_strategy=all_exhausted to repeat samples"
            )
    return {label: sizes[label] if number is None else number for label, number in asked.items()}
