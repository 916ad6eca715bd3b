"""Stored rows that make the parts of a claim come out as a test wants them to."""

import json

import numpy as np

from effnb.lab.claims import ledger
from effnb.lab.results import Provenance, StoredResult

DOCUMENTS, SEEDS = 24, 5


def key(model, about):
    return json.dumps([model, about], sort_keys=True)


def wanted_change(part, outcome):
    """How the method's level lies beside the baseline's (a factor for ratios)."""
    low, high = (part.bound + sign * part.margin for sign in (-1, 1))
    if part.ratio:
        low, high = part.bound / (1 + part.margin), part.bound * (1 + part.margin)
    far = 0.5 * abs(part.bound or 1)
    if part.role in ("construction", "context"):
        outcome = "shown"
    if part.expect == "higher":
        return {"shown": high + far, "contradicted": low - far / 2, "undecided": high}[outcome]
    if part.expect == "lower":
        return {"shown": low - far / 2, "contradicted": high + far, "undecided": low}[outcome]
    return {"shown": part.bound, "contradicted": high + far, "undecided": high}[outcome]


def planted_rows(claim, outcomes=None, otherwise="shown"):
    """Rows for every part of a claim: `outcomes` by the name of a part, `otherwise` for the rest.

    Parts that share rows are planted in the order of the ledger: the first decides.
    """
    rng = np.random.default_rng(0)
    levels, rows = {}, {}
    base = rng.normal(0, 0.3, DOCUMENTS)
    for part in sorted(ledger()[claim].parts.values(), key=lambda one: not one.tested):
        if part.groups:
            if part.baseline is None:  # a loss for every group is stored, and nothing beside it
                outcome = (outcomes or {}).get(part.name, otherwise)
                rows |= _differing(part, outcome, rng)
            continue
        ratio = part.ratio
        wanted = wanted_change(part, (outcomes or {}).get(part.name, otherwise))
        start = 4.0 if part.baseline is not None else (1.0 if ratio else 0.0)
        if part.baseline is not None:
            known = levels.get((key(part.model, part.method), part.value))
            if known is not None:  # a method beside its second baseline: that one is free
                start = known / wanted if ratio else known - wanted
            start = levels.setdefault((key(part.model, part.baseline), part.value), start)
        level = start * wanted if ratio else start + wanted
        levels.setdefault((key(part.model, part.method), part.value), level)
        for about in filter(None, (part.method, part.baseline)):
            for seed in range(SEEDS) if _drawn(about) else (None,):
                name = (key(part.model, about), seed)
                row = rows.setdefault(name, {**_conditions(), "model": part.model, **about})
                if seed is not None:
                    row["seed"] = seed
                value = levels[key(part.model, about), part.value]
                row.setdefault(part.value, _measured(part, value, base, rng))
                if part.over:
                    row[part.over] = 1.0
    return list(rows.values())


def _differing(part, outcome, rng):
    """Rows whose first group lies far from the others, at their place, or at the margin."""
    apart = {"shown": 0.2, "contradicted": 0.0, "undecided": part.bound + part.margin}[outcome]
    found = {}
    for seed in range(SEEDS):
        value = {
            group: (apart * (number == 0) + 0.002 * _centered(rng)).tolist()
            for number, group in enumerate(part.groups)
        }
        row = {**_conditions(), "model": part.model, **part.method, part.value: value}
        found[key(part.model, part.method), seed] = row | {"seed": seed}
    return found


def _centered(rng):
    noise = rng.normal(size=DOCUMENTS)
    return noise - noise.mean()


def _drawn(about):
    """Whether a method draws anything: text to calibrate or to train with, or the choice itself."""
    if "choose" in about:
        return about["choose"] == "random"
    training = ("recurrence", "needle", "patterns", "shared", "masked", "training", "by input")
    if about.get("table") in training:
        return True
    if about.get("method") == "RETRO":
        return True
    fixed = ("original", "SVD", "RTN", "bits", "packed int4")
    return about.get("method") not in fixed and "table" not in about


def _conditions():
    return {
        "calibration_tokens": 8192,
        "training_tokens": 100_000,
        "training_characters": 100_000,
        "tokens": 1000,
        "start": "GPTQ",
        "steps": 100,
        "budget": 100,
    }


def _measured(part, level, base, rng):
    if part.role == "construction":
        return level
    noise = 0.002 * rng.normal(size=DOCUMENTS)
    if part.value == "rise_documents":  # a difference already: documents' own levels are gone
        return (level + noise - noise.mean()).tolist()
    if part.value in ("documents", "unseen") or part.value.endswith("_documents"):
        return (level + base + noise - noise.mean()).tolist()
    if part.expect == "equal" and not part.ratio:  # shares: their noise does not grow with a level
        return (level + noise - noise.mean()).tolist()
    if part.seeds and part.value == "seconds":
        return float(level * np.exp(0.01 * rng.normal()))
    return (level * np.exp(5 * (noise - noise.mean()))).tolist()


def planted_groups(claim, rise, models=None):
    """Rows for a claim on groups: the rise of the loss of each group, for every setting."""
    rng, rows = np.random.default_rng(1), {}
    losses = {}
    for part in ledger()[claim].parts.values():
        for about in (part.method, part.baseline):
            changed = about is part.method
            for seed in range(SEEDS) if changed and part.seeds else (None,):
                domains = {}
                for group, more in zip(part.groups, rise):
                    base = losses.setdefault((part.model, group), rng.normal(4, 0.3, DOCUMENTS))
                    rises = changed * (more + 0.002 * rng.normal(size=DOCUMENTS))
                    domains[group] = (base + rises).tolist()
                row = {"model": part.model, **about, "domains": domains}
                if seed is not None:
                    row["seed"] = seed
                rows.setdefault((key(part.model, about), seed), row)
    return [row for row in rows.values() if models is None or row["model"] in models]


def stored(rows, date="2030-01-31", **more):
    """A stored result of these rows."""
    about = Provenance("python data/sweep.py", date, "cpu", {})
    return StoredResult("planted", {"table": rows} | more, about)
