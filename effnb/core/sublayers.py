"""Which linear layers of a transformer's blocks do what, found by running the model.

A block has two parts that add to the residual stream: attention, which ends in a projection of the
heads' outputs, and the feed-forward, whose second matrix reads the inner activation. What a layer
is called differs from one architecture to the next; what it does is found out by trying:

- linear layers are noted in the order in which they run. The last one that puts out the width of
  the stream is the feed-forward's second; the ones that made its input precede it; what runs last
  before these is attention's projection;
- of the layers before that, the *values* are those whose double makes the input of attention's
  projection double; the *keys* those of which another token's output depends on one token, and that
  are no values. Queries change their own token only.

Blocks that are alike are tried once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.context import PROBE
from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import attached, linear_layers, modules_by_name, set_active
from effnb.core.modules import (
    Layers,
    find_stacks,
    first_names,
    parted,
    refuse_encoder_decoder,
)


@dataclass(frozen=True)
class Sublayers:
    """The parts of a block by dotted name; what was not found is empty.

    Attributes:
        block: The block.
        width: Channels of the residual stream.
        keys: The layer that makes the keys.
        values: The layer that makes the values.
        attention_in: The first layer that reads attention's input.
        attention_out: The projection of the heads' outputs.
        feedforward_in: The first layer that reads the feed-forward's input.
        feedforward_out: The feed-forward's second matrix.
        norm: The norm whose output is the block's (a post-norm block); empty in a pre-norm block.
    """

    block: str
    width: int
    keys: str = ""
    values: str = ""
    attention_in: str = ""
    attention_out: str = ""
    feedforward_in: str = ""
    feedforward_out: str = ""
    norm: str = ""


def _some(path: str, layers: dict[str, nn.Module]) -> str:
    """The first few layers of a block, by their names in it."""
    short = [name.removeprefix(f"{path}.") for name in layers]
    return (", ".join(short[:6]) or "none") + (", …" if len(short) > 6 else "")


def find_sublayers(model: nn.Module, *needed: str) -> list[Sublayers]:
    """The parts of every block of a model with one stack of blocks.

    A layer that several blocks use has its first name in all of them.

    Args:
        model: Anything that runs on `input_ids` alone; deltas on it are left out of the trial.
        needed: Names of fields that must be found.

    Raises:
        ValueError: When there is no stack of blocks, the model is an encoder-decoder or does not
            run on `input_ids`, or a needed part is not found; the sentence names it.
    """
    check_loaded(model)
    refuse_encoder_decoder(model, "what reads a block's parts by running it")
    names = first_names(model)
    quiet = parted(set_active(model) if attached(model) else model).eval()
    stacks = find_stacks(quiet)
    if len(stacks) > 1:
        raise ValueError(f"the model has several stacks of blocks: {', '.join(stacks)}.")
    ((name, blocks),) = stacks.items()
    layers = linear_layers(quiet, Layers(f"{name}.*", exclude=()))
    tried: dict[tuple, Sublayers] = {}
    result = []
    for index, block in enumerate(blocks):
        path = f"{name}.{index}"
        own = {key: m for key, m in layers.items() if key.startswith(f"{path}.")}
        alike = (type(block), tuple(
            (key.removeprefix(path), m.in_features, m.out_features) for key, m in own.items()
        ))  # fmt: skip
        if alike not in tried:
            found = _try(quiet, path, block, own)
            missing = [part for part in needed if not getattr(found, part)]
            if missing:
                raise ValueError(
                    f"no layer of {path} could be told to be its {missing[0].replace('_', ' ')}; "
                    f"its linear layers are {_some(path, own)} (one matrix for several parts, or "
                    "experts, are not understood)."
                )
            tried[alike] = found
        result.append(_named(_moved(tried[alike], path), names))
    return result


def _named(found: Sublayers, names: dict[str, str]) -> Sublayers:
    """The same parts by the first names of their modules; the block keeps its place."""
    others = {
        field.name: names.get(value, value)
        for field in fields(found)
        if field.name != "block" and isinstance(value := getattr(found, field.name), str)
    }
    return replace(found, **others)


def _moved(found: Sublayers, path: str) -> Sublayers:
    """The same parts in another block."""
    names = {
        field.name: path + value.removeprefix(found.block)
        for field in fields(found)
        if isinstance(value := getattr(found, field.name), str) and value
    }
    return replace(found, **names)


def _try(model: nn.Module, path: str, block: nn.Module, own: dict[str, nn.Module]) -> Sublayers:
    """The parts of one block, from a few runs of the model on a few tokens."""
    order: list[str] = []
    read: dict[str, Tensor] = {}
    results: dict[str, Tensor] = {}

    def note(key: str) -> Callable[..., None]:
        def after(module: nn.Module, inputs: tuple, output: Any) -> None:
            order.append(key)
            read[key] = inputs[0] if inputs else torch.empty(0)
            results[key] = output[0] if isinstance(output, tuple) else output

        return after

    # A module under a delta goes by its own name; what it is, its base says.
    leaves = {k: m for k, m in modules_by_name(block).items() if k and _is_leaf(_plain(m))}
    others = {f"{path}.{key}": module for key, module in leaves.items()}
    watched = {path: block} | others | own
    _run(model, {key: note(key) for key in watched}, watched)
    whole = results.get(path)
    if whole is None:
        return Sublayers(path, 0)
    width = whole.shape[-1]
    ran = [key for key in order if key in own]
    inside = [*own.values(), *(m for m in block.modules() if isinstance(m, Delta))]
    known = {id(p) for m in inside for p in m.parameters()}
    if any(p.ndim > 1 and id(p) not in known for p in block.parameters()):
        return Sublayers(path, width)  # experts in one tensor
    if sorted(ran) != sorted(own) or any(read[key].shape[-2] != PROBE for key in ran):
        return Sublayers(path, width)  # experts, or layers that only another input reaches
    if not ran or own[ran[-1]].out_features != width:
        return Sublayers(path, width)
    *before, out = ran
    found = Sublayers(path, width, feedforward_out=out)
    # One layer makes its input, or two that read the same: one of them is the gate.
    first = len(before)
    while first and read[before[first - 1]] is read[before[-1]]:
        first -= 1
    if not before or first == len(before):
        return found
    found = replace(found, feedforward_in=before[first])
    norms = [k for k in order if k in others and k not in own and _is_norm(_plain(others[k]))]
    if norms and order.index(norms[-1]) > order.index(out):
        last = results[norms[-1]]
        found = replace(found, norm=norms[-1] if _same(last, whole) else "")
    heads = before[:first]
    if len(heads) < 2 or own[heads[-1]].out_features != width:
        return found
    found = replace(found, attention_out=heads[-1], attention_in=heads[0])
    return _keys_and_values(model, found, own, heads[:-1], read[heads[-1]])


def _keys_and_values(
    model: nn.Module, found: Sublayers, own: dict[str, nn.Module], names: list[str], base: Tensor
) -> Sublayers:
    """Find keys and values among the layers that run before attention's projection."""
    seen: list[Tensor] = []

    def see(module: nn.Module, inputs: tuple, output: Any) -> None:
        seen.append(inputs[0])

    def trial(name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        seen.clear()
        hooks = {name: lambda m, i, output: change(output), found.attention_out: see}
        _run(model, hooks, {key: own[key] for key in hooks})
        return seen[0]

    def disturb(output: Tensor) -> Tensor:
        # The first token is read by all later ones, in a causal model too.
        output = output.clone()
        slope = torch.linspace(-30, 30, output.shape[-1], device=output.device)
        rows = output.view(-1, output.shape[-1])  # (batch, time) flattened in some architectures
        rows[0] += (output.float().abs().mean() * slope).to(output.dtype)
        return output

    keys, values = [], []
    for name in names:
        if _same(trial(name, lambda output: 2 * output), 2 * base):
            values.append(name)
        elif not _same(_after_first(trial(name, disturb)), _after_first(base), 1e-4):
            keys.append(name)
    if len(keys) != 1 or len(values) != 1:
        return found  # one matrix for all three, or attention of another make
    return replace(found, keys=keys[0], values=values[0])


def _after_first(activations: Tensor) -> Tensor:
    """All tokens of one text but the first."""
    return activations.reshape(-1, activations.shape[-1])[1:]


def _plain(module: nn.Module) -> nn.Module:
    """A module without the deltas on it."""
    return module.base if isinstance(module, WithDeltas) else module


def _is_leaf(module: nn.Module) -> bool:
    return not any(name != "deltas" for name, _ in module.named_children())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module consists of a gain, and perhaps a shift, for each channel."""
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and all(p.ndim == 1 for p in own.values()) and len(own) <= 2


def _same(a: Tensor, b: Tensor, off: float = 1e-2) -> bool:
    return a.shape == b.shape and bool((a - b).float().norm() <= off * b.float().norm())


def _run(
    model: nn.Module, hooks: dict[str, Callable[..., Any]], modules: dict[str, nn.Module]
) -> None:
    """Run the model on a few tokens with a hook after each of some modules."""
    handles = [modules[key].register_forward_hook(hook) for key, hook in hooks.items()]
    device = next(model.parameters()).device
    size = getattr(getattr(model, "config", None), "vocab_size", None) or PROBE + 5
    ids = (torch.arange(PROBE, device=device)[None] + 5) % size
    try:
        with torch.no_grad():
            model(input_ids=ids)
    except (TypeError, AttributeError, LookupError, RuntimeError) as problem:
        raise ValueError(
            f"{type(model).__name__} does not run on input_ids alone, so what its layers do cannot "
            f"be found out ({str(problem).splitlines()[0][:80]})."
        ) from None
    finally:
        for handle in handles:
            handle.remove()
