"""What the chapter on co-design runs live: pruned attention of real models, and kernels walked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.functional import normalize

from effnb.evaluation import retrieval
from effnb.evaluation.quality import ChoiceLikelihoods
from effnb.hardware.codesign import energon, kept_tokens, mean_of_kept, pruning_record, spatten
from effnb.hardware.codesign.pruned_attention import PruningRecord
from effnb.kernels import int4_matmul, retention
from effnb.lab import corpora, load
from effnb.lab.bench import PANEL_QUESTIONS, PANEL_WINDOWS, Bench
from effnb.lab.differences import Paired, paired, paired_answers
from effnb.lab.walk import walk

TOKENS = 256
"""Tokens of each window that the panel reads."""
BATCH = 32
"""Continuations that are read at once."""
TOP_K = 16
"""Best keys of each query, of which the panel counts those that were kept."""

PRUNERS: dict[str, Callable[..., nn.Module]] = {
    "SpAtten, tokens averaged": lambda model, keep: spatten(
        model, token_keep=keep, average=True, top_k=TOP_K
    ),
    "SpAtten, tokens summed": lambda model, keep: spatten(model, token_keep=keep, top_k=TOP_K),
    "tokens at random": lambda model, keep: spatten(
        model, token_keep=keep, choose="random", top_k=TOP_K
    ),
    "SpAtten, heads": lambda model, keep: spatten(model, head_keep=keep, top_k=TOP_K),
    "SpAtten, values": lambda model, keep: spatten(model, value_keep=keep, top_k=TOP_K),
    "Energon": lambda model, alpha: energon(model, alpha=alpha, top_k=TOP_K),
}
"""The panel's methods, of a model and of one of the knobs `keep` and `alpha`."""


@dataclass(frozen=True)
class Seen:
    """What one look at a model found.

    Attributes:
        losses: Nats per token of each window.
        correct: Which questions were answered right.
        words: What it writes after the bench's prompt.
        record: What its attention left out; None for the original.
    """

    losses: list[float]
    correct: list[bool]
    words: str
    record: PruningRecord | None


@dataclass(frozen=True)
class Pruned:
    """A pruned model beside the original.

    Attributes:
        method: Name of the method.
        now: The pruned model's look.
        was: The original's.
        loss: Difference of the losses, nats per token.
        choice: Difference of the accuracies.
    """

    method: str
    now: Seen
    was: Seen
    loss: Paired
    choice: Paired


class Attention:
    """The bench's model, and what forms of it with less attention are measured on."""

    def __init__(self, bench: Bench) -> None:
        """Use a bench of a decoder."""
        self.bench = bench

    @cached_property
    def original(self) -> Seen:
        """The model as it ships."""
        return self.look(self.bench.model)

    def look(self, model: nn.Module) -> Seen:
        """Losses, answers, words and the record of one model."""
        windows = self.bench.windows[:PANEL_WINDOWS, :TOKENS]
        losses = self.bench.losses(model, windows, 2)
        record = None if model is self.bench.model else pruning_record(model)
        return Seen(losses, answers(self.bench, model), self.bench.write(model), record)

    def pruned(self, method: str, keep: float, alpha: float) -> Pruned:
        """One method of `PRUNERS` beside the original."""
        knob = {"alpha": alpha} if method == "Energon" else {"keep": keep}
        now, was = self.look(PRUNERS[method](self.bench.model, **knob)), self.original
        loss = paired(now.losses, was.losses, self.bench.documents[:PANEL_WINDOWS])
        return Pruned(method, now, was, loss, paired_answers(now.correct, was.correct))

    def unchanged(self, tokens: int = 128) -> dict[str, bool]:
        """Whether keeping everything leaves the model's logits as they were, method by method."""
        model, ids = self.bench.model, self.bench.windows[:1, :tokens]
        everything = {"SpAtten": spatten(model), "Energon": energon(model, alpha=-1.0)}
        with torch.inference_mode():
            logits = model(input_ids=ids).logits
            return {
                name: torch.allclose(same(input_ids=ids).logits, logits, atol=1e-3)
                for name, same in everything.items()
            }


@torch.inference_mode()
def answers(bench: Bench, model: nn.Module, questions: int = PANEL_QUESTIONS) -> list[bool]:
    """Which questions are answered right, each continuation behind its own context.

    The bench lays continuations side by side, where a cascade would judge keys by all of them.
    The score is the bench's: the likelihood that the context adds.
    """
    device = next(model.parameters()).device
    encode = lambda text: bench.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    rows = []
    for item in bench.questions[:questions]:
        choices = [encode(choice) for choice in item.choices]
        for head in ([bench.start, *encode(item.context)], [bench.start]):
            rows += [(head, choice) for choice in choices]
    totals = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for start in range(0, len(rows), BATCH):  # rows of like length, so that few places are empty
        part = order[start : start + BATCH]
        texts = [torch.tensor(rows[i][0] + rows[i][1]) for i in part]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        for place, i in enumerate(part):
            head, choice = rows[i]
            scored = logits[place, len(head) - 1 : len(head) - 1 + len(choice)]
            logs = scored.float().log_softmax(-1)
            totals[i] = float(logs[range(len(choice)), choice].double().sum())
    found, at = [], 0
    for item in bench.questions[:questions]:
        count = len(item.choices)
        given, alone = totals[at : at + count], totals[at + count : at + 2 * count]
        scores = ChoiceLikelihoods(tuple(given), tuple(alone))
        found.append(scores.best(item.choices, "pmi") == item.answer)
        at += 2 * count
    return found


# --- an encoder -----------------------------------------------------------------------------------

SENTENCE = (
    "The fast package manager resolves all of the dependencies and then installs the missing "
    "libraries."
)


@torch.inference_mode()
def survivors(
    sentence: str = SENTENCE, keep: float = 0.25
) -> tuple[list[str], Bool[Tensor, "layers tokens"]]:
    """The tokens of a sentence, and which of them each of MiniLM's layers works on."""
    encoder = load("minilm-l6", device="cpu")
    given = encoder.tokenizer(sentence, return_tensors="pt")
    few = spatten(encoder.model, token_keep=keep)
    few(**given)
    words = encoder.tokenizer.convert_ids_to_tokens(given["input_ids"][0])
    return words, torch.stack([kept[0] for kept in kept_tokens(few)])


@torch.inference_mode()
def search(keep: float = 0.5, queries: int = 100) -> str:
    """Search with MiniLM, whole and with a part of the tokens, among other texts than the sweep's.

    The vector of a text is the mean over the tokens that are left.
    """
    encoder = load("minilm-l6", device="cpu")
    chosen = [p for p in corpora.packages("validation") if len(p.text) > 300][:queries]
    shorter = spatten(encoder.model, token_keep=keep)

    def vectors(texts: Sequence[str]) -> Tensor:
        about: dict[str, Any] = {"padding": True, "truncation": True, "max_length": 256}
        batch = encoder.tokenizer(list(texts), return_tensors="pt", **about)
        return normalize(mean_of_kept(shorter, shorter(**batch).last_hidden_state), dim=1)

    both = [p.synopsis for p in chosen], [p.text[:600] for p in chosen]
    whole, part = (retrieval(*map(encode, both)) for encode in (encoder.encode, vectors))
    change = paired_answers([r == 1 for r in part.ranks], [r == 1 for r in whole.ranks])
    return (
        f"The original finds {whole.recall_at_1:.0%} of {len(chosen)} descriptions first, with "
        f"{keep:.0%} of the tokens left it finds {part.recall_at_1:.0%}: "
        f"{change.outcome(lower_is_better=False)}."
    )


# --- GPU kernels, walked --------------------------------------------------------------------------

NO_TRITON = (
    "Triton is not installed here (it exists for Linux), so that no GPU kernel can be interpreted; "
    "the reference in PyTorch computes the same."
)


def int4_walk() -> str:
    """The first program of the GPU kernel that multiplies one token with 4-bit weights."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=draw, dtype=torch.uint8)
    steps = torch.rand(8, 2, generator=draw).half()
    weight = int4_matmul.pack_int4(codes, steps, group_size=32)
    x = torch.randn(1, 64, generator=draw)
    if not interpreted():
        return NO_TRITON
    found = walk(int4_matmul, lambda: int4_matmul.int4_matmul(x, weight, backend="triton"))
    same = torch.allclose(found.result, int4_matmul.reference(x, weight), atol=1e-4)
    return f"{found}\n\nThe same as the reference in PyTorch: {same}"


def retention_walk() -> str:
    """The first program of the GPU kernel that stores retention's states, chunk by chunk."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=draw).unbind(0)
    gamma = retention.retention_decay(2)
    if not interpreted():
        return NO_TRITON
    found = walk(
        retention, lambda: retention.retention(q, k, v, gamma, chunk_size=16, backend="triton")
    )
    whole = retention.retention_parallel(q, k, v, gamma)[0]
    same = torch.allclose(found.result[0], whole, atol=1e-4)
    return f"{found}\n\nThe same as all tokens at once: {same}"


def interpreted() -> bool:
    """Whether GPU kernels run in Triton's interpreter here."""
    from effnb.kernels._launch import INTERPRETED

    return INTERPRETED
