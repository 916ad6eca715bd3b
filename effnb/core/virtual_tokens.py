"""Virtual tokens: positions in front of a text that only the model's inside knows of.

Prefix tuning gives every attention trained keys and values of such positions; prompt tuning puts
trained vectors in front of the embedded text. Both run a model on more than its caller sees, so
that what the caller gives (mask, positions, cache) has to be widened, and what comes back narrowed.

The caller's cache never holds virtual tokens: `VirtualCache` stands between it and the model and
adds their keys and values as they are read. Lengths, masks and positions outside are those of the
text, and whatever reorders, crops or repeats a cache (beam search, assisted decoding) stays right.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.context import PROBE, context_limit
from effnb.core.deltas import attached, set_active
from effnb.core.modules import refuse_encoder_decoder, share

Heads = Float[Tensor, "_ _ _ _"]  # (batch, heads, time, dim)
KeysValues = tuple[Heads, Heads]
Mask = Tensor | dict[str, Tensor]


# --- the model under it ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """What has to be known of a model that reads virtual tokens; found by running it.

    Attributes:
        keys_values: Shapes (heads, dim) of the keys and of the values of each layer, in the order
            of the cache; empty where no layer reads a cache.
        causal: Whether the model keeps a cache when it is asked to: a decoder.
        first_position: The position of a text's first token; None where positions cannot be given.
        limit: The longest text that the model is made for, in tokens; None where there is no end.
        sliding: Whether some layers only attend to near tokens.
    """

    keys_values: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    causal: bool
    first_position: int | None
    limit: int | None
    sliding: bool


def backbone(model: nn.Module) -> str:
    """The dotted name of the Hugging Face model that turns token ids into hidden states.

    It is the innermost one that is called with ids: a class with a head may pass over the model in
    its middle (OPT calls the decoder within it).

    Raises:
        ValueError: When there is none, or it is an encoder-decoder.
    """

    def is_one(module: nn.Module) -> bool:
        return hasattr(module, "base_model_prefix") and hasattr(module, "get_input_embeddings")

    outer = next((path for path, m in model.named_modules() if is_one(m)), None)
    if outer is None:
        raise ValueError(
            f"{type(model).__name__} holds no Hugging Face transformer, and only their masks, "
            "positions and caches are known here."
        )
    whole = model.get_submodule(outer)
    refuse_encoder_decoder(whole, "what puts tokens in front of a text")
    quiet = share(set_active(whole) if attached(whole) else whole).eval()
    called: list[str] = []

    def note(path: str) -> Callable[..., None]:
        def before(module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
            if named(module, arguments, keywords).get("input_ids") is not None:
                called.append(path)

        return before

    for path, module in quiet.named_modules():
        if is_one(module):
            module.register_forward_pre_hook(note(path), with_kwargs=True)
    _attempt(quiet)
    if not called:
        raise ValueError(f"{type(whole).__name__} does not pass token ids on to a transformer.")
    return ".".join(part for part in (outer, called[-1]) if part)


def _attempt(model: nn.Module, **keywords: Any) -> Any:
    """Run a model on a few tokens.

    Raises:
        ValueError: When it does not run on `input_ids`.
    """
    ids = torch.full((1, PROBE), 5, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            return model(input_ids=ids, return_dict=True, **keywords)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError) as problem:
        raise ValueError(
            f"{type(model).__name__} does not run on input_ids alone "
            f"({(str(problem) or type(problem).__name__).splitlines()[0][:80]})."
        ) from None


def study(base: nn.Module) -> Reader:
    """Find out how a backbone reads masks, positions and caches, deltas on it left aside.

    Raises:
        ValueError: When it does not run on `input_ids`.
    """
    quiet = share(set_active(base) if attached(base) else base).eval()
    device = next(quiet.parameters()).device
    ids = torch.full((1, PROBE), 5, device=device)
    output = _attempt(quiet, use_cache=True)
    plain = output.last_hidden_state
    cache = getattr(output, "past_key_values", None)
    causal = cache is not None and hasattr(cache, "get_seq_length")
    try:
        shapes = keys_values_of(quiet, ids)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError, NotImplementedError):
        shapes = []
    ahead = None
    padding = getattr(getattr(base, "config", None), "pad_token_id", None)
    for offset in dict.fromkeys([0, *([padding + 1] if isinstance(padding, int) else [])]):
        try:
            moved = _attempt(quiet, position_ids=torch.arange(PROBE, device=device)[None] + offset)
        except ValueError:
            continue
        if torch.allclose(moved.last_hidden_state, plain, atol=1e-5, rtol=1e-4):
            ahead = offset
            break
    return Reader(
        keys_values=tuple(
            ((k.shape[1], k.shape[3]), (v.shape[1], v.shape[3])) for k, v in shapes
        ),
        causal=causal,
        first_position=ahead,
        limit=context_limit(quiet),
        sliding=_sliding(base, cache),
    )  # fmt: skip


def _sliding(base: nn.Module, cache: Any) -> bool:
    config = getattr(base, "config", None)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    near = getattr(config, "local_attention", None) or getattr(config, "attention_window", None)
    return bool(kinds or near) or any(getattr(cache, "is_sliding", ()))


def keys_values_of(base: nn.Module, ids: Int[Tensor, "1 time"]) -> list[KeysValues]:
    """The keys and values that each layer of a backbone makes of a text, as its cache gets them."""
    seen: list[KeysValues] = []
    quiet = share(set_active(base) if attached(base) else base).eval()
    with torch.no_grad():
        quiet(input_ids=ids, past_key_values=virtual_cache(None, _Watch(seen)))
    return seen


# --- caches ---------------------------------------------------------------------------------------


class Given:
    """Keys and values that are there from the start: a prefix."""

    def __init__(self, layers: Sequence[KeysValues]) -> None:
        """Keys and values of each layer, with one row for all texts of a batch."""
        self.layers = layers
        self.length = layers[0][0].shape[2]

    def join(
        self, keys: Heads, values: Heads, layer: int, store: Callable, behind: int
    ) -> KeysValues:
        """Put them before what is stored."""
        return _before(self.layers[layer], store(keys, values), behind)

    def extra(self, first: bool) -> int:
        """How many of the keys that the next pass brings are not for the cache."""
        return 0

    def in_front(self, first: bool) -> int:
        """How many positions lie before those that the next pass brings."""
        return self.length


class Computed:
    """Keys and values that the first pass makes of vectors in front of the text: a prompt.

    In a causal model they depend on nothing behind them: one row serves all texts of a batch.

    Attributes:
        layers: Of each layer, once it has run.
        length: Virtual tokens.
    """

    def __init__(self, length: int) -> None:
        """Nothing computed yet."""
        self.length = length
        self.layers: dict[int, KeysValues] = {}

    def join(
        self, keys: Heads, values: Heads, layer: int, store: Callable, behind: int
    ) -> KeysValues:
        """Take off what belongs to the virtual tokens, and put it before what is stored."""
        if layer not in self.layers:
            self.layers[layer] = (keys[:1, :, : self.length], values[:1, :, : self.length])
            keys, values = keys[:, :, self.length :], values[:, :, self.length :]
        return _before(self.layers[layer], store(keys, values), behind)

    def extra(self, first: bool) -> int:
        """How many of the keys that the next pass brings are not for the cache."""
        return self.length if first else 0

    def in_front(self, first: bool) -> int:
        """How many positions lie before those that the next pass brings."""
        return 0 if first else self.length


def _before(virtual: KeysValues, kept: KeysValues, behind: int) -> KeysValues:
    r"""$K' = [P_k; K]$ and $V' = [P_v; V]$, behind the first `behind` of what is kept."""
    return tuple(
        torch.cat([k[:, :, :behind], p.to(k).expand(len(k), -1, -1, -1), k[:, :, behind:]], 2)
        for p, k in zip(virtual, kept, strict=True)
    )


class _Watch:
    """Notes the keys and values of each layer, and keeps nothing."""

    length = 0

    def __init__(self, seen: list[KeysValues]) -> None:
        self.seen = seen

    def join(
        self, keys: Heads, values: Heads, layer: int, store: Callable, behind: int
    ) -> KeysValues:
        if layer != len(self.seen):
            raise ValueError("layers read the cache out of order, or not all of them do.")
        self.seen.append((keys, values))
        return keys, values

    def extra(self, first: bool) -> int:
        return 0

    def in_front(self, first: bool) -> int:
        return 0


class _VirtualCache:
    """A cache as the model sees it: the caller's, or none, with virtual tokens in front."""

    def __init__(self, inner: Any, tokens: Given | Computed | _Watch, first: bool) -> None:
        self.inner, self.tokens, self.first = inner, tokens, first
        self.layers = [] if inner is None else inner.layers
        self.layer_class_to_replicate, self.offloading = None, False

    def update(self, keys: Heads, values: Heads, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Store what is new, and give all that a token may attend to."""

        def store(keys: Heads, values: Heads) -> KeysValues:
            if self.inner is None:
                return keys, values
            return self.inner.update(keys, values, layer_idx, *rest, **more)

        # A prompt is read behind a prefix, and causal masks go by that order.
        behind = self._given() if isinstance(self.tokens, Computed) else 0
        return self.tokens.join(keys, values, layer_idx, store, behind)

    def _given(self) -> int:
        """Positions that prefixes take in the caches under this one."""
        inner, found = self.inner, 0
        while isinstance(inner, _VirtualCache):
            found += inner.tokens.length if isinstance(inner.tokens, Given) else 0
            inner = inner.inner
        return found

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Positions before those that the next pass brings."""
        past = 0 if self.inner is None else self.inner.get_seq_length(layer_idx)
        return past + self.tokens.in_front(self.first)

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """The same."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """How many keys the next pass attends to, and the position of the first of them."""
        new = query_length - self.tokens.extra(self.first)
        sizes = (new, 0) if self.inner is None else self.inner.get_mask_sizes(new, layer_idx)
        return sizes[0] + self.tokens.length, sizes[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """How many keys the cache can hold; -1 for any number."""
        limit = -1 if self.inner is None else self.inner.get_max_length(layer_idx)
        return limit if limit < 0 else limit + self.tokens.length


@functools.cache
def _as_transformers_cache() -> type:
    """`_VirtualCache` as a subclass of transformers' `Cache`, which models ask for."""
    from transformers.cache_utils import Cache

    return type("VirtualCache", (_VirtualCache, Cache), {})


def virtual_cache(inner: Any, tokens: Any, first: bool = False) -> Any:
    """A cache with virtual tokens in front of another one, or of nothing (None)."""
    return _as_transformers_cache()(inner, tokens, first)


def outermost(cache: Any) -> Any:
    """The caller's cache under any number of virtual ones; None where there is none."""
    while isinstance(cache, _VirtualCache):
        cache = cache.inner
    return cache


def fresh_cache(base: nn.Module, reader: Reader, keywords: dict[str, Any]) -> Any:
    """The empty cache that a model would have made for itself; None where it would not."""
    wanted = keywords.get("use_cache")
    if wanted is None:
        wanted = getattr(base.config, "use_cache", False)
    if not (reader.causal and wanted):
        return None
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=base.config)


# --- what the caller gives, and gets back ---------------------------------------------------------


def named(base: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a model by name."""
    names = list(inspect.signature(base.forward).parameters)
    return dict(zip(names, arguments, strict=False)) | keywords


def shape_of(given: dict[str, Any]) -> tuple[int, int]:
    """Batch and time of what a model is to read.

    Raises:
        ValueError: When it is given neither ids nor embeddings.
    """
    for key in ("input_ids", "inputs_embeds"):
        if given.get(key) is not None:
            return tuple(given[key].shape[:2])
    raise ValueError("the model was given neither input_ids nor inputs_embeds.")


def check_length(reader: Reader, tokens: int, virtual: int, what: str) -> None:
    """Refuse more tokens than the context has room for.

    Raises:
        ValueError: The sentence names all three numbers.
    """
    if reader.limit is not None and tokens + virtual > reader.limit:
        raise ValueError(
            f"a text of {tokens} tokens and {what} of {virtual} are longer than the model's "
            f"context of {reader.limit} tokens."
        )


def text_mask(given: dict[str, Any], past: int) -> Mask:
    """The mask over past and present tokens, all of them visible where none is given.

    Raises:
        ValueError: When texts are packed into one row, which the model tells from positions that
            start again, or the mask is of a form that cannot be widened.
    """
    batch, time = shape_of(given)
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None:
        if positions is not None and bool((positions.diff(dim=-1) != 1).any()):
            raise ValueError(
                "positions do not rise by one and there is no mask: texts packed into one row "
                "would share virtual tokens; give each its own row."
            )
        held = given.get("input_ids")
        held = held if held is not None else given["inputs_embeds"]
        return torch.ones(batch, past + time, dtype=torch.long, device=held.device)
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]  # by kind of layer
    if not all(isinstance(m, Tensor) and m.ndim in (2, 4) for m in masks):
        raise ValueError("attention masks must be tensors of two or four dimensions here.")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] != past + time:
        raise ValueError(
            f"the mask covers {mask.shape[1]} tokens; there are {past} in the cache and {time} new "
            "ones, and virtual tokens have no place in it."
        )
    return mask


def text_positions(
    given: dict[str, Any], reader: Reader, mask: Mask, virtual: int
) -> Int[Tensor, "batch time"] | None:
    """Positions of the new tokens behind the virtual ones; None where the model counts by itself.

    Rotary models see padding on the left as nothing only as long as all positions move together;
    virtual tokens do not move. So texts that begin behind padding get their positions here.

    Raises:
        ValueError: When positions are given in another form than a table.
    """
    positions = given.get("position_ids")
    if positions is not None:
        if positions.ndim != 2:
            raise ValueError("position_ids must have two dimensions, (batch, time), here.")
        return positions + virtual
    counted = isinstance(mask, Tensor) and mask.ndim == 2 and reader.first_position is not None
    if not counted or bool(mask[:, 0].all()):
        return None
    time = shape_of(given)[1]
    counted = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -time:]
    return counted + virtual + reader.first_position


def refuse_checkpointing(base: nn.Module) -> None:
    """Refuse to train under gradient checkpointing, which takes caches away from the layers.

    Raises:
        ValueError: When it is on.
    """
    if base.training and any(getattr(m, "gradient_checkpointing", False) for m in base.modules()):
        raise ValueError(
            "gradient checkpointing drops the cache, through which the layers read virtual tokens; "
            "switch it off (model.gradient_checkpointing_disable())."
        )


def give_back(output: Any, cache: Any, keywords: dict[str, Any], virtual: int = 0) -> Any:
    """An output as the caller expects it: with its own cache, without the virtual tokens.

    Args:
        output: What the model returned for `return_dict=True`.
        cache: The caller's cache, or the one made for it.
        keywords: What the caller gave.
        virtual: How many positions of hidden states to cut off in front.
    """
    fields = {key: value for key, value in output.items() if key != "past_key_values"}
    if cache is not None:
        fields["past_key_values"] = cache
    if virtual:
        fields["last_hidden_state"] = fields["last_hidden_state"][:, virtual:]
        if fields.get("hidden_states") is not None:
            fields["hidden_states"] = tuple(h[:, virtual:] for h in fields["hidden_states"])
    output = type(output)(**fields)
    return output.to_tuple() if keywords.get("return_dict") is False else output


def widened(mask: Mask, virtual: int) -> Mask:
    """A mask with virtual tokens in front of the text that every token may attend to."""
    if isinstance(mask, dict):
        return {kind: widened(m, virtual) for kind, m in mask.items()}
    if mask.ndim == 2:
        return torch.cat([mask.new_ones(len(mask), virtual), mask], 1)
    return torch.cat([_visible(mask, mask.shape[2], virtual), mask], 3)


def widened_at_first(mask: Mask, virtual: int, past: int, causal: bool) -> Mask:
    """The same where the virtual tokens are read as well: they have rows of their own.

    Args:
        mask: Over the text.
        virtual: Tokens in front.
        past: Columns of the mask before the present tokens, all visible (a prefix).
        causal: Whether a virtual token only attends to those before it.
    """
    if isinstance(mask, dict):
        return {k: widened_at_first(m, virtual, past, causal) for k, m in mask.items()}
    if mask.ndim == 2:
        return widened(mask, virtual)
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    wide = widened(mask, virtual)
    rows = wide[:, :, :1].expand(-1, -1, virtual, -1)
    if causal:
        rows = torch.full_like(rows, hidden)
        rows[..., : past + virtual] = _visible(mask, virtual, past + virtual)
        later = torch.ones(virtual, virtual, dtype=torch.bool, device=mask.device).triu(1)
        rows[..., past : past + virtual].masked_fill_(later, hidden)
    return torch.cat([rows, wide], 2)


def _visible(mask: Tensor, rows: int, columns: int) -> Tensor:
    shape = (*mask.shape[:2], rows, columns)
    if mask.dtype == torch.bool:
        return mask.new_ones(shape)
    return mask.new_zeros(shape)
