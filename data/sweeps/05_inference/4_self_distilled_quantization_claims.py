"""The measurements behind the verdicts of `notebooks/05_inference/4_self_distilled_quantization`.

    python data/sweeps/05_inference/4_self_distilled_quantization_claims.py [minilm] [errors] …

minilm    errors of every module of MiniLM, rounded (2 minutes)
errors    the same of five classifiers on `mini-multi` (9 minutes, of which fine-tuning 8)
students  teacher, rounding, and students on labels, answers and attention at 8, 6 and 4 bits, five
          seeds (25 minutes)
depth     what attention gains with six blocks and with two, five seeds (10 minutes)
cost      operations and seconds of a training step (1 minute)

Minutes are those of one idle core, estimated. Classifiers are fine-tuned once for all parts and
kept in `build/teachers/`. All but `minilm` need the trained encoder (`data/train_multi.py`).
"""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import nn

from effnb.chapters.inference.self_distilled_quantization import languages, methods
from effnb.inference import self_distilled_quantization as sdq
from effnb.lab import claims_bench, load
from effnb.lab.claims_bench import Table
from effnb.lab.task_inputs import encoder_batch

SEEDS = (0, 1, 2, 3, 4)
BITS = methods.BITS
DEPTHS = (6, 2)
TEXTS = 2
"""Held-out texts of each language that errors are measured on."""
TURNS = 8
"""Repeated timings."""
STEPS, TAUGHT = methods.STEPS, methods.TAUGHT
LONGER = STEPS * sdq.step_passes(teacher=True) // sdq.step_passes(teacher=False)
"""Steps on labels alone that cost what the others cost, their teacher's passes counted."""


@cache
def encoder() -> Any:
    """The multilingual encoder."""
    return load(methods.MODEL, device="cpu")


@cache
def teacher(seed: int, layers: int | None = None) -> nn.Module:
    """A fine-tuned classifier."""
    return methods.fine_tuned(encoder(), seed, layers=layers, steps=TAUGHT)


def add_errors(table: Table, about: dict[str, Any], model: nn.Module, batches: list) -> None:
    """Errors of a model that is rounded at each of the bits, a row for every role."""
    for bits in BITS:
        row = about | {"bits": bits}
        if any(row.items() <= r.items() for r in table.rows):
            continue
        found = methods.role_errors(sdq.module_errors(model, methods.rounded(model, bits), batches))
        for role, values in found.items():
            table.add(row | {"role": role}, lambda values=values: values)


def minilm(table: Table) -> None:
    """A sentence encoder that people use: English texts only."""
    loaded = load("minilm-l6", device="cpu")
    texts = languages.held_out("en")[: TEXTS * len(languages.LANGUAGES)]
    half = len(texts) // 2
    batches = [encoder_batch(loaded.tokenizer, part) for part in (texts[:half], texts[half:])]
    add_errors(table, {"model": "minilm-l6", "setting": "errors"}, loaded.model, batches)


def errors(table: Table) -> None:
    """Five classifiers, on texts of all languages."""
    batches = languages.text_batches(encoder().tokenizer, languages.LANGUAGES, TEXTS)
    for seed in SEEDS:
        about = {"model": methods.MODEL, "setting": "errors", "seed": seed}
        add_errors(table, about, teacher(seed), batches)


def students(table: Table) -> None:
    """Every method at every number of bits, and labels alone for longer."""
    tokenizer = encoder().tokenizer

    def judged(model: nn.Module, steps: int = 0) -> dict[str, Any]:
        right = languages.judge(model, tokenizer)
        return languages.measured(right) | {"steps": steps}

    for seed in SEEDS:
        about = {"model": methods.MODEL, "setting": "students", "seed": seed}
        table.add(about | {"method": "teacher"}, lambda s=seed: judged(teacher(s)))

        def run(method: str, bits: int, steps: int, seed: int = seed, **changed: Any) -> dict:
            kind = method if method in methods.METHODS else "QAT"
            model = methods.trained(
                teacher(seed), tokenizer, kind, bits, seed, steps=steps, **changed
            )
            return judged(model, steps)

        for bits in BITS:
            point = about | {"bits": bits}
            table.add(
                point | {"method": "PTQ"},
                lambda b=bits, s=seed: judged(methods.rounded(teacher(s), b)),
            )
            for method in methods.METHODS:
                table.add(
                    point | {"method": method}, lambda m=method, b=bits, run=run: run(m, b, STEPS)
                )
        point = about | {"bits": 4}
        table.add(
            point | {"method": "QAT for longer"}, lambda run=run: run("QAT for longer", 4, LONGER)
        )
        table.add(
            point | {"method": "QAT, noise"},
            lambda run=run: run("QAT, noise", 4, STEPS, noise=methods.NOISE),
        )
        for method in ("PTQ", "SDQ"):
            table.add(
                {**point, "setting": "lost", "method": method},
                lambda m=method, s=seed: {"lost": lost(m, s)},
            )


def lost(method: str, seed: int) -> dict[str, list[float]]:
    """What each source package lost in each language at 4 bits: 1, 0, or -1 where it gained."""
    tokenizer = encoder().tokenizer
    before = languages.judge(teacher(seed), tokenizer)
    after = languages.judge(
        methods.trained(teacher(seed), tokenizer, method, 4, seed, **_steps(method)), tokenizer
    )
    return {
        language: [rows[d] - after[language][d] for d in rows] for language, rows in before.items()
    }


def _steps(method: str) -> dict[str, int]:
    return {} if method == "PTQ" else {"steps": STEPS}


def depth(table: Table) -> None:
    """The gain over labels alone, for a deep classifier and a shallow one."""
    tokenizer = encoder().tokenizer
    for seed in SEEDS:
        for layers in DEPTHS:

            def measure(seed: int = seed, layers: int = layers) -> dict[str, Any]:
                exact = teacher(seed, None if layers == DEPTHS[0] else layers)
                found = {
                    method: languages.by_document(
                        languages.judge(
                            methods.trained(exact, tokenizer, method, 4, seed, steps=STEPS),
                            tokenizer,
                        ),
                        languages.LANGUAGES,
                    )
                    for method in ("QAT", "SDQ")
                }
                gains = [round(found["SDQ"][d] - found["QAT"][d], 3) for d in found["QAT"]]
                means = {m: round(sum(v.values()) / len(v), 4) for m, v in found.items()}
                return {"benefit": gains, "accuracies": means, "steps": STEPS}

            about = {"model": methods.MODEL, "setting": "depth", "layers": layers, "seed": seed}
            table.add(about, measure)


def cost(table: Table) -> None:
    """One training step of each method, counted and timed."""
    exact = teacher(0)
    batch = languages.batches(encoder().tokenizer, 0)(0)
    losses = {
        method: {k: v for k, v in given.items() if k != "noise"}
        for method, given in methods.METHODS.items()
    }
    prepared = {
        method: sdq.prepare_quant_noise(exact, 4, noise=given["noise"], block_size=methods.BLOCK)
        for method, given in methods.METHODS.items()
    }
    for method, given in losses.items():
        loss = sdq.sdq(exact, alpha=methods.ALPHA, **given)

        def measure(method: str = method, loss: Any = loss) -> dict[str, Any]:
            model = prepared[method].train()
            seconds = []
            for turn in range(TURNS + 1):
                torch.manual_seed(turn)
                began = time.perf_counter()
                loss(model, batch).backward()
                seconds.append(round(time.perf_counter() - began, 5))
            return {"flops": sdq.step_flops(model, loss, batch), "seconds": seconds[1:]}

        about = {"model": methods.MODEL, "setting": "cost", "method": method}
        table.add(about, measure)


PARTS = {
    "minilm": minilm,
    "errors": errors,
    "students": students,
    "depth": depth,
    "cost": cost,
}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
