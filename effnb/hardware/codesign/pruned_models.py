r"""SpAtten's and Energon's attention inside a real model: what is lost, and how much is left out.

    pruned = spatten(model, token_keep=0.5, head_keep=0.75, value_keep=0.5)
    pruned(input_ids=ids)
    pruning_record(pruned).pair_share          # of all pairs of query and key, those computed

The new model shares all weights with the given one; only what happens between the projections is
another. Nothing becomes faster here: what is pruned is computed and masked, so that its effect on
quality is exact, and counted, so that `accelerator` can say what a chip would save.

Models are those of Hugging Face whose attention goes through transformers' `AttentionInterface`
(Llama and its relatives, BERT and its relatives).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.modules import Model, share
from effnb.hardware.codesign.attention_pruning import (
    check_progressive,
    check_rounds,
)
from effnb.hardware.codesign.pruned_attention import Energon, Pruner, PruningRecord, SpAtten

NAME = "effnb_pruned"


def _visible(mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Bool[Tensor, "b 1 q k"]:
    """The additive mask of transformers as truth values."""
    shape = (q.shape[0], 1, q.shape[2], k.shape[2])
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen[..., : k.shape[2]].expand(shape)
    seen = torch.ones(shape[-2:], dtype=torch.bool, device=q.device)
    return (seen.tril(shape[-1] - shape[-2]) if causal else seen).expand(shape)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What transformers calls in place of its attention."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    layer, pruner = module.pruning
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = _visible(attention_mask, module.is_causal, query, key)
    out, weights = pruner.attend(layer, query, key, value, visible, factor)
    return out.transpose(1, 2).contiguous(), weights


def _attentions(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a Hugging Face model, in the order in which they run."""
    found = [
        m for m in model.modules() if all(hasattr(m, a) for a in ("is_causal", "scaling", "config"))
    ]
    if not found:
        raise ValueError(
            "the model has no attention that can be replaced; give a Hugging Face model such as a "
            "Llama or a BERT."
        )
    if any(hasattr(m, "pruning") for m in found):
        raise ValueError("this model's attention is pruned already; start from the original.")
    return found


def _with(model: Model, pruner: Pruner) -> Model:
    """A model that shares all weights and attends through the pruner."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    result = share(model)
    for number, module in enumerate(_attentions(result)):
        module.pruning = (number, pruner)
        module.config._attn_implementation = NAME
    result.config._attn_implementation = NAME
    return result


def _check_choice(choose: str, top_k: int) -> None:
    if choose not in ("importance", "random"):
        raise ValueError(f"choose is {choose!r}; allowed are 'importance' and 'random'.")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least the best key has to count.")


def spatten(
    model: Model,
    *,
    token_keep: float = 1.0,
    head_keep: float = 1.0,
    value_keep: float = 1.0,
    first_layer: int = 1,
    msb_bits: int | None = None,
    lsb_bits: int = 4,
    threshold: float = 0.1,
    average: bool = False,
    choose: str = "importance",
    seed: int = 0,
    top_k: int = 8,
) -> Model:
    r"""A model whose attention prunes as SpAtten does.

    After each layer, tokens and heads are ranked by what they amounted to in all layers so far, and
    those that fall behind are gone for all later layers. Shares fall linearly over the layers down
    to `token_keep` and `head_keep` (`attention_pruning.schedule`).

    In an encoder, a pruned token neither asks nor answers any more; the first token always stays.
    The rows of pruned tokens are still in the model's output: read only those of `kept_tokens`. In
    a causal model, each token asks once, so a key is judged at each step by the queries so far, and
    a key that a layer dropped is gone from that layer for all later steps; the newest token stays.
    Heads are chosen at each step by their outputs so far. A cache of keys and values works, one
    text (or batch) at a time.

    Args:
        model: A Hugging Face model; it is not changed.
        token_keep: Share of the tokens that the last layer works on.
        head_keep: Share of the heads that the last layer works on.
        value_keep: Share of the keys whose values are read, for each query in each layer.
        first_layer: Layers before this one work on everything.
        msb_bits: High bits of queries and keys for progressive quantization; None is without.
        lsb_bits: Low bits, fetched where the attention is flat.
        threshold: It is flat where no probability reaches this.
        average: Divide the attention that a key of a causal model received by the number of queries
            that could have given some; the paper's sum favours early tokens.
        choose: "importance", or "random" for a comparison.
        seed: Of the random choice.
        top_k: The number of true top keys in the recall that is recorded.

    Raises:
        ValueError: A parameter outside of its range, or a model without replaceable attention.
    """
    _check_choice(choose, top_k)
    layers = _attentions(model)
    if not 0 < value_keep <= 1:
        raise ValueError(f"value_keep is {value_keep}; it has to be above 0 and at most 1.")
    bits = None
    if msb_bits is not None:
        check_progressive(msb_bits, lsb_bits, threshold)
        bits = (msb_bits, lsb_bits, threshold)
    settings = dict(
        token_keep=token_keep,
        head_keep=head_keep,
        value_keep=value_keep,
        first_layer=first_layer,
        bits=bits,
        average=average,
    )
    common = dict(layers=len(layers), top_k=top_k, choose=choose, seed=seed)
    return _with(model, SpAtten(settings, bool(layers[0].is_causal), **common))


def energon(
    model: Model,
    *,
    rounds: Sequence[int] = (2, 4),
    alpha: float = 0.0,
    choose: str = "importance",
    seed: int = 0,
    top_k: int = 8,
) -> Model:
    """A model whose attention filters keys as Energon does (`attention_pruning.filter_keys`).

    The survivors of all rounds, and each token's own key, are attended to in full precision.

    Args:
        model: A Hugging Face model; it is not changed.
        rounds: Bits of the operands in each round.
        alpha: From -1 (keep everything) over 0 (above the mean) to 1 (the best only).
        choose: "importance", or "random": as many keys for each query as the filter would keep.
        seed: Of the random choice.
        top_k: The number of true top keys in the recall that is recorded.

    Raises:
        ValueError: A parameter outside of its range, or a model without replaceable attention.
    """
    _check_choice(choose, top_k)
    check_rounds(rounds, alpha)
    layers = len(_attentions(model))
    common = dict(layers=layers, top_k=top_k, choose=choose, seed=seed)
    return _with(model, Energon(tuple(rounds), alpha, **common))


def _pruner(model: nn.Module) -> Pruner:
    for module in model.modules():
        if hasattr(module, "pruning"):
            return module.pruning[1]
    raise ValueError("this model's attention is not pruned; make one with spatten or energon.")


def pruning_record(model: nn.Module, *, clear: bool = True) -> PruningRecord:
    """What the model's attention has done since the last time, and by default clear it.

    Raises:
        ValueError: When the model comes from neither `spatten` nor `energon`.
    """
    pruner = _pruner(model)
    found = pruner.record
    if clear:
        pruner.record = PruningRecord(round_pairs=[0] * len(found.round_pairs))
    return PruningRecord(**{f.name: getattr(found, f.name) for f in fields(found)})


def kept_tokens(model: nn.Module) -> list[Bool[Tensor, "batch keys"]]:
    """For each layer, the tokens that it worked on in the last call, seen from the last query.

    Raises:
        ValueError: When the model does not come from `spatten`, or has not run yet.
    """
    kept = _pruner(model).kept
    if not kept:
        raise ValueError("no tokens are pruned: run a model that spatten made, then ask.")
    return list(kept)


def mean_of_kept(
    model: nn.Module, hidden: Float[Tensor, "batch tokens dim"]
) -> Float[Tensor, "batch dim"]:
    """The mean vector over the tokens that the last layer of an encoder still worked on.

    Args:
        model: A model from `spatten` that has just computed `hidden`.
        hidden: Its last hidden states.

    Raises:
        ValueError: When the model has not run, or on another batch.
    """
    kept = kept_tokens(model)[-1]
    if kept.shape != hidden.shape[:2]:
        raise ValueError(
            f"the model last read a batch of {tuple(kept.shape)} tokens, and these vectors are of "
            f"{tuple(hidden.shape[:2])}."
        )
    return (hidden * kept[..., None]).sum(1) / kept.sum(-1, keepdim=True)
