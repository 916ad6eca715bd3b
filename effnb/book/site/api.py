"""The pages of the reference, one for each module."""

from __future__ import annotations

from effnb.book.site.docstrings import markdown
from effnb.book.site.reference import Module, Reference, Thing


def module_page(
    module: Module, reference: Reference, shown: dict[str, list[tuple[str, str]]]
) -> str:
    """The page of one module, in MyST.

    Args:
        module: The module.
        reference: All of them.
        shown: For the full name of an object, titles of chapters that show or use it, each with a
            link that works on this page.
    """
    short = ".".join(module.name.split(".")[-2:])
    lines = [f"# {short}", "", f"```{{py:module}} {module.name}", "```", ""]
    lines += [f"`{module.name}`", ""] if short != module.name else []
    lines += [markdown(module.doc, reference, module), ""]
    for thing in module.things:
        lines += [_entry(thing, module, reference, shown, 6), ""]
    return "\n".join(lines)


def _entry(thing: Thing, module: Module, reference: Reference, shown: dict, ticks: int) -> str:
    """One object as a directive."""
    fence = "`" * ticks
    full = f"{module.name}.{thing.name}"
    last = thing.name.rpartition(".")[2]
    options = [f":module: {module.name}", *(f":{option}:" for option in thing.options)]
    signature = thing.signature
    if thing.kind == "property":
        options += [f":type: {signature}"] if signature else []
        signature = ""
    elif thing.kind == "data":
        options += [f":value: {signature.removeprefix(' = ')}"] if signature else []
        signature = ""
    named = last if thing.kind in ("method", "property") else thing.name
    place = f"../source/{module.path.as_posix()}.html#L-{thing.line}"
    source = f'<a class="source-link" href="{place}">source</a>'
    lines = [f"{fence}{{py:{thing.kind}}} {named}{signature}", *options, "", source, ""]
    owner = thing.name if thing.members else thing.name.rpartition(".")[0]
    lines += [markdown(thing.doc, reference, module, owner), ""]
    passed = reference.shortest(full) if "." not in thing.name else module.name
    if passed != module.name:
        lines += [f"Import it as `from {passed} import {last}`.", ""]
    if shown.get(full):
        links = ", ".join(f"[{title}]({target})" for title, target in shown[full])
        lines += [f"Shown in {links}.", ""]
    for member in thing.members:
        lines += [_entry(member, module, reference, shown, ticks - 1), ""]
    return "\n".join([*lines, fence])
