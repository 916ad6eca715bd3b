r"""Deltas that change parameters a model has: $\theta' = \theta + \Delta\theta$.

The specification-based family of delta tuning adds nothing to a model; it says which parameters
may change, and keeps the rest (Ding et al., "Parameter-efficient fine-tuning of large-scale
pre-trained language models", 2023, doi 10.1038/s42256-023-00626-4). Here the frozen parameter stays
where it is, shared by all models, and the delta is the difference: 0 at the start, a few kilobytes
in a file, and gone again with `detach`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.delta_hosts import WithDeltas, added
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import attach_deltas, check_name, modules_by_name, refuse_rounded_inputs
from effnb.core.modules import LayerChoice, Layers, Model

Chosen = dict[str, dict[str, nn.Parameter]]
"""From a module's dotted name to those of its own parameters that a method may change."""


class Difference(Delta):
    r"""A difference $\Delta\theta$ for some of a module's own parameters, trained from 0.

    It bears the parameters' names, so that `delta_state_dict` has those of the model's own state.
    Differences are kept in float32 at least, also where the model computes in half precision.
    """

    kind: ClassVar[str] = "difference"
    additive = True

    def __init__(self, base: nn.Module, leaves: Iterable[str]) -> None:
        """Make differences of 0 for the named parameters of a module.

        Raises:
            ValueError: When it has no floating-point parameter of such a name.
        """
        super().__init__()
        for leaf in leaves:
            self.register_parameter(leaf, nn.Parameter(zeros_for(own_parameter(base, leaf))))

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The output itself: what changes is the module before it runs."""
        return output

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""$\Delta\theta$."""
        return dict(self._parameters)

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The module with the parameters $\theta + \Delta\theta$."""
        with torch.no_grad():
            return with_differences(base, self.differences(base))

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> Difference:
        """Make the differences that a file's tensors fit into."""
        cls.check_leaves(tensors)
        return cls(base, tensors, **settings)

    @classmethod
    def check_leaves(cls, leaves: Iterable[str]) -> None:
        """Refuse names of parameters that the method does not change; by default, none.

        Raises:
            ValueError: The sentence names the first.
        """


class SparseDifference(Delta):
    r"""A difference that is not 0 at a few fixed places, and trained there.

    Attributes:
        <parameter>.values: (kept,), what is added there.
        <parameter>.places: (kept,), where, as positions in the flattened parameter.
    """

    kind = "sparse-difference"
    additive = True

    def __init__(self, parts: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take values and places by the parameters' names; the places are sorted."""
        super().__init__()
        for leaf, (values, places) in parts.items():
            part = nn.Module()
            part.values = nn.Parameter(values.detach().clone())
            part.register_buffer("places", places.to(torch.int64))
            self.add_module(leaf, part)

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The output itself: what changes is the module before it runs."""
        return output

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        """The difference in full size, 0 outside the places."""
        return {
            leaf: scattered(part.values, part.places, own_parameter(base, leaf))
            for leaf, part in self.named_children()
        }

    def merged(self, base: nn.Module) -> nn.Module:
        """The module with the values added at their places."""
        with torch.no_grad():
            return with_differences(base, self.differences(base))

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> SparseDifference:
        """Make the differences that a file's tensors fit into."""
        leaves = {key.rpartition(".")[0] for key in tensors}
        if set(tensors) != {f"{leaf}.{key}" for leaf in leaves for key in ("values", "places")}:
            raise ValueError(
                f"a sparse difference has values and places; found {', '.join(tensors)}."
            )
        parts = {}
        for leaf in leaves:
            size = own_parameter(base, leaf).numel()
            values, places = tensors[f"{leaf}.values"], tensors[f"{leaf}.places"]
            inside = places.ndim == 1 and values.shape == places.shape
            if not inside or (
                len(places) and not 0 <= int(places.min()) <= int(places.max()) < size
            ):
                raise ValueError(f"the places of {leaf} do not lie in its {size:,} entries.")
            parts[leaf] = (values, places)
        return cls(parts, **settings)


def scattered(values: Float[Tensor, " kept"], places: Int[Tensor, " kept"], like: Tensor) -> Tensor:
    """A tensor of the shape of `like` that has the values at the places, and 0 elsewhere."""
    full = torch.zeros(like.numel(), dtype=values.dtype, device=values.device)
    return full.index_put((places,), values).view(like.shape)


def zeros_for(parameter: Tensor) -> Tensor:
    """Zeros of a parameter's shape, in float32 at least."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)


def own_parameter(base: nn.Module, leaf: str) -> nn.Parameter:
    """A parameter that a module itself holds.

    Raises:
        ValueError: When it has none of that name, or one that is not of floating-point numbers.
    """
    found = base._parameters.get(leaf)
    if found is None or not found.is_floating_point():
        known = ", ".join(k for k, p in base._parameters.items() if p is not None) or "none"
        raise ValueError(
            f"{type(base).__name__} has no floating-point parameter {leaf!r}; it has {known}."
        )
    return found


def with_differences(base: nn.Module, differences: Mapping[str, Tensor]) -> nn.Module:
    r"""A module with $\theta + \Delta\theta$ in place of some parameters, around the same children.

    Sums are taken in the wider type and rounded once.
    """
    result = copy.copy(base)
    result._parameters = dict(base._parameters)
    for leaf, difference in differences.items():
        old = own_parameter(base, leaf)
        new = added(old.detach(), difference.detach())
        result._parameters[leaf] = nn.Parameter(new, requires_grad=old.requires_grad)
    return result


def own_parameters(model: nn.Module, fits: Callable[[str, str, nn.Parameter], bool]) -> Chosen:
    """The floating-point parameters of a model that a rule takes, by the modules that hold them.

    Args:
        model: Any model.
        fits: From a module's dotted name, a parameter's name in it, and the parameter, to whether
            it is taken.
    """
    found: Chosen = {}
    for path, module in modules_by_name(model).items():
        base = module.base if isinstance(module, WithDeltas) else module
        own = {
            leaf: p
            for leaf, p in base._parameters.items()
            if p is not None and p.is_floating_point() and fits(path, leaf, p)
        }
        if own:
            found[path] = own
    return found


def fitting_parameters(
    model: nn.Module,
    layers: LayerChoice = "*",
    fits: Callable[[str, str, nn.Parameter], bool] = lambda *_: True,
    what: str = "parameters",
) -> Chosen:
    """The parameters of the modules whose names fit, by those modules.

    A tensor that is held in a second place that does not fit, such as an embedding tied to the
    output head, is left out with it.

    Args:
        model: Any model.
        layers: Name patterns of the modules; output heads are left out by default.
        fits: What else must hold, as in `own_parameters`.
        what: How a refusal calls them.

    Raises:
        ValueError: When nothing fits; the sentence names some modules that have such parameters.
    """
    check_loaded(model)
    wanted = Layers.of(layers).on(model)
    every = own_parameters(model, fits)
    others = own_parameters(model, lambda path, leaf, p: not wanted.fit(path))
    outside = {id(p) for own in others.values() for p in own.values()}
    inside = {
        path: {leaf: p for leaf, p in own.items() if id(p) not in outside}
        for path, own in every.items()
    }
    found = {path: own for path, own in inside.items() if own}
    if not found:
        raise ValueError(
            f"no module with {what} fits the pattern {', '.join(wanted.include)}; the model has "
            f"{what} in {', '.join(list(every)[:3]) or 'none'}{', …' if len(every) > 3 else ''}."
        )
    return found


def check_owners(model: nn.Module, chosen: Chosen) -> None:
    """Refuse parameters that the model holds in more places than one, or itself.

    A delta sits on one module. Tied parameters would be changed in one of their places and not in
    the other.

    Raises:
        ValueError: The sentence names the places.
    """
    owners: dict[int, list[str]] = {}
    for path, own in own_parameters(model, lambda *_: True).items():
        for leaf, parameter in own.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{leaf}")
    for path, own in chosen.items():
        for leaf, parameter in own.items():
            places = owners[id(parameter)]
            if len(places) > 1:
                raise ValueError(
                    f"{places[0]} and {places[1]} are one tied parameter, of which a delta could "
                    "change one place only; choose layers without it."
                )
            if path == "":
                raise ValueError(
                    f"{leaf} belongs to the model itself and not to one of its modules, which a "
                    "delta needs to sit on; choose layers without it."
                )


def attach_differences(
    model: Model, name: str, chosen: Chosen, make: Callable[[nn.Module, list[str]], Delta]
) -> Model:
    """Freeze a model and put differences on the chosen parameters.

    Args:
        model: The model; it is not changed.
        name: What to call the delta.
        chosen: Which parameters, as `own_parameters` finds them.
        make: From a module and the names of its chosen parameters to the delta on it.

    Returns:
        A new model on the same frozen tensors, of which only the differences are trained.

    Raises:
        ValueError: A name that is taken, a tied parameter, or a model that rounds its inputs.
    """
    check_name(model, name)
    refuse_rounded_inputs(model)
    check_owners(model, chosen)
    places = modules_by_name(model)
    return attach_deltas(
        model,
        name,
        {
            path: make(
                places[path].base if isinstance(places[path], WithDeltas) else places[path],
                list(own),
            )
            for path, own in chosen.items()
        },
    )
