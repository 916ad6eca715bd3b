"""FAISS beside PyTorch: one sentence where it is missing, and one thread while it works.

Each brings a pool of threads. Two pools on the same cores wait for each other, and what several
threads build at once (a graph of neighbours) differs from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def open_faiss() -> Any:
    """The library, or one sentence.

    Raises:
        ModuleNotFoundError: When it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "approximate search needs FAISS: install it with `python -m pip install faiss-cpu`."
        ) from None
    return faiss


@contextmanager
def one_thread(faiss: Any) -> Iterator[None]:
    """FAISS on one thread; afterwards it has as many as before."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
