"""Distillation by texts and behaviour: whole sequences, own texts, other vocabularies, prompts."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split, Whitespace
from torch import nn

from effnb.core.losses import temperature_kl
from effnb.core.training import TrainingSettings, causal_lm_loss
from effnb.inference.distillation import (
    Lesson,
    Worked,
    addition,
    answer,
    beam_search,
    bleu,
    bridge_batch,
    check_same_vocabulary,
    closest,
    common_boundaries,
    context_distillation,
    distill,
    draw_tasks,
    final_answer,
    fit_gaussian,
    generalized_jsd,
    gkd,
    hinton,
    in_context,
    in_context_batch,
    jsd_curve,
    judge,
    keep_right,
    minillm,
    minillm_loss,
    next_round,
    one_task,
    pair_batch,
    rescaled_jsd,
    reverse_kl,
    rouge_l,
    sample,
    sequence_level,
    split_hard,
    step_by_step,
    two_tasks,
    uld,
    uld_loss,
    unlike,
    word_level_loss,
)

P = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()  # the teacher
Q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()  # the student


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the generalized divergence, and its jump at both ends ----------------------------------------


@pytest.mark.parametrize(
    ("beta", "value"),
    [(0.0, 0.58381), (1.0, 0.53718), (0.5, 0.13292), (0.1, 0.05100), (0.9, 0.04786)],
)
def test_the_generalized_divergence_has_the_worked_values(beta, value):
    assert float(generalized_jsd(Q, P, beta)) == pytest.approx(value, abs=5e-6)


def test_the_divergence_falls_to_nothing_before_its_ends_and_jumps_there():
    forward, reverse = 0.58381, 0.53718
    # The closer to an end, the smaller; and at the end itself the whole divergence.
    near = [float(generalized_jsd(Q, P, beta)) for beta in (1e-2, 1e-4, 1e-6, 0.0)]
    assert near[0] > near[1] > near[2]
    assert near[2] < 1e-6
    assert near[3] == pytest.approx(forward, abs=5e-6)
    far = [float(generalized_jsd(Q, P, 1 - beta)) for beta in (1e-2, 1e-4, 1e-6, 0.0)]
    assert far[2] < 1e-6
    assert far[3] == pytest.approx(reverse, abs=5e-6)
    # What converges is the divergence divided by the distance to the end.
    assert float(generalized_jsd(Q, P, 1e-6)) / 1e-6 == pytest.approx(forward, abs=1e-5)
    assert float(generalized_jsd(Q, P, 1 - 1e-6)) / 1e-6 == pytest.approx(reverse, abs=1e-5)


def test_rescaled_it_has_no_jump():
    curve = jsd_curve(Q, P, [0.0, 1e-6, 0.25, 0.5, 0.75, 1 - 1e-6, 1.0])
    values = [point["rescaled"] for point in curve]
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert values[-1] == pytest.approx(values[-2], abs=1e-5)
    assert values[0] == pytest.approx(curve[0]["forward"])
    assert values[-1] == pytest.approx(curve[0]["reverse"])
    assert values[3] == pytest.approx(4 * curve[3]["jsd"])
    tiny = [float(rescaled_jsd(Q.float(), P.float(), beta)) for beta in (1e-174, 1e-7, 1e-3)]
    assert tiny == pytest.approx([0.58381, 0.58381, 0.58381], abs=2e-3)  # nor noise, in float32


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 20), st.integers(0, 99))
def test_the_divergence_is_bounded_and_swaps_its_sides(rows, classes, twentieths, seed):
    beta = twentieths / 20
    z, v = randn(rows, classes, seed=seed), randn(rows, classes, seed=seed + 1)
    value = float(generalized_jsd(z, v, beta))
    assert value >= -1e-12
    assert value == pytest.approx(float(generalized_jsd(v, z, 1 - beta)), abs=1e-9)
    if 0 < beta < 1:  # no more than what the mixture hides
        assert value <= -beta * math.log(beta) - (1 - beta) * math.log1p(-beta) + 1e-9
    assert float(generalized_jsd(z, z, beta)) == pytest.approx(0, abs=1e-9)


def test_masks_and_temperatures_of_the_divergence():
    z, v = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    mask = torch.tensor([[True, False, False], [True, True, False]])
    a = generalized_jsd(z, v, 0.3, temperature=0.9, mask=mask)
    b = generalized_jsd(z[mask] / 0.9, v[mask] / 0.9, 0.3)
    assert float(a) == pytest.approx(float(b))
    with pytest.raises(ValueError, match=r"beta is 1.1; it must lie between 0 and 1"):
        rescaled_jsd(z, v, 1.1)
    with pytest.raises(ValueError, match="temperature is 0"):
        generalized_jsd(z, v, 0.5, temperature=0.0)
    with pytest.raises(ValueError, match="both must have one vocabulary"):
        generalized_jsd(z, randn(2, 3, 6))


# --- texts that a model writes --------------------------------------------------------------------


def test_drawn_texts_follow_the_models_distribution(llama):
    prompt = torch.tensor([[5, 9]]).repeat(4000, 1)
    with torch.no_grad():
        expected = (llama(prompt[:1]).logits[0, -1] / 0.7).softmax(-1)
    ids, labels = sample(
        llama, prompt, 1, temperature=0.7, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(ids[:, :2], prompt)
    assert bool((labels[:, :2] == -100).all())
    assert torch.equal(labels[:, 2], ids[:, 2])
    found = torch.bincount(ids[:, 2], minlength=128) / 4000
    assert float((found - expected).abs().sum()) < 0.15


def test_a_text_ends_and_what_comes_after_does_not_count(llama, tiny_llama):
    prompt = torch.tensor([[5, 9]]).repeat(64, 1)
    with torch.no_grad():
        eos = int(llama(prompt[:1]).logits[0, -1].argmax())
    ids, labels = sample(llama, prompt, 6, eos=eos, generator=torch.Generator().manual_seed(0))
    for text, label in zip(ids[:, 2:].tolist(), labels[:, 2:].tolist()):
        end = text.index(eos) if eos in text else len(text)
        assert label[: end + 1] == text[: end + 1]
        assert all(x == -100 for x in label[end + 1 :])
    llama.train()
    sample(llama, prompt[:1], 2, teacher=tiny_llama(1), teacher_share=0.3)
    assert llama.training  # its mode is its own


def test_mixed_drawing_mixes_probabilities(llama, tiny_llama):
    teacher = tiny_llama(1)
    prompt = torch.tensor([[5, 9]]).repeat(4000, 1)
    with torch.no_grad():
        q, p = (m(prompt[:1]).logits[0, -1].softmax(-1) for m in (llama, teacher))
    ids, _ = sample(
        llama, prompt, 1, teacher=teacher, teacher_share=0.25,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    found = torch.bincount(ids[:, 2], minlength=128) / 4000
    assert float((found - (0.25 * p + 0.75 * q)).abs().sum()) < 0.2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=80), "82 tokens; LlamaForCausalLM has 64 positions"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(teacher_share=-0.1), "teacher_share is -0.1"),
        (dict(prompts=torch.zeros(2, 0, dtype=torch.long)), "at least one token each"),
    ],
)
def test_prompts_that_nothing_can_follow_are_refused(llama, arguments, sentence):
    options = dict(prompts=torch.tensor([[5, 9]]), max_new_tokens=2) | arguments
    with pytest.raises(ValueError, match=sentence):
        sample(llama, **options)


def test_a_wide_beam_finds_the_likeliest_text(tiny_llama):
    model = tiny_llama(vocab_size=6)
    prompt = torch.tensor([1, 2])
    every = {}
    with torch.no_grad():
        for y in itertools.product(range(6), repeat=3):
            ids = torch.tensor([[1, 2, *y]])
            log_p = model(ids).logits[0].double().log_softmax(-1)
            y = y[: y.index(3) + 1] if 3 in y else y
            every[y] = sum(float(log_p[1 + i, token]) for i, token in enumerate(y))
    best = sorted(every.items(), key=lambda pair: -pair[1])
    found = beam_search(model, prompt, 60, 3, eos=3)
    assert [tuple(y) for y, _ in found[:5]] == [y for y, _ in best[:5]]
    assert [s for _, s in found[:5]] == pytest.approx([s for _, s in best[:5]], abs=1e-4)
    greedy = beam_search(model, prompt, 1, 3)[0][0]
    with torch.no_grad():
        assert greedy[0] == int(model(prompt[None]).logits[0, -1].argmax())
    per_token = beam_search(model, prompt, 60, 3, eos=3, length_penalty=1.0)
    assert per_token[0][1] == pytest.approx(max(s / len(y) for y, s in every.items()), abs=1e-4)
    with pytest.raises(ValueError, match="beams is 0"):
        beam_search(model, prompt, 0, 3)


# --- sequence-level -------------------------------------------------------------------------------


def test_the_teachers_answers_become_labels(tiny_llama):
    teacher = tiny_llama(vocab_size=12)
    prompts = [torch.tensor([1, 2]), torch.tensor([4, 5, 6])]
    ids, labels = sequence_level(teacher, prompts, beams=3, max_new_tokens=4, pad=11)
    for row, prompt in enumerate(prompts):
        y = beam_search(teacher, prompt, 3, 4)[0][0]
        start = len(prompt)
        assert ids[row].tolist() == [*prompt.tolist(), *y, *[11] * (7 - start - len(y))]
        assert labels[row, start : start + len(y)].tolist() == y
        assert bool((labels[row, :start] == -100).all())
        assert bool((labels[row, start + len(y) :] == -100).all())
    third = torch.tensor(beam_search(teacher, prompts[0], 3, 4)[2][0])
    near, _ = sequence_level(teacher, prompts[:1], beams=3, max_new_tokens=4, references=[third])
    assert near[0, 2:].tolist() == third.tolist()  # interpolation keeps near what was given
    with pytest.raises(ValueError, match="2 prompts and 1 references"):
        sequence_level(teacher, prompts, references=[third])
    with pytest.raises(ValueError, match="training mode"):
        sequence_level(tiny_llama().train(), prompts)


def test_a_student_that_averages_two_answers_says_neither():
    # Two equally good answers, "0 0" and "1 1"; a student whose two words know nothing of each
    # other. On the data it learns each word's frequency; on the teacher's mode it commits itself.
    data, mode = torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 0], [0, 0]])
    valid = {}
    for name, texts in (("data", data), ("mode", mode)):
        student = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))  # position, word
        search = torch.optim.SGD([student], lr=3.0)
        for _ in range(300):
            search.zero_grad()
            log_q = student.log_softmax(-1)
            loss = -log_q[torch.arange(2), texts].sum(1).mean()
            loss.backward()
            search.step()
        q = student.detach().softmax(-1)
        valid[name] = float(q[0, 0] * q[1, 0] + q[0, 1] * q[1, 1])
    assert valid["data"] == pytest.approx(0.5, abs=1e-6)
    assert valid["mode"] > 0.99


def test_bleu_of_one_sentence():
    text = [1, 2, 3, 4, 5]
    assert bleu(text, text) == pytest.approx(1)
    assert bleu([6, 7], text) == 0
    assert bleu([], text) == 0
    # 4 of 5 words, (2+1)/(4+1) pairs, (1+1)/(3+1), (0+1)/(2+1)
    expected = (4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert bleu([1, 2, 3, 9, 5], text) == pytest.approx(expected)
    short = (1 * 1 * 1 * 1) ** 0.25 * math.exp(1 - 5 / 3)
    assert bleu([1, 2, 3], text) == pytest.approx(short)
    assert closest([[9, 9], [1, 2, 9], [1, 2, 3]], text) == [1, 2, 3]


def test_word_level_is_the_divergence_of_each_position():
    z, v = randn(2, 3, 5), randn(2, 3, 5, seed=1)
    assert float(word_level_loss(z, v)) == pytest.approx(float(temperature_kl(z, v)))


# --- on the student's own text --------------------------------------------------------------------


def test_gkd_compares_on_given_or_on_own_text(llama, tiny_llama, ids):
    teacher = tiny_llama(1)
    batch = {"input_ids": ids, "prompts": ids[:, :4]}
    with torch.no_grad():
        z, v = llama(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
        off = gkd(teacher, on_policy=0.0, beta=0.3, temperature=0.9)
        expected = generalized_jsd(z, v, 0.3, temperature=0.9)
        torch.testing.assert_close(off(llama, batch), expected)
        torch.testing.assert_close(off(llama, ids), expected)
        on = gkd(teacher, on_policy=1.0, beta=1.0, temperature=1.0, max_new_tokens=8)
        torch.manual_seed(3)
        value = on(llama, batch)
        torch.manual_seed(3)
        torch.rand(())
        own, labels = sample(llama, ids[:, :4], 8)
        z, v = llama(own).logits[:, 3:-1], teacher(own).logits[:, 3:-1]
        assert bool((labels[:, 4:] == own[:, 4:]).all())
        torch.testing.assert_close(value, reverse_kl(z, v))
        rescaled = gkd(teacher, on_policy=0.0, rescaled=True, temperature=1.0)
        torch.testing.assert_close(
            rescaled(llama, ids), 4 * gkd(teacher, on_policy=0.0, temperature=1.0)(llama, ids)
        )
    with pytest.raises(ValueError, match="a batch needs `prompts`"):
        on(llama, ids)
    with pytest.raises(ValueError, match="on_policy is 2"):
        gkd(teacher, on_policy=2)


@pytest.mark.parametrize("method", [gkd, minillm])
def test_training_on_own_text_brings_the_student_nearer(method, tiny_llama):
    options = dict(vocab_size=12, num_hidden_layers=1)
    teacher, student = tiny_llama(1, **options), tiny_llama(0, **options)
    prompts = torch.randint(0, 12, (16, 2), generator=torch.Generator().manual_seed(0))
    extra = dict(on_policy=1.0, temperature=1.0, beta=1.0) if method is gkd else {}
    loss = method(teacher, max_new_tokens=6, **extra)

    def distance(model):
        with torch.no_grad():
            ids, _ = sample(model, prompts, 6, generator=torch.Generator().manual_seed(9))
            return float(reverse_kl(model(ids).logits[:, 1:-1], teacher(ids).logits[:, 1:-1]))

    found = distill(
        student, lambda _: {"prompts": prompts}, TrainingSettings(40, learning_rate=1e-2), loss=loss
    )
    assert distance(found.model) < 0.6 * distance(student)


def sequence_kl(student, teacher, steps, vocabulary):
    """KL(q || p) over all texts of a first-order model, from tables (previous word, next word)."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    total = 0.0
    for y in itertools.product(range(vocabulary), repeat=steps):
        before = (0, *y[:-1])
        a = sum(log_q[i, j] for i, j in zip(before, y))
        b = sum(log_p[i, j] for i, j in zip(before, y))
        total = total + a.exp() * (a - b)
    return total


def test_the_policy_gradient_is_the_gradient_of_the_reverse_divergence():
    steps, vocabulary = 3, 3
    student = randn(vocabulary, vocabulary).requires_grad_()
    teacher = randn(vocabulary, vocabulary, seed=1)
    exact = torch.autograd.grad(sequence_kl(student, teacher, steps, vocabulary), student)[0]
    every = torch.tensor(list(itertools.product(range(vocabulary), repeat=steps)))
    before = torch.cat([torch.zeros(len(every), 1, dtype=torch.long), every[:, :-1]], 1)
    log_q = student.detach().log_softmax(-1)
    chance = log_q[before, every].sum(1).exp()
    estimate = torch.zeros_like(exact)
    for i in range(len(every)):  # the expectation, by all texts with their probabilities
        found = minillm_loss(
            student[before[i]][None], teacher[before[i]][None], every[i][None],
            teacher_share=0.0, normalized=False, clip=None,
        )  # fmt: skip
        estimate += chance[i] * torch.autograd.grad(found.total, student)[0]
    torch.testing.assert_close(estimate, exact)


def test_the_single_steps_are_exact_divergences_and_length_is_taken_out():
    z, v = randn(2, 4, 5), randn(2, 4, 5, seed=1)
    labels = torch.tensor([[1, 2, 3, 4], [2, 0, -100, -100]])
    found = minillm_loss(z, v, labels, teacher_share=0.0, clip=None)
    rows = (z.softmax(-1) * (z.log_softmax(-1) - v.log_softmax(-1))).sum(-1)
    expected = (rows[0].mean() + rows[1, :2].mean()) / 2
    assert float(found.single) == pytest.approx(float(expected))
    y = labels.clamp(min=0)[..., None]
    r = (v.log_softmax(-1) - z.log_softmax(-1)).gather(-1, y)[..., 0]
    long = (r[0, 1:].sum() / 3 + r[0, 2:].sum() / 2 + r[0, 3]) / 4 + r[1, 1] / 2
    assert float(found.long) == pytest.approx(float(-long / 2))
    # Drawn from a mixture, each step has the weight q / (alpha p + (1 - alpha) q).
    mixed = minillm_loss(z, v, labels, teacher_share=0.2, clip=None)
    p, q = (x.softmax(-1).gather(-1, y)[..., 0] for x in (v, z))
    w = q / (0.2 * p + 0.8 * q)
    expected = ((w * rows)[0].mean() + (w * rows)[1, :2].mean()) / 2
    assert float(mixed.single) == pytest.approx(float(expected))


def test_a_clipped_weight_has_no_gradient():
    # A word that the student likes far more than the mixture does, and that leads to good things.
    z = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[[-4.0, 4.0], [9.0, 0.0]]], dtype=torch.float64)
    labels = torch.tensor([[0, 0]])
    clipped = minillm_loss(z, v, labels, teacher_share=0.5, clip=0.2).long
    free = minillm_loss(z, v, labels, teacher_share=0.5, clip=None).long
    assert float(torch.autograd.grad(clipped, z, retain_graph=True)[0].abs().max()) == 0
    assert float(torch.autograd.grad(free, z)[0].abs().max()) > 0.1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(clip=0.0), "clip is 0.0; it must be above 0"),
        (dict(teacher_share=1.2), "teacher_share is 1.2"),
        (dict(labels=torch.full((1, 2), -100)), "no position of the batch counts"),
    ],
)
def test_what_a_policy_loss_refuses(options, sentence):
    labels = options.pop("labels", torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=sentence):
        minillm_loss(randn(1, 2, 3), randn(1, 2, 3), labels, **options)


def test_plain_text_is_added(llama, tiny_llama, ids):
    loss = minillm(tiny_llama(1), max_new_tokens=4)
    with torch.no_grad():
        torch.manual_seed(0)
        alone = loss(llama, {"prompts": ids[:, :4]})
        torch.manual_seed(0)
        both = loss(llama, {"prompts": ids[:, :4], "input_ids": ids})
        torch.testing.assert_close(both - alone, causal_lm_loss(llama, ids), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="a batch needs `prompts`"):
        loss(llama, ids)


def test_one_gaussian_covers_all_or_chooses_one():
    mixture = ([0.7, 0.3], [-2.0, 2.0], [0.5, 0.5])
    forward = fit_gaussian(*mixture, "forward")
    assert (forward.mean, forward.std) == pytest.approx((-0.8, 1.900), abs=5e-4)
    reverse = fit_gaussian(*mixture, "reverse")
    assert (reverse.mean, reverse.std) == pytest.approx((-2, 0.5), abs=2e-3)
    assert reverse.divergence == pytest.approx(0.35662, abs=1e-5)
    assert reverse.divergence == pytest.approx(-math.log(0.7), abs=1e-4)
    one = fit_gaussian([1.0], [3.0], [2.0])
    assert (one.mean, one.std, one.divergence) == pytest.approx((3, 2, 0), abs=1e-6)
    with pytest.raises(ValueError, match="weights must add up to 1"):
        fit_gaussian([0.7, 0.4], [0, 1], [1, 1])
    with pytest.raises(ValueError, match="direction is 'sideways'"):
        fit_gaussian([1.0], [0.0], [1.0], "sideways")
    with pytest.raises(ValueError, match="1 weights, 2 means"):
        fit_gaussian([1.0], [0.0, 1.0], [1.0])


# --- other vocabularies ---------------------------------------------------------------------------


def test_vocabularies_are_the_same_or_refused_with_an_example():
    same = {"a": 0, "b": 1}
    check_same_vocabulary(same, dict(same))
    with pytest.raises(ValueError, match="2 tokens and the teacher's 3; 2 differ, such as 'b'"):
        check_same_vocabulary(same, {"a": 0, "c": 1, "b": 2})


def test_sorted_probabilities_are_compared_across_sizes():
    z = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    v = torch.tensor([[0.1, 0.6, 0.2, 0.1]], dtype=torch.float64).log()
    assert float(uld_loss(z, v)) == pytest.approx(0.1 + 0.1 + 0.1 + 0.1)
    order = torch.tensor([2, 0, 3, 1])
    assert float(uld_loss(z, v[:, order])) == pytest.approx(float(uld_loss(z, v)))
    assert float(uld_loss(v[:, order], v)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="1 positions of the student and 2 of the teacher"):
        uld_loss(z, v.repeat(2, 1))
    with pytest.raises(ValueError, match="temperature is 0"):
        uld_loss(z, v, temperature=0)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_distance_lies_between_0_and_2(rows, ours, theirs, seed):
    z, v = 5 * randn(rows, ours, seed=seed), 5 * randn(rows, theirs, seed=seed + 1)
    assert -1e-12 <= float(uld_loss(z, v)) <= 2 + 1e-12
    assert float(uld_loss(z, v)) == pytest.approx(float(uld_loss(v, z)))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 4), max_size=6), st.lists(st.integers(1, 4), max_size=6))
def test_paired_positions_have_read_the_same(ours, theirs):
    ends = [list(itertools.accumulate(x)) for x in (ours, theirs)]
    pairs = common_boundaries(*ends)
    assert all(ends[0][i] == ends[1][j] for i, j in pairs)
    assert len(pairs) == len(set(ends[0]) & set(ends[1]))


def test_the_last_token_of_a_character_is_the_one():
    assert common_boundaries([1, 3, 3, 3, 4], [3, 4]) == [(3, 0), (4, 1)]
    with pytest.raises(ValueError, match="must not go back"):
        common_boundaries([2, 1], [1])


def two_tokenizers():
    words = Tokenizer(WordLevel({w: i for i, w in enumerate(("?", "ab", "abab", "b"))}, "?"))
    words.pre_tokenizer = Whitespace()
    letters = Tokenizer(WordLevel({w: i for i, w in enumerate(("?", "a", "b", " "))}, "?"))
    letters.pre_tokenizer = Split("", "isolated")
    return words, letters


def test_a_batch_pairs_the_positions_of_two_tokenizers():
    words, letters = two_tokenizers()
    batch = bridge_batch(["ab abab b", "b ab"], letters, words)
    assert batch["teacher_ids"].tolist() == [[1, 2, 3], [3, 1, 0]]
    assert batch["teacher_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    # The student's letters end words at positions 1, 6 and 8; the last one foresees nothing.
    assert batch["pairs"].tolist() == [[0, 1, 0], [0, 6, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="no position of the texts can be paired"):
        bridge_batch(["ab"], letters, words)


def test_a_student_learns_from_a_teacher_of_another_vocabulary(tiny_llama):
    words, letters = two_tokenizers()
    batch = bridge_batch(["ab abab b ab b", "b ab abab"], letters, words)
    teacher = tiny_llama(1, vocab_size=9)
    loss = uld(teacher, weight=10.0)
    student = tiny_llama(0, vocab_size=4)
    with torch.no_grad():
        hard = uld(teacher, weight=0.0)(student, batch)
        row, i, j = batch["pairs"].T
        z = student(batch["student_ids"], attention_mask=batch["student_mask"]).logits[row, i]
        v = teacher(batch["teacher_ids"], attention_mask=batch["teacher_mask"]).logits[row, j]
        torch.testing.assert_close(loss(student, batch), hard + 10 * uld_loss(z, v))
    found = distill(student, lambda _: batch, TrainingSettings(20, learning_rate=1e-2), loss=loss)
    assert found.training.losses[-1] < found.training.losses[0]
    with pytest.raises(ValueError, match="weight is -1"):
        uld(teacher, weight=-1)


# --- prompts --------------------------------------------------------------------------------------


def test_only_the_last_answer_of_a_prompt_counts():
    ids, labels = in_context_batch(
        [[([5], [6]), ([7, 8], [9])], [([5], [6, 7])]], separator=[1], pad=0
    )
    assert ids.tolist() == [[5, 6, 1, 7, 8, 9], [5, 6, 7, 0, 0, 0]]
    assert labels.tolist() == [[-100] * 5 + [9], [-100, 6, 7, -100, -100, -100]]
    with pytest.raises(ValueError, match="its last one an answer"):
        in_context_batch([[([5], [])]])


def test_tasks_are_drawn_without_repetition():
    pools = [[([i], [i + 10]) for i in range(4)], [([i + 50], [i]) for i in range(5)]]
    rows = draw_tasks(pools, 3, 20, seed=1)
    assert len(rows) == 20
    for row in rows:
        assert len({q[0] for q, _ in row}) == 4
        assert len({q[0] >= 50 for q, _ in row}) == 1  # all of one task
    assert rows == draw_tasks(pools, 3, 20, seed=1)
    assert rows != draw_tasks(pools, 3, 20, seed=2)
    with pytest.raises(ValueError, match="a task has 4 solved examples"):
        draw_tasks(pools, 4, 1)
    with pytest.raises(ValueError, match="there is no task"):
        draw_tasks([], 1, 1)


def test_in_context_learning_is_distilled_beside_plain_text(llama, tiny_llama, ids):
    teacher = tiny_llama(1)
    prompts = in_context_batch([[([5], [6]), ([7, 8], [9])], [([3], [4]), ([5], [6])]])
    loss = in_context(teacher, temperature=2.0, weight=0.7, text_weight=0.5)
    with torch.no_grad():
        expected = hinton(teacher, temperature=2.0, weight=0.7)(llama, prompts)
        expected = expected + 0.5 * causal_lm_loss(llama, ids)
        torch.testing.assert_close(loss(llama, {"prompts": prompts, "text": ids}), expected)
    with pytest.raises(ValueError, match="a batch needs `text`"):
        loss(llama, {"prompts": prompts})
    with pytest.raises(ValueError, match="text_weight is -1"):
        in_context(teacher, text_weight=-1)


def test_a_prompt_is_distilled_away(llama, ids):
    context = torch.tensor([9, 4, 77, 12])
    text = ids[:, :12]
    loss = context_distillation(llama, context, temperature=1.5)
    with torch.no_grad():
        z = llama(text).logits[:, :-1]
        v = llama(torch.cat([context.expand(4, -1), text], 1)).logits[:, 4:-1]
        torch.testing.assert_close(loss(llama, text), temperature_kl(z, v, 1.5))
    found = distill(llama, lambda _: text, TrainingSettings(30, learning_rate=3e-3), loss=loss)
    assert found.training.losses[-1] < 0.4 * found.training.losses[0]
    with pytest.raises(ValueError, match="the context is empty"):
        context_distillation(llama, context[:0])
    with pytest.raises(ValueError, match="has 64 positions"):
        context_distillation(llama, torch.arange(60))(llama, text)
    with pytest.raises(ValueError, match="not an attention mask"):
        loss(llama, {"input_ids": text, "attention_mask": torch.ones_like(text)})


# --- chain of thought -----------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(0, 99999), st.integers(0, 99999))
def test_the_exact_teacher_reasons_to_the_right_sum(a, b):
    worked = addition(a, b)
    columns = worked.reasoning.split("; ")
    written = "".join(reversed([c.split(" w")[1][0] for c in columns]))
    carry = columns[-1].split(" c")[1].removesuffix("0")
    assert int(carry + written) == a + b == int(worked.answer)
    for column in columns:  # every line is true
        left, right = column.split(" ")[0].split("=")
        assert sum(int(term) for term in left.split("+")) == int(right)


def test_two_tasks_or_one():
    worked = addition(38, 47)
    assert worked.reasoning == "8+7=15 w5 c1; 3+4+1=8 w8 c0"
    predictions, explanations = two_tasks([worked])
    assert predictions == [("predict: 38+47", "85")]
    assert explanations == [("explain: 38+47", worked.reasoning)]
    ((question, target),) = one_task([worked])
    assert question == "predict: 38+47"
    assert final_answer(target) == "85"
    assert final_answer("85") == "85"
    with pytest.raises(ValueError, match="neither may be negative"):
        addition(-1, 2)


def test_wrong_reasonings_are_thrown_away_and_equals_kept_once():
    right, wrong = Worked("1+1", "r", "2"), Worked("1+1", "s", "3")
    other = Worked("1+1", "t", " 2 ")
    assert keep_right([right, wrong, right, other], ["2"] * 4) == [right, other]
    with pytest.raises(ValueError, match="1 samples and 2 answers"):
        keep_right([right], ["2", "3"])


def test_step_by_step_weighs_both_tasks(llama):
    def encode(text):
        return [ord(c) % 128 for c in text]

    predictions, explanations = two_tasks([addition(3, 4), addition(18, 4)])
    batch = tuple(pair_batch(p, encode, eos=1) for p in (predictions, explanations))
    ids, labels = batch[0]
    counted = labels[0][labels[0] != -100].tolist()
    assert counted == [*encode("7"), 1]
    assert ids.shape == labels.shape
    with torch.no_grad():
        a, b = (causal_lm_loss(llama, part) for part in batch)
        torch.testing.assert_close(step_by_step(0.25)(llama, batch), 0.25 * a + 0.75 * b)
        torch.testing.assert_close(step_by_step(1.0)(llama, batch), a)
    with pytest.raises(ValueError, match="weight is 2"):
        step_by_step(2)
    with pytest.raises(ValueError, match="there is no pair"):
        pair_batch([], encode, eos=1)


# --- instructions ---------------------------------------------------------------------------------


def score(instruction, text):
    """A referee that counts the words of the instruction that an answer takes up."""
    return float(len(set(instruction.split()) & set(text.split())))


def test_likeness_of_instructions():
    assert rouge_l("a b c d", "a b c d") == 1
    assert rouge_l("a b c d", "b d") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "a") == 0
    kept = unlike(["sort the list", "sort the list now", "write a poem", " "], ["sort a list"])
    assert kept == ["sort the list", "write a poem"]
    with pytest.raises(ValueError, match="limit is 0"):
        unlike([], [], 0)


@settings(max_examples=30)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_likeness_is_symmetric_and_bounded(a, b):
    first, second = " ".join(a), " ".join(b)
    assert rouge_l(first, second) == rouge_l(second, first)
    assert 0 <= rouge_l(first, second) <= 1


def test_the_loop_asks_more_where_the_student_is_behind():
    lessons = answer(lambda text: text, ["alpha beta", "gamma delta", ""])
    assert lessons == [Lesson("alpha beta", "alpha beta"), Lesson("gamma delta", "gamma delta")]

    def student(text):
        return text if "alpha" in text else "I do not know"

    judged = judge(lessons, student, score)
    assert [item.gap for item in judged] == [0, 2]
    hard, easy = split_hard(judged, 1.0)
    assert [lesson.instruction for lesson in hard] == ["gamma delta"]
    assert [lesson.instruction for lesson in easy] == ["alpha beta"]
    asked = []

    def vary(text, number):
        asked.append((text, number))
        return [f"{text.split()[0]} new words {i} {text}x" for i in range(number)]

    turn = next_round(lessons, student, str.upper, score, vary, count=5, hard_share=0.6, limit=1.0)
    assert asked == [("gamma delta", 3), ("alpha beta", 2)]
    assert len(turn.new) == 5
    assert turn.lessons == [*lessons, *turn.new]
    assert turn.new[0].response == turn.new[0].instruction.upper()  # the teacher answers
    asked.clear()
    next_round(lessons, str, str, score, vary, count=2)
    assert asked == [("alpha beta", 1), ("gamma delta", 1)]  # nothing is hard: more of all
    with pytest.raises(ValueError, match="threshold is 0"):
        split_hard(judged, 0.0)
    with pytest.raises(ValueError, match="at least one lesson"):
        next_round([], str, str, score, vary, count=1)
