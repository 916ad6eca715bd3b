"""Expert layers and decoders: equal to dense ones where they must be, padded, compressed."""

import copy
import warnings

import pytest
import torch
import transformers

from effnb.core.coverage import LeftOut
from effnb.core.training import TrainingSettings, train
from effnb.design.experts import (
    METHODS,
    MIXTRAL,
    ExpertLayer,
    RoutingSettings,
    count_parameters,
    expert_layers,
    routing_losses,
    routings,
    to_mixtral,
    training_loss,
    upcycle,
    with_experts,
)
from effnb.inference.pruning import magnitude, wanda
from effnb.inference.quantization import gptq, rtn

OPEN = {"capacity_factor": None, "evaluation_factor": None}


def settings_of(method, **more):
    k = {"switch": 1, "entmax": 1}.get(method, 2)
    return RoutingSettings(method, k, **{"capacity_factor": 1.5, "evaluation_factor": 2.0} | more)


def layer_of(method="switch", experts=4, seed=0, **more):
    torch.manual_seed(seed)
    layer = ExpertLayer(8, 6, experts, settings_of(method, **more))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.double()


def llama(seed=0, layers=2):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            pad_token_id=0,
        )
    ).eval()


def ids(batch=2, time=12, seed=0):
    return torch.randint(1, 64, (batch, time), generator=torch.Generator().manual_seed(seed))


def by_loop(layer, x):
    """Token by token, with the gates and seats that the layer found."""
    routing = layer.last
    out = torch.zeros_like(x).flatten(0, 1)
    flat = x.flatten(0, 1)
    for token, expert, gate, kept in zip(
        routing.tokens, routing.experts, routing.gates, routing.kept, strict=True
    ):
        if kept:
            gates, ups = (layer.experts.gate_up_proj[expert] @ flat[token]).chunk(2)
            inner = torch.nn.functional.silu(gates) * ups
            out[token] += gate * (layer.experts.down_proj[expert] @ inner)
    return out.view(x.shape)


@pytest.mark.parametrize("method", METHODS)
def test_the_layer_is_a_loop_over_tokens(method):
    layer = layer_of(method)
    x = torch.randn(2, 10, 8, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), by_loop(layer, x))
    torch.testing.assert_close(layer.train()(x), by_loop(layer, x))


def test_one_expert_is_the_dense_layer():
    """Its probability is 1."""
    layer = layer_of(experts=1, **OPEN)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gates, ups = (x @ layer.experts.gate_up_proj[0].T).chunk(2, dim=-1)
    dense = (torch.nn.functional.silu(gates) * ups) @ layer.experts.down_proj[0].T
    torch.testing.assert_close(layer(x), dense)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_experts_does_not_matter(method):
    layer = layer_of(method).eval()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    other, order = copy.deepcopy(layer), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for tensor in (other.router.weight, *other.experts.parameters()):
            tensor.copy_(tensor[order])
    torch.testing.assert_close(other(x), layer(x))


@pytest.mark.parametrize("group", ["batch", "sequence", "position"])
def test_groups_share_seats(group):
    layer = layer_of("expert choice", group=group, capacity_factor=1.0).eval()
    x = torch.randn(4, 6, 8, dtype=torch.float64)
    y = layer(x)
    routing = layer.last
    assert (
        routing.logits.shape[:2]
        == {"batch": (1, 24), "sequence": (4, 6), "position": (6, 4)}[group]
    )
    changed = x.clone()
    changed[0, -1] = 9 * torch.randn(8)
    moved = (layer(changed) != y).any(-1)
    if group == "sequence":
        assert not bool(moved[1:].any())
    if group == "position":
        assert not bool(moved[:, :-1].any())


def test_a_layer_is_copied_without_its_last_call():
    layer = layer_of()
    layer(torch.randn(1, 8, 8, dtype=torch.float64))
    assert copy.deepcopy(layer).last is None and layer.last is not None


def test_settings_that_do_not_belong_together():
    for words, arguments in (
        ("method is 'best'", {"method": "best"}),
        ("k is 2; switch has k = 1", {"k": 2}),
        ("k is 1; glam has k = 2", {"method": "glam"}),
        ("k is 0; a token needs one", {"method": "top-k", "k": 0}),
        ("capacity_factor is 0; it must be above 0", {"capacity_factor": 0}),
        ("jitter is 1; it must lie", {"jitter": 1}),
        ("group is 'day'", {"group": "day"}),
        ("expert choice needs a capacity_factor", {"method": "expert choice", **OPEN}),
    ):
        with pytest.raises(ValueError, match=words):
            RoutingSettings(**arguments)
    with pytest.raises(ValueError, match="k is 2; with 1 expert a token"):
        ExpertLayer(8, 6, 1, MIXTRAL)
    with pytest.raises(ValueError, match="all must be at least 1"):
        ExpertLayer(8, 0, 2)
    with pytest.raises(ValueError, match="leave 0.31 of a token for each expert"):
        layer_of(capacity_factor=1.25).train()(torch.randn(1, 1, 8, dtype=torch.float64))
    layer = layer_of().eval()  # text that is written token by token always finds a seat
    layer(torch.randn(1, 1, 8, dtype=torch.float64))
    assert layer.last.dropped == 0


# --- decoders -------------------------------------------------------------------------------------


def test_a_token_meets_as_many_weights_as_in_the_dense_model():
    dense = llama()
    for experts, k in ((4, 1), (8, 2)):
        sparse = with_experts(dense, experts, settings_of("switch" if k == 1 else "top-k"))
        counts = count_parameters(sparse)
        router = 16 * experts
        assert counts.active == count_parameters(dense).active + router
        assert counts.experts == 3 * 16 * 24 * experts // k
        assert counts.total == counts.active + counts.experts - 3 * 16 * 24
    assert not expert_layers(dense)


def test_up_cycling_changes_nothing_until_training():
    dense = llama()
    sparse = upcycle(dense, 4, blocks=range(2))
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids()).logits, dense(ids()).logits)
        single = upcycle(dense, 4, RoutingSettings(**OPEN))
        assert not torch.allclose(single(ids()).logits, dense(ids()).logits)


def test_a_trained_expert_model_learns_and_its_load_is_balanced():
    """Two runs of one model: without the loss for balance the load is less even."""
    batches = [ids(4, 16, seed) for seed in range(8)]
    spread = {}
    for weight in (0.0, 1.0):
        sparse = with_experts(llama(), 4, settings_of("switch", **OPEN)).train()
        run = train(
            sparse, lambda step: batches[step % 8], TrainingSettings(60, 0.01),
            loss=training_loss(weight, 0.001),
        )  # fmt: skip
        assert run.losses[-1] < run.losses[0] - 0.3
        with torch.no_grad():
            sparse(torch.cat(batches))
        spread[weight] = float(routing_losses(sparse)[0])
    assert spread[1.0] < spread[0.0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", ["switch", "expert choice", "entmax"])
def test_padding_changes_no_token_of_text(side, method):
    sparse = with_experts(llama(), 4, settings_of(method, evaluation_factor=None, group="sequence"))
    text = ids(2, 8)
    more = ids(2, 4, seed=1)
    parts = (more, text) if side == "left" else (text, more)
    mask = torch.cat([torch.full_like(p, int(p is text)) for p in parts], 1)
    where = mask[0].bool()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        plain = sparse(text).logits
        loads = [r.load for r in routings(sparse).values()]
        padded = sparse(torch.cat(parts, 1), attention_mask=mask, position_ids=positions).logits
        again = [r.load for r in routings(sparse).values()]
    if method == "expert choice":  # its capacity counts padding: the seats are more
        assert all(int(r.experts_of_token[:, ~where].sum()) == 0 for r in routings(sparse).values())
        return
    torch.testing.assert_close(padded[:, where], plain, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(loads, again, strict=True))
    copied = copy.deepcopy(sparse)  # the model that is copied watches its own layers
    with torch.no_grad():
        copied(torch.cat(parts, 1), attention_mask=mask)
    assert next(iter(expert_layers(copied).values())).text is not None


def test_a_decoder_writes_text_with_its_cache():
    sparse = with_experts(llama(), 4, settings_of("switch", evaluation_factor=None))
    start = ids(1, 5)
    with torch.no_grad():
        out = sparse.generate(start, max_new_tokens=4, do_sample=False)
        step = sparse(out[:, :-1]).logits[0, 4:].argmax(-1)
    assert torch.equal(out[0, 5:], step)


def test_a_decoder_becomes_a_mixtral_and_is_loaded_again(tmp_path):
    sparse = upcycle(llama(), 4, blocks=range(2))
    for layer in expert_layers(sparse).values():
        torch.nn.init.normal_(layer.experts.down_proj, std=0.2)
    to_mixtral(sparse).save_pretrained(tmp_path)
    loaded = transformers.MixtralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids()).logits, sparse(ids()).logits)
    with pytest.raises(ValueError, match="1 of 2 blocks have experts"):
        to_mixtral(upcycle(llama(), 4))
    with pytest.raises(ValueError, match="the routing is switch with k = 1"):
        to_mixtral(with_experts(llama(), 4, blocks=range(2)))


def test_models_that_have_no_place_for_experts():
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2))
    with pytest.raises(ValueError, match="only such layers can become experts"):
        with_experts(gpt, 4)
    with pytest.raises(ValueError, match=r"the blocks are \[2\]; the model has 2"):
        with_experts(llama(), 4, blocks=[2])
    with pytest.raises(ValueError, match="the feed-forward width 24 cannot be shared by k = 5"):
        with_experts(llama(), 8, RoutingSettings("top-k", 5))
    with pytest.raises(ValueError, match="no routing is known"):
        routings(llama())
    with pytest.raises(ValueError, match="neither can be negative"):
        training_loss(-1)


# --- compression ----------------------------------------------------------------------------------

COMPRESSED = {
    "rtn": lambda m: rtn(m, 4, group_size=8),
    "gptq": lambda m: gptq(m, ids(8, 16), 4, group_size=8),
    "magnitude": lambda m: magnitude(m, 0.5),
    "wanda": lambda m: wanda(m, ids(8, 16), 0.5),
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_fused_experts_are_compressed_like_any_layer(name):
    """Every expert's matrix changes, nothing is passed over, and the model still routes."""
    sparse = upcycle(llama(), 4, blocks=range(2))
    before = {n: p.clone() for n, p in sparse.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftOut)
        small = COMPRESSED[name](sparse)
    with torch.no_grad():
        assert not torch.equal(small(ids()).logits, sparse(ids()).logits)
    assert len(routings(small)) == 2
    if name in ("magnitude", "wanda"):
        for layer in expert_layers(small).values():
            for stack in layer.experts.parameters():
                assert float((stack == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    assert all(torch.equal(p, before[n]) for n, p in sparse.named_parameters())


@pytest.mark.parametrize("method", ["switch", "top-k", "expert choice", "entmax"])
def test_reading_in_place_computes_what_training_does(method):
    """Without gradients the layer writes into its own tensors, and into no one else's."""
    torch.manual_seed(0)
    layer = ExpertLayer(8, 12, 4, RoutingSettings(method, 1 if method != "top-k" else 2)).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 9, 8)
    before = x.clone(), copy.deepcopy(layer.state_dict())
    expected = layer(x).detach()
    with torch.no_grad():
        found = layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(x, before[0])
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[1][name]), name
