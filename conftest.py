"""What every test and every notebook runs under: no model hub, one thread each, panels that sweep.

It lies at the top because pytest's hooks reach only what is below them, and both `tests/` and
`notebooks/` are tested.
"""

import os

import pytest

# Before anything imports torch, whose thread pools are sized once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    """Let a notebook's kernel start with EFFNB_SWEEP=1: panels visit every position.

    Exercises test themselves there too. One execution of a chapter, nbval's, so serves all checks.
    """
    if item.path.suffix != ".ipynb":
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFNB_SWEEP", "1")
        return (yield)
