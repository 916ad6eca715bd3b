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
# # Retention
#
# **A layer in place of attention that can be computed in three ways with one result: all tokens at once, one token at a time, or chunk by chunk. What it keeps of a text has a fixed size.**
#
# After this chapter you can
#
# - compute retention by hand in its parallel and its recurrent form, and say why they agree;
# - choose the size of a chunk, and say what it costs;
# - tell from how many tokens on a state of fixed size is smaller than a cache, and from how many on it is faster;
# - find the mistake that makes the three forms of published code disagree;
# - compare RetNet, RWKV, Hyena and gated linear attention, trained on the same tokens.
#
# You need the tour (`00_start_here`), and you should know what queries, keys and values are. RetNet, RWKV-4 and Hyena are taught in depth; gated linear attention, where the field went next, is in the gallery.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/5_retention")

# %% [markdown]
# ## The picture
#
# A Transformer that writes a text keeps the keys and values of every token it has seen, its **cache**. A **RetNet** keeps one matrix per head, its **state**, and changes it with every token. Below, two trained models of equal size write
# the same chapter of a novel.

# %%
from effnb.chapters.design.retention import drawings, methods, tables, twins
from effnb.lab.bench import Bench

mini = Bench("mini-300k", windows=4, questions=0)
twin = twins.load("retnet-300k")
written = methods.Written(mini, twin, tokens=4096)
drawings.kept(written.bytes_kept(), written.words())

# %% [markdown]
# The state is as large at the first token as at the last. Does that make each token cheaper too, and from where on? **Predict first:** the panel takes your guess before it answers. Then write on; when you run this page, write several texts at once.

# %%
from effnb.chapters.design.retention import panels

panels.writing(mini.model, twin, written.ids, mini.loaded.tokenizer)

# %% [markdown]
# ## The idea
#
# ### Attention without a softmax
#
# Attention compares the query $q_n$ of a token with the keys $k_m$ of all tokens before it, turns the products into weights by a softmax, and averages the values $v_m$. The softmax needs all products at once, so all keys have to be kept.
# **Retention** leaves it out. The weight of a token falls with its distance instead, by a **decay** $\gamma$ below 1. With $s = 1 / \sqrt{d_k}$, where $d_k$ is the number of entries of a key,
#
# $$o_n = s \sum_{m \le n} \gamma^{n-m}\, (q_n k_m^\top)\, v_m .$$
#
# With each new token, all earlier weights shrink by the same factor $\gamma$. So the sum need not be computed again: without $q_n$ it is a matrix, the state, which each token changes once:
# <a id="equation-2"></a>
#
# $$S_n = \gamma\, S_{n-1} + k_n^\top v_n, \qquad o_n = s\, q_n S_n. \tag{recurrent}$$
#
# Written for all tokens at once, the same sum is attention with a fixed matrix of weights $D$ in the place of the softmax:
#
# $$O = s\,(Q K^\top \odot D)\, V, \qquad D_{nm} = \gamma^{n-m} \text{ for } n \ge m, \text{ else } 0. \tag{parallel}$$
#
# Three tokens with keys, values and queries of one number each show both. Let $\gamma = \tfrac12$, $k = (1, 2, 1)$, $v = (4, 2, 8)$ and $q = (1, 1, 2)$. The states are $S_1 = 4$, $S_2 = 2 + 4 = 6$ and $S_3 = 3 + 8 = 11$, so the outputs are $4$, $6$ and $22$. In parallel,
# the last row of $D$ is $(\tfrac14, \tfrac12, 1)$ and the last output $2 \cdot (\tfrac14 \cdot 1 \cdot 4 + \tfrac12 \cdot 2 \cdot 2 + 1 \cdot 8)$:

# %% tags=["nbval-check-output"]
import torch

from effnb.design import retention

q, k, v = (torch.tensor(x).view(1, 1, 3, 1) for x in ([1.0, 1, 2], [1.0, 2, 1], [4.0, 2, 8]))
for form in methods.FORMS:
    out, state = retention.retention(q, k, v, torch.tensor([0.5]), form=form, chunk_size=2)
    print(f"{form:9} outputs {out.flatten().tolist()}, last state {state.item():.0f}")

# %% [markdown]
# **Chunkwise** is the third form, and the one for training on long texts: parallel inside chunks of $C$ tokens, recurrent from chunk to chunk. Token $i$ of a chunk (counted from 0) sees the tokens of its chunk, and the state $S$ before it:
# <a id="equation-4"></a>
#
# $$O_i = s\,\big[(Q K^\top \odot D)\, V\big]_i + s\,\gamma^{i+1} q_i S, \qquad S \leftarrow \gamma^C S + \sum_i \gamma^{C-1-i}\, k_i^\top v_i. \tag{chunkwise}$$
#
# ### Many memories
#
# One $\gamma$ is one length of memory. The heads of a layer therefore have different ones, $\gamma_h = 1 - 2^{-5-h}$, which look back over about 32, 64, 128 and 256 tokens. A panel below draws them.
#
# Three more pieces make the layer of a RetNet. Queries and keys are turned by angles that grow with their positions, as in RoPE, so that order inside the memory can be told. Each head's output is *normalized by itself*, because a longer memory gives larger sums. And the result is multiplied by a **gate**,
# $\operatorname{swish}(X W_G)$ with $\operatorname{swish}(x) = x\, \sigma(x)$, which brings back the non-linearity that the softmax had. Values are twice as wide as keys.
#
# ### When does it save anything?
#
# A cache holds $2\, T\, d_{kv}$ numbers per layer after $T$ tokens, where $d_{kv}$ is the width of all keys of a token. The state of RetNet holds $2\, d\, d_k$, with $d$ the width of the model. Where keys are as wide as the model, the two are equal at $T = d_k$ tokens; a Transformer
# whose query heads share keys and values gets further:

# %% tags=["nbval-check-output"]
tables.break_even_table()

# %% [markdown]
# Below that number, the cache is the smaller one. Short chats gain nothing.

# %% [markdown]
# ## The code
#
# The [recurrent form](#equation-2) is one line of arithmetic, and the [chunkwise form](#equation-4) a loop over chunks. The layer around them is as short:

# %%
from effnb.kernels.retention import retention_chunkwise, retention_step_reference
from effnb.lab import show

show(retention_step_reference, retention_chunkwise)

# %%
show(retention.MultiScaleRetention.forward)

# %% [markdown]
# Do the forms agree in a whole trained model, too? Here are the logits of the twin for a stretch of the novel, in numbers of 64 bits: the parallel form against the two others, and a text that is read in chunks at first and token by token from there.

# %% tags=["nbval-check-output"]
print(methods.agreement(twins.load("retnet-300k", torch.float64), written.ids[:200]))

# %% [markdown]
# ## Turn the knob
#
# **Chunks.** At one end of the next knob is the recurrent form, at the other the parallel one. The arithmetic prefers one end and the machine another.

# %%
panels.chunks()

# %% [markdown]
# Small chunks waste no work, but a processor that could do a thousand multiplications at once is given a few at a time. Large chunks compute a square of weights, most of which are nearly 0.
#
# **Decays.** A decay is not trained. How much does the model depend on it?

# %%
documents = written.documents(8)
panels.decay_ranges(twin, documents)

# %% [markdown]
# Things to try:
#
# - which error is worse, a memory that is too short or one that never forgets? Does your answer change with the context length?
# - when you run this page, go to 32 texts at once in the panel at the top: which of the two models has more to carry?

# %% [markdown]
# ## Does it hold?
#
# Six claims of the paper belong to this chapter. Their parts, bounds and margins were registered before they were measured; the verdicts are computed from stored results.

# %%
from effnb.chapters.design.retention import verdicts
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(*(judge(*measured) for judge in verdicts.ALL))

# %% [markdown]
# The claims on cost are about the shape of curves, and these are in the next section. The claim on perplexity is about models that no laptop can train. What can be done here is a fair comparison at our sizes, and it is below, on the trained twins.

# %% [markdown]
# ## What it costs and saves
#
# ### Writing
#
# Five models of the size of `mini-1m`, with random weights, since time does not depend on what the weights are. **Hyena** and **RWKV** are explained below.

# %%
decoding = tables.claimed("decoding").data["table"]
drawings.decoding(decoding)

# %% tags=["nbval-check-output"]
print(tables.decoding_said(decoding))
print(tables.crossing_said(decoding))

# %% [markdown]
# A constant cost is not a low cost. Memory is saved after a page of text; time is saved only once the cache is so long that reading it matters beside everything else that a step does. With several texts at once that point comes earlier:

# %%
latency = tables.claimed("latency").data["table"]
drawings.latency(latency)

# %% tags=["nbval-check-output"]
print(tables.latency_said(latency))

# %% [markdown]
# ### Training
#
# FlashAttention computes attention without ever storing the scores, so its memory grows with the length and not with its square. Its work still grows with the square.

# %%
training = tables.claimed("training").data["table"]
drawings.training(training)

# %% tags=["nbval-check-output"]
print(tables.training_said(training))

# %% [markdown]
# The same here and now, for one layer: retention with chunks of 64, and the fused attention of PyTorch, on a text of 1,024 and one of 8,192 tokens.

# %%
for method, ratio in methods.growth(1024, 8192).items():
    print(f"{method:20} {ratio:5.1f} times the time for 8 times the tokens")

# %% [markdown]
# ## On a real model
#
# ### Twins
#
# A twin has the vocabulary, width, depth and (within 3 %) the number of parameters of its Transformer, and was trained on exactly the same tokens in the same order, with the same optimizers and rates. Only the layer that mixes tokens differs. Each was trained once, so read the intervals, which are over documents, as what
# *these* models do.

# %% tags=["nbval-check-output"]
trained = tables.stored("twins").data["table"]
print(tables.twins_said(trained))
tables.twins_table(trained)

# %% [markdown]
# Both were trained for less than an hour, and write like it. The RetNet writes each token from its state alone:

# %%
print(methods.continuations(mini, twin))

# %% [markdown]
# Loss is not everything. A state of fixed size has to forget, and an exact copy is what it forgets first. The training data hold lists of keys and values, and the evaluation asks for a value by its key:

# %% tags=["nbval-check-output"]
print(tables.recall_said(trained))

# %% [markdown]
# Recall takes a long training; where no model has learned it yet, this says nothing about the layer. Length is easier to ask about: what happens when a text is longer than those of training?

# %%
positions = tables.stored("positions").data["table"]
drawings.positions(positions)

# %% tags=["nbval-check-output"]
print(tables.positions_said(positions))

# %% [markdown]
# Why should they differ? A decay makes what lies far back weigh next to nothing, however far it is. A Transformer of this kind gives it full weight, and turns it by angles that it has never met in training; the chapter on context mends that.
#
# ### SmolLM2
#
# A model can be converted to retention only by training it again, so there is no RetNet of SmolLM2's weights. But its cache is real. Here it is beside an untrained RetNet of its shape:

# %% tags=["nbval-check-output"]
smollm2 = tables.stored("smollm2").data["table"]
tables.smollm2_table(smollm2)

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here(tokens=2048))
else:
    print(tables.stored("smollm2"))

# %% [markdown]
# ## Where it breaks
#
# **The trap.** The paper divides each row of scores by positive numbers, to keep them in the range of 16 bits: first $D$ by the root of its row's sum, then the scores by the sum of their absolute values, where that exceeds 1 (so the published code; the paper has the absolute value of the sum). Each head's output is normalized afterwards, which removes any factor of a row. So this changes nothing, and each of the three
# published forms uses other factors. But the norm is $(x - \mu) / \sqrt{\sigma^2 + \epsilon}$, and the $\epsilon$ does not scale with $x$. Where outputs are as small as $\sqrt\epsilon$, the factor stays, and the forms disagree:

# %%
untrained = methods.build("RetNet")
x = methods.layer_input(untrained, written.ids[:256])
drawings.trap(untrained, x)

# %% [markdown]
# So a model that is trained in chunks and then writes token by token is, at the start of its training, *two different models*. With a smaller $\epsilon$ the published forms agree; without their normalization they agree anyhow. This package leaves it out, and computes sums in 32 bits.

# %% tags=["nbval-check-output"]
apart = drawings.disagreements(untrained, x)
at = drawings.SCALES.index(1.0)
for name, values in apart.items():
    print(f"{name:24} {'the forms disagree' if values[at] > 1e-6 else 'the forms agree'}")

# %% [markdown]
# **Powers that overflow.** $\gamma^{n-m}$ is a small number; $\gamma^n \gamma^{-m}$ is the same on paper. In 32 bits, after 4,096 tokens:

# %% tags=["nbval-check-output"]
gamma = retention.decays(1)[0].float()
n, m = 4096, 4095
print(f"γ^(n-m) = {gamma ** (n - m):.4f}, but γ^n · γ^-m = {gamma**n * gamma**-m}")

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: retention.retention(q, k, v, torch.tensor([1.5])),
    lambda: retention.retention(q, k, v, torch.tensor([0.5]), chunk_size=0),
    lambda: retention.RetNetConfig(hidden=12, layers=1, feed_forward=8, heads=4),
    lambda: methods.build("Hyena", tokens=8)(torch.zeros(1, 9, dtype=torch.long)),
    lambda: untrained.advance(torch.zeros(1, 2, dtype=torch.long), mask=torch.tensor([[1, 0]])),
    lambda: untrained(torch.zeros(1, 4, dtype=torch.long), mask=torch.ones(4, 4)),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.retention import exercises

for exercise in (exercises.decay, exercises.step, exercises.chunk):
    print(exercise)

# %% [markdown]
# **1.** The matrix $D$ of a decay for a number of tokens.


# %% tags=["exercise", "nbval-check-output"]
def decay_matrix(gamma, tokens):
    """A tensor (tokens, tokens)."""
    raise NotImplementedError


_ = exercises.decay.check(decay_matrix)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Make a column and a row of positions; their difference is a matrix. What lies above the diagonal is the future.
#
# </details>


# %% tags=["solution"]
exercises.decay.solution()

# %% [markdown]
# **2.** One token of the recurrent form: from the state, $q$, $k$, $v$ and $\gamma$, the output and the new state.


# %% tags=["exercise", "nbval-check-output"]
def one_token(S, q, k, v, gamma):
    """S is (dk, dv), q and k are (dk,), v is (dv,); a pair (output, state)."""
    raise NotImplementedError


_ = exercises.step.check(one_token)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The token sees itself, so the state comes first. A column times a row is a matrix.
#
# </details>


# %% tags=["solution"]
exercises.step.solution()

# %% [markdown]
# **3.** The state after a chunk of any length $L$, without a loop over its tokens.


# %% tags=["exercise", "nbval-check-output"]
def next_state(S, k, v, gamma):
    """S is (dk, dv), k is (L, dk), v is (L, dv)."""
    raise NotImplementedError


_ = exercises.chunk.check(next_state)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The last token of the chunk has not decayed yet, and the first one $L - 1$ times. The old state has decayed once for every token.
#
# </details>


# %% tags=["solution"]
exercises.chunk.solution()

# %% [markdown]
# ## Gallery
#
# **RWKV-4** (Peng et al., 2023). Each channel keeps a running average of values, weighted by exponentials of keys that decay. With a decay $w$ and a bonus $u$ for the present token,
# $\mathrm{wkv}_t = \big(\sum_{i<t} e^{-(t-1-i) w + k_i} v_i + e^{u + k_t} v_t\big) \big/ \big(\sum_{i<t} e^{-(t-1-i) w + k_i} + e^{u + k_t}\big)$. The state is five vectors per layer, far less than RetNet's matrices, and so is what it can remember. The exponentials overflow unless the largest exponent is kept apart:

# %% tags=["nbval-check-output"]
w, u = torch.tensor([0.5]), torch.tensor([0.3])
keys, values = torch.tensor([0.1, 0.7, -0.2]).view(1, 3, 1), torch.tensor([1.0, 2, 4]).view(1, 3, 1)
for more in (0, 100):
    out, _ = retention.wkv(w, u, keys + more, values)
    plain = (keys + more).exp()
    print(f"keys + {more:3}: {[round(x, 3) for x in out.flatten().tolist()]}", end="; ")
    print(f"their plain exponentials are finite: {bool(plain.isfinite().all())}")

# %% [markdown]
# Use it where memory is scarcest.
#
# **Hyena** (Poli et al., 2023). In the place of attention, two gates and a convolution as long as the text. A small network gives its filter as a function of time, and the Fourier transform computes it in $O(T \log T)$ instead of $O(T^2)$. The transform is circular: padded to less than twice the length,
# the end of the text leaks into its beginning. It has no recurrence of fixed size, so writing a token takes the whole past, and its filters end at the length they were made for. Use it for tasks that read and do not write.
#
# **Gated linear attention** (Yang et al., 2023). Let each token choose what to forget: $S_t = \operatorname{diag}(\alpha_t)\, S_{t-1} + k_t^\top v_t$, where the gates $\alpha_t$ between 0 and 1 are computed from the token. With all gates at one $\gamma$ it is retention, with 1 it is linear attention without a denominator:

# %% tags=["nbval-check-output"]
draw = torch.Generator().manual_seed(0)
a, b, c = (torch.randn(1, 2, 50, 8, generator=draw, dtype=torch.float64) for _ in range(3))
gammas = retention.decays(2)
gates = gammas.log().view(1, 2, 1, 1).expand(1, 2, 50, 8)
difference = (
    (retention.gla(a, b, c, gates)[0] - retention.retention(a, b, c, gammas)[0]).abs().max()
)
print("gated linear attention with constant gates is retention:", bool(difference < 1e-12))

# %% [markdown]
# Use it where you would use retention today, if you have a kernel for it: in plain PyTorch the gates make training slower, as the picture of training shows. **Mamba** (Gu and Dao, 2023) belongs to the same family, with $S_t = e^{\Delta_t A} \odot S_{t-1} + \dots$ per channel, a step $\Delta_t$ that the token chooses, and a trained $A$; it has no function here.
#
# **Which one?** For texts of a few hundred tokens, a Transformer with shared keys and values: its cache is small, and it recalls exactly. For endless texts, or many at once on one device, a layer with a fixed state; among them gated linear attention, which forgets by content. Measure recall on your task before you decide: it is what a fixed state gives away.
#
# ## Further reading
#
# Sun et al., *Retentive Network*, 2023, arXiv 2307.08621. Peng et al., *RWKV*, 2023, arXiv 2305.13048. Poli et al., *Hyena Hierarchy*, 2023, arXiv 2302.10866. Yang et al., *Gated Linear Attention Transformers with Hardware-Efficient Training*, 2023, arXiv 2312.06635. Gu and Dao, *Mamba*, 2023, arXiv 2312.00752. Katharopoulos et al., *Transformers are RNNs*, 2020, arXiv 2006.16236.
