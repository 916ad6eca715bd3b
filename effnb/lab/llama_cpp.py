"""llama.cpp as a peer: the decoder that people take on a laptop, timed in turn with ours.

Its prebuilt binary comes in the npm package `node-llama-cpp`, which needs no compiler:
`make bench-llama-cpp` installs it below `build/npm`. A process of Node answers questions over a
pipe, so that both decoders run in turn on an otherwise idle machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effnb.lab.models import WEIGHTS, ModelUnavailable, _wheel_files

PACKAGES = ("node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1")
"""What is installed; the second is the binary, for processors of this kind."""

_ROOT = Path(__file__).parents[2]
_DRIVER = _ROOT / ".make" / "peers" / "llama_cpp.mjs"


def home() -> Path:
    """Where the npm packages are: the variable EFFNB_NPM, or `build/npm`."""
    return Path(os.environ.get("EFFNB_NPM", _ROOT / "build" / "npm"))


def gguf_file() -> Path:
    """SmolLM2's file of 4-bit weights, as its wheel brings it; llama.cpp reads it as it is.

    Raises:
        ModelUnavailable: When the wheel is not installed.
    """
    distribution, file = WEIGHTS["smollm2-135m"]
    folder, _, name = file.rpartition("/")
    return _wheel_files(distribution, f"{folder}/")[name][0]


class LlamaCpp:
    """A running llama.cpp with one model, one sequence and a fixed number of threads."""

    def __init__(self, file: Path, threads: int) -> None:
        """Start it and read the model.

        Raises:
            ModelUnavailable: When Node or the package is missing, or llama.cpp does not start.
        """
        node, package = shutil.which("node"), home() / "node_modules" / "node-llama-cpp"
        if node is None or not package.is_dir():
            raise ModelUnavailable("llama.cpp is not installed here; run `make bench-llama-cpp`.")
        self.process = subprocess.Popen(
            [node, str(_DRIVER), str(file), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"EFFNB_NPM": str(home())},
        )
        self.threads = self._answer()["threads"]

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise ModelUnavailable("llama.cpp ended without an answer; run it by hand to see why.")
        return json.loads(line)

    def _ask(self, **question: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def decode(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        """Go on greedily after a prompt: `tokens`, and the `seconds` of `count` of them.

        The prompt and the first token, which comes with it, are not timed.
        """
        return self._ask(decode=list(map(int, prompt)), count=count)

    def losses(self, tokens: Sequence[int]) -> list[float]:
        r"""$-\ln p(x_{t+1} \mid x_{\le t})$ of every token after the first, in nats."""
        return self._ask(score=list(map(int, tokens)))["losses"]

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


if __name__ == "__main__":
    print(*PACKAGES)
