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
# # Many tasks
#
# **Write every task as text, and one model can learn them all, or be asked without learning anything. What it answers depends on how often it met the task, and on how it is asked.**
#
# After this chapter you can
#
# - put a task to a language model in words, and read the answer off the words' probabilities;
# - recognize an answer that the order of the examples decided, and calibrate it;
# - mix tasks of unequal size, and say what a cap and a temperature do to the small ones;
# - read T-Few's three losses, and switch each of them on and off;
# - tell a model that learned a new kind of task from one that learned new wordings.
#
# You need the tour (`00_start_here`) and the chapter on delta tuning, which explains frozen weights. Prompting with calibration, mixing, T-Few and instruction training are taught in depth; a gallery near the end introduces relatives.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("04_finetuning/3_multitask")

# %% [markdown]
# ## The picture
#
# A language model continues a text. To ask it a question, write a text whose next word is the answer. Such a text is a **prompt**, and it may begin with a few examples that show what is wanted. Here are two of them, and a third program whose topic the model is to say:

# %% tags=["nbval-check-output"]
from effnb.chapters.finetuning.multitask import methods

topic = methods.QUESTIONS["topic"]
shown = [topic.shot(example) for example in topic.examples("train", 2, 1)]
asked = topic.examples("test", 2, 0)[0]
print(topic.pattern.prompt(methods.short(asked), shown))

# %% [markdown]
# SmolLM2-135M reads four examples, two of each topic, and then answers. No weight is changed. Four examples can be put in 24 different orders, and each column below is one of them. The examples are the same everywhere, and so are the questions:

# %%
from effnb.chapters.finetuning.multitask import drawings, tables

orders = tables.stored("orders").data["table"]
drawings.orders(orders)

# %% tags=["nbval-check-output"]
print(tables.orders_said(orders))

# %% [markdown]
# Wherever two columns differ, nothing but the order has made the difference. **Calibration**, the second set of points, asks the same prompt about *nothing* and takes that answer into account. It needs no label and no training.
#
# **Predict first:** how much does the order decide for another question? The panel takes your guess before it answers. Then move through the orders, and watch what the prompt says of nothing.

# %%
from effnb.chapters.finetuning.multitask import panels

panels.orders(orders)

# %% [markdown]
# ## The idea
#
# ### A pattern and a verbalizer
#
# A **pattern** $P$ puts an input $x$ into a text that ends where the answer begins. A **verbalizer** $v$ says which words stand for each label $y$. The model gives every word $w$ a probability $p_{LM}(w \mid P(x))$, and a label gets the share of its words (Schick and Schütze, 2020):
#
# $$p(y \mid x) = \frac{\sum_{w \in v(y)} p_{LM}(w \mid P(x))}{\sum_{y'} \sum_{w \in v(y')} p_{LM}(w \mid P(x))}.$$
#
# Examples with their answers in front of the input are called **shots**, and learning from them without any training is **in-context learning** (Brown et al., 2020).
#
# A prompt prefers some answers whatever it is asked: labels that most of its shots have (**majority bias**), labels of the last shots (**recency bias**), and words that are frequent anyway. Zhao et al. (2021) ask it about inputs without content, such as "N/A". Let $\hat p$ be the labels' probabilities for a text and $\hat p_{cf}$ the mean of those for no content. **Contextual calibration** answers with the label that has the largest
#
# $$\hat p(y) \,/\, \hat p_{cf}(y).$$
#
# By hand: a text gets the probabilities 0.6 and 0.4, so the first label wins. But nothing at all gets 0.7 and 0.3. The quotients are $0.6 / 0.7 \approx 0.86$ and $0.4 / 0.3 \approx 1.33$. The text speaks *less* for the first label than nothing does, and the second one wins:

# %% tags=["nbval-check-output"]
import torch

from effnb.finetuning.contextual_calibration import calibrate

found = calibrate(torch.tensor([0.6, 0.4]), torch.tensor([0.7, 0.3]))
print([round(p, 3) for p in found.tolist()])

# %% [markdown]
# ### Every task as text
#
# **T5** (Raffel et al., 2020) trains one model on many tasks by the same trick. Every input is text, every answer is text, and every label is a word. Then one loss serves all tasks: the mean of $-\log p$ over the tokens of the answers. What remains to be chosen is the **mixture**, how often the model meets each task.
#
# Let task $m$ have $e_m$ examples. With a **cap** $K$ on what counts, and a **temperature** $T$, its part of the training rows is
# <a id="equation-3"></a>
#
# $$r_m = \frac{\min(e_m, K)^{1/T}}{\sum_j \min(e_j, K)^{1/T}}. \tag{3}$$
#
# At $T = 1$ without a cap, parts follow sizes, and a huge task drowns the small ones. As $T$ grows, all parts become equal. By hand, two tasks with 100 and 4 examples: at $T = 1$ they get 100 and 4 parts of 104. At $T = 2$ the roots count, 10 and 2 of 12:

# %% tags=["nbval-check-output"]
from effnb.finetuning.mixing import mixing_rates

for temperature in (1.0, 2.0, float("inf")):
    rates = mixing_rates({"large": 100, "small": 4}, temperature=temperature)
    print(f"T = {temperature}: {rates['large']:.3f} and {rates['small']:.3f}")

# %% [markdown]
# Equal parts have a price. To fill as much of the training as a large task does, a small one must repeat its examples, and a model that reads the same few texts again and again learns them by heart. How often does a short run meet each example?

# %% tags=["nbval-check-output"]
tables.repeats_table()

# %% [markdown]
# ### T-Few: a few examples, three losses
#
# **T-Few** (Liu et al., 2022) learns from a few examples with answers to choose from, and trains nothing but **(IA)³**: vectors that scale the keys, the values and the inner channels of each block, and start at 1. Let $y$ be the right answer with $T_y$ tokens. Three losses are added:
# <a id="equation-4"></a>
#
# $$L_{LM} = -\frac{1}{T_y} \sum_t \log p(y_t), \qquad L_{UL} = -\frac{\sum \log\bigl(1 - p(\hat y_t)\bigr)}{\text{number of wrong tokens}}, \qquad L_{LN} = -\log \frac{e^{\beta(y)}}{e^{\beta(y)} + \sum_k e^{\beta(\hat y^{(k)})}}. \tag{4}$$
#
# The first makes the right answer likely. The second, **unlikelihood**, runs over the tokens $\hat y_t$ of all wrong answers and makes them unlikely. The third compares: $\beta$ is the mean log-probability of an answer's tokens, and the right one should have the largest. Answers are chosen by $\beta$ afterwards, so this loss trains what is used.
#
# By hand: the right answer's two tokens have the log-probabilities −0.1 and −0.2. One wrong answer has −1, −2 and −0.5, another a single −3. So $\beta$ is −0.15, −1.167 and −3:

# %% tags=["nbval-check-output"]
from effnb.finetuning import t_few

one = t_few.Choices.of([[1]], [[[2, 3], [4, 5, 6], [7]]], [0])
logs = torch.tensor([[0, -0.1, -0.2, 0], [0, -1, -2, -0.5], [0, -3, 0, 0]])
print("beta:", [round(b, 3) for b in t_few.scores(logs, one).tolist()])
for loss in (t_few.lm_loss, t_few.unlikelihood_loss, t_few.length_normalized_loss):
    print(f"{loss.__name__:24} {loss(logs, one):.4f}")

# %% [markdown]
# ### Instructions, and what is held out
#
# **T0** (Sanh et al., 2021) and **FLAN** (Wei et al., 2021) train on many tasks, each written in several **templates** (wordings), and then ask for tasks that were never trained. The test must be strict. Holding out *examples* tests whether a task was learned. Holding out a *template* tests whether another wording is understood. Only holding out a whole **cluster**, all tasks of one kind, tests whether the model follows instructions. Documents that appear in a held-out task have to go from training as well:

# %% tags=["nbval-check-output"]
from effnb.finetuning.instructions import hold_out

three = [methods.instruction_task(name, "train", 128) for name in ("section", "language", "match")]
split = hold_out(three, "pair")
print("trained: ", ", ".join(task.name for task in split.train))
print("held out:", ", ".join(task.name for task in split.held_out))
print("examples dropped because their document is in a held-out task:", split.left_out)
for wording in three[0].templates:
    print("-", wording.replace("\n", " / "))

# %% [markdown]
# ## The code
#
# The label's share, with all tokens of each word:

# %%
from effnb.finetuning import contextual_calibration, instructions, mixing, prompting
from effnb.lab import show

show(prompting.label_probabilities, contextual_calibration.content_free)

# %%
show(mixing.mixing_rates, instructions.hold_out)

# %% [markdown]
# T-Few's losses are three functions of one table of log-probabilities. Switching one off means leaving its name out of `losses`:

# %%
show(t_few.unlikelihood_loss, t_few.t_few_loss)

# %% [markdown]
# ## Turn the knob
#
# **The mixture.** Six tasks come from the corpora of this book: the topic of a description (*section*), its language, the book a passage is from (*work*), whether two texts belong together (*match*), whether two packages have one *origin*, and writing a *summary*. They are cut to unequal sizes, so that there is something to mix. The panel only counts, and answers at once.

# %%
panels.mixture()

# %% [markdown]
# **A few examples.** When you run this page, a model is now trained while you wait. `mini-1m` is a decoder of about a million parameters, trained for this book; its weights stay frozen, and (IA)³ learns from a few examples of each topic. Switch the losses on one after the other, pin the first, and compare the *distance* between right and wrong answers.

# %%
panels.few()

# %% [markdown]
# **Instructions.** Here all of `mini-1m` is trained, on one to three tasks in one wording or in two. The topic is then asked in three wordings, of which the third was never trained, and *match* is a task of another kind. The grey bars are the untrained model's.

# %%
panels.instructions()

# %% [markdown]
# Things to try when you run this page:
#
# - train the topic in one wording, then in two: what changes for the third?
# - add tasks. Does the score on the topic fall, now that the same number of steps has to serve more tasks?
# - *match* has two answers, so guessing gets half. Is any bar far enough from that to believe it, with so few texts?

# %% [markdown]
# ## Does it hold?
#
# Two claims belong to this chapter: training on many tasks serves them all with one model and adds skill on tasks that were not trained; and prompting adapts a model without changing it. Their parts and bounds were registered before the measurements. A part that was not measured reads "not tested".

# %%
from effnb.chapters.finetuning.multitask import verdicts
from effnb.lab import claims_table

judged = verdicts.stored()
one_for_all, prompted = verdicts.s_f1(*judged), verdicts.s_f2(*judged)
claims_table(one_for_all, prompted)

# %% [markdown]
# **One model for five tasks.** All are met equally often. The last row has five separate models, which together took as many steps as the one:

# %% tags=["nbval-check-output"]
tables.tasks_table(tables.judged("tasks").data["table"])

# %% [markdown]
# **New wordings, new tasks.** Classification and writing were trained in two wordings each; the pair tasks, and the third wording of everything, were held out:

# %%
instructed = tables.judged("instructions").data["table"]
drawings.instructions(instructed)

# %% tags=["nbval-check-output"]
print(tables.instructions_said(instructed, one_for_all))
tables.instructions_table(instructed)

# %% [markdown]
# A gain on a new wording is not yet an understanding of instructions: the model has met this very task, with the same answers, many times. The note under the verdict says how much larger the models of T0 and FLAN are.
#
# **One wording or two?**

# %% tags=["nbval-check-output"]
tables.wordings_table(tables.stored("instructions").data["table"])

# %% [markdown]
# **T-Few's losses**, those of [equation 4](#equation-4), with more steps than in the panel and over several seeds:

# %% tags=["nbval-check-output"]
few = tables.stored("few").data["table"]
print(tables.few_said(few))
tables.few_table(few)

# %% [markdown]
# **Mixtures**, on tasks of unequal size. Read the columns from the left, the largest task, to the right, the smallest:

# %% tags=["nbval-check-output"]
mixed = tables.stored("mixing").data["table"]
print(tables.mixing_said(mixed))
tables.mixing_table(mixed)

# %% [markdown]
# ## What it costs and saves
#
# **To store.** Five tasks can have five models, one model, or one model with five deltas. Counted on `mini-1m`, in 16-bit numbers:

# %% tags=["nbval-check-output"]
from effnb.core.deltas import delta_state_dict
from effnb.finetuning import ia3
from effnb.lab import load

small = load("mini-1m", device="cpu").model
whole = 2 * sum(p.numel() for p in small.parameters())
vectors = 2 * sum(t.numel() for t in delta_state_dict(ia3.attach(small), "default").values())
ways = {"five models": 5 * whole, "one for all": whole, "one, five (IA)³": whole + 5 * vectors}
for name, size in ways.items():
    print(f"{name:16} {size / 2**10:8,.0f} KiB")

# %% [markdown]
# **To answer.** Shots need no training, and are paid for with every question: the model reads them each time, unless the keys and values of what all questions share are kept. (IA)³ takes their place by vectors, which are trained once:

# %% tags=["nbval-check-output"]
tables.cost_table(tables.stored("orders").data["costs"])

# %% [markdown]
# The function `label_probabilities` reads what its prompts share only once. That is why 24 orders of four examples were affordable here.

# %% [markdown]
# ## On a real model
#
# All prompts of this chapter are SmolLM2-135M's. Its linear weights lie on a 4-bit grid, as its file has them; every way of asking meets the same weights, and none of the comparisons is about bits. Both questions, before calibration and after:

# %% tags=["nbval-check-output"]
tables.orders_table(orders)

# %% [markdown]
# The last column helps to explain a bad order. A prompt that gives nearly all texts the same label is right on half of them, whatever the model knows. Where does the preference come from? First the **last shot**, over all orders:

# %% tags=["nbval-check-output"]
print(tables.recency_said(orders))

# %% [markdown]
# Then the **majority** of the shots:

# %% tags=["nbval-check-output"]
tables.majority_table(tables.stored("majority").data["table"])

# %% [markdown]
# **How many shots?** The dots are different draws of the examples:

# %%
shots = tables.stored("shots").data["table"]
drawings.shots(shots)

# %% tags=["nbval-check-output"]
print(tables.shots_said(shots))

# %% [markdown]
# The verdict on prompting rests on other texts, asked in four ways. Where a question comes out at half, the prompt has given one label to nearly all of its texts:

# %% tags=["nbval-check-output"]
tables.smollm2_table(tables.judged("smollm2").data["table"])

# %% [markdown]
# Two orders live, all shots of one label first:

# %% tags=["real-model"]
from effnb.lab import results

if results.live():
    print(methods.smollm2_here())
else:
    print(tables.stored("orders"))

# %% [markdown]
# ## Where it breaks
#
# **Comparing first tokens.** A word can be several tokens, and words of one language often begin alike. A verbalizer that looks at first tokens only confuses them. `word_log_probs` multiplies the probabilities of all tokens:

# %% tags=["nbval-check-output"]
tokenizer = load("mini-1m", device="cpu").tokenizer
for word in ("French", "Portuguese", "Polish"):
    tokens = tokenizer.encode(f" {word}", add_special_tokens=False)
    print(f"{word:11}", [tokenizer.decode([token]) for token in tokens])

# %% [markdown]
# **Calibrating with another prompt.** What a prompt says of nothing belongs to *that* prompt: these shots in this order. Measured with other shots, or without any, it corrects a preference that is not there.
#
# **Calibration can hurt.** It assumes that a prompt should be undecided about nothing. Where labels are not equally frequent, or "N/A" is not without content, this is wrong. The sentence under the first picture counts the orders that it made worse.
#
# **A learning rate from elsewhere.** (IA)³ has so few numbers that each of them has to move far, and a rate that suits full tuning hardly moves them. These were tried on validation texts; the mixtures above use the best:

# %% tags=["nbval-check-output"]
tables.rates_table(tables.stored("rates").data["table"])

# %% [markdown]
# **Mean over tasks or over tokens?** The loss of a mixture is a mean over all tokens of a batch. A task with long answers, such as *summary*, then weighs more than its part of the rows in [equation 3](#equation-3). Averaging task by task would be another mixture.
#
# **What cannot work** is refused with one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: prompting.Pattern("Program: {input}\nTopic: "),
    lambda: prompting.Pattern("Program:"),
    lambda: prompting.Verbalizer.of(["games", "games"]),
    lambda: list(prompting.orders(range(9))),
    lambda: calibrate(torch.tensor([0.6, 0.4]), torch.tensor([1.0, 0.0])),
    lambda: mixing_rates({"large": 100, "small": 0}),
    lambda: mixing_rates({"large": 100}, temperature=0.5),
    lambda: t_few.t_few_loss(small, one, losses=[]),
    lambda: hold_out(three, "translation"),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %%
from effnb.chapters.finetuning.multitask import exercises

for exercise in (exercises.mixing, exercises.ranking, exercises.calibration):
    print(exercise)

# %% [markdown]
# **1.** The parts of tasks with these numbers of examples, with a cap $K$ and a temperature $T$.


# %% tags=["exercise", "nbval-check-output"]
def rates(sizes, cap, temperature):
    """A list of parts, in the order of the sizes."""
    raise NotImplementedError


_ = exercises.mixing.check(rates)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Two tasks of 900 and 25 examples with $K = 400$ and $T = 2$ get 20 and 5 parts of 25.
#
# </details>


# %% tags=["solution"]
exercises.mixing.solution()

# %% [markdown]
# **2.** T-Few's third loss for one example, from the $\beta$ of each of its answers and the index of the right one.


# %% tags=["exercise", "nbval-check-output"]
def length_normalized(beta, right):
    """beta is (answers,), right a whole number; a tensor without dimensions."""
    raise NotImplementedError


_ = exercises.ranking.check(length_normalized)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The fraction is a softmax. Which function of torch gives its logarithm, or the logarithm of the sum below the line?
#
# </details>


# %% tags=["solution"]
exercises.ranking.solution()

# %% [markdown]
# **3.** Calibrated answers. You get the labels' probabilities for each text, and the probabilities of the labels' words for several inputs without content, *before* they were divided by their sum.


# %% tags=["exercise", "nbval-check-output"]
def calibrated(p, nothing):
    """p is (texts, labels), nothing is (inputs, labels); a list with one label for each text."""
    raise NotImplementedError


_ = exercises.calibration.check(calibrated)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# One of the inputs may make all words ten times as likely as another does. Should it count ten times?
#
# </details>


# %% tags=["solution"]
exercises.calibration.solution()

# %% [markdown]
# ## Gallery
#
# **Subtracting** in place of dividing (Zhao et al., 2021): $\operatorname{softmax}(\hat p - \hat p_{cf})$, here `calibrate(…, form="subtract")`. Try it where a label's probability for nothing is so small that dividing by it is risky.
#
# **Options in the prompt** (Wei et al., 2021). FLAN appends the answers to choose from, "OPTIONS: games, science", so that the model need not guess which words are wanted: `instruction_batches(…, options=True)`.
#
# **PET** (Schick and Schütze, 2020). Train a model on a few examples in several patterns, let them label unlabeled texts together, and train a classifier on those labels. Use it when there is much unlabeled text.
#
# **T-Few with another delta.** The three losses do not know what they train: `t_few_loss` works with a LoRA or a prefix as well. (IA)³ is the choice of the authors because rows of one batch can have different vectors.
#
# **Which one?** Without labels, prompt, and try several orders, calibrated and not, before you believe a number. With a few dozen labeled texts, train a delta with all answers in the loss. With many tasks, mix them with a cap, and keep one model. The published gains on *new* tasks are those of models thousands of times larger than `mini-1m`.
#
# ## Further reading
#
# Raffel et al., *Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer*, 2020, arXiv 1910.10683. Liu et al., *Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning*, 2022, arXiv 2205.05638. Sanh et al., *Multitask Prompted Training Enables Zero-Shot Task Generalization*, 2021, arXiv 2110.08207.
# Wei et al., *Finetuned Language Models Are Zero-Shot Learners*, 2021, arXiv 2109.01652. Schick and Schütze, *Exploiting Cloze Questions*, 2020, arXiv 2001.07676. Brown et al., *Language Models are Few-Shot Learners*, 2020, arXiv 2005.14165. Zhao et al., *Calibrate Before Use*, 2021, arXiv 2102.09690.
