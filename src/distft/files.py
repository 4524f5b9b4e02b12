"""Write files so that a crash, a full disk or a second process never leaves half of one behind."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from distft.errors import DataError, StorageError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to a temporary file and rename it to `path`: a reader sees the old content or the new, never a
    mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def share(folder: Path) -> None:
    """Give the files in `folder` the modes that the umask leaves: some libraries write them for their owner alone."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~_umask())


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def build_folder_once(folder: Path, build: Callable[[Path], None], *, resumes: bool = False) -> None:
    """Create `folder` with `build(temporary_folder)`, unless it exists.

    The first process to arrive builds; the others wait for a file lock, and so for no collective that could time out.
    The folder appears under its name only when it is complete. With `resumes`, an interrupted `build` finds again what
    it had written; what data that are wrong (DataError) leave behind is removed.

    Raises:
        StorageError: it does not exist, and nothing can be written next to it.
    """
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(_no_cache(folder.parent, error.strerror or str(error))) from error
    if not os.access(folder.parent, os.W_OK):
        raise StorageError(_no_cache(folder.parent, "it is read-only for this user"))
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        if resumes:
            temporary = folder.parent / f".{folder.name}.partial"
            temporary.mkdir(exist_ok=True)
        else:
            temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            build(temporary)
            temporary.rename(folder)
        except DataError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        finally:
            if not resumes:
                shutil.rmtree(temporary, ignore_errors=True)


def _no_cache(folder: Path, why: str) -> str:
    return f"the cache {folder} cannot be written ({why}); set DISTFT_CACHE to a folder that can"


def disk_full_reason(error: BaseException) -> str | None:
    """Why a write failed, if a full disk, a quota or a file-size limit caused `error`; otherwise None.

    Recognises the errors of Python, safetensors and torch.
    """
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return error.strerror
    text = str(error)
    reason = next((os.strerror(number) for number in _DISK_FULL if os.strerror(number) in text), None)
    if reason is None and any(sign in text for sign in ("PytorchStreamWriter failed", "inline_container.cc")):
        return "a file could not be written completely"  # torch's writer gives no reason
    return reason


def free_space(path: Path, needed: int) -> str:
    """A phrase that compares the `needed` bytes with the free space on the disk of `path`."""
    free = shutil.disk_usage(path).free
    missing = f", {(needed - free) / 2**20:,.1f} MiB too little" if needed > free else ""
    return f"about {needed / 2**20:,.1f} MiB needed, {free / 2**20:,.1f} MiB free in {path}{missing}"


def to_json(record: Mapping[str, Any]) -> str:
    """Strict JSON for readers in any language: NaN and infinities become null, unknown types their `str`."""
    return json.dumps(_finite(record), indent=2, default=str, allow_nan=False)


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append each record to a JSON Lines file in a single write, after removing an incomplete last line."""
    lines = "".join(json.dumps(_finite(record), allow_nan=False, default=str) + "\n" for record in records)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # a kill cut the last write short
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(lines.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete record of a JSON Lines file; none if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
