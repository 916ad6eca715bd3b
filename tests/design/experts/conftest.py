"""Shapes written in signatures are checked in tests; here they can be left as users have them."""

import pytest
from jaxtyping import config


@pytest.fixture
def unchecked():
    """The package as users call it: what refuses shapes then is the package's own sentence."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
