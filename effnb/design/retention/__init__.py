"""Retention and its rivals: token mixers that keep a summary of the past instead of all of it.

`retention` has the three forms, the decays and the rotation; `retnet` the layer and the model.
Beside it: RWKV-4 (`wkv`, `rwkv`), Hyena (`long_convolution`, `hyena`) and gated linear attention
(`gla`). `configuration` and `language_model` are what their models share, and `costs` what mixing
takes in each.
"""

from effnb.design.retention.causal_lm import CausalLM
from effnb.design.retention.configuration import Call, LMConfig, ModelState, llama_parameters
from effnb.design.retention.costs import (
    DecodingCost,
    attention_decoding,
    break_even_tokens,
    break_even_work,
    chunkwise_multiply_adds,
    decoding,
    fft_multiply_adds,
    hyena_decoding,
    parallel_multiply_adds,
    retention_decoding,
    rwkv_decoding,
)
from effnb.design.retention.gla import GLALM, GatedLinearAttention, GLAConfig, gla
from effnb.design.retention.hyena import HyenaConfig, HyenaLM, HyenaOperator
from effnb.design.retention.language_model import RecurrentLM, lm_loss
from effnb.design.retention.long_convolution import (
    ImplicitFilter,
    fft_convolution,
    toeplitz,
    toeplitz_convolution,
)
from effnb.design.retention.retention import (
    decays,
    retention,
    rotate,
    rotation_frequencies,
    row_sums,
)
from effnb.design.retention.retnet import MultiScaleRetention, RetNetBlock, RetNetConfig, RetNetLM
from effnb.design.retention.rwkv import RWKVLM, ChannelMix, RWKVConfig, TimeMix, initial_mix
from effnb.design.retention.wkv import wkv, wkv_step

__all__ = [
    "Call",
    "CausalLM",
    "ChannelMix",
    "DecodingCost",
    "GLAConfig",
    "GLALM",
    "GatedLinearAttention",
    "HyenaConfig",
    "HyenaLM",
    "HyenaOperator",
    "ImplicitFilter",
    "LMConfig",
    "ModelState",
    "MultiScaleRetention",
    "RWKVConfig",
    "RWKVLM",
    "RecurrentLM",
    "RetNetBlock",
    "RetNetConfig",
    "RetNetLM",
    "TimeMix",
    "attention_decoding",
    "break_even_tokens",
    "break_even_work",
    "chunkwise_multiply_adds",
    "decays",
    "decoding",
    "fft_convolution",
    "fft_multiply_adds",
    "gla",
    "hyena_decoding",
    "initial_mix",
    "llama_parameters",
    "lm_loss",
    "parallel_multiply_adds",
    "retention",
    "retention_decoding",
    "rotate",
    "rotation_frequencies",
    "row_sums",
    "rwkv_decoding",
    "toeplitz",
    "toeplitz_convolution",
    "wkv",
    "wkv_step",
]
