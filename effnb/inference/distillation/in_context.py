r"""Distilling what a prompt does: learning from examples in it, or doing without it.

*In-context learning distillation.* The student reads k solved examples and a question, as the
teacher does, and learns the teacher's soft answer beside the right one; plain text keeps its
language up,

$$L = a\, \tau^2 \operatorname{KL}(p^\tau \| q^\tau) + (1 - a) \operatorname{CE}(y, q)
  + \gamma\, L_\text{text}.$$

What is copied is an ability: to solve a task from its examples.

*Context distillation.* The teacher reads a prompt that the student does not have. The student
learns to act as if it did, $\operatorname{KL}(p(\cdot \mid c, x) \| q(\cdot \mid x))$, and the
prompt's tokens are saved at every call.

Huang et al., "In-context Learning Distillation: Transferring Few-shot Learning Ability of
Pre-trained Language Models", 2022, arXiv 2212.10670. Snell, Klein, Zhong, "Learning by Distilling
Context", 2022, arXiv 2209.15189.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.core.losses import check_teacher, check_temperature, temperature_kl
from effnb.core.training import Loss, causal_lm_loss
from effnb.inference.distillation.hinton import hinton
from effnb.inference.distillation.tokens import Tokens, arguments, said


def in_context_batch(
    tasks: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    *,
    separator: Sequence[int] = (),
    pad: int = 0,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Prompts of solved examples with a last question, whose answer alone counts: (ids, labels).

    Args:
        tasks: For each row its examples as (question, answer) in token ids; the last is asked.
        separator: Tokens between examples.
        pad: The token of the padding, on the right.

    Raises:
        ValueError: No row, a row without examples, or one whose last answer is empty.
    """
    if not tasks or any(not row or not len(row[-1][1]) for row in tasks):
        raise ValueError("every row needs at least one example, and its last one an answer.")
    rows = []
    for examples in tasks:
        *shown, (question, answer) = examples
        before = [token for q, a in shown for token in (*q, *a, *separator)]
        rows.append(([*before, *question], list(answer)))
    longest = max(len(x) + len(y) for x, y in rows)
    ids = torch.full((len(rows), longest), pad)
    labels = torch.full_like(ids, -100)
    for i, (x, y) in enumerate(rows):
        ids[i, : len(x) + len(y)] = torch.tensor([*x, *y])
        labels[i, len(x) : len(x) + len(y)] = torch.tensor(y)
    return ids, labels


def in_context(
    teacher: nn.Module,
    *,
    temperature: float = 1.0,
    weight: float = 0.5,
    text_weight: float = 1.0,
) -> Loss:
    r"""The loss of (student, batch) for learning to learn from examples.

    A batch holds `prompts`, as `in_context_batch` makes them, and `text`, token ids, unless
    `text_weight` is 0.

    Args:
        teacher: A causal language model in evaluation mode; it is not trained.
        temperature: $\tau$.
        weight: $a$, the teacher's share in the answers.
        text_weight: $\gamma$, weight of the language-modelling loss on plain text.

    Raises:
        ValueError: A teacher in training mode, a temperature of 0 or below, a weight outside its
            range, or a batch without its parts.

    Source: Huang et al., "In-context Learning Distillation: Transferring Few-shot Learning Ability
    of Pre-trained Language Models", 2022, arXiv 2212.10670.
    """
    answers = hinton(teacher, temperature=temperature, weight=weight)
    if not text_weight >= 0:
        raise ValueError(f"text_weight is {text_weight}; it must not be negative.")

    def loss(student: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        needed = ["prompts", "text"] if text_weight else ["prompts"]
        absent = [name for name in needed if name not in batch]
        if absent:
            raise ValueError(f"a batch needs `{absent[0]}`; in_context_batch makes the prompts.")
        value = answers(student, batch["prompts"])
        if text_weight:
            value = value + text_weight * causal_lm_loss(student, batch["text"])
        return value

    return loss


def context_distillation(
    teacher: nn.Module,
    context: Int[Tensor, " context"],
    *,
    temperature: float = 1.0,
) -> Loss:
    r"""The loss of (student, batch): act without a prompt as the teacher acts with it.

    $\tau^2 \operatorname{KL}(p^\tau(\cdot \mid c, x_{\le t}) \| q^\tau(\cdot \mid x_{\le t}))$,
    over the positions of x that count. Batches are as for `hinton`, without attention masks.

    Args:
        teacher: A causal language model in evaluation mode. The student's own first state will do.
        context: Token ids of the prompt c.
        temperature: $\tau$.

    Raises:
        ValueError: A teacher in training mode, an empty prompt, or prompt and text longer than the
            teacher's positions.

    Source: Snell, Klein, Zhong, "Learning by Distilling Context", 2022, arXiv 2209.15189.
    """
    check_teacher(teacher)
    check_temperature(temperature)
    if not len(context):
        raise ValueError("the context is empty; give at least one token.")

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        check_teacher(teacher)
        given = arguments(batch)
        if "attention_mask" in given:
            raise ValueError("give labels of -100 for padding on the right, not an attention mask.")
        ids = given["input_ids"]
        labels = given.get("labels", ids)
        prompt = context.to(ids.device).expand(len(ids), -1)
        hidden = torch.full_like(prompt, -100)
        # Position 0 of x has a prompt before it for the teacher and nothing for the student.
        first = torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:]], 1)
        long = {"input_ids": torch.cat([prompt, ids], 1), "labels": torch.cat([hidden, first], 1)}
        own = said(student, given)
        with torch.no_grad():
            taught = said(teacher, long)
        return temperature_kl(own.logits, taught.logits, temperature)

    return loss


def draw_tasks(
    pools: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]],
    examples: int,
    rows: int,
    *,
    seed: int = 0,
) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """Rows for `in_context_batch`: each from one task, with examples drawn without repetition.

    Args:
        pools: For each task its solved examples.
        examples: k, how many precede the question.
        rows: How many rows to draw.
        seed: Of the draws.

    Raises:
        ValueError: No task, or one with fewer than k + 1 examples.
    """
    if not pools:
        raise ValueError("there is no task to draw from; give at least one.")
    for pool in pools:
        if not 0 <= examples < len(pool):
            raise ValueError(
                f"examples is {examples}; a task has {len(pool)} solved examples, of which one is "
                "the question."
            )
    draws = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(rows):
        pool = pools[int(torch.randint(len(pools), (1,), generator=draws))]
        order = torch.randperm(len(pool), generator=draws)[: examples + 1]
        found.append([pool[i] for i in order.tolist()])
    return found
