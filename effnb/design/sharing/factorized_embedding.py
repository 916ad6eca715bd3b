r"""A factorized embedding: each token has a short vector, and one matrix widens it.

An embedding of $V$ tokens in a stream of width $d$ has $V d$ numbers. With tables
$T \in \mathbb{R}^{V \times E}$ and $P \in \mathbb{R}^{E \times d}$ it has $V E + E d$, which is
less when $E < V d / (V + d)$. A head tied to the embedding has to be factorized with it:

$$x = t P, \qquad \text{logits} = (h P^\top) T^\top.$$

Lan, Chen, Goodman, Gimpel, Sharma, Soricut, "ALBERT: A Lite BERT for Self-supervised Learning of
Language Representations", ICLR 2020, arXiv 1909.11942, section 3.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.modules import Model, own_weight, replace_modules
from effnb.design.attention.checks import check_count

INITIAL = ("svd", "random")


class FactorizedEmbedding(nn.Module):
    """$x = t P$: a table of short vectors, and the matrix that widens them.

    Args:
        tokens: V.
        size: E, the width of the table.
        hidden: d, the width of the stream.
        padding_idx: A token whose vector is not trained, as in `nn.Embedding`.
    """

    def __init__(self, tokens: int, size: int, hidden: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, size, padding_idx=padding_idx)
        self.project = nn.Linear(size, hidden, bias=False)

    @property
    def weight(self) -> Float[Tensor, "tokens hidden"]:
        """The table that the two factors stand for, T P."""
        with torch.autocast(self.table.weight.device.type, enabled=False):  # a weight has its type
            return self.table.weight @ self.project.weight.T

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """d, what the model around it reads."""
        return self.project.out_features

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape hidden"]:
        """Vectors of tokens."""
        return self.project(self.table(ids))  # x = t P


class FactorizedHead(nn.Module):
    """Logits $(h P^T) T^T + b$, with the factors of an embedding.

    Args:
        embedding: The embedding, which stands here too.
        bias: b, one number for each token, or None.
    """

    def __init__(self, embedding: FactorizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Float[Tensor, "tokens hidden"]:
        """The matrix that the two factors stand for, T P."""
        return self.embedding.weight

    def forward(self, hidden: Float[Tensor, "*shape hidden"]) -> Float[Tensor, "*shape tokens"]:
        """Logits of every token."""
        short = hidden @ self.embedding.project.weight  # h P^T
        return nn.functional.linear(short, self.embedding.table.weight, self.bias)


def factorized_parameters(tokens: int, size: int, hidden: int) -> int:
    """$V E + E d$."""
    return tokens * size + size * hidden


def factorize_embedding(model: Model, size: int, *, initial: str = "svd", seed: int = 0) -> Model:
    r"""A model with a factorized embedding, and a factorized head where the head was tied to it.

    An untied head stays as it is: it has a matrix of its own, which `low_rank` can factorize.

    Args:
        model: A Hugging Face model whose input embedding is an `nn.Embedding`; it is not changed.
        size: E, from 1 to the width of the stream.
        initial: "svd" takes the best approximation of the table by two factors, exact for E = d.
            "random" draws both, as large as the table's entries: for training from the start.
        seed: Of random factors.

    Returns:
        A new model that shares everything else.

    Raises:
        ValueError: A size outside its range, another `initial`, or an embedding of another kind.
    """
    if initial not in INITIAL:
        raise ValueError(f"initial is {initial!r}; it must be one of {', '.join(INITIAL)}.")
    ask = getattr(model, "get_input_embeddings", None)
    embedding = ask() if callable(ask) else None
    if type(embedding) is not nn.Embedding:
        raise ValueError(
            f"the input embedding of {type(model).__name__} is "
            f"{'missing' if embedding is None else 'a ' + type(embedding).__name__}; only a plain "
            "nn.Embedding can be factorized."
        )
    hidden = embedding.weight.shape[1]
    if check_count("size", size) > hidden:
        raise ValueError(f"size is {size}; it must be at most the width of the stream, {hidden}.")
    new = _factors(embedding, size, initial, seed)
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    replaced: dict[str, nn.Module] = {names[embedding]: new}
    for name, module in model.named_modules():
        tied = own_weight(module) is embedding.weight and module is not embedding
        if tied and isinstance(module, nn.Embedding):  # an encoder-decoder's other table
            replaced[name] = new
        elif tied and isinstance(module, nn.Linear):
            replaced[name] = FactorizedHead(new, module._parameters.get("bias"))
        elif tied:
            raise ValueError(
                f"{name} uses the embedding's table in a {type(module).__name__}; only linear "
                "heads can be factorized with it."
            )
    return replace_modules(model, replaced)


def _factors(embedding: nn.Embedding, size: int, initial: str, seed: int) -> FactorizedEmbedding:
    weight = embedding.weight.detach()
    tokens, hidden = weight.shape
    with torch.inference_mode(False), torch.no_grad():
        new = FactorizedEmbedding(tokens, size, hidden, embedding.padding_idx)
        if initial == "svd":
            u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
            kept = min(size, len(s))  # fewer tokens than channels have no more directions
            table, project = torch.zeros(tokens, size), torch.zeros(hidden, size)
            table, project = table.to(u), project.to(u)
            table[:, :kept], project[:, :kept] = u[:, :kept] * s[:kept], vh[:kept].T
        else:
            generator = torch.Generator().manual_seed(seed)
            scale = float(weight.double().std())
            table = scale * torch.randn(tokens, size, generator=generator)
            # Columns of unit length on average keep the scale: Var(x) = E Var(t) / E.
            project = torch.randn(hidden, size, generator=generator) / size**0.5
        if initial == "random" and embedding.padding_idx is not None:
            table[embedding.padding_idx] = 0
        new.to(device=weight.device, dtype=weight.dtype)
        new.table.weight.copy_(table)
        new.project.weight.copy_(project)
    new.requires_grad_(embedding.weight.requires_grad)
    return new.train(embedding.training)
