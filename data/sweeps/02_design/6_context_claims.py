"""The measurements behind the verdicts of `notebooks/02_design/6_context`.

    python data/sweeps/02_design/6_context_claims.py [zero_shot] [tuned]

zero_shot  `mini-5m` and `mini-1m`, untrained: every method at a scale of 4, with 512 and with 2,048
           tokens before the same tokens of each chapter (2 minutes on one idle core)
tuned      `mini-300k` after 2, 8 and 20 short steps of 2,048 tokens, five seeds (6 minutes)

A document is a chapter of the novel that no model was trained on. Rows are stored one by one and
are not measured again; `--fresh` forgets them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from effnb.core.training import TrainingSettings
from effnb.design.context import (
    extrapolation,
    fine_tune,
    ntk_aware,
    ntk_by_parts,
    position_interpolation,
    rotary_table,
    yarn,
)
from effnb.evaluation.long_context import context_losses
from effnb.lab import claims_bench, load
from effnb.lab.claims_bench import SEEDS, Table
from effnb.lab.texts import long_texts

TRAINED, TARGET, FACTOR = 512, 2048, 4.0
TARGETS = 256
"""The last tokens of each text: those that are scored, with every context."""
CHAPTERS = 12
STEPS = (2, 8, 20)
"""A tenth of the steps, and 2.5 times fewer, than the last."""
LEARNING_RATE = 1e-3


def larger_base(model: nn.Module, factor: float) -> nn.Module:
    """A base 100 times the trained one, as Code Llama's is, for texts of `factor` times L."""
    dim = rotary_table(model).dim
    return ntk_aware(model, max(factor, 100 ** ((dim - 2) / dim)))  # b s^(d/(d-2)) = 100 b


METHODS: dict[str, Callable[[nn.Module, float], nn.Module]] = {
    "RoPE": extrapolation,
    "PI": position_interpolation,
    "NTK-aware": ntk_aware,
    "NTK-by-parts": ntk_by_parts,
    "YaRN": yarn,
}
TUNED = {
    "RoPE": extrapolation,
    "PI": position_interpolation,
    "larger base": larger_base,
    "YaRN": yarn,
}


def texts(tokenizer) -> torch.Tensor:
    """The held-out chapters."""
    return long_texts(tokenizer, TARGET, count=CHAPTERS)


def judged(model: nn.Module, rows: torch.Tensor, context: int) -> dict:
    """The loss of the last tokens of each chapter."""
    found = context_losses(model, rows, [context], targets=TARGETS)
    return {"documents": [round(x, 5) for x in found.windows[0]]}


def divisors(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """By what the fastest and the slowest frequency were divided."""
    old = rotary_table(before).inv_freq
    new = after.model.rotary_emb.inv_freq
    first, *_, last = (old / new).tolist()
    return {"fastest_divisor": round(first, 6), "slowest_divisor": round(last, 6)}


def zero_shot(table: Table) -> None:
    """No training: the same weights, with other frequencies."""
    for name in ("mini-5m", "mini-1m"):
        model, rows = _loaded(name)
        original: list[float] = []
        for method, make in METHODS.items():
            longer = make(model, FACTOR)
            for context in (TRAINED, TARGET):
                about = {"table": "zero_shot", "model": name, "method": method, "context": context}
                table.add(about, partial(compared, model, longer, rows, context, tuple(original)))
                if not original:  # RoPE with 512 tokens comes first
                    first = next(row for row in table.rows if about.items() <= row.items())
                    original += first["documents"]


def compared(
    model: nn.Module,
    longer: nn.Module,
    rows: torch.Tensor,
    context: int,
    original: tuple[float, ...],
) -> dict:
    """The loss of each chapter, and by how much it is above the original's with 512 tokens."""
    found = judged(longer, rows, context)
    before = original or found["documents"]
    rises = [round(a - b, 5) for a, b in zip(found["documents"], before, strict=True)]
    return found | {"rise_documents": rises} | divisors(model, longer)


def _loaded(name: str) -> tuple[nn.Module, torch.Tensor]:
    loaded = load(name, device="cpu")
    return loaded.model, texts(loaded.tokenizer)


def tuned(table: Table) -> None:
    """Short training on longer texts, the same ones in the same order for every method."""
    loaded = load("mini-300k", device="cpu")
    rows = texts(loaded.tokenizer)
    training = long_texts(loaded.tokenizer, TARGET, "train")
    for seed in SEEDS:
        for method, make in TUNED.items():
            about = {"model": "mini-300k", "method": method, "seed": seed}
            have = {row["steps"] for row in table.rows if about.items() <= row.items()}
            if have >= set(STEPS):
                continue
            settings = TrainingSettings(
                steps=max(STEPS), learning_rate=LEARNING_RATE, warmup_steps=2, seed=seed,
                evaluate_every=2,
            )  # fmt: skip
            done = iter(range(2, max(STEPS) + 2, 2))

            def evaluate(model, done=done, about=about):
                steps = next(done)
                if steps in STEPS:
                    table.add(
                        about | {"steps": steps},
                        lambda: judged(model, rows, TARGET) | {"training_tokens": steps * TARGET},
                    )
                return {}

            fine_tune(make(loaded.model, FACTOR), training, settings, evaluate=evaluate)


PARTS = {"zero_shot": zero_shot, "tuned": tuned}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
