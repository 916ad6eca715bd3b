r"""Two more deltas of a frozen decoder: vectors behind its blocks, prompts without gradients.

A vector $u_t$ behind block t is the same for all tokens: $x_{t+1} = f_t(x_t) + u_t$. It is a delta
of as many numbers as the model has blocks times its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effnb.chapters.finetuning.delta_analysis.methods import Decoder
from effnb.core.deltas import delta_parameters
from effnb.core.modules import find_blocks
from effnb.core.training import causal_lm_loss
from effnb.finetuning import black_box, prompt_tuning
from effnb.finetuning.optimal_control import (
    ControlSolution,
    by_backpropagation,
    steer_blocks,
    successive_approximations,
)
from effnb.lab.task_inputs import target_likelihoods
from effnb.lab.tasks import Example

WEIGHT = 0.03
"""The price of a control, lambda."""
ROUNDS = 60
"""Most rounds of either solution."""
LENGTH = 4
"""Vectors of a prompt that is searched for without gradients."""


@contextmanager
def steered(model: nn.Module, controls: Sequence[Tensor]) -> Iterator[nn.Module]:
    """Add a vector behind every block of a decoder for as long as the context lasts."""
    _, blocks = find_blocks(model)

    def adds(u: Tensor) -> Any:
        def hook(_: nn.Module, __: tuple, output: Any) -> Any:
            return (output[0] + u, *output[1:]) if isinstance(output, tuple) else output + u

        return hook

    hooks = [b.register_forward_hook(adds(u)) for b, u in zip(blocks, controls, strict=True)]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Solved:
    """One problem, solved in both ways.

    Attributes:
        free: The cost without any control.
        by: The solutions by their names.
    """

    free: float
    by: dict[str, ControlSolution]


WAYS = {
    "back-propagation": by_backpropagation,
    "successive approximations": successive_approximations,
}


def solve(
    decoder: Decoder,
    examples: Sequence[Example],
    ways: Sequence[str] = tuple(WAYS),
    *,
    weight: float = WEIGHT,
    rounds: int = ROUNDS,
    tolerance: float = 1e-5,
) -> Solved:
    """Steer a decoder to the answers of some examples.

    Args:
        decoder: The model and its task.
        examples: The examples, all in one batch.
        ways: How to solve it.
        weight: The price of a control.
        rounds: Most rounds of either way.
        tolerance: The fall of the cost in a round at which to stop.
    """
    problem, start = steer_blocks(decoder.model, decoder.batch(examples), weight=weight)
    found = {way: WAYS[way](problem, start, rounds=rounds, tolerance=tolerance) for way in ways}
    with torch.no_grad():
        free = float(problem.cost(start))
    return Solved(free, found)


def answer_losses(decoder: Decoder, model: nn.Module, examples: Sequence[Example]) -> list[float]:
    """The loss of the right answer and its end on each example, in nats per token."""
    answers = [f" {e.target}" for e in examples]
    logs, counts = target_likelihoods(
        model, decoder.loaded.tokenizer, decoder.prompts(examples), answers
    )
    return [-log / count for log, count in zip(logs, counts, strict=True)]


def search(
    decoder: Decoder,
    examples: Sequence[Example],
    *,
    dimension: int = 32,
    budget: int = 200,
    population: int = 10,
    seed: int = 0,
) -> tuple[nn.Module, black_box.BlackBoxResult]:
    """A prompt that is found from losses alone, and the model behind it.

    Args:
        decoder: The model and its task.
        examples: The examples whose mean loss is asked for, in one batch.
        dimension: Dimension of the random subspace.
        budget: Most losses asked for.
        population: Candidates of a generation.
        seed: Seed of the start, the subspace and the search.
    """
    model = prompt_tuning.attach(decoder.model, "prompt", length=LENGTH, seed=seed)
    (prompt,) = delta_parameters(model, "prompt").values()
    batch = decoder.batch(examples)

    def loss(candidate: Tensor) -> float:
        prompt.data.copy_(candidate)
        return float(causal_lm_loss(model, batch))

    std = float(decoder.model.get_input_embeddings().weight.detach().std())
    found = black_box.black_box(
        loss, prompt.detach().clone(), std=std, dimension=dimension, budget=budget,
        population=population, seed=seed,
    )  # fmt: skip
    prompt.data.copy_(found.prompt)
    return model, found
