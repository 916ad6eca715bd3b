"""Tiny random models of many architectures, each with the traits that break methods.

Two blocks, 32 hidden units, 96 tokens; norms' gains and biases are random, so that a method that
forgets one is seen. `TRAITS` says what is special about each.
"""

from __future__ import annotations

import torch
import transformers as T  # noqa: N812
from torch import nn

VOCABULARY = 96
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
GROUPED = dict(COMMON, num_key_value_heads=2)

TRAITS = {
    "Llama": "RMSNorm, rotary positions, grouped keys and values, SwiGLU",
    "Mistral": "sliding windows",
    "Qwen2": "biases on queries, keys and values; tied head",
    "Qwen3": "norms of queries and keys",
    "Gemma": "gain 1 + w, scaled embedding, tied head",
    "Gemma2": "norms after blocks, soft-capped logits, windows in every other layer",
    "Gemma3": "rotary tables and masks that differ by layer, norms of queries and keys",
    "Phi": "parallel blocks, LayerNorm, partial rotary positions, biases",
    "Phi3": "fused query-key-value and gate-up matrices",
    "GPT2": "Conv1D, learned positions, tied head",
    "OPT": "flattened tokens, learned positions with an offset, ReLU",
    "BLOOM": "ALiBi, one fused matrix, a norm after the embedding",
    "GPT-NeoX": "parallel residual, partial rotary positions, fused matrix",
    "GPT-J": "interleaved rotary pairs, parallel residual, biased head",
    "Falcon": "multi-query attention, parallel blocks",
    "Cohere2": "parallel blocks, interleaved rotary pairs, windows without positions",
    "GPT-OSS": "experts in one tensor with biases, attention sinks, windows",
    "Mixtral": "experts in one tensor",
    "Qwen3-MoE": "experts in one tensor, norms of queries and keys",
    "T5": "encoder and decoder, position biases passed between blocks, tied head",
    "BERT": "encoder, norms after the residual, head with a name of its own, tied",
    "ModernBERT": "encoder, rotary tables that differ by layer, fused matrices",
}
ENCODERS = ("BERT", "ModernBERT")
ENCODER_DECODERS = ("T5",)
POSITIONS_BY_PLACE = ("GPT2", "BERT")
"""Absolute positions that do not follow the mask: padding on the left needs `position_ids`."""
NAMES = tuple(TRAITS)


def _config(name: str):
    small = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    if name == "Llama":
        return T.LlamaConfig(**GROUPED)
    if name == "Mistral":
        return T.MistralConfig(**GROUPED, sliding_window=8)
    if name == "Qwen2":
        return T.Qwen2Config(**GROUPED, tie_word_embeddings=True)
    if name == "Qwen3":
        return T.Qwen3Config(**GROUPED, head_dim=8)
    if name == "Gemma":
        return T.GemmaConfig(**GROUPED, head_dim=8)
    if name == "Gemma2":
        return T.Gemma2Config(**GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    if name == "Gemma3":
        return T.Gemma3TextConfig(
            **GROUPED, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    if name == "Phi":
        return T.PhiConfig(**COMMON, partial_rotary_factor=0.5)
    if name == "Phi3":
        return T.Phi3Config(**GROUPED)
    if name == "GPT2":
        return T.GPT2Config(
            **small, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    if name == "OPT":
        return T.OPTConfig(
            **small, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0,
        )  # fmt: skip
    if name == "BLOOM":
        return T.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4)
    if name == "GPT-NeoX":
        return T.GPTNeoXConfig(**COMMON, rotary_pct=0.5)
    if name == "GPT-J":
        return T.GPTJConfig(
            **small, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        )  # fmt: skip
    if name == "Falcon":
        return T.FalconConfig(
            **small, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True,
            parallel_attn=True, bias=False, hidden_dropout=0.0, attention_dropout=0.0,
            ffn_hidden_size=48, max_position_embeddings=64,
        )  # fmt: skip
    if name == "Cohere2":
        return T.Cohere2Config(
            **GROUPED, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
        )
    if name == "GPT-OSS":
        return T.GptOssConfig(
            **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
    if name == "Mixtral":
        return T.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    if name == "Qwen3-MoE":
        return T.Qwen3MoeConfig(
            **GROUPED, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            decoder_sparse_step=1,
        )  # fmt: skip
    if name == "T5":
        return T.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2,
            num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=None,
            decoder_start_token_id=0,
        )  # fmt: skip
    if name == "BERT":
        return T.BertConfig(**COMMON, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    if name == "ModernBERT":
        return T.ModernBertConfig(
            **COMMON, local_attention=8, global_attn_every_n_layers=2,
        )  # fmt: skip
    raise ValueError(f"there is no architecture {name!r}; choose one of {', '.join(NAMES)}.")


def _class(name: str):
    if name in ENCODERS:
        return T.AutoModelForMaskedLM
    if name in ENCODER_DECODERS:
        return T.AutoModelForSeq2SeqLM
    return T.AutoModelForCausalLM


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model of one architecture in evaluation mode, every parameter random."""
    torch.manual_seed(seed)
    config = _config(name)
    config._experts_implementation = "eager"  # the fused products know no float64
    model = _class(name).from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # gains near what they were, biases near 0
                parameter.add_(0.1 * noise)
            elif "embed" in key or "wte" in key or "shared" in key:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    for module in model.modules():  # padding's embedding is a row like the others
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.padding_idx = None
    return model.to(dtype).eval()


def ids(batch: int = 3, time: int = 12, seed: int = 5) -> torch.Tensor:
    """Token ids without padding."""
    return torch.randint(
        2, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed)
    )


def batch(name: str, padding: str = "none") -> dict[str, torch.Tensor]:
    """The same three sequences as keyword arguments: without padding, or with four tokens of it."""
    tokens = ids()
    if padding != "none":
        pad = torch.full((len(tokens), 4), 7)  # a token like any other: only the mask hides it
        mask = torch.ones_like(tokens)
        parts = [pad, tokens] if padding == "left" else [tokens, pad]
        hidden = (
            [torch.zeros_like(pad), mask] if padding == "left" else [mask, torch.zeros_like(pad)]
        )
        found = {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(hidden, 1)}
    else:
        found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if padding == "left" and name in POSITIONS_BY_PLACE:
        found["position_ids"] = (found["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if name in ENCODER_DECODERS:
        found["decoder_input_ids"] = ids(seed=6, time=8)
    return found
