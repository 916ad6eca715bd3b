r"""AWQ: scale up the weights of the inputs that matter, so that rounding hurts them less.

A few input channels carry much larger activations than the rest, and the weights that they meet
matter accordingly. Multiply a weight's column $j$ by $s_j > 1$ before rounding and divide its input
by $s_j$: as long as the group's step hardly grows, the error of that column shrinks by $s_j$.

$$y = Q(W \operatorname{diag}(s))\,(\operatorname{diag}(s)^{-1} x), \qquad
  s_j = \bigl(\operatorname{mean}_t |X_{jt}|\bigr)^r.$$

One number $r$ in $[0, 1)$ is searched for, from no scaling to scaling by activations alone, with
the smallest error of the output. The division is folded into what made the input (a norm's gain,
the rows of another layer; `effnb.core.folding`), so that the finished model computes nothing more.
Then each group's range is narrowed to what makes its part of the output most exact.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization
for LLM Compression and Acceleration", 2023, arXiv 2306.00978.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import (
    Calibration,
    CalibrationLike,
    Call,
    block_linears,
    unpadded_batches,
    visit_blocks_of,
)
from effnb.core.checks import check_finite
from effnb.core.folding import find_folds, joined, scaled_together, set_parameters
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    first_names,
    matches,
    put_modules,
    share,
)
from effnb.core.padding import gaps
from effnb.core.watching import Run, block_users
from effnb.inference.quantization.awq_places import (
    Inputs,
    Place,
    Seen,
    judges_of,
    module_loss,
    watch_places,
)
from effnb.inference.quantization.formats import fake_quantize_on, quantize_on
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.stored import check_matrix

UNCLIPPED = ("*q_proj", "*k_proj", "*query*", "*key*", "*qkv*", "*q_lin", "*k_lin")
"""Layers that make queries and keys: clipping them distorts the scores between the two."""
STEPS = 20
"""Parts into which a range is divided to be narrowed; at most half of them are taken away."""


@dataclass(frozen=True)
class ScaleSearch:
    """What the search for scales found.

    Attributes:
        scales: $s$, one for each input channel.
        exponent: The best $r$.
        losses: The mean squared error of the output for r = 0, 1/n, …, (n-1)/n.
    """

    scales: Float[Tensor, "in"]
    exponent: float
    losses: tuple[float, ...]


def search_scales(
    magnitude: Float[Tensor, "in"], loss: Callable[[Tensor], float], grid: int = 20
) -> ScaleSearch:
    r"""Try $s = m^r / \sqrt{\max(m^r) \min(m^r)}$ for $r = 0, 1/n, \ldots, (n-1)/n$; keep the best.

    The division keeps scales around 1. With $r = 0$ all of them are 1, and nothing is changed.

    Args:
        magnitude: $m$, the mean magnitude of each input channel.
        loss: From scales to what is to be small.
        grid: $n$, how many exponents to try.
    """
    best, losses = None, []
    for step in range(grid):
        # s = m^r / sqrt(max(m^r) min(m^r)), with r = step / n.
        scales = magnitude.float().pow(step / grid).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        losses.append(loss(scales))
        if best is None or losses[-1] < losses[best[0]]:
            best = (step, scales)
    step, scales = best
    return ScaleSearch(scales, step / grid, tuple(losses))


def output_error(
    difference: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> Float[Tensor, " out"]:
    r"""Mean squared change of each output when the weight changes: $\frac12 \delta^\top H \delta$.

    With $H = \frac2N X X^\top$ this is the mean of $(\delta^\top x)^2$ over the N inputs, exactly.
    """
    return (difference @ hessian).mul_(difference).sum(1) / 2


def awq_scales(
    weight: Float[Tensor, "*matrix"],
    inputs: Float[Tensor, "*matrix2"],
    bits: int,
    *,
    group_size: Granularity = 128,
    symmetric: bool = False,
    grid: int = 20,
) -> ScaleSearch:
    """Search scales for one layer by the error of its output.

    Args:
        weight: The weight (out, in).
        inputs: What the layer reads, (tokens, in).
        bits: 2 to 8.
        group_size: What shares one scale: "row", or a number of inputs of a row.
        symmetric: Whether the grids are centred on 0.
        grid: How many exponents to try.

    Raises:
        ValueError: A weight or inputs that are not finite, shapes that do not fit, no inputs, or
            bits, group size or grid that do not exist.
    """
    _check(bits, group_size, grid)
    check_matrix(weight)
    if inputs.ndim != 2 or inputs.shape[1] != weight.shape[1] or not len(inputs):
        raise ValueError(
            f"inputs has shape {tuple(inputs.shape)}; it must be (tokens, {weight.shape[1]})."
        )
    check_finite(inputs, "inputs")
    seen = Inputs(weight.shape[1], weight.device)
    seen.update(inputs)
    rounding = partial(_round, grid=Grid(bits, group_size, symmetric))
    return search_scales(seen.magnitude, _own_loss([(weight, seen.value)], rounding), grid)


def awq_clip(
    weight: Float[Tensor, "*matrix"],
    hessian: Float[Tensor, "*matrix2"],
    bits: int,
    *,
    group_size: Granularity = 128,
    symmetric: bool = False,
) -> Float[Tensor, "out in"]:
    r"""Narrow each group's range where that makes the group's share of the output more exact.

    Tries the limits $c = p \max|w|$, $p = 1, 0.95, \ldots, 0.55$, of every group of every row, and
    keeps the one whose clamped and rounded weights change the group's part of the output least.
    From the Hessian that error is known over all tokens, without keeping any.

    Args:
        weight: The weight (out, in).
        hessian: $H = \frac2N X X^\top$ of the layer's inputs.
        bits: 2 to 8.
        group_size: What shares one scale: "row", or a number of inputs of a row.
        symmetric: Whether the grids are centred on 0.

    Returns:
        The weight, clamped to the best limits; in float32.

    Raises:
        ValueError: As `awq_scales`.
    """
    _check(bits, group_size, 1)
    check_matrix(weight)
    columns = weight.shape[1]
    if tuple(hessian.shape) != (columns, columns):
        raise ValueError(
            f"the Hessian has shape {tuple(hessian.shape)}; a weight of {columns} inputs needs "
            f"{(columns, columns)}."
        )
    check_finite(hessian, "the Hessian")
    size = columns if group_size == "row" else group_size
    whole = Grid(bits, "row", symmetric)
    result = weight.detach().float().clone()
    for start in range(0, columns, size):
        group = result[:, start : start + size]  # a view
        part = hessian[start : start + size, start : start + size].float()
        limit = group.abs().amax(1, keepdim=True)
        best, least = limit, torch.full_like(limit, torch.inf)
        for step in range(STEPS // 2):
            tried = limit * (1 - step / STEPS)
            rounded = _round(group.clamp(-tried, tried), whole)
            error = output_error(rounded - group, part).unsqueeze(1)
            best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
        group.clamp_(-best, best)
    return result


@chooses_layers
@in_linear_form
def awq(
    model: Model,
    calibration: CalibrationLike,
    bits: int,
    *,
    group_size: Granularity = 128,
    symmetric: bool = False,
    grid: int = 20,
    clip: bool = True,
    unclipped: str | Iterable[str] = UNCLIPPED,
    layers: LayerChoice = "*",
    report: Callable[[str, ScaleSearch], None] | None = None,
) -> Model:
    """Scale, clip and round the linear layers of a transformer's blocks.

    Block by block, on inputs that carry the errors of the blocks before. Layers that read one norm
    (query, key and value; gate and up) get common scales, chosen by the output of the module that
    holds them (the attention; the feed-forward part); the scales go into the norm. A layer that
    reads another layer's channels (down after up; output after value, when there are as many value
    channels as query channels) is judged by its own output; the scales go into that layer's rows.

    `effnb.core.folding.find_folds` finds the places where scales can go by trying. Where there is
    none, as in front of a BERT block's query, whose norm also feeds the residual stream, or between
    value and output under grouped-query attention, a layer is clipped and rounded without scales.

    A layer that several blocks use gets one set of scales, chosen on what it reads in all of them
    and by the outputs of all of them; the norm of each block takes them in.

    The search runs the calibration data `grid` times through each attention and feed-forward part,
    so that it takes about `grid` times as long as evaluating the data.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds; it is not changed.
        calibration: Token ids (sequences, time), or batches; see `core.calibration.batches_of`.
        bits: 2 to 8.
        group_size: What shares one scale: "row", or a number of inputs of a row.
        symmetric: Whether the grids are centred on 0; AWQ's are not.
        grid: How many exponents to try.
        clip: Whether to narrow ranges too.
        unclipped: Name patterns of layers whose ranges are not narrowed.
        layers: Name patterns of the layers to quantize. The scales of layers that share an input
            with them and are not quantized themselves are taken into their weights.
        report: Called with the name of each layer that takes in scales, and what was found.

    Returns:
        A new model with `QuantizedLinear` layers and scaled norms that shares all other tensors.

    Raises:
        ValueError: Bits, group size or grid that do not exist, weights that are not finite, no or
            too long calibration data, no fitting layer, or a model that is quantized already.
    """
    _check(bits, group_size, grid)
    refuse_quantized(model)
    wanted = block_linears(model, layers)
    for name, layer in wanted.items():
        try:
            check_matrix(layer.weight)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    joints = joined(model, find_folds(model, [_short(model, calibration)]))
    steps = Grid(bits, group_size, symmetric)
    rounding = partial(_round, grid=steps)
    batches = unpadded_batches(model, calibration)
    result = share(model).eval()
    users = block_users(result)
    everywhere = [(gaps(batch), partial(result, **batch)) for batch in batches]
    chosen = {result.get_submodule(name) for name in wanted}
    first = first_names(result)

    def observe(names: set[str], judges: list[nn.Module], runs: list[Run], alone: bool) -> Seen:
        observers = {}
        for name in names:
            layer = result.get_submodule(name)
            observers[name] = Inputs(layer.in_features, layer.weight.device)
        # Layers that other blocks use may read different tensors there.
        return watch_places(result, observers, judges, runs, shared=alone)

    def visit(prefix: str, block: nn.Module, calls: list[Call]) -> None:
        mine = {
            f"{prefix}.{name}"
            for name, m in block.named_modules()
            if isinstance(m, nn.Linear) and f"{prefix}.{name}" in wanted
        }
        places = [
            Place(joint, {first[r] for f in joint for r in f.readers}, judges_of(result, joint))
            for joint in joints
            if joint[0].source.startswith(f"{prefix}.")
        ]
        places = [p for p in places if any(result.get_submodule(n) in chosen for n in p.readers)]
        here = [(call.mask, partial(call.run, block)) for call in calls]
        seen = Seen({}, {})
        for alone, runs in ((True, here), (False, everywhere)):
            joined_here = [place for place in places if (len(place.folds) == 1) is alone]
            names = {n for n in mine if (len(users[result.get_submodule(n)]) == 1) is alone}
            names = names.union(*(place.readers for place in joined_here))
            judges = [judge for place in joined_here for judge in place.judges]
            if names:
                seen = seen.and_what(observe(names, judges, runs, alone))
        found: list[tuple[Place, Tensor]] = []
        for place in places:  # all on the unchanged block
            readers = {n: result.get_submodule(n) for n in sorted(place.readers)}
            readers = {name: layer for name, layer in readers.items() if layer in chosen}
            if place.judges:
                loss = module_loss(place.judges, list(readers.values()), seen.runs, rounding)
            else:
                each = [(m.weight, seen.inputs[name].value) for name, m in readers.items()]
                loss = _own_loss(each, rounding)
            search = search_scales(seen.magnitude(place, first), loss, grid)
            found.append((place, search.scales))
            for source in dict.fromkeys(first[fold.source] for fold in place.folds):
                if report:
                    report(source, search)
        hessians = {name: seen.inputs[name].value for name in mine if name in seen.inputs}
        for place, scales in found:
            set_parameters(result, scaled_together(result, place.folds, scales))
            for name in place.readers & hessians.keys():
                hessians[name] = hessians[name] / torch.outer(scales, scales)
        new: dict[str, nn.Module] = {}
        for name in mine:
            layer = result.get_submodule(name)
            weight = layer.weight.detach()
            if clip and name in hessians and not matches(name, unclipped):
                weight = awq_clip(
                    weight, hessians[name], bits, group_size=group_size, symmetric=symmetric
                )
            new[name] = QuantizedLinear(quantize_on(weight, steps), layer.bias)
        put_modules(result, new)

    visit_blocks_of(result, batches, visit, Calibration.of(calibration).report)
    return result


def _round(weight: Tensor, grid: Grid) -> Tensor:
    """What rounding to the stored format would leave of a weight."""
    return fake_quantize_on(weight.float(), grid, half_scales=True)


def _own_loss(
    layers: list[tuple[Tensor, Tensor]], rounding: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], float]:
    """The mean squared error of the layers' own outputs, as a function of the scales.

    Args:
        layers: Weights, each with the Hessian of its inputs.
        rounding: What rounding leaves of a weight.
    """

    def loss(scales: Tensor) -> float:
        # The mean of |(Q(W diag(s)) diag(s)^-1 - W) x|^2 over the inputs x.
        errors = [
            output_error(rounding(weight.float() * scales) / scales - weight.float(), hessian)
            for weight, hessian in layers
        ]
        return float(torch.cat(errors).mean())

    return loss


def _short(model: nn.Module, calibration: CalibrationLike) -> dict[str, Tensor]:
    """The first words of the calibration data, for finding folds."""
    batch = unpadded_batches(model, Calibration.of(calibration).one_by_one())[0]
    return {
        key: value[:1, :16] if isinstance(value, Tensor) and value.ndim == 2 else value[:1]
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.ndim > 0
    }


def _check(bits: int, group_size: Granularity, grid: int) -> None:
    Grid(bits, group_size)  # refuses what does not exist
    if group_size == "tensor":
        raise ValueError('AWQ chooses ranges row by row; group_size must be "row" or a number.')
    if isinstance(grid, bool) or grid < 1:
        raise ValueError(f"grid is {grid!r}; at least one exponent must be tried.")
