"""The charts of a page in a real browser, and what happens without matplotlib."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from .conftest import CELLS, opened, report, run_folder

EDGES = """drawings => drawings.map(svg => [svg, ...svg.querySelectorAll('text')].map(element => {
    const box = element.getBoundingClientRect();
    return [box.left, box.right];
}))"""
"""The left and right edges of each drawing and of the texts in it."""


@pytest.mark.parametrize("count", [10, 54])
def test_points_are_distinct_labelled_and_not_cut_off(browser: Browser, tmp_path: Path, count: int) -> None:
    folders = [
        run_folder(tmp_path, f"grid_of_many-r{n}", "ddp", 20.0 + (n * 37 % count) / 2, 12.0 + n / 4)
        for n in range(count)
    ]
    for n, folder in enumerate(folders):
        folder.recipe.write_text(f"strategy: ddp\nrun: {{name: {folder.name}, seed: 1}}\nlora: {{r: {n}}}\n")
    report(tmp_path, *(str(folder.path) for folder in folders), "--output", "page.html")
    page, problems = opened(browser, tmp_path / "page.html", viewport={"width": 1280, "height": 900})
    assert problems == []
    rows = page.eval_on_selector_all("#chart-pareto tbody tr", CELLS)
    front = [row[0] for row in rows if row[3] == "yes"]
    texts = page.locator("#chart-pareto svg text").all_text_contents()
    assert len(front) >= 4 and set(front) <= set(texts), "the legend has those on the front"
    assert len({name.split("-")[1] for name in front} & set(texts)) >= 3, "and they are named in place"
    assert {title.strip() for title in page.locator("#chart-pareto svg title").all_text_contents()} == {
        f.name for f in folders
    }
    boxes = page.eval_on_selector_all("figure svg", EDGES)
    for (left, right), *inside in boxes:
        assert min(start for start, _ in inside) >= left - 1 and max(end for _, end in inside) <= right + 1
    captions = page.locator("figcaption").all_text_contents()
    assert max(map(len, captions)) < 400 and any(f"and {count - 4} more" in caption for caption in captions)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    html = page.evaluate("document.documentElement.outerHTML")
    asked = re.findall(r'(?:url\(#|href="#)([^)"]+)', html)
    assert asked and set(asked) <= set(ids)


def test_without_matplotlib_the_error_says_what_to_install(made: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = [sys.executable, "-m", "distft.cli", "report", str(next(made.glob("sharded*"))), "--output", "page.html"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 2 and not (tmp_path / "page.html").exists()
    assert done.stderr.startswith("distft: the charts of a report need matplotlib, which is not installed")
    assert "pip install 'distft[report]'" in done.stderr
