"""What carries deltas in place of a module, and applies those that are active.

Most deltas act on a module's output or parameters: their host is a wrapper, `WithDeltas`. Those
that change how a block or a model runs leave it where it is and subclass its class (`InPlace`).
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules import module as hooks

from effnb.core.delta_kinds import Delta
from effnb.core.modules import exchange


class WithDeltas(nn.Module):
    """A module with deltas on it, applied one after the other in the order of `active`.

    A single active delta may compute its module's part too (`Delta.with_base`). Then neither of
    the two is called, so this is tried only where no hook waits for such a call and neither has
    been given a `forward` of its own.
    """

    base: nn.Module
    deltas: nn.ModuleDict

    def __init__(self, base: nn.Module) -> None:
        """Start without deltas: the function of `base`."""
        super().__init__()
        self.base, self.deltas = base, nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def forward(self, *given: Any, **keywords: Any) -> Any:
        """Run the module, then its active deltas; or both at once.

        What the deltas see as inputs is the first argument, however it is passed.
        """
        inputs = given[0] if given else next(iter(keywords.values()), None)
        alone = len(given) == 1 and not keywords
        if len(self.active) == 1 and alone:
            delta = self.deltas[self.active[0]]
            if not (_watched(self.base) or _watched(delta)):
                output = delta.with_base(inputs, self.base)
                if output is not None:
                    return output
        changed = self.changed()
        if changed:
            output = functional_call(self.base, changed, given, keywords)
        elif torch.is_grad_enabled() and _packed(self.base) and alone:
            output = _ReadAgain.apply(inputs, self.base)
        else:
            output = self.base(*given, **keywords)
        for name in self.active:
            output = self.deltas[name](inputs, output, self.base)
        return output

    def changed(self) -> dict[str, Tensor]:
        """The parameters of the module that its active deltas change, as they are with them.

        Sums are taken in the type of the differences and rounded once to that of the parameter.
        """
        sums: dict[str, Tensor] = {}
        for name in self.active:
            for leaf, difference in self.deltas[name].differences(self.base).items():
                sums[leaf] = sums[leaf] + difference if leaf in sums else difference
        # $\theta' = \theta + \sum_i \Delta\theta_i$
        return {leaf: added(self.base.get_parameter(leaf), total) for leaf, total in sums.items()}

    def __getattr__(self, name: str) -> Any:
        """What the module has and a host has not, for code that reads it off the module."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            # A layer stored in few bits is asked itself for what makes it one.
            if base is None or name.startswith("__") or hasattr(type(base), "dequantized"):
                raise
            if base._parameters.get(name) is not None:
                return self.changed().get(name, base._parameters[name])
            return getattr(base, name)

    @property
    def weight(self) -> Tensor:
        """The weight that the module computes with, for code that reads it without a call."""
        return self.changed().get("weight", self.base.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias that the module computes with."""
        return self.changed().get("bias", self.base.bias)

    @property
    def in_features(self) -> int:
        """Inputs of a linear layer."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Outputs of a linear layer."""
        return self.base.out_features


def added(parameter: Tensor, difference: Tensor) -> Tensor:
    """A parameter plus a difference, summed in the wider of their types and rounded once."""
    wide = torch.promote_types(parameter.dtype, difference.dtype)
    return (parameter.to(wide) + difference.to(wide)).to(parameter.dtype)


class InPlace:
    """What a module's class inherits from while the module carries deltas that are `in_place`.

    The module is no wrapper around another: it stays where it is, with its own attributes and the
    same names of its parts, and is of a subclass of its class.

    Attributes:
        plain: The class without deltas.
    """

    plain: ClassVar[type[nn.Module]]
    deltas: nn.ModuleDict
    active: tuple[str, ...]

    @property
    def base(self) -> nn.Module:
        """The module under the deltas: itself."""
        return self


@functools.cache
def _hosting(kind: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a module's class that applies deltas, later ones around earlier ones."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        run = functools.partial(kind.forward, self)
        for name in self.active:
            run = functools.partial(self.deltas[name].around, run, self)
        return run(*arguments, **keywords)

    about = {"plain": kind, "forward": forward, "__module__": kind.__module__}
    return type(kind.__name__, (InPlace, kind), about | {"__doc__": kind.__doc__})


def _ordinary(module: nn.Module, given: Any, output: Any) -> None:
    """A hook that does nothing, under which a layer of PyTorch calls its parts one by one."""


def _calls_parts(model: nn.Module, module: nn.Module) -> bool:
    """Whether a fused path of PyTorch may read a module's tensors in place of calling it."""
    blocks = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return not any(module is part for block in blocks for part in block.modules())


def host_of(model: nn.Module, module: nn.Module, path: str, delta: Delta) -> WithDeltas | InPlace:
    """What carries a delta in place of a model's module, made where there is nothing yet."""
    if isinstance(module, InPlace if delta.in_place else WithDeltas):
        return module
    if isinstance(module, InPlace | WithDeltas) or "forward" in vars(module):
        raise ValueError(
            f"{path or 'the model'} cannot carry a delta of kind {delta.kind!r}: it has deltas of "
            "another sort, or a `forward` of its own."
        )
    if not delta.in_place:
        host = WithDeltas(module).train(module.training)
        if not _calls_parts(model, module):
            host.register_forward_hook(_ordinary)
        exchange(model, {module: host})  # wherever the layer is used
        return host
    if isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise ValueError(  # they run all that they hold, the deltas too
            f"{path or 'the model'} is a {type(module).__name__}, a plain list of modules, which "
            f"cannot carry a delta of kind {delta.kind!r}."
        )
    module.__class__ = _hosting(type(module))
    module.deltas, module.active = nn.ModuleDict(), ()
    return module


def _watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class's `forward`."""
    kinds = ("forward_pre", "forward", "backward_pre", "backward")
    hooked = any(getattr(module, f"_{kind}_hooks") for kind in kinds)
    return hooked or "forward" in vars(module) or bool(hooks._has_any_global_hook())


class _ReadAgain(torch.autograd.Function):
    r"""A frozen linear layer stored in few bits, whose weight is read back once more to go back.

    Ordinary autograd would keep the weight it was read back to, in full size, until the backward
    pass: training would need the memory that quantizing saved. $\partial x = \partial y\, \hat W$.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, base: nn.Module) -> Tensor:
        ctx.base = base
        return base(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return gradient @ ctx.base.dequantized(gradient.dtype).weight, None


def _packed(base: nn.Module) -> bool:
    """Whether it is a linear layer stored in few bits with nothing to train in it.

    Not one whose kernel has a backward pass of its own, which goes by the codes as well.
    """
    readable = not isinstance(base, nn.Linear) and hasattr(base, "dequantized")
    if getattr(getattr(base, "quantized", None), "differentiable", False):
        return False
    return readable and not any(p.requires_grad for p in base.parameters())
