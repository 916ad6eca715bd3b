"""The panels of the chapter on distilled retrievers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.inference.retrieval_distillation import tables
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import Change, Row, if_measured
from effnb.lab.panels import Panel, guess

DOCUMENTS = {"the teacher's, frozen": True, "the student's own": False}


@if_measured
def search(rows: Sequence[Row]) -> Panel:
    """Student depth, embedding size, loss, and whose documents, as the sweep measured them."""
    depths, sizes = tables.depths_of(rows), tables.sizes_of(rows)
    losses = {name: loss for loss, name in tables.LOSS_NAMES.items()}

    # While one depth alone is measured, there is nothing to choose.
    deeper = {"depth": knob(depths, label="student's layers")} if len(depths) > 1 else {}

    def compute(documents: str, size: int, loss: str, depth: int = depths[0]) -> dict[str, Any]:
        frozen = DOCUMENTS[documents]
        after = tables.student_row(rows, depth, size, losses[loss], frozen)
        before = tables.student_row(rows, depth, size, "none", frozen)
        teacher = tables.teacher_of(rows, size)
        whole = tables.teacher_of(rows, sizes[-1])
        return {
            "shares": {
                "student before training": tables.found_share(before),
                "student": tables.found_share(after),
                f"teacher, {size} numbers": tables.found_share(teacher),
            },
            "mrr": after["mrr"],
            "teacher_mrr": teacher["mrr"],
            "whole": tables.found_share(whole),
            "change": Change.between(after["documents"], teacher["documents"]),
        }

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        shares = result["shares"]
        colours = ["0.75", PALETTE[0], "0.45"]
        axes.barh(list(shares), [100 * v for v in shares.values()], color=colours, height=0.6)
        axes.axvline(100 * result["whole"], color="0.2", linestyle=":")
        axes.set_xlim(0, 100)
        axes.invert_yaxis()
        axes.set_xlabel("found among the first ten, %")

    def text(result: Mapping[str, Any]) -> str:
        lines = [f"{name}: {value:.1%}" for name, value in result["shares"].items()]
        lines.append(
            f"MRR@10 of the student {result['mrr']:.3f}, of the teacher {result['teacher_mrr']:.3f}"
        )
        change = result["change"]
        return "\n".join(
            [*lines, f"Student − teacher: {change.number()} ({change.word(lower_is_better=False)})"]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="A small encoder learns to search",
        caption="New synopses that find their own description among the first ten of a thousand. "
        "Dotted: the teacher with all 384 numbers. Stored measurements, one seed.",
        figsize=(6.0, 1.7),
        frames={"documents": list(DOCUMENTS)} | dict.fromkeys(deeper, depths),
        predict=guess(
            f"A student of {tables.layers_said(depths[0])} copies its teacher's scores and "
            "embeddings; the documents are the teacher's, frozen. What per cent of new queries "
            "find their description among the first ten?",
            answer=lambda result: round(100 * result["shares"]["student"]),
            at={
                "documents": next(iter(DOCUMENTS)),
                "size": sizes[-1],
                "loss": tables.LOSS_NAMES["both"],
                **dict.fromkeys(deeper, depths[0]),
            },
        ),
        documents=knob(list(DOCUMENTS), default=next(iter(DOCUMENTS))),
        **deeper,
        size=knob(sizes, default=sizes[-1], label="embedding size"),
        loss=knob(list(losses), default=tables.LOSS_NAMES["both"]),
    )


STRETCHES = (0.25, 0.5, 1.0, 2.0)


def scores() -> Panel:
    """What losses on scores are blind to: a student with the teacher's scores, moved."""
    teacher = tables.TEACHER_SCORES

    def compute(shift: int, stretch: float, lead: int) -> dict[str, Any]:
        student = stretch * teacher + shift
        student[:, 0] += lead
        return {"losses": tables.losses_of(student, teacher), "scores": student[0].tolist()}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        losses = result["losses"]
        axes.barh(list(losses), list(losses.values()), color=PALETTE[: len(losses)], height=0.6)
        axes.set_xlim(0, max(1.0, *losses.values()) * 1.05)
        axes.invert_yaxis()
        axes.set_xlabel("loss")

    def text(result: Mapping[str, Any]) -> str:
        student = ", ".join(f"{v:g}" for v in result["scores"])
        lines = [f"Teacher 5, 1, 4.5; student {student}"]
        return "\n".join([*lines, *(f"{k}: {v:.3f}" for k, v in result["losses"].items())])

    def blind(result: Mapping[str, Any]) -> str:
        count = sum(value < 1e-6 for value in result["losses"].values())
        return {1: "one", 2: "two", 3: "three", 4: "all four"}[count]

    return panel(
        compute,
        draw,
        text=text,
        title="Which loss sees the difference?",
        caption="The student's scores are the teacher's, multiplied and shifted, with a lead added "
        "to the right document.",
        figsize=(6.0, 1.8),
        frames={"shift": [0, 3], "lead": [0, 2]},
        predict=guess(
            "The student gives every document 3 more than its teacher does. How many of the four "
            "losses are 0?",
            ["one", "two", "three", "all four"],
            answer=blind,
            at={"shift": 3, "stretch": 1.0, "lead": 0},
        ),
        shift=knob([-3, 0, 3], default=0, label="added to all"),
        stretch=knob(list(STRETCHES), default=1.0, label="multiplied by"),
        lead=knob([0, 2, 4], default=2, label="lead of the right one"),
    )
