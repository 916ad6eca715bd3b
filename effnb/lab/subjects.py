"""What a quality panel tries its methods on: a bench's model, and the panel's look at it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from effnb.lab.bench import PANEL_WINDOWS, Bench, file_bytes
from effnb.lab.quality import Quality, Subject


def itself(model: nn.Module) -> nn.Module:
    """A model that is evaluated as it is."""
    return model


def subject(
    bench: Bench,
    evaluated: Callable[[nn.Module], nn.Module] = itself,
    size: Callable[[nn.Module], int] = file_bytes,
) -> Subject:
    """The bench's model, looked at on the first windows and questions only.

    Args:
        bench: What is measured on.
        evaluated: Gives the form that is quick to evaluate, such as packed weights read back.
        size: Bytes of the form that is stored.
    """

    def look(model: nn.Module) -> Quality:
        found = bench.look(evaluated(model), panel=True)
        return Quality(found.window_nats_per_token, found.correct, size(model), found.text)

    return Subject(bench.model, look, documents=bench.documents[:PANEL_WINDOWS])
