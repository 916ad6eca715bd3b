"""Exits of classifiers, the guarantee, deferral and cascades."""

import math

import pytest
import torch
from scipy.stats import binom

from effnb.inference.adaptive_computation import (
    branchynet,
    cascades,
    classifiers,
    consistency,
    deebert,
    deferral,
    learn_then_test,
    pabee,
)

# --------------------------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def encoder():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=32,
        )
    ).eval()


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (12, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[3:6, 6:] = 0
    return ids, mask


@pytest.fixture(scope="module")
def model(encoder):
    return classifiers.ExitClassifiers(encoder, 3).eval()


LOGITS = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(2)) * 2


def test_the_layers_are_those_of_the_encoder(model, encoder, texts):
    ids, mask = texts
    with torch.inference_mode():
        out = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        found = model.pooled(ids, mask)
    for states, pooled in zip(out.hidden_states[1:], found, strict=True):
        torch.testing.assert_close(pooled, model.pool(states, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [branchynet.by_entropy(1.08), branchynet.by_entropy([1.0, 1.09, 1.05]), pabee.by_patience(1)],
    ids=["entropy", "one for each exit", "patience"],
)
def test_compaction_changes_nothing(model, texts, rule):
    ids, mask = texts
    with torch.inference_mode():
        wanted = classifiers.leave(model(ids, mask), rule)
    found = model.classify(ids, mask, rule)
    assert found.exits.tolist() == wanted.exits.tolist()
    assert found.classes.tolist() == wanted.classes.tolist()


def test_extremes_are_the_first_exit_and_the_whole_model(model, texts):
    ids, mask = texts
    with torch.inference_mode():
        logits = model(ids, mask)
    never = model.classify(ids, mask, branchynet.by_entropy(0.0))
    assert set(never.exits.tolist()) == {4}
    assert never.classes.tolist() == logits[-1].argmax(-1).tolist()
    always = model.classify(ids, mask, branchynet.by_entropy(math.log(3) + 1e-3))
    assert set(always.exits.tolist()) == {1}
    patient = model.classify(ids, mask, pabee.by_patience(4))
    assert set(patient.exits.tolist()) == {4}


def test_layers_are_monotone_in_threshold_and_patience():
    by_entropy = [
        classifiers.leave(LOGITS, branchynet.by_entropy(t)).mean_layers for t in (0, 0.3, 0.7, 1.2)
    ]
    assert by_entropy == sorted(by_entropy, reverse=True)
    by_patience = [
        classifiers.leave(LOGITS, pabee.by_patience(p)).mean_layers for p in (1, 2, 3, 4)
    ]
    assert by_patience == sorted(by_patience)
    assert min(classifiers.leave(LOGITS, pabee.by_patience(2)).exits) >= 3


def test_no_rule_leaves_before_the_oracle_and_agrees_with_the_model():
    found = classifiers.oracle(LOGITS)
    best = LOGITS.argmax(-1)
    assert found.classes.tolist() == best[-1].tolist()
    for rule in (branchynet.by_entropy(0.4), pabee.by_patience(1)):
        left = classifiers.leave(LOGITS, rule)
        right = left.classes == best[-1]
        assert bool((found.exits[right] <= left.exits[right]).all())


def test_the_counter_starts_again_after_a_break():
    def at(*classes):
        return torch.nn.functional.one_hot(torch.tensor(classes), 3).float()[:, None]

    assert pabee.counter(at(0, 0, 0)).tolist() == [2]
    assert pabee.counter(at(0, 0, 1)).tolist() == [0]
    assert pabee.counter(at(1, 0, 0)).tolist() == [1]
    numbers = torch.tensor([0.5, 0.58, 0.9, 0.95])[:, None, None]
    assert pabee.counter(numbers, 0.1).tolist() == [1]
    assert pabee.by_patience(1, 0.1)(numbers).tolist() == [True]


def test_entropy_is_in_nats():
    assert float(branchynet.entropy(torch.zeros(8))) == pytest.approx(math.log(8))


def test_losses_of_the_three():
    labels = torch.arange(50) % 3
    each = classifiers.exit_losses(LOGITS, labels)
    torch.testing.assert_close(branchynet.joint_loss(LOGITS, labels), sum(each))
    torch.testing.assert_close(
        branchynet.joint_loss(LOGITS, labels, [1, 0, 0, 2]), each[0] + 2 * each[3]
    )
    torch.testing.assert_close(deebert.ramp_loss(LOGITS, labels), sum(each[:-1]))
    wanted = sum(j * loss for j, loss in zip((1, 2, 3, 4), each)) / 10
    torch.testing.assert_close(pabee.joint_loss(LOGITS, labels), wanted)


def test_heads_learn_and_the_given_ones_stay(model):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 3
    pooled = torch.randn(4, 90, 16, generator=generator)
    pooled[..., :3] += 4 * torch.nn.functional.one_hot(labels, 3)
    before = [p.clone() for p in model.heads.parameters()]
    new = deebert.train_heads(model.heads, pooled, labels, steps=120, learning_rate=5e-3)
    logits = torch.stack([head(x) for head, x in zip(new, pooled)])
    assert bool(((logits.argmax(-1) == labels).float().mean(1) > 0.95).all())
    assert all(torch.equal(a, b) for a, b in zip(before, model.heads.parameters()))


# ------------------------------------------------------------------------------- the guarantee


@pytest.mark.parametrize(
    ("n", "mean", "delta", "wanted"),
    [
        (500, 0.05, 0.1, 9.623e-5),
        (500, 0.08, 0.1, 0.20411),
        (500, 0.10, 0.1, 1.0),
        (100, 0.0, 0.05, 5.9205e-3),
        (1000, 0.02, 0.05, 2.0819e-6),
    ],
)
def test_p_values_of_hoeffding_and_bentkus(n, mean, delta, wanted):
    assert learn_then_test.hoeffding_bentkus(mean, n, delta) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(("k", "n", "p"), [(0, 7, 0.3), (40, 400, 0.1), (999, 1000, 0.5)])
def test_the_binomial_distribution_is_scipys(k, n, p):
    assert learn_then_test.binomial_cdf(k, n, p) == pytest.approx(binom.cdf(k, n, p), rel=1e-9)


def test_float_noise_adds_no_error():
    noisy = sum([0.1] * 3) / 10  # a little above 0.03
    assert learn_then_test.hoeffding_bentkus(noisy, 100, 0.1) == pytest.approx(
        learn_then_test.hoeffding_bentkus(0.03, 100, 0.1), rel=1e-6
    )


def risk(x):
    return 0.25 * (1 - x) ** 2


@pytest.mark.parametrize(
    ("rule", "broken", "mean"),
    [("fixed sequence", 0.003, 0.499), ("naive", 0.394, 0.387), ("Bonferroni", 0.0, 0.559)],
)
def test_the_guarantee_is_kept_and_the_naive_rule_breaks_it(rule, broken, mean):
    found = learn_then_test.simulate(risk, rule=rule, repetitions=3000)
    assert found.violations == pytest.approx(broken, abs=0.03)
    assert found.mean_threshold == pytest.approx(mean, abs=0.03)
    assert (found.violations <= 0.05) == (rule != "naive")


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_a_risk_that_is_never_monotone_keeps_the_promise_only_in_sequence(epsilon):
    """Thresholds just past the tolerance, many of them: the smallest p is bound to be lucky."""
    grid = [round(1 - j / 100, 2) for j in range(60)]

    def flat(x):
        return 0.02 if x >= 0.9 else 0.105

    kept = learn_then_test.simulate(
        flat, grid=grid, epsilon=epsilon, n=200, repetitions=1500, seed=1, shared=False
    )
    lucky = learn_then_test.simulate(
        flat,
        grid=grid,
        epsilon=epsilon,
        n=200,
        repetitions=1500,
        seed=1,
        rule="smallest p",
        shared=False,
    )
    assert kept.violations <= epsilon
    assert lucky.violations > epsilon


def test_calibration_walks_down_and_stops_at_the_first_failure():
    grid = [1.0, 0.8, 0.6, 0.4]
    n = 200
    losses = [[0.0] * n, [0.0] * n, [0.3] * n, [0.0] * n]
    found = learn_then_test.calibrate(grid, losses, 0.1, 0.05)
    assert found.threshold == 0.8
    lucky = learn_then_test.calibrate(grid, losses, 0.1, 0.05, "smallest p")
    assert lucky.threshold == 0.4
    none = learn_then_test.calibrate(grid, [[0.5] * n] * 4, 0.1, 0.05)
    assert none.threshold is None
    assert none.p_values[0] == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda f: f([1.0], [[0.0]], 0.0, 0.1), "delta is 0"),
        (lambda f: f([1.0], [[0.0]], 1.0, 0.1), "delta is 1"),
        (lambda f: f([1.0], [[0.0]], 0.1, 1.5), "epsilon is 1.5"),
        (lambda f: f([1.0], [[]], 0.1, 0.1), "calibration set is empty"),
        (lambda f: f([0.5, 0.7], [[0.0], [0.0]], 0.1, 0.1), "must fall"),
        (lambda f: f([1.0], [[1.5]], 0.1, 0.1), "outside of"),
        (lambda f: f([1.0, 0.5], [[0.0]], 0.1, 0.1), "one row for each"),
        (lambda f: f([1.0], [[0.0]], 0.1, 0.1, "lucky"), "choose of"),
        (lambda f: learn_then_test.hoeffding_bentkus(0.1, 0, 0.1), "empty"),
        (lambda f: learn_then_test.simulate(risk, n=0), "at least one prompt"),
        (lambda f: branchynet.by_entropy(-0.1), "at least 0"),
        (lambda f: pabee.by_patience(0), "at least 1"),
        (lambda f: pabee.by_patience(1, 0.0), "above 0"),
        (lambda f: classifiers.leave(LOGITS[0], pabee.by_patience(1)), "exits, items"),
        (lambda f: classifiers.ExitClassifiers(torch.nn.Linear(2, 2), 3), "laid out otherwise"),
        (lambda f: deferral.css_minimizer(torch.ones(2), torch.ones(()), 2.0), "cost is 2"),
        (lambda f: cascades.sequence_confidence(torch.zeros(0)), "no confidence"),
        (lambda f: cascades.sequence_confidence(torch.zeros(2), 1.5), "quantile is 1.5"),
        (lambda f: cascades.deferral_curve([0.1], [1.0, 0.0], [0.0]), "one of each"),
        (
            lambda f: deferral.fit_probability(torch.zeros(0, 2), torch.zeros(0).bool()),
            "at least one item",
        ),
    ],
)
def test_bad_input_is_answered_with_one_sentence(call, says):
    with pytest.raises(ValueError, match=says):
        call(learn_then_test.calibrate)


# --------------------------------------------------------------------------------- consistency


def test_distances_of_texts():
    assert consistency.token_f1([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 3)
    assert consistency.rouge_l("abcd", "acbd") == pytest.approx(0.75)
    assert consistency.textual_distance([1, 2], [1, 2]) == 0
    assert consistency.textual_distance([], [1]) == 1
    assert consistency.token_f1([], []) == consistency.rouge_l([], []) == 1
    better = consistency.risk_difference("abcd", "xxxx", "abcd")
    assert better == 0
    assert consistency.risk_difference("xxxx", "abcd", "abcd") == 1


# ------------------------------------------------------------------------------------ deferral


def test_the_minimizer_of_css_is_the_closed_form():
    eta = torch.tensor([0.9, 0.05, 0.05])
    found = deferral.css_minimizer(eta, torch.tensor(0.8), 0.3)
    assert [round(x, 3) for x in found.tolist()] == [0.552, 0.063, 0.063, 0.322]


@pytest.mark.parametrize(("expert", "cost"), [(0.8, 0.3), (0.5, 0.0), (0.95, 0.6)])
def test_descent_on_the_css_loss_finds_the_minimizer(expert, cost):
    eta = torch.tensor([0.6, 0.3, 0.1])
    labels = torch.arange(3).repeat_interleave(2)
    right = torch.tensor([True, False]).repeat(3)
    mass = (eta[:, None] * torch.tensor([expert, 1 - expert])).flatten()
    weights = (mass[:, None] * deferral.css_weights(labels, right, 3, cost)).sum(0)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -(weights * logits.log_softmax(0)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = deferral.css_minimizer(eta, torch.tensor(expert), cost)
    torch.testing.assert_close(logits.detach().softmax(0), wanted, atol=2e-4, rtol=0)


def test_css_weights_by_hand():
    found = deferral.css_weights(torch.tensor([0, 0]), torch.tensor([True, False]), 2, 0.25)
    assert found.tolist() == [[1.0, 0.0, 0.75], [1.25, 0.25, 0.0]]


def test_the_minimizer_defers_where_the_best_rule_does():
    generator = torch.Generator().manual_seed(0)
    eta = torch.rand(200, 4, generator=generator).softmax(-1)
    expert = torch.rand(200, generator=generator)
    for cost in (0.0, 0.2, 0.5):
        found = deferral.css_minimizer(eta, expert, cost)
        assert torch.equal(found.argmax(-1) == 4, deferral.best_rule(eta, expert, cost))


def planted(n=4000, seed=0):
    """A base that is sure everywhere, and an expert that is good on one side only."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    right = torch.rand(n, generator=generator) < 0.7
    expert = torch.rand(n, generator=generator) < torch.where(x[:, 0] > 0, 0.95, 0.2)
    return x, right, expert


def test_post_hoc_rules_find_the_specialist_and_chow_cannot():
    x, right, expert = planted()
    new, right2, expert2 = planted(seed=1)
    cost = 0.1
    rule = deferral.fit_rejector(x, right, expert, cost)
    learnt = deferral.deferral_loss(right2, expert2, rule(new) > 0, cost)
    fitted = deferral.fit_probability(x, expert)
    plug = deferral.plug_in(fitted(new).sigmoid(), torch.full((len(new),), 0.7), cost)
    by_plug = deferral.deferral_loss(right2, expert2, plug, cost)
    constant = torch.full((len(new),), 0.7)  # a confidence that is the same everywhere
    chow = min(
        deferral.deferral_loss(right2, expert2, cascades.chow(constant, t), cost)
        for t in (-math.inf, math.inf)
    )
    assert learnt < chow - 0.03
    assert by_plug < chow - 0.03


# ------------------------------------------------------------------------------------ cascades


def test_the_curve_goes_from_one_model_to_the_other():
    small, large = torch.tensor([1.0, 0, 1, 0]), torch.tensor([0.0, 0, 1, 1])
    curve = cascades.deferral_curve([0.1, 0.9, 0.3, 0.8], small, large, (1.0, 10.0))
    assert (curve[0].loss, curve[-1].loss) == (0.5, 0.5)
    assert (curve[0].cost, curve[-1].cost) == (1.0, 11.0)  # a cascade pays for both
    assert curve[1].loss == 0.25
    assert cascades.benefit(curve) > 0
    flat = cascades.deferral_curve([1, 2, 3, 4], [1.0] * 4, [0.0] * 4)
    assert cascades.benefit(flat) == pytest.approx(0)


def test_confidences_of_a_text():
    values = torch.tensor([-1.0, -2.0, -6.0])
    said = cascades.sequence_confidence
    assert (said(values), said(values, "sum"), said(values, "min")) == (-3, -9, -6)
    assert said(values, 0.5) == -2
    assert said(values, 0.0) == -6


def test_a_cascade_of_three():
    scores = torch.tensor([[0.9, 0.1, 0.1], [0.0, 0.8, 0.2], [0.0, 0.0, 0.0]])
    losses = torch.tensor([[1.0, 1, 1], [2.0, 2, 2], [3.0, 3, 3]])
    found = cascades.cascade(scores, losses, (1, 2, 4), (0.5, 0.5))
    assert found.model == (0, 1, 2)
    assert found.loss == 2.0
    assert found.cost == pytest.approx((1 + 3 + 7) / 3)
    for thresholds, who in (((-math.inf, 0), 0), ((math.inf, -math.inf), 1), ((math.inf,) * 2, 2)):
        assert set(cascades.cascade(scores, losses, (1, 2, 4), thresholds).model) == {who}
    with pytest.raises(ValueError, match="has a threshold"):
        cascades.cascade(scores, losses, (1, 2, 4), (0.5,))
