"""Sparse layers of experts: more parameters for the same operations per token.

`switch` sends a token to one expert, `top_k`, `glam` and `gshard` to several; with `expert_choice`
experts take tokens, and `entmax_routing` lets the scores say how many a token needs. `balance_loss`
and `z_loss` keep a router healthy, `expected_drops` says what even a fair one drops.
`ExpertLayer` takes the place of a feed-forward layer, `with_experts` and `upcycle` make decoders of
it, and `to_mixtral` hands one to transformers. Compression needs nothing of its own: methods see an
expert's matrices as linear layers.
"""

from effnb.design.experts.balance import (
    approximate_drops,
    balance_loss,
    expected_drops,
    z_loss,
)
from effnb.design.experts.decoder import (
    AUXILIARY,
    Counts,
    Z,
    count_parameters,
    expert_layers,
    routing_losses,
    routings,
    training_loss,
    upcycle,
    with_experts,
)
from effnb.design.experts.entmax_routing import entmax_routing
from effnb.design.experts.expert_choice import expert_choice, leak_rate
from effnb.design.experts.layer import (
    METHODS,
    MIXTRAL,
    SWITCH,
    ExpertLayer,
    FusedExperts,
    RoutingSettings,
)
from effnb.design.experts.mixtral import to_mixtral
from effnb.design.experts.routing import Routing, expert_capacity, find_seats, top_k
from effnb.design.experts.switch import EVALUATION_FACTOR, TRAINING_FACTOR, jitter, switch
from effnb.design.experts.top2 import glam, gshard

__all__ = [
    "AUXILIARY",
    "EVALUATION_FACTOR",
    "METHODS",
    "MIXTRAL",
    "SWITCH",
    "TRAINING_FACTOR",
    "Counts",
    "ExpertLayer",
    "FusedExperts",
    "Routing",
    "RoutingSettings",
    "Z",
    "approximate_drops",
    "balance_loss",
    "count_parameters",
    "entmax_routing",
    "expected_drops",
    "expert_capacity",
    "expert_choice",
    "expert_layers",
    "find_seats",
    "glam",
    "gshard",
    "jitter",
    "leak_rate",
    "routing_losses",
    "routings",
    "switch",
    "to_mixtral",
    "top_k",
    "training_loss",
    "upcycle",
    "with_experts",
    "z_loss",
]
