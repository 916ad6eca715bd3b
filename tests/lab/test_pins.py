"""Pinning a position, comparing the next ones with it, and taking the visited ones away."""

import csv
import html
import io
import re
import sys
import urllib.parse

import pytest

from effnb.lab.panels import frames, knob, panel, readout

view = sys.modules["effnb.lab.panels.view"]


@pytest.fixture(autouse=True)
def plain_session(monkeypatch):
    monkeypatch.delenv("EFFNB_BUILD", raising=False)
    monkeypatch.delenv("EFFNB_SWEEP", raising=False)


@pytest.fixture
def shown(monkeypatch):
    bundles = []
    monkeypatch.setattr(view, "display", lambda bundle, **_: bundles.append(bundle))
    monkeypatch.setattr(frames, "display", lambda bundle, **_: bundles.append(bundle))
    return bundles


def bars(value, figure):
    figure.subplots().bar([1], [value["size"]])


def sized(seen=None, **changes):
    seen = [] if seen is None else seen

    def compute(bits, method):
        seen.append((bits, method))
        return {"size": 2.0 * bits, "method": method}

    options = {
        "draw": bars,
        "text": lambda v: f"Size: {v['size']:.1f} MiB\nMethod: {v['method']}\nWrites: {'w ' * 30}",
        "caption": "Sizes.",
        "title": "Sizes by bits",
        "ignored": lambda v: {"bits": "it has one grid"} if v["method"] == "binary" else {},
        "bits": knob(2, 8, default=4),
        "method": knob(["plain", "binary"]),
    }
    return panel(compute, **{**options, **changes})


def opened(**changes):
    made = sized(**changes)
    made._ipython_display_()
    return made


def moved(made, **values):
    made.move(**values)
    assert made.wait(30)


def test_a_pinned_position_stands_beside_the_next_ones(shown):
    made = opened()
    made._view.pin.click()
    assert made.wait(30)
    assert "Turn a knob to compare" in made._view.shown.value
    moved(made, bits=8)
    value = made._view.shown.value
    assert "Pinned:</b> bits = 4, method = plain" in value
    cells = re.findall(r"<td[^>]*>(.*?)</td>", value)
    assert cells[:3] == ["16.0 MiB", "8.0 MiB", "+8 MiB (× 2)"]
    assert value.count("<img") == 2
    assert "Pinned: Sizes. bits = 4" in html.unescape(value)
    assert "Pinned:</b> bits = 4" in shown[-1]["text/html"]  # in the saved copy too


def test_a_drawing_that_takes_the_pinned_result_has_both_in_one_picture(shown):
    seen = []

    def draw(value, figure, pinned=None):
        seen.append((value["size"], pinned and pinned["size"]))
        figure.subplots().bar([1], [value["size"]])

    made = opened(draw=draw)
    made.pin()
    assert made.wait(30)
    moved(made, bits=8)
    assert seen[-1] == (16.0, 8.0)
    assert made._view.shown.value.count("<img") == 1


def test_a_second_press_lets_the_pinned_position_go(shown):
    made = opened()
    for described, pinned in (("Unpin", True), ("Pin this position", False)):
        made._view.pin.click()
        assert made.wait(30)
        assert made._view.pin.description == described
        assert (made.pinned is not None) == pinned
    moved(made, bits=8)
    assert "Pinned" not in made._view.shown.value


def test_reset_turns_every_knob_home_and_lets_the_pin_go(shown):
    made = opened()
    moved(made, bits=8, method="binary")
    made.pin()
    made._view.reset.click()
    assert made.wait(30)
    assert made._view.values() == made.defaults
    assert made.pinned is None
    assert "Pinned" not in made._view.shown.value


def test_visited_positions_are_a_table_and_a_csv_file(shown):
    made = opened()
    for bits in (5, 6, 5):
        moved(made, bits=bits)
    value = made._view.visited.value
    assert "3 visited positions" in value
    link = re.search(r'download="(\S+)" href="data:text/csv;charset=utf-8,([^"]+)"', value)
    assert link[1] == "sizes_by_bits.csv"
    rows = list(csv.DictReader(io.StringIO(urllib.parse.unquote(link[2]))))
    assert [row["bits"] for row in rows] == ["4", "5", "6"]
    assert rows[2]["Size"] == "12.0 MiB"
    assert rows[0]["Writes"].startswith("w w")
    assert "w w" not in value.replace(link[2], "")  # the table on the page keeps to numbers


def test_a_knob_that_does_nothing_is_greyed_with_the_reason(shown):
    seen = []
    made = opened(seen=seen)
    moved(made, method="binary")
    bits = made._view.controls["bits"]
    assert bits.disabled
    assert "bits does nothing here: it has one grid." in made._view.idle.value
    moved(made, bits=8, method="binary")
    assert seen == [(4, "plain"), (4, "binary")]  # one position, whatever the greyed knob says
    assert "bits" not in made._view.shown.value.split("Size")[0].split("alt=")[1]
    assert list(made.visited.values())[1][0] == ("bits", "")
    moved(made, method="plain")
    assert not bits.disabled
    assert made._view.idle.value == ""


def test_ignored_names_a_knob_of_the_panel():
    made = sized(ignored=lambda v: {"size": "there is none"})
    with pytest.raises(ValueError, match="ignored names 'size'"):
        made.at()


@pytest.mark.parametrize(
    ("now", "then", "words"),
    [
        ("10 MiB", "5 MiB", "+5 MiB (× 2)"),
        ("5 MiB", "10 MiB", "−5 MiB (× 0.5)"),
        ("1,024", "1,000", "+24 (× 1.02)"),
        ("41 % ± 2 %", "40 % ± 2 %", "+1 points"),
        ("12%", "10%", "+2 points"),
        ("3", "3", "the same"),
        ("plain", "plain", "the same"),
        ("plain", "other", "—"),
        ("10 MiB", "10 KiB", "—"),
        ("-1", "1", "−2"),
        ("1.001", "1", "+0.001"),
    ],
)
def test_changes_in_words(now, then, words):
    assert readout.change(now, then) == words


# ------------------------------------------------------------------------------ two knobs


def test_two_knobs_have_stored_frames_and_equal_ones_are_stored_once(monkeypatch, shown):
    monkeypatch.setenv("EFFNB_BUILD", "1")
    seen = []
    made = sized(seen=seen, frames={"bits": [2, 4, 8], "method": None})
    assert seen == [(2, "plain"), (4, "plain"), (8, "plain"), (4, "binary")]
    box, position = made._stored._box()
    assert position.values == {"bits": 4, "method": "plain"}
    row, outer = box.children[1], box.children[2]
    assert [control.description for control in row.children] == ["bits", "method"]
    plain, binary = outer.children
    assert len({child.model_id for child in plain.children}) == 3
    assert len({child.model_id for child in binary.children}) == 1
    assert "bits does nothing here" in binary.children[0].value
    assert made._stored.stands_still() == (
        "This stored page moves bits among 3 positions and method among 2 positions. The positions "
        "between them need a running kernel."
    )


def test_stored_frames_have_a_limit_and_known_knobs():
    with pytest.raises(ValueError, match="26 stored frames; 24 are the most"):
        sized(bits=knob(1, 13), frames={"bits": list(range(1, 14)), "method": None})
    with pytest.raises(ValueError, match="at most one other"):
        sized(frames={"method": None})
    with pytest.raises(ValueError, match="at most one other"):
        sized(frames={"bits": None, "size": None})
