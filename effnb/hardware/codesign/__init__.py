"""Hardware and software made for each other: rooflines, pruning accelerators, expert parallelism.

`roofline` counts operations and bytes, and measures a machine's ceilings. `kernel_results` reads
what the kernels' benchmark stored. `attention_pruning` has what SpAtten and Energon do to queries,
keys and values, and `pruned_models` does it inside a model.
`accelerator` simulates what a chip would gain from it. `gshard` is a layer of experts that a
compiler can split, and `expert_parallel` spreads it over real processes.
"""

from effnb.hardware.codesign.pruned_attention import PruningRecord
from effnb.hardware.codesign.pruned_models import (
    energon,
    kept_tokens,
    mean_of_kept,
    pruning_record,
    spatten,
)

__all__ = ["PruningRecord", "energon", "kept_tokens", "mean_of_kept", "pruning_record", "spatten"]
