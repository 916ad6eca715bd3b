"""Quantized models in files: one safetensors file, as small as the model.

The file holds every tensor of the model, packed weights as they are, tied ones once. Its metadata
hold one JSON text: the description of each quantized layer, and which names share a tensor. Reading
runs no code from the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnb.core.linear_form import linear_form, restore
from effnb.core.modules import Model, first_names, replace_modules, settle_tying
from effnb.inference.quantization.extreme import BinaryTensor, TernaryTensor
from effnb.inference.quantization.formats import QuantizedTensor
from effnb.inference.quantization.linear import QuantizedLinear, refuse_quantized
from effnb.inference.quantization.minimum import MinimumTensor
from effnb.inference.quantization.stored import from_parts
from effnb.inference.quantization.tables import TableTensor

FORMATS = (QuantizedTensor, MinimumTensor, TableTensor, TernaryTensor, BinaryTensor)
"""What files may hold; importing a format makes it known to `from_parts`."""

KEY = "effnb.quantized"
VERSION = 1


def save_quantized(model: nn.Module, path: str | Path) -> None:
    """Write a model with `QuantizedLinear` layers, of one format or several, to a file.

    What is wrapped around such a layer, like one that rounds its inputs, is not described: a model
    to load into must have it already. A layer that is used in several places is written once, and
    loaded into all of them.

    Args:
        model: The model.
        path: The file; its folder must exist. A file that is there is replaced.

    Raises:
        ValueError: When no layer is quantized, or a layer of another kind is, whose function the
            stored weight alone does not give.
    """
    layers = {}
    places: dict[str, str] = {}
    for name, first_name in first_names(model).items():
        module = model.get_submodule(name)
        if name != first_name:
            if type(module) is QuantizedLinear:
                places[name] = first_name
        elif type(module) is QuantizedLinear:
            layers[name] = module.description
        elif hasattr(type(module), "quantized"):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which does more than store a weight; only "
                "QuantizedLinear layers are saved."
            )
    if not layers:
        raise ValueError("the model has no quantized layer; save it as any other model.")
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Tied tensors are one object or one piece of memory; empty ones have none.
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        kept[name] = tensor.detach().cpu().contiguous().clone()
    description = {"version": VERSION, "layers": layers, "aliases": aliases, "places": places}
    save_file(kept, str(path), metadata={"format": "pt", KEY: json.dumps(description)})


def load_quantized(model: Model, path: str | Path) -> Model:
    """Read a file of `save_quantized` into a model of the same architecture.

    Args:
        model: The model before quantization, with any weights; it is not changed.
        path: The file.

    Returns:
        A new model with the quantized layers and all other tensors from the file, on the device of
        the given model.

    Raises:
        ValueError: When the file is missing, damaged, of another kind, or not of this architecture;
            or when the model is quantized already.
    """
    refuse_quantized(model)
    description, tensors = _read(Path(path))
    model, made = linear_form(model, description["layers"])
    own = model.state_dict(keep_vars=True)
    device = next(iter(own.values()), torch.zeros(0)).device
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name, target in description["aliases"].items():
        if target not in tensors:
            raise ValueError(f"{path} is damaged: {name} shares {target}, which is not in it.")
        tensors[name] = tensors[target]
    known = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, nn.Module] = {}
    for name, parts in description["layers"].items():
        layer = known.get(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(
                f"{path} is of another architecture: the model has no linear layer {name}."
            )
        try:
            found = {part: tensors.pop(f"{name}.{part}") for part in parts["tensors"]}
            stored = from_parts(parts, found)
        except KeyError as problem:
            raise ValueError(f"{path} is damaged: it has no {problem}.") from None
        except (ValueError, TypeError) as problem:
            raise ValueError(f"{path} is damaged: {name}: {problem}") from None
        if stored.shape != tuple(layer.weight.shape):
            raise ValueError(
                f"{path} is of another architecture: {name} is {stored.shape} in it and "
                f"{tuple(layer.weight.shape)} in the model."
            )
        layers[name] = QuantizedLinear(stored, layer.bias)
    for place, name in description.get("places", {}).items():
        if name not in layers or not isinstance(known.get(place), nn.Linear):
            raise ValueError(
                f"{path} is of another architecture: the model has no linear layer {place}."
            )
        for part in description["layers"][name]["tensors"]:
            tensors.pop(f"{place}.{part}", None)
        layers[place] = layers[name]
    result = replace_modules(model, layers)
    _assign(result, tensors, set(layers), path)
    return settle_tying(restore(result, made))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a file, or one sentence on what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(f"{path} is no intact safetensors file: {problem}.") from None
    if KEY not in metadata:
        raise ValueError(f"{path} was not written by save_quantized: it has no {KEY!r} metadata.")
    try:
        description = json.loads(metadata[KEY])
        version = description["version"]
        layers, aliases = description["layers"], description["aliases"]
        intact = all(isinstance(x, dict) for x in (layers, aliases, *layers.values()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        version, intact = VERSION, False
    if not intact:
        raise ValueError(f"{path} is damaged: its description of the layers cannot be read.")
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}; this effnb reads version {VERSION}.")
    return description, tensors


def _assign(
    model: nn.Module, tensors: dict[str, Tensor], layers: set[str], path: str | Path
) -> None:
    """Put tensors in the places of a model's own; what is one tensor becomes one parameter."""
    own = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name.rpartition(".")[0] not in layers or name.endswith(".bias")
    }
    extra, missing = set(tensors) - set(own), set(own) - set(tensors)
    if extra or missing:
        fault = f"it has {min(extra)} too" if extra else f"it lacks {min(missing)}"
        raise ValueError(f"{path} is of another architecture: {fault}.")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{path} is of another architecture: {name} has shape {tuple(tensor.shape)} in it "
                f"and {tuple(own[name].shape)} in the model."
            )
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if isinstance(own[name], nn.Parameter):
            new = nn.Parameter(tensor, requires_grad=own[name].requires_grad)
            tensor = parameters.setdefault(id(tensor), new)
        setattr(model.get_submodule(parent), leaf, tensor)
