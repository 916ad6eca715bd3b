"""Folders that are computed once and kept on the reader's disk, whole or not at all.

A folder is filled under another name and renamed when it is complete, so that a process that is
killed leaves nothing that looks complete. A lock file lets one process at a time do this; the
system gives the lock back when a process ends, however it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

SUMS = "checksums.json"
WAIT_SECONDS = 600


class CacheUnwritable(RuntimeError):
    """The cache cannot take a folder; the message says why, and what to do, in one sentence."""


def cache_folder() -> Path:
    """Where such folders are kept: the variable EFFNB_CACHE, or the platform's cache folder."""
    chosen = os.environ.get("EFFNB_CACHE")
    if chosen:
        return Path(chosen).expanduser().resolve()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "effnb"


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether every file that was written to the folder is there, with its size and checksum."""
    try:
        sums = json.loads((folder / SUMS).read_text())
        return bool(sums) and all(
            (folder / name).stat().st_size == about["bytes"]
            and file_sha256(folder / name) == about["sha256"]
            for name, about in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(final: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder under another name, and give it its own when it is whole."""
    for abandoned in final.parent.glob(f".{final.name}-*"):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix=f".{final.name}-") as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        write(new)
        sums = {
            file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
            for file in sorted(new.iterdir())
        }
        (new / SUMS).write_text(json.dumps(sums, indent=1) + "\n")
        if final.exists():  # damaged: out of the way at once, off the disk with the rest
            os.replace(final, Path(temporary) / "old")
        os.replace(new, final)


def cached_folder(name: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache; filled now by `write` if it is not there whole.

    Processes that ask at the same time wait for the one that fills it. A folder whose files do not
    have the sizes and checksums they were written with is filled again.

    Raises:
        CacheUnwritable: When the disk is full or the cache cannot be written.
    """
    cache = cache_folder()
    final = cache / name
    if is_whole(final):  # before the lock: a cache that a class shares may be read-only
        return final
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{name}.lock", timeout=WAIT_SECONDS):
            if not is_whole(final):
                _build(final, write)
    except Timeout:
        raise CacheUnwritable(
            f"another process has held {name}.lock in {cache} for {WAIT_SECONDS // 60} minutes: "
            "end it, or set the variable EFFNB_CACHE to another folder."
        ) from None
    except OSError as error:
        raise CacheUnwritable(
            f"{name} could not be written to the cache {cache} ({error.strerror or error}): free "
            "some space, or set the variable EFFNB_CACHE to a folder on another disk."
        ) from error
    return final
