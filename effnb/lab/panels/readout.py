"""What a panel prints: numbers and words as HTML, two positions compared, positions as CSV."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable, Sequence
from urllib.parse import quote

CSS = """<style>
.effnb-panel,.effnb-saved{max-width:760px;padding:12px 16px 14px;margin:4px 0;border-radius:10px;
border:1px solid color-mix(in srgb,currentColor 16%,transparent);
background:color-mix(in srgb,currentColor 2.5%,transparent);
overflow:visible;box-sizing:border-box}
.effnb-panel :is(.widget-vbox,.widget-stack){overflow:visible}
.effnb-panel,.effnb-panel :is(.jupyter-widgets,.widget-label,.widget-readout,label){
color:inherit!important}
.effnb-panel .widget-html,.effnb-panel .widget-html-content{line-height:1.45;height:auto;margin:0;
overflow:visible}
:is(.effnb-panel,.effnb-saved) .effnb-title{font-weight:600;font-size:1.08em;padding:0 0 6px}
:is(.effnb-panel,.effnb-saved) .effnb-caption{opacity:.8;padding:8px 0 0;max-width:68ch}
.effnb-controls{flex-flow:row wrap;gap:2px 22px;overflow:visible;padding:0 0 8px}
.effnb-controls .widget-label{width:auto;
min-width:64px;padding-right:10px;text-align:left;font-weight:600}
.effnb-controls .widget-readout{font-variant-numeric:tabular-nums}
.effnb-panel .widget-radio{display:flex;flex-direction:row!important;align-items:baseline;
overflow:visible;margin:0 2px}
.effnb-panel .widget-radio-box{display:flex;flex-wrap:wrap;margin:0!important;gap:0 10px}
.effnb-panel .widget-radio-box label{height:auto;white-space:nowrap}
.effnb-panel :is(.noUi-handle,button,input,a,summary):focus-visible{
outline:3px solid #0072B2;outline-offset:2px}
.effnb-controls .effnb-idle{opacity:.5}
.effnb-panel img{background:#FAF9F6;transition:opacity .15s;
box-shadow:0 0 0 1px color-mix(in srgb,currentColor 9%,transparent)}
.effnb-stale img,.effnb-stale .effnb-numbers{opacity:.35}
.effnb-numbers{padding-top:10px}
.effnb-tiles{display:flex;flex-wrap:wrap;gap:6px 26px;margin:0 0 8px}
.effnb-tile{display:flex;flex-direction:column}
.effnb-name{font-size:.84em;opacity:.75}
.effnb-colon{font-size:0}
.effnb-tile .effnb-value{font-size:1.22em;font-weight:600;font-variant-numeric:tabular-nums}
.effnb-line{white-space:pre-wrap;margin:0 0 6px;max-width:76ch;overflow-wrap:anywhere}
.effnb-line .effnb-name{font-size:1em;opacity:1;font-weight:600}
.effnb-error,.effnb-dead{border-left:4px solid #D55E00;padding:6px 12px;margin:8px 0 0;
white-space:pre-wrap;background:color-mix(in srgb,#D55E00 10%,transparent);
border-radius:0 6px 6px 0}
.effnb-busy{display:flex;align-items:center;gap:10px;padding-top:8px;opacity:.9}
.effnb-busy i{width:12px;height:12px;border-radius:50%;border:2px solid #0072B2;
border-top-color:transparent;animation:effnb-turn 1s linear infinite}
.effnb-note{opacity:.75;font-size:.9em;padding-top:6px;max-width:76ch}
.effnb-question{border-left:4px solid #0072B2;border-radius:0 8px 8px 0;padding:8px 14px;
background:color-mix(in srgb,#0072B2 9%,transparent);margin:0 0 10px}
.effnb-question .effnb-asked{font-weight:600;max-width:68ch;padding-bottom:4px}
.effnb-question .widget-radio{padding:4px 0}
.effnb-question .widget-radio-box{gap:2px 18px}
.effnb-question .widget-text{width:auto}.effnb-question input[type=text]{max-width:9em}
.effnb-row{flex-flow:row wrap;gap:4px 8px;align-items:center;overflow:visible;padding-top:8px}
.effnb-panel .jupyter-button,.effnb-panel a.effnb-csv,.effnb-saved a.effnb-csv{width:auto;
padding:0 12px;border-radius:6px;border:1px solid color-mix(in srgb,currentColor 30%,transparent);
background:transparent;color:inherit!important;line-height:26px;height:28px;font-size:13px;
text-decoration:none;display:inline-block;box-sizing:border-box;margin:2px}
.effnb-panel :is(.jupyter-button,a.effnb-csv):hover{
background:color-mix(in srgb,currentColor 9%,transparent)}
.effnb-panel .jupyter-button.mod-primary{background:#0072B2;border-color:#0072B2;
color:#fff!important;font-weight:600}
.effnb-pinned{border-top:1px dashed color-mix(in srgb,currentColor 30%,transparent);
margin-top:10px;padding-top:8px}
.effnb-pinned img{max-width:72%!important}
table.effnb-compare{border-collapse:collapse;font-variant-numeric:tabular-nums;margin:2px 0 8px;
font-size:inherit}
.effnb-compare :is(th,td){text-align:left!important;padding:3px 20px 3px 0;vertical-align:baseline;
border-bottom:1px solid color-mix(in srgb,currentColor 14%,transparent)}
.effnb-compare tbody th{font-weight:500}.effnb-compare td.now{font-weight:600}
.effnb-scroll{overflow-x:auto;max-width:100%}
.effnb-visited summary{cursor:pointer;padding:4px 0}
.effnb-dead,.effnb-where{display:none}
.effnb-dead{margin:4px 0 8px}
.effnb-live.jupyter-widgets-disconnected .effnb-where{display:block;font-weight:600;padding:0 0 6px}
.effnb-panel.jupyter-widgets-disconnected::before,
.effnb-panel .jupyter-widgets-disconnected::before{display:none!important}
.effnb-live.jupyter-widgets-disconnected .effnb-dead{display:block}
.effnb-live.jupyter-widgets-disconnected :is(.effnb-controls,.effnb-row,.effnb-busy){
display:none!important}
@keyframes effnb-turn{to{transform:rotate(1turn)}}
@media (prefers-reduced-motion:reduce){.effnb-busy i{animation:none}}
</style>"""

_PAIR = re.compile(r"([^:\n]{1,40}): (\S.*)")
_TILE = 22
"""A value of at most this many characters is shown large, beside its neighbours."""

Pairs = list[tuple[str, str]]


def pairs(text: str) -> Pairs:
    """The `name: value` lines of a text."""
    found = map(_PAIR.fullmatch, text.strip("\n").splitlines())
    return [(pair[1], pair[2]) for pair in found if pair]


def numbers(text: str) -> str:
    """Lines of text as HTML: short `name: value` lines side by side, all others as they are.

    The words and their order stay those of the text, colons included, for those who hear the page.
    """
    parts: list[str] = []
    tiles: list[str] = []

    def close() -> None:
        if tiles:
            parts.append('<div class="effnb-tiles">' + "\n".join(tiles) + "</div>")
            tiles.clear()

    for line in text.strip("\n").splitlines():
        pair = _PAIR.fullmatch(line)
        if pair and len(pair[2]) <= _TILE:
            tiles.append(
                f'<div class="effnb-tile"><span class="effnb-name">{html.escape(pair[1])}'
                '<span class="effnb-colon">: </span></span>'
                f'<span class="effnb-value">{html.escape(pair[2])}</span></div>'
            )
            continue
        close()
        words = html.escape(line)
        if pair:
            words = (
                f'<span class="effnb-name">{html.escape(pair[1])}:</span> {html.escape(pair[2])}'
            )
        parts.append(f'<div class="effnb-line">{words or "&nbsp;"}</div>')
    close()
    # A polite live region: a screen reader reads the new numbers when they change.
    return (
        '<div class="effnb-numbers" role="status" aria-live="polite" aria-atomic="true">'
        + "\n".join(parts)
        + "</div>"
    )


# ------------------------------------------------------------------------------- comparing

_NUMBER = re.compile(r"([-+−]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)(.*)", re.DOTALL)


def _number(words: str) -> tuple[float, str] | None:
    """The number that a value begins with, and what follows it."""
    found = _NUMBER.fullmatch(words.strip())
    if not found:
        return None
    return float(found[1].replace(",", "").replace("−", "-")), found[2].strip()


def change(now: str, then: str) -> str:
    """How a value differs from the pinned one: a difference, and a ratio where that says more."""
    one, other = _number(now), _number(then)
    if one is None or other is None or one[1].split(" ")[0] != other[1].split(" ")[0]:
        return "the same" if now == then else "—"
    (a, rest), (b, _) = one, other
    if a == b:
        return "the same"
    unit = rest.split(" ")[0].rstrip(".,;")
    if unit.startswith("%"):
        return f"{a - b:+.4g} points".replace("-", "−")
    said = f"{a - b:+.4g} {unit}".strip().replace("-", "−")
    if a > 0 and b > 0 and (a / b >= 1.01 or b / a >= 1.01):
        said += f" (× {a / b:.3g})"
    return said


def compared(now: Pairs, then: Pairs, where: str) -> str:
    """The short numbers of two positions side by side, as an HTML table."""
    before = dict(then)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(name)}</th><td class="now">{html.escape(value)}</td>'
        f"<td>{html.escape(before.get(name, '—'))}</td>"
        f"<td>{html.escape(change(value, before.get(name, '')))}</td></tr>"
        for name, value in now
        if len(value) <= _TILE and len(before.get(name, "")) <= _TILE
    )
    return (
        f'<div class="effnb-scroll"><table class="effnb-compare" aria-label="Compared with the '
        f'pinned position, {html.escape(where, quote=True)}"><thead><tr><th scope="col"></th>'
        '<th scope="col">now</th><th scope="col">pinned</th><th scope="col">change</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


# ------------------------------------------------------------------------ visited positions


def grid(rows: Sequence[Pairs]) -> list[list[str]]:
    """Rows of named values under one heading; a name that a row lacks leaves its cell empty."""
    names = list(dict.fromkeys(name for row in rows for name, _ in row))
    return [names, *([dict(row).get(name, "") for name in names] for row in rows)]


def as_csv(rows: Sequence[Pairs]) -> str:
    """Rows of named values as CSV with a heading."""
    packed = io.StringIO()
    csv.writer(packed, lineterminator="\n").writerows(grid(rows))
    return packed.getvalue()


def as_table(rows: Sequence[Pairs], label: str) -> str:
    """Rows of named values as an HTML table; what is long, such as a model's text, is left out."""
    kept = [[(name, value) for name, value in row if len(value) <= _TILE] for row in rows]
    heading, *cells = grid(kept)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heading)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in cells
    )
    return (
        f'<div class="effnb-scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="effnb-compare"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def csv_link(content: str, name: str) -> str:
    """A link that saves a text as a CSV file; the browser does it, with or without a kernel."""
    file = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "panel"
    return (
        f'<a class="effnb-csv" download="{file}.csv" '
        f'href="data:text/csv;charset=utf-8,{quote(content)}">Save as CSV</a>'
    )


def sentences(parts: Iterable[str]) -> str:
    """Parts of a text, joined by spaces; empty ones are left out."""
    return " ".join(part.strip() for part in parts if part.strip())
