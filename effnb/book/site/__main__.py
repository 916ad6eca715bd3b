"""The command `python -m effnb.book.site`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from effnb.book.site import teach
from effnb.book.site.address import home
from effnb.book.site.book import REPOSITORY, SiteError, read_book
from effnb.book.site.finish import finish
from effnb.book.site.reference import read_reference
from effnb.book.site.sources import write
from effnb.lab.chapters import NOTEBOOKS

CONFIGURATION = REPOSITORY / ".make" / "site"
OUT = REPOSITORY / "build" / "site"
MARK = ".nojekyll"
"""Lies in every site, and tells hosts to publish folders that begin with an underscore as well."""


def build(
    out: Path = OUT, notebooks: Path = NOTEBOOKS, repository: str | None = None
) -> tuple[int, list[str]]:
    """Make the site: its sources first, then its pages.

    Args:
        out: The folder to publish; it is emptied first. A folder beside it, of the same
            name with `-sources` at the end, is not part of the site.
        notebooks: The executed chapters.
        repository: The repository's address on the web; asked from git when None.

    Returns:
        The exit status of Sphinx, 1 when it warned of anything; and what is ill-formed without
        stopping the book, as sentences.

    Raises:
        SiteError: When a page cannot be made.
    """
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise SiteError(f"{out} has something in it that is no site: name another folder.")
    try:
        place = home(REPOSITORY, repository)
    except ValueError as problem:
        raise SiteError(str(problem)) from None
    work = out.with_name(f"{out.name}-sources")
    shutil.rmtree(out, ignore_errors=True)
    book, reference = read_book(notebooks), read_reference(REPOSITORY)
    notes = write(work / "pages", work / "extra", book, reference, place)
    command = [
        *(sys.executable, "-m", "sphinx", "--builder", "html", "--quiet", "--fresh-env"),
        *("--fail-on-warning", "--keep-going", "--conf-dir", str(CONFIGURATION)),
        *("--doctree-dir", str(work / "doctrees"), "--define", f"html_extra_path={work / 'extra'}"),
        *(str(work / "pages"), str(out)),
    ]
    status = subprocess.run(command, check=False).returncode
    (out / MARK).touch()
    for rest in (".buildinfo", ".buildinfo.bak", "_sources"):  # of no use to a reader
        shutil.rmtree(out / rest) if (out / rest).is_dir() else (out / rest).unlink(missing_ok=True)
    for rest in out.rglob("*.map"):
        rest.unlink()
    teach.write(out, book)
    finish(out, book, reference, place)
    icons = out / "_static" / "scripts" / "fontawesome.js"
    if icons.exists():
        shutil.copyfile(CONFIGURATION / "static" / "icons.js", icons)
    return status, notes


def main(arguments: list[str] | None = None) -> int:
    """Make the site; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effnb.book.site", description="Make the book's pages from its chapters."
    )
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to publish")
    parser.add_argument(
        "--repository", help="its address on the web, such as https://host/owner/name"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        status, notes = build(options.out.resolve(), repository=options.repository)
    except SiteError as problem:
        print(problem, file=sys.stderr)
        return 1
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)
    if status:
        print("Every warning above is an error: the site is not fit to publish.", file=sys.stderr)
        return status
    pages = sum(1 for _ in options.out.rglob("*.html"))
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(
        f"{pages} pages, {size / 2**20:.1f} MiB, in {time.perf_counter() - start:.0f} s: "
        f"open {options.out / 'index.html'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
