"""Context extension: rotary positions stretched beyond the length a model was trained on.

`rope` has the frequencies, layouts and angles. Fixed tables: `position_interpolation`, `ntk_aware`,
`ntk_by_parts`, `yarn`. A table that follows the text: `dynamic_ntk`. Each is a function of a
model's own frequencies, and a function on a model; `extend` chooses one by name. `rotary_table`
reads a model's frequencies and puts others in their place; `extrapolation` only lifts the limit of
its length. `fine_tune` trains on longer texts.

How well an extended model reads is measured by `effnb.evaluation.long_context`.
"""

from effnb.design.context.dynamic_ntk import (
    dynamic_ntk,
    dynamic_ntk_frequencies,
    dynamic_scale,
    transformers_scale,
)
from effnb.design.context.extend import METHODS, extend
from effnb.design.context.extrapolation import extrapolation
from effnb.design.context.fine_tune import ContextTuned, fine_tune
from effnb.design.context.ntk_aware import ntk_aware, ntk_aware_base, ntk_aware_frequencies
from effnb.design.context.ntk_by_parts import (
    code_ramp,
    code_range,
    ntk_by_parts,
    ntk_by_parts_frequencies,
    paper_ramp,
)
from effnb.design.context.position_interpolation import (
    interpolation_error_bound,
    position_interpolation,
    position_interpolation_frequencies,
)
from effnb.design.context.rope import (
    convert_layout,
    convert_projection,
    rope_angles,
    rope_frequencies,
    rotations,
    wavelengths,
)
from effnb.design.context.rotary_table import RotaryTable, rotary_table
from effnb.design.context.yarn import attention_factor, temperature, yarn

__all__ = [
    "METHODS",
    "ContextTuned",
    "RotaryTable",
    "attention_factor",
    "code_ramp",
    "code_range",
    "convert_layout",
    "convert_projection",
    "dynamic_ntk",
    "dynamic_ntk_frequencies",
    "dynamic_scale",
    "extend",
    "extrapolation",
    "fine_tune",
    "interpolation_error_bound",
    "ntk_aware",
    "ntk_aware_base",
    "ntk_aware_frequencies",
    "ntk_by_parts",
    "ntk_by_parts_frequencies",
    "paper_ramp",
    "position_interpolation",
    "position_interpolation_frequencies",
    "rope_angles",
    "rope_frequencies",
    "rotary_table",
    "rotations",
    "temperature",
    "transformers_scale",
    "wavelengths",
    "yarn",
]
