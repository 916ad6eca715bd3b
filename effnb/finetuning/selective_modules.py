r"""Selective modules: train a few modules, chosen by name or at random, and freeze the others.

The chosen modules $\mathcal{S}$ are spread over the depth of the model, where tuning the last
layers keeps to its top: $\theta'_m = \theta_m + \Delta\theta_m$ for $m \in \mathcal{S}$. Chosen at
random under a budget, they are the plainest baseline of specification-based tuning: what any rule
for choosing parameters has to beat.

Ding et al., "Delta Tuning: A Comprehensive Study of Parameter Efficient Methods for Pre-trained
Language Models", 2022, arXiv 2203.06904.
"""

from __future__ import annotations

import torch
from torch import nn

from effnb.core.checks import check_loaded
from effnb.core.deltas import check_name, merge
from effnb.core.differences import Chosen, Difference, attach_differences, own_parameters
from effnb.core.modules import LayerChoice, Layers, Model, chooses_layers

__all__ = ["SelectiveModules", "attach", "merge", "selected_modules"]


class SelectiveModules(Difference):
    r"""The difference $\Delta\theta$ of one chosen module."""

    kind = "selective-modules"


def selected_modules(
    model: nn.Module, layers: LayerChoice = "*", share: float | None = None, seed: int = 0
) -> Chosen:
    """The modules that hold a weight matrix and fit, or a random part of them under a budget.

    A module is taken whole, its bias with its matrix. They are drawn in random order, and each that
    still fits into the budget is taken; embeddings are not among them.

    Args:
        model: Any model.
        layers: Name patterns of the modules; output heads are left out by default.
        share: Largest share of the model's parameters to train, in (0, 1]; None takes every module
            that fits the patterns.
        seed: Seed of the order.

    Raises:
        ValueError: When no module fits the patterns, or the share is out of range or too small for
            any module.
    """
    check_loaded(model)
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must lie in (0, 1].")
    known = dict(model.named_modules())
    tables = {path for path, m in known.items() if isinstance(m, nn.Embedding)}
    every = {
        path: own
        for path, own in own_parameters(model, lambda *_: True).items()
        if path not in tables and any(p.ndim > 1 for p in own.values())
    }
    wanted = Layers.of(layers).on(model)
    found = {path: own for path, own in every.items() if wanted.fit(path)}
    if not found:
        raise ValueError(
            f"no module with a weight matrix fits the pattern {', '.join(wanted.include)}; the "
            f"model has {', '.join(list(every)[:3]) or 'none at all'}"
            f"{', …' if len(every) > 3 else ''}."
        )
    if share is None:
        return found
    sizes = {path: sum(p.numel() for p in own.values()) for path, own in found.items()}
    budget = share * sum(p.numel() for p in model.parameters())
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    taken: set[str] = set()
    for path in (list(found)[i] for i in order):
        if sizes[path] <= budget:
            budget -= sizes[path]
            taken.add(path)
    if not taken:
        smallest = min(sizes, key=sizes.get)
        raise ValueError(
            f"share is {share}, {budget:,.0f} parameters; the smallest module, {smallest}, has "
            f"{sizes[smallest]:,}."
        )
    return {path: own for path, own in found.items() if path in taken}


@chooses_layers
def attach(
    model: Model,
    name: str = "default",
    *,
    layers: LayerChoice = "*",
    share: float | None = None,
    seed: int = 0,
) -> Model:
    r"""Freeze a model and train differences of the chosen modules' parameters.

    The function is unchanged, bit for bit, until they are trained.

    Args:
        model: Any model; it is not changed.
        name: What to call this delta.
        layers: Name patterns of the modules to choose from.
        share: With a number in (0, 1], a random part of them that holds at most this share of the
            model's parameters; with None, all of them.
        seed: Seed of the random part.

    Returns:
        A new model on the same frozen tensors; only the differences require gradients.

    Raises:
        ValueError: When no module fits the patterns, the share is out of range or too small for any
            module, a parameter is tied to one elsewhere, or the name is taken.
    """
    check_name(model, name)
    chosen = selected_modules(model, layers, share, seed)
    return attach_differences(model, name, chosen, SelectiveModules)
