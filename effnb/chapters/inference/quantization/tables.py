"""What the chapter on quantization asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from torch import nn

from effnb.inference import quantization
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, mean_windows, pick, spoken, tidy
from effnb.lab.tables import NOT_MEASURED, Table, table

SETTINGS = ((4, "row"), (4, "64"), (3, "row"), (3, "64"), (2, "row"), (2, "64"))
"""Bits and group size of the rows of the tables of methods."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"05_inference/3_quantization/{part}")


def setting_label(bits: int, group_size: str) -> str:
    """A setting in words."""
    return f"{bits} bits, {'per row' if group_size == 'row' else f'groups of {group_size}'}"


# --- rounding to nearest and GPTQ -----------------------------------------------------------------


def compared(rows: Sequence[Row]) -> dict[tuple[int, str], dict[str, Any]]:
    """RTN and GPTQ at every setting that was measured for both.

    Returns:
        For each (bits, group size): the changes "RTN" and "GPTQ" against the original, in nats per
        token over windows; "difference", GPTQ - RTN; and "layer_bits", the bits stored per weight.
    """
    original = pick(rows, method="original")[0]["windows"]
    found = {}
    for bits, group in SETTINGS:
        nearest = pick(rows, method="RTN", bits=bits, group_size=group)
        gptq = pick(rows, method="GPTQ", bits=bits, group_size=group)
        if nearest and gptq:
            a, b = mean_windows(nearest), mean_windows(gptq)
            found[bits, group] = {
                "RTN": Change.between(a, original),
                "GPTQ": Change.between(b, original),
                "difference": Change.between(b, a),
                "layer_bits": nearest[0]["layer_bits"],
            }
    return found


@if_measured
def methods_table(model: str, rows: Sequence[Row]) -> Table:
    """What each setting costs by RTN and by GPTQ, and whether the two differ."""
    loss = pick(rows, method="original")[0]["loss"]
    return table(
        [
            {
                "setting": setting_label(*setting),
                "bits stored": at["layer_bits"],
                "RTN": tidy(at["RTN"].mean),
                "GPTQ": tidy(at["GPTQ"].mean),
                "GPTQ − RTN": at["difference"].number(),
                "GPTQ is": at["difference"].word(),
            }
            for setting, at in compared(rows).items()
        ],
        {
            "setting": "",
            "bits stored": ".2f",
            "RTN": "+.3f",
            "GPTQ": "+.3f",
            "GPTQ − RTN": "",
            "GPTQ is": "",
        },
        caption=f"{model}: nats per token above the original (perplexity {math.exp(loss):.1f}), "
        "and the difference of the two methods with its 95 % interval.",
    )


@if_measured
def methods_said(model: str, rows: Sequence[Row]) -> str:
    """Where GPTQ beats rounding to nearest, and by how much, in sentences."""
    found = compared(rows)
    by_word: dict[str, list[str]] = {}
    for setting, at in found.items():
        change = at["difference"]
        size = f" ({tidy(change.mean):+.3f} nats)".replace("-", "−") if change.decided else ""
        by_word.setdefault(change.word(), []).append(setting_label(*setting) + size)
    sentences = {
        "better": "GPTQ loses less than rounding to nearest at {}.",
        "indistinguishable": "The two cannot be told apart at {}.",
        "worse": "GPTQ loses more at {}.",
    }
    said = [words.format(spoken(by_word[w])) for w, words in sentences.items() if w in by_word]
    return f"{model}. {' '.join(said)}"


@if_measured
def cost_said(model: str, rows: Sequence[Row], settings: Sequence[tuple[int, str]]) -> str:
    """What rounding to nearest costs at some settings, with intervals, in a sentence."""
    found = compared(rows)
    parts = []
    for setting in settings:
        change = found[setting]["RTN"]
        harm = f"{change.word()} than the original" if change.decided else "indistinguishable"
        parts.append(f"{setting_label(*setting)}: {harm} ({change.number()} nats)")
    return f"{model}, rounded to nearest. {'; '.join(parts)}."


# --- outliers -------------------------------------------------------------------------------------


def _above(rows: Sequence[Row], **wanted: Any) -> Any:
    """A setting's loss above the original's, in nats."""
    found = pick(rows, **wanted)
    if not found:
        return NOT_MEASURED
    return tidy(found[0]["loss"] - pick(rows, method="original")[0]["loss"])


@if_measured
def inputs_table(rows: Sequence[Row]) -> Table:
    """Weights and inputs in 8 and 6 bits, without outliers and with two strong ones."""
    cases = {
        f"{bits} bits, {label}": {"weights": bits, "injected": injected}
        for bits in (8, 6)
        for label, injected in (("none", "none"), ("outliers", "40 x on 2 channels"))
    }
    return table(
        [
            {"method": method, "one scale for": f"a {'batch' if per == 'tensor' else per}"}
            | {name: _above(rows, method=method, per=per, **case) for name, case in cases.items()}
            for method in ("plain", "SmoothQuant", "LLM.int8()", "rotation")
            for per in ("tensor", "token")
            if pick(rows, method=method, per=per)
        ],
        {"method": "", "one scale for": "", **dict.fromkeys(cases, "+.3f")},
        caption="mini-5m, weights and inputs rounded: nats per token above the original, without "
        "outliers and with two channels made 40 times larger.",
    )


@if_measured
def weights_table(rows: Sequence[Row]) -> Table:
    """Weights alone in groups of 64, without outliers and with sixteen milder ones."""
    cases = {
        f"{bits} bits, {label}": {"weights": bits, "injected": injected}
        for bits in (4, 3)
        for label, injected in (("none", "none"), ("outliers", "8 x on 16 channels"))
    }
    return table(
        [
            {"method": method}
            | {name: _above(rows, method=method, per=None, **case) for name, case in cases.items()}
            for method in ("RTN", "AWQ", "GPTQ")
        ],
        {"method": "", **dict.fromkeys(cases, "+.3f")},
        caption="mini-5m, weights alone, groups of 64: nats per token above the original, without "
        "outliers and with sixteen channels made 8 times larger.",
    )


@if_measured
def outliers_said(rows: Sequence[Row]) -> str:
    """Which method the outliers hurt most and least at 6 bits with one scale, in a sentence."""
    said = []
    for method, name in (("plain", "plain rounding"), ("SmoothQuant", "SmoothQuant")):
        few, none = (
            pick(rows, method=method, per="tensor", weights=6, injected=injected)[0]
            for injected in ("40 x on 2 channels", "none")
        )
        change = Change.between(few["windows"], none["windows"])
        said.append(f"{name} is {change.word()} ({change.number()} nats)")
    return (
        "At 6 bits with one scale for a whole batch, with the injected outliers against without: "
        f"{spoken(said)}."
    )


# --- training with the rounding in it -------------------------------------------------------------

STARTS = {
    "LoRA on GPTQ": "GPTQ",
    "PEQA on GPTQ": "GPTQ",
    "QAT": "RTN",
    "QAT, LSQ": "RTN",
}
"""What each trained method began with."""


def by_seed(rows: Sequence[Row], method: str, bits: int, key: str = "loss") -> list[float]:
    """One number for each seed, in the order of the seeds."""
    return [row[key] for row in sorted(pick(rows, method=method, bits=bits), key=_seed)]


def _seed(row: Row) -> int:
    return row["seed"]


@if_measured
def training_table(rows: Sequence[Row]) -> Table:
    """Loss above the original's after rounding, fine-tuning and training, and what was trained."""
    original = pick(rows, method="original")[0]["loss"]
    lines = []
    for method in ("RTN", "GPTQ", *STARTS):
        first = pick(rows, method=method)[0]
        line = {"method": method, "rounding": first["stage"], "trained": first["trainable"]}
        for bits in (3, 2):
            losses = by_seed(rows, method, bits)
            line[f"{bits} bits"] = tidy(fmean(losses) - original)
            start = STARTS.get(method)
            line[f"{bits} bits, change"] = (
                Change.between(losses, by_seed(rows, start, bits)).number() if start else ""
            )
        lines.append(line)
    seeds = len(by_seed(rows, "GPTQ", 2))
    return table(
        lines,
        {
            "method": "",
            "rounding": "",
            "trained": ",d",
            "3 bits": "+.3f",
            "3 bits, change": "",
            "2 bits": "+.3f",
            "2 bits, change": "",
        },
        caption=f"mini-5m, groups of 64, means of {seeds} seeds: nats per token above the "
        "original, and what training changed, with its 95 % interval.",
    )


@if_measured
def training_said(rows: Sequence[Row], control: Sequence[Row]) -> str:
    """What training gained at 3 and 2 bits, and what the same steps do to an unrounded model."""
    said = []
    for bits in (2, 3):
        by_word: dict[str, list[str]] = {}
        for method, start in STARTS.items():
            change = Change.between(by_seed(rows, method, bits), by_seed(rows, start, bits))
            by_word.setdefault(change.word(), []).append(method)
        sentences = {
            "better": "{} improved on the rounding",
            "indistinguishable": "{} made no difference that these seeds show",
            "worse": "{} ended behind the rounding",
        }
        parts = [words.format(spoken(by_word[w])) for w, words in sentences.items() if w in by_word]
        said.append(f"At {bits} bits {'; '.join(parts)}.")
    original = pick(control, method="original")[0]["loss"]
    for method, name in (("all weights", "all weights"), ("LoRA", "a LoRA")):
        after = [row["loss"] for row in pick(control, method=method)]
        change = Change.between(after, [original] * len(after))
        said.append(
            f"The same steps on {name} of the unrounded model change its loss by "
            f"{change.number()} nats."
        )
    return " ".join(said)


# --- mixed precision ------------------------------------------------------------------------------

MEASURES = {
    "loss": "the rise of the loss",
    "output": "the error of the output",
    "hessian": "curvature (HAWQ)",
}


@if_measured
def allocation_table(mixed: Row, model: nn.Module) -> Table:
    """The bits of each layer at the bytes of uniform 3 bits, by the rise of the loss."""
    costs = {name: {int(b): c for b, c in by.items()} for name, by in mixed["sensitivity"].items()}
    sizes = quantization.layer_bytes(model, mixed["choices"], group_size=mixed["group_size"])
    budget = sum(size[3] for size in sizes.values())
    lines: dict[str, dict[str, Any]] = {}
    for name, bits in quantization.allocate(costs, sizes, budget).items():
        *_, block, _, kind = name.split(".")
        lines.setdefault(kind, {"layer": kind})[f"block {block}"] = bits
    return table(
        list(lines.values()),
        caption=f"mini-5m: bits of each layer within {budget / 2**10:,.0f} KiB, the bytes of "
        "uniform 3 bits in groups of 64.",
    )


@if_measured
def mixed_said(mixed: Row) -> str:
    """Whether mixed precision beats uniform bits at the same bytes, and whether costs add up."""
    uniform = mixed["uniform"]
    parts = []
    for by, name in MEASURES.items():
        same = [r for r in pick(mixed["table"], by=by, method="exact") if r["bits"] == 3.0]
        change = Change.between(same[0]["windows"], uniform["windows"])
        parts.append(f"by {name} it is {change.word()} ({change.number()} nats)")
    added = mixed["additivity"]["uniform 2 bits"]
    return (
        f"At the bytes of uniform 3 bits, mixed precision against uniform: {'; '.join(parts)}. "
        f"At 2 bits everywhere the layers' costs add up to {added['predicted']:.3f} nats; together "
        f"they cost {added['together']:.3f}."
    )


# --- domains --------------------------------------------------------------------------------------

KNOWN = ("novel", "Bible", "packages")
"""The domains that the model was trained on."""


def rises(table: Row, setting: str, domain: str) -> Change:
    """The rise of the loss in one domain, in nats per token, window by window."""
    return Change.between(table[setting][domain], table["original"][domain])


@if_measured
def domains_table(found: Row) -> Table:
    """The rise of the loss in each domain, in nats and in per cent of the original's."""
    lines = []
    for setting in found:
        if setting == "original":
            continue
        line = {"setting": setting}
        for domain in found[setting]:
            rise, base = rises(found, setting, domain).mean, fmean(found["original"][domain])
            share = tidy(100 * rise / base, 1)
            line[domain.replace("packages in ", "")] = f"{tidy(rise):+.3f} ({share:+.1f} %)"
        lines.append(line)
    return table(
        lines,
        caption="mini-5m: the rise of the loss in nats per token and, in brackets, in per cent of "
        "the original's loss. The last three columns are languages that it never learned.",
    )


@if_measured
def domains_said(table: Row) -> str:
    """Which known domain each setting of rounding to nearest hurts most, in nats and per cent."""
    said = []
    for setting in table:
        if not setting.startswith("RTN"):
            continue
        nats = {d: rises(table, setting, d).mean for d in KNOWN}
        share = {d: nats[d] / fmean(table["original"][d]) for d in KNOWN}
        most, most_share = max(nats, key=nats.get), max(share, key=share.get)
        ending = "and in per cent" if most == most_share else f"but in per cent {most_share} does"
        said.append(f"{setting}: {most} loses most in nats ({nats[most]:+.3f}) {ending}.")
    return " ".join(said)


# --- the key-value cache --------------------------------------------------------------------------


@if_measured
def cache_table(rows: Sequence[Row]) -> Table:
    """Two-bit keys and values, grouped along time or along channels, with and without outliers."""
    return table(
        [
            {
                "outliers in keys": row["injected"],
                "bits": row["bits"],
                "keys grouped along": (
                    "–" if row["bits"] == 16 else "time" if row["keys"] == "channel" else "channels"
                ),
                "bits per number": 8 * row["bytes"] / row["numbers"],
                "perplexity": math.exp(row["loss"]),
            }
            for row in rows
            if row["bits"] == 2 or (row["bits"] == 16 and row["keys"] == "channel")
        ],
        {
            "outliers in keys": "",
            "bits": "",
            "keys grouped along": "",
            "bits per number": ".1f",
            "perplexity": ".1f",
        },
        caption="mini-5m with a quantized key-value cache. Scales, minima and the latest tokens, "
        "which stay in 16 bits, are counted.",
    )


# --- real models ----------------------------------------------------------------------------------


def hits(row: Row) -> list[float]:
    """1 for each query whose own description came first, else 0."""
    return [float(rank == 1) for rank in row["ranks"]]


def minilm_rows(rows: Sequence[Row], method: str, bits: int, group_size: str) -> list[Row]:
    """One setting of the encoder, one row for each calibration draw."""
    return pick(rows, method=method, bits=bits, group_size=group_size)


def minilm_hits(rows: Sequence[Row], method: str, bits: int, group_size: str) -> list[float]:
    """The hits of each query, averaged over calibration draws."""
    found = minilm_rows(rows, method, bits, group_size)
    return [fmean(each) for each in zip(*(hits(row) for row in found), strict=True)]


def minilm_bits(rows: Sequence[Row]) -> list[int]:
    """The numbers of bits that the encoder was rounded to, most first."""
    return sorted({row["bits"] for row in rows if row["method"] == "RTN"}, reverse=True)


@if_measured
def minilm_table(rows: Sequence[Row]) -> Table:
    """Queries answered by each setting."""
    names = {f"{bits} bits": bits for bits in minilm_bits(rows)}
    return table(
        [
            {"method": f"{method}, {label}"}
            | {name: fmean(minilm_hits(rows, method, bits, group)) for name, bits in names.items()}
            for group, label in (("row", "per row"), ("64", "groups of 64"))
            for method in ("RTN", "GPTQ")
        ],
        {"method": "", **dict.fromkeys(names, ".1%")},
        caption="MiniLM: queries whose own description comes first. The original finds "
        f"{fmean(hits(pick(rows, method='original')[0])):.1%}. GPTQ saw one draw of calibration "
        "text.",
    )


@if_measured
def minilm_said(rows: Sequence[Row]) -> str:
    """Down to which bits nothing measurable is lost, and what GPTQ gains at 2 bits."""
    original = hits(pick(rows, method="original")[0])
    said = []
    for group, label in (("row", "with one scale per row"), ("64", "in groups of 64")):
        measured, safe = minilm_bits(rows), 0
        for bits in measured:
            if Change.between(minilm_hits(rows, "RTN", bits, group), original).high < 0:
                break
            safe = bits
        loses = (
            f"loses measurably below {safe} bits"
            if safe
            else f"loses measurably at {measured[0]} bits already"
        )
        said.append(f"Rounded to nearest {label}, MiniLM {loses}.")
        gain = Change.between(
            minilm_hits(rows, "GPTQ", 2, group), minilm_hits(rows, "RTN", 2, group)
        )
        said.append(
            f"At 2 bits GPTQ is {gain.word(lower_is_better=False)}: {100 * gain.mean:+.0f} points "
            f"[{100 * gain.low:+.0f}, {100 * gain.high:+.0f}]."
        )
    return " ".join(said)


@if_measured
def speed_table(speed: Row) -> Table:
    """Bytes, speed and quality of the very models that were timed."""
    return table(
        [
            {
                "weights": name,
                "MiB stored": speed["bytes"][name] / 2**20,
                "speed / float32": times,
                "perplexity": (
                    math.exp(fmean(speed["loss"][name])) if "loss" in speed else NOT_MEASURED
                ),
            }
            for name, times in speed["times_float32"].items()
        ],
        {"weights": "", "MiB stored": ",.0f", "speed / float32": ".2f", "perplexity": ".1f"},
        caption="SmolLM2-135M, decoding one token at a time: size, speed and quality of the same "
        "model.",
    )


@if_measured
def decoding_table(found: Row) -> Table:
    """Tokens per second beside llama.cpp's, the bytes read for each, and the loss of decoding."""
    rates, peer = found["tokens_per_second"], "llama.cpp"
    said = []
    for name in rates["1"]:
        weights = name.removesuffix(", by generate")
        row: dict[str, Any] = {"decoder": name}
        for threads, of_ways in rates.items():
            times = median(of_ways[name]) / median(of_ways[peer])
            row[f"{threads} thread{'s' * (threads != '1')}"] = times
        bytes_ = found["bytes_per_token"][weights]
        row["MB per token"] = bytes_ / 1e6
        row["share of bandwidth"] = bytes_ * median(rates["1"][name]) / found["bandwidth"]["1"]
        row["perplexity"] = math.exp(fmean(found["loss"][weights]))
        said.append(row)
    formats = {"decoder": "", "1 thread": ".2f", "2 threads": ".2f", "MB per token": ".0f"}
    formats |= {"share of bandwidth": ".0%", "perplexity": ".2f"}
    peers = ", ".join(
        f"{median(of_ways[peer]):.0f} tokens a second on {threads}"
        for threads, of_ways in rates.items()
    )
    return table(
        said,
        formats,
        caption="SmolLM2-135M, the same bits: how many times as fast as llama.cpp each way decodes "
        f"(llama.cpp: {peers}), and the perplexity of what it decodes.",
    )


@if_measured
def decoding_said(found: Row) -> str:
    """Whether the goals are met, and where the time goes."""
    rates = found["tokens_per_second"]
    goals = {"1": 1.0, "2": 1.2}
    met = []
    for threads, goal in goals.items():
        of_ways = rates[threads]
        times = median(of_ways["compiled step"]) / median(of_ways["llama.cpp"])
        verdict = "reached" if times >= goal else "missed"
        met.append(f"{times:.2f} on {threads} (goal {goal:.1f}: {verdict})")
    one = {name: 1000 / median(times) for name, times in rates["1"].items()}
    return (
        f"Times as fast as llama.cpp, by threads: {', '.join(met)}. On one thread a token takes "
        f"{one['modules']:.1f} ms through the modules, {one['step in PyTorch']:.1f} ms by the step "
        f"in PyTorch, {one['compiled step']:.1f} ms compiled, and "
        f"{one['compiled step, by generate']:.1f} ms by `generate`, which adds its own Python."
        + _parts_said(found)
    )


def _parts_said(found: Row) -> str:
    """How long each part of the compiled step takes, and how fast that reads the weights."""
    parts = found["profile"]["1"]
    if not parts:
        return ""
    times = ", ".join(f"{part} {time / 1000:.2f}" for part, time in parts.items())
    reading = (parts["products"] + parts["head"]) / 1e6
    rate = found["bytes_per_token"]["compiled step"] / reading
    return (
        f" Of the compiled step, in ms: {times}. Products and head read the weights at "
        f"{rate / 1e9:.1f} GB/s, {rate / found['bandwidth']['1']:.0%} of what one thread reads."
    )
