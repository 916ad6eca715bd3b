r"""Mixing tasks: how often a model that learns many tasks at once meets each of them.

Every task is text in and text out, so that one model and one loss serve all; what is left to decide
is the mixture. With $e_m$ examples of task m, a cap $K$ and a temperature $T$,

$$r_m = \frac{\min(e_m, K)^{1/T}}{\sum_j \min(e_j, K)^{1/T}} .$$

$T = 1$ without a cap is proportional: a huge task drowns the small ones. $T \to \infty$ is equal:
small tasks are repeated until the model knows them by heart. The cap acts as if no task had more
than $K$ examples, and the temperature draws all rates together.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
2020, arXiv 1910.10683, section 3.5.2.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Row = TypeVar("Row")


def mixing_rates(
    sizes: Mapping[str, int], *, cap: int | None = None, temperature: float = 1.0
) -> dict[str, float]:
    r"""$r_m = \min(e_m, K)^{1/T} / \sum_j \min(e_j, K)^{1/T}$, the part of each task.

    Args:
        sizes: $e_m$, examples of each task, at least 1.
        cap: $K$, the most examples that count; None for no limit.
        temperature: $T$, at least 1; `math.inf` mixes equally.

    Raises:
        ValueError: No task, an empty one, a cap below 1 or a temperature below 1.
    """
    if not sizes:
        raise ValueError("there is no task to mix.")
    empty = [name for name, size in sizes.items() if size < 1]
    if empty:
        raise ValueError(f"the task {empty[0]!r} has no examples.")
    if cap is not None and cap < 1:
        raise ValueError(f"cap is {cap}; it must be at least 1, or None.")
    if not temperature >= 1:
        raise ValueError(f"temperature is {temperature}; it must be at least 1.")
    counted = {m: min(e, cap) if cap else e for m, e in sizes.items()}
    most = max(counted.values())  # which keeps powers of huge tasks finite
    powers = {m: (e / most) ** (1 / temperature) for m, e in counted.items()}
    total = math.fsum(powers.values())
    return {m: power / total for m, power in powers.items()}


def mixed_batches(
    tasks: Mapping[str, Sequence[Row]], rates: Mapping[str, float], size: int, seed: int = 0
) -> Callable[[int], list[tuple[str, Row]]]:
    """From a step's number to its batch: each row's task drawn by the rates, then its next example.

    A task's examples come in random order, each once before any comes again. A batch depends on
    the seed and the step alone, so that a run which goes on later meets the same ones.

    Args:
        tasks: The examples of each task.
        rates: The part of each task, as `mixing_rates` gives it.
        size: Rows of a batch.
        seed: Seed of tasks and orders.

    Returns:
        A function whose rows are pairs of a task's name and an example.

    Raises:
        ValueError: Rates of other tasks, that are negative or do not add up to 1, a task with a
            rate and no examples, or a size below 1.
    """
    if rates.keys() != tasks.keys():
        odd = sorted(rates.keys() ^ tasks.keys())
        raise ValueError(
            f"the rates are not those of the tasks: {odd[0]!r} is in one of them only."
        )
    if size < 1:
        raise ValueError(f"size is {size}; a batch has at least 1 row.")
    if min(rates.values()) < 0 or abs(math.fsum(rates.values()) - 1) > 1e-6:
        raise ValueError("the rates must be at least 0 and add up to 1.")
    empty = [name for name, rows in tasks.items() if rates[name] > 0 and not len(rows)]
    if empty:
        raise ValueError(f"the task {empty[0]!r} has a rate, but no examples.")
    names, weights = list(rates), list(rates.values())
    drawn: list[list[str]] = []  # the tasks of each step so far
    before: list[dict[str, int]] = [dict.fromkeys(names, 0)]  # and how many of each came before it

    def batch(step: int) -> list[tuple[str, Row]]:
        while len(drawn) <= step:
            rng = random.Random(f"{seed} step {len(drawn)}")
            drawn.append(rng.choices(names, weights, k=size))
            counts = dict(before[-1])
            for name in drawn[-1]:
                counts[name] += 1
            before.append(counts)
        places = dict(before[step])
        rows = []
        for name in drawn[step]:
            rows.append((name, _example(tasks[name], places[name], f"{seed} {name}")))
            places[name] += 1
        return rows

    return batch


def _example(rows: Sequence[Row], place: int, key: str) -> Row:
    """The example at a place of an endless sequence of epochs, each in an order of its own."""
    epoch, within = divmod(place, len(rows))
    order = random.Random(f"{key} epoch {epoch}").sample(range(len(rows)), len(rows))
    return rows[order[within]]
