"""The scaling page has the current tables, and their model agrees with measurements and with calculations by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import scaling
from cluster import Compute, Group, Hardware, Load, Scheme, all_reduce, ring, step, traffic, tree
from scaling import TABLES
from scaling_inputs import DDP, FSDP, HSDP, LLAMA, ZERO2, adapter, hardware, model

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"
PACK = Load(rounds=1, heaviest=6656, spare=0.0, samples=32)


def seconds(
    scheme: Scheme, gpus: int, machine: Hardware | None = None, rounds: float = 1, overlap: float = 0.0
) -> float:
    load = replace(PACK, rounds=rounds)
    return step(
        scheme, model(LLAMA)[0], adapter(LLAMA), Compute(0.07, 5e-5), load, gpus, machine or hardware(), overlap
    ).seconds


def test_the_page_has_the_current_tables() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    assert re.findall(r"<!-- table: (\w+) -->", document) == list(TABLES)
    assert scaling.updated(document) == document, "run python benchmarks/scaling.py --update docs/scaling.md"


def test_an_update_fills_every_table_and_keeps_the_text() -> None:
    empty = "a\n<!-- table: starts -->\n<!-- end -->\nb\n<!-- table: memories -->\nold\n<!-- end -->\nc\n"
    starts, memories = scaling.starts(), scaling.memories()
    filled = (
        f"a\n<!-- table: starts -->\n{starts}\n<!-- end -->\nb\n<!-- table: memories -->\n{memories}\n<!-- end -->\nc\n"
    )
    assert scaling.updated(empty) == filled == scaling.updated(filled)


def test_two_gpus_are_predicted_from_one() -> None:
    checks = scaling.checks()
    assert len([check for check in checks if check.tolerance]) == 9
    assert [f"{check.what}: {check.error:+.1%}" for check in checks if not check.holds] == []


@pytest.mark.parametrize("factor", [0.5, 100.0])
def test_the_check_fails_with_another_link(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    wrong = replace(
        hardware(), nvlink=factor * hardware().nvlink, memory_bandwidth=factor * hardware().memory_bandwidth
    )
    monkeypatch.setattr(scaling, "hardware", lambda: wrong)
    assert [check.what for check in scaling.checks() if not check.holds] == [
        "tokens/s, trl_packed_fsdp2_bf16_2, from trl_packed_1"
    ]


def test_one_gpu_sends_nothing() -> None:
    for scheme in (DDP, FSDP, HSDP, ZERO2):
        assert seconds(scheme, 1) == pytest.approx(0.07 + 6656 * 5e-5)


def test_hsdp_is_fsdp_on_one_node_and_keeps_weights_within_nodes() -> None:
    shape, trained = model(LLAMA)[0], adapter(LLAMA)
    for gpus in (2, 8):
        assert traffic(HSDP, shape, trained, gpus, 1, hardware()) == traffic(FSDP, shape, trained, gpus, 1, hardware())
        assert traffic(FSDP, shape, trained, gpus, 1, hardware()).leaving == 0
    hybrid, full = (traffic(scheme, shape, trained, 64, 1, hardware()) for scheme in (HSDP, FSDP))
    # Only gradients leave the node: an eighth of them per GPU, there and back, between 8 nodes.
    assert hybrid.leaving == pytest.approx(2 * 7 / 8 * 4 * trained / 8)
    assert full.leaving > 20 * hybrid.leaving


def test_traffic_is_as_calculated_by_hand() -> None:
    shape, trained = model(LLAMA)[0], adapter(LLAMA)
    base, gradients = 2 * (shape.parameters + trained), 4 * trained
    assert traffic(DDP, shape, trained, 8, 5, hardware()).sent == pytest.approx(2 * 7 / 8 * gradients)
    assert traffic(FSDP, shape, trained, 8, 3, hardware()).sent == pytest.approx(7 / 8 * (3 * 2 * base + gradients))
    kept = replace(FSDP, reshard=False)
    assert traffic(kept, shape, trained, 8, 3, hardware()).sent == pytest.approx(7 / 8 * (3 * base + gradients))
    assert traffic(ZERO2, shape, trained, 8, 3, hardware()).sent == pytest.approx(7 / 8 * 4 * gradients)


def test_more_gpus_and_less_bandwidth_never_make_a_step_shorter() -> None:
    slow = replace(hardware(), network=hardware().network / 10)
    for scheme in (DDP, FSDP, HSDP, ZERO2):
        times = [seconds(scheme, gpus) for gpus in scaling.GPUS]
        assert times == sorted(times), scheme
        assert seconds(scheme, 64, slow) >= seconds(scheme, 64)
        assert seconds(scheme, 64, overlap=1.0) <= seconds(scheme, 64, overlap=0.5) <= seconds(scheme, 64)
        assert seconds(scheme, 64, rounds=4) > seconds(scheme, 64)


def test_collectives_reach_the_measured_bandwidth_and_trees_win_for_small_messages() -> None:
    machine, two = hardware(), Group(2, 1)
    assert 2**30 / all_reduce(2**30, two, machine) == pytest.approx(machine.nvlink, rel=0.01)
    assert ring(1.0, Group(1, 1), machine) == all_reduce(1.0, Group(1, 1), machine) == 0
    large = Group(1024, 128)
    assert tree(2**20, large, machine) < 2 * ring(2**20, large, machine)


def test_a_batch_of_64_leaves_most_of_1024_gpus_without_a_sample() -> None:
    load = scaling.load(1024, 64)
    assert load.spare == 960 / 1024 and load.rounds == 1 and load.heaviest <= 1024
