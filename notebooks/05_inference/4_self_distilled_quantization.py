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
# # Self-distilled quantization
#
# **Train a rounded model to agree with itself as it was before rounding: in its answers, and in what its attention computes on the way.**
#
# After this chapter you can
#
# - find the module in which a rounded network errs most, and tell its own error from the one that it was handed;
# - round a random part of the weights in each training step, and say what that is good for;
# - write the loss of self-distilled quantization, with every variant of what is matched;
# - replace layer after layer by a dictionary of codewords;
# - check who pays for compression when a model serves several languages.
#
# You need the chapter on quantization and the first half of the one on distillation. Errors by module, Quant-Noise and the self-distilled loss are taught in depth; a gallery near the end introduces product quantization and the other variants.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("05_inference/4_self_distilled_quantization")

# %% [markdown]
# ## The picture
#
# MiniLM is an encoder with six blocks that turns a sentence into a vector. Here all its weights have been rounded to 4 bits, nothing has been trained, and every module's output is compared with what it was before.

# %%
from effnb.chapters.inference.self_distilled_quantization import drawings, tables

modules = tables.stored("modules").data["table"]
drawings.errors(modules)

# %% tags=["nbval-check-output"]
print(tables.errors_said(modules))

# %% [markdown]
# The map answers two questions at once. *Where* does rounding hurt? Read down a column: the error rises along the path through attention and falls again in the feed-forward part. *Does it add up?* Read along a row, or look at the right: a block by itself would do moderate damage, but each also receives the errors of those before it.
#
# Self-distilled quantization, SDQ for short (O'Neill and Dutta, 2023), starts from exactly this observation. If attention is where a rounded network goes wrong, then tell it, layer by layer and head by head, what attention should have computed. The unrounded model knows.
#
# **Predict first:** the panel takes your guess before it answers. When you run this page, it rounds the model while you wait.

# %%
from effnb.chapters.inference.self_distilled_quantization import panels

panels.errors()

# %% [markdown]
# Things to try: round *attention only*, then *feed-forward only*, and compare what the other part inherits. Then look at 8 bits: the map keeps its pattern, at a fraction of the size.

# %% [markdown]
# ## The idea
#
# ### An error of its own, and an inherited one
#
# Let $a$ be a module's output for one text in the original model, all tokens together, and $\hat a$ the same in the rounded one. Its **relative error** is
#
# $$e = \frac{\lVert \hat a - a \rVert_F}{\lVert a \rVert_F}.$$
#
# Two numbers are of interest. With *all* blocks rounded, $e$ is the **accumulated** error. With only the module's own block rounded, and exact inputs from the blocks before, it is the error that the block makes **alone**. Where the first is much larger than the second, repairing this module by itself would not help.
#
# Why attention? A head multiplies three rounded things. Queries and keys are both wrong, and so is their product; the softmax turns this into wrong weights, and these then mix values that are wrong as well. A feed-forward layer multiplies one wrong input by one wrong weight.
#
# ### Quant-Noise
#
# Quantization-aware training (QAT) rounds all weights in every forward pass. Rounding has no useful gradient, so the gradient is passed **straight through**, as if nothing had been rounded. That is wrong for every weight in every step.
#
# **Quant-Noise** (Fan et al., 2020) cuts each weight into blocks $b_{kl}$, a few neighbours of a row each, and draws a random set $J$ of them in each pass. Only these are rounded by $\varphi$:
# <a id="equation-2"></a>
#
# $$\psi(b_{kl}) = \begin{cases} \varphi(b_{kl}) & (k, l) \in J \\ b_{kl} & \text{otherwise,} \end{cases} \qquad P\bigl((k, l) \in J\bigr) = p. \tag{2}$$
#
# The blocks that were left alone have exact gradients. At $p = 1$ this is QAT, at $p = 0$ ordinary training; at the end everything is rounded whatever $p$ was. By hand, for two rows in 3 bits and blocks of two:

# %% tags=["nbval-check-output"]
print(tables.noise_rows())
print()
print(tables.exact_gradients_said())

# %% [markdown]
# On a real weight:

# %%
panels.noise()

# %% [markdown]
# ### Learning from oneself
#
# The **teacher** is the fine-tuned model in full precision. The **student** is a copy of it with noise in its weights. Besides the label $y$, it gets the teacher's answer and the teacher's attention:
# <a id="equation-3"></a>
#
# $$\begin{aligned} \mathcal L =\ & \mathrm{CE}(y, z^S) + \beta\, \tau^2\, \mathrm{KL}(p^\tau \,\|\, q^\tau) \\ & + \frac{\alpha}{L H} \sum_{l=1}^{L} \sum_{h=1}^{H} d(A^S_{l,h}, A^T_{l,h}). \end{aligned} \tag{3}$$
#
# $z^S$ are the student's scores; $p^\tau$ and $q^\tau$ are the teacher's and the student's answers at temperature $\tau$, as in the chapter on distillation. The last sum runs over all $L$ layers and $H$ heads, and $d$ is one of two distances:
#
# - **squared error** of the context vectors, $A = \operatorname{softmax}(Q K^\top\! / \sqrt d)\, V$: what a head puts out, before heads are joined and projected;
# - **divergence** of the attention itself, $\mathrm{KL}(A^T \,\|\, A^S)$ of every row of the softmax.
#
# Which of the two the article means by "output of self-attention" could not be checked, since neither its code nor its full text was at hand; the choice is ours, and both are measured below. A third variant matches **hidden states**, the outputs of whole blocks. Teacher and student have the same shape, so no projection and no map of layers is needed, which is the convenience of teaching oneself.
#
# ### Who pays?
#
# A classifier for many languages is usually fine-tuned on few of them. The others come for free, because the encoder has learnt beforehand that translations mean the same; but nothing in the fine-tuning protects them. Let $a_g$ be the accuracy in language $g$. Two numbers measure fairness here: the **spread** $\max_g a_g - \min_g a_g$, and the **gap**, how much more the unseen languages lose on average than the seen ones.

# %% [markdown]
# ## The code
#
# The noise, and the layer that carries it:

# %%
from effnb.inference import self_distilled_quantization as sdq
from effnb.lab import show

show(sdq.noise_mask, sdq.NoisyLinear.effective)

# %% [markdown]
# What a head puts out, and the distance of one layer:

# %%
show(sdq.context_vectors, sdq.attention_distance)

# %% [markdown]
# Everything is assembled by one function, whose result goes to the same trainer as any other loss: `sdq.sdq(teacher, attention="mse", alpha=10)`.
#
# Is it right? A student without noise and rounding *is* its teacher, so every part of the loss must be 0, exactly; and noise on all blocks must be QAT.

# %% tags=["nbval-check-output"]
import torch

from effnb.chapters.inference.self_distilled_quantization import checks

teacher, batch = checks.tiny()
same = sdq.prepare_quant_noise(teacher, 32, noise=0.0)
for name in ("output", "attention-mse", "attention-kl", "hidden"):
    loss = sdq.variant(teacher, name, labels=0.0)
    print(f"{name:14} {float(loss(same, batch).detach()):.6f}")
print(f"noise on all blocks, against QAT: {checks.against_qat(teacher, batch):.6f}")

# %% [markdown]
# The same parts for a student with 4 bits, before it has learnt anything. They differ in size by orders of magnitude, which is why $\alpha$ is a knob and not 1:

# %% tags=["nbval-check-output"]
tables.loss_parts(teacher, sdq.prepare_quant_noise(teacher, 4, noise=1.0).eval(), batch)

# %% [markdown]
# ## Turn the knob
#
# The article's subject is an encoder of many languages. `mini-multi` is a small one: six blocks, a million parameters, twelve languages, trained for this book on package descriptions, their translations, and two handbooks. A classifier on it learns the *topic* of a description, one of six, from texts in English, German and French. It is then asked about all twelve languages.

# %% tags=["nbval-check-output"]
encoded = tables.stored("encoder").data
print(tables.encoder_said(encoded))
tables.encoder_table(encoded)

# %% [markdown]
# **Predict first.** Then change the bits; when you run this page, change the noise and the weight of attention at few bits, too. Which language suffers most when nothing is trained?

# %%
panels.grid(tables.stored("grid").data["table"])

# %% [markdown]
# ## Does it hold?
#
# Four claims of the ledger belong to this chapter. Their parts, bounds and margins were registered before the measurements, and verdicts are computed from stored results. A part that was not measured reads "not tested".

# %%
from effnb.chapters.inference.self_distilled_quantization import verdicts
from effnb.lab import claims_table

measured = verdicts.stored()
claims_table(*(judge(*measured) for judge in verdicts.ALL))

# %% [markdown]
# **Where it errs .** Nothing is trained here, so MiniLM can be asked as well as the small encoder:

# %% tags=["nbval-check-output"]
tables.errors_table(modules)

# %% [markdown]
# Compare the two columns of each model: their difference is inherited. Why does the error fall after attention? A block adds what attention puts out to what it had received, and that part is larger and less wrong. The norm that follows sees the sum.

# %% [markdown]
# **What training brings back .** Rounding after training (PTQ), training on labels with everything rounded (QAT), the same with the teacher's answers, and SDQ. All students take the same number of steps on the same batches:

# %% tags=["nbval-check-output"]
students = tables.stored("claims/students").data["table"]
print(tables.students_said(students))
tables.students_table(students)

# %%
drawings.students(students)

# %% [markdown]
# **All variants**, at 4 bits. The first row has noise and labels only: what it reaches needs no teacher. Codewords are explained in the gallery.

# %% tags=["nbval-check-output"]
tables.variants_table(tables.stored("variants").data)

# %% [markdown]
# ## What it costs and saves
#
# The student is an ordinary quantized model: after training, neither the noise nor the teacher is left. At $b$ bits a weight of $m$ rows takes $b$ bits for each number and 16 for the scale of each row:

# %% tags=["nbval-check-output"]
checks.sizes_table()

# %% [markdown]
# Note what is *not* smaller. In a multilingual encoder most of the numbers are embeddings, one row for each token of many languages, and here they stay as they are.
#
# Training costs more. A step on labels is a forward pass and a backward pass, which is worth about two: 3 in all. The teacher adds a forward pass: 4, or a third more. Its answers could be kept from one epoch to the next; its attention could not, for it is a table of tokens by tokens for every head and layer:

# %% tags=["nbval-check-output"]
print(f"{sdq.step_passes(teacher=True) / sdq.step_passes(teacher=False):.2f} times the passes")
gigabytes = sdq.attention_bytes(12, 12, 128, texts=100_000) / 1e9
print(f"attention of 100,000 texts, 12 layers, 12 heads, 128 tokens: {gigabytes:.0f} GB")
print(tables.cost_said(tables.stored("claims/cost").data["table"]))

# %% [markdown]
# ## On a real model
#
# MiniLM, live: its value matrices in 4 bits, once as a step of Quant-Noise sees them by [equation 2](#equation-2) and once rounded as a whole:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(checks.minilm_step())
else:
    print(tables.stored("modules"))

# %% [markdown]
# The whole method on a real multilingual encoder needs one, and none ships with this book: XLM-R-Base has about 280 million parameters. What it would take is a classifier fine-tuned on it, the function above, and a GPU.
#
# ## Where it breaks
#
# **A teacher in training mode.** Dropout makes it disagree with itself, and the student learns that noise. The function refuses:

# %% tags=["nbval-check-output"]
import copy

dropping = copy.deepcopy(teacher).train()
for attempt in (
    lambda: sdq.sdq(dropping),
    lambda: sdq.sdq(teacher, temperature=0.0),
    lambda: sdq.sdq(teacher, attention="cosine"),
    lambda: sdq.sdq(teacher, labels=0.0, beta=0.0),
    lambda: sdq.prepare_quant_noise(teacher, 4, noise=1.5),
    lambda: sdq.product_quantize(torch.ones(4, 6), block_size=4),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# **The wrong direction of the divergence.** $\mathrm{KL}(A^T \,\|\, A^S)$ punishes a student that ignores a token the teacher attends to. The other direction lets it ignore such tokens, as long as it attends to nothing new:

# %% tags=["nbval-check-output"]
looks = torch.tensor([0.5, 0.5 - 1e-3, 1e-3])
ignores = torch.tensor([1 - 2e-3, 1e-3, 1e-3])
forward = (looks * (looks / ignores).log()).sum()
reverse = (ignores * (ignores / looks).log()).sum()
print(f"the student ignores one of two tokens: forward {forward:.2f}, reverse {reverse:.2f} nats")

# %% [markdown]
# **Forgetting the mask.** Padding has attention too, and none of it matters. If its rows count, texts of a batch change each other's loss. Exercise 2 asks you to get this right.
#
# **A mean that hides its parts.** A model may keep its average and lose one language. Print every group, and give the smallest ones an interval: here Chinese has 30 texts, so one of them is worth more than three points.

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.inference.self_distilled_quantization import exercises

for exercise in (exercises.blocks, exercises.matching, exercises.fairness):
    print(exercise)

# %% [markdown]
# **1.** Quant-Noise, once it is known which blocks were drawn. `drawn` has one entry for each block; all blocks of a row have the same size.


# %% tags=["exercise", "nbval-check-output"]
def noisy(W, Q, drawn):
    """W and Q are (out, in), drawn is (out, blocks); a matrix like W."""
    raise NotImplementedError


_ = exercises.blocks.check(noisy)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `repeat_interleave` repeats each entry in place, `repeat` the whole tensor.
#
# </details>


# %% tags=["solution"]
exercises.blocks.solution()

# %% [markdown]
# **2.** The attention part of [equation 3](#equation-3) with squared errors, for one text. `real` is False for padding.


# %% tags=["exercise", "nbval-check-output"]
def attention_loss(student, teacher, real):
    """Both are (layers, heads, time, dim), real is (time,); a number."""
    raise NotImplementedError


_ = exercises.matching.check(attention_loss)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Select the real tokens before you take any mean. The mean over all that is left divides by $L H$ by itself.
#
# </details>


# %% tags=["solution"]
exercises.matching.solution()

# %% [markdown]
# **3.** The gap: how much more the unseen languages lose on average than the seen ones.


# %% tags=["exercise", "nbval-check-output"]
def unfair(before, after, seen):
    """Accuracies by language before and after, and the list of seen languages; a number."""
    raise NotImplementedError


_ = exercises.fairness.check(unfair)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A language's loss is before minus after. Take two means.
#
# </details>


# %% tags=["solution"]
exercises.fairness.solution()

# %% [markdown]
# ## Gallery
#
# **Product quantization** (Jégou et al., 2011; Stock et al., 2020). Cut the rows of a weight into blocks of $d$ numbers and let all blocks share a dictionary of $K$ **codewords**, found by k-means. A block is then the number of its codeword, $\log_2 K$ bits in place of $32\, d$. Use it where one bit or two for each weight are all there is. On a matrix of MiniLM:

# %% tags=["nbval-check-output"]
checks.codewords_table()

# %% [markdown]
# **Iterative product quantization**, iPQ. All layers at once would be too much, so one group of layers is replaced, everything else is trained for a while, and then comes the next group. A codeword's gradient is the *mean* of its blocks' gradients, so that common codewords do not run ahead. Quant-Noise prepares a network for it, with codewords as noise, or with the cheap proxy $\varphi(b) = 0$ that drops a block.
#
# **Output distillation alone** ($\alpha = 0$) is the chapter on distillation with a student that has been rounded; LLM-QAT does this for language models, on texts that the teacher writes. **Hidden states** cost the same as attention to match. **MiniLM's relations**, in the chapter on distillation, match only the last layer and are the choice when student and teacher differ in width.
#
# **Which one?** At 8 bits, first measure whether rounding alone costs anything at all. At fewer, train with noise on labels and compare: the teacher has to earn its extra passes. Match attention where labels exist in a few languages and the others must not fall behind. And report each language.
#
# ## Further reading
#
# O'Neill and Dutta, *Self-Distilled Quantization*, ACL 2023, arXiv 2307.05972. Fan et al., *Training with Quantization Noise for Extreme Model Compression*, ICLR 2021, arXiv 2004.07320. Stock et al., *And the Bit Goes Down*, ICLR 2020, arXiv 1907.05686. Jégou, Douze and Schmid, *Product Quantization for Nearest Neighbor Search*, 2011. Hooker et al., *Characterising Bias in Compressed Models*, 2020, arXiv 2010.03058. For how the encoder was trained: Lample and Conneau, 2019, arXiv 1901.07291; Reimers and Gurevych, 2020, arXiv 2004.09813.
