r"""Move scales from a layer's inputs into the layer that made them; the function stays the same.

If input channel $j$ of a linear layer is divided by $s_j$ and column $j$ of its weight multiplied
by $s_j$, the layer's output stays what it was. The division costs nothing when what makes the
channel can take it in: the gain of a norm, or the rows of another linear layer when only operations
that commute with scaling a channel lie between the two (a product with a gate, an average over
tokens). AWQ and SmoothQuant live on this.

Which pairs of layers allow it is found out by trying: scale a pair by powers of two in a float64
copy of the block, and see whether its output stays. So there are no lists of architectures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import CalibrationLike, Call, visit_blocks
from effnb.core.modules import Model, find_stacks, first_names, share
from effnb.core.proof import ROUNDED, Probe
from effnb.core.watching import block_users


@dataclass(frozen=True)
class Fold:
    """A layer that makes channels, and the linear layers that read them, and nothing else does.

    Attributes:
        source: Name of the norm or linear layer whose output channels can be divided.
        readers: Names of the linear layers whose columns are multiplied in return.
        offset: What the norm adds to its weight before it multiplies (1 in Gemma's, else 0).
    """

    source: str
    readers: tuple[str, ...]
    offset: float = 0.0


def scaled(model: nn.Module, fold: Fold, scales: Float[Tensor, " channels"]) -> dict[str, Tensor]:
    """The parameters that change when the channels of a fold are divided by scales, by name.

    Args:
        model: The model, or the block that the fold's names start from.
        fold: The pair of layers.
        scales: Above 0, one for each channel.

    Raises:
        ValueError: When the new gains of a norm cannot be stored in its type.
    """
    source = model.get_submodule(fold.source)
    kind = torch.promote_types(scales.dtype, torch.float32)
    s = scales.to(kind)
    new: dict[str, Tensor] = {}
    weight = source.weight.detach().to(kind)
    if isinstance(source, nn.Linear):
        new[f"{fold.source}.weight"] = weight / s.unsqueeze(1)
    else:
        new[f"{fold.source}.weight"] = gain = (weight + fold.offset) / s - fold.offset
        _check_gain(fold, (gain.to(source.weight.dtype) + fold.offset) * s, weight + fold.offset)
    if getattr(source, "bias", None) is not None:
        new[f"{fold.source}.bias"] = source.bias.detach().to(kind) / s
    for name in fold.readers:
        new[f"{name}.weight"] = model.get_submodule(name).weight.detach().to(kind) * s
    return {name: value.to(source.weight.dtype) for name, value in new.items()}


def _check_gain(fold: Fold, found: Tensor, wanted: Tensor) -> None:
    """Refuse gains that are lost in rounding, as small ones are when stored less 1."""
    part = float((found - wanted).norm() / wanted.norm()) if bool(wanted.any()) else 0.0
    if part > ROUNDED:
        raise ValueError(
            f"the gains of {fold.source} are stored less {fold.offset:g}, and rounding the new "
            f"ones would change them by {part:.0%}; convert the model to float32 first."
        )


def set_parameters(model: nn.Module, new: dict[str, Tensor]) -> None:
    """Put new parameters in the place of old ones; nothing is written into the old tensors."""
    for name, value in new.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(value, getattr(module, leaf).requires_grad))


def fold_scales(model: Model, fold: Fold, scales: Float[Tensor, "*channels"]) -> Model:
    """A model with the channels of one fold divided by scales, and the same function.

    Raises:
        ValueError: When the scales do not fit the channels, or are not finite numbers above 0.
    """
    channels = model.get_submodule(fold.source).weight.shape[0]
    if scales.shape != (channels,):
        raise ValueError(
            f"scales has shape {tuple(scales.shape)}; {fold.source} has {channels} channels."
        )
    if not bool(((scales > 0) & torch.isfinite(scales)).all()):
        raise ValueError("every scale must be a finite number above 0.")
    result = share(model)
    set_parameters(result, scaled(result, fold, scales))
    return result


def scaled_together(
    model: nn.Module, folds: Sequence[Fold], scales: Float[Tensor, " channels"]
) -> dict[str, Tensor]:
    """The same for folds that must have the same scales; a module in several places has one name.

    Raises:
        ValueError: When the new gains of a norm cannot be stored in its type.
    """
    first = first_names(model)
    new: dict[str, Tensor] = {}
    for fold in folds:
        source, readers = first[fold.source], tuple(first[name] for name in fold.readers)
        new |= scaled(model, Fold(source, readers, fold.offset), scales)
    return new


def joined(model: nn.Module, folds: Sequence[Fold]) -> list[tuple[Fold, ...]]:
    """Folds that must have the same scales because they have a module in common.

    A layer that stands in several blocks has its channels divided in all of them: by whatever norm
    or layer makes them in each. Folds with a module that is used anywhere else, where nothing can
    take the scales in, are left out.

    Args:
        model: The model.
        folds: What `find_folds` gave, of the same model or of one that shares its modules alike.

    Returns:
        Groups in the order of their first folds. Where nothing is shared, each fold is alone.
    """
    blocks = {
        f"{path}.{i}": block
        for path, stack in find_stacks(model).items()
        for i, block in enumerate(stack)
    }
    users = block_users(model)
    inside = tuple(f"{name}." for name in blocks)
    outside = {
        module
        for name, module in model.named_modules(remove_duplicate=False)
        if not name.startswith(inside)
    }

    def roles(fold: Fold) -> list[tuple[str, nn.Module]]:
        """What a fold makes of modules: a layer may make the channels of one, and read another."""
        readers = [("reads", model.get_submodule(name)) for name in fold.readers]
        return [("makes", model.get_submodule(fold.source)), *readers]

    groups: list[list[Fold]] = []
    for fold in folds:
        mine = set(roles(fold))
        alike = [group for group in groups if any(mine & set(roles(other)) for other in group)]
        groups = [group for group in groups if group not in alike]
        groups.append([*(other for group in alike for other in group), fold])
    found = []
    for group in groups:
        where: dict[tuple[str, nn.Module], set[nn.Module]] = {}
        for fold in group:
            block = next(b for name, b in blocks.items() if fold.source.startswith(f"{name}."))
            for role in roles(fold):
                where.setdefault(role, set()).add(block)
        if all(
            there == users[module] and module not in outside for (_, module), there in where.items()
        ):
            found.append(tuple(group))
    return sorted(found, key=lambda group: folds.index(group[0]))


def find_folds(model: nn.Module, calibration: CalibrationLike) -> list[Fold]:
    """Every fold inside the blocks of a transformer, found by trying; see the module's text.

    A norm counts when linear layers read its very output. A linear layer counts when its output has
    as many channels as another's input and scaling both leaves the block's output unchanged. Blocks
    with linear layers that this run did not reach (experts) are left out: they might read the same
    channels.

    Args:
        model: A transformer; it is not changed.
        calibration: One short sequence of token ids is enough.
    """
    found: list[Fold] = []

    def visit(prefix: str, block: nn.Module, calls: list[Call]) -> None:
        for fold in _folds_of(block, calls[0]):
            readers = tuple(f"{prefix}.{name}" for name in fold.readers)
            found.append(Fold(f"{prefix}.{fold.source}", readers, fold.offset))

    visit_blocks(model, calibration, visit)
    return found


def _folds_of(block: nn.Module, call: Call) -> list[Fold]:
    linears = {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}
    norms = {
        name: m
        for name, m in block.named_modules()
        if "norm" in type(m).__name__.lower()
        and isinstance(getattr(m, "weight", None), Tensor)
        and m.weight.ndim == 1
    }
    order, read, made = _trace(block, call, linears, norms)
    if set(order) != set(linears):
        return []
    probe = Probe.of("", block, (call.hidden, *call.rest), call.keywords)
    found: list[Fold] = []
    grouped: list[str] = []
    for name in order:
        if name in grouped:
            continue
        readers = tuple(other for other in order if read[other] is read[name])
        grouped.extend(readers)
        from_norm = [norm for norm, output in made.items() if output is read[name]]
        if from_norm:
            tried = [Fold(norm, readers, offset) for norm in from_norm for offset in (0.0, 1.0)]
        else:  # the nearest layer before it that fits is the likeliest
            before = [s for s in order[: order.index(name)] if s not in readers]
            width = linears[name].in_features
            tried = [Fold(s, readers) for s in before[::-1] if linears[s].out_features == width]
        found.extend([fold for fold in tried if _preserves(probe, fold)][:1])
    return found


def _trace(
    block: nn.Module, call: Call, linears: dict[str, nn.Linear], norms: dict[str, nn.Module]
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """Linear layers as they run, the tensor each of them reads, and the tensor each norm makes."""
    order: list[str] = []
    read: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def before(name: str):
        def hook(module, arguments):
            if name not in read:
                order.append(name)
            read[name] = arguments[0]

        return hook

    def after(name: str):
        return lambda module, arguments, output: made.__setitem__(name, output)

    hooks = [m.register_forward_pre_hook(before(name)) for name, m in linears.items()]
    hooks += [m.register_forward_hook(after(name)) for name, m in norms.items()]
    try:
        call.run(block)
    finally:
        for hook in hooks:
            hook.remove()
    return order, read, made


def _preserves(probe: Probe, fold: Fold) -> bool:
    """Whether a block's output stays when a fold is scaled by powers of two, in float64."""
    width = probe.block.get_submodule(fold.readers[0]).in_features
    powers = torch.randint(-2, 3, (width,), generator=torch.Generator().manual_seed(0))
    scales = torch.pow(2.0, powers.double()).to(probe.arguments[0].device)
    new = scaled(probe.block, fold, scales)
    half = {name: value for name, value in new.items() if not name.startswith(fold.source + ".")}
    return probe.change(half) > 0 and probe.keeps(new, half)
