"""Experts against transformers' Switch and Mixtral, entmax by definition, and a grouped product.

Two of transformers' habits differ from the papers and are pinned here: Mixtral's loss for balance
has the minimum k, not 1; Switch's `expert_capacity` is a number of tokens of each sequence.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, SwitchTransformersConfig
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.switch_transformers import modeling_switch_transformers as switches

from effnb.design.experts import (
    MIXTRAL,
    ExpertLayer,
    balance_loss,
    entmax_routing,
    switch,
    top_k,
    z_loss,
)
from effnb.kernels.grouped_matmul import grouped_matmul


def scores(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_switch_losses():
    logits = scores(3, 20, 8)
    routing = switch(logits)
    theirs = switches.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(balance_loss(routing), theirs, atol=1e-6, rtol=0)
    torch.testing.assert_close(z_loss(routing), switches.router_z_loss_func(logits))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_mixtral_loss_is_k_times_ours(k, padded):
    logits = scores(1, 24, 8)
    text = torch.arange(24)[None] >= 5 if padded else None
    theirs = mixtral.load_balancing_loss_func((logits[0],), 8, k, text)
    torch.testing.assert_close(k * balance_loss(top_k(logits, k, text=text)), theirs)


def test_mixtral_counts_all_layers_together():
    """Its loss is that of the layers' tokens put together; ours is the mean of theirs."""
    one, two = scores(1, 24, 8), scores(1, 24, 8, seed=1)
    theirs = mixtral.load_balancing_loss_func((one[0], two[0]), 8, 2)
    together = balance_loss(top_k(torch.cat([one, two], 1), 2))
    torch.testing.assert_close(2 * together, theirs)
    apart = (balance_loss(top_k(one, 2)) + balance_loss(top_k(two, 2))) / 2
    assert float(apart) != pytest.approx(float(together), abs=1e-4)


@pytest.mark.parametrize("seats", [2, 5, 64])
def test_switch_router(seats):
    """Its capacity is a number of tokens, counted in each sequence; 64 unless it is changed."""
    config = SwitchTransformersConfig(d_model=6, num_experts=4, expert_capacity=seats)
    assert SwitchTransformersConfig().expert_capacity == 64
    assert SwitchTransformersConfig().router_aux_loss_coef == 0.001  # a tenth of the paper's
    router = switches.SwitchTransformersTop1Router(config).eval()
    x = scores(3, 10, 6)
    with torch.no_grad():
        dispatch, gates, logits = router(x)
    routing = switch(logits, capacity=seats)
    ours = torch.zeros(30, 4, dtype=dispatch.dtype)
    ours[routing.tokens[routing.kept], routing.experts[routing.kept]] = 1
    assert torch.equal(ours.view(3, 10, 4), dispatch)
    torch.testing.assert_close(routing.gates.view(3, 10, 1), gates)


def test_mixtral_block():
    config = MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    block = mixtral.MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = ExpertLayer(16, 24, 4, MIXTRAL)
    layer.router.weight = nn.Parameter(block.gate.weight.detach().clone())
    layer.experts.gate_up_proj = nn.Parameter(block.experts.gate_up_proj.detach().clone())
    layer.experts.down_proj = nn.Parameter(block.experts.down_proj.detach().clone())
    x = scores(2, 9, 16).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, theirs = layer(x), block(other)
    torch.testing.assert_close(y, theirs)
    y.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    for ours, its in (
        (layer.router.weight, block.gate.weight),
        (layer.experts.gate_up_proj, block.experts.gate_up_proj),
        (layer.experts.down_proj, block.experts.down_proj),
    ):
        torch.testing.assert_close(ours.grad, its.grad, rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(layer).last is None


def entmax15_by_definition(logits):
    """p_i = [z_i / 2 - tau]_+^2 with the tau for which they sum to 1, by bisection in float64."""
    z = logits.double() / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True)
    for _ in range(100):
        middle = (low + high) / 2
        enough = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (z - low).clamp(min=0).square()


def sparsemax_by_definition(logits):
    """p_i = [z_i - tau]_+ in closed form: the one support whose tau lies below it, row by row."""
    rows = []
    for z in logits.double().flatten(0, -2):
        ordered = z.sort(descending=True).values
        found = []
        for k in range(1, len(z) + 1):
            tau = (ordered[:k].sum() - 1) / k
            if ordered[k - 1] > tau and (k == len(z) or ordered[k] <= tau):
                found.append(tau)
        (tau,) = found
        rows.append((z - tau).clamp(min=0))
    return torch.stack(rows).view(logits.shape)


ENTMAX = {1.5: entmax15_by_definition, 2.0: sparsemax_by_definition}


@pytest.mark.parametrize("alpha", ENTMAX)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_entmax_router_by_the_definition(alpha, scale):
    """A bisection for alpha = 1.5, the closed form of sparsemax, and what makes p the optimum."""
    logits = scale * scores(2, 15, 6).double()
    routing = entmax_routing(logits, alpha=alpha)
    p = routing.probabilities
    torch.testing.assert_close(p, ENTMAX[alpha](logits), atol=1e-12, rtol=0)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 15).double(), atol=1e-12, rtol=0)
    # Karush, Kuhn, Tucker: (alpha - 1) z_i - p_i^(alpha - 1) is tau where p_i > 0; below it, p = 0.
    support = p > 0
    level = (alpha - 1) * logits - p.pow(alpha - 1)
    tau = level.masked_fill(~support, -torch.inf).amax(-1, keepdim=True)
    lowest = level.masked_fill(~support, torch.inf).amin(-1, keepdim=True)
    torch.testing.assert_close(lowest, tau, atol=1e-9, rtol=0)
    assert bool(((alpha - 1) * logits <= tau + 1e-9)[~support].all())
    assert scale == 0.1 or bool((~support).any())
    # The assignments are the support, with p as gates.
    table = torch.zeros(30, 6, dtype=torch.float64)
    table[routing.tokens, routing.experts] = routing.gates
    assert torch.equal(table.view_as(p), p)
    assert torch.equal(routing.load, support.sum((0, 1)))


@pytest.mark.parametrize("alpha", ENTMAX)
def test_gradient_of_the_entmax_router_by_finite_differences(alpha):
    logits = scores(1, 7, 5).double()
    weights = scores(1, 7, 5, seed=3).double()

    def value(z):
        return float((weights * ENTMAX[alpha](z)).sum())

    moved = logits.clone().requires_grad_()
    routing = entmax_routing(moved, alpha=alpha)
    (weights.flatten(0, 1)[routing.tokens, routing.experts] * routing.gates).sum().backward()
    step, slopes = 1e-6, torch.zeros_like(logits)
    for place in itertools.product(*map(range, logits.shape)):
        up, down = logits.clone(), logits.clone()
        up[place] += step
        down[place] -= step
        slopes[place] = (value(up) - value(down)) / (2 * step)
    assert bool((routing.probabilities == 0).any()) and bool(slopes.abs().max() > 0.01)
    torch.testing.assert_close(moved.grad, slopes, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_grouped_product(dtype):
    """With sizes that its kernels take: multiples of 16 bytes."""
    x, weight = scores(24, 32).to(dtype), scores(4, 16, 32, seed=1).to(dtype)
    ends = torch.tensor([5, 5, 17, 24], dtype=torch.int32)
    theirs = torch._grouped_mm(x, weight.mT, offs=ends)
    ours = grouped_matmul(x, weight, ends)
    torch.testing.assert_close(
        ours, theirs, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-4
    )
