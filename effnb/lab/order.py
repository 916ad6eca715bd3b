"""Cells run out of order: a sentence that says which cell comes first, in place of a NameError.

Importing anything from `effnb.lab` in a notebook, as every chapter's first cell does, prepares
this; kernels that `make lab` starts have it from the beginning (`effnb.lab.notebook_kernels`).
When a cell then needs a name that an earlier cell would have made, the notebook's file says which
one that is.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def prepare() -> None:
    """Explain names that are missing, in a notebook; anywhere else nothing happens."""
    try:
        from IPython import get_ipython
    except ImportError:
        return
    shell = get_ipython()
    if shell is None or not hasattr(shell, "kernel") or shell.custom_exceptions:
        return
    shell.set_custom_exc((NameError,), _explain)


def load_ipython_extension(shell: Any) -> None:
    """What a kernel calls that is told to load this module: the same as `prepare`."""
    prepare()


def _explain(
    shell: Any,
    kind: type[BaseException],
    problem: BaseException,
    trace: TracebackType,
    tb_offset: int | None = None,
) -> None:
    """What a notebook shows of a NameError: one sentence where it can be said, else all of it."""
    sentence = missing(problem, trace, _sources())
    if sentence is None:
        lines = shell.InteractiveTB.structured_traceback(kind, problem, trace, tb_offset=tb_offset)
    else:
        lines = [f"{kind.__name__}: {sentence}"]
    shell._showtraceback(kind, problem, lines)


def _sources() -> list[str]:
    """The cells of this kernel's notebook, from its file; no cells where that is not known."""
    try:
        path = Path(os.environ["JPY_SESSION_NAME"])
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        return ["".join(c["source"]) if c["cell_type"] == "code" else "" for c in cells]
    except (KeyError, OSError, ValueError, TypeError):
        return []


def missing(problem: BaseException, trace: TracebackType, sources: list[str]) -> str | None:
    """Which cell would have made a missing name, in a sentence; None when no cell does.

    Args:
        problem: The NameError.
        trace: Where it was raised.
        sources: The source of each cell in order; empty for those that hold no code.
    """
    name = getattr(problem, "name", None)
    if not name or isinstance(problem, UnboundLocalError):
        return None
    while trace.tb_next is not None:
        trace = trace.tb_next
    if trace.tb_frame.f_globals.get("__name__") != "__main__":
        return None  # a mistake in a module is no matter of cells
    makers = [number for number, source in enumerate(sources, 1) if name in _made(source)]
    if not makers:
        return None
    first = " ".join(sources[makers[0] - 1].strip().splitlines()[0].split())
    first = first if len(first) <= 60 else f"{first[:59]}…"
    counted = sum(1 for source in sources[: makers[0]] if source.strip())
    return (
        f"{name!r} does not exist yet: code cell {counted}, which begins with “{first}”, makes it. "
        "Run the cells above this one first (menu Run, Run All Above Selected Cell)."
    )


def _made(source: str) -> set[str]:
    """The names that a cell makes at its top level."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    found: set[str] = set()
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, inner):
            found |= {node.name} if hasattr(node, "name") else set()
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(one.asname or one.name).split(".")[0] for one in node.names}
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return found
