"""Structured pruning: what each method judges by."""

import copy
import math

import pytest
import torch
from torch import nn

from effnb.core.calibration import Calibration
from effnb.core.deltas import hosts
from effnb.core.modules import share
from effnb.core.training import TrainingSettings, causal_lm_loss
from effnb.finetuning import lora
from effnb.inference.pruning import (
    CubicSchedule,
    Slice,
    activation_importance,
    anatomy,
    angular_distances,
    block_influence,
    coupled,
    drop_layers,
    drop_run,
    fisher_diagonal,
    head_ablation,
    head_importance,
    keep_all,
    layer_ablation,
    llm_pruner,
    llm_pruner_scores,
    lora_gradient,
    lora_importance,
    lora_prune,
    lora_score,
    lowest_heads,
    mask_heads,
    mask_structures,
    mean_gradients,
    prune_heads,
    prune_structures,
    random_scores,
    recover,
    shortgpt,
    width,
)
from effnb.inference.pruning.llm_pruner import aggregate_parts, weight_change
from effnb.inference.pruning.lora_prune import _Pruning
from effnb.inference.quantization import rtn


def outputs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def loss_of(model, ids):
    with torch.no_grad():
        return float(causal_lm_loss(model, ids))


def spearman(a, b):
    ranks = [x.flatten().argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


METHODS = {
    "heads": lambda model, ids, **k: prune_heads(model, ids, 0.5, **k),
    "llm_pruner": lambda model, ids, **k: llm_pruner(model, ids, 0.5, **k),
    "width": lambda model, ids, **k: width(model, ids, heads=0.5, neurons=0.5, hidden=0.25, **k),
    "shortgpt": lambda model, ids: shortgpt(model, ids, 1),
    "drop_run": lambda model, ids: drop_run(model, ids, 2),
    "lora_prune": lambda model, ids, **k: lora_prune(
        model, lambda step: ids, TrainingSettings(steps=6, learning_rate=1e-3), 0.5, rank=2, **k
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_gives(method, llama, ids):
    from transformers import LlamaForCausalLM

    before = {name: p.clone() for name, p in llama.named_parameters()}
    options = {} if method in ("shortgpt", "drop_run") else {"unit": "heads"}
    for given in ({}, options):
        found = METHODS[method](llama, ids, **given)
        assert type(found.model) is LlamaForCausalLM
        assert found.parameters_after == sum(p.numel() for p in found.model.parameters())
        assert 0.1 < found.removed < 0.9
        assert torch.isfinite(outputs(found.model, ids)).all()
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in found.model.modules())
        assert all(p.requires_grad for p in found.model.parameters())
    assert all(torch.equal(before[name], p) for name, p in llama.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())
    with pytest.raises(ValueError, match="quantized already"):
        METHODS[method](rtn(llama, 4), ids)
    with pytest.raises(ValueError, match="of type Linear"):
        METHODS[method](nn.Linear(2, 2), ids)
    if method != "lora_prune":
        with pytest.raises(ValueError, match="empty"):
            METHODS[method](llama, ids[:0])


# --- weights that are not finite ------------------------------------------------------------------

ON_WEIGHTS = METHODS | {
    "block influence": block_influence,
    "angles": lambda model, ids: angular_distances(model, ids, 1),
    "head importance": head_importance,
    "scores of LLM-Pruner": llm_pruner_scores,
    "activations": activation_importance,
    "ablated layers": lambda model, ids: layer_ablation(model, lambda m: 0.0),
    "ablated heads": lambda model, ids: head_ablation(model, lambda m: 0.0),
    "silent heads": lambda model, ids: mask_heads(model, {0: [0]}),
    "masked structures": lambda model, ids: mask_structures(
        model, random_scores(model), {"neurons": 1}
    ),
    "no layer": lambda model, ids: drop_layers(model, [1]),
    "cut at random": lambda model, ids: prune_structures(
        model, random_scores(model), {"neurons": 1}
    ),
    "coupled": lambda model, ids: coupled(model, [Slice("model.norm.weight", 0, (0,))], ids),
    "a LoRA's importance": lambda model, ids: lora_importance(lora.attach(model, rank=2), ids),
}


@pytest.mark.parametrize("method", ON_WEIGHTS)
@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", math.nan),
        ("model.embed_tokens.weight", math.inf),
        ("model.layers.2.input_layernorm.weight", -math.inf),
    ],
)
def test_weights_that_are_not_finite(method, parameter, value, llama, ids):
    model = copy.deepcopy(llama)
    with torch.no_grad():
        model.get_parameter(parameter).view(-1)[3] = value
    name = parameter.replace(".weight", ".*weight")  # inside a layer that carries a LoRA
    with pytest.raises(ValueError, match=f"{name} has 1 entries that are NaN or infinite"):
        ON_WEIGHTS[method](model, ids)


@pytest.mark.parametrize(("block", "where"), [(0, "in front of block 1"), (2, "at the end")])
def test_a_stream_that_is_not_finite_is_not_one_of_zeros(block, where, llama, ids):
    model = share(llama)
    overflowing = model.model.layers[block]
    overflowing.register_forward_hook(lambda module, _, output: output * math.inf)
    for judge in (block_influence, lambda m, i: angular_distances(m, i, 1)):
        with pytest.raises(ValueError, match=f"stream is not finite {where}"):
            judge(model, ids)


# --- heads ----------------------------------------------------------------------------------------


def test_a_gates_gradient_is_the_sum_over_tokens_for_each_example(llama, ids):
    """Att_h . dL/dAtt_h, summed over tokens inside the absolute value, one example at a time."""
    expected = torch.zeros(3, 4)
    for example in ids:
        twin, seen = share(llama), []
        for block in twin.model.layers:
            block.self_attn.o_proj.register_forward_pre_hook(
                lambda m, given, seen=seen: seen.append(given[0])
            )
        value = causal_lm_loss(twin, example[None])
        for layer, gradient in enumerate(torch.autograd.grad(value, seen)):
            product = (seen[layer] * gradient).view(24, 4, 8)
            expected[layer] += product.sum((0, 2)).abs() / len(ids)
    found = head_importance(llama, Calibration(ids, batch_size=3), normalize=False)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7)
    normal = head_importance(llama, ids)
    assert torch.allclose(normal.norm(dim=1), torch.ones(3))
    assert torch.allclose(normal * found.norm(dim=1, keepdim=True), found)
    # A loss of one's own: each batch is an example.
    own = head_importance(llama, [row[None] for row in ids], loss=causal_lm_loss, normalize=False)
    assert torch.allclose(own, expected, rtol=1e-4, atol=1e-7)


def slope(model, name, columns, ids, epsilon=0.02):
    """Change of the loss per part by which columns grow, from both sides."""
    losses = []
    for factor in (1 + epsilon, 1 - epsilon):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.get_submodule(name).weight[:, columns] *= factor
            losses.append(loss_of(twin, ids))
    return (losses[0] - losses[1]) / (2 * epsilon)


def test_importance_predicts_what_a_slightly_closed_gate_does(llama, ids):
    """One example, so that the absolute value is that of the loss's own change."""
    found = head_importance(llama, ids[:1], normalize=False)
    for layer, head in enumerate(found.argmax(1).tolist()):  # the largest: least lost to rounding
        change = slope(
            llama, f"model.layers.{layer}.self_attn.o_proj",
            slice(head * 8, head * 8 + 8), ids[:1],
        )  # fmt: skip
        assert abs(change) == pytest.approx(float(found[layer, head]), rel=0.01)


def test_padding_does_not_count(llama, ids):
    mask = torch.ones_like(ids)
    mask[:, 16:] = 0
    batch = [{"input_ids": ids, "attention_mask": mask}]
    assert torch.allclose(head_importance(llama, batch), head_importance(llama, ids[:, :16]))
    assert torch.allclose(block_influence(llama, batch), block_influence(llama, ids[:, :16]))
    short, padded = (activation_importance(llama, x) for x in (ids[:, :16], batch))
    assert all(torch.allclose(short[kind], padded[kind], rtol=1e-5) for kind in short)


def test_masked_heads_are_silent(llama, ids):
    masked = mask_heads(llama, {0: [1], 2: [0, 1, 3]})
    o = masked.model.layers[2].self_attn.o_proj.weight.view(32, 4, 8)
    assert [bool((o[:, h] == 0).all()) for h in range(4)] == [True, True, False, True]
    k = masked.model.layers[2].self_attn.k_proj.weight
    assert bool((k != 0).all())  # the other head of each group may still read it
    assert masked.model.layers[1].self_attn.o_proj.weight is (
        llama.model.layers[1].self_attn.o_proj.weight
    )
    losses = head_ablation(llama, lambda m: loss_of(m, ids))
    one = mask_heads(llama, {1: [2]})
    assert float(losses[1, 2]) == pytest.approx(loss_of(one, ids))
    scores = torch.tensor([[3.0, 0, 5], [1, 4, 2]])
    assert lowest_heads(scores, 3) == {0: [1], 1: [0, 2]}
    with pytest.raises(ValueError, match="has 6 heads"):
        lowest_heads(scores, 7)
    with pytest.raises(ValueError, match="head 4 of layer 0"):
        mask_heads(llama, {0: [4]})
    with pytest.raises(ValueError, match="at least one"):
        prune_heads(llama, ids, 0.9)


# --- LLM-Pruner -----------------------------------------------------------------------------------


def test_scores_of_a_neuron_and_a_group_by_hand(llama, ids):
    inside = "model.layers.*"
    g = mean_gradients(llama, ids, layers=inside)
    f = fisher_diagonal(llama, ids, layers=inside)
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."

    def pieces(order):
        def of(name):
            w = llama.get_submodule(name).weight.detach().double()
            first, second = w * g[name], w.square() * f[name] / 2
            return {"first": first, "second": second, "mixed": first - second}[order]

        neuron = [of(mlp + "gate_proj")[7], of(mlp + "up_proj")[7], of(mlp + "down_proj")[:, 7]]
        group = [
            of(attention + "q_proj")[16:], of(attention + "k_proj")[8:],
            of(attention + "v_proj")[8:], of(attention + "o_proj")[:, 16:],
        ]  # fmt: skip
        head = [of(attention + "q_proj")[24:], of(attention + "o_proj")[:, 24:]]
        return neuron, group, head

    ways = {"sum": sum, "prod": math.prod, "max": max, "last": lambda parts: parts[-1]}
    for order in ("first", "second", "mixed"):
        neuron, group, head = pieces(order)
        for importance in ("element", "vector"):
            for aggregate, way in ways.items() if order == "first" else [("sum", sum)]:
                options = dict(importance=importance, order=order, aggregate=aggregate)
                found = llm_pruner_scores(llama, ids, **options)
                single = llm_pruner_scores(llama, ids, unit="heads", **options)

                def value(parts, importance=importance, way=way):
                    each = [
                        float(p.abs().sum() if importance == "element" else p.sum().abs())
                        for p in parts
                    ]
                    return way(each)

                for have, parts in (
                    (found["neurons"][1, 7], neuron),
                    (found["heads"][1, 1], group),
                    (single["heads"][1, 3], head),
                ):
                    assert float(have) == pytest.approx(value(parts), rel=1e-4)
                assert found["heads"].shape == (3, 2)
                assert single["heads"].shape == (3, 4)


def test_taylor_predicts_the_loss_with_a_little_more_of_a_neuron(llama, ids):
    """Growing one column by a part e changes the loss by e times the sum of w g."""
    name = "model.layers.2.mlp.down_proj"
    g = mean_gradients(llama, ids)[name]
    change = weight_change(llama.get_submodule(name).weight, g, None).sum(0)
    neuron = int(change.abs().argmax())
    assert slope(llama, name, neuron, ids) == pytest.approx(float(change[neuron]), rel=0.01)


def test_llm_pruner_removes_what_it_scored_lowest(llama, ids):
    found = llm_pruner(llama, ids, 0.25)
    assert found.model.config.intermediate_size == 36
    assert found.model.config.num_key_value_heads == 1  # a quarter of two, rounded
    for layer in range(3):
        gone = set(range(48)) - set(found.kept.neurons[layer])
        assert gone == set(found.scores["neurons"][layer].argsort()[:12].tolist())
    for options, sentence in (
        ({"importance": "matrix"}, "importance is 'matrix'"),
        ({"order": "third"}, "order is 'third'"),
        ({"aggregate": "mean"}, "aggregate is 'mean'"),
        ({"unit": "rows"}, "unit is 'rows'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            llm_pruner(llama, ids, 0.5, **options)
    for ratio in (1.0, -0.5, 3):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            llm_pruner(llama, ids, ratio)
    with pytest.raises(ValueError, match="aggregate is"):
        aggregate_parts(torch.ones(2, 2), "median")


def test_recovery_trains_and_merges_a_lora(llama, ids):
    small = llm_pruner(llama, ids, 0.5).model
    cold = {name: p.clone() for name, p in small.named_parameters()}
    settings = TrainingSettings(steps=30, learning_rate=1e-2)
    found = recover(small, lambda step: ids, settings, rank=4, alpha=8.0)
    assert loss_of(found.model, ids) < 0.8 * loss_of(small, ids)
    # r (in + out) for each layer: q, k, v, o; gate, up, down of 24 neurons.
    shapes = [(32, 16), (32, 8), (32, 8), (16, 32), (32, 24), (32, 24), (24, 32)]
    assert found.trained_parameters == 3 * 4 * sum(map(sum, shapes))
    assert [type(m) for m in found.model.modules()] == [type(m) for m in small.modules()]
    assert all(torch.equal(cold[name], p) for name, p in small.named_parameters())
    assert found.training.steps == 30
    with pytest.raises(ValueError, match="quantized already"):
        recover(rtn(small, 4), lambda step: ids, settings)


# --- LoRAPrune ------------------------------------------------------------------------------------


def with_gradients(model, ids, rank=4, scale=1.0, warm=True):
    """A LoRA on all layers, its gradients, and the gradients of the merged weights."""
    held = lora.attach(model, rank=rank, alpha=2.0 * rank, layers="model.layers.*")
    draw = torch.Generator().manual_seed(5)
    if warm:
        with torch.no_grad():
            for host in hosts(held).values():
                delta = host.deltas["default"]
                delta.B.add_(torch.randn(delta.B.shape, generator=draw) * 0.05)
    (causal_lm_loss(held, ids) * scale).backward()
    merged = lora.merge(held, "default")
    full = mean_gradients(merged, ids, layers="model.layers.*")
    return held, {name: gradient * scale for name, gradient in full.items()}


@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
def test_the_factors_gradients_are_those_of_the_weight_seen_through_the_factors(llama, ids, scale):
    held, full = with_gradients(llama, ids, scale=scale)
    for name, host in hosts(held).items():
        delta, G = host.deltas["default"], full[name]
        A, B, s = delta.A.detach(), delta.B.detach(), delta.scaling
        assert s == 2.0
        limits = dict(rtol=1e-3, atol=1e-5 * scale)
        assert torch.allclose(delta.A.grad, s * B.T @ G, **limits)
        assert torch.allclose(delta.B.grad, s * G @ A.T, **limits)
        estimate = lora_gradient(A, B, delta.A.grad, delta.B.grad)
        closed = s * (G @ A.T @ A + B @ B.T @ G) - s**2 * G @ A.T @ B.T @ G
        assert torch.allclose(estimate, closed, rtol=1e-3, atol=1e-4 * scale * max(1, scale))


def test_the_estimate_is_the_step_of_gradient_descent_at_rate_one():
    draw = torch.Generator().manual_seed(0)
    A, B, dA, dB = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((3, 7), (5, 3), (3, 7), (5, 3))
    )
    step = (B - dB) @ (A - dA) - B @ A
    assert torch.allclose(lora_gradient(A, B, dA, dB), -step, rtol=0, atol=1e-13)
    W = torch.randn(5, 7, generator=draw, dtype=torch.float64)
    assert torch.equal(
        lora_score(W, A, B, dA, dB, 2.0), (lora_gradient(A, B, dA, dB) * (W + 2 * B @ A)).abs()
    )


def test_a_cold_lora_sees_the_gradient_through_a_alone(llama, ids):
    """B = 0: the estimate is s G A'A, of rank r; hence the steps before the first cut."""
    held, full = with_gradients(llama, ids, rank=3, warm=False)
    for name, host in hosts(held).items():
        delta = host.deltas["default"]
        A, B = delta.A.detach(), delta.B.detach()
        estimate = lora_gradient(A, B, delta.A.grad, delta.B.grad)
        assert torch.count_nonzero(delta.A.grad) == 0
        assert torch.allclose(estimate, 2 * full[name] @ A.T @ A, rtol=1e-3, atol=1e-5)
        assert int(torch.linalg.matrix_rank(estimate.double(), rtol=1e-5)) <= 3


def test_importances_of_structures_by_hand(llama, ids):
    held, _ = with_gradients(llama, ids)
    rows = []
    for name, cut in (
        ("gate_proj", lambda x: x), ("up_proj", lambda x: x), ("down_proj", lambda x: x.T),
    ):  # fmt: skip
        host = hosts(held)[f"model.layers.1.mlp.{name}"]
        d = host.deltas["default"]
        score = lora_score(host.base.weight, d.A, d.B, d.A.grad, d.B.grad, d.scaling).detach()
        sums = cut(score).sum(1)
        rows.append(sums / sums.norm())
    before = {name: p.clone() for name, p in held.named_parameters()}
    found = lora_importance(held, ids, momentum=0.0)
    assert torch.allclose(found["neurons"][1], sum(rows), rtol=1e-4)
    assert found["heads"].shape == (3, 2)
    assert lora_importance(held, ids, unit="heads")["heads"].shape == (3, 4)
    assert all(torch.equal(before[name], p) for name, p in held.named_parameters())
    # The moving average starts at 0; two equal batches give 0.1 + 0.09 of one.
    twice = lora_importance(held, Calibration(torch.cat([ids, ids]), batch_size=4))
    assert torch.allclose(twice["neurons"], 0.19 * found["neurons"], rtol=1e-4)


def test_the_ranking_depends_on_the_size_of_the_loss(llama, ids):
    """The last term is of second order: small gradients agree with each other, large ones not."""
    held, _ = with_gradients(llama, ids)
    at = {s: lora_importance(held, ids, loss_scale=s)["neurons"] for s in (1e-4, 1e-3, 100.0)}
    assert spearman(at[1e-4], at[1e-3]) > 0.999
    assert spearman(at[1e-4], at[100.0]) < 0.95


def test_pruning_while_a_lora_trains(llama, ids):
    settings = TrainingSettings(steps=20, learning_rate=5e-3)
    found = lora_prune(
        llama, lambda step: ids, settings, 0.5, rank=4, begin=4, end=14, every=2
    )  # fmt: skip
    neurons = [row["neurons"] for row in found.removed_structures]
    assert neurons[:5] == [0] * 5
    assert neurons[14:] == [24] * 6
    assert neurons == sorted(neurons)
    # Cubic: half way 7/8 of the way, at steps 4, 6, ..., 14.
    expected = [int(0.5 * (1 - (1 - t / 10) ** 3) * 48 + 0.5) for t in range(0, 11, 2)]
    assert neurons[4:15:2] == expected
    assert (found.model.config.intermediate_size, found.model.config.num_key_value_heads) == (24, 1)
    assert loss_of(found.model, ids) < found.training.losses[0]
    # What was trained under the masks is what was cut: the last loss goes on where it stopped.
    assert found.training.steps == 20
    cold = prune_structures(llama, found.scores, {"heads": 0.5, "neurons": 0.5}).model
    assert loss_of(found.model, ids) < loss_of(cold, ids)


def test_the_model_that_was_trained_is_the_one_that_is_cut_out(llama, ids):
    """The loss under the masks, at a step, is that of what leaves after the steps before it."""
    runs = []
    for steps in (8, 9):
        settings = TrainingSettings(
            steps=steps, learning_rate=5e-2, schedule="constant", warmup_steps=0
        )
        runs.append(
            lora_prune(llama, lambda step: ids, settings, 0.5, rank=4, begin=1, end=4, every=1)
        )
    first, longer = runs
    assert longer.training.losses[:8] == first.training.losses
    assert longer.training.losses[8] == pytest.approx(loss_of(first.model, ids), rel=1e-5)


def test_what_was_masked_stays_masked(llama):
    working = lora.attach(llama, "lora_prune", rank=2, layers="model.layers.*")
    schedule = CubicSchedule(0.5, 1, 9)
    run = _Pruning(anatomy(llama), working, schedule, "groups", 0.9, keep_all(llama))
    run.average.scores = {
        "heads": torch.tensor([[1.0, 2.0]] * 3), "neurons": torch.arange(48.0).repeat(3, 1),
    }  # fmt: skip
    run._cut(0.25)
    assert run.kept.neurons[1] == tuple(range(12, 48))
    run.average.scores["neurons"] = run.average.scores["neurons"].flip(1)
    run.average.scores["heads"] = run.average.scores["heads"].flip(1)
    run._cut(0.5)
    assert run.kept.neurons[1] == tuple(range(12, 36))
    assert run.kept.heads == ((2, 3),) * 3
    assert run.masks["neurons"].sum(1).tolist() == [24.0] * 3
    assert run.masks["heads"][0].tolist() == [0.0] * 16 + [1.0] * 16


def test_bad_input_of_lora_prune(llama, ids):
    settings = TrainingSettings(steps=10)
    for options, sentence in (
        ({"begin": 0}, "1 <= begin"),
        ({"end": 10}, "end < steps"),
        ({"momentum": 1.0}, "momentum is"),
        ({"unit": "rows"}, "unit is"),
        ({"rank": 0}, "rank is 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            lora_prune(llama, lambda step: ids, settings, 0.5, **options)
    with pytest.raises(ValueError, match="patience"):
        lora_prune(llama, lambda step: ids, TrainingSettings(steps=10, patience=2), 0.5)
    partly = lora.attach(llama, rank=2, layers="*.q_proj")
    with pytest.raises(ValueError, match="has no LoRA 'default'"):
        lora_importance(partly, ids)


# --- depth ----------------------------------------------------------------------------------------


def silent(model, layer):
    """The model with a block that adds nothing."""
    twin = share(model)
    block = twin.model.layers[layer]
    for part, name in ((block.self_attn, "o_proj"), (block.mlp, "down_proj")):
        old = getattr(part, name)
        new = nn.Linear(old.in_features, old.out_features, bias=False)
        nn.init.zeros_(new.weight)
        setattr(part, name, new)
    return twin


def test_a_block_that_adds_nothing(llama, ids):
    model = silent(llama, 1)
    influence = block_influence(model, ids)
    assert float(influence[1]) == 0
    assert bool((influence[[0, 2]] > 0.01).all())
    assert float(angular_distances(model, ids, 1)[1]) == 0
    found = shortgpt(model, ids, 1)
    assert found.kept.layers == (0, 2)
    assert torch.equal(outputs(found.model, ids), outputs(model, ids))
    assert drop_run(model, ids, 1).kept.layers == (0, 2)


def test_influence_and_angles_by_hand(llama, ids):
    """Per token, on the residual stream; `hidden_states` has it for all but the last block."""
    with torch.no_grad():
        hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states
    cosine = [
        nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)
        for a, b in ((hidden[0], hidden[1]), (hidden[1], hidden[2]), (hidden[0], hidden[2]))
    ]
    influence = block_influence(llama, Calibration(ids, batch_size=3))
    assert torch.allclose(
        influence[:2].double(), torch.stack([1 - c.mean() for c in cosine[:2]]), atol=1e-6
    )
    angles = angular_distances(llama, Calibration(ids, batch_size=3), 2)
    assert float(angles[0]) == pytest.approx(float((cosine[2].acos() / math.pi).mean()), rel=1e-5)
    assert len(angles) == 2
    normed = nn.functional.cosine_similarity(hidden[2], hidden[3], dim=-1)  # behind the last norm
    assert abs(float(influence[2]) - float(1 - normed.mean())) > 1e-3


def test_dropping_blocks(llama, ids):
    small = drop_layers(llama, [0]).model
    assert small.model.layers[0].mlp.up_proj.weight is llama.model.layers[1].mlp.up_proj.weight
    assert torch.allclose(
        outputs(small, ids), outputs(silent(llama, 0), ids), rtol=1e-5, atol=1e-5
    )  # fmt: skip
    losses = layer_ablation(llama, lambda m: loss_of(m, ids))
    for layer in range(3):
        expected = loss_of(drop_layers(llama, [layer]).model, ids)
        assert float(losses[layer]) == pytest.approx(expected)
    distances = angular_distances(llama, ids, 2)
    start = int(distances.argmin())
    found = drop_run(llama, ids, 2)
    assert set(found.kept.layers) == {0, 1, 2} - {start, start + 1}
    assert torch.equal(found.scores["runs"], distances)
    for layers, sentence in (([3], "layer 3 is not there"), ([0, 1, 2], "no layers would be left")):
        with pytest.raises(ValueError, match=sentence):
            drop_layers(llama, layers)
    for count, sentence in ((0, "at least 1"), (3, "3 of 3")):
        for method in (shortgpt, drop_run):
            with pytest.raises(ValueError, match=sentence):
                method(llama, ids, count)
    with pytest.raises(TypeError, match="whole number"):
        shortgpt(llama, ids, 0.5)


def test_a_stream_of_zeros_has_no_direction(llama, ids):
    model = share(llama)
    model.model.embed_tokens = nn.Embedding(128, 32)
    nn.init.zeros_(model.model.embed_tokens.weight)
    with pytest.raises(ValueError, match="no direction"):
        block_influence(model, ids)


# --- width ----------------------------------------------------------------------------------------


def test_activation_importance_by_hand(llama, ids):
    found = activation_importance(llama, Calibration(ids, batch_size=3))
    twin, seen = share(llama), {}
    block = twin.model.layers[1]
    block.mlp.down_proj.register_forward_pre_hook(lambda m, a: seen.update(neurons=a[0]))
    block.self_attn.o_proj.register_forward_pre_hook(lambda m, a: seen.update(heads=a[0]))
    norms = []
    for each in twin.model.layers:
        for norm in (each.input_layernorm, each.post_attention_layernorm):
            norm.register_forward_hook(lambda m, a, out: norms.append(out))
    outputs(twin, ids)
    neurons = seen["neurons"].square().sum(1).sqrt().mean(0)
    heads = seen["heads"].view(4, 24, 4, 8).square().sum((1, 3)).sqrt().mean(0)
    channels = sum(out.square().sum(1).sqrt().mean(0) for out in norms)
    assert torch.allclose(found["neurons"][1], neurons, rtol=1e-4)
    assert torch.allclose(found["heads"][1], heads, rtol=1e-4)
    assert torch.allclose(found["channels"], channels, rtol=1e-4)


def test_a_dead_channel_and_dead_neurons_cost_nothing(tiny_llama, ids):
    """The gains of one channel are 0 and nothing writes it; some neurons' gates never open."""
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 9] = 0
        for block in model.model.layers:
            block.self_attn.o_proj.weight[9] = 0
            block.mlp.down_proj.weight[9] = 0
            block.mlp.gate_proj.weight[[3, 4]] = 0
    found = width(model, ids, neurons=2, hidden=1)
    assert 9 not in found.kept.channels
    assert all({3, 4}.isdisjoint(row) for row in found.kept.neurons)
    assert torch.allclose(outputs(found.model, ids), outputs(model, ids), rtol=1e-4, atol=1e-4)
    shape = anatomy(found.model)
    assert (shape.neurons, shape.channels, shape.kv_heads) == (46, 31, 2)
    for options, sentence in (
        ({"hidden": 32}, "32 of 32"), ({"heads": 1.5}, "in"), ({"unit": "rows"}, "unit is"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            width(model, ids, **options)


def test_heads_are_scored_inside_inference_mode_too(llama, ids):
    """Panels evaluate there, and gradients are needed all the same."""
    expected = head_importance(llama, ids)
    with torch.inference_mode():
        assert torch.equal(head_importance(llama, ids), expected)
