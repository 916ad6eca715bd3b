r"""Which weights stay: where weights compete, and the masks that come of it.

A pruning method gives every weight a score, and a pattern says among which weights the smallest
scores are removed:

- "layer": among all weights of a layer;
- "row": among the inputs of each output, so that every row keeps equally many;
- "global": among all layers together, by one threshold;
- "N:M", such as "2:4": among every M consecutive inputs of a row, of which N are *kept*
  (Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021,
  arXiv 2102.04010).

A pruned model is an ordinary model: its layers stay `nn.Linear`, and removed weights are exactly 0.
The zeros are the mask. They survive sharing, saving, loading and quantizing, and `masks_of` reads
them back. Only training needs the mask beside the model, see `effnb.inference.pruning.recovery`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from effnb.core.calibration import block_linears
from effnb.core.checks import check_finite, check_loaded
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    chooses_layers,
    linears,
    replace_modules,
    share,
)
from effnb.inference.quantization.linear import refuse_quantized

Sparsity = float | Mapping[str, float] | None
"""Part of the weights to remove: one number, one per layer's name, or None for "N:M"."""


@dataclass(frozen=True)
class Pattern:
    """Among which weights the smallest scores are removed.

    Attributes:
        scope: "layer", "row", "global" or "group".
        keep: How many weights of each group stay (the N of N:M); 0 for the other scopes.
        group: Consecutive inputs that make a group (the M of N:M); 0 for the other scopes.
    """

    scope: str
    keep: int = 0
    group: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "layer", "row", "global" or "N:M".

        Raises:
            ValueError: When the text is none of these.
        """
        if text in ("layer", "row", "global"):
            return cls(text)
        found = re.fullmatch(r"(\d+):(\d+)", text)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(
                f'pattern is {text!r}; it must be "layer", "row", "global" or "N:M" '
                "(keep N of every M inputs, N at least 1 and at most M)."
            )
        return cls("group", int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}" if self.scope == "group" else self.scope

    @property
    def sparsity(self) -> float | None:
        """The sparsity that the pattern itself fixes: 1 - N/M, or None."""
        return 1 - self.keep / self.group if self.scope == "group" else None

    def at(self, sparsity: float) -> Pattern:
        """The pattern on the way to its full sparsity: N:M keeps as many of M as that leaves."""
        if self.scope != "group":
            return self
        removed = int(sparsity * self.group + 1e-9)  # 0.75 * 4 must remove 3
        return Pattern("group", self.group - removed, self.group)


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it must be at least 0 and below 1.")


def keep_mask(
    score: Float[Tensor, "out in"], sparsity: float | None, pattern: str | Pattern = "layer"
) -> Bool[Tensor, "out in"]:
    """Keep the largest scores of one weight; True where a weight stays.

    Exactly `round(sparsity * n)` of the n competing weights are removed. Of equal scores, those
    that come first are.

    Args:
        score: The larger, the more important.
        sparsity: Part to remove; for "N:M" it may be None, and must fit the pattern otherwise.
        pattern: "layer", "row" or "N:M".

    Raises:
        ValueError: A sparsity outside [0, 1), an unknown pattern, groups that do not divide the
            inputs, scores that are not finite, or when no weight would stay.
    """
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    if pattern.scope == "global":
        raise ValueError('pattern "global" compares layers of a model; one weight has "layer".')
    goal = goals_of(sparsity, pattern, [""])[""]
    check_layer("the weight", score, goal, pattern)
    return select(score.detach(), goal, pattern)


def choose_masks(
    scores: Mapping[str, Tensor], sparsity: Sparsity, pattern: str | Pattern = "layer"
) -> dict[str, Tensor]:
    """Keep the largest scores of several layers; True where a weight stays.

    Args:
        scores: Score of every weight by the layer's name, each (out, in).
        sparsity: Part to remove of each layer, or of all together if the pattern is "global".
        pattern: "layer", "row", "global" or "N:M".

    Raises:
        ValueError: As `keep_mask`; or an allocation that does not name the same layers; or when a
            global threshold would remove a whole layer.
    """
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    goals = goals_of(sparsity, pattern, list(scores))
    for name, score in scores.items():
        check_layer(name, score, goals[name], pattern)
    if pattern.scope != "global":
        return {name: select(s.detach(), goals[name], pattern) for name, s in scores.items()}
    flat = torch.cat([score.detach().flatten().float() for score in scores.values()])
    kept = keep_largest(flat.unsqueeze(0), round(sparsity * flat.numel())).squeeze(0)
    parts = kept.split([score.numel() for score in scores.values()])
    masks = {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts)}
    for name, mask in masks.items():
        if not mask.any():
            raise ValueError(
                f"one threshold for sparsity {sparsity} would remove the whole layer {name}; "
                'lower the sparsity, or use the pattern "layer".'
            )
    return masks


def goals_of(sparsity: Sparsity, pattern: Pattern, names: list[str]) -> dict[str, float]:
    """The sparsity of each layer, checked."""
    fixed = pattern.sparsity
    if fixed is not None:
        if sparsity is not None and (isinstance(sparsity, Mapping) or abs(sparsity - fixed) > 1e-6):
            given = "given per layer" if isinstance(sparsity, Mapping) else sparsity
            raise ValueError(
                f"the pattern {pattern} removes {fixed:.6g} of the weights, but sparsity is "
                f"{given}; leave it out or take another pattern."
            )
        return dict.fromkeys(names, fixed)
    if sparsity is None:
        raise ValueError(f'sparsity is missing; only "N:M" patterns fix it, not "{pattern}".')
    if not isinstance(sparsity, Mapping):
        check_sparsity(sparsity)
        return dict.fromkeys(names, sparsity)
    if pattern.scope == "global":
        raise ValueError('pattern "global" takes one sparsity, not one per layer.')
    wrong = sorted(set(names) ^ set(sparsity))
    if wrong:
        kind = "has no layer" if wrong[0] in names else "names a layer that is not pruned:"
        raise ValueError(f"the sparsity per layer {kind} {wrong[0]}.")
    for value in sparsity.values():
        check_sparsity(value)
    return dict(sparsity)


def check_layer(name: str, values: Tensor, sparsity: float, pattern: Pattern) -> None:
    """Refuse what cannot be pruned, before any work starts."""
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} has shape {tuple(values.shape)}; only matrices are pruned.")
    check_finite(values, name, "pruned")
    if pattern.scope == "group" and values.shape[1] % pattern.group:
        raise ValueError(
            f"{name} has {values.shape[1]} inputs, which the groups of {pattern.group} of the "
            f"pattern {pattern} do not divide."
        )
    competing = {"layer": values.numel(), "row": values.shape[1]}.get(pattern.scope, 0)
    if competing and round(sparsity * competing) == competing:
        raise ValueError(
            f"{name}: a sparsity of {sparsity} rounds to all {competing} weights of a "
            f"{pattern.scope}; at least one must stay."
        )


def select(score: Tensor, sparsity: float, pattern: Pattern) -> Tensor:
    """The mask of one layer; everything has been checked."""
    if pattern.scope == "group":
        groups = score.reshape(-1, pattern.group)
        removed = pattern.group - pattern.keep
    else:
        groups = score.reshape(1, -1) if pattern.scope == "layer" else score
        removed = round(sparsity * groups.shape[1])
    return keep_largest(groups, removed).view(score.shape)


def keep_largest(score: Float[Tensor, "groups n"], removed: int) -> Bool[Tensor, "groups n"]:
    """False at exactly the `removed` smallest entries of each row, of equal ones at the first."""
    if removed == 0:
        return torch.ones_like(score, dtype=torch.bool)
    if score.dtype in (torch.float16, torch.bfloat16):
        score = score.float()
    if score.device.type == "mps":
        threshold = score.sort(dim=-1).values[:, removed - 1 : removed]
    else:  # several times faster than sorting
        threshold = score.kthvalue(removed, dim=-1, keepdim=True).values
    dropped, ties = score < threshold, score == threshold
    room = removed - dropped.sum(-1, keepdim=True)
    if bool((ties.sum(-1, keepdim=True) > room).any()):
        ties &= ties.cumsum(-1) <= room
    return ~(dropped | ties)


def prunable(
    model: nn.Module,
    sparsity: Sparsity,
    pattern: str | Pattern,
    layers: LayerChoice = "*",
    *,
    inside_blocks: bool = False,
) -> tuple[dict[str, nn.Linear], dict[str, float]]:
    """The layers to prune and the sparsity of each, after all that could go wrong was checked.

    Args:
        model: Any module with `nn.Linear` layers.
        sparsity: Part to remove.
        pattern: "layer", "row", "global" or "N:M".
        layers: Name patterns of the layers to prune.
        inside_blocks: Take layers inside a transformer's blocks only, as `layerwise` does.

    Raises:
        ValueError: A quantized model, no fitting layer, weights that are not finite, or a sparsity
            or pattern that does not fit them.
    """
    pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
    refuse(model)
    chosen = (block_linears if inside_blocks else linears)(model, layers)
    goals = goals_of(sparsity, pattern, list(chosen))
    for name, layer in chosen.items():
        check_layer(name, layer.weight, goals[name], pattern)
    return chosen, goals


def refuse(model: nn.Module) -> None:
    """Refuse a quantized model: its codes have no weights that could be taken away one by one.

    Raises:
        ValueError: When the model has a quantized layer, or weights on the meta device.
    """
    check_loaded(model)
    try:
        refuse_quantized(model)
    except ValueError:
        raise ValueError(
            "this model is quantized already; prune the original, then quantize what is left."
        ) from None


# --- masks on models ------------------------------------------------------------------------------


def with_weight(layer: nn.Linear, weight: Tensor) -> nn.Linear:
    """The same layer with another weight; the bias is shared."""
    new = share(layer)
    # A tensor made in inference mode, where a reader may evaluate, could never be trained.
    with torch.inference_mode(False), torch.no_grad():
        weight = weight.clone() if weight.is_inference() else weight.detach()
        new.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
    return new


def masked(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight with exact zeros where the mask is False."""
    return torch.where(mask, weight.detach(), 0)


@in_linear_form
def apply_masks(model: Model, masks: Mapping[str, Tensor]) -> Model:
    """A model whose named layers have exact zeros where their mask is False.

    Raises:
        ValueError: A quantized model, a name that is no linear layer, or a mask of another shape.
    """
    refuse(model)
    layers = layers_of(model, masks)
    new = {n: with_weight(layer, masked(layer.weight, masks[n])) for n, layer in layers.items()}
    return replace_modules(model, new)


def layers_of(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """The layers that masks are for, checked."""
    modules = dict(model.named_modules())
    for name, mask in masks.items():
        layer = modules.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"the model has no linear layer {name!r} for this mask.")
        if mask.dtype != torch.bool or mask.shape != layer.weight.shape:
            raise ValueError(
                f"the mask of {name} is {tuple(mask.shape)} of {mask.dtype}; it must be "
                f"{tuple(layer.weight.shape)} of torch.bool."
            )
    return {name: modules[name] for name in masks}


@chooses_layers
@in_linear_form
def masks_of(
    model: nn.Module,
    layers: LayerChoice = "*",
) -> dict[str, Tensor]:
    """Read the masks back from a model: True where a linear layer's weight is not 0.

    Layers that were quantized after pruning are read too.

    Raises:
        ValueError: When no layer fits.
    """
    wanted = Layers.of(layers).on(model)
    found = {
        name: module.weight.detach() != 0
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or hasattr(type(module), "quantized"))
        and wanted.fit(name)
    }
    if not found:
        raise ValueError(f"the model has no linear layer that fits {', '.join(wanted.include)}.")
    return found


def follows(mask: Bool[Tensor, "out in"], pattern: str) -> bool:
    """Whether every group of M inputs keeps at most N, as kernels for "N:M" need it.

    Raises:
        ValueError: When the pattern is not "N:M".
    """
    parsed = Pattern.parse(pattern)
    if parsed.scope != "group":
        raise ValueError(f'pattern is "{pattern}"; only "N:M" can be checked.')
    if mask.shape[1] % parsed.group:
        return False
    return bool((mask.view(-1, parsed.group).sum(1) <= parsed.keep).all())


@dataclass(frozen=True)
class MaskSummary:
    """How sparse a model's layers are.

    Attributes:
        layers: Sparsity of each layer.
        sparsity: Sparsity of all layers together.
        weights: Weights of these layers.
        kept: Weights that are not 0.
        empty_rows: Outputs that read no input any more, in all layers together.
        sparsest: Name of the layer that lost most.
    """

    layers: dict[str, float]
    sparsity: float
    weights: int
    kept: int
    empty_rows: int
    sparsest: str


def summarize(masks: Mapping[str, Tensor]) -> MaskSummary:
    """Sparsity per layer and over all.

    A global threshold can all but empty a layer, so look at the layers too.

    Raises:
        ValueError: When there are no masks.
    """
    if not masks:
        raise ValueError("there are no masks to summarize.")
    layers = {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    weights = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    empty = sum(int((~mask.any(1)).sum()) for mask in masks.values())
    return MaskSummary(
        layers, 1 - kept / weights, weights, kept, empty, max(layers, key=layers.get)
    )
