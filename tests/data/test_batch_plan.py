"""Properties of the batch plan: which samples make up a step, and how a step is divided into micro-batches."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.config.schema import Batching
from distft.data.batch_plan import Plan, RankBatches, batches_by_length
from distft.errors import DataError

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=80)
WORLDS = st.integers(1, 5)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def global_batches(draw: st.DrawFn) -> dict[str, int | None]:
    """A global batch in samples or in tokens."""
    if draw(st.booleans()):
        return {"global_batch_size": draw(st.integers(1, 30))}
    return {"global_batch_tokens": draw(st.integers(1, 900))}


@dataclass(frozen=True)
class Case:
    """A plan of `epochs` epochs for `world_size` ranks."""

    lengths: list[int]
    batching: Batching
    seed: int
    world_size: int
    epochs: int

    @property
    def plan(self) -> Plan:
        return Plan(self.lengths, self.batching, self.seed)

    def divided(self) -> list[list[list[list[int]]]]:
        """[step][round][world_size] lists of samples."""
        plan = self.plan
        return [plan.micro_batches(step, self.world_size) for step in range(plan.steps * self.epochs)]

    def tokens(self, samples: list[int]) -> int:
        return sum(self.lengths[sample] for sample in samples)


@st.composite
def cases(draw: st.DrawFn, *, packed: bool | None = None) -> Case:
    lengths, batch = draw(LENGTHS), draw(global_batches())
    if draw(st.booleans()) if packed is None else packed:
        batching = Batching(**batch, micro_batch_tokens=draw(st.integers(max(lengths), 4 * max(lengths))))
    else:
        batching = Batching(**batch, micro_batch=draw(st.integers(1, 9)))
    return Case(lengths, batching, draw(SEEDS), draw(WORLDS), draw(st.integers(1, 3)))


def flat(step: list[list[list[int]]]) -> list[int]:
    return [sample for ranks in step for pack in ranks for sample in pack]


@settings(deadline=None)
@given(cases())
def test_an_epoch_has_each_sample_exactly_once(case: Case) -> None:
    steps, every = case.plan.steps, list(range(len(case.lengths)))
    divided = case.divided()
    for epoch in range(case.epochs):
        assert sorted(itertools.chain(*map(flat, divided[epoch * steps : (epoch + 1) * steps]))) == every


@settings(deadline=None)
@given(case=cases(), micro=st.integers(1, 9), budget=st.integers(60, 300), world_size=WORLDS)
def test_a_step_has_the_same_samples_however_it_is_divided(
    case: Case, micro: int, budget: int, world_size: int
) -> None:
    for size in ({"micro_batch": micro, "micro_batch_tokens": None}, {"micro_batch_tokens": budget}):
        other = Case(case.lengths, case.batching.model_copy(update=size), case.seed, world_size, case.epochs)
        assert [sorted(flat(step)) for step in other.divided()] == [sorted(flat(step)) for step in case.divided()]


@settings(deadline=None)
@given(cases())
def test_the_micro_batches_of_a_step_hold_its_samples(case: Case) -> None:
    assert [sorted(flat(step)) for step in case.divided()] == [
        sorted(case.plan.samples(step).tolist()) for step in range(case.plan.steps * case.epochs)
    ]


@settings(deadline=None)
@given(cases())
def test_no_micro_batch_exceeds_its_size(case: Case) -> None:
    budget = case.batching.micro_batch_tokens
    for pack in itertools.chain(*itertools.chain(*case.divided())):
        assert case.tokens(pack) <= budget if budget is not None else len(pack) <= case.batching.micro_batch


@settings(deadline=None)
@given(cases())
def test_every_rank_has_the_same_number_of_micro_batches_and_spare_ones_are_empty(case: Case) -> None:
    plan, budget = case.plan, case.batching.micro_batch_tokens
    steps = case.divided()
    assert plan.accumulation(case.world_size, case.epochs) == max(map(len, steps))
    for number, step in enumerate(steps):
        assert [len(ranks) for ranks in step] == [case.world_size] * len(step)
        packs = list(itertools.chain(*step))
        used = sum(map(bool, packs))
        assert packs[used:] == [[]] * (len(packs) - used), "an empty micro-batch comes before a full one"
        assert any(step[-1]), "a round is empty"
        if budget is not None:
            assert used == min(len(packs), len(plan.samples(number))), (
                "a pack is empty although another could be smaller"
            )
            fewer = [
                longest_first([case.lengths[s] for s in flat(step)], n * case.world_size) for n in range(1, len(step))
            ]
            assert all(longest > budget for longest in fewer), "fewer rounds would do"


@settings(deadline=None)
@given(cases())
def test_the_micro_batches_of_a_round_have_similar_sizes(case: Case) -> None:
    for step in case.divided():
        sizes = [case.tokens(pack) for pack in itertools.chain(*step)]
        if case.batching.micro_batch_tokens is None:  # padded: the longest sample sets the size
            sizes = [max((case.lengths[sample] for sample in pack), default=0) for pack in itertools.chain(*step)]
        assert sizes == sorted(sizes, reverse=True)


@settings(deadline=None)
@given(cases(packed=True))
def test_the_tokens_of_ranks_differ_by_no_more_than_the_longest_sample(case: Case) -> None:
    for step in case.divided():
        of_ranks = [sum(map(case.tokens, packs)) for packs in zip(*step, strict=True)]
        assert max(of_ranks) - min(of_ranks) <= max(case.lengths[sample] for sample in flat(step))


def longest_first(lengths: list[int], packs: int) -> int:
    """Tokens in the longest of `packs` packs if each sample, longest first, goes into the shortest pack."""
    loads = [0] * packs
    for length in sorted(lengths, reverse=True):
        loads[loads.index(min(loads))] += length
    return max(loads)


@settings(deadline=None)
@given(cases(packed=True))
def test_accumulation_is_the_smallest_that_fits_every_step(case: Case) -> None:
    plan, budget = case.plan, case.batching.micro_batch_tokens or 0
    of_steps = [[case.lengths[sample] for sample in plan.samples(step)] for step in range(plan.steps * case.epochs)]
    needed = [
        next(n for n in itertools.count(1) if longest_first(lengths, n * case.world_size) <= budget)
        for lengths in of_steps
    ]
    assert plan.accumulation(case.world_size, case.epochs) == max(needed)


@settings(deadline=None)
@given(cases(packed=False))
def test_accumulation_of_padded_micro_batches_is_the_smallest_for_the_largest_step(case: Case) -> None:
    plan = case.plan
    largest = max(len(plan.samples(step)) for step in range(plan.steps * case.epochs))
    accumulation = plan.accumulation(case.world_size, case.epochs)
    assert accumulation == math.ceil(largest / (case.batching.micro_batch * case.world_size))


def test_accumulation_grows_if_samples_do_not_fit_together() -> None:
    """Three samples of 6 tokens have the size of two packs of 9, yet need three packs."""
    assert Plan([6, 6, 6], Batching(global_batch_size=3, micro_batch_tokens=9)).accumulation(1, 1) == 3


def test_accumulation_considers_every_epoch() -> None:
    plan = Plan([2, 2, 1, 5, 6, 3], Batching(global_batch_size=3, micro_batch_tokens=6))
    assert [plan.accumulation(1, epochs) for epochs in (1, 2, 3)] == [2, 3, 3]


def test_accumulation_follows_from_global_batch_micro_batch_and_processes() -> None:
    plan = Plan([7] * 640, Batching(global_batch_size=64, micro_batch=4))
    assert [plan.accumulation(processes, 3) for processes in (1, 2, 4, 8, 16)] == [16, 8, 4, 2, 1]


@settings(deadline=None)
@given(count=st.integers(1, 80), size=st.integers(1, 30), seed=SEEDS, epoch=st.integers(0, 50))
def test_steps_have_the_global_batch_size_and_the_last_of_an_epoch_the_rest(
    count: int, size: int, seed: int, epoch: int
) -> None:
    plan = Plan([7] * count, Batching(global_batch_size=size), seed)
    sizes = [len(plan.samples(epoch * plan.steps + step)) for step in range(plan.steps)]
    assert sizes == [size] * (count // size) + ([count % size] if count % size else [])


@settings(deadline=None)
@given(lengths=LENGTHS, tokens=st.integers(1, 900), seed=SEEDS, epoch=st.integers(0, 20))
def test_a_step_in_tokens_has_about_its_share_and_none_is_empty(
    lengths: list[int], tokens: int, seed: int, epoch: int
) -> None:
    plan = Plan(lengths, Batching(global_batch_tokens=tokens), seed)
    share = sum(lengths) / plan.steps
    assert share >= min(tokens, sum(lengths)), "a step is smaller than asked for"
    for step in range(epoch * plan.steps, (epoch + 1) * plan.steps):
        samples = plan.samples(step)
        assert len(samples) > 0
        assert abs(sum(lengths[sample] for sample in samples) - share) <= max(lengths)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=20, max_size=80), batch=global_batches(), seed=SEEDS)
def test_the_order_changes_with_the_epoch_and_the_seed(
    lengths: list[int], batch: dict[str, int | None], seed: int
) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = Plan(lengths, Batching(**batch), seed)
        return [int(i) for step in range(plan.steps) for i in plan.samples(epoch * plan.steps + step)]

    assert order(seed, 0) == order(seed, 0)
    assert order(seed, 0) != order(seed, 1)
    assert order(seed, 0) != order(seed + 1, 0)


@settings(deadline=None)
@given(lengths=LENGTHS, one=global_batches(), other=global_batches(), seed=SEEDS)
def test_the_order_of_an_epoch_does_not_depend_on_the_global_batch(
    lengths: list[int], one: dict[str, int | None], other: dict[str, int | None], seed: int
) -> None:
    orders = []
    for batch in (one, other):
        plan = Plan(lengths, Batching(**batch), seed)
        orders.append(np.concatenate([plan.samples(plan.steps + step) for step in range(plan.steps)]).tolist())
    assert orders[0] == orders[1]


@settings(deadline=None)
@given(case=cases(), steps=st.integers(0, 60))
def test_samples_after_and_tokens_after_count_the_steps_before(case: Case, steps: int) -> None:
    plan = case.plan
    seen = [sample for step in range(steps) for sample in plan.samples(step).tolist()]
    assert plan.samples_after(steps) == len(seen)
    assert plan.tokens_after(steps) == case.tokens(seen)


@pytest.mark.parametrize("batch", [{"global_batch_size": 2}, {"global_batch_tokens": 100}], ids=["samples", "tokens"])
def test_a_sample_longer_than_the_budget_is_an_error_with_both_numbers(batch: dict[str, int]) -> None:
    plan = Plan([5, 1_300, 7], Batching(**batch, micro_batch_tokens=1_299))
    with pytest.raises(DataError, match=r"has 1,300 tokens.*micro_batch_tokens=1299.*training\.max_length=1299"):
        plan.accumulation(2, 1)


@pytest.mark.parametrize(
    ("batching", "size", "expected"),
    [
        (Batching(global_batch_size=6, micro_batch=2), 2, [1, 4]),
        (Batching(global_batch_size=6, micro_batch=2), 4, [1, 4, 2, 5]),
        (Batching(global_batch_size=6, micro_batch_tokens=20), 20, [1, 4]),
        (Batching(global_batch_size=6, micro_batch_tokens=20), 21, [1, 4, 2]),
        (Batching(global_batch_size=6, micro_batch_tokens=20), 5, [1]),
    ],
    ids=["2 samples", "4 samples", "20 tokens", "21 tokens", "less than the longest"],
)
def test_the_longest_samples_fill_a_micro_batch(batching: Batching, size: int, expected: list[int]) -> None:
    """The search for a micro-batch measures them: shorter ones would need less memory than the run does."""
    assert Plan([3, 9, 5, 1, 7, 4], batching).longest(size) == expected


def test_the_micro_batches_worth_trying() -> None:
    padded = Plan([3] * 40, Batching(global_batch_size=24, micro_batch=1))
    assert [padded.sizes(world_size) for world_size in (1, 2, 8)] == [
        [1, 2, 3, 4, 6, 8, 12, 24],
        [1, 2, 3, 4, 6, 12],
        [1, 3],
    ]
    few = Plan([3] * 5, Batching(global_batch_size=24, micro_batch=1))
    assert few.sizes(1) == [1, 2, 3, 4], "a micro-batch cannot have more samples than there are"
    packed = Plan([10, 20, 30, 40], Batching(global_batch_size=4, micro_batch_tokens=50))
    assert packed.sizes(1) == [40, 60, 90, 101]  # the longest sample to one rank's share of 100 tokens, and one spare
    assert packed.sizes(2) == [40, 51]


# ---- the batch sampler of a rank
# --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(cases())
def test_the_ranks_together_follow_the_plan_epoch_by_epoch(case: Case) -> None:
    plan, world = case.plan, case.world_size
    accumulation = plan.accumulation(world, case.epochs)
    samplers = [RankBatches(plan, rank, world, accumulation) for rank in range(world)]
    found = []
    for epoch in range(case.epochs):
        of_ranks = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            of_ranks.append(list(sampler))
            assert len(of_ranks[-1]) == len(sampler) == plan.steps * accumulation
        found += [list(ranks) for ranks in zip(*of_ranks, strict=True)]
    spare = [[]] * world
    assert found == [ranks for step in case.divided() for ranks in [*[spare] * (accumulation - len(step)), *step]], (
        "a step with fewer rounds must start with empty micro-batches"
    )


# ---- evaluation ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=cases(), lengths=LENGTHS, micro=st.integers(1, 9))
def test_an_evaluation_is_a_single_step_over_every_sample(case: Case, lengths: list[int], micro: int) -> None:
    plan = case.plan.evaluation(np.asarray(lengths), micro)
    packs = list(itertools.chain(*plan.micro_batches(0, case.world_size)))
    assert plan.steps == 1
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    budget = case.batching.micro_batch_tokens
    for pack in packs:
        if budget is None:
            assert len(pack) <= micro
        else:  # a held-out sample may be longer than any training sample
            assert sum(lengths[sample] for sample in pack) <= max(budget, *lengths)


def test_an_evaluation_keeps_the_order_of_its_split() -> None:
    plan = Plan([1], Batching(global_batch_size=3), 42).evaluation(np.asarray([4] * 9), 2)
    assert plan.samples(0).tolist() == list(range(9))


# ---- inference -------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 400), max_size=40), st.integers(1, 2_000))
def test_batches_by_length_hold_every_item_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(batches_by_length(lengths, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= budget
