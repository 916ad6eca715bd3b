r"""Teacher-guided training: let the teacher's generator make inputs, and the teacher label them.

A teacher that knows how data look (an encoder and a decoder) can make more of them. A real input is
encoded, moved in the latent space, decoded, and labelled by the teacher, not by the label of the
input that it came from:

$$z = \operatorname{Enc}(x), \quad x' = \operatorname{Dec}(z + \nu), \quad y' = h_T(x').$$

$\nu$ is random, $\mathcal{N}(0, s^2 I)$; or it is sought where student and teacher disagree, by a
few steps up the gradient of $\operatorname{KL}(h_T(\operatorname{Dec}(z + \nu)) \|
h_S(\operatorname{Dec}(z + \nu)))$ with $\lVert \nu \rVert \le \rho$. The student learns from
labels, from the teacher on the same inputs, and from the teacher on the made ones. Noise in the
inputs themselves leaves the surface that the data lie on; noise in the latent space moves along it.

Zaheer, Rawat, Kim, You, Jain, Veit, Fergus, Kumar, "Teacher Guided Training: An Efficient Framework
for Knowledge Transfer", 2022, arXiv 2208.06825; the notation is the workbook's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_teacher, kl_rows, temperature_kl
from effnb.inference.distillation.hinton import hinton_loss

Map = Callable[[Tensor], Tensor]
"""An encoder, a decoder, or a model as a function from a batch to a batch."""


@dataclass(frozen=True)
class PrincipalComponents:
    """The flat surface nearest to the data, as encoder and decoder: a generator of one line.

    Attributes:
        mean: (features,).
        directions: (dim, features), orthonormal rows.
        deviations: (dim,), the data's standard deviation along each.
    """

    mean: Float[Tensor, " features"] = field(repr=False)
    directions: Float[Tensor, "dim features"] = field(repr=False)
    deviations: Float[Tensor, " dim"] = field(repr=False)

    @classmethod
    def fit(cls, data: Float[Tensor, "examples features"], dim: int) -> PrincipalComponents:
        """Fit to data.

        Raises:
            ValueError: A dimension below 1, or above what the data span.
        """
        most = min(len(data) - 1, data.shape[1])
        if not 1 <= dim <= most:
            raise ValueError(f"dim is {dim}; with this data it must lie between 1 and {most}.")
        mean = data.mean(0)
        _, singular, rows = torch.linalg.svd(data - mean, full_matrices=False)
        return cls(mean, rows[:dim], singular[:dim] / math.sqrt(len(data) - 1))

    def encode(self, x: Float[Tensor, "examples features"]) -> Float[Tensor, "examples dim"]:
        """Coordinates in units of the data's deviation: noise of 1 reaches as far as the data."""
        return (x - self.mean) @ self.directions.T / self.deviations

    def decode(self, z: Float[Tensor, "examples dim"]) -> Float[Tensor, "examples features"]:
        """The point of the surface."""
        return (z * self.deviations) @ self.directions + self.mean

    def distance(self, x: Float[Tensor, "examples features"]) -> Float[Tensor, " examples"]:
        """How far an input lies from the surface."""
        return (x - self.decode(self.encode(x))).norm(dim=1)


def random_noise(
    latent: Float[Tensor, "examples dim"],
    scale: float,
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "examples dim"]:
    r"""$\nu \sim \mathcal{N}(0, s^2 I)$.

    Raises:
        ValueError: A negative scale.
    """
    if not scale >= 0:
        raise ValueError(f"scale is {scale}; it must not be negative.")
    return scale * torch.randn(latent.shape, generator=generator, dtype=latent.dtype).to(latent)


def disagreement(
    student: Float[Tensor, "examples classes"], teacher: Float[Tensor, "examples classes"]
) -> Float[Tensor, " examples"]:
    r"""$\operatorname{KL}(h_T \| h_S)$ of each example, from the scores of both."""
    return kl_rows(teacher.log_softmax(-1), student.log_softmax(-1))


def gradient_noise(
    latent: Float[Tensor, "examples dim"],
    decode: Map,
    student: Map,
    teacher: Map,
    *,
    radius: float,
    steps: int = 5,
    start: float = 0.1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "examples dim"]:
    r"""Noise that raises the disagreement of student and teacher, within a ball.

    From a small random start, each step goes $2\rho / n$ along the normalized gradient and back
    into the ball $\lVert \nu \rVert \le \rho$. Of the points passed, each example keeps its best.

    Args:
        latent: z.
        decode: From latent points to inputs, differentiable.
        student: From inputs to scores.
        teacher: From inputs to scores.
        radius: $\rho$.
        steps: n, how many steps to take.
        start: Length of the random start, in radii.
        generator: Where the start comes from.

    Raises:
        ValueError: A radius or a number of steps that is not above 0.
    """
    if not radius > 0 or steps < 1:
        raise ValueError(f"radius is {radius} and steps {steps}; both must be above 0.")
    noise = random_noise(latent, 1.0, generator=generator)
    noise = start * radius * nn.functional.normalize(noise, dim=-1)
    best, highest = noise, torch.full_like(latent[:, 0], -torch.inf)
    latent = latent.detach()
    with torch.enable_grad():
        for step in range(steps + 1):
            noise = noise.detach().requires_grad_()
            made = decode(latent + noise)
            # $\mathrm{KL}(h_T(\mathrm{Dec}(z + \nu)) \| h_S(\mathrm{Dec}(z + \nu)))$
            found = disagreement(student(made), teacher(made))
            better = found.detach() > highest
            best = torch.where(better[:, None], noise.detach(), best)
            highest = torch.where(better, found.detach(), highest)
            if step == steps:
                break
            (gradient,) = torch.autograd.grad(found.sum(), noise)
            moved = noise + 2 * radius / steps * nn.functional.normalize(gradient, dim=-1)
            length = moved.norm(dim=-1, keepdim=True)
            noise = moved * (radius / length.clamp(min=radius))  # back into the ball
    return best


@dataclass(frozen=True)
class Made:
    r"""Inputs that a generator made, with the teacher's answers.

    Attributes:
        inputs: x'.
        teacher: The teacher's scores of them.
        noise: The $\nu$ of each.
    """

    inputs: Tensor = field(repr=False)
    teacher: Float[Tensor, "examples classes"] = field(repr=False)
    noise: Float[Tensor, "examples dim"] = field(repr=False)


def make_inputs(
    inputs: Tensor,
    encode: Map,
    decode: Map,
    student: nn.Module,
    teacher: nn.Module,
    *,
    scale: float = 0.5,
    by: str = "random",
    steps: int = 5,
    generator: torch.Generator | None = None,
) -> Made:
    r"""Encode, move, decode, and let the teacher label.

    Args:
        inputs: Real inputs x.
        encode: Enc.
        decode: Dec; the gradient passes through it.
        student: From inputs to scores.
        teacher: From inputs to scores, in evaluation mode.
        scale: s, the noise of each latent direction; by gradient, the ball has the radius
            $s \sqrt{d}$, which is the usual length of such noise.
        by: "random" or "gradient".
        steps: As in `gradient_noise`.
        generator: Where the draws come from.

    Raises:
        ValueError: A teacher in training mode, a negative scale, or an unknown way.
    """
    check_teacher(teacher)
    if by not in ("random", "gradient"):
        raise ValueError(f"by is {by!r}; choose random or gradient.")
    with torch.no_grad():
        latent = encode(inputs)
    if by == "random" or scale == 0:
        noise = random_noise(latent, scale, generator=generator)
    else:
        training = student.training
        student.eval()  # the search must not see dropout
        try:
            noise = gradient_noise(
                latent, decode, student, teacher,
                radius=scale * math.sqrt(latent.shape[-1]), steps=steps, generator=generator,
            )  # fmt: skip
        finally:
            student.train(training)
    with torch.no_grad():
        made = decode(latent + noise)  # $x' = \mathrm{Dec}(z + \nu)$
        return Made(made, teacher(made), noise)  # $y' = h_T(x')$, never the label of x


def teacher_guided_loss(
    student: nn.Module,
    inputs: Tensor,
    labels: Int[Tensor, " examples"],
    teacher_scores: Float[Tensor, "examples classes"],
    made: Made,
    *,
    temperature: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Float[Tensor, ""]:
    r"""$\operatorname{CE}(x, y) + w_1 \operatorname{KL}(x) + w_2 \operatorname{KL}(x')$.

    Args:
        student: From inputs to scores.
        inputs: Real inputs.
        labels: Their classes.
        teacher_scores: The teacher's scores of them.
        made: What `make_inputs` made.
        temperature: $\tau$ of both divergences.
        weights: $w_1$, $w_2$; none negative.

    Raises:
        ValueError: A temperature of 0 or below, a negative weight, or scores that do not fit.
    """
    if min(weights) < 0:
        raise ValueError(f"weights are {weights}; none may be negative.")
    scores = student(inputs)
    loss = nn.functional.cross_entropy(scores, labels)
    if weights[0]:
        loss = loss + weights[0] * hinton_loss(
            scores, teacher_scores, temperature=temperature, weight=1.0
        )
    if weights[1]:
        loss = loss + weights[1] * temperature_kl(student(made.inputs), made.teacher, temperature)
    return loss
