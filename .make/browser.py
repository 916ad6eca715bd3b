"""Find a browser that the tests can drive, and say how one is installed; the standard library only.

Any Chromium will do: Chromium itself, Google Chrome, Microsoft Edge, or the one that playwright
fetches. `EFFNB_BROWSER` names one by its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
    "microsoft-edge",
    "microsoft-edge-stable",
    "msedge",
)
MAC = ("Chromium", "Google Chrome", "Microsoft Edge")
WINDOWS = ("Google/Chrome/Application/chrome.exe", "Microsoft/Edge/Application/msedge.exe")
FETCHED = (
    "chromium-*/chrome-linux*/chrome",
    "chromium-*/chrome-mac*/*.app/Contents/MacOS/*",
    "chromium-*/chrome-win*/chrome.exe",
)
"""Where playwright puts the Chromium that it fetches, below its cache."""
PACKAGES = {  # command of a package manager: what it is told
    "apt-get": (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-dejavu-core"],
    ),
    "dnf": (["install", "-y", "chromium"],),
    "pacman": (["-Sy", "--noconfirm", "chromium"],),
    "zypper": (["--non-interactive", "install", "chromium"],),
}
MISSING = (
    "No Chromium, Google Chrome or Microsoft Edge that runs was found, so the browser tests are "
    "left out and this run fails: install one (`python -m playwright install --with-deps chromium` "
    "in .venv, or your system's package), or name one with EFFNB_BROWSER."
)


def find() -> str | None:
    """The path of a browser that runs, or None."""
    return next(filter(runs, candidates()), None)


def candidates() -> Iterator[str]:
    """Where browsers lie, the one that the user names first; each exists."""
    named = os.environ.get("EFFNB_BROWSER")
    if named:
        yield from filter(None, [shutil.which(named)])
    yield from filter(None, map(shutil.which, NAMES))
    for folder in (Path("/Applications"), Path.home() / "Applications"):
        places = (folder / f"{name}.app/Contents/MacOS/{name}" for name in MAC)
        yield from (str(place) for place in places if place.is_file())
    for variable in ("PROGRAMFILES", "PROGRAMFILES(X86)", "LOCALAPPDATA"):
        if variable in os.environ:
            places = (Path(os.environ[variable], place) for place in WINDOWS)
            yield from (str(place) for place in places if place.is_file())
    for pattern in FETCHED:
        yield from map(str, sorted(fetched_folder().glob(pattern), reverse=True))


def fetched_folder() -> Path:
    """The folder into which playwright fetches its browsers."""
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    if named and named != "0":
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/ms-playwright"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home()), "ms-playwright")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ms-playwright")


def runs(path: str) -> bool:
    """Whether a browser starts; one whose libraries are missing, or a mere stub, does not.

    On Windows, where `--version` would open a window, its being there is enough.
    """
    if os.name == "nt":
        return True
    try:
        done = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def provide(python: Path, root: bool) -> None:
    """Install a browser unless one is there; where none can be, the tests say so themselves.

    Args:
        python: The Python of the environment, which has playwright.
        root: Whether the system's packages may be installed.
    """
    if find() is not None:
        return
    for command in installers(python, root):
        print(f"The tests need a browser, and none was found: {' '.join(command)}", flush=True)
        variables = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(command, env=variables, stdin=subprocess.DEVNULL, check=False)
        if find() is not None:
            return


def installers(python: Path, root: bool) -> Iterator[list[str]]:
    """Commands that may install a browser here, the likeliest way first."""
    for manager, steps in PACKAGES.items():
        if root and shutil.which(manager):
            yield from ([manager, *step] for step in steps)
    libraries = ["--with-deps"] if root and shutil.which("apt-get") else []
    yield [str(python), "-m", "playwright", "install", *libraries, "chromium"]
