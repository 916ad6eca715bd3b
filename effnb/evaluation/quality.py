"""Quality of a language model: perplexity on running text, and accuracy in a ranked choice.

The two are reported together because they can disagree: perplexity averages over every token, most
of them easy; the choice asks whether the model still prefers the truth to what is only plausible.
"""

from __future__ import annotations

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


def ranked_choice(
    model: nn.Module, tokenizer: Any, items: Sequence[Choice], *, batch_size: int = 8
) -> RankedChoice:
    r"""Which continuation does the model find most likely, per byte?

    A continuation $c$ of a context $x$ scores $\frac{1}{|c|} \sum_t \ln p(c_t \mid x, c_{<t})$
    with $|c|$ its length in UTF-8 bytes, so that a longer one is not at a disadvantage.

    The context is read once for all its continuations: they are laid side by side behind it, with
    the positions they would have alone and a mask that hides them from each other. Models that take
    positions and masks otherwise (ALiBi, windows that slide) read each continuation in a row of its
    own; which ones do is tried on the longest question.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        items: The questions; `effnb.lab.corpora.choice_items` makes some.
        batch_size: Questions at a time.

    Raises:
        ValueError: When there are no questions, one has an empty context or continuation or more
            tokens than the model has positions; or a model that sees the tokens it is to foresee.
    """
    if not items:
        raise ValueError("there are no questions to rank choices for.")
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    questions = []
    for item in items:
        context, choices = encode(item.context), [encode(c) for c in item.choices]
        if not context or not all(choices):
            raise ValueError("a question has an empty context or an empty continuation.")
        questions.append((context, choices))
    longest = max(questions, key=_tokens_alone)
    check_context(model, _tokens_alone(longest), "the length of the longest question")
    check_causal(model, torch.tensor([longest[0] + longest[1][0]]))
    correct: list[bool] = []
    with torch.inference_mode():
        likelihoods_of = _likelihoods if _side_by_side(model, longest) else _each_alone
        for at in range(0, len(questions), batch_size):
            part = questions[at : at + batch_size]
            for item, likelihoods in zip(
                items[at : at + batch_size], likelihoods_of(model, part), strict=True
            ):
                scores = [
                    total / len(text.encode())
                    for total, text in zip(likelihoods, item.choices, strict=True)
                ]
                correct.append(max(range(len(scores)), key=scores.__getitem__) == item.answer)
    return RankedChoice(sum(correct) / len(correct), len(correct), tuple(correct))


_Question = tuple[list[int], list[list[int]]]  # the context's tokens, and each continuation's


def _tokens_alone(question: _Question) -> int:
    """The tokens of a context and its longest continuation."""
    return len(question[0]) + max(map(len, question[1]))


def _side_by_side(model: nn.Module, question: _Question) -> bool:
    """Whether continuations of one context may be laid side by side."""
    config = getattr(model, "config", None)
    windows = getattr(config, "sliding_window", None) or getattr(config, "layer_types", None)
    if getattr(config, "rope_parameters", None) and not windows:
        return True  # rotary positions, and one mask for all layers
    try:
        alone = _each_alone(model, [question])[0]
    except TypeError:  # a model that must be told positions and mask takes them as they are
        return True
    try:
        together = _likelihoods(model, [question])[0]
    except (TypeError, ValueError, RuntimeError, LookupError):
        return False
    tolerance = 1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.05
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(together, alone))


def _each_alone(model: nn.Module, questions: list[_Question]) -> list[list[float]]:
    """Log-likelihood of every continuation, each in a row of its own, padded on the right.

    Nothing that counts stands behind padding, so that no mask is needed.
    """
    device = next(model.parameters()).device
    results = []
    for context, choices in questions:
        rows = [torch.tensor(context + tokens) for tokens in choices]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        logs = model(input_ids=ids).logits.float().log_softmax(-1).cpu()
        start = len(context) - 1
        results.append(
            [
                float(logs[r, range(start, start + len(t)), torch.tensor(t)].double().sum())
                for r, t in enumerate(choices)
            ]
        )
    return results


def _likelihoods(model: nn.Module, questions: list[_Question]) -> list[list[float]]:
    """Log-likelihood of every continuation, in nats, one forward pass for all of them."""
    parameter = next(model.parameters())
    device = parameter.device
    lengths = [len(context) + sum(map(len, choices)) for context, choices in questions]
    size, rows = max(lengths), len(questions)
    ids = torch.zeros(rows, size, dtype=torch.long)
    positions = torch.zeros(rows, size, dtype=torch.long)
    segment = torch.full((rows, size), -1)  # 0 for the context, 1, 2, … for continuations
    for r, (context, choices) in enumerate(questions):
        start = 0
        for number, tokens in enumerate([context, *choices]):
            end = start + len(tokens)
            offset = 0 if number == 0 else len(context)
            ids[r, start:end] = torch.tensor(tokens)
            positions[r, start:end] = torch.arange(offset, offset + len(tokens))
            segment[r, start:end] = number
            start = end
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    same = segment.unsqueeze(2) == segment.unsqueeze(1)
    from_context = (segment == 0).unsqueeze(1)
    visible = causal & (same | from_context)
    mask = torch.zeros(rows, 1, size, size, dtype=parameter.dtype)
    mask.masked_fill_(~visible.unsqueeze(1), torch.finfo(parameter.dtype).min)
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
    ).logits.float()
    logs = logits.log_softmax(-1).cpu()
    results = []
    for r, (context, choices) in enumerate(questions):
        last, start, totals = len(context) - 1, len(context), []
        for tokens in choices:
            # The context's last position foresees the first token, each token the next.
            before = torch.tensor([last, *range(start, start + len(tokens) - 1)])
            totals.append(float(logs[r, before, torch.tensor(tokens)].double().sum()))
            start += len(tokens)
        results.append(totals)
    return results
