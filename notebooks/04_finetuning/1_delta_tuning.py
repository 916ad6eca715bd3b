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
# # Delta tuning
#
# **Freeze a model and train a few thousand numbers beside it: each new task then costs kilobytes to store instead of the whole model. What that costs in quality depends on where those numbers sit.**
#
# After this chapter you can
#
# - sort any such method into one of three classes, and count what it trains before you train it;
# - read the code of LoRA, adapters, prefixes, prompts, BitFit and random subspaces;
# - swap one method for another in one line, and merge or remove the result;
# - predict how much memory a method saves, and why the saving shrinks with the batch;
# - recognize the mistakes that make a method look worse than it is.
#
# You need the tour (`00_start_here`), matrices and gradients. Five methods are taught in depth; a gallery near the end introduces the others.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("04_finetuning/1_delta_tuning")

# %% [markdown]
# ## The picture
#
# MiniLM-L6 is a published **encoder**: a model that turns a text into vectors, one for each token. It has some twenty million parameters. Here it learns four small tasks with labels: the topic of a package's
# description, the language of a sentence, whether a short description belongs to a long one, and whether two packages come from one source. Every point is a way of
# teaching it. All of them train a new **classifier**, one linear layer on top that turns the vectors into labels. They differ in what else they train, and therefore in what has to be stored for each task.

# %%
from effnb.chapters.finetuning.delta_tuning import drawings, tables

grid = tables.stored("grid")
drawings.result(grid.data["table"])

# %% tags=["nbval-check-output"]
print(tables.cost_said(grid.data["table"]))

# %% [markdown]
# The axis below the picture is logarithmic: between the left end and the right lies a factor of thousands. The rest of the chapter explains what sits at each point, and which differences are real.

# %% [markdown]
# ## The idea
#
# ### One word for all of them
#
# Let $\Theta$ be the parameters of a trained model. **Fine-tuning** on a task turns them into $\Theta'$, and **full tuning** moves every one of them. Ding et al. (2023) call the change the **delta**, $\Delta\Theta$. In **delta tuning** it is described by few numbers, and everything else stays **frozen**: it
# is used, but never changes. There are three ways to get there:
#
# - **addition**: new parameters come in beside the old ones (adapters, prefixes, prompts);
# - **specification**: a chosen few of the old ones are trained (the biases, the last layers);
# - **reparametrization**: the change of a large matrix is computed from few numbers (LoRA, random subspaces).
#
# A frozen model is shared by all tasks. A delta is attached, saved, swapped and removed by itself.
#
# ### LoRA: a change of low rank
#
# Take a layer $y = W x$ with $d$ inputs and outputs. Its change is another $d \times d$ matrix, too many numbers to store for each task. **LoRA** (Hu et al., 2021) writes it as a product of two thin ones,
#
# $$y = W x + \frac{\alpha}{r}\, B A x, \qquad A \in \mathbb{R}^{r \times d}, \quad B \in \mathbb{R}^{d \times r}.$$
#
# The **rank** $r$ is small, and $2 r d$ numbers are trained. $B$ starts at 0, so the model starts as it was; $A$ starts at random. The factor $\alpha / r$ keeps the size of the change about the same when $r$ is varied.
#
# One step by hand, with $d = 2$ and $r = \alpha = 1$. Let $W$ be the identity, $A = (1, 1)$, $x = (1, 2)$, and let the output we want be $(2, 2)$. The loss is half the squared error, so its gradient at the output is $g = y - (2, 2) = (-1, 0)$. The gradient of $B$ is $g$ times $A x = 3$, that is $(-3, 0)$. The gradient of $A$ is $B^\top g\, x^\top = 0$, because $B$ is 0. With a learning rate of 0.1, $B$ becomes $(0.3, 0)$:

# %% tags=["nbval-check-output"]
import torch
from torch import nn

from effnb.finetuning import lora

toy = nn.Sequential(nn.Linear(2, 2, bias=False))
toy[0].weight.data = torch.eye(2)
path = lora.attach(toy, rank=1, alpha=1.0)
A, B = lora.delta_parameters(path, "default").values()
A.data = torch.ones(1, 2)
x, wanted = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 2.0])
(0.5 * (path(x) - wanted).square().sum()).backward()
B.data -= 0.1 * B.grad
print("gradient of A:", A.grad.tolist(), " gradient of B:", B.grad.flatten().tolist())
print("new output   :", [round(v, 3) for v in path(x).tolist()])
merged = lora.merge(path, "default")[0].weight
print("merged weight:", [[round(v, 3) for v in row] for row in merged.tolist()])

# %% [markdown]
# The last line **merges** the delta: $W + \frac{\alpha}{r} B A$ has the shape of $W$, and a merged LoRA costs nothing when the model is used.
#
# ### Adapters: small layers in between
#
# An **adapter** (Houlsby et al., 2019) is a layer inserted behind a part of each block. It narrows the vector $z$ to $m$ channels, the **bottleneck**, applies a nonlinear function $\varphi$, widens it again and adds the result:
#
# $$z \leftarrow z + \varphi(z W_d + b_d)\, W_u + b_u, \qquad W_d \in \mathbb{R}^{d \times m}, \quad W_u \in \mathbb{R}^{m \times d}.$$
#
# $W_u$ and $b_u$ start at 0. Because of $\varphi$ no matrix can take its place: an adapter cannot be merged, and its time is paid at every use. The grid has one adapter a block, behind the feed-forward layer (Pfeiffer et al., 2020).
#
# ### Prompts and prefixes: words that do not exist
#
# **Prompt tuning** (Lester et al., 2021) changes nothing inside the model. It puts $p$ trained vectors $P$ in front of the embedded text, as if they were words:
# $X' = [P; E(x)]$. A **prefix** (Li and Liang, 2021) does so in every layer, by $l$ trained keys and values that each token can attend to besides those of the text. He et al. (2022) showed what that amounts to. For a query $q$,
# <a id="equation-3"></a>
#
# $$\operatorname{Attn}(q, [P_k; K], [P_v; V]) = (1 - \lambda) \operatorname{Attn}(q, K, V) + \lambda \operatorname{Attn}(q, P_k, P_v), \tag{3}$$
#
# where $\lambda$ is the part of the softmax that falls on the prefix. So a prefix mixes a learned answer into each head, the more the better the query fits its keys. Neither a prefix nor a prompt has a start at which the model is unchanged.
#
# ### BitFit: only the biases
#
# A layer $y = W x + b$ has few biases and many weights. **BitFit** (Ben Zaken et al., 2021) trains every $b$ and no $W$. One of these biases can do nothing. In softmax attention a bias $b_k$ of the keys adds the same number $q^\top b_k$ to the score of every position, and the softmax does not see what is added to all:

# %% tags=["nbval-check-output"]
from effnb.chapters.finetuning.delta_tuning import methods
from effnb.lab.task_inputs import classification_loss
from effnb.lab.tasks import task

topics = methods.Subject(task("section"))
model = methods.prepared(topics.base, "BitFit").model
nn.init.normal_(model.classifier.weight, std=0.1)
classification_loss(model, topics.batch(topics.task.train[:8])).backward()
for kind in ("query", "key", "value"):
    own = [p.grad for n, p in model.named_parameters() if f".{kind}." in n and p.grad is not None]
    largest = max(float(g.abs().max()) for g in own)
    print(f"{kind:6} biases: gradients are {'zero' if largest < 1e-6 else 'not zero'}")

# %% [markdown]
# ### Random subspaces: how many numbers does a task need?
#
# The most radical reparametrization has no structure at all. Let $\theta_0$ be $D$ weights and $P$ a fixed random matrix of $D$ rows and $k$ columns; train only $v$ in
#
# $$\theta = \theta_0 + P v, \qquad v \in \mathbb{R}^k.$$
#
# The smallest $k$ that reaches nine tenths of full tuning's score is called the task's **intrinsic dimension** (Aghajanyan et al., 2020). The matrix would be far too large to store, so it is computed as a product of fast transforms (*Fastfood*).

# %% [markdown]
# ### Counting
#
# What does each method train in MiniLM, with its 6 blocks of width 384? This table is counted on the model itself:

# %% tags=["nbval-check-output"]
tables.counted_table(topics.base, layers=6, d=384)

# %% [markdown]
# Sizes can be chosen to be equal: a LoRA of rank 1, a prompt of 24 vectors and a prefix of 2 positions train 9,216 numbers each. If numbers were all that mattered, these would be equally good.

# %% [markdown]
# ## The code
#
# A delta says what it does to an output. For LoRA that is one line:

# %%
from effnb.lab import show

show(lora.LoRA.forward)

# %%
from effnb.finetuning import adapters, bitfit, intrinsic_dimension, prefix_tuning, prompt_tuning

show(adapters.HoulsbyAdapter.forward, bitfit.is_bias, prefix_tuning.PrefixTuning.flat)

# %%
show(intrinsic_dimension.Fastfood.forward)

# %% [markdown]
# LoRA, DoRA, (IA)³, prompts and prefixes are tested against the library `peft`: the same weights give the same outputs, and each reads the other's files.
#
# All methods share one protocol: `attach` returns a new model on the same frozen tensors, and the delta can be read, merged or taken off again. To swap methods, change one line. Is each model unchanged before it is trained?

# %% tags=["nbval-check-output"]
from effnb.core.deltas import delta_state_dict, detach

encoder = topics.loaded.model
inputs = topics.loaded.tokenizer(["a small delta"], return_tensors="pt")
ways = {
    "LoRA": lora.attach(encoder, "mine", rank=1, layers=["*.query", "*.value"]),
    "adapter": adapters.attach(encoder, "mine", placement="pfeiffer", size=16),
    "BitFit": bitfit.attach(encoder, "mine"),
    "prompt": prompt_tuning.attach(encoder, "mine", length=24),
}
with torch.inference_mode():
    before = encoder(**inputs).last_hidden_state
    for name, tuned in ways.items():
        same = torch.equal(tuned(**inputs).last_hidden_state, before)
        numbers = sum(t.numel() for t in delta_state_dict(tuned, "mine").values())
        print(f"{name:8} {numbers:7,} numbers; unchanged at the start: {same}")
print("taken off again:", type(detach(ways["LoRA"], "mine")) is type(encoder))

# %% [markdown]
# ## Turn the knob
#
# When you run this page, the panel trains MiniLM on six topics while you wait, at most a quarter of a minute for each new position. It shows the learning curve on texts the model has not seen, and what the delta weighs. *As compared* is the learning rate that was chosen for a method on a validation set.

# %%
from effnb.chapters.finetuning.delta_tuning import panels

panels.training()

# %% [markdown]
# Things to try when you run this page:
#
# - pin *LoRA* at rank 1, then choose 32: what do you get for thirty-two times as many numbers?
# - give *prompt* ten times its rate, then *full*: which of them survives?
# - choose *16 of each topic*. The loss on the last batch falls further than that on new texts: the model learns its few examples by heart.

# %% [markdown]
# ## Does it hold?
#
# Seven claims of Ding et al. belong to this chapter. They trained models of 220 million to 11 billion parameters on a hundred tasks; here a model of 23 million meets four tasks, for a short time. Parts, bounds and margins were registered before the measurements. A part that was not measured reads "not tested".

# %%
from effnb.chapters.finetuning.delta_tuning import verdicts
from effnb.lab import claims_table

held = verdicts.stored()
judges = (verdicts.d_1, verdicts.d_2, verdicts.d_3, verdicts.d_4)
claims_table(*(judge(*held) for judge in (*judges, verdicts.d_5, verdicts.d_6, verdicts.d_7)))

# %% [markdown]
# **Quality.** Is the article's order there, and does it follow the number of trained parameters?

# %% tags=["nbval-check-output"]
print(tables.order_said(grid.data["table"]))
tables.grid_table(grid.data["table"])

# %% [markdown]
# **Speed of learning.** The same runs, watched on the way. Compare the two curves of LoRA with each other, and the dashed one with the prompt, which has exactly as many numbers:

# %%
drawings.learning(grid.data)

# %% tags=["nbval-check-output"]
print(tables.speed_said(grid.data))

# %% [markdown]
# **With few examples.** Often there are no thousands of labeled texts. Sixteen of each label can be written by hand:

# %% tags=["nbval-check-output"]
tables.few_table(tables.stored("few").data["table"], grid.data["table"])

# %% [markdown]
# **Where a model writes.** `mini-1m`, a small decoder trained for this book, gets the same deltas, except for BitFit: it has no biases.

# %% tags=["nbval-check-output"]
tables.writing_table(grid.data["table"])

# %% [markdown]
# **Intrinsic dimension.** The query and value weights of MiniLM, nearly two million numbers, may move in a random subspace only:

# %%
intrinsic = tables.stored("intrinsic").data["table"]
drawings.subspaces(intrinsic)

# %% tags=["nbval-check-output"]
print(tables.intrinsic_said(intrinsic))

# %% [markdown]
# Do tasks *share* such a subspace? **Intrinsic prompt tuning** (Qin et al., 2021) trains a soft prompt for each of many tasks, learns the few directions in which these prompts differ, and then tunes, for a task that it has not seen, only its place along them. Here the tasks are small: one topic, language or book against another. `mini-1m` reads the prompts, and a random subspace of equal size stands beside the learned one.

# %% tags=["nbval-check-output"]
tables.shared_table(tables.stored("shared").data["table"])

# %% [markdown]
# ## What it costs and saves
#
# **On disk** a delta costs what the table of counts says. **In memory** the saving needs an argument. Adam keeps, for each number that is trained, the number itself, its gradient and two running means (its *moments*): 16 bytes in 32-bit arithmetic. A frozen number costs 4. With $N$ parameters of which $M$ are trained, training holds
#
# $$4 N + 12 M \ \text{bytes}, \quad \text{in place of} \quad 16 N.$$
#
# With few trained numbers that saves nearly three quarters. But a step also keeps **activations**, the intermediate results that the backward pass needs, and these grow with the batch. A frozen layer saves some of them: the gradient of $W$ needs the layer's inputs, and is no longer wanted. What softmax, norms and nonlinear functions need stays. So the saving shrinks as the batch grows:

# %%
memory = tables.stored("memory").data["table"]
drawings.memory(memory)

# %% tags=["nbval-check-output"]
print(tables.memory_said(memory))
tables.memory_table(memory)

# %% [markdown]
# (IA)³ trains fewer numbers than LoRA and saves less: for the gradient of a factor, it has to keep what the factor multiplies. Diff pruning, in the last row, trains a difference *and* a gate for every weight and keeps only the differences whose gates stay open. The result is small; the training is not.
#
# **In time**, the backward pass of a frozen layer computes one matrix product instead of two, and the optimizer has little to do. One step of 8 texts, here and now:

# %%
for name, seconds in methods.times(topics, ("full", "LoRA", "adapter", "prompt", "last layers")):
    print(f"{name:12} {1000 * seconds:4.0f} ms")

# %% [markdown]
# Tuning the *last layers* stops the backward pass early. A *prompt* must bring it down to the very first layer, and makes every text longer besides: few numbers, but no cheap step.

# %% [markdown]
# ## On a real model
#
# MiniLM is a real model already. SmolLM2-135M is six times as large, and a decoder. Its linear weights lie on a 4-bit grid, as a file of quantized weights leaves them, which does not matter here: frozen weights only have to be read. One text of 128 tokens:

# %% tags=["nbval-check-output"]
smollm2 = tables.stored("smollm2")
tables.smollm2_table(smollm2.data["table"])

# %% [markdown]
# One step of LoRA live:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here())
else:
    print(smollm2)

# %% [markdown]
# ## Where it breaks
#
# **Full tuning's learning rate.** Most deltas have few numbers to move and need a larger rate, each method a different one; too large a rate ruins it. A comparison at one rate for all is worthless. The rates of the grid were chosen by this table, in which each method was tried at three:

# %% tags=["nbval-check-output"]
tables.rates_table(tables.stored("rates").data["table"])

# %% [markdown]
# By this table alone, full tuning would have got its highest rate, and a LoRA of rank 1 would have looked as good. Twenty steps on one task do not show what happens on another. On pairs of texts most runs never left guessing at that rate, so the grid gives it the next lower one. The other methods have what the table chose, and some of them may deserve better on pairs too:

# %% tags=["nbval-check-output"]
print(tables.steep_said(tables.stored("steep").data["table"], grid.data["table"]))

# %% [markdown]
# **Two matrices of zeros.** Only *one* of LoRA's matrices may start at 0. With both at 0, each one's gradient is multiplied by the other, and nothing ever moves:

# %% tags=["nbval-check-output"]
dead = lora.attach(toy, rank=1)
A, B = lora.delta_parameters(dead, "default").values()
A.data.zero_()
(dead(x) - wanted).square().sum().backward()
print("gradients:", A.grad.abs().sum().item(), "and", B.grad.abs().sum().item())

# %% [markdown]
# **The new classifier counts.** It has a few thousand numbers of its own, and has to be stored with each delta. Here it is trained beside every method and counted with none. Published tables differ in this.
#
# **What cannot work** is refused with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
from effnb.lab import load

decoder = load("mini-300k").model
for attempt in (
    lambda: bitfit.attach(decoder),
    lambda: lora.attach(encoder, rank=500, layers="*.query"),
    lambda: lora.attach(encoder, layers="*.q_proj"),
    lambda: lora.attach(ways["LoRA"], "mine"),
    lambda: lora.merge(ways["adapter"], "mine"),
    lambda: lora.load_delta(ways["LoRA"], "mine", delta_state_dict(ways["prompt"], "mine")),
    lambda: prompt_tuning.attach(decoder, length=600),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.finetuning.delta_tuning import exercises

for exercise in (exercises.counting, exercises.merging, exercises.gate):
    print(exercise)

# %% [markdown]
# **1.** How many numbers does a method train, in an encoder of `layers` blocks and width `d`? `size` is the rank, bottleneck or length. LoRA sits on the query and value matrices, there is one adapter a block, and nothing else is trained.


# %% tags=["exercise", "nbval-check-output"]
def delta_size(method, size, d, layers):
    """`method` is "LoRA", "adapter", "prefix" or "prompt"; a whole number."""
    raise NotImplementedError


_ = exercises.counting.check(delta_size)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Write the shapes of all trained tensors of one block next to each other. The table under *Counting* tells you whether you are right.
#
# </details>


# %% tags=["solution"]
exercises.counting.solution()

# %% [markdown]
# **2.** The weight of a layer after its LoRA was merged.


# %% tags=["exercise", "nbval-check-output"]
def lora_weight(W, A, B, alpha):
    """W is (out, in), A is (r, in), B is (out, r)."""
    raise NotImplementedError


_ = exercises.merging.check(lora_weight)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Compare $W x + \frac{\alpha}{r} B (A x)$ with $(\ldots)\, x$.
#
# </details>


# %% tags=["solution"]
exercises.merging.solution()

# %% [markdown]
# **3.** The number $\lambda$ of [equation 3](#equation-3), for prefixes: how much of a query's attention falls on the prefix? Scores are divided by the root of the head's width, as usual.


# %% tags=["exercise", "nbval-check-output"]
def prefix_share(q, P, K):
    """q is (d,), the prefix's keys P are (l, d), the text's keys K are (n, d)."""
    raise NotImplementedError


_ = exercises.gate.check(prefix_share)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# One softmax runs over all keys. Which of its entries belong to the prefix?
#
# </details>


# %% tags=["solution"]
exercises.gate.solution()

# %% [markdown]
# ## Gallery
#
# All of these are in the package, with the same `attach`; the first four are in the panel too.
#
# **(IA)³** (Liu et al., 2022). Multiply keys, values and the inner activations of the feed-forward layer by learned vectors that start at 1: $k \leftarrow l_k \odot k$, and so on. Use it where several tasks share a batch: every row then has vectors of its own.
#
# **DoRA** (Liu et al., 2024). Split a weight into the length and the direction of each row, $W' = m \odot (W + \Delta W) / \lVert W + \Delta W \rVert$; train $m$ freely and the direction by a LoRA. Use it where a LoRA of small rank is not enough.
#
# **Last layers** (Lee et al., 2019) and **random modules**. Train the last blocks, or matrices drawn at random, and freeze the rest. Use the former when memory is scarce: nothing below them needs activations.
#
# **Parallel adapters** (He et al., 2022). Compute the adapter from the *input* of a feed-forward layer and add it to its output. Use them where you would use adapters on larger models.
#
# **Diff pruning** (Guo et al., 2020). $\theta' = \theta + z \odot w$ with a random gate $z$ for every weight; the expected number of open gates is part of the loss. Use it when the stored delta must be sparse and training memory is plentiful.
#
# **Learned masks** (Zhao et al., 2020). $W' = W \odot M$ with $M \in \{0, 1\}$: train no value at all, only which weights stay. A task costs one bit for each weight.
#
# **Intrinsic prompt tuning** (Qin et al., 2021). Train prompts for many tasks, learn the low-dimensional space in which they lie, and tune a new task inside it. It needs twenty training tasks at least.
#
# **Black-box tuning** (Sun et al., 2022). Search a random subspace of a prompt with an evolution strategy that only sees losses. Use it when the model gives no gradients, as behind an interface. The next chapter runs it.
#
# **Which one?** Start with LoRA on queries and values: it starts as the original model, merges, and every library reads its files. If one model serves many tasks at once, keep it unmerged and swap. Take the last layers when activations do not fit into memory, and a prompt only where you cannot change anything else. The evidence here is from one small encoder: measure on yours.
#
# ## Further reading
#
# Ding et al., *Parameter-efficient fine-tuning of large-scale pre-trained language models*, Nature Machine Intelligence, 2023. Houlsby et al., 2019, arXiv 1902.00751. Pfeiffer et al., *AdapterFusion*, 2020, arXiv 2005.00247.
# He et al., *Towards a Unified View*, 2022, arXiv 2110.04366. Li and Liang, *Prefix-Tuning*, 2021, arXiv 2101.00190. Lester et al., *The Power of Scale*, 2021, arXiv 2104.08691. Liu et al., *(IA)³*, 2022, arXiv 2205.05638. Ben Zaken et al., *BitFit*, 2021, arXiv 2106.10199.
# Lee et al., 2019, arXiv 1911.03090. Guo et al., 2020, arXiv 2012.07463. Zhao et al., 2020, arXiv 2004.12406. Aghajanyan et al., 2020, arXiv 2012.13255, after Li et al., 2018, arXiv 1804.08838. Hu et al., *LoRA*, 2021, arXiv 2106.09685. Liu et al., *DoRA*, 2024, arXiv 2402.09353. Qin et al., 2021, arXiv 2110.07867. Sun et al., 2022, arXiv 2201.03514.
