r"""Which layer deserves how much rank: one budget of parameters for the whole model.

Some layers lose nothing at half their rank, others everything. Given, for each layer, what each
possible rank costs in parameters and does in damage, the best split of a budget is a knapsack with
one choice per layer. Two measures of damage:

- *by spectrum*: the energy that a rank drops, as a part of the layer's whole energy,
  $\sum_{i > r} \sigma_i^2 / \sum_i \sigma_i^2$. It costs nothing once the layers are decomposed;
  with the spectra of SVD-LLM it is the error of the outputs, with those of plain SVD that of the
  weights;
- *by loss*: how much a loss rises when only that layer is truncated. It costs one evaluation per
  layer and candidate. This is the sensitivity that ASVD searches by (Yuan et al., 2023, arXiv
  2312.05821), who then keep all choices below one common threshold.

Both end in `choose`, which takes the steps that spare the most damage per parameter first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import nn

from effnb.inference.low_rank.factors import Factors, check_kept, put_factors, rank_for, saves


@dataclass(frozen=True)
class Allocation:
    """A rank for each layer.

    Attributes:
        ranks: Rank by layer name; layers that are not in it stay dense. What `svd(model,
            rank=allocation.ranks)` and the other methods take.
        parameters: Numbers that the layers hold then.
        kept: The same as a part of what they held before.
        damage: The sum of what was minimised.
    """

    ranks: dict[str, int]
    parameters: int
    kept: float
    damage: float


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Attributes:
        parameters: Numbers that it takes.
        damage: What it does, in any unit that can be added up over layers.
        rank: The rank; None for dense.
    """

    parameters: int
    damage: float
    rank: int | None


def choose(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]:
    """One option per layer, at most `budget` parameters in all, with little damage in total.

    Each layer starts at its smallest option. Then, again and again, one layer changes to another
    option: the change that spares most damage per parameter, of all that still fit. While all
    changes fit, these are the steps along the lower convex hulls of (parameters, damage), and no
    other choice of the same size does less damage. At the end of the budget, what is missed is less
    than one such step.

    Args:
        options: The options of each layer by name.
        budget: Most parameters of all chosen options together.

    Raises:
        ValueError: When even the smallest options exceed the budget.
    """
    chosen = {
        name: min(some, key=lambda o: (o.parameters, o.damage)) for name, some in options.items()
    }
    left = budget - sum(option.parameters for option in chosen.values())
    if left < 0:
        raise ValueError(
            f"the budget is {budget} parameters, and the smallest options take {budget - left}."
        )
    changes: list[tuple[float, int, str, Option]] = []  # a heap: largest gain first

    def offer(name: str) -> None:
        """Put a layer's best affordable change on the heap."""
        now, best = chosen[name], None
        for number, option in enumerate(options[name]):
            more, spared = option.parameters - now.parameters, now.damage - option.damage
            if spared > 0 and 0 < more <= left:
                change = (-spared / more, number, name, option)
                best = change if best is None or change[:2] < best[:2] else best
        if best is not None:
            heappush(changes, best)

    for name in options:
        offer(name)
    while changes:
        *_, name, option = heappop(changes)
        more = option.parameters - chosen[name].parameters
        if more <= left:  # it did when it was offered, but others may have been faster
            chosen[name], left = option, left - more
        offer(name)
    return chosen


def allocate_by_spectrum(
    decomposition: Mapping[str, Factors], kept: float, *, relative: bool = True
) -> Allocation:
    """Split a budget by the singular values that each layer would lose.

    Args:
        decomposition: What `decompose`, `decompose_asvd` or `decompose_svd_llm` gave.
        kept: Part of the parameters of all these layers together that stays, in (0, 1].
        relative: Count a layer's loss as a part of its energy; otherwise in absolute numbers,
            so that layers of small weights (or small outputs) lose most.

    Raises:
        ValueError: When `kept` is out of range or too small for rank 1 everywhere, or there are no
            layers.
    """
    options = {}
    for name, factors in decomposition.items():
        m, n = factors.left.shape[0], factors.right.shape[1]
        squares = factors.singular_values.double().square()
        tails = squares.sum() - squares.cumsum(0)  # of rank 1, 2, ...
        unit = float(squares.sum()) if relative and float(squares.sum()) > 0 else 1.0
        options[name] = [
            Option(rank * (m + n), max(0.0, float(tail)) / unit, rank)
            for rank, tail in enumerate(tails, 1)
            if saves(m, n, rank)
        ] + [Option(m * n, 0.0, None)]
    return _allocation(options, kept)


def allocate_by_loss(
    model: nn.Module,
    decomposition: Mapping[str, Factors],
    evaluate: Callable[[nn.Module], float],
    kept: float,
    *,
    candidates: Iterable[float] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1),
    progress: Callable[[int, int], None] | None = None,
) -> Allocation:
    """Split a budget by how much a loss rises when each layer alone is truncated.

    Args:
        model: The model that was decomposed; it is not changed.
        decomposition: What `decompose`, `decompose_asvd` or `decompose_svd_llm` gave.
        evaluate: From a model to its loss: a number per token, on data that is not the test's.
        kept: Part of the parameters of all these layers together that stays, in (0, 1].
        candidates: Parts kept of one layer to try, each in (0, 1).
        progress: Called with (evaluations done, evaluations).

    Raises:
        ValueError: When a part is out of range or `kept` is below what the smallest candidates
            take, or there are no layers.
    """
    check_kept(kept)
    parts = sorted(candidates)
    if not parts or not 0 < parts[0] <= parts[-1] < 1:
        raise ValueError(f"candidates are {parts}; give parts above 0 and below 1.")
    base = float(evaluate(model))
    wanted: dict[str, list[int]] = {}
    for name, factors in decomposition.items():
        m, n = factors.left.shape[0], factors.right.shape[1]
        ranks = sorted({rank_for(part, m, n) for part in parts})
        wanted[name] = [r for r in ranks if saves(m, n, r)]
    total, done = sum(map(len, wanted.values())), 0
    options: dict[str, list[Option]] = {}
    for name, factors in decomposition.items():
        m, n = factors.left.shape[0], factors.right.shape[1]
        options[name] = [Option(m * n, 0.0, None)]
        for rank in wanted[name]:
            loss = float(evaluate(put_factors(model, {name: factors.truncated(rank)})))
            options[name].append(Option(rank * (m + n), loss - base, rank))
            done += 1
            if progress:
                progress(done, total)
    return _allocation(options, kept)


def _allocation(options: Mapping[str, Sequence[Option]], kept: float) -> Allocation:
    check_kept(kept)
    if not options:
        raise ValueError("there are no layers to allocate ranks to.")
    whole = sum(max(o.parameters for o in some) for some in options.values())
    chosen = choose(options, int(kept * whole + 1e-6))
    used = sum(option.parameters for option in chosen.values())
    return Allocation(
        ranks={name: o.rank for name, o in chosen.items() if o.rank is not None},
        parameters=used,
        kept=used / whole,
        damage=sum(option.damage for option in chosen.values()),
    )
