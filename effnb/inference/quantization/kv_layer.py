r"""The stored keys and values of one attention layer: most of them packed, the latest as they are.

`kv_cache` makes a cache of such layers and says what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from effnb.inference.quantization.formats import HALF_MAX, check_bits, pack, unpack
from effnb.inference.quantization.hadamard import check_order, hadamard_transform

AXES = ("channel", "token")


@dataclass(frozen=True)
class PackedRows:
    """Rows of numbers in groups along the row, as packed codes with a scale and minimum each.

    Attributes:
        codes: Packed codes.
        scales: Step of each group, in half precision.
        minima: Smallest number of each group, in half precision.
        bits: Bits per code.
        group_size: Numbers per group, a multiple of 8 so that groups fill whole bytes.
    """

    codes: UInt8[Tensor, "batch heads rows packed"]
    scales: Float[Tensor, "batch heads rows groups"]
    minima: Float[Tensor, "batch heads rows groups"]
    bits: int
    group_size: int

    @classmethod
    def of(
        cls, x: Float[Tensor, "batch heads rows columns"], bits: int, group_size: int
    ) -> PackedRows:
        """Quantize; columns are a multiple of the group size.

        Raises:
            ValueError: When a number is NaN or does not fit into half precision.
        """
        grouped = x.detach().float().unflatten(-1, (-1, group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
        if not bool(((low >= -HALF_MAX) & (high <= HALF_MAX)).all()):
            raise ValueError("keys or values are NaN or beyond half precision (65504).")
        top = 2**bits - 1
        minima = low.half()
        scales = ((high - low) / top).half()
        scales = torch.where(scales > 0, scales, 1)  # a constant group needs no step
        q = (grouped - minima.float().unsqueeze(-1)) / scales.float().unsqueeze(-1)
        codes = q.clamp(0, top).round().to(torch.uint8).flatten(-2)
        packed = pack(codes.flatten(0, 2), bits).view(*codes.shape[:3], -1)
        return cls(packed, scales, minima, bits, group_size)

    def read(self, dtype: torch.dtype) -> Float[Tensor, "batch heads rows columns"]:
        r"""$\hat x = q\,s + m$."""
        shape = (*self.scales.shape, self.group_size)
        columns = shape[3] * self.group_size
        codes = unpack(self.codes.flatten(0, 2), self.bits, columns).view(shape)
        x = codes.float() * self.scales.float().unsqueeze(-1) + self.minima.float().unsqueeze(-1)
        return x.flatten(-2).to(dtype)

    def map(self, function: Callable[..., Tensor], *others: PackedRows) -> PackedRows:
        """The same function on codes, scales and minima, of these rows and others."""
        parts = {
            name: function(*(getattr(rows, name) for rows in (self, *others)))
            for name in ("codes", "scales", "minima")
        }
        return replace(self, **parts)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and minima."""
        parts = (self.codes, self.scales, self.minima)
        return sum(t.numel() * t.element_size() for t in parts)


class KiviLayer:
    """The keys and values of one attention layer: packed ones, and the latest as they are.

    It does what transformers asks of a layer of its caches.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = True

    def __init__(
        self,
        bits: int = 2,
        group_size: int = 32,
        residual: int = 128,
        key_axis: str = "channel",
        quantized_prompt: bool = False,
        rotate_keys: bool = False,
    ) -> None:
        """An empty layer; see `KiviCache`."""
        check_settings(bits, group_size, residual, key_axis)
        self.bits, self.group_size, self.residual = bits, group_size, residual
        self.key_axis, self.rotate_keys = key_axis, rotate_keys
        self.quantized_prompt = quantized_prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.packed_keys: PackedRows | None = None
        self.packed_values: PackedRows | None = None
        self.is_initialized = False
        self._tokens = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, type and device from the first keys and values."""
        check_head(value_states.shape[-1], self.group_size)
        if self.key_axis == "token":
            check_head(key_states.shape[-1], self.group_size)
        if self.rotate_keys:
            check_order(key_states.shape[-1], "the width of a key")
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "batch heads new key_dim"],
        value_states: Float[Tensor, "batch heads new value_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[
        Float[Tensor, "batch heads time key_dim"], Float[Tensor, "batch heads time value_dim"]
    ]:
        """Add tokens; returns what attention reads in this step.

        The new tokens are exact in it, and become due for quantization afterwards. But with
        `quantized_prompt`, all tokens of a first step are returned as the last one meets them.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if self.quantized_prompt and self._tokens == 0 and new > 1:
            self._add(key_states[..., :-1, :], value_states[..., :-1, :])
            self._pack_what_is_due()
            key_states, value_states = key_states[..., -1:, :], value_states[..., -1:, :]
        self._add(key_states, value_states)
        now = self.read()
        self._pack_what_is_due()
        return now

    def _add(self, key_states: Tensor, value_states: Tensor) -> None:
        self._tokens += key_states.shape[-2]
        self.keys = torch.cat([self.keys, key_states], -2)
        self.values = torch.cat([self.values, value_states], -2)

    def read(
        self,
    ) -> tuple[
        Float[Tensor, "batch heads time key_dim"], Float[Tensor, "batch heads time value_dim"]
    ]:
        """All keys and values, packed ones read back."""
        keys, values = self.keys, self.values
        if self.packed_keys is not None:
            old = self.packed_keys.read(self.dtype)
            old = old.mT if self.key_axis == "channel" else old
            old = hadamard_transform(old, transpose=True) if self.rotate_keys else old
            keys = torch.cat([old, keys], -2)
        if self.packed_values is not None:
            values = torch.cat([self.packed_values.read(self.dtype), values], -2)
        return keys, values

    def _pack_what_is_due(self) -> None:
        have, keep = self.keys.shape[-2], self.residual
        by_channel = self.key_axis == "channel"
        due = have // keep * keep if by_channel else max(have - keep, 0)
        if due:
            old, self.keys = self.keys[..., :due, :], self.keys[..., due:, :].clone()
            old = hadamard_transform(old) if self.rotate_keys else old
            new = PackedRows.of(old.mT if by_channel else old, self.bits, self.group_size)
            self.packed_keys = _append(self.packed_keys, new, -1 if by_channel else -2)
        due = max(self.values.shape[-2] - keep, 0)
        if due:
            old, self.values = self.values[..., :due, :], self.values[..., due:, :].clone()
            new = PackedRows.of(old, self.bits, self.group_size)
            self.packed_values = _append(self.packed_values, new, -2)

    def get_seq_length(self) -> int:
        """How many tokens are stored."""
        return self._tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a query will meet.

        Early releases of transformers 5 give the positions of the query, later ones their number.
        """
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self._tokens + new, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early releases of transformers 5

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        """Change every stored tensor; for the batch axis, which comes first in all of them."""
        if not self.is_initialized:
            return
        self.keys, self.values = function(self.keys), function(self.values)
        for name in ("packed_keys", "packed_values"):
            rows = getattr(self, name)
            if rows is not None:
                setattr(self, name, rows.map(function))

    def reorder_cache(self, beam_idx: Int[Tensor, " batch"]) -> None:
        """Let each sequence go on with another one's past, as beam search asks."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, given as a negative number, as long as they are not packed.

        Raises:
            ValueError: When some of them are packed already.
        """
        remove = abs(tokens_to_remove)
        if not remove or not self.is_initialized:
            return
        kept = min(self.keys.shape[-2], self.values.shape[-2])
        if tokens_to_remove > 0 or remove > kept:
            raise ValueError(
                f"crop({tokens_to_remove}): only the latest {kept} tokens can be taken back, by a "
                "negative number; those before them are quantized."
            )
        self.keys, self.values = self.keys[..., :-remove, :], self.values[..., :-remove, :]
        self._tokens -= remove

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors, the latest tokens in the model's own type."""
        if not self.is_initialized:
            return 0
        packed = [rows.bytes for rows in (self.packed_keys, self.packed_values) if rows is not None]
        return sum(packed) + sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    @property
    def residual_bytes(self) -> int:
        """The part of `bytes` that the latest tokens take."""
        if not self.is_initialized:
            return 0
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    @property
    def fp16_bytes(self) -> int:
        """What an ordinary cache would take for the same tokens in 16-bit precision."""
        if not self.is_initialized:
            return 0
        batch, heads, _, size = self.keys.shape
        return 2 * batch * heads * self._tokens * (size + self.values.shape[-1])


def _append(rows: PackedRows | None, new: PackedRows, axis: int) -> PackedRows:
    if rows is None:
        return new
    return rows.map(lambda *parts: torch.cat(parts, axis), new)


def check_settings(bits: int, group_size: int, residual: int, key_axis: str) -> None:
    """Refuse settings that no cache can have."""
    check_bits(bits)
    if group_size < 8 or group_size % 8:
        raise ValueError(f"group_size is {group_size}; it must be a multiple of 8, from 8.")
    if residual < group_size or residual % group_size:
        raise ValueError(
            f"residual is {residual}; it must be a multiple of the group size, {group_size}: keys "
            "are quantized in whole groups."
        )
    if key_axis not in AXES:
        raise ValueError(f'key_axis is {key_axis!r}; it must be "channel" or "token".')


def check_head(size: int, group_size: int) -> None:
    """Refuse heads that do not consist of whole groups."""
    if size % group_size:
        raise ValueError(
            f"heads of {size} channels do not consist of groups of {group_size}; choose a group "
            "size that divides them."
        )
