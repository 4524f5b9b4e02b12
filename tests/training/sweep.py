"""Every key of a recipe with values that are unusual, of a wrong type, or absurd, and what comes of a command with one.

hypothesis draws the values by the type of the field, always the same ones.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
import tempfile
import traceback
import types
import typing
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distft.config.overrides import override_text
from distft.config.recipe import Recipe
from distft.config.upstream import UPSTREAMS, upstream_section
from distft.console import quiet_libraries
from distft.errors import DistftError

Kind = Literal["unusual", "wrong type", "absurd"]
DRAWS: dict[Kind, int] = {"unusual": 4, "wrong type": 3, "absurd": 4}
TEXTS = st.sampled_from(
    [
        "ä – 漢字 🦙",
        "x y",
        "a.b",
        "../up",
        "~",
        "%s{0}$HOME",
        "no",
        "q_proj",
        "0",
        "[",
        "-",
        "x" * 300,
        "a'b\"c",
        "\\d+",
    ]
)
ABSURD = (
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "-1e400",
    "-0.0",
    "1e-320",
    "-1",
    "0",
    "1000000000000000000000000000000",
    "-9223372036854775809",
    "1_000",
    "0x10",
    "x" * 10_000,
    "'" + "long " * 2_000 + "'",
    "''",
    "' '",
    '"\\0"',
    '"\\ud800"',
    '"a\\nb"',
    "2026-01-31",
    "2026-01-31T12:00:00Z",
    "12:30:45",
    "[[[[[[1]]]]]]",
    "[" * 40 + "]" * 40,
    "[null, null]",
    "[1, a, 2.5, true]",
    "{a.b: {c.d: 1}}",
    "{1: 2, null: 3}",
    "{a: {b: {c: {}}}}",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!python/object/apply:os.getcwd []",
    "&a [*a]",
    "{a: 1, a: 2}",
    "yes",
    "~",
    "null",
    "[]",
    "{}",
)
"""YAML that a person, a template or a program may leave behind."""


@dataclass(frozen=True)
class Case:
    """One key with a value, as YAML text."""

    key: str
    text: str
    kind: Kind

    def __str__(self) -> str:
        shown = self.text if len(self.text) < 60 else f"{self.text[:40]}… ({len(self.text)} characters)"
        return f"{self.key}={shown}"

    @property
    def word(self) -> str:
        return f"{self.key}={self.text}"


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, the message if it is not 0, and what it printed that it should not."""

    code: int
    message: str = ""
    noise: str = ""

    @property
    def fault(self) -> str:
        """What is wrong with this outcome; "" if nothing is."""
        if self.code not in (0, 2):
            return f"exit code {self.code}: {self.message[-3000:]}"
        if self.noise:
            return f"printed {self.noise[:500]!r}"
        if self.code == 2 and (not self.message.strip() or "Traceback" in self.message or len(self.message) > 4_000):
            return f"a bad message ({len(self.message)} characters): {self.message[:500]!r}"
        return ""


def fields() -> Iterator[tuple[str, FieldInfo]]:
    """Every key that a recipe may set, with its field."""
    for name, field in Recipe.model_fields.items():
        if name in UPSTREAMS:
            section = upstream_section(name)  # type: ignore[arg-type]
            yield from ((f"{name}.{key}", each) for key, each in section.model_fields.items())
        else:
            yield from _below(name, field)
    yield from ((name, Recipe.model_fields[name]) for name in UPSTREAMS)


def _below(key: str, field: FieldInfo) -> Iterator[tuple[str, FieldInfo]]:
    yield key, field
    options = (field.annotation, *typing.get_args(field.annotation))
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            for name, inner in option.model_fields.items():
                yield from _below(f"{key}.{name}", inner)


def cases(count: int | None = None) -> list[Case]:
    """All cases, each once; or those of `count` keys, always the same ones."""
    chosen = list(fields()) if count is None else random.Random(0).sample(list(fields()), count)
    found: dict[Case, None] = {}
    for key, field in chosen:
        fitting = _values(field.annotation, field.metadata)
        others = st.one_of(*(each for kind, each in _PLAIN.items() if kind not in _kinds(field.annotation)))
        for value in _drawn(fitting, DRAWS["unusual"], f"unusual {key}"):
            found[Case(key, override_text(value), "unusual")] = None
        for value in _drawn(others, DRAWS["wrong type"], f"wrong type {key}"):
            found[Case(key, override_text(value), "wrong type")] = None
        for text in _drawn(st.sampled_from(ABSURD), DRAWS["absurd"], f"absurd {key}"):
            found[Case(key, text, "absurd")] = None
    return list(found)


_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.booleans(),
    int: st.integers(-3, 10_000),
    float: st.floats(-2.0, 2.0, width=32).filter(lambda value: value != int(value)),
    str: TEXTS,
    list: st.lists(st.integers(0, 9) | TEXTS, min_size=1, max_size=3),
    dict: st.dictionaries(st.sampled_from(["a", "b.c", "lr"]), st.integers(0, 9), min_size=1, max_size=2),
}


def _kinds(annotation: Any) -> set[Any]:
    """Which of `_PLAIN` a type admits."""
    if annotation is Any:
        return set(_PLAIN) - {list}
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(_kinds, typing.get_args(annotation)))
    if origin is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {dict}
    return {origin or annotation} | ({int} if annotation is float else set())


def _values(annotation: Any, metadata: Sequence[Any] = ()) -> st.SearchStrategy[Any]:
    """Values of a type, within its bounds and its pattern."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    low = next(
        (
            each.ge if hasattr(each, "ge") else each.gt
            for each in metadata
            if hasattr(each, "ge") or hasattr(each, "gt")
        ),
        None,
    )
    if origin is typing.Annotated:
        inner = getattr(arguments[1], "metadata", arguments[1:])
        return _values(arguments[0], [*metadata, *inner])
    if origin in (typing.Union, types.UnionType):
        return st.one_of([_values(each, metadata) for each in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if annotation is type(None):
        return st.none()
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.sampled_from([0, 1, 2, 3, 7, 64, 1_000, 2**31]).filter(lambda value: low is None or value >= low)
    if annotation is float:
        return st.sampled_from([0.0, 1e-8, 0.05, 0.5, 0.999, 1.0, 3.7, 1e4]).filter(
            lambda value: low is None or value >= low
        )
    if annotation is str:
        pattern = next((each.pattern for each in metadata if getattr(each, "pattern", None)), None)
        return TEXTS if pattern is None else st.from_regex(re.compile(pattern, re.ASCII), fullmatch=True)
    if origin is list or annotation is list:
        return st.lists(_values(arguments[0]) if arguments else TEXTS, max_size=3)
    if origin is dict or annotation is dict:
        keys, each = arguments or (str, Any)
        return st.dictionaries(_values(keys), _values(each), max_size=2)
    if origin is tuple or annotation is tuple:
        return st.lists(st.floats(0, 1), min_size=2, max_size=2)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _values(dict)
    return st.one_of(*_PLAIN.values())


def _drawn(values: st.SearchStrategy[Any], count: int, name: str) -> list[Any]:
    """`count` values, or as many as there are; always the same ones for a `name`."""
    found: list[Any] = []

    @seed(zlib.crc32(name.encode()))
    @settings(
        max_examples=3 * count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(values)
    def collect(value: Any) -> None:
        if len(found) < count and value not in found:
            found.append(value)

    collect()
    return found


def outcome_of(work: Callable[[], object]) -> Outcome:
    """Run `work` as `distft` would, in this process, and catch everything that it prints."""
    with _caught() as printed, warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)  # as Python does for a command
        quiet_libraries()
        try:
            work()
            code, message = 0, ""
        except DistftError as error:
            code, message = error.exit_code, str(error)
        except Exception:
            code, message = 1, traceback.format_exc()
    return Outcome(code, message, printed.getvalue())


@contextlib.contextmanager
def _caught() -> Iterator[io.StringIO]:
    """What a block writes to the descriptors of standard output and error, once it has ended."""
    text = io.StringIO()
    with tempfile.TemporaryFile() as file:
        before = os.dup(1), os.dup(2)
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
                yield text
        finally:
            os.dup2(before[0], 1), os.dup2(before[1], 2)
            os.close(before[0]), os.close(before[1])
        file.seek(0)
        text.write(file.read().decode(errors="replace"))
