r"""One token at a time, without what Python adds to it: the decoding step of a packed Llama.

Generating a token with packed weights reads $\sum_W b_W$ bytes, the stored bytes of all matrices,
once. At a bandwidth of $\beta$ bytes per second that takes $\sum_W b_W / \beta$ seconds, a few
milliseconds for a hundred megabytes. Beside it the modules of a general library spend as long
again on one CPU core: thirty blocks of a dozen modules each, about two thousand calls, a cache that
is copied whole for every token, and masks that let everything through. Here the same arithmetic is
written down once, as a list of products over plain tensors:

- queries, keys and values are one product, and so are gate and up-projection: their codes stand
  one behind the other in memory, and the layers of the model hold views of it (no second copy);
- keys and values are written in place into a store with room for more tokens, which doubles when
  it is full: $n$ tokens are copied at most once more, not $n^2/2$ times;
- there is no mask where every key may be seen, which is the case for one new token without padding;
- what was prepared is checked by identity for every token: exchange a layer, load other weights,
  hook a module, and the ordinary path is taken, or the list is made again.

Every rounding happens where the model's own modules have it, in the same order, so logits are the
same to the last bits of float32. The model stays a `LlamaForCausalLM`: `generate` with sampling,
stop tokens and streamers, batches with left padding, and the cache of transformers work as before.
What the step does not know (gradients, hidden states, other caches, several tokens at a time,
adapters, biases) runs through the model's own modules. A model that was once asked for its hidden
states keeps the hooks that transformers installs for them, and decodes through its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from effnb.core.modules import Model
from effnb.inference.quantization.compiled import CompiledStep, fits, library
from effnb.inference.quantization.packed import PANEL, PackedTensor, machine

ROOM = 128
"""Tokens of room that a store gets at least beside those it holds."""


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer of a `DynamicCache`, with room for the tokens to come.

    Everything that transformers does with a layer (crop, reorder for a beam search, append a
    prompt) works: it sees `keys` and `values` as tensors of the tokens so far. Where others
    are put in their place the layer has no room, and the next decoding step makes room again.

    Attributes:
        store: Keys, then values, of all heads; None while the layer has no room.
        length: Tokens in the store.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        """Take over the tensors of a layer that has some."""
        super().__init__()
        self.store: Float[Tensor, "batch heads room size"] | None = None
        self.length = 0
        self.keys, self.values = layer.keys, layer.values
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True

    @property
    def keys(self) -> Tensor | None:
        """The keys of the tokens so far: `[batch, heads, length, size]`."""
        return self._seen(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        """Put others in their place."""
        self._replace(0, value)

    @property
    def values(self) -> Tensor | None:
        """The values of the tokens so far: `[batch, heads, length, size]`."""
        return self._seen(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        """Put others in their place."""
        self._replace(1, value)

    def _seen(self, which: int) -> Tensor | None:
        store = self.__dict__.get("store")
        if store is None:
            return self.__dict__.get("_plain", (None, None))[which]
        half = store.shape[1] // 2
        return store[:, which * half : (which + 1) * half, : self.length]

    def _replace(self, which: int, value: Tensor | None) -> None:
        both = [self._seen(0), self._seen(1)]
        both[which] = value
        self.__dict__["_plain"], self.__dict__["store"] = both, None

    def make_room(self) -> None:
        """Make sure that one more token can be written in place, by one copy at most."""
        store = self.store
        if store is not None and self.length < store.shape[2]:
            writable = not store.is_inference() or torch.is_inference_mode_enabled()
            if writable:
                return
        keys, values = self.keys, self.values
        batch, heads, length, size = keys.shape
        room = max(2 * length, length + ROOM)
        self.store = keys.new_empty(batch, 2 * heads, room, size)
        self.store[:, :heads, :length], self.store[:, heads:, :length] = keys, values
        self.length, self.__dict__["_plain"] = length, (None, None)


# ------------------------------------------------------------------------- products side by side


def side_by_side(weights: Sequence[PackedTensor]) -> list[PackedTensor] | None:
    """The same weights as views of codes and scales that stand one behind the other.

    One product with what `joined` makes of them computes all of their outputs.

    Returns:
        The new weights, or None where the kernel cannot see them as one matrix: other formats,
        groups or inputs, columns in an order, or rows that do not fill whole panels.
    """
    if not _alike(weights):
        return None
    rows = [weight.shape[0] for weight in weights]

    def parts(name: str, dim: int) -> list[Tensor | None]:
        tensors = [getattr(weight, name) for weight in weights]
        if tensors[0] is None:
            return tensors
        return list(torch.cat(tensors, dim).split(rows, dim))

    dim = 0 if weights[0].kind == "int8" else 1
    new = zip(parts("codes", 0), parts("scales", dim), parts("row_scales", 0), rows)
    first = weights[0]
    return [
        PackedTensor(c, s, r, None, first.kind, first.layout, (n, first.shape[1]))
        for c, s, r, n in new
    ]


def _alike(weights: Sequence[PackedTensor]) -> bool:
    first = weights[0]

    def form(w: PackedTensor) -> tuple[Any, ...]:
        per_row = w.row_scales is None, w.scales.dim(), w.scales.dtype, len(w.scales)
        return w.kind, w.layout, w.shape[1], per_row if w.kind != "int8" else 0

    whole = all(w.shape[0] % PANEL == 0 or w.kind == "int8" for w in weights)
    return whole and all(form(w) == form(first) and w.order is None for w in weights)


def joined(weights: Sequence[PackedTensor]) -> PackedTensor | None:
    """The matrix whose rows are those of all these weights, without copying; None if it is none."""
    if len(weights) == 1:
        return weights[0]
    if not _alike(weights):
        return None
    dim = 0 if weights[0].kind == "int8" else 1
    found = [
        _joined([getattr(weight, name) for weight in weights], of)
        for name, of in (("codes", 0), ("scales", dim), ("row_scales", 0))
    ]
    per_row = weights[0].row_scales is not None
    if found[0] is None or found[1] is None or (found[2] is not None) != per_row:
        return None
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return PackedTensor(*found, None, weights[0].kind, weights[0].layout, shape)


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """One view of tensors that stand one behind the other along an axis of the same storage."""
    first = parts[0]
    if first is None:
        return None
    at, home = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        here = part.untyped_storage().data_ptr(), part.storage_offset(), part.stride()
        if here != (home, at, first.stride()):
            return None
        at += part.shape[dim] * first.stride(dim)
    shape = list(first.shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    view = first.as_strided(shape, first.stride())
    return view if view.is_contiguous() else None


# ---------------------------------------------------------------------------------------- the step


_PARTS = (LlamaDecoderLayer, LlamaAttention, LlamaMLP)


class Unfit(Exception):
    """Why a model's modules are not what the decoding step knows; the ordinary path takes them."""


class Step:
    """The decoding step of one model, prepared: every product with its tensors, ready to be called.

    Attributes:
        watched: Where each tensor and module that was prepared hangs: (dictionary, name, object).
        hooks: The dictionaries of hooks of all modules, which must stay empty.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        """Prepare a model.

        Raises:
            Unfit: When a part of it is not what the step knows; the sentence says which.
        """
        self.watched: list[tuple[dict[str, Any], str, Any]] = []
        self.weights: list[list[PackedTensor]] = []
        self.limits: list[int] = []
        modules = list(model.modules())
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        if any(self.hooks) or any("forward" in module.__dict__ for module in modules):
            raise Unfit("a module is hooked, or its forward was replaced")
        self.hooked = RemovableHandle.next_id
        for module in modules:
            self.watched += [(module._modules, k, m) for k, m in module._modules.items()]
        body, config = model.model, model.config
        if type(body) is not LlamaModel or type(body.rotary_emb) is not LlamaRotaryEmbedding:
            raise Unfit("the body is no plain Llama")
        self.embedding = self._take(body.embed_tokens, "weight")
        self.dtype = self.embedding.dtype
        if type(body.embed_tokens) is not nn.Embedding or body.embed_tokens.max_norm is not None:
            raise Unfit("the embedding is no plain table")
        if not self.dtype.is_floating_point or self.dtype.itemsize > 4:
            raise Unfit(f"numbers are {self.dtype}, which the kernels do not take")
        self.rotary = body.rotary_emb
        self.blocks = [self._block(block, config) for block in body.layers]
        self.norm = self._norm(body.norm)
        self.head = self._products(model, ["lm_head"])
        self.limit = min(self.limits)
        self.compiled = self._compiled(config)
        self.homes, self.names, self.values = zip(*self.watched)

    def _take(self, module: nn.Module, name: str) -> Tensor:
        """A parameter or buffer of a module, watched from now on."""
        home = module._parameters if name in module._parameters else module._buffers
        self.watched.append((home, name, home[name]))
        return home[name]

    def _norm(self, module: nn.Module) -> tuple[Tensor, float]:
        if type(module) is not LlamaRMSNorm:
            raise Unfit(f"{type(module).__name__} is not the norm of a Llama")
        weight = self._take(module, "weight")
        if weight.dtype != self.dtype:
            raise Unfit("norms and embedding have different types")
        return weight, module.variance_epsilon

    def _products(self, parent: nn.Module, names: list[str]) -> list[Callable[[Tensor], Tensor]]:
        """One product for all of these layers where they stand side by side, else one for each."""
        weights = []
        for name in names:
            layer = getattr(parent, name)
            if not _is_packed(layer):
                raise Unfit(f"{name} is a {type(layer).__name__}, which is not packed")
            if layer.bias is not None:
                raise Unfit(f"{name} has a bias")
            for tensor in layer.description["tensors"]:
                self._take(layer, tensor)
            weights.append(layer.quantized)
        together = joined(weights)
        chosen = weights if together is None else [together]
        self.limits += [weight.rows_limit for weight in chosen]
        self.weights.append(chosen)
        return [_product(weight) for weight in chosen]

    def _block(self, block: nn.Module, config: Any) -> tuple[Any, ...]:
        attention, mlp = block.self_attn, block.mlp
        for part, kind in zip((block, attention, mlp), _PARTS):
            if type(part) is not kind:
                raise Unfit(f"{type(part).__name__} is not {kind.__name__}")
        act = mlp.act_fn
        silu = isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"
        return (
            self._norm(block.input_layernorm),
            self._products(attention, ["q_proj", "k_proj", "v_proj"]),
            self._products(attention, ["o_proj"]),
            attention.scaling,
            attention.head_dim,
            config.num_key_value_heads,
            self._norm(block.post_attention_layernorm),
            self._products(mlp, ["gate_proj", "up_proj"]),
            nn.functional.silu if silu else act,
            self._products(mlp, ["down_proj"]),
        )

    def _compiled(self, config: Any) -> CompiledStep | None:
        """The compiled function for one sequence, where there is one and it knows this model."""
        silu = all(block[8] is nn.functional.silu for block in self.blocks)
        size, eps = self.blocks[0][4], {block[i][1] for block in self.blocks for i in (0, 6)}
        plain = silu and self.dtype == torch.float32 and size % 16 == 0 and len(eps) == 1
        known = all(len(w) == 1 and fits(w[0]) for w in self.weights)
        inner = self.weights[2][0].shape[0] // 2
        built = library() if plain and known and inner % 16 == 0 else None
        if built is None:
            return None
        names = ("qkv", "out", "gate_up", "down")
        of_blocks = [self.weights[i : i + 4] for i in range(0, 4 * len(self.blocks), 4)]
        blocks = [
            (block[0][0], block[6][0], {name: w[0] for name, w in zip(names, weights)})
            for block, weights in zip(self.blocks, of_blocks)
        ]
        return CompiledStep(
            built.effnb_step,
            blocks,
            self.norm[0],
            self.weights[-1][0],
            hidden=self.embedding.shape[1],
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            size=size,
            inner=inner,
            eps=self.norm[1],
            scale=self.blocks[0][3],
        )

    def holds(self) -> bool:
        """Whether everything that was prepared is still what the model consists of."""
        if RemovableHandle.next_id != self.hooked:  # somebody hooked something
            if any(self.hooks):
                return False
            self.hooked = RemovableHandle.next_id
        found = map(dict.get, self.homes, self.names)  # a thousand look-ups for every token
        return self.embedding.dtype is self.dtype and all(map(is_, found, self.values))

    def __call__(
        self,
        ids: Int[Tensor, "batch 1"],
        layers: Sequence[RoomyLayer],
        positions: Int[Tensor, "batch 1"],
        seen: Tensor | None,
    ) -> Float[Tensor, "batch 1 vocabulary"]:
        """Logits of the token after these; their keys and values are written into the layers.

        Args:
            ids: The newest token of each sequence.
            layers: Keys and values of the tokens before, with room for one more.
            positions: Place of the tokens in their sequences.
            seen: Which keys each sequence may see, `[batch, 1, 1, time]`; None for all.
        """
        batch, dtype, end = len(ids), self.dtype, layers[0].length + 1
        h = nn.functional.embedding(ids[:, 0], self.embedding)
        cos, sin = self.rotary(h, positions)  # [batch, 1, size]
        if self.compiled is not None and batch == 1 and seen is None:
            stores = [layer.store for layer in layers]
            logits = self.compiled(h, cos, sin, stores, end - 1)
            for layer in layers:
                layer.length = end
            return logits.unsqueeze(1)
        half = cos.shape[-1] // 2
        # HF: rotate_half(x) = (-x2, x1). Here the sign goes to the sine: the same product.
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        for block, layer in zip(self.blocks, layers):
            norm1, qkv, out, scale, size, kv_heads, norm2, gate_up, act, down = block
            x = _together(qkv, _rms_norm(h, *norm1), dtype).view(batch, -1, size)
            turned = x[:, :-kv_heads]  # queries, keys; then the values, which have no place
            swapped = turned.view(batch, -1, 2, half).flip(2).view(turned.shape)
            torch.add(turned * cos, swapped.mul_(sin), out=turned)
            store = layer.store
            store[:, :, end - 1].copy_(x[:, -2 * kv_heads :])
            a = nn.functional.scaled_dot_product_attention(
                x[:, : -2 * kv_heads].unsqueeze(2),
                store[:, :kv_heads, :end],
                store[:, kv_heads:, :end],
                attn_mask=seen,
                scale=scale,
                enable_gqa=True,
            )
            h = h + out[0](a.view(batch, -1)).to(dtype)
            x = _together(gate_up, _rms_norm(h, *norm2), dtype)
            gate, up = x.chunk(2, 1)
            h = h + down[0](act(gate) * up).to(dtype)
            layer.length = end
        return self.head[0](_rms_norm(h, *self.norm)).to(dtype).unsqueeze(1)


def _is_packed(layer: nn.Module) -> bool:
    return hasattr(type(layer), "quantized") and isinstance(layer.quantized, PackedTensor)


def _rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    r"""$w \odot h / \sqrt{\operatorname{mean}(h^2) + \epsilon}$, rounded where Llama rounds it."""
    x = h.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return weight * x.to(h.dtype)


def _together(products: Sequence[Callable], x: Tensor, dtype: torch.dtype) -> Tensor:
    if len(products) == 1:
        return products[0](x).to(dtype)
    return torch.cat([product(x).to(dtype) for product in products], 1)


def _product(weight: PackedTensor) -> Callable[[Tensor], Tensor]:
    r"""$x \mapsto x\,\hat W^\top$ by the kernel, for few rows, in the kernel's type."""
    narrow, (rows, columns) = machine().dtype, weight.shape
    codes, scales, after, order = weight.codes, weight.scales, weight.after, weight.order
    group, fill = 0 if weight.kind == "int8" else weight.kernel_group, weight.columns - columns
    ones = torch.ones(len(codes), dtype=narrow) if weight.kind == "int8" else None
    twice, cut = weight.kind == "two int4", len(codes) != rows

    def multiply(x: Tensor) -> Tensor:
        if order is not None:
            x = x.index_select(1, order)
        x = x.to(narrow)
        if fill:
            x = nn.functional.pad(x, (0, fill))
        if twice:
            x = torch.cat([x, x], 1)
        if ones is None:
            y = torch._weight_int4pack_mm_for_cpu(x, codes, group, scales.contiguous())
        else:  # the kernel loads whole registers
            y = torch._weight_int8pack_mm(x if x.data_ptr() % 32 == 0 else x.clone(), codes, ones)
        if after is not None:
            y = y * after
        return y[:, :rows] if cut else y

    return multiply


# --------------------------------------------------------------------------------------- the model

_STEPS: WeakKeyDictionary[nn.Module, Step | str] = WeakKeyDictionary()


def step_of(model: LlamaForCausalLM) -> Step | str:
    """The model's prepared step, or in a few words why it has none."""
    step = _STEPS.get(model)
    if isinstance(step, Step) and step.holds():
        return step
    try:
        step = Step(model)
    except (Unfit, AttributeError) as problem:
        step = str(problem)
    _STEPS[model] = step
    return step


class DecodingLlama(LlamaForCausalLM):
    """A `LlamaForCausalLM` of packed layers that takes the short way to each next token.

    `accelerate` and `fast` make such models. Prompts, and whatever the short way does not know, run
    through the model's modules as always; `step_for` says which way a call takes.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As in transformers: a `CausalLMOutputWithPast`, or a tuple where one is asked for."""
        call = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            **kwargs,
        }
        step = step_for(self, **call)
        if isinstance(step, str):
            return super().forward(**call)
        cache = past_key_values
        cache.layers = [
            layer if type(layer) is RoomyLayer else RoomyLayer(layer) for layer in cache.layers
        ]
        for layer in cache.layers:
            layer.make_room()
        end = cache.layers[0].length
        if position_ids is None:
            position_ids = torch.full_like(input_ids, end)
        seen = None
        if attention_mask is not None and not attention_mask.all():
            seen = attention_mask[:, None, None].bool()
        logits = step(input_ids, cache.layers, position_ids, seen)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


def step_for(model: DecodingLlama, **call: Any) -> Step | str:
    """The step that a call of `forward` can take, or in a few words why it takes none."""
    ids, cache, mask = (call.get(k) for k in ("input_ids", "past_key_values", "attention_mask"))
    if ids is None or ids.dim() != 2 or ids.shape[1] != 1:
        return "not one new token for each sequence"
    if model.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return "gradients, training or automatic types"
    if type(cache) is not DynamicCache or call.get("use_cache") is False:
        return "no cache of the ordinary kind"
    layers, positions = cache.layers, call.get("position_ids")
    if len(layers) != len(model.model.layers) or any(
        type(layer) not in (DynamicLayer, RoomyLayer) or not layer.is_initialized
        for layer in layers
    ):
        return "no cache of the ordinary kind"
    batch, _, length, _ = layers[0].keys.shape
    if batch != len(ids):
        return "another number of sequences in the cache"
    if mask is not None and tuple(getattr(mask, "shape", ())) != (batch, length + 1):
        return "a mask that is not one entry for each token"
    if positions is not None and positions.shape != ids.shape and positions.shape != (1, 1):
        return "positions of another shape"
    if call.get("inputs_embeds") is not None or call.get("labels") is not None:
        return "embeddings or labels"
    if isinstance(call.get("logits_to_keep"), Tensor):
        return "chosen logits"
    told = model.config, call
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(told[0], name, False) or call.get(name):
            return "states or attention asked for"
    if not getattr(told[0], "return_dict", True) or call.get("return_dict") is False:
        return "a tuple asked for"
    if unknown := set(call) - _KNOWN:
        return f"{min(unknown)} given"
    step = step_of(model)
    if isinstance(step, str):
        return step
    if layers[0].keys.dtype != step.dtype or layers[0].keys.device != ids.device:
        return "a cache of another type or device"
    if batch >= step.limit:
        return "so many sequences that reading weights back is faster"
    return step


_KNOWN = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels"),
    *("use_cache", "logits_to_keep", "cache_position", "return_dict"),
    *("output_attentions", "output_hidden_states"),
}


def with_short_way(model: Model) -> Model:
    """Let a new model of packed layers decode by `Step`, if it is one that the step knows.

    Layers that see the same inputs get views of codes that stand side by side; the model given is
    changed, so it must be one that no one else has. Other models are returned as they are.
    """
    if type(model) is LlamaForCausalLM and machine().dtype is not None:
        for block in model.model.layers:
            for parent, names in (
                (block.self_attn, ("q_proj", "k_proj", "v_proj")),
                (block.mlp, ("gate_proj", "up_proj")),
            ):
                layers = [getattr(parent, name) for name in names]
                if not all(_is_packed(layer) for layer in layers):
                    continue
                views = side_by_side([layer.quantized for layer in layers])
                for layer, view in zip(layers, views or ()):
                    for name, tensor in view.tensors().items():
                        layer._buffers[name] = tensor
        model.__class__ = DecodingLlama
    return model
