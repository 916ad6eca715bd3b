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
# # Co-design: hardware and software made for each other
#
# **A language model usually waits for its bytes, not for its arithmetic. Count both, and you know before you measure what a GPU kernel, a chip or a second
# machine can gain, and what it cannot.**
#
# After this chapter you can
#
# - draw the roofline of your machine, and place a matrix product under it before you run it;
# - say why decoding waits for memory and reading a prompt does not, and what four bits or sparse weights gain in each;
# - follow a GPU kernel line by line on your own processor;
# - drop tokens, heads and keys as accelerators do, and measure what that costs a real model;
# - spread a layer of experts over real processes, and predict every byte that they exchange.
#
# You need the tour (`00_start_here`), matrices, and attention. Rooflines, tiled GPU kernels, pruned attention and expert parallelism are taught in depth; a gallery near the end introduces the rest.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("06_hardware/2_codesign")

# %% [markdown]
# ## The picture
#
# The next cell times one linear layer on this machine, the one that runs the page, for one token and for many tokens at once. The weight comes from memory every time, as it does in a model that is larger than the
# processor's caches. **Predict first:** the panel takes a guess before it answers.

# %%
import os

os.environ["TRITON_INTERPRET"] = "1"  # before a GPU kernel is imported

from effnb.chapters.hardware.codesign import panels, roofs

machine = roofs.measured()
panels.together(machine)

# %% [markdown]
# All tokens share one weight, and for a single token, fetching it takes most of the time. More tokens cost little extra, up to the point where the arithmetic takes over. Choose a GPU in the panel to see what its data sheet
# allows. Here are all measurements in one picture:

# %%
from effnb.chapters.hardware.codesign import drawings

gpu = roofs.gpu()
drawings.roofs(machine, gpu)

# %%
print(roofs.sharing_said(machine))

# %% [markdown]
# Everything in this chapter moves along that slope: fewer bytes for the same answer, or more answers for the same bytes.

# %% [markdown]
# ## The idea
#
# ### Two numbers and a roof
#
# A machine computes at most $P$ operations per second and moves at most $B$ bytes per second. Work that does $F$ operations on
# $D$ bytes has the **arithmetic intensity** $I = F/D$, and it takes at least
#
# <a id="equation-1"></a>
#
# $$t \ge \max\left(\frac{F}{P}, \frac{D}{B}\right), \qquad \text{so its rate is at most } \min(P,\ I\,B). \tag{1}$$
#
# That is the **roofline** (Williams et al., 2009). Its corner lies at $I^* = P/B$. Left of the corner you wait for memory, right of it for arithmetic.
#
# For a weight of $n$ by $k$ numbers of $b$ bits, and $m$ tokens of 16 bits,
#
# $$F = 2mnk, \qquad D = \tfrac18\left(b\,nk + 16\,(mk + mn)\right), \qquad I \approx \frac{16\,m}{b} \text{ for few tokens}.$$
#
# By hand: two tokens, a weight of 3 by 4, everything in 16 bits.

# %% tags=["nbval-check-output"]
from effnb.hardware.codesign import roofline

work = roofline.matmul(m=2, n=3, k=4)
print(f"operations: 2 x 2 x 3 x 4 = {work.operations}")
print(f"bytes: 2 x (3 x 4 + 2 x 4 + 2 x 3) = {work.bytes:.0f}")
print(f"intensity: {work.operations_per_byte:.2f} operations per byte")

# %% [markdown]
# ### Why decoding waits
#
# A model reads a prompt by multiplying each weight with all of its tokens at once. It **decodes**, or writes, one token at a time: every step fetches all weights again, and with them the
# **key-value cache**, which holds the keys and values of all earlier tokens. A server can decode several sequences together.

# %% tags=["nbval-check-output"]
roofs.waiting_table()

# %% [markdown]
# More sequences share each fetch of the weights. That moves them to the right under the roof, but with a long context not far enough: each sequence has its own cache, which no batch makes smaller. The last line takes that cache away, and
# the waiting ends. That is why there are methods for the cache alone.
#
# ### What few bits and zeros can gain
#
# The same [equation 1](#equation-1) says what quantized and sparse weights are worth. In the *2:4* pattern two of four neighbouring weights are zero; the chip stores and multiplies only the other two, at twice the rate.

# %% tags=["nbval-check-output"]
roofs.gains_table()

# %% [markdown]
# Four bits gain most where tokens are few, and nothing for a long prompt: there, weights are unpacked and multiplied in 16 bits as before. Zeros that the hardware does not know about gain nothing, however many they are.
#
# ### Fusion and tiling
#
# A **GPU kernel** is a small program that a GPU runs many times side by side, each time on another part of the data. (The *Jupyter kernel*, which runs this page's Python, only shares the name.) Two ways of writing
# it move fewer bytes for the very same result.
#
# **Fusion.** A chain of $k$ element-wise steps over $n$ numbers moves $2kn$ numbers when each step is a GPU kernel, and $2n$ when one GPU kernel does them all. Your processor can do the same by
# working block by block, since a small block stays in its cache between the steps:

# %%
print(roofs.fusion_said())

# %% [markdown]
# **Tiling.** The result of a product, $m$ by $n$, is cut into tiles. Each tile reads its rows and its columns once and keeps its sums close by. With tiles of $t$ by $t$, all of them together read $\frac{2mnk}{t}$ numbers: twice the tile,
# half the traffic, until the tile no longer fits.

# %% tags=["nbval-check-output"]
roofs.tiles_table()

# %% [markdown]
# ### Hardware that leaves things out
#
# If bytes decide, the best byte is one that is never fetched. Two accelerators apply this to attention.
#
# **SpAtten** (Wang et al., 2021) removes tokens for good. A token matters as much as the attention that it has received so far, summed over layers, heads and queries:
#
# $$s_j = \sum_{\text{layers}} \sum_{\text{heads}} \sum_i P_{ij}.$$
#
# The lowest-ranked tokens are gone for all later layers: **cascade pruning**. Heads with small outputs go the same way.
#
# **Energon** (Zhou et al., 2021) chooses the keys again for each query. It computes scores from 2-bit operands, drops the keys below a threshold, repeats that with 4 bits, and computes exactly with what is left. Our
# threshold lies between the mean score and the best: $\theta = \alpha \max + (1-\alpha) \operatorname{mean}$. (The paper's own formula may differ.) Coarse scores can be enough, because only their order near the threshold matters.
#
# SpAtten by hand, with three tokens and one head. Each row is a query's attention, and each column sum is what a token has received:

# %% tags=["nbval-check-output"]
import torch

from effnb.hardware.codesign import attention_pruning

P = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.2, 0.3, 0.5]])[None, None]
total = attention_pruning.token_importance(P)[0, 0]
average = total / torch.tensor([3, 2, 1])  # queries that could see each token
for name, score in (("summed", total), ("averaged", average)):
    kept = attention_pruning.keep_top(score, 2).tolist()
    print(f"{name:9}", *(f"{s:.2f}" for s in score), " keep two:", kept)

# %% [markdown]
# In a **causal** model, which reads from left to right, more queries see an early token than a late one, so the sum favours it whether it matters or not. Dividing by the number of queries corrects that. In an encoder every token sees every other,
# and the problem does not arise.
#
# ### Experts on several devices
#
# A model can also outgrow its machine. A **layer of experts** holds $E$ small networks and sends each token to its two best. **GShard** (Lepikhin et al., 2020) spreads them over $N$ devices. A compiler needs fixed shapes, so each expert takes at most
#
# $$C = \lceil 2 f S / E \rceil$$
#
# tokens of a group of $S$, where $f$ is the **capacity factor**. A token whose experts are full is dropped: the layer adds nothing to it, and only the **residual stream**, the vector that each layer adds its result to, carries it on. Tokens travel to their experts and
# back in two **all-to-alls**, exchanges in which every device sends a different part of its data to every other. Each time,
#
# $$\text{bytes sent by a device} = \frac{N-1}{N}\, E\, C \cdot \text{groups} \cdot \text{width} \cdot \text{bytes per number}.$$

# %% [markdown]
# ## The code
#
# Triton's **interpreter** runs a GPU kernel in Python, one program after the other, on any processor. It is slow, and it can be watched. Below is every line that the *first* program of `int4_matmul` runs, with what the line has
# made. One token of 64 inputs is multiplied with a weight of 8 outputs, four bits each, in groups of 32.

# %%
from effnb.chapters.hardware.codesign import live

print(live.int4_walk())

# %% [markdown]
# Read it from top to bottom. `rows` says which outputs this program makes. The loop takes four units of 128 inputs: it fetches words of eight codes each (`packed`) and the step of their group (`scale`). Then, for each byte of the words, it fetches the inputs that its two codes belong to (`low` and `high`). A code never becomes a weight in memory: `_times` turns it into a floating-point number
# where it stands in its word and subtracts the zero point, in a **register**, the storage next to the arithmetic. That is the whole gain: half a byte fetched for a weight in place of two.
#
# The two accelerators' choices are short functions:

# %%
from effnb.lab import show

show(attention_pruning.token_importance, attention_pruning.filter_keys)

# %% [markdown]
# Leaving a key out is giving it a score of minus infinity. Keeping everything must leave the model as it was, and does:

# %% tags=["nbval-check-output"]
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
subject = live.Attention(bench)
for name, same in subject.unchanged().items():
    print(f"{name} that keeps everything leaves the logits unchanged: {same}")

# %% [markdown]
# GShard's layer is two `einsum`s around the experts, and `exchange`, twice, between them:

# %%
from effnb.hardware.codesign import gshard

show(gshard.moe_layer)

# %% [markdown]
# No simulation follows: two processes start on the machine that runs this page, each with half of the experts and half of the tokens. The two exchanges are written by hand, where GShard's compiler would place them. With room for all tokens, the processes must agree with a plain loop over tokens, and
# their bytes with the formula:

# %% tags=["nbval-check-output"]
from effnb.chapters.hardware.codesign import experts

reports = experts.run()
print(experts.run_said(reports))

# %%
print(experts.shares_said(reports))

# %% [markdown]
# ## Turn the knob
#
# **What to leave out.** When you run this page, the panel prunes `mini-5m`, a small language model, while you wait. *Keep* is the share that is left in the last layer; *alpha* is Energon's threshold. A greyed knob does nothing there.

# %%
from effnb.chapters.hardware.codesign import tables

rows = tables.stored("attention").data["table"]
panels.attention(subject, rows)

# %% [markdown]
# **More devices, more experts.** Real hidden states of `mini-5m` are routed by a router that was not trained. Each device brings its own tokens and its own experts. Does the exchange eat up the gain?

# %%
states = experts.hidden_states(bench)
panels.devices(states)

# %% [markdown]
# The share $(N-1)/N$ is soon close to one, so more devices hardly change what each of them sends. What counts is how much is computed for each number sent, and that depends on the *width of an expert* alone. Tokens are worth sending to wide experts:

# %% tags=["nbval-check-output"]
experts.exchange_table(states)

# %% [markdown]
# ## Does it hold?
#
# Two claims of the ledger belong to this chapter. Their parts and bounds were registered before the measurements; verdicts are computed from stored results. Cycles and energy of the chips are only simulated, so no verdict rests on them. Parts without a stored run show as *not tested*.

# %%
from effnb.chapters.hardware.codesign import verdicts
from effnb.lab import claims_table

grown, clock = experts.stored("experts"), experts.stored("scaling")
claims_table(verdicts.s_h3(*verdicts.stored()), verdicts.s_h4(grown, clock))

# %% [markdown]
# **Attention.** The stored measurement covers more settings than the panel. Losses are in **nats**: the negative natural logarithm of the probability that the model gave to the right token. A *pair* is one query with one key. The model was not fine-tuned for pruning.

# %% tags=["nbval-check-output"]
print(tables.attention_said(rows))
tables.attention_table(rows)

# %%
drawings.curves(rows)

# %% [markdown]
# **Experts.** The same tokens on 1, 2 and 4 processes. Bytes were counted where they are sent, operations by PyTorch's own counter:

# %% tags=["nbval-check-output"]
print(experts.grown_said(grown.data))
experts.grown_table(grown.data)

# %% [markdown]
# Devices share weights and operations. The exchange grows with their number, in bytes per operation, but to a limit: two devices send half of their tokens away, four send three quarters. More experts at the same capacity factor send no more, since each has fewer slots. Time need not shrink in
# proportion, because sending and receiving is work too:

# %%
experts.work_table(grown.data, clock.data)

# %% [markdown]
# ## What it costs and saves
#
# The cost card compares the pruned model with the original on *this* machine. An ordinary processor reads whole cache lines, runs of neighbouring bytes, and multiplies whole vectors; to leave out a key it would first have to know which, and choosing is work too.

# %%
from effnb.hardware.codesign import spatten
from effnb.lab import compare_costs

pruned = spatten(bench.model, token_keep=0.5, average=True)
prompt = bench.windows[:1, :128]
names = ("original", "SpAtten, masked")
compare_costs(bench.model, pruned, prompt, labels=names, rounds=3)

# %% [markdown]
# What a chip would gain that fetches keys bit by bit, we can only **simulate**: a fixed number of bytes per cycle, an array of multipliers of four bits by four, and a unit that compares. The shares that go in were measured; the cycles that come out are
# arithmetic.

# %% tags=["nbval-check-output"]
tables.chip_table(rows, roofline.Shape.of(bench.model.config))

# %% [markdown]
# The book's own GPU kernels live under a roof as well. What each waits for is counted; its time is measured on a GPU, by `make bench-gpu`, beside its peers.

# %% tags=["nbval-check-output"]
roofs.kernels_table(gpu)

# %% [markdown]
# The compiler needs no GPU, and its machine code says how many **instructions** a kernel spends on each weight, and how many **bytes are in flight**: asked for, and not there yet. Memory answers late, so it is busy only while enough requests are on their way:

# %% tags=["nbval-check-output"]
from effnb.lab import results

compiled = results.read("kernel_report").data["table"]
print(roofs.flight_said(compiled))
roofs.bounds_table(compiled)

# %%
from effnb.chapters.hardware.codesign import compiled as machine_code

machine_code.bounds(compiled, roofs.SHOWN)

# %% [markdown]
# Block sizes follow from this. A program of `int4_matmul` takes four units of inputs at once, because their words are what it has in flight. It takes 32 outputs, because a thread that converts an input then uses it for four weights; more would take the registers of other programs.
#
# **A tile on the tensor cores.** With many rows there is so much arithmetic that bytes need only arrive in time. `linear_cross_entropy` multiplies a tile at a time on **tensor cores**, units that multiply small matrices in one instruction of a **warp**, 32 threads in step. One turn of its loop:

# %% tags=["nbval-check-output"]
machine_code.walk_table(compiled)

# %% [markdown]
# From the top: the tile decides how often a fetched byte is used, and registers decide how large the tile can be. Each **stage** is room in memory on the chip for one turn's bytes. With three of them, the bytes of two turns travel while a third is multiplied, so this one program suffices to keep memory busy.

# %% [markdown]
# ## On a real model
#
# MiniLM is a sentence encoder of 22 million full-precision weights. First, which words survive? Each of its layers works on fewer tokens:

# %%
drawings.kept(*live.survivors())

# %% [markdown]
# The task is to find a package's description from its one-line summary. The vector of a text is the mean over the tokens that are left, so those that are gone are missing from it. Energon drops keys and no token.

# %% tags=["nbval-check-output"]
minilm = tables.stored("minilm").data["table"]
print(tables.minilm_said(minilm))
tables.minilm_table(minilm)

# %% [markdown]
# One setting live, on other descriptions:

# %% tags=["real-model"]
if results.live():
    print(live.search(keep=0.5))
else:
    print(tables.stored("minilm"))

# %% [markdown]
# ## Where it breaks
#
# **A roof that is beaten.** Measure something small again and again, and it comes from the processor's cache, not from memory. The roof seems to be broken; it is the wrong roof:

# %%
print(roofs.cached_said(machine))

# %% [markdown]
# **A queue that counts everyone.** Places before an expert are counted *within a group*. Count them over all tokens of a device, and which tokens are dropped depends on how many devices there are:

# %% tags=["nbval-check-output"]
logits = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(0))
slots = gshard.capacity(64, 8)


def dropped(parts, joined):
    """Choices that find their expert full, over all devices."""
    if joined:  # all groups of a device in one queue, with as much room together
        parts = [part.reshape(1, -1, 8) for part in parts]
    rooms = [slots * part.shape[1] // 64 for part in parts]
    return sum(gshard.route(*one).dropped_choices for one in zip(parts, rooms))


for name, joined in (("groups", False), ("one queue", True)):
    one, two = dropped([logits], joined), dropped(logits.split(2), joined)
    print(f"{name:9} dropped on one device {one}, on two {two}")

# %% [markdown]
# **Texts side by side.** A cascade judges keys by the queries so far. Put two continuations behind one context, and one would drop keys that the other needs. This is refused; other **bad input** also gets one sentence, before any work starts:

# %% tags=["nbval-check-output"]
from effnb.hardware.codesign import energon
from effnb.hardware.codesign.expert_parallel import Settings

for attempt in (
    lambda: spatten(bench.model, token_keep=0.0),
    lambda: spatten(pruned),
    lambda: energon(bench.model, rounds=(1, 4)),
    lambda: roofline.matmul(0, 8, 8),
    lambda: experts.run(Settings(devices=3)),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.hardware.codesign import exercises
from effnb.chapters.hardware.codesign.tile_loop import INTERPRETED, jit, loop, tl

for exercise in (exercises.time, loop, exercises.seats):
    print(exercise)

# %% [markdown]
# **1.** The least time of a product of $m$ tokens with a weight of `width` by `width`, stored in `bits`; inputs and results have 16 bits. Memory moves `memory` bytes per second, and the units do `arithmetic` operations per second.


# %% tags=["exercise", "nbval-check-output"]
def least_time(m, bits, width, memory, arithmetic):
    """Microseconds."""
    raise NotImplementedError


_ = exercises.time.check(least_time)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Bytes: the weight once, `m * width` inputs once, `m * width` results once. Then the larger of two times.
#
# </details>


# %% tags=["solution"]
exercises.time.solution()

# %% [markdown]
# Now measure. How much longer do 64 tokens take than one? Predict it from the two ceilings of this machine (32 bits for everything), and compare:

# %%
print(roofs.predicted_said(machine))

# %% [markdown]
# **2.** A tile loop, as a GPU kernel. Each program makes one tile, `SIZE` by `SIZE`, of `out`, which is $AB$. $A$ has `M` rows of `K` numbers and $B$ has `K` rows of `N`, both in
# half precision; `a`, `b` and `out` point to the first number of each, row by row. Sums are `tl.float32`. The check interprets your kernel on tiles that fit and on tiles that stick out, in memory whose surroundings are watched.
# (Without Triton, write the loop with slices of tensors, in the second half of the cell.)


# %% tags=["exercise", "nbval-check-output"]
if INTERPRETED:

    @jit
    def tile_kernel(a, b, out, M, N, K: tl.constexpr, SIZE: tl.constexpr):
        """Make one tile of the product."""
        raise NotImplementedError

    _ = loop.check(tile_kernel)
else:

    def tile_loop(a, b, size):
        """The product of a and b, in float32."""
        raise NotImplementedError

    _ = loop.check(tile_loop)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `rows` and `columns` of a tile: `tl.program_id(0)` and `tl.program_id(1)` say which tile, `tl.arange(0, SIZE)` counts inside. Then, for each tile of inner numbers: `tl.load` a tile of each matrix, `tl.dot` them, add.
# `rows[:, None] * K + inner[None, :]` is a square of places. `mask=` says which of them exist, `other=0.0` what the rest reads as. At the end `tl.store`, with a mask.
#
# </details>


# %% tags=["solution"]
loop.solution()

# %% [markdown]
# The interpreter does not notice a tile that is *read* past the end and thrown away, nor sums of a wrong type that Python quietly widens. A GPU may crash on the first, and its compiler refuses the second. That is why this
# book's GPU kernels are also compiled for real GPUs in its tests, and watched there by a memory checker (`make test-gpu`).

# %% [markdown]
# **3.** Tokens come in order, each with the expert that it wants. Give each its place before that expert, from 0, or -1 where `room` is used up.


# %% tags=["exercise", "nbval-check-output"]
def places(choices, experts, room):
    """One place for each token."""
    raise NotImplementedError


_ = exercises.seats.check(places)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Count, for each expert, how many have asked for it so far.
#
# </details>


# %% tags=["solution"]
exercises.seats.solution()

# %% [markdown]
# ## Gallery
#
# All of these are in the package, and tested.
#
# **Local value pruning** (SpAtten). Within a layer, read only the values of the most probable keys: $o_i = \sum_{j \in \text{top}} P_{ij} v_j$, not normalized again. It saves only the second half of attention; use it last.
#
# **Progressive quantization** (SpAtten). Read the high bits of the keys first, and the low bits only for queries whose attention comes out flat, $\max_j P_{ij} < \tau$: a peaked softmax forgives errors of its scores. Use it where memory delivers single bits.

# %% tags=["nbval-check-output"]
tables.bits_table(rows)

# %% [markdown]
# **Retention** (RetNet; Sun et al., 2023) replaces attention's growing cache by a state of fixed size, $R_i = \gamma R_{i-1} + k_i^\top v_i$ with a decay $\gamma$. Use it in models trained with it. `live.retention_walk()` shows its GPU kernel line by line.
#
# **Balance loss** (GShard). $\ell = \frac1E \sum_e \frac{c_e}{S} m_e$ with the first choices $c_e$ and the mean gate $m_e$ of each expert: smallest when all are wanted alike. `route` returns it; add it to the training loss.
#
# **Random second choice** (GShard). The second expert is kept with a probability proportional to its gate, to save capacity. Use it in training: `route(..., draws=...)`.
#
# **Sparse weights on a chip.** `simulate_matmul` knows three ways to skip: none, two of four, and any zero with a bitmap. With four-bit weights the bitmap is a fifth of the bytes, which sparsity must save first.
#
# **Under torchrun.** `torchrun --nproc-per-node 2 -m effnb.hardware.codesign.expert_parallel` runs the same layer on real clusters.
#
# **Which one?** Few tokens at a time: fewer bytes, by bits first. Long prompts: only faster arithmetic helps, as with 2:4. Element-wise chains: fuse. A long cache on an ordinary GPU: quantize it or evict from it;
# choosing keys per query needs a chip, or a GPU kernel that skips whole tiles. More experts than one machine holds: spread them, and make them wide.
#
# ## Further reading
#
# Williams, Waterman, Patterson, *Roofline*, Communications of the ACM 52(4), 2009. Austin et al., *How to Scale Your Model*, online, 2025. Wang, Zhang, Han, *SpAtten*, 2021, arXiv 2012.09852. Zhou et al., *Energon*, 2021, arXiv 2110.09310. Lepikhin et al., *GShard*, 2020, arXiv 2006.16668.
# Frantar et al., *MARLIN*, 2024, arXiv 2408.11743. Sun et al., *Retentive Network*, 2023, arXiv 2307.08621. Treviso et al., survey, 2023, arXiv 2209.00099.
