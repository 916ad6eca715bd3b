"""The sweep of the chapter on many tasks: every part runs, and the page can show what it stores."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from effnb.chapters.finetuning.multitask import drawings, methods, panels, tables
from effnb.lab import load
from effnb.lab.sweeps import Table

SWEEP = Path(__file__).resolve().parents[3] / "data/sweeps/04_finetuning/3_multitask.py"
TASKS = {"language": 12, "match": 8, "summary": 4}
SMALL = {
    "TEXTS": 4, "FEWER": 4, "SHOTS": (0, 1, 2), "DRAWS": (0,), "SEEDS": (0,), "JUDGED": 4,
    "MIXED_STEPS": 1, "ALONE_STEPS": 1, "FOLLOWED_STEPS": 1, "RATES_STEPS": 1, "VALIDATED": 2,
    "FEW_TASKS": ("match",), "MIXED": TASKS, "LABELLED": ("language", "match"),
    "TRAINED": ("language", "summary"), "HELD_OUT": ("match",),
    "QUESTIONS": {"language": methods.QUESTIONS["language"]},
}  # fmt: skip


@pytest.fixture
def measured(monkeypatch):
    """What each part stores, on the smallest model and little of everything."""
    spec = importlib.util.spec_from_file_location("multitask_sweep", SWEEP)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    real, kept = load("mini-300k", device="cpu"), {}
    for name, value in SMALL.items():
        assert hasattr(script, name)
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(methods, "MIXED", TASKS)
    monkeypatch.setattr(tables, "LABELLED", SMALL["LABELLED"])
    monkeypatch.setattr(
        script, "load",
        lambda name, device: SimpleNamespace(name=name, model=real.model, tokenizer=real.tokenizer),
    )  # fmt: skip
    few = script.methods.t_few
    monkeypatch.setattr(script.methods, "t_few", lambda *a, **k: few(*a, **(k | {"steps": 1})))
    monkeypatch.setattr(
        Table, "store", lambda self: kept.update({self.name: {**self.about, "table": self.rows}})
    )
    for part in script.PARTS.values():
        part()
    return {name.rpartition("/")[2]: data for name, data in kept.items()}


def test_every_part_can_be_shown(measured):
    rows = {name: data["table"] for name, data in measured.items()}
    assert set(rows) == {
        "orders", "majority", "shots", "rates", "mixing", "few", "instructions",
    }  # fmt: skip
    assert len(rows["orders"]) == 24
    assert len({row["labels"] for row in rows["orders"]}) == 6
    assert "24 orders" in tables.orders_said(rows["orders"], "language")
    assert "in 24 orders" in drawings.orders(rows["orders"], "language").caption
    assert panels.orders(rows["orders"]).at(order=3).text
    assert len(tables.orders_table(rows["orders"]).rows) == 2
    assert "its last example" in tables.recency_said(rows["orders"])
    assert len(tables.cost_table(measured["orders"]["costs"]).rows) == 4
    assert [row["first"] for row in rows["majority"]] == [0, 1, 2, 3, 4]
    assert len(tables.majority_table(rows["majority"]).rows) == 5
    assert [row["shots"] for row in rows["shots"]] == [0, 1, 2]
    assert tables.shots_said(rows["shots"])
    assert drawings.shots(rows["shots"]).alt
    assert [line[0] for line in tables.rates_table(rows["rates"]).rows] == ["0.01", "0.03", "0.1"]
    assert tables.mixing_table(rows["mixing"]).rows[-1][0] == "one model each"
    assert "language" in tables.mixing_said(rows["mixing"])
    assert len(tables.few_table(rows["few"]).rows) == 4
    assert "in 0 of 1 seed" in tables.few_said(rows["few"]) or "in 1" in tables.few_said(
        rows["few"]
    )
    assert len(tables.wordings_table(rows["instructions"]).rows) == 6
