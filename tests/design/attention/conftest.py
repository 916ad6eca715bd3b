"""Shapes written in signatures are checked here, and can be left unchecked as users have it."""

import pytest
from jaxtyping import config, install_import_hook

install_import_hook(["effnb.design.attention"], "beartype.lenient")


@pytest.fixture
def unchecked():
    """The package as users call it: what refuses shapes then is the package's own sentence."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
