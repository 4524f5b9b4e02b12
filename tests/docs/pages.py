"""The pages of the documentation, and what tests read from them: code blocks, commands, tables.

Blocks marked `sh` are commands. One that cannot run everywhere ends in `# needs a GPU`, `# needs the hub` or `# needs
SLURM`; if the first line of a block says so, it applies to the whole block. Blocks marked `console` are commands with
their output; `python` and `yaml` blocks are what they say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def needs_another_machine(line: str) -> bool:
    """Whether the comment of `line` says that it needs a GPU, the hub or SLURM."""
    return bool(re.search(r"#.*needs (a GPU|the hub|SLURM)", line))


@dataclass(frozen=True)
class Command:
    """A line of an `sh` block. `elsewhere`: it needs a GPU, the hub or SLURM."""

    text: str
    elsewhere: bool


@dataclass(frozen=True)
class Page:
    path: Path

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def blocks(self, *languages: str) -> list[tuple[str, str]]:
        """Language and text of every block in one of `languages`, in the order of the page."""
        return re.findall(rf"^```({'|'.join(languages)})\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)

    @property
    def commands(self) -> list[Command]:
        return [command for _, text in self.blocks("sh") for command in commands(text)]

    def section(self, heading: str) -> str:
        """The text under a heading of the second level."""
        return self.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]

    def tables(self, heading: str = "") -> list[list[list[str]]]:
        """The cells of the tables under `heading`, or of the whole page, without their heads."""
        text = self.section(heading) if heading else self.text
        return [
            [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
            for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
        ]

    def names(self, heading: str) -> list[str]:
        """The first column of the only table under `heading`, without backticks."""
        (table,) = self.tables(heading)
        return [row[0].strip("`") for row in table]


def commands(text: str) -> list[Command]:
    """The commands of an `sh` block, one per line, with their comments."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line]
    all_elsewhere = lines[0].startswith("#") and needs_another_machine(lines[0])
    return [Command(line, all_elsewhere or needs_another_machine(line)) for line in lines if not line.startswith("#")]


def _in_order(nav: list[dict[str, object]]) -> list[str]:
    found: list[str] = []
    for entry in nav:
        for target in entry.values():
            found += _in_order(target) if isinstance(target, list) else [str(target)]
    return found


SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
README = Page(ROOT / "README.md")
PAGES = [README, *(Page(ROOT / "docs" / path) for path in _in_order(SITE["nav"]) if (ROOT / "docs" / path).is_file())]
"""The README and the pages of the site in their order; pages that are generated are left out."""


def page(name: str) -> Page:
    return Page(ROOT / "docs" / f"{name}.md")
