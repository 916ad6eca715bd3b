"""Structured pruning: what goes together, what stays, and the smaller model that is left."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effnb.core.modules import share
from effnb.evaluation.cost import flops
from effnb.finetuning import lora
from effnb.inference.pruning import (
    Slice,
    anatomy,
    choose,
    coupled,
    keep_all,
    mask_structures,
    prune_structures,
    random_scores,
    shrink,
    structures_of,
    wanda,
    zero,
)
from effnb.inference.pruning.shrink import removed_structures
from effnb.inference.pruning.structures import masks_from
from effnb.inference.quantization import gptq, rtn


def outputs(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def size(model):
    return sum(p.numel() for p in model.parameters())


def close(a, b):
    """Equal but for rounding: outputs here are of the order of 10."""
    return torch.allclose(a, b, rtol=1e-5, atol=2e-5)


def qwen(**changes):
    """A small Qwen2: Llama's blocks with biases on q, k and v."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, pad_token_id=0, **changes,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


# --- what goes together ---------------------------------------------------------------------------


def test_the_anatomy_of_a_llama(tiny_llama):
    shape = anatomy(tiny_llama(tie_word_embeddings=False))
    found = (shape.layers, shape.heads, shape.kv_heads, shape.head_dim)
    assert found == (3, 4, 2, 8)
    assert (shape.neurons, shape.channels, shape.tied) == (48, 32, False)
    assert shape.name(1, "mlp.up_proj") == "model.layers.1.mlp.up_proj"
    assert anatomy(tiny_llama()).tied
    inner = anatomy(tiny_llama().model)  # without a head
    assert (inner.blocks, inner.head, inner.layers) == ("layers", None, 3)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["neurons", "groups", "heads"])
def test_groups_are_those_that_gradients_show(tiny_llama, ids, kind, kv_heads):
    """From its columns of the last matrix alone, the whole of every structure is found."""
    model = tiny_llama(
        num_key_value_heads=kv_heads, num_hidden_layers=2, attention_bias=True, mlp_bias=True
    )
    structure = [s for s in structures_of(model, kind) if s.layer == 1][-1]
    expected = masks_from(model, structure.slices)
    if kind == "groups" and kv_heads == 1:  # all of attention: the norm before it dies as well
        expected["model.layers.1.input_layernorm.weight"] = torch.ones(32, dtype=torch.bool)
    found = coupled(model, [s for s in structure.slices if s.dim == 1], ids)
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("k_proj.bias"):
            continue  # gradients of a key's bias are 0 but for rounding: softmax sees no shift
        assert torch.equal(found[name], expected[name]), name


def test_a_neuron_is_found_from_any_of_its_three_parts(llama, ids):
    structure = structures_of(llama, "neurons")[50]
    expected = masks_from(llama, structure.slices)
    for seed in structure.slices:
        found = coupled(llama, [seed], ids)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)


def test_one_query_head_of_a_group_leaves_keys_and_values_alive(llama, ids):
    name = "model.layers.0.self_attn.o_proj.weight"
    alone = coupled(llama, [Slice(name, 1, tuple(range(8)))], ids)
    assert sorted(alone) == [name, "model.layers.0.self_attn.q_proj.weight"]
    both = coupled(llama, [Slice(name, 1, tuple(range(16)))], ids)
    assert "model.layers.0.self_attn.v_proj.weight" in both


def test_a_channel_dies_where_nothing_writes_it(llama, ids):
    structure = structures_of(llama, "channels")[5]
    names = ("o_proj.weight", "down_proj.weight")
    writers = [s for s in structure.slices if s.parameter.endswith(names)]
    writers.append(Slice("model.embed_tokens.weight", 1, (5,)))
    expected = masks_from(llama, structure.slices)
    found = coupled(llama, writers, ids)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_the_structures_of_a_kind_are_disjoint_and_cover_their_matrices(tiny_llama):
    model = tiny_llama(attention_bias=True)
    covered = {"neurons": "mlp.", "groups": "self_attn.", "layers": "layers."}
    for kind, part in covered.items():
        found = structures_of(model, kind)
        shapes = {n: p.numel() for n, p in model.named_parameters() if part in n}
        if kind == "groups":  # the bias of the output projection belongs to no head
            shapes = {n: s for n, s in shapes.items() if "o_proj.bias" not in n}
        assert sum(s.parameters(model) for s in found) == sum(shapes.values())
        marked = masks_from(model, [part for s in found for part in s.slices])
        assert marked.keys() == shapes.keys()
        assert all(bool(mask.all()) for mask in marked.values())
    with pytest.raises(FrozenInstanceError):
        found[0].index = 3


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_sizes_in_closed_form(tiny_llama, heads, kv_heads):
    """Of a neuron 3 d; of a group (2 g + 2) h d, with g query heads of size h; of a head 2 h d."""
    model = tiny_llama(num_attention_heads=heads, num_key_value_heads=kv_heads)
    d, h, g = 32, 8, heads // kv_heads
    assert structures_of(model, "neurons")[0].parameters(model) == 3 * d
    assert structures_of(model, "groups")[0].parameters(model) == (2 * g + 2) * h * d
    assert structures_of(model, "heads")[0].parameters(model) == (4 if g == 1 else 2) * h * d
    channel = structures_of(model, "channels")[0]
    inside = 2 * heads * h + 2 * kv_heads * h + 3 * 48 + 2
    assert channel.parameters(model) == 128 + 1 + 3 * inside
    scores = random_scores(model)
    for k in (1, 7, 30):
        small = prune_structures(model, scores, {"neurons": k})
        assert small.parameters_before - small.parameters_after == 3 * k * 3 * d
        assert size(small.model) == small.parameters_after
        assert small.removed == pytest.approx(1 - size(small.model) / size(model))


# --- the smaller model ----------------------------------------------------------------------------

REMOVALS = [
    ({"neurons": 0.3}, "groups"),
    ({"heads": 0.5}, "groups"),
    ({"heads": 0.5}, "heads"),
    ({"channels": 7}, "groups"),
    ({"layers": 1}, "groups"),
    ({"heads": 1, "neurons": 5, "channels": 4, "layers": 1}, "heads"),
]


@pytest.mark.parametrize(("remove", "unit"), REMOVALS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_smaller_model_computes_what_the_masked_one_does(tiny_llama, ids, remove, unit, tied):
    model = tiny_llama(tie_word_embeddings=tied)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = model.config.to_dict()
    scores = random_scores(model, 3)
    small = prune_structures(model, scores, remove, unit=unit)
    masked = mask_structures(model, scores, remove, unit=unit)
    assert close(outputs(small.model, ids), outputs(masked.model, ids))
    assert not close(outputs(small.model, ids), outputs(model, ids))
    assert small.kept == masked.kept
    assert small.parameters_after == masked.parameters_after == size(small.model) < size(model)
    assert size(masked.model) == size(model)
    # The original is untouched, and so is its configuration.
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize(("remove", "unit"), REMOVALS)
def test_it_saves_loads_and_generates_as_a_plain_model(llama, ids, remove, unit, tmp_path):
    from transformers import AutoModelForCausalLM

    small = prune_structures(llama, random_scores(llama), remove, unit=unit).model
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(small)
    assert torch.equal(outputs(small, ids), outputs(loaded, ids))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert small.lm_head.weight is small.model.embed_tokens.weight
    settings = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids[:, :6]))
    cached = small.generate(ids[:, :6], use_cache=True, **settings)
    assert torch.equal(cached, small.generate(ids[:, :6], use_cache=False, **settings))
    assert torch.equal(cached, loaded.generate(ids[:, :6], use_cache=True, **settings))


def test_the_configuration_says_everything(llama):
    scores = random_scores(llama)
    small = prune_structures(
        llama, scores, {"heads": 1, "neurons": 8, "channels": 4, "layers": 1}
    ).model
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 8)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (28, 40, 2)
    assert [block.self_attn.layer_idx for block in small.model.layers] == [0, 1]
    assert small.model.layers[0].self_attn.num_key_value_groups == 2
    assert config.model_type == "llama"  # 28 is a multiple of 2: Llama's own class holds it


def test_fewer_operations_in_closed_form(llama, ids):
    """Two for each weight that is gone and each token; the masked model saves none."""
    scores = random_scores(llama)
    counts = {
        name: flops(lambda model=model: outputs(model, ids))
        for name, model in (
            ("dense", llama),
            ("masked", mask_structures(llama, scores, {"neurons": 12}).model),
            ("small", prune_structures(llama, scores, {"neurons": 12}).model),
        )
    }
    assert counts["masked"] == counts["dense"]
    assert counts["dense"] - counts["small"] == 2 * ids.numel() * 3 * (12 * 3 * 32)


def test_a_number_of_heads_that_llama_refuses_makes_a_mistral(tiny_llama, ids):
    """32 channels are no multiple of 3 heads."""
    model = tiny_llama(num_key_value_heads=4)
    small = prune_structures(model, random_scores(model), {"heads": 1})
    assert type(small.model).__name__ == "MistralForCausalLM"
    assert small.model.config.sliding_window is None
    masked = mask_structures(model, random_scores(model), {"heads": 1})
    assert close(outputs(small.model, ids), outputs(masked.model, ids))
    again = prune_structures(small.model, random_scores(small.model), {"heads": 1, "neurons": 3})
    assert again.model.config.num_attention_heads == 2
    biased = tiny_llama(num_key_value_heads=4, attention_bias=True)
    with pytest.raises(ValueError, match="multiple of the number of heads"):
        prune_structures(biased, random_scores(biased), {"heads": 1})


def test_relatives_of_llama(ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = qwen()
    remove = {"heads": 0.5, "neurons": 0.25, "channels": 3, "layers": 1}
    small = prune_structures(model, random_scores(model), remove)
    masked = mask_structures(model, random_scores(model), remove)
    assert close(outputs(small.model, ids), outputs(masked.model, ids))
    small.model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(small.model, ids), outputs(loaded, ids))
    assert len(loaded.config.layer_types) == 2


def test_what_loses_nothing_is_shared(llama):
    small = prune_structures(llama, random_scores(llama), {"neurons": 4}).model
    assert small.model.layers[1].self_attn.q_proj.weight is (
        llama.model.layers[1].self_attn.q_proj.weight
    )
    assert small.model.embed_tokens.weight is llama.model.embed_tokens.weight
    whole = shrink(llama, keep_all(llama))
    assert all(a is b for a, b in zip(whole.parameters(), llama.parameters()))


def test_norms_divide_as_before_only_if_rescaled(llama, ids):
    kept = choose(llama, random_scores(llama), {"channels": 8})
    masked = zero(llama, removed_structures(llama, kept))
    assert close(outputs(shrink(llama, kept), ids), outputs(masked, ids))
    assert shrink(llama, kept).config.rms_norm_eps == pytest.approx(1e-6 * 32 / 24)
    plain = shrink(llama, kept, rescale_norms=False)
    assert plain.config.rms_norm_eps == llama.config.rms_norm_eps
    assert not close(outputs(plain, ids), outputs(masked, ids))


@settings(max_examples=20)
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 3), (6, 2), (2, 1)]),
    neurons=st.integers(2, 20),
    ratios=st.tuples(st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0, 0.6), st.floats(0, 0.6)),
    unit=st.sampled_from(["groups", "heads"]),
    seed=st.integers(0, 5),
)
def test_any_shape_and_ratio(heads, neurons, ratios, unit, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=24,
            intermediate_size=neurons,
            num_hidden_layers=3,
            num_attention_heads=heads[0],
            num_key_value_heads=heads[1],
            head_dim=4,
            max_position_embeddings=16,
            tie_word_embeddings=bool(seed % 2),
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(0, 40, (2, 8))
    available = {
        "heads": heads[1] if unit == "groups" else heads[0] // heads[1],
        "neurons": neurons, "channels": 24, "layers": 3,
    }  # fmt: skip
    remove = {
        kind: ratio
        for (kind, count), ratio in zip(available.items(), ratios)
        if int(ratio * count + 0.5) < count
    }
    scores = random_scores(model, seed)
    small = prune_structures(model, scores, remove, unit=unit)
    masked = mask_structures(model, scores, remove, unit=unit)
    assert close(outputs(small.model, ids), outputs(masked.model, ids))
    assert size(small.model) == small.parameters_after == masked.parameters_after
    for kind, ratio in remove.items():
        left = available[kind] - int(ratio * available[kind] + 0.5)
        config = small.model.config
        found = {
            "heads": config.num_key_value_heads
            if unit == "groups"
            else config.num_attention_heads // config.num_key_value_heads,
            "neurons": config.intermediate_size,
            "channels": config.hidden_size,
            "layers": config.num_hidden_layers,
        }[kind]
        assert found == left


# --- choosing -------------------------------------------------------------------------------------


def test_the_highest_scores_stay(llama):
    scores = {
        "neurons": torch.arange(48.0).repeat(3, 1),
        "heads": torch.tensor([[4.0, 0, 1, 2]] * 3),
    }
    kept = choose(llama, scores, {"neurons": 0.25, "heads": 1})
    assert kept.neurons == (tuple(range(12, 48)),) * 3
    assert kept.heads == ((0, 1),) * 3  # 4 + 0 is more than 1 + 2
    assert choose(llama, scores, {"heads": 0.5}, unit="heads").heads == ((0, 3),) * 3
    of_groups = {"heads": torch.tensor([[0.0, 1.0]] * 3)}
    assert choose(llama, of_groups, {"heads": 1}).heads == ((2, 3),) * 3
    tie = {"neurons": torch.ones(3, 48)}
    assert choose(llama, tie, {"neurons": 8}).neurons[0] == tuple(range(40))


def test_unequal_counts_can_be_masked_but_not_cut(llama, ids):
    scores = random_scores(llama)
    scores["neurons"][0] += 1
    masked = mask_structures(llama, scores, {"neurons": 0.4}, scope="global")
    counts = [len(row) for row in masked.kept.neurons]
    assert counts[0] == 48
    assert sum(counts) == 144 - int(0.4 * 144 + 0.5)
    assert masked.parameters_after == size(llama) - 3 * 32 * (144 - sum(counts))
    with pytest.raises(ValueError, match="class of one's own or padding"):
        shrink(llama, masked.kept)
    guarded = mask_structures(
        llama, scores, {"neurons": 0.5, "heads": 0.5}, unit="heads", protect=[0, 2]
    )
    assert [len(row) for row in guarded.kept.neurons] == [48, 24, 48]
    assert [len(row) for row in guarded.kept.heads] == [4, 2, 4]
    assert torch.isfinite(outputs(guarded.model, ids)).all()
    with pytest.raises(ValueError, match="mask_structures"):
        shrink(llama, guarded.kept)
    uneven = replace(keep_all(llama), heads=((0, 1, 2),) * 3)  # two of one group, one of the other
    with pytest.raises(ValueError, match="1 to 2 query heads"):
        shrink(llama, uneven)


def test_a_global_choice_empties_no_layer(llama):
    scores = {"neurons": torch.rand(3, 48)}
    scores["neurons"][1] -= 5
    kept = choose(llama, scores, {"neurons": 140}, scope="global")
    assert [len(row) for row in kept.neurons][1] == 1
    with pytest.raises(ValueError, match="empty a layer"):
        choose(llama, scores, {"neurons": 142}, scope="global")


# --- with other methods ---------------------------------------------------------------------------


def test_a_pruned_model_can_be_quantized_and_pruned_on(llama, ids):
    small = prune_structures(llama, random_scores(llama), {"neurons": 0.5, "heads": 0.5}).model
    dense = outputs(small, ids)
    for packed in (rtn(small, 8, group_size=8), gptq(small, ids, 8, group_size=8)):
        assert (outputs(packed, ids) - dense).norm() < 0.05 * dense.norm()
    sparse = wanda(small, ids, 0.5)
    assert float((sparse.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5
    fewer = prune_structures(sparse, random_scores(sparse), {"layers": 1}).model
    assert torch.isfinite(outputs(fewer, ids)).all()


def test_a_result_from_inference_mode_can_be_trained(llama, ids):
    with torch.inference_mode():
        small = prune_structures(llama, random_scores(llama), {"neurons": 9, "channels": 4}).model
        masked = mask_structures(llama, random_scores(llama), {"neurons": 9}).model
    for model in (small, masked):
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


# --- bad input ------------------------------------------------------------------------------------


def test_what_is_refused(llama, ids):
    scores = random_scores(llama)
    with pytest.raises(ValueError, match="quantized already"):
        prune_structures(rtn(llama, 4), scores, {"neurons": 1})
    with pytest.raises(ValueError, match="quantized already"):
        coupled(rtn(llama, 4), [Slice("model.norm.weight", 0, (0,))], ids)
    with pytest.raises(ValueError, match="WithDeltas"):
        structures_of(lora.attach(llama, rank=2), "heads")
    with pytest.raises(ValueError, match="of type Linear"):
        anatomy(torch.nn.Linear(3, 3))
    from transformers import GPT2Config, GPT2LMHeadModel

    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="of type gpt2"):
        random_scores(other)
    unequal = share(llama)
    unequal.model.layers[0].mlp = share(unequal.model.layers[0].mlp)
    unequal.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 40, bias=False)
    with pytest.raises(ValueError, match="differ in size"):
        anatomy(unequal)
    with pytest.raises(ValueError, match="choose one of heads"):
        structures_of(llama, "experts")
    with pytest.raises(ValueError, match="seed is empty"):
        coupled(llama, [], ids)


@pytest.mark.parametrize(
    ("remove", "options", "sentence"),
    [
        ({"neurons": 1.0}, {}, "in \\[0, 1\\)"),
        ({"neurons": -0.1}, {}, "in \\[0, 1\\)"),
        ({"neurons": 48}, {}, "48 of 48"),
        ({"heads": 0.9}, {}, "2 of 2"),
        ({"experts": 1}, {}, "choose one of"),
        ({"groups": 1}, {}, "choose one of heads, neurons"),
        ({"neurons": 1}, {"unit": "rows"}, "unit is"),
        ({"neurons": 1}, {"scope": "row"}, "scope is"),
        ({"neurons": 1}, {"protect": [3]}, "cannot be protected"),
    ],
)
def test_bad_choices(llama, remove, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        choose(llama, random_scores(llama), remove, **options)


def test_bad_scores(llama):
    with pytest.raises(ValueError, match="no scores for layers"):
        choose(llama, {}, {"layers": 1})
    with pytest.raises(ValueError, match=r"shape \(2, 48\)"):
        choose(llama, {"neurons": torch.ones(2, 48)}, {"neurons": 1})
    with pytest.raises(ValueError, match="not all finite"):
        choose(llama, {"layers": torch.tensor([1, float("nan"), 1])}, {"layers": 1})
    with pytest.raises(ValueError, match="each of the 4 query heads"):
        choose(llama, {"heads": torch.ones(3, 2)}, {"heads": 1}, unit="heads")
    with pytest.raises(TypeError, match="give a number"):
        choose(llama, {"layers": torch.ones(3)}, {"layers": True})
    whole = keep_all(llama)
    with pytest.raises(ValueError, match="no layers would be left"):
        shrink(llama, replace(whole, layers=()))
    with pytest.raises(ValueError, match="ascending numbers below 32"):
        shrink(llama, replace(whole, channels=(3, 2)))
    with pytest.raises(ValueError, match="neurons of layer 1 must be ascending"):
        shrink(llama, replace(whole, neurons=((0, 1), (0, 48), (0, 1))))
    with pytest.raises(ValueError, match="given for 1 of 3 layers"):
        shrink(llama, replace(whole, heads=((0,),)))
