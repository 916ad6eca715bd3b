"""The measurements behind the verdicts of `notebooks/02_design/1_attention`.

    python data/sweeps/02_design/1_attention_claims.py                    # every part
    python data/sweeps/02_design/1_attention_claims.py recurrence needle  # these parts

recurrence  Transformer-XL on the characters of novels, with a memory, without, and with longer
            segments, trained alike for 240 steps, five seeds
reading     seconds to read characters with recurrence, and with a window for each of them
costs       seconds, bytes and pairs of every form of attention from 1,024 to 8,192 tokens; of
            entmax and Sparsefinder at 4,096
needle      a value that is far away: window, window and a global token, full attention, five seeds
patterns    Sparsefinder on the heads of an encoder and a decoder, five seeds

Times are the processor's seconds on one thread, in rounds that go through all forms in turn. On one
idle core the parts take about 4 minutes, 5 seconds, 2 minutes, 2 minutes and 1 minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from effnb.chapters.design.attention import forms, graphs, needle, recurrence
from effnb.design.attention import (
    EtcAttention,
    Projections,
    bucket_neighbours,
    count_pairs,
    entmax_attention,
    etc_pairs,
    neighbour_attention,
    quantization_buckets,
    window_pattern,
)
from effnb.evaluation import peak_memory
from effnb.lab import claims_bench, corpora, load
from effnb.lab.claims_bench import SEEDS, Table
from effnb.lab.sweeps import held_out_novel

ROUNDS = 7
HEADS, WIDTH, BUDGET = 4, 32, 128
LENGTHS = (1024, 2048, 4096, 8192)
RADIUS, GLOBAL = 64, 32
"""Of ETC: how far long tokens see each other, and how many global tokens there are."""
LONGEST = {"full, with a table": 4096, "full, masked": 4096}
"""Forms that store a table of all pairs."""
SLOW_TOKENS = 4096
"""The one length at which the two slowest forms are measured."""
FINDER_BUCKETS = 64
LAYERS = (1, 4)
DOCUMENTS = 12
SMALL = "small character models"


def missing(table: Table, rows: Iterable[dict[str, Any]]) -> bool:
    """Whether one of these rows is not stored yet."""
    return not all(any(about.items() <= row.items() for row in table.rows) for about in rows)


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor's seconds of each call in every round; the machine's moods meet all alike."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.process_time()
            call()
            found[name].append(round(time.process_time() - began, 7))
    return found


# ----------------------------------------------------------------------------------- recurrence


def novels() -> Tensor:
    """The characters of all novels of the training corpora, one behind the other."""
    return recurrence.encode(
        "\n".join(c.text for c in corpora.novels("train") if c.kind == "novel")
    )


def chapters(count: int = 24) -> Tensor:
    """The beginnings of chapters of a novel that is held out."""
    wanted = recurrence.JUDGED[1] + 1
    long_enough = [text for text in held_out_novel() if len(text) >= wanted]
    chosen = [long_enough[i * len(long_enough) // count] for i in range(count)]
    return torch.stack([recurrence.encode(text[:wanted]) for text in chosen])


def recurrent(table: Table) -> None:
    """Three arms, each read in every way."""
    for seed in SEEDS:
        for arm in recurrence.ARMS:
            rows = [
                {
                    "model": SMALL, "trained": arm, "read": reading, "seed": seed,
                    "table": "recurrence",
                }
                for reading in recurrence.READINGS
            ]  # fmt: skip
            if not missing(table, rows):
                continue
            model, read = recurrence.trained(arm, novels(), seed)
            texts = chapters()
            for row in rows:
                found = recurrence.judged(model, texts, row["read"], recurrence.ARMS[arm][0])
                table.add(row, lambda found=found, read=read: found | {"training_characters": read})


def reading(table: Table) -> None:
    """Two ways to read the same characters, each with at least a memory before it."""
    model = "small character model, untrained"
    rows = {
        name: {"model": model, "method": name, "table": "reading"}
        for name in ("recurrence", "window anew")
    }
    if missing(table, rows.values()):
        seconds = in_turn(recurrence.reach_calls(), ROUNDS)
        for name, row in rows.items():
            table.add(row, lambda name=name: {"seconds": seconds[name]})


# ---------------------------------------------------------------------------------------- costs


def etc_layer() -> EtcAttention:
    """ETC's attention without projections, which all forms would have alike."""
    layer = EtcAttention(HEADS * WIDTH, HEADS, RADIUS, clip=8, separate=False)
    layer.long = layer.globals = nn.ModuleList(nn.Identity() for _ in range(4))
    return layer.eval()


def sparsefinder(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Prediction from small projections, and attention over the pairs that are listed."""
    generator = torch.Generator().manual_seed(0)
    small = Projections(HEADS, WIDTH, graphs.RANK, generator=generator)
    queries, keys = small(q, k)
    ids = quantization_buckets(queries, keys, FINDER_BUCKETS)
    return neighbour_attention(q, k, v, bucket_neighbours(*ids, window=graphs.WINDOW))


def calls_of(tokens: int) -> dict[str, Callable[[], Any]]:
    """Every form of attention on the same random queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, WIDTH, generator=draw) for _ in range(3))
    x = torch.randn(1, tokens, HEADS * WIDTH, generator=draw)
    extra = torch.randn(1, GLOBAL, HEADS * WIDTH, generator=draw)
    etc = etc_layer()
    found: dict[str, Callable[[], Any]] = {
        "full, fused": lambda: forms.full(q, k, v),
        "full, with a table": lambda: forms.with_table(q, k, v),
        "ETC": lambda: etc(x, extra),
    }
    if tokens == SLOW_TOKENS:
        found["Sparsefinder"] = lambda: sparsefinder(q, k, v)
        found["full, entmax"] = lambda: entmax_attention(q, k, v)
    if tokens <= LONGEST["full, masked"]:
        mask = window_pattern(tokens, 2 * RADIUS, global_tokens=GLOBAL)
        found["full, masked"] = lambda: nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask
        )
    for name, form in forms.FORMS.items():
        found[name] = lambda form=form: form.run(q, k, v, BUDGET)
    return {name: f for name, f in found.items() if tokens <= LONGEST.get(name, tokens)}


def pairs_of(name: str, tokens: int) -> int | None:
    """Pairs of tokens that a form compares, where its pattern alone says so."""
    if name in ("full, fused", "full, with a table", "full, entmax", "full, masked"):
        return tokens**2
    if name == "ETC":
        return etc_pairs(GLOBAL, tokens, RADIUS)
    if name in ("window", "window and global") and tokens <= 4096:
        wide = BUDGET if name == "window" else BUDGET // 2
        globals_ = 0 if name == "window" else BUDGET // 2
        return count_pairs(window_pattern(tokens, wide, global_tokens=globals_))
    return None


def costs(table: Table) -> None:
    """Seconds, bytes and pairs over the length."""
    for tokens in LENGTHS:
        with torch.inference_mode():
            calls = calls_of(tokens)
            rows = {
                name: {
                    "model": f"attention of {HEADS} heads", "method": name, "tokens": tokens,
                    "table": "costs",
                }
                for name in calls
            }  # fmt: skip
            if not missing(table, rows.values()):
                continue
            seconds = in_turn(calls, ROUNDS)
            for name, row in rows.items():
                found: dict[str, Any] = {"seconds": seconds[name]}
                found["peak_bytes"] = peak_memory(calls[name])
                if (pairs := pairs_of(name, tokens)) is not None:
                    found["pairs"] = pairs
                table.add(row, lambda found=found: found)


# --------------------------------------------------------------------------------------- needle


def needles(table: Table) -> None:
    """Encoders that differ in who sees whom, asked for a value that is far away."""
    ids, values = needle.far_texts(96)
    for seed in SEEDS:
        for kind in needle.KINDS:
            row = {
                "model": "small encoders, 256 tokens", "method": kind, "seed": seed,
                "table": "needle",
            }  # fmt: skip

            def measure(kind: str = kind, seed: int = seed) -> dict[str, Any]:
                losses, right = needle.judged(needle.trained(kind, seed), ids, values)
                seen = needle.BATCH * sum(needle.lengths())
                return {"documents": losses, "right": right, "training_tokens": seen}

            table.add(row, measure)


# ------------------------------------------------------------------------------------- patterns

WINNERS = {"quantization": 16, "clustering": 8}
"""The registered settings of the two rules that do not compare all pairs."""


def patterns(table: Table) -> None:
    """Recall of predicted pairs, beside a window of as many, on held-out texts."""
    for name in ("minilm-l6", "mini-5m"):
        loaded = load(name, device="cpu")
        judged = graphs.layers_of(loaded, graphs.judged_ids(loaded, DOCUMENTS), LAYERS)
        for seed in SEEDS:
            about = {"model": name, "seed": seed, "table": "patterns"}
            wanted = [*WINNERS, "quantization, half of the pairs", "curves"]
            wanted += [f"window like {rule}" for rule in WINNERS]
            if not missing(table, [about | {"method": method} for method in wanted]):
                continue
            learned = graphs.layers_of(loaded, graphs.learning_ids(loaded, seed), LAYERS)
            found = [graphs.Finder(layer, seed=seed) for layer in learned]
            curves = {
                rule: [
                    graphs.mean_points(layers)
                    for layers in zip(
                        *(f.curve(rule, heads) for f, heads in zip(found, judged, strict=True)),
                        strict=True,
                    )
                ]
                for rule in graphs.SETTINGS
            }
            store(table, about, curves, judged)


def store(table: Table, about: dict[str, Any], curves: dict[str, list], judged: list) -> None:
    """The rows of one model and seed."""

    def rounded(values: Iterable[float]) -> list[float]:
        return [round(float(x), 5) for x in values]

    for rule, setting in WINNERS.items():
        (point,) = (p for p in curves[rule] if p.setting == setting)
        own = {"recall": rounded(point.recall), "sparsity": rounded(point.sparsity)}
        same = graphs.recall_at(curves["window"], point.sparsity)
        table.add(about | {"method": rule}, lambda own=own: own)
        table.add(
            about | {"method": f"window like {rule}"},
            lambda own=own, same=same: own | {"recall": same},
        )
    half = graphs.recall_at(curves["quantization"], [0.5] * DOCUMENTS)
    table.add(about | {"method": "quantization, half of the pairs"}, lambda: {"recall": half})
    used = [float((h.used.sum() / h.visible.sum()) / h.used[:, :, 0, 0].numel()) for h in judged]
    means = {
        rule: [rounded((p.setting, sum(p.recall) / DOCUMENTS, sum(p.sparsity) / DOCUMENTS))
               for p in curve]
        for rule, curve in curves.items()
    }  # fmt: skip
    table.add(
        about | {"method": "curves"}, lambda: {"curves": means, "used": [round(u, 4) for u in used]}
    )


PARTS = {
    "recurrence": recurrent,
    "reading": reading,
    "costs": costs,
    "needle": needles,
    "patterns": patterns,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
