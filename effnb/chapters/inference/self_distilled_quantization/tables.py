"""What the chapter asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import nn

from effnb.chapters.inference.self_distilled_quantization import languages, methods
from effnb.inference import self_distilled_quantization as sdq
from effnb.inference.quantization import fake_quantize
from effnb.lab import results
from effnb.lab.changes import Row, if_measured, pick, spoken, tidy
from effnb.lab.tables import Table, table
from effnb.lab.tasks import TONGUES

CHAPTER = "05_inference/4_self_distilled_quantization"
CLAIMS = f"{CHAPTER}_claims"
ROLES = (
    "query",
    "key",
    "value",
    "self-attention",
    "attention output",
    "norm after attention",
    "feed-forward, first",
    "feed-forward, second",
    "norm after feed-forward",
)
"""The modules of a block in the order in which they compute."""


def stored(part: str) -> results.StoredResult | results.NotMeasured:
    """One stored table of this chapter; those of its claims are `claims/…`."""
    chapter, name = (CLAIMS, part[7:]) if part.startswith("claims/") else (CHAPTER, part)
    return results.read(f"{chapter}/{name}") or results.NotMeasured(f"{chapter}/{name}")


# --- errors by module -----------------------------------------------------------------------------


def errors_at(rows: Sequence[Row], model: str, bits: int) -> list[dict[str, Any]]:
    """The errors of every module of a model at some bits; none where they were not measured."""
    found = pick(rows, model=model, bits=bits)
    return found[0]["layers"] if found else []


def role_means(layers: Sequence[Mapping[str, Any]], kind: str = "accumulated") -> dict[str, float]:
    """The mean error of each role over the blocks, in the order of computing."""
    return {
        role: fmean(row[kind] for row in layers if row["role"] == role)
        for role in ROLES
        if any(row["role"] == role for row in layers)
    }


@if_measured
def errors_said(rows: Sequence[Row], model: str = "minilm-l6", bits: int = 4) -> str:
    """Which module errs most, and how much of its error came with its inputs."""
    layers = errors_at(rows, model, bits)
    if not layers:
        return str(methods.NotTrained(model)) if model == methods.MODEL else "Not measured here."
    whole, alone = role_means(layers), role_means(layers, "alone")
    worst, best = max(whole, key=whole.get), min(whole, key=whole.get)
    rank = sorted(whole, key=whole.get, reverse=True).index("self-attention") + 1
    blocks = sorted((r for r in layers if r["role"] == "block"), key=lambda r: r["layer"])
    places = ("largest", "second largest", "third largest", "fourth largest")
    place = places[rank - 1] if rank <= len(places) else f"number {rank}"
    return (
        f"{model}, weights in {bits} bits: the largest error is that of the {worst}, "
        f"{whole[worst]:.0%}; the smallest that of the {best}, {whole[best]:.0%}. What the heads "
        f"of self-attention put out is the {place} at {whole['self-attention']:.0%}, and "
        f"{alone['self-attention']:.0%} where only their own block is rounded. The first block's "
        f"output is wrong by {blocks[0]['accumulated']:.0%}, the last one's by "
        f"{blocks[-1]['accumulated']:.0%}."
    )


@if_measured
def errors_table(rows: Sequence[Row], bits: int = 4) -> Table:
    """The errors of both models by role, accumulated and alone."""
    models = [m for m in ("minilm-l6", methods.MODEL) if errors_at(rows, m, bits)]
    lines = []
    for role in ROLES:
        line: dict[str, Any] = {"module": role}
        for model in models:
            layers = errors_at(rows, model, bits)
            for kind in ("accumulated", "alone"):
                line[f"{model}, {kind}"] = role_means(layers, kind).get(role)
        lines.append(line)
    return table(
        lines,
        columns={"module": "", **{f"{m}, {k}": ".1%" for m in models
                                  for k in ("accumulated", "alone")}},
        caption=f"Relative error of each module's output with weights in {bits} bits, mean over "
        "blocks and texts. Alone: only the module's own block is rounded.",
    )  # fmt: skip


# --- languages ------------------------------------------------------------------------------------


def mean_languages(rows: Sequence[Row]) -> dict[str, float]:
    """The accuracy in each language, averaged over rows."""
    return {
        language: fmean(row["languages"][language] for row in rows)
        for language in languages.LANGUAGES
    }


def seen_unseen(quality: Mapping[str, float]) -> tuple[float, float]:
    """Means over the languages that were fine-tuned on, and over the others."""
    return (
        fmean(quality[x] for x in languages.SEEN),
        fmean(quality[x] for x in languages.UNSEEN),
    )


@if_measured
def encoder_said(given: Mapping[str, Any]) -> str:
    """What the encoder reaches in languages that it was fine-tuned on and in others."""
    quality = mean_languages(given["table"])
    seen, unseen = seen_unseen(quality)
    chance = fmean(given["majority"][x] for x in languages.UNSEEN)
    above = [x for x in languages.UNSEEN if quality[x] > given["majority"][x] + 0.1]
    return (
        f"mini-multi, fine-tuned on {spoken([TONGUES[x] for x in languages.SEEN])}: "
        f"{seen:.0%} of the held-out topics right in these, {unseen:.0%} in nine other languages, "
        f"where always naming the most frequent topic would reach {chance:.0%}. More than ten "
        f"points above that: {len(above)} of the nine."
    )


@if_measured
def encoder_table(given: Mapping[str, Any]) -> Table:
    """Accuracy by language beside the most frequent topic."""
    quality = mean_languages(given["table"])
    return table(
        [
            {
                "language": TONGUES[x],
                "fine-tuned on": "yes" if x in languages.SEEN else "no",
                "texts": given["texts"][x],
                "most frequent": given["majority"][x],
                "accuracy": quality[x],
            }
            for x in languages.LANGUAGES
        ],
        columns={
            "language": "", "fine-tuned on": "", "texts": "", "most frequent": ".0%",
            "accuracy": ".0%",
        },
        caption="Topics of held-out descriptions that the classifier finds, mean over seeds, and "
        "what naming the most frequent topic would reach.",
    )  # fmt: skip


# --- students -------------------------------------------------------------------------------------

METHODS = ("PTQ", "QAT", "QAT + output", "SDQ")


def students_at(rows: Sequence[Row], method: str, bits: int | None) -> list[Row]:
    """The stored runs of a method at some bits."""
    wanted: dict[str, Any] = {"setting": "students", "method": method}
    return pick(rows, **wanted, **({} if bits is None else {"bits": bits}))


@if_measured
def students_table(rows: Sequence[Row]) -> Table:
    """Every method at every number of bits: seen, unseen, spread."""
    lines = []
    points = [("teacher", None), *((m, b) for b in methods.BITS for m in METHODS)]
    for method, bits in points:
        found = students_at(rows, method, bits)
        if not found:
            continue
        quality = mean_languages(found)
        seen, unseen = seen_unseen(quality)
        lines.append({
            "bits": 32 if bits is None else bits,
            "method": method,
            "seen": seen,
            "unseen": unseen,
            "spread": sdq.spread(quality),
            "seeds": len(found),
        })  # fmt: skip
    return table(
        lines,
        columns={
            "bits": "", "method": "", "seen": ".1%", "unseen": ".1%", "spread": ".1%", "seeds": "",
        },
        caption="Accuracy in three languages of the fine-tuning and in nine others, and the spread "
        "between the best and the worst language.",
    )  # fmt: skip


@if_measured
def students_said(rows: Sequence[Row], bits: int = 4) -> str:
    """Which method keeps most at few bits, in a sentence."""
    quality = {
        method: mean_languages(found)
        for method in METHODS
        if (found := students_at(rows, method, bits))
    }
    teacher = students_at(rows, "teacher", None)
    if not quality or not teacher:
        return "Not all of these methods have been measured."
    means = {method: seen_unseen(q) for method, q in quality.items()}
    best = max(means, key=lambda m: means[m][1])
    exact = seen_unseen(mean_languages(teacher))
    return (
        f"At {bits} bits {best} does best on unseen languages: {means[best][1]:.1%}, where the "
        f"32-bit teacher reaches {exact[1]:.1%}. "
        + "; ".join(f"{m}: {s:.1%} seen, {u:.1%} unseen" for m, (s, u) in means.items())
        + "."
    )


@if_measured
def variants_table(given: Mapping[str, Any]) -> Table:
    """All variants of the loss and of the noise."""
    names = list(dict.fromkeys(row["variant"] for row in given["table"]))
    lines = []
    for name in names:
        found = pick(given["table"], variant=name)
        seen, unseen = seen_unseen(mean_languages(found))
        bits = fmean(row.get("bits", given["bits"]) for row in found)
        lines.append({"variant": name, "bits": bits, "seen": seen, "unseen": unseen,
                      "seeds": len(found)})  # fmt: skip
    return table(
        lines,
        columns={"variant": "", "bits": ".2f", "seen": ".1%", "unseen": ".1%", "seeds": ""},
        caption="Accuracy after as many steps each. Bits count the scales or the codebook only for "
        "codewords.",
    )


# --- cost -----------------------------------------------------------------------------------------


@if_measured
def cost_said(rows: Sequence[Row]) -> str:
    """Operations and seconds of a step, against labels alone."""
    flops = {row["method"]: row["flops"] for row in rows}
    seconds = {row["method"]: min(row["seconds"]) for row in rows}
    return " ".join(
        f"{method}: {flops[method] / flops['QAT']:.2f} times the operations and "
        f"{seconds[method] / seconds['QAT']:.1f} times the seconds of QAT on labels."
        for method in flops
        if method != "QAT"
    )


# --- toys -----------------------------------------------------------------------------------------

WEIGHT = torch.tensor([[0.9, -0.35, 0.12, 0.48], [-0.7, 0.2, 0.31, -0.05]])
"""The matrix of the chapter's example."""


def noise_rows(seed: int = 0) -> Table:
    """A matrix of two rows in 3 bits: rounded whole, and with noise in blocks of two."""
    torch.manual_seed(seed)
    mask = sdq.noise_mask(2, 4, 2, 0.5)
    rounded = fake_quantize(WEIGHT, 3, symmetric=True)
    noisy = sdq.quant_noise(WEIGHT, rounded, mask)

    def said(row: torch.Tensor) -> str:
        return "  ".join(f"{tidy(value, 2):+.2f}" for value in row.tolist())

    return table(
        [
            {
                "row": str(i + 1),
                "weights": said(WEIGHT[i]),
                "all rounded": said(rounded[i]),
                "drawn": " ".join("yes" if m else "no" for m in mask[i, ::2].tolist()),
                "with noise": said(noisy[i]),
            }
            for i in range(2)
        ],
        columns={"row": "", "weights": "", "all rounded": "", "drawn": "", "with noise": ""},
        caption="Two rows of weights in 3 bits, and the same with noise: blocks of two weights, "
        "each drawn with probability one half.",
    )


def exact_gradients_said(noise: float = 0.5, blocks: int = 4) -> str:
    """How probable it is that nothing, or everything, is rounded."""
    return (
        f"With {blocks} blocks and p = {noise}, no block is rounded in "
        f"{(1 - noise) ** blocks:.1%} of the steps, and all are in {noise**blocks:.1%}."
    )


def loss_parts(teacher: nn.Module, student: nn.Module, batch: Mapping[str, Any]) -> Table:
    """The parts of the loss for one batch, before any training."""
    with torch.no_grad():
        ours, theirs = sdq.read(student, batch), sdq.read(teacher, batch)
        terms = {
            f"attention, {name}": sdq.sdq_terms(ours, theirs, attention=name)["attention"]
            for name in ("mse", "kl")
        }
        found = sdq.sdq_terms(ours, theirs, batch.get("labels"))
    terms |= {name: found[name] for name in ("hidden", "output", "labels") if name in found}
    return table(
        [{"part": name, "value": float(value)} for name, value in terms.items()],
        columns={"part": "", "value": ".5f"},
        caption="The parts of the loss for sixteen texts, none weighted.",
    )
