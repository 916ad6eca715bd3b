"""Many users in one batch: each row is what its user's own model computes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn
from zoo import make

from effnb.core.deltas import delta_parameters, detach, merge, set_active
from effnb.finetuning import bitfit, dora, lora, serving
from effnb.inference import quantization

IDS = torch.randint(5, 60, (4, 7), generator=torch.Generator().manual_seed(0))


def attach(model, name, seed, **how):
    """A LoRA that is not zero, as after training."""
    model = lora.attach(model, name, seed=seed, **how)
    with torch.no_grad():
        for i, parameter in enumerate(delta_parameters(model, name).values()):
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            )
    return model


@pytest.fixture(scope="module")
def three():
    """Users whose ranks, scalings and layers differ."""
    model = make("llama")
    model = attach(model, "a", 1, rank=2)
    model = attach(model, "b", 2, rank=4, alpha=3.0, layers=["*.q_proj", "*.down_proj"])
    return attach(model, "c", 3, rank=1, rank_stabilized=True, layers="*.mlp.*")


@torch.no_grad()
def test_every_row_is_its_user_s(three):
    served = serving.serve(three)
    names = ["c", None, "a", "b"]
    with serving.users(served, names):
        found = served(input_ids=IDS).logits
    for row, name in enumerate(names):
        alone = set_active(three, *([name] if name else []))(input_ids=IDS[row : row + 1]).logits
        torch.testing.assert_close(found[row : row + 1], alone, atol=2e-5, rtol=1e-4)
    with serving.users(served, ["b"]):  # another batch, on the same model
        found = served(input_ids=IDS[:1]).logits
    torch.testing.assert_close(found, set_active(three, "b")(input_ids=IDS[:1]).logits)
    # The names' order is the order of the users, and some of them are enough.
    two = serving.serve(three, "c", "b")
    with serving.users(two, ["b"]):
        torch.testing.assert_close(two(input_ids=IDS[:1]).logits, found)


@torch.no_grad()
def test_rows_are_arranged_once_a_batch(three, monkeypatch):
    """Not in every layer, nor for every token: once for a prompt, and once for single tokens."""
    made, plain = [], serving.UserBatch.of.__func__

    def counted(cls, index, *more):
        made.append(len(index))
        return plain(cls, index, *more)

    monkeypatch.setattr(serving.UserBatch, "of", classmethod(counted))
    served = serving.serve(three, "a", "b")
    with serving.users(served, ["b", "a"]):
        served.generate(IDS[:2], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made == [14, 2]


@torch.no_grad()
def test_generation_with_padding_a_cache_and_beams(three):
    served = serving.serve(three, "a", "b")
    ids = torch.cat([torch.tensor([[1, 1, 1]]), IDS[:1, :4]], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    batch = {"input_ids": torch.cat([ids, IDS[1:2]]), "attention_mask": mask.new_ones(2, 7)}
    batch["attention_mask"][0] = mask
    for how in ({}, {"num_beams": 3}):
        how |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
        with serving.users(served, ["b", "a"]):
            found = served.generate(**batch, **how)
        for row, name in enumerate(["b", "a"]):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            alone = set_active(three, name).generate(**one, **how)
            assert torch.equal(found[row, : alone.shape[1]], alone[0])


@torch.no_grad()
@given(
    st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=5),
    st.integers(1, 20),
    st.integers(1, 3),
)
@examples(max_examples=25, deadline=None)
def test_shapes(who, time, rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    for seed in range(3):
        model = attach(model, f"u{seed}", seed, rank=min(rank, seed + 1))
    served = serving.serve(model)
    x = torch.randn(len(who), time, 5)
    names = [None if w is None else f"u{w}" for w in who]
    with serving.users(served, names):
        found = served(x)
    for row, name in enumerate(names):
        alone = set_active(model, *([name] if name else []))(x[row])
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_frozen_model_in_few_bits_and_in_half_precision(three):
    small = quantization.rtn(make("llama"), 8)
    model = attach(attach(small, "a", 1, rank=2), "b", 2, rank=3)
    served = serving.serve(model)
    with serving.users(served, ["b", "a"]):
        found = served(input_ids=IDS[:2]).logits
    want = torch.cat([set_active(model, n)(input_ids=IDS[i : i + 1]).logits
                      for i, n in enumerate("ba")])  # fmt: skip
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)
    half = serving.serve(attach(make("llama").bfloat16(), "a", 1, rank=2))
    with serving.users(half, ["a", None]):
        assert half(input_ids=IDS[:2]).logits.dtype == torch.bfloat16


@torch.no_grad()
def test_a_copy_has_rows_of_its_own(three):
    served = serving.serve(three, "a")
    twin = copy.deepcopy(served)
    with serving.users(served, ["a"]), pytest.raises(ValueError, match="whose rows are these"):
        twin(input_ids=IDS[:1])
    with serving.users(twin, ["a"]):
        twin(input_ids=IDS[:1])
    assert not [n for n, p in served.named_parameters() if p.requires_grad]


def test_bad_input(three):
    model = make("llama")
    with pytest.raises(ValueError, match="no user to serve"):
        serving.serve(model)
    with pytest.raises(ValueError, match="no delta is named 'x'"):
        serving.serve(three, "x")
    with pytest.raises(ValueError, match="named twice"):
        serving.serve(three, "a", "a")
    with pytest.raises(ValueError, match="of kind 'dora'"):
        serving.serve(dora.attach(model, rank=2))
    with pytest.raises(ValueError, match="of kind 'bitfit'"):
        serving.serve(bitfit.attach(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(ValueError, match="serves no users"), serving.users(three, ["a"]):
        pass
    served = serving.serve(three)
    unknown = pytest.raises(ValueError, match="'z' is no user; there are a, b, c")
    with unknown, serving.users(served, ["z"]):
        pass
    with pytest.raises(ValueError, match="no rows are named"), serving.users(served, []):
        pass
    with pytest.raises(ValueError, match="whose rows are these"):
        served(input_ids=IDS)
    with serving.users(served, ["a", "b", "c"]), pytest.raises(ValueError, match="28 rows"):
        served(input_ids=IDS)
    with pytest.raises(ValueError, match="serves several users"):
        merge(served, "served")
    assert torch.equal(detach(served, "served")(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_experts_are_refused():
    import architectures

    model = attach(architectures.build("Mixtral"), "a", 1, rank=2)
    with pytest.raises(ValueError, match="is an expert"):
        serving.serve(model)
