# ---
# jupyter:
#   effnb:
#     minutes: 45
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
# # Matryoshka
#
# **A vector whose first numbers already work can be cut to any length. A search then looks at a few numbers of every document, and at all numbers of a few.**
#
# After this chapter you can
#
# - train one map whose outputs work at every length, and say what the loss is;
# - cut vectors without the mistake that most people make first;
# - compute what a search by two looks saves, and choose its two settings;
# - count what approximate search takes, and say what nested vectors add to it;
# - let a classifier stop as soon as it is sure.
#
# You need the tour (`00_start_here`), vectors, and the dot product. The nested loss, search by two looks, and approximate search are taught in depth; a gallery near the end introduces the relatives.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/8_matryoshka")

# %% [markdown]
# ## The picture
#
# A sentence encoder turns a text into a list of numbers, its **embedding**, so that texts about the same thing get similar lists. The encoder of this chapter, MiniLM, gives 384 numbers. We ask it to find 10,000 long package descriptions by
# their one-line synopses: 1,000 test synopses ask, and each has one right answer. A linear map, trained on 4,000 other pairs, turns MiniLM's 384 numbers into 384 new ones. Its training is what this chapter is about.

# %%
from effnb.chapters.inference.matryoshka import drawings, tables

dimensions = tables.stored("dimensions").data["table"]
shortlists = tables.stored("shortlist").data["table"]
drawings.result(dimensions, shortlists)

# %% tags=["nbval-check-output"]
print(tables.dimensions_said(dimensions))

# %% [markdown]
# The left picture shows that training for prefixes helps, and that few numbers are still not enough. The right one shows that few numbers are nearly enough to know *where to look*.

# %% [markdown]
# ## The idea
#
# ### Cut, and compare
#
# Two embeddings $q$ and $d$ are compared by their **cosine**: both are divided by their length, then multiplied number by number and added up. Comparing all $D$ numbers of a query with those of $N$ documents takes $N D$ multiplications. The first $m$ numbers, the
# **prefix** $z_{1:m}$, take $N m$. But a prefix of a vector of length 1 is shorter than 1, and how much shorter differs from vector to vector. It has to be divided by its *own* length:
#
# $$\cos_m(q, d) = \frac{q_{1:m} \cdot d_{1:m}}{\lVert q_{1:m} \rVert\, \lVert d_{1:m} \rVert}.$$
#
# By hand: the query $(0.36, 0.48, 0.8)$ and three documents of length 1, the first of which points almost as the query does:

# %% tags=["nbval-check-output"]
import torch

from effnb.inference import matryoshka

q = torch.tensor([[0.36, 0.48, 0.8]])
d = torch.tensor([[0.30, 0.40, 0.866], [0.8, 0.6, 0.0], [0.0, 0.6, 0.8]])
print("all three numbers :", [round(x, 2) for x in (q @ d.T)[0].tolist()])
print("two, not divided  :", [round(x, 2) for x in (q[:, :2] @ d[:, :2].T)[0].tolist()])
cut = matryoshka.prefix(q, 2) @ matryoshka.prefix(d, 2).T
print("two, divided      :", [round(x, 2) for x in cut[0].tolist()])

# %% [markdown]
# Not divided, the prefix of the first document looks poor, because most of its length lies in the third number, and the second document wins. Divided, the first one leads again. What no division can repair is the order of the other two: two numbers cannot know what the third would have said, unless the vectors were *trained* so that the first numbers say most of it.
#
# ### One loss for many lengths
#
# A retriever is trained with pairs. In a batch of $n$ queries and their documents, each query should give its own document the highest score; the documents of the others serve as wrong answers:
# <a id="equation-2"></a>
#
# $$\ell(q, d) = -\frac1n \sum_{i} \log \frac{e^{s\, q_i \cdot d_i}}{\sum_j e^{s\, q_i \cdot d_j}}, \tag{2}$$
#
# where $s = 20$ stretches cosines, which lie between −1 and 1, to scores that a softmax can tell apart. Nothing in this loss cares about order: any rotation of the numbers gives the same value, so information may lie anywhere, and a prefix holds an arbitrary part of it. **Matryoshka
# representation learning** (Kusupati et al., 2022), after the Russian dolls that sit inside each other, adds the same loss for every length in a list $\mathcal M$:
# <a id="equation-3"></a>
#
# $$\mathcal L = \sum_{m \in \mathcal M} c_m\, \ell\bigl(z_{1:m}\bigr), \qquad \mathcal M = \{8, 16, 32, 64, 128, 256, 384\}, \quad c_m = 1. \tag{3}$$
#
# The first 8 numbers occur in all seven terms, the last 128 in one. What matters most must therefore come first. The vector is not longer, and the encoder does not run more often.
#
# ### Look twice
#
# A short prefix makes mistakes, but few *bad* ones: the right document may come fifth, hardly ever five-thousandth. **Adaptive retrieval** uses that. Compare $m$ numbers with all documents, keep the best $K$, the **shortlist**, and order these by all $D$ numbers:
#
# $$\text{multiplications} = N m + K D \quad \text{in place of} \quad N D.$$
#
# With $N = 10{,}000$, $D = 384$, $m = 16$ and $K = 200$ that is:

# %% tags=["nbval-check-output"]
for m, K in ((16, 200), (16, 1000), (64, 200), (8, 200)):
    cost = tables.work(10_000, m, K)
    saved = tables.work(10_000, 384, 0) / cost
    print(f"{m:3} numbers, shortlist {K:4}: {cost:9,} multiplications, {saved:4.1f} times fewer")

# %% [markdown]
# The first term grows with the collection, the second does not: the larger the collection, the nearer the saving comes to $D / m$.
#
# ### Not looking at everything
#
# Both looks can be had cheaper still. **Approximate search** compares a query with some documents only, and cost is best counted in **distance evaluations**, the number of documents compared, because milliseconds depend on the machine.
#
# - **IVF** (inverted file) finds a hundred centres by k-means and gives each document to the nearest. A query is compared with the centres, then with the documents of the few centres nearest to it (**nprobe**).
# - **HNSW** (hierarchical navigable small world) links each document with some of its neighbours. A query walks from document to document, always on to the nearest one not yet visited, and keeps the best **efSearch** documents in sight. It stops when none of their neighbours is nearer. A few documents also belong to upper layers, in which the walk begins with long steps.
#
# Such an index reduces how many *documents* are compared; a prefix reduces what each comparison takes. Do the two savings multiply? Keep your guess until "Does it hold?".

# %% [markdown]
# ## The code
#
# The loss, with the ordinary one inside it:

# %%
from effnb.lab import show

show(matryoshka.prefix, matryoshka.in_batch_softmax, matryoshka.matryoshka_loss)

# %% [markdown]
# And a search by two looks is a funnel of one step:

# %%
show(matryoshka.rerank, matryoshka.funnel)

# %% [markdown]
# The first is equal to `MatryoshkaLoss` of sentence-transformers, and exact search to FAISS's, in the tests. Two checks that need no library: with the full width alone, [equation 3](#equation-3) gives the ordinary loss of [equation 2](#equation-2); and with a shortlist of all documents, two looks find what exact search finds.
#
# The repository does to itself what this chapter teaches. It has no room for all 384 numbers of 10,000 documents. It holds the first 128, rounded and compressed:

# %%
from effnb.chapters.inference.matryoshka import live

searched = live.live()
searched

# %% tags=["nbval-check-output"]
queries, documents = searched.queries, searched.documents
own = documents[searched.own]
nested = matryoshka.matryoshka_loss(queries, own, (128,))
print(
    "the full width alone is the ordinary loss:",
    nested.item()
    == matryoshka.in_batch_softmax(
        matryoshka.prefix(queries, 128), matryoshka.prefix(own, 128)
    ).item(),
)
every = matryoshka.adaptive_retrieval(queries[:20], documents, dims=16, shortlist=len(documents))
print(
    "a shortlist of everything is exact search:", torch.equal(every.rows, searched.exact.rows[:20])
)

# %% [markdown]
# ## Turn the knob
#
# 300 of the synopses search the 10,000 descriptions. Exact search here means all 128 stored numbers.

# %%
from effnb.chapters.inference.matryoshka import panels

panels.two_looks(searched)

# %% [markdown]
# Things to try when you run this page:
#
# - with no second look, how many numbers does it take to find 90 % of the ten nearest?
# - with 16 numbers, how long must the shortlist be for 99 %? With 8? Which of the two takes fewer multiplications?
# - read the example's results at 4 numbers. Are the wrong answers silly, or nearly right?
#
# Next, a walk through a graph. When you run this page, the first position at a new length builds the graph, which takes a few seconds.

# %%
panels.walk(searched)

# %% [markdown]
# ## Does it hold?
#
# One claim of the ledger belongs to this chapter: nested vectors make nearest-neighbour search up to 16 times cheaper at equal recall and accuracy. **Recall** is the share of the ten truly nearest documents (by all 384 numbers) that a search finds; **accuracy** is how often the right description comes first. The setting of the exact
# search (16 numbers, shortlist 200) was registered before any measurement; those of HNSW were chosen by *validation* queries, as the note under the table says.

# %%
from effnb.chapters.inference.matryoshka import verdicts
from effnb.lab import claims_table

claims_table(verdicts.g_8(*verdicts.stored()))

# %% [markdown]
# The verdict is about equality within a point at *one* setting, which saves a little more than 16 times. The tables below show what other settings save, and what they lose.
#
# **What the training is worth.** *Trained whole, cut* is the same map trained for 384 numbers alone. *Principal components* are the directions in which MiniLM's vectors are longest, found without any pairs:

# %% tags=["nbval-check-output"]
tables.dimensions_table(dimensions)

# %% tags=["nbval-check-output"]
print(tables.between_said(dimensions))

# %% [markdown]
# **Two looks.** There are two goals, and they differ: that the *right* answer comes first, and that the *ten nearest* are found:

# %% tags=["nbval-check-output"]
print(tables.shortlist_said(shortlists))
print(tables.rivals_said(shortlists))

# %% tags=["nbval-check-output"]
tables.cheapest_table(shortlists)

# %% [markdown]
# The nested loss is about right and wrong answers; where the seventh-nearest of ten lies among its equals, it does not care. Principal components keep dot products as well as $m$ numbers can, for all documents alike, and ask for no pairs and no training. So they are the rival to beat, and which of the two wins depends on the goal. Recall of the ten nearest is
# the measure that most papers on approximate search print. Whether your readers would miss the seventh-nearest is a question that no index can answer.

# %% [markdown]
# **With approximate search.** Here is what the graph alone does, and what a prefix adds:

# %%
walked = tables.stored("approximate").data["table"]
drawings.walks(walked)

# %% tags=["nbval-check-output"]
print(tables.walks_said(walked))
tables.walks_table(walked)

# %% [markdown]
# The two savings do not multiply. A shorter prefix needs a longer shortlist to lose nothing; a longer shortlist needs a larger efSearch, and so more comparisons; and the second look takes $K D$ multiplications whatever the index does. Exact search does not have the middle step: its first look sees every document anyway. On millions of documents the balance shifts, because
# $K D$ does not grow with the collection; that cannot be measured here.

# %% [markdown]
# ### For classification
#
# The paper began with classifiers. A small network on MiniLM's vector gives 64 numbers $z$; each prefix gets a linear head $W^{(m)}$, and the loss is the sum of their cross-entropies. **MRL-E** shares one head: $W^{(m)}$ is the first $m$ columns of $W$, which takes half of the memory. Here they tell the archive section of a description:

# %% tags=["nbval-check-output"]
sections = tables.stored("classes").data["table"]
print(tables.classes_said(sections))
tables.classes_table(sections)

# %% [markdown]
# **Adaptive classification** starts with the shortest prefix and stops as soon as its largest probability passes a threshold; thresholds are tuned on validation texts.

# %% tags=["nbval-check-output"]
print(tables.stops_said(sections))

# %% [markdown]
# The average hides who pays: an easy text stops at two or four numbers, a hard one reads all 64. The chapter on adaptive computation does the same with layers.

# %% [markdown]
# ## What it costs and saves
#
# Training takes seconds, because the encoder is frozen and only the map learns. What is saved depends on what you keep. Nested vectors save *work* when all numbers stay in memory for the second look, and *memory* when the rest is thrown away:

# %% tags=["nbval-check-output"]
tables.storage_table()

# %% [markdown]
# Are fewer multiplications less time? Here and now, one query at a time, as a server gets them, with prefixes that were divided beforehand. Choosing the best of 10,000 scores and gathering scattered rows take time as well, so expect less than the count says. (In large batches one look can even be faster: a single large product is what processors do best.)

# %%
whole = searched.seconds(128, 0)
for m, shortlist in ((64, 0), (16, 0), (16, 50), (16, 200)):
    took = searched.seconds(m, shortlist)
    print(f"{m:2} numbers, shortlist {shortlist:3}: {took / whole:.2f} of exact search's time")

# %% [markdown]
# ## On a real model
#
# MiniLM *is* the real model: everything above was measured on its vectors. What the page has not shown yet is the way from a text to an answer. Type your own wish:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(live.ask(searched, "play chess against the computer"))
    print("least cosine with what is stored: {:.4f}, {} synopses".format(*live.agreement(searched)))
else:
    print(tables.stored("vectors"))

# %% [markdown]
# ## Where it breaks
#
# **The division is forgotten.** Libraries cut vectors for you, and their indexes take whatever they are given; an inner-product index on prefixes that were not divided ranks by length as well as by direction. A trained map does not keep lengths, so here it hurts even at all 384 numbers:

# %% tags=["nbval-check-output"]
print(tables.undivided_said(dimensions))
tables.undivided_table(dimensions)

# %% [markdown]
# **A vector that was never nested is cut.** The row *MiniLM, cut* of the table above is what a reader gets who sets `truncate_dim=16` on an encoder that was not trained for it. At 128 of 384 numbers little is lost; at 16 it is another search.
#
# **Only the query is cut.** An index built over all numbers cannot be asked with fewer; build one for each length that you serve. **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
index = matryoshka.Hnsw(documents[:500], dims=32)
for attempt in (
    lambda: index.search(queries[:, :16], 10, ef=40),
    lambda: index.search(queries, 10, ef=5),
    lambda: matryoshka.matryoshka_loss(queries, own, (64, 16)),
    lambda: matryoshka.matryoshka_loss(queries, own, (16, 256)),
    lambda: matryoshka.adaptive_retrieval(queries, documents, dims=16, shortlist=20_000),
    lambda: matryoshka.funnel(queries, documents, dims=(8, 16, 128), shortlists=(50, 100)),
    lambda: matryoshka.search(queries / 0, documents),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.matryoshka import exercises

for exercise in (exercises.cutting, exercises.working, exercises.training):
    print(exercise)

# %% [markdown]
# **1.** The cosines of every query with every document by the first `m` numbers.


# %% tags=["exercise", "nbval-check-output"]
def cosines(q, d, m):
    """q is (queries, dim), d is (documents, dim); return (queries, documents)."""
    raise NotImplementedError


_ = exercises.cutting.check(cosines)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Cut first. `x.norm(dim=1, keepdim=True)` is the length of each row of what is left.
#
# </details>


# %% tags=["solution"]
exercises.cutting.solution()

# %% [markdown]
# **2.** A funnel looks more than twice: `dims[0]` numbers of all documents, `dims[1]` of the best `shortlists[0]`, and so on. How many multiplications does one query take?


# %% tags=["exercise", "nbval-check-output"]
def multiplications(documents, dims, shortlists):
    """dims has one entry more than shortlists; return a whole number."""
    raise NotImplementedError


_ = exercises.working.check(multiplications)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write down, step by step, how many documents are compared and by how many numbers. Later looks compare all numbers of their prefix again.
#
# </details>


# %% tags=["solution"]
exercises.working.solution()

# %% [markdown]
# **3.** The nested loss, with scale 20 and all weights 1.


# %% tags=["exercise", "nbval-check-output"]
def loss(q, d, dims):
    """Row i of d belongs to row i of q; return a number."""
    raise NotImplementedError


_ = exercises.training.check(loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# For each length: your cosines of exercise 1, times 20, and `torch.nn.functional.cross_entropy` with the labels 0, 1, 2, …
#
# </details>


# %% tags=["solution"]
exercises.training.solution()

# %% [markdown]
# ## Gallery
#
# **Funnel retrieval** (Kusupati et al., 2022). More than two looks: shortlists that shrink while prefixes grow. Use it where even $K D$ is too much. Here, with 8, 16, 32, 64 and 384 numbers and shortlists of 400, 100, 50 and 20:

# %% tags=["nbval-check-output"]
print(tables.funnel_said(shortlists))

# %% [markdown]
# **MRL-E** (Kusupati et al., 2022). One head for all prefixes: $\text{logits}_m = z_{1:m} W_{1:m}^\top + b$. Use it when the number of classes is so large that heads outweigh the rest. `MatryoshkaHeads(…, tied=True)`.
#
# **Fewer lengths a step**. With a costly loss, draw a few lengths from $\mathcal M$ at each step (sentence-transformers calls it `n_dims_per_step`); call `matryoshka_loss` with those. Use it when the comparisons, not the encoder, take the time.
#
# **Principal components**. $z = P e$ with the eigenvectors of $\sum_i e_i e_i^\top$ as rows of $P$, the largest first. Any encoder's vectors become nested that way, without pairs and without training. Use it when you cannot train, and as the number to beat when you can. `principal_map`.
#
# **IVF**. Lists around centres instead of a graph. It is built faster and takes no memory for links; the table above shows both. Use it for collections that change often or do not fit into memory. `Ivf`.
#
# **Which one?** If you can train on pairs of your own, train nested: it costs nothing afterwards. If you search some ten thousand documents exactly, look twice. If you search millions, take HNSW first, measure, and cut the vectors where the comparisons or the memory still cost too much. And say first what must not be lost: the right answer, or every neighbour.
#
# ## Further reading
#
# Kusupati et al., *Matryoshka Representation Learning*, NeurIPS 2022, arXiv 2205.13147. Henderson et al., *Efficient Natural Language Response Suggestion for Smart Reply*, 2017, arXiv 1705.00652. Malkov and Yashunin, *HNSW*, 2016, arXiv 1603.09320.
# Douze et al., *The Faiss library*, 2024, arXiv 2401.08281. Reimers and Gurevych, *Sentence-BERT*, 2019, arXiv 1908.10084. Kumar, *Google Research, 2022 & beyond: Algorithms for efficient deep learning*, 2023.
