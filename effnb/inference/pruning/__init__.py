"""Pruning: remove weights.

One by one: `masks` says where weights compete and reads masks back, `storage` what a sparse weight
takes. Without data: `magnitude`. From calibration data, layer by layer: `wanda`, `sparsegpt`,
`obs`. From gradients: `taylor` (and SNIP), `obd`. While training: `gradual`, `movement`, `lottery`.

Whole structures, so that a smaller dense model is left: `structures` and `coupling` say what goes
together, `choice` what stays, `shrink` builds the model. By gates: `heads`. By gradients:
`llm_pruner`; by a LoRA's: `lora_prune`. Whole blocks: `depth`. By activations: `width`.

Afterwards: `recovery`.
"""

from effnb.inference.pruning.choice import Kept, choose, keep_all
from effnb.inference.pruning.coupling import coupled
from effnb.inference.pruning.depth import (
    angular_distances,
    block_influence,
    drop_layers,
    drop_run,
    layer_ablation,
    shortgpt,
)
from effnb.inference.pruning.heads import (
    head_ablation,
    head_importance,
    lowest_heads,
    mask_heads,
    prune_heads,
)
from effnb.inference.pruning.llm_pruner import llm_pruner, llm_pruner_scores
from effnb.inference.pruning.lora_prune import (
    LoraPruned,
    lora_gradient,
    lora_importance,
    lora_prune,
    lora_score,
)
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
    Recovered,
    allocate_by_sensitivity,
    allocate_global,
    allocate_uniform,
    fine_tune,
    recover,
    sensitivity,
)
from effnb.inference.pruning.shrink import Pruned, mask_structures, prune_structures, shrink
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
from effnb.inference.pruning.structures import (
    Anatomy,
    Slice,
    Structure,
    anatomy,
    random_scores,
    structures_of,
    zero,
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
from effnb.inference.pruning.width import activation_importance, width

__all__ = [
    "Anatomy",
    "CubicSchedule",
    "Kept",
    "LoraPruned",
    "MaskSummary",
    "MaskedLinear",
    "MovementLinear",
    "MovementRun",
    "ObsResult",
    "Pattern",
    "Pruned",
    "PruningRun",
    "Recovered",
    "Slice",
    "SparseGptResult",
    "SparseTensor",
    "Storage",
    "Structure",
    "Ticket",
    "activation_importance",
    "allocate_by_sensitivity",
    "allocate_global",
    "allocate_uniform",
    "anatomy",
    "angular_distances",
    "apply_masks",
    "block_influence",
    "choose",
    "choose_masks",
    "coupled",
    "cumulative_share",
    "drop_layers",
    "drop_run",
    "encode",
    "encode_model",
    "fine_tune",
    "fisher_diagonal",
    "follows",
    "gradual",
    "head_ablation",
    "head_importance",
    "keep_all",
    "keep_mask",
    "layer_ablation",
    "least_squares_weight",
    "llm_pruner",
    "llm_pruner_scores",
    "load_masks",
    "lora_gradient",
    "lora_importance",
    "lora_prune",
    "lora_score",
    "lottery",
    "lowest_heads",
    "magnitude",
    "magnitude_mask",
    "magnitude_scores",
    "mask_heads",
    "mask_storage",
    "mask_structures",
    "masks_of",
    "mean_gradients",
    "movement",
    "obd",
    "obd_saliency",
    "obs",
    "obs_saliency",
    "obs_step",
    "obs_weight",
    "prune_heads",
    "prune_remaining",
    "prune_structures",
    "random_masks",
    "random_scores",
    "recover",
    "save_masks",
    "sensitivity",
    "shortgpt",
    "shrink",
    "snip",
    "snip_scores",
    "soft_mask",
    "soft_movement",
    "sparsegpt",
    "sparsegpt_weight",
    "storage_of",
    "structures_of",
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
    "width",
    "zero",
]
