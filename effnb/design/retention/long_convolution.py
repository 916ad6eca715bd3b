r"""Long convolutions: filters as long as the text, applied by FFT, and given by a small network.

A causal convolution of $T$ inputs with a filter $h$ that is as long is
$y_t = \sum_{s \le t} h_{t-s} u_s$, the product with a Toeplitz matrix: $T^2 / 2$ multiply-adds per
channel. The Fourier transform makes it a product of numbers, at $O(T \log T)$. It computes
*circular* convolutions, so both sequences are padded with zeros to $2T$; at a length of $T$ the end
of the text would come round to its beginning, and the future would leak into the past.

**Implicit filters** (Hyena). A filter of any length has a fixed number of parameters when a network
computes it from time:

$$h(t) = \mathrm{MLP}(\mathrm{pe}(t)) \cdot e^{-|\delta_c|\, t}, \qquad
  \mathrm{pe}(t) = \big[t,\ \operatorname{Re} e^{-i f_k \tau},\
  \operatorname{Im} e^{-i f_k \tau}\big], \quad \tau = 2 \pi n / L,$$

with sines as activations, $\sin(\omega x)$ with trained $\omega$. Time runs from 0 to 1 over the
$L$ tokens that the filter is made for: another $L$ stretches it, so a trained filter belongs to its
$L$. The decay rates $\delta_c$ lie evenly between $\ln 0.01 / 1.5$ and $\ln 0.01 / 0.3$, so that
channels see back by different lengths.

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models", 2023, arXiv
2302.10866.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.design.retention.precision import no_autocast, wide

TARGET = 0.01
"""What the windows have decayed to at the times `slow` and `fast`, as parts of the whole length."""


def fft_convolution(
    u: Float[Tensor, "batch time dim"], h: Float[Tensor, "filter dim"]
) -> Float[Tensor, "batch time dim"]:
    r"""$y_t = \sum_{s \le t} h_{t-s} u_s$, by FFTs of twice the length.

    Computed in float32, or float64 for such inputs; the filter may be longer than the text.

    Raises:
        ValueError: When the filter is shorter than the text, or has other channels.
    """
    length = u.shape[1]
    _check(u, h)
    kind = wide(u)
    size = 2 * length  # zero padding: circular at 2T is causal for the first T
    spectrum = torch.fft.rfft(u.to(kind), size, dim=1)
    response = torch.fft.rfft(h[:length].to(kind), size, dim=0)
    return torch.fft.irfft(spectrum * response, size, dim=1)[:, :length].to(u.dtype)


def toeplitz(h: Float[Tensor, "filter dim"], length: int) -> Float[Tensor, "dim length length"]:
    r"""The matrix $M_{ts} = h_{t-s}$ for $s \le t$, else 0, of each channel."""
    index = torch.arange(length, device=h.device)
    distance = index[:, None] - index
    return (h[distance.clamp(min=0)] * (distance >= 0)[..., None]).permute(2, 0, 1)


def toeplitz_convolution(
    u: Float[Tensor, "batch time dim"], h: Float[Tensor, "filter dim"]
) -> Float[Tensor, "batch time dim"]:
    """What `fft_convolution` computes, as a product with a matrix; also for what is raised."""
    _check(u, h)
    return torch.einsum("cts,bsc->btc", toeplitz(h, u.shape[1]), u)


def last_outputs(
    u: Float[Tensor, "batch time dim"], h: Float[Tensor, "filter dim"], count: int
) -> Float[Tensor, "batch count dim"]:
    r"""The last outputs of the convolution, term by term: $T$ multiply-adds each, and per channel.

    Without a recurrence, this is what a step of decoding takes.

    Raises:
        ValueError: As `fft_convolution`.
    """
    _check(u, h)
    length = u.shape[1]
    backwards = h[:length].flip(0)
    return torch.stack(
        [
            (backwards[length - t :] * u[:, :t]).sum(1)  # h_{t-1}, …, h_0
            for t in range(length - count + 1, length + 1)
        ],
        1,
    )


def _check(u: Tensor, h: Tensor) -> None:
    if h.shape[0] < u.shape[1] or h.shape[1] != u.shape[2]:
        raise ValueError(
            f"the filter has shape {tuple(h.shape)}, the inputs {tuple(u.shape)}; a filter needs "
            "the inputs' channels and at least as many steps as they have."
        )


class Sine(nn.Module):
    r"""$\sin(\omega x)$ with a trained frequency per neuron.

    Args:
        neurons: How many.
        frequency: $\omega$ before training.
    """

    def __init__(self, neurons: int, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.full((neurons,), float(frequency)))

    def forward(self, x: Float[Tensor, "*rows neurons"]) -> Float[Tensor, "*rows neurons"]:
        """The sines."""
        return torch.sin(self.frequency * x)


class ImplicitFilter(nn.Module):
    r"""Filters $h$ of all channels, as a network's function of time.

    Args:
        channels: Filters to make.
        length: $L$, the tokens that time 0 to 1 stands for.
        width: Neurons of the network.
        inner_layers: Its hidden layers besides the first one.
        features: Numbers of $\mathrm{pe}(t)$: an odd number from 3.
        frequency: $\omega$ before training.
        slow: Part of the length after which the slowest window is down to 0.01.
        fast: The same of the fastest one.
    """

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        width: int = 64,
        inner_layers: int = 2,
        features: int = 33,
        frequency: float = 1.0,
        slow: float = 1.5,
        fast: float = 0.3,
    ) -> None:
        super().__init__()
        self.channels, self.length, self.features = channels, length, features
        self.slow, self.fast = slow, fast
        widths = [features] + [width] * (inner_layers + 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.sine = Sine(width, frequency)  # one for all layers, as published
        self.output = nn.Linear(width, channels, bias=False)

    def forward(self) -> Float[Tensor, "length channels"]:
        """The filters over their whole length, in the type of the network's weights."""
        weight = self.output.weight
        t = torch.linspace(0, 1, self.length, device=weight.device, dtype=weight.dtype)[:, None]
        with no_autocast(weight):  # a filter reaches over the whole text, and its errors do too
            h = time_features(self.length, self.features).to(weight)
            for layer in self.layers:
                h = self.sine(layer(h))
            h = self.output(h)
        return h * torch.exp(-self.windows().to(weight) * t)  # MLP(pe(t)) · e^(−|δ| t)

    def windows(self) -> Float[Tensor, " channels"]:
        r"""$|\delta_c|$ of each channel, per whole length."""
        slowest, fastest = (-math.log(TARGET) / part for part in (self.slow, self.fast))
        return torch.linspace(slowest, fastest, self.channels)


def time_features(length: int, features: int) -> Float[Tensor, "length features"]:
    r"""$\mathrm{pe}(t)$ at every step: time, then the cosines and the negative sines of all bands.

    Raises:
        ValueError: When `features` is not an odd number from 3.
    """
    if features < 3 or features % 2 == 0:
        raise ValueError(
            f"features is {features}; time and pairs of waves make an odd number from 3."
        )
    bands = (features - 1) // 2
    t = torch.linspace(0, 1, length, dtype=torch.float64)[:, None]
    tau = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] / length
    angle = tau * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    return torch.cat([t, angle.cos(), -angle.sin()], 1)
