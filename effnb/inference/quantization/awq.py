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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from effnb.core.calibration import (
    Calibration,
    CalibrationLike,
    Call,
    Hessian,
    block_linears,
    main_output,
    unpadded_batches,
    visit_blocks,
    watch,
)
from effnb.core.checks import check_finite
from effnb.core.folding import Fold, find_folds, scaled, set_parameters
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Model,
    chooses_layers,
    in_several_blocks,
    matches,
    put_modules,
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
    seen = _Inputs(weight.shape[1], weight.device)
    seen.update(inputs)
    rounding = partial(_round, grid=Grid(bits, group_size, symmetric))
    return search_scales(seen.magnitude, _own_loss([weight], seen.value, rounding), grid)


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
    twice = set(in_several_blocks(model)) & set(wanted)
    if twice:
        raise ValueError(
            f"{min(twice)} is used in several blocks; AWQ scales each layer for what one block "
            "reads, so exclude it."
        )
    folds = find_folds(model, [_short(model, calibration)])
    steps = Grid(bits, group_size, symmetric)
    rounding = partial(_round, grid=steps)

    def visit(prefix: str, block: nn.Module, calls: list[Call]) -> None:
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        chosen = [name for name in linears if f"{prefix}.{name}" in wanted]
        places = [_inside(prefix, fold) for fold in folds if fold.source.startswith(prefix + ".")]
        places = [fold for fold in places if set(fold.readers) & set(chosen)]
        judges = {fold: _judge(block, fold) for fold in places}
        observers = {n: _Inputs(m.in_features, m.weight.device) for n, m in linears.items()}
        seen, runs = _observe(
            block, observers, calls, {j for j in judges.values() if j is not None}
        )
        found: dict[Fold, Tensor] = {}
        for fold in places:  # all on the unchanged block
            readers = [name for name in fold.readers if name in chosen]
            if judges[fold] is None:
                weights = [linears[name].weight for name in readers]
                loss = _own_loss(weights, seen[readers[0]].value, rounding)
            else:
                judge = judges[fold]
                loss = _module_loss(block, judge, readers, runs[judge], rounding)
            search = search_scales(seen[readers[0]].magnitude, loss, grid)
            found[fold] = search.scales
            if report:
                report(f"{prefix}.{fold.source}", search)
        hessians = {name: observer.value for name, observer in seen.items() if name in chosen}
        for fold, scales in found.items():
            set_parameters(block, scaled(block, fold, scales))
            for name in set(fold.readers) & set(hessians):
                hessians[name] = hessians[name] / torch.outer(scales, scales)
        for name in chosen:
            layer = linears[name]
            weight = layer.weight.detach()
            if clip and name in hessians and not matches(f"{prefix}.{name}", unclipped):
                weight = awq_clip(
                    weight, hessians[name], bits, group_size=group_size, symmetric=symmetric
                )
            stored = quantize_on(weight, steps)
            put_modules(block, {name: QuantizedLinear(stored, layer.bias)})

    return visit_blocks(
        model,
        calibration,
        visit,
    )


class _Inputs(Hessian):
    """The Hessian of a layer's inputs, and the mean magnitude of each."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self._sum = torch.zeros(features, device=device)

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        super().update(inputs)
        self._sum += inputs.float().abs().sum(0)

    @property
    def magnitude(self) -> Float[Tensor, "in"]:
        return self._sum / max(self.tokens, 1)


def _round(weight: Tensor, grid: Grid) -> Tensor:
    """What rounding to the stored format would leave of a weight."""
    return fake_quantize_on(weight.float(), grid, half_scales=True)


def _own_loss(
    weights: list[Tensor], hessian: Tensor, rounding: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], float]:
    """The mean squared error of the layers' own outputs, as a function of the scales."""

    def loss(scales: Tensor) -> float:
        # The mean of |(Q(W diag(s)) diag(s)^-1 - W) x|^2 over the inputs x.
        errors = [
            output_error(rounding(weight.float() * scales) / scales - weight.float(), hessian)
            for weight in weights
        ]
        return float(torch.cat(errors).mean())

    return loss


_Run = tuple[Call, tuple, Mapping, Tensor]  # a batch, a module's arguments for it, its output


def _module_loss(
    block: nn.Module,
    judge: str,
    readers: list[str],
    runs: list[_Run],
    rounding: Callable[[Tensor], Tensor],
) -> Callable[[Tensor], float]:
    """The mean squared error of a module's output when the readers inside are rounded."""
    module = block.get_submodule(judge)
    inside = {name: name[len(judge) + 1 if judge else 0 :] + ".weight" for name in readers}

    def loss(scales: Tensor) -> float:
        new = {}
        for name, parameter in inside.items():
            weight = block.get_submodule(name).weight
            new[parameter] = (rounding(weight.float() * scales) / scales).to(weight.dtype)
        total, count = 0.0, 0
        for call, arguments, keywords, truth in runs:
            output = main_output(functional_call(module, new, arguments, dict(keywords)))
            difference = call.text(output - truth).float()
            total += float(difference.square().sum())
            count += difference.numel()
        return total / max(count, 1)

    return loss


def _observe(
    block: nn.Module, observers: dict[str, _Inputs], calls: list[Call], judges: set[str]
) -> tuple[dict[str, _Inputs], dict[str, list[_Run]]]:
    """Run the data through a block once; see the layers' inputs and what the judges compute."""
    runs: dict[str, list[_Run]] = {name: [] for name in judges}

    def keep(name: str):
        def hook(module, arguments, keywords, output):
            call = calls[len(runs[name])]
            runs[name].append((call, arguments, keywords, main_output(output)))

        return hook

    hooks = [
        block.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True)
        for name in judges
    ]
    try:
        return watch(block, observers, calls, shared=True), runs
    finally:
        for hook in hooks:
            hook.remove()


def _judge(block: nn.Module, fold: Fold) -> str | None:
    """The module whose output tells how good scales are; None for the layer's own output."""
    parents = [name.rpartition(".")[0].split(".") for name in fold.readers]
    shared: list[str] = []
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    judge = ".".join(shared)
    single = len(fold.readers) == 1 and not judge
    return None if isinstance(block.get_submodule(fold.source), nn.Linear) or single else judge


def _inside(prefix: str, fold: Fold) -> Fold:
    """The same fold, with names as the block knows them."""
    cut = len(prefix) + 1
    return Fold(fold.source[cut:], tuple(name[cut:] for name in fold.readers), fold.offset)


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
