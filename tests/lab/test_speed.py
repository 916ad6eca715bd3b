"""How long a reader waits for a panel (`make bench`; run alone, for it measures time)."""

import statistics
import time

import pytest
import torch

from effnb.evaluation import perplexity
from effnb.inference.quantization import dequantized, rtn
from effnb.lab import corpora, knob, load, panel

TOKENS = 4096
LIMIT = 1.5
"""Times one evaluation pass: what a panel may take to answer, once the model is compressed."""


def seconds(function):
    """How long a call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.bench
def test_a_panel_answers_within_one_and_a_half_evaluation_passes():
    loaded = load("mini-5m")
    text = "\n\n".join(corpora.documents("novels", "test"))[: TOKENS * 8]
    ids = torch.tensor(
        loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)[:TOKENS]
    )
    assert len(ids) == TOKENS
    models = {bits: dequantized(rtn(loaded.model, bits)) for bits in range(2, 9)}
    seen = []

    def compute(bits):
        with torch.inference_mode():
            found = perplexity(models[bits], ids).perplexity
        seen.append((bits, found))
        return found

    def draw(result, figure):
        axes = figure.subplots()
        axes.bar(["perplexity"], [result])
        axes.set_yscale("log")

    compute(8)  # warm up
    made = panel(
        compute,
        draw,
        text=lambda result: f"Perplexity: {result:.1f}",
        caption="Perplexity at the chosen number of bits.",
        bits=knob(2, 8, default=8),
    )
    made._ipython_display_()
    assert made.wait(60)
    answers, passes = [], []
    for bits in range(2, 8):  # one after the other, so that a busy machine is busy for both

        def answer(bits=bits):
            made.move(bits=bits)
            assert made.wait(60)

        answers.append(seconds(answer))
        passes.append(seconds(lambda bits=bits: compute(bits)))
    assert len(seen) == 2 + 2 * 6  # every answer was computed, none remembered
    ratio = statistics.median(a / b for a, b in zip(answers, passes))
    print(
        f"\none evaluation pass over {TOKENS:,} tokens: {statistics.median(passes):.2f} s; "
        f"a panel's answer: {statistics.median(answers):.2f} s; ratio {ratio:.2f} (limit {LIMIT})"
    )
    assert ratio <= LIMIT
