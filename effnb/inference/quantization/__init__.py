"""Quantization: fewer bits per number.

Formats and storage: `formats` (uniform grids), `clipping` (how much a grid should cover), `minimum`
(grids that begin at a real number), `tables` (NF4, FP4, FP8), `extreme` (two and three values),
`stored`, `linear` and `storage` (what all of them share, the layer that computes from them, files).

After training: `rtn`, `gptq` and `awq` for weights; `activations`, `smoothquant`, `llm_int8` and
`rotation` for inputs as well; `kv_cache` for keys and values.

With training: `estimators` and `qat` (straight-through, LSQ, BitNet), `llm_qat`, `qlora`, `peqa`.

Which layer gets how many bits: `sensitivity`, `allocation` and `mixed`. Running from packed codes:
`fast`, and one token at a time `decoding` and `compiled`.
"""

from effnb.inference.quantization.activations import (
    QuantizedInputs,
    integer_matmul,
    quantize_activations,
    quantize_inputs,
    quantized_matmul,
)
from effnb.inference.quantization.allocation import allocate, allocation_bytes, allocation_cost
from effnb.inference.quantization.awq import ScaleSearch, awq, awq_clip, awq_scales
from effnb.inference.quantization.clipping import choose_grid, gaussian_clip, gaussian_error
from effnb.inference.quantization.estimators import lsq_quantize, quantize_ste, ste_round
from effnb.inference.quantization.extreme import BinaryTensor, TernaryTensor, binarize, ternarize
from effnb.inference.quantization.fast import (
    Int4Tensor,
    PackedLinear,
    PackedTensor,
    accelerate,
    fast,
    no_int4,
    packed_linear,
)
from effnb.inference.quantization.formats import (
    BITS,
    Granularity,
    Grid,
    QuantizedTensor,
    bits_per_weight,
    fake_quantize,
    pack,
    quantize,
    unpack,
)
from effnb.inference.quantization.gptq import (
    GptqResult,
    InverseHessian,
    gptq,
    gptq_columns,
    gptq_weight,
    invert_hessian,
)
from effnb.inference.quantization.hadamard import (
    hadamard_matrix,
    hadamard_transform,
    random_hadamard,
)
from effnb.inference.quantization.kv_cache import KiviCache, decode_losses, kivi, quantize_kv
from effnb.inference.quantization.linear import QuantizedLinear, group_size_label, refuse_quantized
from effnb.inference.quantization.llm_int8 import (
    LLMInt8Linear,
    llm_int8,
    llm_int8_matmul,
    outlier_columns,
    outlier_fractions,
)
from effnb.inference.quantization.llm_qat import imitation_loss, self_generate, soft_cross_entropy
from effnb.inference.quantization.minimum import MinimumTensor, quantize_minimum
from effnb.inference.quantization.mixed import Additivity, additivity, layer_bytes, mixed_precision
from effnb.inference.quantization.peqa import (
    ScaleTunedLinear,
    load_scales,
    peqa,
    scales_state_dict,
    to_quantized,
    tune_scales,
)
from effnb.inference.quantization.qat import FakeQuantLinear, convert, prepare_qat
from effnb.inference.quantization.qlora import qlora
from effnb.inference.quantization.rotation import quarot, rotate
from effnb.inference.quantization.rtn import dequantized, quantize_linears, rtn
from effnb.inference.quantization.sensitivity import (
    HessianTrace,
    hessian_sensitivity,
    hessian_traces,
    loss_sensitivity,
    output_sensitivity,
)
from effnb.inference.quantization.smoothquant import smooth, smooth_scales, smoothquant
from effnb.inference.quantization.storage import load_quantized, save_quantized
from effnb.inference.quantization.tables import TableTensor, named_table, nf4_levels, quantize_table

__all__ = [
    "BITS",
    "Additivity",
    "BinaryTensor",
    "FakeQuantLinear",
    "GptqResult",
    "Granularity",
    "Grid",
    "HessianTrace",
    "Int4Tensor",
    "InverseHessian",
    "KiviCache",
    "LLMInt8Linear",
    "MinimumTensor",
    "PackedLinear",
    "PackedTensor",
    "QuantizedInputs",
    "QuantizedLinear",
    "QuantizedTensor",
    "ScaleSearch",
    "ScaleTunedLinear",
    "TableTensor",
    "TernaryTensor",
    "accelerate",
    "additivity",
    "allocate",
    "allocation_bytes",
    "allocation_cost",
    "awq",
    "awq_clip",
    "awq_scales",
    "binarize",
    "bits_per_weight",
    "choose_grid",
    "convert",
    "decode_losses",
    "dequantized",
    "fake_quantize",
    "fast",
    "gaussian_clip",
    "gaussian_error",
    "gptq",
    "gptq_columns",
    "gptq_weight",
    "group_size_label",
    "hadamard_matrix",
    "hadamard_transform",
    "hessian_sensitivity",
    "hessian_traces",
    "imitation_loss",
    "integer_matmul",
    "invert_hessian",
    "kivi",
    "layer_bytes",
    "llm_int8",
    "llm_int8_matmul",
    "load_quantized",
    "load_scales",
    "loss_sensitivity",
    "lsq_quantize",
    "mixed_precision",
    "named_table",
    "nf4_levels",
    "no_int4",
    "outlier_columns",
    "outlier_fractions",
    "output_sensitivity",
    "pack",
    "packed_linear",
    "peqa",
    "prepare_qat",
    "qlora",
    "quantize",
    "quantize_activations",
    "quantize_inputs",
    "quantize_kv",
    "quantize_linears",
    "quantize_minimum",
    "quantize_ste",
    "quantize_table",
    "quantized_matmul",
    "quarot",
    "random_hadamard",
    "refuse_quantized",
    "rotate",
    "rtn",
    "save_quantized",
    "scales_state_dict",
    "self_generate",
    "smooth",
    "smooth_scales",
    "smoothquant",
    "soft_cross_entropy",
    "ste_round",
    "ternarize",
    "to_quantized",
    "tune_scales",
    "unpack",
]
