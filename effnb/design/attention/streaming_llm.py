r"""StreamingLLM: a cache that forgets, but keeps the first tokens as attention sinks.

A model that keeps only a window of its cache breaks as soon as the first tokens leave: softmax must
put its weight somewhere, and models learn to put what they do not need on the first tokens, the
*sinks*. Keeping the keys and values of $S$ first tokens (4 are enough) with those of the last $W$
makes texts of any length readable with a cache of constant size. What lies between is forgotten:
the context is not extended.

Positions are those *inside the cache*: a key's distance from the newest token is counted in cached
tokens. Distances among the latest tokens are what they were; only sinks move. After $e$ tokens have
been dropped, a sink of position $p$ is read as if it had position $p + e$. Rotary embeddings depend
on differences of positions only, so rotating the sinks' keys by $e$ more is the same as renumbering
all tokens, and the model can go on counting.

Xiao, Tian, Chen, Han, Lewis, "Efficient Streaming Language Models with Attention Sinks", 2023,
arXiv 2309.17453.
"""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.modules import Model, refuse_encoder_decoder, share
from effnb.core.proof import probe_ids
from effnb.design.attention.checks import check_count


def rotate_keys(
    keys: Float[Tensor, "batch heads time dim"],
    shift: int,
    frequencies: Float[Tensor, " pairs"],
) -> Float[Tensor, "batch heads time dim"]:
    r"""Keys as if each were `shift` positions later.

    Channel $n$ and channel $n + r / 2$ of the first $r$ are a point of the plane that a position
    turns by $\omega_n$; other channels have no position.

    Args:
        keys: Keys after the rotary embedding.
        shift: By how many positions.
        frequencies: $\omega$, half as many as rotated channels.
    """
    half = len(frequencies)
    angles = shift * frequencies.double()
    cos, sin = (x.to(keys.device) for x in (angles.cos(), angles.sin()))
    kind = torch.promote_types(keys.dtype, torch.float32)
    a, b, rest = keys.to(kind).split([half, half, keys.shape[-1] - 2 * half], -1)
    cos, sin = cos.to(kind), sin.to(kind)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(keys.dtype)


class StreamingLayer:
    """The keys and values of one layer: sinks and the latest tokens.

    It does what transformers asks of a layer of its caches.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = True

    def __init__(self, window: int, sinks: int, frequencies: Tensor | None) -> None:
        """An empty layer; see `StreamingCache`."""
        self.window, self.sinks, self.frequencies = window, sinks, frequencies
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.is_initialized = False
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, type and device from the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        self.is_initialized = True

    @property
    def stored(self) -> int:
        """Tokens whose keys and values are stored."""
        return self.keys.shape[-2] if self.is_initialized else 0

    def _left(self, new: int) -> int:
        """How many of the stored tokens make room for new ones."""
        too_many = self.stored + new - (self.sinks + self.window)
        return max(0, min(too_many, self.stored - min(self.sinks, self.stored)))

    def update(
        self,
        key_states: Float[Tensor, "batch heads new key_dim"],
        value_states: Float[Tensor, "batch heads new value_dim"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[
        Float[Tensor, "batch heads time key_dim"], Float[Tensor, "batch heads time value_dim"]
    ]:
        """Drop what makes room, add the new tokens, and give what attention reads in this step.

        A step of more tokens than the window (a long prompt) is attended to whole, and forgotten
        but for sinks and window in the next one.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if drop := self._left(key_states.shape[-2]):
            s = self.sinks
            self.keys, self.values = (
                torch.cat([x[..., :s, :], x[..., s + drop :, :]], -2)
                for x in (self.keys, self.values)
            )
        self.keys = torch.cat([self.keys, key_states], -2)
        self.values = torch.cat([self.values, value_states], -2)
        self.seen += key_states.shape[-2]
        gone = self.seen - self.stored
        if not gone or not self.sinks or self.frequencies is None:
            return self.keys, self.values
        # From the original keys each time, so that rounding does not add up.
        moved = rotate_keys(self.keys[..., : self.sinks, :], gone, self.frequencies)
        return torch.cat([moved, self.keys[..., self.sinks :, :]], -2), self.values

    def get_seq_length(self) -> int:
        """How many tokens were read, as the model's positions go on counting them."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys that a query will meet, as if they were the latest."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        length = self.stored - self._left(new) + new
        return length, self.seen + new - length

    def get_max_length(self) -> int:
        """No limit: a text may go on for ever."""
        return -1

    get_max_cache_shape = get_max_length  # its name in early releases of transformers 5

    def _map(self, function: Any) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)

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
        """Refuse: what was dropped for these tokens is gone.

        Raises:
            ValueError: When any token is to be taken back.
        """
        if tokens_to_remove:
            raise ValueError("tokens cannot be taken back from a cache that forgets.")


@cache
def _as_transformers_cache() -> type:
    """`StreamingCache` as a subclass of transformers' `Cache`, made when one is first needed."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(StreamingLayer)
    return type("StreamingCache", (StreamingCache, Cache), {})


class StreamingCache:
    """A cache of constant size for `model(..., past_key_values=)` and `model.generate`.

    Each step of one token attends to the sinks and to the `window` latest tokens, itself among
    them. The texts of a batch must be equally long: a cache does not see which tokens are padding,
    and would take them for sinks (`streaming_llm` gives such batches a refusal).
    """

    def __new__(cls, *args: Any, **keywords: Any) -> StreamingCache:
        """An instance of the subclass that is a transformers `Cache` too."""
        return object.__new__(_as_transformers_cache())

    def __init__(self, model: nn.Module, *, window: int, sinks: int = 4) -> None:
        """An empty cache.

        Args:
            model: The Hugging Face decoder that it is for. It is run on one token, at several
                positions, to prove that rotating its keys is what a position does to them.
            window: W, the latest tokens that are kept.
            sinks: S, the first tokens that are kept; 0 is a plain window, which breaks when the
                first tokens leave.

        Raises:
            ValueError: A window below 1, sinks below 0, or a model whose positions are not a
                rotation of keys, or change with the length of the text.
            TypeError: Numbers that are not whole.
        """
        check_count("window", window)
        check_count("sinks", sinks, least=0)
        frequencies = rotary_frequencies(model)
        self.window, self.sinks = window, sinks
        super().__init__(
            layer_class_to_replicate=partial(StreamingLayer, window, sinks, frequencies)
        )

    @property
    def stored(self) -> int:
        """Tokens whose keys and values are stored in each layer."""
        return self.layers[0].stored if self.layers else 0


def rotary_frequencies(model: nn.Module) -> Float[Tensor, " pairs"]:
    r"""The frequencies $\omega$ by which a model's positions rotate its keys, proven by running it.

    A text of one token attends to itself wherever it is, so all layers see the same hidden states
    at every position, and their keys must differ by the rotation alone.

    Raises:
        ValueError: When they do not, or when the model has several tables, or one that changes with
            the length of the text; when not all layers attend to everything.
    """
    if _streams(model):
        raise ValueError("this model streams already; start from the original.")
    refuse_encoder_decoder(model, "a streaming cache")
    name = type(model).__name__
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ValueError(f"{name} has no Hugging Face configuration; a streaming cache needs one.")
    config = config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others or getattr(config, "sliding_window", None):
        raise ValueError(f"layers of {name} have windows or states of their own.")
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise ValueError(
            f"the positions of {name} are of the type {kind}: their frequencies change with the "
            "length of the text, and keys that are kept would be of another."
        )
    tables = [b for n, b in model.named_buffers() if n.split(".")[-1] == "inv_freq"]
    if not tables or any(not torch.equal(tables[0], other) for other in tables[1:]):
        found = "several tables" if tables else "no table"
        raise ValueError(f"{name} has {found} of rotary frequencies; one is needed.")
    frequencies = tables[0].detach().flatten()
    keys = [_keys_at(model, position) for position in (0, 3)]
    if not keys[0]:
        raise ValueError(f"{name} puts no keys into a cache.")
    for before, after in zip(*keys):
        if 2 * len(frequencies) > before.shape[-1]:
            raise ValueError(f"{name} has rotary frequencies that are not those of its keys.")
        moved = rotate_keys(before, 3, frequencies)
        close = 0.02 if before.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if not bool((moved - after).norm() <= close * after.norm()):
            raise ValueError(
                f"a position of {name} does more to its keys than rotate channel n with channel "
                "n + r / 2; keys cannot be moved inside the cache."
            )
    return frequencies


def _keys_at(model: nn.Module, position: int) -> list[Tensor]:
    """The keys that each layer puts into its cache for one token at a position."""
    from transformers import DynamicCache

    quiet = share(model).eval()
    past = DynamicCache()
    ids = probe_ids(model, 1)
    try:
        with torch.no_grad():
            quiet(
                input_ids=ids,
                position_ids=torch.full_like(ids, position),
                past_key_values=past,
                use_cache=True,
            )
    except TypeError as problem:
        raise ValueError(
            f"{type(model).__name__} cannot be told positions and given a cache: {problem}"
        ) from None
    return [layer.keys for layer in past.layers if getattr(layer, "keys", None) is not None]


class _GiveCache:
    """Before a model runs: if it has no past, give it a copy of an empty streaming cache."""

    def __init__(self, empty: StreamingCache) -> None:
        self.empty = empty

    def __call__(self, module: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> Any:
        mask = keywords.get("attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.bool().all()):
            raise ValueError(
                "the batch has padding, which a streaming cache would keep as attention sinks; "
                "give texts of one length."
            )
        past = keywords.get("past_key_values")
        if past is None or (not isinstance(past, StreamingCache) and not past.get_seq_length()):
            new = copy.deepcopy(self.empty)
            keywords = {**keywords, "past_key_values": new, "use_cache": True}
        return arguments, keywords


def _streams(model: nn.Module) -> bool:
    return any(isinstance(hook, _GiveCache) for hook in model._forward_pre_hooks.values())


def streaming_llm(model: Model, *, window: int, sinks: int = 4) -> Model:
    """A model that forgets as it reads: it keeps sinks and a window wherever it keeps a cache.

    Its weights are the given model's. A text that is read in one step is attended to whole; what
    forgetting does shows when it is read a few tokens at a time (`kv_cache.decode_logits`), as in
    `generate`.

    Args:
        model: A Hugging Face decoder with rotary positions; it is not changed.
        window: The latest tokens that are kept.
        sinks: The first tokens that are kept.

    Raises:
        ValueError: As `StreamingCache`; or a model whose cache is another one already. Batches with
            padding are refused when they come.
    """
    empty = StreamingCache(model, window=window, sinks=sinks)  # says at once what does not fit
    result = share(model)
    result.register_forward_pre_hook(_GiveCache(empty), with_kwargs=True)
    return result
