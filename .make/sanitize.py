"""Run the kernels' tests under compute-sanitizer, which comes with the CUDA toolkit.

memcheck finds reads and writes out of bounds, racecheck threads that race for shared memory. Where
the tool is missing that is said, and nothing fails. Tests marked `unsanitized` are left out:
tests/kernels/conftest.py says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USUAL = Path("/usr/local/cuda/bin/compute-sanitizer")
SELECTED = "not unsanitized and not full and not bench"
TESTS = [sys.executable, "-m", "pytest", "-q", "--numprocesses=0", "-m", SELECTED, "tests/kernels"]


def main() -> int:
    """Run both tools; the exit status of the first that finds something."""
    tool = shutil.which("compute-sanitizer") or (str(USUAL) if USUAL.exists() else None)
    if tool is None:
        print("compute-sanitizer is not installed: memcheck and racecheck were not run.")
        return 0
    for check in ("memcheck", "racecheck"):
        print(f"compute-sanitizer --tool {check}:", flush=True)
        # torch's caching allocator hands out parts of large blocks, whose edges no tool would see.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [tool, "--tool", check, "--error-exitcode", "9", *TESTS]
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
