"""The four language models: forms, states, padding, generation, files, twins, training."""

import inspect
import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.muon import hidden_matrices
from effnb.core.training import TrainingSettings, train
from effnb.design.retention import (
    GLALM,
    RWKVLM,
    GLAConfig,
    HyenaConfig,
    HyenaLM,
    LMConfig,
    RecurrentLM,
    RetNetConfig,
    RetNetLM,
    RWKVConfig,
    llama_parameters,
    lm_loss,
)

MODELS = {
    "retnet": (RetNetLM, RetNetConfig, dict(heads=2, chunk_size=4)),
    "rwkv": (RWKVLM, RWKVConfig, {}),
    "hyena": (HyenaLM, HyenaConfig, dict(max_length=32, filter_width=8, filter_features=5)),
    "gla": (GLALM, GLAConfig, dict(heads=2, chunk_size=4)),
}
SHAPES = {  # those of data/train_models.py: hidden, feed-forward, layers, heads, key-value heads
    "mini-300k": (64, 128, 2, 4, 2),
    "mini-1m": (128, 344, 4, 4, 2),
    "mini-5m": (256, 688, 6, 8, 4),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name, seed=0, dtype=torch.float64, **settings):
    """A tiny model with weights all of which matter."""
    kind, config, options = MODELS[name]
    sizes = dict(hidden=8, layers=2, feed_forward=12, vocabulary=23)
    torch.manual_seed(seed)
    model = kind(config(**(sizes | options | settings)))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape) / p.shape[-1] ** 0.5)
            else:
                p.add_(0.2 * torch.randn(p.shape))
    return model.to(dtype).eval()


def some_ids(tokens=11, batch=2, seed=1):
    return torch.randint(0, 23, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def close(found, expected, atol=1e-10):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# ---------------------------------------------------------------- forms and states


@every_model
def test_all_forms_give_the_same_logits_and_gradients(name):
    model, ids = build(name), some_ids()
    found = []
    for form in model.forms:
        logits = model(ids, form=form)
        close(logits, model.lm_head(model.hidden(ids, form=form)))
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape)
        value = (logits.log_softmax(-1) * weights).sum()
        found.append([logits, *torch.autograd.grad(value, list(model.parameters()))])
    assert all((gradient != 0).any() for gradient in found[0])
    for other in found[1:]:
        for a, b in zip(other, found[0]):
            close(a, b)
    close(model(ids), found[0][0], 0)  # the first form is the one that is used


@settings(max_examples=10)
@given(
    name=st.sampled_from(list(MODELS)),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    forms=st.randoms(use_true_random=False),
)
def test_a_text_read_in_parts_is_the_text_read_at_once(name, cuts, forms):
    model = build(name)
    ids = some_ids(sum(cuts))
    whole, end = model.advance(ids)
    close(whole, model.hidden(ids))
    parts, state = [], None
    for part in ids.split(cuts, 1):
        hidden, state = model.advance(part, state, form=forms.choice(model.forms))
        parts.append(hidden)
    close(torch.cat(parts, 1), whole)
    assert state.position == end.position == ids.shape[1]
    following = some_ids(3, seed=5)
    close(model.advance(following, state)[0], model.advance(following, end)[0])


@every_model
def test_a_state_is_not_changed_by_going_on_from_it(name):
    model, ids = build(name), some_ids()
    _, state = model.advance(ids)
    before = [{key: t.clone() for key, t in layer.items()} for layer in state.layers]
    first, _ = model.advance(ids, state)
    second, _ = model.advance(ids, state)
    close(first, second, 0)
    for was, layer in zip(before, state.layers):
        assert all(torch.equal(was[key], layer[key]) for key in layer)


@pytest.mark.parametrize("name", ["retnet", "rwkv", "gla"])
def test_the_state_has_one_size_however_much_was_read(name):
    model = build(name, dtype=torch.float32)
    sizes = {model.initial_state(1).bytes}
    stream = model.stream(some_ids(3, batch=1))
    sizes |= {next(stream)[1].bytes for _ in range(20)}
    assert len(sizes) == 1
    assert model.initial_state(3).bytes == 3 * sizes.pop()


def test_the_state_of_hyena_grows_by_the_width_per_token_and_layer():
    model = build("hyena", dtype=torch.float32)
    stream = model.stream(some_ids(3, batch=1))
    sizes = [next(stream)[1].bytes for _ in range(6)]
    assert {b - a for a, b in pairwise(sizes)} == {2 * 8 * 4}


@every_model
@pytest.mark.parametrize("form", [0, 1, 2])
def test_logits_depend_on_the_past_and_the_present_only(name, form):
    model, ids = build(name), some_ids(7)
    form = model.forms[form % len(model.forms)]
    table = model.embedding.weight.detach()
    inputs = table[ids].requires_grad_()
    model.embedding = nn.Module()
    model.embedding.weight, model.embedding.forward = table, lambda ids: inputs
    hidden = model.hidden(ids, form=form)
    value = (hidden[:, 4] * torch.arange(1.0, 9)).sum()  # a norm's plain sum does not change
    seen = torch.autograd.grad(value, inputs)[0].abs().sum((0, 2))
    assert bool((seen[:5] > 1e-6).all())
    assert bool((seen[5:] < 1e-12).all())


# ---------------------------------------------------------------- padding


@every_model
def test_padding_on_either_side_changes_nothing(name):
    model = build(name)
    long, short = some_ids(9, batch=1), some_ids(6, batch=1, seed=2)
    expected = model(long)[0], model(short)[0]
    pad = torch.full((1, 3), 7)
    for form in model.forms:
        left = torch.cat([long, torch.cat([pad, short], 1)])
        mask = torch.ones(2, 9)
        mask[1, :3] = 0
        found = model(left, mask=mask, form=form)
        close(found[0], expected[0])
        close(found[1, 3:], expected[1])
        right = torch.cat([long, torch.cat([short, pad], 1)])
        found = model(right, mask=mask.flip(1).bool(), form=form)
        close(found[0], expected[0])
        close(found[1, :6], expected[1])
    # Padding left unmasked is text like any other
    assert (model(left)[1, 3:] - expected[1]).abs().max() > 1e-3


@every_model
def test_prompts_of_different_lengths_go_on_together_as_alone(name):
    model = build(name)
    long, short = some_ids(8, batch=1), some_ids(5, batch=1, seed=2)
    together = torch.cat([long, torch.cat([torch.zeros(1, 3).long(), short], 1)])
    mask = torch.ones(2, 8).long()
    mask[1, :3] = 0
    found = model.generate(together, 6, mask=mask)
    assert torch.equal(found, torch.cat([model.generate(long, 6), model.generate(short, 6)]))


# ---------------------------------------------------------------- generation


@every_model
def test_greedy_generation_is_that_without_a_state(name):
    model, ids = build(name), some_ids(4)
    found = model.generate(ids, 7)
    text = ids
    for _ in range(7):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text[:, 4:])


def test_sampling_follows_the_temperature_and_the_seed():
    model, ids = build("retnet"), some_ids(4, batch=1)
    drawn = [model.generate(ids, 8, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(model.generate(ids, 8, temperature=1e-6), model.generate(ids, 8))
    many = next(model.stream(ids.expand(4000, -1), temperature=2.0))[0]
    shares = torch.bincount(many, minlength=23) / 4000
    expected = (model(ids)[0, -1] / 2).softmax(-1)
    assert (shares - expected).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_hyena_generates_no_further_than_its_filters_reach():
    model = build("hyena")
    assert model.generate(some_ids(30, batch=1), 3).shape == (1, 3)
    with pytest.raises(ValueError, match="33 tokens.*made for 32"):
        model.generate(some_ids(30, batch=1), 4)


# ---------------------------------------------------------------- files


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_saved_is_the_model_loaded(name, dtype, tmp_path):
    model = build(name, dtype=dtype)
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    for reader in (RecurrentLM, type(model)):
        loaded = reader.from_pretrained(tmp_path / "model")
        assert type(loaded) is type(model) and loaded.config == model.config
        assert loaded.lm_head.weight is loaded.embedding.weight
        assert not loaded.training and all(p.requires_grad for p in loaded.parameters())
        state = loaded.state_dict()
        assert all(torch.equal(state[key], t) for key, t in model.state_dict().items())
        assert all(t.dtype == dtype for t in state.values())
    close(loaded(some_ids()), model(some_ids()), 1e-6 if dtype == torch.float32 else 0.1)
    stored = (tmp_path / "model" / "model.safetensors").stat().st_size
    numbers = sum(p.numel() for p in model.parameters())
    assert stored < numbers * dtype.itemsize + 8000  # the tied matrix once


def test_folders_that_hold_no_such_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        RecurrentLM.from_pretrained(tmp_path)
    model = build("retnet")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a RetNetLM; RWKVLM can be read here"):
        RWKVLM.from_pretrained(tmp_path)
    config = tmp_path / "config.json"
    about = json.loads(config.read_text())
    for change, said in (
        ({"hidden": 16}, "another shape"),
        ({"layers": 3}, "missing"),
        ({"architecture": "LlamaForCausalLM"}, "holds a LlamaForCausalLM"),
        ({"depth": 3}, "not the fields"),
    ):
        config.write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=said):
            RecurrentLM.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        RecurrentLM.from_pretrained(tmp_path)
    config.write_text(json.dumps(about))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        RecurrentLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- sizes


@every_model
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_have_the_parameters_of_the_llama_within_3_percent(name, shape):
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, feed_forward, layers, heads, kv_heads = SHAPES[shape]
    kind, config, _ = MODELS[name]
    twin = config.twin_of(*SHAPES[shape])
    assert (twin.hidden, twin.layers, twin.vocabulary) == (hidden, layers, 4096)
    with torch.device("meta"):
        model = kind(twin)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=hidden,
                intermediate_size=feed_forward,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                tie_word_embeddings=True,
            )
        )
    assert llama.num_parameters() == llama_parameters(*SHAPES[shape])
    ours = sum(p.numel() for p in model.parameters())
    assert ours == twin.parameters
    assert abs(ours / llama.num_parameters() - 1) < 0.03


@every_model
def test_parameters_are_counted_for_all_settings(name):
    changes = [{}, dict(vocabulary=31, layers=3, feed_forward=5)]
    if name == "retnet":
        changes += [dict(gate=False), dict(value_factor=1)]
    if name == "hyena":
        changes += [dict(order=3, filter_layers=1, filter_features=7)]
    if name == "gla":
        changes += [dict(gate_rank=3)]
    for change in changes:
        model = build(name, **change)
        assert sum(p.numel() for p in model.parameters()) == model.config.parameters


def test_twins_that_cannot_be():
    with pytest.raises(ValueError, match="within 3 %"):
        RetNetConfig.twin_of(64, 16, 8, 4, 1, vocabulary=32)
    twin = RetNetConfig.twin_of(*SHAPES["mini-1m"], own_heads=2, decay="lm")
    assert (twin.heads, twin.decay) == (2, "lm")


# ---------------------------------------------------------------- training


@every_model
def test_the_loss_is_the_weighted_cross_entropy_of_the_next_token(name):
    model, ids = build(name, dtype=torch.float32), some_ids()
    losses = nn.functional.cross_entropy(
        model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    close(lm_loss(model, ids), losses.mean(), 1e-5)
    weights = torch.rand(ids.shape)
    expected = (weights[:, 1:] * losses).sum() / weights[:, 1:].sum()
    close(lm_loss(model, (ids, weights)), expected, 1e-5)


@every_model
def test_it_learns_a_text_by_heart(name):
    kind, config, options = MODELS[name]
    torch.manual_seed(0)
    model = kind(config(hidden=16, layers=2, feed_forward=24, vocabulary=23, **options))
    ids = some_ids(12, batch=2)
    result = train(
        model,
        lambda step: ids,
        TrainingSettings(steps=40, learning_rate=2e-2),
        loss=lm_loss,
        evaluate=lambda model: {"loss": float(lm_loss(model, ids))},
    )
    assert result.losses[0] == pytest.approx(math.log(23), abs=0.4)
    assert result.evaluations[-1]["loss"] < 0.5 * result.losses[0]


@every_model
def test_autocast_trains_with_states_in_float32(name):
    model, ids = build(name, dtype=torch.float32), some_ids()
    exact = lm_loss(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = lm_loss(model, ids)
        _, state = model.advance(ids)
    assert loss.item() == pytest.approx(exact.item(), abs=0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert {t.dtype for layer in state.layers for t in layer.values()} == {torch.float32}


@every_model
def test_muon_finds_the_matrices_inside_and_not_the_head(name):
    model = build(name)
    matrices = hidden_matrices(model)
    assert matrices and all(m.ndim == 2 for m in matrices)
    assert all(m is not model.lm_head.weight for m in matrices)


# ---------------------------------------------------------------- what is refused


def test_states_that_do_not_belong():
    model, ids = build("retnet"), some_ids()
    _, state = model.advance(ids)
    for other in (build("retnet", decay="lm"), build("gla"), build("rwkv")):
        with pytest.raises(ValueError, match=r"state is of another model, RetNetConfig\(hidden=8"):
            other.advance(ids, state)
    with pytest.raises(ValueError, match="of 2 texts, the ids of 1"):
        model.advance(ids[:1], state)
    hyena = build("hyena")
    _, state = hyena.advance(ids)
    with pytest.raises(ValueError, match="of 2 texts, the ids of 3"):
        hyena.advance(some_ids(batch=3), state)


def test_ids_and_masks_that_do_not_fit():
    model, ids = build("rwkv"), some_ids()
    for bad in (ids + 20, ids - 23):
        with pytest.raises(ValueError, match="tokens 0 to 22"):
            model(bad)
    with pytest.raises(ValueError, match="at least one"):
        model(ids[:, :0])
    hidden = inspect.unwrap(type(model).hidden)
    for bad in (ids[0], ids.double()):
        with pytest.raises(ValueError, match="whole numbers of shape"):
            hidden(model, bad)
    both_ways = torch.ones(2, 1, 11, 11)
    with pytest.raises(ValueError, match="causal.*only which tokens are padding"):
        model(ids, mask=both_ways)
    holes = torch.ones(2, 11)
    holes[0, 4] = 0
    for bad in (holes, torch.zeros(2, 11)):
        with pytest.raises(ValueError, match="gaps or no text"):
            model(ids, mask=bad)
    right = torch.ones(2, 11)
    right[1, 8:] = 0
    with pytest.raises(ValueError, match="padding on the right"):
        model.advance(ids, mask=right)
    _, state = model.advance(ids)
    with pytest.raises(ValueError, match="after a state"):
        model.advance(ids, state, mask=right.flip(1))


def test_other_options_that_cannot_be():
    model, ids = build("gla"), some_ids()
    with pytest.raises(ValueError, match="'scan'; GLALM has chunkwise, parallel, recurrent"):
        model(ids, form="scan")
    with pytest.raises(ValueError, match="temperature is -1.0"):
        model.generate(ids, 1, temperature=-1.0)
    with pytest.raises(ValueError, match="at least 1 is needed"):
        model.generate(ids, 0)
    with pytest.raises(ValueError, match="was given a RWKVConfig; it takes a RetNetConfig"):
        RetNetLM(RWKVConfig(hidden=8, layers=1, feed_forward=8))
    with pytest.raises(ValueError, match="hidden is 0"):
        RWKVConfig(hidden=0, layers=1, feed_forward=8)
    assert issubclass(RetNetConfig, LMConfig)
