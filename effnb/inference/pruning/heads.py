r"""Attention heads: which of them could go?

Put a gate $\xi_h = 1$ on the output of each head. To first order, closing it changes the loss by
$-\partial L / \partial \xi_h$, and

$$I_h = \mathbb{E}_x \left| \frac{\partial L(x)}{\partial \xi_h} \right|
      = \mathbb{E}_x \left| \sum_t \mathrm{Att}_h(x)_t^\top
        \frac{\partial L(x)}{\partial \mathrm{Att}_h(x)_t} \right|,$$

the absolute value taken for each example $x$, after the sum over its tokens. The layers' gradients
differ in size, so each layer's importances are divided by their $\ell_2$ norm. One backward pass
scores all heads; removing each head alone and measuring (`head_ablation`) takes one pass per head.

Michel, Levy, Neubig, "Are Sixteen Heads Really Better than One?", 2019, arXiv 1905.10650.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import Calibration
from effnb.core.gradients import Batches, each_gradient, loss_batches
from effnb.core.modules import Model, share
from effnb.core.training import Loss, target_losses, targets
from effnb.inference.pruning.choice import check_unit, removals
from effnb.inference.pruning.shrink import Pruned, prune_structures
from effnb.inference.pruning.structures import anatomy, check_weights, structures_of, zero


def head_importance(
    model: nn.Module,
    calibration: Batches,
    *,
    normalize: bool = True,
    loss: Loss | None = None,
) -> Float[Tensor, "layers heads"]:
    """The mean over examples of the absolute gradient of each head's gate.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: Token ids (sequences, time) or keyword arguments per batch: each sequence is an
            example, and its loss the mean over its tokens. With a loss of one's own, the batches
            it takes: each batch is an example.
        normalize: Divide each layer's importances by their norm.
        loss: From (model, batch) to a scalar; None for language modelling.

    Raises:
        ValueError: No data, weights or gradients that are not finite, or a model that is not
            Llama-like or is quantized.
    """
    shape = anatomy(model)
    check_weights(model)
    batches = loss_batches(model, calibration, loss)
    twin = share(model).eval()
    device = next(twin.parameters()).device
    gates: dict[str, Tensor] = {}

    def gate(name: str):
        def hook(module: nn.Module, arguments: tuple) -> tuple:
            parts = arguments[0].unflatten(-1, (shape.heads, shape.head_dim))
            # One gate per sequence and head, whatever lies between: time, and the head's size.
            return ((parts * gates[name][:, None, :, None].to(parts.dtype)).flatten(-2),)

        return hook

    names = [shape.name(layer, "self_attn.o_proj") for layer in range(shape.layers)]
    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(gate(name))
    function = _sum_of_sequences if loss is None else loss
    report = Calibration.of(calibration).report
    total, examples = torch.zeros(shape.layers, shape.heads, device=device), 0
    for done, batch in enumerate(batches):
        # A sequence of which no token counts is no example.
        counted = (targets(batch)[:, 1:] != -100).any(1) if loss is None else torch.ones(1)
        with torch.inference_mode(False):
            for name in names:
                gates[name] = torch.ones(
                    len(counted), shape.heads, device=device, requires_grad=True
                )
        (found,) = each_gradient(twin, gates, [batch], function)
        total += torch.stack(list(found.values())).abs().sum(1)
        examples += int(counted.sum())
        report(done + 1, len(batches))
    scores = (total / examples).cpu()
    if normalize:
        scores = scores / scores.norm(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return scores


def _sum_of_sequences(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The sum over sequences of each one's mean loss: no sequence changes another's gradient."""
    losses, counted = target_losses(model, batch)
    return (losses.sum(1) / counted.sum(1).clamp_min(1)).sum()


def lowest_heads(scores: Float[Tensor, "layers heads"], count: int) -> dict[int, list[int]]:
    """The heads with the lowest scores of the whole model, by layer: the paper's order.

    Args:
        scores: From `head_importance`, or any others.
        count: How many heads.

    Raises:
        ValueError: When there are fewer.
    """
    if not 0 <= count <= scores.numel():
        raise ValueError(f"count is {count}; the model has {scores.numel()} heads.")
    order = torch.sort(scores.flatten(), stable=True).indices[:count].sort().values
    found: dict[int, list[int]] = {}
    for index in order.tolist():
        found.setdefault(index // scores.shape[1], []).append(index % scores.shape[1])
    return found


def mask_heads(model: Model, heads: Mapping[int, Iterable[int]]) -> Model:
    """Silence heads, any number in any layer: the same size, with exact zeros.

    Args:
        model: A Llama-like model; it is not changed.
        heads: By layer, the numbers of the query heads to silence.

    Raises:
        ValueError: A layer or head that is not there, weights that are not finite, or a model that
            is not Llama-like or is quantized.
    """
    shape = anatomy(model)
    wanted = {(layer, head) for layer, row in heads.items() for head in row}
    for layer, head in sorted(wanted):
        if not (0 <= layer < shape.layers and 0 <= head < shape.heads):
            raise ValueError(
                f"head {head} of layer {layer} is not there; the model has {shape.layers} layers "
                f"of {shape.heads} heads."
            )
    return zero(model, [s for s in structures_of(model, "heads") if (s.layer, s.index) in wanted])


def head_ablation(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "layers heads"]:
    """The loss of the model without each head in turn: what importance tries to predict.

    Args:
        model: A Llama-like model; it is not changed.
        evaluate: From a model to its loss.
        progress: Called with (heads done, heads).

    Raises:
        ValueError: Weights that are not finite, or a model that is not Llama-like or is quantized.
    """
    shape = anatomy(model)
    losses = torch.zeros(shape.layers, shape.heads)
    for layer in range(shape.layers):
        for head in range(shape.heads):
            losses[layer, head] = float(evaluate(mask_heads(model, {layer: [head]})))
            if progress:
                progress(layer * shape.heads + head + 1, losses.numel())
    return losses


def prune_heads(
    model: nn.Module,
    calibration: Batches,
    ratio: float,
    *,
    unit: str = "groups",
    loss: Loss | None = None,
) -> Pruned:
    """Remove the least important heads, equally many from each layer: a smaller dense model.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `head_importance`.
        ratio: Part of the heads in [0, 1), or a whole number, to remove from each layer; with
            `unit="groups"` of its groups, with "heads" of the query heads of each group.
        unit: "groups" removes key-value heads with all their query heads (the sum of their
            importances counts), "heads" query heads alone.
        loss: From (model, batch) to a scalar; None for language modelling.

    Raises:
        ValueError: A ratio out of range, and what `head_importance` and `shrink` raise.
        TypeError: When the ratio is no number.
    """
    shape = anatomy(model)
    check_unit(unit)
    removals(ratio, shape.kv_heads if unit == "groups" else shape.queries_per_group, "heads")
    scores = head_importance(
        model,
        calibration,
        loss=loss,
    )
    return prune_structures(model, {"heads": scores}, {"heads": ratio}, unit=unit)
