"""Chinchilla's rule on the workbook's three sizes, from the losses recorded while they trained.

Each model's held-out loss was recorded every 100 or 200 steps. Up to three quarters of the run the
learning rate is constant; then it falls to 0, which lowers the loss by itself. Sizes are compared
on the constant part only, where all had the same rate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from statistics import fmean

from effnb.lab import table
from effnb.lab._files import data_folder
from effnb.lab.changes import spoken
from effnb.lab.tables import Table
from effnb.pretraining import objectives

SIZES = ("mini-300k", "mini-1m", "mini-5m")
CORPORA = ("novels", "packages", "manuals")
BUDGETS = (1e13, 1.5e13, 2e13, 2.5e13, 2.9e13, 4e13, 5e13, 6e13, 8e13, 1e14)
"""Operations at which at least two sizes have a recorded loss; see `comparable`."""


@dataclass(frozen=True)
class Curve:
    """What was recorded of one model.

    Attributes:
        name: Name of the model.
        parameters: $N$, the tied embedding counted once.
        points: Tokens read and mean held-out loss, at the constant learning rate.
        end: The same at the very end, after the rate fell to 0.
    """

    name: str
    parameters: int
    points: tuple[tuple[float, float], ...]
    end: tuple[float, float]

    def at(self, tokens: float) -> float | None:
        """The loss after so many tokens, between two records; None outside of the records."""
        if not self.points[0][0] <= tokens <= self.points[-1][0]:
            return None
        for (a, loss), (b, next_loss) in pairwise(self.points):
            if a <= tokens <= b:
                part = math.log(tokens / a) / math.log(b / a)
                return loss + part * (next_loss - loss)
        return self.points[-1][1]


@cache
def curves() -> dict[str, Curve]:
    """The three models, smallest first."""
    found = {}
    for name in SIZES:
        path = data_folder() / "models" / name / "training.json"
        history = json.loads(path.read_text(encoding="utf-8"))
        settings = history["settings"]
        each = history["tokens"] / settings["steps"]
        constant = (1 - settings["decay_fraction"]) * settings["steps"]
        records = [
            (each * one["step"], fmean(one[c] for c in CORPORA)) for one in history["held out"]
        ]
        points = tuple(p for p in records if p[0] <= constant * each)
        found[name] = Curve(name, history["parameters"], points, records[-1])
    return found


@dataclass(frozen=True)
class Slice:
    """All sizes that have a recorded loss at one compute.

    Attributes:
        flops: $C$.
        losses: The loss of each size after $D = C / 6N$ tokens.
    """

    flops: float
    losses: Mapping[str, float]

    @property
    def best(self) -> str:
        """The size with the lowest loss."""
        return min(self.losses, key=lambda name: self.losses[name])

    @property
    def nearest(self) -> str:
        """Of these sizes the one nearest, as a ratio, to what the rule asks for."""
        wanted = objectives.chinchilla(self.flops).parameters
        return min(self.losses, key=lambda name: abs(math.log(curves()[name].parameters / wanted)))

    @property
    def minimum(self) -> float | None:
        """The minimum of the parabola through three sizes; None with fewer, or outside of them."""
        if len(self.losses) < 3:
            return None
        sizes = [curves()[name].parameters for name in self.losses]
        return objectives.isoflop_minimum(sizes, list(self.losses.values()))


def sliced(flops: float) -> Slice:
    """The sizes at one compute."""
    found = {name: curve.at(flops / (6 * curve.parameters)) for name, curve in curves().items()}
    return Slice(flops, {name: loss for name, loss in found.items() if loss is not None})


def comparable() -> list[Slice]:
    """The budgets at which at least two sizes can be compared."""
    return [one for one in map(sliced, BUDGETS) if len(one.losses) > 1]


def slices_table() -> Table:
    """Losses at equal compute, and what the rule asks for."""
    lines = []
    for one in comparable():
        rule = objectives.chinchilla(one.flops)
        lines.append(
            {
                "operations": f"{one.flops:.1e}",
                "rule: parameters": round(rule.parameters / 1000),
                **{name: one.losses.get(name) for name in SIZES},
                "lowest": one.best,
                "nearest to the rule": one.nearest,
            }
        )
    form = dict.fromkeys(lines[0], "") | dict.fromkeys(SIZES, ".2f")
    return table(
        lines,
        form | {"rule: parameters": ",d"},
        caption="Held-out nats per token at equal compute, at the constant learning rate. The rule "
        "in thousands of parameters. Not measured: the size was not recorded there.",
    )


def judged() -> str:
    """How often the rule names the better size, and what was not reached."""
    slices = comparable()
    right = sum(one.best == one.nearest for one in slices)
    ratios = {name: curve.end[0] / curve.parameters for name, curve in curves().items()}
    first, last = slices[0], slices[-1]
    lines = [
        f"In {right} of {len(slices)} budgets the size nearest to the rule has the lowest loss "
        f"of those that can be compared, from {first.best} at {first.flops:.0e} operations to "
        f"{last.best} at {last.flops:.0e}.",
        "Tokens per parameter at the end of training: "
        + spoken([f"{name} {ratio:.0f}" for name, ratio in ratios.items()])
        + ". The rule says 20.",
    ]
    wanted = objectives.chinchilla(6 * curves()["mini-5m"].parameters * curves()["mini-5m"].end[0])
    lines.append(
        f"The operations of mini-5m would, by the rule, have been spent on "
        f"{wanted.parameters / 1e6:.1f} million parameters and {wanted.tokens / 1e6:.0f} million "
        "tokens."
    )
    return "\n".join(lines)


def fitted(sizes: Sequence[str] = SIZES) -> objectives.ScalingLaw:
    """The law through every record of these sizes at the constant learning rate."""
    runs = [
        (curves()[name].parameters, tokens, loss)
        for name in sizes
        for tokens, loss in curves()[name].points
    ]
    parameters, tokens, losses = zip(*runs, strict=True)
    return objectives.fit_scaling_law(parameters, tokens, losses)


def law_said(law: objectives.ScalingLaw, flops: float = 1e15) -> str:
    """The fitted exponents, and what the law makes of a budget beyond the records."""
    found = law.optimum(flops)
    share = law.beta / (law.alpha + law.beta)
    miss = max(
        abs(law.loss(curve.parameters, tokens) - loss)
        for curve in curves().values()
        for tokens, loss in curve.points
    )
    return (
        f"α = {law.alpha:.2f}, β = {law.beta:.2f}, E = {law.E:.1f} nats: N grows as C to the "
        f"{share:.2f}. At {flops:.0e} operations it asks for "
        f"{found.tokens_per_parameter:,.0f} tokens per parameter. Largest miss: {miss:.2f} nats."
    )
