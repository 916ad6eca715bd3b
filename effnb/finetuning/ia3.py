r"""(IA)^3: rescale keys, values and the feed-forward's inner activation by learned vectors.

Three vectors in each block, all of them 1 at the start, so that nothing changes:

$$\text{softmax}\Big(\frac{Q\,(l_k \odot K)^T}{\sqrt{d_h}}\Big)\,(l_v \odot V), \qquad
  \big(l_{\text{ff}} \odot \gamma(x W_1)\big)\, W_2,$$

$d_k + d_v + d_{\text{ff}}$ numbers a block. Keys and values are outputs of linear layers, bias and
all: $l \odot (W x + b)$. The inner activation is an input of one: $W (l \odot x) + b$. Both merge
into the layer, at no cost afterwards: $W \leftarrow \text{diag}(l)\, W$, $b \leftarrow l \odot b$
in the first case, $W \leftarrow W\, \text{diag}(l)$ in the second.

Weight decay would pull the vectors to 0, which is not where they start; `effnb.core.training.adamw`
spares vectors.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel, "Few-Shot Parameter-Efficient Fine-Tuning is Better
and Cheaper than In-Context Learning", 2022, arXiv 2205.05638.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_files import attach_state
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    check_name,
    delta_state_dict,
    hosts,
    linear_layers,
    refuse_rounded_inputs,
)
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import Layers, Model, share
from effnb.core.sublayers import find_sublayers
from effnb.finetuning import peft_files

PARTS = ("keys", "values", "feedforward")


class IA3(Delta):
    r"""A vector that rescales what a linear layer puts out, or what it reads.

    Attributes:
        output: (out,), $l$ of $l \odot (W x + b)$; only in a delta on outputs.
        input: (in,), $l$ of $W (l \odot x) + b$; only in a delta on inputs.
    """

    kind = "ia3"
    on_linears = True

    def __init__(self, base: nn.Module, side: str) -> None:
        """All ones for one side of a linear layer, "output" or "input"."""
        super().__init__()
        self.side = side
        held = next(chain(base.parameters(), base.buffers()), torch.empty(0))
        dtype = torch.float64 if held.dtype == torch.float64 else torch.float32
        size = base.out_features if side == "output" else base.in_features
        self.register_parameter(
            side, nn.Parameter(torch.ones(size, dtype=dtype, device=held.device))
        )

    @property
    def scale(self) -> Float[Tensor, " features"]:
        """$l$."""
        return getattr(self, self.side)

    @property
    def additive(self) -> bool:
        r"""Rescaled inputs add $W ((l - 1) \odot x)$; rescaled outputs act on earlier deltas."""
        return self.side == "input"

    @property
    def reads_base(self) -> bool:
        """Rescaled inputs go through the weight again."""
        return self.side == "input"

    def forward(
        self, inputs: Float[Tensor, "*batch in"], output: Float[Tensor, "*batch out"], base: Any
    ) -> Float[Tensor, "*batch out"]:
        """Rescale the output, or add what rescaled inputs change in it."""
        if self.side == "output":
            return (output.to(self.scale.dtype) * self.scale).to(output.dtype)
        # W (l x) + b = (W x + b) + W (l x) - W x
        return output + (base(self._rescaled(inputs)) - base(inputs))

    def with_base(
        self, inputs: Float[Tensor, "*batch in"], base: nn.Module
    ) -> Float[Tensor, "*batch out"] | None:
        """One pass through the layer instead of three, where inputs are rescaled."""
        return base(self._rescaled(inputs)) if self.side == "input" else None

    def _rescaled(self, inputs: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        return (inputs.to(self.scale.dtype) * self.scale).to(inputs.dtype)

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The layer with $\text{diag}(l)\,W$ and $l \odot b$, or with $W\,\text{diag}(l)$."""
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(f"{type(base).__name__} has no weight that a vector can rescale.")
        layer, scale = share(base), self.scale.detach()
        rows = scale[:, None] if self.side == "output" else scale

        def rescaled(old: nn.Parameter, by: Tensor) -> nn.Parameter:
            new = (old.detach().to(by.dtype) * by).to(old.dtype)
            return nn.Parameter(new, requires_grad=old.requires_grad)

        layer.weight = rescaled(weight, rows)
        if self.side == "output" and base.bias is not None:
            layer.bias = rescaled(base.bias, scale)
        return layer

    @classmethod
    def rebuild(cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> IA3:
        """Make the vector that a file's tensor fits into."""
        if len(tensors) != 1 or not {"input", "output"} & set(tensors):
            raise ValueError(
                f"(IA)^3 is one vector, input or output, on a layer; found {', '.join(tensors)}."
            )
        if not all(
            isinstance(getattr(base, k, None), int) for k in ("in_features", "out_features")
        ):
            raise ValueError(f"(IA)^3 sits on linear layers; this is a {type(base).__name__}.")
        return cls(base, next(iter(tensors)), **settings)

    def extra_repr(self) -> str:
        """Which side, and how many numbers."""
        return f"{self.side}={len(self.scale)}"


@in_linear_form
def attach(
    model: Model,
    name: str = "default",
    *,
    parts: str | Iterable[str] = PARTS,
    outputs: str | Iterable[str] | None = None,
    inputs: str | Iterable[str] | None = None,
) -> Model:
    """Freeze a model and rescale keys, values and inner activations by vectors of ones.

    Args:
        model: Any model with one stack of blocks, quantized or not, or any module with linear
            layers whose names are given; it is not changed.
        name: What to call this delta.
        parts: Which of "keys", "values" and "feedforward" to rescale. Their layers are found by
            running the model; see `effnb.core.sublayers`.
        outputs: Name patterns of layers whose outputs are rescaled, in place of `parts`; for T5
            `["*.k", "*.v"]`.
        inputs: Name patterns of layers whose inputs are rescaled, in place of `parts`; for T5
            `"*.wo"`.

    Returns:
        A new model on the same frozen tensors; only the vectors require gradients.

    Raises:
        ValueError: When a name is taken, a part is unknown or not found (keys and values from one
            fused matrix, experts), no layer fits a pattern, or one fits both sides.
    """
    check_name(model, name)
    refuse_rounded_inputs(model)
    parts = [parts] if isinstance(parts, str) else list(parts)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise ValueError(f"parts is {', '.join(parts) or 'empty'}; choose of {', '.join(PARTS)}.")
    if outputs is None and inputs is None:
        sides = _found(model, parts)
    else:
        chosen = {"output": outputs, "input": inputs}
        named = {
            side: list(linear_layers(model, Layers(patterns)))
            for side, patterns in chosen.items()
            if patterns is not None
        }
        both = set(named.get("output", ())) & set(named.get("input", ()))
        if both:
            raise ValueError(f"{min(both)} fits the patterns of outputs and of inputs; choose one.")
        sides = {path: side for side, paths in named.items() for path in paths}
    layers = linear_layers(model, Layers(exclude=()))
    deltas = {path: IA3(getattr(layers[path], "base", layers[path]), sides[path]) for path in sides}
    return attach_deltas(model, name, deltas)


def _found(model: nn.Module, parts: list[str]) -> dict[str, str]:
    """The layers of the parts, each with the side that is rescaled."""
    fields = {"keys": "keys", "values": "values", "feedforward": "feedforward_out"}
    blocks = find_sublayers(model, *(fields[part] for part in parts))
    return {
        getattr(block, fields[part]): "input" if part == "feedforward" else "output"
        for block in blocks
        for part in parts
    }


# --- the files of the library peft ----------------------------------------------------------------

# What a file may say, and which values leave one vector on a linear layer what it is.
_KNOWN: peft_files.Known = {
    **peft_files.ORIGIN,
    "peft_type": ("IA3",),
    # Which layers, and which side of them: the tensors' names and shapes say it.
    "target_modules": None,
    "exclude_modules": None,
    "feedforward_modules": None,
    "fan_in_fan_out": (True, False),  # how the layer stores its weight
    "init_ia3_weights": (True, False),  # how training started
    "task_type": None,
}


def to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape the vectors as the library peft does in its files."""
    return {
        f"{peft_files.PREFIX}{path}.ia3_l": tensor[:, None] if side == "output" else tensor[None]
        for path, side, tensor in ((*key.rsplit(".", 1), t) for key, t in state.items())
    }


def from_peft(state: Mapping[str, Tensor], feedforward: Any = ()) -> dict[str, Tensor]:
    """The inverse of `to_peft`.

    Args:
        state: Tensors of a file, (out, 1) or (1, in).
        feedforward: The setting `feedforward_modules`, which decides where a shape does not.

    Raises:
        ValueError: When there is more in it than vectors on linear layers, or a vector's shape is
            not that of the side the setting says.
    """
    result = {}
    for key, tensor in state.items():
        path = key.removeprefix(peft_files.PREFIX).removesuffix(".ia3_l")
        if key != f"{peft_files.PREFIX}{path}.ia3_l" or tensor.ndim != 2 or 1 not in tensor.shape:
            raise ValueError(f"{key} is no vector of (IA)^3 on a linear layer.")
        if isinstance(feedforward, str):
            inward = re.fullmatch(feedforward, path) is not None
        else:
            inward = any(path.endswith(end) for end in feedforward or ())
        if tensor.shape[0 if inward else 1] != 1:
            side = "inputs" if inward else "outputs"
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, but the settings say that it rescales "
                f"{side}."
            )
        result[f"{path}.{'input' if inward else 'output'}"] = tensor.flatten()
    return result


def save_peft(model: nn.Module, name: str, folder: str | os.PathLike) -> None:
    """Write the vectors as a folder that `peft.PeftModel.from_pretrained` reads.

    Raises:
        ValueError: When no (IA)^3 of that name is attached.
    """
    layers = {path: host.deltas[name] for path, host in hosts(model, name).items()}
    first = next(iter(layers.values()))
    if not isinstance(first, IA3):
        raise ValueError(f"the delta {name!r} is of kind {first.kind!r}, not (IA)^3.")
    about = {
        "peft_type": "IA3",
        "target_modules": list(layers),
        "feedforward_modules": [path for path, delta in layers.items() if delta.side == "input"],
    }
    peft_files.write(folder, about, to_peft(delta_state_dict(model, name)))


def load_peft(model: Model, folder: str | os.PathLike, name: str = "default") -> Model:
    """Attach an (IA)^3 that the library peft saved.

    Raises:
        ValueError: When the folder holds another method, a setting that is not understood (modules
            trained beside it), or vectors that do not fit the model.
        FileNotFoundError: When a file is missing.
    """
    about = peft_files.settings_of(folder)
    peft_files.check(about, _KNOWN, Path(folder).name)
    state = from_peft(peft_files.tensors_of(folder), about.get("feedforward_modules"))
    return attach_state(model, name, "ia3", {}, state)
