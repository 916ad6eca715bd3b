r"""Intrinsic dimension: train a whole model through a handful of numbers.

All parameters together move inside a random subspace,

$$\theta^D = \theta_0^D + P\, v, \qquad v \in \mathbb{R}^d,\ P \in \mathbb{R}^{D \times d},$$

with $v$ starting at 0 and $P$ fixed. The smallest $d$ at which the result reaches 90 % of full
fine-tuning is the task's *intrinsic dimension*, $d_{90}$. A projection is a seed; the $d$ numbers
are all that a file holds.

$P$ is either a dense Gaussian matrix, for small models, or Fastfood, which takes
$O(D \log D)$ operations and $O(D)$ memory for each product:

$$P\, v = \tfrac{1}{c} \big[ H\, G\, \Pi\, H\, B\, v \big]_{1..D}, \qquad
  c = \sqrt{D \textstyle\sum_i G_i^2}.$$

$B$ is a diagonal of random signs, $\Pi$ a permutation, $G$ a Gaussian diagonal, $H$ the
Walsh-Hadamard matrix of ±1; $c$ makes $\mathbb{E} \lVert P v \rVert^2 = \lVert v \rVert^2$. Each
parameter tensor has rows of $P$ of its own, made from the same seed.

Li, Farkhoor, Liu, Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", 2018,
arXiv 1804.08838. Aghajanyan, Zettlemoyer, Gupta, "Intrinsic Dimensionality Explains the
Effectiveness of Language Model Fine-Tuning", 2020, arXiv 2012.13255.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    check_name,
    merge,
    modules_by_name,
    refuse_rounded_inputs,
)
from effnb.core.differences import (
    check_owners,
    fitting_parameters,
    own_parameter,
    with_differences,
)
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.inference.quantization.hadamard import hadamard_transform

__all__ = [
    "DenseProjection",
    "Fastfood",
    "IntrinsicDimension",
    "attach",
    "merge",
    "smallest_dimension",
]

PROJECTIONS = ("fastfood", "dense")
DENSE_LIMIT = 2**28
"""Entries that a dense projection may have: 1 GiB in float32."""


class Fastfood(nn.Module):
    r"""The product $P v$ without the matrix, for rows of one parameter tensor.

    Attributes:
        signs: (n,), the diagonal B.
        order: (n,), the permutation $\Pi$.
        gauss: (n,), the diagonal G.
    """

    signs: Float[Tensor, " n"]
    order: Int[Tensor, " n"]
    gauss: Float[Tensor, " n"]

    def __init__(self, size: int, dimension: int, *, seed: int, total: int | None = None) -> None:
        r"""Draw B, $\Pi$ and G.

        Args:
            size: Rows of P.
            dimension: d, its columns.
            seed: Seed of all that is random.
            total: D, rows of all projections together; `size` when None. $\lVert v \rVert$ is kept
                by all together.
        """
        super().__init__()
        self.size, self.dimension, self.total = size, dimension, total or size
        n = 1 << (max(size, dimension) - 1).bit_length()  # $2^{\lceil \log_2 n \rceil}$
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
        self.register_buffer("signs", signs, persistent=False)
        order = torch.randperm(n, generator=generator)
        self.register_buffer("order", order, persistent=False)
        gauss = torch.randn(n, generator=generator, dtype=torch.float64)
        self.register_buffer("gauss", gauss, persistent=False)

    def forward(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch size"]:
        """P v."""
        n = len(self.signs)
        padded = nn.functional.pad(v, (0, n - self.dimension))
        # $\Pi\, H\, B\, v$; the transform is orthonormal, $H / \sqrt n$
        mixed = hadamard_transform(padded * self.signs.to(v.dtype))[..., self.order]
        # $[H\, G\, \Pi\, H\, B\, v]_{1..D}$
        rows = hadamard_transform(mixed * self.gauss.to(v.dtype))[..., : self.size]
        # $1 / c$, $c = \sqrt{D \sum_i G_i^2}$; two transforms owe a factor of n
        return rows * (n / math.sqrt(self.total * float(self.gauss.square().sum())))


class DenseProjection(nn.Module):
    """A Gaussian matrix whose columns have norm 1, over all parameter tensors together.

    Attributes:
        matrix: (size, d), the rows of one parameter tensor.
    """

    matrix: Float[Tensor, "size d"]

    def __init__(self, size: int, dimension: int, *, seed: int, total: int | None = None) -> None:
        """Draw the matrix; the arguments are those of `Fastfood`."""
        super().__init__()
        self.size, self.dimension, self.total = size, dimension, total or size
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(size, dimension, generator=generator, dtype=torch.float64)
        matrix *= math.sqrt(size / self.total) / matrix.norm(dim=0)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, v: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch size"]:
        """P v."""
        return v @ self.matrix.to(v.dtype).T


class IntrinsicDimension(Delta):
    r"""The rows $P_i v$ of one module's parameters; the first module of a delta holds v for all.

    Attributes:
        v: (d,), 0 at the start; in the first module only.
        scales: One number for each parameter tensor, 1 at the start, where there are any.
    """

    kind = "intrinsic-dimension"
    additive = True

    def __init__(
        self,
        base: nn.Module,
        projections: Mapping[str, nn.Module],
        about: dict[str, Any],
        holder: IntrinsicDimension | None,
    ) -> None:
        """Take the projections of a module's parameters, by name.

        Args:
            base: The module.
            projections: Made by `_make`.
            about: What a file says; the same in all modules of one delta.
            holder: The delta that holds v, None for the first.
        """
        super().__init__()
        first = own_parameter(base, next(iter(projections)))
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.projections = nn.ModuleDict(projections).to(first.device, dtype)
        self.about = about
        if about["scales"]:
            self.scales = nn.Parameter(torch.ones(len(projections)).to(first.device, dtype))
        if holder is None:
            n = about["dimension"] - (len(about["parameters"]) if about["scales"] else 0)
            self.v = nn.Parameter(torch.zeros(n).to(first.device, dtype))
        # Not a submodule: v is counted, saved and trained once.
        self.__dict__["_holder"] = [] if holder is None else [holder]

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The output itself: what changes is the module before it runs."""
        return output

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""$\lambda_i\, P_i v$ in the parameters' shapes."""
        v = (self._holder or [self])[0].v
        found = {}
        for i, (leaf, projection) in enumerate(self.projections.items()):
            like = own_parameter(base, leaf)
            # $\theta_i - \theta_{0,i} = P_i\, v$
            rows = projection(v.to(like.device)).view(like.shape)
            found[leaf] = self.scales[i] * rows if self.about["scales"] else rows
        return found

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The module with the parameters $\theta_0 + P v$."""
        with torch.no_grad():
            return with_differences(base, self.differences(base))

    def settings(self) -> dict[str, Any]:
        """The projection, and which parameters of which shapes it moves."""
        return self.about

    @classmethod
    def rebuild_all(
        cls,
        modules: Mapping[str, nn.Module],
        settings: dict[str, Any],
        layers: Mapping[str, dict[str, Tensor]],
    ) -> dict[str, Delta]:
        """Make the projections of every parameter that a file names."""
        fields = {"dimension", "projection", "scales", "seed", "parameters"}
        if set(settings) != fields:
            raise TypeError
        for path, leaf, shape in settings["parameters"]:
            if path not in modules:
                raise ValueError(f"the delta moves {path}.{leaf}, but the model has no {path}.")
            found = list(own_parameter(modules[path], leaf).shape)
            if found != list(shape):
                raise ValueError(
                    f"the delta moves {path}.{leaf} of shape {tuple(shape)}; the model's has "
                    f"{tuple(found)}."
                )
        return _make(modules, settings)


def _make(modules: Mapping[str, nn.Module], about: dict[str, Any]) -> dict[str, Delta]:
    """The deltas of all modules that `about["parameters"]` names, with one v between them."""
    sizes = [math.prod(shape) for _, _, shape in about["parameters"]]
    tensors = len(sizes) if about["scales"] else 0
    kind = Fastfood if about["projection"] == "fastfood" else DenseProjection
    seeds = torch.Generator().manual_seed(about["seed"])
    drawn = torch.randint(2**31, (len(sizes),), generator=seeds).tolist()
    projections: dict[str, dict[str, nn.Module]] = {}
    for (path, leaf, _), size, seed in zip(about["parameters"], sizes, drawn):
        projections.setdefault(path, {})[leaf] = kind(
            size, about["dimension"] - tensors, seed=seed, total=sum(sizes)
        )
    result: dict[str, Delta] = {}
    holder: IntrinsicDimension | None = None
    for path, own in projections.items():
        result[path] = IntrinsicDimension(modules[path], own, about, holder)
        holder = holder or result[path]
    return result


@chooses_layers
def attach(
    model: Model,
    name: str = "default",
    *,
    dimension: int = 200,
    projection: str = "fastfood",
    scales: bool = False,
    layers: LayerChoice = "*",
    seed: int = 0,
) -> Model:
    r"""Freeze a model and train all its parameters through d numbers.

    The function is unchanged, bit for bit, until they are trained. Learning rates are large, around
    0.1 with Adam at small d. A new classifier starts at 0 and is trained as well, by
    `set_trainable`: in a subspace, an unrelated trained one is a bad start.

    Args:
        model: Any model; it is not changed.
        name: What to call this delta.
        dimension: d, all trained numbers together.
        projection: "fastfood" or "dense".
        scales: Spend one of the d numbers on a factor $\lambda_i$ for each parameter tensor, the
            structure-aware form of the second paper.
        layers: Name patterns of the modules whose parameters move; output heads, and what is tied
            to them, are left out by default.
        seed: Seed of the projection.

    Returns:
        A new model on the same frozen tensors; only the d numbers require gradients.

    Raises:
        ValueError: A dimension out of range, an unknown projection or a dense one of more than
            2^28 entries, no fitting module, a tied parameter, or a name that is taken.
        TypeError: When the dimension is not a whole number.
    """
    if isinstance(dimension, bool) or not isinstance(dimension, int):
        raise TypeError(f"dimension is {dimension!r}; it must be a whole number.")
    if projection not in PROJECTIONS:
        raise ValueError(
            f"projection is {projection!r}; it must be one of {', '.join(PROJECTIONS)}."
        )
    check_name(model, name)
    refuse_rounded_inputs(model)
    chosen = fitting_parameters(model, layers)
    check_owners(model, chosen)
    parameters = [
        [path, leaf, list(p.shape)] for path, own in chosen.items() for leaf, p in own.items()
    ]
    total = sum(math.prod(shape) for _, _, shape in parameters)
    least = len(parameters) + 1 if scales else 1
    if not least <= dimension <= total:
        raise ValueError(
            f"dimension is {dimension}; for {len(parameters)} tensors of {total:,} parameters it "
            f"must lie in {least} to {total:,}."
        )
    if projection == "dense" and dimension * total > DENSE_LIMIT:
        raise ValueError(
            f"a dense projection of {total:,} by {dimension} has more than 2^28 entries; use "
            "projection='fastfood'."
        )
    about = {
        "dimension": dimension,
        "projection": projection,
        "scales": scales,
        "seed": seed,
        "parameters": parameters,
    }
    modules = {
        p: m.base if isinstance(m, WithDeltas) else m for p, m in modules_by_name(model).items()
    }
    return attach_deltas(model, name, _make(modules, about))


def smallest_dimension(scores: Mapping[int, float], full: float, share: float = 0.9) -> int | None:
    r"""$d_{90}$: the smallest dimension whose score reaches a share of full fine-tuning's.

    Args:
        scores: From dimensions to scores, of which more is better.
        full: The score of full fine-tuning, above 0.
        share: The share, in (0, 1].

    Returns:
        The dimension, None when no score reaches it.

    Raises:
        ValueError: When there are no scores, or a number is out of range.
    """
    if not scores or not full > 0 or not 0 < share <= 1:
        raise ValueError(
            f"scores must not be empty, full ({full}) must be above 0, and share ({share}) must "
            "lie in (0, 1]."
        )
    reached = [d for d, score in scores.items() if score >= share * full]
    return min(reached, default=None)
