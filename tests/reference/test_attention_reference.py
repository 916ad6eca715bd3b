"""Attention against SDPA, eager FlexAttention, transformers' Longformer and Mistral, and SciPy."""

import importlib

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from torch.nn.attention.flex_attention import flex_attention

from effnb.design.attention import (
    LongformerAttention,
    bigbird_attention,
    bigbird_pattern,
    dilated_attention,
    entmax,
    flash_attention,
    kmeans,
    sliding_window,
    sliding_window_attention,
)

SDPA = torch.nn.functional.scaled_dot_product_attention


def qkv(queries, keys=None, heads=2, kv_heads=None, dim=8):
    generator = torch.Generator().manual_seed(0)
    keys = queries if keys is None else keys
    sizes = (heads, queries), (kv_heads or heads, keys), (kv_heads or heads, keys)
    return [torch.randn(2, *s, dim, generator=generator).double() for s in sizes]


# --- SDPA


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_sdpa(causal):
    """Values and all gradients in float64, to 1e-12; 37 tokens in tiles of 8 and 5."""
    q, k, v = (x.requires_grad_() for x in qkv(37))
    ours = flash_attention(q, k, v, causal=causal, block_q=8, block_k=5)
    theirs = SDPA(q, k, v, is_causal=causal)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    g = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).double()
    for a, b in zip(*(torch.autograd.grad(out, (q, k, v), g) for out in (ours, theirs))):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_rounds_as_sdpa_does(dtype):
    q, k, v = (x.to(dtype) for x in qkv(50))
    exact = SDPA(q.double(), k.double(), v.double(), is_causal=True)
    errors = [
        (out.double() - exact).abs().max()
        for out in (flash_attention(q, k, v, causal=True), SDPA(q, k, v, is_causal=True))
    ]
    assert errors[0] <= 2 * errors[1]


# --- FlexAttention, eager: masks written as functions of two positions


def flex(q, k, v, seen):
    """FlexAttention with a rule for pairs: the score where it holds, minus infinity elsewhere."""

    def rule(score, b, h, i, j):
        return torch.where(seen(h, i, j), score, -torch.inf)

    grouped = q.shape[1] != k.shape[1]
    return flex_attention(q, k, v, score_mod=rule, enable_gqa=grouped)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("queries", [20, 7])
def test_a_window_with_sinks_is_flex_attention(queries):
    """Also where the queries are the last of the keys, as behind a cache."""
    q, k, v = qkv(queries, 20, heads=4, kv_heads=2)
    past = 20 - queries
    ours = sliding_window_attention(q, k, v, window=5, sinks=2)
    theirs = flex(q, k, v, lambda h, i, j: (j <= i + past) & ((i + past - j < 5) | (j < 2)))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_bigbird_and_dilated_windows_are_flex_attention():
    q, k, v = qkv(32)
    table = bigbird_pattern(32, block=4, random=2, heads=2)
    ours = bigbird_attention(q, k, v, block=4, random=2)
    theirs = flex(q, k, v, lambda h, i, j: table[h, i, j])
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    ours = dilated_attention(q, k, v, window=4, dilation=3)
    theirs = flex(q, k, v, lambda h, i, j: ((i - j).abs() <= 6) & ((i - j) % 3 == 0))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


# --- transformers' Longformer


def hf_longformer(layers=1):
    torch.manual_seed(0)
    config = transformers.LongformerConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=66, attention_window=[4] * layers,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1,
    )  # fmt: skip
    model = transformers.LongformerModel(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name.lower():
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_longformer_is_that_of_transformers(side):
    """The same weights, global tokens and padding: to 1e-5 at every real token, in float32.

    Theirs takes texts of whole windows, and in each a number of 1 for tokens, 2 for global ones.
    """
    attention = hf_longformer().encoder.layer[0].attention
    theirs, ours = attention.self, LongformerAttention(16, 2, 4).eval()
    for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    with torch.no_grad():
        ours.out.weight.copy_(torch.eye(16))
        ours.out.bias.zero_()
    hidden = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(2))
    padding = torch.zeros(2, 24, dtype=torch.bool)
    if side != "none":
        padding[1, :6] = True
        padding = padding if side == "left" else padding.flip(1)
    chosen = torch.zeros(2, 24, dtype=torch.bool)
    chosen[0, [0, 11]], chosen[1, 8] = True, True  # sequences with different numbers of them
    mask = torch.where(padding, -10000.0, torch.where(chosen, 10000.0, 0.0))
    with torch.no_grad():
        expected = theirs(
            hidden,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=True,
        )[0]
        found = ours(hidden, global_tokens=chosen, padding=padding)
    torch.testing.assert_close(found[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


def test_the_receptive_field_is_that_of_transformers():
    """Window 4 and global token 0: token 10 sees 0 and 8 to 12, token 0 sees all, in both."""
    model = hf_longformer()
    embedded = model.embeddings.word_embeddings(torch.arange(20)[None]).detach().requires_grad_()
    is_global = (torch.arange(20) == 0)[None]
    out = model(inputs_embeds=embedded, global_attention_mask=is_global.long()).last_hidden_state
    layer = LongformerAttention(16, 2, 4)
    hidden = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    ours = layer(hidden, global_tokens=is_global)
    # A norm's outputs have a constant sum, so they are weighted.
    weights = torch.arange(16)
    for token, seen in ((10, [0, 8, 9, 10, 11, 12]), (0, list(range(20)))):
        for result, source in ((out, embedded), (ours, hidden)):
            (g,) = torch.autograd.grad(
                (result[0, token] * weights).sum(), source, retain_graph=True
            )
            assert (g[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == seen


# --- transformers' Mistral: a window that the architecture has itself


@pytest.mark.parametrize("window", [1, 3, 8, 24])
def test_a_window_is_that_of_mistral(llama, ids, window):
    """A Llama with our window and a Mistral with its own, of the same weights: to 1e-5."""
    settings = llama.config.to_dict()
    for key in ("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"):
        settings.pop(key, None)
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(**settings, sliding_window=window)
    ).eval()
    mistral.load_state_dict(llama.state_dict())
    with torch.no_grad():
        ours = sliding_window(llama, window, sinks=0)(ids).logits
        torch.testing.assert_close(ours, mistral(ids).logits, atol=1e-5, rtol=1e-5)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    options = dict(max_new_tokens=8, do_sample=False, attention_mask=mask)
    ours = sliding_window(llama, window, sinks=0).generate(ids, **options)
    # With a window of 1, the cache of transformers 5.23 keeps all keys, for -1 + 1 is where a slice
    # begins; Mistral then writes another text than without a cache.
    assert torch.equal(ours, mistral.generate(ids, use_cache=window > 1, **options))


# --- SciPy and scikit-learn


@pytest.mark.parametrize("alpha", [1.3, 1.5, 2.0])
def test_entmax_is_the_maximum_of_its_definition(alpha):
    """argmax of p·z + H_α(p) over the simplex, found by SciPy without knowing of any threshold."""
    z = np.array([1.2, 0.4, 0.9, -3.0, 0.1])

    def objective(p):
        entropy = (p - np.clip(p, 0, None) ** alpha).sum() / (alpha * (alpha - 1))
        return -(p @ z + entropy)

    found = minimize(
        objective, np.full(5, 0.2), method="SLSQP", bounds=[(0, 1)] * 5,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )  # fmt: skip
    ours = entmax(torch.from_numpy(z), alpha).numpy()
    assert np.abs(ours - found.x).max() < 1e-4
    assert objective(ours) <= found.fun + 1e-9
    assert (ours == 0).any()


def test_kmeans_stops_where_scikit_learn_does():
    """From our centroids, Lloyd's algorithm of scikit-learn does not move."""
    points = torch.randn(2, 80, 3, generator=torch.Generator().manual_seed(4)).double()
    for head, centroids in zip(points, kmeans(points, 5, steps=100)):
        theirs = KMeans(5, init=centroids.numpy(), n_init=1, tol=0).fit(head.numpy())
        np.testing.assert_allclose(theirs.cluster_centers_, centroids.numpy(), atol=1e-10)


def test_the_modules_are_found_by_their_full_names():
    """`entmax` and `flash_attention` are functions of the package and modules in it."""
    for name in ("entmax", "flash_attention", "grouped_query", "linear_attention"):
        module = importlib.import_module(f"effnb.design.attention.{name}")
        package = importlib.import_module("effnb.design.attention")
        assert getattr(module, name) is getattr(package, name)
