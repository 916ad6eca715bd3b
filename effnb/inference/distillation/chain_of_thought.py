r"""Distilling step by step: learn to predict and to explain, as two tasks of one student.

A teacher's reasoning says why an answer is right, which the answer alone does not. The student gets
it as a second task beside the first, told apart by a word at the beginning of the input,

$$L = \alpha\, L(\text{predict: } x \to y) + (1 - \alpha)\, L(\text{explain: } x \to r),$$

so that at test time it predicts alone and pays nothing for what it learnt to explain. Writing the
reasoning *before* the answer, in one task, is the alternative (fine-tune-CoT): then it must be
written at test time too. Reasonings that end in a wrong answer are thrown away first.

Hsieh et al., "Distilling Step-by-Step! Outperforming Larger Language Models with Less Training Data
and Smaller Model Sizes", 2023, arXiv 2305.02301. Ho, Schmid, Yun, "Large Language Models Are
Reasoning Teachers", 2022, arXiv 2212.10071.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.core.losses import check_share
from effnb.core.training import Loss, causal_lm_loss

PREDICT, EXPLAIN = "predict: ", "explain: "
THEREFORE = " so "
"""What separates a reasoning from its answer where both are one text."""


@dataclass(frozen=True)
class Worked:
    """A question with its reasoning and its answer.

    Attributes:
        question: x.
        reasoning: r.
        answer: y.
    """

    question: str
    reasoning: str
    answer: str


def two_tasks(items: Sequence[Worked]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs (input, target) of both tasks: predictions and explanations."""
    return (
        [(PREDICT + item.question, item.answer) for item in items],
        [(EXPLAIN + item.question, item.reasoning) for item in items],
    )


def one_task(items: Sequence[Worked]) -> list[tuple[str, str]]:
    """Pairs (input, target) with the reasoning before the answer, in one text (fine-tune-CoT).

    Source: Ho, Schmid, Yun, "Large Language Models Are Reasoning Teachers", 2022, arXiv 2212.10071.
    """
    return [(PREDICT + i.question, i.reasoning + THEREFORE + i.answer) for i in items]


def final_answer(text: str) -> str:
    """What a text of `one_task` gives as its answer: all behind the last "so", or all of it.

    An answer counts only where the student wrote the reasoning itself: the share of right answers
    behind a given reasoning says nothing of it.
    """
    return text.rpartition(THEREFORE)[2].strip()


def keep_right(samples: Sequence[Worked], answers: Sequence[str]) -> list[Worked]:
    """Of a teacher's reasonings those that end in the right answer, each once.

    Args:
        samples: What the teacher wrote, several for one question if wanted.
        answers: The right answer to the question of each.

    Raises:
        ValueError: Another number of answers than of samples.
    """
    if len(samples) != len(answers):
        raise ValueError(f"there are {len(samples)} samples and {len(answers)} answers.")
    right = (s for s, a in zip(samples, answers) if s.answer.strip() == a.strip())
    return list(dict.fromkeys(right))


def pair_batch(
    pairs: Sequence[tuple[str, str]],
    encode: Callable[[str], Sequence[int]],
    *,
    eos: int,
    pad: int = 0,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Inputs and targets in token ids, (ids, labels); inputs and padding do not count.

    Args:
        pairs: (input, target).
        encode: From text to token ids.
        eos: The token that ends a target, and counts.
        pad: The token of the padding, on the right.

    Raises:
        ValueError: No pair.
    """
    if not pairs:
        raise ValueError("there is no pair of input and target; give at least one.")
    rows = [(list(encode(x)), [*encode(y), eos]) for x, y in pairs]
    longest = max(len(x) + len(y) for x, y in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full_like(ids, -100)
    for i, (x, y) in enumerate(rows):
        ids[i, : len(x) + len(y)] = torch.tensor([*x, *y])
        labels[i, len(x) : len(x) + len(y)] = torch.tensor(y)
    return ids, labels


def step_by_step(weight: float = 0.5) -> Loss:
    r"""The loss of (student, batch), a batch holding both tasks: (predictions, explanations).

    Each is (ids, labels), as `pair_batch` makes them, or whatever `causal_lm_loss` takes.

    Args:
        weight: $\alpha$, the share of the predictions; 1 trains on answers alone.

    Raises:
        ValueError: A weight outside [0, 1].

    Source: Hsieh et al., "Distilling Step-by-Step! Outperforming Larger Language Models with Less
    Training Data and Smaller Model Sizes", 2023, arXiv 2305.02301.
    """
    check_share("weight", weight)

    def loss(student: nn.Module, batch: tuple[Any, Any]) -> Tensor:
        predictions, explanations = batch
        # $\alpha L_\mathrm{label} + (1 - \alpha) L_\mathrm{rationale}$; what weighs 0 is not run
        parts = [(weight, predictions), (1 - weight, explanations)]
        return sum(share * causal_lm_loss(student, part) for share, part in parts if share)

    return loss


def addition(a: int, b: int) -> Worked:
    """Column by column addition, carries written down: a teacher that is always right.

    The reasoning of 38 + 47 is "8+7=15 w5 c1; 3+4+1=8 w8 c0": what is written, what is carried,
    from the last column to the first.

    Raises:
        ValueError: A negative number.
    """
    if a < 0 or b < 0:
        raise ValueError(f"the numbers are {a} and {b}; neither may be negative.")
    columns, carry, x, y = [], 0, a, b
    while x or y or not columns:
        p, q = x % 10, y % 10
        total = p + q + carry
        terms = f"{p}+{q}+{carry}" if carry else f"{p}+{q}"
        columns.append(f"{terms}={total} w{total % 10} c{total // 10}")
        carry, x, y = total // 10, x // 10, y // 10
    return Worked(f"{a}+{b}", "; ".join(columns), str(a + b))
