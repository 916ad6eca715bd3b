"""What a method left out: weights that it does not touch are reported, never passed over."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn


class LeftOut(UserWarning):
    """Weights that a method left as they are, without having been asked to."""


@dataclass(frozen=True)
class Coverage:
    """Which weights of a model a method does not touch.

    Attributes:
        parameters: Numbers in the model, tied tensors once.
        left_out: How many numbers each tensor holds that was asked for and is left as it is,
            largest first.
    """

    parameters: int
    left_out: dict[str, int]

    @property
    def share(self) -> float:
        """Part of the model's parameters that is left as it is, from 0 to 1."""
        return sum(self.left_out.values()) / max(self.parameters, 1)

    def __str__(self) -> str:
        if not self.left_out:
            return "no weight was left out"
        names = list(self.left_out)
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        share = f"{self.share:.0%}" if self.share >= 0.01 else "less than 1%"
        return (
            f"{share} of the model's parameters are left as they are: {', '.join(names[:2])}{more}"
        )


def coverage(
    model: nn.Module, covered: Iterable[nn.Module], asked: Callable[[str], bool] = lambda _: True
) -> Coverage:
    """Which weights a method leaves out that compresses some of a model's modules.

    Counted are parameters of two dimensions or more. Embeddings are another matter than layers, and
    what this package put into a model (factors, deltas) is not the model's own: neither is counted.

    Args:
        model: The model.
        covered: The modules that the method compresses, with all that is inside them.
        asked: Whether a module's or tensor's name was asked for; output heads usually are not.
    """
    done = {id(p) for module in covered for p in module.parameters()}
    done |= {
        id(p)
        for module in model.modules()
        if type(module).__module__.startswith("effnb.") and not _own(module)
        for part in module.modules()
        if not isinstance(part, nn.Linear) and not _own(part)
        for p in part.parameters(recurse=False)
    }
    left: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}" if path else key
            if parameter.ndim >= 2 and id(parameter) not in done and asked(path) and asked(name):
                left[name] = parameter.numel()
    ordered = dict(sorted(left.items(), key=lambda item: -item[1]))
    return Coverage(sum(p.numel() for p in model.parameters()), ordered)


def _own(module: nn.Module) -> bool:
    """Whether a module of this package holds weights of the model, as an architecture's does."""
    return getattr(module, "holds_own_weights", False)


def report(found: Coverage, why: str) -> None:
    """Warn of what is left out, if anything is; the warning points to the caller's own line."""
    if not found.left_out:
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(("effnb.", "jaxtyping")):
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{found}; {why}.", LeftOut, stacklevel=level)
