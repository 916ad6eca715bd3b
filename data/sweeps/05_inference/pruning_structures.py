"""Parts of `sweep_pruning.py`: heads, neurons, channels and layers, removed for good."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from pruning_bench import Table, by_method, quiet_row, settings_of
from torch import nn

from effnb.evaluation import decode_tokens_per_second, latency
from effnb.inference import pruning
from effnb.lab import load
from effnb.lab.sweeps import SEEDS, SMOLLM2_WINDOWS, Bench, calibration, timed, training_batches


def about_size(pruned: pruning.Pruned, blocks: int) -> dict[str, Any]:
    """Parameters of a smaller model, and which part of the blocks' went; embeddings stay whole."""
    gone = pruned.parameters_before - pruned.parameters_after
    return {
        "parameters": pruned.parameters_after,
        "removed": round(gone / blocks, 4),
        "kind": pruned.model.config.model_type,
    }


def block_weights(model: nn.Module) -> int:
    """Parameters inside the blocks."""
    return sum(p.numel() for p in model.model.layers.parameters())


def structural(model: nn.Module, given: torch.Tensor, seed: int) -> dict[str, Callable]:
    """Structured methods, as functions of one ratio or count."""
    return {
        "random": lambda r: pruning.prune_structures(
            model, pruning.random_scores(model, seed), {"heads": r, "neurons": r}
        ),
        "LLM-Pruner": lambda r: pruning.llm_pruner(model, given, r),
        "LLM-Pruner, vector": lambda r: pruning.llm_pruner(model, given, r, importance="vector"),
        "width": lambda r: pruning.width(model, given, heads=r, neurons=r),
        "channels": lambda r: pruning.width(model, given, hidden=r),
        "heads": lambda r: pruning.prune_heads(model, given, r),
        "ShortGPT": lambda n: pruning.shortgpt(model, given, n),
        "run of layers": lambda n: pruning.drop_run(model, given, n),
    }


def structured() -> None:
    """Heads, neurons, channels and layers, removed for good: the model is smaller and dense."""
    bench = Bench()
    blocks = block_weights(bench.model)
    table = Table("structured", model="mini-5m", block_weights=blocks)
    table.add(
        {"method": "original", "amount": 0, "seed": 0},
        lambda: quiet_row(bench, bench.model) | {"removed": 0.0},
    )
    for seed in SEEDS:
        given = calibration(bench.loaded, seed)
        methods = structural(bench.model, given, seed)
        for method, amounts in (
            ("random", (0.2, 0.5)),
            ("LLM-Pruner", (0.1, 0.2, 0.35, 0.5)),
            ("LLM-Pruner, vector", (0.2, 0.5)),
            ("width", (0.1, 0.2, 0.35, 0.5)),
            ("channels", (0.125, 0.25)),
            ("heads", (0.25, 0.5)),
            ("ShortGPT", (1, 2, 3)),
            ("run of layers", (1, 2, 3)),
        ):
            for amount in amounts:
                if seed and amount in (0.1, 0.35):
                    continue

                def measure(
                    prune: Callable = methods[method], amount: float = amount, seed: int = seed
                ) -> dict[str, Any]:
                    pruned = prune(amount)
                    row = quiet_row(bench, pruned.model, ask=seed == 0)
                    return row | about_size(pruned, blocks)

                table.add({"method": method, "amount": amount, "seed": seed}, measure)


def healing() -> None:
    """LoRA after structured pruning; LoRAPrune prunes while it trains one, with as many steps."""
    bench = Bench()
    model, steps = bench.model, 24
    blocks = block_weights(model)
    table = Table("healing", model="mini-5m", steps=steps, tokens=steps * 8 * 128)
    settings = settings_of(steps, 1e-3)
    for seed in SEEDS:
        given = calibration(bench.loaded, seed)
        batches = training_batches(bench.loaded, seed, steps)
        methods = structural(model, given, seed)

        def healed(small: nn.Module, seed: int = seed, batches: list = batches) -> dict[str, Any]:
            found = pruning.recover(small, batches.__getitem__, settings)
            return quiet_row(bench, found.model) | {
                "seconds": round(found.training.seconds, 2),
                "trained": found.trained_parameters,
            }

        table.add(
            {"method": "nothing pruned", "amount": 0, "seed": seed}, lambda h=healed: h(model)
        )
        for method, amount in (
            ("LLM-Pruner", 0.2), ("LLM-Pruner", 0.5), ("ShortGPT", 3),
        ):  # fmt: skip

            def measure(
                prune: Callable = methods[method], amount: float = amount, healed: Any = healed
            ) -> dict[str, Any]:
                pruned = prune(amount)
                before = bench.losses(pruned.model)
                row = healed(pruned.model) | about_size(pruned, blocks)
                return row | {"before": round(sum(before) / len(before), 5)}

            table.add({"method": method, "amount": amount, "seed": seed}, measure)
        for amount in (0.2, 0.5):

            def with_lora(amount: float = amount, batches: list = batches) -> dict[str, Any]:
                found = pruning.lora_prune(model, batches.__getitem__, settings, amount)
                row = quiet_row(bench, found.model) | about_size(found, blocks)
                return row | {"seconds": round(found.training.seconds, 2)}

            table.add({"method": "LoRAPrune", "amount": amount, "seed": seed}, with_lora)


def depth() -> None:
    """Which layer matters least? What block influence says, and what the loss says."""
    table = Table("depth")
    for name, windows in (("mini-5m", 8), ("smollm2-135m", 1)):
        bench = Bench(name, questions=0, windows=windows)
        given = calibration(bench.loaded, 0, (8, 256))

        def loss(model: nn.Module, bench: Bench = bench) -> float:
            losses = bench.losses(model)
            return sum(losses) / len(losses)

        def measure(bench: Bench = bench, given: torch.Tensor = given, loss: Any = loss) -> dict:
            return {
                "influence": [
                    round(x, 5) for x in pruning.block_influence(bench.model, given).tolist()
                ],
                "without": [round(float(x), 5) for x in pruning.layer_ablation(bench.model, loss)],
                "loss": round(loss(bench.model), 5),
            }

        table.add({"model": name}, measure)


def smollm2() -> None:
    """A model of 135 million parameters: unstructured, 2:4, and structured with LoRA after it."""
    bench = Bench("smollm2-135m", questions=0, windows=SMOLLM2_WINDOWS)
    table = Table("smollm2", model="smollm2-135m", windows=SMOLLM2_WINDOWS)
    about = {"method": "original", "amount": 0, "seed": 0}
    table.add(about, lambda: quiet_row(bench, bench.model))
    for seed in SEEDS:
        _smollm2_of(bench, table, seed)


def _smollm2_of(bench: Bench, table: Table, seed: int) -> None:
    """The same with one draw of calibration data; what needs none is measured once."""
    model, steps = bench.model, 30
    given = calibration(bench.loaded, seed, (8, 256))
    blocks = block_weights(model)
    prune, structures = by_method(model, given), structural(model, given[:, :128], seed)
    batches = training_batches(bench.loaded, seed, steps, (4, 128))

    def sparse(method: str, amount: Any) -> dict[str, Any]:
        how = {"pattern": amount} if isinstance(amount, str) else {}
        pruned, seconds = timed(prune[method], None if how else amount, **how)
        return quiet_row(bench, pruned) | {"seconds": seconds}

    def smaller(method: str, amount: float) -> dict[str, Any]:
        pruned = structures[method](amount)
        return quiet_row(bench, pruned.model) | about_size(pruned, blocks)

    def healed(method: str, amount: float) -> dict[str, Any]:
        small = structures[method](amount).model
        found = pruning.recover(small, batches.__getitem__, settings_of(steps, 5e-4))
        return quiet_row(bench, found.model) | {"seconds": round(found.training.seconds, 1)}

    def add(measure: Callable[[str, Any], dict[str, Any]], method: str, amount: Any, label: str):
        about = {"method": label, "amount": amount, "seed": seed}
        table.add(about, lambda: measure(method, amount))

    for method in ("magnitude", "Wanda") if seed == 0 else ("Wanda",):
        for amount in (0.3, 0.5, 0.6, "2:4"):
            add(sparse, method, amount, method)
    for amount in (0.3, 0.5, 0.6, "2:4"):
        add(sparse, "SparseGPT", amount, "SparseGPT")
    for method, amount in (
        ("LLM-Pruner", 0.2), ("random", 0.2), ("ShortGPT", 3), ("ShortGPT", 6)
    ):  # fmt: skip
        add(smaller, method, amount, method)
    for method, amount in (("LLM-Pruner", 0.2), ("ShortGPT", 3)):
        add(healed, method, amount, f"{method}, then LoRA")


def speed() -> None:
    """Reading a prompt and decoding, as ratios of one interleaved run."""
    loaded = load("smollm2-135m", device="cpu")
    model = loaded.model
    prompt = calibration(loaded, 0, (2, 256))[:1]
    start = prompt[:, :16]
    scores = pruning.random_scores(model, 0)
    layers = scores["layers"].numel()
    models = {
        "dense": model,
        "magnitude, 50 %": pruning.magnitude(model, 0.5),
        "magnitude, 2:4": pruning.magnitude(model, pattern="2:4"),
        "magnitude, 90 %": pruning.magnitude(model, 0.9),
        "a third of heads, 20 % of neurons": pruning.prune_structures(
            model, scores, {"heads": 1, "neurons": 0.2}
        ).model,
        "a third of heads, 50 % of neurons": pruning.prune_structures(
            model, scores, {"heads": 1, "neurons": 0.5}
        ).model,
        "20 % of layers": pruning.drop_layers(model, range(layers // 2, layers // 2 + 6)).model,
        "50 % of layers": pruning.drop_layers(model, range(8, 8 + layers // 2)).model,
    }
    table = Table("speed", model="smollm2-135m", threads=torch.get_num_threads(), prompt=256)
    times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in models}
    for _ in range(5):  # interleaved: what else the machine does meets all of them alike
        for name, one in models.items():
            with torch.inference_mode():
                once = latency(lambda one=one: one(input_ids=prompt), warmup=1, runs=1)
            times[name]["prefill"].append(round(once.median_seconds, 4))
            rate = decode_tokens_per_second(one, start, tokens=12, runs=1)
            times[name]["decode"].append(round(1 / rate, 5))
    dense = times["dense"]
    for name, one in models.items():
        about = {"name": name, "parameters": sum(p.numel() for p in one.parameters())}
        for what, seconds in times[name].items():
            about[what] = seconds
            about[f"{what}_times_dense"] = round(median(dense[what]) / median(seconds), 3)
        table.add({"name": name}, lambda about=about: about)
