r"""A decoder with experts: fresh ones, or a dense model up-cycled.

`with_experts` puts expert layers in the place of feed-forward layers, of every second block for
Switch and GLaM. With experts of width $w / k$, for a feed-forward layer of width $w$ and $k$
experts per token, a token meets as many weights as in the dense model, but for the router: same
operations, $E / k$ times the feed-forward parameters.

`upcycle` starts all experts as copies of the trained layer. Where the gates of a token sum to 1 the
new model computes exactly what the dense one did, and only training makes the experts differ; with
Switch's single gate, below 1, the output shrinks at first.

The models are Llama-like: blocks with an `mlp` of `gate_proj`, `up_proj` and `down_proj`.

Komatsuzaki et al., "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints", 2022,
arXiv 2212.05055.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.modules import Model, clone, find_blocks
from effnb.core.training import causal_lm_loss
from effnb.design.experts.balance import balance_loss, z_loss
from effnb.design.experts.layer import MIXTRAL, SWITCH, ExpertLayer, RoutingSettings
from effnb.design.experts.routing import Routing

AUXILIARY, Z = 0.01, 0.001
"""Weights of the two losses: Switch's alpha, and ST-MoE's for the z-loss."""


def with_experts(
    model: Model,
    experts: int,
    settings: RoutingSettings = SWITCH,
    *,
    width: int | None = None,
    blocks: Iterable[int] | None = None,
    seed: int = 0,
) -> Model:
    """A decoder whose feed-forward layers in some blocks are fresh experts.

    Args:
        model: A Llama-like decoder; it is not changed.
        experts: Experts of each layer.
        settings: How tokens find them.
        width: Inner width of an expert; by default that of the dense layer over k, so that a token
            meets as many weights as before.
        blocks: Which blocks get experts; by default every second one, counted from the second.
        seed: Of the fresh weights, which have the model's initial standard deviation.

    Raises:
        ValueError: A model of another kind, blocks that are not there, more choices than experts,
            or a width that k does not divide.
    """
    result = clone(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block, mlp in _feed_forward(result, blocks):
            dense = mlp.gate_proj.out_features
            if width is None and dense % settings.k:
                raise ValueError(
                    f"the feed-forward width {dense} cannot be shared by k = {settings.k} experts; "
                    "give a width."
                )
            layer = ExpertLayer(
                mlp.gate_proj.in_features, width or dense // settings.k, experts, settings,
                mlp.act_fn,
            )  # fmt: skip
            std = getattr(getattr(result, "config", None), "initializer_range", 0.02)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=std)
            block.mlp = layer.to(mlp.gate_proj.weight).train(mlp.training)
    return _watching(result)


def upcycle(
    model: Model,
    experts: int,
    settings: RoutingSettings = MIXTRAL,
    *,
    blocks: Iterable[int] | None = None,
    seed: int = 0,
) -> Model:
    """A decoder whose experts all start as the dense layer that they replace.

    Args:
        model: A trained Llama-like decoder; it is not changed.
        experts: Experts of each layer.
        settings: How tokens find them.
        blocks: Which blocks get experts; by default every second one, counted from the second.
        seed: Of the router's weights: normal with a standard deviation of 0.02.

    Raises:
        ValueError: A model of another kind, blocks that are not there, or more choices than
            experts.
    """
    result = clone(model)
    draw = torch.Generator().manual_seed(seed)
    for block, mlp in _feed_forward(result, blocks):
        hidden, width = mlp.gate_proj.in_features, mlp.gate_proj.out_features
        layer = ExpertLayer(hidden, width, experts, settings, mlp.act_fn)
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).detach()
        with torch.no_grad():
            layer.experts.gate_up_proj.copy_(both.expand(experts, -1, -1))
            layer.experts.down_proj.copy_(mlp.down_proj.weight.detach().expand(experts, -1, -1))
            layer.router.weight.copy_(0.02 * torch.randn(experts, hidden, generator=draw))
        block.mlp = layer.to(mlp.gate_proj.weight).train(mlp.training)
    return _watching(result)


def _feed_forward(
    model: nn.Module, blocks: Iterable[int] | None
) -> list[tuple[nn.Module, nn.Module]]:
    """The chosen blocks with their dense layers."""
    check_loaded(model)
    _, stack = find_blocks(model)
    chosen = range(1, len(stack), 2) if blocks is None else sorted(set(blocks))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(stack):
        raise ValueError(
            f"the blocks are {list(chosen)}; the model has {len(stack)}, counted from 0, and at "
            "least one must get experts."
        )
    found = []
    for index in chosen:
        mlp = getattr(stack[index], "mlp", None)
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(type(p) is nn.Linear and p.bias is None for p in parts):
            raise ValueError(
                f"block {index} has no plain feed-forward layer of gate_proj, up_proj and "
                "down_proj without biases; only such layers can become experts."
            )
        found.append((stack[index], mlp))
    return found


# --- padding --------------------------------------------------------------------------------------


def _watching(model: Model) -> Model:
    """Let the expert layers of a model know which tokens are text, call by call."""
    for module in model.modules():
        hooks = module._forward_pre_hooks
        if any(hook is _tell_mask for hook in hooks.values()):
            return model
    model.register_forward_pre_hook(_tell_mask, with_kwargs=True)
    return model


def _tell_mask(model: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
    """A pre-hook: the mask that a model is called with, cut to the tokens that it reads now."""
    mask = keywords.get("attention_mask", arguments[1] if len(arguments) > 1 else None)
    ids = keywords.get("input_ids", arguments[0] if arguments else keywords.get("inputs_embeds"))
    text = None
    if isinstance(mask, Tensor) and mask.ndim == 2 and isinstance(ids, Tensor):
        text = mask[:, -ids.shape[1] :].bool()
        text = None if bool(text.all()) else text
    for layer in expert_layers(model).values():
        layer.text = text


# --- what it is made of, and how it is trained ----------------------------------------------------


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """The expert layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer)}


def routings(model: nn.Module) -> dict[str, Routing]:
    """The routing of the last call, layer by layer.

    Raises:
        ValueError: When the model has no expert layer, or was not called yet.
    """
    found = {name: layer.last for name, layer in expert_layers(model).items()}
    if not found or None in found.values():
        raise ValueError("no routing is known: call a model that has expert layers first.")
    return found


@dataclass(frozen=True)
class Counts:
    """Numbers that a model is made of.

    Attributes:
        total: All of them; tied ones once.
        active: Those that a token meets.
        experts: Those in experts.
    """

    total: int
    active: int
    experts: int


def count_parameters(model: nn.Module) -> Counts:
    """How many numbers there are, and how many a token meets: k of E experts."""
    total = sum(p.numel() for p in model.parameters())
    in_experts = idle = 0.0
    for layer in expert_layers(model).values():
        size = sum(p.numel() for p in layer.experts.parameters())
        in_experts += size
        idle += size * (1 - layer.share_active)
    return Counts(total, round(total - idle), round(in_experts))


def routing_losses(model: nn.Module) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The balance loss and the z-loss of the last call, each the mean over layers.

    Raises:
        ValueError: When no routing is known.
    """
    found = list(routings(model).values())
    return (
        torch.stack([balance_loss(routing) for routing in found]).mean(),
        torch.stack([z_loss(routing) for routing in found]).mean(),
    )


def training_loss(
    auxiliary: float = AUXILIARY, z: float = Z
) -> Callable[[nn.Module, Any], Float[Tensor, ""]]:
    r"""The loss for `effnb.core.training.train`: $L + \alpha L_\text{balance} + c_z L_z$.

    Both added losses are means over the expert layers, not sums.

    Raises:
        ValueError: When a weight is negative.
    """
    if auxiliary < 0 or z < 0:
        raise ValueError(f"the weights are {auxiliary} and {z}; neither can be negative.")

    def loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        found = causal_lm_loss(model, batch)
        if not expert_layers(model):
            return found
        balance, squares = routing_losses(model)
        return found + auxiliary * balance + z * squares

    return loss
