"""Llama models in GGUF files (llama.cpp's format), as plain Hugging Face folders.

A GGUF file packs weights in blocks (Q4_1: 32 weights share a scale and a minimum), orders the rows
of the query and key projections for llama.cpp's rotary embedding, and carries the tokenizer as
tables. This module undoes all three. The result is written once, in float32, to a folder in the
user's cache: a product of an 11-bit scale and a 4- or 8-bit number plus an 11-bit minimum has no
exact form in 16 bits, so float32 is the smallest ordinary format that keeps every weight.

The layout of the file: ggml's `docs/gguf.md`. Unpacking is left to the `gguf` package.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from effnb.lab._cache import cached_folder
from effnb.lab._files import DamagedFile

LAYOUT = 1
"""Number of the form in which a folder is written; a new one leaves old cached folders unused."""

_LAYER = {  # names inside a block: llama.cpp's, and Hugging Face's
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # kinds of token in GGUF's token_type table


# ---------------------------------------------------------------------------- the weights


def undo_permutation(
    weight: Float[Tensor, "rows columns"], heads: int
) -> Float[Tensor, "rows columns"]:
    """Put the rows of a query or key projection back in Hugging Face's order.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), …; Hugging Face rotates row i with row
    i + half of the head. So each head's rows were interleaved, and are taken apart again here.

    Raises:
        ValueError: When the rows do not divide into `heads` heads of even size.
    """
    rows, columns = weight.shape
    if heads < 1 or rows % (2 * heads):
        raise ValueError(f"{rows} rows do not divide into {heads} heads of even size.")
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()


def _value(reader: gguf.GGUFReader, key: str, default=None):
    """One field of the file's header, as a Python value."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _needed(reader: gguf.GGUFReader, key: str):
    """One field that a Llama model must have."""
    value = _value(reader, key)
    if value is None:
        raise DamagedFile(f"the GGUF file has no field {key!r}, so it holds no usable Llama model.")
    return value


def _float(value: float) -> float:
    """The short decimal that was rounded to float32 in the file: 1e-5, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Open a GGUF file that holds a Llama-architecture model.

    Raises:
        DamagedFile: When it is missing, cut short, no GGUF file, or of another architecture.
    """
    try:
        reader = gguf.GGUFReader(path)
    except FileNotFoundError:
        raise DamagedFile(f"{path.name} is missing.") from None
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise DamagedFile(f"{path.name} is not a whole GGUF file ({error}).") from None
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise DamagedFile(f"{path.name} holds a model of kind {architecture!r}, not 'llama'.")
    return reader


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """The model's sizes, as the configuration of a `LlamaForCausalLM`."""
    heads = _needed(reader, "llama.attention.head_count")
    hidden = _needed(reader, "llama.embedding_length")
    return LlamaConfig(
        vocab_size=len(_needed(reader, "tokenizer.ggml.tokens")),
        hidden_size=hidden,
        intermediate_size=_needed(reader, "llama.feed_forward_length"),
        num_hidden_layers=_needed(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv", heads),
        max_position_embeddings=_needed(reader, "llama.context_length"),
        rms_norm_eps=_float(_needed(reader, "llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": _float(_value(reader, "llama.rope.freq_base", 10_000.0)),
        },
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
    )


def read_weights(reader: gguf.GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """All tensors in float32, by their Hugging Face names.

    Raises:
        DamagedFile: When a tensor has a name that a Llama model does not know.
    """
    weights = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        if stem in _OUTER:
            name = _OUTER[stem]
        elif stem.startswith("blk.") and stem.split(".", 2)[2] in _LAYER:
            _, number, part = stem.split(".", 2)
            name = f"model.layers.{number}.{_LAYER[part]}"
        else:
            raise DamagedFile(f"the GGUF file has a tensor {tensor.name!r}, unknown in a Llama.")
        # gguf gives a view of the file for float32 tensors: copied, so that the file can close.
        unpacked = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)
        weight = torch.from_numpy(unpacked)
        if stem.endswith("attn_q"):
            weight = undo_permutation(weight, config.num_attention_heads)
        elif stem.endswith("attn_k"):
            weight = undo_permutation(weight, config.num_key_value_heads)
        weights[f"{name}.weight"] = weight
    return weights


def read_model(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    """The model in float32, every weight from the file.

    Raises:
        DamagedFile: When weights are missing, unknown, or of another shape than the header says.
    """
    config = read_config(reader)
    with torch.device("meta"):  # no memory, no random numbers: every tensor is replaced below
        model = LlamaForCausalLM(config)
    weights = read_weights(reader, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights.get("model.embed_tokens.weight")
    try:
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, AttributeError, TypeError) as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise DamagedFile(f"the GGUF file does not hold a whole Llama model: {first}") from None
    model.tie_weights()
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # computed, so no file holds it
    return model.eval()


# --------------------------------------------------------------------------- the tokenizer


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """How text is cut before byte-pair merges: llama.cpp keeps only the name of the rule."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in ("smollm", "refact", "command-r"):  # GPT-2's rule, each digit by itself
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, byte_level])
    if name in ("gpt-2", "default"):
        return byte_level
    raise DamagedFile(f"the GGUF file names the pre-tokenizer {name!r}, which is not known here.")


def read_tokenizer(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer with its special tokens and, if there is one, chat template.

    Raises:
        DamagedFile: When the file holds a tokenizer of another kind.
    """
    kind = _needed(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise DamagedFile(f"the GGUF file's tokenizer is {kind!r}; only 'gpt2' is read here.")
    tokens = _needed(reader, "tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in _needed(reader, "tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = _pre_tokenizer(_value(reader, "tokenizer.ggml.pre", "default"))
    backend.decoder = decoders.ByteLevel()
    kinds = _value(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    for chosen, special in ((_CONTROL_TOKEN, True), (_USER_TOKEN, False)):
        found = [t for t, k in zip(tokens, kinds, strict=True) if k == chosen]
        backend.add_tokens([AddedToken(t, special=special, normalized=False) for t in found])

    def named(key: str) -> str | None:
        number = _value(reader, f"tokenizer.ggml.{key}_token_id")
        return None if number is None else tokens[number]

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding") or named("eos"),
        model_max_length=_needed(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _value(reader, "tokenizer.chat_template")
    return tokenizer


# ------------------------------------------------------------------------------ the folder


@contextmanager
def _system_errors() -> Iterator[None]:
    """Errors of the system that tokenizers and safetensors dress up, as what they are: OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "os error" not in str(error):
            raise
        raise OSError(str(error)) from error


def convert(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder` as a Hugging Face folder: safetensors, float32.

    Raises:
        DamagedFile: When the GGUF file cannot be read.
        OSError: When the folder cannot be written.
    """
    reader = open_gguf(path)
    tokenizer, model = read_tokenizer(reader), read_model(reader)
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], torch.float32
    model.generation_config = GenerationConfig.from_model_config(model.config)
    # A tied head is the embedding itself: stored once, tied again when the folder is loaded.
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: w for name, w in model.state_dict().items() if name not in tied}
    target = folder / "model.safetensors"
    with _system_errors():
        tokenizer.save_pretrained(folder)
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_file(weights, target, metadata={"format": "pt"})
    # safetensors gives its files to the owner alone; a cache may be shared by a class.
    target.chmod((folder / "tokenizer.json").stat().st_mode)


def cached(path: Path, name: str, sha256: str) -> Path:
    """The converted model's folder in the user's cache; converted now if it is not there whole.

    Args:
        path: The GGUF file.
        name: Name of the model, the beginning of the folder's name.
        sha256: Checksum of the GGUF file: another file gets another folder.

    Raises:
        DamagedFile: When the GGUF file cannot be read.
        CacheUnwritable: When the disk is full or the cache cannot be written.
    """
    return cached_folder(f"{name}-{sha256[:12]}-v{LAYOUT}", lambda folder: convert(path, folder))
