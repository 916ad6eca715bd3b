"""What the chapter on experts computes live: drops, a leak, a small training, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.chapters.design.experts import twins
from effnb.core.modules import clone
from effnb.core.training import TrainingSettings, train
from effnb.design import experts
from effnb.evaluation.quality import token_losses

TOKENS = (64, 128, 256, 512, 1024, 2048)
LIVE_STEPS, LIVE_SHAPE, LIVE_HIDDEN = 60, (64, 8), 16


def copy_of(model: nn.Module) -> nn.Module:
    """A model with weights of its own, all of them to be trained."""
    return clone(model).requires_grad_()


def tuned(
    model: nn.Module, batches: Sequence[Int[Tensor, "sequences time"]], rate: float, seed: int
) -> nn.Module:
    """A trained model, trained on in place at a rate that falls to 0, and returned."""
    settings = TrainingSettings(
        steps=len(batches), learning_rate=rate, warmup_steps=len(batches) // 10, schedule="linear",
        seed=seed,
    )  # fmt: skip
    train(model.train(), batches.__getitem__, settings, loss=experts.training_loss())
    return model.eval()


# --- drops ----------------------------------------------------------------------------------------


def measured_drops(
    tokens: int, count: int, factor: float, draws: int = 200, seed: int = 0
) -> tuple[float, float]:
    """What a router drops whose choices are random and fair: the mean, and the formula."""
    seats = experts.expert_capacity(tokens, count, factor)
    random = torch.randn(draws, tokens, count, generator=torch.Generator().manual_seed(seed))
    return experts.switch(random, capacity=seats).dropped, experts.expected_drops(
        tokens, count, seats
    )


# --- the leak of expert choice --------------------------------------------------------------------


@torch.inference_mode()
def prefix_losses(
    model: nn.Module, documents: Sequence[Int[Tensor, " time"]], every: int = 8
) -> dict[str, float]:
    """The loss at some places, from the whole text at once, and from what is before each place.

    Only the second is there when text is written. A causal model gives the same both times.
    """
    whole, before = [], []
    for ids in documents:
        losses = token_losses(model, ids[None])[0]
        for place in range(every, len(ids), every):
            whole.append(float(losses[place - 1]))
            logits = model(ids[None, :place], use_cache=False).logits[0, -1]
            before.append(float(nn.functional.cross_entropy(logits, ids[place])))
    return {
        "whole": round(sum(whole) / len(whole), 5),
        "before": round(sum(before) / len(before), 5),
    }


# --- a training small enough to watch -------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A small training.

    Attributes:
        loads: The part of the tokens that wants each expert, step by step.
        dropped: The part that found no seat, step by step.
        losses: The task's loss, step by step.
        seats: Seats of each expert.
    """

    loads: tuple[tuple[float, ...], ...]
    dropped: tuple[float, ...]
    losses: tuple[float, ...]
    seats: int | None

    @property
    def busiest(self) -> float:
        """Load of the busiest expert over its fair share, over the last ten steps."""
        last = torch.tensor(self.loads[-10:]).mean(0)
        return float(last.max() * len(last))


@lru_cache(maxsize=64)
@torch.inference_mode(False)
@torch.enable_grad()
def watched(count: int, k: int, factor: float, auxiliary: float, seed: int = 0) -> Watched:
    """A layer of experts learns a map that differs by region, and is watched.

    Tokens come from eight clusters of very unequal size; each cluster has a linear map of its own.
    A router that sends clusters apart fits them best; without a loss for balance the large clusters
    take a few experts and the rest learns nothing.

    Args:
        count: Experts.
        k: Choices of each token.
        factor: Capacity factor.
        auxiliary: Weight of the loss for balance.
        seed: Of the weights and the tokens.

    Raises:
        ValueError: More choices than experts, or a capacity below one token.
    """
    draw = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(8, LIVE_HIDDEN, generator=draw)
    maps = torch.randn(8, LIVE_HIDDEN, LIVE_HIDDEN, generator=draw) / LIVE_HIDDEN**0.5
    often = torch.tensor([0.5**i for i in range(8)])
    method = "switch" if k == 1 else "top-k"
    settings = experts.RoutingSettings(method, k, capacity_factor=factor, evaluation_factor=factor)
    torch.manual_seed(seed)
    layer = experts.ExpertLayer(LIVE_HIDDEN, 16, count, settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.0)
    loads, dropped, losses = [], [], []
    for _ in range(LIVE_STEPS):
        kind = often.multinomial(LIVE_SHAPE[0] * LIVE_SHAPE[1], replacement=True, generator=draw)
        x = centres[kind] + 0.5 * torch.randn(len(kind), LIVE_HIDDEN, generator=draw)
        y = torch.einsum("tij,tj->ti", maps[kind], x)
        found = (layer(x[None])[0] - y).square().mean()
        routing = layer.last
        (found + auxiliary * experts.balance_loss(routing)).backward()
        optimizer.step()
        optimizer.zero_grad()
        wanted = routing.wanted.float()
        loads.append(tuple((wanted / wanted.sum()).tolist()))
        dropped.append(routing.dropped)
        losses.append(found.item())
    return Watched(tuple(loads), tuple(dropped), tuple(losses), routing.capacity)


# --- speed ----------------------------------------------------------------------------------------


def weights_of_block(block: nn.Module) -> dict[str, Tensor]:
    """A Mixtral block's weights by the names of `ExpertLayer`."""
    return {k.replace("gate.weight", "router.weight"): v for k, v in block.state_dict().items()}


def in_turn(
    layers: Mapping[str, nn.Module], x: Float[Tensor, "batch time hidden"], rounds: int
) -> dict[str, list[float]]:
    """Processor's seconds of a pass forward and backward; the layers take turns."""
    found: dict[str, list[float]] = {name: [] for name in layers}

    def once(layer: Callable[..., Any]) -> None:
        layer(x).square().sum().backward()

    for layer in layers.values():
        once(layer)
    for _ in range(rounds):
        for name, layer in layers.items():
            began = time.process_time()
            once(layer)
            found[name].append(time.process_time() - began)
    return found


def biggest_gap(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    return (a - b).abs().max().item()


def dense_of(size: Mapping[str, int] = twins.SIZES) -> nn.Module:
    """The untrained dense twin, for counting."""
    return twins.build(size).eval()
