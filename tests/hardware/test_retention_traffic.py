"""The bytes that retention's kernels move are those that its report counts; in the interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

module = importlib.import_module("effnb.kernels.retention")


@pytest.fixture
def traffic(monkeypatch):
    """Bytes that interpreted kernels load and store, as their masks say."""
    from triton.runtime.interpreter import InterpreterBuilder

    moved = dict.fromkeys(("_states_kernel", "_outputs_kernel"), 0)
    now = []

    def count(name, place):
        plain = getattr(InterpreterBuilder, name)

        def counted(self, pointers, *rest):
            size = pointers.get_element_ty().primitive_bitwidth // 8
            moved[now[-1]] += size * int(rest[place].data.sum())
            return plain(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, counted)

    count("create_masked_load", 0)
    count("create_masked_store", 1)

    def watch(launch):
        def launched(function, *arguments, **settings):
            now.append(function.fn.__name__)
            launch(function, *arguments, **settings)

        return launched

    for name in ("launch", "launch_again"):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    return moved


@pytest.mark.parametrize(
    ("shape", "chunk_size", "dtype"),
    [
        ((2, 2, 128, 64, 64), 64, torch.float16),
        ((1, 1, 96, 144, 80), 32, torch.float16),  # wider than the blocks
        ((1, 2, 64, 72, 40), 32, torch.float32),
    ],
)
def test_what_is_moved_is_what_is_counted(traffic, shape, chunk_size, dtype):
    batch, heads, tokens, dim_k, dim_v = shape
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(batch, heads, tokens, dim, generator=draw).to(dtype)
        for dim in (dim_k, dim_k, dim_v)
    )
    gamma = module.retention_decay(heads)
    module.retention(q, k, v, gamma, chunk_size=chunk_size, backend="triton")
    for name in ("states", "outputs"):
        settings = module._settings(name, dim_k, dim_v, chunk_size, dtype, False, batch * heads)
        counted = batch * heads * module.bytes_moved(name, settings, tokens, dtype)
        assert counted == pytest.approx(traffic[f"_{name}_kernel"], rel=0.1)
