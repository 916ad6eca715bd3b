"""What the co-design chapter says with measurements stored and without them, and its kernel loop.

The cells are those of the chapter's source. Each branch is run on a stored result of the form that
the benchmark and the sweep write, whatever happens to be stored now.
"""

import ast
import json
import linecache
import math
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import pytest
import torch

from effnb.book import build
from effnb.hardware.codesign import gshard, roofline
from effnb.kernels import bench
from effnb.kernels._launch import jit, tl
from effnb.lab import results
from effnb.lab._files import DamagedFile

ROOT = Path(__file__).resolve().parents[2]
SOURCE = build.read_source(ROOT / "notebooks/06_hardware/2_codesign.py")
SCALING = "06_hardware/2_codesign/scaling"
GPU = "cuda (NVIDIA H100 80GB HBM3)"


def cell(text):
    """The source of the one code cell that holds this text."""
    (found,) = [c.source for c in SOURCE.cells if c.cell_type == "code" and text in c.source]
    return found


def run(text, names):
    """Run a cell with these names; the value of its last line, as a notebook would show it."""
    source = text if "\n" in text else cell(text)
    file = f"<cell {hash(source)}>"
    # Triton reads the source of a kernel, as it does in a notebook.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    names.setdefault("__name__", "chapter")
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, file, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), file, "eval"), names)


def stored(name, data, device):
    about = results.Provenance("a command", "2026-01-31", device, {"torch": "2.13.0"})
    return results.StoredResult(name, json.loads(json.dumps(data)), about)


# ---------------------------------------------------------------------------- the kernels' times


def timings(measured):
    """Lines for every case of the benchmark; a third of the roofline for ours where measured."""
    ceilings = bench.Ceilings(3e12, {"bfloat16": 7e14})
    lines = []
    for case in bench.cases(small=True):
        if not measured:
            lines.append(bench.unmeasured(case))
            continue
        about = (case.kernel, case.shape, "bfloat16", case.bytes, case.flops)
        least = max(case.bytes / 3e12, case.flops / 7e14)
        for who, share in (("ours", 1 / 3), ("torch", 1 / 4), ("half" + bench.OTHER, 1 / 2)):
            rates = (case.bytes * share / least, case.flops * share / least, share)
            lines.append(bench.Timing(*about, who, least / share, *rates, 0.0))
    device = torch.device("cuda") if measured else None
    content = bench.content(lines, ceilings if measured else None, device)
    return stored("kernels", content["data"], content["provenance"]["device"])


@pytest.fixture(params=[True, False], ids=["measured", "not measured"])
def pages(request, monkeypatch, capsys):
    """The first picture, and the kernels' table and picture, with times stored or not."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    kernels = timings(request.param)
    monkeypatch.setattr(results, "read", {"kernels": kernels}.__getitem__)
    roof = roofline.Roof("cpu, measured", 6e10, 2e10)
    monkeypatch.setattr(roofline, "measure_roof", lambda **_: roof)
    monkeypatch.setattr(roofline, "measure_matmul", lambda *_: 1e-4)
    names = {}
    first = run("def draw_result", names)
    run("kernel_results.kernel_table(", names)
    table = capsys.readouterr().out
    return SimpleNamespace(
        measured=request.param,
        first=first,
        table=table,
        second=run("def draw_kernels", names),
        names=names,
        cases={(t["kernel"], t["shape"]) for t in kernels.data["timings"]},
    )


def test_the_first_picture_says_where_the_gpus_numbers_come_from(pages):
    figure = matplotlib.figure.Figure()
    pages.names["draw_result"](figure)
    right = figure.axes[1]
    (dots,) = [line for line in right.lines if line.get_marker() == "o"]
    caption, alt = pages.first.caption, pages.first.alt
    if pages.measured:
        assert right.get_title() == "H100 80GB HBM3, measured"
        assert "Nothing on the right was measured" not in caption
        assert "the ceilings of NVIDIA H100 80GB HBM3, measured and stored" in caption
        assert "3.00 trillion bytes and 700 trillion operations" in alt
        assert len(dots.get_xdata()) == len(pages.cases)
        assert dots.get_markerfacecolor() != "none"
    else:
        assert right.get_title() == "H100, data sheet only"
        assert "Nothing on the right was measured" in caption
        assert "3.35 trillion bytes and 989 trillion operations" in alt and "data sheet" in alt
        assert dots.get_markerfacecolor() == "none"


def test_every_kernel_is_in_the_table_and_in_the_picture(pages):
    figure = matplotlib.figure.Figure()
    pages.names["draw_kernels"](figure)
    left, right = figure.axes
    labels = [text.get_text() for text in left.get_yticklabels()]
    assert labels == sorted({kernel for kernel, _ in pages.cases})
    assert all(f"  {shape} " in pages.table for _, shape in pages.cases)
    (dots,) = [line for line in left.lines if line.get_marker() == "o"]
    heights = [round(y, 6) for y in dots.get_ydata()]
    assert len(set(heights)) == len(pages.cases)  # none hides another
    assert all(abs(y - round(y)) < 0.4 for y in heights)  # each in the row of its kernel
    words = [text.get_text() for text in right.texts]
    if pages.measured:
        assert words == []
        ours = [line.get_xdata()[0] for line in right.lines if line.get_markersize() == 5]
        peers = [x for line in right.lines if line.get_markersize() == 4 for x in line.get_xdata()]
        assert ours == pytest.approx([1 / 3] * len(pages.cases))
        assert peers == pytest.approx([1 / 4] * len(pages.cases))  # the one for scale is no peer
        assert pages.table.startswith("Stored result: kernels, computed on 2026-01-31")
        assert pages.table.count("33% of the roofline, 1.33 times as fast as torch") == len(
            pages.cases
        )
        assert "not measured" not in pages.table + pages.second.caption.lower()
        assert "33% to 33% of the roofline" in pages.second.alt
    else:
        assert words == ["not measured"]
        assert not right.lines
        assert pages.table.startswith("Not measured: no GPU has run these kernels")
        assert pages.table.count(" not measured\n") == len(pages.cases)
        assert "µs" not in pages.table and "%" not in pages.second.alt
        assert "Not measured" in pages.second.caption


# ----------------------------------------------------------------------- experts by the clock


def clock(speedup):
    """A stored run by the clock; the second process makes it so many times as fast."""
    table = []
    for count in (4, 8, 16):
        noise = [1 + (0.02 * turn - 0.06) for turn in range(7)]
        for devices, seconds in ((1, 0.1), (2, 0.1 / speedup)):
            found = [seconds * n for n in (noise if devices == 1 else reversed(noise))]
            exchange = [0.0 if devices == 1 else 0.1 * s for s in found]
            row = {"experts": count, "devices": devices}
            table.append(row | {"seconds": found, "exchange_seconds": exchange})
    return stored(SCALING, {"table": table}, "cpu (x86_64)")


def said_on_time(monkeypatch, capsys, by_clock):
    """What the page prints on time."""
    original = results.read

    def read(name):
        if name != SCALING:
            return original(name)
        if by_clock is None:
            return results.NotMeasured(name)
        return by_clock

    monkeypatch.setattr(results, "read", read)
    names = {"results": results, "gshard": gshard, "math": math}
    run("def busy_share", names)
    capsys.readouterr()
    run("def seconds_of", names)
    return capsys.readouterr().out


def test_without_times_by_the_clock_the_page_says_so(monkeypatch, capsys):
    said = said_on_time(monkeypatch, capsys, None)
    assert said == "By the clock: not measured. No run on two idle cores is stored.\n"


@pytest.mark.parametrize("speedup", [1.6, 1.0, 0.7])
def test_with_times_it_prints_them(monkeypatch, capsys, speedup):
    said = said_on_time(monkeypatch, capsys, clock(speedup))
    assert f" 4 experts: 100 ms with one process, {100 / speedup:.0f} ms with two" in said
    assert f"{speedup:.2f} times as fast; 10% of the time is the exchange" in said


def test_a_damaged_measurement_is_not_taken_for_a_missing_one(monkeypatch):
    def read(name):
        raise DamagedFile(f"the stored result {name}.json is damaged: restore it.")

    monkeypatch.setattr(results, "read", read)
    with pytest.raises(DamagedFile, match=rf"{SCALING}.json is damaged"):
        run("def seconds_of", {"results": results})


# --------------------------------------------------------------------- a kernel to be written


def exercise(interpreted):
    names = {"torch": torch, "math": math, "INTERPRETED": interpreted}
    run("def between_edges", names)
    return names


@pytest.fixture(scope="module", params=[True, False], ids=["with Triton", "without"])
def tile_loop(request):
    return request.param, exercise(request.param)


def test_the_tile_loop_diagnoses_its_mistakes(tile_loop):
    interpreted, names = tile_loop
    names["loop"].selftest()
    assert len(names["loop"].wrong) == (9 if interpreted else 2)


@pytest.mark.parametrize(
    ("tag", "start"), [("exercise", "Not yet: A tile loop makes nothing"), ("solution", "Correct")]
)
def test_its_stub_and_its_solution(tile_loop, tag, start, capsys):
    interpreted, names = tile_loop
    (source,) = [
        c.source for c in SOURCE.cells if tag in build.tags(c) and "loop.check(" in c.source
    ]
    run(source, names)
    assert capsys.readouterr().out.startswith(start)
    assert ("tile_kernel" in names) == interpreted


def test_a_kernel_of_wrong_types_and_one_that_raises(tile_loop):
    interpreted, names = tile_loop
    if not interpreted:
        return
    judge = names["loop"].judge

    @jit
    def halves(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        total = tl.zeros((SIZE, SIZE), dtype=tl.float16)
        tile = tl.full((SIZE, SIZE), 1, dtype=tl.float16)
        total = tl.dot(tile, tile, total)

    @jit
    def forgotten(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        total = nothing_of_this_name + 1  # noqa: F821, F841

    assert "adds to sums of tl.float32" in judge(names["interpreted"](halves))[1]
    assert "NameError" in judge(names["interpreted"](forgotten))[1]
