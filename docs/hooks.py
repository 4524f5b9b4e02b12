"""The pages of the site that are generated at build time: the recipe reference and the command reference."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from distft.config.reference import RecipeKey


def on_files(files: Files, config: Any) -> Files:
    for path, text in {"reference/recipe.md": recipes(), "reference/commands.md": commands()}.items():
        files.append(File.generated(config, path, content=text))
    return files


def recipes() -> str:
    """Every recipe field, section by section, from the schema."""
    from distft.config.reference import recipe_reference, section_descriptions

    parts = [
        "# Recipe reference",
        "",
        "Every field of a recipe. `distft recipes show NAME` prints the values of a recipe and where each comes from.",
        "A field without a default is required. Values are YAML, and `null` means none.",
        "",
    ]
    described = section_descriptions()
    fields = sorted(recipe_reference(), key=lambda key: bool(key.section))  # fields outside a section come first
    for section, keys in itertools.groupby(fields, key=lambda key: key.section):
        parts += [f"## {section}", "", described[section], ""] if section else ["## Top level", ""]
        parts += _fields(list(keys))
    return "\n".join(parts)


def _fields(keys: Sequence[RecipeKey]) -> list[str]:
    """The table of a section. An origin that all fields share is said once; a column without content is left out."""
    rows = [
        {
            "field": "`" + f"{key.section}.{key.key}".lstrip(".") + "`",
            "type": _cell(key.type),
            "default": f"`{_cell(key.default)}`" if key.default else "",
            "unit": key.unit or "",
            "defined by": key.origin,
            "description": _cell(key.description),
        }
        for key in keys
    ]
    origins = {key.origin for key in keys}
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    if len(origins) == 1:
        columns.remove("defined by")
    return [
        *([f"Defined by {origins.pop()}.", ""] if len(origins) == 1 else []),
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(row[name] for name in columns) + " |" for row in rows),
        "",
    ]


def commands() -> str:
    """Every command with its arguments, from the argparse parsers."""
    from distft.cli.main import parser

    parts = [
        "# Command reference",
        "",
        "Each command also prints this with `--help`. `--debug`, anywhere on the command line, shows tracebacks.",
        "",
    ]
    for command, help_text in _leaves(parser()):
        parts += [f"## {command.prog}", "", _sentence(help_text), "", *_usage(command)]
    return "\n".join(parts)


def _leaves(parser: argparse.ArgumentParser, help_text: str = "") -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The parsers that run something, depth first, each with its line of help."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not groups:
        yield parser, help_text
    for group in groups:
        described = {choice.dest: choice.help or "" for choice in group._choices_actions}
        for name, child in group.choices.items():
            yield from _leaves(child, described.get(name, ""))


def _usage(parser: argparse.ArgumentParser) -> list[str]:
    usage = " ".join(parser.format_usage().removeprefix("usage: ").split())
    lines = ["```text", *textwrap.wrap(usage, 88, subsequent_indent="    ", break_on_hyphens=False), "```", ""]
    rows = [
        f"| `{_name(action)}` | {_cell(_help(parser, action))} |"
        for action in parser._actions
        if action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    ]
    if rows:
        lines += ["| argument | meaning |", "| --- | --- |", *rows, ""]
    return lines


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return str(action.metavar or action.dest)
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {action.metavar or action.dest.upper()}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}".rstrip(".") + "." if text else ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
