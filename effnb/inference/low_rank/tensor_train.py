r"""TensorGPT: each token's embedding as a chain of small tensors.

An embedding $x \in \mathbb{R}^d$ is folded into a tensor with $I_1 \times \dots \times I_N \ge d$
entries (filled up with zeros) and written as a *tensor train*,

$$x_{i_1 \dots i_N} \approx G_1[i_1]\, G_2[i_2] \cdots G_N[i_N], \qquad
  G_k[i] \in \mathbb{R}^{r_{k-1} \times r_k},\quad r_0 = r_N = 1 .$$

That takes $\sum_k r_{k-1} I_k r_k$ numbers per token in place of $d$. The cores come from one
truncated SVD after another (TT-SVD: Oseledets, "Tensor-Train Decomposition", 2011, doi
10.1137/090752286). With $\varepsilon_k^2$ the sum of the squared singular values that step $k$
drops,

$$\lVert x - \hat x \rVert^2 \le \sum_{k=1}^{N-1} \varepsilon_k^2 ,$$

and without dropping any the embedding comes back exactly. The trains of different tokens have
nothing in common, so that tokens can be added and removed one at a time.

Xu, Xu, Mandic, "TensorGPT: Efficient Compression of Large Language Models based on Tensor-Train
Decomposition", 2023, arXiv 2307.00526. Folding the whole table into one train is another method
(Khrulkov et al., 2019, arXiv 1901.10787).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.modules import Layers, Model, named_modules_of, replace_modules, share
from effnb.inference.low_rank.factors import Factorized, check_weight, exact, refuse


@dataclass(frozen=True)
class TensorTrain:
    """Tensor trains of many vectors of one shape.

    Attributes:
        cores: $G_1$ … $G_N$ of each vector, (vectors, left rank, size, right rank).
        features: $d$, the length of the vectors before they were filled up.
        dropped: $ε_k^2$ of each vector and step, (vectors, N - 1).
    """

    cores: tuple[Tensor, ...]
    features: int
    dropped: Float[Tensor, "vectors steps"]

    def vectors(self) -> Float[Tensor, "vectors features"]:
        """Multiply the trains out."""
        return contract(self.cores, self.features)


def contract(cores: Sequence[Tensor], features: int) -> Float[Tensor, "vectors features"]:
    """The vectors that trains stand for, the filling left out."""
    whole = cores[0].flatten(1, 2)  # (vectors, entries so far, right rank)
    for core in cores[1:]:
        step = torch.bmm(whole, core.flatten(2))
        whole = step.reshape(len(step), -1, core.shape[-1])
    return whole.flatten(1)[:, :features]


def balanced_shape(features: int, ways: int = 3) -> tuple[int, ...]:
    """Sizes of a fold of `ways` directions, as equal as they can be with at most 5 % of filling.

    Trains are shortest where the sum of the sizes is; of several equally good folds, the one with
    the least filling is taken.

    Raises:
        ValueError: When `ways` is below 2, or there is no fold into this many sizes above 1.
    """
    if ways < 2 or features < 2**ways:
        raise ValueError(
            f"{features} features cannot be folded {ways} ways with at least 2 entries each."
        )
    most = max(2**ways, math.floor(1.05 * features))
    found: list[tuple[int, int, tuple[int, ...]]] = []
    for head in combinations_with_replacement(range(2, math.isqrt(most) + 1), ways - 1):
        last = max(head[-1], -(-features // math.prod(head)))
        if math.prod(head) * last <= most:
            found.append((sum(head) + last, math.prod(head) * last, (*head, last)))
    if not found:  # hardly any room and a prime: fill up to the next that folds
        return balanced_shape(features + 1, ways)
    return min(found)[2]


def fold_of(features: int, shape: Sequence[int] | None = None) -> tuple[int, ...]:
    """The fold to use: the given one, or a balanced one.

    Raises:
        ValueError: When the given one does not hold the features.
    """
    if shape is None:
        return balanced_shape(features)
    if len(shape) < 2 or min(shape) < 1 or math.prod(shape) < features:
        raise ValueError(
            f"the shape {tuple(shape)} does not hold {features} features; its sizes must be at "
            "least 1 and multiply to that or more, and there must be two or more."
        )
    return tuple(shape)


def bond_ranks(shape: Sequence[int], rank: int | Sequence[int]) -> tuple[int, ...]:
    r"""$r_1 \dots r_{N-1}$: the ranks asked for, none above what its place can have.

    Between the first $k$ directions and the rest, no rank is above
    $\min(I_1 \cdots I_k,\ r_{k-1} I_k,\ I_{k+1} \cdots I_N)$.

    Args:
        shape: $I_1 \dots I_N$.
        rank: One for all places, or one for each.

    Raises:
        ValueError: When there are not $N - 1$ of them, or one is below 1.
    """
    wanted = [rank] * (len(shape) - 1) if isinstance(rank, int) else list(rank)
    if len(wanted) != len(shape) - 1:
        raise ValueError(
            f"{len(wanted)} ranks were given; a fold of {len(shape)} directions has "
            f"{len(shape) - 1}."
        )
    if min(wanted) < 1:
        raise ValueError(f"rank is {min(wanted)}; it must be at least 1.")
    ranks, before = [], 1
    for k, most in enumerate(wanted):
        before = min(most, before * shape[k], math.prod(shape[k + 1 :]))
        ranks.append(before)
    return tuple(ranks)


def train_size(shape: Sequence[int], rank: int | Sequence[int]) -> int:
    r"""$\sum_k r_{k-1} I_k r_k$, the numbers that one train takes.

    Args:
        shape: $I_1 \dots I_N$.
        rank: See `bond_ranks`.

    Raises:
        ValueError: See `bond_ranks`.
    """
    ranks = (1, *bond_ranks(shape, rank), 1)
    return sum(left * size * right for (left, right), size in zip(pairwise(ranks), shape))


def tt_svd(
    vectors: Float[Tensor, "*table"],
    rank: int | Sequence[int],
    shape: Sequence[int] | None = None,
) -> TensorTrain:
    r"""Decompose each row of a table by itself, all rows at once.

    From left to right: unfold what remains into a matrix with $r_{k-1} I_k$ rows, truncate its SVD
    at $r_k$, keep $U$ as the core, and go on with $\Sigma V^\top$. Computed in float64.

    Args:
        vectors: The table, (vectors, features).
        rank: One rank for all places, or one for each; see `bond_ranks`.
        shape: The fold; `balanced_shape` by default. Its product may exceed the features.

    Raises:
        ValueError: When the table is no finite matrix, the fold is too small or has a size below 1,
            or a rank is out of range.
    """
    check_weight(vectors)
    count, features = vectors.shape
    shape = fold_of(features, shape)
    ranks = bond_ranks(shape, rank)
    rest = nn.functional.pad(exact(vectors), (0, math.prod(shape) - features))
    cores, dropped, left = [], [], 1
    for size, right in zip(shape, ranks):
        U, sigma, Vh = torch.linalg.svd(rest.reshape(count, left * size, -1), full_matrices=False)
        dropped.append(sigma[:, right:].square().sum(1))
        cores.append(U[:, :, :right].reshape(count, left, size, right))
        rest = sigma[:, :right, None] * Vh[:, :right]
        left = right
    cores.append(rest.reshape(count, left, shape[-1], 1))
    return TensorTrain(tuple(cores), features, torch.stack(dropped, 1))


# --- modules --------------------------------------------------------------------------------------


class TensorTrainEmbedding(Factorized):
    """An embedding that multiplies out the trains of the tokens it is asked for."""

    kind = "tensor_train"

    def __init__(
        self, cores: Sequence[Tensor], features: int, padding_idx: int | None = None
    ) -> None:
        """Make the module from its cores; see `TensorTrain`."""
        super().__init__()
        self.cores = nn.ParameterList([nn.Parameter(c, c.requires_grad) for c in cores])
        self.num_embeddings, self.embedding_dim = len(cores[0]), features
        self.padding_idx = padding_idx

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks between the cores."""
        return tuple(core.shape[-1] for core in self.cores[:-1])

    @property
    def weight(self) -> Float[Tensor, "vectors features"]:
        """The whole table, multiplied out."""
        return contract(list(self.cores), self.embedding_dim)

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch features"]:
        """The vectors of some tokens."""
        flat = ids.flatten()
        picked = [core[flat] for core in self.cores]
        return contract(picked, self.embedding_dim).view(*ids.shape, self.embedding_dim)

    def describe(self) -> dict[str, Any]:
        """Shapes of the cores."""
        return {
            "features": self.embedding_dim,
            "padding": self.padding_idx,
            "cores": [list(core.shape) for core in self.cores],
        }

    @classmethod
    def empty(cls, description: Mapping[str, Any], old: nn.Module) -> TensorTrainEmbedding:
        """Zeros in place of an embedding."""
        size = (description["cores"][0][0], description["features"])
        if not isinstance(old, nn.Embedding) or old.weight.shape != size:
            raise ValueError(
                f"an embedding of shape {size} does not fit in place of a {type(old).__name__}."
            )
        cores = [old.weight.new_zeros(shape) for shape in description["cores"]]
        return cls(cores, description["features"], description["padding"])

    def dense(self) -> nn.Embedding:
        """An ordinary embedding with the same vectors."""
        frozen = not self.cores[0].requires_grad
        return nn.Embedding.from_pretrained(
            self.weight.detach(), freeze=frozen, padding_idx=self.padding_idx
        )

    def extra_repr(self) -> str:
        """Sizes and ranks."""
        return f"{self.num_embeddings}, {self.embedding_dim}, ranks={self.ranks}"


class TensorTrainHead(Factorized):
    r"""$y = E x$ with the table of an embedding that is stored as trains: a tied output head.

    It has no tensors. The table is multiplied out at every call, which saves memory that
    is kept and costs time and memory while it runs.
    """

    kind = "tensor_train_head"

    def __init__(self, embedding: TensorTrainEmbedding, bias: Tensor | None = None) -> None:
        """Read another module's cores."""
        super().__init__()
        # Inside a tuple, so that it is not counted and saved a second time as a part of this one.
        self._tied = (embedding,)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def weight(self) -> Float[Tensor, "vectors features"]:
        """The whole table, multiplied out."""
        return self._tied[0].weight

    def forward(self, inputs: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch vectors"]:
        """Scores of all tokens."""
        return nn.functional.linear(inputs, self.weight, self.bias)


def tied_heads(model: nn.Module, embedding: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose weight is the embedding's own table, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.weight is embedding.weight
    }


def _embeddings(model: nn.Module, include: str | Iterable[str] | None) -> dict[str, nn.Module]:
    if include is not None:
        return named_modules_of(model, (nn.Embedding, TensorTrainEmbedding), Layers(include, ()))
    find = getattr(model, "get_input_embeddings", None)
    tokens = find() if callable(find) else None
    if tokens is None:
        return named_modules_of(model, (nn.Embedding, TensorTrainEmbedding))
    return {name: m for name, m in model.named_modules() if m is tokens}


def tensor_train(
    model: Model,
    rank: int | Sequence[int],
    *,
    shape: Sequence[int] | None = None,
    always: bool = False,
    include: str | Iterable[str] | None = None,
) -> Model:
    r"""Store the token embeddings of a model as one tensor train per token.

    An output head that is tied to the embedding reads the same trains. If the trains would hold as
    many numbers as the vectors or more, the embedding stays as it is, unless `always` is set.

    Args:
        model: Any module with `nn.Embedding`; it is not changed.
        rank: One rank for all places of the train, or one for each; higher than a place can have
            means its full rank.
        shape: The fold; `balanced_shape` by default.
        always: Decompose also where it saves nothing.
        include: Name patterns of the embeddings. By default the one that the model names as its
            input embedding, or all where it names none.

    Returns:
        A new model with `TensorTrainEmbedding` (and `TensorTrainHead`) that shares the rest.

    Raises:
        ValueError: A rank or shape out of range, no fitting embedding, entries that are not finite,
            an embedding that does more than look up, or a model that is quantized or decomposed
            already.
    """
    refuse(model)
    found = _embeddings(model, include)
    for name, module in found.items():
        if isinstance(module, TensorTrainEmbedding):
            raise ValueError(f"{name} is a tensor train already; decompose the original instead.")
        if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
            raise ValueError(
                f"{name} is a {type(module).__name__} that does more than look up vectors; only "
                "plain embeddings are decomposed."
            )
    new: dict[str, nn.Module] = {}
    for name, module in found.items():
        table = module.weight
        fold = fold_of(table.shape[1], shape)
        if not always and train_size(fold, rank) >= table.shape[1]:
            check_weight(table)
            continue
        try:
            train = tt_svd(table, rank, fold)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
        cores = [
            core.to(table.device, table.dtype).contiguous().requires_grad_(table.requires_grad)
            for core in train.cores
        ]
        new[name] = TensorTrainEmbedding(cores, train.features, module.padding_idx)
        for head, layer in tied_heads(model, module).items():
            new[head] = TensorTrainHead(new[name], layer.bias)
        for other, embedding in model.named_modules():  # T5 has three on one table
            if type(embedding) is nn.Embedding and embedding.weight is table:
                new[other] = new[name]
    return replace_modules(model, new) if new else share(model)
