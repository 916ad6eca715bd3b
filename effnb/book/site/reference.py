"""The reference of the package: what is public in it, read from the sources without running them.

Every module below `effnb/` and `kernels/` is found by walking the folders, and its functions,
classes, methods and documented constants by reading the file.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from effnb.book.site.docstrings import formulas_of, sections
from effnb.book.site.katex import render

PACKAGES = {"effnb": "effnb", "kernels": "effnb.kernels"}
"""Folders of the repository, and the packages that they are imported as."""

LEFT_OUT = "effnb.book.site."
"""The modules that make these pages; nothing imports them."""


@dataclass(frozen=True)
class Thing:
    """One public object.

    Attributes:
        name: Its name inside of its module, such as `Panel.at`.
        kind: function, class, exception, method, property or data.
        signature: What the name refers to.
        doc: Its docstring, not indented.
        line: Its place in its file, from 1.
        arguments: Names of its parameters or fields.
        options: What the reference says of it beside that: classmethod, staticmethod.
        members: Its public methods and properties.
    """

    name: str
    kind: str
    signature: str
    doc: str
    line: int
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    members: tuple[Thing, ...] = ()


@dataclass(frozen=True)
class Module:
    """One module.

    Attributes:
        name: Its dotted name.
        path: Its file below the repository.
        doc: Its docstring.
        things: What is public in it, in the order of the file.
        imports: What it imports from this package: the name here, and the dotted name there.
    """

    name: str
    path: Path
    doc: str
    things: tuple[Thing, ...]
    imports: dict[str, str] = field(default_factory=dict)

    @property
    def is_package(self) -> bool:
        """Whether it is a folder's `__init__.py`."""
        return self.path.name == "__init__.py"


class Reference:
    """All modules, and which name means what."""

    def __init__(self, modules: list[Module], problems: list[str]) -> None:
        """Keep modules, and what was found wrong with their docstrings."""
        self.modules = {module.name: module for module in modules}
        self.problems = problems
        self._things = {
            f"{module.name}.{thing.name}": (module, thing)
            for module in modules
            for top in module.things
            for thing in (top, *top.members)
        }

    def find(self, dotted: str, depth: int = 0) -> str | None:
        """The full name of an object that some dotted name leads to; None when none does.

        Names that a package passes on are followed to where they are defined, and a name that a
        package looks up only when it is used is searched in the package's modules.
        """
        package, _, name = dotted.rpartition(".")
        module = self.modules.get(package)
        if module and name in module.imports and depth < 9:
            found = self.find(module.imports[name], depth + 1)
            if found:
                return found
        if dotted in self._things:
            return dotted
        if module and module.is_package and dotted not in self.modules:
            below = [
                f"{other}.{name}"
                for other in self.modules
                if other.startswith(f"{package}.") and f"{other}.{name}" in self._things
            ]
            return below[0] if len(below) == 1 else None
        if package and package not in self.modules and depth < 9:  # a method of what is passed on
            owner = self.find(package, depth + 1)
            whole = f"{owner}.{name}" if owner else None
            return whole if whole in self._things else None
        return None

    def home(self, full: str) -> tuple[Module, Thing]:
        """The module that defines an object, and the object."""
        return self._things[full]

    def page(self, full: str) -> str:
        """Where an object is described: a page below the top of the site, with its anchor."""
        return f"{page_of(self._things[full][0].name)}.html#{full}"

    def shortest(self, full: str) -> str:
        """The shortest package that passes an object on, or the module that defines it."""
        module, thing = self._things[full]
        passing = [
            package.name
            for package in self.modules.values()
            if package.is_package and package.name != "effnb" and thing.name in package.imports
            if self.find(f"{package.name}.{thing.name}") == full
        ]
        return min([*passing, module.name], key=lambda name: name.count("."))

    def used_in(self, code: str) -> list[str]:
        """The objects that a piece of Python uses, by their full names, in order of appearance."""
        return list(dict.fromkeys(full for full, _ in self.uses(code)))

    def uses(self, code: str) -> list[tuple[str, int]]:
        """The same with repetitions, each with the place in the text where its name ends."""
        if "effnb" not in code:
            return []
        try:
            nodes = list(ast.walk(ast.parse(code)))
        except SyntaxError:
            return []
        lines = code.splitlines(keepends=True)
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        known: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("effnb"):
                for alias in node.names:
                    known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith("effnb."):
                        known[alias.asname or alias.name.split(".")[0]] = (
                            alias.name if alias.asname else "effnb"
                        )
        found: list[tuple[str, int]] = []
        named = [n for n in nodes if isinstance(n, ast.Name | ast.Attribute)]
        # The longest chain first: of `a.b.c` as a whole, then of `a.b`.
        for node in sorted(named, key=lambda n: (n.lineno, n.col_offset, -n.end_col_offset)):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.insert(0, inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name) and inner.id in known:
                full = self.find(".".join([known[inner.id], *parts]))
                if full:  # ast counts bytes
                    before = lines[node.end_lineno - 1].encode()[: node.end_col_offset].decode()
                    found.append((full, starts[node.end_lineno - 1] + len(before)))
        return found


def page_of(module: str) -> str:
    """The page of a module, below the top of the site and without an ending."""
    return f"api/{module}"


# ------------------------------------------------------------------------------ reading sources


def read_reference(repository: Path) -> Reference:
    """Read every public module of the repository's packages."""
    modules, problems = [], []
    for folder, package in PACKAGES.items():
        for path in sorted((repository / folder).rglob("*.py")):
            below = path.relative_to(repository / folder).with_suffix("").parts
            parts = below[:-1] if below[-1] == "__init__" else below
            if any(part.startswith("_") for part in parts):
                continue
            name = ".".join([package, *parts])
            if f"{name}.".startswith(LEFT_OUT):
                continue
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError) as problem:
                problems.append(f"{path.relative_to(repository)} cannot be read: {problem}.")
                continue
            module = _module(name, path.relative_to(repository), tree)
            problems += _complaints(module)
            modules.append(module)
    return Reference(modules, problems)


def _module(name: str, path: Path, tree: ast.Module) -> Module:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else ()), *filter(None, [node.module])])
            if base.split(".")[0] == "effnb":
                imports |= {
                    alias.asname or alias.name: f"{base}.{alias.name}" for alias in node.names
                }
    doc = ast.get_docstring(tree, clean=False) or ""  # its code may be all that is indented
    return Module(name, path, doc.strip(), tuple(_things(tree.body, "")), imports)


def _doc(node: ast.AST) -> str:
    return ast.get_docstring(node) or ""


def _things(body: list[ast.stmt], owner: str) -> Iterator[Thing]:
    """What is public among these statements; a property is described once, where it is read."""
    for index, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") and not _decorators(node) & {"setter", "deleter"}:
                yield _function(node, owner)
        elif isinstance(node, ast.ClassDef):
            if not node.name.startswith("_"):
                yield _class(node, owner)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and not owner:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            doc = _string(body[index + 1]) if index + 1 < len(body) else ""
            if isinstance(target, ast.Name) and not target.id.startswith("_") and doc:
                value = ast.unparse(node.value) if node.value else ""
                shown = f" = {value}" if value and len(value) <= 60 else ""
                yield Thing(target.id, "data", shown, doc, node.lineno)


def _string(node: ast.stmt) -> str:
    """The text of a statement that is only a string: how constants are documented."""
    value = node.value if isinstance(node, ast.Expr) else None
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return textwrap.dedent(value.value).strip()
    return ""


def _decorators(node: ast.AST) -> set[str]:
    return {ast.unparse(one).split("(")[0].split(".")[-1] for one in node.decorator_list}


def _function(node: ast.FunctionDef, owner: str) -> Thing:
    decorators = _decorators(node)
    name = f"{owner}.{node.name}" if owner else node.name
    gives = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    if owner and decorators & {"property", "cached_property"}:
        return Thing(name, "property", gives.removeprefix(" -> "), _doc(node), line)
    bound = bool(owner) and "staticmethod" not in decorators
    arguments = _parameters(node.args, bound)
    options = tuple(sorted(decorators & {"classmethod", "staticmethod"}))
    names = tuple(one.arg for one in _all_arguments(node.args))[bound:]
    shown = f"({', '.join(arguments)}){gives}"
    return Thing(name, "method" if owner else "function", shown, _doc(node), line, names, options)


def _all_arguments(given: ast.arguments) -> list[ast.arg]:
    lists = [*given.posonlyargs, *given.args]
    lists += [given.vararg] if given.vararg else []
    lists += given.kwonlyargs
    return lists + ([given.kwarg] if given.kwarg else [])


def _parameters(given: ast.arguments, bound: bool) -> list[str]:
    """The parameters as they are written, without `self` or `cls`."""

    def said(one: ast.arg, default: ast.expr | None = None, stars: str = "") -> str:
        kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
        equals = " = " if kind else "="
        return f"{stars}{one.arg}{kind}{equals + ast.unparse(default) if default else ''}"

    ordered = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordered) - len(given.defaults)) + list(given.defaults)
    out = [said(one, default) for one, default in zip(ordered, defaults)]
    if given.posonlyargs:
        out.insert(len(given.posonlyargs), "/")
    if bound and out:
        out = out[1:]
        if out[:1] == ["/"]:
            out = out[1:]
    if given.vararg:
        out.append(said(given.vararg, stars="*"))
    elif given.kwonlyargs:
        out.append("*")
    out += [said(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults)]
    return out + ([said(given.kwarg, stars="**")] if given.kwarg else [])


def _class(node: ast.ClassDef, owner: str) -> Thing:
    name = f"{owner}.{node.name}" if owner else node.name
    bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
    error = any(base.endswith(("Error", "Exception", "Warning")) for base in bases)
    makers = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    names: tuple[str, ...] = ()
    signature = ""
    if makers:
        signature = f"({', '.join(_parameters(makers[0].args, True))})"
        names = tuple(one.arg for one in _all_arguments(makers[0].args))[1:]
    elif "dataclass" in _decorators(node):
        fields = [
            n for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            if "ClassVar" not in ast.unparse(n.annotation)
        ]  # fmt: skip
        names = tuple(one.target.id for one in fields)
        signature = f"({', '.join(map(_field, fields))})"
    line = min([node.lineno, *(one.lineno for one in node.decorator_list)])
    doc = _doc(node)
    if makers and "Args:" not in doc and "Args:" in _doc(makers[0]):
        doc = f"{doc}\n\n{_doc(makers[0])}"
    kind = "exception" if error else "class"
    members = tuple(_things(node.body, name))
    return Thing(name, kind, signature, doc, line, names, (), members)


def _field(node: ast.AnnAssign) -> str:
    """A field of a dataclass as a parameter."""
    said = f"{node.target.id}: {ast.unparse(node.annotation)}"
    value = node.value
    if isinstance(value, ast.Call) and ast.unparse(value.func).split(".")[-1] == "field":
        given = {word.arg: word.value for word in value.keywords}
        value = given.get("default") or given.get("default_factory")
        if "default" not in given and value is not None:
            return f"{said} = {ast.unparse(value)}()"
    return f"{said} = {ast.unparse(value)}" if value is not None else said


def _complaints(module: Module) -> Iterator[str]:
    """What is ill-formed in a module's docstrings, as sentences."""
    for top in module.things:
        for thing in (top, *top.members):
            where = f"{module.name}.{thing.name}"
            if not thing.doc:
                yield f"{where} has no docstring."
            for formula in formulas_of(thing.doc):
                try:
                    render(formula)
                except ValueError as problem:
                    yield f"the docstring of {where} has the formula {formula!r}: {problem}"
            named = [
                name.lstrip("*")
                for kind, items in sections(thing.doc)[1]
                if kind == "param"
                for name, _ in items
            ]
            for name in named:
                if thing.arguments and name not in thing.arguments:
                    yield f"the docstring of {where} describes {name!r}, which it does not take."
