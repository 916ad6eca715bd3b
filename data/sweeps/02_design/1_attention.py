"""The stored measurements of `notebooks/02_design/1_attention` (`make results`).

    python data/sweeps/02_design/1_attention.py            # every part
    python data/sweeps/02_design/1_attention.py streaming  # this part

Each part is written to `data/results/02_design/1_attention/<part>.json`. Idle times on one core:

smollm2    a text of 1,024 tokens through SmolLM2-135M with caches of 256, by sinks (1 min)
streaming  texts of 2,048 tokens through `mini-5m`, by size of the cache and sinks (1 min)
grouped    `mini-300k` with one head of keys in place of two: pooled three ways, and trained a
           little further, five seeds (1 min)

The tables behind the verdicts are those of `1_attention_claims.py`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from effnb.chapters.design.attention import streaming as through
from effnb.core.modules import share
from effnb.core.training import TrainingSettings, causal_lm_loss, train
from effnb.design.attention import grouped_query
from effnb.lab import load, sweeps
from effnb.lab.claims_bench import SEEDS, by_document, documents_of
from effnb.lab.sweeps import held_out_novel, run, training_batches
from effnb.lab.texts import long_texts

BIN, WRITTEN = 64, 32
SMOLLM2 = {"length": 1024, "texts": 1, "chunk": 32}
SMOLLM2_CACHES = ((256, 0), (256, 4), (through.EVERYTHING, 0), (256, 1))
MINI = {"length": 2048, "texts": 2, "chunk": 16}
WINDOWS, SINKS = (256,), (0, 4)
STEPS, EVERY, SHAPE, RATE = 20, 20, (4, 128), 1e-3
POOLINGS = ("mean", "first", "random")
DOCUMENTS = 12


class Table(sweeps.Table):
    """A table of this chapter."""

    chapter = "02_design/1_attention"


def streamed(name: str, part: str, caches: list[tuple[int | str, int]], about: dict) -> None:
    """Loss by place of texts that go through each of the caches, and what is written behind one."""
    loaded = load(name, device="cpu")
    ids = long_texts(loaded.tokenizer, about["length"], count=about["texts"])
    trained = loaded.model.config.max_position_embeddings
    table = Table(part, model=name, bin=BIN, trained=trained, **about)
    for window, sinks in caches:

        def measure(window: int | str = window, sinks: int = sinks) -> dict:
            past = through.empty_cache(loaded.model, window, sinks)
            losses = through.read(loaded.model, ids, past, about["chunk"])
            words = through.written(loaded.model, ids[:, -1:], past, WRITTEN)
            said = loaded.tokenizer.decode(words[0], skip_special_tokens=True)
            return {"curve": through.binned(losses, BIN), "text": said}

        table.add({"window": window, "sinks": sinks}, measure)


def smollm2() -> None:
    """Does a real model break when its first tokens leave the cache?"""
    streamed("smollm2-135m", "smollm2", list(SMOLLM2_CACHES), SMOLLM2)


def streaming() -> None:
    """The same for a model of the bench, beyond the length it was trained on."""
    caches = [(window, sinks) for window in WINDOWS for sinks in SINKS]
    streamed("mini-5m", "streaming", [(through.EVERYTHING, 0), *caches], MINI)


def grouped() -> None:
    """One head of keys and values in place of two, before and after a little training."""
    loaded = load("mini-300k", device="cpu")
    documents = documents_of(loaded, held_out_novel(), DOCUMENTS, 256)
    table = Table(
        "grouped", model="mini-300k", steps=STEPS, heads=loaded.model.config.num_key_value_heads
    )
    for seed in SEEDS:
        batches = training_batches(loaded, seed, STEPS, SHAPE)
        for pooling in ("none", *POOLINGS):
            start = (
                share(loaded.model)
                if pooling == "none"
                else grouped_query(loaded.model, 1, pooling=pooling, seed=seed)
            )
            about = {"pooling": pooling, "seed": seed}
            wanted = [about | {"steps": steps} for steps in range(0, STEPS + 1, EVERY)]
            if all(any(w.items() <= row.items() for row in table.old) for w in wanted):
                found = iter([])
            else:
                found = uptrained(start, batches, documents)
            for row in wanted:
                table.add(row, lambda found=found: next(found))


def uptrained(
    start: nn.Module, batches: list[Tensor], documents: list[Tensor]
) -> Iterator[dict[str, list[float]]]:
    """The loss of each document before training, and after every few steps of it."""
    model = copy.deepcopy(start)
    found = [{"documents": by_document(model, documents)}]

    def look(model: nn.Module) -> dict[str, list[float]]:
        found.append({"documents": by_document(model, documents)})
        return {}

    settings = TrainingSettings(
        steps=STEPS,
        learning_rate=RATE,
        warmup_steps=min(3, STEPS),
        schedule="linear",
        evaluate_every=EVERY,
    )  # fmt: skip
    train(model, batches.__getitem__, settings, loss=causal_lm_loss, evaluate=look)
    return iter(found)


PARTS: dict[str, Callable[[], None]] = {
    "smollm2": smollm2,
    "streaming": streaming,
    "grouped": grouped,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run(PARTS, __file__, __doc__.splitlines()[0]))
