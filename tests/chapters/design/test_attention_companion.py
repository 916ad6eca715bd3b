"""The companion of the chapter on attention: exercises, live readings, tables, drawings, panels."""

import math
from types import SimpleNamespace

import pytest
import torch

from effnb.chapters.design.attention import (
    drawings,
    exercises,
    forms,
    graphs,
    panels,
    streaming,
    tables,
)
from effnb.chapters.design.attention.heads import Heads, heads_of
from effnb.design.attention import (
    CacheShape,
    count_pairs,
    entmax15,
    online_softmax,
    window_pattern,
)
from effnb.evaluation.quality import token_losses
from effnb.lab import load, results

EXERCISES = [exercises.merging, exercises.room, exercises.pairs]


@pytest.fixture(scope="module")
def small():
    return load("mini-300k", device="cpu").model


def words(rows, count, seed=0):
    return torch.randint(2, 4000, (rows, count), generator=torch.Generator().manual_seed(seed))


# --- exercises ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_every_answer_gets_its_own_diagnosis(exercise):
    exercise.selftest()


def test_references_agree_with_the_package():
    scores, values = torch.tensor([1.0, -2, 3, 0.5]), torch.tensor([[4.0], [2], [-8], [1]])
    halves = [
        online_softmax(scores[part], values[part], block=2)[0] for part in (slice(2), slice(2, 4))
    ]
    m, total, out = exercises.merged(*(float(x) for s in halves for x in (s.m, s.l, s.o)))
    assert m == 3
    want = (scores.softmax(0) @ values).item()
    assert out / total == pytest.approx(want, rel=1e-5)
    for tokens, window, sinks in ((30, 8, 4), (5, 8, 2), (12, 3, 1)):
        pattern = window_pattern(tokens, window, causal=True, global_tokens=min(sinks, tokens))
        assert exercises.seen_pairs(tokens, window, sinks) == count_pairs(pattern)
    shape = CacheShape(layers=6, heads=8, kv_heads=4, head_dim=32)
    tokens = exercises.longest(2**20, 6, 4, 32, 16)
    assert shape.bytes(tokens) <= 2**20 < shape.bytes(tokens + 1)


# --- a cache that forgets -------------------------------------------------------------------------


def test_a_text_read_through_a_whole_cache_has_the_model_s_own_losses(small):
    ids = words(2, 40)
    past = streaming.empty_cache(small, streaming.EVERYTHING, 0)
    found = streaming.read(small, ids, past, chunk=4)
    torch.testing.assert_close(found[:, 1:], token_losses(small, ids), rtol=1e-4, atol=1e-4)
    assert found[:, 0].tolist() == [0, 0]
    assert past.get_seq_length() == 40


@pytest.mark.parametrize("sinks", [0, 2])
def test_losses_change_only_when_a_small_cache_is_full(small, sinks):
    ids = words(1, 40)
    whole, less = (
        streaming.read(small, ids, streaming.empty_cache(small, window, sinks), chunk=1)
        for window in (streaming.EVERYTHING, 16)
    )
    # Token 16 is predicted by token 15, which sees sixteen; token 17 would need one more.
    torch.testing.assert_close(less[:, :17], whole[:, :17], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(less[:, 17:], whole[:, 17:], atol=1e-3)


def test_a_cache_needs_room_beside_its_sinks(small):
    with pytest.raises(ValueError, match="a cache of 4 tokens has no room"):
        streaming.empty_cache(small, 4, 4)
    assert streaming.empty_cache(small, 16, 4).window == 12


def test_the_same_draws_meet_every_cache(small):
    ids = words(1, 12)
    texts = []
    for window in (streaming.EVERYTHING, 64):
        past = streaming.empty_cache(small, window, 0)
        streaming.read(small, ids, past)
        texts.append(streaming.written(small, ids[:, -1:], past, 5).tolist())
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 5


def test_bins_leave_the_first_place_aside():
    losses = torch.tensor([[0.0, 2, 4, 6], [0.0, 4, 4, 2]])
    assert streaming.binned(losses, 2) == [3.0, 4.0]


# --- the heads of a model -------------------------------------------------------------------------


def test_heads_are_those_of_the_model_with_its_own_softmax(small):
    seen = heads_of(small, words(2, 24), alpha=1.0)
    assert len(seen) == small.config.num_hidden_layers
    one = seen[0]
    assert one.causal and one.q.shape == one.k.shape
    scores = (one.q @ one.k.mT / one.q.shape[3] ** 0.5).masked_fill(~one.visible, -torch.inf)
    torch.testing.assert_close(one.weights, scores.softmax(-1), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def heads():
    """Two texts whose queries look for keys of their own kind."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (2 * torch.randn(2, 3, 64, 8, generator=draw) for _ in range(3))
    weights = entmax15(q @ k.mT / 8**0.5)
    return Heads(q, k, v, weights, causal=False)


@pytest.mark.parametrize("name", forms.FORMS)
def test_every_form_has_the_shape_of_attention_and_an_error(name):
    q, k, v = (
        torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    )
    assert forms.FORMS[name].run(q, k, v, 32).shape == v.shape
    error = forms.error(name, q, k, v, 32)
    assert error.shape == (2,) and bool((error > 0).all())


def test_a_budget_of_all_keys_is_exact():
    q, k, v = (
        torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3)
    )
    assert float(forms.error("window", q, k, v, 128).max()) < 1e-5
    assert float(forms.error("Linformer", q, k, v, 64).max()) < 1e-5
    torch.testing.assert_close(forms.full(q, k, v), forms.with_table(q, k, v), atol=1e-5, rtol=1e-4)


def test_a_looser_rule_finds_more(heads):
    found = graphs.Finder(heads, rank=3, steps=5)
    for rule in ("quantization", "distance"):
        settings = (16, 4) if rule == "quantization" else (0.05, 0.6)
        few, many = (found.judge(rule, setting, heads) for setting in settings)
        assert sum(few.recall) < sum(many.recall)
        assert sum(few.sparsity) > sum(many.sparsity)


def test_recall_between_two_settings_is_on_the_line():
    curve = [graphs.Point(1, (0.8,), (0.4,)), graphs.Point(2, (0.4,), (0.8,))]
    assert graphs.recall_at(curve, [0.6]) == [0.6]
    assert graphs.recall_at(curve, [0.0]) == [1.0]
    mean = graphs.mean_points([graphs.Point(2, (0.2,), (0.5,)), graphs.Point(2, (0.4,), (0.7,))])
    assert mean.recall == pytest.approx((0.3,)) and mean.sparsity == pytest.approx((0.6,))


# --- stored results -------------------------------------------------------------------------------

WHOLE = streaming.EVERYTHING


def streamed(model, trained, high):
    caches = {(WHOLE, 0): high[0], (256, 0): high[1], (256, 4): high[2]}
    return {
        "model": model, "bin": 64, "length": 1024, "trained": trained,
        "table": [
            {"window": w, "sinks": s, "curve": [3.0] * 8 + [level] * 8, "text": " and so on"}
            for (w, s), level in caches.items()
        ],
    }  # fmt: skip


REAL = streamed("smollm2-135m", 8192, (3.0, 6.0, 3.1))
MINI = streamed("mini-5m", 512, (5.0, 3.5, 3.5))
RECURRENCE = [
    {
        "trained": t, "read": r, "seed": seed, "documents": [level, level + 0.1],
        "start_documents": [level + 0.2] * 2, "places": [level] * 16,
    }
    for (t, r), level in zip(tables.READ, (2.0, 1.8, 1.75, 1.9, 2.1, 1.85)) for seed in (0, 1)
]  # fmt: skip
GROUPED = {
    "model": "mini-300k", "heads": 2, "steps": 30,
    "table": [
        {"pooling": p, "seed": seed, "steps": n, "documents": [level - n / 100 + i / 10 * seed
                                                                for i in range(4)]}
        for p, level in (("none", 4.0), ("mean", 5.0), ("first", 5.5), ("random", 8.0))
        for seed in (0, 1) for n in (0, 30)
    ],
}  # fmt: skip
COSTS = [
    {
        "method": m, "tokens": t, "peak_bytes": 2**20 * t // 1024,
        "seconds": [1e-3 * (t / 1024) ** (2 if m.startswith("full") else 1) * (1 if m[0] == "f"
                                                                               else 3)] * 3,
    }
    for m in tables.ORDER for t in (1024, 8192)
]  # fmt: skip
NEEDLE = [
    {"method": m, "seed": s, "right": r}
    for m, r in (("full", 0.9), ("window", 0.1), ("window and global", 0.8)) for s in (0, 1)
]  # fmt: skip
CURVES = {rule: [(2, 0.8, 0.5), (4, 0.5, 0.9)] for rule in graphs.SETTINGS}
PATTERNS = [
    {"model": model, "seed": seed} | row
    for model in ("minilm-l6", "mini-5m") for seed in (0, 1)
    for row in (
        {"method": "quantization", "recall": [0.7], "sparsity": [0.6]},
        {"method": "window like quantization", "recall": [0.6]},
        {"method": "curves", "curves": CURVES | {"distance": [(2, 0.8 + seed / 10, 0.5)]}},
    )
]  # fmt: skip


def test_sentences_say_what_is_stored():
    said = tables.sinks_said(REAL)
    assert f"{math.exp(3.1):.1f} with a cache of 256 tokens" in said
    assert f"{math.exp(6.0):,.1f} with one that does not" in said
    mini = tables.mini_said(MINI)
    assert "Sinks make no difference worth naming" in mini
    assert f"{math.exp(5.0):,.0f} with everything kept" in mini
    needed = streamed("mini-5m", 512, (5.0, 6.0, 3.5))
    assert "Sinks change the loss by up to 2.50 nats" in tables.mini_said(needed)
    said = tables.grouped_said(GROUPED)
    assert "raises the loss by 1.00 nats; after 30 steps, 0.70 of them remain" in said
    assert "then below taking the first head" in said
    assert tables.written_said(REAL).startswith("keeps everything: … and so on")
    assert "8,192 is the shortest" in tables.costs_said(COSTS)
    slow = [row for row in COSTS if row["tokens"] == 1024]
    assert tables.costs_said(slow).startswith("At no length")
    assert "full 90%, window 10% and window and global 80%" in tables.needle_said(NEEDLE)
    assert "70% of the pairs in use among 40% of all pairs" in tables.patterns_said(PATTERNS)


def test_means_are_over_seeds():
    assert tables.mean_of(RECURRENCE, "memory", "memory") == pytest.approx(1.85)
    assert tables.mean_of(RECURRENCE, "memory", "nothing") is None
    said = tables.recurrence_said(RECURRENCE)
    assert "changes its loss by +0.100 nats" in said and "costs it +0.100 nats" in said
    assert tables.recurrence_said(RECURRENCE[:2]).startswith("The readings are not")
    rule = tables.recall_curves(PATTERNS, "mini-5m")["distance"]
    assert rule[0] == pytest.approx((2, 0.85, 0.5))
    assert tables.label(WHOLE, 0) == "keeps everything"
    assert tables.label(256, 4) == "latest 252 and the first 4"
    assert tables.label(256, 0) == "latest 256"


@pytest.mark.parametrize(
    ("draw", "data"),
    [
        (drawings.result, (REAL, MINI)), (drawings.growth, (COSTS,)),
        (drawings.places, (RECURRENCE,)), (drawings.recall, (PATTERNS,)),
        (tables.recurrence_table, (RECURRENCE,)), (tables.grouped_table, (GROUPED,)),
        (tables.costs_table, (COSTS,)), (tables.grouped_said, (GROUPED,)),
        (panels.sinks, (REAL, MINI)),
    ],
)  # fmt: skip
def test_what_is_stored_is_drawn_and_what_is_missing_says_so(draw, data):
    assert str(draw(*data)) or repr(draw(*data))
    missing = results.NotMeasured("02_design/1_attention/nothing")
    assert draw(*[missing] * len(data)) is missing


def test_a_picture_that_needs_no_measurement():
    assert "causal: 52% of all pairs" in drawings.masks(24).alt


# --- panels ---------------------------------------------------------------------------------------


def test_the_stored_panel_moves_and_knows_its_answer():
    shown = panels.sinks(REAL, MINI)
    shown.sweep()
    found = shown.at(model="smollm2-135m", cache="latest 256").result
    assert panels.times_choice(found["end"] / found["whole"]) == "more than five times"
    assert shown.predict.answer(found) in shown.predict.choices
    assert panels.times_choice(1.0) == "about the same"


def test_every_position_of_the_masks_has_a_pattern():
    shown = panels.masks()
    shown.sweep()
    layers = {g: shown.at(globals_=g).result["layers"] for g in (0, 1)}
    assert layers == {0: 16, 1: 2}
    assert "never" in shown.at(pattern="causal window with sinks", window=4).text or (
        shown.at(pattern="causal window with sinks", window=4).result["layers"] > 2
    )


def test_the_live_panel_reads_through_its_cache(small, monkeypatch):
    monkeypatch.setattr(panels, "long_texts", lambda *_, **__: words(1, 128))
    tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids.tolist())))
    shown = panels.live(SimpleNamespace(model=small, tokenizer=tokenizer), lengths=(64, 128))
    few = shown.at(window=32, sinks=0, length=128)
    many = shown.at(window=512, sinks=4, length=128)
    assert few.result["curve"][0] != many.result["curve"][0]
    assert many.result["curve"] == pytest.approx(many.result["whole"], abs=1e-3)
    assert few.result["bytes"] == CacheShape.of(small).bytes(32)
    assert "It writes on" in few.text


def test_fewer_heads_of_keys_take_less_and_cost_more(small):
    shown = panels.groups(SimpleNamespace(model=small, windows=words(3, 40)))
    alone, shared = (shown.at(shared=n, pooling="random") for n in (2, 4))
    assert alone.result["loss"] == pytest.approx(alone.result["original"], rel=0.5)
    assert shared.result["bytes"] == alone.result["bytes"] / 2
    shown.sweep()


def test_the_finder_shows_its_pairs(heads):
    shown = panels.finder(graphs.Finder(heads, rank=3, steps=3), heads)
    low, high = (shown.at(rule="distance", step=n).result["point"] for n in (1, 5))
    assert low[1] < high[1] and low[2] > high[2]
    assert "Pairs left out" in shown.at(rule="window", step=2).text


def test_cheap_forms_move():
    q, k, v = (torch.randn(1, 2, 512, 16) for _ in range(3))
    shown = panels.approximations(Heads(q, k, v, q @ k.mT, causal=False))
    few, many = (shown.at(form="window", budget=b).result["errors"] for b in (16, 128))
    assert many < few
    assert shown.at(form="LSH").result["curves"]["window"][128] == pytest.approx(sum(many) / 2)
    assert "Median error" in shown.at(form="LSH", budget=32, length=256).text
