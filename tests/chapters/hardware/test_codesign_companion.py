"""The companion of the chapter on co-design: roofs, experts, stored tables, drawings, panels."""

import json
import math
import re

import pytest
import torch

from effnb.chapters.hardware.codesign import drawings, experts, live, panels, roofs, tables
from effnb.hardware.codesign import gshard, roofline
from effnb.kernels import bench as kernels_bench
from effnb.lab import results
from effnb.lab._files import DamagedFile
from effnb.lab.bench import Bench

MACHINE = roofs.Machine(
    roofline.Roof(panels.HERE, 1e11, 2e10),
    {m: 2e-4 * (1 + m / 32) for m in roofs.TOKENS},
)


def stored(name, data, device):
    """A stored result, after a round through JSON."""
    about = results.Provenance("a command", "2026-01-31", device, {"torch": "2.13.0"})
    return results.StoredResult(name, json.loads(json.dumps(data)), about)


# --- roofs ----------------------------------------------------------------------------------------


def test_a_measured_roof_is_nowhere_beaten(monkeypatch):
    """The ceilings are raised to what a product reached: a dot above its roof says nothing."""
    monkeypatch.setattr(
        roofline, "measure_roof", lambda **_: roofline.Roof("cpu, measured", 1e9, 1e9)
    )
    monkeypatch.setattr(roofline, "measure_matmul", lambda m, *_: 1e-4 * m)
    found = roofs.measured()
    for tokens, seconds in found.seconds.items():
        assert seconds >= found.roof.least_seconds(found.work(tokens)) * (1 - 1e-9)
    assert found.ratio(16) == pytest.approx(16)
    assert "16 tokens at once take 16.0 times as long" in roofs.sharing_said(found)


def test_the_ratio_by_the_roof_is_told_beside_the_measured_one():
    said = roofs.predicted_said(MACHINE)
    least = [MACHINE.roof.least_seconds(MACHINE.work(m)) for m in (1, 64)]
    assert f"{least[1] / least[0]:.1f} times as long by the roof" in said
    assert f"{3 / (1 + 1 / 32):.1f} times as measured" in said


def test_few_bits_gain_for_few_tokens_and_sparse_arithmetic_for_many():
    shown = roofs.gains_table()
    rows = {row[0]: [float(cell) for cell in row[1:]] for row in shown.rows}
    four, pattern, both, unknown = (rows[form] for form in roofs.FORMS)
    assert four[0] > 3.8 and four[-1] == 1
    assert pattern[-1] == 2
    assert both[0] > four[0]
    assert unknown == [1.0] * len(roofs.AT_ONCE)


def test_decoding_waits_for_memory_and_prompts_do_not():
    rows = {row[0]: row[2:] for row in roofs.waiting_table().rows}
    assert set(rows["read a prompt"]) == {"arithmetic"}
    assert set(rows["decode, 512 sequences"]) == {"memory"}
    assert set(rows["512 sequences of one token"]) == {"arithmetic"}


def test_twice_the_tile_is_half_the_traffic():
    assert [row[1] for row in roofs.tiles_table().rows] == ["128", "64", "32"]


def test_what_is_measured_here_is_said_in_numbers():
    assert re.search(
        r"6 steps move 768 MiB .* 128 MiB .* \d+\.\d times as fast", roofs.fusion_said()
    )
    assert re.search(r"128 KiB again and again reaches \d+\.\d times", roofs.cached_said(MACHINE))


# --- the GPU, with its times stored and without ---------------------------------------------------


def timings(measured):
    """Every case of the benchmark; a third of the roofline for ours where measured."""
    ceilings = kernels_bench.Ceilings(3e12, {"bfloat16": 7e14})
    lines = []
    for case in kernels_bench.cases(small=True):
        if not measured:
            lines.append(kernels_bench.unmeasured(case))
            continue
        about = (case.kernel, case.shape, "bfloat16", case.bytes, case.flops)
        least = max(case.bytes / 3e12, case.flops / 7e14)
        for who, share in (("ours", 1 / 3), ("torch", 1 / 4)):
            rates = (case.bytes * share / least, case.flops * share / least, share)
            lines.append(kernels_bench.Timing(*about, who, least / share, *rates, 0.0))
    device = torch.device("cuda") if measured else None
    content = kernels_bench.content(lines, ceilings if measured else None, device)
    return stored("kernels", content["data"], content["provenance"]["device"])


@pytest.mark.parametrize("measured", [True, False])
def test_the_gpu_says_where_its_numbers_come_from(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    run = timings(measured)
    monkeypatch.setattr(results, "read", {"kernels": run}.__getitem__)
    gpu = roofs.gpu()
    picture, shown = drawings.roofs(MACHINE, gpu), roofs.kernels_table(gpu)
    kernels = {line["kernel"] for line in run.data["timings"]}
    cases = {(line["kernel"], line["shape"]) for line in run.data["timings"]}
    assert {row[0] for row in shown.rows} == kernels
    assert sum(int(row[1]) for row in shown.rows) == len(cases)
    assert gpu.measured is measured
    if measured:
        assert gpu.name == "H100 80GB HBM3"
        assert len(gpu.points) == len(cases)
        assert all(row[4:] == ("33%", "1.33") for row in shown.rows)
        assert "3.00 trillion bytes and 700 trillion operations" in picture.alt
        assert "Nothing on the right was measured" not in picture.caption
    else:
        assert gpu.name == "H100 SXM"
        assert all(row[4:] == ("not measured", "not measured") for row in shown.rows)
        assert "No GPU has run them" in shown.caption
        assert "3.35 trillion bytes and 989 trillion operations" in picture.alt
        assert "Nothing on the right was measured" in picture.caption


def test_the_stored_run_of_the_kernels_is_shown():
    shown = roofs.kernels_table(roofs.gpu())
    assert len(shown.rows) >= 5
    for row in shown.rows:
        waiting, cases = map(int, row[3].split(" of "))
        assert waiting <= cases == int(row[1])


# --- experts --------------------------------------------------------------------------------------


def run_of(count, devices, sent, busy=0.1, total=5.0, error=1e-7):
    sizes = {"experts": count, "devices": devices, "slots": 4, "weight_bytes": [2**20]}
    return sizes | {
        "sent_bytes": [sent] * devices,
        "operations": [10**9 // devices] * devices,
        "busy_seconds": [busy, busy, 2 * busy],
        "output_sum": total,
        "largest_error": error,
    }


def grown(**changes):
    """Stored runs of four experts on one and two processes; the second may be changed."""
    sizes = {"groups": 8, "tokens": 32, "model": 16, "hidden": 8}
    sent = 2 * gshard.exchange_bytes(4, 4, 4, 16, 2)
    second = run_of(4, 2, int(sent), busy=0.06) | changes
    return {"sizes": sizes, "table": [run_of(4, 1, 0), second]}


def test_stored_runs_are_compared_with_each_other_with_the_loop_and_with_the_formula():
    said = experts.grown_said(grown())
    assert "on 1, 2 processes agree" in said
    assert "they agree with a loop" in said
    assert "are those of the formula" in said
    assert "differ" in experts.grown_said(grown(output_sum=5.1))
    assert "do not agree with a loop" in experts.grown_said(grown(largest_error=1e-3))
    assert "are not those of the formula" in experts.grown_said(grown(sent_bytes=[1, 1]))


def test_time_is_that_of_the_processor_and_by_the_clock_where_it_was_measured():
    clock = stored(
        "06_hardware/2_codesign/scaling",
        {
            "table": [
                {"experts": 4, "devices": 1, "seconds": [0.1] * 3, "exchange_seconds": [0.0] * 3},
                {"experts": 4, "devices": 2, "seconds": [0.08] * 3, "exchange_seconds": [0.02] * 3},
            ]
        },
        "cpu (x86_64)",
    )
    shown = experts.work_table(grown(), clock.data)
    assert shown.rows == (("4", "0.60", "0.80", "25%"),)
    without = experts.work_table(grown(), results.NotMeasured("scaling")["table"])
    assert without.rows == (("4", "0.60"),)
    assert "By the clock: not measured" in without.caption


def test_a_damaged_measurement_is_not_taken_for_a_missing_one(monkeypatch):
    def read(name):
        raise DamagedFile(f"the stored result {name}.json is damaged: restore it.")

    monkeypatch.setattr(results, "read", read)
    with pytest.raises(DamagedFile, match=r"06_hardware/2_codesign/scaling.json is damaged"):
        experts.stored("scaling")


def test_two_processes_agree_with_the_loop_and_with_the_formula():
    reports = experts.run()
    said = experts.run_said(reports)
    assert said.startswith("2 processes agree with a loop")
    numbers = [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]{3,}", said)]
    assert len(numbers) == 2 and numbers[0] == numbers[1]
    assert re.search(r"\d+% and \d+% of", experts.shares_said(reports))


@pytest.fixture(scope="module")
def bench():
    return Bench("mini-5m")


def test_wide_experts_are_worth_an_exchange(bench):
    states = experts.hidden_states(bench)
    assert states.shape[1] == experts.GROUP
    assert float(states.square().mean()) == pytest.approx(1)
    rows = [[float(cell) for cell in row[1:]] for row in experts.exchange_table(states).rows]
    assert all(row == sorted(row) for row in rows)  # more devices
    assert [row[0] for row in rows] == sorted((row[0] for row in rows), reverse=True)  # wider
    one = experts.spread(states, devices=4, each=2)
    assert (one.experts, one.tokens) == (8, 4 * experts.GROUP)
    assert sum(one.routing.load) == one.tokens
    assert one.ratio == pytest.approx(one.exchange / one.compute)
    assert experts.spread(states, devices=1).sent == 0


# --- stored attention -----------------------------------------------------------------------------

NOISE = [0.004, -0.003, 0.001, -0.002, 0.002, -0.001, 0.003, -0.004]


def row(shift, method, pairs=1.0, **about):
    """A stored row whose windows lie `shift` above the original's, with a little noise."""
    windows = [4 + 0.1 * i + shift * (1 + n) for i, n in enumerate(NOISE)]
    shares = {"pair_share": pairs, "value_share": pairs, "recall": 0.9, "refetch_share": 0.2}
    return {"method": method, "windows": windows, "loss": 4 + shift} | shares | about


PLANTED = [
    row(0, "original"),
    *(row(0.3 + d, "tokens", 0.7, keep=0.5, choose="random", seed=d) for d in (0, 1)),
    row(0.9, "tokens", 0.7, keep=0.5, choose="importance"),
    row(0.1, "tokens", 0.7, keep=0.5, choose="average"),
    row(0.2, "heads", 0.8, keep=0.5, choose="random"),
    row(0.1, "heads", 0.8, keep=0.5, choose="importance"),
    row(0.05, "energon", 0.2, rounds=[2, 4], alpha=0.0, choose="importance"),
    row(0.09, "energon", 0.1, rounds=[2, 4], alpha=0.25, choose="importance"),
    row(0.02, "energon", 0.9, rounds=[2, 4], alpha=-0.25, choose="importance"),
    row(0.0, "bits", msb_bits=6, threshold=0.1),
]


def test_choices_are_compared_with_a_random_one_window_by_window():
    said = tables.attention_said(PLANTED)
    assert "by summed attention is worse than a random choice (+0.100" in said
    assert "by averaged attention is better than a random choice (−0.700" in said
    assert "Energon, alpha 0 computes 20% of the pairs; its loss is worse than the" in said
    shown = tables.attention_table(PLANTED)
    assert "Energon, alpha -0.25" not in [line[0] for line in shown.rows]
    assert shown.rows[0][1:3] == ("70.0%", "90%")
    assert shown.rows[0][3].startswith("+0.800")
    assert tables.bits_table(PLANTED).rows[0][-1] == "indistinguishable"


def test_a_curve_averages_the_seeds_of_a_setting():
    assert tables.curve(PLANTED, "tokens at random") == [(0.7, pytest.approx(0.8))]
    assert [x for x, _ in tables.curve(PLANTED, "Energon")] == [0.1, 0.2, 0.9]


def encoder_row(found, method, **about):
    ranks = [1] * found + [3] * (100 - found)
    return {"method": method, "ranks": ranks} | about


def test_the_encoder_is_judged_query_by_query():
    rows = [encoder_row(90, "original")]
    for keep, attention, chance in ((0.5, 70, 50), (0.25, 40, 40)):
        rows.append(encoder_row(attention, "tokens", keep=keep, choose="importance"))
        rows += [encoder_row(chance, "tokens", keep=keep, choose="random", seed=s) for s in (0, 1)]
    rows.append(encoder_row(90, "energon", alpha=0.0, pair_share=0.25))
    said = tables.minilm_said(rows)
    assert "better than a random choice with half of the tokens (+20.0" in said
    assert "indistinguishable from a random choice with a quarter of the tokens" in said
    assert "computes 25% of the pairs and is indistinguishable from the original" in said
    shown = {line[0]: line[1:] for line in tables.minilm_table(rows).rows}
    assert shown["everything"] == ("100%", "90.0%", "+0.0 [+0.0, +0.0]", "the original")
    assert shown["half of the tokens, by attention"][-1] == "worse"


def test_stored_tables_fill_their_tables_and_sentences():
    rows = tables.stored("attention").data["table"]
    for shown in (tables.attention_table(rows), tables.bits_table(rows)):
        assert len(shown.rows) >= 4
        assert "nan" not in str(shown)
    assert tables.attention_said(rows).count("[") == 3
    minilm = tables.stored("minilm").data["table"]
    assert len(tables.minilm_table(minilm).rows) >= 6
    assert tables.minilm_said(minilm).count("[") == 3
    assert all(len(tables.curve(rows, name)) >= 2 for name in tables.LINES)
    data = experts.stored("experts").data
    assert len(experts.grown_table(data).rows) == len(data["table"])
    assert "agree" in experts.grown_said(data)
    assert len(experts.work_table(data, experts.stored("scaling").data).rows) == 3


def test_a_chip_that_fetches_less_needs_fewer_bytes():
    rows = tables.stored("attention").data["table"]
    shown = tables.chip_table(rows, roofs.LLAMA)
    assert [line[1:3] for line in shown.rows[:1]] == [("100%", "100%")]
    assert all(int(line[1].rstrip("%")) < 100 for line in shown.rows[1:])
    loss = tables.energon_row(rows)["loss"] - tables.pick(rows, method="original")[0]["loss"]
    assert shown.rows[2][-1].startswith(f"{loss:+.3f}")


def test_a_missing_result_says_so():
    missing = results.NotMeasured("06_hardware/2_codesign/nothing")
    for shown in (
        tables.attention_table(missing["table"]),
        tables.minilm_said(missing["table"]),
        tables.chip_table(missing["table"], roofs.LLAMA),
        drawings.curves(missing["table"]),
        experts.grown_table(missing["data"]),
        experts.work_table(missing["data"], missing["data"]),
    ):
        assert "Not measured here" in str(shown)


# --- what runs live -------------------------------------------------------------------------------


def test_answers_of_the_original_are_the_benchs(bench):
    """Each continuation by itself or side by side: the same likelihoods, so the same answers."""
    assert tuple(live.answers(bench, bench.model, 8)) == bench.answers(bench.model, 8)


def test_keeping_everything_changes_nothing(bench):
    subject = live.Attention(bench)
    assert subject.unchanged(64) == {"SpAtten": True, "Energon": True}
    found = subject.pruned("SpAtten, values", keep=1.0, alpha=0.0)
    assert abs(found.loss.difference) < 1e-3
    assert found.choice.difference == 0
    assert found.now.record.pair_share == 1


@pytest.mark.parametrize("method", [name for name in live.PRUNERS if name != "SpAtten, values"])
def test_each_method_computes_fewer_pairs(bench, method):
    ids = bench.windows[:1, :64]
    shares = []
    for keep, alpha in ((0.75, 0.0), (0.25, 0.5)):
        knob = {"alpha": alpha} if method == "Energon" else {"keep": keep}
        pruned = live.PRUNERS[method](bench.model, **knob)
        with torch.inference_mode():
            pruned(input_ids=ids)
        shares.append(live.pruning_record(pruned).pair_share)
    assert 1 > shares[0] > shares[1] > 0


def test_each_layer_of_the_encoder_works_on_fewer_tokens():
    words, kept = live.survivors()
    assert kept.shape[1] == len(words)
    counts = kept.sum(1).tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] <= math.ceil(len(words) / 4) + 1
    picture = drawings.kept(words, kept)
    assert words[int(kept[-1].nonzero()[-1])] in picture.alt


def test_kernels_are_walked_and_agree_with_their_references():
    for said in (live.int4_walk(), live.retention_walk()):
        assert said.endswith("True")
        assert said.count(" # ") > 15


def test_without_triton_a_sentence_says_so(monkeypatch):
    monkeypatch.setattr(live, "interpreted", lambda: False)
    assert live.int4_walk() == live.retention_walk() == live.NO_TRITON


@pytest.mark.full
def test_a_real_model_answers():
    assert re.fullmatch(
        r"The original finds \d+% of 20 .* it finds \d+%: \w+\.", live.search(0.5, 20)
    )


# --- panels and drawings --------------------------------------------------------------------------


def test_the_first_panel_shows_what_was_measured_or_counted():
    shown = panels.together(MACHINE)
    here = shown.at(tokens=16, on=panels.HERE)
    ratio = MACHINE.ratio(16)
    assert f"{ratio:.1f} times as long, for 16 times the operations" in here.text
    assert "Times: measured" in here.text
    assert shown.predict.answer(here.result) == round(ratio, 1)
    sheet = shown.at(tokens=16, on="H100 SXM", form="int4, groups of 128")
    assert "least times, by arithmetic" in sheet.text
    least = [
        roofs.least_seconds(roofline.DATA_SHEETS["H100 SXM"], 16, form)
        for form in (None, "int4, groups of 128")
    ]
    assert f"{least[0] / least[1]:.2f} times as fast at best" in sheet.text
    assert shown.at(tokens=256, on=panels.HERE).text.count("arithmetic") == 1


def test_the_panel_of_attention_says_by_its_interval_what_pruning_costs(bench):
    rows = tables.stored("attention").data["table"]
    shown = panels.attention(live.Attention(bench), rows)
    position = shown.at(method="SpAtten, tokens summed", keep=0.25)
    outcome = position.result.loss.outcome()
    assert f"Perplexity is: {outcome}, ×" in position.text
    assert shown.predict.answer(position.result) == outcome
    assert outcome in shown.predict.choices


def test_the_panel_of_devices_answers_its_own_question(bench):
    states = experts.hidden_states(bench)
    shown = panels.devices(states)
    position = shown.at(devices=32)
    assert shown.predict.answer(position.result) == round(
        experts.spread(states, devices=32).ratio, 1
    )
    assert "Experts: 64" in position.text
    assert "Sent by a device: 0 KiB" in shown.at(devices=1).text


def test_pictures_say_their_numbers():
    picture = drawings.curves(tables.stored("attention").data["table"])
    assert all(name in picture.alt for name in tables.LINES)
    gpu = roofs.gpu()
    alt = drawings.roofs(MACHINE, gpu).alt
    rate = MACHINE.work(1).operations / MACHINE.seconds[1] / 1e9
    assert f"dots climb from {rate:.1f} with one token" in alt
