"""SmolLM2 with a memory of a reader's own text."""

from __future__ import annotations

import torch
from torch import nn

from effnb.design.retrieval import KnnLm, build_datastore
from effnb.lab import load

TOKENS = 12
QUESTION_WORDS = 0.6
"""Share of the text that is given as a beginning."""


@torch.no_grad()
def continued(model: nn.Module, ids: list[int], tokens: int) -> list[int]:
    """The most probable continuation, token by token, without a cache."""
    found = list(ids)
    for _ in range(tokens):
        logits = model(input_ids=torch.tensor([found])).logits
        found.append(int(logits[0, -1].argmax()))
    return found[len(ids) :]


def beginning(words: list[str]) -> str:
    """The first words of a text: what a model is to go on with."""
    return " ".join(words[: max(1, round(QUESTION_WORDS * len(words)))])


def told(text: str, model: str = "smollm2-135m", lam: float = 0.8, tokens: int = TOKENS) -> str:
    """What a model says after the beginning of a text, before and after the text is in its memory.

    Raises:
        ValueError: When the text has fewer than two words.
    """
    words = text.split()
    if len(words) < 2:
        raise ValueError("give a text of at least two words: a beginning, and what follows it.")
    loaded = load(model, device="cpu")
    encode = loaded.tokenizer.encode
    ids = encode(text, add_special_tokens=False)
    start = encode(beginning(words), add_special_tokens=False)
    store = build_datastore(loaded.model, [ids], context=len(ids), dtype=torch.float32)
    joined = KnnLm(loaded.model, store, lam=lam, k=1)
    lines = [f"{beginning(words)} …"]
    for name, one in (("without", loaded.model), ("with", joined)):
        said = loaded.tokenizer.decode(continued(one, start, min(tokens, len(ids) - len(start))))
        lines.append(f"   {name} the memory: {' '.join(said.split())}")
    return "\n".join(lines)
