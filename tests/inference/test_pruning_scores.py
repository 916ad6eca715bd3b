"""Pruning by scores: magnitude, Wanda, Taylor, SNIP, OBD; and what all methods have in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effnb.core.calibration import Calibration, InputNorm
from effnb.core.modules import Layers, linears, share
from effnb.core.outliers import inject_outliers
from effnb.core.training import causal_lm_loss
from effnb.inference.pruning import (
    choose_masks,
    cumulative_share,
    fisher_diagonal,
    follows,
    keep_mask,
    magnitude,
    magnitude_mask,
    magnitude_scores,
    masks_of,
    mean_gradients,
    obd,
    obd_saliency,
    obs,
    snip,
    snip_scores,
    sparsegpt,
    summarize,
    taylor,
    taylor_groups,
    taylor_score,
    taylor_scores,
    wanda,
    wanda_mask,
    wanda_score,
    wanda_scores,
)
from effnb.inference.quantization import rtn

METHODS = {
    "magnitude": lambda model, ids, sparsity, pattern, **k: magnitude(
        model, sparsity, pattern=pattern, **k
    ),
    "wanda": lambda m, ids, sparsity, pattern, **k: wanda(m, ids, sparsity, pattern=pattern, **k),
    "sparsegpt": lambda m, ids, s, pattern, **k: sparsegpt(m, ids, s, pattern=pattern, **k),
    "obs": lambda m, ids, sparsity, pattern, **k: obs(m, ids, sparsity, pattern=pattern, **k),
    "taylor": lambda m, ids, sparsity, pattern, **k: taylor(m, ids, sparsity, pattern=pattern, **k),
    "snip": lambda m, ids, sparsity, pattern, **k: snip(m, ids, sparsity, pattern=pattern, **k),
    "obd": lambda m, ids, sparsity, pattern, **k: obd(m, ids, sparsity, pattern=pattern, **k),
}
GLOBAL = {"magnitude", "wanda", "taylor", "snip", "obd"}


# --- all methods ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_what_every_method_gives(method, tiny_llama, ids):
    """Exact sparsity in every pattern; a new model of ordinary layers; the old one untouched."""
    prune, llama = METHODS[method], tiny_llama(num_hidden_layers=2)
    before = {name: p.clone() for name, p in llama.named_parameters()}
    for pattern, sparsity in (("layer", 0.4), ("row", 0.5), ("2:4", None), ("1:8", None)):
        pruned = prune(llama, ids, sparsity, pattern)
        expected = {"2:4": 0.5, "1:8": 0.875}.get(pattern, sparsity)
        masks = masks_of(pruned)
        assert masks.keys() == linears(llama).keys()
        for name, mask in masks.items():
            layer = pruned.get_submodule(name)
            assert type(layer) is nn.Linear and layer.weight.dtype == torch.float32
            assert int((~mask).sum()) == round(expected * mask.numel()), (name, pattern)
            if pattern == "row":
                assert len(set(mask.sum(1).tolist())) == 1
            if sparsity is None:
                assert follows(mask, pattern)
        assert pruned.model.embed_tokens.weight is llama.model.embed_tokens.weight
        assert pruned.lm_head.weight is llama.lm_head.weight
    pruned(ids).logits.sum().backward()  # what came out can be trained
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert all(p.grad is None for n, p in llama.named_parameters() if n in dict(linears(llama)))


@pytest.mark.parametrize("method", METHODS)
def test_a_sparsity_for_each_layer(method, llama, ids):
    goal = {name: 0.125 * (i % 4) for i, name in enumerate(linears(llama))}
    found = summarize(masks_of(METHODS[method](llama, ids, goal, "layer"))).layers
    assert all(abs(found[name] - goal[name]) < 1e-3 for name in goal)


@pytest.mark.parametrize("method", METHODS)
def test_patterns_of_names_and_frozen_models(method, llama, ids):
    llama.requires_grad_(False)
    pruned = METHODS[method](llama, ids, 0.5, "layer", layers=Layers("*.mlp.*", "*.0.*"))
    sparse = {name for name, mask in masks_of(pruned).items() if not mask.all()}
    assert sparse == set(linears(llama, Layers("*.mlp.*", "*.0.*"))) and len(sparse) == 6
    assert not any(p.requires_grad for p in pruned.parameters())


@pytest.mark.parametrize("method", sorted(GLOBAL))
def test_one_threshold_over_the_model(method, llama, ids):
    found = summarize(masks_of(METHODS[method](llama, ids, 0.5, "global")))
    assert found.kept == found.weights - round(0.5 * found.weights)
    assert max(found.layers.values()) - min(found.layers.values()) > 0.005


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode_and_half_precision(method, llama, ids):
    """A panel's callback may run with gradients switched off."""
    half = llama.to(torch.bfloat16)
    with torch.inference_mode():
        pruned = METHODS[method](half, ids, 0.5, "row")
    assert pruned.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert pruned(ids).logits.isfinite().all()
    assert summarize(masks_of(pruned)).sparsity == 0.5
    pruned(ids).logits.sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_bad_input_is_one_sentence(method, llama, ids):
    prune = METHODS[method]
    for sparsity in (-0.1, 1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="it must be at least 0 and below 1"):
            prune(llama, ids, sparsity, "row")
    with pytest.raises(ValueError, match="sparsity is missing"):
        prune(llama, ids, None, "layer")
    with pytest.raises(ValueError, match="which the groups of 5 of the pattern 2:5 do not divide"):
        prune(llama, ids, None, "2:5")
    with pytest.raises(ValueError, match='must be "layer", "row", "global" or "N:M"'):
        prune(llama, ids, 0.5, "checkered")
    with pytest.raises(ValueError, match="rounds to all 32 weights of a row"):
        prune(llama, ids, 0.99, "row")
    with pytest.raises(ValueError, match="fits"):
        prune(llama, ids, 0.5, "layer", layers="nothing")
    with pytest.raises(ValueError, match="prune the original, then quantize"):
        prune(rtn(llama, 4), ids, 0.5, "layer")
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj has 1 entries that are NaN"):
        prune(llama, ids, 0.5, "layer")


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"magnitude"}))
def test_empty_calibration(method, llama, ids):
    with pytest.raises(ValueError, match="calibration data is empty"):
        METHODS[method](llama, ids[:0], 0.5, "layer")


@pytest.mark.parametrize("method", ["sparsegpt", "obs"])
def test_no_global_threshold_for_what_prunes_as_it_goes(method, llama, ids):
    with pytest.raises(ValueError, match=r'has no pattern "global"; give a sparsity per layer'):
        METHODS[method](llama, ids, 0.5, "global")


# --- magnitude ------------------------------------------------------------------------------------


def test_scaling_a_layer_moves_the_global_threshold_only(llama):
    name = "model.layers.1.mlp.down_proj"
    scaled = share(llama)
    scaled.get_submodule(name).weight = nn.Parameter(llama.get_submodule(name).weight * 4)
    for pattern, same in (("layer", True), ("row", True), ("2:4", True), ("global", False)):
        sparsity = None if pattern == "2:4" else 0.5
        a = masks_of(magnitude(llama, sparsity, pattern=pattern))
        b = masks_of(magnitude(scaled, sparsity, pattern=pattern))
        assert all(torch.equal(a[n], b[n]) for n in a) == same, pattern
    assert b[name].float().mean() > a[name].float().mean()


def test_magnitude_keeps_the_largest(llama):
    pruned = magnitude(llama, 0.3, pattern="row")
    for name, layer in linears(llama).items():
        mask = magnitude_mask(layer.weight, 0.3, "row")
        assert torch.equal(pruned.get_submodule(name).weight, layer.weight * mask)
        lost = layer.weight.abs().masked_fill(mask, 0).amax(1)
        assert bool((lost <= layer.weight.abs().masked_fill(~mask, torch.inf).amin(1)).all())
    everything = choose_masks(magnitude_scores(llama), 0.3, "global")
    assert all(
        torch.equal(mask, everything[n])
        for n, mask in masks_of(magnitude(llama, 0.3, pattern="global")).items()
    )


def test_no_sparsity_changes_nothing(llama, ids):
    with torch.no_grad():
        assert torch.equal(magnitude(llama, 0)(ids).logits, llama(ids).logits)


def test_kept_energy_of_normal_weights():
    """Closed form: the largest half of |N(0, 1)| holds 0.929 of the energy, 2:4 0.868."""
    weight = torch.randn(1000, 400, generator=torch.Generator().manual_seed(0))
    free = magnitude_mask(weight, 0.5)
    bound = magnitude_mask(weight, None, "2:4")
    energy = weight.square().sum()
    assert float((weight * free).square().sum() / energy) == pytest.approx(0.929, abs=2e-3)
    assert float((weight * bound).square().sum() / energy) == pytest.approx(0.868, abs=2e-3)
    assert float((free & ~bound).sum() / free.sum()) == pytest.approx(0.188, abs=3e-3)


# --- Wanda ----------------------------------------------------------------------------------------


def test_wanda_by_hand():
    weight, norm = torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([5.0, 1.0, 1.0])
    assert wanda_score(weight, norm).tolist() == [[5, 2, 3]]
    assert wanda_mask(weight, norm, 0.34).tolist() == [[True, False, True]]


@given(st.integers(1, 9), st.integers(2, 12), st.floats(0, 0.45), st.integers(0, 99))
@settings(max_examples=25)
def test_equal_inputs_make_wanda_magnitude(rows, columns, sparsity, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = wanda_mask(weight, torch.full((columns,), 2.0), sparsity)
    assert torch.equal(found, magnitude_mask(weight, sparsity, "row"))


def test_the_row_mask_is_the_best_for_inputs_without_correlation():
    """Against every mask there is."""
    generator = torch.Generator().manual_seed(0)
    weight, norm = torch.randn(1, 8, generator=generator), torch.rand(8, generator=generator) * 3
    mask = wanda_mask(weight, norm, 3 / 8)[0]
    every = torch.combinations(torch.arange(8), 3)
    errors = (weight[0] * norm).square()[every].sum(1)
    assert torch.equal((~mask).nonzero().flatten(), every[errors.argmin()])


def test_wanda_is_blind_to_rescaling_and_magnitude_is_not(llama, ids):
    """Outliers that change no function; by 8, so that every product is exact."""
    loud = inject_outliers(llama, [3, 7, 20], 8.0)
    for pattern, sparsity in (("row", 0.5), ("layer", 0.5), ("2:4", None), ("global", 0.5)):
        a, b = (wanda(m, ids, sparsity, pattern=pattern) for m in (llama, loud))
        masks = masks_of(b)
        assert all(torch.equal(mask, masks[name]) for name, mask in masks_of(a).items()), pattern
        with torch.no_grad():
            assert torch.equal(a(ids).logits, b(ids).logits)
        a, b = (masks_of(magnitude(m, sparsity, pattern=pattern)) for m in (llama, loud))
        changed = {name for name in a if not torch.equal(a[name], b[name])}
        assert {n for n in a if n.endswith(("q_proj", "up_proj"))} <= changed


def test_each_layer_is_calibrated_on_what_the_pruned_blocks_give(llama, ids):
    pruned = wanda(llama, ids, 0.5)
    name = "model.layers.2.mlp.down_proj"
    for model, same in ((pruned, True), (llama, False)):
        seen = InputNorm(48)
        # In a block, its own layers are observed before any of them is pruned.
        mixed = share(model)
        mixed.model.layers[2] = llama.model.layers[2]
        hook = mixed.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, seen=seen: seen.update(arguments[0].flatten(0, -2))
        )
        with torch.no_grad():
            mixed(ids)
        hook.remove()
        mask = wanda_mask(llama.get_submodule(name).weight, seen.value, 0.5)
        assert torch.equal(mask, masks_of(pruned)[name]) == same


def test_padding_says_nothing(llama, ids):
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 8, dtype=torch.long)], 1)
    batches = [{"input_ids": padded, "attention_mask": mask}]
    a, b = wanda_scores(llama, ids), wanda_scores(llama, batches)
    c = wanda_scores(llama, padded)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(a[name], c[name], rtol=1e-2)


def test_scores_of_the_dense_model_make_the_global_mask(llama, ids):
    expected = choose_masks(wanda_scores(llama, ids), 0.4, "global")
    found = masks_of(wanda(llama, ids, 0.4, pattern="global"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_adaptive_form_takes_the_same_share_of_every_row():
    """Against the paper's search: bisect the share until the sparsity is met."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 64, generator=generator) * torch.rand(40, 64, generator=generator) ** 3
    norm = torch.rand(64, generator=generator) + 0.1
    mask = wanda_mask(weight, norm, 0.5, adaptive=True)
    score = wanda_score(weight, norm).double()
    ordered, order = score.sort(1)
    low, high = 0.0, 1.0
    for _ in range(60):
        alpha = (low + high) / 2
        gone = ordered.cumsum(1) <= alpha * score.sum(1, keepdim=True)
        low, high = (alpha, high) if gone.float().mean() < 0.5 else (low, alpha)
    gone = ordered.cumsum(1) <= high * score.sum(1, keepdim=True)
    expected = torch.ones_like(gone).scatter(1, order, ~gone)
    assert torch.equal(mask, expected)
    assert len(set(mask.sum(1).tolist())) > 3 and int(mask.sum()) == 1280
    share = cumulative_share(score)
    assert float(share.max()) == pytest.approx(1) and float(share.min()) > 0


def test_adaptive_on_a_model(llama, ids):
    pruned = wanda(llama, ids, 0.5, adaptive=True)
    assert summarize(masks_of(pruned)).sparsity == pytest.approx(0.5, abs=1e-3)
    assert len(set(masks_of(pruned)["model.layers.0.mlp.up_proj"].sum(1).tolist())) > 3
    with pytest.raises(ValueError, match='between rows; the pattern is "2:4"'):
        wanda(llama, ids, pattern="2:4", adaptive=True)


class Routed(nn.Module):
    """Two experts; the router only ever takes the first."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, hidden):
        return hidden + self.experts[0](hidden)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Routed(), Routed(), Routed()])

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "obs"])
def test_a_layer_without_tokens_is_pruned_by_magnitude(method):
    torch.manual_seed(0)
    net = Net()
    pruned = METHODS[method](net, torch.randint(0, 20, (2, 9)), 0.5, "row")
    for i in range(3):
        name = f"blocks.{i}.experts.1"
        expected = magnitude_mask(net.get_submodule(name).weight, 0.5, "row")
        assert torch.equal(masks_of(pruned)[name], expected)
        kept = net.get_submodule(name).weight * expected
        torch.testing.assert_close(pruned.get_submodule(name).weight, kept)


# --- Taylor, SNIP, OBD ----------------------------------------------------------------------------


def gated(model, name, gate):
    """The loss as a function of gates on one layer's weight."""
    weights = dict(model.named_parameters())
    weights[f"{name}.weight"] = weights[f"{name}.weight"].detach() * gate
    return lambda ids: torch.func.functional_call(model, weights, (), {"input_ids": ids}).logits


def test_gates_have_the_gradient_of_weight_times_gradient(llama, ids):
    """The identity behind SNIP: dL/dc = w dL/dw at c = 1."""
    llama = llama.double()
    name = "model.layers.1.self_attn.v_proj"
    weight = llama.get_submodule(name).weight
    gate = torch.ones_like(weight, requires_grad=True)
    logits = gated(llama, name, gate)(ids)
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(loss, gate)[0]
    found = mean_gradients(llama, ids)[name] * weight
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)  # the loss is in float32
    scores = taylor_scores(llama, ids)
    torch.testing.assert_close(scores[name], expected.abs(), rtol=1e-5, atol=1e-9)


def test_the_sum_over_a_group_is_the_first_order_change_of_the_loss(llama, ids):
    """L(w (1 - eps)) - L(w) = -eps sum(w g) + O(eps^2): halving eps quarters what is left."""
    llama = llama.double()

    def loss_of(model, batch):
        logits = model(input_ids=batch).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    name, row = "model.layers.0.mlp.up_proj", 5
    layer = llama.get_submodule(name)
    gradient = mean_gradients(llama, [ids], loss=loss_of)[name]
    slope = float((layer.weight.detach() * gradient)[row].sum())
    rests = []
    with torch.no_grad():
        for eps in (2e-2, 1e-2):
            changed = share(llama)
            new = layer.weight.clone()
            new[row] *= 1 - eps
            changed.get_submodule(name).weight = nn.Parameter(new)
            rests.append(float(loss_of(changed, ids) - loss_of(llama, ids)) + eps * slope)
    assert rests[0] / rests[1] == pytest.approx(4, rel=0.05)
    assert float(taylor_groups(layer.weight, gradient)[row]) == pytest.approx(abs(slope))


def test_the_forms_of_a_group():
    weight, gradient = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[1.0, -1], [2, 2]])
    assert taylor_groups(weight, gradient, "vector").tolist() == [1, 4]
    assert taylor_groups(weight, gradient, "element").tolist() == [3, 8]
    assert taylor_groups(weight, gradient, "squared").tolist() == [5, 40]
    assert taylor_score(weight, gradient).tolist() == [[1, 2], [6, 2]]
    with pytest.raises(ValueError, match='must be "vector", "element" or "squared"'):
        taylor_groups(weight, gradient, "mixed")


def two_signs(model, sign):
    return sign * model[0].weight.sum()


def test_gradients_are_averaged_before_the_absolute_value():
    model = nn.Sequential(nn.Linear(4, 3))
    scores = taylor_scores(model, [1.0, -1.0], loss=two_signs)
    assert float(scores["0"].abs().max()) == 0
    fisher = fisher_diagonal(model, [1.0, -1.0], loss=two_signs)  # these are squared first
    assert torch.equal(fisher["0"], torch.ones(3, 4))


def test_batch_size_does_not_matter(llama, ids):
    a, b = (mean_gradients(llama, Calibration(ids, batch_size=size)) for size in (1, 4))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_padding_counts_for_nothing_in_the_loss(llama, ids):
    padded = torch.cat([ids, torch.zeros(4, 8, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(4, 8, dtype=torch.long)], 1)
    a = mean_gradients(llama, ids)
    b = mean_gradients(llama, [{"input_ids": padded, "attention_mask": mask}])
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-6)


def test_fisher_is_the_mean_of_squares_over_sequences(llama, ids):
    name = "model.layers.2.self_attn.o_proj"
    weight = llama.get_submodule(name).weight
    each = [torch.autograd.grad(causal_lm_loss(llama, ids[i : i + 1]), weight)[0] for i in range(4)]
    found = fisher_diagonal(llama, ids)[name]
    torch.testing.assert_close(found, torch.stack(each).square().mean(0), rtol=1e-4, atol=1e-9)
    assert not torch.allclose(found, torch.stack(each).mean(0).square(), rtol=0.1)
    expected = keep_mask(obd_saliency(weight, found), 0.5)
    assert torch.equal(masks_of(obd(llama, ids, 0.5, pattern="layer"))[name], expected)


def test_obd_saliency_by_hand():
    weight, diagonal = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 0.5])
    assert obd_saliency(weight, diagonal).tolist() == [[1, 1], [9, 4]]


def test_snip_is_one_batch_and_sums_to_one(llama, ids):
    scores = snip_scores(llama, ids)
    assert sum(float(s.sum()) for s in scores.values()) == pytest.approx(1, rel=1e-4)
    assert all((s >= 0).all() for s in scores.values())
    a = masks_of(snip(llama, ids, 0.6))
    b = masks_of(taylor(llama, Calibration(ids, batch_size=4), 0.6))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_models_of_any_kind_with_a_loss_of_ones_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    x, y = torch.randn(32, 6), torch.randint(0, 3, (32,))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    pruned = snip(net, (x, y), 0.7, loss=loss)
    assert summarize(masks_of(pruned)).kept == 144 - round(0.7 * 144)
    assert summarize(masks_of(taylor(net, [(x, y)], 0.5, loss=loss))).sparsity == 0.5
    assert summarize(masks_of(obd(net, [(x, y)], 0.5, loss=loss))).sparsity == 0.5


def test_losses_that_cannot_rank():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="the loss does not depend on 1"):
        taylor(net, [1.0], 0.5, loss=two_signs)
    with pytest.raises(ValueError, match=r"gradient of 0 is not finite"):
        taylor(net[:1], [float("inf")], 0.5, loss=two_signs)
    with pytest.raises(ValueError, match="every gradient of this batch is 0"):
        snip(net[:1], 0.0, 0.5, loss=two_signs)
    with pytest.raises(ValueError, match="give at least one batch"):
        taylor(net[:1], [], 0.5, loss=two_signs)


def test_gradients_are_left_as_they_were(llama, ids):
    llama(ids).logits.sum().backward()
    before = {name: p.grad.clone() for name, p in llama.named_parameters()}
    taylor(llama, ids, 0.5)
    assert all(torch.equal(p.grad, before[name]) for name, p in llama.named_parameters())
