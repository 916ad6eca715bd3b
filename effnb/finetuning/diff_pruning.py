r"""Diff pruning: learn a sparse difference from the pre-trained parameters, gates and all.

Every entry of the difference has a random gate, $\theta' = \theta + z \odot w$, and the gates are
paid for by how many are expected to be open:

$$\min_{w, \alpha}\ \mathbb{E}_z\, L(\theta + z \odot w) + \lambda \sum_i P(z_i > 0).$$

A gate is a stretched and clipped sigmoid, the *hard concrete* distribution, which is exactly 0 or 1
with positive probability and still has a gradient:

$$z = \min(1, \max(0, s (\zeta - \gamma) + \gamma)), \quad
  s = \sigma\big((\log u - \log(1 - u) + \alpha) / \beta\big), \quad u \sim U(0, 1).$$

Three stages: train $w$ and $\alpha$ with `expected_l0` in the loss; `project` the difference to
exactly the wanted sparsity, by magnitude; train what is left.

Guo, Rush, Kim, "Parameter-Efficient Transfer Learning with Diff Pruning", 2020, arXiv 2012.07463.
The gates: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
2017, arXiv 1712.01312.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_kinds import Delta
from effnb.core.deltas import check_name, exchange_deltas, hosts, merge
from effnb.core.differences import (
    SparseDifference,
    attach_differences,
    fitting_parameters,
    own_parameter,
    with_differences,
    zeros_for,
)
from effnb.core.modules import LayerChoice, Model, chooses_layers

__all__ = [
    "DiffPruning",
    "attach",
    "expected_l0",
    "expected_gate",
    "hard_concrete",
    "merge",
    "open_probability",
    "project",
]

NOISE_FLOOR = 1e-4
"""How far u stays away from 0 and 1, where its logarithms are infinite."""


def hard_concrete(
    alpha: Float[Tensor, "*shape"],
    u: Float[Tensor, "*shape"],
    *,
    gamma: float = -1.5,
    zeta: float = 1.5,
    beta: float = 1.0,
) -> Float[Tensor, "*shape"]:
    """The gate z for a location alpha and noise u, uniform in (0, 1)."""
    # $s = \sigma((\log u - \log(1 - u) + \alpha) / \beta)$
    s = torch.sigmoid((u.log() - (-u).log1p() + alpha) / beta)
    # $z = \min(1, \max(0, s (\zeta - \gamma) + \gamma))$
    return (s * (zeta - gamma) + gamma).clamp(0, 1)


def expected_gate(
    alpha: Float[Tensor, "*shape"], *, gamma: float = -1.5, zeta: float = 1.5
) -> Float[Tensor, "*shape"]:
    r"""The gate without noise, $\min(1, \max(0, \sigma(\alpha) (\zeta - \gamma) + \gamma))$."""
    return (torch.sigmoid(alpha) * (zeta - gamma) + gamma).clamp(0, 1)


def open_probability(
    alpha: Float[Tensor, "*shape"],
    *,
    gamma: float = -1.5,
    zeta: float = 1.5,
    beta: float = 1.0,
) -> Float[Tensor, "*shape"]:
    r"""$P(z > 0) = \sigma(\alpha - \beta \log(-\gamma / \zeta))$, which has a gradient."""
    return torch.sigmoid(alpha - beta * math.log(-gamma / zeta))


class _Gated(nn.Module):
    """One parameter's difference w, the locations of its gates, and that of their common gate."""

    w: Float[Tensor, "*shape"]
    alpha: Float[Tensor, "*shape"]

    def __init__(self, parameter: Tensor, alpha: float, structured: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(zeros_for(parameter))
        self.alpha = nn.Parameter(torch.full_like(self.w, alpha))
        if structured:
            self.group_alpha = nn.Parameter(torch.full_like(self.w[..., :0].sum(), alpha))


class DiffPruning(Delta):
    r"""The gated difference $z \odot w$ of one module's parameters.

    In training mode the gates are drawn in each forward pass; in evaluation mode they are
    those without noise.
    """

    kind = "diff-pruning"
    additive = True

    def __init__(
        self,
        base: nn.Module,
        leaves: list[str],
        *,
        alpha: float = 5.0,
        structured: bool = True,
        gamma: float = -1.5,
        zeta: float = 1.5,
        beta: float = 1.0,
    ) -> None:
        """Make gates for the named parameters of a module; see `attach` for the numbers.

        Raises:
            ValueError: When a number is out of range, or the module has no such parameter.
        """
        super().__init__()
        check_gates(alpha, gamma, zeta, beta)
        self.alpha, self.structured = alpha, structured
        self.gamma, self.zeta, self.beta = gamma, zeta, beta
        self.gated = nn.ModuleDict(
            {leaf: _Gated(own_parameter(base, leaf), alpha, structured) for leaf in leaves}
        )

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The output itself: what changes is the module before it runs."""
        return output

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""$z \odot w$, with $z = z_i z_g$ where gates are structured."""
        return {leaf: self._gate(part) * part.w for leaf, part in self.gated.items()}

    def _gate(self, part: _Gated) -> Tensor:
        alphas = [part.alpha, *([part.group_alpha] if self.structured else [])]
        result: Tensor | float = 1.0
        for alpha in alphas:
            if self.training:
                u = torch.rand_like(alpha).clamp(NOISE_FLOOR, 1 - NOISE_FLOOR)
                z = hard_concrete(alpha, u, gamma=self.gamma, zeta=self.zeta, beta=self.beta)
            else:
                z = expected_gate(alpha, gamma=self.gamma, zeta=self.zeta)
            result = z * result
        return result

    def expected_l0(self) -> Float[Tensor, ""]:
        r"""$\sum_i P(z_i > 0)$; with a common gate $\sum_i P(z_i > 0)\, P(z_g > 0)$."""
        numbers = {"gamma": self.gamma, "zeta": self.zeta, "beta": self.beta}
        total = torch.zeros(())
        for part in self.gated.values():
            count = open_probability(part.alpha, **numbers).sum()
            if self.structured:
                count = count * open_probability(part.group_alpha, **numbers)
            total = total.to(count) + count
        return total

    def merged(self, base: nn.Module) -> nn.Module:
        """The module with the difference added, its gates without noise."""
        was = self.training
        with torch.no_grad():
            try:
                return with_differences(base, self.eval().differences(base))
            finally:
                self.train(was)

    def settings(self) -> dict[str, Any]:
        """The numbers of the gates."""
        return {
            "alpha": self.alpha,
            "structured": self.structured,
            "gamma": self.gamma,
            "zeta": self.zeta,
            "beta": self.beta,
        }

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> DiffPruning:
        """Make the gates that a file's tensors fit into."""
        leaves = [key.split(".")[1] for key in tensors if key.endswith(".w")]
        if not leaves:
            raise ValueError(f"diff pruning has differences w; found {', '.join(tensors)}.")
        return cls(base, leaves, **settings)


def check_gates(alpha: float, gamma: float, zeta: float, beta: float) -> None:
    """Refuse numbers under which the gates would be no gates.

    Raises:
        ValueError: The sentence names the number.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha is {alpha}; it must be a finite number.")
    if not (gamma < 0 and math.isfinite(gamma)):
        raise ValueError(f"gamma is {gamma}; it must be below 0, or no gate would ever be closed.")
    if not (zeta > 1 and math.isfinite(zeta)):
        raise ValueError(f"zeta is {zeta}; it must be above 1, or no gate would ever be open.")
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"beta is {beta}; it must be above 0.")


@chooses_layers
def attach(
    model: Model,
    name: str = "default",
    *,
    alpha: float = 5.0,
    structured: bool = True,
    gamma: float = -1.5,
    zeta: float = 1.5,
    beta: float = 1.0,
    layers: LayerChoice = "*",
) -> Model:
    r"""Freeze a model and train gated differences of its parameters.

    The function is unchanged, bit for bit, until they are trained. Training holds two numbers per
    parameter and their gradients, more than full fine-tuning: what is small is the result.

    Args:
        model: Any model; it is not changed.
        name: What to call this delta.
        alpha: Location of all gates at the start; at 5 nearly all are open.
        structured: Whether all entries of a parameter have a gate in common besides their own.
        gamma: Lower end of the stretched interval, below 0.
        zeta: Upper end, above 1. The defaults are those of the authors' code; -0.1, 1.1 and beta =
            2/3 are those of the paper on L0 regularization.
        beta: Temperature.
        layers: Name patterns of the modules; output heads are left out by default.

    Returns:
        A new model on the same frozen tensors; only differences and gates require gradients.

    Raises:
        ValueError: A number out of range, no fitting module, a parameter that is tied to one
            elsewhere, or a name that is taken.
    """
    check_gates(alpha, gamma, zeta, beta)
    check_name(model, name)
    chosen = fitting_parameters(model, layers)
    numbers = {"alpha": alpha, "structured": structured, "gamma": gamma, "zeta": zeta, "beta": beta}
    return attach_differences(
        model, name, chosen, lambda base, leaves: DiffPruning(base, leaves, **numbers)
    )


def _deltas(model: nn.Module, name: str) -> dict[str, DiffPruning]:
    found = {path: host.deltas[name] for path, host in hosts(model, name).items()}
    for delta in found.values():
        if not isinstance(delta, DiffPruning):
            raise ValueError(f"the delta {name!r} is of kind {delta.kind!r}, which has no gates.")
    return found


def expected_l0(model: nn.Module, name: str = "default") -> Float[Tensor, ""]:
    r"""The expected number of entries that a difference changes, to be added to the loss.

    Its weight $\lambda$ must shrink as the model grows, since the loss is a mean over words and
    this a sum over parameters.

    Raises:
        ValueError: When no delta of that name is attached, or it has no gates.
    """
    counts = [delta.expected_l0() for delta in _deltas(model, name).values()]
    return torch.stack([count.to(counts[0].device) for count in counts]).sum()


def project(model: Model, name: str = "default", *, sparsity: float) -> Model:
    r"""Keep the largest entries of the difference, exactly as many as wanted, and drop the gates.

    What is kept, over all parameters together, are the $(1 - \text{sparsity})\, n$ entries of
    largest $|\delta_i|$, $\delta = z \odot w$ without noise. The delta is then a
    `SparseDifference`: its places are fixed, its values can be trained further, and its file holds
    nothing else.

    Args:
        model: A model with a delta of this kind; it is not changed.
        name: The delta.
        sparsity: Share of the covered parameters that stay as they were, in [0, 1); 0.995 in the
            paper.

    Raises:
        ValueError: When the sparsity is out of range or keeps nothing, or the delta is unknown or
            has no gates.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must lie in [0, 1).")
    sources = _deltas(model, name)
    found: dict[tuple[str, str], Tensor] = {}
    with torch.no_grad():
        for path, delta in sources.items():
            for leaf, part in delta.gated.items():
                z = expected_gate(part.alpha, gamma=delta.gamma, zeta=delta.zeta)
                if delta.structured:
                    z = z * expected_gate(part.group_alpha, gamma=delta.gamma, zeta=delta.zeta)
                found[path, leaf] = z * part.w
    sizes = [d.numel() for d in found.values()]
    kept = round((1 - sparsity) * sum(sizes))
    if kept == 0:
        raise ValueError(f"sparsity {sparsity} keeps none of {sum(sizes):,} entries.")
    magnitudes = torch.cat([d.abs().flatten().cpu() for d in found.values()])
    # $\delta_i$ stays where $|\delta_i|$ is among the largest; the first of equal ones.
    chosen = torch.zeros(len(magnitudes), dtype=torch.bool)
    chosen[magnitudes.argsort(descending=True, stable=True)[:kept]] = True
    parts: dict[str, dict[str, tuple[Tensor, Tensor]]] = {path: {} for path in sources}
    for ((path, leaf), difference), mask in zip(found.items(), chosen.split(sizes)):
        places = mask.nonzero().flatten().to(difference.device)
        parts[path][leaf] = (difference.flatten()[places], places)
    return exchange_deltas(
        model, name, {path: SparseDifference(found) for path, found in parts.items()}
    )
