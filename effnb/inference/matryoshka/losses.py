r"""The Matryoshka loss: one loss, summed over nested prefixes of the same vector.

$$\mathcal L = \sum_{m \in \mathcal M} c_m\, \ell\bigl(z_{1:m}\bigr)$$

For retrieval each prefix is divided by its own length before it is compared, in training and
afterwards.

Kusupati, Bhatt, Rege, Wallingford, Sinha, Ramanujan, Howard-Snyder, Chen, Kakade, Jain, Farhadi,
"Matryoshka Representation Learning", 2022, arXiv 2205.13147, eq. 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.inference.matryoshka.checks import check_dims, check_vectors, check_weights

PairLoss = Callable[[Tensor, Tensor], Tensor]


def prefix(vectors: Float[Tensor, "*batch dim"], m: int) -> Float[Tensor, "*batch m"]:
    r"""$z_{1:m} / \lVert z_{1:m} \rVert_2$: the first numbers of each vector, at length 1 again.

    Raises:
        ValueError: When `m` is not between 1 and the width of the vectors.
    """
    check_dims((m,), vectors.shape[-1])
    return nn.functional.normalize(vectors[..., :m], dim=-1)


def in_batch_softmax(
    queries: Float[Tensor, "pairs dim"],
    documents: Float[Tensor, "documents document_dim"],
    scale: float = 20.0,
) -> Float[Tensor, ""]:
    r"""Each query's own document against all others of the batch, in nats.

    $$-\frac1n \sum_i \log \frac{e^{s\, q_i \cdot d_i}}{\sum_j e^{s\, q_i \cdot d_j}}$$

    with vectors of length 1 and the scale $s$. Libraries call it multiple-negatives ranking loss.

    Source: Henderson et al., "Efficient Natural Language Response Suggestion for Smart Reply",
    2017, arXiv 1705.00652.

    Raises:
        ValueError: A scale that is not positive, or queries and documents that do not pair up.
    """
    check_vectors(queries, documents)
    if len(queries) != len(documents):
        raise ValueError(
            f"{len(queries)} queries do not pair up with {len(documents)} documents: row i of one "
            "belongs to row i of the other."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"the scale is {scale}; it must be above 0.")
    scores = scale * queries @ documents.T  # $s\, q_i \cdot d_j$
    return nn.functional.cross_entropy(scores, torch.arange(len(queries), device=queries.device))


def matryoshka_loss(
    queries: Float[Tensor, "pairs dim"],
    documents: Float[Tensor, "documents document_dim"],
    dims: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    loss: PairLoss = in_batch_softmax,
) -> Float[Tensor, ""]:
    r"""$\sum_{m \in \mathcal M} c_m\, \ell(q_{1:m}, d_{1:m})$ over prefixes of length 1.

    Args:
        queries: One vector per query; they need not have length 1.
        documents: The vector of each query's own document, in the same order.
        dims: Prefix lengths $\mathcal M$, rising. The full width is one of them only if it is
            named.
        weights: $c_m$, in the order of `dims`; 1 for all when None.
        loss: $\ell$, a function of two sets of vectors of length 1.

    Raises:
        ValueError: When the prefix lengths do not nest or do not fit, or the weights do not.
    """
    check_vectors(queries, documents)
    nested = check_dims(dims, queries.shape[1])
    total = queries.new_zeros(())
    for m, c in zip(nested, check_weights(weights, nested)):
        # $c_m\, \ell(z_{1:m} / \lVert z_{1:m} \rVert)$
        total = total + c * loss(prefix(queries, m), prefix(documents, m))
    return total
