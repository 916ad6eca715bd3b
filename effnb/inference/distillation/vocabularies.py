r"""Teacher and student with other vocabularies: refused in a sentence, or bridged.

Scores can only be compared token by token when both models cut text alike. `check_same_vocabulary`
says where they do not. Two bridges exist: train on the teacher's *text* (`sequence_level`), or
compare distributions without asking which token is which. ULD sorts both, and takes the distance

$$\frac1T \sum_t \sum_i \bigl| p^S_{t, (i)} - p^T_{t, (i)} \bigr|$$

of the probabilities from the largest to the smallest, the smaller vocabulary filled up with 0: the
cost of moving one distribution to the other when every move costs the same. It knows how sure the
teacher is, not of what; the cross-entropy beside it says of what. Positions are paired where
both tokenizers end a token at the same character, so that both models have read the same text.

Boizard, El Haddad, Hudelot, Colombo, "Towards Cross-Tokenizer Distillation: the Universal Logit
Distillation Loss for LLMs", 2024, arXiv 2402.12030. The pairing of positions is the workbook's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.losses import check_teacher, check_temperature, log_softened
from effnb.core.training import Loss


def check_same_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int]) -> None:
    """Refuse two vocabularies in which some token has another number.

    Args:
        student: From token to id, as `tokenizer.get_vocab()` gives it.
        teacher: The teacher's.

    Raises:
        ValueError: The sentence names sizes and a token that differs.
    """
    if dict(student) == dict(teacher):
        return
    differ = sorted(t for t in {*student, *teacher} if student.get(t) != teacher.get(t))
    raise ValueError(
        f"the student's vocabulary has {len(student)} tokens and the teacher's {len(teacher)}; "
        f"{len(differ)} differ, such as {differ[0]!r}. Distil with `uld`, which compares sorted "
        "probabilities, or train on the teacher's text (`sequence_level`)."
    )


def uld_loss(
    student: Float[Tensor, "positions vocabulary"],
    teacher: Float[Tensor, "teacher_positions teacher_vocabulary"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""$\frac1T \sum_t \sum_i |p^S_{t,(i)} - p^T_{t,(i)}|$, between 0 and 2.

    Args:
        student: Scores at paired positions.
        teacher: The teacher's at the same; the vocabulary may be another.
        temperature: Divides both.

    Raises:
        ValueError: Other numbers of positions, none, or a temperature of 0 or below.
    """
    if len(student) != len(teacher) or not len(student):
        raise ValueError(
            f"there are {len(student)} positions of the student and {len(teacher)} of the teacher; "
            "they come in pairs, at least one (`common_boundaries` finds them)."
        )
    ours, theirs = (
        log_softened(x, temperature).exp().sort(-1, descending=True).values
        for x in (student, teacher.detach())
    )
    size = max(ours.shape[1], theirs.shape[1])
    ours, theirs = (nn.functional.pad(x, (0, size - x.shape[1])) for x in (ours, theirs))
    return (ours - theirs).abs().sum(-1).mean()  # $\sum_i |p^S_{(i)} - p^T_{(i)}|$


def common_boundaries(
    student_ends: Sequence[int], teacher_ends: Sequence[int]
) -> list[tuple[int, int]]:
    """Pairs of positions at which both have read the same text.

    Args:
        student_ends: For every token of the student, the character at which it ends; where several
            tokens make one character, it is read only after the last of them.
        teacher_ends: The teacher's.

    Raises:
        ValueError: Ends that go back.
    """
    for ends in (student_ends, teacher_ends):
        if any(a > b for a, b in pairwise(ends)):
            raise ValueError("the ends of tokens must not go back; give offsets of one text.")
    ours, theirs = ({end: i for i, end in enumerate(ends)} for ends in (student_ends, teacher_ends))
    return [(ours[end], theirs[end]) for end in sorted(ours.keys() & theirs.keys()) if end > 0]


def bridge_batch(texts: Sequence[str], student: Any, teacher: Any) -> dict[str, Any]:
    """A batch for `uld`: every text in both models' tokens, and the positions they share.

    Args:
        texts: The texts.
        student: Its tokenizer, with `encode(text)` that has `ids` and `offsets` (the tokenizers
            library).
        teacher: The teacher's, likewise.

    Raises:
        ValueError: No text, or texts of which no position can be paired.
    """
    rows, pairs = [], []
    for row, text in enumerate(texts):
        both = [tokenizer.encode(text) for tokenizer in (student, teacher)]
        ends = [[end for _, end in one.offsets] for one in both]
        rows.append([one.ids for one in both])
        # The last position foresees what comes after the text: there is nothing to learn.
        last = max((e[-1] for e in ends if e), default=0)
        pairs += [(row, i, j) for i, j in common_boundaries(*ends) if ends[0][i] < last]
    if not pairs:
        raise ValueError("no position of the texts can be paired; give at least a few words.")
    batch: dict[str, Any] = {"pairs": torch.tensor(pairs)}
    for side, name in enumerate(("student", "teacher")):
        longest = max(len(row[side]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        real = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row[side])] = torch.tensor(row[side], dtype=torch.long)
            real[i, : len(row[side])] = 1
        batch[f"{name}_ids"], batch[f"{name}_mask"] = ids, real
    return batch


def uld(teacher: nn.Module, *, weight: float = 1.5, temperature: float = 1.0) -> Loss:
    r"""The loss of (student, batch) across vocabularies: cross-entropy $+\, \lambda$ ULD.

    Args:
        teacher: A causal language model in evaluation mode; it is not trained.
        weight: $\lambda$, 0 or more.
        temperature: As in `uld_loss`.

    Raises:
        ValueError: A teacher in training mode, a negative weight, or a temperature of 0 or below.
    """
    check_teacher(teacher)
    check_temperature(temperature)
    if not weight >= 0:
        raise ValueError(f"weight is {weight}; it must not be negative.")

    def loss(student: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        check_teacher(teacher)
        ids, real = batch["student_ids"], batch["student_mask"]
        own = student(input_ids=ids, attention_mask=real, use_cache=False).logits
        with torch.no_grad():
            taught = teacher(
                input_ids=batch["teacher_ids"], attention_mask=batch["teacher_mask"],
                use_cache=False,
            ).logits  # fmt: skip
        labels = ids[:, 1:].masked_fill(real[:, 1:] == 0, -100)
        hard = nn.functional.cross_entropy(own[:, :-1].transpose(1, 2).float(), labels)
        row, i, j = batch["pairs"].T
        return hard + weight * uld_loss(own[row, i], taught[row, j], temperature=temperature)

    return loss
