"""Speed that is promised, measured as ratios in one run (`make bench`)."""

import ast
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effnb.evaluation import perplexity
from effnb.inference.quantization import dequantized, rtn
from effnb.lab import corpora, load

pytestmark = pytest.mark.bench
TOUR = Path(__file__).parents[2] / "notebooks" / "00_start_here.py"


def functions_of_the_tour(*names):
    """The named functions as the tour defines them, and what it imports."""
    tree = ast.parse(TOUR.read_text(encoding="utf-8"))
    wanted = [
        node
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.FunctionDef) and node.name in names)
        or (
            isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") in ("PROMPT", "GROUPS")
        )
    ]
    scope: dict = {}
    exec(compile(ast.Module(wanted, []), TOUR.name, "exec"), scope)
    return [scope[name] for name in names]


def median_ratio(a, b, pairs=7):
    """Median over pairs of time(a) / time(b), the two in turn."""
    a(), b()
    ratios = []
    for _ in range(pairs):
        times = []
        for function in (a, b):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def test_a_panel_answers_within_one_and_a_half_passes():
    """Everything the first panel asks of a model, against one pass over 4,096 tokens."""
    bench, look = functions_of_the_tour("bench", "look")
    loaded = load("mini-5m")
    data = bench(loaded)
    model = dequantized(rtn(loaded.model, 4))
    text = "\n\n".join(corpora.documents("novels", "test")[:6])
    ids = torch.tensor(loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False))[
        :4096
    ]

    def answer():
        with torch.inference_mode():
            look(model, loaded, data)

    ratio = median_ratio(answer, lambda: perplexity(model, ids))
    print(f"\npanel's answer / one evaluation pass over 4,096 tokens: {ratio:.2f}")
    assert ratio <= 1.5


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
