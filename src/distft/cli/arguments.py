"""What several commands share: the words they take and how they list files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers()` returns, for which argparse has no public name."""
RECIPE = "recipe=NAME, or just the name or the YAML file, and any number of key.path=value overrides"


def is_experiment(words: Sequence[str]) -> bool:
    return any(word.startswith("experiment=") for word in words)


def print_files(files: Mapping[str, Path]) -> None:
    """Print the name of each recipe or experiment with the first comment of its file."""
    from distft.config.yaml import first_comment

    for name, path in files.items():
        print(f"{name:<16} {first_comment(path.read_text(encoding='utf-8'))}".rstrip())
