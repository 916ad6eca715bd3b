"""Stored results: what takes longer than a reader waits for, with the command that computed it.

Each is a file `data/results/<name>.json` with the command, the date, the device, the versions, and
the SHA-256 of every model and corpus that was read. The results of a chapter lie in a folder of the
chapter's name: `05_inference/3_quantization/methods`. Pages draw such numbers from here and say so;
no number is typed.

A result that was measured with another model or corpus than those here is refused. One that is
missing is a value, `NotMeasured`: a page can show everything else.
"""

from __future__ import annotations

import html
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effnb.lab import corpora
from effnb.lab._files import DamagedFile, data_folder, in_use
from effnb.lab.devices import device as best_device
from effnb.lab.devices import installed

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*(?:/[a-z0-9][a-z0-9_.-]*)*")
_PACKAGES = ("torch", "transformers", "numpy", "triton")


class Outdated(RuntimeError):
    """A result of another model or corpus than the one here; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a stored result comes from.

    Attributes:
        command: The command, run in the repository's folder, that computes it again.
        date: Day on which it was computed, as 2026-01-31.
        device: Kind of device, and its name where it has one.
        versions: Versions of Python and of the packages that matter.
        sha256: SHA-256 of the weights of each model and of the file of each corpus that was read,
            by names such as "model mini-5m" and "corpus novels".
        complete: Whether the measurement ran to its end; one that was interrupted can be resumed.
    """

    command: str
    date: str
    device: str
    versions: dict[str, str]
    sha256: dict[str, str] = field(default_factory=dict)
    complete: bool = True


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A stored result; the last value of a cell, it says where it comes from.

    Attributes:
        name: Name of the file below `data/results/`, without its ending.
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


class NotMeasured:
    """A result that is not stored here: a value that is false, empty, and says so.

    Whatever is asked of it answers "not measured": `missing.data["table"]` has no rows, and
    `f"{missing.data['loss']:.2f}"` reads "not measured".

    Attributes:
        name: Name of the result.
        command: What to run in the repository's folder to measure it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.command = command_of(name)

    @property
    def data(self) -> NotMeasured:
        """Itself: it has no data."""
        return self

    def __getitem__(self, key: object) -> NotMeasured:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotMeasured) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __format__(self, how: str) -> str:
        return "not measured"

    def __str__(self) -> str:
        """One sentence with the command that measures it."""
        return f"Not measured here: {self.name}; `{self.command}` measures it."

    def __repr__(self) -> str:
        """The same sentence."""
        return str(self)

    def _repr_html_(self) -> str:
        return (
            '<div style="border-left: 4px solid #E69F00; padding: 4px 12px">'
            f"<strong>Not measured here:</strong> {html.escape(self.name)}; "
            f"<code>{html.escape(self.command)}</code> measures it.</div>"
        )


def command_of(name: str) -> str:
    """What measures a result: the sweep of its chapter, or `make results` outside of chapters."""
    chapter, _, table = name.rpartition("/")
    return f"python data/sweeps/{chapter}.py {table}" if chapter else "make results"


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a stored result: use small letters, digits, '-', '_' and '.', "
            "and '/' between a chapter's name and its table."
        )
    return data_folder() / "results" / f"{name}.json"


def names() -> list[str]:
    """The names of all stored results, in alphabetical order."""
    folder = data_folder() / "results"
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.json"))


def read(name: str, *, any_model: bool = False) -> StoredResult | NotMeasured:
    """A stored result; `NotMeasured` when there is none of that name.

    Args:
        name: Such as "05_inference/3_quantization/methods".
        any_model: Whether a result of other models or corpora is given too: for scripts that
            compare them part by part.

    Raises:
        Outdated: When a model or a corpus that it was measured with is another one here.
        DamagedFile: When it is damaged; the message says how to restore it.
        ValueError: When no file could have that name.
    """
    path = _path(name)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = StoredResult(name, content["data"], Provenance(**content["provenance"]))
        measured_with = dict(found.provenance.sha256)
    except FileNotFoundError:
        return NotMeasured(name)
    except (ValueError, KeyError, TypeError):
        raise DamagedFile(
            f"the stored result {name}.json is damaged: restore it with `git checkout -- "
            f"data/results/{name}.json` or measure it again with `{command_of(name)}`."
        ) from None
    for what, sha256 in () if any_model else measured_with.items():
        here = _sha256(what)
        if here not in (None, sha256):
            raise Outdated(
                f"the stored result {name} was measured with another {what} (SHA-256 "
                f"{sha256[:12]}…) than the one here ({here[:12]}…): measure it again with "
                f"`{found.provenance.command}`."
            )
    return found


def _sha256(what: str) -> str | None:
    """The checksum that a model or corpus has here; None where it is not installed."""
    from effnb.lab import models  # here, because it takes torch's seconds

    kind, _, name = what.partition(" ")
    try:
        return models.sha256(name) if kind == "model" else corpora.sha256(name)
    except ValueError:  # it is no longer part of the workbook
        return "nothing of that name"


def _written(value: Any, depth: int = 0) -> str:
    """JSON with a line for each row of a table, so that a row that changed is a line that did."""
    if depth < 3 and isinstance(value, dict | list | tuple) and value:
        inner = " " * (depth + 1)
        if isinstance(value, dict):
            if odd := [key for key in value if not isinstance(key, str)]:
                raise TypeError(f"keys must be strings, not {odd[0]!r}")
            parts = [
                f"{json.dumps(key, ensure_ascii=False)}: {_written(one, depth + 1)}"
                for key, one in value.items()
            ]
            opened, closed = "{}"
        else:
            parts, (opened, closed) = [_written(one, depth + 1) for one in value], "[]"
        lines = f",\n{inner}".join(parts)
        return f"{opened}\n{inner}{lines}\n{' ' * depth}{closed}"
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def store(
    name: str,
    data: Any,
    command: str | None = None,
    *,
    device: str | None = None,
    sha256: dict[str, str] | None = None,
    complete: bool = True,
) -> StoredResult:
    """Store a result with the command that computed it, today's date, the device and versions.

    The file is written whole or not at all, one value a line, so that two versions can be compared.
    It carries the SHA-256 of every model and corpus that this process has read.

    Args:
        name: Small letters, digits, '-', '_', '.' and '/'; the file gets the ending `.json`.
        data: Numbers, strings, lists and dictionaries with strings as keys. Not a number (NaN) and
            infinities are refused: other readers of JSON do not know them.
        command: What to run in the repository's folder to compute it again; by default the sweep
            of the chapter that the name begins with.
        device: Where it was computed; the best device here when None.
        sha256: Checksums of the models and corpora, instead of those that were read.
        complete: Whether the measurement is at its end.

    Returns:
        The result as `read` will give it.

    Raises:
        ValueError: When the data cannot be written as JSON, or the name does not fit.
    """
    path = _path(name)
    versions = {"python": platform.python_version()}
    versions |= {name: number for name in _PACKAGES if (number := installed(name))}
    about = Provenance(
        command=command or command_of(name),
        date=datetime.now(UTC).date().isoformat(),
        device=device or device_name(),
        versions=versions,
        sha256=in_use() if sha256 is None else sha256,
        complete=complete,
    )
    try:
        text = _written({"provenance": asdict(about), "data": data})
    except (TypeError, ValueError) as problem:
        raise ValueError(f"the result {name} cannot be stored as JSON: {problem}.") from None
    path.parent.mkdir(parents=True, exist_ok=True)
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
