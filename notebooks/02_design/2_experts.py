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
# # Experts
#
# **A model can have far more parameters than any one token uses. A router decides which few of them each token passes through, and almost everything that can go wrong goes wrong in the router.**
#
# After this chapter you can
#
# - count the parameters, the active parameters and the operations of a model with experts;
# - route tokens by hand, seat them, and say how many a fair router drops;
# - keep the load even with one small loss, and see what happens without it;
# - tell Switch, GLaM, expert choice and entmax routing apart, and say which of them looks into the future;
# - turn a trained dense model into one with experts, and compress it.
#
# You need the tour (`00_start_here`), and to know the feed-forward layer of a Transformer block. Switch, top-2 routing as in GShard and GLaM, expert choice and up-cycling are taught in depth; entmax routing is in the gallery.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/2_experts")

# %% [markdown]
# ## The picture
#
# Five small decoders read the same texts for the same number of steps. They differ in one thing: where the first has one feed-forward network in each layer, the others have 2, 4, 8 and 16 of the same size. Each token still passes through only one. The curve is the loss on text that none of them has seen; the bars show the work for each token.

# %%
from effnb.chapters.design.experts import drawings, tables

grid = tables.stored("grid").data
drawings.result(grid)

# %%
print(tables.grid_said(grid))

# %% [markdown]
# Did you expect the opposite? The papers that made experts famous found a lower loss for the same work, after billions of tokens. Here each expert learns only from the tokens that are sent to it: one of sixteen sees about a sixteenth of a text that is short to begin with, while the router that sends them is still learning too. More parameters pay when there is enough text to fill them.
#
# Losses are in **nats**: the mean of $-\ln p$ of the right token. The networks that a token can choose from are called **experts**. The name promises more than it delivers: no one assigns them subjects, and each learns whatever the tokens sent to it have in common.
#
# Each expert has a limited number of seats, as you will see. **Predict first:** the panel takes your guess before it answers. Then change the number of tokens that share the seats, and give each expert a few more seats than its fair share.

# %%
from effnb.chapters.design.experts import panels

panels.fair()

# %% [markdown]
# ## The idea
#
# ### One of many
#
# Let a layer have $E$ experts. For a token $x$ a **router**, a single matrix $W_r$, makes one score for each expert. **Switch** (Fedus, Zoph and Shazeer, 2022) takes the best:
# <a id="equation-1"></a>
#
# $$p = \operatorname{softmax}(x W_r), \qquad e^\ast = \arg\max_e p_e, \qquad y = p_{e^\ast}\, \mathrm{FFN}_{e^\ast}(x). \tag{1}$$
#
# The probability $p_{e^\ast}$, the **gate**, multiplies the output. It looks like a detail, but it is the whole trick: $\arg\max$ has no gradient, so the gate is the only path by which the loss reaches the router. If an expert helps a token, its gate grows, and tokens like it will come again.
#
# What does it cost? Here are the counts for the decoders of the first picture, before training:

# %% tags=["nbval-check-output"]
tables.counts_table()

# %% [markdown]
# A token uses one expert and the router, so its **active parameters** hardly grow, and neither does the work. Memory does grow: all experts must be loaded, because the next token may need any of them.

# %% [markdown]
# ### Seats
#
# On real machines each expert gets its tokens in a block of fixed size. Of $T$ tokens that share the seats, an expert takes at most
#
# $$C = \lfloor f\, T / E \rfloor,$$
#
# its **capacity**. The **capacity factor** $f$ sets it as a multiple of the fair share. Seats are given in the order of the tokens. A token that finds its expert full is **dropped**: the layer gives 0 for it, and only the residual connection carries it on. Here are 12 tokens and 4 experts, with $f = 1$:

# %%
import torch

from effnb.design import experts

scores = torch.randn(1, 12, 4, generator=torch.Generator().manual_seed(3))
seats = experts.expert_capacity(tokens=12, experts=4, factor=1.0)
drawings.seating(experts.switch(scores, capacity=seats))

# %% [markdown]
# These scores are random and favour no expert, and still tokens are lost. How many follows from arithmetic. The number $n$ of tokens that want one expert follows a binomial distribution, and what exceeds $C$ is dropped:
#
# $$\text{dropped} = \frac{E}{T}\, \mathbb{E}\bigl[(n - C)_+\bigr], \qquad n \sim \mathrm{Bin}(T, 1/E).$$
#
# For $C = T/E$ that is about $0.4 \sqrt{(E - 1)/T}$, because the positive part of a standard normal variable has the mean $1/\sqrt{2\pi} \approx 0.4$.

# %%
drawings.drops()

# %% [markdown]
# So a demonstration with a few dozen tokens drops many of them even when the router is perfect. Use large groups, or a factor well above 1.

# %% [markdown]
# ### Balance
#
# Real routers are not fair. An expert that is slightly better early on gets more tokens, learns more from them, and gets more still. Switch adds a loss. With $f_e$ the fraction of the tokens that choose expert $e$, counted *before* any is dropped, and $P_e$ the mean of its probability,
# <a id="equation-4"></a>
#
# $$L_\text{balance} = E \sum_e f_e P_e. \tag{4}$$
#
# The counts $f_e$ have no gradient. The $P_e$ have one, and each is pushed down in proportion to its count: popular experts become less likely. By hand, for two experts and three tokens that give the first one the probabilities 0.9, 0.8 and 0.4: $f = (\tfrac23, \tfrac13)$, $P = (0.7, 0.3)$, and the loss is $2\,(\tfrac23 \cdot 0.7 + \tfrac13 \cdot 0.3) = 1.13$.

# %% tags=["nbval-check-output"]
p = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.4, 0.6]]])
print(f"the example by hand: {experts.balance_loss(experts.switch(p.log())):.2f}")
even = experts.switch(10 * torch.eye(8).repeat(8, 1)[None])
alone = experts.switch(10 * torch.eye(8)[:1].repeat(64, 1)[None])
print(f"eight experts, even: {experts.balance_loss(even):.2f}")
print(f"eight experts, all tokens to one: {experts.balance_loss(alone):.2f}")

# %% [markdown]
# The loss is 1 when the load is even, and $E$ when one expert gets every token and the router is certain. It is added with a small weight, $\alpha = 0.01$. Often the **z-loss** $\frac1T \sum_t (\log \sum_e e^{\ell_{te}})^2$ (Zoph et al., 2022) is added too. It keeps the scores $\ell$ small, where low precision is accurate enough.
#
# ### Two of many, and experts that choose
#
# **GShard** (Lepikhin et al., 2020) and **GLaM** (Du et al., 2022) send a token to its two best experts. Their gates are divided by their sum. All first choices are seated before any second one. With experts of half the width the work stays the same, and a token that loses one seat still has the other.
#
# **Expert choice** (Zhou et al., 2022) turns this around. Each expert looks at all tokens of a group and takes the $C$ that suit it best. Every seat is used, the load is even by construction, and a token may get several experts, or none: compute follows the input. But *later* tokens now decide which earlier ones are taken. Take groups of 12 random tokens, and 3 experts that take 4 tokens each. In what share of the groups does the last token change what happens to an earlier one?

# %% tags=["nbval-check-output"]
print(f"in {experts.leak_rate(12, 3, 4, trials=2000):.0%} of them")

# %% [markdown]
# When a text is generated token by token, there are no later tokens. A causal model trained with expert choice has learned to rely on help that it will not have. The section on what breaks measures that.

# %% [markdown]
# ## The code
#
# Routers differ in a few lines. This is the one behind Switch, GLaM and Mixtral:

# %%
from effnb.lab import show

show(experts.top_k)

# %% [markdown]
# And here is the work itself. Tokens are sorted by expert, so that those of one expert are neighbours, and one **grouped product** multiplies each group by its own matrix. On a GPU it is one kernel; elsewhere it is a loop over experts.

# %%
show(experts.FusedExperts.forward)

# %% [markdown]
# Is this the layer that people use? Mixtral's block in `transformers` routes in the same way: two experts, gates divided by their sum, no limit on seats. Here both have the same weights:

# %% tags=["nbval-check-output"]
from transformers import MixtralConfig, logging
from transformers.models.mixtral import modeling_mixtral as mixtral

from effnb.chapters.design.experts import methods

logging.set_verbosity_error()
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8}
block = mixtral.MixtralSparseMoeBlock(MixtralConfig(**sizes, num_experts_per_tok=2))
for parameter in block.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
layer = experts.ExpertLayer(64, 96, 8, experts.MIXTRAL)
layer.load_state_dict(methods.weights_of_block(block))
x = torch.randn(2, 32, 64)
print("outputs agree:", methods.biggest_gap(layer(x), block(x)) < 1e-5)
theirs = mixtral.load_balancing_loss_func((layer.last.logits[0],), 8, 2)
print(f"transformers' loss / ours: {theirs / experts.balance_loss(layer.last):.3f}")

# %% [markdown]
# The last line is a trap worth knowing. In `transformers`, Mixtral's loss counts both choices of a token, so that perfect balance gives $k$, here 2, and not 1. The same weight $\alpha$ then pushes twice as hard. And the `expert_capacity` of its Switch is not a factor but a number of tokens in each sequence, 64 unless you change it.

# %% [markdown]
# ## Turn the knob
#
# When you run this page, a layer of experts is trained while you wait. Its tokens come from eight clusters: half of them from the first, a quarter from the next, and so on. Each cluster has a different map to learn.

# %%
panels.training()

# %% [markdown]
# Things to try when you run this page:
#
# - a weight of 0: how many bands survive? Then 0.1, and 1;
# - pin a weight of 0.1 and go to 1: the load is as even as can be. What does the error say?
# - *k* = 2: a token has a second chance, and the capacity is counted for two choices;
# - a capacity factor of 2 with a weight of 0: seats hide a bad router, at the price of memory;
# - 16 experts for eight clusters.

# %% [markdown]
# ## Does it hold?
#
# Two claims of the ledger meet in this chapter. Their parts, bounds and margins were registered before the measurements. The verdicts are computed from stored results, and a part that was not measured on the present models reads "not tested".

# %%
from effnb.chapters.design.experts import verdicts
from effnb.lab import claims_table

evidence = verdicts.stored()
claims_table(verdicts.s_m4(*evidence))

# %% [markdown]
# The grid behind the first picture also covers the other routers, over three seeds. Compare columns: a loss can be lower because there are more parameters, or because a router spends more work.

# %%
tables.grid_table(grid)

# %% [markdown]
# **Must the load be balanced?** The same model, trained with three weights of the loss of [equation 4](#equation-4):

# %%
drawings.loads(grid)

# %%
tables.balance_table(grid)

# %% [markdown]
# **Does compute follow the input?** Early exits adapt the depth to the input (*Adaptive computation* measures that half of the claim), and experts can adapt the width. With top-$k$ routing they do not: every token gets $k$ experts. Entmax routing, in the gallery below, chooses the number for each token. If that number suits the token, then handing the same numbers to *other* tokens must do worse at equal cost.

# %%
claims_table(verdicts.s_i4(*evidence))

# %% [markdown]
# ## What it costs and saves
#
# The number of operations stays the same, while the parameters grow, and with them the file and the memory. Time grows too: sorting, gathering and many small products take some, and a processor must fetch every expert that any token of the batch wants. If each of $T$ tokens chooses one expert at random, that is $E\,(1 - (1 - 1/E)^T)$ of them on average.

# %%
from effnb.chapters.design.experts import twins
from effnb.lab import compare_costs

ids = torch.arange(1, 257)[None]
dense = methods.dense_of()
compare_costs(dense, twins.twin("Switch", 8).eval(), ids, labels=("dense", "8 experts"))

# %% [markdown]
# Here is the layer beside that of `transformers`, with the same weights:

# %%
tables.speed_table(tables.stored("speed").data)

# %% [markdown]
# ## On a real model
#
# Training experts from scratch wastes what a dense model already knows. **Up-cycling** (Komatsuzaki et al., 2022) copies its feed-forward layer into every expert. If the gates of a token sum to 1, the function has not changed:

# %% tags=["nbval-check-output"]
from effnb.lab.bench import Bench

bench = Bench("mini-1m")
text = bench.windows[:2, :128]
for name, settings in (
    ("two of four, gates sum to 1", experts.MIXTRAL),
    ("one of four, Switch", experts.SWITCH),
):
    sparse = experts.upcycle(bench.model, 4, settings)
    with torch.no_grad():
        gap = methods.biggest_gap(sparse(text).logits, bench.model(text).logits)
    print(f"{name}: logits {'are the same' if gap < 1e-3 else 'have changed'}")

# %% [markdown]
# What is it worth? Both models are trained further, on the same texts and for the same number of steps. The copies start out alike, and come to differ only because the router sends them different tokens.

# %%
upcycled = tables.stored("upcycled").data
tables.upcycled_table(upcycled)

# %%
print(tables.upcycled_said(upcycled))

# %% [markdown]
# **Compressing experts.** Most of the parameters belong to experts, which `transformers` and this workbook alike store as one tensor with three axes. Methods that look for `nn.Linear` silently skip such tensors, and a model "in 4 bits" keeps nearly all of its bytes. The methods of this workbook treat each expert's matrices as linear layers, calibrate them on the tokens that the router sends there, and put the tensor together again. A method that leaves something out says so in a warning.

# %%
tables.compressed_table(tables.stored("compressed").data)

# %% [markdown]
# One of them live:

# %% tags=["nbval-check-output"]
from effnb.inference.pruning import magnitude

pruned = magnitude(sparse, 0.5)
for name, expert_layer in list(experts.expert_layers(pruned).items())[:2]:
    zeros = (expert_layer.experts.gate_up_proj == 0).float().mean()
    print(f"{name}: {zeros:.0%} of the first matrices are 0")

# %% [markdown]
# ## Where it breaks
#
# **A gate that is divided by itself.** With $k = 1$, "gates sum to 1" makes the gate of [equation 1](#equation-1) always 1. The router then gets no gradient from the loss:

# %% tags=["nbval-check-output"]
learned = scores.clone().requires_grad_()
for name, routing in (
    ("Switch", experts.switch(learned)),
    ("one choice, divided by its sum", experts.top_k(learned, 1)),
):
    (gradient,) = torch.autograd.grad(routing.gates.sum(), learned)
    print(f"{name}: gradient {'flows' if gradient.abs().max() > 1e-6 else 'is 0'}")

# %% [markdown]
# **Help from the future.** The decoder with expert choice is judged twice at the same positions: with the whole text present, as in training, and with only what comes before, as in generation.

# %%
print(tables.leak_said(grid))

# %% [markdown]
# **Padding that counts.** Padding tokens are all alike, so they all want the same expert. If they count, they take its seats and distort the balance loss. Here the first half of a sequence is padding; with a mask it takes no seat:

# %% tags=["nbval-check-output"]
mask = torch.ones(1, 12, dtype=torch.bool)
mask[:, :6] = False
padded = scores.clone()
padded[:, :6] = padded[:, 6:7]
for name, text_mask in (("counted", None), ("masked", mask)):
    routing = experts.switch(padded, text=text_mask, capacity=3)
    kept = int(routing.experts_of_token[:, 6:].sum())
    print(f"{name}: load {routing.wanted.tolist()}, {kept} of 6 tokens of text have a seat")

# %% [markdown]
# **Bad input** is answered with one sentence:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: experts.top_k(scores, 5),
    lambda: experts.expert_capacity(4, 8, 1.0),
    lambda: experts.RoutingSettings(k=2),
    lambda: experts.expert_choice(scores, 0),
    lambda: experts.upcycle(bench.model, 1),
    lambda: experts.with_experts(bench.model, 8, blocks=[9]),
    lambda: experts.to_mixtral(sparse),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.experts import exercises

for exercise in (exercises.seats, exercises.balance, exercises.choice):
    print(exercise)

# %% [markdown]
# **1.** How many seats does an expert have when each of $T$ tokens makes $k$ choices?


# %% tags=["exercise", "nbval-check-output"]
def seats_of(tokens, experts, k, factor):
    """A whole number."""
    raise NotImplementedError


_ = exercises.seats.check(seats_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Start from the number of choices that all tokens make together, and divide it among the experts.
#
# </details>


# %% tags=["solution"]
exercises.seats.solution()

# %% [markdown]
# **2.** The balance loss of a top-1 router, from its probabilities.


# %% tags=["exercise", "nbval-check-output"]
def balance_loss(p):
    """p is (tokens, experts); a number."""
    raise NotImplementedError


_ = exercises.balance.check(balance_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Mark each token's choice with a row of zeros and a single 1; the mean of those rows is $f$.
#
# </details>


# %% tags=["solution"]
exercises.balance.solution()

# %% [markdown]
# **3.** Which tokens does each expert take in expert choice? Return their indices in ascending order, one row for each expert.


# %% tags=["exercise", "nbval-check-output"]
def take(S, c):
    """S is (tokens, experts), c the tokens that each takes; (experts, c)."""
    raise NotImplementedError


_ = exercises.choice.check(take)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `topk` takes a dimension. Sort the indices afterwards.
#
# </details>


# %% tags=["solution"]
exercises.choice.solution()

# %% [markdown]
# ## Gallery
#
# **Entmax routing.** Entmax is a softmax that gives exact zeros (see *Attention*). Used as a router, $p = \operatorname{entmax}_{1.5}(x W_r)$ and $y = \sum_{p_e > 0} p_e\, \mathrm{FFN}_e(x)$: nothing is cut off, and a token gets as many experts as its scores leave above zero. One token below has a clear favourite, the other does not:

# %% tags=["nbval-check-output"]
two = torch.tensor([[[5.0, 0.0, 0.0, 0.0], [1.0, 0.8, 0.5, -3.0]]])
routing = experts.entmax_routing(two)
print("experts of each token:", routing.experts_of_token.tolist()[0])

# %% [markdown]
# The price is that the work is not bounded: an untrained router prefers no expert, so training starts dense. Use it where compute may follow the input and no batch has to be done by a fixed time.
#
# **GShard's coin.** GShard makes the second choice only with probability $\min(1, 2 g_2)$, where $g_2$ is its gate: an expert that would hardly count is usually skipped. `experts.gshard` has it, and *Co-design* runs the layer on several devices.
#
# **Jitter.** Switch multiplies the router's inputs in training by a little noise, so that close decisions can go either way: `RoutingSettings(jitter=0.01)`.
#
# **Which one?** For a causal model, start from top-2 with gates that sum to 1 and no limit on seats, as Mixtral does; on one machine nothing is gained by dropping tokens. Where experts are spread over several devices, a capacity keeps shapes fixed: Switch, or GShard, with $f = 1.25$ in training and 2 afterwards. Expert choice is for encoders. If you have a trained dense model, up-cycle it. The evidence here is from very small models: measure on yours.
#
# ## Further reading
#
# Shazeer et al., *Outrageously Large Neural Networks*, 2017, arXiv 1701.06538. Lepikhin et al., *GShard*, 2020, arXiv 2006.16668. Fedus, Zoph and Shazeer, *Switch Transformers*, 2022, arXiv 2101.03961. Du et al., *GLaM*, 2022, arXiv 2112.06905.
# Zhou et al., *Mixture-of-Experts with Expert Choice Routing*, 2022, arXiv 2202.09368. Zoph et al., *ST-MoE*, 2022, arXiv 2202.08906. Komatsuzaki et al., *Sparse Upcycling*, 2022, arXiv 2212.05055. Gale et al., *MegaBlocks*, 2022, arXiv 2211.15841. Jiang et al., *Mixtral of Experts*, 2024, arXiv 2401.04088. Peters, Niculae and Martins, *Sparse Sequence-to-Sequence Models*, 2019, arXiv 1905.05702.
