"""Parameters used more than once, and depth that does not grow with the input.

`albert` lets the layers of any model share weights, and `factorized_embedding` gives it short token
vectors. The Universal Transformer (`universal_transformer`, `adaptive_computation_time`) applies
one block as often as needed. `perceiver` and `perceiver_io` read an input of any length into a few
latents. `costs` counts parameters and multiplications side by side; `storage` saves and loads
models whose weights stand in several places.
"""

from effnb.design.sharing.adaptive_computation_time import Halting, adaptive_computation_time
from effnb.design.sharing.albert import (
    PARTS,
    layer_groups,
    share_layers,
    shared_places,
    unshare_layers,
)
from effnb.design.sharing.costs import (
    albert_parameters,
    latent_layer_multiply_adds,
    perceiver_io_multiply_adds,
    perceiver_multiply_adds,
    reading_multiply_adds,
    transformer_multiply_adds,
)
from effnb.design.sharing.cross_attention import Attention
from effnb.design.sharing.factorized_embedding import (
    FactorizedEmbedding,
    FactorizedHead,
    factorize_embedding,
    factorized_parameters,
)
from effnb.design.sharing.perceiver import Perceiver, PerceiverConfig, PerceiverLayer
from effnb.design.sharing.perceiver_io import PerceiverIO, PerceiverIOConfig, PerceiverMLM
from effnb.design.sharing.sentence_order import SentenceOrder, sentence_order
from effnb.design.sharing.storage import load_shared, load_weights, save_shared, save_weights
from effnb.design.sharing.universal_transformer import (
    UniversalConfig,
    UniversalOutput,
    UniversalTransformer,
    coordinates,
    sinusoid,
)

__all__ = [
    "Attention",
    "FactorizedEmbedding",
    "FactorizedHead",
    "Halting",
    "PARTS",
    "Perceiver",
    "PerceiverConfig",
    "PerceiverIO",
    "PerceiverIOConfig",
    "PerceiverLayer",
    "PerceiverMLM",
    "SentenceOrder",
    "UniversalConfig",
    "UniversalOutput",
    "UniversalTransformer",
    "adaptive_computation_time",
    "albert_parameters",
    "coordinates",
    "factorize_embedding",
    "factorized_parameters",
    "latent_layer_multiply_adds",
    "layer_groups",
    "load_shared",
    "load_weights",
    "perceiver_io_multiply_adds",
    "perceiver_multiply_adds",
    "reading_multiply_adds",
    "save_shared",
    "save_weights",
    "sentence_order",
    "share_layers",
    "shared_places",
    "sinusoid",
    "transformer_multiply_adds",
    "unshare_layers",
]
