"""Read a compiled kernel: its loops, its loads and its products, from what the disassembler prints.

An NVIDIA GPU issues one instruction of a warp at a time in each quarter of a multiprocessor, so
instructions of the main loop are time; the width of a load and the copies that run ahead say how
much of memory's latency is hidden.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from effnb.kernels._launch import triton

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_BITS = re.compile(r"\.(?:U8|S8|U16|S16|64|128)\b")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
PRODUCTS = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "BGMMA")
"""Instructions of the tensor cores."""
_BULK = ("UBLKCP", "UTMALDG")


@dataclass(frozen=True)
class Instruction:
    """One instruction of the machine.

    Attributes:
        place: Its address.
        name: Its name with its options, such as "LDG.E.128".
        target: The address that it may jump to; None where it does not jump.
    """

    place: int
    name: str
    target: int | None = None

    @property
    def kind(self) -> str:
        """The name without options."""
        return self.name.partition(".")[0]

    @property
    def load_bytes(self) -> int:
        """Bytes that a thread loads from global memory; 0 for everything else."""
        if self.kind not in ("LDG", "LDGSTS"):
            return 0
        found = _BITS.search(self.name)
        return _WIDTHS[found[0][1:]] if found else 4


@dataclass(frozen=True)
class Assembly:
    """What the instructions of a kernel say.

    Attributes:
        instructions: All of them, in order.
    """

    instructions: tuple[Instruction, ...]

    def main_loop(self) -> tuple[Instruction, ...]:
        """The innermost loop with the most products, or loads where nothing multiplies.

        Everything, where there is no loop: a program then runs every instruction once.
        """
        useful = self._useful_loops()
        # Of loops within each other the inner one has fewer instructions, and as many products.
        return max(useful, key=self._order) if useful else self.instructions

    def other_loop(self) -> tuple[Instruction, ...]:
        """The next such loop beside the main one; nothing, where there is none."""
        main = self.main_loop()
        beside = [
            loop
            for loop in self._useful_loops()
            if loop[-1].place < main[0].place or loop[0].place > main[-1].place
        ]
        return max(beside, key=self._order) if beside else ()

    def _useful_loops(self) -> list[tuple[Instruction, ...]]:
        """Loops that multiply, those around such loops left out; or, where none does, that load."""
        loops = [
            tuple(i for i in self.instructions if one.target <= i.place <= one.place)
            for one in self.instructions
            if one.target is not None and one.target < one.place
        ]
        multiply = [loop for loop in loops if self._weight(loop)[0]]
        if not multiply:
            return [loop for loop in loops if self._weight(loop)[1]]
        return [
            loop
            for loop in multiply
            if not any(
                len(other) < len(loop)
                and loop[0].place <= other[0].place <= other[-1].place <= loop[-1].place
                for other in multiply
            )
        ]

    @classmethod
    def _order(cls, loop: tuple[Instruction, ...]) -> tuple[tuple[int, int], int]:
        return cls._weight(loop), -len(loop)

    @staticmethod
    def _weight(loop: tuple[Instruction, ...]) -> tuple[int, int]:
        products = sum(i.kind in PRODUCTS for i in loop)
        return (products, 0) if products else (0, sum(i.load_bytes for i in loop))

    @property
    def products(self) -> int:
        """Tensor-core instructions."""
        return sum(i.kind in PRODUCTS for i in self.instructions)

    @property
    def wide_products(self) -> bool:
        """Whether four warps multiply together (wgmma)."""
        return any(i.kind.endswith("GMMA") for i in self.instructions)

    def load_widths(self) -> dict[int, int]:
        """How many loads of the main loop have each width, in bytes of a thread."""
        found: dict[int, int] = {}
        for one in self.main_loop():
            if one.load_bytes:
                found[one.load_bytes] = found.get(one.load_bytes, 0) + 1
        return dict(sorted(found.items(), reverse=True))

    @property
    def asynchronous(self) -> int:
        """Copies of the main loop that run while it goes on: to shared memory, past registers."""
        return sum(i.kind == "LDGSTS" or i.kind in _BULK for i in self.main_loop())


def read(text: str) -> Assembly:
    """The instructions of a disassembled kernel; what fills up its end is left out.

    Raises:
        ValueError: When there are no instructions in the text.
    """
    labels: dict[str, int] = {}
    waiting: list[str] = []
    raw: list[tuple[int, str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            waiting.append(label[1])
        elif found := _LINE.match(line):
            place = int(found[1], 16)
            labels |= dict.fromkeys(waiting, place)
            waiting = []
            raw.append((place, found[2], found[3]))
    if not raw:
        raise ValueError("the disassembler printed no instructions.")
    made = []
    for place, name, rest in raw:
        target = _TARGET.search(rest) if name.startswith("BRA") else None
        made.append(Instruction(place, name, labels.get(target[1]) if target else None))
    while made and (made[-1].name == "NOP" or made[-1].target == made[-1].place):
        made.pop()
    return Assembly(tuple(made))


def disassemble(cubin: bytes) -> Assembly | None:
    """A compiled kernel, by the tool that comes with Triton; None where that is missing."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if not tool.exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([str(tool), "-c", str(path)], capture_output=True, text=True)
    return read(done.stdout)
