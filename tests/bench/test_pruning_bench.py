"""Speed of pruning, as ratios in one run (`make bench`); tests/shared/timing.py says how."""

from __future__ import annotations

import pytest
import timing
import torch

from effnb.inference import pruning
from effnb.lab import corpora, load

pytestmark = pytest.mark.bench
COUNT, LENGTH = 16, 256
"""Calibration sequences, and tokens of each."""
PROMISED = {"SparseGPT": 4, "SparseGPT, 2:4": 5, "Wanda": 3}
"""At most so many forward passes over the same tokens. Two of them are those that every layer-wise
method makes: one to see the inputs, one through what was pruned."""


def measure_methods():
    """Median seconds of the methods and of reading their tokens once, all of them in turn."""
    loaded = load("mini-5m", device="cpu")
    model = loaded.model.eval()
    text = "\n\n".join(corpora.documents("novels", "train")[:40])[: 12 * COUNT * LENGTH]
    ids = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
    ids = torch.tensor(ids[: COUNT * LENGTH]).view(COUNT, LENGTH)

    def forward():
        with torch.inference_mode():
            for part in ids.split(8):
                model.model(input_ids=part, use_cache=False)

    functions = {
        "forward pass": forward,
        "SparseGPT": lambda: pruning.sparsegpt(model, ids, 0.5),
        "SparseGPT, 2:4": lambda: pruning.sparsegpt(model, ids, pattern="2:4"),
        "Wanda": lambda: pruning.wanda(model, ids, 0.5),
    }
    return timing.in_turn(functions, 7)


def test_sparsegpt_beside_the_forward_passes_it_needs():
    seconds = timing.measured(__file__, "methods")
    print(f"\nmini-5m, all layers, in forward passes over {COUNT} x {LENGTH} tokens:")
    passes = {key: value / seconds["forward pass"] for key, value in seconds.items()}
    for key, value in passes.items():
        print(f"  {key:24s} {value:6.2f}")
    for key, value in passes.items():
        assert value <= PROMISED.get(key, 1)


if __name__ == "__main__":
    timing.answer(globals())
