"""The smaller panels of the chapter on pruning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.pruning import tables
from effnb.inference import pruning
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import Change, Row, if_measured
from effnb.lab.panels import Panel, guess

# --- three methods on two models ------------------------------------------------------------------

METHODS = {"magnitude": PALETTE[1], "Wanda": PALETTE[2], "SparseGPT": PALETTE[0]}
Rises = dict[str, Change | None]


def ratio(nats: float) -> float:
    """The factor by which perplexity grows when the loss rises by this many nats."""
    return math.exp(min(nats, 50.0))


def factor(value: float) -> str:
    """A factor with as many digits as it takes to see that it is not 1."""
    return f"{value:.3f}" if value < 2 else f"{value:.3g}"


@if_measured
def methods(smollm2: Sequence[Row], mini: Sequence[Row]) -> Panel:
    """What equally many zeros cost, chosen in three ways, on two models, from the sweeps."""
    models = {"SmolLM2-135M": smollm2, "mini-5m": mini}
    settings = [
        setting
        for setting in tables.measured_settings(smollm2)
        if setting in tables.measured_settings(mini)
    ]
    by_label = {tables.label(setting): setting for setting in settings}
    rises = [
        tables.rise(rows, method, setting)
        for rows in models.values()
        for method in METHODS
        for setting in settings
    ]
    largest = max(ratio(change.high) for change in rises if change)

    def compute(removed: str, model: str) -> Rises:
        return {method: tables.rise(models[model], method, by_label[removed]) for method in METHODS}

    def draw(result: Rises, fig: Figure) -> None:
        axes = fig.subplots()
        for place, (method, change) in enumerate(result.items()):
            if change:
                axes.barh(place, ratio(change.mean) - 1, left=1, color=METHODS[method], height=0.6)
                axes.plot([ratio(change.low), ratio(change.high)], [place] * 2, color="0.2")
        axes.set_yticks(range(len(result)), list(result))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.9, 1.1 * largest)  # the same at every position
        axes.set_xlabel("perplexity ÷ the original's")

    def text(result: Rises) -> str:
        lines = []
        for method, change in result.items():
            if change is None:
                lines.append(f"{method}: not measured")
                continue
            mean, low, high = (factor(ratio(v)) for v in (change.mean, change.low, change.high))
            lines.append(f"{method}: × {mean}, {change.word()} (95 % interval × {low} to {high})")
        return "\n".join(lines)

    return panel(
        compute,
        draw,
        text=text,
        title="As many zeros, chosen in three ways",
        caption="Perplexity of the pruned model, as a multiple of the original's, with its "
        "interval. The axis is logarithmic.",
        figsize=(6.4, 1.7),
        frames={"removed": None, "model": None},
        predict=guess(
            "Half of SmolLM2's weights are set to zero, the smallest of each matrix. By what "
            "factor does its perplexity grow?",
            answer=lambda result: round(ratio(result["magnitude"].mean), 1),
            at={"removed": "50 %", "model": "SmolLM2-135M"},
        ),
        removed=knob(list(by_label), default="50 %"),
        model=knob(list(models), default="SmolLM2-135M"),
    )


# --- what zeros take to store ---------------------------------------------------------------------

SIZE = 512
FORMS = {"bitmap": PALETTE[0], "CSR": PALETTE[1], "2:4": PALETTE[2]}
PER_CENT = tuple(range(0, 100, 10))
ANSWERS = {"below 40 %": (0, 40), "between 40 and 60 %": (40, 60), "above 60 %": (60, 100)}


@dataclass(frozen=True)
class Stored:
    """What a matrix takes in each form.

    Attributes:
        sparsity: Part of its numbers that is zero, in per cent.
        bits: Bits of a number that is kept.
        times_dense: Bytes by form, as a part of the dense matrix's; 2:4 at half only.
    """

    sparsity: int
    bits: int
    times_dense: dict[str, float]


def stored(sparsity: int, bits: int) -> Stored:
    """A matrix of 512 by 512 random numbers in every form that can hold it."""
    score = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    found = pruning.mask_storage(pruning.keep_mask(score, sparsity / 100), bits)
    forms = {
        "bitmap": found.bitmap_bytes / found.dense_bytes,
        "CSR": found.csr_bytes / found.dense_bytes,
    }
    if sparsity == 50:
        half = pruning.mask_storage(pruning.keep_mask(score, None, "2:4"), bits)
        forms["2:4"] = half.two_four_bytes / half.dense_bytes
    return Stored(sparsity, bits, forms)


def saves_from(form: str, bits: int) -> int:
    """The lowest sparsity in per cent from which a form takes less than the dense matrix."""
    return next(s for s in range(100) if stored(s, bits).times_dense[form] < 1)


def which(per_cent: int) -> str:
    """The answer in whose range a sparsity lies."""
    return next(name for name, (low, high) in ANSWERS.items() if low <= per_cent < high)


def storage() -> Panel:
    """Bytes of a sparse matrix by its form, its sparsity and the bits of its numbers."""

    def draw(result: Stored, fig: Figure) -> None:
        axes = fig.subplots()
        names = list(result.times_dense)
        axes.barh(
            names, list(result.times_dense.values()), color=[FORMS[n] for n in names], height=0.6
        )
        axes.axvline(1, color="0.45", linestyle="--")
        axes.axvline(1 - result.sparsity / 100, color="0.45", linestyle=":")
        axes.set_xlim(0, 2.1)
        axes.invert_yaxis()
        axes.set_xlabel("bytes ÷ dense (dashed); dotted: if zeros were free")

    def text(result: Stored) -> str:
        lines = [f"{name}: {times:.3f} of dense" for name, times in result.times_dense.items()]
        smallest = min(result.times_dense, key=result.times_dense.get)
        if result.times_dense[smallest] >= 1:
            smallest = "dense"
        return "\n".join([*lines, f"Smallest: {smallest}"])

    return panel(
        stored,
        draw,
        text=text,
        title="What zeros take to store",
        caption="A matrix of 512 × 512 numbers, part of them zero. Beyond the dashed line, not "
        "pruning would have been smaller.",
        figsize=(6.4, 1.6),
        frames={"sparsity": [50, 90], "bits": [16, 4]},
        predict=guess(
            "From which sparsity on does a matrix of 16-bit numbers take less in CSR form than "
            "dense?",
            list(ANSWERS),
            answer=lambda result: which(saves_from("CSR", result.bits)),
        ),
        sparsity=knob(PER_CENT, default=50, label="sparsity in %"),
        bits=knob([16, 8, 4], default=16, label="bits per number"),
    )
