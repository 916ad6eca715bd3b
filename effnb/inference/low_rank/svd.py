r"""Truncated SVD: the matrix of rank r that is nearest to the weight.

Among all matrices of rank $r$, $W_r = \sum_{i \le r} \sigma_i u_i v_i^\top$ has the least distance
to $W$ in the Frobenius norm, and

$$\lVert W - W_r \rVert_F^2 = \sum_{i > r} \sigma_i^2 .$$

(Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.) It is the best
one can do knowing the weight alone. The methods beside it scale $W$ first, by something they know
about the inputs or the loss, truncate that, and undo the scaling: `scaled_svd` serves them all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Layers, Model, chooses_layers, share
from effnb.inference.low_rank.factors import (
    Factors,
    check_rank,
    check_setting,
    check_weight,
    choose_layers,
    exact,
    plan,
    put_factors,
)


def scaled_svd(
    weight: Float[Tensor, "*matrix"],
    scale: Float[Tensor, "*scaling"] | None = None,
    rank: int | None = None,
) -> Factors:
    r"""Truncate a scaled weight and undo the scaling: $W \approx U_r \Sigma_r V_r^\top S^{-1}$.

    Here $W S = U \Sigma V^\top$. The result minimises $\lVert (W - \hat W) S \rVert_F$ over all
    $\hat W$ of rank $r$: as $S$ can be inverted, $\hat W S$ runs over all matrices of rank $r$ too.
    The root of each singular value goes into either factor. Computed in float64.

    Args:
        weight: $W$, (out, in).
        scale: $S$: the diagonal of a diagonal matrix, (in,), all above 0; or a lower triangular
            matrix, (in, in); None for no scaling.
        rank: $r$; the full rank by default.

    Raises:
        ValueError: When the weight is no finite matrix, the scale does not fit it or cannot be
            inverted, or the rank is out of range.
    """
    check_weight(weight)
    rank = min(weight.shape) if rank is None else rank
    check_rank(rank, min(weight.shape))
    W = exact(weight)
    S = None
    if scale is not None:
        S = exact(scale).to(W.device)
        columns = W.shape[1]
        if S.shape not in ((columns,), (columns, columns)):
            raise ValueError(
                f"the scale has shape {tuple(S.shape)}; a weight with {columns} inputs takes "
                f"({columns},) or ({columns}, {columns})."
            )
        diagonal = S if S.ndim == 1 else S.diagonal()
        if not bool(torch.isfinite(S).all() & (diagonal > 0).all()):
            raise ValueError("the scale must be finite and above 0, or it cannot be undone.")
    scaled = W if S is None else W * S if S.ndim == 1 else W @ S
    U, sigma, Vh = torch.linalg.svd(scaled, full_matrices=False)
    root = sigma[:rank].sqrt()
    right = root[:, None] * Vh[:rank]
    if S is not None and S.ndim == 1:
        right = right / S
    elif S is not None:  # X S = right
        right = torch.linalg.solve_triangular(S, right, upper=False, left=False)
    return Factors(U[:, :rank] * root, right, sigma)


def truncated_svd(weight: Float[Tensor, "*matrix"], rank: int | None = None) -> Factors:
    r"""$W \approx (U_r \sqrt{\Sigma_r}) (\sqrt{\Sigma_r} V_r^\top)$.

    Args:
        weight: $W$, (out, in).
        rank: $r$; the full rank by default.

    Raises:
        ValueError: When the weight is no finite matrix, or the rank is out of range.
    """
    return scaled_svd(weight, None, rank)


@chooses_layers
@in_linear_form
def decompose(
    model: torch.nn.Module,
    *,
    layers: LayerChoice = "*",
) -> dict[str, Factors]:
    """The full decomposition of each linear layer: made once, truncated at will.

    Its `singular_values` are the spectra; `truncate` makes models of it, without decomposing
    anything again. It is kept in float32 and takes up to twice as much memory as the layers.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        layers: Name patterns of the layers.

    Raises:
        ValueError: See `choose_layers`.
    """
    chosen = choose_layers(model, layers)
    return {name: keep(truncated_svd(layer.weight)) for name, layer in chosen.items()}


def keep(factors: Factors) -> Factors:
    """Factors in float32, for keeping many; the singular values stay exact."""
    return Factors(factors.left.float(), factors.right.float(), factors.singular_values)


@in_linear_form
def truncate(
    model: Model,
    decomposition: Mapping[str, Factors],
    kept: float | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    always: bool = False,
) -> Model:
    """A factorised model from a decomposition that was made before.

    Args:
        model: The model that was decomposed; it is not changed.
        decomposition: What `decompose` gave, or its relatives for other methods.
        kept: See `svd`.
        rank: See `svd`.
        always: See `svd`.

    Raises:
        ValueError: See `svd`.
    """
    layers = choose_layers(model, Layers(list(decomposition), ()))
    ranks = plan(layers, kept, rank, always=always)
    return put_factors(model, {name: decomposition[name].truncated(r) for name, r in ranks.items()})


@chooses_layers
@in_linear_form
def svd(
    model: Model,
    kept: float | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    always: bool = False,
    layers: LayerChoice = "*",
) -> Model:
    r"""Replace linear layers by the two factors of their truncated SVD.

    A layer whose factors would hold as many numbers as itself or more (rank at or above
    $m n / (m + n)$) stays dense, unless `always` is set; `ranks_of` tells which became factors.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        kept: Part of each layer's numbers that its factors may hold, in (0, 1]; 1 changes nothing.
        rank: Instead of `kept`: one rank for all layers, or ranks by layer name (of an
            `Allocation`, say), the others staying dense.
        always: Factorise also where it saves nothing.
        layers: Name patterns of the layers to factorise.

    Returns:
        A new model with `LowRankLinear` layers that shares every other tensor.

    Raises:
        ValueError: Neither or both of kept and rank given or out of range, no fitting layer,
            weights that are not finite, or a model that is quantized or factorised already.
        TypeError: When a rank is not a whole number.
    """
    check_setting(kept, rank)
    chosen = choose_layers(model, layers)
    ranks = plan(chosen, kept, rank, always=always)
    if not ranks:
        return share(model)
    return put_factors(model, {n: truncated_svd(chosen[n].weight, r) for n, r in ranks.items()})
