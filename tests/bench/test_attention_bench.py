"""Linear cost of blocked windows, as ratios in one run (`make bench`)."""

from __future__ import annotations

import pytest
import timing
import torch

from effnb.design.attention import sliding_window_attention
from effnb.kernels.local_attention import local_attention

pytestmark = pytest.mark.bench
SHORT, LONG, AT_MOST = 1024, 8192, 10
"""Eight times the tokens may take ten times the time, where the square would be 64 times."""


def measure_growth():
    """Median seconds of two blocked windows, at both lengths in turn."""
    functions = {}
    for tokens in (SHORT, LONG):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, 4, tokens, 32, generator=draw) for _ in range(3))
        far = torch.arange(tokens)[None] < 32
        functions[f"sliding window with sinks {tokens}"] = lambda q=q, k=k, v=v: (
            sliding_window_attention(q, k, v, window=128, sinks=4)
        )
        functions[f"window and global tokens {tokens}"] = lambda q=q, k=k, v=v, far=far: (
            local_attention(q, k, v, window=128, global_tokens=far)
        )
    return timing.in_turn(functions, 5)


def test_time_grows_with_the_length_and_not_with_its_square():
    seconds = timing.measured(__file__, "growth")
    for name in ("sliding window with sinks", "window and global tokens"):
        ratio = seconds[f"{name} {LONG}"] / seconds[f"{name} {SHORT}"]
        print(f"\n{name}: {ratio:.1f} times the time from {SHORT:,} to {LONG:,} tokens")
        assert ratio <= AT_MOST


if __name__ == "__main__":
    timing.answer(globals())
