"""The layer-wise calibration pass: see each layer's inputs, compress it, go on with what came out.

GPTQ, SparseGPT, Wanda and AWQ all work this way. The blocks of a model are visited from the first
to the last; the linear layers of a block are observed while calibration data runs through it, and
compressed; then the data runs through the *compressed* block, so that the next one is calibrated on
inputs that already carry the errors made before it. Only one block's activations are alive at a
time.
"""

from __future__ import annotations

import glob
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.context import context_limit
from effnb.core.modules import (
    LayerChoice,
    Layers,
    Model,
    exchange,
    find_stacks,
    replace_modules,
    report_left_out,
    share,
)
from effnb.core.observers import Hessian, InputNorm, InputSample, Observer
from effnb.core.padding import gaps, is_per_row, masked_rows, without_padding
from effnb.core.passage import Arguments, Passage, without_caches
from effnb.core.watching import block_users, by_inputs, by_users, watch_runs

__all__ = [
    "Calibration",
    "CalibrationLike",
    "Call",
    "Hessian",
    "InputNorm",
    "InputSample",
    "Observer",
    "batches_of",
    "block_linears",
    "layerwise",
    "main_output",
    "unpadded_batches",
    "visit_blocks",
    "visit_blocks_of",
    "watch",
]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data to calibrate on, and how a method goes through it.

    Wherever a method takes `calibration`, data alone is short for `Calibration(data)`.

    Attributes:
        data: Token ids of shape (sequences, time), or ready keyword arguments for the model per
            batch (with an `attention_mask` where there is padding); for a method that is given a
            loss, whatever that loss takes.
        batch_size: Sequences at a time, for token ids; it decides on memory, not on the result.
        progress: Called with (parts done, parts): blocks, or batches where a method does not go
            from block to block.
    """

    data: Tensor | Sequence[Any]
    batch_size: int = 8
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        """Refuse what would read nothing."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1.")

    @classmethod
    def of(cls, given: CalibrationLike | Sequence[Any]) -> Calibration:
        """The same, or what data alone is short for."""
        return given if isinstance(given, cls) else cls(given)

    def one_by_one(self) -> Calibration:
        """The same data, each sequence by itself."""
        return replace(self, batch_size=1)

    def report(self, done: int, parts: int) -> None:
        """Tell `progress`, if there is one."""
        if self.progress:
            self.progress(done, parts)


CalibrationLike = Calibration | Tensor | Sequence[Mapping[str, Tensor]]
"""What methods take as `calibration`."""


def batches_of(calibration: CalibrationLike, context: int | None = None) -> list[dict[str, Tensor]]:
    """Calibration data as a list of keyword arguments for the model.

    Args:
        calibration: Token ids of shape (sequences, time), or what `Calibration` holds.
        context: Longest sequence the model takes, when it has such a limit.

    Raises:
        ValueError: When there is nothing to calibrate on, or a sequence is too long.
    """
    calibration = Calibration.of(calibration)
    data = calibration.data
    if isinstance(data, Tensor):
        if data.ndim != 2:
            raise ValueError(
                f"calibration has shape {tuple(data.shape)}; token ids need two dimensions, "
                "(sequences, time)."
            )
        given = [{"input_ids": part} for part in data.split(calibration.batch_size) if part.numel()]
    else:
        given = [dict(batch) for batch in data if batch["input_ids"].numel()]
    if not given:
        raise ValueError("the calibration data is empty; give at least one sequence.")
    longest = max(batch["input_ids"].shape[1] for batch in given)
    if context is not None and longest > context:
        raise ValueError(
            f"a calibration sequence has {longest} tokens; the model's context is {context}."
        )
    return given


@dataclass
class Call:
    """The arguments of a block for one batch of calibration data.

    Attributes:
        hidden: Hidden states, what the block before gave.
        rest: Further positional arguments.
        keywords: Keyword arguments, such as position embeddings and the attention mask: what the
            model gives this block, and no other.
        mask: Which tokens are not padding, (batch, time); None when all are text.
    """

    hidden: Tensor
    rest: tuple
    keywords: dict[str, Any]
    mask: Tensor | None

    def outputs(self, block: nn.Module) -> Any:
        """All that the block gives for this batch, as the model's own forward needs it."""
        # Containers are copied: a block may leave something in them for those behind it.
        return block(self.hidden, *without_caches(self.rest), **without_caches(self.keywords))

    def run(self, block: nn.Module) -> Tensor:
        """The block's output for this batch."""
        return main_output(self.outputs(block))

    def text(self, activations: Tensor) -> Tensor:
        """Activations as one token a row, padding left out: it says nothing about the text."""
        return masked_rows(activations, self.mask)


def _call(block: nn.Module, given: Arguments, mask: Tensor | None) -> Call:
    """A block's arguments with its hidden states first."""
    if given.positional:
        return Call(given.positional[0], given.positional[1:], dict(given.keywords), mask)
    keywords = dict(given.keywords)
    first = next(iter(inspect.signature(block.forward).parameters), "")
    if first not in keywords:
        raise ValueError(
            f"a {type(block).__name__} is called without its first argument, {first!r}; blocks "
            "must be given hidden states first."
        )
    return Call(keywords.pop(first), (), keywords, mask)


def main_output(output: Any) -> Tensor:
    """What a block or an attention module gives first: its hidden states."""
    return output[0] if isinstance(output, tuple) else output


def visit_blocks(
    model: Model,
    calibration: CalibrationLike,
    visit: Callable[[str, nn.Module, list[Call]], None],
) -> Model:
    """Visit the blocks in order, each with the inputs that the changed blocks before it produce.

    A block that the model uses several times in one forward pass (ALBERT's) is visited once, with
    all its inputs in the unchanged model.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds. Not changed.
        calibration: See `batches_of`.
        visit: Called with a block's name, the block, and its inputs, once for each block that the
            data reaches, in the order of the model's own forward pass. It may replace modules and
            parameters inside the block, which belongs to the new model, but must not write into
            tensors: they are the original's.

    Returns:
        A new model that shares every tensor that `visit` did not replace.

    Raises:
        ValueError: No calibration data, or sequences beyond the context.
    """
    batches = unpadded_batches(model, calibration)
    result = share(model).eval()
    visit_blocks_of(result, batches, visit, Calibration.of(calibration).report)
    return result


def visit_blocks_of(
    result: nn.Module,
    batches: list[dict[str, Tensor]],
    visit: Callable[[str, nn.Module, list[Call]], None],
    report: Callable[[int, int], None],
) -> None:
    """What `visit_blocks` does, to a model that may change: for visits that look beyond a block.

    Args:
        result: The model, in evaluation mode.
        batches: What it reads, as from `unpadded_batches`.
        visit: See `visit_blocks`.
        report: Called with (blocks done, blocks).
    """
    names: dict[nn.Module, str] = {}  # a block that is used twice goes by its first place
    for prefix, stack in find_stacks(result).items():
        for index, block in enumerate(stack):
            names.setdefault(block, f"{prefix}.{index}")
    passages = [Passage(result, names, batch) for batch in batches]
    visited: set[nn.Module] = set()
    # Not inference mode: what is computed here becomes part of a model that may be trained later.
    with torch.no_grad():
        try:
            for passage in passages:
                passage.advance()
            again = _used_again(result, names, batches)
            while len(visited) < len(names):
                block = next((p.block for p in passages if p.block is not None), None)
                if block is None:
                    break  # the data reaches no further block
                here = [
                    (p, _call(block, p.arguments, gaps(batch)))
                    for p, batch in zip(passages, batches, strict=True)
                    if p.block is block
                ]
                if block not in visited:
                    visited.add(block)
                    visit(names[block], block, again.get(block) or [call for _, call in here])
                    report(len(visited), len(names))
                if len(visited) == len(names):
                    break
                for passage, call in here:  # what follows sees the changed block's outputs
                    passage.advance(call.outputs(block))
        finally:
            for passage in passages:
                passage.cancel()


def _used_again(
    model: nn.Module, blocks: Iterable[nn.Module], batches: list[dict[str, Tensor]]
) -> dict[nn.Module, list[Call]]:
    """All calls of each block that one forward pass uses more than once (ALBERT's), if any is."""

    def calls_of(batch: dict[str, Tensor], only: set[nn.Module] | None) -> list:
        passage, found = Passage(model, blocks, batch), []
        try:
            passage.advance()
            while passage.block is not None:
                block = passage.block
                call = _call(block, passage.arguments, gaps(batch))
                found.append((block, call if only and block in only else None))
                passage.advance(call.outputs(block))
        finally:
            passage.cancel()
        return found

    first = min(batches, key=lambda batch: batch["input_ids"].shape[1])
    rows = len(first["input_ids"])
    first = {k: v[:1] if is_per_row(v, rows) else v for k, v in first.items()}
    uses = Counter(block for block, _ in calls_of(first, None))
    often = {block for block, number in uses.items() if number > 1}
    result: dict[nn.Module, list[Call]] = {}
    for batch in batches if often else []:
        for block, call in calls_of(batch, often):
            if call is not None:
                result.setdefault(block, []).append(call)
    return result


def unpadded_batches(model: nn.Module, calibration: CalibrationLike) -> list[dict[str, Tensor]]:
    """Calibration data where the model is, without padding.

    Args:
        model: The model that will read it.
        calibration: See `batches_of`.

    Raises:
        ValueError: No calibration data, sequences beyond the context, or an encoder-decoder that is
            given nothing for its decoder and cannot make it up.
    """
    context = context_limit(model)
    device = next(model.parameters()).device
    pair = _is_encoder_decoder(model)
    batches = []
    for batch in batches_of(calibration, context):
        here = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batches += without_padding(here, pair)
    if not batches:
        raise ValueError("the calibration data is nothing but padding; give at least one sequence.")
    if pair and not all(DECODER_INPUTS & batch.keys() for batch in batches):
        _check_decoder(model, batches)
    return batches


DECODER_INPUTS = {"decoder_input_ids", "decoder_inputs_embeds", "labels"}
"""What can tell an encoder-decoder what its decoder reads."""


def _is_encoder_decoder(model: nn.Module) -> bool:
    return (
        bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        and "decoder_input_ids" in inspect.signature(model.forward).parameters
    )


def _check_decoder(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Refuse an encoder-decoder that would stop after its encoder; some make up decoder inputs."""
    batch = next(batch for batch in batches if not DECODER_INPUTS & batch.keys())
    try:
        with torch.no_grad():
            share(model).eval()(**batch)
    except ValueError:
        raise ValueError(
            "this encoder-decoder does not know what its decoder should read; give calibration "
            "batches with input_ids and decoder_input_ids (or labels)."
        ) from None


def block_linears(model: nn.Module, layers: LayerChoice = "*") -> dict[str, nn.Linear]:
    """The linear layers inside the blocks of a model, by name.

    Raises:
        ValueError: When none fits the patterns.
    """
    stacks = find_stacks(model)
    choice = Layers.of(layers).on(model)
    wanted = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear)
        and name.startswith(tuple(f"{prefix}." for prefix in stacks))
        and choice.fit(name)
    }
    if not wanted:
        where = ", ".join(f"{prefix}.*" for prefix in stacks)
        raise ValueError(
            f"no linear layer inside the blocks {where} fits {', '.join(choice.include)}."
        )
    report_left_out(
        model, wanted.values(), layers, "only linear layers inside blocks are compressed"
    )
    return wanted


def layerwise(
    model: Model,
    calibration: CalibrationLike,
    observe: Callable[[str, nn.Linear], Observer],
    compress: Callable[[str, nn.Linear, Any], nn.Module | None],
    *,
    layers: LayerChoice = "*",
    true_sequential: bool = False,
    share_observers: bool = False,
    unreached: bool = False,
) -> Model:
    """Visit the blocks in order; observe, compress and replace their linear layers.

    A layer that several blocks use is compressed once, when the first of them is visited, on what
    it reads in all of them, and replaced in all of them. What the later blocks give it is seen in
    forward passes of the model as it is at that moment: compressed in front of the first place.

    Args:
        model: A transformer whose blocks `effnb.core.modules.find_blocks` finds. Not changed.
        calibration: See `batches_of`.
        observe: From a layer's name and module to a fresh observer.
        compress: From name, module and the observer, now filled, to the module to put in its place;
            None keeps the layer.
        layers: Name patterns of the layers to visit.
        true_sequential: Also within a block, compress layers that read one input (such as query,
            key and value) before the layers behind them are observed.
        share_observers: Give layers that read the very same tensor (query, key and value; gate and
            up) one observer, the first layer's, so that their statistics are computed once.
        unreached: Compress layers that no token reached too (experts that the router never chose),
            with an observer that saw nothing; otherwise they stay as they are.

    Returns:
        A new model that shares every tensor that was not replaced.

    Raises:
        ValueError: No calibration data, sequences beyond the context, or no fitting layer; what
            `compress` refuses, with the layer's name.
    """
    wanted = block_linears(model, layers)
    batches = unpadded_batches(model, calibration)
    result = share(model).eval()
    users_of = block_users(result)
    everywhere = [(gaps(batch), partial(result, **batch)) for batch in batches]
    reached: set[str] = set()
    changed: dict[nn.Module, nn.Module] = {}  # a layer may be used in a later block again

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
        if not names:  # none wanted here, or a block that occurs in the list a second time
            return
        shortest = min(calls, key=lambda call: call.hidden.numel())
        here = [(call.mask, partial(call.run, block)) for call in calls]
        first = partial(shortest.run, block)
        for group in by_inputs(block, names, first) if true_sequential else [names]:
            observers = {
                name: observe(f"{prefix}.{name}", block.get_submodule(name)) for name in group
            }
            used: dict[str, Observer] = {}
            for users, some in by_users(block, observers, users_of).items():
                runs = everywhere if len(users) > 1 else here
                used |= watch_runs(block, some, runs, share_observers)
            for name, observer in used.items():
                layer = block.get_submodule(name)
                new = named(f"{prefix}.{name}", layer, observer)
                if new is not None and new is not layer:
                    changed[layer] = new
            exchange(result, changed)  # in all places, also of blocks that come later

    visit_blocks_of(result, batches, visit, Calibration.of(calibration).report)
    missed = {name: layer for name, layer in wanted.items() if name not in reached}
    if not unreached:
        names = [glob.escape(name) for name in missed]
        report_left_out(result, (), Layers(names, ()), "the calibration data did not reach them")
        return result
    missed = {name: named(name, layer, observe(name, layer)) for name, layer in missed.items()}
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
    runs = [(call.mask, partial(call.run, block)) for call in calls]
    return watch_runs(block, observers, runs, shared)
