"""The page of runs that were evaluated, in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from distft.runs.folder import RunFolder

from .conftest import opened, report, run_folder

BOXES = """boxes => boxes.map(box => [
    box.scrollWidth,
    box.clientWidth,
    ...[...box.querySelectorAll('tbody :is(th, td)')].map(cell => cell.getBoundingClientRect().right),
])"""
"""The full and the visible width of each table, and the right edges of its cells."""
FONT_SIZES = "cells => cells.map(cell => parseFloat(getComputedStyle(cell).fontSize))"
DISTINCT_LEFTS = """rows => rows.map(row =>
    new Set([...row.cells].map(cell => Math.round(cell.getBoundingClientRect().left))).size)"""
LABEL_WIDTHS = """drawings => drawings.map(svg => {
    const labels = [...svg.querySelectorAll('text')].filter(t => /AlpacaEval|asked|orders/.test(t.textContent));
    return [Math.max(...labels.map(t => t.getBoundingClientRect().width)), svg.getBoundingClientRect().width];
})"""
"""The width of the widest label of each drawing, and of the drawing."""


def evaluated(parent: Path, name: str, verdict: str = "gain") -> RunFolder:
    """A run with the figures of an evaluation, as wide as they get, and a judge that prefers whatever comes first."""
    folder = run_folder(parent, name, "ddp", 20.0, 30.0)

    def figure(title: str, form: str, scale: float, verdict: str) -> dict[str, Any]:
        sides = {
            side: {"value": by * scale, "low": 0.9 * by * scale, "high": 1.1 * by * scale}
            for side, by in (("base", 1.0), ("adapter", 0.5), ("difference", -0.5))
        }
        more = {"better": "lower", "form": form, "count": 12_240, "level": 0.95, "verdict": verdict}
        return {"title": title, **more, **sides}

    unparsed_title = "answers without a label word by generation"
    preferred_title = "AlpacaEval pairs won, asked which is better in both orders"
    evaluation = {
        "perplexity": {"figures": {"perplexity": figure("held-out perplexity", ",.2f", 8079.12, verdict)}},
        "imdb": {
            "figures": {
                "accuracy": figure("accuracy", ".3f", 0.9, "inconclusive"),
                "generation_unparsed": figure(unparsed_title, ".3f", 0.9, "inconclusive"),
            },
            "confusion": {
                "rows": ["negative", "positive"],
                "columns": ["negative", "positive", "unparsed"],
                "logprob": {side: [[101, 11, 0], [7, 105, 0]] for side in ("base", "adapter")},
            },
            "unparsed": {"base": {"count": 224, "first": ["Tell <b>me</b> something. " * 3, "and " * 40]}},
        },
        "mt_bench": {
            "figures": {"score": figure("MT-Bench score out of 10", ".2f", 8.0, "too few items")},
            "categories": {
                word: {"count": 10, "base": {"value": 7.0, "low": 6.0, "high": 8.0}} for word in ("humanities", "math")
            },
        },
        "alpaca": {
            "figures": {"preferred_rate": figure(preferred_title, ".1%", 0.5, "inconclusive")},
            "outcomes": {"base": {"win": 0, "tie": 805, "loss": 0, "unparsed": 0}},
            "judge": {"mode": "pairwise"},
            "position": {"base": {"first_preferred": 1.0, "inconsistent": 805, "pairs": 805}},
        },
    }
    folder.summary.write_text(json.dumps({**json.loads(folder.summary.read_text()), "evaluation": evaluation}))
    return folder


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("width", [375, 1300])
def test_difference_and_verdict_of_an_evaluation_are_visible(
    browser: Browser, tmp_path: Path, width: int, runs: int
) -> None:
    folders = [evaluated(tmp_path, f"tiny_sentiment-seed{number}-rank32") for number in range(runs)]
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    page, problems = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 900})
    assert problems == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.eval_on_selector_all("section[aria-labelledby^=evaluation] .scroll", BOXES)
    assert len(boxes) == 5, "figures, a matrix, answers, categories, outcomes"
    for whole, seen, *rights in boxes:
        assert whole <= seen and max(rights) <= width, "the tables do not scroll"
    table = page.locator("section[aria-labelledby=evaluation] table")
    rows = table.get_by_role("row").count()
    assert rows == 5 * runs + (width > 375), "rows for a screen reader, whatever they look like"
    cell = table.get_by_role("cell", name="-4,039.56").first
    assert cell.text_content() == "-4,039.56 [-3,635.60, -4,443.52]"
    gain = table.get_by_role("cell", name="gain").first
    assert gain.is_visible() and gain.bounding_box()["y"] < page.locator("#charts").bounding_box()["y"]
    sizes = page.eval_on_selector_all("section[aria-labelledby^=evaluation] :is(th, td)", FONT_SIZES)
    assert min(sizes) >= 14
    if width == 375:
        named = page.evaluate("getComputedStyle(document.querySelector('.stacked td:last-child'), '::before').content")
        assert named == "attr(data-head)" or named == '"verdict"', (
            "each cell follows its head, which is above no column"
        )
        lefts = page.eval_on_selector_all(".stacked tbody tr", DISTINCT_LEFTS)
        assert set(lefts[:5]) == {1}, "the cells of a row are below each other"
    bars = page.eval_on_selector_all("#chart-evaluation_alpaca svg", LABEL_WIDTHS)
    assert bars and all(label < whole / 2 for label, whole in bars), "a label leaves room for its bar"


def test_the_page_of_one_run_says_what_its_fine_tune_changed(browser: Browser, tmp_path: Path) -> None:
    same = "No change could be shown: inconclusive for held-out perplexity, "
    for name, verdict, headline in (
        ("changed", "gain", "The fine-tune changed held-out perplexity 8,079.12 → 4,039.56 (gain)."),
        ("same", "inconclusive", f"{same}imdb accuracy; "),
    ):
        folder = evaluated(tmp_path, name, verdict)
        report(tmp_path, str(folder.path), "--output", f"{name}.html")
        page, _ = opened(browser, tmp_path / f"{name}.html")
        text = page.text_content("main")
        assert page.text_content(".verdict").startswith(headline)
        assert "nothing to compare" not in text
        assert "The judge's verdicts are unreliable for alpaca".lower() in page.text_content(".verdict").lower()
        warning = page.text_content(".warning")
        assert (
            "two orders disagree in at least half of the pairs" in warning
            and "805 of 805 pairs, first answer preferred in 100% of verdicts" in warning
        )
        assert '"Tell <b>me</b> something. ' in text and page.locator(".stacked b").count() == 0
        headings = page.locator("section[aria-labelledby^=evaluation-] h3").all_text_contents()
        assert headings == [
            "imdb: confusion matrix by likelihood",
            "imdb: answers without a label word",
            "mt_bench: score out of 10 by category",
            "alpaca: outcomes, compared in both orders",
        ]
