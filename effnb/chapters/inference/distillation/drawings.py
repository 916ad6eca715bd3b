"""The pictures of the chapter on distillation, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.distillation import experiments, tables
from effnb.inference import distillation
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure


def temperature_label(temperature: float) -> str:
    """What a group of bars or a control says of a temperature."""
    return "labels" if temperature == 0 else f"τ = {temperature:g}"


@if_measured
def missing(rows: Sequence[Row]) -> CaptionedFigure:
    """What students get right of a language that their texts never had."""
    temperatures = tables.temperatures(rows)
    by_temperature = {t: tables.of_missing(rows, t) for t in temperatures}
    languages = list(by_temperature[0])
    teacher = tables.of_missing(rows, 0, "teacher")

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        width = 0.8 / len(temperatures)
        shades = ["0.35", *(PALETTE[i] for i in (1, 3, 2, 0))]
        for i, t in enumerate(temperatures):
            x = np.arange(len(languages)) + (i - (len(temperatures) - 1) / 2) * width
            heights = [100 * by_temperature[t][name] for name in languages]
            axes.bar(x, heights, width * 0.92, color=shades[i], label=temperature_label(t))
            if t == 0:
                for at, height in zip(x, heights):
                    axes.text(at, height + 1, f"{height:.0f}", ha="center", fontsize=8)
        for i, name in enumerate(languages):
            axes.plot([i - 0.45, i + 0.45], [100 * teacher[name]] * 2, color="0.2", linestyle=":")
        axes.set_xticks(range(len(languages)), [f"never saw\n{name}" for name in languages])
        axes.set_ylabel("right on that language, %")
        axes.set_ylim(0, 105)
        axes.legend(ncols=len(temperatures), loc="upper center", fontsize=8)

    return figure(
        draw,
        caption="Each group: students whose texts had no text of one language. Grey: trained on "
        "labels. Coloured: trained on the teacher's answers to the same texts, softened by a "
        "temperature τ. Dotted: the teacher, which knows the language.",
        alt="Bars that rise with the temperature. "
        + "; ".join(
            f"{name}: "
            + ", ".join(
                f"{by_temperature[t][name]:.0%} with {temperature_label(t)}" for t in temperatures
            )
            + f", the teacher {teacher[name]:.0%}"
            for name in languages
        )
        + ".",
        figsize=(6.6, 2.7),
    )


def two_humps() -> CaptionedFigure:
    """One bump fitted to two, by the forward and by the reverse divergence."""
    weights, means, stds = (0.7, 0.3), (-2.0, 2.0), (0.5, 0.5)
    fits = {
        name: distillation.fit_gaussian(weights, means, stds, direction)
        for name, direction in (("forward KL", "forward"), ("reverse KL", "reverse"))
    }
    x = torch.linspace(-5, 5, 201, dtype=torch.double)

    def bump(mean: float, std: float) -> torch.Tensor:
        return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * (2 * torch.pi) ** 0.5)

    target = sum(w * bump(m, s) for w, m, s in zip(weights, means, stds))

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.fill_between(x.tolist(), target.tolist(), color="0.85", label="teacher")
        for colour, (name, fit) in zip((PALETTE[1], PALETTE[0]), fits.items()):
            axes.plot(x.tolist(), bump(fit.mean, fit.std).tolist(), color=colour, label=name)
        axes.set_yticks([])
        axes.legend()

    return figure(
        draw,
        caption="A student with one bump, a teacher with two. Forward KL covers both and puts mass "
        "where the teacher has none; reverse KL chooses one.",
        alt="; ".join(
            f"{name}: mean {fit.mean:.2f}, deviation {fit.std:.2f}" for name, fit in fits.items()
        )
        + ".",
        figsize=(5.4, 1.9),
    )


@if_measured
def noise(rows: Sequence[Row], budget: int = 1024) -> CaptionedFigure:
    """Accuracy of students over how often their teacher errs."""
    names = {
        "plain": ("as they are", PALETTE[1]),
        "weighted": ("weighted", PALETTE[2]),
        "forward correction": ("forward correction", PALETTE[0]),
        "labels for longer": ("true labels of few texts", "0.45"),
    }
    curves = {name: tables.accuracy_over_noise(rows, name, budget) for name in names}

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for name, (label, colour) in names.items():
            points = curves[name]
            axes.plot(
                [100 * p for p in points], [100 * a for a in points.values()], "o-",
                color=colour, label=label, markersize=4,
            )  # fmt: skip
        axes.set_xlabel("teacher's answers that are spoilt, %")
        axes.set_ylabel("accuracy, %")
        name_lines(axes)

    return figure(
        draw,
        caption=f"Students of a teacher that answers {budget:,} texts and errs on purpose.",
        alt="; ".join(
            f"{names[n][0]}: " + ", ".join(f"{a:.0%} at {p:.0%}" for p, a in curve.items())
            for n, curve in curves.items()
        )
        + ".",
        figsize=(6.4, 2.5),
    )


def confidence(seed: int = 0) -> CaptionedFigure:
    """The student's confidence over the teacher's, with the fitted line; measured here."""
    found = experiments.confidences(seed)
    ends = [float(found.teacher.min()), float(found.teacher.max())]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        axes.plot(found.teacher.tolist(), found.student.tolist(), ".", color=PALETTE[0],
                  markersize=3, alpha=0.5)  # fmt: skip
        axes.plot(ends, ends, color="0.6", linestyle=":", label="copy")
        axes.plot(
            ends, [found.intercept + found.slope * e for e in ends], color=PALETTE[1],
            label=f"slope {found.slope:.2f}",
        )  # fmt: skip
        axes.set_xlabel("teacher: logit of its first class")
        axes.set_ylabel("student: the same class")
        axes.legend()

    return figure(
        draw,
        caption="Each point is a new text: how sure the student is of the teacher's first class.",
        alt=f"A cloud of points around a line of slope {found.slope:.2f}; a copy would have 1.",
        figsize=(5.0, 2.4),
    )


def mean_states(rows: Sequence[Row], width: int, temperature: float) -> dict[int, float]:
    """By the teacher's step, complexity as a part of that of shuffled answers; a mean of seeds."""
    found: dict[int, list[float]] = {}
    for row in pick(rows, width=width, temperature=temperature):
        for state in row["states"]:
            found.setdefault(state["step"], []).append(state["share_of_shuffled"])
    return {step: fmean(values) for step, values in sorted(found.items())}
