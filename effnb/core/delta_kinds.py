"""What a delta is: the change that is trained on top of one module of a frozen model.

A method subclasses `Delta` and says what the change is: of the module's output, of its parameters,
or of the way in which it runs. `effnb.core.delta_hosts` applies it; `effnb.core.deltas` attaches,
saves and merges it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

KINDS: dict[str, type[Delta]] = {}
"""The classes that have a kind; importing a method's module adds its own."""


class Delta(nn.Module):
    """The change that is trained on top of one module. Subclasses say which.

    Attributes:
        kind: Name of the method, written into files.
        additive: Whether it adds something to the output that depends on the input alone. Only
            such deltas can be merged while others come before them.
        reads_base: Whether what it does follows from the frozen weights under it. No other delta of
            the same module can be merged into them while it is active.
        on_linears: Whether it sits on linear layers, so that `Conv1D` layers and fused experts take
            their linear form under it.
        alone: What it is, where a module cannot carry two of them at once ("mask"); else empty.
        in_place: Whether it changes more than an output: it then runs the module itself, in
            `around`, and `forward` is never called. It may sit on a whole block or model, whose
            parts keep their names.
    """

    kind: ClassVar[str] = ""
    additive: ClassVar[bool] = False
    reads_base: ClassVar[bool] = False
    on_linears: ClassVar[bool] = False
    alone: ClassVar[str] = ""
    in_place: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Remember which class reads the files of this kind."""
        super().__init_subclass__(**keywords)
        if cls.kind:
            KINDS[cls.kind] = cls

    def forward(self, inputs: Any, output: Any, base: nn.Module) -> Any:
        """The new output of a module, from its inputs, its output so far and the module itself."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does to an output.")

    def differences(self, base: nn.Module) -> dict[str, Tensor]:
        r"""What it adds to the module's own parameters, by their names, before the module runs.

        Nothing is the default. $\theta' = \theta + \sum_i \Delta\theta_i$: each delta finds its
        difference from the frozen parameters, and those of several active deltas are summed.
        """
        return {}

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """The output of a module that `run` runs, with the deltas before this one.

        Only deltas that are `in_place` have it; `base` is the module, for its settings.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it runs a module.")

    def with_base(self, inputs: Any, base: nn.Module) -> Any:
        """The output of the module and this delta computed at once, or None: first one, then this.

        None is the default, and always right. A delta that has a faster way for both together
        answers here; the result must be that of `forward` on `base(inputs)`, up to rounding. It is
        asked only where the module has one input, this delta is the only active one, and nothing
        would miss the calls that are saved (`WithDeltas`).
        """
        return None

    def merged(self, base: nn.Module) -> nn.Module:
        """A module of the same class as `base` that does what `base` with this delta does.

        Raises:
            ValueError: When there is none, which is the default.
        """
        raise ValueError(f"a delta of kind {self.kind!r} cannot be merged into the weights.")

    def settings(self) -> dict[str, Any]:
        """What a file must say besides the tensors; the same on all layers of one delta."""
        return {}

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> Delta:
        """Make the delta of one module from what a file says; `tensors` are loaded afterwards.

        Raises:
            ValueError: When the tensors do not fit the module.
        """
        raise NotImplementedError(f"{cls.__name__} cannot be read from a file.")

    @classmethod
    def rebuild_all(
        cls,
        modules: Mapping[str, nn.Module],
        settings: dict[str, Any],
        layers: Mapping[str, dict[str, Tensor]],
    ) -> dict[str, Delta]:
        """Make the deltas of all modules: one for each that has tensors, unless overridden.

        Args:
            modules: Every module of the model by name, without the deltas that it carries.
            settings: What `settings` gave.
            layers: From names of modules to their tensors in the file.

        Raises:
            ValueError: When the tensors do not fit; the sentence names the module.
        """
        found = {}
        for path, tensors in layers.items():
            try:
                found[path] = cls.rebuild(modules[path], settings, tensors)
            except ValueError as problem:
                raise ValueError(f"{path}: {problem}") from None
        return found
