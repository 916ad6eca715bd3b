"""Factorised models as files: safetensors, and a few words on which module became what."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnb.core.linear_form import linear_form, restore
from effnb.core.modules import Model, replace_modules
from effnb.inference.low_rank.factors import Factorized, linear_of
from effnb.inference.low_rank.tensor_train import TensorTrainHead

KEY = "effnb_low_rank"
AGAIN = "again"
"""The kind of a place where a module is used that another place names."""


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind, sizes and ranks of each factorised module by name: all that `skeleton` needs."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Factorized) and names[id(module)] != name:
            found[name] = {"kind": AGAIN, "module": names[id(module)]}
        elif isinstance(module, TensorTrainHead):
            found[name] = {"kind": module.kind, "embedding": names[id(module._tied[0])]}
        elif isinstance(module, Factorized):
            found[name] = {"kind": module.kind, **module.describe()}
    return found


def skeleton(model: Model, descriptions: Mapping[str, Mapping[str, Any]]) -> Model:
    """A plain model with factorised modules in place, whose tensors are still 0.

    Args:
        model: The plain architecture; it is not changed, and the rest is shared with it.
        descriptions: What `describe` gave of the factorised model.

    Raises:
        ValueError: When a module is missing in the model, or is of another size.
    """
    model, made = linear_form(model, descriptions)
    old = dict(model.named_modules(remove_duplicate=False))
    new: dict[str, nn.Module] = {}
    try:
        for name, about in descriptions.items():
            if about["kind"] not in (TensorTrainHead.kind, AGAIN):
                new[name] = Factorized.KINDS[about["kind"]].empty(about, old[name])
        for name, about in descriptions.items():
            if about["kind"] == TensorTrainHead.kind:
                new[name] = TensorTrainHead(new[about["embedding"]], old[name].bias)
        for name, about in descriptions.items():
            if about["kind"] == AGAIN:
                new[name] = new[about["module"]]
    except KeyError as missing:
        raise ValueError(f"this model has no {missing}; it is another architecture.") from None
    except ValueError as problem:
        raise ValueError(f"{name}: {problem}") from None
    return restore(replace_modules(model, new), made)


def dense(model: Model) -> Model:
    """The same function in the plain architecture, each product multiplied out.

    Such a model is as large as before, and saves and loads as the original class does.

    Raises:
        ValueError: When nothing in the model is factorised.
    """
    about = describe(model)
    if not about:
        raise ValueError("nothing in this model is factorised.")
    new = {
        name: model.get_submodule(name).dense()
        for name, words in about.items()
        if words["kind"] not in (TensorTrainHead.kind, AGAIN)
    }
    for name, words in about.items():
        if words["kind"] == TensorTrainHead.kind:  # tied again
            head = model.get_submodule(name)
            new[name] = linear_of(new[words["embedding"]].weight, head.bias)
            new[name].weight = new[words["embedding"]].weight
    return restore(replace_modules(model, new))


def save_factorized(model: nn.Module, path: str | os.PathLike) -> int:
    """Write a model with factorised modules to one safetensors file; returns its size in bytes.

    Tensors that several modules share are written once.

    Raises:
        ValueError: When nothing in the model is factorised, or a part of it is quantized.
    """
    about = describe(model)
    if not about:
        raise ValueError("nothing in this model is factorised; save it as the model it is.")
    if any(hasattr(type(module), "quantized") for module in model.modules()):
        raise ValueError(
            "the factors are quantized; save them with the quantization package's storage, and "
            "load them into `skeleton(model, describe(factorised))`."
        )
    tensors, aliases, known = {}, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in known:
            aliases[name] = known[key]
            continue
        known[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    words = {"modules": about, "aliases": aliases}
    path = Path(path)
    save_file(tensors, path, metadata={KEY: json.dumps(words)})
    return path.stat().st_size


def load_factorized(model: Model, path: str | os.PathLike) -> Model:
    """A factorised model from its file.

    Args:
        model: The plain architecture with any weights, such as `AutoModelForCausalLM.from_config`
            makes; it is not changed. The result has its device and mode.
        path: What `save_factorized` wrote.

    Raises:
        ValueError: When the file is damaged, or belongs to another architecture.
        FileNotFoundError: When there is no such file.
    """
    name = Path(path).name
    try:
        with safe_open(path, "pt") as file:
            words = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(f"{name} is damaged, or no safetensors file: {problem}.") from None
    if words is None:
        raise ValueError(f"{name} holds no factorised model; `save_factorized` writes such files.")
    result = skeleton(model, words["modules"])
    expected = result.state_dict(keep_vars=True)
    for key in sorted(expected.keys() ^ (tensors.keys() | words["aliases"].keys())):
        where = "the file" if key in expected else "the model"
        raise ValueError(f"{name} does not fit this model: {where} has no {key}.")
    for key, new in tensors.items():
        old = expected[key]
        if old.shape != new.shape:
            raise ValueError(
                f"{name} does not fit this model: {key} is {tuple(new.shape)} in the file and "
                f"{tuple(old.shape)} in the model."
            )
        value = new.to(old.device)
        parameter = isinstance(old, nn.Parameter)
        _put(result, key, nn.Parameter(value, old.requires_grad) if parameter else value)
    placed = result.state_dict(keep_vars=True)
    for alias, key in words["aliases"].items():
        _put(result, alias, placed[key])
    return result


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Set a parameter or buffer by its dotted name, without writing into the old one."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    held = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    with torch.no_grad():
        held[leaf] = tensor
