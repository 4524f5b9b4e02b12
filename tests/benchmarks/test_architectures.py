"""The benchmark of architectures: its arithmetic, its twins, and a run of one narrow shape on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from architecture_shapes import SHAPES, shape_of

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "architectures.py"


@pytest.mark.parametrize("name", SHAPES)
def test_a_twin_has_the_active_parameters_and_the_attention_of_its_shape(name: str) -> None:
    shape = shape_of(name)
    twin = shape.twin
    assert twin.config.model_type == "llama" and twin.twin is twin
    assert twin.parameters[1] == pytest.approx(shape.parameters[1], rel=0.002)
    (heads, keys, size), (own_heads, own_keys, own_size) = shape.heads, twin.heads
    assert (own_heads * own_size, own_keys * own_size) == (heads * size, keys * size)
    for key in ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings"):
        assert getattr(twin.config, key) == getattr(shape.config, key), key


def test_a_mixture_of_experts_counts_the_experts_of_a_token() -> None:
    shape = shape_of("mixtral_8x7b")
    total, active = shape.parameters
    experts = 4 * 8 * 3 * 4096 * 14336
    assert active == total - experts * 6 // 8


def test_flops_of_a_step() -> None:
    shape = shape_of("qwen3_8b")
    one, two = shape.flops([100]), shape.flops([50, 50])
    pairs = 100 * 101 // 2, 2 * (50 * 51 // 2)
    assert one - two == 12 * 32 * 128 * 6 * (pairs[0] - pairs[1])
    assert one == 4 * shape.parameters[1] * 100 + 12 * 32 * 128 * 6 * pairs[0]


def test_a_window_limits_the_pairs_that_count() -> None:
    shape = shape_of("gpt_oss_20b")
    window = shape.config.sliding_window
    whole, short = 3 * window, window
    layers = shape.config.num_hidden_layers
    full = 12 * 64 * 64 * (whole * (whole + 1) // 2)
    windowed = 12 * 64 * 64 * (short * (short + 1) // 2 + (whole - short) * window)
    products = 4 * shape.parameters[1] * whole
    assert shape.flops([whole]) == products + layers // 2 * (full + windowed)


def test_a_shape_and_its_twin_train(tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    options = ["--tiny", "--shapes", "phi4_mini", "--warmup", "1", "--steps", "1", "--repeats", "2"]
    command = [sys.executable, str(PROGRAM), *options, "--commit", "abc", "--output", str(output)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert record["commit"] == "abc" and record["failed"] == {}
    assert set(record["summary"]) == set(record["repeats"]) == {"phi4_mini", "phi4_mini-llama"}
    for found in record["summary"].values():
        assert found["packed"] and found["fused_linears"] == found["adapted_linears"]
        assert found["tokens_per_second"]["least"] > 0 and found["profile"]["compute_s"] > 0
    ratio = record["ratios"]["phi4_mini"]
    assert list(record["ratios"]) == ["phi4_mini"] and ratio["least"] <= ratio["of_mfu"] <= ratio["greatest"]
