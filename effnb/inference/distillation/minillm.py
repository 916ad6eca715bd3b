r"""MiniLLM: minimize the reverse divergence over whole texts, by policy gradient.

Forward KL$(p \| q)$ punishes a student that misses anything the teacher might say, so a small
student spreads itself over what lies between. Reverse KL$(q \| p)$ punishes what the teacher would
not say: the student may leave modes out. Over sequences, with $r_t = \ln p(y_t \mid y_{<t}) -
\ln q(y_t \mid y_{<t})$ and $R_t = \sum_{t' \ge t} r_{t'}$,

$$\nabla \operatorname{KL}(q \| p) = -\mathbb{E}_{y \sim q}
  \sum_t (R_t - 1)\, \nabla \ln q(y_t \mid y_{<t}).$$

Three things steady it: the part of $r_t$ itself is computed exactly, as
$\sum_t \operatorname{KL}(q(\cdot \mid y_{<t}) \| p(\cdot \mid y_{<t}))$, and only $R_{t+1}$ is left
to chance; texts are drawn from $\tilde p = \alpha p + (1 - \alpha) q$ and weighted by
$w_t = q / \tilde p$ of each step; and $R_{t+1}$ is divided by the number of steps it sums.

Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2023, arXiv
2306.08543.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.losses import (
    check_logits,
    check_share,
    check_teacher,
    kl_rows,
    log_softened,
    masked_mean,
)
from effnb.core.training import Loss, causal_lm_loss
from effnb.inference.distillation.sampling import sample
from effnb.inference.distillation.tokens import Tokens, arguments


def reverse_kl(
    student: Float[Tensor, "*batch vocabulary"],
    teacher: Float[Tensor, "*teacher_batch teacher_vocabulary"],
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""Mean over positions of $\operatorname{KL}(q \| p)$, student to teacher, in nats.

    Raises:
        ValueError: Other vocabularies or positions.
    """
    check_logits(student, teacher)
    log_q, log_p = log_softened(student, 1.0), log_softened(teacher.detach(), 1.0)
    return masked_mean(kl_rows(log_q, log_p), mask)  # $\mathrm{KL}(q \| p)$


@dataclass(frozen=True)
class PolicyLoss:
    """The two parts of MiniLLM's loss, means over texts.

    Attributes:
        single: The divergence of each step, computed exactly.
        long: What each drawn token does to the rest of its text; its value is no divergence, its
            gradient is what counts.
    """

    single: Float[Tensor, ""] = field(repr=False)
    long: Float[Tensor, ""] = field(repr=False)

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum of both."""
        return self.single + self.long


def minillm_loss(
    student: Float[Tensor, "batch time vocabulary"],
    teacher: Float[Tensor, "batch teacher_time teacher_vocabulary"],
    labels: Int[Tensor, "batch time"],
    *,
    teacher_share: float = 0.2,
    normalized: bool = True,
    clip: float | None = 0.2,
) -> PolicyLoss:
    r"""Both parts for texts that were drawn from $\tilde p = \alpha p + (1 - \alpha) q$.

    With `normalized=False`, `teacher_share=0` and `clip=None` its gradient has exactly the
    expectation of the equation above.

    Args:
        student: Scores of the token that follows each position.
        teacher: The teacher's.
        labels: That token, -100 where nothing counts.
        teacher_share: $\alpha$, by which the texts were drawn.
        normalized: Whether $R_{t+1}$ is divided by the steps it sums, and a text's sum by its
            length.
        clip: The weight's distance from 1 up to which it has a gradient (as in PPO); None for none.

    Raises:
        ValueError: A share outside [0, 1], a clip of 0 or below, other vocabularies or positions,
            or no token that counts.
    """
    check_share("teacher_share", teacher_share)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be above 0, or None.")
    check_logits(student, teacher)
    counts = labels != -100
    if not bool(counts.any()):
        raise ValueError("no position of the batch counts; at least one token must be drawn.")
    log_q, log_p = log_softened(student, 1.0), log_softened(teacher.detach(), 1.0)
    y = labels.clamp(min=0)[..., None]
    q_y, p_y = (x.gather(-1, y)[..., 0].masked_fill(~counts, 0) for x in (log_q, log_p))
    r = (p_y - q_y).detach()  # $r_t = \ln p(y_t) - \ln q(y_t)$
    after = r.flip(1).cumsum(1).flip(1) - r  # $R_{t+1} = \sum_{t' > t} r_{t'}$
    number = counts.flip(1).cumsum(1).flip(1)
    if normalized:
        after = after / (number - 1).clamp(min=1)  # $R_{t+1} / (T - t - 1)$
    # $\tilde p = \alpha p + (1 - \alpha) q$
    mixed = q_y.detach()
    if teacher_share > 0:
        left = math.log1p(-teacher_share) if teacher_share < 1 else -math.inf
        mixed = torch.logaddexp(p_y + math.log(teacher_share), q_y.detach() + left)
    ratio = (q_y - mixed).exp()  # $w_t = q / \tilde p$, with a gradient
    # $-w_t R_{t+1}$: the gradient of the ratio is $w_t \nabla \ln q$
    gain = ratio * after
    if clip is not None:
        gain = torch.minimum(gain, ratio.clamp(1 - clip, 1 + clip) * after)
    # $w_t\, \mathrm{KL}(q(\cdot \mid y_{<t}) \| p(\cdot \mid y_{<t}))$
    steps = ratio.detach() * kl_rows(log_q, log_p)
    length = counts.sum(1).clamp(min=1) if normalized else 1
    single, long = ((x.masked_fill(~counts, 0).sum(1) / length).mean() for x in (steps, -gain))
    return PolicyLoss(single, long)


def minillm(
    teacher: nn.Module,
    *,
    teacher_share: float = 0.2,
    max_new_tokens: int = 128,
    eos: int | None = None,
    normalized: bool = True,
    clip: float | None = 0.2,
    text_weight: float = 1.0,
) -> Loss:
    r"""The loss of (student, batch): reverse divergence on drawn texts, beside plain text.

    A batch has `prompts`, token ids of one length, and may have text (`input_ids`), on which the
    language-modelling loss is added so that general ability is kept. Draws come from torch's
    generator, which `effnb.core.training.train` seeds by step.

    Args:
        teacher: A causal language model in evaluation mode; it is not trained.
        teacher_share: The teacher's part in drawing, $\alpha$.
        max_new_tokens: Tokens to draw.
        eos: The token that ends a text.
        normalized: As in `minillm_loss`.
        clip: As in `minillm_loss`.
        text_weight: Weight of the loss on plain text.

    Raises:
        ValueError: A teacher in training mode, a share outside [0, 1], or a batch without prompts.

    Source: Gu et al. 2023, algorithm 1.
    """
    check_teacher(teacher)
    check_share("teacher_share", teacher_share)

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        check_teacher(teacher)
        given = arguments(batch)
        prompts = given.pop("prompts", None)
        if prompts is None:
            raise ValueError("a batch needs `prompts` for the student to go on from.")
        ids, labels = sample(
            student, prompts, max_new_tokens, eos=eos,
            teacher=teacher, teacher_share=teacher_share,
        )  # fmt: skip
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits[:, :-1]
        own = student(input_ids=ids, use_cache=False).logits[:, :-1]
        value = minillm_loss(
            own, taught, labels[:, 1:],
            teacher_share=teacher_share, normalized=normalized, clip=clip,
        ).total  # fmt: skip
        if text_weight and "input_ids" in given:
            value = value + text_weight * causal_lm_loss(student, given)
        return value

    return loss


# ---------------------------------------------------------- both directions, in one picture


@dataclass(frozen=True)
class GaussianFit:
    """The one Gaussian that is nearest to a mixture of several.

    Attributes:
        mean: Its mean.
        std: Its standard deviation.
        divergence: What is left, in nats.
    """

    mean: float
    std: float
    divergence: float


def fit_gaussian(
    weights: Sequence[float],
    means: Sequence[float],
    stds: Sequence[float],
    direction: str = "reverse",
) -> GaussianFit:
    r"""Fit one Gaussian q to a mixture p, by forward or by reverse divergence.

    Forward KL$(p \| q)$ has its optimum in closed form: q takes the mixture's mean and variance,
    and covers everything. Reverse KL$(q \| p)$ is minimized from a start at every component, and
    settles on one of them.

    Args:
        weights: Of the components; they add up to 1.
        means: Their means.
        stds: Their standard deviations.
        direction: "forward" or "reverse".

    Raises:
        ValueError: Weights that do not add up to 1, a deviation of 0 or below, other lengths, or an
            unknown direction.
    """
    w, m, s = (torch.tensor(list(x), dtype=torch.float64) for x in (weights, means, stds))
    if not len(w) == len(m) == len(s) or not len(w):
        raise ValueError(f"there are {len(w)} weights, {len(m)} means and {len(s)} deviations.")
    if bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-9 or bool((s <= 0).any()):
        raise ValueError("weights must add up to 1, none below 0, and deviations be above 0.")
    reach = 12 * float(s.max())
    low, high = float(m.min()) - reach, float(m.max()) + reach
    grid = torch.linspace(low, high, 4001, dtype=torch.float64)
    step = (high - low) / 4000

    def log_density(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)

    log_p = (log_density(grid[:, None], m, s) + w.log()).logsumexp(1)
    if direction == "forward":
        mean = (w * m).sum()  # the mixture's first two moments
        std = ((w * (s**2 + m**2)).sum() - mean**2).sqrt()
        p = log_p.exp()
        left = (p * (log_p - log_density(grid, mean, std))).sum() * step
        return GaussianFit(float(mean), float(std), float(left))
    if direction != "reverse":
        raise ValueError(f"direction is {direction!r}; choose forward or reverse.")
    best: GaussianFit | None = None
    with torch.enable_grad():
        for start, width in zip(m, s):
            x = torch.stack([start, width.log()]).requires_grad_()
            search = torch.optim.LBFGS(
                [x], max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                line_search_fn="strong_wolfe",
            )  # fmt: skip

            def value(x: Tensor = x, search: torch.optim.Optimizer = search) -> Tensor:
                search.zero_grad()
                log_q = log_density(grid, x[0], x[1].exp())
                left = (log_q.exp() * (log_q - log_p)).sum() * step  # $\mathrm{KL}(q \| p)$
                left.backward()
                return left

            search.step(value)
            left = float(value().detach())
            mean, std = x.detach()
            found = GaussianFit(float(mean), float(std.exp()), left)
            if best is None or found.divergence < best.divergence:
                best = found
    return best
