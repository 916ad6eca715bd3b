r"""Extrapolation: the trained frequencies, read beyond the trained length.

$$h(\theta_i) = \theta_i .$$

This is what every method of this package is compared with. Nothing is scaled; only the
configuration's limit is raised, so that a longer text is accepted. Slow points then reach angles
$m\,\theta_i$ that no training text has shown them.

Su, Lu, Pan, Murtadha, Wen, Liu, "RoFormer: Enhanced Transformer with Rotary Position Embedding",
2021, arXiv 2104.09864, eq. 15 (the frequencies).
"""

from __future__ import annotations

from effnb.core.modules import Model
from effnb.design.context.rotary_table import (
    check_factor,
    extended_length,
    rotary_table,
    with_table,
)


def extrapolation(model: Model, factor: float, *, trained_length: int | None = None) -> Model:
    """Let a model read texts that are `factor` times as long, with the frequencies it has.

    Args:
        model: A Hugging Face model with rotary positions; it is not changed.
        factor: $s$, the new context length divided by the trained one.
        trained_length: Tokens of the trained context; by default the configuration's.

    Returns:
        A new model that shares all weights and computes what the given one does.

    Raises:
        ValueError: A factor below 1, or a model that `rotary_table` refuses.
    """
    factor = check_factor(factor)
    table = rotary_table(model, trained_length)
    return with_table(
        model,
        table,
        table.inv_freq,
        {"rope_type": "default"},
        length=extended_length(table, factor),
    )
