"""Mixed precision: more bits for the layers that need them.

A table of costs (`sensitivity` measures it), a table of bytes (`layer_bytes`) and a budget give an
allocation (`allocate`), and `mixed_precision` quantizes accordingly:

    costs = loss_sensitivity(model, data, [2, 4, 8])
    sizes = layer_bytes(model, [2, 4, 8])
    small = mixed_precision(model, allocate(costs, sizes, budget_bytes=2_000_000))

All of this takes the costs of layers to add up; `additivity` measures whether they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from effnb.core.calibration import CalibrationLike
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    first_names,
    linears,
    replace_modules,
    share,
)
from effnb.core.training import next_token_loss
from effnb.inference.quantization.allocation import (
    Costs,
    allocate,
    allocation_bytes,
    allocation_cost,
)
from effnb.inference.quantization.formats import Granularity, bits_per_weight
from effnb.inference.quantization.rtn import rtn
from effnb.inference.quantization.sensitivity import (
    HessianTrace,
    Loss,
    check_all_bits,
    hessian_sensitivity,
    hessian_traces,
    loss_sensitivity,
    mean_loss,
    model_batches,
    output_sensitivity,
)

__all__ = [
    "Additivity",
    "HessianTrace",
    "additivity",
    "allocate",
    "allocation_bytes",
    "allocation_cost",
    "hessian_sensitivity",
    "hessian_traces",
    "layer_bytes",
    "loss_sensitivity",
    "mixed_precision",
    "output_sensitivity",
]


@dataclass(frozen=True)
class Additivity:
    """Whether the costs of single layers predict the cost of all together.

    Attributes:
        predicted: Sum of the layers' costs.
        measured: Rise of the loss when all of them are quantized at once, in nats per token.
    """

    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Measured over predicted: 1 where costs add up, above it where errors amplify."""
        return self.measured / self.predicted if self.predicted else math.nan


@chooses_layers
@in_linear_form
def layer_bytes(
    model: nn.Module,
    bits: Iterable[int],
    *,
    group_size: Granularity = "row",
    symmetric: bool = False,
    layers: LayerChoice = "*",
) -> dict[str, dict[int, int]]:
    """Bytes that each linear layer's weight takes at each bit-width, by arithmetic.

    Raises:
        ValueError: Bits or a group size that the format does not have, or no fitting layer.
    """
    bits = check_all_bits(bits)
    return {
        name: {
            b: round(
                bits_per_weight(b, tuple(layer.weight.shape), group_size, symmetric=symmetric)
                * layer.weight.numel()
                / 8
            )
            for b in bits
        }
        for name, layer in linears(model, layers).items()
    }


@in_linear_form
def mixed_precision(
    model: Model,
    allocation: Mapping[str, int],
    quantizer: Callable[..., Model] = rtn,
) -> Model:
    """Quantize each layer to its own number of bits.

    The quantizer runs once for each bit-width that occurs, on the original model and the layers
    that get it; one that calibrates (GPTQ) sees the other layers unrounded.

    Args:
        model: The model; it is not changed.
        allocation: Bits by layer; layers that are not named stay as they are.
        quantizer: Called as `quantizer(model, bits, layers=Layers(names, ()))`, such as `rtn`,
            `functools.partial(rtn, group_size=64)` or `lambda m, b, **o: gptq(m, data, b, **o)`.

    Returns:
        A new model with `QuantizedLinear` layers that shares every other tensor.

    Raises:
        ValueError: An empty allocation, a name that is no linear layer, or a quantizer that changes
            other parts of the model too (AWQ does), whose changes could not be put together.
    """
    if not allocation:
        raise ValueError("the allocation is empty; name at least one layer.")
    check_all_bits(allocation.values())
    known = linears(model, Layers("*", ()))
    for name in allocation:
        if name not in known:
            raise ValueError(f"the allocation names {name!r}, which is no linear layer.")
    new: dict[str, nn.Module] = {}
    for bits in sorted(set(allocation.values())):
        names = [name for name, b in allocation.items() if b == bits]
        part = quantizer(model, bits, layers=Layers(names, ()))
        _check_rest(model, part, names)
        new |= {name: part.get_submodule(name) for name in names}
    return replace_modules(model, new)


def _check_rest(model: nn.Module, part: nn.Module, names: list[str]) -> None:
    """Refuse a model of which more than the named layers is new."""
    first = first_names(model)
    chosen = {first[name] for name in names}  # with all places of layers that have several
    mine = tuple(f"{name}." for name, source in first.items() if source in chosen)
    before = model.state_dict(keep_vars=True)
    after = part.state_dict(keep_vars=True)
    for name in {**before, **after}:
        if not name.startswith(mine) and before.get(name) is not after.get(name):
            raise ValueError(
                f"the quantizer changed {name} as well; only one that changes nothing but the "
                "layers it rounds can be used for mixed precision."
            )


def additivity(
    model: nn.Module,
    allocation: Mapping[str, int],
    sensitivity: Costs,
    calibration: CalibrationLike,
    *,
    quantizer: Callable[..., nn.Module] = rtn,
    loss: Loss = next_token_loss,
) -> Additivity:
    """Compare the sum of the layers' costs with the loss that they cause together.

    Args:
        model: The model; it is not changed.
        allocation: Bits by layer.
        sensitivity: What `loss_sensitivity` gave, with the same rounding, data and loss.
        calibration: The data.
        quantizer: See `mixed_precision`.
        loss: From the model and a batch's keyword arguments to the mean loss.
    """
    batches = model_batches(model, calibration, loss)
    together = mixed_precision(model, allocation, quantizer)
    losses = [mean_loss(share(m).eval(), batches, loss) for m in (model, together)]
    return Additivity(allocation_cost(sensitivity, allocation), losses[1] - losses[0])
