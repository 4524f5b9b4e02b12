"""Where a result comes from: program, commit, machine and packages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from distft.hardware import describe


def provenance(program: str, commit: str = "") -> dict[str, Any]:
    """The first entries of every result of `program`, a file name; `commit` is needed only if git is not available."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return {
        "program": f"benchmarks/{Path(program).name}",
        "commit": commit or subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "environment": {key: value for key, value in describe().items() if key not in ("command", "working_folder")},
    }
