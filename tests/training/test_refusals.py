"""A library's refusal of a setting is the user's mistake; its other exceptions and ours are not."""

from __future__ import annotations

import json

import pytest
from packaging.version import Version

from distft.distributed.supervisor import PROGRESS
from distft.errors import DataError, SettingsError
from distft.text import parse_duration
from distft.training.refusals import refusals


def test_a_library_that_refuses_a_setting_is_named() -> None:
    with pytest.raises(SettingsError) as caught, refusals():
        Version("fast")
    assert str(caught.value).startswith("packaging refuses what the recipe asks for: InvalidVersion: Invalid version")
    assert caught.value.exit_code == 2 and not caught.value.restart


@pytest.mark.parametrize("wrong", [lambda: parse_duration("soon"), lambda: json.loads("{"), lambda: int("x")])
def test_distft_s_own_failures_stay_what_they_are(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(ValueError), refusals():
        wrong()


def test_other_errors_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError), refusals():
        raise DataError("no data")
    with pytest.raises(RuntimeError), refusals():
        raise RuntimeError("CUDA error")
    monkeypatch.setattr(PROGRESS, "began", True)
    with pytest.raises(ValueError), refusals():
        Version("fast")
