"""The first numbers of every document, as the repository holds them.

The chapter does to itself what it teaches. All 384 numbers of 10,000 documents in 16 bits are 7.7
MB, for which a small repository has no room; the first 128 of a nested vector are a vector too.
They are rounded to multiples of a step and compressed, so that a number takes about five bits.
"""

from __future__ import annotations

import base64
import lzma
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from effnb.chapters.inference.matryoshka.collection import Vectors
from effnb.inference import matryoshka
from effnb.lab import results

SHIPPED = 128
"""Numbers of each vector that are stored."""
ASKING = 300
"""Test queries that are stored beside the documents."""
STEPS = 4.0
"""Steps in a standard deviation; rounding changes a vector by about 7 % of its length."""
RESULT = "05_inference/8_matryoshka/vectors"
LINE = 20_000


def _pack(values: Float[Tensor, "rows dim"]) -> dict[str, Any]:
    step = float(values.std()) / STEPS
    whole = (values / step).round().clamp(-127, 127).to(torch.int8).numpy()
    small = lzma.compress(whole.T.tobytes(), preset=9)  # one number of all rows after the other
    text = base64.b85encode(small).decode()
    lines = [text[i : i + LINE] for i in range(0, len(text), LINE)]
    return {"step": step, "shape": list(whole.shape), "xz, base85": lines}


def _unpack(stored: dict[str, Any]) -> Float[Tensor, "rows dim"]:
    small = base64.b85decode("".join(stored["xz, base85"]))
    rows, dim = stored["shape"]
    whole = np.frombuffer(lzma.decompress(small), dtype=np.int8).reshape(dim, rows).T
    return torch.from_numpy(whole.astype(np.float32)) * stored["step"]


def packed(v: Vectors, A: Float[Tensor, "width dim"]) -> dict[str, Any]:
    """What is stored: prefixes of documents and of some queries, and the rows of the map.

    Args:
        v: MiniLM's vectors.
        A: The nested map; its first rows are enough for the first numbers.
    """
    A = A[:SHIPPED]
    return {
        "documents": _pack(matryoshka.prefix(v.documents @ A.T, SHIPPED)),
        "queries": _pack(matryoshka.prefix(v.queries["test"][:ASKING] @ A.T, SHIPPED)),
        "map": _pack(A),
    }


@dataclass(frozen=True)
class Shipped:
    """Prefixes that a search can run on, and the map that makes more of them.

    Attributes:
        documents: Of the descriptions, all of length 1 (but for rounding).
        queries: Of the first test synopses.
        map: From MiniLM's vector to the numbers that are stored.
        stored: The stored result that they come from.
    """

    documents: Float[Tensor, "documents dim"]
    queries: Float[Tensor, "queries dim"]
    map: Float[Tensor, "dim full"]
    stored: results.StoredResult


def read() -> Shipped | results.NotMeasured:
    """The vectors of the repository, or what says that there are none."""
    found = results.read(RESULT)
    if isinstance(found, results.NotMeasured):
        return found
    return Shipped(**{name: _unpack(found.data[name]) for name in ("documents", "queries", "map")},
                   stored=found)  # fmt: skip
