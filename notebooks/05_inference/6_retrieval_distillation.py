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
# # Distilling retrievers
#
# **A search engine reads its documents once and every query as it comes. The query encoder is what has to be fast, so a small one learns where a large one puts each query, and searches the index that the large one made.**
#
# After this chapter you can
#
# - tell a dual encoder from a cross-encoder, and say what each costs for a million documents;
# - choose a loss on scores by what it is blind to;
# - match embeddings as well as scores, and say by how much a score can then be off;
# - let a student inherit its teacher's index, and know when that does not pay;
# - tell a model that cannot rank from one that has learned its training queries by heart.
#
# You need the tour (`00_start_here`) and the chapter on distillation (`05_inference/5_distillation`). Score losses, embedding matching, frozen documents and dual pooling are taught in depth; a gallery near the end introduces the rest.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/6_retrieval_distillation")

# %% [markdown]
# ## The picture
#
# Every Debian package has a synopsis, such as "fast syntax checker for shell scripts", and a longer description. Given a new synopsis, which of a thousand descriptions belongs to it? The teacher is `minilm-l6`, a sentence encoder of six layers that is widely used for search. The students are its first layers, cut off and trained further on 512 other packages.

# %%
from effnb.chapters.inference.retrieval_distillation import drawings, tables

grid = tables.grid()
drawings.found(grid)

# %% tags=["nbval-check-output"]
print(tables.picture_said(grid))

# %% [markdown]
# Each group of bars is one student. The grey bars learned from labels: which description belongs to which synopsis. The coloured bars learned from the teacher, by three losses that this chapter explains. A student without layers is hardly a network at all: it averages the embeddings of a text's tokens and multiplies by one matrix.
#
# On the left the student reads the queries only, and searches the index that the teacher made. On the right one small encoder reads both queries and descriptions.
#
# **Predict first:** the panel takes your guess before it answers. Then see whose documents are better. When you run this page, change the loss and shrink the embedding, too.

# %%
from effnb.chapters.inference.retrieval_distillation import panels

panels.search(grid)

# %% [markdown]
# ## The idea
#
# ### Two ways to compare texts
#
# A **dual encoder** turns a query $q$ into a vector, its **embedding**, and a document $d$ into another. Their product is the score:
#
# $$s(q, d) = \langle E_Q(q),\, E_D(d) \rangle.$$
#
# The documents' vectors do not depend on the query. They are computed once and kept in an **index**, where a nearest-neighbour search finds the best. A **cross-encoder** joins both texts into one and reads them together, so that every token of the query can look at every token of the document. It usually ranks better, but it must read all documents again for every query, so in practice it only re-orders a few candidates. A pair of three and two tokens, as a cross-encoder sees it:

# %% tags=["nbval-check-output"]
from effnb.inference import retrieval_distillation

pair = retrieval_distillation.join([[11, 12, 13]], [[21, 22]], start=1, separator=2)
for name in ("input_ids", "token_type_ids", "query", "document"):
    print(f"{name:14} {pair[name][0].int().tolist()}")

# %% [markdown]
# The last two lines mark the tokens of either text. A **dual-pooled** cross-encoder uses them: it reads both texts together, then averages the query's tokens and the document's tokens separately, and scores by the product of the two averages. It reads like a cross-encoder, and still has two embeddings that a student can copy (Kim et al., 2023).
#
# ### What a ranking needs of a score
#
# Let $t_j$ be the teacher's score of document $j$ for some query, $s_j$ the student's, and $+$ the right document. Four losses, each a mean:
#
# $$\begin{aligned} \text{pointwise} &: (s_j - t_j)^2 \\ \text{softmax KL} &: \mathrm{KL}\bigl(\operatorname{softmax}(t) \,\|\, \operatorname{softmax}(s)\bigr) \\ \text{MarginMSE} &: \bigl((s_+ - s_j) - (t_+ - t_j)\bigr)^2 \\ \text{order only} &: \max\bigl(0,\ \min(t_+ - t_j,\ m) - (s_+ - s_j)\bigr)^2 \end{aligned}$$
#
# A difference $t_+ - t_j$ is called a **margin**. A ranking only depends on the order of the scores, so a loss should not punish what leaves the order alone. Here are five students of one teacher:

# %% tags=["nbval-check-output"]
tables.losses_table()

# %% [markdown]
# The first of them exchanges the two wrong documents. Three losses mind; the last does not, because the right document is still ahead of both by as much as it asks for, at most $m = 1$. A constant added to all scores of a query changes no order. Only the pointwise loss minds it, and spends the student's capacity on it. A cross-encoder's scores may lie anywhere, while the cosines of a dual encoder lie between −1 and 1, so this matters in practice.
#
# MarginMSE (Hofstätter et al., 2020) compares margins, but it pulls a student back that is *further* ahead than its teacher. The last loss does not: a margin is wanted only up to $m$, and more costs nothing. It is this workbook's own, made to show what keeping the order alone means. Menon et al. (2022) argue for losses that keep the order; their loss is another one.

# %%
panels.scores()

# %% [markdown]
# ### The same scores in another place
#
# A student whose scores are perfect may still be unable to use its teacher's index. Turn all of its embeddings by the same angle, and no score changes:

# %%
drawings.geometry()

# %% tags=["nbval-check-output"]
print(tables.turned_said())

# %% [markdown]
# In the mixed plane the student's query meets the teacher's documents, and the wrong one comes first. **EmbedDistill** (Kim et al., 2023) therefore matches the embeddings too:
#
# $$R_Q = \frac1n \sum_q \lVert E^T_Q(q) - W E^S_Q(q) \rVert_2, \qquad R_D = \frac1m \sum_d \lVert E^T_D(d) - W E^S_D(d) \rVert_2.$$
#
# $T$ marks the teacher's encoder, $S$ the student's. The matrix $W$ is needed where widths differ, and stays part of the student when it is used. Note that this is the length itself, not its square. Embeddings that are close give scores that are close:
# <a id="equation-4"></a>
#
# $$\lvert t - s \rvert \le \lVert q_T - q_S \rVert\, \lVert d_T \rVert + \lVert q_S \rVert\, \lVert d_T - d_S \rVert. \tag{4}$$
#
# Here $q_T$ is short for $E^T_Q(q)$, and so on. The second term vanishes if the student *inherits* the teacher's document encoder and leaves it **frozen**: $d_S = d_T$. Then only queries have to be learned, the student's index is the teacher's, and nothing has to be encoded again. Two numbers for each pair, the gap and what the distances allow:

# %% tags=["nbval-check-output"]
(q, d), (a, b) = tables.turned(60)
pairs = ((q.expand(3, 2), d), (a.expand(3, 2), b))
frozen = ((q.expand(3, 2), b), (a.expand(3, 2), b))
for name, given in (("own documents", pairs), ("the teacher's", frozen)):
    gap, bound = retrieval_distillation.score_gap_bound(*given)
    print(f"{name:13}: gap {gap.abs().max():.2f}, bound {bound[gap.argmax()]:.2f}")

# %% [markdown]
# For the turned student the bound of [equation 4](#equation-4) is far from tight: its scores are right although its embeddings are not. A bound promises that matching is *enough*; it does not say that it is *needed*.
#
# ### Queries that cost nothing
#
# Embeddings need no labels: any text will do as a query. The paper lets a model write queries. Here they are pieces of descriptions with words left out, which is cruder and free:

# %% tags=["nbval-check-output"]
import torch

from effnb.chapters.inference.retrieval_distillation import texts

words = texts.encoder().tokenizer
some = [torch.tensor(row) for row in texts.pairs("train", 24).documents]
draw = torch.Generator().manual_seed(3)
made, real = retrieval_distillation.made_queries(some, 5, generator=draw)
for row, mask in zip(made, real):
    print("-", words.decode(row[mask]))

# %% [markdown]
# ## The code
#
# The losses are a line each. This is EmbedDistill's:

# %%
from effnb.lab import show

show(retrieval_distillation.embed_distill)

# %% [markdown]
# A student that inherits the documents is a dual encoder with the teacher's document side, frozen, and a query encoder of its own:

# %%
show(retrieval_distillation.inherit_documents)

# %% [markdown]
# And dual pooling:

# %%
show(retrieval_distillation.CrossEncoder)

# %% [markdown]
# Is the index really the same, after training? Every number of it is compared:

# %% tags=["nbval-check-output"]
print(tables.same_index())

# %% [markdown]
# ## Turn the knob
#
# The panel at the top has the knobs: layers, embedding size, loss, and whose documents. With all 384 numbers the whole grid reads:

# %%
tables.grid_table(grid)

# %% [markdown]
# Look at three things: what copying embeddings adds to copying scores, what training on labels alone reaches, and the difference between the two rows of each depth. Does it pay to inherit the index?

# %% tags=["nbval-check-output"]
print(tables.frozen_said(grid))

# %% [markdown]
# A verdict of "better" or "worse" is from the queries of one run, paired; where it says "indistinguishable", the interval allows both.
#
# A shared small encoder has an advantage that is easy to overlook: it makes the same mistakes on both sides: a rare word is put in the same odd place in the synopsis and in the description, and the two still meet. A student that searches the teacher's index must put every word where six layers put it. That is harder, and it is the price of an index that need not be built again.
#
# ### Capacity or generalization?
#
# A dual encoder may rank worse than a cross-encoder because two vectors cannot express what a joint reading can, which would be a lack of **capacity**. Or it may fit its training queries just as well and do worse on new ones, which is a lack of **generalization**. The remedies differ: wider embeddings for the first, better supervision for the second. So compare training queries with new ones:

# %%
sizes = tables.stored("sizes").data["table"]
drawings.sizes(sizes)

# %%
tables.sizes_table(sizes)

# %% [markdown]
# Both kinds of model start from MiniLM's first two layers and see the same 320 queries, each with its own description and three others that share words with it. Candidates are chosen by shared words, weighted by rarity, so that no model has a say in what is hard.

# %% [markdown]
# ## Does it hold?
#
# Two claims of the ledger belong to this chapter. Their parts and bounds were registered before anything was measured, verdicts are computed from stored results, and a part without a stored run is *not tested*. Distilled students are compared with the same student on labels alone, in equal steps *and* at equal compute, over five seeds.

# %%
from effnb.chapters.inference.retrieval_distillation import verdicts
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(*(judge(*measured) for judge in verdicts.ALL))

# %% [markdown]
# One caution about the first claim. MiniLM was trained as a dual encoder on a very large number of pairs, and a cross-encoder that starts from it has a few hundred queries to learn joint reading from. The published comparison has cross-encoders that were trained on far more.

# %% [markdown]
# ## What it costs and saves
#
# Each query is read once, at the moment that somebody waits for the answer:

# %% tags=["nbval-check-output"]
tables.costs_table()

# %% tags=["nbval-check-output"]
print(tables.index_said())

# %% [markdown]
# The index dwarfs the model, and the embedding size decides on it. Time depends on the machine:

# %%
print(tables.timed_said())

# %% [markdown]
# Distillation itself is cheap here. What the teacher says of a text depends on no student, so queries and documents are read once and kept; with inherited documents, a training step reads nothing but short queries.

# %% [markdown]
# ## On a real model
#
# MiniLM is the real model of this chapter. Live, in a few seconds: it reads a small course, and a student without layers learns from it.

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(tables.live_said())
else:
    print(tables.picture_said(grid))

# %% [markdown]
# ## Where it breaks
#
# **Cosines in a softmax.** Three cosines of 0.9, 0.5 and 0.2 are far apart as cosines go. A softmax hardly sees it, and a student of these probabilities learns next to nothing. Multiply first, or lower the temperature:

# %% tags=["nbval-check-output"]
print(tables.scale_said())

# %% [markdown]
# **A new query encoder on an old index.** The turned plane above: a student trained on scores alone, with documents of its own, has embeddings that mean nothing in its teacher's index. Either match embeddings, or train with the index that you will search.
#
# **A projection that is thrown away.** If $W$ was learned to make embeddings comparable, it belongs to the student. Without it the query is in another space.
#
# **One side scaled to length 1.** The teacher's embeddings have length 1 here. If the student's do not, their distance mostly measures length.
#
# **Right documents that count as wrong.** In a batch, the other queries' documents serve as wrong ones. Two packages built from one source have nearly the same description. The corpus here takes one package of each source; the teacher's scores are a second remedy, since they say that both fit.
#
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
s, t = torch.zeros(2, 3), torch.ones(2, 4)
some = torch.zeros(2, 8)
attempts = {
    "other candidates": lambda: retrieval_distillation.margin_mse(s, t),
    "one candidate": lambda: retrieval_distillation.softmax_kl(s[:, :1], t[:, :1]),
    "temperature": lambda: retrieval_distillation.softmax_kl(s, s, temperature=0.0),
    "other widths": lambda: retrieval_distillation.embed_distill(some, torch.zeros(2, 16)),
    "margin": lambda: retrieval_distillation.order_only(s, s, -1.0),
    "not a teacher": lambda: retrieval_distillation.inherit_documents(
        texts.encoder().model, texts.encoder().model
    ),
    "empty document": lambda: retrieval_distillation.made_queries([torch.zeros(0)], 1),
}
print(tables.refusals(attempts))

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.retrieval_distillation import exercises

for exercise in exercises.ALL:
    print(exercise)

# %% [markdown]
# **1.** MarginMSE. The right document is in the first column.


# %% tags=["exercise", "nbval-check-output"]
def margin_loss(s, t):
    """s, t are (queries, documents): the student's and the teacher's scores."""
    raise NotImplementedError


_ = exercises.margins.check(margin_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A slice such as `x[:, :1]` keeps the axis, so that it can be subtracted from the other columns. How many margins does a query with four documents have?
#
# </details>


# %% tags=["solution"]
exercises.margins.solution()

# %% [markdown]
# **2.** The mean distance between where the teacher puts a text and where the student does, after the student's projection $W$.


# %% tags=["exercise", "nbval-check-output"]
def distance(s, t, W):
    """s is (texts, student's width), t (texts, teacher's width), W (teacher's, student's)."""
    raise NotImplementedError


_ = exercises.lengths.check(distance)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Each row of `s` is a text. Which way round must $W$ stand for a row? Then one length a row.
#
# </details>


# %% tags=["solution"]
exercises.lengths.solution()

# %% [markdown]
# **3.** By how much can a student's score be off, if only the distances of its embeddings are known? Derive [equation 4](#equation-4): write $\langle a, b \rangle - \langle q, d \rangle$ as two products, each with one difference in it.


# %% tags=["exercise", "nbval-check-output"]
def bound_of(q, d, a, b):
    """q, d are the student's embeddings of a query and a document; a, b are the teacher's."""
    raise NotImplementedError


_ = exercises.gap.check(bound_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Add and subtract $\langle q, b \rangle$, the student's query with the teacher's document. Then use $\lvert \langle x, y \rangle \rvert \le \lVert x \rVert\, \lVert y \rVert$ twice.
#
# </details>


# %% tags=["solution"]
exercises.gap.solution()

# %% [markdown]
# ## Gallery
#
# **Pointwise distillation** is the plain form: copy each score. The variant for scores that are logits of relevance compares probabilities, $\mathrm{CE}(\sigma(t), \sigma(s))$, with the logistic function $\sigma$ (`pointwise(..., logistic=True)`). Use it when a score must mean the same for every query, as with a threshold of relevance.
#
# **Softmax KL over a list** (Lin, Yang and Lin, 2020). Their teacher is itself a fairly fast model that answers while the student trains, so that all documents of a batch can be candidates. With temperatures of their own for teacher and student, scores of different scales can be compared. Use it when you have several candidates for each query.
#
# **MarginMSE** needs only pairs of a right and a wrong document. Use it when the teacher is a cross-encoder and every score is expensive.
#
# **Matching the cosine, or the squared distance**, in place of the length: `metric="cosine"` and `metric="mse"`. The first ignores lengths and suits normalized embeddings; the second is dominated by the texts that are furthest off.
#
# **From a cross-encoder, embeddings too.** A dual-pooled teacher gives a query's embedding for each document that it is read with. The student has only one; match it to the one that was read with the right document. The claims table has the measurement.
#
# **Which one?** If you own a good dual encoder and its index is large, keep the index and distil the query encoder, with embeddings and scores. If documents can be encoded again, let a small shared encoder read both sides and compare. If you own a cross-encoder, distil its margins or its softmax, and look at new queries, never at training queries.
#
# ## Further reading
#
# Menon et al., *In defense of dual-encoders for neural ranking*, ICML 2022. Hofstätter et al., *MarginMSE*, 2020, arXiv 2010.02666. Lin, Yang and Lin, 2020, arXiv 2010.11386. Kim et al., *EmbedDistill*, 2023, arXiv 2301.12005. Hinton, Vinyals and Dean, 2015, arXiv 1503.02531.
