"""The two verdicts on many tasks can come out in each of the ways."""

import numpy as np
import pytest
from planted_rows import stored

from effnb.chapters.finetuning.multitask import tables, verdicts
from effnb.lab.claims import FAILS, HOLDS, IN_PART, OPEN, UNTESTED, ledger

SEEDS, DOCUMENTS = 5, 24
GAIN = {"shown": 0.3, "contradicted": -0.3, "undecided": 0.01}
"""Changes that decide, and one that lies on the edge of the smallest effect."""


def rows_of(levels, fixed, model):
    """Rows around these levels, for every seed unless the method draws nothing."""
    rng = np.random.default_rng(0)
    base = rng.normal(0, 0.1, DOCUMENTS)
    rows = []
    for about, level in levels:
        for seed in (None,) if about["method"] in fixed else range(SEEDS):
            documents = level + base + rng.normal(0, 0.02, DOCUMENTS)
            row = {"model": model, "steps": 200, **about, "documents": documents.tolist()}
            rows.append(row | ({} if seed is None else {"seed": seed}))
    return rows


def many_tasks(otherwise="shown", **each):
    """Rows for S-F1; a part's outcome by its name with `_` for `-`."""
    gain = {p: GAIN[each.get(p, otherwise)] for p in ("all", "ia3", "new_tasks", "new_wordings")}
    as_good = {"shown": 0.0, "contradicted": -0.3, "undecided": -0.04}
    mixture = 1 + gain["all"]
    levels = [
        ({"table": "tasks", "method": "untrained"}, 1),
        ({"table": "tasks", "method": "mixture"}, mixture),
        (
            {"table": "tasks", "method": "one for each"},
            mixture - as_good[each.get("as_good", otherwise)],
        ),
        ({"table": "tasks", "method": "(IA)³"}, 1 + gain["ia3"]),
    ]
    for part in ("new_tasks", "new_wordings"):
        about = {"table": "instructions", "judged": part.replace("_", " ")}
        levels += [
            (about | {"method": "untrained"}, 1),
            (about | {"method": "instructions"}, 1 + gain[part]),
        ]
    return rows_of(levels, ("untrained",), "mini-1m")


def prompts(otherwise="shown", **each):
    """Rows for S-F2."""
    gain = {p: GAIN[each.get(p, otherwise)] for p in ("pattern", "examples", "calibrated")}
    shots = 0.5 + GAIN[each.get("chance", otherwise)]
    words = shots - gain["examples"]
    levels = [
        ({"method": "bare text"}, words - gain["pattern"]),
        ({"method": "words"}, words),
        ({"method": "examples"}, shots),
        ({"method": "examples, calibrated"}, shots + gain["calibrated"]),
    ]
    return rows_of(levels, ("bare text", "words"), "smollm2-135m")


JUDGES = {"S-F1": (verdicts.s_f1, many_tasks), "S-F2": (verdicts.s_f2, prompts)}


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize(
    ("each", "outcome"), [("shown", HOLDS), ("contradicted", FAILS), ("undecided", OPEN)]
)
def test_a_claim_holds_fails_or_stays_undecided(name, each, outcome):
    judge, plant = JUDGES[name]
    found = judge(stored(plant(each)))
    assert {p.part.name: p.outcome for p in found.parts if p.part.counts} == {
        n: each for n, part in ledger()[name].parts.items() if part.counts
    }
    assert found.outcome == outcome
    assert found.note
    assert not found.post_hoc


@pytest.mark.parametrize("name", JUDGES)
def test_each_part_alone_makes_it_hold_in_part(name):
    judge, plant = JUDGES[name]
    for part in (n for n, one in ledger()[name].parts.items() if one.counts):
        for outcome in ("contradicted", "undecided"):
            found = judge(stored(plant(**{part.replace("-", "_"): outcome})))
            assert found.outcome == IN_PART
            assert [p.part.name for p in found.having(outcome) if p.part.counts] == [part]


@pytest.mark.parametrize(("name", "part"), [("S-F1", "new_wordings"), ("S-F2", "calibrated")])
def test_what_stands_beside_a_claim_does_not_decide_it(name, part):
    judge, plant = JUDGES[name]
    assert judge(stored(plant(**{part: "contradicted"}))).outcome == HOLDS
    alone = {p.part.name: p for p in judge(stored(plant(**{part: "contradicted"}))).parts}
    assert alone[part.replace("_", "-")].outcome == "contradicted"


@pytest.mark.parametrize("name", JUDGES)
def test_nothing_is_said_without_measurements_or_with_three_seeds(name):
    judge, plant = JUDGES[name]
    assert judge().outcome == UNTESTED
    few = [row for row in plant() if row.get("seed", 0) < 3]
    assert all(p.why for p in judge(stored(few)).parts if p.part.seeds)


def test_unequal_steps_are_no_evidence():
    rows = many_tasks()
    for row in rows:
        if row["method"] == "one for each":
            row["steps"] *= 2
    (unequal,) = [p for p in verdicts.s_f1(stored(rows)).parts if p.part.name == "as-good"]
    assert "unequal steps" in unequal.why


def test_what_is_stored_can_be_judged():
    found = verdicts.stored()
    assert {one.name for one in found} <= set(verdicts.TABLES)
    assert verdicts.s_f1(*found).claim.id == "S-F1"
    assert verdicts.s_f2(*found).claim.id == "S-F2"


@pytest.mark.parametrize(
    ("wordings", "tasks", "said"),
    [
        ("shown", "undecided", "does not show"),
        ("shown", "shown", "as well"),
        ("contradicted", "shown", "not on other words"),
        ("undecided", "contradicted", "neither"),
    ],
)
def test_what_was_learned_is_said_as_it_was_judged(wordings, tasks, said):
    rows = many_tasks(new_wordings=wordings, new_tasks=tasks)
    found = tables.instructions_said(rows, verdicts.s_f1(stored(rows)))
    assert said in found
    assert f"a gain is {tasks}" in found
    few = [row for row in rows if row.get("seed", 0) < 2]
    assert "Not judged yet" in tables.instructions_said(few, verdicts.s_f1(stored(few)))
