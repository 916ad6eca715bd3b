"""Stored results: what takes longer than a reader waits for, with the command that computed it.

Each lies in `data/results/<name>.json` together with the command, the date, the device and the
versions. Pages draw such numbers from here and say so; no number is typed.
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effnb.lab._files import DamagedFile, data_folder
from effnb.lab.devices import device as best_device
from effnb.lab.devices import installed

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_PACKAGES = ("torch", "transformers", "numpy", "triton")


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a stored result comes from.

    Attributes:
        command: The command, run in the repository's folder, that computes it again.
        date: Day on which it was computed, as 2026-01-31.
        device: Kind of device, and its name where it has one.
        versions: Versions of Python and of the packages that matter.
    """

    command: str
    date: str
    device: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A stored result; the last value of a cell, it says where it comes from.

    Attributes:
        name: Name of the file, without folder and ending.
        data: What was stored: numbers, strings, lists and dictionaries.
        provenance: Command, date, device and versions.
    """

    name: str
    data: Any
    provenance: Provenance

    def __str__(self) -> str:
        """One sentence on what was run, where and when."""
        about = self.provenance
        versions = ", ".join(f"{name} {number}" for name, number in about.versions.items())
        return (
            f"Stored result: {self.name}, computed on {about.date} on {about.device} "
            f"({versions}) by `{about.command}`."
        )

    def __repr__(self) -> str:
        """The same sentence: cells show where numbers come from, not all of them."""
        return str(self)

    def _repr_html_(self) -> str:
        about = self.provenance
        versions = ", ".join(f"{name} {number}" for name, number in about.versions.items())
        return (
            '<div style="border-left: 4px solid #56B4E9; padding: 4px 12px">'
            f"<strong>Stored result:</strong> {html.escape(self.name)}, computed on "
            f"{html.escape(about.date)} on {html.escape(about.device)} ({html.escape(versions)}) "
            f"by <code>{html.escape(about.command)}</code>.</div>"
        )


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a stored result: use small letters, digits, '-', '_' and '.'."
        )
    return data_folder() / "results" / f"{name}.json"


def read(name: str) -> StoredResult:
    """A stored result.

    Raises:
        DamagedFile: When it is missing or damaged; the message names the command that rebuilds it.
        ValueError: When no file could have that name.
    """
    path = _path(name)
    remedy = f"restore it with `git checkout -- data/results/{name}.json` or `make results`"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return StoredResult(name, content["data"], Provenance(**content["provenance"]))
    except FileNotFoundError:
        problem = "is missing"
    except (ValueError, KeyError, TypeError):
        problem = "is damaged"
    raise DamagedFile(f"the stored result {path.name} {problem}: {remedy}.")


def store(name: str, data: Any, command: str, *, device: str | None = None) -> StoredResult:
    """Store a result with the command that computed it, today's date, the device and versions.

    The file is written whole or not at all, one value a line, so that two versions can be compared.

    Args:
        name: Small letters, digits, '-', '_' and '.'; the file gets the ending `.json`.
        data: Numbers, strings, lists and dictionaries with strings as keys. Not a number (NaN) and
            infinities are refused: other readers of JSON do not know them.
        command: What to run in the repository's folder to compute it again.
        device: Where it was computed; the best device here when None.

    Returns:
        The result as `read` will give it.

    Raises:
        ValueError: When the data cannot be written as JSON, or the name does not fit.
    """
    path = _path(name)
    versions = {"python": platform.python_version()}
    versions |= {name: number for name in _PACKAGES if (number := installed(name))}
    about = Provenance(
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        device=device or device_name(),
        versions=versions,
    )
    try:
        text = json.dumps(
            {"provenance": asdict(about), "data": data},
            indent=1,
            allow_nan=False,
            ensure_ascii=False,
        )
    except (TypeError, ValueError) as problem:
        raise ValueError(f"the result {name} cannot be stored as JSON: {problem}.") from None
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)
    return StoredResult(name, json.loads(text)["data"], about)


def device_name() -> str:
    """The best device in words, such as "cuda (NVIDIA H100)" or "cpu (x86_64)"."""
    best = best_device()
    if best.type == "cuda":
        import torch

        return f"cuda ({torch.cuda.get_device_name(0)})"
    return f"{best.type} ({platform.machine()})"


def live() -> bool:
    """Whether a section on a real model computes now instead of reading what is stored.

    It does for a reader who runs the page, and under `make test-full`; not while a page is built or
    tested, where minutes for each chapter would add up.
    """
    if os.environ.get("EFFNB_FULL") == "1":
        return True
    return not {"EFFNB_BUILD", "EFFNB_SWEEP"} & set(os.environ)
