"""The page of a report, in a real browser: no script, no request, legible on a phone and in the dark, with the figures of its JSON."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from distft.runs.folder import RunFolder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS = 30
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


def run_folder(parent: Path, name: str, strategy: str, speed: float, memory: float) -> RunFolder:
    """What a run leaves behind, with its figures drawn from a formula."""
    folder = RunFolder(parent / name)
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(f"strategy: {strategy}\nrun: {{name: {name}, seed: 1}}\n")
    folder.environment.write_text(json.dumps({"gpus": [{"name": "NVIDIA H200"}]}))
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 3 / step**0.3, "learning_rate": 1e-4 * (1 - step / STEPS), "samples": 8 * step, "tokens": 800 * step,
         "time_s": 8 * step / speed, "samples_per_second": speed + step % 3, "peak_memory_gib": memory, "host_rss_gib": 2.0,
         "peak_memory_by_rank_gib": [memory - 1, memory], "host_rss_by_rank_gib": [2.0, 1.5]}
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    records += [{"step": step, "eval_loss": 2.0, "eval_perplexity": 20 - step / 3} for step in (10, 20, 30)]
    folder.append_metrics(*records)
    summary = {
        "status": "finished", "cause": None, "strategy": strategy, "world_size": 2, "steps": STEPS, "samples": 8 * STEPS, "tokens": 800 * STEPS,
        "global_batch_size": 8, "train_loss": 1.5, "train_time_s": 8 * STEPS / speed, "samples_per_second": speed, "tokens_per_second": 100 * speed,
        "peak_memory_gib": memory, "eval_before": {"loss": 3.0, "perplexity": 20.1}, "eval_after": {"loss": 2.0, "perplexity": 7.4}, "restarts": 0,
        "step_time_s": 8 / speed, "evaluation_time_s": 3.0, "saving_time_s": 1.5, "data_wait_s": 0.5, "gradient_accumulation_steps": 1, "mfu": 0.5, "hfu": 0.6,
        "energy_j": 9000.0, "joules_per_sample": 37.5, "joules_per_step": 300.0, "energy_idle_share": 0.2,
    }  # fmt: skip
    folder.summary.write_text(json.dumps(summary))
    ranks = [{"rank": rank, "step_time_s": 0.5, "compute_s": 0.4, "communication_exposed_s": 0.05, "copy_exposed_s": 0.01, "idle_s": 0.04,
              "data_wait_s": 0.01, "products_s": 0.3} for rank in (0, 1)]  # fmt: skip
    folder.profile.write_text(json.dumps({"steps": [4, 6], "device": "cuda", "ranks": ranks}))
    return folder


def command(where: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "distft.cli", "report", *words]
    return subprocess.run(program, cwd=where, capture_output=True, text=True)


def report(where: Path, *words: str) -> None:
    done = command(where, *words)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two variants, twice each, one with a name that HTML would take for its own; page.html and page.json."""
    where = tmp_path_factory.mktemp("report")
    folders = [
        run_folder(where, f"{name}{repeat}", strategy, speed + repeat / 10, memory)
        for name, strategy, speed, memory in (("a<b>&c", "ddp", 20.0, 30.0), ("sharded", "fsdp", 15.0, 12.0))
        for repeat in (1, 2)
    ]
    for kind in ("html", "json"):
        report(where, *(str(folder.path) for folder in folders), "--output", f"page.{kind}")
    return where


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        if os.environ.get("DISTFT_CI"):
            pytest.fail("there is no Chromium, and continuous integration brings it")
        pytest.skip("there is no Chromium here (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, **options: Any) -> tuple[Any, list[str]]:
    """The page, and what went wrong or went out while it was opened."""
    page = browser.new_context(offline=True, **options).new_page()
    told: list[str] = []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: told.append(request.url) if request.url != file.as_uri() else None)
    page.goto(file.as_uri())
    return page, told


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1280])
def test_every_chart_is_drawn_and_nothing_is_asked_of_the_network(
    browser: Browser, made: Path, width: int, scheme: Any
) -> None:
    page, told = opened(browser, made / "page.html", viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert told == []
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
    contrast = page.evaluate("""() => {
        const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
                                  return .2126 * r + .7152 * g + .0722 * b; };
        const ground = light(getComputedStyle(document.body).backgroundColor);
        const against = colour => { const [a, b] = [light(colour), ground].sort((x, y) => y - x); return (a + .05) / (b + .05); };
        const lines = [...document.querySelectorAll('figure path')].map(p => getComputedStyle(p)).filter(s => s.stroke.startsWith('rgb'));
        const series = lines.filter(s => parseFloat(s.strokeWidth) > 1.2).map(s => against(s.stroke));
        const texts = [...document.querySelectorAll('p, td, th, figcaption, figure text')].map(t => getComputedStyle(t)).map(s => against(s.fill !== 'rgb(0, 0, 0)' ? s.fill : s.color));
        return [Math.min(...series), Math.min(...texts)];
    }""")
    assert 3 <= contrast[0] <= 21 and 4.5 <= contrast[1] <= 21, "WCAG 2.1: 3 for graphics, 4.5 for text"


def test_the_figures_of_the_page_are_those_of_the_json(browser: Browser, made: Path) -> None:
    page, _ = opened(browser, made / "page.html")
    record = json.loads((made / "page.json").read_text())
    rows = page.evaluate(
        "[...document.querySelectorAll('section')].map(s => [s.getAttribute('aria-labelledby'), [...s.querySelectorAll(':scope > .scroll tr')].map(r => [...r.cells].map(c => c.textContent))])"
    )
    tables = {key: cells for key, cells in rows if cells}
    head, *body = tables["variants"]
    assert [row[0] for row in body] == [variant["name"] for variant in record["variants"]] == ["a<b>&c1", "sharded1"]
    for row, variant in zip(body, record["variants"], strict=True):
        shown = row[head.index("samples/s")]
        spread = variant["spreads"]["samples_per_second"]
        assert shown == f"{spread['median']:,.2f} ({spread['least']:,.2f} – {spread['greatest']:,.2f})"
    head, *body = tables["runs"]
    assert [float(row[head.index("peak memory, GiB")]) for row in body] == [
        run["figures"]["peak_memory_gib"] for run in record["runs"]
    ]
    assert "sharded1 is 1.33 times as slow as a<b>&c1" in page.text_content(".verdict")
    drawn = page.evaluate(
        "[...document.querySelectorAll('#chart-loss_step details tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert len(drawn) == 4 * STEPS and drawn[0] == ["a<b>&c1", "1", "3"]


def test_the_page_tells_why_a_run_has_no_figures_and_why_a_verdict_is_withheld(
    browser: Browser, tmp_path: Path
) -> None:
    folders = [run_folder(tmp_path, f"{name}{turn}", strategy, speed + turn / 10, 12.0)
               for name, strategy, speed in (("plain", "ddp", 20.0), ("sharded", "fsdp", 15.0)) for turn in (1, 2, 3)]  # fmt: skip
    big = run_folder(tmp_path, "big", "single", 1.0, 140.0)
    cause = "OutOfMemory: out of memory on rank 0 with a micro-batch of 16 samples: 3.00 GiB were asked for, <1.00> of the GPU's 8.00 GiB are free."
    big.summary.write_text(json.dumps({"status": "failed", "cause": cause, "strategy": "single", "world_size": 1}))
    report(tmp_path, *(str(folder.path) for folder in (*folders, big)), "--output", "page.html")
    report(tmp_path, *(str(folder.path) for folder in (*folders, big)), "--output", "page.json")
    for width in (375, 1280):
        page, told = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 800})
        assert told == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    whole = cause.removeprefix("OutOfMemory: out of memory ")
    shown = page.locator("section[aria-labelledby=runs] td", has_text="out of memory")
    assert (
        shown.text_content() == f"out of memory: {whole}"[:63].rstrip() + "…" and shown.get_attribute("title") == cause
    )
    assert (
        page.locator("section[aria-labelledby=variants] tr", has_text="big")
        .locator("td")
        .first.text_content()
        .startswith("0 of 1; out of memory: on")
    )
    assert page.locator("section[aria-labelledby=unfinished] td", has_text="3.00 GiB").text_content() == whole
    assert "7 runs of 3 variants, 6 finished, 1 out of memory." in page.text_content("main")
    record = json.loads((tmp_path / "page.json").read_text())
    (item,) = [item for item in record["comparisons"] if item["figure"] == "samples_per_second"]
    assert item["low"] < item["ratio"] < item["high"] < 1
    assert page.text_content(".verdict") == record["verdict"]
    assert (
        record["verdict"]
        == f"sharded1 is {1 / item['ratio']:.2f} times as slow as plain1 ({1 / item['high']:.2f}–{1 / item['low']:.2f}); big has no finished run (out of memory)."
    )
    against = page.locator("section[aria-labelledby=against] tbody tr").first.locator("td").all_text_contents()
    assert f"× {item['ratio']:.3f} ({item['low']:.3f} – {item['high']:.3f})" in against

    summary = json.loads(folders[-1].summary.read_text())
    for folder in folders[3:]:
        folder.summary.write_text(json.dumps({**summary, "train_loss": 1.8}))
    program = (
        "import sys; from pathlib import Path; from distft.reports.html import histories, page; from distft.reports.report import report; from distft.runs.folder import RunFolder\n"
        "made = report([RunFolder(Path(word)) for word in sys.argv[1:]], equal=['samples', 'loss'])\n"
        "Path('withheld.html').write_text(page(made.title, histories(made), made))"
    )
    subprocess.run([sys.executable, "-c", program, *(str(folder.path) for folder in folders)], cwd=tmp_path, check=True)
    page, told = opened(browser, tmp_path / "withheld.html", viewport={"width": 375, "height": 800})
    assert told == [] and page.evaluate("document.documentElement.scrollWidth") <= 375
    words = page.text_content(".verdict")
    assert words.startswith(
        "The verdict on the speed of sharded1 against plain1 is withheld: the losses were declared equal and diverge by more than 1.00%"
    )
    assert "times as" not in page.text_content("main") and page.locator("td", has_text="withheld").count() >= 3


def test_the_page_says_where_the_time_went_and_what_bounds_each_variant(browser: Browser, made: Path) -> None:
    page, _ = opened(browser, made / "page.html")
    record = json.loads((made / "page.json").read_text())
    cells = "r => [...r.cells].map(c => c.textContent)"
    head, *body = page.evaluate(f"[...document.querySelectorAll('section[aria-labelledby=time] tr')].map({cells})")
    for row, variant in zip(body, record["variants"], strict=True):
        shown = dict(zip(head, row, strict=True))
        assert shown["bound"] == variant["bound"]["kind"] == "arithmetic"
        assert shown["compute, ms a step"] == f"{variant['split']['compute_s'] * 1e3:,.1f} (80%)"
        assert (shown["data wait, ms a step"], shown["host, ms a step"]) == ("10.0 (2%)", "30.0 (6%)")
        assert (shown["evaluation, s"], shown["saving, s"]) == ("3.0", "1.5"), "repeats that gave one value"
    told = page.text_content("section[aria-labelledby=time]")
    assert (
        "a<b>&c1 is bound by arithmetic: compute 80%, exposed communication 10%, copies 2%, data wait 2%, host 6%"
        in told
    )
    assert (
        "on NVIDIA H200" in told
        and "MFU 0.500, HFU 0.600 with recomputed layers" in told
        and "What would help: less arithmetic" in told
    )
    bars = page.evaluate(f"[...document.querySelectorAll('#chart-run_split details tr')].map({cells})")
    for row, variant in zip(bars[1:], record["variants"], strict=True):
        assert row[1:] == [f"{seconds:,.1f}" for seconds in variant["time"].values()]
    assert bars[0][-2:] == ["evaluation, seconds", "saving, seconds"]
    lines = page.evaluate(f"[...document.querySelectorAll('#chart-memory details tbody tr')].map({cells})")
    assert len(lines) == 4 * 2 * STEPS and [lines[0][0], lines[STEPS][0]] == ["a<b>&c1, rank 0", "a<b>&c1, rank 1"]
    assert (lines[0][2], lines[STEPS][2]) == ("29", "30")


@pytest.mark.parametrize("media", ["print", "screen"])
def test_what_matters_is_in_sight_on_paper_on_a_screen_and_on_a_phone(
    browser: Browser, tmp_path: Path, media: Any
) -> None:
    folders = [run_folder(tmp_path, f"compared_on_eight_devices-{name}-{turn}", strategy, speed + turn / 10, 1234.5)
               for name, strategy, speed in (("replicated", "ddp", 2000.0), ("sharded_by_layers", "fsdp", 1500.0)) for turn in (1, 2)]  # fmt: skip
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    for width in (718,) if media == "print" else (375, 1280):  # A4 between its margins
        page, _ = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 900})
        page.emulate_media(media=media)
        heads = page.locator("section[aria-labelledby=variants] thead th").all_text_contents()
        assert heads[:9] == ["variant", "finished", "samples/s", "speed-up", "tokens/s", "MFU", "peak memory, GiB", "J a sample", "train time, s"]  # fmt: skip
        rights = page.evaluate("""[...document.querySelectorAll('main > section > .scroll tbody tr')].map(row =>
            [...row.cells].map(cell => { const range = document.createRange(); range.selectNodeContents(cell); return range.getBoundingClientRect().right; }))""")
        seen = [right for row in rights for right in (row if width < 1280 else row[:4])]
        assert len(seen) > 24 and max(seen) <= width and min(seen) > 0
        shown = page.locator("section[aria-labelledby=variants] tbody tr").nth(1).locator("td").nth(2)
        assert shown.text_content().startswith("× 0.750 (") and shown.is_visible()
    if media == "print":
        assert page.locator("section[aria-labelledby=differs] li", has_text="strategy: ddp").first.is_visible()
        for folder in folders:  # of a CPU: fewer columns, which are no narrower
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
        "Repeats share the seed", "Not known of any run:", "nothing is estimated where there is none", "within 1.00% of the first variant's",
        "model: name other (in b), not set (in a)", "x8: 1 (in b)", "What differs",
    ):  # fmt: skip
        assert line.split(":")[0] in written.replace("`", "") and line.split(":")[0] in text, line
    assert page.locator("section[aria-labelledby=equal] li", has_text="model").count() == 1, "why base_weights are not"
    assert page.locator("section[aria-labelledby=differs] details li").count() == 10


@pytest.mark.parametrize("count", [10, 54])
def test_points_are_told_apart_named_and_not_cut(browser: Browser, tmp_path: Path, count: int) -> None:
    folders = [
        run_folder(tmp_path, f"grid_of_many-r{n}", "ddp", 20.0 + (n * 37 % count) / 2, 12.0 + n / 4)
        for n in range(count)
    ]
    for n, folder in enumerate(folders):
        folder.recipe.write_text(f"strategy: ddp\nrun: {{name: {folder.name}, seed: 1}}\nlora: {{r: {n}}}\n")
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    page, told = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 900})
    assert told == []
    rows = page.evaluate(
        "[...document.querySelectorAll('#chart-pareto tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    front = [row[0] for row in rows if row[3] == "yes"]
    texts = page.locator("#chart-pareto svg text").all_text_contents()
    assert len(front) >= 4 and set(front) <= set(texts), "the legend has those on the front"
    assert len({name.split("-")[1] for name in front} & set(texts)) >= 3, "and they are named in place"
    assert {title.strip() for title in page.locator("#chart-pareto svg title").all_text_contents()} == {
        f.name for f in folders
    }
    boxes = page.evaluate(
        """[...document.querySelectorAll('figure svg')].map(svg => [svg.getBoundingClientRect(), ...[...svg.querySelectorAll('text')].map(t => t.getBoundingClientRect())].map(b => [b.left, b.right]))"""
    )
    for (left, right), *inside in boxes:
        assert min(start for start, _ in inside) >= left - 1 and max(end for _, end in inside) <= right + 1
    captions = page.locator("figcaption").all_text_contents()
    assert max(map(len, captions)) < 400 and any(f"and {count - 4} more" in caption for caption in captions)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    asked = page.evaluate(
        """[...document.documentElement.outerHTML.matchAll(/(?:url\\(#|href="#)([^)"]+)/g)].map(m => m[1])"""
    )
    assert asked and set(asked) <= set(ids)


def evaluated(parent: Path, name: str, verdict: str = "gain") -> RunFolder:
    """A run with the figures of an evaluation as wide as they come, and with a judge that goes by the place."""
    folder = run_folder(parent, name, "ddp", 20.0, 30.0)

    def figure(title: str, form: str, scale: float, verdict: str) -> dict[str, Any]:
        sides = {side: {"value": by * scale, "low": 0.9 * by * scale, "high": 1.1 * by * scale}
                 for side, by in (("base", 1.0), ("adapter", 0.5), ("difference", -0.5))}  # fmt: skip
        return {
            "title": title,
            "better": "lower",
            "form": form,
            "count": 12_240,
            "level": 0.95,
            **sides,
            "verdict": verdict,
        }

    evaluation = {
        "perplexity": {"figures": {"perplexity": figure("held-out perplexity", ",.2f", 8079.12, verdict)}},
        "imdb": {
            "figures": {"accuracy": figure("accuracy", ".3f", 0.9, "inconclusive"),
                        "generation_unparsed": figure("answers without a label word by generation", ".3f", 0.9, "inconclusive")},
            "confusion": {"rows": ["negative", "positive"], "columns": ["negative", "positive", "unparsed"],
                          "logprob": {side: [[101, 11, 0], [7, 105, 0]] for side in ("base", "adapter")}},
            "unparsed": {"base": {"count": 224, "first": ["Tell <b>me</b> something. " * 3, "and " * 40]}},
        },
        "mt_bench": {
            "figures": {"score": figure("MT-Bench score out of 10", ".2f", 8.0, "too few items")},
            "categories": {word: {"count": 10, "base": {"value": 7.0, "low": 6.0, "high": 8.0}} for word in ("humanities", "math")},
        },
        "alpaca": {
            "figures": {"preferred_rate": figure("AlpacaEval pairs won, asked which is better in both orders", ".1%", 0.5, "inconclusive")},
            "outcomes": {"base": {"win": 0, "tie": 805, "loss": 0, "unparsed": 0}}, "judge": {"mode": "pairwise"},
            "position": {"base": {"first_preferred": 1.0, "inconsistent": 805, "pairs": 805}},
        },
    }  # fmt: skip
    folder.summary.write_text(json.dumps({**json.loads(folder.summary.read_text()), "evaluation": evaluation}))
    return folder


@pytest.mark.parametrize("runs", [1, 2])
@pytest.mark.parametrize("width", [375, 1300])
def test_difference_and_verdict_of_an_evaluation_are_in_sight(
    browser: Browser, tmp_path: Path, width: int, runs: int
) -> None:
    folders = [evaluated(tmp_path, f"tiny_sentiment-seed{number}-rank32") for number in range(runs)]
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    page, told = opened(browser, tmp_path / "page.html", viewport={"width": width, "height": 900})
    assert told == [] and page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate("""[...document.querySelectorAll('section[aria-labelledby^=evaluation] .scroll')].map(box => [
        box.scrollWidth, box.clientWidth,
        ...[...box.querySelectorAll('tbody :is(th, td)')].map(cell => cell.getBoundingClientRect()).map(cell => cell.right)])""")
    assert len(boxes) == 5, "figures, a matrix, answers, categories, outcomes"
    for whole, seen, *rights in boxes:
        assert whole <= seen and max(rights) <= width, "nothing has to be scrolled for"
    table = page.locator("section[aria-labelledby=evaluation] table")
    assert table.get_by_role("row").count() == 5 * runs + (width > 375), (
        "rows for those who hear the page, whatever they look like"
    )
    cell = table.get_by_role("cell", name="-4,039.56").first
    assert cell.text_content() == "-4,039.56 [-3,635.60,\u00a0-4,443.52]"
    gain = table.get_by_role("cell", name="gain").first
    assert gain.is_visible() and gain.bounding_box()["y"] < page.locator("#charts").bounding_box()["y"]
    sizes = page.evaluate(
        "[...document.querySelectorAll('section[aria-labelledby^=evaluation] :is(th, td)')].map(c => parseFloat(getComputedStyle(c).fontSize))"
    )
    assert min(sizes) >= 14
    if width == 375:
        named = page.evaluate("getComputedStyle(document.querySelector('.stacked td:last-child'), '::before').content")
        assert named == "attr(data-head)" or named == '"verdict"', (
            "each cell has its head before it, for the head is above no column"
        )
        lefts = page.evaluate("""[...document.querySelectorAll('.stacked tbody tr')].slice(0, 5).map(row =>
            new Set([...row.cells].map(cell => Math.round(cell.getBoundingClientRect().left))).size)""")
        assert set(lefts) == {1}, "the cells of a row stand below each other"
    bars = page.evaluate("""[...document.querySelectorAll('#chart-evaluation_alpaca svg')].map(svg => {
        const texts = [...svg.querySelectorAll('text')].filter(t => /AlpacaEval|asked|orders/.test(t.textContent)).map(t => t.getBoundingClientRect());
        return [Math.max(...texts.map(t => t.width)), svg.getBoundingClientRect().width]; })""")
    assert bars and all(label < whole / 2 for label, whole in bars), "a label leaves room for its bar"


def test_the_page_of_one_run_says_what_its_fine_tune_changed(browser: Browser, tmp_path: Path) -> None:
    for name, verdict, headline in (
        ("changed", "gain", "The fine-tune changed held-out perplexity 8,079.12 → 4,039.56 (gain)."),
        ("same", "inconclusive", "No change could be shown: inconclusive for held-out perplexity, imdb accuracy; "),
    ):  # fmt: skip
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
        assert headings == ["imdb: confusion matrix by likelihood", "imdb: answers without a label word", "mt_bench: score out of 10 by category",
                            "alpaca: outcomes, compared in both orders"]  # fmt: skip


def test_a_page_holds_all_that_it_needs(made: Path) -> None:
    text = (made / "page.html").read_text()
    assert "<script" not in text and "a<b>&c" not in text
    assert re.findall(r"(?:src|href)=\"(?!#)", text) == [] and "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_a_log_of_anybody_s_trainer_has_a_page(browser: Browser, tmp_path: Path) -> None:
    history = [
        {"step": step, "epoch": step / 10, "loss": 2 / step, "learning_rate": 1e-4, "grad_norm": 1.0}
        for step in range(1, 9)
    ]
    history.append({"step": 8, "eval_loss": 1.0, "eval_runtime": 3.0})
    history.append({"step": 8, "train_runtime": 12.5, "train_samples_per_second": 6.4, "train_loss": 0.7})
    history[-2] |= {"eval_accuracy": 0.75}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 8}))
    (tmp_path / "bare.json").write_text(json.dumps([{"step": "4", "eval_loss": 0.5}, *history]))
    report(tmp_path, "trainer_state.json", "bare.json", "--output", "log.html")
    page, told = opened(browser, tmp_path / "log.html")
    assert told == [] and page.title() == f"{tmp_path.name} and bare"
    assert {"chart-loss_step", "chart-learning_rate", "chart-eval_loss", "chart-eval_perplexity", "chart-eval_accuracy"} == {
        figure.get_attribute("id") for figure in page.query_selector_all("figure")
    }  # fmt: skip
    drawn = page.locator("#chart-eval_perplexity tbody tr").all_text_contents()
    assert drawn == [f"{tmp_path.name}82.71828", "bare41.64872", "bare82.71828"], "e to the loss"
    rows = page.locator("section[aria-labelledby=logs] tr")
    assert rows.nth(0).locator("th").all_text_contents() == [
        "log", "steps", "last train loss", "mean train loss", "best eval loss", "last eval loss", "last perplexity", "train time, s", "samples/s",
    ]  # fmt: skip
    assert rows.nth(2).locator("td").all_text_contents() == ["8", "0.2500", "0.7000", "0.5000", "1.0000", "2.72", "12.5", "6.40"]  # fmt: skip
    record = json.loads((tmp_path / "log.json").read_text())
    assert [log["name"] for log in record["logs"]] == [tmp_path.name, "bare"]
    assert record["logs"][1]["figures"]["best_eval_loss"] == 0.5
    report(tmp_path, "trainer_state.json")
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 8, "no report over what was read"
    assert (tmp_path / "trainer_state.html").is_file()
    report(tmp_path, "trainer_state.json", "--output", "one.md")
    assert (tmp_path / "one.md").read_text().startswith(f"# {tmp_path.name}\n\n## Logs\n")
    (tmp_path / "no.json").write_text('{"a": 1}')
    done = subprocess.run(
        [sys.executable, "-m", "distft.cli", "report", "no.json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and "holds no log_history" in done.stderr


def test_what_a_log_lacks_or_holds_wrongly_is_told(tmp_path: Path) -> None:
    for text, told in (
        ("[]", "holds an empty log_history"),
        ('[{"loss": 2.5, "epoch": 1}]', "none of the 1 records in log.json has a step"),
        ("", "cannot be read as JSON"),
    ):
        (tmp_path / "log.json").write_text(text)
        done = command(tmp_path, "log.json")
        assert done.returncode == 2 and told in done.stderr
    (tmp_path / "log.json").write_text(
        '[{"step": "1", "loss": NaN}, {"step": 2, "loss": "2.5"}, {"step": 3, "loss": Infinity}, {"loss": 1}, 7]'
    )
    assert command(tmp_path, "log.json", "--output", "page.html").stdout == "report: page.html, page.md, page.json\n"
    for kind in ("html", "md"):
        text = (tmp_path / f"page.{kind}").read_text().replace("`", "")
        assert "log: 2 values left out, NaN or infinite." in text
        assert "log: 2 records left out, without a step that is a whole number." in text
    (log,) = json.loads(command(tmp_path, "log.json", "--json").stdout)["logs"]
    assert (log["figures"], log["unread"], log["infinite"]) == ({"steps": 3, "last_train_loss": 2.5}, 2, 2)


def test_a_folder_of_somebody_s_trainer_and_all_that_lies_beside_runs(made: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(next(made.glob("sharded*")), runs / "sharded")
    (runs / "logs").mkdir()
    for step in (9, 10):
        state = runs / "theirs" / f"checkpoint-{step}" / "trainer_state.json"
        state.parent.mkdir(parents=True)
        state.write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    for name in ("x.html", "x.md", "x.json"):
        (runs / name).write_text('{"verdict": ""}')
    words = sorted(str(path.relative_to(tmp_path)) for path in runs.iterdir())
    done = command(tmp_path, *words, "--json")
    record = json.loads(done.stdout)
    assert [run["name"] for run in record["runs"]] == ["sharded"]
    assert [(log["name"], log["figures"]["steps"]) for log in record["logs"]] == [("theirs/checkpoint-10", 10)]
    assert done.stderr.count("distft: skipped: ") == 4 and "skipped: runs/x.json holds no log_history" in done.stderr
    assert "# 1 run\n" in (both := command(tmp_path, *words).stdout) and "## Logs" in both
    assert command(tmp_path, "runs/logs").returncode == 2
    missing = command(tmp_path, "runs/sharded", "runs/typo")
    assert missing.returncode == 2 and "runs/typo" in missing.stderr
    (tmp_path / "page.md").write_text("# Mine\n")
    done = command(tmp_path, "runs/sharded", "--output", "page.html")
    assert done.stdout == "report: page.html, page.json\n" and "page.md is not a distft report" in done.stderr
    assert command(tmp_path, "runs/sharded", "--output", "page.html").stdout == done.stdout, "its own it writes anew"
    assert (tmp_path / "page.md").read_text() == "# Mine\n"


def test_without_matplotlib_it_is_said_what_to_install(made: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "distft.cli", "report", str(next(made.glob("sharded*"))), "--output", "page.html"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.returncode == 2 and not (tmp_path / "page.html").exists()
    assert done.stderr == (
        "distft: the charts of a report need matplotlib, which is not installed: pip install 'distft[report]', or matplotlib itself\n"
    )
