"""Gradients of padded, packed and differently cut batches are those of the plain texts, in float64.

The reference is transformers' own loss of each text alone, without padding, in float64.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf

from effnb.core.gradients import (
    each_gradient,
    fisher_diagonal,
    loss_batches,
    mean_gradients,
    sequences_of,
    weight_leaves,
)
from effnb.core.training import causal_lm_loss, next_token_loss, target_count, targets
from effnb.finetuning import lora
from effnb.inference.low_rank import fisher
from effnb.inference.pruning import head_importance, llm_pruner_scores, lora_importance, obd
from effnb.inference.quantization import hessian_traces, loss_sensitivity

SIZES = dict(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=0,
)
ROTARY = SIZES | {"num_key_value_heads": 2}
CAUSAL = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**ROTARY)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**ROTARY)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(  # every second layer sees four tokens only
        hf.Gemma2Config(**ROTARY, head_dim=8, sliding_window=4, attn_implementation="eager")
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**ROTARY)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    ),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**ROTARY, sliding_window=4)),
}


def make(kind: str):
    torch.manual_seed(0)
    model = CAUSAL[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
    return model


def texts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 128, (1, n), generator=generator) for n in lengths]


def padded(parts: list[torch.Tensor], side: str, positions: bool = True) -> dict:
    """One batch of texts of different lengths, as a tokenizer pads it."""
    size = max(part.shape[1] for part in parts)
    ids, mask = torch.zeros(2, len(parts), size, dtype=torch.long).unbind(0)
    for row, part in enumerate(parts):
        n = part.shape[1]
        where = slice(size - n, size) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = part[0], 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    return batch


def reference(model, parts, names, square=False) -> dict[str, torch.Tensor]:
    """The mean over tokens of the gradients, or the mean over texts of their squares."""
    twin = copy.deepcopy(model).double()
    total = dict.fromkeys(names, 0.0)
    count = 0
    for part in parts:
        twin.zero_grad()
        twin(input_ids=part, labels=part).loss.backward()
        weight = 1 if square else part.shape[1] - 1
        count += weight
        for name in names:
            g = twin.get_submodule(name).weight.grad
            total[name] = total[name] + weight * (g.square() if square else g)
    return {name: value / count for name, value in total.items()}


def error(found: dict, expected: dict) -> float:
    return max(float((found[n] - e).norm() / e.norm()) for n, e in expected.items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_padding_changes_no_gradient(kind, side):
    model, parts = make(kind), texts(12, 7, 9)
    batch = padded(parts, side, positions=kind != "bloom")  # ALiBi reads the mask alone
    found = mean_gradients(model, [batch])
    assert error(found, reference(model, parts, found)) < 2e-4
    squares = fisher_diagonal(model, [batch])
    assert error(squares, reference(model, parts, squares, square=True)) < 2e-4


def test_how_a_text_is_cut_into_batches_changes_nothing():
    """Eight sequences and two more: those two weighed as much as the eight before."""
    model, (ids,) = make("llama"), texts(120)
    ids = ids.view(10, 12)
    expected = reference(model, list(ids.split(1)), ["model.layers.1.mlp.up_proj"])
    cuts = [ids, [{"input_ids": ids}], [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}]]
    for given in cuts:
        found = mean_gradients(model, given, layers="*.1.mlp.up_proj")
        assert error(found, expected) < 1e-4
    squares = [fisher_diagonal(model, given, layers="*.1.mlp.up_proj") for given in cuts]
    low = [fisher(model, given, layers="*.1.mlp.up_proj") for given in cuts]
    expected = reference(model, list(ids.split(1)), expected, square=True)
    assert all(error(found, expected) < 1e-4 for found in squares + low)


def test_shared_positions_and_masks_of_four_dimensions_survive_the_cut():
    ids = torch.arange(12).view(3, 4)
    batch = {
        "input_ids": ids,
        "position_ids": torch.arange(4)[None],
        "attention_mask": torch.ones(3, 1, 4, 4, dtype=torch.bool).tril(),
        "use_cache": False,
    }
    found = sequences_of([batch])
    assert [s["input_ids"].tolist() for s in found] == [[row] for row in ids.tolist()]
    assert all(s["position_ids"].shape == (1, 4) and s["use_cache"] is False for s in found)
    assert all(s["attention_mask"].shape == (1, 1, 4, 4) for s in found)
    assert sequences_of(["anything", (ids, ids)]) == ["anything", (ids, ids)]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("mask", [None, "bool", "additive"])
def test_documents_packed_into_one_row_do_not_foresee_each_other(kind, mask):
    model, parts = make(kind), texts(7, 5, 8)
    lengths = torch.tensor([7, 5, 8])
    owner = torch.arange(3).repeat_interleave(lengths)
    batch = {
        "input_ids": torch.cat(parts, 1),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    if mask is not None:
        seen = (owner[:, None] == owner) & torch.ones(20, 20, dtype=torch.bool).tril()
        seen = seen[None, None]
        batch["attention_mask"] = (
            seen if mask == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -1e9)
        )
    assert target_count(batch) == 6 + 4 + 7
    found = mean_gradients(model, [batch])
    assert error(found, reference(model, parts, found)) < 2e-4


def test_what_counts_by_hand():
    ids = torch.arange(10, 16)[None]
    mask = torch.tensor([[0, 1, 1, 0, 1, 1]])  # padding in the middle, too
    found = targets({"input_ids": ids, "attention_mask": mask})
    assert found.tolist() == [[10, -100, 12, -100, -100, 15]]
    labels = torch.tensor([[-100, -100, -100, 13, 14, 15]])  # a prompt that is not learned
    assert target_count({"input_ids": ids, "labels": labels}) == 3
    assert target_count({"input_ids": ids, "labels": labels, "attention_mask": mask}) == 1
    with pytest.raises(ValueError, match=r"labels has shape \(1,\), the ids \(1, 6\)"):
        targets({"input_ids": ids, "labels": torch.tensor([1])})


def test_training_takes_keyword_arguments_too():
    model, parts = make("qwen2"), texts(9, 6)
    losses = [float(model(input_ids=p, labels=p).loss) * (p.shape[1] - 1) for p in parts]
    batch = padded(parts, "left")
    assert float(causal_lm_loss(model, batch)) == pytest.approx(sum(losses) / 13, rel=1e-5)
    assert float(next_token_loss(model, batch)) == pytest.approx(sum(losses) / 13, rel=1e-5)


def test_importances_of_heads_and_neurons_are_those_of_the_plain_texts():
    model, parts = make("llama"), texts(11, 11)
    plain = torch.cat(parts)
    left = padded([*parts, *texts(15, seed=3)], "left")  # the third row makes padding
    left = {key: value[:2] for key, value in left.items()}
    one = head_importance(model, plain, normalize=False)
    torch.testing.assert_close(
        head_importance(model, [left], normalize=False), one, rtol=1e-3, atol=1e-6
    )
    for order in ("first", "second", "mixed"):
        a, b = (llm_pruner_scores(model, d, order=order) for d in (plain, [left]))
        for kind in a:
            torch.testing.assert_close(b[kind], a[kind], rtol=2e-3, atol=1e-7)
    adapted = lora.attach(model, rank=2)
    a, b = (lora_importance(adapted, d) for d in (plain, [left]))
    for kind in a:
        torch.testing.assert_close(b[kind], a[kind], rtol=2e-3, atol=1e-5)
    a, b = (dict(obd(model, d, 0.5).named_parameters()) for d in (plain, [left]))
    same = sum(int(((p == 0) == (b[n] == 0)).sum()) for n, p in a.items())
    assert same / sum(p.numel() for p in a.values()) > 0.999


def test_sensitivities_are_those_of_the_plain_texts():
    model, parts = make("llama"), texts(11, 11)
    plain = torch.cat(parts)
    left = padded([*parts, *texts(15, seed=3)], "left")
    left = {key: value[:2] for key, value in left.items()}
    for measure in (
        lambda d: {n: t.trace for n, t in hessian_traces(model, d, samples=2).items()},
        lambda d: {n: row[3] for n, row in loss_sensitivity(model, d, [3]).items()},
    ):
        a, b = measure(plain), measure([left])
        assert all(b[name] == pytest.approx(a[name], rel=1e-2, abs=1e-4) for name in a)


def test_rows_of_padding_alone_are_no_sequences():
    model, parts = make("llama"), texts(8)
    batch = padded([*parts, torch.zeros(1, 0, dtype=torch.long)], "right")
    one = fisher_diagonal(model, parts[0])
    assert error(fisher_diagonal(model, [batch]), one) < 1e-4
    assert torch.allclose(head_importance(model, [batch]), head_importance(model, parts[0]))
    with pytest.raises(ValueError, match="no token of the calibration data follows another"):
        mean_gradients(model, [{key: value[1:] for key, value in batch.items()}])
    with pytest.raises(ValueError, match="no token of the calibration data follows another"):
        mean_gradients(model, parts[0][:, :1])


def test_an_encoder_decoder_learns_its_labels_or_says_what_it_needs():
    torch.manual_seed(0)
    model = hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                    decoder_start_token_id=0)
    ).eval()  # fmt: skip
    ids, (answer,) = texts(9)[0], texts(5, seed=2)
    with pytest.raises(ValueError, match="is an encoder-decoder: every batch needs `labels`"):
        mean_gradients(model, ids)
    found = mean_gradients(model, [{"input_ids": ids, "labels": answer}])
    twin = copy.deepcopy(model).double()
    twin(input_ids=ids, labels=answer).loss.backward()
    assert error(found, {n: twin.get_submodule(n).weight.grad for n in found}) < 1e-4


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_model_that_sees_what_it_foresees_needs_a_loss(kind):
    torch.manual_seed(0)
    if kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**SIZES)).eval()
    else:
        special = dict(bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        model = hf.ModernBertForMaskedLM(hf.ModernBertConfig(**SIZES, **special)).eval()
    ids = texts(9)[0]
    with pytest.raises(ValueError, match="sees the tokens behind the one it foresees"):
        mean_gradients(model, ids)
    labels = ids.masked_fill(torch.arange(9) % 3 > 0, -100)
    given = [{"input_ids": ids.masked_fill(labels != -100, 2), "labels": labels}]
    loss = lambda m, batch: m(**batch).loss  # noqa: E731
    found = mean_gradients(model, given, layers="*.layer*", loss=loss)
    twin = copy.deepcopy(model).double()
    twin(**given[0]).loss.backward()
    assert error(found, {n: twin.get_submodule(n).weight.grad for n in found}) < 1e-4


def test_the_loop_says_which_gradient_is_no_number():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    twin, leaves = weight_leaves(model)
    assert torch.equal(leaves["0"], model[0].weight) and leaves["0"] is not model[0].weight
    with pytest.raises(ValueError, match="the loss of calibration sample 1 is nan, and the grad"):
        list(each_gradient(twin, leaves, [1.0, torch.nan], lambda m, x: x * m[0].weight.sum()))
    assert loss_batches(model, [3, 4], lambda m, x: x) == [3, 4]


def test_gradients_where_a_reader_has_switched_them_off():
    model, (ids,) = make("llama"), texts(9)
    expected = mean_gradients(model, ids)
    with torch.inference_mode():
        found = mean_gradients(model, ids.clone())  # ids that autograd would not keep
    assert error(found, expected) < 1e-6
