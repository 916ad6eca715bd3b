r"""From scores to a choice: which structures stay.

Every structured method ends in scores, one number for each head, neuron, channel or block. What is
done with them is the same for all, and for `random_scores`, the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from effnb.inference.pruning.structures import UNITS, Anatomy, anatomy, check_kind

Scores = Mapping[str, Tensor]
"""By kind, higher is kept: "heads" (layers, heads) or (layers, key-value heads), "neurons"
(layers, neurons), "channels" (channels), "layers" (layers)."""
Removal = Mapping[str, float]
"""By kind: a part in [0, 1), or a whole number of structures (of each layer, where there are)."""

_KINDS = ("heads", "neurons", "channels", "layers")


@dataclass(frozen=True)
class Kept:
    """What stays, by number in the original model, ascending.

    Attributes:
        layers: Blocks.
        heads: Query heads of each block; a key-value head stays while one of its query heads does.
        neurons: Neurons of each block. Entries of blocks that go do not matter.
        channels: Channels of the residual stream.
    """

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...] = field(repr=False)
    neurons: tuple[tuple[int, ...], ...] = field(repr=False)
    channels: tuple[int, ...] = field(repr=False)


def keep_all(model: nn.Module) -> Kept:
    """Everything: what `dataclasses.replace` makes a choice of one's own from."""
    return _everything(anatomy(model))


def _everything(shape: Anatomy) -> Kept:
    return Kept(
        tuple(range(shape.layers)),
        (tuple(range(shape.heads)),) * shape.layers,
        (tuple(range(shape.neurons)),) * shape.layers,
        tuple(range(shape.channels)),
    )


def removals(amount: float, count: int, kind: str) -> int:
    """How many of `count` structures a part (a float) or a number (an int) of them is.

    Raises:
        ValueError: When it is out of range, or nothing would be left.
        TypeError: When it is no number.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"the amount of {kind} to remove is {amount!r}; give a number.")
    if isinstance(amount, int):
        wanted = amount
    elif not 0 <= amount < 1:
        raise ValueError(f"the ratio of {kind} is {amount}; it must lie in [0, 1).")
    else:
        wanted = int(amount * count + 0.5)
    if not 0 <= wanted < count:
        raise ValueError(
            f"removing {wanted} of {count} {kind} is not possible; at least one has to stay."
        )
    return wanted


def choose(
    model: nn.Module,
    scores: Scores,
    remove: Removal,
    *,
    unit: str = "groups",
    scope: str = "layer",
    protect: Sequence[int] = (),
) -> Kept:
    """Keep the structures with the highest scores; of equal ones, the first.

    Layers that share weights lose the same structures, those with the lowest sums over these
    layers: what is cut from a weight is cut in all its places.

    Args:
        model: A Llama-like model.
        scores: By kind.
        remove: By kind; what is not named stays.
        unit: "groups" removes key-value heads with all their query heads, and the cache shrinks
            with them; "heads" removes query heads, equally many from each group.
        scope: "layer": each layer loses as many; "global": heads and neurons of all layers compete,
            which makes unequal counts, for masks only. At least one of each stays in a layer.
        protect: Layers whose heads and neurons stay, also only for masks; the amounts are those of
            the others.

    Raises:
        ValueError: An unknown name, a kind without scores or of another shape, scores that are not
            finite, an amount that leaves nothing, or protected layers that are not there.
        TypeError: When an amount is no number.
    """
    shape = anatomy(model)
    for kind in remove:
        check_kind(kind, _KINDS)
        if kind in scores and kind in ("heads", "neurons"):
            values = _checked(shape, kind, scores[kind])
            scores = {**scores, kind: _summed(values, layers_in_common(model, kind))}
    return choose_kept(shape, scores, remove, unit=unit, scope=scope, protect=protect)


def layers_in_common(model: nn.Module, kind: str) -> list[int]:
    """For each layer, the first layer with which it shares a weight that has heads or neurons."""
    shape = anatomy(model)
    parts = UNITS["groups" if kind == "heads" else kind]
    first: dict[nn.Module, int] = {}
    result: list[int] = []
    for layer in range(shape.layers):
        modules = [model.get_submodule(shape.name(layer, part)) for part in parts]
        earlier = {result[first[module]] for module in modules if module in first}
        root = min(earlier, default=layer)
        result = [root if number in earlier else number for number in result] + [root]
        for module in modules:
            first.setdefault(module, layer)
    return result


def _summed(values: Tensor, common: list[int]) -> Tensor:
    """The scores of layers in common added up, in each of their rows."""
    groups = torch.tensor(common, device=values.device)
    sums = torch.zeros_like(values).index_add(0, groups, values)
    return sums[groups]


def choose_kept(
    shape: Anatomy,
    scores: Scores,
    remove: Removal,
    *,
    unit: str = "groups",
    scope: str = "layer",
    protect: Sequence[int] = (),
) -> Kept:
    """`choose`, for a model whose anatomy is known."""
    check_unit(unit)
    if scope not in ("layer", "global"):
        raise ValueError(f'scope is {scope!r}; it must be "layer" or "global".')
    unknown = [layer for layer in protect if not 0 <= layer < shape.layers]
    if unknown:
        raise ValueError(f"layer {unknown[0]} cannot be protected; there are {shape.layers}.")
    for kind in remove:
        check_kind(kind, _KINDS)
        if kind not in scores:
            raise ValueError(f"there are no scores for {kind}; give some for all that is removed.")
    kept = _everything(shape)
    for kind, amount in remove.items():
        values = _checked(shape, kind, scores[kind]).double()
        if kind in ("channels", "layers"):
            gone = removals(amount, shape.count(kind), kind)
            kept = replace(kept, **{kind: _best(values, len(values) - gone)})
        elif kind == "neurons":
            rows = _rows(values, amount, kind, scope, protect)
            kept = replace(kept, neurons=rows)
        else:
            kept = replace(kept, heads=_heads(shape, values, amount, unit, scope, protect))
    return kept


def check_unit(unit: str) -> None:
    """Refuse a unit of attention that is not there.

    Raises:
        ValueError: When it is neither "groups" nor "heads".
    """
    if unit not in ("groups", "heads"):
        raise ValueError(f'unit is {unit!r}; it must be "groups" or "heads".')


def _checked(shape: Anatomy, kind: str, values: Tensor) -> Tensor:
    count = shape.count(kind)
    allowed = {(count,)} if kind in ("channels", "layers") else {(shape.layers, count)}
    if kind == "heads":
        allowed.add((shape.layers, shape.kv_heads))
    if tuple(values.shape) not in allowed:
        raise ValueError(
            f"the scores of {kind} have shape {tuple(values.shape)}; "
            f"{' or '.join(map(str, sorted(allowed)))} is needed."
        )
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the scores of {kind} are not all finite.")
    return values


def _best(values: Tensor, count: int) -> tuple[int, ...]:
    order = torch.sort(values, descending=True, stable=True).indices
    return tuple(sorted(order[:count].tolist()))


def _rows(
    values: Tensor, amount: float, kind: str, scope: str, protect: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """For each layer the structures that stay."""
    layers, count = values.shape
    free = [layer for layer in range(layers) if layer not in protect]
    result = [tuple(range(count))] * layers
    if scope == "layer":
        gone = removals(amount, count, kind)
        for layer in free:
            result[layer] = _best(values[layer], count - gone)
        return tuple(result)
    if not free:
        return tuple(result)
    # Each layer's best is set apart: a layer with nothing left would be another operation.
    pool = values[free].clone()
    total = pool.numel()
    gone = removals(amount, total, kind) if isinstance(amount, int) else int(amount * total + 0.5)
    if gone > total - len(free):
        raise ValueError(f"removing {gone} of {total} {kind} would empty a layer; remove fewer.")
    top = pool.max(1).indices
    pool[torch.arange(len(free)), top] = math.inf
    alive = torch.zeros(total, dtype=torch.bool)
    alive[list(_best(pool.flatten(), total - gone))] = True
    for layer, row in zip(free, alive.view(pool.shape)):
        result[layer] = tuple(row.nonzero().flatten().tolist())
    return tuple(result)


def _heads(
    shape: Anatomy, values: Tensor, amount: float, unit: str, scope: str, protect: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    each = shape.queries_per_group
    if unit == "groups":
        if values.shape[1] != shape.kv_heads:
            values = values.view(shape.layers, shape.kv_heads, each).sum(2)
        groups = _rows(values, amount, "heads", scope, protect)
        return tuple(tuple(g * each + i for g in row for i in range(each)) for row in groups)
    if values.shape[1] != shape.heads:
        raise ValueError(
            f'the scores are of {values.shape[1]} key-value heads; unit="heads" needs one for each '
            f"of the {shape.heads} query heads."
        )
    if scope == "global":
        return _rows(values, amount, "heads", scope, protect)
    # Equally many from each group, so that every key-value head serves as many query heads.
    parts = values.reshape(shape.layers * shape.kv_heads, each)
    guarded = [layer * shape.kv_heads + g for layer in protect for g in range(shape.kv_heads)]
    rows = _rows(parts, amount, "heads", scope, guarded)
    return tuple(
        tuple(
            g * each + i
            for g in range(shape.kv_heads)
            for i in rows[layer * shape.kv_heads + g]
        )
        for layer in range(shape.layers)
    )  # fmt: skip
