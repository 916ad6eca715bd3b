"""What all kernels stand on: the package, the choice of a backend, the compiler, the bench."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from effnb.kernels import _launch, bench
from effnb.kernels import compile as compiler
from effnb.kernels._launch import choose, jit, launch, tl
from effnb.lab import results

ROOT = Path(__file__).resolve().parents[2]
NAMES = compiler.modules()


def run(*arguments, **variables):
    """A Python of its own, at the top of the checkout, without the interpreter of kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


# --- the package ----------------------------------------------------------------------------------


def test_pyproject_lists_every_package():
    """With the folder kernels/ mapped, setuptools finds packages no more by itself."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "effnb").rglob("__init__.py")}
    expected = {".".join(f.relative_to(ROOT).parts) for f in folders} | {"effnb.kernels"}
    assert set(settings["packages"]) == expected
    assert settings["package-dir"] == {"effnb.kernels": "kernels"}


LLAMA = """
import sys
assert sys.path[0] == ""  # the top of the checkout, where a folder kernels/ lies
import kernels
import torch
from transformers import LlamaConfig, LlamaForCausalLM
assert not hasattr(kernels, "__version__")
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
print(model(torch.tensor([[1, 2, 3]])).logits.shape)
"""


def test_the_folder_does_not_disturb_transformers():
    done = run("-c", LLAMA)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 3, 32])" in done.stdout


WITHOUT = """
import sys
sys.modules["triton"] = None  # importing it fails, as on macOS and Windows
import importlib, torch
from effnb.kernels import _launch, compile
assert _launch.triton is None and _launch.tl is None and not _launch.INTERPRETED
for name in compile.modules():
    importlib.import_module(f"effnb.kernels.{name}")
from effnb.kernels.lora import lora
x = torch.ones(2, 4)
print(lora(x, torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), 1.0)[0, 0].item())
try:
    lora(x, torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), 1.0, backend="triton")
except ValueError as problem:
    print(problem)
print(compile.main([]))
"""


def test_everything_imports_without_triton():
    done = run("-c", WITHOUT)
    assert done.returncode == 0, done.stderr
    said = ["8.0", "the Triton kernel cannot run: Triton is not installed here.", "2"]
    assert done.stdout.splitlines() == said
    assert "Nothing can be compiled: Triton is not installed." in done.stderr


# --- the choice -----------------------------------------------------------------------------------


INTERPRETING = """
import torch
from effnb.kernels._launch import INTERPRETED, choose
x = torch.ones(2)
print(INTERPRETED, choose(None, x), choose("torch", x), choose("triton", x, None))
choose("triton", x.bfloat16())
"""


def test_the_interpreter_is_used_only_when_asked_for():
    done = run("-c", INTERPRETING, TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True", "torch", "torch", "triton"], done.stderr
    assert "ValueError: the Triton kernel cannot run" in done.stderr
    assert "bfloat16 wrongly" in done.stderr


def test_what_has_no_kernel_goes_to_the_reference():
    x = torch.ones(2)
    assert choose(None, x.double()) == "torch"
    assert choose(None, x, obstacle="the rank is odd.") == "torch"
    with pytest.raises(ValueError, match="cannot run: the rank is odd"):
        choose("triton", x, obstacle="the rank is odd.")
    with pytest.raises(ValueError, match="float64, only float32"):
        choose("triton", x.double())
    with pytest.raises(ValueError, match="'cuda'.*must be"):
        choose("cuda", x)
    with pytest.raises(ValueError, match="on cpu and meta"):
        choose(None, x, x.to("meta"))


@pytest.mark.parametrize(
    ("capability", "hip", "picked"),
    [((8, 0), None, "triton"), ((7, 5), None, "torch"), ((9, 0), "6", "torch")],
)
def test_which_gpus_it_is_chosen_for(monkeypatch, capability, hip, picked):
    class OnGpu:
        device, dtype = torch.device("cuda", 0), torch.bfloat16

        def is_floating_point(self):
            return True

        def is_neg(self):
            return False

    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose(None, OnGpu()) == picked
    with pytest.raises(ValueError, match="the tensors are on cpu; Triton runs on an NVIDIA GPU"):
        choose("triton", torch.ones(2))


@pytest.mark.parametrize(
    ("capability", "arch"), [((7, 5), 80), ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 90)]
)
def test_settings_are_those_of_the_newest_target_that_a_gpu_reaches(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _launch.arch_of(torch.device("cuda")) == arch
    assert _launch.arch_of(torch.device("cpu")) == 80


@jit
def _writes(source, out, n, BLOCK: tl.constexpr, TOO_FAR: tl.constexpr):  # pragma: no cover
    place = tl.arange(0, BLOCK)
    tl.store(out + place, tl.load(source + place, mask=place < n), mask=place < n + TOO_FAR)


def test_memory_is_poisoned_and_its_edges_are_watched(proof, poisoned):
    source = proof.tensor(5)
    out = _launch.empty((7,), torch.float32, proof.device)
    assert bool(out.isnan().all())
    launch(_writes, (1,), source, out, 5, BLOCK=8, TOO_FAR=0)
    assert torch.equal(out[:5], source) and bool(out[5:].isnan().all())
    launch(_writes, (1,), proof.tensor(8), out, 8, BLOCK=16, TOO_FAR=0)  # one more than out has
    memory, _ = poisoned.pop()
    assert not bool(memory[64 + 7].isnan())  # which the fixture would have complained about


def test_what_lies_beside_an_input_is_seen(proof):
    out = _launch.empty((6,), torch.float32, proof.device)
    launch(_writes, (1,), proof.guarded(proof.tensor(5)), out, 6, BLOCK=8, TOO_FAR=0)
    assert bool(out[5].isnan())  # the number behind the last one


def test_what_is_expanded_is_guarded_too(proof):
    """One number in place of many, with poison on both sides; its strides and flag are kept."""
    given = proof.tensor(3, 1, grad=True).expand(2, 3, 4).detach().requires_grad_()
    inside = proof.guarded(given)
    assert torch.equal(inside, given) and inside.stride() == (0, 1, 0) and inside.requires_grad
    assert inside.untyped_storage().data_ptr() != given.untyped_storage().data_ptr()
    around = inside.detach().as_strided((5,), (1,), inside.storage_offset() - 1)
    assert around.isnan().tolist() == [True, False, False, False, True]
    (grad,) = torch.autograd.grad(inside.sum(), inside)
    assert torch.equal(grad, torch.ones_like(given))
    assert proof.guarded(given[:0]).shape == (0, 3, 4)


def test_the_proof_fails_for_a_wrong_kernel(proof):
    x = proof.tensor(4, 4, grad=True)
    proof.compare(lambda x: x * 2, lambda x: x + x, x)
    with pytest.raises(AssertionError, match="result 0: the error"):
        proof.compare(lambda x: x * 2.001, lambda x: x + x, x)
    with pytest.raises(AssertionError, match="result 1: the error"):
        proof.compare(lambda x: 2 * x.detach() + 3 * (x - x.detach()), lambda x: x + x, x)
    with pytest.raises(AssertionError, match="not finite"):
        proof.compare(lambda x: x / 0, lambda x: x + x, x)


def test_an_empty_grid_starts_nothing_and_a_huge_one_is_refused(proof):
    x = proof.tensor(3)
    launch(_writes, (0,), x, x, 3, BLOCK=4, TOO_FAR=0)
    with pytest.raises(ValueError, match="larger than a GPU's"):
        launch(_writes, (1, 70000), x, x, 3, BLOCK=4, TOO_FAR=0)


# --- the compiler ---------------------------------------------------------------------------------


COMPILED = """
import json
from effnb.kernels import compile, report
built, _ = compile.build()
failed = [(c.name, arch, str(one)) for c, arch, one in built if isinstance(one, Exception)]
rows = [
    report.row(one, c.work, warps=c.warps, stages=c.stages)
    for c, _, one in built if not isinstance(one, Exception)
]
print(json.dumps({"failed": failed, "rows": rows}))
"""


@pytest.fixture(scope="module")
def compiled():
    """What the compiler says of every kernel, in a process that does not interpret."""
    done = run("-c", COMPILED)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.unsanitized
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_kernel_compiles(compiled, name, arch):
    assert [one for one in compiled["failed"] if one[0].startswith(f"{name}: ")] == []
    mine = [r for r in compiled["rows"] if r["kernel"].startswith(f"{name}: ")]
    assert [r for r in mine if r["arch"] == arch]


@pytest.mark.unsanitized
@pytest.mark.parametrize("name", NAMES)
def test_no_kernel_got_slower_than_its_stored_report(compiled, name):
    """Another compiler may need a little more; a change of the kernel has to be stored."""
    stored = results.read("kernel_report")
    before = {(r["kernel"], r["arch"]): r for r in stored.data["table"]}
    now = {(r["kernel"], r["arch"]): r for r in compiled["rows"]}
    assert set(before) == set(now), "run python -m effnb.kernels.compile --report --store"
    slower = []
    for key, row in now.items():
        if key[0].startswith(f"{name}: "):
            old = before[key]
            for what, slack in (
                ("instructions_per_item", 0),
                ("spilled_bytes", 16),
                ("bound_us", 0),
            ):
                if row[what] > 1.1 * old[what] + slack:
                    slower.append((key, what, old[what], row[what]))
            if row["bytes_in_flight"] < 0.9 * old["bytes_in_flight"]:
                slower.append((key, "bytes_in_flight", old["bytes_in_flight"]))
    assert slower == []


BROKEN = """
from dataclasses import replace
from effnb.kernels import gathered_lora as lora
from effnb.kernels.compile import compile_case
case = next(c for c in lora.compile_cases() if "fp16 up" in c.name)
for changes in ({"types": {**case.types, "base": "**fp16"}}, {"types": {}},
                {"constants": {**case.constants, "BLOCK_R": 48}}, {"warps": 3}):
    try:
        print(compile_case(replace(case, **changes), 80))
    except Exception as problem:
        print("refused", type(problem).__name__)
single = next(c for c in lora.compile_cases() if "fp32 up" in c.name)
try:
    compile_case(replace(single, mma=True), 90)
except ValueError as problem:
    print(problem)
"""


@pytest.mark.unsanitized
def test_what_is_wrong_does_not_compile():
    done = run("-c", BROKEN)
    assert done.stdout.count("refused") == 4, done.stdout + done.stderr
    assert "has no tensor-core instruction on sm_90" in done.stdout


@pytest.mark.unsanitized
def test_the_compiler_says_when_it_cannot():
    done = run("-m", "effnb.kernels.compile", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


# --- the bench ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_bench_runs_and_peers_agree(name):
    """On the CPU with the references: every contestant that runs computes the same."""
    cpu = torch.device("cpu")
    found = bench.cases(name, small=True)
    ceilings = bench.Ceilings(1e9, dict.fromkeys(("float32", "float16", "bfloat16"), 1e9))
    assert found
    for case in found:
        assert case.kernel == name and case.bytes > 0 and case.flops > 0
        timings = bench.measure(case, cpu, ceilings)
        assert timings[0].who == "ours" and timings[0].seconds > 0
        for timing in timings:
            assert timing.note or timing.seconds is not None
            if timing.difference is not None:
                assert timing.difference < 0.02, timing


TRAINING = ("adam8bit", "linear_cross_entropy")
"""Kernels that are of use in training only, where tokens and weights come by the million."""


@pytest.mark.parametrize("name", TRAINING)
def test_training_is_realistic(name):
    """From a model of 135 million parameters to one of 8 billion."""
    shapes = [[int(n) for n in re.findall(r"\d+", case.shape)] for case in bench.cases(name)]
    assert min(map(max, shapes)) < 50_000 and max(map(max, shapes)) > 14_000


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TRAINING])
def test_batches_and_lengths_are_realistic(name):
    """One text or token and sixteen of them; texts of 2,000 to 16,000 tokens."""
    shapes = [case.shape for case in bench.cases(name) if "step" not in case.shape]
    sizes = [dict(re.findall(r"\b([A-Z])=(\d+)", shape)) for shape in shapes]
    batches = {int(s.get("B") or s["M"]) for s in sizes}
    assert 16 in batches and (1 in batches or name == "gathered_lora")
    for length in (int(s["T"]) for s in sizes if "T" in s):
        assert 2048 <= length <= 16384


def test_the_bound_of_rope_on_an_a100():
    """16,384 tokens, 32 + 8 heads of 256, 16 bits: 671 MB, so 0.329 ms at 2.04 TB/s."""
    cases = {case.shape: case for case in bench.cases("rope")}
    case = cases["B=1 H=32+8 T=16384 D=256"]
    assert case.bytes == 2 * 40 * 256 * 16384 * 2 == 671_088_640
    assert case.flops == 3 * 40 * 256 * 16384
    a100 = bench.Ceilings(2.04e12, {"bfloat16": 312e12})
    assert a100.seconds(case) * 1e3 == pytest.approx(0.329, abs=5e-4)
    assert cases["B=1 H=32+8 T=16384 D=256 with backward"].bytes == 2 * case.bytes


def test_without_a_gpu_nothing_is_measured(tmp_path):
    path = tmp_path / "kernels.json"
    command = ("-m", "effnb.kernels.bench", "lora", "--store", "--output", str(path))
    done = run(*command, CUDA_VISIBLE_DEVICES="")  # nor one that this machine has
    assert done.returncode == 0, done.stderr
    assert "not measured" in done.stdout and " us " not in done.stdout
    stored = json.loads(path.read_text())
    assert stored["data"]["ceilings"] is None
    assert {t["seconds"] for t in stored["data"]["timings"]} == {None}
    assert stored["provenance"]["device"] == "not measured"
    # 4096 by 4096 with rank 16, one row, two bytes a number.
    first = stored["data"]["timings"][0]
    assert first["bytes"] == 2 * (4096 * 4096 + 16 * 8192 + 8192)
    assert first["flops"] == 2 * 4096 * 4096 + 2 * 16 * 8192


def test_measurements_are_not_overwritten_by_none(tmp_path):
    path = tmp_path / "kernels.json"
    line = bench.Timing("lora", "M=1", "float32", 8, 8, "ours", 1.0, 8.0, 8.0, 0.5, 0.0)
    measured = bench.content([line], bench.Ceilings(1.0, {"float32": 1.0}), torch.device("cpu"))
    nothing = bench.content([dataclasses.replace(line, seconds=None)], None, None)
    assert "Stored" in bench.store(nothing, path) and "Stored" in bench.store(measured, path)
    assert "was kept" in bench.store(nothing, path)
    assert json.loads(path.read_text())["data"]["timings"][0]["seconds"] == 1.0


def test_the_roofline_is_the_slower_of_the_two():
    case = bench.BenchCase("lora", "", torch.float32, 100, 10, lambda device: {"ours": lambda: 0})
    assert bench.Ceilings(10.0, {"float32": 10.0}).seconds(case) == 10
    assert bench.Ceilings(100.0, {"float32": 2.0}).seconds(case) == 5


def test_a_peer_that_refuses_is_a_line_and_ours_is_an_error():
    def broken():
        raise RuntimeError("no kernel image")

    x = torch.ones(3)
    ceilings = bench.Ceilings(1.0, {"float32": 1.0})

    def case(**who):
        return bench.BenchCase("lora", "", torch.float32, 8, 8, lambda device: who)

    found = bench.measure(case(ours=lambda: x, peer=broken, other="is missing"), x.device, ceilings)
    assert [t.note for t in found] == ["", "RuntimeError: no kernel image", "is missing"]
    with pytest.raises(RuntimeError):
        bench.measure(case(ours=broken), x.device, ceilings)


@pytest.mark.parametrize("tool", [bench, compiler])
def test_unknown_kernels(tool, capsys, monkeypatch):
    monkeypatch.setattr(compiler, "INTERPRETED", False)
    assert tool.main(["matmul"]) == 2
    assert "matmul is no kernel: " in capsys.readouterr().err
