r"""A linear layer as the product of two thin ones, and when that saves anything.

A weight $W \in \mathbb{R}^{m \times n}$ is replaced by $U V$ with $U \in \mathbb{R}^{m \times r}$
and $V \in \mathbb{R}^{r \times n}$. The layer $y = W x + b$ becomes two layers,
$x \mapsto V x \mapsto U (V x) + b$, with $r (m + n)$ numbers in place of $m n$, and as many
multiplications. Both get fewer only below the *break-even rank*

$$r^\star = \frac{m n}{m + n},$$

which is half the width for a square matrix: a rank of half the full one saves nothing there. How
$U$ and $V$ are chosen is what the methods of this package differ in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.calibration import block_linears
from effnb.core.checks import check_finite, check_loaded
from effnb.core.modules import LayerChoice, Model, linears, replace_modules
from effnb.inference.quantization.linear import refuse_quantized


@dataclass(frozen=True)
class Factors:
    r"""Two matrices whose product stands for a weight.

    Their columns and rows are ordered by importance, so that the first few of them are the factors
    of a smaller rank.

    Attributes:
        left: $U$; the root of each singular value is in it, and the other root in `right`.
        right: $V$.
        singular_values: All singular values of the matrix that was decomposed, also of the parts
            that were dropped. It is $W$ itself, or $W$ scaled by what a method knows of the inputs
            or of the loss.
    """

    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "rank in"]
    singular_values: Float[Tensor, " full_rank"]

    @property
    def rank(self) -> int:
        """The inner size."""
        return self.left.shape[1]

    @property
    def error(self) -> float:
        r"""$\sqrt{\sum_{i > r} \sigma_i^2}$: what is lost, in the norm that the method minimises.

        Plain SVD measures $\lVert W - U V \rVert_F$ (Eckart and Young, 1936), SVD-LLM the error of
        the outputs, $\lVert (W - U V) X \rVert_F$.
        """
        return float(self.singular_values[self.rank :].norm())

    def product(self) -> Float[Tensor, "out in"]:
        """The weight that the factors stand for."""
        return self.left @ self.right

    def truncated(self, rank: int) -> Factors:
        """The factors of a smaller rank.

        Raises:
            ValueError: When there are fewer than `rank` columns.
        """
        check_rank(rank, self.rank)
        return Factors(self.left[:, :rank], self.right[:rank], self.singular_values)


# --- arithmetic -----------------------------------------------------------------------------------


def break_even_rank(out_features: int, in_features: int) -> float:
    r"""$m n / (m + n)$: factors of a lower rank are smaller than the matrix, others are not."""
    return out_features * in_features / (out_features + in_features)


def saves(out_features: int, in_features: int, rank: int) -> bool:
    """Whether factors of this rank hold fewer numbers than the matrix."""
    return rank * (out_features + in_features) < out_features * in_features


def rank_for(kept: float, out_features: int, in_features: int) -> int:
    r"""The largest rank whose factors hold at most a part `kept` of the matrix's numbers.

    $r = \lfloor \rho\, m n / (m + n) \rfloor$, and at least 1.

    Raises:
        ValueError: When `kept` lies outside (0, 1].
    """
    check_kept(kept)
    return max(1, math.floor(kept * break_even_rank(out_features, in_features) + 1e-9))


def check_kept(kept: float) -> None:
    """Refuse a part that is not above 0 and at most 1."""
    if not 0 < kept <= 1:
        raise ValueError(
            f"kept is {kept}; it is the part of the parameters that stay, above 0 and at most 1."
        )


def check_rank(rank: int, full: int) -> None:
    """Refuse a rank that no matrix of this full rank has."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}; it must be a whole number.")
    if not 1 <= rank <= full:
        raise ValueError(f"rank is {rank}; it must lie between 1 and the full rank, {full}.")


def check_weight(weight: Tensor) -> None:
    """Refuse what cannot be factorised: no matrix, or entries that are not finite numbers."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(
            f"the weight has shape {tuple(weight.shape)}; only non-empty matrices are factorised."
        )
    check_finite(weight, purpose="factorised")


def exact(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tensor in float64; on the CPU where the device has none (MPS)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


# --- layers ---------------------------------------------------------------------------------------


class Factorized(nn.Module):
    """What replaces a linear layer or an embedding, in fewer numbers.

    Subclasses say how to rebuild themselves from a few words (`describe`, `empty`), which is what a
    file needs besides the tensors.
    """

    kind: ClassVar[str] = ""
    KINDS: ClassVar[dict[str, type[Factorized]]] = {}

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Remember which class reads the files of this kind."""
        super().__init_subclass__(**keywords)
        Factorized.KINDS[cls.kind] = cls

    def describe(self) -> dict[str, Any]:
        """Shapes and settings that a file must say besides the tensors."""
        raise NotImplementedError

    @classmethod
    def empty(cls, description: Mapping[str, Any], old: nn.Module) -> Factorized:
        """A module of this description in the place of `old`, with zeros in it.

        Raises:
            ValueError: When it does not fit into the place.
        """
        raise NotImplementedError

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The matrix that the module stands for."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The plain module with the same function."""
        raise NotImplementedError


def linear_of(weight: Tensor, bias: Tensor | None = None, trainable: bool = True) -> nn.Linear:
    """A linear layer around given tensors; a bias that is a parameter already is shared."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=trainable)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, trainable)
    return layer


class LowRankLinear(Factorized):
    r"""$y = U (V x) + b$, two ordinary linear layers one after the other.

    The two are `v` and `u`, with the bias in `u`. As they are ordinary, whatever works on linear
    layers (quantization, LoRA) finds them, under the names `*.u` and `*.v`.
    """

    kind = "low_rank"
    u: nn.Module
    v: nn.Module

    def __init__(
        self,
        U: Float[Tensor, "*left"],
        V: Float[Tensor, "*right"],
        bias: Tensor | None = None,
        *,
        trainable: bool = True,
    ) -> None:
        """Make the layer from its factors.

        Args:
            U: (out, rank).
            V: (rank, in).
            bias: (out,); shared if it is a parameter.
            trainable: Whether the factors require gradients.

        Raises:
            ValueError: When the factors do not fit together.
        """
        super().__init__()
        if U.ndim != 2 or V.ndim != 2 or U.shape[1] != V.shape[0] or 0 in (*U.shape, *V.shape):
            raise ValueError(
                f"factors of shapes {tuple(U.shape)} and {tuple(V.shape)} have no product."
            )
        self.v = linear_of(V, None, trainable)
        self.u = linear_of(U, bias, trainable)

    @classmethod
    def replacing(cls, layer: nn.Linear, factors: Factors) -> LowRankLinear:
        """The factors in the type and on the device of the layer they replace, with its bias."""
        old = layer.weight
        return cls(
            factors.left.to(old.device, old.dtype).contiguous(),
            factors.right.to(old.device, old.dtype).contiguous(),
            layer.bias,
            trainable=old.requires_grad,
        )

    @property
    def rank(self) -> int:
        """The inner size."""
        return self.v.out_features

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The product of the factors."""
        return self.u.weight @ self.v.weight

    @property
    def bias(self) -> Tensor | None:
        """What is added to the product."""
        return self.u.bias

    def forward(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Through the narrow middle."""
        return self.u(self.v(inputs))

    def describe(self) -> dict[str, Any]:
        """Sizes."""
        return {"out": self.u.out_features, "in": self.v.in_features, "rank": self.rank}

    @classmethod
    def empty(cls, description: Mapping[str, Any], old: nn.Module) -> LowRankLinear:
        """Zeros in place of a linear layer."""
        check_place(old, description["out"], description["in"])
        like = old.weight
        return cls(
            like.new_zeros(description["out"], description["rank"]),
            like.new_zeros(description["rank"], description["in"]),
            None if old.bias is None else torch.zeros_like(old.bias),
            trainable=like.requires_grad,
        )

    def dense(self) -> nn.Linear:
        """One linear layer with the product as its weight."""
        trainable = any(p.requires_grad for p in self.v.parameters())
        return linear_of(self.weight, self.bias, trainable)

    def extra_repr(self) -> str:
        """The rank, and where it would stop saving."""
        limit = break_even_rank(self.u.out_features, self.v.in_features)
        return f"rank={self.rank}, break_even_rank={limit:.1f}"


def check_place(old: nn.Module, out_features: int, in_features: int) -> None:
    """Refuse to put a layer of these sizes where another kind of module is."""
    if not isinstance(old, nn.Linear) or old.weight.shape != (out_features, in_features):
        held = tuple(old.weight.shape) if hasattr(old, "weight") else ()
        raise ValueError(
            f"a layer of {in_features} inputs and {out_features} outputs does not fit in place of "
            f"a {type(old).__name__} {held}."
        )


# --- models ---------------------------------------------------------------------------------------


def refuse(model: nn.Module) -> None:
    """Refuse a quantized model: a product of factors would not lie on its grid.

    Raises:
        ValueError: When the model has a quantized layer, or weights on the meta device.
    """
    check_loaded(model)
    try:
        refuse_quantized(model)
    except ValueError:
        raise ValueError(
            "this model is quantized already; factorise the original, then quantize the factors."
        ) from None


def choose_layers(
    model: nn.Module,
    layers: LayerChoice = "*",
    *,
    in_blocks: bool = False,
) -> dict[str, nn.Linear]:
    """The linear layers that can be factorised, by name.

    Raises:
        ValueError: When none fits the patterns, one is a factor already or has entries that are not
            finite, or the model is quantized.
    """
    refuse(model)
    found = (block_linears if in_blocks else linears)(model, layers)
    inside = {
        id(part) for m in model.modules() if isinstance(m, Factorized) for part in m.modules()
    }
    for name, layer in found.items():
        if id(layer) in inside:
            raise ValueError(
                f"{name} is part of a layer that is factorised already; factorise the original "
                "model instead, or exclude it."
            )
        try:
            check_weight(layer.weight)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None
    return found


def check_setting(kept: float | None, rank: Any) -> None:
    """Refuse a setting that is no setting for any model."""
    if (kept is None) == (rank is None):
        raise ValueError("give either kept or rank, and not both.")
    if kept is not None:
        check_kept(kept)


def plan(
    layers: Mapping[str, nn.Linear],
    kept: float | None = None,
    rank: int | Mapping[str, int] | None = None,
    *,
    always: bool = False,
) -> dict[str, int]:
    """Which layers become factors, and of which rank.

    A layer whose factors would not be smaller than itself **stays dense** and is not in the answer;
    nor is any where all is kept (`kept` = 1).

    Args:
        layers: The layers by name, see `choose_layers`.
        kept: Part of each layer's numbers that its factors may hold, above 0 and at most 1.
        rank: One rank for all layers (a layer whose full rank is lower takes its full one), or a
            rank by name; layers without one stay dense.
        always: Factorise also where it saves nothing.

    Raises:
        ValueError: Neither or both given, a part or rank out of range, or a name that is none of
            the layers.
        TypeError: When a rank is not a whole number.
    """
    check_setting(kept, rank)
    full = {name: min(layer.weight.shape) for name, layer in layers.items()}
    if isinstance(rank, Mapping):
        for name, wanted in rank.items():
            if name not in layers:
                raise ValueError(f"there is a rank for {name}, which is none of the layers.")
            try:
                check_rank(wanted, full[name])
            except ValueError as problem:
                raise ValueError(f"{name}: {problem}") from None
        ranks = dict(rank)
    elif rank is not None:
        check_rank(rank, max(full.values()))
        ranks = {name: min(rank, most) for name, most in full.items()}
    elif kept == 1 and not always:
        ranks = {}
    else:
        ranks = {name: rank_for(kept, *layer.weight.shape) for name, layer in layers.items()}
    return {
        name: ranks[name]
        for name, layer in layers.items()  # in the model's order
        if name in ranks and (always or saves(*layer.weight.shape, ranks[name]))
    }


def put_factors(model: Model, factors: Mapping[str, Factors]) -> Model:
    """A model with the named linear layers replaced by these factors, sharing everything else."""
    old = {name: model.get_submodule(name) for name in factors}
    return replace_modules(
        model, {name: LowRankLinear.replacing(old[name], f) for name, f in factors.items()}
    )


def ranks_of(model: nn.Module) -> dict[str, int]:
    """The rank of each factorised linear layer, by name; layers that stayed dense are not in it."""
    return {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)}
