"""A training step of LoRA beside that of peft: time, and what the step holds in memory."""

import copy

import pytest
import timing
import torch

from effnb.evaluation.cost import peak_memory
from effnb.finetuning import lora
from effnb.lab import load

pytestmark = pytest.mark.bench
TARGETS = ("query", "value")
SHAPE = (8, 32)


def models():
    """MiniLM with the same LoRA, ours and peft's, each with its optimizer's step."""
    from peft import LoraConfig, get_peft_model

    base = load("minilm-l6", device="cpu").model
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS))
    theirs = get_peft_model(copy.deepcopy(base), config)
    ours = lora.attach(base, rank=8, alpha=16, layers=[f"*.{name}" for name in TARGETS])
    ids = torch.randint(1000, 20_000, SHAPE, generator=torch.Generator().manual_seed(0))

    def step_of(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in trained) == 73_728
        optimizer = torch.optim.AdamW(trained, lr=1e-4)

        def step():
            model(input_ids=ids).last_hidden_state.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {"ours": step_of(ours), "peft": step_of(theirs)}


def measure_time():
    """Median seconds of a step of each, in turn."""
    return timing.in_turn(models(), 15)


def measure_memory():
    """The largest memory that the tensors of a step hold at one time, in bytes."""
    found = {}
    for name, step in models().items():
        step()  # the optimizer's moments are there from then on
        found[name] = peak_memory(step)
    return found


def test_a_lora_step_is_as_fast_as_pefts():
    seconds = timing.measured(__file__, "time")
    ratio = seconds["ours"] / seconds["peft"]
    print(f"\nLoRA step on MiniLM, ours / peft: {ratio:.3f}")
    assert ratio <= 1.03  # the spread of medians on a shared machine


def test_a_lora_step_takes_no_more_memory_than_pefts():
    held = timing.measured(__file__, "memory")
    ratio = held["ours"] / held["peft"]
    print(f"\nLoRA step on MiniLM, peak bytes, ours / peft: {ratio:.3f}")
    assert ratio <= 1.0


if __name__ == "__main__":
    timing.answer(globals())
