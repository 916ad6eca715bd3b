"""Rows of the table of methods and architectures; see `matrix`."""

import matrix
import pytest


@pytest.mark.parametrize("name", ["GPT-OSS", "Mixtral", "Qwen3-MoE"])
def test_every_method_is_right_or_says_what_does_not_fit(name, tmp_path):
    matrix.check(name, tmp_path)
