"""A walk through a GPU kernel: every line that its first program runs, with what the line made.

    print(walk(int4_matmul, lambda: int4_matmul.int4_matmul(x, weight, backend="triton")))

With `TRITON_INTERPRET=1`, set before a kernel's module is imported, Triton runs kernels in Python,
one program after the other, so that they can be watched line by line on any processor.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

CODE, MADE = 50, 31
"""Characters of a line that are shown, and of what it made."""


@dataclass(frozen=True)
class Step:
    """One line that was run for the first time.

    Attributes:
        code: The statement, on one line; of a loop, its head.
        made: The names that it gave new values, each with the value in a few words.
    """

    code: str
    made: dict[str, str]


@dataclass(frozen=True)
class Walk:
    """What the first program of a kernel did.

    Attributes:
        kernel: Name of the kernel.
        steps: Its lines that made something, in the order in which they ran; a line in a loop
            once.
        result: What the whole call returned, of all programs together.
    """

    kernel: str
    steps: tuple[Step, ...]
    result: Any

    def __str__(self) -> str:
        """One line for each step: the code, and behind it what it made."""
        lines = []
        for step in self.steps:
            made = "; ".join(step.made.values())
            lines.append(f"{_cut(step.code, CODE):{CODE}} # {_cut(made, MADE)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The same: a cell of a notebook shows the walk."""
        return str(self)


def walk(module: ModuleType, call: Callable[[], Any]) -> Walk:
    """Run a call, and note what the first program of its first kernel does.

    Args:
        module: The module that holds the kernels.
        call: Runs one of them in Triton's interpreter.

    Raises:
        ValueError: When the call interprets none of the module's kernels.
    """
    kernels = {name: one.fn for name, one in vars(module).items() if _is_kernel(one, module)}
    watched = _Watch(kernels)
    before = sys.gettrace()
    sys.settrace(watched.enter)
    try:
        result = call()
    finally:
        sys.settrace(before)
    if watched.kernel is None:
        raise ValueError(
            f"no kernel of {module.__name__} was interpreted: set TRITON_INTERPRET to 1 before "
            'its module is imported, and ask for the backend "triton".'
        )
    function = kernels[watched.kernel]
    statements, seen, steps = _statements(function), set(), []
    for line, values in watched.lines:
        made = {k: said for k, v in values.items() if (said := described(v)) is not None}
        if made and line not in seen:
            seen.add(line)
            steps.append(Step(statements.get(line, ""), made))
    return Walk(watched.kernel, tuple(steps), result)


class _Watch:
    """Follows one call of the first kernel that begins."""

    def __init__(self, kernels: dict[str, Any]) -> None:
        self._files = {name: fn.__code__.co_filename for name, fn in kernels.items()}
        self.kernel: str | None = None
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self._at: int | None = None
        self._seen: dict[str, Any] = {}

    def _begins(self, code: CodeType) -> bool:
        return self.kernel is None and self._files.get(code.co_name) == code.co_filename

    def enter(self, frame: FrameType, event: str, _: Any) -> Callable | None:
        if not self._begins(frame.f_code):
            return None
        self.kernel, self._seen = frame.f_code.co_name, dict(frame.f_locals)
        return self._follow

    def _follow(self, frame: FrameType, event: str, _: Any) -> Callable:
        now = dict(frame.f_locals)
        if self._at is not None:
            made = {k: v for k, v in now.items() if self._seen.get(k) is not v}
            self.lines.append((self._at, made))
        self._seen = now
        self._at = frame.f_lineno - frame.f_code.co_firstlineno
        return self._follow


def _is_kernel(one: object, module: ModuleType) -> bool:
    function = getattr(one, "fn", None)
    return inspect.isfunction(function) and function.__module__ == module.__name__


def _statements(function: Callable) -> dict[int, str]:
    """For each line of a function, from its `def`, the statement that it belongs to."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    found: dict[int, str] = {}
    for node in _inside(definition):
        body = getattr(node, "body", None)
        words = ast.unparse(node)
        last = body[0].lineno - 1 if body else node.end_lineno
        for line in range(node.lineno, last + 1):
            found[line - definition.lineno] = words.split("\n")[0]
    return found


def _inside(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
            yield from _inside(child)


def described(value: Any) -> str | None:
    """A value of the interpreter in a few words; None where it is a place in memory."""
    if hasattr(getattr(value, "dtype", None), "element_ty"):
        return None
    data = getattr(getattr(value, "handle", value), "data", value)
    if not hasattr(data, "flat"):
        return str(data)
    shape = " x ".join(map(str, getattr(data, "shape", ()))) or "1"
    first = ", ".join(f"{x:.3g}" for x in list(data.flat)[:2])
    return f"{shape} {data.dtype}: {first}{' …' if data.size > 2 else ''}"


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 2]} …"
