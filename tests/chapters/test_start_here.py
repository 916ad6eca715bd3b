"""The tour's companion: what its first panel shows with the model, and without."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from effnb.chapters import start_here
from effnb.inference import quantization
from effnb.inference.quantization.formats import choose_grid
from effnb.inference.quantization.grid import Grid
from effnb.lab import machine, results
from effnb.lab.bench import Measured
from effnb.lab.models import ModelUnavailable


@pytest.fixture
def stored():
    """The stored table by position."""
    table = results.read(start_here.STORED).data["table"]
    return {(row["bits"], row["scale"]): row for row in table}


@pytest.fixture
def no_model(monkeypatch):
    """A machine on which SmolLM2 is not installed."""

    def missing():
        raise ModelUnavailable("the wheel is not installed.")

    monkeypatch.setattr(start_here, "_model", missing)


def test_every_position_is_stored_and_shows_what_the_page_says(stored):
    low, high = start_here.BITS
    assert set(stored) == {(b, s) for b in range(low, high + 1) for s in start_here.SCALES}
    knows = {place for place, row in stored.items() if row["answer"].startswith("Paris")}
    assert {(8, "row"), (3, "32 weights")} <= knows
    assert not {(4, "row"), (3, "row"), (2, "row"), (2, "32 weights")} & knows
    for row in stored.values():
        assert len(row["next"]) == 5
        assert 0 <= row["paris"] <= row["next"][0][1] <= 1
    sizes = [stored[bits, "row"]["bytes"] for bits in range(low, high + 1)]
    assert sizes == sorted(sizes)


def test_a_page_that_is_built_or_tested_needs_no_model(monkeypatch, no_model):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    panel = start_here.capital_panel()  # visits every position
    shown = panel.at(bits=3, scale="row")
    assert "stored on" in shown.text
    assert "not installed" not in shown.text
    assert "Probability of “Paris”: 0%" in shown.text


def test_a_kernel_without_the_model_shows_what_is_stored_and_says_why(monkeypatch, no_model):
    for name in ("EFFNB_SWEEP", "EFFNB_BUILD"):
        monkeypatch.delenv(name, raising=False)
    shown = start_here.capital_panel().at(bits=3, scale="32 weights")
    assert "the model is not installed here" in shown.text
    assert "Paris" in shown.text


def test_a_live_panel_asks_the_model(monkeypatch, stored):
    for name in ("EFFNB_SWEEP", "EFFNB_BUILD"):
        monkeypatch.delenv(name, raising=False)
    asked = []

    def rounded(loaded, bits, scale):
        asked.append((loaded, bits, scale))
        return stored[bits, scale] | {"answer": "Lyon"}

    monkeypatch.setattr(start_here, "_model", lambda: "a model")
    monkeypatch.setattr(start_here, "rounded", rounded)
    shown = start_here.capital_panel().at(bits=5)
    assert asked == [("a model", 5, "row")]
    assert f"{start_here.PROMPT} Lyon" in shown.text
    assert "computed here" in shown.text


def test_a_token_that_matplotlib_cannot_draw_is_drawn_as_another_sign(stored):
    row = stored[2, "32 weights"]
    assert any(word == "$" for word, _ in row["next"])  # mathematics, for matplotlib
    original = results.read(start_here.STORED).data["original"]
    strange = row | {"next": [["$x", 0.5], ["日本", 0.2], *row["next"][2:]], "original": original}
    figure = Figure()
    start_here._draw(strange, figure)
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == [r"\$x", "??"]


@pytest.mark.full
@pytest.mark.parametrize("place", [(8, "row"), (3, "row"), (3, "32 weights")])
def test_the_model_still_answers_what_is_stored(stored, place):
    with torch.inference_mode():
        found = start_here.rounded(start_here._model(), *place)
    assert found["answer"].split()[0] == stored[place]["answer"].split()[0]
    assert found["paris"] == pytest.approx(stored[place]["paris"], abs=0.02)
    assert found["bytes"] == stored[place]["bytes"]


def test_the_exercise_tells_its_wrong_answers_apart():
    start_here.symmetric_step.selftest()


def test_the_exercise_is_the_step_that_the_package_takes():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    theirs = choose_grid(weight, Grid(4, symmetric=True))[0]
    # The package stores its steps in half precision.
    torch.testing.assert_close(
        start_here.step_of_each_row(weight, 4), theirs.float(), atol=1e-3, rtol=1e-3
    )


def test_what_a_machine_means_is_said_for_any_machine(capsys):
    here = machine()
    for change in ({"gpu": None, "triton": None}, {"gpu": "A GPU", "triton": "3.7"}):
        start_here.what_it_means(replace(here, cores=2, memory_bytes=None, **change))
        said = capsys.readouterr().out
        assert "None" not in said
        assert "Memory" not in said
        assert said.count("\n") == 3


def test_what_four_bits_save_is_counted_against_a_file_of_16_bits(capsys):
    bench = start_here.Bench("mini-300k", windows=4, questions=0)
    start_here.saved(bench, quantization.rtn(bench.model, bits=4, group_size=64))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {name: float(value) for name, value, *_ in said}
    assert 4.5 / 16 < found["memory"] < 1  # embedding and norms stay as they are
    assert found["operations"] == 1
    assert abs(found["loss"]) < 0.2


def test_the_first_panel_stores_both_knobs_and_the_second_asks_first(monkeypatch):
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)
    frames = start_here.capital_panel().frames
    assert frames == {"bits": (2, 3, 4, 8), "scale": tuple(start_here.SCALES)}
    look = {key: SimpleNamespace(perplexity=Measured(value, value, value))
            for key, value in (("look", 12.0), ("before", 8.0))}  # fmt: skip
    answer = start_here.TWO_BITS.answer(look)
    assert answer == pytest.approx(1.5)
