"""Where the positions of a model end: learned and tabulated ones do, rotary and ALiBi do not."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from effnb.core.context import check_context, context_limit, position_limit
from effnb.evaluation import perplexity
from effnb.inference.pruning import block_influence
from effnb.inference.quantization import self_generate, smoothquant
from effnb.inference.quantization.sensitivity import model_batches

SIZES = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
OLD = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
ENDING = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**OLD)),
    "gpt1": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**OLD)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)  # begins with row 2
    ),
    "gpt-neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            vocab_size=128,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global"], 2]],
            max_position_embeddings=64,
        )
    ),
    "gpt-j": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**OLD, rotary_dim=4)),  # a table of angles
    "codegen": lambda: hf.CodeGenForCausalLM(hf.CodeGenConfig(**OLD, n_ctx=64, rotary_dim=4)),
    "ctrl": lambda: hf.CTRLLMHeadModel(hf.CTRLConfig(**OLD, dff=48)),  # sines, in a table
    "mpt": lambda: hf.MptForCausalLM(  # ALiBi, tabulated
        hf.MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForMaskedLM(  # begins behind its padding: two rows are never read
        hf.RobertaConfig(**{**SIZES, "max_position_embeddings": 66}, pad_token_id=1)
    ),
}
ENDLESS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SIZES)),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(
            vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
        )
    ),
}


def run(model: nn.Module, tokens: int) -> None:
    ids = torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(input_ids=ids)


@pytest.mark.parametrize("kind", ENDING)
def test_the_limit_is_the_longest_text_that_runs(kind):
    model = ENDING[kind]().eval()
    assert position_limit(model) == 64
    assert context_limit(model) == 64
    run(model, 64)
    with pytest.raises((IndexError, RuntimeError)):  # what a user would see
        run(model, 65)
    with pytest.raises(ValueError, match="the text is 65; this model has positions for 64 tokens"):
        check_context(model, 65, "the text")
    check_context(model, 64)


@pytest.mark.parametrize("kind", ENDLESS)
def test_where_positions_do_not_end_longer_texts_are_evaluated(kind):
    model = ENDLESS[kind]().eval()
    assert position_limit(model) is None
    run(model, 80)
    assert perplexity(model, torch.arange(160) % 128, context=80).tokens == 159


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt-j", "mpt"])
def test_perplexity_beyond_the_positions_is_one_sentence(kind):
    model = ENDING[kind]().eval()
    with pytest.raises(ValueError, match="context is 65; this model has positions for 64 tokens"):
        perplexity(model, torch.arange(200) % 128, context=65)
    assert perplexity(model, torch.arange(200) % 128, context=64).tokens == 199


def test_calibration_beyond_the_context_is_refused_for_learned_positions_too():
    model = ENDING["opt"]().eval()
    ids = torch.ones(1, 65, dtype=torch.long)
    for method in (
        lambda: smoothquant(model, ids),
        lambda: model_batches(model, ids),
        lambda: self_generate(model, 1, 65),
    ):
        with pytest.raises(ValueError, match="context is 64"):
            method()


def test_calibration_beyond_what_a_rotary_model_was_made_for_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="65 tokens; the model's context is 64"):
        block_influence(tiny_llama(), torch.ones(1, 65, dtype=torch.long))


def test_a_model_of_no_library_shows_its_positions_as_well():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(20, 8)
            self.places = nn.Parameter(torch.randn(12, 8))

        def forward(self, input_ids):
            return self.words(input_ids) + self.places[torch.arange(input_ids.shape[1])]

    assert position_limit(Plain()) == 12
    assert position_limit(nn.Linear(3, 3)) is None
