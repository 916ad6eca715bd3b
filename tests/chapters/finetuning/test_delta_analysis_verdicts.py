"""The verdicts on what deltas do together, from stored tables that are made up."""

import itertools

import numpy as np
import pytest

from effnb.chapters.finetuning.delta_analysis import verdicts
from effnb.chapters.finetuning.delta_analysis.methods import PARTS, SUBSETS, said
from effnb.lab.claims import UNTESTED, ledger
from effnb.lab.results import Provenance, StoredResult

JUDGES = {
    "D-8": verdicts.d_8,
    "D-9": verdicts.d_9,
    "D-10": verdicts.d_10,
    "D-11": verdicts.d_11,
    "D-12": verdicts.d_12,
    "D-13": verdicts.d_13,
}
SEEDS, DOCUMENTS = 5, 96


def table(part, rows, chapter=verdicts.CHAPTER):
    about = Provenance("python data/sweep.py", "2030-01-31", "cpu", {})
    return StoredResult(f"{chapter}/{part}", {"table": rows}, about)


class Draw:
    """Answers and losses in which the same texts are hard for all."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.hard = self.rng.random(4 * 180)

    def bits(self, share, count=DOCUMENTS):
        noise = 0.02 * self.rng.normal(size=count)
        return "".join(str(int(x)) for x in self.hard[:count] + noise < share)

    def losses(self, level, count=DOCUMENTS):
        found = level + 0.3 * self.hard[:count] + 0.01 * self.rng.normal(size=count)
        return [float(x) for x in found]


def outcomes(name, *stored):
    return {p.part.name: p.outcome for p in JUDGES[name](*stored).parts}


def test_every_registered_claim_of_the_chapter_has_a_function():
    own = {n for n, one in ledger().items() if verdicts.CHAPTER in one.chapters and one.parts}
    assert own == set(JUDGES)


@pytest.mark.parametrize("name", JUDGES)
def test_nothing_is_said_without_measurements(name):
    found = JUDGES[name]()
    assert found.outcome == UNTESTED
    assert found.note


def sets_at_once(worth, overfit=0.1):
    """Sets of methods, each adding its worth; training texts are right more often."""
    draw, rows = Draw(), []
    for seed in range(SEEDS):
        for names in (*SUBSETS, None):
            share = 0.5 + (0.1 if names is None else sum(worth[n] for n in names))
            more = 0.3 if names is None else overfit * len(names)
            rows.append(
                {
                    "model": "minilm-l6", "method": "full" if names is None else said(names),
                    "seed": seed, "answers": draw.bits(share),
                    "train_answers": draw.bits(share + more),
                }
            )  # fmt: skip
    return table("together", rows)


def test_what_a_method_adds_to_others():
    made = sets_at_once({"prompt": -0.1, "BitFit": 0.1, "adapter": 0.2})
    found = outcomes("D-8", made)
    assert found["adapter"] == found["bitfit"] == found["prompt"] == "shown"
    other = outcomes("D-8", sets_at_once({"prompt": 0.1, "BitFit": -0.1, "adapter": -0.1}))
    assert other["adapter"] == other["bitfit"] == other["prompt"] == "contradicted"
    assert found["zero"] == found["sequence"] == "not tested"


def test_means_are_over_sets_that_hold_others():
    rows = verdicts.together(sets_at_once(dict.fromkeys(PARTS, 0.0)).data["table"])
    right = {r["method"]: r["documents"] for r in rows if r["seed"] == 0 and "documents" in r}
    wanted = [right["prompt + adapter"], right["BitFit + adapter"], right[said(PARTS)]]
    assert right["with adapter"] == verdicts.mean_rows(wanted)
    wanted = [right["prompt"], right["BitFit"], right["prompt + BitFit"]]
    assert right["without adapter"] == verdicts.mean_rows(wanted)


def test_gaps():
    found = outcomes("D-9", sets_at_once(dict.fromkeys(PARTS, 0.0), overfit=0.1))
    assert found["adapter"] == found["bitfit"] == found["prompt"] == found["combined"] == "shown"
    assert found["prompt-adapter"] in ("undecided", "contradicted")
    assert found["templates"] == found["grid-lora"] == "not tested"


def test_gaps_of_the_grid():
    draw, rows = Draw(), []
    for seed in range(SEEDS):
        for task in verdicts.TASKS:
            for name, old in (("full", 0.95), ("LoRA", 0.8), ("prompt", 0.75)):
                rows.append(
                    {
                        "model": "minilm-l6", "task": task, "method": name, "seed": seed,
                        "answers": draw.bits(0.7, 180), "train_accuracy": old,
                    }
                )  # fmt: skip
    found = outcomes("D-9", table("grid", rows, "04_finetuning/1_delta_tuning"))
    assert found["grid-lora"] == found["grid-prompt"] == "shown"
    part = [r for r in rows if r["task"] != "origin"]
    found = outcomes("D-9", table("grid", part, "04_finetuning/1_delta_tuning"))
    assert found["grid-lora"] == "not tested"


def orders(third, alone):
    draw, rows = Draw(), []
    names = [*itertools.permutations(PARTS), ("adapter",) * 3]
    for seed in range(SEEDS):
        for order in names:
            last = alone if len(set(order)) == 1 else third
            stages = [draw.bits(share) for share in (0.5, 0.55, last)]
            rows.append(
                {"model": "minilm-l6", "method": ", ".join(order), "seed": seed, "stages": stages}
            )
    return table("sequence", rows)


def test_sequences():
    found = outcomes("D-8", orders(0.7, 0.6))
    assert found["sequence"] == found["longer"] == "shown"
    found = outcomes("D-8", orders(0.4, 0.6))
    assert found["sequence"] == found["longer"] == "contradicted"


def test_templates():
    draw, rows = Draw(), []
    for shots, gain in ((0, 0.3), (16, 0.1), (2048, -0.05)):
        for seed in range(SEEDS) if shots else (None,):
            for way, share in (("template", 0.5 + gain), ("bare text", 0.5)):
                row = {"model": "mini-1m", "method": way, "shots": shots,
                       "answers": draw.bits(share)}  # fmt: skip
                if shots:
                    row |= {"seed": seed, "train_answers": draw.bits(share + 0.2)}
                rows.append(row)
    found = outcomes("D-8", table("templates", rows))
    assert found["zero"] == found["few"] == found["many"] == "shown"
    assert outcomes("D-9", table("templates", rows))["templates"] != "not tested"


def test_scale():
    draw, rows = Draw(), []
    names = ("full", "LoRA", "adapter", "prompt", "last layers", "random modules")
    for seed in range(SEEDS):
        for size, base in (("mini-300k", 0.2), ("mini-1m", 0.4), ("mini-5m", 0.6)):
            for name in names:
                share = base + {"prompt": -0.1, "random modules": 0.1}.get(name, 0.0)
                early = share - (0.15 if size == "mini-300k" else 0.03)
                curve = [draw.bits(early), draw.bits(share)]
                rows.append({"model": size, "method": name, "seed": seed, "answers": curve[-1],
                             "curve": curve})  # fmt: skip
    assert set(outcomes("D-10", table("scale", rows)).values()) == {"shown"}


def moved(same=3.0, other=4.5, own=2.0, untuned=5.0):
    draw, rows = Draw(), []
    kinds = verdicts.KIND_OF

    def row(source, seed):
        losses = {
            t: draw.losses(
                untuned if source == "untuned" else own if source == t
                else same if kinds[source] == k else other, 40,
            )
            for t, k in kinds.items()
        }  # fmt: skip
        return {"model": "mini-1m", "source": source, **losses, **seed}

    rows.append(row("untuned", {}))
    rows += [row(s, {"seed": seed}) for seed in range(SEEDS) for s in kinds]
    return table("transfer", rows)


def test_transfer():
    found = outcomes("D-11", moved())
    assert found == {"within": "shown", "across": "shown", "generation": "shown",
                     "well": "contradicted"}  # fmt: skip
    found = outcomes("D-11", moved(same=4.9, other=3.0))
    assert found["across"] == "contradicted"
    assert found["well"] == "shown"
    rows = [r for r in moved().data["table"] if r["source"] != "expand"]
    assert set(outcomes("D-11", table("transfer", rows)).values()) == {"not tested"}


def test_theories():
    draw, rng = Draw(), np.random.default_rng(1)
    rows = [{"model": "mini-1m", "method": "untuned", "logs": rng.normal(size=(32, 6)).tolist(),
             "novel_documents": draw.losses(4.0, 24)}]  # fmt: skip
    for seed in range(SEEDS):
        full = rng.normal(size=(32, 6)) + 3
        for name, far in (("full", 0.0), ("LoRA", 0.3), ("adapter", 0.4), ("prompt", 0.5)):
            row = {
                "model": "mini-1m", "method": name, "seed": seed,
                "logs": (full + far * rng.normal(size=(32, 6))).tolist(),
                "novel_documents": draw.losses(4.5 if name == "full" else 4.1, 24),
            }  # fmt: skip
            if name == "full":
                row["energy"] = [0.8 + 0.05 * float(x) for x in rng.random(8)]
            rows.append(row)
    found = outcomes("D-12", table("tuned", rows))
    assert found["solution"] == found["function"] == "shown"
    assert outcomes("D-13", table("tuned", rows))["forgetting"] == "shown"

    control = [{"model": "mini-1m", "method": "untouched", "documents": draw.losses(5.0, 48)}]
    for seed in range(SEEDS):
        for way in ("back-propagation", "successive approximations"):
            rough = draw.losses(3.0, 48)
            control.append({"model": "mini-1m", "method": way, "seed": seed, "documents": rough})
    found = outcomes("D-12", table("control", control))
    assert found["same-cost"] == found["steers"] == "shown"


def test_applications():
    draw = Draw()
    times = [
        {"model": "minilm-l6", "method": name, "bytes": size,
         "seconds": [level + 0.01 * float(x) for x in draw.hard[:24]]}
        for name, level, size in (("full", 1.0, 40_000_000), ("adapter", 0.5, 150_000))
    ]  # fmt: skip
    found = outcomes("D-13", table("times", times))
    assert found["time"] == "shown"
    assert found["storage"] == "by construction"
    serve = [
        {"model": "mini-5m", "users": users, "method": name,
         "seconds": [level * (1 + 0.05 * float(x)) for x in np.random.default_rng(users).random(24)]
         if name == "batch" else [level * (1 + 0.05 * float(x)) for x in draw.hard[:24]]}
        for users in (8, 16)
        for name, level in (("batch", 0.1), ("loop", 0.4), ("merged", 0.3))
    ]  # fmt: skip
    found = outcomes("D-13", table("serve", serve))
    assert found["batch-8"] == found["batch-16"] == found["merged-16"] == "shown"
    rows = [{"model": "mini-1m", "method": "untuned", "documents": draw.losses(5.0)}]
    rows += [{"model": "mini-1m", "method": "black box", "seed": s, "documents": draw.losses(4.0)}
             for s in range(SEEDS)]  # fmt: skip
    assert outcomes("D-13", table("black_box", rows))["black-box"] == "shown"


def test_what_is_stored_can_be_judged():
    every = verdicts.stored()
    assert {one.name for one in every} <= set(verdicts.TABLES)
    for judge in JUDGES.values():
        assert judge(*every).parts
