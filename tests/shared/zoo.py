"""Tiny random models of many architectures, made in milliseconds, with nothing to download."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor, nn

_DECODER = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
_ENCODER = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=128,
)
_GPT = dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=128)
_EXPERTS = dict(num_experts_per_tok=2)
_T5 = dict(
    vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
)
_WINDOW = dict(head_dim=8, sliding_window=6)

ZOO = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER)),
    "qwen2 window": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**_DECODER, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_DECODER, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_DECODER, **_WINDOW)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**(_DECODER | dict(num_hidden_layers=6)), **_WINDOW)
    ),
    "cohere2": lambda: hf.Cohere2ForCausalLM(
        hf.Cohere2Config(**(_DECODER | dict(num_hidden_layers=4)), sliding_window=6)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT)),
    "gptj": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, rotary_dim=4)),
    "gpt-neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_ENCODER)),
    "falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=96, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32,
        )
    ),
    "gpt-oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**_DECODER, **_WINDOW, num_local_experts=4, **_EXPERTS)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**_DECODER, num_local_experts=4, **_EXPERTS)
    ),
    "qwen3-moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **_DECODER, head_dim=8, num_experts=4, moe_intermediate_size=32, **_EXPERTS
        )
    ),
    "jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **_DECODER, num_experts=4, **_EXPERTS, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=2, expert_layer_offset=1, use_mamba_kernels=False,
            mamba_d_state=4, mamba_dt_rank=4,
        )
    ),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_ENCODER)),
    "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4)
    ),
    "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**_ENCODER, embedding_size=32)),
    "modernbert": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            **(_ENCODER | dict(num_hidden_layers=4)), local_attention=6, pad_token_id=0,
            cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
        )
    ),
    "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**_ENCODER, embedding_size=16)),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**_T5)),
    "t5 encoder": lambda: hf.T5EncoderModel(hf.T5Config(**_T5)),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=96, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
            decoder_ffn_dim=64, max_position_embeddings=128,
        )
    ),
}  # fmt: skip
"""From a name to a function that makes the model."""


def make(name: str, seed: int = 0) -> nn.Module:
    """A model of the zoo with weights large enough that every layer matters, in float64."""
    torch.manual_seed(seed)
    model = ZOO[name]().eval()
    model.config._experts_implementation = "eager"  # the grouped kernels know no float64
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in key:
                parameter.normal_(0, 0.2)
            elif key.endswith("bias") or "sinks" in key:
                parameter.normal_(0, 0.1)
    return model.double()


def words(sequences: int, time: int, seed: int = 1) -> Tensor:
    """Token ids, none of which is a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (sequences, time), generator=generator)


def texts(name: str, padding: str | None = None) -> list[dict[str, Tensor]]:
    """Two texts of 14 and 9 tokens as batches: each alone, or padded "left" or "right"."""
    long, short = words(1, 14, 1), words(1, 9, 2)
    pair = name in ("t5", "bart")
    answers = [words(1, 6, 3), words(1, 6, 4)]
    if padding is None:
        batches = [{"input_ids": long}, {"input_ids": short}]
        for batch, answer in zip(batches, answers, strict=True):
            batch |= {"decoder_input_ids": answer} if pair else {}
        return batches
    pad, one = torch.full((1, 5), 2), torch.ones(1, 9, dtype=torch.long)
    order = (slice(None), slice(None, None, -1))[padding == "left"]
    ids = torch.cat([long, torch.cat([short, pad][order], 1)])
    mask = torch.cat([torch.ones(1, 14, dtype=torch.long), torch.cat([one, pad * 0][order], 1)])
    batch = {"input_ids": ids, "attention_mask": mask}
    return [batch | {"decoder_input_ids": torch.cat(answers)} if pair else batch]
