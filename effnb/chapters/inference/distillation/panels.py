"""The panels of the chapter on distillation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.inference.distillation import drawings, experiments, tables
from effnb.chapters.inference.distillation import languages as own
from effnb.inference import distillation
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.panels import Panel, guess

LEFT_OUT = ("Portuguese", "Danish", "Korean", "Polish")
TEMPERATURES = (0, 1, 2, 4, 10)


def missing() -> Panel:
    """A student whose texts have none of one language, trained while the reader waits."""

    def compute(temperature: int, language: str, hidden: int) -> dict[str, Any]:
        found = own.missing_class(language, temperature, hidden=hidden)
        return found | {"language": language, "temperature": temperature}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        answers = {k: v for k, v in result["answers"].items() if v or k == result["language"]}
        colours = [PALETTE[0] if k == result["language"] else "0.7" for k in answers]
        axes.barh(list(answers), list(answers.values()), color=colours, height=0.7)
        axes.axvline(result["teacher"] * result["texts"], color="0.3", linestyle=":")
        axes.set_xlim(0, result["texts"])
        axes.invert_yaxis()
        axes.set_xlabel(f"answers to the {result['texts']} texts in {result['language']}")

    def text(result: Mapping[str, Any]) -> str:
        lines = [
            f"Right on {result['language']}, which it never saw: {result['missing']:.0%}",
            f"The teacher: {result['teacher']:.0%}",
            f"Right on all twelve languages: {result['accuracy']:.0%}",
        ]
        return "\n".join(lines)

    return panel(
        compute,
        draw,
        text=text,
        title="The language that the student never saw",
        caption="What the student answers when it is shown texts in the missing language. Dotted: "
        "how many of them the teacher gets right. Temperature 0 stands for training on labels.",
        figsize=(6.0, 2.4),
        frames={"temperature": [0, 1, 10]},
        predict=guess(
            "The student learns from the teacher's answers at temperature 10. None of its texts is "
            "in Danish. What per cent of new Danish texts does it recognize?",
            answer=lambda result: round(100 * result["missing"]),
            at={"temperature": 10, "language": "Danish"},
        ),
        temperature=knob(list(TEMPERATURES), default=1),
        language=knob(list(LEFT_OUT), default="Danish", label="left out"),
        hidden=knob([8, 32, 128], default=32, label="student's hidden units"),
    )


@if_measured
def grid(rows: Sequence[Row]) -> Panel:
    """Temperature, weight and size, as the sweep found them."""
    teacher = pick(rows, method="teacher")[0]["loss"]

    def compute(temperature: int, weight: float, student: str) -> dict[str, Any]:
        wanted = {"method": "distilled", "temperature": temperature, "weight": weight}
        losses = {
            "distilled": pick(rows, model=student, **wanted)[0]["loss"],
            "text alone": pick(rows, model=student, method="text alone")[0]["loss"],
            "text alone for longer": pick(rows, model=student, method="text alone for longer")[0][
                "loss"
            ],
        }
        change = tables.against_text(rows, student, **wanted)
        return {"losses": losses, "change": change, "student": student}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        names = list(result["losses"])
        axes.barh(
            names, list(result["losses"].values()), color=[PALETTE[0], "0.6", "0.75"], height=0.6
        )
        low, high = min(result["losses"].values()), max(result["losses"].values())
        axes.set_xlim(low - 0.1, high + 0.05)
        axes.invert_yaxis()
        axes.set_xlabel("loss, nats per token")

    def text(result: Mapping[str, Any]) -> str:
        lines = [f"{name}: {loss:.3f}" for name, loss in result["losses"].items()]
        lines.append(
            f"Distilled − text alone, equal steps: {result['change'].number()} "
            f"({result['change'].word()})"
        )
        return "\n".join([*lines, f"The teacher: {teacher:.3f}"])

    weights = sorted({row["weight"] for row in rows if row.get("weight")})
    found = sorted({row["temperature"] for row in rows if row.get("temperature")})
    sizes = [m for m in tables.SIZES if len(pick(rows, model=m, method="distilled")) == len(
        weights) * len(found)]  # fmt: skip
    return panel(
        compute,
        draw,
        text=text,
        title="mini-5m teaches a smaller model",
        caption="Loss on held-out text after training, lower is better. The axis does not start "
        "at 0. The last bar was trained at the compute that distillation took.",
        figsize=(6.0, 1.7),
        frames={"temperature": found, "student": sizes},
        predict=guess(
            "mini-300k learns from text and, as much, from mini-5m's answers. By how many nats is "
            "its loss lower than after as many steps on the text alone? (Negative: it is higher.)",
            answer=lambda result: round(-result["change"].mean, 3),
            at={"temperature": found[0], "weight": weights[0], "student": sizes[0]},
        ),
        temperature=knob(found, default=found[0]),
        weight=knob(weights, default=weights[0], label="the teacher's weight"),
        student=knob(sizes, default=sizes[0]),
    )


# --- a divergence with a jump ---------------------------------------------------------------------

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.double)
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.double)
BETAS = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def jump() -> Panel:
    """The generalized Jensen-Shannon divergence over β, and what becomes of it at the ends."""
    curve = distillation.jsd_curve(Q.log(), P.log(), [i / 100 for i in range(1, 100)])

    def compute(beta: float) -> dict[str, float]:
        return distillation.jsd_curve(Q.log(), P.log(), [beta])[0]

    def draw(result: Mapping[str, float], fig: Figure) -> None:
        axes = fig.subplots()
        x = [row["beta"] for row in curve]
        axes.plot(x, [row["jsd"] for row in curve], color=PALETTE[0], label="as defined")
        axes.plot(x, [row["rescaled"] for row in curve], ":", color=PALETTE[2], label="rescaled")
        axes.plot([0, 1], [0, 0], "o", color=PALETTE[0], fillstyle="none", markersize=6)
        axes.plot(
            [0, 1], [result["forward"], result["reverse"]], "o", color=PALETTE[0], markersize=6
        )
        axes.plot([result["beta"]], [result["jsd"]], "D", color=PALETTE[1], markersize=6)
        axes.set_xlabel("β")
        axes.set_ylabel("nats")
        axes.legend()

    def text(result: Mapping[str, float]) -> str:
        return (
            f"As defined: {result['jsd']:.5f}\nRescaled: {result['rescaled']:.5f}\n"
            f"KL(T‖S) {result['forward']:.5f}, KL(S‖T) {result['reverse']:.5f}"
        )

    def nearest(result: Mapping[str, float]) -> str:
        return "nearly 0" if result["jsd"] < 0.1 else "about the forward KL"

    return panel(
        compute,
        draw,
        text=text,
        title="A divergence that jumps at its ends",
        caption="The diamond is at the chosen β. Filled circles: the two KLs, which are the values "
        "at 0 and 1. Open circles: where the curve would end.",
        figsize=(5.8, 2.2),
        frames={"beta": [0.0, 0.01, 0.5, 1.0]},
        predict=guess(
            "At β = 0 the divergence is KL(T‖S), 0.58 nats. What is it at β = 0.01?",
            ["about the forward KL", "nearly 0"],
            answer=nearest,
            at={"beta": 0.01},
        ),
        beta=knob(list(BETAS), default=0.5, label="β"),
    )


# --- noise and budget -----------------------------------------------------------------------------


@if_measured
def noise(rows: Sequence[Row]) -> Panel:
    """How often the teacher errs, and how many texts it answers."""
    ways = (*experiments.METHODS, "labels for longer")

    def compute(noise: int, budget: int) -> dict[str, float]:
        return {
            way: tables.accuracy_over_noise(rows, way, budget)[noise / 100] for way in ways
        }  # fmt: skip

    def draw(result: Mapping[str, float], fig: Figure) -> None:
        axes = fig.subplots()
        colours = [PALETTE[1], PALETTE[2], PALETTE[0], "0.6"]
        axes.barh(list(result), [100 * v for v in result.values()], color=colours, height=0.6)
        axes.set_xlim(0, 100)
        axes.invert_yaxis()
        axes.set_xlabel("accuracy on twelve languages, %")

    def text(result: Mapping[str, float]) -> str:
        return "\n".join(f"{name}: {value:.1%}" for name, value in result.items())

    noises = sorted({round(100 * row["noise"]) for row in rows})
    budgets = sorted({row["budget"] for row in rows})
    noises = [n for n in noises if all(pick(rows, noise=n / 100, budget=b) for b in budgets)]
    return panel(
        compute,
        draw,
        text=text,
        title="A teacher that errs",
        caption="Accuracy of students of the teacher's labels as they are, weighted, and by "
        "forward correction; the last bar had 256 true labels and no teacher.",
        figsize=(6.0, 1.8),
        frames={"noise": [noises[0], noises[-2]], "budget": [budgets[0], budgets[-1]]},
        predict=guess(
            f"The teacher answers {budgets[-1]:,} texts, and {noises[-2]} % of its answers are "
            "spoilt. What per cent does a student get right that takes them as they are?",
            answer=lambda result: round(100 * result["plain"]),
            at={"noise": noises[-2], "budget": budgets[-1]},
        ),
        noise=knob(noises, default=noises[0], label="spoilt answers, %"),
        budget=knob(budgets, default=budgets[-1], label="texts that the teacher answers"),
    )


# --- complexity -----------------------------------------------------------------------------------


@if_measured
def complexity(rows: Sequence[Row]) -> Panel:
    """The teacher's step against the complexity of its answers, over temperature and width."""
    widths = sorted({row["width"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})

    def compute(width: int, temperature: int) -> dict[str, Any]:
        return {
            "curve": drawings.mean_states(rows, width, temperature),
            "others": {w: drawings.mean_states(rows, w, temperature) for w in widths},
            "width": width,
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        for width, curve in result["others"].items():
            mine = width == result["width"]
            axes.plot(
                list(curve), list(curve.values()), "o-" if mine else "-",
                color=PALETTE[0] if mine else "0.75", markersize=4,
            )  # fmt: skip
        axes.axhline(1, color="0.45", linestyle=":")
        axes.set_xscale("log")
        axes.set_xticks(list(result["curve"]), [str(s) for s in result["curve"]])
        axes.minorticks_off()
        axes.set_ylim(0, None)
        axes.set_xlabel("steps that the teacher has trained")
        axes.set_ylabel("complexity /\nshuffled answers'")

    def text(result: Mapping[str, Any]) -> str:
        return "\n".join(f"Step {s}: {v:.2f}" for s, v in result["curve"].items())

    def side(result: Mapping[str, Any]) -> str:
        values = list(result["others"].values())
        return (
            "the narrow one"
            if list(values[0].values())[-1] > list(values[-1].values())[-1]
            else "the wide one"
        )

    return panel(
        compute,
        draw,
        text=text,
        title="How complex are the teacher's answers?",
        caption="Complexity of the teacher's answers to a student of the chosen width (blue; other "
        "widths grey), as a part of that of the same answers given to other texts (dotted, 1).",
        figsize=(6.0, 2.1),
        frames={"width": widths},
        predict=guess(
            "To which student do the trained teacher's answers look more like random ones?",
            ["the narrow one", "the wide one"],
            answer=side,
            at={"width": widths[0], "temperature": temperatures[0]},
        ),
        width=knob(widths, default=widths[0], label="student's hidden units"),
        temperature=knob(temperatures, default=temperatures[0]),
    )
