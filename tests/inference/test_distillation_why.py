"""Why distillation works, or not: complexity under the student's kernel, and where it disobeys."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn

from effnb.inference.distillation import (
    bias_scan,
    complexity_over_teachers,
    complexity_over_temperatures,
    confidence,
    deviations,
    distilled_progress,
    hinton_loss,
    kernel_interpolant,
    matched_time,
    progress,
    supervision_complexity,
    tangent_kernel,
    teacher_of_step,
)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mlp(*sizes, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def fit(model, x, loss, steps, lr=1e-3):
    search = torch.optim.Adam(model.parameters(), lr=lr)
    draws = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (128,), generator=draws)
        search.zero_grad()
        loss(model(x[rows]), rows).backward()
        search.step()
    return model


@pytest.fixture(scope="module")
def digits():
    """64 features in [0, 1], ten classes: 1,200 for training, 597 for the test."""
    import numpy as np

    data = load_digits()
    order = np.random.default_rng(0).permutation(1797)
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    return (x[597:], y[597:]), (x[:597], y[:597])


# --- the missing class ----------------------------------------------------------------------------


def test_a_student_recognizes_a_digit_that_it_never_saw(digits):
    (x, y), (test_x, test_y) = digits
    teacher = fit(
        mlp(64, 256, 256, 10), x, lambda z, r: nn.functional.cross_entropy(z, y[r]), 300
    ).eval()
    seen = y != 3
    x, y = x[seen], y[seen]
    with torch.no_grad():
        scores = teacher(x)

    with torch.no_grad():
        of_3 = (teacher(test_x).argmax(1) == test_y)[test_y == 3].double().mean()
    assert float(of_3) > 0.9
    hard = fit(
        mlp(64, 64, 10, seed=1), x, lambda z, r: nn.functional.cross_entropy(z, y[r]), 500, 3e-3
    )
    soft = fit(
        mlp(64, 64, 10, seed=1), x,
        lambda z, r: hinton_loss(z, scores[r], temperature=5.0, weight=1.0), 500, 3e-3,
    )  # fmt: skip
    biases = [0.5 * i for i in range(17)]
    with torch.no_grad():
        found = {
            name: bias_scan(model(test_x), test_y, 3, biases)
            for name, model in (("hard", hard), ("soft", soft))
        }
    best = {name: max(rows, key=lambda row: row["accuracy"]) for name, rows in found.items()}
    assert found["hard"][0]["accuracy_missing"] == 0
    assert best["soft"]["accuracy_missing"] > 0.8
    assert best["soft"]["accuracy"] > best["hard"]["accuracy"] + 0.05


# --- the kernel -----------------------------------------------------------------------------------


def test_the_kernel_of_a_linear_model_is_known():
    model = nn.Linear(4, 3).double()
    x, others = randn(5, 4), randn(2, 4, seed=1)
    # d z_c / d W_c = x and d z_c / d b_c = 1, for each of C classes
    torch.testing.assert_close(tangent_kernel(model, x), x @ x.T + 1)
    torch.testing.assert_close(tangent_kernel(model, x, others=others), x @ others.T + 1)
    torch.testing.assert_close(tangent_kernel(model, x, parameters="weight"), x @ x.T)
    torch.testing.assert_close(tangent_kernel(model, x, chunk=2), x @ x.T + 1)
    with pytest.raises(ValueError, match="no parameter fits gain"):
        tangent_kernel(model, x, parameters="gain")
    with pytest.raises(ValueError, match="there is no example"):
        tangent_kernel(model, x[:0])


def test_the_kernel_reads_models_in_any_form_and_leaves_them_alone(llama, ids):
    def last_words(model, tokens):
        return model(input_ids=tokens, use_cache=False).logits[:, -1, :4]

    llama.train()
    kernel = tangent_kernel(
        llama, ids[:, :6], outputs=last_words, parameters="*mlp.down_proj.weight"
    )
    assert kernel.shape == (4, 4)
    torch.testing.assert_close(kernel, kernel.T)
    assert float(torch.linalg.eigvalsh(kernel.double()).min()) > -1e-4 * float(kernel.trace())
    assert llama.training
    assert all(p.grad is None for p in llama.parameters())
    dropped = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double().train()
    again = [tangent_kernel(dropped, randn(3, 4)) for _ in range(2)]
    torch.testing.assert_close(*again)
    assert dropped[1].training
    with pytest.raises(ValueError, match="give `outputs`"):
        tangent_kernel(
            nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double(), randn(3, 4)
        )


def test_complexity_is_the_norm_of_the_smallest_function_that_fits():
    features = randn(6, 9)  # as many functions as features: f(x) = w . x
    kernel = features @ features.T
    y = randn(6, 2, seed=1)
    w = torch.linalg.lstsq(features, y).solution  # of all that fit, the shortest
    torch.testing.assert_close(features @ w, y)
    found = supervision_complexity(kernel, y, ridge=0.0, centered=False)
    assert found.value == pytest.approx(float(w.square().sum()), rel=1e-9)
    assert found.adjusted == pytest.approx(
        math.sqrt(found.value * float(kernel.trace())) / 6, rel=1e-12
    )
    query = randn(3, 9, seed=2)
    torch.testing.assert_close(
        kernel_interpolant(kernel, y, query @ features.T, ridge=0.0), query @ w
    )


@settings(max_examples=30)
@given(st.integers(2, 7), st.integers(1, 4), st.integers(0, 99), st.floats(0.1, 10))
def test_complexity_scales_as_it_must(n, classes, seed, factor):
    a = randn(n, n + 2, seed=seed)
    kernel, y = a @ a.T, randn(n, classes, seed=seed + 1)
    found = supervision_complexity(kernel, y)
    assert found.value >= 0
    doubled = supervision_complexity(kernel, factor * y)
    assert doubled.value == pytest.approx(factor**2 * found.value, rel=1e-6)
    scaled = supervision_complexity(factor * kernel, y)
    assert scaled.adjusted == pytest.approx(found.adjusted, rel=1e-6)
    assert supervision_complexity(kernel, y + 5).value == pytest.approx(found.value, rel=1e-6)
    assert supervision_complexity(kernel, y, ridge=1.0).value <= found.value + 1e-9


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.eye(3), torch.ones(4, 2)), "targets for 4 examples"),
        ((torch.eye(3), torch.ones(3, 2), -1.0), "ridge is -1.0"),
        ((-torch.eye(3), torch.ones(3, 2), 0.0), "not positive definite; a larger ridge"),
    ],
)
def test_kernels_that_do_not_fit_are_refused(arguments, sentence):
    kernel, targets, *ridge = arguments
    options = {"ridge": ridge[0]} if ridge else {}
    with pytest.raises(ValueError, match=sentence):
        supervision_complexity(kernel, targets, **options)


def test_noise_makes_labels_complex_and_teachers_grow_more_so_with_every_step(digits):
    (x, y), _ = digits
    few = x[:200]
    kernel = tangent_kernel(mlp(64, 64, 10), few)
    draws = torch.Generator().manual_seed(0)
    wrong = torch.where(
        torch.rand(len(y), generator=draws) < 0.3, torch.randint(10, y.shape, generator=draws), y
    )
    clean, noisy = (
        supervision_complexity(kernel, nn.functional.one_hot(labels[:200], 10).double())
        for labels in (y, wrong)
    )
    # The worked values: 2.53, and 4.66 for another draw of the noise.
    assert clean.adjusted == pytest.approx(2.53, abs=0.01)
    assert noisy.adjusted == pytest.approx(4.66, abs=0.2)
    teacher, scores, done = mlp(64, 256, 256, 10, seed=1), {}, 0
    for step in (10, 30, 100, 300):
        fit(teacher, x, lambda z, r: nn.functional.cross_entropy(z, wrong[r]), step - done)
        done = step
        with torch.no_grad():
            scores[step] = teacher(few)
    over = [c.adjusted for c in complexity_over_teachers(kernel, scores).values()]
    assert over == sorted(over)
    assert over[-1] < noisy.adjusted
    temperatures = complexity_over_temperatures(kernel, scores[300], [1.0, 2.0, 4.0, 8.0])
    values = [c.adjusted for c in temperatures.values()]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(over[-1])
    with pytest.raises(ValueError, match="temperature is 0"):
        complexity_over_temperatures(kernel, scores[300], [0.0])


def test_online_distillation_goes_through_the_teachers_states():
    assert [teacher_of_step(s, 7, 3) for s in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert [teacher_of_step(s, 4, 1) for s in range(4)] == [0] * 4
    for arguments in ((0, 3, 4), (3, 3, 1), (-1, 3, 1), (0, 3, 0)):
        with pytest.raises(ValueError, match="a step of the run are needed"):
            teacher_of_step(*arguments)


@settings(max_examples=30)
@given(st.integers(1, 50), st.data())
def test_every_state_gets_its_turn_in_order(steps, data):
    checkpoints = data.draw(st.integers(1, steps))
    turns = [teacher_of_step(s, steps, checkpoints) for s in range(steps)]
    assert turns == sorted(turns)
    assert set(turns) == set(range(checkpoints))


# --- deviations -----------------------------------------------------------------------------------


def test_confidence_is_the_logit_of_a_probability_without_its_rounding():
    z = randn(6, 4)
    c = torch.tensor([0, 1, 2, 3, 0, 1])
    p = z.softmax(-1).gather(1, c[:, None])[:, 0]
    torch.testing.assert_close(confidence(z, c), (p / (1 - p)).log())
    sure = torch.tensor([[200.0, 0.0, 0.0]])
    assert float(confidence(sure, torch.tensor([0]))[0]) == pytest.approx(200 - math.log(2))
    with pytest.raises(ValueError, match="needs two classes"):
        confidence(z[:, :1], c)


def scores_of(confidences):
    """Scores of two classes, the first with these logits."""
    return torch.stack([confidences, torch.zeros_like(confidences)], 1)


def test_the_slope_is_the_one_that_was_put_in():
    x = randn(200).abs() + 0.1
    noise = 0.2 * randn(200, seed=1)
    found = deviations(scores_of(-0.5 + 1.4 * x), scores_of(x))
    assert (found.slope, found.intercept) == pytest.approx((1.4, -0.5))
    assert found.standard_error == pytest.approx(0, abs=1e-9)
    found = deviations(scores_of(-0.5 + 1.4 * x + noise), scores_of(x))
    from scipy import stats

    line = stats.linregress(x.numpy(), (-0.5 + 1.4 * x + noise).numpy())
    assert (found.slope, found.intercept) == pytest.approx((line.slope, line.intercept))
    assert found.standard_error == pytest.approx(line.stderr)
    same = deviations(scores_of(x), scores_of(x))
    assert (same.slope, same.intercept) == pytest.approx((1, 0))
    torch.testing.assert_close(found.teacher, x)


@pytest.mark.parametrize(
    ("student", "teacher", "sentence"),
    [
        (torch.ones(2, 3), torch.ones(2, 3), "a line with an error needs three"),
        (torch.ones(4, 3), torch.ones(4, 3), "equally sure of all examples"),
        (torch.ones(4, 3), torch.ones(4, 2), "one vocabulary"),
    ],
)
def test_lines_that_cannot_be_fitted_are_refused(student, teacher, sentence):
    with pytest.raises(ValueError, match=sentence):
        deviations(student, teacher)


def test_gradient_flow_learns_as_the_filter_says():
    # Least squares by many small steps, against 1 - exp(-lambda t) along the data's directions.
    x, y = randn(30, 3), randn(30, 1, seed=1)
    eigenvalues, basis = torch.linalg.eigh(x.T @ x / 30)
    best = torch.linalg.lstsq(x, y).solution
    teacher_time, student_time, step = 1.5, 2.5, 1e-3

    def flow(target, time):
        w = torch.zeros_like(best)
        for _ in range(round(time / step)):
            w = w - step * x.T @ (x @ w - target) / 30
        return w

    teacher = flow(y, teacher_time)
    expected = basis @ (progress(eigenvalues, teacher_time)[:, None] * (basis.T @ best))
    torch.testing.assert_close(teacher, expected, atol=2e-3, rtol=2e-3)
    student = flow(x @ teacher, student_time)
    share = distilled_progress(eigenvalues, teacher_time, student_time)
    torch.testing.assert_close(
        student, basis @ (share[:, None] * (basis.T @ best)), atol=2e-3, rtol=2e-3
    )


@settings(max_examples=40)
@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=6), st.floats(0.1, 5), st.floats(0.1, 5))
def test_at_equal_progress_on_the_top_a_student_has_learnt_less_of_the_rest(values, t, s):
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    time = matched_time(eigenvalues, t, s)
    alone, distilled = progress(eigenvalues, time), distilled_progress(eigenvalues, t, s)
    top = int(eigenvalues.argmax())
    assert float(alone[top]) == pytest.approx(float(distilled[top]), rel=1e-9)
    assert bool((distilled <= alone + 1e-12).all())
    smaller = eigenvalues < 0.9 * eigenvalues[top]
    assert bool((distilled[smaller] < alone[smaller]).all())


def test_what_the_linear_model_refuses():
    with pytest.raises(ValueError, match="must not be negative"):
        progress(torch.tensor([1.0]), -1)
    with pytest.raises(ValueError, match="must not be negative"):
        progress(torch.tensor([-1.0]), 1)
    with pytest.raises(ValueError, match="nothing can be learnt"):
        matched_time(torch.zeros(2), 1, 1)
