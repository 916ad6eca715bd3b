"""Weights without numbers, and numbers that mean nothing, are refused before any work starts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effnb.core import outliers
from effnb.core.checks import check_finite, check_loaded
from effnb.evaluation import perplexity
from effnb.finetuning import lora
from effnb.inference import low_rank, pruning, quantization

IDS = torch.arange(1, 17).view(2, 8)
METHODS = {
    "rtn": lambda m: quantization.rtn(m, 4),
    "gptq": lambda m: quantization.gptq(m, IDS, 4),
    "awq": lambda m: quantization.awq(m, IDS, 4),
    "smooth": lambda m: quantization.smooth(m, IDS),
    "rotate": lambda m: quantization.rotate(m),
    "llm_int8": lambda m: quantization.llm_int8(m),
    "quantize_activations": lambda m: quantization.quantize_activations(m, 8, 8),
    "kivi": lambda m: quantization.kivi(m, group_size=8),
    "prepare_qat": lambda m: quantization.prepare_qat(m, 4),
    "hessian_traces": lambda m: quantization.hessian_traces(m, IDS),
    "magnitude": lambda m: pruning.magnitude(m, 0.5),
    "wanda": lambda m: pruning.wanda(m, IDS, 0.5),
    "sparsegpt": lambda m: pruning.sparsegpt(m, IDS, 0.5),
    "obd": lambda m: pruning.obd(m, IDS, 0.5),
    "mean_gradients": lambda m: pruning.mean_gradients(m, IDS),
    "head_importance": lambda m: pruning.head_importance(m, IDS),
    "llm_pruner": lambda m: pruning.llm_pruner(m, IDS, 0.5),
    "drop_layers": lambda m: pruning.drop_layers(m, [0]),
    "svd": lambda m: low_rank.svd(m, 0.5),
    "fwsvd": lambda m: low_rank.fwsvd(m, IDS, 0.5),
    "svd_llm": lambda m: low_rank.svd_llm(m, IDS, 0.5),
    "lora": lambda m: lora.attach(m),
    "inject_outliers": lambda m: outliers.inject_outliers(m, [1], 8.0),
    "inject_key_outliers": lambda m: outliers.inject_key_outliers(m, [1], 8.0),
    "perplexity": lambda m: perplexity(m, IDS.flatten(), context=8),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_weight_without_numbers_is_refused_by_its_name(llama, method):
    """As a library leaves it that offloads some layers: all weights are there but those of one."""
    layer = llama.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is on the meta"):
        METHODS[method](llama)


def test_buffers_without_numbers_are_refused_too():
    model = nn.BatchNorm1d(4)
    check_loaded(model)
    model.running_mean = torch.empty(4, device="meta")
    with pytest.raises(ValueError, match="running_mean is on the meta device"):
        check_loaded(model)


def test_numbers_that_are_not_finite_are_counted():
    check_finite(torch.ones(3))
    with pytest.raises(ValueError, match="the gain has 2 entries that are NaN or infinite; only"):
        check_finite(torch.tensor([1.0, torch.nan, -torch.inf]), "the gain")
    with pytest.raises(ValueError, match="the weight is on the meta device"):
        check_finite(torch.empty(2, device="meta"))
