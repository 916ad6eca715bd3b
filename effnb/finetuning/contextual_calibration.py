r"""Contextual calibration: ask a prompt about nothing, and divide by what it answers.

A prompt prefers some labels whatever the input: those of most of its examples (*majority*), those
of its last ones (*recency*), and words that are frequent in texts (*common tokens*). A content-free
input such as "N/A" shows the preference, for the right answer to it would be none. With
$\hat p$ the labels' probabilities for an input and $\hat p_{cf}$ those for no content,

$$q = \operatorname{softmax}(W \hat p + b), \qquad
  W = \operatorname{diag}(\hat p_{cf})^{-1},\ b = 0,$$

whose largest entry is that of $\hat p / \hat p_{cf}$. The other form, $W = I$ and
$b = -\hat p_{cf}$, subtracts instead.

Zhao, Wallace, Feng, Klein, Singh, "Calibrate Before Use: Improving Few-Shot Performance of Language
Models", 2021, arXiv 2102.09690.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.finetuning.prompting import Verbalizer, label_probabilities

CONTENT_FREE = ("N/A", "", "[MASK]")
"""Inputs without content; their answers are averaged."""
FORMS = ("divide", "subtract")


def content_free(
    model: nn.Module,
    tokenizer: Any,
    prompt: Callable[[str], str],
    verbalizer: Verbalizer,
    *,
    inputs: Sequence[str] = CONTENT_FREE,
) -> Float[Tensor, " labels"]:
    r"""$\hat p_{cf}$, the mean of the labels' probabilities over inputs without content.

    Args:
        model: A decoder.
        tokenizer: The model's.
        prompt: From an input to the prompt, with the same examples in the same order as in use:
            the preference is one of the whole prompt.
        verbalizer: The words for the labels.
        inputs: The inputs.

    Raises:
        ValueError: When there is no input, or as `label_probabilities`.
    """
    if not inputs:
        raise ValueError("there is no content-free input to ask about.")
    found = label_probabilities(model, tokenizer, [prompt(text) for text in inputs], verbalizer)
    return found.mean(0)


def calibrate(
    probabilities: Float[Tensor, "*batch labels"],
    content_free: Float[Tensor, " labels"],
    *,
    form: str = "divide",
) -> Float[Tensor, "*batch labels"]:
    r"""The probabilities without the prompt's own preference, normalized over the labels.

    Args:
        probabilities: $\hat p$, at least 0.
        content_free: $\hat p_{cf}$, above 0.
        form: "divide" gives $\hat p / \hat p_{cf}$ divided by its sum, whose order is that of
            $\operatorname{softmax}(W \hat p)$; "subtract" gives
            $\operatorname{softmax}(\hat p - \hat p_{cf})$.

    Raises:
        ValueError: Another form, sizes that differ, or numbers that are no probabilities.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}.")
    if content_free.ndim != 1 or probabilities.shape[-1:] != content_free.shape:
        raise ValueError(
            f"the probabilities have shape {tuple(probabilities.shape)} and those without content "
            f"{tuple(content_free.shape)}; both must end with the number of labels."
        )
    if not bool((content_free > 0).all()) or not bool((probabilities >= 0).all()):
        raise ValueError("probabilities must be at least 0, and those without content above 0.")
    if form == "subtract":
        return torch.softmax(probabilities - content_free, -1)
    # $\hat p / \hat p_{cf}$, the diagonal of $W$ applied
    ratio = probabilities / content_free
    return ratio / ratio.sum(-1, keepdim=True)
