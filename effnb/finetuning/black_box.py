r"""Black-box tuning: tune a soft prompt for a model that gives losses and no gradients.

A prompt of n tokens has too many numbers for a search without gradients. It is searched for in a
random subspace of $d_I$ dimensions around a first prompt,

$$\min_{z \in \mathbb{R}^{d_I}} L\big(A z + p_0\big), \qquad A \in \mathbb{R}^{n d \times d_I},$$

by CMA-ES, an evolution strategy: it draws a population of candidates from a Gaussian, ranks them by
their losses, and moves the Gaussian towards the best. All candidates of a generation must be ranked
by the same words, or the ranking is noise.

Sun, Shao, Qian, Huang, Qiu, "Black-Box Tuning for Language-Model-as-a-Service", 2022, arXiv
2201.03514. The strategy is that of the library `cma` (Hansen, "The CMA Evolution Strategy: A
Tutorial", 2016, arXiv 1604.00772), which has to be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.checks import check_finite

__all__ = ["BlackBoxResult", "Strategy", "black_box", "cma_es", "random_projection"]


@runtime_checkable
class Strategy(Protocol):
    """An optimizer that asks for losses: `cma.CMAEvolutionStrategy` is one."""

    def ask(self) -> Sequence[Any]:
        """The candidates of a generation, each an array of numbers."""

    def tell(self, candidates: Sequence[Any], losses: Sequence[float]) -> Any:
        """Take their losses."""


@dataclass(frozen=True)
class BlackBoxResult:
    """What a search found.

    Attributes:
        prompt: The best prompt, (tokens, dim).
        z: Its place in the subspace, (dimension,).
        loss: Its loss.
        calls: How many losses were asked for.
        losses: Lowest loss so far after each generation.
    """

    prompt: Tensor
    z: Tensor
    loss: float
    calls: int
    losses: tuple[float, ...]


def cma_es(dimension: int, sigma: float, population: int, seed: int) -> Strategy:
    r"""CMA-ES from the library `cma`, starting at 0.

    Args:
        dimension: Numbers of a candidate.
        sigma: Standard deviation of the first population.
        population: Candidates of a generation.
        seed: Seed, from 0; `cma` takes 0 for a seed by the clock, so that it gets one more.

    Raises:
        ImportError: When `cma` is not installed.
    """
    try:
        import cma
    except ImportError:
        raise ImportError(
            "black-box tuning searches by CMA-ES from the package cma, which is not installed: "
            "pip install cma, or pass a strategy of your own."
        ) from None
    options = {"popsize": population, "seed": seed + 1, "verbose": -9}
    return cma.CMAEvolutionStrategy(dimension * [0.0], sigma, options)


def random_projection(
    size: int, dimension: int, *, std: float, alpha: float = 1.0, sigma: float = 1.0, seed: int = 0
) -> Float[Tensor, "size dimension"]:
    r"""A Gaussian matrix A of standard deviation $\alpha\, s / (\sqrt{d_I}\, \sigma)$.

    For z of standard deviation $\sigma$, the entries of A z then have that of $\alpha$ times s:
    with s that of the word embeddings, a first population of prompts is as large as words are.

    Args:
        size: Numbers of a prompt.
        dimension: $d_I$.
        std: s.
        alpha: $\alpha$.
        sigma: $\sigma$, that of the first population.
        seed: Seed of the matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
    return matrix * (alpha * std / (math.sqrt(dimension) * sigma))


def black_box(
    loss: Callable[[Tensor], float | Tensor],
    initial: Float[Tensor, "tokens dim"],
    *,
    std: float,
    dimension: int = 500,
    budget: int = 8000,
    population: int = 20,
    sigma: float = 1.0,
    alpha: float = 1.0,
    seed: int = 0,
    strategy: Callable[[int, float, int, int], Strategy] = cma_es,
) -> BlackBoxResult:
    r"""Black-box tuning of a soft prompt, from its losses alone.

    No gradient is taken or kept. All candidates of a generation are judged under the same seed of
    torch, so that dropout, if there is any, hides the same units from all.

    Args:
        loss: From a prompt (tokens, dim) to its loss, a smooth one such as cross-entropy. It must
            take the same words for all candidates of a generation.
        initial: $p_0$, the prompt to search around, such as the embeddings of some words.
        std: Standard deviation of the model's word embeddings, which sets the size of A.
        dimension: $d_I$, at most the numbers of a prompt.
        budget: Most calls of the loss.
        population: Candidates of a generation, at least 2.
        sigma: Standard deviation of the first population.
        alpha: How large prompts of the first population are, in units of std.
        seed: Seed of the projection and of the search.
        strategy: From dimension, sigma, population and seed to the optimizer.

    Returns:
        The best prompt that was seen, on the device and in the type of `initial`.

    Raises:
        ValueError: A number out of range, or a loss that is not a finite number.
        ImportError: When `cma` is needed and not installed.
    """
    check_finite(initial, "the initial prompt", "searched around")
    if not 1 <= dimension <= initial.numel():
        raise ValueError(
            f"dimension is {dimension}; a prompt of {initial.numel():,} numbers allows 1 to that."
        )
    if population < 2:
        raise ValueError(
            f"population is {population}; it must be at least 2, or nothing is ranked."
        )
    if budget < population:
        raise ValueError(f"budget is {budget} calls; one generation takes {population}.")
    for what, number in (("std", std), ("sigma", sigma), ("alpha", alpha)):
        if not (number > 0 and math.isfinite(number)):
            raise ValueError(f"{what} is {number}; it must be above 0.")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must be at least 0.")
    search = strategy(dimension, sigma, population, seed)
    A = random_projection(
        initial.numel(), dimension, std=std, alpha=alpha, sigma=sigma, seed=seed
    ).to(initial.device, torch.promote_types(initial.dtype, torch.float32))

    def prompt_at(z: Tensor) -> Tensor:
        # $A z + p_0$
        return ((A @ z.to(A)).view(initial.shape) + initial.detach().to(A)).to(initial.dtype)

    best, best_z = math.inf, torch.zeros(dimension, dtype=torch.float64)
    calls, losses = 0, []
    devices = [initial.device] if initial.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        while calls + population <= budget and not _stopped(search):
            candidates, values = search.ask(), []
            for candidate in candidates:
                torch.manual_seed(seed + len(losses))
                z = torch.as_tensor(candidate, dtype=torch.float64)
                values.append(float(loss(prompt_at(z))))
                calls += 1
                if not math.isfinite(values[-1]):
                    raise ValueError(
                        f"the loss of candidate {calls} is {values[-1]}, not a finite number."
                    )
                if values[-1] < best:
                    best, best_z = values[-1], z.clone()
            search.tell(candidates, values)
            losses.append(best)
        prompt = prompt_at(best_z)
    return BlackBoxResult(prompt, best_z, best, calls, tuple(losses))


def _stopped(search: Strategy) -> bool:
    """Whether a strategy that can say so has converged."""
    stop = getattr(search, "stop", None)
    return bool(stop()) if callable(stop) else False
