"""The pictures of the chapter on experts, each with its caption and alternative text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import torch
from matplotlib.figure import Figure

from effnb.chapters.design.experts import methods, tables
from effnb.design import experts
from effnb.design.experts import Routing
from effnb.lab import PALETTE, figure, name_lines
from effnb.lab.changes import Row, if_measured, pick
from effnb.lab.figures import CaptionedFigure


@if_measured
def result(data: Row) -> CaptionedFigure:
    """Loss over parameters, all at the same operations per token."""
    rows = data["table"]
    names = ["dense", *(f"Switch {n}" for n in tables.COUNTS)]
    points = {
        name: (
            fmean(r["parameters"] for r in pick(rows, name=name)),
            [r["loss"] for r in pick(rows, name=name)],
            fmean(r["flops"] for r in pick(rows, name=name)),
        )
        for name in names
        if pick(rows, name=name)
    }
    work = points["dense"][2]

    def draw(fig: Figure) -> None:
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        xs = [x / 1e6 for x, _, _ in points.values()]
        ys = [fmean(losses) for _, losses, _ in points.values()]
        left.plot(xs, ys, "-", color=PALETTE[0], linewidth=2.8)
        for (name, (x, losses, _)), y in zip(points.items(), ys, strict=True):
            left.plot([x / 1e6] * len(losses), losses, ".", color="0.6", markersize=5)
            left.annotate(
                "dense" if name == "dense" else name.split()[1], (x / 1e6, y),
                textcoords="offset points", xytext=(8, -12),
            )  # fmt: skip
        left.plot(xs, ys, "o", color=PALETTE[0])
        left.set_xlabel("million parameters")
        left.set_ylabel("nats per token")
        right.bar(
            range(len(points)), [flops / work for *_, flops in points.values()],
            color=[PALETTE[1]] + [PALETTE[0]] * (len(points) - 1), width=0.6,
        )  # fmt: skip
        labels = ["dense" if n == "dense" else n.split()[1] for n in points]
        right.set_xticks(range(len(points)), labels)
        right.set_ylabel("operations per token / dense")

    return figure(
        draw,
        caption=f"Twins trained for {data['steps']} steps on the same texts. Left: the loss on a "
        "novel that none has seen, over all parameters; the labels count experts, grey points are "
        "seeds. Right: the work that a token takes.",
        alt="; ".join(
            f"{name}: {x / 1e6:.2f} million parameters, {fmean(losses):.3f} nats, "
            f"{flops / work:.2f} times the dense twin's operations"
            for name, (x, losses, flops) in points.items()
        )
        + ".",
        figsize=(6.8, 2.7),
    )


def seating(routing: Routing, words: Sequence[str] | None = None) -> CaptionedFigure:
    """Which token sits at which expert, and who found no seat."""
    count, time = routing.count, routing.logits.shape[1]
    taken = torch.zeros(count, time)
    for token, expert, asked, kept in zip(
        routing.tokens.tolist(), routing.experts.tolist(), routing.asked.tolist(),
        routing.kept.tolist(), strict=True,
    ):  # fmt: skip
        if asked:
            taken[expert, token] = 1 if kept else -1
    lost = [t for t in range(time) if bool((taken[:, t] == -1).any())]
    loads = [int((taken[e] != 0).sum()) for e in range(count)]

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for e in range(count):
            for t in range(time):
                value = float(taken[e, t])
                if value > 0:
                    axes.plot(t, e, "s", color=PALETTE[0], markersize=11)
                elif value < 0:
                    axes.plot(t, e, "X", color=PALETTE[1], markersize=11)
        axes.set_yticks(range(count), [f"expert {e}" for e in range(count)])
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlim(-0.6, time - 0.4)
        axes.set_xticks(range(time), words or [str(t) for t in range(time)])
        axes.grid(True, color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel("token")

    seats = "any number of" if routing.capacity is None else routing.capacity
    return figure(
        draw,
        caption=f"{time} tokens, {count} experts with {seats} seats each. A square is a seat, a "
        "cross a token that found its expert full.",
        alt=f"Tokens that want each expert: {', '.join(map(str, loads))}. Without a seat: "
        f"{', '.join(map(str, lost)) or 'none'}.",
        figsize=(6.6, 0.55 * count + 0.9),
    )


def drops(count: int = 8, factors: Sequence[float] = (1.0, 1.25, 1.5)) -> CaptionedFigure:
    """What a fair router drops, by the formula and measured."""
    curves: dict[float, list[tuple[int, float, float]]] = {}
    for factor in factors:
        for tokens in methods.TOKENS:
            measured, formula = methods.measured_drops(tokens, count, factor, draws=50)
            curves.setdefault(factor, []).append((tokens, measured, formula))

    def draw(fig: Figure) -> None:
        axes = fig.subplots()
        for colour, (factor, points) in zip(PALETTE, curves.items()):
            x, dots, line = zip(*points, strict=True)
            axes.plot(x, [100 * y for y in line], color=colour, label=f"factor {factor:g}")
            axes.plot(x, [100 * y for y in dots], "o", color=colour, markersize=5)
        rule = [100 * experts.approximate_drops(t, count) for t in methods.TOKENS]
        axes.plot(methods.TOKENS, rule, ":", color="0.3", linewidth=1.5)
        axes.set_xscale("log")
        axes.set_xticks(methods.TOKENS, [f"{t:,}" for t in methods.TOKENS])
        axes.minorticks_off()
        axes.set_xlabel("tokens that share the seats")
        axes.set_ylabel("dropped, per cent")
        name_lines(axes)

    return figure(
        draw,
        caption=f"A perfectly fair random router with {count} experts drops tokens all the same. "
        "Lines: the formula. Points: 50 groups of random tokens. Dotted: the rule of thumb for a "
        "factor of 1.",
        alt="; ".join(
            f"factor {factor:g}: " + ", ".join(f"{f:.1%} of {t}" for t, _, f in points)
            for factor, points in curves.items()
        )
        + ".",
        figsize=(6.2, 2.6),
    )


@if_measured
def loads(data: Row) -> CaptionedFigure:
    """How the tokens of held-out text are spread over experts, with and without the loss."""
    rows = data["table"]
    shown = {n: w for n, w in tables.WEIGHTS.items() if pick(rows, name=n)}
    shares = {name: pick(rows, name=name)[0]["load"] for name in shown}

    def draw(fig: Figure) -> None:
        panes = fig.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (name, weight) in zip(panes, shown.items(), strict=True):
            for block, (colour, load) in enumerate(zip(PALETTE, shares[name])):
                x = [e + 0.4 * (block - 0.5) for e in range(len(load))]
                axes.bar(
                    x, [100 * s for s in sorted(load, reverse=True)], 0.38, color=colour,
                    label=f"block {block}",
                )  # fmt: skip
            axes.axhline(100 / len(shares[name][0]), color="0.3", linestyle=":")
            axes.set_title(f"weight {weight:g}")
            axes.set_xlabel("expert, busiest first")
            axes.set_xticks([])
        panes[0].set_ylabel("tokens, per cent")
        panes[-1].legend()

    return figure(
        draw,
        caption="Utilization: which part of the tokens of held-out text wants each of 8 experts, "
        "after training with three weights of the loss for balance, one seed. Dotted: the fair "
        "share.",
        alt="; ".join(
            f"weight {weight:g}: the busiest expert of each block has "
            + " and ".join(f"{max(load):.0%}" for load in shares[name])
            for name, weight in shown.items()
        )
        + ".",
        figsize=(6.8, 2.4),
    )


def watching(found: methods.Watched, fig: Figure, other: methods.Watched | None = None) -> None:
    """The loads of a small training over its steps, and what was dropped."""
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    loads = list(zip(*found.loads, strict=True))
    order = sorted(range(len(loads)), key=lambda e: -loads[e][-1])
    steps = range(len(found.losses))
    left.stackplot(
        steps, [[100 * x for x in loads[e]] for e in order],
        colors=[PALETTE[i % len(PALETTE)] for i in range(len(order))], alpha=0.85,
        edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    left.set_ylim(0, 100)
    left.set_xlim(0, len(found.losses) - 1)
    left.set_title("who wants whom, per cent")
    left.set_xlabel("step")
    for one, style in ((other, "--"), (found, "-")):
        if one is not None:
            right.plot(steps, [100 * d for d in one.dropped], style, color=PALETTE[1])
            right.plot(steps, [100 * x for x in one.losses], style, color=PALETTE[0])
    right.set_ylim(0, None)
    right.set_title("dropped, %; error × 100")
    right.set_xlabel("step")


def alternative(loads: Mapping[str, float]) -> str:
    """Shares as a sentence for readers who do not see the picture."""
    return ", ".join(f"{name} {share:.0%}" for name, share in loads.items())
