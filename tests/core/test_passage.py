"""Blocks get what the model's own forward gives them, block by block, whatever the architecture."""

import threading

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from zoo import make, texts, words

from effnb.core.calibration import Calibration, InputSample, layerwise, visit_blocks
from effnb.core.linear_form import linear_form
from effnb.core.modules import find_stacks
from effnb.core.passage import Passage, is_cache, without_caches

ARCHITECTURES = [
    "llama", "qwen2 window", "gemma2", "gemma3", "cohere2", "gptj", "gpt-neox", "falcon", "bloom",
    "opt", "gpt2", "gpt-oss", "mixtral", "qwen3-moe", "jamba", "bert", "modernbert", "albert",
    "t5", "t5 encoder", "bart",
]  # fmt: skip


def squares_in(model, batches, names):
    """The sum of squares of what layers read when the model itself runs, and how many tokens."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: seen[name].append(arguments[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_layer_sees_what_it_reads_in_the_model(name, padding):
    model, _ = linear_form(make(name))
    found = {}
    layerwise(
        model,
        texts(name, padding),
        lambda key, layer: InputSample(),
        lambda key, layer, seen: found.__setitem__(key, seen.value),
    )
    truth = squares_in(model, texts(name), found)
    stacks = find_stacks(model)
    assert all(any(key.startswith(stack) for key in found) for stack in stacks)
    for key, rows in found.items():
        assert rows.dtype == torch.float64 and len(rows) == len(truth[key])
        torch.testing.assert_close(
            rows.square().sum(0), truth[key].square().sum(0), rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", ["gemma3", "t5", "gpt-neox", "mixtral"])
def test_later_blocks_read_what_the_changed_ones_make(name):
    """After the pass, the finished model reads the same as the pass saw in its last block."""
    model, _ = linear_form(make(name))
    found = {}

    def halve(key, layer, seen):
        found[key] = seen.value
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new.weight, new.bias = nn.Parameter(layer.weight * 0.5), layer.bias
        return new

    new = layerwise(model, texts(name), lambda key, layer: InputSample(), halve)
    last = [key for key in found if key.endswith(("q_proj", "SelfAttention.q", "query_key_value"))]
    truth = squares_in(new, texts(name), last)
    before = squares_in(model, texts(name), last)
    for key in last:
        torch.testing.assert_close(found[key], truth[key], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(before[last[-1]], truth[last[-1]])


def test_blocks_of_both_stacks_are_visited_in_order():
    order = []
    model = make("t5")
    visit_blocks(model, texts("t5"), lambda name, block, calls: order.append(name))
    assert order == [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(2)]


def test_a_block_used_many_times_is_visited_once_with_all_its_inputs():
    calls = {}
    visit_blocks(make("albert"), texts("albert"), lambda n, block, given: calls.update({n: given}))
    (given,) = calls.values()
    assert len(given) == 2 * 2  # two texts, through one block that stands for two
    assert not torch.equal(given[0].hidden, given[1].hidden)


class Odd(nn.Module):
    """A decoder whose blocks keep states under a name of their own and leave notes for others."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, hidden, memory=None, notes=None, scale=1.0):
            if memory is not None:
                keys, _ = memory.update(hidden.unsqueeze(1), hidden.unsqueeze(1), 0)
                hidden = hidden + keys.mean((1, 2)).unsqueeze(1)
            assert len(notes["seen"]) == notes["expected"], "notes of another pass are left"
            notes["seen"].append(1)
            return self.layer(hidden) * scale

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(96, 4)
        self.blocks = nn.ModuleList(Odd.Block() for _ in range(3))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for index, block in enumerate(self.blocks):
            notes = {"seen": [1] * index, "expected": index}
            hidden = block(hidden, memory=DynamicCache(), notes=notes, scale=index + 1.0)
            hidden = hidden.flip(1)  # what is between blocks counts too
        return hidden


def test_no_state_is_kept_between_passes_and_what_is_between_blocks_counts():
    model, scales, found = Odd(), [], {}

    def visit(name, block, calls):
        first, second = calls[0].run(block), calls[0].run(block)
        assert torch.equal(first, second)
        scales.append(calls[0].keywords["scale"])
        assert calls[0].keywords["memory"] is None
        found[name] = calls[0].hidden

    visit_blocks(model, words(2, 5), visit)
    assert scales == [1.0, 2.0, 3.0]
    hidden = model.embed(words(2, 5))
    for index, block in enumerate(model.blocks):
        torch.testing.assert_close(found[f"blocks.{index}"], hidden)
        hidden = (block.layer(hidden) * (index + 1)).flip(1)


def test_caches_are_known_by_their_type():
    class RingCache:
        pass

    class Store:
        def update(self, keys, values, layer):
            return keys, values

        def get_seq_length(self):
            return 0

    for cache in (DynamicCache(), RingCache(), Store()):
        assert is_cache(cache)
        assert without_caches({"a": [cache, 1], "b": (cache,)}) == {"a": [None, 1], "b": (None,)}
    for other in (torch.ones(2), {"keys": 1}, None, "Cache"):
        assert not is_cache(other)


def walk(passage):
    """Run a model to its end, block by block."""
    passage.advance()
    while passage.block is not None:
        given = passage.arguments
        passage.advance(passage.block(*given.positional, **given.keywords))


def test_an_error_in_the_model_arrives_with_the_caller_and_no_thread_is_left():
    model, before = make("llama"), threading.active_count()
    model.model.norm = nn.Module()  # fails behind the blocks
    passage = Passage(model, model.model.layers, {"input_ids": words(1, 4)})
    with pytest.raises(NotImplementedError):
        walk(passage)

    def visit(name, block, calls):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        visit_blocks(make("llama"), Calibration(words(3, 4), batch_size=1), visit)
    assert threading.active_count() == before
    assert all("forward" not in block.__dict__ for block in model.model.layers)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_the_pass_runs_in_the_mode_of_its_caller(mode):
    modes = []
    model = make("gemma3").float()
    norm = model.model.norm.register_forward_pre_hook(lambda m, a: modes.append("never reached"))
    model.model.rotary_emb.register_forward_pre_hook(
        lambda m, a: modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
    )
    with mode():
        visit_blocks(model, words(1, 5), lambda name, block, calls: None)
    norm.remove()
    assert set(modes) - {"never reached"} == {(False, mode is torch.inference_mode)}


def test_an_encoder_decoder_without_inputs_for_its_decoder_is_refused_before_any_work():
    with pytest.raises(ValueError, match="decoder_input_ids"):
        visit_blocks(make("t5"), words(2, 5), lambda name, block, calls: pytest.fail("visited"))
    visited = []
    visit_blocks(make("bart"), words(2, 5), lambda name, block, calls: visited.append(name))
    assert any("decoder" in name for name in visited)  # this one makes decoder inputs of the ids
