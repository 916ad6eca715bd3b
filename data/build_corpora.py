"""Build the corpora of the workbook from Debian's archive (`make data`; Debian or Ubuntu only).

Nothing here runs when the workbook is used: the results are in the repository. The script

1. fetches a few binary packages and the archive's index and translation files with apt,
   into a private folder, without installing anything and without root;
2. reads the texts out of them and cleans them (rewrapping of hard line breaks, nothing else);
3. splits them, and writes `corpora/*.json.xz` and `corpora/MANIFEST.json` with their checksums.

Needs: apt, dpkg, libreadline8, and the Python package `rdata` (`pip install -e .[data]`).
"""

from __future__ import annotations

import argparse
import collections
import glob
import hashlib
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import build_manuals

HERE = Path(__file__).resolve().parent
CORPORA = HERE / "corpora"
LANGUAGES = ["da", "de", "es", "fr", "it", "ja", "ko", "pl", "pt_BR", "ru", "zh_CN"]
SMALLEST_SECTION = 150
"""Archive sections with fewer packages than this are merged into `misc`."""
TRANSLATIONS_PER_LANGUAGE = 2_500
TRANSLATIONS_PER_SOURCE = 3

NOVELS = {  # name of the R object: title, year of publication
    "sensesensibility": ("Sense and Sensibility", 1811),
    "prideprejudice": ("Pride and Prejudice", 1813),
    "mansfieldpark": ("Mansfield Park", 1814),
    "emma": ("Emma", 1815),
    "northangerabbey": ("Northanger Abbey", 1817),
    "persuasion": ("Persuasion", 1817),
}
HELD_OUT_WORKS = {"Persuasion", "Ruth", "Ecclesiastes", "Jonah", "John", "James"}
BOOKS = [
    "Genesis",
    "Exodus",
    "Leviticus",
    "Numbers",
    "Deuteronomy",
    "Joshua",
    "Judges",
    "Ruth",
    "1 Samuel",
    "2 Samuel",
    "1 Kings",
    "2 Kings",
    "1 Chronicles",
    "2 Chronicles",
    "Ezra",
    "Nehemiah",
    "Esther",
    "Job",
    "Psalms",
    "Proverbs",
    "Ecclesiastes",
    "Song of Solomon",
    "Isaiah",
    "Jeremiah",
    "Lamentations",
    "Ezekiel",
    "Daniel",
    "Hosea",
    "Joel",
    "Amos",
    "Obadiah",
    "Jonah",
    "Micah",
    "Nahum",
    "Habakkuk",
    "Zephaniah",
    "Haggai",
    "Zechariah",
    "Malachi",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Romans",
    "1 Corinthians",
    "2 Corinthians",
    "Galatians",
    "Ephesians",
    "Philippians",
    "Colossians",
    "1 Thessalonians",
    "2 Thessalonians",
    "1 Timothy",
    "2 Timothy",
    "Titus",
    "Philemon",
    "Hebrews",
    "James",
    "1 Peter",
    "2 Peter",
    "1 John",
    "2 John",
    "3 John",
    "Jude",
    "Revelation",
]


def run(command: list[str], **kwargs) -> str:
    """Run a command and return what it printed; a failure ends the script with one sentence."""
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    if done.returncode:
        sys.exit(f"`{' '.join(command)}` failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def fetch(folder: Path) -> Path:
    """Fetch the packages and the index files into `folder`, through a private apt state."""
    for part in ("lists/partial", "cache/archives/partial", "debs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    languages = " ".join(f'"{name}";' for name in ["en", *LANGUAGES])
    # A separate folder, so that the machine's apt settings (some images switch translations
    # off) neither change what is fetched nor are changed.
    (folder / "apt.conf").write_text(
        'Dir::Etc::Parts "/dev/null";\n'
        f"Acquire::Languages {{ {languages} }};\n"
        f'Dir::State::Lists "{folder}/lists";\nDir::Cache "{folder}/cache";\n'
        'APT::Sandbox::User "";\n'
    )
    environment = os.environ | {"APT_CONFIG": str(folder / "apt.conf")}
    run(["apt-get", "--quiet", "update"], env=environment)
    run(
        [
            *["apt-get", "download", "r-cran-janeaustenr", "bible-kjv-text", "bible-kjv"],
            *sorted(build_manuals.PACKAGES),
        ],
        env=environment,
        cwd=folder / "debs",
    )
    for deb in sorted((folder / "debs").glob("*.deb")):
        run(["dpkg", "-x", str(deb), str(folder / "unpacked")])
    return folder


# --------------------------------------------------------------------------------- novels


def unwrap(lines: list[str]) -> str:
    """Join hard-wrapped lines into paragraphs separated by one blank line."""
    paragraphs, current = [], []
    for line in [*lines, ""]:
        if line.strip():
            current.append(line.strip())
        elif current:
            paragraphs.append(re.sub(r"\s+", " ", " ".join(current)))
            current = []
    return "\n\n".join(paragraphs)


def austen(unpacked: Path) -> list[dict]:
    """Six novels as chapters, from the R package's serialised character vectors."""
    import rdata

    base = unpacked / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.read_rds(base / "Rdata.rdx")["variables"]
    packed = (base / "Rdata.rdb").read_bytes()
    records = []
    for name, (title, year) in NOVELS.items():
        start, length = (int(n) for n in index[name])
        # R stores each object as a 4-byte length followed by a zlib stream.
        data = zlib.decompress(packed[start + 4 : start + length])
        lines = [str(s) for s in rdata.conversion.convert(rdata.parser.parse_data(data))]
        heads = [i for i, line in enumerate(lines) if re.match(r"(?i)^chapter \w+\.?$", line)]
        for number, (begin, end) in enumerate(zip(heads, [*heads[1:], len(lines)]), 1):
            body = [s for s in lines[begin + 1 : end] if not re.match(r"(?i)^volume \w+$", s)]
            # The end mark, and the transcriber's note that follows one of the novels.
            text = re.split(
                r"\n\n(?:A NOTE ON THE TEXT|THE END|FINIS)\b", unwrap(body), flags=re.I
            )[0]
            records.append(
                {"work": title, "year": year, "chapter": number, "kind": "novel", "text": text}
            )
    return records


def bible(unpacked: Path) -> list[dict]:
    """The King James Bible as chapters, one verse a line, printed by its own reader program."""
    text = run(
        [
            str(unpacked / "usr/bin/bible"), "-f", "-p", str(unpacked / "usr/lib"),
            "gen1:1-rev22:21",
        ],
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    chapters: dict[tuple[str, int], list[str]] = {}
    order: list[str] = []
    for line in text.splitlines():
        match = re.match(r"^(\d?[A-Za-z]+?)(\d+):\d+ (.*)$", line)
        abbreviation, chapter, verse = match.groups()
        if abbreviation not in order:
            order.append(abbreviation)
        chapters.setdefault((abbreviation, int(chapter)), []).append(verse.strip())
    if len(order) != len(BOOKS):
        sys.exit(f"expected {len(BOOKS)} books of the Bible, found {len(order)}")
    names = dict(zip(order, BOOKS))
    return [
        {
            "work": names[short],
            "year": 1611,
            "chapter": chapter,
            "kind": "bible",
            "text": "\n".join(verses),
        }
        for (short, chapter), verses in chapters.items()
    ]


def split_novels(records: list[dict]) -> None:
    """Hold whole works out for `test`, and every 25th chapter of the rest for `validation`."""
    count = 0
    for record in records:
        if record["work"] in HELD_OUT_WORKS:
            record["split"] = "test"
        else:
            count += 1
            record["split"] = "validation" if count % 25 == 0 else "train"


# ------------------------------------------------------------------------------- packages


def paragraphs_of(stanza: str) -> dict[str, str]:
    """Parse one RFC-822-like stanza of an index file."""
    fields: dict[str, str] = {}
    name = None
    for line in stanza.split("\n"):
        if line[:1] in (" ", "\t"):
            if name:
                fields[name] += "\n" + line
        elif ":" in line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def index_file(folder: Path, pattern: str) -> list[dict[str, str]]:
    """Read the one index file of the main suite that matches, whatever its compression."""
    paths = [
        p
        for p in glob.glob(f"{folder}/lists/*{pattern}*")
        if not re.search(r"-updates|-security", p)
    ]
    if len(paths) != 1:
        sys.exit(f"expected one index file matching {pattern}, found {len(paths)}")
    text = run(["/usr/lib/apt/apt-helper", "cat-file", paths[0]])
    return [paragraphs_of(stanza) for stanza in text.split("\n\n") if stanza.strip()]


def describe(field: str, joiner: str = " ") -> tuple[str, str]:
    """Split a Description field into the synopsis and the long text, with its lines rejoined.

    Lines that begin with one space are paragraph text; ` .` is a blank line; lines that begin
    with two spaces or more, or with a bullet, are kept as they are (Debian policy 5.6.13).
    """
    synopsis, *rest = field.split("\n")
    blocks: list[str] = []
    open_paragraph = False
    for line in rest:
        body = line[1:]
        if body.strip() in ("", "."):
            blocks.append("")
            open_paragraph = False
        elif body.startswith((" ", "\t")) or re.match(r"^[*+o-] ", body):
            blocks.append(re.sub(r"^\s+", " ", body.rstrip()))
            open_paragraph = False
        elif open_paragraph:
            blocks[-1] += joiner + body.strip()
        else:
            blocks.append(body.strip())
            open_paragraph = True
    return synopsis.strip(), re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


def fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text only, alike on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def packages(folder: Path) -> tuple[list[dict], dict[str, list[dict]]]:
    """English descriptions with section, source and split; and translations by language."""
    meta = {}
    for fields in index_file(folder, "_main_binary-amd64_Packages"):
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        meta.setdefault(fields["Package"], (source, fields.get("Section", "misc").split("/")[-1]))
    counts = collections.Counter(section for _, section in meta.values())
    records: dict[str, dict] = {}
    md5s: dict[str, str] = {}
    for fields in index_file(folder, "_main_i18n_Translation-en"):
        name = fields["Package"]
        if name not in meta or name in records:
            continue
        source, section = meta[name]
        synopsis, text = describe(fields["Description-en"])
        if len(text) < 40:  # nothing to continue, nothing to retrieve
            continue
        where = fraction(source)
        records[name] = {
            "name": name,
            "source": source,
            "section": section if counts[section] >= SMALLEST_SECTION else "misc",
            "split": "train" if where < 0.90 else "validation" if where < 0.95 else "test",
            "synopsis": synopsis,
            "text": text,
        }
        md5s[name] = fields["Description-md5"]

    found: dict[str, dict[str, dict]] = {}
    for language in LANGUAGES:
        joiner = "" if language in ("ja", "zh_CN") else " "
        found[language] = {}
        for fields in index_file(folder, f"_main_i18n_Translation-{language.replace('_', '%5f')}"):
            name = fields["Package"]
            # Only translations of the description as it is now, not of an older one.
            if md5s.get(name) != fields["Description-md5"] or name in found[language]:
                continue
            body = next(
                v
                for k, v in fields.items()
                if k.startswith("Description-") and k != "Description-md5"
            )
            synopsis, text = describe(body, joiner)
            original = records[name]
            if "<trans>" in body or text == original["text"] or len(text) < 20:
                continue  # partly or not translated
            found[language][name] = {"name": name, "synopsis": synopsis, "text": text}
    # Prefer packages that many languages share, and few packages of one source.
    shared = collections.Counter(name for by_name in found.values() for name in by_name)
    translations = {}
    for language, by_name in found.items():
        kept, per_source = [], collections.Counter()
        for name in sorted(by_name, key=lambda n: (-shared[n], fraction(n))):
            source = records[name]["source"]
            if (
                per_source[source] < TRANSLATIONS_PER_SOURCE
                and len(kept) < TRANSLATIONS_PER_LANGUAGE
            ):
                per_source[source] += 1
                kept.append(by_name[name])
        translations[language] = sorted(kept, key=lambda r: r["name"])
    return sorted(records.values(), key=lambda r: r["name"]), translations


# -------------------------------------------------------------------------------- writing


def write(name: str, records: list[dict]) -> dict:
    """Write records column by column (small, quick to parse) and return the manifest entry."""
    columns = {key: [record[key] for record in records] for key in records[0]}
    raw = json.dumps(columns, ensure_ascii=False, separators=(",", ":")).encode()
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    path = CORPORA / f"{name}.json.xz"
    path.write_bytes(packed)
    return {
        "file": path.name,
        "records": len(records),
        "bytes": len(packed),
        "bytes_unpacked": len(raw),
        "sha256": hashlib.sha256(packed).hexdigest(),
    }


def release(folder: Path) -> str:
    """Version and date of the archive release the texts came from."""
    [path] = [
        p
        for p in glob.glob(f"{folder}/lists/*InRelease")
        if not re.search(r"-updates|-security", p)
    ]
    text = Path(path).read_text()
    return "Debian {} of {}".format(
        re.search(r"^Version: (.*)$", text, re.M)[1], re.search(r"^Date: (.*)$", text, re.M)[1]
    )


def main() -> None:
    """Fetch, build, split and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", help="where to keep the fetched files (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = fetch(Path(arguments.folder or temporary).resolve())
        works = austen(folder / "unpacked") + bible(folder / "unpacked")
        split_novels(works)
        descriptions, translations = packages(folder)
        CORPORA.mkdir(exist_ok=True)
        manifest = {"from": release(folder), "files": {}}
        manifest["files"]["novels"] = write("novels", works)
        manifest["files"]["packages"] = write("packages", descriptions)
        manifest["files"]["manuals"] = write("manuals", build_manuals.manuals(folder / "unpacked"))
        for language, records in translations.items():
            manifest["files"][f"translations/{language}"] = write(
                f"translations.{language}", records
            )
    (CORPORA / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
    for name, entry in manifest["files"].items():
        print(f"{name:18} {entry['records']:7,} records {entry['bytes'] / 2**20:6.2f} MiB")


if __name__ == "__main__":
    main()
