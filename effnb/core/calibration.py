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
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from effnb.core.context import context_limit
from effnb.core.modules import HEADS, Model, find_blocks, matches, replace_modules, share

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
        self._upper = torch.zeros(features, features, device=device)
        self.tokens = 0

    def update(self, inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in the inputs of one batch."""
        if not len(inputs):
            return
        x = inputs.to(self._upper.dtype)
        total = self.tokens + len(x)
        self._upper.mul_(self.tokens / total)
        # H is symmetric: panels from the diagonal to the right edge are little over half the work.
        features = len(self._upper)
        width = max(64, -(-features // 4))
        for start in range(0, features, width):
            panel = x[:, start : start + width]
            self._upper[start : start + width, start:].addmm_(
                panel.T, x[:, start:], alpha=2 / total
            )
        self.tokens = total

    @property
    def value(self) -> Float[Tensor, "in in"]:
        """$H$ so far, both triangles."""
        return self._upper.triu() + self._upper.triu(1).T


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
class Call:
    """The arguments of a block for one batch of calibration data.

    Attributes:
        hidden: Hidden states, what the block before gave.
        rest: Further positional arguments.
        keywords: Keyword arguments, such as position embeddings and the attention mask.
        mask: Which tokens are not padding, (batch, time); None when all are text.
    """

    hidden: Tensor
    rest: tuple
    keywords: dict[str, Any]
    mask: Tensor | None

    def run(self, block: nn.Module) -> Tensor:
        """The block's output for this batch."""
        return main_output(block(self.hidden, *self.rest, **self.keywords))

    def text(self, activations: Tensor) -> Tensor:
        """Activations as one token a row, padding left out: it says nothing about the text."""
        if self.mask is not None and activations.shape[:2] == self.mask.shape:
            return activations[self.mask]
        return activations.flatten(0, -2)


def _first_inputs(model: nn.Module, blocks: nn.ModuleList, batches: list[dict]) -> list[Call]:
    calls: list[Call] = []

    def catch(module, arguments, keywords):
        keywords = {k: v for k, v in keywords.items() if k not in ("past_key_values", "use_cache")}
        hidden, rest = (
            (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
        )
        calls.append(Call(hidden, rest, keywords, None))
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


def main_output(output: Any) -> Tensor:
    """What a block or an attention module gives first: its hidden states."""
    return output[0] if isinstance(output, tuple) else output


def visit_blocks(
    model: Model,
    calibration: Calibration,
    visit: Callable[[str, nn.Module, list[Call]], None],
    *,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Visit the blocks in order, each with the inputs that the changed blocks before it produce.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds. Not changed.
        calibration: See `batches_of`.
        visit: Called with a block's name, the block, and its inputs. It may replace modules and
            parameters inside the block, which belongs to the new model, but must not write into
            tensors: they are the original's.
        batch_size: Sequences at a time.
        progress: Called with (blocks done, blocks).

    Returns:
        A new model that shares every tensor that `visit` did not replace.

    Raises:
        ValueError: No calibration data, or sequences beyond the context.
    """
    context = context_limit(model)
    device = next(model.parameters()).device
    batches = [
        {k: v.to(device) for k, v in batch.items()}
        for batch in batches_of(calibration, batch_size, context)
    ]
    result = share(model).eval()
    prefix, blocks = find_blocks(result)
    # Not inference mode: what is computed here becomes part of a model that may be trained later.
    with torch.no_grad():
        calls = _first_inputs(result, blocks, batches)
        for index, block in enumerate(blocks):
            visit(f"{prefix}.{index}", block, calls)
            if index + 1 < len(blocks):  # what follows sees the changed block's outputs
                for call in calls:
                    call.hidden = call.run(block)
            if progress:
                progress(index + 1, len(blocks))
    return result


def block_linears(
    model: nn.Module, include: str | Iterable[str] = "*", exclude: str | Iterable[str] = HEADS
) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks of a model, by name.

    Raises:
        ValueError: When none fits the patterns.
    """
    prefix, blocks = find_blocks(model)
    wanted = {
        f"{prefix}.{i}.{name}": m
        for i, block in enumerate(blocks)
        for name, m in block.named_modules()
        if isinstance(m, nn.Linear)
        and matches(f"{prefix}.{i}.{name}", include)
        and not matches(f"{prefix}.{i}.{name}", exclude)
    }
    if not wanted:
        raise ValueError(f"no linear layer inside the blocks {prefix}.* fits {include!r}.")
    return wanted


def layerwise(
    model: Model,
    calibration: Calibration,
    observe: Callable[[str, nn.Linear], Observer],
    compress: Callable[[str, nn.Linear, Any], nn.Module | None],
    *,
    include: str | Iterable[str] = "*",
    exclude: str | Iterable[str] = HEADS,
    true_sequential: bool = False,
    share_observers: bool = False,
    unreached: bool = False,
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
        share_observers: Give layers that read the very same tensor (query, key and value; gate and
            up) one observer, the first layer's, so that their statistics are computed once.
        unreached: Compress layers that no token reached too (experts that the router never chose),
            with an observer that saw nothing; otherwise they stay as they are.
        batch_size: Sequences at a time.
        progress: Called with (blocks done, blocks).

    Returns:
        A new model that shares every tensor that was not replaced.

    Raises:
        ValueError: No calibration data, sequences beyond the context, or no fitting layer; what
            `compress` refuses, with the layer's name.
    """
    wanted = block_linears(model, include, exclude)
    reached: set[str] = set()

    def named(name: str, layer: nn.Linear, observer: Any) -> nn.Module | None:
        reached.add(name)
        try:
            return compress(name, layer, observer)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}") from None

    def visit(prefix: str, block: nn.Module, calls: list[Call]) -> None:
        names = [
            name
            for name, m in block.named_modules()
            if f"{prefix}.{name}" in wanted and isinstance(m, nn.Linear)
        ]
        if not names:  # none wanted here, or a block that stands in the list a second time
            return
        shortest = min(calls, key=lambda call: call.hidden.numel())
        for group in _groups(block, names, shortest) if true_sequential else [names]:
            observers = {
                name: observe(f"{prefix}.{name}", block.get_submodule(name)) for name in group
            }
            for name, observer in watch(block, observers, calls, share_observers).items():
                layer = block.get_submodule(name)
                new = named(f"{prefix}.{name}", layer, observer)
                if new is not None and new is not layer:
                    parent, _, leaf = name.rpartition(".")
                    setattr(block.get_submodule(parent), leaf, new)

    result = visit_blocks(model, calibration, visit, batch_size=batch_size, progress=progress)
    if not unreached:
        return result
    seen = {id(wanted[name]) for name in reached}  # a block may stand in the list a second time
    missed = {
        name: named(name, layer, observe(name, layer))
        for name, layer in wanted.items()
        if id(layer) not in seen
    }
    return replace_modules(result, {name: new for name, new in missed.items() if new is not None})


def watch(
    block: nn.Module, observers: Mapping[str, Observer], calls: list[Call], shared: bool = False
) -> dict[str, Observer]:
    """Run the calibration data through a block; each observer sees its layer's inputs.

    Args:
        block: The block.
        observers: One for each layer, by the layer's name within the block.
        calls: The block's inputs.
        shared: Whether layers that read the very same tensor use the first one's observer.

    Returns:
        The observers, in the order in which their layers ran; layers that did not run are left out.
    """
    used: dict[str, Observer] = {}
    seen: list[tuple[Tensor, Observer]] = []  # in the current batch
    current: list[Call] = []

    def hook_for(name: str):
        def hook(module, arguments):
            inputs = arguments[0]
            same = [observer for tensor, observer in seen if tensor is inputs] if shared else []
            observer = used.setdefault(name, same[0] if same else observers[name])
            if any(observer is other for other in same):
                return  # it has taken these inputs in already
            seen.append((inputs, observer))
            observer.update(current[0].text(inputs))

        return hook

    hooks = [
        block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in observers
    ]
    try:
        for call in calls:
            current[:], seen[:] = [call], []
            call.run(block)
    finally:
        for hook in hooks:
            hook.remove()
    return used


def _groups(block: nn.Module, names: list[str], call: Call) -> list[list[str]]:
    """The layers of a block as they run, those that read the very same tensor together."""
    order: list[tuple[str, Tensor]] = []

    def hook_for(name: str):
        return lambda module, arguments: order.append((name, arguments[0]))

    hooks = [block.get_submodule(name).register_forward_pre_hook(hook_for(name)) for name in names]
    try:
        call.run(block)
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
