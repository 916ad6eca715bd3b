"""The layer-wise calibration pass: see each layer's inputs, compress it, go on with what came out.

GPTQ, SparseGPT, Wanda and AWQ all work this way. The blocks of a model are visited from the first
to the last; the linear layers of a block are observed while calibration data runs through it, and
compressed; then the data runs through the *compressed* block, so that the next one is calibrated on
inputs that already carry the errors made before it. Only one block's activations are alive at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.modules import HEADS, Model, find_blocks, matches, share

Calibration = Tensor | Sequence[Mapping[str, Tensor]]


@runtime_checkable
class Observer(Protocol):
    """Something that gathers a statistic of a layer's inputs."""

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch, tokens in rows."""


class Hessian:
    r"""Running $H = \frac{2}{N} \sum_x x x^\top$ of a layer's inputs, N the number of tokens.

    It is the Hessian of the layer-wise squared output error $\frac1N \lVert \Delta W X \rVert_F^2$
    with respect to each row of the weight (Frantar et al., 2022, arXiv 2210.17323). Accumulated in
    float32 at least, whatever the model computes in.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        self.value: Float[Tensor, "in in"] = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        x = inputs.to(self.value.dtype)
        total = self.tokens + len(x)
        self.value.mul_(self.tokens / total).addmm_(x.T, x, alpha=2 / total)
        self.tokens = total


class InputNorm:
    r"""Running $\lVert X_j \rVert_2$, the norm of each input feature over all tokens."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        """Start from zero for a layer with `features` inputs."""
        self._squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        self._squares += inputs.double().square().sum(0)
        self.tokens += len(inputs)

    @property
    def value(self) -> Float[Tensor, "in"]:
        """The norms so far."""
        return self._squares.sqrt().float()


class InputSample:
    """The inputs themselves, at most `tokens` of them (for small layers and for tests)."""

    def __init__(self, tokens: int = 4096) -> None:
        """Keep the first `tokens` inputs."""
        self.limit = tokens
        self._parts: list[Tensor] = []
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch, up to the limit."""
        part = inputs[: self.limit - self.tokens]
        if len(part):
            self._parts.append(part.clone())
            self.tokens += len(part)

    @property
    def value(self) -> Float[Tensor, "tokens in"]:
        """The inputs so far."""
        return torch.cat(self._parts)


def batches_of(
    calibration: Calibration, batch_size: int = 8, context: int | None = None
) -> list[dict[str, Tensor]]:
    """Calibration data as a list of keyword arguments for the model.

    Args:
        calibration: Token ids of shape (sequences, time), or ready keyword arguments per batch
            (with an `attention_mask` where there is padding).
        batch_size: Sequences at a time, for token ids.
        context: Longest sequence the model takes, when it has such a limit.

    Raises:
        ValueError: When there is nothing to calibrate on, or a sequence is too long.
    """
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2:
            raise ValueError(
                f"calibration has shape {tuple(calibration.shape)}; token ids need two dimensions, "
                "(sequences, time)."
            )
        given = [{"input_ids": part} for part in calibration.split(batch_size) if part.numel()]
    else:
        given = [dict(batch) for batch in calibration if batch["input_ids"].numel()]
    if not given:
        raise ValueError("the calibration data is empty; give at least one sequence.")
    longest = max(batch["input_ids"].shape[1] for batch in given)
    if context is not None and longest > context:
        raise ValueError(
            f"a calibration sequence has {longest} tokens; the model's context is {context}."
        )
    return given


class _Stop(Exception):
    """Ends a forward pass once the input of the first block is known."""


@dataclass
class _Call:
    """The arguments of a block for one batch, and which of its tokens are not padding."""

    hidden: Tensor
    rest: tuple
    keywords: dict[str, Any]
    mask: Tensor | None


def _first_inputs(model: nn.Module, blocks: nn.ModuleList, batches: list[dict]) -> list[_Call]:
    calls: list[_Call] = []

    def catch(module, arguments, keywords):
        keywords = {k: v for k, v in keywords.items() if k not in ("past_key_values", "use_cache")}
        hidden, rest = (
            (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
        )
        calls.append(_Call(hidden, rest, keywords, None))
        raise _Stop

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            try:
                model(**batch)
            except _Stop:
                mask = batch.get("attention_mask")
                calls[-1].mask = None if mask is None or mask.ndim != 2 else mask.bool()
    finally:
        hook.remove()
    return calls


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def layerwise(
    model: Model,
    calibration: Calibration,
    observe: Callable[[str, nn.Linear], Observer],
    compress: Callable[[str, nn.Linear, Any], nn.Module | None],
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = HEADS,
    true_sequential: bool = False,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Visit the blocks in order; observe, compress and replace their linear layers.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds. Not changed.
        calibration: See `batches_of`.
        observe: From a layer's name and module to a fresh observer.
        compress: From name, module and the observer, now filled, to the module to put in its place;
            None keeps the layer.
        include: Name patterns of the layers to visit.
        exclude: Name patterns of layers to leave alone.
        true_sequential: Also within a block, compress layers that read one input (such as query,
            key and value) before the layers behind them are observed.
        batch_size: Sequences at a time.
        progress: Called with (blocks done, blocks).

    Returns:
        A new model that shares every tensor that was not replaced.

    Raises:
        ValueError: No calibration data, sequences beyond the context, or no fitting layer.
    """
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    device = next(model.parameters()).device
    batches = [
        {k: v.to(device) for k, v in batch.items()}
        for batch in batches_of(calibration, batch_size, context)
    ]
    result = share(model).eval()
    prefix, blocks = find_blocks(result)
    wanted = {
        f"{prefix}.{i}.{name}"
        for i, block in enumerate(blocks)
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear)
        and matches(f"{prefix}.{i}.{name}", include)
        and not matches(f"{prefix}.{i}.{name}", exclude)
    }
    if not wanted:
        raise ValueError(f"no linear layer inside the blocks {prefix}.* fits {include!r}.")
    with torch.inference_mode():
        calls = _first_inputs(result, blocks, batches)
        for index, block in enumerate(blocks):
            names = {
                name: f"{prefix}.{index}.{name}"
                for name, _ in block.named_modules()
                if f"{prefix}.{index}.{name}" in wanted
            }
            groups = _groups(block, list(names), calls[0])
            for group in groups if true_sequential else [list(chain(*groups))]:
                observers = {
                    name: observe(names[name], block.get_submodule(name)) for name in group
                }
                _watch(block, observers, calls)
                for name in group:
                    layer = block.get_submodule(name)
                    new = compress(names[name], layer, observers[name])
                    if new is not None and new is not layer:
                        parent, _, leaf = name.rpartition(".")
                        setattr(block.get_submodule(parent), leaf, new)
            if index + 1 < len(blocks):  # what follows sees the compressed block's outputs
                for call in calls:
                    call.hidden = _hidden(block(call.hidden, *call.rest, **call.keywords))
            if progress:
                progress(index + 1, len(blocks))
    return result


def _watch(block: nn.Module, observers: Mapping[str, Observer], calls: list[_Call]) -> None:
    """Run the calibration data through a block; each observer sees its layer's inputs."""
    current: list[Tensor | None] = [None]

    def hook_for(observer: Observer):
        def hook(module, arguments):
            inputs = arguments[0]
            mask = current[0]
            if mask is not None and inputs.shape[:2] == mask.shape:
                inputs = inputs[mask]  # padding says nothing about the text
            observer.update(inputs.flatten(0, -2))

        return hook

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(hook_for(observer))
        for name, observer in observers.items()
    ]
    try:
        for call in calls:
            current[0] = call.mask
            block(call.hidden, *call.rest, **call.keywords)
    finally:
        for hook in hooks:
            hook.remove()


def _groups(block: nn.Module, names: list[str], call: _Call) -> list[list[str]]:
    """The layers of a block as they run, those that read the very same tensor together."""
    order: list[tuple[str, Tensor]] = []

    def hook_for(name: str):
        return lambda module, arguments: order.append((name, arguments[0]))

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        block(call.hidden, *call.rest, **call.keywords)
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    inputs: list[Tensor] = []
    for name, tensor in order:
        for group, known in zip(groups, inputs, strict=True):
            if known is tensor and name not in group:
                group.append(name)
                break
        else:
            groups.append([name])
            inputs.append(tensor)
    return groups
