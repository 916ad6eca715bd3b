# ---
# jupyter:
#   effnb:
#     minutes: 55
#   jupytext:
#     notebook_metadata_filter: kernelspec,effnb
#     cell_metadata_filter: tags,-all
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Co-design: hardware and software made for each other
#
# **A model is fast where its bytes are few, not where its operations are. Count both, and you know before any measurement
# what a kernel, a chip or a second machine can gain, and what it cannot.**
#
# After this chapter you can
#
# - draw the roofline of your machine, and place a matrix product under it before you run it;
# - say why decoding waits for memory and reading a prompt does not, and what four bits or sparse weights gain in each;
# - follow two GPU kernels line by line on your own processor;
# - drop tokens, heads, values and bits as accelerators do, and measure what that costs a real model;
# - spread a layer of experts over real processes, and predict every byte that they exchange.
#
# You need the tour (`00_start_here`), matrices, and attention.

# %% tags=["run-time"]
from effnb.lab.chapters import run_time

run_time("06_hardware/2_codesign")

# %% [markdown]
# ## The result first
#
# On the left is the roofline of the machine that ran this page, measured a moment ago. Each dot is one layer of a model, multiplied
# with 1, 2, 4, … tokens at a time. Its weight comes from memory each time, as it does in a large model. On the right is a GPU's roofline; the caption says where
# its numbers come from.

# %% tags=["hide-input"]
import os

os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: this page walks through two

import math

import torch
from matplotlib.ticker import LogLocator

from effnb.hardware.codesign import kernel_results, roofline
from effnb.lab import PALETTE, figure, results

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
WIDTH = 1024
ceilings = roofline.measure_roof(size=1024)
dots = []
for tokens in TOKENS:
    work = roofline.matmul(tokens, WIDTH, WIDTH, weight_bits=32, activation_bits=32)
    dots.append((work, roofline.measure_matmul(tokens, WIDTH, WIDTH)))
# A roof is the highest rate that was seen: by a large copy and product, or by a dot.
here = roofline.Roof(
    ceilings.name,
    max(ceilings.operations_per_second, *(w.operations / t for w, t in dots)),
    max(ceilings.bytes_per_second, *(w.bytes / t for w, t in dots)),
)
kernels_run = results.read("kernels")  # what the kernels' benchmark stored, if it met a GPU
gpu_name = kernel_results.measured_on(kernels_run.data, kernels_run.provenance.device)
gpu, gpu_measured = kernel_results.gpu_roof(
    kernels_run.data, kernels_run.provenance.device, roofline.DATA_SHEETS["H100 SXM"]
)
cases = kernel_results.kernel_cases(kernels_run.data, kernels_run.provenance.device)
if gpu_measured:
    short_name = gpu_name.removeprefix("NVIDIA ")
    short_name = short_name if len(short_name) < 18 else "a GPU"  # more does not fit
    gpu_dots = [
        (case.work.operations_per_byte, case.work.operations / case.ours.seconds)
        for case in cases
        if case.ours.seconds
    ]
else:
    intensities = [roofline.matmul(m, 4096, 4096).operations_per_byte for m in (1, 16, 256, 1024)]
    gpu_dots = [(x, gpu.attainable(x)) for x in intensities]


def draw_roof(axes, roof, colour, line="-", low=0.1, high=2000, unit=1e9):
    """The roof: a slope for the memory, a level for the arithmetic."""
    x = [low, roof.ridge_operations_per_byte, high]
    axes.plot(x, [roof.attainable(v) / unit for v in x], line, color=colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("operations per byte")


def draw_result(fig):
    left, right = fig.subplots(1, 2)
    draw_roof(left, here, "0.35", high=200)
    left.plot(
        [w.operations_per_byte for w, _ in dots],
        [w.operations / t / 1e9 for w, t in dots],
        "o",
        color=PALETTE[0],
    )
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.set_ylabel("billion operations per second")
    left.set_title("this machine, measured")
    draw_roof(right, gpu, "0.35", "-" if gpu_measured else "--", unit=1e12)
    right.plot(
        [x for x, _ in gpu_dots],
        [rate / 1e12 for _, rate in gpu_dots],
        "o",
        color=PALETTE[1],
        markerfacecolor=PALETTE[1] if gpu_measured else "none",
    )
    right.set_ylabel("trillion operations per second")
    right.set_title(f"{short_name}, measured" if gpu_measured else "H100, data sheet only")


figure(
    draw_result,
    caption="Left: measured here, dots and roof, which is the highest rate seen of memory and of arithmetic. Few tokens lie near the slope, many near the level. Right: "
    + (
        f"the ceilings of {gpu_name}, measured and stored; each dot is one of this book's kernels on it, measured too."
        if gpu_measured
        else "a GPU's ceilings as its vendor states them; the hollow dots are where those ceilings would allow a layer "
        "of width 4,096 with 1, 16, 256 and 1,024 tokens. Nothing on the right was measured."
    ),
    alt=(
        f"Left, a slope of {here.bytes_per_second / 1e9:.0f} billion bytes per second that meets a level of "
        f"{here.operations_per_second / 1e9:.0f} billion operations per second; dots climb from "
        f"{dots[0][0].operations / dots[0][1] / 1e9:.1f} with one token to {dots[-1][0].operations / dots[-1][1] / 1e9:.0f} with "
        f"{TOKENS[-1]}. Right, the same shape for {gpu.name}: {gpu.bytes_per_second / 1e12:.2f} trillion bytes and "
        f"{gpu.operations_per_second / 1e12:.0f} trillion operations per second."
    ),
)

# %% [markdown]
# Sixteen tokens are sixteen times the work of one, and take far less than sixteen times as long: they share the weight, and fetching it is what takes the time.
# Everything in this chapter moves along that slope: fewer bytes for the same answer, or more answers for the same bytes.

# %%
print(f"here, 16 tokens take {dots[4][1] / dots[0][1]:.1f} times as long as one")

# %% [markdown]
# ## Two numbers and a roof
#
# A machine computes at most $P$ operations per second and moves at most $B$ bytes per second. Work that does $F$ operations on
# $D$ bytes has the **arithmetic intensity** $I = F/D$, and it takes at least
#
# $$t \ge \max\left(\frac{F}{P}, \frac{D}{B}\right), \qquad \text{so its rate is at most } \min(P,\ I\,B).$$
#
# That is the **roofline** (Williams et al., 2009). The corner lies at $I^* = P/B$. Left of it you wait for memory, right of it for arithmetic.
#
# For a weight of $n$ by $k$ numbers of $b$ bits, and $m$ tokens of 16 bits,
#
# $$F = 2mnk, \qquad D = \tfrac18\left(b\,nk + 16\,(mk + mn)\right), \qquad I \approx \frac{16\,m}{b} \text{ for few tokens}.$$
#
# By hand: two tokens, a weight of 3 by 4, everything in 16 bits.

# %% tags=["nbval-check-output"]
work = roofline.matmul(m=2, n=3, k=4)
print(f"operations: 2 x 2 x 3 x 4 = {work.operations}")
print(f"bytes: 2 x (3 x 4 + 2 x 4 + 2 x 3) = {work.bytes:.0f}")
print(f"intensity: {work.operations_per_byte:.2f} operations per byte")

# %%
from effnb.lab import show

show(roofline.matmul, roofline.decode_step)

# %% [markdown]
# ### Why decoding waits
#
# Reading a prompt multiplies each weight with all its tokens at once. Decoding multiplies the same weights with *one* token, and reads
# the whole key-value cache besides. Counted for a Llama of a billion weights (16 layers of width 2,048), against the data sheets of three GPUs:

# %% tags=["nbval-check-output"]
shape = roofline.Shape(16, 2048, 8192, 32, 8, 64, 128_256)
for name, work in (
    ("prefill, 1,024 tokens", roofline.prefill(shape, 1024)),
    ("decode, 1 sequence", roofline.decode_step(shape, 1024)),
    ("decode, 64 sequences", roofline.decode_step(shape, 1024, batch=64)),
    ("decode, 512 sequences", roofline.decode_step(shape, 1024, batch=512)),
    ("512, hardly any cache", roofline.decode_step(shape, 1, batch=512)),
):
    waits = ["memory" if r.memory_bound(work) else "compute" for r in roofline.DATA_SHEETS.values()]
    print(f"{name:22} {work.operations_per_byte:7.1f} per byte ", *(f"{w:8}" for w in waits))
ridges = ", ".join(
    f"{r.ridge_operations_per_byte:.0f} ({name})" for name, r in roofline.DATA_SHEETS.items()
)
print("the roofs' corners:", ridges)

# %% [markdown]
# More sequences share each fetch of the weights, and 512 of them would lie right of every corner, if each had a context of one token (the last line). With
# contexts of 1,024 tokens they still wait for memory: each sequence has a cache of its own, which no batch makes smaller. That is why there are methods for the cache alone.
#
# ### What few bits and zeros can gain
#
# The same formula says what quantised and sparse weights are worth. Least times on an A100's data sheet, as the factor gained over 16 bits. The
# *2:4* pattern keeps two weights of four, and the chip multiplies only those, twice as fast:

# %% tags=["nbval-check-output"]
a100 = roofline.DATA_SHEETS["A100 SXM 80 GB"]
four = roofline.weight_bits(4, group_size=128)
FORMS = {  # bits read per weight, and how much faster the arithmetic is
    "int4, groups of 128": (four, 1),
    "2:4, 16 bits": (roofline.sparse_bits(16), 2),
    "2:4 and int4, no scales": (roofline.sparse_bits(4), 2),
    "90 % zeros, dense": (16, 1),
}
print("tokens at once         ", *(f"{m:7}" for m in (1, 16, 64, 256, 2048)))
for name, (bits, faster) in FORMS.items():
    gains = []
    for m in (1, 16, 64, 256, 2048):
        dense = a100.least_seconds(roofline.matmul(m, 4096, 4096))
        work = roofline.matmul(m, 4096, 4096, weight_bits=bits)
        quick = roofline.Roof("", faster * a100.operations_per_second, a100.bytes_per_second)
        gains.append(dense / quick.least_seconds(work))
    print(f"{name:23}", *(f"{g:6.2f}x" for g in gains))

# %% [markdown]
# Four bits bring nearly four times for one token, and nothing for a long prompt: there the weights are unpacked and multiplied in 16 bits as
# before. Zeros that the hardware does not know about bring nothing at all, be they 90 % of the weights.
#
# ### Fusion and tiling
#
# Two ways to move fewer bytes without changing a single result. **Fusion:** $k$ element-wise steps over $n$ numbers move $2kn$ numbers when
# each step is a kernel of its own, and $2n$ when one kernel does them all. A processor's cache can play the kernel: work block by block.

# %%
numbers = torch.ones(2**24)
STEPS = 6


def apart(_):
    for _ in range(STEPS):
        numbers.mul_(1.0001)


def fused(_):
    for block in numbers.split(2**16):  # 256 KiB: stays in the cache between the steps
        for _ in range(STEPS):
            block.mul_(1.0001)


separate, together = (roofline.median_seconds(f, 3) for f in (apart, fused))
moved = [
    roofline.elementwise(len(numbers), STEPS, fused=f, bits=32).bytes / 2**20 for f in (False, True)
]
print(f"{STEPS} steps: {moved[0]:.0f} MiB or {moved[1]:.0f} MiB to move")
print(f"measured here, block by block: {separate / together:.1f} times as fast")

# %% [markdown]
# **Tiling** does it for products. A result of $m$ by $n$ is cut into tiles; each tile reads its rows and its columns once, and works on
# them close by, with one byte for each number and four for each sum. With tiles of $t$ by $t$, all tiles together read $\frac{2mnk}{t}$ numbers. Twice the tile, half the traffic, until the tile no longer fits. Four by four by four, by hand:

# %% tags=["nbval-check-output"]
for t in (1, 2, 4):
    moved = roofline.tiled_bytes(4, 4, 4, tile_m=t, tile_n=t, bits=8)
    held = roofline.tile_bytes(t, t, t, bits=8)
    print(
        f"tiles of {t}: read 2 x 64 / {t} = {128 // t:3}, written 16, in all {moved:3.0f} numbers;",
        f"held close by: {held:.0f} bytes",
    )

# %% [markdown]
# ## Turn the knob: the roof
#
# **Predict first.** At 64 tokens on an A100, does going from 16 bits to 4 still help? And at which tile does a product of 4,096 by 4,096 stop waiting?

# %% tags=["hide-input"]
from effnb.lab import knob, panel

ROOFS = {"this machine": here, **({gpu_name: gpu} if gpu_measured else {}), **roofline.DATA_SHEETS}
WEIGHTS = {"dense": 1, "2:4": 2, "90 % zeros, not known": 1}  # how much faster the arithmetic is
TILES = {"perfect": None, "16": 16, "32": 32, "64": 64, "128": 128, "256": 256}


def place(tokens, width, bits, weights, tile, machine):
    """One product under one roof."""
    base = ROOFS[machine]
    roof = roofline.Roof(
        base.name, WEIGHTS[weights] * base.operations_per_second, base.bytes_per_second
    )
    stored = bits if bits == 16 else roofline.weight_bits(bits, group_size=128)
    stored = roofline.sparse_bits(stored) if weights == "2:4" else stored
    work = roofline.matmul(tokens, width, width, weight_bits=stored)
    if TILES[tile]:
        t = TILES[tile]
        weight_bytes = width * width * math.ceil(tokens / t) * stored / 8
        inputs = tokens * width * (math.ceil(width / t) + 1) * 2
        work = roofline.Work(work.operations, weight_bytes + inputs)
    plain = base.least_seconds(roofline.matmul(tokens, width, width))
    return {"work": work, "roof": roof, "gain": plain / roof.least_seconds(work), "base": base}


def draw_place(result, fig):
    axes = fig.subplots()
    roof, work = result["roof"], result["work"]
    draw_roof(axes, result["base"], "0.75", high=5000, unit=1e12)
    draw_roof(axes, roof, "0.35", high=5000, unit=1e12)
    axes.plot(
        work.operations_per_byte,
        roof.attainable(work.operations_per_byte) / 1e12,
        "o",
        color=PALETTE[1],
        markersize=10,
    )
    axes.axvline(roof.ridge_operations_per_byte, color="0.75", linestyle="--")
    axes.set_ylabel("trillion operations per second")


def say_place(result):
    work, roof = result["work"], result["roof"]
    return "\n".join(
        [
            f"Roof: {roof.name}",
            f"Intensity: {work.operations_per_byte:.3g} operations per byte",
            f"Corner: {roof.ridge_operations_per_byte:.3g} operations per byte",
            f"Waits for: {'memory' if roof.memory_bound(work) else 'arithmetic'}",
            f"To move: {work.bytes / 2**20:.3g} MiB",
            f"Least time: {roof.least_seconds(work) * 1e6:.3g} µs",
            f"Gain over dense 16 bits: {result['gain']:.2f} times",
        ]
    )


# %%
panel(
    place,
    draw_place,
    text=say_place,
    title="A product under its roof",
    caption="The dot is the best that your setting allows. The dashed line is the corner of the roof. Grey: the roof without hardware for 2:4.",
    frames=[1, 16, 256, 4096],
    tokens=knob([1, 4, 16, 64, 256, 1024, 4096], default=16, label="tokens at once"),
    width=knob([512, 1024, 4096, 8192], default=4096, label="width of the layer"),
    bits=knob([16, 8, 4, 2], default=16, label="bits of a weight"),
    weights=knob(list(WEIGHTS), default="dense"),
    tile=knob(list(TILES), default="perfect", label="tile"),
    machine=knob(list(ROOFS), default="A100 SXM 80 GB"),
)

# %% [markdown]
# ## A kernel, line by line
#
# A GPU kernel is a small program that runs many times side by side; each run makes one tile of the result. Triton's **interpreter** runs such a program
# in NumPy, one run after the other, on any processor. It is slow, and it can be watched: below, every line that the *first* program of
# `int4_matmul` runs, with what the line has made. The weight has 8 outputs and 64 inputs, four bits each, in groups of 32.

# %% tags=["hide-input"]
import inspect
import sys

from effnb.kernels import int4_matmul, retention
from effnb.kernels._launch import INTERPRETED

NO_TRITON = "Triton is not installed here (it exists for Linux), so that kernels cannot be interpreted; what they compute comes from the reference in PyTorch."


def described(value):
    """A value of the interpreter in a few words."""
    data = getattr(getattr(value, "handle", value), "data", value)
    shape = tuple(getattr(data, "shape", ()))
    if not hasattr(data, "flat"):
        return str(data)
    first = ", ".join(f"{x:.4g}" for x in list(data.flat)[:3])
    return f"{' x '.join(map(str, shape))} {data.dtype}: {first}{' …' if data.size > 3 else ''}"


def watch(kernel, call):
    """Run a kernel; list the lines of its first program, with what each assigned."""
    lines, _ = inspect.getsourcelines(kernel.fn)
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    name, steps, state = kernel.fn.__name__, [], {}

    def local(frame, event, _):
        if state["line"] is not None:
            made = {k: v for k, v in frame.f_locals.items() if state["seen"].get(k) is not v}
            steps.append((state["line"], made))
        state.update(seen=dict(frame.f_locals), line=frame.f_lineno - frame.f_code.co_firstlineno)
        if event == "return":
            sys.settrace(None)
        return local

    def trace(frame, event, _):
        if frame.f_code.co_name != name:
            return None
        state.update(seen=dict(frame.f_locals), line=None)
        return local

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = call()
    finally:
        sys.settrace(before)
    shown = set()
    for line, made in steps:
        values = {
            k: v for k, v in made.items() if not hasattr(getattr(v, "dtype", None), "element_ty")
        }
        if values and line not in shown:
            shown.add(line)
            text = lines[start + line].strip()
            print(f"{text[:64]:64} # {'; '.join(map(described, values.values()))}")
    return result


# %%
g = torch.Generator().manual_seed(0)
codes = torch.randint(0, 16, (8, 64), generator=g, dtype=torch.uint8)
steps = torch.rand(8, 2, generator=g).half()
weight = int4_matmul.pack_int4(codes, steps, group_size=32)
x = torch.randn(1, 64, generator=g)
if INTERPRETED:
    y = watch(int4_matmul._one_row, lambda: int4_matmul.int4_matmul(x, weight, backend="triton"))
    same = torch.allclose(y, int4_matmul.reference(x, weight), atol=1e-4)
    print(f"\nthe same as the reference: {same}")
else:
    print(NO_TRITON, int4_matmul.reference(x, weight), sep="\n")

# %% [markdown]
# Read it from top to bottom. `rows` and `inside` say which outputs this program makes, and which of them exist. The loop takes a span of inputs: it
# fetches bytes (`packed`), the step of their group (`scale`), and the inputs that belong to the low and to the high half of each byte. A code never becomes a weight in memory: `packed & 15` is
# multiplied where it lies, in a register. That is all of the gain: half a byte fetched, where 16 bits would be two.
#
# **Retention** (RetNet) replaces attention's growing cache by a state of fixed size. Its kernel walks over chunks of tokens and stores the state before each:

# %%
q, k, v = torch.randn(3, 1, 2, 40, 16, generator=g).unbind(0)
gamma = retention.retention_decay(2)
parallel = retention.retention_parallel(q, k, v, gamma)[0]
if INTERPRETED:
    out, _ = watch(
        retention._states_kernel,
        lambda: retention.retention(q, k, v, gamma, chunk_size=16, backend="triton"),
    )
    print(f"\nthe same as all at once: {torch.allclose(out, parallel, atol=1e-4)}")
else:
    print(NO_TRITON, parallel[0, 0, :2], sep="\n")

# %% [markdown]
# `length` is 16, and 8 in the last chunk: 40 tokens are two chunks and a half, and `present` keeps the rest out. `left` counts how often each token will have decayed when
# the chunk is over, and the product `tl.dot(tl.trans(k), v)` is the sum of all their outer products, made by the units that multiply matrices.

# %% [markdown]
# ### How fast the kernels are
#
# Every kernel of the book, at the sizes of real models. How many operations each needs for a byte is counted, and with it what it has to wait for. Its time can only
# be measured: on a GPU, by `make bench-gpu`, beside its peers on the same tensors. Where no GPU was at hand, the table says *not measured*.

# %% tags=["hide-input"]
print(
    kernels_run
    if gpu_measured
    else "Not measured: no GPU has run these kernels for this book yet. Waiting is judged by: "
    + gpu.name
)
print(kernel_results.kernel_table(cases, gpu))

# %% tags=["hide-input"]
names = list(dict.fromkeys(case.kernel for case in cases))


def height(case):
    """Where a case lies in the picture: the cases of a kernel one below the other, in its row."""
    row = [c for c in cases if c.kernel == case.kernel]
    return names.index(case.kernel) + 0.7 * ((row.index(case) + 0.5) / len(row) - 0.5)


def draw_kernels(fig):
    left, right = fig.subplots(1, 2, sharey=True)
    at = [height(c) for c in cases]
    left.plot([c.work.operations_per_byte for c in cases], at, "o", color="0.35", markersize=4)
    left.axvline(gpu.ridge_operations_per_byte, color="0.45", linestyle="--")
    left.set_xscale("log")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("")
    left.set_xlabel("operations per byte, counted")
    left.set_yticks(range(len(names)), names)
    left.set_ylim(len(names) - 0.5, -0.5)
    right.set_xlabel("share of the roofline")
    right.set_xlim(0, 1.05)
    right.xaxis.set_major_formatter("{x:.0%}")
    for place, case in zip(at, cases) if gpu_measured else ():
        rivals = [c.roofline for c in case.contestants if c.rival]
        right.plot(rivals, [place] * len(rivals), "o", color="0.55", mfc="none", markersize=4)
        if case.ours.seconds:
            right.plot(case.ours.roofline, place, "o", color=PALETTE[0], markersize=5)
    if not gpu_measured:
        right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center", size=12)


def said(kernel):
    """One kernel of the picture in words."""
    found = [c for c in cases if c.kernel == kernel]
    shares = [c.ours.roofline for c in found if c.ours.seconds]
    reached = (
        f"{min(shares):.0%} to {max(shares):.0%} of the roofline" if shares else "not measured"
    )
    return f"{kernel}: {len(found)} cases, {reached}"


figure(
    draw_kernels,
    caption="A dot for each case, in the order of the table. Left: what it is bound by: memory left of the dashed corner, arithmetic right of it. Right: "
    + (
        f"the share of the roofline of {gpu_name} that was reached. Filled: this book's kernel. Hollow: others on the same tensors."
        if gpu_measured
        else "the share of a GPU's roofline that each kernel reaches. Not measured: no GPU was available."
    ),
    alt="; ".join(said(kernel) for kernel in names) + ".",
    figsize=(7.2, 3.8),
)

# %% [markdown]
# ## Hardware that leaves things out
#
# If bytes decide, the best byte is one that is never fetched. Two chips built on that for attention:
#
# **SpAtten** (Wang et al., 2021) removes for good. A token matters as much as the attention it got, summed over heads, queries and layers so far:
#
# $$s_j = \sum_{\text{layers}} \sum_{\text{heads}} \sum_i P_{ij}.$$
#
# Tokens that fall behind are gone for all later layers (**cascade pruning**), and heads with small outputs likewise. Within a layer, values with small probabilities are not read. And keys come in two parts:
# first their high bits; the low bits only for queries whose attention comes out flat (**progressive quantisation**).
#
# **Energon** (Zhou et al., 2021) chooses anew for each query. It multiplies with 2 bits, drops the keys below a threshold, multiplies the rest with 4 bits, drops again, and computes
# exactly what is left. Our threshold lies between the mean score and the best one: $\theta = \alpha \max + (1-\alpha) \operatorname{mean}$. (The paper's own formula may differ.)
#
# By hand, three tokens and one head. Each row is a query's attention; the sums of the columns decide:

# %% tags=["nbval-check-output"]
from effnb.hardware.codesign import attention_pruning

P = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])[None, None]
total = attention_pruning.token_importance(P)[0, 0]
fair = total / torch.tensor([3, 2, 1])
print("summed:  ", *(f"{v:.2f}" for v in total))
print("averaged:", *(f"{v:.2f}" for v in fair), " (over 3, 2 and 1 queries that could see it)")
print("keep two:", attention_pruning.keep_top(total, 2).tolist())
print("averaged:", attention_pruning.keep_top(fair, 2).tolist())

# %%
show(attention_pruning.token_importance, attention_pruning.filter_keys)

# %% [markdown]
# Leaving a key out is the same as giving it a score of minus infinity. Keeping everything is the same as the original model, up to rounding; on `mini-5m`:

# %% tags=["nbval-check-output"]
from effnb.hardware.codesign import energon, kept_tokens, mean_of_kept, pruning_record, spatten
from effnb.lab import corpora, load

bench = load("mini-5m")
model = bench.model
novel = bench.tokenizer.encode(
    "\n\n".join(corpora.documents("novels", "test")[:3]), add_special_tokens=False, verbose=False
)
sample = torch.tensor(novel[:767]).to(model.device)
with torch.inference_mode():
    original = model(input_ids=sample[None, :256]).logits
    for name, pruned in (("SpAtten", spatten(model)), ("Energon", energon(model, alpha=-1.0))):
        found = pruned(input_ids=sample[None, :256]).logits
        print(
            f"{name} that keeps everything: unchanged {torch.allclose(found, original, atol=1e-3)}"
        )

# %% [markdown]
# Which words survive? An encoder reads a sentence, and each layer works on fewer of them:

# %% tags=["hide-input"]
encoder = load("minilm-l6")
SENTENCE = "The fast package manager resolves all of the dependencies and then installs the missing libraries."
given = encoder.tokenizer(SENTENCE, return_tensors="pt").to(encoder.model.device)
words = encoder.tokenizer.convert_ids_to_tokens(given["input_ids"][0])
few = spatten(encoder.model, token_keep=0.25)
with torch.inference_mode():
    few(**given)
kept = torch.stack([k[0] for k in kept_tokens(few)]).cpu()


def draw_kept(fig):
    axes = fig.subplots()
    axes.imshow(kept.int(), aspect="auto", cmap="Blues", vmin=-0.3, vmax=1.6)
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axes.set_yticks(range(len(kept)), [f"layer {i + 1}" for i in range(len(kept))])


figure(
    draw_kept,
    caption="MiniLM with SpAtten's cascade down to a quarter of the tokens. Dark: still there.",
    alt="A staircase: each layer works on fewer words. In the last: "
    + ", ".join(w for w, k in zip(words, kept[-1]) if k)
    + ".",
)

# %% [markdown]
# And what it costs a language model, on eight windows of a novel that it has never seen (stored):

# %% tags=["hide-input"]
stored = results.read("06_hardware/2_codesign/attention")
table = stored.data["table"]


def pick(method, **about):
    """The stored rows of one setting."""
    return [
        r
        for r in table
        if r["method"] == method and all(r.get(key) == value for key, value in about.items())
    ]


def average(rows, key="loss"):
    return sum(r[key] for r in rows) / len(rows)


def curve(method, choose, by):
    """Share of the pairs computed, and rise of the loss, for each setting of a method."""
    settings = sorted({r[by] for r in pick(method, choose=choose)})
    found = [pick(method, choose=choose, **{by: s}) for s in settings]
    base = pick("original")[0]["loss"]
    return [(average(f, "pair_share"), average(f) - base) for f in found if f]


LINES = {
    "tokens at random": ("tokens", "random", "keep", "0.6", "s--"),
    "SpAtten: attention summed": ("tokens", "importance", "keep", PALETTE[1], "o-"),
    "the same, averaged": ("tokens", "average", "keep", PALETTE[2], "o-"),
    "heads at random": ("heads", "random", "keep", "0.75", "v--"),
    "SpAtten: heads": ("heads", "importance", "keep", PALETTE[3], "v-"),
    "Energon: keys": ("energon", "importance", "alpha", PALETTE[0], "^-"),
}


def draw_curves(fig):
    axes = fig.subplots()
    for label, (method, choose, by, colour, line) in LINES.items():
        rows = pick(method, choose=choose)
        if by == "alpha":
            rows = [r for r in rows if r["rounds"] == [2, 4]]
            base = pick("original")[0]["loss"]
            points = [(r["pair_share"], r["loss"] - base) for r in rows]
        else:
            points = curve(method, choose, by)
        axes.plot(*zip(*sorted(points)), line, color=colour, label=label, markersize=5)
    axes.axhline(0, color="0.45", linestyle="--")
    axes.set_xlabel("pairs of query and key computed, share of all")
    axes.set_ylabel("rise of the loss, nats per token")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.legend()


figure(
    draw_curves,
    caption="What pruning attention costs mini-5m. Left is less work, down is better. Energon chooses for each query anew, the others for good.",
    alt="Loss over the share of pairs: "
    + "; ".join(
        f"{label}: " + ", ".join(f"{x:.0%} +{y:.2f}" for x, y in curve(method, choose, by))
        for label, (method, choose, by, _, _) in LINES.items()
        if by != "alpha"
    )
    + "; Energon: "
    + ", ".join(
        f"{r['pair_share']:.0%} {r['loss'] - pick('original')[0]['loss']:+.2f}"
        for r in pick("energon", choose="importance")
        if r["rounds"] == [2, 4]
    )
    + ".",
)

# %%
stored

# %% tags=["nbval-check-output"]
base = pick("original")[0]["loss"]
print("half of the tokens in the last layer   rise of the loss   16 best keys found")
for label, choose in (("at random", "random"), ("summed", "importance"), ("averaged", "average")):
    rows = pick("tokens", keep=0.5, choose=choose)
    print(f"  {label:36} {average(rows) - base:+11.3f}        {average(rows, 'recall'):.2f}")
print("Energon                                rise of the loss   16 best keys found   pairs left")
for row in pick("energon", choose="importance"):
    if row["rounds"] == [2, 4] and row["alpha"] >= 0:
        print(
            f"  alpha {row['alpha']:<30} {row['loss'] - base:+11.3f}        {row['recall']:.2f}"
            f"                 {row['pair_share']:.3f}"
        )

# %% [markdown]
# Two findings. **The sum is the wrong score for a model that reads from left to right:** an early token has been seen by more queries than a late one, so that it
# collects more attention without deserving it. Dropping by the sum is no better than dropping at random; dividing by the number of queries mends it. (An encoder does not have
# the problem: there, everyone sees everyone. And this is one small model, not fine-tuned for pruning.) **And coarse products are good judges:** at $\alpha = 0$, two and four bits find nearly all of the keys that matter, query by query, and drop most of the others.

# %% [markdown]
# ## Turn the knob: what to leave out
#
# **Predict first:** with a quarter of the tokens left, does the model still write English? And Energon at $\alpha = 0.5$, with hardly any key left?
#
# *Keep* belongs to the cascades, *alpha* to Energon. Quality and shares are measured on this model. Bytes and cycles are **simulated** by the cost model of the next section.

# %% tags=["hide-input"]
from effnb.evaluation import perplexity
from effnb.hardware.codesign.accelerator import Accelerator, Kept, simulate_decode_attention

PROMPT = "Anne was"
questions = corpora.choice_items(12, context_characters=120, choice_characters=40)
chip = Accelerator()
sizes = roofline.Shape.of(model.config)


@torch.inference_mode()
def right_answers(m):
    """Ranked choice, each continuation behind a context of its own: pruning judges one text at a time."""
    rows = []
    for item in questions:
        context = bench.tokenizer.encode(item.context, add_special_tokens=False)
        for choice in item.choices:
            ends = bench.tokenizer.encode(choice, add_special_tokens=False)
            rows.append((context + ends, len(context), len(choice.encode())))
    scores = []
    for part in (rows[i : i + 32] for i in range(0, len(rows), 32)):
        longest = max(len(ids) for ids, _, _ in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (text, _, _) in enumerate(part):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        logs = m(
            input_ids=ids.to(m.device), attention_mask=mask.to(m.device), use_cache=False
        ).logits.log_softmax(-1)
        picked = logs[:, :-1].gather(-1, ids[:, 1:, None].to(m.device))[..., 0]
        for row, (text, start, size) in enumerate(part):
            scores.append(picked[row, start - 1 : len(text) - 1].sum().item() / size)
    groups = zip(questions, (scores[i : i + 4] for i in range(0, len(scores), 4)))
    return sum(max(range(4), key=s.__getitem__) == q.answer for q, s in groups) / len(questions)


PRUNERS = {
    "Energon": lambda keep, alpha, bits: energon(
        model, rounds=(2, max(bits, 2)), alpha=alpha, top_k=16
    ),
    "SpAtten, tokens summed": lambda keep, alpha, bits: spatten(
        model, token_keep=keep, msb_bits=bits, lsb_bits=12 - bits, top_k=16
    ),
    "SpAtten, tokens averaged": lambda keep, alpha, bits: spatten(
        model, token_keep=keep, msb_bits=bits, lsb_bits=12 - bits, average=True, top_k=16
    ),
    "SpAtten, heads": lambda keep, alpha, bits: spatten(
        model, head_keep=keep, msb_bits=bits, lsb_bits=12 - bits, top_k=16
    ),
    "SpAtten, values": lambda keep, alpha, bits: spatten(
        model, value_keep=keep, msb_bits=bits, lsb_bits=12 - bits, top_k=16
    ),
    "tokens at random": lambda keep, alpha, bits: spatten(
        model, token_keep=keep, msb_bits=bits, lsb_bits=12 - bits, choose="random", top_k=16
    ),
}


def look(m):
    """Quality and a few words of one model."""
    prompt = bench.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).to(m.device)
    found = {"perplexity": perplexity(m, sample).perplexity}
    record = pruning_record(m) if m is not model else None
    written = m.generate(
        **prompt, max_new_tokens=14, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    words = bench.tokenizer.decode(written[0], skip_special_tokens=True).replace("\n", " ")
    return found | {"right": right_answers(m), "words": words, "record": record}


with torch.inference_mode():
    plain = look(model)
full = simulate_decode_attention(chip, sizes, 512)


def compute(keep, method, alpha, bits):
    found = look(PRUNERS[method](keep, alpha, bits))
    if method == "Energon":
        shares = Kept.measured(found["record"], rounds=(2, max(bits, 2)))
    else:
        shares = Kept.measured(found["record"], high_bits=bits)
    return found | {"chip": simulate_decode_attention(chip, sizes, 512, shares), "method": method}


def draw(result, fig):
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    for method, choose, by, _, line in LINES.values():
        if by != "alpha":
            points = [(x, math.exp(y)) for x, y in curve(method, choose, by)]
            left.plot(*zip(*sorted(points)), line, color="0.8", markersize=3)
    left.axhline(1, color="0.45", linestyle="--")
    left.plot(
        result["record"].pair_share,
        result["perplexity"] / plain["perplexity"],
        "o",
        color=PALETTE[1],
        markersize=9,
    )
    left.set_yscale("log")
    left.set_title("perplexity, times the original's")
    left.set_xlabel("pairs computed, share of all")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    bars = {
        "right answers": result["right"],
        "16 best keys": result["record"].recall,
        "bytes (simulated)": result["chip"].dram_bytes / full.dram_bytes,
    }
    right.barh(range(len(bars)), list(bars.values()), color=PALETTE[0], height=0.5)
    right.axvline(plain["right"], ymax=0.33, color="0.45", linestyle="--")
    right.set_yticks(range(len(bars)), list(bars))
    right.set_xlim(0, 1.05)


def text(result):
    record, simulated = result["record"], result["chip"]
    return "\n".join(
        [
            f"Method: {result['method']}",
            f"Perplexity: {result['perplexity']:.4g}",
            f"Original's: {plain['perplexity']:.4g}",
            f"Right answers: {result['right']:.0%}",
            f"Original's right answers: {plain['right']:.0%}",
            f"Pairs computed: {record.pair_share:.1%}",
            f"Values read: {record.value_share:.1%}",
            f"16 best keys found: {record.recall:.1%}",
            f"Bytes, simulated: {simulated.dram_bytes / full.dram_bytes:.1%} of all",
            f"Cycles, simulated: {simulated.cycles / full.cycles:.1%} of all",
            f"The original writes: {plain['words']} …",
            f"Pruned, it writes: {result['words']} …",
        ]
    )


# %%
panel(
    compute,
    draw,
    text=text,
    title="Prune mini-5m's attention",
    caption="Left: your setting among the stored curves of the cascades. Right: questions about unseen packages (dashed: the original), the best keys found, and bytes by the cost model.",
    frames=[1.0, 0.5, 0.25],
    keep=knob([1.0, 0.75, 0.5, 0.25, 0.125], default=0.5, label="keep"),
    method=knob(list(PRUNERS), default="SpAtten, tokens averaged"),
    alpha=knob([0.0, 0.25, 0.5], default=0.0, label="alpha (Energon)"),
    bits=knob([8, 6, 4], default=8, label="bits of a key read first"),
)

# %% [markdown]
# ### What a chip would gain: a simulation
#
# None of this is faster on your processor. It reads whole cache lines and multiplies whole vectors, and to leave out a key it would first have to know which. What a chip gains that fetches bit by bit, we can
# only **simulate**: a fixed number of bytes per cycle, an array of multipliers of four bits by four, a unit that compares. The shares that go in were measured above; the cycles that come out are arithmetic.

# %% tags=["nbval-check-output"]
both = pick("together")[0]
filtered = [r for r in pick("energon", alpha=0.0, choose="importance") if r["rounds"] == [2, 4]]
coarse = filtered[0]
SHARES = {
    "all keys, 12 bits": Kept(),
    "SpAtten, everything": Kept(
        both["pair_share"],
        both["value_share"],
        12,
        both["msb_bits"],
        both["refetch_share"],
        selects=True,
    ),
    "Energon, alpha 0": Kept(
        coarse["pair_share"],
        coarse["value_share"],
        12,
        rounds=tuple(zip((2, 4), coarse["round_shares"])),
        selects=True,
    ),
}
print("simulated, 512 tokens   bytes   cycles  waits for")
for name, shares in SHARES.items():
    found = simulate_decode_attention(chip, sizes, 512, shares)
    print(
        f"{name:22} {found.dram_bytes / full.dram_bytes:6.0%} {found.cycles / full.cycles:8.0%}  {found.bound}"
    )
print(
    "rise of the loss (measured):",
    f"SpAtten {both['loss'] - base:+.3f}, Energon {coarse['loss'] - base:+.3f}",
)

# %%
from effnb.hardware.codesign import accelerator

show(accelerator.simulate_decode_attention)

# %% [markdown]
# ## Experts on several machines
#
# A model can also outgrow its machine. **GShard** (Lepikhin et al., 2020) spreads a layer of $E$ experts over $N$ devices. Each token goes to its two best experts. To keep shapes fixed, which a compiler needs, an expert takes at most
#
# $$C = \lceil 2 f S / E \rceil$$
#
# tokens of a group of $S$; $f$ is the **capacity factor**. Who finds an expert full is dropped, and lives on in the residual stream. The layer is a chain of einsums: tokens to their slots, the experts, and back. Cut it along the groups before
# the experts and along the experts inside, and the compiler has to add one thing, twice: an **all-to-all** in which every device sends to every other, there and back. Each time,
#
# $$\text{bytes sent by a device} = \frac{N-1}{N}\, E\, C \cdot \text{groups} \cdot \text{width} \cdot \text{bytes per number}.$$

# %%
from effnb.hardware.codesign import gshard

show(gshard.moe_layer)

# %% [markdown]
# This is no simulation: two processes of `torch.distributed`, each with half of the experts and half of the tokens, started now on your machine. Only the compiler is missing: the two exchanges are written by hand, where GShard's
# compiler puts them. With room for all tokens the processes must agree with a loop over tokens, and the bytes with the formula:

# %% tags=["nbval-check-output"]
from effnb.hardware.codesign.expert_parallel import Settings, run_processes

roomy = Settings(
    devices=2, experts=8, groups=4, tokens=64, model=64, hidden=128, factor=0, repeats=3
)
reports = run_processes(roomy)
predicted = 2 * gshard.exchange_bytes(roomy.groups // 2, roomy.slots, 8, 64, devices=2)
print("differs from the loop by less than 1e-6:", all(r.largest_error < 1e-6 for r in reports))
print("bytes sent:", [r.sent_bytes for r in reports], "by the formula:", int(predicted))

# %%
for r in reports:
    print(f"device {r.device}: {r.exchange_seconds / r.seconds:.0%} of the time is the exchange")

# %% [markdown]
# ### As experts and devices grow
#
# The same, stored: 4, 8 and 16 experts on 1, 2 and 4 processes, always the same 2,048 tokens. Bytes were counted where they are sent, operations by PyTorch's own counter, both for the process that has most.
# *Work* is the time that a processor spent on the busiest process, as a part of what one process alone takes.

# %% tags=["nbval-check-output"]
experts = results.read("06_hardware/2_codesign/experts")
ran, grown = experts.data["sizes"], experts.data["table"]


def stored_run(count, devices):
    """The stored run with so many experts and devices."""
    return next(r for r in grown if (r["experts"], r["devices"]) == (count, devices))


def by_formula(row):
    """Bytes that a device sends, there and back."""
    groups = ran["groups"] // row["devices"]
    return 2 * gshard.exchange_bytes(
        groups, row["slots"], row["experts"], ran["model"], row["devices"]
    )


def per_thousand(row):
    """Bytes that a device sends for every thousand operations that it does."""
    return 1000 * max(row["sent_bytes"]) / max(row["operations"])


def busy_share(row):
    """Processor time of the busiest process, as a part of what one process alone takes."""
    alone = stored_run(row["experts"], 1)["busy_seconds"]
    return sorted(row["busy_seconds"])[len(alone) // 2] / sorted(alone)[len(alone) // 2]


print("experts  processes  weights  operations  sent by each  per 1,000 operations  work")
for r in grown:
    print(
        f"{r['experts']:7} {r['devices']:10} {max(r['weight_bytes']) / 2**20:4.0f} MiB"
        f" {max(r['operations']) / 1e9:9.2f} G {max(r['sent_bytes']) / 2**20:9.2f} MiB"
        f" {per_thousand(r):15.2f} bytes {busy_share(r):9.2f}"
    )
print("as the formula says:", all(set(r["sent_bytes"]) == {by_formula(r)} for r in grown))
alike = all(
    math.isclose(r["output_sum"], stored_run(r["experts"], 1)["output_sum"], rel_tol=1e-6)
    for r in grown
)
print("the same results on 1, 2 and 4 processes:", alike)
worst = max(r["largest_error"] for r in grown)
print(f"with room for all, differs from the loop over tokens by less than 1e-6: {worst < 1e-6}")

# %%
experts

# %% [markdown]
# Devices share weights and work. The exchange grows with them, but to a limit: two devices send half of their tokens away, four send three quarters. More experts, at the same capacity factor, send no more: each has the fewer slots.
# Operations are shared exactly. The processor's time is not, for sending and receiving is work too.

# %% tags=["hide-input"]
clock = results.read("06_hardware/2_codesign/scaling")


def seconds_of(devices, key="seconds"):
    """Stored seconds with so many processes, all numbers of experts behind each other."""
    return [s for r in clock.data["table"] if r["devices"] == devices for s in r[key]]


if not clock:
    print("By the clock: not measured. No run on two idle cores is stored.")
else:
    print(clock)
    print("by the clock, on two idle cores (medians):")
    for count in sorted({r["experts"] for r in clock.data["table"]}):
        one, two = (
            next(r for r in clock.data["table"] if (r["experts"], r["devices"]) == (count, n))
            for n in (1, 2)
        )
        took = [sorted(r["seconds"])[len(r["seconds"]) // 2] for r in (one, two)]
        sharing = sorted(e / s for e, s in zip(two["exchange_seconds"], two["seconds"]))
        print(
            f"{count:3} experts: {1000 * took[0]:.0f} ms with one process, {1000 * took[1]:.0f} ms with two: "
            f"{took[0] / took[1]:.2f} times as fast; {sharing[len(sharing) // 2]:.0%} of the time is the exchange"
        )

# %% [markdown]
# ### Turn the knob: devices
#
# Real hidden states of `mini-5m` are routed to experts by a router that was not trained; each device has 128 tokens. **Predict first:** as devices are added, and experts with them, does the exchange eat up the gain? What does it depend on?

# %% tags=["hide-input"]
with torch.inference_mode():
    states = model(
        input_ids=torch.tensor(novel[:4096]).view(8, 512).to(model.device),
        output_hidden_states=True,
    )
    states = states.hidden_states[3].reshape(-1, 128, 256).float().cpu()
states = states / states.square().mean(-1, keepdim=True).sqrt()
LINKS = {"network, 10 GB/s": 10e9, "PCIe, 50 GB/s": 50e9, "NVLink, 300 GB/s": 300e9}


def spread(devices, each, factor, hidden, link):
    """Route the tokens of so many devices; what each computes and sends."""
    count = max(2, devices * each)
    router = torch.randn(256, count, generator=torch.Generator().manual_seed(0)) / 16
    slots = gshard.capacity(128, count, factor)
    routing = gshard.route(states[:devices] @ router, slots)
    sent = 2 * gshard.exchange_bytes(1, slots, count, 256, devices, bytes_per_number=2)
    operations = gshard.expert_operations(1, slots, count, 256, hidden)
    return {
        "routing": routing,
        "sent": sent,
        "compute": operations / a100.operations_per_second,
        "exchange": sent / LINKS[link],
        "tokens": 128 * devices,
        "slots": slots * devices,
        "experts": count,
    }


def draw_spread(result, fig):
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    load = sorted(result["routing"].load, reverse=True)
    left.bar(range(len(load)), load, color=PALETTE[0], width=1.0)
    left.axhline(result["slots"], color="0.45", linestyle="--")
    left.set_xlabel("experts, the most wanted first")
    left.set_title("first choices; dashed: room")
    times = (1e6 * result["compute"], 1e6 * result["exchange"])
    right.barh((0, 1), times, color=(PALETTE[2], PALETTE[1]), height=0.5)
    right.set_yticks((0, 1), ["compute", "exchange"])
    right.set_xlabel("microseconds, by arithmetic")


def say_spread(result):
    routing, tokens = result["routing"], result["tokens"]
    return "\n".join(
        [
            f"Experts: {result['experts']}",
            f"Choices dropped: {routing.dropped_choices / (2 * tokens):.1%}",
            f"Tokens without any expert: {routing.lost_tokens / tokens:.1%}",
            f"Balance loss times experts squared: {routing.auxiliary_loss.item() * result['experts'] ** 2:.2f} (1 is balanced)",
            f"Sent by a device: {result['sent'] / 1024:.0f} KiB",
            f"Exchange / compute: {result['exchange'] / result['compute']:.2f}",
        ]
    )


# %%
panel(
    spread,
    draw_spread,
    text=say_spread,
    title="More devices, more experts",
    caption="Left: how many tokens want each expert (measured), and how many it takes. Right: least times of one device, from an A100's data sheet and the link's rate.",
    frames=[2, 4, 32],
    devices=knob([1, 2, 4, 8, 16, 32], default=4),
    each=knob([1, 2, 4], default=2, label="experts per device"),
    factor=knob([0.5, 1.0, 1.25, 2.0], default=1.0, label="capacity factor"),
    hidden=knob([512, 2048, 8192], default=2048, label="width of an expert"),
    link=knob(list(LINKS), default="PCIe, 50 GB/s"),
)

# %% [markdown]
# The share $(N-1)/N$ soon is one, so that a device sends less than a third more at 32 devices than at 4. What counts is how much is computed for each number sent, and that grows with the *width of an expert* alone. Tokens are worth sending to wide experts:

# %% tags=["nbval-check-output"]
print("exchange / compute, A100 data sheet, 50 GB/s per device")
print("devices              2      4     32")
for hidden in (512, 2048, 8192):
    ratios = [spread(n, 2, 1.0, hidden, "PCIe, 50 GB/s") for n in (2, 4, 32)]
    print(f"width {hidden:5}", *(f"{r['exchange'] / r['compute']:9.1f}" for r in ratios))

# %% [markdown]
# ## Does it hold?
#
# Two rows of the claims ledger belong to this chapter. Quality and recall were measured, window by window, and the processes are real. Cycles and energy of the chips were not measured by anyone here, so no verdict rests on them.

# %% tags=["hide-input"]
from effnb.lab import Evidence, claims_table, verdict


def windows(rows, key="windows"):
    """Per window, averaged over seeds."""
    found = [r[key] for r in rows]
    return [sum(w) / len(w) for w in zip(*found)]


saved = simulate_decode_attention(chip, sizes, 512, SHARES["SpAtten, everything"]).dram_bytes
s_h3 = verdict(
    "S-H3",
    parts=[
        Evidence.paired(
            "predicts: share of the 16 best keys found by products of 2 and 4 bits - share of keys kept",
            windows(filtered, "recall_windows"),
            windows(filtered, "pair_share_windows"),
            expect="higher",
        ),
        Evidence.paired(
            "ultra-low bits: nats, keys filtered by 2 and 4 bits - all keys",
            windows(filtered),
            windows(pick("original")),
            expect="equal",
            margin=0.05,
        ),
        Evidence.paired(
            "mixed precision: nats, 6 high bits and the low ones on demand - original",
            windows(pick("bits", msb_bits=6, threshold=0.1)),
            windows(pick("original")),
            expect="equal",
            margin=0.05,
        ),
        Evidence.paired(
            "removes tokens by summed attention: nats with half of them, importance - random",
            windows(pick("tokens", keep=0.5, choose="importance")),
            windows(pick("tokens", keep=0.5, choose="random")),
            expect="lower",
        ),
        Evidence.paired(
            "removes tokens by averaged attention: nats with half of them, importance - random",
            windows(pick("tokens", keep=0.5, choose="average")),
            windows(pick("tokens", keep=0.5, choose="random")),
            expect="lower",
        ),
        Evidence.paired(
            "removes heads: nats with half of them, importance - random",
            windows(pick("heads", keep=0.5, choose="importance")),
            windows(pick("heads", keep=0.5, choose="random")),
            expect="lower",
        ),
        Evidence.exact(
            "bytes of keys and values that SpAtten's choices leave (counted by the cost model) / all",
            saved / full.dram_bytes,
            expect="lower",
            bound=0.5,
        ),
    ],
    note="mini-5m, 8 windows of 512 tokens, 2 seeds of each random choice. Speed and energy of the chips cannot be tested here: "
    "that takes the chips; the page simulates cycles.",
)

# %% tags=["hide-input"]

WHAT = "time scales: seconds by the clock, 1 process / 2 processes on 2 cores"
if not clock:  # then anything that two cores allow at all is possible, and nothing is decided
    by_clock = Evidence(
        f"{WHAT}: not measured", 1.0, 0.0, 2.0, "higher", 1.0, samples=0, kind="none"
    )
else:
    by_clock = Evidence.paired(WHAT, seconds_of(1), seconds_of(2), expect="higher", ratio=True)


def worked(devices):
    """Processor seconds of the busiest process, all numbers of experts behind each other."""
    return [s for r in grown if r["devices"] == devices for s in r["busy_seconds"]]


s_h4 = verdict(
    "S-H4",
    parts=[
        Evidence.exact(
            "partitioning changes nothing: largest difference, 1 to 4 processes - loop over tokens",
            worst,
            expect="lower",
            bound=1e-6,
        ),
        Evidence.exact(
            "communication does not outgrow the work: bytes per operation on 4 processes, 16 experts / 4 experts",
            per_thousand(stored_run(16, 4)) / per_thousand(stored_run(4, 4)),
            expect="lower",
            bound=1.1,
        ),
        Evidence.paired(
            "work scales: processor seconds of the busiest process, 1 process / 4 processes",
            worked(1),
            worked(4),
            expect="higher",
            ratio=True,
            bound=2,
        ),
        by_clock,
    ],
    note="Real processes over gloo on one machine, 4 to 16 experts; the exchanges are written by hand, where GShard's compiler puts them. "
    "The compiler and a cluster's network cannot be tested here. Attention's co-designs are judged by S-H3.",
)
claims_table(s_h3, s_h4)

# %% [markdown]
# ## What it costs and saves
#
# The cost card of the pruned model on *this* machine. Same weights, same bytes, and more time: the choosing is work too, and nothing is skipped. Software alone does not get the gain; that is why these are chips.

# %%
from effnb.evaluation import measure
from effnb.lab import cost_card

prompt = sample[None, :128]
cost_card(
    measure(model, prompt, decode_tokens=6, runs=3),
    measure(spatten(model, token_keep=0.5, average=True), prompt, decode_tokens=6, runs=3),
    labels=("original", "SpAtten, masked"),
)

# %% [markdown]
# ## On a real model
#
# `minilm-l6`, full-precision weights, 22 million of them, an encoder: the kind of model in which every token sees every other. The task is to find a package's description from its synopsis among 200 (stored). The sentence vector is the mean over the tokens that are left:

# %% tags=["nbval-check-output"]
minilm = results.read("06_hardware/2_codesign/minilm").data["table"]
print("                          found first   pairs computed")
for r in minilm:
    if r.get("seed", 0) == 0:
        setting = (
            f"keep {r['keep']}" if "keep" in r else f"alpha {r['alpha']}" if "alpha" in r else ""
        )
        name = f"{r['method']}{' at random' if r.get('choose') == 'random' else ''} {setting}"
        print(f"{name:26} {r['recall_at_1']:10.1%} {r.get('pair_share', 1):14.0%}")

# %% [markdown]
# Attention is a much better guide than chance, also without any correction: everyone sees everyone here. Still, half of the tokens is a high price. MiniLM's vector is a mean over tokens, and those that are gone are missing from it. Energon, which drops keys and no token, keeps most of the quality with far fewer pairs.

# %% tags=["real-model"]
from torch.nn.functional import normalize

if results.live():
    from effnb.evaluation import retrieval

    chosen = [p for p in corpora.packages("test") if len(p.text) > 300][:100]
    shorter = spatten(encoder.model, token_keep=0.5)

    @torch.inference_mode()
    def vectors(texts):
        batch = encoder.tokenizer(
            texts, padding=True, truncation=True, max_length=256, return_tensors="pt"
        )
        return normalize(
            mean_of_kept(shorter, shorter(**batch.to(shorter.device)).last_hidden_state), dim=1
        )

    synopses, texts = [p.synopsis for p in chosen], [p.text[:600] for p in chosen]
    whole = retrieval(encoder.encode(synopses), encoder.encode(texts)).recall_at_1
    print(
        f"original {whole:.0%}, half of the tokens {retrieval(vectors(synopses), vectors(texts)).recall_at_1:.0%}"
    )
else:
    print(results.read("06_hardware/2_codesign/minilm"))

# %% [markdown]
# ## Where it breaks
#
# **A roof that is beaten.** Measure something small again and again, and it comes from the cache, not from memory. The roof then seems to be broken; it is the wrong roof:

# %%
source = torch.ones(2**15)
target = torch.empty_like(source)
seconds = roofline.median_seconds(lambda _: [target.copy_(source) for _ in range(500)], 5) / 500
rate = 2 * source.nbytes / seconds
print(
    f"copying 128 KiB again and again: {rate / here.bytes_per_second:.1f} times the memory's rate"
)

# %% [markdown]
# **A queue that counts everyone.** Places before an expert are counted *within a group*. Count them over all tokens, and who is dropped depends on how many devices there are:

# %% tags=["nbval-check-output"]
logits = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
slots = gshard.capacity(64, 8)
by_group = [gshard.route(part, slots).dropped_choices for part in (logits, *logits.split(2))]
print("in groups, one device:", by_group[0], " two devices:", by_group[1] + by_group[2])
joined = [
    gshard.route(part.reshape(1, -1, 8), slots * len(part)).dropped_choices
    for part in (logits, *logits.split(2))
]
print("in one queue, one device:", joined[0], " two devices:", joined[1] + joined[2])

# %% [markdown]
# **Texts side by side.** A cascade judges keys by the queries so far. Put two continuations behind one context, and one would drop keys that the other needs; so this is refused. It and other **bad input** get one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: spatten(model, token_keep=0.0),
    lambda: spatten(spatten(model)),
    lambda: energon(model, rounds=(1, 4)),
    lambda: roofline.matmul(0, 8, 8),
    lambda: run_processes(Settings(devices=3)),
    lambda: accelerator.simulate_matmul(chip, 1, 8, 8, sparsity=0.3, skip="2:4"),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %% tags=["hide-input"]
import warnings

from effnb.lab import Exercise

RATES = ((2e12, 300e12), (1e10, 1e11))


def least(m, bits, width, memory, arithmetic):
    """The least time of a product, in microseconds."""
    moved = (bits * width * width + 32 * m * width) / 8
    return 1e6 * max(moved / memory, 2 * m * width * width / arithmetic)


predict = Exercise(
    "Predict before you measure",
    minutes=10,
    difficulty="easy",
    reference=least,
    cases=[
        (1, 16, 4096, *RATES[0]),
        (1, 4, 4096, *RATES[0]),
        (1024, 4, 4096, *RATES[0]),
        (8, 32, 512, *RATES[1]),
    ],
    wrong={
        "The two times overlap: take the larger one, not their sum": lambda m, b, w, B, P: (
            1e6 * ((b * w * w + 32 * m * w) / 8 / B + 2 * m * w * w / P)
        ),
        "A multiplication and an addition are two operations": lambda m, b, w, B, P: (
            1e6 * max((b * w * w + 32 * m * w) / 8 / B, m * w * w / P)
        ),
        "These are bits, not bytes: divide by eight": lambda m, b, w, B, P: (
            1e6 * max((b * w * w + 32 * m * w) / B, 2 * m * w * w / P)
        ),
        "Inputs and results move too, in 16 bits each": lambda m, b, w, B, P: (
            1e6 * max(b * w * w / 8 / B, 2 * m * w * w / P)
        ),
    },
    atol=1e-6,
)


EDGE = 2**13  # numbers around each tensor: a kernel that leaves its tensor meets them
UNTOUCHED = -math.inf  # what the result holds before the kernel runs


class KernelExercise(Exercise):
    """An exercise whose answer stores its result where it has to return it only without Triton."""

    def _begin(self):
        return f"Not yet: {self.name} makes nothing so far; write its body, and run this again."


def between_edges(tensor, edge):
    """A copy of a tensor in the middle of memory that holds something else."""
    memory = torch.full((tensor.numel() + 2 * EDGE,), edge, dtype=tensor.dtype)
    inside = memory[EDGE:-EDGE].view(tensor.shape)
    inside.copy_(tensor)
    return memory, inside


def interpreted(kernel, **more):
    """Run a kernel for a @ b: its result, and how many numbers it wrote beside it."""

    def run(a, b, size):
        (m, k), n = a.shape, b.shape[1]
        (_, left), (_, right) = between_edges(a, math.nan), between_edges(b, math.nan)
        memory, out = between_edges(torch.full((m, n), UNTOUCHED), UNTOUCHED)
        grid = (cdiv(m, size), cdiv(n, size))
        try:
            with warnings.catch_warnings():  # NumPy's, on what lies around the tensors
                warnings.simplefilter("ignore")
                launch(kernel, grid, left, right, out, m, n, K=k, SIZE=size, **more)
        except Exception as caught:  # noqa: BLE001 - a learner's kernel may raise anything
            cause = caught
            while cause.__cause__ is not None:  # the interpreter wraps what a kernel raises
                cause = cause.__cause__
            if isinstance(cause, AssertionError) and not str(cause):
                cause = TypeError(
                    "Triton refuses the types of an operation; `tl.dot` adds to sums of tl.float32"
                )
            raise cause from None
        touched = memory != UNTOUCHED
        if not touched.any():
            raise NotImplementedError
        touched[EDGE:-EDGE] = False
        return {"product": out, "numbers written beside it": int(touched.sum())}

    return run


def product(a, b, size):
    return {"product": a.float() @ b.float(), "numbers written beside it": 0}


g = torch.Generator().manual_seed(3)


def whole(low, high, *shape):
    """Whole numbers in half precision, so that every order of adding gives the same sum."""
    return torch.randint(low, high, shape, generator=g).half()


CASES = [
    (whole(-3, 4, 16, 32), whole(-3, 4, 32, 16), 16),
    (whole(-3, 4, 20, 24), whole(-3, 4, 24, 18), 16),
    (whole(100, 200, 16, 16), whole(100, 200, 16, 16), 16),
]
if INTERPRETED:
    from effnb.kernels._launch import cdiv, jit, launch, tl

    @jit
    def mistaken(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr, WRONG: tl.constexpr):
        rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        if WRONG == "alone":
            rows, columns = tl.arange(0, SIZE), tl.arange(0, SIZE)
        if WRONG == "start":
            rows, columns = tl.program_id(0) + rows % SIZE, tl.program_id(1) + columns % SIZE
        next_row = K if WRONG == "stride" else N
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for first in range(0, K, SIZE):
            inner = first + tl.arange(0, SIZE)
            in_a = (rows < M)[:, None] & ((inner < K) | (WRONG in ("inner", "inner a")))[None, :]
            in_b = ((inner < K) | (WRONG == "inner"))[:, None] & (columns < N)[None, :]
            in_a, in_b = in_a | (WRONG == "nothing"), in_b | (WRONG == "nothing")
            left = tl.load(a + rows[:, None] * K + inner[None, :], mask=in_a, other=0.0)
            right = tl.load(b + inner[:, None] * next_row + columns[None, :], mask=in_b, other=0.0)
            if WRONG == "last":
                total = tl.dot(left, right)
            else:
                total += tl.dot(left, right)
            if WRONG == "half":
                total = total.to(tl.float16).to(tl.float32)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        inside = inside | (WRONG in ("store", "nothing"))
        tl.store(out + rows[:, None] * N + columns[None, :], total, mask=inside)

    def mistake(name):
        """A kernel with one mistake; each case is interpreted once."""
        run, known = interpreted(mistaken, WRONG=name), {}

        def remembered(a, b, size):
            if a.shape not in known:
                known[a.shape] = run(a, b, size)
            return known[a.shape]

        return remembered

    loop = KernelExercise(
        "A tile loop",
        minutes=20,
        difficulty="medium",
        reference=product,
        cases=CASES,
        wrong={
            "The last tiles reach past the ends of all three tensors: give both loads and the store a mask": mistake(
                "nothing"
            ),
            "The last inner tile reaches past K: the masks of both loads need `inner < K`, with other=0.0": mistake(
                "inner"
            ),
            "The last inner tile reaches past K: the load of a needs `inner < K` in its mask too": mistake(
                "inner a"
            ),
            "The last tiles of the result reach past M and N: the store needs a mask too": mistake(
                "store"
            ),
            "Every program makes a tile of its own: `tl.program_id` says which": mistake("alone"),
            "Tile i begins at i * SIZE, not at i": mistake("start"),
            "The next row of b begins N numbers later, and that of a K numbers later": mistake(
                "stride"
            ),
            "Each tile of the result is a sum over the inner tiles: add up, do not overwrite": mistake(
                "last"
            ),
            "Add up in tl.float32: half precision ends at 65,504": mistake("half"),
        },
        atol=1e-3,
    )
else:  # the same loop with slices of tensors, which are cut short by themselves

    def in_slices(a, b, size, add=True, kind=torch.float32):
        out = torch.zeros(len(a), b.shape[1])
        for i in range(0, len(a), size):
            for j in range(0, b.shape[1], size):
                total = torch.zeros_like(out[i : i + size, j : j + size])
                for k in range(0, a.shape[1], size):
                    part = (
                        a[i : i + size, k : k + size].float()
                        @ b[k : k + size, j : j + size].float()
                    )
                    total = (total + part if add else part).to(kind).float()
                out[i : i + size, j : j + size] = total
        return out

    loop = KernelExercise(
        "A tile loop",
        minutes=20,
        difficulty="medium",
        reference=in_slices,
        cases=CASES,
        wrong={
            "Each tile of the result is a sum over the inner tiles: add up, do not overwrite": lambda *case: (
                in_slices(*case, add=False)
            ),
            "Add up in torch.float32: half precision ends at 65,504": lambda *case: in_slices(
                *case, kind=torch.float16
            ),
        },
        atol=1e-3,
    )


def queue(choices, experts, room):
    seen, places = [0] * experts, []
    for expert in choices:
        places.append(seen[expert] if seen[expert] < room else -1)
        seen[expert] += 1
    return places


seats = Exercise(
    "A place before the expert",
    minutes=10,
    difficulty="medium",
    reference=queue,
    cases=[([0, 1, 0, 0, 1], 2, 2), ([2, 2, 2, 0, 1, 2], 3, 1), ([1, 0, 1, 1, 0], 2, 5)],
    wrong={
        "Who finds the expert full is dropped: its place is -1": lambda c, e, r: [
            c[:i].count(x) for i, x in enumerate(c)
        ],
        "Places are counted for each expert, not over all tokens": lambda c, e, r: [
            i if i < r else -1 for i in range(len(c))
        ],
        "Places begin at 0": lambda c, e, r: [
            c[: i + 1].count(x) if c[:i].count(x) < r else -1 for i, x in enumerate(c)
        ],
    },
)
for exercise in (predict, loop, seats):
    print(exercise)


# %% [markdown]
# **1.** The least time in microseconds of a product of $m$ tokens with a weight of `width` by `width`, stored in `bits`; inputs and results have 16 bits. Memory moves `memory` bytes, the units do `arithmetic` operations per second.


# %% tags=["exercise", "nbval-check-output"]
def least_time(m, bits, width, memory, arithmetic):
    """Microseconds."""
    raise NotImplementedError


_ = predict.check(least_time)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Bytes: the weight once, `m * width` inputs once, `m * width` results once. Then the larger of two times.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def least_time(m, bits, width, memory, arithmetic):
    """Microseconds."""
    moved = (bits * width**2 + 16 * 2 * m * width) / 8
    return 1e6 * max(moved / memory, 2 * m * width**2 / arithmetic)


_ = predict.check(least_time)

# %% [markdown]
# Now measure. How much longer do 64 tokens take than one, here? Predict it with your function, from the two ceilings of this machine (32 bits for everything), and compare:

# %%
times = [roofline.measure_matmul(m, WIDTH, WIDTH) for m in (1, 64)]
bound = [
    here.least_seconds(roofline.matmul(m, WIDTH, WIDTH, weight_bits=32, activation_bits=32))
    for m in (1, 64)
]
print(f"by the roof {bound[1] / bound[0]:.1f} times, measured {times[1] / times[0]:.1f} times")

# %% [markdown]
# **2.** A tile loop, as a kernel. Many programs run it, in a grid of tiles; each makes one tile of `out`, which is $AB$, of `SIZE` by `SIZE`. $A$ has `M` rows of `K` numbers, $B$ has `K` rows of `N`, both in
# half precision; `a`, `b` and `out` point to the first number of each, row by row. Sums are `tl.float32`. The check runs your kernel in the interpreter, on tiles that fit and on tiles that stick out, in memory whose surroundings are watched.
# (Without Triton, write the same loop with slices of tensors instead, in the second half of the cell.)


# %% tags=["exercise", "nbval-check-output"]
if INTERPRETED:

    @jit
    def tile_kernel(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        """Make one tile of the product."""
        raise NotImplementedError

    _ = loop.check(interpreted(tile_kernel))
else:

    def tile_loop(a, b, size):
        """The product of a and b, in float32."""
        raise NotImplementedError

    _ = loop.check(tile_loop)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `rows` and `columns` of a tile: `tl.program_id(0)` and `tl.program_id(1)` say which tile, `tl.arange(0, SIZE)` counts inside. Then, for each tile of inner numbers: `tl.load` a tile of each matrix, `tl.dot` them, add.
# `rows[:, None] * K + inner[None, :]` is a square of places. `mask=` says which of them exist, `other=0.0` what stands for the rest. At the end `tl.store`, with a mask.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
if INTERPRETED:

    @jit
    def tile_kernel(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        """Make one tile of the product."""
        rows = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
        columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
        for first in range(0, K, SIZE):
            inner = first + tl.arange(0, SIZE)
            left = tl.load(
                a + rows[:, None] * K + inner[None, :],
                mask=(rows < M)[:, None] & (inner < K)[None, :],
                other=0.0,
            )
            right = tl.load(
                b + inner[:, None] * N + columns[None, :],
                mask=(inner < K)[:, None] & (columns < N)[None, :],
                other=0.0,
            )
            total += tl.dot(left, right)
        tl.store(
            out + rows[:, None] * N + columns[None, :],
            total,
            mask=(rows < M)[:, None] & (columns < N)[None, :],
        )

    _ = loop.check(interpreted(tile_kernel))
else:

    def tile_loop(a, b, size):
        """The product of a and b, in float32."""
        out = torch.zeros(len(a), b.shape[1])
        for i in range(0, len(a), size):
            for j in range(0, b.shape[1], size):
                for k in range(0, a.shape[1], size):
                    left = a[i : i + size, k : k + size].float()
                    right = b[k : k + size, j : j + size].float()
                    out[i : i + size, j : j + size] += left @ right
        return out

    _ = loop.check(tile_loop)

# %% [markdown]
# What the interpreter does not see: a tile that is *read* past the end and thrown away again, and sums of a wrong type that Python quietly widens. On a GPU the first may crash, and the compiler refuses the second. That is why this
# book's kernels are also compiled for real GPUs in its tests, and watched there by a memory checker (`make test-gpu`).

# %% [markdown]
# **3.** Tokens come in order, each with the expert that it wants. Give each its place before that expert, from 0, or -1 where `room` is used up.


# %% tags=["exercise", "nbval-check-output"]
def places(choices, experts, room):
    """One place for each token."""
    raise NotImplementedError


_ = seats.check(places)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count, for each expert, how many have asked for it so far.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def places(choices, experts, room):
    """One place for each token."""
    asked, found = [0] * experts, []
    for expert in choices:
        found.append(asked[expert] if asked[expert] < room else -1)
        asked[expert] += 1
    return found


_ = seats.check(places)

# %% [markdown]
# ## Gallery
#
# All of these are in the package, and tested.
#
# **Local value pruning** (SpAtten). Within a layer, read only the values of the most probable keys: $o_i = \sum_{j \in \text{top}} P_{ij} v_j$, not normalised again. Use it last: it costs least, and saves only the second half of attention.
#
# **Progressive quantisation** (SpAtten). $\max_j P_{ij} < \tau$ decides whether the low bits are fetched: a peaked softmax forgives errors of its scores. What it costs here, as the rise of the loss, and how often the low bits were fetched:

# %% tags=["nbval-check-output"]
for r in pick("bits"):
    fetched = f"low bits fetched for {r['refetch_share']:.0%} of the queries"
    print(
        f"{r['msb_bits']} high bits, threshold {r['threshold']}: {r['loss'] - base:+.3f}, {fetched}"
    )

# %% [markdown]
# **Balance loss** (GShard). $\ell = \frac1E \sum_e \frac{c_e}{S} m_e$ with the first choices $c_e$ and the mean gate $m_e$ of each expert: smallest when all are wanted alike. `route` returns it; add it to the training loss.
#
# **Random second choice** (GShard). The second expert is kept with a probability proportional to its gate, to save capacity. Use it in training: `route(..., draws=...)`.
#
# **Sparse weights on a chip.** `simulate_matmul` knows three ways to skip: none, two of four, and any zero with a bitmap. With four-bit weights the bitmap is a fifth of the bytes; sparsity must pay for it first.
#
# **Under torchrun.** `torchrun --nproc-per-node 2 -m effnb.hardware.codesign.expert_parallel` runs the same layer on real clusters.
#
# ## Which one?
#
# Few tokens at a time: fewer bytes, by bits first. Long prompts: fewer bits alone do not help, only faster arithmetic does, as with 2:4. Element-wise chains: fuse. A long cache on an ordinary GPU: quantise it or evict from it;
# choosing keys per query needs a chip, or a kernel that skips whole tiles. More experts than one machine holds: spread them, and make them wide.
#
# ## Further reading
#
# Williams, Waterman, Patterson, *Roofline*, Communications of the ACM 52(4), 2009. Wang, Zhang, Han, *SpAtten*, 2021, arXiv 2012.09852. Zhou et al., *Energon*, 2021, arXiv 2110.09310. Lepikhin et al., *GShard*, 2020, arXiv 2006.16668.
# Frantar et al., *MARLIN*, 2024, arXiv 2408.11743. Sun et al., *Retentive Network*, 2023, arXiv 2307.08621. Treviso et al., survey, 2023, arXiv 2209.00099.
