r"""Position Interpolation: squeeze the positions of a long text into the trained range.

A model trained on $L$ tokens has never met the positions behind them, and its attention scores may
be anything there. Position Interpolation puts $m / s$ in the place of $m$, with $s = L'/L$ for a
context of $L'$ tokens, so that every position lies where the model was trained. Since angles are
products $m\,\theta_i$, that is the same as dividing every frequency:

$$h(\theta_i) = \theta_i / s.$$

All points are slowed alike. The fast ones, which tell a token from its neighbour, then turn by less
per token than the model has ever seen; a short fine-tuning makes up for it.

Chen, Wong, Chen, Tian, "Extending Context Window of Large Language Models via Positional
Interpolation", 2023, arXiv 2306.15595, eq. 4. (The first version of the paper of YaRN prints the
fraction upside down.)
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from effnb.core.modules import Model
from effnb.design.context.rotary_table import (
    check_factor,
    extended_length,
    rotary_table,
    with_table,
)


def position_interpolation_frequencies(
    inv_freq: Float[Tensor, " half"], factor: float
) -> Float[Tensor, " half"]:
    r"""$h(\theta_i) = \theta_i / s$.

    Args:
        inv_freq: $\theta$, the model's own.
        factor: $s$.

    Raises:
        ValueError: A factor below 1.
    """
    return inv_freq / check_factor(factor)  # h(θ_i) = θ_i / s


def interpolation_error_bound(inv_freq: Float[Tensor, " half"], largest: float = 1.0) -> float:
    r"""How far a score at an interpolated position can be from the line between its neighbours.

    The score at distance $x$ is $a(x) = \operatorname{Re} \sum_i h_i e^{\mathrm{i} x \theta_i}$
    with $h_i$ the complex product of a query's and a key's point $i$. Between two whole numbers it
    strays from the straight line by at most

    $$\tfrac18 \max_x |a''(x)| \le \tfrac18 \max_i |h_i| \sum_i \theta_i^2.$$

    The paper (theorem 2.1) puts $d / (4 \ln b)$ for the sum and so prints
    $d \max_i |h_i| / (32 \ln b)$. The sum is larger than that (one step of the proof has its
    inequality the wrong way round), so the printed number can be exceeded; this one cannot.

    Args:
        inv_freq: $\theta$ as trained.
        largest: $\max_i |h_i|$.
    """
    return largest * float(inv_freq.double().square().sum()) / 8


def position_interpolation(
    model: Model, factor: float, *, trained_length: int | None = None
) -> Model:
    """Divide all rotary frequencies of a model by `factor`.

    Saved and loaded by transformers as the `rope_type` "linear".

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        factor: $s$, the new context length divided by the trained one.
        trained_length: Tokens of the trained context; by default the configuration's.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: A factor below 1, or a model that `rotary_table` refuses.
    """
    factor = check_factor(factor)
    table = rotary_table(model, trained_length)
    return with_table(
        model,
        table,
        position_interpolation_frequencies(table.inv_freq, factor),
        {"rope_type": "linear", "factor": factor},
        length=extended_length(table, factor),
    )
