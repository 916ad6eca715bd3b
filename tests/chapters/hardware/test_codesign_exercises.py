"""The exercises of the chapter on co-design, the GPU kernel among them."""

import pytest
import torch

from effnb.chapters.hardware.codesign import exercises, tile_loop
from effnb.hardware.codesign import gshard, roofline
from effnb.kernels._launch import jit, tl
from effnb.lab.listing import listing


@pytest.mark.parametrize("exercise", [exercises.time, exercises.seats], ids=lambda e: e.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    roof = roofline.Roof("a machine", 3e14, 2e12)
    work = roofline.matmul(8, 512, 512, weight_bits=4)
    found = exercises.least_time(8, 4, 512, roof.bytes_per_second, roof.operations_per_second)
    assert found == pytest.approx(1e6 * roof.least_seconds(work))
    # Tokens that choose one expert each: the package seats those that the exercise seats.
    choices = torch.tensor([2, 0, 2, 2, 1, 0, 2])
    logits = 20.0 * torch.nn.functional.one_hot(choices, 3).float()[None]
    seated = gshard.route(logits, 2).combine[0].amax(-1).gather(1, choices[:, None])[:, 0] > 0.5
    mine = [place >= 0 for place in exercises.places(choices.tolist(), 3, 2)]
    assert seated.tolist() == mine


@pytest.mark.parametrize("with_triton", [True, False])
def test_the_tile_loop_diagnoses_its_mistakes(with_triton):
    loop = tile_loop.exercise(with_triton)
    loop.selftest()
    assert len(loop.wrong) == (len(tile_loop.MISTAKES) if with_triton else 2)


@pytest.mark.parametrize("with_triton", [True, False])
def test_the_reference_of_the_tile_loop_is_the_product(with_triton):
    loop = tile_loop.exercise(with_triton)
    for a, b, size in loop.cases:
        found = loop.reference(a, b, size)
        if with_triton:
            assert found["numbers written beside it"] == 0
            found = found["product"]
        assert torch.equal(found, a.float() @ b.float())


def test_the_solution_is_the_kernel_itself():
    code = listing(tile_loop.exercise(True).reference, docstrings=True)
    assert "def tile_kernel(a, b, out" in code.source
    assert code.source.startswith("@jit")


def test_a_kernel_of_a_learner_is_judged():
    loop = tile_loop.exercise(True)

    @jit
    def stub(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        raise NotImplementedError

    @jit
    def halves(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        total = tl.zeros((SIZE, SIZE), dtype=tl.float16)
        tile = tl.full((SIZE, SIZE), 1, dtype=tl.float16)
        total = tl.dot(tile, tile, total)

    @jit
    def forgotten(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        total = nothing_of_this_name + 1  # noqa: F821, F841

    assert loop.judge(tile_loop.tile_kernel)[0]
    assert loop.judge(stub)[1].startswith("Not yet: A tile loop makes nothing so far")
    assert "adds to sums of tl.float32" in loop.judge(halves)[1]
    assert "NameError" in loop.judge(forgotten)[1]
