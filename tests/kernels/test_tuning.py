"""Block sizes by measurement: what is stored, when it is used, and what every candidate makes."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from effnb.kernels import _launch, _tuning, bench
from effnb.kernels import compile as compiler
from effnb.kernels._tuning import Candidate, TuneCase, chosen, key_of, read, said, store, tune

NAMES = tuple(compiler.modules())
CPU = torch.device("cpu")
SPILLED = 64
"""Bytes of a thread's local memory, a few addresses: more is traffic."""


def case(results, *, default=(1,)):
    """A problem whose result and time depend on its one number."""
    candidates = tuple(Candidate((n,), f"number {n}") for n in results)
    return TuneCase(
        "lora", "float16 rows=4", default, candidates, lambda device, n: lambda: results[n[0]]
    )


def clock_of(times, results):
    """Stands for a clock: the time belongs to the result that is being made."""

    def clock(run):
        found = run()
        return next(times[n] for n, result in results.items() if result is found)

    return clock


def test_keys_are_sizes_rounded_up():
    assert key_of(torch.bfloat16, rows=17, n=4096) == "bfloat16 rows=32 n=4096"
    assert key_of(torch.bfloat16, rows=32, n=4000) == "bfloat16 rows=32 n=4096"


def test_the_fastest_wins_unless_it_is_noise():
    results = {n: torch.full((3,), 1.0) for n in (1, 2, 3)}
    found = tune(case(results), CPU, clock_of({1: 1.0, 2: 0.98, 3: 1.2}, results))
    assert found.numbers == (1,), "two per cent are noise"
    found = tune(case(results), CPU, clock_of({1: 1.0, 2: 0.98, 3: 0.9}, results))
    assert found.numbers == (3,)
    assert found.seconds == {(1,): 1.0, (2,): 0.98, (3,): 0.9}


def test_a_wrong_result_or_a_refusal_never_wins():
    right, wrong = torch.ones(3), torch.tensor([1.0, 1.0, 1.1])
    results = {1: right, 2: wrong, 3: torch.tensor([1.0, torch.nan, 1.0])}
    found = tune(case(results), CPU, clock_of({1: 1.0, 2: 0.1, 3: 0.1}, results))
    assert found.numbers == (1,)
    assert "differs by 1.00e-01" in found.refused[(2,)] and (3,) in found.refused

    def refuse(device, numbers):
        if numbers == (2,):
            raise RuntimeError("out of resources: shared memory")
        return lambda: right

    one = TuneCase("lora", "k", (1,), (Candidate((2,), "large"),), refuse)
    found = tune(one, CPU, lambda run: 1.0)
    assert found.numbers == (1,) and "out of resources" in found.refused[(2,)]
    assert "out of resources" in said([found]) and "(by sizes)" in said([found])


def test_choices_are_stored_by_device_and_taken_out_again(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    results = {n: torch.ones(1) for n in (1, 2)}
    fast = tune(case(results), CPU, clock_of({1: 1.0, 2: 0.5}, results))
    store([fast], CPU, path)
    assert json.loads(path.read_text()) == {"cpu": {"lora": {"float16 rows=4": [2]}}}
    monkeypatch.setattr(_tuning, "_STORED", read(path))
    assert chosen("lora", lambda: "float16 rows=4", CPU, (1,)) == (2,)
    assert chosen("lora", lambda: "float16 rows=8", CPU, (1,)) == (1,)
    assert chosen("rope", lambda: "float16 rows=4", CPU, (1,)) == (1,)
    assert chosen("lora", lambda: "float16 rows=4", CPU, (1, 4)) == (1, 4), "of an older kernel"
    slow = tune(case(results), CPU, clock_of({1: 1.0, 2: 2.0}, results))
    store([slow], CPU, path)
    assert read(path) == {}


def test_without_an_entry_no_key_is_made(monkeypatch):
    monkeypatch.setattr(_tuning, "_STORED", {})
    assert chosen("lora", lambda: 1 / 0, CPU, (7,)) == (7,)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"cpu": []}', '{"cpu": {"lora": {"k": 3}}}', '{"cpu": {"lora": {"k": [0]}}}'],
)
def test_a_damaged_file_is_said(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"delete it, or run python -m effnb.kernels.bench --tune"):
        read(path)


def test_what_is_stored_names_kernels_that_are_tuned():
    assert {kernel for kernels in read().values() for kernel in kernels} <= set(NAMES)


@pytest.mark.parametrize("name", compiler.modules())
def test_every_kernel_has_candidates_with_reasons(name):
    module = importlib.import_module(f"effnb.kernels.{name}")
    found = module.tune_cases()
    assert len({c.key for c in found}) == len(found)
    for one in found:
        assert one.kernel == name
        assert 2 <= len(one.candidates) <= 10 and all(c.why for c in one.candidates)
        assert len({c.numbers for c in one.candidates}) == len(one.candidates)
        assert {len(c.numbers) for c in one.candidates} == {len(one.default)}


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_computes_the_same(proof, name):
    """Small ones through the interpreter; larger tiles than the problem included."""
    module = importlib.import_module(f"effnb.kernels.{name}")
    for one in module.tune_cases(small=True):
        found = tune(one, proof.device, lambda run: 1.0)
        assert not found.refused, found.refused
        assert set(found.seconds) == {one.default, *(c.numbers for c in one.candidates)}


EVERY = """
import json, sys
from effnb.kernels.compile import candidate_cases, compile_case
found = []
for number, case in enumerate(candidate_cases()):
    turn = slice(None) if sys.argv[1] == "both" else slice(number % 2, number % 2 + 1)
    for arch in case.archs[turn] or case.archs:
        try:
            found.append([case.name, arch, compile_case(case, arch).spilled_bytes])
        except Exception as problem:
            found.append([case.name, arch, str(problem)[:200]])
print(json.dumps(found))
"""


@pytest.mark.unsanitized
@pytest.mark.parametrize("targets", ["in turn", pytest.param("both", marks=pytest.mark.full)])
def test_every_candidate_compiles_within_shared_memory(targets):
    """The launches of tuning at real sizes, recorded; a process that does not interpret.

    Every candidate is compiled, for one of the two targets in turn, or for both.
    """
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", EVERY, targets],
        env=plain,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.partition(":")[0] for name, _, _ in found} == set(NAMES)
    assert {arch for _, arch, _ in found} == set(compiler.LIMITS)
    assert [one for one in found if isinstance(one[2], str)] == []
    # What spills has no chance to win, and need not be tried.
    assert [one for one in found if one[2] > SPILLED] == []


def test_recorded_launches_start_nothing(monkeypatch):
    """Inside, every call takes the kernel; outside, things are as before."""
    lora = importlib.import_module("effnb.kernels.lora")
    x, w, a, b = (torch.ones(shape) for shape in ((3, 32), (40, 32), (2, 32), (40, 2)))
    with _launch.recorded() as launches:
        lora.lora(x, w, a, b, 1.0, backend="triton")
    assert [kernel.__name__ for kernel, *_ in launches] == ["_inner", "_layer"]
    assert launches[-1][2]["BLOCK_N"] > 0
    assert bool((lora.lora(x, w, a, b, 1.0) == 32 + 32 * 2).all())


def test_numbers_are_put_in_place_of_a_choice_and_taken_back():
    given = []

    def run():
        given.append(chosen("lora", lambda: "k", CPU, (1,)))
        raise RuntimeError("the kernel refuses")

    with pytest.raises(RuntimeError):
        _tuning.cut("lora", (5,), run)()
    assert given == [(5,)] and chosen("lora", lambda: "k", CPU, (1,)) == (1,)


def test_a_stored_choice_is_what_is_launched(proof, monkeypatch):
    lora = importlib.import_module("effnb.kernels.lora")
    shapes = (3, 32), (40, 32), (2, 32), (40, 2)
    x, w, a, b = (proof.tensor(*shape, dtype=torch.float16) for shape in shapes)
    given, plain = [], lora.launch

    def launched(kernel, *arguments, **settings):
        given.append(settings)
        plain(kernel, *arguments, **settings)

    monkeypatch.setattr(lora, "launch", launched)
    expected = lora.lora(x, w, a, b, 1.0, backend=proof.kernel)
    assert given[-1]["BLOCK_N"] == 16
    key = key_of(torch.float16, rows=3, n=40)
    name = _tuning.device_name(proof.device)
    monkeypatch.setattr(_tuning, "_STORED", {name: {"lora": {key: (16, 64, 32, 4, 2)}}})
    found = lora.lora(x, w, a, b, 1.0, backend=proof.kernel)
    assert (given[-1]["BLOCK_N"], given[-1]["BLOCK_K"], given[-1]["num_stages"]) == (64, 32, 2)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_without_a_gpu_nothing_is_tuned(capsys):
    assert bench.tune_block_sizes(["lora"], CPU) == 1
    assert "there is none here" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "effnb.kernels.bench", "--tune", "lora"],
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "there is none here" in done.stderr
