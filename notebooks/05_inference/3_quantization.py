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
# # Quantization
#
# **Rounding takes the weights of a model to four bits at little cost. To go lower, stop protecting the weights and protect what each layer computes.**
#
# After this chapter you can
#
# - say what a scale and a zero point do, and what a format really costs per weight;
# - derive GPTQ from two weights, and read its code;
# - move outliers to where they do no harm, with SmoothQuant and AWQ;
# - train through rounding with the straight-through estimator;
# - tell whether a quantized model is smaller, faster, or both.
#
# You need the tour (`00_start_here`), matrices and derivatives. Rounding to nearest, GPTQ, channel scaling and training through rounding
# are taught in depth; a gallery near the end introduces the other methods.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/3_quantization")

# %% [markdown]
# ## The picture
#
# Most of a language model's bytes are the weight matrices of its linear layers. Below they are stored in fewer and fewer bits, on the left
# for `mini-5m`, a small language model, and on the right for MiniLM, a sentence encoder used for search. Look at the left end of each picture.

# %%
from effnb.chapters.inference.quantization import drawings, tables

methods = tables.stored("methods").data["table"]
minilm = tables.stored("minilm").data
drawings.result(methods, minilm["table"])

# %% tags=["nbval-check-output"]
print(tables.cost_said("mini-5m", methods, [(4, "64"), (2, "64"), (2, "row")]))

# %% [markdown]
# Losses are in **nats**: the negative natural logarithm of the probability that the model gave to the right token. Perplexity is $e^{\text{loss}}$, so a rise of 0.01 nats
# raises perplexity by one per cent.
#
# Two choices separate the curves: which weights share a scale, and whether rounding protects the weights or the layer's output.

# %% [markdown]
# ## The idea
#
# ### A scale and a zero point
#
# A uniform grid of $b$ bits has a step $s$, the **scale**, and a code $z$ that represents 0, the **zero point**:
#
# $$q = \operatorname{clamp}\bigl(\operatorname{round}(w / s) + z,\ 0,\ 2^b - 1\bigr), \qquad \hat w = s\,(q - z).$$
#
# The *affine* grid stretches from the smallest weight to the largest. The *symmetric* grid ends at $\pm\max|w|$ and has $z = 0$; it gives
# up one code so that $w$ and $-w$ are rounded alike. Here are eight weights in four bits. One of them is large:

# %% tags=["nbval-check-output"]
import torch

from effnb.inference import quantization

w = torch.tensor([[0.11, -0.23, 0.31, -0.05, 0.18, -0.27, 0.09, 1.90]])
choices = {
    f"{'symmetric' if symmetric else 'affine'}, {quantization.group_size_label(group)}": (
        quantization.quantize(w, 4, group_size=group, symmetric=symmetric)
    )
    for group in ("row", 4)
    for symmetric in (True, False)
}
for name, small in choices.items():
    error = (small.dequantize() - w).square().mean().sqrt()
    print(f"{name:24} error {error:.3f}, codes {small.integers()[0].tolist()}")

# %%
drawings.grids(w[0].tolist(), choices)

# %% [markdown]
# With one scale for all eight, the large weight sets the step and the others share a handful of codes. With two groups of four, the damage stays in one
# group. That is the case for a fine **granularity**: a scale per row rather than per tensor, per group rather than per row. It has a price. A group of $g$ weights stores a 16-bit scale and a zero point of $b$ bits:
#
# $$\text{bits per weight} = b + \frac{16 + b}{g}.$$

# %% tags=["nbval-check-output"]
matrix = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
for group, width in (("row", 256), (128, 128), (64, 64), (32, 32)):
    held = quantization.quantize(matrix, 4, group_size=group)
    print(
        f"{quantization.group_size_label(group):13} by arithmetic {4 + 20 / width:.4f} bits,",
        end=" ",
    )
    print(f"as stored {held.bits_per_weight:.4f}")

# %% [markdown]
# ### What counts is the output
#
# Rounding to nearest keeps every weight close to where it was. But the next layer never sees the weights: it sees $W x$. Take one row of $W$ with two weights, and let $\delta$ be what rounding
# changes in it. Over $N$ inputs, the columns of $X$, the mean squared error of the output is
#
# $$\varepsilon(\delta) = \tfrac12\, \delta H \delta^\top, \qquad H = \tfrac{2}{N} X X^\top.$$
#
# $H$ is the **Hessian** of this error, the matrix of its second derivatives. It is symmetric, with one row and one column for each *input* of the layer; $H_{12}$ is large when inputs 1 and 2 rise and
# fall together. It is not the Hessian of the model's loss, and it does not depend on $W$. The inputs come from **calibration**: a few sequences of real text are run through the model.
#
# Now round the first weight. Its error $\delta_1 = \hat w_1 - w_1$ is fixed, but the second weight is still free. Setting $\partial \varepsilon / \partial \delta_2 = H_{21} \delta_1 + H_{22} \delta_2$ to
# zero gives its best move:
#
# $$\delta_2 = -\delta_1 \frac{H_{12}}{H_{22}}.$$
#
# Only then is the second weight rounded. With both weights at 0.6, the whole numbers as grid and two inputs that mostly agree:

# %% tags=["nbval-check-output"]
H = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
two = torch.tensor([0.6, 0.6])
first = two[0].round()
second = two[1] - (first - two[0]) * H[0, 1] / H[1, 1]
print(f"the second weight moves from {two[1]:.2f} to {second:.2f} before it is rounded")
for name, rounded in (("to nearest", two.round()), ("GPTQ", torch.stack([first, second.round()]))):
    d = rounded - two
    print(f"{name:10} {rounded.tolist()}  weights {d @ d:.2f}  output {d @ H @ d / 2:.3f}")

# %% [markdown]
# Rounding to nearest moves both weights *up*, and because the inputs agree, the two errors add. The second choice is worse for the weights and four times better for the output. This
# is **GPTQ** (Frantar et al., 2022), for two weights.
#
# **Many weights.** Let $r$ stand for all weights after the first. The same argument gives $\delta_r = -\delta_1 H_{1r} H_{rr}^{-1}$, but inverting $H_{rr}$ again for every column would take far too long. The
# inverse of the whole matrix already holds the answer. The first row of $H^{-1} H = I$ says $(H^{-1})_{1r} = -(H^{-1})_{11} H_{1r} H_{rr}^{-1}$, and so
#
# $$\delta_r = \delta_1 \frac{(H^{-1})_{1r}}{(H^{-1})_{11}}.$$
#
# With the first weight settled, the same problem remains for the others, with $H_{rr}$ in place of $H$. Its inverse is one step of Gaussian elimination away:
#
# $$(H_{rr})^{-1} = (H^{-1})_{rr} - \frac{(H^{-1})_{r1} (H^{-1})_{1r}}{(H^{-1})_{11}}.$$
#
# Repeating that step for every column is exactly what a **Cholesky decomposition** does. It writes a positive definite matrix as the product of a triangular matrix and its transpose, here
# $H^{-1} = U^\top U$ with $U$ upper triangular. The first row of $U$ is $(H^{-1})_{1:} / \sqrt{(H^{-1})_{11}}$; subtracting $U_{1:}^\top U_{1:}$ leaves $(H_{rr})^{-1}$, which yields the second row, and so on. Row $i$ of $U$ therefore
# holds all that step $i$ needs:
# <a id="equation-7"></a>
#
# $$e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad w_j \leftarrow w_j - e_i\, U_{ij} \quad (j > i), \qquad U^\top U = (H + \lambda I)^{-1}. \tag{7}$$
#
# The **damping** $\lambda$, one per cent of the mean diagonal, keeps the matrix invertible when some inputs always move together. All rows of $W$ see the same inputs, so they share one $U$. Step $i$ costs
# exactly $\tfrac12 e_i^2$, so the damage is known without measuring it. On the two weights, without damping:

# %% tags=["nbval-check-output"]
U = torch.linalg.cholesky(H.inverse()).mT  # upper triangular: U^T U is the inverse of H
e_1 = (two[0] - two[0].round()) / U[0, 0]
second = two[1] - e_1 * U[0, 1]
e_2 = (second - second.round()) / U[1, 1]
print(f"U = [[{U[0, 0]:.3f}, {U[0, 1]:.3f}], [{U[1, 0]:.3f}, {U[1, 1]:.3f}]]")
print(f"the second weight moves to {second:.2f}; the output's error is {(e_1**2 + e_2**2) / 2:.3f}")

# %% [markdown]
# ### Outliers: move the difficulty
#
# Large language models have a few hidden channels whose values are tens of times larger than the rest (Dettmers et al., 2022). When inputs are rounded too, one such channel sets the scale and the others lose their
# codes. A linear layer, however, does not notice if its inputs are divided by factors $s$ and its columns multiplied by them:
#
# $$W x = \bigl(W \operatorname{diag}(s)\bigr) \bigl(\operatorname{diag}(s)^{-1} x\bigr).$$
#
# The division costs nothing: it disappears into the gain of the normalization that feeds the layer. Two methods choose $s$ for two problems.
#
# - **SmoothQuant** (Xiao et al., 2022) rounds weights *and* inputs, and shares the difficulty between them: $s_j = \max|X_j|^\alpha / \max|W_{:j}|^{1-\alpha}$.
# - **AWQ** (Lin et al., 2023) rounds weights alone. A column that meets large inputs is scaled up, so that the grid is finer for it: $s_j = \operatorname{mean}|X_j|^\beta$, with $\beta$ found by trying.
#
# `mini-5m` has no such channels, so we inject some: in every normalization the gain of a few channels is multiplied by $\kappa$, and the columns that read them are divided by $\kappa$. The function stays the same.

# %% tags=["hide-input"]
import math

from effnb.chapters.inference.quantization import methods as live
from effnb.core.outliers import inject_outliers
from effnb.inference.quantization.activations import input_maxima
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
model, calibration = bench.model, bench.calibration(seed=0)

# %% tags=["nbval-check-output"]
from effnb.evaluation.quality import token_losses

few = inject_outliers(model, channels=[40, 170], factor=40.0)
text = bench.windows[:2]
with torch.inference_mode():
    change = (token_losses(few, text) - token_losses(model, text)).abs().max().item()
print(f"no token's loss changes by more than a thousandth of a nat: {change < 1e-3}")

# %%
query = "model.layers.0.self_attn.q_proj"
smoothed = quantization.smooth(few, calibration, alpha=0.5)
before, after = (input_maxima(m, calibration, [query])[query].cpu() for m in (few, smoothed))
drawings.smoothed(before, after)

# %% [markdown]
# ### A gradient for rounding
#
# A model can also *learn* to live on a grid. Rounding has the derivative 0 almost everywhere, so **quantization-aware training** (QAT) uses a substitute: it rounds going forward, and going backward it passes the gradient
# on unchanged inside the grid's range and stops it outside. This is the **straight-through estimator** (Bengio et al., 2013). **LSQ** (Esser et al., 2019) learns the step as well:
#
# $$\frac{\partial \hat x}{\partial s} = \begin{cases} \operatorname{round}(x/s) - x/s & \text{inside the range} \\ \text{the code at that end} & \text{beyond it.} \end{cases}$$

# %%
drawings.straight_through(bits=3, step=0.6)

# %% [markdown]
# Between rounding afterwards and training lies **quantization-aware fine-tuning** (QAF): the rounded weights stay frozen, and something small beside them is trained, such as a pair of thin matrices,
# $\hat W + B A$ (QLoRA; Dettmers et al., 2023), or the scales alone (PEQA; Kim et al., 2023).
#
# ### Bits where they are needed
#
# Some layers bear two bits and some do not. **Mixed precision** measures what it costs to store layer $i$ in $b$ bits, $\Omega_i(b)$, and spends a budget of bytes where it helps most:
#
# $$\min_{b}\ \sum_i \Omega_i(b_i) \quad \text{so that} \quad \sum_i \operatorname{bytes}_i(b_i) \le \text{budget}.$$
#
# $\Omega_i$ can be the rise of the loss when only layer $i$ is rounded, the error of its output, or its squared rounding error times the curvature of the loss (HAWQ).

# %% [markdown]
# ## The code
#
# GPTQ's walk through the columns is the loop that ran behind the blue curves. It handles the columns in blocks, and applies the effect of a block on all later columns in one product:

# %%
from effnb.lab import show

show(quantization.gptq_columns)

# %% [markdown]
# Does it do what [equation 7](#equation-7) says? With $\Delta W$ the difference from the original weight, $\sum_i \lVert e_i \rVert^2$ must equal $\operatorname{tr}\bigl(\Delta W (H + \lambda I) \Delta W^\top\bigr)$
# on any grid. A wrong update breaks that:

# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(1)
mix, noise = (torch.randn(n, 24, generator=draw, dtype=torch.float64) for n in (24, 512))
weight = torch.randn(8, 24, generator=draw, dtype=torch.float64)
hessian = 2 / 512 * (noise @ mix).T @ (noise @ mix)
damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
found = quantization.gptq_columns(
    weight, quantization.invert_hessian(hessian), quantization.Grid(3)
)
delta = found.tensor.dequantize(torch.float64) - weight
print(f"both sides agree: {abs(found.error / live.output_error(delta, damped) - 1) < 1e-6}")

# %% [markdown]
# On real layers: each matrix of `mini-5m` in three bits, with the inputs that it really gets. How far does GPTQ move the weights and the output, compared with rounding to nearest?

# %% tags=["nbval-check-output"]
seen = live.hessians(model, calibration)
ratios = live.error_ratios(model, seen, bits=3)
print("further away in the weights:", sum(r[1] > 1 for r in ratios), "of", len(ratios), "layers")
print("nearer in the output:       ", sum(r[2] < 1 for r in ratios), "of", len(ratios), "layers")

# %%
drawings.moved(ratios)

# %% [markdown]
# The other two ideas fit on a few lines each:

# %%
show(quantization.smooth_scales, quantization.quantize_ste)

# %% [markdown]
# ## Turn the knob
#
# **Predict first:** each panel takes a guess before it answers. The first one is about search. MiniLM is given the one-line summary of a package and has to find its description among 400; how well each setting does was
# measured beforehand.

# %%
from effnb.chapters.inference.quantization import panels

panels.retrieval(minilm)

# %% [markdown]
# When you run this page, the second panel rounds a language model while you wait. Knobs that a method ignores are greyed; *outlier strength* enlarges sixteen channels, as above, before the model is rounded.

# %%
from effnb.lab import guess, knob, quality_panel

quality_panel(
    live.subject(bench),
    live.panel_methods(calibration[:8]),
    title="Quantize mini-5m",
    caption="Left: perplexity over size. Right: questions about package descriptions.",
    idle=live.IDLE,
    frames={"bits": [2, 4], "method": ["RTN", "GPTQ"]},
    predict=guess(
        "Two bits, one scale per row, rounded to nearest: by what factor does perplexity grow?",
        answer=lambda found: round(math.exp(found.loss.difference), 2),
    ),
    bits=knob([2, 3, 4, 8], default=2),
    group=knob(list(live.GROUPS), label="one scale for"),
    outliers=knob([0, 30], default=0, label="outlier strength"),
)

# %% [markdown]
# Things to try when you run this page:
#
# - at two bits, go from one scale per row to groups of 64, or from RTN to GPTQ: which gains more?
# - at three bits, set the outliers to 30 and compare RTN, GPTQ and AWQ;
# - at four bits, compare RTN with *inputs too: plain*: inputs are harder to round than weights.

# %% [markdown]
# ## Does it hold?
#
# Three claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements; verdicts are computed from stored results.

# %%
from effnb.chapters.inference.quantization import verdicts
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(*(verdict(*measured) for verdict in (verdicts.s_i3, verdicts.c_3, verdicts.c_7)))

# %% [markdown]
# **GPTQ against rounding to nearest**, on `mini-5m` and on SmolLM2-135M. The latter's weights already lie on a 4-bit grid, so only its results below four bits say anything.

# %% tags=["nbval-check-output"]
smollm2 = tables.stored("smollm2").data["table"]
print(tables.methods_said("mini-5m", methods))
print(tables.methods_said("SmolLM2-135M", smollm2))
tables.methods_table("mini-5m", methods)

# %% [markdown]
# **Outliers.** One scale for a whole batch is the hardest case:

# %% tags=["nbval-check-output"]
outliers = tables.stored("outliers").data["table"]
print(tables.outliers_said(outliers))
tables.inputs_table(outliers)

# %% [markdown]
# (A rotation folds all gains into the weights first, which by itself undoes this injection.) With weights alone the injection shrinks the columns that read the large channels. RTN rounds them coarsely; AWQ finds the factors that undo it:

# %% tags=["nbval-check-output"]
tables.weights_table(outliers)

# %% [markdown]
# **Training.** Thirty short steps for everything that trains; two controls take the same steps on a model that was never rounded.

# %% tags=["nbval-check-output"]
trained, control = (tables.stored(part).data["table"] for part in ("training", "control"))
print(tables.training_said(trained, control))
tables.training_table(trained)

# %% [markdown]
# Thirty steps are few: a real training budget may order the methods differently.
#
# **Mixed precision.** The costs $\Omega_i$ are stored; the exact allocation takes a second:

# %% tags=["nbval-check-output"]
mixed = tables.stored("mixed").data
tables.allocation_table(mixed, model)

# %%
drawings.mixed(mixed["table"])

# %% tags=["nbval-check-output"]
print(tables.mixed_said(mixed))

# %% [markdown]
# The allocation adds up costs that were measured one layer at a time, and the last sentence shows how far that sum is off. Uniform bits leave no gap between two and three: smaller groups
# fill it.
#
# **Domains.** Does the same rounding hurt some texts more? Nats and per cent can rank them differently:

# %% tags=["nbval-check-output"]
domains = tables.stored("domains").data["table"]
print(tables.domains_said(domains))
tables.domains_table(domains)

# %% [markdown]
# Harm can be measured only where there was skill. The model never learned the three other languages; where it is confidently wrong, rounding can even lower the loss.

# %% [markdown]
# ## What it costs and saves
#
# `fast` packs the weights for PyTorch's own int4 kernel, the routine that multiplies by packed codes. Generating a token reads every weight once, so fewer bytes take less
# time, provided that the model is large enough for reading to be what takes the time. `mini-5m` is small; the real model below gains more.

# %%
from effnb.lab import compare_costs

quick = quantization.fast(model, bits=4)
compare_costs(model, quick, bench.windows[:1, :256], labels=("original", "int4, packed"))

# %% [markdown]
# ## On a real model
#
# **Search.** MiniLM has 22 million full-precision weights. These are all the settings of the first panel:

# %% tags=["nbval-check-output"]
print(tables.minilm_said(minilm["table"]))
tables.minilm_table(minilm["table"])

# %% [markdown]
# One setting live, on 100 other descriptions:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(live.search_with(bits=2, group_size="row"))
else:
    print(tables.stored("minilm"))

# %% [markdown]
# **A language model.** SmolLM2-135M comes from a file whose linear weights are already rounded to four bits in groups of 32. Rounding them to four bits again says nothing; three bits are the test.

# %% tags=["nbval-check-output"]
tables.methods_table("SmolLM2-135M", smollm2)

# %% [markdown]
# **Speed.** The output head is a fifth of SmolLM2's weights, and coarse rounding harms it most, so `fast` keeps it in eight bits by default. Each row is *one* model: what was timed is what was judged.

# %% tags=["nbval-check-output"]
speed = tables.stored("speed")
tables.speed_table(speed.data)

# %% tags=["real-model"]
if results.live():
    print(live.speed_here())
else:
    print(speed)

# %% [markdown]
# Decoding gains less than the bytes shrink: unpacking codes, attention, normalization and Python's own time stay.
#
# **Beside llama.cpp.** What stays is large: the modules around the kernels took as long as the kernels. `fast` therefore decodes by one list of products over a cache with room, and on x86 with AVX2 or AVX-512 and a compiler, by one function. The rival is llama.cpp, which reads 4-bit codes in groups of 32, each group with a step $s$ and a real minimum $m$, so that $\hat w = s\,q + m$. `quantize_minimum` makes the same grids: the file's weights, which lie on them already, are not rounded a second time. The codes are the same, and so should be the perplexity:

# %% tags=["nbval-check-output"]
decoding = tables.stored("decoding").data
print(tables.decoding_said(decoding))
tables.decoding_table(decoding)

# %% [markdown]
# ## Where it breaks
#
# **Alpha 0 is not off.** SmoothQuant with $\alpha = 0$ still divides, by the weights' maxima, and leaves the outlier in the inputs; with $\alpha = 1$ all of it moves into the weights. Off is $s = 1$:

# %%
panels.smoothing()

# %% [markdown]
# **Calibration on other text.** GPTQ protects only the directions that its calibration data has. Here is one layer, calibrated on its real inputs and on noise of the same size in each channel:

# %% tags=["nbval-check-output"]
name = "model.layers.3.mlp.down_proj"
weight, real = model.get_submodule(name).weight.detach(), seen[name]
nearest = live.output_error(
    quantization.quantize(weight, 2, group_size=64).dequantize() - weight, real
)
for label, hessian in (("real inputs", real), ("noise", torch.diag(real.diagonal()))):
    held = quantization.gptq_weight(weight, hessian, 2, group_size=64)
    ratio = live.output_error(held.dequantize() - weight, real) / nearest
    print(
        f"GPTQ calibrated on {label:11}: {ratio:.1f} times the output error of rounding to nearest"
    )

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
packed = quantization.rtn(model, 4)
for attempt in (
    lambda: quantization.rtn(model, 9),
    lambda: quantization.gptq(model, calibration[:0], 4),
    lambda: quantization.rtn(model, 4, layers="*.attention.*"),
    lambda: quantization.quantize(torch.full((4, 4), float("nan")), 4),
    lambda: quantization.awq(packed, calibration, 4),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.quantization import exercises

for exercise in (exercises.cost, exercises.smooth, exercises.straight_through, exercises.step):
    print(exercise)

# %% [markdown]
# **1.** How many bits does one weight cost, with scale and zero point? A scale has 16 bits, a zero point as many as a code; a symmetric grid has no zero point.


# %% tags=["exercise", "nbval-check-output"]
def bits_of(bits, group, symmetric):
    """Bits stored per weight in groups of `group`."""
    raise NotImplementedError


_ = exercises.cost.check(bits_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count the bits of one whole group, and divide by its weights.
#
# </details>


# %% tags=["solution"]
exercises.cost.solution()

# %% [markdown]
# **2.** SmoothQuant's scales, from inputs $X$ (tokens, in) and a weight $W$ (out, in).


# %% tags=["exercise", "nbval-check-output"]
def scales_of(x, w, alpha):
    """One scale per input channel."""
    raise NotImplementedError


_ = exercises.smooth.check(scales_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Both maxima run over dimension 0: over tokens for the inputs, over outputs for the weight.
#
# </details>


# %% tags=["solution"]
exercises.smooth.solution()

# %% [markdown]
# **3.** The straight-through estimator. The forward pass computed `scale * (x / scale).round().clamp(low, high)`; `upstream` is the gradient of the loss with respect to that result. Return the gradient for `x`.


# %% tags=["exercise", "nbval-check-output"]
def pass_back(x, scale, low, high, upstream):
    """The gradient that reaches x."""
    raise NotImplementedError


_ = exercises.straight_through.check(pass_back)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Which values of `x` could change a little without changing whether they are clamped?
#
# </details>


# %% tags=["solution"]
exercises.straight_through.solution()

# %% [markdown]
# **4.** Column `i` of $W$ has just become `rounded`. Return $W$ with the columns *after* it moved so as to make up for the error; leave all others, column `i` included, as they are.


# %% tags=["exercise", "nbval-check-output"]
def hand_on(w, u, i, rounded):
    """One step of GPTQ; u is the upper triangular factor of the inverse Hessian."""
    raise NotImplementedError


_ = exercises.step.check(hand_on)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The error of column `i` is one number per row. Divide it by the diagonal entry of $U$ in that place; each later column then loses its own entry of $U$'s row `i` times that number, which `Tensor.outer` does for all of them at once.
#
# </details>


# %% tags=["solution"]
exercises.step.solution()

# %% [markdown]
# ## Gallery
#
# All of these are in the package, and most are in the panel.
#
# **Clipping** (Nagel et al., 2021). A grid that ends before the largest weight gives the small ones a finer step. `clip="mse"` searches the best end for each row or group, $\min_\tau \lVert \hat W(\tau) - W \rVert^2$. Use it with RTN at few bits.
#
# **LLM.int8()** (Dettmers et al., 2022). Input channels that reach a threshold of 6 are multiplied in floating point, all others in int8 with one scale per token and per output: $Y = X_{:o} W_{:o}^\top + \hat X_{:r} \hat W_{:r}^\top$. Use it where int8 arithmetic is fast and outliers are few.
#
# **Rotation** (QuaRot; Ashkboos et al., 2024). Multiply the residual stream, the vector that every block reads and adds its result to, by an orthogonal Hadamard matrix $Q$: $W \leftarrow W Q$ where it is read, $Q^\top W$ where it is written. The function is the same and no channel sticks out. Use it to round *inputs* to few bits.
#
# **NF4** (QLoRA; Dettmers et al., 2023). Sixteen values at the quantiles of a normal distribution, scaled block by block; *double quantization* stores the scales in 8 bits. Use it to hold frozen weights while adapters train. An affine grid, which also pays for a zero point, comes nearer:

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
    print(f"{name:16} mean squared error {error:.4f}, {held.bits_per_weight:.3f} bits per weight")

# %% [markdown]
# **FP8 and FP4.** Small floating-point numbers, $\hat x = c\,(-1)^S\,2^{E - E_0}\,(1 + M/2^m)$ with the format's bias $E_0$: E4M3 and E5M2 in eight bits, E2M1 in four. Steps grow with the magnitude. Use them where the hardware multiplies them.
#
# **Ternary and binary** (BitNet b1.58: Ma et al., 2024; BinaryBERT: Bai et al., 2020). $\hat W = \gamma \operatorname{clip}(\operatorname{round}(W/\gamma), -1, 1)$ with $\gamma = \operatorname{mean}|W|$, or $\gamma \operatorname{sign}(W)$. Use them only for models trained this way; the panel shows why.
#
# **KIVI** (Liu et al., 2024) rounds the key-value cache, which grows with every token: keys in groups along *time*, because their outliers sit in fixed channels, and values in groups along *channels*. Use it for long texts:

# %% tags=["nbval-check-output"]
tables.cache_table(tables.stored("cache").data["table"])

# %% [markdown]
# **LLM-QAT** (Liu et al., 2023). QAT without data: the model writes its own text, and the student's probabilities $\hat p$ imitate the original's, $\min -\sum p \log \hat p$. Use it when the training text is not yours.
#
# **HAWQ** (Dong et al., 2019). $\Omega_i(b) = \overline{\operatorname{tr}}(\nabla_i^2 L)\, \lVert \hat W_i - W_i \rVert^2$: bits by the curvature of the loss. Use it when trying every layer takes too long.
#
# **Which one?** The tables above are the evidence, for these models: at eight bits rounding to nearest is enough; the fewer the bits and the coarser the scales, the more GPTQ matters; SmoothQuant and rotations matter where inputs are rounded and channels stand out. Measure on yours.
#
# ## Further reading
#
# Gholami et al., survey, 2021, arXiv 2103.13630. Nagel et al., white paper, 2021, arXiv 2106.08295. Frantar et al., *GPTQ*, 2022, arXiv 2210.17323. Lin et al., *AWQ*, 2023, arXiv 2306.00978.
# Xiao et al., *SmoothQuant*, 2022, arXiv 2211.10438. Dettmers et al., *LLM.int8()*, 2022, arXiv 2208.07339, and *QLoRA*, 2023, arXiv 2305.14314. Kim et al., *PEQA*, 2023, arXiv 2305.14152.
# Bengio et al., 2013, arXiv 1308.3432. Esser et al., *LSQ*, 2019, arXiv 1902.08153. Dong et al., *HAWQ*, 2019, arXiv 1905.03696. Liu et al., *KIVI*, 2024, arXiv 2402.02750, and *LLM-QAT*, 2023, arXiv 2305.17888.
# Ashkboos et al., *QuaRot*, 2024, arXiv 2404.00456. Ma et al., *BitNet b1.58*, 2024, arXiv 2402.17764. Bai et al., *BinaryBERT*, 2020, arXiv 2012.15701.
