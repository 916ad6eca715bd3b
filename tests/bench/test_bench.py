"""Speed that is promised, measured as ratios in one run (`make bench`)."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest
import timing

from effnb.chapters.design.context import methods
from effnb.evaluation import perplexity
from effnb.evaluation.long_context import chunked_losses
from effnb.inference.quantization import dequantized, rtn
from effnb.lab import load
from effnb.lab.bench import PANEL_QUESTIONS, PANEL_WINDOWS, Bench
from effnb.lab.texts import long_texts

pytestmark = pytest.mark.bench
AT_MOST = 1.5
"""Passes that the answer of a panel may take."""
LENGTHS = (512, 2048, 4096)


def measure_bench():
    """What a panel on quality asks of a model, and one pass over 4,096 tokens."""
    bench = Bench("mini-5m", windows=PANEL_WINDOWS, questions=PANEL_QUESTIONS)
    model = dequantized(rtn(bench.model, 4))
    ids = long_texts(bench.tokenizer, 4096, count=1)[0]
    answer = lambda: bench.look(model, panel=True)  # noqa: E731
    return timing.in_turn({"answer": answer, "pass": lambda: perplexity(model, ids)}, 7)


def measure_context():
    """What the panel that stretches a model asks of it, and one pass over as many tokens."""
    loaded = load("mini-5m", device="cpu")
    ids = long_texts(loaded.tokenizer, max(LENGTHS), count=1)[0]
    functions = {}
    for length in LENGTHS:

        def answer(length=length):
            longer = methods.longer(loaded.model, "YaRN", 8.0, length=length)
            methods.read(loaded.model, longer, "YaRN", ids[:length])

        functions[f"answer {length}"] = answer
        functions[f"pass {length}"] = lambda n=length: chunked_losses(loaded.model, ids[None, :n])
    return timing.in_turn(functions, 5)


def test_a_panel_on_quality_answers_within_one_and_a_half_passes():
    seconds = timing.measured(__file__, "bench")
    ratio = seconds["answer"] / seconds["pass"]
    print(f"\npanel's answer / one evaluation pass over 4,096 tokens: {ratio:.2f}")
    assert ratio <= AT_MOST


def test_a_stretched_model_answers_within_one_and_a_half_passes():
    seconds = timing.measured(__file__, "context")
    for length in LENGTHS:
        ratio = seconds[f"answer {length}"] / seconds[f"pass {length}"]
        print(f"\nstretched model's answer / one pass over {length:,} tokens: {ratio:.2f}")
        assert ratio <= AT_MOST


def test_corpora_load_in_under_a_second():
    """From a fresh process, so that nothing is cached; reading packages is the longest."""
    code = (
        "import time; from effnb.lab import corpora; start = time.perf_counter(); "
        "corpora.packages(); print(time.perf_counter() - start)"
    )
    seconds = statistics.median(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(5)
    )
    print(f"\nloading the largest corpus: {seconds:.2f} s")
    assert seconds < 1.0


if __name__ == "__main__":
    timing.answer(globals())
