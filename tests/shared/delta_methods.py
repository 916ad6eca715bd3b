"""Rows of the table of methods and architectures: deltas, each with an oracle in float64.

An oracle writes what the delta does by other means into a float64 model: into parameters, by hooks,
or by embeddings and caches given from outside.
"""

import torch
from torch import nn
from transformers import DynamicCache

from effnb.core.deltas import attached, delta_parameters, delta_state_dict, hosts
from effnb.core.linear_form import linear_form
from effnb.finetuning import adapters, bitfit, dora, ia3, last_layers, prefix_tuning, prompt_tuning

LENGTH = 3
"""Vectors of a prefix or prompt."""


def moved(model):
    """A model whose delta is not what it started as, as after training."""
    (name,) = attached(model)
    for i, (_, parameter) in enumerate(delta_parameters(model, name).items()):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        parameter.data = parameter.data + 0.1 * noise
    return model


@torch.no_grad()
def alike(want, result, batch):
    """Whether a result computes these logits."""
    found = result(**batch).logits
    assert (found - want).norm() <= 1e-3 * want.norm(), "not what the equations say"


@torch.no_grad()
def rescaled(model, result, batch):
    r"""(IA)^3: rows of a weight times $l$, with the bias; or its columns."""
    twin, _ = linear_form(model.double())
    for key, scale in delta_state_dict(result, "default").items():
        path, side = key.rsplit(".", 1)
        layer = twin.get_submodule(path)
        layer.weight.mul_(scale.double()[:, None] if side == "output" else scale.double())
        if side == "output" and layer.bias is not None:
            layer.bias.mul_(scale.double())
    alike(twin(**batch).logits, result, batch)


@torch.no_grad()
def differences(model, result, batch):
    r"""$\theta + \Delta\theta$, parameter by parameter."""
    twin = model.double()
    for key, difference in delta_state_dict(result, "default").items():
        twin.get_parameter(key).add_(difference.double())
    alike(twin(**batch).logits, result, batch)


@torch.no_grad()
def magnitudes(model, result, batch):
    r"""DoRA: $m \odot (W + s B A) / \lVert W + s B A \rVert_r$."""
    state = delta_state_dict(result, "default")
    twin, _ = linear_form(model.double())
    for path in {key.rsplit(".", 1)[0] for key in state}:
        A, B, m = (state[f"{path}.{leaf}"].double() for leaf in "ABm")
        weight = twin.get_submodule(path).weight
        new = weight + 8.0 / 4 * B @ A
        weight.copy_(m[:, None] * new / new.norm(dim=1, keepdim=True))
    alike(twin(**batch).logits, result, batch)


@torch.no_grad()
def bottlenecks(model, result, batch):
    r"""Houlsby's adapters, by hooks: $h + W_{up} f(W_{down} h + b) + b$ behind each sublayer."""
    twin, _ = linear_form(model.double())
    for path, host in hosts(result, "default").items():
        delta = host.deltas["default"]
        down, b, up, c = (p.double() for p in delta.parameters())
        activate = {"relu": torch.relu, "gelu": nn.functional.gelu}[delta.activation]
        twin.get_submodule(path).register_forward_hook(
            lambda _, given, h, down=down, b=b, up=up, c=c, f=activate: (
                h + f(h @ down.T + b) @ up.T + c
            )
        )
    alike(twin(**batch).logits, result, batch)


@torch.no_grad()
def prompted(model, result, batch):
    """A prompt's vectors in front of the embeddings, given from outside."""
    (vectors,) = delta_state_dict(result, "default").values()
    twin = model.double()
    embedded = twin.get_input_embeddings()(batch["input_ids"])
    rows = len(embedded)
    given = {
        "inputs_embeds": torch.cat([vectors.double().expand(rows, -1, -1), embedded], 1),
        "attention_mask": torch.cat(
            [torch.ones(rows, LENGTH, dtype=torch.long), batch["attention_mask"]], 1
        ),
    }
    alike(twin(**given).logits[:, LENGTH:], result, batch)


@torch.no_grad()
def prefixed(model, result, batch):
    """A prefix's keys and values as a cache that the text begins behind, given from outside.

    An encoder takes no cache: there the prefix must change the output, and `tests/reference`
    compares it with the library peft.
    """
    if model.config.model_type in ("bert", "modernbert"):
        difference = result(**batch).logits - model(**batch).logits
        assert difference.norm() > 1e-3 * model(**batch).logits.norm()
        return
    (delta,) = (host.deltas["default"] for host in hosts(result, "default").values())
    flat, cache, at = delta.flat().double(), DynamicCache(), 0
    rows = len(batch["input_ids"])
    for layer, sizes in enumerate(delta.reader.keys_values):
        parts = []
        for heads, dim in sizes:
            part = flat[:, at : at + heads * dim].view(LENGTH, heads, dim).transpose(0, 1)
            parts.append(part.expand(rows, -1, -1, -1).clone())
            at += heads * dim
        cache.update(*parts, layer)
    ones = torch.ones(rows, LENGTH, dtype=torch.long)
    mask = torch.cat([ones, batch["attention_mask"]], 1)
    twin = model.double()
    want = twin(input_ids=batch["input_ids"], attention_mask=mask, past_key_values=cache).logits
    alike(want, result, batch)


ROWS = {
    "adapters": (lambda m, b: moved(adapters.attach(m, size=4)), bottlenecks),
    "(IA)³": (lambda m, b: moved(ia3.attach(m)), rescaled),
    "BitFit": (lambda m, b: moved(bitfit.attach(m)), differences),
    "last layers": (lambda m, b: moved(last_layers.attach(m)), differences),
    "DoRA": (lambda m, b: moved(dora.attach(m, rank=4, alpha=8.0)), magnitudes),
    "prefix tuning": (
        lambda m, b: moved(prefix_tuning.attach(m, length=LENGTH, hidden=0)),
        prefixed,
    ),
    "prompt tuning": (lambda m, b: moved(prompt_tuning.attach(m, length=LENGTH)), prompted),
}
"""From a name to how the delta is attached and moved, and to its oracle."""
