"""Registered parts and stored rows, made up, that the tests of claims share."""

import numpy as np

from effnb.lab.claims import claims_from, digest_of

TODAY, BEFORE = "2026-11-28", "2026-11-20"
MODEL = "mini-5m"


def row(name="quality", **more):
    """A registered part as the ledger holds it."""
    return {
        "name": name, "what": f"nats, {name}", "chapter": "05_inference/3_quantization",
        "model": MODEL, "unit": "nats", "expect": "lower", "method": {"method": name},
        "baseline": {"method": "plain"},
    } | more  # fmt: skip


def content(*parts, claim="S-I3"):
    """A ledger of one claim."""
    parts = list(parts)
    return {
        "sources": {claim[0]: "A survey, 2023"},
        "smallest effects": {"nats": 0.01, "times": 0.05, "per cent": 0.25, "share": 0.01},
        "claims": {
            claim: {
                "claim": "One method is better than another.", "chapters": ["05_inference/x"],
                "registered": "2026-11-27", "digest": digest_of(parts), "parts": parts,
            }
        },
    }  # fmt: skip


def part(name="quality", **more):
    return claims_from(content(row(name, **more)))["S-I3"].parts[name]


def runs(method, effect, *, seeds=5, documents=24, noise=0.003, date=TODAY, **more):
    """Stored rows: a loss for each document, moved by the method's effect."""
    base = np.random.default_rng(7).normal(4, 0.3, documents)
    rng = np.random.default_rng(len(method) + 10 * seeds)
    found = []
    for seed in range(seeds):
        losses = base + effect + noise * (rng.normal() + rng.normal(size=documents))
        about = {"model": MODEL, "method": method, "seed": seed, "date": date}
        found.append(about | {"documents": losses.tolist()} | more)
    return found


def plain(**more):
    """The baseline that no seed changes."""
    (one,) = runs("plain", 0.0, seeds=1, noise=0.0)
    del one["seed"]
    return one | more
