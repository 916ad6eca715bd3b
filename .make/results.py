"""Compute the stored results under `data/results/` again, each by the command that it names.

python .make/results.py            # all of them
python .make/results.py NAME ...   # only these, such as 05_inference/1_pruning/methods
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "data" / "results"


def commands(names: list[str], folder: Path = RESULTS) -> dict[str, list[str]]:
    """The commands to run, each once, with the results that each computes.

    Raises:
        ValueError: When a result is unknown, or does not say how it was computed.
    """
    known = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.json"))
    }
    wanted: dict[str, list[str]] = {}
    for name in names or known:
        if name not in known:
            raise ValueError(f"there is no stored result {name!r}; there are {', '.join(known)}.")
        try:
            command = json.loads(known[name].read_text(encoding="utf-8"))["provenance"]["command"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"data/results/{name}.json does not say how it was computed; restore it with "
                f"`git checkout -- data/results/{name}.json`."
            ) from None
        wanted.setdefault(command, []).append(name)
    return wanted


def main(names: list[str], folder: Path = RESULTS) -> int:
    """Run the commands one after the other; returns the exit status of the first that fails."""
    try:
        wanted = commands(names, folder)
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    # The commands say `python`: this one.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command, computed in wanted.items():
        print(f"{', '.join(computed)}: {command}", flush=True)
        done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PATH": path})
        if done.returncode:
            return done.returncode
    print(f"{sum(map(len, wanted.values()))} stored results are computed again.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
