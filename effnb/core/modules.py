"""Find modules by name pattern, and put others in their place without touching the original.

Every method of the workbook is a function from a model to a *new* model: a slider must be able to
go back. The new model shares every tensor that the method did not change, so that fifty settings
of a slider do not need fifty copies of the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from effnb.core.checks import check_loaded

Model = TypeVar("Model", bound=nn.Module)

HEADS = ("lm_head", "*.lm_head", "embed_out", "*.classifier", "classifier", "score")
"""Output heads by their usual names; compression methods leave them alone unless told otherwise."""


def share(model: Model) -> Model:
    """Copy the modules of a model, but not its parameters and buffers: both models hold the same.

    The copy costs kilobytes. Replacing one of its modules, or one of its parameters by another
    object, does not show in the original; writing into a shared tensor in place would.

    Raises:
        ValueError: When weights are on the meta device (offloaded, or never loaded).
    """
    check_loaded(model)
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=kept)


def clone(model: Model) -> Model:
    """Copy a model with all its tensors, for what must write into them (training)."""
    return copy.deepcopy(model)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a module's dotted name fits one of the shell-style patterns (`*`, `?`, `[...]`)."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def named_modules_of(
    model: nn.Module,
    kind: type | tuple[type, ...],
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = (),
) -> dict[str, nn.Module]:
    """All modules of a kind whose dotted name fits `include` and none of `exclude`.

    Raises:
        ValueError: When none fits; the sentence names some that exist. When weights are on the meta
            device (offloaded, or never loaded).
    """
    check_loaded(model)
    include = [include] if isinstance(include, str) else list(include)
    everything = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
    found = {
        name: module
        for name, module in everything.items()
        if matches(name, include) and not matches(name, exclude)
    }
    if not found:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        known = ", ".join(list(everything)[:3]) or "none at all"
        raise ValueError(
            f"no {' or '.join(k.__name__ for k in kinds)} fits the pattern {', '.join(include)}; "
            f"the model has {known}{', …' if len(everything) > 3 else ''}."
        )
    return found


def linears(
    model: nn.Module, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = HEADS
) -> dict[str, nn.Linear]:
    """The linear layers of a model by name; output heads are left out by default."""
    return named_modules_of(model, nn.Linear, include, exclude)


def replace_modules(model: Model, new: Mapping[str, nn.Module]) -> Model:
    """A model with the named modules replaced; everything else is shared with the original.

    Raises:
        KeyError: When a name is not a module of the model.
    """
    known = dict(model.named_modules())
    unknown = [name for name in new if name not in known or name == ""]
    if unknown:
        raise KeyError(f"the model has no module named {unknown[0]!r}.")
    result = share(model)
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(result.get_submodule(parent), leaf, module)
    return result


def map_linears(
    model: Model,
    function: Callable[[str, nn.Linear], nn.Module],
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = HEADS,
) -> Model:
    """Replace each fitting linear layer by `function(name, layer)`."""
    return replace_modules(
        model, {name: function(name, m) for name, m in linears(model, include, exclude).items()}
    )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of equal blocks that a transformer consists of, with its dotted name.

    It is the longest `nn.ModuleList` whose entries are all of one class; of several equally long,
    the outermost.

    Raises:
        ValueError: When the model has no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        uniform = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if uniform and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ValueError("the model has no list of equal blocks (an nn.ModuleList of one class).")
    return best
