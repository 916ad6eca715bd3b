"""Distillation that matches answers, states, attention and relations: exact values and refusals."""

import importlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from effnb.core.losses import (
    check_logits,
    check_teacher,
    kl_rows,
    log_softened,
    masked_mean,
    temperature_kl,
)
from effnb.core.training import TrainingSettings, causal_lm_loss
from effnb.evaluation.cost import flops
from effnb.inference.distillation import (
    LayerAttention,
    TinyBertStudent,
    attention_loss,
    augment,
    bias_scan,
    cosine_loss,
    distilbert,
    distilbert_loss,
    distill,
    gkd,
    hidden_loss,
    hinton,
    hinton_loss,
    layer_map,
    mask_tokens,
    matching_gradient,
    minilm,
    minilm_loss,
    minilm_v2_loss,
    prediction_loss,
    relation,
    relation_heads,
    relation_loss,
    run_recorded,
    said,
    soft_gradient,
    soften,
    steps_at_equal_compute,
    student_from_layers,
    teach,
    tinybert,
)

Z = torch.tensor([1, -0.5, -0.5], dtype=torch.float64)
V = torch.tensor([2, -1.5, -0.5], dtype=torch.float64)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_bert(seed=0, **changes):
    torch.manual_seed(seed)
    options = dict(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = BertForMaskedLM(BertConfig(**(options | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" not in name:
                p.normal_(0, 0.3)
    return model


# --- the shared divergence ------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.134470), (4.0, 0.329316)])
def test_the_softened_divergence_has_the_worked_values(temperature, value):
    assert float(temperature_kl(Z, V, temperature)) == pytest.approx(value, abs=1e-6)
    # Double precision is not what makes it so.
    assert float(temperature_kl(Z.float(), V.float(), temperature)) == pytest.approx(
        value, abs=1e-6
    )


def test_the_gradient_has_the_worked_values_and_its_limit():
    z = Z.clone().requires_grad_()
    temperature_kl(z, V, 4.0).backward()
    expected = torch.tensor([-0.36454, 0.30357, 0.06097], dtype=torch.float64)
    torch.testing.assert_close(z.grad, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(soft_gradient(Z, V, 4.0), z.grad)
    limit = torch.tensor([-1 / 3, 1 / 3, 0], dtype=torch.float64)
    torch.testing.assert_close(matching_gradient(Z, V), limit)
    torch.testing.assert_close(soft_gradient(Z, V, 1e6), limit, atol=1e-5, rtol=0)


def test_matching_is_the_gradient_of_squared_centred_scores():
    z, v = randn(3, 7).requires_grad_(), randn(3, 7, seed=1)
    centred = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    (centred.square().sum() / (2 * 7)).backward()
    torch.testing.assert_close(matching_gradient(z.detach(), v), z.grad)


def test_a_large_temperature_does_not_lose_the_loss_in_float32():
    # At tau = 1000 the value is 1/2N of the squared centred difference: 0.3333, not 0.21.
    exact = float(temperature_kl(Z, V, 1000.0))
    assert exact == pytest.approx(1 / 3, abs=2e-3)
    assert float(temperature_kl(Z.float(), V.float(), 1000.0)) == pytest.approx(exact, rel=1e-5)
    naive = 1000.0**2 * float(
        kl_rows((V.float() / 1000).log_softmax(-1), (Z.float() / 1000).log_softmax(-1))
    )
    assert abs(naive - exact) > 0.05  # what the wider type is for


def test_no_gradient_reaches_the_teacher():
    z, v = Z.clone().requires_grad_(), V.clone().requires_grad_()
    temperature_kl(z, v, 2.0).backward()
    assert v.grad is None
    assert z.grad.abs().sum() > 0


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=3),
    st.integers(1, 6),
    st.floats(0.1, 50),
    st.integers(0, 99),
)
def test_a_divergence_is_never_negative_and_zero_for_equals(shape, classes, temperature, seed):
    z, v = randn(*shape, classes, seed=seed), randn(*shape, classes, seed=seed + 1)
    assert float(temperature_kl(z, v, temperature)) >= -1e-9 * temperature**2
    assert float(temperature_kl(v, v, temperature)) == pytest.approx(0, abs=1e-8 * temperature**2)
    rows = kl_rows(log_softened(v, temperature), log_softened(z, temperature))
    assert rows.shape == tuple(shape)
    assert soften(z, temperature).shape == z.shape
    torch.testing.assert_close(soften(z, temperature).sum(-1), torch.ones(shape).double())


def test_what_a_mask_hides_does_not_count():
    z, v = randn(4, 5), randn(4, 5, seed=1)
    mask = torch.tensor([True, False, True, False])
    z[1] = math.inf  # padding may hold anything
    assert float(temperature_kl(z, v, 2.0, mask)) == pytest.approx(
        float(temperature_kl(z[mask], v[mask], 2.0))
    )
    with pytest.raises(ValueError, match="the mask has shape"):
        masked_mean(torch.zeros(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no position counts"):
        masked_mean(torch.zeros(3), torch.zeros(3, dtype=torch.bool))


def test_a_class_that_one_side_excludes():
    log_p = torch.tensor([0.5, 0.5, 0.0]).log()
    log_q = torch.tensor([0.25, 0.75, 0.0]).log()
    assert float(kl_rows(log_p, log_q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert float(kl_rows(log_p, torch.tensor([1.0, 0.0, 0.0]).log())) == math.inf


# --- Hinton ---------------------------------------------------------------------------------------


def test_both_parts_are_mixed_and_labels_may_be_missing():
    z, v = randn(6, 5), randn(6, 5, seed=1)
    y = torch.tensor([0, 1, -100, 3, -100, 4])
    hard = nn.functional.cross_entropy(z[y >= 0], y[y >= 0])
    soft = temperature_kl(z, v, 3.0)
    got = hinton_loss(z, v, y, temperature=3.0, weight=0.7)
    assert float(got) == pytest.approx(float(0.7 * soft + 0.3 * hard))
    assert float(hinton_loss(z, v, temperature=3.0, weight=1.0)) == pytest.approx(float(soft))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(temperature=0.0), "temperature is 0.0; it must be a finite number above 0"),
        (dict(temperature=-1.0), "temperature is -1.0"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(weight=1.5), "weight is 1.5; it must lie between 0 and 1"),
        (dict(weight=0.5), "there are no labels; it must then be 1"),
        (dict(weight=0.5, labels=torch.zeros(3, dtype=torch.long)), "one for each of the posit"),
    ],
)
def test_numbers_without_meaning_are_refused(arguments, sentence):
    options = dict(labels=None, temperature=2.0, weight=1.0) | arguments
    with pytest.raises(ValueError, match=sentence):
        hinton_loss(randn(4, 5), randn(4, 5, seed=1), options.pop("labels"), **options)


def test_other_vocabularies_and_lengths_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="the student scores 5 classes and the teacher 6; both"):
        check_logits(randn(4, 5), randn(4, 6))
    with pytest.raises(ValueError, match=r"positions \(4,\) and the teacher for \(3,\)"):
        hinton_loss(randn(4, 5), randn(3, 5), weight=1.0)


def test_models_that_do_not_fit_are_refused(llama, tiny_llama, ids):
    wider = tiny_llama(vocab_size=130)
    with pytest.raises(ValueError, match="128 classes and the teacher 130"):
        hinton(wider)(llama, ids)
    short = tiny_llama(max_position_embeddings=16)
    with pytest.raises(ValueError, match="24 tokens; LlamaForCausalLM has 16 positions"):
        hinton(short)(llama, ids)
    teacher = tiny_llama().train()
    for make in (hinton, distilbert, tinybert, minilm):
        with pytest.raises(ValueError, match="the teacher is in training mode"):
            make(teacher)
    teacher.eval()
    loss = hinton(teacher)
    teacher.model.layers[1].train()  # one block is enough, and later is noticed too
    with pytest.raises(ValueError, match="training mode"):
        loss(llama, ids)
    with pytest.raises(ValueError, match="training mode"):
        check_teacher(nn.Sequential(nn.Dropout()))


def test_the_loss_of_language_models_shifts_and_leaves_padding_out(llama, tiny_llama, ids):
    teacher = tiny_llama(1)
    with torch.no_grad():
        z, v = llama(ids).logits[:, :-1].flatten(0, 1), teacher(ids).logits[:, :-1].flatten(0, 1)
        whole = hinton_loss(z, v, ids[:, 1:].flatten(), temperature=2.0, weight=0.4)
        loss = hinton(teacher, temperature=2.0, weight=0.4)
        torch.testing.assert_close(loss(llama, ids), whole)
        mask = torch.ones_like(ids)
        mask[:, 20:] = 0
        padded = loss(llama, {"input_ids": ids, "attention_mask": mask})
        torch.testing.assert_close(padded, loss(llama, ids[:, :20]), atol=1e-5, rtol=1e-5)
        labelled = ids.masked_fill(torch.arange(24) < 9, -100)
        z, v = llama(ids).logits[:, 8:-1], teacher(ids).logits[:, 8:-1]
        torch.testing.assert_close(
            loss(llama, (ids, labelled)), hinton_loss(z, v, ids[:, 9:], weight=0.4)
        )
        torch.testing.assert_close(
            hinton(teacher, weight=0.0)(llama, ids), causal_lm_loss(llama, ids)
        )
        with pytest.raises(ValueError, match="no position of the batch counts"):
            loss(llama, (ids, torch.full_like(ids, -100)))


def test_a_student_comes_near_its_teacher_and_the_original_stays(tiny_llama, ids):
    teacher, student = tiny_llama(1), tiny_llama(0, num_hidden_layers=1)
    before = {name: p.clone() for name, p in student.state_dict().items()}
    loss = hinton(teacher, temperature=2.0, weight=1.0)
    settings_ = TrainingSettings(40, learning_rate=1e-2)
    found = distill(student, lambda step: ids, settings_, loss=loss)
    assert found.training.losses[-1] < 0.5 * found.training.losses[0]
    assert all(torch.equal(p, before[name]) for name, p in student.state_dict().items())
    assert not found.model.training
    assert all(p.grad is None for p in teacher.parameters())


def test_labels_alone_get_the_steps_that_the_teacher_costs(tiny_llama, ids):
    student, teacher = tiny_llama(0), tiny_llama(1, num_hidden_layers=6)

    def forward(model):
        return flops(lambda: model(input_ids=ids, use_cache=False))

    # A backward pass costs two forward ones, less the first layer's input, which needs no gradient.
    expected = 1 + forward(teacher) / (3 * forward(student))
    found = steps_at_equal_compute(student, ids, 1000, loss=hinton(teacher))
    assert found / 1000 == pytest.approx(expected, rel=0.03)
    assert steps_at_equal_compute(student, ids, 7, loss=causal_lm_loss) == 7
    assert steps_at_equal_compute(student, ids, 7, loss=hinton(teacher, weight=0.0)) == 7
    assert all(p.grad is None for p in student.parameters())
    own = {"input_ids": ids, "prompts": ids[:, :4]}
    drawn = gkd(teacher, on_policy=1.0, max_new_tokens=20)
    more = steps_at_equal_compute(student, own, 1000, loss=drawn, instead=causal_text)
    assert more > found  # the student's own text has to be written first
    with pytest.raises(ValueError, match="steps is 0"):
        steps_at_equal_compute(student, ids, 0, loss=causal_lm_loss)


def causal_text(model, batch):
    return causal_lm_loss(model, batch["input_ids"])


def test_encoders_without_a_head_can_be_matched_inside():
    teacher = tiny_bert(1).bert
    student = tiny_bert(0, num_hidden_layers=2, hidden_size=8, intermediate_size=12).bert
    ids = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for loss, model in (
        (tinybert(teacher), TinyBertStudent(student, teacher)),
        (minilm(teacher), student),
    ):
        found = distill(model, lambda _: batch, TrainingSettings(20, learning_rate=1e-2), loss=loss)
        assert found.training.losses[-1] < found.training.losses[0]


def test_what_a_model_says_of_masked_words_needs_labels(ids):
    bert = tiny_bert()
    short = ids[:, :16] % 64
    with pytest.raises(ValueError, match="needs `labels`"):
        said(bert, short, causal=False)
    labels = torch.full_like(short, -100)
    labels[:, 3] = short[:, 3]
    taught = teach(bert, (short, labels), causal=False)
    with torch.no_grad():
        torch.testing.assert_close(taught.logits, bert(short).logits[:, 3])


def test_raising_a_score_brings_a_missing_class_back():
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.4]])
    labels = torch.tensor([0, 2, 2])
    found = bias_scan(logits, labels, 2, [0.0, 0.8, 1.5, 9.0])
    assert [f["accuracy"] for f in found] == pytest.approx([1 / 3, 2 / 3, 1, 2 / 3])
    assert [f["accuracy_missing"] for f in found] == pytest.approx([0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="class 3 is not among the 3"):
        bias_scan(logits, labels, 3, [0.0])
    with pytest.raises(ValueError, match="no example is of class 1"):
        bias_scan(logits, labels, 1, [0.0])


# --- DistilBERT -----------------------------------------------------------------------------------


def test_the_three_losses_and_their_weights(ids):
    z, v = randn(2, 6, 9), randn(2, 6, 9, seed=1)
    h, t = randn(2, 6, 4, seed=2), randn(2, 6, 4, seed=3)
    labels = torch.full((2, 6), -100)
    labels[:, 2] = 5
    real = torch.ones(2, 6, dtype=torch.bool)
    real[1, 4:] = False
    parts = [
        temperature_kl(z, v, 2.0, real),
        nn.functional.cross_entropy(z[:, 2], labels[:, 2]),
        (1 - nn.functional.cosine_similarity(h[real], t[real], -1)).mean(),
    ]
    alone = [
        distilbert_loss(z, v, labels, h, t, real, weights=w)
        for w in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    ]
    for one, part in zip(alone, parts):
        assert float(one) == pytest.approx(float(part), abs=1e-6)
    whole = distilbert_loss(z, v, labels, h, t, real)
    assert float(whole) == pytest.approx(float(5 * parts[0] + 2 * parts[1] + parts[2]), abs=1e-5)
    only = distilbert_loss(z, v, labels, h, t, real, weights=(1.0, 0.0, 0.0), only_masked=True)
    assert float(only) == pytest.approx(float(temperature_kl(z[:, 2], v[:, 2], 2.0)))


def test_directions_are_compared_not_lengths():
    h = randn(3, 5)
    assert float(cosine_loss(7 * h, h)) == pytest.approx(0, abs=1e-12)
    assert float(cosine_loss(-h, h)) == pytest.approx(2)
    with pytest.raises(ValueError, match="states of one width"):
        cosine_loss(randn(3, 5), randn(3, 6))


@pytest.mark.parametrize("weights", [(-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="none may be negative, and one must be above 0"):
        distilbert(tiny_bert(), weights=weights)


def test_distilbert_runs_on_masked_words_and_on_next_ones(llama, tiny_llama, ids):
    bert = tiny_bert()
    student = student_from_layers(bert, [0, 2])
    masked, labels = mask_tokens(ids[:, :20] % 64, 3, 64, generator=torch.Generator())
    loss = distilbert(bert)
    with pytest.raises(ValueError, match="needs `labels`"):
        loss(student, masked)
    value = loss(student, (masked, labels))
    value.backward()
    assert float(value.detach()) > 0
    assert float(loss(bert, (masked, labels)).detach()) < float(value.detach())
    only = distilbert(bert, weights=(1.0, 0.0, 1.0))
    assert float(only(bert, (masked, labels)).detach()) == pytest.approx(0, abs=1e-5)
    teacher = tiny_llama(1)
    causal = distilbert(teacher, weights=(0.0, 1.0, 0.0), causal=True)
    torch.testing.assert_close(causal(llama, ids), causal_lm_loss(llama, ids))


def test_a_student_starts_as_layers_of_its_teacher(tiny_llama, ids):
    for teacher, text in ((tiny_llama(), ids), (tiny_bert(), ids[:, :16] % 64)):
        with torch.no_grad():
            whole = student_from_layers(teacher, range(teacher.config.num_hidden_layers))
            torch.testing.assert_close(whole(text).logits, teacher(text).logits)
        student = student_from_layers(teacher, [0, 2])
        assert student.config.num_hidden_layers == 2
        assert teacher.config.num_hidden_layers > 2
        shared = {p.data_ptr() for p in teacher.parameters()}
        assert not any(p.data_ptr() in shared for p in student.parameters())
        with pytest.raises(ValueError, match="in ascending order"):
            student_from_layers(teacher, [2, 0])
    student = student_from_layers(tiny_llama(), [0, 2])
    with torch.no_grad():  # its cache finds every layer
        cache = student(ids[:, :10], use_cache=True).past_key_values
        step = student(ids[:, 10:11], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(step, student(ids[:, :11]).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_words_are_masked_afresh_in_the_published_shares():
    ids = torch.randint(10, 1000, (64, 256), generator=torch.Generator().manual_seed(0))
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, 0] = True
    masked, labels = mask_tokens(
        ids, 3, 1000, special=special, generator=torch.Generator().manual_seed(1)
    )
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    assert torch.equal(labels[chosen], ids[chosen])
    assert float(chosen[:, 1:].double().mean()) == pytest.approx(0.15, abs=0.01)
    assert float((masked[chosen] == 3).double().mean()) == pytest.approx(0.8, abs=0.03)
    assert float((masked[chosen] == ids[chosen]).double().mean()) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="probability is 0"):
        mask_tokens(ids, 3, 1000, probability=0)


# --- TinyBERT -------------------------------------------------------------------------------------


def test_layer_maps():
    assert layer_map(4, 12) == (0, 3, 6, 9, 12)
    assert layer_map(4, 12, "bottom") == (0, 1, 2, 3, 4)
    assert layer_map(4, 12, "top") == (0, 9, 10, 11, 12)
    assert layer_map(2, 5, [0, 2, 5]) == (0, 2, 5)


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.sampled_from(["uniform", "bottom", "top"]))
def test_every_map_rises_from_the_embedding_into_the_teacher(m, factor, kind):
    g = layer_map(m, m * factor, kind)
    assert len(g) == m + 1
    assert g[0] == 0
    assert all(a < b for a, b in pairwise(g))
    assert g[-1] <= m * factor


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((4, 10), "10 layers of the teacher do not divide evenly by 4"),
        ((5, 4), "the student has 5 layers and the teacher 4"),
        ((0, 4), "the student needs at least 1"),
        ((2, 4, "middle"), "choose uniform, bottom, top"),
        ((2, 4, [0, 2]), "it needs 3 numbers"),
        ((2, 4, [0, 3, 3]), "rising from 0 to at most 4"),
        ((2, 4, [1, 2, 3]), "rising from 0"),
        ((2, 4, [0, 2, 5]), "at most 4"),
    ],
)
def test_maps_that_do_not_fit_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        layer_map(*arguments)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_recorded_attention_is_what_the_model_computes(kind, tiny_llama, ids):
    model = tiny_llama(attn_implementation="eager") if kind == "llama" else tiny_bert()
    model.set_attn_implementation("eager")
    text = ids[:, :16] % 64
    mask = torch.ones_like(text)
    mask[1, 10:] = 0
    with torch.no_grad():
        plain = model(text, attention_mask=mask, output_attentions=True)
        out, layers = run_recorded(model, text, attention_mask=mask)
    torch.testing.assert_close(out.logits[0], plain.logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.logits[1, :10], plain.logits[1, :10], atol=1e-5, rtol=1e-5)
    assert len(layers) == model.config.num_hidden_layers
    for layer, probabilities in zip(layers, plain.attentions):
        scores = layer.scores()
        assert layer.heads == model.config.num_attention_heads
        again = (
            scores.masked_fill(~layer.seen, -1e9).softmax(-1)
            if layer.seen is not None
            else (scores.softmax(-1))
        )
        torch.testing.assert_close(again[0], probabilities[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again[1, :, :10], probabilities[1, :, :10], atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "eager"  # the model itself is as it was


def test_gradients_reach_the_recorded_model(llama, ids):
    _, layers = run_recorded(llama, ids)
    layers[-1].scores().square().sum().backward()
    assert llama.model.layers[-1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert llama.model.embed_tokens.weight.grad.abs().sum() > 0


def test_a_model_with_attention_of_its_own_kind_is_refused():
    with pytest.raises(ValueError, match="Linear computes attention in its own way"):
        run_recorded(nn.Linear(3, 3), torch.zeros(1, 3))


def test_hidden_pairs_count_as_equal_and_heads_must_agree():
    a, b = randn(2, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    by_head = [((a - b) * seen)[:, i].square().mean() for i in range(3)]
    assert float(attention_loss(a, b, seen)) == pytest.approx(float(sum(by_head) / 3))
    with pytest.raises(ValueError, match="heads and tokens must agree"):
        attention_loss(a, randn(2, 4, 4, 4))


def test_probabilities_would_teach_far_less_than_scores():
    a, b = randn(2, 4, 32, 32), randn(2, 4, 32, 32, seed=1)
    scores, probabilities = attention_loss(a, b), attention_loss(a.softmax(-1), b.softmax(-1))
    assert float(scores / probabilities) > 4 * 32


def test_states_are_projected_to_the_teachers_width():
    h, t = randn(2, 5, 4), randn(2, 5, 6, seed=1)
    projection = nn.Linear(4, 6).double()
    expected = (projection(h) - t).square().mean()
    assert float(hidden_loss(h, t, projection).detach()) == pytest.approx(float(expected.detach()))
    with pytest.raises(ValueError, match="give a projection to the teacher's width"):
        hidden_loss(h, t)


def test_soft_cross_entropy_is_the_divergence_and_the_teachers_entropy():
    z, v = randn(4, 5), randn(4, 5, seed=1)
    p = (v / 2).softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert float(prediction_loss(z, v, 2.0)) == pytest.approx(
        float(temperature_kl(z, v, 2.0) / 4 + entropy)
    )


def test_tinybert_trains_layers_then_answers(tiny_llama, ids):
    teacher = tiny_llama(1, num_hidden_layers=4)
    pair = TinyBertStudent(tiny_llama(0, num_hidden_layers=2, hidden_size=16, head_dim=4), teacher)
    inside, answers = tinybert(teacher), tinybert(teacher, stage="answers")
    found = distill(pair, lambda _: ids, TrainingSettings(25, learning_rate=1e-2), loss=inside)
    assert found.training.losses[-1] < 0.8 * found.training.losses[0]
    after = distill(
        found.model, lambda _: ids, TrainingSettings(10, learning_rate=1e-2), loss=answers
    )
    assert after.training.losses[-1] < after.training.losses[0]
    assert after.model.student(ids).logits.shape == (4, 24, 128)
    with pytest.raises(ValueError, match="give TinyBertStudent"):
        inside(tiny_llama(), ids)
    with pytest.raises(ValueError, match="stage is 'both'; choose layers or answers"):
        tinybert(teacher, stage="both")
    with pytest.raises(ValueError, match="do not divide evenly by 3"):
        inside(TinyBertStudent(tiny_llama(), teacher), ids)
    other = TinyBertStudent(
        tiny_llama(num_hidden_layers=2, num_attention_heads=2, head_dim=8), teacher
    )
    with pytest.raises(ValueError, match="2 heads and the teacher's 4; they must agree"):
        inside(other, ids)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(llama, ids):
    pair = TinyBertStudent(llama, llama)
    with torch.no_grad():
        pair.projection.weight.copy_(torch.eye(32))
        assert float(tinybert(llama)(pair, ids)) == pytest.approx(0, abs=1e-8)
        assert float(minilm(llama)(llama, ids)) == pytest.approx(0, abs=1e-6)


def test_augmented_texts_come_from_the_likeliest_words():
    bert = tiny_bert()
    ids = torch.arange(5, 17)
    special = torch.zeros(12, dtype=torch.bool)
    special[0] = True
    texts = augment(
        bert, ids, 3, copies=50, candidates=4, special=special,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert texts.shape == (50, 12)
    assert bool((texts[:, 0] == 5).all())
    masked = ids.clone()
    masked[4] = 3
    with torch.no_grad():
        best = bert(masked[None]).logits[0, 4].topk(4).indices
    assert set(texts[:, 4].tolist()) <= {9, *best.tolist()}
    assert 0.25 < float((texts != ids).double()[:, 1:].mean()) < 0.5
    assert torch.equal(augment(bert, ids, 3, copies=2, probability=0.0), ids.repeat(2, 1))
    with pytest.raises(ValueError, match="copies is 0"):
        augment(bert, ids, 3, copies=0)


# --- MiniLM ---------------------------------------------------------------------------------------


def layer(*shape, seed=0, seen=None):
    q, k, v = (randn(*shape, seed=seed + i, dtype=torch.float32) for i in range(3))
    return LayerAttention(q, k, v, shape[-1] ** -0.5, None, seen)


def test_value_relations_do_not_see_a_rotation_of_features():
    v = randn(2, 3, 5, 8)
    rotation, _ = torch.linalg.qr(randn(8, 8, seed=1))
    torch.testing.assert_close(relation(v @ rotation), relation(v))
    assert float(relation_loss(relation(v @ rotation), relation(v))) == pytest.approx(0, abs=1e-6)
    assert float(relation_loss(relation(2 * v), relation(v))) > 0.01


def test_both_relations_count_and_widths_may_differ():
    a, b = layer(2, 3, 5, 8), layer(2, 3, 5, 4, seed=9)
    attention = minilm_loss(a, b, values=False)
    values = relation_loss(relation(a.value), relation(b.value))
    assert float(minilm_loss(a, b)) == pytest.approx(float(attention + values), rel=1e-5)
    rows = kl_rows(b.scores().log_softmax(-1), a.scores().log_softmax(-1))
    assert float(attention) == pytest.approx(float(rows.sum() / (2 * 3 * 5)), rel=1e-5)
    assert float(minilm_loss(a, a)) == pytest.approx(0, abs=1e-6)


def test_padding_counts_in_neither_rows_nor_columns():
    a, b = layer(2, 3, 7, 8), layer(2, 3, 7, 4, seed=9)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[:, 5:] = False

    def cut(x):
        return LayerAttention(x.query[:, :, :5], x.key[:, :, :5], x.value[:, :, :5], x.scaling)

    assert float(minilm_loss(a, b, real)) == pytest.approx(float(minilm_loss(cut(a), cut(b))))
    short = minilm_v2_loss(cut(a), cut(b), 4)
    assert float(minilm_v2_loss(a, b, 4, real)) == pytest.approx(float(short))


def test_padding_on_the_left_of_a_causal_model_changes_nothing(llama, tiny_llama, ids):
    loss = minilm(tiny_llama(1, num_hidden_layers=2))
    text = ids[:1, :10]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(text)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    value = loss(llama, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    assert float(value.detach()) == pytest.approx(float(loss(llama, text).detach()), rel=1e-4)


def test_relation_heads_join_and_cut():
    x = randn(2, 3, 5, 8)
    cut = relation_heads(x, 4)
    assert cut.shape == (2, 4, 5, 6)
    torch.testing.assert_close(relation_heads(cut, 3), x)
    with pytest.raises(ValueError, match="24 features cannot be cut into 5"):
        relation_heads(x, 5)


def test_heads_must_agree_unless_they_are_cut_again(tiny_llama, ids):
    teacher = tiny_llama(1)
    student = tiny_llama(num_attention_heads=2, head_dim=8)
    with pytest.raises(ValueError, match="2 heads and the teacher's 4"):
        minilm(teacher)(student, ids)
    value = minilm(teacher, heads=4)(student, ids)
    value.backward()
    assert student.model.layers[-1].self_attn.q_proj.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="layer 7 is not there; the teacher has 3"):
        minilm(teacher, teacher_layer=7)(tiny_llama(), ids)
    with pytest.raises(ValueError, match="both must read the same tokens"):
        minilm_loss(layer(2, 3, 5, 8), layer(2, 3, 6, 8))
    with pytest.raises(ValueError, match="heads and tokens must agree"):
        relation_loss(randn(1, 2, 3, 3), randn(1, 3, 3, 3))


def test_modules_are_named_after_their_methods():
    for name in ("hinton", "distilbert", "tinybert", "minilm"):
        module = importlib.import_module(f"effnb.inference.distillation.{name}")
        assert callable(getattr(module, name))
        assert "arXiv" in module.__doc__
