"""Local attention: against Longformer, FlexAttention and plain loops; the kernels against all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from effnb.kernels import _window
from effnb.kernels import local_attention as module
from effnb.kernels._window import PADDING, Masks, full_tiles, list_visits, reach_of, visits_of
from effnb.kernels.local_attention import (
    count_pairs,
    local_attention,
    local_attention_reference,
    local_attention_tiled,
    tile_schedule,
    visible_pairs,
)

FORMS = [local_attention_reference, local_attention_tiled]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def marks(batch, tokens, share, seed=0):
    """Random true entries."""
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < share


def written_out(q, k, v, window, causal, is_global, is_padding, scale):
    """Pair by pair."""
    batch, heads, tokens, _ = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for i in range(tokens):
            seen = []
            for j in range(tokens):
                near = i - window < j <= i if causal else abs(i - j) <= window // 2
                far = bool(is_global[b, i] or is_global[b, j]) and (j <= i or not causal)
                if (near or far) and not is_padding[b, i] and not is_padding[b, j]:
                    seen.append(j)
            for h in range(heads if seen else 0):
                keys, values = k[b, h // group, seen], v[b, h // group, seen]
                out[b, h, i] = (scale * keys @ q[b, h, i]).softmax(0) @ values
    return out


# ---------------------------------------------------------------- the definition


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [False, True])
def test_pair_by_pair(form, causal):
    q, k, v = randn(2, 4, 11, 3), randn(2, 2, 11, 3, seed=1), randn(2, 2, 11, 3, seed=2)
    is_global, is_padding = marks(2, 11, 0.2), marks(2, 11, 0.3, seed=1)
    assert is_global.any() and is_padding.any()
    found = form(
        q, k, v, window=4, causal=causal, global_tokens=is_global, padding=is_padding, scale=0.7
    )
    expected = written_out(q, k, v, 4, causal, is_global, is_padding, 0.7)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    assert bool((found[is_padding[:, None].expand(2, 4, 11)] == 0).all())


def test_windows_by_hand():
    def sees(token, **options):
        return visible_pairs(15, **options)[0, token].nonzero().flatten().tolist()

    first = torch.arange(15) == 0
    assert sees(10, window=4) == [8, 9, 10, 11, 12]
    assert sees(10, window=4, causal=True) == [7, 8, 9, 10]
    assert sees(10, window=4, global_tokens=first) == [0, 8, 9, 10, 11, 12]
    assert sees(0, window=4, global_tokens=first) == list(range(15))
    assert sees(0, window=4, causal=True, global_tokens=first) == [0]
    assert sees(9, window=1, causal=True) == [9]


@pytest.mark.parametrize("form", FORMS)
def test_a_window_over_all_is_attention(form):
    q, k, v = randn(1, 2, 9, 4), randn(1, 1, 9, 4, seed=1), randn(1, 1, 9, 4, seed=2)
    for causal, window in ((False, 18), (True, 9)):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True
        )
        found = form(q, k, v, window=window, causal=causal)
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("tokens", [16, 24])
def test_longformer_attends_to_the_same(tokens):
    """transformers' layer, with its global projections set to be the local ones."""
    config = LongformerConfig(hidden_size=12, num_attention_heads=2, attention_window=[4])
    torch.manual_seed(0)
    layer = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):
        getattr(layer, name + "_global").load_state_dict(getattr(layer, name).state_dict())
    x = randn(2, tokens, 12, dtype=torch.float32)
    is_global, is_padding = marks(2, tokens, 0.1), torch.zeros(2, tokens, dtype=torch.bool)
    is_global[:, 0] = True
    is_padding[1, -5:] = True
    is_global &= ~is_padding
    mask = torch.where(is_padding, -10000.0, torch.where(is_global, 10000.0, 0.0))
    with torch.no_grad():
        expected = layer(
            x,
            attention_mask=mask,
            is_index_masked=mask < 0,
            is_index_global_attn=mask > 0,
            is_global_attn=True,
        )[0]
        heads = [
            projection(x).unflatten(2, (2, 6)).transpose(1, 2)
            for projection in (layer.query, layer.key, layer.value)
        ]
        found = local_attention(*heads, window=4, global_tokens=is_global, padding=is_padding)
    found = found.transpose(1, 2).flatten(2)
    real = ~is_padding
    torch.testing.assert_close(found[real], expected[real], atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [False, True])
def test_flex_attention_agrees_and_visits_the_same_tiles(causal):
    tokens, window, block = 77, 10, 16
    is_global = torch.arange(tokens) == 70
    left, right = (window - 1, 0) if causal else (window // 2, window // 2)

    def mask(_batch, _head, i, j):
        near = (j >= i - left) & (j <= i + right)
        far = is_global[i] | is_global[j]
        return near | (far & (j <= i) if causal else far)

    blocks = create_block_mask(mask, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=block)
    kinds = is_global[None].to(torch.int8)
    schedule = tile_schedule(kinds, left, right, causal, block, block)
    assert torch.equal(schedule[0], blocks.to_dense()[0, 0].bool())
    assert 0.4 < float(schedule.float().mean()) < 0.8
    q, k, v = (randn(1, 2, tokens, 16, seed=i, dtype=torch.float32) for i in range(3))
    expected = flex_attention(q, k, v, block_mask=blocks)
    found = local_attention(q, k, v, window=window, causal=causal, global_tokens=is_global)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 40),
    half=st.integers(1, 20),
    causal=st.booleans(),
    block_q=st.sampled_from([1, 4, 16]),
    block_k=st.sampled_from([1, 8, 16]),
    share=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
def test_schedule_lists_just_the_tiles_with_visible_pairs(
    tokens, half, causal, block_q, block_k, share, seed
):
    is_global = marks(2, tokens, share, seed)
    reach = reach_of(2 * half, causal, tokens)
    schedule = tile_schedule(is_global.to(torch.int8), *reach, causal, block_q, block_k)
    visible = visible_pairs(tokens, window=2 * half, causal=causal, global_tokens=is_global)
    padded = torch.nn.functional.pad(visible, (0, -tokens % block_k, 0, -tokens % block_q))
    tiles = padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).any(4).any(2)
    assert torch.equal(schedule, tiles)
    full = full_tiles(is_global.to(torch.int8), *reach, causal, block_q, block_k)
    tiles = padded.unflatten(2, (-1, block_k)).unflatten(1, (-1, block_q)).all(4).all(2)
    # A tile that one side's global tokens and the window fill together is called masked.
    assert not (full & ~tiles).any()
    if not share:
        assert torch.equal(full, tiles)
    visits = list_visits(schedule, full)
    for row in schedule.nonzero()[:, :2].unique(dim=0).tolist():
        masked, every = visits.counts[*row].tolist()
        mine = visits.tiles[*row, :every].tolist()
        assert sorted(mine) == schedule[*row].nonzero().flatten().tolist()
        assert sorted(mine[masked:]) == full[*row].nonzero().flatten().tolist()


def test_schedules_are_kept_for_the_same_masks_and_made_anew_for_others(monkeypatch):
    made = []
    original = _window.tile_schedule
    monkeypatch.setattr(_window, "tile_schedule", lambda *a: made.append(a) or original(*a))
    monkeypatch.setattr(_window, "_kept", type(_window._kept)())

    def visits(mask, window=5, by_keys=False):
        kinds = _window.kinds_of(64, "cpu", mask, None)
        return visits_of(kinds, Masks(mask, None), window, 0, True, (16, 16), by_keys=by_keys)

    first, again = visits(None), visits(None)
    assert again is first and len(made) == 1
    assert visits(None, window=40) is not first and len(made) == 2
    with torch.inference_mode():  # where text is generated
        generated = visits(None, window=41)
        assert generated is visits(None, window=41)
    assert generated is visits(None, window=41) and len(made) == 3
    mask = torch.arange(64) == 3
    assert visits(mask) is not first and visits(mask) is visits(mask) and len(made) == 4
    before = visits(mask).counts.clone()
    mask[60] = True  # written to
    assert not torch.equal(visits(mask).counts, before) and len(made) == 5
    with torch.inference_mode():
        hidden = torch.arange(64) == 3
        assert visits(hidden).counts.equal(before) and visits(hidden).counts.equal(before)
    assert len(made) == 7  # nothing tells whether such a tensor was written to
    for window in range(6, 6 + 2 * _window.KEPT):
        visits(None, window)
    assert len(_window._kept) == _window.KEPT


def test_schedule_leaves_out_tiles_of_padding_and_nothing_visible():
    kinds = torch.zeros(1, 64, dtype=torch.int8)
    kinds[0, 32:] = PADDING
    schedule = tile_schedule(kinds, 40, 40, False, 16, 16)[0]
    assert schedule[:2, :2].all() and not schedule[2:].any() and not schedule[:, 2:].any()


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 30),
    half=st.integers(1, 20),
    causal=st.booleans(),
    share=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_pairs_are_counted_without_the_table(tokens, half, causal, share, seed):
    options = dict(window=2 * half, causal=causal, global_tokens=marks(2, tokens, share, seed))
    options["padding"] = marks(2, tokens, share, seed + 1)
    counted = count_pairs(tokens, **options)
    assert torch.equal(counted, visible_pairs(tokens, **options).sum((1, 2)))


def test_a_window_visits_7_of_10_tiles():
    """64 tokens in tiles of 16, causal, a window of 10: 7 of 16 tiles, 10 without the window."""
    kinds = torch.zeros(1, 64, dtype=torch.int8)
    schedule = tile_schedule(kinds, *reach_of(10, True, 64), True, 16, 16)[0]
    everything = tile_schedule(kinds, *reach_of(64, True, 64), True, 16, 16)[0]
    assert int(schedule.sum()) == 7 and int(everything.sum()) == 10
    assert schedule.nonzero().tolist() == [[0, 0], *([i, i - n] for i in (1, 2, 3) for n in (1, 0))]

    def mask(_batch, _head, i, j):
        return (j <= i) & (j > i - 10)

    blocks = create_block_mask(mask, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert blocks.sparsity() == 56.25 == 100 * (1 - float(schedule.double().mean()))
    q, k, v = (randn(1, 1, 64, 16, seed=i) for i in range(3))
    found = local_attention_tiled(q, k, v, window=10, causal=True, block=16)
    i = torch.arange(64)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask(0, 0, i[:, None], i)
    )
    torch.testing.assert_close(found, dense, atol=2e-15, rtol=0)


def test_pairs_in_closed_form():
    assert int(count_pairs(64, window=10, causal=True)) == 64 * 10 - 10 * 9 // 2
    assert int(count_pairs(64, window=10)) == 64 * 11 - 2 * (5 + 4 + 3 + 2 + 1)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    """With rows that see nothing, whose gradient must be 0 and not NaN."""
    q, k, v = randn(1, 2, 5, 2), randn(1, 1, 5, 2, seed=1), randn(1, 1, 5, 2, seed=2)
    is_global = torch.tensor([False, True, False, False, False])
    is_padding = torch.tensor([False, False, False, True, True])
    options = dict(window=2, global_tokens=is_global, padding=is_padding)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda q, k, v: form(q, k, v, **options), inputs)


@pytest.mark.parametrize("block", [3, 16, 64])
def test_tile_by_tile_is_the_same_for_any_tile(block):
    q, k, v = randn(2, 4, 37, 8), randn(2, 2, 37, 8, seed=1), randn(2, 2, 37, 8, seed=2)
    options = dict(window=6, global_tokens=marks(2, 37, 0.05), padding=marks(2, 37, 0.2, seed=1))
    expected = local_attention_reference(q, k, v, **options)
    found = local_attention_tiled(q, k, v, **options, block=block)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)


def test_tile_by_tile_does_not_make_the_table():
    """Memory grows with the length: 100,000 tokens would make a table of 40 GB."""
    q = randn(1, 1, 100_000, 1, dtype=torch.float32)
    out = local_attention(q, q, q, window=2, causal=True, padding=torch.arange(100_000) > 200)
    assert out[0, 0, :201].abs().min() > 0 and not out[0, 0, 201:].any()


# ---------------------------------------------------------------- the kernels


def compare(proof, *arguments):
    """With room for a GPU's powers of 2, which may be off by two units in the last place."""
    return proof.compare(*arguments, factor=4.0)


def kernel(proof, **options):
    """Ours and the definition, as functions of (q, k, v)."""

    def ours(q, k, v):
        return local_attention(q, k, v, backend=proof.kernel, **options)

    def reference(q, k, v):
        return local_attention_reference(q, k, v, **options)

    return ours, reference


def tensors(proof, batch, heads, key_heads, tokens, dim, **options):
    return [
        proof.tensor(batch, h, tokens, dim, seed=i, grad=True, **options)
        for i, h in enumerate((heads, key_heads, key_heads))
    ]


@pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
@pytest.mark.parametrize(
    ("shape", "window", "globals_", "layout"),
    [
        ((1, 2, 1, 70, 24), 6, 0.0, "contiguous"),  # two tiles, the second one ragged
        ((2, 1, 1, 64, 16), 2, 0.02, "transposed"),  # nothing ragged
        ((2, 2, 2, 7, 5), 40, 0.2, "strided"),  # less than a tile, a window beyond the text
    ],
)
def test_kernel(proof, dtype, shape, window, globals_, causal, layout):
    batch, _, _, tokens, _ = shape
    q, k, v = tensors(proof, *shape, dtype=dtype, layout=layout)
    options = dict(window=window, causal=causal)
    if globals_:
        options["global_tokens"] = marks(batch, tokens, globals_).to(proof.device)
    compare(proof, *kernel(proof, **options), q, k, v)


def test_kernel_skips_tiles_and_reaches_far_ones(proof):
    """Four tiles by four; one global token in the last tile of one sequence only."""
    q, k, v = tensors(proof, 2, 1, 1, 200, 16)
    is_global = torch.zeros(2, 200, dtype=torch.bool, device=proof.device)
    is_global[1, 199] = True
    schedule = tile_schedule(is_global.to(torch.int8), 4, 4, False, 64, 64)
    assert schedule.sum((1, 2)).tolist() == [10, 14]
    options = dict(window=8, global_tokens=is_global, scale=0.4)
    compare(proof, *kernel(proof, **options), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_masks_nothing_in_full_tiles(proof, dtype, causal):
    """Heads narrower than their tile, a ragged end, padding in a tile that is full without it."""
    q, k, v = tensors(proof, 2, 2, 1, 330, 24, dtype=dtype)
    padding = torch.zeros(2, 330, dtype=torch.bool, device=proof.device)
    padding[1, 70] = True
    kinds = _window.kinds_of(330, proof.device, None, padding)
    reach = reach_of(300, causal, 330)
    full = full_tiles(kinds, *reach, causal, 64, 64).sum((1, 2)).tolist()
    assert full[0] > full[1] > 0
    options = dict(window=300, causal=causal, padding=padding)
    compare(proof, *kernel(proof, **options), q, k, v)


@pytest.mark.parametrize("causal", [False, True])
def test_kernel_gives_zeros_where_nothing_is_seen(proof, causal):
    q, k, v = tensors(proof, 3, 2, 1, 80, 8)
    is_padding = marks(3, 80, 0.4).to(proof.device)
    is_padding[1] = True
    is_padding[2, :70] = True  # and with it the whole first tile
    options = dict(window=4, causal=causal, padding=is_padding)
    out, dq, dk, dv = compare(proof, *kernel(proof, **options), q, k, v)
    hidden = is_padding[:, None, :, None]
    for x in (out, dq, dk, dv):
        assert not bool(x.masked_select(hidden).any())
        assert bool(x.masked_select(~hidden).any())


@pytest.mark.unsanitized
@settings(max_examples=6)
@given(
    batch=st.integers(0, 2),
    key_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    tokens=st.integers(1, 70),
    dim=st.integers(1, 20),
    half=st.integers(1, 40),
    causal=st.booleans(),
    share=st.sampled_from([0.0, 0.1]),
)
def test_kernel_on_any_shape(proof, batch, key_heads, group, tokens, dim, half, causal, share):
    q, k, v = tensors(proof, batch, key_heads * group, key_heads, tokens, dim)
    options = dict(window=2 * half, causal=causal)
    options["global_tokens"] = marks(1, tokens, share)[0].to(proof.device)
    options["padding"] = marks(max(batch, 1), tokens, share, seed=1)[:batch].to(proof.device)
    found = compare(proof, *kernel(proof, **options), q, k, v)
    assert found[0].shape == q.shape


def test_kernel_on_no_tokens(proof):
    q = torch.empty(2, 1, 0, 4, device=proof.device)
    for backend in ("torch", proof.kernel):
        assert local_attention(q, q, q, window=2, backend=backend).shape == (2, 1, 0, 4)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@pytest.mark.parametrize("shape", [(7,), (2, 7)], ids=["one for all", "each their own"])
def test_kernel_takes_masks_that_are_not_contiguous(proof, layout, shape):
    """And queries, keys and values whose last axis is one number."""
    q, k, v = tensors(proof, 2, 2, 1, 7, 5, layout=layout)
    is_global, is_padding = marks(1, 7, 0.4)[0], marks(1, 7, 0.3, seed=1)[0]
    masks = [x.expand(shape).to(proof.device) for x in (is_global, is_padding)]
    if layout == "strided":
        masks = [torch.stack([x, ~x], -1)[..., 0] for x in masks]
    elif shape == (7,):  # one truth for all tokens
        masks = [x[6:].expand(7) for x in masks]
    assert not any(x.is_contiguous() for x in (q, k, v, *masks))
    options = dict(zip(("global_tokens", "padding"), masks), window=2)
    compare(proof, *kernel(proof, **options), q, k, v)


def test_kernel_finds_places_beyond_32_bits(proof):
    q = proof.tensor(1, 1, 5, 3, dtype=torch.float16)
    near = local_attention(q, q, q, window=2, backend=proof.kernel)
    far = proof.far(q, axis=2)
    assert torch.equal(local_attention(far, far, far, window=2, backend=proof.kernel), near)


def test_kernel_with_large_scores(proof):
    """Scores of 1,000: their powers are far beyond float32, their differences are not."""
    q, k, v = (x.detach() for x in tensors(proof, 1, 1, 1, 40, 16))
    options = dict(window=8, causal=True, scale=300.0)
    out = local_attention(q, k, v, backend=proof.kernel, **options)
    expected = local_attention_reference(q.double(), k.double(), v.double(), **options)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)


def test_kernel_reads_heads_where_a_projection_wrote_them(proof):
    """Heads side by side, keys and values shared by all sequences, a gradient of one number."""
    packed = proof.tensor(2, 9, 2 * 16, grad=True)
    shared = proof.tensor(1, 1, 9, 16, seed=1).expand(2, 1, 9, 16)

    def run(backend):
        q = packed.view(2, 9, 2, 16).transpose(1, 2)
        out = local_attention(q, shared, shared, window=4, backend=backend)
        return out, torch.autograd.grad(out.sum(), packed)[0]

    for ours, expected in zip(run(proof.kernel), run("torch")):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_blocks_shrink_for_wide_heads():
    """Tiles are what fits: 64 rows at most, 16 at least, and heads of 256 at most."""

    def of(holds, dim, dtype, arch=80):
        found = module._settings(holds, dim, dtype, True, arch)
        return found["BLOCK_Q"], found["BLOCK_K"], found["BLOCK_D"], found["num_warps"]

    assert of("rows", 5, torch.float16) == (64, 64, 16, 4)
    assert of("rows", 128, torch.float16) == (64, 64, 128, 4)
    assert of("rows", 256, torch.bfloat16) == (64, 32, 256, 4)
    assert of("columns", 128, torch.float16) == (32, 64, 128, 4)
    assert of("columns", 256, torch.float16) == (32, 32, 256, 4)
    assert of("columns", 256, torch.float16, arch=90) == (32, 64, 256, 8)
    assert of("columns", 256, torch.float32) == (16, 16, 256, 8)


def test_wide_heads_take_the_reference(proof):
    q = proof.tensor(1, 1, 3, 260)
    with pytest.raises(ValueError, match="heads of 260 are too wide"):
        local_attention(q, q, q, window=2, backend=proof.kernel)
    torch.testing.assert_close(
        local_attention(q, q, q, window=2), local_attention_reference(q, q, q, window=2)
    )


# ---------------------------------------------------------------- bad input


def test_shapes_that_do_not_fit():
    q, k = torch.ones(2, 4, 6, 8), torch.ones(2, 2, 6, 8)
    with pytest.raises(ValueError, match=r"k has shape \(2, 2, 5, 8\).*q of shape \(2, 4, 6, 8\)"):
        local_attention(q, k[:, :, 1:], k, window=2)
    with pytest.raises(ValueError, match=r"v has shape \(2, 2, 6, 4\).*k of shape \(2, 2, 6, 8\)"):
        local_attention(q, k, k[..., :4], window=2)
    with pytest.raises(ValueError, match="4 query heads cannot share 3"):
        local_attention(q, torch.ones(2, 3, 6, 8), torch.ones(2, 3, 6, 8), window=2)
    with pytest.raises(ValueError, match=r"padding has shape \(3, 6\).*\(2, 4, 6, 8\).*\(2, 6\)"):
        local_attention(q, k, k, window=2, padding=torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"global_tokens has shape \(5,\).*must be \(6,\)"):
        local_attention(q, k, k, window=2, global_tokens=torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="batch, heads, time, dim"):
        local_attention(q[0], k[0], k[0], window=2)


def test_numbers_that_do_not_fit():
    q = torch.ones(1, 1, 4, 8)
    for window, causal in ((0, True), (3, False), (-2, False)):
        with pytest.raises(ValueError, match=f"window is {window}; it must be positive"):
            local_attention(q, q, q, window=window, causal=causal)
    with pytest.raises(TypeError, match="global_tokens is of int64; it must be bool"):
        local_attention(q, q, q, window=2, global_tokens=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(TypeError, match="float16, float32; they must agree"):
        local_attention(q, q.half(), q, window=2)
    with pytest.raises(TypeError, match="scale is a tensor; it must be a number"):
        local_attention(q, q, q, window=2, scale=torch.tensor(1.0, requires_grad=True))
    with pytest.raises(TypeError, match="q is of int64"):
        local_attention(q.long(), q.long(), q.long(), window=2)
    with pytest.raises(ValueError, match="on cpu and meta; they must be on one device"):
        local_attention(q, q, q.to("meta"), window=2)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        local_attention(q, q, q, window=2, backend="fast")
