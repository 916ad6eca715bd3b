r"""Supervision complexity: how hard a teacher's answers are *for this student*.

A small network near its start learns as a kernel machine does, with its neural tangent kernel

$$K_{ij} = \frac1C \sum_c \nabla_\theta f_c(x_i) \cdot \nabla_\theta f_c(x_j).$$

Targets Y cost it $\operatorname{SC}(Y; K) = \operatorname{tr}(Y^\top K^{-1} Y)$, the squared norm
of the smallest function that fits them: little along directions that the kernel has plenty of, much
along the others. What bounds the error of the fitted student grows with
$\sqrt{\operatorname{SC} \cdot \operatorname{tr} K} / n$. Labels with noise are complex; a teacher
early in its training is simple and grows more complex step by step; a higher temperature makes it
simpler. When the teacher is far larger than the student, its answers are to the student almost as
random labels are. Hence *online distillation*: learn from the teacher's early states first.

Harutyunyan, Rawat, Menon, Kim, Kumar, "Supervision Complexity and its Role in Knowledge
Distillation", 2023, arXiv 2301.12245; the constant of its bound is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from effnb.core.losses import log_softened
from effnb.core.modules import matches

Outputs = Callable[[nn.Module, Tensor], Tensor]
"""From a model and inputs to scores of shape (examples, classes)."""


def tangent_kernel(
    model: nn.Module,
    inputs: Tensor,
    *,
    others: Tensor | None = None,
    outputs: Outputs | None = None,
    parameters: str | Iterable[str] = "*",
    chunk: int | None = None,
) -> Float[Tensor, "examples others"]:
    r"""The student's neural tangent kernel, averaged over classes (the "pseudo-NTK").

    $K_{ij} = \frac1C \sum_c \nabla_\theta f_c(x_i) \cdot \nabla_\theta f_c(x_j)$. The gradients of
    one class for all examples are held at once: examples × parameters numbers.

    Args:
        model: The student; it is not changed, and is read as in evaluation mode.
        inputs: (examples, …).
        others: Inputs of the second argument; the same when None.
        outputs: From (model, inputs) to scores (examples, classes); `model(inputs)` when None.
        parameters: Patterns of the names of parameters that count, all by default.
        chunk: Examples whose gradients are computed at once; all when None.

    Raises:
        ValueError: No example, or no parameter that fits the patterns.
    """
    if not len(inputs):
        raise ValueError("there is no example; give at least one.")
    chosen = {n: p.detach() for n, p in model.named_parameters() if matches(n, parameters)}
    if not chosen:
        raise ValueError(f"no parameter fits {parameters}; see model.named_parameters().")
    rest = {n: p.detach() for n, p in model.named_parameters() if n not in chosen}
    rest |= {n: b.detach() for n, b in model.named_buffers()}
    holder = _Scores(model, outputs)

    def score(theta: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
        state = {f"model.{name}": value for name, value in {**rest, **theta}.items()}
        scores = functional_call(holder, state, (x[None],))[0]
        return (scores * nn.functional.one_hot(c, scores.shape[0])).sum()

    gradients = vmap(grad(score), in_dims=(None, 0, None), chunk_size=chunk)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            classes = holder(inputs[:1]).shape[1]
        kernel = 0.0
        for c in range(classes):
            at = torch.tensor(c, device=inputs.device)
            # Attention by its plain formula: the fused kernels cannot be batched over examples.
            with sdpa_kernel(SDPBackend.MATH):
                rows = _flat(gradients(chosen, inputs, at))  # $\nabla_\theta f_c(x_i)$
                columns = rows if others is None else _flat(gradients(chosen, others, at))
            kernel = kernel + rows @ columns.T / classes  # $\frac1C \sum_c J_c J_c^\top$
    finally:
        for module, mode in modes:
            module.training = mode
    return kernel


def _flat(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in gradients.values()], 1).detach()


class _Scores(nn.Module):
    """A model with the way to read scores from it, as `functional_call` wants it."""

    def __init__(self, model: nn.Module, outputs: Outputs | None) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, x: Tensor) -> Tensor:
        scores = self.model(x) if self.outputs is None else self.outputs(self.model, x)
        if not isinstance(scores, Tensor) or scores.ndim != 2:
            raise ValueError("scores must be a tensor (examples, classes); give `outputs`.")
        return scores


@dataclass(frozen=True)
class Complexity:
    r"""How hard targets are for a kernel.

    Attributes:
        value: $\operatorname{tr}(Y^\top K^{-1} Y)$.
        adjusted: $\sqrt{\operatorname{SC} \cdot \operatorname{tr} K} / n$, free of the kernel's
            scale.
    """

    value: float
    adjusted: float


def supervision_complexity(
    kernel: Float[Tensor, "examples columns"],
    targets: Float[Tensor, "rows classes"],
    *,
    ridge: float = 1e-3,
    centered: bool = True,
) -> Complexity:
    r"""$\operatorname{SC}(Y; K) = \operatorname{tr}(Y^\top (K + \epsilon I)^{-1} Y)$.

    Compare targets of one kind: the complexity grows with the square of their scale, so that
    scores and probabilities are no match.

    Args:
        kernel: K, symmetric.
        targets: Y, one column for each class.
        ridge: $\epsilon$ in units of the mean eigenvalue, $\operatorname{tr} K / n$: K may be
            singular.
        centered: Whether each column's mean is taken away first.

    Raises:
        ValueError: Other numbers of examples, a negative ridge, or a kernel that is not positive
            definite even with the ridge.
    """
    if len(kernel) != len(targets) or kernel.shape[0] != kernel.shape[1]:
        raise ValueError(
            f"the kernel is {tuple(kernel.shape)} and there are targets for {len(targets)} "
            "examples; one row and one column are needed for each."
        )
    if not ridge >= 0:
        raise ValueError(f"ridge is {ridge}; it must not be negative.")
    K, Y = kernel.cpu().double(), targets.cpu().double()
    n, trace = len(K), float(K.trace())
    if centered:
        Y = Y - Y.mean(0)
    factor, failed = torch.linalg.cholesky_ex(K + ridge * trace / n * torch.eye(n).to(K))
    if int(failed) or not math.isfinite(trace):
        raise ValueError("the kernel is not positive definite; a larger ridge makes it so.")
    # $Y^\top K^{-1} Y = \lVert L^{-1} Y \rVert^2$ with $K = L L^\top$
    half = torch.linalg.solve_triangular(factor, Y, upper=False)
    value = float(half.square().sum())
    return Complexity(value, math.sqrt(value * trace) / n)


def complexity_over_teachers(
    kernel: Float[Tensor, "examples examples"],
    teachers: Mapping[int, Float[Tensor, "examples classes"]],
    *,
    temperature: float = 1.0,
    ridge: float = 1e-3,
) -> dict[int, Complexity]:
    """Complexity of a teacher's probabilities at every step of its training.

    Args:
        kernel: The student's.
        teachers: By step, the teacher's scores on the kernel's examples.
        temperature: Softens all of them.
        ridge: As in `supervision_complexity`.

    Raises:
        ValueError: As `supervision_complexity`, or a temperature of 0 or below.
    """
    return {
        step: supervision_complexity(kernel, log_softened(scores, temperature).exp(), ridge=ridge)
        for step, scores in teachers.items()
    }


def complexity_over_temperatures(
    kernel: Float[Tensor, "examples examples"],
    teacher: Float[Tensor, "examples classes"],
    temperatures: Sequence[float],
    *,
    ridge: float = 1e-3,
) -> dict[float, Complexity]:
    """Complexity of one teacher's probabilities at several temperatures.

    Raises:
        ValueError: As `supervision_complexity`, or a temperature of 0 or below.
    """
    return {
        t: supervision_complexity(kernel, log_softened(teacher, t).exp(), ridge=ridge)
        for t in temperatures
    }


def kernel_interpolant(
    kernel: Float[Tensor, "examples examples"],
    targets: Float[Tensor, "rows classes"],
    cross: Float[Tensor, "queries columns"],
    *,
    ridge: float = 1e-3,
) -> Float[Tensor, "queries classes"]:
    r"""What the kernel machine says elsewhere: $K(x, X)\,(K + \epsilon I)^{-1} Y$.

    Raises:
        ValueError: Shapes that do not fit, or a negative ridge.
    """
    if not ridge >= 0 or cross.shape[1] != len(kernel) or len(targets) != len(kernel):
        raise ValueError(
            f"ridge is {ridge}, the kernel {tuple(kernel.shape)}, the targets "
            f"{tuple(targets.shape)} and the cross kernel {tuple(cross.shape)}; a ridge of 0 or "
            "more and one column for each example are needed."
        )
    K = kernel.cpu().double()
    damped = K + ridge * float(K.trace()) / len(K) * torch.eye(len(K)).to(K)
    return cross.cpu().double() @ torch.linalg.solve(damped, targets.cpu().double())


def teacher_of_step(step: int, steps: int, checkpoints: int) -> int:
    """Which of a teacher's states to learn from at a step of online distillation.

    The steps are cut into as many parts as there are states, in their order; the last state has
    what remains.

    Raises:
        ValueError: Counts below 1, more states than steps, or a step outside the run.
    """
    if not 1 <= checkpoints <= steps or not 0 <= step < steps:
        raise ValueError(
            f"step is {step}, steps {steps} and checkpoints {checkpoints}; at least one state, no "
            "more of them than steps, and a step of the run are needed."
        )
    return min(step * checkpoints // steps, checkpoints - 1)
