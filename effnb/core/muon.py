r"""Muon: momentum, orthogonalized, for the weight matrices inside a network.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024
(kellerjordan.github.io/posts/muon); shown to scale by Liu et al., "Muon is Scalable for LLM
Training", 2025, arXiv 2502.16982. A matrix of gradients is usually dominated by a few directions.
Muon replaces the momentum $M = U S V^\top$ by something close to $U V^\top$, so that every
direction moves by about the same amount. Embeddings, output heads, gains and biases are not maps
from one hidden space to another and stay with AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients $a, b, c$ of the quintic, chosen for the steepest slope at 0."""


def orthogonalize(
    matrix: Float[Tensor, "out in"], steps: int = 5, dtype: torch.dtype | None = None
) -> Float[Tensor, "out in"]:
    r"""Move all singular values of a matrix near 1, by a Newton-Schulz iteration.

    $X_0 = G / \lVert G \rVert_F$, then $X \leftarrow a X + (b A + c A^2) X$ with $A = X X^\top$:
    each singular value $s$ becomes $a s + b s^3 + c s^5$. The coefficients do not converge to 1:
    after five steps the singular values lie between about 0.7 and 1.2, which trains as well.

    Args:
        matrix: Any matrix; the shorter side is iterated on.
        steps: Number of iterations.
        dtype: Type of the products; float32 where None, since few CPUs are fast in bfloat16.

    Raises:
        ValueError: When the tensor is not a matrix, or `steps` is below 1.
    """
    if matrix.ndim != 2:
        raise ValueError(f"a tensor of {matrix.ndim} dimensions cannot be orthogonalized; give 2.")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1.")
    a, b, c = NEWTON_SCHULZ
    X = matrix.to(dtype or torch.float32)
    tall = X.shape[0] > X.shape[1]
    if tall:
        X = X.T
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.T
        X = torch.addmm(X, torch.addmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cA²)X
    return (X.T if tall else X).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    r"""Muon over weight matrices.

    With gradient $G$, momentum $\mu$, rate $\eta$ and decay $\lambda$, each step does
    $M \leftarrow \mu M + (1 - \mu) G$, then
    $W \leftarrow (1 - \eta \lambda) W - \eta \sqrt{\max(1, m / n)}\; \mathrm{orthogonalize}(
    (1 - \mu) G + \mu M)$ for a weight of shape $m \times n$. Orthogonalization forgets the scale of
    the gradient, so clipping it changes nothing but the weight of single steps in the momentum.

    Args:
        parameters: Matrices, all of two dimensions.
        lr: Learning rate; 0.02 is usual, ten times AdamW's.
        momentum: $\mu$.
        weight_decay: $\lambda$, decoupled.
        steps: Iterations of Newton-Schulz.
        dtype: Type of those iterations; float32 where None.

    Raises:
        ValueError: When a parameter is not a matrix, or a number lies outside its range.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr is {lr}; it must be above 0.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must lie in [0, 1).")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0.")
        defaults = dict(
            lr=lr, momentum=momentum, weight_decay=weight_decay, steps=steps, dtype=dtype
        )
        super().__init__(parameters, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Muon takes matrices; a parameter has the shape {tuple(parameter.shape)}. "
                        "Give the others to AdamW."
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """One step for every matrix that has a gradient; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, mu = group["lr"], group["momentum"]
            for W in group["params"]:
                if W.grad is None:
                    continue
                state = self.state[W]
                if not state:
                    state["momentum"] = torch.zeros_like(W)
                M = state["momentum"]
                M.lerp_(W.grad, 1 - mu)  # M ← μM + (1 − μ)G
                ahead = W.grad.lerp(M, mu)  # (1 − μ)G + μM, Nesterov's look ahead
                update = orthogonalize(ahead, group["steps"], group["dtype"])
                W.mul_(1 - rate * group["weight_decay"])
                W.add_(update, alpha=-rate * math.sqrt(max(1.0, W.shape[0] / W.shape[1])))
        return loss


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that Muon is for: weights of linear layers that are not the output head.

    A head is known by what it is: the model's `get_output_embeddings()`, or a layer whose weight
    an embedding uses as well.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None:
        embedded.add(id(head.weight))
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return [w for i, w in weights.items() if i not in embedded and w.requires_grad]
