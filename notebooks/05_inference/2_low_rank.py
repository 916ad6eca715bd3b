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
# # Low rank
#
# **A matrix is a sum of simple terms. Drop the smallest ones and two thin matrices remain; which terms are small depends on the inputs that the matrix meets.**
#
# After this chapter you can
#
# - say what a rank costs, and below which rank it saves anything;
# - truncate a matrix by hand, and know the error before you measure it;
# - tell SVD, ASVD and SVD-LLM apart by the one matrix in which they differ, and read their code;
# - divide a budget of numbers among layers;
# - decide whether low rank pays, alone or together with rounding.
#
# You need the tour (`00_start_here`) and matrices. Plain SVD, ASVD, SVD-LLM and the choice of ranks are taught in depth; a gallery near the
# end introduces the other methods.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/2_low_rank")

# %% [markdown]
# ## The picture
#
# Most of the numbers in a language model are the weights of its linear layers. A low-rank method replaces each weight matrix by the product of two thin
# matrices that hold fewer numbers. The three methods below differ in what they know about a layer's inputs: plain SVD knows nothing, ASVD knows how
# large each input is, and SVD-LLM also knows which inputs rise and fall together.

# %%
from effnb.chapters.inference.low_rank import drawings, tables

measured = tables.stored("methods").data["table"]
drawings.result(measured)

# %% tags=["nbval-check-output"]
print(tables.cost_said(measured, [("SVD", 0.8), ("SVD-LLM", 0.8), ("SVD", 0.4)]))

# %% [markdown]
# Losses are in **nats**: the negative natural logarithm of the probability that the model gave to the right token. Perplexity is $e^{\text{loss}}$, so a rise of a hundredth of a nat
# raises perplexity by one per cent.
#
# `mini-5m` is a small model, trained for this book. What happens to one that people use? **Predict first:** the panel takes your guess before it answers. Then change
# the method, and keep less.

# %%
from effnb.chapters.inference.low_rank import panels

smollm2 = tables.stored("smollm2").data["table"]
panels.smollm2(smollm2)

# %% [markdown]
# All three methods leave factors of the same sizes. They differ only in the values, and that difference is the subject of this chapter.

# %% [markdown]
# ## The idea
#
# ### A matrix as a sum
#
# Every matrix $W$ with $m$ rows and $n$ columns is a sum of products of a column and a row:
#
# $$W = \sum_i \sigma_i\, u_i v_i^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0.$$
#
# The columns $u_i$ have length 1 and are at right angles to each other, and the same holds for the rows $v_i^\top$. This is the **singular value decomposition** (SVD).
# Each **singular value** $\sigma_i$ says how much its term contributes, and the number of terms that are not zero is the **rank** of the matrix. The first $r$ terms are the best approximation of rank $r$ that
# exists, and its squared error is known without measuring it (Eckart and Young, 1936):
#
# $$\lVert W - W_r \rVert_F^2 = \sum_{i > r} \sigma_i^2.$$
#
# A matrix of two rows can be decomposed by hand. The $\sigma_i^2$ are the eigenvalues of $W^\top W$, and the $v_i$ its eigenvectors. For
# $W = \bigl(\begin{smallmatrix} 3 & 0 \\ 4 & 5 \end{smallmatrix}\bigr)$ that product is
# $\bigl(\begin{smallmatrix} 25 & 20 \\ 20 & 25 \end{smallmatrix}\bigr)$, with the eigenvalues $25 + 20$ and $25 - 20$ and the eigenvectors $(1, 1)$ and $(1, -1)$, each divided by $\sqrt 2$. Keeping the
# first term means projecting each row onto $(1, 1)$, which replaces both of its entries by their mean:

# %% tags=["nbval-check-output"]
from effnb.inference import low_rank

W = panels.WEIGHT
first = low_rank.truncated_svd(W, rank=1)
best = first.product().float()
print("squared singular values:", first.singular_values.square().round().int().tolist())
print("the best rank 1        :", best.tolist())
print("what it misses         :", (W - best).tolist())
print(f"squared error          : {(W - best).square().sum():.2f}")

# %% [markdown]
# The rows of the approximation are multiples of each other, which is what rank 1 means, and the squared error is the squared singular value that was left out.
#
# ### When does it save anything?
#
# The truncated matrix is stored as two **factors**, $U$ with $r$ columns and $V$ with $r$ rows, and the layer $y = W x$ becomes $y = U (V x)$. That takes
# $r (m + n)$ numbers, and as many multiplications, in place of $m n$. Both are fewer only below the **break-even rank**
#
# $$r^\star = \frac{m n}{m + n}.$$

# %% tags=["nbval-check-output"]
tables.break_even_table()

# %% [markdown]
# Half of the rank is not half of the numbers: in a square layer it saves nothing. And the last column works against us: to save the first tenth of a square layer's *numbers*, more than half of its *terms* must go. This chapter therefore always speaks of the part of the numbers
# that is **kept**. The package turns it into a rank for each layer.

# %% [markdown]
# ### The weights, or what they compute?
#
# The next layer never sees $W$. It sees $W x$, and an error in a direction that no input takes does no harm. Let the columns of $X$ be the inputs of a layer, collected by running a few sequences of
# real text through the model (**calibration**), and let $G = X X^\top$ be the matrix of their products. A change $\Delta$ of the weight then changes the outputs by
#
# $$\lVert \Delta X \rVert_F^2 = \operatorname{tr}(\Delta\, G\, \Delta^\top).$$
#
# All three methods multiply $W$ by a matrix $S$, truncate $W S$, and multiply by $S^{-1}$ afterwards. They differ in $S$ alone:
#
# - **SVD**: $S = I$. All directions count alike.
# - **ASVD** (Yuan et al., 2023): $S$ is diagonal. It holds the mean magnitude of each input, raised to the power $\alpha = 0.5$, so that columns which meet large inputs count for more.
# - **SVD-LLM** (Wang et al., 2025): $S = L$, where $L$ is lower triangular and $L L^\top = G$. Such an $L$ exists for every positive definite $G$ and is called its **Cholesky factor**. The inputs $L^{-1} X$ are equally large and do not move
#   together; making them so is called **whitening**.
#
# Why $L$? Because $\lVert \Delta L \rVert_F^2 = \operatorname{tr}(\Delta L L^\top \Delta^\top)$ *is* the error of the output. Truncating $W L$ therefore does the least damage that rank $r$ allows on these inputs, and says how much it is:
# <a id="equation-5"></a>
#
# $$\hat W = U_r \Sigma_r V_r^\top L^{-1}, \qquad \lVert (W - \hat W) X \rVert_F^2 = \sum_{i > r} \sigma_i^2(W L). \tag{5}$$
#
# Here is the matrix from above once more, with three kinds of inputs. At rank 1 each method can read only one direction of the inputs. Which one does it choose?

# %%
panels.two_inputs()

# %% [markdown]
# With inputs that are *alike*, all three choose the same direction. When *one* is *larger*, ASVD turns towards it and gets most of the way. When the inputs are *opposed*, their sizes are equal, and ASVD sees nothing. Plain
# SVD keeps a direction that hardly occurs; SVD-LLM keeps the one along which the inputs lie.

# %% [markdown]
# ### Rank where it is needed
#
# The same part of every layer is a choice, and some layers can spare more than others. Let $d_\ell(r)$ be the damage of giving layer $\ell$ the rank $r$. The ranks that suit a budget best solve
#
# $$\min_{r_1, r_2, \dots}\ \sum_\ell d_\ell(r_\ell) \quad \text{so that} \quad \sum_\ell r_\ell (m_\ell + n_\ell) \le \text{budget}.$$
#
# Two measures of damage are tried below. **By spectrum** takes the part of the layer's output that is lost, $\sum_{i > r} \sigma_i^2 / \sum_i \sigma_i^2$, which costs nothing. **By loss** takes the rise of the loss when this layer alone is truncated, which costs one evaluation for each layer and rank;
# it is ASVD's search. The steps that spare the most damage per number are then taken first, until the budget is spent.

# %% [markdown]
# ## The code
#
# One function serves all three methods:

# %%
from effnb.lab import show

show(low_rank.scaled_svd)

# %% [markdown]
# The layer that takes the place of the dense one is as short as its equation:

# %%
show(low_rank.LowRankLinear.forward, low_rank.rank_for)

# %% [markdown]
# Does it do what the equations say? SVD-LLM claims to know the damage in advance, by [equation 5](#equation-5). For one layer of `mini-5m`, on the left the error that the singular values predict, on the right the error found by running the layer
# with and without its factors, both as parts of the output's norm:

# %% tags=["hide-input"]
from effnb.chapters.inference.low_rank import methods
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
model = bench.model
texts = {tokens: bench.calibration(0, shape) for tokens, shape in methods.TEXTS.items()}
made = methods.Decompositions(model, texts)
calibration = texts[made.most]

# %% tags=["nbval-check-output"]
up = "model.layers.3.mlp.up_proj"
shares = (0.8, 0.6, 0.4)
for part, *errors in methods.predicted_and_measured(model, calibration[:8], up, shares):
    print(f"{part:.0%} kept: predicted {errors[0]:.2%}, measured {errors[1]:.2%}")

# %% [markdown]
# So layers can be compared, and ranks chosen, without running the model again. Here are the singular values of two layers: on the left those of the weight, on the right those of $W L$.

# %%
layers = {"q_proj": "model.layers.3.self_attn.q_proj", "down_proj": "model.layers.3.mlp.down_proj"}
drawings.spectra(made, layers)

# %% [markdown]
# Truncation loses little where a curve falls fast. The dotted curves show how much of that is structure which the weights have learned. The right picture is the one that counts: it shows what is small in the layer's output. Over all layers, with 60 % kept:

# %% tags=["nbval-check-output"]
seen = methods.grams(model, calibration)
for method, count in made.nearer(seen, 0.6).items():
    print(f"{method} keeps the output nearer than plain SVD in {count} of {len(seen)} layers")

# %% [markdown]
# ## Turn the knob
#
# When you run this page, the next panel factorizes a language model while you wait: a few seconds for a new method or text, less afterwards. *Tokens of text* says how much calibration text a method sees. A knob that a method does not use is greyed.

# %%
import math

from effnb.lab import guess, knob, quality_panel

quality_panel(
    methods.subject(bench),
    methods.panel_methods(made),
    title="Factorize mini-5m",
    caption="Left: perplexity over size. Right: questions about package descriptions.",
    idle=methods.IDLE,
    frames={"kept": [20, 40, 80], "method": ["SVD-LLM", "SVD"]},
    predict=guess(
        "SVD-LLM sees only 256 tokens of text, and keeps 40 % of the numbers of every layer. How "
        "many times the original's perplexity does the model have?",
        answer=lambda found: round(math.exp(found.loss.difference), 2),
        at={"kept": 40, "tokens": 256},
    ),
    kept=knob([20, 40, 60, 80], default=40, label="kept, per cent"),
    layers=knob(list(methods.LAYERS)),
    tokens=knob(list(methods.TEXTS), default=made.most, label="tokens of text"),
)

# %% [markdown]
# Things to try when you run this page:
#
# - at 40 %, go from *SVD-LLM* to *SVD*, and then give SVD-LLM less text: when is it worth the trouble?
# - if only one kind of layer may go down to 20 %, which hurts more, *attention* or *MLP*? Look at the size as well: the MLP has most of the numbers;
# - *TensorGPT* factorizes the embedding: a warning that the gallery explains.

# %% [markdown]
# ## Does it hold?
#
# One claim of the ledger belongs to this chapter: low rank makes weights smaller, and methods that look at the activations beat plain SVD. Its parts, bounds and margins were registered before the measurements; the verdict is computed from stored results, and a part that was not measured on the present model reads "not tested".

# %%
from effnb.chapters.inference.low_rank import verdicts
from effnb.lab import claims_table

claims_table(verdicts.c_4(*verdicts.stored()))

# %% [markdown]
# **Looking at the inputs**, on text that no method has seen. A difference can be certain and still be small, so read the nats beside the word:

# %% tags=["nbval-check-output"]
print(tables.methods_said(measured))
tables.methods_table(measured)

# %% [markdown]
# **Rank where it is needed.** The same budget of numbers, divided in three ways:

# %% tags=["nbval-check-output"]
allocation = tables.stored("allocation").data["table"]
print(tables.allocation_said(allocation))
tables.allocation_table(allocation)

# %% [markdown]
# **Low rank or rounding?** Pruning removes weights, quantization stores them in fewer bits, and both can be combined with low rank: first prune or factorize, then round, then *recover*, by training something small beside the frozen weights.
# Here that is a LoRA, a pair of thin matrices whose product is added to a weight. To be fair, all roads are compared at bytes as stored:

# %% tags=["nbval-check-output"]
composed = tables.stored("composed").data["table"]
print(tables.composed_said(composed))
tables.composed_table(composed)

# %%
drawings.composed(composed)

# %% [markdown]
# Where the two cost more together than their separate costs added, a likely reason is that rounding now meets two factors, one behind the other, whose rows and columns differ in size as the singular values do.
#
# The order matters. The second step must know of the first, and a model that is already rounded is refused:

# %% tags=["nbval-check-output"]
from effnb.inference import quantization

packed = quantization.rtn(model, 4)
try:
    low_rank.svd(packed, 0.5)
except ValueError as problem:
    print(problem)

# %% [markdown]
# ## What it costs and saves
#
# Parameters and bytes fall by what the arithmetic says. The embedding stays whole, and it is a large part of so small a model. `low_rank.save_factorized` writes a file of that size.

# %%
from effnb.lab import compare_costs

small = made.truncated("SVD-LLM", 0.4)
compare_costs(model, small, bench.windows[:1, :256], labels=("original", "40 % kept"))

# %% [markdown]
# Is it faster? Half of the multiplications would take half of the time, if nothing else took time. But two layers are two calls instead of one, and a thin matrix uses a processor less well than a wide one. This was
# measured on one layer of each shape:

# %%
latency = tables.stored("latency")
drawings.latency(latency.data["curves"])

# %% [markdown]
# Where a curve lies on the grey line, time follows the multiplications. Above it, the cost of a second call weighs more, which is to be expected in a small layer with one token at a time. Below it, factors may fit into the processor's cache where the layer does not. For the layer from above, here and now:

# %%
ranks = (32, 96, 160)
found = methods.times_dense(model.get_submodule(up), made.of("SVD")[up], ranks, tokens=256)
for rank, ratio in found.items():
    print(f"rank {rank:3}: {ratio:.2f} times the dense layer's time")

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M comes from a file whose linear weights lie on a 4-bit grid. That rounding left noise in them, and noise has no low rank, so the unrounded model may bear more than this. But all three methods meet the same weights. These are the settings of the first panel:

# %% tags=["nbval-check-output"]
print(tables.smollm2_said(smollm2))
tables.smollm2_table(smollm2)

# %% [markdown]
# Shapes do not explain why this model fares so differently from `mini-5m`: at the same part kept, square layers lose the same part of their terms in both. A better candidate is the inputs. Layers read the **residual stream**, the vector of each token that every block reads and adds its
# result to, and in larger models a few of its channels grow huge (the chapter on quantization calls them outliers). An error in a direction that meets one is multiplied by it:

# %% tags=["nbval-check-output"]
print(tables.stands_out_said(tables.stored("inputs").data))

# %% [markdown]
# This fits what the toy showed with one larger input, but it is an observation, not a proof. Note also that ASVD's authors search a rank for each layer: the same part for all is not their method at its best.
#
# One setting live: the last six up-projections.

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here(kept=0.4))
else:
    print(tables.stored("smollm2"))

# %% [markdown]
# **Speed.** The last row is the mistake from above: half of the full rank for every layer.

# %% tags=["nbval-check-output"]
tables.speed_table(tables.stored("speed").data)

# %% [markdown]
# Attention, norms and the output head do not shrink, so the model gains less than its layers. And speed is worth little where the table above shows that quality is gone: plan for training that brings it back.

# %% [markdown]
# ## Where it breaks
#
# **Too little text.** $G$ has as many rows as the layer has inputs. With fewer tokens than that, some directions never occur, and SVD-LLM gives them away for nothing. ASVD estimates one number for each input and needs far less.

# %%
little = tables.stored("calibration").data["table"]
drawings.text_needed(little)

# %% tags=["nbval-check-output"]
print(tables.text_said(little))

# %% [markdown]
# **A random matrix has no low rank.** The same layer with its weights shuffled, at 60 % kept:

# %% tags=["nbval-check-output"]
weight = model.get_submodule(layers["q_proj"]).weight.detach()
for label, matrix in (("trained", weight), ("shuffled", drawings.shuffled(weight))):
    factors = low_rank.truncated_svd(matrix, low_rank.rank_for(0.6, *matrix.shape))
    print(f"{label:8} error {factors.error / matrix.norm():.0%} of the weight's norm")

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: low_rank.svd(model, 1.5),
    lambda: low_rank.svd(model),
    lambda: low_rank.svd(small, 0.5),
    lambda: low_rank.asvd(model, calibration, 0.5, alpha=2.0),
    lambda: low_rank.svd_llm(model, calibration[:0], 0.5),
    lambda: low_rank.truncated_svd(W, 3),
    lambda: low_rank.truncated_svd(W / 0, 1),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.low_rank import exercises

for exercise in (exercises.saving, exercises.scaling, exercises.damage):
    print(exercise)

# %% [markdown]
# **1.** The largest rank whose two factors hold at most a part `kept` of the numbers of an $m \times n$ matrix; at least 1.


# %% tags=["exercise", "nbval-check-output"]
def rank_of(kept, m, n):
    """A whole number."""
    raise NotImplementedError


_ = exercises.saving.check(rank_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Solve $r (m + n) \le \rho\, m n$ for $r$, where $\rho$ is the part kept.
#
# </details>


# %% tags=["solution"]
exercises.saving.solution()

# %% [markdown]
# **2.** What ASVD does once it has its scales. Truncate $W \operatorname{diag}(s)$ to rank $r$ and undo the scaling; return a matrix of the same shape as $W$.


# %% tags=["exercise", "nbval-check-output"]
def truncate_scaled(W, s, r):
    """W is (out, in), s is (in,)."""
    raise NotImplementedError


_ = exercises.scaling.check(truncate_scaled)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(..., full_matrices=False)` returns $U$, the singular values, and $V^\top$. Multiplying a matrix by a vector of length `in` scales its columns.
#
# </details>


# %% tags=["solution"]
exercises.scaling.solution()

# %% [markdown]
# **3.** From $W$ and $G$, the squared error $\lVert (W - \hat W) X \rVert_F^2$ that SVD-LLM will make at rank $r$, without computing $\hat W$ and without seeing $X$.


# %% tags=["exercise", "nbval-check-output"]
def predict(W, G, r):
    """A number."""
    raise NotImplementedError


_ = exercises.damage.check(predict)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The example at the top found squared singular values as eigenvalues of a product. Which product belongs to $W L$? (Either order will do.)
#
# </details>


# %% tags=["solution"]
exercises.damage.solution()

# %% [markdown]
# ## Gallery
#
# FWSVD, LoSparse and TensorGPT are in the package and in the panel, where LoSparse is not trained.
#
# **FWSVD** (Hsu et al., 2022). Weigh each input by the loss, not by its size. From the empirical Fisher information $F_{ij} = \mathbb{E}[(\partial \mathcal L / \partial W_{ij})^2]$, the mean of one squared gradient per sample, it scales column $j$ by $\sqrt{\sum_i F_{ij}}$.
# Use it for a model tuned to one task whose loss you have.
#
# **LoSparse** (Li et al., 2023). $W \approx U V + S$: factors for what all outputs share, and a few whole rows $S$ for outputs that fit no low rank. Rows are pruned while both parts are trained. Use it when you can train for long; the paper trains for epochs. In a short training, with half of the numbers kept:

# %% tags=["nbval-check-output"]
losparse = tables.stored("losparse").data
print(tables.losparse_said(losparse))
tables.losparse_table(losparse)

# %% [markdown]
# **TensorGPT** (Xu et al., 2023). Fold each token's embedding into a small tensor and store it as a *tensor train*, a chain of small matrices, one for each index: $x_{i_1 \dots i_N} \approx C_1[i_1] \cdots C_N[i_N]$. Tokens can then be added and removed one at a time. But neighbouring entries of an embedding need not have more to do with each other than any
# two. Use it, if at all, on wide embeddings, and compare the error with that on noise first:

# %% tags=["nbval-check-output"]
import torch

embedding = model.model.embed_tokens.weight.detach()
noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
fold = low_rank.balanced_shape(embedding.shape[1])
for rank in (2, 4):
    held = low_rank.train_size(fold, rank) / embedding.shape[1]
    errors = [
        float((low_rank.tt_svd(t, rank).vectors() - t).norm() / t.norm())
        for t in (embedding, noise)
    ]
    print(f"rank {rank}: {held:.0%} of the numbers, error {errors[0]:.0%}; noise {errors[1]:.0%}")

# %% [markdown]
# **LoRD** (Kaushal et al., 2023). Truncate along the main directions of the *outputs*: $\hat W = U_r U_r^\top W$, where the columns of $U_r$ are the leading eigenvectors of $W G W^\top$. That is SVD-LLM by another road, and the products are the same, so it has no function here.
#
# **Which one?** Count bytes first: the table of roads above says what rounding costs at the same size. Low rank is for the case where multiplications must go on ordinary hardware, or where you will train afterwards. Then use SVD-LLM if you have enough of the text that matters to you, ASVD if you have little, and choose ranks by spectrum. Plain SVD is for a first
# look at the spectrum. The evidence is from two small models: measure on yours.
#
# ## Further reading
#
# Eckart and Young, 1936, *Psychometrika* 1(3). Yuan et al., *ASVD*, 2023, arXiv 2312.05821. Wang et al., *SVD-LLM*, ICLR 2025, arXiv 2403.07378, and *V2*, 2025, arXiv 2503.12340. Hsu et al., *FWSVD*, 2022, arXiv 2207.00112.
# Li et al., *LoSparse*, 2023, arXiv 2306.11222. Kaushal, Vaidhya and Rish, *LoRD*, 2023, arXiv 2309.14021. Xu, Xu and Mandic, *TensorGPT*, 2023, arXiv 2307.00526. Frantar and Alistarh, *SparseGPT*, 2023, arXiv 2301.00774.
