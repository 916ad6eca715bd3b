r"""Intrinsic prompt tuning: find a subspace that the prompts of many tasks share, and tune in it.

A soft prompt $P \in \mathbb{R}^{n \times d}$ has thousands of numbers. An auto-encoder learns from
the prompts of many tasks how few of them matter:

$$z = \operatorname{Enc}(P) \in \mathbb{R}^{d_I}, \qquad \hat P = \operatorname{Dec}(z), \qquad
  \min \sum_i \lVert P_i - \hat P_i \rVert^2 + L_i(\hat P_i),$$

with $L_i$ the loss of the task itself. On a new task the decoder is fixed and only $z$ is trained.
With a linear encoder and decoder and without the tasks' losses, the optimum is the subspace of the
leading principal components.

Qin et al., "Exploring Low-dimensional Intrinsic Task Subspace via Prompt Tuning", 2021, arXiv
2110.07867.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_finite

__all__ = [
    "FEWEST_PROMPTS",
    "IntrinsicPrompt",
    "PromptSubspace",
    "learn_subspace",
    "principal_subspace",
    "random_subspace",
    "tune",
]

FEWEST_PROMPTS = 20
"""Training prompts below which a subspace says more about them than about tasks."""

Prompt = Float[Tensor, "tokens dim"]
TaskLoss = Callable[[int, Tensor], Tensor]


class PromptSubspace(nn.Module):
    """An encoder of soft prompts into a few numbers, and a decoder back.

    Prompts are centred on the training prompts' mean and divided by their standard deviation, both
    part of the state, so that z = 0 is an average prompt.

    Attributes:
        mean: (tokens, dim).
        scale: One number.
    """

    mean: Float[Tensor, "tokens dim"]
    scale: Float[Tensor, ""]

    def __init__(
        self, tokens: int, dim: int, dimension: int, *, hidden: int | None = None, seed: int = 0
    ) -> None:
        """Make both maps: linear without `hidden`, else with one layer of so many tanh units.

        Args:
            tokens: Tokens of a prompt.
            dim: Numbers of a token.
            dimension: $d_I$, numbers of z.
            hidden: Width of the hidden layer of each map.
            seed: Seed of the start values.

        Raises:
            ValueError: When the dimension is not between 1 and tokens times dim.
        """
        super().__init__()
        size = tokens * dim
        if not 1 <= dimension <= size:
            raise ValueError(
                f"dimension is {dimension}; a prompt of {tokens} tokens of {dim} numbers allows 1 "
                f"to {size:,}."
            )
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden is {hidden}; it must be at least 1, or None.")
        self.dimension = dimension
        inner = [] if hidden is None else [hidden]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = _map([size, *inner, dimension])
            self.decoder = _map([dimension, *inner, size])
        self.register_buffer("mean", torch.zeros(tokens, dim))
        self.register_buffer("scale", torch.ones(()))

    def encode(self, prompt: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch d"]:
        r"""$z = \operatorname{Enc}(P)$."""
        return self.encoder(((prompt - self.mean) / self.scale).flatten(-2))

    def decode(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch tokens dim"]:
        r"""$\hat P = \operatorname{Dec}(z)$."""
        return self.decoder(z).unflatten(-1, tuple(self.mean.shape)) * self.scale + self.mean

    def forward(
        self, prompt: Float[Tensor, "*batch tokens dim"]
    ) -> Float[Tensor, "*batch tokens dim"]:
        """The prompt after both maps."""
        return self.decode(self.encode(prompt))


def _map(sizes: list[int]) -> nn.Sequential:
    """Linear layers with tanh between them; without biases where there is one layer."""
    layers: list[nn.Module] = []
    for one, two in itertools.pairwise(sizes):
        layers += [nn.Linear(one, two, bias=len(sizes) > 2), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def check_prompts(prompts: Float[Tensor, "tasks tokens dim"], dimension: int) -> None:
    """Refuse prompts that no subspace can be learned from.

    Raises:
        ValueError: Too few, not finite, all the same, or a dimension out of range.
    """
    if prompts.ndim != 3:
        raise ValueError(
            f"prompts have shape {tuple(prompts.shape)}; it must be (tasks, tokens, dim)."
        )
    if len(prompts) < FEWEST_PROMPTS:
        raise ValueError(
            f"{len(prompts)} training prompts are too few to learn a subspace of; at least "
            f"{FEWEST_PROMPTS} are needed."
        )
    check_finite(prompts, "the prompts", "learned from")
    largest = min(len(prompts) - 1, prompts[0].numel())
    if not 1 <= dimension <= largest:
        raise ValueError(
            f"dimension is {dimension}; {len(prompts)} prompts of {prompts[0].numel():,} numbers "
            f"span 1 to {largest}."
        )
    if not (prompts - prompts.mean(0)).any():
        raise ValueError("all training prompts are the same, and span no subspace.")


def _centred(subspace: PromptSubspace, prompts: Tensor) -> PromptSubspace:
    subspace = subspace.to(prompts.device, prompts.dtype)
    subspace.mean.copy_(prompts.mean(0))
    subspace.scale.copy_((prompts - subspace.mean).square().mean().sqrt())
    return subspace


def learn_subspace(
    prompts: Float[Tensor, "tasks tokens dim"],
    dimension: int,
    *,
    task_loss: TaskLoss | None = None,
    task_weight: float = 1.0,
    hidden: int | None = None,
    start: PromptSubspace | None = None,
    steps: int = 1000,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> PromptSubspace:
    r"""Learn the subspace of the prompts of many tasks, by Adam on all of them at once.

    Args:
        prompts: A trained soft prompt of each task, at least 20.
        dimension: $d_I$, at most one less than there are prompts.
        task_loss: From a task's index and a prompt to the task's own loss; None leaves it out.
        task_weight: Its factor.
        hidden: Width of the hidden layer of encoder and decoder; None makes both linear.
        start: A subspace of this size to begin at, such as the principal one; it is not changed.
        steps: Steps of Adam.
        learning_rate: Its rate, which falls to 0 along a cosine.
        seed: Seed of the start values.

    Returns:
        The auto-encoder, frozen.

    Raises:
        ValueError: When prompts or numbers cannot be used.
        FloatingPointError: When the loss stops being a finite number.
    """
    check_prompts(prompts, dimension)
    if steps < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps ({steps}) must be at least 1 and learning_rate ({learning_rate}) above 0."
        )
    prompts = prompts.detach()
    subspace = PromptSubspace(
        prompts.shape[1], prompts.shape[2], dimension, hidden=hidden, seed=seed
    )
    if start is not None:
        wanted, given = (
            {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
            for one in (subspace, start)
        )
        if wanted != given:
            raise ValueError(
                f"start is a subspace of {start.dimension} numbers for prompts of "
                f"{tuple(start.mean.shape)}; it must have the shapes that are asked for here."
            )
        subspace.load_state_dict(start.state_dict())
    subspace = _centred(subspace, prompts)
    optimizer = torch.optim.Adam(subspace.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            again = subspace(prompts)
            # $\sum_i \lVert P_i - \hat P_i \rVert^2$, as a mean in units of the prompts' variance
            loss = ((again - prompts) / subspace.scale).square().mean()
            if task_loss is not None:
                # $+ L_i(\hat P_i)$
                own = [task_loss(i, prompt) for i, prompt in enumerate(again)]
                loss = loss + task_weight * torch.stack(own).mean()
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss of the auto-encoder is {loss} at step {step}.")
            loss.backward()
            optimizer.step()
            schedule.step()
    return subspace.requires_grad_(False)


def principal_subspace(
    prompts: Float[Tensor, "tasks tokens dim"], dimension: int
) -> PromptSubspace:
    r"""The linear subspace of least reconstruction error: the leading principal components.

    Raises:
        ValueError: When prompts or dimension cannot be used.
    """
    check_prompts(prompts, dimension)
    prompts = prompts.detach()
    subspace = _centred(PromptSubspace(*prompts.shape[1:], dimension), prompts)
    centred = ((prompts - subspace.mean) / subspace.scale).flatten(1)
    # $\hat P = V V^\top P$, with V the right singular vectors of the centred prompts
    V = torch.linalg.svd(centred, full_matrices=False).Vh[:dimension]
    with torch.no_grad():
        subspace.encoder[0].weight.copy_(V)
        subspace.decoder[0].weight.copy_(V.T)
    return subspace.requires_grad_(False)


def random_subspace(
    prompts: Float[Tensor, "tasks tokens dim"], dimension: int, seed: int = 0
) -> PromptSubspace:
    """A subspace of the same size in random directions, around the same mean: the baseline.

    Raises:
        ValueError: When prompts or dimension cannot be used.
    """
    check_prompts(prompts, dimension)
    subspace = _centred(PromptSubspace(*prompts.shape[1:], dimension), prompts.detach())
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(prompts[0].numel(), dimension, generator=generator, dtype=torch.float64)
    Q = torch.linalg.qr(matrix).Q.to(prompts.device, prompts.dtype)
    with torch.no_grad():
        subspace.encoder[0].weight.copy_(Q.T)
        subspace.decoder[0].weight.copy_(Q)
    return subspace.requires_grad_(False)


class IntrinsicPrompt(nn.Module):
    """A soft prompt of which only its place in a subspace is trained.

    Attributes:
        z: ($d_I$,).
        subspace: Frozen.
    """

    z: Float[Tensor, " d"]

    def __init__(self, subspace: PromptSubspace, start: Prompt | None = None) -> None:
        """Begin at the average prompt, or at the nearest that the encoder finds to `start`."""
        super().__init__()
        like = subspace.mean
        with torch.no_grad():
            z = like.new_zeros(subspace.dimension) if start is None else subspace.encode(start)
        self.z = nn.Parameter(z)
        self.__dict__["_subspace"] = subspace  # shared by tasks, and no part of this one's state

    @property
    def subspace(self) -> PromptSubspace:
        """The subspace, which is not part of the state."""
        return self._subspace

    def forward(self) -> Float[Tensor, "tokens dim"]:
        r"""$P = \operatorname{Dec}(z)$."""
        return self.subspace.decode(self.z)


def tune(
    subspace: PromptSubspace,
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int = 200,
    learning_rate: float = 0.1,
    start: Prompt | None = None,
) -> IntrinsicPrompt:
    r"""Tune a prompt for a new task inside a subspace: $\min_z L(\operatorname{Dec}(z))$, by Adam.

    Args:
        subspace: A learned one; it is not changed.
        loss: From a prompt (tokens, dim) to the loss of the task.
        steps: Steps of Adam.
        learning_rate: Its rate.
        start: A prompt to begin near; None begins at the average prompt.

    Raises:
        ValueError: When a number is out of range.
        FloatingPointError: When the loss stops being a finite number.
    """
    if steps < 1 or not learning_rate > 0:
        raise ValueError(
            f"steps ({steps}) must be at least 1 and learning_rate ({learning_rate}) above 0."
        )
    result = IntrinsicPrompt(subspace, start)
    optimizer = torch.optim.Adam([result.z], learning_rate)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.zero_grad()
            value = loss(result())
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss of the task is {value} at step {step}.")
            # The prompt reaches the loss through a frozen model, which must get no gradient.
            (gradient,) = torch.autograd.grad(value, [result.z])
            result.z.grad = gradient
            optimizer.step()
    result.z.grad = None
    return result
