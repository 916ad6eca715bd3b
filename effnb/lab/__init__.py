"""The furniture that chapters share: models, corpora, panels, figures, checks, source listings.

    from effnb.lab import figure, knob, load, panel, show

Names are looked up when they are first used, so that importing this costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

_HOMES = {
    "cards": ("compare_costs", "cost_card"),
    "checks": ("Exercise",),
    "claims": ("claims_table", "judge"),
    "devices": ("device", "machine"),
    "axes": ("name_lines",),
    "differences": ("paired", "paired_answers"),
    "figures": ("PALETTE", "figure", "style"),
    "listing": ("show",),
    "models": ("load",),
    "panels": ("guess", "guesses", "knob", "panel"),
    "quality": ("Curves", "Quality", "Subject", "quality_panel"),
    "tables": ("NOT_MEASURED", "table"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
_MODULES = (*_HOMES, "corpora", "results")

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


if "ipykernel" in sys.modules:
    # In a notebook, whose first cell imports this: a name that an earlier cell makes is explained.
    import_module(f"{__name__}.order").prepare()
