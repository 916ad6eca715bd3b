# ---
# jupyter:
#   effnb:
#     minutes: 50
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
# # Sharing
#
# **A model that uses one set of weights for many layers is smaller, not faster. A model that reads its input into a few latent vectors is faster on long inputs, not smaller. To know what you buy, count parameters and multiplications separately.**
#
# After this chapter you can
#
# - let the layers of a model share weights, all of them or part, and factorize its embedding;
# - compute both counts by hand, and say which of the two a method changes;
# - give every position of a text as many steps as it needs;
# - decide at what length latents begin to pay, and say what they may lose;
# - save, load and compress a model whose weights are used in several places.
#
# You need the tour (`00_start_here`), and to know what attention and a feed-forward layer are. Shared layers, factorized embeddings, adaptive computation time and the Perceiver are taught in depth. A gallery near the end adds sentence-order prediction, repeated readings and Perceiver IO.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/3_sharing")

# %% [markdown]
# ## The picture
#
# The same small language model was built in several ways and trained on the same tokens. In one of them all six layers use the same weights. The left plot shows the loss against the number of **parameters**, the numbers that a file has to hold. The right one shows it against the **multiply-adds** of one token: how often two numbers are multiplied and the product added.

# %%
from effnb.chapters.design.sharing import drawings, tables

trained = tables.claimed("shared").data["table"]
drawings.result(trained)

# %% [markdown]
# Sharing moves a model to the left in the first plot and leaves it where it is in the second. The model called *one layer alone* has exactly as many parameters as *all shared*, and a sixth of its layers to compute: a model that shares for the sake of a small file has to be better than this one. After a training as short as ours that is not a matter of course; the verdict further down says what is certain.
#
# **Predict first:** the panel takes your guess before it answers. Then find the setting with the fewest parameters, and watch the second bar.

# %%
from effnb.chapters.design.sharing import panels

panels.counting()

# %% [markdown]
# ## The idea
#
# ### One set of weights for many layers
#
# A stack of $N$ layers computes $x_i = f(x_{i-1};\, W_i)$, each with its own weights $W_i$. **Cross-layer parameter sharing** divides the layers into $g$ groups and lets layer $i$ use the weights of group
#
# $$g_i = \lfloor i\, g / N \rfloor, \qquad i = 0, \dots, N - 1.$$
#
# ALBERT (Lan et al., 2020) does this for everything in a layer with $g = 1$. It can also be done for attention alone, or for the feed-forward layers alone. The number of parameters falls to those of $g$ layers. The number of multiplications does not fall: weights that are used $N$ times are multiplied $N$ times.
#
# What does training do with a weight that is used in $N$ places? The loss depends on it through each of them, so its gradient is the sum of what the places would get if they had copies:
#
# $$\frac{\partial \mathcal L}{\partial W} = \sum_{i=1}^{N} \frac{\partial \mathcal L}{\partial W_i}\bigg|_{W_i = W}.$$
#
# By hand, with numbers instead of matrices: two layers $x_1 = w_1 x_0$ and $x_2 = w_2 x_1$, the input $x_0 = 3$ and both weights 2. Then $x_2 = w_2 w_1 x_0 = 12$, the two derivatives are $w_2 x_0 = 6$ and $w_1 x_0 = 6$, and the derivative of $w^2 x_0$ is $2 w x_0 = 12$, their sum. In a model of six layers that share:

# %% tags=["nbval-check-output"]
from effnb.chapters.design.sharing import methods

gap = methods.gradient_gap()
print("the shared gradient is the sum over an untied copy's layers:", gap < 1e-9)

# %% [markdown]
# ### Short token vectors
#
# An embedding table of $V$ tokens and $d$ channels holds $V d$ numbers. Nothing says that a token's own vector must be as wide as the stream that the layers work on. A **factorized embedding** gives each token $E$ numbers, and one matrix $P$ widens them:
# <a id="equation-3"></a>
#
# $$x = t P, \qquad V d \;\to\; V E + E d. \tag{3}$$
#
# The output head is usually **tied** to the embedding: it uses the same table. Then it has to be factorized too, $\text{logits} = (h P^\top)\, T^\top$, which saves multiplications as well. For the sizes of ALBERT-base:

# %% tags=["nbval-check-output"]
from effnb.design import sharing

V, d = 30_000, 768
for E in (64, 128, 256):
    numbers = sharing.factorized_parameters(V, E, d)
    print(f"E = {E:3}: {numbers:>10,} numbers, {numbers / (V * d):.0%} of the table's {V * d:,}")

# %% [markdown]
# ### As many steps as needed
#
# If all layers are one, their number is no longer a property of the weights. The **Universal Transformer** (Dehghani et al., 2019) applies one block $S$ times and tells it where and when it is: $P^s$ is a sinusoid of the position plus a sinusoid of the step.
#
# $$A^s = \text{LN}\big((H^{s-1} + P^s) + \text{MHSA}(H^{s-1} + P^s)\big), \qquad H^s = \text{LN}\big(A^s + \text{Transition}(A^s)\big).$$
#
# Here LN normalizes each position, MHSA is multi-head self-attention, and the transition is a feed-forward layer. With **adaptive computation time** (Graves, 2016) every position also outputs a probability $p_s = \sigma(w \cdot h_s + b)$ of being done. It stops at the first step $n$ for which $p_1 + \dots + p_n \ge 1 - \varepsilon$. Its output is the weighted mean of its states; the last one gets what is left over, the **remainder** $R = 1 - \sum_{s<n} p_s$:

# %% tags=["nbval-check-output"]
import torch

probabilities = iter([0.2, 0.5, 0.4, 0.9])
found = sharing.adaptive_computation_time(
    torch.zeros(1, 1, 1),
    step=lambda state, s: state + 1,  # the state counts its steps
    halting=lambda state: torch.full(state.shape[:2], next(probabilities)),
    max_steps=6,
)
print("sums   :", [0.2, round(0.2 + 0.5, 1), round(0.2 + 0.5 + 0.4, 1)])
print("weights:", [round(w, 2) for w in found.weights.flatten().tolist()])
print("steps  :", found.steps.item())
print("output :", round(found.output.item(), 2), "= 0.2 · 1 + 0.5 · 2 + 0.3 · 3")

# %% [markdown]
# After two steps the sum is 0.7, after three it would be 1.1, so the third step is the last and gets the remaining 0.3. The fourth probability is never asked for. Training adds a small multiple of $n + R$, the **ponder cost**, to the loss; without it, nothing discourages using all steps.
#
# ### Fewer vectors than tokens
#
# Self-attention compares every token with every other, in every layer: $L$ layers over $M$ tokens take $O(L M^2)$ products. The **Perceiver** (Jaegle et al., 2021) learns an array of $N$ **latents**, vectors that belong to no token. They read the input once by **cross-attention**, in which the queries come from one array and the keys and values from another. All further layers work on the latents alone:
#
# $$Z \leftarrow \text{CrossAttention}(Z, X), \qquad Z \leftarrow \text{SelfAttention}_\ell(Z), \quad \ell = 1, \dots, L; \qquad O(M N + L N^2).$$
#
# Each further layer costs $O(N^2)$ whatever the length. To get an answer for each place, **Perceiver IO** (Jaegle et al., 2022) lets one query per place read the latents by another cross-attention. Everything that these queries learn about the input has to pass through $N$ vectors.

# %% [markdown]
# ## The code
#
# Sharing works on any model with a stack of blocks. What is shared is the innermost module that holds weights; the block around it stays separate, because it knows its layer's number and its mask.

# %%
from effnb.lab import show

show(sharing.layer_groups, sharing.share_layers)

# %% [markdown]
# The heart of adaptive computation time is one loop; the Perceiver's is another:

# %%
show(sharing.adaptive_computation_time, sharing.Perceiver.forward)

# %% [markdown]
# Do they agree with the library that people use? Here are the counts of `transformers`, without allocating anything:

# %% tags=["nbval-check-output"]
import transformers

albert = transformers.AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
perceiver = sharing.PerceiverConfig(768, 256, 1280, 26, heads=8, cross_heads=8)
with torch.device("meta"):
    theirs = [
        transformers.AlbertModel(albert),
        transformers.PerceiverModel(transformers.PerceiverConfig()),
    ]
ours = [sharing.albert_parameters(30_000, 128, 768, 3072, 12), perceiver.parameters]
for model, count in zip(theirs, ours):
    print(f"{type(model).__name__:14} {model.num_parameters():>11,}  by formula {count:>11,}")

# %% [markdown]
# Careful with that library: `AlbertConfig()` without arguments is not ALBERT-base but the largest size. The tests also copy weights: a BERT whose layers share computes what `AlbertModel` computes, and our Perceivers what `PerceiverModel` and `PerceiverForMaskedLM` do, to ten digits.

# %% [markdown]
# ## Turn the knob
#
# **A trained model.** The layers of `mini-5m` were trained without sharing. The panel makes them share with no training afterwards, or shortens the token vectors by a singular value decomposition.

# %%
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
panels.trained(bench)

# %% [markdown]
# Sharing has to be decided *before* training. Short token vectors are another matter: try how far $E$ can fall before answers suffer.
#
# **Steps.** Now a small Universal Transformer learns to add, here, in a few seconds. Its input is the sum of two digits at each place, lowest first; it has to output the digits of the result. A place whose digits add up to 9 passes on whatever carry comes to it, so a carry may come from far away. That is a chain, and a chain can be followed step by step.

# %%
adder = methods.train_adder()
panels.adding(adder)

# %% [markdown]
# Give it fewer steps than it wants, and see which digits fail. Then give it more places than it was trained for.
#
# **Latents.** The last panel counts, and runs one Perceiver at your setting:

# %%
panels.latents()

# %% [markdown]
# ## Does it hold?
#
# Two claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements; the verdicts are computed from stored results.

# %%
from effnb.chapters.design.sharing import verdicts
from effnb.lab import claims_table

stored = verdicts.stored()
claims_table(verdicts.s_m5(*stored), verdicts.s_m6(*stored))

# %% [markdown]
# **Sharing**, with both counts beside the loss:

# %% tags=["nbval-check-output"]
print(tables.shared_said(trained))
tables.shared_table(trained)

# %% [markdown]
# These models are tiny and saw few tokens, and most of their parameters are in the embedding. The comparison at equal parameters is the fair one for a file; the one at equal multiplications is the fair one for time.
#
# **What the latents let pass.** A fraction of the characters of a novel is masked, and the model fills them in. To do that it needs the neighbours of each one, and every neighbour has to pass through the latents:

# %% tags=["nbval-check-output"]
masked = tables.claimed("masked").data["table"]
print(tables.masked_said(masked))
print(tables.plateau_said(masked))
tables.masked_table(masked)

# %% [markdown]
# Compare the loss with what frequencies alone give before you read a difference between rows. A convolution is *told* where the neighbours are. Attention has to find them from vectors of positions, which takes long on a plateau on which nothing seems to happen, and a Perceiver has to find them twice: on the way into the latents and on the way out. So a short training says little about what the latents could let pass, and a model that reads characters through latents is better given its neighbours by a convolution first.

# %% [markdown]
# **Where steps are spent.** Three kinds of adders, trained with several seeds: one that halts by itself, one with six steps and one with a single step.

# %% tags=["nbval-check-output"]
adders = tables.stored("universal").data["table"]
print(tables.universal_said(adders))
tables.universal_table(adders)

# %%
drawings.steps(adders)

# %% [markdown]
# ## What it costs and saves
#
# Here are a model that shares nothing and one of the same shape that shares everything, measured on your machine:

# %%
from effnb.lab import compare_costs

apart, together = (methods.language_model(name).eval() for name in ("none", "all"))
compare_costs(apart, together, bench.windows[:1, :256], labels=("nothing shared", "all shared"))

# %% [markdown]
# Fewer bytes, the same work. What gets faster is *training on many machines*: there are fewer gradients to exchange, and the optimizer keeps less. That, and not the number of multiplications, is why ALBERT's authors could train faster.
#
# Latents are the opposite bargain. Here is what one more layer costs, and what a whole model costs:

# %%
depth = tables.claimed("depth").data["table"]
drawings.depth(depth)

# %% [markdown]
# Latents save time as long as there are fewer of them than tokens. On an input shorter than that, each layer costs more than a Transformer's, and the reading comes on top: do not use a Perceiver there.

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M has 30 layers, `mini-5m` six. Both are made to share weights: in each group, those of its first layer or the mean of its layers. SmolLM2's weights come from a 4-bit file, which does not matter for a change of this size.

# %% tags=["nbval-check-output"]
real = tables.stored("smollm2").data["table"]
print(tables.real_said(real))

# %%
tables.real_table(real)

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here())
else:
    print(tables.stored("smollm2"))

# %% [markdown]
# ## Where it breaks
#
# **A cache that mixes up layers.** It is tempting to put one whole attention module into every block. But a decoder caches keys and values under the module's layer number, and now every layer has the same one. No error is raised; the output is simply wrong as soon as a cache is used:

# %% tags=["nbval-check-output"]
ids = bench.windows[:1, :12]
for name, model in (
    ("whole module shared", methods.whole_attention_shared(apart)),
    ("weights shared", sharing.share_layers(apart)),
):
    gap = methods.cache_gap(model, ids)
    print(f"{name:20} the cache changes the output: {gap > 1e-3}")

# %% [markdown]
# **Saving.** A file must hold each weight once and say where it belongs. `save_pretrained` of `transformers` cannot do that, and refuses. `save_shared` writes what is shared into the file's metadata:

# %% tags=["nbval-check-output"]
numbers, in_file, change = methods.saved_and_loaded(together, ids)
print(f"{numbers:,} parameters, {in_file:,} numbers in the file, unchanged: {change < 1e-5}")
print(f"the same model for other libraries: {sharing.unshare_layers(together).num_parameters():,}")

# %% [markdown]
# **Compressing.** Whatever a method puts in the place of a shared layer has to go into all its places, or the saving is lost. The methods of this workbook replace it everywhere at once, and those that look at data fit it to what it reads in all of its places.

# %% tags=["nbval-check-output"]
for name, kind, one in methods.compressed(together, bench.calibration(0, (4, 64))):
    print(f"{name:18} {kind:16} one module in first and last layer: {one}")

# %% [markdown]
# AWQ divides the inputs of a layer by scales, and the norm of every block takes them in. A rotation does the reverse: it moves a norm's gain into the layers behind it. Where blocks share a layer but not the norm, that layer would have to take in several gains, so the rotation refuses and says why.
#
# **An input without positions.** Cross-attention does not know in which order the keys come. If the input does not say where each vector belongs, the latents see a bag of words:

# %% tags=["nbval-check-output"]
reader = methods.perceiver_reader(2)
x = torch.randn(1, 9, methods.WIDTH, generator=torch.Generator().manual_seed(0))
places = sharing.sinusoid(torch.arange(9), methods.WIDTH)
turned = x.flip(1)
with torch.inference_mode():
    alone = (reader(x) - reader(turned)).abs().max() < 1e-5
    placed = (reader(x + places) - reader(turned + places)).abs().max() < 1e-5
print(f"reversing the text changes nothing: {bool(alone)}; with positions: {bool(placed)}")

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: sharing.share_layers(apart, groups=4),
    lambda: sharing.share_layers(apart, "heads"),
    lambda: sharing.factorize_embedding(apart, 65),
    lambda: sharing.PerceiverConfig(64, latents=0, hidden=64, self_attends=2),
    lambda: adder(torch.zeros(1, 4, dtype=torch.long), steps=0),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.sharing import exercises

for exercise in (exercises.size, exercises.halting, exercises.cross):
    print(exercise)

# %% [markdown]
# **1.** The largest $E$ for which a factorized embedding holds at most a part `kept` of the numbers of a table of `V` tokens and `d` channels.


# %% tags=["exercise", "nbval-check-output"]
def widest(V, d, kept):
    """A whole number."""
    raise NotImplementedError


_ = exercises.size.check(widest)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write down how many numbers the two factors hold for a given $E$, and solve for $E$.
#
# </details>


# %% tags=["solution"]
exercises.size.solution()

# %% [markdown]
# **2.** From the halting probabilities of one position, the weight of each step. The last entry is the last step allowed; steps after the halt get 0.


# %% tags=["exercise", "nbval-check-output"]
def weights(p, epsilon):
    """p is (steps,); return a tensor of the same length."""
    raise NotImplementedError


_ = exercises.halting.check(weights)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Keep a running sum. Ask at each step whether its probability would complete it.
#
# </details>


# %% tags=["solution"]
exercises.halting.solution()

# %% [markdown]
# **3.** Count pairs of vectors that attention compares. A Transformer of $L$ layers compares $M^2$ in each, a Perceiver $M N$ once and then $N^2$ in each layer. What is the shortest length $M$ at which the Perceiver compares fewer?


# %% tags=["exercise", "nbval-check-output"]
def shortest(width, N, L):
    """A whole number of tokens; the width is not needed."""
    raise NotImplementedError


_ = exercises.cross.check(shortest)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# It is a quadratic inequality in $M$. If you try lengths one by one instead, start at 1 and stop at the first that satisfies it.
#
# </details>


# %% tags=["solution"]
exercises.cross.solution()

# %% [markdown]
# ## Gallery
#
# **Sentence-order prediction** (Lan et al., 2020). ALBERT's second task: two segments of one text, swapped in half of the examples; which came first? Both are about the same thing, so the topic gives nothing away. `sentence_order` makes such examples. Use it for encoders that must understand how sentences follow each other.
#
# **Repeated readings** (Jaegle et al., 2021). Latents may read the input again after some layers, with the same weights or with others: `PerceiverConfig(cross_attends=..., shared=...)`. Each reading costs $O(M N)$. Use them when one look is not enough to choose what matters.
#
# **Perceiver IO** (Jaegle et al., 2022). Because answers are asked for by queries, there may be any number of them and of any kind: `PerceiverIO(config)(inputs, queries)`. Forgetting to tell a query *where* it asks is the usual mistake; then all answers are the same.
#
# **Which one?** If memory, downloads or the exchange of gradients is the bottleneck, share. The table above shows what it costs to share each part; compare with a smaller model of as many parameters, and choose the number of groups by your budget. If the vocabulary is large relative to the model, factorize its embedding first, by [equation 3](#equation-3): that saves bytes and time. If inputs are long and an answer is short, read them into latents. Adaptive steps are for tasks in which some positions are much harder than others.
#
# ## Further reading
#
# Lan et al., *ALBERT*, ICLR 2020, arXiv 1909.11942. Dehghani et al., *Universal Transformers*, ICLR 2019, arXiv 1807.03819. Graves, *Adaptive Computation Time for Recurrent Neural Networks*, 2016, arXiv 1603.08983. Jaegle et al., *Perceiver*, ICML 2021, arXiv 2103.03206. Jaegle et al., *Perceiver IO*, ICLR 2022, arXiv 2107.14795.
