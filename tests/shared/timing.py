"""Times of a process of its own, for tests that promise a speed.

Such a process runs without the shape checks that tests add to each call, and on one thread. Times
are its processor time, so that other work on the machine disturbs them little; what is compared
runs in turn, and medians are taken.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, all of them called again and again in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measured(file: str, name: str) -> Any:
    """What `answer` prints for a name, when the file runs as a program."""
    done = subprocess.run(
        [sys.executable, file, name],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def answer(functions: Mapping[str, Any]) -> None:
    """Print the result of the function `measure_<name>` of a program, its name being the argument.

    Args:
        functions: The program's `globals()`.
    """
    import torch

    torch.set_num_threads(1)
    print(json.dumps(functions[f"measure_{sys.argv[1]}"]()))
