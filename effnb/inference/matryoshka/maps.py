r"""Linear maps whose outputs are cut: trained with the Matryoshka loss, or not trained at all.

An encoder that is not trained further gives $e \in \mathbb R^d$; the map gives $z = A e$, and its
first $m$ rows alone give $z_{1:m}$. One map serves queries and documents.

`train_map` learns $A$ (Kusupati et al., 2022, arXiv 2205.13147, with the encoder frozen), and
`principal_map` takes the directions in which the vectors are longest. `random_dims` picks
coordinates. They are what a trained map is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.training import TrainingSettings, train
from effnb.inference.matryoshka.checks import check_count, check_dims, check_vectors
from effnb.inference.matryoshka.losses import in_batch_softmax, matryoshka_loss


def orthogonal(width: int, dim: int, seed: int) -> Float[Tensor, "width dim"]:
    """Rows at right angles to each other, of length 1, drawn at random.

    With `width` = `dim` it turns vectors, and changes no dot product.

    Raises:
        ValueError: When `width` is not between 1 and `dim`.
    """
    check_count("width", width, dim, "the width of the vectors")
    draws = torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed))
    Q, R = torch.linalg.qr(draws)
    return (Q * R.diagonal().sign()).T[:width].contiguous()


def train_map(
    queries: Float[Tensor, "pairs dim"],
    documents: Float[Tensor, "documents document_dim"],
    dims: Sequence[int],
    *,
    weights: Sequence[float] | None = None,
    steps: int = 300,
    batch_size: int = 256,
    learning_rate: float = 2e-3,
    scale: float = 20.0,
    seed: int = 0,
) -> Float[Tensor, "width dim"]:
    r"""$A$ with `dims[-1]` rows that makes $\sum_m c_m \ell(A_{1:m} q, A_{1:m} d)$ small.

    It begins as a random rotation (its first rows, if fewer are asked for), so that before training
    no direction of the encoder is preferred.

    Args:
        queries: Vectors of an encoder, row by row.
        documents: Vectors of the documents that belong to them.
        dims: Prefix lengths that are trained; the last is the number of rows of $A$. With one alone
            the map is an ordinary one of that size.
        weights: $c_m$, 1 for all when None.
        steps: Optimizer steps; the rate falls to 0 along a cosine.
        batch_size: Pairs a step; the other documents of a batch are what is not to be found.
        learning_rate: Peak rate of AdamW.
        scale: Of the scores inside the softmax.
        seed: Of the rotation and of the order of the pairs.

    Raises:
        ValueError: When the prefix lengths do not nest or do not fit, or pairs are too few.
    """
    check_vectors(queries, documents)
    nested = check_dims(dims, queries.shape[1])
    check_count("batch_size", batch_size, len(queries), "pairs")
    mapping = nn.Linear(queries.shape[1], nested[-1], bias=False, device=queries.device)
    with torch.no_grad():
        mapping.weight.copy_(orthogonal(nested[-1], queries.shape[1], seed))
    draws = torch.Generator().manual_seed(seed)
    rounds = -(-steps // (len(queries) // batch_size))
    order = torch.cat([_whole_batches(len(queries), batch_size, draws) for _ in range(rounds)])

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return matryoshka_loss(
            model(queries[rows]),
            model(documents[rows]),
            nested,
            weights=weights,
            loss=lambda q, d: in_batch_softmax(q, d, scale),
        )

    settings = TrainingSettings(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=min(20, steps),
        schedule="cosine",
        seed=seed,
    )
    train(mapping, lambda step: order[step], settings, loss=loss)
    return mapping.weight.detach().clone()


def _whole_batches(count: int, size: int, draws: torch.Generator) -> Tensor:
    order = torch.randperm(count, generator=draws)
    return order[: count // size * size].view(-1, size)


def principal_map(
    vectors: Float[Tensor, "texts dim"], width: int | None = None
) -> Float[Tensor, "width dim"]:
    r"""The eigenvectors of $\sum_i e_i e_i^\top$ as rows, the largest eigenvalue first.

    The first $m$ rows keep the dot products of these vectors best, of all maps to $m$ numbers
    (principal components without centring, which would change cosines).

    Args:
        vectors: Of the texts that directions are learnt from.
        width: How many directions; all when None.

    Raises:
        ValueError: When `width` is not between 1 and the width of the vectors.
    """
    width = vectors.shape[1] if width is None else width
    check_count("width", width, vectors.shape[1], "the width of the vectors")
    _, found = torch.linalg.eigh((vectors.T @ vectors).double())
    return found.flip(1).T[:width].float().contiguous()


def random_dims(width: int, dim: int, seed: int) -> Float[Tensor, "width dim"]:
    """A map that picks `width` different coordinates at random.

    Raises:
        ValueError: When `width` is not between 1 and `dim`.
    """
    check_count("width", width, dim, "the width of the vectors")
    chosen = torch.randperm(dim, generator=torch.Generator().manual_seed(seed))[:width]
    return torch.eye(dim)[chosen]
