r"""Rounding that can be trained through: made-up gradients, and the grids that use them.

Rounding has the derivative 0 almost everywhere. Training replaces it by an estimate: the gradient
passes straight through the rounding, as if it were the identity, and stops where a number is cut
off at the end of its grid (Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through
Stochastic Neurons for Conditional Computation", 2013, arXiv 1308.3432). With the same estimate the
step of the grid can be learned (LSQ: Esser et al., "Learned Step Size Quantization", 2019, arXiv
1902.08153).

The classes are the two sides of one thing: called, they round for training; `stored` gives the same
numbers packed.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from effnb.inference.quantization.clipping import HALF_MAX, HALF_MIN
from effnb.inference.quantization.extreme import EPSILON, binarize, ternarize
from effnb.inference.quantization.formats import (
    QuantizedTensor,
    choose_grids,
    fake_quantize,
    quantize_on,
    spread,
)
from effnb.inference.quantization.grid import Granularity, Grid
from effnb.inference.quantization.stored import Stored

# --- made-up gradients ----------------------------------------------------------------------------


def straight_through(value: Float[Tensor, "*shape"], x: Float[Tensor, "*shape"]) -> Tensor:
    """`value` going forward, bit for bit; going backward, the gradient goes to `x` unchanged."""
    return value.detach() + (x - x.detach())


def ste_round(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round half to even; the gradient is that of the identity."""
    return straight_through(x.round(), x)


def quantize_ste(
    x: Float[Tensor, "*shape"],
    scale: Float[Tensor, "*#shape"],
    zero: Num[Tensor, "*#shape"] | int,
    low: int,
    high: int,
) -> Float[Tensor, "*shape"]:
    r"""$s\,(\operatorname{clamp}(\operatorname{round}(x / s) + z,\ q_{min}, q_{max}) - z)$.

    The gradient for $x$ is 1 where the rounded code lies on the grid, ends included, and 0 where it
    is cut off. Scale and zero point get none.

    Args:
        x: Numbers.
        scale: $s$, of a shape that broadcasts.
        zero: $z$.
        low: $q_{min}$.
        high: $q_{max}$.
    """
    scale = scale.detach()
    return scale * ((ste_round(x / scale) + zero).clamp(low, high) - zero)


def lsq_quantize(
    x: Float[Tensor, "*shape"],
    step: Float[Tensor, "*#shape"],
    low: int,
    high: int,
    gradient_scale: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""$s\,\operatorname{round}(\operatorname{clamp}(x / s,\ -Q_N, Q_P))$, with a step that learns.

    The gradient for $x$ is 1 strictly between the ends and 0 elsewhere; that for the step is
    $g$ times

    $$\frac{\partial \hat x}{\partial s} = \begin{cases} -Q_N & x / s \le -Q_N \\
      Q_P & x / s \ge Q_P \\ \operatorname{round}(x / s) - x / s & \text{otherwise.} \end{cases}$$

    Args:
        x: Numbers.
        step: $s$, above 0, of a shape that broadcasts.
        low: $-Q_N$.
        high: $Q_P$.
        gradient_scale: $g$; the paper's is `lsq_gradient_scale`.
    """
    # The step's own value, with a gradient g times as large; exact, unlike s g + (s - s g).
    step = step.detach() + (step - step.detach()) * gradient_scale
    v = x / step
    # Not clamp: at the very end of the grid it would still pass the gradient on.
    v = torch.where(v <= low, low, torch.where(v >= high, high, v))
    return ste_round(v) * step


def lsq_gradient_scale(numbers: int, high: int) -> float:
    r"""$g = 1 / \sqrt{N Q_P}$, N the numbers that share the step (for inputs: the features).

    It brings the step's relative updates to the size of the weights' own.
    """
    return 1 / math.sqrt(numbers * high)


def lsq_start(mean_magnitude: Float[Tensor, "*shape"], high: int) -> Float[Tensor, "*shape"]:
    r"""$s_0 = 2\,\overline{|x|} / \sqrt{Q_P}$; 1 where all numbers are 0."""
    start = 2 * mean_magnitude / math.sqrt(high)
    return torch.where(start > 0, start, torch.ones_like(start))


# --- quantizers: a forward pass for training, and the packed form of the same numbers ------------


def _work(x: Tensor) -> Tensor:
    """In float32 at least: half precision cannot tell the points of a fine grid apart."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _half(step: Tensor) -> Tensor:
    """A step as it is stored: half precision, above 0; the gradient passes straight through.

    A step that has wandered below 0 still gets its gradient, and finds the way back.
    """
    return straight_through(step.clamp(HALF_MIN, HALF_MAX).half().to(step.dtype), step)


class RangeGrid(nn.Module):
    """Weights on the grid that their own range gives, found again at every step."""

    def __init__(self, grid: Grid) -> None:
        """Take the kind of grid."""
        super().__init__()
        self.grid = grid

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The rounded weight."""
        w = _work(weight)
        scale, zero = choose_grids(w.detach(), self.grid)
        scale = spread(scale, self.grid.group_size, w.shape[1])
        zero = 0 if zero is None else spread(zero, self.grid.group_size, w.shape[1])
        return quantize_ste(w, scale, zero, self.grid.low, self.grid.high).to(weight.dtype)

    def stored(self, weight: Float[Tensor, "out in"]) -> Stored:
        """The rounded weight, packed."""
        return quantize_on(weight, self.grid)


class LearnedGrid(nn.Module):
    """A grid whose step is learned (LSQ): for weights or for a layer's inputs."""

    def __init__(
        self,
        mean_magnitude: Float[Tensor, "rows groups"],
        low: int,
        high: int,
        numbers: int,
        group_size: Granularity = "tensor",
    ) -> None:
        r"""Start with $s = 2\,\overline{|x|} / \sqrt{Q_P}$.

        Args:
            mean_magnitude: $\overline{|x|}$ of the numbers that share a step.
            low: $-Q_N$.
            high: $Q_P$.
            numbers: How many numbers share a step; for inputs, the number of features.
            group_size: What shares a step.
        """
        super().__init__()
        self.low, self.high, self.group_size = low, high, group_size
        self.shape = tuple(mean_magnitude.shape)
        self.gradient_scale = lsq_gradient_scale(numbers, high)
        # A vector, whatever is shared: the trainer lets matrices decay, and a step must not.
        self.step = nn.Parameter(_work(lsq_start(mean_magnitude.detach(), high)).flatten())

    @classmethod
    def of_weight(
        cls, weight: Float[Tensor, "out in"], bits: int, group_size: Granularity
    ) -> LearnedGrid:
        """For a weight: $Q_N = 2^{b-1}$, $Q_P = 2^{b-1} - 1$."""
        columns = weight.shape[1]
        magnitude = _work(weight.detach()).abs()
        if group_size == "tensor":
            mean, numbers = magnitude.mean().view(1, 1), weight.numel()
        elif group_size == "row":
            mean, numbers = magnitude.mean(1, keepdim=True), columns
        else:
            parts = magnitude.split(group_size, dim=1)  # the last one may be shorter
            mean = torch.stack([part.mean(1) for part in parts], 1)
            numbers = min(group_size, columns)
        return cls(mean, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, numbers, group_size)

    def steps(self) -> Float[Tensor, "rows groups"]:
        """The steps as they are stored."""
        return _half(self.step).view(self.shape)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded numbers."""
        step = spread(self.steps(), self.group_size, x.shape[-1])
        if self.group_size == "tensor":
            step = step.squeeze()
        return lsq_quantize(_work(x), step, self.low, self.high, self.gradient_scale).to(x.dtype)

    def stored(self, weight: Float[Tensor, "out in"]) -> Stored:
        """The rounded weight, packed; the grid has one code more below 0, so it is affine."""
        step = self.steps().detach()
        ratio = _work(weight.detach()) / spread(step, self.group_size, weight.shape[1])
        codes = ratio.round().clamp(self.low, self.high) - self.low
        zeros = torch.full(self.shape, -self.low, device=weight.device)
        bits = int(self.high - self.low).bit_length()
        return QuantizedTensor.from_codes(codes, step, zeros, Grid(bits, self.group_size))

    def extra_repr(self) -> str:
        """The ends of the grid and what shares a step."""
        return f"low={self.low}, high={self.high}, group_size={self.group_size!r}"


class FewValues(nn.Module):
    r"""Weights of three values or two: $\gamma \{-1, 0, 1\}$ (BitNet b1.58) or $\pm\alpha$.

    Both scales are mean magnitudes, $\gamma$ of the matrix and $\alpha$ of each row. All rounding
    and cutting is passed straight through.
    """

    def __init__(self, method: str) -> None:
        """Take "bitnet" or "binary"."""
        super().__init__()
        self.method = method

    def forward(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The rounded weight."""
        w = _work(weight.detach())
        if self.method == "bitnet":
            gamma = w.abs().mean()
            value = gamma * (w / (gamma + EPSILON)).round().clamp(-1, 1)
        else:
            value = w.abs().mean(1, keepdim=True) * torch.where(w >= 0, 1, -1)
        return straight_through(value.to(weight.dtype), weight)

    def stored(self, weight: Float[Tensor, "out in"]) -> Stored:
        """The rounded weight, packed."""
        return ternarize(weight) if self.method == "bitnet" else binarize(weight)


class TokenGrid(nn.Module):
    """Activations on a symmetric grid up to each token's largest magnitude; nothing is cut off."""

    def __init__(self, bits: int) -> None:
        """Take 2 to 8 bits."""
        super().__init__()
        self.bits = bits

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded activations."""
        return straight_through(fake_quantize(x.detach(), self.bits, symmetric=True), x)
