r"""What must go together when a whole part of a Llama-like model goes: its dependency groups.

Zeros inside a matrix save time only where a kernel skips them. A removed row or column always does,
but rows and columns are coupled: row $i$ of the gate and of the up projection make neuron $i$,
which column $i$ of the down projection reads. Take one away and
what the other two compute is never read. The parts that such a model can lose are

- "heads": a query head; rows of q and columns of o;
- "groups": a key-value head and all its query heads; rows of q, k and v, columns of o;
- "neurons": a neuron of an MLP; rows of gate and up, a column of down;
- "channels": a channel of the residual stream, in every matrix and norm of the model;
- "layers": a block, all of it.

With one key-value head per query head the first two are the same. With grouped queries a query head
alone leaves k and v alone: the other heads of its group read them.

`structures_of` writes the groups down from the architecture; `effnb.inference.pruning.coupled`
finds them without knowing it, by watching gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.checks import check_finite
from effnb.core.modules import Model, find_blocks, share
from effnb.inference.pruning.masks import refuse

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `config.model_type` whose blocks are Llama's: RMSNorm, rotary attention, gated MLP."""

KINDS = ("heads", "groups", "neurons", "channels", "layers")

PARTS = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 0,
    "self_attn.v_proj": 0,
    "self_attn.o_proj": 1,
    "mlp.gate_proj": 0,
    "mlp.up_proj": 0,
    "mlp.down_proj": 1,
}
"""The linear layers of a block, and the axis of each that heads or neurons lie on."""

UNITS = {
    "heads": ("self_attn.q_proj", "self_attn.o_proj"),
    "groups": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "neurons": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
"""Which of them a structure has rows or columns of, in the order of computation."""

_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True)
class Anatomy:
    """The sizes of a Llama-like model and the names of its parts.

    Attributes:
        blocks: Dotted name of the list of blocks.
        embedding: Name of the token embedding.
        norm: Name of the last norm.
        head: Name of the output head; None without one.
        tied: Whether the head and the embedding are one matrix.
        layers: Number of blocks.
        heads: Query heads of a block.
        kv_heads: Key-value heads of a block.
        head_dim: Size of a head.
        neurons: Neurons of a block's MLP.
        channels: Size of the residual stream.
    """

    blocks: str
    embedding: str
    norm: str
    head: str | None
    tied: bool
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    channels: int

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    def name(self, layer: int, part: str) -> str:
        """Dotted name of a part of a block, such as "model.layers.0.mlp.up_proj"."""
        return f"{self.blocks}.{layer}.{part}"

    def count(self, kind: str) -> int:
        """How many structures of a kind a layer has ("channels" and "layers": the model)."""
        check_kind(kind)
        return {
            "heads": self.heads,
            "groups": self.kv_heads,
            "neurons": self.neurons,
            "channels": self.channels,
            "layers": self.layers,
        }[kind]

    def by_unit(self, part: str, values: Tensor, kind: str) -> Float[Tensor, "units rest"]:
        """A matrix of the shape of a part's weight, cut into the structures of a kind.

        Args:
            part: One of `UNITS[kind]`.
            values: (out, in), for instance $w g$.
            kind: "heads", "groups" or "neurons".
        """
        rows = values if PARTS[part] == 0 else values.T
        return rows.reshape(self.count(kind), -1)


@dataclass(frozen=True)
class Slice:
    """Some rows (`dim` 0) or columns (`dim` 1) of a parameter.

    Attributes:
        parameter: Its dotted name.
        dim: The axis.
        indices: Which ones.
    """

    parameter: str
    dim: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What has to be removed together.

    Attributes:
        kind: One of `KINDS`.
        layer: Its block; None for a channel, which runs through all of them.
        index: Its number among those of its kind, in its layer.
        slices: Its rows and columns.
    """

    kind: str
    layer: int | None
    index: int
    slices: tuple[Slice, ...]

    def parameters(self, model: nn.Module) -> int:
        """How many numbers it consists of."""
        shapes = {name: p.shape for name, p in model.named_parameters()}
        return sum(
            shapes[s.parameter].numel() // shapes[s.parameter][s.dim] * len(s.indices)
            for s in self.slices
        )


def check_kind(kind: str, allowed: Sequence[str] = KINDS) -> None:
    """Refuse a kind of structure that is not there.

    Raises:
        ValueError: When it is none of `allowed`.
    """
    if kind not in allowed:
        raise ValueError(f"the kind is {kind!r}; choose one of {', '.join(allowed)}.")


def check_weights(model: nn.Module) -> None:
    """Refuse a model with numbers that are not finite, before anything is scored or cut.

    Scores of such a model mean nothing, and what is cut out of it would carry them on.

    Raises:
        ValueError: When a parameter holds NaN or an infinity.
    """
    for name, parameter in model.named_parameters():
        check_finite(parameter.detach(), name, "pruned")


def anatomy(model: nn.Module) -> Anatomy:
    """Sizes and names of a Llama-like model.

    Raises:
        ValueError: When it is quantized, of another architecture, or has layers that are no longer
            plain `torch.nn.Linear` of equal sizes in all blocks.
    """
    refuse(model)
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise ValueError(
            f"the model is of type {kind}; structured pruning needs the blocks of Llama "
            f"(model_type {', '.join(FAMILIES)})."
        )
    blocks, stack = find_blocks(model)
    root = blocks.rpartition(".")[0]
    prefix = f"{root}." if root else ""
    for index, block in enumerate(stack):
        _check_block(f"{blocks}.{index}", block)
    first = stack[0]
    head_dim = int(first.self_attn.head_dim)
    embedding = model.get_submodule(f"{prefix}embed_tokens")
    head = next((n for n in ("lm_head", "score") if hasattr(model, n)), None)
    sizes = {
        (
            block.self_attn.q_proj.out_features,
            block.self_attn.k_proj.out_features,
            block.mlp.up_proj.out_features,
        )
        for block in stack
    }
    if len(sizes) > 1:
        raise ValueError("the blocks differ in size; structured pruning starts from equal ones.")
    queries, keys, neurons = next(iter(sizes))
    return Anatomy(
        blocks=blocks,
        embedding=f"{prefix}embed_tokens",
        norm=f"{prefix}norm",
        head=head,
        tied=head is not None and getattr(model, head).weight is embedding.weight,
        layers=len(stack),
        heads=queries // head_dim,
        kv_heads=keys // head_dim,
        head_dim=head_dim,
        neurons=neurons,
        channels=embedding.weight.shape[1],
    )


def _check_block(name: str, block: nn.Module) -> None:
    modules = dict(block.named_modules())
    for part in PARTS:
        found = modules.get(part)
        if type(found) is not nn.Linear:
            raise ValueError(
                f"{name}.{part} is {'missing' if found is None else 'a ' + type(found).__name__}; "
                "structured pruning needs plain linear layers: merge or detach deltas, and prune "
                "before other compression."
            )


# --- the groups as the architecture makes them ----------------------------------------------------


def structures_of(model: nn.Module, kind: str) -> list[Structure]:
    """All structures of a kind, layer by layer.

    Raises:
        ValueError: A kind that is not there, or a model that is not Llama-like.
    """
    check_kind(kind)
    shape = anatomy(model)
    names = {name: p.ndim for name, p in model.named_parameters()}
    if kind == "channels":
        return [Structure(kind, None, i, _channel(shape, names, i)) for i in range(shape.channels)]
    found = []
    for layer in range(shape.layers):
        if kind == "layers":
            parameters = dict(model.get_submodule(f"{shape.blocks}.{layer}").named_parameters())
            slices = tuple(
                Slice(shape.name(layer, name), 0, tuple(range(len(p))))
                for name, p in parameters.items()
            )
            found.append(Structure(kind, layer, layer, slices))
            continue
        found += [
            Structure(kind, layer, i, _rows(shape, names, layer, kind, i))
            for i in range(shape.count(kind))
        ]
    return found


def _rows(
    shape: Anatomy, names: dict[str, int], layer: int, kind: str, index: int
) -> tuple[Slice, ...]:
    """The coupled rows and columns of a head, a group or a neuron."""
    slices = []
    # With one query head per key-value head, no other head reads those keys and values.
    kind = "groups" if kind == "heads" and shape.queries_per_group == 1 else kind
    for part in UNITS[kind]:
        width = 1
        if kind != "neurons":
            shared = kind == "groups" and part in ("self_attn.q_proj", "self_attn.o_proj")
            width = shape.head_dim * (shape.queries_per_group if shared else 1)
        indices = tuple(range(index * width, (index + 1) * width))
        name = shape.name(layer, part)
        slices.append(Slice(f"{name}.weight", PARTS[part], indices))
        if PARTS[part] == 0 and f"{name}.bias" in names:
            slices.append(Slice(f"{name}.bias", 0, indices))
    return tuple(slices)


def _channel(shape: Anatomy, names: dict[str, int], index: int) -> tuple[Slice, ...]:
    """What reads and writes a channel of the residual stream."""
    at = (index,)
    slices = [Slice(f"{shape.embedding}.weight", 1, at)]
    for layer in range(shape.layers):
        slices += [Slice(shape.name(layer, f"{norm}.weight"), 0, at) for norm in _NORMS]
        for part, dim in PARTS.items():  # what reads it has it as an input, what writes it as a row
            name = shape.name(layer, part)
            slices.append(Slice(f"{name}.weight", 1 - dim, at))
            if dim == 1 and f"{name}.bias" in names:
                slices.append(Slice(f"{name}.bias", 0, at))
    slices.append(Slice(f"{shape.norm}.weight", 0, at))
    if shape.head is not None and not shape.tied:
        slices.append(Slice(f"{shape.head}.weight", 1, at))
    return tuple(slices)


# --- with zeros in place of the structures --------------------------------------------------------


def replace_parameters(model: Model, new: dict[str, Tensor]) -> Model:
    """A model with other values in the named parameters; tied ones stay tied, the rest is shared.

    Raises:
        KeyError: When a name is not a parameter of the model.
    """
    result = share(model)
    parameters = dict(result.named_parameters())
    # A tensor made in inference mode, where a reader may evaluate, could never be trained.
    with torch.inference_mode(False):
        swap = {
            id(parameters[name]): nn.Parameter(
                value.clone() if value.is_inference() else value.detach(),
                parameters[name].requires_grad,
            )
            for name, value in new.items()
        }
    for module in result.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) in swap:
                setattr(module, key, swap[id(parameter)])
    return result


def masks_from(model: nn.Module, slices: Iterable[Slice]) -> dict[str, Tensor]:
    """By parameter, under its first name: True where one of the slices lies."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(p), name) for name, p in parameters.items()}
    places: dict[tuple[str, int], list[int]] = {}
    for part in slices:
        places.setdefault((names[part.parameter], part.dim), []).extend(part.indices)
    marked: dict[str, Tensor] = {}
    for (name, dim), indices in places.items():
        like = parameters[name]
        mask = marked.setdefault(
            name, torch.zeros(like.shape, dtype=torch.bool, device=like.device)
        )  # fmt: skip
        mask.index_fill_(dim, torch.tensor(indices, device=like.device), True)
    return marked


def zero(model: Model, structures: Iterable[Structure]) -> Model:
    """A model of the same size with exact zeros in the structures.

    It computes what the smaller model will compute, so it can be inspected before anything is cut.
    Any choice is possible, also unequal numbers per layer.

    Raises:
        ValueError: When the model is quantized or a weight is not finite.
    """
    refuse(model)
    check_weights(model)
    marked = masks_from(model, (part for s in structures for part in s.slices))
    parameters = dict(model.named_parameters())
    new = {name: torch.where(mask, 0, parameters[name].detach()) for name, mask in marked.items()}
    return replace_parameters(model, new)


def random_scores(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Scores that know nothing, one for each structure: what a method has to beat.

    Args:
        model: A Llama-like model.
        seed: Of the draw.

    Returns:
        "heads" (layers, heads), "neurons" (layers, neurons), "channels" and "layers".
    """
    shape = anatomy(model)
    draw = torch.Generator().manual_seed(seed)
    return {
        "heads": torch.rand(shape.layers, shape.heads, generator=draw),
        "neurons": torch.rand(shape.layers, shape.neurons, generator=draw),
        "channels": torch.rand(shape.channels, generator=draw),
        "layers": torch.rand(shape.layers, generator=draw),
    }
