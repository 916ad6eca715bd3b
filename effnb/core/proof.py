"""Whether a change of a block's weights kept its function: tried in float64, on a short text.

Moving scales between layers, making outliers and rotating features must not change what a model
computes. Whether they do depends on things that no name tells: a norm behind the product, which
channels the rotary embedding pairs, a gain stored as its distance from 1. So each block is copied
in float64 and run with the old and the new weights, *before* these are rounded to the model's type.
What differs then is no rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from effnb.core.modules import Model, find_blocks, first_names, share

TOKENS = 16
"""Tokens that a model is run on."""
EXACT = 1e-7
"""Largest part that may differ in float64; rounding makes about 1e-14."""
ROUNDED = 0.01
"""Largest part of a block's own output that rounding the new weights may change."""

_NARROW = (torch.float32, torch.float16, torch.bfloat16)


class InFloat64(TorchFunctionMode):
    """Everything is computed in float64, also what a model asks to be computed in float32."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = getattr(function, "__name__", "")
        if name in ("float", "half", "bfloat16") and isinstance(arguments[0], Tensor):
            return arguments[0].double()
        wide = lambda x: torch.float64 if x in _NARROW else x  # noqa: E731
        arguments, keywords = (
            tree_map(lambda x: wide(x) if isinstance(x, torch.dtype) else x, given)
            for given in (tuple(arguments), dict(keywords or {}))
        )
        if name.endswith("grouped_mm") and arguments[0].dtype == torch.float64:
            return _grouped(*arguments, **keywords)
        return function(*arguments, **keywords)


def _grouped(
    rows: Tensor,
    matrices: Tensor,
    offs: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: Any = None,
) -> Tensor:
    """Rows up to each offset times one matrix each: experts, for which torch has no float64."""
    ends = offs.tolist()
    parts = [
        rows[start:end] @ matrix
        for start, end, matrix in zip([0, *ends[:-1]], ends, matrices, strict=True)
    ]
    rest = rows.new_zeros(len(rows) - ends[-1], matrices.shape[-1])
    product = torch.cat([*parts, rest])
    return product if bias is None else product + bias


def exact(value: Any) -> Any:
    """All floating-point tensors in a structure in float64; on the CPU where a device has none."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().cpu() if x.device.type == "mps" else x.detach()
        return x.double() if x.is_floating_point() else x

    return tree_map(one, value)


def output_of(result: Any) -> Tensor:
    """What a block gives first: its hidden states."""
    return result[0] if isinstance(result, (tuple, list)) else result


@dataclass(frozen=True)
class Probe:
    """A block in float64, and what a short text gives it.

    Attributes:
        name: The block's dotted name.
        block: A copy of the block in float64.
        arguments: Its positional arguments, the hidden states first.
        keywords: Its keyword arguments.
    """

    name: str
    block: nn.Module
    arguments: tuple
    keywords: dict[str, Any]

    @classmethod
    def of(cls, name: str, block: nn.Module, arguments: tuple, keywords: dict) -> Probe:
        """Copy a block, and widen what it is called with; a cache is left out."""
        kept = {
            key: None if hasattr(value, "get_seq_length") else value
            for key, value in keywords.items()
            if key != "use_cache"
        }
        if not arguments:
            arguments = (kept.pop("hidden_states"),)
        wide = copy.deepcopy(block).eval()
        if any(p.device.type == "mps" for p in wide.parameters()):
            wide = wide.to("cpu")
        return cls(name, wide.double(), exact(tuple(arguments)), exact(kept))

    def run(self, new: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output, with some parameters replaced (names as the block knows them)."""
        with torch.no_grad(), InFloat64():
            result = functional_call(
                self.block, dict(exact(new or {})), self.arguments, self.keywords
            )
        return output_of(result).double()

    @cached_property
    def truth(self) -> Tensor:
        """The output as it is."""
        return self.run()

    @cached_property
    def own(self) -> float:
        """The norm of what the block adds to the residual stream, or of all it gives."""
        hidden = self.arguments[0]
        same = hidden.shape == self.truth.shape
        return float((self.truth - hidden if same else self.truth).norm())

    def change(self, new: Mapping[str, Tensor]) -> float:
        """The norm of the change of the output."""
        return float((self.run(new) - self.truth).norm())

    def keeps(self, new: Mapping[str, Tensor], half: Mapping[str, Tensor]) -> bool:
        """Whether parameters that belong together leave the output as it is.

        Compared with the change when only half of them are replaced, so that a block on which they
        have little effect passes for no wrong reason.
        """
        return self.change(new) <= EXACT * self.change(half) + 1e-13 * self.own

    def check_rounding(self, new: Mapping[str, Tensor]) -> None:
        """Refuse parameters that mean something else once they are rounded to the model's type.

        Raises:
            ValueError: When rounding alone changes more than a hundredth of the block's own output.
        """
        part = self.change(new) / self.own if self.own else 0.0
        if not part <= ROUNDED:
            kind = next(iter(new.values())).dtype
            raise ValueError(
                f"{self.name}: rounding the new weights to {kind} would change {part:.0%} of what "
                "the block computes; convert the model to float32 first."
            )


def probes(model: nn.Module, tokens: int = TOKENS) -> Iterator[Probe]:
    """A probe of each of a model's blocks, one after another; the model is not changed.

    Raises:
        ValueError: When the model has no list of equal blocks, or weights are on the meta device.
    """
    watched = share(model).eval()
    prefix, blocks = find_blocks(watched)
    calls: dict[int, tuple[tuple, dict]] = {}

    def before(index: int):
        def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            # Now: a cache that comes along is written to while the block runs.
            calls[index] = (arguments, dict(keywords))

        return hook

    hooks = [
        block.register_forward_pre_hook(before(i), with_kwargs=True)
        for i, block in enumerate(blocks)
    ]
    with torch.no_grad():
        watched(input_ids=probe_ids(watched, tokens))
    for hook in hooks:
        hook.remove()
    for index, (arguments, keywords) in sorted(calls.items()):
        yield Probe.of(f"{prefix}.{index}", blocks[index], arguments, keywords)


def probe_ids(model: nn.Module, tokens: int = TOKENS) -> Tensor:
    """A short text of different tokens that any vocabulary has."""
    device = next(model.parameters()).device
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    words = getattr(getattr(model, "config", None), "vocab_size", None) or min(sizes, default=1)
    return torch.arange(1, tokens + 1, device=device).remainder(words).view(1, -1)


def inside(prefix: str, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those parameters that are a block's, with names as the block knows them."""
    start = f"{prefix}."
    return {name[len(start) :]: value for name, value in new.items() if name.startswith(start)}


def check_kept(
    model: nn.Module,
    new: Mapping[str, Tensor],
    half: Mapping[str, Tensor],
    what: str,
    stored: Mapping[str, Tensor] | None = None,
) -> None:
    """Refuse new parameters that would change the function of a block, before they are used.

    Args:
        model: The model as it is.
        new: Its new parameters in float64, by dotted name.
        half: Those of them whose effect the others make up for.
        what: What is being done, for the sentence.
        stored: The new parameters as they will be stored; by default `new`, rounded to the types of
            the old ones.

    Raises:
        ValueError: When a block would compute something else (each that uses a module is looked
            at), or parameters lie outside the blocks that run; when rounding to the model's type
            would change too much.
    """
    known = dict(model.named_parameters())
    stored = {n: v.to(known[n].dtype) for n, v in new.items()} if stored is None else stored
    new, half, stored = (_in_all_places(model, given) for given in (new, half, stored))
    left = set(new)
    for probe in probes(model):
        mine = inside(probe.name, new)
        if not mine:
            continue
        left -= {f"{probe.name}.{name}" for name in mine}
        if not probe.keeps(mine, inside(probe.name, half)):
            raise ValueError(
                f"{what} would change what {probe.name} of {type(model).__name__} computes: "
                "something else reads these channels, or scales them again."
            )
        probe.check_rounding(inside(probe.name, stored))
    if left:
        raise ValueError(f"{what} would change {min(left)}, which no block uses as expected.")


def _in_all_places(model: nn.Module, new: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters under the names of all places of their modules: other blocks may use them too."""
    found = dict(new)
    for place, first in first_names(model).items():
        if place != first:
            for leaf in model.get_submodule(first)._parameters:
                if f"{first}.{leaf}" in new:
                    found[f"{place}.{leaf}"] = new[f"{first}.{leaf}"]
    return found


def with_parameters(model: Model, new: Mapping[str, Tensor]) -> Model:
    """A model with other parameters in the place of some, in their types and on their devices."""
    result = share(model)
    with torch.inference_mode(False):  # they can be trained, wherever this is called
        for name, value in new.items():
            path, _, leaf = name.rpartition(".")
            old = result.get_parameter(name)
            value = value.detach().to(old.dtype).to(old.device)
            value = value.clone() if value.is_inference() else value
            setattr(result.get_submodule(path), leaf, nn.Parameter(value, old.requires_grad))
    return result
