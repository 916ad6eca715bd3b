"""Self-distilled quantization: exact identities, and what is refused."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel

from effnb.core.training import TrainingSettings, train
from effnb.inference import quantization
from effnb.inference import self_distilled_quantization as own
from effnb.inference.self_distilled_quantization.product import stored_bytes
from effnb.lab.task_inputs import Classifier


def classifier(layers: int = 2, dropout: float = 0.0, seed: int = 0, heads: int = 4) -> Classifier:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=32, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = Classifier(BertModel(config, add_pooling_layer=False), 3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "embeddings" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def batch(rows: int = 3, time: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, time, dtype=torch.long)
    mask[-1, time // 2 :] = 0
    ids = torch.randint(4, 60, (rows, time), generator=draw).masked_fill(mask == 0, 0)
    labels = torch.randint(0, 3, (rows,), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("name", sorted(own.VARIANTS))
def test_a_student_that_is_its_teacher_loses_nothing_but_the_labels(name):
    """Specification: without noise and rounding, all parts against the teacher are exactly 0."""
    teacher = classifier()
    student = own.prepare_quant_noise(teacher, 32, noise=0.0)
    loss = own.variant(teacher, name, labels=0.0) if name != "labels" else None
    if loss is None:
        with pytest.raises(ValueError, match="all weights are 0"):
            own.variant(teacher, name, labels=0.0)
        return
    assert float(loss(student, batch()).detach()) == pytest.approx(0, abs=1e-12)


def test_bits_32_are_exact_under_any_noise():
    teacher = classifier()
    student = own.prepare_quant_noise(teacher, 32, noise=0.7).train()
    given_ = batch()
    given_.pop("labels")
    assert torch.equal(student(**given_), teacher(**given_))


def test_the_loss_is_the_sum_of_its_weighted_parts():
    teacher, student = classifier(), classifier(seed=3)
    one = batch()
    a, b = own.read(student, one), own.read(teacher, one)
    terms = own.sdq_terms(a, b, one["labels"], temperature=2.0)
    loss = own.sdq(
        teacher, alpha=0.3, beta=0.7, temperature=2.0, attention="mse", hidden=0.2, labels=0.9
    )
    wanted = (
        0.9 * terms["labels"]
        + 0.7 * terms["output"]
        + 0.3 * terms["attention"]
        + 0.2 * terms["hidden"]
    )
    assert float(loss(student, one).detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)


def test_sum_over_layers_and_heads_is_the_mean_times_layers_and_heads():
    teacher, student = classifier(3), classifier(3, seed=5)
    one = batch()
    a, b = own.read(student, one), own.read(teacher, one)
    for distance in ("mse", "kl"):
        mean = own.sdq_terms(a, b, attention=distance)["attention"]
        total = 0.0
        for ours, theirs in zip(a.attention, b.attention, strict=True):
            for head in range(4):
                if distance == "mse":
                    x = own.context_vectors(ours)[:, head] - own.context_vectors(theirs)[:, head]
                    total += float(x.square().mean(-1)[a.real].mean().detach())
                else:
                    p, q = (own.log_attention(layer)[:, head] for layer in (theirs, ours))
                    seen = p > -math.inf
                    parts = torch.where(seen, p.exp() * (p - q), 0.0)
                    rows = parts.masked_fill(~seen, 0).sum(-1)
                    total += float(rows[a.real].mean().detach())
        assert total == pytest.approx(float(mean.detach()) * 3 * 4, rel=1e-5)


def test_context_vectors_are_what_the_output_projection_reads():
    """Reference: the input of attention's output projection in the model itself."""
    model, one = classifier(), batch()
    seen = []
    for block in model.encoder.encoder.layer:
        block.attention.output.dense.register_forward_pre_hook(
            lambda _, given_: seen.append(given_[0].detach())
        )
    reading = own.read(model, one)
    for layer, wanted in zip(reading.attention, seen[-2:], strict=True):
        joined = own.context_vectors(layer).transpose(1, 2).flatten(2)
        assert torch.allclose(joined[reading.real], wanted[reading.real], atol=1e-6)


def test_attention_equals_what_the_library_hands_out():
    """Reference: transformers' own attention probabilities, with eager attention."""
    model, one = classifier(), batch()
    reading = own.read(model, one)
    model.encoder.set_attn_implementation("eager")
    output = model.encoder(
        input_ids=one["input_ids"], attention_mask=one["attention_mask"], output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    for layer, wanted in zip(reading.attention, output.attentions, strict=True):
        assert torch.allclose(own.log_attention(layer).exp(), wanted, atol=1e-6)
    for hidden, wanted in zip(reading.hidden, output.hidden_states[1:], strict=True):
        assert torch.allclose(hidden, wanted, atol=1e-6)


def test_output_part_is_torchs_divergence():
    """Reference: `torch.nn.functional.kl_div`, with the factor of the temperature."""
    teacher, student, one = classifier(), classifier(seed=3), batch()
    with torch.no_grad():
        teacher.classifier.weight.normal_()
        student.classifier.weight.normal_()
    a, b = own.read(student, one), own.read(teacher, one)
    found = own.sdq_terms(a, b, temperature=3.0)["output"]
    wanted = 9 * nn.functional.kl_div(
        (a.logits / 3).log_softmax(-1), (b.logits / 3).softmax(-1), reduction="batchmean"
    )
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(found.detach()) > 1e-4


def test_padding_changes_nothing():
    teacher, student = classifier(), classifier(seed=3)
    short = {key: tensor[:2] for key, tensor in batch().items()}
    long = {
        key: nn.functional.pad(tensor, (0, 4)) if tensor.ndim == 2 else tensor
        for key, tensor in short.items()
    }
    for name in own.VARIANTS:
        loss = own.variant(teacher, name)
        values = [float(loss(student, one).detach()) for one in (short, long)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_no_gradient_reaches_the_teacher_and_neither_model_changes():
    teacher = classifier()
    student = own.prepare_quant_noise(teacher, 4, noise=1.0).train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    own.sdq(teacher, attention="mse", hidden=1.0)(student, batch()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    trained = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("query" in name for name in trained)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_teacher_of_labels_alone_does_not_run():
    teacher = classifier()

    def refuse(*_, **__):
        raise AssertionError("the teacher ran")

    loss = own.sdq(teacher, beta=0.0)
    teacher.forward = refuse
    assert float(loss(classifier(seed=3), batch()).detach()) > 0


def test_training_on_attention_brings_attention_closer():
    teacher = classifier()
    student = own.prepare_quant_noise(teacher, 3, noise=1.0)
    one = batch(8)

    def distance(model):
        with torch.no_grad():
            pair = (own.read(m.eval(), one) for m in (model, teacher))
            return float(own.sdq_terms(*pair)["attention"])

    before = distance(student)
    train(
        student, lambda step: one, TrainingSettings(40, 2e-3),
        loss=own.sdq(teacher, attention="mse", labels=0.0, beta=0.0),
    )  # fmt: skip
    assert distance(student) < 0.6 * before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"attention": "cosine"}, "attention is 'cosine'"),
        ({"alpha": -1.0, "attention": "mse"}, "the weight of attention is -1.0"),
        ({"beta": math.nan}, "the weight of output is nan"),
        ({"labels": 0.0, "beta": 0.0}, "all weights are 0"),
    ],
)
def test_settings_that_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        own.sdq(classifier(), **settings)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="training mode"):
        own.sdq(classifier().train())
    loss = own.sdq(classifier(), attention="mse")
    with pytest.raises(ValueError, match="3 attention layers and the teacher 2"):
        loss(classifier(3), batch())
    with pytest.raises(ValueError, match="2 heads and the teacher's 4"):
        loss(classifier(heads=2), batch())
    with pytest.raises(ValueError, match="no labels"):
        loss(classifier(), {k: v for k, v in batch().items() if k != "labels"})
    with pytest.raises(ValueError, match="no variant 'all'"):
        own.variant(classifier(), "all")
    late = classifier()
    loss = own.sdq(late)
    late.train()
    with pytest.raises(ValueError, match="training mode"):
        loss(classifier(), batch())


def test_dropout_in_the_teacher_would_cost_something():
    """The pitfall: identical weights, and yet a loss, when the teacher is in training mode."""
    noisy = classifier(dropout=0.3)
    with torch.no_grad():
        noisy.classifier.weight.normal_()
    student = own.read(noisy, batch())
    noisy.train()
    assert float(own.sdq_terms(student, own.read(noisy, batch()))["output"].detach()) > 1e-5


# ------------------------------------------------------------------------------ Quant-Noise


def test_noise_of_one_is_quantization_aware_training():
    """Reference: the package's own STE training, loss and gradients."""
    model, one = classifier(), batch()
    noisy = own.prepare_quant_noise(model, 4, noise=1.0).train()
    plain = quantization.prepare_qat(model, 4, symmetric=True).train()
    found = []
    for trained in (noisy, plain):
        loss = nn.functional.cross_entropy(
            trained(one["input_ids"], one["attention_mask"]), one["labels"]
        )
        loss.backward()
        query = trained.encoder.encoder.layer[0].attention.self.query
        head = trained.classifier
        found.append((loss.detach(), query.weight.grad, head.weight.grad))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_no_noise_is_ordinary_training_but_evaluation_rounds():
    model, one = classifier(), batch()
    noisy = own.prepare_quant_noise(model, 3, noise=0.0)
    given_ = {k: v for k, v in one.items() if k != "labels"}
    assert torch.equal(noisy.train()(**given_), model(**given_))
    rounded = quantization.rtn(model, 3, symmetric=True)
    with torch.no_grad():
        model.classifier.weight.normal_()
        noisy.classifier.weight.copy_(model.classifier.weight)
        rounded.classifier.weight.copy_(model.classifier.weight)
    assert torch.allclose(noisy.eval()(**given_), rounded(**given_), atol=1e-5)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 20),
    block=st.integers(1, 9),
    noise=st.floats(0, 1),
)
def test_a_block_is_drawn_as_a_whole(rows, columns, block, noise):
    torch.manual_seed(0)
    mask = own.noise_mask(rows, columns, block, noise)
    assert mask.shape == (rows, columns)
    for start in range(0, columns, block):
        part = mask[:, start : start + block]
        assert torch.equal(part.all(1), part.any(1))
    if noise in (0.0, 1.0):
        assert bool(mask.all()) == (noise == 1.0)


def test_the_drawn_part_is_the_probability():
    torch.manual_seed(0)
    share = own.noise_mask(400, 400, 8, 0.3).float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.02)


def test_gradients_of_drawn_and_other_blocks():
    """Integer and codeword noise pass the gradient straight through; the proxy's is 0."""
    layer = nn.Linear(16, 4)
    x = torch.randn(5, 16)
    for kind in ("integer", "product", "proxy"):
        noisy = own.prepare_quant_noise(
            nn.Sequential(layer), 8, noise=0.5, block_size=4, kind=kind, centroids=4
        )[0].train()
        torch.manual_seed(3)
        noisy(x).sum().backward()
        torch.manual_seed(3)
        mask = own.noise_mask(4, 16, 4, 0.5)
        wanted = x.sum(0).expand(4, 16)
        assert torch.allclose(noisy.weight.grad[~mask], wanted[~mask], atol=1e-6)
        drawn = torch.zeros_like(wanted) if kind == "proxy" else wanted
        assert torch.allclose(noisy.weight.grad[mask], drawn[mask], atol=1e-6)


def test_converted_models_compute_what_evaluation_computes():
    one = {k: v for k, v in batch().items() if k != "labels"}
    for kind, settings in (
        ("integer", {"bits": 4}),
        ("integer", {"bits": 32}),
        ("product", {"block_size": 4, "centroids": 8}),
        ("proxy", {}),
    ):
        noisy = own.prepare_quant_noise(classifier(), kind=kind, **settings).eval()
        stored = own.convert_noise(noisy).eval()
        for a, b in zip(own.read(noisy, one).hidden, own.read(stored, one).hidden, strict=True):
            assert torch.allclose(a, b, atol=2e-3)
        if kind != "proxy" and settings.get("bits") != 32:
            kinds = (quantization.QuantizedLinear, own.ProductLinear)
            assert any(isinstance(m, kinds) for m in stored.modules())


def test_what_noise_refuses():
    model = classifier()
    prepare = own.prepare_quant_noise
    for settings, sentence in (
        ({"bits": 1}, "bits"),
        ({"noise": 1.5}, "noise is 1.5"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"block_size": 0}, "block_size is 0"),
        ({"kind": "gauss"}, "kind is 'gauss'"),
        ({"layers": "nothing"}, "nothing"),
    ):
        with pytest.raises(ValueError, match=sentence):
            prepare(model, **settings)
    with pytest.raises(ValueError, match="prepared for training already"):
        prepare(prepare(model))
    with pytest.raises(ValueError, match="no NoisyLinear"):
        own.convert_noise(model)
    with pytest.raises(ValueError, match="one shape"):
        own.quant_noise(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 3) > 0)
    with torch.no_grad():
        model.encoder.encoder.layer[0].attention.self.query.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="query has 1 entries that are NaN"):
        prepare(model)


# ------------------------------------------------------------------------------ codewords


def test_codewords_of_few_distinct_blocks_are_exact():
    torch.manual_seed(0)
    words = torch.randn(3, 4)
    weight = words[torch.randint(0, 3, (10, 5))].flatten(1)
    found = own.product_quantize(weight, 4, 8, iterations=30)
    assert torch.allclose(found.dequantize(), weight, atol=1e-6)
    assert found.shape == (10, 20)


@given(seed=st.integers(0, 50), count=st.integers(1, 12), weighted=st.booleans())
def test_kmeans_never_gets_worse_and_serves_each_point_best(seed, count, weighted):
    draw = torch.Generator().manual_seed(seed)
    points = torch.randn(40, 3, generator=draw)
    h = torch.rand(40, 3, generator=draw) + 0.1 if weighted else None
    centres, nearest, objective = own.kmeans(points, count, importance=h, seed=seed)
    assert all(b <= a * (1 + 1e-4) + 1e-6 for a, b in pairwise(objective))
    h = torch.ones_like(points) if h is None else h
    distance = (h[:, None] * (points[:, None] - centres[None]).square()).sum(-1)
    chosen = distance.gather(1, nearest[:, None])[:, 0]
    assert torch.allclose(chosen, distance.min(1).values, atol=1e-4)


def test_kmeans_finds_clear_clusters():
    torch.manual_seed(0)
    means = torch.tensor([[10.0, 0.0], [-10.0, 5.0], [0.0, -20.0]])
    points = (means[:, None] + 0.1 * torch.randn(3, 30, 2)).flatten(0, 1)
    centres, _, objective = own.kmeans(points, 3, iterations=50, seed=4)
    wanted = points.view(3, 30, 2).mean(1)
    order = torch.cdist(wanted, centres).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert torch.allclose(centres[order], wanted, atol=1e-4)
    assert objective[-1] == pytest.approx(
        float((points.view(3, 30, 2) - wanted[:, None]).square().sum()), rel=1e-3
    )


def test_importance_keeps_the_columns_that_matter():
    torch.manual_seed(0)
    weight = torch.randn(64, 8)
    important = torch.tensor([100.0, 1, 1, 1] * 2)
    plain = own.product_quantize(weight, 4, 8)
    weighed = own.product_quantize(weight, 4, 8, importance=important)

    def error(found):
        return float((important * (found.dequantize() - weight).square()).sum())

    assert error(weighed) < 0.7 * error(plain)


def test_bytes_of_codewords():
    """256 codewords of 8 numbers: 1 byte for each block, and 4,096 for the codebook."""
    assert stored_bytes(1000, 256, 8) == 1000 + 4096
    assert stored_bytes(1000, 16, 4) == 500 + 128
    assert stored_bytes(10, 1, 4) == 2 + 8
    found = own.product_quantize(torch.randn(64, 64), 8, 16)
    assert found.bits_per_weight == pytest.approx(8 * (512 * 4 / 8 + 256) / 4096)


def test_a_codewords_gradient_is_the_mean_of_its_blocks():
    torch.manual_seed(0)
    layer = own.ProductLinear(own.product_quantize(torch.randn(6, 8), 4, 3))
    x = torch.randn(5, 8)
    layer(x).sum().backward()
    each = x.sum(0).view(2, 4).expand(6, 2, 4)
    for word in range(3):
        mine = each[layer.codes == word]
        wanted = mine.mean(0) if len(mine) else torch.zeros(4)
        assert torch.allclose(layer.codebook.grad[word], wanted, atol=1e-5)


def test_what_codewords_refuse():
    weight = torch.randn(4, 8)
    for settings, sentence in (
        ({"block_size": 3}, "must divide"),
        ({"block_size": 0}, "must divide"),
        ({"centroids": 0}, "centroids is 0"),
        ({"importance": torch.ones(7)}, "8 columns"),
        ({"importance": -torch.ones(8)}, "8 columns"),
        ({"iterations": 0}, "iterations is 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            own.product_quantize(weight, **settings) if "block_size" in settings else (
                own.product_quantize(weight, 4, **{"centroids": 2, **settings})
            )
    with pytest.raises(ValueError, match="fit"):
        own.kmeans(torch.randn(3, 2), 4)
    with pytest.raises(ValueError, match="NaN or infinite"):
        own.product_quantize(weight * math.nan, 4, 2)


# ------------------------------------------------------------------------------ iterative


def test_iterative_quantization_goes_block_by_block_and_training_helps():
    teacher, one = classifier(), batch(8)
    loss = own.sdq(teacher, attention="mse", labels=0.0, beta=0.0)
    run = partial(
        own.iterative_product_quantization, teacher, lambda step: one, loss=loss, block_size=4,
        centroids=6,
    )  # fmt: skip
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    plain, mended = run(None), run(TrainingSettings(15, 2e-3))
    assert plain.groups == mended.groups
    assert [len(group) for group in plain.groups] == [6, 6]
    assert all(".layer.0." in name for name in plain.groups[0])
    assert all(0 < e < 1 for e in plain.errors)
    assert mended.losses[-1][1] < plain.losses[-1][1]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    kinds = [m for m in mended.model.modules() if isinstance(m, own.ProductLinear)]
    assert len(kinds) == 12


def test_groups_may_be_given_and_are_checked():
    teacher, one = classifier(), batch()
    run = partial(
        own.iterative_product_quantization, teacher, lambda step: one, None,
        loss=own.sdq(teacher), block_size=4, centroids=4,
    )  # fmt: skip
    found = run(groups=[["*intermediate.dense"], ["*self.*"]])
    assert [len(group) for group in found.groups] == [2, 6]
    with pytest.raises(ValueError, match="group 2 fits no linear layer"):
        run(groups=[["*self.*"], ["*.nothing"]])
    with pytest.raises(ValueError, match="is in two groups"):
        run(groups=[["*self.*"], ["*query"]])


# ------------------------------------------------------------------------------ errors by module


def test_errors_of_a_model_against_itself_are_zero_and_of_one_layer_are_local():
    model, texts = classifier(3), [batch()]
    assert all(
        e.accumulated == (0, 0, 0) and e.alone == (0, 0, 0)
        for e in own.module_errors(model, model, texts)
    )
    second = quantization.rtn(model, 3, layers="*layer.1.attention.self.value")
    errors = own.module_errors(model, second, texts)
    first = [e for e in errors if e.layer == 0]
    assert all(max(e.accumulated) == 0 for e in first)
    by = {(e.role, e.layer): e for e in errors}
    assert by["query", 1].mean() == 0
    assert by["value", 1].mean() > 0
    assert by["self-attention", 1].mean() > 0
    assert by["block", 2].mean() > 0
    assert by["block", 2].mean("alone") == 0


def test_an_error_is_its_formula():
    model, one = classifier(), batch()
    small = quantization.rtn(model, 3)
    found = {(e.role, e.layer): e for e in own.module_errors(model, small, [one])}
    values = []
    for which in (model, small):
        seen = []
        hook = which.encoder.encoder.layer[1].attention.self.query.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output.detach())
        )
        which(one["input_ids"], one["attention_mask"])
        hook.remove()
        values.append(seen[0])
    real = one["attention_mask"][2] == 1
    exact, other = values[0][2][real], values[1][2][real]
    wanted = float((other - exact).norm() / exact.norm())
    assert found["query", 1].accumulated[2] == pytest.approx(wanted, rel=1e-5)


def test_roles_means_and_growth():
    model = classifier()
    errors = own.module_errors(model, quantization.rtn(model, 3), [batch()])
    roles = own.by_role(errors)
    assert set(roles) == {
        "query", "key", "value", "self-attention", "attention output", "feed-forward, first",
        "feed-forward, second", "norm after attention", "norm after feed-forward", "block",
    }  # fmt: skip
    blocks = [e for e in errors if e.role == "block"]
    assert roles["block"][0] == pytest.approx(
        (blocks[0].accumulated[0] + blocks[1].accumulated[0]) / 2
    )
    assert own.growth(errors)[0] == pytest.approx(
        blocks[1].accumulated[0] - blocks[0].accumulated[0]
    )
    assert own.relative_errors([torch.zeros(2)], [torch.zeros(2)]) == (0.0,)
    assert own.relative_errors([torch.ones(2)], [torch.zeros(2)]) == (math.inf,)


def test_what_errors_refuse():
    model = classifier()
    with pytest.raises(ValueError, match="no batches"):
        own.module_errors(model, model, [])
    with pytest.raises(ValueError, match="2 blocks and the quantized one 3"):
        own.module_errors(model, classifier(3), [batch()])
    with pytest.raises(ValueError, match="no module's name"):
        own.module_errors(model, model, [batch()], roles={"gate": ("*.gate",)})
    with pytest.raises(ValueError, match="growth needs two"):
        own.growth([], "block")


# ------------------------------------------------------------------------------ groups and cost


def test_spread_and_gap_on_numbers_that_fit_on_a_page():
    before = {"en": 0.9, "de": 0.8, "ja": 0.7}
    after = {"en": 0.88, "de": 0.8, "ja": 0.5}
    assert own.spread(before) == pytest.approx(0.2)
    assert own.spread(after) == pytest.approx(0.38)
    assert own.losses(before, after)["ja"] == pytest.approx(0.2)
    assert own.gap(before, after, ["en", "de"]) == pytest.approx(0.2 - 0.01)
    assert own.deviation({"a": 1.0, "b": 3.0}) == pytest.approx(1.0)


@given(st.dictionaries(st.text(min_size=1), st.floats(0, 1), min_size=1))
def test_spread_is_never_negative_and_bounds_the_deviation(quality):
    assert 0 <= own.deviation(quality) <= own.spread(quality) + 1e-12


def test_what_groups_refuse():
    with pytest.raises(ValueError, match="no group"):
        own.spread({})
    with pytest.raises(ValueError, match="quality of en is nan"):
        own.spread({"en": math.nan})
    with pytest.raises(ValueError, match="ja is on one side only"):
        own.losses({"en": 1.0}, {"en": 1.0, "ja": 1.0})
    with pytest.raises(ValueError, match="both sides need a group"):
        own.gap({"en": 1.0}, {"en": 1.0}, ["en"])


def test_a_teacher_costs_a_third_more():
    assert own.step_passes(teacher=True) / own.step_passes(teacher=False) == pytest.approx(4 / 3)
    assert own.step_passes(teacher=True, teacher_stored=True) == 3
    teacher, one = classifier(4), batch(4, 16)
    student = own.prepare_quant_noise(teacher, 4, noise=1.0)
    alone = own.step_flops(student, own.sdq(teacher, beta=0.0), one)
    taught = own.step_flops(student, own.sdq(teacher), one)
    assert taught / alone == pytest.approx(4 / 3, rel=0.05)
    assert all(p.grad is None for p in student.parameters())
    assert own.attention_bytes(12, 12, 128) == 2 * 12 * 12 * 128 * 128
