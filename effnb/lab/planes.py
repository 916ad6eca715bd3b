"""Weights of 16 bits, packed without loss: what the repository keeps of each `model.safetensors`.

A bfloat16 number has a sign, 8 bits of exponent and 7 of fraction. Signs and fractions of trained
weights look like noise, and no compressor shortens them. Exponents do not: most weights of a layer
are of similar size, so that the 8 bits carry about 3. The bytes of a file are therefore sorted into
two planes, one of exponents and one of signs with fractions, and `xz` shortens the first:
about 11 bits are left of every 16.

Zhang et al., "70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float" (2025), arXiv:2504.11651, unpacks such weights on the GPU while it multiplies.
"""

from __future__ import annotations

import lzma
import os
from pathlib import Path

import numpy as np

WEIGHTS, PACKED = "model.safetensors", "model.planes.xz"


def _sorted(content: bytes) -> bytes:
    """The header of a safetensors file, the exponents, then the fractions with their signs."""
    start = 8 + int.from_bytes(content[:8], "little")  # a length, and the header of that length
    end = start + (len(content) - start) // 2 * 2
    words = np.frombuffer(content[start:end], "<u2")
    turned = words << 1 | words >> 15  # the sign goes behind the fraction, the exponent is a byte
    exponents, fractions = (turned >> 8).astype("u1"), turned.astype("u1")
    return content[:start] + exponents.tobytes() + fractions.tobytes() + content[end:]


def _unsorted(content: bytes) -> bytes:
    """The inverse of `_sorted`."""
    start = 8 + int.from_bytes(content[:8], "little")
    half = (len(content) - start) // 2
    planes = np.frombuffer(content[start : start + 2 * half], "u1").astype("<u2")
    turned = planes[:half] << 8 | planes[half:]
    words = turned >> 1 | turned << 15
    return content[:start] + words.astype("<u2").tobytes() + content[start + 2 * half :]


def pack(folder: Path) -> Path:
    """Write `model.planes.xz` beside a folder's `model.safetensors`.

    Raises:
        FileNotFoundError: When the folder has no such weights.
        ValueError: When what was written does not give the same bytes again.
    """
    content = (folder / WEIGHTS).read_bytes()
    packed = lzma.compress(_sorted(content), preset=9)
    if unpacked(packed) != content:
        raise ValueError(f"{folder / WEIGHTS} does not survive packing; it is left as it is.")
    return _write(folder / PACKED, packed)


def unpacked(packed: bytes) -> bytes:
    """The content of `model.safetensors`, bit for bit, of that of `model.planes.xz`."""
    return _unsorted(lzma.decompress(packed))


def unpack(folder: Path, packed: bytes) -> Path:
    """Write `model.safetensors` from its packed content, in one step: no one reads half of it."""
    return _write(folder / WEIGHTS, unpacked(packed))


def _write(path: Path, content: bytes) -> Path:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.new")
    temporary.write_bytes(content)
    os.replace(temporary, path)
    return path
