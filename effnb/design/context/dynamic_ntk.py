r"""Dynamic NTK: the base grows with the text, so that short texts are read as before.

A fixed scale costs quality on every text, also on those that would have fitted. Dynamic scaling
chooses it by the current length $l$,

$$s(l) = \max(1, l / L), \qquad b(l) = b\, s(l)^{d/(d-2)},$$

so that up to the trained length $L$ the model is what it was (emozilla, r/LocalLLaMA, June 2023).

**With a key-value cache this goes wrong in many libraries.** Keys are usually cached after they
were turned. When the next token changes the base, cached keys keep the angles of the old one, and
scores between old keys and new queries belong to no table at all. The remedy is to cache keys
before they are turned and to turn them when they are read (Peng et al., 2023, arXiv 2309.00071,
sec. 3.3). There remains a second difference: if a pass over $l$ tokens turns all of them with
$s(l)$, then it computes other hidden states for the first tokens than a pass over fewer did, and no
cache of keys and values can undo that below the second layer.

So the scale here belongs to the *query*: the token at position $m$ reads everything before it with
the table of a text of $m + 1$ tokens,

$$a_{mn} = \big(R_{(m-n)\,\theta(s(m+1))}\; q_m\big)^\top k_n .$$

That is what generation from the first token on computes with such a cache, it does not depend on
tokens that come later or on other texts of the batch, and one pass over a text gives the same as
any number of cached steps. The price: each query beyond $L$ turns all keys for itself, so a pass
over a long text costs as many turns as scores, and all scores of a layer exist at once.

The rotary module of the model gets a table of zeros and so turns nothing; an attention function,
registered in transformers under the name `NAME`, does. Any cache serves, since what reaches it is
not turned.

transformers' own `rope_type` "dynamic" has both faults, shares one scale among all texts of a
batch, and computes another one: $f\,l/L - (f - 1)$, which at $l = f L$ is $f^2 - f + 1$. With
$f = 1$ it is the formula above.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from effnb.core.modules import Model, share
from effnb.design.context.ntk_aware import check_dim
from effnb.design.context.rope import rope_frequencies
from effnb.design.context.rotary_table import RotaryTable, rotary_table, with_table

NAME = "effnb_dynamic_ntk"
"""The attention function's name in transformers."""
BLOCK = 2**18
"""Numbers of turned keys that exist at once, for queries beyond the trained length: what fits into
a processor's cache. On other devices 64 times as many."""


def dynamic_scale(
    length: Int[Tensor, "*lengths"] | int, trained_length: int
) -> Float[Tensor, "*lengths"]:
    r"""$s(l) = \max(1, l / L)$.

    Args:
        length: $l$, tokens of the text so far.
        trained_length: $L$.
    """
    return (torch.as_tensor(length).double() / trained_length).clamp(min=1)


def dynamic_ntk_frequencies(
    inv_freq: Float[Tensor, " half"],
    length: Int[Tensor, "*lengths"] | int,
    trained_length: int,
) -> Float[Tensor, "*lengths half"]:
    r"""$\theta_i\, s(l)^{-2i/(d-2)}$, the NTK-aware table of each length.

    Args:
        inv_freq: $\theta$, the model's own, from the fastest to the slowest.
        length: $l$, tokens of the text so far.
        trained_length: $L$.

    Raises:
        ValueError: Fewer than two frequencies.
    """
    half = len(inv_freq)
    check_dim(2 * half)
    share_of = torch.arange(half, dtype=torch.float64, device=inv_freq.device) / (half - 1)
    scale = dynamic_scale(length, trained_length).to(inv_freq.device)
    return (inv_freq.double() / scale[..., None] ** share_of).to(inv_freq.dtype)


def transformers_scale(length: float, trained_length: int, factor: float) -> float:
    r"""The scale of transformers' `rope_type` "dynamic": $f\,l/L - (f - 1)$ for $l \ge L$.

    Args:
        length: $l$, the largest position of a batch plus 1.
        trained_length: $L$, there `max_position_embeddings`.
        factor: $f$.
    """
    return factor * max(length, trained_length) / trained_length - (factor - 1)


# ---------------------------------------------------------------- attention


def distances(
    visible: Bool[Tensor, "batch query key"], positions: Int[Tensor, "_batch query"]
) -> Int[Tensor, "batch query key"]:
    """Tokens between each query and each key that it sees.

    Without a cache keys are the queries' own tokens, and positions say it. The positions of cached
    keys are not known any more: there the keys that a token sees count as consecutive, ending with
    the token itself, which holds with padding on either side, in windows, and in static caches.

    Args:
        visible: Which key each query sees.
        positions: Of the queries; one row for all texts of the batch, or one for each.
    """
    if visible.shape[1] == visible.shape[2]:
        return (positions[:, :, None] - positions[:, None, :]).expand(visible.shape)
    counted = visible.long()
    return counted.flip(-1).cumsum(-1).flip(-1) - counted  # those behind it


def turned(
    x: Float[Tensor, "*batch dim"], angles: Float[Tensor, "*batch2 half"]
) -> Float[Tensor, "*batch3 dim"]:
    """Turn the first numbers of each head, in half-split layout, and leave the rest."""
    half = angles.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = a * cos - b * sin, b * cos + a * sin
    parts = [a, b, rest.expand(*a.shape[:-1], -1)] if rest.shape[-1] else [a, b]
    return torch.cat(parts, -1)


def dynamic_scores(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch groups key dim"],
    distance: Int[Tensor, "batch query key"],
    positions: Int[Tensor, "_batch query"],
    inv_freq: Float[Tensor, " half"],
    trained_length: int,
) -> Float[Tensor, "batch heads query key"]:
    r"""$a_{mn} = (R_{(m-n)\,\theta(s(m+1))}\, q_m)^\top k_n$ of queries and keys not turned yet.

    Args:
        query: $q$.
        key: $k$; each serves as many query heads as there are more of them.
        distance: $m - n$.
        positions: $m$.
        inv_freq: $\theta$.
        trained_length: $L$.
    """
    batch, heads, count, dim = query.shape
    groups, keys = key.shape[1], key.shape[2]
    q = query.view(batch, groups, heads // groups, count, dim)
    found = []
    room = BLOCK if query.device.type == "cpu" else 64 * BLOCK
    step = max(1, room // (batch * groups * keys * dim))
    for start in range(0, count, step):
        rows = slice(start, start + step)
        theta = dynamic_ntk_frequencies(inv_freq, positions[:, rows] + 1, trained_length)
        # Turning the query forward by the distance is turning the key back.
        angles = -distance[:, rows, :, None].to(theta.dtype) * theta[:, :, None]
        back = turned(key[:, :, None], angles[:, None])  # (batch, groups, rows, key, dim)
        found.append(torch.einsum("bghqd,bgqkd->bghqk", q[..., rows, :], back))
    return torch.cat(found, 3).flatten(1, 2)


def plain_scores(
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch groups key dim"],
    positions: Int[Tensor, "_batch key"],
    inv_freq: Float[Tensor, " half"],
) -> Float[Tensor, "batch heads query key"]:
    """Scores of queries that share one table with all keys, whose positions are known.

    Args:
        query: The first queries of the text.
        key: All keys.
        positions: Of the keys, and first of the queries.
        inv_freq: The table.
    """
    angles = (positions[..., None].to(inv_freq.dtype) * inv_freq)[:, None]
    q = turned(query, angles[:, :, : query.shape[2]])
    k = turned(key, angles).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return q @ k.mT


def attend(
    module: nn.Module,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch groups key dim"],
    value: Float[Tensor, "batch groups key value_dim"],
    attention_mask: Float[Tensor, "_batch _heads query key"] | Bool[Tensor, ...] | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Int[Tensor, "_batch2 query"] | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch query heads value_dim"], None]:
    """Attention whose rotary table depends on the query; transformers calls it in every layer.

    Raises:
        ValueError: When the model does not say the tokens' positions, or asks for more than scores,
            a mask and a softmax.
    """
    more = [name for name in ("s_aux", "position_bias") if others.get(name) is not None]
    if position_ids is None or more:
        raise ValueError(
            f"{type(module).__name__} {'uses ' + more[0] if more else 'gives no position_ids'}; "
            "dynamic NTK needs attention by scores, a mask and a softmax, with the positions."
        )
    config = module.config
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    part = config.rope_parameters.get("partial_rotary_factor") or 1.0
    inv_freq = rope_frequencies(
        int(query.shape[-1] * part), config.rope_parameters["rope_theta"],
        dtype=kind, device=query.device,
    )  # fmt: skip
    limit = config.max_position_embeddings
    count, keys = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is None:
        mask = torch.ones(1, 1, count, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - count)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(
            ~mask, torch.finfo(torch.float32).min
        )
    visible = (mask[:, 0] > torch.finfo(torch.float16).min).expand(len(query), -1, -1)
    distance = distances(visible, position_ids)
    q, k = query.to(kind), key.to(kind)
    # The first rows of a text without a past share the trained table: one product does.
    within = 0
    if count == keys:
        within = int((position_ids < limit).all(0).long().cumprod(0).sum())
    parts = []
    if within:
        parts.append(plain_scores(q[:, :, :within], k, position_ids, inv_freq))
    if within < count:
        rest = slice(within, count)
        parts.append(
            dynamic_scores(
                q[:, :, rest], k, distance[:, rest], position_ids[:, rest], inv_freq, limit
            )
        )
    scores = torch.cat(parts, 2)
    scores = scores * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = (scores + mask).softmax(-1).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    values = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return (weights @ values).transpose(1, 2).contiguous(), None


# ---------------------------------------------------------------- a model with it


@cache
def _register() -> None:
    """Tell transformers of the attention function; a mask of numbers comes with it."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)


def dynamic_ntk(model: Model, *, trained_length: int | None = None) -> Model:
    r"""Let the rotary base of a model grow with each token beyond its trained length.

    transformers saves the configuration as `rope_type` "dynamic" with a factor of 1, and a loaded
    model so computes the same formula in its own way: one scale for all tokens of a pass, wrong
    with a cache. Call `dynamic_ntk` on the loaded model, which accepts it, to have this one back.

    Args:
        model: A Hugging Face decoder of the Llama family, with the attention implementation "eager"
            or "sdpa"; it is not changed.
        trained_length: $L$ in tokens; by default the configuration's. The new configuration's
            `max_position_embeddings` is this number, from which the scale is computed.

    Returns:
        A new model that shares all weights.

    Raises:
        ValueError: Heads of fewer than 4 rotated numbers; a model that `rotary_table` refuses, that
            does not turn every layer's heads in half-split layout, or that computes attention
            otherwise.
    """
    model = _as_default(model)
    table = rotary_table(model, trained_length)
    check_dim(table.dim)
    how = getattr(model.config, "_attn_implementation", None)
    if how not in ("eager", "sdpa"):
        raise ValueError(
            f"the attention implementation of this model is {how!r}; dynamic NTK takes the place "
            "of 'eager' or 'sdpa'."
        )
    _register()
    result = with_table(
        model,
        table,
        torch.zeros_like(table.inv_freq),  # cos 0 = 1, sin 0 = 0: nothing is turned, or cached so
        {"rope_type": "dynamic", "factor": 1.0},
        length=table.trained_length,
    )
    _use(result, table, NAME)
    _check_rotation(model, result, table)
    return result


def _use(model: nn.Module, table: RotaryTable, name: str) -> None:
    """Choose the attention function of the layers that the table is for."""
    for place in table.names:
        model.get_submodule(place).config._attn_implementation = name


def _as_default(model: Model) -> Model:
    """A model that was saved by `dynamic_ntk`, with the table that it started from."""
    result = None
    for name, module in model.named_modules():
        said = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        if said.get("rope_type") == "dynamic" and said.get("factor") == 1 and hasattr(
            module, "original_inv_freq"
        ):  # fmt: skip
            result = share(model) if result is None else result
            here = result.get_submodule(name)
            here.config.rope_parameters = {**said, "rope_type": "default"}
            here.config.rope_parameters.pop("factor")
            here.rope_type = "default"
            here._buffers["inv_freq"] = here.original_inv_freq
            break
    return model if result is None else result


@contextmanager
def _recorded(calls: list[tuple[Tensor, Tensor]]):
    """An attention function that notes queries and keys and gives zeros; its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask

    name = f"{NAME}_recorder"

    def note(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any):
        calls.append((query, key))
        batch, heads, count, _ = query.shape
        return value.new_zeros(batch, count, heads, value.shape[-1]), None

    AttentionInterface.register(name, note)
    AttentionMaskInterface.register(name, eager_mask)
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


def _check_rotation(model: nn.Module, result: nn.Module, table: RotaryTable) -> None:
    """Refuse a model that turns heads in another way than the attention function does.

    Both models run on a few tokens with attention that gives zeros, so that their layers see the
    same hidden states: each query and key of the original must be that of the new model, turned.
    """
    config = model.get_submodule(table.names[0]).config
    count = min(6, table.trained_length)
    ids = torch.arange(count, device=table.inv_freq.device)[None] % config.vocab_size
    seen: Callable[[nn.Module], list] = lambda which: _queries_and_keys(which, table, ids)  # noqa: E731
    theirs, ours = seen(model), seen(result)
    angles = torch.arange(count, device=ids.device)[:, None] * table.inv_freq
    layers = getattr(config, "num_hidden_layers", len(theirs))
    same = len(theirs) == len(ours) == layers and all(
        _close(turned(b.float(), angles), a.float())
        for pair, other in zip(theirs, ours)
        for a, b in zip(pair, other)
    )
    if same:
        with torch.no_grad():
            want = share(model).eval()(input_ids=ids, use_cache=False)[0].float()
            same = _close(share(result).eval()(input_ids=ids, use_cache=False)[0].float(), want)
    if not same:
        raise ValueError(
            f"{type(model).__name__} does not turn the queries and keys of every layer by its "
            "rotary table in half-split layout before ordinary attention; dynamic NTK needs that. "
            "Fixed tables (ntk_aware, yarn) do not."
        )


def _queries_and_keys(model: nn.Module, table: RotaryTable, ids: Tensor) -> list:
    quiet = share(model).eval()
    calls: list[tuple[Tensor, Tensor]] = []
    with _recorded(calls) as name, torch.no_grad():
        _use(quiet, table, name)
        quiet(input_ids=ids, use_cache=False)
    return calls


def _close(found: Tensor, want: Tensor) -> bool:
    """Equality up to rounding in half precision, by the size of what is compared."""
    return found.shape == want.shape and bool((found - want).norm() <= 0.02 * want.norm())
