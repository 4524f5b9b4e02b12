"""Figures on the benchmarks page are those of the records in benchmarks/results."""

from __future__ import annotations

import json
from collections import defaultdict
from statistics import median
from typing import Any

from distft.reports.comparison import judge
from distft.stats import Interval

from .pages import PAGES, ROOT, page

BENCHMARKS = page("benchmarks")
TEXT = " ".join(BENCHMARKS.text.split())
STRATEGY_QUESTION = "DDP 4-bit vs FSDP bf16"


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def medians(found: dict[str, Any], forms: dict[str, str]) -> list[str]:
    return [format(found[figure]["median"], form) for figure, form in forms.items()]


def speeds_of(experiment: str) -> dict[str, list[float]]:
    """samples/s of the runs of each variant."""
    speeds = defaultdict(list)
    for run in measured("ddp_vs_fsdp_h200")["experiments"][experiment]["report"]["runs"]:
        speeds[run["variant"]].append(run["figures"]["samples_per_second"])
    return speeds


def compared(one: list[float], other: list[float], together: int = 1) -> tuple[Interval, str]:
    """The ratio of `other` to `one` with its interval, and the verdict of a report."""
    interval, verdict = judge(one, other, together)
    assert interval is not None
    return interval, verdict


EXPERIMENTS = {"report's": "ddp_vs_fsdp_published", "distft's": "ddp_vs_fsdp"}


def test_the_fair_comparison_comes_first_with_its_intervals() -> None:
    assert BENCHMARKS.text.split("\n## ")[1].startswith(STRATEGY_QUESTION)
    answer, _ = BENCHMARKS.tables(STRATEGY_QUESTION)
    expected = []
    for settings, experiment in EXPERIMENTS.items():
        speeds = speeds_of(experiment)
        found, verdict = compared(speeds["fsdp_bf16"], speeds["ddp_qlora"], len(speeds) - 1)
        expected.append([settings, f"× {found.centre:.2f}", f"{found.low:.2f} – {found.high:.2f}", verdict])
    assert answer == expected
    speeds = speeds_of("ddp_vs_fsdp")
    pair, verdict = compared(speeds["fsdp_bf16"], speeds["ddp_bf16"])
    assert verdict == "inconclusive"
    assert (
        f"`ddp_bf16` is {pair.centre:.2f} times as fast as `fsdp_bf16` with distft's settings "
        f"({pair.low:.2f} to {pair.high:.2f}, this pair alone)"
    ) in TEXT


def test_variants_of_the_fair_comparison() -> None:
    for settings, name, runs, rate, kind, compute, host, *rest in BENCHMARKS.tables(STRATEGY_QUESTION)[1]:
        experiment = EXPERIMENTS[settings]
        variants = measured("ddp_vs_fsdp_h200")["experiments"][experiment]["report"]["variants"]
        (variant,) = (each for each in variants if each["name"].removeprefix(f"{experiment}-") == name.strip("`"))
        found, split = variant["spreads"], variant["split"]
        spread = found["samples_per_second"]
        several = f" ({spread['least']:.1f}–{spread['greatest']:.1f})" if variant["finished"] > 1 else ""
        total = sum(split[key] for key in ("compute_s", "communication_s", "copy_s", "data_wait_s", "host_s"))
        assert [runs, rate] == [str(variant["finished"]), f"{spread['median']:.1f}{several}"]
        assert [kind, compute, host] == [
            variant["bound"]["kind"],
            *(f"{split[key] / total:.0%}" for key in ("compute_s", "host_s")),
        ]
        assert rest == medians(found, {"mfu": ".3f", "peak_memory_gib": ".1f", "joules_per_sample": ".1f"})


def test_energy_and_losses_of_the_fair_comparison() -> None:
    experiments = measured("ddp_vs_fsdp_h200")["experiments"]
    published = experiments["ddp_vs_fsdp_published"]["report"]
    (energy,) = (each for each in published["comparisons"] if each["figure"] == "joules_per_sample")
    more, least, most = (energy[key] - 1 for key in ("ratio", "low", "high"))
    assert f"{more:.0%} more energy per sample ({least:.0%} to {most:.0%})" in TEXT
    loss = {
        each["name"]: each["spreads"]["eval_loss_after"]["median"]
        for each in [*published["variants"], *experiments["ddp_vs_fsdp"]["report"]["variants"]]
    }
    after = {each["name"]: each["spreads"]["eval_loss_after"]["median"] for each in published["variants"]}
    assert f"to {after['fsdp_bf16']:.2f}, and under DDP with 4 bits to {after['ddp_qlora']:.2f}" in TEXT
    ours = [loss[each["name"]] for each in experiments["ddp_vs_fsdp"]["report"]["variants"]]
    assert max(ours) / min(ours) < 1.0011 and "within 0.1% of each other" in TEXT


def test_pauses() -> None:
    sides = defaultdict(list)
    for run in measured("pauses_h200")["runs"]:
        sides[run["side"]].append(run["samples_per_second"])
    gain, verdict = compared(sides["not frozen"], sides["frozen"])
    assert verdict == "inconclusive"
    assert f"× {gain.centre:.2f} ({gain.low:.2f} to {gain.high:.2f}), is inconclusive with two runs each" in TEXT


def test_strategies() -> None:
    summary = measured("throughput_h200_strategies")["summary"]
    forms = {
        "samples_per_second": ".1f",
        "tokens_per_second": ",.0f",
        "mfu": ".3f",
        "peak_memory_gb": ".1f",
        "joules_per_1000_samples": ",.0f",
    }
    (table,) = BENCHMARKS.tables("Strategies")
    for name, *cells in table:
        assert cells == medians(summary[name.strip("`")], forms)


def test_compared_with_unsloth() -> None:
    record = measured("throughput_h200")
    pairs = {pair["case"]: pair for pair in record["comparisons"] if pair["reference"].startswith("unsloth")}
    (table,) = BENCHMARKS.tables("Compared with Unsloth")
    for name, *cells in table:
        pair = pairs[name.strip("`")]
        ours, theirs = record["summary"][pair["case"]], record["summary"][pair["reference"]]
        assert pair["same_work"]
        assert cells == [
            f"{ours['samples_per_second']['median']:.1f}",
            f"{theirs['samples_per_second']['median']:.1f}",
            f"× {pair['ratio']['samples_per_second']['of_medians']:.2f}",
            f"{ours['mfu']['median']:.3f}",
            f"{ours['peak_memory_gb']['median']:.1f}",
            f"{theirs['peak_memory_gb']['median']:.1f}",
        ]


def test_compared_with_trl() -> None:
    (table,) = BENCHMARKS.tables("Compared with TRL")
    for row in table:
        record = measured("throughput_h200_" + ("fsdp" if "fsdp" in row[0] else "two_gpus"))
        both = {(pair["case"], pair["reference"]): pair for pair in record["comparisons"]}
        pair = both[row[0].strip("`"), row[2].strip("`")]
        ours, theirs = record["summary"][pair["case"]], record["summary"][pair["reference"]]
        ratios = [pair["ratio"][figure]["of_medians"] for figure in ("samples_per_second", "tokens_per_second")]
        rates = [side["samples_per_second"]["median"] for side in (ours, theirs)]
        peaks = [side["peak_memory_gb"]["median"] for side in (ours, theirs)]
        assert pair["same_work"]
        assert [row[1], row[3]] == [f"{rate:.1f}" for rate in rates]
        assert row[4:] == [*(f"× {ratio:.1f}" for ratio in ratios), *(f"{peak:.1f}" for peak in peaks)]


def test_mixture_of_experts() -> None:
    record = measured("mixture_h200")
    (table,) = BENCHMARKS.tables("Mixture of experts")
    forms = {"samples_per_second": ".1f", "tokens_per_second": ",.0f", "mfu": ".3f", "peak_memory_gib": ".1f"}
    places = {"one H200": "single", "two H200, FSDP2": "fsdp"}
    assert table == [[place, *medians(record["summary"][case], forms)] for place, case in places.items()]
    for (run,) in record["runs"].values():
        assert f"{run['quantized_share']:.2%} of the linear weights have 4 bits" in TEXT
        assert run["checkpointed_layers"] == 0
    assert record["config"]["num_hidden_layers"] == 48 and record["config"]["num_local_experts"] == 128


def test_architectures() -> None:
    (table,) = BENCHMARKS.tables("Architectures")
    expected: list[list[str]] = []
    ratios: dict[str, list[float]] = {"dense": [], "experts": []}
    for path in (ROOT / "benchmarks" / "results").glob("architectures*_h200.json"):
        record = measured(path.stem)
        assert record["failed"] == {} and f"`{path.name}`" in TEXT
        for name, ratio in record["ratios"].items():
            ours, llama = (record["summary"][name + end] for end in ("", "-llama"))
            profile = ours["profile"]
            expected.append(
                [
                    f"`{name}`",
                    str(ours["layers"]),
                    f"{ours['tokens_per_second']['median']:,.0f}",
                    *(f"{side['mfu']['median']:.3f}" for side in (ours, llama)),
                    f"{ratio['of_mfu']:.2f}",
                    f"{ratio['least']:.2f} – {ratio['greatest']:.2f}",
                    *(f"{profile[part] / profile['step_time_s']:.0%}" for part in ("products_s", "idle_s")),
                ]
            )
            kind = "experts" if ours["parameters"] > 1.5 * ours["active_parameters"] else "dense"
            ratios[kind].append(ratio["of_mfu"])
    assert sorted(table) == sorted(expected)
    spans = {kind: f"{min(found):.2f} to {max(found):.2f}" for kind, found in ratios.items()}
    assert (
        f"The dense models reach {spans['dense']} of the Llama's MFU, the mixtures of experts {spans['experts']}."
        in TEXT
    )


def test_long_context() -> None:
    summary = measured("long_context_h200")["summary"]
    (table,) = BENCHMARKS.tables("Long context")
    for name, *cells in table:
        sides = [summary[name.strip("`")], summary[name.strip("`") + "_plain"]]
        peaks = [f"{side['peak_memory_gb']['median']:.2f}" for side in sides]
        assert cells == [*peaks, *(f"{side['tokens_per_second']['median']:,.0f}" for side in sides)]


def test_idle_time() -> None:
    runs = measured("profile_h200")["runs"]
    idle = {name: max(rank["idle_share"] for rank in run["profile"]["ranks"]) for name, run in runs.items()}
    waits = max(rank["communication_exposed_s"] / rank["step_time_s"] for rank in runs["fsdp_bf16"]["profile"]["ranks"])
    assert f"idle for {idle['single']:.1%} of a step" in TEXT
    assert f"idle for up to {idle['fsdp_bf16']:.1%} and waited for the other for up to {waits:.1%}" in TEXT


def test_precision() -> None:
    off = measured("precision_h200")["difference_from_fp32"]
    (table,) = BENCHMARKS.tables("Precision")
    shown = dict(zip(("shipped", "bf16_masters"), table, strict=True))
    for variant, row in shown.items():
        assert row[1:] == [f"{off[variant][which]:.4f}" for which in ("mean", "min", "max")]
    assert f"the model learned {off['shipped']['learned']:.2f}" in TEXT


def test_preparing_data() -> None:
    record, large = measured("data_preparation_cpu"), measured("data_preparation_memory_cpu")["runs"][-1]
    (answer,) = BENCHMARKS.tables("Preparing data")
    expected = []
    for version, checkout in (("before", "old"), ("now", "main")):
        runs = [run for run in record["runs"] if run["checkout"] == checkout]
        speed = median(run["tokens_per_second"] for run in runs)
        expected.append([version, f"{speed:,.0f}", f"{max(run['peak_gib'] for run in runs):.2f}"])
    assert answer == expected
    assert f"That is {record['ratio_of_median_tokens_per_second']:.1f} times as fast" in TEXT
    dropped = large["peak_gib"] - large["peak_anonymous_gib"]
    assert f"A file of {large['megabytes']:,} MB took {large['peak_gib']:.2f} GiB" in TEXT
    assert f"of which {dropped:.2f} are pages of files" in TEXT


def test_every_record_that_a_page_names_exists() -> None:
    import re

    for each in PAGES:
        for name in re.findall(r"`(?:benchmarks/results/)?(\w+_\w*(?:h200|cpu)\w*\.json)`", each.text):
            assert (ROOT / "benchmarks" / "results" / name).is_file(), (each.name, name)
