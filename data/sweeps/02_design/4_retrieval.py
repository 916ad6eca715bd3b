"""The stored measurements of `notebooks/02_design/4_retrieval` (`make results`).

    python data/sweeps/02_design/4_retrieval.py                 # every part
    python data/sweeps/02_design/4_retrieval.py sizes --resume

Each part is written to `data/results/02_design/4_retrieval/<part>.json`, row by row, and goes on
where it ended with `--resume`.

sizes        loss over entries of the datastore, three decoders, settings chosen at each (8 minutes)
knobs        loss over share, neighbours and temperature, one by one, mini-300k (2 minutes)
keys         keys from the last feed-forward and from the output layer, mini-1m (3 minutes)
approximate  IVF over some lists against every key, mini-1m (3 minutes)
overlap      loss over what a chunk shares with the datastore; its own text in it (2 minutes)
neighbours   RETRO fitted once, read with 0 to 8 neighbours (3 minutes)

Minutes are those of one idle core, estimated. One seed; what verdicts rest on is measured by
`4_retrieval_claims.py`.
"""

from __future__ import annotations

import sys
from statistics import fmean
from typing import Any

import torch

from effnb.chapters.design.retrieval import fitting, memory, texts
from effnb.design.retrieval import FaissIndex, chunk_overlap
from effnb.lab import load, sweeps
from effnb.lab.sweeps import timed

ENTRIES = (3_000, 12_000, 50_000, 200_000)
MIDDLE = 50_000
JUDGED, TUNING = 96, 40
PROBES = (1, 4, 16, 64)


class Table(sweeps.Table):
    """Rows of this chapter."""

    chapter = "02_design/4_retrieval"


class Reader:
    """A decoder, its library and its texts; the datastore is built when it is first asked for."""

    def __init__(self, name: str, entries: int) -> None:
        """Load the decoder and cut the texts."""
        self.name, self.model = name, load(name, device="cpu").model
        tokenizer = load(name, device="cpu").tokenizer
        self.shelf = texts.library(tokenizer, entries)
        self.judged = texts.texts(tokenizer, "test", JUDGED)
        self.held = texts.texts(tokenizer, "validation", TUNING, 128)
        self._stores: dict[str, Any] = {}

    def store(self, at: str = "feedforward") -> Any:
        """The datastore of the whole library."""
        if at not in self._stores:
            self._stores[at] = memory.stored(self.model, self.shelf, at)
        return self._stores[at]

    def tuned(self, store: Any, at: str = "feedforward") -> tuple[memory.Setting, memory.Texts]:
        """The setting chosen on validation texts, and the texts judged on."""
        setting = memory.chosen(memory.look_up(self.model, store, self.held, at=at))
        return setting, memory.look_up(self.model, store, self.judged, at=at)


def described(setting: memory.Setting) -> dict[str, Any]:
    """A setting, as a row holds it."""
    return {"lam": setting.lam, "k": setting.k, "temperature": setting.temperature}


def sizes() -> None:
    """Loss of each decoder over the entries of its datastore."""
    table = Table("sizes", documents=JUDGED)
    for name in memory.MODELS:
        kept: list[Reader] = []

        def reader(name: str = name, kept: list[Reader] = kept) -> Reader:
            if not kept:
                kept.append(Reader(name, ENTRIES[-1]))
            return kept[0]

        for entries in ENTRIES:

            def measure(reader: Any = reader, entries: int = entries) -> dict[str, Any]:
                here = reader()
                store = here.store()
                store = store.sample(min(entries, len(store)))
                setting, found = here.tuned(store)
                return described(setting) | {
                    "loss": found.loss(setting),
                    "alone": found.loss(None),
                    "bytes": store.bytes,
                    "parameters": sum(p.numel() for p in here.model.parameters()),
                }

            table.add({"model": name, "entries": entries}, measure)


def knobs() -> None:
    """Each setting changed by itself, around the one that was chosen."""
    table = Table("knobs", model="mini-300k", entries=MIDDLE)
    kept: list[Any] = []

    def ready() -> tuple[memory.Setting, memory.Texts]:
        if not kept:
            here = Reader("mini-300k", MIDDLE)
            kept.append(here.tuned(here.store()))
        return kept[0]

    for knob, values in (("lam", (0.0, *memory.LAMS, 1.0)), ("k", (1, 2, 4, 8, 16, 32, 64)),
                         ("temperature", memory.TEMPERATURES)):  # fmt: skip
        for value in values:

            def measure(knob: str = knob, value: float = value) -> dict[str, Any]:
                setting, found = ready()
                changed = memory.Setting(**(described(setting) | {knob: value}))
                loss = found.loss(changed)
                return {"loss": loss if loss < float("inf") else None}

            table.add({"knob": knob, "value": value}, measure)


def keys() -> None:
    """Where keys are read."""
    table = Table("keys", model="mini-1m", entries=MIDDLE)
    for at in ("feedforward", "output"):

        def measure(at: str = at) -> dict[str, Any]:
            here = Reader("mini-1m", MIDDLE)
            setting, found = here.tuned(here.store(at), at)
            return described(setting) | {"loss": found.loss(setting), "alone": found.loss(None)}

        table.add({"at": at}, measure)


def approximate() -> None:
    """Lists that are looked at, against every key."""
    table = Table("approximate", model="mini-1m", entries=MIDDLE)
    kept: list[Any] = []

    def ready() -> tuple[Reader, memory.Setting, memory.Texts, float]:
        if not kept:
            here = Reader("mini-1m", MIDDLE)
            here.judged = here.judged[:32]
            setting, exact = here.tuned(here.store())
            every = FaissIndex(here.store())
            _, seconds = timed(memory.look_up, here.model, every, here.judged)
            kept.append((here, setting, exact, seconds))
        return kept[0]

    for probes in PROBES:

        def measure(probes: int = probes) -> dict[str, Any]:
            here, setting, exact, every = ready()
            index = FaissIndex(here.store(), "ivf", lists=224, probes=probes)
            found, seconds = timed(memory.look_up, here.model, index, here.judged)
            near, wanted = (one.looked.neighbours.rows for one in (found, exact))
            shared = [len(set(a) & set(b)) for a, b in zip(near.tolist(), wanted.tolist())]
            return {
                "lists": index.lists,
                "neighbours": round(fmean(shared) / near.shape[1], 4),
                "loss": found.loss(setting),
                "exact": exact.loss(setting),
                "alone": exact.loss(None),
                "seconds": seconds,
                "exact_seconds": every,
            }

        table.add({"probes": probes}, measure)


def overlap() -> None:
    """Gain of chunks that share little, much, or all of their tokens with the datastore."""
    table = Table("overlap", model="mini-300k", entries=MIDDLE, chunk=memory.CHUNK)
    here = Reader("mini-300k", MIDDLE)
    whole = [ids[: len(ids) // memory.CHUNK * memory.CHUNK] for ids in here.judged]
    here.judged = [ids for ids in whole if ids]
    for leaked in (False, True):

        def measure(leaked: bool = leaked) -> dict[str, Any]:
            shelf = [*here.shelf, *(here.judged if leaked else [])]
            store = memory.stored(here.model, shelf)
            setting = memory.chosen(memory.look_up(here.model, here.store(), here.held))
            found = memory.look_up(here.model, store, here.judged)
            gains = (found.tokens(None) - found.tokens(setting)).split(found.lengths)
            points = []
            for ids, gain in zip(here.judged, gains, strict=True):
                shares = chunk_overlap(ids, here.shelf, chunk=memory.CHUNK)
                # The first token of a text is foreseen by nothing.
                by_chunk = torch.cat([gain.new_zeros(1), gain]).split(memory.CHUNK)
                counts = [len(by_chunk[0]) - 1, *(len(c) for c in by_chunk[1:])]
                points += [
                    [round(float(s), 4), round(float(c.sum()) / n, 4)]
                    for s, c, n in zip(shares, by_chunk, counts, strict=True)
                ]
            return described(setting) | {
                "loss": found.loss(setting),
                "alone": found.loss(None),
                "points": points,
            }

        table.add({"leaked": leaked}, measure)


def neighbours() -> None:
    """RETRO with other numbers of neighbours than it was trained with."""
    table = Table("neighbours", model="mini-1m", trained_with=fitting.NEIGHBOURS)
    kept: list[Any] = []

    def ready() -> tuple[Any, Any, Any]:
        if not kept:
            loaded = load("mini-1m", device="cpu")
            shelf = texts.library(loaded.tokenizer, 300_000)
            course = fitting.course(shelf, loaded.model.config.vocab_size)
            judged = texts.texts(loaded.tokenizer, "test", 400)
            kept.append((fitting.fitted(loaded.model, course, 0), course,
                         texts.rows(judged, fitting.LENGTH)[:JUDGED]))  # fmt: skip
        return kept[0]

    for reading in ("retrieved", "random"):
        for k in (0, 1, 2, 4, 8):

            def measure(reading: str = reading, k: int = k) -> dict[str, Any]:
                model, course, judged = ready()
                near = fitting.neighbours_for(course, judged, reading, k)
                found = fitting.by_document(model, judged, near)
                return {"loss": round(fmean(found), 5)}

            table.add({"read": reading, "k": k}, measure)


PARTS: dict[str, sweeps.Part] = {
    "sizes": sizes,
    "knobs": knobs,
    "keys": keys,
    "approximate": approximate,
    "overlap": overlap,
    "neighbours": neighbours,
}


if __name__ == "__main__":
    sys.exit(sweeps.run(PARTS, __file__, __doc__.splitlines()[0]))
