"""Pruning: remove weights.

`masks` says where weights compete and reads masks back, `storage` what a sparse weight takes.
Without data: `magnitude`. From calibration data, layer by layer: `wanda`, `sparsegpt`, `obs`. From
gradients: `taylor` (and SNIP), `obd`. While training: `gradual`, `movement`, `lottery`. Afterwards:
`recovery`.
"""

from effnb.inference.pruning.lottery import Ticket, lottery, prune_remaining, random_masks
from effnb.inference.pruning.magnitude import (
    CubicSchedule,
    gradual,
    magnitude,
    magnitude_mask,
    magnitude_scores,
)
from effnb.inference.pruning.masked_training import MaskedLinear, PruningRun, train_masked
from effnb.inference.pruning.masks import (
    MaskSummary,
    Pattern,
    apply_masks,
    choose_masks,
    follows,
    keep_mask,
    masks_of,
    summarize,
)
from effnb.inference.pruning.movement import (
    MovementLinear,
    MovementRun,
    movement,
    soft_mask,
    soft_movement,
)
from effnb.inference.pruning.obs import (
    ObsResult,
    fisher_diagonal,
    least_squares_weight,
    obd,
    obd_saliency,
    obs,
    obs_saliency,
    obs_step,
    obs_weight,
)
from effnb.inference.pruning.recovery import (
    allocate_by_sensitivity,
    allocate_global,
    allocate_uniform,
    fine_tune,
    sensitivity,
)
from effnb.inference.pruning.sparsegpt import SparseGptResult, sparsegpt, sparsegpt_weight
from effnb.inference.pruning.storage import (
    SparseTensor,
    Storage,
    encode,
    encode_model,
    load_masks,
    mask_storage,
    save_masks,
    storage_of,
)
from effnb.inference.pruning.taylor import (
    mean_gradients,
    snip,
    snip_scores,
    taylor,
    taylor_groups,
    taylor_score,
    taylor_scores,
)
from effnb.inference.pruning.wanda import (
    cumulative_share,
    wanda,
    wanda_mask,
    wanda_score,
    wanda_scores,
)

__all__ = [
    "CubicSchedule",
    "MaskSummary",
    "MaskedLinear",
    "MovementLinear",
    "MovementRun",
    "ObsResult",
    "Pattern",
    "PruningRun",
    "SparseGptResult",
    "SparseTensor",
    "Storage",
    "Ticket",
    "allocate_by_sensitivity",
    "allocate_global",
    "allocate_uniform",
    "apply_masks",
    "choose_masks",
    "cumulative_share",
    "encode",
    "encode_model",
    "fine_tune",
    "fisher_diagonal",
    "follows",
    "gradual",
    "keep_mask",
    "least_squares_weight",
    "load_masks",
    "lottery",
    "magnitude",
    "magnitude_mask",
    "magnitude_scores",
    "mask_storage",
    "masks_of",
    "mean_gradients",
    "movement",
    "obd",
    "obd_saliency",
    "obs",
    "obs_saliency",
    "obs_step",
    "obs_weight",
    "prune_remaining",
    "random_masks",
    "save_masks",
    "sensitivity",
    "snip",
    "snip_scores",
    "soft_mask",
    "soft_movement",
    "sparsegpt",
    "sparsegpt_weight",
    "storage_of",
    "summarize",
    "taylor",
    "taylor_groups",
    "taylor_score",
    "taylor_scores",
    "train_masked",
    "wanda",
    "wanda_mask",
    "wanda_score",
    "wanda_scores",
]
