"""What was equal in all runs, and what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distft.reports.markdown import markdown
from distft.reports.report import report

from .conftest import equal, make, row, verdicts


@pytest.mark.parametrize(
    ("overrides", "figures", "unequal"),
    [
        (["lora.r=4"], {}, set()),
        (["run.seed=1"], {}, {"samples", "order", "seed"}),
        (["data.max_samples=100"], {}, {"samples", "order"}),
        (["batching.global_batch_size=8"], {"global_batch_size": 8}, {"global_batch"}),
        (
            ["batching.global_batch_size=null", "batching.global_batch_tokens=800"],
            {"global_batch_size": None, "global_batch_tokens": 800},
            {"global_batch"},
        ),
        (["training.max_steps=9"], {"samples": 144, "tokens": 7200, "steps": 9}, {"samples", "tokens", "steps"}),
        (["training.max_length=64"], {"tokens": 7000}, {"tokens"}),
        (["model.dtype=bfloat16"], {}, {"base_weights"}),
        (["quantization=null"], {}, {"base_weights"}),
        (["quantization.bnb_4bit_quant_type=fp4"], {}, {"base_weights"}),
        (["quantization.bnb_4bit_use_double_quant=false"], {}, {"base_weights"}),
        (["quantization.llm_int8_threshold=3.0"], {}, {"base_weights"}),
        (["quantization.bnb_4bit_quant_storage=float32"], {}, set()),
        (["lora.r=4"], {"train_loss": 2.524}, set()),
        (["lora.r=4"], {"train_loss": 2.53}, {"loss"}),
        (["lora.r=4"], {"eval_after": {"loss": 1.9, "perplexity": 6.7}}, {"loss"}),
        (["run.on_bad_numbers=skip"], {"skipped_steps": 1}, {"samples"}),
        ([], {"data_digest": "other rows under the same name"}, {"samples", "order"}),
        ([], {"weights_digest": "other weights under the same name"}, {"base_weights"}),
    ],
)
def test_what_was_equal_follows_from_the_folders(
    overrides: list[str], figures: dict[str, Any], unequal: set[str], tmp_path: Path
) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "b", *overrides, **figures)])
    assert {what for what, is_equal in equal(made).items() if not is_equal} == unequal


def test_one_finished_variant_says_nothing_about_what_was_equal(tmp_path: Path) -> None:
    made = report([make(tmp_path, "a"), make(tmp_path, "a-r2"), make(tmp_path, "b", "lora.r=4", status="failed")])
    assert set(equal(made).values()) == {None} and row(markdown(made), "What was equal", "samples")["equal"] == "–"


def test_speeds_are_compared_only_if_the_work_was_equal(tmp_path: Path) -> None:
    folders = [make(tmp_path, "a"), make(tmp_path, "b", "training.max_length=64", tokens=7000)]
    assert verdicts(report(folders), "train_time_s") == {"b": "equal"}
    made = report(folders, equal=["samples", "tokens"])
    assert verdicts(made, "train_time_s") == {"b": "not compared"}
    assert verdicts(made, "peak_memory_gib") == {"b": "equal"}
    assert "- `b`: its speed is not compared because it did different work (not equal: tokens)." in markdown(made)
    assert "- `as run.tokens`: 8000 (in `a`), 7000 (in `b`)" in markdown(made)
    assert [item.what for item in made.equality if item.declared] == ["samples", "tokens"]


def test_a_recipe_section_that_one_variant_lacks_is_one_line(tmp_path: Path) -> None:
    text = markdown(report([make(tmp_path, "a"), make(tmp_path, "b", "quantization=null")]))
    (line,) = [line for line in text.split("## What differs")[1].splitlines() if "quantization" in line]
    assert line.startswith("- `quantization`: load_in_4bit true, load_in_8bit false, ")
    assert line.endswith(" (in `a`), not set (in `b`)")


def test_losses_that_nobody_measured_are_not_equal_but_unknown(tmp_path: Path) -> None:
    folders = [
        make(tmp_path, name, f"lora.r={r}", train_loss=None, eval_after=None) for name, r in (("a", 2), ("b", 4))
    ]
    made = report(folders, equal=["loss"])
    assert {each.what: each.equal for each in made.equality}["loss"] is None
    (speed,) = [item for item in made.comparisons if item.figure == "samples_per_second"]
    assert (speed.verdict, speed.why) == ("withheld", "the losses were declared equal, and no run measured one")


def test_held_out_losses_are_compared_on_the_same_rows_only(tmp_path: Path) -> None:
    def verdict(name: str, **facts: str | None) -> tuple[str, str]:
        folders = [
            make(
                tmp_path,
                f"{name}-{each}",
                f"lora.r={r}",
                held_out_digest=digest,
                eval_after={"loss": 2.0 + r, "perplexity": 7.0},
            )
            for each, r, digest in (("a", 2, facts["one"]), ("b", 4, facts["other"]))
        ]
        (item,) = [item for item in report(folders).comparisons if item.figure == "eval_loss_after"]
        return item.verdict, item.why

    assert verdict("x", one="1", other="2") == ("not compared", "it is measured on held-out rows, which differ")
    assert verdict("y", one="1", other="1") == ("no spread", "")
    assert verdict("z", one=None, other="1") == ("no spread", "")  # a run of before
