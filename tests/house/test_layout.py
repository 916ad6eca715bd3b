"""The house stays the house: what lies at the top, who imports whom, and no empty rooms."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "effnb"
KERNELS = ROOT / "kernels"  # packaged as effnb.kernels
TOP = {
    "README.md",
    "LICENSE",
    "Makefile",
    "conftest.py",
    "constraints.txt",
    "environment.yml",
    "jupytext.toml",
    "pyproject.toml",
    "data",
    "effnb",
    "kernels",
    "notebooks",
    "tests",
}
METHODS = {
    "data",
    "design",
    "evaluation",
    "finetuning",
    "hardware",
    "inference",
    "pretraining",
    "selection",
}
ROOMS = METHODS | {"book", "chapters", "core", "kernels", "lab"}
# Who may import whom, beside itself. `evaluation` is a section like the others, and the one that
# the lab may use: its panels measure.
ARROWS = {
    **dict.fromkeys(METHODS, METHODS | {"core", "kernels"}),
    "core": {"kernels"},
    "kernels": set(),
    "lab": {"evaluation", "core", "kernels"},
    "chapters": METHODS | {"lab", "core", "kernels"},
    "book": {"lab"},
    "": set(),  # effnb/__init__.py
}
FURNITURE = {"IPython", "bokeh", "ipywidgets", "jupyterlab", "matplotlib", "plotly", "pygments"}


# --- reading imports ------------------------------------------------------------------------------


def module_name(path, root):
    """The dotted name of a file: root/effnb/core/modules.py is effnb.core.modules."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path, name):
    """Every dotted name that a file imports, wherever in the file, types' imports left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []  # read by people and checkers only
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from effnb import lab` imports effnb.lab: the longer name says more.
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
    return found


def package_imports(package, above=""):
    """Dotted name of each file of a package: the dotted names that it imports."""
    names = {path: above + module_name(path, package.parent) for path in package.rglob("*.py")}
    return {name: imports(path, name) for path, name in names.items()}


def whole_graph():
    """The imports of the package and of the kernels."""
    return package_imports(PACKAGE) | package_imports(KERNELS, "effnb.")


def room(dotted):
    """The room of effnb that a dotted name lies in, "" for effnb itself."""
    return [*dotted.split("."), ""][1]


def wrong_arrows(graph):
    """Imports that the house does not allow, as sentences."""
    found = []
    for name, imported in graph.items():
        here = room(name)
        if here not in ARROWS:
            found.append(f"{name} lies in no room of the house")
            continue
        for other in imported:
            first = other.split(".")[0]
            if first in FURNITURE and here not in {"lab", "chapters", "book"}:
                found.append(f"{name} imports {other}: only the lab has widgets and pictures")
            if first in {"notebooks", "tests", "kernels"}:
                found.append(f"{name} imports {other}")
            if first == "effnb" and room(other) in ROOMS - ARROWS[here] - {here}:
                found.append(f"{name} imports {other}: {here or 'effnb'} may not")
    return found


def cycle(graph):
    """Modules that import each other in a circle, or None."""
    edges = {
        name: {
            target
            for target in graph
            if target != name and any(i == target or i.rpartition(".")[0] == target for i in found)
        }
        for name, found in graph.items()
    }
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges[name]):
            found = visit(target, [*path, name])
            if found:
                return found
        done.add(name)
        return None

    return next(filter(None, (visit(name, []) for name in sorted(graph))), None)


# --- the tests ------------------------------------------------------------------------------------


def test_every_import_follows_the_arrows():
    graph = whole_graph()
    assert len(graph) > 5  # it has read the package
    assert "effnb.kernels._launch" in graph
    assert wrong_arrows(graph) == []


def test_no_module_imports_itself_in_a_circle():
    assert cycle(whole_graph()) is None


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("inference/pruning.py", "from effnb.lab import panel"),
        ("inference/pruning.py", "from effnb import lab"),
        ("inference/pruning.py", "from ..lab.panels import panel"),
        ("inference/pruning.py", "from .. import lab"),
        ("inference/pruning.py", "def f():\n    import effnb.lab"),
        ("inference/pruning.py", "import matplotlib.pyplot as plt"),
        ("inference/pruning.py", "import importlib\nimportlib.import_module('effnb.lab')"),
        ("core/modules.py", "import effnb.inference.pruning"),
        ("core/modules.py", "from effnb.evaluation import cost"),
        ("lab/panels.py", "from effnb.inference.quantization import rtn"),
        ("kernels/matmul.py", "from effnb.core import modules"),
        ("evaluation/cost.py", "import ipywidgets"),
        ("extras/thing.py", "import torch"),
    ],
)
def test_a_planted_import_is_found(tmp_path, place, line):
    path = tmp_path / "effnb" / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert len(wrong_arrows(package_imports(tmp_path / "effnb"))) == 1


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("inference/pruning.py", "from effnb.core.modules import replace\nimport torch"),
        ("finetuning/qlora.py", "from effnb.inference.quantization import formats"),
        ("lab/panels.py", "import ipywidgets\nfrom effnb.evaluation import quality"),
        ("inference/pruning.py", "if TYPE_CHECKING:\n    from effnb.lab import panel"),
        ("core/modules.py", "from . import calibration"),
    ],
)
def test_an_import_along_the_arrows_is_not(tmp_path, place, line):
    path = tmp_path / "effnb" / place
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert wrong_arrows(package_imports(tmp_path / "effnb")) == []


def test_a_planted_circle_is_found(tmp_path):
    folder = tmp_path / "effnb" / "inference"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from effnb.inference.b import f\n")
    (folder / "b.py").write_text("def f():\n    from effnb.inference import c\n")
    (folder / "c.py").write_text("from effnb.inference import a\n")
    found = cycle(package_imports(tmp_path / "effnb"))
    assert found is not None
    assert set(found) == {f"effnb.inference.{name}" for name in "abc"}


def tracked():
    """Files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]


def test_nothing_else_lies_at_the_top():
    top = {path.parts[0] for path in tracked()}
    assert {name for name in top - TOP if not name.startswith(".")} == set()
    assert {"README.md", "Makefile", "pyproject.toml", "effnb", "data", "tests"} <= top


def test_the_notebook_folders_and_the_packages_have_the_same_names():
    folders = {path.parts[1] for path in tracked() if path.parts[0] == "notebooks"}
    rooms = {name.split("_", 1)[1] for name in folders if name[0].isdigit() and "." not in name}
    assert rooms <= METHODS
    # The package of the kernels is mapped from the folder kernels/, as effnb.kernels.
    packages = {path.parts[1] for path in tracked() if path.parts[0] == "effnb" and path.parts[2:]}
    assert packages <= ROOMS - {"kernels"}


def empty_rooms(package):
    """Modules without a function or class, and packages without a module that has one."""
    found = []
    full = set()
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        if any(isinstance(node, kinds) for node in tree.body):
            full |= set(path.parents)
        elif path.name != "__init__.py":
            found.append(path)
    return found + [path.parent for path in package.rglob("__init__.py") if path.parent not in full]


def test_no_module_is_a_placeholder(tmp_path):
    assert empty_rooms(PACKAGE) == []
    assert empty_rooms(KERNELS) == []
    empty = tmp_path / "effnb" / "design"
    empty.mkdir(parents=True)
    (empty / "__init__.py").write_text('"""To come."""\n')
    (empty / "attention.py").write_text('"""To come."""\nNAME = 1\n')
    assert empty_rooms(tmp_path / "effnb") == [empty / "attention.py", empty]


def test_nothing_is_left_to_do():
    """No stub, no note to oneself: what is in the package is finished."""
    notes = ("TO" + "DO", "FIX" + "ME", "X" * 3)
    files = [ROOT / path for path in tracked() if path.suffix in {".py", ".md", ".yml", ".toml"}]
    found = [
        path.relative_to(ROOT)
        for path in files
        if any(note in path.read_text(encoding="utf-8").split() for note in notes)
    ]
    assert found == []


def test_the_checkout_stays_small():
    """48 MiB, models and corpora included."""
    assert sum((ROOT / path).stat().st_size for path in tracked()) <= 48 * 2**20


def test_no_file_names_a_place_on_one_machine():
    """The workbook runs anywhere, and tells nothing of where it was made."""
    homes = ["root", r"home/\w+", r"Users/\w+", re.escape(str(ROOT.parent).strip("/"))]
    people = [f"/{home}/" for home in homes]
    place = re.compile(r"""(?<=[\s"'`(=])(?:""" + "|".join(people) + ")")
    assert place.search(f"cd {Path('/', 'home', 'ada', 'effnb')}")
    suffixes = {".py", ".md", ".yml", ".toml", ".txt", ".ipynb", ".json", ""}
    found = []
    for path in tracked():
        whole = ROOT / path
        small = whole.stat().st_size < 2**20
        if small and path.suffix in suffixes and whole != Path(__file__).resolve():
            match = place.search(whole.read_text(encoding="utf-8"))
            found += [f"{path}: {match[0]}"] if match else []
    assert found == []
