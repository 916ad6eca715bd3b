r"""LoRA: learn the change of a weight as a product of two thin matrices.

A frozen layer $y = W x$ gets a second path through $r$ numbers:

$$y = W x + s\, B A x, \qquad A \in \mathbb{R}^{r \times in},\ B \in \mathbb{R}^{out \times r},
  \qquad s = \alpha / r.$$

$B$ starts at 0, so that training starts from the model as it was; $A$ starts at random, so that
$B$ has a gradient. Only $r\,(in + out)$ numbers per layer are trained, saved and swapped. After
training, $W + s B A$ has the shape of $W$: merged, the change costs nothing at inference.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv 2106.09685. The
scaling $s = \alpha / \sqrt r$: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning
with LoRA", 2023, arXiv 2312.03732.

What is done with a LoRA once it is attached is the same for every delta, and comes from
`effnb.core.deltas`: `delta_state_dict`, `load_delta`, `set_active`, `set_trainable`, `merge`,
`detach`, `save_delta`, `open_delta`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.delta_files import attach_state, open_delta, read_delta, save_delta
from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    attached,
    check_name,
    delta_parameters,
    delta_state_dict,
    detach,
    hosts,
    linear_layers,
    load_delta,
    merge,
    refuse_rounded_inputs,
    set_active,
    set_trainable,
)
from effnb.core.linear_form import in_linear_form
from effnb.core.modules import LayerChoice, Model, chooses_layers, share
from effnb.finetuning import peft_files
from effnb.kernels.gathered_lora import lora_update
from effnb.kernels.lora import in_one_pass
from effnb.kernels.lora import lora as layer_and_update

__all__ = [
    "LoRA",
    "attach",
    "attach_state",
    "attached",
    "delta_parameters",
    "delta_state_dict",
    "detach",
    "from_peft",
    "hosts",
    "load_delta",
    "load_peft",
    "merge",
    "open_delta",
    "read_delta",
    "save_delta",
    "save_peft",
    "set_active",
    "set_trainable",
    "to_peft",
]


class LoRA(Delta):
    r"""The path $x \mapsto s\, B A \operatorname{dropout}(x)$ beside one linear layer.

    The two matrices are kept in float32 at least, also where the layer computes in half precision:
    small steps would be lost in rounding.

    Attributes:
        A: (rank, in), uniform in $\pm 1 / \sqrt{in}$ at the start.
        B: (out, rank), 0 at the start.
        scaling: $s$.
    """

    kind = "lora"
    additive = True
    on_linears = True
    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]

    def __init__(
        self,
        base: nn.Module,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the matrices for a linear layer; see `attach` for what the numbers mean.

        Raises:
            ValueError: When one of them is out of range for this layer.
        """
        super().__init__()
        check_settings(rank, alpha, dropout)
        n_in, n_out = base.in_features, base.out_features
        if rank > min(n_in, n_out):
            raise ValueError(
                f"rank is {rank}; a layer of {n_in} inputs and {n_out} outputs has at most "
                f"rank {min(n_in, n_out)}."
            )
        self.alpha, self.dropout = float(alpha), float(dropout)
        self.rank_stabilized = rank_stabilized
        self.scaling = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        # Whatever the layer is stored in, its tensors say the device.
        held = next(chain(base.parameters(), base.buffers()), torch.empty(0))
        dtype = torch.float64 if held.dtype == torch.float64 else torch.float32
        a = torch.empty(rank, n_in, dtype=dtype)  # drawn on the CPU: the same on every device
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(a.to(held.device))
        self.B = nn.Parameter(torch.zeros(n_out, rank, dtype=dtype, device=held.device))

    @property
    def rank(self) -> int:
        """The inner size r."""
        return len(self.A)

    def forward(
        self, inputs: Float[Tensor, "*batch in"], output: Float[Tensor, "*batch out"], base: Any
    ) -> Float[Tensor, "*batch out"]:
        """Add the second path to the output of the first.

        Between inputs and output everything is float32, and rounded once.
        """
        x = nn.functional.dropout(inputs, self.dropout, self.training)
        # $h = W x + \frac{\alpha}{r} B A x$, where the output so far is $W x$
        return lora_update(x, self.A, self.B, self.scaling, output)

    def with_base(
        self, inputs: Float[Tensor, "*batch in"], base: nn.Module
    ) -> Float[Tensor, "*batch out"] | None:
        """Layer and update in one pass, where a kernel can: on a GPU, above a plain linear layer.

        Not while dropout is active, under which the two have different inputs, nor under autocast,
        which changes the types between them.
        """
        if type(base) is not nn.Linear or (self.training and self.dropout):
            return None
        plain = all(type(t) in (Tensor, nn.Parameter) for t in (inputs, base.weight))
        if not plain or torch.is_autocast_enabled(inputs.device.type):
            return None
        if not in_one_pass(inputs, base.weight, self.A, self.B, base.bias):
            return None
        return layer_and_update(inputs, base.weight, self.A, self.B, self.scaling, base.bias)

    def product(self) -> Float[Tensor, "out in"]:
        r"""$s\, B A$, the change of the weight."""
        return self.scaling * (self.B @ self.A)

    def merged(self, base: nn.Module) -> nn.Module:
        r"""The layer with the weight $W + s\, B A$."""
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
            raise ValueError(
                f"{type(base).__name__} has no weight that the product can be added to."
            )
        layer = share(base)
        with torch.no_grad():
            new = (weight.to(self.A.dtype) + self.product()).to(weight.dtype)
        layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
        return layer

    def settings(self) -> dict[str, Any]:
        """Everything but the rank, which the shapes say."""
        return {
            "alpha": self.alpha,
            "dropout": self.dropout,
            "rank_stabilized": self.rank_stabilized,
        }

    @classmethod
    def rebuild(cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]) -> LoRA:
        """Make the matrices that a file's tensors fit into."""
        if set(tensors) != {"A", "B"} or tensors["A"].ndim != 2:
            raise ValueError(f"a LoRA consists of matrices A and B; found {', '.join(tensors)}.")
        if not all(
            isinstance(getattr(base, k, None), int) for k in ("in_features", "out_features")
        ):
            raise ValueError(f"a LoRA sits on linear layers; this is a {type(base).__name__}.")
        return cls(base, rank=len(tensors["A"]), **settings)

    def extra_repr(self) -> str:
        """Rank and scaling."""
        return f"rank={self.rank}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def check_settings(rank: int, alpha: float, dropout: float) -> None:
    """Refuse numbers that no layer could take.

    Raises:
        ValueError: Rank below 1, alpha not above 0, dropout outside [0, 1).
        TypeError: When the rank is not a whole number.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank is {rank!r}; it must be a whole number.")
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha is {alpha}; it must be above 0.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1).")


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
    r"""Freeze a model and lay a LoRA beside its linear layers.

    The function is unchanged until B is trained: bit for bit, but for the order of sums on a GPU,
    where a kernel computes layer and path in one pass. Several with different names may be
    attached; those active are summed.

    Args:
        model: Any module with linear layers, quantized ones included; it is not changed.
        name: What to call this delta.
        rank: r, at most the smaller side of each layer.
        alpha: $\alpha$; with $s = \alpha / r$, doubling it doubles the change that given matrices
            make.
        dropout: Part of the inputs of A set to 0 in training.
        rank_stabilized: $s = \alpha / \sqrt r$ in place of $\alpha / r$, under which the size of
            the change does not shrink as r grows.
        layers: Name patterns of the layers. The paper takes the query and value projections
            (`["*.q_proj", "*.v_proj"]`); QLoRA all linear layers.
        seed: Seed of A.

    Returns:
        A new model on the same frozen tensors; only A and B require gradients.

    Raises:
        ValueError: A number out of range, a name that is taken, no fitting layer, or a model that
            rounds its inputs, which no gradient passes.
        TypeError: When the rank is not a whole number.
    """
    settings = {"alpha": alpha, "dropout": dropout, "rank_stabilized": rank_stabilized}
    return attach_pairs(LoRA, model, name, rank, settings, layers, seed)


def attach_pairs(
    kind: type[LoRA],
    model: Model,
    name: str,
    rank: int,
    settings: Mapping[str, Any],
    layers: LayerChoice,
    seed: int,
) -> Model:
    """Freeze a model and lay a LoRA, or what is built on one, beside its linear layers.

    Raises:
        ValueError: As `attach`; what a layer cannot take is said with the layer's name.
        TypeError: When the rank is not a whole number.
    """
    check_settings(rank, settings["alpha"], settings["dropout"])
    check_name(model, name)
    refuse_rounded_inputs(model)
    generator = torch.Generator().manual_seed(seed)
    deltas: dict[str, Delta] = {}
    for path, layer in linear_layers(model, layers).items():
        base = layer.base if isinstance(layer, WithDeltas) else layer
        try:
            deltas[path] = kind(base, rank=rank, generator=generator, **settings)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
    return attach_deltas(model, name, deltas)


# --- the files of the library peft ----------------------------------------------------------------


def to_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a LoRA as the library peft names them in its files."""
    return {
        f"{peft_files.PREFIX}{path}.lora_{leaf}.weight": tensor
        for path, leaf, tensor in ((*key.rsplit(".", 1), t) for key, t in state.items())
    }


def from_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_peft`.

    Raises:
        ValueError: When there is more in it than the matrices of linear layers.
    """
    result = {}
    for key, tensor in state.items():
        path, dot, leaf = (
            key.removeprefix(peft_files.PREFIX).removesuffix(".weight").rpartition(".lora_")
        )
        if not dot or leaf not in ("A", "B") or not key.startswith(peft_files.PREFIX):
            raise ValueError(f"{key} is no matrix of a LoRA on a linear layer.")
        result[f"{path}.{leaf}"] = tensor
    return result


def save_peft(model: nn.Module, name: str, folder: str | os.PathLike) -> None:
    """Write a LoRA as a folder that `peft.PeftModel.from_pretrained` reads.

    Raises:
        ValueError: When no LoRA of that name is attached, or its layers differ in rank.
    """
    layers = {path: host.deltas[name] for path, host in hosts(model, name).items()}
    first = next(iter(layers.values()))
    if not isinstance(first, LoRA):
        raise ValueError(f"the delta {name!r} is of kind {first.kind!r}, not a LoRA.")
    if len({delta.rank for delta in layers.values()}) > 1:
        raise ValueError(f"the layers of {name!r} differ in rank, which these files do not hold.")
    about = {
        "peft_type": "LORA",
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "use_rslora": first.rank_stabilized,
        "target_modules": list(layers),
        "bias": "none",
    }
    peft_files.write(folder, about, to_peft(delta_state_dict(model, name)))


# What a file may say, and which values leave two matrices on a linear layer what they are.
_KNOWN: peft_files.Known = {
    **peft_files.ORIGIN,
    "peft_type": ("LORA",),
    "r": None,
    "lora_alpha": None,
    "lora_dropout": None,
    "use_rslora": (True, False),
    # Which layers, by patterns: the tensors' names say it.
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    # How training started. What changes the base weights, or is taken off them, is not in here.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
    "eva_config": None,
    "bias": ("none",),
    "task_type": None,
    # How matrices are held while they train, or where.
    "runtime_config": None,
    "ephemeral_gpu_offload": None,
    "megatron_core": None,
    "qalora_group_size": None,  # of QALoRA, which `use_qalora` would say
}


def load_peft(model: Model, folder: str | os.PathLike, name: str = "default") -> Model:
    """Attach a LoRA that the library peft saved.

    Its settings are read by an allow-list: what is not known to leave the two matrices of each
    layer what they are is refused (DoRA; PiSSA, OLoRA, CorDA and LoftQ, which change the base
    weights; patterns of ranks and alphas; trained biases and whole modules; activated LoRA; …).

    Raises:
        ValueError: When the folder holds a variant of LoRA that is not implemented here, another
            method, or matrices that do not fit.
        FileNotFoundError: When a file is missing.
    """
    about = peft_files.settings_of(folder)
    settings, state = read_pairs(folder, about, from_peft)
    return attach_state(model, name, "lora", settings, state)


def read_pairs(
    folder: str | os.PathLike,
    about: Mapping[str, Any],
    rename: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings and tensors of a folder with matrices A and B, under our names.

    Args:
        folder: Where the tensors lie.
        about: The folder's settings, but those that `rename` takes account of.
        rename: From the names of the file to ours.

    Raises:
        ValueError: A setting that is not understood or is missing, or matrices of another rank.
        FileNotFoundError: When the tensors are missing.
    """
    where = Path(folder).name
    peft_files.check(about, _KNOWN, where)
    missing = [key for key in ("r", "lora_alpha") if not isinstance(about.get(key), (int, float))]
    if missing:
        raise ValueError(f"{where} does not say {missing[0]}, without which nothing is read.")
    settings = {
        "alpha": float(about["lora_alpha"]),
        "dropout": float(about.get("lora_dropout", 0)),
        "rank_stabilized": bool(about.get("use_rslora", False)),
    }
    state = rename(peft_files.tensors_of(folder))
    ranks = {len(tensor) for key, tensor in state.items() if key.endswith(".A")}
    if ranks != {about["r"]}:
        raise ValueError(
            f"{where} says r = {about['r']}, but its matrices have "
            f"{', '.join(map(str, sorted(ranks))) or 'no'} rows."
        )
    return settings, state
