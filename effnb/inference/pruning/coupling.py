"""Dependency groups found by looking: set one column to 0, and see what dies with it.

`effnb.inference.pruning.structures` writes down what is coupled in a Llama; this finds it in any
model. Dependency groups: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv
2301.12900; Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023,
arXiv 2305.11627, who follow the edges of the graph where this follows gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effnb.inference.pruning.masks import refuse
from effnb.inference.pruning.structures import (
    Slice,
    check_weights,
    masks_from,
    replace_parameters,
)


def coupled(model: nn.Module, seed: Sequence[Slice], ids: Tensor) -> dict[str, Tensor]:
    r"""Everything that is dead once some rows or columns are 0.

    A number is dead when the loss does not depend on it any more: nothing reads what it makes, or
    it only ever multiplies 0. Both show as a gradient of exactly 0 where there was one before. What
    died is set to 0 as well, and the search goes on until nothing more dies. So the whole group of
    a neuron is found from its one column of the down projection.

    Args:
        model: Any model that takes `input_ids`; it is not changed.
        seed: What to set to 0 first.
        ids: Token ids (sequences, time) to look at, a few of random ones.

    Returns:
        By parameter: True for what is dead, the seed included, what was dead from the start not.
        Parameters without any are left out.

    Raises:
        ValueError: When the seed is empty, a weight is not finite, or the model is quantized.
    """
    if not seed:
        raise ValueError("the seed is empty; name at least one row or column to start from.")
    refuse(model)
    check_weights(model)
    before = _gradients(model, ids)
    alive = {name: gradient != 0 for name, gradient in before.items()}
    dead = masks_from(model, seed)
    while True:
        parameters = dict(model.named_parameters())
        trial = replace_parameters(
            model, {name: torch.where(mask, 0, parameters[name]) for name, mask in dead.items()}
        )
        found = {name: alive[name] & (g == 0) for name, g in _gradients(trial, ids).items()}
        grown = dict(dead)
        for name, mask in found.items():
            if bool(mask.any()):
                grown[name] = mask | dead[name] if name in dead else mask
        if all(name in dead and torch.equal(grown[name], dead[name]) for name in grown):
            return dead
        dead = grown


def _gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of the outputs; 0 for what does not take part."""
    with torch.inference_mode(False), torch.enable_grad():
        # Each parameter as a separate one that asks for gradients: the model's may be frozen.
        twin = replace_parameters(model, dict(model.named_parameters())).eval()
        parameters = {name: p.requires_grad_() for name, p in twin.named_parameters()}
        given = twin(input_ids=ids, use_cache=False)
        output = given.logits if hasattr(given, "logits") else given.last_hidden_state
        draw = torch.Generator().manual_seed(0)
        weights = torch.randn(output.shape, generator=draw).to(output)
        found = torch.autograd.grad(
            (output * weights).sum(), list(parameters.values()), allow_unused=True
        )
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found)
    }
