"""The panels of the chapter on sharing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from effnb.chapters.design.sharing import methods
from effnb.design.sharing import (
    PerceiverConfig,
    UniversalTransformer,
    albert_parameters,
    factorize_embedding,
    latent_layer_multiply_adds,
    perceiver_multiply_adds,
    reading_multiply_adds,
    share_layers,
    transformer_multiply_adds,
)
from effnb.lab import PALETTE, guess, knob, panel, quality_panel
from effnb.lab.bench import Bench
from effnb.lab.panels import Panel
from effnb.lab.quality import Quality, Subject

SHAPES = {"base": (768, 3072, 12), "large": (1024, 4096, 24), "xlarge": (2048, 8192, 24)}
"""Width, feed-forward neurons and layers of BERT's and ALBERT's published sizes."""
TOKENS = 30_000


def count(size: str, groups: int, embedding: int) -> dict[str, float]:
    """Parameters and multiply-adds of an ALBERT, and of the model that shares nothing."""
    d, f, layers = SHAPES[size]
    E = d if embedding == 0 else embedding
    shared = albert_parameters(TOKENS, E, d, f, layers, groups=groups)
    plain = albert_parameters(TOKENS, d, d, f, layers, groups=layers) - d * d - d
    body = transformer_multiply_adds(512, d, f, layers)
    return {
        "parameters": shared - (d * d + d if embedding == 0 else 0),
        "plain": plain,
        "multiply_adds": body + (0 if embedding == 0 else 512 * E * d),
        "plain_multiply_adds": body,
    }


def counting() -> Panel:
    """What sharing and short token vectors do to the two counts."""

    def compute(size: str, groups: int, embedding: int) -> dict[str, float]:
        return count(size, groups, embedding)

    def draw(found: Mapping[str, float], fig: Figure) -> None:
        axes = fig.subplots()
        values = [
            100 * found["parameters"] / found["plain"],
            100 * found["multiply_adds"] / found["plain_multiply_adds"],
        ]
        axes.barh(["parameters", "multiply-adds"], values, color=[PALETTE[0], PALETTE[1]])
        axes.axvline(100, color="0.45", linestyle=":")
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xlabel("per cent of a model that shares nothing")

    def text(found: Mapping[str, float]) -> str:
        return "\n".join(
            [
                f"Parameters: {found['parameters']:,.0f}",
                f"Without sharing: {found['plain']:,.0f}",
                f"Fewer by: {found['plain'] / found['parameters']:.2f} times",
                f"Multiply-adds, 512 tokens: {found['multiply_adds']:.3g}",
                f"Without sharing: {found['plain_multiply_adds']:.3g}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Count twice",
        caption="An encoder of BERT's sizes with 30,000 tokens. Dotted: the model that shares "
        "nothing and has token vectors as wide as its stream.",
        figsize=(6.0, 1.6),
        main="groups",
        frames=[1, 2, 6, 12],
        predict=guess(
            "ALBERT-large has one set of weights for its 24 layers and token vectors of 128 "
            "numbers. How many times fewer parameters does it have than the same model without "
            "sharing?",
            answer=lambda found: round(found["plain"] / found["parameters"], 1),
            at={"size": "large", "groups": 1, "embedding": 128},
        ),
        size=knob(list(SHAPES), default="base"),
        groups=knob([1, 2, 3, 4, 6, 12], default=1, label="groups of layers"),
        embedding=knob([0, 64, 128, 256, 512], default=128, label="E (0: as wide as the stream)"),
    )


# --- a trained model ------------------------------------------------------------------------------


def subject(bench: Bench) -> Subject:
    """The bench's model, and the panel's look at it."""

    def look(model: nn.Module) -> Quality:
        found = bench.look(model, panel=True)
        return Quality(found.window_nats_per_token, found.correct, found.bytes, found.text)

    return Subject(bench.model, look)


def trained_methods() -> dict[str, Callable[..., nn.Module]]:
    """What can be done to a trained model without training it."""
    return {
        "short token vectors": lambda model, size: factorize_embedding(model, size),
        "share all, first layer's": lambda model, groups: share_layers(model, "all", groups),
        "share all, mean": lambda model, groups: share_layers(model, "all", groups, initial="mean"),
        "share attention, mean": lambda model, groups: share_layers(
            model, "attention", groups, initial="mean"
        ),
        "share feed-forward, mean": lambda model, groups: share_layers(
            model, "feed_forward", groups, initial="mean"
        ),
    }


def trained(bench: Bench) -> Panel:
    """mini-5m, made to share what it was not trained to share."""
    return quality_panel(
        subject(bench),
        trained_methods(),
        title="Share mini-5m",
        caption="Left: perplexity over size. Right: questions about package descriptions. Nothing "
        "is trained after the change.",
        frames={"size": [16, 256], "method": ["short token vectors", "share all, mean"]},
        predict=guess(
            "mini-5m has six layers that were trained apart. Now the second, fourth and sixth take "
            "the weights of the layer before them. How many times the original's perplexity does "
            "the model have?",
            answer=lambda found: round(math.exp(found.loss.difference), 1),
            at={"method": "share all, first layer's", "groups": 3},
        ),
        size=knob([16, 32, 64, 128, 256], default=64, label="E, width of token vectors"),
        groups=knob([1, 2, 3, 6], default=3, label="groups of layers"),
    )


# --- steps ----------------------------------------------------------------------------------------


def adding(model: UniversalTransformer) -> Panel:
    """A trained Universal Transformer adds, with as many steps as the knob gives it."""

    def compute(steps: int, digits: int) -> dict[str, Any]:
        rows = methods.addition_report(model, steps, digits)
        right = methods.addition_right(model, steps, digits)
        return {"rows": rows, "right": right, "steps": steps, "digits": digits}

    def draw(found: Mapping[str, Any], fig: Figure) -> None:
        left, right = fig.subplots(1, 2)
        chains = [row["chain"] for row in found["rows"]]
        left.bar(chains, [100 * row["right"] for row in found["rows"]], color=PALETTE[0])
        left.set_ylim(0, 104)
        left.set_title("right digits, per cent")
        right.bar(chains, [row["steps"] for row in found["rows"]], color=PALETTE[2])
        right.set_ylim(0, 8.3)
        right.set_title("steps taken, mean")
        for axes in (left, right):
            axes.set_xlabel("places that a carry comes through")

    def text(found: Mapping[str, Any]) -> str:
        first, last = found["rows"][0], found["rows"][-1]
        return "\n".join(
            [
                f"Right digits: {found['right']:.1%}",
                f"Right, no chain: {first['right']:.1%}",
                f"Right, chain of {last['chain']}: {last['right']:.1%}",
                f"Steps, no chain: {first['steps']:.2f}",
                f"Steps, chain of {last['chain']}: {last['steps']:.2f}",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Give it steps",
        caption="A Universal Transformer that was trained to add numbers of ten digits. The same "
        "block is applied at most so many times.",
        figsize=(6.2, 2.1),
        frames=[1, 2, 6],
        steps=knob(1, 8, default=6, label="steps at most"),
        digits=knob([5, 10, 15, 20], default=10),
    )


# --- latents --------------------------------------------------------------------------------------


def latents() -> Panel:
    """A Perceiver reads an input, here and now, beside the Transformer of its width."""

    def compute(latents: int, layers: int, tokens: int) -> dict[str, float]:
        d = methods.WIDTH
        config = PerceiverConfig(
            d, latents, d, layers, heads=methods.HEADS, cross_heads=methods.HEADS, widening=2
        )
        model = methods.Perceiver(config).eval()
        x = torch.zeros(1, tokens, d)
        model(x)
        return {
            "latents": latents,
            "layers": layers,
            "tokens": tokens,
            "parameters": config.parameters,
            "reading": reading_multiply_adds(tokens, config),
            "depth": layers * latent_layer_multiply_adds(config),
            "whole": perceiver_multiply_adds(tokens, config),
            "transformer": transformer_multiply_adds(tokens, d, 2 * d, layers),
            "seconds": methods.processor_seconds(lambda: model(x), 2),
        }

    def draw(found: Mapping[str, float], fig: Figure) -> None:
        axes = fig.subplots()
        axes.barh("Perceiver", found["reading"], color=PALETTE[0], label="reads the input once")
        axes.barh(
            "Perceiver", found["depth"], left=found["reading"], color=PALETTE[2],
            label="layers on the latents",
        )  # fmt: skip
        axes.barh("Transformer", found["transformer"], color=PALETTE[1], label="layers on tokens")
        axes.invert_yaxis()
        axes.set_xlabel("multiply-adds")
        axes.legend()

    def text(found: Mapping[str, float]) -> str:
        return "\n".join(
            [
                f"Reading: {found['reading']:,.0f} multiply-adds",
                f"Layers: {found['depth']:,.0f} multiply-adds",
                f"Transformer: {found['transformer']:,.0f} multiply-adds",
                f"Transformer / Perceiver: {found['transformer'] / found['whole']:.2f}",
                f"Parameters: {found['parameters']:,.0f}",
                f"Here and now: {1e3 * found['seconds']:.2f} ms",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title="Latents and length",
        caption=f"A Perceiver and a Transformer of {methods.WIDTH} channels and equal depth. Only "
        "the reading grows with the input.",
        figsize=(6.2, 1.9),
        main="tokens",
        frames=[128, 1024, 4096],
        latents=knob([4, 16, 64, 256], default=64, label="N, latents"),
        layers=knob([1, 2, 4, 8, 16], default=8, label="L, layers"),
        tokens=knob([128, 512, 1024, 2048, 4096], default=1024, label="M, tokens of input"),
    )
