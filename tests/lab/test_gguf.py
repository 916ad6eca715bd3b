"""GGUF files: unpacked, put in order, and written as a folder that any library loads."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf as gguf_package
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given
from hypothesis import strategies as st

from effnb.lab import gguf
from effnb.lab._files import DamagedFile
from effnb.lab.gguf import cached, convert, undo_permutation

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "models" / "tokenizer"
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key rows."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, -1)


def write_gguf(path: Path, model, kind: Kind, pre: str = "gpt-2", **changes) -> None:
    """Write a Llama as llama.cpp would; `changes` replace header fields, None leaves one out."""
    config = model.config
    backend = json.loads((TOKENIZER / "tokenizer.json").read_text())
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    writer = gguf_package.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i == 0 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.float().numpy()
        if name.startswith("model.layers."):
            _, _, number, part = name.removesuffix(".weight").split(".", 3)
            target = f"blk.{number}.{NAMES[part]}.weight"
            if part.endswith("q_proj"):
                array = permute(array, config.num_attention_heads)
            elif part.endswith("k_proj"):
                array = permute(array, config.num_key_value_heads)
        else:
            target = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        if changes.get("without") == target:
            continue
        chosen = kind if array.ndim == 2 else Kind.F32
        packed = gguf_package.quantize(np.ascontiguousarray(array), chosen)
        writer.add_tensor(changes.get("rename", {}).get(target, target), packed, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny(tiny_llama):
    """A tiny Llama whose sizes suit blocks of 32, with the workbook's vocabulary."""

    def make(**changes):
        return tiny_llama(vocab_size=4096, hidden_size=64, intermediate_size=96, **changes)

    return make


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFNB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ------------------------------------------------------------------------------- the weights


@given(heads=st.integers(1, 6), half=st.integers(1, 5), columns=st.integers(1, 4))
def test_undo_permutation_undoes_llama_cpps(heads, half, columns):
    weight = np.arange(heads * half * 2 * columns, dtype=np.float32).reshape(-1, columns)
    restored = undo_permutation(torch.from_numpy(permute(weight, heads).copy()), heads)
    assert np.array_equal(restored.numpy(), weight)


def test_undo_permutation_by_hand():
    """One head of six rows: llama.cpp stores 0 3 1 4 2 5."""
    stored = torch.tensor([[0.0], [3.0], [1.0], [4.0], [2.0], [5.0]])
    assert undo_permutation(stored, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="6 rows do not divide into 2 heads"):
        undo_permutation(stored, 2)


@pytest.mark.parametrize("tied", [True, False])
def test_float32_file_gives_the_very_model(tiny, tmp_path, tied):
    model = tiny(tie_word_embeddings=tied)
    write_gguf(tmp_path / "m.gguf", model, Kind.F32)
    read = gguf.read_model(gguf.open_gguf(tmp_path / "m.gguf"))
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        assert torch.equal(read(ids).logits, model(ids).logits)
    assert read.config.tie_word_embeddings == tied
    assert (read.lm_head.weight is read.model.embed_tokens.weight) == tied
    for key in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "bos_token_id"):
        assert getattr(read.config, key) == getattr(model.config, key), key


@pytest.mark.parametrize(("kind", "values"), [(Kind.Q4_1, 16), (Kind.Q8_0, 32)])
def test_packed_weights_are_unpacked_exactly(tiny, tmp_path, kind, values):
    model = tiny()
    write_gguf(tmp_path / "m.gguf", model, kind)
    read = gguf.read_model(gguf.open_gguf(tmp_path / "m.gguf"))
    name = "model.layers.1.mlp.down_proj.weight"
    original = model.state_dict()[name].numpy()
    packed = gguf_package.quantize(original, kind)
    unpacked = gguf_package.dequantize(packed, kind)
    weight = read.state_dict()[name].numpy()
    assert weight.dtype == np.float32
    assert np.array_equal(weight, unpacked)
    assert np.abs(weight - original).max() < 0.1
    assert max(len(set(group)) for group in weight.reshape(-1, 32).tolist()) <= values


def test_what_is_not_a_whole_llama_is_said(tiny, tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(DamagedFile, match=r"m\.gguf is missing\."):
        gguf.open_gguf(path)
    path.write_bytes(b"this is no model at all, but long enough to have a header")
    with pytest.raises(DamagedFile, match=r"m\.gguf is not a whole GGUF file"):
        gguf.open_gguf(path)
    write_gguf(path, tiny(), Kind.F32)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match=r"m\.gguf is not a whole GGUF file"):
        gguf.open_gguf(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "mamba"}, "holds a model of kind 'mamba'"),
        ({"without": "blk.1.ffn_up.weight"}, "model.layers.1.mlp.up_proj.weight"),
        ({"without": "token_embd.weight"}, "does not hold a whole Llama model"),
        ({"rename": {"output_norm.weight": "blk.0.ffn_gate_exps.weight"}}, "unknown in a Llama"),
        ({"rename": {"blk.0.attn_q.weight": "blk.7.attn_q.weight"}}, "blk.7|layers.7|q_proj"),
        ({"tokenizer": "llama"}, "tokenizer is 'llama'"),
        ({"pre": "unheard-of"}, "'unheard-of'"),
    ],
)
def test_unusable_files_are_refused(tiny, tmp_path, changes, words):
    write_gguf(tmp_path / "m.gguf", tiny(), Kind.F32, **changes)
    (tmp_path / "out").mkdir()
    with pytest.raises(DamagedFile, match=words) as caught:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the tokenizer


def test_the_tokenizer_is_the_same(tiny, tmp_path):
    from transformers import AutoTokenizer

    write_gguf(tmp_path / "m.gguf", tiny(), Kind.F32)
    read = gguf.read_tokenizer(gguf.open_gguf(tmp_path / "m.gguf"))
    ours = AutoTokenizer.from_pretrained(TOKENIZER)
    for text in ("It is 1818.", " two  spaces\n\ttab", "naïve 日本語 🙂", "<|endoftext|>x"):
        assert read(text).input_ids == ours(text).input_ids
        assert read.decode(read(text).input_ids) == text
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|endoftext|>",) * 3
    assert read.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_smollm_takes_digits_one_by_one(tiny, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(), Kind.F32, pre="smollm")
    tokenizer = gguf.read_tokenizer(gguf.open_gguf(tmp_path / "m.gguf"))
    digits = [tokenizer.decode([i]) for i in tokenizer("year 1818").input_ids]
    assert digits[-4:] == ["1", "8", "1", "8"]


# ------------------------------------------------------------------------------- the folder


@pytest.fixture
def source(tiny, tmp_path):
    write_gguf(tmp_path / "m.gguf", tiny(), Kind.Q4_1)
    return tmp_path / "m.gguf"


def test_converted_once_and_whole(source, cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = cached(source, "tiny", "0123456789abcdef")
    assert folder == cache / "tiny-0123456789ab-v1"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert cached(source, "tiny", "0123456789abcdef") == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert {path.name for path in cache.iterdir()} == {folder.name, f"{folder.name}.lock"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    direct = gguf.read_model(gguf.open_gguf(source))
    ids = torch.arange(1, 30)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    )
    modes = {path.stat().st_mode & 0o077 for path in folder.iterdir()}
    assert len(modes) == 1, "all files of a shared cache can be read by the same people"


def test_another_file_gets_another_folder(source, cache):
    assert cached(source, "tiny", "a" * 64) != cached(source, "tiny", "b" * 64)


def test_a_damaged_copy_is_converted_anew(source, cache):
    folder = cached(source, "tiny", "a" * 64)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert cached(source, "tiny", "a" * 64) == folder
    assert (folder / "model.safetensors").read_bytes() == good


def test_a_write_that_the_system_stops_half_way(source, cache):
    """The kernel itself refuses to write more than 100 kB to a file, as a full disk would."""
    code = textwrap.dedent(
        """
        import resource, sys
        from pathlib import Path
        from effnb.lab import gguf
        from effnb.lab._cache import CacheUnwritable
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            gguf.cached(Path(sys.argv[1]), "tiny", "a" * 64)
        except CacheUnwritable as error:
            print(error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
