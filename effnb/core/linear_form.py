r"""Weights that are no `nn.Linear`, as linear layers: what a method can read, and put back after.

Two kinds of modules hold weights of another form. `Conv1D` of GPT-2 is a linear layer with its
weight transposed. Mixtures of experts (Mixtral, Qwen3-MoE, GPT-OSS) keep all experts of a block in
one parameter of three dimensions; each of its matrices is the weight of a linear layer that reads
the tokens sent to this expert,

$$y = \sum_{e \in \text{top-}k} g_e \, W^{\text{down}}_e\, a(W^{\text{up}}_e x).$$

`linear_form` puts `nn.Linear` layers in their place, on the same memory where the layout allows
it; every method then sees matrices it knows, with names such as `experts.gate_up_proj.3`. `restore`
puts the old form back around layers that are ordinary still, so that a pruned model saves and loads
as its class does; layers stored in another way (quantized, factorized) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from effnb.core.modules import Model, exchange, share, shared_skeleton


class ExpertLinears(nn.Module):
    """Experts that were stored in one parameter, as a list of linear layers for each projection."""

    def __init__(self, experts: nn.Module) -> None:
        """Take a fused module of transformers apart; its tensors are shared, or copied once."""
        super().__init__()
        self.names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
        self.rule = share(experts)  # activation and gate, without the weights
        self.rule._parameters.clear()
        for name in self.names:
            stack = getattr(experts, name)
            biases = getattr(experts, f"{name}_bias", None)
            layers = nn.ModuleList()
            for expert, matrix in enumerate(stack.detach()):
                weight = matrix.T.contiguous() if experts.is_transposed else matrix
                bias = None if biases is None else biases.detach()[expert]
                layers.append(_linear(weight, bias, stack.requires_grad))
            self.add_module(name, layers)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Hidden states (tokens, dim); which experts each token takes, and with which weights."""
        chosen, weights = (*routing, *named.values())
        up, down = (getattr(self, name) for name in self.names)
        result = torch.zeros_like(hidden_states)
        for expert in chosen.unique().tolist():
            if expert >= len(up):  # a place that no expert takes
                continue
            token, place = torch.where(chosen == expert)
            inner = up[expert](hidden_states[token])
            inner = self.rule._apply_gate(inner) if self.rule.has_gate else self.rule.act_fn(inner)
            output = down[expert](inner) * weights[token, place, None]
            result = result.index_add(0, token, output.to(result.dtype))
        return result


def _linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    """A linear layer on these tensors."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, trainable)
    if bias is not None:
        layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, trainable)
    return layer


def _is_conv1d(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    sizes = (getattr(module, "nx", None), getattr(module, "nf", None))
    return type(module).__name__ == "Conv1D" and weight is not None and weight.shape == sizes


def _is_fused(module: nn.Module) -> bool:
    """Whether a module is experts as transformers fuses them, and says how they are laid out."""
    if not all(hasattr(module, word) for word in ("has_gate", "is_transposed", "_apply_gate")):
        return False
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    stacks = [module._parameters.get(name) for name in names]
    return all(stack is not None and stack.ndim == 3 for stack in stacks)


def _apart(module: nn.Module) -> nn.Module | None:
    """The linear form of a module, or None where it has none that computes the same."""
    device = next(module.parameters()).device
    if device.type == "meta":
        return None
    if _is_conv1d(module):
        weight = module.weight.detach().T.contiguous()
        return _linear(weight, module.bias, module.weight.requires_grad).train(module.training)
    layers = ExpertLinears(module).train(module.training)
    up = getattr(layers, layers.names[0])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(16, up[0].in_features, generator=generator).to(up[0].weight)
    chosen = torch.stack([torch.randperm(len(up), generator=generator)[:2] for _ in range(16)])
    chosen, weights = chosen.to(device), torch.ones(chosen.shape).to(up[0].weight)
    with torch.no_grad():  # proved by trying, so that no rule of an architecture is missed
        want, have = (
            module(states, chosen, weights).float(),
            layers(states, chosen, weights).float(),
        )
    return layers if bool((have - want).norm() <= 0.02 * want.norm()) else None


def linear_form(
    model: Model, names: Iterable[str] | None = None
) -> tuple[Model, dict[str, tuple[nn.Module, nn.Module]]]:
    """A model whose `Conv1D` layers and fused experts are linear layers.

    Args:
        model: Any model; it is not changed, and is returned itself when there is nothing to do.
        names: Only modules that these names of linear layers lie in; by default all.

    Returns:
        The model, and by name what was there and what replaced it, for `restore`.
    """
    wanted = None if names is None else set(names)
    made: dict[str, tuple[nn.Module, nn.Module]] = {}
    for path, module in model.named_modules():
        if not (_is_conv1d(module) or _is_fused(module)):
            continue
        if wanted is not None and not any(f"{name}.".startswith(f"{path}.") for name in wanted):
            continue
        new = _apart(module)
        if new is not None:
            made[path] = (module, new)
    if not made:
        return model, made
    result = share(model)
    exchange(result, {result.get_submodule(path): new for path, (_, new) in made.items()})
    return result, made


class _Origins(dict):
    """Skeletons, on the meta device, of what stood in a model's places, by name."""

    def __deepcopy__(self, memo: dict) -> _Origins:
        return self  # nothing in it is ever changed


def restore(model: Model, made: dict[str, tuple[nn.Module, nn.Module]] | None = None) -> Model:
    """The model with the old form around layers that are ordinary; it changes in place.

    What cannot go back yet (a quantized layer, one with a delta) is noted on the model, and goes
    back when it is ordinary again and this function is called without `made`.

    Args:
        model: What became of the model that `linear_form` returned.
        made: The second thing that `linear_form` returned.
    """
    noted = model.__dict__.get("_origins", _Origins())
    if made is None and not noted:
        return model
    known = dict(model.named_modules())
    places = {path: (old, None) for path, old in noted.items()} | (made or {})
    back: dict[nn.Module, nn.Module] = {}
    left = _Origins()
    for path, (old, form) in places.items():
        now = known.get(path)
        again = None if now is None else _together(old, form, now)
        if again is not None:
            back[now] = again.train(now.training)
        elif now is not None:
            left[path] = old if form is None else share(old).to("meta")
    exchange(model, back)
    model.__dict__["_origins"] = left
    return model


def _together(old: nn.Module, form: nn.Module | None, now: nn.Module) -> nn.Module | None:
    """A module of the old form with the weights of today; None where they need the new one."""
    names = now.names if isinstance(now, ExpertLinears) else ("",)
    lists = {name: list(getattr(now, name)) if name else [now] for name in names}
    if not all(type(layer) is nn.Linear for layers in lists.values() for layer in layers):
        return None
    result = shared_skeleton(old)  # its weights may be gone, what it computes is not
    unchanged = form is not None and _same(form, now)
    trained = set()
    for name, layers in lists.items():
        for leaf in ("weight", "bias"):
            tensors = [getattr(layer, leaf) for layer in layers]
            if tensors[0] is None:
                continue
            key = leaf if not name else name if leaf == "weight" else f"{name}_bias"
            before = getattr(old, key)
            flag = tensors[0].requires_grad
            if leaf in getattr(layers[0], "_trainable_before", ()):  # of `effnb.core.deltas.thaw`
                trained.add(key)
            if unchanged and flag == before.requires_grad:
                continue
            value = before.detach() if unchanged else _joined(tensors, bool(name), old, leaf)
            if value.shape != before.shape:
                return None
            setattr(result, key, nn.Parameter(value, flag))
    if trained:
        result._trainable_before = frozenset(trained)
    return result


def _joined(tensors: list[Tensor], experts: bool, old: nn.Module, leaf: str) -> Tensor:
    """Weights or biases of linear layers in the layout of the old form."""
    turned = leaf == "weight" and (not experts or old.is_transposed)
    parts = [t.detach().T if turned else t.detach() for t in tensors]
    return torch.stack(parts) if experts else parts[0].contiguous()


def _same(form: nn.Module, now: nn.Module) -> bool:
    """Whether every parameter of the linear form is still on the same memory."""
    before, after = dict(form.named_parameters()), dict(now.named_parameters())
    return before.keys() == after.keys() and all(
        before[key].data_ptr() == after[key].data_ptr() and before[key].shape == after[key].shape
        for key in before
    )


def in_linear_form(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method, whose first argument is a model, read `Conv1D` layers and fused experts too.

    The method is given the model's linear form; when it returns a model, that has the old form
    wherever its layers are ordinary. A model without such modules goes through as it is.
    """

    @wraps(method)
    def run(model: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        form, made = linear_form(model)
        result = method(form, *arguments, **keywords)
        return restore(result, made) if made and isinstance(result, nn.Module) else result

    return run
