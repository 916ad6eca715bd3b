import base64
import io
import os
import subprocess
import sys
import threading
import time

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from PIL import Image as Pixels

from effnb.lab.panels import PanelError, frames, knob, panel, readout, view


@pytest.fixture(autouse=True)
def plain_session(monkeypatch):
    """As for a reader: neither a build nor a sweep."""
    monkeypatch.delenv("EFFNB_BUILD", raising=False)
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, as bundles, in order."""
    bundles = []

    def display(bundle, raw, display_id=None, update=False):
        bundles.append(bundle | {"id": display_id, "update": update})

    monkeypatch.setattr(view, "display", display)
    monkeypatch.setattr(frames, "display", display)
    return bundles


VIEW = "application/vnd.jupyter.widget-view+json"


def bars(value, figure):
    figure.subplots().bar(["value"], [value])


def doubled(seen=None, **changes):
    """A panel whose number is twice its knob; `seen` collects the positions computed."""
    seen = [] if seen is None else seen

    def compute(bits, kind="row"):
        seen.append((bits, kind))
        return 2 * bits

    knobs = {"bits": knob(2, 8), "kind": knob(["row", "column"])}
    options = {"text": lambda value: f"double: {value}", "caption": "Twice as much."}
    return panel(compute, bars, **{**options, **knobs, **changes})


def open_(made, shown):
    """Show a panel and give its view."""
    made._ipython_display_()
    assert next(iter(shown[-2])) == VIEW
    return made._view


# ----------------------------------------------------------------------------------- knobs


def test_whole_numbers_stay_whole():
    assert knob(2, 8).values == (2, 3, 4, 5, 6, 7, 8)
    assert knob(0, 100, 25).values == (0, 25, 50, 75, 100)
    assert knob(2, 8).default == 5
    assert all(type(value) is int for value in knob(2, 8).values)


def test_decimal_steps_have_no_rounding_dust():
    assert knob(0, 1, 0.1).values == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    assert knob(0.0, 1.0, 0.25, default=0.5).default == 0.5
    assert knob(0, 1, 0.1, default=0.1 + 0.2).default == 0.3


def test_a_range_may_end_before_its_last_number():
    assert knob(1, 8, 3).values == (1, 4, 7)


def test_choices_start_at_the_first():
    assert knob(["RTN", "GPTQ"]).default == "RTN"
    assert knob([32, 64, 128], default=64).default == 64
    assert knob([False, True]).default is False


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3,), "has no end"),
        ((8, 2), "no positions"),
        ((2, 8, 0), "no positions"),
        ((["only"],), "at least two"),
        (([1, 1],), "at least two"),
        (([],), "at least two"),
        ((2, 8, 1, 9), "the default 9 is not among"),
    ],
)
def test_knobs_that_cannot_be_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        knob(*arguments)


@pytest.mark.parametrize("count", [2, 3, 9])
@pytest.mark.parametrize("default", [0, 1, 50, 99, 100])
def test_a_spread_has_both_ends_and_the_default(count, default):
    chosen = knob(0, 100, default=default).spread(count)
    assert len(chosen) <= count
    assert list(chosen) == sorted(set(chosen))
    assert default in chosen
    if count > 2:
        assert {0, 100} <= set(chosen)


def test_a_short_knob_is_spread_whole():
    assert knob(2, 8).spread(9) == (2, 3, 4, 5, 6, 7, 8)


# --------------------------------------------------------------------- computing and keeping


def test_a_position_is_computed_once():
    seen = []
    made = doubled(seen)
    first, again = made.at(bits=3), made.at(bits=3)
    assert first is again
    assert first.result == 6
    assert first.text == "double: 6"
    assert first.values == {"bits": 3, "kind": "row"}
    assert seen == [(3, "row")]


def test_two_threads_asking_at_once_compute_once():
    seen = []

    def slow(bits):
        seen.append(bits)
        time.sleep(0.2)
        return bits

    made = panel(slow, bars, text=str, caption="Slow.", bits=knob(2, 8))
    threads = [threading.Thread(target=made.at, kwargs={"bits": 4}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [4]


def test_the_least_recently_used_position_is_forgotten():
    seen = []
    made = doubled(seen, cache_size=2)
    for bits in (2, 3, 2, 4, 2, 3):
        made.at(bits=bits)
    assert [bits for bits, _ in seen] == [2, 3, 4, 3]


def bars_of_length(words, figure):
    bars(len(words), figure)


def test_values_of_different_types_are_different_positions():
    kinds = knob([0, "0", 1, 2.5])
    made = panel(lambda x: repr(x), bars_of_length, text=str, caption="Kinds.", x=kinds)
    assert [made.at(x=value).result for value in kinds.values] == ["0", "'0'", "1", "2.5"]


def test_alternative_text_has_caption_knobs_and_numbers():
    assert doubled().at(bits=3).alt == "Twice as much. bits = 3, kind = row. double: 6"
    told = doubled(alt=lambda value: f"One bar,\n{value} high.")
    assert told.at(bits=3).alt == "Twice as much. bits = 3, kind = row. One bar, 6 high."


def test_an_exception_is_not_kept():
    tries = []

    def moody(bits):
        tries.append(bits)
        if len(tries) == 1:
            raise RuntimeError("not now.")
        return bits

    made = panel(moody, bars, text=str, caption="Moody.", bits=knob(2, 8))
    with pytest.raises(RuntimeError, match="not now"):
        made.at()
    assert made.at().result == 5


@pytest.mark.parametrize(
    ("values", "words"),
    [({"bits": 9}, "no position 9"), ({"bitz": 3}, "no knob 'bitz'"), ({"kind": 1}, "no position")],
)
def test_positions_that_are_not_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        doubled().at(**values)


def test_rounding_dust_finds_its_position():
    made = panel(lambda x: x, bars, text=str, caption="Dust.", x=knob(0, 1, 0.1))
    assert made.at(x=0.1 + 0.2).result == 0.3


def test_computing_runs_without_gradients_and_training_with():
    def mode(bits):
        weight = torch.ones(2, requires_grad=True)
        return torch.is_inference_mode_enabled(), (weight * bits).requires_grad

    options = {"text": str, "caption": "Modes.", "bits": knob(2, 8)}
    nothing = lambda result, figure: None  # noqa: E731
    with torch.enable_grad():
        assert panel(mode, nothing, **options).at().result == (False, False)
    with torch.no_grad():
        assert panel(mode, nothing, trains=True, **options).at().result == (False, True)


def test_a_panel_cannot_be_made_of_nonsense():
    with pytest.raises(ValueError, match="at least one knob"):
        panel(abs, bars, text=str, caption="None.")
    with pytest.raises(TypeError, match="bits is not a knob"):
        panel(abs, bars, text=str, caption="None.", bits=(2, 8))
    with pytest.raises(ValueError, match="main is 'size'"):
        doubled(main="size")
    with pytest.raises(ValueError, match="frames"):
        doubled(frames=[2, 99])
    with pytest.raises(ValueError, match="frames"):
        doubled(frames=[2])


# ------------------------------------------------------------------------------------ sweeps


def test_a_sweep_visits_each_knob_and_some_pairs():
    made = doubled(cache_size=100)
    visited = made.sweep(pairs=5, seed=1)
    home = made.defaults
    assert visited[0] == home
    singles = [v for v in visited if sum(v[k] != home[k] for k in home) == 1]
    pairs = [v for v in visited if sum(v[k] != home[k] for k in home) == 2]
    assert len(singles) == 6 + 1
    assert len(pairs) == 5
    assert visited == made.sweep(pairs=5, seed=1)
    assert visited != made.sweep(pairs=5, seed=2)
    assert len(made.sweep(pairs=1000)) == 1 + 7 + 6


@pytest.mark.parametrize("stage", ["compute", "draw", "text", "alt"])
def test_a_sweep_names_the_position_that_fails(stage):
    def fail(at, value):
        if at == stage and value == 7:
            raise ZeroDivisionError("by seven")
        return value

    made = panel(
        lambda bits: fail("compute", bits),
        lambda value, figure: fail("draw", value),
        text=lambda value: str(fail("text", value)),
        alt=lambda value: str(fail("alt", value)),
        caption="Seven fails.",
        title="Sevens",
        bits=knob(2, 8),
    )
    with pytest.raises(PanelError, match="'Sevens' fails at bits=7: ZeroDivisionError: by seven"):
        made.sweep()


def test_making_a_panel_sweeps_it_when_asked(monkeypatch):
    monkeypatch.setenv("EFFNB_SWEEP", "1")
    seen = []
    doubled(seen)
    assert {bits for bits, _ in seen} == {2, 3, 4, 5, 6, 7, 8}
    assert "column" in {kind for _, kind in seen}
    with pytest.raises(PanelError, match="bits=2"):
        panel(lambda bits: 1 // (bits - 2), bars, text=str, caption="Bad.", bits=knob(2, 8))


# ----------------------------------------------------------------------------- live widgets


def test_a_shown_panel_has_labelled_controls_and_a_picture_with_words(shown):
    view = open_(doubled(title="Doubling"), shown)
    bits, kind = view.controls["bits"], view.controls["kind"]
    assert isinstance(bits, widgets.IntSlider)
    assert bits.continuous_update is False
    assert (bits.description, bits.tooltip) == ("bits", "bits: from 2 to 8")
    assert isinstance(kind, widgets.RadioButtons)
    assert kind.tooltip == "kind: one of row, column"
    assert 'alt="Twice as much. bits = 5, kind = row. double: 10"' in view.shown.value
    assert 'role="status"' in view.shown.value
    assert "Doubling" in view.box.children[0].value
    assert "run this cell" in shown[-2]["text/plain"]


def test_controls_fit_their_values(shown):
    view = open_(
        panel(
            lambda **values: 1,
            bars,
            text=str,
            caption="Controls.",
            rate=knob(0, 1, 0.05),
            group=knob([32, 64, 128]),
            flag=knob([False, True]),
            long_name=knob(1, 3, label="a label"),
        ),
        shown,
    )
    rate, group, flag, named = view.controls.values()
    assert isinstance(rate, widgets.FloatSlider)
    assert (rate.step, rate.readout_format) == (0.05, ".2f")
    assert isinstance(group, widgets.SelectionSlider)
    assert [label for label, _ in flag.options] == ["no", "yes"]
    assert named.description == "a label"


def test_a_move_changes_picture_and_numbers_in_place(shown):
    made = doubled()
    view = open_(made, shown)
    before = view.shown.value
    view.controls["bits"].value = 8
    assert made.wait(30)
    assert view.shown.value != before
    assert "double: 16" in made.at(bits=8).text
    assert ">16<" in view.shown.value
    view.controls["bits"].value = 5
    assert made.wait(30)
    assert view.shown.value == before
    # Redrawn, not displayed again; only the plain copy for the saved notebook follows.
    assert [VIEW in bundle for bundle in shown] == [True, False, False, False]
    assert [bundle["update"] for bundle in shown] == [False, False, True, True]


def test_a_panel_shown_twice_is_the_same_widgets_in_two_places(shown):
    made = doubled()
    view = open_(made, shown)
    made.move(bits=8)
    assert made.wait(30)
    assert open_(made, shown) is view
    again = [bundle for bundle in shown if VIEW in bundle]
    assert again[0] == again[1]
    assert view.controls["bits"].value == 8
    assert ">16<" in view.shown.value


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_is_killed_is_replaced(shown):
    def exits(bits):
        if bits == 3:
            raise SystemExit
        return bits

    made = panel(exits, bars, text=lambda v: f"value: {v}", caption="Exit.", bits=knob(2, 8))
    view = open_(made, shown)
    for bits in (3, 4):
        made.move(bits=bits)
        assert made.wait(30)
    assert ">4<" in view.shown.value


def test_decimals_of_a_slider_are_snapped(shown):
    made = panel(lambda x: x, bars, text=str, caption="Snap.", x=knob(0, 1, 0.1))
    view = open_(made, shown)
    view.controls["x"].value = 0.30000000000000004
    assert made.wait(30)
    assert made.error is None
    assert view.values() == {"x": 0.3}


def test_a_move_from_code_moves_the_control_too(shown):
    made = doubled()
    view = open_(made, shown)
    made.move(bits=7)
    assert made.wait(30)
    assert view.controls["bits"].value == 7
    assert ">14<" in view.shown.value


def test_stale_requests_are_dropped_and_the_last_one_wins(shown):
    gate, seen = threading.Event(), []

    def slow(bits):
        seen.append(bits)
        if bits == 2:
            assert gate.wait(30)
        return bits

    made = panel(slow, bars, text=lambda v: f"value: {v}", caption="Slow.", bits=knob(2, 8))
    view = open_(made, shown)
    for bits in (2, 3, 4, 6):
        view.controls["bits"].value = bits
        while bits == 2 and 2 not in seen:
            time.sleep(0.01)
    gate.set()
    assert made.wait(30)
    assert seen == [5, 2, 6]
    assert ">6<" in view.shown.value


def test_a_slow_first_picture_does_not_overwrite_a_newer_one(shown):
    """The reader moves the knob while the cell still computes the default."""
    started, gate = threading.Event(), threading.Event()

    def slow(bits):
        if bits == 5:
            started.set()
            assert gate.wait(30)
        return bits

    made = panel(slow, bars, text=lambda v: f"value: {v}", caption="Slow.", bits=knob(2, 8))
    cell = threading.Thread(target=made._ipython_display_)
    cell.start()
    assert started.wait(30)
    made._view.controls["bits"].value = 7
    gate.set()
    cell.join(30)
    assert made.wait(30)
    assert ">7<" in made._view.shown.value


def test_an_exception_becomes_a_sentence_and_goes_away(shown):
    def picky(bits):
        if bits == 7:
            raise ValueError("seven does not fit.")
        if bits == 8:
            raise KeyError("eight")
        return bits

    made = panel(picky, bars, text=str, caption="Picky.", bits=knob(2, 8))
    view = open_(made, shown)
    made.move(bits=7)
    assert made.wait(30)
    assert 'role="alert"' in view.status.value
    assert "At bits = 7 this fails: seven does not fit. The picture is still that of bits = 5." in (
        view.status.value
    )
    assert "effnb-stale" in view.box._dom_classes
    assert isinstance(made.error, ValueError)
    made.move(bits=8)
    assert made.wait(30)
    assert "KeyError: &#x27;eight&#x27;" in view.status.value
    made.move(bits=6)
    assert made.wait(30)
    assert view.status.value == ""
    assert made.error is None
    assert "effnb-stale" not in view.box._dom_classes


def test_a_first_position_that_fails_says_so_without_a_picture(shown):
    made = panel(lambda bits: 1 // 0, bars, text=str, caption="Bad.", bits=knob(2, 8))
    view = open_(made, shown)
    assert "ZeroDivisionError" in view.status.value
    assert "still" not in view.status.value


def test_long_work_is_announced(shown, monkeypatch):
    monkeypatch.setattr(view, "PATIENCE", 0.05)
    said = []

    def slow(bits):
        while bits == 6 and not said:
            said.extend([made._view.status.value] if made._view.status.value else [])
            time.sleep(0.01)
        return bits

    made = panel(slow, bars, text=str, caption="Slow.", bits=knob(2, 8))
    opened = open_(made, shown)
    made.move(bits=6)
    assert made.wait(30)
    assert "Computing bits = 6 …" in said[0]
    assert opened.status.value == ""


def test_callbacks_set_their_own_grad_mode(shown):
    modes = []
    made = panel(
        lambda bits: modes.append((threading.get_ident(), torch.is_grad_enabled())) or bits,
        bars,
        text=str,
        caption="Modes.",
        bits=knob(2, 8),
    )
    open_(made, shown)
    made.move(bits=3)
    assert made.wait(30)
    (first, first_grad), (second, second_grad) = modes
    assert first != second
    assert (first_grad, second_grad) == (False, False)


def test_markup_in_words_stays_words(shown):
    made = panel(
        lambda bits: "<b>&",
        bars_of_length,
        text=lambda value: f"tag: {value}\n{value * 20}",
        caption='A "quoted" <i>caption</i>.',
        title="<u>",
        bits=knob(2, 8),
    )
    view = open_(made, shown)
    everything = "".join(child.value for child in view.box.children if hasattr(child, "value"))
    for markup in ("<b>&", "<i>caption", "<u>", 'alt="A "quoted'):
        assert markup not in everything


# -------------------------------------------------------------------------- built pages


@pytest.fixture
def built(monkeypatch, shown):
    """A function that builds a panel and gives its output."""
    monkeypatch.setenv("EFFNB_BUILD", "1")

    def build(**changes):
        doubled(**changes)._ipython_display_()
        return shown[-1]

    return build


def test_a_built_panel_links_the_main_knob_to_its_frames(monkeypatch, shown):
    monkeypatch.setenv("EFFNB_BUILD", "1")
    linked = []
    monkeypatch.setattr(widgets, "jslink", lambda *pair: linked.append(pair))
    seen = []
    made = doubled(seen)
    assert [bits for bits, _ in seen] == [2, 3, 4, 5, 6, 7, 8]  # computed when made, not shown
    made._ipython_display_()
    ((control, index), (stack, selected)) = linked[0]
    assert (index, selected) == ("index", "selected_index")
    assert isinstance(stack, widgets.Stack)
    assert control.index == stack.selected_index == 3
    assert [label for label, _ in control.options] == ["2", "3", "4", "5", "6", "7", "8"]
    for frame, bits in zip(stack.children, range(2, 9), strict=True):
        assert f"double: {2 * bits}" in frame.value.replace("&#x27;", "'").split('alt="')[1]
    assert made._view is None


def test_a_built_panel_says_what_stands_still(built):
    bundle = built()
    assert {VIEW, "text/html", "text/plain"} < set(bundle)
    assert "double: 10" in bundle["text/plain"]
    assert "double: 10" in bundle["text/html"]
    assert "Run this notebook" in bundle["text/html"]
    packed = bundle["text/html"].split("base64,")[1].split('"')[0]
    png = Pixels.open(io.BytesIO(base64.b64decode(packed)))
    assert png.size[0] > 800
    assert doubled()._stored.stands_still() == (
        "This stored page moves bits among 7 positions. The other knobs need a running kernel; "
        "here kind = row."
    )
    alone = panel(lambda b: b, bars, text=str, caption="One.", b=knob(1, 30), frames=[1, 15])
    assert "The positions between them need a running kernel." in alone._stored.stands_still()


def test_a_build_stops_where_a_frame_fails(monkeypatch):
    monkeypatch.setenv("EFFNB_BUILD", "1")
    with pytest.raises(PanelError, match="b=3"):
        panel(lambda b: 1 // (b - 3), bars, text=str, caption="Bad.", b=knob(1, 5))


def test_frames_may_belong_to_any_knob(monkeypatch, shown):
    monkeypatch.setenv("EFFNB_BUILD", "1")
    linked = []
    monkeypatch.setattr(widgets, "jslink", lambda *pair: linked.append(pair))
    doubled(main="kind")._ipython_display_()
    control = linked[0][0][0]
    assert isinstance(control, widgets.RadioButtons)
    assert control.description == "kind"


def test_ipython_shows_a_panel_by_itself():
    formatter = DisplayFormatter()
    made = doubled()
    called = []
    made._ipython_display_ = lambda: called.append(True)
    data, _ = formatter.format(made)
    assert called == [True]
    assert data == {}


# ---------------------------------------------------------------------------- the read-out


def test_short_pairs_stand_side_by_side_and_words_keep_their_order():
    found = readout.numbers("perplexity: 23.4\nright: 61%\nit writes: " + "word " * 30 + "\nplain")
    assert found.count("effnb-tile") == 3  # the row, and two in it
    words = "".join(part.split(">", 1)[-1] for part in found.split("<"))
    assert words.index("perplexity: 23.4") < words.index("right: 61%") < words.index("it writes:")
    assert words.rstrip().endswith("plain")


def test_pictures_are_small():
    made = doubled()
    png = made.at().picture.png
    assert len(png) < 40_000
    assert np.asarray(Pixels.open(io.BytesIO(png)).convert("RGB")).std() > 10


def test_importing_the_lab_is_quick_and_brings_no_torch():
    code = "import sys, effnb.lab, effnb.lab.panels; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "False"
