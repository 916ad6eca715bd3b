r"""DoRA: learn how long each row of a weight is apart from where it points.

A weight is a magnitude and a direction, $W = \lVert W \rVert_r \odot (W / \lVert W \rVert_r)$, with
one norm for each output unit, taken over its inputs. LoRA moves the direction; the magnitude is a
vector of its own:

$$W' = m \odot \frac{W + s\, B A}{\lVert W + s\, B A \rVert_r}, \qquad
  A \in \mathbb{R}^{r \times in},\ B \in \mathbb{R}^{out \times r},\ m \in \mathbb{R}^{out}.$$

$B$ starts at 0 and $m$ at $\lVert W \rVert_r$, so that training starts from the model as it was. No
gradient goes through the norm, which saves memory, as in the paper.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen, "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024,
arXiv 2402.09353.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_files import attach_state
from effnb.core.deltas import merge
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, share
from effnb.finetuning import peft_files
from effnb.finetuning.lora import LoRA, attach_pairs, from_peft, read_pairs

__all__ = ["DoRA", "attach", "load_peft", "merge"]


class DoRA(LoRA):
    r"""The change $x \mapsto W' x - W x$ of one linear layer.

    Attributes:
        A: (rank, in), as for LoRA.
        B: (out, rank), 0 at the start.
        m: (out,), the row norms of the weight at the start.
    """

    kind = "dora"
    additive = True
    reads_base = True
    m: Float[Tensor, " out"]

    def __init__(self, base: nn.Module, **settings: Any) -> None:
        """Make the matrices and the magnitudes; the settings are those of `LoRA`."""
        super().__init__(base, **settings)
        with torch.no_grad():
            self.m = nn.Parameter(self._norm(_weight(base, self.A.dtype)))

    def _norm(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        r"""$\lVert W + s\, B A \rVert_r$, a constant for the backward pass."""
        with torch.no_grad():
            # The same in every type and for every delta, so that m / norm starts at exactly 1.
            return torch.linalg.vector_norm(weight + self.product(), dim=1)

    def forward(
        self, inputs: Float[Tensor, "*batch in"], output: Float[Tensor, "*batch out"], base: Any
    ) -> Float[Tensor, "*batch out"]:
        """Add the change to the output so far."""
        x = nn.functional.dropout(inputs, self.dropout, self.training).to(self.A.dtype)
        weight = _weight(base, self.A.dtype)
        # $g = m / \lVert W + s\, B A \rVert_r$
        g = self.m / self._norm(weight)
        # $W' x - W x = (g - 1) \odot W x + g \odot s\, B A x$
        change = (g - 1) * (x @ weight.T) + g * (self.scaling * (x @ self.A.T @ self.B.T))
        return (output.to(change.dtype) + change).to(output.dtype)

    def with_base(
        self, inputs: Float[Tensor, "*batch in"], base: nn.Module
    ) -> Float[Tensor, "*batch out"] | None:
        """None: the product with the frozen weight is taken in the type of the delta."""
        return None

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The layer with the weight $m \odot (W + s B A) / \lVert W + s B A \rVert_r$."""
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{type(base).__name__} has no weight that can be replaced.")
        layer = share(base)
        with torch.no_grad():
            wide = weight.to(self.A.dtype)
            # $W' = m \odot (W + s B A) / \lVert W + s B A \rVert_r$
            new = (self.m / self._norm(wide))[:, None] * (wide + self.product())
        layer.weight = nn.Parameter(new.to(weight.dtype), requires_grad=weight.requires_grad)
        return layer

    @classmethod
    def rebuild(cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> DoRA:
        """Make what a file's tensors fit into."""
        if set(tensors) != {"A", "B", "m"} or tensors["A"].ndim != 2:
            raise ValueError(
                f"a DoRA consists of matrices A and B and magnitudes m; found {', '.join(tensors)}."
            )
        if not isinstance(getattr(base, "in_features", None), int):
            raise ValueError(f"a DoRA sits on linear layers; this is a {type(base).__name__}.")
        return cls(base, rank=len(tensors["A"]), **settings)


def _weight(base: nn.Module, dtype: torch.dtype) -> Float[Tensor, "out in"]:
    """The frozen weight of a linear layer, read back where it is stored in few bits.

    Raises:
        ValueError: When the layer has none.
    """
    if not isinstance(base, nn.Linear) and hasattr(base, "dequantized"):
        return base.dequantized(dtype).weight.detach()
    weight = base._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        raise ValueError(f"{type(base).__name__} has no weight whose norms could be taken.")
    return weight.detach().to(dtype)


@chooses_layers
@in_linear_form
def attach(
    model: Model,
    name: str = "default",
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    layers: LayerChoice = "*",
    seed: int = 0,
) -> Model:
    r"""Freeze a model and put a DoRA on its linear layers.

    The function is unchanged, bit for bit, until it is trained. Of several that are active, each
    adds its change of the frozen layer.

    Args:
        model: Any module with linear layers, quantized ones included; it is not changed.
        name: What to call this delta.
        rank: r, at most the smaller side of each layer.
        alpha: $\alpha$; $s = \alpha / r$.
        dropout: Part of the inputs set to 0 in training, for the change only.
        rank_stabilized: $s = \alpha / \sqrt r$ in place of $\alpha / r$.
        layers: Name patterns of the layers.
        seed: Seed of A.

    Returns:
        A new model on the same frozen tensors; only A, B and m require gradients.

    Raises:
        ValueError: A number out of range, a name that is taken, no fitting layer, or a model that
            rounds its inputs, which no gradient passes.
        TypeError: When the rank is not a whole number.
    """
    settings = {"alpha": alpha, "dropout": dropout, "rank_stabilized": rank_stabilized}
    return attach_pairs(DoRA, model, name, rank, settings, layers, seed)


# --- the files of the library peft ----------------------------------------------------------------

_MAGNITUDE = ".lora_magnitude_vector"


def _from_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names of A, B and m to ours."""
    norms = {key: t for key, t in state.items() if key.removesuffix(".weight").endswith(_MAGNITUDE)}
    result = from_peft({key: t for key, t in state.items() if key not in norms})
    for key, tensor in norms.items():
        path = key.removesuffix(".weight").removesuffix(_MAGNITUDE)
        result[f"{path.removeprefix('base_model.model.')}.m"] = tensor.flatten()
    return result


def load_peft(model: Model, folder: str | os.PathLike, name: str = "default") -> Model:
    """Attach a DoRA that the library peft saved.

    Its settings are read by the allow-list of `effnb.finetuning.lora.load_peft`, with `use_dora`
    besides: what is not known to leave A, B and m what they are is refused.

    Raises:
        ValueError: When the folder holds another method, a variant that is not implemented here, or
            tensors that do not fit.
        FileNotFoundError: When a file is missing.
    """
    about, where = peft_files.settings_of(folder), Path(folder).name
    if about.get("peft_type") == "LORA" and about.get("use_dora") is not True:
        raise ValueError(f"{where} holds a LoRA without magnitudes; lora.load_peft reads it.")
    about = {key: value for key, value in about.items() if key != "use_dora"}
    settings, state = read_pairs(folder, about, _from_peft)
    return attach_state(model, name, "dora", settings, state)
