"""The plain copy of widgets that a saved notebook keeps, and when each of the two is seen."""

from __future__ import annotations

SAVED = (
    "<style>.jp-OutputArea-child:not(:has(.effnb-panel,.effnb-offer))"
    ":has(+ .jp-OutputArea-child .effnb-saved){display:none!important}</style>"
)
"""In the copy: hides what the front end says in place of widgets that no longer exist."""


def hidden_while_live(name: str) -> str:
    """In the widgets: hides the copy of a class while they are on the page."""
    return f"<style>.{name},.jp-OutputArea-child:has(.{name}){{display:none}}</style>"
