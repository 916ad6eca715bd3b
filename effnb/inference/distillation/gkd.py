r"""GKD: the student learns on text that it wrote itself, from a divergence that one can choose.

With probability $\lambda$ a batch is the student's own continuation, otherwise the given one; no
gradient passes through the drawing. At every token the teacher's distribution p and the student's
q are compared by the generalized Jensen-Shannon divergence,

$$\operatorname{JSD}_\beta(p, q) = \beta \operatorname{KL}(p \| M) + (1 - \beta)
  \operatorname{KL}(q \| M), \qquad M = \beta p + (1 - \beta) q.$$

Its two ends are defined as what one would expect, forward KL$(p \| q)$ at $\beta = 0$ and reverse
KL$(q \| p)$ at 1, **but it does not go there**: near the ends it falls to 0. What does converge is
$\operatorname{JSD}_\beta / \beta \to \operatorname{KL}(p \| q)$ and
$\operatorname{JSD}_\beta / (1 - \beta) \to \operatorname{KL}(q \| p)$. So `rescaled_jsd` divides
by $\beta (1 - \beta)$: continuous over the whole range, with both KLs at its ends.

Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
2023, arXiv 2306.13649, section 3; the ends as in the TRL library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.losses import (
    check_logits,
    check_share,
    check_teacher,
    check_temperature,
    kl_rows,
    log_softened,
    masked_mean,
)
from effnb.core.training import Loss
from effnb.inference.distillation.sampling import sample
from effnb.inference.distillation.tokens import Tokens, arguments, said, teach


def jsd_rows(
    log_p: Float[Tensor, "*batch classes"], log_q: Float[Tensor, "*batch classes"], beta: float
) -> Float[Tensor, "*batch"]:
    r"""$\operatorname{JSD}_\beta(p, q)$ of each row, from log-probabilities, in nats.

    At $\beta = 0$ it is KL(p ‖ q) and at 1 KL(q ‖ p), by definition and not as a limit.

    Raises:
        ValueError: A $\beta$ outside [0, 1].
    """
    check_share("beta", beta)
    if beta == 0:
        return kl_rows(log_p, log_q)  # forward: $\mathrm{KL}(p \| q)$
    if beta == 1:
        return kl_rows(log_q, log_p)  # reverse: $\mathrm{KL}(q \| p)$
    # $M = \beta p + (1 - \beta) q$
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    # $\beta\, \mathrm{KL}(p \| M) + (1 - \beta)\, \mathrm{KL}(q \| M)$
    return beta * kl_rows(log_p, log_m) + (1 - beta) * kl_rows(log_q, log_m)


def generalized_jsd(
    student: Float[Tensor, "*batch vocabulary"],
    teacher: Float[Tensor, "*teacher_batch teacher_vocabulary"],
    beta: float = 0.5,
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""Mean over the positions that count of $\operatorname{JSD}_\beta(p, q)$, in nats.

    Args:
        student: Scores of the student, q.
        teacher: Scores of the teacher, p; no gradient reaches it.
        beta: The weight of the teacher in the mixture.
        temperature: Divides both; there is no factor $\tau^2$ here.
        mask: True at the positions that count; all when None.

    Raises:
        ValueError: A $\beta$ outside [0, 1], a temperature of 0 or below, scores that do not fit.
    """
    check_share("beta", beta)
    log_p, log_q = _both(student, teacher, temperature)
    return masked_mean(jsd_rows(log_p, log_q, beta), mask)


def rescaled_jsd(
    student: Float[Tensor, "*batch vocabulary"],
    teacher: Float[Tensor, "*teacher_batch teacher_vocabulary"],
    beta: float = 0.5,
    *,
    temperature: float = 1.0,
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\operatorname{JSD}_\beta(p, q) / (\beta (1 - \beta))$, continuous on all of [0, 1].

    It is the workbook's own scale for a slider over $\beta$; the ends are the two KLs.

    Raises:
        ValueError: As `generalized_jsd`.
    """
    check_share("beta", beta)
    near = min(beta, 1 - beta)
    if near < 1e-8:  # the quotient is the limit to eight digits; computed, rounding would drown it
        return generalized_jsd(student, teacher, round(beta), temperature=temperature, mask=mask)
    if near < 0.01 and student.device.type != "mps":
        student, teacher = student.double(), teacher.double()
    value = generalized_jsd(student, teacher, beta, temperature=temperature, mask=mask)
    return value / (beta * (1 - beta))


def _both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student in one type."""
    check_temperature(temperature)
    check_logits(student, teacher)
    log_p, log_q = log_softened(teacher.detach(), temperature), log_softened(student, temperature)
    wide = torch.promote_types(log_p.dtype, log_q.dtype)
    return log_p.to(wide), log_q.to(wide)


def jsd_curve(
    student: Float[Tensor, " classes"],
    teacher: Float[Tensor, " classes"],
    betas: Sequence[float],
) -> list[dict[str, float]]:
    r"""The divergence over $\beta$, with what it approaches: the jump at both ends, in numbers.

    Args:
        student: Scores of one position; double precision shows the ends best.
        teacher: The teacher's.
        betas: Values in [0, 1].

    Returns:
        For each: "beta", "jsd" as defined, "rescaled", and the "forward" and "reverse" KL.

    Raises:
        ValueError: A $\beta$ outside [0, 1], or scores that do not fit.
    """
    forward = float(generalized_jsd(student, teacher, 0.0))
    reverse = float(generalized_jsd(student, teacher, 1.0))
    return [
        {
            "beta": float(beta),
            "jsd": float(generalized_jsd(student, teacher, beta)),
            "rescaled": float(rescaled_jsd(student, teacher, beta)),
            "forward": forward,
            "reverse": reverse,
        }
        for beta in betas
    ]


def gkd(
    teacher: nn.Module,
    *,
    beta: float = 0.5,
    on_policy: float = 0.5,
    temperature: float = 0.9,
    max_new_tokens: int = 128,
    eos: int | None = None,
    rescaled: bool = False,
) -> Loss:
    r"""The loss of (student, batch), on the student's own text with probability $\lambda$.

    A batch is given text (ids; (ids, labels); or arguments), with `prompts`, token ids of one
    length, for the student to go on from. Draws come from torch's generator, which
    `effnb.core.training.train` seeds by step. Tokens of the prompt do not count.

    Args:
        teacher: A causal language model in evaluation mode; it is not trained.
        beta: As in `generalized_jsd`.
        on_policy: $\lambda$, the share of batches that the student writes itself.
        temperature: Of both distributions, and of the drawing.
        max_new_tokens: Tokens that the student writes.
        eos: The token that ends its text.
        rescaled: Whether the divergence is that of `rescaled_jsd`.

    Raises:
        ValueError: A teacher in training mode, a share outside [0, 1], a temperature of 0 or below,
            or a batch without the prompts that are needed.

    Source: Agarwal et al. 2023, algorithm 1.
    """
    check_teacher(teacher)
    check_share("beta", beta)
    check_share("on_policy", on_policy)
    check_temperature(temperature)
    divergence = rescaled_jsd if rescaled else generalized_jsd

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        check_teacher(teacher)
        given = arguments(batch)
        prompts = given.pop("prompts", None)
        if on_policy > 0 and prompts is None:
            raise ValueError("a batch needs `prompts` for the student to go on from.")
        if on_policy > 0 and float(torch.rand(())) < on_policy:
            ids, labels = sample(student, prompts, max_new_tokens, temperature=temperature, eos=eos)
            given = {"input_ids": ids, "labels": labels}
        own, taught = said(student, given), teach(teacher, given)
        return divergence(own.logits, taught.logits, beta, temperature=temperature)

    return loss
