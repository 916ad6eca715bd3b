"""Twins that are trained alike: a dense decoder, and decoders with experts of equal active size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from effnb.core.training import TrainingSettings, train
from effnb.design import experts
from effnb.design.experts import ExpertLayer, Routing, RoutingSettings, entmax_routing
from effnb.evaluation.cost import flops
from effnb.evaluation.quality import token_losses
from effnb.lab.texts import calibration_sequences

STEPS, SHAPE, RATE = 360, (8, 128), 4e-3
"""Steps of a training, sequences and tokens of each, and the peak learning rate."""
SIZES = {"hidden": 64, "width": 128, "blocks": 2, "heads": 4, "kv_heads": 2}
"""Of the dense twin: the shape of mini-300k."""
EVALUATION = 2.0
"""The capacity factor that all twins are judged with."""


def build(sizes: Mapping[str, int] = SIZES, *, seed: int = 0) -> LlamaForCausalLM:
    """An untrained dense twin."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["width"],
            num_hidden_layers=sizes["blocks"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def settings_of(method: str, factor: float | None = 1.25) -> RoutingSettings:
    """How the twins of a method find experts; two choices have experts of half the width."""
    kind = {"Switch": "switch", "GLaM": "glam", "expert choice": "expert choice"}.get(method)
    if method == "entmax":
        return RoutingSettings("entmax", capacity_factor=None, evaluation_factor=None)
    if kind == "expert choice":
        return RoutingSettings(kind, 1, capacity_factor=1.0, group="sequence")
    k = 2 if kind == "glam" else 1
    return RoutingSettings(kind, k, capacity_factor=factor, evaluation_factor=EVALUATION)


def twin(
    method: str,
    count: int = 8,
    *,
    factor: float | None = 1.25,
    seed: int = 0,
    sizes: Mapping[str, int] = SIZES,
) -> LlamaForCausalLM:
    """An untrained twin with experts in every block, or the dense one.

    Args:
        method: "dense", "Switch", "GLaM", "expert choice" or "entmax".
        count: Experts of each block.
        factor: The capacity factor in training.
        seed: Of the weights; what is not experts is the same in all twins of a seed.
        sizes: Those of the dense twin.
    """
    dense = build(sizes, seed=seed)
    if method == "dense":
        return dense
    return experts.with_experts(
        dense, count, settings_of(method, factor), blocks=range(sizes["blocks"]), seed=seed
    )


def trained(
    model: nn.Module,
    batches: Sequence[Int[Tensor, "sequences time"]],
    *,
    auxiliary: float = experts.AUXILIARY,
    z: float = experts.Z,
    seed: int = 0,
    watch: Callable[[int, nn.Module], None] | None = None,
) -> nn.Module:
    """Train a twin on a batch for each step; the model changes in place and is returned.

    Args:
        model: Of `twin`.
        batches: What every step reads.
        auxiliary: Weight of the loss for balance.
        z: Weight of the z-loss.
        seed: Of what is random in the model.
        watch: Called with the step's number and the model after its loss was computed.
    """
    settings = TrainingSettings(
        steps=len(batches), learning_rate=RATE, warmup_steps=max(1, len(batches) // 10),
        schedule="wsd", weight_decay=0.05, betas=(0.9, 0.95), seed=seed,
    )  # fmt: skip
    plain = experts.training_loss(auxiliary, z)
    step = iter(range(len(batches)))

    def loss(model: nn.Module, batch: Any) -> Float[Tensor, ""]:
        found = plain(model, batch)
        if watch is not None:
            watch(next(step), model)
        return found

    train(model.train(), batches.__getitem__, settings, loss=loss)
    return model.eval()


def texts(tokenizer: Any, seed: int, steps: int = STEPS) -> list[Int[Tensor, "sequences time"]]:
    """What all twins of a seed read, step by step: drawn at once, which is ten times faster."""
    sequences, length = SHAPE
    drawn = calibration_sequences(tokenizer, 1000 * (seed + 1), (sequences * steps, length))
    return list(drawn.split(sequences))


# --- what is measured -----------------------------------------------------------------------------


def layers_of(model: nn.Module) -> list[Routing]:
    """The routing of the last call of each expert layer; none in a dense model."""
    return [layer.last for layer in experts.expert_layers(model).values()]


def sizes_of(model: nn.Module, tokens: int = 128) -> dict[str, float]:
    """Parameters, those that a token meets, and operations per token of reading a text."""
    counts = experts.count_parameters(model)
    ids = torch.arange(1, tokens + 1)[None] % 4096
    found = flops(lambda: model(ids, use_cache=False))
    return {
        "parameters": counts.total, "active": counts.active, "flops": round(found / tokens),
    }  # fmt: skip


@torch.inference_mode()
def judged(model: nn.Module, documents: Sequence[Int[Tensor, " time"]]) -> dict[str, Any]:
    """Each document read alone: its loss, and where its tokens went, as means over layers."""
    found: dict[str, list[float]] = {"documents": [], "busiest": [], "dropped": [], "experts": []}
    load: list[Tensor] = []
    for ids in documents:
        losses = token_losses(model, ids[None])
        found["documents"].append(round(float(losses[0, : len(ids) - 1].mean()), 5))
        routings = layers_of(model)
        if routings:
            found["busiest"].append(round(fmean(r.imbalance for r in routings), 4))
            found["dropped"].append(round(fmean(r.dropped for r in routings), 4))
            many = fmean(float(r.experts_of_token.float().mean()) for r in routings)
            found["experts"].append(round(many, 4))
            load.append(torch.stack([r.wanted.float() / r.wanted.sum() for r in routings]))
    if not load:
        return {"documents": found["documents"]}
    share = torch.stack(load).mean(0)
    return found | {"load": [[round(x, 4) for x in row] for row in share.tolist()]}


class Shuffled:
    """Entmax routing in which tokens get as many experts as other tokens of the text did.

    A token with fewer than it asked for keeps its best ones, their weights divided by their sum.
    One with more gets experts whose entmax weight is 0: they cost the same and add nothing.
    """

    method, group, jitter = "entmax", "batch", 0.0

    def __init__(self, settings: RoutingSettings, seed: int) -> None:
        """Settings of the trained layer; the seed fixes who gets whose number."""
        self.alpha, self.seed = settings.alpha, seed
        self.paid = 0

    def route(
        self,
        logits: Float[Tensor, "groups time experts"],
        text: Bool[Tensor, "groups time"] | None = None,
        *,
        training: bool = False,
    ) -> Routing:
        """As `RoutingSettings.route`."""
        own = entmax_routing(logits, alpha=self.alpha, text=text)
        many = own.experts_of_token.flatten()
        order = torch.randperm(len(many), generator=torch.Generator().manual_seed(self.seed))
        given = many[order]
        self.paid += int(given.sum())
        weights = own.probabilities.flatten(0, 1)
        best = weights.sort(-1, descending=True)
        place = torch.arange(weights.shape[-1])[None] < given[:, None]
        kept = torch.zeros_like(weights).scatter(1, best.indices, best.values * place)
        kept = kept / kept.sum(-1, keepdim=True)
        tokens, chosen = kept.nonzero().unbind(1)
        there = torch.ones_like(tokens, dtype=torch.bool)
        return replace(
            own, tokens=tokens, experts=chosen, gates=kept[tokens, chosen], asked=there, kept=there
        )


@torch.inference_mode()
def by_input(
    model: nn.Module, documents: Sequence[Int[Tensor, " time"]], seed: int = 0
) -> dict[str, dict[str, Any]]:
    """What it is worth that entmax gives each token a number of experts of its own.

    Args:
        model: A trained twin with entmax routing.
        documents: Judged one by one.
        seed: Of the exchange of numbers.

    Returns:
        Losses by document as routed and with the numbers exchanged, and how many more experts the
        harder half of a document's tokens got, as a share of all experts.
    """
    layers = list(experts.expert_layers(model).values())
    kept = [layer.settings for layer in layers]
    own, other, more, many = [], [], [], []
    for ids in documents:
        losses = token_losses(model, ids[None])[0, : len(ids) - 1]
        used = torch.stack([r.experts_of_token[0].float() for r in layers_of(model)]).mean(0)[:-1]
        hard = losses > median(losses.tolist())
        more.append(round(float(used[hard].mean() - used[~hard].mean()) / layers[0].count, 5))
        own.append(round(float(losses.mean()), 5))
        many.append(round(float(used.mean()), 4))
        try:
            for i, (layer, settings) in enumerate(zip(layers, kept, strict=True)):
                layer.settings = Shuffled(settings, 1000 * seed + i)
            losses = token_losses(model, ids[None])[0, : len(ids) - 1]
        finally:
            for layer, settings in zip(layers, kept, strict=True):
                layer.settings = settings
        other.append(round(float(losses.mean()), 5))
    return {
        "entmax": {"documents": own, "experts": many},
        "entmax, shuffled": {"documents": other},
        "entmax, hard − easy": {"documents": more},
    }


def fresh_layer(
    count: int, factor: float | None, *, tokens: int = 512, hidden: int = 64, seed: int = 0
) -> Routing:
    """The routing of random tokens by an untrained Switch router: as fair as chance."""
    torch.manual_seed(seed)
    layer = ExpertLayer(hidden, 2, count, RoutingSettings("switch", capacity_factor=factor))
    layer.train()(torch.randn(1, tokens, hidden))
    return layer.last
