"""Selected modules: by name, or at random under a budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import nn

from effnb.core.deltas import delta_state_dict, load_delta, merge
from effnb.finetuning import selective_modules


def test_chosen_by_name(llama, ids):
    new = selective_modules.attach(llama, layers=["*.1.mlp.up_proj", "*.v_proj"])
    assert delta_state_dict(new, "default").keys() == {
        "model.layers.1.mlp.up_proj.weight",
        *(f"model.layers.{i}.self_attn.v_proj.weight" for i in range(3)),
    }
    with torch.no_grad():
        assert torch.equal(new(ids).logits, llama(ids).logits)
        state = {k: torch.randn_like(t) for k, t in delta_state_dict(new, "default").items()}
        new = load_delta(new, "default", state)
        torch.testing.assert_close(
            merge(new, "default")(ids).logits, new(ids).logits, atol=1e-5, rtol=1e-5
        )


@examples(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=6),
       st.floats(0.05, 1), st.integers(0, 99))  # fmt: skip
def test_a_random_part_keeps_to_its_budget_and_leaves_no_room(shapes, share, seed):
    model = nn.ModuleDict({f"m{i}": nn.Linear(*shape) for i, shape in enumerate(shapes)})
    total = sum(p.numel() for p in model.parameters())
    sizes = {f"m{i}": (a + 1) * b for i, (a, b) in enumerate(shapes)}
    if min(sizes.values()) > share * total:
        with pytest.raises(ValueError, match="the smallest module"):
            selective_modules.selected_modules(model, share=share, seed=seed)
        return
    found = selective_modules.selected_modules(model, share=share, seed=seed)
    again = selective_modules.selected_modules(model, share=share, seed=seed)
    assert found.keys() == again.keys()
    spent = sum(sizes[m] for m in found)
    assert 0 < spent <= share * total
    assert all(spent + size > share * total for m, size in sizes.items() if m not in found)


def test_seeds_differ_and_embeddings_are_left_out(llama):
    found = [set(selective_modules.selected_modules(llama, share=0.2, seed=s)) for s in range(4)]
    assert len({frozenset(f) for f in found}) > 1
    every = set(selective_modules.selected_modules(llama))
    assert len(every) == 3 * 7 and all("_proj" in path for path in every)


def test_bad_input_is_one_sentence(llama):
    for share in (0, 1.1, -1):
        with pytest.raises(ValueError, match=rf"share is {share}; it must lie in \(0, 1\]"):
            selective_modules.attach(llama, share=share)
    with pytest.raises(ValueError, match="fits the pattern zzz; the model has model"):
        selective_modules.attach(llama, layers="zzz")
    with pytest.raises(ValueError, match=r"share is 1e-06.*the smallest module, .* has 512"):
        selective_modules.attach(llama, share=1e-6)
    new = selective_modules.attach(llama, "a", layers="*.q_proj")
    with pytest.raises(ValueError, match="attached already"):
        selective_modules.attach(new, "a")
