"""Losses that methods share: cross-entropy in little memory, and the softened one of a teacher.

Distillation compares a student's scores with a teacher's. What every such loss needs is here: the
divergence at a temperature, means over the positions that count, and the sentences that refuse what
cannot be compared.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss, chunk by chunk: logits of one chunk live at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights, chunk):
        total = hidden.new_zeros((), dtype=torch.float32)
        norm = token_weights.sum()
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight)
        for begin in range(0, len(hidden), chunk):
            part = slice(begin, begin + chunk)
            h, y, w = hidden[part], targets[part], token_weights[part]
            log_p = nn.functional.log_softmax((h @ weight.T).float(), -1)  # (chunk, vocabulary)
            total -= (w * log_p.gather(1, y[:, None])[:, 0]).sum()
            gradient = log_p.exp_()  # d loss / d logits = w (p - onehot(y)) / Σw
            gradient[torch.arange(len(y), device=y.device), y] -= 1
            gradient *= (w / norm)[:, None]
            gradient = gradient.to(hidden.dtype)
            hidden_gradient[part] = gradient @ weight
            weight_gradient.addmm_(gradient.T, h)
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / norm

    @staticmethod
    def backward(ctx, grad):
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return hidden_gradient * grad, weight_gradient * grad, None, None, None


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens dim"],
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, " tokens"],
    token_weights: Float[Tensor, " tokens"] | None = None,
    chunk: int = 512,
) -> Float[Tensor, ""]:
    r"""Cross-entropy of an output head without storing its logits.

    $\sum_t w_t \left(-\log \operatorname{softmax}(W h_t)_{y_t}\right) / \sum_t w_t$, in nats. Equal
    to computing all logits first, in $c / T$ of their memory for chunks of $c$ of $T$ tokens. The
    gradients for `hidden` and `weight` are made in the forward pass, so it cannot be
    differentiated twice.

    Args:
        hidden: States before the head.
        weight: The head's matrix, without a bias.
        targets: The token that each state should predict.
        token_weights: Weight $w_t$ of each token; 1 where None.
        chunk: Tokens whose logits exist at once.

    Raises:
        ValueError: When the weights add up to 0 or less, or `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1.")
    if token_weights is None:
        token_weights = torch.ones(len(targets), device=hidden.device)
    if not float(token_weights.sum()) > 0:
        raise ValueError("the weights of the tokens add up to nothing; at least one must count.")
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights, chunk)


# ---------------------------------------------------------------------------------- distillation


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that softens nothing.

    Raises:
        ValueError: When it is 0, negative or not a finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be a finite number above 0.")


def check_share(name: str, value: float) -> None:
    """Refuse a mixing weight outside [0, 1].

    Raises:
        ValueError: The sentence has the number.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1.")


def check_teacher(teacher: nn.Module) -> None:
    """Refuse a teacher in training mode, where dropout makes its answers random.

    Raises:
        ValueError: When the teacher, or any module in it, is in training mode.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError(
            "the teacher is in training mode, where dropout changes its answers from one call to "
            "the next; call teacher.eval() first."
        )


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse scores of student and teacher that cannot be compared one by one.

    Raises:
        ValueError: When they are of other classes (the last size) or of other positions.
    """
    if not student.ndim or not teacher.ndim or student.shape[-1] != teacher.shape[-1]:
        sizes = [x.shape[-1] if x.ndim else 0 for x in (student, teacher)]
        raise ValueError(
            f"the student scores {sizes[0]} classes and the teacher {sizes[1]}; both must have one "
            "vocabulary (distillation.uld_loss compares models with different ones)."
        )
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student has scores for positions {tuple(student.shape[:-1])} and the teacher for "
            f"{tuple(teacher.shape[:-1])}; both must read the same sequences at the same length."
        )


def masked_mean(
    values: Float[Tensor, "*positions"], mask: Bool[Tensor, "*masked"] | None = None
) -> Float[Tensor, ""]:
    r"""$\sum_t m_t v_t / \sum_t m_t$, the mean over the positions that count.

    Raises:
        ValueError: When the mask has another shape than the values, or counts nothing.
    """
    if mask is not None:
        if mask.shape != values.shape:
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}; the positions are {tuple(values.shape)}."
            )
        # Selected, not multiplied: what padding holds may be infinite.
        values = values[mask]
    if not values.numel():
        raise ValueError("no position counts; at least one must.")
    return values.mean()


def kl_rows(
    log_p: Float[Tensor, "*batch classes"], log_q: Float[Tensor, "*batch classes"]
) -> Float[Tensor, "*batch"]:
    r"""$\operatorname{KL}(p \| q) = \sum_c p_c (\ln p_c - \ln q_c)$ of each row, in nats.

    A class that p excludes adds nothing, whatever q says of it; one that q excludes and p does not
    makes the divergence infinite.
    """
    p = log_p.exp()
    rows = (p * (log_p - log_q)).sum(-1)
    if not bool(rows.isnan().any()):
        return rows
    # Both logarithms may be -inf, and inf - inf is no number: such terms are made 0 beforehand.
    gone = p == 0
    return (p * (log_p.masked_fill(gone, 0) - log_q.masked_fill(gone, 0))).sum(-1)


def log_softened(
    logits: Float[Tensor, "*batch classes"], temperature: float
) -> Float[Tensor, "*batch classes"]:
    r"""$\ln \operatorname{softmax}(z / \tau)$.

    In float32 at least, and above a temperature of 10 in float64, where the device has it: the
    divergence of two such rows is the small difference of numbers near $\ln N$, and float32 would
    lose it (at $\tau = 1000$ it gives 0.21 where 0.33 is right).
    """
    check_temperature(temperature)
    narrow = temperature <= 10 or logits.device.type == "mps"
    wide = torch.float32 if narrow and logits.dtype != torch.float64 else torch.float64
    return (logits.to(wide) / temperature).log_softmax(-1)


def temperature_kl(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*teacher_batch teacher_classes"],
    temperature: float = 1.0,
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\tau^2 \operatorname{KL}(p^\tau \| q^\tau)$, the mean over positions, in nats.

    $p^\tau = \operatorname{softmax}(v / \tau)$ of the teacher's scores v, $q^\tau$ of the
    student's. The factor $\tau^2$ keeps the gradient's size when the temperature changes. No
    gradient reaches the teacher.

    Args:
        student: Scores (logits) of the student.
        teacher: Scores of the teacher for the same classes and positions.
        temperature: $\tau$, above 0; both sides are softened by it.
        mask: True at the positions that count; all when None.

    Raises:
        ValueError: A temperature of 0 or below, or scores of other classes or positions.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv
    1503.02531, sections 2 and 2.1.
    """
    check_temperature(temperature)
    check_logits(student, teacher)
    log_p = log_softened(teacher.detach(), temperature)  # $p^\tau = \mathrm{softmax}(v / \tau)$
    log_q = log_softened(student, temperature)  # $q^\tau = \mathrm{softmax}(z / \tau)$
    wide = torch.promote_types(log_p.dtype, log_q.dtype)
    log_p, log_q = log_p.to(wide), log_q.to(wide)
    # $\tau^2\, \mathrm{KL}(p^\tau \| q^\tau)$
    return temperature**2 * masked_mean(kl_rows(log_p, log_q), mask)
