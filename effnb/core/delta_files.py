"""Deltas as files: a few kilobytes of safetensors that any copy of the base model can take up."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from effnb.core.delta_hosts import WithDeltas
from effnb.core.delta_kinds import KINDS
from effnb.core.deltas import (
    attach_deltas,
    check_name,
    delta_state_dict,
    hosts,
    load_delta,
    modules_by_name,
)
from effnb.core.linear_form import linear_form, restore
from effnb.core.modules import Model


def save_delta(model: nn.Module, name: str, path: str | os.PathLike) -> int:
    """Write a delta to a separate file (safetensors); returns the file's size in bytes.

    Raises:
        ValueError: When no delta of that name is attached.
    """
    first = next(iter(hosts(model, name).values())).deltas[name]
    about = {"name": name, "kind": first.kind, "settings": first.settings()}
    state = {key: t.contiguous().cpu() for key, t in delta_state_dict(model, name).items()}
    save_file(state, path, metadata={"effnb_delta": json.dumps(about)})
    return Path(path).stat().st_size


def read_delta(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a delta's file says: its name, kind and settings, and its tensors.

    Raises:
        ValueError: When the file is damaged or holds no delta.
        FileNotFoundError: When there is no such file.
    """
    name = Path(path).name
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("effnb_delta", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as problem:
        raise ValueError(f"{name} is damaged, or no safetensors file: {problem}.") from None
    if about is None:
        raise ValueError(f"{name} holds tensors, but no delta; `save_delta` writes such files.")
    return about, tensors


def attach_state(
    model: Model,
    name: str,
    kind: str,
    settings: dict[str, Any],
    state: Mapping[str, Tensor],
) -> Model:
    """Attach a delta from its tensors.

    Args:
        model: The model; it is not changed.
        name: What to call the delta.
        kind: Its method, such as "lora"; the module of the method must have been imported.
        settings: What `Delta.settings` gave.
        state: What `delta_state_dict` gave.

    Raises:
        ValueError: When the kind is unknown, the name taken, or a tensor belongs to no layer of
            this model or has another shape.
    """
    if kind not in KINDS:
        known = ", ".join(sorted(KINDS)) or "none"
        raise ValueError(f"deltas of kind {kind!r} are not known; known: {known}.")
    check_name(model, name)
    made: dict[str, Any] = {}
    if KINDS[kind].on_linears:
        model, made = linear_form(model, state)
    modules = {
        path: m.base if isinstance(m, WithDeltas) else m
        for path, m in modules_by_name(model).items()
    }
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        while path and path not in modules:  # a delta may have modules inside
            path, _, more = path.rpartition(".")
            leaf = f"{more}.{leaf}"
        # Only a delta that is in place may sit on the whole model; its tensors' names have no dots.
        if not path and (not KINDS[kind].in_place or "." in key):
            raise ValueError(f"the state has {key}, but the model has no such module.")
        layers.setdefault(path, {})[leaf] = tensor
    try:
        deltas = KINDS[kind].rebuild_all(modules, settings, layers)
    except TypeError:  # a setting of another release, or none where one is needed
        raise ValueError(
            f"the settings {', '.join(settings) or '(none)'} are not those of a delta of kind "
            f"{kind!r} here."
        ) from None
    result = load_delta(attach_deltas(model, name, deltas), name, state)
    return restore(result, made) if made else result


def open_delta(model: Model, path: str | os.PathLike, name: str | None = None) -> Model:
    """Attach a delta from its file, under its own name or another.

    Raises:
        ValueError: See `read_delta` and `attach_state`.
        FileNotFoundError: When there is no such file.
    """
    about, state = read_delta(path)
    return attach_state(model, name or about["name"], about["kind"], about["settings"], state)
