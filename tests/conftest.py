"""What all tests share: one thread, no network, shapes checked, and a tiny model of their own."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run in Triton's interpreter, on the CPU: it is decided when they are first imported. Under
# `make test-gpu` they run on the GPU.
if os.environ.get("EFFNB_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

import beartype
from jaxtyping import install_import_hook

# Every annotated shape in the package is checked at run time during tests. The hook takes the
# checker by its dotted name; ours lets a whole number stand for a float, as Python does.
beartype.lenient = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
_hook = install_import_hook(
    [
        *("effnb.core", "effnb.design", "effnb.inference", "effnb.evaluation"),
        *("effnb.finetuning", "effnb.hardware", "effnb.pretraining"),
    ],
    "beartype.lenient",
)

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "effnb", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("effnb")


def pytest_configure(config):
    """The models' weights are unpacked once, before workers or kernels of notebooks want them."""
    if not hasattr(config, "workerinput"):
        from effnb.lab.models import unpack_all

        unpack_all()


@pytest.fixture(autouse=True)
def own_record_of_what_was_read(monkeypatch):
    """A test that reads a planted model leaves no trace of it in what later tests store."""
    from effnb.lab import _files

    monkeypatch.setattr(_files, "_used", dict(_files._used))


def _tiny_llama(seed: int = 0, **changes):
    """A Llama of about 60,000 random parameters, with grouped-query attention and tied head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(LlamaConfig(**(options | changes))).eval()
    with torch.no_grad():  # norms start as all ones; make their gains matter
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="session")
def tiny_llama():
    """A function of (seed, configuration changes) that makes tiny random Llamas."""
    return _tiny_llama


@pytest.fixture
def llama():
    """A tiny random Llama, fresh for each test."""
    return _tiny_llama()


@pytest.fixture
def ids():
    """Four sequences of 24 token ids."""
    return torch.randint(1, 128, (4, 24), generator=torch.Generator().manual_seed(1))
