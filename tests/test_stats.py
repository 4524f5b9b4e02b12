"""Intervals: they are Welch's, and with the noise of real runs they call identical pairs different no more often than
they say."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from scipy import stats

from distft.experiments.expand import REPEATS
from distft.reports.comparison import judge
from distft.stats import CONFIDENCE, Interval, difference, ratio, repeats_to_find

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
COMPARISONS = 2_000
FASTER = 1.05
Draw = Callable[[random.Random], list[float]]


# ---- the interval ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([40.0, 41.0], [50.0, 52.0, 51.0]),
        ([1.0, 1.5, 0.8, 1.1], [3.0, 9.0]),
        ([2.0, 2.0, 2.0], [3.0, 3.1, 3.3]),
        ([1e-9, 2e-9], [1e9, 3e9]),
    ],
)
@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, of a side without any spread
def test_it_is_welch_s_as_scipy_has_it(one: list[float], other: list[float]) -> None:
    logs = [[math.log(value) for value in side] for side in (other, one)]
    known = stats.ttest_ind(*logs, equal_var=False)
    bounds = known.confidence_interval(CONFIDENCE)
    found = ratio(one, other)
    assert found.centre == pytest.approx(statistics.geometric_mean(other) / statistics.geometric_mean(one))
    assert (found.low, found.high) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)), rel=1e-9)
    assert found.excludes(1) == (known.pvalue < 1 - CONFIDENCE)
    plain = stats.ttest_ind(other, one, equal_var=False).confidence_interval(CONFIDENCE)
    assert (difference(one, other).low, difference(one, other).high) == pytest.approx((plain.low, plain.high), rel=1e-9)


def test_several_that_are_read_together_are_wider() -> None:
    one, other = [40.0, 41.0, 40.5], [42.0, 43.0, 41.8]
    logs = [[math.log(value) for value in side] for side in (other, one)]
    bounds = stats.ttest_ind(*logs, equal_var=False).confidence_interval(1 - 0.05 / 4)
    found = ratio(one, other, together=4)
    assert (found.low, found.high) == pytest.approx((math.exp(bounds.low), math.exp(bounds.high)))


def test_the_other_way_round_it_is_the_inverse() -> None:
    there, back = ratio([40.0, 41.0, 40.5], [52.0, 51.0]), ratio([52.0, 51.0], [40.0, 41.0, 40.5])
    assert there.low is not None and there.high is not None
    assert (back.low, back.centre, back.high) == pytest.approx((1 / there.high, 1 / there.centre, 1 / there.low))  # type: ignore[operator]


def test_one_run_on_a_side_has_a_ratio_and_no_bounds() -> None:
    assert ratio([40.0], [50.0, 51.0]).low is None
    assert ratio([40.0], [50.0]) == Interval(pytest.approx(1.25))
    assert not ratio([40.0], [80.0]).excludes(1)


def test_without_any_spread_the_bounds_are_the_estimate() -> None:
    found = ratio([8.0] * 3, [6.0] * 3)
    assert found == Interval(pytest.approx(0.75), pytest.approx(0.75), pytest.approx(0.75)) and found.excludes(1)


def test_two_runs_far_apart_leave_the_ratio_open() -> None:
    found = ratio([1e-90, 1.0], [1e-90, 2.0], together=35)
    assert (found.low, found.high) == (0.0, math.inf) and not found.excludes(1)


@pytest.mark.parametrize("values", [[0.0, 1.0], [-1.0, 2.0]])
def test_what_is_not_positive_has_no_ratio(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"expected a positive input|math domain error"):
        ratio(values, [1.0, 2.0])


@pytest.mark.parametrize("together", [1, 3, 8])
@pytest.mark.parametrize("deviation", [0.002, 0.013, 0.046, 0.3])
def test_how_many_repeats_it_takes_is_that_of_the_t_test(deviation: float, together: int) -> None:
    def power(count: int) -> float:
        freedom, centre = 2 * count - 2, math.log(FASTER) / (deviation * math.sqrt(2 / count))
        return float(1 - stats.nct.cdf(stats.t.ppf(1 - (1 - CONFIDENCE) / together / 2, freedom), freedom, centre))

    side = [math.exp(sign * deviation / math.sqrt(2)) for sign in (-1, 1)]
    exact = next(count for count in range(2, 2_000) if power(count) >= 0.8)
    assert repeats_to_find(FASTER, side, side, together) == pytest.approx(exact, abs=1)


def test_how_many_repeats_it_takes_is_not_known_of_one_and_not_said_of_a_thousand() -> None:
    assert repeats_to_find(FASTER, [40.0], [40.0, 41.0]) is None
    assert repeats_to_find(FASTER, [1.0, 2.0], [1.0, 3.0]) is None


# ---- the verdict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ([40.0, 40.2, 39.8], [50.0, 50.1, 50.4], "different"),
        ([40.0, 40.2, 39.8], [40.1, 40.4, 39.9], "no difference"),
        ([40.0, 41.0], [43.0, 45.0], "inconclusive"),  # the ranges do not overlap, but two runs of each say little
        ([40.0, 40.0], [40.001, 40.002], "equal"),
        ([40.0], [50.0, 50.1], "no spread"),
        ([8.0, 8.0], [6.0, 6.0], "different"),
        ([0.0, 0.0], [0.0, 0.0], "equal"),
        ([0.0, 0.1, 0.05], [5.0, 5.1, 5.2], "different"),
        ([-0.1, 0.1, 0.05], [0.0, 0.2, -0.2], "inconclusive"),
    ],
)
def test_what_is_called_a_difference(one: list[float], other: list[float], verdict: str) -> None:
    found, told = judge(one, other)
    assert told == verdict == judge(other, one)[1]
    assert (found is None) == (min(*one, *other) <= 0)


# ---- with the noise of real runs -------------------------------------------------------------------------------------


def off_their_mean(rates: Iterable[list[float]]) -> list[float]:
    """Of the log of samples/s: what the runs of each case are off their mean, made as wide as what they are drawn
    from (a few values are off their own mean by less than off the true one)."""
    found = []
    for side in rates:
        logs = [math.log(rate) for rate in side]
        if len(logs) > 1:
            found += [(log - statistics.fmean(logs)) * math.sqrt(len(logs) / (len(logs) - 1)) for log in logs]
    return found


def noise_h200() -> list[float]:
    """Of the cases on H200s that ran twice."""
    found = []
    for name in ("throughput_h200.json", "throughput_h200_two_gpus.json"):
        rates: dict[str, list[float]] = {}
        for run in json.loads((RESULTS / name).read_text(encoding="utf-8"))["runs"]:
            if run["exit_code"] == 0:
                rates.setdefault(run["name"], []).append(run["samples_per_second"])
        found += off_their_mean(rates.values())
    return found


def noise_compared() -> list[float]:
    """Of the variants that `distft compare` ran three times on two H200s, with a collector that still paused some of
    them."""
    record = json.loads((RESULTS / "ddp_vs_fsdp_h200.json").read_text(encoding="utf-8"))
    rates: dict[str, list[float]] = {}
    for run in record["experiments"]["ddp_vs_fsdp"]["report"]["runs"]:
        rates.setdefault(run["variant"], []).append(run["figures"]["samples_per_second"])
    return off_their_mean(rates.values())


def noise_cpu() -> list[float]:
    """Of the log of samples/s, of twelve runs of one command on a CPU that other programs share: a few are far
    slower."""
    runs = json.loads((RESULTS / "noise_cpu.json").read_text(encoding="utf-8"))["runs"]
    return [math.log(run["samples_per_second"]) for run in runs]


H200, COMPARED, CPU = noise_h200(), noise_compared(), noise_cpu()


def drawn(
    pool: list[float], repeats: int, faster: float = 1.0, drift: float = 0.0
) -> Callable[[random.Random], list[list[float]]]:
    """Two variants in turns, the second `faster`; with `drift` all grow slower by that share from turn to turn."""

    def draw(seeded: random.Random) -> list[list[float]]:
        rates = [[math.exp(noise) for noise in seeded.choices(pool, k=repeats)] for _ in range(2)]
        return [
            [rate * (1 - drift) ** turn * factor for turn, rate in enumerate(side)]
            for side, factor in zip(rates, (1.0, faster), strict=True)
        ]

    return draw


def share(draw: Callable[[random.Random], list[list[float]]], called: Callable[[Interval, str], bool]) -> float:
    """Of seeded comparisons, those that are `called` so."""
    seeded = random.Random(1)
    count = 0
    for _ in range(COMPARISONS):
        found, verdict = judge(*draw(seeded))
        assert found is not None
        count += called(found, verdict)
    return count / COMPARISONS


def different(found: Interval, verdict: str) -> bool:
    return verdict == "different"


def found_faster(found: Interval, verdict: str) -> bool:
    return verdict == "different" and found.low is not None and found.low > 1


def test_there_is_enough_real_noise_to_draw_from() -> None:
    assert len(H200) == 22 and 0.02 < statistics.pstdev(H200) < 0.025
    assert len(COMPARED) == 12 and 0.045 < statistics.pstdev(COMPARED) < 0.05
    assert len(CPU) == 12 and statistics.stdev(CPU) > 0.1


@pytest.mark.parametrize("drift", [0.0, 0.02])
@pytest.mark.parametrize("repeats", [2, 3, REPEATS])
@pytest.mark.parametrize("pool", [H200, COMPARED, CPU], ids=["h200", "compared", "cpu"])
def test_identical_pairs_are_called_different_at_most_once_in_twenty(
    pool: list[float], repeats: int, drift: float
) -> None:
    assert share(drawn(pool, repeats, drift=drift), different) <= 0.05


@pytest.mark.parametrize("pool", [H200, COMPARED, CPU], ids=["h200", "compared", "cpu"])
def test_of_several_identical_variants_none_is_called_different_in_nineteen_of_twenty(pool: list[float]) -> None:
    """Four beside the first, as they are read: together."""
    seeded = random.Random(2)
    wrong = 0
    for _ in range(COMPARISONS):
        first, *others = ([math.exp(noise) for noise in seeded.choices(pool, k=REPEATS)] for _ in range(5))
        wrong += any(judge(first, other, together=4)[1] == "different" for other in others)
    assert wrong / COMPARISONS <= 0.05


def test_a_difference_of_5_percent_is_found_with_the_default_repeats() -> None:
    assert share(drawn(H200, REPEATS, FASTER), found_faster) >= 0.8


def test_three_repeats_would_not_find_it_with_this_noise_and_would_with_less() -> None:
    """Why the default is what it is."""
    assert share(drawn(H200, 3, FASTER), found_faster) < 0.6
    shrunk = [noise * 0.013 / statistics.pstdev(H200) for noise in H200]
    assert share(drawn(shrunk, 3, FASTER), found_faster) >= 0.8


def test_with_more_noise_it_takes_a_greater_difference_or_more_repeats() -> None:
    assert share(drawn(COMPARED, REPEATS, FASTER), found_faster) < 0.4
    assert share(drawn(COMPARED, REPEATS, 1.11), found_faster) >= 0.8
    spread = statistics.pstdev(COMPARED) / math.sqrt(2)
    wanted = repeats_to_find(FASTER, *[[math.exp(-spread), math.exp(spread)]] * 2)
    assert wanted == 16 and share(drawn(COMPARED, wanted, FASTER), found_faster) >= 0.8


def test_the_interval_holds_the_truth() -> None:
    covers = share(drawn(H200, REPEATS, FASTER), lambda found, _: found.low <= FASTER <= found.high)  # type: ignore[operator]
    assert covers >= CONFIDENCE - 0.01
