"""The stored measurements of `notebooks/05_inference/4_self_distilled_quantization`.

    python data/sweeps/05_inference/4_self_distilled_quantization.py                   # every part
    python data/sweeps/05_inference/4_self_distilled_quantization.py grid --resume

Each part is written to `data/results/05_inference/4_self_distilled_quantization/<part>.json`:

modules   the error of every module of MiniLM and of a classifier on `mini-multi`, layer by layer
          (2 minutes)
encoder   how well a classifier on `mini-multi` does in each language, three seeds (4 minutes)
grid      bits, noise and attention's weight, one seed: what the panel shows (14 minutes)
variants  all variants of the loss and of the noise, and codewords, at 4 bits, three seeds
          (12 minutes)

Minutes are those of one idle core, estimated. What cannot be measured while `mini-multi` is not
trained is left out.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from torch import nn

from effnb.chapters.inference.self_distilled_quantization import languages, methods
from effnb.inference import self_distilled_quantization as sdq
from effnb.lab import load
from effnb.lab.sweeps import Table as Rows
from effnb.lab.sweeps import chapter_of, run
from effnb.lab.task_inputs import encoder_batch

SEEDS = (0, 1, 2)
GRID_BITS, GRID_NOISE, GRID_ALPHA = (8, 6, 4, 3), (0.25, 0.5, 1.0), (0.0, 1.0, 10.0)
TEXTS = 24
STEPS = methods.STEPS
CODEWORD_STEPS = 10
"""Steps after each of the six blocks: as many in all as the other students have."""


class Table(Rows):
    """Rows of this chapter."""

    chapter = chapter_of(__file__)


@cache
def encoder() -> Any:
    """The multilingual encoder."""
    return load(methods.MODEL, device="cpu")


@cache
def teacher(seed: int) -> nn.Module:
    """A fine-tuned classifier."""
    return methods.fine_tuned(encoder(), seed)


def accuracies(model: nn.Module) -> dict[str, Any]:
    """Accuracy in each language."""
    found = languages.accuracy(languages.judge(model, encoder().tokenizer))
    return {"languages": {language: round(a, 4) for language, a in found.items()}}


def modules() -> None:
    """Errors of every module of both models."""
    table = Table("modules")
    loaded = load("minilm-l6", device="cpu")
    english = [encoder_batch(loaded.tokenizer, languages.held_out("en")[:TEXTS])]
    subjects = {"minilm-l6": lambda: (loaded.model, english)}
    if methods.encoder():
        subjects[methods.MODEL] = lambda: (
            teacher(0),
            languages.text_batches(encoder().tokenizer, languages.LANGUAGES, 2),
        )
    for name, subject in subjects.items():
        for bits in methods.BITS:

            def measure(subject: Any = subject, bits: int = bits) -> dict[str, Any]:
                model, batches = subject()
                found = sdq.module_errors(model, methods.rounded(model, bits), batches)
                return {"layers": methods.layer_means(found)}

            table.add({"model": name, "bits": bits}, measure)


def encoder_part() -> None:
    """What the encoder reaches, beside the most frequent topic."""
    table = Table(
        "encoder",
        majority={x: round(languages.majority(x), 4) for x in languages.LANGUAGES},
        texts={x: len(languages.held_out(x)) for x in languages.LANGUAGES},
    )
    for seed in SEEDS:
        table.add({"seed": seed}, lambda s=seed: accuracies(teacher(s)))


def grid() -> None:
    """The knobs of the panel."""
    table = Table("grid", steps=STEPS)
    exact = teacher(0)
    table.add({"method": "teacher"}, lambda: accuracies(exact))
    for bits in GRID_BITS:
        table.add(
            {"method": "PTQ", "bits": bits}, lambda b=bits: accuracies(methods.rounded(exact, b))
        )
    for bits in GRID_BITS:
        for noise in GRID_NOISE:
            for alpha in GRID_ALPHA:
                about = {"method": "SDQ", "bits": bits, "noise": noise, "alpha": alpha}
                table.add(
                    about,
                    lambda b=bits, p=noise, a=alpha: accuracies(
                        methods.student(
                            exact, encoder().tokenizer, b, 0, noise=p, alpha=a,
                            attention="mse" if a else None,
                        )
                    ),
                )  # fmt: skip


def variants() -> None:
    """What is matched, and what the noise is."""
    table = Table("variants", steps=STEPS, bits=4)
    for seed in SEEDS:
        for name, given in methods.VARIANTS.items():
            table.add(
                {"variant": name, "seed": seed},
                lambda g=given, s=seed: accuracies(
                    methods.student(teacher(s), encoder().tokenizer, 4, s, **g)
                ),
            )
        for steps in (0, CODEWORD_STEPS):

            def measure(seed: int = seed, steps: int = steps) -> dict[str, Any]:
                model, bits = methods.codewords(teacher(seed), encoder().tokenizer, seed, steps)
                return accuracies(model) | {"bits": round(bits, 3)}

            name = "codewords, trained block by block" if steps else "codewords, not trained"
            table.add({"variant": name, "seed": seed}, measure)


PARTS = {"modules": modules, "encoder": encoder_part, "grid": grid, "variants": variants}

if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
