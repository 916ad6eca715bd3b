"""Running statistics of a layer's inputs, one batch after another."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Observer(Protocol):
    """Something that gathers a statistic of a layer's inputs."""

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch, tokens in rows."""


class Hessian:
    r"""Running $H = \frac{2}{N} \sum_x x x^\top$ of a layer's inputs, N the number of tokens.

    It is the Hessian of the layer-wise squared output error $\frac1N \lVert \Delta W X \rVert_F^2$
    with respect to each row of the weight (Frantar et al., 2022, arXiv 2210.17323). Accumulated in
    float32 at least, whatever the model computes in.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        self._upper = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        if not len(inputs):
            return
        x = inputs.to(self._upper.dtype)
        total = self.tokens + len(x)
        self._upper.mul_(self.tokens / total)
        # H is symmetric: panels from the diagonal to the right edge are little over half the work.
        features = len(self._upper)
        width = max(64, -(-features // 4))
        for start in range(0, features, width):
            panel = x[:, start : start + width]
            self._upper[start : start + width, start:].addmm_(
                panel.T, x[:, start:], alpha=2 / total
            )
        self.tokens = total

    @property
    def value(self) -> Float[Tensor, "in in"]:
        """$H$ so far, both triangles."""
        return self._upper.triu() + self._upper.triu(1).T


class InputNorm:
    r"""Running $\lVert X_j \rVert_2$, the norm of each input feature over all tokens."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        self._squares += inputs.double().square().sum(0)
        self.tokens += len(inputs)

    @property
    def value(self) -> Float[Tensor, "in"]:
        """The norms so far."""
        return self._squares.sqrt().float()


class InputSample:
    """The inputs themselves, at most `tokens` of them (for small layers and for tests)."""

    def __init__(self, tokens: int = 4096) -> None:
        """Keep the first `tokens` inputs."""
        self.limit = tokens
        self._parts: list[Tensor] = []
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch, up to the limit."""
        part = inputs[: self.limit - self.tokens]
        if len(part):
            self._parts.append(part.clone())
            self.tokens += len(part)

    @property
    def value(self) -> Float[Tensor, "tokens in"]:
        """The inputs so far."""
        return torch.cat(self._parts)
