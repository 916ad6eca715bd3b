"""Save and load models whose weights stand in several places, each weight once.

`save_pretrained` of transformers refuses such a model, because its class does not say which weights
are one. Here the file says so itself: its metadata names, for each repeated tensor, the name under
which it is stored. Loading puts one object in all its places again, so that training and
compression go on as before. For a library that knows nothing of sharing, save
`unshare_layers(model)` as usual.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.modules import Model, share
from effnb.design.sharing.albert import shared_places
from effnb.design.sharing.factorized_embedding import FactorizedEmbedding, factorize_embedding

KEY = "effnb.sharing"
"""Where the metadata of a file says what is shared."""


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and kept buffer by each of its names."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield prefix + name, buffer


def _plain(model: nn.Module) -> None:
    """Refuse what another function saves.

    Raises:
        ValueError: When a method of compression or delta tuning has put modules into the model.
    """
    for name, module in model.named_modules():
        kind = type(module).__module__
        if kind.startswith("effnb.") and not kind.startswith("effnb.design."):
            raise ValueError(
                f"{name} is a {type(module).__name__}, which is not built from a configuration; "
                "save the model before it is compressed, or with the method's own functions."
            )


def save_weights(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the weights of any module to a safetensors file, each once, and what is shared.

    Raises:
        ValueError: A model with weights on the meta device, or with modules of a compression
            method in it.
    """
    check_loaded(model)
    _plain(model)
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    again: dict[str, str] = {}
    for name, tensor in _named_tensors(model):
        known = first.setdefault(id(tensor), name)
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        else:
            again[name] = known
    places = {place: name for name, rest in shared_places(model).items() for place in rest}
    about = {"tensors": again, "modules": places, "embedding": _embedding_size(model)}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", KEY: json.dumps(about)})


def load_weights(model: Model, path: str | os.PathLike) -> Model:
    """A model of the same shape with the weights of a file, shared as in the file.

    Args:
        model: What the weights are put into, whether its own are shared or not; not changed.
        path: A file that `save_weights` wrote.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A damaged file, one without a word on sharing, or one of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; save_weights writes one.")
    about, tensors = _read(path)
    return _filled(share(model), about, tensors, path)


def save_shared(model: nn.Module, folder: str | os.PathLike) -> None:
    """Write a Hugging Face model that shares weights: `config.json` and `model.safetensors`.

    Raises:
        ValueError: A model that transformers does not build from its configuration, or as
            `save_weights`.
    """
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or not hasattr(transformers, name):
        raise ValueError(
            f"{name} is not a class of transformers; save its weights with save_weights, and build "
            "the model again to load them."
        )
    folder = Path(folder)
    save_weights(model, folder / "model.safetensors")
    config = type(model.config).from_dict(model.config.to_dict())
    config.architectures = [name]
    config.save_pretrained(folder)


def load_shared(folder: str | os.PathLike) -> nn.Module:
    """Read a model that `save_shared` wrote, for evaluation.

    Raises:
        FileNotFoundError: When one of the two files is missing.
        ValueError: Damaged or unfitting files.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a model's folder has config.json and model.safetensors."
            )
    about, tensors = _read(folder / "model.safetensors")
    config = transformers.AutoConfig.from_pretrained(folder)
    (name,) = config.architectures
    with torch.random.fork_rng(devices=[]):  # random weights, which are replaced
        model = getattr(transformers, name)(config)
    if about["embedding"] is not None:
        model = factorize_embedding(model, about["embedding"], initial="random")
    return _filled(model, about, tensors, folder / "model.safetensors").eval()


def _embedding_size(model: nn.Module) -> int | None:
    sizes = [m.table.embedding_dim for m in model.modules() if isinstance(m, FactorizedEmbedding)]
    return sizes[0] if sizes else None


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} is damaged: {problem}.") from None
    if not isinstance(about, dict):
        raise ValueError(f"{path} does not say what is shared; save_weights writes such files.")
    return about, tensors


def _filled(model: Model, about: dict, tensors: dict[str, Tensor], path: Path) -> Model:
    """Share as the file says, then put its tensors in; the model itself changes."""
    everything = tensors.keys() | about["tensors"].keys()
    expected = dict(_named_tensors(model))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    shapes |= {name: shapes.get(source) for name, source in about["tensors"].items()}
    wrong = [
        name
        for name in expected.keys() | everything
        if name not in expected or tuple(expected[name].shape) != shapes.get(name)
    ]
    if wrong:
        raise ValueError(
            f"{min(wrong)} of {path} is missing, unknown or of another shape than the model's "
            f"({len(wrong)} tensors in all)."
        )
    for place, source in about["modules"].items():
        parent, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(parent), leaf, model.get_submodule(source))
    filled = {
        name: nn.Parameter(tensor, expected[name].requires_grad)
        if isinstance(expected[name], nn.Parameter)
        else tensor
        for name, tensor in tensors.items()
    }
    with torch.inference_mode(False):
        for name in everything:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, filled[about["tensors"].get(name, name)])
    return model
