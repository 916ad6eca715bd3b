"""The stored measurements of `notebooks/05_inference/2_low_rank` (`make results`).

    python data/sweeps/05_inference/2_low_rank.py                  # every part, some hours
    python data/sweeps/05_inference/2_low_rank.py methods composed # these parts

Each part is written to `data/results/05_inference/2_low_rank/<part>.json`:

methods      SVD, FWSVD, ASVD, SVD-LLM and one-shot LoSparse from 90 to 20 % kept, on `mini-5m`
calibration  ASVD and SVD-LLM from 64 to 8,192 tokens of calibration text
allocation   one budget, the same part of every layer against ranks by spectrum and by loss
losparse     low rank, rows, and both, trained for the same steps, beside SVD-LLM's own tuning
composed     pruned, factorised and rounded to equal bytes, alone and together; then LoRA
latency      one layer's time over its rank, at one token and at many
inputs       how far the largest input of each layer stands out, in both models
smollm2      `smollm2-135m`: quality of SVD, ASVD and SVD-LLM
speed        `smollm2-135m`: seconds to read a prompt and tokens per second, over the part kept

What is measured of every setting, and on which texts, is said in `effnb.lab.bench`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch import nn

from effnb.core.calibration import Calibration, layerwise
from effnb.core.modules import Layers, linears, map_linears
from effnb.core.training import TrainingSettings, train
from effnb.evaluation import decode_tokens_per_second
from effnb.evaluation import latency as seconds_of
from effnb.finetuning import lora
from effnb.inference import low_rank, pruning, quantization
from effnb.inference.pruning import mask_storage
from effnb.inference.quantization import QuantizedLinear, dequantized
from effnb.lab.bench import file_bytes
from effnb.lab.sweeps import (
    CALIBRATION,
    SEEDS,
    SMOLLM2_WINDOWS,
    Bench,
    calibration,
    run,
    timed,
    training_batches,
)

KEPT = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
COMPARED = (0.8, 0.6, 0.4)
CANDIDATES = (0.8, 0.6, 0.45, 0.3, 0.15)
MANY_SEEDS = (0, 1, 2, 3, 4)


def parts_kept(seed: int) -> tuple[float, ...]:
    """The whole curve at the first seed, and at the others only what verdicts compare."""
    return KEPT if seed == 0 else COMPARED


def layer_numbers(model: nn.Module) -> int:
    """Numbers held by all linear layers and factors inside the blocks."""
    return sum(p.numel() for n, p in model.named_parameters() if n.endswith("proj.weight")) + sum(
        p.numel()
        for m in model.modules()
        if isinstance(m, low_rank.Factorized)
        for p in m.parameters()
    )


def imitation_of(teacher: nn.Module) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    """A loss: the divergence of the teacher's next-token probabilities from the student's."""

    def loss(student: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits.log_softmax(-1)
        found = student(input_ids=ids).logits.log_softmax(-1)
        return nn.functional.kl_div(
            found.flatten(0, 1), wanted.flatten(0, 1), log_target=True, reduction="batchmean"
        )

    return loss


# ------------------------------------------------------------------------------------ parts


def methods() -> dict:
    """Every method at every part kept; those that see text at several calibration seeds."""
    bench = Bench()
    model = bench.model
    whole = layer_numbers(model)
    table = [bench.row(model, method="original", kept=1.0, numbers=1.0, seed=0)]

    def add(small: nn.Module, **about) -> None:
        table.append(bench.row(small, numbers=round(layer_numbers(small) / whole, 4), **about))

    def curve(method: str, decomposition: dict, seed: int, seconds: float) -> None:
        for kept in parts_kept(seed):
            small = low_rank.truncate(model, decomposition, kept)
            add(small, method=method, kept=kept, seed=seed, seconds=seconds)

    curve("SVD", *_at(0, timed(low_rank.decompose, model)))
    for seed in MANY_SEEDS:
        given = calibration(bench.loaded, seed)
        curve("ASVD", *_at(seed, timed(low_rank.decompose_asvd, model, given)))
        curve("SVD-LLM", *_at(seed, timed(low_rank.decompose_svd_llm, model, given)))
        if seed in SEEDS:
            curve("FWSVD", *_at(seed, timed(low_rank.decompose_fwsvd, model, given)))
            for kept in COMPARED:
                small, seconds = timed(low_rank.svd_llm, model, given, kept)
                about = {"method": "SVD-LLM, block by block", "seed": seed, "seconds": seconds}
                add(small, kept=kept, **about)
    for kept in KEPT:
        small, seconds = timed(low_rank.low_rank_plus_sparse, model, kept)
        add(small, method="LoSparse, untrained", kept=kept, seed=0, seconds=seconds)
    return {"model": "mini-5m", "calibration": CALIBRATION, "table": table}


def _at(seed: int, found: tuple[dict, float]) -> tuple[dict, int, float]:
    return found[0], seed, found[1]


def calibration_tokens() -> dict:
    """How much text a method needs, and how well it does on that very text."""
    bench = Bench(questions=0)
    kept, table = 0.6, []
    for seed in SEEDS:
        for tokens in (64, 128, 256, 1024, 8192):
            shape = (2, tokens // 2) if tokens < 512 else (tokens // 256, 256)
            given = calibration(bench.loaded, seed, shape)
            for name, method in (("ASVD", low_rank.asvd), ("SVD-LLM", low_rank.svd_llm)):
                small = method(bench.model, given, kept, sequential=False)
                seen = bench.losses(small, given)
                before = bench.losses(bench.model, given)
                rise = sum(seen) / len(seen) - sum(before) / len(before)
                about = {"method": name, "tokens": tokens, "seed": seed}
                about["rise_on_calibration"] = round(rise, 5)
                table.append(bench.row(small, **about))
    table.append(bench.row(bench.model, method="original", tokens=0, seed=0))
    table.append(bench.row(low_rank.svd(bench.model, kept), method="SVD", tokens=0, seed=0))
    return {"model": "mini-5m", "kept": kept, "table": table}


class Remembered:
    """A function that is asked for the same things again in the same order, computed once."""

    def __init__(self, function: Callable[[nn.Module], float]) -> None:
        """Nothing is known yet."""
        self.function, self.known, self.next = function, [], 0

    def again(self) -> Remembered:
        """From the first question."""
        self.next = 0
        return self

    def __call__(self, model: nn.Module) -> float:
        """The answer of the first round, or a new one."""
        if self.next == len(self.known):
            self.known.append(self.function(model))
        self.next += 1
        return self.known[self.next - 1]


def allocation() -> dict:
    """The same budget for the whole model, split in three ways; SVD-LLM's factors in each."""
    bench = Bench(questions=0)
    model, table, ranks = bench.model, [], {}
    table.append(bench.row(model, method="original", kept=1.0, seed=0))
    for seed in SEEDS:
        factors = low_rank.decompose_svd_llm(model, calibration(bench.loaded, seed))
        judged = calibration(bench.loaded, 500 + seed, (8, 128))

        def loss(candidate: nn.Module, judged: torch.Tensor = judged) -> float:
            found = bench.losses(candidate, judged)
            return sum(found) / len(found)

        loss = Remembered(loss)
        for kept in COMPARED:
            found = {
                "same part of every layer": None,
                "by spectrum": low_rank.allocate_by_spectrum(factors, kept),
                "by loss": low_rank.allocate_by_loss(
                    model, factors, loss.again(), kept, candidates=CANDIDATES
                ),
            }
            for method, plan in found.items():
                small = (
                    low_rank.truncate(model, factors, kept)
                    if plan is None
                    else low_rank.truncate(model, factors, rank=plan.ranks)
                )
                numbers = round(layer_numbers(small) / layer_numbers(model), 4)
                table.append(bench.row(small, method=method, kept=kept, seed=seed, numbers=numbers))
                if seed == 0 and kept == 0.6:
                    ranks[method] = low_rank.ranks_of(small)
    sizes = {name: list(layer.weight.shape) for name, layer in linears(model).items()}
    return {"model": "mini-5m", "table": table, "ranks": ranks, "sizes": sizes}


def losparse() -> dict:
    """Low rank alone, rows alone, and half of each, trained alike, with equally many weights."""
    bench = Bench()
    steps, kept, table = 30, 0.5, []
    imitation = imitation_of(bench.model)
    table.append(bench.row(bench.model, method="original", share=1.0, seed=0))
    for share in (0.0, 0.5, 1.0):
        small = low_rank.low_rank_plus_sparse(bench.model, kept, low_rank_share=share)
        table.append(bench.row(small, method="one shot", share=share, seed=0))
    for seed in SEEDS:
        batches = training_batches(bench.loaded, seed, steps)
        settings = TrainingSettings(
            steps=steps, learning_rate=1e-3, warmup_steps=5, schedule="cosine", clip_norm=1.0,
            seed=seed,
        )  # fmt: skip
        for share in (0.0, 0.5, 1.0):
            small, result = low_rank.losparse(
                bench.model,
                batches.__getitem__,
                settings,
                kept,
                low_rank_share=share,
                loss=imitation,
            )
            about = {"share": share, "seed": seed, "seconds": round(result.seconds, 1)}
            table.append(bench.row(small, method="trained", **about))
        small = low_rank.svd_llm(bench.model, calibration(bench.loaded, seed), kept)
        table.append(bench.row(small, method="SVD-LLM", share=1.0, seed=seed))
        half = TrainingSettings(
            steps=steps // 2, learning_rate=1e-3, warmup_steps=5, schedule="cosine",
            clip_norm=1.0, seed=seed,
        )  # fmt: skip
        small, _ = low_rank.tune_factors(small, batches.__getitem__, half, loss=imitation)
        table.append(bench.row(small, method="SVD-LLM, tuned", share=1.0, seed=seed))
    return {"model": "mini-5m", "kept": kept, "steps": steps, "table": table}


# ------------------------------------------------------------- pruned, factorised and rounded

HALF = 16
"""Bits of a number that is not rounded further: the models ship in bfloat16."""


def halved(model: nn.Module) -> nn.Module:
    """Linear layers rounded to bfloat16, as they would be stored; what was 0 stays 0."""

    def rounded(name: str, layer: nn.Linear) -> nn.Linear:
        new = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(layer.weight.detach().bfloat16().float(), requires_grad=False)
        return new

    return map_linears(model, rounded)


def layers_bytes(model: nn.Module, pattern: str | None = None) -> float:
    """Bytes of the linear layers of the blocks as stored; sparse ones in their smallest form.

    Args:
        model: Its layers are linear (16 bits a number), quantized, or factors of either kind.
        pattern: "2:4" or "bitmap" if the zeros need not be stored.
    """
    total = 0
    for name, module in model.named_modules():
        if name.endswith("lm_head"):
            continue
        if isinstance(module, QuantizedLinear):
            held = module.quantized
            if pattern is None:
                total += held.bytes
                continue
            around = held.bytes - held.codes.numel()  # scales and zero points
            total += around + _sparse_bytes(module.weight, held.bits, pattern)
        elif isinstance(module, nn.Linear):
            weight = module.weight
            dense = weight.numel() * HALF // 8
            total += dense if pattern is None else _sparse_bytes(weight, HALF, pattern)
    return total


def _sparse_bytes(weight: torch.Tensor, bits: int, pattern: str) -> int:
    storage = mask_storage(weight != 0, bits)
    return storage.two_four_bytes if pattern == "2:4" else storage.bitmap_bytes


def composed() -> dict:
    """Ways to equal bytes: every method alone, in pairs with rounding, and recovered by a LoRA."""
    bench = Bench()
    model = bench.model
    steps, lora_rank, group, rate = 30, 4, 64, 1e-3
    weights = sum(m.weight.numel() for m in linears(model).values())
    table: list[dict] = []

    def recovered(small: nn.Module, seed: int) -> tuple[nn.Module, float]:
        """The model with a trained LoRA beside its frozen layers, and the LoRA's bytes."""
        tuned = lora.attach(small, rank=lora_rank, alpha=2 * lora_rank, seed=seed)
        settings = TrainingSettings(
            steps=steps, learning_rate=rate, warmup_steps=5, schedule="cosine", clip_norm=1.0,
            seed=seed,
        )  # fmt: skip
        batches = training_batches(bench.loaded, seed, steps)
        train(tuned, batches.__getitem__, settings, loss=imitation_of(model))
        numbers = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        return tuned, numbers * HALF / 8

    def add(small: nn.Module, held: float, seed: int, **about) -> None:
        bits = round(8 * held / weights, 4)
        table.append(bench.row(small, int(held), layer_bits=bits, seed=seed, **about))

    def add_packed(
        packed: nn.Module, way: str, seed: int, pattern: str | None = None, tune: bool = False
    ) -> None:
        plain, held = dequantized(packed), layers_bytes(packed, pattern)
        add(plain, held, seed, way=way, step="compressed")
        if tune:
            tuned, more = recovered(plain, seed)
            add(tuned, held + more, seed, way=way, step="LoRA")

    add(model, layers_bytes(model), 0, way="original", step="none")
    for seed in SEEDS:
        given = calibration(bench.loaded, seed)
        for bits in (4, 3, 2):
            packed = quantization.gptq(model, given, bits, group_size=group)
            add_packed(packed, f"GPTQ {bits}", seed, tune=bits == 2)

        for name, pattern, goal, form in (
            ("2:4", "2:4", None, "2:4"),
            ("50 %", "layer", 0.5, "bitmap"),
        ):
            alone = halved(pruning.sparsegpt(model, given, goal, pattern=pattern))
            add(alone, layers_bytes(alone, form), seed, way=f"prune {name}", step="compressed")
            for bits in (4, 2):
                packed = pruning.sparsegpt(
                    model, given, goal, pattern=pattern, bits=bits, group_size=group
                )
                way = f"prune {name} + {bits} bits"
                add_packed(packed, way, seed, form, tune=bits == 2)
            if form == "2:4":  # do the zeros stay if the rounding does not know of them?
                packed = quantization.gptq(alone, given, 4, group_size=group)
                plain = dequantized(packed)
                masks = pruning.masks_of(plain)
                before = pruning.masks_of(alone)
                back = sum(int((m & ~before[n]).sum()) for n, m in masks.items())
                gone = sum(int((~m).sum()) for m in before.values())
                about = {"way": "prune 2:4, then plain GPTQ", "step": "compressed"}
                about["zeros_back"] = round(back / gone, 4)
                about["two_four"] = all(pruning.follows(m, "2:4") for m in masks.values())
                add(plain, layers_bytes(packed, "bitmap"), seed, **about)

        for kept in (0.75, 0.5):
            small = low_rank.svd_llm(model, given, kept)
            alone = halved(small)
            add(alone, layers_bytes(alone), seed, way=f"rank {kept:.0%}", step="compressed")
            packed = quantization.gptq(small, given, 4, group_size=group)
            add_packed(packed, f"rank {kept:.0%} + 4 bits", seed, tune=kept == 0.5)
    return {
        "model": "mini-5m",
        "steps": steps,
        "learning_rate": rate,
        "lora_rank": lora_rank,
        "group_size": group,
        "weights": weights,
        "table": table,
    }


# ------------------------------------------------------------------------------------ time


def interleaved(
    functions: dict[str, Callable[[], object]], rounds: int
) -> Iterator[tuple[str, list[float]]]:
    """Seconds of each function in every round; what else the machine does meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(seconds_of(function, warmup=1, runs=5).median_seconds)
    yield from times.items()


@torch.inference_mode()
def latency() -> dict:
    """A layer in two factors beside the layer, over the rank, at one token and at many."""
    curves = []
    generator = torch.Generator().manual_seed(0)
    for m, n in ((1536, 576), (2048, 2048)):
        dense = nn.Linear(n, m, bias=False)
        limit = low_rank.break_even_rank(m, n)
        ranks = [max(8, round(x * limit / 8) * 8) for x in (0.1, 0.25, 0.5, 0.75, 1.0, 1.25)]
        for tokens in (1, 16, 256):
            x = torch.randn(tokens, n, generator=generator)
            layers: dict[str, nn.Module] = {"dense": dense}
            for rank in ranks:
                factors = torch.randn(m, rank, generator=generator), torch.randn(rank, n)
                layers[str(rank)] = low_rank.LowRankLinear(*factors)
            calls = {name: (lambda one=one, x=x: one(x)) for name, one in layers.items()}
            found = dict(interleaved(calls, 15))
            whole = found.pop("dense")
            ratios = [
                round(median(a / b for a, b in zip(times, whole)), 4) for times in found.values()
            ]
            curves.append(
                {
                    "out": m, "in": n, "tokens": tokens, "ranks": ranks,
                    "break_even": round(limit, 2), "times_dense": ratios,
                    "dense_microseconds": round(1e6 * median(whole), 2),
                }
            )  # fmt: skip
            print(curves[-1], flush=True)
    return {"threads": torch.get_num_threads(), "curves": curves}


def inputs() -> dict:
    """How far the largest input of each layer stands out, in both models."""
    table = {}
    for name in ("mini-5m", "smollm2-135m"):
        bench = Bench(name, questions=0, windows=1)
        given = calibration(bench.loaded, 0, (4, 128))
        seen: dict[str, low_rank.InputMean] = {}

        def observe(
            layer: str, module: nn.Linear, seen: dict[str, low_rank.InputMean] = seen
        ) -> low_rank.InputMean:
            return seen.setdefault(layer, low_rank.InputMean(module.in_features))

        layerwise(bench.model, Calibration(given, batch_size=2), observe, lambda *_: None)
        ratios = {n: m.value.max() / m.value.median() for n, m in seen.items()}
        table[name] = {n: round(float(x), 2) for n, x in ratios.items()}
        print(name, sorted(table[name].items(), key=lambda one: -one[1])[:5], flush=True)
    return {"tokens": 512, "table": table}


SMOLLM2_KEPT = (0.9, 0.8, 0.6, 0.4)


def smollm2() -> dict:
    """A model of 135 million parameters: each method decomposed once, truncated three times."""
    bench = Bench("smollm2-135m", questions=0, windows=SMOLLM2_WINDOWS)
    model = bench.model
    table = [bench.row(model, method="original", kept=1.0, seed=0, text=bench.write(model))]

    def add(name: str, make: Callable[..., dict], seed: int, *given: torch.Tensor) -> None:
        decomposition, seconds = timed(make, model, *given)
        for kept in SMOLLM2_KEPT:
            small = low_rank.truncate(model, decomposition, kept)
            about = {"method": name, "kept": kept, "seed": seed, "seconds": seconds}
            table.append(bench.row(small, text=bench.write(small), **about))

    add("SVD", low_rank.decompose, 0)  # which takes no calibration data
    for seed in SEEDS:
        given = calibration(bench.loaded, seed, (16, 256))
        add("ASVD", low_rank.decompose_asvd, seed, given)
        add("SVD-LLM", low_rank.decompose_svd_llm, seed, given)
    about = {"model": "smollm2-135m", "windows": SMOLLM2_WINDOWS, "calibration": [16, 256]}
    return about | {"table": table}


def speed() -> dict:
    """Reading 256 tokens and writing one by one, over the part kept; ratios of interleaved runs."""
    bench = Bench("smollm2-135m", questions=0, windows=1)
    prompt = bench.windows[:, :256]
    generator = torch.Generator().manual_seed(0)
    decomposition = {}
    for name, layer in linears(bench.model, Layers("*", ("*lm_head",))).items():
        m, n = layer.weight.shape  # numbers do not matter for time, shapes do
        full = min(m, n)
        left, right = (torch.randn(*s, generator=generator) / 100 for s in ((m, full), (full, n)))
        decomposition[name] = low_rank.Factors(left, right, torch.ones(full))
    models = {"1.0": bench.model}
    for kept in (0.8, 0.6, 0.4, 0.2):
        models[str(kept)] = low_rank.truncate(bench.model, decomposition, kept)
    rank = max(full for full in (f.rank for f in decomposition.values())) // 2
    models["half the full rank"] = low_rank.truncate(
        bench.model, decomposition, rank=rank, always=True
    )
    read: dict[str, list[float]] = {name: [] for name in models}
    write: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            with torch.inference_mode():
                timing = seconds_of(lambda model=model: model(prompt), warmup=1, runs=2)
            read[name].append(round(timing.median_seconds, 4))
            rate = decode_tokens_per_second(model, prompt[:, :16], tokens=16, runs=1)
            write[name].append(round(rate, 3))
            print(name, read[name][-1], write[name][-1], flush=True)
    return {
        "model": "smollm2-135m",
        "threads": torch.get_num_threads(),
        "prompt_tokens": prompt.shape[1],
        "rank_of_half": rank,
        "read_seconds": read,
        "tokens_per_second": write,
        "bytes": {name: file_bytes(model) for name, model in models.items()},
    }


PARTS: dict[str, Callable[[], dict]] = {
    "methods": methods,
    "calibration": calibration_tokens,
    "allocation": allocation,
    "losparse": losparse,
    "composed": composed,
    "latency": latency,
    "inputs": inputs,
    "smollm2": smollm2,
    "speed": speed,
}


if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
