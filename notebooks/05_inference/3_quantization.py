# ---
# jupyter:
#   effnb:
#     minutes: 60
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
# # Quantisation
#
# **A weight does not need 32 bits. Rounding takes a language model to four bits almost for free; to go lower, stop looking at
# the weights and look at what the layer computes.**
#
# After this chapter you can
#
# - say what a scale and a zero point do, and how many bits per weight a format really costs;
# - do GPTQ on two weights with a pencil, and read its code;
# - give three different answers to outliers (AWQ, SmoothQuant, LLM.int8()), and say which problem each solves;
# - choose between quantising after training, while fine-tuning, and in training;
# - make a model decode faster, not only smaller.
#
# You need the tour (`00_start_here`), matrices, and a derivative or two.

# %% tags=["run-time"]
from effnb.lab.chapters import run_time

run_time("05_inference/3_quantization")

# %% [markdown]
# ## The result first
#
# `mini-5m` again, and its perplexity on a novel it has never seen. Every point is a way of storing the weights of its
# linear layers. Follow one colour from right to left, and see where it leaves the dashed line.

# %% tags=["hide-input"]
import math

import torch

from effnb.lab import PALETTE, figure, results

stored = results.read("05_inference/3_quantization/methods")
rows = stored.data["table"]
original = rows[0]


def pick(method, group_size, bits):
    """The stored rows of one setting, one for each calibration seed."""
    return [
        r
        for r in rows
        if (r["method"], r["group_size"], r["bits"]) == (method, str(group_size), bits)
    ]


def mean_perplexity(method, group_size, bits):
    losses = [r["loss"] for r in pick(method, group_size, bits)]
    return math.exp(sum(losses) / len(losses))


CURVES = {
    "RTN per row": ("RTN", "row", PALETTE[1], "o--"),
    "GPTQ per row": ("GPTQ", "row", PALETTE[0], "o--"),
    "RTN, groups of 64": ("RTN", 64, PALETTE[1], "s-"),
    "GPTQ, groups of 64": ("GPTQ", 64, PALETTE[0], "s-"),
}


def draw_result(fig):
    axes = fig.subplots()
    for label, (method, group, colour, line) in CURVES.items():
        bits = [b for b in range(2, 9) if pick(method, group, b)]
        x = [pick(method, group, b)[0]["layer_bits"] for b in bits]
        axes.plot(
            x, [mean_perplexity(method, group, b) for b in bits], line, color=colour, label=label
        )
    axes.axhline(math.exp(original["loss"]), color="0.45", linestyle="--")
    axes.set_xlabel("bits stored per weight, scales and zero points counted")
    axes.set_ylabel("perplexity")
    axes.legend()


figure(
    draw_result,
    caption="Perplexity on a held-out novel over bits per weight. Orange: round to nearest (RTN). Blue: GPTQ, which "
    "makes up for the rounding of one weight with its neighbours.",
    alt=(
        f"Four falling curves. The original's perplexity is {math.exp(original['loss']):.1f}. At 3 bits per row: RTN "
        f"{mean_perplexity('RTN', 'row', 3):.1f}, GPTQ {mean_perplexity('GPTQ', 'row', 3):.1f}. At 2 bits in groups of 64: RTN "
        f"{mean_perplexity('RTN', 64, 2):.1f}, GPTQ {mean_perplexity('GPTQ', 64, 2):.1f}."
    ),
)

# %%
stored

# %% [markdown]
# Two things separate the curves: *who shares a scale* (rows, or groups of 64 weights), and *what is kept close*, the
# weights or the layer's output. The chapter takes them in this order.

# %% [markdown]
# ## A scale and a zero
#
# A uniform grid of $b$ bits has a step $s$, the **scale**, and a code $z$ that stands for 0, the **zero point**:
#
# $$q = \operatorname{clamp}\bigl(\operatorname{round}(w / s) + z,\ 0,\ 2^b - 1\bigr), \qquad \hat w = s\,(q - z).$$
#
# The *affine* grid stretches from the smallest to the largest weight. The *symmetric* grid ends at $\pm\max|w|$, has $z = 0$, and
# gives one code away so that $w$ and $-w$ fare alike. Eight weights, four bits, one of the weights large:

# %% tags=["nbval-check-output"]
from effnb.inference import quantization

w = torch.tensor([[0.11, -0.23, 0.31, -0.05, 0.18, -0.27, 0.09, 1.90]])
for group_size in ("row", 4):
    for symmetric in (True, False):
        small = quantization.quantize(w, 4, group_size=group_size, symmetric=symmetric)
        error = (small.dequantize() - w).square().mean().sqrt().item()
        kind = "symmetric" if symmetric else "affine"
        print(
            f"{quantization.group_size_label(group_size):11} {kind:9}  error {error:.3f}  codes {small.integers()[0].tolist()}"
        )

# %% [markdown]
# One scale for all eight lets the large weight set the step, and its neighbours share a handful of codes. Two groups of four
# confine the damage to one of them. That is the whole argument for small **granularity**: per tensor, per row, per group.
#
# It is not free. A group of $g$ weights stores a scale of 16 bits and a zero point of $b$ bits:
#
# $$\text{bits per weight} = b + \frac{16 + b}{g}.$$
#
# What the arithmetic says, and what the packed tensors hold:

# %% tags=["nbval-check-output"]
matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
for group_size in ("row", 128, 64, 32):
    width = 256 if group_size == "row" else group_size
    held = quantization.quantize(matrix, 4, group_size=group_size)
    print(
        f"{quantization.group_size_label(group_size):13} {4 + 20 / width:.4f} bits by arithmetic, {held.bits_per_weight:.4f} as stored"
    )

# %% [markdown]
# ### Give up the extremes?
#
# Nothing says that the grid must reach the largest weight. Cut the tails off, and the many small weights get a finer step.
# For numbers from a normal distribution the error has a closed form, and its lowest point is the best place to cut:

# %% tags=["hide-input"]
clips = torch.linspace(1.0, 4.5, 71).tolist()


def draw_clip(fig):
    axes = fig.subplots()
    for colour, bits in zip(PALETTE, (2, 3, 4, 6)):
        axes.plot(
            clips,
            [quantization.gaussian_error(c, bits) for c in clips],
            color=colour,
            label=f"{bits} bits",
        )
        best = quantization.gaussian_clip(bits)
        axes.plot(best, quantization.gaussian_error(best, bits), "o", color=colour)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("the grid ends at so many standard deviations")
    axes.set_ylabel("mean squared error")
    axes.legend()


figure(
    draw_clip,
    caption="Clipping too early cuts real weights off; too late wastes codes on weights that do not occur. The dots are the optima.",
    alt="Four U-shaped curves of error over the end of the grid. The optimum moves outwards with bits: "
    + ", ".join(f"{quantization.gaussian_clip(b):.2f} at {b} bits" for b in (2, 3, 4, 6))
    + ".",
)

# %% tags=["nbval-check-output"]
for bits in (2, 3, 4):
    print(f"{bits} bits: cut at {quantization.gaussian_clip(bits):.3f} standard deviations")

# %% [markdown]
# `clip="mse"` searches this optimum for each row or group of real weights, `clip="percentile"` cuts a fixed share off. Here is the
# search; the tour has shown the function that it feeds, `choose_grid`.

# %%
from effnb.lab import show

show(quantization.clipping.mse_range)

# %% [markdown]
# ## The weights, or what they compute?
#
# Rounding to nearest keeps each weight close. But nobody reads the weights. What the next layer sees is $W x$, and the error
# that counts is $\lVert \Delta W X \rVert^2$ on real inputs. The two are not the same, as two weights show.
#
# Both weights are 0.6, the grid is the whole numbers, and the two inputs rise and fall together: their
# second moments are $H = \bigl(\begin{smallmatrix} 1 & 0.8 \\ 0.8 & 1 \end{smallmatrix}\bigr)$. Rounding both to nearest moves both
# *up*, and since the inputs agree, the errors add up. **GPTQ** (Frantar et al., 2022) rounds the first weight, and then
# lets the second one make up for it, as far as it can: the best shift is $-e\,H_{12}/H_{22}$.

# %% tags=["nbval-check-output"]
H = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
two = torch.tensor([0.6, 0.6])
nearest = two.round()
first = two[0].round()
second = two[1] - (first - two[0]) * H[0, 1] / H[1, 1]  # moved so as to cancel the first error
compensated = torch.stack([first, second.round()])
for name, rounded in (("to nearest", nearest), ("GPTQ", compensated)):
    d = rounded - two
    print(f"{name:10} {rounded.tolist()}  weight error {d @ d:.2f}  output error {d @ H @ d:.3f}")

# %% [markdown]
# The second weight became 0 although 0.6 is nearer to 1. GPTQ is *worse* at keeping the weights and four times better at
# keeping the output.
#
# For a whole matrix, every row goes through its columns in one order, and column $i$ hands its error on to all columns behind it:
#
# $$e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad W_{:,j} \leftarrow W_{:,j} - e_i\, U_{ij}\quad (j > i),
#   \qquad U^\top U = (H + \lambda I)^{-1}.$$
#
# One Cholesky factor $U$ serves all rows and all steps. The damping $\lambda$ (1 % of the mean diagonal) keeps the inverse tame.
# This is the loop that ran behind the blue curves:

# %%
show(quantization.gptq_columns)

# %% [markdown]
# An exact check that it does what the equations say: with $\Delta W$ the difference to the original,
# $\sum_i \lVert e_i \rVert^2 = \operatorname{tr}(\Delta W H_d \Delta W^\top)$, whatever the grid. Any wrong update breaks it.

# %% tags=["nbval-check-output"]
g = torch.Generator().manual_seed(1)
X = torch.randn(512, 24, generator=g, dtype=torch.float64) @ torch.randn(
    24, 24, generator=g, dtype=torch.float64
)
weight = torch.randn(8, 24, generator=g, dtype=torch.float64)
hessian = 2 * X.T @ X / len(X)
damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
inverse = quantization.invert_hessian(hessian)
found = quantization.gptq_columns(weight, inverse, 3)
delta = weight - found.tensor.dequantize(torch.float64)
right = torch.trace(delta @ damped @ delta.T).item()
print(f"both sides agree: {abs(found.error / right - 1) < 1e-6}")

# %% [markdown]
# Now the same on a real layer: for each matrix of `mini-5m`, how far three bits move the weights, and how far the output.

# %% tags=["hide-input"]
import random

from effnb.core.calibration import Hessian, layerwise
from effnb.lab import corpora, load

bench = load("mini-5m")
model = bench.model


def sequences(name, split, count, length, seed=0):
    """Random pieces of one corpus, as token ids."""
    rng, pieces = random.Random(seed), []
    texts = [t for t in corpora.documents(name, split) if len(t) > 300]
    while len(pieces) < count:
        text = ""
        while len(text) < 8 * length:  # characters enough for the tokens
            one = rng.choice(texts)
            start = rng.randrange(max(1, len(one) - 8 * length))
            text += one[start : start + 8 * length] + "\n\n"
        ids = bench.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) >= length:
            pieces.append(torch.tensor(ids[:length]))
    return torch.stack(pieces).to(model.device)


calibration = torch.cat([sequences(name, "train", 6, 256) for name in corpora.NAMES])
hessians = {}


def observe(name, layer):
    hessians[name] = Hessian(layer.in_features, layer.weight.device)
    return hessians[name]


layerwise(model, calibration, observe, lambda name, layer, seen: None)
moved = []
for name, seen in hessians.items():
    W, h = model.get_submodule(name).weight.detach(), seen.value
    deltas = [
        method.dequantize() - W
        for method in (quantization.quantize(W, 3), quantization.gptq_weight(W, h, 3))
    ]
    weights = [d.square().sum().item() for d in deltas]
    outputs = [torch.trace(d @ h @ d.T).item() for d in deltas]
    moved.append((name, weights[1] / weights[0], outputs[1] / outputs[0]))


def draw_moved(fig):
    axes = fig.subplots()
    x = range(len(moved))
    axes.plot(x, [m[1] for m in moved], "o", color=PALETTE[1], label="weights")
    axes.plot(x, [m[2] for m in moved], "o", color=PALETTE[0], label="output")
    axes.axhline(1, color="0.45", linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xlabel("layers, from first to last block")
    axes.set_ylabel("GPTQ's squared error / RTN's")
    axes.legend()


figure(
    draw_moved,
    caption="Three bits, a scale for each row. Above the dashed line GPTQ is further away than rounding to nearest, below it nearer.",
    alt=(
        "For every layer the weights' error ratio lies above 1, on average "
        f"{sum(m[1] for m in moved) / len(moved):.2f}, and the output's below, on average {sum(m[2] for m in moved) / len(moved):.2f}."
    ),
)

# %% tags=["nbval-check-output"]
print("further in weights :", sum(m[1] > 1 for m in moved), "of", len(moved), "layers")
print("nearer in output   :", sum(m[2] < 1 for m in moved), "of", len(moved), "layers")

# %% [markdown]
# ## Outliers: three answers
#
# Large language models have a few hidden channels whose activations are tens of times larger than the rest. They break
# quantisers that share one scale. Small models do not have them, but we can **inject** them without changing the function: multiply
# a channel of every norm's gain by $\kappa$, and divide the columns that read it by $\kappa$.

# %%
from effnb.core.outliers import inject_outliers
from effnb.evaluation.quality import token_losses

few = inject_outliers(model, channels=[40, 170], factor=40.0)
probe = sequences("novels", "test", 4, 256)
with torch.inference_mode():
    change = (token_losses(few, probe) - token_losses(model, probe)).abs().max().item()
print(f"the largest change of any token's loss: {change:.1e} nats")

# %% [markdown]
# The function is the same, and the numbers inside are not. Three methods answer, each to its own problem:
#
# - **LLM.int8()** (Dettmers et al., 2022): *do not quantise them.* Input channels that reach a threshold (6) are
#   multiplied in floating point, all others in int8, with a scale for each token and for each output.
# - **SmoothQuant** (Xiao et al., 2022): *share the difficulty.* Divide input channel $j$ by
#   $s_j = \max|X_j|^\alpha / \max|W_{:j}|^{1-\alpha}$ and multiply column $j$ of the weight by it. The division disappears in the
#   norm before.
# - **AWQ** (Lin et al., 2023): for weights only. *Protect what matters.* Columns that meet large inputs are scaled up before
#   rounding, by $s_j = \operatorname{mean}|X_j|^\beta$ with the exponent $\beta$ searched by the error of the block's output.
#
# SmoothQuant in two pictures, on the inputs of the first block's query, key and value:

# %% tags=["hide-input"]
from effnb.inference.quantization.activations import input_maxima

first_query = "model.layers.0.self_attn.q_proj"
smoothed = quantization.smooth(few, calibration, alpha=0.5)
ranges = [input_maxima(m, calibration, [first_query])[first_query].cpu() for m in (few, smoothed)]


def draw_smooth(fig):
    panes = fig.subplots(1, 2, sharey=True)
    for axes, values, title in zip(panes, ranges, ("with outliers", "smoothed")):
        axes.bar(range(len(values)), values, width=1.0, color=PALETTE[0])
        axes.set_title(title)
        axes.set_xlabel("channel")
    panes[0].set_yscale("log")
    panes[0].yaxis.set_major_formatter("{x:g}")
    panes[0].yaxis.set_minor_formatter("")
    panes[0].set_ylabel("largest magnitude")


figure(
    draw_smooth,
    caption="The largest input of each channel before and after SmoothQuant. The model's function is the same in both.",
    alt=(
        f"Left, two channels stand out: {ranges[0].max():.0f} against a median of {ranges[0].median():.1f}. Right, the largest is "
        f"{ranges[1].max():.1f} and the median {ranges[1].median():.1f}."
    ),
)

# %%
show(quantization.smooth_scales, quantization.awq_scales)

# %% [markdown]
# What each answer is worth, from the stored sweep. First eight and six bits for weights *and* inputs, one scale for a token's inputs or for a whole batch's:

# %% tags=["nbval-check-output"]
table = results.read("05_inference/3_quantization/outliers").data["table"]


def cell(method, injected, bits, per=None):
    """Perplexity of one stored setting."""
    for r in table:
        if (r["method"], r["injected"], r["weights"], r.get("per")) == (
            method,
            injected,
            bits,
            per,
        ):
            return f"{math.exp(r['loss']):8.1f}"
    return "       –"


print("weights and inputs in           8 bits            6 bits")
print("                             none  injected    none  injected")
for method in ("plain", "SmoothQuant", "LLM.int8()", "rotation"):
    for per in ("tensor", "token"):
        line = [cell(method, i, b, per) for b in (8, 6) for i in ("none", "40 x on 2 channels")]
        if any("–" not in part for part in line):
            print(f"{method:12} per {per:7}", *line)

# %% [markdown]
# And weights alone, in groups of 64. RTN and GPTQ meet the shrunken columns; AWQ undoes the injection by itself:

# %% tags=["nbval-check-output"]
print("weights only         4 bits            3 bits")
print("                 none  injected    none  injected")
for method in ("RTN", "AWQ", "GPTQ"):
    line = [cell(method, i, b) for b in (4, 3) for i in ("none", "8 x on 16 channels")]
    print(f"{method:8}", *line)

# %% [markdown]
# Without outliers the answers have nothing to answer, and methods that share scales alike lie close together. That is one reason why papers on large models
# and experiments on small ones can disagree without either being wrong.

# %% [markdown]
# ## Train with the rounding in it
#
# At two bits even GPTQ loses. The model can still *learn* to live on the grid. Rounding has the derivative 0
# almost everywhere, so **quantisation-aware training** (QAT) lies a little: forward it rounds, backward it pretends to be the
# identity inside the range, and 0 outside. This is the **straight-through estimator** (Bengio et al., 2013). **LSQ** (Esser et al., 2019) also learns the step:
#
# $$\frac{\partial \hat x}{\partial s} = \begin{cases} \operatorname{round}(x/s) - x/s & \text{inside the range} \\ \text{the code of that end} & \text{beyond it} \end{cases}$$

# %% tags=["hide-input"]
x = torch.linspace(-3, 3, 601, requires_grad=True)
step = torch.tensor(0.6, requires_grad=True)
y = quantization.lsq_quantize(x, step, -4, 3)
(to_x,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
to_step = torch.stack([torch.autograd.grad(v, step, retain_graph=True)[0] for v in y[::6]])


def draw_ste(fig):
    panes = fig.subplots(1, 3)
    for axes, a, b, title in zip(
        panes,
        (x, x, x[::6]),
        (y, to_x, to_step),
        ("forward: rounded", "backward: to x", "backward: to the step"),
    ):
        axes.plot(a.detach(), b.detach(), color=PALETTE[0])
        axes.set_title(title)
        axes.set_xlabel("x")


figure(
    draw_ste,
    caption="Three bits with step 0.6. The gradient to x is made up; the gradient to the step says whether the grid should grow.",
    alt="Left, a staircase from -2.4 to 1.8. Middle, 1 inside that range and 0 outside. Right, a sawtooth between -0.5 and 0.5 inside, "
    "-4 below the range and 3 above it.",
)

# %%
show(quantization.quantize_ste)

# %% [markdown]
# Between the two lies **quantisation-aware fine-tuning** (QAF): the rounded weights stay frozen, and something small
# beside them is trained. In **QLoRA** (Dettmers et al., 2023) that is a pair of thin matrices, $\hat W + B A$ with a constant factor on the product, over weights stored in NF4; in
# **PEQA** (Kim et al., 2023) it is the scales alone, so that a task is a few kilobytes. All of them on the same 30 batches, three seeds each:

# %% tags=["nbval-check-output"]
trained = results.read("05_inference/3_quantization/training").data["table"]


def mean(method, bits, key):
    values = [r[key] for r in trained if r["method"] == method and r["bits"] == bits]
    return sum(values) / len(values)


def by_seed(method, bits, key="loss"):
    return [r[key] for r in trained if r["method"] == method and r["bits"] == bits]


print(f"original: perplexity {math.exp(trained[0]['loss']):.1f}")
print("                                 3 bits    2 bits   trained weights")
for method in ("RTN", "GPTQ", "PEQA on GPTQ", "LoRA on GPTQ", "QAT", "QAT, LSQ"):
    stage = next(r["stage"] for r in trained if r["method"] == method)
    three, two_bits = (math.exp(mean(method, b, "loss")) for b in (3, 2))
    print(
        f"{method:13} {stage:17} {three:8.1f}  {two_bits:8.1f}   {mean(method, 2, 'trainable'):12,.0f}"
    )

# %% [markdown]
# Perplexities of one decimal hide what happens at three bits. Here is what training changed, seed by seed, in thousandths of a nat, and two controls: the
# same steps on a model that nobody rounded.

# %% tags=["nbval-check-output"]
control = results.read("05_inference/3_quantization/control").data["table"]


def thousandths(after, before):
    """The change of the loss at each seed."""
    return "".join(f"{1000 * (a - b):7.1f}" for a, b in zip(after, before))


print("what training changed          3 bits               2 bits")
for method, start in (
    ("LoRA on GPTQ", "GPTQ"), ("PEQA on GPTQ", "GPTQ"), ("QAT", "RTN"), ("QAT, LSQ", "RTN")
):  # fmt: skip
    changes = (thousandths(by_seed(method, b), by_seed(start, b)) for b in (3, 2))
    print(f"{method + ' - ' + start:20}", *changes)
for method in ("LoRA", "all weights"):
    after = [r["loss"] for r in control if r["method"] == method]
    print(f"no rounding, {method:11}", thousandths(after, [control[0]["loss"]] * 3))
print("what there is to win back:")
for start in ("GPTQ", "RTN"):
    changes = (thousandths(by_seed(start, b), [trained[0]["loss"]] * 3) for b in (3, 2))
    print(f"{start + ' - original':20}", *changes)

# %% [markdown]
# At two bits training pays. What is trained *beside* GPTQ's weights improves on GPTQ at every seed, by a little. QAT starts from plain rounding, makes up a part of
# that larger loss, and does not catch up with GPTQ.
#
# At three bits nothing pays: LoRA and PEQA end a little behind the GPTQ that they began with, and QAT and LSQ behind plain rounding, at every seed. The lower lines show two reasons. There is little
# to win back, and GPTQ's loss changes more with its calibration text than with the training. And the steps cost something of their own: they
# raise the loss of a model that nobody rounded, by more than LoRA loses, and by more than half of what QAT loses. (LSQ also begins elsewhere: on a symmetric grid, with a step of its own.)
#
# Thirty short steps are few. Given the budget of a real training run the order may be another one. That is the claim below, and this is where it stands here.
#
# Live, on the smaller `mini-1m`, and to the extreme: every weight becomes −1, 0 or 1 times one number per matrix (BitNet b1.58). Rounding alone, then thirty steps of learning to bear it:

# %%
from effnb.core.training import TrainingSettings, train

small = load("mini-1m").model
student = quantization.prepare_qat(small, method="bitnet")
batches = [
    torch.cat([sequences(n, "train", 2, 128, seed=100 + i) for n in corpora.NAMES])
    for i in range(30)
]
settings = TrainingSettings(steps=30, learning_rate=1e-3, warmup_steps=4, schedule="cosine", seed=0)
with torch.inference_mode():
    whole, rounded = (token_losses(m, probe).mean().item() for m in (small, student))
result = train(student, batches.__getitem__, settings)
ternary = quantization.convert(student)
with torch.inference_mode():
    learned = token_losses(ternary, probe).mean().item()
print(
    f"original {whole:.2f} nats per token, rounded to three values {rounded:.2f}, after {result.seconds:.0f} s of training {learned:.2f}"
)

# %% [markdown]
# ## Turn the knob
#
# All methods, one panel. **Predict first:** with outliers at 0, at which bits does the method begin to matter? And with outliers at 30,
# which methods will not notice?
#
# *Clipping* applies to RTN and GPTQ (AWQ searches its own). Formats with a fixed number of bits (NF4, FP4, FP8, ternary, binary) ignore *bits*, and those whose scales
# belong to rows or tokens ignore *group*; the text says what was used.

# %% tags=["hide-input"]
from functools import cache

from effnb.evaluation import perplexity, ranked_choice, stored_bytes
from effnb.lab import knob, panel

GROUPS = {"row": "row", "128": 128, "64": 64, "32": 32}
sample = torch.tensor(
    bench.tokenizer.encode(
        "\n\n".join(corpora.documents("novels", "test")[:3]),
        add_special_tokens=False,
        verbose=False,
    )[:2045]
)
questions = corpora.choice_items(40, context_characters=120, choice_characters=40)
PROMPT = "Anne was"


def table_format(name, block):
    """RTN into a table of numbers instead of an even grid."""
    return lambda m, bits, group, clip: quantization.quantize_linears(
        m, lambda weight: quantization.quantize_table(weight, name, block_size=block)
    )


METHODS = {
    "RTN": lambda m, bits, group, clip: quantization.rtn(m, bits, group_size=group, clip=clip),
    "GPTQ": lambda m, bits, group, clip: quantization.gptq(
        m, calibration, bits, group_size=group, clip=clip
    ),
    "AWQ": lambda m, bits, group, clip: quantization.awq(
        m, calibration[::4], bits, group_size=group, grid=10
    ),
    "rotate, then RTN": lambda m, bits, group, clip: quantization.rtn(
        quantization.rotate(m), bits, group_size=group, clip=clip
    ),
    "inputs too: plain": lambda m, bits, group, clip: quantization.quantize_activations(
        m, bits, bits
    ),
    "inputs too: SmoothQuant": lambda m, bits, group, clip: quantization.smoothquant(
        m, calibration, weight_bits=bits, activation_bits=bits
    ),
    "inputs too: LLM.int8()": lambda m, bits, group, clip: quantization.llm_int8(m),
    "NF4": table_format("nf4", 64),
    "FP4": table_format("e2m1", 64),
    "FP8": table_format("e4m3", 64),
    "ternary": lambda m, bits, group, clip: quantization.quantize_linears(
        m, quantization.ternarize
    ),
    "binary": lambda m, bits, group, clip: quantization.quantize_linears(m, quantization.binarize),
}
FIXED = {"inputs too: LLM.int8()": 8, "NF4": 4, "FP4": 4, "FP8": 8, "ternary": 1.6, "binary": 1}
UNGROUPED = {name for name in METHODS if name.startswith("inputs")} | set(FIXED)


@cache
def injected(strength):
    return inject_outliers(model, range(0, 256, 16), float(strength)) if strength else model


def look(m):
    """Quality and a few words of one model."""
    prompt = bench.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).to(m.device)
    words = m.generate(
        **prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    return {
        "perplexity": perplexity(m, sample).perplexity,
        "choice": ranked_choice(m, bench.tokenizer, questions),
        "text": bench.tokenizer.decode(words[0], skip_special_tokens=True).replace("\n", " "),
    }


with torch.inference_mode():
    plain = look(model) | {"bytes": stored_bytes(model)}


def compute(bits, group, method, clip, outliers):
    packed = METHODS[method](injected(outliers), bits, GROUPS[group], clip)
    weights_only = not method.startswith("inputs")
    found = look(quantization.dequantized(packed) if weights_only else packed)
    return found | {
        "bits": FIXED.get(method, bits),
        "group": "own" if method in UNGROUPED else group,
        "method": method,
        "bytes": stored_bytes(packed),
    }


def draw(result, fig):
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    for _, (method, group, _, line) in CURVES.items():
        bits = [b for b in range(2, 9) if pick(method, group, b)]
        x = [pick(method, group, b)[0]["bytes"] / 2**20 for b in bits]
        relative = [mean_perplexity(method, group, b) / math.exp(original["loss"]) for b in bits]
        left.plot(x, relative, line, color="0.75", markersize=3)
    left.axhline(1, color="0.45", linestyle="--")
    left.plot(
        result["bytes"] / 2**20,
        result["perplexity"] / plain["perplexity"],
        "o",
        color=PALETTE[1],
        markersize=9,
    )
    left.set_yscale("log")
    left.set_xlabel("MiB stored")
    left.set_title("perplexity, times the original's")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    for y, (a, b) in enumerate(((plain["choice"], PALETTE[2]), (result["choice"], PALETTE[1]))):
        right.barh(y, a.accuracy, xerr=a.standard_error, color=b, height=0.5)
    right.axvline(0.25, color="0.45", linestyle="--")
    right.set_xlim(0, 1)
    right.set_yticks([0, 1], ["original", "quantised"])
    right.set_title("right answers")


def text(result):
    now, was = result["choice"], plain["choice"]
    return "\n".join(
        [
            f"Method: {result['method']}",
            f"Bits and group: {result['bits']}, {result['group']}",
            f"Perplexity: {result['perplexity']:.4g}",
            f"Original's: {plain['perplexity']:.4g}",
            f"Right answers: {now.accuracy:.0%} ± {now.standard_error:.0%}",
            f"Original's right answers: {was.accuracy:.0%}",
            f"Stored: {result['bytes'] / 2**20:.2f} MiB",
            f"Original's size: {plain['bytes'] / 2**20:.2f} MiB",
            f"The original writes: {plain['text']} …",
            f"Quantised, it writes: {result['text']} …",
        ]
    )


# %%
panel(
    compute,
    draw,
    text=text,
    title="Quantise mini-5m",
    caption="Left: your setting among the stored curves (RTN and GPTQ, per row and in groups of 64). Right: questions about unseen packages; guessing reaches the dashed line.",
    bits=knob(2, 8, default=3),
    group=knob(list(GROUPS), default="64", label="a scale for each"),
    method=knob(list(METHODS), default="RTN"),
    clip=knob(["minmax", "mse", "percentile"], default="minmax", label="clipping"),
    outliers=knob([0, 8, 30], default=0, label="outlier strength"),
)

# %% [markdown]
# Things to try. At 2 bits and a scale for each *row*, go from RTN to GPTQ. Set the outliers to 30 and compare *RTN*, *AWQ* and *rotate, then RTN*: a rotation spreads
# what one channel had over all of them. And *inputs too: plain* at 4 bits shows that inputs are harder to quantise than weights.

# %% [markdown]
# ## Bits where they are needed
#
# Some layers bear two bits and some do not. **Mixed precision** measures each layer's sensitivity, then spends a byte budget where it helps most:
#
# $$\min_{b}\ \sum_i \Omega_i(b_i) \quad \text{so that} \quad \sum_i \operatorname{bytes}_i(b_i) \le \text{budget}.$$
#
# $\Omega_i(b)$ can be the rise of the loss when only layer $i$ is rounded, the error of its output, or its curvature (HAWQ: mean Hessian trace times
# squared rounding error). The sensitivities took minutes and are stored; the exact allocation is a second's work:

# %% tags=["nbval-check-output"]
mixed = results.read("05_inference/3_quantization/mixed").data
sensitivity = {n: {int(b): c for b, c in by.items()} for n, by in mixed["sensitivity"].items()}
sizes = quantization.layer_bytes(model, mixed["choices"], group_size=mixed["group_size"])
budget = sum(size[3] for size in sizes.values())
bits = quantization.allocate(sensitivity, sizes, budget)
print(f"bits of each layer under {budget / 2**10:.0f} KiB, block by block")
for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
    print(f"{kind:10}", *(b for name, b in bits.items() if name.endswith(kind)))

# %% tags=["hide-input"]
LABELS = {
    ("uniform", "uniform"): ("same bits for all", "0.4", "o"),
    ("loss", "exact"): ("by the rise of the loss", PALETTE[0], "o"),
    ("output", "exact"): ("by the output's error", PALETTE[1], "s"),
    ("hessian", "exact"): ("by curvature (HAWQ)", PALETTE[2], "^"),
}


def draw_mixed(fig):
    axes = fig.subplots()
    for key, (label, colour, marker) in LABELS.items():
        found = sorted(
            (r["layer_bits"], math.exp(r["loss"]))
            for r in mixed["table"]
            if (r["by"], r["method"]) == key
        )
        axes.plot(*zip(*found), f"{marker}-", color=colour, label=label)
    axes.set_xlabel("bits stored per weight")
    axes.set_ylabel("perplexity")
    axes.legend()


figure(
    draw_mixed,
    caption="Two to four bits per layer in groups of 64, rounded to nearest, under several budgets.",
    alt="Perplexity over stored bits per weight: "
    + "; ".join(
        f"{r['by']} {r['method']} {r['layer_bits']:.2f} bits {math.exp(r['loss']):.1f}"
        for r in mixed["table"]
    )
    + ".",
)

# %% tags=["nbval-check-output"]
for name, added in mixed["additivity"].items():
    print(f"{name}: the layers' costs add up to {added['predicted']:.4f} nats")
    print(f"{' ' * len(name)}  together they cost      {added['together']:.4f}")

# %% [markdown]
# The allocation trusts a sum. At two bits everywhere the layers cost clearly more together than that sum says: costs only roughly add up. At the bytes of uniform three bits there is hardly anything
# left to measure: both numbers are negative, which is noise of the calibration text, since rounding does not improve a model.
#
# At those bytes none of the three measures beats the same bits for all. Between two bits and three mixed precision has its use, as uniform bits offer nothing there. At every budget
# of the figure curvature gave the lowest loss of the three.

# %% [markdown]
# ## Does it hold?
#
# Three rows of the claims ledger belong to this chapter. The verdicts are computed from stored measurements: windows of the held-out novel
# are compared pair by pair, training runs seed by seed, and domains, whose windows have nothing to do with each other, without pairs.

# %% tags=["hide-input"]
from effnb.chapters.inference.pruning import verdicts as pruning_verdicts
from effnb.chapters.inference.quantization.verdicts import c_3, c_7, s_i3, stored
from effnb.lab import claims_table

speed = results.read("05_inference/3_quantization/speed")
domains = results.read("05_inference/3_quantization/domains").data["table"]
measured = stored()


def harm(setting, domain):
    """What a setting costs in one domain: the rise of the loss in each window, in per cent."""
    pairs = zip(domains[setting][domain], domains["original"][domain])
    return [100 * (a / b - 1) for a, b in pairs]


claims_table(s_i3(*measured), c_3(*measured), c_7(*pruning_verdicts.stored(), *measured))

# %% [markdown]
# Three readings. *GPTQ* helps in proportion to what rounding to nearest loses: much at two bits, little at four in groups of 64, nothing that these windows could show at three. *Cost*: quantising
# after training takes seconds and training half a minute, but the two that train cost about the same time; LoRA's, with the GPTQ that it needs first, is even the longer one. What sets them apart is the memory of the optimiser.
# *Quality*: at two bits the order that the claim expects breaks between fine-tuning and training; at three nothing is decided.
#
# Which domain loses most? The rise of the loss, in per cent of the original's ("/64" means groups of 64, "/row" one scale per row). The translations are texts in
# languages that the model never learned. Below it the original's loss, and the entropy of the predictions: how flat they are.

# %% tags=["nbval-check-output"]
entropy = results.read("05_inference/3_quantization/domains").data["entropy"]
SHORT = {", groups of 64": " /64", ", per row": " /row", " bits": ""}


def shortened(name):
    for long, short in SHORT.items():
        name = name.replace(long, short)
    return name


print("rise of loss ", *(f"{d.replace('packages in ', ''):>9}" for d in domains["original"]))
for name in domains:
    if name != "original":
        rises = (sum(harm(name, d)) / len(harm(name, d)) for d in domains[name])
        print(f"{shortened(name):13}", *(f"{rise:8.1f}%" for rise in rises))
means = (sum(losses) / len(losses) for losses in domains["original"].values())
print(
    "loss, nats   ",
    *(f"{m:9.2f}" for m in means),
    f"  (guessing: {math.log(model.config.vocab_size):.2f})",
)
print("entropy, nats")
for name in entropy:
    if "4 bits" not in name:
        print(f"{shortened(name):13}", *(f"{e:9.2f}" for e in entropy[name].values()))

# %% [markdown]
# Who loses most depends on the setting: rounding to nearest hurts the Bible most at three bits per row, and package descriptions at two bits. With GPTQ the three lie closer together.
#
# In Japanese rounding to nearest even *lowers* the loss. There the model is confident and wrong: it loses more than by guessing all tokens alike. Perhaps rounding only flattens such predictions: in all four of the
# lower rows the loss falls where their entropy rises. GPTQ is the exception that fits: it makes them sharper, and the loss rises. Either way, harm can only be measured where there was skill.

# %% [markdown]
# ## What it costs and saves
#
# `fast` packs the weights, the output head too, into the layout that PyTorch's own int4 kernel reads, and the product is computed
# from the packed codes. Decoding reads every weight once for every token, so fewer bytes are less time, once a model is large enough that reading
# weights is what takes the time. `mini-5m` is small: expect less of it than of the real model below. (The head shares the embedding's weights in the original and gets packed ones of its
# own: hence more parameters in fewer bytes.)

# %%
from effnb.evaluation import measure
from effnb.lab import cost_card

prompt = sample[None, :256].to(model.device)
quick = quantization.fast(model, bits=4, group_size=32)
cost_card(
    measure(model, prompt, decode_tokens=8, runs=3),
    measure(quick, prompt, decode_tokens=8, runs=3),
    labels=("original", "int4, packed"),
)

# %% [markdown]
# The key-value cache is memory too, and grows with every token. **KIVI** (Liu et al., 2024) stores keys in groups along *time* (per channel: their outliers
# sit in fixed channels) and values in groups along *channels* (per token). Two bits of code, with half-precision scales and minima in groups of 32, are three bits. The latest 32 tokens or so are kept as they are,
# and counted at 16 bits, like the ordinary cache that the packed one is compared with:

# %% tags=["nbval-check-output"]
print("                                             KiB of 8 texts of 511 tokens  bits per")
print("keys: outliers      bits grouped by perplexity  packed  latest     all       number")
for r in results.read("05_inference/3_quantization/cache").data["table"]:
    if r["bits"] in (2, 16) and (r["keys"] == "channel" or r["bits"] == 2):
        parts = "".join(f"{r[k] / 2**10:8.0f}" for k in ("packed_bytes", "latest_bytes", "bytes"))
        print(
            f"{r['injected']:19} {r['bits']:4} {r['keys']:10} {math.exp(r['loss']):10.2f} {parts} {8 * r['bytes'] / r['numbers']:12.1f}"
        )

# %% [markdown]
# With those latest tokens the three bits are 3.8 here; the longer the text, the less they weigh. Without outliers it does not matter how keys are grouped. With two large channels of keys
# groups along channels ruin the cache, and groups along time do not notice.

# %% [markdown]
# ## On a real model
#
# `minilm-l6` is a sentence encoder with full-precision weights: 22 million of them. The task is to find a package's long description
# from its one-line synopsis among 400. The curve is stored; the setting below it is computed when you run the page.

# %% tags=["hide-input"]
minilm = results.read("05_inference/3_quantization/minilm").data["table"]


def draw_minilm(fig):
    axes = fig.subplots()
    for method, colour in (("RTN", PALETTE[1]), ("GPTQ", PALETTE[0])):
        for group, line in (("row", "o--"), ("64", "s-")):
            found = [r for r in minilm if r["method"] == method and r["group_size"] == group]
            axes.plot(
                [r["bits"] for r in found],
                [r["recall_at_1"] for r in found],
                line,
                color=colour,
                label=f"{method}, {'per row' if group == 'row' else 'groups of 64'}",
            )
    axes.axhline(minilm[0]["recall_at_1"], color="0.45", linestyle="--")
    axes.set_xlabel("bits")
    axes.set_ylabel("right description found first")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend()


figure(
    draw_minilm,
    caption="Retrieval with a rounded MiniLM. The dashed line is the original.",
    alt="Recall over bits: "
    + ", ".join(
        f"{r['method']} {r['group_size']} {r['bits']} bits {r['recall_at_1']:.0%}" for r in minilm
    )
    + ".",
)

# %% tags=["nbval-check-output"]
error = minilm[0]["standard_error"]
print(f"original {minilm[0]['recall_at_1']:.1%}, standard error {error:.1%}")
print("bits                   8      7      6      5      4      3      2")
for group, label in (("row", "per row"), ("64", "groups of 64")):
    for method in ("RTN", "GPTQ"):
        found = {
            r["bits"]: r["recall_at_1"]
            for r in minilm
            if (r["method"], r["group_size"]) == (method, group)
        }
        print(f"{method:4} {label:12}", *(f"{found[b]:6.1%}" for b in range(8, 1, -1)))

# %% [markdown]
# Down to five bits nothing is lost that these questions could show. At four and three bits in groups of 64 the two methods lie within one standard error of each other, and at two GPTQ is
# far ahead, above all where a whole row shares a scale.

# %% tags=["real-model"]
from dataclasses import replace

if results.live():
    from effnb.evaluation import retrieval

    encoder = load("minilm-l6")
    chosen = [p for p in corpora.packages("test") if len(p.text) > 300][:150]
    four_bits = replace(
        encoder, model=quantization.dequantized(quantization.rtn(encoder.model, 4, group_size=64))
    )
    for name, one in (("original", encoder), ("4 bits", four_bits)):
        vectors = (
            one.encode([p.synopsis for p in chosen]),
            one.encode([p.text[:600] for p in chosen]),
        )
        print(name, f"{retrieval(*vectors).recall_at_1:.0%}")
else:
    print(results.read("05_inference/3_quantization/minilm"))

# %% [markdown]
# `smollm2-135m` is a language model of 135 million weights. A warning: the file it comes from has its linear weights on a 4-bit grid
# already (Q4_1, groups of 32), so what follows says nothing about *whether* four bits harm: groups of 64 round a second time what was rounded in groups
# of 32, and lose by that. Three bits are the test here, and speed.

# %% tags=["nbval-check-output"]
smollm2 = results.read("05_inference/3_quantization/smollm2").data["table"]
for r in smollm2:
    group = (
        ""
        if r["group_size"] == "none"
        else f"{r['bits']} bits, {'per row' if r['group_size'] == 'row' else 'groups of 64'}"
    )
    print(
        f"{r['method']:9} {group:22} perplexity {math.exp(r['loss']):9.1f}   {r['bytes'] / 2**20:4.0f} MiB"
    )

# %% [markdown]
# One setting live, three bits in groups of 64 rounded to nearest, on the first two of the stored windows:

# %% tags=["real-model"]
if results.live():
    real = load("smollm2-135m", device="cpu")
    three_bits = quantization.dequantized(quantization.rtn(real.model, 3, group_size=64))
    ids = []
    for chapter in corpora.novels("test"):
        if chapter.work == "Persuasion" and len(ids) < 1024:
            ids += real.tokenizer.encode(chapter.text, add_special_tokens=False, verbose=False)
            ids.append(real.tokenizer.eos_token_id)
    pieces = torch.tensor(ids[:1024]).view(2, 512)
    for label, one, at in (
        ("original", real.model, smollm2[0]),
        (
            "3 bits",
            three_bits,
            next(
                r for r in smollm2 if (r["method"], r["bits"], r["group_size"]) == ("RTN", 3, "64")
            ),
        ),
    ):
        with torch.inference_mode():
            loss = token_losses(one, pieces).mean().item()
        print(
            f"{label:9} perplexity {math.exp(loss):6.1f} here, {math.exp(sum(at['windows'][:2]) / 2):6.1f} stored"
        )
else:
    print(results.read("05_inference/3_quantization/smollm2"))

# %% [markdown]
# And speed. Decoding one token reads every weight once. Not the embedding, of which it reads one row; but in float32 the output head *is* the embedding, and is read as a whole:

# %% tags=["nbval-check-output"]
held = speed.data["bytes"]
grouped = next(r for r in smollm2 if r["bits"] == 4)
in_blocks = (smollm2[0]["bytes"] - grouped["bytes"]) / (4 - grouped["layer_bits"] / 8)
table_of_words = smollm2[0]["bytes"] - 4 * in_blocks  # the embedding; norms are next to nothing
print("            stored   read per token      fewer bytes   tokens per second")
for name, times in speed.data["times_float32"].items():
    read = held[name] - (0 if name == "float32" else table_of_words)
    print(
        f"{name:8} {held[name] / 2**20:6.0f} MiB {read / 2**20:12.0f} MiB {held['float32'] / read:13.1f} × {times:16.2f} ×"
    )

# %%
speed

# %% [markdown]
# If reading weights were all the work, int8 would be four times as fast and int4 seven times. What is missing is the work that does not shrink with the bytes: unpacking codes, attention,
# norms, and Python's own time for thirty blocks. The output head counts: its 28 million weights are a fifth of the model, and it is packed too. (The embedding stays as it was, and makes up
# most of the bytes that are left.)

# %% tags=["real-model"]
if results.live():
    from effnb.evaluation import decode_tokens_per_second

    start = real.tokenizer("Efficient language models", return_tensors="pt").input_ids
    rates = [
        decode_tokens_per_second(m, start, tokens=16)
        for m in (real.model, quantization.fast(real.model, 4))
    ]
    print(f"on this machine: int4 decodes {rates[1] / rates[0]:.2f} times as fast")
else:
    print("run this page to time it on your machine")

# %% [markdown]
# ## Where it breaks
#
# **Alpha 0 is not off.** SmoothQuant with $\alpha = 0$ still divides by something: the weights' maxima. It moves *their* range into the inputs and leaves the
# inputs' outliers where they are; $\alpha = 1$ moves all of the outliers into the weights. Off is $s = 1$. The use is in the middle:

# %% tags=["nbval-check-output"]
g = torch.Generator().manual_seed(0)
inputs = torch.randn(512, 256, generator=g)
inputs[:, 3] *= 60
W = torch.randn(256, 256, generator=g) / 16
exact = inputs @ W.T


def output_error(x, weight):
    """Relative error of an 8-bit product, inputs by token and weights by row."""
    codes, scales = quantization.activations.activation_codes(x)
    found = quantization.quantized_matmul(
        codes, scales, quantization.quantize(weight, 8, symmetric=True)
    )
    return ((found - exact).norm() / exact.norm()).item()


print(f"no smoothing  {output_error(inputs, W):.4f}")
for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
    s = quantization.smooth_scales(inputs.abs().amax(0), [W], alpha)
    print(f"alpha {alpha:4}    {output_error(inputs / s, W * s):.4f}")

# %% [markdown]
# **Calibration that is not your text.** GPTQ only protects directions that its calibration data has. Here the same layer is
# calibrated with its real inputs, and with noise of the same size per channel:

# %% tags=["nbval-check-output"]
name = "model.layers.3.mlp.down_proj"
W, h = model.get_submodule(name).weight.detach().cpu(), hessians[name].value.cpu()
noise = torch.diag(h.diagonal())  # inputs that do not go together: nothing to make up with
base = quantization.quantize(W, 2, group_size=64).dequantize() - W
for label, seen in (("real inputs", h), ("noise", noise)):
    d = quantization.gptq_weight(W, seen, 2, group_size=64).dequantize() - W
    share = torch.trace(d @ h @ d.T) / torch.trace(base @ h @ base.T)
    print(f"GPTQ calibrated on {label:13}: {share:.1f} times RTN's output error")

# %% [markdown]
# **Bad input** gets one sentence, before any work starts:

# %% tags=["nbval-check-output"]
packed = quantization.rtn(model, 4)
broken = torch.full((4, 4), float("nan"))
for attempt in (
    lambda: quantization.rtn(model, 9),
    lambda: quantization.gptq(model, calibration[:0], 4),
    lambda: quantization.gptq(model, calibration.repeat(1, 3), 4),
    lambda: quantization.rtn(model, 4, include="*.attention.*"),
    lambda: quantization.quantize(broken, 4),
    lambda: quantization.awq(packed, calibration, 4),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %% tags=["hide-input"]
from effnb.lab import Exercise

cost = Exercise(
    "What a format costs",
    minutes=5,
    difficulty="easy",
    reference=lambda bits, group, symmetric: bits + (16 + (0 if symmetric else bits)) / group,
    cases=[(4, 64, False), (3, 32, False), (2, 16, True), (8, 128, True)],
    wrong={
        "The scale is missing: each group stores 16 bits besides its codes": lambda b, g, s: float(
            b
        ),
        "Every group shares one scale of 16 bits; divide it by the group's size": lambda b, g, s: (
            b + 16.0
        ),
        "A symmetric grid has no zero point to store": lambda b, g, s: b + (16 + b) / g,
        "An affine grid stores a zero point of b bits for each group as well": lambda b, g, s: (
            b + 16 / g
        ),
    },
)
smooth = Exercise(
    "SmoothQuant's scales",
    minutes=10,
    difficulty="medium",
    reference=lambda x, w, alpha: x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha),
    cases=[
        (
            torch.tensor([[1.0, -9.0, 0.5], [2.0, 4.0, -0.25], [-1.5, 3.0, 1.0]]),
            torch.tensor([[0.5, 1.0, -2.0], [0.25, -0.125, 1.0]]),
            0.5,
        ),
        (torch.tensor([[3.0, -1.0], [-6.0, 0.5]]), torch.tensor([[0.2, -0.8], [-0.4, 0.1]]), 0.75),
    ],
    wrong={
        "These are the maxima of each token; a scale belongs to an input channel, so the tokens have to go": lambda x, w, a: (
            x.abs().amax(1) ** a / w.abs().amax(0) ** (1 - a)
        ),
        "Take the magnitudes before the maximum: the largest may be negative": lambda x, w, a: (
            x.amax(0).clamp(min=1e-5) ** a / w.amax(0).clamp(min=1e-5) ** (1 - a)
        ),
        "The exponents are exchanged: the inputs get alpha, the weights 1 - alpha": lambda x, w, a: (
            x.abs().amax(0) ** (1 - a) / w.abs().amax(0) ** a
        ),
        "The weights divide: a channel with large weights can take less": lambda x, w, a: (
            x.abs().amax(0) ** a * w.abs().amax(0) ** (1 - a)
        ),
    },
    atol=1e-4,
)
update = Exercise(
    "One column of GPTQ",
    minutes=15,
    difficulty="hard",
    reference=lambda W, U, i, rounded: torch.cat(
        [W[:, : i + 1], W[:, i + 1 :] - ((W[:, i] - rounded) / U[i, i]).outer(U[i, i + 1 :])], 1
    ),
    cases=[
        (
            torch.tensor([[0.4, 0.7, -0.2], [1.3, -0.6, 0.9]]),
            torch.tensor([[2.0, -0.8, 0.3], [0.0, 1.5, -0.4], [0.0, 0.0, 1.2]]),
            0,
            torch.tensor([0.0, 1.0]),
        ),
        (
            torch.tensor([[0.4, 0.7, -0.2], [1.3, -0.6, 0.9]]),
            torch.tensor([[2.0, -0.8, 0.3], [0.0, 1.5, -0.4], [0.0, 0.0, 1.2]]),
            1,
            torch.tensor([1.0, -1.0]),
        ),
    ],
    wrong={
        "Divide the error by U[i, i]: the diagonal says how much the others can make up": lambda W, U, i, r: (
            torch.cat([W[:, : i + 1], W[:, i + 1 :] - (W[:, i] - r).outer(U[i, i + 1 :])], 1)
        ),
        "The sign of the error is w - rounded, and the update is subtracted": lambda W, U, i, r: (
            torch.cat(
                [W[:, : i + 1], W[:, i + 1 :] + ((W[:, i] - r) / U[i, i]).outer(U[i, i + 1 :])], 1
            )
        ),
        "Columns up to i are settled; only those behind it may change": lambda W, U, i, r: (
            W - ((W[:, i] - r) / U[i, i]).outer(U[i])
        ),
    },
    atol=1e-5,
)
for exercise in (cost, smooth, update):
    print(exercise)


# %% [markdown]
# **1.** How many bits does one weight cost, scale and zero point counted? A scale has 16 bits, a zero point as many as a code; a symmetric grid has none.


# %% tags=["exercise", "nbval-check-output"]
def bits_of(bits, group, symmetric):
    """Bits stored per weight in groups of `group`."""
    raise NotImplementedError


_ = cost.check(bits_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count the bits of one whole group, and divide by its weights.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def bits_of(bits, group, symmetric):
    """Codes, plus the group's scale and zero point shared by its weights."""
    return bits + (16 + (0 if symmetric else bits)) / group


_ = cost.check(bits_of)

# %% [markdown]
# **2.** The scales of SmoothQuant, from inputs $X$ (tokens, in) and a weight $W$ (out, in).


# %% tags=["exercise", "nbval-check-output"]
def scales_of(x, w, alpha):
    """One scale per input channel."""
    raise NotImplementedError


_ = smooth.check(scales_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Both maxima run over dimension 0: over tokens for the inputs, over outputs for the weight.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def scales_of(x, w, alpha):
    """Large inputs raise the scale, large weights lower it."""
    return x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)


_ = smooth.check(scales_of)

# %% [markdown]
# **3.** Column `i` of $W$ has just become `rounded`. Return $W$ with the columns *behind* it moved so as to make up for the error; leave the others, column `i` included, as they are.


# %% tags=["exercise", "nbval-check-output"]
def hand_on(W, U, i, rounded):
    """One step of GPTQ; U is the upper triangular factor of the inverse Hessian."""
    raise NotImplementedError


_ = update.check(hand_on)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `e = (W[:, i] - rounded) / U[i, i]` has one entry per row. `e.outer(U[i, i + 1:])` has the shape of the columns behind.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def hand_on(W, U, i, rounded):
    """The error, scaled by the diagonal, times the row of U behind it."""
    W = W.clone()
    W[:, i + 1 :] -= ((W[:, i] - rounded) / U[i, i]).outer(U[i, i + 1 :])
    return W


_ = update.check(hand_on)

# %% [markdown]
# ## Gallery
#
# All of these are in the package, tested against a reference, and most are in the panel.
#
# **NF4** (QLoRA; Dettmers et al., 2023). Sixteen values at the quantiles of a normal distribution, with an exact 0, scaled block by block. *Double quantisation* stores the
# blocks' scales in 8 bits. Use it to hold frozen weights while adapters train. It is not the best four-bit format for normal weights, though: an even affine grid of the same group size, which pays for a zero point, comes nearer:

# %% tags=["nbval-check-output"]
normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
for name, held in (
    ("int4, symmetric", quantization.quantize(normal, 4, group_size=64, symmetric=True)),
    ("int4, affine", quantization.quantize(normal, 4, group_size=64)),
    ("NF4", quantization.quantize_table(normal, "nf4", block_size=64)),
    ("NF4, double", quantization.quantize_table(normal, "nf4", block_size=64, double=True)),
    ("FP4 (E2M1)", quantization.quantize_table(normal, "e2m1", block_size=64)),
    ("ternary", quantization.ternarize(normal)),
    ("binary", quantization.binarize(normal)),
):
    error = (held.dequantize() - normal).square().mean().item()
    print(f"{name:16} mean squared error {error:.4f} at {held.bits_per_weight:.3f} bits per weight")

# %% [markdown]
# **FP8 and FP4.** Small floating-point numbers: E4M3 and E5M2 in eight bits, E2M1 in four. Steps grow with the magnitude, $\hat x = c\,(-1)^S\,2^{E - E_0}\,(1 + M/2^m)$, where $E_0$ is the format's bias. Use FP8 where the hardware multiplies it.
#
# **Ternary and binary** (BitNet b1.58: Ma et al., 2024; BinaryBERT: Bai et al., 2020). $\hat W = \gamma \operatorname{clip}(\operatorname{round}(W/\gamma), -1, 1)$ with $\gamma = \operatorname{mean}|W|$, or $\gamma \operatorname{sign}(W)$. Only for models trained this way: try them in the panel.
#
# **Rotation** (QuaRot: Ashkboos et al., 2024). Multiply the residual stream by an orthogonal Hadamard matrix, $W \leftarrow W Q$, and undo it where it is written. The function is the same, and no channel stands out any more. Use it to quantise *inputs* to four bits.
#
# **Percentile clipping.** End the grid where nearly all of the weights end, such as all but one in a thousand. Quick, but the share is a guess; `clip="mse"` tries many ends and keeps the best.
#
# **LLM-QAT** (Liu et al., 2023). QAT without data: the model writes its own text, and the student imitates its probabilities. Use it when the training text is not yours.
#
# **HAWQ** (Dong et al., 2019 and later). Bits by curvature: a layer's cost is the mean trace of its Hessian times its squared rounding error. It is `hessian_sensitivity`, the third curve of the figure on mixed precision.
#
# ## Which one?
#
# Eight bits: round to nearest. Four bits: groups of 64 or 128, GPTQ or AWQ if you have a few sequences of text. Three bits: the same; GPTQ is worth most where a whole row shares a scale, and a short
# training gained nothing here. Two bits: GPTQ, and then train something small beside it, a LoRA or the scales. Inputs as well: SmoothQuant at eight bits, rotation below.
# The stored tables of this chapter are the evidence, for small models; measure on yours.
#
# ## Further reading
#
# Gholami et al., survey, 2021, arXiv 2103.13630. Nagel et al., white paper, 2021, arXiv 2106.08295. Frantar et al., *GPTQ*, 2022, arXiv 2210.17323. Lin et al., *AWQ*, 2023, arXiv 2306.00978.
# Xiao et al., *SmoothQuant*, 2022, arXiv 2211.10438. Dettmers et al., *LLM.int8()*, 2022, arXiv 2208.07339, and *QLoRA*, 2023, arXiv 2305.14314. Kim et al., *PEQA*, 2023, arXiv 2305.14152.
# Bengio et al., 2013, arXiv 1308.3432. Esser et al., *LSQ*, 2019, arXiv 1902.08153. Liu et al., *KIVI*, 2024, arXiv 2402.02750, and *LLM-QAT*, 2023, arXiv 2305.17888. Ashkboos et al., *QuaRot*, 2024, arXiv 2404.00456. Ma et al., *BitNet b1.58*, 2024, arXiv 2402.17764.
