"""The panels of the chapter on retention."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from effnb.chapters.design.retention import methods, tables
from effnb.chapters.design.retention.twins import Twin
from effnb.design.retention import (
    CausalLM,
    RetNetLM,
    break_even_tokens,
    chunkwise_multiply_adds,
    decays,
    retention,
)
from effnb.lab import PALETTE, guess, knob, panel
from effnb.lab.changes import if_measured
from effnb.lab.claims_bench import by_document
from effnb.lab.panels import Panel

# --- writing --------------------------------------------------------------------------------------

TOKENS = (16, 32, 64, 256, 1024, 4096)
BATCHES = (1, 8, 32)


@if_measured
def writing(transformer: nn.Module, twin: Twin, ids: Tensor, tokenizer: Any) -> Panel:
    """What two models keep of a text that they write, and what a step takes them.

    Args:
        transformer: Such as mini-300k.
        twin: Its RetNet.
        ids: The text, at least as many tokens as the knob's last position.
        tokenizer: Of both models.
    """
    pair = {"Transformer": transformer, "RetNet": twin.model}
    config = transformer.config
    even = break_even_tokens(
        twin.model.config.head_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
    )

    def compute(tokens: int, batch: int) -> dict[str, Any]:
        token = torch.zeros(batch, 1, dtype=torch.long)
        found = {}
        for name, model in pair.items():
            one = methods.after(model, tokens, batch)
            one.step(token)
            times = [methods.processor_seconds(lambda one=one: one.step(token)) for _ in range(5)]
            found[name] = {"bytes": one.bytes, "seconds": median(times)}
        end = tokenizer.decode(ids[max(0, tokens - 12) : tokens])
        return {"found": found, "text": " ".join(end.split())}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        panes = fig.subplots(1, 2)
        names = list(result["found"])
        for axes, key, scale, title in zip(
            panes, ("bytes", "seconds"), (1e-3, 1e3), ("kept, kB", "a step, ms"), strict=True
        ):
            values = [scale * result["found"][name][key] for name in names]
            axes.barh(names, values, color=[PALETTE[1], PALETTE[0]], height=0.6)
            for y, value in enumerate(values):
                axes.text(value, y, f" {value:,.3g}", va="center", fontsize=9)
            axes.set_title(title)
            axes.margins(x=0.25)
        panes[1].set_yticks([])

    def text(result: Mapping[str, Any]) -> str:
        found = result["found"]
        return "\n".join(
            [f"{name} keeps: {tables.amount(found[name]['bytes'])}" for name in found]
            + [f"{name}, a step: {1e3 * found[name]['seconds']:.2f} ms" for name in found]
            + [f"The text ends with: … {result['text']}"]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Write on, and look at the memory",
        caption="Left: what each model keeps of the text in order to write on. Right: the "
        "processor's time for the next token of every text.",
        figsize=(5.2, 1.4),
        frames={"tokens": [16, 32, 4096]},
        predict=guess(
            "The RetNet keeps the same number of bytes after any number of tokens. After how many "
            "tokens does the Transformer's cache hold as many?",
            answer=lambda _: round(even),
            at={"tokens": 16},
            unit="tokens",
        ),
        tokens=knob(list(TOKENS), default=16, label="tokens written"),
        batch=knob(list(BATCHES), label="texts at once"),
    )


# --- chunks ---------------------------------------------------------------------------------------

CHUNKS = (1, 8, 32, 64, 128, 512, 2048)
SHAPE = methods.SHAPES["1m"]


def chunks() -> Panel:
    """Work and time of one layer's retention, over the size of the chunks."""
    hidden, _, _, heads, _ = SHAPE
    size, gamma = hidden // heads, decays(heads)

    known: dict[tuple[int, int], dict[str, Any]] = {}

    def measured(tokens: int, batch: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        q, k = (torch.randn(batch, heads, tokens, size, generator=draw) for _ in range(2))
        v = torch.randn(batch, heads, tokens, 2 * size, generator=draw)
        shown, times, outs = [c for c in CHUNKS if c < tokens] + [tokens], {}, {}
        for one in shown:
            form = {"form": "recurrent"} if one == 1 else {"chunk_size": one}

            def run(form: dict[str, Any] = form, one: int = one) -> None:
                outs[one] = retention(q, k, v, gamma, **form)[0]

            run()
            times[one] = min(methods.processor_seconds(run) for _ in range(2))
        largest = float(outs[1].abs().max())
        differences = {c: float((outs[c] - outs[1]).abs().max()) / largest for c in shown}
        work = {c: batch * chunkwise_multiply_adds(tokens, heads, size, 2 * size, c) for c in shown}
        return {"times": times, "work": work, "differences": differences}

    def compute(chunk: int, tokens: int, batch: int) -> dict[str, Any]:
        if (tokens, batch) not in known:
            known[tokens, batch] = measured(tokens, batch)
        return {"chunk": min(chunk, tokens), **known[tokens, batch]}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        for axes, key, scale, title in (
            (left, "work", 1e-6, "multiply-adds, 10⁶"),
            (right, "times", 1e3, "time here, ms"),
        ):
            x, y = list(result[key]), [scale * value for value in result[key].values()]
            axes.plot(x, y, "o-", color=PALETTE[0], markersize=4)
            at = result["chunk"]
            axes.plot([at], [scale * result[key][at]], "o", color=PALETTE[1], markersize=10)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(x[::2], [f"{c:,}" for c in x[::2]])
            axes.set_xlabel("tokens of a chunk")
            axes.set_title(title)

    def text(result: Mapping[str, Any]) -> str:
        at = result["chunk"]
        best = min(result["times"], key=result["times"].get)
        return "\n".join(
            [
                f"Multiply-adds: {result['work'][at] / 1e6:,.1f} million",
                f"Time: {1e3 * result['times'][at]:.2f} ms",
                f"Fastest chunk here: {best:,} tokens",
                f"Largest difference from one token at a time: {result['differences'][at]:.0e}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="From one token at a time to all at once",
        caption="One layer of mini-1m's shape. A chunk of 1 is the recurrent form, a chunk as long "
        "as the text the parallel one.",
        figsize=(5.0, 1.7),
        frames={"chunk": [1, 64]},
        predict=guess(
            "A text of 2,048 tokens is read in chunks. Which size takes the fewest multiply-adds?",
            ["1", "64", "2,048"],
            answer=lambda result: f"{min(result['work'], key=result['work'].get):,}",
            at={"tokens": 2048},
        ),
        chunk=knob(list(CHUNKS), default=64, label="tokens of a chunk"),
        tokens=knob([256, 1024, 2048], default=2048, label="tokens of the text"),
        batch=knob([1, 4], label="texts at once"),
    )


# --- decays ---------------------------------------------------------------------------------------

RANGES: dict[str, str | float] = {
    "the paper's": "paper",
    "the language models'": "lm",
    "0.5 in all heads": 0.5,
    "0.9 in all heads": 0.9,
    "0.99 in all heads": 0.99,
    "1: nothing is forgotten": 1.0,
}


def with_decay(model: RetNetLM, decay: str | float) -> RetNetLM:
    """The same weights with other decays; they are shared, not copied."""
    new = RetNetLM(replace(model.config, decay=decay))
    new.load_state_dict(copy.copy(model.state_dict()), assign=True)
    new.lm_head.weight = new.embedding.weight
    return new.eval()


@if_measured
def decay_ranges(twin: Twin, documents: Sequence[Tensor]) -> Panel:
    """What the trained twin loses when its heads remember longer or shorter than in training."""
    heads = twin.model.config.heads
    base: dict[int, float] = {}

    def loss(decay: str | float, tokens: int) -> float:
        model = CausalLM(with_decay(twin.model, decay))
        return fmean(by_document(model, [one[:tokens] for one in documents]))

    def compute(decay: str, tokens: int) -> dict[str, Any]:
        if tokens not in base:
            base[tokens] = loss("paper", tokens)
        found = base[tokens] if decay == "the paper's" else loss(RANGES[decay], tokens)
        gammas = decays(heads, RANGES[decay]).tolist()
        return {"gammas": gammas, "loss": found, "base": base[tokens]}

    def draw(result: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=(3, 2))
        x = torch.arange(256)
        for gamma, colour in zip(result["gammas"], PALETTE):
            left.plot(x, gamma**x, color=colour, linewidth=1.8)
        left.set_ylim(0, 1.05)
        left.set_xlabel("tokens back")
        left.set_title("weight in each head")
        values = [math.exp(result["base"]), math.exp(result["loss"])]
        right.barh(["trained", "now"], values, color=[PALETTE[2], PALETTE[1]], height=0.6)
        right.set_title("perplexity")

    def text(result: Mapping[str, Any]) -> str:
        factor = math.exp(result["loss"] - result["base"])
        gammas = ", ".join(f"{gamma:.4g}" for gamma in dict.fromkeys(result["gammas"]))
        return "\n".join(
            [
                f"Perplexity: {math.exp(result['loss']):,.1f}",
                f"Times the trained one's: {factor:.2f}",
                f"Decays of the heads: {gammas}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Make the twin remember longer, or shorter",
        caption="retnet-300k on a held-out novel, with the decays that it was trained with and "
        "with others. Nothing is trained again.",
        figsize=(4.8, 1.6),
        frames={"decay": ["the paper's", "0.5 in all heads"], "tokens": [64, 512]},
        predict=guess(
            "The twin's heads were trained to remember about 32 to 256 tokens. With a decay of 0.5 "
            "they remember two. How many times the perplexity does it have?",
            answer=lambda result: round(math.exp(result["loss"] - result["base"]), 1),
            at={"decay": "0.5 in all heads", "tokens": 512},
        ),
        decay=knob(list(RANGES), label="decays"),
        tokens=knob([64, 128, 256, 512], default=512, label="tokens of context"),
    )
