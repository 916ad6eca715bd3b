r"""ASVD: weigh each input by how large it usually is, then truncate.

An error in a column of the weight counts for as much as the input that it is multiplied with. ASVD
scales the columns by $S = \operatorname{diag}(s_1, \dots, s_n)$ with

$$s_j = \Bigl(\frac1T \sum_t |X_{jt}|\Bigr)^{\alpha}, \qquad
  W \approx U_r \Sigma_r V_r^\top S^{-1} \quad\text{where}\quad W S = U \Sigma V^\top .$$

$\alpha = 0$ is plain SVD; the authors use $\alpha = 0.5$. Inputs are taken one by one: that they
move together is left out, and is what SVD-LLM adds.

Yuan et al., "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language
Models", 2023, arXiv 2312.05821. Their search for a rank per layer is `allocate_by_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.inference.low_rank.calibrated import calibrated, decompose_calibrated
from effnb.inference.low_rank.factors import Factors, exact
from effnb.inference.low_rank.svd import scaled_svd

FLOOR = 1e-6
"""Added to the mean of an input, so that one which is always 0 can be divided by."""


class InputMean:
    r"""Running $\frac1T \sum_t |X_{jt}|$, the mean magnitude of each input over all tokens."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        kind = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self._sum = torch.zeros(features, dtype=kind, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        self._sum += inputs.abs().to(self._sum.dtype).sum(0)
        self.tokens += len(inputs)

    @property
    def value(self) -> Float[Tensor, "in"]:
        """The means so far."""
        return self._sum / max(1, self.tokens)


def asvd_weight(
    weight: Float[Tensor, "*matrix"],
    input_mean: Float[Tensor, "*inputs"],
    rank: int | None = None,
    *,
    alpha: float = 0.5,
) -> Factors:
    r"""Truncate $W \operatorname{diag}(s)$ with $s_j = (\bar x_j + 10^{-6})^\alpha$.

    Args:
        weight: $W$, (out, in).
        input_mean: $\bar x$, the mean magnitude of each input, (in,).
        rank: $r$; the full rank by default.
        alpha: $\alpha$, from 0 (plain SVD) to 1.

    Raises:
        ValueError: When a number is out of range, the shapes do not fit, or an entry is not finite.
    """
    check_alpha(alpha)
    return scaled_svd(weight, (exact(input_mean) + FLOOR) ** alpha, rank)


def check_alpha(alpha: float) -> None:
    """Refuse an exponent outside 0 … 1."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; it must lie between 0 (plain SVD) and 1.")


@chooses_layers
@in_linear_form
def asvd(
    model: Model,
    calibration: CalibrationLike,
    kept: float | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    alpha: float = 0.5,
    always: bool = False,
    sequential: bool = True,
    layers: LayerChoice = "*",
) -> Model:
    r"""Replace the linear layers inside the blocks by factors that respect their inputs' sizes.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or ready keyword arguments per batch.
        kept: Part of each layer's numbers that its factors may hold; see
            `effnb.inference.low_rank.svd`, also on which layers stay dense.
        rank: Instead of `kept`: one rank for all layers, or ranks by layer name.
        alpha: $\alpha$, from 0 (plain SVD) to 1.
        always: Factorise also where it saves nothing.
        sequential: Observe each block behind the factorised ones before it; otherwise in the
            unchanged model.
        layers: Name patterns of the layers to factorise.

    Returns:
        A new model with `LowRankLinear` layers that shares every other tensor.

    Raises:
        ValueError: See `effnb.inference.low_rank.svd`; an alpha outside 0 … 1; calibration data
            that is empty or leads to inputs that are not finite.
        TypeError: When a rank is not a whole number.
    """
    check_alpha(alpha)
    return calibrated(
        model,
        calibration,
        InputMean,
        lambda weight, seen, r: asvd_weight(weight, seen.value, r, alpha=alpha),
        kept=kept,
        rank=rank,
        always=always,
        sequential=sequential,
        layers=layers,
    )


@chooses_layers
@in_linear_form
def decompose_asvd(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    alpha: float = 0.5,
    layers: LayerChoice = "*",
) -> dict[str, Factors]:
    """The full decompositions that `truncate` makes models of, from the unchanged model's inputs.

    Args:
        model: A transformer; it is not changed.
        calibration: See `asvd`.
        alpha: See `asvd`.
        layers: Name patterns.

    Raises:
        ValueError: See `asvd`.
    """
    check_alpha(alpha)
    return decompose_calibrated(
        model,
        calibration,
        InputMean,
        lambda weight, seen, r: asvd_weight(weight, seen.value, r, alpha=alpha),
        layers=layers,
    )
