# ---
# jupyter:
#   effnb:
#     minutes: 10
#     live: 00_start_here/capital
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
# # Start here
#
# **A language model can be stored in a fraction of its space, and here you watch what that costs.** Move the
# slider below from 8 bits per weight to 3, and read what the model says is the capital of France.

# %% tags=["run-time", "hide-input"]
try:
    from effnb.lab.chapters import run_time
except ModuleNotFoundError as missing:
    missing._render_traceback_ = lambda: [
        "This page needs the package effnb: get the repository that the page comes from, run "
        "`make lab` in it or `pip install -e .[lab]`, and restart this page's kernel."
    ]
    raise

run_time("00_start_here")

# %% tags=["real-model"]
from effnb.chapters import start_here

start_here.capital_panel()

# %% [markdown]
# The model is SmolLM2 (135 million parameters). Each of its weights was rounded to the nearest of a few values: with 3
# bits there are eight of them. At 3 bits, set the second knob to *32 weights*: every 32 weights then get a grid
# that fits them, and the model knows the capital again. The answers in brief:

# %% tags=["nbval-check-output"]
start_here.answers((8, "row"), (4, "row"), (3, "row"), (3, "32 weights"))

# %% [markdown]
# One warning. This copy of SmolLM2 was quantized before it came here: its weights lie on a 4-bit grid already, in groups
# of 32. Its answers therefore tell you nothing about 4 bits or more, where a second rounding falls on top of the first. Only what
# happens at 3 bits and below is a finding. The rest of this page uses a model that has never been rounded.
#
# A page without a *kernel*, the process that runs a notebook's cells, shows stored answers. With one, the panel rounds the
# model and asks it again each time you move a knob.
#
# ## After these ten minutes you can
#
# - say what this machine can do, and which chapters run comfortably on it;
# - turn a panel's knobs and read what it says;
# - do an exercise, read its diagnosis, and find the hint and the solution;
# - tell a live number from a stored one, and a claim from a verdict;
# - put your own model into a panel.
#
# You need to know what a matrix is, and a little Python. Nothing is downloaded, and no GPU is needed.

# %% [markdown]
# ## What is measured
#
# A language model reads and writes *tokens*: words, parts of words and punctuation marks from a fixed list. Given the tokens so
# far, it computes, for every token in the list, the probability that this token comes next. To write, it appends the
# likeliest one and starts over. What it has learned lies in its *weights*, the numbers in the matrices by which it
# multiplies. Rounding the weights changes the probabilities. How much does that matter?
#
# The workbook answers with two measures. The first needs only a *held-out* text, one that the model was not trained on. At
# each position, we look up the probability that the model gave to the token that does come next. The *loss* is the
# negative logarithm of this probability, averaged over all positions. With the natural logarithm, its unit is the *nat*:
# at 0 nats, every token was predicted with certainty. *Perplexity* is $e$ to the power of the loss.
#
# Suppose the next three tokens had the probabilities 1/2, 1/4 and 1/8:

# %% tags=["nbval-check-output"]
import math

chances = [1 / 2, 1 / 4, 1 / 8]
loss = -sum(math.log(p) for p in chances) / len(chances)
print(f"loss        {loss:.3f} nats per token")
print(f"perplexity  {math.exp(loss):.1f}")

# %% [markdown]
# A perplexity of 4.0 means that the model was as uncertain, on average, as if it had to choose among four equally likely
# tokens each time. Lower is better. A loss that is higher by one hundredth of a nat means a perplexity that is higher by about one
# per cent. Compare perplexities only on the same text, and only between models that use the same list of tokens.
#
# The second measure, the share of *right answers*, comes from *ranked choice*. The model sees the beginning of a software
# package's description and four continuations, one of which is the true one. Its answer is the continuation that the
# beginning makes more likely than it was, by the largest factor. Guessing would be right a quarter of the time.
#
# Perplexity registers changes too small to alter a single answer. Ranked choice shows whether a change
# matters for a task. You need both.

# %% [markdown]
# ## The result first
#
# One question about a capital is an anecdote. The picture below shows both measures for `mini-5m`, a Llama-style model with five
# million parameters, trained for this workbook. Each curve is one way to share a grid among weights; each point is a number
# of bits, from 2 to 8. On the right nothing is lost. Towards the left the model gets worse; how soon depends on
# how many weights share one grid.

# %%
start_here.sweep_figure()

# %% [markdown]
# These points take minutes to compute, so they were computed once and stored. A stored result always says where it comes from:

# %%
from effnb.lab import results

results.read("00_start_here/rtn")

# %% [markdown]
# ## What can this machine do?
#
# *This machine* is the one that runs the page. Where you only read it, it is the one that built the book.

# %%
from effnb.lab import machine

here = machine()
here

# %% [markdown]
# What that means for you:

# %%
start_here.what_it_means(here)

# %% [markdown]
# ## The map
#
# The workbook follows the sections of the survey *Efficient Methods for Natural Language Processing*
# (Treviso et al., 2023, arXiv 2209.00099) and adds later work. Read the chapters in any order: each one
# says what it needs.

# %% tags=["hide-input", "map"]
from IPython.display import Markdown

from effnb.lab.chapters import chapter_map

Markdown(chapter_map())

# %% [markdown]
# ## The idea, on five numbers
#
# To store a weight in $b$ bits, choose one of $2^b$ values for it. The simplest choice is an evenly spaced grid, and
# the nearest point on it: *round to nearest*.
#
# For a row of weights with smallest value $\min$ and largest value $\max$, the grid has the step
# <a id="equation-1"></a>
#
# $$s = \frac{\max - \min}{2^b - 1}, \tag{1}$$
#
# and each weight $w$ is stored as the whole number $q = \operatorname{round}(w / s) + z$, where $z$ is the code
# of the value 0. Reading it back gives $\hat w = s\,(q - z)$. Papers call the step the *scale*, and so do the knobs on this page.
#
# Five weights and three bits, by hand:

# %% tags=["nbval-check-output"]
import torch

w = torch.tensor([-0.9, -0.2, 0.0, 0.3, 1.2])
bits = 3
s = (w.max() - w.min()) / (2**bits - 1)
z = torch.round(-w.min() / s)
q = torch.round(w / s) + z
print("step      ", round(s.item(), 4))
print("codes     ", q.int().tolist())
print("read back ", [round(v, 2) for v in (s * (q - z)).tolist()])

# %% [markdown]
# There are eight codes, from 0 to 7. The smallest and the largest weight keep their values. Those in between may
# move: −0.2 became −0.3, because the step is 0.3 by [equation 1](#equation-1). **The extremes set the step, and every weight that shares the grid
# pays for it.** One large weight makes the grid coarse for all of them. This is why smaller groups brought
# Paris back.

# %% [markdown]
# ## The code
#
# This function does the same for a whole matrix. It is printed from the package; chapters never show a copy.

# %%
from effnb.inference import quantization
from effnb.lab import show

show(quantization.formats.choose_grid, quantization.formats.quantize_on)

# %% [markdown]
# On our five numbers it agrees (`quantize` is `quantize_on` with the properties of the grid as keywords):

# %% tags=["nbval-check-output"]
stored = quantization.quantize(w.unsqueeze(0), bits=3)
print("codes     ", stored.integers()[0].tolist())
print("read back ", [round(v, 2) for v in stored.dequantize()[0].tolist()])

# %% [markdown]
# ## Turn the knob
#
# Here is `mini-5m` in a panel. It was trained on novels, the Bible, descriptions of software packages and
# manuals, and its file stores each weight in 16 bits.
#
# This panel asks for a guess before it answers; you may skip it. Then move the slider. How few bits can you use before the text it writes changes? And before it stops being English?

# %%
start_here.rounding_panel("mini-5m", start_here.ROW_OR_MATRIX, start_here.TWO_BITS)

# %% [markdown]
# With one scale per row, the numbers hardly change down to four bits. Below that they do. Now set the second knob to
# *matrix* and go down again: at two bits, one coarse grid for each matrix leaves nothing of the model.
#
# The text behaves differently. It can change while perplexity does not: the model always writes its likeliest
# token (here a penalty keeps it from repeating itself), and where two tokens are almost equally likely, a tiny change of the weights decides between them and changes everything
# that follows. A *different* text is not always a *worse* one. Nor do a few dozen questions reveal a small loss: compare
# the change with the range in brackets, an *interval*. If the experiment were repeated with other questions again and again, nineteen of twenty such
# intervals would contain the true share. This is why panels show several measures.
#
# Every panel and every table of the workbook measures quality in this way, on the same texts and questions:

# %%
from effnb.lab.bench import Bench

show(Bench.look, Bench.answers)

# %% [markdown]
# ## Does it hold?
#
# The papers behind this workbook make claims. Each chapter restates its claims, runs an experiment for each, and computes
# a verdict from the measurement: it *holds*, *holds in part*, *does not hold at this scale*,
# is *undecided*, or *cannot be tested here*. "Does not hold" is as good a result as "holds".
#
# Here is a first example: round every weight of `mini-5m` to four bits, in groups of 64, and look at three numbers, computed just now.

# %%
bench = Bench("mini-5m", windows=12, questions=0)
packed = quantization.rtn(bench.model, bits=4, group_size=64)
start_here.saved(bench, packed)

# %% [markdown]
# The second line is the lesson. Weights that are *stored* in four bits but read back before the multiplication save memory and
# no operations. To save time as well, the program that multiplies has to compute on the packed weights. Such a program
# is also called a kernel, a *compute kernel*; the chapter *Co-design* is about these.
#
# One setting on one model decides no claim. Claim S-I3 says that quantization cuts memory and computation, that training with it limits the loss of quality,
# and that mixed precision helps. The chapter *Quantization* tests it: what is compared, and with which bounds, was registered before the
# measurement, and the verdict is computed from stored runs. A part that has not been measured on the present models reads "not tested".

# %%
from effnb.chapters.inference.quantization import verdicts
from effnb.lab import claims_table

claims_table(verdicts.s_i3(*verdicts.stored()))

# %% [markdown]
# ## What it costs and saves
#
# The cost card adds the clock. Its times are medians, measured on the machine that ran this page. If other programs are
# running, trust only the ratios.

# %%
from effnb.evaluation import measure
from effnb.lab import cost_card

prompt = bench.windows[:1, :256]
cost_card(
    measure(bench.model, prompt, decode_tokens=8, runs=3),
    measure(packed, prompt, decode_tokens=8, runs=3),
    labels=("original", "four bits, packed"),
)

# %% [markdown]
# *Prefill* reads the prompt, all of its tokens at once; *decode* writes the answer, one token after another. FLOPs are
# floating-point operations, counted rather than timed. If the packed model is slower on your machine, you see the cost of
# reading every weight back before each multiplication.
#
# ## Where it breaks
#
# Bad input gets one sentence, before any work starts:

# %% tags=["nbval-check-output"]
from effnb.lab import load

for attempt in (
    lambda: quantization.rtn(bench.model, bits=12),
    lambda: quantization.rtn(packed, bits=4),
    lambda: load("mini-6m"),
):
    try:
        attempt()
    except ValueError as problem:
        print(problem)

# %% [markdown]
# ## Your own model
#
# The panel takes any causal language model in the Hugging Face format. Give it the folder that holds `config.json`,
# `model.safetensors` and the tokenizer. Nothing is unpickled, and no code from the folder runs. If you can reach the model
# hub, `load("your/model", source="hub")` fetches a model from there.
#
# Here is a model a quarter of the size. What do you expect: will it tolerate *fewer* bits than `mini-5m`, or need
# more?

# %%
MY_MODEL = "mini-1m"  # or a folder, such as "models/my-model"

start_here.rounding_panel(MY_MODEL, frames=[2, 3])

# %% [markdown]
# ## An exercise
#
# Each exercise comes with a stub, a check that says what is wrong, a folded hint and a folded solution.
# Try this one. A *symmetric* grid is centred on zero and needs no zero point. Its step is the largest magnitude
# in the row divided by the largest code, and its codes run from $-(2^{b-1}-1)$ to $2^{b-1}-1$.

# %%
print(start_here.symmetric_step)


# %% tags=["exercise", "nbval-check-output"]
def my_step(weight, bits):
    """Step of the symmetric grid of each row; weight has shape (rows, columns)."""
    raise NotImplementedError


_ = start_here.symmetric_step.check(my_step)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With three bits and the row (1, −2, 0), the largest code is 3 and the step is 2 / 3. `Tensor.amax` takes
# the dimension to reduce over.
#
# </details>


# %% tags=["solution"]
start_here.symmetric_step.solution()

# %% [markdown]
# ## Where next?
#
# If you came to quantize a model, open *Quantization* in section 5. If you want to know how the numbers on this page are
# computed, read `effnb/evaluation/quality.py`; it is short. `data/DATASHEET.md` describes the data and the models: what they are,
# where they come from, and what is wrong with them.
#
# **Further reading.** Treviso et al., *Efficient Methods for Natural Language Processing: A Survey*, TACL 2023,
# arXiv 2209.00099. Gholami et al., *A Survey of Quantization Methods for Efficient Neural Network Inference*, 2021,
# arXiv 2103.13630. Nagel et al., *A White Paper on Neural Network Quantization*, 2021, arXiv 2106.08295.
