"""What a method leaves out is said: in a number, and in a warning that points to the caller."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import make

from effnb.core.calibration import block_linears
from effnb.core.coverage import Coverage, LeftOut, coverage
from effnb.core.modules import Layers, left_out, linears


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.layer = nn.Linear(4, 4)
        self.experts = nn.Module()
        self.experts.stack = nn.Parameter(torch.ones(2, 4, 4))
        self.lm_head = nn.Linear(4, 10)


def test_the_share_left_out_is_of_all_parameters():
    model = Mixed()
    found = coverage(model, [model.layer])
    assert found.parameters == 40 + 20 + 32 + 50
    assert found.left_out == {"lm_head.weight": 40, "experts.stack": 32}
    assert found.share == pytest.approx(72 / 142)
    assert left_out(model, [model.layer]).left_out == {"experts.stack": 32}  # heads are not asked
    assert not coverage(model, [model]).left_out and coverage(model, [model]).share == 0
    assert "51%" in str(found) and "no weight" in str(Coverage(10, {}))


def test_what_was_not_asked_for_is_not_reported():
    model = Mixed()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linears(model, "layer")
        linears(model, layers=Layers(exclude=["lm_head", "experts*"]))
    with pytest.warns(LeftOut, match=r"23% .*experts\.stack"):
        linears(model)


def test_an_ordinary_model_is_covered_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("llama", "t5", "opt", "gemma3", "bloom"):
            linears(make(name))
            block_linears(make(name))


def test_the_warning_points_to_the_line_that_called_the_package():
    with pytest.warns(LeftOut) as said:
        block_linears(make("bert"))
    assert Path(said[0].filename).name == Path(__file__).name
    assert "cls.predictions.transform.dense" in str(said[0].message)


def test_a_model_without_linear_layers_says_where_its_weights_are():
    with pytest.raises(ValueError, match=r"no Linear fits.*\d\d% .*c_"):
        linears(make("gpt2"))
