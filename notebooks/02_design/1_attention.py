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
# # Attention
#
# **Attention compares every token with every other. Each method in this chapter makes fewer comparisons, keeps fewer of them, or stores none at all, and each gives something up for it. Except one, which is exact.**
#
# After this chapter you can
#
# - compute a softmax block by block, by hand, and say why FlashAttention needs no table of scores;
# - work out how large a KV cache is, and make it smaller: forget tokens, or share heads;
# - choose between a window, global tokens, a memory and predicted pairs, and say what each cannot see;
# - tell a form that is fast from one that only looks sparse;
# - read a curve of recall against sparsity.
#
# You need the tour (`00_start_here`), and you should know what queries, keys and values are. FlashAttention, the KV cache with attention sinks, grouped-query attention, local and global attention, Transformer-XL and Sparsefinder are taught in depth. BigBird, Reformer, Linformer, Performer and linear attention are in the panels and the gallery.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/1_attention")

# %% [markdown]
# ## The picture
#
# A model that writes keeps the keys and values of all tokens so far: its **KV cache**. To bound the memory, keep the latest 256 tokens only, and forget the others. Surely the first words of a text matter least?

# %%
from effnb.chapters.design.attention import drawings, tables

real, mini = tables.stored("smollm2").data, tables.stored("streaming").data
drawings.result(real, mini)

# %% tags=["nbval-check-output"]
print(tables.sinks_said(real))
print(tables.mini_said(mini))

# %% [markdown]
# **Perplexity** is $e^{\text{loss}}$, and the loss is the mean of $-\ln p$ of the right token, in **nats**. **StreamingLLM** (Xiao et al., 2023) is the curve whose cache also keeps the first four tokens. They are called **attention sinks**. A softmax has to put its weight somewhere, and a head that needs nothing puts it on the first tokens, which every later token can see. Take them away, and that weight falls on tokens that mean something.
#
# Whether a model has sinks depends on its training, as the two models show. `mini-5m` fails for another reason: it keeps everything, and meets distances that its training never showed. A small cache mends that too, because distances inside it stay small. **Predict first:** the panel takes your guess before it answers. Then read what each model writes with each cache.

# %%
from effnb.chapters.design.attention import panels

panels.sinks(real, mini)

# %% [markdown]
# ## The idea
#
# Attention of one head with queries $q_i$, keys $k_j$ and values $v_j$ of $d$ numbers each is
#
# $$o_i = \sum_j p_{ij}\, v_j, \qquad p_{ij} = \frac{e^{s_{ij}}}{\sum_{j'} e^{s_{ij'}}}, \qquad s_{ij} = \frac{q_i \cdot k_j}{\sqrt d}.$$
#
# A text of $T$ tokens has $T^2$ scores. That is two costs: the **work** of computing them, and the **memory** of storing them. The first method removes the second cost alone.
#
# ### FlashAttention: one softmax, block by block
#
# A softmax needs its largest score and the sum of all exponentials. Both can be kept up to date while keys arrive in blocks (**online softmax**; Milakov and Gimelshein, 2018). Keep $m$, the largest score so far; $\ell$, the sum of $e^{s - m}$; and $o$, the sum of $e^{s - m} v$. A new block changes them to
# <a id="equation-2"></a>
#
# $$m' = \max(m, \max s), \qquad \begin{aligned} \ell' &= e^{m - m'} \ell + \textstyle\sum e^{s - m'}, \\ o' &= e^{m - m'} o + \textstyle\sum e^{s - m'} v, \end{aligned} \tag{2}$$
#
# and at the end $o / \ell$ is the output. By hand: one query, four keys, in blocks of two. Let the scores be $\ln 2 \cdot (1, 3, 4, 2)$ and the values $(4, 2, 8, 0)$.
#
# 1. First block: $m = 3 \ln 2$. The exponentials are $\tfrac14$ and $1$, so $\ell = \tfrac54$ and $o = \tfrac14 \cdot 4 + 1 \cdot 2 = 3$.
# 2. Second block: $m' = 4 \ln 2$, so what we have is worth half: $\ell' = \tfrac58 + 1 + \tfrac14 = \tfrac{15}8$ and $o' = \tfrac32 + 8 + 0 = \tfrac{19}2$.
# 3. The output is $\tfrac{19}2 : \tfrac{15}8 = \tfrac{76}{15}$.

# %% tags=["nbval-check-output"]
import math

import torch

from effnb.design import attention

scores = math.log(2) * torch.tensor([1.0, 3, 4, 2])
values = torch.tensor([[4.0], [2], [8], [0]])
for state in attention.online_softmax(scores, values, block=2):
    print(f"m = {state.m / math.log(2):.0f} ln 2, l = {state.l:.3f}, o = {state.o.item():.1f}")
print(f"by blocks {state.output.item():.4f}, at once {(scores.softmax(0) @ values).item():.4f}")

# %% [markdown]
# **FlashAttention** (Dao et al., 2022) cuts queries into tiles too, and keeps a tile of scores in the processor's fast memory. The result is exact, the work is the same, and what falls is the traffic to slow memory. For a head of 64 and fast memory of 25,600 numbers:

# %% tags=["nbval-check-output"]
for tokens in (1024, 8192):
    io = attention.memory_accesses(tokens, 64, 25_600)
    print(
        f"{tokens:5,} tokens: numbers moved {io.standard:11,} with a table, {io.tiled:10,} tiled; "
        f"largest thing stored {io.standard_peak:10,} and {io.tiled_peak:,}"
    )

# %% [markdown]
# ### The KV cache, and forgetting
#
# A new token's query meets the keys of all tokens before it, and changes none of them. So a model that writes keeps them. With $N$ layers, $G$ heads of keys and values of width $d$, $T$ tokens, $B$ texts and $b$ bytes a number, the cache takes
#
# $$2 \cdot N \cdot G \cdot d \cdot T \cdot B \cdot b \text{ bytes}.$$
#
# Two factors can be cut without touching the weights: $T$, as above, and $G$. In **grouped-query attention** (GQA; Ainslie et al., 2023) several query heads share one head of keys and values; with $G = 1$ it is *multi-query* attention. A trained model is converted by *mean pooling* the projections $W$ of the $n$ heads in a group, and a little further training:
#
# $$W_{\text{group}} = \frac1n \sum_{h \in \text{group}} W_h.$$

# %% tags=["nbval-check-output"]
from dataclasses import replace

from effnb.lab.bench import Bench

bench = Bench("mini-5m", windows=4, questions=0)
shape = attention.CacheShape.of(bench.model)
llama = attention.CacheShape(layers=30, heads=9, kv_heads=3, head_dim=64)
shapes = {"mini-5m": shape, "SmolLM2-135M": llama}
shapes |= {"SmolLM2's shape, no sharing": replace(llama, kv_heads=9)}
tables.cache_table(shapes | {"multi-query": replace(llama, kv_heads=1)}, [2048, 8192])

# %% [markdown]
# ### Local and global
#
# In most texts, near tokens matter most. A **window** $w$ lets a token see $w/2$ tokens to either side, or, in a model that writes, itself and the $w - 1$ before it. That is $T w$ pairs in place of $T^2$. A stack of $N$ layers carries information over $N w / 2$ tokens and no further.
#
# A few **global** tokens mend that. They see everything and are seen by everything, so that any two tokens are two layers apart. **Longformer** (Beltagy et al., 2020) makes some tokens of the text global. **ETC** (Ainslie et al., 2020) puts $g$ global tokens *beside* the text, one for each sentence, say, which gives with a radius $r$
#
# $$g\,(g + T) + T\,(g + 2r + 1) \text{ pairs}.$$

# %%
drawings.masks()

# %% [markdown]
# ### Recurrence
#
# **Transformer-XL** (Dai et al., 2019) reads a text in segments, and hands the hidden states of each segment to the next one as a **memory**. Their gradient is cut off, but their keys and values are attended to. Positions must then be *relative*: place 3 of the memory and place 3 of the segment are not the same. With $\delta$ the distance from query $i$ to key $j$, a score is
#
# $$s_{ij} = \frac{(q_i + u) \cdot k_j + (q_i + v) \cdot r_\delta}{\sqrt d},$$
#
# where $r_\delta$ is a projected table of sines and cosines of $\delta$, and $u$ and $v$ are learned: how much a head cares for content, and for distance, whatever the query. If the memory holds the whole past, reading in segments is the same as reading at once:

# %% tags=["nbval-check-output"]
from effnb.chapters.design.attention import recurrence

xl = recurrence.build(seed=0, memory=96)
ids = recurrence.encode("It is a truth universally acknowledged, that a single man in possession")
with torch.inference_mode():
    apart, whole = attention.read_in_segments(xl, ids[None], 16), xl(ids[None]).logits
print(f"largest difference below 1e-4: {bool((apart - whole).abs().max() < 1e-4)}")

# %% [markdown]
# ### Sparse by itself
#
# A softmax never gives a weight of exactly 0. **Entmax** does (Peters et al., 2019): with $\alpha = 1.5$ it is $p_j = [\tfrac12 s_j - \tau]_+^2$, where $\tau$ is chosen so that the weights add up to 1. Keys whose score falls below the threshold are out. And they do not matter: without them, $\tau$ and all other weights stay as they are.
#
# So if one knew beforehand which pairs have a weight, the others need not be computed. **Sparsefinder** (Treviso et al., 2022) predicts them. For each head it learns two small projections, here to 4 numbers, such that pairs in use are close; then it connects a query with a key
#
# - by **distance**: all pairs closer than a threshold. This still compares all pairs, if cheaply;
# - by **quantization**: sort each of the four numbers into buckets of equal size, and connect who shares a bucket;
# - by **clustering**: k-means, and connect who shares a cluster.
#
# Two numbers judge a predicted set of pairs. **Recall** is the share of the pairs in use that it holds, **sparsity** the share of all pairs that it leaves out. Prediction by chance gives a recall of one minus the sparsity. With a recall of 1, the output is exact.

# %% tags=["nbval-check-output"]
s = torch.tensor([2.0, 1.0, 0.2, -1.0])
used = attention.entmax15(s) > 0
print("entmax  ", [round(x, 3) for x in attention.entmax15(s).tolist()])
print("fewer   ", [round(x, 3) for x in attention.entmax15(s[used]).tolist()])
print("softmax ", [round(x, 3) for x in s.softmax(0).tolist()])
print("fewer   ", [round(x, 3) for x in s[used].softmax(0).tolist()])

# %% [markdown]
# ## The code
#
# The online softmax is the three updates of [equation 2](#equation-2), and the cache with sinks is two lists that are cut and joined:

# %%
from effnb.lab import show

show(attention.SoftmaxState.add, attention.StreamingLayer.update)

# %% [markdown]
# A dropped token leaves a gap between the sinks and the window. Positions are therefore counted *inside the cache*: the keys of the sinks are turned as if they had moved on. Nothing at all is trained.
#
# Do our forms agree with the library? Tiled attention and blocked windows against PyTorch's own, with the mask written out:

# %% tags=["nbval-check-output"]
from effnb.kernels.local_attention import local_attention

draw = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 4, 200, 32, generator=draw) for _ in range(3))
torch_attention = torch.nn.functional.scaled_dot_product_attention
seen = attention.window_pattern(200, 16, causal=True)
for name, ours, theirs in (
    ("tiled", attention.flash_attention(q, k, v), torch_attention(q, k, v)),
    (
        "window",
        local_attention(q, k, v, window=16, causal=True),
        torch_attention(q, k, v, attn_mask=seen),
    ),
):
    print(f"{name:6} equal within 1e-5: {torch.allclose(ours, theirs, atol=1e-5)}")

# %% [markdown]
# ## Turn the knob
#
# ### A cache of your size
#
# `mini-5m` reads a chapter that it has never seen through a cache of your size, and writes on. It was trained on 512 tokens; the grey curve keeps everything, and fails behind them.

# %%
panels.live(bench)

# %% [markdown]
# ### Who sees whom
#
# Everything that a window cannot see has to travel through the layers. **Guess first** how many it takes, then add one global token.

# %%
panels.masks()

# %% [markdown]
# ### Heads that share
#
# The knob is the size of the groups. When you run this page, compare the poolings at the largest: why is the first head worse than the mean, and random heads worse than both?

# %%
panels.groups(bench)

# %% [markdown]
# What does a short training bring back?

# %%
grouped = tables.stored("grouped").data
tables.grouped_table(grouped)

# %% tags=["nbval-check-output"]
print(tables.grouped_said(grouped))

# %% [markdown]
# ### Find the pairs
#
# The heads of one layer of MiniLM, with entmax in the place of the softmax. The projections are trained here, on a few texts, and judged on another one.

# %%
from effnb.chapters.design.attention import graphs
from effnb.lab import load

minilm = load("minilm-l6", device="cpu")
(learned,) = graphs.layers_of(minilm, graphs.learning_ids(minilm, 0)[:4], [1])
(judged,) = graphs.layers_of(minilm, graphs.judged_ids(minilm, 1), [1])
panels.finder(graphs.Finder(learned, steps=60), judged)

# %% [markdown]
# ### All cheap forms, one interface
#
# Every form here takes queries, keys, values and a **budget**: how many keys a query is compared with, or into how many numbers the text is folded. The same heads, under all forms:

# %%
from effnb.chapters.design.attention.heads import heads_of

panels.approximations(heads_of(minilm.model, graphs.judged_ids(minilm, 1, 512), alpha=1.0)[1])

# %% [markdown]
# Read this with care: nothing was trained for these forms. A Linformer that learns its projections, or a model trained with a window, does better than this. What the panel does show is which assumption the heads of a trained model fit.

# %% [markdown]
# ## Does it hold?
#
# Three claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements, and the verdicts are computed from stored results. A part that is not measured reads "not tested".
#
# **Recurrence.**

# %%
from effnb.chapters.design.attention import verdicts
from effnb.lab import claims_table

evidence = verdicts.stored()
claims_table(verdicts.s_m1(*evidence))

# %% [markdown]
# Where inside a segment does the memory help?

# %%
recurrent = tables.claimed("recurrence").data["table"]
drawings.places(recurrent)

# %%
tables.recurrence_table(recurrent)

# %% tags=["nbval-check-output"]
print(tables.recurrence_said(recurrent))

# %% [markdown]
# Compare two readings of *one* model to see what the memory itself is worth, and two models to see what a few hundred steps have taught each. The row with another text's memory is the control: if any memory would do, the text itself was not used.
#
# **Local and global attention.**

# %%
claims_table(verdicts.s_m2(*evidence))

# %% tags=["nbval-check-output"]
print(tables.needle_said(tables.claimed("needle").data["table"]))

# %% [markdown]
# **Predicted pairs.** A window is the rival here, and a strong one: it needs no prediction.

# %%
claims_table(verdicts.s_m3(*evidence))

# %%
predicted = tables.claimed("patterns").data["table"]
drawings.recall(predicted)

# %% tags=["nbval-check-output"]
print(tables.patterns_said(predicted))

# %% [markdown]
# ## What it costs and saves
#
# Time and memory of the attention alone, measured from code that computes only the pairs it needs, block by block:

# %%
costs = tables.claimed("costs").data["table"]
drawings.growth(costs)

# %%
tables.costs_table(costs)

# %% tags=["nbval-check-output"]
print(tables.costs_said(costs))

# %% [markdown]
# Three things to see. A fused kernel, which stores no table, is the rival to beat; an ordinary table of scores is not. Linear cost pays from some length on, and short texts gain nothing. And the row *full, masked* computes all pairs and then hides most of them: it is sparse in name only.
#
# For a whole model, sharing one head of keys and values among all query heads:

# %%
from effnb.lab import compare_costs

multi_query = attention.grouped_query(bench.model, 1)
compare_costs(bench.model, multi_query, bench.windows[:1, :256], labels=("original", "G = 1"))

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M read the text of the first picture. Its linear weights come from a file that rounded them to a 4-bit grid; all caches met the same weights. One text is one draw, so there is no interval. This is what it writes behind the text, with each cache:

# %% tags=["nbval-check-output"]
print(tables.written_said(real))

# %% [markdown]
# ## Where it breaks
#
# ### A window extends nothing
#
# Sinks keep a model fluent beyond its length. They do not let it *use* what was forgotten: a question about a name from the beginning of the text has no answer in the cache. For that, see the chapter on context.
#
# ### Sparse pairs under a softmax
#
# The property that makes Sparsefinder exact belongs to entmax. In the example above, a softmax over fewer keys gave all of them other weights, although only small ones were left out.
#
# ### Forms that see the future
#
# Linformer mixes all positions into each of its keys. In a model that writes, the first token would see the last one. The gradient of the first output shows it:

# %% tags=["nbval-check-output"]
x = torch.randn(1, 1, 64, 32, generator=draw, requires_grad=True)
mix = torch.full((1, 8, 64), 1 / 64)
future = {
    "Linformer": attention.linformer_attention(x, x, x, mix, mix),
    "causal window": local_attention(x, x, x, window=8, causal=True),
    "linear attention": attention.linear_attention(x, x, x, causal=True),
}
for name, out in future.items():
    (gradient,) = torch.autograd.grad(out[0, 0, 0].sum(), x)
    print(
        f"{name:16} first token depends on later ones: {bool(gradient[0, 0, 1:].abs().sum() > 0)}"
    )

# %% [markdown]
# ### Bad input
#
# is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: attention.window_pattern(64, 7),
    lambda: attention.sliding_window(bench.model, 0),
    lambda: attention.grouped_query(bench.model, 3),
    lambda: attention.bigbird_attention(q, k, v, block=64),
    lambda: attention.memory_accesses(1024, 64, 100),
    lambda: attention.StreamingCache(bench.model, window=64, sinks=-1),
    lambda: attention.TransformerXL(32, dim=33),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.attention import exercises

for exercise in (exercises.merging, exercises.room, exercises.pairs):
    print(exercise)

# %% [markdown]
# **1.** Two processors have each seen half of the keys of one query. From their $m$, $\ell$ and $o$, compute those of all keys. Values are single numbers here.


# %% tags=["exercise", "nbval-check-output"]
def merge(m1, l1, o1, m2, l2, o2):
    """Three numbers: m, l and o."""
    raise NotImplementedError


_ = exercises.merging.check(merge)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What would both have computed, had they known the larger maximum from the start?
#
# </details>


# %% tags=["solution"]
exercises.merging.solution()

# %% [markdown]
# **2.** How many tokens of one text fit into a cache of `memory` bytes, if a number takes `bits` bits?


# %% tags=["exercise", "nbval-check-output"]
def longest_text(memory, layers, kv_heads, head_dim, bits):
    """A whole number of tokens."""
    raise NotImplementedError


_ = exercises.room.check(longest_text)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Start from the bits of one token, in all layers.
#
# </details>


# %% tags=["solution"]
exercises.room.solution()

# %% [markdown]
# **3.** How many pairs does a causal window with sinks compute? The window counts the token itself, and the sinks are the first tokens.


# %% tags=["exercise", "nbval-check-output"]
def count_pairs(tokens, window, sinks):
    """A whole number."""
    raise NotImplementedError


_ = exercises.pairs.check(count_pairs)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count what the token at place $t$ sees, first without sinks. Then ask which sinks lie outside its window.
#
# </details>


# %% tags=["solution"]
exercises.pairs.solution()

# %% [markdown]
# ## Gallery
#
# **BigBird** (Zaheer et al., 2020): blocks of a window, the first and the last block, and a few random blocks, which shorten every path. For encoders of long documents.
#
# **Reformer** (Kitaev et al., 2020): queries serve as keys, and $\arg\max$ of $[xR; -xR]$ with a random matrix $R$ is a **bucket** (locality-sensitive hashing, LSH). Tokens attend within their bucket; several rounds of hashes make misses rarer. For long texts whose attention is sharp.
#
# **Linformer** (Wang et al., 2020): $\operatorname{softmax}\!\big(Q (EK)^\top / \sqrt d\big) (FV)$, where $E$ and $F$ fold $T$ keys and values into a fixed number. For encoders with a fixed length; never for models that write.
#
# **Performer** (Choromanski et al., 2021): random features $\phi(x)_j = e^{\omega_j \cdot x - \lVert x \rVert^2 / 2} / \sqrt n$ of $n$ directions $\omega_j$ have $\operatorname{E}[\phi(q) \cdot \phi(k)] = e^{q \cdot k}$, so that attention is $\phi(Q)\,(\phi(K)^\top V)$ but for a division: linear in $T$. The error grows fast with the size of queries and keys.
#
# **Linear attention** (Katharopoulos et al., 2020): the same with $\phi(x) = \operatorname{elu}(x) + 1$, trained from the start. Its state has a fixed size, which limits what it can recall. The chapter on retention goes on from here.
#
# **Which one?** First a fused kernel: it is exact. If the cache is what fills the memory, share heads, then forget with sinks. If texts are long and mostly local, train with a window and global tokens. Predicted pairs and random features are for those who have measured that their heads fit.
#
# ## Further reading
#
# Dao et al., *FlashAttention*, 2022, arXiv 2205.14135. Milakov and Gimelshein, *Online normalizer calculation for softmax*, 2018, arXiv 1805.02867. Xiao et al., *Efficient Streaming Language Models with Attention Sinks*, 2023, arXiv 2309.17453. Shazeer, *Fast Transformer Decoding*, 2019, arXiv 1911.02150. Ainslie et al., *GQA*, 2023, arXiv 2305.13245.
# Beltagy et al., *Longformer*, 2020, arXiv 2004.05150. Ainslie et al., *ETC*, 2020, arXiv 2004.08483. Dai et al., *Transformer-XL*, 2019, arXiv 1901.02860. Peters et al., *Sparse Sequence-to-Sequence Models*, 2019, arXiv 1905.05702. Treviso et al., *Predicting Attention Sparsity in Transformers*, 2022, arXiv 2109.12188.
# Zaheer et al., *Big Bird*, 2020, arXiv 2007.14062. Kitaev et al., *Reformer*, 2020, arXiv 2001.04451. Wang et al., *Linformer*, 2020, arXiv 2006.04768. Choromanski et al., *Rethinking Attention with Performers*, 2021, arXiv 2009.14794. Katharopoulos et al., *Transformers are RNNs*, 2020, arXiv 2006.16236.
