"""What the chapter on distillation asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from effnb.chapters.inference.distillation import experiments, students
from effnb.chapters.inference.distillation import languages as own
from effnb.core.training import causal_lm_loss
from effnb.inference import distillation
from effnb.lab import load, results
from effnb.lab.changes import Change, Row, if_measured, pick, tidy
from effnb.lab.sweeps import held_out_novel
from effnb.lab.tables import NOT_MEASURED, Table, table
from effnb.lab.texts import training_batches, windows_of

CHAPTER = "05_inference/5_distillation"


def stored(part: str) -> results.StoredResult | results.NotMeasured:
    """One stored table of this chapter."""
    return results.read(f"{CHAPTER}/{part}") or results.NotMeasured(f"{CHAPTER}/{part}")


# --- the missing language -------------------------------------------------------------------------


def of_missing(rows: Sequence[Row], temperature: float, key: str = "missing") -> dict[str, float]:
    """By language, the mean over seeds of what students got right at one temperature."""
    found: dict[str, list[float]] = {}
    for row in pick(rows, temperature=temperature):
        found.setdefault(row["language"], []).append(row[key])
    return {language: fmean(values) for language, values in found.items()}


def temperatures(rows: Sequence[Row]) -> list[float]:
    """The temperatures that were measured; 0 is training on labels alone."""
    return sorted({row["temperature"] for row in rows})


@if_measured
def missing_said(rows: Sequence[Row]) -> str:
    """What the students get right of a language that they never saw, in sentences."""
    hard, first, last = (
        of_missing(rows, t) for t in (0, temperatures(rows)[1], temperatures(rows)[-1])
    )
    teacher = of_missing(rows, 0, "teacher")
    seeds = len({row["seed"] for row in rows})
    return (
        f"Texts of the missing language that students get right, mean of {len(hard)} languages and "
        f"{seeds} seeds: {fmean(hard.values()):.0%} with labels alone, {fmean(first.values()):.0%} "
        f"with the teacher's answers as they are, {fmean(last.values()):.0%} at temperature "
        f"{temperatures(rows)[-1]}. The teacher: {fmean(teacher.values()):.0%}."
    )


# --- equations on numbers that fit on the page ----------------------------------------------------

TEACHER_SCORES, STUDENT_SCORES = (
    torch.tensor([2.0, -1.5, -0.5], dtype=torch.double),
    torch.tensor([1.0, -0.5, -0.5], dtype=torch.double),
)


def softened_table(temperatures: Sequence[float] = (1, 2, 4, 16)) -> Table:
    """What a temperature does to the teacher's answer, to the loss and to its gradient."""
    v, z = TEACHER_SCORES, STUDENT_SCORES
    lines = []
    for t in temperatures:
        answer, pull = distillation.soften(v, t), -distillation.soft_gradient(z, v, t)
        loss = distillation.hinton_loss(z[None], v[None], temperature=t, weight=1.0)
        lines.append(
            {"temperature": f"{t:g}", "loss": float(loss)}
            | {f"p{i + 1}": float(p) for i, p in enumerate(answer)}
            | {f"pull {i + 1}": float(p) for i, p in enumerate(pull)}
        )
    limit = -distillation.matching_gradient(z, v)
    lines.append(
        {"temperature": "∞", "loss": NOT_MEASURED}
        | {f"p{i + 1}": 1 / 3 for i in range(3)}
        | {f"pull {i + 1}": float(p) for i, p in enumerate(limit)}
    )
    lines[-1]["loss"] = float(((z - z.mean()) - (v - v.mean())).square().sum() / 6)
    return table(
        lines,
        {"temperature": ""} | {f"p{i}": ".3f" for i in (1, 2, 3)} | {"loss": ".4f"}
        | {f"pull {i}": "+.3f" for i in (1, 2, 3)},
        caption="The teacher's scores are 2, −1.5 and −0.5, the student's 1, −0.5 and −0.5. The "
        "teacher's softened answer, the loss, and how the gradient pulls each of the student's "
        "scores.",
    )  # fmt: skip


# --- temperature, weight and size -----------------------------------------------------------------

SIZES = ("mini-300k", "mini-1m")


def against_text(rows: Sequence[Row], model: str, **wanted: Any) -> Change:
    """A student's loss above that of text alone in as many steps, window by window."""
    alone = pick(rows, model=model, method="text alone")[0]["windows"]
    return Change.between(pick(rows, model=model, **wanted)[0]["windows"], alone)


@if_measured
def grid_table(rows: Sequence[Row]) -> Table:
    """The best of the distilled students of each size, beside text alone for as long and longer."""
    lines = []
    for model in SIZES:
        ways = {
            "before": {"method": "before"},
            "text alone": {"method": "text alone"},
            "text alone for longer": {"method": "text alone for longer"},
        } | {
            f"distilled, temperature {row['temperature']}, weight {row['weight']}": {
                "method": "distilled",
                "temperature": row["temperature"],
                "weight": row["weight"],
            }
            for row in pick(rows, model=model, method="distilled")
        }
        for name, wanted in ways.items():
            found = pick(rows, model=model, **wanted)
            if found and pick(rows, model=model, method="text alone"):
                change = against_text(rows, model, **wanted)
                lines.append(
                    {"student": model, "trained": name, "loss": tidy(found[0]["loss"]),
                     "against text alone": change.number()}
                )  # fmt: skip
    return table(
        lines,
        {"student": "", "trained": "", "loss": ".3f", "against text alone": ""},
        caption="Nats per token on held-out text; one seed. The interval is over windows.",
    )


@if_measured
def grid_said(rows: Sequence[Row]) -> str:
    """What the best distilled student of each size gains on text alone, and on text for longer."""
    said = []
    for model in SIZES:
        taught = pick(rows, model=model, method="distilled")
        longer = pick(rows, model=model, method="text alone for longer")
        if not taught or not longer:
            continue
        best = min(taught, key=lambda row: row["loss"])
        change = Change.between(best["windows"], longer[0]["windows"])
        word = change.word()
        end = "from" if word == "indistinguishable" else "than"
        said.append(
            f"{model}, at its best (temperature {best['temperature']}, weight {best['weight']}), "
            f"is {word} {end} text alone at equal compute ({change.number()} nats)."
        )
    return " ".join(said)


# --- noise and complexity -------------------------------------------------------------------------


def accuracy_over_noise(rows: Sequence[Row], method: str, budget: int) -> dict[float, float]:
    """Mean accuracy over seeds, by how often the teacher errs on purpose."""
    found: dict[float, list[float]] = {}
    for row in pick(rows, method=method, budget=budget):
        found.setdefault(row["noise"], []).append(row["accuracy"])
    return {p: fmean(values) for p, values in sorted(found.items())}


@if_measured
def noise_said(rows: Sequence[Row], budget: int = 1024) -> str:
    """Where weights and forward correction help, and where true labels would have been better."""
    curves = {
        name: accuracy_over_noise(rows, name, budget)
        for name in ("plain", "weighted", "forward correction", "labels for longer")
    }
    said = []
    for name in ("weighted", "forward correction"):
        gains = {p: curves[name][p] - curves["plain"][p] for p in curves["plain"]}
        best = max(gains, key=lambda p: gains[p])
        worst = min(gains, key=lambda p: gains[p])
        label = "Weighting" if name == "weighted" else "Forward correction"
        said.append(
            f"{label} changes accuracy by between {100 * gains[worst]:+.1f} points (noise "
            f"{worst:.0%}) and {100 * gains[best]:+.1f} points (noise {best:.0%})."
        )
    better = [p for p, value in curves["plain"].items() if curves["labels for longer"][p] > value]
    if better:
        said.append(
            f"From a noise of {min(better):.0%} on, a few hundred true labels alone, trained for "
            "longer, beat the teacher's labels as they are."
        )
    else:
        said.append("True labels alone never beat the teacher's labels here.")
    return " ".join(said).replace(" -", " −")


@if_measured
def complexity_said(rows: Sequence[Row]) -> str:
    """How complex the last state's answers are to the narrowest and to the widest student."""
    widths = sorted({row["width"] for row in rows})
    shares = [
        fmean(row["states"][-1]["share_of_shuffled"] for row in pick(rows, width=w, temperature=1))
        for w in (widths[0], widths[-1])
    ]
    return (
        f"Complexity of the trained teacher's answers, as a part of that of the same answers "
        f"shuffled: {shares[0]:.0%} to a student with {widths[0]} hidden units, {shares[1]:.0%} to "
        f"one with {widths[-1]}."
    )


# --- costs ----------------------------------------------------------------------------------------


def operations_table(teacher: Any, student: Any) -> Table:
    """Steps on text alone that cost what one hundred steps of each method cost, counted."""
    torch.manual_seed(0)
    ids = torch.randint(2, 4000, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "prompts": ids[:, :16]}
    ways = {
        "text alone": None,
        "Hinton": distillation.hinton(teacher),
        "MiniLM's relations": distillation.minilm(teacher, heads=students.RELATION_HEADS),
        "GKD, all on-policy": distillation.gkd(teacher, on_policy=1.0, max_new_tokens=16),
        "MiniLLM": distillation.minillm(teacher, max_new_tokens=16, text_weight=0.0),
    }
    lines = []
    for name, loss in ways.items():
        given = batch if name in ("GKD, all on-policy", "MiniLLM") else ids
        from_text = (
            100
            if loss is None
            else distillation.steps_at_equal_compute(
                student, given, 100, loss=loss, instead=_text_loss
            )
        )
        lines.append({"method": name, "steps on text alone": from_text})
    return table(
        lines,
        {"method": "", "steps on text alone": ",d"},
        caption="What 100 steps of mini-300k under mini-5m cost, in steps on text alone; "
        "operations counted on one batch. A cached teacher costs once per text, not once per step.",
    )


def _text_loss(model: Any, batch: Any) -> torch.Tensor:
    """The loss on a batch's text, prompts left out."""
    ids = batch["input_ids"] if isinstance(batch, dict) else batch
    return causal_lm_loss(model, ids)


def sizes_said() -> str:
    """How many numbers teacher and student of the languages hold."""
    teacher, student = own.teacher(), own.net(own.STUDENT, 0)
    return (
        f"The teacher holds {own.parameters(teacher):,} numbers, the student "
        f"{own.parameters(student):,}."
    )


def live_said(teacher: Any, student: Any, steps: int) -> str:
    """Train for a few steps here, and say how far the student's answers were and are."""
    tokenizer = load("mini-5m", device="cpu").tokenizer
    pool = students.Pool(teacher, training_batches(tokenizer, 7, steps, (4, 64)))
    new = list(windows_of(tokenizer, held_out_novel(), 8, 64))
    trained = students.learn(student, pool, steps, 0, temperature=2.0, weight=1.0)
    before, after = (fmean(students.divergences(m, teacher, new)) for m in (student, trained))
    return f"KL of the teacher from the student: {before:.3f} nats before, {after:.3f} after."


def slope_said(seed: int = 0) -> str:
    """What the fitted slope of a student's confidence says of this student, in a sentence."""
    slope = experiments.confidences(seed).slope
    if abs(slope - 1) < 0.05:
        return (
            f"The slope is {slope:.1f}: on new texts this student is about as sure as its teacher."
        )
    word = (
        "exaggerates: where its teacher is sure it is surer"
        if slope > 1
        else ("is more cautious than its teacher where that is sure")
    )
    return f"The slope is {slope:.1f}: on new texts this student {word}."
