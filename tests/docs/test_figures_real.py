"""The sections on preferences, real weights and recipes are those of the records."""

from __future__ import annotations

from real_figures import record, sections

from .pages import page


def test_real_weights_and_recipes_are_those_of_the_records() -> None:
    text = page("benchmarks").text
    assert record("recipes_h200")["runs"], "there is a record"
    assert sections() in text, "run python benchmarks/real_figures.py --update docs/benchmarks.md"
    assert ("## Real weights" in text) == bool(record("pretrained_h200"))
    assert ("## Preferences" in text) == bool(record("preferences_h200"))
