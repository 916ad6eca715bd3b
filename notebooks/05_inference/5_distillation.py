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
# # Distillation
#
# **A large model's answers say more than labels do: how probable each wrong class is. A small model that learns from these answers can even learn a class of which it never saw an example.**
#
# After this chapter you can
#
# - say what a temperature does to an answer, to the loss and to its gradient;
# - choose what a student should match: outputs, features, or relations between tokens;
# - tell forward from reverse divergence, and let a student learn on texts that it writes itself;
# - distil from a teacher that errs, and know when its labels are not worth it;
# - compare distillation with what it competes with: training longer on labels alone.
#
# You need the tour (`00_start_here`) and the softmax. Temperature, what to match, on-policy distillation, noisy teachers and supervision complexity are taught in depth; a gallery near the end introduces the other methods.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/5_distillation")

# %% [markdown]
# ## The picture
#
# Short descriptions of Debian packages exist in twelve languages. A large network, the **teacher**, has learnt to tell them apart. A small one, the **student**, is to do the same, but all texts in one language have been taken out of its training set. Every group below is such an experiment. The grey bars learned from labels; the coloured ones learned, on exactly the same texts, from what the teacher answers to them.

# %%
from effnb.chapters.inference.distillation import drawings, tables

left_out = tables.stored("missing").data["table"]
drawings.missing(left_out)

# %% tags=["nbval-check-output"]
print(tables.missing_said(left_out))

# %% [markdown]
# How can that be? The teacher's answer to a German text is "German, most probably", but it also says how much the text looks like Danish, and it says so for every text. These small numbers describe Danish without a single Danish text. A **temperature** makes them large enough to learn from.
#
# **Predict first:** the panel takes your guess before it answers. When you run this page, it trains a student while you wait, in a few seconds. Try temperature 0, which stands for plain labels, and look at *which* languages the student takes the unknown one for.

# %%
from effnb.chapters.inference.distillation import panels

panels.missing()

# %% tags=["nbval-check-output"]
print(tables.sizes_said())

# %% [markdown]
# Two details matter. The student's texts are not those that the teacher has learnt: what a network says of texts it knows by heart is hardly more than their labels. And both networks read a text as 192 numbers that mix all of its runs of one to three characters, so that no part of the input occurs in one language alone.

# %% [markdown]
# ## The idea
#
# ### Temperature
#
# Let $v$ be the teacher's scores of the $N$ classes, one number each before the softmax, and $z$ the student's. With a temperature $\tau > 0$,
# <a id="equation-1"></a>
#
# $$\begin{gathered} p^\tau = \operatorname{softmax}(v / \tau), \qquad q^\tau = \operatorname{softmax}(z / \tau), \\ L = a\, \tau^2\, \mathrm{KL}(p^\tau \,\|\, q^\tau) + (1 - a)\, \mathrm{CE}(y, q^1). \end{gathered} \tag{1}$$
#
# $\mathrm{KL}(p \,\|\, q) = \sum_i p_i \ln (p_i / q_i)$ is the **divergence** of two answers: 0 if they agree, larger the more $q$ neglects what $p$ finds probable. $\mathrm{CE}$ is the usual loss on the label $y$, and the weight $a$ divides the student's attention between teacher and label (Hinton, Vinyals and Dean, 2015).
#
# The gradient of the first part is $\tau (q^\tau - p^\tau)$. Without the factor $\tau^2$ it would fade as the temperature rises. Here it is for three classes:

# %% tags=["nbval-check-output"]
tables.softened_table()

# %% [markdown]
# At temperature 1 the second and the third class hardly count. As $\tau$ grows, the answer becomes flat, but the *pull* on the scores does not vanish: it approaches $\bigl((v - \bar v) - (z - \bar z)\bigr) / N$, where bars are means. At high temperatures the student copies the teacher's scores themselves.
#
# ### What to match
#
# The answer is the last thing a network computes. A student can also be asked to match what happens on the way:
#
# - **Outputs**: the loss of [equation 1](#equation-1). It fits every pair of models that share their classes; for language models, a vocabulary.
# - **Features**: hidden states and attention. DistilBERT adds the cosine between last hidden states; TinyBERT compares layer by layer, $\mathrm{MSE}(H^S W, H^T)$, where a learned $W$ bridges the widths, and compares attention *scores*, before the softmax. Which of the student's layers is compared with which of the teacher's is a choice, the **layer map**.
# - **Relations**: how tokens of one text relate to each other. MiniLM compares $\operatorname{softmax}(Q K^\top\! / \sqrt d)$ and $\operatorname{softmax}(V V^\top\! / \sqrt d)$ of the *last* layers by their divergence. Both are tables of tokens by tokens, whatever the width: no $W$ and no layer map are needed. Its second version joins all heads and cuts them again, so that their numbers may differ.
#
# ### On whose texts?
#
# A language model that learned from given texts only has never seen its own mistakes. In **on-policy** distillation the student writes and the teacher comments: GKD (Agarwal et al., 2023) lets the student write a share $\lambda$ of the batches. It also generalizes the divergence. With $m = \beta p + (1 - \beta) q$,
# <a id="equation-2"></a>
#
# $$\mathrm{JSD}_\beta = \beta\, \mathrm{KL}(p \,\|\, m) + (1 - \beta)\, \mathrm{KL}(q \,\|\, m). \tag{2}$$
#
# The direction is not a detail. **Forward** KL, $\mathrm{KL}(p \,\|\, q)$, punishes the student for missing anything that the teacher finds possible. **Reverse** KL, $\mathrm{KL}(q \,\|\, p)$, punishes it for saying what the teacher finds impossible. MiniLLM (Gu et al., 2023) therefore takes reverse KL for students that are too small to cover everything:

# %%
drawings.two_humps()

# %% [markdown]
# ### When the teacher errs
#
# Let a teacher be wrong about input $x$ with probability $p(x)$. **Weighted distillation** (Iliopoulos et al., 2022) multiplies each example's loss by $w = 1 / (1 + p (D - 1))$, where $D$ is how many times more the wrong label would cost the student than the right one. In expectation that restores the clean loss. But a weight only scales an example's gradient. A student that can fit each example by itself ends where it would have ended without weights; only one that must compromise gains.
#
# **Forward correction** (SLaM; Kontonis et al., 2023) changes the *prediction* instead. If the teacher's label is right with probability $\alpha$, and otherwise it is the teacher's second choice, then a student with the probability $f$ for the label should expect to read it with probability $\alpha f + (1 - \alpha)(1 - f)$. Compare that with the label. Near $\alpha = 1/2$ it hardly depends on $f$, and the student learns nothing.
#
# ### How hard is an answer to learn?
#
# A small network near its start behaves as a kernel machine with the **tangent kernel** $K_{ij} = \nabla f(x_i) \cdot \nabla f(x_j)$. To fit targets $Y$ it needs a function of the squared norm
#
# $$\mathrm{SC}(Y; K) = \operatorname{tr}(Y^\top K^{-1} Y),$$
#
# the **supervision complexity** (Harutyunyan et al., 2023). Answers that are alike for inputs that the student finds alike are cheap. Answers without any pattern the student can see are as expensive as random ones.

# %% [markdown]
# ## The code
#
# Hinton's loss, and the divergence with the extra parameter:

# %%
from effnb.inference import distillation
from effnb.lab import show

show(distillation.hinton_loss, distillation.generalized_jsd)

# %% [markdown]
# MiniLM's relations take two short functions:

# %%
show(distillation.relation, distillation.relation_loss)

# %% [markdown]
# Forward correction is one line:

# %%
show(distillation.mix)

# %% [markdown]
# ## Turn the knob
#
# **Temperature, weight and size.** `mini-5m` teaches the smaller models of this book on text. All of them have already been trained on labels for long, so this is not about a first start: what can a teacher add?

# %%
grid = tables.stored("grid").data["table"]
panels.grid(grid)

# %% tags=["nbval-check-output"]
print(tables.grid_said(grid))

# %% [markdown]
# **A slider with a trap.** GKD's $\beta$ looks like a dial from forward to reverse. Guess first what happens just beside its end.

# %%
panels.jump()

# %% [markdown]
# By definition $\beta = 0$ and $\beta = 1$ stand for the two KLs, but the divergence of [equation 2](#equation-2) itself tends to 0 at both ends, where $m$ becomes equal to one of the two answers. A small $\beta$ is thus not "nearly forward KL" but a nearly vanishing loss. Divided by $\beta (1 - \beta)$ the curve becomes continuous; the package calls that `rescaled_jsd`, and it is this book's own scale.
#
# **Noise and budget.** How many answers of an unreliable teacher are worth how much?

# %%
noise = tables.stored("noise").data["table"]
panels.noise(noise)

# %% [markdown]
# **A teacher's step against complexity.** A teacher's early answers are rough, but are they easier to learn?

# %%
complexity = tables.stored("complexity").data["table"]
panels.complexity(complexity)

# %% tags=["nbval-check-output"]
print(tables.complexity_said(complexity))

# %% [markdown]
# ## Does it hold?
#
# Five claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before anything was measured; verdicts are computed from stored results, and a part without a stored run is *not tested*. Distilled students are compared with the same student on labels alone, in equal steps *and* at equal compute.

# %%
from effnb.chapters.inference.distillation import verdicts
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(*(judge(*measured) for judge in verdicts.ALL))

# %% [markdown]
# **Do students obey?** If a student copied its teacher, its confidence would lie on the diagonal below. Nagarajan et al. (2023) found students that *exaggerate*: surer where the teacher is sure, less sure where it hesitates, with a fitted slope above 1. Measured here, now:

# %%
drawings.confidence()

# %% tags=["nbval-check-output"]
print(tables.slope_said())

# %% [markdown]
# Which of the two happens depends on the student's size and on its training. In the table above, the part on what is hard has the slope over five seeds.

# %% [markdown]
# ## What it costs and saves
#
# The student is what you deploy; the teacher is only needed for training:

# %%
import torch

from effnb.lab import compare_costs, load

teacher, student = (load(name, device="cpu").model for name in ("mini-5m", "mini-300k"))
ids = torch.randint(2, 4000, (1, 256), generator=torch.Generator().manual_seed(0))
compare_costs(teacher, student, ids, labels=("teacher", "student"))

# %% [markdown]
# Training is another matter. With so large a gap, most of a step is the teacher's work. Counted in operations:

# %% tags=["nbval-check-output"]
tables.operations_table(teacher, student)

# %% [markdown]
# This is what "equal compute" means in the verdicts. Two remedies: what a teacher says of a given text depends on neither the student nor the seed, so it can be **computed once** and reused, which is how the sweeps of this chapter do it. On-policy texts change with the student and cannot be kept.

# %% [markdown]
# ## On a real model
#
# A few steps live, on the models that the panel showed: `mini-300k` learns from `mini-5m`'s answers to one batch at a time. How far its answers are from the teacher's, before and after, on text that neither step saw:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(tables.live_said(teacher, student, steps=16))
else:
    print(tables.grid_said(grid))

# %% [markdown]
# The whole grid, with text alone for as many steps and for longer. One seed, so read small differences with care; the verdicts above rest on five:

# %% tags=["nbval-check-output"]
tables.grid_table(grid)

# %% [markdown]
# SmolLM2-135M is a larger teacher, but it cuts text into other tokens than ours do, and a divergence needs equal classes. Silence would be the worst answer, so the package refuses:

# %% tags=["nbval-check-output"]
other = torch.zeros(1, 4, 49_152)
try:
    distillation.hinton_loss(torch.zeros(1, 4, 4096), other, weight=1.0)
except ValueError as problem:
    print(problem)

# %% [markdown]
# A bridge exists: **ULD** (Boizard et al., 2024) sorts both answers by probability and compares the sorted lists, first with first. It forgets *which* tokens are meant. `uld_loss` and `bridge_batch`, which aligns texts where both tokenizers begin a token, are in the package.

# %% [markdown]
# ## Where it breaks
#
# **A teacher that errs**, once more, with the labels that you already have as a rival:

# %%
drawings.noise(noise)

# %% tags=["nbval-check-output"]
print(tables.noise_said(noise))

# %% [markdown]
# **A temperature on one side only**, or a teacher left in training mode, where dropout blurs its answers, or scores that were normalized twice: none of these raises an error in most code. **Bad input** is answered here with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
z, v, y = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1])
small, large, longer = (
    distillation.run_recorded(model, input_ids=ids[:, :length], use_cache=False)[1][-1]
    for model, length in ((student, 8), (teacher, 8), (teacher, 9))
)
for attempt in (
    lambda: distillation.hinton_loss(z, v, y, temperature=0.0),
    lambda: distillation.hinton_loss(z, v),
    lambda: distillation.hinton_loss(z, torch.ones(4, 3), weight=1.0),
    lambda: distillation.minilm_loss(small, large),
    lambda: distillation.minilm_loss(large, longer),
    lambda: distillation.hinton(teacher.train()),
    lambda: distillation.layer_map(4, 6),
    lambda: distillation.generalized_jsd(z, v, beta=1.5),
    lambda: distillation.robust_choice(torch.ones(4), wrong=2),
    lambda: distillation.update_weights(torch.tensor([1.0, 0.0]), torch.zeros(2), 0.1),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)
teacher = teacher.eval()

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.distillation import exercises

for exercise in (exercises.loss, exercises.correction, exercises.game):
    print(exercise)

# %% [markdown]
# **1.** The teacher's part of Hinton's loss: the softened divergence times the square of the temperature, a mean over rows.


# %% tags=["exercise", "nbval-check-output"]
def soft_loss(z, v, t):
    """z, v are (rows, classes): student's and teacher's scores."""
    raise NotImplementedError


_ = exercises.loss.check(soft_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `log_softmax` of both sides first; the teacher's probabilities weigh the difference of the logarithms. Which axis is added up, and which is averaged?
#
# </details>


# %% tags=["solution"]
exercises.loss.solution()

# %% [markdown]
# **2.** With which probability will a student that thinks `f` read the teacher's label `first`, if the teacher is right with probability `alpha`? There are two candidates for each row, so the label is right or it is not.


# %% tags=["exercise", "nbval-check-output"]
def expected(f, first, second, alpha):
    """f is (rows, classes), probabilities; first, second are (rows,), classes."""
    raise NotImplementedError


_ = exercises.correction.check(expected)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Two cases: the label is the right class and the teacher says so, or it is not the right one and the teacher errs. Use the formula of "When the teacher errs".
#
# </details>


# %% tags=["solution"]
exercises.correction.solution()

# %% [markdown]
# **3.** Which texts should an unreliable teacher be asked about? A text that the student is unsure of teaches much: let $g_1 \ge g_2 \ge \dots$ be what each would gain. An adversary may make $k$ answers wrong, and a wrong answer costs what a right one gains. With $S_I = \sum_{i \le I} 1 / g_i$, the best guaranteed gain is $\max_{I > 2k} (I - 2k) / S_I$; draw only from the best $I$ texts, each in proportion to $1 / g_i$. Return the probabilities.


# %% tags=["exercise", "nbval-check-output"]
def probabilities(g, k):
    """g is (inputs,), the largest gain first."""
    raise NotImplementedError


_ = exercises.game.check(probabilities)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `cumsum` gives all $S_I$ at once. Sizes up to $2k$ are out of the question: set their value to minus infinity before `argmax`.
#
# </details>


# %% tags=["solution"]
exercises.game.solution()

# %% [markdown]
# ## Gallery
#
# **Whole texts.** *Sequence-level distillation* (Kim and Rush, 2016): replace the training text by what the teacher writes under beam search, $\hat y = \arg\max_y p(y \mid x)$, and train as usual. Use it when inputs have several good outputs and the student cannot learn to choose between them.
#
# **DistilBERT** (Sanh et al., 2019): three losses, $5 L_{\mathrm{KL}} + 2 L_{\mathrm{MLM}} + 1 L_{\cos}$ at temperature 2, and a student that starts from every other layer of its teacher. Use `student_from_layers` whenever the widths agree. **TinyBERT** (Jiao et al., 2019) trains in two stages, layers before predictions.
#
# **Behaviour**, also called emergent abilities. *In-context*: the student is trained on prompts with examples and the teacher's soft answers (Huang et al., 2022); *context distillation* (Snell et al., 2022) teaches it to act without a prompt as the teacher acts with it. *Chain of thought*: in *distilling step by step* (Hsieh et al., 2023) the student learns two tasks, to predict and to explain, $L = \alpha L_{\text{label}} + (1 - \alpha) L_{\text{reason}}$, and need not explain when it is used. A teacher's reasoning looks like this:

# %% tags=["nbval-check-output"]
worked = distillation.addition(38, 47)
print(distillation.two_tasks([worked]))
print(distillation.one_task([worked]))

# %% [markdown]
# *Instructions*: imitate the teacher's responses, let a referee find those that the student answers badly, and have the teacher write more of the same kind (`next_round`).
#
# **The worst class** (Wang et al., 2022). Distillation can raise the average and lower a rare class. The weights of classes follow their losses, $\lambda_y \leftarrow \lambda_y e^{\gamma L_y} / Z$, in turns with training. Choose $\gamma$ small: a fast pursuit runs in circles. Use it when the worst class is what you will be judged by.
#
# **Robust active distillation** (Baykal et al., 2023) is exercise 3: which inputs to send to a teacher that errs.
#
# **Teacher-guided training** (Zaheer et al., 2022). A teacher that can also generate makes the inputs: encode a real one, move it by noise $\nu$ in latent space, decode, and label the result. The noise is random, or climbs the gradient of the disagreement of both models. Use it with little data. Label what was made with the teacher's answer, never with the original label.
#
# **Online distillation**: learn from a teacher's early states first, whose answers are less complex (`teacher_of_step`).
#
# **Which one?** If you have many inputs and few labels, let the teacher answer them, once, and try temperatures between 2 and 10. If labels are free, as in language modelling, training longer is the rival to beat. If the student is too small to cover all that its teacher does, consider reverse KL on its own texts. If the teacher errs often, count how many true labels you could afford instead.
#
# ## Further reading
#
# Hinton, Vinyals and Dean, 2015, arXiv 1503.02531. Kim and Rush, 2016, arXiv 1606.07947. Sanh et al., *DistilBERT*, 2019, arXiv 1910.01108. Jiao et al., *TinyBERT*, 2019, arXiv 1909.10351. Wang et al., *MiniLM*, 2020, arXiv 2002.10957, and *v2*, arXiv 2012.15828. Agarwal et al., *GKD*, 2023, arXiv 2306.13649. Gu et al., *MiniLLM*, 2023, arXiv 2306.08543. Hsieh et al., 2023, arXiv 2305.02301.
# Huang et al., 2022, arXiv 2212.10670. Snell et al., 2022, arXiv 2209.15189. Baykal et al., 2023, arXiv 2210.01213. Zaheer et al., 2022, arXiv 2208.06825. Harutyunyan et al., 2023, arXiv 2301.12245. Nagarajan et al., 2023, arXiv 2301.12923. Zhu et al., *A Survey on Model Compression for Large Language Models*, 2023, arXiv 2308.07633.
