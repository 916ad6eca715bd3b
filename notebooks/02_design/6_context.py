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
# # Context
#
# **A model with rotary positions can read a text much longer than any it was trained on, with the same weights: only the speed at which it counts positions has to change, and not by the same factor everywhere.**
#
# After this chapter you can
#
# - say why a model fails behind its trained length, and which of its numbers are to blame;
# - compute by hand what Position Interpolation, NTK-aware scaling, NTK-by-parts and YaRN do to each frequency;
# - choose a method and a scale, and know what they cost inside the old length;
# - tell a model that reads a long text from one that uses it;
# - avoid two known bugs: a cache that disagrees with its model, and a scale that is silently ignored.
#
# You need the tour (`00_start_here`), and to know that attention compares a *query* with *keys* by scalar products. RoPE, Position Interpolation, NTK-aware scaling, NTK-by-parts and YaRN are taught in depth;
# dynamic NTK follows where things break.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("02_design/6_context")

# %% [markdown]
# ## The picture
#
# `mini-5m` was trained on texts of 512 tokens. Here it reads chapters of 4,096. The upper curve is the model as it is. For the lower one, a single line was run first: `model = yarn(model, 8)`. It changes 16 frequencies and one factor in attention, and no weight.

# %%
from effnb.chapters.design.context import drawings, tables

measured = tables.stored("positions").data
drawings.result(measured)

# %% tags=["nbval-check-output"]
print(tables.positions_said(measured))

# %% [markdown]
# **Perplexity** is $e^{\text{loss}}$, where the loss is the mean of $-\ln p$ of the right token, in **nats**. **Predict first:** the panel takes your guess before it answers. Then try other methods, and read less far.

# %%
from effnb.chapters.design.context import panels

panels.reading(measured)

# %% [markdown]
# ## The idea
#
# ### Positions as rotations
#
# A query or key of $d$ numbers is taken as $d/2$ pairs, and each pair as a point in a plane. **RoPE**, the rotary position embedding (Su et al., 2021), turns point $i$ of the token at position $m$ by the angle
#
# $$m\,\theta_i, \qquad \theta_i = b^{-2i/d}, \qquad i = 0, 1, \dots, d/2 - 1.$$
#
# The **base** $b$ is 10,000 in `mini-5m` and larger in many recent models. Turning both points of a scalar product by the same angle does not change it, so what a query at $m$ sees of a key at $n$ depends on the distance $m - n$ alone. The first pair turns by one radian per token and tells neighbours apart.
# The last pair has hardly moved after a thousand tokens.
#
# Two numbers describe a pair. Its **wavelength** $\lambda_i = 2\pi / \theta_i$ is the number of tokens of one full turn, and $r_i = L / \lambda_i$ is how many **rotations** it completes within the trained length $L$. Here are those of `mini-5m`:

# %% tags=["nbval-check-output"]
from effnb.design import context
from effnb.lab.bench import Bench

bench = Bench("mini-5m")
model = bench.model
own = context.rotary_table(model)
turns = context.rotations(own.inv_freq, own.trained_length)
print(f"L = {own.trained_length}, d = {own.dim}, b = {own.base:,.0f}")
print("rotations within L:", [float(f"{r:.2g}") for r in turns.tolist()])
print(f"{(turns < 1).sum()} of {len(turns)} pairs never complete one")

# %% [markdown]
# ### Why it breaks
#
# A pair that completes several rotations has shown the model every angle there is. One that completes only a part of a rotation has not. Behind the trained length it reaches angles that no weight has ever been fitted to, and the attention scores they make may be anything.

# %%
drawings.slowest_angle(own.dim, own.trained_length)

# %% [markdown]
# ### Four ways to slow down
#
# Let $s = L'/L$ be the **scale**: the wanted length over the trained one. All methods replace $\theta_i$ by some $h(\theta_i)$.
#
# **Position Interpolation** (PI; Chen et al., 2023) puts $m/s$ in the place of $m$, so that every position lies within the trained range. Because only the product $m\,\theta_i$ matters, this is the same as
#
# $$h(\theta_i) = \theta_i / s.$$
#
# But now the fastest pairs turn by less per token than the model has ever seen, and neighbours look alike.
#
# **NTK-aware scaling** (bloc97, 2023) changes the base instead:
# <a id="equation-3"></a>
#
# $$b' = b\, s^{d/(d-2)}, \qquad h(\theta_i) = \theta_i\, s^{-2i/(d-2)}. \tag{3}$$
#
# The exponent is chosen so that the fastest pair stays as it is and the slowest is divided by exactly $s$. With $d = 4$ and $b = 100$ this can be done by hand: $\theta = (1, \tfrac{1}{10})$. For $s = 2$, the new base is $100 \cdot 2^{4/2} = 400$, and $400^{-2/4} = \tfrac{1}{20}$:

# %% tags=["nbval-check-output"]
theta = context.rope_frequencies(4, 100.0)
for name, new in (
    ("trained", theta),
    ("PI", context.position_interpolation_frequencies(theta, 2)),
    ("NTK-aware", context.ntk_aware_frequencies(theta, 2)),
):
    print(f"{name:10}", [round(x, 4) for x in new.tolist()])

# %% [markdown]
# Everything between the two ends is slowed by less than $s$. Some of those pairs leave their trained range before the new context is full, which is why NTK-aware scaling wants a larger $s$ than the ratio of the lengths.
#
# **NTK-by-parts** (bloc97; Peng et al., 2023) decides pair by pair, and asks how many rotations it makes:
# <a id="equation-4"></a>
#
# $$h(\theta_i) = (1 - \gamma_i)\,\frac{\theta_i}{s} + \gamma_i\,\theta_i, \qquad \gamma_i = \begin{cases} 0 & r_i \le \alpha \\ 1 & r_i \ge \beta \end{cases} \tag{4}$$
#
# With at least $\beta = 32$ rotations, a pair is left alone. With at most $\alpha = 1$, it is interpolated. Between the two, $\gamma$ is a **ramp**. And here paper and code part: the paper's ramp is linear in the rotations, $\gamma_i = (r_i - \alpha)/(\beta - \alpha)$. The authors' code, `transformers` and every published checkpoint have one that is linear in the *index* $i$.

# %%
drawings.ramps()

# %% [markdown]
# The ends agree and the middle does not. If you load a checkpoint that was fine-tuned with one ramp, use that ramp.
#
# **YaRN** (Peng et al., 2023) is NTK-by-parts with one addition. A longer context gives the softmax more tokens to spread over. YaRN makes it sharper again, by a **temperature** $t$:
# <a id="equation-5"></a>
#
# $$\operatorname{softmax}\!\left(\frac{q^\top k}{t\sqrt{d}}\right), \qquad \sqrt{1/t} = 0.1 \ln s + 1. \tag{5}$$
#
# Queries and keys are both multiplied by $\sqrt{1/t}$, so scores grow by its square. Despite the name, a larger scale means a *lower* temperature:

# %% tags=["nbval-check-output"]
for s in (2, 4, 8, 16):
    factor = context.attention_factor(s)
    print(f"s = {s:2}: queries and keys × {factor:.4f}, scores × {factor**2:.4f}")

# %% [markdown]
# This is the frequency spectrum before and after, for the model of this chapter:

# %%
from effnb.chapters.design.context import methods

shown = {
    name: methods.divisors(model, methods.longer(model, name, 4.0))
    for name in ("RoPE", "PI", "NTK-aware", "NTK-by-parts")
}
paper = methods.longer(model, "YaRN", 4.0, ramp="paper")
drawings.spectrum(shown | {"paper's ramp": methods.divisors(model, paper)}, factor=4)

# %% [markdown]
# ## The code
#
# Each method is a function of frequencies, as short as its equation. Here are [equation 3](#equation-3) and [equation 4](#equation-4):

# %%
from effnb.lab import show

show(context.ntk_aware_frequencies, context.ntk_by_parts_frequencies)

# %% [markdown]
# The model is not rewritten. A copy that shares all weights gets the new table, and its configuration says so:

# %%
show(context.yarn)

# %% [markdown]
# Do the tables agree with the library that people use? `transformers` has Position Interpolation as "linear", and "yarn" with the code's ramp. NTK-aware scaling needs no type: a larger `rope_theta` is all there is to it.

# %% tags=["nbval-check-output"]
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

for kind, function in (("linear", context.position_interpolation), ("yarn", context.yarn)):
    longer = function(model, 4.0)
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](longer.config, "cpu")
    gap = (theirs - methods.table_of(longer)).abs().max()
    print(f"{kind:7} largest difference {gap:.0e}, queries and keys × {factor:.4f}")

# %% [markdown]
# ## Turn the knob
#
# `mini-5m` reads a chapter of a novel that it has never seen, once, with the frequencies that you make. A knob that a method does not use is greyed; a scale too small for the length is allowed, so that you see where it ends.

# %%
panels.live(bench)

# %% [markdown]
# Things to try when you run this page:
#
# - *PI* from $s = 1$ to 16: how much of the grey region, which the model could read before, do you give away?
# - *YaRN* at 4,096 tokens and $s = 4$: the scale is fixed, and the model fails behind $sL$ as it once did behind $L$;
# - *NTK-aware* at $s = 4$ and 2,048 tokens, and then at $s = 8$;
# - *YaRN* with $\beta = 8$: fewer pairs are slowed. With $\alpha = 4$: more are;
# - turn the temperature off. Then put it too high.
#
# Over all scales, on a few chapters, stored:

# %%
stretched = tables.stored("factors").data
drawings.factors(stretched)

# %% tags=["nbval-check-output"]
print(tables.best_factor_said(stretched))
print(tables.variants_said(stretched))

# %% [markdown]
# ## Does it hold?
#
# Three claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements, and the verdicts are computed from stored results. A part that is not measured on the present model reads "not tested".
#
# **RoPE alone, and Position Interpolation.**

# %%
from effnb.chapters.design.context import verdicts
from effnb.lab import claims_table

evidence = verdicts.stored()
claims_table(verdicts.y_1(*evidence))

# %% [markdown]
# **The methods that came after.**

# %%
claims_table(verdicts.y_2(*evidence))

# %% [markdown]
# The table beneath shows both sides of the bargain. Its two columns for each model score *the same tokens*, once with 512 tokens of text and once with 2,048. Only such numbers can be compared across lengths: other tokens are easier or harder.

# %% tags=["nbval-check-output"]
zero_shot = tables.claimed("zero_shot").data["table"]
print(tables.zero_shot_said(zero_shot))
tables.zero_shot_table(zero_shot)

# %% [markdown]
# **With a short training.** The paper says that YaRN reaches its goal in two fifths of the steps of Position Interpolation, and with a tenth of the tokens that Code Llama used, which changed the base to $10^6$ and trained for long. The model here is more than ten thousand times smaller. What can be tested is the *ratio*: the same texts, in the same order, for all.

# %%
claims_table(verdicts.y_3(*evidence))

# %% tags=["nbval-check-output"]
tuned = tables.claimed("tuned").data["table"]
print(tables.tuned_said(tuned))
tables.tuned_table(tuned)

# %% [markdown]
# The row called *RoPE* is the control that is easily forgotten: no method at all, and the same training. Wherever it is close to the others, the training did the work and not the frequencies.

# %% [markdown]
# ### Is far text used?
#
# A flat loss does not prove it. Most tokens can be foreseen from near ones, and a model that ignored everything but its last 512 tokens would have a flat curve too. So ask for something that was said once. The prompt is a list of records, `[ key value]`; all pairs but one come again and again, that one is told once, at some depth, and its key is asked for at the end.

# %%
asked = tables.stored("recall").data
drawings.recall(asked)

# %% tags=["nbval-check-output"]
print(tables.recall_said(asked))

# %% [markdown]
# If nothing is recalled on the left of the dashed line, the map says nothing about the right: a model that cannot recall inside its own length cannot lose it outside. Where the left is bright, compare how far the light reaches.

# %% [markdown]
# ## What it costs and saves
#
# No weight is added, and no operation. What grows is the text: attention takes work in proportion to its square, and the **KV cache**, which keeps the keys and values of all tokens read, grows with every token.

# %% tags=["nbval-check-output"]
for tokens in (512, 4096):
    print(
        f"{tokens:5,} tokens: {methods.cache_bytes(model, tokens) / 2**20:.2f} MiB of keys, values"
    )

# %%
from effnb.lab import compare_costs

extended = context.yarn(model, 4.0)
compare_costs(model, extended, bench.windows[:1, :256], labels=("original", "YaRN, s = 4"))

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M was trained on 8,192 tokens. It reads one text of 10,240, chapters of a novel one after the other, with three of the methods at $s = 2$. Its linear weights come from a file that rounded them to a 4-bit grid, and its perplexity is a little worse for it; all methods meet the same weights. One text is one draw: the picture has no interval.

# %%
smollm2 = tables.stored("smollm2").data
drawings.smollm2(smollm2)

# %% tags=["nbval-check-output"]
print(tables.smollm2_said(smollm2))

# %% [markdown]
# ## Where it breaks
#
# ### A cache that disagrees
#
# A fixed scale costs quality on every text, also on short ones. **Dynamic NTK** (emozilla, 2023) lets it grow with the text, $s(l) = \max(1, l/L)$ for $l$ tokens, so that up to $L$ nothing changes. In one pass over a text that works. With a KV cache it goes wrong in many libraries:
#
# 1. keys are cached after they were turned;
# 2. the next token makes the text longer, and so changes the base;
# 3. the new query is turned with the new base and meets old keys turned with the old one. Their angles belong to no table, and the score no longer depends on the distance alone.
#
# Here is the largest difference that a cache makes to the last logits, after 640 tokens of which the last 160 came one by one:

# %% tags=["nbval-check-output"]
from effnb.lab import load
from effnb.lab.texts import long_texts

small = load("mini-300k", device="cpu")
ids = long_texts(small.tokenizer, 640, count=1)[0]
for name, gap in methods.cache_gaps(small.model, ids, start=480).items():
    print(f"{name:28}", "same logits" if gap < 1e-3 else f"differ by more than {gap // 0.5 / 2}")

# %% [markdown]
# Here `dynamic_ntk` caches keys *before* they are turned, and gives each query its own table: that of a text which ends with it. One pass and any number of cached steps then agree. The price is work: beyond $L$, each query turns all keys for itself.
#
# The formula differs too. `transformers` computes $s = f\,l/L - (f - 1)$ with a factor $f$. Only $f = 1$ gives $l / L$. At four times the length, $f = 4$ gives:

# %% tags=["nbval-check-output"]
print(f"{context.transformers_scale(4 * 512, 512, 4.0):.0f} instead of 4")

# %% [markdown]
# ### A scale that is ignored
#
# What use is a model that forgets its scale when it is saved? Every fixed table here is written into the configuration in words that `transformers` knows:

# %% tags=["nbval-check-output"]
tables.round_trip_table(methods.round_trips(small.model, ids))

# %% [markdown]
# Dynamic NTK is saved as "dynamic" with a factor of 1. What `transformers` loads from that has the fault above, so call `dynamic_ntk` on the loaded model again.
#
# ### A context too short for β
#
# No pair makes more than $L / 2\pi$ rotations. With $\beta = 32$ and $L \le 201$, not one pair is left alone, and YaRN comes close to Position Interpolation:

# %% tags=["nbval-check-output"]
for length in (128, 512, 4096):
    gamma = context.paper_ramp(own.inv_freq, length)
    print(f"L = {length:5,}: {(gamma == 1).sum()} of {len(gamma)} pairs are left alone")

# %% [markdown]
# ### Bad input
#
# is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: context.yarn(model, 0.5),
    lambda: context.yarn(extended, 2.0),
    lambda: context.ntk_by_parts(model, 4.0, alpha=32, beta=1),
    lambda: context.extend(model, "ntk", 4.0),
    lambda: context.rope_frequencies(33),
    lambda: context.position_interpolation(model, 2.0, trained_length=1024),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.design.context import exercises

for exercise in (exercises.base, exercises.parts, exercises.sharper):
    print(exercise)

# %% [markdown]
# **1.** The base with which the slowest of $d/2$ pairs turns exactly $s$ times more slowly, while the fastest keeps its speed.


# %% tags=["exercise", "nbval-check-output"]
def base_for(b, s, d):
    """A number."""
    raise NotImplementedError


_ = exercises.base.check(base_for)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Pair $i$ has $b^{-2i/d}$. What is $i$ for the slowest? Write down the old and the new frequency of that pair, and ask for their ratio to be $s$.
#
# </details>


# %% tags=["solution"]
exercises.base.solution()

# %% [markdown]
# **2.** The frequencies of NTK-by-parts, with the ramp of the paper.


# %% tags=["exercise", "nbval-check-output"]
def by_parts(theta, s, L, alpha, beta):
    """As many numbers as theta has."""
    raise NotImplementedError


_ = exercises.parts.check(by_parts)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Rotations first: how many times does each pair turn within $L$ tokens? A tensor's `clamp` cuts off what leaves a range.
#
# </details>


# %% tags=["solution"]
exercises.parts.solution()

# %% [markdown]
# **3.** A row of attention weights, from the scores that unscaled queries and keys have, as YaRN computes it by [equation 5](#equation-5) at the scale $s$.


# %% tags=["exercise", "nbval-check-output"]
def attention_row(scores, s):
    """As many numbers as scores has, which add up to 1."""
    raise NotImplementedError


_ = exercises.sharper.check(attention_row)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Both the query and the key are multiplied by $\sqrt{1/t}$. How often does a scalar product feel it?
#
# </details>


# %% tags=["solution"]
exercises.sharper.solution()

# %% [markdown]
# ## Gallery
#
# **Dynamic NTK** (emozilla, 2023): $b(l) = b\, s(l)^{d/(d-2)}$. Use it where most texts are short and nothing may be lost on them, in an implementation whose cache agrees.
#
# **LongRoPE** (Ding et al., 2024) searches a divisor for every pair, in place of a formula. `transformers` has it as "longrope", which can express any fixed table; this package writes the paper's ramp that way.
#
# **Which one?** Without training, take YaRN, at a scale of the ratio of the lengths, and check recall and not only the loss. With training, measure the control without any method first: it is the one that papers leave out. And if your texts are mostly short, keep the original beside the extended model, since both share every weight.
#
# ## Further reading
#
# Su et al., *RoFormer*, 2021, arXiv 2104.09864. Chen et al., *Extending Context Window of Large Language Models via Positional Interpolation*, 2023, arXiv 2306.15595. bloc97 and emozilla, posts in r/LocalLLaMA, June and July 2023. Peng, Quesnelle, Fan and Shippole, *YaRN*, ICLR 2024, arXiv 2309.00071.
# Rozière et al., *Code Llama*, 2023, arXiv 2308.12950. Ding et al., *LongRoPE*, 2024, arXiv 2402.13753. Press, Smith and Lewis, *Train Short, Test Long*, 2022, arXiv 2108.12409. Mohtashami and Jaggi, *Landmark Attention*, 2023, arXiv 2305.16300.
