r"""How many bits each layer gets, when all of them share a budget of bytes.

Each layer $i$ can be stored at one of a few bit-widths $b$; each costs $c_i^{(b)}$ (a loss, see
`mixed` for how to measure it) and takes $s_i^{(b)}$ bytes. The best choice solves

$$\min_{b_1, b_2, \ldots} \sum_i c_i^{(b_i)} \quad \text{subject to} \quad
  \sum_i s_i^{(b_i)} \le S,$$

the multiple-choice knapsack problem (HAWQ-V3 states it as an integer linear program: Yao et al.,
"HAWQ-V3: Dyadic Neural Network Quantization", 2020, arXiv 2011.10680). It is solved here exactly,
by dynamic programming over partial sums of bytes; a greedy and the uniform choice stand beside it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Costs = Mapping[str, Mapping[int, float]]
Sizes = Mapping[str, Mapping[int, int]]


def allocate(
    sensitivity: Costs, sizes: Sizes, budget_bytes: int, method: str = "exact"
) -> dict[str, int]:
    """Choose bits for each layer under a budget.

    Args:
        sensitivity: From layer to bits to cost. Costs may be negative.
        sizes: From layer to bits to bytes, for the same layers and bits.
        budget_bytes: What all layers together may take.
        method: "exact" finds the least total cost. "greedy" starts with the most bytes and lowers,
            again and again, the layer that loses least per byte saved; what is left over in the end
            goes to the layers that gain most from it. "uniform" gives all layers the most bits that
            all of them can have.

    Returns:
        Bits by layer.

    Raises:
        ValueError: Layers or bits that do not match, costs that are not finite, an unknown method,
            or a budget that is below the smallest or above the largest that the layers can take.
    """
    methods = {"exact": _exact, "greedy": _greedy, "uniform": _uniform}
    if method not in methods:
        raise ValueError(f"method is {method!r}; choose exact, greedy or uniform.")
    _check(sensitivity, sizes, budget_bytes)
    return methods[method](sensitivity, sizes, budget_bytes)


def allocation_bytes(sizes: Sizes, allocation: Mapping[str, int]) -> int:
    """Bytes that an allocation takes."""
    return sum(sizes[name][bits] for name, bits in allocation.items())


def allocation_cost(sensitivity: Costs, allocation: Mapping[str, int]) -> float:
    """The sum of the costs of an allocation."""
    return math.fsum(sensitivity[name][bits] for name, bits in allocation.items())


def _check(sensitivity: Costs, sizes: Sizes, budget: int) -> None:
    if not sensitivity:
        raise ValueError("there is no layer to give bits to.")
    for name in {**sensitivity, **sizes}:
        given = [set(table.get(name, ())) for table in (sensitivity, sizes)]
        if given[0] != given[1] or not given[0]:
            raise ValueError(
                f"{name} has costs for {sorted(given[0])} bits and sizes for {sorted(given[1])}; "
                "they must be the same, and at least one."
            )
        for bits, cost in sensitivity[name].items():
            if not math.isfinite(cost):
                raise ValueError(f"the cost of {name} at {bits} bits is {cost}, not a number.")
            if sizes[name][bits] < 0:
                raise ValueError(f"{name} at {bits} bits takes {sizes[name][bits]} bytes.")
    least, most = (sum(pick(s.values()) for s in sizes.values()) for pick in (min, max))
    if budget < least:
        raise ValueError(
            f"the budget of {budget:,} bytes is too small; the layers take at least {least:,}."
        )
    if budget > most:
        raise ValueError(
            f"the budget of {budget:,} bytes is too large; the layers take at most {most:,}, so "
            "there is nothing to choose."
        )


def _uniform(sensitivity: Costs, sizes: Sizes, budget: int) -> dict[str, int]:
    common = set.intersection(*(set(table) for table in sizes.values()))
    fitting = [
        bits for bits in common if allocation_bytes(sizes, dict.fromkeys(sizes, bits)) <= budget
    ]
    if not fitting:
        raise ValueError(f"no bit-width fits all layers into the budget of {budget:,} bytes.")
    return dict.fromkeys(sensitivity, max(fitting))


def _greedy(sensitivity: Costs, sizes: Sizes, budget: int) -> dict[str, int]:
    chosen = {  # the most bytes; of equally large choices the cheapest
        name: max((size, -sensitivity[name][bits], bits) for bits, size in table.items())[2]
        for name, table in sizes.items()
    }
    total = allocation_bytes(sizes, chosen)

    def steps(name: str) -> Iterator[tuple[float, int, int]]:
        """What each other choice of a layer loses, the bytes it saves, and its bits."""
        now = chosen[name]
        for bits, size in sizes[name].items():
            yield sensitivity[name][bits] - sensitivity[name][now], sizes[name][now] - size, bits

    def cheapest(name: str) -> tuple[float, str, int, int] | None:
        ratios = [
            (lost / saved, name, saved, bits) for lost, saved, bits in steps(name) if saved > 0
        ]
        return min(ratios, default=None)

    queue = [step for step in map(cheapest, sizes) if step]
    heapq.heapify(queue)
    while total > budget:
        _, name, saved, bits = heapq.heappop(queue)
        total -= saved
        chosen[name] = bits
        following = cheapest(name)
        if following:
            heapq.heappush(queue, following)
    while True:  # the last step may have saved more than it had to
        better = [
            (lost, name, saved, bits)
            for name in sizes
            for lost, saved, bits in steps(name)
            if lost < 0 and total - saved <= budget
        ]
        if not better:
            return {name: chosen[name] for name in sensitivity}
        _, name, saved, bits = min(better)
        total -= saved
        chosen[name] = bits


@dataclass(frozen=True)
class _Choices:
    """A layer's bit-widths that can be part of a best choice, by growing bytes and falling cost."""

    bits: list[int]
    bytes: Tensor
    costs: Tensor

    def priced(self, price: float) -> Tensor:
        """Costs and bytes in one number, in float64."""
        return self.costs + price * self.bytes.double()


def _choices(costs: Mapping[int, float], sizes: Mapping[int, int]) -> _Choices:
    kept: list[int] = []
    for bits in sorted(sizes, key=lambda b: (sizes[b], costs[b])):
        if not kept or costs[bits] < costs[kept[-1]]:
            kept.append(bits)
    return _Choices(
        kept,
        torch.tensor([sizes[b] for b in kept]),
        torch.tensor([costs[b] for b in kept], dtype=torch.float64),
    )


def _exact(sensitivity: Costs, sizes: Sizes, budget: int) -> dict[str, int]:
    """Partial sums of bytes and costs, layer by layer; a state that another beats is dropped.

    A state is also dropped when even the relaxed problem for the layers behind it, in which bytes
    have a price instead of a limit, cannot bring it below the greedy solution. That leaves few.
    """
    names = list(sensitivity)
    layers = [_choices(sensitivity[name], sizes[name]) for name in names]
    ceiling = allocation_cost(sensitivity, _greedy(sensitivity, sizes, budget))
    ceiling += 1e-9 * max(1e-300, *(float(layer.costs.abs().max()) for layer in layers))
    price = _price(layers, budget)
    # What the layers from i on cost at least at that price, and the fewest bytes they take.
    behind, smallest = [0.0], [0]
    for layer in reversed(layers):
        behind.append(behind[-1] + float(layer.priced(price).min()))
        smallest.append(smallest[-1] + int(layer.bytes.min()))
    behind, smallest = behind[::-1], smallest[::-1]

    total_bytes, total_cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    history: list[tuple[Tensor, Tensor]] = []  # for each state: the state before, the choice
    for i, layer in enumerate(layers):
        new_bytes = (total_bytes.unsqueeze(1) + layer.bytes).flatten()
        new_cost = (total_cost.unsqueeze(1) + layer.costs).flatten()
        bound = new_cost + behind[i + 1] - price * (budget - new_bytes).double()
        possible = (new_bytes + smallest[i + 1] <= budget) & (bound <= ceiling)
        index = possible.nonzero().squeeze(1)
        index = index[new_cost[index].argsort(stable=True)]
        index = index[new_bytes[index].argsort(stable=True)]
        cost = new_cost[index]
        best_before = torch.cat([cost.new_full((1,), math.inf), cost.cummin(0).values[:-1]])
        index = index[cost < best_before]
        history.append((index // len(layer.bits), index % len(layer.bits)))
        total_bytes, total_cost = new_bytes[index], new_cost[index]
    state = int(total_cost.argmin())
    allocation = {}
    for name, layer, (before, choice) in zip(
        reversed(names), reversed(layers), reversed(history), strict=True
    ):
        allocation[name] = layer.bits[int(choice[state])]
        state = int(before[state])
    return {name: allocation[name] for name in names}


def _price(layers: list[_Choices], budget: int) -> float:
    """The price per byte at which buying freely spends the budget: the best bound there is."""
    pad = torch.nn.utils.rnn.pad_sequence
    costs = pad([layer.costs for layer in layers], True, math.inf)
    size = pad([layer.bytes for layer in layers], True)

    def spent(price: float) -> int:
        chosen = (costs + price * size.double()).argmin(1, keepdim=True)
        return int(size.gather(1, chosen).sum())

    if spent(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-300
    while spent(high) > budget:
        low, high = high, high * 16
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > budget else (low, middle)
    return high
