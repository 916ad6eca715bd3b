"""The bench: the one place that says what a model of the workbook is measured on.

    bench = Bench("mini-5m")
    before = bench.look(bench.model)
    after = bench.look(pruned)

Chapters, panels and sweeps all use it, so that a reader meets one perplexity of a model. Every
model reads the same held-out documents: windows drawn over all documents of the test splits, the
corpora in turn, so that the first few are a smaller sample of the same text. It is asked the same
questions, scored alike, and its size is that of a file in which plain weights have 16 bits, as in
the files that ship.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor, nn

from effnb.evaluation.cost import file_bytes
from effnb.evaluation.quality import choice_likelihoods, token_losses
from effnb.lab import corpora
from effnb.lab.models import load
from effnb.lab.texts import CALIBRATION, CONTEXT_TOKENS, calibration_sequences, held_out_windows

WINDOWS = 48
"""Windows of held-out text: 24,576 tokens."""
PANEL_WINDOWS = 6
"""A panel reads the first windows only: 3,072 tokens, two windows of each corpus."""
QUESTIONS = 240
PANEL_QUESTIONS = 28
CONTEXT_CHARACTERS, CHOICE_CHARACTERS = 60, 15
"""About how long a question's context and each of its continuations are."""
PROMPT = "Anne was"
WORDS_TOKENS = 20
"""Tokens that a model writes when it is looked at."""


@dataclass(frozen=True)
class Measured:
    """A number with its 95 % interval.

    Attributes:
        value: The number.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __format__(self, how: str) -> str:
        """The number and its interval in one format: `f"{accuracy:.0%}"` is "64% (58%-70%)"."""
        return f"{self.value:{how}} ({self.low:{how}}-{self.high:{how}})"

    def __str__(self) -> str:
        """The same, with three digits."""
        return f"{self:.3g}"


@dataclass(frozen=True)
class Look:
    """What the bench found of one model.

    Attributes:
        perplexity: Perplexity of the windows, with its interval over documents.
        accuracy: Part of the questions answered right, with its interval over questions.
        bytes: Size of the file, plain weights in 16 bits.
        text: What the model writes after the bench's prompt, the prompt included.
        window_nats_per_token: Mean loss of each window, for comparisons pair by pair.
        correct: Which questions were answered right, in order.
        bits_per_byte: The same loss per byte of the text: fair between tokenizers.
    """

    perplexity: Measured
    accuracy: Measured
    bytes: int
    text: str
    window_nats_per_token: tuple[float, ...] = field(repr=False)
    correct: tuple[bool, ...] = field(repr=False)
    bits_per_byte: float

    @property
    def sample(self) -> str:
        """On how much text and how many questions it rests."""
        tokens = len(self.window_nats_per_token) * CONTEXT_TOKENS
        return f"{tokens:,} held-out tokens and {len(self.correct)} questions"


class Bench:
    """One model, and what every form of it is measured on.

    Attributes:
        name: Name of the model.
        loaded: The model as it was loaded, with its tokenizer.
        model: The model itself.
        tokenizer: Its tokenizer.
        windows: Held-out text, (windows, 512).
        documents: Of each window, the held-out document it comes from. Windows of one document are
            not independent of each other.
        corpus: Of each window, the corpus of its document.
        questions: The ranked-choice questions.
        prompt: What a model is asked to continue.
    """

    prompt = PROMPT

    def __init__(
        self,
        name: str = "mini-5m",
        *,
        windows: int = WINDOWS,
        questions: int = QUESTIONS,
        device: torch.device | str | None = "cpu",
    ) -> None:
        """Load the model and cut the held-out text.

        Args:
            name: One of the workbook's decoders, or the folder of a model of yours.
            windows: Windows of 512 tokens.
            questions: Ranked-choice questions; 0 asks none.
            device: Where the model goes; None takes the best device present.

        Raises:
            ValueError: When there is no such model, no window, or it is no decoder.
        """
        if windows < 1 or questions < 0:
            raise ValueError(
                f"windows is {windows} and questions is {questions}; at least one window is needed "
                "and no fewer than 0 questions."
            )
        self.name = name
        self.loaded = load(name, device=device)
        if not hasattr(self.loaded.model, "generate") or hasattr(self.loaded, "encode"):
            raise ValueError(f"{name} does not write text: the bench measures decoders.")
        self.model, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self.windows, self.corpus, self.documents = held_out_windows(self.tokenizer, windows)
        self.questions = (
            corpora.choice_items(
                questions,
                context_characters=CONTEXT_CHARACTERS,
                choice_characters=CHOICE_CHARACTERS,
            )
            if questions
            else ()
        )

    @property
    def start(self) -> int:
        """The token that begins a text."""
        begin = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if begin is None else begin

    @cached_property
    def window_bytes(self) -> tuple[int, ...]:
        """Bytes of the tokens of each window that are scored: all but the first."""
        return tuple(len(self.tokenizer.decode(row[1:]).encode()) for row in self.windows)

    @cached_property
    def original(self) -> Look:
        """The model as it ships, looked at once."""
        return self.look(self.model)

    @torch.inference_mode()
    def losses(
        self,
        model: nn.Module,
        windows: Int[Tensor, "windows time"] | None = None,
        batch_size: int = 4,
    ) -> list[float]:
        """Mean loss of each window, in nats per token; the bench's own windows when None."""
        windows = self.windows if windows is None else windows
        device = next(model.parameters()).device
        parts = [token_losses(model, part.to(device)).mean(1) for part in windows.split(batch_size)]
        return [round(x, 5) for x in torch.cat(parts).tolist()]

    def perplexity(self, losses: Sequence[float]) -> Measured:
        r"""$\exp$ of the mean loss of the first windows, with a 95 % interval over documents.

        Documents are drawn within each corpus, so the differences between corpora do not widen it:
        with the mean loss $\bar\ell_d$ of each of the $n_c$ documents of corpus $c$, which has the
        share $w_c$ of the windows, $\operatorname{se}^2 = \sum_c w_c^2 s_c^2 / n_c$, and the ends
        lie $t$ standard errors from the mean. Where no corpus has two documents the interval is
        everything.

        Args:
            losses: Mean loss of the first window, of the second, and so on.
        """
        groups: dict[str, dict[str, list[float]]] = {}
        for corpus, document, loss in zip(self.corpus, self.documents, losses):
            groups.setdefault(corpus, {}).setdefault(document, []).append(loss)
        mean, variance, freedom = statistics.fmean(losses), 0.0, 0
        for by_document in groups.values():
            means = [statistics.fmean(found) for found in by_document.values()]
            share = sum(map(len, by_document.values())) / len(losses)
            if len(means) < 2:
                return Measured(_exp(mean), 0.0, math.inf)
            variance += share**2 * statistics.variance(means) / len(means)
            freedom += len(means) - 1
        reach = student(freedom) * math.sqrt(variance)
        return Measured(_exp(mean), _exp(mean - reach), _exp(mean + reach))

    def answers(
        self, model: nn.Module, questions: int | None = None, scoring: str = "pmi"
    ) -> tuple[bool, ...]:
        r"""Which of the first questions a model answers right.

        By default a continuation scores the gain in likelihood that its context brings,
        $\ln p(c \mid x) - \ln p(c)$; "per_byte" scores $\ln p(c \mid x)$ per byte instead.
        """
        asked = self.questions[:questions]
        if not asked:
            return ()
        found = choice_likelihoods(
            model,
            self.tokenizer,
            asked,
            batch_size=16,
            start=self.start,
            alone=scoring == "pmi",
        )
        return tuple(
            one.best(item.choices, scoring) == item.answer
            for one, item in zip(found, asked, strict=True)
        )

    def look(
        self, model: nn.Module, *, panel: bool = False, stored: nn.Module | None = None
    ) -> Look:
        """Measure one form of the model.

        Args:
            model: What is measured: the bench's model, or what a method made of it.
            panel: Whether only the first windows and questions are used, as a panel does: it stays
                within 1.5 passes over 4,096 tokens.
            stored: The form that is stored, where it is another: packed weights that `model` reads
                back.
        """
        losses = self.losses(model, self.windows[:PANEL_WINDOWS] if panel else None)
        correct = self.answers(model, PANEL_QUESTIONS if panel else None)
        scored = sum(self.window_bytes[: len(losses)])
        tokens = (CONTEXT_TOKENS - 1) * len(losses)
        return Look(
            perplexity=self.perplexity(losses),
            accuracy=share(correct),
            bytes=file_bytes(model if stored is None else stored),
            text=self.write(model),
            window_nats_per_token=tuple(losses),
            correct=correct,
            bits_per_byte=round(statistics.fmean(losses) * tokens / math.log(2) / scored, 4),
        )

    def write(self, model: nn.Module, tokens: int = WORDS_TOKENS) -> str:
        """The prompt and the most likely continuation, with a penalty on repeating itself."""
        device = next(model.parameters()).device
        prompt = self.tokenizer(self.prompt, return_tensors="pt", add_special_tokens=False)
        with torch.inference_mode():
            ids = model.generate(
                **prompt.to(device),
                max_new_tokens=tokens,
                do_sample=False,
                repetition_penalty=1.3,
                pad_token_id=self.tokenizer.eos_token_id,
            )
        return self.tokenizer.decode(ids[0], skip_special_tokens=True).replace("\n", " ")

    def calibration(
        self, seed: int = 0, shape: tuple[int, int] = CALIBRATION
    ) -> Int[Tensor, "sequences time"]:
        """Random sequences of the training text, the corpora in equal parts.

        Args:
            seed: Seed of the draw; another seed gives other text.
            shape: Number of sequences, and tokens of each.
        """
        return calibration_sequences(self.tokenizer, seed, shape)


# ----------------------------------------------------------------------------- the numbers


def share(correct: Sequence[bool]) -> Measured:
    r"""Part of the questions answered right, with the 95 % interval of Wilson (1927).

    Without questions everything is possible.
    """
    if not correct:
        return Measured(math.nan, 0.0, 1.0)
    n, a, z = len(correct), sum(correct) / len(correct), 1.959964
    middle, reach = a + z * z / (2 * n), z * math.sqrt(a * (1 - a) / n + z * z / (4 * n * n))
    return Measured(a, (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n))


def student(freedom: int) -> float:
    r"""The two-sided 95 % point of Student's t, by the expansion of Fisher and Cornish (1960).

    $t = z + \frac{g_1}{\nu} + \frac{g_2}{\nu^2} + \frac{g_3}{\nu^3} + \frac{g_4}{\nu^4}$ with
    polynomials $g_i$ in the normal point $z$. Exact values for one and two degrees of freedom.

    Raises:
        ValueError: When there is no degree of freedom.
    """
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}; an interval needs at least 1.")
    if freedom <= 2:
        return (12.7062047, 4.3026527)[freedom - 1]
    z, v = 1.959963985, freedom
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    g4 = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + g1 / v + g2 / v**2 + g3 / v**3 + g4 / v**4


def _exp(nats: float) -> float:
    """The exponential, infinity where it overflows."""
    return math.exp(nats) if nats < 700 else math.inf
