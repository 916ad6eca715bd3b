r"""Grouped-query attention: several query heads share one head of keys and values.

With $G$ key-value heads for $h$ query heads, heads $g h / G, \dots, (g + 1) h / G - 1$ read the
keys and values of group $g$. $G = h$ is multi-head attention, $G = 1$ multi-query attention. The
cache shrinks to $G / h$, and with it what decoding reads for every token.

A trained model is converted by *mean pooling* the projections of keys and values inside each group,

$$W^K_g = \frac{G}{h} \sum_{i \in \text{group } g} W^K_i,$$

and then trained a little further; the paper spends 5 % of the original pre-training. Taking the
first head of a group, or new random ones, is worse.

Ainslie, Lee-Thorp, de Jong, Zemlyanskiy, Lebrón, Sanghai, "GQA: Training Generalized Multi-Query
Transformer Models from Multi-Head Checkpoints", 2023, arXiv 2305.13245.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.modules import Model, put_modules, refuse_encoder_decoder, share
from effnb.core.proof import probe_ids
from effnb.design.attention.checks import check_count

POOLINGS = ("mean", "first", "random")


def pool_heads(
    weight: Float[Tensor, "heads_dim *in"],
    heads: int,
    groups: int,
    *,
    pooling: str = "mean",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "groups_dim *in"]:
    """The rows of a projection, those of the heads of a group pooled into those of one.

    Args:
        weight: A weight (heads * head width, in), or a bias.
        heads: Heads that its rows belong to, one after another.
        groups: G; it divides the heads, and consecutive heads make a group.
        pooling: "mean"; "first", the group's first head; or "random", new rows as large as the old
            ones.
        generator: Source of random rows.

    Raises:
        ValueError: Heads that are no whole groups, rows that are no whole heads, another pooling.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}.")
    if check_count("heads", heads) % check_count("groups", groups):
        raise ValueError(f"{heads} heads cannot be cut into {groups} groups of one size.")
    if len(weight) % heads:
        raise ValueError(f"{len(weight)} rows are not those of {heads} heads.")
    grouped = weight.unflatten(0, (groups, heads // groups, -1))
    if pooling == "mean":
        return grouped.mean(1).flatten(0, 1)
    if pooling == "first":
        return grouped[:, 0].flatten(0, 1)
    shape = grouped[:, 0].flatten(0, 1).shape
    new = torch.randn(shape, generator=generator, dtype=torch.float32)
    return (new * weight.float().square().mean().sqrt().cpu()).to(weight)


def _attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules with projections of their own for keys and values.

    Raises:
        ValueError: When there are none, or a projection is not a plain linear layer.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "k_proj", None), nn.Module)
        and isinstance(getattr(module, "v_proj", None), nn.Module)
        and hasattr(module, "num_key_value_groups")
    }
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention with layers k_proj and v_proj, and grouped "
            "keys; give a Llama, Mistral or Qwen."
        )
    for name, module in found.items():
        for leaf in ("k_proj", "v_proj"):
            layer = getattr(module, leaf)
            if type(layer) is not nn.Linear:
                raise ValueError(
                    f"{name}.{leaf} is a {type(layer).__name__}; only plain linear layers can be "
                    "pooled. Convert the model before it is quantized or adapted."
                )
    return found


def grouped_query(model: Model, kv_heads: int, *, pooling: str = "mean", seed: int = 0) -> Model:
    r"""A model with fewer heads of keys and values, its projections pooled.

    Its configuration says so (`num_key_value_heads`), so that it generates, is saved and is loaded
    as any other. It has lost quality, which a little training restores.

    Args:
        model: A Hugging Face decoder whose attention has k_proj and v_proj (Llama, Mistral, Qwen,
            SmolLM and their relatives), with multi-head or already grouped-query attention; it is
            not changed.
        kv_heads: G; it divides the present number.
        pooling: "mean" of each group's heads; "first"; or "random", heads to be trained from
            nothing.
        seed: Of random heads.

    Returns:
        A new model that shares all but the projections of keys and values.

    Raises:
        ValueError: A number of heads that does not divide the present one, another pooling, or a
            model whose attention is of another form.
    """
    refuse_encoder_decoder(model, "grouped_query")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}.")
    attentions = _attentions(model)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None)
    if not isinstance(heads, int):
        raise ValueError("the configuration has no num_key_value_heads, one number for all layers.")
    if heads % check_count("kv_heads", kv_heads):
        raise ValueError(
            f"kv_heads is {kv_heads}; it must divide the present number of them, {heads}."
        )
    for name, module in attentions.items():
        norm = getattr(module, "k_norm", None)
        norms = [] if norm is None else list(norm.parameters())
        if heads > 1 and any(p.numel() == module.k_proj.out_features for p in norms):
            raise ValueError(
                f"{name}.k_norm normalizes all keys together; pooled heads would be other numbers."
            )
    generator = torch.Generator().manual_seed(seed)
    new: dict[str, nn.Linear] = {}
    for name, module in attentions.items():
        for leaf in ("k_proj", "v_proj"):
            new[f"{name}.{leaf}"] = _pooled(
                getattr(module, leaf), heads, kv_heads, pooling, generator
            )
    result = _with_heads(model, new, kv_heads)
    # The same heads, written out for every one of the old groups, must be the same function.
    repeated = {name: _pooled_back(layer, heads, kv_heads) for name, layer in new.items()}
    _check_same(result, _with_heads(model, repeated, heads))
    return result


def _pooled(
    layer: nn.Linear, heads: int, groups: int, pooling: str, generator: torch.Generator
) -> nn.Linear:
    options = dict(pooling=pooling, generator=generator)
    weight = pool_heads(layer.weight.detach(), heads, groups, **options)
    bias = None if layer.bias is None else pool_heads(layer.bias.detach(), heads, groups, **options)
    return _linear(weight, bias, layer)


def _pooled_back(layer: nn.Linear, heads: int, groups: int) -> nn.Linear:
    """Each head of a pooled layer as often as its group had heads, one after another."""

    def repeat(rows: Tensor) -> Tensor:
        by_head = rows.detach().unflatten(0, (groups, -1))
        return by_head.repeat_interleave(heads // groups, 0).flatten(0, 1)

    return _linear(repeat(layer.weight), None if layer.bias is None else repeat(layer.bias), layer)


def _linear(weight: Tensor, bias: Tensor | None, like: nn.Linear) -> nn.Linear:
    with torch.inference_mode(False):
        layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
        layer.in_features, layer.out_features = like.in_features, len(weight)
        layer.weight = nn.Parameter(weight.clone(), like.weight.requires_grad)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone(), like.bias.requires_grad)
    return layer.train(like.training)


def _with_heads(model: Model, new: dict[str, nn.Linear], kv_heads: int) -> Model:
    result = share(model)
    for module in _attentions(result).values():
        heads = module.num_key_value_groups * _kv_heads(module)
        module.num_key_value_groups = heads // kv_heads
        for attribute in ("num_key_value_heads", "num_kv_heads"):
            if hasattr(module, attribute):
                setattr(module, attribute, kv_heads)
    put_modules(result, new)
    result.config.get_text_config().num_key_value_heads = kv_heads
    return result


def _kv_heads(module: nn.Module) -> int:
    return module.config.get_text_config().num_key_value_heads


def _check_same(grouped: nn.Module, repeated: nn.Module) -> None:
    """Refuse a model that does not read grouped heads as others do.

    Raises:
        ValueError: When writing shared heads out changes the output.
    """

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return share(model).eval()(input_ids=probe_ids(model))[0].float()

    expected = run(repeated)
    try:
        change = float((run(grouped) - expected).abs().max())
    except RuntimeError:  # shapes that depend on the old number of heads
        change = float("inf")
    if not change <= 0.02 * max(float(expected.abs().max()), 1e-6):
        raise ValueError(
            f"{type(grouped).__name__} does not read fewer key-value heads as consecutive groups; "
            "it cannot be converted."
        )
