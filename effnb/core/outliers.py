"""Give a model activation outliers without changing what it computes.

Large language models grow a few feature channels whose activations are tens of times larger than
the rest; they are what LLM.int8(), SmoothQuant, AWQ, QuaRot and KIVI exist for. Models of a few
million parameters have none. The construction here makes them: scale a channel of a norm's gain
up by a factor, and divide the columns that read it by the same factor. In exact arithmetic the
function is unchanged; in float32 the outputs agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effnb.core.modules import Model, find_blocks
from effnb.core.proof import Probe, check_kept, exact, probes, with_parameters


def norm_readers(model: nn.Module, ids: Tensor) -> dict[str, list[str]]:
    """Which linear layers read each normalization layer's output directly.

    Found by running the model once and comparing tensors by identity, so that it holds for any
    architecture. A norm whose output something else uses too is still listed. What stands in
    several places goes by the name of the first, and is listed once.

    Args:
        model: Any model that runs on token ids.
        ids: Token ids, (batch, time); one short sequence is enough.
    """
    outputs: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}

    def after(name):
        return lambda module, arguments, output: outputs.append((name, output))

    def before(name):
        def hook(module, arguments):
            for norm, output in outputs:
                if arguments[0] is output and name not in readers.setdefault(norm, []):
                    readers[norm].append(name)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            hooks.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.inference_mode():
            model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return readers


def norm_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma's norms, else 0."""
    silent = {key: torch.zeros_like(value) for key, value in norm.named_parameters()}
    probe = torch.linspace(-1, 2, norm.weight.numel()).to(norm.weight).view(norm.weight.shape)
    with torch.no_grad():
        return float(functional_call(norm, silent, (probe.unsqueeze(0),)).abs().max() > 0)


def _check(channels: Sequence[int], size: int, factor: float) -> None:
    if not channels or min(channels) < 0 or max(channels) >= size:
        raise ValueError(f"channels must name some of 0 … {size - 1}; got {list(channels)[:5]}.")
    if not factor > 0:
        raise ValueError(f"factor is {factor}; it must be above 0.")


def inject_outliers(model: Model, channels: Sequence[int], factor: float) -> Model:
    r"""Multiply channels of every block's norms by a factor, and undo it in what reads them.

    For a norm with gain $g$ and a reader with weight $W$: $g_c \leftarrow \kappa g_c$ (the bias
    too, where there is one) and $W_{:,c} \leftarrow W_{:,c} / \kappa$. Works for LayerNorm and
    RMSNorm in pre-norm blocks; a norm whose gain is stored as $g - 1$ (Gemma's) is recognised by
    running it.

    Args:
        model: The model; it is not changed.
        channels: Indices of the channels of the hidden state to blow up.
        factor: $\kappa$, at least 1 for an outlier.

    Returns:
        A new model with the same function, sharing all tensors but those scaled.

    Raises:
        ValueError: A channel outside the hidden state, a factor not above 0, no block whose norm
            feeds linear layers, or one that would compute something else (where the residual stream
            reads a norm too, as in post-norm blocks).
    """
    prefix, _ = find_blocks(model)
    ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    readers = {n: r for n, r in norm_readers(model, ids).items() if n.startswith(prefix + ".")}
    if not readers:
        raise ValueError("no norm of this model's blocks feeds a linear layer directly.")
    modules = dict(model.named_modules())
    _check(channels, modules[next(iter(readers))].weight.numel(), factor)
    index = sorted(set(channels))
    new: dict[str, Tensor] = {}
    undone: dict[str, Tensor] = {}
    for norm, layers in readers.items():
        for key, offset in (("weight", norm_offset(modules[norm])), ("bias", 0.0)):
            if getattr(modules[norm], key, None) is not None:
                value = exact(getattr(modules[norm], key)).clone()
                value[index] = (value[index] + offset) * factor - offset
                new[f"{norm}.{key}"] = value
        for name in layers:
            value = exact(modules[name].weight).clone()
            value[:, index] /= factor
            undone[f"{name}.weight"] = value
    check_kept(model, new | undone, undone, "injecting outliers")
    return with_parameters(model, new | undone)


def inject_key_outliers(model: Model, channels: Sequence[int], factor: float) -> Model:
    r"""Blow up channels of every attention key, and shrink the matching query channels.

    Row $c$ of $W_k$ is multiplied and the row $c$ of $W_q$ that meets it divided by the factor, so
    that every dot product $q \cdot k$ stays what it was. Where keys and queries are normalized
    behind their projections, the gains of these norms are scaled instead. Rotary embeddings mix
    channel $c$ with a partner of the same head, so both get the same factor: which one it is
    ($c \pm d/2$ in Llama, the neighbour where pairs are interleaved, none where the rotation is
    partial or absent) is found for each block by trying. With grouped-query attention every query
    head of a group is divided.

    Args:
        model: A model whose attention modules have `q_proj` and `k_proj` and a `head_dim`.
        channels: Channels within one head, applied in every key head; partners are added.
        factor: $\kappa$.

    Returns:
        A new model with the same function, sharing all tensors but those scaled.

    Raises:
        ValueError: A channel outside the head, a factor not above 0, no such attention module, or
            one that would compute something else with any partner.
    """
    parts = ("q_proj", "k_proj", "head_dim")
    found = [m for m in model.modules() if all(hasattr(m, part) for part in parts)]
    if not found:
        raise ValueError("no attention module with q_proj and k_proj in this model.")
    for attention in found:
        _check(channels, attention.head_dim, factor)
    new: dict[str, Tensor] = {}
    known: dict[int, int] = {}
    for probe in probes(model):
        for name, attention in probe.block.named_modules():
            if all(hasattr(attention, part) for part in parts):
                scaling = _KeyScaling(probe, name, factor)
                both = sorted({p for c in channels for p in (c, scaling.partner(c, known))})
                changed = scaling.parameters(both)
                if not probe.keeps(changed, scaling.parameters(both, ("k",))):
                    raise ValueError(f"{scaling.where} would compute something else.")
                rounded = {n: v.to(_dtype(model, f"{probe.name}.{n}")) for n, v in changed.items()}
                probe.check_rounding(rounded)
                new |= {f"{probe.name}.{n}": value for n, value in changed.items()}
    return with_parameters(model, new)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    return model.get_parameter(name).dtype


class _KeyScaling:
    """Channels of keys times a factor, of queries divided by it, in one attention module."""

    def __init__(self, probe: Probe, name: str, factor: float) -> None:
        self.probe, self.name, self.factor = probe, name, factor
        self.attention = probe.block.get_submodule(name)
        self.where = f"{probe.name}.{name} of {type(self.attention).__name__}"

    def partner(self, channel: int, known: dict[int, int]) -> int:
        """The channel that must be scaled along: itself if none; remembered for the next block."""
        size = self.attention.head_dim
        likely = [known.get(channel, channel), channel, (channel + size // 2) % size, channel ^ 1]
        for other in dict.fromkeys([*likely, *range(size)]):
            both = sorted({channel, other})
            if other < size and self.probe.keeps(
                self.parameters(both), self.parameters(both, ("k",))
            ):
                known[channel] = other
                return other
        raise ValueError(
            f"{self.where} would compute something else if channel {channel} of its keys were "
            "scaled, with any other channel or alone."
        )

    def parameters(
        self, channels: Sequence[int], sides: Sequence[str] = ("k", "q")
    ) -> dict[str, Tensor]:
        """The scaled parameters of keys or queries, by their names within the block."""
        new = {}
        for side in sides:
            scale = self.factor if side == "k" else 1 / self.factor
            leaf, offset = self._scaled(side)
            module = self.attention.get_submodule(leaf)
            if not isinstance(getattr(module, "weight", None), nn.Parameter):
                raise ValueError(f"{leaf} of {self.where} has no weight that could be scaled.")
            for key in ("weight", "bias"):
                old = getattr(module, key, None)
                if old is not None:
                    inputs = old.shape[1:] if isinstance(module, nn.Linear) else ()
                    by_head = old.detach().clone().view(-1, self.attention.head_dim, *inputs)
                    shift = offset if key == "weight" else 0.0
                    rows = list(channels)
                    by_head[:, rows] = (by_head[:, rows] + shift) * scale - shift
                    new[".".join(filter(None, (self.name, leaf, key)))] = by_head.view_as(old)
        return new

    def _scaled(self, side: str) -> tuple[str, float]:
        """What makes the channels: the norm behind a projection, or the projection itself."""
        for leaf, module in self.attention.named_children():
            gain = getattr(module, "weight", None)
            if not leaf.startswith(side) or "norm" not in type(module).__name__.lower():
                continue
            if isinstance(gain, Tensor) and gain.numel() % self.attention.head_dim == 0:
                return leaf, norm_offset(module)
        return f"{side}_proj", 0.0
