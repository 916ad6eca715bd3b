"""How kernels are proven: poisoned memory with guarded edges, and errors measured in float64.

The same tests run through Triton's interpreter on the CPU, which is the default, and on a GPU with
EFFNB_GPU=1 (`make test-gpu`).
"""

import os
from types import SimpleNamespace

import pytest
import torch

from effnb.kernels import _launch

GPU = os.environ.get("EFFNB_GPU") == "1"
DEVICE = torch.device("cuda" if GPU else "cpu")
# The interpreter computes bfloat16 wrongly, without a word.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
EDGE = 64  # guarded numbers on both sides; a multiple of what a GPU loads at once


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "unsanitized: left out by .make/sanitize.py: what starts no kernel in this process but the "
        "compiler in others, and random shapes, for each of which kernels are compiled again",
    )


def _poison(dtype):
    """NaN, or a whole number that would be noticed."""
    if dtype.is_floating_point:
        return torch.nan
    return 255 if dtype == torch.uint8 else -1


def _surrounded(shape, stride, dtype, device):
    """Poisoned memory with edges, and the tensor in its middle."""
    numel = 1 + sum((n - 1) * s for n, s in zip(shape, stride)) if 0 not in shape else 0
    memory = torch.full((numel + 2 * EDGE,), _poison(dtype), dtype=dtype, device=device)
    return memory, memory.as_strided(shape, stride, EDGE)


def guarded(tensor):
    """The tensor in memory where everything around and between its numbers is poisoned.

    Of what is expanded (a stride of 0) there is one number here, as there.
    """
    if tensor is None or not isinstance(tensor, torch.Tensor):
        return tensor
    _, inside = _surrounded(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    once, source = inside, tensor.detach()
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if size and not stride:  # PyTorch refuses to write several times to one place
            once, source = once.narrow(axis, 0, 1), source.narrow(axis, 0, 1)
    once.copy_(source)
    return inside.requires_grad_(tensor.requires_grad)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What kernels write to starts as NaN, and nothing beside it may be written."""
    given = []

    def allocate(shape, *, dtype, device):
        stride = torch.empty(shape, device="meta").stride()
        memory, inside = _surrounded(tuple(shape), stride, dtype, device)
        given.append((memory, inside.numel()))
        return inside

    monkeypatch.setattr(_launch, "_allocate", allocate)
    yield given
    for memory, count in given:
        edges = torch.cat([memory[:EDGE], memory[EDGE + count :]])
        untouched = edges.isnan() if edges.is_floating_point() else edges == _poison(edges.dtype)
        assert bool(untouched.all()), "a kernel wrote beside its output"


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    """float32, float16, and bfloat16 on a GPU."""
    return request.param


def tensor(*shape, dtype=torch.float32, seed=0, grad=False, layout="contiguous"):
    """Fresh normal numbers, none of them 0, on the device of the tests.

    Layouts: "contiguous", "strided" (every second number of longer last rows), "transposed" (the
    last two axes lie the other way around; of one axis: strided), "expanded" (the last axis is one
    number, repeated).
    """
    generator = torch.Generator().manual_seed(hash((seed, *shape)) % 2**31)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    numbers = torch.where(numbers.abs() < 1e-3, 0.5, numbers).to(dtype).to(DEVICE)
    if layout == "strided" or (layout == "transposed" and len(shape) == 1):
        numbers = torch.stack([numbers, numbers.flip(0)], -1)[..., 0]
    elif layout == "transposed":
        numbers = numbers.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "expanded":
        numbers = numbers[..., :1].expand(shape)
    return numbers.detach().requires_grad_(grad)


def far(numbers, axis=-1):
    """The same numbers, so far apart along an axis that 32 bits do not count up to the last.

    They lie in 4 GiB of half precision, of which only the pages they are on are ever touched.
    """
    assert numbers.dtype == torch.float16 and numbers.shape[axis] > 2  # the stride fits 32 bits
    step = 2**31 // (numbers.shape[axis] - 1) + 1
    others = torch.empty(numbers.movedim(axis, -1).shape[:-1], device="meta")
    size = step * (numbers.shape[axis] - 1) + others.numel()
    memory = torch.empty(size, dtype=numbers.dtype, device=numbers.device)
    stride = (*others.stride(), step)
    spread = memory.as_strided((*others.shape, numbers.shape[axis]), stride).movedim(-1, axis)
    return spread.copy_(numbers.detach())


def _run(function, inputs):
    """Outputs and gradients, the gradients of outputs being fixed random numbers."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
    leaves = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    results = [o.detach() for o in outputs]
    if leaves:
        parts = [o for o in outputs if o.requires_grad]
        cotangents = [tensor(*o.shape, seed=99 + i).to(o.dtype) for i, o in enumerate(parts)]
        results += torch.autograd.grad(parts, leaves, cotangents)
    return results


def compare(ours, reference, *inputs, factor=2.0):
    """Outputs and gradients of a kernel are as close to the truth as plain PyTorch's.

    The truth is the reference on the same numbers in float64. The largest error of ours may be
    `factor` times that of the reference in the type of the inputs, and a few roundings more.
    Gradients are those of all inputs that require one. Returns the outputs and gradients of ours.
    """

    def as_double(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().double().requires_grad_(x.requires_grad)

    exact = _run(reference, [as_double(x) for x in inputs])
    naive = _run(reference, list(inputs))
    mine = _run(ours, [guarded(x) for x in inputs])
    assert len(mine) == len(naive) == len(exact)
    for place, (a, b, truth) in enumerate(zip(mine, naive, exact)):
        assert a.shape == b.shape, f"result {place}: {a.shape} is not {b.shape}"
        assert a.dtype == b.dtype, f"result {place}: {a.dtype} is not {b.dtype}"
        assert bool(a.isfinite().all()), f"result {place} has entries that are not finite"
        if not a.numel():
            continue
        allowed = factor * float((b.double() - truth).abs().max())
        allowed += 4 * torch.finfo(a.dtype).eps * float(truth.abs().max())
        error = float((a.double() - truth).abs().max())
        assert error <= allowed, f"result {place}: the error is {error:.2e}, allowed {allowed:.2e}"
    return mine


@pytest.fixture
def proof():
    """The tools above; `proof.kernel` is what to pass as `backend`."""
    return SimpleNamespace(
        compare=compare, tensor=tensor, guarded=guarded, far=far, device=DEVICE, kernel="triton"
    )
