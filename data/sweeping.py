"""What the scripts of the stored measurements share: the fixed texts and questions, and the parts.

Quality is measured on the first 16 windows of 512 tokens of the held-out novel (the loss of each
window is stored, so that two settings can be compared pair by pair), and as ranked choice on
held-out package descriptions.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effnb.evaluation import ranked_choice, stored_bytes
from effnb.evaluation.quality import token_losses
from effnb.lab import corpora, load, results

CONTEXT = 512
WINDOWS = 16
QUESTIONS = 150
CALIBRATION = (32, 256)
"""Sequences and tokens of each that calibrate a method, drawn from both training corpora."""
SEEDS = (0, 1, 2)


def windows_of(loaded: Any, texts: list[str], count: int, length: int = CONTEXT) -> torch.Tensor:
    """The first `count` windows of the texts' tokens, one behind the other."""
    ids: list[int] = []
    for text in texts:
        ids += loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        ids.append(loaded.tokenizer.eos_token_id)
        if len(ids) >= count * length:
            break
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:count]


def calibration(loaded: Any, seed: int, shape: tuple[int, int] = CALIBRATION) -> torch.Tensor:
    """Random sequences of both training corpora, half of each."""
    rng = random.Random(seed)
    sequences, length = shape
    rows: list[torch.Tensor] = []
    for number, name in enumerate(corpora.NAMES, 1):
        texts = corpora.documents(name, "train")
        while len(rows) < sequences * number // len(corpora.NAMES):
            ids: list[int] = []
            while len(ids) < length:
                ids += loaded.tokenizer.encode(
                    rng.choice(texts), add_special_tokens=False, verbose=False
                )
            start = rng.randrange(len(ids) - length + 1)
            rows.append(torch.tensor(ids[start : start + length]))
    return torch.stack(rows)


def training_batches(
    loaded: Any, seed: int, steps: int, shape: tuple[int, int] = (8, 128)
) -> list[torch.Tensor]:
    """A batch for each step, other text than any `calibration` of a small seed."""
    return [calibration(loaded, 1000 * (seed + 1) + step, shape) for step in range(steps)]


def held_out_novel() -> list[str]:
    """The chapters of the novel that no model of the bench was trained on."""
    return [c.text for c in corpora.novels("test") if c.work == "Persuasion"]


def domain_windows(loaded: Any, count: int, length: int) -> dict[str, torch.Tensor]:
    """Windows spread evenly over each kind of held-out text: known domains, unknown languages."""
    texts = {
        "novel": held_out_novel(),
        "Bible": [c.text for c in corpora.novels("test") if c.work != "Persuasion"],
        "packages": corpora.documents("packages", "test"),
        **{
            f"packages in {name}": [t.text for t in corpora.translations(code, "test")]
            for name, code in (("German", "de"), ("French", "fr"), ("Japanese", "ja"))
        },
    }
    found = {}
    for name, of in texts.items():
        windows = windows_of(loaded, of, 1_000_000, length)
        number = min(count, len(windows))
        found[name] = windows[[i * len(windows) // number for i in range(number)]]
    return found


class Bench:
    """The fixed texts and questions that every setting of one model is asked."""

    def __init__(
        self, name: str = "mini-5m", questions: int = QUESTIONS, windows: int = WINDOWS
    ) -> None:
        """Load the model and cut the held-out texts; no questions are asked if there are 0."""
        self.loaded = load(name, device="cpu")
        self.model = self.loaded.model
        self.windows = windows_of(self.loaded, held_out_novel(), windows)
        self.items = (
            corpora.choice_items(questions, context_characters=120, choice_characters=40)
            if questions
            else []
        )

    @torch.inference_mode()
    def losses(self, model: nn.Module, windows: torch.Tensor | None = None) -> list[float]:
        """Mean loss of each window, in nats per token."""
        windows = self.windows if windows is None else windows
        parts = [token_losses(model, part).mean(1) for part in windows.split(4)]
        return [round(x, 5) for x in torch.cat(parts).tolist()]

    def row(self, model: nn.Module, bytes_: int | None = None, **about: Any) -> dict[str, Any]:
        """Quality of a model, and its bytes: as held in memory unless given."""
        losses = self.losses(model)
        row = about | {
            "loss": round(sum(losses) / len(losses), 5),
            "windows": losses,
            "bytes": stored_bytes(model) if bytes_ is None else bytes_,
        }
        if self.items:
            choice = ranked_choice(model, self.loaded.tokenizer, self.items)
            row["accuracy"] = round(choice.accuracy, 4)
            row["standard_error"] = round(choice.standard_error, 4)
        print({k: v for k, v in row.items() if k != "windows"}, flush=True)
        return row


def timed(method: Callable[..., Any], *arguments: Any, **keywords: Any) -> tuple[Any, float]:
    """A method's result and its seconds."""
    began = time.perf_counter()
    result = method(*arguments, **keywords)
    return result, round(time.perf_counter() - began, 2)


def run(parts: Mapping[str, Callable[[], dict]], prefix: str, script: str, about: str) -> None:
    """Measure the parts that the command line asks for, and store each when it is done.

    Args:
        parts: What each part computes, by its name.
        prefix: What the stored results' names begin with, before an underscore.
        script: The script's `__file__`.
        about: One line on what it is for.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)}; all by default")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(parts)):
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(parts)}.")
    for part in arguments.parts or parts:
        data = parts[part]()
        results.store(f"{prefix}_{part}", data, f"python data/{Path(script).name} {part}")
        print(f"stored {prefix}_{part}", flush=True)
