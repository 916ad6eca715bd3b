"""The protocol that all delta tuning shares: attach, train, save, swap, merge, detach.

A *delta* is a small set of trained tensors on top of a frozen model (Ding et al., "Parameter-
efficient fine-tuning of large-scale pre-trained language models", 2023, doi
10.1038/s42256-023-00626-4). Here it is a named set of `Delta` modules, each of which sits on one
module of the model and turns its output into another one. LoRA, adapters and the rest only say
what that change is (`delta_kinds`). This file attaches, trains and merges it, whatever it is;
`delta_hosts` applies it, and `delta_files` saves it.

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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.delta_hosts import InPlace, WithDeltas, host_of
from effnb.core.delta_kinds import Delta
from effnb.core.linear_form import restore
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    exchange,
    matches,
    settle_tying,
)


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
        ValueError: When a name is unknown or given twice, or two cannot be active together.
    """
    for name in names:
        hosts(model, name)
    if len(set(names)) < len(names):
        raise ValueError(f"a delta is named twice in {', '.join(names)}.")
    result = _forked(model)
    for path, host in hosts(result).items():
        host.active = tuple(name for name in names if name in host.deltas)
        _check_alone(path, host)
    return result


def _check_alone(path: str, host: WithDeltas | InPlace) -> None:
    """Refuse two active deltas of a sort of which a module carries one at a time."""
    sorts: dict[str, str] = {}
    for name in host.active:
        sort = host.deltas[name].alone
        if sort and sort in sorts:
            raise ValueError(
                f"{path or 'the model'} cannot carry two of the sort {sort!r} at once, "
                f"{sorts[sort]!r} and {name!r}; choose one by set_active."
            )
        sorts[sort] = name


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
        ValueError: When the name is taken or cannot name a module, there is nothing to attach, or
            a module has an active delta beside which this one cannot be.
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
        host = host_of(result, places[path], path, delta)
        host.deltas[name] = delta.train(host.training)
        host.active = (*host.active, name)
        _check_alone(path, host)
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
