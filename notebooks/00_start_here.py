# ---
# jupyter:
#   effnb:
#     minutes: 10
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
# **A language model's weights can be stored in a quarter of the space or less, and you can watch what that
# costs.** In this tour you move one slider, and a real model answers: with its perplexity, with the questions
# it still gets right, with its size, and with the text it writes.
#
# After these ten minutes you can
#
# - say what this machine can do, and which chapters will be comfortable on it;
# - turn a panel's knobs, and read what the panel says;
# - do an exercise, get a diagnosis, and find the hint and the solution;
# - tell a live number from a stored one, and a claim from a verdict;
# - put a model of your own into the same panel.
#
# You need to know what a matrix is and a little Python. Nothing is downloaded, and no GPU is needed.

# %% tags=["run-time"]
from effnb.lab.chapters import run_time

run_time("00_start_here")

# %% [markdown]
# ## The result first
#
# This is what the tour is about. Each curve is one way of rounding the weights of a small language model; each
# point is one number of bits, from 2 to 8. On the right there are many bits, and nothing is lost. To the left the model
# gets worse, and how soon depends on how the rounding is organised.

# %% tags=["hide-input"]
from effnb.lab import PALETTE, figure, results

sweep = results.read("00_start_here/rtn")
table = sweep.data["table"]
original = table[0]
KINDS = {"tensor": "one scale per matrix", "row": "one per row", "64": "one per 64 weights"}


def draw_sweep(fig):
    for axes, key in zip(fig.subplots(1, 2), ("perplexity", "accuracy")):
        for colour, (kind, label) in zip(PALETTE, KINDS.items()):
            rows = [r for r in table if r["group_size"] == kind]
            axes.plot(
                [r["layer_bits"] for r in rows],
                [r[key] for r in rows],
                "o-",
                color=colour,
                label=label,
            )
        axes.axhline(original[key], color="0.45", linestyle="--", label="original")
        axes.set_xlabel("bits stored per weight")
    perplexity_axes, accuracy_axes = fig.axes
    perplexity_axes.set_yscale("log")
    perplexity_axes.set_title("perplexity (lower is better)")
    accuracy_axes.set_title("right answers (higher is better)")
    accuracy_axes.yaxis.set_major_formatter("{x:.0%}")
    perplexity_axes.legend()


def at(kind, bits):
    """One row of the stored table."""
    return next(r for r in table if r["group_size"] == kind and r["bits"] == bits)


figure(
    draw_sweep,
    caption="Fewer bits per weight, for three ways to share a scale: perplexity on a held-out novel, and how often "
    "the model prefers the true continuation of a package's description among four.",
    alt=(
        f"Left, three falling curves of perplexity over bits per weight. At 8 bits all three lie on the original's "
        f"{original['perplexity']:.1f}. At 3 bits: {at('tensor', 3)['perplexity']:.0f} with one scale per matrix, "
        f"{at('row', 3)['perplexity']:.0f} per row, {at('64', 3)['perplexity']:.0f} per 64 weights. "
        f"Right, the part of right answers: {original['accuracy']:.0%} for the original, "
        f"{at('tensor', 2)['accuracy']:.0%} at 2 bits with one scale per matrix."
    ),
)

# %% [markdown]
# The points were computed once and stored, because they take minutes. A stored result always says
# where it comes from. This is how it looks:

# %%
sweep

# %% [markdown]
# Everything else on this page is computed while you read.

# %% [markdown]
# ## What can this machine do?

# %%
from effnb.lab import machine

here = machine()
here

# %% [markdown]
# What it means for you:

# %% tags=["hide-input"]
GIB = 2**30
memory = here.memory_bytes / GIB if here.memory_bytes else None
print(
    f"Cores: {here.cores}. "
    + (
        "Panels will feel quick."
        if here.cores >= 4
        else "Two cores are enough; the times in the map were measured on two."
    )
)
if memory is not None:
    print(
        f"Memory: {memory:.0f} GiB. "
        + (
            "Every chapter fits."
            if memory >= 6
            else "Close other programs before the sections called “On a real model”."
        )
    )
print(
    f"GPU: {here.gpu}. It will be used wherever it helps."
    if here.gpu
    else "GPU: none, and none is needed. The kernels' chapters then run their plain versions."
)
print(
    f"Triton {here.triton}: GPU kernels can run, or be stepped through without a GPU."
    if here.triton
    else "Triton: not installed, which is usual without an NVIDIA GPU. Nothing in the default run needs it."
)

# %% [markdown]
# ## The map
#
# The workbook follows the sections of the survey *Efficient Methods for Natural Language Processing*
# (Treviso et al., 2023, arXiv 2209.00099) and adds what came since. Take the chapters in any order. Each says
# what it needs.

# %% tags=["hide-input", "map"]
from IPython.display import Markdown

from effnb.lab.chapters import chapter_map

Markdown(chapter_map())

# %% [markdown]
# ## The idea, on five numbers
#
# A weight is a real number. Storing it in $b$ bits means choosing one of $2^b$ values for it. The simplest choice
# is an even grid, and the nearest point of it: *round to nearest*.
#
# For a row of weights with smallest value $\min$ and largest value $\max$, the grid has the step
#
# $$s = \frac{\max - \min}{2^b - 1},$$
#
# and each weight $w$ is stored as the whole number $q = \operatorname{round}(w / s) + z$, where $z$ is the code
# that the value 0 gets. Reading back gives $\hat w = s\,(q - z)$.
#
# Five weights, three bits, by hand:

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
# Eight codes, from 0 to 7. The smallest and the largest weight stay what they were. The small ones in between had
# to move: −0.2 became −0.3, because the step is 0.3. **The extremes set the step, and everyone pays
# for it.** That is why it matters who shares a scale: one large weight in a matrix makes the grid coarse for all.

# %% [markdown]
# ## The code
#
# This is the function that does it for a whole matrix, from the package itself. Chapters never show a copy.

# %%
from effnb.inference import quantization
from effnb.lab import show

show(quantization.formats.choose_grid, quantization.quantize)

# %% [markdown]
# And on our five numbers it says the same:

# %% tags=["nbval-check-output"]
stored = quantization.quantize(w.unsqueeze(0), bits=3)
print("codes     ", stored.integers()[0].tolist())
print("read back ", [round(v, 2) for v in stored.dequantize()[0].tolist()])

# %% [markdown]
# ## Turn the knob
#
# The model is `mini-5m`, a Llama-style decoder of five million weights that was trained for this workbook on
# novels, the Bible and descriptions of software packages.
#
# **Predict first.** The original has 32 bits per weight. How few bits can you take before the text it
# writes changes? Before it stops being English? Write down two numbers, then move the slider.

# %%
from effnb.core.modules import linears
from effnb.evaluation import perplexity, ranked_choice, stored_bytes
from effnb.lab import corpora, knob, load, panel

PROMPT = "Anne was"
GROUPS = {"matrix": "tensor", "row": "row", "128 weights": 128, "64 weights": 64, "32 weights": 32}


def bench(loaded):
    """Fixed data for one model: 2,045 tokens of an unseen novel, 40 questions about unseen packages."""
    text = "\n\n".join(corpora.documents("novels", "test")[:3])
    ids = torch.tensor(
        loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)[:2045]
    )
    return ids, corpora.choice_items(40, context_characters=120, choice_characters=40)


def look(model, loaded, data):
    """Quality, size and a few words of one model."""
    ids, questions = data
    prompt = loaded.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).to(
        model.device
    )
    words = model.generate(
        **prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    return {
        "perplexity": perplexity(model, ids).perplexity,
        "choice": ranked_choice(model, loaded.tokenizer, questions),
        "text": loaded.tokenizer.decode(words[0], skip_special_tokens=True).replace("\n", " "),
    }


# %% [markdown]
# `bench` fixes the data, `look` asks one model. A panel needs three more functions: one from the knobs' positions to a
# result, one that draws the result, and one that puts it into words. They are folded here; open the cell if you are
# curious, or if you want to build a panel of your own.


# %% tags=["hide-input"]
def rounding_panel(name, frames=None):
    """Bits and grouping for any causal language model: one of ours, or a folder of yours."""
    loaded = load(name)
    data = bench(loaded)
    with torch.inference_mode():
        before = look(loaded.model, loaded, data) | {"bytes": stored_bytes(loaded.model)}
    layer_name, layer = next(iter(linears(loaded.model).items()))

    def compute(bits, scale):
        packed = quantization.rtn(loaded.model, bits, group_size=GROUPS[scale])
        after = look(quantization.dequantized(packed), loaded, data)
        one = packed.get_submodule(layer_name).quantized
        return after | {"bits": bits, "bytes": stored_bytes(packed), "one": one, "scale": scale}

    def draw(result, fig):
        left, right = fig.subplots(1, 2, width_ratios=[3, 2])
        row, rounded = layer.weight[0].detach(), result["one"].dequantize()[0]
        left.hist(row, bins=60, color="0.75")
        for level in rounded.unique():
            left.axvline(float(level), color=PALETTE[0], linewidth=0.8)
        left.set_title(f"one row of weights on its {result['bits']}-bit grid")
        left.set_xlabel("weight")
        left.set_ylabel("weights")
        size = result["bytes"] / before["bytes"]
        loss = result["perplexity"] / before["perplexity"]
        for y, times, colour in ((1, size, PALETTE[2]), (0, loss, PALETTE[1])):
            right.barh(y, times - 1, left=1, color=colour, height=0.5)
            right.annotate(f"{times:.2f} ×", (max(times, 1) * 1.08, y), va="center")
        right.axvline(1, color="0.3")
        right.set_xscale("log")
        right.set_xlim(0.1, max(10, 4 * loss))
        right.set_ylim(-0.6, 1.6)
        right.xaxis.set_major_formatter("{x:g}")
        right.set_yticks([1, 0], ["size", "perplexity"])
        right.set_title("times the original's")

    def text(result):
        was, now = before["choice"], result["choice"]
        return "\n".join(
            [
                f"Perplexity: {result['perplexity']:.4g}",
                f"Original's: {before['perplexity']:.4g}",
                f"Right answers: {now.accuracy:.0%} ± {now.standard_error:.0%}",
                f"Original's right answers: {was.accuracy:.0%}",
                f"Stored: {result['bytes'] / 2**20:.2f} MiB",
                f"Original's size: {before['bytes'] / 2**20:.2f} MiB",
                f"Bits per weight: {result['one'].bits_per_weight:.2f}",
                f"The original writes: {before['text']} …",
                f"Rounded, it writes: {result['text']} …",
            ]
        )

    return panel(
        compute,
        draw,
        text=text,
        title=f"Round {name} to nearest",
        caption="Left: the grid that the chosen bits put one row of weights on. Right: what the whole model saves and loses.",
        frames=frames,
        bits=knob(2, 8, default=4),
        scale=knob(list(GROUPS), default="row", label="a scale for each"),
    )


# %%
rounding_panel("mini-5m")

# %% [markdown]
# With a scale for each row the numbers hardly move down to four bits. Then they begin to. Now put the second knob on
# *matrix* and go down again: at two bits one coarse grid for everything leaves nothing of the model.
#
# The text is another matter. It can differ while perplexity stays where it was: the model always writes its likeliest
# token, and where two are almost equally likely the smallest change tips the balance, and everything after it. A
# *different* text is not yet a *worse* one. Nor do 40 questions show a small loss: compare the change with the ± beside
# it. That is why every panel of this workbook shows more than one measure, and none of them alone decides.
#
# The panel stores a few positions of its slider in this page, so it moves even on the web page, where nothing
# runs. All other positions and knobs need a running kernel: *Run → Run All Cells*.

# %% [markdown]
# ## An exercise
#
# Exercises come with a stub, a check that tells you what is wrong, a folded hint, and a folded solution.
# Try this one. The *symmetric* grid centres on zero, so it needs no zero point: its step is the largest magnitude
# of the row divided by the largest code, and the codes go from $-(2^{b-1}-1)$ to $2^{b-1}-1$.

# %% tags=["hide-input"]
from effnb.lab import Exercise

cases = [
    (torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.2, -0.7]]), 4),
    (torch.tensor([[-3.0, 1.0], [0.5, 0.25], [4.0, -8.0]]), 3),
]
symmetric_step = Exercise(
    "The symmetric step",
    minutes=3,
    difficulty="easy",
    reference=lambda weight, bits: quantization.formats.choose_grid(weight, bits, symmetric=True)[
        0
    ],
    cases=cases,
    wrong={
        "This is one step for the whole matrix; each row has a largest magnitude of its own": lambda weight, bits: (
            weight.abs().max() / (2 ** (bits - 1) - 1)
        ),
        "This takes the largest magnitude of each column; a row is one output, dimension 1 has to go": lambda weight, bits: (
            weight.abs().amax(0) / (2 ** (bits - 1) - 1)
        ),
        "A negative weight can be the largest in magnitude: take the absolute value first": lambda weight, bits: (
            weight.amax(1) / (2 ** (bits - 1) - 1)
        ),
        "Of the 2^b codes half are negative: the largest code is 2^(b-1) - 1, not 2^b - 1": lambda weight, bits: (
            weight.abs().amax(1) / (2**bits - 1)
        ),
        "The largest code is 2^(b-1) - 1: the code 2^(b-1) does not fit into b bits with a sign": lambda weight, bits: (
            weight.abs().amax(1) / 2 ** (bits - 1)
        ),
    },
    atol=1e-3,  # the package stores its steps in half precision
)
print(symmetric_step)


# %% tags=["exercise", "nbval-check-output"]
def my_step(weight, bits):
    """Step of the symmetric grid of each row; weight has shape (rows, columns)."""
    raise NotImplementedError


_ = symmetric_step.check(my_step)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# With three bits and the row (1, −2, 0) the largest code is 3, and the step 2 / 3. `Tensor.amax` takes
# the dimension that it should remove.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def my_step(weight, bits):
    """The largest magnitude of each row, divided by the largest code."""
    return weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)


_ = symmetric_step.check(my_step)
# %% [markdown]
# ## Claims and verdicts
#
# The papers behind this workbook make claims. Each chapter restates its claims, runs an experiment for each, and prints
# a verdict that is computed from the measurement: it *holds*, *holds in part*, *does not hold at this scale*, or
# *cannot be tested here*. "Does not hold" is as good a result as "holds".
#
# A first example. Claim S-I3 says, among other things, that quantisation cuts memory and computation. Below are
# four bits in groups of 64 on `mini-5m`: bytes and operations are counted; the loss is compared window by window on
# the held-out novel, so that it gets an interval.

# %%
from effnb.evaluation import flops
from effnb.evaluation.quality import token_losses
from effnb.lab import Evidence, claims_table, verdict

model = load("mini-5m")
ids, _ = bench(model)
windows = ids[:2040].view(17, 120)
packed = quantization.rtn(model.model, 4, group_size=64)
rounded = quantization.dequantized(packed)
with torch.inference_mode():
    loss_before = token_losses(model.model, windows).mean(1).tolist()
    loss_after = token_losses(rounded, windows).mean(1).tolist()
operations = flops(lambda: packed(input_ids=windows)) / flops(
    lambda: model.model(input_ids=windows)
)

claims_table(
    verdict(
        "S-I3",
        parts=[
            Evidence.exact(
                "memory: bytes as stored, four bits / original",
                stored_bytes(packed) / stored_bytes(model.model),
                expect="lower",
                bound=0.5,
            ),
            Evidence.paired(
                "quality: loss in nats per token, four bits - original",
                loss_after,
                loss_before,
                expect="equal",
                margin=0.1,
            ),
            Evidence.exact(
                "computation: operations counted, four bits / original",
                operations,
                expect="lower",
                bound=0.95,
            ),
        ],
        note="Rounding to nearest only. Training with quantisation, mixed precision and faster kernels "
        "are for the chapter on quantisation.",
    )
)

# %% [markdown]
# The verdict is computed from the three lines above it. The third line is the lesson: weights that are *stored* in four
# bits and read back before the multiplication save memory and no operations. To save time as well, a kernel has to
# compute on the packed weights, and that is a chapter of its own.

# %% [markdown]
# ## What it costs and saves
#
# The cost card says the same with a clock. Times are medians, measured on this machine just now; on a shared machine,
# look at the ratios only.

# %%
from effnb.evaluation import measure
from effnb.lab import cost_card

prompt = ids[None, :256]
cost_card(
    measure(model.model, prompt, decode_tokens=8, runs=3),
    measure(packed, prompt, decode_tokens=8, runs=3),
    labels=("original", "four bits, packed"),
)

# %% [markdown]
# ## Where it breaks
#
# Bad input gets one sentence, before any work starts:

# %% tags=["nbval-check-output"]
for attempt in (
    lambda: quantization.rtn(model.model, bits=12),
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
# The panel takes any causal language model in the Hugging Face format: give the folder that holds its `config.json`, its
# `model.safetensors` and its tokenizer. Nothing is unpickled and no code from the folder runs. A name from the hub works too
# if you have one: `load("your/model", source="hub")`.
#
# Here it is with a model a quarter of the size. Predict first: will it bear *fewer* bits than `mini-5m`, or
# need more?

# %%
MY_MODEL = "mini-1m"  # or a folder, such as "models/my-model"

rounding_panel(MY_MODEL, frames=[2, 3, 4, 8])

# %% [markdown]
# ## Where next?
#
# If you came for one knob: *bits* are in section 5, *Quantisation*. If you want to know how the numbers on this page are
# made, read `effnb/evaluation/quality.py`; it is short. What the data and the models are, where they
# come from and what is wrong with them stands in `data/DATASHEET.md`.
#
# **Further reading.** Treviso et al., *Efficient Methods for Natural Language Processing: A Survey*, TACL 2023,
# arXiv 2209.00099. Gholami et al., *A Survey of Quantization Methods for Efficient Neural Network Inference*, 2021,
# arXiv 2103.13630. Nagel et al., *A White Paper on Neural Network Quantization*, 2021, arXiv 2106.08295.
