"""The files of the library peft: a folder of tensors, and of settings that are read by allow-list.

A setting of a file can change what its tensors mean. So a method lists the settings that it
understands, and the values under which its tensors are what it takes them for; what is not listed
is refused, unless it is empty. Later releases of the library say more than today's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

Known = Mapping[str, tuple | None]
"""For each setting that is understood, the values that are read; None for all."""

PREFIX = "base_model.model."
"""What stands before a layer's name."""

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"

ORIGIN: Known = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "revision": None,
    "inference_mode": None,
    "peft_version": None,
}
"""What a file is for, and by what it was made; its tensors mean the same."""


def check(about: Mapping[str, Any], known: Known, where: str) -> None:
    """Refuse settings that are not understood.

    Args:
        about: The settings.
        known: Those that are understood, `peft_type` with its one value among them.
        where: The folder, for the sentence.

    Raises:
        ValueError: The sentence names the first such setting.
    """
    (wanted,) = known["peft_type"] or ()
    if about.get("peft_type") != wanted:
        raise ValueError(f"{where} holds {about.get('peft_type')}, not {wanted}.")
    for key, value in about.items():
        if key in known:
            allowed = known[key]
            if allowed is None or any(value == a and type(value) is type(a) for a in allowed):
                continue
        elif value in (None, False, 0) or value in ("", [], {}):
            continue
        raise ValueError(
            f"{where} uses {key} = {json.dumps(value)}, which changes what its tensors mean and is "
            f"not read here; only a plain {wanted} is."
        )


def settings_of(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder says about its tensors, unchecked.

    Raises:
        FileNotFoundError: When the file is missing.
    """
    return json.loads((Path(folder) / SETTINGS).read_text(encoding="utf-8"))


def tensors_of(folder: str | os.PathLike) -> dict[str, Tensor]:
    """A folder's tensors by their names.

    Raises:
        FileNotFoundError: When the file is missing.
    """
    return load_file(Path(folder) / TENSORS)


def write(
    folder: str | os.PathLike, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write settings and tensors as the library does."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(state, folder / TENSORS, metadata={"format": "pt"})
    text = json.dumps({**about, "inference_mode": True}, indent=2) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")


# --- prefixes and prompts -------------------------------------------------------------------------

VIRTUAL: Known = {
    "num_virtual_tokens": None,
    "num_transformer_submodules": (1, None),
    # Sizes, which the tensor's shape says, or the model.
    "token_dim": None,
    "num_attention_heads": None,
    "num_layers": None,
    **ORIGIN,
}
"""What files of virtual tokens say in common."""


def read_virtual_tokens(folder: str | os.PathLike, known: Known) -> Float[Tensor, "length size"]:
    """The table of a prefix or prompt.

    Raises:
        ValueError: When a setting is not understood, or the table is not what the settings say.
        FileNotFoundError: When a file is missing.
    """
    about, where = settings_of(folder), Path(folder).name
    check(about, known, where)
    tensors = tensors_of(folder)
    if set(tensors) != {"prompt_embeddings"} or tensors["prompt_embeddings"].ndim != 2:
        raise ValueError(
            f"{where} should hold one matrix, prompt_embeddings; it holds "
            f"{', '.join(tensors) or 'nothing'}."
        )
    table = tensors["prompt_embeddings"]
    if len(table) != about.get("num_virtual_tokens"):
        raise ValueError(
            f"{where} says num_virtual_tokens = {about.get('num_virtual_tokens')}, but its matrix "
            f"has {len(table)} rows."
        )
    return table


def write_virtual_tokens(
    table: Float[Tensor, "length size"], about: Mapping[str, Any], folder: str | os.PathLike
) -> None:
    """Write a table and its settings."""
    sizes = {"num_virtual_tokens": len(table), "num_transformer_submodules": 1}
    write(folder, {**about, **sizes}, {"prompt_embeddings": table})
