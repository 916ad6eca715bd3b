r"""What every objective makes of a text: inputs, targets, and what each position may see.

An objective turns a batch of token ids into an `Example`. One network can then be trained with any
of them: a Transformer's weights do not say whether it looks ahead, its mask does. A target is
aligned with the position that answers it: $\text{labels}_t$ is what position $t$ is asked, and -100
where it is asked nothing. (Libraries shift the labels of a causal model inside the loss; here they
are shifted when the example is made.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

IGNORED = -100
"""The label of a position that is asked nothing, as PyTorch's cross-entropy has it."""


@dataclass(frozen=True)
class Example:
    """A batch as a model is trained on it.

    Attributes:
        inputs: What the model reads.
        labels: What each position is asked; -100 where it is asked nothing.
        visible: Which positions (last axis) each position may see; every position sees itself.
        text_tokens: Tokens of text that the batch was made of, padding not counted.
        marks: Targets that are no text: sentinels and end marks.
        weights: How often each target counts; once when None.
    """

    inputs: Int[Tensor, "batch time"]
    labels: Int[Tensor, "batch time"]
    visible: Bool[Tensor, "batch time time"]
    text_tokens: int
    marks: int = 0
    weights: Float[Tensor, "batch time"] | None = None

    @property
    def targets(self) -> int:
        """Positions that give a loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def text_targets(self) -> int:
        """Tokens of the text that are predicted: the loss-bearing tokens."""
        return self.targets - self.marks

    @property
    def read_tokens(self) -> int:
        """Positions that the model computes, sentinels and padding included."""
        return self.inputs.numel()

    def bias(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "batch 1 time time"]:
        """The mask as Hugging Face models take it: 0 where a position is seen, else very small."""
        hidden = torch.zeros(self.visible.shape, dtype=dtype, device=self.visible.device)
        return hidden.masked_fill(~self.visible, torch.finfo(dtype).min)[:, None]


def example_loss(model: nn.Module, example: Example) -> Float[Tensor, ""]:
    r"""Mean cross-entropy of the targets, $-\frac{1}{|T|} \sum_{t \in T} \ln p_t(y_t)$, in nats.

    With weights $w_t$ it is $-\sum_t w_t \ln p_t(y_t) / \sum_t w_t$. The mean is over the positions
    that are asked something. Over all positions it would shrink with the mask rate, and the step
    that the optimizer takes with it.

    Args:
        model: Any Hugging Face model whose `logits` score the vocabulary. Of a model whose head is
            one linear layer behind its `base_model`, the head runs at the targets only, as in
            BERT's own code: with 15 % of the positions asked, that saves most of the head's work.
        example: What an objective made.

    Raises:
        ValueError: When no position is asked anything, or the model has no head or does not look
            where the mask says.
    """
    asked = example.labels != IGNORED
    if not bool(asked.any()):
        raise ValueError("no position is asked anything; give longer texts or a higher rate.")
    losses = nn.functional.cross_entropy(
        asked_logits(model, example, asked).float(), example.labels[asked], reduction="none"
    )
    if example.weights is None:
        return losses.mean()
    weights = example.weights[asked]
    return (weights * losses).sum() / weights.sum()


def asked_logits(
    model: nn.Module, example: Example, asked: Bool[Tensor, "batch time"]
) -> Float[Tensor, "asked vocabulary"]:
    """Scores of the vocabulary at the chosen positions; see `example_loss`."""
    check_heeds_mask(model)
    bias = example.bias(next(model.parameters()).dtype)
    if _plain_head(model):
        return model.get_output_embeddings()(hidden_states(model, example)[asked])
    found = model(input_ids=example.inputs, attention_mask=bias)
    if not hasattr(found, "logits"):
        raise ValueError(
            f"{type(model).__name__} has no head that scores the vocabulary; give the model with "
            "its language-modelling head."
        )
    return found.logits[asked]


def hidden_states(model: nn.Module, example: Example) -> Float[Tensor, "batch time hidden"]:
    """What the model's last layer makes of each position.

    Args:
        model: A Hugging Face model.
        example: Its inputs and mask are used.

    Raises:
        ValueError: When the model does not look where the mask says.
    """
    check_heeds_mask(model)
    base = getattr(model, "base_model", model)
    bias = example.bias(next(model.parameters()).dtype)
    return base(input_ids=example.inputs, attention_mask=bias)[0]


def _plain_head(model: nn.Module) -> bool:
    """Whether logits are one linear layer of what the base model gives, and nothing more."""
    children = dict(model.named_children())
    base = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    scaled = any(
        getattr(getattr(model, "config", None), name, None)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")
    )
    return (
        isinstance(head, nn.Linear)
        and base is not model
        and len(children) == 2
        and {id(m) for m in children.values()} == {id(base), id(head)}
        and not scaled
    )


# ------------------------------------------------------------------------------------ what is seen

_HEEDING: WeakSet[nn.Module] = WeakSet()
"""Models that were found to look where a mask says; each is asked once."""


@torch.no_grad()
def check_heeds_mask(model: nn.Module) -> None:
    """Refuse a model that does not look where a mask of four dimensions tells it to.

    A recurrent layer sees what came before and nothing else, and some models derive positions from
    the mask: trained with another mask than their own, both would learn something else than was
    asked, in silence. So four tokens are read with both masks: with the full one the first
    position has to notice a change of the last, with the causal one no earlier position may, and
    one of the two must give what the model gives by itself.

    Raises:
        ValueError: When one of these does not hold, or the model takes no such mask.
    """
    if model in _HEEDING:
        return
    name, base = type(model).__name__, getattr(model, "base_model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{name} has an encoder and a decoder, and an example is for one stack; give it the "
            "inputs and targets of span_corruption, and use its own loss."
        )
    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        heeds = _heeds(base)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        heeds = False
    finally:
        for module in training:
            module.training = True
    if not heeds:
        raise ValueError(
            f"{name} does not look where a mask tells it to; objectives differ in what a position "
            "may see, so give a Transformer whose attention takes a mask of four dimensions."
        )
    _HEEDING.add(model)


def _heeds(base: nn.Module) -> bool:
    """Whether a base model sees what two masks let it see, and is itself with one of them."""
    weight = base.get_input_embeddings().weight
    first = min(len(weight) // 2, max(0, len(weight) - 5))
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=weight.device) + first
    nothing = torch.full_like(ids, IGNORED)
    masks = (full_visible(4, ids.device), causal_visible(4, ids.device))
    full, causal = (
        base(
            input_ids=ids,
            attention_mask=Example(ids, nothing, seen.expand(2, -1, -1), 8).bias(weight.dtype),
        )[0].float()
        for seen in masks
    )
    own = base(input_ids=ids)[0].float()
    scale = float(own.abs().max())
    near = scale * (1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2)

    def same(a: Tensor, b: Tensor) -> bool:
        return bool(((a - b).abs() <= near).all())

    looks_ahead = not torch.equal(full[0, 0], full[1, 0])
    looks_back_only = same(causal[0, :3], causal[1, :3])
    return looks_ahead and looks_back_only and (same(own, full) or same(own, causal))


def causal_visible(time: int, device: torch.device | None = None) -> Bool[Tensor, "time time"]:
    r"""$M_{ij} = 1$ if $j \le i$: a position sees what came before it, and itself."""
    return torch.ones(time, time, dtype=torch.bool, device=device).tril()


def full_visible(time: int, device: torch.device | None = None) -> Bool[Tensor, "time time"]:
    """Every position sees every other."""
    return torch.ones(time, time, dtype=torch.bool, device=device)


def seen_text(
    visible: Bool[Tensor, "*batch time time"], text: Bool[Tensor, "batch time"]
) -> Bool[Tensor, "batch time time"]:
    """The same without padding: no position sees it, and it sees nothing but itself."""
    both = visible & text[:, None, :] & text[:, :, None]
    return both | torch.eye(text.shape[1], dtype=torch.bool, device=text.device)


# ---------------------------------------------------------------------------------------- bad input


def check_rate(rate: float, name: str = "the mask rate") -> None:
    """Refuse a rate that hides nothing or everything.

    Raises:
        ValueError: When it does not lie strictly between 0 and 1.
    """
    if isinstance(rate, bool) or not (math.isfinite(rate) and 0 < rate < 1):
        raise ValueError(f"{name} is {rate}; it must lie between 0 and 1, both excluded.")


def check_ids(ids: Tensor, least: int = 1) -> None:
    """Refuse what is no batch of token ids.

    Raises:
        ValueError: When ids are not whole numbers of shape (batch, time), or too few.
    """
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if ids.ndim != 2 or not whole or not len(ids) or ids.shape[1] < least:
        raise ValueError(
            f"the ids have shape {tuple(ids.shape)} and type {ids.dtype}; they must be whole "
            f"numbers of shape (batch, time), with at least {least} tokens in a text."
        )


def text_of(ids: Tensor, mask: Tensor | None, least: int = 1) -> Bool[Tensor, "batch time"]:
    """Which positions are text; refuses masks that do not fit.

    Args:
        ids: Token ids.
        mask: 1 or True where a token is text; None when all are.
        least: Tokens of text that every row must have.

    Raises:
        ValueError: When the mask has another shape than the ids, or a row has too little text.
    """
    check_ids(ids, least)
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.shape != ids.shape:
        raise ValueError(
            f"the mask has shape {tuple(mask.shape)} and the ids {tuple(ids.shape)}; a mask says "
            "of each token whether it is text."
        )
    text = mask.to(ids.device).bool()
    if int(text.sum(1).min()) < least:
        raise ValueError(
            f"a row has {int(text.sum(1).min())} tokens of text; each needs at least {least}."
        )
    return text


def candidates(
    ids: Int[Tensor, "batch time"], text: Bool[Tensor, "batch time"], special: Sequence[int]
) -> Bool[Tensor, "batch time"]:
    """Positions that may be hidden: text, and no special token.

    Raises:
        ValueError: When a row has none.
    """
    marks = torch.tensor(list(special), device=ids.device, dtype=ids.dtype)
    found = text & ~torch.isin(ids, marks)
    if not bool(found.any(1).all()):
        raise ValueError("a row has nothing but padding and special tokens; nothing can be hidden.")
    return found


def drawn(
    shape: Sequence[int], generator: torch.Generator | None, device: torch.device
) -> Float[Tensor, "*shape"]:
    """Uniform numbers in [0, 1), drawn on the generator's device so that all machines agree."""
    where = generator.device if generator is not None else "cpu"
    return torch.rand(tuple(shape), generator=generator, device=where).to(device)
