"""What the chapter on context computes live: other frequencies, caches, saved files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging

from effnb.design.context import (
    dynamic_ntk,
    extrapolation,
    ntk_aware,
    ntk_by_parts,
    position_interpolation,
    yarn,
)
from effnb.evaluation.long_context import chunked_losses

TRAINED = 512
"""Tokens that the models of the bench were trained on."""
BIN = 64
"""Places that a point of a live curve is the mean of."""

METHODS: dict[str, Callable[..., nn.Module]] = {
    "RoPE": extrapolation,
    "PI": position_interpolation,
    "NTK-aware": ntk_aware,
    "NTK-by-parts": ntk_by_parts,
    "YaRN": yarn,
}
"""The fixed tables that the chapter compares, by the names that its pictures use."""

TEMPERATURES: dict[str, bool | float] = {
    "0.1 ln s + 1": True, "1: off": False, "1.1": 1.1, "1.2": 1.2, "1.4": 1.4
}  # fmt: skip
"""What queries and keys are multiplied by, as the panel names it."""


def longer(
    model: nn.Module,
    method: str,
    factor: float,
    *,
    ramp: str = "code",
    alpha: float = 1.0,
    beta: float = 32.0,
    temperature: str = "0.1 ln s + 1",
    length: int = 0,
) -> nn.Module:
    """A model with a method's frequencies; it reads `length` tokens even where that is too many."""
    options: dict[str, Any] = {}
    if method in ("NTK-by-parts", "YaRN"):
        options = {"ramp": ramp, "alpha": alpha, "beta": beta}
    if method == "YaRN":
        options["attention"] = TEMPERATURES[temperature]
    found = METHODS[method](model, factor, **options)
    found.config.max_position_embeddings = max(found.config.max_position_embeddings, length)
    return found


def table_of(model: nn.Module) -> Float[Tensor, " half"]:
    """The rotary frequencies that a model of the Llama family turns with."""
    return model.get_submodule("model.rotary_emb").inv_freq


def divisors(model: nn.Module, extended: nn.Module) -> list[float]:
    r"""$\theta_i / h(\theta_i)$: by what each frequency was divided, from the fastest on."""
    return [round(x, 4) for x in (table_of(model) / table_of(extended)).tolist()]


@dataclass(frozen=True)
class Reading:
    """How one text was read.

    Attributes:
        method: Name of the method.
        divisors: By what each frequency was divided.
        curve: Mean loss of each `BIN` places, in nats per token.
        temperature: What queries and keys were multiplied by.
    """

    method: str
    divisors: tuple[float, ...]
    curve: tuple[float, ...]
    temperature: float

    def between(self, first: int, last: int) -> float:
        """Mean loss of the places from `first` up to `last`."""
        part = self.curve[first // BIN : last // BIN]
        return sum(part) / len(part)


def read(model: nn.Module, extended: nn.Module, method: str, ids: Int[Tensor, " time"]) -> Reading:
    """Read a text once, and say where it was hard."""
    losses = chunked_losses(extended, ids[None])[0]
    curve = tuple(round(float(part.mean()), 4) for part in losses.split(BIN))
    scaling = float(extended.get_submodule("model.rotary_emb").attention_scaling)
    return Reading(method, tuple(divisors(model, extended)), curve, scaling)


# --- dynamic NTK with and without a cache ---------------------------------------------------------


def transformers_dynamic(model: nn.Module, factor: float = 1.0) -> nn.Module:
    """The same weights with transformers' own `rope_type` "dynamic"."""
    config = type(model.config).from_dict(model.config.to_dict())
    theta = model.config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": theta, "factor": factor}
    found = type(model)(config).eval()
    found.load_state_dict(model.state_dict())
    return found


@torch.inference_mode()
def last_logits(
    model: nn.Module, ids: Int[Tensor, " time"], start: int | None = None
) -> Float[Tensor, " vocabulary"]:
    """The logits after the last token: in one pass, or token by token from `start` with a cache."""
    if start is None:
        return model(input_ids=ids[None], use_cache=False).logits[0, -1]
    cache = DynamicCache()
    out = model(input_ids=ids[None, :start], past_key_values=cache, use_cache=True)
    for at in range(start, len(ids)):
        out = model(input_ids=ids[None, at : at + 1], past_key_values=cache, use_cache=True)
    return out.logits[0, -1]


def cache_gaps(model: nn.Module, ids: Int[Tensor, " time"], start: int) -> dict[str, float]:
    """The largest difference that a cache makes to the last logits, by who scales."""
    makers = {
        "fixed table (YaRN)": yarn(model, 2.0),
        "transformers' dynamic": transformers_dynamic(model),
        "dynamic_ntk of this package": dynamic_ntk(model),
    }
    return {
        name: float((last_logits(m, ids) - last_logits(m, ids, start)).abs().max())
        for name, m in makers.items()
    }


# --- files ----------------------------------------------------------------------------------------


@torch.inference_mode()
def round_trips(model: nn.Module, ids: Int[Tensor, " time"]) -> dict[str, tuple[str, float]]:
    """What each method is called in a saved configuration, and what saving and loading changes."""
    found = {}
    for name in METHODS:
        extended = longer(model, name, 4.0, length=len(ids))
        with tempfile.TemporaryDirectory() as folder, _no_bars():
            extended.save_pretrained(folder)
            again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before, after = (m(input_ids=ids[None], use_cache=False).logits for m in (extended, again))
        kind = again.config.rope_parameters["rope_type"]
        found[name] = (kind, float((before - after).abs().max()))
    return found


@contextmanager
def _no_bars() -> Iterator[None]:
    """Saving and loading without progress bars, which a notebook would keep."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache_bytes(model: nn.Module, tokens: int, bytes_: int = 2) -> int:
    """Bytes of the keys and values of one text."""
    c = model.config
    return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * tokens * bytes_
