r"""ALBERT: all layers of a model use the same weights, or those of their group.

A model of $N$ layers in $g$ groups has the weights of $g$ layers: layer $i$ uses those of group
$\lfloor i g / N \rfloor$. It stores less, sends less between machines and keeps less optimizer
state. It still *computes* $N$ layers: a forward pass costs the same multiplications as before.

What is shared is the innermost module that holds a weight: one and the same `nn.Linear` stands in
the attention of several blocks. The blocks and the attention around it stay separate, because they
know the number of their layer, under which a decoder caches keys and values, and which mask the
layer uses. A method that replaces the shared layer replaces it in all its places.

Lan, Chen, Goodman, Gimpel, Sharma, Soricut, "ALBERT: A Lite BERT for Self-supervised Learning of
Language Representations", ICLR 2020, arXiv 1909.11942, section 3.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from effnb.core.modules import Model, find_stacks, share
from effnb.design.attention.checks import check_count

PARTS = ("all", "attention", "feed_forward", "none")
"""What layers can share: everything, or the weights of one of their two parts."""
INITIAL = ("first", "mean")
"""Where shared weights come from: the group's first layer, or the mean over its layers."""
_MIXERS = ("att", "mamba", "mixer", "ssm", "retention")
"""Parts of names of what mixes tokens; any other matrix of a block is of its feed-forward."""


def layer_groups(layers: int, groups: int) -> list[int]:
    r"""The group of each layer, $\lfloor i g / N \rfloor$ for $i = 0, \dots, N - 1$.

    Raises:
        ValueError: When the groups would not be of one size.
    """
    if check_count("layers", layers) % check_count("groups", groups):
        divisors = [str(g) for g in range(1, layers + 1) if layers % g == 0]
        raise ValueError(
            f"groups is {groups}, which does not divide the {layers} layers; choose one of "
            f"{', '.join(divisors)}."
        )
    return [i * groups // layers for i in range(layers)]  # g_i = floor(i g / N)


def share_layers(
    model: Model, what: str = "all", groups: int = 1, *, initial: str = "first"
) -> Model:
    r"""A model whose layers share weights, in groups of consecutive layers.

    What only some layers of a group have is shared by those that have it. Norms outside attention
    belong to neither part: they are shared with "all".

    Args:
        model: A model with a stack of blocks, or several (an encoder-decoder); it is not changed.
        what: "all", "attention" (or another mixer of tokens), "feed_forward", or "none".
        groups: $g$; it divides the number of layers of every stack. As many as layers share
            nothing.
        initial: Where the weights of a group come from: "first" takes its first layer's, "mean" the
            mean over its layers. Neither keeps the function of a trained model: it has to be
            trained further, or from the start.

    Returns:
        A new model that shares all tensors with the old one except means.

    Raises:
        ValueError: Groups that do not divide the layers, an unknown choice, layers of one group
            that differ in the shape or kind of a weight, or no weight of the part asked for.
    """
    if what not in PARTS:
        raise ValueError(f"what is {what!r}; it must be one of {', '.join(PARTS)}.")
    if initial not in INITIAL:
        raise ValueError(f"initial is {initial!r}; it must be one of {', '.join(INITIAL)}.")
    result = share(model)
    found = False
    for path, blocks in find_stacks(result).items():
        grouping = layer_groups(len(blocks), groups)
        for group in range(groups):
            members = {
                f"{path}.{i}": block for i, block in enumerate(blocks) if grouping[i] == group
            }
            found |= _join(members, what, initial)
    if not found and what not in ("all", "none"):
        raise ValueError(
            f"no weight of a block of {type(model).__name__} is of its {what.replace('_', '-')}; "
            'share "all" of it.'
        )
    return result


def unshare_layers(model: Model) -> Model:
    """The same function with weights of its own in every place of every block.

    This is what libraries load that know nothing of sharing, and what a group's weights are once
    layers are to differ again. Tied output heads stay tied.

    Returns:
        A new model; repeated weights are copied, all others shared with the old one.
    """
    result = share(model)
    seen: set[int] = set()
    for blocks in find_stacks(result).values():
        for block in blocks:
            for _, module, inside in list(_units(block)):
                known = {id(t) for t in _tensors(module)} & seen
                seen |= {id(t) for t in _tensors(module)}
                if known and inside is not None:
                    parent, leaf = inside
                    setattr(parent, leaf, copy.deepcopy(module))
                elif known:
                    for name, parameter in list(module._parameters.items()):
                        if id(parameter) in known:
                            module._parameters[name] = copy.deepcopy(parameter)
    return result


def shared_places(model: nn.Module) -> dict[str, list[str]]:
    """Every innermost module that stands in several places: its first name, and the others."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _is_unit(module) and any(True for _ in _tensors(module)):
            names.setdefault(id(module), []).append(name)
    return {first: rest for first, *rest in names.values() if rest}


# ------------------------------------------------------------------------------ inside a block


def _tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    """Parameters, and buffers that a file would hold."""
    yield from (p for p in module._parameters.values() if p is not None)
    kept = module._buffers.keys() - module._non_persistent_buffers_set
    yield from (module._buffers[name] for name in kept if module._buffers[name] is not None)


def _is_unit(module: nn.Module) -> bool:
    """Whether all weights of a module are its own, and it knows nothing of its layer's number."""
    own = {id(p) for p in module.parameters(recurse=False)}
    return all(id(p) in own for p in module.parameters()) and not hasattr(module, "layer_idx")


def _units(
    block: nn.Module, path: str = ""
) -> Iterable[tuple[str, nn.Module, tuple[nn.Module, str] | None]]:
    """What can be shared of a block: (name, module, its parent and name there).

    A module with weights in itself *and* in modules inside it comes with None for its parent: of
    this one only the weights can be shared.
    """
    for leaf, child in block.named_children():
        name = f"{path}.{leaf}" if path else leaf
        if _is_unit(child):
            if any(True for _ in _tensors(child)):
                yield name, child, (block, leaf)
        else:
            if any(True for _ in child.parameters(recurse=False)):
                yield name, child, None
            yield from _units(child, name)


def _is_of(part: str, name: str, module: nn.Module) -> bool:
    """Whether a weight's module belongs to a part of its block."""
    if part in ("all", "none"):
        return part == "all"
    mixes = any(mixer in name.lower() for mixer in _MIXERS)
    if part == "attention":
        return mixes
    return not mixes and any(tensor.ndim > 1 for tensor in _tensors(module))


def _join(blocks: dict[str, nn.Module], what: str, initial: str) -> bool:
    """Let the blocks of one group share, in place; whether there was anything of the part."""
    by_name: dict[str, list[tuple[str, nn.Module, tuple[nn.Module, str] | None]]] = {}
    for path, block in blocks.items():
        for name, module, inside in _units(block):
            if _is_of(what, name, module):
                by_name.setdefault(name, []).append((path, module, inside))
    for name, places in by_name.items():
        _check_alike(name, places)
    for places in by_name.values():
        modules = [module for _, module, _ in places]
        inside = [place for *_, place in places]
        if all(place is not None for place in inside):
            joined = _mean(modules) if initial == "mean" and len(modules) > 1 else modules[0]
            for parent, leaf in inside:
                setattr(parent, leaf, joined)
        else:
            source = _mean(modules) if initial == "mean" and len(modules) > 1 else modules[0]
            for module in modules:
                module._parameters.update(source._parameters)
    return bool(by_name)


def _check_alike(name: str, places: list[tuple[str, nn.Module, object]]) -> None:
    """Refuse weights that one tensor cannot stand for.

    Raises:
        ValueError: The sentence names the two layers.
    """
    first_path, first, _ = places[0]
    shapes = [tuple(t.shape) for t in _tensors(first)]
    for path, module, _ in places[1:]:
        if type(module) is not type(first) or [tuple(t.shape) for t in _tensors(module)] != shapes:
            raise ValueError(
                f"{name} of {first_path} and of {path} differ in kind or shape; layers of one "
                "group must be alike, so share only another part, or in more groups."
            )


def _mean(modules: list[nn.Module]) -> nn.Module:
    """A module with the mean of the weights of several."""
    result = copy.deepcopy(modules[0])
    with torch.inference_mode(False), torch.no_grad():
        for name, parameter in result._parameters.items():
            if parameter is not None:
                values = torch.stack([m._parameters[name].detach().double() for m in modules])
                parameter.copy_(values.mean(0))
    return result
