"""The panels of the chapter on attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure

from effnb.chapters.design.attention import drawings, forms, graphs, streaming, tables
from effnb.chapters.design.attention.heads import Heads
from effnb.design.attention import (
    CacheShape,
    bigbird_pattern,
    grouped_query,
    hops,
    share_of_dense,
    window_pattern,
)
from effnb.lab import PALETTE, guess, knob, panel
from effnb.lab.bench import Bench
from effnb.lab.changes import Row, if_measured
from effnb.lab.panels import Panel
from effnb.lab.texts import long_texts

TIMES = {
    "about the same": 1.2, "up to twice": 2.0, "two to five times": 5.0,
    "more than five times": math.inf,
}  # fmt: skip
"""The choices of the guess, and where each ends."""


def times_choice(ratio: float) -> str:
    """The choice that a ratio of perplexities belongs to."""
    return next(words for words, end in TIMES.items() if ratio < end)


# --- a cache that forgets -------------------------------------------------------------------------


@if_measured
def sinks(real: Row, mini: Row) -> Panel:
    """Two models whose caches forget, from stored readings."""
    models = {data["model"]: data for data in (real, mini)}
    caches = {
        name: {
            tables.label(row["window"], row["sinks"]): (row["window"], row["sinks"])
            for row in data["table"]
        }
        for name, data in models.items()
    }
    both = [name for name in caches[real["model"]] if name in caches[mini["model"]]]
    without = tables.label(256, 0)

    def compute(model: str, cache: str) -> dict[str, Any]:
        data, about = models[model], caches[model][cache]
        found = next(
            row for row in data["table"] if (row["window"], row["sinks"]) == about
        )  # fmt: skip
        end = math.exp(tables.tail(data, *about))
        whole = math.exp(tables.tail(data, streaming.EVERYTHING, 0))
        places = drawings.places_of(data, *about)
        return {
            "about": about, "places": places, "end": end, "whole": whole, "text": found["text"],
            "highest": math.exp(max(x for row in data["table"] for x in row["curve"])),
        }  # fmt: skip

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        x, y = found["places"]
        axes.plot(x, y, color=drawings.cache_colour(*found["about"]))
        axes.set_yscale("log")
        axes.set_ylim(5, 1.3 * found["highest"])
        axes.set_xlabel("place in the text, tokens")
        axes.set_ylabel("perplexity")

    def text(found: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"Second half of the text, perplexity: {found['end']:,.1f}",
                f"Times that of a cache that keeps everything: {found['end'] / found['whole']:.2f}",
                f"What it then writes: … {' '.join(found['text'].split())}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Forget the first tokens",
        caption="Perplexity by place of a held-out novel, read through the cache that the knob "
        "names. Stored readings.",
        figsize=(6.2, 2.0),
        main="cache",
        frames={"cache": [without, tables.label(256, 4)], "model": None},
        predict=guess(
            f"{real['model']} reads a text of {real['length']:,} tokens with a cache that keeps "
            "the latest 256. How does its perplexity on the second half compare with that of a "
            "cache that keeps everything?",
            list(TIMES),
            answer=lambda found: times_choice(found["end"] / found["whole"]),
            at={"model": real["model"], "cache": without},
        ),
        cache=knob(both, default=without),
        model=knob(list(models)),
    )


CACHES = (32, 64, 128, 256, 512)
CHUNK, BIN, NEW = 16, 64, 20


def live(bench: Bench, lengths: tuple[int, ...] = (512, 1024)) -> Panel:
    """mini-5m reads a chapter through a cache of your size, and writes on."""
    ids = long_texts(bench.tokenizer, lengths[-1], count=1)
    known: dict[int, list[float]] = {}

    def read(window: int | str, sinks: int, length: int) -> tuple[list[float], str]:
        past = streaming.empty_cache(bench.model, window, sinks)
        losses = streaming.read(bench.model, ids[:, :length], past, CHUNK)
        new = streaming.written(bench.model, ids[:, length - 1 : length], past, NEW)
        return streaming.binned(losses, BIN), bench.tokenizer.decode(new[0])

    def compute(window: int, sinks: int, length: int) -> dict[str, Any]:
        if not known:
            known[0] = read(streaming.EVERYTHING, 0, lengths[-1])[0]
        curve, words = read(window, sinks, length)
        kept = CacheShape.of(bench.model).bytes(min(window, length))
        whole = known[0][: len(curve)]
        return {"curve": curve, "text": words, "bytes": kept, "window": window, "whole": whole}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        axes = fig.subplots()
        x = [BIN * (i + 0.5) for i in range(len(found["curve"]))]
        axes.plot(x, found["whole"], color="0.6", label="keeps everything")
        axes.plot(x, found["curve"], color=PALETTE[0], label=f"a cache of {found['window']}")
        axes.axvline(found["window"], color="0.7", linestyle=":")
        axes.set_xlim(0, lengths[-1])
        axes.set_ylim(2, 8)
        axes.legend(loc="upper left")
        axes.set_xlabel("place in the text, tokens")
        axes.set_ylabel("nats per token")

    def text(found: Mapping[str, Any]) -> str:
        half = len(found["curve"]) // 2
        last, whole = (sum(found[k][half:]) / half for k in ("curve", "whole"))
        return "\n".join(
            [
                f"Second half: {last:.3f} nats, perplexity {math.exp(last):.1f}",
                f"Keeping everything: {whole:.3f} nats",
                f"Keys and values kept at the end: {found['bytes'] / 1024:,.0f} KiB",
                f"It writes on: … {' '.join(found['text'].split())}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Your own cache",
        caption="mini-5m reads 16 tokens at a time. Dotted: where the cache is full. The "
        "grey curve keeps everything, also beyond the 512 tokens of its training.",
        figsize=(6.2, 2.0),
        main="window",
        frames={"window": [32, 256]},
        window=knob(list(CACHES), default=256, label="tokens in the cache"),
        sinks=knob([0, 1, 4, 16], default=4),
        length=knob(list(lengths), default=lengths[-1], label="tokens read"),
    )


# --- who sees whom --------------------------------------------------------------------------------

PATTERNS = ("causal window with sinks", "window and global", "BigBird")


def pattern_of(pattern: str, window: int, globals_: int, tokens: int) -> torch.Tensor:
    """A table of pairs; BigBird's blocks are a third of the window."""
    if pattern == "BigBird":
        return bigbird_pattern(tokens, block=max(1, window // 4), random=2)[0]
    causal = pattern == PATTERNS[0]
    return window_pattern(tokens, min(window, 2 * tokens), global_tokens=globals_, causal=causal)


def masks() -> Panel:
    """Who sees whom, how many pairs that is, and in how many layers a token reaches all."""

    def compute(pattern: str, window: int, globals_: int, tokens: int) -> dict[str, Any]:
        found = pattern_of(pattern, window, globals_, tokens)
        return {"pattern": found, "layers": hops(found), "share": share_of_dense(found)}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        drawings.grid(fig.subplots(), found["pattern"])

    def text(found: Mapping[str, Any]) -> str:
        tokens = len(found["pattern"])
        return "\n".join(
            [
                f"Pairs: {int(found['pattern'].sum()):,} of {tokens**2:,}",
                f"Share of all pairs: {100 * found['share']:.1f} %",
                f"Layers until every token has reached every other: {found['layers'] or 'never'}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Who sees whom",
        caption="Rows are queries, columns keys; dark pairs are computed.",
        figsize=(2.4, 2.4),
        main="globals_",
        frames={"globals_": [0, 1]},
        predict=guess(
            "64 tokens, a window of 8 (four to either side), and no global token: how many layers "
            "does it take until every token has reached every other?",
            answer=lambda found: found["layers"],
            at={"pattern": PATTERNS[1], "window": 8, "globals_": 0, "tokens": 64},
            unit="layers",
        ),
        ignored=lambda values: (
            {"globals_": "BigBird's first and last block are its global tokens"}
            if values["pattern"] == "BigBird"
            else {}
        ),
        pattern=knob(list(PATTERNS), default=PATTERNS[1]),
        window=knob([4, 8, 16, 32], default=8),
        globals_=knob([0, 1, 2, 4], label="global tokens or sinks"),
        tokens=knob([64, 128, 256], label="length"),
    )


# --- cheap forms ----------------------------------------------------------------------------------


def approximations(heads: Heads, lengths: tuple[int, ...] = (256, 512)) -> Panel:
    """Error of each cheap form on the heads of a trained layer."""
    known: dict[int, dict[str, dict[int, list[float]]]] = {}

    def measured(length: int) -> dict[str, dict[int, list[float]]]:
        q, k, v = (x[:, :, :length] for x in (heads.q, heads.k, heads.v))
        return {
            name: {b: sorted(forms.error(name, q, k, v, b).tolist()) for b in forms.BUDGETS}
            for name in forms.FORMS
        }

    def compute(form: str, budget: int, length: int) -> dict[str, Any]:
        if length not in known:
            known[length] = measured(length)
        curves = {
            name: {b: median(errors) for b, errors in values.items()}
            for name, values in known[length].items()
        }
        found = known[length][form][budget]
        return {"form": form, "errors": found, "curves": curves}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        drawings.error_axes(left, found["curves"], found["form"])
        left.set_ylabel("relative error")
        colour = drawings.FORM_COLOURS[found["form"]]
        right.bar(range(1, 1 + len(found["errors"])), found["errors"], color=colour)
        right.set_ylim(0, 1.8)
        count = len(found["errors"])
        right.set_xticks([1, (count + 1) // 2, count])
        right.set_xlabel("head, in order of its error")

    def text(found: Mapping[str, Any]) -> str:
        e = found["errors"]
        return f"Median error: {median(e):.3f}\nBest head: {e[0]:.3f}\nWorst head: {e[-1]:.3f}"

    return panel(
        compute,
        draw,
        text=text,
        title="What does a cheap form miss?",
        caption="Relative error of the output against exact attention, one layer of MiniLM, "
        "nothing trained. 0 is exact; an error of 1 is as bad as answering zero. Left: the median "
        "over the heads, this form in colour among the others. Right: every head at this budget. "
        "LSH shares queries and keys, so it is compared with attention that does, too.",
        figsize=(5.8, 2.0),
        main="form",
        frames={"form": ["window", "Performer"]},
        ignored=lambda values: (
            {"budget": "its state has the head's width"} if values["form"] == "linear" else {}
        ),
        form=knob(list(forms.FORMS)),
        budget=knob(list(forms.BUDGETS), default=64, label="keys or features"),
        length=knob(list(lengths), default=lengths[-1]),
    )


# --- fewer heads of keys --------------------------------------------------------------------------


def groups(bench: Bench, windows: int = 3) -> Panel:
    """mini-5m with fewer heads of keys and values, pooled, before any training."""
    ids = bench.windows[:windows, :256]
    shape = CacheShape.of(bench.model)
    sizes = [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]
    known: dict[str, float] = {}

    @torch.inference_mode()
    def loss(model: torch.nn.Module) -> float:
        logits = model(input_ids=ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:]))

    def compute(shared: int, pooling: str) -> dict[str, Any]:
        kv_heads = shape.heads // shared
        model = grouped_query(bench.model, kv_heads, pooling=pooling)
        if not known:
            known["original"] = loss(bench.model)
        kept = CacheShape.of(model).bytes(1)
        return {"loss": loss(model), "original": known["original"], "bytes": kept}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        left.barh(["now", "original"], [found["loss"], found["original"]],
                  color=[PALETTE[0], "0.7"])  # fmt: skip
        left.set_xlim(0, 9)
        left.set_title("nats per token")
        right.barh(["now", "original"], [found["bytes"], shape.bytes(1)], color=[PALETTE[0], "0.7"])
        right.set_title("cache, bytes per token")

    def text(found: Mapping[str, Any]) -> str:
        return "\n".join(
            [
                f"Loss: {found['loss']:.3f} nats (original {found['original']:.3f})",
                f"Cache per token: {found['bytes']:,.0f} bytes",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Share keys and values",
        caption=f"mini-5m has {shape.heads} query heads; the knob says how many of them share one "
        "head of keys and values. Nothing is trained.",
        figsize=(5.6, 1.3),
        main="shared",
        frames={"shared": [shape.heads // n for n in reversed(sizes)][-2:]},
        shared=knob([shape.heads // n for n in reversed(sizes)], label="query heads per group"),
        pooling=knob(["mean", "first", "random"]),
    )


# --- predicted pairs ------------------------------------------------------------------------------


SEEN = 64
"""Tokens of the picture of a head."""


def finder(found: graphs.Finder, judged: Heads, head: int = 0) -> Panel:
    """Predicted pairs of one head, and recall against sparsity of every rule."""
    rules = [rule for rule in graphs.SETTINGS if rule != "random"]
    curves = {
        rule: [(p.setting, *(sum(x) / len(x) for x in (p.recall, p.sparsity))) for p in points]
        for rule in graphs.SETTINGS
        for points in [found.curve(rule, judged)]
    }

    def compute(rule: str, step: int) -> dict[str, Any]:
        settings = graphs.SETTINGS[rule]
        at = round((step - 1) / 4 * (len(settings) - 1))
        graph = found.graph(rule, settings[at], judged)[0, head] & judged.visible
        return {"rule": rule, "graph": graph, "point": curves[rule][at]}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[2, 3])
        used, graph = judged.used[0, head, :SEEN, :SEEN], result["graph"][:SEEN, :SEEN]
        picture = torch.ones(*used.shape, 3)
        picture[graph & ~used] = torch.tensor([0.75, 0.85, 0.95])
        picture[graph & used] = torch.tensor([0.0, 0.45, 0.7])
        picture[~graph & used] = torch.tensor([0.84, 0.37, 0.0])
        left.imshow(picture.numpy(), interpolation="nearest")
        left.set_xticks([])
        left.set_yticks([])
        drawings.curve_axes(right, curves)
        _, y, x = result["point"]
        right.plot([100 * x], [100 * y], "o", color="black", markersize=9, fillstyle="none")
        right.set_ylabel("found, %")
        right.legend(loc="lower left", fontsize=8)

    def text(result: Mapping[str, Any]) -> str:
        setting, recall, sparsity = result["point"]
        return "\n".join(
            [
                f"Setting: {setting:g}",
                f"Pairs left out: {100 * sparsity:.1f} %",
                f"Pairs in use that are found: {100 * recall:.1f} %",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Find the pairs",
        caption=f"Left: the first {SEEN} tokens of one head; blue pairs are predicted and in use, "
        "orange ones are missed, pale ones predicted for nothing. Right: recall over sparsity of "
        "every rule, means over the heads of the layer; the circle is this setting.",
        figsize=(5.2, 2.0),
        main="step",
        frames={"step": [2, 4]},
        rule=knob(rules),
        step=knob(1, 5, default=3, label="setting, from few to many"),
    )
