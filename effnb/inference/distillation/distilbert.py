r"""DistilBERT: half the layers of a BERT, started from them, trained with three losses at once.

$$L = 5\, \tau^2 \operatorname{KL}(p^\tau \| q^\tau) + 2\, L_\text{MLM} + L_\text{cos}, \qquad
  L_\text{cos} = \frac1n \sum_t \bigl(1 - \cos(h^S_t, h^T_t)\bigr),$$

with $\tau = 2$: the teacher's softened words, the masked words themselves, and the direction of the
last hidden state of every token that is not padding. The student has the teacher's width, so no
projection is needed, and starts as every other layer of it.

Sanh, Debut, Chaumond, Wolf, "DistilBERT, a distilled version of BERT: smaller, faster, cheaper and
lighter", 2019, arXiv 1910.01108; weights and layers as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.losses import check_teacher, check_temperature, masked_mean, temperature_kl
from effnb.core.modules import Model, clone, find_stacks
from effnb.core.training import Loss, targets
from effnb.inference.distillation.tokens import Tokens, arguments

BERT_LAYERS = (0, 2, 4, 7, 9, 11)
"""Layers of a twelve-layer teacher that the student starts from."""


def cosine_loss(
    student: Float[Tensor, "*batch dim"],
    teacher: Float[Tensor, "*teacher_batch teacher_dim"],
    mask: Bool[Tensor, "*masked"] | None = None,
) -> Float[Tensor, ""]:
    r"""$\frac1n \sum_t (1 - \cos(h^S_t, h^T_t))$ over the tokens that are not padding.

    Raises:
        ValueError: Hidden states of other widths or positions.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"the hidden states are {tuple(student.shape)} and {tuple(teacher.shape)}; DistilBERT "
            "compares states of one width (TinyBERT projects the student's)."
        )
    # $1 - \cos(h^S, h^T)$
    distance = 1 - nn.functional.cosine_similarity(student, teacher.detach(), -1)
    return masked_mean(distance, mask)


def distilbert_loss(
    student: Float[Tensor, "batch time vocabulary"],
    teacher: Float[Tensor, "batch time teacher_vocabulary"],
    labels: Int[Tensor, "batch time"],
    student_hidden: Float[Tensor, "batch hidden_time dim"],
    teacher_hidden: Float[Tensor, "batch hidden_time teacher_dim"],
    real: Bool[Tensor, "batch hidden_time"] | None = None,
    *,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    only_masked: bool = False,
) -> Float[Tensor, ""]:
    r"""$w_1 L_\text{KD} + w_2 L_\text{MLM} + w_3 L_\text{cos}$.

    Args:
        student: Scores of words, (batch, time, vocabulary).
        teacher: The teacher's.
        labels: The words, -100 where none is asked for; aligned with the scores.
        student_hidden: Last hidden states.
        teacher_hidden: The teacher's, of the same width.
        real: True for tokens that are not padding; all when None.
        temperature: $\tau$ of the first part.
        weights: The three weights. A part of weight 0 is not computed.
        only_masked: Whether the teacher is imitated only where a word is asked for.

    Raises:
        ValueError: A temperature of 0 or below, a negative weight or none above 0, or shapes that
            do not fit.
    """
    check_weights(weights)
    counted = labels != -100
    loss = student.new_zeros(())
    if weights[0]:
        # Where the scores are one shorter than the states, the last position foresees nothing.
        everywhere = None if real is None else real[:, : student.shape[1]]
        where = counted if only_masked else everywhere
        loss = loss + weights[0] * temperature_kl(student, teacher, temperature, where)
    if weights[1]:
        flat = student.flatten(0, 1).float()
        loss = loss + weights[1] * nn.functional.cross_entropy(flat, labels.flatten())
    if weights[2]:
        loss = loss + weights[2] * cosine_loss(student_hidden, teacher_hidden, real)
    return loss


def check_weights(weights: tuple[float, ...]) -> None:
    """Refuse weights that weigh nothing.

    Raises:
        ValueError: A negative weight, or none above 0.
    """
    if min(weights) < 0 or not max(weights) > 0:
        raise ValueError(f"weights are {weights}; none may be negative, and one must be above 0.")


def distilbert(
    teacher: nn.Module,
    *,
    temperature: float = 2.0,
    weights: tuple[float, float, float] = (5.0, 2.0, 1.0),
    only_masked: bool = False,
    causal: bool = False,
) -> Loss:
    """The loss of (student, batch) for Hugging Face language models.

    Args:
        teacher: A language model in evaluation mode; it is not trained.
        temperature: As in `distilbert_loss`.
        weights: As in `distilbert_loss`.
        only_masked: As in `distilbert_loss`.
        causal: Whether the models foresee the next token; the words asked for are then those of the
            text. Otherwise a batch has `labels`, as `mask_tokens` makes them.

    Raises:
        ValueError: A teacher in training mode, and what `distilbert_loss` refuses.
    """
    check_teacher(teacher)
    check_temperature(temperature)
    check_weights(weights)

    def loss(student: nn.Module, batch: Tokens) -> Tensor:
        check_teacher(teacher)
        given = arguments(batch)
        if not causal and "labels" not in given:
            raise ValueError("a batch for masked words needs `labels`; `mask_tokens` makes them.")
        labels = targets(given) if causal else given["labels"]
        passed = {key: value for key, value in given.items() if key != "labels"}
        passed["output_hidden_states"] = True
        if causal:
            passed.setdefault("use_cache", False)
        own = student(**passed)
        with torch.no_grad():
            taught = teacher(**passed)
        mask = given.get("attention_mask")
        real = None if mask is None or mask.ndim != 2 else mask != 0
        shift = 1 if causal else 0
        length = labels.shape[1] - shift
        return distilbert_loss(
            own.logits[:, :length],
            taught.logits[:, :length],
            labels[:, shift:],
            own.hidden_states[-1],
            taught.hidden_states[-1],
            real,
            temperature=temperature,
            weights=weights,
            only_masked=only_masked,
        )

    return loss


def student_from_layers(model: Model, layers: Sequence[int]) -> Model:
    """A smaller model that starts as some layers of a larger one.

    Embeddings, norms and heads are copied too. The result shares no tensor with the original: it is
    made to be trained.

    Args:
        model: A Hugging Face model with one stack of blocks.
        layers: Numbers of the blocks to keep, in ascending order, such as `BERT_LAYERS`.

    Raises:
        ValueError: No layer, layers that are not there or not in ascending order, or a model with
            several stacks.
    """
    stacks = find_stacks(model)
    if len(stacks) > 1:
        raise ValueError(f"the model has several stacks of blocks: {', '.join(stacks)}.")
    ((path, blocks),) = stacks.items()
    chosen = list(layers)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= len(blocks):
        raise ValueError(
            f"layers are {chosen}; give numbers from 0 to {len(blocks) - 1} in ascending order."
        )
    result = clone(model)
    kept = nn.ModuleList([result.get_submodule(path)[i] for i in chosen])
    parent, _, leaf = path.rpartition(".")
    setattr(result.get_submodule(parent), leaf, kept)
    for index, block in enumerate(kept):
        for module in block.modules():  # where a cache looks for the layer's keys
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    config = getattr(result, "config", None)
    if config is not None:
        if isinstance(getattr(config, "layer_types", None), list):
            config.layer_types = [config.layer_types[i] for i in chosen]
        config.num_hidden_layers = len(kept)
    return result


def mask_tokens(
    ids: Int[Tensor, "batch time"],
    mask_id: int,
    vocabulary: int,
    *,
    probability: float = 0.15,
    special: Bool[Tensor, "batch time"] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Mask words afresh for every batch, and return (ids, labels).

    Of the chosen tokens 80 % become the mask, 10 % a random token, and 10 % stay.

    Args:
        ids: Token ids.
        mask_id: The mask's id.
        vocabulary: Number of token ids.
        probability: Share of tokens to choose.
        special: True for tokens that are never chosen (padding, separators).
        generator: Where the draws come from.

    Raises:
        ValueError: A probability outside (0, 1].

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language
    Understanding", 2018, arXiv 1810.04805, section 3.1.
    """
    if not 0 < probability <= 1:
        raise ValueError(f"probability is {probability}; it must lie in (0, 1].")
    draws = torch.rand(2, *ids.shape, generator=generator).to(ids.device)
    other = torch.randint(vocabulary, ids.shape, generator=generator).to(ids)
    chosen = draws[0] < probability
    if special is not None:
        chosen = chosen & ~special
    labels = ids.masked_fill(~chosen, -100)
    masked = torch.where(chosen & (draws[1] < 0.8), torch.full_like(ids, mask_id), ids)
    masked = torch.where(chosen & (draws[1] >= 0.9), other, masked)
    return masked, labels
