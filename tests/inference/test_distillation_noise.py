"""Teachers that err, and teachers that make inputs: exact games, unbiased weights, clean optima."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.losses import temperature_kl
from effnb.core.training import TrainingSettings
from effnb.inference.distillation import (
    PrincipalComponents,
    RobustChoice,
    accuracy_by_class,
    class_losses,
    disagreement,
    distortion_of,
    draw,
    estimate_alpha,
    estimate_weights,
    forward_correction,
    game_value,
    gradient_noise,
    hinton_loss,
    information_gain,
    make_inputs,
    margin_sampling,
    mix,
    neighbour_mean,
    random_noise,
    robust_choice,
    slam_loss,
    teacher_guided_loss,
    top_margin,
    update_weights,
    weight_of,
    weighted_loss,
    worst_class,
    worst_class_loss,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- weighted distillation ------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.floats(0, 0.99), st.integers(0, 99), st.integers(2, 6))
def test_the_expected_weighted_loss_is_the_clean_one(p, seed, classes):
    logits = randn(5, classes, seed=seed)
    y = torch.randint(classes, (5,), generator=torch.Generator().manual_seed(seed))
    wrong = (y + 1) % classes
    noise = torch.full((5,), p, dtype=torch.float64)
    w = weight_of(noise, distortion_of(logits, y, wrong))
    right, other = (
        nn.functional.cross_entropy(logits, label, reduction="none") for label in (y, wrong)
    )
    torch.testing.assert_close(w * ((1 - noise) * right + noise * other), right)
    assert float(weighted_loss(logits, y, w)) == pytest.approx(float((w * right).mean()))


def fitted(loss, steps=300):
    """The probability that a student which fits one example by itself ends at."""
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(z), z)
        z = (z - 3 * gradient).detach().requires_grad_()
    return float(z.softmax(-1)[0, 0].detach())


def test_weights_do_not_help_a_student_that_fits_every_example_and_mixing_does():
    p = 0.3
    noise = torch.tensor([p], dtype=torch.float64)
    both = [torch.tensor([0]), torch.tensor([1])]  # the right label, and the wrong one

    def plain(z):
        return sum(share * nn.functional.cross_entropy(z, y) for share, y in zip((1 - p, p), both))

    def weighted(z):
        w = weight_of(noise, distortion_of(z, *both))
        return sum(share * weighted_loss(z, y, w) for share, y in zip((1 - p, p), both))

    def mixed(z):
        scores = [torch.tensor([[1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0]]).double()]
        return sum(share * slam_loss(z, v, 1 - noise, 2) for share, v in zip((1 - p, p), scores))

    assert fitted(plain) == pytest.approx(1 - p, abs=1e-6)
    assert fitted(weighted) == pytest.approx(1 - p, abs=1e-6)  # whatever the weight
    assert fitted(mixed) > 0.95  # on its way to the clean answer


def digits():
    """64 features in [0, 1], ten classes: 597 for the test and 1,200 for training."""
    import numpy as np
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    return (x[597:], y[597:]), (x[:597], y[:597])


def test_weights_help_a_small_student_on_digits():
    # Is a digit at least 5? The teacher is wrong on 4, 8 and 9 with probability 0.45, else 0.1.
    (x, digit), (test_x, test_digit) = digits()
    y, test_y = (digit >= 5).long(), (test_digit >= 5).long()
    hard = torch.isin(digit, torch.tensor([4, 8, 9]))
    noise = torch.where(hard, 0.45, 0.1)
    gains = []
    for seed in range(3):
        flipped = torch.rand(len(y), generator=torch.Generator().manual_seed(seed)) < noise
        said = torch.where(flipped, 1 - y, y)

        def student(weighted, said=said):
            model = nn.Linear(64, 2)
            nn.init.zeros_(model.weight)
            search = torch.optim.Adam(model.parameters(), lr=0.05)
            for _ in range(150):
                z = model(x)
                w = weight_of(noise, distortion_of(z, y, 1 - y)) if weighted else torch.ones(len(x))
                search.zero_grad()
                weighted_loss(z, said, w).backward()
                search.step()
            return float((model(test_x).argmax(1) == test_y).double().mean())

        gains.append(student(True) - student(False))
    assert sum(gains) / 3 > 0.005  # on average; what the paper's setting allows at this size
    assert min(gains) > -0.01


def test_mixing_helps_against_even_noise_on_digits():
    (x, y), (test_x, test_y) = digits()
    draws = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=draws) < 0.4
    said = torch.where(wrong, (y + 1 + torch.randint(9, y.shape, generator=draws)) % 10, y)
    alpha = torch.full((len(y),), 0.6)

    def student(loss):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        search = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(200):
            search.zero_grad()
            loss(model(x)).backward()
            search.step()
        return float((model(test_x).argmax(1) == test_y).double().mean())

    scores = nn.functional.one_hot(said, 10).float()
    mixed = student(lambda z: slam_loss(z, scores, alpha, 10))  # any class may be the right one
    assert mixed > student(lambda z: nn.functional.cross_entropy(z, said)) + 0.02


def test_weights_are_estimated_from_a_few_labelled_examples():
    # A teacher that is wrong exactly where it is unsure.
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    sure = rand(200) < 0.5
    teacher = nn.functional.one_hot(y, 3) * torch.where(sure, 6.0, 0.0).double()[:, None]
    teacher[~sure] += nn.functional.one_hot((y[~sure] + 1) % 3, 3) * 0.4
    student = nn.functional.one_hot(y, 3).double() + 0.1 * randn(200, 3)
    w = estimate_weights(student, teacher, student[:60], teacher[:60], y[:60], k=5)
    assert w.shape == (200,)
    assert float(w[sure].mean()) == pytest.approx(1, abs=0.05)  # p = 0 there
    assert float(w[~sure].mean()) < 0.75
    alpha = estimate_alpha(teacher, teacher[:60], y[:60], neighbours=5)
    assert float(alpha[sure].min()) == 1
    assert float(alpha[~sure].max()) == 0.5  # the least that is allowed
    assert neighbour_mean(randn(4, 2), randn(6, 2), torch.arange(6.0).double(), 6) == pytest.approx(
        [2.5] * 4
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: weight_of(torch.tensor([1.1]), torch.ones(1)), "each must lie between 0 and 1"),
        (lambda: weight_of(torch.tensor([0.1]), torch.zeros(1)), "each must be above 0"),
        (
            lambda: weighted_loss(randn(3, 2), torch.zeros(3).long(), torch.ones(2).double()),
            "3 rows of scores, 3 labels and 2 weights",
        ),
        (
            lambda: weighted_loss(randn(1, 2), torch.zeros(1).long(), -torch.ones(1).double()),
            "none negative",
        ),
        (lambda: top_margin(randn(3, 1)), "a margin is between two classes"),
        (lambda: neighbour_mean(randn(2, 2), randn(3, 2), randn(3), 4), "k is 4"),
    ],
)
def test_what_weights_refuse(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# --- SLaM -----------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(2, 6), st.floats(0.1, 1), st.integers(0, 99), st.data())
def test_mixing_two_classes_is_a_symmetric_noise_matrix(rows, classes, alpha, seed, data):
    f = randn(rows, classes, seed=seed).softmax(-1)
    teacher = randn(rows, classes, seed=seed + 1)
    a = torch.full((rows,), alpha, dtype=torch.float64)
    k = data.draw(st.integers(2, classes))
    mixed = mix(f, teacher, a, k)
    assert mixed.shape == f.shape
    assert float(mixed.min()) >= 0
    # Outside the k classes f is not mixed with anything, and is only scaled down.
    inside = f.gather(1, teacher.topk(k, 1).indices).sum(1)
    torch.testing.assert_close(mixed.sum(1), a + (1 - a) * (k - inside) / (k - 1))
    if k == classes == 2:
        noise = torch.tensor([[alpha, 1 - alpha], [1 - alpha, alpha]], dtype=torch.float64)
        torch.testing.assert_close(mixed, forward_correction(f, noise))
    if k == classes:  # all classes: the mixture is a distribution again
        torch.testing.assert_close(mixed.sum(1), torch.ones(rows).double())


def test_a_teacher_that_is_never_wrong_mixes_nothing():
    z, v = randn(4, 5), randn(4, 5, seed=1)
    ones = torch.ones(4, dtype=torch.float64)
    expected = nn.functional.cross_entropy(z, v.argmax(1))
    assert float(slam_loss(z, v, ones, 3)) == pytest.approx(float(expected))
    soft = -(v.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()
    assert float(slam_loss(z, v, ones, 3, hard=False)) == pytest.approx(float(soft))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: mix(rand(2, 3), rand(2, 3), torch.ones(2).double(), 1), "k is 1"),
        (lambda: mix(rand(2, 3), rand(2, 3), torch.ones(2).double(), 4), "the 3 classes"),
        (lambda: mix(rand(2, 3), rand(2, 3), 2 * torch.ones(2).double(), 2), "between 0 and 1"),
        (lambda: forward_correction(rand(2, 2), torch.ones(2, 2).double()), "add up to 1"),
        (lambda: slam_loss(rand(2, 3), rand(2, 4), torch.ones(2).double()), "one vocabulary"),
    ],
)
def test_what_mixing_refuses(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# --- robust active distillation -------------------------------------------------------------------


def test_the_gains_of_all_that_is_drawn_are_equal():
    gains = torch.tensor([0.9, 0.2, 0.5, 0.7, 0.1], dtype=torch.float64)
    found = robust_choice(gains, 1)
    worth = (found.probabilities * gains)[found.probabilities > 0]
    torch.testing.assert_close(worth, worth[:1].expand_as(worth))
    assert len(worth) == found.support
    assert float(found.probabilities.sum()) == pytest.approx(1)
    # By hand: I = 3 gives 1 / 4.53968, I = 4 gives 2 / 9.53968, I = 5 gives 3 / 19.53968.
    assert found.support == 3
    assert found.value == pytest.approx(1 / (1 / 0.9 + 1 / 0.7 + 1 / 0.5))
    assert found.value == pytest.approx(game_value(found.probabilities, gains, 1))


def test_without_an_adversary_the_best_input_is_all():
    found = robust_choice(torch.tensor([0.3, 0.8, 0.5]), 0)
    assert found.probabilities.tolist() == [0, 1, 0]
    assert found.value == pytest.approx(0.8)


@settings(max_examples=40)
@given(st.integers(1, 12), st.integers(0, 99), st.data())
def test_no_other_choice_gains_more(n, seed, data):
    k = data.draw(st.integers(0, (n - 1) // 2))
    gains = rand(n, seed=seed) + 1e-3
    found = robust_choice(gains, k)
    assert found.value == pytest.approx(game_value(found.probabilities, gains, k), abs=1e-12)
    assert found.probabilities.shape == gains.shape
    for i in range(20):
        other = rand(n, seed=1000 * seed + i)
        other = other**8 / (other**8).sum()
        assert game_value(other, gains, k) <= found.value + 1e-12


def test_unsure_students_gain_most():
    gains = information_gain(torch.tensor([[5.0, 0.0, 0.0], [0.1, 0.0, -9.0], [99.0, 0.0, 0.0]]))
    assert float(gains[1]) > 0.9 > float(gains[0]) > float(gains[2]) > 0
    assert margin_sampling(gains, 2).tolist() == [1, 0]


def test_questions_are_drawn_without_replacement_by_their_probabilities():
    choice = RobustChoice(torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0]).double(), 0.1, 3)
    first = torch.zeros(5)
    for seed in range(600):
        drawn = draw(choice, 2, generator=torch.Generator().manual_seed(seed))
        assert len(set(drawn.tolist())) == 2
        first[drawn[0]] += 1 / 600
    assert float((first - choice.probabilities).abs().max()) < 0.06
    more = draw(choice, 4, generator=torch.Generator().manual_seed(0)).tolist()
    assert set(more[:3]) == {0, 1, 2}
    assert more[3] in (3, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: robust_choice(torch.ones(4), 2), "less than half of the 4 inputs"),
        (lambda: robust_choice(torch.ones(4), -1), "wrong is -1"),
        (lambda: robust_choice(torch.tensor([1.0, 0.0, 1.0]), 1), "gains must be finite"),
        (lambda: draw(robust_choice(torch.ones(3), 1), 4), "budget is 4"),
        (lambda: margin_sampling(torch.ones(3), 0), "budget is 0"),
        (lambda: game_value(torch.ones(3), torch.ones(3), 4), "between 0 and 3"),
    ],
)
def test_games_without_meaning_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# --- the worst class ------------------------------------------------------------------------------


def test_class_losses_weigh_by_the_teachers_probabilities():
    z = randn(6, 3)
    one_hot = nn.functional.one_hot(torch.tensor([0, 0, 1, 1, 1, 2]), 3).double()
    losses = class_losses(z, one_hot)
    costs = -z.log_softmax(-1)
    expected = [costs[:2, 0].mean(), costs[2:5, 1].mean(), costs[5, 2]]
    assert losses.tolist() == pytest.approx([float(e) for e in expected])
    average = nn.functional.cross_entropy(z, one_hot.argmax(1))
    even = torch.full((3,), 1 / 3).double()
    assert float(worst_class_loss(z, one_hot, even, 0.0)) == pytest.approx(float(average))
    assert float(worst_class_loss(z, one_hot, even, 1.0)) == pytest.approx(float(losses.mean()))
    with pytest.raises(ValueError, match="not scores"):
        class_losses(z, randn(6, 3, seed=1))
    with pytest.raises(ValueError, match="trade is 2"):
        worst_class_loss(z, one_hot, even, 2)


def test_weights_follow_the_losses():
    even = torch.full((2,), 0.5).double()
    losses = torch.tensor([1.0, 2.0]).double()
    expected = [math.exp(0.5) / (math.exp(0.5) + math.e), math.e / (math.exp(0.5) + math.e)]
    assert update_weights(even, losses, 0.5).tolist() == pytest.approx(expected)
    torch.testing.assert_close(update_weights(even, losses, 0.0), even)
    weights = even
    for _ in range(200):
        weights = update_weights(weights, losses, 0.5)
    assert float(weights[1]) == pytest.approx(1)
    with pytest.raises(ValueError, match="gamma is -1"):
        update_weights(even, losses, -1)
    with pytest.raises(ValueError, match="every weight must be above 0"):
        update_weights(torch.tensor([0.0, 1.0]).double(), losses, 1.0)


class OneScore(nn.Module):
    """A student of one number a: what it wins on class 0 it loses, half as fast, on class 1."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.full((1,), a, dtype=torch.float64))

    def forward(self, x):
        return torch.cat([self.a * x, -self.a * x], 1)


def test_the_game_settles_where_both_classes_lose_the_same():
    # Nine examples of class 0 to one of class 1: losses ln(1 + exp(-2a)) and ln(1 + exp(a)).
    truth = nn.functional.one_hot(torch.tensor([0] * 9 + [1]), 2).double()
    x = torch.tensor([[1.0]] * 9 + [[0.5]], dtype=torch.float64)
    options = TrainingSettings(150, learning_rate=0.05)

    def trained(**how):
        start = OneScore(0.6)
        found = worst_class(start, lambda _: (x, truth), (x, truth), options, **how)
        assert float(start.a.detach()) == pytest.approx(0.6)
        return found

    def pull(found, share):  # d/da of the loss with this share of class 0
        a = found.model.a.detach()
        return float(share * -2 * torch.sigmoid(-2 * a) + (1 - share) * torch.sigmoid(a))

    average, even = trained(gamma=0.0, trade=0.0), trained(gamma=0.0, trade=1.0)
    assert pull(average, 0.9) == pytest.approx(0, abs=0.02)
    assert pull(even, 0.5) == pytest.approx(0, abs=0.02)
    assert pull(trained(gamma=0.0, trade=0.5), 0.7) == pytest.approx(0, abs=0.02)
    worst = trained(gamma=0.05, update_every=1)
    # Equal losses at a = 0, held there by weights of 1/3 and 2/3.
    assert float(worst.model.a.detach()) == pytest.approx(0, abs=0.03)
    assert worst.weights[75:].mean(0).tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.05)
    assert float(even.model.a.detach()) > 0.3
    assert worst.weights.shape == (150, 2)
    torch.testing.assert_close(worst.weights.sum(1), torch.ones(150).double())
    with pytest.raises(ValueError, match="update_every is 0"):
        trained(update_every=0)
    with pytest.raises(ValueError, match="gamma is -1"):
        trained(gamma=-1)


def test_accuracy_of_each_class():
    logits = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0]])
    found = accuracy_by_class(logits, torch.tensor([0, 1, 1]))
    assert found[:2].tolist() == [1, 0.5]
    assert math.isnan(found[2])


# --- teacher-guided training ----------------------------------------------------------------------


def surface():
    """Points near a plane in ten directions."""
    return randn(200, 2) @ randn(2, 10, seed=1) + 0.01 * randn(200, 10, seed=2) + 3


def test_principal_components_encode_and_decode():
    x = surface()
    flat = PrincipalComponents.fit(x, 2)
    torch.testing.assert_close(flat.encode(x).std(0), torch.ones(2).double())
    torch.testing.assert_close(flat.decode(flat.encode(x)), x, atol=0.1, rtol=0)
    z = randn(5, 2, seed=3)
    torch.testing.assert_close(flat.encode(flat.decode(z)), z)
    full = PrincipalComponents.fit(x, 10)
    torch.testing.assert_close(full.decode(full.encode(x)), x)
    with pytest.raises(ValueError, match="it must lie between 1 and 10"):
        PrincipalComponents.fit(x, 11)


def test_noise_in_the_latent_space_stays_on_the_surface_and_in_the_inputs_leaves_it():
    x = surface()
    flat = PrincipalComponents.fit(x, 2)
    draws = torch.Generator().manual_seed(0)
    noise = random_noise(flat.encode(x), 0.5, generator=draws)
    latent = flat.decode(flat.encode(x) + noise)
    moved = (latent - flat.decode(flat.encode(x))).norm(dim=1).mean()
    assert float(flat.distance(latent).max()) < 1e-9
    step = randn(*x.shape, seed=5)
    pixel = x + step * moved / step.norm(dim=1, keepdim=True)  # as far, in any direction
    assert float(flat.distance(pixel).mean()) > 0.5 * float(moved)
    with pytest.raises(ValueError, match="scale is -1"):
        random_noise(latent, -1)


def two_models():
    torch.manual_seed(0)
    student, teacher = (
        nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 3)).double().eval()
        for _ in range(2)
    )
    return student, teacher


def test_the_gradient_seeks_disagreement_within_the_ball():
    x = surface()[:40]
    flat = PrincipalComponents.fit(surface(), 2)
    student, teacher = two_models()
    z = flat.encode(x)
    draws = torch.Generator().manual_seed(0)
    sought = gradient_noise(z, flat.decode, student, teacher, radius=0.7, generator=draws)
    assert float(sought.norm(dim=1).max()) <= 0.7 + 1e-9
    random = randn(40, 2, seed=9)
    random = 0.7 * random / random.norm(dim=1, keepdim=True)

    def found(noise):
        made = flat.decode(z + noise)
        return disagreement(student(made), teacher(made)).detach()

    assert float(found(sought).mean()) > 1.1 * float(found(random).mean())
    nothing = gradient_noise(
        z, flat.decode, student, teacher, radius=0.7, generator=torch.Generator().manual_seed(0),
        steps=1, start=0.0,
    )  # fmt: skip
    assert bool((found(nothing) >= found(torch.zeros_like(z)) - 1e-12).all())  # its best point
    assert all(p.grad is None for m in (student, teacher) for p in m.parameters())
    with pytest.raises(ValueError, match="radius is 0"):
        gradient_noise(z, flat.decode, student, teacher, radius=0)


def test_made_inputs_have_the_teachers_labels():
    x = surface()[:20]
    flat = PrincipalComponents.fit(surface(), 2)
    student, teacher = two_models()
    for by in ("random", "gradient"):
        made = make_inputs(
            x, flat.encode, flat.decode, student.train(), teacher, scale=1.0, by=by,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert student.training
        with torch.no_grad():
            torch.testing.assert_close(made.teacher, teacher(made.inputs))
        torch.testing.assert_close(made.inputs, flat.decode(flat.encode(x) + made.noise))
        assert float((made.inputs - x).norm(dim=1).mean()) > 0.1
    still = make_inputs(x, flat.encode, flat.decode, student, teacher, scale=0.0)
    torch.testing.assert_close(still.inputs, flat.decode(flat.encode(x)))
    with pytest.raises(ValueError, match="by is 'chance'; choose random or gradient"):
        make_inputs(x, flat.encode, flat.decode, student, teacher, by="chance")
    with pytest.raises(ValueError, match="training mode"):
        make_inputs(x, flat.encode, flat.decode, student, teacher.train())


def test_labels_answers_and_made_answers_are_added():
    x, y = surface()[:20], torch.arange(20) % 3
    flat = PrincipalComponents.fit(surface(), 2)
    student, teacher = two_models()
    made = make_inputs(x, flat.encode, flat.decode, student, teacher)
    scores = teacher(x).detach()
    found = teacher_guided_loss(student, x, y, scores, made, temperature=2.0, weights=(0.5, 2.0))
    expected = nn.functional.cross_entropy(student(x), y)
    expected = expected + 0.5 * hinton_loss(student(x), scores, temperature=2.0, weight=1.0)
    expected = expected + 2 * temperature_kl(student(made.inputs), made.teacher, 2.0)
    torch.testing.assert_close(found, expected)
    alone = teacher_guided_loss(student, x, y, scores, made, weights=(0.0, 0.0))
    torch.testing.assert_close(alone, nn.functional.cross_entropy(student(x), y))
    with pytest.raises(ValueError, match="none may be negative"):
        teacher_guided_loss(student, x, y, scores, made, weights=(-1.0, 0.0))
