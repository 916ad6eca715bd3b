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
# # Objectives
#
# **A language model learns only where it is asked something. What is hidden, who may see what, and how many tokens give a loss: that is a pre-training objective, and it decides what a token of text is worth.**
#
# After this chapter you can
#
# - say of any objective what is hidden, what each position sees and which tokens give a loss;
# - mask as BERT does, cut spans as T5's code does, and replace tokens as ELECTRA does;
# - compare objectives without comparing their losses;
# - divide a training budget between parameters and tokens, and check the rule on three models.
#
# You need the tour (`00_start_here`), and to know what attention is. Causal and masked language modelling, span corruption, ELECTRA and Chinchilla's rule are taught in depth; a gallery near the end
# introduces three relatives.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("03_pretraining/1_objectives")

# %% [markdown]
# ## The picture
#
# One small network was trained several times on the same text. Each time it was asked a different question: the next token (**CLM**, causal language modelling), some hidden tokens (**MLM**, masked language modelling), spans that were cut out,
# or which tokens had been replaced (**ELECTRA**). A token that the network is asked about is **loss-bearing**: it adds to the loss, and so to the gradient.

# %%
from effnb.chapters.pretraining.objectives import drawings, tables

runs_stored = tables.claimed().data["table"]
drawings.result(runs_stored)

# %% tags=["nbval-check-output"]
print(tables.text_said(runs_stored))

# %% [markdown]
# Losses are in **nats**, the negative natural logarithm of the probability that a network gave to the right answer. The losses of these runs cannot be compared: they answer different questions. So all networks were judged by one **probe**: a linear classifier that sees nothing but the mean of the network's last layer, and has to name the section of Debian's archive
# that a description comes from.

# %% [markdown]
# ## The idea
#
# ### Three choices
#
# The network is the same Transformer throughout. An objective makes three choices: what the network **reads** (perhaps not the text as it was), what each position may **see**, and which positions are **asked**. If $T$ is the set of positions that are asked, and $y_t$ the right answer at position $t$,
# all objectives but one minimize
# <a id="equation-1"></a>
#
# $$\mathcal L = -\frac{1}{|T|} \sum_{t \in T} \ln p_t(y_t). \tag{1}$$

# %%
drawings.masks()

# %% [markdown]
# **CLM** hides nothing, lets position $t$ see positions up to $t$, and asks for token $t + 1$. It asks everywhere except at the last position.
#
# **MLM** (BERT; Devlin et al., 2018) lets every position see every other. Without hiding, each question would contain its answer. So each token is chosen with probability $\rho = 0.15$, and only chosen tokens are asked. Of the chosen, 80 % are replaced by a mask token, 10 % by a random
# token and 10 % are left as they are: the network cannot know which of the tokens it sees are right.
#
# **Span corruption** (T5; Raffel et al., 2019) cuts out whole spans. Each leaves a **sentinel** behind, a token that occurs nowhere else, and the network writes down what is missing:

# %% tags=["nbval-check-output"]
import torch

from effnb.pretraining import objectives

sentence = ["We", "hold", "these", "truths", "to", "be", "self", "evident"]
words = dict(enumerate(sentence, start=10))
names = words | {999: "X", 998: "Y", 1: "end"}
cut = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1]]).bool()
made = objectives.span_corruption(torch.tensor([[*words]]), noise=cut, first_sentinel=999, end=1)
for side in ("inputs", "targets"):
    print(f"{side:8}", " ".join(names[i] for i in getattr(made, side)[0].tolist()))

# %% [markdown]
# There is no sentinel after the last span, although the figure in the paper shows one. T5 has an encoder for the inputs and a decoder for the targets. Here one stack of layers reads first the inputs, as a prefix in which every position sees every other, and then the targets. T5's paper tries that as well, and it lets all objectives on this page use the same network.
#
# How are the spans drawn? Of $n$ tokens, $N = \operatorname{round}(\rho n)$ are noise, in $K = \operatorname{round}(N / \mu)$ spans of mean length $\mu = 3$. Both the $N$ tokens and the $n - N$ others are divided into $K$ positive parts, all divisions being equally likely, and the two kinds of parts alternate.
# So every text begins with tokens that stay and ends with a gap. For the usual length of 512 tokens:

# %% tags=["nbval-check-output"]
text, targets = objectives.raw_length(512, 0.15, 3)
noise, spans = objectives.noise_counts(text, 0.15, 3)
print(f"{text} tokens of text become 512 of input and {targets} of targets")
print(f"{noise} of them are asked, in {spans} spans: {noise / (512 + targets):.1%} of what is read")

# %% [markdown]
# **ELECTRA** (Clark et al., 2020) asks everywhere *and* sees both sides. A small **generator**, an MLM, fills in masked tokens by drawing from its own softmax. The **discriminator**, which is the network that is kept, reads the result and says of every token whether it was replaced. With $y_t = 1$ for a token
# that differs from the original, and $d_t$ the discriminator's probability,
#
# $$\mathcal L = \mathcal L_{\text{MLM}} - \frac{\lambda}{n} \sum_t \bigl(y_t \ln d_t + (1 - y_t) \ln(1 - d_t)\bigr), \qquad \lambda = 50.$$
#
# If the generator draws the very token that was there, the right answer is "original". No gradient passes from the discriminator through the draw.
#
# ### What is a token of text worth?
#
# Every objective pays for the positions that it computes, and learns from those that it asks. (The output head, more than three quarters of the weights of this network, runs only where something is asked.)

# %% tags=["nbval-check-output"]
tables.work_table()

# %% [markdown]
# An ELECTRA token counts like the others here, yet carries less: one bit at most, where a word out of 4,096 carries up to 12. This table cannot say whether a few rich answers teach more than many poor ones.
#
# ### How large, and on how much text?
#
# Training $N$ parameters on $D$ tokens takes about $C = 6 N D$ operations. A larger network learns more from a token, a smaller one reads more tokens for the same $C$. Hoffmann et al. (2022) trained over 400 models and found that both should grow at the same rate: $N \propto C^{0.5}$, with about 20 tokens for each parameter.
# Hence **Chinchilla's rule**:
# <a id="equation-3"></a>
#
# $$N = \sqrt{C / (6 \cdot 20)}, \qquad D = 20\, N. \tag{3}$$
#
# Their Chinchilla, with 70 billion parameters, beats Gopher, which has four times as many but was trained on less text.

# %% [markdown]
# ## The code
#
# The masking of BERT:

# %%
from effnb.lab import show

show(objectives.masked_lm)

# %% [markdown]
# Drawing spans takes a random **composition**, an ordered sum of positive numbers. It puts $K - 1$ cuts into $n - 1$ gaps:

# %%
show(objectives.composition, objectives.noise_mask)

# %% [markdown]
# ELECTRA's draw: adding Gumbel noise to the scores and taking the largest is a draw from their softmax.

# %%
show(objectives.replace_tokens)

# %% [markdown]
# Do the counts come out right? Here are BERT's on 200,000 tokens, and ELECTRA's, whose code draws positions *with replacement*, so that some are drawn twice:

# %% tags=["nbval-check-output"]
draws = torch.Generator().manual_seed(0)
ids = torch.randint(1000, 2000, (400, 512), generator=draws)
bert = objectives.masked_lm(ids, 0.15, mask_token=0, vocabulary=1000, generator=draws)
chosen = bert.labels != objectives.IGNORED
random = chosen & (bert.inputs > 0) & (bert.inputs < 1000)
parts = {"chosen": chosen, "masked": bert.inputs == 0, "random": random}
print("BERT:", ", ".join(f"{name} {float(x.float().mean()):.3f}" for name, x in parts.items()))
electra = objectives.electra_masking(ids, 0.15, mask_token=0, generator=draws)
print(f"ELECTRA: chosen {electra.targets / ids.numel():.3f}")

# %% [markdown]
# ## Turn the knob
#
# The first sentence of a famous novel, as the network reads it. Change the objective, the rate and the length of spans.

# %%
from effnb.chapters.pretraining.objectives import panels
from effnb.lab import load

panels.questions(load("mini-5m", device="cpu").model)

# %% [markdown]
# Things to try:
#
# - with *span corruption*, go from spans of 1 to spans of 10: what happens to the number of positions computed, and why?
# - with *MLM*, raise the rate until you could no longer fill in the words yourself;
# - with *ELECTRA*, go through the draws: does *mini-5m* ever fool you?
#
# ELECTRA's task is as hard as its generator is good. Here the three models of this workbook act as the generator, with random words for comparison.

# %%
panels.fillers()

# %% [markdown]
# Look at the last number of the list. Most tokens are originals, so a discriminator that always says "original" is nearly always right. Accuracy says little about classes as unequal as these; a better generator makes them more unequal still.
#
# The third knob is a budget. While the three models were trained, their losses were recorded. Compare them at equal compute:

# %%
panels.budgets()

# %% [markdown]
# ## Does it hold?
#
# The claim of this chapter: CLM predicts the next token and so learns from every position, MLM fills in masked ones and learns from about 15 % of them. The shares are true by construction. What can be tested is what they are *worth*: the same objective, text, network and steps, asked everywhere or at a random 15 % of the positions.
# Parts and bounds were registered before the measurements.

# %%
from effnb.chapters.pretraining.objectives import verdicts
from effnb.lab import claims_table

claims_table(verdicts.s_p1(*verdicts.stored()))

# %% [markdown]
# **Equal text.** All objectives, with three or five seeds. Intervals are over groups of descriptions:

# %% tags=["nbval-check-output"]
tables.text_table(runs_stored)

# %% [markdown]
# Where a trained network is below the untrained one, training has so far moved its features towards its own question and away from the probe's. The runs are short: each reads a small part of the text that `mini-300k` read.
#
# **Equal compute.** An objective whose steps are cheap may take more of them. Here each gets as many operations as CLM had:

# %% tags=["nbval-check-output"]
compute = tables.stored("compute").data
print(tables.compute_said(compute, runs_stored))
tables.compute_table(compute, runs_stored)

# %% [markdown]
# **The mask rate.** Wettig et al. (2022) find that 40 % beats 15 % for larger models, and that even 80 % keeps much of the quality. A higher rate asks more, and leaves less to answer from:

# %% tags=["nbval-check-output"]
print(tables.rates_said(runs_stored))
tables.rates_table(runs_stored)

# %% [markdown]
# **The length of spans:**

# %% tags=["nbval-check-output"]
tables.spans_table(runs_stored)

# %% [markdown]
# **Static or dynamic masking.** BERT stored ten maskings of its text and read each four times. RoBERTa (Liu et al., 2019) draws a new one each time a text is read. That can matter only where text is repeated:

# %% tags=["nbval-check-output"]
repeats = tables.stored("repeats").data
print(tables.repeats_said(repeats))
tables.repeats_table(repeats)

# %% [markdown]
# A network that always sees the same gaps learns the answers by heart, and its low loss then says nothing.

# %% [markdown]
# **Chinchilla's rule on three sizes.** The records of `mini-300k`, `mini-1m` and `mini-5m`, at the constant learning rate that all of them had for three quarters of their training:

# %%
from effnb.chapters.pretraining.objectives import scaling

drawings.law()

# %% tags=["nbval-check-output"]
print(scaling.judged())
scaling.slices_table()

# %% [markdown]
# As evidence this does not go far: there are three sizes, and often only two of them can be compared. The models also differ in the number of sequences per step, and some of their sequences are exercises in recall, not text.

# %% [markdown]
# ## What it costs and saves
#
# Here are the operations counted above, beside the time on your machine. The two agree as far as arithmetic is what takes the time. The optimizer costs every objective the same, and ELECTRA runs two networks, one after the other.

# %%
from effnb.chapters.pretraining.objectives import live

live.timed_steps()

# %% [markdown]
# Objectives also differ at run time. A network trained by CLM writes text, token by token, and keeps the keys and values of what it wrote. One trained by MLM or ELECTRA reads a finished text and has no use for a cache. Which objective is cheaper depends on what the network is for.

# %% [markdown]
# ## On a real model
#
# The same probe on the same descriptions, for the models of this workbook and for two that others trained. They differ in size, text and much else, so this shows what our short runs have reached, and not which objective is best:

# %% tags=["nbval-check-output"]
real = tables.stored("real").data
print(tables.real_said(real))
tables.real_table(real)

# %% [markdown]
# The sentence encoder, live:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(live.real_probe("minilm-l6"))
else:
    print(tables.stored("real"))

# %% [markdown]
# ## Where it breaks
#
# **Losses that are compared.** The table of mask rates has two columns of losses. Only the right one asks all networks the same question. The left one mixes what a network has learned with how hard its own question is, and the more is hidden, the harder it is to answer. The same holds, even more so, for MLM beside CLM, and
# for ELECTRA, whose loss is that of a yes-or-no question.
#
# **A mean over everything.** If the loss of [equation 1](#equation-1) is averaged over all positions instead of those that are asked, it shrinks with the rate, and the gradient with it. Here is one batch at two rates:

# %% tags=["nbval-check-output"]
from effnb.chapters.pretraining.objectives import runs

network = runs.build(seed=0)
window = runs.text_windows(0, 8, 64)
for name in ("MLM 15 %", "MLM 80 %"):
    example = runs.ALL[name].make(window, torch.Generator().manual_seed(0))
    loss = objectives.example_loss(network, example).item()
    print(f"{name}: {loss:.1f} nats asked, {loss * example.targets / window.numel():.1f} over all")

# %% [markdown]
# **A law through three sizes.** Hoffmann et al. also fit $L = E + A / N^\alpha + B / D^\beta$ to all their runs. Five unknowns can be found from many sizes. From three, nothing stops the fit from being wrong:

# %%
print("all three:", scaling.law_said(scaling.fitted()))
print("two      :", scaling.law_said(scaling.fitted(["mini-300k", "mini-5m"])))

# %% [markdown]
# The last number is the largest distance of any record from the fit. Even a close fit can give worthless advice, because the advice rests on sizes and budgets that were never tried. Chinchilla's constants came from hundreds of runs of many sizes, each with a learning rate that reached its end where the text did.
#
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: objectives.masked_lm(ids, 1.0, mask_token=0, vocabulary=10),
    lambda: objectives.masked_lm(ids, 0.15, mask_token=0, vocabulary=10, masked=0.9, random=0.2),
    lambda: objectives.span_corruption(ids, 0.5, 1, first_sentinel=9999, end=1, sentinels=64),
    lambda: objectives.noise_counts(10, 0.15, 0.5),
    lambda: objectives.prefix_lm(ids[:1], torch.tensor([512])),
    lambda: objectives.chinchilla(-1),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.pretraining.objectives import exercises

for exercise in (exercises.masking, exercises.spans, exercises.rule):
    print(exercise)

# %% [markdown]
# **1.** A prefix language model reads the first $P$ of $n$ tokens from both sides and the rest from the left. Return the table of what position $i$ (row) may see (column), as booleans of shape `(n, n)`.


# %% tags=["exercise", "nbval-check-output"]
def prefix_mask(n, P):
    """A tensor of booleans, (n, n)."""
    raise NotImplementedError


_ = exercises.masking.check(prefix_mask)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Position $i$ sees position $j$ if $j \le \max(i, P - 1)$. Compare a column of $i$ with a row of $j$, both from `torch.arange(n)`.
#
# </details>


# %% tags=["solution"]
exercises.masking.solution()

# %% [markdown]
# **2.** The targets of span corruption as T5's code makes them. `ids` and `noise` are lists of the same length; the first span gets the sentinel `sentinel`, the next ones count down; `end` closes the list.


# %% tags=["exercise", "nbval-check-output"]
def targets_of(ids, noise, sentinel, end):
    """A list of ids."""
    raise NotImplementedError


_ = exercises.spans.check(targets_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A span begins where a token is noise and the one before it is not.
#
# </details>


# %% tags=["solution"]
exercises.spans.solution()

# %% [markdown]
# **3.** Spend $C$ operations by Chinchilla's rule, [equation 3](#equation-3): return $N$ and $D$.


# %% tags=["exercise", "nbval-check-output"]
def spend(C):
    """Two numbers: parameters, tokens."""
    raise NotImplementedError


_ = exercises.rule.check(spend)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Put $D = 20 N$ into $C = 6 N D$.
#
# </details>


# %% tags=["solution"]
exercises.rule.solution()

# %% [markdown]
# ## Gallery
#
# **Prefix LM** (Liu et al., 2018; Raffel et al., 2019) is in the panel and in the tables. Position $i$ sees position $j$ if $j \le \max(i, P - 1)$, and only what follows the prefix is asked: half of the text, if the split is drawn evenly. Use it where an input is complete before the answer begins, as in translation, and one stack of layers has to do both.
#
# **Dynamic masking** (RoBERTa; Liu et al., 2019) costs nothing but a draw. Use it always; `static_masking` is in the package to show why.
#
# **Replace MLM and all-tokens MLM** (Clark et al., 2020) are ablations of ELECTRA. The first replaces mask tokens by the generator's tokens and asks for the originals at those positions; on the GLUE tasks that is hardly better than BERT. The second asks for them everywhere, and comes close to ELECTRA:
# most of the gain comes from asking everywhere. Use neither; they explain why ELECTRA works.
#
# **Which one?** To write text, CLM. To read it, the papers choose an encoder that is asked everywhere (ELECTRA) or masked at more than 15 %, and trained on far more text than here; the tables above show what little text achieves. One network for both: spans, or a prefix. Spend the budget near 20 tokens for each parameter, and on a smaller network with more text if it will be used much. The evidence of this page comes from
# networks of 300 thousand parameters: measure on yours.
#
# ## Further reading
#
# Devlin et al., *BERT*, 2018, arXiv 1810.04805. Liu et al., *RoBERTa*, 2019, arXiv 1907.11692. Raffel et al., *T5*, 2019, arXiv 1910.10683. Clark et al., *ELECTRA*, 2020, arXiv 2003.10555. Wettig et al., *Should You Mask 15% in Masked Language Modeling?*, 2022, arXiv 2202.08005.
# Liu et al., *Generating Wikipedia by Summarizing Long Sequences*, 2018, arXiv 1801.10198. Hoffmann et al., *Training Compute-Optimal Large Language Models*, 2022, arXiv 2203.15556. Kaplan et al., *Scaling Laws for Neural Language Models*, 2020, arXiv 2001.08361.
