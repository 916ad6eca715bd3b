r"""Quantized activations: integer inputs times integer weights.

With weights and inputs both on symmetric grids, a linear layer is a product of small integers,
rescaled once per output:

$$y_{to} = s_t \sum_g s_{og} \sum_{j \in g} q_{tj}\,(w_{oj} - z_{og}) + b_o,$$

with $q$ the codes of the inputs, $w$ those of the weight, $s_t$ the scale of token $t$, and
$s_{og}$, $z_{og}$ scale and zero point of group $g$ in row $o$ of the weight. The inner sum is
exact in 32-bit integers. What one input scale is shared by:

- `"token"`: $s_t = \max_j |x_{tj}| / (2^{b-1} - 1)$, found for each token by itself (token-wise
  dynamic: Yao et al., ZeroQuant, 2022, arXiv 2206.01861);
- `"tensor"`: the largest magnitude of the whole batch serves all its tokens, so that the result
  depends on what else is in the batch;
- `"static"`: the largest magnitude seen on calibration data, fixed beforehand; nothing is searched
  for at run time, and larger inputs are cut off.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor, nn

from effnb.core.calibration import Calibration, CalibrationLike, unpadded_batches
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    named_modules_of,
    replace_modules,
    share,
)
from effnb.core.padding import gaps, masked_rows
from effnb.inference.quantization.formats import Granularity, QuantizedTensor, check_bits
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.rtn import rtn

SHARED = ("token", "tensor", "static")
"""What one scale of the inputs may be shared by."""


def activation_codes(
    inputs: Float[Tensor, "tokens in"],
    bits: int = 8,
    granularity: str = "token",
    *,
    maximum: Float[Tensor, ""] | None = None,
    clip_ratio: float = 1.0,
) -> tuple[Int8[Tensor, "tokens in"], Float[Tensor, "tokens 1"]]:
    r"""Symmetric codes of a layer's inputs, $q = \operatorname{round}(x / s)$, and their scales.

    $s = c \max|x| / (2^{b-1} - 1)$; inputs beyond $c \max|x|$ are cut off. The scale of inputs that
    are all zero is 1; that of a token with NaN or infinite entries is NaN or infinite, so that
    nothing computed from it looks sound.

    Args:
        inputs: $x$, tokens in rows.
        bits: 2 to 8.
        granularity: "token", "tensor" or "static".
        maximum: The calibrated $\max|x|$, for "static".
        clip_ratio: $c$, above 0 and at most 1: below 1, rare large inputs are cut off and the
            others get a finer grid.

    Returns:
        The codes, and a scale for each token (float64 for float64 inputs, otherwise float32).

    Raises:
        ValueError: Bits, granularity or clip ratio outside their ranges, or no maximum for
            "static".
    """
    check_inputs(bits, granularity, clip_ratio)
    if (granularity == "static") != (maximum is not None):
        raise ValueError('a calibrated maximum goes with granularity "static", and only with it.')
    x = inputs if inputs.dtype == torch.float64 else inputs.float()
    if maximum is not None:
        sound = x.isfinite().all(-1, keepdim=True)
        span = torch.where(sound, maximum.to(x.dtype), torch.nan)
    elif granularity == "token":
        span = x.abs().amax(-1, keepdim=True)
    else:
        span = x.abs().amax().expand(len(x), 1)
    top = 2 ** (bits - 1) - 1
    scale = span * clip_ratio / top
    scale = torch.where(scale == 0, 1, scale)
    return (x / scale).round().clamp(-top, top).to(torch.int8), scale


def check_inputs(bits: int, granularity: str, clip_ratio: float) -> None:
    """Refuse settings that quantized inputs cannot have."""
    check_bits(bits)
    if granularity not in SHARED:
        raise ValueError(f"granularity is {granularity!r}; it must be one of {', '.join(SHARED)}.")
    if not 0 < clip_ratio <= 1:
        raise ValueError(f"clip_ratio is {clip_ratio}; it must be above 0 and at most 1.")


@cache
def _has_integer_kernel(device: str) -> bool:
    """Whether PyTorch multiplies int8 matrices on this kind of device, and does so exactly.

    It is asked, not assumed: on some older processors such kernels saturate at 16 bits inside.
    """
    ends = torch.tensor([127, -128], dtype=torch.int8, device=device).repeat(32)
    a = ends.unsqueeze(1).expand(64, 256).contiguous()
    exact = ends.int().outer(ends.int()) * 256
    try:
        return torch.equal(torch._int_mm(a, a.T), exact)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def integer_matmul(a: Int8[Tensor, "m k"], b: Int8[Tensor, "n k"]) -> Int32[Tensor, "m n"]:
    r"""$A B^\top$ of int8 matrices, exactly, in int32.

    Uses PyTorch's integer kernel where there is one. Elsewhere slices of 1,024 columns are
    multiplied in float32: a sum of this many products stays below $2^{24}$, up to which float32
    holds every whole number.
    """
    if a.device.type == "cpu":
        fits = a.shape[1] > 1  # on a single column, PyTorch 2.13's kernel returns garbage
    else:
        fits = len(a) > 16 and a.shape[1] % 8 == 0 and len(b) % 8 == 0  # what CUDA's asks for
    if fits and _has_integer_kernel(a.device.type):
        return torch._int_mm(a.contiguous(), b.contiguous().T)
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(1024, dim=1), b.split(1024, dim=1)):
        total += (left.float() @ right.float().T).to(torch.int32)
    return total


def quantized_matmul(
    codes: Int8[Tensor, "tokens in"], scales: Float[Tensor, "tokens 1"], weight: QuantizedTensor
) -> Float[Tensor, "tokens out"]:
    r"""$y_{to} = s_t \sum_g s_{og} \sum_{j \in g} q_{tj}\,(w_{oj} - z_{og})$.

    Everything inside the sum over a group is integer arithmetic; sums over groups and the
    rescaling are in the precision of `scales`.

    Args:
        codes: $q$, of the inputs.
        scales: $s_t$, of the inputs.
        weight: A matrix on a uniform grid, with any grouping.
    """
    w = weight.integers()
    columns = weight.shape[1]
    if weight.order is not None:  # stored column j belongs to input order[j]
        codes = codes[:, weight.order.long()]
    step = weight.scales.to(scales.dtype).expand(len(w), -1)
    size = columns if isinstance(weight.group_size, str) else weight.group_size
    zero = weight.zero_points()
    if zero is not None:
        # Codes from 0 become signed, and so does the zero point: their difference stays.
        shift = 2 ** (weight.bits - 1)
        w, zero = w - shift, (zero - shift).to(torch.int32).expand(len(w), -1)
    w = w.to(torch.int8)
    y = torch.zeros(len(codes), len(w), dtype=scales.dtype, device=codes.device)
    for group, start in enumerate(range(0, columns, size)):
        part = codes[:, start : start + size]
        whole = integer_matmul(part, w[:, start : start + size])
        if zero is not None:
            whole = whole - part.sum(-1, keepdim=True, dtype=torch.int32) * zero[:, group]
        y += whole * step[:, group]
    return y * scales


class QuantizedInputs(nn.Module):
    """A linear layer that rounds its inputs to a few bits first.

    Where the weight lies on a uniform grid too, the product is computed in integers; with another
    format, or an ordinary layer, the rounded inputs are multiplied in floating point, which gives
    the same numbers up to rounding.
    """

    rounds_inputs = True
    maximum: Tensor | None

    def __init__(
        self,
        layer: nn.Module,
        bits: int = 8,
        granularity: str = "token",
        *,
        maximum: Tensor | None = None,
        clip_ratio: float = 1.0,
    ) -> None:
        """Wrap a `QuantizedLinear` or `nn.Linear`; see `activation_codes` for the rest."""
        super().__init__()
        check_inputs(bits, granularity, clip_ratio)
        self.layer = layer
        self.bits, self.granularity, self.clip_ratio = bits, granularity, clip_ratio
        self.register_buffer("maximum", maximum)

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The wrapped layer's weight."""
        return self.layer.weight

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Round the inputs, multiply, rescale."""
        codes, scales = activation_codes(
            inputs.flatten(0, -2),
            self.bits,
            self.granularity,
            maximum=self.maximum,
            clip_ratio=self.clip_ratio,
        )
        weight = getattr(self.layer, "quantized", None)
        if isinstance(weight, QuantizedTensor):
            y = quantized_matmul(codes, scales, weight)
            if self.layer.bias is not None:
                y = y + self.layer.bias
        else:
            y = self.layer((codes * scales).to(inputs.dtype))
        return y.to(inputs.dtype).unflatten(0, inputs.shape[:-1])

    def extra_repr(self) -> str:
        """Bits and what shares a scale."""
        clip = "" if self.clip_ratio == 1 else f", clip_ratio={self.clip_ratio}"
        return f"bits={self.bits}, granularity={self.granularity!r}{clip}"


def input_maxima(
    model: nn.Module,
    calibration: CalibrationLike,
    names: Iterable[str],
) -> dict[str, Float[Tensor, " in"]]:
    r"""$\max_t |x_{tj}|$ of each input feature of the named layers; padding is left out.

    Args:
        model: The model, which runs on the calibration data as it is.
        calibration: Token ids (sequences, time), or batches of keyword arguments.
        names: Dotted names of linear layers.

    Raises:
        ValueError: No calibration data, sequences beyond the context, a layer that the data never
            reaches, or inputs that are not finite.
    """
    batches, report = unpadded_batches(model, calibration), Calibration.of(calibration).report
    watched = share(model).eval()  # a copy of the modules, so that no hook is left on the model
    found: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def hook_for(name: str):
        def hook(module, arguments):
            if not arguments[0].numel():
                return  # an expert that no token was sent to
            top = masked_rows(arguments[0], mask[0]).abs().amax(0)
            found[name] = torch.maximum(found[name], top) if name in found else top

        return hook

    names = list(names)
    for name in names:
        watched.get_submodule(name).register_forward_pre_hook(hook_for(name))
    with torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            mask[0] = gaps(batch)
            watched(**batch)
            report(done, len(batches))
    for name in names:
        if name not in found:
            raise ValueError(f"the calibration data never reaches the layer {name}.")
        if not found[name].isfinite().all():
            raise ValueError(f"the inputs of {name} are NaN or infinite on the calibration data.")
    return found


@chooses_layers
@in_linear_form
def quantize_inputs(
    model: Model,
    bits: int = 8,
    *,
    granularity: str = "token",
    clip_ratio: float = 1.0,
    calibration: CalibrationLike | None = None,
    layers: LayerChoice = "*",
) -> Model:
    r"""Let linear layers round their inputs; weights stay as they are, quantized or not.

    Args:
        model: Any module with linear layers, ordinary or quantized by any method of this package;
            it is not changed.
        bits: Bits of the inputs, 2 to 8.
        granularity: What shares a scale: "token", "tensor" (both found at run time) or "static".
        clip_ratio: Fraction of the largest magnitude that the grid spans.
        calibration: Token ids (sequences, time) or batches, for "static" only.
        layers: Name patterns of the layers.

    Returns:
        A new model that shares all tensors with the given one.

    Raises:
        ValueError: A parameter outside its range, "static" without calibration data, no fitting
            layer, or a model whose inputs are quantized already.
    """
    _check_model(model, bits, granularity, clip_ratio, calibration)
    chosen = named_modules_of(model, (nn.Linear, QuantizedLinear), Layers.of(layers))
    maxima: dict[str, Tensor] = {}
    if granularity == "static":
        maxima = input_maxima(
            model,
            calibration,
            chosen,
        )
    return replace_modules(
        model,
        {
            name: QuantizedInputs(
                layer,
                bits,
                granularity,
                maximum=maxima[name].max().float() if maxima else None,
                clip_ratio=clip_ratio,
            )
            for name, layer in chosen.items()
        },
    )


def _check_model(
    model: nn.Module,
    bits: int,
    granularity: str,
    clip_ratio: float,
    calibration: CalibrationLike | None,
) -> None:
    check_inputs(bits, granularity, clip_ratio)
    if granularity == "static" and calibration is None:
        raise ValueError('granularity "static" needs calibration data to take its maxima from.')
    if any(isinstance(m, QuantizedInputs) for m in model.modules()):
        raise ValueError("this model's inputs are quantized already; start from the original.")


@chooses_layers
def quantize_activations(
    model: Model,
    weight_bits: int = 8,
    activation_bits: int = 8,
    *,
    granularity: str = "token",
    group_size: Granularity = "row",
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    calibration: CalibrationLike | None = None,
    layers: LayerChoice = "*",
) -> Model:
    """Round weights to nearest and inputs at run time: W8A8, W4A8 and their like.

    For weights quantized in another way (GPTQ, AWQ), call `quantize_inputs` on that model.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        weight_bits: Bits of the weights, 2 to 8.
        activation_bits: Bits of the inputs, 2 to 8.
        granularity: What shares a scale of the inputs: "token", "tensor" or "static".
        group_size: What shares a scale of the weights: "tensor", "row", or inputs per group.
        symmetric: Whether the grids of the weights have no zero points.
        clip_ratio: Fraction of the inputs' largest magnitude that their grid spans.
        calibration: Token ids (sequences, time) or batches, for "static" only.
        layers: Name patterns of the layers.

    Returns:
        A new model that shares every tensor it did not quantize.

    Raises:
        ValueError: As `effnb.inference.quantization.rtn` and `quantize_inputs`.
    """
    _check_model(model, activation_bits, granularity, clip_ratio, calibration)
    rounded = rtn(
        model,
        weight_bits,
        group_size=group_size,
        symmetric=symmetric,
        layers=layers,
    )
    return quantize_inputs(
        rounded,
        activation_bits,
        granularity=granularity,
        clip_ratio=clip_ratio,
        calibration=calibration,
        layers=layers,
    )
