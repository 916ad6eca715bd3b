"""Quality of a language model: perplexity on running text, and accuracy in a ranked choice.

The two are reported together because they can disagree: perplexity averages over every token, most
of them easy; the choice asks whether the model still prefers the truth to what is only plausible.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.context import check_causal, check_context


@dataclass(frozen=True)
class Perplexity:
    r"""What a pass over held-out tokens found.

    Attributes:
        nats_per_token: Mean negative log-likelihood, $-\frac1N \sum_t \ln p(x_t \mid x_{<t})$.
        tokens: $N$, the number of tokens scored.
    """

    nats_per_token: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token (infinity where that overflows)."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    def bits_per_byte(self, byte_count: int) -> float:
        """The same loss per byte of the text: fair between models with different tokenizers."""
        return self.nats_per_token * self.tokens / math.log(2) / byte_count


def token_losses(
    model: nn.Module, ids: Int[Tensor, "batch time"]
) -> Float[Tensor, "batch time_minus_1"]:
    r"""$-\ln p(x_{t+1} \mid x_{\le t})$ of each token after the first, in nats, in float32."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def perplexity(
    model: nn.Module,
    ids: Int[Tensor, "*tokens"],
    *,
    context: int = 512,
    stride: int | None = None,
    batch_size: int = 8,
) -> Perplexity:
    r"""Perplexity of a causal language model on one long sequence, by a sliding window.

    Windows of `context` tokens start every `stride` tokens. Each token but the first is scored
    exactly once, in the first window that holds it, so with a stride of half the context every
    token but those of the first window sees at least half a context before it. The last window is
    moved back to end with the text.

    Args:
        model: A Hugging Face causal language model, or anything that returns `.logits`.
        ids: Token ids of the text.
        context: Window length in tokens.
        stride: Tokens between two windows; the context itself by default, which is fastest and a
            little pessimistic (windows then share one token only).
        batch_size: Windows at a time.

    Raises:
        ValueError: Fewer than two tokens, a stride outside 1 … context, a context longer than the
            model has positions, a model that sees the tokens it is to foresee (BERT and its kin),
            or weights on the meta device.
    """
    check_loaded(model)
    ids = torch.as_tensor(ids)
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(
            f"perplexity needs one sequence of at least 2 tokens; got shape {tuple(ids.shape)}."
        )
    stride = context if stride is None else stride
    if not 1 <= stride <= context or context < 2:
        raise ValueError(f"stride is {stride}; it must lie between 1 and the context ({context}).")
    check_context(model, context)
    check_causal(model, ids[None])
    device = next(model.parameters()).device
    n = len(ids)
    width = min(context, n)
    starts, done, scored = [], 1, []
    # A window's first token is not foreseen by anything, so the next window starts on the last
    # token of this one at the latest.
    for start in range(0, n, min(stride, max(1, width - 1))):
        start = min(start, n - width)
        starts.append(start)
        scored.append(done)  # the first token this window has to score
        done = start + width
        if done == n:
            break
    total, count = 0.0, 0
    with torch.inference_mode():
        for at in range(0, len(starts), batch_size):
            part = starts[at : at + batch_size]
            rows = torch.stack([ids[s : s + width] for s in part]).to(device)
            losses = token_losses(model, rows)
            for row, start, first in zip(losses, part, scored[at : at + batch_size], strict=True):
                new = row[first - start - 1 :].double()
                total, count = total + float(new.sum()), count + len(new)
    return Perplexity(total / count, count)


@runtime_checkable
class Choice(Protocol):
    """One question: a context, continuations to choose from, and which of them is true."""

    context: str
    choices: Sequence[str]
    answer: int


@dataclass(frozen=True)
class RankedChoice:
    """What a ranked-choice test found.

    Attributes:
        accuracy: Part of the questions in which the true continuation ranked first.
        questions: Number of questions.
        correct: Which ones were answered, in order: for paired comparisons of two models.
    """

    accuracy: float
    questions: int
    correct: tuple[bool, ...]

    @property
    def standard_error(self) -> float:
        r"""$\sqrt{a (1 - a) / n}$: how far chance alone moves the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.questions)


@dataclass(frozen=True)
class ChoiceLikelihoods:
    r"""Log-likelihoods of the continuations of one question, in nats.

    Attributes:
        given_context: $\ln p(c \mid x)$ of each continuation $c$ after the context $x$.
        alone: $\ln p(c)$ of each at the start of a text; None where that was not asked for.
    """

    given_context: tuple[float, ...]
    alone: tuple[float, ...] | None = None

    def best(self, choices: Sequence[str], scoring: str) -> int:
        """Index of the continuation with the highest score; of equal scores the first."""
        if scoring == "pmi":
            scores = [a - b for a, b in zip(self.given_context, self.alone, strict=True)]
        else:
            scores = [
                a / len(text.encode()) for a, text in zip(self.given_context, choices, strict=True)
            ]
        return max(range(len(scores)), key=scores.__getitem__)


def ranked_choice(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Choice],
    *,
    batch_size: int = 8,
    scoring: str = "per_byte",
    start: int | None = None,
) -> RankedChoice:
    r"""Which continuation does the model find most likely, for its length or for its own sake?

    "per_byte": a continuation $c$ of a context $x$ scores $\frac{1}{|c|} \ln p(c \mid x)$ with
    $|c|$ its length in UTF-8 bytes, so that a longer one is not at a disadvantage.

    "pmi": it scores the pointwise mutual information $\ln p(c \mid x) - \ln p(c)$, the gain in
    likelihood that the context brings: a continuation that is likely anywhere is not preferred.
    $p(c)$ is what the model says after the start of a text. Holtzman et al., "Surface Form
    Competition", 2021, arXiv 2104.08315, eq. 2.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        items: The questions; `effnb.lab.corpora.choice_items` makes some.
        batch_size: Questions at a time.
        scoring: "per_byte" or "pmi".
        start: Token that begins a text, put before every context; "pmi" needs one.

    Raises:
        ValueError: When there are no questions, one has an empty context or continuation, the
            scoring is unknown, or "pmi" is asked for without a start. When a question has more
            tokens than the model has positions, or the model sees the tokens it is to foresee.
    """
    if scoring not in ("per_byte", "pmi"):
        raise ValueError(f"scoring is {scoring!r}; it must be 'per_byte' or 'pmi'.")
    found = choice_likelihoods(
        model, tokenizer, items, batch_size=batch_size, start=start, alone=scoring == "pmi"
    )
    correct = [
        one.best(item.choices, scoring) == item.answer
        for one, item in zip(found, items, strict=True)
    ]
    return RankedChoice(sum(correct) / len(correct), len(correct), tuple(correct))


def choice_likelihoods(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Choice],
    *,
    batch_size: int = 8,
    start: int | None = None,
    alone: bool = False,
) -> list[ChoiceLikelihoods]:
    r"""Log-likelihoods of all continuations of all questions, in the questions' order.

    The context is read once for all its continuations: they are laid side by side behind it, with
    the positions they would have alone and a mask that hides them from each other. With `alone`
    they are laid there twice, the second time without sight of the context. Models that take
    positions and masks otherwise (ALiBi, windows that slide) read each continuation in a row of its
    own; which ones do is tried on the longest question.

    Args:
        model: A Hugging Face causal language model (four-dimensional masks are passed to it).
        tokenizer: Its tokenizer.
        items: The questions.
        batch_size: Questions at a time; those of like length are batched together.
        start: Token that begins a text, put before every context.
        alone: Whether $\ln p(c)$ is computed too; it needs a `start`.

    Raises:
        ValueError: When there are no questions, one has an empty context or continuation, or
            `alone` is asked for without a start. When a question has more tokens than the model
            has positions, or the model sees the tokens it is to foresee.
    """
    if not items:
        raise ValueError("there are no questions to rank choices for.")
    if alone and start is None:
        raise ValueError("the likelihood of a continuation alone needs a token that starts a text.")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    questions = []
    for item in items:
        context, choices = encode(item.context), [encode(c) for c in item.choices]
        if not context or not all(choices):
            raise ValueError("a question has an empty context or an empty continuation.")
        questions.append((context, choices))
    rows = [_Row.of(*question, start, alone) for question in questions]
    longest = max(rows, key=_Row.alone)
    check_context(model, longest.alone(), "the length of the longest question")
    check_causal(model, torch.tensor([longest.head + longest.parts[0][0]]))
    order = sorted(range(len(items)), key=lambda i: len(rows[i]))
    found: dict[int, ChoiceLikelihoods] = {}
    with torch.inference_mode():
        likelihoods_of = _likelihoods if _side_by_side(model, longest) else _each_alone
        for at in range(0, len(order), batch_size):
            part = order[at : at + batch_size]
            for i, totals in zip(part, likelihoods_of(model, [rows[i] for i in part]), strict=True):
                count = len(items[i].choices)
                found[i] = ChoiceLikelihoods(
                    tuple(totals[:count]), tuple(totals[count:]) if alone else None
                )
    return [found[i] for i in range(len(items))]


@dataclass(frozen=True)
class _Row:
    """One question as a row of tokens: what begins it, and continuations side by side behind it.

    Attributes:
        head: The start token, if there is one, and the context.
        parts: Each continuation with the number of tokens of the head that it sees.
    """

    head: list[int]
    parts: list[tuple[list[int], int]]

    @classmethod
    def of(
        cls, context: list[int], choices: list[list[int]], start: int | None, alone: bool
    ) -> _Row:
        head = context if start is None else [start, *context]
        parts = [(tokens, len(head)) for tokens in choices]
        return cls(head, parts + ([(tokens, 1) for tokens in choices] if alone else []))

    def __len__(self) -> int:
        return len(self.head) + sum(len(tokens) for tokens, _ in self.parts)

    def alone(self) -> int:
        """The tokens of the head and the longest continuation, where each has its own row."""
        return len(self.head) + max(len(tokens) for tokens, _ in self.parts)


def _side_by_side(model: nn.Module, row: _Row) -> bool:
    """Whether continuations of one context may be laid side by side."""
    config = getattr(model, "config", None)
    windows = getattr(config, "sliding_window", None) or getattr(config, "layer_types", None)
    if getattr(config, "rope_parameters", None) and not windows:
        return True  # rotary positions, and one mask for all layers
    try:
        alone = _each_alone(model, [row])[0]
    except TypeError:  # a model that must be told positions and mask takes them as they are
        return True
    try:
        together = _likelihoods(model, [row])[0]
    except (TypeError, ValueError, RuntimeError, LookupError):
        return False
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(together, alone))


def _each_alone(model: nn.Module, questions: list[_Row]) -> list[list[float]]:
    """Log-likelihood of every continuation, each in a separate row, padded on the right.

    Nothing that counts comes after padding, so that no mask is needed.
    """
    device = next(model.parameters()).device
    results = []
    for row in questions:
        texts = [torch.tensor(row.head[:seen] + tokens) for tokens, seen in row.parts]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        logs = model(input_ids=ids).logits.float().log_softmax(-1).cpu()
        results.append(
            [
                float(logs[r, range(seen - 1, seen - 1 + len(t)), torch.tensor(t)].double().sum())
                for r, (t, seen) in enumerate(row.parts)
            ]
        )
    return results


def _likelihoods(model: nn.Module, questions: list[_Row]) -> list[list[float]]:
    """Log-likelihood of every continuation, in nats, one forward pass for all of them."""
    parameter = next(model.parameters())
    device = parameter.device
    size, rows = max(map(len, questions)), len(questions)
    ids = torch.zeros(rows, size, dtype=torch.long)
    positions = torch.zeros(rows, size, dtype=torch.long)
    segment = torch.full((rows, size), -1)  # 0 for the head, 1, 2, … for continuations
    sees = torch.zeros(rows, size, dtype=torch.long)  # tokens of the head that each token sees
    for r, row in enumerate(questions):
        at = 0
        for number, (tokens, seen) in enumerate([(row.head, len(row.head)), *row.parts]):
            end = at + len(tokens)
            offset = seen if number else 0
            ids[r, at:end] = torch.tensor(tokens)
            positions[r, at:end] = torch.arange(offset, offset + len(tokens))
            segment[r, at:end], sees[r, at:end] = number, seen
            at = end
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    from_head = torch.arange(size) < sees.unsqueeze(2)
    visible = causal & (same | from_head)
    mask = torch.zeros(rows, 1, size, size, dtype=parameter.dtype)
    mask.masked_fill_(~visible.unsqueeze(1), torch.finfo(parameter.dtype).min)
    # Within the shortest head nothing is scored, except after the start token.
    first = min(len(row.head) for row in questions) - 1
    kept = torch.arange(first, size)
    if any(seen == 1 for row in questions for _, seen in row.parts):
        kept = torch.cat([torch.zeros(1, dtype=torch.long), kept[first == 0 :]])
    logs = _logits(
        model,
        kept.to(device),
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
    )
    logs = logs.float().log_softmax(-1).cpu()
    column = torch.full((size,), -1)
    column[kept] = torch.arange(len(kept))
    results = []
    for r, row in enumerate(questions):
        at, totals = len(row.head), []
        for tokens, seen in row.parts:
            # The last token that it sees of the head foresees the first, each token the next.
            before = column[torch.tensor([seen - 1, *range(at, at + len(tokens) - 1)])]
            totals.append(float(logs[r, before, torch.tensor(tokens)].double().sum()))
            at += len(tokens)
        results.append(totals)
    return results


def _logits(model: nn.Module, kept: Int[Tensor, " kept"], **inputs: Any) -> Tensor:
    """The logits at the positions `kept`; models that can leave out the others do."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**inputs, logits_to_keep=kept).logits
    return model(**inputs).logits[:, kept]
