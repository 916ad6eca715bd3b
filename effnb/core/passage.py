"""A model's own forward pass, held in front of one block after another.

A layer-wise method compresses block 1, lets the data run through it, compresses block 2, and so on.
What a block gets besides hidden states (mask, rotary table, position bias, the encoder's output)
and what happens between blocks is the model's own business, and differs from block to block and
from one architecture to the next. So nothing is imitated here: the model's forward runs once for
each batch, in a thread that waits in front of every block. The caller sees the block's arguments,
changes the block, runs it, and hands its output back; the forward goes on as if it had called the
block itself. One thread runs at a time, and only one block's activations are alive.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys, values or states, known by its type, not by its name."""
    kinds = [kind.__name__ for kind in type(value).__mro__]
    acts = callable(getattr(value, "update", None)) and hasattr(value, "get_seq_length")
    return acts or any(name.endswith("Cache") for name in kinds)


def without_caches(value: Any) -> Any:
    """Arguments with every cache in them replaced by None; containers are copied."""
    if is_cache(value):
        return None
    if isinstance(value, dict):
        return {key: without_caches(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(without_caches(item) for item in value)
    return value


@dataclass
class Arguments:
    """What a model gave one of its blocks: as it was given, without caches."""

    positional: tuple
    keywords: dict[str, Any]

    @classmethod
    def of(cls, positional: Sequence, keywords: Mapping[str, Any]) -> Arguments:
        """Arguments without caches, and without the wish for one."""
        kept = without_caches(dict(keywords))
        if kept.get("use_cache"):
            kept["use_cache"] = False
        return cls(without_caches(tuple(positional)), kept)


class _Cancelled(BaseException):
    """Ends a forward pass that is not needed any further."""


class Passage:
    """The forward pass of one batch through a model, from block to block.

    Attributes:
        block: The block in front of which the model waits; None when its forward has ended.
        arguments: What the model gives that block.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], batch: Mapping[str, Any]
    ) -> None:
        """Begin; nothing runs before `advance`."""
        self._model, self._blocks, self._batch = model, list(blocks), batch
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._output: Any = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._thread: threading.Thread | None = None
        self.block: nn.Module | None = None
        self.arguments: Arguments | None = None

    def advance(self, output: Any = None) -> None:
        """Give the output of the block that was waited for, and run on to the next one."""
        self._output = output
        held = [_Held(block, self._wait) for block in self._blocks]
        try:
            if self._thread is None:
                state = _thread_state(next(self._model.parameters()).device)
                self._thread = threading.Thread(target=self._run, args=(state,), daemon=True)
                self._thread.start()
            self._turn.release()
            self._back.acquire()
        finally:
            for block in held:
                block.release()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def cancel(self) -> None:
        """End the forward pass where it is."""
        if self._thread is not None and self._thread.is_alive():
            self._cancelled = True
            self._turn.release()
            self._thread.join()

    def _run(self, state: list) -> None:
        self._turn.acquire()
        try:
            with ExitStack() as contexts:
                for context in state:
                    contexts.enter_context(context)
                self._model(**self._batch)
        except _Cancelled:
            pass
        except Exception as problem:  # noqa: BLE001  raised again in the thread that waits
            self._error = problem
        finally:
            self.block = self.arguments = None
            self._back.release()

    def _wait(self, block: nn.Module, positional: tuple, keywords: dict[str, Any]) -> Any:
        """Takes the place of a block's forward."""
        self.block, self.arguments = block, Arguments.of(positional, keywords)
        self._back.release()
        self._turn.acquire()
        if self._cancelled:
            raise _Cancelled
        output, self._output = self._output, None
        return output


class _Held:
    """A block whose forward and hooks are set aside while the model runs up to it."""

    HOOKS = ("_forward_hooks", "_forward_pre_hooks")

    def __init__(self, block: nn.Module, wait: Any) -> None:
        self._block = block
        self._kept = {name: block.__dict__[name] for name in (*self.HOOKS, "forward") if name in
                      block.__dict__}  # fmt: skip
        block.__dict__["forward"] = lambda *args, **keywords: wait(block, args, keywords)
        block.__dict__.update({name: OrderedDict() for name in self.HOOKS})

    def release(self) -> None:
        self._block.__dict__.pop("forward")
        self._block.__dict__.update(self._kept)


def _thread_state(device: torch.device) -> list:
    """What PyTorch keeps for each thread, as contexts that set it as it is in this one."""
    kind = device.type
    contexts: list = [
        torch.inference_mode(torch.is_inference_mode_enabled()),
        torch.set_grad_enabled(torch.is_grad_enabled()),
    ]
    if torch.amp.is_autocast_available(kind):
        contexts.append(
            torch.autocast(
                kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
            )
        )
    if kind == "cuda":
        contexts.append(torch.cuda.device(device))
    return contexts
