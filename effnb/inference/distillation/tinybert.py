r"""TinyBERT: match embeddings, attention scores and hidden states layer by layer, then the answers.

A student of M layers and a teacher of N layers are joined by a map g: layer m learns from layer
g(m); 0 is the embedding. With a trained projection W between their widths,

$$L = \operatorname{MSE}(E^S W_e, E^T) + \sum_{m=1}^{M} \Bigl[
  \operatorname{MSE}(H^S_m W_h, H^T_{g(m)})
  + \frac1h \sum_{i=1}^{h} \operatorname{MSE}(A^S_{m,i}, A^T_{g(m),i}) \Bigr], \qquad
  L_\text{pred} = \operatorname{CE}(z^T / t, z^S / t).$$

A are attention scores *before* the softmax: probabilities are so small that their squared error
teaches almost nothing. Training has two stages, each of which begins with the layers: on a general
corpus (layers only), then on the task's augmented data (layers first, the answers after).

Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", 2019, arXiv 1909.10351,
eqs. 6 to 11; one projection for all layers as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_logits, check_teacher, check_temperature, log_softened
from effnb.core.training import Loss
from effnb.inference.distillation.attention_record import LayerAttention, run_recorded, same_heads
from effnb.inference.distillation.tokens import Tokens, arguments, said, teach

MAPS = ("uniform", "bottom", "top")
STAGES = ("layers", "answers")


def layer_map(
    student_layers: int, teacher_layers: int, kind: str | Sequence[int] = "uniform"
) -> tuple[int, ...]:
    r"""g(0), g(1), …, g(M): the teacher's layer that each of the student's learns from.

    "uniform" is $g(m) = m N / M$; "bottom" is $g(m) = m$, and "top" $g(m) = m + N - M$ (with
    $g(0) = 0$). Prediction learns from prediction, outside the map.

    Args:
        student_layers: M.
        teacher_layers: N.
        kind: A name, or the map itself, with g(0) first.

    Raises:
        ValueError: A student with more layers, a uniform map whose layers do not divide, or a given
            map that does not begin at 0, does not rise, or leaves the teacher.
    """
    m, n = student_layers, teacher_layers
    if not 1 <= m <= n:
        raise ValueError(
            f"the student has {m} layers and the teacher {n}; the student needs at least 1, and no "
            "more than the teacher."
        )
    if kind == "uniform":
        if n % m:
            raise ValueError(
                f"{n} layers of the teacher do not divide evenly by {m} of the student; choose "
                "another map (bottom, top, or a list of layers)."
            )
        return tuple(i * (n // m) for i in range(m + 1))  # $g(m) = m N / M$
    if kind == "bottom":
        return tuple(range(m + 1))
    if kind == "top":
        return (0, *range(n - m + 1, n + 1))
    if isinstance(kind, str):
        raise ValueError(f"the layer map is {kind!r}; choose {', '.join(MAPS)}, or give a list.")
    given = tuple(int(i) for i in kind)
    rises = all(a < b for a, b in pairwise(given))
    if len(given) != m + 1 or given[0] != 0 or not rises or given[-1] > n:
        raise ValueError(
            f"the layer map is {list(given)}; it needs {m + 1} numbers for the embedding and {m} "
            f"layers, rising from 0 to at most {n}."
        )
    return given


def attention_loss(
    student: Float[Tensor, "batch heads time time2"],
    teacher: Float[Tensor, "batch teacher_heads time time2"],
    seen: Bool[Tensor, "#batch some time time2"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\frac1h \sum_i \operatorname{MSE}(A^S_i, A^T_i)$ of scores before the softmax.

    Pairs that the mask hides count as equal, and in the mean, as in the authors' code.

    Raises:
        ValueError: Other numbers of heads.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the student's scores are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; heads and tokens must agree (MiniLM's relation heads need "
            "not)."
        )
    difference = student - teacher.detach()
    if seen is not None:
        difference = difference.masked_fill(~seen, 0)
    return difference.square().mean()  # $\frac1h \sum_i \mathrm{MSE}(A^S_i, A^T_i)$


def hidden_loss(
    student: Float[Tensor, "*batch dim"],
    teacher: Float[Tensor, "*teacher_batch teacher_dim"],
    projection: nn.Module | None = None,
) -> Float[Tensor, ""]:
    r"""$\operatorname{MSE}(H^S W, H^T)$; without a projection the widths must agree.

    Raises:
        ValueError: States that have other shapes after the projection.
    """
    projected = student if projection is None else projection(student)
    if projected.shape != teacher.shape:
        raise ValueError(
            f"the student's states are {tuple(projected.shape)} and the teacher's "
            f"{tuple(teacher.shape)}; give a projection to the teacher's width."
        )
    return nn.functional.mse_loss(projected, teacher.detach())  # $\mathrm{MSE}(H^S W_h, H^T)$


def prediction_loss(
    student: Float[Tensor, "*batch classes"],
    teacher: Float[Tensor, "*teacher_batch teacher_classes"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    r"""$\operatorname{CE}(z^T / t, z^S / t)$: soft cross-entropy, without the factor $t^2$.

    Raises:
        ValueError: A temperature of 0 or below, or scores that do not fit.
    """
    check_logits(student, teacher)
    p = log_softened(teacher.detach(), temperature).exp()
    return -(p * log_softened(student, temperature)).sum(-1).mean()


class TinyBertStudent(nn.Module):
    """A student with the projection to its teacher's width, which is trained with it.

    Attributes:
        student: The model; after training it is used alone.
        projection: The student's width to the teacher's, for embeddings and all layers.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, seed: int = 0) -> None:
        """Put a projection between two models.

        Args:
            student: The student, with `config.hidden_size`.
            teacher: The teacher, likewise.
            seed: Of the projection's first values.
        """
        super().__init__()
        self.student = student
        narrow, wide = student.config.hidden_size, teacher.config.hidden_size
        self.projection = nn.Linear(narrow, wide)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.projection.weight.normal_(0, narrow**-0.5, generator=draws)
            self.projection.bias.zero_()
        self.projection.to(next(student.parameters()))

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """What the student says."""
        return self.student(*inputs, **keywords)


def layers_loss(
    student: TinyBertStudent,
    states: tuple[Sequence[Tensor], Sequence[Tensor]],
    attention: tuple[Sequence[LayerAttention], Sequence[LayerAttention]],
    g: Sequence[int],
) -> Float[Tensor, ""]:
    r"""$L_\text{embd} + \sum_m (L_\text{hidn} + L_\text{attn})$ with layer m joined to layer g(m).

    Args:
        student: Its projection is used.
        states: Hidden states of student and teacher, the embedding first.
        attention: What their attention layers computed with.
        g: As `layer_map` gives it.

    Raises:
        ValueError: Heads or tokens that do not agree.
    """
    (own, taught), (own_attention, taught_attention) = states, attention
    loss = hidden_loss(own[0], taught[0], student.projection)  # $\mathrm{MSE}(E^S W_e, E^T)$
    for m, target in enumerate(g[1:], 1):
        loss = loss + hidden_loss(own[m], taught[target], student.projection)
        mine, theirs = own_attention[m - 1], taught_attention[target - 1]
        same_heads(mine, theirs, "MiniLM's relation heads need not")
        loss = loss + attention_loss(mine.scores(), theirs.scores(), mine.seen)
    return loss


def tinybert(
    teacher: nn.Module,
    *,
    layers: str | Sequence[int] = "uniform",
    stage: str = "layers",
    temperature: float = 1.0,
    causal: bool = True,
) -> Loss:
    """The loss of (student, batch), the student a `TinyBertStudent`.

    Args:
        teacher: A Hugging Face model in evaluation mode; it is not trained.
        layers: The layer map: a name or a list, as in `layer_map`.
        stage: "layers" matches embeddings, states and attention; "answers" the predictions.
        temperature: Of the predictions.
        causal: Whether the models foresee the next token; for masked words a batch has `labels`.

    Raises:
        ValueError: A teacher in training mode, an unknown stage, a map that does not fit, and
            models whose heads or vocabularies do not agree.
    """
    check_teacher(teacher)
    check_temperature(temperature)
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; choose {' or '.join(STAGES)}.")

    def answers(student: nn.Module, batch: Tokens) -> Tensor:
        taught = teach(teacher, batch, causal=causal)
        return prediction_loss(
            said(student, batch, causal=causal).logits, taught.logits, temperature
        )

    def inside(student: nn.Module, batch: Tokens) -> Tensor:
        if not isinstance(student, TinyBertStudent):
            raise ValueError(
                "this stage trains a projection too; give TinyBertStudent(student, teacher)."
            )
        check_teacher(teacher)
        passed = {key: value for key, value in arguments(batch).items() if key != "labels"}
        passed["output_hidden_states"] = True
        own, own_attention = run_recorded(student.student, **passed)
        with torch.no_grad():
            taught, taught_attention = run_recorded(teacher, **passed)
        g = layer_map(len(own_attention), len(taught_attention), layers)
        return layers_loss(
            student,
            (own.hidden_states, taught.hidden_states),
            (own_attention, taught_attention),
            g,
        )

    return answers if stage == "answers" else inside


def augment(
    model: nn.Module,
    ids: Int[Tensor, " time"],
    mask_id: int,
    *,
    copies: int = 20,
    probability: float = 0.4,
    candidates: int = 15,
    special: Bool[Tensor, " time"] | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "copies time"]:
    """Other texts of the same kind: words replaced by what a model of masked words would put there.

    Args:
        model: A model of masked words.
        ids: One text.
        mask_id: The mask's id.
        copies: How many texts to make.
        probability: With which each word is replaced.
        candidates: How many of the likeliest words to draw from, evenly.
        special: True for tokens that stay.
        generator: Where the draws come from.

    Raises:
        ValueError: A count below 1, or a probability outside [0, 1].

    Source: Jiao et al. 2019, algorithm 1; here every token is a word.
    """
    if copies < 1 or candidates < 1 or not 0 <= probability <= 1:
        raise ValueError(
            f"copies is {copies}, candidates {candidates} and probability {probability}; the first "
            "two must be at least 1, the third between 0 and 1."
        )
    check_teacher(model)
    places = torch.arange(len(ids))
    masked = ids.repeat(len(ids), 1)
    masked[places, places] = mask_id  # row t hides word t
    with torch.no_grad():
        logits = model(input_ids=masked).logits[places, places]
    best = logits.topk(min(candidates, logits.shape[-1]), -1).indices
    shape = (copies, len(ids))
    picks = torch.randint(best.shape[1], shape, generator=generator)
    replaced = torch.rand(shape, generator=generator) < probability
    if special is not None:
        replaced = replaced & ~special.cpu()
    return torch.where(replaced.to(ids.device), best[places, picks.to(ids.device)], ids)
