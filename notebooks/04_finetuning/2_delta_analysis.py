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
# # What deltas do together
#
# **One frozen model can carry many deltas at once: one for each user of a batch, several for one task, or one that was learned on another task. What comes of that can be measured, and theory says why so few numbers suffice.**
#
# After this chapter you can
#
# - answer many users, each with a LoRA, in a single batch, and say when that is faster than merging;
# - combine deltas at once and in sequence, and measure what each of them adds;
# - measure a generalization gap, what a model forgets, and how much of a delta arrives on another task;
# - tune a prompt for a model that gives you losses and no gradients;
# - read a delta as the control of a dynamical system, and solve for it in two ways.
#
# You need the chapter on delta tuning (`1_delta_tuning`) and gradients.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("04_finetuning/2_delta_analysis")

# %% [markdown]
# ## The picture
#
# Eight users share one copy of `mini-1m`, a decoder of a million parameters. Each user has a LoRA that was trained a moment ago, for a second or two, on one kind of text: novels, the Bible, manuals of databases, a dictionary and so on. All eight then send the same opening, and the model answers them **in one batch**: every row is computed with another delta.

# %%
from effnb.chapters.finetuning.delta_analysis import panels

for user, line in panels.answer("It is a").items():
    print(f"{user:10} {line}")

# %% [markdown]
# The model is tiny, and its sentences show it. But the same few words gave eight lines that echo what their users had read, and no model was loaded, merged or swapped in between. The larger `mini-5m` shows how much time that saves next to answering one user after the other:

# %%
from effnb.chapters.finetuning.delta_analysis import drawings, tables

serve = tables.stored("serve")
drawings.serving(serve.data["table"])

# %% tags=["nbval-check-output"]
print(tables.serving_said(serve.data["table"]))

# %% [markdown]
# ## The idea
#
# ### A batch in which every row has its own LoRA
#
# Row $m$ of a batch belongs to user $u$, whose LoRA has the matrices $A_u$ and $B_u$ and the scaling $s_u$. Its output is
# <a id="equation-1"></a>
#
# $$y_m = W x_m + s_u B_u A_u x_m . \tag{1}$$
#
# The first term is the same for everybody. It is nearly all of the work, and a large product over the whole batch uses a processor far better than many small ones. The second term is thin. So the frozen product is computed **once**, and only the update looks up its user (Chen et al., 2023; Sheng et al., 2023).
#
# Two rows by hand. Let $W$ be the identity and both inputs $(1, 2)$. The first user has $A = (1, 0)$ and $B = (0, 1)^\top$: the update is $A x = 1$, put into the second place. The second user has $A = (0, 1)$ and $B = (1, 0)^\top$: the update is 2, put into the first place. A third row belongs to no user.

# %% tags=["nbval-check-output"]
import torch
from torch import nn

from effnb.core.deltas import delta_parameters
from effnb.finetuning import lora, serving

toy = nn.Sequential(nn.Linear(2, 2, bias=False))
toy[0].weight.data = torch.eye(2)
shared = toy
for user, a, b in (("first", [1.0, 0.0], [0.0, 1.0]), ("second", [0.0, 1.0], [1.0, 0.0])):
    shared = lora.attach(shared, user, rank=1, alpha=1.0)
    A, B = delta_parameters(shared, user).values()
    A.data, B.data = torch.tensor([a]), torch.tensor(b)[:, None]
served = serving.serve(shared)
with serving.users(served, ["first", "second", None]):
    print(served(torch.tensor([[1.0, 2.0]] * 3)).tolist())

# %% [markdown]
# A merged model cannot do this: $W + s_u B_u A_u$ is one matrix, and it serves one user.
#
# ### Several deltas for one task
#
# A prompt, biases and adapters change different places, so a model can carry all of them. Trained **at once**, they share one loss and each keeps its own learning rate. Trained **in sequence**, the first is learned and frozen, then the second is learned on top of it, and so on.
#
# More numbers can fit the training texts more closely. The **generalization gap** is what is lost on the way to new texts: accuracy on training texts less accuracy on new ones.
#
# ### Why so few numbers suffice: two views
#
# **Low-dimensional solutions.** Full tuning moves all weights, but the solutions that it could reach are many, and some lie close by. One sign of it: if the change $\Delta W$ of a matrix has singular values $\sigma_1 \ge \sigma_2 \ge \dots$, the part of its square that $r$ directions hold is
#
# $$\frac{\sigma_1^2 + \dots + \sigma_r^2}{\lVert \Delta W \rVert_F^2} .$$
#
# If it is near 1, then a LoRA of rank $r$ could have made nearly the same change. Another sign is the intrinsic dimension of the chapter before: a few hundred random directions go most of the way. Adapters and prompts look for something else: not the same weights but nearly the same **function**.
#
# **Optimal control.** Read a network's blocks as time. A state $x_t$ enters block $t$, and a **control** $u_t$, the delta, pushes what leaves it:
#
# $$x_{t+1} = f_t(x_t, u_t), \qquad \min_u\; J(u) = \Phi(x_T) + \frac{\lambda}{2} \sum_t \lVert u_t \rVert^2 .$$
#
# $\Phi$ is the loss at the end, and $\lambda$ the price of a push. Pontryagin's conditions describe a solution by **costates** $p_t$, which run backward from the end:
# <a id="equation-4"></a>
#
# $$p_T = -\frac{\partial \Phi}{\partial x_T}, \qquad p_t = \Bigl(\frac{\partial f_t}{\partial x_t}\Bigr)^{\!\top} p_{t+1}, \qquad u_t = \operatorname*{arg\,max}_u \; p_{t+1} \cdot f_t(x_t, u) - \frac{\lambda}{2} \lVert u \rVert^2 . \tag{4}$$
#
# Each control thus solves a problem of its own, given the path and the costates. Doing this for all of them, running the path again, and repeating is the **method of successive approximations**. With one gradient step in place of the maximum it is back-propagation with gradient descent: costates are what back-propagation carries, with the sign reversed.
#
# By hand: one number $x_0 = 0$, two steps $x_{t+1} = x_t + u_t$, the goal 3, and $\Phi = \frac12 (x_2 - 3)^2$ with $\lambda = 1$. Both costates are $p = 3 - x_2$, and the maximum is at $u_t = p$. So $u_0 = u_1 = 3 - 2 u_0$, which gives 1: the path stops at 2, because the last unit would cost more than it saves.

# %% tags=["nbval-check-output"]
from effnb.finetuning import optimal_control
from effnb.finetuning.optimal_control import ControlProblem

walk = ControlProblem(
    steps=(lambda x, u: x + u, lambda x, u: x + u),
    start=torch.tensor(0.0),
    terminal=lambda x: 0.5 * (x - 3) ** 2,
    weight=1.0,
)
still = (torch.tensor(0.0), torch.tensor(0.0))
for way in (optimal_control.by_backpropagation, optimal_control.successive_approximations):
    found = way(walk, still)
    print(
        f"{way.__name__:27}",
        [round(float(u), 3) for u in found.controls],
        round(found.costs[-1], 3),
    )

# %% [markdown]
# ### Tuning without gradients
#
# Behind an interface, a model gives answers and losses, but no gradients. **Black-box tuning** (Sun et al., 2022) searches for a prompt in a random subspace of few dimensions, $p = A z + p_0$. An **evolution strategy** draws candidates for $z$, ranks them by their losses, moves towards the best, and draws again. That works only because so few dimensions are enough.

# %% [markdown]
# ## The code
#
# What a layer does that serves many users, by [equation 1](#equation-1), and how the costates of [equation 4](#equation-4) run backward:

# %%
from effnb.lab import show

show(serving.ServedLoRA.forward)

# %%
show(ControlProblem.costates)

# %% [markdown]
# Deltas combine by being attached under different names. What is frozen and what is trained is all that tells *at once* from *in sequence*:

# %%
from effnb.chapters.finetuning.delta_analysis import methods

show(methods.together, methods.next_in_line)

# %% [markdown]
# ## Turn the knob
#
# The same eight users. Turn their number, and watch three ways to answer them: all in one batch; one after the other, with the right delta switched on; and one after the other on models that were merged beforehand. The texts below the picture are those of the batch.

# %%
panels.serve()

# %% [markdown]
# Things to try:
#
# - go from 1 user to 8. Which of the three bars hardly grows?
# - at 1 user, merging wins: a merged LoRA costs nothing. From how many users on is the batch ahead?
# - when you run this page, change the opening to *And the king*, and find the users who write on as you would expect.

# %% [markdown]
# ## Does it hold?
#
# Six claims of Ding et al. belong here. They worked with a hundred tasks and far larger models; here are small ones, a few tasks and short runs. Parts, bounds and margins were registered before the measurements. A part that was not measured reads "not tested".

# %%
from effnb.chapters.finetuning.delta_analysis import verdicts
from effnb.lab import claims_table

held = verdicts.stored()
judges = (verdicts.d_8, verdicts.d_9, verdicts.d_10, verdicts.d_11, verdicts.d_12, verdicts.d_13)
claims_table(*(judge(*held) for judge in judges))

# %% [markdown]
# **At once.** Eight sets of three methods on MiniLM-L6, and full tuning beside them; the adapters sit behind both parts of each block (Houlsby et al., 2019). The task is to find the topic of a description, with sixteen examples of each:

# %%
together = tables.stored("together").data["table"]
drawings.together(together)

# %% tags=["nbval-check-output"]
print(tables.adds_said(together))
print(tables.gap_said(together))

# %% [markdown]
# **In sequence.** Each order trains one method, freezes it, and goes on. The last row is a warning for such tables: an order trains three times as long as its first stage, so it has to be compared with one method that was trained for as long.

# %% tags=["nbval-check-output"]
sequence = tables.stored("sequence").data["table"]
print(tables.orders_said(sequence))
tables.sequence_table(sequence)

# %% [markdown]
# **Templates.** A decoder can be asked in words: `Topic:` stands behind the text, and the answer follows. What are these words worth, and how much of that is left once there are examples to train on?

# %% tags=["nbval-check-output"]
tables.templates_table(tables.stored("templates").data["table"])

# %% [markdown]
# **Scale.** The same six ways of tuning on three sizes of decoder:

# %%
drawings.scale(tables.stored("scale").data["table"])

# %% [markdown]
# **Transfer.** A LoRA was trained on each of six tasks and then used on all of them, with no further training. The number in a cell is what it saves there, in per cent of what the task's own LoRA saves:

# %%
transfer = tables.stored("transfer").data["table"]
drawings.transfer(transfer)

# %% tags=["nbval-check-output"]
print(tables.transfer_said(transfer))

# %% [markdown]
# Part of such a saving is form: between tasks with labels, a delta has also learned that one word and an end are wanted. Where the model is to write on, that habit costs more than it saves: in the columns of writing, numbers below 0 say that the untuned model was better.
#
# **Low-dimensional solutions.** How much of the change of full tuning lies in a few directions, and how close do few numbers come to its function?

# %% tags=["nbval-check-output"]
tuned = tables.stored("tuned").data["table"]
print(tables.energy_said(tuned))
tables.tuned_table(tuned)

# %% [markdown]
# **Optimal control.** A vector behind each of the four frozen blocks of `mini-1m`, the same for all tokens, steers it to the right topics of some examples. Solved here and now for four of them, once by back-propagation and once by successive approximations:

# %% tags=["nbval-check-output"]
from effnb.chapters.finetuning.delta_analysis import steering

topics = methods.Decoder("mini-1m")
examples, _ = topics.task.few_shot(16, seed=0)
solved = steering.solve(topics, examples[:4], weight=0.1)
print(f"untouched: {solved.free:.2f}")
for way, solution in solved.by.items():
    print(f"{way}: {solution.costs[-1]:.2f}")

# %% [markdown]
# Two roads, one cost: the second never follows a gradient through more than one block at a time. The same was stored for five sets of twelve examples, with the cost after each round and a look at texts that were not steered for:

# %%
control = tables.stored("control").data["table"]
drawings.control(control)

# %% tags=["nbval-check-output"]
print(tables.control_said(control))

# %% [markdown]
# **Without gradients.** Two hundred losses against fifty steps with gradients, for a prompt of four vectors:

# %% tags=["nbval-check-output"]
tables.black_box_table(tables.stored("black_box").data["table"])

# %% [markdown]
# ## What it costs and saves
#
# **Memory.** Merged models for $n$ users hold $n$ times the model. One model with deltas holds the model once and $n$ times a few kilobytes:

# %% tags=["nbval-check-output"]
from effnb.chapters.finetuning.delta_analysis import users
from effnb.lab import load

small = load("mini-5m", device="cpu").model
for count in (1, 16, 1000):
    bytes_ = users.stored_bytes(small, count)
    print(f"{count:5,} users: {bytes_['batch'] / 2**20:8,.1f} MiB with deltas, "
          f"{bytes_['merged'] / 2**20:9,.1f} MiB merged")  # fmt: skip

# %% [markdown]
# **Time to train.** A step through frozen weights skips their gradients. How much of a step that saves depends on where the trained numbers sit:

# %% tags=["nbval-check-output"]
tables.times_table(tables.stored("times").data["table"])

# %% [markdown]
# **Forgetting.** Tuning on one task can spoil what a model knew. The table under *low-dimensional solutions* has a column for it: how much the loss on a novel rose. A delta has one more advantage there, and it is exact: take it off, and the old model is back.

# %% tags=["nbval-check-output"]
from effnb.core.deltas import detach

many, tokenizer = panels.voices()
ids = tokenizer("It was a bright day", return_tensors="pt").input_ids
bare = many
for voice in users.VOICES:
    bare = detach(bare, voice)
frozen = load("mini-1m", device="cpu").model
with torch.inference_mode():
    print("same logits:", torch.equal(bare(input_ids=ids).logits, frozen(input_ids=ids).logits))

# %% [markdown]
# ## On a real model
#
# MiniLM-L6, on which deltas were combined above, is a published model. SmolLM2-135M is larger. Its linear weights lie on a 4-bit grid, as its file of quantized weights leaves them; that does not matter here, because frozen weights only have to be read.

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(users.smollm2_here())
else:
    print(tables.smollm2_said(tables.stored("smollm2").data["table"]))

# %% [markdown]
# ## Where it breaks
#
# **A jump that is too long.** The maximum of a Hamiltonian is right for the old path only. Where a push is cheap, all controls jump at once and land far beyond the goal. In the example by hand each takes $u = (3 - x_2) / \lambda$; with $\lambda = 0.5$ that is

# %% tags=["nbval-check-output"]
u = [0.0, 0.0]
for _ in range(4):
    u = [(3 - sum(u)) / 0.5 for _ in u]
    print("x at the end:", sum(u))

# %% [markdown]
# The package therefore holds every control near its old value, the more strongly the more often a round fails.
#
# **A search on shifting ground.** An evolution strategy sees ranks only. If each candidate of a generation is judged by another batch, luck decides the ranking. A simulation: eight equally good candidates, whose losses differ only by the texts that each was judged on, drawn again in a second turn:

# %% tags=["nbval-check-output"]
noise = torch.Generator().manual_seed(0)
for turn in (1, 2):
    losses = 3.0 + 0.1 * torch.randn(8, generator=noise)
    print(f"turn {turn}: the best is candidate {int(losses.argmin()) + 1}")

# %% [markdown]
# **One stage against three.** An order of three methods trains for three stages, and its gain over one stage is not yet a gain over training longer. Compare equal numbers of steps.
#
# **What cannot work** is refused with one sentence:

# %% tags=["nbval-check-output"]
from effnb.finetuning import adapters

encoder = methods.encoder().loaded.model
row = torch.ones(3, 2)
for attempt in (
    lambda: served(row),
    lambda: serving.users(served, ["stranger"]).__enter__(),
    lambda: serving.serve(adapters.attach(encoder, "mine", placement="pfeiffer", size=4)),
    lambda: lora.merge(served, "served"),
    lambda: walk.states(still[:1]),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.finetuning.delta_analysis import exercises

for exercise in (exercises.transfer, exercises.serving, exercises.control):
    print(exercise)

# %% [markdown]
# **1.** Of what a task's own delta saves, which part does another task's delta save? Given are three losses on the task: of the untuned model, with the other task's delta, and with its own.


# %% tags=["exercise", "nbval-check-output"]
def arriving(untuned, moved, own):
    """A number; 1 where the other delta is as good as the task's own."""
    raise NotImplementedError


_ = exercises.transfer.check(arriving)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# A saving is a difference of two losses. There are two savings here.
#
# </details>


# %% tags=["solution"]
exercises.transfer.solution()

# %% [markdown]
# **2.** The output of a layer for a batch whose rows belong to different users, without a loop over users.


# %% tags=["exercise", "nbval-check-output"]
def layer_for_users(x, W, A, B, s, user):
    """x is (rows, n), W (out, n), A (users, r, n), B (users, out, r); user has a number a row."""
    raise NotImplementedError


_ = exercises.serving.check(layer_for_users)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `A[user]` has one matrix for each row. `torch.einsum` or `torch.bmm` multiplies each with its own row.
#
# </details>


# %% tags=["solution"]
exercises.serving.solution()

# %% [markdown]
# **3.** One damped round of successive approximations for the walk $x_{t+1} = x_t + u_t$ with $\Phi = \frac12 (x_T - \text{goal})^2$: every control maximizes its Hamiltonian less $\frac{\rho}{2} (u - u^{\text{old}})^2$, all along the old path.


# %% tags=["exercise", "nbval-check-output"]
def one_round(x0, u, goal, weight, damping):
    """u is a list of numbers; returns a list as long. weight is lambda, damping is rho."""
    raise NotImplementedError


_ = exercises.control.check(one_round)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# What is maximized is a parabola in $u$. Set its derivative to 0 and solve for $u$.
#
# </details>


# %% tags=["solution"]
exercises.control.solution()

# %% [markdown]
# ## Gallery
#
# **One batch or merged models?** Merge when one user has the model to herself, or when each sends large batches. Serve unmerged when many users send a little each: the frozen product is shared, memory grows by kilobytes a user, and no user waits for a swap.
#
# **AdapterFusion** (Pfeiffer et al., 2020). Train adapters for several tasks apart, then learn attention over their outputs for a new one. It is a third way to combine deltas: neither at once nor in sequence.
#
# **BBTv2** (Sun et al., 2022b). Search for a prompt in every layer, one layer after the other. It is black-box tuning for models whose first layer alone has too little influence.
#
# ## Further reading
#
# Ding et al., *Parameter-efficient fine-tuning of large-scale pre-trained language models*, Nature Machine Intelligence, 2023. Chen et al., *Punica*, 2023, arXiv 2310.18547. Sheng et al., *S-LoRA*, 2023, arXiv 2311.03285. Sun et al., *Black-Box Tuning for Language-Model-as-a-Service*, 2022, arXiv 2201.03514; *BBTv2*, arXiv 2205.11200.
# Hansen, *The CMA Evolution Strategy*, 2016, arXiv 1604.00772. Houlsby et al., 2019, arXiv 1902.00751. Pfeiffer et al., *AdapterFusion*, 2020, arXiv 2005.00247. Aghajanyan et al., *Intrinsic Dimensionality*, 2020, arXiv 2012.13255. Pontryagin et al., *The Mathematical Theory of Optimal Processes*, 1962. Chernousko and Lyubushin, *Method of successive approximations*, 1982.
