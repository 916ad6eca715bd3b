"""A decoder with experts in every block as transformers' Mixtral, to save, load and serve it.

Mixtral's experts are top-k with gates divided by their sum and without a limit of seats: a decoder
of another kind has no equal there and is refused.

Jiang et al., "Mixtral of Experts", 2024, arXiv 2401.04088.
"""

from __future__ import annotations

from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from effnb.core.modules import find_blocks
from effnb.design.experts.decoder import expert_layers


def to_mixtral(model: nn.Module) -> MixtralForCausalLM:
    """The same function as a model of transformers; the weights are copied.

    Args:
        model: A Llama decoder with experts of one width in every block.

    Raises:
        ValueError: Blocks without experts, or routing that Mixtral does not have.
    """
    layers = list(expert_layers(model).values())
    _, stack = find_blocks(model)
    if len(layers) != len(stack):
        raise ValueError(
            f"{len(layers)} of {len(stack)} blocks have experts; Mixtral has them in every block: "
            "pass blocks=range(...) when making the decoder."
        )
    first = layers[0]
    for layer in layers:
        kind = layer.settings
        many = kind.k > 1 and kind.method in ("top-k", "glam", "gshard")
        if not many or kind.evaluation_factor is not None:
            raise ValueError(
                f"the routing is {kind.method} with k = {kind.k} and the evaluation factor "
                f"{kind.evaluation_factor}; Mixtral has top-k from 2 on, and no limit of seats: "
                "evaluation_factor=None."
            )
        if (layer.count, layer.width, kind.k) != (first.count, first.width, first.settings.k):
            raise ValueError("the blocks differ in their experts; Mixtral has the same in all.")
    shared = {
        key: getattr(model.config, key)
        for key in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "hidden_act",
            "max_position_embeddings",
            "initializer_range",
            "rms_norm_eps",
            "tie_word_embeddings",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "rope_parameters",
        )
    }
    config = MixtralConfig(
        **shared, intermediate_size=first.width, num_local_experts=first.count,
        num_experts_per_tok=first.settings.k, sliding_window=None,
    )  # fmt: skip
    result = MixtralForCausalLM(config).to(first.router.weight)
    names = {".mlp.router.": ".mlp.gate."}
    state = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        state[name] = tensor
    result.load_state_dict(state)
    return result.train(model.training)
