"""The measurements behind the verdicts of `notebooks/05_inference/1_pruning`.

    python data/sweeps/05_inference/1_pruning_claims.py [PART ...]

mini      half of the weights, and of the structures, removed from `mini-5m`, and random controls
domains   the loss on every kind of text after 70 % were removed, on all held-out documents
learning  90 % of the weights go while `mini-300k` learns German: movement, and magnitude at once
lottery   lottery tickets and random masks of an eighth, trained alike from random weights
smollm2   the first two on `smollm2-135m`, with half of the weights removed
speed     `smollm2-135m`: seconds to read and to write, and bytes, in turns with the dense model

What is measured of every run is said in `effnb/lab/claims_bench.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pruning_structures import block_weights
from pruning_training import german, pieces
from torch import nn

from effnb.core.training import TrainingSettings
from effnb.evaluation import decode_tokens_per_second, file_bytes, latency
from effnb.inference import pruning
from effnb.lab import claims_bench, corpora
from effnb.lab.claims_bench import SEEDS, SHORT, Bench, Table, by_document, documents_of, domains_of

HALF, MOST, NEARLY_ALL, EIGHTH = 0.5, 0.7, 0.9, 0.875
GERMAN = 48
"""German descriptions that the models are judged by."""
TURNS = 9
LEARNING_STEPS, TICKET_STEPS = 80, 300


def random_weights(model: nn.Module, share: float, seed: int) -> nn.Module:
    """As many weights of each layer removed as by magnitude, at random."""
    masks = pruning.masks_of(pruning.magnitude(model, share))
    return pruning.apply_masks(model, pruning.random_masks(masks, seed))


def random_structures(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A share of all heads and neurons removed at random."""
    scores = pruning.random_scores(model, seed)
    return pruning.prune_structures(model, scores, {"heads": share, "neurons": share}).model


SINGLE = ("Wanda", "SparseGPT")
"""Methods that are free to remove any single weight."""


def whole_shares(pruned: nn.Module) -> list[float]:
    """Of each matrix, which part of what was removed lies in rows or columns that are all gone."""
    found = []
    for mask in pruning.masks_of(pruned).values():
        whole = ~(mask.any(1, keepdim=True) & mask.any(0))
        found.append(round(int(whole.sum()) / max(1, int((~mask).sum())), 5))
    return found


def one_shot(table: Table, bench: Bench) -> None:
    """Half removed by each method and at random, five seeds each."""
    model = bench.model
    table.add({"model": bench.name, "method": "original"}, lambda: bench.judged(model))
    for seed in SEEDS:
        given = bench.calibration(seed)
        methods: dict[str, tuple[Callable[[], nn.Module], Any]] = {
            "Wanda": (lambda given=given: pruning.wanda(model, given, HALF), given),
            "SparseGPT": (lambda given=given: pruning.sparsegpt(model, given, HALF), given),
            "LLM-Pruner": (lambda given=given: pruning.llm_pruner(model, given, HALF).model, given),
            "random weights": (lambda seed=seed: random_weights(model, HALF, seed), None),
            "random structures": (lambda seed=seed: random_structures(model, HALF, seed), None),
        }
        for method, (make, seen) in methods.items():

            def measure(
                make: Callable[[], nn.Module] = make, seen: Any = seen, method: str = method
            ) -> dict:
                pruned = make()
                gone = 1 - block_weights(pruned) / block_weights(model)
                row = bench.judged(pruned, seen) | {"removed": round(gone, 4) or HALF}
                return row | ({"whole_shares": whole_shares(pruned)} if method in SINGLE else {})

            about = {"model": bench.name, "method": method, "amount": HALF, "seed": seed}
            table.add(about, measure)


def kinds_of_text(table: Table, bench: Bench, methods: dict[str, Callable], amount: float) -> None:
    """The loss of every document of every kind of text, before and after."""
    documents = domains_of(bench.loaded)

    def judged(model: nn.Module) -> dict[str, Any]:
        return {"domains": {name: by_document(model, of) for name, of in documents.items()}}

    common = {"model": bench.name, "table": "domains"}
    table.add(common | {"method": "original"}, lambda: judged(bench.model))
    for seed in SEEDS:
        for method, prune in methods.items():
            table.add(
                common | {"method": method, "amount": amount, "seed": seed},
                lambda prune=prune, seed=seed: judged(
                    prune(bench.model, bench.calibration(seed), amount)
                ),
            )


def mini(table: Table) -> None:
    """Weights and structures of the workbook's model."""
    one_shot(table, Bench("mini-5m"))


def domains(table: Table) -> None:
    """Does pruning hurt one kind of text more than another?"""
    methods = {"Wanda": pruning.wanda, "SparseGPT": pruning.sparsegpt}
    kinds_of_text(table, Bench("mini-5m"), methods, MOST)


def smollm2(table: Table) -> None:
    """Both on a model of 135 million parameters."""
    bench = Bench("smollm2-135m")
    one_shot(table, bench)
    kinds_of_text(table, bench, {"Wanda": pruning.wanda}, HALF)


def learning(table: Table) -> None:
    """Ninety per cent go while a model learns: all see the same batches."""
    bench = Bench("mini-300k")
    model, steps, shape = bench.model, LEARNING_STEPS, (8, 64)
    stream = german(bench.loaded)
    texts = [t.text for t in corpora.translations("de", "test")]
    documents = documents_of(bench.loaded, texts, GERMAN, SHORT)
    settings = TrainingSettings(
        steps=steps, learning_rate=1e-3, warmup_steps=10, schedule="cosine", seed=0
    )
    goal = pruning.CubicSchedule(NEARLY_ALL, begin=8, end=60)
    threshold = pruning.CubicSchedule(0.1, begin=8, end=60)
    for seed in SEEDS:
        batches = pieces(stream, seed, shape)
        methods = {
            "magnitude at once": lambda batches=batches: pruning.fine_tune(
                pruning.magnitude(model, NEARLY_ALL), batches, settings
            ),
            "movement, hard": lambda batches=batches: pruning.movement(
                model, batches, settings, goal, score_learning_rate=3e-2
            ),
            "movement, soft": lambda batches=batches: pruning.soft_movement(
                model, batches, settings, threshold, penalty=500.0, score_learning_rate=0.2
            ),
        }
        for method, make in methods.items():

            def measure(make: Callable = make) -> dict[str, Any]:
                tuned = make().model
                reached = pruning.summarize(pruning.masks_of(tuned)).sparsity
                if reached < NEARLY_ALL - 0.001:
                    raise ValueError(f"only {reached:.1%} of the weights were removed.")
                return {
                    "documents": by_document(tuned, documents),
                    "training_tokens": steps * shape[0] * shape[1],
                    "removed": round(reached, 4),
                }

            about = {"model": bench.name, "method": method, "amount": NEARLY_ALL, "seed": seed}
            table.add(about, measure)


def lottery(table: Table) -> None:
    """Tickets and random masks of an eighth of the weights; the last run of both is the same."""
    bench = Bench("mini-300k")
    steps, shape = TICKET_STEPS, (8, 64)
    ids: list[int] = []
    for text in corpora.documents("novels", "train"):
        ids += bench.loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) > 150_000:
            break
    stream = torch.tensor(ids)
    settings = TrainingSettings(
        steps=steps, learning_rate=3e-3, warmup_steps=20, schedule="cosine", seed=0
    )
    tokens = {"training_tokens": steps * shape[0] * shape[1], "calibration_tokens": 0}
    common = {"model": bench.name, "amount": EIGHTH}
    for seed in SEEDS:
        batches = pieces(stream, seed, shape)
        pair = [common | {"method": method, "seed": seed} for method in ("ticket", "random mask")]
        if all(any(about.items() <= row.items() for row in table.rows) for about in pair):
            continue
        torch.manual_seed(seed)
        start = type(bench.model)(bench.model.config)
        ticket = pruning.lottery(start, batches, settings, rounds=3, rate=0.5)[-1]
        masks = pruning.random_masks(ticket.masks, seed)
        control = pruning.fine_tune(
            pruning.apply_masks(start, masks), batches, settings, masks=masks
        ).model
        for about, model in zip(pair, (ticket.model, control)):
            table.add(about, lambda model=model: bench.judged(model) | tokens)


def speed(table: Table) -> None:
    """Seconds to read 256 tokens and to write one, and bytes, of one interleaved run."""
    bench = Bench("smollm2-135m")
    prompt = bench.calibration(0)[:1]
    common = {"model": bench.name, "table": "speed"}
    models = {
        "original": ({}, bench.model),
        "magnitude": ({"amount": HALF}, pruning.magnitude(bench.model, HALF)),
        "LLM-Pruner": (
            {"amount": HALF},
            pruning.llm_pruner(bench.model, bench.calibration(0), HALF).model,
        ),
    }
    times: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in models}
    for _ in range(TURNS):  # in turns: what else the machine does meets all of them alike
        for name, (_, model) in models.items():
            with torch.inference_mode():
                once = latency(lambda model=model: model(input_ids=prompt), warmup=1, runs=1)
            times[name]["prefill"].append(round(once.median_seconds, 4))
            rate = decode_tokens_per_second(model, prompt[:, :16], tokens=12, runs=1)
            times[name]["decode"].append(round(1 / rate, 5))
    for name, (more, model) in models.items():
        measured = {f"{what}_seconds": seconds for what, seconds in times[name].items()}
        measured |= {"bytes": file_bytes(model), "threads": torch.get_num_threads()}
        table.add(common | {"method": name} | more, lambda measured=measured: measured)


PARTS = {
    "mini": mini, "domains": domains, "learning": learning, "lottery": lottery,
    "smollm2": smollm2, "speed": speed,
}  # fmt: skip

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
