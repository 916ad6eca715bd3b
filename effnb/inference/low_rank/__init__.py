"""Low rank: weights as products of thin matrices.

`factors` holds the factorised layer and what it saves. Four methods choose the factors: `svd` by
the weight alone, `fwsvd` by the loss's gradients, `asvd` by the inputs' sizes, `svd_llm` by the
inputs' whole covariance. `losparse` adds some whole rows to a low rank, `tensor_train` stores
embeddings as chains of small tensors, `allocate` finds a rank for each layer under one budget, and
`storage` writes and reads files.
"""

from effnb.inference.low_rank.allocate import (
    Allocation,
    allocate_by_loss,
    allocate_by_spectrum,
)
from effnb.inference.low_rank.asvd import InputMean, asvd, asvd_weight, decompose_asvd
from effnb.inference.low_rank.factors import (
    Factorized,
    Factors,
    LowRankLinear,
    break_even_rank,
    rank_for,
    ranks_of,
)
from effnb.inference.low_rank.fwsvd import (
    decompose_fwsvd,
    fisher,
    fwsvd,
    fwsvd_weight,
    importance,
)
from effnb.inference.low_rank.losparse import (
    LowRankPlusSparse,
    cubic_schedule,
    losparse,
    low_rank_plus_sparse,
    split_budget,
)
from effnb.inference.low_rank.storage import (
    dense,
    describe,
    load_factorized,
    save_factorized,
    skeleton,
)
from effnb.inference.low_rank.svd import decompose, scaled_svd, svd, truncate, truncated_svd
from effnb.inference.low_rank.svd_llm import (
    Gram,
    decompose_svd_llm,
    svd_llm,
    svd_llm_weight,
    tune_factors,
    whitening,
)
from effnb.inference.low_rank.tensor_train import (
    TensorTrain,
    TensorTrainEmbedding,
    TensorTrainHead,
    balanced_shape,
    tensor_train,
    train_size,
    tt_svd,
)

__all__ = [
    "Allocation",
    "Factorized",
    "Factors",
    "Gram",
    "InputMean",
    "LowRankLinear",
    "LowRankPlusSparse",
    "TensorTrain",
    "TensorTrainEmbedding",
    "TensorTrainHead",
    "allocate_by_loss",
    "allocate_by_spectrum",
    "asvd",
    "asvd_weight",
    "balanced_shape",
    "break_even_rank",
    "cubic_schedule",
    "decompose",
    "decompose_asvd",
    "decompose_fwsvd",
    "decompose_svd_llm",
    "dense",
    "describe",
    "fisher",
    "fwsvd",
    "fwsvd_weight",
    "importance",
    "load_factorized",
    "losparse",
    "low_rank_plus_sparse",
    "rank_for",
    "ranks_of",
    "save_factorized",
    "scaled_svd",
    "skeleton",
    "split_budget",
    "svd",
    "svd_llm",
    "svd_llm_weight",
    "tensor_train",
    "train_size",
    "truncate",
    "truncated_svd",
    "tt_svd",
    "tune_factors",
    "whitening",
]
