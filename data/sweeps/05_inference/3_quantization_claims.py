"""The measurements behind the verdicts of `notebooks/05_inference/3_quantization`.

    python data/sweeps/05_inference/3_quantization_claims.py [PART ...]

mini              rounding to nearest and GPTQ on `mini-5m`, five draws of calibration text
domains           the loss on every kind of text, on all held-out documents
mixed             bits chosen per layer, beside the same bits for all, at equal bytes and data
training          rounded after, while fine-tuning, and during training: one budget for all
smollm2           the first two on `smollm2-135m`
smollm2_mixed     mixed precision there, at the bytes of 3 bits
smollm2_training  all ways of training there, at 3 bits
speed             `smollm2-135m` packed, with heads of 4 and of 8 bits: seconds, bytes, quality

What is measured of every run is said in `effnb/lab/claims_bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.modules import clone
from effnb.core.training import TrainingSettings, train
from effnb.evaluation import decode_tokens_per_second, file_bytes
from effnb.finetuning import lora
from effnb.inference import quantization
from effnb.inference.quantization import dequantized
from effnb.lab import claims_bench
from effnb.lab.claims_bench import SEEDS, Bench, Table, by_document, domains_of
from effnb.lab.sweeps import timed, training_batches

CHOICES = (2, 3, 4)
TURNS = 9
TRAINING = {"mini-5m": (30, (8, 128)), "smollm2-135m": (20, (4, 128))}
"""Steps, and sequences and tokens of each batch: the budget of everything that trains."""
PTQ, QAF, QAT = "PTQ: trained, then GPTQ", "QAF: GPTQ, then LoRA", "QAT from GPTQ"


def rounded(table: Table, bench: Bench, settings: tuple[tuple[int, str | int], ...]) -> None:
    """Rounding to nearest, and GPTQ with five draws of calibration text."""
    table.add({"model": bench.name, "method": "original"}, lambda: bench.judged(bench.model))
    for bits, group in settings:
        about = {"model": bench.name, "bits": bits, "group_size": str(group)}
        nearest = quantization.rtn(bench.model, bits, group_size=group)
        table.add(
            about | {"method": "RTN"}, lambda nearest=nearest: bench.judged(dequantized(nearest))
        )
        for seed in SEEDS:

            def by_gptq(seed: int = seed, bits: int = bits, group: Any = group) -> dict:
                given = bench.calibration(seed)
                packed, seconds = timed(
                    quantization.gptq, bench.model, given, bits, group_size=group
                )
                return bench.judged(dequantized(packed), given) | {"seconds": seconds}

            table.add(about | {"method": "GPTQ", "seed": seed}, by_gptq)


def kinds_of_text(table: Table, bench: Bench, nearest: tuple, by_gptq: tuple | None) -> None:
    """The loss of every document of every kind of text, before and after."""
    documents = domains_of(bench.loaded)

    def judged(model: nn.Module) -> dict[str, Any]:
        return {"domains": {name: by_document(model, of) for name, of in documents.items()}}

    def about(method: str, setting: tuple) -> dict[str, Any]:
        named = {"bits": setting[0], "group_size": str(setting[1])}
        return {"model": bench.name, "table": "domains", "method": method} | named

    table.add(
        {"model": bench.name, "table": "domains", "method": "original"},
        lambda: judged(bench.model),
    )
    bits, group = nearest
    table.add(
        about("RTN", nearest),
        lambda: judged(dequantized(quantization.rtn(bench.model, bits, group_size=group))),
    )
    for seed in SEEDS if by_gptq else ():

        def with_gptq(seed: int = seed) -> dict[str, Any]:
            given, (bits, group) = bench.calibration(seed), by_gptq
            return judged(
                dequantized(quantization.gptq(bench.model, given, bits, group_size=group))
            )

        table.add(about("GPTQ", by_gptq) | {"seed": seed}, with_gptq)


def mini(table: Table) -> None:
    """The workbook's model."""
    rounded(table, Bench("mini-5m"), ((4, 64), (3, "row"), (2, 64)))


def domains(table: Table) -> None:
    """Does quantization hurt one kind of text more than another?"""
    kinds_of_text(table, Bench("mini-5m"), (3, "row"), (2, 64))


def smollm2(table: Table) -> None:
    """Both on a model of 135 million parameters, whose weights lie on a 4-bit grid: at 3 bits."""
    bench = Bench("smollm2-135m")
    rounded(table, bench, ((3, 64),))
    kinds_of_text(table, bench, (3, 64), None)


# ------------------------------------------------------------------------------ mixed precision


def costs_of(model: nn.Module, given: Tensor, by: str) -> dict[str, dict[int, float]]:
    """What each layer costs at each number of bits, by one measure; all see the same text."""
    rounding = partial(quantization.quantize, group_size=64)
    if by == "hessian":
        traces = quantization.hessian_traces(model, given, samples=8)
        return quantization.hessian_sensitivity(model, traces, CHOICES, rounding=rounding)
    measure = {
        "loss": quantization.loss_sensitivity,
        "output": quantization.output_sensitivity,
    }[by]
    return measure(model, given, CHOICES, rounding=rounding)


def mixtures(
    table: Table, bench: Bench, measures: tuple[str, ...], budgets: tuple[tuple[int, int], ...]
) -> None:
    """Mixed bits by each measure, and uniform ones, at the bytes of each budget; GPTQ in both."""
    sizes = quantization.layer_bytes(bench.model, CHOICES, group_size=64)
    for seed in SEEDS:
        given = bench.calibration(seed)
        costs: dict[str, dict] = {}

        def gptq(model: nn.Module, bits: int, given: Tensor = given, **more: Any) -> nn.Module:
            return quantization.gptq(model, given, bits, group_size=64, **more)

        def mixed(
            by: str, allowed: int, given: Tensor = given, costs: dict = costs, gptq: Any = gptq
        ) -> dict:
            if by not in costs:
                costs[by] = costs_of(bench.model, given, by)
            chosen = quantization.allocate(costs[by], sizes, allowed)

            packed = quantization.mixed_precision(bench.model, chosen, gptq)
            used = quantization.allocation_bytes(sizes, chosen)
            return bench.judged(dequantized(packed), given) | {"layer_bytes": used}

        def uniform(bits: int, group: int, given: Tensor = given) -> dict:
            packed = quantization.gptq(bench.model, given, bits, group_size=group)
            return bench.judged(dequantized(packed), given)

        for bits, group in budgets:
            counted = quantization.layer_bytes(bench.model, (bits,), group_size=group)
            allowed = sum(size[bits] for size in counted.values())
            budget = f"{bits} bits, groups of {group}"
            common = {"model": bench.name, "budget": budget, "seed": seed}
            table.add(
                common | {"method": "uniform GPTQ"},
                lambda b=bits, g=group, a=allowed: uniform(b, g) | {"layer_bytes": a},
            )
            for by in measures:
                table.add(
                    common | {"method": "mixed GPTQ", "by": by},
                    lambda by=by, a=allowed: mixed(by, a),
                )


def mixed(table: Table) -> None:
    """By the rise of the loss and by curvature, at 3 bits and at the 2.56 of 2 bits in groups."""
    mixtures(table, Bench("mini-5m"), ("loss", "hessian"), ((3, 64), (2, 32)))


def smollm2_mixed(table: Table) -> None:
    """By the error of the outputs, the one measure that takes minutes at this size."""
    mixtures(table, Bench("smollm2-135m"), ("output",), ((3, 64),))


# ------------------------------------------------------------------- after, while and in training


def learner(bench: Bench, seed: int, steps: int, shape: tuple[int, int]) -> Callable:
    """The one budget: the same steps on the same batches, whatever trains."""
    batches = training_batches(bench.loaded, seed, steps, shape)

    def learn(student: nn.Module, rate: float) -> float:
        settings = TrainingSettings(
            steps=steps, learning_rate=rate, warmup_steps=steps // 6, schedule="cosine",
            clip_norm=1.0, seed=seed,
        )  # fmt: skip
        return train(student, batches.__getitem__, settings).seconds

    return learn


def trainings(
    table: Table, bench: Bench, bit_widths: tuple[int, ...], steps: int, shape: tuple[int, int]
) -> None:
    """Three orders of rounding and training, from one start, with one budget, bit by bit."""
    rates = {"all": 1e-4, "LoRA": 5e-4}
    tokens = {"training_tokens": steps * shape[0] * shape[1]}
    for seed in SEEDS:
        given, learn = bench.calibration(seed), learner(bench, seed, steps, shape)
        names = [PTQ, QAF, QAT, "QAT", "trained, then RTN"]
        common = {"model": bench.name, "seed": seed}
        wanted = [common | {"method": m, "bits": b} for m in names for b in bit_widths]
        if all(any(one.items() <= row.items() for row in table.rows) for one in wanted):
            continue
        trained = clone(bench.model).requires_grad_(True)
        plain_seconds = learn(trained, rates["all"])

        def add(
            method: str, bits: int, start: str, model: nn.Module, seconds: float,
            seen: Tensor | None, trainable: int, common: dict = common,
        ) -> None:  # fmt: skip
            row = bench.judged(model, seen) | tokens
            row |= {"seconds": round(seconds, 2), "optimizer_bytes": 8 * trainable}
            table.add(common | {"method": method, "bits": bits, "start": start}, lambda: row)

        everything = sum(p.numel() for p in trained.parameters())
        for bits in bit_widths:
            nearest = dequantized(quantization.rtn(trained, bits, group_size=64))
            add("trained, then RTN", bits, "original", nearest, plain_seconds, None, everything)
            after, seconds = timed(quantization.gptq, trained, given, bits, group_size=64)
            whole = plain_seconds + seconds
            add(PTQ, bits, "original", dequantized(after), whole, given, everything)
            packed, seconds = timed(quantization.gptq, bench.model, given, bits, group_size=64)
            tuned = lora.attach(packed, rank=8, alpha=16, seed=seed)
            whole = seconds + learn(tuned, rates["LoRA"])
            few = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
            add(QAF, bits, "GPTQ", tuned, whole, given, few)
            for method, start, from_, before, seen in (
                (QAT, "GPTQ", dequantized(packed), seconds, given),
                ("QAT", "original", bench.model, 0.0, None),
            ):
                student = quantization.prepare_qat(from_, bits, method="ste", group_size=64)
                whole = before + learn(student, rates["all"])
                done = dequantized(quantization.convert(student))
                add(method, bits, start, done, whole, seen, everything)


def training(table: Table) -> None:
    """The workbook's model at 3 and at 2 bits: each is judged on its own."""
    trainings(table, Bench("mini-5m"), (3, 2), *TRAINING["mini-5m"])


def smollm2_training(table: Table) -> None:
    """A model of 135 million parameters at 3 bits, with fewer steps."""
    trainings(table, Bench("smollm2-135m"), (3,), *TRAINING["smollm2-135m"])


# ----------------------------------------------------------------------------------------- speed


def speed(table: Table) -> None:
    """Packed models with the quality of the very model that is timed, in turns with float32."""
    bench = Bench("smollm2-135m")
    prompt = bench.documents[0][None, :16]
    models = {
        "original": bench.model,
        "packed int8": quantization.fast(bench.model, 8),
        "packed int4": quantization.fast(bench.model, 4),
        "packed int4, 4-bit head": quantization.fast(bench.model, 4, head=4),
        "packed int4, float head": quantization.fast(bench.model, 4, head=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, model in models.items():
            rate = decode_tokens_per_second(model, prompt, tokens=24, runs=1)
            seconds[name].append(round(1 / rate, 5))
    for name, model in models.items():
        measured = {
            "decode_seconds": seconds[name],
            "bytes": file_bytes(model),
            "threads": torch.get_num_threads(),
        }
        about = {"model": bench.name, "method": name}
        table.add(about | {"table": "speed"}, lambda measured=measured: measured)
        table.add(about, lambda model=model: bench.judged(model))


PARTS = {
    "mini": mini, "domains": domains, "mixed": mixed, "training": training, "smollm2": smollm2,
    "smollm2_mixed": smollm2_mixed, "smollm2_training": smollm2_training, "speed": speed,
}  # fmt: skip

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
