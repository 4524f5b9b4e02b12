"""The page of a report in a real browser: no script, no request, legible on a phone and in the dark, figures as in the
JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser

from distft.reports.html import histories
from distft.reports.html import page as html_page
from distft.reports.report import report as report_on
from distft.runs.folder import RunFolder

from .conftest import CELLS, STEPS, opened, report, run_folder

KEYS = {
    "loss_step",
    "loss_time",
    "eval_loss",
    "eval_perplexity",
    "learning_rate",
    "speed",
    "memory",
    "host_memory",
    "time_split",
    "run_split",
    "pareto",
}
CONTRAST = """() => {
    const channel = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const light = colour => {
        const [r, g, b] = colour.match(/[\\d.]+/g).map(v => channel(v / 255));
        return .2126 * r + .7152 * g + .0722 * b;
    };
    const ground = light(getComputedStyle(document.body).backgroundColor);
    const against = colour => {
        const [a, b] = [light(colour), ground].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
    };
    const styles = selector => [...document.querySelectorAll(selector)].map(element => getComputedStyle(element));
    const lines = styles('figure path').filter(s => s.stroke.startsWith('rgb') && parseFloat(s.strokeWidth) > 1.2);
    const texts = styles('p, td, th, figcaption, figure text');
    return [
        Math.min(...lines.map(s => against(s.stroke))),
        Math.min(...texts.map(s => against(s.fill !== 'rgb(0, 0, 0)' ? s.fill : s.color))),
    ];
}"""
"""The lowest contrast with the background of a curve and of a text."""
RIGHT_EDGES = """rows => rows.map(row => [...row.cells].map(cell => {
    const range = document.createRange();
    range.selectNodeContents(cell);
    return range.getBoundingClientRect().right;
}))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_every_chart_is_drawn_without_network_requests(browser: Browser, made: Path, width: int, scheme: Any) -> None:
    page, problems = opened(browser, made / "page.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert problems == []
    assert {figure.get_attribute("id").removeprefix("chart-") for figure in page.query_selector_all("figure")} == KEYS
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself never scrolls sideways"
    for figure in page.query_selector_all("figure"):
        box = figure.query_selector("svg").bounding_box()
        assert box["width"] > 300 and box["height"] > 150
        texts = figure.query_selector_all("svg text")
        assert (
            len(texts) > 4 and min(text.bounding_box()["height"] for text in texts if text.text_content().strip()) >= 8
        )
        assert figure.query_selector("[role=img]").get_attribute("aria-labelledby")
    contrast = page.evaluate(CONTRAST)
    assert 3 <= contrast[0] <= 21 and 4.5 <= contrast[1] <= 21, "WCAG 2.1: 3 for graphics, 4.5 for text"


def test_the_figures_of_the_page_are_those_of_the_json(browser: Browser, made: Path) -> None:
    page, _ = opened(browser, made / "page.html")
    record = json.loads((made / "page.json").read_text())
    tables = {
        key: page.eval_on_selector_all(f"section[aria-labelledby={key}] > .scroll tr", CELLS)
        for key in ("variants", "runs")
    }
    head, *body = tables["variants"]
    assert [row[0] for row in body] == [variant["name"] for variant in record["variants"]] == ["a<b>&c1", "sharded1"]
    for row, variant in zip(body, record["variants"], strict=True):
        shown = row[head.index("samples/s")]
        spread = variant["spreads"]["samples_per_second"]
        assert shown == f"{spread['median']:,.2f} ({spread['least']:,.2f}–{spread['greatest']:,.2f})"
    head, *body = tables["runs"]
    assert [float(row[head.index("peak memory, GiB")]) for row in body] == [
        run["figures"]["peak_memory_gib"] for run in record["runs"]
    ]
    assert "sharded1 is 0.75× as fast as a<b>&c1" in page.text_content(".verdict")
    drawn = page.eval_on_selector_all("#chart-loss_step details tbody tr", CELLS)
    assert len(drawn) == 4 * STEPS and drawn[0] == ["a<b>&c1", "1", "3"]


def three_of_each(parent: Path) -> list[RunFolder]:
    return [
        run_folder(parent, f"{name}{turn}", strategy, speed + turn / 10, 12.0)
        for name, strategy, speed in (("plain", "ddp", 20.0), ("sharded", "fsdp", 15.0))
        for turn in (1, 2, 3)
    ]


def test_the_page_says_why_a_run_has_no_figures(browser: Browser, tmp_path: Path) -> None:
    folders = [*three_of_each(tmp_path), run_folder(tmp_path, "big", "single", 1.0, 140.0)]
    cause = (
        "OutOfMemory: out of memory on rank 0 with a micro-batch of 16 samples: 3.00 GiB were asked for, <1.00> of the "
        "GPU's 8.00 GiB are free."
    )
    summary = {"status": "failed", "cause": cause, "strategy": "single", "world_size": 1}
    folders[-1].summary.write_text(json.dumps(summary))
    for kind in ("html", "json"):
        report(tmp_path, *(str(folder.path) for folder in folders), "--output", f"page.{kind}")
    for width in (375, 1280):
        page, problems = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 800})
        assert problems == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    whole = cause.removeprefix("OutOfMemory: out of memory ")
    shown = page.locator("section[aria-labelledby=runs] td", has_text="out of memory")
    assert shown.text_content() == f"out of memory: {whole}"[:63].rstrip() + "…"
    assert shown.get_attribute("title") == cause
    big = page.locator("section[aria-labelledby=variants] tr", has_text="big").locator("td").first
    assert big.text_content().startswith("0 of 1; out of memory: on")
    assert page.locator("section[aria-labelledby=unfinished] td", has_text="3.00 GiB").text_content() == whole
    assert "7 runs of 3 variants, 6 finished, 1 out of memory." in page.text_content("main")
    record = json.loads((tmp_path / "page.json").read_text())
    (item,) = [item for item in record["comparisons"] if item["figure"] == "samples_per_second"]
    ratio, low, high = (item[key] for key in ("ratio", "low", "high"))
    assert low < ratio < high < 1
    assert page.text_content(".verdict") == record["verdict"]
    assert record["verdict"] == (
        f"sharded1 is {ratio:.2f}× as fast as plain1 (95% CI {low:.2f}–{high:.2f}). "
        "big has no finished run (out of memory)."
    )
    against = page.locator("section[aria-labelledby=against] tbody tr").first.locator("td").all_text_contents()
    assert f"{ratio:.3f}× ({low:.3f}–{high:.3f})" in against


def test_the_page_says_why_a_verdict_is_withheld(browser: Browser, tmp_path: Path) -> None:
    folders = three_of_each(tmp_path)
    for folder in folders[3:]:
        folder.summary.write_text(json.dumps({**json.loads(folder.summary.read_text()), "train_loss": 1.8}))
    withheld = report_on(folders, equal=["samples", "loss"])
    (tmp_path / "withheld.html").write_text(html_page(withheld.title, histories(withheld), withheld))
    page, problems = opened(browser, tmp_path / "withheld.html", viewport={"width": 375, "height": 800})
    assert problems == [] and page.evaluate("document.documentElement.scrollWidth") <= 375
    words = "the losses were declared equal but differ by more than 1.00%"
    answer = page.text_content(".verdict")
    assert answer.startswith(f"No verdict on the speed of sharded1 compared with plain1: {words}")
    assert "as fast" not in page.text_content("main") and page.locator("td", has_text="withheld").count() >= 3


def test_the_page_shows_where_the_time_went_and_what_bounds_each_variant(browser: Browser, made: Path) -> None:
    page, _ = opened(browser, made / "page.html")
    record = json.loads((made / "page.json").read_text())
    head, *body = page.eval_on_selector_all("section[aria-labelledby=time] tr", CELLS)
    for row, variant in zip(body, record["variants"], strict=True):
        shown = dict(zip(head, row, strict=True))
        assert shown["bound"] == variant["bound"]["kind"] == "arithmetic"
        assert shown["compute, ms/step"] == f"{variant['split']['compute_s'] * 1e3:,.1f} (80%)"
        assert (shown["data wait, ms/step"], shown["host, ms/step"]) == ("10.0 (2%)", "30.0 (6%)")
        assert (shown["evaluation, s"], shown["saving, s"]) == ("3.0", "1.5"), "repeats that gave one value"
    text = page.text_content("section[aria-labelledby=time]")
    for words in (
        "a<b>&c1 is bound by arithmetic: compute 80%, exposed communication 10%, copies 2%, data wait 2%, host 6%",
        "on NVIDIA H200",
        "MFU 0.500, HFU 0.600",
        "What would help: ",
    ):
        assert words in text
    bars = page.eval_on_selector_all("#chart-run_split details tr", CELLS)
    for row, variant in zip(bars[1:], record["variants"], strict=True):
        assert row[1:] == [f"{seconds:,.1f}" for seconds in variant["time"].values()]
    assert bars[0][-2:] == ["evaluation, s", "saving, s"]
    lines = page.eval_on_selector_all("#chart-memory details tbody tr", CELLS)
    assert len(lines) == 4 * 2 * STEPS and [lines[0][0], lines[STEPS][0]] == ["a<b>&c1, rank 0", "a<b>&c1, rank 1"]
    assert (lines[0][2], lines[STEPS][2]) == ("29", "30")


@pytest.mark.parametrize("media", ["print", "screen"])
def test_important_columns_are_visible_on_paper_screen_and_phone(browser: Browser, tmp_path: Path, media: Any) -> None:
    folders = [
        run_folder(tmp_path, f"compared_on_eight_devices-{name}-{turn}", strategy, speed + turn / 10, 1234.5)
        for name, strategy, speed in (("replicated", "ddp", 2000.0), ("sharded_by_layers", "fsdp", 1500.0))
        for turn in (1, 2)
    ]
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    for width in (718,) if media == "print" else (375, 1280):  # A4 between its margins
        page, _ = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 900})
        page.emulate_media(media=media)
        heads = page.locator("section[aria-labelledby=variants] thead th").all_text_contents()
        assert heads[:9] == [
            "variant",
            "finished",
            "samples/s",
            "speed-up",
            "tokens/s",
            "MFU",
            "peak memory, GiB",
            "energy per sample, J",
            "train time, s",
        ]
        rights = page.eval_on_selector_all("main > section > .scroll tbody tr", RIGHT_EDGES)
        seen = [right for row in rights for right in (row if width < 1280 else row[:4])]
        assert len(seen) > 24 and max(seen) <= width and min(seen) > 0
        shown = page.locator("section[aria-labelledby=variants] tbody tr").nth(1).locator("td").nth(2)
        assert shown.text_content().startswith("0.750× (") and shown.is_visible()
    if media == "print":
        assert page.locator("section[aria-labelledby=differs] li", has_text="strategy: ddp").first.is_visible()
        for folder in folders:  # as on a CPU: fewer columns, which are no narrower
            summary = json.loads(folder.summary.read_text())
            unknown = dict.fromkeys(
                ("mfu", "hfu", "peak_memory_gib", "energy_j", "joules_per_sample", "joules_per_step")
            )
            folder.summary.write_text(json.dumps({**summary, **unknown, "train_loss": summary["train_time_s"]}))
        report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
        page.reload()
        assert page.evaluate("document.documentElement.scrollWidth") <= 718


def test_the_page_has_the_sections_of_the_markdown(browser: Browser, tmp_path: Path) -> None:
    folders = [run_folder(tmp_path, name, "ddp", 20.0, 12.0) for name in ("a", "a2", "b")]
    folders[2].recipe.write_text(
        "strategy: ddp\nrun: {name: b, seed: 1}\nmodel: {name: other}\n" + "".join(f"x{n}: 1\n" for n in range(9))
    )
    for folder in folders:
        summary = json.loads(folder.summary.read_text())
        folder.summary.write_text(json.dumps({**summary, "energy_j": None}))
    for kind in ("html", "md"):
        report(tmp_path, *(str(folder.path) for folder in folders), "--output", f"page.{kind}")
    page, _ = opened(browser, tmp_path / "page.html")
    text, written = page.text_content("main"), (tmp_path / "page.md").read_text()
    for line in (
        "Repeats share the seed",
        "Not measured in any run:",
        "distft does not estimate it elsewhere",
        "within 1.00% of the first variant's",
        "model: name other (in b), not set (in a)",
        "x8: 1 (in b)",
        "What differs",
    ):
        assert line.split(":")[0] in written.replace("`", "") and line.split(":")[0] in text, line
    assert page.locator("section[aria-labelledby=equal] li", has_text="model").count() == 1, "why base_weights are not"
    assert page.locator("section[aria-labelledby=differs] details li").count() == 10


def test_a_page_is_self_contained(made: Path) -> None:
    text = (made / "page.html").read_text()
    assert "<script" not in text and "a<b>&c" not in text
    assert re.findall(r"(?:src|href)=\"(?!#)", text) == [] and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
