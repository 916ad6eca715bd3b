"""What a chapter's prose may ask of those who only read it: nothing that needs a kernel, unsaid.

A stored page moves one or two knobs of a panel among a few positions. An instruction that needs
another knob, a pin, or a model that answers *while you wait* says "when you run this page".
"""

from __future__ import annotations

import re

from effnb.book.site.panels import VIEW, NoPanel, stored_panel

SAID = "when you run this page"
GOALS = "After this chapter you can"
_NEEDS = re.compile(r"\bwhile you wait\b|\bpin\b(?! down)", re.IGNORECASE)
_OTHERS = re.compile(r"The other knobs need a running kernel; here (.*)\.$")


def unsaid(markdown: str, labels: tuple[str, ...] = ()) -> list[str]:
    """Pieces of prose that need a kernel and do not say so.

    Args:
        markdown: The text of a cell.
        labels: Knobs that the stored page does not move.
    """
    named = [re.escape(label) for label in labels if " " in label or len(label) > 6]
    knobs = re.compile(rf"\b(?:{'|'.join(named)})s?\b", re.IGNORECASE) if named else None
    found, intro = [], ""
    for block in re.split(r"\n\s*\n", markdown):
        items = re.findall(r"^[-*] .*(?:\n(?![-*] ).+)*", block, re.MULTILINE)
        pieces = items or [block]
        for piece in pieces:
            moved = items and knobs and intro.strip() != GOALS  # what is learned is no instruction
            asks = _NEEDS.search(piece) or (moved and knobs.search(piece))
            if asks and SAID not in (piece + (intro if items else "")).lower():
                found.append(" ".join(piece.split()))
        intro = block
    return found


def still_knobs(notebook: dict) -> tuple[str, ...]:
    """The labels of all knobs that the stored panels of a notebook do not move."""
    found: dict[str, None] = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            view = output.get("data", {}).get(VIEW)
            if not view:
                continue
            try:
                note = stored_panel(notebook, view["model_id"]).note
            except NoPanel:
                continue
            others = _OTHERS.search(note)
            for part in re.split(r", (?=[^,=]+ = )", others[1]) if others else ():
                found[part.rpartition(" = ")[0]] = None
    return tuple(found)
