"""What the chapter on low rank asks of its stored results: tables and sentences.

Every sentence is put together from the numbers it speaks of, so that it stays true when they are
measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from effnb.inference import low_rank
from effnb.lab import results
from effnb.lab.changes import Change, Row, if_measured, mean_windows, pick, spoken, tidy
from effnb.lab.tables import NOT_MEASURED, Table, table

COMPARED = (0.8, 0.6, 0.4)
"""The parts kept that were measured with several draws of calibration text."""

SHAPES = ((256, 256), (128, 256), (688, 256), (576, 576), (1536, 576))
"""Shapes of layers: three of mini-5m, two of SmolLM2."""


def stored(part: str) -> results.StoredResult:
    """One stored table of this chapter."""
    return results.read(f"05_inference/2_low_rank/{part}")


def against_original(change: Change) -> str:
    """A change against the original in words, with its interval."""
    word = "indistinguishable from" if not change.decided else f"{change.word()} than"
    return f"{word} the original ({change.number()} nats)"


def times(change: Change) -> str:
    """A change of the loss as a factor of the perplexity, with its interval."""
    mean, low, high = (_factor(v) for v in (change.mean, change.low, change.high))
    return f"× {mean} [{low}, {high}]"


def _factor(nats: float) -> str:
    """The exponential with three digits, and no more than a reader needs."""
    value = math.exp(min(nats, 700.0))
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}" if value < 1e7 else f"{value:.1e}"


# --- arithmetic -----------------------------------------------------------------------------------


def break_even_table() -> Table:
    """For some shapes: the full rank, the break-even rank, and what two parts of the rank hold."""
    lines = []
    for m, n in SHAPES:
        half = min(m, n) // 2
        rank = low_rank.rank_for(0.9, m, n)
        lines.append(
            {
                "layer": f"{m}\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}{n}",
                "full rank": min(m, n),
                "break-even": low_rank.break_even_rank(m, n),
                "numbers at half rank": half * (m + n) / (m * n),
                "terms at 90 %": rank / min(m, n),
            }
        )
    return table(
        lines,
        {
            "layer": "",
            "full rank": "",
            "break-even": ".1f",
            "numbers at half rank": ".0%",
            "terms at 90 %": ".0%",
        },
        caption="Layers of mini-5m and, in the last two rows, of SmolLM2-135M: the full rank, the "
        "break-even rank, the part of the numbers that half of the full rank takes, and the part "
        "of the terms that 90 % of the numbers pay for.",
    )


# --- the methods on mini-5m -----------------------------------------------------------------------


def rises(rows: Sequence[Row], method: str, kept: float) -> Change:
    """The rise of the loss at one setting, in nats per token, window by window."""
    found = mean_windows(pick(rows, method=method, kept=kept))
    return Change.between(found, pick(rows, method="original")[0]["windows"])


def gains(rows: Sequence[Row], method: str, kept: float) -> Change:
    """What a method's loss is above plain SVD's, in nats per token, window by window."""
    found, plain = (mean_windows(pick(rows, method=m, kept=kept)) for m in (method, "SVD"))
    return Change.between(found, plain)


@if_measured
def cost_said(rows: Sequence[Row], settings: Sequence[tuple[str, float]]) -> str:
    """What some settings cost, with intervals, in a sentence."""
    parts = [
        f"{method} with {kept:.0%} kept is {against_original(rises(rows, method, kept))}"
        for method, kept in settings
    ]
    return f"mini-5m: {'; '.join(parts)}."


@if_measured
def methods_table(rows: Sequence[Row]) -> Table:
    """What each method costs on mini-5m, and whether SVD-LLM differs from plain SVD."""
    original = pick(rows, method="original")[0]
    shown = ("SVD", "FWSVD", "ASVD", "SVD-LLM")
    lines = []
    for kept in COMPARED:
        gain = gains(rows, "SVD-LLM", kept)
        lines.append(
            {"kept": f"{kept:.0%}"}
            | {method: tidy(rises(rows, method, kept).mean) for method in shown}
            | {"SVD-LLM − SVD": gain.number(), "SVD-LLM is": gain.word()}
        )
    draws = len(pick(rows, method="SVD-LLM", kept=COMPARED[0]))
    return table(
        lines,
        {"kept": "", **dict.fromkeys(shown, "+.3f"), "SVD-LLM − SVD": "", "SVD-LLM is": ""},
        caption="mini-5m: nats per token above the original (perplexity "
        f"{math.exp(original['loss']):.1f}), and the difference of the two with its 95 % interval "
        f"over windows. SVD-LLM and ASVD: means of {draws} draws of calibration text.",
    )


@if_measured
def methods_said(rows: Sequence[Row]) -> str:
    """Where the methods that look at inputs beat plain SVD, in sentences."""
    said = []
    for method in ("ASVD", "SVD-LLM"):
        by_word: dict[str, list[str]] = {}
        for kept in COMPARED:
            by_word.setdefault(gains(rows, method, kept).word(), []).append(f"{kept:.0%}")
        sentences = {
            "better": "loses less than plain SVD at {} kept",
            "indistinguishable": "cannot be told apart from it at {}",
            "worse": "loses more at {}",
        }
        parts = [words.format(spoken(by_word[w])) for w, words in sentences.items() if w in by_word]
        said.append(f"{method} {'; it '.join(parts)}.")
    return f"mini-5m. {' '.join(said)}"


# --- rank where it is needed ----------------------------------------------------------------------

SAME = "same part of every layer"
WAYS = {SAME: "the same part of every layer", "by spectrum": "by spectrum", "by loss": "by loss"}


def allocated(rows: Sequence[Row], way: str, kept: float) -> Change:
    """A divided budget's loss above that of the same part of every layer."""
    found, same = (mean_windows(pick(rows, method=w, kept=kept)) for w in (way, SAME))
    return Change.between(found, same)


@if_measured
def allocation_table(rows: Sequence[Row]) -> Table:
    """One budget, divided in three ways."""
    base = pick(rows, method="original")[0]["loss"]
    return table(
        [
            {"budget divided": label}
            | {
                f"{kept:.0%} kept": tidy(
                    fmean(r["loss"] for r in pick(rows, method=way, kept=kept)) - base
                )
                for kept in COMPARED
            }
            for way, label in WAYS.items()
        ],
        {"budget divided": "", **{f"{kept:.0%} kept": "+.3f" for kept in COMPARED}},
        caption="mini-5m, SVD-LLM's factors: nats per token above the original when one budget of "
        "numbers is divided in three ways.",
    )


@if_measured
def allocation_said(rows: Sequence[Row]) -> str:
    """Whether a divided budget beats the same part of every layer, in sentences."""
    said = []
    for way in ("by spectrum", "by loss"):
        parts = []
        for kept in COMPARED:
            change = allocated(rows, way, kept)
            parts.append(f"{change.word()} at {kept:.0%} ({change.number()} nats)")
        said.append(f"Ranks {way}, against the same part of every layer: {spoken(parts)}.")
    return " ".join(said)


# --- pruned, factorized and rounded ---------------------------------------------------------------

ROADS = {
    "GPTQ 4": "round to 4 bits",
    "rank 75%": "keep 75 % in factors",
    "rank 75% + 4 bits": "keep 75 %, round to 4 bits",
    "GPTQ 3": "round to 3 bits",
    "prune 2:4 + 4 bits": "prune 2 of 4, round to 4 bits",
    "prune 50 % + 4 bits": "prune half, round to 4 bits",
    "rank 50% + 4 bits": "keep 50 %, round to 4 bits",
    "GPTQ 2": "round to 2 bits",
}
"""The roads that the table compares: their stored names, and what they do."""

LIKE_THREE_BITS = ("prune 2:4 + 4 bits", "prune 50 % + 4 bits", "rank 75% + 4 bits")
"""The roads that end at about the bytes of three bits."""


def road(rows: Sequence[Row], way: str, step: str = "compressed") -> Change:
    """A road's loss above the original's."""
    found = mean_windows(pick(rows, way=way, step=step))
    return Change.between(found, pick(rows, way="original")[0]["windows"])


def road_bits(rows: Sequence[Row], way: str, step: str = "compressed") -> float:
    """Bits that a road stores per weight."""
    return fmean(row["layer_bits"] for row in pick(rows, way=way, step=step))


@if_measured
def composed_table(rows: Sequence[Row]) -> Table:
    """Each road: its bits as stored, its loss, and both after a LoRA was trained."""
    lines = []
    for way, label in ROADS.items():
        tuned = pick(rows, way=way, step="LoRA")
        lines.append(
            {
                "road": label,
                "bits stored": road_bits(rows, way),
                "loss": tidy(road(rows, way).mean),
                "with a LoRA": (
                    f"{tidy(road(rows, way, 'LoRA').mean):+.3f} at "
                    f"{road_bits(rows, way, 'LoRA'):.2f} bits"
                    if tuned
                    else ""
                ),
            }
        )
    return table(
        lines,
        {"road": "", "bits stored": ".2f", "loss": "+.3f", "with a LoRA": ""},
        caption="mini-5m: bits stored per weight and nats per token above the original, means of "
        "three seeds. Scales, masks and LoRA count; numbers that are not rounded have 16 bits.",
    )


@if_measured
def composed_said(rows: Sequence[Row]) -> str:
    """Which road of about three bits is best, whether losses add up, and what recovery is worth."""
    three = mean_windows(pick(rows, way="GPTQ 3", step="compressed"))
    parts = []
    for way in LIKE_THREE_BITS:
        change = Change.between(mean_windows(pick(rows, way=way, step="compressed")), three)
        parts.append(f"{ROADS[way]} is {change.word()} ({change.number()} nats)")
    both = road(rows, "rank 75% + 4 bits").mean
    apart = road(rows, "rank 75%").mean + road(rows, "GPTQ 4").mean
    return (
        f"Against three bits for all weights: {'; '.join(parts)}. Factors of 75 % and rounding to "
        f"4 bits cost {tidy(apart):+.3f} nats when their separate costs are added, and "
        f"{tidy(both):+.3f} together."
    )


# --- how much text --------------------------------------------------------------------------------


def measured_tokens(rows: Sequence[Row]) -> list[int]:
    """The numbers of calibration tokens that were tried."""
    return sorted({row["tokens"] for row in rows if row["tokens"]})


def by_tokens(rows: Sequence[Row], method: str, tokens: int) -> tuple[float, float]:
    """The rise of the loss on the calibration text itself, and on new text."""
    found = pick(rows, method=method, tokens=tokens)
    new = fmean(row["loss"] for row in found) - pick(rows, method="original")[0]["loss"]
    return fmean(row["rise_on_calibration"] for row in found), new


@if_measured
def text_said(rows: Sequence[Row]) -> str:
    """With how few tokens SVD-LLM is worse than plain SVD, and from how many it is better."""
    plain = pick(rows, method="SVD")[0]["windows"]
    words = {}
    for tokens in measured_tokens(rows):
        found = mean_windows(pick(rows, method="SVD-LLM", tokens=tokens))
        words[tokens] = Change.between(found, plain).word()
    fewest = min(words)
    own, new = by_tokens(rows, "SVD-LLM", fewest)
    by_word: dict[str, list[str]] = {}
    for tokens, word in words.items():
        by_word.setdefault(word, []).append(f"{tokens:,}")
    parts = [f"{word} with {spoken(counts)} tokens" for word, counts in by_word.items()]
    return (
        f"SVD-LLM against plain SVD, on new text: {'; '.join(parts)}. With {fewest} tokens its "
        f"loss changes by {tidy(own, 2):+.2f} nats on its own text and by {tidy(new, 2):+.2f} on "
        "new text."
    ).replace(" -", " −")


# --- training -------------------------------------------------------------------------------------

TRAINED = {
    "rows alone": 0.0,
    "half and half": 0.5,
    "low rank alone": 1.0,
}
"""How LoSparse divides its numbers: the low rank's share."""


@if_measured
def losparse_table(data: Row) -> Table:
    """LoSparse's two parts, one shot and trained, beside SVD-LLM."""
    rows = data["table"]
    base = pick(rows, method="original")[0]["loss"]

    def rise(**wanted: Any) -> Any:
        found = pick(rows, **wanted)
        return tidy(fmean(row["loss"] for row in found) - base) if found else NOT_MEASURED

    lines = [
        {
            "half of the numbers": label,
            "one shot": rise(method="one shot", share=share),
            "trained": rise(method="trained", share=share),
        }
        for label, share in TRAINED.items()
    ]
    lines.append(
        {
            "half of the numbers": "SVD-LLM",
            "one shot": rise(method="SVD-LLM"),
            "trained": rise(method="SVD-LLM, tuned"),
        }
    )
    return table(
        lines,
        {"half of the numbers": "", "one shot": "+.3f", "trained": "+.3f"},
        caption="mini-5m: nats per token above the original, before and after "
        f"{data['steps']} short steps of training, means of three seeds.",
    )


@if_measured
def losparse_said(data: Row) -> str:
    """Whether training brings the mix up to low rank alone, and to SVD-LLM, in a sentence."""
    rows = data["table"]
    mix = mean_windows(pick(rows, method="trained", share=0.5))
    parts = []
    for name, wanted in (
        ("low rank alone, trained alike", {"method": "trained", "share": 1.0}),
        ("SVD-LLM, which trains nothing", {"method": "SVD-LLM"}),
    ):
        change = Change.between(mix, mean_windows(pick(rows, **wanted)))
        end = "to" if not change.decided else "than"
        word = "indistinguishable" if not change.decided else change.word()
        word = "equal within the interval" if word == "indistinguishable" else word
        parts.append(f"{word} {end} {name} ({change.number()} nats)")
    return f"After training, half and half is {spoken(parts)}."


# --- a real model ---------------------------------------------------------------------------------


def real_kept(rows: Sequence[Row]) -> list[float]:
    """The parts kept that SmolLM2 was factorized to, the largest first."""
    return sorted({row["kept"] for row in rows if row["method"] == "SVD"}, reverse=True)


@if_measured
def smollm2_table(rows: Sequence[Row]) -> Table:
    """What each method leaves of SmolLM2, as perplexities."""
    names = {f"{kept:.0%} kept": kept for kept in real_kept(rows)}
    lines = []
    for method in ("SVD", "ASVD", "SVD-LLM"):
        line: dict[str, Any] = {"method": method}
        for name, kept in names.items():
            found = pick(rows, method=method, kept=kept)
            loss = fmean(row["loss"] for row in found)
            line[name] = f"{math.exp(loss):,.0f}" if loss < 14 else f"{math.exp(loss):.1e}"
        lines.append(line)
    base = math.exp(pick(rows, method="original")[0]["loss"])
    return table(
        lines,
        caption=f"SmolLM2-135M: perplexity after each method. The original's is {base:.1f}.",
    )


@if_measured
def smollm2_said(rows: Sequence[Row]) -> str:
    """By what factor each method raises SmolLM2's perplexity at the largest part, in sentences."""
    kept = max(real_kept(rows))
    parts = []
    for method in ("SVD", "ASVD", "SVD-LLM"):
        change = rises(rows, method, kept)
        parts.append(f"{method} is {change.word()}, {times(change)}")
    return f"At {kept:.0%} kept, perplexity against the original: {'; '.join(parts)}."


@if_measured
def stands_out_said(data: Row) -> str:
    """How far the largest input of a layer stands out, in both models, in sentences."""
    said = []
    for name, layers in data["table"].items():
        found = sorted(layers.values())
        said.append(
            f"In {name} the largest input of a layer is {median(found):.1f} times its middle one "
            f"(median over layers), and {found[-1]:.0f} times in the worst layer."
        )
    return " ".join(said)


@if_measured
def speed_table(data: Row) -> Table:
    """Reading and writing with a factorized SmolLM2, over the part kept."""

    def ratio(key: str, name: str, invert: bool) -> float:
        pairs = zip(data[key][name], data[key]["1.0"], strict=True)
        return median(b / a if invert else a / b for a, b in pairs)

    return table(
        [
            {
                "kept": name if "half" in name else f"{float(name):.0%}",
                "MiB stored": held / 2**20,
                "reading": ratio("read_seconds", name, True),
                "writing": ratio("tokens_per_second", name, False),
            }
            for name, held in data["bytes"].items()
        ],
        {"kept": "", "MiB stored": ",.0f", "reading": ".2f", "writing": ".2f"},
        caption="SmolLM2-135M: speed over that of the original, reading a prompt and writing token "
        "by token; medians of five interleaved rounds. The last row gives every layer half of its "
        "full rank.",
    )
