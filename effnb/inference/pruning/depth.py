r"""Depth: remove whole blocks.

A block adds to the residual stream, so the stream goes on without it. Which blocks do least?

*Block influence.* $BI_l = 1 - \mathbb{E}_t\left[\cos(h_{l,t}, h_{l+1,t})\right]$ with $h_l$ the
stream that block $l$ gets: a block that leaves the direction of the stream alone has 0. Remove the
lowest in one shot (Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than
You Expect", 2024, arXiv 2403.03853).

*A run of blocks.* The angle between what enters block $l$ and what enters block $l + n$, over
$\pi$; remove the $n$ blocks in a row with the smallest (Gromov et al., "The Unreasonable
Ineffectiveness of the Deeper Layers", 2024, arXiv 2403.17887).

*Ablation.* Remove each block alone and measure: one evaluation per block, and the truth for one
block. Both numbers above are cheap stand-ins for it, and in a small model they may disagree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, batches_of, main_output
from effnb.core.context import context_limit
from effnb.core.modules import share
from effnb.inference.pruning.choice import keep_all, removals
from effnb.inference.pruning.shrink import Pruned, cut, prune_structures
from effnb.inference.pruning.structures import Anatomy, anatomy, check_weights


def text_batches(
    model: nn.Module, calibration: CalibrationLike
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Calibration data where the model is: keyword arguments, and which tokens are not padding.

    Args:
        model: The model that they are for.
        calibration: See `effnb.core.calibration.batches_of`.

    Raises:
        ValueError: No calibration data, or sequences beyond the context.
    """
    device = next(model.parameters()).device
    context = context_limit(model)
    found = []
    for given in batches_of(calibration, context):
        batch = {key: value.to(device) for key, value in given.items()}
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        found.append((batch, mask.bool()))
    return found


def _streams(
    model: nn.Module, shape: Anatomy, calibration: CalibrationLike
) -> Iterable[list[Tensor]]:
    """For each batch: the residual stream before each block and behind the last, tokens in rows.

    Not the model's `output_hidden_states`: the last of those has gone through the final norm.
    """
    check_weights(model)
    batches = text_batches(model, calibration)
    twin = share(model).eval()
    seen: list[Tensor] = []
    blocks = twin.get_submodule(shape.blocks)

    def before(module: nn.Module, arguments: tuple, keywords: dict) -> None:
        seen.append(arguments[0] if arguments else keywords["hidden_states"])

    for block in blocks:
        block.register_forward_pre_hook(before, with_kwargs=True)
    blocks[-1].register_forward_hook(lambda module, _, output: seen.append(main_output(output)))
    for batch, mask in batches:
        seen.clear()
        with torch.inference_mode():
            twin(**batch, use_cache=False)
        streams = [stream[mask].double() for stream in seen]
        for index, stream in enumerate(streams):
            if not bool(torch.isfinite(stream).all()):
                where = f"in front of block {index}" if index < len(blocks) else "at the end"
                raise ValueError(
                    f"the residual stream is not finite {where}, although the weights are; "
                    "compute in a type of wider range."
                )
        yield streams


def _directions(stream: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens dim"]:
    """Vectors of length 1; NaN for a vector of zeros, which has no direction."""
    return stream / stream.norm(dim=-1, keepdim=True)


def _mean(sums: Tensor, counts: Tensor) -> Tensor:
    if not bool((counts > 0).all()):
        raise ValueError("a block gets or gives only zeros, which have no direction.")
    return (sums / counts).float()


def block_influence(model: nn.Module, calibration: CalibrationLike) -> Float[Tensor, " layers"]:
    r"""$1 - \cos$ between what enters and what leaves each block, the mean over tokens.

    Computed as $\tfrac12 \lVert \hat h_l - \hat h_{l+1} \rVert^2$ of the vectors of length 1, which
    is the same and is exactly 0 where nothing changes.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch; padding is not
            counted, and neither is a token whose vector is 0.

    Raises:
        ValueError: No calibration data, weights or a stream that are not finite, or a model that is
            not Llama-like or is quantized.
    """
    shape = anatomy(model)
    sums = torch.zeros(shape.layers, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for streams in _streams(model, shape, calibration):
        units = [_directions(stream) for stream in streams]
        for layer in range(shape.layers):
            change = (units[layer] - units[layer + 1]).square().sum(-1) / 2
            sums[layer] += float(change.nansum())
            counts[layer] += int(change.isfinite().sum())
    return _mean(sums, counts)


def angular_distances(
    model: nn.Module, calibration: CalibrationLike, count: float
) -> Float[Tensor, " starts"]:
    r"""$\tfrac1\pi \arccos \cos(h_l, h_{l + n})$, the mean over tokens, for each start $l$.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `block_influence`.
        count: $n$, how many blocks in a row are jumped over.

    Returns:
        In [0, 1], for the starts 0, …, layers - n.

    Raises:
        ValueError: A count that leaves no block, no calibration data, weights or a stream that are
            not finite, or a model that is not Llama-like or is quantized.
    """
    shape = anatomy(model)
    count = _count(count, shape)
    starts = shape.layers - count + 1
    sums = torch.zeros(starts, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for streams in _streams(model, shape, calibration):
        units = [_directions(stream) for stream in streams]
        for start in range(starts):
            a, b = units[start], units[start + count]
            # The arc from the half chord: near 0 the arccos of a rounded cosine is only noise.
            angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / math.pi
            sums[start] += float(angle.nansum())
            counts[start] += int(angle.isfinite().sum())
    return _mean(sums, counts)


def _count(count: float, shape: Anatomy) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"count is {count!r}; it must be a whole number of layers.")
    if count < 1:
        raise ValueError(f"count is {count}; it must be at least 1.")
    return removals(count, shape.layers, "layers")


def layer_ablation(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, " layers"]:
    """The loss of the model without each block in turn.

    As scores for `prune_structures`: what hurts most when it goes is kept.

    Args:
        model: A Llama-like model; it is not changed.
        evaluate: From a model to its loss.
        progress: Called with (blocks done, blocks).

    Raises:
        ValueError: A model of one block, one that is not Llama-like, or a quantized one; weights
            that are not finite.
    """
    layers = anatomy(model).layers
    losses = []
    for layer in range(layers):
        losses.append(float(evaluate(drop_layers(model, [layer]).model)))
        if progress:
            progress(layer + 1, layers)
    return torch.tensor(losses)


def drop_layers(model: nn.Module, layers: Iterable[int]) -> Pruned:
    """Remove blocks by number; those behind them move up, in the key-value cache too.

    Args:
        model: A Llama-like model; it is not changed.
        layers: Numbers of the blocks to remove.

    Raises:
        ValueError: A number that is not there, no block left, weights that are not finite, or a
            model that is not Llama-like or is quantized.
    """
    kept, gone = keep_all(model), set(layers)
    unknown = sorted(gone - set(kept.layers))
    if unknown:
        raise ValueError(f"layer {unknown[0]} is not there; the model has {len(kept.layers)}.")
    stay = tuple(layer for layer in kept.layers if layer not in gone)
    return cut(model, replace(kept, layers=stay), {})


def shortgpt(model: nn.Module, calibration: CalibrationLike, count: float) -> Pruned:
    """Remove the blocks with the lowest block influence, all at once.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `block_influence`.
        count: How many blocks to remove.

    Raises:
        ValueError: A count that leaves no block, and what `block_influence` raises.
        TypeError: When the count is no whole number.
    """
    _count(count, anatomy(model))
    scores = block_influence(
        model,
        calibration,
    )
    return prune_structures(model, {"layers": scores}, {"layers": count})


def drop_run(model: nn.Module, calibration: CalibrationLike, count: float) -> Pruned:
    """Remove the blocks in a row that turn the stream least; heal the result by training.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `block_influence`.
        count: How many blocks to remove.

    Returns:
        With the angular distances of all starts as the scores "runs".

    Raises:
        ValueError: A count that leaves no block, and what `angular_distances` raises.
        TypeError: When the count is no whole number.
    """
    distances = angular_distances(
        model,
        calibration,
        count,
    )
    start = int(distances.argmin())
    found = drop_layers(model, range(start, start + count))
    return replace(found, scores={"runs": distances})
