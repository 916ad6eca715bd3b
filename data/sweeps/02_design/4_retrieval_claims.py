"""The measurements behind the verdict of `notebooks/02_design/4_retrieval`.

    python data/sweeps/02_design/4_retrieval_claims.py [knn] [adaptation] [retro]

knn         three sizes of decoders, alone and with a datastore of 200,000 tokens (6 minutes)
adaptation  mini-300k on German descriptions, alone and with a German datastore (2 minutes)
retro       RETRO fitted to the frozen mini-1m with five seeds, read with retrieved neighbours, with
            random ones and without (10 minutes)

Minutes are those of one idle core, estimated. Share, neighbours and temperature are chosen on
validation texts; each text judged on is a row's document.
"""

from __future__ import annotations

from typing import Any

from effnb.chapters.design.retrieval import fitting, memory, texts
from effnb.lab import claims_bench, load
from effnb.lab.claims_bench import SEEDS, Table

ENTRIES = 200_000
JUDGED, TUNING = 96, 40
RETRO_ENTRIES = 300_000
RETRO_STEPS = fitting.STEPS
FITTED = "mini-1m"
MODEL = "mini models"


def missing(table: Table, about: dict[str, Any]) -> bool:
    """Whether a row is not stored yet."""
    return not any(about.items() <= row.items() for row in table.rows)


def settings_of(setting: memory.Setting) -> dict[str, Any]:
    """What was chosen, as a row holds it."""
    return {"lam": setting.lam, "k": setting.k, "temperature": setting.temperature}


def knn(table: Table) -> None:
    """Every size, alone and with a datastore of its own keys."""
    for size in memory.MODELS:
        about = {"model": MODEL, "size": size, "table": "knn"}
        if not missing(table, about | {"method": "kNN-LM"}):
            continue
        loaded = load(size, device="cpu")
        shelf = texts.library(loaded.tokenizer, ENTRIES)
        judged = texts.texts(loaded.tokenizer, "test", JUDGED)
        held = texts.texts(loaded.tokenizer, "validation", TUNING, 128)
        store = memory.stored(loaded.model, shelf)
        setting = memory.chosen(memory.look_up(loaded.model, store, held))
        found = memory.look_up(loaded.model, store, judged)
        little = memory.shares_little(judged, shelf)

        def row(setting: Any, found: Any = found, little: Any = little) -> dict[str, Any]:
            return {
                "documents": found.by_document(setting),
                "little_shared": found.by_document(setting, little),
                "little_tokens": int(little.sum()),
                "tokens": len(little),
            }

        parameters = sum(p.numel() for p in loaded.model.parameters())
        table.add(about | {"method": "alone"}, lambda n=parameters: row(None) | {"parameters": n})
        table.add(
            about | {"method": "kNN-LM"},
            lambda s=setting, d=store: (
                row(s) | settings_of(s) | {"entries": len(d), "store_bytes": d.bytes}
            ),
        )


def adaptation(table: Table) -> None:
    """Text of another language: nothing is trained."""
    about = {"model": MODEL, "table": "adaptation"}
    if not missing(table, about | {"method": "kNN-LM"}):
        return
    loaded = load("mini-300k", device="cpu")
    shelf = texts.german(loaded.tokenizer, "train", 10_000)
    judged = texts.german(loaded.tokenizer, "test", JUDGED)
    held = texts.german(loaded.tokenizer, "validation", TUNING, 128)
    store = memory.stored(loaded.model, shelf)
    setting = memory.chosen(memory.look_up(loaded.model, store, held))
    found = memory.look_up(loaded.model, store, judged)
    table.add(about | {"method": "alone"}, lambda: {"documents": found.by_document(None)})
    table.add(
        about | {"method": "kNN-LM"},
        lambda: (
            {"documents": found.by_document(setting)}
            | settings_of(setting)
            | {"entries": len(store), "store_bytes": store.bytes}
        ),
    )


def retro(table: Table) -> None:
    """A frozen decoder that learns to read neighbours, five seeds."""
    loaded = load(FITTED, device="cpu")
    judged = texts.rows(texts.texts(loaded.tokenizer, "test", 400), fitting.LENGTH)[:JUDGED]
    about = {"model": MODEL, "table": "retro", "size": FITTED}
    table.add(
        about | {"method": "alone"},
        lambda: {"documents": fitting.by_document(loaded.model, judged, None)},
    )
    read = [about | {"method": "RETRO", "read": r, "seed": s}
            for s in SEEDS for r in fitting.READINGS]  # fmt: skip
    if not any(missing(table, row) for row in read):
        return
    shelf = texts.library(loaded.tokenizer, RETRO_ENTRIES)
    course = fitting.course(shelf, loaded.model.config.vocab_size)
    for seed in SEEDS:
        rows = [row for row in read if row["seed"] == seed and missing(table, row)]
        if not rows:
            continue
        model = fitting.fitted(loaded.model, course, seed, RETRO_STEPS)
        more = {
            "steps": RETRO_STEPS,
            "new_parameters": model.new_parameters(),
            "chunks": len(course.store),
        }
        for row in rows:
            near = fitting.neighbours_for(course, judged, row["read"], seed=seed)
            found = fitting.by_document(model, judged, near)
            table.add(row, lambda found=found, more=more: {"documents": found} | more)


PARTS = {"knn": knn, "adaptation": adaptation, "retro": retro}

if __name__ == "__main__":
    claims_bench.run(PARTS, __file__, __doc__.splitlines()[0])
