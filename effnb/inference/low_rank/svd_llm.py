r"""SVD-LLM: whiten the inputs, truncate, and know the damage before anything is run.

Let $X \in \mathbb{R}^{n \times T}$ hold the inputs of a layer in its columns, and let
$G = X X^\top = L L^\top$ with $L$ lower triangular (Cholesky). The inputs $L^{-1} X$ are *white*:
their Gram matrix is the identity. The error that a change of the weight makes in the outputs is

$$\lVert (W - \hat W) X \rVert_F^2 = \operatorname{tr}\bigl((W - \hat W)\, G\, (W - \hat W)^\top
  \bigr) = \lVert (W - \hat W) L \rVert_F^2 ,$$

a plain Frobenius norm of $W L$ against $\hat W L$. Truncating $W L = U \Sigma V^\top$ is therefore
the best that any matrix of rank $r$ can do on these inputs, with

$$\hat W = U_r \Sigma_r V_r^\top L^{-1}, \qquad
  \lVert (W - \hat W) X \rVert_F^2 = \sum_{i > r} \sigma_i^2(W L) .$$

Wang, Zheng, Wan, Zhang, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language
Model Compression", ICLR 2025, arXiv 2403.07378. Their second stage, which trains the left factors
and then the right ones by LoRA, is `tune_factors`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike
from effnb.core.deltas import attach_deltas
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers
from effnb.core.training import Loss, TrainingResult, TrainingSettings, causal_lm_loss, train
from effnb.finetuning import lora
from effnb.inference.low_rank.calibrated import calibrated, decompose_calibrated
from effnb.inference.low_rank.factors import Factors, exact, ranks_of
from effnb.inference.low_rank.svd import scaled_svd

RIDGE = 1e-6
"""Added to a Gram matrix that has no Cholesky factor, in parts of its mean diagonal."""


class Gram:
    r"""Running $G = \sum_x x x^\top$ of a layer's inputs, and its Cholesky factor.

    The products of one batch are made in the inputs' precision (float32 at least), their sum in
    float64.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        place = "cpu" if torch.device(device).type == "mps" else device
        self._upper = torch.zeros(features, features, dtype=torch.float64, device=place)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        features = len(self._upper)
        width = max(64, -(-features // 4))
        for start in range(0, features, width):  # panels of the upper triangle: half the work
            panel = x[:, start : start + width].T @ x[:, start:]
            self._upper[start : start + width, start:] += panel.to(self._upper)
        self.tokens += len(x)

    @property
    def value(self) -> Float[Tensor, "in in"]:
        """$G$ so far, both triangles."""
        return self._upper.triu() + self._upper.triu(1).T

    @cached_property
    def root(self) -> Float[Tensor, "in in"]:
        """$L$, once all inputs have been seen; layers that read the same inputs share it."""
        return whitening(self.value)


def whitening(gram: Float[Tensor, "*matrix"]) -> Float[Tensor, "in in"]:
    r"""The lower triangular $L$ with $L L^\top = G$, in float64.

    Where $G$ is not positive definite (an input that is always 0, or fewer tokens than inputs),
    $(\max(0, -\lambda_{min}) + 10^{-6}\,\bar g)\, I$ is added first, with $\bar g$ the mean of the
    diagonal. The predicted error then counts a little more than the true one.

    Args:
        gram: $G$, symmetric and positive semi-definite, (in, in).

    Raises:
        ValueError: When it is no square matrix, or has entries that are not finite.
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or not len(gram):
        raise ValueError(f"the Gram matrix has shape {tuple(gram.shape)}; it must be square.")
    if not bool(torch.isfinite(gram).all()):
        raise ValueError("the Gram matrix of the inputs has entries that are NaN or infinite.")
    G = exact(gram)
    L, problem = torch.linalg.cholesky_ex(G)
    pivots = L.diagonal()
    # A pivot of pure rounding error passes for positive; what is divided by it is noise.
    if int(problem) == 0 and bool(pivots.min() > torch.finfo(G.dtype).eps ** 0.5 * pivots.max()):
        return L
    lowest = float(torch.linalg.eigvalsh(G)[0])
    mean = float(G.diagonal().mean())
    ridge = max(0.0, -lowest) + RIDGE * (mean if mean > 0 else 1.0)
    return torch.linalg.cholesky(G + ridge * torch.eye(len(G), dtype=G.dtype, device=G.device))


def svd_llm_weight(
    weight: Float[Tensor, "*matrix"], gram: Float[Tensor, "*inputs"], rank: int | None = None
) -> Factors:
    r"""Truncate $W L$ with $L L^\top = X X^\top$.

    Args:
        weight: $W$, (out, in).
        gram: $X X^\top$, (in, in); any multiple of it gives the same factors.
        rank: $r$; the full rank by default.

    Returns:
        Factors whose `error` is $\lVert (W - \hat W) X \rVert_F$.

    Raises:
        ValueError: When the shapes do not fit, an entry is not finite, or the rank is out of range.
    """
    return scaled_svd(weight, whitening(gram), rank)


@chooses_layers
@in_linear_form
def svd_llm(
    model: Model,
    calibration: CalibrationLike,
    kept: float | None = None,
    *,
    rank: int | Mapping[str, int] | None = None,
    always: bool = False,
    sequential: bool = True,
    layers: LayerChoice = "*",
) -> Model:
    """Replace the linear layers inside the blocks by the factors that best keep their outputs.

    Args:
        model: A transformer; it is not changed.
        calibration: Token ids (sequences, time), or ready keyword arguments per batch. Fewer tokens
            than a layer has inputs fit the factors to those tokens only.
        kept: Part of each layer's numbers that its factors may hold; see
            `effnb.inference.low_rank.svd`, also on which layers stay dense.
        rank: Instead of `kept`: one rank for all layers, or ranks by layer name.
        always: Factorise also where it saves nothing.
        sequential: Observe each block behind the factorised ones before it; otherwise in the
            unchanged model.
        layers: Name patterns of the layers to factorise.

    Returns:
        A new model with `LowRankLinear` layers that shares every other tensor.

    Raises:
        ValueError: See `effnb.inference.low_rank.svd`; calibration data that is empty or leads to
            inputs that are not finite.
        TypeError: When a rank is not a whole number.
    """
    return calibrated(
        model,
        calibration,
        Gram,
        lambda weight, seen, r: scaled_svd(weight, seen.root, r),
        kept=kept,
        rank=rank,
        always=always,
        sequential=sequential,
        layers=layers,
    )


@chooses_layers
@in_linear_form
def decompose_svd_llm(
    model: nn.Module,
    calibration: CalibrationLike,
    *,
    layers: LayerChoice = "*",
) -> dict[str, Factors]:
    r"""The full decompositions that `truncate` makes models of, from the unchanged model's inputs.

    Their `singular_values` are those of $W L$: the energies of the layer's outputs.

    Args:
        model: A transformer; it is not changed.
        calibration: See `svd_llm`.
        layers: Name patterns.

    Raises:
        ValueError: See `svd_llm`.
    """
    return decompose_calibrated(
        model,
        calibration,
        Gram,
        lambda weight, seen, r: scaled_svd(weight, seen.root, r),
        layers=layers,
    )


def tune_factors(
    model: Model,
    batches: Callable[[int], Any],
    settings: TrainingSettings,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    loss: Loss = causal_lm_loss,
    progress: bool | Callable[[int, int, float], None] = False,
) -> tuple[Model, tuple[TrainingResult, TrainingResult]]:
    r"""Train what truncation lost back into the factors: all $U$ first, then all $V$.

    One factor is trained while the other stays, because their updates depend on each other. Each
    stage lays a LoRA beside the factors, trains it and merges it, so that the ranks and sizes stay
    what they were.

    Args:
        model: A factorised model; it is not changed.
        batches: See `effnb.core.training.train`; both stages see the same batches.
        settings: Of each of the two stages.
        rank: Of the LoRA; of a layer whose own rank is lower, that one.
        alpha: Of the LoRA.
        loss: See `effnb.core.training.train`.
        progress: See `effnb.core.training.train`; each stage counts for itself.

    Returns:
        The trained model, and what came of the two stages.

    Raises:
        ValueError: When no layer is factorised, or a number is out of range.
    """
    ranks = ranks_of(model)
    if not ranks:
        raise ValueError("no layer of this model is factorised; there are no factors to train.")
    lora.check_settings(rank, alpha, 0.0)
    generator = torch.Generator().manual_seed(settings.seed)
    results = []
    for factor in ("u", "v"):
        deltas = {}
        for name, most in ranks.items():
            r = min(rank, most)  # alpha with it, so that alpha / r is the same in all layers
            layer = model.get_submodule(f"{name}.{factor}")
            deltas[f"{name}.{factor}"] = lora.LoRA(
                layer, rank=r, alpha=alpha * r / rank, generator=generator
            )
        tuned = attach_deltas(model, "tune_factors", deltas)
        results.append(train(tuned, batches, settings, loss=loss, progress=progress))
        model = lora.merge(tuned, "tune_factors")
    return model, (results[0], results[1])
