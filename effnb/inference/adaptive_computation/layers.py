"""A decoder walked layer by layer, which is what leaving early takes.

`LayerStack` calls the model's own modules one after the other, with one cache for all layers. It
also fills the cache of layers that a token skips: their keys and values come from the state that
the token left with, through each layer's own projections (CALM's state copying).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from effnb.inference.adaptive_computation.exits import check_decoder

State = Float[Tensor, "1 time dim"]


class LayerStack:
    """The layers of a decoder, callable one by one, for one sequence at a time.

    Attributes:
        model: The decoder; its weights are used as they are.
        layers: Its blocks, first to last.
    """

    def __init__(self, model: nn.Module) -> None:
        """Take a decoder apart, and check on three tokens that the parts make the whole.

        Raises:
            ValueError: When the model is laid out otherwise, hides tokens from some layers, or
                its parts do not reproduce its logits and its cache.
        """
        check_decoder(model)
        config = model.config
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        if kinds or getattr(config, "sliding_window", None):
            raise ValueError(
                f"{type(model).__name__} hides distant tokens from some of its layers; leaving "
                "early is made for layers that see all of them."
            )
        self.model, self.layers = model, list(model.model.layers)
        self._check()

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self.layers)

    def new_cache(self) -> DynamicCache:
        """An empty cache for all layers."""
        return DynamicCache(config=self.model.config)

    def embed(self, ids: Int[Tensor, "1 time"]) -> State:
        """The states that the first layer reads."""
        return self.model.model.embed_tokens(ids)

    def rotary(self, state: State, start: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions from `start` on."""
        positions = torch.arange(start, start + state.shape[1], device=state.device)[None]
        return self.model.model.rotary_emb(state, positions)

    def run(
        self,
        state: State,
        cache: DynamicCache,
        first: int,
        last: int,
        rotary: tuple[Tensor, Tensor],
    ) -> State:
        """Layers `first` to `last` - 1, counted from 0; their keys and values enter the cache."""
        time = state.shape[1]
        for index in range(first, last):
            mask = None
            if time > 1:  # new tokens see all of the cache, and each other up to themselves
                past = cache.layers[index].get_seq_length() if index < len(cache.layers) else 0
                mask = torch.ones(time, past + time, dtype=torch.bool, device=state.device)
                mask = mask.tril(past)[None, None]
            out = self.layers[index](
                state,
                attention_mask=mask,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=True,
            )
            state = out[0] if isinstance(out, tuple) else out
        return state

    def copy_state(
        self, state: State, cache: DynamicCache, first: int, rotary: tuple[Tensor, Tensor]
    ) -> None:
        r"""Keys and values of the layers from `first` on, for a token that skips them.

        $k = W_K^{(k+1)} \operatorname{norm}(d^j)$ and $v = W_V^{(k+1)} \operatorname{norm}(d^j)$
        with layer $k+1$'s own norm and projections, and the state $d^j$ the token left with.
        """
        for index in range(first, self.count):
            layer = self.layers[index]
            attention, normed = layer.self_attn, layer.input_layernorm(state)
            shape = (*normed.shape[:2], -1, attention.head_dim)
            keys = attention.k_proj(normed).view(shape).transpose(1, 2)
            values = attention.v_proj(normed).view(shape).transpose(1, 2)
            if hasattr(attention, "k_norm"):
                keys = attention.k_norm(keys)
            keys = apply_rotary_pos_emb(keys, keys, *rotary)[1]
            cache.update(keys, values, index)

    def head(self, state: State) -> Float[Tensor, "1 time vocabulary"]:
        """Logits: the final norm, then the output head."""
        return self.model.lm_head(self.model.model.norm(state))

    @torch.inference_mode()
    def _check(self) -> None:
        """The parts must give the model's logits, and copied states its cache."""
        vocabulary = self.model.get_input_embeddings().weight
        ids = torch.tensor([[1, 2, 3]], device=vocabulary.device) % len(vocabulary)
        whole = self.model(input_ids=ids, use_cache=True)
        cache, copied = self.new_cache(), self.new_cache()
        try:
            state = self.embed(ids)
            rotary = self.rotary(state, 0)
            states = []
            for index in range(self.count):
                states.append(state)
                state = self.run(state, cache, index, index + 1, rotary)
            logits = self.head(state)
            self.copy_state(states[-1], copied, 0, rotary)
        except (AttributeError, TypeError, RuntimeError) as problem:
            raise ValueError(
                f"the layers of {type(self.model).__name__} cannot be called one by one: {problem}"
            ) from None
        last = self.count - 1
        pairs = [
            (logits, whole.logits),
            *(
                (getattr(a.layers[last], kind), getattr(b.layers[last], kind))
                for a, b in ((cache, whole.past_key_values), (copied, cache))
                for kind in ("keys", "values")
            ),
        ]
        for found, wanted in pairs:
            far = (found.float() - wanted.float()).abs().max()
            if not far <= 1e-3 * wanted.float().abs().max().clamp(min=1):
                raise ValueError(
                    f"the layers of {type(self.model).__name__}, called one by one, do not give "
                    "its logits and its cache: it does more than its layers show."
                )


def prompt_ids(ids: Tensor | Sequence[int], model: nn.Module) -> Int[Tensor, "1 time"]:
    """A prompt as one row of tokens on the model's device.

    Raises:
        ValueError: When it is empty, has several rows, or holds a token that the model lacks.
    """
    ids = torch.as_tensor(ids)
    ids = ids[None] if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
        raise ValueError(
            f"a prompt has the shape {tuple(ids.shape)}; give one row of at least one token: "
            "tokens leave at layers of their own, so sequences are decoded one at a time."
        )
    vocabulary = len(model.get_input_embeddings().weight)
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the prompt holds token {int(ids.max())}; the model has tokens 0 to {vocabulary - 1}."
        )
    return ids.to(model.get_input_embeddings().weight.device)


def check_length(model: nn.Module, prompt: int, new: int) -> None:
    """Refuse a text that does not fit into the model's positions.

    Raises:
        ValueError: When nothing is asked for, or prompt and new tokens exceed the positions.
    """
    if new < 1:
        raise ValueError(f"max_new_tokens is {new}; it must be at least 1.")
    most = getattr(model.config, "max_position_embeddings", None)
    if most and prompt + new > most:
        raise ValueError(
            f"the prompt has {prompt} tokens and {new} are to follow; the model has {most} "
            "positions."
        )
