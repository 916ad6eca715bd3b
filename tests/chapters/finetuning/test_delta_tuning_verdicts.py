"""The verdicts on delta tuning, from grids that are made up."""

import numpy as np
import pytest
from planted_rows import planted_rows
from planted_rows import stored as plain

from effnb.chapters.finetuning.delta_tuning import verdicts
from effnb.lab.claims import FAILS, HOLDS, IN_PART, OPEN, UNTESTED, ledger
from effnb.lab.results import Provenance, StoredResult

ORDER = ("full", "LoRA", "LoRA, rank 1", "adapter", "prefix", "prompt")
PLANTED = {"D-4": verdicts.d_4, "D-5": verdicts.d_5, "D-6": verdicts.d_6, "D-7": verdicts.d_7}


def grid(quality, curves=None, seeds=5, tasks=verdicts.TASKS, documents=180):
    """Rows of a grid in which each method is right with a given probability."""
    rng, rows = np.random.default_rng(0), []
    hard = {task: rng.random(documents) for task in tasks}  # the same texts are hard for all
    for seed in range(seeds):
        for task in tasks:
            for name, p in quality.items():
                speed = (curves or quality)[name]

                def answers(share, count=documents, task=task):
                    noise = 0.02 * rng.normal(size=count)
                    return "".join(str(int(x)) for x in hard[task][:count] + noise < share)

                rows.append(
                    {
                        "model": "minilm-l6", "task": task, "method": name, "seed": seed,
                        "answers": answers(p), "curve": [answers(speed, 64) for _ in range(3)],
                    }
                )  # fmt: skip
    about = Provenance("python data/sweep.py", "2030-01-31", "cpu", {})
    return StoredResult("04_finetuning/1_delta_tuning/grid", {"table": rows}, about)


def test_every_registered_claim_of_the_chapter_has_a_function():
    own = {n for n, one in ledger().items() if n.startswith("D-") and one.parts}
    assert {n for n in own if int(n[2:]) <= 7} == {"D-2", "D-3", *PLANTED}


def test_the_order_of_quality():
    falling = dict(zip(ORDER, (0.9, 0.8, 0.8, 0.7, 0.6, 0.4), strict=True))
    assert verdicts.d_2(grid(falling)).outcome == HOLDS
    rising = dict(zip(ORDER, (0.4, 0.6, 0.3, 0.7, 0.8, 0.9), strict=True))
    assert verdicts.d_2(grid(rising)).outcome == FAILS
    mixed = falling | {"adapter": 0.85}
    found = verdicts.d_2(grid(mixed))
    assert found.outcome == IN_PART
    assert [p.part.name for p in found.having("contradicted")] == ["lora-adapter"]


def test_the_order_of_speed():
    speed = dict(zip(ORDER, (0.9, 0.7, 0.7, 0.7, 0.5, 0.2), strict=True))
    level = dict.fromkeys(ORDER, 0.8)
    found = {p.part.name: p.outcome for p in verdicts.d_3(grid(level, speed)).parts}
    assert found["full-adapter"] == found["lora-prefix"] == found["prefix-prompt"] == "shown"
    assert found["structure"] == "shown"
    assert {found["number"], found["adapter-lora"]} <= {"shown", "undecided"}


def test_less_than_a_whole_grid_decides_nothing():
    level = dict.fromkeys(ORDER, 0.8)
    assert verdicts.d_2(grid(level, seeds=3)).outcome == UNTESTED
    assert verdicts.d_2(grid(level, tasks=verdicts.TASKS[:3])).outcome == UNTESTED
    assert verdicts.d_2().outcome == UNTESTED


def test_shares_of_full_tuning():
    def outcome(bitfit, last, random):
        names = {"full": 0.8, "BitFit": bitfit, "last layers": last, "random modules": random}
        return {p.part.name: p.outcome for p in verdicts.d_5(grid(names)).parts}

    assert set(outcome(0.8, 0.79, 0.72).values()) == {"shown"}
    poor = outcome(0.6, 0.6, 0.5)
    assert poor["bitfit"] == poor["last"] == poor["random-acceptable"] == "contradicted"
    assert poor["random-worse"] == "shown"


def subspace(accuracy, models=("minilm-l6",), part="intrinsic"):
    rng, rows = np.random.default_rng(0), []
    hard = rng.random(180)
    for seed in range(5):
        for model in models:
            for dimension, share in accuracy[model].items():
                right = hard + 0.02 * rng.normal(size=180) < share
                rows.append(
                    {
                        "model": model, "dimension": dimension, "seed": seed,
                        "answers": "".join(str(int(x)) for x in right),
                    }
                )  # fmt: skip
    about = Provenance("python data/sweep.py", "2030-01-31", "cpu", {})
    return StoredResult(f"04_finetuning/1_delta_tuning/{part}", {"table": rows}, about)


def prompts(intrinsic):
    """Accuracies on 14 unseen tasks, a whole prompt at 0.9 and a random subspace at 0.6."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(5):
        for method, mean in (
            ("prompt", 0.9), ("random subspace", 0.6), ("intrinsic prompt", intrinsic)
        ):  # fmt: skip
            found = (mean + 0.01 * rng.normal(size=14)).tolist()
            rows.append({"model": "mini-1m", "method": method, "seed": seed, "accuracies": found})
    about = Provenance("python data/sweep.py", "2030-01-31", "cpu", {})
    return StoredResult("04_finetuning/1_delta_tuning/shared", {"table": rows}, about)


def test_dimensions():
    low = subspace({"minilm-l6": {0: 0.9, 64: 0.5, 1024: 0.88}})
    sizes = ("mini-300k", "mini-5m")
    larger = subspace(
        {"mini-300k": {0: 0.8, 64: 0.4}, "mini-5m": {0: 0.9, 64: 0.85}}, sizes, "scale"
    )
    found = {p.part.name: p.outcome for p in verdicts.d_7(low, larger, prompts(0.85)).parts}
    assert found == {
        "low": "shown", "lower": "contradicted", "larger": "shown", "prompts": "shown",
        "shared": "shown",
    }  # fmt: skip
    poor = {p.part.name: p.outcome for p in verdicts.d_7(low, prompts(0.55)).parts}
    assert poor["prompts"] == "contradicted"
    alone = {p.part.name: p.outcome for p in verdicts.d_7(low).parts}
    assert alone["larger"] == "not tested"


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize(
    ("each", "outcome"), [("shown", HOLDS), ("contradicted", FAILS), ("undecided", OPEN)]
)
def test_a_claim_holds_fails_or_stays_undecided(name, each, outcome):
    found = PLANTED[name](plain(planted_rows(name, otherwise=each)))
    assert found.outcome == outcome
    assert found.note


def test_a_taxonomy_cannot_be_tested():
    found = verdicts.d_1()
    assert found.outcome == UNTESTED
    assert "fits none" in found.note


def test_what_is_stored_can_be_judged():
    every = verdicts.stored()
    assert {one.name for one in every} <= set(verdicts.TABLES)
    for judge in (verdicts.d_2, verdicts.d_3, *PLANTED.values()):
        assert judge(*every).parts
