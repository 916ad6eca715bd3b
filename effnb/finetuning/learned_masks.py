r"""Learned masks: keep every weight as it is, and learn which of them to switch off.

Each frozen weight gets a score, and the score decides about it:

$$\hat W = W \odot M, \qquad M = \mathbf{1}[m > \tau].$$

A threshold has no gradient, so the backward pass goes straight through it: the score receives what
the mask would, $\partial L / \partial m := \partial L / \partial M = (\partial L / \partial \hat W)
\odot W$. What a task then stores is one bit per weight.

Zhao, Lin, Mi, Jaggi, Schütze, "Masking as an Efficient Alternative to Finetuning for Pretrained
Language Models", 2020, arXiv 2004.12406.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    check_name,
    exchange_deltas,
    hosts,
    linear_layers,
    merge,
    refuse_rounded_inputs,
)
from effnb.core.differences import own_parameter, with_differences, zeros_for
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers

__all__ = ["BinaryMask", "LearnedMask", "attach", "harden", "masks_of", "merge", "threshold"]


class _Threshold(torch.autograd.Function):
    """1 where a score is above the threshold, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, tau: float) -> Tensor:
        # $M = \mathbf{1}[m > \tau]$
        return (scores > tau).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # $\partial L / \partial m := \partial L / \partial M$
        return gradient, None


def threshold(scores: Float[Tensor, "*shape"], tau: float) -> Float[Tensor, "*shape"]:
    r"""$M = \mathbf{1}[m > \tau]$, straight-through in the backward pass."""
    return _Threshold.apply(scores, tau)


class _Mask(Delta):
    """What a mask of a linear layer's weight does, however it is held."""

    reads_base = True
    additive = True
    alone = "mask"
    on_linears = True

    def mask(self, weight: Tensor) -> Tensor:
        """The mask, of ones and zeros, in the shape of the weight."""
        raise NotImplementedError

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The output itself: what changes is the module before it runs."""
        return output

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""$\Delta W = W \odot M - W = W \odot (M - 1)$."""
        weight = own_parameter(base, "weight")
        mask = self.mask(weight)
        # $\hat W = W \odot M$, as a difference: exactly 0 where a weight is kept, and -W elsewhere
        return {"weight": weight.to(mask.dtype) * (mask - 1)}

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The layer with the weight $W \odot M$."""
        with torch.no_grad():
            return with_differences(base, self.differences(base))


class LearnedMask(_Mask):
    """A score for each weight of a linear layer.

    Attributes:
        scores: (out, in), m.
        tau: The threshold.
    """

    kind = "learned-mask"
    scores: Float[Tensor, "out in"]

    def __init__(
        self,
        base: nn.Module,
        *,
        tau: float = 0.01,
        sparsity: float = 0.0,
        initial: str = "magnitude",
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the scores of a layer; see `attach` for what the numbers mean.

        Raises:
            ValueError: When one of them is out of range, or the layer has no weight of its own.
        """
        super().__init__()
        check_settings(tau, sparsity, initial)
        weight = own_parameter(base, "weight")
        self.tau = tau
        scores = torch.full_like(zeros_for(weight), 2 * tau).flatten()
        removed = round(sparsity * weight.numel())
        if initial == "magnitude":
            order = weight.detach().abs().flatten().argsort(stable=True)
        else:  # drawn on the CPU: the same on every device
            order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
        scores[order[:removed]] = 0.0
        self.scores = nn.Parameter(scores.view_as(weight))

    def mask(self, weight: Tensor) -> Tensor:
        r"""$\mathbf{1}[m > \tau]$."""
        return threshold(self.scores, self.tau)

    def settings(self) -> dict[str, Any]:
        """The threshold."""
        return {"tau": self.tau}

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> LearnedMask:
        """Make the scores that a file's tensor fits into."""
        if set(tensors) != {"scores"}:
            raise ValueError(f"a learned mask has scores; found {', '.join(tensors)}.")
        return cls(base, **settings)


class BinaryMask(_Mask):
    """A mask that has been learned: one bit for each weight, and nothing to train.

    Attributes:
        bits: Eight weights a byte, the first one in the lowest bit.
    """

    kind = "binary-mask"
    bits: UInt8[Tensor, " bytes"]

    def __init__(self, bits: UInt8[Tensor, " bytes"]) -> None:
        """Take packed bits."""
        super().__init__()
        self.register_buffer("bits", bits)

    def mask(self, weight: Tensor) -> Tensor:
        """The bits, unpacked."""
        powers = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flat = ((self.bits[:, None] >> powers) & 1).flatten()[: weight.numel()]
        return flat.view(weight.shape).to(zeros_for(weight[:0]).dtype)

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> BinaryMask:
        """Make a mask that a file's bits fit into."""
        size = -(-own_parameter(base, "weight").numel() // 8)
        if set(tensors) != {"bits"} or tensors["bits"].dtype != torch.uint8:
            raise ValueError(f"a binary mask has bits; found {', '.join(tensors)}.")
        return cls(torch.zeros(size, dtype=torch.uint8, device=base.weight.device), **settings)


def packed(mask: Bool[Tensor, "*shape"]) -> UInt8[Tensor, " bytes"]:
    """Eight entries a byte, the first one in the lowest bit; the last byte is filled with 0."""
    flat = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    powers = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat.view(-1, 8) << powers).sum(1, dtype=torch.uint8)


def check_settings(tau: float, sparsity: float, initial: str) -> None:
    """Refuse numbers that no layer could take.

    Raises:
        ValueError: The sentence names the number.
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau is {tau}; it must be above 0.")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must lie in [0, 1).")
    if initial not in ("magnitude", "random"):
        raise ValueError(f'initial is {initial!r}; it must be "magnitude" or "random".')


@chooses_layers
@in_linear_form
def attach(
    model: Model,
    name: str = "default",
    *,
    tau: float = 0.01,
    sparsity: float = 0.0,
    initial: str = "magnitude",
    layers: LayerChoice = "*",
    seed: int = 0,
) -> Model:
    r"""Freeze a model and learn which of its linear layers' weights to switch off.

    With a sparsity of 0 the function is unchanged, bit for bit, until scores cross the threshold:
    kept weights start with the score $2 \tau$, so a learning rate far below $\tau$ changes nothing
    for many steps. Masks of several names are alternatives, one of which is active at a time.

    Args:
        model: Any module with linear layers; it is not changed.
        name: What to call this delta.
        tau: The threshold.
        sparsity: Share of each layer's weights that start switched off, with the score 0.
        initial: Which those are: "magnitude", the smallest, or "random".
        layers: Name patterns of the layers; output heads are left out by default.
        seed: Seed of the random start.

    Returns:
        A new model on the same frozen tensors; only the scores require gradients.

    Raises:
        ValueError: A number out of range, no fitting layer, a quantized layer, a layer under
            another active mask, or a name that is taken.
    """
    check_settings(tau, sparsity, initial)
    check_name(model, name)
    refuse_rounded_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for path, layer in linear_layers(model, layers).items():
        base = layer.base if isinstance(layer, WithDeltas) else layer
        if not isinstance(base, nn.Linear) and hasattr(base, "dequantized"):
            raise ValueError(
                f"{path} is stored quantized, and a mask needs weights of full size; mask the "
                "model first and quantize it after the merge."
            )
        try:
            deltas[path] = LearnedMask(
                base, tau=tau, sparsity=sparsity, initial=initial, generator=generator
            )
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
    return attach_deltas(model, name, deltas)


def masks_of(model: nn.Module, name: str = "default") -> dict[str, Bool[Tensor, "out in"]]:
    """The masks as they are now, True where a weight is kept, by the names of the layers.

    Raises:
        ValueError: When no delta of that name is attached, or it is no mask.
    """
    found = {}
    for path, host in hosts(model, name).items():
        delta = host.deltas[name]
        if not isinstance(delta, _Mask):
            raise ValueError(f"the delta {name!r} is of kind {delta.kind!r}, not a mask.")
        found[path] = delta.mask(host.base.weight).detach().bool()
    return found


def harden(model: Model, name: str = "default") -> Model:
    """Replace the scores of a mask by one bit for each weight, which is what a file needs to hold.

    Raises:
        ValueError: When no delta of that name is attached, or it is no mask.
    """
    return exchange_deltas(
        model,
        name,
        {path: BinaryMask(packed(mask)) for path, mask in masks_of(model, name).items()},
    )
