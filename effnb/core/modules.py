"""Find modules by name pattern, and put others in their place without touching the original.

Every method of the workbook is a function from a model to a *new* model: a slider must be able to
go back. The new model shares every tensor that the method did not change, so that fifty settings
of a slider do not need fifty copies of the weights.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import wraps
from typing import Any, TypeVar

from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.coverage import Coverage, coverage, report

Model = TypeVar("Model", bound=nn.Module)

OUTPUTS = "@output heads"
"""A pattern for the output heads of a model, whatever their names; see `output_heads`."""

HEADS = (OUTPUTS, "*.classifier", "classifier", "score")
"""Output heads and classifiers; compression methods leave them alone unless told otherwise."""


def share(model: Model) -> Model:
    """Copy the modules of a model, but not its parameters and buffers: both models hold the same.

    The copy costs kilobytes. Replacing one of its modules, or one of its parameters by another
    object, does not show in the original; writing into a shared tensor in place would.

    Raises:
        ValueError: When weights are on the meta device (offloaded, or never loaded).
    """
    check_loaded(model)
    return shared_skeleton(model)


def shared_skeleton(model: Model) -> Model:
    """What `share` does, also for a model whose weights are on the meta device."""
    kept = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=kept)


def clone(model: Model) -> Model:
    """Copy a model with all its tensors, for what must write into them (training)."""
    return copy.deepcopy(model)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Whether a module's dotted name fits one of the shell-style patterns (`*`, `?`, `[...]`)."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def own_weight(module: nn.Module | None) -> nn.Parameter | None:
    """The parameter `weight` that a module itself holds, if any; properties are not asked."""
    return None if module is None else module._parameters.get("weight")


def _asked(model: nn.Module, method: str) -> nn.Module | None:
    """What a Hugging Face model answers when it is asked for its embedding or head."""
    find = getattr(model, method, None)
    try:
        found = find() if callable(find) else None
    except (NotImplementedError, AttributeError):  # a model of another kind
        return None
    return found if isinstance(found, nn.Module) else None


def output_heads(model: nn.Module) -> list[str]:
    """Names of the modules that turn hidden states into scores of tokens.

    They are what the model gives as `get_output_embeddings`, and every linear layer whose weight is
    an embedding's own table. Only a model that says nothing of its head is searched for `lm_head`.
    """
    head = _asked(model, "get_output_embeddings")
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    tables = {id(own_weight(m)) for m in embeddings} - {id(None)}
    found = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if module is head
        or (not isinstance(module, nn.Embedding) and id(own_weight(module)) in tables)
    ]
    if not callable(getattr(model, "get_output_embeddings", None)):
        found += [name for name, _ in model.named_modules() if matches(name, HEAD_NAMES)]
    return list(dict.fromkeys(found))


HEAD_NAMES = ("lm_head", "*.lm_head", "embed_out")
"""What output heads are called in models that do not say which module is theirs."""


def resolved(model: nn.Module, patterns: str | Iterable[str]) -> list[str]:
    """Name patterns for one model: `OUTPUTS` becomes the names of its output heads."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if OUTPUTS not in patterns:
        return patterns
    heads = [glob.escape(name) for name in output_heads(model)]
    return [pattern for pattern in patterns if pattern != OUTPUTS] + heads


@dataclass(frozen=True)
class Layers:
    """Which layers a method changes: those whose dotted name fits `include`, and not `exclude`.

    Patterns are shell-style (`*`, `?`, `[...]`): "*.mlp.*", or several in a list. Wherever a method
    takes `layers`, a pattern or a list of them is short for `Layers(pattern)`: output heads are
    then left alone.
    """

    include: str | Iterable[str] = "*"
    exclude: str | Iterable[str] = HEADS

    @classmethod
    def of(cls, choice: LayerChoice) -> Layers:
        """The choice itself, or what patterns are short for."""
        return choice if isinstance(choice, cls) else cls(choice)

    def on(self, model: nn.Module) -> Layers:
        """The same for one model, its output heads by their names."""
        return Layers(resolved(model, self.include), resolved(model, self.exclude))

    def fit(self, name: str) -> bool:
        """Whether a layer of that name is among them."""
        return matches(name, self.include) and not matches(name, self.exclude)


LayerChoice = Layers | str | Iterable[str]
"""What methods take as `layers`."""


def chooses_layers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method be told `include=` and `exclude=`, short for `layers=Layers(include, exclude)`.

    Whichever of the two is left out keeps its default. The method raises a TypeError when it is
    given `layers` as well.
    """

    @wraps(method)
    def run(*arguments: Any, **keywords: Any) -> Any:
        named = {key: keywords.pop(key) for key in ("include", "exclude") if key in keywords}
        if named and "layers" in keywords:
            raise TypeError(f"{method.__name__} takes either layers, or include and exclude.")
        if named:
            keywords["layers"] = Layers(**named)
        return method(*arguments, **keywords)

    return run


def named_modules_of(
    model: nn.Module, kind: type | tuple[type, ...], layers: Layers = Layers(exclude=())
) -> dict[str, nn.Module]:
    """All modules of a kind whose dotted name fits.

    Raises:
        ValueError: When none fits; the sentence names some that exist. When weights are on the meta
            device (offloaded, or never loaded).
    """
    check_loaded(model)
    wanted = layers.on(model)
    everything = {name: m for name, m in model.named_modules() if isinstance(m, kind)}
    found = {name: module for name, module in everything.items() if wanted.fit(name)}
    if not found:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        known = ", ".join(list(everything)[:3]) or "none at all"
        raise ValueError(
            f"no {' or '.join(k.__name__ for k in kinds)} fits the pattern "
            f"{', '.join(wanted.include)}; the model has {known}"
            f"{', …' if len(everything) > 3 else ''}.{_otherwise(model, layers)}"
        )
    return found


def linears(model: nn.Module, layers: LayerChoice = "*") -> dict[str, nn.Linear]:
    """The linear layers of a model by name; output heads are left out by default.

    Weights of other modules that were asked for are reported; see `report_left_out`.
    """
    found = named_modules_of(model, nn.Linear, Layers.of(layers))
    report_left_out(model, found.values(), layers)
    return found


def left_out(model: nn.Module, covered: Iterable[nn.Module], layers: LayerChoice = "*") -> Coverage:
    """Which weights a method leaves as they are that was asked for all that fits the patterns."""
    return coverage(model, covered, Layers.of(layers).on(model).fit)


def report_left_out(
    model: nn.Module,
    covered: Iterable[nn.Module],
    layers: LayerChoice = "*",
    why: str = "only linear layers are compressed",
) -> None:
    """Warn with `LeftOut` when weights that fit the patterns are in none of the covered modules."""
    report(left_out(model, covered, layers), why)


def _otherwise(model: nn.Module, layers: LayerChoice) -> str:
    """A sentence on weights that fit the patterns, but are in no linear layer."""
    found = left_out(model, (), layers)
    return f" {str(found)[:1].upper()}{str(found)[1:]}." if found.left_out else ""


def replace_modules(model: Model, new: Mapping[str, nn.Module]) -> Model:
    """A model with the named modules replaced; everything else is shared with the original.

    A module that is used in several places is replaced in all of them, whichever is named; the
    places may be named one by one with different modules, too. An output head that no longer has
    the embedding's tensor is no longer called tied; see `settle_tying`.

    Raises:
        KeyError: When a name is not a module of the model.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in new if name not in known or name == ""]
    if unknown:
        raise KeyError(f"the model has no module named {unknown[0]!r}.")
    result = share(model)
    put_modules(result, new)
    return settle_tying(result)


def put_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put modules in the place of others, everywhere these are used; the model itself changes."""
    exchange(model, {model.get_submodule(name): module for name, module in new.items()})
    for name, module in new.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)


def exchange(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Put each module of `new` wherever the model uses the one it replaces; the model changes."""
    places = [
        (parent, leaf, new[child])
        for parent in model.modules()
        for leaf, child in parent._modules.items()
        if child in new
    ]
    for parent, leaf, module in places:
        setattr(parent, leaf, module)


def settle_tying(model: Model) -> Model:
    """Make the configuration of a model say whether head and embedding are tied, and return it.

    A Hugging Face model whose configuration says `tie_word_embeddings` has its head overwritten by
    the embedding when it is loaded or its vocabulary changes. So the flag is cleared, in place,
    when the head holds a weight other than the embedding's. It is never set.
    """
    head = _asked(model, "get_output_embeddings")
    table = own_weight(_asked(model, "get_input_embeddings"))
    if head is None or own_weight(head) is table:
        return model
    own: list[Tensor] = [t for name, t in head.named_parameters() if name != "bias"]
    if not own + list(head.buffers()):  # it reads the embedding's tensors in another form
        return model
    if table is not None and any(tensor is table for tensor in own):  # tied inside a wrapper
        return model
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    for part in (config, text() if callable(text) else None):
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    bias = head._parameters.get("bias")
    inside = {id(module) for module in head.modules()}
    others = (m for m in model.modules() if id(m) not in inside)
    shared = any(bias is p for m in others for p in m._parameters.values())
    if config is not None and bias is not None and shared:
        # BERT ties the bias by the same flag: untied, it is saved and loaded by itself.
        own_head = share(head)
        own_head.bias = nn.Parameter(bias.detach().clone(), bias.requires_grad)
        exchange(model, {head: own_head})
    return model


def map_linears(
    model: Model,
    function: Callable[[str, nn.Linear], nn.Module],
    layers: LayerChoice = "*",
) -> Model:
    """Replace each fitting linear layer by `function(name, layer)`."""
    return replace_modules(
        model, {name: function(name, m) for name, m in linears(model, layers).items()}
    )


def find_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """All stacks of blocks of a model by dotted name: one in a decoder, two in an encoder-decoder.

    A stack is an outermost `nn.ModuleList` whose entries have modules inside. When there is none,
    the list that `find_blocks` finds is the only stack.

    Raises:
        ValueError: As `find_blocks`.
    """
    found: dict[str, nn.ModuleList] = {}

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            blocks = isinstance(child, nn.ModuleList) and len(child) and all(
                any(True for _ in entry.children())
                and not isinstance(entry, nn.ModuleList | nn.ModuleDict)
                for entry in child
            )  # fmt: skip
            if blocks:
                found[path] = child
            else:
                search(child, path)

    search(model, "")
    return found or dict([find_blocks(model)])


def refuse_encoder_decoder(model: nn.Module, method: str) -> None:
    """Refuse a model of two stacks, for methods that follow one residual stream.

    Raises:
        ValueError: When the model's configuration says that it is an encoder-decoder.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder and a decoder with a residual stream each; "
            f"{method} follows one stream only."
        )


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of equal blocks that a transformer consists of, with its dotted name.

    It is the longest `nn.ModuleList` whose entries are all of one class; of several equally long,
    the outermost.

    Raises:
        ValueError: When the model has no such list.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        uniform = isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1
        if uniform and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise ValueError("the model has no list of equal blocks (an nn.ModuleList of one class).")
    return best


def in_several_blocks(model: nn.Module) -> list[str]:
    """Names of the modules that more than one block of a model uses, by their first places."""
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    users: dict[nn.Module, set[nn.Module]] = {}
    for blocks in find_stacks(model).values():
        for block in blocks:
            for module in block.modules():
                users.setdefault(module, set()).add(block)
    return [names[module] for module, blocks in users.items() if len(blocks) > 1]


def first_names(model: nn.Module) -> dict[str, str]:
    """Of every place in a model, the first name of the module there: its own, or another's."""
    first: dict[nn.Module, str] = {}
    return {
        name: first.setdefault(module, name)
        for name, module in model.named_modules(remove_duplicate=False)
    }


def parted(model: Model) -> Model:
    """A copy with a module for each place, where one stands in several; tensors stay shared.

    For what tells places apart by the modules in them: each can be hooked alone.
    """
    result = share(model)
    seen: set[nn.Module] = set()

    def visit(module: nn.Module) -> None:
        for leaf, child in list(module._modules.items()):
            if child is None:
                continue
            if child in seen:
                child = share(child)
                setattr(module, leaf, child)
            seen.add(child)
            visit(child)

    visit(result)
    return result
