"""The stored measurements of `notebooks/05_inference/8_matryoshka` (`make results`).

    python data/sweeps/05_inference/8_matryoshka.py             # every part
    python data/sweeps/05_inference/8_matryoshka.py shortlist   # this part

Before anything else MiniLM reads the collection, once: about ten minutes on two idle cores, kept in
the cache. Then, on one idle core:

dimensions   quality over the numbers compared, of six ways to get few numbers (3 minutes)
shortlist    two looks: numbers in the first, and how many get the second; funnels (1 minute)
approximate  HNSW and IVF over prefixes, cost in distance evaluations (5 minutes)
classes      archive sections from nested representations, and early stops (4 minutes)
vectors      the first 128 numbers of every document, for the chapter's live search (seconds)

Each part is written to `data/results/05_inference/8_matryoshka/<part>.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from effnb.chapters.inference.matryoshka import collection, methods, shipped
from effnb.inference import matryoshka
from effnb.lab import sweeps

SEEDS = (0, 1, 2, 3, 4)
SHORTLISTS = (10, 20, 50, 100, 200, 500, 1000)
FIRST_LOOK = (8, 16, 32, 64, 128)
FUNNEL = ((8, 16, 32, 64, 384), (400, 100, 50, 20))
EFS = (10, 20, 40, 80, 160, 320)
LOOKS = (20, 50, 100, 200, 400)
PROBES = (1, 2, 4, 8, 16, 32)


class Table(sweeps.Table):
    """Rows of this chapter."""

    chapter = "05_inference/8_matryoshka"


class Searched:
    """Queries and documents after a map, and the rows that are asked for."""

    def __init__(self, A: torch.Tensor, split: str = "test") -> None:
        """Map both sides."""
        here, v = collection.collection(), collection.vectors()
        self.q, self.d = v.queries[split] @ A.T, v.documents @ A.T
        self.own = methods.own_rows(here.asked[split])

    def exact(self, dims: int) -> matryoshka.Found:
        """What a search by the first `dims` numbers finds."""
        return matryoshka.search(self.q, self.d, methods.K, dims=dims)


def dimensions() -> None:
    """Six ways to compare few numbers, and prefixes that keep their length."""
    v = collection.vectors()
    table = Table("dimensions", queries=len(v.queries["test"]), documents=len(v.documents))

    def curve(method: str, A: torch.Tensor, dims: tuple[int, ...], **about: object) -> None:
        side = Searched(A)
        exact = side.exact(A.shape[0]) if A.shape[0] == methods.FULL else None
        for m in dims:
            table.add(
                {"method": method, "dims": m} | about,
                lambda m=m: methods.means(side.exact(m), side.own, exact),
            )

    curve("MiniLM, cut", torch.eye(methods.FULL), methods.DIMS)
    every = torch.cat([v.pair_queries, v.pair_documents])
    curve("principal components", matryoshka.principal_map(every), methods.DIMS)
    for seed in SEEDS:
        nested = methods.trained_map(v, methods.DIMS, seed)
        curve("Matryoshka", nested, tuple(sorted(methods.DIMS + methods.BETWEEN)), seed=seed)
        undivided(table, nested, seed)
        whole = methods.trained_map(v, (methods.FULL,), seed)
        curve("trained whole, cut", whole, methods.DIMS, seed=seed)
        for m in methods.OWN:
            curve("own size", methods.trained_map(v, (m,), seed), (m,), seed=seed)
        for m in methods.DIMS[:-1]:
            picked = matryoshka.random_dims(m, methods.FULL, seed)
            curve("random numbers", picked, (m,), seed=seed)


def undivided(table: Table, A: torch.Tensor, seed: int) -> None:
    """Prefixes that keep their length."""
    side = Searched(A)
    exact = side.exact(methods.FULL)
    for m in methods.DIMS:
        table.add(
            {"method": "Matryoshka, not divided", "dims": m, "seed": seed},
            lambda m=m: methods.means(methods.not_divided(side.q, side.d, m), side.own, exact),
        )


def shortlist() -> None:
    """Two looks over both knobs, with the nested map and with principal components; funnels."""
    v = collection.vectors()
    table = Table("shortlist", queries=len(v.queries["test"]), documents=len(v.documents))
    every = torch.cat([v.pair_queries, v.pair_documents])
    sides = [("principal components", None, matryoshka.principal_map(every))]
    sides += [("Matryoshka", s, methods.trained_map(v, methods.DIMS, s)) for s in SEEDS]
    for method, seed, A in sides:
        two_looks(table, method, A, {} if seed is None else {"seed": seed})


def two_looks(table: Table, method: str, A: torch.Tensor, drawn: dict) -> None:
    """Both knobs, and a funnel, for one map."""
    side = Searched(A)
    exact = side.exact(methods.FULL)

    def add(about: dict, look: Callable[[], matryoshka.Found]) -> None:
        table.add(about | drawn, lambda: methods.means(look(), side.own, exact))

    add({"method": method, "dims": methods.FULL, "shortlist": 0}, lambda: exact)
    for m in FIRST_LOOK:
        for kept in SHORTLISTS:
            add(
                {"method": method, "dims": m, "shortlist": kept},
                lambda m=m, kept=kept: matryoshka.adaptive_retrieval(
                    side.q, side.d, methods.K, dims=m, shortlist=kept
                ),
            )
    dims, shortlists = FUNNEL
    add(
        {"method": f"{method}, funnel"},
        lambda: matryoshka.funnel(side.q, side.d, methods.K, dims=dims, shortlists=shortlists),
    )


def approximate() -> None:
    """HNSW and IVF over all numbers and over prefixes, the latter with a second look."""
    v = collection.vectors()
    table = Table("approximate", queries=len(v.queries["test"]), documents=len(v.documents))
    for seed in SEEDS[:3]:
        walks(table, Searched(methods.trained_map(v, methods.DIMS, seed)), seed)


def walks(table: Table, side: Searched, seed: int) -> None:
    """Both kinds of index for one map, over their knobs; a prefix gets a second look."""
    exact = side.exact(methods.FULL)

    def add(about: dict, index: matryoshka.Hnsw | matryoshka.Ivf, kept: int, **how: int) -> None:
        def look() -> dict:
            if index.dims == methods.FULL:
                found = index.search(side.q, methods.K, **how)
            else:
                shortlist = index.search(side.q, kept, **how)
                found = matryoshka.rerank(side.q, side.d, shortlist, methods.K)
            return methods.means(found, side.own, exact)

        table.add({"dims": index.dims, "seed": seed} | about | how, look)

    for m in (16, 32, 64, 128, methods.FULL):
        hnsw = matryoshka.Hnsw(side.d, dims=m)
        for ef in EFS if m == methods.FULL else LOOKS:
            add({"method": "HNSW"}, hnsw, ef, ef=ef)
        ivf = matryoshka.Ivf(side.d, dims=m, seed=seed)
        for probes in PROBES:
            add({"method": "IVF"}, ivf, 100, probes=probes)


def classes() -> None:
    """Archive sections: nested heads, tied heads, own sizes, and a plain network that is cut."""
    here, v = collection.collection(), collection.vectors()
    data = methods.by_split(here, v)
    (e, y), held, (test, wanted) = data["train"], data["validation"], data["test"]
    sizes = {name: len(labels) for name, (_, labels) in data.items()}
    table = Table("classes", texts=sizes, classes=int(y.max()) + 1)

    def said(logits: torch.Tensor) -> dict:
        return {"accuracy": round(float(methods.right(logits, wanted).float().mean()), 4)}

    for seed in SEEDS:
        for method, tied in (("MRL", False), ("MRL-E", True)):
            model = methods.train_classifier(e, y, methods.CLASS_DIMS, seed, tied=tied)
            with torch.inference_mode():
                found, tuning = model(test), model(held[0])
            for m, logits in found.items():
                table.add({"method": method, "dims": m, "seed": seed}, lambda x=logits: said(x))
            for tolerance in (0.0, 0.005, 0.02):
                thresholds = matryoshka.tune_thresholds(tuning, held[1], tolerance=tolerance)
                stopped = matryoshka.adaptive_classification(found, thresholds)
                accuracy = float((stopped.labels == wanted).float().mean())
                table.add(
                    {"method": f"{method}, early stops", "tolerance": tolerance, "seed": seed},
                    lambda a=accuracy, s=stopped: {
                        "accuracy": round(a, 4),
                        "numbers": round(s.mean_dims, 2),
                    },
                )
        for m in methods.CLASS_DIMS:
            own = methods.train_classifier(e, y, (m,), seed)
            with torch.inference_mode():
                logits = own(test)[m]
            table.add({"method": "own size", "dims": m, "seed": seed}, lambda x=logits: said(x))
        # The last of them is the plain network of 64 numbers.
        with torch.inference_mode():
            z, z_test = own.body(e), own.body(test)
        for method, A in (
            ("plain, cut", torch.eye(methods.WIDTH)),
            ("plain, principal components", matryoshka.principal_map(z)),
            ("plain, random numbers", matryoshka.random_dims(methods.WIDTH, methods.WIDTH, seed)),
        ):
            for m in methods.CLASS_DIMS:
                head = methods.linear_head(z @ A[:m].T, y, seed)
                with torch.inference_mode():
                    logits = head(z_test @ A[:m].T)
                about = {"method": method, "dims": m, "seed": seed}
                table.add(about, lambda x=logits: said(x))


def vectors() -> dict:
    """The first 128 numbers of every document and of some queries, in as few bytes as serve."""
    v = collection.vectors()
    return shipped.packed(v, methods.trained_map(v, methods.DIMS, 0))


PARTS = {
    "dimensions": dimensions,
    "shortlist": shortlist,
    "approximate": approximate,
    "classes": classes,
    "vectors": vectors,
}

if __name__ == "__main__":
    sys.exit(sweeps.run(PARTS, __file__, __doc__.splitlines()[0]))
