"""Where the repository's data lies, and files that are checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path


class DamagedFile(RuntimeError):
    """A file of the repository is missing, cut short or changed; the message names the remedy."""


@cache
def data_folder() -> Path:
    """The repository's `data/`: beside the package, or where the variable EFFNB_DATA points."""
    chosen = os.environ.get("EFFNB_DATA")
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[2] / "data"
    if not folder.is_dir():
        raise DamagedFile(
            f"the data folder {folder} does not exist: run from a clone of the repository that was "
            "installed with `pip install -e .`, or set EFFNB_DATA to its data folder."
        )
    return folder


def read_manifest(path: Path, remedy: str) -> dict:
    """Read a JSON manifest, or say how to restore it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, UnicodeDecodeError):
        problem = "is damaged"
    raise DamagedFile(f"{path.name} {problem}; restore it with `{remedy}`.")


def checked_bytes(path: Path, sha256: str, size: int, remedy: str) -> bytes:
    """The content of a file whose size and SHA-256 are known; otherwise one sentence.

    Raises:
        DamagedFile: When the file is missing, of another size, or of another content.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedFile(f"{path.name} is missing; restore it with `{remedy}`.") from None
    if len(content) != size:
        problem = f"has {len(content):,} bytes instead of {size:,}"
    elif hashlib.sha256(content).hexdigest() != sha256:
        problem = "has the right size but another content"
    else:
        return content
    raise DamagedFile(f"{path.name} is damaged: it {problem}; restore it with `{remedy}`.")


_used: dict[str, str] = {}


def note_use(what: str, sha256: str) -> None:
    """Remember that a model or a corpus was read here, and which: "model mini-5m", "corpus novels".

    What is stored later in this process carries these checksums (`effnb.lab.results`).
    """
    _used[what] = sha256


def in_use() -> dict[str, str]:
    """SHA-256 of every model and corpus that was read since `forget_use`, by its name."""
    return dict(sorted(_used.items()))


def forget_use() -> None:
    """Begin again: what was read until now has no part in what is stored next."""
    _used.clear()
