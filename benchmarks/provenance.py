"""Where a result comes from: the program, the commit, and the machine with its packages."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from distft.hardware import describe


def provenance(program: str, commit: str = "") -> dict[str, Any]:
    """The first entries of every result of the program of this file name; `commit` where there is no git to ask."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return {
        "program": f"benchmarks/{Path(program).name}",
        "commit": commit or subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "environment": {key: value for key, value in describe().items() if key not in ("command", "working_folder")},
    }
