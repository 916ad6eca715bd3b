"""The trained twins: RetNet, RWKV-4 and Hyena beside the Transformers of equal size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effnb.design.retention import RecurrentLM
from effnb.lab.models import TWINS, ModelUnavailable, twin_folder
from effnb.lab.results import NotMeasured

NAMES = {
    "retnet-300k": "RetNet",
    "rwkv-300k": "RWKV",
    "hyena-300k": "Hyena",
    "retnet-1m": "RetNet",
}
"""The architecture of each twin, in the order of the chapter's tables."""


def transformer_of(name: str) -> str:
    """The Transformer that a twin is compared with, such as mini-300k."""
    return f"mini-{name.split('-')[1]}"


@dataclass(frozen=True, repr=False)
class Twin:
    """A trained twin.

    Attributes:
        name: Such as "retnet-300k".
        model: The model, in evaluation mode.
        history: What its training says: command, steps, tokens, seconds, losses held out.
    """

    name: str
    model: RecurrentLM
    history: dict[str, Any]

    def __repr__(self) -> str:
        """What it is in a line."""
        config = self.model.config
        return (
            f"{self.name}: {type(self.model).__name__}, {config.parameters:,} parameters, trained "
            f"on {self.history['tokens']:,} tokens in {self.history['seconds'] / 60:.0f} minutes."
        )


def load(name: str, dtype: torch.dtype = torch.float32) -> Twin | NotMeasured:
    """A twin, or, where its training has not finished, a value that says so.

    Args:
        name: One of `effnb.lab.models.TWINS`.
        dtype: Number format of the weights in memory.

    Raises:
        ValueError: When there is no twin of that name.
        DamagedFile: When a file is missing or damaged.
    """
    try:
        folder = twin_folder(name)
    except ModelUnavailable:
        return NotTrained(name)
    history = json.loads((Path(folder) / "training.json").read_text(encoding="utf-8"))
    return Twin(name, RecurrentLM.from_pretrained(folder).to(dtype), history)


class NotTrained(NotMeasured):
    """A twin that is missing: a value that is false and says which command trains it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.command = f"python data/train_twins.py {name}"


def trained() -> list[str]:
    """The twins whose training has finished, in the order of the chapter's tables."""
    found = []
    for name in NAMES:
        assert name in TWINS
        try:
            twin_folder(name)
        except ModelUnavailable:
            continue
        found.append(name)
    return found
