"""The command `python -m effnb.book.workshop`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from effnb.book.site.book import REPOSITORY
from effnb.book.workshop import pack
from effnb.book.workshop.teaching import NoTeaching
from effnb.lab.chapters import NOTEBOOKS

OUT = REPOSITORY / "build" / "workshop"


def main(arguments: list[str] | None = None, folder: Path = NOTEBOOKS) -> int:
    """Write the teacher's pack; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effnb.book.workshop",
        description="Write the teacher's pack from the stored chapters; nothing is executed.",
    )
    parser.add_argument("chapters", nargs="*", help="such as 05_inference/2_low_rank; default all")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder to write")
    options = parser.parse_args(arguments)
    begun = time.perf_counter()
    try:
        lessons, said = pack.write(options.out.resolve(), options.chapters or None, folder)
    except NoTeaching as problem:
        print(str(problem)[0].upper() + str(problem)[1:], file=sys.stderr)
        return 1
    for one in said:
        print(one, file=sys.stderr)
    files = [path for path in options.out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(
        f"{len(lessons)} chapter{'' if len(lessons) == 1 else 's'}, {len(files)} files, "
        f"{size / 2**20:.1f} MiB, in {time.perf_counter() - begun:.0f} s: "
        f"open {options.out / 'index.html'}"
    )
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
