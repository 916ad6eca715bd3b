r"""ELECTRA: tell for every token whether it was replaced.

A small **generator** fills in masked tokens, as BERT does, and draws from its own softmax. The
**discriminator**, which is the model that is kept, reads the result and says of *every* token
whether it is the original one:

$$\mathcal L = \mathcal L_{\text{MLM}}(\theta_G) + \lambda\, \mathcal L_{\text{Disc}}(\theta_D),
\qquad \lambda = 50$$

No gradient passes through the draw. A drawn token that equals the original counts as original.

**Masking is not BERT's.** The authors' code draws $\operatorname{round}(\rho\, n)$ positions *with
replacement*, so that fewer are chosen: 14.0 % of 512 tokens at $\rho = 0.15$. Each draw shows the
mask token with probability 0.85 and leaves the token otherwise. A position drawn twice counts twice
in the generator's loss. (Where the code would also mix the ids of two draws for one position, one
token is drawn here.)

Clark, Luong, Le, Manning, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than
Generators", 2020, arXiv 2003.10555, section 2.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.pretraining.objectives.examples import (
    IGNORED,
    Example,
    candidates,
    check_rate,
    drawn,
    full_visible,
    hidden_states,
    seen_text,
    text_of,
)

LAMBDA = 50.0
"""Weight of the discriminator's loss."""
SHOWN_MASKED = 0.85
"""Part of the draws that show the mask token."""


def electra_masking(
    ids: Int[Tensor, "batch time"],
    rate: float = 0.15,
    *,
    mask_token: int,
    special: Sequence[int] = (),
    mask: Tensor | None = None,
    shown_masked: float = SHOWN_MASKED,
    generator: torch.Generator | None = None,
) -> Example:
    r"""What the generator is asked: positions drawn with replacement, mostly masked.

    The expected number of distinct positions among $m$ candidates is
    $m\,(1 - (1 - 1/m)^{\operatorname{round}(\rho n)})$.

    Args:
        ids: Token ids, (batch, time).
        rate: $\rho$; draws as a part of a row's tokens of text. 0.15, and 0.25 for large models.
        mask_token: Id of the mask token.
        special: Tokens that are never chosen.
        mask: 1 where a token is text. All when None.
        shown_masked: Part of the draws that show the mask token; the rest leaves the token.
        generator: Source of the draws.

    Returns:
        The generator's example; its `weights` say how often each position was drawn.

    Raises:
        ValueError: A rate outside (0, 1), a part outside [0, 1], or what does not fit.

    Source: Clark et al., 2020, section 2, and the authors' `pretrain_helpers.mask`.
    """
    check_rate(rate)
    if not 0 <= shown_masked <= 1:
        raise ValueError(f"shown_masked is {shown_masked}; it must lie between 0 and 1.")
    text = text_of(ids, mask)
    allowed = candidates(ids, text, special)
    draws = (text.sum(1).float() * rate).round().long().clamp(min=1)  # max(1, round(rho n))
    most, time = int(draws.max()), ids.shape[1]
    # Each draw takes one of a row's candidates: number floor(u m) in their order.
    counts = allowed.sum(1, keepdim=True)
    place = (drawn((len(ids), most), generator, ids.device) * counts).long()
    order = torch.where(allowed, torch.arange(time, device=ids.device), time).sort(1).values
    position = order.gather(1, torch.minimum(place, counts - 1))
    counted = torch.arange(most, device=ids.device)[None] < draws[:, None]
    shows = counted & (drawn(position.shape, generator, ids.device) < shown_masked)
    times = torch.zeros(ids.shape, device=ids.device)
    times.scatter_add_(1, position, counted.float())
    covered = torch.zeros(ids.shape, device=ids.device).scatter_add_(1, position, shows.float()) > 0
    inputs = torch.where(covered, mask_token, ids)
    labels = torch.where(times > 0, ids, IGNORED)
    visible = full_visible(time, ids.device).expand(len(ids), -1, -1)
    return Example(inputs, labels, seen_text(visible, text), int(text.sum()), weights=times)


@dataclass(frozen=True)
class Replaced:
    """What the discriminator reads and is asked.

    Attributes:
        inputs: The text with the generator's tokens in it.
        labels: 1 where a token is not the original one, 0 where it is.
        counted: Which positions are asked: all of the text.
        visible: Which positions each may see.
    """

    inputs: Int[Tensor, "batch time"]
    labels: Float[Tensor, "batch time"]
    counted: Bool[Tensor, "batch time"]
    visible: Bool[Tensor, "batch time time"]


def replace_tokens(
    ids: Int[Tensor, "batch time"],
    example: Example,
    logits: Float[Tensor, "asked vocabulary"],
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Replaced:
    r"""Draw a token for every chosen position and say which tokens are no longer the original.

    $\hat x_t \sim p_G(\cdot \mid \tilde x)$ at chosen positions, by the Gumbel trick and without a
    gradient; $y_t = 1$ if $\hat x_t \ne x_t$, else 0.

    Args:
        ids: The original text.
        example: What the generator was asked.
        logits: Its scores at the asked positions, in the order of the batch.
        mask: 1 where a token is text. All when None.
        temperature: Divides the scores.
        generator: Source of the draws.

    Raises:
        ValueError: When the scores are not one row for each asked position, or the temperature is
            not above 0.

    Source: Clark et al., 2020, section 2.
    """
    text = text_of(ids, mask)
    asked = example.labels != IGNORED
    if len(logits) != int(asked.sum()):
        raise ValueError(
            f"there are scores for {len(logits)} positions; the generator was asked "
            f"{int(asked.sum())}."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    uniform = drawn(logits.shape, generator, logits.device).clamp(1e-9, 1 - 1e-7)
    gumbel = -torch.log(-torch.log(uniform))
    # argmax(z / tau + Gumbel noise) is a draw from softmax(z / tau)
    sampled = (logits.detach().float() / temperature + gumbel).argmax(-1)
    inputs = ids.clone()
    inputs[asked] = sampled.to(ids.dtype)
    return Replaced(inputs, (inputs != ids).float(), text, example.visible)


def discriminator_loss(
    logits: Float[Tensor, "batch time"],
    replaced: Replaced,
    counted: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    r"""$-\frac1n \sum_t y_t \ln \sigma(z_t) + (1 - y_t) \ln (1 - \sigma(z_t))$ over all text.

    Args:
        logits: $z_t$, above 0 for "replaced".
        replaced: What was read.
        counted: Positions that count; all of the text when None. ELECTRA 15 %, an ablation of the
            paper, counts the generator's positions only.

    Raises:
        ValueError: When no position counts, or the logits are of other positions.

    Source: Clark et al., 2020, section 2.
    """
    counted = replaced.counted if counted is None else counted & replaced.counted
    if logits.shape != replaced.labels.shape:
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, the text {tuple(replaced.labels.shape)}."
        )
    if not bool(counted.any()):
        raise ValueError("no position counts; at least one must.")
    return nn.functional.binary_cross_entropy_with_logits(
        logits[counted].float(), replaced.labels[counted]
    )


class Electra(nn.Module):
    """A discriminator, the model that is kept, with the generator that makes its task.

    Args:
        model: A Hugging Face model with a head that scores the vocabulary, such as a Llama or a
            BERT; its base becomes the discriminator. It is copied, not changed.
        width: Width of the generator, as a part of the discriminator's: a quarter to a half. Depth
            is the same, and the embedding is shared.
        seed: Seed of the new weights.

    Raises:
        ValueError: A width outside (0, 1], or one that the heads do not divide.
    """

    def __init__(self, model: nn.Module, width: float = 0.25, seed: int = 0) -> None:
        super().__init__()
        if not 0 < width <= 1:
            raise ValueError(f"width is {width}; it must lie above 0 and be at most 1.")
        config = copy.deepcopy(model.config)
        heads = config.num_attention_heads
        hidden = config.hidden_size
        small = round(hidden * width)
        if small % heads or (small // heads) % 2:
            raise ValueError(
                f"a generator {small} wide does not divide into {heads} heads of an even width; "
                "choose another width."
            )
        config.hidden_size = small
        config.intermediate_size = max(1, round(config.intermediate_size * width))
        if getattr(config, "head_dim", None) is not None:
            config.head_dim = small // heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = copy.deepcopy(model.base_model)
            self.small = type(model.base_model)(config)
            self.narrow = nn.Linear(hidden, small, bias=False)
            self.widen = nn.Linear(small, hidden, bias=False)
            self.dense = nn.Linear(hidden, hidden)
            self.output = nn.Linear(hidden, 1)
        _without_embedding(self.small)

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding that both share."""
        return self.body.get_input_embeddings()

    def generator_logits(
        self, example: Example, asked: Bool[Tensor, "batch time"]
    ) -> Float[Tensor, "asked vocabulary"]:
        """The generator's scores of the vocabulary at the chosen positions."""
        x = self.narrow(self.embedding(example.inputs))
        hidden = self.small(inputs_embeds=x, attention_mask=example.bias(x.dtype))[0]
        return self.widen(hidden[asked]) @ self.embedding.weight.T

    def discriminate(self, replaced: Replaced) -> Float[Tensor, "batch time"]:
        """Above 0 where the discriminator takes a token for a replaced one."""
        example = Example(replaced.inputs, replaced.inputs, replaced.visible, 0)
        hidden = hidden_states(self.body, example)
        return self.output(nn.functional.gelu(self.dense(hidden)))[..., 0]

    def loss(
        self,
        ids: Int[Tensor, "batch time"],
        example: Example,
        *,
        mask: Tensor | None = None,
        weight: float = LAMBDA,
        everywhere: bool = True,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, ""]:
        r"""$\mathcal L_{\text{MLM}} + \lambda \mathcal L_{\text{Disc}}$ of one batch.

        Args:
            ids: The original text.
            example: From `electra_masking`.
            mask: 1 where a token is text.
            weight: $\lambda$.
            everywhere: Whether every token is judged; the generator's positions only if False
                (ELECTRA 15 %).
            generator: Source of the draws.

        Source: Clark et al., 2020, section 2.
        """
        asked = example.labels != IGNORED
        logits = self.generator_logits(example, asked)
        losses = nn.functional.cross_entropy(
            logits.float(), example.labels[asked], reduction="none"
        )
        times = torch.ones_like(losses) if example.weights is None else example.weights[asked]
        mlm = (times * losses).sum() / times.sum()
        replaced = replace_tokens(ids, example, logits, mask=mask, generator=generator)
        counted = None if everywhere else asked
        found = discriminator_loss(self.discriminate(replaced), replaced, counted)
        return mlm + weight * found  # L_MLM + lambda L_Disc


def _without_embedding(body: nn.Module) -> None:
    """Drop a word embedding that is never used: inputs come as vectors."""
    old = body.get_input_embeddings()
    body.set_input_embeddings(nn.Embedding(1, old.embedding_dim))
    body.get_input_embeddings().weight.requires_grad_(False)
