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
# # Pruning
#
# **Some of a language model's weights can become zero at little cost if they are chosen by what each layer computes. Zeros save bytes but, on ordinary hardware, hardly any time: for speed, remove whole heads, neurons or blocks.**
#
# After this chapter you can
#
# - say what a pruning method scores, and among which weights its scores compete;
# - work Wanda and the Optimal Brain Surgeon by hand on two weights, and read SparseGPT's code;
# - cut coupled structures out of a model, so that it really becomes smaller;
# - prune a model by movement while it learns;
# - count what zeros take to store, and tell when they save time.
#
# You need the tour (`00_start_here`), matrices and derivatives. Magnitude pruning, Wanda, SparseGPT, LLM-Pruner and movement pruning are taught in depth;
# a gallery near the end introduces the other methods.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/1_pruning")
# %% [markdown]
# ## The picture
#
# Pruning removes weights. On the left, single weights of `mini-5m`, a small language model, are set to zero; four methods choose them. On the right, a larger
# model, SmolLM2-135M, is timed with zeros in its matrices, and with smaller matrices or fewer blocks.

# %%
from effnb.chapters.inference.pruning import drawings, tables

methods, patterns, smollm2, speed = (
    tables.stored(part).data["table"] for part in ("methods", "patterns", "smollm2", "speed")
)
drawings.result(methods, speed)

# %% tags=["nbval-check-output"]
asked = [("magnitude", 0.1), ("magnitude", 0.8), ("SparseGPT", 0.8)]
print(tables.harm_said("mini-5m", methods, asked))
print(tables.speed_said(speed))

# %% [markdown]
# Losses are in **nats**: the negative natural logarithm of the probability that the model gave to the right token. Perplexity is $e^{\text{loss}}$, so a rise of 0.01 nats
# raises perplexity by one per cent.
#
# Two questions run through the chapter. *Which weights?* separates the curves. *What is a zero worth?* is answered by the bars.
#
# **Predict first:** each panel takes a guess before it answers. The first one sets equally many weights to zero, chosen in three ways. Its numbers were measured beforehand.

# %%
from effnb.chapters.inference.pruning import panels

panels.methods(smollm2, [*methods, *patterns])

# %% [markdown]
# Go from SmolLM2 to `mini-5m`: how much a model can spare differs from model to model. Then compare 50 % with 2:4, which also removes half, under a stricter rule.

# %% [markdown]
# ## The idea
#
# ### Who competes with whom
#
# In this chapter a *layer* is one linear layer, that is, one weight matrix; a *block* is a whole transformer block, attention and feed-forward network together. Every method gives each weight a **score** and
# removes the lowest ones. The part that is removed is the **sparsity**. Equally important is *among which weights* the scores compete: in a layer; in each row, which holds all inputs of one output;
# in the whole model; or in each group of four neighbouring inputs, of which two stay. The last is called **2:4**, and some GPUs multiply such matrices faster. Here are the same 8 × 16 scores, half of them removed in four ways:

# %%
import torch

toy = torch.randn(8, 16, generator=torch.Generator().manual_seed(3)).abs()
toy *= torch.linspace(0.4, 1.6, 8)[:, None]  # outputs differ in size
kinds = drawings.patterns(toy)
drawings.masks(toy, kinds)

# %% tags=["nbval-check-output"]
for name, mask in kinds.items():
    low = (mask & (toy < toy.median())).sum().item()
    print(
        f"{name:10} keeps {toy[mask].sum() / toy.sum():.1%} of the score, {low} low ones among it"
    )

# %% [markdown]
# ### What a weight is worth
#
# **Magnitude pruning** takes the score $|w|$. It needs no data, and it is blind to what the weight is multiplied by. **Wanda** (Sun et al., 2023) multiplies by the size of the input. It is measured by
# **calibration**: a few sequences of real text are run through the model.
# <a id="equation-1"></a>
#
# $$S_{ij} = |W_{ij}| \cdot \lVert X_j \rVert_2, \tag{1}$$
#
# where $X_j$ holds the values of input $j$ at all calibration tokens. Scores compete within each row. Here are one output and three inputs; the first weight is the largest, but its input is nearly always small:

# %% tags=["nbval-check-output"]
from effnb.inference import pruning

weight = torch.tensor([[0.9, 0.5, -0.4]])
norms = torch.tensor([0.1, 1.0, 1.0])  # the norm of each input over the calibration text
for name, score in (("magnitude", weight.abs()), ("Wanda", pruning.wanda_score(weight, norms))):
    gone = int(score.argmin())
    error = float(weight[0, gone] * norms[gone]) ** 2
    print(f"{name:9} scores {[round(x, 2) for x in score[0].tolist()]}", end=" ")
    print(f"and removes weight {gone + 1}; squared error of the output {error:.4f}")

# %% [markdown]
# If the inputs are not correlated, removing weight $j$ of row $i$ adds exactly $S_{ij}^2$ to the squared error of the output, summed over the tokens, and no other choice within the row is better.
#
# Wanda also survives **outliers**. Large language models have a few channels whose values are tens of times larger than the rest. Multiply a channel in the gain of a normalization by $\kappa$ and divide the columns that read it by $\kappa$: the model
# computes the same, but the columns are small now, and magnitude throws them away. In Wanda's score the two factors cancel.
#
# ### Let the other weights make up for it
#
# If inputs rise and fall together, another weight can take over. Let $\delta$ be the change of one row of $W$. Over $N$ inputs, the columns of $X$, the mean squared error of the output is
#
# $$\varepsilon(\delta) = \tfrac12\, \delta H \delta^\top, \qquad H = \tfrac{2}{N} X X^\top.$$
#
# $H$ is the **Hessian** of this error, the matrix of its second derivatives. It has one row and one column for each *input* of the layer, and $H_{12}$ is large when inputs 1 and 2 rise and fall together. It is not the
# Hessian of the model's loss. The **Optimal Brain Surgeon** (Hassibi and Stork, 1993) removes weight $q$, so that $\delta_q = -w_q$, and moves all others so that $\varepsilon$ is least. A Lagrange multiplier for
# this one condition gives the change and its price, with $e_q$ the unit vector of weight $q$:
#
# $$\delta = -\frac{w_q}{[H^{-1}]_{qq}}\, H^{-1} e_q, \qquad \varepsilon = \frac{w_q^2}{2\,[H^{-1}]_{qq}}.$$
#
# Two inputs that mostly agree, and two weights; the second one goes:

# %% tags=["nbval-check-output"]
H = 2 * torch.tensor([[1.0, 0.8], [0.8, 1.0]])
two = torch.tensor([0.6, 0.5])
inverse = torch.linalg.inv(H)
operated = two - two[1] / inverse[1, 1] * inverse[:, 1]
for name, left in (("just removed", torch.tensor([0.6, 0.0])), ("with surgery", operated)):
    d = left - two
    shown = [round(x, 2) + 0.0 for x in left.tolist()]
    print(f"{name}: weights {shown}, output error {d @ H @ d / 2:.2f}")
print(f"the price by the formula: {two[1] ** 2 / (2 * inverse[1, 1]):.2f}")

# %% [markdown]
# The first weight has taken over most of the second one's work. But the surgeon removes one weight at a time, and after each of them every row needs a new inverse. **SparseGPT** (Frantar and Alistarh, 2023) walks
# through the columns once, in one order for all rows, and leaves those it has passed as they are. Then one **Cholesky decomposition**, which writes a positive definite matrix as the product of a
# triangular matrix and its transpose, holds all the inverses that are needed: $U^\top U = (H + \lambda I)^{-1}$ with $U$ upper triangular. Row $i$ of $U$ serves step $i$ (the chapter on quantization derives
# this for GPTQ), and the **damping** $\lambda$ keeps the matrix invertible. A weight of column $i$ has the score $w_i^2 / U_{ii}^2$, and the error that its removal leaves is passed on to the later columns:
# <a id="equation-4"></a>
#
# $$e_i = \frac{w_i - \hat w_i}{U_{ii}}, \qquad W_{:,j} \leftarrow W_{:,j} - e_i\, U_{ij} \quad (j > i). \tag{4}$$
#
# The mask is chosen for 128 columns at a time, on weights that have moved already. If a weight that stays is rounded too, its error is passed on in the same way.
#
# ### Whole structures
#
# A matrix product multiplies zeros as fast as any other numbers. To gain speed, the matrices must become *smaller*, and parts of a network are tied together. A feed-forward network has an up projection, a gate and a down
# projection. Remove row $i$ of the up projection, and row $i$ of the gate and column $i$ of the down projection are useless: the one computes a value that is no longer used, the other reads one that is no longer computed.
# **LLM-Pruner** (Ma et al., 2023) finds such **coupled** groups first. An attention head is one as well; where several query heads share a key and value head, they go together. A group is as important as
# the loss it would cost to first order, with $g$ the gradient of the loss with respect to a weight:
#
# $$I = \sum_{\text{matrices}}\ \sum_{w \in \text{group}} |w\, g|.$$
#
# The groups of lowest importance are cut out, and a smaller, dense, ordinary model is left.
#
# ### Prune while it learns
#
# All these scores look at where a weight *is*. While a model is fine-tuned, look at where it *goes*. **Movement pruning** (Sanh et al., 2020) learns a score for each weight together with the weight, with the gradient
#
# $$\frac{\partial L}{\partial S} = \frac{\partial L}{\partial W'} \odot W, \qquad W' = W \odot M(S).$$
#
# The mask $M$ keeps the largest scores; it has no derivative, so the gradient is passed straight through it. A descent step raises $S$ where it pushes $W$ away from zero. So a large weight that shrinks goes, and a small one that grows stays.

# %% [markdown]
# ## The code
#
# Wanda's score is one line, [equation 1](#equation-1), and SparseGPT's walk is one loop. The loop keeps the weight transposed, so that a column lies together in memory:

# %%
from effnb.inference.pruning.sparsegpt import sparsegpt_columns
from effnb.lab import show

show(pruning.wanda_score, sparsegpt_columns)

# %% [markdown]
# Does it do what [equation 4](#equation-4) says? Whatever was removed, $\sum_i \lVert e_i \rVert^2$ must equal $\operatorname{tr}\bigl(\Delta W (H + \lambda I) \Delta W^\top\bigr)$, with $\Delta W$ the change of the weights. Here is a real layer of `mini-5m`:

# %% tags=["nbval-check-output"]
from effnb.chapters.inference.pruning import methods as live
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
model, calibration = bench.model, bench.calibration(seed=0)
few = calibration[:8]  # eight sequences, some of each corpus
name = "model.layers.2.self_attn.q_proj"
weight = model.get_submodule(name).weight.detach().double().cpu()
hessian = live.hessian_of(model, calibration, name)
damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
found = pruning.sparsegpt_weight(weight, hessian, 0.5)
delta = found.weight - weight
print(f"both sides agree: {abs(found.error / live.output_error(delta, damped) - 1) < 1e-6}")

# %% [markdown]
# How much of the output's energy does each method change? The surgeon is slow, so only 16 of the outputs are pruned. The fifth row keeps SparseGPT's mask and solves for the best weights:

# %% tags=["nbval-check-output"]
count = live.products(model)
print(f"multiplications for half of all weights: surgery {count['surgery'] / 1e9:.0f} billion,")
print(f"SparseGPT's walk {count['SparseGPT'] / 1e9:.1f} billion")
live.errors_table(live.layer_errors(weight[:16], hessian))

# %% [markdown]
# **Coupled groups** are found by trying: set one column of one matrix to zero, and see what else stops mattering.

# %% tags=["nbval-check-output"]
from effnb.lab import load

tiny = load("mini-300k", device="cpu")
ids = torch.randint(0, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
seed = pruning.Slice("model.layers.0.mlp.down_proj.weight", 1, (5,))
for name, dead in pruning.coupled(tiny.model, [seed], ids).items():
    across, down = (dead.all(dim).nonzero().flatten().tolist() for dim in (1, 0))
    print(f"{name:38} {'row' if across else 'column'} {across or down}")

# %% [markdown]
# Cutting must give what zeros in the same places give. Here LLM-Pruner removes half of all heads and neurons:

# %% tags=["nbval-check-output"]
cut = pruning.llm_pruner(model, few, 0.5)
zeroed = pruning.mask_structures(model, cut.scores, {"heads": 0.5, "neurons": 0.5}).model
text = bench.windows[:2]
with torch.inference_mode():
    apart = (cut.model(input_ids=text).logits - zeroed(input_ids=text).logits).abs().max()
print(f"the same outputs: {apart < 1e-2}")
for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
    was, now = (tuple(m.get_submodule(name).weight.shape) for m in (model, cut.model))
    print(f"{name}: {was} becomes {now}")

# %% [markdown]
# Its scores, and the forward pass of movement pruning, are a line each:

# %%
from effnb.inference.pruning.llm_pruner import weight_change

show(weight_change, pruning.MovementLinear.kept)

# %% [markdown]
# Movement, live: `mini-300k`, which knows English, begins to learn German package descriptions, and half of its weights go meanwhile; once by magnitude, little by little, and once by movement.

# %%
learned = live.learn(tiny, "model.layers.1.mlp.up_proj")
drawings.learned(learned)

# %% [markdown]
# ## Turn the knob
#
# When you run this page, you can now prune a language model while you wait, with any method of the chapter that needs no training. *Outlier strength* enlarges sixteen channels, as above, before the model is pruned. Structures come in whole pieces, so
# what really goes is rounded. Knobs that a method ignores are greyed.

# %%
from effnb.lab import guess, knob, quality_panel

quality_panel(
    live.subject(bench),
    live.panel_methods(few),
    title="Prune mini-5m",
    caption="Left: perplexity over size, zeros stored in the smallest form. Right: questions about package descriptions.",
    idle=live.IDLE,
    frames={"sparsity": [50, 70], "method": ["magnitude", "SparseGPT", "LLM-Pruner"]},
    predict=guess(
        "Seven of ten weights go, the smallest of each layer. What do 28 questions show of the answers?",
        ["better", "indistinguishable", "worse"],
        answer=lambda found: found.choice.outcome(lower_is_better=False),
    ),
    sparsity=knob([20, 30, 50, 70, 90], default=70, label="sparsity in %"),
    outliers=knob([0, 8], default=0, label="outlier strength"),
)

# %% [markdown]
# Things to try when you run this page:
#
# - at 70 %, compare magnitude with SparseGPT, and both with *random*: what is choosing worth?
# - at 50 %, pin magnitude, set the outliers to 8, and then take Wanda;
# - *SparseGPT, 4 bits* at 50 %: compare its bytes with what pruning alone saves;
# - *ShortGPT* at 20 % drops one of six blocks; *heads* at 30 % drops one of four groups in each block.

# %% [markdown]
# ## Does it hold?
#
# Three claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements; verdicts are computed from stored results, and a part without a stored run is *not tested*.

# %%
from effnb.chapters.inference.pruning import verdicts
from effnb.chapters.inference.quantization import verdicts as quantization
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(
    verdicts.s_i1(*measured),
    verdicts.c_1(*measured),
    verdicts.c_7(*measured, *quantization.stored()),
)

# %% [markdown]
# **Who is unstructured?** The article that makes claim C-1 files LoRAPrune under *unstructured* pruning, beside SparseGPT. Its own paper removes whole heads and neurons, and so does the code here:

# %% tags=["nbval-check-output"]
from effnb.core.training import TrainingSettings

one_shot = pruning.sparsegpt(model, few, 0.5)
short = TrainingSettings(steps=10, learning_rate=1e-3)
by_lora = pruning.lora_prune(tiny.model, live.german_batches(tiny), short, 0.5, every=2)
print(f"SparseGPT: {live.whole_share(one_shot):.1%} of what it removed are whole rows or columns")
print(f"LoRAPrune: {by_lora.removed:.0%} of all parameters are cut out; the matrices are smaller")

# %% [markdown]
# **Single weights**, on `mini-5m`:

# %% tags=["nbval-check-output"]
mini = [*methods, *patterns]
print(tables.methods_said("mini-5m", mini))
print(tables.rounded_said(patterns))
tables.methods_table("mini-5m", mini)

# %% [markdown]
# **Outliers.** Of the weights that read the enlarged channels, how many stay when half of all go? Then the loss:

# %% tags=["nbval-check-output"]
for method, (plain, changed, same) in live.outlier_masks(model, few).items():
    print(f"{method}: {plain:.1%} stay without outliers, {changed:.1%} with;", end=" ")
    print(f"the same masks: {same}")

# %% tags=["nbval-check-output"]
outliers = tables.stored("outliers").data["table"]
print(tables.outliers_said(outliers))
tables.outliers_table(outliers)

# %% [markdown]
# **Structures.** What to cut?

# %% tags=["nbval-check-output"]
structured = tables.stored("structured").data["table"]
print(tables.structures_said(structured))
tables.structures_table(structured)

# %% [markdown]
# **Healing.** A few steps of training win some of it back. After single weights were removed, all that is left is trained with the mask held; after structures, a LoRA (two thin matrices beside each weight) is trained
# and merged. LoRAPrune (Zhang et al., 2023) prunes *while* it trains one. Compare what comes back with what was lost:

# %% tags=["nbval-check-output"]
from effnb.chapters.inference.pruning import training

recovery, healing = (tables.stored(part).data["table"] for part in ("recovery", "healing"))
print(training.healing_said(recovery, healing))
training.healing_table(recovery, healing)

# %% [markdown]
# **Movement.** The same steps on German for all; the soft form keeps every score above a threshold, so its penalty $\lambda$ decides how much goes:

# %% tags=["nbval-check-output"]
german = tables.stored("training").data["table"]
print(training.training_said(german))
training.training_table(german)

# %% [markdown]
# **Tickets.** At pre-training, a *ticket* (Frankle and Carbin, 2018) is a small network found by training, pruning and *rewinding* the survivors to where they began, again and again. Compare tickets with controls of equally many weights, not with the whole:

# %% tags=["nbval-check-output"]
tickets = tables.stored("lottery").data["table"]
print(training.tickets_said(tickets))
training.tickets_table(tickets)

# %% [markdown]
# **Domains.** Does pruning hurt some texts more? Nats and per cent can rank them differently, because a kind of text with a higher loss has more to lose. Windows of one document are not independent; C-7 above judges whole documents.

# %% tags=["nbval-check-output"]
domains = tables.stored("domains").data["table"]
print(tables.domains_said(domains))
tables.domains_table(domains)

# %% [markdown]
# ## What it costs and saves
#
# **Bytes.** A removed weight still needs a place in the file, or the others must say where *they* are. Of $n$ numbers of $b$ bits, $k$ are kept:
#
# - a **bitmap** takes $n + k\,b$ bits, a flag for each number and the kept ones;
# - **CSR** (compressed sparse rows) takes $k\,(b + 16)$ bits if a column index has 16, and where each row starts;
# - **2:4** takes $\tfrac{n}{2}\,(b + 2)$ bits, two numbers of every four and their places in the group.

# %%
panels.storage()

# %% [markdown]
# Now give the numbers 4 bits: the flag weighs a quarter of a number, and the index four times as much as one.
#
# **Time.** A *kernel* is the routine that computes a product. The dense one multiplies zeros like other numbers; the sparse one skips them and pays for looking up where the others are:

# %%
live.product_times()

# %% [markdown]
# The whole model, measured here in turns. First with half of its weights zero, then as LLM-Pruner leaves it:

# %%
from effnb.lab import compare_costs

prompt = bench.windows[:1, :256]
compare_costs(model, one_shot, prompt, labels=("original", "SparseGPT, half zeros"))

# %%
compare_costs(model, cut.model, prompt, labels=("original", "LLM-Pruner, half"))

# %% [markdown]
# `mini-5m` is so small that much of its time is Python's own. The larger model below is better evidence.
#
# ## On a real model
#
# SmolLM2-135M has thirty blocks. Its weights come from a file in which they lie on a 4-bit grid already; that matters for rounding, and little for leaving weights out. These are all the settings of the first panel:

# %% tags=["nbval-check-output"]
print(tables.methods_said("SmolLM2-135M", smollm2))
tables.methods_table("SmolLM2-135M", smollm2)

# %% [markdown]
# Whole structures, and what a LoRA wins back:

# %% tags=["nbval-check-output"]
tables.real_table(smollm2)

# %% [markdown]
# Its speed, in the forms of the first picture and some more:

# %% tags=["nbval-check-output"]
tables.speed_table(speed)

# %% [markdown]
# One setting live:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(live.shorter_here(blocks=3))
else:
    print(tables.stored("smollm2"))

# %% [markdown]
# ## Where it breaks
#
# **Momentum remembers.** Fine-tune a pruned model with an ordinary optimizer, and the zeros are gone after one step. Setting their *gradients* to zero is not enough if the optimizer has seen them before. Eight weights learn with Adam; after twenty
# steps the four smallest are pruned:

# %% tags=["nbval-check-output"]
target = torch.tensor([0.1, -2.0, 0.2, 1.5, -0.1, 1.0, 0.3, -1.2])
w = torch.nn.Parameter(torch.zeros(8))
optimizer = torch.optim.Adam([w], lr=0.05)
keep = target.abs() > 0.5
for step in range(40):
    optimizer.zero_grad()
    (w - target).square().sum().backward()
    if step == 20:
        w.data *= keep
    if step >= 20:
        w.grad *= keep
    optimizer.step()
print(f"pruned weights that are not zero any more: {int((w[~keep] != 0).sum())} of 4")

half = pruning.magnitude(tiny.model, 0.5)
tuned = pruning.fine_tune(half, live.german_batches(tiny), TrainingSettings(steps=5)).model
before, after = pruning.masks_of(half), pruning.masks_of(tuned)
print("fine_tune keeps every zero:", all(torch.equal(after[n], before[n]) for n in before))

# %% [markdown]
# **Influence is not the loss.** ShortGPT drops the blocks that change the residual stream least, where the **residual stream** is the vector that every block reads and adds its result to. That is cheap to measure. The loss without each block is what counts:

# %% tags=["nbval-check-output"]
print(tables.depth_said(tables.stored("depth").data["table"]))

# %% [markdown]
# **One threshold can starve a layer.** Scores of different layers need not be on one scale. The same layer in other units:

# %% tags=["nbval-check-output"]
other = pruning.magnitude_scores(model)
other["model.layers.0.mlp.up_proj"] = other["model.layers.0.mlp.up_proj"] / 20
for name, given in (("as it is", pruning.magnitude_scores(model)), ("other units", other)):
    try:
        summary = pruning.summarize(pruning.choose_masks(given, 0.7, "global"))
        print(f"{name}: the sparsest layer loses {summary.layers[summary.sparsest]:.0%}")
    except ValueError as problem:
        print(f"{name}: {problem}")

# %% [markdown]
# **One too many.** Much code removes every score up to the one at place $ns$ of the sorted list. That is one weight too many and, with ties, many more:

# %% tags=["nbval-check-output"]
tied = torch.tensor([[0.1, 0.2, 0.2, 0.2, 0.2, 0.2, 0.9, 0.8]])
cutoff = tied.flatten().sort().values[int(8 * 0.25)]
exact = pruning.keep_mask(tied, 0.25)
print(f"of 8, 2 should go: the threshold removes {int((tied <= cutoff).sum())},", end=" ")
print(f"keep_mask {int((~exact).sum())}")

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
from effnb.inference.quantization import rtn

for attempt in (
    lambda: pruning.magnitude(model, 1.0),
    lambda: pruning.magnitude(model, 0.5, pattern="4:2"),
    lambda: pruning.magnitude(model, 0.3, pattern="2:4"),
    lambda: pruning.wanda(model, calibration[:0], 0.5),
    lambda: pruning.wanda(rtn(tiny.model, 4), calibration, 0.5),
    lambda: pruning.shortgpt(model, calibration, 6),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.pruning import exercises

for exercise in (exercises.storage, exercises.wanda, exercises.surgery, exercises.movement):
    print(exercise)

# %% [markdown]
# **1.** How many bytes does a bitmap take for `n` numbers of `bits` bits each, of which `kept` are kept?


# %% tags=["exercise", "nbval-check-output"]
def bitmap_bytes(n, kept, bits):
    """Bytes of flags and numbers."""
    raise NotImplementedError


_ = exercises.storage.check(bitmap_bytes)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# There are two parts: the flags, one for every number, and the numbers that are kept. A byte has eight bits.
#
# </details>


# %% tags=["solution"]
exercises.storage.solution()

# %% [markdown]
# **2.** Wanda's mask for a weight (out, in), from inputs (tokens, in): 1 keeps, 0 removes, and each row loses the part `sparsity`.


# %% tags=["exercise", "nbval-check-output"]
def wanda_of(weight, inputs, sparsity):
    """A mask of ones and zeros, in the weight's shape."""
    raise NotImplementedError


_ = exercises.wanda.check(wanda_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `inputs.norm(dim=0)` has one entry for each input. `score.argsort(1)` sorts every row, and `scatter` writes zeros at chosen places.
#
# </details>


# %% tags=["solution"]
exercises.wanda.solution()

# %% [markdown]
# **3.** Remove weight `q` of the row `w`, and move the others as the Optimal Brain Surgeon does. `H` is the layer's Hessian.


# %% tags=["exercise", "nbval-check-output"]
def operate(w, H, q):
    """The new row; its entry q is 0."""
    raise NotImplementedError


_ = exercises.surgery.check(operate)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The change is a multiple of column `q` of the inverse of `H`. Which multiple makes entry `q` of the row exactly 0?
#
# </details>


# %% tags=["solution"]
exercises.surgery.solution()

# %% [markdown]
# **4.** Movement's scores after some steps of plain gradient descent at the rate `rate`, from 0: `weights` and `gradients` are lists, one entry a step, with the gradients of the loss with respect to $W'$.


# %% tags=["exercise", "nbval-check-output"]
def scores_of(weights, gradients, rate):
    """One score for each weight."""
    raise NotImplementedError


_ = exercises.movement.check(scores_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What is the gradient with respect to $S$ at one step? Descent subtracts it, times the rate.
#
# </details>


# %% tags=["solution"]
exercises.movement.solution()

# %% [markdown]
# ## Gallery
#
# All of these are in the package; Taylor, OBD, heads, ShortGPT and width are in the panel too.
#
# **Taylor and SNIP** (Molchanov et al., 2019; Lee et al., 2018). $S = |w\,g|$: what the loss changes to first order when a weight goes. SNIP takes it at the random start, before any training. Use it where a backward pass is affordable, SNIP where even dense training is not.
#
# **OBD** (LeCun et al., 1990). $\tfrac12 H_{qq} w_q^2$ with the diagonal of the whole loss's curvature, and no surgery. Use it to compare layers of different kinds.
#
# **Gradual magnitude** (Zhu and Gupta, 2017). The sparsity follows a cubic, $s_t = s_f + (s_i - s_f)\bigl(1 - \tfrac{t - t_0}{t_1 - t_0}\bigr)^3$: much goes at first, little at last. Use it where you train anyway.
#
# **Soft movement** (Sanh et al., 2020). $M = [\sigma(S) > \tau]$, and a penalty $\lambda\,\sigma(S)$ on the scores, so that each layer finds its sparsity. Use it when $\lambda$ can be searched.
#
# **Heads** (Michel et al., 2019). A gate $\xi_h$ on each head, $I_h = \mathbb{E}_x \left| \partial L(x) / \partial \xi_h \right|$. Use it when heads alone may go: one backward pass scores them all.
#
# **LoRAPrune** (Zhang et al., 2023). Only a LoRA has gradients, so $\hat G = \partial B\, A + B\, \partial A - \partial B\, \partial A$ replaces the weight's own. Use it when the model fits into memory and its gradients do not.
#
# **ShortGPT and runs of blocks** (Men et al., 2024; Gromov et al., 2024). Drop the blocks of least influence, $1 - \mathbb{E}\cos(h_l, h_{l+1})$, or the run of neighbouring blocks that turns the residual stream least. Use it for the most speed with the least work, and heal afterwards.
#
# **Width** (Minitron; Muralidharan et al., 2024). Heads, neurons and channels of the residual stream by their mean activation. Use it when there is no room for gradients.
#
# **Sharing the sparsity.** The same share for every layer is a habit. One threshold over all scores decides for all of them; measured *sensitivity* prunes each layer alone and takes most from those that mind least:

# %% tags=["nbval-check-output"]
print(tables.allocation_said(tables.stored("allocation").data["table"]))

# %% [markdown]
# **Which one?** The tables above are the evidence, for these models. With a few sequences of text, compare Wanda with SparseGPT, and store a bitmap or 2:4. If you can train, compare movement with gradual magnitude. For speed, cut blocks, neurons or heads, and heal. Before you decide, compare with quantization,
# which saves bytes without leaving anything out.
#
# ## Further reading
#
# Han et al., *Learning both weights and connections*, 2015, arXiv 1506.02626. Zhu and Gupta, *To prune, or not to prune*, 2017, arXiv 1710.01878. Frankle and Carbin, *The lottery ticket hypothesis*, 2018, arXiv 1803.03635, and Frankle et al., 2019, arXiv 1912.05671.
# Lee et al., *SNIP*, 2018, arXiv 1810.02340. Molchanov et al., *Importance estimation* (Taylor), 2019, arXiv 1906.10771. Michel et al., *Are sixteen heads really better than one?*, 2019, arXiv 1905.10650. Sanh et al., *Movement pruning*, 2020, arXiv 2005.07683.
# Mishra et al., *Accelerating sparse deep neural networks* (2:4), 2021, arXiv 2104.08378. Frantar and Alistarh, *SparseGPT*, 2023, arXiv 2301.00774. Sun et al., *Wanda*, 2023, arXiv 2306.11695. Ma et al., *LLM-Pruner*, 2023, arXiv 2305.11627. Zhang et al., *LoRAPrune*, 2023, arXiv 2305.18403.
# Men et al., *ShortGPT*, 2024, arXiv 2403.03853. Gromov et al., *The unreasonable ineffectiveness of the deeper layers*, 2024, arXiv 2403.17887. Muralidharan et al., *Minitron*, 2024, arXiv 2407.14679.
