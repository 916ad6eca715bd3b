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
# # Low rank
#
# **A matrix is a sum of simple parts. Without its smallest parts it is two thin matrices, smaller and faster; which parts are
# small depends on what the matrix is multiplied with.**
#
# After this chapter you can
#
# - say what a rank costs, and below which rank it saves anything;
# - truncate a matrix with a pencil, and know the error before you measure it;
# - explain SVD, ASVD and SVD-LLM by the one thing they differ in, and read their code;
# - divide a budget of parameters among layers;
# - combine low rank, pruning and rounding in the right order, and tell whether it pays.
#
# You need the tour (`00_start_here`) and matrices. The singular value decomposition is explained as it comes.

# %% tags=["run-time"]
from effnb.lab.chapters import run_time

run_time("05_inference/2_low_rank")

# %% [markdown]
# ## The result first
#
# `mini-5m`, and what it loses on a novel that it has never seen. In every linear layer of its blocks, a matrix has been replaced by
# two thinner ones. From right to left they hold fewer and fewer numbers. The methods differ in what they know: plain SVD the weights alone, FWSVD
# also gradients, ASVD how large each input is, SVD-LLM how the inputs move together.

# %% tags=["hide-input"]
import math

import torch

from effnb.lab import PALETTE, figure, results

stored = results.read("05_inference/2_low_rank/methods")
rows = stored.data["table"]
original = rows[0]
COLOURS = {"SVD": PALETTE[1], "FWSVD": PALETTE[3], "ASVD": PALETTE[2], "SVD-LLM": PALETTE[0]}


def pick(method, kept):
    """The stored rows of one setting, one for each calibration seed."""
    return [r for r in rows if (r["method"], r["kept"]) == (method, kept)]


def mean(found, key="loss"):
    return sum(r[key] for r in found) / len(found)


KEPT = sorted({r["kept"] for r in rows if r["method"] == "SVD"})


def rise(method, kept):
    """What a setting costs, in nats per token."""
    return mean(pick(method, kept)) - original["loss"]


def draw_result(fig):
    axes = fig.subplots()
    for method, colour in COLOURS.items():
        x = [100 * mean(pick(method, k), "numbers") for k in KEPT]
        axes.plot(x, [rise(method, k) for k in KEPT], "o-", color=colour, label=method)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("numbers kept in the layers, per cent")
    axes.set_ylabel("rise of the loss, nats per token")
    axes.legend()


figure(
    draw_result,
    caption="What it costs to keep only a part of the layers' numbers: the rise of the loss on a held-out novel. Each line of the grid is ten times the one below.",
    alt=(
        "Four curves that rise to the left. At 80 per cent the loss rises by "
        + ", ".join(f"{rise(m, 0.8):.4f} ({m})" for m in COLOURS)
        + "; at 40 per cent by "
        + ", ".join(f"{rise(m, 0.4):.3f}" for m in COLOURS)
        + "; at 20 per cent by "
        + ", ".join(f"{rise(m, 0.2):.2f}" for m in COLOURS)
        + "."
    ),
)

# %%
stored

# %% [markdown]
# ## A matrix as a sum
#
# Every matrix $W$ with $m$ rows and $n$ columns is a sum of products of a column and a row, each with a weight of its own:
#
# $$W = \sum_i \sigma_i\, u_i v_i^\top, \qquad \sigma_1 \ge \sigma_2 \ge \dots \ge 0.$$
#
# The columns $u_i$ have length 1 and are at right angles to each other, and so are the rows $v_i^\top$. This is the **singular value decomposition** (SVD),
# and the $\sigma_i$ are the singular values. Keep the first $r$ terms, and you have the best approximation of **rank** $r$ that exists. What it
# misses is known before it is measured (Eckart and Young, 1936):
#
# $$\lVert W - W_r \rVert_F^2 = \sum_{i > r} \sigma_i^2.$$
#
# Two by two is enough to see it. Of $W = \bigl(\begin{smallmatrix} 3 & 0 \\ 4 & 5 \end{smallmatrix}\bigr)$ we keep one term:

# %% tags=["nbval-check-output"]
from effnb.inference import low_rank

W = torch.tensor([[3.0, 0.0], [4.0, 5.0]])
one = low_rank.truncated_svd(W, rank=1)
best = one.product().float()
print("squared singular values:", one.singular_values.square().round().int().tolist())
print("the best rank 1        :", best.tolist())
print("what it misses         :", (W - best).tolist())
print(f"squared                : {(W - best).square().sum():.2f}")

# %% [markdown]
# The two rows of the approximation are multiples of each other: that is what rank 1 means. The squared error is 5, the square of the
# singular value left out.
#
# ## From where on does it save?
#
# $W_r$ is stored as two thin matrices, $U$ with $r$ columns and $V$ with $r$ rows, and the layer $y = W x$ becomes $y = U (V x)$. That is
# $r (m + n)$ numbers, and as many multiplications, in place of $m n$. Fewer only below the **break-even rank**
#
# $$r^\star = \frac{m n}{m + n}.$$

# %% tags=["nbval-check-output"]
print("layer          shape   full rank  break-even   numbers at half the full rank")
for name, m, n in (
    ("q_proj", 256, 256),
    ("k_proj", 128, 256),
    ("up_proj", 688, 256),
    ("down_proj", 256, 688),
):
    half = min(m, n) // 2
    share = half * (m + n) / (m * n)
    limit = low_rank.break_even_rank(m, n)
    print(f"{name:10} {m:4} × {n:3}  {min(m, n):9}  {limit:10.1f}   {share:.0%}")

# %% [markdown]
# Half the rank is *not* half the numbers. For a square matrix it saves nothing at all. So this chapter never speaks of the part of the rank, but of
# the part of the numbers that is **kept**. The methods turn it into a rank for each layer, and leave a layer dense where its factors would not be smaller.
#
# The layer itself is short, because the two factors are ordinary linear layers:

# %%
from effnb.lab import show

show(low_rank.LowRankLinear.forward, low_rank.rank_for)

# %% [markdown]
# ## Are the small parts small?
#
# Truncation is worth something if the singular values fall quickly. Here they are for one block of `mini-5m`, each matrix by its largest.
# The grey line is a matrix of random numbers.

# %% tags=["hide-input"]
import random
from functools import cache

from effnb.core.calibration import layerwise
from effnb.lab import corpora, load

bench = load("mini-5m")
model = bench.model


def sequences(name, split, count, length, seed=0):
    """Random pieces of one corpus, as token ids."""
    rng, pieces = random.Random(seed), []
    texts = [t for t in corpora.documents(name, split) if len(t) > 300]
    while len(pieces) < count:
        text = ""
        while len(text) < 8 * length:  # characters enough for the tokens
            one = rng.choice(texts)
            start = rng.randrange(max(1, len(one) - 8 * length))
            text += one[start : start + 8 * length] + "\n\n"
        ids = bench.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) >= length:
            pieces.append(torch.tensor(ids[:length]))
    return torch.stack(pieces).to(model.device)


calibration = torch.cat([sequences(name, "train", 8, 256) for name in corpora.NAMES])


@cache
def decomposition(method):
    """The full decomposition of every layer by one method: made once, truncated at will."""
    if method == "SVD":
        return low_rank.decompose(model)
    if method == "FWSVD":
        return low_rank.decompose_fwsvd(model, calibration)
    make = {"ASVD": low_rank.decompose_asvd, "SVD-LLM": low_rank.decompose_svd_llm}
    return make[method](model, calibration)


KINDS = ("q_proj", "o_proj", "up_proj", "down_proj")


def spectrum(method, kind):
    """Singular values of one matrix of the fourth block, the largest as 1."""
    block = "mlp" if kind in ("up_proj", "down_proj") else "self_attn"
    sigma = decomposition(method)[f"model.layers.3.{block}.{kind}"].singular_values.cpu()
    return sigma / sigma[0]


def draw_spectra(fig):
    panes = fig.subplots(1, 2, sharey=True)
    noise = torch.linalg.svdvals(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)))
    for axes, method, title in zip(panes, ("SVD", "SVD-LLM"), ("of W", "of W L: the outputs")):
        for colour, kind in zip(PALETTE, KINDS):
            values = spectrum(method, kind)
            x = torch.linspace(0, 100, len(values))
            axes.plot(x, values, color=colour, linewidth=1.6, label=kind)
        axes.plot(torch.linspace(0, 100, 256), noise / noise[0], color="0.6", label="random")
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 1.2)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("position, per cent of the full rank")
        axes.set_title(title)
    panes[0].set_ylabel("singular value / largest")
    panes[0].legend(fontsize=8)


def small_part(method, kind):
    """The part of the squares that lies in the smaller half of the singular values."""
    squares = spectrum(method, kind).square()
    return (squares[len(squares) // 2 :].sum() / squares.sum()).item()


figure(
    draw_spectra,
    caption="Singular values in the fourth block. Left: of the weights. Right: of the same weights times the root of their inputs' second moments, which a section below explains.",
    alt="Left, all curves lie below that of random numbers; the query and output matrices' fall fastest, the MLP's slowest. "
    "The smaller half of the singular values holds, left and right: "
    + ", ".join(
        f"{kind} {small_part('SVD', kind):.0%} and {small_part('SVD-LLM', kind):.1%}"
        for kind in KINDS
    )
    + ".",
)

# %% [markdown]
# Trained weights are no noise. Their singular values fall faster (left), and the smaller half of the terms holds little of all squares, most of it in `down_proj`:

# %% tags=["nbval-check-output"]
print("what the smaller half of the terms holds, of all squares")
print("              of W    of W L")
for kind in KINDS:
    left, right = small_part("SVD", kind), small_part("SVD-LLM", kind)
    print(f"{kind:10} {left:7.0%}   {right:7.0%}")

# %% [markdown]
# The right column asks for something else, and is why this chapter does not end here: what the layer *computes* on real text. There is less in that than
# its weights suggest.
#
# ## The weights, or what they compute?
#
# A change $\Delta$ of the weight does no harm in directions that the inputs never take. With the inputs of all tokens as the columns of $X$, and $G = X X^\top$,
# what the next layer sees of it is
#
# $$\lVert \Delta X \rVert_F^2 = \operatorname{tr}(\Delta\, G\, \Delta^\top).$$
#
# All three methods truncate $W S$ and undo $S$ afterwards. They differ in $S$ only:
#
# - **SVD**: $S = I$. All directions count alike.
# - **ASVD** (Yuan et al., 2023): $S$ is diagonal, with the mean size of each input to the power $\alpha = 0.5$. Columns that meet large inputs count for more.
# - **SVD-LLM** (Wang et al., ICLR 2025): $S = L$, the lower triangular root of $G = L L^\top$. Then $\lVert \Delta L \rVert_F$ *is* the error of the output, and the truncation of $W L$ the best that any matrix of rank $r$ can do:
#
# $$\hat W = U_r \Sigma_r V_r^\top L^{-1}, \qquad \lVert (W - \hat W) X \rVert_F^2 = \sum_{i > r} \sigma_i^2(W L).$$
#
# The matrix from above, with two kinds of inputs. In the first, the second input is four times as large as the first. In the second they
# are equally large, but one rises when the other falls.

# %% tags=["nbval-check-output"]
inputs = {
    "one larger": torch.tensor([[1.0, 0.0], [0.0, 16.0]]),
    "opposed": torch.tensor([[1.0, -0.9], [-0.9, 1.0]]),
}
TRUNCATED = {
    "SVD": lambda G: low_rank.truncated_svd(W, 1),
    "ASVD": lambda G: low_rank.asvd_weight(W, G.diagonal().sqrt(), 1),  # the inputs' sizes
    "SVD-LLM": lambda G: low_rank.svd_llm_weight(W, G, 1),
}
print("squared error of the output at rank 1    one larger   opposed")
for method, truncated in TRUNCATED.items():
    deltas = [(W - truncated(G).product().float(), G) for G in inputs.values()]
    errors = [torch.trace(delta @ G @ delta.T).item() for delta, G in deltas]
    print(f"{method:39} {errors[0]:11.1f}  {errors[1]:8.1f}")

# %% [markdown]
# ASVD sees that an input is large, and gets most of the way. It cannot see that two inputs oppose each other: their sizes are equal, and it does what plain SVD does.
# You can check the last row by hand: of $W G W^\top$ with the opposed inputs, the eigenvalues are $9.5$ and $4.5$. The best rank 1 keeps the larger.
#
# One function serves all three:

# %%
show(low_rank.scaled_svd)

# %% [markdown]
# ### Predicted equals measured
#
# SVD-LLM claims to know the damage before anything is run. Three layers, three parts kept. On the left the formula's error; on the right the layer is run on
# the calibration text, with and without its factors:

# %% tags=["nbval-check-output"]
SHORT = {
    "model.layers.0.self_attn.q_proj": "first q_proj",
    "model.layers.3.mlp.up_proj": "fourth up_proj",
    "model.layers.5.mlp.down_proj": "last down_proj",
}


class Inputs:
    """All inputs of a layer, one column for each token."""

    def __init__(self):
        self.parts = []

    def update(self, x):
        self.parts.append(x.T.double().cpu())

    @property
    def value(self):
        return torch.cat(self.parts, 1)


kept_inputs = {}


def observe(name, layer):
    return kept_inputs.setdefault(name, Inputs())


layerwise(model, calibration, observe, lambda *_: None, include=list(SHORT), exclude=())
print("layer            kept   predicted   measured, of the output's norm")
for name, label in SHORT.items():
    layer, X = model.get_submodule(name).weight.detach().double().cpu(), kept_inputs[name].value
    whole = (layer @ X).norm()
    for kept in (0.8, 0.6, 0.4):
        factors = low_rank.svd_llm_weight(layer, X @ X.T, low_rank.rank_for(kept, *layer.shape))
        measured = ((layer - factors.product()) @ X).norm()
        print(f"{label:15} {kept:5.0%}   {factors.error / whole:9.2%}   {measured / whole:8.2%}")

# %% [markdown]
# They agree to every digit shown. What follows for the method: layers can be compared, and ranks chosen, without running the model once more.
#
# For all layers at 60 % kept, the error of the output relative to plain SVD's:

# %% tags=["hide-input"]
grams = {}
layerwise(
    model,
    calibration,
    lambda name, layer: grams.setdefault(name, low_rank.Gram(layer.in_features)),
    lambda *_: None,
)


def output_error(name, method, kept):
    layer = model.get_submodule(name).weight.detach().double().cpu()
    factors = decomposition(method)[name].truncated(low_rank.rank_for(kept, *layer.shape))
    delta = layer - factors.product().double().cpu()
    return (delta @ grams[name].value * delta).sum().clamp(min=0).sqrt().item()


ratios = {
    method: [output_error(n, method, 0.6) / output_error(n, "SVD", 0.6) for n in grams]
    for method in ("ASVD", "SVD-LLM")
}


def draw_ratios(fig):
    axes = fig.subplots()
    for method, found in ratios.items():
        axes.plot(range(len(found)), found, "o", color=COLOURS[method], label=method)
    axes.axhline(1, color="0.45", linestyle="--")
    axes.set_ylim(0, None)
    axes.set_xlabel("layers, from first to last block")
    axes.set_ylabel("output error / plain SVD's")
    axes.legend()


figure(
    draw_ratios,
    caption="60 % kept, on the calibration text. Below the dashed line a method keeps the layer's output better than plain SVD.",
    alt=(
        f"ASVD lies at {sum(ratios['ASVD']) / len(grams):.2f} of plain SVD's error on average, SVD-LLM at "
        f"{sum(ratios['SVD-LLM']) / len(grams):.2f}, and below 1 in {sum(x < 1 for x in ratios['SVD-LLM'])} of {len(grams)} layers."
    ),
)

# %% tags=["nbval-check-output"]
for method, found in ratios.items():
    print(
        f"{method:8} keeps the output better in {sum(x < 1 for x in found)} of {len(found)} layers"
    )

# %% [markdown]
# And the whole model, on text that no method has seen. Means over five draws of the calibration text (plain SVD needs none); right answers are those of 150
# questions about unseen packages, where guessing would reach a quarter:

# %% tags=["nbval-check-output"]
print(f"original  perplexity {math.exp(original['loss']):.1f}, {original['accuracy']:.0%} right")
print("           80 % kept        60 % kept        40 % kept")
for method in COLOURS:
    line = []
    for kept in (0.8, 0.6, 0.4):
        found = pick(method, kept)
        line.append(f"{math.exp(mean(found)):6.1f} {mean(found, 'accuracy'):5.0%} right")
    print(f"{method:8}", *line)

# %% [markdown]
# ## Turn the knob
#
# **Predict first.** The layers of attention and those of the MLP hold different amounts of the model. If only one of the two kinds may be cut to 40 %, which will
# hurt more? And what will the model still write at 20 % kept everywhere?
#
# *TensorGPT* ignores the choice of layers: it factorises the embedding (the gallery says how). *LoSparse* is used here without its training.

# %% tags=["hide-input"]
from effnb.evaluation import perplexity, ranked_choice, stored_bytes
from effnb.lab import knob, panel

LAYERS = {
    "all": "*",
    "attention": "*.self_attn.*",
    "MLP": "*.mlp.*",
    "queries and keys": ["*.q_proj", "*.k_proj"],
    "first block": "model.layers.0.*",
    "last block": "model.layers.5.*",
}
sample = torch.tensor(
    bench.tokenizer.encode(
        "\n\n".join(corpora.documents("novels", "test")[:3]),
        add_special_tokens=False,
        verbose=False,
    )[:2045]
)
questions = corpora.choice_items(40, context_characters=120, choice_characters=40)
PROMPT = "Anne was"


def train_rank(kept):
    """The largest rank of a token's train within the part kept, at least 1."""
    fold = low_rank.balanced_shape(256)
    fitting = [r for r in range(1, 9) if low_rank.train_size(fold, r) <= kept * 256]
    return max(fitting, default=1)


def compressed(method, kept, layers):
    if method == "TensorGPT":
        return low_rank.tensor_train(model, train_rank(kept))
    if method == "LoSparse":
        return low_rank.low_rank_plus_sparse(model, kept, include=LAYERS[layers])
    chosen = low_rank.factors.choose_layers(model, LAYERS[layers])
    found = {name: decomposition(method)[name] for name in chosen}
    return low_rank.truncate(model, found, kept)


def look(m):
    """Quality and a few words of one model."""
    prompt = bench.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).to(m.device)
    words = m.generate(
        **prompt, max_new_tokens=20, do_sample=False, repetition_penalty=1.3, pad_token_id=0
    )
    return {
        "perplexity": perplexity(m, sample).perplexity,
        "choice": ranked_choice(m, bench.tokenizer, questions),
        "text": bench.tokenizer.decode(words[0], skip_special_tokens=True).replace("\n", " "),
        "bytes": stored_bytes(m),
    }


with torch.inference_mode():
    plain = look(model)


def compute(kept, method, layers):
    small = compressed(method, kept / 100, layers)
    return look(small) | {
        "method": method,
        "kept": kept,
        "layers": "the embedding" if method == "TensorGPT" else layers,
        "factorised": len(low_rank.describe(small)),
    }


def draw(result, fig):
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    for method, colour in COLOURS.items():
        x = [mean(pick(method, k), "bytes") / 2**20 for k in KEPT]
        y = [math.exp(mean(pick(method, k)) - original["loss"]) for k in KEPT]
        left.plot(x, y, "o-", color=colour, alpha=0.35, markersize=3, label=method)
    left.axhline(1, color="0.45", linestyle="--")
    left.plot(
        result["bytes"] / 2**20,
        result["perplexity"] / plain["perplexity"],
        "D",
        color=PALETTE[4],
        markersize=10,
        markeredgecolor=PALETTE[6],
    )
    left.set_yscale("log")
    left.set_xlabel("MiB stored")
    left.set_title("perplexity, times the original's")
    low, high = left.get_ylim()
    ticks = [t for t in (1, 1.2, 1.5, 2, 3, 5, 10, 30, 100, 300, 1000) if low < t < high]
    left.set_yticks(ticks, [f"{t:g}" for t in ticks])
    left.minorticks_off()
    left.legend(fontsize=8)
    for y, (a, b) in enumerate(((plain["choice"], "0.6"), (result["choice"], PALETTE[4]))):
        right.barh(y, a.accuracy, xerr=a.standard_error, color=b, height=0.5)
    right.axvline(0.25, color="0.45", linestyle="--")
    right.set_xlim(0, 1)
    right.set_yticks([0, 1], ["original", "factorised"])
    right.set_title("right answers")


def text(result):
    now, was = result["choice"], plain["choice"]
    return "\n".join(
        [
            f"Method: {result['method']}, on {result['layers']}",
            f"Kept: {result['kept']} per cent of their numbers",
            f"Modules factorised: {result['factorised']}",
            f"Perplexity: {result['perplexity']:.4g}",
            f"Original's: {plain['perplexity']:.4g}",
            f"Right answers: {now.accuracy:.0%} ± {now.standard_error:.0%}",
            f"Original's right answers: {was.accuracy:.0%}",
            f"Stored: {result['bytes'] / 2**20:.2f} MiB",
            f"Original's size: {plain['bytes'] / 2**20:.2f} MiB",
            f"The original writes: {plain['text']} …",
            f"Factorised, it writes: {result['text']} …",
        ]
    )


# %%
panel(
    compute,
    draw,
    text=text,
    title="Factorise mini-5m",
    caption="Left: your setting (the diamond) among the stored curves for all layers. Right: questions about unseen packages; guessing reaches the dashed line.",
    frames=(20, 40, 60, 80, 100),
    kept=knob(20, 100, 10, default=60, label="kept, per cent"),
    method=knob([*COLOURS, "LoSparse", "TensorGPT"], default="SVD-LLM"),
    layers=knob(list(LAYERS), default="all"),
)

# %% [markdown]
# Things to try. At 40 %, go from *SVD* to *SVD-LLM*. At 20 %, compare *attention* with *MLP*, and look at the size: the MLP has three quarters of the numbers.
# And *TensorGPT* at any setting: a warning to come back to.

# %% [markdown]
# ## Rank where it is needed
#
# The same part of every layer is a choice, and not a clever one: some layers can spare more than others. Damage is cheap to know, so
# divide the budget by it. Two measures:
#
# - **by spectrum**: the part $\sum_{i > r} \sigma_i^2 / \sum_i \sigma_i^2$ of its output that a layer would lose. It costs nothing.
# - **by loss**: the rise of the loss on calibration text when only this layer is truncated, one evaluation for each layer and rank. This is ASVD's search.
#
# Then the steps that spare the most damage per number are taken first, until the budget is spent. SVD-LLM's factors throughout, three seeds:

# %% tags=["hide-input"]
allocation = results.read("05_inference/2_low_rank/allocation").data
WAYS = {
    "same part of every layer": ("0.4", "o"),
    "by spectrum": (PALETTE[1], "s"),
    "by loss": (PALETTE[0], "^"),
}


def allocated(way, kept):
    return [r for r in allocation["table"] if (r["method"], r["kept"]) == (way, kept)]


def draw_allocation(fig):
    left, right = fig.subplots(1, 2, width_ratios=[2, 3])
    for way, (colour, marker) in WAYS.items():
        x = [100 * k for k in (0.8, 0.6, 0.4)]
        y = [math.exp(mean(allocated(way, k / 100))) for k in (80, 60, 40)]
        left.plot(x, y, f"{marker}-", color=colour, label=way)
    left.set_xlabel("numbers kept, per cent")
    left.set_title("perplexity")
    left.legend(fontsize=8)
    names = list(allocation["sizes"])
    for way in ("by spectrum", "by loss"):
        shares = []
        for name in names:
            m, n = allocation["sizes"][name]
            rank = allocation["ranks"][way].get(name)
            shares.append(100 if rank is None else 100 * rank * (m + n) / (m * n))
        colour, marker = WAYS[way]
        right.plot(range(len(names)), shares, marker, color=colour, markersize=5)
    right.axhline(60, color="0.4", linestyle="--")
    right.set_xlabel("layers, from first to last block")
    right.set_title("kept in each layer, per cent")


figure(
    draw_allocation,
    caption="Left: one budget, divided in three ways. Right: what each layer keeps under a budget of 60 %; at 100 it stays dense.",
    alt="Perplexity at 80, 60 and 40 per cent: "
    + "; ".join(
        f"{way} " + ", ".join(f"{math.exp(mean(allocated(way, k))):.1f}" for k in (0.8, 0.6, 0.4))
        for way in WAYS
    )
    + ".",
)

# %% tags=["nbval-check-output"]
print("                            80 %    60 %    40 % kept")
for way in WAYS:
    line = (f"{math.exp(mean(allocated(way, k))):7.1f}" for k in (0.8, 0.6, 0.4))
    print(f"{way:25}", *line)

# %% [markdown]
# Both beat the same part for all: at 40 % kept, a perplexity of 65.0 in place of 66.9. They agree on where there is most to spare, the first block's gate and up matrices, and on little else (the
# right picture). The spectrum costs nothing, and at 80 and 40 % is as good a guide as an evaluation for each layer and rank; at 60 % those evaluations pay, with 59.7 against 60.2.

# %% [markdown]
# ## Prune, round, recover
#
# Low rank is one of three ways to make weights smaller. Pruning removes some of them, rounding stores all of them in fewer bits, and they can be combined.
# The usual protocol is **prune (or factorise), then round, then recover** with a short training of something small beside the frozen weights, a LoRA.
#
# To be fair, everything is compared at *bytes as stored*: the places of zeros count, scales and zero points count, the LoRA counts, and numbers that are not rounded have 16 bits.
# There are four roads to about 3.3 bits a weight, and four to about 2.3, or a seventh of the original:
#
# 1. round everything to three bits, or to two (GPTQ, groups of 64);
# 2. prune two of every four weights (SparseGPT, 2:4), and round the others to four bits, or to two;
# 3. prune half of the weights wherever they are, and round the others likewise;
# 4. keep 75 % in factors (SVD-LLM), or 50 %, and round those to four bits.

# %% tags=["hide-input"]
composed = results.read("05_inference/2_low_rank/composed")
together = composed.data["table"]
base = math.exp(together[0]["loss"])


def way(name, step="compressed"):
    return [r for r in together if (r["way"], r["step"]) == (name, step)]


def point(found):
    return mean(found, "layer_bits"), math.exp(mean(found))


SINGLE = {  # each method alone, from right to left
    "rounding alone": (["GPTQ 4", "GPTQ 3", "GPTQ 2"], PALETTE[1], "o-"),
    "rank alone": (["rank 75%", "rank 50%"], PALETTE[0], "^-"),
    "pruning alone, 2:4": (["prune 2:4"], PALETTE[2], "s"),
    "pruning alone, 50 %": (["prune 50 %"], PALETTE[3], "D"),
}
PAIRS = {
    "2:4, then bits": (["prune 2:4 + 4 bits", "prune 2:4 + 2 bits"], PALETTE[2], "s--"),
    "50 %, then bits": (["prune 50 % + 4 bits", "prune 50 % + 2 bits"], PALETTE[3], "D--"),
    "rank, then bits": (["rank 75% + 4 bits", "rank 50% + 4 bits"], PALETTE[0], "^--"),
}
RECOVERED = {
    "GPTQ 2": (PALETTE[1], "o"),
    "prune 2:4 + 2 bits": (PALETTE[2], "s"),
    "prune 50 % + 2 bits": (PALETTE[3], "D"),
    "rank 50% + 4 bits": (PALETTE[0], "^"),
}


def draw_composed(fig):
    left, right = fig.subplots(1, 2, width_ratios=[3, 2])
    for group, face in ((SINGLE, None), (PAIRS, "none")):
        for label, (names, colour, line) in group.items():
            points = zip(*(point(way(n)) for n in names))
            style = {} if face is None else {"markerfacecolor": face}
            left.plot(*points, line, color=colour, label=label, linewidth=1.2, **style)
    for name, (colour, marker) in RECOVERED.items():
        points = [point(way(name)), point(way(name, "LoRA"))]
        right.plot(*zip(*points), "-", color=colour, linewidth=1.2)
        right.plot(*points[0], marker, color=colour, markerfacecolor="none")
        right.plot(*points[1], marker, color=colour)
    for axes in (left, right):
        axes.axhline(base, color="0.45", linestyle="--")
    left.set_xscale("log")
    left.set_xticks([2, 3, 4, 6, 8, 12], [2, 3, 4, 6, 8, 12])
    left.xaxis.set_minor_formatter("")
    left.set_xlabel("bits stored per weight")
    right.set_xlabel("bits, LoRA included")
    left.set_title("perplexity, compressed")
    right.set_title("… and recovered")
    left.legend(fontsize=7)


figure(
    draw_composed,
    caption="Left: methods alone (filled) and followed by rounding (open). Right: the four roads to 2.3 bits, before (open) and after (filled) a LoRA was trained, same colours. Means of three seeds; dashed: the original.",
    alt="Compressed: "
    + "; ".join(
        f"{n} at {point(way(n))[0]:.2f} bits {point(way(n))[1]:.1f}"
        for names, *_ in (*SINGLE.values(), *PAIRS.values())
        for n in names
    )
    + ". With LoRA: "
    + "; ".join(f"{n} {point(way(n, 'LoRA'))[1]:.1f}" for n in RECOVERED)
    + f". The original: {base:.1f}.",
)

# %% tags=["nbval-check-output"]
print(f"original               16.00 bits  perplexity {base:.1f}")
ROADS = {
    "alone": ("rank 75%", "GPTQ 4"),
    "to 3.3 bits": ("GPTQ 3", "prune 2:4 + 4 bits", "prune 50 % + 4 bits", "rank 75% + 4 bits"),
    "to 2.3 bits": tuple(RECOVERED),
}
for name in (name for road in ROADS.values() for name in road):
    found = way(name)
    line = f"{name:22} {mean(found, 'layer_bits'):5.2f} bits  perplexity {math.exp(mean(found)):.1f}, {mean(found, 'accuracy'):.0%} right"
    if name in RECOVERED:
        tuned = way(name, "LoRA")
        line += (
            f"; with LoRA {mean(tuned, 'layer_bits'):.2f} bits, {math.exp(mean(tuned)):.1f}, "
            f"{mean(tuned, 'accuracy'):.0%} right"
        )
    print(line)
(x2, y2), (x3, y3), (x, _) = (
    point(way("GPTQ 2")),
    point(way("GPTQ 3")),
    point(way("GPTQ 2", "LoRA")),
)
between = y2 + (y3 - y2) * (x - x2) / (x3 - x2)
print(f"on the straight line from GPTQ 2 to GPTQ 3, at {x:.2f} bits: perplexity {between:.1f}")

# %% [markdown]
# **Pairs can pay.** At 3.3 bits the best of the four roads is to drop half of the weights wherever they are and round the rest to four bits: perplexity 59.5, where three bits for all come to 59.9. At two bits the
# same pair is level with rounding alone (62.6 against 62.7), and smaller. A regular pattern has its price: 2:4 lies behind both. What it buys is speed, on hardware that knows it.
#
# **Low rank and rounding do not add up as well.** Four bits alone cost next to nothing (59.0), the rank alone little (59.5), and both together much more than the sum (61.0). A likely reason: there are
# two factors, one behind the other, and their rows and columns differ in size as the singular values do, so they are harder to round than the matrix that they stand for.
#
# **Recovery is no gift.** Thirty steps in which a LoRA imitates the original's probabilities improve every road. But the LoRA has to be stored: at 2.69 bits, simply giving some layers three bits in place of two would come to about 61.6, and LoRA on two bits
# is at 62.0. Longer training may turn that around; count the bytes before you believe it.
#
# The order matters, and the package says so. A rounded model is neither pruned nor factorised:

# %% tags=["nbval-check-output"]
from effnb.inference import pruning, quantization

packed = quantization.rtn(model, 4)
for attempt in (
    lambda: pruning.magnitude(packed, 0.5),
    lambda: low_rank.svd(packed, 0.5),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# And the second step must know of the first. SparseGPT rounds in the same walk through the columns, so that what it removed stays 0. Plain GPTQ after pruning moves
# every weight to make up for the rounding of others, the removed ones too. Most land on 0 again. Some do not, and one of them is enough to spoil a group of four:

# %% tags=["nbval-check-output"]
after = way("prune 2:4, then plain GPTQ")
print(f"zeros that came back: {mean(after, 'zeros_back'):.0%}")
print("still two of every four:", all(r["two_four"] for r in after))
print(f"bits stored per weight: {mean(after, 'layer_bits'):.2f} with a flag for each, ", end="")
print(f"{mean(way('prune 2:4 + 4 bits'), 'layer_bits'):.2f} in one walk")

# %% [markdown]
# ## Does it hold?
#
# One row of the claims ledger belongs to this chapter: low rank makes weights smaller, and methods that look at activations beat plain SVD. Two kinds of chance are in the comparison, and each gets its own
# interval: which calibration text was drawn (five draws; plain SVD does not depend on it), and on which text the model is judged (the windows of the novel, pair by pair).

# %% tags=["hide-input"]
from effnb.lab import Evidence, claims_table, verdict


def losses(method, kept):
    """Mean loss over the novel for each draw of the calibration text."""
    return [r["loss"] for r in sorted(pick(method, kept), key=lambda r: r["seed"])]


def windows(method, kept):
    """Loss of each window of the novel, averaged over the draws."""
    found = [r["windows"] for r in pick(method, kept)]
    return [sum(w) / len(w) for w in zip(*found)]


def by_draw(method, kept):
    plain_loss = losses("SVD", kept)[0]
    return Evidence.repeated(
        f"{method} - SVD at {kept:.0%} kept: nats per token, by draw of the calibration text",
        [x - plain_loss for x in losses(method, kept)],
        expect="lower",
        bound=0.0,
    )


def by_window(method, kept):
    return Evidence.paired(
        f"{method} - SVD at {kept:.0%} kept: nats per token, by window of the novel",
        windows(method, kept),
        windows("SVD", kept),
        expect="lower",
    )


smollm2 = results.read("05_inference/2_low_rank/smollm2")


def real(method):
    """The stored rows of SmolLM2."""
    return [r for r in smollm2.data["table"] if r["method"] == method]


AWARE = ("ASVD", "SVD-LLM")
c_4 = verdict(
    "C-4",
    parts=[
        Evidence.exact(
            "smaller: bytes of the layers at 60% kept / original",
            pick("SVD", 0.6)[0]["numbers"],
            expect="lower",
            bound=0.6,
        ),
        *(by_draw(method, kept) for method in AWARE for kept in (0.8, 0.6, 0.4)),
        *(by_window(method, 0.6) for method in AWARE),
        *(
            Evidence.paired(
                f"SmolLM2, {method} - SVD at 80% kept: nats per token, by window of the novel",
                next(r["windows"] for r in real(method) if r["kept"] == 0.8),
                next(r["windows"] for r in real("SVD") if r["kept"] == 0.8),
                expect="lower",
            )
            for method in AWARE
        ),
    ],
    note="mini-5m; 8,192 calibration tokens; the novel is in none of the draws.",
)
claims_table(c_4)

# %% [markdown]
# It holds on `mini-5m`, at every size and for every draw, at 60 % also window by window; and the gain is small: at 60 % kept it is the difference between a perplexity of 61.2 and one of 60.4. The right answers decide nothing, since all their
# differences lie within the standard error of 150 questions. On SmolLM2 (below) SVD-LLM is what leaves a model at all, while ASVD cannot be told from plain SVD: both destroy it, and which of two ruins is worse is
# chance. So the verdict is *in part*. Nor is more knowledge always better: at the left end of the first picture, where a fifth of the numbers is left, ASVD is ahead of SVD-LLM.

# %% [markdown]
# ## What it costs and saves
#
# The cost card, at 40 % kept. Parameters and bytes fall by what the arithmetic says. The embedding stays whole, and is a fifth of this small model.

# %%
from effnb.evaluation import measure
from effnb.lab import cost_card

prompt = sample[None, :256].to(model.device)
small = low_rank.truncate(model, decomposition("SVD-LLM"), 0.4)
cost_card(
    measure(model, prompt, decode_tokens=8, runs=3),
    measure(small, prompt, decode_tokens=8, runs=3),
    labels=("original", "40 % kept"),
)

# %% [markdown]
# A factorised model is saved as what it is, and comes back as what it was:

# %% tags=["nbval-check-output"]
import tempfile
from pathlib import Path

from safetensors.torch import save_file

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "small.safetensors"
    written = low_rank.save_factorized(small, path)
    back = low_rank.load_factorized(model, path)
    whole = Path(folder) / "whole.safetensors"
    save_file({n: p.detach() for n, p in model.named_parameters()}, whole)
    with torch.inference_mode():
        same = torch.equal(back(prompt).logits, small(prompt).logits)
    print(f"file: {written / 2**20:.1f} MiB, the original's {whole.stat().st_size / 2**20:.1f} MiB")
print(f"the same outputs, bit for bit: {same}")

# %% [markdown]
# Is it faster? Half the multiplications would be half the time, if nothing else took time. But two layers are two calls instead of one, and a thin matrix uses
# a processor less well than a wide one. One layer over its rank, at several numbers of tokens:

# %% tags=["hide-input"]
timed = results.read("05_inference/2_low_rank/latency")
SHAPES = {(1536, 576): "1536 × 576", (2048, 2048): "2048 × 2048"}


def draw_latency(fig):
    panes = fig.subplots(1, 2, sharey=True)
    for axes, ((m, n), title) in zip(panes, SHAPES.items()):
        curves = [
            c
            for c in timed.data["curves"]
            if (c["out"], c["in"]) == (m, n) and c["tokens"] in (1, 256)
        ]
        for colour, curve in zip(PALETTE, curves):
            x = [100 * r / curve["break_even"] for r in curve["ranks"]]
            label = f"{curve['tokens']} token" + "s" * (curve["tokens"] > 1)
            axes.plot(x, curve["times_dense"], "o-", color=colour, label=label)
        axes.plot([0, 125], [0, 1.25], color="0.75", linewidth=1)
        axes.axhline(1, color="0.45", linestyle="--")
        axes.axvline(100, color="0.45", linestyle=":")
        axes.set_xlabel("rank, per cent of the break-even rank")
        axes.set_title(title)
    panes[0].set_ylabel("time / the dense layer's")
    panes[0].legend()


figure(
    draw_latency,
    caption="Time of two factors over that of one layer. Dotted: the break-even rank. The thin grey line is what the multiplications alone would give. One run, interleaved.",
    alt="; ".join(
        f"{c['out']} by {c['in']} at {c['tokens']} tokens: "
        + ", ".join(
            f"{t:.2f} at {r / c['break_even']:.0%}" for t, r in zip(c["times_dense"], c["ranks"])
        )
        for c in timed.data["curves"]
        if c["tokens"] in (1, 256)
    )
    + ".",
)

# %%
timed

# %% [markdown]
# The same here and now, for the MLP matrix of `mini-5m` and 256 tokens:

# %%
from functools import partial

from effnb.evaluation import latency

wide = model.model.layers[3].mlp.up_proj
x = torch.randn(256, 256, device=model.device)
with torch.inference_mode():
    dense_time = latency(partial(wide, x), runs=30).median_seconds
    for rank in (32, 96, 160, 224):
        factors = decomposition("SVD")["model.layers.3.mlp.up_proj"].truncated(rank)
        thin = low_rank.LowRankLinear.replacing(wide, factors)
        share = latency(partial(thin, x), runs=30).median_seconds / dense_time
        print(f"rank {rank:3} (break-even {low_rank.break_even_rank(688, 256):.0f}): {share:.2f} ×")

# %% [markdown]
# With many tokens time follows the multiplications, and the arithmetic's break-even rank is the clock's, nearly. With one token it is not. A call has a price of its own, which a small layer does not earn back: its gain
# ends well before the break-even rank. A large layer can gain *more* than the arithmetic says at low ranks, because one token's time is that of reading weights, and small factors stay in the processor's cache.

# %% [markdown]
# ## On a real model
#
# `smollm2-135m` has 135 million weights. A warning, as always with this file: its linear weights lie on a 4-bit grid already (Q4_1, groups of 32). That rounding left noise in
# them, and noise has no low rank, so the unrounded model may bear more than what follows. The three methods meet the same weights, and can be compared. Each layer was decomposed once,
# with 4,096 tokens of novels and package descriptions:


# %% tags=["hide-input"]
def draw_smollm2(fig):
    axes = fig.subplots()
    for method in ("SVD", "ASVD", "SVD-LLM"):
        found = real(method)
        axes.plot(
            [100 * r["kept"] for r in found],
            [r["loss"] for r in found],
            "o-",
            color=COLOURS[method],
            label=method,
        )
    axes.axhline(real("original")[0]["loss"], color="0.45", linestyle="--", label="original")
    axes.axhline(math.log(49152), color="0.45", linestyle=":", label="guessing")
    axes.set_ylim(0, None)
    axes.set_xlabel("numbers kept in the layers, per cent")
    axes.set_ylabel("loss, nats per token")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


figure(
    draw_smollm2,
    caption="SmolLM2-135M, factorised, on the same novel. Above the dotted line a model is worse than one that holds all tokens equally likely.",
    alt="Loss at 90, 80, 60 and 40 per cent: "
    + "; ".join(
        f"{m} " + ", ".join(f"{r['loss']:.1f}" for r in real(m)) for m in ("SVD", "ASVD", "SVD-LLM")
    )
    + f". The original: {real('original')[0]['loss']:.1f}; guessing: {math.log(49152):.1f}.",
)

# %% tags=["nbval-check-output"]
print(
    f"perplexity: original {math.exp(real('original')[0]['loss']):.1f}; guessing among all tokens 49152"
)
print("                90 %       80 %       60 %       40 % kept")
for method in ("SVD", "ASVD", "SVD-LLM"):
    print(f"{method:8}", *(f"{math.exp(r['loss']):10.3g}" for r in real(method)))

# %% [markdown]
# Nothing here is like `mini-5m`. Plain SVD and ASVD destroy the model with the first tenth of the numbers: a guess among all tokens would be better. SVD-LLM leaves a
# model, and even so loses more in the first tenth than `mini-5m` does in eight.
#
# The proportions of the matrices are not the reason; they are alike in both models. *90 % kept* drops more than half of the terms of a square matrix in either. One thing that does differ is the inputs.
# How many times larger is the largest input of a layer than its middle one?

# %% tags=["nbval-check-output"]
stands_out = results.read("05_inference/2_low_rank/inputs").data["table"]
for name, layers in stands_out.items():
    found = sorted(layers.values())
    print(f"{name:13} middle layer {found[len(found) // 2]:5.1f}   worst layer {found[-1]:5.1f}")
print("terms that stay at 90 % kept, of all terms")
for m, n in ((256, 256), (576, 576), (688, 256), (1536, 576)):
    rank = low_rank.rank_for(0.9, m, n)
    print(f"  {m:4} × {n}: {rank:3} of {min(m, n)}, {rank / min(m, n):.0%}")

# %% [markdown]
# A few inputs of SmolLM2 are huge, as in larger language models (the chapter on quantisation calls them outliers), and an error in a column that meets one is multiplied by it. Plain SVD does not know them; ASVD counts only the root of their
# size. Its authors also search a rank for each layer, and the same part for all is not their method at its best.

# %% tags=["real-model"]
if results.live():
    llm = load("smollm2-135m", device="cpu")
    novel = "\n\n".join(c.text for c in corpora.novels("test")[:2])
    tokens = llm.tokenizer.encode(novel, add_special_tokens=False, verbose=False)[:1024]
    page, given = torch.tensor(tokens[:512]), torch.tensor(tokens[512:]).view(2, 256)
    last = "model.layers.2[4-9].mlp.up_proj"
    for label, factorised in (
        ("original", llm.model),
        ("SVD", low_rank.svd(llm.model, 0.4, include=last)),
        ("SVD-LLM", low_rank.svd_llm(llm.model, given, 0.4, include=last)),
    ):
        print(
            f"{label:9} last six up_proj at 40 % kept: {perplexity(factorised, page).perplexity:.1f}"
        )
else:
    print(smollm2)

# %% [markdown]
# Speed, on the same model: reading a prompt of 256 tokens, and writing one token after the other. Ratios of one interleaved run; the last row
# is the pitfall from above: half of the full width as the rank of every layer.

# %%
quick = results.read("05_inference/2_low_rank/speed")


def ratio(key, name, invert):
    pairs = zip(quick.data[key][name], quick.data[key]["1.0"])
    found = sorted(b / a if invert else a / b for a, b in pairs)
    return found[len(found) // 2]


print("kept                  reading    writing      MiB")
for name, held in quick.data["bytes"].items():
    label = name if "half" in name else f"{float(name):.0%}"
    speedups = ratio("read_seconds", name, True), ratio("tokens_per_second", name, False)
    print(f"{label:18} {speedups[0]:9.2f} × {speedups[1]:8.2f} × {held / 2**20:7.0f}")
quick

# %% [markdown]
# Smaller factors are faster, by less than their size: attention, norms and the output head do not shrink. Half of the full rank buys next to nothing. And no row of this table is of use on this model without a training that brings
# its quality back.

# %% [markdown]
# ## Where it breaks
#
# **Too little text.** SVD-LLM fits $G$, a matrix of as many rows as the layer has inputs. With fewer tokens than inputs it has directions that it never saw, and
# gives them away for nothing. ASVD estimates one number per input, and does not mind. At 60 % kept:

# %% tags=["hide-input"]
few = results.read("05_inference/2_low_rank/calibration").data["table"]
TOKENS = sorted({r["tokens"] for r in few if r["tokens"]})


def by_tokens(method, tokens, key="loss"):
    return mean([r for r in few if (r["method"], r["tokens"]) == (method, tokens)], key)


base_loss, svd_loss = by_tokens("original", 0), by_tokens("SVD", 0)


def draw_few(fig):
    axes = fig.subplots()
    for method in ("ASVD", "SVD-LLM"):
        colour = COLOURS[method]
        new = [by_tokens(method, t) - base_loss for t in TOKENS]
        own = [by_tokens(method, t, "rise_on_calibration") for t in TOKENS]
        axes.plot(TOKENS, new, "o-", color=colour, label=f"{method}, new text")
        axes.plot(TOKENS, own, "o:", color=colour, label=f"{method}, its own text")
    axes.axhline(svd_loss - base_loss, color=COLOURS["SVD"], linestyle="--", label="SVD, new text")
    axes.axvline(256, color="0.6", linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(TOKENS, TOKENS)
    axes.minorticks_off()
    axes.set_xlabel("tokens of calibration text")
    axes.set_ylabel("rise of the loss, nats per token")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


figure(
    draw_few,
    caption="The rise of the loss at 60 % kept, on the text that calibrated the method (dotted curves) and on the novel. The dotted vertical line: the width of most layers' inputs, 256.",
    alt="Rise of the loss on new text over calibration tokens: "
    + "; ".join(
        f"{m} "
        + ", ".join(f"{by_tokens(m, t) - base_loss:.2f} at {t}" for t in (64, 256, 1024, 8192))
        for m in ("ASVD", "SVD-LLM")
    )
    + f". Plain SVD: {svd_loss - base_loss:.2f}.",
)

# %% tags=["nbval-check-output"]
print("rise of the loss in nats   its own text   new text")
for tokens in (64, 256, 1024, 8192):
    own, new = by_tokens("SVD-LLM", tokens, "rise_on_calibration"), by_tokens("SVD-LLM", tokens)
    print(f"SVD-LLM, {tokens:5} tokens {own:z15.2f} {new - base_loss:12.2f}")
print(f"plain SVD, no text {svd_loss - base_loss:31.2f}")

# %% [markdown]
# **A random matrix has no low rank.** The same layer, its weights shuffled, at 60 % kept:

# %% tags=["nbval-check-output"]
layer = model.get_submodule("model.layers.3.self_attn.q_proj").weight.detach().cpu()
order = torch.randperm(layer.numel(), generator=torch.Generator().manual_seed(0))
shuffled = layer.flatten()[order].view(layer.shape)
for label, matrix in (("trained", layer), ("shuffled", shuffled)):
    factors = low_rank.truncated_svd(matrix, low_rank.rank_for(0.6, *matrix.shape))
    print(f"{label:9} error {factors.error / matrix.norm():.0%} of the weight's norm")

# %% [markdown]
# **TensorGPT on this vocabulary.** The embedding of each token is folded into a small tensor and stored as a chain of smaller ones, a *tensor train*. Where there is nothing to fold, nothing is
# saved: neighbouring entries of an embedding have no more to do with each other than any two.

# %% tags=["nbval-check-output"]
table = model.model.embed_tokens.weight.detach().cpu()
noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
fold = low_rank.balanced_shape(256)
print(f"256 entries fold into {fold}")
for rank in (2, 4, 5):
    size = low_rank.train_size(fold, rank) / 256
    errors = [
        ((low_rank.tt_svd(t, rank).vectors() - t).norm() / t.norm()).item() for t in (table, noise)
    ]
    print(
        f"rank {rank}: {size:4.0%} of the numbers, error {errors[0]:.0%}; of noise {errors[1]:.0%}"
    )

# %% [markdown]
# **Bad input** gets one sentence, before any work starts:

# %% tags=["nbval-check-output"]
broken = W.clone()
broken[0, 0] = math.nan
for attempt in (
    lambda: low_rank.svd(model, 1.5),
    lambda: low_rank.svd(model),
    lambda: low_rank.svd(small, 0.5),
    lambda: low_rank.asvd(model, calibration, 0.5, alpha=2.0),
    lambda: low_rank.svd_llm(model, calibration[:0], 0.5),
    lambda: low_rank.truncated_svd(W, 3),
    lambda: low_rank.truncated_svd(broken, 1),
):
    try:
        attempt()
    except ValueError as problem:
        print("-", problem)

# %% [markdown]
# ## Exercises

# %% tags=["hide-input"]
from effnb.lab import Exercise

saving = Exercise(
    "The rank for a budget",
    minutes=5,
    difficulty="easy",
    reference=lambda kept, m, n: max(1, int(kept * m * n / (m + n))),
    cases=[(0.5, 256, 256), (0.6, 688, 256), (0.25, 1536, 576), (0.01, 64, 64)],
    wrong={
        "This is a part of the full rank; two factors hold r (m + n) numbers": lambda k, m, n: max(
            1, int(k * min(m, n))
        ),
        "Round down: the next larger rank is over the budget": lambda k, m, n: max(
            1, math.ceil(k * m * n / (m + n))
        ),
        "At least one term has to stay, however small the budget": lambda k, m, n: int(
            k * m * n / (m + n)
        ),
        "There are two factors: r columns of m numbers count as well": lambda k, m, n: max(
            1, int(k * m)
        ),
    },
)


def by_svd(W, S, r):
    U, sigma, Vh = torch.linalg.svd(W * S, full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vh[:r] / S


def not_undone(W, S, r):
    return by_svd(W, S, r) * S


def rows_scaled(W, S, r):
    return by_svd(W, torch.ones_like(S), r)


def others_kept(W, S, r):
    U, sigma, Vh = torch.linalg.svd(W * S, full_matrices=False)
    return (U[:, -r:] * sigma[-r:]) @ Vh[-r:] / S


def scaled_twice(W, S, r):
    return by_svd(W, S**2, r)


g = torch.Generator().manual_seed(3)
scaling = Exercise(
    "Truncate and undo the scaling",
    minutes=10,
    difficulty="medium",
    reference=by_svd,
    cases=[
        (torch.randn(4, 3, generator=g), torch.tensor([0.5, 2.0, 4.0]), 2),
        (torch.randn(3, 5, generator=g), torch.tensor([1.0, 3.0, 0.2, 2.0, 0.7]), 1),
    ],
    wrong={
        "The scaling is still in it: divide the columns by S again": not_undone,
        "This is plain SVD: multiply the columns of W by S before decomposing": rows_scaled,
        "These are the smallest terms; singular values come largest first": others_kept,
        "S scales the columns once, not twice": scaled_twice,
    },
    atol=1e-4,
)


def lost_part(W, G, r):
    return torch.linalg.eigvalsh(W @ G @ W.T).flip(0)[r:].sum()


damage = Exercise(
    "The damage before it is done",
    minutes=15,
    difficulty="hard",
    reference=lost_part,
    cases=[
        (W, inputs["opposed"], 1),
        (W, inputs["one larger"], 1),
        (torch.randn(5, 4, generator=g), torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])), 2),
    ],
    wrong={
        "This is what plain SVD loses of the weight; G has to come in": lambda W, G, r: (
            torch.linalg.svdvals(W)[r:].square().sum()
        ),
        "Square the singular values: the error is a sum of squares": lambda W, G, r: (
            torch.linalg.svdvals(W @ torch.linalg.cholesky(G))[r:].sum()
        ),
        "That is the part that is kept; the damage is what lies behind the first r": lambda W, G, r: (
            torch.linalg.eigvalsh(W @ G @ W.T).flip(0)[:r].sum()
        ),
        "L L^T = G: multiply by the root of G, not by G itself": lambda W, G, r: (
            torch.linalg.svdvals(W @ G)[r:].square().sum()
        ),
    },
    atol=1e-3,
)
for exercise in (saving, scaling, damage):
    print(exercise)


# %% [markdown]
# **1.** The largest rank whose two factors hold at most a part `kept` of the numbers of an $m \times n$ matrix; at least 1.


# %% tags=["exercise", "nbval-check-output"]
def rank_of(kept, m, n):
    """A whole number."""
    raise NotImplementedError


_ = saving.check(rank_of)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Solve $r (m + n) \le \rho\, m n$ for $r$, with $\rho$ the part kept.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def rank_of(kept, m, n):
    """The break-even rank times the part kept, rounded down."""
    return max(1, int(kept * m * n / (m + n)))


_ = saving.check(rank_of)

# %% [markdown]
# **2.** What ASVD does, given the scales. Truncate $W \operatorname{diag}(s)$ to rank $r$ and undo the scaling; return the matrix of the same shape as $W$.


# %% tags=["exercise", "nbval-check-output"]
def truncate_scaled(W, s, r):
    """W is (out, in), s is (in,)."""
    raise NotImplementedError


_ = scaling.check(truncate_scaled)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# `torch.linalg.svd(..., full_matrices=False)` returns $U$, the singular values, and $V^\top$. Multiplying by a vector of length `in` scales columns.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def truncate_scaled(W, s, r):
    """Scale the columns, truncate, and scale them back."""
    U, sigma, Vh = torch.linalg.svd(W * s, full_matrices=False)
    return (U[:, :r] * sigma[:r]) @ Vh[:r] / s


_ = scaling.check(truncate_scaled)

# %% [markdown]
# **3.** From $W$ and $G$, the squared error $\lVert (W - \hat W) X \rVert_F^2$ that SVD-LLM will make at rank $r$, without computing $\hat W$ or seeing $X$.


# %% tags=["exercise", "nbval-check-output"]
def predict(W, G, r):
    """A number."""
    raise NotImplementedError


_ = damage.check(predict)

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# The squared singular values of $W L$ are the eigenvalues of $W L L^\top W^\top$.
#
# </details>


# %% tags=["solution", "nbval-check-output"]
def predict(W, G, r):
    """The eigenvalues of W G W^T, all but the r largest."""
    return torch.linalg.eigvalsh(W @ G @ W.T).flip(0)[r:].sum()


_ = damage.check(predict)

# %% [markdown]
# ## Gallery
#
# FWSVD, LoSparse (without its training) and TensorGPT are in the package and in the panel. LoRD has no function of its own; the reason stands beside it.
#
# **FWSVD** (Hsu et al., 2022). Weigh each input by the loss, not by its size. With the empirical Fisher information $F_{ij} = \mathbb{E}[(\partial \mathcal L / \partial W_{ij})^2]$, one squared gradient per sample, it scales column $j$ by $\sqrt{\sum_i F_{ij}}$.
# Use it for a model tuned to one task whose loss you have.
#
# **LoSparse** (Li et al., 2023). $W \approx U V + S$: a low rank for what all outputs share, and a few whole rows $S$ for outputs that fit no low rank. Rows are
# pruned while the parts are trained. Use it when you can train for long. Thirty steps, in which all imitate the original's probabilities, at half of the numbers and three seeds:

# %% tags=["nbval-check-output"]
losparse = results.read("05_inference/2_low_rank/losparse").data
LOSPARSE = {
    "rows alone": ("trained", 0.0),
    "half and half": ("trained", 0.5),
    "low rank alone": ("trained", 1.0),
    "SVD-LLM, untrained": ("SVD-LLM", 1.0),
    "SVD-LLM, then tuned": ("SVD-LLM, tuned", 1.0),
}
print(f"original: perplexity {math.exp(losparse['table'][0]['loss']):.1f}")
print(f"half of the numbers kept       one shot   after {losparse['steps']} steps, by seed")
for label, (method, share) in LOSPARSE.items():
    found = [r for r in losparse["table"] if (r["method"], r["share"]) == (method, share)]
    once = [r for r in losparse["table"] if (r["method"], r["share"]) == ("one shot", share)]
    before = f"{math.exp(mean(once)):8.1f}" if method == "trained" else " " * 8
    print(f"{label:28} {before}     ", *(f"{math.exp(r['loss']):6.1f}" for r in found))

# %% [markdown]
# Rows cannot be chosen well without training, and gain most from it. But thirty steps do not bring the mix up to low rank alone, at any seed; and SVD-LLM, which trains nothing, is ahead of both. Its own second stage (LoRA on one factor,
# then on the other) has nothing to add in so few steps. The paper trains for epochs.
#
# **TensorGPT** (Xu et al., 2023). A tensor train per token, $x_{i_1 \dots i_N} \approx C_1[i_1] \cdots C_N[i_N]$ with a small matrix $C_k[i_k]$ for each index, so that tokens can be added and removed one at a time. Use it, if at all, on wide embeddings, and look at the error first.
#
# **LoRD** (Kaushal et al., 2023). Truncates along the main directions of the *outputs*, $\hat W = U_r U_r^\top W$ with $U_r$ the leading eigenvectors of $W G W^\top$. That is SVD-LLM by another road: the two products are the same.
#
# ## Which one?
#
# First count in bytes. On `mini-5m` rounding costs less quality than low rank at a fraction of the bytes, and at 3.3 bits also less than low rank with rounding. Half of the weights pruned wherever they are, with the rest in four bits, costs a little less still (59.5 against 59.9 for three bits); in the pattern 2:4 it costs more (61.5).
# Nothing of this was measured on SmolLM2 here. Take low rank where multiplications have to go on ordinary hardware, where layers are wide and their inputs are tame, or where you will train afterwards. Then SVD-LLM, with some thousand tokens of the text that matters to you; ranks by spectrum; below the break-even rank or not at all. Plain SVD is for a first look at the spectrum.
#
# ## Further reading
#
# Eckart and Young, 1936, *Psychometrika* 1(3). Yuan et al., *ASVD*, 2023, arXiv 2312.05821. Wang et al., *SVD-LLM*, ICLR 2025, arXiv 2403.07378, and *V2*, 2025, arXiv 2503.12340. Hsu et al., *FWSVD*, 2022, arXiv 2207.00112.
# Li et al., *LoSparse*, 2023, arXiv 2306.11222. Kaushal, Vaidhya and Rish, *LoRD*, 2023, arXiv 2309.14021. Xu, Xu and Mandic, *TensorGPT*, 2023, arXiv 2307.00526. Frantar and Alistarh, *SparseGPT*, 2023, arXiv 2301.00774.
