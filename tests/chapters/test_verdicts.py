"""Every chapter's verdicts can come out in each of the five ways."""

import sys

import pytest
from planted_rows import planted_groups, planted_rows, stored

from effnb.chapters.design.attention import verdicts as attention
from effnb.chapters.design.context import verdicts as context
from effnb.chapters.design.experts import verdicts as expert_routing
from effnb.chapters.design.retention import verdicts as retention
from effnb.chapters.design.retrieval import verdicts as retrieval
from effnb.chapters.design.sharing import verdicts as sharing
from effnb.chapters.hardware.codesign import verdicts as codesign
from effnb.chapters.inference.adaptive_computation import verdicts as adaptive
from effnb.chapters.inference.distillation import verdicts as distillation
from effnb.chapters.inference.low_rank import verdicts as low_rank
from effnb.chapters.inference.matryoshka import verdicts as matryoshka
from effnb.chapters.inference.pruning import verdicts as pruning
from effnb.chapters.inference.quantization import verdicts as quantization
from effnb.chapters.inference.retrieval_distillation import verdicts as retrievers
from effnb.chapters.inference.self_distilled_quantization import verdicts as self_distilled
from effnb.chapters.pretraining.objectives import verdicts as pretraining
from effnb.lab.claims import FAILS, HOLDS, IN_PART, OPEN, UNTESTED, ledger
from effnb.lab.results import NotMeasured

JUDGES = {
    "S-I1": pruning.s_i1,
    "C-1": pruning.c_1,
    "C-4": low_rank.c_4,
    "S-I3": quantization.s_i3,
    "C-3": quantization.c_3,
    "S-H3": codesign.s_h3,
    **{f"R-{number}": judge for number, judge in enumerate(retention.ALL, 1)},
    "S-M1": attention.s_m1,
    "S-M2": attention.s_m2,
    "S-M3": attention.s_m3,
    "S-M7": retrieval.s_m7,
    "S-M5": sharing.s_m5,
    "S-M6": sharing.s_m6,
    "S-M4": expert_routing.s_m4,
    "Y-1": context.y_1,
    "Y-2": context.y_2,
    "Y-3": context.y_3,
    "S-P1": pretraining.s_p1,
    "S-I2": distillation.s_i2,
    "C-2": distillation.c_2,
    "G-1": distillation.g_1,
    "G-2": distillation.g_2,
    "G-5": distillation.g_5,
    "G-3": retrievers.g_3,
    "G-4": retrievers.g_4,
    "S-I4": adaptive.s_i4,
    "G-6": adaptive.g_6,
    "G-7": adaptive.g_7,
    "G-8": matryoshka.g_8,
    **{f"Q-{number}": judge for number, judge in enumerate(self_distilled.ALL, 1)},
}


def test_every_registered_claim_has_a_function():
    # Those on delta tuning (D-) are judged from a grid, in tests/chapters/finetuning.
    others = {n for n, one in ledger().items() if one.parts and not n.startswith("D-")}
    assert others == {*JUDGES, "C-7", "S-H4", "S-F1", "S-F2"}
    assert quantization.c_7 is pruning.c_7
    assert expert_routing.s_i4 is adaptive.s_i4


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize(
    ("each", "outcome"), [("shown", HOLDS), ("contradicted", FAILS), ("undecided", OPEN)]
)
def test_a_claim_holds_fails_or_stays_undecided(name, each, outcome):
    found = JUDGES[name](stored(planted_rows(name, otherwise=each)))
    assert found.outcome == outcome
    assert not found.post_hoc
    assert found.note
    if name == "C-3" and each != "shown":
        return
    assert all(p.outcome == each for p in found.parts if p.part.counts)


@pytest.mark.parametrize("name", JUDGES)
def test_one_part_alone_makes_it_hold_in_part(name):
    last = [part.name for part in ledger()[name].parts.values() if part.counts][-1]
    for outcome in ("contradicted", "undecided"):
        found = JUDGES[name](stored(planted_rows(name, {last: outcome})))
        assert found.outcome == IN_PART
        assert [p.part.name for p in found.having(outcome)] == [last]


@pytest.mark.parametrize("name", JUDGES)
def test_nothing_is_said_without_measurements(name):
    found = JUDGES[name]()
    assert found.outcome == UNTESTED
    assert "is stored yet" in found.change()
    few = [r for r in planted_rows(name) if r.get("seed", 0) < 3]  # three seeds are not enough
    assert not [p for p in JUDGES[name](stored(few)).parts if p.part.seeds and not p.why]


def test_unequal_training_is_no_evidence_for_an_order():
    rows = planted_rows("C-3")
    for row in rows:
        if row["method"].startswith("QAT"):
            row["training_tokens"] *= 2
    found = quantization.c_3(stored(rows))
    unequal = {p.part.name for p in found.parts if "unequal training tokens" in p.why}
    assert {"quality-training-3", "quality-training-2", "cost-training"} <= unequal
    assert found.outcome == IN_PART


def test_mixed_precision_with_less_calibration_text_is_not_judged():
    rows = planted_rows("S-I3")
    for row in rows:
        if row["method"] == "mixed GPTQ":
            row["calibration_tokens"] //= 4
    mixed = [p for p in quantization.s_i3(stored(rows)).parts if p.part.name.startswith("mixed")]
    assert len(mixed) == 5
    assert all("unequal calibration tokens" in p.why for p in mixed)


def test_sizes_are_those_of_the_model_that_is_timed():
    for name, size, speed in (("S-I3", "size", "speed"), ("S-I1", "size", "speed-structures")):
        parts = ledger()[name].parts
        assert parts[size].method == parts[speed].method
        assert parts[size].model == parts[speed].model
        assert not parts[size].counts
        assert any(p.role == "context" and p.model == parts[size].model for p in parts.values())


@pytest.mark.parametrize(("rise", "outcome"), [((0.3, 0.1, 0.1), HOLDS), ((0.1, 0.1, 0.1), FAILS)])
def test_domains_are_judged_once_for_both_chapters(rise, outcome):
    rows = planted_groups("C-7", rise)
    plain = [row for row in rows if row["method"] == "original"]
    one = plain + [row for row in rows if "bits" in row]
    other = [row for row in rows if "amount" in row]
    assert pruning.c_7(stored(rows)).outcome == outcome
    half = pruning.c_7(stored(one))
    assert half.outcome == (IN_PART if outcome == HOLDS else FAILS)
    assert all(p.why for p in half.parts if "pruning" in p.part.chapter)
    assert pruning.c_7(stored(one), stored(other)).outcome == outcome


def experts(work=0.3):
    table = [
        {
            "experts": count, "devices": devices, "sent_bytes": [10, 12][:devices],
            "operations": [1000, 1000][:devices], "largest_error": 5e-7,
            "busy_seconds": [
                0.1 * (1 if devices == 1 else work) * x
                for x in ((1, 1.1, 0.9, 1.05, 1) if devices == 1 else (1.1, 1.05, 1, 1, 0.9))
            ],
        }
        for count in (4, 16) for devices in (1, 4)
    ]  # fmt: skip
    return stored(table)


def scaling(speed):
    noise = (1.0, 1.02, 0.98, 1.01, 0.99, 1.0, 1.03)
    table = [
        {"experts": count, "devices": n, "seconds": [x * (1 if n == 1 else speed) for x in order]}
        for count in (4, 16)
        for n, order in ((1, noise), (2, noise[::-1]))
    ]
    return stored(table)


@pytest.mark.parametrize(
    ("work", "by_clock", "outcomes", "verdict"),
    [
        (0.3, 0.6, ("shown", "shown"), IN_PART),  # a compiler was not tested
        (0.3, 1.0, ("shown", "contradicted"), IN_PART),
        (0.3, None, ("shown", "not tested"), IN_PART),
        (0.9, 1.3, ("contradicted", "contradicted"), FAILS),
        (0.9, None, ("contradicted", "not tested"), FAILS),
        (0.47619, 0.95238, ("undecided", "undecided"), OPEN),
    ],
)
def test_partitioning(work, by_clock, outcomes, verdict):
    found = codesign.s_h4(experts(work), None if by_clock is None else scaling(by_clock))
    by_name = {p.part.name: p for p in found.parts}
    assert (by_name["work"].outcome, by_name["clock"].outcome) == outcomes
    assert found.outcome == verdict
    assert "compiler" in by_name["compiler"].why
    assert by_name["bytes"].numbers()[0] == pytest.approx(0.012)


@pytest.mark.parametrize("clock", [None, NotMeasured("06_hardware/2_codesign/scaling")])
def test_a_missing_run_by_the_clock_is_named_as_the_reason(clock):
    (by_clock,) = [p for p in codesign.s_h4(experts(), clock).parts if p.part.name == "clock"]
    assert "two idle cores" in by_clock.why


@pytest.mark.parametrize(
    "companion",
    [
        pruning,
        low_rank,
        quantization,
        codesign,
        retention,
        distillation,
        retrievers,
        adaptive,
        matryoshka,
        self_distilled,
    ],
)
def test_what_is_stored_can_be_judged(companion):
    """Whatever has been measured by now; parts that were not say so."""
    found = companion.stored()
    assert {one.name for one in found} <= set(companion.TABLES)
    for name, judged in JUDGES.items():
        own = sys.modules[judged.__module__].stored()
        assert judged(*own).claim.id == name
    joint = pruning.c_7(*pruning.stored(), *quantization.stored())
    assert joint.claim.id == "C-7"
