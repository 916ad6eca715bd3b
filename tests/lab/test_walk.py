"""A walk through an interpreted kernel shows what its first program made, line by line."""

import sys

import pytest
import torch

from effnb.kernels import int4_matmul, retention
from effnb.lab import walk as walks


def product(backend="triton"):
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (8, 64), generator=draw, dtype=torch.uint8)
    steps = torch.rand(8, 2, generator=draw).half()
    weight = int4_matmul.pack_int4(codes, steps, group_size=32)
    x = torch.randn(1, 64, generator=draw)
    return x, weight, lambda: int4_matmul.int4_matmul(x, weight, backend=backend)


def test_each_line_is_shown_with_what_it_made():
    x, weight, call = product()
    found = walks.walk(int4_matmul, call)
    torch.testing.assert_close(found.result, int4_matmul.reference(x, weight), atol=1e-4, rtol=0)
    made = {name: step for step in found.steps for name in step.made}
    assert made["rows"].code == "rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)"
    assert made["rows"].made["rows"].startswith("32 int32: 0, 1")
    assert made["ALL"].made == {"ALL": "1"}
    scale = f"32 x 4 float32: {float(weight.scales[0, 0]):.3g}, 0 …"
    assert made["scale"].made["scale"] == scale, "the second of four units lies past the end"
    # a statement of several lines is one line, and helpers that the kernel calls are not entered
    assert made["packed"].code.startswith(
        "packed = tl.load(codes + line[:, None, None] * (ALL * 16)"
    )
    assert not any("bitcast" in step.code for step in found.steps)
    codes = [step.code for step in found.steps]
    assert len(set(codes)) == len(codes)


def test_only_the_first_program_of_the_first_kernel_is_walked():
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 40, 16, generator=draw).unbind(0)
    gamma = retention.retention_decay(2)
    found = walks.walk(
        retention, lambda: retention.retention(q, k, v, gamma, chunk_size=16, backend="triton")
    )
    assert found.kernel == "_states_kernel"
    by_name = {name: words for step in found.steps for name, words in step.made.items()}
    assert by_name["row"] == "1 int64: 0"
    assert "for step in range(blocks):" in [step.code for step in found.steps]


def test_text_is_cut_to_columns():
    _, _, call = product()
    lines = str(walks.walk(int4_matmul, call)).split("\n")
    assert len(lines) > 15
    assert all(line[walks.CODE : walks.CODE + 3] == " # " for line in lines)
    assert max(map(len, lines)) <= walks.CODE + 3 + walks.MADE


def test_a_call_without_a_kernel_is_refused_and_tracing_ends():
    before = sys.gettrace()
    with pytest.raises(ValueError, match="no kernel of effnb.kernels.int4_matmul was interpreted"):
        walks.walk(int4_matmul, product(backend="torch")[2])
    with pytest.raises(ZeroDivisionError):
        walks.walk(int4_matmul, lambda: 1 / 0)
    assert sys.gettrace() is before


def test_places_in_memory_are_left_out():
    class Pointer:
        dtype = type("dtype", (), {"element_ty": torch.float32})

    assert walks.described(Pointer()) is None
    assert walks.described(7) == "7"
