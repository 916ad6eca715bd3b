"""Iterative product quantization: layer by layer, the rest of the network mending each step.

All layers at once would be too much damage. So a group of layers is replaced by codewords; then
everything that is not replaced yet, and the codewords themselves, are trained for a while; then
comes the next group, whose weights have by then adapted to what precedes them. The loss that they
are trained on may come from the model itself before it was quantized: a self-distillation.

Stock et al., "And the Bit Goes Down", 2020, arXiv 1907.05686, section 3.3; combined with noise in
Fan et al., "Training with Quantization Noise", 2020, arXiv 2004.07320, section 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from effnb.core.modules import LayerChoice, clone, find_blocks, linears, matches, put_modules
from effnb.core.training import Batches, Loss, TrainingSettings, train
from effnb.inference.quantization.linear import refuse_quantized
from effnb.inference.self_distilled_quantization.product import ProductLinear, product_quantize


@dataclass(frozen=True)
class IterativeResult:
    """A model of codewords.

    Attributes:
        model: The quantized model.
        groups: Names of the layers that were replaced together, in order.
        errors: For each group, the relative error of its weights when they were replaced.
        losses: For each group, the loss of the first and of the last step that followed; the same
            number twice where no step was taken.
    """

    model: nn.Module = field(repr=False)
    groups: tuple[tuple[str, ...], ...]
    errors: tuple[float, ...]
    losses: tuple[tuple[float, float], ...]


def default_groups(model: nn.Module, layers: LayerChoice = "*") -> list[list[str]]:
    """The linear layers of each block together, from the first block to the last."""
    found = linears(model, layers)
    prefix, blocks = find_blocks(model)
    groups = [[n for n in found if n.startswith(f"{prefix}.{i}.")] for i in range(len(blocks))]
    inside = {name for group in groups for name in group}
    rest = [name for name in found if name not in inside]
    return [group for group in (*groups, rest) if group]


def iterative_product_quantization(
    model: nn.Module,
    batches: Batches,
    settings: TrainingSettings | None,
    *,
    loss: Loss,
    groups: Sequence[Sequence[str]] | None = None,
    block_size: int = 8,
    centroids: int = 64,
    iterations: int = 15,
    layers: LayerChoice = "*",
) -> IterativeResult:
    """Replace the linear layers of a model by codewords, one group after the other.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        batches: From the step's number to its batch; the numbers go on from group to group.
        settings: The training after each group; its steps are those of one group; None for none.
        loss: From (student, batch) to a scalar, such as `sdq(teacher)`.
        groups: Name patterns of the layers that are replaced together, in order; None for block
            after block.
        block_size: Length of a codeword.
        centroids: Codewords of a matrix.
        iterations: Rounds of k-means at most.
        layers: Name patterns of the layers to quantize at all.

    Raises:
        ValueError: A group that fits no layer, a layer in two groups, and what `product_quantize`
            and `train` refuse.
    """
    refuse_quantized(model)
    chosen = _groups(model, groups, layers)
    student = clone(model)
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    errors, losses, done = [], [], 0
    for group in chosen:
        missed = whole = 0.0
        new = {}
        for name in group:
            layer = student.get_submodule(name)
            stored = product_quantize(
                layer.weight.detach(), block_size, centroids, iterations=iterations
            )
            weight = layer.weight.detach().float()
            missed += float((stored.dequantize() - weight).square().sum())
            whole += float(weight.square().sum())
            new[name] = ProductLinear(stored, layer.bias)
        put_modules(student, new)
        errors.append((missed / max(whole, 1e-30)) ** 0.5)
        if settings is not None:
            begin = done
            found = train(student, lambda step, at=begin: batches(at + step), settings, loss=loss)
            done += found.steps
            losses.append((found.losses[0], found.losses[-1]))
        else:
            now = float(loss(student, batches(done)).detach())
            losses.append((now, now))
    student.eval()
    return IterativeResult(student, tuple(map(tuple, chosen)), tuple(errors), tuple(losses))


def _groups(
    model: nn.Module, groups: Sequence[Sequence[str]] | None, layers: LayerChoice
) -> list[list[str]]:
    if groups is None:
        return default_groups(model, layers)
    found = list(linears(model, layers))
    chosen = [[name for name in found if matches(name, group)] for group in groups]
    empty = next((i for i, group in enumerate(chosen) if not group), None)
    if empty is not None:
        raise ValueError(f"group {empty + 1} fits no linear layer: {list(groups[empty])}.")
    seen = [name for group in chosen for name in group]
    if len(set(seen)) < len(seen):
        twice = next(name for name in seen if seen.count(name) > 1)
        raise ValueError(f"the layer {twice} is in two groups; each layer is replaced once.")
    return chosen
