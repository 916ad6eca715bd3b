"""Fine-tuning on longer texts: a few hundred steps let a model get used to rescaled positions.

The weights were trained with other frequencies, and attention with fewer tokens. Position
Interpolation was fine-tuned for 1,000 steps; YaRN for 400 steps of 64 texts of 64k tokens at a
scale of 16, with a learning rate of 2e-5 after 20 steps of warm-up (Chen et al., 2023, arXiv
2306.15595; Peng et al., 2023, arXiv 2309.00071, sec. 4.1). Their numbers of steps and tokens are
what the claim of a cheaper extension compares, so a run here says both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.context import check_causal, check_context
from effnb.core.modules import clone
from effnb.core.training import TrainingResult, TrainingSettings, train


@dataclass(frozen=True)
class ContextTuned:
    """A model after training on longer texts.

    Attributes:
        model: The trained model; it shares no weights with the given one.
        training: Losses of all steps, evaluations and seconds.
        steps: Optimizer steps.
        tokens: Tokens read in all steps together.
    """

    model: nn.Module = field(repr=False)
    training: TrainingResult = field(repr=False)
    steps: int
    tokens: int

    @property
    def losses(self) -> list[float]:
        """The training loss of every step before it is made, in nats per token."""
        return self.training.losses


def fine_tune(
    model: nn.Module,
    sequences: Int[Tensor, "*sequences time"],
    settings: TrainingSettings,
    *,
    batch_size: int = 1,
    parts: int = 1,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    progress: bool | Callable[[int, int, float], None] = False,
) -> ContextTuned:
    """Train a copy of an extended model on long sequences, by the loss of the next token.

    Sequences are read in an order drawn from the settings' seed, each once before any is read
    again; batches go on across the end of a round.

    Args:
        model: A causal language model, extended by a method of this package; it is not changed.
        sequences: Token ids, one text of the new length in each row.
        settings: Steps, learning rate, warm-up, seed. The recipe of YaRN is
            `TrainingSettings(steps=400, learning_rate=2e-5, warmup_steps=20)`.
        batch_size: Sequences of a step.
        parts: Passes that a batch is split into, for less memory; the gradients are averaged.
        evaluate: From the model to named numbers, as in `effnb.core.training.train`.
        progress: True for a progress bar; or a function of (steps done, steps, loss).

    Raises:
        ValueError: No sequences, or of fewer than 2 tokens; a batch size below 1 or not a multiple
            of `parts`; a model with fewer positions, or one that sees the tokens it is to foresee.
        TrainingDiverged: When the loss or the gradient is not finite.
    """
    check_loaded(model)
    if sequences.ndim != 2 or not len(sequences) or sequences.shape[1] < 2:
        raise ValueError(
            f"the sequences have shape {tuple(sequences.shape)}; they must be at least one row of "
            "at least 2 tokens."
        )
    if batch_size < 1 or parts < 1 or batch_size % parts:
        raise ValueError(
            f"batch_size is {batch_size} and parts {parts}; a batch must consist of equal parts of "
            "at least one sequence."
        )
    check_context(model, sequences.shape[1], "the length of a sequence")
    check_causal(model, sequences)
    device = next(model.parameters()).device

    def batches(step: int) -> list[Tensor]:
        places = range(step * batch_size, (step + 1) * batch_size)
        rows = torch.stack([sequences[_place(at, len(sequences), settings.seed)] for at in places])
        return list(rows.to(device).chunk(parts))

    trained = clone(model)
    result = train(trained, batches, settings, evaluate=evaluate, progress=progress)
    tokens = result.steps * batch_size * sequences.shape[1]
    return ContextTuned(trained, result, result.steps, tokens)


def _place(number: int, count: int, seed: int) -> int:
    """Which of `count` sequences is read as the given one: a new order in every round."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number // count)
    return int(torch.randperm(count, generator=generator)[number % count])
