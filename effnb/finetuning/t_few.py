r"""T-Few: three losses for learning from a few examples with answers to choose from.

For an input $x$ with the right answer $y$ of $T$ tokens and wrong ones $\hat y^{(k)}$ of $T_k$:

$$L_{LM} = -\frac1T \sum_t \log p(y_t \mid x, y_{<t}), \qquad
  L_{UL} = -\frac{\sum_k \sum_t \log\bigl(1 - p(\hat y^{(k)}_t \mid x, \hat y^{(k)}_{<t})\bigr)}
                {\sum_k T_k},$$

$$\beta(x, y) = \frac1T \sum_t \log p(y_t \mid x, y_{<t}), \qquad
  L_{LN} = -\log \frac{e^{\beta(x, y)}}{e^{\beta(x, y)} + \sum_k e^{\beta(x, \hat y^{(k)})}} .$$

The first makes the right answer likely, the second every wrong one unlikely, and the third puts the
right one ahead by the very measure by which answers are ranked afterwards, $\beta$. They are added
with equal weights. The recipe trains (IA)^3 (`effnb.finetuning.ia3`), and is the same for all
tasks: 1,000 steps of 8 examples, learning rate 3e-3, a linear decay after 60 steps of warm-up.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel, "Few-Shot Parameter-Efficient Fine-Tuning is Better
and Cheaper than In-Context Learning", 2022, arXiv 2205.05638.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

LOSSES = ("lm", "unlikelihood", "length_normalized")


@dataclass(frozen=True)
class Choices:
    """Inputs with several answers each, for a decoder: an answer stands behind its input.

    Attributes:
        ids: (rows, time) input and answer, padded on the right; the answers of one input follow
            each other.
        answer: (rows, time) True at the answers' tokens, which are never the first of a row.
        mask: (rows, time) True at all tokens but padding.
        example: (rows,) the input of each row, counting from 0.
        right: (rows,) True for the right answer, of which an input has one.
    """

    ids: Int[Tensor, "rows time"]
    answer: Bool[Tensor, "rows time"]
    mask: Bool[Tensor, "rows time"]
    example: Int[Tensor, " rows"]
    right: Bool[Tensor, " rows"]

    @classmethod
    def of(
        cls,
        inputs: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        right: Sequence[int],
        *,
        pad: int = 0,
    ) -> Choices:
        """Lay out token ids.

        Args:
            inputs: The tokens of each input.
            answers: For each input its answers' tokens; their number may differ.
            right: For each input the index of the right answer.
            pad: The id that fills rows up.

        Raises:
            ValueError: Numbers that do not fit each other, an empty input or answer, fewer than two
                answers, or an index that names none.
        """
        if not inputs or not len(inputs) == len(answers) == len(right):
            raise ValueError(
                f"there are {len(inputs)} inputs, {len(answers)} lists of answers and {len(right)} "
                "right ones; there must be as many of each, and at least 1."
            )
        rows, examples, chosen, lengths = [], [], [], []
        for i, (question, options, best) in enumerate(zip(inputs, answers, right, strict=True)):
            if not len(question) or len(options) < 2 or not all(len(o) for o in options):
                raise ValueError(f"input {i} needs tokens, and at least two answers with tokens.")
            if not 0 <= best < len(options):
                raise ValueError(f"input {i} has {len(options)} answers; none is number {best}.")
            for k, option in enumerate(options):
                rows.append(torch.tensor([*question, *option]))
                lengths.append((len(question), len(question) + len(option)))
                examples.append(i)
                chosen.append(k == best)
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        begin, end = torch.tensor(lengths).unsqueeze(2).unbind(1)
        place = torch.arange(ids.shape[1])
        return cls(
            ids,
            (place >= begin) & (place < end),
            place < end,
            torch.tensor(examples),
            torch.tensor(chosen),
        )

    def to(self, device: torch.device | str) -> Choices:
        """The same on another device."""
        return Choices(*(tensor.to(device) for tensor in vars(self).values()))


def answer_log_probs(model: nn.Module, choices: Choices) -> Float[Tensor, "rows time"]:
    r"""$\log p(y_t \mid x, y_{<t})$ at the answers' tokens, 0 elsewhere; gradients pass."""
    logits = model(
        input_ids=choices.ids, attention_mask=choices.mask.long(), use_cache=False
    ).logits
    logs = logits[:, :-1].float().log_softmax(-1)
    found = logs.gather(2, choices.ids[:, 1:, None]).squeeze(2)
    found = torch.cat([torch.zeros_like(found[:, :1]), found], 1)
    return torch.where(choices.answer, found, 0)


def lm_loss(log_probs: Float[Tensor, "rows time"], choices: Choices) -> Float[Tensor, ""]:
    r"""$L_{LM}$, the mean over all tokens of the batch's right answers."""
    counted = choices.answer & choices.right.unsqueeze(1)
    # $-\frac1T \sum_t \log p(y_t \mid x, y_{<t})$
    return -log_probs[counted].mean()


def unlikelihood_loss(log_probs: Float[Tensor, "rows time"], choices: Choices) -> Float[Tensor, ""]:
    r"""$L_{UL}$, over all tokens of the batch's wrong answers.

    $\log(1 - p)$ is taken from $\log p$ without loss of digits, with p at most $1 - 10^{-6}$.
    """
    counted = choices.answer & ~choices.right.unsqueeze(1)
    p = log_probs[counted].clamp(max=-1e-6)
    # $-\sum \log(1 - p) / \sum T_k$
    return -torch.log(-torch.expm1(p)).mean()


def scores(log_probs: Float[Tensor, "rows time"], choices: Choices) -> Float[Tensor, " rows"]:
    r"""$\beta$, the mean log-probability of each answer's tokens."""
    return log_probs.sum(1) / choices.answer.sum(1)


def length_normalized_loss(
    log_probs: Float[Tensor, "rows time"], choices: Choices
) -> Float[Tensor, ""]:
    r"""$L_{LN}$, the mean over inputs of $-\log$ of the softmax of $\beta$ over their answers."""
    beta = scores(log_probs, choices)
    count = int(choices.example[-1]) + 1
    most = beta.new_full((count,), -torch.inf)
    most = most.scatter_reduce(0, choices.example, beta.detach(), "amax")
    shifted = (beta - most[choices.example]).exp()
    total = beta.new_zeros(count).index_add(0, choices.example, shifted)
    # $-\log\bigl(e^{\beta(x, y)} / \sum e^\beta\bigr)$
    return (total.log() + most - beta[choices.right]).mean()


def t_few_loss(
    model: nn.Module, choices: Choices, losses: Iterable[str] = LOSSES
) -> Float[Tensor, ""]:
    """The sum of the chosen losses on one batch, for `effnb.core.training.train`.

    Args:
        model: A decoder.
        choices: The batch.
        losses: Which of "lm", "unlikelihood" and "length_normalized" are added.

    Raises:
        ValueError: When there is none, or one is unknown.
    """
    losses = [losses] if isinstance(losses, str) else list(losses)
    unknown = [name for name in losses if name not in LOSSES]
    if unknown or not losses:
        said = f"{unknown[0]!r} is unknown" if unknown else "there is none"
        raise ValueError(f"losses: {said}; choose from {', '.join(LOSSES)}.")
    functions = (lm_loss, unlikelihood_loss, length_normalized_loss)
    chosen = [f for name, f in zip(LOSSES, functions, strict=True) if name in losses]
    log_probs = answer_log_probs(model, choices)
    return sum(f(log_probs, choices) for f in chosen)


@torch.inference_mode()
def rank(model: nn.Module, choices: Choices, *, normalize: bool = True) -> Int[Tensor, " examples"]:
    r"""The answer with the largest $\beta$ of each input, counting its answers from 0.

    Args:
        model: A decoder.
        choices: Inputs with their answers.
        normalize: Whether to divide by the number of tokens, as the losses do. T0 does not.
    """
    logs = answer_log_probs(model, choices)
    found = scores(logs, choices) if normalize else logs.sum(1)
    _, counts = choices.example.unique_consecutive(return_counts=True)
    best = [part.argmax() for part in found.split(counts.tolist())]
    return torch.stack(best)


def choices_of(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[Sequence[str]],
    right: Sequence[int],
    *,
    tokens: int = 128,
) -> Choices:
    """Texts as `Choices`: an answer is cut into tokens apart from its prompt, with a space ahead.

    Args:
        tokenizer: The model's.
        prompts: The inputs; one that is too long loses its beginning.
        answers: For each its answers, without a space in front.
        right: For each the index of the right one.
        tokens: Most tokens of a prompt with its longest answer.

    Raises:
        ValueError: As `Choices.of`, or when an answer leaves no room for a prompt.
    """
    encoded = [
        [tokenizer.encode(f" {a}", add_special_tokens=False) for a in own] for own in answers
    ]
    rows = []
    for i, (prompt, own) in enumerate(zip(prompts, encoded, strict=False)):
        room = tokens - max(map(len, own), default=0)
        if room < 1:
            raise ValueError(f"an answer of input {i} fills all of the {tokens} tokens.")
        rows.append(tokenizer.encode(prompt, add_special_tokens=False)[-room:])
    pad = tokenizer.pad_token_id
    return Choices.of(rows, encoded, right, pad=tokenizer.eos_token_id if pad is None else pad)
