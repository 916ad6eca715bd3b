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
# # Retrieval
#
# **A language model stores what it knows in its weights. It can also look things up: then the knowledge lies in a list that grows without training.**
#
# After this chapter you can
#
# - give a decoder a memory of any text, without training anything;
# - choose the memory's share, its neighbours and its temperature, and say on which texts to choose them;
# - state which token may read which retrieved chunk, and find the off-by-one that leaks the future;
# - say how many parameters a datastore is worth, and where that number stops being measured;
# - tell memory from copying: check how much of the test text is in the datastore.
#
# You need the tour (`00_start_here`), softmax and cross-attention. kNN-LM and RETRO are taught in depth; a gallery near the end introduces the relatives.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/4_retrieval")

# %% [markdown]
# ## The picture
#
# Our three decoders were trained on the same text and differ in size. They read descriptions of software packages that they have never seen. Each also reads them with a **datastore**: a list of other descriptions, in which it looks up what followed the contexts most like the current one. **Loss** is the mean negative logarithm of the probability of the token that came, in **nats**; lower is better.

# %%
from effnb.chapters.design.retrieval import drawings, tables

sizes = tables.stored("sizes").data["table"]
drawings.result(sizes)

# %% tags=["nbval-check-output"]
print(tables.worth_said(sizes))

# %% [markdown]
# The horizontal dotted line is the question of this chapter: how far to the right does a datastore move a model?

# %% [markdown]
# ## The idea
#
# ### Keys and values
#
# A decoder turns a context $c$ into a vector $f(c)$. Contexts that continue alike get similar vectors, because one output layer has to read them all. **kNN-LM** (Khandelwal et al., 2020) uses that. It runs the decoder once over a text and keeps, for every token, a **key**, the vector of the context, and a **value**, the token that came next. As the key it takes the input of the last feed-forward layer, after its norm.
#
# To predict, it finds the $k$ keys $k_i$ nearest to $f(c)$ by the squared distance $d$, and lets their values $v_i$ vote, near ones more than far ones:
#
# $$p_\text{kNN}(y \mid c) = \sum_i 1[v_i = y]\; \frac{e^{-d(k_i, f(c)) / \tau}}{\sum_j e^{-d(k_j, f(c)) / \tau}}.$$
#
# The **temperature** $\tau$ says how fast a vote fades with distance. The vote is mixed with the decoder's own prediction; $\lambda$ is the share of the neighbours:
# <a id="equation-2"></a>
#
# $$p(y \mid c) = \lambda\, p_\text{kNN}(y \mid c) + (1 - \lambda)\, p_\text{LM}(y \mid c). \tag{2}$$
#
# By hand: three neighbours at squared distances 0, 1 and 1 say *cat*, *dog*, *cat*. Their weights are $1$, $e^{-1}$ and $e^{-1}$, divided by their sum:

# %% tags=["nbval-check-output"]
import torch

from effnb.design import retrieval

CAT, DOG, FOX = 0, 1, 2
log_knn = retrieval.knn_log_probabilities(
    torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([[CAT, DOG, CAT]]), vocabulary=3
)
log_lm = torch.tensor([[0.2, 0.2, 0.6]]).log()
for lam in (0.0, 0.25, 1.0):
    p = retrieval.interpolate(log_lm, log_knn, lam).exp()[0]
    print(f"share {lam:4}: cat {p[CAT]:.2f}, dog {p[DOG]:.2f}, fox {p[FOX]:.2f}")

# %% [markdown]
# With a share of 1 in [equation 2](#equation-2), the fox gets no probability at all, because no neighbour said it; if it comes, the loss is infinite. That is why the decoder keeps a share of the prediction.
#
# ### Chunks
#
# kNN-LM changes the prediction and leaves the network alone. **RETRO** (Borgeaud et al., 2022) lets the network *read* what is found. It cuts a text into chunks of $m$ tokens, and looks for each chunk's nearest chunks in other documents. A **neighbour** is such a chunk with what followed it, $r = 2m$ tokens. A small encoder reads the neighbours of chunk $C_u$ in both directions, attends to the decoder's rows $H_u$ of that chunk, and gives $E_u$. In some layers, between attention and feed-forward, the decoder attends to them:
#
# $$H \leftarrow H + \operatorname{CCA}(H, E).$$
#
# This is **chunked cross-attention**, and its whole difficulty is *when*. The neighbours of $C_u$ were found with all tokens of $C_u$. A token in the middle of the chunk must not read them: they were chosen by looking at tokens that it has yet to predict. The first token that may is the *last* of the chunk, which sees all of it and predicts the first token of the next. So, counted from 0, the rows
#
# $$(u + 1)\,m - 1, \;\dots,\; (u + 2)\,m - 2 \quad \text{read } E_u,$$
#
# and the first $m - 1$ rows read nothing.
#
# **RETRO-fitting** freezes a trained decoder and trains only the encoder and the cross-attention. Without neighbours the model is the old decoder, to the last bit.

# %% [markdown]
# ## The code
#
# The vote and the mixture:

# %%
from effnb.lab import show

show(retrieval.knn_log_probabilities, retrieval.interpolate)

# %% [markdown]
# Chunked cross-attention shifts the rows to the left by $m - 1$, cuts them into groups, attends, and shifts back:

# %%
from effnb.design.retrieval import chunked_attention

show(chunked_attention.attending_groups, chunked_attention.from_groups)

# %% [markdown]
# In the tests, exact search finds what scikit-learn's and FAISS's brute force find, and the shift gives what the definition gives, row by row. Here is the datastore of this page, built now:

# %%
from effnb.chapters.design.retrieval import live

here = live.live()
here

# %% [markdown]
# Two checks: a share of 0 gives the plain decoder, and a text that is in the datastore, looked up with one neighbour and a share of 1, is predicted with certainty.

# %% tags=["nbval-check-output"]
known = torch.tensor([here.shelf[0][:40]])
joined = retrieval.KnnLm(here.model, here.store, lam=0.0, k=1)
with torch.no_grad():
    alone = here.model(input_ids=known).logits.log_softmax(-1)
print("a share of 0 is the decoder:", torch.equal(joined(known).logits, alone))
print(f"its own text, share 1: loss {joined.look_up(known).losses(1.0).mean():.3f}")

# %% [markdown]
# The gradient shows which token reads which neighbours. Chunks have 4 tokens here:

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
layer = retrieval.ChunkedCrossAttention(8, 2, chunk=4, neighbour=8)
torch.nn.init.normal_(layer.attention.out.weight)
E = torch.randn(1, 3, 1, 8, 8, requires_grad=True)
out = layer(torch.randn(1, 12, 8), E, torch.ones(1, 3, 1, 8, dtype=torch.bool))
for token in (0, 2, 3, 6, 7, 11):
    (g,) = torch.autograd.grad(out[0, token].sum(), E, retain_graph=True)
    print(f"token {token:2} reads", g.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist())

# %% [markdown]
# ## Turn the knob
#
# The texts were looked up once for each size of the datastore. Every other knob only changes how the same neighbours vote, so it answers at once.

# %%
from effnb.chapters.design.retrieval import panels

panels.memory(here)

# %% [markdown]
# Things to try:
#
# - raise the share to its upper end. Why does the loss rise although many tokens gain?
# - with one neighbour, which share is best? And with 64?
# - go from 1,000 to 5,000 and to 30,000 entries. Each step is a factor of five or six: does each bring the same gain?
#
# Many tokens lose a little: the neighbours' share is taken from them. A few gain a lot. Here is one of them:

# %%
print(live.example_said(here))

# %% [markdown]
# The second panel is RETRO's question. Where may a token start to read?

# %%
panels.alignment()

# %% [markdown]
# ## Does it hold?
#
# One claim of the ledger belongs to this chapter: retrieval makes a language model far more parameter-efficient; RETRO reports a factor of 25. Share, neighbours and temperature were chosen on validation texts, never on those that are judged.

# %%
from effnb.chapters.design.retrieval import verdicts
from effnb.lab import claims_table

claims_table(verdicts.s_m7(*verdicts.stored()))

# %% [markdown]
# **What a datastore is worth.** A fitted curve tells where on the line of plain decoders a loss lies. Beyond the largest decoder the answer is only a bound.

# %% tags=["nbval-check-output"]
tables.worth_table(sizes)

# %% [markdown]
# **Size.** kNN-LM's loss is often close to a straight line over the logarithm of the entries. If so, each *doubling* brings the same gain, and costs twice as much as the last:

# %% tags=["nbval-check-output"]
print(tables.growth_said(sizes))

# %% [markdown]
# **Settings.** One at a time, the others as chosen:

# %%
knobs = tables.stored("knobs").data["table"]
drawings.knobs(knobs)

# %% tags=["nbval-check-output"]
print(tables.knobs_said(knobs))
print(tables.keys_said(tables.stored("keys").data["table"]))

# %% [markdown]
# **Another domain.** None of our decoders was trained on German. The datastore is all the German that they get:

# %% tags=["nbval-check-output"]
print(tables.adaptation_said(tables.measured("adaptation").data["table"]))

# %% [markdown]
# **RETRO, fitted.** The control is what makes this an experiment. A decoder that was fitted with new parameters may gain for other reasons than reading, so it is also given *random* neighbours:

# %% tags=["nbval-check-output"]
print(tables.retro_said(tables.measured("retro").data["table"]))
tables.neighbours_table(tables.stored("neighbours").data["table"])

# %% [markdown]
# ## What it costs and saves
#
# The table above shows the bill: the datastore of a small decoder takes many times as many bytes as its weights. An entry of `mini-300k` has 64 numbers of 2 bytes and a token. What is saved is not memory but *arithmetic* and *training*: the multiplications of a larger decoder, and the time to train it. The search has to be paid for as well. A query compares its $D$ numbers with $N$ keys:

# %% tags=["nbval-check-output"]
for N in (30_000, 200_000, 100_000_000):
    print(f"{N:11,} entries: {N * 64 / 1e6:8,.1f} million multiplications a token, exactly")
print(f"mini-300k itself: {336_192 / 1e6:.1f} million")

# %% [markdown]
# So large datastores are not searched exactly. FAISS divides the keys among lists, and a query looks into the nearest few (the chapter on Matryoshka explains how). What do the neighbours cost that are missed?

# %% tags=["nbval-check-output"]
tables.approximate_table(tables.stored("approximate").data["table"])

# %% [markdown]
# ## On a real model
#
# SmolLM2 has 135 million parameters. Give it a small memory of your own text, and see what it says afterwards. Nothing is trained; a fact is added by adding entries.

# %% tags=["real-model"]
from effnb.chapters.design.retrieval import own_text
from effnb.lab import results

if results.live():
    print(own_text.told("The password of the library in Toverland is marmalade."))
else:
    print("Run this page in a live kernel to try a text of your own.")

# %% [markdown]
# ## Where it breaks
#
# **The test text is in the datastore.** Then the nearest key is the text itself, and the loss measures copying. The mistake is easy to overlook, because corpora repeat themselves. So report the gain beside the longest run of tokens that a chunk shares with the datastore:

# %% tags=["nbval-check-output"]
overlap = tables.stored("overlap").data["table"]
print(tables.leaked_said(overlap))
tables.overlap_table(overlap)

# %% [markdown]
# **The distances are not on the scale of τ.** A squared distance grows with the width of the key. With τ far too small one neighbour takes all the weight; with τ far too large the nearest counts no more than the last.
#
# **Reading starts at the wrong row.** In the panel above, *first of its chunk* leaks: training loss falls wonderfully, and generation fails. *First of the next* is safe and wastes one token in each chunk.
#
# **The neighbour is the text itself.** In training, a chunk's nearest chunk is itself, and its continuation is the answer. `ChunkStore.neighbours` takes the documents to `exclude`.
#
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
empty = torch.zeros(0, 64), torch.zeros(0).long(), torch.zeros(0).long()
for attempt in (
    lambda: retrieval.Datastore(*empty),
    lambda: retrieval.build_datastore(here.model, [[5]]),
    lambda: retrieval.KnnLm(here.model, here.store, lam=1.2),
    lambda: retrieval.KnnLm(here.model, here.store, k=10**6),
    lambda: retrieval.KnnLm(here.model, here.store, temperature=0),
    lambda: retrieval.Retro(here.model, layers=(7,)),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.retrieval import exercises

for exercise in (exercises.neighbours, exercises.mixing, exercises.alignment):
    print(exercise)

# %% [markdown]
# **1.** The neighbours' vote: a probability for each of `vocabulary` tokens.


# %% tags=["exercise", "nbval-check-output"]
def vote(distances, values, vocabulary, tau):
    """distances and values have k entries; return vocabulary probabilities."""
    raise NotImplementedError


_ = exercises.neighbours.check(vote)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A softmax over the k neighbours; then `index_add` or a loop puts each weight where its token is.
#
# </details>


# %% tags=["solution"]
exercises.neighbours.solution()

# %% [markdown]
# **2.** The logarithm of the mixture from two logarithms, also where both probabilities are too small for a float, and where the neighbours give none.


# %% tags=["exercise", "nbval-check-output"]
def mix(log_lm, log_knn, lam):
    """Three floats, log_knn may be -inf; return a float."""
    raise NotImplementedError


_ = exercises.mixing.check(mix)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# $\ln(e^a + e^b) = \max(a, b) + \ln(1 + e^{-|a - b|})$ with $a = \ln\lambda + \ln p_\text{kNN}$. Treat the shares 0 and 1 apart.
#
# </details>


# %% tags=["solution"]
exercises.mixing.solution()

# %% [markdown]
# **3.** Which chunk's neighbours may this token read? Answer −1 where it may read none.


# %% tags=["exercise", "nbval-check-output"]
def chunk_read(token, m):
    """Token and chunks are counted from 0; chunks have m tokens."""
    raise NotImplementedError


_ = exercises.alignment.check(chunk_read)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# How many chunks are complete once the token itself has been read?
#
# </details>


# %% tags=["solution"]
exercises.alignment.solution()

# %% [markdown]
# ## Gallery
#
# **Continuous cache** (Grave et al., 2017). A datastore of the text read so far, $p_\text{cache}(y) \propto \sum_i 1[v_i = y]\, e^{\theta f(c)^\top f(c_i)}$. Use it for long texts with names of their own: build a `Datastore` of what was read and `joined` it to another.
#
# **REALM** (Guu et al., 2020). The retriever is trained with the reader: $p(y \mid x) = \sum_z p(y \mid x, z)\, p(z \mid x)$ over retrieved documents $z$. Use it when plain similarity finds the wrong documents.
#
# **Retrieval in the prompt** (RAG; Lewis et al., 2020). Found passages are put before the question: $p(y \mid x) \approx \sum_z p(z \mid x)\, p(y \mid z, x)$. Use it with a model that you cannot change; it takes context instead of new layers.
#
# **Which one?** To adapt a decoder to a text at once, and to see exactly what it looked up, take kNN-LM. If you can train a few new layers and want each found chunk to serve many tokens, take RETRO. If you can only send a prompt, put what you find into it. In all three, check the overlap before you believe the gain.
#
# ## Further reading
#
# Khandelwal et al., *Generalization through Memorization: Nearest Neighbor Language Models*, ICLR 2020, arXiv 1911.00172. Borgeaud et al., *Improving language models by retrieving from trillions of tokens*, ICML 2022, arXiv 2112.04426. Grave et al., *Improving Neural Language Models with a Continuous Cache*, 2017, arXiv 1612.04426.
# Guu et al., *REALM*, 2020, arXiv 2002.08909. Lewis et al., *Retrieval-Augmented Generation*, 2020, arXiv 2005.11401. Kaplan et al., *Scaling Laws for Neural Language Models*, 2020, arXiv 2001.08361. Douze et al., *The Faiss library*, 2024, arXiv 2401.08281. Treviso et al., *Efficient Methods for NLP: A Survey*, 2023, arXiv 2209.00099.
