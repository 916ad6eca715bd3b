r"""From a choice of structures to a smaller dense model: the one door all structured methods use.

What comes out is an ordinary Hugging Face model with smaller numbers in its configuration. It is
saved and loaded like any other, generates with its cache, can be quantized or trained on, and needs
no kernel and no code of ours.

*Equal counts.* A configuration has one number of heads and one of neurons for all layers. So every
layer keeps equally many, though not the same ones. Unequal counts would need a model class of one's
own, whose layers differ, or padding with zeros up to the largest layer, which saves nothing there;
`mask_structures` shows what such a choice would do to the quality.

*Norms.* RMSNorm divides by $\sqrt{\tfrac1d \sum_i x_i^2 + \epsilon}$. With $d' < d$ channels kept,
the same division comes out of gains times $\sqrt{d / d'}$ and $\epsilon' = \epsilon\, d / d'$.

*One rule of one class.* Llama's configuration refuses a hidden size that is no multiple of the
number of heads, although nothing in the model needs that once the head's size is given. Mistral's
class computes the same function with tensors of the same names and has no such rule: where Llama's
configuration refuses, the smaller model is a Mistral.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.modules import share
from effnb.evaluation.cost import parameter_count
from effnb.inference.pruning.choice import Kept, Removal, Scores, choose
from effnb.inference.pruning.structures import (
    PARTS,
    Anatomy,
    Structure,
    anatomy,
    check_weights,
    structures_of,
    zero,
)


@dataclass(frozen=True)
class Pruned:
    """A pruned model and how it came about.

    Attributes:
        model: The model.
        kept: What it kept of the original.
        scores: What the structures were judged by.
        parameters_before: Numbers in the original, shared ones once.
        parameters_after: Numbers that are left.
    """

    model: nn.Module = field(repr=False)
    kept: Kept = field(repr=False)
    scores: dict[str, Tensor] = field(repr=False)
    parameters_before: int
    parameters_after: int

    @property
    def removed(self) -> float:
        """The part of all parameters that is gone."""
        return 1 - self.parameters_after / self.parameters_before


def prune_structures(
    model: nn.Module, scores: Scores, remove: Removal, *, unit: str = "groups"
) -> Pruned:
    """Remove the structures with the lowest scores: a smaller dense model.

    Args:
        model: A Llama-like model; it is not changed.
        scores: By kind, from any method or from `random_scores`.
        remove: By kind, for example `{"heads": 0.25, "neurons": 0.25}`.
        unit: As in `choose`.

    Raises:
        ValueError: As `choose` and `shrink`.
        TypeError: When an amount is no number.
    """
    kept = choose(model, scores, remove, unit=unit)
    return cut(model, kept, {kind: scores[kind] for kind in remove})


def cut(model: nn.Module, kept: Kept, scores: Scores, *, rescale_norms: bool = True) -> Pruned:
    """`shrink`, with an account of it."""
    small = shrink(model, kept, rescale_norms=rescale_norms)
    return Pruned(small, kept, dict(scores), parameter_count(model), parameter_count(small))


def mask_structures(
    model: nn.Module,
    scores: Scores,
    remove: Removal,
    *,
    unit: str = "groups",
    scope: str = "layer",
    protect: Sequence[int] = (),
) -> Pruned:
    """Set the structures with the lowest scores to 0: a model of the same size to look at.

    Layers may lose unequally many here. LLM-Pruner, for one, leaves the first and the last layers
    alone; in a plain Hugging Face class such a model does not fit.

    Args:
        model: A Llama-like model; it is not changed.
        scores: By kind.
        remove: By kind.
        unit: As in `choose`.
        scope: As in `choose`.
        protect: As in `choose`.

    Returns:
        With `parameters_after` what would be left if a class could hold it.

    Raises:
        ValueError: As `choose` and `zero`.
        TypeError: When an amount is no number.
    """
    kept = choose(model, scores, remove, unit=unit, scope=scope, protect=protect)
    masked = zero(model, removed_structures(model, kept))
    before = parameter_count(model)
    return Pruned(
        masked, kept, {kind: scores[kind] for kind in remove}, before, _left(model, kept)
    )  # fmt: skip


def _left(model: nn.Module, kept: Kept) -> int:
    """Numbers left if every removed row and column is counted out."""
    rows = _plan(anatomy(model), kept)
    total = 0
    for name, parameter in model.named_parameters():
        if name in rows:
            sizes = list(parameter.shape)
            for dim, indices in rows[name].items():
                sizes[dim] = len(indices)
            total += math.prod(sizes)
    return total


def removed_structures(model: nn.Module, kept: Kept) -> list[Structure]:
    """The structures that `kept` leaves out."""
    shape = anatomy(model)
    each, gone = shape.queries_per_group, []
    lost = set(range(shape.layers)) - set(kept.layers)
    if lost:
        gone += [s for s in structures_of(model, "layers") if s.layer in lost]
    if len(kept.channels) < shape.channels:
        stay = set(kept.channels)
        gone += [s for s in structures_of(model, "channels") if s.index not in stay]
    neurons = [set(row) for row in kept.neurons]
    heads = [set(row) for row in kept.heads]
    groups = [{h // each for h in row} for row in heads]
    for kind, stays in (("neurons", neurons), ("heads", heads), ("groups", groups)):
        if all(len(row) == shape.count(kind) for row in stays):
            continue
        gone += [
            s
            for s in structures_of(model, kind)
            if s.layer not in lost and s.index not in stays[s.layer]
        ]
    return gone


def shrink(model: nn.Module, kept: Kept, *, rescale_norms: bool = True) -> nn.Module:
    r"""Build the smaller dense model that has only what is kept.

    It computes what the original with zeros in place of the rest computes (`zero`); parameters that
    lose nothing are shared with it.

    Args:
        model: A Llama-like Hugging Face model; it is not changed.
        kept: What stays, equally many heads per group, groups per layer and neurons per layer.
        rescale_norms: Where channels go, multiply the gains of the norms by $\sqrt{d / d'}$, so
            that they divide as before. Without, they divide by what is left.

    Raises:
        ValueError: When the counts are unequal, nothing of a kind is left, a number is not in the
            model, a weight is not finite, or no class can hold the result.
    """
    shape = anatomy(model)
    check_weights(model)
    sizes = _equal(shape, kept)
    config, kind = _configure(model, shape, kept, sizes, rescale_norms)
    with torch.device("meta"):  # no memory and no random draws for what is replaced at once
        small = kind(config)
    new = _cut_parameters(model, shape, kept, rescale_norms)
    small.load_state_dict(new, strict=True, assign=True)
    _join(small)
    prefix = shape.embedding.rpartition(".")[0]
    rotary = share(model.get_submodule(f"{prefix}.rotary_emb" if prefix else "rotary_emb"))
    rotary.config = config
    (small.get_submodule(prefix) if prefix else small).rotary_emb = rotary
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = copy.deepcopy(model.generation_config)
    return small.train(model.training)


def _join(small: nn.Module) -> None:
    """Let layers with the very same parameters be one module, as they were in the original."""
    known: dict[tuple, nn.Module] = {}
    for module in list(small.modules()):
        for leaf, child in module._modules.items():
            own = tuple(id(p) for p in child.parameters()) if child is not None else ()
            if own and not any(True for _ in child.children()):
                module._modules[leaf] = known.setdefault((type(child), own), child)


def _equal(shape: Anatomy, kept: Kept) -> dict[str, int]:
    """The counts, once they are known to be the same everywhere."""
    for kind in ("layers", "channels"):
        _valid(getattr(kept, kind), shape.count(kind), kind)
    for kind in ("heads", "neurons"):
        rows = getattr(kept, kind)
        if len(rows) != shape.layers:
            raise ValueError(f"{kind} are given for {len(rows)} of {shape.layers} layers.")
        for layer in kept.layers:
            _valid(rows[layer], shape.count(kind), f"{kind} of layer {layer}")
    neurons = {len(kept.neurons[layer]) for layer in kept.layers}
    each = shape.queries_per_group
    groups, queries = set(), set()
    for layer in kept.layers:
        members = [head // each for head in kept.heads[layer]]
        groups.add(len(set(members)))
        queries |= {members.count(g) for g in set(members)}
    if max(map(len, (neurons, groups, queries))) > 1:
        what = (
            f"{_range(neurons)} neurons, {_range(groups)} key-value heads and {_range(queries)} "
            "query heads on each"
        )
        raise ValueError(
            f"the layers would keep {what}, but a configuration has one number for all: keep "
            "equally many, or mask them (`mask_structures`); unequal counts would need a model "
            "class of one's own or padding with zeros."
        )
    return {"neurons": neurons.pop(), "kv_heads": groups.pop(), "queries": queries.pop()}


def _range(counts: set[int]) -> str:
    return str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _valid(indices: Sequence[int], count: int, kind: str) -> None:
    if not indices:
        raise ValueError(f"no {kind} would be left; at least one has to stay.")
    ordered = all(a < b for a, b in pairwise(indices))
    if not ordered or indices[0] < 0 or indices[-1] >= count:
        raise ValueError(f"the kept {kind} must be ascending numbers below {count}.")


def _configure(
    model: nn.Module, shape: Anatomy, kept: Kept, sizes: dict[str, int], rescale: bool
) -> tuple[Any, type]:
    """The smaller configuration, and the class that can hold it."""
    config = copy.deepcopy(model.config)
    changes = {
        "num_hidden_layers": len(kept.layers),
        "num_attention_heads": sizes["kv_heads"] * sizes["queries"],
        "num_key_value_heads": sizes["kv_heads"],
        "head_dim": shape.head_dim,  # no longer the hidden size over the number of heads
        "intermediate_size": sizes["neurons"],
        "hidden_size": len(kept.channels),
    }
    if rescale:
        changes["rms_norm_eps"] = config.rms_norm_eps * shape.channels / len(kept.channels)
    if getattr(config, "layer_types", None) is not None:
        changes["layer_types"] = [config.layer_types[layer] for layer in kept.layers]
    for key, value in changes.items():
        setattr(config, key, value)
    heads, hidden = changes["num_attention_heads"], changes["hidden_size"]
    if config.model_type != "llama" or hidden % heads == 0:
        return config, type(model)
    biased = any(
        model.get_submodule(shape.name(0, part)).bias is not None for part in PARTS
    )  # fmt: skip
    sibling = type(model).__name__.replace("Llama", "Mistral")
    import transformers  # the only place that has to know a class by name

    kind = getattr(transformers, sibling, None)
    if biased or kind is None:
        raise ValueError(
            f"Llama's configuration wants the hidden size ({hidden}) to be a multiple of the "
            f"number of heads ({heads}), and Mistral's class, which does not, has no biases: keep "
            f"another number of heads."
        )
    values = {k: v for k, v in config.to_dict().items() if k not in _ONLY_LLAMA}
    other = transformers.MistralConfig(**values, sliding_window=None)
    other._attn_implementation = config._attn_implementation
    return other, kind


_ONLY_LLAMA = ("model_type", "architectures", "transformers_version", "attention_bias",
               "mlp_bias", "pretraining_tp")  # fmt: skip


def _plan(shape: Anatomy, kept: Kept) -> dict[str, dict[int, tuple[int, ...]]]:
    """For each parameter that stays, by its old name: what is kept along each axis.

    Norms of a head, which some relatives of Llama have, are left out: they stay as they are.
    """
    channels, size, each = kept.channels, shape.head_dim, shape.queries_per_group
    rows: dict[str, dict[int, tuple[int, ...]]] = {
        f"{shape.embedding}.weight": {1: channels},
        f"{shape.norm}.weight": {0: channels},
    }
    if shape.head is not None:
        rows[f"{shape.head}.weight"] = {1: channels}

    def spread(heads: Sequence[int]) -> tuple[int, ...]:
        return tuple(head * size + i for head in heads for i in range(size))

    for layer in kept.layers:
        groups = sorted({head // each for head in kept.heads[layer]})
        queries, keys = spread(kept.heads[layer]), spread(groups)
        inner = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
        for part, dim in PARTS.items():
            units = inner.get(part.rpartition(".")[2], kept.neurons[layer])
            rows[shape.name(layer, f"{part}.weight")] = {dim: units, 1 - dim: channels}
            rows[shape.name(layer, f"{part}.bias")] = {0: units if dim == 0 else channels}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            rows[shape.name(layer, f"{norm}.weight")] = {0: channels}
        for norm in ("q_norm", "k_norm"):
            rows[shape.name(layer, f"self_attn.{norm}.weight")] = {}
    return rows


def _cut_parameters(
    model: nn.Module, shape: Anatomy, kept: Kept, rescale: bool
) -> dict[str, nn.Parameter]:
    """The state of the smaller model, under its new names; tied parameters are one object."""
    factor = math.sqrt(shape.channels / len(kept.channels)) if rescale else 1.0
    number = {layer: str(i) for i, layer in enumerate(kept.layers)}
    plan, made, state = _plan(shape, kept), {}, {}
    for name, old in model.named_parameters(remove_duplicate=False):
        if name not in plan:
            continue
        gain = factor if old.ndim == 1 and "norm" in name and plan[name] else 1.0
        key = (id(old), tuple(plan[name].items()), gain)
        if key not in made:
            made[key] = _kept_part(old, plan[name], gain)
        if name.startswith(f"{shape.blocks}."):
            layer, _, rest = name.removeprefix(f"{shape.blocks}.").partition(".")
            name = f"{shape.blocks}.{number[int(layer)]}.{rest}"
        state[name] = made[key]
    return state


def _kept_part(old: nn.Parameter, axes: dict[int, tuple[int, ...]], gain: float) -> nn.Parameter:
    short = {dim: rows for dim, rows in axes.items() if len(rows) < old.shape[dim]}
    if not short and gain == 1.0:
        return old
    # A tensor made in inference mode, where a reader may evaluate, could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        value = old.detach().clone()
        for dim, indices in short.items():
            value = value.index_select(dim, torch.tensor(indices, device=old.device))
        return nn.Parameter((value * gain).contiguous(), old.requires_grad)
