"""The stored measurements of `notebooks/05_inference/3_quantization` (`make results`).

    python data/sweeps/05_inference/3_quantization.py                 # every part, some hours
    python data/sweeps/05_inference/3_quantization.py methods domains # these parts

Each part is written to `data/results/05_inference/3_quantization/<part>.json`:

methods    rounding to nearest, GPTQ and AWQ at 2 to 8 bits, and the other formats, on `mini-5m`
outliers   the same and W8A8 / W6A6 after function-preserving outlier injection
domains    what quantization costs on novels, the Bible, package descriptions and translations
mixed      bits chosen per layer under a budget, against uniform bits of equal size
training   quantization after, while fine-tuning, and in training: quality and cost, three seeds
control    the same training steps without any rounding, three seeds
cache      the key-value cache at 2, 4 and 8 bits
minilm     retrieval quality of `minilm-l6` at 2, 3 and 4 bits: every query's rank
smollm2    `smollm2-135m` at 3 and 4 bits: quality
speed      `smollm2-135m`: tokens per second of packed layers beside float32
decoding   the same file decoded by us and by llama.cpp, in turn, on one thread and on two; about
           six minutes on two idle cores, after `make bench-llama-cpp` has installed llama.cpp

Quality is measured as `effnb.lab.bench` says; the loss of each window is stored, so that two
settings can be compared pair by pair.
"""

from __future__ import annotations

import os
import random
import sys
import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean, median

import torch
from gguf import GGUFReader
from torch import nn
from transformers import DynamicCache

from effnb.core.modules import clone, share
from effnb.core.outliers import inject_key_outliers, inject_outliers
from effnb.core.training import TrainingSettings, train
from effnb.evaluation import decode_tokens_per_second, retrieval
from effnb.finetuning import lora
from effnb.inference import quantization
from effnb.inference.quantization import QuantizedLinear, dequantized
from effnb.inference.quantization.compiled import PARTS as PARTS_OF_STEP
from effnb.inference.quantization.decoding import Step, step_of
from effnb.lab import corpora, load, sweeps
from effnb.lab.bench import file_bytes
from effnb.lab.llama_cpp import LlamaCpp, gguf_file
from effnb.lab.sweeps import (
    CALIBRATION,
    CONTEXT,
    SEEDS,
    SMOLLM2_WINDOWS,
    calibration,
    domain_windows,
    timed,
)


class Bench(sweeps.Bench):
    """The fixed texts and questions; rows also tell what the packed form takes."""

    def row(self, model: nn.Module, packed: nn.Module | None = None, **about) -> dict:
        """Quality of a model, and the bytes of its packed form."""
        about["layer_bits"] = 16.0 if packed is None else round(layer_bits(packed), 4)
        return super().row(model, file_bytes(self.model if packed is None else packed), **about)


def layer_bits(packed: nn.Module) -> float:
    """Mean bits stored per weight of the quantized layers, scales and all."""
    layers = [m.quantized for m in packed.modules() if isinstance(m, QuantizedLinear)]
    return 8 * sum(q.bytes for q in layers) / sum(q.shape[0] * q.shape[1] for q in layers)


# ------------------------------------------------------------------------------------ parts


def methods() -> dict:
    """Every method at every number of bits."""
    bench = Bench()
    model = bench.model
    table = [bench.row(model, method="original", bits=16, group_size="none", seed=0)]

    def add(packed: nn.Module, **about) -> None:
        table.append(bench.row(dequantized(packed), packed, **about))

    for group_size in ("row", 64):
        for bits in range(2, 9):
            about = {"bits": bits, "group_size": str(group_size)}
            packed, seconds = timed(quantization.rtn, model, bits, group_size=group_size)
            add(packed, method="RTN", seed=0, seconds=seconds, **about)
            for seed in SEEDS if bits < 5 else SEEDS[:1]:
                given = calibration(bench.loaded, seed)
                packed, seconds = timed(
                    quantization.gptq, model, given, bits, group_size=group_size
                )
                add(packed, method="GPTQ", seed=seed, seconds=seconds, **about)
            if bits > 4:
                continue
            given = calibration(bench.loaded, 0)
            clipped = quantization.rtn(model, bits, group_size=group_size, clip="mse")
            add(clipped, method="RTN, clipped", seed=0, **about)
            packed, seconds = timed(
                quantization.gptq, model, given, bits, group_size=group_size, act_order=True
            )
            add(packed, method="GPTQ, act-order", seed=0, seconds=seconds, **about)
            packed, seconds = timed(quantization.awq, model, given, bits, group_size=group_size)
            add(packed, method="AWQ", seed=0, seconds=seconds, **about)
    return {"model": "mini-5m", "calibration": CALIBRATION, "table": table}


def outliers() -> dict:
    """Weights and activations, before and after the function-preserving injection of outliers."""
    bench = Bench()
    many = inject_outliers(bench.model, range(0, 256, 16), 8.0)
    few = inject_outliers(bench.model, [40, 170], 40.0)
    given = calibration(bench.loaded, 0)
    table = []
    for label, model in (("none", bench.model), ("8 x on 16 channels", many)):
        table.append(bench.row(model, method="original", injected=label, weights=32, inputs=32))
        for bits in (4, 3):
            for method, packed in (
                ("RTN", quantization.rtn(model, bits, group_size=64)),
                ("AWQ", quantization.awq(model, given, bits, group_size=64)),
                ("GPTQ", quantization.gptq(model, given, bits, group_size=64)),
            ):
                about = {"method": method, "injected": label, "weights": bits, "inputs": 32}
                table.append(bench.row(dequantized(packed), packed, **about))
    for label, model in (("none", bench.model), ("40 x on 2 channels", few)):
        if label != "none":
            table.append(bench.row(model, method="original", injected=label, weights=32, inputs=32))
        for bits in (8, 6):
            for per, level in (("tensor", "O2"), ("token", "O1")):
                about = {"injected": label, "weights": bits, "inputs": bits, "per": per}
                plain = quantization.quantize_activations(model, bits, bits, granularity=per)
                table.append(bench.row(plain, method="plain", **about))
                smooth = quantization.smoothquant(
                    model, given, 0.5, weight_bits=bits, activation_bits=bits, level=level
                )
                table.append(bench.row(smooth, method="SmoothQuant", **about))
            about = {"injected": label, "weights": bits, "inputs": bits, "per": "token"}
            rotated = quantization.quarot(model, bits, bits)
            table.append(bench.row(rotated, method="rotation", **about))
        kept = quantization.llm_int8(model, threshold=6.0)
        about = {"injected": label, "weights": 8, "inputs": 8, "per": "token"}
        table.append(bench.row(kept, method="LLM.int8()", **about))
    return {"model": "mini-5m", "calibration": CALIBRATION, "table": table}


def domains() -> dict:
    """The same loss for everyone? Each domain's windows under each setting."""
    bench = Bench()
    windows = domain_windows(bench.loaded, 48, 256)
    given = calibration(bench.loaded, 0)
    models = {"original": bench.model}
    for bits, group_size in ((4, 64), (3, "row"), (2, 64)):
        at = f"{bits} bits, {quantization.group_size_label(group_size)}"
        models[f"RTN, {at}"] = dequantized(
            quantization.rtn(bench.model, bits, group_size=group_size)
        )
        models[f"GPTQ, {at}"] = dequantized(
            quantization.gptq(bench.model, given, bits, group_size=group_size)
        )
    table, spread = {}, {}
    for name, model in models.items():
        found = {domain: predictions(model, rows) for domain, rows in windows.items()}
        table[name] = {domain: losses for domain, (losses, _) in found.items()}
        spread[name] = {domain: flat for domain, (_, flat) in found.items()}
        means = {d: round(sum(x) / len(x), 4) for d, x in table[name].items()}
        print(name, means, spread[name], flush=True)
    return {"model": "mini-5m", "window": 256, "table": table, "entropy": spread}


@torch.inference_mode()
def predictions(model: nn.Module, windows: torch.Tensor) -> tuple[list[float], float]:
    """The loss of each window, and the mean entropy of the predictions: how flat they are."""
    losses: list[torch.Tensor] = []
    total = 0.0
    for part in windows.split(4):
        logs = model(input_ids=part[:, :-1]).logits.float().log_softmax(-1)
        losses.append(-logs.gather(2, part[:, 1:, None]).squeeze(2).mean(1))
        total -= float((logs.exp() * logs).sum(-1).sum())
    found = [round(x, 5) for x in torch.cat(losses).tolist()]
    return found, round(total / windows[:, 1:].numel(), 4)


def mixed() -> dict:
    """2, 3 or 4 bits for each layer, against the same bits for all, at equal bytes.

    The costs are measured on as much text as the other methods are calibrated with. Uniform bits
    are measured in several group sizes, which fill the gaps between whole numbers of bits.
    """
    bench = Bench()
    choices, group_size = (2, 3, 4), 64
    given = calibration(bench.loaded, 0)
    sizes = quantization.layer_bytes(bench.model, choices, group_size=group_size)
    rounding = partial(quantization.quantize, group_size=group_size)
    rounded = partial(quantization.rtn, group_size=group_size)
    traces = quantization.hessian_traces(bench.model, given[: len(given) // 2], samples=8)
    costs = {
        "loss": quantization.loss_sensitivity(bench.model, given, choices, rounding=rounding),
        "output": quantization.output_sensitivity(bench.model, given, choices, rounding=rounding),
        "hessian": quantization.hessian_sensitivity(
            bench.model, traces, choices, rounding=rounding
        ),
    }
    data: dict = {"model": "mini-5m", "choices": choices, "group_size": group_size, "table": []}

    def add(allocation: dict[str, int], **about) -> dict:
        packed = quantization.mixed_precision(bench.model, allocation, rounded)
        row = bench.row(dequantized(packed), packed, **about)
        data["table"].append(row | {"allocation": allocation})
        return row

    added = {"uniform 2 bits": dict.fromkeys(sizes, 2)}
    for bits, size in (
        (2, 128), (2, 64), (2, 32), (2, 16), (3, 128), (3, 64), (3, 32), (4, 128), (4, 64)
    ):  # fmt: skip
        packed = quantization.rtn(bench.model, bits, group_size=size)
        row = bench.row(
            dequantized(packed), packed, by="uniform", method="uniform", bits=bits, group_size=size
        )
        data["table"].append(row)
        if (bits, size) == (3, group_size):
            data["uniform"] = row
    least, most = (sum(size[b] for size in sizes.values()) for b in (2, 4))
    middle = sum(size[3] for size in sizes.values())
    for budget in (middle, *(round(least + x * (most - least)) for x in (0.15, 0.3, 0.7))):
        bits = 2 + 2 * (budget - least) / (most - least)
        for by, method in (
            ("loss", "exact"), ("loss", "greedy"), ("output", "exact"), ("hessian", "exact")
        ):  # fmt: skip
            chosen = quantization.allocate(costs[by], sizes, budget, method)
            row = add(chosen, by=by, method=method, bits=round(bits, 3), budget=budget)
            if (by, method, budget) == ("loss", "exact", middle):
                data["exact"] = row
                added["mixed, bytes of uniform 3 bits"] = chosen
    data["additivity"] = {}
    for name, chosen in added.items():
        check = quantization.additivity(
            bench.model, chosen, costs["loss"], given, quantizer=rounded
        )
        data["additivity"][name] = {"predicted": check.predicted, "together": check.measured}
        print(name, data["additivity"][name], flush=True)
    data["sensitivity"] = {
        name: {str(b): round(x, 6) for b, x in by_bits.items()}
        for name, by_bits in costs["loss"].items()
    }
    return data


TRAINING_STEPS, TRAINING_SHAPE = 30, (8, 128)
# A small part of the peak rate of the model's own training, 2e-3: it has been annealed.
RATES = {"LoRA on GPTQ": 5e-4, "PEQA on GPTQ": 1e-4, "QAT": 1e-4, "QAT, LSQ": 1e-4}


def training_settings(rate: float, seed: int) -> TrainingSettings:
    """The same short run for everything that trains."""
    return TrainingSettings(
        steps=TRAINING_STEPS, learning_rate=rate, warmup_steps=5, schedule="cosine", clip_norm=1.0,
        seed=seed,
    )  # fmt: skip


def training() -> dict:
    """After training, while fine-tuning, in training: the same steps on the same batches."""
    bench = Bench()
    table = [bench.row(bench.model, method="original", stage="none", bits=16, seed=0)]

    def prepare(method: str, packed: nn.Module, bits: int, seed: int) -> nn.Module:
        if method == "LoRA on GPTQ":
            return lora.attach(packed, rank=8, alpha=16, seed=seed)
        if method == "PEQA on GPTQ":
            return quantization.tune_scales(packed)
        kind = "ste" if method == "QAT" else "lsq"
        return quantization.prepare_qat(
            bench.model, bits, method=kind, group_size=64, symmetric=kind == "lsq"
        )

    for seed in SEEDS:
        batches = [
            calibration(bench.loaded, 1000 * (seed + 1) + step, TRAINING_SHAPE)
            for step in range(TRAINING_STEPS)
        ]
        for bits in (4, 3, 2):
            given = calibration(bench.loaded, seed)
            for method, make, more in (
                ("RTN", quantization.rtn, ()),
                ("GPTQ", quantization.gptq, (given,)),
            ):
                packed, seconds = timed(make, bench.model, *more, bits, group_size=64)
                tokens = 0 if method == "RTN" else given.numel()
                about = {"stage": "after training", "trainable": 0, "tokens": tokens}
                about |= {"method": method, "bits": bits, "seed": seed, "seconds": seconds}
                table.append(bench.row(dequantized(packed), packed, **about))
            for method, rate in RATES.items():
                student = prepare(method, packed, bits, seed)
                result = train(student, batches.__getitem__, training_settings(rate, seed))
                trained = [p for p in student.parameters() if p.requires_grad]
                about = {
                    "method": method, "bits": bits, "seed": seed,
                    "stage": "in training" if method.startswith("QAT") else "while fine-tuning",
                    "seconds": round(result.seconds, 2),
                    "tokens": TRAINING_STEPS * TRAINING_SHAPE[0] * TRAINING_SHAPE[1],
                    "trainable": sum(p.numel() for p in trained),
                }  # fmt: skip
                table.append(bench.row(student, **about) | {"stored": stored_size(student, method)})
    return {"model": "mini-5m", "steps": TRAINING_STEPS, "rates": RATES, "table": table}


def control() -> dict:
    """What the steps of `training` do by themselves, where nothing is rounded."""
    bench = Bench(questions=0)
    table = [bench.row(bench.model, method="original", seed=0)]
    for seed in SEEDS:
        batches = [
            calibration(bench.loaded, 1000 * (seed + 1) + step, TRAINING_SHAPE)
            for step in range(TRAINING_STEPS)
        ]
        for method, rate in (("all weights", RATES["QAT"]), ("LoRA", RATES["LoRA on GPTQ"])):
            student = (
                lora.attach(bench.model, rank=8, alpha=16, seed=seed)
                if method == "LoRA"
                else clone(bench.model).requires_grad_(True)
            )
            train(student, batches.__getitem__, training_settings(rate, seed))
            table.append(bench.row(student, method=method, seed=seed))
    return {"model": "mini-5m", "steps": TRAINING_STEPS, "table": table}


def stored_size(student: nn.Module, method: str) -> int:
    """Bytes of a trained model as it would be stored."""
    if method.startswith("QAT"):
        return file_bytes(quantization.convert(student))
    return file_bytes(quantization.to_quantized(student) if "PEQA" in method else student)


def cache() -> dict:
    """Loss and bytes with a quantized key-value cache, with and without outliers in the keys."""
    bench = Bench(questions=0)
    windows = bench.windows[:8]
    table = []
    for label, model in (
        ("none", bench.model),
        ("10 x on 2 channels", inject_key_outliers(bench.model, [1, 9], 10.0)),
    ):
        for bits in (16, 8, 4, 2):
            for axis in ("channel", "token"):
                past = (
                    DynamicCache()
                    if bits == 16
                    else quantization.KiviCache(
                        model.config, bits=bits, group_size=32, residual=32, key_axis=axis,
                        quantized_prompt=True,
                    )
                )  # fmt: skip
                losses = quantization.decode_losses(model, windows, past).mean(1)
                # What is not packed is float32 here, and counted at 16 bits in every row.
                if bits == 16:
                    numbers = 2 * sum(layer.keys.numel() for layer in past.layers)
                    packed, latest = 0, 2 * numbers
                else:
                    numbers = past.fp16_bytes // 2
                    packed, latest = past.bytes - past.residual_bytes, past.residual_bytes // 2
                table.append(
                    {
                        "injected": label, "bits": bits, "keys": axis, "numbers": numbers,
                        "packed_bytes": packed, "latest_bytes": latest, "bytes": packed + latest,
                        "loss": round(float(losses.mean()), 5),
                        "windows": [round(x, 5) for x in losses.tolist()],
                    }
                )  # fmt: skip
                print({k: v for k, v in table[-1].items() if k != "windows"}, flush=True)
    return {"model": "mini-5m", "tokens": CONTEXT, "table": table}


def minilm() -> dict:
    """Find a package's long description from its one-line synopsis, with a rounded encoder.

    Stored are the rank of every query's own description, so that two settings can be compared query
    by query, and the package that was found first for a few queries that the original gets right.
    """
    encoder = load("minilm-l6", device="cpu")
    chosen = [p for p in corpora.packages("test") if len(p.text) > 300]
    chosen = random.Random(0).sample(chosen, 400)
    # Texts of like length are encoded together: less padding.
    chosen.sort(key=lambda package: len(package.text[:600]))
    queries, documents = [p.synopsis for p in chosen], [p.text[:600] for p in chosen]

    def search(model: nn.Module) -> tuple[list[int], list[int]]:
        """Rank of each query's own description, and which description came first."""
        rounded = replace(encoder, model=model)
        vectors = rounded.encode(queries), rounded.encode(documents)
        return list(retrieval(*vectors).ranks), (vectors[0] @ vectors[1].T).argmax(1).tolist()

    def row(model: nn.Module, packed: nn.Module | None = None, **about) -> dict:
        ranks, first = search(model)
        row = about | {
            "ranks": ranks,
            "recall_at_1": round(sum(rank == 1 for rank in ranks) / len(ranks), 4),
            "found": [chosen[first[i]].name for i in shown],
            "bytes": file_bytes(packed or model),
        }
        print({k: v for k, v in row.items() if k != "ranks"}, flush=True)
        return row

    right = [i for i, rank in enumerate(search(encoder.model)[0]) if rank == 1]
    shown = random.Random(0).sample(right, 6)
    table = [row(encoder.model, method="original", bits=16, group_size="none", seed=0)]

    texts = [p.text[:600] for p in random.Random(1).sample(corpora.packages("train"), 64)]
    batch = encoder.tokenizer(
        texts, padding=True, truncation=True, max_length=128, return_tensors="pt"
    )
    for bits in (4, 3, 2):
        for group_size in ("row", 64):
            packed = quantization.rtn(encoder.model, bits, group_size=group_size)
            about = {"bits": bits, "group_size": str(group_size)}
            table.append(row(dequantized(packed), packed, method="RTN", seed=0, **about))
            packed = quantization.gptq(encoder.model, [batch], bits, group_size=group_size)
            table.append(row(dequantized(packed), packed, method="GPTQ", seed=0, **about))
    return {
        "model": "minilm-l6",
        "queries": len(queries),
        "shown": [{"query": queries[i], "package": chosen[i].name} for i in shown],
        "table": table,
    }


def smollm2() -> dict:
    """A model of 135 million parameters at 3 and 4 bits."""
    bench = Bench("smollm2-135m", questions=0, windows=SMOLLM2_WINDOWS)
    model = bench.model
    table = [bench.row(model, method="original", bits=16, group_size="none", seed=0)]
    for bits, group_size in ((4, 64), (3, "row"), (3, 64)):
        about = {"bits": bits, "group_size": str(group_size)}
        packed = quantization.rtn(model, bits, group_size=group_size)
        table.append(bench.row(dequantized(packed), packed, method="RTN", seed=0, **about))
        for seed in SEEDS:
            given = calibration(bench.loaded, seed, (16, 256))
            packed, seconds = timed(quantization.gptq, model, given, bits, group_size=group_size)
            about |= {"method": "GPTQ", "seed": seed, "seconds": seconds}
            table.append(bench.row(dequantized(packed), packed, **about))
    return {"model": "smollm2-135m", "windows": SMOLLM2_WINDOWS, "table": table}


def speed() -> dict:
    """Tokens per second of SmolLM2 with packed layers, as ratios of one interleaved run.

    The loss is that of the very models that are timed: how many bits the output head has matters.
    """
    bench = Bench("smollm2-135m", questions=0, windows=SMOLLM2_WINDOWS)
    loaded = bench.loaded
    prompt = loaded.tokenizer("Efficient language models", return_tensors="pt").input_ids
    models = {
        "float32": loaded.model,
        "int8": quantization.fast(loaded.model, 8),
        "int4, head in int8": quantization.fast(loaded.model, 4),
        "int4, head in int4": quantization.fast(loaded.model, 4, head=True),
    }
    losses = {name: bench.losses(model) for name, model in models.items()}
    print({name: sum(found) / len(found) for name, found in losses.items()}, flush=True)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):  # interleaved: what else the machine does meets all of them alike
        for name, model in models.items():
            timing = decode_tokens_per_second(model, prompt, tokens=24, runs=1)
            rates[name].append(round(timing, 3))
            print(name, rates[name][-1], flush=True)
    return {
        "model": "smollm2-135m",
        "threads": torch.get_num_threads(),
        "loss": losses,
        "tokens_per_second": rates,
        "times_float32": {
            name: round(median(rates[name]) / median(rates["float32"]), 3) for name in models
        },
        "bytes": {name: file_bytes(model) for name, model in models.items()},
    }


THREADS, ROUNDS, TOKENS, JUDGED = (1, 2), 7, 64, 8
"""Of `decoding`: threads, interleaved rounds, tokens of a round, windows that quality rests on."""


def on_minima(model: nn.Module, bits: int, *, group_size: int) -> nn.Module:
    """Quantized to the kind of grid that the file has, which its weights lie on already."""
    grid = partial(quantization.quantize_minimum, bits=bits, group_size=group_size)
    return quantization.quantize_linears(model, grid)


def decoders(model: nn.Module) -> dict[str, nn.Module]:
    """The same packed weights, decoded in three ways: the bits of Q4_1 and Q8_0."""
    quick = quantization.fast(model, 4, group_size=32, head=8, source=on_minima)
    plain, modules = share(quick), share(quick)
    if isinstance(step := step_of(plain), Step):
        step.compiled = None
    modules.__class__ = type(model)
    return {"compiled step": quick, "step in PyTorch": plain, "modules": modules}


def greedy_rate(model: nn.Module, prompt: torch.Tensor, by_generate: bool = False) -> float:
    """Tokens per second after the prompt and its first token."""
    if not by_generate:
        return decode_tokens_per_second(model, prompt, tokens=TOKENS, runs=1)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    seconds = [
        timed(model.generate, prompt, max_new_tokens=count, **options)[1] for count in (1, TOKENS)
    ]
    return (TOKENS - 1) / max(seconds[1] - seconds[0], 1e-9)


def bandwidth(threads: int) -> float:
    """Bytes per second when memory is read: the best of five sums over 256 MiB."""
    torch.set_num_threads(threads)
    numbers = torch.ones(2**25, dtype=torch.int64)
    best = min(timeit.repeat(numbers.sum, number=1, repeat=5))
    return numbers.nbytes / best


def profile(model: nn.Module, prompt: torch.Tensor) -> dict[str, float]:
    """Microseconds a token of each part of the compiled step, and of the Python around it."""
    step = step_of(model)
    if not isinstance(step, Step) or step.compiled is None:
        return {}
    with step.compiled.timed() as seconds:
        rate = greedy_rate(model, prompt)  # one run to warm up and one that is timed
    parts = dict(zip(PARTS_OF_STEP, (seconds / (2 * TOKENS) * 1e6).tolist()))
    parts["Python around it"] = 1e6 / rate - sum(parts.values())
    return {part: round(time, 1) for part, time in parts.items()}


def decoding() -> dict:
    """SmolLM2 decoded by us and by llama.cpp in one interleaved run, and the losses of both.

    llama.cpp reads the wheel's file: 4-bit codes in groups of 32 with a scale and a minimum (Q4_1),
    5 bits a weight, and a head of 8 bits (Q8_0). Ours has the same bits, and the same grids for all
    but the head. The loss is that of decoding: a given text, one token at a time through the cache.
    """
    bench = Bench("smollm2-135m", questions=0, windows=JUDGED)
    models, before = decoders(bench.loaded.model), torch.get_num_threads()
    prompt = bench.loaded.tokenizer("Efficient language models", return_tensors="pt").input_ids
    load = os.getloadavg()[0]
    rates: dict[str, dict[str, list[float]]] = {}
    memory, losses, parts = {}, {}, {}
    try:
        for threads in THREADS:
            memory[str(threads)] = round(bandwidth(threads))
            with LlamaCpp(gguf_file(), threads) as peer:
                ways = {"llama.cpp": lambda p=peer: _peer_rate(p, prompt)}
                ways |= {n: partial(greedy_rate, m, prompt) for n, m in models.items()}
                quick = models["compiled step"]
                ways["compiled step, by generate"] = partial(greedy_rate, quick, prompt, True)
                found: dict[str, list[float]] = {name: [] for name in ways}
                for number in range(ROUNDS + 1):  # the first one warms up
                    for name, way in ways.items():
                        rate = round(way(), 3)
                        if number:
                            found[name].append(rate)
                            print(threads, name, rate, flush=True)
                rates[str(threads)] = found
                runs = [profile(quick, prompt) for _ in range(3)]
                parts[str(threads)] = {k: median(run[k] for run in runs) for k in runs[0]}
                if threads == THREADS[-1]:
                    losses["llama.cpp"] = [mean(peer.losses(w)) for w in bench.windows.tolist()]
        for name, model in models.items():
            windows = bench.windows.split(1)
            losses[name] = [
                float(quantization.decode_losses(model, w, DynamicCache(), chunk=1).mean())
                for w in windows
            ]
    finally:
        torch.set_num_threads(before)
    packed = [m.quantized for m in models["modules"].modules() if isinstance(m, QuantizedLinear)]
    file = GGUFReader(gguf_file())
    read = {name: sum(weight.bytes for weight in packed) for name in models}
    read["llama.cpp"] = sum(int(tensor.n_bytes) for tensor in file.tensors)
    return {
        "model": "smollm2-135m",
        "compiled": getattr(step_of(models["compiled step"]), "compiled", None) is not None,
        "load": round(load, 2),
        "tokens": TOKENS,
        "tokens_per_second": rates,
        "bytes_per_token": read,
        "bandwidth": memory,
        "profile": parts,
        "loss": {name: [round(x, 5) for x in found] for name, found in losses.items()},
    }


def _peer_rate(peer: LlamaCpp, prompt: torch.Tensor) -> float:
    answer = peer.decode(prompt[0].tolist(), TOKENS)
    return TOKENS / answer["seconds"]


_ALL = (methods, outliers, domains, mixed, training, control, cache, minilm, smollm2, speed)
_ALL += (decoding,)
PARTS: dict[str, Callable[[], dict]] = {part.__name__: part for part in _ALL}


if __name__ == "__main__":
    sys.exit(sweeps.run(PARTS, __file__, __doc__.splitlines()[0]))
