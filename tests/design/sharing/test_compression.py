"""Every method of the workbook on a model whose layers share weights: right, or one sentence.

A weight that stands in several places is replaced in all of them at once, by one object: what comes
out has the same sharing, and its argument is as it was.
"""

import warnings

import architectures
import methods
import pytest
import torch

from effnb.core.deltas import delta_parameters, detach
from effnb.core.modules import clone
from effnb.core.sublayers import find_sublayers
from effnb.core.training import train
from effnb.design.sharing import (
    factorize_embedding,
    load_shared,
    save_shared,
    share_layers,
    shared_places,
    unshare_layers,
)
from effnb.finetuning import lora
from effnb.inference import low_rank, pruning, quantization
from effnb.inference import self_distilled_quantization as sdq

GAINS = "is used in several blocks, and the gains of .* and .* differ"
LAST = "is used by several blocks, so that training the last ones would change"
WHAT = ("all", "attention", "feed_forward")
REFUSED = {
    "BitFit": dict.fromkeys(WHAT, "has no biases"),
    "last layers": dict.fromkeys(WHAT, LAST),
    "rotation": dict.fromkeys(WHAT[1:], GAINS),
    "QuaRot": dict.fromkeys(WHAT[1:], GAINS),
}
"""What methods say that cannot do it, by what is shared.

This model has no biases, shared or not. To train the last layers alone means nothing where the
first ones use their weights. A rotation moves the gain of a norm into the layers behind it, and one
weight cannot take in two gains.
"""
EXACT = ("magnitude", "RTN", "NF4", "ternary", "mixed precision", "SVD")
"""Methods that look at a weight alone: sharing first or compressing first is the same."""
UNFIT = ("head pruning", "LLM-Pruner", "LoRAPrune", "width", "ShortGPT")
"""Methods whose oracle asks only for a smaller model."""


def built(what="all"):
    return share_layers(architectures.build("Llama"), what)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", methods.METHODS)
def test_a_shared_weight_is_replaced_in_all_its_places(name, what):
    """And it is fitted to the inputs of all of them, which differ: each method has its oracle."""
    method, batch = methods.METHODS[name], architectures.batch("Llama")
    shared = built(what)
    places = shared_places(shared)
    before = {key: value.clone() for key, value in shared.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what in REFUSED.get(name, {}):
            with pytest.raises(ValueError, match=REFUSED[name][what]):
                method.run(shared, batch)
            return
        result = method.run(shared, batch)
    assert shared_places(shared) == places
    assert all(torch.equal(before[key], value) for key, value in shared.state_dict().items())
    compared = 0
    kept = {name for name, _ in result.named_modules(remove_duplicate=False)}
    for first, others in places.items():
        for other in others:
            if {first, other} <= kept:
                assert result.get_submodule(first) is result.get_submodule(other), other
                compared += 1
    assert compared >= {"all": 9, "attention": 4, "feed_forward": 3}[what] or name == "ShortGPT"
    with torch.no_grad():
        found = result(**batch).logits
        assert torch.isfinite(found).all()
        if name in EXACT:
            alone = method.run(unshare_layers(built(what)), batch)
            torch.testing.assert_close(found, alone(**batch).logits, atol=1e-5, rtol=1e-5)
    if name not in UNFIT:
        method.oracle(built(what), result, batch)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("groups", [1, 2])
def test_scales_of_shared_layers_change_no_function(what, groups):
    """Smoothing, and AWQ's scales at 8 bits, where the norms of the places are shared or not."""
    torch.manual_seed(0)
    model = share_layers(deep(), what, groups)
    ids = architectures.ids()
    searches = {}
    new = quantization.awq(model, ids, 8, group_size=8, clip=False, report=searches.__setitem__)
    smooth, plain = quantization.smooth(model, ids), quantization.rtn(model, 8, group_size=8)
    with torch.no_grad():
        truth = model(ids).logits
        moved, rounded = (
            float((m(ids).logits - truth).norm() / truth.norm()) for m in (new, plain)
        )
        torch.testing.assert_close(smooth(ids).logits, truth, atol=2e-4, rtol=2e-4)
    assert 0 < moved < 1.5 * rounded < 0.1  # scales that do not cancel would move it by far more
    # Norms that stand before one and the same layer took in the same scales.
    for scaled in (new, smooth):
        factors = [
            layer.input_layernorm.weight / old.input_layernorm.weight
            for layer, old in zip(scaled.model.layers, model.model.layers, strict=True)
        ]
        alike = torch.allclose(factors[0], factors[1], rtol=1e-4)
        assert alike is (what in ("all", "attention"))
        assert torch.allclose(factors[0], factors[3], rtol=1e-4) is (alike and groups == 1)
    assert any(search.exponent > 0 for search in searches.values())


def deep():
    """A Llama of four layers whose norms differ, so that what their layers read differs too."""
    config = architectures.build("Llama").config
    config.num_hidden_layers = 4
    model = type(architectures.build("Llama"))(config).eval()
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.copy_(torch.rand(norm.weight.shape) * 3 + 0.1 * (i + 1))
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model


def test_awq_searches_by_the_outputs_of_all_places():
    """The joint error is least at the joint choice, and each place alone would choose otherwise."""
    torch.manual_seed(0)
    model = share_layers(deep(), "attention")
    ids, found = architectures.ids(), {}
    quantization.awq(
        model, ids, 3, group_size=8, clip=False, layers="*.self_attn.*", report=found.__setitem__
    )
    names = [f"model.layers.{i}.input_layernorm" for i in range(4)]
    assert {n for n in found if n.endswith("input_layernorm")} == set(names)
    assert all(found[name].scales is found[names[0]].scales for name in names)
    joint = torch.tensor(found[names[0]].losses)
    with torch.no_grad():
        states = []
        hooks = [
            layer.self_attn.q_proj.register_forward_pre_hook(lambda m, a: states.append(a[0]))
            for layer in model.model.layers[:1]
        ]
        model(ids)
        hooks[0].remove()
    x = torch.cat([state.flatten(0, 1) for state in states])
    assert len(states) == 4 and len(x) == 4 * ids.numel()
    # s = m^r / sqrt(max(m^r) min(m^r)) with m over all places.
    search, m = found[names[0]], x.abs().mean(0)
    s = m.pow(search.exponent).clamp(min=1e-4)
    torch.testing.assert_close(search.scales, s / (s.max() * s.min()).sqrt(), rtol=1e-4, atol=1e-5)
    # The loss at each exponent is the mean over places of the attention's squared error.
    total = torch.zeros(len(joint), dtype=torch.float64)
    for step in range(len(joint)):
        s = m.pow(step / len(joint)).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        rounded = clone(model)
        attention = rounded.model.layers[0].self_attn
        with torch.no_grad():
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
                w = quantization.quantize(layer.weight * s, 3, group_size=8).dequantize()
                layer.weight.copy_(w / s)
            total[step] = error_of_attention(model, rounded, ids)
    torch.testing.assert_close(joint.double(), total, rtol=2e-2, atol=1e-8)


def error_of_attention(model, changed, ids):
    """The mean squared error over the attentions of all blocks, each on its true inputs."""
    kept = []

    def keep(module, arguments, keywords, output):
        keywords = {k: v for k, v in keywords.items() if k != "past_key_values"}
        kept.append((arguments, keywords, output[0]))

    hooks = [
        layer.self_attn.register_forward_hook(keep, with_kwargs=True)
        for layer in model.model.layers
    ]
    model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    errors = [
        (layer.self_attn(*arguments, **keywords)[0] - truth).square().mean()
        for layer, (arguments, keywords, truth) in zip(changed.model.layers, kept, strict=True)
    ]
    return torch.stack(errors).mean().double()


def by_sensitivity(model, batch):
    """Bits by the error of each layer's outputs, as many bytes as 3 bits everywhere would take."""
    sizes = quantization.layer_bytes(model, (2, 3, 4))
    costs = quantization.output_sensitivity(model, [batch], (2, 3, 4))
    budget = sum(size[3] for size in sizes.values())
    return quantization.mixed_precision(model, quantization.allocate(costs, sizes, budget))


def by_spectrum(model, batch):
    """Ranks by what each layer's outputs would lose."""
    whole = low_rank.decompose_svd_llm(model, [batch])
    ranks = low_rank.allocate_by_spectrum(whole, 0.6).ranks
    return low_rank.truncate(model, whole, rank=ranks)


def lottery_ticket(model, batch):
    """The ticket after one round."""
    steps = methods.STEPS
    return pruning.lottery(model, lambda _: batch, steps, rounds=1, loss=methods.loss)[-1].model


def imitated(model, batch):
    """LLM-QAT: trained to imitate the model that it was."""
    prepared = quantization.prepare_qat(model, 8)
    ids = batch["input_ids"]  # it reads token ids alone
    train(prepared, lambda _: ids, methods.STEPS, loss=quantization.imitation_loss(model))
    return quantization.convert(prepared)


def noisy(model, batch):
    """Quant-Noise, trained and converted."""
    prepared = sdq.prepare_quant_noise(model, 8)
    train(prepared, lambda _: batch, methods.STEPS, loss=methods.loss)
    return sdq.convert_noise(prepared)


OTHERS = {
    "sensitivity": by_sensitivity,
    "spectrum": by_spectrum,
    "lottery ticket": lottery_ticket,
    "LLM-QAT": imitated,
    "Quant-Noise": noisy,
    "iPQ": lambda m, b: (
        sdq.iterative_product_quantization(
            m, lambda _: b, methods.STEPS, loss=methods.loss, block_size=4, centroids=16
        ).model
    ),
    "LoSparse": lambda m, b: low_rank.losparse(
        m, lambda _: b, methods.STEPS, 0.6, loss=methods.loss
    )[0],
}
"""Methods of the workbook that are not in the table, because they join or train others."""


@pytest.mark.parametrize("name", OTHERS)
def test_methods_that_join_or_train_others_keep_the_sharing(name):
    shared, batch = built(), architectures.batch("Llama")
    places = shared_places(shared)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = OTHERS[name](shared, batch)
    changed = 0
    for first, others in places.items():
        for other in others:
            assert result.get_submodule(first) is result.get_submodule(other), other
        old, new = shared.get_submodule(first), result.get_submodule(first)
        changed += type(old) is not type(new) or not torch.equal(old.weight, new.weight)
    assert changed >= 4  # by the spectrum, some stay whole
    with torch.no_grad():
        before, after = shared(**batch).logits, result(**batch).logits
    moved = float((after - before).norm() / before.norm())
    assert 0 < moved < 2


STORED = {
    "model": (save_shared, lambda model, path: load_shared(path)),
    "quantized": (quantization.save_quantized, quantization.load_quantized),
    "factorized": (low_rank.save_factorized, low_rank.load_factorized),
}
"""How results are stored, by the kind of file that the table of methods names."""


@pytest.mark.parametrize(
    ("name", "loaded_into"),
    [
        (name, kind)
        for name, method in methods.METHODS.items()
        if method.file in STORED and name not in UNFIT and name not in REFUSED
        for kind in ("shared", "apart")
        if method.file != "model" or kind == "shared"  # a model's file builds its model itself
    ]
    + [("rotation", "shared")],
)
def test_what_was_compressed_is_saved_once_and_loaded_into_all_places(name, loaded_into, tmp_path):
    method, batch = methods.METHODS[name], architectures.batch("Llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = method.run(built(), batch)
    save, load = STORED[method.file]
    path = tmp_path if method.file == "model" else tmp_path / "file.safetensors"
    save(result, path)
    other = architectures.build("Llama", seed=3)
    again = load(share_layers(other) if loaded_into == "shared" else other, path)
    with torch.no_grad():
        torch.testing.assert_close(
            again(**batch).logits, result(**batch).logits, atol=1e-5, rtol=1e-5
        )
    layers = again.model.layers
    for part in ("mlp.up_proj", "self_attn.o_proj"):
        assert layers[0].get_submodule(part) is layers[1].get_submodule(part)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (again, result)]
    assert sizes[0] == sizes[1]


def test_scores_of_shared_layers_decide_together():
    """Heads of low sums go, from every layer the same."""
    shared = built()
    shape = pruning.anatomy(shared)
    scores = {
        "heads": torch.arange(shape.layers * shape.heads).view(shape.layers, -1).double(),
        "neurons": torch.rand(shape.layers, shape.neurons, generator=torch.Generator()),
    }
    scores["heads"][0] = scores["heads"][0].flip(0) * 100
    found = pruning.prune_structures(shared, scores, {"heads": 0.5, "neurons": 0.25})
    assert len(set(found.kept.heads)) == len(set(found.kept.neurons)) == 1
    order = scores["neurons"].sum(0).argsort(descending=True)
    assert found.kept.neurons[0] == tuple(sorted(order[: len(found.kept.neurons[0])].tolist()))
    plain = pruning.prune_structures(
        architectures.build("Llama"), scores, {"heads": 0.5, "neurons": 0.25}
    )
    assert len(set(plain.kept.heads)) == 2
    layers = found.model.model.layers
    assert layers[0].mlp.up_proj is layers[1].mlp.up_proj
    masked = pruning.mask_structures(shared, scores, {"heads": 0.5, "neurons": 0.25}).model
    with torch.no_grad():
        ids = architectures.ids()
        torch.testing.assert_close(
            found.model(ids).logits, masked(ids).logits, atol=1e-4, rtol=1e-4
        )


def test_a_delta_on_a_shared_layer_acts_in_all_places_and_goes_again():
    shared, ids = built(), architectures.ids()
    tuned = methods.tuned(shared)
    count = sum(p.numel() for p in delta_parameters(tuned, "default").values())
    plain = methods.tuned(architectures.build("Llama"))
    other = sum(p.numel() for p in delta_parameters(plain, "default").values())
    assert count * shared.config.num_hidden_layers == other
    with torch.no_grad():
        assert not torch.allclose(tuned(ids).logits, shared(ids).logits, atol=1e-3)
        off = detach(tuned, "default")
        torch.testing.assert_close(off(ids).logits, shared(ids).logits, atol=0, rtol=0)


def test_the_parts_of_blocks_that_share_have_one_name():
    plain = find_sublayers(architectures.build("Llama"))
    first, second = find_sublayers(built())
    assert first == plain[0]
    assert second.block == plain[1].block
    assert second.values == first.values and second.feedforward_out == first.feedforward_out


def test_factorized_embeddings_go_with_compression():
    model = architectures.build("Llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    model = factorize_embedding(model, 8)
    ids = architectures.ids()
    for run in (
        lambda m: quantization.rtn(m, 8),
        lambda m: pruning.magnitude(m, 0.5),
        lambda m: lora.attach(m, rank=2),
    ):
        new = run(model)
        assert new.lm_head.embedding is new.model.embed_tokens
        with torch.no_grad():
            assert torch.isfinite(new(ids).logits).all()


def test_what_comes_out_trains_in_all_places_at_once():
    pruned = clone(pruning.magnitude(built(), 0.5))
    ids = architectures.ids()
    pruned(input_ids=ids, labels=ids).loss.backward()
    first, last = (pruned.model.layers[i].mlp.up_proj for i in (0, 1))
    assert first is last and first.weight.grad.abs().sum() > 0
