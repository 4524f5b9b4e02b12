"""What a summary says about the best evaluation of its run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distft.text import count


def selection_lines(summary: Mapping[str, Any]) -> list[str]:
    """Why the run stopped early, if it did, and which model is its result, if not that of the last step."""
    best, stopped = summary.get("best"), summary.get("stopped_early")
    if not best:
        return []
    what, lines = f"{best['metric']} {best['value']:.6g} at step {best['step']:,}", []
    if stopped:
        lines.append(
            f"stopped early at step {stopped['step']:,} of {stopped['of']:,}: {best['metric']} did not improve for "
            f"{count(stopped['evaluations'], 'evaluation')}; the best was {what}"
        )
    if best["is_result"]:
        lines.append(f"the result is the model of the best evaluation: {what}")
    return lines
