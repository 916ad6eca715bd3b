r"""Where a model keeps its rotary frequencies, and how others are put in their place.

Decoders of the Llama family have one module with a buffer `inv_freq`, from which a forward pass
computes the cosines and sines of its positions once for all layers. A method that rescales RoPE
replaces this buffer, and the factor on cosines and sines, in a copy of the module; weights and all
other code stay as they are.

The configuration of the new model says the same, so that it can be saved and loaded. transformers
has a `rope_type` for some methods. Any other fixed table $h$ is written as the type "longrope",
which divides each frequency by a number of a list, with $\theta_i / h_i$ as both of its lists: the
table then no longer depends on the length, and every library that reads LongRoPE's files reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.modules import Model, share
from effnb.design.context.rope import rope_frequencies

OWN_BUFFERS = {"inv_freq", "original_inv_freq"}


@dataclass(frozen=True)
class RotaryTable:
    r"""What a model's rotary positions are made of.

    Attributes:
        inv_freq: $\theta$ in float32, computed from the base: a model that was cast to half
            precision has rounded its own copy.
        base: $b$.
        trained_length: $L$ in tokens, the context that the model was trained on.
        head_dim: All numbers of a head, rotated or not.
        names: Dotted names of the modules that hold the table.
    """

    inv_freq: Float[Tensor, " half"]
    base: float
    trained_length: int
    head_dim: int
    names: tuple[str, ...]

    @property
    def dim(self) -> int:
        """$d$, the rotated numbers of a head."""
        return 2 * len(self.inv_freq)


class KeepsFloat32:
    """A hook that undoes the rounding of a table when its model is cast to half precision.

    It also marks the model as extended: methods start from the original.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        self.inv_freq = inv_freq.detach().float().cpu()

    def __call__(self, module: nn.Module, arguments: tuple) -> None:
        """Before the rotary module runs: put the exact table back where it was rounded."""
        if module.inv_freq.dtype not in (torch.float32, torch.float64):
            for name in OWN_BUFFERS & module._buffers.keys():
                module._buffers[name] = self.inv_freq.to(module.inv_freq.device)


def check_factor(factor: float) -> float:
    """Refuse scales that do not lengthen a context.

    Raises:
        ValueError: A factor that is not a finite number from 1.
    """
    if isinstance(factor, bool) or not (math.isfinite(factor) and factor >= 1):
        raise ValueError(
            f"factor is {factor}; it must be a finite number from 1: the new context length "
            "divided by the trained one."
        )
    return float(factor)


def rotary_table(model: nn.Module, trained_length: int | None = None) -> RotaryTable:
    """Read the rotary frequencies of a model.

    Args:
        model: A Hugging Face model of the Llama family.
        trained_length: Tokens of the context it was trained on; by default what its configuration
            says (`max_position_embeddings`).

    Raises:
        ValueError: A model without rotary frequencies, with several tables or positions of several
            axes, whose table is scaled already, or heads of an odd size; a trained length that is
            below 1 or beyond the model's; weights on the meta device.
    """
    check_loaded(model)
    kind = type(model).__name__
    found = _modules(model)
    if not found:
        raise ValueError(
            f"{kind} has no table of rotary frequencies (a module with `inv_freq`); only models "
            "with rotary positions like those of Llama, Mistral and Qwen can be extended."
        )
    for name, module in found.items():
        _check_module(name, module)
    first = next(iter(found.values()))
    config = first.config
    tables = [module.inv_freq for module in found.values()]
    if any(m.config is not config for m in found.values()) or any(
        t.shape != tables[0].shape or not torch.equal(t, tables[0]) for t in tables
    ):
        raise ValueError(
            f"{kind} has several rotary tables ({', '.join(found)}); only models with one table "
            "for all layers can be extended."
        )
    parameters = config.rope_parameters
    length = getattr(config, "max_position_embeddings", None)
    if trained_length is None:
        trained_length = length
    if not isinstance(trained_length, int) or trained_length < 1:
        raise ValueError(
            f"trained_length is {trained_length}; it must be a whole number of tokens, from 1."
        )
    if isinstance(length, int) and trained_length > length:
        raise ValueError(
            f"trained_length is {trained_length}; this model's table is for {length} tokens, so it "
            "cannot have been trained on more."
        )
    base = float(parameters["rope_theta"])
    head_dim = _head_dim(config)
    rotated = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    if rotated % 2:
        raise ValueError(
            f"heads with {rotated} rotated numbers do not consist of pairs; it must be even."
        )
    inv_freq = rope_frequencies(2 * len(tables[0]), base, device=tables[0].device)
    # A cast to half precision has rounded the model's own copy: bfloat16 by at most 1 part in 256,
    # float16 by half of its smallest number.
    if not torch.allclose(tables[0].float(), inv_freq, rtol=2**-7, atol=2**-24):
        raise ValueError(
            f"the rotary frequencies of {kind} are not those of its base {base:g}; only a plain "
            "RoPE table can be extended."
        )
    return RotaryTable(inv_freq, base, trained_length, head_dim, tuple(found))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that hold rotary frequencies and know their configuration."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(key.endswith("inv_freq") for key in module._buffers)
        and getattr(getattr(module, "config", None), "rope_parameters", None)
    }


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse a rotary module whose table is not one plain RoPE table."""
    parameters = module.config.rope_parameters
    kind = getattr(module, "rope_type", "default")
    nested = any(isinstance(value, Mapping) for value in parameters.values())
    if nested or not isinstance(kind, str) or set(module._buffers) - OWN_BUFFERS:
        raise ValueError(
            f"{name} has a rotary table for each type of layer; only models with one table for all "
            "layers can be extended."
        )
    if "mrope_section" in parameters or hasattr(module, "mrope_section"):
        raise ValueError(
            f"{name} turns heads by positions of several axes (mrope_section); only models of one "
            "axis, the text's, can be extended."
        )
    if any(isinstance(hook, KeepsFloat32) for hook in module._forward_pre_hooks.values()):
        raise ValueError("this model's context is extended already; start from the original.")
    said = parameters.get("rope_type", "default")
    if kind != "default" or said != "default":
        raise ValueError(
            f"the rotary positions of this model are of rope_type {said!r}, scaled already or of "
            "another kind; start from a model whose rope_type is 'default'."
        )


def _head_dim(config: Any) -> int:
    """All numbers of a query's head; multi-head latent attention has some beside the rotated."""
    rotated = getattr(config, "qk_rope_head_dim", None)
    if rotated:
        return rotated + (getattr(config, "qk_nope_head_dim", None) or 0)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def with_table(
    model: Model,
    table: RotaryTable,
    inv_freq: Float[Tensor, " half"],
    parameters: dict[str, Any],
    *,
    attention_factor: float = 1.0,
    length: int | None = None,
) -> Model:
    """A model with other rotary frequencies that shares every weight with the given one.

    Args:
        model: The model that `table` was read from; it is not changed.
        table: From `rotary_table`.
        inv_freq: The new frequencies, in radians per token.
        parameters: What the configuration's `rope_parameters` say of them; the base and a partial
            rotation are kept.
        attention_factor: Factor on cosines and sines, and so on queries and keys alike.
        length: What `max_position_embeddings` becomes, in tokens; as it was when None.

    Raises:
        ValueError: A model whose configuration can say neither `parameters` nor a fixed table.
    """
    result = share(model)
    new = inv_freq.detach().float()
    for name in table.names:
        module = result.get_submodule(name)
        for key in OWN_BUFFERS & module._buffers.keys():
            module._buffers[key] = new.clone()
        module.attention_scaling = attention_factor
        module.register_forward_pre_hook(KeepsFloat32(new))
    config = module.config  # one for all, and the copy's own: `share` copies all but tensors
    if length is not None:
        config.max_position_embeddings = length
    if hasattr(config, "original_max_position_embeddings"):  # Phi-3 keeps it there
        config.original_max_position_embeddings = table.trained_length
    if getattr(config, "head_dim", table.head_dim) is None:
        config.head_dim = table.head_dim  # Mixtral leaves it open, with which a load would fail
    kept = {k: v for k, v in config.rope_parameters.items() if k == "partial_rotary_factor"}
    common = {"rope_theta": table.base} | kept
    config.rope_parameters = common | parameters
    try:
        config.validate_rope()
    except ValueError:  # Phi-3 knows no other type than LongRoPE
        if not new.all():
            raise ValueError(
                f"the configuration of {type(model).__name__} has no rope_type "
                f"{parameters['rope_type']!r}, so it could not be saved; choose a fixed table."
            ) from None
        factor = parameters.get("factor", 1.0)
        config.rope_parameters = common | as_longrope(table, new, factor, attention_factor)
    return result


def extended_length(table: RotaryTable, factor: float) -> int:
    """The tokens of the new context, $s L$."""
    return math.floor(table.trained_length * factor + 1e-6)


def as_longrope(
    table: RotaryTable, inv_freq: Float[Tensor, " half"], factor: float, attention_factor: float
) -> dict[str, Any]:
    r"""`rope_parameters` of any fixed table: LongRoPE with $\theta_i / h_i$ at every length."""
    divisors = (table.inv_freq.double() / inv_freq.double()).tolist()
    return {
        "rope_type": "longrope",
        "factor": factor,
        "original_max_position_embeddings": table.trained_length,
        "short_factor": divisors,
        "long_factor": list(divisors),
        "attention_factor": attention_factor,
    }
