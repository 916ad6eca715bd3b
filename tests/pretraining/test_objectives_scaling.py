"""Work counted against PyTorch's counter; Chinchilla's rule, parabola and law on made-up runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from effnb.pretraining import objectives
from effnb.pretraining.objectives import ScalingLaw

MADE_UP = ScalingLaw(E=1.5, A=30.0, B=60.0, alpha=0.3, beta=0.35)
NEW = ScalingLaw(E=2.0, A=12.0, B=40.0, alpha=0.25, beta=0.3)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words(batch=2, time=32):
    return torch.randint(2, 200, (batch, time), generator=torch.Generator().manual_seed(0))


def counted(function):
    function()  # the first time a model is asked whether it looks only where a mask says
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [1.0, 0.15])
def test_the_work_is_what_pytorch_counts(llama, share):
    example = objectives.causal_lm(words(), share=share, generator=torch.Generator().manual_seed(1))
    work = objectives.work_of(llama, example)
    found = counted(lambda: objectives.example_loss(llama, example))
    assert work.flops == pytest.approx(found, rel=0.02)
    assert (work.text_tokens, work.read_tokens) == (64, 64)
    assert work.text_targets == example.targets


def test_the_work_of_electra_is_what_pytorch_counts(llama):
    model = objectives.Electra(llama, 0.5)
    ids, draws = words(), torch.Generator().manual_seed(1)
    example = objectives.electra_masking(ids, mask_token=299, generator=draws)
    work = objectives.electra_work(model, example)
    found = counted(lambda: model.loss(ids, example, generator=draws))
    assert work.flops == pytest.approx(found, rel=0.03)
    assert work.share == 1
    part = objectives.electra_work(model, example, everywhere=False)
    assert part.text_targets == example.targets
    assert part.flops == work.flops


def test_works_add_up():
    both = objectives.Work(10, 12, 3, 100) + objectives.Work(10, 20, 5, 50)
    assert both == objectives.Work(20, 32, 8, 150)
    assert both.share == 0.4
    assert both.share_of_read == 0.25


# --- Chinchilla -----------------------------------------------------------------------------------


@given(st.floats(1e9, 1e25), st.floats(1, 200))
def test_the_rule_spends_the_compute(flops, ratio):
    found = objectives.chinchilla(flops, ratio)
    assert found.tokens_per_parameter == pytest.approx(ratio)
    assert objectives.training_flops(found.parameters, found.tokens) == pytest.approx(flops)


def test_seventy_billion_parameters_on_1_4_trillion_tokens():
    found = objectives.chinchilla(objectives.training_flops(70e9, 1.4e12))
    assert found.parameters == pytest.approx(70e9)
    assert found.tokens == pytest.approx(1.4e12)


@given(st.floats(1e14, 1e22))
def test_the_laws_optimum_is_one(flops):
    best = MADE_UP.optimum(flops)
    assert 6 * best.parameters * best.tokens == pytest.approx(flops)
    at = MADE_UP.loss(best.parameters, best.tokens)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert at < MADE_UP.loss(best.parameters * factor, best.tokens / factor)


@pytest.mark.parametrize("law", [MADE_UP, NEW])
def test_a_law_is_found_again(law):
    runs = [(n, d) for n in (3e5, 1e6, 5e6, 2e7) for d in (1e6, 5e6, 2e7, 1e8)]
    sizes, tokens = zip(*runs)
    found = objectives.fit_scaling_law(sizes, tokens, [law.loss(n, d) for n, d in runs])
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02)


def test_the_parabolas_minimum():
    best = math.log(2e6)
    sizes = [3e5, 1e6, 5e6, 1e7]
    losses = [3 + 0.1 * (math.log(n) - best) ** 2 for n in sizes]
    assert objectives.isoflop_minimum(sizes, losses) == pytest.approx(2e6)
    assert objectives.isoflop_minimum(sizes, [-x for x in losses]) is None  # a maximum
    larger = [5e6, 1e7, 2e7]
    rising = [3 + 0.1 * (math.log(n) - best) ** 2 for n in larger]
    assert objectives.isoflop_minimum(larger, rising) is None  # below all that were tried
    assert objectives.isoflop_minimum([1e6, 2e6, 4e6], [3.0, 3.0, 3.0]) is None  # flat


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda: objectives.chinchilla(0), "flops is 0"),
        (lambda: objectives.chinchilla(1e9, -1), "tokens per parameter is -1"),
        (lambda: objectives.training_flops(math.nan, 1), "parameters is nan"),
        (lambda: objectives.isoflop_minimum([1, 2], [1, 2]), "three different sizes"),
        (lambda: objectives.isoflop_minimum([1, 1, 2], [1, 2, 3]), "3 sizes and 3 losses"),
        (lambda: objectives.isoflop_minimum([1, 2, 3], [1, 2]), "each with its loss"),
        (lambda: objectives.fit_scaling_law([1, 2], [1], [1]), "one of each"),
        (lambda: objectives.fit_scaling_law([1, 2], [1, 2], [1, 2]), "at least five runs"),
        (
            lambda: objectives.fit_scaling_law([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 1, 1, 1]),
            "loss is 0",
        ),
        (lambda: MADE_UP.optimum(-1), "flops is -1"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(attempt, said):
    with pytest.raises(ValueError, match=said) as problem:
        attempt()
    assert str(problem.value).endswith(".")
