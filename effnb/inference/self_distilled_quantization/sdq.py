r"""Self-distilled quantization: a model with rounded weights learns from itself unrounded.

The teacher is the fine-tuned model, the student a copy of it whose weights are rounded while it
trains. It learns the labels, the teacher's answers, and what the teacher's self-attention computes,
layer by layer and head by head:

$$\ell = \operatorname{CE}(y, z^S) + \beta\, \tau^2 \operatorname{KL}(p^\tau \| q^\tau)
  + \frac{\alpha}{L H} \sum_{l=1}^{L} \sum_{h=1}^{H} d(A^S_{l,h}, A^T_{l,h}).$$

O'Neill and Dutta, "Self-Distilled Quantization: Achieving High Compression Rates in
Transformer-Based Language Models", 2023, arXiv 2307.05972. They published no code, and the exact
form of their loss could not be checked here. Two choices are ours: for the squared error, $A_{l,h}$
is a head's context vectors, $\operatorname{softmax}(Q K^\top / \sqrt{d}) V$ before the output
projection; for the divergence, it is the attention distributions, row by row. In place of
attention, or beside it, hidden states can be matched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.calibration import main_output
from effnb.core.losses import (
    check_teacher,
    check_temperature,
    kl_rows,
    masked_mean,
    temperature_kl,
)
from effnb.core.modules import find_blocks, share
from effnb.core.training import Loss
from effnb.inference.distillation.attention_record import LayerAttention, run_recorded, same_heads

Batch = Mapping[str, Tensor]
DISTANCES = ("mse", "kl")
VARIANTS = {
    "labels": {"beta": 0.0},
    "output": {},
    "attention-mse": {"attention": "mse"},
    "attention-kl": {"attention": "kl"},
    "hidden": {"hidden": 1.0},
    "attention-hidden": {"attention": "mse", "hidden": 1.0},
}
"""What is matched beside the labels, by name: arguments of `sdq`."""


@dataclass(frozen=True)
class Reading:
    """What a model computed for one batch.

    Attributes:
        logits: The answers, (batch, classes).
        attention: What every attention layer computed with, first layer first.
        hidden: The output of every block, (batch, time, dim) each.
        real: True for tokens that are not padding.
    """

    logits: Float[Tensor, "batch classes"]
    attention: list[LayerAttention] = field(repr=False)
    hidden: list[Float[Tensor, "batch time dim"]] = field(repr=False)
    real: Bool[Tensor, "batch time"] = field(repr=False)


def read(model: nn.Module, batch: Batch, *, inner: bool = True) -> Reading:
    """Run a classifier on a batch, and note what its attention and its blocks computed.

    Args:
        model: A classifier over a transformer of the transformers library whose forward pass gives
            logits, or an object with `.logits`. It is not changed; gradients reach its parameters.
        batch: `input_ids`, `attention_mask` and so on; labels are not passed on.
        inner: Whether to note anything beside the answers, which takes time.

    Raises:
        ValueError: When the model computes attention in its own way, so that it cannot be noted.
    """
    given = {key: tensor for key, tensor in batch.items() if key != "labels"}
    ids = given["input_ids"]
    mask = given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if not inner:
        return Reading(_logits(model(**given)), [], [], real)
    watched, hidden = share(model), []
    for block in find_blocks(watched)[1]:
        block.register_forward_hook(lambda _, __, output: hidden.append(main_output(output)))
    output, attention = run_recorded(watched, **given)
    return Reading(_logits(output), attention, hidden, real)


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def log_attention(layer: LayerAttention) -> Float[Tensor, "batch heads time keys"]:
    r"""$\ln \operatorname{softmax}(Q K^\top / \sqrt{d})$, -inf for pairs that the mask hides."""
    scores = layer.scores()
    if layer.seen is not None:
        scores = scores.masked_fill(~layer.seen, float("-inf"))
        # A row that sees nothing belongs to padding; it must not become NaN.
        scores = scores.masked_fill(~layer.seen.any(-1, keepdim=True), 0)
    return scores.float().log_softmax(-1)


def context_vectors(layer: LayerAttention) -> Float[Tensor, "batch heads time dim"]:
    r"""$A_h = \operatorname{softmax}(Q_h K_h^\top / \sqrt{d})\, V_h$: what each head puts out."""
    return log_attention(layer).exp().to(layer.value.dtype) @ layer.value


def attention_distance(
    student: LayerAttention,
    teacher: LayerAttention,
    real: Bool[Tensor, "batch time"],
    distance: str = "mse",
) -> Float[Tensor, ""]:
    r"""$\frac1H \sum_h d(A^S_h, A^T_h)$ of one layer, the mean over real tokens.

    "mse" compares context vectors: the mean square over tokens and the numbers of a head. "kl"
    compares attention: $\operatorname{KL}(A^T_{h,t} \| A^S_{h,t})$ of each row. No gradient reaches
    the teacher.

    Raises:
        ValueError: An unknown distance, other numbers of heads, or other tokens.
    """
    if distance not in DISTANCES:
        raise ValueError(f"the distance is {distance!r}; choose {' or '.join(DISTANCES)}.")
    same_heads(student, teacher, "a model and its quantized copy always do")
    if distance == "mse":
        ours, theirs = context_vectors(student), context_vectors(teacher).detach()
        rows = (ours - theirs).square().mean(-1)  # $d = \mathrm{MSE}$ over a head's numbers
    else:
        rows = kl_rows(log_attention(teacher).detach(), log_attention(student))
    return masked_mean(rows, real[:, None].expand(rows.shape))


def hidden_distance(
    student: Float[Tensor, "batch time dim"],
    teacher: Float[Tensor, "batch time2 dim2"],
    real: Bool[Tensor, "batch time"],
) -> Float[Tensor, ""]:
    r"""$\operatorname{MSE}(H^S_l, H^T_l)$ of one block's output, over real tokens.

    Raises:
        ValueError: States of other shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's states are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; self-distillation compares a model with itself."
        )
    return masked_mean((student - teacher.detach()).square().mean(-1), real)


def sdq_terms(
    student: Reading,
    teacher: Reading,
    labels: Tensor | None = None,
    *,
    attention: str | None = "mse",
    temperature: float = 1.0,
) -> dict[str, Float[Tensor, ""]]:
    r"""The parts of the loss, none of them weighted.

    Returns:
        "labels" (where labels are given), "output" ($\tau^2 \operatorname{KL}$), and, where inner
        values were noted, "hidden" and "attention", each the mean over layers.

    Raises:
        ValueError: Models of other depths, and what the parts refuse.
    """
    if len(student.attention) != len(teacher.attention):
        raise ValueError(
            f"the student has {len(student.attention)} attention layers and the teacher "
            f"{len(teacher.attention)}; self-distillation compares a model with itself."
        )
    terms = {"output": temperature_kl(student.logits, teacher.logits, temperature)}
    if labels is not None:
        terms["labels"] = nn.functional.cross_entropy(student.logits.float(), labels)
    if student.hidden and teacher.hidden:
        pairs = zip(student.hidden, teacher.hidden, strict=True)
        layers = [hidden_distance(ours, theirs, student.real) for ours, theirs in pairs]
        terms["hidden"] = torch.stack(layers).mean()
    if attention is not None and student.attention:
        # $\frac{1}{L H} \sum_{l,h} d(A^S_{l,h}, A^T_{l,h})$
        pairs = zip(student.attention, teacher.attention, strict=True)
        layers = [
            attention_distance(ours, theirs, student.real, attention) for ours, theirs in pairs
        ]
        terms["attention"] = torch.stack(layers).mean()
    return terms


def sdq(
    teacher: nn.Module,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 1.0,
    attention: str | None = None,
    hidden: float = 0.0,
    labels: float = 1.0,
) -> Loss:
    r"""The loss of (student, batch) for self-distilled quantization.

    Args:
        teacher: The fine-tuned model in full precision, in evaluation mode; it is not trained.
        alpha: $\alpha$, the weight of attention.
        beta: $\beta$, the weight of the teacher's answers.
        temperature: $\tau$, above 0, for the answers.
        attention: "mse" (context vectors), "kl" (attention distributions), or None.
        hidden: The weight of the blocks' outputs.
        labels: The weight of the labels; 0 where the batch has none.

    Raises:
        ValueError: A teacher in training mode, a weight below 0 or no weight above it, an unknown
            distance, a temperature of 0 or below; and, at the first batch, models that do not fit.
    """
    check_teacher(teacher)
    check_temperature(temperature)
    if attention is not None and attention not in DISTANCES:
        raise ValueError(f"attention is {attention!r}; choose {', '.join(DISTANCES)} or None.")
    weights = {
        "labels": labels,
        "output": beta,
        "hidden": hidden,
        "attention": alpha if attention else 0.0,
    }
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"the weight of {name} is {weight}; it must be a number from 0.")
    if not any(weights.values()):
        raise ValueError("all weights are 0, so there is nothing to learn; raise one above 0.")
    inner = bool(weights["hidden"] or weights["attention"])
    asked = inner or bool(beta)

    def loss(student: nn.Module, batch: Batch) -> Tensor:
        if labels and "labels" not in batch:
            raise ValueError("the batch has no labels; give them, or set the weight labels=0.")
        ours = read(student, batch, inner=inner)
        target = batch["labels"] if labels else None
        if not asked:  # the teacher does not run where nothing is taken from it
            return labels * nn.functional.cross_entropy(ours.logits.float(), target)
        check_teacher(teacher)
        with torch.no_grad():
            theirs = read(teacher, batch, inner=inner)
        found = sdq_terms(
            ours,
            theirs,
            target,
            attention=attention if weights["attention"] else None,
            temperature=temperature,
        )
        return sum(weights[name] * term for name, term in found.items() if weights[name])

    return loss


def variant(teacher: nn.Module, name: str, **settings: Any) -> Loss:
    """The loss of a named variant, one of `VARIANTS`; settings are those of `sdq`.

    Raises:
        ValueError: When there is none of that name.
    """
    if name not in VARIANTS:
        raise ValueError(f"there is no variant {name!r}; choose one of {', '.join(VARIANTS)}.")
    return sdq(teacher, **{**settings, **VARIANTS[name]})
