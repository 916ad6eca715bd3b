r"""LoSparse: a low-rank part for what neurons share, whole rows for what they do not.

A weight that no low rank fits is written as

$$W \approx U V + S ,$$

with $U V$ the truncated SVD and $S$ the residual $W - U V$, of which only some **rows** (output
neurons) are kept: $r (m + n) + k\,n$ numbers for $k$ rows, and no mask at inference, only a smaller
dense matrix whose outputs are added in their places.

`low_rank_plus_sparse` does it in one go, keeping the rows with the largest norm. `losparse` trains
$U$, $V$ and $S$ while the rows go one after another. With $g_{ij}$ the gradient of $S_{ij}$, each
row's score is the mean over its entries of the running average

$$\bar I^{(t)}_{ij} = \beta\, \bar I^{(t-1)}_{ij} + (1 - \beta)\, |S_{ij}\, g_{ij}| ,$$

and the part of $S$ that stays falls along a cubic from 1 to its goal.

Li et al., "LoSparse: Structured Compression of Large Language Models based on Low-Rank and Sparse
Approximation", 2023, arXiv 2306.11222. The optional factor for uncertainty is that of PLATON (Zhang
et al., 2022, arXiv 2206.12562).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.deltas import freeze
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, replace_modules, share
from effnb.core.training import Loss, TrainingResult, TrainingSettings, causal_lm_loss, train
from effnb.inference.low_rank.factors import (
    Factorized,
    break_even_rank,
    check_kept,
    check_place,
    choose_layers,
    exact,
    linear_of,
)
from effnb.inference.low_rank.svd import truncated_svd


class LowRankPlusSparse(Factorized):
    r"""$y = U (V x) + P^\top (S' x) + b$, where $P^\top$ puts $k$ outputs in their places.

    `u`, `v` and `sparse` are ordinary linear layers, so that quantization and LoRA find them.
    Without a low-rank part `u` and `v` are None, without rows `sparse` is.
    """

    kind = "low_rank_plus_sparse"
    rows: Int[Tensor, " kept"]

    def __init__(
        self,
        U: Float[Tensor, "out rank"],
        V: Float[Tensor, "rank in"],
        rows: Int[Tensor, " kept"],
        S: Float[Tensor, "kept in"],
        bias: Tensor | None = None,
        *,
        trainable: bool = True,
    ) -> None:
        """Make the layer from its parts; `rows` says which outputs the rows of `S` belong to."""
        super().__init__()
        self.out_size, self.in_size = len(U), V.shape[1]
        self.v = linear_of(V, None, trainable) if len(V) else None
        self.u = linear_of(U, None, trainable) if len(V) else None
        self.sparse = linear_of(S, None, trainable) if len(S) else None
        self.register_buffer("rows", rows.to(torch.int32))
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    @property
    def rank(self) -> int:
        """Rank of the dense part."""
        return 0 if self.v is None else self.v.out_features

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix that the parts stand for."""
        like = (self.sparse or self.u).weight
        whole = like.new_zeros(self.out_size, self.in_size)
        if self.u is not None:
            whole = self.u.weight @ self.v.weight
        return whole if self.sparse is None else whole.index_add(0, self.rows, self.sparse.weight)

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Both parts, added."""
        if self.u is None:
            outputs = inputs.new_zeros(*inputs.shape[:-1], self.out_size)
        else:
            outputs = self.u(self.v(inputs))
        if self.sparse is not None:
            outputs = outputs.index_add(-1, self.rows, self.sparse(inputs).to(outputs.dtype))
        return outputs if self.bias is None else outputs + self.bias

    def describe(self) -> dict[str, Any]:
        """Sizes."""
        return {
            "out": self.out_size,
            "in": self.in_size,
            "rank": self.rank,
            "rows": len(self.rows),
        }

    @classmethod
    def empty(cls, description: Mapping[str, Any], old: nn.Module) -> LowRankPlusSparse:
        """Zeros in place of a linear layer."""
        m, n = description["out"], description["in"]
        check_place(old, m, n)
        like, k = old.weight, description["rows"]
        return cls(
            like.new_zeros(m, description["rank"]),
            like.new_zeros(description["rank"], n),
            torch.zeros(k, dtype=torch.int32, device=like.device),
            like.new_zeros(k, n),
            None if old.bias is None else torch.zeros_like(old.bias),
            trainable=like.requires_grad,
        )

    def dense(self) -> nn.Linear:
        """One linear layer with the sum as its weight."""
        trainable = any(p.requires_grad for p in self.parameters())
        return linear_of(self.weight, self.bias, trainable)

    def extra_repr(self) -> str:
        """Rank and rows."""
        return f"rank={self.rank}, rows={len(self.rows)} of {self.out_size}"


def split_budget(
    kept: float, low_rank_share: float, out_features: int, in_features: int
) -> tuple[int, int]:
    r"""Rank $r$ and number of rows $k$ with $r (m + n) + k n \le \rho\, m n$.

    Args:
        kept: $\rho$, part of the weight's numbers that stay.
        low_rank_share: Part of those that goes to the factors; 0 keeps rows only, 1 factors only.
        out_features: $m$.
        in_features: $n$.

    Raises:
        ValueError: When one of the parts is out of range.
    """
    check_kept(kept)
    if not 0 <= low_rank_share <= 1:
        raise ValueError(f"low_rank_share is {low_rank_share}; it must lie between 0 and 1.")
    budget = kept * out_features * in_features
    full = min(out_features, in_features)
    limit = break_even_rank(out_features, in_features)
    rank = min(full, math.floor(low_rank_share * kept * limit + 1e-9))
    left = budget - rank * (out_features + in_features)
    rows = 0 if low_rank_share == 1 else math.floor(left / in_features + 1e-9)
    if rank == rows == 0:
        return (1, 0) if low_rank_share else (0, 1)
    return rank, min(rows, out_features)


@chooses_layers
@in_linear_form
def low_rank_plus_sparse(
    model: Model,
    kept: float,
    *,
    low_rank_share: float = 0.5,
    layers: LayerChoice = "*",
) -> Model:
    r"""Replace linear layers by a low rank and the rows of the residual with the largest norm.

    Given $U V$, those rows are the best ones: $\lVert W - U V - S \rVert_F^2$ is the sum of the
    squared norms of the rows left out.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        kept: Part of each layer's numbers that stay, in (0, 1]; 1 changes nothing.
        low_rank_share: Part of those that goes to the factors.
        layers: Name patterns of the layers.

    Returns:
        A new model with `LowRankPlusSparse` layers that shares every other tensor.

    Raises:
        ValueError: A part out of range, no fitting layer, weights that are not finite, or a model
            that is quantized or factorised already.
    """
    split_budget(kept, low_rank_share, 2, 2)  # refuses before any work
    chosen = choose_layers(model, layers)
    if kept == 1:
        return share(model)
    new = {}
    for name, layer in chosen.items():
        rank, rows = split_budget(kept, low_rank_share, *layer.weight.shape)
        start = _Splitting(layer, rank)
        score = start.sparse.weight.detach().norm(dim=1)
        new[name] = start.finished(score.topk(rows).indices.sort().values, layer)
    return replace_modules(model, new)


class _Splitting(nn.Module):
    """A layer while it is trained: all rows of S are still there, those pruned are 0."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        old = layer.weight
        W = exact(old)
        residual = W
        self.v = self.u = None
        if rank:
            factors = truncated_svd(old, rank)
            self.v = linear_of(factors.right.to(old.device, old.dtype).contiguous())
            self.u = linear_of(factors.left.to(old.device, old.dtype).contiguous())
            # Of the factors as stored, so that their rounding is made up for.
            residual = W - exact(self.u.weight) @ exact(self.v.weight)
        bias = None if layer.bias is None else layer.bias.detach()
        # A copy: what is trained in place must not be the original's.
        self.sparse = linear_of(residual.to(old.device, old.dtype, copy=True), bias)
        if bias is not None:
            self.sparse.bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.sparse(inputs)
        return outputs if self.u is None else outputs + self.u(self.v(inputs))

    def finished(self, rows: Tensor, layer: nn.Linear) -> LowRankPlusSparse:
        """The layer with only these rows of S, and the bias of the layer that it replaces."""
        S = self.sparse.weight.detach()
        m, n = S.shape
        return LowRankPlusSparse(
            S.new_zeros(m, 0) if self.u is None else self.u.weight,
            S.new_zeros(0, n) if self.v is None else self.v.weight,
            rows,
            S[rows].clone(),
            layer.bias,
            trainable=layer.weight.requires_grad,
        )


def cubic_schedule(
    step: int, steps: int, goal: float, *, initial_steps: int = 0, final_steps: int = 0
) -> float:
    r"""The part of $S$ that stays at a step.

    1 during the first $t_i$ steps, the goal $p$ during the last $t_f$, and between them
    $p + (1 - p) \bigl(1 - \frac{t - t_i}{T - t_i - t_f}\bigr)^3$: fast at first, while there is
    much to spare.

    Args:
        step: $t$, from 0.
        steps: $T$.
        goal: $p$.
        initial_steps: $t_i$.
        final_steps: $t_f$.
    """
    if step < initial_steps:
        return 1.0
    if step >= steps - final_steps:
        return goal
    done = (step - initial_steps) / (steps - initial_steps - final_steps)
    return goal + (1 - goal) * (1 - done) ** 3


class _RowPruner:
    """Scores the rows of all S while they are trained, and sets the least important ones to 0."""

    def __init__(
        self,
        layers: Mapping[str, _Splitting],
        rows: Mapping[str, int],
        beta: float,
        uncertainty: float | None,
        scope: str,
    ) -> None:
        self.weights = {name: layer.sparse.weight for name, layer in layers.items()}
        self.rows, self.beta, self.uncertainty, self.scope = rows, beta, uncertainty, scope
        self.needed = {name for name, layer in layers.items() if layer.u is None}
        zeros = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in self.weights.items()}
        self.average, self.spread = zeros, {name: z.clone() for name, z in zeros.items()}
        self.hooks = [
            weight.register_post_accumulate_grad_hook(lambda w, name=name: self.observe(name, w))
            for name, weight in self.weights.items()
        ]

    @torch.no_grad()
    def observe(self, name: str, weight: Tensor) -> None:
        """Take in the gradient of one backward pass, before the optimizer uses it."""
        sensitivity = (weight.float() * weight.grad.float()).abs()
        self.average[name].lerp_(sensitivity, 1 - self.beta)
        if self.uncertainty is not None:
            distance = (sensitivity - self.average[name]).abs()
            self.spread[name].lerp_(distance, 1 - self.uncertainty)

    def scores(self) -> dict[str, Tensor]:
        """Mean importance of each row."""
        if self.uncertainty is None:
            return {name: average.mean(1) for name, average in self.average.items()}
        return {n: (average * self.spread[n]).mean(1) for n, average in self.average.items()}

    def kept(self, part: Callable[[float], float]) -> dict[str, Tensor]:
        """Indices of the rows to keep, when goal p means to keep part(p) now."""
        scores = self.scores()
        if self.scope == "layer":
            wanted = {n: round(len(s) * part(self.rows[n] / len(s))) for n, s in scores.items()}
        else:
            width = {name: w.shape[1] for name, w in self.weights.items()}
            total = sum(w.numel() for w in self.weights.values())
            goal = sum(self.rows[name] * width[name] for name in scores) / total
            # A layer without factors keeps its best row, or nothing would be left of it.
            ranked = {
                n: s.index_fill(0, s.argmax(), torch.inf) if n in self.needed else s
                for n, s in scores.items()
            }
            wanted = _across(ranked, width, part(goal) * total + 1e-6)
        return {n: s.topk(wanted[n]).indices.sort().values for n, s in scores.items()}

    @torch.no_grad()
    def prune(self, part: Callable[[float], float]) -> None:
        for name, rows in self.kept(part).items():
            gone = torch.ones(len(self.weights[name]), dtype=torch.bool, device=rows.device)
            gone[rows] = False
            self.weights[name][gone] = 0

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


def _across(
    scores: Mapping[str, Tensor], width: Mapping[str, int], budget: float
) -> dict[str, int]:
    """How many rows each layer keeps when the best rows of all layers are taken, best first."""
    names = list(scores)
    every = torch.cat([scores[name] for name in names])
    owner = torch.cat([torch.full((len(scores[n]),), i) for i, n in enumerate(names)])
    order = every.argsort(descending=True).cpu()
    cost = torch.tensor([width[n] for n in names], dtype=torch.float64)[owner[order]].cumsum(0)
    taken = owner[order][cost <= budget]
    return {name: int((taken == i).sum()) for i, name in enumerate(names)}


@chooses_layers
def losparse(
    model: Model,
    batches: Callable[[int], Any],
    settings: TrainingSettings,
    kept: float,
    *,
    low_rank_share: float = 0.5,
    scope: str = "model",
    beta: float = 0.85,
    uncertainty: float | None = None,
    initial_steps: int | None = None,
    final_steps: int | None = None,
    loss: Loss = causal_lm_loss,
    layers: LayerChoice = "*",
    progress: bool | Callable[[int, int, float], None] = False,
) -> tuple[Model, TrainingResult]:
    r"""Train a low-rank part and a residual whose rows are pruned on the way.

    At the first step the model is what it was: $U V + S = W$. Everything but $U$, $V$ and $S$ is
    frozen.

    Args:
        model: Any module with `nn.Linear` layers; it is not changed.
        batches: See `effnb.core.training.train`.
        settings: Steps, rates, seed.
        kept: Part of the layers' numbers that stay in the end, in (0, 1).
        low_rank_share: Part of those that goes to the factors.
        scope: What competes for the rows: those of the whole "model" (as in the authors' code), or
            of each "layer".
        beta: $\beta$ of the running average, in [0, 1).
        uncertainty: Decay of the average of $|I - \bar I|$, by which the importance is multiplied
            (PLATON), in [0, 1); None leaves it out.
        initial_steps: Steps before the first row goes; a tenth by default, and at least 1.
        final_steps: Steps after the last row went; a fifth by default.
        loss: See `effnb.core.training.train`.
        layers: Name patterns of the layers.
        progress: See `effnb.core.training.train`.

    Returns:
        A new model with `LowRankPlusSparse` layers that shares every other tensor, and what came of
        the training.

    Raises:
        ValueError: A number out of range, no fitting layer, weights that are not finite, or a model
            that is quantized or factorised already.
        effnb.core.training.TrainingDiverged: See there.
    """
    split_budget(kept, low_rank_share, 2, 2)
    if kept == 1:
        raise ValueError("kept is 1: there is nothing to remove; give a part below 1.")
    if scope not in ("model", "layer"):
        raise ValueError(f'scope is {scope!r}; choose "model" or "layer".')
    for what, value in (("beta", beta), ("uncertainty", uncertainty or 0)):
        if not 0 <= value < 1:
            raise ValueError(f"{what} is {value}; it must lie in [0, 1).")
    steps = settings.steps
    initial = max(1, steps // 10) if initial_steps is None else initial_steps
    final = steps // 5 if final_steps is None else final_steps
    if initial < 1 or final < 0 or initial + final > steps:
        raise ValueError(
            f"initial_steps is {initial} and final_steps {final}; the first must be at least 1, "
            f"and both together at most the {steps} steps of the training."
        )
    chosen = choose_layers(model, layers)
    budgets = {n: split_budget(kept, low_rank_share, *m.weight.shape) for n, m in chosen.items()}
    training = replace_modules(
        freeze(model), {name: _Splitting(layer, budgets[name][0]) for name, layer in chosen.items()}
    )
    splitting = {name: training.get_submodule(name) for name in chosen}
    pruner = _RowPruner(
        splitting, {n: k for n, (_, k) in budgets.items()}, beta, uncertainty, scope
    )
    step = 0

    def pruned_loss(current: nn.Module, batch: Any) -> Tensor:
        nonlocal step
        if step >= initial:
            pruner.prune(
                lambda p: cubic_schedule(step, steps, p, initial_steps=initial, final_steps=final)
            )
        step += 1
        return loss(current, batch)

    try:
        result = train(training, batches, settings, loss=pruned_loss, progress=progress)
    finally:
        pruner.close()
    rows = pruner.kept(lambda goal: goal)
    finished = {name: splitting[name].finished(rows[name], chosen[name]) for name in chosen}
    return replace_modules(model, finished), result  # all else was frozen, and is the original's
