"""The stored measurements of `notebooks/05_inference/1_pruning` (`make results`).

    python data/sweeps/05_inference/1_pruning.py                    # every part, some hours
    python data/sweeps/05_inference/1_pruning.py methods domains    # these parts
    python data/sweeps/05_inference/1_pruning.py --resume training  # only what is not stored yet

Each part is written to `data/results/05_inference/1_pruning/<part>.json`, point by point:

methods      magnitude, Wanda, SparseGPT and Taylor at sparsities from 10 to 90 %, and OBD and
             variants of them from 50 to 70 %
patterns     the same as N:M, and SparseGPT with 4 bits in the same walk
outliers     magnitude, Wanda, SparseGPT and Taylor after function-preserving outlier injection
domains      what pruning costs on novels, the Bible, package descriptions and translations
allocation   the same sparsity for all layers, one threshold, and by measured sensitivity
recovery     fine-tuning with the mask held, and without
training     magnitude, gradual magnitude and movement while `mini-300k` learns German texts
lottery      tickets, rewound and not, and their controls, from a random `mini-300k`
structured   heads, neurons, channels and layers removed, by each method
healing      LoRA after structured pruning, at 20 % and 50 % of the blocks' weights
depth        which layer to drop: block influence, and the loss without each layer
smollm2      `smollm2-135m`: quality, unstructured and structured
speed        `smollm2-135m`: time to read a prompt and to decode, beside the dense model

Quality is measured as `effnb.lab.bench` says.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from pruning_bench import MIDDLE, SPARSITIES, Table, by_method, quiet_row, seeds_at
from pruning_structures import depth, healing, smollm2, speed, structured
from pruning_training import lottery, recovery, training
from torch import nn

from effnb.core.outliers import inject_outliers
from effnb.evaluation.quality import token_losses
from effnb.inference import pruning, quantization
from effnb.inference.quantization import dequantized
from effnb.lab.sweeps import SEEDS, Bench, calibration, domain_windows, run, timed


def methods() -> None:
    """Every one-shot method at every sparsity."""
    bench = Bench()
    table = Table("methods", model="mini-5m")
    given = {seed: calibration(bench.loaded, seed) for seed in SEEDS}
    scores: dict[tuple[str, int], dict[str, torch.Tensor]] = {}

    def scored(method: str, sparsity: float, seed: int, scope: str) -> nn.Module:
        """Methods of one score for all sparsities compute it once."""
        if (method, seed) not in scores:
            make = {"Taylor": pruning.taylor_scores, "OBD": pruning.fisher_diagonal}[method]
            found = make(bench.model, given[seed])
            if method == "OBD":
                weights = {n: bench.model.get_submodule(n).weight for n in found}
                found = {n: pruning.obd_saliency(weights[n], f) for n, f in found.items()}
            scores[method, seed] = found
        masks = pruning.choose_masks(scores[method, seed], sparsity, scope)
        return pruning.apply_masks(bench.model, masks)

    def add(method: str, scope: str, sparsity: float, seed: int = 0, **more: Any) -> None:
        about = {"method": method, "pattern": scope, "sparsity": sparsity, "seed": seed}
        name = method.split(",")[0]

        def measure() -> dict[str, Any] | None:
            try:
                if name in ("Taylor", "OBD"):
                    pruned, seconds = timed(scored, name, sparsity, seed, scope)
                else:
                    prune = by_method(bench.model, given[seed])[name]
                    pruned, seconds = timed(prune, sparsity, pattern=scope, **more)
            except ValueError as problem:  # one threshold may empty a layer, which is refused
                print(about, problem, flush=True)
                return None
            stored = pruning.storage_of(pruned)
            row = quiet_row(bench, pruned, ask=seed == 0) | {"seconds": seconds}
            row |= {"dense_bytes": stored.dense_bytes, "bitmap_bytes": stored.bitmap_bytes}
            return row | {"csr_bytes": stored.csr_bytes}

        table.add(about, measure)

    table.add({"method": "original", "sparsity": 0.0}, lambda: quiet_row(bench, bench.model))
    for sparsity in SPARSITIES:
        for scope in ("layer", "global"):
            add("magnitude", scope, sparsity)
        for seed in seeds_at(sparsity):
            add("Wanda", "row", sparsity, seed)
            add("SparseGPT", "layer", sparsity, seed)
            add("Taylor", "global", sparsity, seed)
    for sparsity in MIDDLE:
        add("magnitude", "row", sparsity)
        add("Wanda", "layer", sparsity)
        add("Wanda, adaptive rows", "row", sparsity, adaptive=True)
        add("SparseGPT, its choice only", "layer", sparsity, compensate=False)
        add("SparseGPT, blocks of 16", "layer", sparsity, block_size=16)
        add("Taylor", "layer", sparsity)
        add("OBD", "global", sparsity)


def patterns() -> None:
    """N:M, and sparsity with quantization in the same walk."""
    bench = Bench()
    model = bench.model
    table = Table("patterns", model="mini-5m")
    for pattern in ("2:4", "4:8", "1:4"):
        for method in ("magnitude", "Wanda", "SparseGPT", "Taylor"):
            few = method == "magnitude" or pattern != "2:4"
            for seed in SEEDS[:1] if few else SEEDS:
                prune = by_method(model, calibration(bench.loaded, seed))[method]
                table.add(
                    {"method": method, "pattern": pattern, "seed": seed},
                    lambda prune=prune, p=pattern: quiet_row(bench, prune(None, pattern=p)),
                )
    for seed in SEEDS:
        given = calibration(bench.loaded, seed)

        def together(given: torch.Tensor = given) -> dict[str, Any]:
            packed = pruning.sparsegpt(model, given, 0.5, bits=4, group_size=64)
            return quiet_row(bench, dequantized(packed))

        def rounded_after(given: torch.Tensor = given) -> dict[str, Any]:
            pruned = pruning.sparsegpt(model, given, 0.5)
            masks = pruning.masks_of(pruned)
            rounded = dequantized(quantization.rtn(pruned, 4, group_size=64))
            return quiet_row(bench, pruning.apply_masks(rounded, masks))

        def dense_3(given: torch.Tensor = given) -> dict[str, Any]:
            packed = quantization.gptq(model, given, 3, group_size=64)
            return quiet_row(bench, dequantized(packed))

        for method, measure in (
            ("SparseGPT and 4 bits in one walk", together),
            ("SparseGPT, then 4 bits", rounded_after),
            ("GPTQ, 3 bits, nothing pruned", dense_3),
        ):
            table.add({"method": method, "pattern": "layer", "seed": seed}, measure)


def outliers() -> None:
    """Before and after rescaling that leaves the function as it was."""
    bench = Bench(questions=0)
    table = Table("outliers", model="mini-5m")
    for label, model in (
        ("none", bench.model),
        ("8 x on 16 channels", inject_outliers(bench.model, range(0, 256, 16), 8.0)),
        ("40 x on 2 channels", inject_outliers(bench.model, [40, 170], 40.0)),
    ):
        table.add(
            {"method": "original", "injected": label, "sparsity": 0.0},
            lambda model=model: quiet_row(bench, model),
        )
        for sparsity in MIDDLE:
            for method, scope in (
                ("magnitude", "layer"), ("magnitude", "row"), ("Wanda", "row"),
                ("SparseGPT", "layer"),
            ):  # fmt: skip
                prune = by_method(model, calibration(bench.loaded, 0))[method]
                table.add(
                    {
                        "method": method, "pattern": scope,
                        "injected": label, "sparsity": sparsity,
                    },
                    lambda p=prune, s=sparsity, o=scope: quiet_row(bench, p(s, pattern=o)),
                )  # fmt: skip


def domains() -> None:
    """The same loss for everyone? Each domain's windows under each setting."""
    bench = Bench(questions=0)
    windows = domain_windows(bench.loaded, 24, 256)
    table = Table("domains", model="mini-5m", window=256)

    def losses(model: nn.Module) -> dict[str, Any]:
        return {"domains": {domain: bench.losses(model, rows) for domain, rows in windows.items()}}

    table.add({"method": "original", "sparsity": 0.0, "seed": 0}, lambda: losses(bench.model))
    for seed in SEEDS:
        prune = by_method(bench.model, calibration(bench.loaded, seed))
        for sparsity in (0.5, 0.7):
            for method in ("magnitude", "Wanda", "SparseGPT"):
                if seed and method == "magnitude":
                    continue
                table.add(
                    {"method": method, "sparsity": sparsity, "seed": seed},
                    lambda p=prune[method], s=sparsity: losses(p(s)),
                )


def allocation() -> None:
    """Which layer gives how much: uniform, one threshold, by measured sensitivity."""
    bench = Bench(questions=0)
    model = bench.model
    given = calibration(bench.loaded, 0)
    probe = calibration(bench.loaded, 7, (6, 256))

    @torch.inference_mode()
    def loss(pruned: nn.Module) -> float:
        return float(token_losses(pruned, probe).mean())

    sizes = {n: m.weight.numel() for n, m in pruning.masks.linears(model).items()}
    measured = pruning.sensitivity(model, loss, (0.5, 0.7, 0.9))
    magnitudes = pruning.magnitude_scores(model)
    taylor_scores = pruning.taylor_scores(model, given)
    table = Table(
        "allocation", model="mini-5m",
        sensitivity={n: {str(s): round(x, 6) for s, x in c.items()} for n, c in measured.items()},
    )  # fmt: skip
    for sparsity in (0.5, 0.6, 0.7):
        for by, choose in (
            ("uniform", lambda s: pruning.allocate_uniform(model, s)),
            ("one threshold, magnitude", lambda s: pruning.allocate_global(magnitudes, s)),
            ("one threshold, Taylor", lambda s: pruning.allocate_global(taylor_scores, s)),
            ("sensitivity", lambda s: pruning.allocate_by_sensitivity(measured, sizes, s)),
        ):
            shares = choose(sparsity)
            for method in ("magnitude", "SparseGPT") if sparsity == 0.6 else ("magnitude",):
                prune = by_method(model, given)[method]
                table.add(
                    {"by": by, "method": method, "sparsity": sparsity},
                    lambda p=prune, a=shares: (
                        quiet_row(bench, p(a)) | {"layers": {n: round(s, 4) for n, s in a.items()}}
                    ),
                )


PARTS: dict[str, Callable[[], None]] = {
    part.__name__: part
    for part in (
        methods,
        patterns,
        outliers,
        domains,
        allocation,
        recovery,
        training,
        lottery,
        structured,
        healing,
        depth,
        smollm2,
        speed,
    )
}


if __name__ == "__main__":
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
