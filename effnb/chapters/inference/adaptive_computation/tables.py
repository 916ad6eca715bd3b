"""What the chapter on adaptive computation asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch

from effnb.inference.adaptive_computation import cascades, learn_then_test, speculative
from effnb.lab import results
from effnb.lab.changes import Row, if_measured, pick, spoken, tidy
from effnb.lab.tables import Table, table

BASE, EXITS = "mini-5m", "mini-5m-exits"
MEASURES = {"softmax": "softmax", "saturation": "saturation", "classifier": "classifier"}


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"05_inference/7_adaptive_computation/{part}")


def judged(part: str) -> results.StoredResult:
    """One of the tables that the verdicts rest on."""
    return results.read(f"05_inference/7_adaptive_computation_claims/{part}")


# --- exits ----------------------------------------------------------------------------------------


@if_measured
def exits_table(rows: Sequence[Row]) -> Table:
    """The loss of each exit, with and without training of exits."""
    numbers = sorted({row["exit"] for row in rows if "exit" in row})
    lines = []
    for exit_ in numbers:
        line: dict[str, Any] = {"exit": exit_}
        for name in (BASE, EXITS):
            found = pick(rows, model=name, exit=exit_)
            line[f"{name}, nats"] = found[0]["loss"] if found else None
            line[f"{name}, same token"] = found[0]["agrees"] if found else None
        lines.append(line)
    forms = {"exit": ""}
    for name in (BASE, EXITS):
        forms |= {f"{name}, nats": ".2f", f"{name}, same token": ".0%"}
    return table(
        lines,
        forms,
        caption="Held-out text: nats per token when all tokens leave at one exit, and how often "
        "its most probable token is that of the last exit.",
    )


@if_measured
def exits_said(rows: Sequence[Row]) -> str:
    """What training the exits bought and cost, in a sentence."""
    first, last = (
        {name: pick(rows, model=name, exit=e)[0]["loss"] for name in (BASE, EXITS)}
        for e in (3, max(row["exit"] for row in rows if "exit" in row))
    )
    cost = last[EXITS] - last[BASE]
    word = f"costs the last exit {cost:.2f} nats" if cost > 0.005 else "costs the last exit nothing"
    return (
        f"Training the exits lowers the loss of the third exit from {first[BASE]:.2f} to "
        f"{first[EXITS]:.2f} nats, and {word}."
    )


def nearest(rows: Sequence[Row], measure: str, layers: float, model: str = EXITS) -> Row:
    """The setting of a measure that passes most nearly so many layers."""
    found = pick(rows, model=model, measure=measure)
    return min(found, key=lambda row: abs(row["layers"] - layers))


@if_measured
def measures_table(rows: Sequence[Row]) -> Table:
    """Layers and loss of each measure, at settings that pass about as many layers."""
    whole = max(row["exit"] for row in rows if "exit" in row)
    base = pick(rows, model=EXITS, exit=whole)[0]["loss"]
    lines = []
    for measure in (*MEASURES, "oracle"):
        line: dict[str, Any] = {"measure": measure}
        one = (
            pick(rows, model=EXITS, measure="oracle")[0]
            if measure == "oracle"
            else nearest(rows, measure, 2 * whole / 3)
        )
        line |= {
            "threshold": "" if measure == "oracle" else f"{one['threshold']:g}",
            "layers": one["layers"],
            "nats above all layers": tidy(one["loss"] - base),
            "same token": one["agrees"],
        }
        lines.append(line)
    return table(
        lines,
        {
            "measure": "",
            "threshold": "",
            "layers": ".2f",
            "nats above all layers": "+.3f",
            "same token": ".0%",
        },
        caption=f"{EXITS} on held-out text: each measure at the threshold that comes nearest to "
        f"two thirds of the {whole} layers, and the oracle, which knows the last exit's token.",
    )


@if_measured
def measures_said(rows: Sequence[Row]) -> str:
    """Which measure costs least at two thirds of the layers, in a sentence."""
    whole = max(row["exit"] for row in rows if "exit" in row)
    base = pick(rows, model=EXITS, exit=whole)[0]["loss"]
    found = {m: nearest(rows, m, 2 * whole / 3) for m in MEASURES}
    order = sorted(found, key=lambda m: found[m]["loss"])
    parts = [
        f"{m} {found[m]['loss'] - base:+.2f} nats at {found[m]['layers']:.1f} layers" for m in order
    ]
    oracle = pick(rows, model=EXITS, measure="oracle")[0]["layers"]
    return (
        f"{spoken(parts)}. The oracle needs {oracle:.1f} of {whole} layers, so that is the most a "
        "rule could save without changing a token.".replace("-", "−")
    )


@if_measured
def words_said(rows: Sequence[Row]) -> str:
    """What confidence is worth against one exit for all, in words and in nats, in sentences."""
    one = nearest(rows, "softmax", 4.0)
    fixed = [
        pick(rows, model=EXITS, exit=e)[0] for e in (int(one["layers"]), int(one["layers"]) + 1)
    ]
    part = one["layers"] - int(one["layers"])

    def between(key: str) -> float:
        return (1 - part) * fixed[0][key] + part * fixed[1][key]

    same, nats = one["agrees"] - between("agrees"), one["loss"] - between("loss")
    words = "more" if same > 0 else "fewer"
    cost = "lower" if nats < 0 else "higher"
    return (
        f"At {one['layers']:.1f} layers per token, exits by softmax choose the full model's word "
        f"in {one['agrees']:.0%} of the cases, {abs(same):.0%} {words} than a mix of fixed exits "
        f"that costs the same; their loss is {abs(nats):.2f} nats {cost}."
    )


# --- classifiers ----------------------------------------------------------------------------------


@if_measured
def sections_table(rows: Sequence[Row]) -> Table:
    """Accuracy and layers of MiniLM for some settings of each rule."""
    shown = [
        *(("entropy", t) for t in (0.0, 0.2, 0.6, 1.0, 1.8)),
        *(("patience", p) for p in (1, 2, 3)),
        ("oracle", 0),
    ]
    lines = []
    for rule, setting in shown:
        one = pick(rows, rule=rule, setting=setting)[0]
        name = {"entropy": f"entropy < {setting:g}", "patience": f"patience {setting}"}
        lines.append(
            {
                "rule": name.get(rule, rule),
                "layers": one["layers"],
                "accuracy": one["accuracy"],
            }
        )
    return table(
        lines,
        {"rule": "", "layers": ".2f", "accuracy": ".1%"},
        caption="MiniLM with a head after each of its six layers, on package sections: layers per "
        "text and accuracy, means of five draws of training texts.",
    )


# --- the guarantee --------------------------------------------------------------------------------


@if_measured
def calm_said(rows: Sequence[Row]) -> str:
    """What the calibrations chose, and what came of it on other prompts, in sentences."""
    found = pick(rows, setting="calm", method="calibrated")
    chosen = sorted(row["threshold"] for row in found)
    risk = fmean(fmean(row["distance"]) for row in found)
    share = fmean(fmean(row["layers"]) for row in found)
    words = (
        f"the threshold {chosen[0]:g}"
        if chosen[0] == chosen[-1]
        else f"thresholds from {chosen[0]:g} to {chosen[-1]:g}"
    )
    return (
        f"Five calibrations chose {words}. On the other prompts the texts lie {risk:.3f} from "
        f"those of all layers (0.2 was promised) and pass {share:.0%} of the layers."
    )


def resampled(
    rows: Sequence[Row],
    delta: float,
    epsilon: float,
    rule: str,
    repetitions: int = 1000,
    calibrated: int = 60,
) -> float:
    """How often a rule breaks its promise when prompts are drawn again and again.

    The stored prompts are taken for the whole world: their mean loss is the true risk, and each
    calibration draws from them with replacement.
    """
    texts = sorted(pick(rows, setting="texts"), key=lambda row: -row["threshold"])
    grid = [row["threshold"] for row in texts]
    losses = torch.tensor([row["distance"] for row in texts], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(repetitions):
        pick_ = torch.randint(losses.shape[1], (calibrated,), generator=generator)
        found = learn_then_test.calibrate(grid, losses[:, pick_].tolist(), delta, epsilon, rule)
        if found.threshold is not None:
            broken += float(losses[grid.index(found.threshold)].mean()) > delta
    return broken / repetitions


@if_measured
def resampled_said(rows: Sequence[Row], delta: float = 0.2, epsilon: float = 0.05) -> str:
    """How often two rules break their promise on prompts drawn again and again, in a sentence."""
    naive, walk = (
        resampled(rows, delta, epsilon, rule, repetitions=1000)
        for rule in ("naive", "fixed sequence")
    )
    return (
        f"With these prompts as the whole world, and 60 of them drawn 1,000 times, the walk breaks "
        f"its promise (δ = {delta:g}, ε = {epsilon:g}) in {walk:.1%} of the calibrations and the "
        f"naive rule in {naive:.1%}."
    )


# --- time -----------------------------------------------------------------------------------------


@if_measured
def speed_table(rows: Sequence[Row]) -> Table:
    """How much faster texts are written that leave early."""
    lines = []
    for row in rows:
        if row["measure"] == "parts":
            continue
        lines.append(
            {
                "measure": row["measure"],
                "threshold": f"{row['threshold']:g}",
                "layers": row["layers"],
                "times faster": median(row["times_faster"]),
                "same tokens": row["same_tokens"],
            }
        )
    return table(
        lines,
        {
            "measure": "",
            "threshold": "",
            "layers": ".2f",
            "times faster": ".2f",
            "same tokens": ".0%",
        },
        caption=f"{EXITS}, one text at a time: layers per token, and the time of all layers over "
        "the time with exits (median of five turns).",
    )


@if_measured
def parts_said(rows: Sequence[Row]) -> str:
    """What a layer, the head and a copied state cost, in a sentence."""
    one = pick(rows, measure="parts")[0]
    return (
        f"For one token the output head takes {one['head'] / one['layer']:.2f} times as long as a "
        f"layer, and copying a state for one layer {one['copy'] / one['layer']:.2f} times."
    )


@if_measured
def speed_said(rows: Sequence[Row]) -> str:
    """Which measure gains time where it gains layers, in sentences."""
    said = []
    for measure in MEASURES:
        found = pick(rows, measure=measure)
        best = max(found, key=lambda row: median(row["times_faster"]))
        times = median(best["times_faster"])
        verb = "fastest" if times > 1 else "never faster, at best"
        said.append(
            f"{measure} is {verb} at {times:.2f} times ({best['layers']:.1f} layers, "
            f"{best['same_tokens']:.0%} of the tokens those of all layers)"
        )
    return f"{spoken(said)}."


# --- speculation ----------------------------------------------------------------------------------


@if_measured
def speculative_table(rows: Sequence[Row]) -> Table:
    """Acceptance, tokens for each pass, and predicted against measured speed."""
    lines = []
    for row in rows:
        if row["gamma"] != 4:
            continue
        lines.append(
            {
                "target": row["target"],
                "draft": row["draft"],
                "α": row["alpha"],
                "c": row["cost"],
                "tokens per pass": row["tokens_per_pass"],
                "predicted": speculative.speed_up(row["alpha"], 4, row["cost"]),
                "measured": median(row["times_faster"]),
            }
        )
    return table(
        lines,
        {
            "target": "",
            "draft": "",
            "α": ".2f",
            "c": ".2f",
            "tokens per pass": ".2f",
            "predicted": ".2f",
            "measured": ".2f",
        },
        caption="Drafts of four tokens: acceptance rate α, the draft's time for a token over the "
        "target's (c), and how many times faster than the target alone. “First 2” is the target's "
        "own first two layers.",
    )


@if_measured
def speculative_said(rows: Sequence[Row]) -> str:
    """Which pairs are faster, and how far the prediction is off, in sentences."""
    pairs = [row for row in rows if not row["draft"].startswith("first")]
    faster = [row for row in pairs if median(row["times_faster"]) > 1]
    off = fmean(
        speculative.speed_up(row["alpha"], row["gamma"], row["cost"]) / median(row["times_faster"])
        for row in rows
    )
    return (
        f"Of {len(pairs)} settings with a draft model {len(faster)} are faster than the target "
        f"alone. On average the formula promises {off:.2f} times what was measured."
    )


# --- deferral -------------------------------------------------------------------------------------


@if_measured
def deferral_table(rows: Sequence[Row]) -> Table:
    """Loss of the pair and accuracy of the base over the cost, by method."""
    lines = []
    for cost in sorted({row["cost"] for row in rows}):
        line: dict[str, Any] = {"cost": f"{cost:g}"}
        for method in ("CSS", "post hoc", "confidence"):
            found = pick(rows, method=method, cost=cost)
            line[f"{method}: loss"] = fmean(row["mean_loss"] for row in found)
        for method in ("CSS", "post hoc"):
            found = pick(rows, method=method, cost=cost)
            line[f"{method}: base"] = fmean(row["accuracy"] for row in found)
            line[f"{method}: deferred"] = fmean(row["deferred"] for row in found)
        lines.append(line)
    return table(
        lines,
        {name: "" if name == "cost" else ".2f" if "loss" in name else ".0%" for name in lines[0]},
        caption="Package sections, a base model and a specialist: loss of the pair (errors and "
        "costs of deferral), accuracy of the base model alone, and the part deferred, by the cost "
        "of deferral. Means of five draws.",
    )


@if_measured
def deferral_said(rows: Sequence[Row]) -> str:
    """What the joint loss does to the base model as the cost rises, in sentences."""
    costs = sorted({row["cost"] for row in rows})

    def mean(method: str, cost: float, key: str) -> float:
        return fmean(row[key] for row in pick(rows, method=method, cost=cost))

    plain = mean("plain", costs[0], "accuracy")
    first, last = (mean("CSS", cost, "accuracy") for cost in (costs[0], costs[-1]))

    def where(other: str) -> str:
        better = [
            c for c in costs if mean("post hoc", c, "mean_loss") < mean(other, c, "mean_loss")
        ]
        return f"at {len(better)} of {len(costs)} costs" if better else "at no cost"

    return (
        f"Trained alone the base model is right on {plain:.1%}; trained jointly on {first:.1%} "
        f"where deferral is free and on {last:.1%} where it costs {costs[-1]:g}. The rule learned "
        f"afterwards has the lower loss {where('CSS')}; against confidence alone, "
        f"{where('confidence')}."
    )


# --- cascades -------------------------------------------------------------------------------------


def curve_of(rows: Sequence[Row], small: str, large: str) -> list[cascades.Point]:
    """Errors and cost of a cascade of two models on the questions; cost in parameters read."""
    a, b = pick(rows, model=small)[0], pick(rows, model=large)[0]
    wrong = [[1.0 - x for x in row["right"]] for row in (a, b)]
    costs = (a["parameters"] / b["parameters"], 1.0)
    return cascades.deferral_curve(a["confidence"], *wrong, costs)


@if_measured
def cascade_table(rows: Sequence[Row]) -> Table:
    """For neighbouring models: accuracy of each, and of the cascade that defers half."""
    lines = []
    for small, large in (
        ("mini-300k", "mini-1m"),
        ("mini-1m", "mini-5m"),
        ("mini-300k", "mini-5m"),
        ("mini-5m", "smollm2-135m"),
    ):
        if not pick(rows, model=small) or not pick(rows, model=large):
            continue
        curve = curve_of(rows, small, large)
        half = curve[len(curve) // 2]
        best = min(curve, key=lambda point: point.loss)
        lines.append(
            {
                "cascade": f"{small} → {large}",
                "small": 1 - curve[0].loss,
                "large": 1 - curve[-1].loss,
                "half deferred": 1 - half.loss,
                "at random": 1 - (curve[0].loss + curve[-1].loss) / 2,
                "best": 1 - best.loss,
                "deferred at best": best.deferred,
            }
        )
    return table(
        lines,
        {name: "" if name == "cascade" else ".0%" for name in lines[0]},
        caption="Ranked-choice questions: accuracy of each model, of a cascade that defers the "
        "half the small model is least sure of, of one that defers half at random, and the best "
        "point of the curve, which was found on the same questions and flatters.",
    )


@if_measured
def cascade_said(rows: Sequence[Row], threshold: float = 0.95) -> str:
    """What a cascade of all four models does at one threshold, in a sentence."""
    order = sorted(rows, key=lambda row: row["parameters"])
    whole = order[-1]["parameters"]
    found = cascades.cascade(
        torch.tensor([row["confidence"] for row in order]),
        1.0 - torch.tensor([row["right"] for row in order], dtype=torch.float32),
        [row["parameters"] / whole for row in order],
        [threshold] * (len(order) - 1),
    )
    parts = [
        f"{found.model.count(i) / len(found.model):.0%} by {row['model']}"
        for i, row in enumerate(order)
    ]
    return (
        f"All of them in a row, each asked until one is at least {threshold:.0%} sure: "
        f"{spoken(parts)}; {1 - found.loss:.0%} right, against "
        f"{fmean(order[-1]['right']):.0%} by {order[-1]['model']} alone, at {found.cost:.1%} of "
        "its cost."
    )


@if_measured
def sequences_said(rows: Sequence[Row]) -> str:
    """Which summary of a text's confidence defers best, from the smallest to the largest model."""
    small, large = pick(rows, model="mini-300k")[0], pick(rows, model="mini-5m")[0]
    areas = {
        kind: cascades.benefit(cascades.deferral_curve(values, small["losses"], large["losses"]))
        for kind, values in small["confidences"].items()
    }
    best = max(areas, key=areas.__getitem__)
    names = {"0.1": "the 10 % quantile", "0.25": "the 25 % quantile", "0.5": "the median"}
    parts = [f"{names.get(kind, f'the {kind}')} {area:+.3f}" for kind, area in areas.items()]
    return (
        f"Area above random deferral, mini-300k to mini-5m, in nats: {spoken(parts)}; "
        f"{names.get(best, f'the {best}')} does best."
    ).replace("-0", "−0")


# --- a real model ---------------------------------------------------------------------------------


@if_measured
def smollm2_table(rows: Sequence[Row]) -> Table:
    """SmolLM2's exits, every fifth layer."""
    one = rows[0]
    count = one["layers"]
    return table(
        [
            {"exit": i, "nats": one["losses"][i - 1], "same token": one["agrees"][i - 1]}
            for i in range(5, count + 1, 5)
        ],
        {"exit": "", "nats": ".2f", "same token": ".0%"},
        caption=f"SmolLM2-135M on held-out text: every fifth of its {count} exits, none of which "
        "was trained.",
    )


@if_measured
def smollm2_said(rows: Sequence[Row]) -> str:
    """How deep SmolLM2's tokens must go, and what asking costs, in sentences."""
    one = rows[0]
    strict = max(
        (c for c in one["curve"] if c["threshold"] < 1), key=lambda point: point["threshold"]
    )
    whole = next(c for c in one["curve"] if c["threshold"] == 1)
    return (
        f"The oracle needs {one['oracle']:.1f} of {one['layers']} layers. At a threshold of "
        f"{strict['threshold']:g} the tokens pass {strict['layers']:.1f} layers at "
        f"{strict['loss'] - whole['loss']:+.2f} nats. Its output head holds "
        f"{one['head_numbers'] / one['layer_numbers']:.1f} times the numbers of a layer."
    ).replace("at -", "at −")


def by_name(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The different values of a column, in the order in which they appear."""
    return list(dict.fromkeys(row[key] for row in rows))
