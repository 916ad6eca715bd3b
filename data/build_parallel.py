"""Build parallel text for `mini-multi` from two handbooks that Debian translates.

    python data/build_parallel.py                     # fetches the packages with apt
    python data/build_parallel.py --unpacked FOLDER   # takes packages that are unpacked already

The Debian Reference and the Debian Installation Guide are written once in English and translated
paragraph by paragraph, so a page has as many paragraphs in each language. Pages whose numbers of
paragraphs differ are left out, and so are paragraphs that were not translated.

Both are under the GNU General Public License, version 2 (the Reference: or later). The text is
read when the encoder is trained and does not ship: it is written to `build/`, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from build_manuals import Prose

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "build" / "parallel.json.xz"
REFERENCE = {  # language of the workbook: the Reference's code, in the names of files
    "de": "de",
    "es": "es",
    "fr": "fr",
    "it": "it",
    "ja": "ja",
    "pt_BR": "pt-br",
    "zh_CN": "zh-cn",
}
GUIDE = ("da", "de", "es", "fr", "it", "ja", "ko", "ru", "zh_CN")
"""Languages of the Installation Guide, named as the workbook names them. Polish has neither."""
PACKAGES = (
    "installation-guide-amd64",
    *(f"debian-reference-{code}" for code in ("en", *REFERENCE.values())),
)
SHORTEST = 40
"""Characters below which an English paragraph is a label more often than a sentence."""


def fetch(folder: Path) -> Path:
    """Fetch the packages with apt and unpack them into `folder`, without installing anything."""
    done = subprocess.run(
        ["apt-get", "--quiet", "download", *PACKAGES], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"apt-get could not fetch the handbooks: {done.stderr.strip()}")
    for deb in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(deb), str(folder / "unpacked")], check=True)
    return folder / "unpacked"


def paragraphs(path: Path) -> list[str]:
    """All paragraphs of a page in order, short ones too: they are what keeps two pages in step."""
    reader = Prose()
    reader.feed(path.read_text(encoding="utf-8", errors="replace"))
    reader.flush()
    return reader.paragraphs


def aligned(english: Path, other: Path) -> list[tuple[str, str]]:
    """Pairs of paragraphs of two versions of a page; none where the pages are out of step."""
    ours, theirs = paragraphs(english), paragraphs(other)
    if len(ours) != len(theirs):
        return []
    return [
        (a, b)
        for a, b in zip(ours, theirs)
        if len(a) >= SHORTEST and a != b and re.search(r"[.:;!?]", a)
    ]


def pairs(unpacked: Path) -> list[dict[str, str]]:
    """Every pair of both handbooks, each English paragraph once for each language."""
    found: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()

    def add(language: str, work: str, english: Path, other: Path) -> None:
        if not other.is_file():
            return
        for ours, theirs in aligned(english, other):
            if (language, ours) not in seen:
                seen.add((language, ours))
                found.append({"language": language, "work": work, "en": ours, "text": theirs})

    reference = unpacked / "usr/share/debian-reference"
    for page in sorted(reference.glob("*.en.html")):
        for language, code in REFERENCE.items():
            other = page.with_name(page.name.replace(".en.html", f".{code}.html"))
            add(language, "Debian Reference", page, other)
    guide = unpacked / "usr/share/doc/installation-guide-amd64"
    for page in sorted((guide / "en").glob("*.html")):
        for language in GUIDE:
            add(language, "Debian Installation Guide", page, guide / language / page.name)
    return found


def main() -> None:
    """Fetch, align and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--unpacked", type=Path, help="a folder with the packages' files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = pairs(arguments.unpacked or fetch(Path(temporary)))
    OUTPUT.parent.mkdir(exist_ok=True)
    raw = json.dumps(found, ensure_ascii=False).encode()
    OUTPUT.write_bytes(lzma.compress(raw, preset=6))
    counts = Counter(pair["language"] for pair in found)
    print(f"{len(found):,} pairs, {len(raw):,} bytes: {dict(sorted(counts.items()))}")


if __name__ == "__main__":
    main()
