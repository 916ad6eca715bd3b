"""What an objective makes of one sentence: shown, hidden, asked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.chapters.pretraining.objectives import runs
from effnb.pretraining import objectives
from effnb.pretraining.objectives import IGNORED, Example

SENTENCE = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife."
)
"""Jane Austen, "Pride and Prejudice", 1813, chapter 1."""
KINDS = ("CLM", "MLM", "prefix LM", "span corruption", "ELECTRA")
LETTERS = "XYZABCDEFGHIJKLMNOPQRSTUVW"


@dataclass(frozen=True)
class Sheet:
    """A sentence as an objective asks about it.

    Attributes:
        shown: What is at each position that the network reads.
        answers: What is asked there; "" where nothing is.
        changed: Whether the position shows something else than the text.
        visible: Which positions each may see.
    """

    shown: tuple[str, ...]
    answers: tuple[str, ...]
    changed: tuple[bool, ...]
    visible: Bool[Tensor, "time time"]

    @property
    def asked(self) -> int:
        """Positions that give a loss."""
        return sum(bool(answer) for answer in self.answers)

    def reads(self) -> str:
        """What the network reads, in a line."""
        return " ".join("".join(f" {piece}" for piece in self.shown).split())


def piece(token: int) -> str:
    """A token in letters: words, ⟨X⟩ for a sentinel, [M] for the mask token, · for the end.

    Half of a letter that takes several bytes is called "byte".
    """
    if token == runs.MASK:
        return "[M]"
    if token > runs.MASK:
        number = runs.FIRST_SENTINEL - token
        return f"⟨{LETTERS[number] if number < len(LETTERS) else number}⟩"
    if token == runs.END:
        return "·"
    said = runs.tokenizer().decode([token]).strip() or "␣"
    return "byte" if "\ufffd" in said else said


def sentence(tokens: int = 36) -> Int[Tensor, "1 time"]:
    """The sentence as ids."""
    ids = runs.tokenizer().encode(SENTENCE, add_special_tokens=False)[:tokens]
    return torch.tensor([ids])


def example(
    kind: str, ids: Int[Tensor, "1 time"], rate: float, span: float, draws: torch.Generator
) -> Example:
    """One of the objectives on ids."""
    if kind == "CLM":
        return objectives.causal_lm(ids)
    if kind == "prefix LM":
        return objectives.prefix_lm(ids, generator=draws)
    if kind == "span corruption":
        return runs.spans(span, rate).make(ids, draws)
    if kind == "ELECTRA":
        return objectives.electra_masking(ids, rate, mask_token=runs.MASK, generator=draws)
    return runs.mlm(rate).make(ids, draws)


def sheet(
    kind: str,
    rate: float = 0.15,
    span: float = 3.0,
    seed: int = 0,
    generator: nn.Module | None = None,
) -> Sheet:
    """The sentence under an objective.

    Args:
        kind: One of `KINDS`.
        rate: Part of the tokens that is hidden, where something is.
        span: Mean length of a hidden span.
        seed: What is hidden.
        generator: For ELECTRA: a causal model that fills in the masked places; random words where
            None.

    Raises:
        ValueError: An unknown kind, and what the objectives refuse.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no objective {kind!r}; choose one of {', '.join(KINDS)}.")
    ids, draws = sentence(), torch.Generator().manual_seed(seed)
    made = example(kind, ids, rate, span, draws)
    if kind == "ELECTRA":
        filled = fill(ids, made, generator, draws)
        shown, answers = filled.inputs[0], ["new" if y else "same" for y in filled.labels[0]]
    else:
        shown = made.inputs[0]
        answers = ["" if y == IGNORED else piece(int(y)) for y in made.labels[0]]
    text = ids[0].tolist() + [None] * len(shown)
    changed = tuple(
        (bool(a != b) and kind in ("MLM", "ELECTRA")) or int(a) >= runs.MASK
        for a, b in zip(shown.tolist(), text, strict=False)
    )
    return Sheet(tuple(piece(int(t)) for t in shown), tuple(answers), changed, made.visible[0])


def fill(
    ids: Int[Tensor, "batch time"],
    made: Example,
    model: nn.Module | None,
    draws: torch.Generator,
) -> objectives.Replaced:
    """Chosen places filled in by a causal model that reads what came before them.

    ELECTRA's own generator is trained beside the discriminator and reads both sides. This one is
    finished, and reads the left side only; without a model, all words are equally likely.
    """
    asked = made.labels != IGNORED
    return objectives.replace_tokens(ids, made, left_logits(ids, model)[asked], generator=draws)


@torch.inference_mode()
def left_logits(
    ids: Int[Tensor, "batch time"], model: nn.Module | None
) -> Float[Tensor, "batch time vocabulary"]:
    """Scores of each place from the tokens before it; equal where there are none."""
    scores = torch.zeros(*ids.shape, runs.WORDS)
    if model is not None:
        scores[:, 1:] = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return scores
