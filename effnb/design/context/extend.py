"""All context extensions by name, so that one function serves a slider or a search.

Each name is that of a function of this package, whose options it takes. "none" is the model as it
is, which every comparison needs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from effnb.core.modules import Model
from effnb.design.context.dynamic_ntk import dynamic_ntk
from effnb.design.context.ntk_aware import ntk_aware
from effnb.design.context.ntk_by_parts import ntk_by_parts
from effnb.design.context.position_interpolation import position_interpolation
from effnb.design.context.rotary_table import check_factor, rotary_table
from effnb.design.context.yarn import yarn

METHODS: dict[str, Callable[..., Any]] = {
    "position_interpolation": position_interpolation,
    "ntk_aware": ntk_aware,
    "dynamic_ntk": dynamic_ntk,
    "ntk_by_parts": ntk_by_parts,
    "yarn": yarn,
}
"""From names to functions of (model, factor); dynamic NTK takes no factor."""


def extend(model: Model, method: str, factor: float = 1.0, **options: Any) -> Model:
    """Lengthen the context of a model by one of the methods of `METHODS`.

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        method: A name of `METHODS`, or "none", which gives the model itself.
        factor: The new context length divided by the trained one. "dynamic_ntk" follows the text's
            length and has no use for it; "none" ignores it.
        options: Of the method, such as `ramp`, `alpha`, `beta`, `attention`, `trained_length`.

    Returns:
        A new model that shares all weights with the given one.

    Raises:
        ValueError: An unknown method or option, or what the method refuses.
    """
    check_factor(factor)
    if method != "none" and method not in METHODS:
        known = ", ".join(["none", *METHODS])
        raise ValueError(f"method is {method!r}; choose one of {known}.")
    taken = _options(METHODS[method]) if method != "none" else set()
    unknown = sorted(set(options) - taken)
    if unknown:
        raise ValueError(
            f"{method} has no option {unknown[0]!r}; it takes {', '.join(sorted(taken)) or 'none'}."
        )
    if method == "none":
        rotary_table(model)
        return model
    function = METHODS[method]
    return function(model, **options) if method == "dynamic_ntk" else function(
        model, factor, **options
    )  # fmt: skip


def _options(function: Callable[..., Any]) -> set[str]:
    """The keyword-only parameters of a method."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
