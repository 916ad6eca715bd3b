"""Long texts: losses against the plain definition, chunks, strides, the same targets, recall."""

import math
from types import SimpleNamespace

import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.evaluation import (
    PositionLosses,
    RecallGrid,
    chunked_losses,
    context_losses,
    perplexity,
    position_losses,
    recall_grid,
)
from effnb.evaluation.quality import token_losses


@pytest.fixture(scope="module")
def model():
    return zoo.make("llama").float()


class Copier(nn.Module):
    """Says that the next token is the one `distance` before it, at the first `reach` places."""

    def __init__(self, vocabulary=50, distance=5, reach=10**9):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.vocabulary, self.distance, self.reach = vocabulary, distance, reach

    def forward(self, input_ids, use_cache=False):
        before = nn.functional.pad(input_ids, (self.distance - 1, 0))[:, : input_ids.shape[1]]
        before[:, self.reach :] = 0
        logits = self.scale * nn.functional.one_hot(before, self.vocabulary).float()
        return SimpleNamespace(logits=logits)


# --- losses


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2 window", "gpt2", "cohere2", "bloom"])
def test_chunks_change_nothing(name):
    """Heads of every kind: plain, soft-capped, scaled, tied."""
    model, ids = zoo.make(name), zoo.words(2, 30)
    with torch.no_grad():
        want = token_losses(model, ids)
    for chunk in (1, 7, 100):
        torch.testing.assert_close(chunked_losses(model, ids, chunk), want, rtol=1e-5, atol=1e-5)
    last = chunked_losses(model, ids, 4, last=9)
    torch.testing.assert_close(last, want[:, -9:], rtol=1e-5, atol=1e-5)


def test_the_head_sees_one_chunk_at_a_time(model):
    """Its blocks run once; the largest logits are those of a chunk."""
    sizes, passes = [], []
    hooks = [
        model.lm_head.register_forward_hook(lambda m, a, out: sizes.append(out.shape[1])),
        model.model.register_forward_hook(lambda m, a, out: passes.append(out[0].shape[1])),
    ]
    chunked_losses(model, zoo.words(1, 64), chunk=10)
    for hook in hooks:
        hook.remove()
    assert max(sizes) == 10
    assert sorted(passes) == [4, 4, 64]  # and two probes


@settings(max_examples=25)
@given(st.integers(4, 20), st.integers(1, 20), st.integers(20, 60), st.integers(1, 4))
def test_positions_are_those_of_windows_written_out(context, stride, length, batch_size):
    model = Copier()
    stride = min(stride, context)
    ids = torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length))
    found = position_losses(
        model, ids, context=context, stride=stride, batch_size=batch_size, chunk=3
    )
    places = {p: [] for p in range(1, context)}
    for start in range(0, length - context + 1, stride):
        with torch.no_grad():
            loss = token_losses(model, ids[None, start : start + context])[0]
        for place in range(1 if start == 0 else max(1, context - stride), context):
            places[place].append(float(loss[place - 1]))
    for place, losses in places.items():
        assert found.tokens[place - 1] == len(losses)
        if losses:
            assert found.nats[place - 1] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        else:
            assert math.isnan(found.nats[place - 1])
    everything = [loss for losses in places.values() for loss in losses]
    assert found.total.tokens == len(everything)
    assert found.total.nats_per_token == pytest.approx(sum(everything) / len(everything), abs=1e-5)


def test_a_short_stride_is_sliding_window_perplexity(model):
    """Where windows end with the text, it is what `perplexity` finds."""
    ids = zoo.words(1, 16 + 8 * 4)[0]
    found = position_losses(model, ids, context=16, stride=8, batch_size=3).total
    want = perplexity(model, ids, context=16, stride=8)
    assert found.tokens == want.tokens == len(ids) - 1
    assert found.nats_per_token == pytest.approx(want.nats_per_token, abs=1e-5)
    # Averaging windows' means counts the tokens of the first window, which scores more, less.
    first = position_losses(model, ids[:16], context=16).total.nats_per_token
    rest = (found.nats_per_token * found.tokens - first * 15) / 32
    assert abs((first + 4 * rest) / 5 - found.nats_per_token) > 1e-4


def test_a_model_that_stops_is_seen_where_it_stops():
    text = torch.randint(1, 50, (4, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 12)
    found = position_losses(Copier(reach=31), text, context=60)
    assert found.tokens == (4,) * 59
    assert found.between(5, 32).nats_per_token < 0.01 < 8 < found.between(32, 60).nats_per_token
    assert found.between(0, 10**6).nats_per_token == pytest.approx(found.total.nats_per_token)
    assert found.between(10, 11).tokens == 4
    with pytest.raises(ValueError, match="at the places 60 to 69"):
        found.between(60, 70)


def test_the_same_tokens_at_every_length():
    """The copier needs 5 tokens before each target: shorter contexts cannot foresee them."""
    text = torch.randint(1, 50, (7, 5), generator=torch.Generator().manual_seed(1)).repeat(1, 8)
    found = context_losses(Copier(), text, [4, 6, 12, 40], targets=3, batch_size=2, chunk=2)
    assert found.contexts == (4, 6, 12, 40) and found.tokens == 21
    assert (
        found.nats[0] > 1 and found.nats[2] == pytest.approx(found.nats[3]) and found.nats[3] < 0.01
    )
    assert found.perplexity[2] == pytest.approx(math.exp(found.nats[2]))
    assert [len(one) for one in found.windows] == [7] * 4
    with torch.no_grad():
        want = token_losses(Copier(), text[:, -6:])[:, -3:].mean(1)
    assert found.windows[1] == pytest.approx(want.tolist(), abs=1e-6)


def test_dynamic_ntk_reads_the_same_in_one_pass_and_in_parts():
    from effnb.design.context import dynamic_ntk

    found, text = dynamic_ntk(zoo.make("llama"), trained_length=16), zoo.words(1, 40)
    short = position_losses(found, text[:, :20], context=20)
    long = position_losses(found, text, context=40)
    assert long.nats[:19] == pytest.approx(short.nats, abs=1e-6)


# --- recall


def plant(length, depth, seed):
    """A mark and a value somewhere, and the mark again at the end; the answer is the value."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (length,), generator=generator)
    place = round(depth * (length - 4))
    ids[place], ids[-2] = 1, 1
    ids[-1] = ids[place + 1]
    return ids, length - 1


class Finder(nn.Module):
    """Foresees, at a mark, what came after the same mark before; only `reach` tokens back."""

    def __init__(self, reach):
        super().__init__()
        self.weight, self.reach = nn.Parameter(torch.tensor(20.0)), reach
        self.shapes = []

    def forward(self, input_ids, use_cache=False, logits_to_keep=slice(None)):
        self.shapes.append(tuple(input_ids.shape))
        logits = torch.zeros(*input_ids.shape, 50)
        for row, ids in enumerate(input_ids.tolist()):
            for at, token in enumerate(ids):
                earlier = [i for i in range(max(0, at - self.reach), at) if ids[i] == token == 1]
                if earlier:
                    logits[row, at, ids[earlier[-1] + 1]] = self.weight
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def test_recall_by_depth_and_length():
    found = recall_grid(Finder(reach=20), plant, [12, 30], [0.0, 0.5, 1.0], trials=5, batch_size=3)
    assert found.lengths == (12, 30) and found.depths == (0.0, 0.5, 1.0) and found.trials == 5
    assert found.correct[0] == (5, 5, 5)
    assert found.correct[1][1:] == (5, 5) and found.correct[1][0] < 5
    assert found.accuracy[0] == (1.0, 1.0, 1.0) and found.by_length[0] == 1.0
    assert found.nats[0][0] < 1e-3 < 1 < found.nats[1][0]
    assert found.standard_error(12, 0.5) == 0
    half = RecallGrid((8,), (0.5,), ((2,),), 4, ((1.0,),))
    assert half.standard_error(8, 0.5) == 0.25
    with pytest.raises(ValueError):
        half.standard_error(9, 0.5)


def test_answers_of_several_tokens_and_prompts_of_several_lengths(model):
    """Against each prompt alone, without padding, token by token."""

    def make(length, depth, seed):
        ids = torch.randint(
            3, 96, (length - seed % 3,), generator=torch.Generator().manual_seed(seed)
        )
        if seed % 2:  # what the model would say itself, so that some are right
            with torch.no_grad():
                ids[-1] = model(input_ids=ids[None, :-1]).logits[0, -1].argmax()
            return ids.tolist(), len(ids) - 1
        return ids, [len(ids) - 2, len(ids) - 1]

    found = recall_grid(model, make, [20], [0.3], trials=6, batch_size=4)
    hits, losses = 0, []
    for seed in range(6):
        ids, places = make(20, 0.3, seed)
        ids, places = torch.as_tensor(ids), [places] if isinstance(places, int) else places
        with torch.no_grad():
            logs = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        hits += all(int(logs[p - 1].argmax()) == int(ids[p]) for p in places)
        losses.append(-sum(float(logs[p - 1, ids[p]]) for p in places) / len(places))
    assert found.correct == ((hits,),) and hits >= 3
    assert found.nats[0][0] == pytest.approx(sum(losses) / 6, abs=1e-4)


def test_prompts_are_batched():
    model = Finder(reach=99)
    recall_grid(model, plant, [12], [0.5], trials=5, batch_size=2, seed=7)
    assert [shape for shape in model.shapes if shape[1] == 12] == [(2, 12), (2, 12), (1, 12)]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: position_losses(m, zoo.words(1, 9), context=10), "at least 10 tokens"),
        (lambda m: position_losses(m, zoo.words(1, 9), context=1), "context is 1"),
        (lambda m: position_losses(m, zoo.words(1, 9), context=4, stride=5), "stride 5"),
        (lambda m: position_losses(m, zoo.words(1, 9), context=4, batch_size=0), "batch_size is 0"),
        (lambda m: position_losses(m, zoo.words(1, 9), context=4, chunk=0), "chunk 0"),
        (lambda m: context_losses(m, zoo.words(1, 9), []), "contexts are"),
        (lambda m: context_losses(m, zoo.words(1, 9), [4], targets=4), "longer than the targets"),
        (lambda m: context_losses(m, zoo.words(1, 9), [40], targets=4), "at least 40 tokens"),
        (lambda m: recall_grid(m, plant, [], [0.5]), "lengths are"),
        (lambda m: recall_grid(m, plant, [9], [1.5]), "depths lie between 0 and 1"),
        (lambda m: recall_grid(m, plant, [9], [0.5], trials=0), "trials is 0"),
        (lambda m: recall_grid(m, lambda *_: ([1, 2], 2), [9], [0.5]), "answer at .2."),
        (lambda m: recall_grid(m, lambda *_: ([1, 2], []), [9], [0.5]), "behind its first token"),
    ],
)
def test_what_is_refused(model, call, said):
    with pytest.raises(ValueError, match=said):
        call(model)


def test_models_of_too_few_positions_or_that_look_ahead():
    with pytest.raises(ValueError, match="128 tokens only"):
        position_losses(zoo.make("gpt2"), zoo.words(1, 140), context=130)
    with pytest.raises(ValueError, match="128 tokens only"):
        recall_grid(zoo.make("gpt2"), plant, [130], [0.5])
    with pytest.raises(ValueError, match="sees the tokens behind"):
        context_losses(zoo.make("bert"), zoo.words(1, 40), [40])
    with pytest.raises(ValueError, match="sees the tokens behind"):
        recall_grid(zoo.make("bert"), plant, [12], [0.5])


def test_results_are_frozen():
    with pytest.raises(AttributeError):
        PositionLosses((1.0,), (1,)).nats = ()
