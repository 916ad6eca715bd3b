"""The table of compiled kernels says what is stored."""

from effnb.chapters.hardware.codesign import roofs
from effnb.lab import results


def test_every_kernel_that_is_shown_is_in_the_report():
    rows = results.read("kernel_report").data["table"]
    shown = str(roofs.bounds_table(rows))
    for name in roofs.SHOWN:
        (row,) = (r for r in rows if r["kernel"] == name and r["arch"] == 90)
        assert name.replace(":", ",", 1) in shown
        assert f"{row['bound_us']:,.1f} µs" in shown
        assert row["bound_by"] in roofs.SET_BY


def test_the_bytes_that_are_needed():
    rows = [{"arch": 90, "needed_in_flight": 12288}, {"arch": 80, "needed_in_flight": 1}]
    assert "12.0 KiB at a time" in roofs.flight_said(rows)
