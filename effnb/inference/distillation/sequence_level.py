r"""Sequence-level distillation: train the student on what the teacher would write.

Word-level distillation matches $p(y_t \mid y_{<t}, x)$ at every position of the given text.
Sequence-level distillation matches whole texts. Its divergence sums over all of them, so the
teacher's distribution is replaced by its mode, found by beam search:

$$L = -\ln q(\hat y \mid x), \qquad \hat y = \operatorname{beam}_K p(\cdot \mid x).$$

The student is spared the choice between equally good answers, which a small model mixes up.
*Interpolation* keeps near the given answer: of the K texts of the beam, the one closest to it.

Kim, Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv 1606.07947, sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_teacher, temperature_kl
from effnb.inference.distillation.sampling import beam_search


def word_level_loss(
    student: Float[Tensor, "*batch vocabulary"],
    teacher: Float[Tensor, "*teacher_batch teacher_vocabulary"],
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""Mean over positions of $\operatorname{KL}(p(\cdot \mid y_{<t}) \| q(\cdot \mid y_{<t}))$.

    Raises:
        ValueError: Other vocabularies or positions.
    """
    return temperature_kl(student, teacher, 1.0, mask)


def sequence_level(
    teacher: nn.Module,
    prompts: Sequence[Int[Tensor, " _"]],
    *,
    beams: int = 5,
    max_new_tokens: int = 64,
    eos: int | None = None,
    pad: int = 0,
    references: Sequence[Int[Tensor, " _"]] | None = None,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """The teacher's answers as training data for plain cross-entropy: (ids, labels).

    Labels are -100 in the prompt and in padding, which is on the right.

    Args:
        teacher: A causal language model in evaluation mode.
        prompts: Token ids of each prompt.
        beams: K.
        max_new_tokens: The longest answer.
        eos: The token that ends an answer.
        pad: The token of the padding.
        references: Given answers, one for each prompt: of the K texts the one with the highest
            `bleu` is taken (interpolation). The likeliest when None.

    Raises:
        ValueError: A teacher in training mode, no prompt, another number of references, and what
            `beam_search` refuses.
    """
    check_teacher(teacher)
    if not prompts or (references is not None and len(references) != len(prompts)):
        given = 0 if references is None else len(references)
        raise ValueError(
            f"there are {len(prompts)} prompts and {given} references; at least one prompt is "
            "needed, and one reference for each."
        )
    rows = []
    for i, prompt in enumerate(prompts):
        found = beam_search(teacher, prompt, beams, max_new_tokens, eos=eos)
        texts = [text for text, _ in found]
        # $\hat y = \arg\max_{y \in \mathrm{beam}} \mathrm{BLEU}(y, y^*)$, or the likeliest
        answer = texts[0] if references is None else closest(texts, references[i].tolist())
        rows.append((prompt.tolist(), answer))
    longest = max(len(x) + len(y) for x, y in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long, device=prompts[0].device)
    labels = torch.full_like(ids, -100)
    for row, (x, y) in enumerate(rows):
        ids[row, : len(x) + len(y)] = torch.tensor([*x, *y])
        labels[row, len(x) : len(x) + len(y)] = torch.tensor(y)
    return ids, labels


def closest(texts: Sequence[Sequence[int]], reference: Sequence[int]) -> list[int]:
    """Of several texts the one with the highest `bleu`; the first of equals."""
    return list(max(texts, key=lambda text: bleu(text, reference)))


def bleu(text: Sequence[int], reference: Sequence[int], order: int = 4) -> float:
    r"""How much two texts agree, between 0 and 1: smoothed BLEU of one sentence.

    $\min(1, e^{1 - r / c}) \prod_n \pi_n^{1/4}$, with c and r the lengths of text and reference and
    $\pi_n$ the share of the text's n-grams that the reference has too. From n = 2 on, both counts
    are raised by 1, so that one missing order does not make everything 0.

    Source: Lin, Och, "ORANGE: a Method for Evaluating Automatic Evaluation Metrics for Machine
    Translation", 2004.
    """
    if not text or not reference:
        return 0.0
    logs = 0.0
    for n in range(1, order + 1):
        ours, theirs = (
            Counter(tuple(x[i : i + n]) for i in range(len(x) - n + 1)) for x in (text, reference)
        )
        plus = 0 if n == 1 else 1
        right = sum((ours & theirs).values()) + plus
        total = sum(ours.values()) + plus
        if right == 0:
            return 0.0
        logs += math.log(right / total) / order  # $\prod_n \pi_n^{1/4}$
    return math.exp(logs + min(0.0, 1 - len(reference) / len(text)))
