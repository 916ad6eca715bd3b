r"""Where quantization errs: the relative error of every module's output, and how it adds up.

For a text, a module's outputs are compared with those of the model in full precision, over the
text's own tokens:

$$e = \frac{\lVert \hat a - a \rVert_F}{\lVert a \rVert_F}.$$

Two errors are told apart. *Accumulated*: the whole model is quantized, so the module's inputs are
wrong already. *Alone*: only the module's own block is quantized, and what reaches it is exact. The
ratio of the two says how much was carried over from the blocks before.

The question is that of O'Neill and Dutta, "Self-Distilled Quantization", 2023, arXiv 2307.05972.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from effnb.core.calibration import main_output
from effnb.core.modules import find_blocks, matches, replace_modules, share

ROLES: dict[str, tuple[str, ...]] = {
    "query": ("*.query", "*.q_proj", "*.q_lin"),
    "key": ("*.key", "*.k_proj", "*.k_lin"),
    "value": ("*.value", "*.v_proj", "*.v_lin"),
    "attention output": ("*attention.output.dense", "*.o_proj", "*.out_lin", "*self_attn.out_proj"),
    "feed-forward, first": ("*intermediate.dense", "*.up_proj", "*.fc1", "*ffn.lin1"),
    "feed-forward, second": ("*.down_proj", "*.fc2", "*ffn.lin2", "*.output.dense"),
    "norm after attention": ("*attention.output.LayerNorm", "*.input_layernorm", "*.sa_layer_norm"),
    "norm after feed-forward": (
        "*.output.LayerNorm",
        "*.post_attention_layernorm",
        "*.output_layer_norm",
    ),
}
"""Usual names of the modules in a block; the first role that fits is taken."""
ATTENTION = "self-attention"
"""The role of the heads' joined context vectors: what the attention output projection reads."""
BLOCK = "block"
"""The role of a block's own output."""


@dataclass(frozen=True)
class ModuleError:
    """The error of one module.

    Attributes:
        name: Its dotted name.
        role: What it does in its block.
        layer: Number of its block, from 0.
        accumulated: Relative error of each text with the whole model quantized.
        alone: The same with only the module's own block quantized.
    """

    name: str
    role: str
    layer: int
    accumulated: tuple[float, ...] = field(repr=False)
    alone: tuple[float, ...] = field(repr=False)

    def mean(self, kind: str = "accumulated") -> float:
        """The mean over texts."""
        values = getattr(self, kind)
        return sum(values) / len(values)


def roles_of(
    model: nn.Module, roles: Mapping[str, Iterable[str]] = ROLES
) -> dict[str, tuple[str, int]]:
    """The modules inside the blocks whose names say what they do: name to (role, block).

    Raises:
        ValueError: When no name is known.
    """
    prefix, blocks = find_blocks(model)
    found: dict[str, tuple[str, int]] = {}
    for layer, block in enumerate(blocks):
        for short, _ in block.named_modules():
            name = f"{prefix}.{layer}.{short}"
            role = next((r for r, patterns in roles.items() if matches(name, patterns)), None)
            if short and role is not None:
                found[name] = (role, layer)
    if not found:
        raise ValueError(
            "no module's name says what it does; give roles, from a role to its name patterns."
        )
    return found


def _read(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    names: Iterable[str],
    inputs: set[str],
) -> dict[str, list[Tensor]]:
    """Outputs of the named modules, and inputs of some, real tokens of one text each."""
    watched = share(model).eval()
    now: dict[str, Tensor] = {}

    def after(name: str):
        def hook(module, given, output):
            now[name] = main_output(output).detach()
            if name in inputs:
                now[f"{name}, input"] = given[0].detach()

        return hook

    for name in names:
        watched.get_submodule(name).register_forward_hook(after(name))
    found: dict[str, list[Tensor]] = {}
    with torch.inference_mode():
        for batch in batches:
            now.clear()
            watched(**{key: tensor for key, tensor in batch.items() if key != "labels"})
            ids = batch["input_ids"]
            mask = batch.get("attention_mask")
            real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
            for name, values in now.items():
                texts = [row[seen].float() for row, seen in zip(values, real)]
                found.setdefault(name, []).extend(texts)
    return found


def relative_errors(other: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, ...]:
    r"""$\lVert \hat a - a \rVert_F / \lVert a \rVert_F$ of each text; 0 where both are 0."""
    found = []
    for ours, theirs in zip(other, exact, strict=True):
        missed, whole = float((ours - theirs).norm()), float(theirs.norm())
        found.append(missed / whole if whole else (0.0 if missed == 0 else float("inf")))
    return tuple(found)


def module_errors(
    model: nn.Module,
    quantized: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    roles: Mapping[str, Iterable[str]] = ROLES,
) -> list[ModuleError]:
    """Relative errors of every module whose role is known, of each head's context, of each block.

    Both models are run in evaluation mode, whatever mode they are in.

    Args:
        model: The model in full precision, a transformer with one stack of blocks.
        quantized: The same model quantized; its modules have the same names.
        batches: Batches of texts, with `attention_mask` where they are padded.
        roles: Name patterns of every role.

    Returns:
        Sorted by block; in a block in the order in which its modules were defined.

    Raises:
        ValueError: No batches, no known module, or models of other depths.
    """
    if not batches:
        raise ValueError("there are no batches; at least one is needed to measure an error.")
    known = roles_of(model, roles)
    prefix, blocks = find_blocks(model)
    other = find_blocks(quantized)
    if (prefix, len(blocks)) != (other[0], len(other[1])):
        raise ValueError(
            f"the model has {len(blocks)} blocks and the quantized one {len(other[1])}; they must "
            "be the same model."
        )
    projections = {name for name, (role, _) in known.items() if role == "attention output"}
    block_names = [f"{prefix}.{layer}" for layer in range(len(blocks))]
    names = [*known, *block_names]
    exact = _read(model, batches, names, projections)
    whole = _read(quantized, batches, names, projections)
    listed: list[tuple[str, str, int, str]] = []
    for name, (role, layer) in known.items():
        if name in projections:
            listed.append((name, ATTENTION, layer, f"{name}, input"))
        listed.append((name, role, layer, name))
    listed += [(name, BLOCK, layer, name) for layer, name in enumerate(block_names)]
    listed.sort(key=lambda row: row[2])
    found = []
    alone: dict[int, dict[str, list[Tensor]]] = {}
    for name, role, layer, key in listed:
        if layer not in alone:
            own = quantized.get_submodule(block_names[layer])
            hybrid = replace_modules(model, {block_names[layer]: own})
            inside = [
                n for n in names if n == block_names[layer] or known.get(n, ("", -1))[1] == layer
            ]
            alone = {layer: _read(hybrid, batches, inside, projections)}
        found.append(
            ModuleError(
                name,
                role,
                layer,
                relative_errors(whole[key], exact[key]),
                relative_errors(alone[layer][key], exact[key]),
            )
        )
    return found


def by_role(
    errors: Sequence[ModuleError], kind: str = "accumulated"
) -> dict[str, tuple[float, ...]]:
    """The mean over layers for each role, text by text."""
    groups: dict[str, list[tuple[float, ...]]] = {}
    for error in errors:
        groups.setdefault(error.role, []).append(getattr(error, kind))
    return {
        role: tuple(sum(values) / len(values) for values in zip(*rows, strict=True))
        for role, rows in groups.items()
    }


def growth(errors: Sequence[ModuleError], role: str = BLOCK) -> tuple[float, ...]:
    """The last layer's accumulated error minus the first's, text by text.

    Raises:
        ValueError: When the role has fewer than two layers.
    """
    layers = sorted((e for e in errors if e.role == role), key=lambda e: e.layer)
    if len(layers) < 2:
        raise ValueError(f"the role {role!r} has {len(layers)} layers; growth needs two.")
    first, last = layers[0].accumulated, layers[-1].accumulated
    return tuple(b - a for a, b in zip(first, last, strict=True))
