"""Quantization: fewer bits per number.

`formats` holds the number formats and their packed storage, `rtn` rounding to nearest, `linear`
the layer that computes from packed weights.
"""

from effnb.inference.quantization.formats import (
    BITS,
    Granularity,
    QuantizedTensor,
    bits_per_weight,
    pack,
    quantize,
    unpack,
)
from effnb.inference.quantization.linear import QuantizedLinear
from effnb.inference.quantization.rtn import dequantized, rtn

__all__ = [
    "BITS",
    "Granularity",
    "QuantizedLinear",
    "QuantizedTensor",
    "bits_per_weight",
    "dequantized",
    "pack",
    "quantize",
    "rtn",
    "unpack",
]
