r"""Adapters: small bottleneck networks inside a frozen transformer.

A bottleneck reads $d$ channels, narrows them to $m$ and widens them again,

$$B(z) = \varphi(z\, W_d + b_d)\, W_u + b_u, \qquad W_d \in \mathbb{R}^{d \times m},\
  W_u \in \mathbb{R}^{m \times d},$$

$2 d m + m + d$ numbers. $W_u$ and $b_u$ start at 0, so that training starts from the model as it
was; $W_d$ starts at random, so that $W_u$ has a gradient. With $h$ the output of a sublayer
(attention or feed-forward), $x$ its input and $r$ the residual stream before it, the placements are

- Houlsby, two a block, on the outputs of both sublayers: $h \leftarrow h + B(h)$, before the
  stream and its norm;
- Pfeiffer, one a block, behind the feed-forward: $y = \text{LN}(r + h + B(\text{LN}(r + h)))$ in a
  block that ends in a norm (BERT), $y = r + h + B(r + h)$ in one that does not (Llama);
- parallel: $h \leftarrow h + s\,B(x)$, beside the feed-forward, attention or both.

The nonlinearity $\varphi$ keeps an adapter from being merged: it costs its latency for good.
Houlsby et al. train the norms too: `set_trainable(model, name, also="*Norm*")` does.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly,
"Parameter-Efficient Transfer Learning for NLP", 2019, arXiv 1902.00751. Pfeiffer, Kamath, Rücklé,
Cho, Gurevych, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2020, arXiv
2005.00247. He, Zhou, Ma, Berg-Kirkpatrick, Neubig, "Towards a Unified View of Parameter-Efficient
Transfer Learning", 2021, arXiv 2110.04366.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_kinds import Delta
from effnb.core.deltas import attach_deltas, check_name, refuse_rounded_inputs
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import Model
from effnb.core.sublayers import Sublayers, find_sublayers

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
SUBLAYERS = ("feedforward", "attention")


class Bottleneck(Delta):
    r"""$B(z) = \varphi(z W_d + b_d) W_u + b_u$; subclasses say where it reads and adds.

    The tensors are kept in float32 at least, also where the model computes in half precision.

    Attributes:
        down: $W_d^T$, (m, d), normal with standard deviation 0.02 (of parallel adapters: Kaiming's
            uniform) at the start.
        down_bias: $b_d$, (m,).
        up: $W_u^T$, (d, m), 0 at the start.
        up_bias: $b_u$, (d,), 0 at the start.
    """

    on_linears = True
    down: Float[Tensor, "m d"]
    down_bias: Float[Tensor, " m"]
    up: Float[Tensor, "d m"]
    up_bias: Float[Tensor, " d"]

    def __init__(
        self,
        base: nn.Module,
        *,
        width: int,
        size: int,
        activation: str,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the tensors for a stream of `width` channels, d, and a bottleneck of `size`, m."""
        super().__init__()
        check_settings(size, activation)
        self.activation = activation
        held = next(iter(base.parameters()), torch.empty(0))
        dtype = torch.float64 if held.dtype == torch.float64 else torch.float32
        down = torch.empty(size, width, dtype=dtype)  # drawn on the CPU: the same on every device
        self._draw(down, generator)
        self.down = nn.Parameter(down.to(held.device))
        self.down_bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=held.device))
        self.up = nn.Parameter(torch.zeros(width, size, dtype=dtype, device=held.device))
        self.up_bias = nn.Parameter(torch.zeros(width, dtype=dtype, device=held.device))

    def _draw(self, down: Tensor, generator: torch.Generator | None) -> None:
        down.normal_(0, 0.02, generator=generator)

    def bottleneck(self, z: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        r"""$B(z)$, in the precision of its tensors."""
        inner = nn.functional.linear(z.to(self.down.dtype), self.down, self.down_bias)
        return nn.functional.linear(ACTIVATIONS[self.activation](inner), self.up, self.up_bias)

    def plus(
        self, h: Float[Tensor, "*batch d"], change: Float[Tensor, "*batch d"]
    ) -> Float[Tensor, "*batch d"]:
        """Their sum, rounded once to the type of the first."""
        return (h.to(change.dtype) + change).to(h.dtype)

    def merged(self, base: nn.Module) -> nn.Module:
        """Refuse."""
        raise ValueError(
            "an adapter has a nonlinearity inside, so that no weight computes what it adds; keep "
            "it attached."
        )

    def settings(self) -> dict[str, Any]:
        """What the shapes do not say."""
        return {"activation": self.activation}

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> Bottleneck:
        """Make the adapter that a file's tensors fit into."""
        if set(tensors) != {"down", "down_bias", "up", "up_bias"} or tensors["down"].ndim != 2:
            raise ValueError(
                "an adapter consists of down, down_bias, up and up_bias; found "
                f"{', '.join(tensors)}."
            )
        size, width = tensors["down"].shape
        own = {getattr(m, "out_features", None) for m in base.modules()} | {
            len(p) for p in base.parameters(recurse=False) if p.ndim == 1
        }
        if width not in own:
            raise ValueError(
                f"the adapter is for {width} channels, and nothing in this {type(base).__name__} "
                "puts out so many."
            )
        return cls(base, width=width, size=size, **settings)

    def extra_repr(self) -> str:
        """Both sizes."""
        return f"width={self.down.shape[1]}, size={self.down.shape[0]}, {self.activation}"


class HoulsbyAdapter(Bottleneck):
    r"""$h \leftarrow h + B(h)$ on the linear layer that ends a sublayer."""

    kind = "houlsby"

    def forward(
        self, inputs: Any, output: Float[Tensor, "*batch d"], base: Any
    ) -> Float[Tensor, "*batch d"]:
        """Add what the bottleneck makes of the output."""
        return self.plus(output, self.bottleneck(output))


class PfeifferAdapter(Bottleneck):
    """Behind the feed-forward: around a block, or around the norm that ends it."""

    kind = "pfeiffer"
    in_place = True

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """Run the block or norm, and add what the bottleneck makes of its output."""
        output = run(*arguments, **keywords)
        y = output[0] if isinstance(output, tuple) else output
        change = self.bottleneck(y)
        if _is_leaf(base):  # y = LN(r + h + B(LN(r + h)))
            (stream,) = (*arguments, *keywords.values())
            return run(self.plus(stream, change))
        y = self.plus(y, change)  # y = r + h + B(r + h)
        return (y, *output[1:]) if isinstance(output, tuple) else y


class ParallelAdapter(Bottleneck):
    r"""$h \leftarrow h + s\,B(x)$ beside a sublayer: around what holds its first and last layer.

    Attributes:
        scale: $s$.
        reads: Name, within that module, of the linear layer whose input is $x$.
        adds: Name of the linear layer whose output is $h$.
    """

    kind = "parallel-adapter"
    in_place = True

    def __init__(
        self, base: nn.Module, *, scale: float, reads: str, adds: str, **rest: Any
    ) -> None:
        """As `Bottleneck`, with what is special here.

        Raises:
            ValueError: When the module has no such layers.
        """
        super().__init__(base, **rest)
        modules = dict(base.named_modules())
        missing = [name for name in (reads, adds) if name not in modules]
        if missing:
            raise ValueError(f"this {type(base).__name__} has no layer {missing[0]}.")
        self.scale, self.reads, self.adds = scale, reads, adds

    def _draw(self, down: Tensor, generator: torch.Generator | None) -> None:
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """Run the module, with the second path from its first layer's input to its last output."""
        seen: list[Tensor] = []

        def see(module: nn.Module, inputs: tuple) -> None:
            seen[:] = [inputs[0]]

        def add(module: nn.Module, inputs: tuple, h: Tensor) -> Tensor:
            # h <- h + s B(x)
            return self.plus(h, self.scale * self.bottleneck(seen[0]).view(h.shape))

        hooks = [
            base.get_submodule(self.reads).register_forward_pre_hook(see),
            base.get_submodule(self.adds).register_forward_hook(add),
        ]
        try:
            return run(*arguments, **keywords)
        finally:
            for hook in hooks:
                hook.remove()

    def settings(self) -> dict[str, Any]:
        """What the shapes do not say."""
        about = {"scale": self.scale, "reads": self.reads, "adds": self.adds}
        return super().settings() | about


def _is_leaf(module: nn.Module) -> bool:
    return not any(name != "deltas" for name, _ in module.named_children())


def check_settings(size: int, activation: str) -> None:
    """Refuse what no adapter could be made of.

    Raises:
        ValueError: A bottleneck below 1, or an unknown activation.
    """
    if size < 1:
        raise ValueError(f"size is {size}; a bottleneck has at least 1 channel.")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; choose one of {', '.join(ACTIVATIONS)}.")


@in_linear_form
def attach(
    model: Model,
    name: str = "default",
    *,
    placement: str = "houlsby",
    size: int = 64,
    activation: str | None = None,
    scale: float = 4.0,
    sublayers: str = "feedforward",
    seed: int = 0,
) -> Model:
    """Freeze a model and put adapters into its blocks; the function is unchanged at the start.

    Where sublayers begin and end is found by running the model; see `effnb.core.sublayers`.

    Args:
        model: A model with one stack of blocks that runs on `input_ids`, quantized or not; it is
            not changed.
        name: What to call this delta.
        placement: "houlsby", "pfeiffer" or "parallel".
        size: m, channels of the bottleneck.
        activation: "gelu", "relu", "silu" or "tanh"; by default GELU in Houlsby's placement and
            ReLU in the others.
        scale: s of a parallel adapter.
        sublayers: What a parallel adapter lies beside: "feedforward" or "attention".
        seed: Seed of the matrices that narrow.

    Returns:
        A new model on the same frozen tensors; only the adapters require gradients.

    Raises:
        ValueError: An unknown placement, activation or sublayer, a size below 1, a name that is
            taken, or a model in which the sublayers are not found (experts, encoder-decoders).
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; choose one of {', '.join(PLACEMENTS)}.")
    if sublayers not in SUBLAYERS:
        raise ValueError(f"sublayers is {sublayers!r}; choose one of {', '.join(SUBLAYERS)}.")
    if not (math.isfinite(scale) and scale):
        raise ValueError(f"scale is {scale}; it must be a finite number other than 0.")
    activation = activation or ("gelu" if placement == "houlsby" else "relu")
    check_settings(size, activation)
    check_name(model, name)
    refuse_rounded_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    rest = {"size": size, "activation": activation, "generator": generator}
    modules = dict(model.named_modules())
    deltas: dict[str, Delta] = {}
    for block in find_sublayers(model, *_needed(placement, sublayers)):
        common = {**rest, "width": block.width}
        if placement == "houlsby":
            for path in (block.attention_out, block.feedforward_out):
                base = getattr(modules[path], "base", modules[path])
                deltas[path] = HoulsbyAdapter(base, **common)
        elif placement == "pfeiffer":
            path = block.norm or block.block
            base = getattr(modules[path], "base", modules[path]) if block.norm else modules[path]
            deltas[path] = PfeifferAdapter(base, **common)
        else:
            path, reads, adds = _around(block, sublayers)
            deltas[path] = ParallelAdapter(
                modules[path], scale=float(scale), reads=reads, adds=adds, **common
            )
    return attach_deltas(model, name, deltas)


def _needed(placement: str, sublayers: str) -> tuple[str, ...]:
    """Which parts of a block a placement asks for."""
    if placement == "houlsby":
        return ("attention_out", "feedforward_out")
    if placement == "pfeiffer":
        return ("feedforward_out",)
    return (f"{sublayers}_in", f"{sublayers}_out")


def _around(block: Sublayers, sublayers: str) -> tuple[str, str, str]:
    """The smallest module that holds a sublayer's first and last layer, and their names in it."""
    first, last = (getattr(block, f"{sublayers}_{end}") for end in ("in", "out"))
    path = first
    while not (first.startswith(f"{path}.") and last.startswith(f"{path}.")):
        path = path.rpartition(".")[0]
    return path, first.removeprefix(f"{path}."), last.removeprefix(f"{path}.")
