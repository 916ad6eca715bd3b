"""Self-distilled quantization: training a quantized model to agree with itself in full precision.

`sdq` (the loss and its variants), `quant_noise` (rounding a random part of the blocks), `product`
and `ipq` (codewords, and replacing layer after layer by them), `module_errors` (where quantization
errs, and how errors add up), `fairness` (who pays), `passes` (what a step costs).
"""

from effnb.inference.self_distilled_quantization.fairness import deviation, gap, losses, spread
from effnb.inference.self_distilled_quantization.ipq import (
    IterativeResult,
    default_groups,
    iterative_product_quantization,
)
from effnb.inference.self_distilled_quantization.module_errors import (
    ModuleError,
    by_role,
    growth,
    module_errors,
    relative_errors,
    roles_of,
)
from effnb.inference.self_distilled_quantization.passes import (
    attention_bytes,
    step_flops,
    step_passes,
)
from effnb.inference.self_distilled_quantization.product import (
    ProductLinear,
    ProductWeight,
    kmeans,
    product_quantize,
)
from effnb.inference.self_distilled_quantization.quant_noise import (
    NoisyLinear,
    convert_noise,
    noise_mask,
    prepare_quant_noise,
    quant_noise,
    refresh,
)
from effnb.inference.self_distilled_quantization.sdq import (
    VARIANTS,
    Reading,
    attention_distance,
    context_vectors,
    hidden_distance,
    log_attention,
    read,
    sdq,
    sdq_terms,
    variant,
)

__all__ = [
    "VARIANTS",
    "IterativeResult",
    "ModuleError",
    "NoisyLinear",
    "ProductLinear",
    "ProductWeight",
    "Reading",
    "attention_bytes",
    "attention_distance",
    "by_role",
    "context_vectors",
    "convert_noise",
    "default_groups",
    "deviation",
    "gap",
    "growth",
    "hidden_distance",
    "iterative_product_quantization",
    "kmeans",
    "log_attention",
    "losses",
    "module_errors",
    "noise_mask",
    "prepare_quant_noise",
    "product_quantize",
    "quant_noise",
    "read",
    "refresh",
    "relative_errors",
    "roles_of",
    "sdq",
    "sdq_terms",
    "spread",
    "step_flops",
    "step_passes",
    "variant",
]
