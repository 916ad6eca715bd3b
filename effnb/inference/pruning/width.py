r"""Width: keep the heads, neurons and channels that are most active.

No gradient is needed: one forward pass over calibration data scores every structure by how large
its activations are, the $\ell_2$ norm over the tokens of a sequence, the mean over sequences:

- neuron: the input of the down projection, $\operatorname{act}(g) \odot u$;
- head: the head's output before the output projection, the norm over its components too;
- channel: what the norms in front of attention and MLP give, summed over all of them.

Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
2024, arXiv 2407.14679; there a distillation follows. Trimming the width asks much of a model:
channels run through all layers, and what one of them carries is lost everywhere at once.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike
from effnb.core.modules import share
from effnb.inference.pruning.choice import check_unit, choose_kept, removals
from effnb.inference.pruning.depth import text_batches
from effnb.inference.pruning.shrink import Pruned, cut
from effnb.inference.pruning.structures import anatomy, check_weights


def sequence_norm(
    activations: Float[Tensor, "batch time *units"], mask: Tensor
) -> Float[Tensor, " batch *units"]:
    r"""$\sqrt{\sum_t a_t^2}$ over the tokens of each sequence that are not padding."""
    weights = mask.view(*mask.shape, *[1] * (activations.ndim - 2))
    return (activations.float().square() * weights).sum(1).sqrt()


def activation_importance(model: nn.Module, calibration: CalibrationLike) -> dict[str, Tensor]:
    """How active each head, neuron and channel is.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: Token ids (sequences, time), or keyword arguments per batch; padding is not
            counted.

    Returns:
        "heads" (layers, heads), "neurons" (layers, neurons) and "channels" (channels).

    Raises:
        ValueError: No calibration data, weights that are not finite, or a model that is not
            Llama-like or is quantized.
    """
    shape = anatomy(model)
    check_weights(model)
    batches = text_batches(model, calibration)
    twin = share(model).eval()
    device = next(twin.parameters()).device
    sums = {
        "heads": torch.zeros(shape.layers, shape.heads, device=device),
        "neurons": torch.zeros(shape.layers, shape.neurons, device=device),
        "channels": torch.zeros(shape.channels, device=device),
    }
    current: list[Tensor] = []

    def heads(layer: int):
        def hook(module: nn.Module, arguments: tuple) -> None:
            parts = arguments[0].unflatten(-1, (shape.heads, shape.head_dim)).float().norm(dim=-1)
            sums["heads"][layer] += sequence_norm(parts, current[0]).sum(0)

        return hook

    def neurons(layer: int):
        def hook(module: nn.Module, arguments: tuple) -> None:
            sums["neurons"][layer] += sequence_norm(arguments[0], current[0]).sum(0)

        return hook

    def channels(module: nn.Module, _: tuple, output: Tensor) -> None:
        sums["channels"].add_(sequence_norm(output, current[0]).sum(0))

    for layer, block in enumerate(twin.get_submodule(shape.blocks)):
        block.self_attn.o_proj.register_forward_pre_hook(heads(layer))
        block.mlp.down_proj.register_forward_pre_hook(neurons(layer))
        block.input_layernorm.register_forward_hook(channels)
        block.post_attention_layernorm.register_forward_hook(channels)
    sequences = 0
    with torch.no_grad():
        for batch, mask in batches:
            current[:] = [mask]
            twin(**batch, use_cache=False)
            sequences += len(mask)
    return {kind: (total / sequences).cpu() for kind, total in sums.items()}


def width(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    heads: float = 0.0,
    neurons: float = 0.0,
    hidden: float = 0.0,
    unit: str = "groups",
    rescale_norms: bool = True,
) -> Pruned:
    """Remove the least active heads, neurons and channels.

    Args:
        model: A Llama-like model; it is not changed.
        calibration: As in `activation_importance`.
        heads: Part in [0, 1), or number, of heads or groups to remove from each layer.
        neurons: The same for neurons.
        hidden: The same for the channels of the residual stream.
        unit: "groups" (key-value heads with their query heads) or "heads".
        rescale_norms: As in `shrink`.

    Raises:
        ValueError: An amount out of range or that no class can hold, no calibration data, weights
            that are not finite, or a model that is not Llama-like or is quantized.
        TypeError: When an amount is no number.
    """
    shape = anatomy(model)
    check_unit(unit)
    remove = {"heads": heads, "neurons": neurons, "channels": hidden}
    counts = {
        "heads": shape.kv_heads if unit == "groups" else shape.queries_per_group,
        "neurons": shape.neurons,
        "channels": shape.channels,
    }
    for kind, amount in remove.items():
        removals(amount, counts[kind], kind)
    scores = activation_importance(
        model,
        calibration,
    )
    kept = choose_kept(shape, scores, remove, unit=unit)
    return cut(model, kept, scores, rescale_norms=rescale_norms)
