"""What the chapter on distilled retrievers asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from effnb.chapters.inference.retrieval_distillation import rankers, students
from effnb.chapters.inference.retrieval_distillation.texts import (
    encoder,
    first_layers,
    padded,
    pairs,
)
from effnb.evaluation import latency as seconds_of
from effnb.inference import retrieval_distillation
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, pick, tidy
from effnb.lab.tables import Table, table

CHAPTER = "05_inference/6_retrieval_distillation"
LOSS_NAMES = {
    "labels": "labels",
    "scores": "scores",
    "embeddings": "embeddings",
    "both": "scores and embeddings",
}
"""The losses of students, as the page calls them."""


def stored(part: str) -> results.StoredResult | results.NotMeasured:
    """One stored table of this chapter."""
    return results.read(f"{CHAPTER}/{part}") or results.NotMeasured(f"{CHAPTER}/{part}")


def grid() -> list[Row] | results.NotMeasured:
    """The rows of all students that were measured, of every depth."""
    parts = [stored(part) for part in ("words", "depths")]
    found = [one for one in parts if isinstance(one, results.StoredResult)]
    return [row for one in found for row in one.data["table"]] or parts[0]


def found_share(row: Row) -> float:
    """The share of new queries that find their own description among the first ten."""
    return fmean(row["documents"])


def depths_of(rows: Sequence[Row]) -> list[int]:
    """Depths of which every setting was measured."""
    sizes, counts = sizes_of(rows), {}
    for row in rows:
        if row.get("depth") is not None and row["loss"] in LOSS_NAMES:
            counts[row["depth"]] = counts.get(row["depth"], 0) + 1
    whole = 2 * len(sizes) * len(LOSS_NAMES)
    return sorted(depth for depth, count in counts.items() if count == whole)


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """Embedding sizes that the teacher was measured with."""
    return sorted({row["size"] for row in pick(rows, loss="teacher")})


def teacher_of(rows: Sequence[Row], size: int) -> Row:
    """The teacher's row."""
    return pick(rows, loss="teacher", size=size)[0]


def student_row(rows: Sequence[Row], depth: int, size: int, loss: str, frozen: bool) -> Row:
    """One student's row; the loss "none" is a student before training."""
    return pick(rows, depth=depth, size=size, loss=loss, frozen=frozen)[0]


@if_measured
def picture_said(rows: Sequence[Row]) -> str:
    """What the smallest student finds, in a sentence."""
    depth, size = depths_of(rows)[0], sizes_of(rows)[-1]
    before, after = (student_row(rows, depth, size, loss, True) for loss in ("none", "both"))
    labels = student_row(rows, depth, size, "labels", True)
    teacher = teacher_of(rows, size)
    own = student_row(rows, depth, size, "both", False)
    return (
        f"Of {len(teacher['documents'])} new queries, the teacher finds {found_share(teacher):.0%} "
        f"among the first ten. A student of {layers_said(depth)} finds {found_share(before):.0%} "
        f"before training, {found_share(labels):.0%} after training on labels, and "
        f"{found_share(after):.0%} after copying the teacher's scores and embeddings. With "
        f"documents that it encodes itself, it then finds {found_share(own):.0%}."
    )


def layers_said(depth: int) -> str:
    """A number of layers in words."""
    words = {0: "no layers", 1: "one layer", 2: "two layers"}
    return words.get(depth, f"{depth} layers")


@if_measured
def frozen_said(rows: Sequence[Row]) -> str:
    """Frozen documents against the student's own, for each depth and loss, in sentences."""
    size = sizes_of(rows)[-1]
    lines = []
    for depth in depths_of(rows):
        for loss, name in LOSS_NAMES.items():
            inherited, own = (
                student_row(rows, depth, size, loss, frozen)["documents"]
                for frozen in (True, False)
            )
            change = Change.between(inherited, own)
            lines.append(
                f"{layers_said(depth)}, {name}: {fmean(inherited):.0%} with the teacher's "
                f"documents, {fmean(own):.0%} with its own: {change.word(lower_is_better=False)}"
            )
    return "\n".join(lines)


@if_measured
def grid_table(rows: Sequence[Row]) -> Table:
    """Students at the full embedding size, by depth, documents and loss."""
    size = sizes_of(rows)[-1]
    lines = []
    for depth in depths_of(rows):
        for frozen in (True, False):
            line: dict[str, Any] = {
                "layers": depth, "documents": "the teacher's" if frozen else "its own"
            }  # fmt: skip
            for loss in ("none", *LOSS_NAMES):
                row = student_row(rows, depth, size, loss, frozen)
                line["before" if loss == "none" else LOSS_NAMES[loss]] = found_share(row)
            lines.append(line)
    names = ("before", *LOSS_NAMES.values())
    return table(
        lines,
        {"layers": "", "documents": ""} | dict.fromkeys(names, ".0%"),
        caption="Queries that find their own description among the first ten of a thousand, by "
        f"the loss that was trained on. The teacher: {found_share(teacher_of(rows, size)):.0%}.",
    )


@if_measured
def sizes_table(rows: Sequence[Row]) -> Table:
    """Training and new queries over the embedding size."""
    lines = []
    for row in rows:
        train, new = fmean(row["train_documents"]), fmean(row["documents"])
        name = {"labels": "dual encoder, labels", "softmax KL": "dual encoder, softmax KL"}
        lines.append(
            {
                "model": name.get(row["method"], row["method"]),
                "size": row.get("size", "none"),
                "training": train,
                "new": new,
                "drop": tidy(train - new),
            }
        )
    return table(
        lines,
        {"model": "", "size": "", "training": ".0%", "new": ".0%", "drop": "+.0%"},
        caption="How often the right one of eight candidates comes first, for queries that were "
        "trained on and for new ones, by the size of the embedding.",
    )


# --- equations on numbers that fit on the page ----------------------------------------------------

TEACHER_SCORES = torch.tensor([[5.0, 1.0, 4.5]])
STUDENT_SCORES = torch.tensor([[2.0, 1.0, 0.0]])
"""The right document first."""

LOSSES = {
    "pointwise": retrieval_distillation.pointwise,
    "softmax KL": retrieval_distillation.softmax_kl,
    "MarginMSE": retrieval_distillation.margin_mse,
    "order only (ours)": retrieval_distillation.order_only,
}
"""The losses on scores that the page compares."""


def losses_of(student: Tensor, teacher: Tensor) -> dict[str, float]:
    """Each loss on these scores."""
    return {name: float(loss(student, teacher)) for name, loss in LOSSES.items()}


def losses_table() -> Table:
    """What each loss says of a student as it is, shifted, stretched, and further ahead."""
    s, t = STUDENT_SCORES, TEACHER_SCORES
    ahead = t.clone()
    ahead[:, 0] += 2
    cases = {
        "another order": s,
        "the teacher's scores": t,
        "the teacher's + 3": t + 3,
        "the teacher's × 2": 2 * t,
        "the right one 2 further ahead": ahead,
    }
    lines = [
        {"student": name} | {k: tidy(v) for k, v in losses_of(scores, t).items()}
        for name, scores in cases.items()
    ]
    return table(
        lines,
        {"student": ""} | dict.fromkeys(LOSSES, ".3f"),
        caption="Losses of five students whose teacher gives the right document 5 and two others "
        "1 and 4.5. The first student gives 2, 1 and 0.",
    )


def turned(angle: float) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A teacher's query and documents in the plane, and a student's, turned by an angle.

    Args:
        angle: In degrees.

    Returns:
        The student's query (1, 2) and documents (3, 2), and the teacher's.
    """
    query = torch.tensor([[1.0, 0.2]])
    documents = torch.tensor([[0.95, 0.3], [0.3, 0.9], [-0.6, 0.75]])
    radians = torch.tensor(angle * torch.pi / 180)
    cos, sin = float(radians.cos()), float(radians.sin())
    turn = torch.tensor([[cos, sin], [-sin, cos]])
    return (query @ turn, documents @ turn), (query, documents)


def turned_said(angle: float = 60) -> str:
    """What scores and embeddings say of a student whose plane is turned."""
    (q, d), (a, b) = turned(angle)
    scores, mixed = q @ d.T, q @ b.T
    lines = [
        ("teacher's scores", a @ b.T),
        ("student's scores, its own documents", scores),
        ("student's scores, the teacher's documents", mixed),
    ]
    width = max(len(name) for name, _ in lines)
    said = [f"{name:{width}}: {[tidy(float(v), 2) for v in row[0]]}" for name, row in lines]
    loss = retrieval_distillation.margin_mse(scores, a @ b.T)
    far = retrieval_distillation.embed_distill(q, a)
    return "\n".join([*said, f"MarginMSE {tidy(float(loss)):.3f}, distance of the query {far:.3f}"])


# --- what it costs --------------------------------------------------------------------------------


def costs_table(depths: Sequence[int] = (0, 1, 2, 6)) -> Table:
    """Parameters of a query encoder, and what reading one query takes."""
    whole = students.query_multiplications(students.DEPTH)
    lines = [
        {
            "layers": depth,
            "parameters": students.query_parameters(depth) / 1e6,
            "multiplications": students.query_multiplications(depth) / 1e6,
            "share": students.query_multiplications(depth) / whole,
        }
        for depth in depths
    ]
    return table(
        lines,
        {"layers": "", "parameters": ".1f", "multiplications": ".1f", "share": ".0%"},
        caption="Millions of parameters of a query encoder, and millions of multiplications in "
        f"its layers for a query of {students.QUERY_TOKENS + 2} tokens. The embeddings of tokens "
        "hold most parameters, and are only looked up.",
    )


def index_said(documents: int = 1_000_000) -> str:
    """What an index and a cross-encoder cost for a million documents."""
    sizes = ", ".join(
        f"{students.index_bytes(size, documents) / 1e9:.2f} GB at {size} numbers"
        for size in (384, 128, 32)
    )
    cross = rankers.texts_read(documents, "cross-encoder")
    dual = rankers.texts_read(documents, "dual encoder")
    return (
        f"An index of a million documents in float32: {sizes}.\n"
        f"Texts to read for a query: a cross-encoder {cross:,}, a dual encoder {dual}."
    )


def timed_said(depth: int = 1) -> str:
    """How long one query takes with the teacher and with a student, measured here."""
    ids, real = padded(pairs("test", 100).queries[:1])
    seconds = {}
    with torch.inference_mode():
        for name, model in (("teacher", encoder().model), ("student", first_layers(depth))):
            found = seconds_of(
                lambda model=model: model(input_ids=ids, attention_mask=real.long()), runs=9
            )
            seconds[name] = found.median_seconds
    return (
        f"One query on this machine: {1e3 * seconds['teacher']:.1f} ms with six layers, "
        f"{1e3 * seconds['student']:.1f} ms with {layers_said(depth)}."
    )


def live_said(count: int = 96, steps: int = 40) -> str:
    """Train a student without layers here and now, on a small course, and say what it finds."""
    course = students.course_of(pairs("train", count), pairs("test", 120), 60, 32)
    size = students.WIDTH
    student = students.learn(course, depth=0, size=size, loss="both", steps=steps, batch=32)
    untrained = students.student_of(course, 0, size, True)
    shares = {
        name: found_share(students.judged(ranks))
        for name, ranks in {
            "teacher": students.teacher_ranks(course, size),
            "before": students.ranks_of(untrained, course, size, True),
            "after": students.ranks_of(student, course, size, True),
        }.items()
    }
    return (
        f"{steps} steps on {count} queries, 120 descriptions to search: found among the first ten "
        f"{shares['before']:.0%} before training and {shares['after']:.0%} after it; the teacher "
        f"{shares['teacher']:.0%}."
    )


def same_index() -> str:
    """Whether a student that inherits documents has the teacher's index, number by number."""
    course = students.course_of(pairs("train", 24), pairs("test", 40), 20, 8)
    before = course.teacher(students.WIDTH)
    student = students.learn(course, depth=0, size=students.WIDTH, steps=5, batch=8)
    given = padded(course.test.documents[:8])
    with torch.inference_mode():
        same = torch.equal(before.encode_documents(*given), student.encode_documents(*given))
    return f"the student's index is the teacher's: {'yes' if same else 'no'}"


def scale_said(factors: Sequence[float] = (1, 20)) -> str:
    """What a softmax makes of three cosines, as they are and multiplied."""
    cosines = torch.tensor([0.9, 0.5, 0.2])
    given = ", ".join(f"{float(c):.1f}" for c in cosines)
    return "\n".join(
        f"({given}) × {factor:2g}: {[tidy(float(p), 3) for p in (factor * cosines).softmax(0)]}"
        for factor in factors
    )


def refusals(attempts: Mapping[str, Any]) -> str:
    """What the package says of bad input, a line each."""
    said = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except ValueError as problem:
            said.append(f"- {name}: {problem}")
    return "\n".join(said)
