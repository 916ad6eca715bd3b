"""torchao's GPTQ on a CPU.

It asks for CUDA and takes its four-bit grid from a library of CUDA kernels. Nothing else in its
source needs either: without the two lines that ask, and with a grid handed to it, it runs here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace

from effnb.inference.quantization.clipping import choose_grid
from effnb.inference.quantization.grid import Grid

ASKS_FOR_CUDA = (
    'assert device.type == "cuda", "GPTQ only supports CUDA currently"',
    "torch.cuda.synchronize()",
)


def torchao_gptq(group_size: int, block_size: int = 128) -> tuple[Callable, dict]:
    """Its `gptq_quantize` in four bits as a function of weight and Hessian, and a dictionary.

    In the dictionary it leaves the codes, as "codes".
    """
    from torchao.prototype.gptq import api
    from torchao.quantization import Int4WeightOnlyConfig

    source = inspect.getsource(api.gptq_quantize)
    for line in ASKS_FOR_CUDA:
        assert source.count(line) == 1, "torchao has changed; look at its source again"
        source = source.replace(line, "pass")
    kept: dict = {}

    def grid(values, group_size):
        """Our grid as torchao writes it: the value of the code 8 instead of the code of 0."""
        scale, zero = choose_grid(values, Grid(4))
        return None, scale[None], ((8 - zero) * scale)[None]

    def keep(codes):
        return kept.setdefault("codes", codes)

    names = dict(vars(api)) | {"int4_row_quantize_zp": grid, "pack_int4": keep}
    exec(source, names)
    setting = SimpleNamespace(
        gptq_quantize_block_size=block_size,
        percdamp=0.01,
        base_config=Int4WeightOnlyConfig(group_size=group_size),
    )

    def quantize(weight, hessian):
        kept.clear()
        return names["gptq_quantize"](hessian.clone(), weight.clone(), setting)

    return quantize, kept
