"""Linear cost of chunkwise retention, as ratios in one run (`make bench`)."""

from __future__ import annotations

import pytest
import timing
import torch

from effnb.chapters.design.retention.methods import build, training_step
from effnb.design.retention import decays, retention

pytestmark = pytest.mark.bench
SHORT, LONG, AT_MOST = 1024, 8192, 10
"""Eight times the tokens may take ten times the time, where the square would be 64 times."""


def measure_growth():
    """Median seconds of chunkwise retention and of a training step, at both lengths in turn."""
    functions, gamma = {}, decays(4)
    for tokens in (SHORT, LONG):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 4, tokens, 32, generator=draw) for _ in range(3))
        functions[f"retention {tokens}"] = lambda q=q, k=k, v=v: retention(q, k, v, gamma)
        functions[f"training step {tokens}"] = training_step(build("RetNet", "300k"), tokens)
    return timing.in_turn(functions, 5)


def test_time_grows_with_the_length_and_not_with_its_square():
    seconds = timing.measured(__file__, "growth")
    for name in ("retention", "training step"):
        ratio = seconds[f"{name} {LONG}"] / seconds[f"{name} {SHORT}"]
        print(f"\n{name}: {ratio:.1f} times the time from {SHORT:,} to {LONG:,} tokens")
        assert ratio <= AT_MOST


if __name__ == "__main__":
    timing.answer(globals())
