"""Give a model activation outliers without changing what it computes.

Large language models grow a few feature channels whose activations are tens of times larger than
the rest; they are what LLM.int8(), SmoothQuant, AWQ, QuaRot and KIVI exist for. Models of a few
million parameters have none. The construction here makes them: scale a channel of a norm's gain
up by a factor, and divide the columns that read it by the same factor. In exact arithmetic the
function is unchanged; in float32 the outputs agree to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effnb.core.modules import Model, find_blocks, share


def norm_readers(model: nn.Module, ids: Tensor) -> dict[str, list[str]]:
    """Which linear layers read each normalisation layer's output directly.

    Found by running the model once and comparing tensors by identity, so that it holds for any
    architecture. A norm whose output something else uses too is still listed.

    Args:
        model: Any model that runs on token ids.
        ids: Token ids, (batch, time); one short sequence is enough.
    """
    outputs: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}

    def after(name):
        return lambda module, arguments, output: outputs.append((name, output))

    def before(name):
        def hook(module, arguments):
            for norm, output in outputs:
                if arguments[0] is output:
                    readers.setdefault(norm, []).append(name)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            hooks.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.inference_mode():
            model(input_ids=ids)
    finally:
        for hook in hooks:
            hook.remove()
    return readers


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: 1 in Gemma's norms, else 0."""
    silent = {key: torch.zeros_like(value) for key, value in norm.named_parameters()}
    probe = torch.linspace(-1, 2, norm.weight.numel()).to(norm.weight)
    return float(functional_call(norm, silent, (probe.unsqueeze(0),)).abs().max() > 0)


def _check(channels: Sequence[int], size: int, factor: float) -> None:
    if not channels or min(channels) < 0 or max(channels) >= size:
        raise ValueError(f"channels must name some of 0 … {size - 1}; got {list(channels)[:5]}.")
    if not factor > 0:
        raise ValueError(f"factor is {factor}; it must be above 0.")


def inject_outliers(model: Model, channels: Sequence[int], factor: float) -> Model:
    r"""Multiply channels of every block's norms by a factor, and undo it in what reads them.

    For a norm with gain $g$ and a reader with weight $W$: $g_c \leftarrow \kappa g_c$ (the bias
    too, where there is one) and $W_{:,c} \leftarrow W_{:,c} / \kappa$. Works for LayerNorm and
    RMSNorm in pre-norm blocks; a norm whose gain is stored as $g - 1$ (Gemma's) is recognised by
    running it.

    Args:
        model: The model; it is not changed.
        channels: Indices of the channels of the hidden state to blow up.
        factor: $\kappa$, at least 1 for an outlier.

    Returns:
        A new model with the same function, sharing all tensors but those scaled.

    Raises:
        ValueError: A channel outside the hidden state, a factor not above 0, or no block whose
            norm feeds linear layers only.
    """
    prefix, _ = find_blocks(model)
    ids = torch.zeros(1, 4, dtype=torch.long, device=next(model.parameters()).device)
    readers = {n: r for n, r in norm_readers(model, ids).items() if n.startswith(prefix + ".")}
    if not readers:
        raise ValueError("no norm of this model's blocks feeds a linear layer directly.")
    result = share(model)
    modules = dict(result.named_modules())
    _check(channels, modules[next(iter(readers))].weight.numel(), factor)
    index = torch.tensor(sorted(set(channels)), device=ids.device)
    with torch.inference_mode(False):
        for norm, layers in readers.items():
            for key, offset in (("weight", _offset(modules[norm])), ("bias", 0.0)):
                old = getattr(modules[norm], key, None)
                if old is not None:
                    new = old.detach().clone()
                    new[index] = (new[index] + offset) * factor - offset
                    setattr(modules[norm], key, nn.Parameter(new, old.requires_grad))
            for name in layers:
                old = modules[name].weight
                new = old.detach().clone()
                new[:, index] /= factor
                modules[name].weight = nn.Parameter(new, old.requires_grad)
    return result


def inject_key_outliers(model: Model, channels: Sequence[int], factor: float) -> Model:
    r"""Blow up channels of every attention key, and shrink the matching query channels.

    Row $c$ of $W_k$ is multiplied and the row $c$ of $W_q$ that meets it divided by the factor, so
    that every dot product $q \cdot k$ stays what it was. Rotary embeddings mix channel $c$ with its
    partner $c \pm d/2$ of the same head, so both get the same factor. With grouped-query attention
    every query head of a group is divided.

    Args:
        model: A model whose attention modules have `q_proj` and `k_proj` and a `head_dim`.
        channels: Channels within one head, applied in every key head; partners are added.
        factor: $\kappa$.

    Returns:
        A new model with the same function, sharing all tensors but those scaled.

    Raises:
        ValueError: A channel outside the head, a factor not above 0, or no such attention module.
    """
    with torch.inference_mode(False):  # its parameters can be trained, wherever this is called
        return _inject_key_outliers(model, channels, factor)


def _inject_key_outliers(model: Model, channels: Sequence[int], factor: float) -> Model:
    result = share(model)
    found = [m for m in result.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    if not found:
        raise ValueError("no attention module with q_proj and k_proj in this model.")
    for attention in found:
        size = attention.head_dim
        _check(channels, size, factor)
        both = sorted(set(channels) | {(c + size // 2) % size for c in channels})
        for name, scale in (("k_proj", factor), ("q_proj", 1 / factor)):
            layer = getattr(attention, name)
            rows = torch.tensor(
                [h * size + c for h in range(layer.out_features // size) for c in both],
                device=layer.weight.device,
            )
            for key in ("weight", "bias"):
                old = getattr(layer, key, None)
                if old is not None:
                    new = old.detach().clone()
                    new[rows] *= scale
                    setattr(layer, key, nn.Parameter(new, old.requires_grad))
    return result
