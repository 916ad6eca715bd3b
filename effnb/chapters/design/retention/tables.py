"""What the chapter on retention asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from effnb.chapters.design.retention import methods, twins
from effnb.design.retention import break_even_tokens
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, pick, spoken, tidy
from effnb.lab.tables import Table, table

DOMAINS = {
    "novel": "in domain",
    "packages": "in domain",
    "manuals": "in domain",
    "German": "out of domain",
    "Spanish": "out of domain",
}


def stored(part: str) -> results.StoredResult | results.NotMeasured:
    """One stored table of this chapter."""
    return results.read(f"02_design/5_retention/{part}")


def claimed(part: str) -> results.StoredResult | results.NotMeasured:
    """One of the tables that the verdicts rest on."""
    return results.read(f"02_design/5_retention_claims/{part}")


def amount(bytes_: float) -> str:
    """Bytes as people say them."""
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= size:
            return f"{bytes_ / size:.3g} {unit}"
    return f"{bytes_:.0f} B"


# ----------------------------------------------------------------------------------- arithmetic


def break_even_table() -> Table:
    """From how many tokens on a cache takes more bytes than a state, for some models."""
    rows = []
    for name, (heads, kv_heads, size) in {
        "the paper's RetNet": (16, 16, 256),
        "mini-1m": (4, 2, 32),
        "mini-300k": (4, 2, 16),
        "SmolLM2-135M": (9, 3, 64),
    }.items():
        rows.append(
            {
                "model": name,
                "heads": heads,
                "key-value heads": kv_heads,
                "head size": size,
                "tokens": break_even_tokens(size, heads=heads, kv_heads=kv_heads),
            }
        )
    return table(
        rows,
        {"model": "", "heads": "", "key-value heads": "", "head size": "", "tokens": ".0f"},
        caption="From how many tokens on a Transformer's cache holds more numbers than the state "
        "of a RetNet with its width, heads and layers.",
    )


# -------------------------------------------------------------------------------------- decoding


def milliseconds(rows: Sequence[Row], **wanted: Any) -> float:
    """The median time of the one row that fits."""
    (row,) = pick(rows, **wanted)
    return 1e3 * median(row["seconds"])


@if_measured
def decoding_said(rows: Sequence[Row]) -> str:
    """How a step changes with length, in a sentence for each model; ratios are rounded."""
    lengths = sorted({row["tokens"] for row in rows})
    said = []
    for method in methods.METHODS:
        first, last = (
            milliseconds(rows, method=method, tokens=tokens) for tokens in (lengths[0], lengths[-1])
        )
        said.append(f"{method} {last / first:.1f}")
    return (
        f"Time of a step after {lengths[-1]:,} tokens over that after {lengths[0]}: "
        f"{spoken(said)} times."
    )


@if_measured
def crossing_said(rows: Sequence[Row]) -> str:
    """From which length on a step of RetNet takes less time than one of the Transformer."""
    lengths = sorted({row["tokens"] for row in rows})
    faster = [
        tokens
        for tokens in lengths
        if milliseconds(rows, method="RetNet", tokens=tokens)
        < milliseconds(rows, method="Transformer", tokens=tokens)
    ]
    if not faster:
        return f"Up to {lengths[-1]:,} tokens, a step of RetNet is never the faster one."
    if faster[0] == lengths[0]:
        return f"A step of RetNet is the faster one from {lengths[0]} tokens on."
    before = lengths[lengths.index(faster[0]) - 1]
    return (
        f"Up to {before:,} tokens a step of the Transformer takes less time; at {faster[0]:,} "
        "RetNet's does."
    )


@if_measured
def state_table(rows: Sequence[Row]) -> Table:
    """Bytes that each model keeps after a short and a long text."""
    lengths = sorted({row["tokens"] for row in rows})
    chosen = (lengths[0], lengths[len(lengths) // 2], lengths[-1])
    lines = []
    for method in methods.METHODS:
        found = {
            f"after {tokens:,}": amount(pick(rows, method=method, tokens=tokens)[0]["state_bytes"])
            for tokens in chosen
        }
        lines.append({"model": method} | found)
    return table(
        lines,
        {"model": "", **{f"after {tokens:,}": "" for tokens in chosen}},
        caption="What each model of mini-1m's size keeps of the tokens it has read, in float32.",
    )


@if_measured
def latency_said(rows: Sequence[Row]) -> str:
    """What sixteen texts cost instead of one."""
    batches = sorted({row["batch"] for row in rows})
    tokens = next(row["tokens"] for row in rows if row["batch"] == batches[-1])
    said = []
    for method in ("RetNet", "Transformer"):
        one, many = (
            milliseconds(rows, method=method, batch=batch, tokens=tokens)
            for batch in (1, batches[-1])
        )
        said.append(f"{many / one:.1f} times for {method}")
    return (
        f"A step for {batches[-1]} texts of {tokens:,} tokens takes {said[0]} and {said[1]} the "
        "time of a step for one."
    )


@if_measured
def training_said(rows: Sequence[Row]) -> str:
    """How time and memory of a training step grow."""
    lengths = sorted({row["tokens"] for row in rows})
    said = []
    for method in ("RetNet", "Transformer, FlashAttention"):
        first, last = (
            milliseconds(rows, method=method, tokens=tokens) for tokens in (1024, lengths[-1])
        )
        said.append(f"{last / first:.0f} times for {method}")
    standard, chunkwise = (
        pick(rows, method=method, tokens=2048)[0]["peak_bytes"]
        for method in ("Transformer, standard", "RetNet")
    )
    return (
        f"From 1,024 to {lengths[-1]:,} tokens, eight times as many, a training step takes "
        f"{said[0]} and {said[1]} the time. At 2,048 tokens, attention that stores its scores "
        f"holds {standard / chunkwise:.1f} times the bytes of chunkwise retention."
    )


# ------------------------------------------------------------------------------------------ twins


RECIPE = ("tokens", "settings", "mix")
"""What two models have in common if they were trained on the same tokens by the same recipe."""


def trained_alike(one: Row, other: Row) -> bool:
    """Whether two rows are of models that saw the same tokens by the same recipe."""
    return all(one[key] == other[key] for key in RECIPE)


def _gaps(mine: Row, other: Row) -> dict[str, Change]:
    return {
        domain: Change.between(mine["domains"][domain], other["domains"][domain])
        for domain in DOMAINS
    }


@if_measured
def twins_table(rows: Sequence[Row]) -> Table:
    """Held-out loss of every model, by domain."""
    lines: list[dict[str, Any]] = []
    for name in ("mini-300k", "retnet-300k", "rwkv-300k", "hyena-300k", "mini-1m", "retnet-1m"):
        found = pick(rows, model=name)
        losses = found[0]["domains"] if found else {}
        lines.append(
            {
                "model": name,
                "parameters": found[0]["parameters"] if found else None,
                **{d: fmean(losses[d]) if found else None for d in DOMAINS},
                "right of four": fmean(map(int, found[0]["answers"])) if found else None,
            }
        )
    return table(
        lines,
        {"model": "", "parameters": ",", **dict.fromkeys(DOMAINS, ".2f"), "right of four": ".0%"},
        caption="Nats per token on held-out documents. The first three domains were in the "
        "training, German and Spanish were not. Last, the share of right choices among four "
        "continuations of a package description, where guessing gives 25 %. A model whose "
        "training has not finished is not measured.",
    )


@if_measured
def twins_said(rows: Sequence[Row]) -> str:
    """Each twin against its Transformer, in a line per twin."""
    said = []
    for name in twins.NAMES:
        if not pick(rows, model=name):
            said.append(f"{name}: not measured here; `{twins.NotTrained(name).command}` trains it")
            continue
        (mine,), (other,) = (pick(rows, model=n) for n in (name, twins.transformer_of(name)))
        if not trained_alike(mine, other):
            said.append(
                f"{name} and {other['model']} were not trained on the same tokens by the same "
                "recipe here, so their losses are no comparison"
            )
            continue
        gaps = _gaps(mine, other)
        parts = [f"{domain} {gap.number(2)}" for domain, gap in gaps.items()]
        said.append(f"{name} − {other['model']}, nats: {', '.join(parts)}")
    return "\n".join(said)


@if_measured
def recall_said(rows: Sequence[Row]) -> str:
    """How often a value is recalled by its key at the end of training."""
    said = [f"{row['model']} {row['recall']:.0%}" for row in rows if row["recall"] is not None]
    if not said:
        return "Recall was not measured at the end of any training."
    return f"Values recalled among twelve pairs of keys and values: {spoken(said)}."


@if_measured
def positions_said(rows: Sequence[Row]) -> str:
    """How loss changes behind the trained length, model by model."""
    said = []
    for row in rows:
        losses = row["losses"]
        width = 2048 // len(losses)
        within = losses[512 // width - 1]
        change = f"{tidy(losses[-1] - within, 1):+.1f}".replace("-", "−")
        said.append(f"{row['model']} {change}")
    return (
        "From the end of the trained length to the end of a text four times as long, the loss "
        f"changes by these nats: {spoken(said)}."
    )


# ---------------------------------------------------------------------------------------- SmolLM2


@if_measured
def smollm2_table(rows: Sequence[Row]) -> Table:
    """Bytes and relative time of SmolLM2 and of an untrained RetNet of its size."""
    first = min(row["tokens"] for row in rows)
    lines = [
        {
            "model": row["model"],
            "tokens read": row["tokens"],
            "kept of them": amount(row["state_bytes"]),
            "of the weights": row["state_bytes"] / row["weight_bytes"],
            "step, times the shortest": median(row["seconds"])
            / median(pick(rows, model=row["model"], tokens=first)[0]["seconds"]),
        }
        for name in dict.fromkeys(row["model"] for row in rows)
        for row in pick(rows, model=name)
    ]
    return table(
        lines,
        {
            "model": "", "tokens read": ",", "kept of them": "", "of the weights": ".1%",
            "step, times the shortest": ".1f",
        },
        caption="SmolLM2-135M beside a RetNet with as many parameters, in float32: bytes kept of "
        "what was read, and the processor's time of a step, that after the shortest text as 1.",
    )  # fmt: skip
