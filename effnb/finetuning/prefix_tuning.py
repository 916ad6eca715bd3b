r"""Prefix tuning: train keys and values of positions that no token has, in every layer.

In front of the keys and values of a text, each attention reads $l$ trained ones,

$$K' = [P_k; K], \qquad V' = [P_v; V], \qquad P_k, P_v \in \mathbb{R}^{l \times d},$$

split into heads, $2 L l d$ numbers for $L$ layers. A head's output is then a mixture,

$$\text{Attn}(q, K', V') = (1 - \lambda)\, \text{Attn}(q, K, V)
  + \lambda\, \text{Attn}(q, P_k, P_v),$$

with $\lambda$ the part of the softmax's weight that the prefix takes (He et al.). Trained directly,
$P$ is unstable; so it is computed from a smaller table while it trains,

$$P_{i,:} = \text{MLP}(P'_{i,:}) = W_2 \tanh(W_1 P'_{i,:} + b_1) + b_2, \qquad
  P' \in \mathbb{R}^{l \times d},\ W_1 \in \mathbb{R}^{k \times d},$$

and only $P$ is kept afterwards (`drop_reparametrization`). There is no start at which a prefix
changes nothing, and no weight that it could be merged into.

The text's positions begin behind the prefix. Outside, nothing tells: masks, positions, caches and
the length of what comes out are those of the text.

Li, Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv 2101.00190.
The mixture: He, Zhou, Ma, Berg-Kirkpatrick, Neubig, "Towards a Unified View of Parameter-Efficient
Transfer Learning", 2021, arXiv 2110.04366.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from effnb.core.checks import check_loaded
from effnb.core.delta_files import attach_state
from effnb.core.delta_kinds import Delta
from effnb.core.deltas import (
    attach_deltas,
    check_name,
    hosts,
    key_of,
    refuse_rounded_inputs,
    set_trainable,
)
from effnb.core.modules import Model
from effnb.core.virtual_tokens import (
    Given,
    KeysValues,
    backbone,
    check_length,
    fresh_cache,
    give_back,
    keys_values_of,
    named,
    outermost,
    refuse_checkpointing,
    shape_of,
    study,
    text_mask,
    text_positions,
    virtual_cache,
    widened,
)
from effnb.finetuning import peft_files

_REPARAMETRIZED = ("table", "W1", "b1", "W2", "b2")


class PrefixTuning(Delta):
    r"""Keys and values in front of those of a text, in every layer of one backbone.

    The flat $P$ holds, for each position, the keys of the first layer (all heads), its values, the
    keys of the second, and so on.

    Attributes:
        prefix: $P$, (length, size); only without the MLP.
        table: $P'$, (length, width); this and the next four only with it.
        W1: (hidden, width).
        b1: (hidden,).
        W2: (size, hidden).
        b2: (size,).
    """

    kind = "prefix"
    in_place = True

    def __init__(
        self,
        base: nn.Module,
        *,
        length: int,
        hidden: int = 0,
        width: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Draw the tensors for a backbone; see `attach` for what the numbers mean.

        Raises:
            ValueError: When one of them is out of range, or the model cannot read a prefix.
        """
        super().__init__()
        check_settings(length, hidden)
        self.reader = reader = study(base)
        if not reader.keys_values:
            raise ValueError(
                f"not every layer of {type(base).__name__} reads its keys and values from a "
                "transformers cache, which is where a prefix is put."
            )
        if reader.sliding:
            raise ValueError(
                f"{type(base).__name__} has layers that only attend to near tokens and would lose "
                "sight of a prefix; prefix tuning needs attention to everything."
            )
        check_length(reader, 1, length, "a prefix")
        self.length, self.hidden = length, hidden
        size = sum(heads * dim for layer in reader.keys_values for heads, dim in layer)
        like = next(base.parameters())
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32

        def drawn(*shape: int, bound: float | None = None) -> nn.Parameter:
            new = torch.empty(*shape, dtype=dtype)  # drawn on the CPU: the same on every device
            if bound is None:
                new.normal_(generator=generator)
            else:
                new.uniform_(-bound, bound, generator=generator)
            return nn.Parameter(new.to(like.device))

        if not hidden:
            self.prefix = drawn(length, size)
            return
        width = width or base.get_input_embeddings().weight.shape[1]
        self.table = drawn(length, width)
        self.W1, self.b1 = drawn(hidden, width, bound=width**-0.5), drawn(hidden, bound=width**-0.5)
        self.W2, self.b2 = drawn(size, hidden, bound=hidden**-0.5), drawn(size, bound=hidden**-0.5)

    def flat(self) -> Float[Tensor, "length size"]:
        r"""$P$, computed where there is an MLP."""
        if not self.hidden:
            return self.prefix
        # P[i] = W_2 tanh(W_1 P'[i] + b_1) + b_2
        inner = torch.tanh(nn.functional.linear(self.table, self.W1, self.b1))
        return nn.functional.linear(inner, self.W2, self.b2)

    def keys_values(self) -> list[KeysValues]:
        """Keys and values of each layer, (1, heads, length, dim)."""
        shapes = [shape for layer in self.reader.keys_values for shape in layer]
        parts = self.flat().split([heads * dim for heads, dim in shapes], dim=1)
        by_head = [
            part.view(1, self.length, heads, dim).transpose(1, 2)
            for part, (heads, dim) in zip(parts, shapes, strict=True)
        ]
        return list(zip(by_head[::2], by_head[1::2], strict=True))

    def around(
        self, run: Callable[..., Any], base: nn.Module, *arguments: Any, **keywords: Any
    ) -> Any:
        """Run the backbone on a text behind the prefix."""
        given = named(base, arguments, keywords)
        refuse_checkpointing(base)
        cache = given.get("past_key_values")
        if cache is None:
            cache = fresh_cache(base, self.reader, given)
        past = 0 if cache is None else int(cache.get_seq_length())
        check_length(self.reader, past + shape_of(given)[1], self.length, "a prefix")
        mask = text_mask(given, past)
        positions = text_positions(given, self.reader, mask, self.length)
        given |= {} if positions is None else {"position_ids": positions}
        output = run(
            **given
            | {
                "attention_mask": widened(mask, self.length),
                "past_key_values": virtual_cache(cache, Given(self.keys_values())),
                "return_dict": True,
            }
        )
        return give_back(output, outermost(cache), keywords)

    def merged(self, base: nn.Module) -> nn.Module:
        """Refuse."""
        raise ValueError(
            "a prefix adds keys and values that do not depend on the text, which no weight makes; "
            "keep it attached (drop_reparametrization makes it as small as it gets)."
        )

    @classmethod
    def rebuild(
        cls, base: nn.Module, settings: dict[str, Any], tensors: dict[str, Tensor]
    ) -> PrefixTuning:
        """Make the prefix that a file's tensors fit into."""
        table, hidden, width = tensors.get("prefix"), 0, None
        if set(tensors) == set(_REPARAMETRIZED) and tensors["W1"].ndim == 2:
            table = tensors["table"]
            hidden, width = tensors["W1"].shape
        elif set(tensors) != {"prefix"}:
            table = None
        if table is None or table.ndim != 2:
            raise ValueError(
                f"a prefix is one matrix, or one and an MLP ({', '.join(_REPARAMETRIZED)}); found "
                f"{', '.join(tensors)}."
            )
        _check_backbone(base)
        return cls(base, length=len(table), hidden=hidden, width=width, **settings)

    def extra_repr(self) -> str:
        """Length, and the MLP's size."""
        return f"length={self.length}, hidden={self.hidden}"


def _check_backbone(base: nn.Module) -> None:
    if not hasattr(base, "get_input_embeddings"):
        raise ValueError(f"a prefix sits on a whole transformer; this is a {type(base).__name__}.")


def check_settings(length: int, hidden: int) -> None:
    """Refuse numbers that no model could take.

    Raises:
        ValueError: A length below 1, or an MLP of negative size.
    """
    if length < 1:
        raise ValueError(f"length is {length}; a prefix has at least 1 position.")
    if hidden < 0:
        raise ValueError(f"hidden is {hidden}; it must be at least 1, or 0 for no MLP.")


def attach(
    model: Model,
    name: str = "default",
    *,
    length: int = 10,
    hidden: int = 512,
    ids: Int[Tensor, " length"] | None = None,
    seed: int = 0,
) -> Model:
    """Freeze a model and put a trainable prefix in front of the keys and values of each layer.

    Args:
        model: A Hugging Face decoder or encoder whose layers attend to everything and read their
            keys and values from a transformers cache; it is not changed.
        name: What to call this delta.
        length: l, positions of the prefix.
        hidden: k, the inner size of the MLP that makes the prefix while it trains; 0 to train the
            prefix itself.
        ids: Tokens whose keys and values the prefix starts from, without an MLP. A causal model
            then starts as if the text came after these tokens, and `length` is their number.
        seed: Seed of the start values.

    Returns:
        A new model on the same frozen tensors; only the prefix, or what makes it, requires
        gradients.

    Raises:
        ValueError: A number out of range, a name that is taken, a prefix as long as the context, or
            a model that cannot read one; see `PrefixTuning`.
    """
    check_settings(length, hidden)
    check_loaded(model)
    check_name(model, name)
    refuse_rounded_inputs(model)
    if ids is not None and (hidden or not ids.numel()):
        raise ValueError("a prefix starts from ids only without an MLP (hidden=0), and from some.")
    path = backbone(model)
    base = model.get_submodule(path)
    length = length if ids is None else ids.numel()
    generator = torch.Generator().manual_seed(seed)
    delta = PrefixTuning(base, length=length, hidden=hidden, generator=generator)
    if ids is not None:
        given = ids.reshape(1, -1).to(next(base.parameters()).device)
        tables = [t.transpose(1, 2).flatten(2)[0] for kv in keys_values_of(base, given) for t in kv]
        delta.prefix = nn.Parameter(torch.cat(tables, 1).to(delta.prefix))
    return attach_deltas(model, name, {path: delta})


def drop_reparametrization(model: Model, name: str = "default") -> Model:
    """The model with the prefix itself in place of what computes it, for use after training.

    Returns:
        A new model with the same function, in which this prefix is what requires gradients.

    Raises:
        ValueError: When no prefix of that name is attached, or it has no MLP.
    """
    old = _prefix(model, name)
    if not old.hidden:
        raise ValueError(f"the prefix {name!r} has no MLP to drop.")
    result = set_trainable(model, name)
    for host in hosts(result, name).values():
        new = PrefixTuning(host, length=old.length)
        new.prefix = nn.Parameter(old.flat().detach().clone())
        host.deltas[name] = new.train(host.training)
    return result


def _prefix(model: nn.Module, name: str) -> PrefixTuning:
    found = next(iter(hosts(model, name).values())).deltas[name]
    if not isinstance(found, PrefixTuning):
        raise ValueError(f"the delta {name!r} is of kind {found.kind!r}, not a prefix.")
    return found


# --- the files of the library peft ----------------------------------------------------------------

_KNOWN: peft_files.Known = {
    "peft_type": ("PREFIX_TUNING",),
    **peft_files.VIRTUAL,
    # How training started, and what computed the prefix: files hold the prefix itself.
    "init_weights": (None, "zero"),
    "prefix_projection": (True, False),
    "encoder_hidden_size": None,
    "task_type": (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"),
}


def save_peft(model: nn.Module, name: str, folder: str | os.PathLike) -> None:
    """Write a prefix as a folder that `peft.PeftModel.from_pretrained` reads.

    Raises:
        ValueError: When no prefix of that name is attached, or the layers' heads differ in size,
            which these files do not hold.
    """
    prefix = _prefix(model, name)
    shapes = prefix.reader.keys_values
    ((heads, dim),) = {s for layer in shapes for s in layer} if _equal(shapes) else [(0, 0)]
    if not heads:
        raise ValueError("the layers differ in their heads, which these files do not hold.")
    about = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM" if prefix.reader.causal else "FEATURE_EXTRACTION",
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        "num_layers": len(shapes),
        "prefix_projection": False,
    }
    peft_files.write_virtual_tokens(prefix.flat(), about, folder)


def _equal(shapes: tuple) -> bool:
    return len({shape for layer in shapes for shape in layer}) == 1


def load_peft(model: Model, folder: str | os.PathLike, name: str = "default") -> Model:
    """Attach a prefix that the library peft saved.

    Raises:
        ValueError: When the folder holds another method, a setting that is not understood (prefixes
            of encoder-decoders, modules trained beside it), or a matrix of another model's size.
        FileNotFoundError: When a file is missing.
    """
    table = peft_files.read_virtual_tokens(folder, _KNOWN)
    state = {key_of(backbone(model), "prefix"): table}
    return attach_state(model, name, "prefix", {}, state)
