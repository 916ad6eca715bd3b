r"""MiniLM: only the last layer's attention, as relations, so that depth and width may differ.

Two relations of one layer are matched, each a distribution over tokens for every token and head:
attention itself, and how alike the values are,

$$L = \frac{1}{A_h |x|} \sum_{a,t} \operatorname{KL}(A^T_{a,t} \| A^S_{a,t})
    + \frac{1}{A_h |x|} \sum_{a,t} \operatorname{KL}(R^T_{a,t} \| R^S_{a,t}), \qquad
  R = \operatorname{softmax}(V V^\top / \sqrt{d_k}).$$

Both are matrices of tokens by tokens: no projection, no map of layers, and any width will do. The
number of heads must agree. MiniLMv2 drops that too: it joins all heads of Q, K or V and cuts them
into as many *relation heads* as one likes, and matches Q-Q, K-K and V-V.

Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
Transformers", 2020, arXiv 2002.10957. Relation heads: Wang et al., "MiniLMv2:
Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers", 2020,
arXiv 2012.15828.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.losses import check_teacher, kl_rows, masked_mean
from effnb.core.training import Loss
from effnb.inference.distillation.attention_record import LayerAttention, run_recorded, same_heads
from effnb.inference.distillation.tokens import Tokens, arguments


def relation(
    features: Float[Tensor, "batch heads time dim"],
    seen: Bool[Tensor, "#batch #heads time time"] | None = None,
) -> Float[Tensor, "batch heads time time"]:
    r"""$\ln \operatorname{softmax}(X X^\top / \sqrt{d})$ over the tokens that are seen."""
    scores = features @ features.transpose(-1, -2) / features.shape[-1] ** 0.5
    return _log_rows(scores, seen)


def _log_rows(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Logarithms of the rows' softmax, -inf where nothing is seen."""
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
        # A row that sees nothing is padding; it must not become NaN before it is left out.
        scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0)
    return scores.float().log_softmax(-1)


def relation_loss(
    student: Float[Tensor, "batch heads time time"],
    teacher: Float[Tensor, "batch teacher_heads time time"],
    real: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\frac{1}{A_h |x|} \sum_{a,t} \operatorname{KL}(R^T_{a,t} \| R^S_{a,t})$ of log-relations.

    Args:
        student: Logarithms of the student's relation, as `relation` gives them.
        teacher: The teacher's.
        real: True for tokens that are not padding; the others' rows do not count. Their columns
            must have been hidden when the relations were made.

    Raises:
        ValueError: Relations of other shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the relations are {tuple(student.shape)} and {tuple(teacher.shape)}; heads and "
            "tokens must agree (relation heads, MiniLMv2, make the heads agree)."
        )
    rows = kl_rows(teacher.detach(), student)  # $\mathrm{KL}(R^T_{a,t} \| R^S_{a,t})$
    mask = None if real is None else real[:, None].expand(rows.shape)
    return masked_mean(rows, mask)


def minilm_loss(
    student: LayerAttention,
    teacher: LayerAttention,
    real: Bool[Tensor, "batch time"] | None = None,
    *,
    values: bool = True,
) -> Float[Tensor, ""]:
    r"""$L_\text{AT} + L_\text{VR}$ of two attention layers.

    Args:
        student: What the student's layer computed with.
        teacher: The teacher's layer.
        real: True for tokens that are not padding, whose rows and columns both count.
        values: Whether the relation of values is matched too.

    Raises:
        ValueError: Other numbers of heads, or other tokens.
    """
    same_heads(student, teacher, "relation heads, MiniLMv2, make them agree")
    allowed = _allowed(student, real)
    own, taught = (_log_rows(x.scores(), allowed) for x in (student, teacher))
    loss = relation_loss(own, taught, real)  # $L_\mathrm{AT}$
    if values:
        pair = (relation(x.value, allowed) for x in (student, teacher))
        loss = loss + relation_loss(*pair, real)  # $L_\mathrm{VR}$
    return loss


def _allowed(layer: LayerAttention, real: Tensor | None) -> Tensor | None:
    """Pairs that count: what the layer's mask allows, padding's columns left out."""
    if real is None:
        return layer.seen
    columns = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
    return columns if layer.seen is None else layer.seen & columns


def relation_heads(
    features: Float[Tensor, "batch heads time dim"], count: int
) -> Float[Tensor, "batch count time new_dim"]:
    """Join the features of all heads and cut them into another number of heads.

    Raises:
        ValueError: When the joined width is no multiple of `count`.
    """
    joined = features.transpose(1, 2).flatten(2)
    if count < 1 or joined.shape[-1] % count:
        raise ValueError(
            f"{joined.shape[-1]} features cannot be cut into {count} relation heads of one size."
        )
    return joined.unflatten(-1, (count, -1)).transpose(1, 2)


def minilm_v2_loss(
    student: LayerAttention,
    teacher: LayerAttention,
    count: int,
    real: Bool[Tensor, "batch time"] | None = None,
    *,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Float[Tensor, ""]:
    """Q-Q, K-K and V-V relations of relation heads: the numbers of heads may differ.

    Args:
        student: What the student's layer computed with.
        teacher: The teacher's layer.
        count: Relation heads, which must divide both joined widths.
        real: True for tokens that are not padding.
        weights: Of the three relations.

    Raises:
        ValueError: A count that does not divide, or other tokens.
    """
    allowed = _allowed(student, real)
    loss = student.query.new_zeros((), dtype=torch.float32)
    parts = ("query", "key", "value")
    for part, weight in zip(parts, weights):
        pair = (
            relation(relation_heads(getattr(x, part), count), allowed) for x in (student, teacher)
        )
        loss = loss + weight * relation_loss(*pair, real)
    return loss


def minilm(
    teacher: nn.Module,
    *,
    teacher_layer: int = -1,
    student_layer: int = -1,
    values: bool = True,
    heads: int | None = None,
) -> Loss:
    """The loss of (student, batch): relations of one layer of each model.

    Args:
        teacher: A Hugging Face model in evaluation mode; it is not trained.
        teacher_layer: The teacher's attention layer; -1 is the last. For large teachers an
            upper-middle one is better (MiniLMv2).
        student_layer: The student's.
        values: Whether the relation of values is matched too.
        heads: Relation heads, for MiniLMv2's loss; None for MiniLM's.

    Raises:
        ValueError: A teacher in training mode, a layer that is not there, heads that do not agree.
    """
    check_teacher(teacher)

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        check_teacher(teacher)
        passed = {key: value for key, value in arguments(batch).items() if key != "labels"}
        _, own = run_recorded(student, **passed)
        with torch.no_grad():
            _, taught = run_recorded(teacher, **passed)
        mine, theirs = (
            _layer(own, student_layer, "student"),
            _layer(taught, teacher_layer, "teacher"),
        )
        mask = passed.get("attention_mask")
        real = None if mask is None or mask.ndim != 2 else mask != 0
        if heads is not None:
            return minilm_v2_loss(mine, theirs, heads, real)
        return minilm_loss(mine, theirs, real, values=values)

    return loss


def _layer(layers: list[LayerAttention], index: int, whose: str) -> LayerAttention:
    if not -len(layers) <= index < len(layers):
        raise ValueError(f"layer {index} is not there; the {whose} has {len(layers)}.")
    return layers[index]
