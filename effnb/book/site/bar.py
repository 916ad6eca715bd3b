"""The bar under a chapter's title: its time, how it is run, and the ways to take it along."""

from __future__ import annotations

import html

from effnb.book.site.address import Home
from effnb.book.site.book import Written, up
from effnb.lab.chapters import run_time_sentence


def bar_html(written: Written, home: Home | None = None) -> str:
    """How long a chapter takes, a button that says how to run it, and its downloads and links."""
    chapter = written.chapter
    facts = [f"<span>{chapter.minutes} min to read</span>"]
    if chapter.measured:
        facts += [
            f"<span>{chapter.measured.seconds} s to run</span>",
            f"<span>{chapter.measured.mebibytes:,} MiB of memory</span>",
        ]
    said = run_time_sentence(chapter.minutes, chapter.measured, chapter.live)
    path = f"my/{chapter.name}.ipynb"  # the learner's copy
    return (
        f'<div class="chapter-bar"><p class="chapter-facts" title="{html.escape(said)}">'
        f"{''.join(facts)}</p>"
        '<details class="run-it"><summary>Run this chapter</summary><div>'
        "<p>With Python 3.11, 3.12 or 3.13, in a clone of the repository:</p>"
        "<pre><code>make lab</code></pre>"
        "<p>On Windows, or without <code>make</code>:</p>"
        "<pre><code>py .make/setup.py lab</code></pre>"
        "<p>The first time this installs everything, in a few minutes; afterwards it starts within "
        f"seconds and needs no network. In JupyterLab open <code>{html.escape(path)}</code> and "
        "choose <em>Run → Run All Cells</em>. Then every knob moves to every position.</p>"
        f"<p>{html.escape(said)}</p></div></details>"
        f"{ways_out(chapter.name, home or Home())}</div>"
    )


def ways_out(name: str, home: Home) -> str:
    """A chapter's downloads, and its links into the repository when that has an address.

    Args:
        name: The chapter's path below `notebooks/`.
        home: The repository on the web.
    """
    top, file = up(name), name.rpartition("/")[2]
    links = [
        f'<a href="{top}download/{name}.{ending}" download="{file}.{ending}">Download .{ending}</a>'
        for ending in ("ipynb", "py")
    ]
    links += [
        f'<a href="{html.escape(address)}">{words}</a>' for words, address in home.buttons(name)
    ]
    items = "".join(f"<li>{link}</li>" for link in links)
    return f'<ul class="ways-out" aria-label="Take this chapter along">{items}</ul>'
