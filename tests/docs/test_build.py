"""The site builds strictly, which checks its links; it asks nothing of a network; its generated pages are complete."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown.extensions.toc import slugify

import distft

from .pages import PAGES, README, ROOT, Page
from .test_tables import KEYS

DOCUMENTS = [README, Page(ROOT / "CONTRIBUTING.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return folder


def test_every_page_is_built(site: Path) -> None:
    for each in PAGES[1:]:
        assert (site / each.path.relative_to(ROOT / "docs")).with_suffix(".html").is_file()


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]+href=\"?([^\" >]+)", text)
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], path.name


def test_the_references_are_complete(site: Path) -> None:
    def shown(name: str) -> str:
        return html.unescape((site / "reference" / f"{name}.html").read_text(encoding="utf-8"))

    fields = {key for key in KEYS if not any(other.startswith(f"{key}.") for other in KEYS)}
    own = {key for key in fields if not key.startswith(("lora.", "training."))}
    recipes, commands, python = shown("recipe"), shown("commands"), shown("python")
    assert {key for key in own if f"<code>{key}</code>" not in recipes} == set()
    assert {"lora.r", "training.learning_rate"} <= set(re.findall(r"<code>([\w.]+)</code>", recipes))
    assert "distft recipes validate" in commands and "--no-bandwidth" in commands
    ids = set(re.findall(r'id="distft\.(?:api\.\w+\.)?(\w+)"', python))
    assert set(distft.__all__) <= ids


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: each.path.stem)
def test_links_of_documents_outside_the_site_have_targets(document: Page) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", document.text):
        path = ROOT / target if target else document.path
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slugify(heading, "-") for heading in headings}, anchor
