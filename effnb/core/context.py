"""How many tokens a model can read, and whether it reads them from left to right.

Rotary and relative positions go on for ever, though a model is trained up to some length only.
Learned positions are rows of a table: behind the last one there is nothing, and on a GPU reading
there stops the whole process. Which table that is, and which row the first token takes (OPT begins
with row 2, RoBERTa behind its padding), is found by running the model on a few tokens and watching
what is looked up.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effnb.core.modules import share

PROBE = 4
"""Tokens that the model is run on."""


class _Lookups(TorchFunctionMode):
    """Notes the tables of which consecutive rows are read, one for each token."""

    def __init__(self, tables: dict[int, int]) -> None:
        super().__init__()
        self.tables, self.rows_left, self._copies = tables, [], []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if name in ("embedding", "index_select", "gather", "__getitem__"):
            self._note([*arguments, *keywords.values()])
        result = function(*arguments, **keywords)
        if name in ("repeat", "to", "contiguous") and _memory(arguments[0]) in self.tables:
            self.tables[_memory(result)] = self.tables[_memory(arguments[0])]
            self._copies.append(result)  # alive, so that nothing else comes to lie there
        return result

    def _note(self, given: list[Any]) -> None:
        # A table may be sliced or viewed on the way: what counts is the memory it lies in.
        tensors = [t for t in given if isinstance(t, Tensor)]
        for nested in given:
            tensors += [t for t in nested if isinstance(t, Tensor)] if _is_list(nested) else []
        rows = [self.tables[p] for t in tensors if (p := _memory(t)) in self.tables]
        for index in tensors:
            if rows and not index.is_floating_point() and index.dtype != torch.bool:
                flat = index.flatten(2)[..., 0] if index.ndim > 2 else index
                flat = flat[0] if flat.ndim == 2 and len(flat) == 1 else flat
                if flat.shape == (PROBE,) and bool((flat.diff() == 1).all()):
                    self.rows_left.append(rows[0] - int(flat[0]))


def _is_list(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def position_limit(model: nn.Module) -> int | None:
    """The most tokens for which a model has positions; None where they do not end.

    Args:
        model: Anything that runs on `input_ids` alone. Where one does not (an encoder-decoder), its
            tables are not found. A configuration's `max_seq_len` ends ALiBi's biases as well (MPT).

    Raises:
        ValueError: When weights are on the meta device.
    """
    tables = {_memory(t): t.shape[-2] for t in _tables(model)}
    if not tables:
        return _said(model, "max_seq_len")
    quiet = share(model).eval()
    device = next(model.parameters()).device
    lookups = _Lookups(tables)
    # One token again and again, so that no table of words is read row by row.
    ids = torch.full((1, PROBE), 5 if _vocabulary(model) > 5 else 0, device=device)
    try:
        with torch.no_grad(), lookups:
            quiet(input_ids=ids)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError):
        return _said(model, "max_seq_len")
    found = [*lookups.rows_left, _said(model, "max_seq_len")]
    return min((n for n in found if n is not None), default=None)


def _tables(model: nn.Module) -> list[Tensor]:
    """Every matrix that rows could be looked up in, the words' own left out."""
    words = getattr(model, "get_input_embeddings", lambda: None)()
    own = {id(p) for p in words.parameters()} if isinstance(words, nn.Module) else set()
    linear = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return [
        t
        for t in (*model.parameters(), *model.buffers())
        if t.is_floating_point() and t.ndim >= 2 and t.numel() and id(t) not in own | linear
    ]


def _said(model: nn.Module, *keys: str) -> int | None:
    """The smallest of some numbers of the configuration."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [getattr(text, key, None) for key in keys]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def _vocabulary(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "vocab_size", None) or 0


def context_limit(model: nn.Module) -> int | None:
    """The longest text a model is made for: its positions, or what its configuration says.

    Longer texts are possible where positions do not end (rotary, relative, ALiBi), but they are
    not what the model was trained on. None when neither says anything.
    """
    known = (_said(model, "max_position_embeddings"), position_limit(model))
    return min((n for n in known if n is not None), default=None)


def check_context(model: nn.Module, tokens: int, what: str = "context") -> None:
    """Refuse a text that is longer than a model's positions.

    Raises:
        ValueError: When there are fewer positions than tokens; the sentence names both.
    """
    limit = position_limit(model)
    if limit is not None and tokens > limit:
        raise ValueError(f"{what} is {tokens}; this model has positions for {limit} tokens only.")


def check_causal(model: nn.Module, ids: Int[Tensor, "batch time"]) -> None:
    """Refuse a model whose outputs at a token depend on the tokens behind it.

    Its likelihood of the next token is meaningless: it has seen that token (BERT and its kin).
    Eight tokens are run twice, the last of them exchanged. A class that calls itself causal is
    believed: methods that round inputs with one scale for all tokens, or prune tokens, make earlier
    outputs of such a model depend a little on later tokens.

    Raises:
        ValueError: When earlier outputs change with the last token.
    """
    text = ids[:1, :8].to(next(model.parameters()).device)
    if text.shape[1] < 2 or "ForCausalLM" in type(model).__name__:
        return
    other = text.clone()
    other[:, -1] = torch.where(text[:, -1] > 0, text[:, -1] - 1, 1)
    quiet = share(model).eval()
    try:
        with torch.no_grad():
            found = [quiet(input_ids=given) for given in (text, other)]
    except TypeError:  # it must be told more than ids, which only its caller knows
        return
    first, second = (getattr(out, "logits", out).float() for out in found)
    change = (first - second).norm(dim=-1)[0]
    if bool((change[:-1] > 1e-3 * change[-1]).any()):
        raise ValueError(
            f"{type(model).__name__} sees the tokens behind the one it foresees, so its next-token "
            "loss says nothing; it needs its own `loss`."
        )
