"""The learner's copies: `my/` holds one of each chapter, and the originals stay as git knows them.

    python .make/setup.py lab                               # renews the copies, opens them
    python .make/setup.py reset 05_inference/1_pruning ...  # begins chapters again, keeps what was

JupyterLab saves a notebook every two minutes, so working on a tracked file changes it. A copy
that the learner has not changed follows its chapter; one that they have changed is never written
over. `my/.given.json` records what each copy was when it was given. The standard library only.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

RECORD = ".given.json"
ENDINGS = {".py", ".toml"}
"""Files beside the chapters that learners need no copy of: the authors' sources."""


@dataclass
class Renewed:
    """What renewing the copies did, by the chapters' names.

    Attributes:
        given: Copied for the first time.
        refreshed: Copied again, because the chapter is newer and the learner had changed nothing.
        kept: Left as they are, though the chapter is newer: the learner has changed them.
    """

    given: list[str] = field(default_factory=list)
    refreshed: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def sentences(self, folder: Path) -> list[str]:
        """What the learner has to know, a sentence each; nothing when nothing was found."""
        said = []
        if self.given:
            said.append(f"Your copies of the chapters are in {folder.name}/; work there.")
        if self.refreshed:
            said.append(
                f"Newer chapters replaced copies that you had not changed: {_list(self.refreshed)}."
            )
        if self.kept:
            said.append(
                f"There is a newer {_list(self.kept)}, and you have changed your copy, so it was "
                f"kept: `make lab RESET={self.kept[0]}` begins it again and keeps yours beside it."
            )
        return said


def renew(originals: Path, copies: Path) -> Renewed:
    """Give the learner what is new, and leave what they have changed.

    Args:
        originals: The folder `notebooks/`.
        copies: The folder `my/`; it is made when it is missing.

    Raises:
        OSError: When the folder cannot be written.
    """
    record = _read_record(copies)
    done = Renewed()
    copies.mkdir(parents=True, exist_ok=True)
    for name in wanted(originals):
        content = (originals / name).read_bytes()
        target, digest = copies / name, _digest(content)
        is_chapter = target.suffix == ".ipynb"
        if not target.exists():
            _write(target, content)
            if is_chapter:
                done.given.append(_chapter(name))
        else:
            mine = _digest(target.read_bytes())
            if mine == digest:
                pass  # it is what the chapter is, whatever the record says
            elif mine == record.get(name):
                _write(target, content)
                if is_chapter:
                    done.refreshed.append(_chapter(name))
            else:
                if is_chapter and record.get(name) != digest:
                    done.kept.append(_chapter(name))
                continue
        record[name] = digest
    _write(copies / RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
    return done


def reset(names: list[str], originals: Path, copies: Path) -> list[tuple[str, Path | None]]:
    """Begin chapters again; what the learner had stays beside it under another name.

    Args:
        names: Chapters as the map names them, such as `05_inference/1_pruning`, or the last part.
        originals: The folder `notebooks/`.
        copies: The folder `my/`.

    Returns:
        For each the file in `originals`' terms and where the learner's was kept, if it had changed.

    Raises:
        ValueError: When a name fits no chapter, or several; nothing is touched then.
        OSError: When the folder cannot be written.
    """
    chapters = [name for name in wanted(originals) if name.endswith(".ipynb")]
    chosen = [_find(name, chapters) for name in names]
    record, done = _read_record(copies), []
    for name in chosen:
        content, target = (originals / name).read_bytes(), copies / name
        kept = None
        if target.exists() and _digest(target.read_bytes()) not in {
            record.get(name), _digest(content),
        }:  # fmt: skip
            kept = _free_name(target)
            target.rename(kept)
        _write(target, content)
        record[name] = _digest(content)
        done.append((name, kept))
    _write(copies / RECORD, json.dumps(record, indent=1, sort_keys=True).encode())
    return done


def wanted(originals: Path) -> list[str]:
    """What is copied, by path below the folder: the notebooks, and the pictures that they show."""
    return sorted(
        path.relative_to(originals).as_posix()
        for path in originals.rglob("*")
        if path.is_file()
        and path.suffix not in ENDINGS
        and not any(part.startswith((".", "__")) for part in path.relative_to(originals).parts)
    )


def _find(name: str, chapters: list[str]) -> str:
    """The chapter that a person means."""
    asked = name.removeprefix("notebooks/").removeprefix("my/").removesuffix(".ipynb").strip("/")
    known = [_chapter(chapter) for chapter in chapters]
    fitting = [c for c in known if c == asked] or [c for c in known if c.split("/")[-1] == asked]
    if len(fitting) != 1:
        raise ValueError(f"there is no chapter {name!r} to reset; there are {_list(known)}.")
    return f"{fitting[0]}.ipynb"


def _free_name(target: Path) -> Path:
    """A name beside a file that says when it was put away, and that nothing has yet."""
    stamp = time.strftime("%Y-%m-%d")
    number, free = 1, target.with_name(f"{target.stem}.kept-{stamp}{target.suffix}")
    while free.exists():
        number += 1
        free = target.with_name(f"{target.stem}.kept-{stamp}-{number}{target.suffix}")
    return free


def _read_record(copies: Path) -> dict[str, str]:
    """What each copy was when it was given; where that is lost, every copy counts as changed."""
    try:
        record = json.loads((copies / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _chapter(name: str) -> str:
    return name.removesuffix(".ipynb")


def _list(names: list[str]) -> str:
    """Names as English lists them."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
