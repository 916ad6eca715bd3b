"""Docstrings as pages show them: Google's kind, in Markdown, with formulas between dollar signs.

A docstring that is not well-formed is shown as well as it can be; it never stops the book.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import TYPE_CHECKING

from effnb.book.site.katex import render

if TYPE_CHECKING:
    from effnb.book.site.reference import Module, Reference

_FIELDS = {
    "args": "param",
    "arguments": "param",
    "parameters": "param",
    "attributes": "ivar",
    "raises": "raises",
    "returns": "returns",
    "yields": "returns",
}
_OTHERS = {"example", "examples", "note", "notes", "source", "sources", "references", "shapes"}


_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.DOTALL)


def formulas_of(doc: str) -> list[str]:
    """The formulas of a docstring, in TeX."""
    bare = re.sub(r"`[^`]*`", " ", doc)
    return [a or b for a, b in _FORMULA.findall(bare)]


def sections(doc: str) -> tuple[str, list[tuple[str, list[tuple[str, str]]]]]:
    """A docstring's text, and its sections of fields: kind, then name and description of each."""
    text: list[str] = []
    fields: list[tuple[str, list[tuple[str, str]]]] = []
    lines = doc.splitlines()
    position = 0
    while position < len(lines):
        head = re.fullmatch(r"([A-Z][a-z]+):", lines[position].rstrip())
        word = head[1].lower() if head else ""
        if word not in _FIELDS and word not in _OTHERS:
            text.append(lines[position])
            position += 1
            continue
        position += 1
        block = []
        while position < len(lines) and (not lines[position].strip() or lines[position][0] == " "):
            block.append(lines[position])
            position += 1
        body = textwrap.dedent("\n".join(block)).strip("\n")
        if word in _OTHERS:
            text += ["", f"**{head[1]}**", "", *body.splitlines(), ""]
        elif _FIELDS[word] == "returns":
            fields.append(("returns", [("", body)]))
        else:
            fields.append((_FIELDS[word], _items(body)))
    return "\n".join(text).strip("\n"), fields


def _items(body: str) -> list[tuple[str, str]]:
    """The entries of a section: a name, and what is said of it."""
    found: list[list[str]] = []
    for line in body.splitlines():
        head = re.match(r"(\*{0,2}[A-Za-z_][\w.]*)\s*(?:\([^)]*\))?:\s*(.*)", line)
        if head and not line.startswith(" "):
            found.append([head[1], head[2]])
        elif found:
            found[-1][1] += "\n" + line.strip()
        elif line.strip():
            found.append(["", line.strip()])
    return [(name, said.strip()) for name, said in found]


def markdown(doc: str, reference: Reference, module: Module, owner: str = "") -> str:
    """A docstring in the Markdown that the pages are written in.

    Args:
        doc: The docstring.
        reference: Names in code that mean an object become links to it.
        module: Where it is defined.
        owner: The class that it belongs to, if it does.
    """
    text, fields = sections(doc)
    parts = [_prose(text, reference, module, owner)]
    for kind, items in fields:
        for name, said in items:
            words = _prose(said, reference, module, owner)
            first, *rest = words.splitlines() or [""]
            label = f":{kind}:" if kind == "returns" else f":{kind} {name or 'value'}:"
            parts.append("\n".join([f"{label} {first}", *(f"  {line}" for line in rest)]))
    return "\n\n".join(filter(None, parts[:1])) + "\n\n" + "\n".join(parts[1:])


def _prose(text: str, reference: Reference, module: Module, owner: str) -> str:
    """Plain docstring text, made safe for MyST."""
    out: list[str] = []
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        line = lines[position]
        before = lines[position - 1].strip() if position else ""
        inside_list = bool(re.match(r"\s*(?:[-*]|\d+\.)\s", "\n".join(out[-1:])))
        if line.startswith("    ") and not before and not inside_list:
            block = []
            while position < len(lines) and (
                lines[position].startswith("    ") or not lines[position].strip()
            ):
                block.append(lines[position])
                position += 1
            code = textwrap.dedent("\n".join(block)).strip("\n")
            out += [f"```{_language(code)}", code, "```", ""]
            continue
        out.append(line)
        position += 1
    pieces = re.split(r"(^```.*?^```$|``.+?``|`[^`\n]+`|\$\$.+?\$\$|\$[^$]+?\$)", "\n".join(out),
                      flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            safe = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", piece).replace("$", r"\$")
            safe = re.sub(
                r"^(\s*)([%+]{1,3}|:{3,}|={3,}|\([\w-]+\)=)(?=\s|$)", r"\1\\\2", safe, flags=re.M
            )
            pieces[index] = re.sub(r"(?<=\w)\{(?=\w)", r"\\{", safe)
        elif piece.startswith("$"):
            pieces[index] = _formula(piece)
        elif not piece.startswith("``"):
            pieces[index] = _code(piece, reference, module, owner)
    return "".join(pieces)


def _language(code: str) -> str:
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def _formula(piece: str) -> str:
    """A formula as it is, or as code where it cannot be set."""
    tex = piece.strip("$")
    try:
        render(tex)
    except ValueError:
        return f"`{tex}`"
    if not piece.startswith("$$"):
        return f"${' '.join(tex.split())}$"
    return f"\n\n$$\n{tex.strip()}\n$$\n\n" if "\n" in tex else piece


def _code(piece: str, reference: Reference, module: Module, owner: str) -> str:
    """A name in code, as a link where it means a public object."""
    name = piece.strip("`").removesuffix("()")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        return piece
    for attempt in (f"{module.name}.{owner}.{name}", f"{module.name}.{name}", name):
        full = reference.find(attempt) if attempt.startswith("effnb.") else None
        if full:
            return f"{{py:obj}}`{name} <{full}>`"
    return piece


def first_sentence(doc: str) -> str:
    """What a docstring says first, on one line."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    return re.sub(r"^(.+?[.!?])(?:\s.*|$)", r"\1", paragraph)
