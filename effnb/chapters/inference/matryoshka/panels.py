"""The panels of the chapter on Matryoshka: two looks, and a walk through a graph."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from effnb.chapters.inference.matryoshka import live
from effnb.lab import PALETTE, knob, panel
from effnb.lab.changes import if_measured
from effnb.lab.panels import Panel, guess

DIMS = (4, 8, 16, 32, 64, 128)
SHORTLISTS = (0, 10, 20, 50, 100, 200, 500, 1000)
EFS = (10, 20, 40, 80, 160, 320)
WALKED = (8, 16, 32, 64, 128)
EXAMPLE = 2
"""The stored query whose results are written out."""


def _lines(answer: live.Answer, searched: live.Live, documents: int) -> list[str]:
    full = documents * searched.width
    return [
        f"Right description first: {100 * answer.first:.1f} %",
        f"Of the ten nearest: {100 * answer.neighbours:.1f} %",
        f"Comparisons a query: {answer.evaluations:,.0f}",
        f"Multiplications a query: {answer.multiplications:,.0f}",
        f"Times fewer: {full / answer.multiplications:.1f}",
    ]


def _example(answer: live.Answer) -> list[str]:
    names = [live.name_of(row) for row in answer.found.rows[EXAMPLE, :3].tolist()]
    return [f"A query: “{live.synopsis_of(EXAMPLE)}”. Found:", *(f"- {name}" for name in names)]


def _bars(answer: live.Answer, searched: live.Live, fig: Figure) -> None:
    """Left what is found, right what it takes, both beside the exact search."""
    left, right = fig.subplots(1, 2)
    exact = float(searched.exact.finds(searched.own).float().mean())
    shares = [answer.neighbours, answer.first, exact]
    names = ["of the ten nearest", "right one first", "right one first, exact"]
    left.barh(names[::-1], [100 * s for s in shares[::-1]], color=[PALETTE[6], PALETTE[0],
              PALETTE[2]], height=0.6)  # fmt: skip
    left.set_xlim(0, 100)
    left.set_title("found, per cent")
    full = len(searched.documents) * searched.width
    right.barh(["this search", "exact search"][::-1], [full, answer.multiplications],
               color=[PALETTE[6], PALETTE[1]], height=0.5)  # fmt: skip
    right.set_xlim(0, 1.05 * full)
    right.set_xticks([0, full // 2, full], ["0", f"{full // 2:,}", f"{full:,}"])
    right.set_title("multiplications a query")


@if_measured
def two_looks(searched: live.Live) -> Panel:
    """Numbers in the first look, and documents that get a second."""

    def compute(dims: int, shortlist: int) -> live.Answer:
        return searched.looks(dims, shortlist)

    def draw(answer: live.Answer, fig: Figure) -> None:
        _bars(answer, searched, fig)

    def text(answer: live.Answer) -> str:
        return "\n".join([*_lines(answer, searched, len(searched.documents)), *_example(answer)])

    return panel(
        compute,
        draw,
        text=text,
        title="Look twice",
        caption=f"{len(searched.queries)} synopses look for their descriptions among "
        f"{len(searched.documents):,}. Exact search compares all {searched.width} stored numbers. "
        "With a shortlist of 0 there is no second look.",
        figsize=(7.0, 1.9),
        frames={"dims": [8, 16, 32], "shortlist": [0, 200]},
        predict=guess(
            "The first look compares 16 numbers of each document, an eighth, and there is no "
            "second. How many per cent of the ten nearest documents does it find?",
            answer=lambda answer: round(100 * answer.neighbours),
            at={"dims": 16, "shortlist": 0},
        ),
        ignored=lambda values: (
            {"shortlist": "all numbers are compared already"}
            if values["dims"] == searched.width
            else {}
        ),
        dims=knob(list(DIMS), default=16, label="numbers in the first look"),
        shortlist=knob(list(SHORTLISTS), default=0, label="shortlist"),
    )


@if_measured
def walk(searched: live.Live) -> Panel:
    """How far a walk through a graph looks around, over all numbers or a prefix."""

    def compute(ef: int, dims: int) -> live.Answer:
        return searched.walk(dims, ef)

    def draw(answer: live.Answer, fig: Figure) -> None:
        _bars(answer, searched, fig)

    def text(answer: Any) -> str:
        return "\n".join(_lines(answer, searched, len(searched.documents)))

    return panel(
        compute,
        draw,
        text=text,
        title="Walk through a graph",
        caption="FAISS's HNSW over the same documents. A walk by fewer than all numbers gives a "
        "shortlist as long as efSearch, which is ordered by all of them.",
        figsize=(7.0, 1.9),
        frames={"ef": [20, 80, 320], "dims": [16, 128]},
        predict=guess(
            "A walk by all 128 numbers with efSearch 80. With how many of the 10,000 documents is "
            "a query compared?",
            answer=lambda answer: round(answer.evaluations),
            at={"ef": 80, "dims": 128},
        ),
        ef=knob(list(EFS), default=80, label="efSearch"),
        dims=knob(list(WALKED), default=128, label="numbers compared"),
    )
