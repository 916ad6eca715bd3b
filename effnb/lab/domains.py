"""What compression costs in each kind of text: a table and a sentence, for any method.

    domains_table({"original": {"novel": [3.9, 4.1]}, "RTN, 2 bits": {"novel": [4.3, 4.6]}})

Nats and per cent can rank kinds of text differently: one with a higher loss has more to lose.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from effnb.lab.stored_rows import Change, Row, if_measured, tidy
from effnb.lab.tables import Table, table

KNOWN = ("novel", "Bible", "packages")
"""The kinds of text that the small models were trained on."""


def rises(found: Row, setting: str, domain: str) -> Change:
    """The rise of the loss in one domain, in nats per token, window by window."""
    return Change.between(found[setting][domain], found["original"][domain])


@if_measured
def domains_table(found: Row) -> Table:
    """The rise of the loss in each domain, in nats and in per cent of the original's.

    Args:
        found: For each setting, "original" among them, the loss of each window by domain.
    """
    lines: list[dict[str, Any]] = []
    for setting in found:
        if setting == "original":
            continue
        line = {"setting": setting}
        for domain in found[setting]:
            rise, base = rises(found, setting, domain).mean, fmean(found["original"][domain])
            share = tidy(100 * rise / base, 1)
            line[domain.replace("packages in ", "")] = f"{tidy(rise):+.3f} ({share:+.1f} %)"
        lines.append(line)
    return table(
        lines,
        caption="mini-5m: the rise of the loss in nats per token and, in brackets, in per cent of "
        "the original's loss. The last three columns are languages that it never learned.",
    )


def domains_said(found: Row, settings: Iterable[str]) -> str:
    """Which known domain each setting hurts most, in nats and in per cent."""
    said = []
    for setting in settings:
        nats = {d: rises(found, setting, d).mean for d in KNOWN}
        share = {d: nats[d] / fmean(found["original"][d]) for d in KNOWN}
        most, most_share = max(nats, key=nats.get), max(share, key=share.get)
        ending = "and in per cent" if most == most_share else f"but in per cent {most_share} does"
        said.append(f"{setting}: {most} loses most in nats ({nats[most]:+.3f}) {ending}.")
    return " ".join(said)
