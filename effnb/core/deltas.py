"""The protocol that all delta tuning shares: attach, train, save, swap, merge, detach.

A *delta* is a small set of trained tensors on top of a frozen model (Ding et al., "Parameter-
efficient fine-tuning of large-scale pre-trained language models", 2023, doi
10.1038/s42256-023-00626-4). Here it is a named set of `Delta` modules, each of which sits on one
module of the model and turns its output into another one. LoRA, adapters and the rest only say
what that change is; everything around it is in this file (and in
`delta_files`).

Three rules make models with deltas safe to share and to train:

1. No function changes the model it is given; each returns a new one.
2. Frozen tensors are shared between all of them, so a further delta costs its own kilobytes only.
3. What requires a gradient in a returned model belongs to that model alone. Training it in place
   (`effnb.core.training.train`) therefore changes no other model. The one exception is a model
   whose last delta was detached or merged: it is as trainable as the original was, and shares
   the tensors that did not change with it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.modules import module as hooks

from effnb.core.checks import check_loaded
from effnb.core.linear_form import restore
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    exchange,
    matches,
    settle_tying,
)

KINDS: dict[str, type[Delta]] = {}
"""The classes that have a kind; importing a method's module adds its own."""


class Delta(nn.Module):
    """The change that is trained on top of one module. Subclasses say which.

    Attributes:
        kind: Name of the method, written into files.
        additive: Whether it adds something to the output that depends on the input alone. Only
            such deltas can be merged while others come before them.
        reads_base: Whether what it does follows from the frozen weights under it. No other delta of
            the same module can be merged into them while it is active.
        in_place: Whether it changes more than an output: it then runs the module itself, in
            `around`, and `forward` is never called. It may sit on a whole block or model, whose
            parts keep their names.
    """

    kind: ClassVar[str] = ""
    additive: ClassVar[bool] = False
    reads_base: ClassVar[bool] = False
    in_place: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Remember which class reads the files of this kind."""
        super().__init_subclass__(**keywords)
        if cls.kind:
            KINDS[cls.kind] = cls

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The new output of a module, from its inputs, its output so far and the module itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does to an output.")

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""What it adds to the module's own parameters, by their names, before the module runs.

        Nothing is the default. $\theta' = \theta + \sum_i \Delta\theta_i$: each delta finds its
        difference from the frozen parameters, and those of several active deltas are summed.
        """
        return {}

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """The output of a module that `run` runs, with the deltas before this one.

        Only deltas that are `in_place` have it; `base` is the module, for its settings.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs a module.")

    def with_base(self, inputs: Any, base: nn.Module) -> Any:
        """The output of the module and this delta computed at once, or None: first one, then this.

        None is the default, and always right. A delta that has a faster way for both together
        answers here; the result must be that of `forward` on `base(inputs)`, up to rounding. It is
        asked only where the module has one input, this delta is the only active one, and nothing
        would miss the calls that are saved (`WithDeltas`).
        """
        return None

    def merged(self, base: nn.Module) -> nn.Module:
        """A module of the same class as `base` that does what `base` with this delta does.

        Raises:
            ValueError: When there is none, which is the default.
        """
        raise ValueError(f"a delta of kind {self.kind!r} cannot be merged into the weights.")

    def settings(self) -> dict[str, Any]:
        """What a file must say besides the tensors; the same on all layers of one delta."""
        return {}

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> Delta:
        """Make the delta of one module from what a file says; `tensors` are loaded afterwards.

        Raises:
            ValueError: When the tensors do not fit the module.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be read from a file.")

    @classmethod
    def rebuild_all(
        cls,
        modules: Mapping[str, nn.Module],
        settings: dict[str, Any],
        layers: Mapping[str, dict[str, Tensor]],
    ) -> dict[str, Delta]:
        """Make the deltas of all modules: one for each that has tensors, unless overridden.

        Args:
            modules: Every module of the model by name, without the deltas that it carries.
            settings: What `settings` gave.
            layers: From names of modules to their tensors in the file.

        Raises:
            ValueError: When the tensors do not fit; the sentence names the module.
        """
        found = {}
        for path, tensors in layers.items():
            try:
                found[path] = cls.rebuild(modules[path], settings, tensors)
            except ValueError as problem:
                raise ValueError(f"{path}: {problem}") from None
        return found


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


def _host(model: nn.Module, module: nn.Module, path: str, delta: Delta) -> WithDeltas | InPlace:
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


def refuse_rounded_inputs(model: nn.Module) -> None:
    """Refuse a model whose layers round their inputs: their derivative is 0 almost everywhere.

    Raises:
        ValueError: When it has such a layer.
    """
    for path, module in model.named_modules():
        if getattr(module, "rounds_inputs", False):
            raise ValueError(
                f"{path or 'the model'} rounds its inputs, which no gradient passes; train first, "
                "and let the model round inputs afterwards."
            )


# --- finding --------------------------------------------------------------------------------------


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that they had before the first delta; hosts stand for their bases.

    Deltas themselves are left out. A module used in several places has the name of the first.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[path] = module
        inner = module.base if isinstance(module, WithDeltas) else module
        seen.add(id(inner))
        for name, child in inner.named_children():
            if not (isinstance(inner, InPlace) and child is inner.deltas):
                visit(child, f"{path}.{name}" if path else name)

    visit(model, "")
    return found


def hosts(model: nn.Module, name: str | None = None) -> dict[str, WithDeltas | InPlace]:
    """The modules that carry deltas, by dotted name; those of one delta if `name` is given.

    Raises:
        ValueError: When no delta of that name is attached.
    """
    every = {
        path: module
        for path, module in modules_by_name(model).items()
        if isinstance(module, WithDeltas | InPlace)
    }
    if name is None:
        return every
    found = {path: host for path, host in every.items() if name in host.deltas}
    if not found:
        known = ", ".join(attached(model)) or "none"
        raise ValueError(f"no delta is named {name!r}; attached: {known}.")
    return found


def attached(model: nn.Module) -> tuple[str, ...]:
    """Names of the deltas on a model; those of one module in the order in which they came."""
    return tuple(dict.fromkeys(n for host in hosts(model).values() for n in host.deltas))


def linear_layers(model: nn.Module, layers: LayerChoice = "*") -> dict[str, nn.Module]:
    """Linear layers of any storage by name: `nn.Linear`, quantized ones, and those with deltas.

    What counts is an `in_features` and an `out_features`. `torch.nn.MultiheadAttention` reads the
    weights of its linear layer without calling it, so that one is left out.

    Raises:
        ValueError: When none fits the patterns; the sentence names some that exist. When weights
            are on the meta device (offloaded, or never loaded).
    """
    check_loaded(model)
    wanted = Layers.of(layers).on(model)
    inside: set[int] = set()
    everything: dict[str, nn.Module] = {}
    for path, module in modules_by_name(model).items():
        if isinstance(getattr(module, "base", module), nn.MultiheadAttention):
            inside.add(id(getattr(module, "base", module).out_proj))
        sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if path and id(module) not in inside and all(isinstance(n, int) for n in sizes):
            everything[path] = module
    found = {path: m for path, m in everything.items() if wanted.fit(path)}
    if not found:
        known = ", ".join(list(everything)[:3]) or "none at all"
        raise ValueError(
            f"no linear layer fits the pattern {', '.join(wanted.include)}; the model has {known}"
            f"{', …' if len(everything) > 3 else ''}."
        )
    return found


# --- what is shared and what is trained -----------------------------------------------------------


def _copied(model: Model, parameter: Callable[[nn.Parameter], nn.Parameter]) -> Model:
    """A copy of the modules with each parameter replaced; tied ones stay tied, buffers are shared.

    Running statistics are copied: training writes into them, whatever requires a gradient.
    """
    running = {
        id(buffer)
        for module in model.modules()
        if getattr(module, "track_running_stats", False)
        for buffer in module.buffers(recurse=False)
    }
    memo: dict[int, Any] = {id(b): b for b in model.buffers() if id(b) not in running}
    memo |= {id(p): parameter(p) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter object on the same memory, so that the flag is not shared."""
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _own(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone())


def freeze(model: Model) -> Model:
    """A model with the same tensors, none of which requires a gradient; the original's still do.

    Each module notes which of its parameters were trainable, for `thaw`.
    """
    result = _copied(model, _frozen)
    for old, new in zip(model.modules(), result.modules(), strict=True):
        trainable = {key for key, p in old.named_parameters(recurse=False) if p.requires_grad}
        if trainable and not isinstance(old, Delta):
            new._trainable_before = getattr(old, "_trainable_before", frozenset()) | trainable
    return result


def thaw(model: Model) -> Model:
    """The inverse of `freeze`: the same tensors, as trainable as they were before it."""
    wanted = {
        id(p)
        for module in model.modules()
        for key, p in module.named_parameters(recurse=False)
        if key in getattr(module, "_trainable_before", ())
    }

    def parameter(old: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(old.detach(), old.requires_grad or id(old) in wanted)

    result = _copied(model, parameter)
    for module in result.modules():
        module.__dict__.pop("_trainable_before", None)
    return result


def _forked(model: Model) -> Model:
    """A copy that shares what is frozen and has its own of what is trained."""
    return _copied(model, lambda p: _own(p) if p.requires_grad else _frozen(p))


def set_trainable(model: Model, *names: str, also: str | Iterable[str] = ()) -> Model:
    """Train these deltas and nothing else.

    Attaching a delta makes it the only one that is trained; this is how to train several at once,
    an earlier one again, or none.

    Args:
        model: A model with deltas; it is not changed.
        names: The deltas to train. The returned model has copies of their tensors.
        also: Patterns of names of further parameters to train, such as a new classifier's
            ("score.*"). They belong to no delta: save them yourself.

    Raises:
        ValueError: When a name is unknown, or a pattern fits no parameter.
    """
    also = [also] if isinstance(also, str) else list(also)
    wanted = {id(p) for name in names for p in delta_parameters(model, name).values()}
    for pattern in also:
        found = {id(p) for key, p in model.named_parameters() if matches(key, pattern)}
        if not found:
            raise ValueError(f"no parameter fits the pattern {pattern}.")
        wanted |= found
    return _copied(model, lambda p: _own(p) if id(p) in wanted else _frozen(p))


def set_active(model: Model, *names: str) -> Model:
    """Apply these deltas, in this order, and no other; without names, the frozen model's function.

    Raises:
        ValueError: When a name is unknown or given twice.
    """
    for name in names:
        hosts(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"a delta is named twice in {', '.join(names)}.")
    result = _forked(model)
    for host in hosts(result).values():
        host.active = tuple(name for name in names if name in host.deltas)
    return result


# --- attach and take off --------------------------------------------------------------------------


def attach_deltas(model: Model, name: str, deltas: Mapping[str, Delta]) -> Model:
    """Freeze a model and put one delta on each of the named modules.

    Args:
        model: Any model, with or without deltas; it is not changed.
        name: What to call the delta.
        deltas: From dotted module names to what sits there.

    Returns:
        A new model on the same frozen tensors in which the new delta is active, last in order,
        and the only thing that requires a gradient.

    Raises:
        ValueError: When the name is taken or cannot name a module, or there is nothing to attach.
    """
    check_name(model, name)
    if not deltas:
        raise ValueError(f"the delta {name!r} has no layer to sit on.")
    known = modules_by_name(model)
    unknown = [p for p, delta in deltas.items() if p not in known or not (p or delta.in_place)]
    if unknown:
        raise ValueError(f"the model has no module named {unknown[0]!r} to attach a delta to.")
    result = freeze(model)
    places = modules_by_name(result)
    for path, delta in deltas.items():
        host = _host(result, places[path], path, delta)
        host.deltas[name] = delta.train(host.training)
        host.active = (*host.active, name)
    return result


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name for a delta before any work is done.

    Raises:
        ValueError: When it is taken, or cannot be a module's name.
    """
    if name in attached(model):
        raise ValueError(
            f"a delta named {name!r} is attached already; detach it or choose another."
        )
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"{name!r} cannot name a delta: it must not be empty, hold a dot, or be a word that "
            "PyTorch uses for itself."
        )


def detach(model: Model, name: str) -> Model:
    """Take a delta off; with the last one gone, the model is what it was before the first.

    Raises:
        ValueError: When no delta of that name is attached.
    """
    return _without(model, name, lambda path, host: host.base)


def exchange_deltas(model: Model, name: str, deltas: Mapping[str, Delta]) -> Model:
    """The model with a delta in another form: its place in the order, and who is active, stay.

    Args:
        model: A model with the delta; it is not changed.
        name: The delta.
        deltas: What sits in its place, for each module that carries it.

    Raises:
        ValueError: When the name is unknown, or the modules are not those that carry it.
    """
    if hosts(model, name).keys() != deltas.keys():
        raise ValueError(f"the modules given are not those that carry the delta {name!r}.")
    result = _forked(model)
    for path, host in hosts(result, name).items():
        host.deltas[name] = deltas[path].train(host.training)
    return result


def merge(model: Model, name: str, *, dequantize: bool = False) -> Model:
    r"""Add a delta into the weights, so that it costs nothing at inference.

    Each layer that carries it gets a new weight ($W + \frac{\alpha}{r} B A$ for LoRA), and the
    delta is gone. A weight stored in few bits cannot take it up: rounding the sum again would make
    a new error, as large as the one that quantizing made, and undo much of the training.

    Args:
        model: The model; it is not changed.
        name: The delta.
        dequantize: Give quantized layers under the delta their full size back and merge into that.

    Raises:
        ValueError: When the name is unknown, the delta is not active, is of a kind that cannot be
            merged, comes after one that is not additive or is not itself, would change a weight
            that another one reads, or sits on a quantized layer.
    """
    for path, host in hosts(model, name).items():
        _check_merge(path, host, name, dequantize)
    dtype = _dtype(model)

    def merged(path: str, host: WithDeltas | InPlace) -> nn.Module:
        base = host.base
        if not isinstance(base, nn.Linear) and hasattr(base, "dequantized"):
            base = base.dequantized(dtype)
        try:
            return host.deltas[name].merged(base)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None

    return _without(model, name, merged)


def _check_merge(path: str, host: WithDeltas | InPlace, name: str, dequantize: bool) -> None:
    """Refuse a merge that would change what the module computes."""
    if name not in host.active:
        raise ValueError(f"the delta {name!r} is not active: activate it first, or detach it.")
    earlier = host.active[: host.active.index(name)]
    before = [n for n in earlier if not host.deltas[n].additive]
    if before:
        raise ValueError(
            f"the delta {name!r} cannot be merged under {before[0]!r}, which acts on the "
            "output that it would change; merge or detach that one first."
        )
    if earlier and not host.deltas[name].additive:
        raise ValueError(
            f"the delta {name!r} cannot be merged under {earlier[0]!r}, whose output it acts "
            "on as well; merge or detach that one first."
        )
    readers = [n for n in host.active if n != name and host.deltas[n].reads_base]
    if readers:
        raise ValueError(
            f"the delta {name!r} cannot be merged beside {readers[0]!r}, which reads the weight "
            "that would change; merge that one first, or deactivate it."
        )
    base = host.base
    if not isinstance(base, nn.Linear) and hasattr(base, "dequantized") and not dequantize:
        raise ValueError(
            f"{path} is stored quantized, and rounding it again after the merge would make a new "
            "error; keep the delta attached, or pass dequantize=True for a layer of full size."
        )


def _dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: the type of its first parameter that belongs to no delta."""
    inside = {id(p) for host in hosts(model).values() for p in host.deltas.parameters()}
    kinds = [p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside]
    return kinds[0] if kinds else torch.float32


def _without(model: Model, name: str, base_of: Callable[[str, WithDeltas], nn.Module]) -> Model:
    """The model without a delta, and with what the function says in place of modules under it."""
    last = attached(model) == (name,)
    result = _forked(model)
    for path, host in reversed(hosts(result, name).items()):  # what lies inside another comes first
        host.base = base_of(path, host)
        del host.deltas[name]
        host.active = tuple(n for n in host.active if n != name)
        if host.deltas:
            continue
        if isinstance(host, InPlace):
            host.__class__ = host.plain
            del host.deltas, host.active
        else:
            exchange(result, {host: host.base})  # wherever the layer is used
    return settle_tying(restore(thaw(result) if last else result))


# --- the tensors of a delta -----------------------------------------------------------------------


def key_of(path: str, leaf: str) -> str:
    """The name of a delta's tensor: the module's, a dot, its own; the latter for a whole model."""
    return f"{path}.{leaf}" if path else leaf


def delta_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of a delta themselves, by the names that `delta_state_dict` gives them.

    Raises:
        ValueError: When no delta of that name is attached.
    """
    return {
        key_of(path, key): parameter
        for path, host in hosts(model, name).items()
        for key, parameter in host.deltas[name].named_parameters()
    }


def delta_state_dict(model: nn.Module, name: str) -> dict[str, Tensor]:
    """A copy of all tensors of a delta: the layer's name, a dot, the tensor's name.

    Raises:
        ValueError: When no delta of that name is attached.
    """
    return {
        key_of(path, key): tensor.detach().clone()
        for path, host in hosts(model, name).items()
        for key, tensor in host.deltas[name].state_dict().items()
    }


def load_delta(model: Model, name: str, state: Mapping[str, Tensor]) -> Model:
    """The model with other tensors in a delta that is attached: another task, or another time.

    Raises:
        ValueError: When the name is unknown, or names or shapes of the tensors do not fit.
    """
    expected = delta_state_dict(model, name)
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        problem = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the delta has not"
        raise ValueError(f"the state does not fit the delta {name!r}: it {problem}.")
    for key, tensor in expected.items():
        if state[key].shape != tensor.shape:
            raise ValueError(
                f"the state does not fit the delta {name!r}: {key} has shape "
                f"{tuple(state[key].shape)}, not {tuple(tensor.shape)}."
            )
    result = _forked(model)
    for path, host in hosts(result, name).items():
        delta = host.deltas[name]
        given = {
            key: state[key_of(path, key)].to(old, copy=True)
            for key, old in delta.state_dict().items()
        }
        delta.load_state_dict(given, assign=True)  # others may share the old tensors' memory
    return result
