r"""Span corruption: cut spans out of a text and write them down, as in T5.

Of $n$ tokens $N = \operatorname{round}(\rho n)$ are noise, at least 1 and at most $n - 1$, in
$K = \max(1, \operatorname{round}(N / \mu))$ spans of mean length $\mu$. $N$ and $n - N$ are each
divided into $K$ positive parts, every division being equally likely, and the text alternates
between them: it **begins with text that stays and ends with noise**. Each span leaves a sentinel of
its own behind:

    text     We hold these truths to be self evident
    inputs   We hold X to be Y
    targets  X these truths Y self evident

Sentinels count down from the end of the vocabulary, and an end mark follows both sides. The code
writes no sentinel after the last span, although the paper's figure 2 has one.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
(T5), 2019, arXiv 1910.10683, sections 3.1.4 and 3.3.4; exact counts from the authors' code
(`random_spans_noise_mask`, `random_spans_helper`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from effnb.pretraining.objectives.examples import IGNORED, Example, check_ids, check_rate, drawn
from effnb.pretraining.objectives.prefix_lm import prefix_visible

DENSITY, MEAN_SPAN = 0.15, 3.0


def noise_counts(
    length: int, rate: float = DENSITY, mean_span: float = MEAN_SPAN
) -> tuple[int, int]:
    r"""$N$ noise tokens and $K$ spans of a text of `length` tokens.

    Products are rounded in float32 and halves to the even number, as in T5's code. There, more
    spans than tokens that stay (a rate near 1 with short spans) give a mask that is not what was
    asked for; here $K$ is at most $\min(N, n - N)$.

    Args:
        length: $n$, at least 2.
        rate: $\rho$, the part of the tokens that is noise; strictly between 0 and 1.
        mean_span: $\mu$, mean length of a span; at least 1.

    Raises:
        ValueError: When a number is outside its range.
    """
    check_rate(rate)
    if not (math.isfinite(mean_span) and mean_span >= 1):
        raise ValueError(f"the mean span is {mean_span} tokens; it must be at least 1.")
    if length < 2:
        raise ValueError(f"the text has {length} tokens; span corruption needs at least 2.")
    n = torch.tensor(float(length))  # float32
    noise = min(max(int(torch.round(n * rate)), 1), length - 1)  # N = clip(round(rho n), 1, n - 1)
    spans = max(int(torch.round(torch.tensor(float(noise)) / mean_span)), 1)  # max(1, round(N/mu))
    return noise, min(spans, noise, length - noise)


def raw_length(inputs: int, rate: float = DENSITY, mean_span: float = MEAN_SPAN) -> tuple[int, int]:
    r"""Tokens of text that become `inputs` tokens for the encoder, and the tokens of the targets.

    The longest text that fits, with one sentinel for each span on both sides and an end mark:
    for 512 inputs at 15 % and spans of 3 it has 568 tokens, and 114 targets.

    Args:
        inputs: Length of the encoder's input, end mark included.
        rate: $\rho$.
        mean_span: $\mu$.

    Raises:
        ValueError: When no text of two tokens fits, or as `noise_counts`.

    Source: `random_spans_helper` in T5's code.
    """

    def lengths(text: int) -> tuple[int, int]:
        noise = round(text * rate)
        spans = round(noise / mean_span)
        return text - noise + spans + 1, noise + spans + 1

    noise_counts(2, rate, mean_span)
    if inputs < 4:
        raise ValueError(f"inputs is {inputs}; a token, a sentinel and an end mark need 4 or more.")
    text = inputs - 1
    while lengths(text + 1)[0] <= inputs:
        text += 1
    targets = lengths(text)[1]
    if rate == 0.5 and targets > lengths(text)[0]:  # as there: equal lengths on both sides
        return text - 1, targets - 1
    return text, targets


def composition(
    total: int, parts: int, batch: int = 1, generator: torch.Generator | None = None
) -> Int[Tensor, "batch parts"]:
    r"""`total` as an ordered sum of `parts` positive numbers; all are equally likely.

    $K - 1$ cuts are put in $n - 1$ gaps, so a part is $k$ long with probability
    $\binom{n - k - 1}{K - 2} / \binom{n - 1}{K - 1}$: not a geometric distribution.

    Raises:
        ValueError: When there are more parts than the total, or none.
    """
    if not 1 <= parts <= total:
        raise ValueError(f"{total} cannot be divided into {parts} positive parts.")
    order = drawn((batch, total - 1), generator, torch.device("cpu")).argsort(1)
    begins = torch.zeros(batch, total, dtype=torch.long)
    begins[:, 1:] = (order < parts - 1).long()  # K - 1 of the n - 1 gaps, in random order
    part = begins.cumsum(1)
    return torch.zeros(batch, parts, dtype=torch.long).scatter_add_(1, part, torch.ones_like(part))


def noise_mask(
    length: int,
    rate: float = DENSITY,
    mean_span: float = MEAN_SPAN,
    *,
    batch: int = 1,
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "batch length"]:
    """Which tokens are noise: text that stays first, then a span of noise, and so on.

    Args:
        length: Tokens of the text.
        rate: Part of them that is noise.
        mean_span: Mean length of a span.
        batch: Number of masks.
        generator: Source of the draws.

    Raises:
        ValueError: As `noise_counts`.
    """
    noise, spans = noise_counts(length, rate, mean_span)
    stays = composition(length - noise, spans, batch, generator)
    goes = composition(noise, spans, batch, generator)
    lengths = torch.stack([stays, goes], 2).flatten(1)  # nonnoise 1, noise 1, nonnoise 2, …
    kinds = torch.arange(2 * spans).remainder(2).bool()
    return torch.stack([kinds.repeat_interleave(row) for row in lengths])


@dataclass(frozen=True)
class SpanCorrupted:
    """A batch of texts with spans cut out.

    Attributes:
        inputs: What stays, with a sentinel in the place of each span, and the end mark.
        targets: Sentinel and span in turn, and the end mark.
        noise: Which tokens of the texts were cut out.
        text_tokens: Tokens of text.
    """

    inputs: Int[Tensor, "batch inputs"]
    targets: Int[Tensor, "batch targets"]
    noise: Bool[Tensor, "batch time"]
    text_tokens: int

    def example(self) -> Example:
        """For one stack of layers: the inputs as a prefix that sees itself, then the targets.

        T5 has an encoder and a decoder. Its paper also trains a single stack on this objective
        ("prefix LM" in table 2), which needs half of the parameters; so here all objectives share
        one network. Loss is on the targets, sentinels and the end mark included.
        """
        ids = torch.cat([self.inputs, self.targets[:, :-1]], 1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, self.inputs.shape[1] - 1 :] = self.targets  # the end mark is asked for the first
        prefix = torch.full((len(ids),), self.inputs.shape[1], device=ids.device)
        marks = self.targets.numel() - int(self.noise.sum())
        return Example(ids, labels, prefix_visible(prefix, ids.shape[1]), self.text_tokens, marks)


def span_corruption(
    ids: Int[Tensor, "batch time"],
    rate: float = DENSITY,
    mean_span: float = MEAN_SPAN,
    *,
    first_sentinel: int,
    end: int,
    sentinels: int = 100,
    noise: Bool[Tensor, "masks mask_time"] | None = None,
    generator: torch.Generator | None = None,
) -> SpanCorrupted:
    r"""Cut random spans out of texts of equal length.

    Args:
        ids: Token ids, (batch, time), without padding: T5 packs texts to one length.
        rate: $\rho$, part of the tokens that is noise.
        mean_span: $\mu$, mean length of a span.
        first_sentinel: Id of the first sentinel; the next ones count down. In T5's vocabulary it is
            the last id, 32,099.
        end: Id of the end mark.
        sentinels: Sentinels that the vocabulary has; T5 has 100.
        noise: Which tokens are noise; drawn as T5 draws when None.
        generator: Source of the draws.

    Raises:
        ValueError: As `noise_counts`; when a text has a sentinel in it, or too few sentinels exist;
            when `noise` has another shape than the ids.

    Source: Raffel et al., 2019, section 3.1.4.
    """
    check_ids(ids, 2)
    if noise is None:
        noise = noise_mask(ids.shape[1], rate, mean_span, batch=len(ids), generator=generator).to(
            ids.device
        )
    if noise.shape != ids.shape:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)} and the ids {tuple(ids.shape)}; it says of each "
            "token whether it is cut out."
        )
    lowest = first_sentinel - sentinels + 1
    if bool(((ids >= lowest) & (ids <= first_sentinel)).any()):
        raise ValueError(
            f"a text holds a sentinel (ids {lowest} to {first_sentinel}); sentinels only mark what "
            "was cut out."
        )
    needed = int(_begins(noise).sum(1).max())
    if needed > sentinels:
        raise ValueError(
            f"{needed} spans need as many sentinels, and there are {sentinels}; use longer spans, "
            "a lower rate or shorter texts."
        )
    inputs = [_side(row, m, first_sentinel, end) for row, m in zip(ids, noise)]
    targets = [_side(row, ~m, first_sentinel, end) for row, m in zip(ids, noise)]
    for side in (inputs, targets):
        if len({len(row) for row in side}) > 1:
            raise ValueError(
                "the rows of `noise` cut out different numbers of tokens or spans, so they do not "
                "fit one batch; give each text by itself."
            )
    return SpanCorrupted(torch.stack(inputs), torch.stack(targets), noise, ids.numel())


def restore(
    inputs: Int[Tensor, " inputs"],
    targets: Int[Tensor, " targets"],
    *,
    first_sentinel: int,
    end: int,
    sentinels: int = 100,
) -> Int[Tensor, " time"]:
    """The text that a pair of inputs and targets was made of.

    Args:
        inputs: One text's inputs, with or without the end mark.
        targets: Its targets.
        first_sentinel: As in `span_corruption`.
        end: Id of the end mark.
        sentinels: As in `span_corruption`.

    Raises:
        ValueError: When the two do not have the same sentinels in the same order.
    """
    low = first_sentinel - sentinels

    def is_mark(token: int) -> bool:
        return low < token <= first_sentinel

    sides = [
        row.tolist()[:-1] if len(row) and int(row[-1]) == end else row.tolist()
        for row in (inputs, targets)
    ]
    spans: dict[int, list[int]] = {}
    span: list[int] = []
    for token in sides[1]:
        if is_mark(token):
            span = spans.setdefault(token, [])
        else:
            span.append(token)
    found, seen = [], []
    for token in sides[0]:
        if is_mark(token):
            seen.append(token)
            found += spans.get(token, [])
        else:
            found.append(token)
    if seen != list(spans):
        raise ValueError(
            f"the inputs hold the sentinels {seen} and the targets {list(spans)}; a pair has the "
            "same ones in the same order."
        )
    return torch.tensor(found, dtype=inputs.dtype, device=inputs.device)


def _begins(noise: Bool[Tensor, "*batch time"]) -> Bool[Tensor, "*batch time"]:
    """Where a span begins."""
    before = torch.nn.functional.pad(noise[..., :-1], (1, 0))
    return noise & ~before


def _side(
    ids: Int[Tensor, " time"], gone: Bool[Tensor, " time"], first_sentinel: int, end: int
) -> Int[Tensor, " side"]:
    """A text with a sentinel in the place of each run that is gone, and the end mark."""
    begins = _begins(gone)
    marked = torch.where(begins, first_sentinel + 1 - begins.cumsum(0), ids)
    return torch.cat([marked[begins | ~gone], marked.new_tensor([end])])
