"""Parts of `sweep_pruning.py`: pruning, and training before, meanwhile or afterwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from pruning_bench import Table, by_method, quiet_row
from torch import nn

from effnb.core.training import TrainingSettings, train
from effnb.inference import pruning
from effnb.lab import corpora
from effnb.lab.sweeps import SEEDS, Bench, calibration, training_batches, windows_of


def recovery() -> None:
    """Fine-tuning after one-shot pruning, with the mask held."""
    bench = Bench()
    model, steps = bench.model, 24
    table = Table("recovery", model="mini-5m", steps=steps, tokens=steps * 8 * 128)
    table.add({"method": "original", "sparsity": 0.0}, lambda: quiet_row(bench, model))
    settings = TrainingSettings(
        steps=steps, learning_rate=3e-4, warmup_steps=5, schedule="cosine", seed=0
    )
    for seed in SEEDS:
        batches = training_batches(bench.loaded, seed, steps)
        control: dict[str, Any] = {"method": "nothing pruned", "sparsity": 0.0, "seed": seed}

        def trained_dense(batches: list = batches) -> dict[str, Any]:
            same = copy.deepcopy(model)
            train(same, batches.__getitem__, settings)
            return quiet_row(bench, same)

        table.add(control, trained_dense)
        for method, sparsity, pattern in (
            ("magnitude", 0.7, "layer"), ("magnitude", None, "2:4"),
            ("SparseGPT", 0.7, "layer"),
        ):  # fmt: skip
            about = {"method": method, "sparsity": sparsity or 0.5, "pattern": pattern}

            def measure(
                method: str = method, sparsity: float | None = sparsity, pattern: str = pattern,
                seed: int = seed, batches: list = batches,
            ) -> dict[str, Any]:  # fmt: skip
                prune = by_method(model, calibration(bench.loaded, seed))[method]
                pruned = prune(sparsity, pattern=pattern)
                run = pruning.fine_tune(pruned, batches.__getitem__, settings)
                before = bench.losses(pruned)
                return quiet_row(bench, run.model) | {
                    "before": round(sum(before) / len(before), 5),
                    "zeros_kept": all(
                        bool((m == n).all())
                        for m, n in zip(
                            pruning.masks_of(pruned).values(), pruning.masks_of(run.model).values()
                        )
                    ),
                }

            table.add(about | {"seed": seed}, measure)


def german(loaded: Any) -> torch.Tensor:
    """German package descriptions as one stream of tokens, for a model that never learned any."""
    ids: list[int] = []
    for row in corpora.translations("de", "train"):
        ids += loaded.tokenizer.encode(row.text, add_special_tokens=False, verbose=False)
        ids.append(loaded.tokenizer.eos_token_id)
        if len(ids) > 100_000:
            break
    return torch.tensor(ids)


def pieces(
    stream: torch.Tensor, seed: int, shape: tuple[int, int]
) -> Callable[[int], torch.Tensor]:
    """A random batch of a stream for every step."""

    def batch(step: int) -> torch.Tensor:
        rng = random.Random(seed * 1_000_003 + step)
        starts = [rng.randrange(len(stream) - shape[1]) for _ in range(shape[0])]
        return torch.stack([stream[s : s + shape[1]] for s in starts])

    return batch


def training() -> None:
    """Learn German while weights go: by size, little by little, and by movement."""
    bench = Bench("mini-300k", questions=0)
    model, steps, shape = bench.model, 80, (8, 64)
    stream = german(bench.loaded)
    test = [t.text for t in corpora.translations("de", "test")]
    windows = windows_of(bench.loaded, test, 16, 256)
    table = Table(
        "training", model="mini-300k", steps=steps, tokens=steps * shape[0] * shape[1],
        text="package descriptions in German",
    )  # fmt: skip
    settings = TrainingSettings(
        steps=steps, learning_rate=1e-3, warmup_steps=10, schedule="cosine", seed=0
    )

    def row(tuned: nn.Module, seconds: float) -> dict[str, Any]:
        losses = bench.losses(tuned, windows)
        return {
            "loss": round(sum(losses) / len(losses), 5), "windows": losses,
            "reached": round(pruning.summarize(pruning.masks_of(tuned)).sparsity, 4),
            "seconds": round(seconds, 2),
        }  # fmt: skip

    table.add({"method": "original", "sparsity": 0.0, "seed": 0}, lambda: row(model, 0.0))
    for seed in SEEDS:
        batches = pieces(stream, seed, shape)

        def dense(batches: Callable = batches) -> dict[str, Any]:
            same = copy.deepcopy(model)
            return row(same, train(same, batches, settings).seconds)

        table.add({"method": "dense", "sparsity": 0.0, "seed": seed}, dense)
        for sparsity in (0.5, 0.9):
            schedule = pruning.CubicSchedule(sparsity, begin=8, end=60, every=5)
            moving = pruning.CubicSchedule(sparsity, begin=8, end=60)

            def one_shot(s: float = sparsity, batches: Callable = batches) -> dict[str, Any]:
                run = pruning.fine_tune(pruning.magnitude(model, s), batches, settings)
                return row(run.model, run.training.seconds)

            def slowly(schedule: Any = schedule, batches: Callable = batches) -> dict[str, Any]:
                run = pruning.gradual(model, batches, settings, schedule)
                return row(run.model, run.training.seconds)

            def moves(schedule: Any = moving, batches: Callable = batches) -> dict[str, Any]:
                run = pruning.movement(model, batches, settings, schedule, score_learning_rate=3e-2)
                return row(run.model, run.training.seconds)

            for method, measure in (
                ("magnitude at once", one_shot),
                ("magnitude, gradual", slowly),
                ("movement, hard", moves),
            ):
                table.add({"method": method, "sparsity": sparsity, "seed": seed}, measure)
        for penalty in (10.0, 100.0, 500.0):

            def soft(penalty: float = penalty, batches: Callable = batches) -> dict[str, Any]:
                threshold = pruning.CubicSchedule(0.1, begin=8, end=60)
                run = pruning.soft_movement(
                    model, batches, settings, threshold, penalty=penalty, score_learning_rate=0.2
                )
                return row(run.model, run.training.seconds)

            table.add({"method": "movement, soft", "penalty": penalty, "seed": seed}, soft)


def lottery() -> None:
    """Tickets from a random start: rewound, re-drawn, and with a random mask."""
    bench = Bench("mini-300k", questions=0, windows=8)
    steps, rounds, rate = 300, 3, 0.5
    texts: list[int] = []
    for text in corpora.documents("novels", "train"):
        texts += bench.loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(texts) > 150_000:
            break
    stream = torch.tensor(texts)
    table = Table(
        "lottery", model="mini-300k, from random weights", steps=steps, rate=rate,
        tokens=steps * 8 * 64,
    )  # fmt: skip
    settings = TrainingSettings(
        steps=steps, learning_rate=3e-3, warmup_steps=20, schedule="cosine", seed=0
    )

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return type(bench.model)(bench.model.config)

    def score(model: nn.Module) -> float:
        losses = bench.losses(model)
        return round(sum(losses) / len(losses), 5)

    for seed in SEEDS:
        batches = pieces(stream, seed, (8, 64))
        for step in (0, 15):
            name = f"ticket, rewound to step {step}"

            def measure(seed: int = seed, step: int = step, batches: Any = batches) -> dict:
                tickets = pruning.lottery(
                    fresh(seed), batches, settings, rounds=rounds, rate=rate, rewind_step=step
                )
                found: dict[str, Any] = {
                    "sparsities": [round(t.sparsity, 4) for t in tickets],
                    "losses": [score(t.model) for t in tickets],
                }
                if step:
                    return found
                again, at_random, sizes = [], [], []
                for ticket in tickets[3:]:
                    sizes.append(round(ticket.sparsity, 4))
                    other = pruning.apply_masks(fresh(seed + 100), ticket.masks)
                    run = pruning.fine_tune(other, batches, settings, masks=ticket.masks)
                    again.append(score(run.model))
                    masks = pruning.random_masks(ticket.masks, seed)
                    start = pruning.apply_masks(fresh(seed), masks)
                    run = pruning.fine_tune(start, batches, settings, masks=masks)
                    at_random.append(score(run.model))
                return found | {
                    "control_sparsities": sizes,
                    "re-drawn": again,
                    "random mask": at_random,
                }

            table.add({"method": name, "seed": seed}, measure)
