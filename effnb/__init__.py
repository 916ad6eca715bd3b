"""Efficient methods for language models, complete and readable."""

import logging
import os

# Read by OpenMP's libraries when torch loads them. By default a thread that waits for work spins,
# and two notebooks at once then keep each other's threads off the cores. GNU's library takes the
# first, LLVM's and Intel's the second; `.make/environment.py` sets both for JupyterLab's kernels.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    os.environ.setdefault("KMP_BLOCKTIME", "1")

# transformers imports torchao where it is installed (for the tests here), and it then reports on
# its kernels for other machines: of no use to who reads a chapter.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(
    lambda record: "is an Enum subclass" not in record.getMessage()
)
