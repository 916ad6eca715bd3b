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
from effnb.design.sharing import factorize_embedding, share_layers, shared_places, unshare_layers
from effnb.finetuning import lora
from effnb.inference import pruning, quantization

REFUSED = {
    "AWQ": "is used in several blocks; AWQ scales each layer for what one block reads",
    "rotation": "is used in several blocks, and rotation folds the norm of each block",
    "QuaRot": "is used in several blocks, and rotation folds the norm of each block",
    "BitFit": "has no biases",
    "last layers": "is used by several blocks, so that training the last ones would change",
}
"""What methods say that cannot do it; to BitFit it does not matter whether anything is shared."""
EXACT = ("magnitude", "RTN", "NF4", "ternary", "mixed precision", "SVD")
"""Methods that look at a weight alone: sharing first or compressing first is the same."""
FUNCTION = ("SmoothQuant",)
"""Methods that must not change the function."""


def built():
    return share_layers(architectures.build("Llama"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_shared_weight_is_replaced_in_all_its_places(name):
    method, batch = methods.METHODS[name], architectures.batch("Llama")
    shared = built()
    places = shared_places(shared)
    before = {key: value.clone() for key, value in shared.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in REFUSED:
            with pytest.raises(ValueError, match=REFUSED[name]):
                method.run(shared, batch)
            return
        result = method.run(shared, batch)
    assert shared_places(shared) == places
    assert all(torch.equal(before[key], value) for key, value in shared.state_dict().items())
    compared = 0
    kept = {module for module, _ in result.named_modules(remove_duplicate=False)}
    for first, others in places.items():
        for other in others:
            if {first, other} <= kept:
                assert result.get_submodule(first) is result.get_submodule(other), other
                compared += 1
    assert compared >= 9 or name == "ShortGPT"  # which takes whole layers
    with torch.no_grad():
        found = result(**batch).logits
        assert torch.isfinite(found).all()
        if name in EXACT:
            alone = method.run(unshare_layers(built()), batch)
            torch.testing.assert_close(found, alone(**batch).logits, atol=1e-5, rtol=1e-5)
        if name in FUNCTION:
            method.oracle(built(), result, batch)


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
