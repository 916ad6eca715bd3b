"""Every method on every architecture: right, or one clear sentence.

A cell of the table is a method on a tiny random model. It must be right against float64
(`methods.Method.oracle`), the same for padding on either side, leave its argument untouched, decode
with a cache as without, and save and load to the same function; or it must refuse in one sentence
before any work. What comes out is compared with the stored table that the site prints;
`EFFNB_WRITE=1 pytest --numprocesses=0 tests/architectures` writes it. The architectures are spread
over several files, each of which one process runs.
"""

import json
import os
import warnings
from pathlib import Path

import architectures
import methods
import torch
import transformers

from effnb.core.coverage import LeftOut
from effnb.core.delta_files import open_delta, save_delta
from effnb.inference import low_rank, quantization

TABLE = Path(__file__).resolve().parents[2] / "data" / "architectures.json"
transformers.logging.set_verbosity_error()


def cell(name, method):
    """What a method does on an architecture: "works", or the sentence it refuses with."""
    model, batch = architectures.build(name), architectures.batch(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = method.run(model, batch)
        except (ValueError, TypeError) as error:
            result, refusal = None, str(error)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "the argument was changed"
    assert model.config.to_dict() == config, "the argument's configuration was changed"
    if result is None:
        assert one_sentence(refusal), refusal
        return {"refused": refusal}
    method.oracle(architectures.build(name), result, batch)
    if method.data:
        padded(name, method, result, batch)
    if name not in (*architectures.ENCODERS, *architectures.ENCODER_DECODERS):
        cached(result, method.cache_bound)
    found = {"works": True}
    left = [str(w.message) for w in caught if issubclass(w.category, LeftOut)]
    if left:
        found["left out"] = left[0]
    return found | saved(name, method, result, batch)


def one_sentence(text):
    """Whether a message is something to read: one line that begins and ends like a sentence."""
    return "\n" not in text and text.endswith(".") and 20 < len(text) < 400


@torch.no_grad()
def padded(name, method, result, batch):
    """Padding that the mask hides must not decide anything, on either side."""
    want = result(**batch).logits
    for side in ("left", "right"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.enable_grad():
                again = method.run(architectures.build(name), architectures.batch(name, side))
        found = again(**batch).logits
        if method.trains and (found - want).norm() > 2e-3 * want.norm():
            # Steps of an optimizer enlarge rounding; which weights stay is what must agree.
            pairs = zip(again.parameters(), result.parameters())
            differ = sum(int(((a == 0) != (b == 0)).sum()) for a, b in pairs)
            share = differ / sum(p.numel() for p in result.parameters())
            assert share < 0.01, f"padding on the {side} changes {share:.1%} of the mask"
        else:
            assert (found - want).norm() <= 2e-3 * want.norm(), f"padding on the {side} counts"


@torch.no_grad()
def cached(result, bound):
    """Token by token with a cache gives what one pass over all tokens gives."""
    ids = architectures.ids(batch=2, time=9, seed=9)
    whole = result(input_ids=ids, use_cache=False).logits
    output = result(input_ids=ids[:, :5], use_cache=True)
    parts = [output.logits]
    for at in range(5, 9):
        output = result(
            input_ids=ids[:, at : at + 1], past_key_values=output.past_key_values, use_cache=True
        )
        parts.append(output.logits)
    moved = (torch.cat(parts, 1) - whole).norm() / whole.norm()
    assert moved < bound, f"a cache changes the output by {float(moved):.1%}"


@torch.no_grad()
def saved(name, method, result, batch):
    """Save, load into a new model, compare; says which way the result is stored."""
    path = Path(os.environ["EFFNB_TEST_FOLDER"]) / f"{name}-{id(method)}"
    path.mkdir(parents=True, exist_ok=True)
    if method.file == "none":
        return {}
    if method.file == "model":
        try:
            result.save_pretrained(path)
        except ValueError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert one_sentence(refusal), refusal
            return {"not saved": refusal}
        again = type(result).from_pretrained(path, attn_implementation="eager").eval()
        again.config._experts_implementation = "eager"
    elif method.file == "quantized":
        quantization.save_quantized(result, path / "weights.safetensors")
        again = quantization.load_quantized(architectures.build(name), path / "weights.safetensors")
    elif method.file == "factorized":
        low_rank.save_factorized(result, path / "weights.safetensors")
        again = low_rank.load_factorized(architectures.build(name), path / "weights.safetensors")
    else:
        save_delta(result, "default", path / "delta.safetensors")
        again = open_delta(architectures.build(name), path / "delta.safetensors")
    want, found = result(**batch).logits, again(**batch).logits
    assert (found - want).norm() <= 1e-3 * want.norm(), "a saved model is another one"
    return {"file": method.file}


def check(name, folder):
    """One row of the table: every method on one architecture, compared with what is stored."""
    os.environ["EFFNB_TEST_FOLDER"] = str(folder)
    found, wrong = {}, {}
    for label, method in methods.METHODS.items():
        try:
            found[label] = cell(name, method)
        except AssertionError as error:
            wrong[label] = str(error).splitlines()[0]
        except Exception as error:
            wrong[label] = f"{type(error).__name__}: {error}"
    assert wrong == {}
    if os.environ.get("EFFNB_WRITE"):
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table[name] = {"traits": architectures.TRAITS[name], "methods": found}
        ordered = {key: table[key] for key in architectures.NAMES if key in table}
        TABLE.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")
    stored = json.loads(TABLE.read_text())[name]
    assert stored == {"traits": architectures.TRAITS[name], "methods": found}
