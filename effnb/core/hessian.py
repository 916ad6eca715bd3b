r"""The damped Hessian of a layer, and the triangular factor of its inverse.

Optimal Brain Surgeon changes one weight after another and lets the weights that are still free make
up for it. How much each of them must move is given by the inverse of the Hessian
$H = \frac2N X X^\top$ of the free weights, and each weight that is decided leaves it. If the order
is the same for all rows, all of these inverses are rows of *one* upper triangular matrix $U$ with
$U^\top U = H^{-1}$ (Frantar et al., 2022, arXiv 2210.17323):

$$\frac{\left[(H_{i:,i:})^{-1}\right]_{0,:}}{\left[(H_{i:,i:})^{-1}\right]_{00}}
  = \frac{U_{i,i:}}{U_{ii}}, \qquad \left[(H_{i:,i:})^{-1}\right]_{00} = U_{ii}^2.$$

GPTQ and SparseGPT (arXiv 2301.00774) both walk down this matrix. With errors
$e_i = (w_i - \hat w_i) / U_{ii}$ of the columns in turn, the damage they leave is known exactly:
$\sum_i \lVert e_i \rVert^2 = \operatorname{tr}(\Delta W\, H\, \Delta W^\top)$.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def check_damping(damping: float) -> None:
    """Refuse negative damping."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be a number from 0 (0.01 is usual).")


def damp_hessian(
    hessian: Float[Tensor, "*matrix"], damping: float = 0.01
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, "in"]]:
    r"""$H_d = H + \lambda I$ with $\lambda$ = `damping` times the mean of the diagonal, in float64.

    An input that was 0 at every token ("dead", $H_{jj} = 0$) gets $H_{jj} = 1$ first; its weights
    have no effect on the calibration data, and GPTQ and SparseGPT set them to 0.

    Args:
        hessian: $H$, symmetric and positive semi-definite. It is not changed.
        damping: At least 0; without any, a Hessian of fewer tokens than inputs has no inverse.

    Returns:
        The damped Hessian, and which inputs are dead.

    Raises:
        ValueError: Not a square matrix, entries that are not finite, a negative diagonal, or
            negative damping.
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1] or not len(hessian):
        raise ValueError(
            f"the Hessian has shape {tuple(hessian.shape)}; it must be a square matrix."
        )
    check_damping(damping)
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian has entries that are NaN or infinite.")
    if bool((diagonal < 0).any()):
        raise ValueError("the Hessian has negative entries on its diagonal; X Xᵀ has none.")
    # Float32 is too coarse for this factorization, and MPS has nothing finer.
    damped = (hessian.cpu() if hessian.device.type == "mps" else hessian).double().clone()
    dead = (diagonal == 0).to(damped.device)
    damped.diagonal()[dead] = 1
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return damped, dead


def inverse_cholesky(
    hessian: Float[Tensor, "*matrix"], damping: float = 0.01
) -> tuple[Float[Tensor, "in in"], Bool[Tensor, "in"]]:
    r"""Upper triangular $U$ with $U^\top U = H_d^{-1}$ and a positive diagonal; there is only one.

    The inverse itself is never formed. Let $J$ reverse the order of the inputs. From
    $J H_d J = L L^\top$ follows $H_d = R R^\top$ with $R = J L J$ upper triangular, and
    $U = R^{-1} = J L^{-1} J$. Computed in float64 and returned in the Hessian's type (at least
    float32).

    Args:
        hessian: $H$, symmetric and positive semi-definite; see `effnb.core.calibration.Hessian`.
        damping: See `damp_hessian`.

    Returns:
        $U$, and which inputs are dead.

    Raises:
        ValueError: As `damp_hessian`; and a Hessian that is not positive definite when damped.
    """
    damped, dead = damp_hessian(hessian, damping)
    lower, problem = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if int(problem):
        raise ValueError(
            f"the Hessian is not positive definite with damping {damping}; use more calibration "
            "tokens or more damping."
        )
    upper = _invert_lower(lower).flip(0, 1)
    kind = torch.float64 if hessian.dtype == torch.float64 else torch.float32
    return upper.to(hessian.device, kind), dead.to(hessian.device)


def _invert_lower(lower: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    r"""Inverse of a lower triangular matrix by halves; a third of the work of solving for $I$.

    $\begin{pmatrix} A & 0 \\ C & D \end{pmatrix}^{-1} =
    \begin{pmatrix} A^{-1} & 0 \\ -D^{-1} C A^{-1} & D^{-1} \end{pmatrix}$.
    """
    n = len(lower)
    if n <= 64:
        return torch.linalg.solve_triangular(lower, torch.eye(n).to(lower), upper=False)
    half = n // 2
    inverse = torch.zeros_like(lower)
    inverse[:half, :half] = first = _invert_lower(lower[:half, :half])
    inverse[half:, half:] = second = _invert_lower(lower[half:, half:])
    inverse[half:, :half] = (second @ lower[half:, :half] @ first).neg_()
    return inverse
