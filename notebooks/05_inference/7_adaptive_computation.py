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
# # Adaptive computation
#
# **Most words are easy. A model can stop early at those, let a smaller model draft them, or leave them to a smaller model altogether; the art is to know which words are easy, and to promise something about the result.**
#
# After this chapter you can
#
# - let each token leave a decoder at the layer that is sure enough, and fill the layers that it skipped;
# - choose the threshold so that a promise about the text holds with a known probability;
# - make a large model faster with a small one without changing a word, and predict when that makes it slower;
# - write a rule that hands hard inputs to a larger model, and learn it after the fact.
#
# You need the tour (`00_start_here`) and probabilities. CALM with its guarantee, speculative decoding and deferral are taught in depth; a gallery near the end introduces the other methods.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/7_adaptive_computation")

# %% [markdown]
# ## The picture
#
# A decoder computes every token with all of its layers, whether it writes the second half of a name or the first word of a new thought. Below, a small model writes the same sentence three times. Where it is pale, the token left the model after few layers. Look for the first place where the text changes.

# %%
from effnb.chapters.inference.adaptive_computation import drawings, methods

writer = methods.Writer()
drawings.texts(writer, (1.0, 0.4, 0.2))

# %% [markdown]
# A token that is wrong also misleads the tokens after it. So the questions of this chapter are: how does a layer know that it knows, what may be promised about the whole text, and does skipping layers save *time*?
#
# The model is `mini-5m-exits`: `mini-5m`, trained a little longer so that each of its six layers can predict the next token.

# %% [markdown]
# ## The idea
#
# ### Leave when sure
#
# A decoder with $L$ layers turns a token into states $d^1, \dots, d^L$, and its output head $W$ turns the last one into scores for all words. The head can read any of them. An **exit** at layer $i$ predicts with
#
# $$p_i = \operatorname{softmax}\bigl(W \operatorname{norm}(d^i)\bigr).$$
#
# In an ordinary model the early exits say little, because nothing ever asked them. Training sums the losses of all of them, with weights that grow with depth:
#
# $$\mathcal L = \sum_{i=1}^{L} \omega_i \mathcal L_i, \qquad \omega_i = \frac{i}{1 + 2 + \dots + L}.$$
#
# **CALM** (Schuster et al., 2022) lets a token leave at the first layer whose **confidence** $c^i$ reaches a threshold $\lambda$. Three measures of confidence are in use:
#
# - **softmax**: $p_{(1)} - p_{(2)}$, by how much the most probable word leads the second. It needs the head at every layer;
# - **saturation**: $\cos(d^{i-1}, d^i)$. Has the state stopped turning? It costs almost nothing;
# - a **classifier**: one linear map for all layers, trained on unlabelled text to predict whether layer $i$ already has the word of layer $L$.
#
# ### What the skipped layers are missing
#
# Later tokens attend to earlier ones in *every* layer, and a token that left at layer $j$ has no keys and values above. CALM copies its state: for every $k > j$ it sets $d^k := d^j$, and layer $k + 1$ computes keys and values from it with *its own* projections. That is two thin products in place of a whole layer.
#
# ### A promise
#
# A low threshold is fast and wrong, a high one slow and right. Which one is good enough? Take $n$ prompts, and let the loss of a prompt be how far the early text lies from the full model's, between 0 and 1. We want the mean loss over *all* prompts, the **risk** $R(\lambda)$, to be at most $\delta$. We only see the mean over $n$ of them, $\hat r(\lambda)$, which may be lucky.
#
# **Learn-then-Test** (Angelopoulos et al., 2021) treats "$R(\lambda) > \delta$" as a hypothesis to be rejected. Its **p-value** bounds how probable a mean as low as $\hat r$ would be if the risk were above $\delta$:
#
# $$p = \min\Bigl(e^{-n h(\hat r, \delta)},\ e\, P\bigl(\operatorname{Bin}(n, \delta) \le \lceil n \hat r \rceil\bigr)\Bigr), \qquad h(a, b) = a \ln \tfrac ab + (1 - a) \ln \tfrac{1 - a}{1 - b},$$
#
# with $\min(\hat r, \delta)$ in place of $\hat r$ in the first term. Start at the safest threshold and walk down while $p \le \varepsilon$. Stop at the *first* failure, and take the last threshold before it. Then $R(\lambda) \le \delta$ with probability at least $1 - \varepsilon$ over the draw of the prompts.
#
# Why not simply take the lowest threshold with $\hat r \le \delta$? Because the lowest is where luck shows. Here both rules calibrate 3,000 times on 400 prompts of a world whose true risk is known, $R(\lambda) = (1 - \lambda)^2 / 4$, with $\delta = 0.1$ and $\varepsilon = 0.05$:

# %% tags=["nbval-check-output"]
from effnb.inference.adaptive_computation import learn_then_test

for rule in ("naive", "fixed sequence", "Bonferroni"):
    found = learn_then_test.simulate(lambda x: (1 - x) ** 2 / 4, rule=rule, repetitions=3000)
    print(
        f"{rule:15} breaks its promise in {found.violations:6.1%} of the calibrations; "
        f"mean threshold {found.mean_threshold:.2f}"
    )
print(f"the true boundary lies at a threshold of {1 - 2 * 0.1**0.5:.2f}")

# %% [markdown]
# The naive rule comes close to the true boundary, and breaks its promise far more often than in one of twenty cases. The walk keeps it. **Bonferroni**, which tests every threshold at $\varepsilon$ divided by their number, keeps it too and gives away more: a walk in an order that was fixed beforehand needs no such correction.
#
# ### Draft and check
#
# **Speculative decoding** (Leviathan et al., 2022) saves time without changing the text at all. A small model drafts $\gamma$ tokens from its distributions $q$; the large one checks all of them in *one* pass, which gives its own distributions $p$. Each draft $x$ is accepted with probability $\min(1, p(x) / q(x))$. At the first rejection a token is drawn from what the draft offered too rarely, $\max(0, p - q)$, scaled to sum to 1. What comes out has the distribution $p$ exactly:
#
# $$\underbrace{q \min(1, p / q)}_{\text{accepted}} + \underbrace{(1 - \beta)\,\frac{p - \min(p, q)}{1 - \beta}}_{\text{drawn after a rejection}} = p, \qquad \beta = \sum_x \min\bigl(p(x), q(x)\bigr).$$
#
# Four words, by hand: $p = (0.5, 0.3, 0.15, 0.05)$ and $q = (0.1, 0.6, 0.2, 0.1)$. The accepted part is their minimum, $(0.1, 0.3, 0.15, 0.05)$, so $\beta = 0.6$. What $p$ has beyond it lies on the first word alone, so after a rejection it is always that one: $0.1 + 0.4 = 0.5$.

# %% tags=["nbval-check-output"]
from effnb.inference.adaptive_computation import speculative

counted = methods.sampled(methods.P, methods.Q, draws=4000)
print("accepted :", round(float(speculative.acceptance(methods.P, methods.Q)), 2))
print("wanted   :", [round(x, 2) for x in methods.P.tolist()])
print("came out :", [round(x, 2) for x in counted.tolist()])

# %% [markdown]
# If each draft is accepted with probability $\alpha$, independently, a pass of the target gives $(1 - \alpha^{\gamma + 1}) / (1 - \alpha)$ tokens. With a draft that takes $c$ times the target's time per token, the pair is faster than the target alone by
# <a id="equation-5"></a>
#
# $$\frac{1 - \alpha^{\gamma + 1}}{(1 - \alpha)(\gamma c + 1)}. \tag{5}$$
#
# This can be below 1. The formula also assumes that checking $\gamma + 1$ tokens takes the target as long as writing one, which holds where reading the weights takes the time, and not where arithmetic or overhead does.
#
# ### Ask someone else
#
# A **cascade** asks the small model first, and *defers* to a larger one (the expert $m$) where the small one is not sure. Let $\eta_y = P(y \mid x)$ be the probability of label $y$, $c$ the cost of a deferral in errors, and $a = P(m = y \mid x)$ the probability that the expert is right. It pays to defer if and only if $a - c > \max_y \eta_y$. **Chow's rule** compares the small model's confidence with a fixed threshold, which is the same only if the expert is equally good everywhere.
#
# One may train the small model and the rule together, with one more output $\bot$ for "defer". The **cost-sensitive softmax** (CSS) does so, and its best answer is known in closed form:
#
# $$p^*_i \propto \eta_i + c\,(1 - a), \qquad p^*_\bot \propto a\,(1 - c).$$
#
# Look at the first term. Every label, right or wrong, is raised by the same $c\,(1 - a)$: the small model is trained on smoothed labels, the more so the higher the cost. **Post-hoc** deferral trains the small model alone, freezes it, and learns only the rule, on texts that were held back.

# %% [markdown]
# ## The code
#
# The confidence that decides, and the copy that fills what was skipped:

# %%
from effnb.inference.adaptive_computation import confidence, layers
from effnb.lab import show

show(confidence.softmax_response, layers.LayerStack.copy_state)

# %% [markdown]
# The walk needs its p-value and nothing else; the exactness of speculation lies in eight lines:

# %%
show(learn_then_test.hoeffding_bentkus, speculative.verify)

# %% [markdown]
# Does it do what it says? A threshold of 1 must give the text of ordinary greedy decoding, token for token, and so must speculation with any draft. Here is the reference library's own `generate` beside ours:

# %% tags=["nbval-check-output"]
from effnb.inference.adaptive_computation import calm
from effnb.lab.bench import Bench

bench = Bench("mini-5m", questions=0, windows=4)
draft = Bench("mini-300k", questions=0, windows=1)
prompt = bench.windows[:1, :24]
wanted = bench.model.generate(
    prompt, attention_mask=prompt != -1, max_new_tokens=32, do_sample=False, eos_token_id=None
)[0, 24:].tolist()
never = calm.generate(bench.model, prompt, threshold=1.0)
drafted = speculative.generate(bench.model, draft.model, prompt)
print("no token leaves early:", list(never.tokens) == wanted)
print("drafted by mini-300k :", list(drafted.tokens) == wanted)

# %% [markdown]
# ## Turn the knob
#
# Now the threshold is yours. When you run this page, the panel writes while you wait; *times faster* is measured at that moment, against the same model with all layers.

# %%
from effnb.chapters.inference.adaptive_computation import panels

panels.leaving(writer)

# %% [markdown]
# Things to try when you run this page:
#
# - lower the threshold step by step. What goes first, the words or the sense?
# - compare *softmax* with *saturation* at the same number of layers. Which text is better, and which is faster?
# - let skipped layers have *projected* keys and values, copied as they are from the layer the token left at. It is less work. What does it cost?
#
# ### Does a draft pay?
#
# The speed of [equation 5](#equation-5), and the pairs of this book's models, where they were measured.

# %%
from effnb.chapters.inference.adaptive_computation import tables

pairs = tables.stored("speculative").data["table"]
panels.speculation(pairs)

# %% [markdown]
# ### What may be promised?
#
# From stored texts of 200 prompts, each written at eight thresholds. The loss is one minus **ROUGE-L**, the longest common subsequence of the early and the full text as a part of their lengths. *Textual* consistency compares the two; *risk* consistency asks how much worse the early text is as a continuation of the real one.

# %%
promised = tables.judged("calm").data["table"]
panels.guarantee(promised)

# %% [markdown]
# ### Hand it on
#
# Four models answer the same questions about package descriptions. A question is deferred where the smaller model's confidence in its answer is below the knob.

# %%
asked = tables.stored("cascade").data["table"]
panels.cascade(asked)

# %% [markdown]
# And what does deferring cost, where the expert is a specialist? The base model reads MiniLM's first layer only; the expert reads all six, and knows three of the six sections of the package archive.

# %%
deferred = tables.judged("defer").data["table"]
panels.deferral(deferred)

# %% [markdown]
# ## Does it hold?
#
# Three claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements. The verdicts are computed from stored results, and a part that was not measured on the present models reads "not tested".

# %%
from effnb.chapters.inference.adaptive_computation import verdicts
from effnb.lab import claims_table

stored = verdicts.stored()
claims_table(verdicts.s_i4(*stored), verdicts.g_6(*stored), verdicts.g_7(*stored))

# %% [markdown]
# **Early exits.** Each dot is a threshold; the dotted line is what a shorter model would do that leaves at the same layer for every token.

# %%
exits = tables.stored("exits").data["table"]
drawings.curves(exits)

# %% tags=["nbval-check-output"]
print(tables.exits_said(exits))
print(tables.words_said(exits))
print(tables.measures_said(exits))
tables.measures_table(exits)

# %% [markdown]
# Mind the difference between the two pictures, and the last column: a text is made of words, and an early exit that chooses the same word with less certainty costs nats and changes nothing. Even the oracle, whose words are those of the full model by definition, pays that price. This is why CALM promises something about *texts*.
#
# **The promise**, kept on prompts that did not calibrate it:

# %% tags=["nbval-check-output"]
print(tables.calm_said(promised))
print(tables.resampled_said(promised))

# %% [markdown]
# **Deferral.** Read the fifth column downwards: the accuracy of the base model alone, trained jointly.

# %% tags=["nbval-check-output"]
print(tables.deferral_said(deferred))
tables.deferral_table(deferred)

# %% [markdown]
# A rule with many inputs can overfit as well: here it reads 390 numbers of each text and learns from fewer than 700 texts, while confidence is a single number. Which of the two does better depends on how much the expert's skill varies, and on how many texts were held back.
#
# **Cascades.** How sure was a model of a whole text? The mean of its tokens' log-probabilities hides one bad token, the sum punishes length, and quantiles lie between:

# %% tags=["nbval-check-output"]
print(tables.sequences_said(tables.stored("sequences").data["table"]))
print(tables.cascade_said(asked))
tables.cascade_table(asked)

# %% [markdown]
# ## What it costs and saves
#
# An exit adds no weights: it borrows the head. But it adds *work*, and that is where small models differ from large ones. `mini-5m` has 4,096 words and 256 numbers in a state, so that its head holds more numbers than one of its layers. Asking a layer how sure it is by softmax then costs more than computing the next one.

# %%
speed = tables.stored("speed").data["table"]
print(tables.parts_said(speed))
print(tables.speed_said(speed))
tables.speed_table(speed)

# %% [markdown]
# Layers are not time. A measure that needs the head must leave very early to gain anything, and a measure that is nearly free gains where it leaves at all. On a batch the gain is smaller still: texts that move in step leave when the *least* sure of them does. Classifiers have it easier, because an input that has left can be taken out of the batch (**compaction**).
#
# And speculation, where the text does not change?

# %%
drawings.drafts(pairs)

# %%
print(tables.speculative_said(pairs))
tables.speculative_table(pairs)

# %% [markdown]
# Rows with “first” are LayerSkip's **self-speculation**: the first layers draft, the others check, and the drafts' keys and values are used twice. Compare the two targets: training the exits is what makes the drafts acceptable. On the machine that ran this page:

# %%
same, rate, passed, faster = methods.pair_here(bench, draft, draft_tokens=3)
print(f"mini-300k drafts 3 tokens for mini-5m: same text {same}, {rate:.0%} accepted,")
print(f"{passed:.1f} tokens per pass, {faster:.2f} times faster than mini-5m alone")

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M has 30 layers, and none of its exits was ever trained. How many of its layers does a token need, if an oracle could tell?

# %% tags=["nbval-check-output"]
deep = tables.stored("smollm2").data["table"]
print(tables.smollm2_said(deep))
tables.smollm2_table(deep)

# %% [markdown]
# The head is the obstacle again: a vocabulary of 49,152 words is read at every exit. (The linear weights of this copy lie on a 4-bit grid; all exits read the same rounded weights, so the comparison between them stands.) One setting live: half of the layers draft for all of them.

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here())
else:
    print(tables.stored("smollm2"))

# %% [markdown]
# ## Where it breaks
#
# **Thresholds that decay.** Early tokens matter more, so CALM starts strict. The paper's formula and its released code are not the same: the paper's can *exceed* the threshold that was calibrated.

# %% tags=["nbval-check-output"]
for form in ("paper", "code"):
    found = confidence.thresholds(0.5, tokens=8, decay=4.0, form=form)
    print(f"{form}: {[round(x, 3) for x in found]}")

# %% [markdown]
# **The smallest p-value.** Searching the grid for any threshold that passes, instead of stopping at the first failure, is a lottery with as many tickets as there are thresholds. Sixty thresholds, all but the safest of them just past the tolerance, each with noise of its own:

# %% tags=["nbval-check-output"]
grid = [round(1 - j / 100, 2) for j in range(60)]
for rule in ("fixed sequence", "smallest p"):
    found = learn_then_test.simulate(
        lambda x: 0.02 if x >= 0.9 else 0.105, grid=grid, n=200, rule=rule, shared=False
    )
    print(f"{rule:15} breaks its promise in {found.violations:.0%} of the calibrations")

# %% [markdown]
# Three more ways to lose the guarantee: to count tokens in place of prompts (the tokens of a text are not independent), to calibrate on one kind of text and use another, and to judge on the prompts that calibrated.
#
# **Smoothed by accident.** A model that is right in nine of ten cases, beside an expert that is right in eight of ten, at a cost of 0.3. The joint loss teaches it to say:

# %% tags=["nbval-check-output"]
import torch

from effnb.inference.adaptive_computation import deferral

eta = torch.tensor([0.9, 0.05, 0.05])
best = deferral.css_minimizer(eta, torch.tensor(0.8), cost=0.3)
print("labels:", [round(x, 3) for x in best[:-1].tolist()], " defer:", round(float(best[-1]), 3))

# %% [markdown]
# **Bad input** is answered with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
from effnb.inference.adaptive_computation import layerskip

for attempt in (
    lambda: calm.generate(bench.model, prompt, threshold=1.2),
    lambda: calm.generate(bench.model, prompt, measure="classifier"),
    lambda: learn_then_test.calibrate([0.9, 0.5], [[], []], 0.1, 0.05),
    lambda: learn_then_test.hoeffding_bentkus(0.1, 100, delta=0.0),
    lambda: learn_then_test.calibrate([0.9], [[0.0]], 0.1, epsilon=1.0),
    lambda: layerskip.self_speculative(bench.model, prompt, exit_layer=6),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.adaptive_computation import exercises

for exercise in (exercises.leaving, exercises.rejecting, exercises.walking):
    print(exercise)

# %% [markdown]
# **1.** The layer, counted from 1, at which a token leaves by softmax; the last if none is sure enough.


# %% tags=["exercise", "nbval-check-output"]
def exit_of(logits, threshold):
    """Logits is (layers, vocabulary); a whole number."""
    raise NotImplementedError


_ = exercises.leaving.check(exit_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.topk(2, -1)` of the softmax gives both probabilities of every layer at once.
#
# </details>


# %% tags=["solution"]
exercises.leaving.solution()

# %% [markdown]
# **2.** The distribution from which a token is drawn after a rejection.


# %% tags=["exercise", "nbval-check-output"]
def after_rejection(p, q):
    """Two distributions; a distribution."""
    raise NotImplementedError


_ = exercises.rejecting.check(after_rejection)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Of which words does the draft offer too little? A distribution sums to 1.
#
# </details>


# %% tags=["solution"]
exercises.rejecting.solution()

# %% [markdown]
# **3.** The threshold that Learn-then-Test chooses; `None` if not even the safest may be promised. The grid falls.


# %% tags=["exercise", "nbval-check-output"]
def walk(grid, p_values, epsilon):
    """Two lists and a number; a threshold or None."""
    raise NotImplementedError


_ = exercises.walking.check(walk)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A loop with a `break`. What is behind the first failure does not count, however small its p-value is.
#
# </details>


# %% tags=["solution"]
exercises.walking.solution()

# %% [markdown]
# ## Gallery
#
# **BranchyNet** (Teerapittayanon et al., 2016). All exits of a classifier are trained at once; an input leaves at the first exit with an entropy $H(p) = -\sum_c p_c \ln p_c$ below a threshold $T$, in nats. Use it where you train the classifier yourself.
#
# **DeeBERT** (Xin et al., 2020). Fine-tune first, freeze, then train an *off-ramp* after each layer on the plain sum of their losses. Use it on an encoder that must not change. Here is MiniLM, frozen, on six sections of the package archive:

# %%
sorted_out = tables.stored("sections").data["table"]
drawings.sections(sorted_out)

# %% tags=["nbval-check-output"]
tables.sections_table(sorted_out)

# %% [markdown]
# **PABEE** (Zhou et al., 2020). Leave when $P$ layers in a row agree with the one before; training weighs layer $j$ by $j$. One over-confident early layer cannot end it alone. Use it where confidences are badly calibrated. It cannot leave before layer $P + 1$.
#
# **LayerSkip** (Elhoushi et al., 2024). *Layer dropout*, rarely at early layers and often at late ones, and an exit loss with a curriculum make a model whose first layers draft well: `layerskip.with_layer_dropout`, `loss_weights`, `curriculum`, `self_speculative`. Use it when you train anyway, and want no second model.
#
# **Mixture-of-Depths** (Raposo et al., 2024). A router sends the $k$ highest-scored tokens of a sequence through a block and lets the others pass by, $x_i' = x_i + r_i f(\tilde x)_i$, where $r_i$ is the router's score. Shapes are fixed, which is what accelerators like. But the highest of a sequence are known only at its end, so writing token by token needs a predictor of who will be chosen. With an eighth of the tokens, an untrained router in `mini-5m`:

# %% tags=["nbval-check-output"]
from effnb.inference.adaptive_computation import mixture_of_depths

routed = mixture_of_depths.mixture_of_depths(bench.model, capacity=0.125)
with torch.inference_mode():
    routed(input_ids=bench.windows[:1, :64], use_cache=False)
blocks = [m for m in routed.modules() if isinstance(m, mixture_of_depths.DepthBlock)]
print([f"{int(block.chosen.sum())} of 64 tokens" for block in blocks])

# %% [markdown]
# **Which one?** Speculation first: it changes no word, and its gain can be predicted from two numbers. Exits pay where layers are expensive beside the head, and need training; choose the threshold by the walk, on prompts like yours. A cascade pays where most inputs are easy; learn its rule afterwards, not jointly, and compare it with plain confidence. The evidence is from small models: measure on yours.
#
# ## Further reading
#
# Schuster et al., *CALM*, 2022, arXiv 2207.07061. Angelopoulos et al., *Learn then Test*, 2021, arXiv 2110.01052. Leviathan, Kalman and Matias, *Speculative decoding*, 2022, arXiv 2211.17192. Chen et al., *Speculative sampling*, 2023, arXiv 2302.01318. Elhoushi et al., *LayerSkip*, 2024, arXiv 2404.16710.
# Teerapittayanon et al., *BranchyNet*, 2016, arXiv 1709.01686. Xin et al., *DeeBERT*, 2020, arXiv 2004.12993. Zhou et al., *PABEE*, 2020, arXiv 2006.04152. Mozannar and Sontag, *Learning to defer*, 2020, arXiv 2006.01862. Jitkrittum et al., *Cascade deferral*, 2023, arXiv 2307.02764. Gupta et al., *Language model cascades*, 2024, arXiv 2404.10136. Raposo et al., *Mixture-of-Depths*, 2024, arXiv 2404.02258.
